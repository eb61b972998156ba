"""Contrastive losses of images and texts, in tiles: memory does not grow with the square of the batch.

    z_ij    = t x_i . y_j / (|x_i| |y_j|)  (+ b)

    InfoNCE = 1/(2B) sum_i (log sum_j e^z_ij - z+_i)  +  1/(2B) sum_j (log sum_i e^z_ij - z+_j)
    SigLIP  = 1/B sum_ij log(1 + e^(-l_ij z_ij)),    l_ij = 1 where i and j belong together, else -1

Letters: B batch, D numbers an embedding, x image and y text embeddings, i an image, j a text, t scale (learnt as its
logarithm), b bias, z+ the logit of the positive, l label.

**Equal ids** (one caption twice, two photos of one product) are never negatives. `equal="mask"` leaves such pairs out,
beside each item's own; `equal="multi_positive"` makes them positives: z+ is then the mean over them, l is 1. In a
softmax positives compete: they cannot all have the whole probability, and at t = 100 cosines that differ by .05 among
them cost as much as a negative would. So InfoNCE masks unless told otherwise. In SigLIP each pair stands for itself,
and an equal caption is as good a match as an item's own: there they are positives.

**In tiles.** Of the B x B logits only one tile exists at a time. InfoNCE goes over them twice: for the sums along rows
and columns, and for the gradient. SigLIP needs no sums, so its gradient is taken along in the same pass. All
exponentials of InfoNCE are taken less one number for the whole batch, between the smallest own logit and the largest
possible one; where these lie so far apart that float32 would underflow, they are taken in float64. An item's own pair
never goes through a tile: 1 - p of a pair that is all but learnt would be lost in rounding.

**Precision.** Under autocast the products of tiles are of its type (bfloat16, float16); all else is float32 or wider.

**Several processes.** Each gathers the embeddings and ids of all (see `ImageTextObjective`) and names its own rows by
`share`; its loss is that of these images and these texts against the whole batch, and the mean of the losses over the
processes, as of their gradients, is that of the whole. The work is shared, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from vicinal.losses.cosine import unit
from vicinal.types import InputError

__all__ = ["InfoNCE", "SigLIP", "fit_scale_and_bias"]

Equal = Literal["mask", "multi_positive"]

TILE = (512, 2048)  # images and texts at once: 4 MB of logits, which a cache holds
TILE_GPU = (4096, 16384)
MAX_SCALE = 100.0  # CLIP's; at larger ones training was unstable (Radford et al. 2021, section 2.5)
SAFE = 60.0  # e^-60 and what is e^-17 of it are normal numbers of float32, and so is e^60 times a batch
LOG2_E = math.log2(math.e)


class InfoNCE(nn.Module):
    """Softmax over texts for each image and over images for each text. Radford et al. 2021 (CLIP), arXiv:2103.00020.

    Equal to open_clip's `ClipLoss`. Labelled images without texts: see `NTXent` and `SupCon`.

    Args:
        scale: t to start from: the encoder's own (`encoder.logit_scale`), or the paper's 1 / 0.07 from scratch. Never
            above 100: the parameter itself is clamped there.
        learn_scale: whether t is trained.
        equal: "mask" or "multi_positive", what pairs of equal ids are.

    Raises:
        ValueError: the scale is not above 0 and at most 100, or `equal` unknown.

    >>> loss = InfoNCE(scale=1.0)
    >>> loss(torch.eye(2), torch.eye(2)).item()    # log(1 + e^-1)
    0.31326...
    >>> loss(torch.eye(2), torch.eye(2), ids=torch.tensor([7, 7])).item()    # no negatives are left
    0.0
    """

    log_scale: nn.Parameter

    def __init__(self, *, scale: float = 1 / 0.07, learn_scale: bool = True, equal: Equal = "mask") -> None:
        super().__init__()
        if not 0 < scale <= MAX_SCALE * (1 + 1e-6):  # a checkpoint's 100 may be 100.000004
            raise ValueError(f"scale must be above 0 and at most {MAX_SCALE:g}, not {scale}")
        _check_equal(equal)
        self.equal = equal
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn_scale)

    @property
    def scale(self) -> Float[Tensor, ""]:
        """t, at most 100."""
        with torch.no_grad():  # the parameter itself: past a clamp that is only in use there is no gradient back
            self.log_scale.clamp_(max=math.log(MAX_SCALE))
        return self.log_scale.exp()

    def __str__(self) -> str:
        return f"scale {self.scale.item():.2f}"

    def forward(
        self,
        image: Float[Tensor, "B D"],
        text: Float[Tensor, "B D"],
        *,
        ids: Int[Tensor, "B"] | None = None,
        share: slice | None = None,
    ) -> Float[Tensor, ""]:
        """The mean over the images and texts of the batch, or of the share of it.

        Args:
            image: of any length; they are normalised here.
            text: the i-th belongs to the i-th image.
            ids: items of equal ids are never each other's negatives.
            share: the rows that are this process's own, where the batch was gathered from several.
        """
        dtype = _product_type(image)
        own = _rows(share, len(image))
        with torch.autocast(image.device.type, enabled=False):
            x_BD, y_BD = unit(image), unit(text)
            scale = self.scale.to(x_BD.dtype)
            ids = _repeated(ids)
            masked = ids if self.equal == "mask" else None
            rows_b, columns_b = _LogSumExp.apply(x_BD, y_BD, scale, masked, own, dtype)
            positive_b = scale * (x_BD[own] * y_BD[own]).sum(1)
            # log(e^own + e^others) - own = softplus(others - own): exact down to the last bit that is left to learn.
            image_b, text_b = softplus(rows_b - positive_b), softplus(columns_b - positive_b)
            if ids is not None and self.equal == "multi_positive":
                image_b = image_b + positive_b - scale * (x_BD[own] * _group_means(y_BD, ids, own)).sum(1)
                text_b = text_b + positive_b - scale * (y_BD[own] * _group_means(x_BD, ids, own)).sum(1)
            return (image_b + text_b).mean() / 2


class SigLIP(nn.Module):
    """A yes or no for each pair of an image and a text. Zhai et al. 2023 (SigLIP), arXiv:2303.15343.

    Equal to open_clip's `SigLipLoss`: the sum over pairs is divided by B, not by B squared. The scale is never clamped:
    checkpoints have learnt 112 and more.

    Args:
        scale: t to start from: the encoder's own, or the paper's 10 from scratch.
        bias: b to start from: the encoder's own, or the paper's -10. For an encoder trained by a softmax, which has
            none, take both from `fit_scale_and_bias`; its t of 100 with a b of -10 would begin at a loss of 100.
        learn: whether t and b are trained.
        equal: "multi_positive" or "mask", what pairs of equal ids are.

    Raises:
        ValueError: the scale is not above 0, or `equal` unknown.

    >>> loss = SigLIP(scale=1.0, bias=0.0)
    >>> loss(torch.eye(2), torch.eye(2)).item()    # log(1 + e^-1) + log 2
    1.00640...
    """

    log_scale: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self, *, scale: float = 10.0, bias: float = -10.0, learn: bool = True, equal: Equal = "multi_positive"
    ) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise ValueError(f"scale must be above 0, not {scale}")
        _check_equal(equal)
        self.equal = equal
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learn)
        self.bias = nn.Parameter(torch.tensor(float(bias)), requires_grad=learn)

    @property
    def scale(self) -> Float[Tensor, ""]:
        """The factor t on cosines."""
        return self.log_scale.exp()

    def __str__(self) -> str:
        return f"scale {self.scale.item():.2f}, bias {self.bias.item():.2f}"

    def forward(
        self,
        image: Float[Tensor, "B D"],
        text: Float[Tensor, "B D"],
        *,
        ids: Int[Tensor, "B"] | None = None,
        share: slice | None = None,
    ) -> Float[Tensor, ""]:
        """The sum over all pairs, by B; or over those of the share's images, by their number.

        Args:
            image: of any length; they are normalised here.
            text: the i-th belongs to the i-th image.
            ids: items of equal ids are never each other's negatives.
            share: the rows that are this process's own, where the batch was gathered from several.
        """
        dtype = _product_type(image)
        own = _rows(share, len(image))
        with torch.autocast(image.device.type, enabled=False):
            x_BD, y_BD = unit(image), unit(text)
            scale, bias = self.scale.to(x_BD.dtype), self.bias.to(x_BD.dtype)
            asked = torch.is_grad_enabled()
            others = _SoftplusSum.apply(x_BD, y_BD, scale, bias, _repeated(ids), self.equal, own, dtype, asked)
            positive_b = scale * (x_BD[own] * y_BD[own]).sum(1) + bias
            total: Tensor = (others + softplus(-positive_b).sum()) / len(positive_b)
            return total


@torch.no_grad()
def fit_scale_and_bias(
    image: Float[Tensor, "N D"],
    text: Float[Tensor, "N D"],
    *,
    ids: Int[Tensor, "N"] | None = None,
    batch: int | None = None,
    least: float = 10.0,
    most: float = 200.0,
) -> tuple[float, float]:
    """The scale and bias with which SigLIP's loss on these vectors is least: where to start from a softmax's model.

    Logistic regression on the cosine, by Newton's method in float64. The best bias depends on the batch: an item meets
    its own text always, and of the others, kin or not, B - 1 instead of N - 1.

    Args:
        image: embeddings of the encoder before training; a few thousand are enough.
        text: the i-th belongs to the i-th image.
        ids: pairs of equal ids are positives.
        batch: B of the training to come: all pairs but an item's own are weighted as if there were B - 1 for each
            item. Default: N.
        least: the smallest scale, SigLIP's own from scratch. A model that knows nothing of the domain would have one
            near 0, at which nothing is learnt: the gradient of a vector is t times as large.
        most: the largest scale; without it, pairs that a threshold separates would have an infinite one.

    Returns:
        t and b for `SigLIP`; where t is a bound, b is the best beside it.

    Raises:
        InputError: there is no negative pair.

    >>> t, b = fit_scale_and_bias(torch.eye(8), torch.eye(8) + 0.5 * torch.eye(8).roll(1, 0))
    >>> t, round(-b / t, 2)    # separable: the threshold lies between the cosines .45 and .89
    (200.0, 0.67)
    >>> fit_scale_and_bias(torch.eye(8), torch.ones(8, 8), batch=2)    # nothing is known: e^(t s + b) = 1
    (10.0, -3.53...)
    """
    x_ND, y_ND = unit(image), unit(text)
    n = len(x_ND)
    ids = torch.arange(n, device=x_ND.device) if ids is None else ids
    _, count = _grouped(ids)
    if len(count) < 2:
        raise InputError(f"there is no negative pair among {n}: give vectors of several captions")
    weight = 1.0 if batch is None else (batch - 1) / (n - 1)
    kin = float((count.double() ** 2).sum())
    odds = (n + weight * (kin - n)) / (weight * (n * n - kin))
    middle = float(x_ND.mean(0).double() @ y_ND.mean(0).double())  # of all cosines
    point = torch.tensor([least, math.log(odds) - least * middle], dtype=torch.float64)
    value, gradient, hessian = _logistic(x_ND, y_ND, ids, point, weight)
    for _ in range(60):
        damping = 1e-9 * hessian.diagonal().sum() * torch.eye(2, dtype=torch.float64)
        step = torch.linalg.solve(hessian + damping, gradient)
        if (point[0] >= most and step[0] < 0) or (point[0] <= least and step[0] > 0):  # at a bound: the bias alone
            step = torch.stack([torch.zeros_like(step[0]), gradient[1] / hessian[1, 1]])
        length = 1.0
        while length > 1e-4:
            candidate = point - length * step
            candidate[0] = candidate[0].clamp(least, most)
            there = _logistic(x_ND, y_ND, ids, candidate, weight)
            if there[0] <= value:
                break
            length /= 2
        else:
            break
        moved = float((candidate - point).abs().max())
        point, (value, gradient, hessian) = candidate, there
        if moved < 1e-6:
            break
    return float(point[0]), float(point[1])


# ---- the two sums over tiles


class _LogSumExp(torch.autograd.Function):
    """log sum over j != i of e^(t x_i . y_j), and log sum over i != j: for the rows and the columns `own`.

    Differentiable in unit rows x and y and in t. Where `ids` are equal, nothing is added.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  (torch gives it no public type)
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        ids: Tensor | None,
        own: slice,
        product: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        factor = scale * LOG2_E  # logits in powers of two: exp2 is four times as fast as exp
        least = factor * (image[own] * text[own]).sum(1).min()  # an own logit, beside which the sums will stand
        shift = (least + factor) / 2
        wide = image.dtype == torch.float32 and bool(factor - least > 2 * SAFE * LOG2_E)
        tiles = _Tiles(image, text, factor, -shift, ids, own, product, torch.float64 if wide else image.dtype)
        rows, columns = tiles.zeros(len(image)), tiles.zeros(len(text))
        for i, j, z in tiles.of_rows_or_columns():
            e = z.exp2_()
            rows[i] += e.sum(1)
            columns[j] += e.sum(0)
        ctx.tiles, ctx.own = tiles, own
        ctx.save_for_backward(image, text, scale, rows, columns)
        logs = [((sums[own].log2() + shift) / LOG2_E).to(image.dtype) for sums in (rows, columns)]
        return logs[0], logs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_rows: Tensor, of_columns: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        image, text, scale, rows, columns = ctx.saved_tensors
        own: slice = ctx.own
        # The largest weight is made 1, so that float16 holds them.
        size = torch.maximum(of_rows.abs().max(), of_columns.abs().max()).clamp_min(1e-8)
        a, c = torch.zeros_like(rows), torch.zeros_like(columns)
        # Where there is nothing to sum, the gradient that comes in is zero.
        a[own] = (of_rows / size / rows[own]).masked_fill(rows[own] == 0, 0)
        c[own] = (of_columns / size / columns[own]).masked_fill(columns[own] == 0, 0)
        gradients = _Gradients(ctx.tiles, image, text, *ctx.needs_input_grad[:2])
        for i, j, z in ctx.tiles.of_rows_or_columns():
            gradients.add(i, j, z.exp2_().mul_(a[i, None] + c[j]))
        return *gradients.times(size / LOG2_E, scale), None, None, None


