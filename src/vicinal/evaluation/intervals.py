"""The only place where anything is averaged: means and paired differences, each with its 95 % interval.

Letters: R replicates, Q queries, U units (classes).
"""

from __future__ import annotations

import numpy as np
import torch

from vicinal.types import Estimate, InputError, Metrics, PerQuery

__all__ = ["mean", "paired_difference"]


def mean(per_query: PerQuery, *, resamples: int = 2000, seed: int = 0) -> Metrics:
    """The mean of each metric with its percentile bootstrap interval over units."""
    _, unit = np.unique(per_query.units.cpu().numpy(), return_inverse=True)
    return {
        name: _estimate(values.cpu().double().numpy(), unit, per_query.macro, resamples, seed)
        for name, values in per_query.values.items()
    }


def paired_difference(before: PerQuery, after: PerQuery, *, resamples: int = 2000, seed: int = 0) -> Metrics:
    """The mean of `after` - `before` on the same queries, with its interval."""
    if not torch.equal(before.units, after.units) or before.macro != after.macro:
        raise InputError("a paired difference needs the same queries, in the same order, before and after")
    values = {name: after.values[name] - before.values[name] for name in before.values}
    return mean(PerQuery(values, before.units, before.macro), resamples=resamples, seed=seed)


def _estimate(values: np.ndarray, unit: np.ndarray, macro: bool, resamples: int, seed: int) -> Estimate:
    units = int(unit.max()) + 1
    counts = np.stack([np.bincount(unit, np.isfinite(v), units) for v in values])
    sums = np.stack([np.bincount(unit, np.nan_to_num(v), units) for v in values])
    if macro:
        sums, counts = sums / np.maximum(counts, 1), (counts > 0).astype(float)
    kept = counts.any(0)
    sums, counts, n = sums[:, kept], counts[:, kept], int(kept.sum())
    queries = int(np.isfinite(values).any(0).sum())
    if n == 0:
        return Estimate(np.nan, np.nan, np.nan, 0, 0)
    value = float(sums.sum() / counts.sum())
    if n == 1:
        return Estimate(value, np.nan, np.nan, 1, queries)
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)
    replicate = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples)
    drawn = ((weights @ sums.T) * replicate).sum(1) / ((weights @ counts.T) * replicate).sum(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high), n, queries)
