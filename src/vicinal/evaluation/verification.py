"""Right and wrong pairs, and open-set decisions: what a threshold is worth, with intervals over classes.

Two questions are asked here, of the same vectors:

- Of *pairs* (`similarities`): how alike are two pictures of one class, and two of different classes? Counted in bins of
  WIDTH, so that nothing of size Q x G is kept; each share is exact at multiples of WIDTH, each mean is exact.
- Of *decisions* (`decisions`, `calibrate`): of what a matcher answered, how much is right, wrong or unknown? The
  definitions are those of `heads.calibration`.

Let n_u(t) be what class u of the queries counts at the threshold t. A class is drawn with replacement w_u times, and

    resampled value  =  f(sum_u w_u n_u),     w ~ multinomial(U; 1/U)

for every f: a share, F1, the threshold of the best F1. Its 2.5th and 97.5th percentile over the resamples are the
interval, as in `intervals`; with fewer than two classes there is none, and both ends are NaN.

    d' = (mu+ - mu-) / sqrt((sigma+^2 + sigma-^2) / 2)        overlap = sum over bins of min(p+, p-)

Letters: Q queries, G gallery items, U classes of queries, T edges of bins, descending, R resamples, D numbers an
embedding; + right pairs, - wrong pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from vicinal.evaluation.intervals import LEVELS, _weights
from vicinal.heads.calibration import Curve, OpenSetThreshold, curve
from vicinal.heads.support import as_numpy
from vicinal.types import Embeddings, Estimate, InputError, Metrics

__all__ = ["Similarities", "calibrate", "decision_differences", "decisions", "similarities", "verification"]

WIDTH = 0.001  # of a bin of cosines
BINS = 2001  # the first begins at -1; the last holds 1 alone
CELLS = 2**22  # similarities at once
THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
RATES = (0.01, 0.001, 0.0001)

UNDEFINED = {  # why a metric of `decisions` is NaN
    "precision": "undefined: nothing is accepted",
    "recall": "undefined: no class asked about has references",
    "f1": "undefined: nothing is accepted, and no class asked about has references",
    "fpir": "undefined: nothing asked about is unknown",
    "fnir": "undefined: no class asked about has references",
}

Values = dict[str, Float[np.ndarray, "*R"]]


@dataclass(frozen=True, slots=True)
class Similarities:
    """The cosines of right and wrong pairs, counted by the class of the query.

    Args:
        right: "U T", pairs of one class in each bin.
        wrong: "U T", pairs of two classes.
        hardest: "U T", of each query its nearest wrong one alone: where decisions go wrong.
        moments: "U 2 3", for right and wrong pairs: their number, sum and sum of squares.
        queries: how many queries there were.
        units: "U", which classes these are.
    """

    right: Float[np.ndarray, "U T"]
    wrong: Float[np.ndarray, "U T"]
    hardest: Float[np.ndarray, "U T"]
    moments: Float[np.ndarray, "U 2 3"]
    queries: int
    units: Int[np.ndarray, "U"]

    @property
    def edges(self) -> Float[np.ndarray, "T"]:
        """The lower edge of each bin, ascending: what a histogram is drawn over."""
        return np.round(np.arange(BINS) * WIDTH - 1, 6)

    def share_above(self, threshold: float, kind: str = "wrong") -> float:
        """The share of pairs with a cosine of at least `threshold`, which is taken to the next multiple of WIDTH.

        Args:
            threshold: a cosine.
            kind: "right", "wrong" or "hardest".
        """
        counts = {"right": self.right, "wrong": self.wrong, "hardest": self.hardest}[kind].sum(0)
        place = int(np.clip(np.ceil((threshold + 1) / WIDTH - 1e-6), 0, BINS))
        return float(counts[place:].sum() / counts.sum()) if counts.any() else float("nan")

    def percentiles(self, levels: Sequence[int | float] = (1, 5, 25, 50, 75, 95, 99)) -> dict[str, list[float]]:
        """Percentiles of right, wrong and hardest pairs, to one bin.

        Args:
            levels: in per cent.
        """
        found = {}
        for kind, counts in (("right", self.right), ("wrong", self.wrong), ("hardest", self.hardest)):
            reached = counts.sum(0).cumsum()
            places = np.searchsorted(reached, np.array(levels) / 100 * reached[-1])
            found[kind] = self.edges[places.clip(max=BINS - 1)].tolist()
        return found

    def curve(self) -> Curve:
        """Precision, recall, F1 and false accepts at every bin, in the numbers that right and wrong pairs have here."""
        return _curve(self.right.sum(0), self.wrong.sum(0))


def similarities(
    query: Embeddings, gallery: Embeddings | None = None, *, kin: Int[Tensor, "C"] | None = None
) -> Similarities:
    """Count the cosines of all right and all wrong pairs, in blocks.

    Args:
        query: labelled, unit rows.
        gallery: what each query is paired with; None: all the other queries, so that each pair counts from both ends.
        kin: of each class a number, equal for variants of one brand: two of them are no pair, neither right nor wrong.

    Raises:
        InputError: no queries or no gallery, other classes, a vector that is not finite, no right pair or no wrong one.

    >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> found = similarities(Embeddings(x, torch.tensor([0, 0, 1]), ("a", "b", "c"), ("cat", "dog")))
    >>> found.share_above(0.5, "right"), found.share_above(0.5, "wrong")
    (1.0, 0.5)
    """
    side = query if gallery is None else gallery
    if query.classes != side.classes:
        raise InputError("queries and gallery have other classes: embed both from manifests with one list of classes")
    for name, given in (("queries", query), ("gallery", side)):
        if len(given) == 0:
            raise InputError(f"{name}: there is not one image to measure; name a split, folder or table that has some")
        if not torch.isfinite(given.vectors).all():
            raise InputError(f"{name}: an embedding is not finite; the training diverged, or its image is broken")
    units, unit = torch.unique(query.labels.cpu(), return_inverse=True)
    size = len(units)
    counts, hardest = torch.zeros(2, size * BINS).double(), torch.zeros(size * BINS).double()
    moments = torch.zeros(2, 3, size).double()
    step = max(1, CELLS // len(side))
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        cosine = (query.vectors[part].cpu().float() @ side.vectors.cpu().float().T).clamp(-1, 1)
        same = query.labels[part, None].cpu() == side.labels[None].cpu()
        other = ~same
        if kin is not None:
            other &= kin[query.labels[part].cpu()][:, None] != kin[side.labels.cpu()][None]
        if gallery is None:
            own = torch.arange(len(cosine))
            same[own, start + own] = False
        place = unit[part, None] * BINS + _bin(cosine)
        for kind, chosen in enumerate((same, other)):
            row = chosen.nonzero()[:, 0]
            values = cosine[chosen].double()
            counts[kind] += torch.bincount(place[chosen], minlength=size * BINS)
            for power in range(3):
                moments[kind, power] += torch.bincount(unit[part][row], values**power, size)
        asked = other.any(1)
        nearest = cosine.masked_fill(~other, -torch.inf).amax(1)[asked]
        hardest += torch.bincount(unit[part][asked] * BINS + _bin(nearest), minlength=size * BINS)
    if (moments[:, 0].sum(1) == 0).any():
        raise InputError("verification needs two images of one class, and two classes; here is not one such pair")
    right, wrong = (table.view(size, BINS).numpy() for table in counts)
    return Similarities(
        right, wrong, hardest.view(size, BINS).numpy(), moments.permute(2, 0, 1).numpy(), len(query), units.numpy()
    )


def verification(
    found: Similarities,
    *,
    thresholds: Sequence[int | float] = THRESHOLDS,
    rates: Sequence[float] = RATES,
    resamples: int = 2000,
    seed: int = 0,
) -> Metrics:
    """What the two distributions say, each with its interval over classes.

    Args:
        found: of `similarities`.
        thresholds: t of `wrong_above@t`, the share of wrong pairs at or above t, and of `hardest_above@t`.
        rates: f of `tar@far=f`: the largest share of right pairs accepted with at most f of the wrong ones.
        resamples: of the bootstrap.
        seed: of the resampling: two models over the same classes get the same resamples.

    Returns:
        `right_mean`, `wrong_mean`, `gap`, `d_prime`, `overlap`, `eer`, `f1` (the best), `threshold` (its), and those
        named above. NaN where a rate is not measurable.

    >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> e = Embeddings(x, torch.tensor([0, 0, 1]), ("a", "b", "c"), ("cat", "dog"))
    >>> round(verification(similarities(e))["gap"].value, 3)
    0.5
    """

    def values(weights: Float[np.ndarray, "R U"]) -> Values:
        right, wrong, hardest = (weights @ table for table in (found.right, found.wrong, found.hardest))
        moments = np.einsum("ru,ukp->krp", weights, found.moments)
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample may hold no right pair
            means = moments[..., 1] / moments[..., 0]
            variances = np.maximum(moments[..., 2] / moments[..., 0] - means**2, 0)
            shares = right / right.sum(1, keepdims=True), wrong / wrong.sum(1, keepdims=True)
            d_prime = (means[0] - means[1]) / np.sqrt(variances.mean(0))
            steps = _curve(right, wrong)
            result = {
                "right_mean": means[0],
                "wrong_mean": means[1],
                "gap": means[0] - means[1],
                "d_prime": d_prime,
                "overlap": np.minimum(*shares).sum(1),
                "eer": steps.equal_error(),
                "f1": np.nan_to_num(steps.f1, nan=0.0).max(1),
                "threshold": steps.thresholds[np.nan_to_num(steps.f1, nan=-1.0).argmax(1)],
            }
            for rate in rates:
                result[f"tar@far={rate:g}"] = steps.true_accept(rate)
            for name, table in (("wrong", wrong), ("hardest", hardest)):
                for t in thresholds:
                    above = table[:, int(np.ceil((t + 1) / WIDTH - 1e-6)) :].sum(1)
                    result[f"{name}_above@{t:g}"] = above / table.sum(1)
        return result

    return _estimates(values, len(found.units), found.queries, resamples, seed, width=BINS)


def decisions(
    scores: ArrayLike,
    right: ArrayLike,
    units: Int[Tensor, "Q"],
    *,
    threshold: float,
    enrolled: ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Metrics:
    """Precision, recall, F1 and error rates at a fixed threshold, with intervals over classes.

    Args:
        scores: "Q", of the best class of each query. `Matcher.trials` gives all four.
        right: "Q", whether the best class is the right one.
        units: "Q", the class of each query, which is what is resampled.
        threshold: fitted on other classes.
        enrolled: "Q", whether the query's class was among those to choose from. None: where `right`.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        `precision`, `recall`, `f1`, `fpir` (impostors accepted), `fnir` (1 - recall). NaN where nothing is counted.

    Raises:
        InputError: as in `heads.calibration.curve`; units do not match.

    >>> metrics = decisions([0.9, 0.2, 0.8], [True, True, False], torch.tensor([0, 1, 2]), threshold=0.5)
    >>> metrics["precision"].value, metrics["recall"].value
    (0.5, 0.5)
    """
    tables = _per_unit(scores, right, units, enrolled, threshold)
    return _estimates(lambda weights: _rates(weights, tables), len(tables), len(units), resamples, seed, width=1)


def decision_differences(
    before: tuple[ArrayLike, ArrayLike],
    after: tuple[ArrayLike, ArrayLike],
    units: Int[Tensor, "Q"],
    *,
    thresholds: tuple[float, float],
    enrolled: ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Metrics:
    """What a second model changes: each metric of `decisions`, after - before, on the same queries.

    Each resample draws the same classes for both, so what makes a class hard for both cancels.

    Args:
        before: scores and `right` of the one, "Q" each, as in `decisions`.
        after: of the other, for the same queries in the same order.
        units: as in `decisions`.
        thresholds: of the one and of the other, each fitted on other classes.
        enrolled: as in `decisions`, one for both; needed, since `right` differs between the two.
        resamples: of the bootstrap.
        seed: of the resampling.

    Raises:
        InputError: as in `decisions`; no `enrolled`.

    >>> units, enrolled = torch.arange(2), [True, True]
    >>> one, other = ([0.9, 0.2], [True, True]), ([0.9, 0.8], [True, True])
    >>> found = decision_differences(one, other, units, thresholds=(0.5, 0.5), enrolled=enrolled)
    >>> found["recall"].value
    0.5
    """
    if enrolled is None:
        raise InputError("enrolled is needed to compare two models: say of each query whether its class has references")
    tables = [
        _per_unit(scores, right, units, enrolled, threshold)
        for (scores, right), threshold in zip((before, after), thresholds, strict=True)
    ]

    def values(weights: Float[np.ndarray, "R U"]) -> Values:
        one, other = (_rates(weights, table) for table in tables)
        return {name: other[name] - one[name] for name in one}

    return _estimates(values, len(tables[0]), len(units), resamples, seed, width=1)


def calibrate(
    rule: OpenSetThreshold,
    scores: ArrayLike,
    right: ArrayLike,
    units: Int[Tensor, "Q"],
    *,
    enrolled: ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Metrics:
    """Intervals for a fitted threshold: it is fitted anew to each resample of the classes it was fitted on.

    Args:
        rule: fitted on these scores.
        scores: as in `decisions`.
        right: as in `decisions`.
        units: as in `decisions`.
        enrolled: as in `decisions`; as it was in `fit`.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        `threshold` and `eer`, and what `decisions` has, at the threshold as it stands. On the classes that it was
        fitted on these are hopeful; those to be quoted come from `decisions` on others. Hand them to `rule.save`.

    Raises:
        InputError: as in `decisions`.

    >>> scores, right, units = [0.9, 0.8, 0.3, 0.2], [True, True, False, False], torch.arange(4)
    >>> rule = OpenSetThreshold().fit(scores, right, fingerprint="abc")
    >>> round(calibrate(rule, scores, right, units)["threshold"].value, 2)
    0.55
    """
    unit = _unit(units, scores)
    size = int(unit.max(initial=-1)) + 1

    def values(weights: Float[np.ndarray, "R U"]) -> Values:
        found = curve(scores, right, enrolled=enrolled, weights=weights[:, unit])
        threshold = found.best_f1() if rule.rate is None else found.at_rate(rule.allowed_)
        return {"threshold": threshold, "eer": found.equal_error()}

    own = _estimates(values, size, len(unit), resamples, seed, width=4 * len(unit))
    at = decisions(scores, right, units, threshold=rule.threshold_, enrolled=enrolled, resamples=resamples, seed=seed)
    return {**own, **at}


def _estimates(
    values: Callable[[Float[np.ndarray, "R U"]], Values],
    units: int,
    queries: int,
    resamples: int,
    seed: int,
    width: int,
) -> Metrics:
    """Each value with all classes once, and its percentiles over resamples; `width` numbers a resample at once."""
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    whole = values(np.ones((1, units)))
    drawn: list[Values] = []
    if units > 1:
        over_units = np.random.SeedSequence(seed).spawn(2)[0]  # as `intervals` draws them
        step = max(1, CELLS // width)
        for weights in _weights(units, resamples, np.random.default_rng(over_units)):
            drawn += [values(weights[at : at + step]) for at in range(0, len(weights), step)]
    found = {}
    for name, value in whole.items():
        many = np.concatenate([d[name] for d in drawn]) if drawn else np.empty(0)
        many = many[np.isfinite(many)]  # a resample may leave nothing to count
        low, high = np.percentile(many, LEVELS) if len(many) else (np.nan, np.nan)
        found[name] = Estimate(float(value[0]), float(low), float(high), n=units, queries=queries)
    return found


def _rates(weights: Float[np.ndarray, "R U"], tables: Float[np.ndarray, "U 5"]) -> Values:
    """The metrics of `decisions`, of classes that count so often."""
    tp, fp, impostors, known, strangers = (weights @ tables).T
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "precision": tp / (tp + fp),
            "recall": tp / known,
            "f1": 2 * tp / (tp + fp + known),
            "fpir": impostors / strangers,
            "fnir": 1 - tp / known,
        }


def _bin(cosine: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """The bin of each; 1e-7 below an edge, which float32 cannot tell from it, counts as the edge."""
    return ((cosine.double() + 1) / WIDTH + 1e-4).floor().long().clamp(0, BINS - 1)


def _curve(right: Float[np.ndarray, "*R T"], wrong: Float[np.ndarray, "*R T"]) -> Curve:
    """From counts in ascending bins to what is accepted at each lower edge, descending."""
    accepted = [np.asarray(table[..., ::-1].cumsum(-1)) for table in (right, wrong)]
    edges = np.round((np.arange(BINS) * WIDTH - 1)[::-1], 6)
    return Curve(edges, accepted[0], accepted[1], accepted[1], accepted[0][..., -1], accepted[1][..., -1])


def _per_unit(
    scores: ArrayLike,
    right: ArrayLike,
    units: Int[Tensor, "Q"],
    enrolled: ArrayLike | None,
    threshold: float,
) -> Float[np.ndarray, "U 5"]:
    """TP, FP, impostors accepted, P and impostors, of each class."""
    unit = _unit(units, scores)
    curve(scores, right, enrolled=enrolled)  # checks them
    score, good = as_numpy(scores), as_numpy(right).astype(bool)
    there = None if enrolled is None else as_numpy(enrolled).astype(bool)
    known: Bool[np.ndarray, "Q"] = good if there is None else there
    accepted = score >= threshold
    columns = (accepted & good, accepted & ~good, accepted & ~known, known, ~known)
    return np.stack([np.bincount(unit, column, int(unit.max()) + 1) for column in columns], axis=1)


def _unit(units: Int[Tensor, "Q"], scores: ArrayLike) -> Int[np.ndarray, "Q"]:
    if len(units) != len(as_numpy(scores)):
        raise InputError(f"units: {len(units)} classes for {len(as_numpy(scores))} scores; give one a score")
    return np.asarray(np.unique(units.cpu().numpy(), return_inverse=True)[1])
