"""How much images of one class and images of different classes overlap in a model's eyes, and what changed that.

Image-text training binds images to texts, not images to images: cosines of *paired* images (one class) and *unpaired*
ones (two classes) are then hard to tell apart (intra-modal overlap, arXiv:2409.11338). Let p_u(s) be the distribution
of the cosines of class u's images with the others of u, q_u(s) with those of other classes; each class counts once:

    p = mean_u p_u,   q = mean_u q_u
    overlap   = sum over 200 equal bins, from the smallest to the largest cosine, of min(p, q)      0 apart, 1 the same
    auroc     = P(s+ > s-) + P(s+ = s-) / 2,   s+ ~ p, s- ~ q, to .001                              1 apart, .5 the same
    d_prime   = (mean p - mean q) / sqrt((var p + var q) / 2)
    variance  = 1 - |mean_i x_i|^2: the variances of all dimensions of the unit vectors, added up   0 all alike
    proxy-A   = 2 (1 - 2 e), clipped to 0 .. 2; e the error of a linear classifier that tells two sets of images apart,
                on classes that it did not see                                                      0 the same, 2 apart

Intervals resample classes, as everywhere (`intervals`); of a pair of two classes it is the first one's that is drawn.
Histograms of few pairs are rough, and roughness lowers the overlap: compare before and after on the same images.

Letters: N images, U classes, T bins, R resamples, D numbers an embedding, x unit vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray

from vicinal.evaluation.intervals import LEVELS, _weights
from vicinal.evaluation.verification import BINS, WIDTH, Similarities, _estimates, similarities
from vicinal.types import Embeddings, Estimate, InputError, Metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Overlap", "overlap", "overlap_change", "overlap_coefficient", "overlap_plot", "proxy_a_distance"]

COARSE = 200  # bins of the overlap
MOST = 3000  # images of which all pairs are taken: 4.5 million
STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)  # of the classifier of proxy-A, as scikit-learn's C

Array = NDArray[np.float64]


def overlap_coefficient(paired: ArrayLike, unpaired: ArrayLike, *, bins: int = COARSE) -> float:
    """The area that two distributions share: sum of min(p, q) over equal bins of their joint range.

    Args:
        paired: numbers, such as cosines of images of one class.
        unpaired: numbers.
        bins: how many.

    Raises:
        ValueError: one side is empty.

    >>> overlap_coefficient([0.8, 0.9], [0.1, 0.2]), overlap_coefficient([1.0, 2.0], [1.0, 2.0])
    (0.0, 1.0)
    """
    sides = [np.asarray(side, dtype=np.float64).ravel() for side in (paired, unpaired)]
    if not all(len(side) for side in sides):
        raise ValueError("overlap_coefficient compares two distributions, and one is empty")
    pooled = np.concatenate(sides)
    edges = np.histogram_bin_edges(pooled, bins)
    shares = [np.histogram(side, edges)[0] / len(side) for side in sides]
    return float(np.minimum(*shares).sum())


@dataclass(frozen=True, slots=True)
class Overlap:
    """What is counted of one set of embeddings: everything else follows from it for any weights of the classes.

    Args:
        pairs: the cosines of paired ("right") and unpaired ("wrong") images, by class.
        sums: "U D", of the unit vectors of each class.
        counts: "U", images of each class.
    """

    pairs: Similarities
    sums: Float[np.ndarray, "U D"]
    counts: Float[np.ndarray, "U"]

    @classmethod
    def of(cls, embeddings: Embeddings, *, most: int = MOST, seed: int = 0) -> Overlap:
        """Count.

        Args:
            embeddings: unit rows.
            most: of more images so many are drawn, the same number of each class as far as it has them.
            seed: of the draw; the same images of the same classes are drawn for every model.

        Raises:
            InputError: there is no pair of one class, or of two.
        """
        chosen = embeddings.where(_balanced(embeddings.labels, most, seed))
        pairs = similarities(chosen)
        unit = torch.from_numpy(np.searchsorted(pairs.units, chosen.labels.cpu().numpy()))
        vectors = chosen.vectors.cpu().double()
        sums = torch.zeros(len(pairs.units), vectors.shape[1]).double().index_add_(0, unit, vectors)
        return cls(pairs, sums.numpy(), np.bincount(unit.numpy(), minlength=len(pairs.units)).astype(np.float64))

    def distributions(self, weights: Float[np.ndarray, "R U"] | None = None) -> tuple[Array, Array]:
        """Both distributions, p and q, each "R T", in bins of .001 from -1 on; by default with each class once."""
        w = np.ones((1, len(self.counts))) if weights is None else weights
        found = []
        for table in (self.pairs.right, self.pairs.wrong):
            total = table.sum(1)
            shares = np.divide(table, total[:, None], out=np.zeros_like(table), where=total[:, None] > 0)
            found.append((w @ shares) / np.maximum(w @ (total > 0), 1e-300)[:, None])
        return found[0], found[1]

    def coarse(self) -> NDArray[np.intp]:
        """Which of the 200 bins each fine one falls into; they span the cosines that there are."""
        there = np.flatnonzero((self.pairs.right + self.pairs.wrong).sum(0))
        low, high = there[0], there[-1]
        place = (np.arange(BINS) - low) * COARSE // max(high - low + 1, 1)
        coarse: NDArray[np.intp] = place.clip(0, COARSE - 1)
        return coarse

    def values(self, weights: Float[np.ndarray, "R U"]) -> dict[str, Array]:
        """Each measure, "R", with so much weight on each class."""
        p, q = self.distributions(weights)
        starts = np.searchsorted(self.coarse(), np.arange(COARSE))  # cosines of fewer than 200 bins leave some empty
        kept = np.flatnonzero(np.diff(starts, append=BINS) > 0)
        rough = [np.add.reduceat(side, starts[kept], axis=1) for side in (p, q)]
        moments = self.pairs.moments
        has = moments[:, :, 0] > 0
        means = np.divide(
            moments[:, :, 1:], moments[:, :, :1], out=np.zeros_like(moments[:, :, 1:]), where=has[..., None]
        )
        first, second = (np.einsum("ru,uk->kr", weights, means[:, :, i]) / (weights @ has).T for i in (0, 1))
        below = np.cumsum(q, axis=1) - q
        mean = (weights @ self.sums) / (weights @ self.counts)[:, None]
        return {
            "overlap": np.minimum(*rough).sum(1),
            "auroc": (p * (below + q / 2)).sum(1),
            "d_prime": (first[0] - first[1]) / np.sqrt(np.maximum((second - first**2).mean(0), 1e-300)),
            "paired_mean": first[0],
            "unpaired_mean": first[1],
            "variance": 1 - np.square(mean).sum(1),
        }


def overlap(embeddings: Embeddings, *, most: int = MOST, resamples: int = 1000, seed: int = 0) -> Metrics:
    """How much paired and unpaired images overlap: see the head of this module.

    Args:
        embeddings: labelled, unit rows.
        most: images of which all pairs are taken; of more, so many are drawn, classes alike.
        resamples: of the bootstrap.
        seed: of the draw and of the resampling.

    Returns:
        `overlap`, `auroc`, `d_prime`, `paired_mean`, `unpaired_mean`, `variance`, with intervals over classes.

    Raises:
        InputError: there is no pair of one class, or of two.

    >>> x = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    >>> found = overlap(Embeddings(x, torch.tensor([0, 0, 1, 1]), ("a", "b", "c", "d"), ("cat", "dog")))
    >>> found["overlap"].value, found["auroc"].value
    (0.0, 1.0)
    """
    counted = Overlap.of(embeddings, most=most, seed=seed)
    return _estimates(counted.values, len(counted.counts), int(counted.counts.sum()), resamples, seed, width=BINS)


def overlap_change(
    before: Embeddings, after: Embeddings, *, most: int = MOST, resamples: int = 1000, seed: int = 0
) -> Metrics:
    """What changed, on the same images: each measure after less before, with the interval of the paired difference.

    Args:
        before: as in `overlap`.
        after: of the same images, in the same order; its width may be another.
        most: as in `overlap`.
        resamples: as in `overlap`.
        seed: as in `overlap`.

    Raises:
        InputError: the images differ, or as in `overlap`.
    """
    if before.ids != after.ids or not torch.equal(before.labels, after.labels):
        raise InputError("a change of overlap is of the same images before and after; embed one table with both models")
    old, new = (Overlap.of(side, most=most, seed=seed) for side in (before, after))

    def values(weights: Float[np.ndarray, "R U"]) -> dict[str, Array]:
        first, second = old.values(weights), new.values(weights)
        return {name: second[name] - first[name] for name in first}

    return _estimates(values, len(old.counts), int(old.counts.sum()), resamples, seed, width=2 * BINS)


def proxy_a_distance(
    one: Embeddings, other: Embeddings, *, most: int = 1000, resamples: int = 1000, seed: int = 0
) -> Estimate:
    """How easily a linear classifier tells two sets of images apart: 2 (1 - 2 e), from 0 (not at all) to 2.

    Ben-David et al. 2007. Half of each side's classes train it, the other half are asked about, so that it is the sets
    that are told apart and not their pictures; its strength is chosen on a third of the training classes.

    Args:
        one: of one data set: a generic one, or a model's before.
        other: of the other, in vectors of the same width.
        most: images of each side, drawn alike from its classes; both sides get equally many.
        resamples: of the bootstrap over held-out classes.
        seed: of draw, division and resampling.

    Raises:
        InputError: other widths, or a side with fewer than four classes.

    >>> generator = torch.Generator().manual_seed(0)
    >>> def some(shift):
    ...     x = torch.nn.functional.normalize(torch.randn(80, 4, generator=generator) + shift, dim=1)
    ...     ids = tuple(map(str, range(80)))
    ...     return Embeddings(x, torch.arange(80) % 8, ids, tuple("abcdefgh"))
    >>> proxy_a_distance(some(torch.tensor([9.0, 0, 0, 0])), some(torch.tensor([0, 9.0, 0, 0]))).value
    2.0
    """
    from sklearn.linear_model import LogisticRegression

    if one.vectors.shape[1] != other.vectors.shape[1]:
        raise InputError(
            f"proxy-A compares vectors of one width, not of {one.vectors.shape[1]} and {other.vectors.shape[1]} numbers"
        )
    size = min(len(one), len(other), most)
    X, side, unit, part = [], [], [], []
    for place, given in enumerate((one, other)):
        drawn = given.where(_balanced(given.labels, size, seed))
        classes = np.unique(drawn.labels.cpu().numpy())
        if len(classes) < 4:
            raise InputError(f"proxy-A needs four classes on each side, and one side has {len(classes)}")
        order = np.random.default_rng([seed, place]).permutation(len(classes))
        thirds = np.zeros(len(classes), dtype=np.int64)  # 0 fit, 1 choose, 2 ask
        thirds[order[: len(classes) // 2]] = 2
        thirds[order[len(classes) // 2 :][: max(1, len(classes) // 6)]] = 1
        found = np.searchsorted(classes, drawn.labels.cpu().numpy())
        X.append(drawn.vectors.cpu().double().numpy())
        side.append(np.full(len(drawn), place))
        unit.append(found + place * 10**9)
        part.append(thirds[found])
    vectors, sides, units, parts = (np.concatenate(a) for a in (X, side, unit, part))

    def errors(strength: float, fitted: NDArray[np.bool_], asked: NDArray[np.bool_]) -> Array:
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=1000)
        model.fit(vectors[fitted], sides[fitted])
        wrong: Array = (model.predict(vectors[asked]) != sides[asked]).astype(np.float64)
        return wrong

    def balanced(wrong: Array, of: NDArray[np.int64]) -> float:
        return float(np.mean([wrong[of == place].mean() for place in (0, 1)]))

    chosen = min(STRENGTHS, key=lambda c: balanced(errors(c, parts == 0, parts == 1), sides[parts == 1]))
    asked = parts == 2
    wrong = errors(chosen, ~asked, asked)
    ways = [
        _side_errors(wrong[sides[asked] == p], units[asked][sides[asked] == p], resamples, seed + p) for p in (0, 1)
    ]
    distances = [np.clip(2 * (1 - 2 * (a + b) / 2), 0, 2) for a, b in zip(*ways, strict=True)]
    low, high = np.percentile(distances[1], LEVELS)
    classes_asked = len(np.unique(units[asked]))
    return Estimate(float(distances[0][0]), float(low), float(high), n=classes_asked, queries=int(asked.sum()))


def _side_errors(wrong: Array, units: NDArray[np.int64], resamples: int, seed: int) -> tuple[Array, Array]:
    """The error of one side: as it is, "1", and with its classes resampled, "R"."""
    _, place = np.unique(units, return_inverse=True)
    sums, counts = np.bincount(place, wrong), np.bincount(place).astype(np.float64)
    weights = np.concatenate(list(_weights(len(sums), resamples, np.random.default_rng(seed))))
    return np.array([sums.sum() / counts.sum()]), (weights @ sums) / (weights @ counts)


def _balanced(labels: torch.Tensor, most: int, seed: int) -> torch.Tensor:
    """A mask of k rows of each class, or all it has: the largest k that gives at most so many rows, but 2 at least."""
    if len(labels) <= most:
        return torch.ones(len(labels), dtype=torch.bool)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    _, unit = np.unique(labels.cpu().numpy(), return_inverse=True)
    order = shuffled[np.argsort(unit[shuffled], kind="stable")]
    sizes = np.bincount(unit)
    rank = np.empty(len(labels), dtype=np.int64)  # among the rows of its class, in the shuffled order
    rank[order] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    each = int(np.searchsorted(np.cumsum(np.bincount(rank)), most, side="right"))
    kept: NDArray[np.bool_] = rank < max(each, 2)
    return torch.from_numpy(kept)


def overlap_plot(sides: Mapping[str, Sequence[Embeddings]], names: Sequence[str], path: str | Path) -> None:
    """Write a PNG: a row for each data set, a panel for each model, with the two distributions and their overlap.

    Args:
        sides: data set -> its embeddings by each model, before first.
        names: what the models are called.
        path: the file.

    Raises:
        InputError: as in `overlap`.
    """
    _figure(sides, names).savefig(path, dpi=96)


def _figure(sides: Mapping[str, Sequence[Embeddings]], names: Sequence[str]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.9 * len(names) + 0.6, 1.7 * len(sides) + 0.6), layout="constrained")
    panels = figure.subplots(len(sides), len(names), squeeze=False, sharex=False)
    centres = np.arange(BINS) * WIDTH - 1 + WIDTH / 2
    for row, (data, models) in enumerate(sides.items()):
        counted = [Overlap.of(model) for model in models]
        span = [np.flatnonzero((c.pairs.right + c.pairs.wrong).sum(0)) for c in counted]
        low, high = min(centres[s[0]] for s in span), max(centres[s[-1]] for s in span)
        for column, (name, one) in enumerate(zip(names, counted, strict=True)):
            axes = panels[row][column]
            value = one.values(np.ones((1, len(one.counts))))["overlap"][0]
            looks = (("one class", "#0072b2"), ("two classes", "#d55e00"))
            for table, (label, colour) in zip(one.distributions(), looks, strict=True):
                smooth = np.convolve(table[0] / WIDTH, np.ones(25) / 25, mode="same")
                axes.fill_between(centres, smooth, color=colour, alpha=0.35, label=label, linewidth=0)
                axes.plot(centres, smooth, color=colour, linewidth=1)
            axes.set_xlim(low, high)
            axes.set_yticks([])
            axes.set_ylim(bottom=0)
            axes.tick_params(labelsize=7)
            axes.text(0.03, 0.92, f"overlap {value:.3f}", transform=axes.transAxes, fontsize=8, va="top")
            for edge in ("top", "right", "left"):
                axes.spines[edge].set_visible(False)
            if row == 0:
                axes.set_title(name, fontsize=9)
            if column == 0:
                axes.set_ylabel(data, fontsize=9)
            if row == len(sides) - 1:
                axes.set_xlabel("cosine", fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure
