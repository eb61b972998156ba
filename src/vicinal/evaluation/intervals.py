"""The only place where anything is averaged: means and paired differences, each with its 95 % interval.

Let v_rq be a metric's value of query q in replicate r (a draw of a support set, or a training seed); u(q) the unit of
the query, its class; S_ru and N_ru the sum and the number of values that count, NaN left out. Then

    mean        = sum_ru S_ru / sum_ru N_ru
    macro mean  = the same with S_ru / N_ru in the place of S_ru, and 1 in the place of N_ru: a class counts once
    resampled   = sum_ru a_r w_u S_ru / sum_ru a_r w_u N_ru,   w ~ multinomial(U; 1/U),   a ~ multinomial(R; 1/R)
    interval    = the 2.5th and 97.5th percentile of 2,000 resampled means

Queries of one class resemble each other, and in a class-disjoint test it is the *classes* that were sampled, so whole
classes are drawn with replacement, never queries. With several replicates both are drawn, independently (the pigeonhole
bootstrap, Owen 2007, 0712.1111; it errs on the wide side). Under some twenty classes a percentile interval is a little
too narrow (by about sqrt(1 - 1/U), and more in the tails); with one class there is none, and both ends are NaN.

Letters: R replicates, Q queries, U units that count, b resamples of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from vicinal.types import Estimate, InputError, Metrics, PerQuery

__all__ = ["mean", "over_seeds", "paired_difference", "paired_ratio"]

LEVELS = (2.5, 97.5)  # per cent
CHUNK = 2**17  # weights drawn at once: a few MB, which a cache holds

Array = NDArray[np.float64]


def mean(per_query: PerQuery, *, resamples: int = 2000, seed: int = 0) -> Metrics:
    """The mean of each metric, with its percentile bootstrap interval over units and replicates.

    Args:
        per_query: values "R Q"; NaN does not count. `macro` lets each unit count once.
        resamples: of the bootstrap. 2,000 place an end of the interval to within about a twentieth of its width.
        seed: of the resampling; the same seed and units give the same resamples for every metric and model.

    Returns:
        Metric name -> Estimate: `n` the units, `queries` the queries, with a value that counts in some replicate.
        Both ends are NaN with fewer than two units; the value too where nothing counts.

    Raises:
        ValueError: resamples < 1.

    >>> values = {"recall@1": torch.tensor([[1.0, 1.0, 0.0, 1.0]])}
    >>> mean(PerQuery(values, units=torch.tensor([0, 0, 1, 2])))["recall@1"].value
    0.75
    >>> round(mean(PerQuery(values, units=torch.tensor([0, 0, 1, 2]), macro=True))["recall@1"].value, 4)
    0.6667
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    unit = np.unique(per_query.units.cpu().numpy(), return_inverse=True)[1]
    tables = {
        name: _Table.of(values.cpu().double().numpy(), unit, macro=per_query.macro)
        for name, values in per_query.values.items()
    }
    # Metrics over the same units and replicates share their resamples, which are what takes the time.
    alike: dict[tuple[bytes, int], list[str]] = {}
    for name, table in tables.items():
        alike.setdefault((table.units.tobytes(), len(table.sums)), []).append(name)
    intervals: dict[str, tuple[float, float]] = {}
    for names in alike.values():
        intervals |= _percentiles({name: tables[name] for name in names}, resamples, seed)
    return {
        name: Estimate(table.value, *intervals[name], n=len(table.units), queries=table.queries)
        for name, table in tables.items()
    }


