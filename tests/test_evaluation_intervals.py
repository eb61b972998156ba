"""Intervals against explicit resampling, scipy, and the share of simulated truths that they hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from vicinal.evaluation import intervals
from vicinal.evaluation.intervals import mean, paired_difference
from vicinal.types import InputError, PerQuery

NAN = math.nan


def scores(values: list | np.ndarray, units: list | np.ndarray, *, macro: bool = False) -> PerQuery:
    values = torch.as_tensor(np.atleast_2d(values), dtype=torch.float64)
    return PerQuery({"m": values}, torch.as_tensor(units), macro)


def unequal_classes(seed: int, replicates: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """30 classes of 1 to 12 queries, some of which do not count."""
    rng = np.random.default_rng(seed)
    units = np.repeat(np.arange(30), rng.integers(1, 13, 30))
    values = rng.random((replicates, len(units))) + rng.normal(0, 0.4, 30)[units]
    values[rng.random(values.shape) < 0.1] = NAN
    return values, rng.permutation(1000)[:30][units]  # the numbers of classes are not 0 .. 29, nor in order


# ---- the estimate


def test_queries_are_averaged_or_classes_first():
    values, units = [1.0, 1.0, 0.0, 1.0, NAN], [7, 7, 3, 3, 5]
    micro, macro = mean(scores(values, units))["m"], mean(scores(values, units, macro=True))["m"]
    assert micro.value == 0.75
    assert macro.value == 0.75
    assert mean(scores([1.0, 1.0, 1.0, 0.0], [0, 0, 0, 1]))["m"].value == 0.75
    assert mean(scores([1.0, 1.0, 1.0, 0.0], [0, 0, 0, 1], macro=True))["m"].value == 0.5
    assert (micro.n, micro.queries) == (macro.n, macro.queries) == (2, 4)  # class 5 does not count


@pytest.mark.parametrize("macro", [False, True])
def test_replicates_count_alike_and_a_query_once(macro: bool):
    values = [[1.0, NAN, 0.0], [1.0, 0.0, 0.0]]
    estimate = mean(scores(values, [0, 0, 1], macro=macro))["m"]
    assert estimate.value == pytest.approx((1 + 0.5 + 0 + 0) / 4 if macro else 2 / 5)
    assert (estimate.n, estimate.queries) == (2, 3)


def test_value_equals_the_loop():
    values, units = unequal_classes(0, replicates=4)
    assert mean(scores(values, units))["m"].value == pytest.approx(np.nanmean(values))
    cells = [np.nanmean(v[units == u]) for v in values for u in np.unique(units) if not np.isnan(v[units == u]).all()]
    assert mean(scores(values, units, macro=True))["m"].value == pytest.approx(np.mean(cells))


def test_one_class_has_no_interval_and_none_has_no_value():
    one = mean(scores([1.0, 0.0, NAN], [4, 4, 5]))["m"]
    assert (one.value, one.n, one.queries) == (0.5, 1, 2)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    none = mean(scores([NAN, NAN], [4, 5]))["m"]
    assert (none.n, none.queries) == (0, 0)
    assert all(math.isnan(x) for x in (none.value, none.low, none.high))
    assert math.isnan(mean(PerQuery({"m": torch.zeros(1, 0)}, torch.zeros(0, dtype=torch.long)))["m"].value)


def test_no_resamples_are_refused():
    with pytest.raises(ValueError, match="resamples"):
        mean(scores([1.0, 0.0], [0, 1]), resamples=0)


# ---- the interval


def loop_interval(values: np.ndarray, units: np.ndarray, macro: bool, seed: int) -> tuple[float, float]:
    """The definition, unhurried: draw classes and replicates with replacement, gather their values, average."""
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(units == u) for u in np.unique(units)]
    groups = [g for g in groups if not np.isnan(values[:, g]).all()]
    means = []
    for _ in range(4000):
        rows = rng.integers(len(values), size=len(values))
        classes = rng.integers(len(groups), size=len(groups))
        cells = [values[r][groups[g]] for r in rows for g in classes]
        cells = [cell[~np.isnan(cell)] for cell in cells]
        cells = [cell for cell in cells if len(cell)]
        means.append(np.mean([c.mean() for c in cells]) if macro else np.concatenate(cells).mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@pytest.mark.parametrize("macro", [False, True])
@pytest.mark.parametrize("replicates", [1, 3])
def test_interval_equals_explicit_resampling(replicates: int, macro: bool):
    values, units = unequal_classes(1, replicates)
    estimate = mean(scores(values, units, macro=macro), resamples=20000)["m"]
    low, high = loop_interval(values, units, macro, seed=5)
    width = high - low
    assert estimate.low == pytest.approx(low, abs=0.06 * width)
    assert estimate.high == pytest.approx(high, abs=0.06 * width)


def test_interval_equals_scipys():
    rng = np.random.default_rng(2)
    per_class = rng.beta(2, 1, 60)
    estimate = mean(scores(per_class, np.arange(60)), resamples=20000)["m"]
    theirs = stats.bootstrap((per_class,), np.mean, n_resamples=20000, method="percentile", rng=3).confidence_interval
    width = theirs.high - theirs.low
    assert estimate.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert estimate.high == pytest.approx(theirs.high, abs=0.03 * width)


def test_classes_are_drawn_not_queries():
    """Ten equal queries a class tell no more than one does."""
    rng = np.random.default_rng(3)
    per_class = rng.random(50)
    once = mean(scores(per_class, np.arange(50)))["m"]
    often = mean(scores(np.repeat(per_class, 10), np.repeat(np.arange(50), 10)))["m"]
    assert often.low == pytest.approx(once.low)
    assert often.high == pytest.approx(once.high)
    assert often.queries == 10 * once.queries


def coverage(replicates: int, macro: bool, runs: int) -> float:
    """The share of intervals that hold the truth, 0: classes and replicates have effects of their own."""
    held = 0
    for run in range(runs):
        rng = np.random.default_rng(run)
        units = np.repeat(np.arange(40), rng.integers(1, 9, 40))
        values = rng.normal(0, 1, 40)[units] + rng.normal(0, 1, (replicates, len(units)))
        if replicates > 1:
            values = values + rng.normal(0, 0.3, (replicates, 1))
        estimate = mean(scores(values, units, macro=macro), resamples=400, seed=run)["m"]
        held += estimate.low <= 0 <= estimate.high
    return held / runs


@pytest.mark.parametrize(("replicates", "macro"), [(1, False), (1, True), (8, True)])
def test_95_of_100_intervals_hold_the_truth(replicates: int, macro: bool):
    assert 0.91 <= coverage(replicates, macro, runs=400) <= 0.985  # +- 3 standard errors of 400 runs, and a little


def test_replicates_widen_the_interval():
    """Training seeds that differ among each other leave more in doubt than their mean alone would show."""
    rng = np.random.default_rng(4)
    values = rng.normal(0, 0.1, 200) + np.array([[-1.0], [0.0], [1.0]])
    every, averaged = mean(scores(values, np.arange(200)))["m"], mean(scores(values.mean(0), np.arange(200)))["m"]
    assert every.value == pytest.approx(averaged.value)
    assert every.high - every.low > 10 * (averaged.high - averaged.low)


def test_the_seed_settles_the_interval():
    values, units = unequal_classes(5, replicates=2)
    first = mean(scores(values, units), seed=1)["m"]
    assert mean(scores(values, units), seed=1)["m"] == first
    assert mean(scores(values, units), seed=2)["m"].low != first.low
    order = np.random.default_rng(0).permutation(len(units))
    again = mean(scores(values[:, order], units[order]), seed=1)["m"]
    assert (again.low, again.high) == pytest.approx((first.low, first.high))


def test_metrics_do_not_disturb_each_other():
    """Together or alone, with the same missing classes or others: each metric's interval is the same."""
    values, units = unequal_classes(6)
    fewer = np.where(units == units[0], NAN, values)
    together = mean(
        PerQuery({"a": torch.tensor(values), "b": torch.tensor(fewer), "c": torch.tensor(values)}, torch.tensor(units))
    )
    for name, alone in (("a", values), ("b", fewer), ("c", values)):
        expected = mean(scores(alone, units))["m"]
        assert (together[name].low, together[name].high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert together["b"].n == together["a"].n - 1
    assert list(together) == ["a", "b", "c"]


def test_the_chunk_does_not_matter(monkeypatch: pytest.MonkeyPatch):
    values, units = unequal_classes(7, replicates=2)
    whole = mean(scores(values, units))["m"]
    monkeypatch.setattr(intervals, "CHUNK", 64)
    assert mean(scores(values, units))["m"] == whole


def test_weights_are_multinomial():
    weights = np.concatenate(list(intervals._weights(50, 4000, np.random.default_rng(0))))
    assert weights.shape == (4000, 50)
    assert (weights.sum(1) == 50).all()
    assert weights.mean(0) == pytest.approx(np.ones(50), abs=0.07)
    assert weights.var(0).mean() == pytest.approx(1 - 1 / 50, rel=0.03)


def test_replicates_that_miss_classes():
    """Some resamples draw only cells without a value: they are left out, and the ends stay finite."""
    estimate = mean(scores([[1.0, NAN], [NAN, 0.0]], [0, 1]))["m"]
    assert estimate.value == 0.5
    assert (estimate.low, estimate.high) == (0.0, 1.0)


# ---- the paired difference


def test_what_is_hard_for_both_cancels():
    rng = np.random.default_rng(8)
    units = np.repeat(np.arange(40), 5)
    hard = rng.random(40)[units]
    before, after = scores(hard, units), scores(hard + 0.1 + rng.normal(0, 0.02, 200), units)
    difference = paired_difference(before, after)["m"]
    apart = mean(after)["m"]
    assert difference.value == pytest.approx(apart.value - mean(before)["m"].value)
    assert difference.excludes_zero
    assert difference.high - difference.low < 0.1 * (apart.high - apart.low)
    assert paired_difference(after, before)["m"].value == pytest.approx(-difference.value)


def test_no_change_is_no_difference():
    values, units = unequal_classes(9, replicates=3)
    same = paired_difference(scores(values, units, macro=True), scores(values, units, macro=True))["m"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert not same.excludes_zero


def test_a_query_counts_where_both_sides_have_it():
    difference = paired_difference(
        scores([1.0, NAN, 0.0, 0.5], [0, 1, 2, 3]), scores([NAN, 1.0, 1.0, 1.0], [0, 1, 2, 3])
    )["m"]
    assert difference.value == 0.75
    assert (difference.n, difference.queries) == (2, 2)


@pytest.mark.parametrize("several", ["before", "after"])
def test_one_baseline_is_set_against_every_seed(several: str):
    rng = np.random.default_rng(10)
    one, three = rng.random((1, 30)), rng.random((3, 30))
    sides = (three, one) if several == "before" else (one, three)
    difference = paired_difference(*(scores(side, np.arange(30)) for side in sides))["m"]
    assert difference.value == pytest.approx(sides[1].mean() - sides[0].mean())
    spelled_out = scores(sides[1] - sides[0], np.arange(30))
    assert difference == mean(spelled_out)["m"]


def test_sides_that_do_not_belong_together_are_refused():
    base = scores([1.0, 0.0], [0, 1])
    for other, words in (
        (scores([1.0, 0.0], [1, 0]), "same queries"),
        (scores([1.0, 0.0, 1.0], [0, 1, 1]), "2 before and 3 after"),
        (scores([1.0, 0.0], [0, 1], macro=True), "macro"),
        (PerQuery({"other": torch.zeros(1, 2)}, torch.arange(2)), "no metric"),
    ):
        with pytest.raises(InputError, match=words):
            paired_difference(base, other)
    with pytest.raises(InputError, match="2 replicates before and 3 after"):
        paired_difference(scores(np.zeros((2, 2)), [0, 1]), scores(np.zeros((3, 2)), [0, 1]))


def test_shared_metrics_are_compared_in_the_order_of_before():
    units = torch.arange(3)
    before = PerQuery({"a": torch.zeros(1, 3), "b": torch.zeros(1, 3), "c": torch.zeros(1, 3)}, units)
    after = PerQuery({"c": torch.ones(1, 3), "a": torch.ones(1, 3)}, units)
    assert list(paired_difference(before, after)) == ["a", "c"]
