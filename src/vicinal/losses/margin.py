"""Margin losses: softmax over cosines to one weight vector a class, harder for the true class by a margin.

    cos_ij = x_i . w_j / (|x_i| |w_j|)
    L      = mean_i -log softmax_j(s t_ij)[y_i],      t_ij = cos_ij for j != y_i

and the classes here differ only in what they make of the true class's cosine:

    ArcFace           t = cos(theta + m)  if theta + m < pi,  else cos(theta) - m sin(m)
    EasyArcFace       t = cos(theta + m)  if cos(theta) > 0,  else cos(theta)
    SubCenterArcFace  as ArcFace, cos_ij being the largest over the K weight vectors of class j
    CosFace           t = cos(theta) - m

Letters: B batch, D numbers an embedding, C classes, K sub-centres, x embeddings, w class weights, y labels, theta the
angle between x and the weight of its class, m margin, s scale.

All of it is in float32 under autocast (PML issue 309: class weights rounded to half precision silently cost accuracy),
except, from thousands of classes on, the products with the *other* classes under bfloat16: see `losses.classes`, which
then never holds the B x C cosines either.
The derivative of cos(theta + m) holds 1 / sin(theta), which is infinite where an embedding lies on its class weight;
there sin(theta) is held at 1e-6, and its gradient is dropped.

The classes are one per class *present in training*: a weight for a class without images would only repel.
"""

from __future__ import annotations

import math
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vicinal.losses.classes import check_sizes, margin_softmax, refuse_groups
from vicinal.losses.cosine import unit

__all__ = ["ArcFace", "CosFace", "EasyArcFace", "SubCenterArcFace", "start_from_class_means"]


class ArcFace(nn.Module):
    """Additive angular margin: t = cos(theta + m) on the true class only. Deng et al. 2019, arXiv:1801.07698.

    Past theta = pi - m, where cos(theta + m) would rise again, the logit goes on as cos(theta) - m sin(m), as in the
    authors' code.

    Args:
        dim: D, the width of the embeddings.
        classes: C, labels are 0 .. C - 1.
        margin: m, in radians. The paper: 0.5. UNICOM, for tuning a pretrained model: 0.25 to 0.35 with a scale of 32.
        scale: s, the inverse temperature. The paper: 64.

    Raises:
        ValueError: a size or setting is out of its range.

    >>> loss = ArcFace(dim=2, classes=2, margin=0.0, scale=1.0)
    >>> _ = loss.weight.data.copy_(torch.eye(2))
    >>> loss(torch.tensor([[3.0, 0.0]]), torch.tensor([0])).item()    # log(1 + e^-1)
    0.31326...
    """

    weight: nn.Parameter

    def __init__(self, dim: int, classes: int, *, margin: float = 0.5, scale: float = 64.0) -> None:
        super().__init__()
        _check(dim, classes, scale)
        _check_angle(margin)
        self.margin = margin
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(classes, dim))

    def forward(
        self, embeddings: Float[Tensor, "B D"], labels: Int[Tensor, "B"], *, groups: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, ""]:
        """The mean loss of the batch. `groups` belong to pair losses and are refused."""
        refuse_groups(groups)
        return margin_softmax(embeddings, self.weight, labels, lambda cos_B: _arc(cos_B, self.margin), self.scale)


class EasyArcFace(nn.Module):
    """ArcFace that asks for no margin past a right angle: t = cos(theta + m) if cos(theta) > 0, else cos(theta).

    The "easy margin" of the authors' code. For noisy labels, and for a start far from the data: an embedding on the
    wrong side of its class weight is not pushed by the margin as well. At theta = pi / 2 the logit jumps by sin(m).

    Args:
        dim: D, the width of the embeddings.
        classes: C, labels are 0 .. C - 1.
        margin: m, in radians. The paper: 0.5.
        scale: s, the inverse temperature. The paper: 64.

    Raises:
        ValueError: a size or setting is out of its range.

    >>> loss = EasyArcFace(dim=2, classes=2, margin=0.5, scale=1.0)
    >>> _ = loss.weight.data.copy_(torch.eye(2))
    >>> loss(torch.tensor([[-1.0, 0.0]]), torch.tensor([0])).item()    # no margin here: log(1 + e)
    1.31326...
    """

    weight: nn.Parameter

    def __init__(self, dim: int, classes: int, *, margin: float = 0.5, scale: float = 64.0) -> None:
        super().__init__()
        _check(dim, classes, scale)
        _check_angle(margin)
        self.margin = margin
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(classes, dim))

    def forward(
        self, embeddings: Float[Tensor, "B D"], labels: Int[Tensor, "B"], *, groups: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, ""]:
        """The mean loss of the batch. `groups` belong to pair losses and are refused."""
        refuse_groups(groups)
        return margin_softmax(embeddings, self.weight, labels, lambda cos_B: _easy_arc(cos_B, self.margin), self.scale)


class SubCenterArcFace(nn.Module):
    """ArcFace with K weight vectors a class, the nearest of which counts. Deng et al. 2020 (ECCV).

    For classes that look several ways (front and back, symbol and wordmark), and for noisy labels: the odd ones gather
    at a sub-centre of their own. `weight` is "C K D".

    Args:
        dim: D, the width of the embeddings.
        classes: C, labels are 0 .. C - 1.
        subcenters: K. The paper: 3.
        margin: m, in radians. The paper: 0.5.
        scale: s, the inverse temperature. The paper: 64.

    Raises:
        ValueError: a size or setting is out of its range.

    >>> loss = SubCenterArcFace(dim=2, classes=2, subcenters=2, margin=0.0, scale=1.0)
    >>> _ = loss.weight.data.copy_(torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]]))
    >>> loss(torch.tensor([[-3.0, 0.0]]), torch.tensor([0])).item()    # its second sub-centre: log(1 + e^-1)
    0.31326...
    """

    weight: nn.Parameter

    def __init__(
        self, dim: int, classes: int, *, subcenters: int = 3, margin: float = 0.5, scale: float = 64.0
    ) -> None:
        super().__init__()
        _check(dim, classes, scale)
        _check_angle(margin)
        if subcenters < 1:
            raise ValueError(f"subcenters must be at least 1, not {subcenters}")
        self.margin = margin
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(classes, subcenters, dim))

    def forward(
        self, embeddings: Float[Tensor, "B D"], labels: Int[Tensor, "B"], *, groups: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, ""]:
        """The mean loss of the batch. `groups` belong to pair losses and are refused."""
        refuse_groups(groups)
        return margin_softmax(embeddings, self.weight, labels, lambda cos_B: _arc(cos_B, self.margin), self.scale)


class CosFace(nn.Module):
    """Additive cosine margin: t = cos(theta) - m on the true class only. Wang et al. 2018, arXiv:1801.09414.

    Args:
        dim: D, the width of the embeddings.
        classes: C, labels are 0 .. C - 1.
        margin: m, a difference of cosines. The paper: 0.35.
        scale: s, the inverse temperature. The paper: 64.

    Raises:
        ValueError: a size or setting is out of its range.

    >>> loss = CosFace(dim=2, classes=2, margin=1.0, scale=1.0)
    >>> _ = loss.weight.data.copy_(torch.eye(2))
    >>> loss(torch.tensor([[3.0, 0.0]]), torch.tensor([0])).item()    # two equal logits: log 2
    0.69314...
    """

    weight: nn.Parameter

    def __init__(self, dim: int, classes: int, *, margin: float = 0.35, scale: float = 64.0) -> None:
        super().__init__()
        _check(dim, classes, scale)
        if not 0 <= margin < 2:
            raise ValueError(f"margin is a difference of cosines, from 0 to below 2, not {margin}")
        self.margin = margin
        self.scale = scale
        self.weight = nn.Parameter(torch.randn(classes, dim))

    def forward(
        self, embeddings: Float[Tensor, "B D"], labels: Int[Tensor, "B"], *, groups: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, ""]:
        """The mean loss of the batch. `groups` belong to pair losses and are refused."""
        refuse_groups(groups)
        return margin_softmax(embeddings, self.weight, labels, lambda cos_B: cos_B - self.margin, self.scale)


@runtime_checkable
class _HasWeight(Protocol):
    """A class loss, seen from outside."""

    weight: nn.Parameter


