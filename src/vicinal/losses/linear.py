"""A linear classifier on embeddings as they come, to be thrown away after training.

    L = mean_i [-z_iy + log sum_c exp z_ic],   z_ic = w_c . x_i + b_c

Letters: B batch, D numbers an embedding, C classes, x embeddings, y labels, w and b weight and bias of each class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vicinal.losses.classes import check_sizes, refuse_groups

__all__ = ["CrossEntropy"]


class CrossEntropy(nn.Module):
    """Softmax cross-entropy of a linear classifier, on embeddings of whatever length, without scale or margin.

    What the overlap adapter is trained by with labels: the classifier is trained along and thrown away. The losses with
    a margin judge directions alone; here the length of an embedding counts as well, so the class weights start at
    random (uniform in +-1/sqrt(D), as torch has it), not from class means.

    Args:
        dim: D.
        classes: C, labels are 0 .. C - 1.
        label_smoothing: the share of the target that is spread over all classes. The overlap adapter: 0.

    Raises:
        ValueError: a size is below 1, or the smoothing not from 0 to below 1.

    >>> loss = CrossEntropy(2, 2)
    >>> _ = loss.weight.data.copy_(torch.eye(2)); _ = loss.bias.data.zero_()
    >>> round(loss(torch.tensor([[3.0, 0.0]]), torch.tensor([0])).item(), 5)    # log(1 + e^-3)
    0.04859
    """

    def __init__(self, dim: int, classes: int, *, label_smoothing: float = 0.0) -> None:
        super().__init__()
        check_sizes(dim, classes)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be from 0 to below 1, not {label_smoothing}")
        self.label_smoothing = label_smoothing
        bound = dim**-0.5
        self.weight = nn.Parameter(torch.empty(classes, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(classes).uniform_(-bound, bound))

    def forward(
        self, embeddings: Float[Tensor, "B D"], labels: Int[Tensor, "B"], *, groups: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, ""]:
        """The mean loss of the batch, in float32.

        Args:
            embeddings: of any length.
            labels: 0 .. C - 1.
            groups: not taken: this loss compares no items.
        """
        refuse_groups(groups)
        with torch.autocast(embeddings.device.type, enabled=False):
            wide = torch.promote_types(embeddings.dtype, self.weight.dtype)
            logits = F.linear(embeddings.to(wide), self.weight.to(wide), self.bias.to(wide))
            return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