class _SoftplusSum(torch.autograd.Function):
    """The sum over images i of `own` and texts j != i of log(1 + e^(-l z)), z = t x_i . y_j + b.

    Differentiable in unit rows x and y, in t and in b; the gradient is written in the forward pass, where `asked`.
    Where `ids` are equal, l is 1, or, masked, nothing is added; elsewhere it is -1.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        ids: Tensor | None,
        equal: Equal,
        own: slice,
        product: torch.dtype,
        asked: bool,
    ) -> Tensor:
        masked, positive = (ids, None) if equal == "mask" else (None, ids)
        tiles = _Tiles(image, text, scale, bias, masked, own, product, image.dtype)
        gradients = _Gradients(tiles, image, text, *ctx.needs_input_grad[:2]) if asked else None
        total, to_bias = tiles.zeros(), tiles.zeros()
        for i, j, z in tiles.of_rows():
            sign = None
            if positive is not None:
                sign = torch.where(positive[i, None] == positive[j], -1.0, 1.0).to(z.dtype)
                _forget_own(z.mul_(sign), i, j)
            if gradients is not None:
                g = z.sigmoid() if sign is None else z.sigmoid().mul_(sign)
                to_bias += g.sum()
                gradients.add(i, j, g)
            total += z.relu().sum() + _sum_log1p(z.abs_().mul_(-LOG2_E).exp2_())
        if gradients is not None:
            ctx.gradients = (*gradients.times(torch.ones_like(scale), scale), to_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        gradients = (None if gradient is None else of_total * gradient for gradient in ctx.gradients)
        return *gradients, None, None, None, None, None


class _Tiles:
    """Logits f x_i . y_j + c, a tile at a time; -inf where an item meets itself or, masked, an equal id.

    Where products are rounded, y is taken less its mean and f x_i . mean is added again in full: the cosines of an
    encoder have far more in common than what tells them apart, and a smaller number has a smaller rounding error.

    Args:
        image: "B D", x.
        text: "B D", y.
        factor: f.
        constant: c.
        ids: pairs of equal ones are masked; None masks none.
        own: the rows, or columns, that are wanted.
        product: the type that x and y are rounded to.
        dtype: of the tiles.
    """

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        factor: Tensor,
        constant: Tensor,
        ids: Tensor | None,
        own: slice,
        product: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        self.mean = None if product == text.dtype else text.mean(0)
        self.left, self.right = (
            (image * factor).to(product),
            (text if self.mean is None else text - self.mean).to(product),
        )
        self.offset = (constant if self.mean is None else factor * (image @ self.mean) + constant).to(dtype)
        self.factor, self.ids, self.own, self.dtype = factor, ids, own, dtype
        self.tile = TILE if image.device.type == "cpu" else TILE_GPU

    def zeros(self, *shape: int) -> Tensor:
        """Zeros to sum tiles into."""
        return torch.zeros(shape, dtype=self.dtype, device=self.left.device)

    def of_rows(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """(images, texts, logits) that cover all texts of the images `own`; the logits are the caller's to change."""
        yield from self._over(self.own, slice(0, len(self.right)))

    def of_rows_or_columns(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """The same, that cover all texts of the images `own` and all images of the texts `own`."""
        yield from self.of_rows()
        yield from self._over(slice(0, self.own.start), self.own)
        yield from self._over(slice(self.own.stop, len(self.left)), self.own)

    def _over(self, images: slice, texts: slice) -> Iterator[tuple[slice, slice, Tensor]]:
        for i in _blocks(images, self.tile[0]):
            for j in _blocks(texts, self.tile[1]):
                z = (self.left[i] @ self.right[j].T).to(self.dtype)
                z += self.offset if self.mean is None else self.offset[i, None]
                if self.ids is not None:
                    z.masked_fill_(self.ids[i, None] == self.ids[j], -torch.inf)
                _forget_own(z, i, j)
                yield i, j, z


class _Gradients:
    """Sums over tiles of G Y and G' X, the gradients of images and texts, G being that of the logits of a tile."""

    def __init__(self, tiles: _Tiles, image: Tensor, text: Tensor, of_image: bool, of_text: bool) -> None:
        self.tiles = tiles
        self.units = image, text
        # One is needed for the scale at least; a tower that is locked costs nothing.
        self.image = torch.zeros_like(image) if of_image or not of_text else None
        self.text = torch.zeros_like(text) if of_text else None
        self.sums = torch.zeros_like(image[:, 0])

    def add(self, i: slice, j: slice, g: Tensor) -> None:
        """The part of one tile."""
        left, right = self.tiles.left[i], self.tiles.right[j]
        if self.tiles.mean is not None:
            self.sums[i] += g.sum(1)
        g = g.to(left.dtype)
        if self.image is not None:
            _add_product(self.image[i], g, right)
        if self.text is not None:
            _add_product(self.text[j], g.T, left)

    def times(self, size: Tensor, scale: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The gradients of images, texts and scale, `size` times as large."""
        if self.image is not None:
            if self.tiles.mean is not None:  # of which the right side of a tile was freed
                self.image.addr_(self.sums, self.tiles.mean)
            self.image *= self.tiles.factor * size
        if self.text is not None:
            self.text *= size  # the left side of a tile holds the factor already
        made, unit_BD = (self.text, self.units[1]) if self.image is None else (self.image, self.units[0])
        assert made is not None
        return self.image, self.text, (made * unit_BD).sum() / scale  # sum_ij G z = sum_i x_i . its gradient


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == to.dtype:
        to.addmm_(a, b)
    else:
        to += a @ b


def _forget_own(z: Tensor, i: slice, j: slice) -> None:
    """-inf where an image meets its own text."""
    if max(i.start, j.start) < min(i.stop, j.stop):
        z.diagonal(i.start - j.start).fill_(-torch.inf)


def _blocks(rows: slice, step: int) -> Iterator[slice]:
    for at in range(rows.start, rows.stop, step):
        yield slice(at, min(at + step, rows.stop))


def _sum_log1p(e: Tensor) -> Tensor:
    """The sum of log(1 + e), e from 0 to 1: log1p is slow, so it is taken of products of 32."""
    if e.numel() % 32 == 0:
        e = e.view(32, -1)
        while len(e) > 1:  # 1 + (a + b + ab) = (1 + a)(1 + b), without the 1 that would swallow a small e
            a, b = e.chunk(2)
            e = torch.addcmul(a + b, a, b)
    return e.log1p().sum()


# ---- ids, shares and types


def _group_means(vectors: Tensor, ids: Tensor, own: slice) -> Float[Tensor, "b D"]:
    """For each row of `own` the mean over all rows of its id."""
    group, count = _grouped(ids)
    sums = vectors.new_zeros(len(count), vectors.shape[1]).index_add(0, group, vectors)
    means: Tensor = (sums / count[:, None])[group[own]]
    return means


def _repeated(ids: Tensor | None) -> Tensor | None:
    """None where no two ids are equal, which makes each tile cheaper."""
    if ids is None:
        return None
    ordered = ids.sort().values
    return ids if bool((ordered[1:] == ordered[:-1]).any()) else None


def _grouped(ids: Tensor) -> tuple[Int[Tensor, "N"], Int[Tensor, "C"]]:
    """Each row's group, from 0, and the size of each group."""
    _, group, count = ids.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    return group, count


def _rows(share: slice | None, batch: int) -> slice:
    start, stop, step = (share or slice(None)).indices(batch)
    if step != 1 or start >= stop:
        raise ValueError(f"share must be some consecutive rows of the {batch}, not {share}")
    return slice(start, stop)


def _product_type(vectors: Tensor) -> torch.dtype:
    kind = vectors.device.type
    if vectors.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return torch.promote_types(vectors.dtype, torch.float32)
    return torch.get_autocast_dtype(kind)


def _check_equal(equal: str) -> None:
    if equal not in ("mask", "multi_positive"):
        raise ValueError(f"equal must be mask or multi_positive, not {equal!r}")


# ---- the logistic regression


def _logistic(
    x_ND: Tensor, y_ND: Tensor, ids: Tensor, point: Tensor, weight: float
) -> tuple[float, Float[Tensor, "2"], Float[Tensor, "2 2"]]:
    """Value, gradient and Hessian of the loss at (t, b), all pairs but an item's own counting `weight`."""
    t, b = point.tolist()
    sums = torch.zeros(6, dtype=torch.float64)
    for i in _blocks(slice(0, len(x_ND)), TILE[0]):
        s = (x_ND[i] @ y_ND.T).double()
        same = ids[i, None] == ids
        w = torch.full_like(s, weight)
        w.diagonal(i.start).fill_(1.0)
        z = torch.where(same, -1.0, 1.0) * (t * s + b)
        p = z.sigmoid()
        slope = torch.where(same, -w, w) * p
        curve = w * p * (1 - p)
        parts = [
            (w * softplus(z)).sum(),
            (slope * s).sum(),
            slope.sum(),
            (curve * s * s).sum(),
            (curve * s).sum(),
            curve.sum(),
        ]
        sums += torch.stack(parts).cpu()
    sums /= len(ids)
    return float(sums[0]), sums[1:3], sums[[3, 4, 4, 5]].view(2, 2)