def paired_difference(before: PerQuery, after: PerQuery, *, resamples: int = 2000, seed: int = 0) -> Metrics:
    """The mean of `after` - `before`, query by query, with its interval: what changed, on the same classes.

    Each resample draws the same classes and replicates on both sides, so what makes a class easy or hard for both
    cancels, and the interval is far narrower than two separate ones would suggest.

    Args:
        before: values "R Q" or "1 Q"; one replicate is set against all of the other side's.
        after: of the same queries, in the same order. A query counts where it has a value on both sides.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        An Estimate for each metric that both sides have, in the order of `before`.

    Raises:
        InputError: the queries differ, one side is macro and the other is not, no metric is shared, or both sides have
            several replicates, and not equally many.

    >>> units = torch.arange(3)
    >>> before = PerQuery({"recall@1": torch.tensor([[0.0, 0.0, 1.0]])}, units)
    >>> after = PerQuery({"recall@1": torch.tensor([[1.0, 1.0, 1.0]])}, units)
    >>> round(paired_difference(before, after)["recall@1"].value, 4)
    0.6667
    """
    if not torch.equal(before.units.cpu(), after.units.cpu()):
        raise InputError(
            f"a paired difference needs the same queries on both sides, in the same order; here are "
            f"{len(before.units)} before and {len(after.units)} after, or their classes differ: embed the same images "
            "with both models"
        )
    if before.macro != after.macro:
        raise InputError("one side is averaged over classes first (macro), the other over queries: use one protocol")
    values = {}
    for name in before.values:
        if name not in after.values:
            continue
        one, other = before.values[name].cpu().double(), after.values[name].cpu().double()
        if len(one) != len(other) and 1 not in (len(one), len(other)):
            raise InputError(
                f"{name} has {len(one)} replicates before and {len(other)} after; measure both with as many draws"
            )
        values[name] = other - one
    if before.values and not values:
        raise InputError(
            f"no metric is on both sides: before has {', '.join(before.values)}; after has {', '.join(after.values)}"
        )
    return mean(PerQuery(values, before.units, before.macro), resamples=resamples, seed=seed)


def paired_ratio(before: PerQuery, after: PerQuery, *, resamples: int = 2000, seed: int = 0) -> Metrics:
    """The mean of `after` over the mean of `before`, on the same queries, with its interval: the share that was kept.

    Each resample draws the same classes and replicates on both sides and divides their two means; 1 is all, above 1 is
    more than there was.

    Args:
        before: values "R Q" or "1 Q".
        after: of the same queries, in the same order, as in `paired_difference`.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        An Estimate for each metric that both sides have; NaN where the mean of `before` is 0.

    Raises:
        InputError: as in `paired_difference`.

    >>> units = torch.arange(4)
    >>> before = PerQuery({"accuracy@0shot": torch.tensor([[1.0, 1.0, 1.0, 0.0]])}, units)
    >>> after = PerQuery({"accuracy@0shot": torch.tensor([[1.0, 0.0, 1.0, 0.0]])}, units)
    >>> round(paired_ratio(before, after)["accuracy@0shot"].value, 4)
    0.6667
    """
    unit = np.unique(before.units.cpu().numpy(), return_inverse=True)[1]
    ratios: dict[str, Estimate] = {}
    for name in paired_difference(before, after, resamples=1):  # checks both sides
        sides = [side.values[name].cpu().double() for side in (before, after)]
        both = torch.isnan(sides[0] + sides[1])
        one, other = (
            _Table.of(side.expand_as(both).masked_fill(both, torch.nan).numpy(), unit, macro=before.macro)
            for side in sides
        )
        # sums over sums: what is counted cancels
        table = _Table(other.sums, one.sums, one.units, one.queries)
        low, high = _percentiles({name: table}, resamples, seed)[name] if one.sums.any() else (float("nan"),) * 2
        value = table.value if one.sums.any() else float("nan")
        ratios[name] = Estimate(value, low, high, n=len(table.units), queries=table.queries)
    return ratios


