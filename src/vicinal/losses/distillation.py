"""Staying near a teacher. So far: near the frozen original.

    Retention  w mean_i (1 - x_i . z_i / (|x_i| |z_i|))

Letters: B batch, D numbers an embedding, x embeddings of the model that is tuned, z those of the frozen original for
the same images, w weight.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vicinal.losses.cosine import unit

__all__ = ["Retention"]


class Retention(nn.Module):
    """The price of leaving the original: the mean cosine distance to its embeddings, times a weight.

    What tuning gains on the classes it sees, it tends to lose on others; this holds the features where nothing pulls.
    The squared Euclidean distance of unit vectors is twice the cosine distance, so it is the same loss with w halved.

    Args:
        weight: w. 0 costs nothing and holds nothing; 1 to 10 is a beginning for margin losses.

    Raises:
        ValueError: the weight is below 0.

    >>> retention = Retention(weight=2.0)
    >>> retention(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 0.0]])).item()    # at a right angle
    2.0
    """

    def __init__(self, *, weight: float = 1.0) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"the weight of retention must be 0 or above, not {weight}")
        self.weight = weight

    def forward(self, embeddings: Float[Tensor, "B D"], original: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
        """The weighted mean distance; no gradient goes to `original`."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.weight * (1 - (unit(embeddings) * unit(original.detach())).sum(-1)).mean()
