"""Each item against all classes, whole or in tiles: the sums that class losses have in common.

    cos_ij = x_i . w_j / (|x_i| |w_j|);   with K vectors a class, the largest of their cosines
    over the classes:   r_i = log sum over j != y_i of e^(s cos_ij)         softmax:  L_i = log(1 + e^(r_i - s t_i))
    over the items:     r_j = log sum over i: y_i != j of e^(s cos_ij)      Proxy-Anchor

With many classes the matrix of cosines, and the several of its size and of the weight's that autograd would keep, are
most of a step's time and memory. From TILED_FROM weight vectors on it is never whole: a tile of classes at a time, the
forward pass keeps only r, and the backward pass makes each tile again and writes its gradient in place,

    d r_i / d cos_ij = s e^(s cos_ij - r_i),    d cos_ij / d w_j = (x_i - cos_ij w_j) / |w_j|     (x_i, w_j of length 1)

which is one product more than autograd needs, and still several times as fast.

Precision: in float32 or wider, except that under bfloat16 autocast the products of *tiles* are of bfloat16 operands, as
autocast means them to be; weights, sums, gradients, and all that concerns an item's own class stay in float32. Under
float16 autocast, whose range would lose the small terms of 100,000, they are in float32.

Letters: B batch, D numbers an embedding, C classes, K vectors a class, T vectors a tile, x embeddings, w class weights,
y labels, s scale, t the own class's cosine after the margin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, softplus

from vicinal.losses.cosine import cosines, unit

__all__ = ["check_sizes", "is_tiled", "margin_softmax", "own_and_others", "refuse_groups"]

TILED_FROM = 8192  # weight vectors; for fewer, the whole matrix is as fast
TILE_CPU = 1024  # weight vectors: what a second-level cache holds of them and of their cosines
TILE_GPU = 16384
EPS = 1e-7  # as in `unit`: a shorter weight is not made longer
NONE = -1e30  # a cosine that no sum notices, finite so that an empty sum has a gradient: zero


def is_tiled(weight: Float[Tensor, "C *K D"]) -> bool:
    """Whether there are so many weight vectors that their cosines are taken in tiles."""
    return weight.shape[:-1].numel() >= TILED_FROM


def margin_softmax(
    embeddings: Float[Tensor, "B D"],
    weight: Float[Tensor, "C *K D"],
    labels: Int[Tensor, "B"],
    target: Callable[[Float[Tensor, "B"]], Float[Tensor, "B"]],
    scale: float,
) -> Float[Tensor, ""]:
    """Mean softmax cross-entropy of s cos_ij, with `target` of the own class's cosine in its place.

    >>> x, w = torch.tensor([[3.0, 0.0]]), torch.eye(2)
    >>> margin_softmax(x, w, torch.tensor([0]), lambda cos: cos - 1, scale=1.0)    # two equal logits: log 2
    tensor(0.6931)
    """
    if is_tiled(weight):
        own_B, others_B = own_and_others(embeddings, weight, labels, scale, over="classes")
        return softplus(others_B - scale * target(own_B)).mean()
    cos_BC = cosines(embeddings, weight.flatten(0, -2))
    if weight.dim() == 3:
        # max, not amax: of equal sub-centres one takes the gradient, so that they can part.
        cos_BC = cos_BC.view(-1, *weight.shape[:2]).max(dim=2).values
    own_B = cos_BC.gather(1, labels[:, None]).squeeze(1)
    # B numbers replaced, not a second "B C" mask.
    return cross_entropy(scale * cos_BC.scatter(1, labels[:, None], target(own_B)[:, None]), labels)


def own_and_others(
    embeddings: Float[Tensor, "B D"],
    weight: Float[Tensor, "C *K D"],
    labels: Int[Tensor, "B"],
    scale: float,
    *,
    over: Literal["classes", "items"],
) -> tuple[Float[Tensor, "B"], Float[Tensor, "R"]]:
    """Each item's cosine to its own class, and r: over all other classes, or for each class over the others' items.

    In tiles, whatever C is. The logarithm of an empty sum is below -1e30 s.

    Args:
        embeddings: x, of any length.
        weight: w, one vector or K vectors a class, of any length; over the items, one.
        labels: y, 0 to C - 1.
        scale: s.
        over: what is summed over; r has B numbers for "classes", C for "items".

    Raises:
        ValueError: a sum over the items is asked for, and there are several vectors a class.

    >>> x, w = torch.tensor([[3.0, 0.0]]), torch.eye(2)
    >>> own_and_others(x, w, torch.tensor([0]), 1.0, over="classes")
    (tensor([1.]), tensor([0.]))
    """
    if over == "items" and weight.dim() == 3:
        raise ValueError("sums over the items are for one vector a class")
    device = embeddings.device.type
    half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
    with torch.autocast(device, enabled=False):
        x_BD = unit(embeddings)
        # float64 weights would make a float32 batch float64, as in `cosines` it is the embeddings that decide.
        weight_CKD = weight.to(x_BD.dtype).view(len(weight), -1, weight.shape[-1])
        operand = torch.bfloat16 if half else x_BD.dtype
        found: tuple[Tensor, Tensor] = _OwnAndOthers.apply(x_BD, weight_CKD, labels, scale, over == "items", operand)
    return found


def refuse_groups(groups: Tensor | None) -> None:
    """Class losses compare no items with each other.

    Raises:
        ValueError: there are groups.
    """
    if groups is not None:
        raise ValueError("groups say which items of a batch are never negatives: only pair losses compare items")


def check_sizes(dim: int, classes: int) -> None:
    """What every class loss is built with.

    Raises:
        ValueError: the width or the number of classes is below 1.
    """
    if dim < 1 or classes < 1:
        raise ValueError(f"dim and classes must be at least 1, not {dim} and {classes}")


class _OwnAndOthers(torch.autograd.Function):
    """See the head of this module; `x` has rows of length one."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  (torch gives it no public type)
        x_BD: Tensor,
        weight_CKD: Tensor,
        labels: Tensor,
        scale: float,
        items: bool,
        operand: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        tiles = _Tiles(x_BD, weight_CKD, labels, operand)
        if items:
            others = torch.cat([tiles.take(part, None).cos.mul_(scale).logsumexp(0) for part in tiles])
        else:
            others = x_BD.new_full((len(x_BD),), NONE)
            near = None  # at first; then the cosines that weigh most so far
            for part in tiles:
                others = torch.logaddexp(others, tiles.take(part, near).cos.mul_(scale).logsumexp(1))
                near = _near(others, scale)[:, None]
        own_B = _own(x_BD, weight_CKD.index_select(0, labels))
        ctx.save_for_backward(x_BD, weight_CKD, labels, others)
        ctx.scale, ctx.items, ctx.operand = scale, items, operand
        return own_B, others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_own: Tensor, grad_others: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x_BD, weight_CKD, labels, others = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad[:2]
        grad_x = torch.zeros_like(x_BD) if for_x else None
        grad_weight = torch.empty_like(weight_CKD) if for_weight else None
        near, strength = _near(others, ctx.scale), ctx.scale * grad_others
        with torch.autocast(x_BD.device.type, enabled=False):
            tiles = _Tiles(x_BD, weight_CKD, labels, ctx.operand)
            for part in tiles:
                across = (None, part) if ctx.items else (slice(None), None)
                tile = tiles.take(part, near[across])
                pull_BT = (tile.cos * ctx.scale).sub_(others[across]).exp_().mul_(strength[across])
                turn_BT = pull_BT * tile.cos
                if tile.chosen is not None:  # to the one of a class's vectors that was nearest
                    pull_BT, turn_BT = (_spread(t, tile.chosen, weight_CKD.shape[1]) for t in (pull_BT, turn_BT))
                if grad_x is not None:
                    grad_x += pull_BT.to(ctx.operand) @ tile.unit
                if grad_weight is not None:
                    along_TD = tile.unit * (turn_BT.sum(0) * tile.turn)[:, None].to(ctx.operand)
                    pull_BT = pull_BT.mul_(tile.shrink).to(ctx.operand)
                    grad_weight[part].view(along_TD.shape).copy_(along_TD.addmm_(pull_BT.T, tiles.x))
            _add_own(x_BD, weight_CKD, labels, grad_own, grad_x, grad_weight)
        return grad_x, grad_weight, None, None, None, None