def over_seeds(measured: Sequence[PerQuery]) -> PerQuery:
    """The same queries measured after several trainings, as one replicate a training.

    What was drawn several times within a training (shots) is averaged over those draws first; a query counts if it
    counted in any. `mean` and `paired_difference` of the result then resample classes and trainings.

    Args:
        measured: of each training; of one, its draws are averaged.

    Returns:
        Values "S Q", S the number of trainings.

    Raises:
        InputError: none, or not of the same queries and metrics.

    >>> units = torch.arange(2)
    >>> one = PerQuery({"accuracy@1shot": torch.tensor([[1.0, 0.0], [torch.nan, 1.0]])}, units)
    >>> over_seeds([one, one]).values["accuracy@1shot"]
    tensor([[1.0000, 0.5000],
            [1.0000, 0.5000]])
    """
    if not measured:
        raise InputError("there is no training to average over")
    first = measured[0]
    for other in measured[1:]:
        if not torch.equal(first.units, other.units) or (*first.values, first.macro) != (*other.values, other.macro):
            raise InputError("these trainings were not measured on the same queries by the same metrics")
    values = {name: torch.stack([_nanmean(one.values[name]) for one in measured]) for name in first.values}
    return PerQuery(values, first.units, first.macro)


def _nanmean(draws: torch.Tensor) -> torch.Tensor:
    return draws[0] if len(draws) == 1 else draws.nanmean(0)


@dataclass(frozen=True, slots=True)
class _Table:
    """One metric, summed within units.

    Args:
        sums: "R U", of the values that count; with macro their mean.
        counts: "R U", how many count; with macro 0 or 1.
        units: "U", the units that count in some replicate.
        queries: how many count in some replicate.
    """

    sums: Array
    counts: Array
    units: NDArray[np.intp]
    queries: int

    @classmethod
    def of(cls, values: Array, unit: NDArray[np.intp], *, macro: bool) -> _Table:
        size = int(unit.max(initial=-1)) + 1
        there = ~np.isnan(values)
        counts: Array = np.stack([np.bincount(unit, t, size) for t in there]).astype(np.float64)  # of none: integers
        sums: Array = np.stack([np.bincount(unit, np.nan_to_num(v), size) for v in values]).astype(np.float64)
        if macro:
            sums, counts = sums / np.maximum(counts, 1.0), np.minimum(counts, 1.0)
        units = np.flatnonzero(counts.sum(0))
        return cls(sums[:, units], counts[:, units], units, int(there.any(0).sum()))

    @property
    def value(self) -> float:
        return float(self.sums.sum() / self.counts.sum()) if len(self.units) else float("nan")


def _percentiles(tables: dict[str, _Table], resamples: int, seed: int) -> dict[str, tuple[float, float]]:
    """The ends of each metric's interval; the tables are of the same units and replicates."""
    replicates, units = next(iter(tables.values())).sums.shape
    if units < 2:
        return dict.fromkeys(tables, (float("nan"), float("nan")))
    stacked = torch.from_numpy(
        np.concatenate([part for table in tables.values() for part in (table.sums, table.counts)])
    )
    over_units, over_replicates = np.random.SeedSequence(seed).spawn(2)
    weights = _weights(units, resamples, np.random.default_rng(over_units))
    drawn: Array = np.concatenate([(torch.from_numpy(w) @ stacked.T).numpy() for w in weights])
    if replicates > 1:
        drawn = drawn.reshape(resamples, -1, replicates)
        drawn *= np.concatenate(list(_weights(replicates, resamples, np.random.default_rng(over_replicates))))[:, None]
        drawn = drawn.sum(2)
    intervals = {}
    for i, name in enumerate(tables):
        total, count = drawn[:, 2 * i], drawn[:, 2 * i + 1]
        some = count > 0  # a unit that lacks values in the replicates drawn may leave nothing to average
        low, high = np.percentile(total[some] / count[some], LEVELS) if some.any() else (np.nan, np.nan)
        intervals[name] = (float(low), float(high))
    return intervals


def _weights(size: int, resamples: int, generator: np.random.Generator) -> Iterator[Array]:
    """Chunks "b size": how often each of `size` things is drawn in each resample, with replacement."""
    chunk = max(1, CHUNK // size)
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(size, size=(rows, size), dtype=np.uint32).astype(np.int64)
        drawn += np.arange(0, rows * size, size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)
