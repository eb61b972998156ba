"""Cosines in full precision: the one product that every label loss begins with.

    cos_ij = x_i . y_j / (|x_i| |y_j|)

Letters: N and M rows, D numbers a row.

Under autocast a matrix product runs in bf16 or fp16, and class weights would be rounded to it: at scale 64 an error of
0.004 in a cosine is one of 0.25 in a logit. So the product is taken outside autocast, in float32 or wider.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

__all__ = ["cosines", "unit"]


def unit(vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
    """Rows of length one, in float32 or wider; a row shorter than 1e-7 keeps its direction and stays short.

    >>> unit(torch.tensor([[3.0, 4.0]], dtype=torch.bfloat16))
    tensor([[0.6000, 0.8000]])
    """
    return normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1, eps=1e-7)


def cosines(x: Float[Tensor, "N D"], y: Float[Tensor, "M D"]) -> Float[Tensor, "N M"]:
    """The cosine of each row of `x` with each row of `y`, never in half precision.

    >>> cosines(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0], [5.0, 0.0]]))
    tensor([[0., 1.]])
    """
    with torch.autocast(x.device.type, enabled=False):
        left = unit(x)
        # Identity of objects, not equality: the Gram matrix of a batch normalises its rows once.
        right = left if x is y else unit(y).to(left.dtype)
        return left @ right.mT