@torch.no_grad()
def start_from_class_means(
    loss: _HasWeight,
    embeddings: Float[Tensor, "N D"],
    labels: Int[Tensor, "N"],
) -> None:
    """Set each class weight to the mean direction of the class's embeddings, in place.

    The embeddings are those of the model before tuning. From random weights the first hundreds of steps go into finding
    what is already known, and tear at the pretrained features meanwhile.

    A class without embeddings keeps its random weight. With K sub-centres, the k-th starts from the mean of every K-th
    embedding of its class; from the class mean, where a class has too few. The rows get the length sqrt(D), that of the
    random ones: only the direction counts in the loss, but the longer the row, the less an optimiser's step turns it.

    Args:
        loss: any class loss; its `weight`, "C D" or "C K D", is changed.
        embeddings: N rows, normalised here, so that long ones do not outweigh others.
        labels: the class of each row, 0 .. C - 1.

    Raises:
        ValueError: the widths differ, or a label is not a class of the loss.

    >>> loss = ArcFace(dim=2, classes=2)
    >>> start_from_class_means(loss, torch.tensor([[5.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 1, 1]))
    >>> loss.weight.data
    tensor([[1.4142, 0.0000],
            [0.0000, 1.4142]])
    """
    weight_CKD = loss.weight.detach()
    if weight_CKD.dim() == 2:
        weight_CKD = weight_CKD[:, None]  # a view: one centre a class
    C, K, D = weight_CKD.shape
    if embeddings.shape[1] != D:
        raise ValueError(f"the embeddings have {embeddings.shape[1]} numbers, the class weights {D}")
    labels = labels.to(weight_CKD.device)
    if len(labels) and (int(labels.min()) < 0 or int(labels.max()) >= C):
        raise ValueError(f"labels must be 0 to {C - 1}, found {int(labels.min())} to {int(labels.max())}")
    unit_ND = unit(embeddings.to(weight_CKD.device))
    order = labels.argsort(stable=True)
    counts_C = labels.bincount(minlength=C)
    place_N = torch.empty_like(labels)  # each row's place among those of its class
    place_N[order] = torch.arange(len(labels), device=labels.device) - (counts_C.cumsum(0) - counts_C)[labels[order]]

    def means(slots: Tensor, size: int) -> Tensor:
        return unit(torch.zeros(size, D, device=unit_ND.device, dtype=unit_ND.dtype).index_add_(0, slots, unit_ND))

    class_CKD = means(labels, C)[:, None].expand(C, K, D)
    sub_CKD = means(labels * K + place_N % K, C * K).view(C, K, D)
    start_CKD = torch.where(sub_CKD.any(-1, keepdim=True), sub_CKD, class_CKD)
    known_C = start_CKD.any(-1).all(-1)
    weight_CKD[known_C] = (start_CKD[known_C] * math.sqrt(D)).to(weight_CKD.dtype)


def _cos_of_sum(cos_B: Float[Tensor, "B"], margin: float) -> Float[Tensor, "B"]:
    """cos(theta + m) = cos(theta) cos(m) - sin(theta) sin(m); finite, with finite gradient, at theta = 0 and pi."""
    sin_B = (1 - cos_B.square()).clamp_min(1e-12).sqrt()
    return cos_B * math.cos(margin) - sin_B * math.sin(margin)


def _arc(cos_B: Float[Tensor, "B"], margin: float) -> Float[Tensor, "B"]:
    past_B = cos_B - margin * math.sin(margin)
    return torch.where(cos_B > -math.cos(margin), _cos_of_sum(cos_B, margin), past_B)


def _easy_arc(cos_B: Float[Tensor, "B"], margin: float) -> Float[Tensor, "B"]:
    return torch.where(cos_B > 0, _cos_of_sum(cos_B, margin), cos_B)


def _check(dim: int, classes: int, scale: float) -> None:
    check_sizes(dim, classes)
    if not scale > 0:
        raise ValueError(f"scale must be above 0, not {scale}")


def _check_angle(margin: float) -> None:
    if not 0 <= margin < math.pi:
        raise ValueError(f"margin is an angle in radians, from 0 to below pi, not {margin}")