class _Tile(NamedTuple):
    unit: Float[Tensor, "T D"]  # the vectors of some classes, of length one, as operands of products
    shrink: Float[Tensor, "T"]  # 1 / |w|
    turn: Float[Tensor, "T"]  # -1 / |w|; 0 where w is too short to be made a unit vector
    cos: Float[Tensor, "B t"]  # of t = T / K classes; NONE at an item's own
    chosen: Int[Tensor, "B t"] | None  # which of K vectors was nearest


class _Tiles:
    """The classes in parts of which vectors and cosines fit into a cache."""

    def __init__(self, x_BD: Tensor, weight_CKD: Tensor, labels: Tensor, operand: torch.dtype) -> None:
        self.x = x_BD.to(operand)
        self.dtype = x_BD.dtype
        self.weight = weight_CKD
        self.labels = labels

    def __iter__(self) -> Iterator[slice]:
        C, K, _ = self.weight.shape
        step = max(1, (TILE_GPU if self.x.is_cuda else TILE_CPU) // K)
        return (slice(start, min(start + step, C)) for start in range(0, C, step))

    def take(self, part: slice, near: Tensor | None) -> _Tile:
        """`near`: about the cosines that matter, "B 1" or "1 t", if something is known of them."""
        _, K, D = self.weight.shape
        raw_TD = self.weight[part].reshape(-1, D)
        norm_T = raw_TD.norm(dim=1)
        shrink_T = norm_T.clamp_min(EPS).reciprocal_()
        unit_TD = torch.mul(raw_TD, shrink_T[:, None], out=raw_TD.new_empty(raw_TD.shape, dtype=self.x.dtype))
        cos_BT, chosen = self._inner(unit_TD, near), None
        if K > 1:
            # max, not amax: of equal sub-centres one takes the gradient, so that they can part.
            cos_BT, chosen = cos_BT.view(len(cos_BT), -1, K).max(dim=2)
        # B numbers are added, and not a mask made; for items of other tiles, a zero.
        place = (self.labels - part.start)[:, None]
        inside = (place >= 0) & (place < cos_BT.shape[1])
        cos_BT.scatter_add_(1, place.where(inside, 0), torch.where(inside, NONE, 0.0).to(cos_BT.dtype))
        return _Tile(unit_TD, shrink_T, -shrink_T * (norm_T > EPS), cos_BT, chosen)

    def _inner(self, unit_TD: Tensor, near: Tensor | None) -> Float[Tensor, "B T"]:
        """The products; of bfloat16 operands as exact as these are.

        Such a product is summed in float32, but comes out rounded: of a cosine of 0.7 at a scale of 64 that changes the
        logit by up to 0.12. What is subtracted before the rounding leaves a small number with as many digits.
        """
        if self.x.dtype == self.dtype:
            return self.x @ unit_TD.T
        near = self.x @ unit_TD.T if near is None else near.to(self.x.dtype)
        return torch.addmm(near, self.x, unit_TD.T, beta=-1).to(self.dtype).add_(near)


def _near(others: Tensor, scale: float) -> Tensor:
    return (others / scale).clamp(-1, 1)


def _spread(values_BT: Tensor, chosen: Tensor, K: int) -> Tensor:
    B, T = values_BT.shape
    return values_BT.new_zeros(B, T, K).scatter_(2, chosen[:, :, None], values_BT[:, :, None]).view(B, T * K)


def _own(x_BD: Tensor, weight_BKD: Tensor) -> Tensor:
    return (unit(weight_BKD) @ x_BD[:, :, None]).squeeze(2).max(dim=1).values


def _add_own(
    x_BD: Tensor,
    weight_CKD: Tensor,
    labels: Tensor,
    grad_own: Tensor,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """The part of the gradient that comes through each item's own class, in full precision."""
    with torch.enable_grad():
        x, rows = x_BD.detach().requires_grad_(), weight_CKD.index_select(0, labels).requires_grad_()
        to_x, to_rows = torch.autograd.grad(_own(x, rows), (x, rows), grad_own)
    if grad_x is not None:
        grad_x += to_x
    if grad_weight is not None:
        # Items of one class are summed first, and each then writes the same: on a GPU index_add_ sums in any order.
        same_BB = labels[:, None] == labels
        total = (same_BB.to(to_rows.dtype) @ to_rows.flatten(1)).view(to_rows.shape)[same_BB.int().argmax(1)]
        grad_weight[labels] = grad_weight[labels] + total
