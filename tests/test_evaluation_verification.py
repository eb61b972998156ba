"""Pairs and decisions against loops in float64; intervals against explicit resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_curve
from torch.nn.functional import normalize

from vicinal.evaluation import verification as module
from vicinal.evaluation.verification import (
    calibrate,
    decision_differences,
    decisions,
    similarities,
    verification,
)
from vicinal.heads.calibration import OpenSetThreshold
from vicinal.types import Embeddings, InputError


def made(classes: int = 6, each: int = 4, *, noise: float = 0.5, seed: int = 0, dim: int = 6) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes * each) % classes
    centres = torch.randn(classes, dim, generator=generator)
    vectors = normalize(centres[labels] + noise * torch.randn(len(labels), dim, generator=generator), dim=1)
    names = tuple(f"{seed}-{i}" for i in range(len(labels)))
    return Embeddings(vectors, labels, names, tuple(f"c{i}" for i in range(classes)))


def pairs(query: Embeddings, gallery: Embeddings | None) -> list[tuple[int, float, bool]]:
    """(query, cosine, right) of every pair."""
    side = gallery or query
    found = []
    for i, x in enumerate(query.vectors.double()):
        for j, y in enumerate(side.vectors.double()):
            if gallery is not None or i != j:
                found.append((i, float(x @ y), bool(query.labels[i] == side.labels[j])))
    return found


# ---- pairs


@pytest.mark.parametrize("alone", [True, False], ids=["others", "gallery"])
def test_pairs_are_the_loops(alone: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CELLS", 24 * 5)  # blocks of five queries
    query, gallery = made(), None if alone else made(each=3, seed=1)
    found, listed = similarities(query, gallery), pairs(query, gallery)
    right = np.array([s for _, s, r in listed if r])
    wrong = np.array([s for _, s, r in listed if not r])
    hardest = np.array([max(s for i, s, r in listed if i == q and not r) for q in range(len(query))])
    for t in (-0.5, 0.0, 0.5, 0.75, 0.9):
        for kind, values in (("right", right), ("wrong", wrong), ("hardest", hardest)):
            assert found.share_above(t, kind) == pytest.approx((values >= t).mean())
    metrics = verification(found, resamples=10, rates=(0.05, 1e-6))
    assert metrics["right_mean"].value == pytest.approx(right.mean())
    assert metrics["wrong_mean"].value == pytest.approx(wrong.mean())
    assert metrics["gap"].value == pytest.approx(right.mean() - wrong.mean())
    spread = math.sqrt((right.var() + wrong.var()) / 2)
    assert metrics["d_prime"].value == pytest.approx((right.mean() - wrong.mean()) / spread, rel=1e-5)
    assert metrics["wrong_above@0.75"].value == pytest.approx((wrong >= 0.75).mean())
    assert metrics["hardest_above@0.5"].value == pytest.approx((hardest >= 0.5).mean())
    truth, scores = np.array([r for *_, r in listed]), np.array([s for _, s, _ in listed])
    best = max(2 * (right >= t).sum() / ((scores >= t).sum() + len(right)) for t in scores)
    assert metrics["f1"].value == pytest.approx(best, abs=0.02)  # thresholds are multiples of .001
    t = metrics["threshold"].value
    at = 2 * (right >= t).sum() / ((scores >= t).sum() + len(right))
    assert metrics["f1"].value == pytest.approx(at)
    far, tar, _ = roc_curve(truth, scores, drop_intermediate=False)
    crossing = np.abs(far - (1 - tar)).argmin()
    assert metrics["eer"].value == pytest.approx((far[crossing] + 1 - tar[crossing]) / 2, abs=0.02)
    assert metrics["tar@far=0.05"].value == pytest.approx(tar[far <= 0.05].max(), abs=0.02)
    assert math.isnan(metrics["tar@far=1e-06"].value)
    low = found.percentiles((5, 50))["wrong"]
    np.testing.assert_allclose(low, np.percentile(wrong, (5, 50), method="inverted_cdf"), atol=0.0011)
    whole = found.curve()
    place = int(np.flatnonzero(np.isclose(whole.thresholds, 0.5))[0])
    assert whole.precision[place] == pytest.approx((right >= 0.5).sum() / (scores >= 0.5).sum())


def test_variants_of_one_brand_are_no_pair():
    query, gallery = made(classes=4, seed=1), made(classes=4, seed=2)
    kin = torch.tensor([0, 0, 1, 2])
    found = similarities(query, gallery, kin=kin)
    labels = query.labels[:, None], gallery.labels[None]
    assert found.right.sum() == similarities(query, gallery).right.sum() == (labels[0] == labels[1]).sum()
    assert found.wrong.sum() == (kin[labels[0]] != kin[labels[1]]).sum() < (labels[0] != labels[1]).sum()


def test_the_same_pictures_are_wholly_alike_and_edges_hold():
    x = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.6, 0.8], [0.6, 0.8]]), dim=1)
    found = similarities(Embeddings(x, torch.tensor([0, 0, 1, 1]), ("a", "b", "c", "d"), ("p", "q")))
    assert found.share_above(1.0, "right") == 1.0
    assert (found.share_above(0.6), found.share_above(0.601)) == (1.0, 0.0)
    metrics = verification(found, resamples=20)
    assert (metrics["overlap"].value, metrics["f1"].value, metrics["eer"].value) == (0.0, 1.0, 0.0)
    assert (metrics["gap"].n, metrics["gap"].queries) == (2, 4)


def test_intervals_of_pairs_are_explicit_resampling():
    query = made(classes=12, each=5)
    found = similarities(query)
    metrics = verification(found, resamples=2000)
    listed = pairs(query, None)
    label = query.labels.numpy()
    sums, counts = np.zeros((2, 12)), np.zeros((2, 12))
    for i, s, r in listed:
        sums[int(r), label[i]] += s
        counts[int(r), label[i]] += 1
    above = np.array([sum(s >= 0.5 for i, s, r in listed if not r and label[i] == c) for c in range(12)])
    rng = np.random.default_rng(0)
    means, shares = [], []
    for _ in range(4000):
        drawn = rng.integers(12, size=12)
        means.append(sums[1, drawn].sum() / counts[1, drawn].sum() - sums[0, drawn].sum() / counts[0, drawn].sum())
        shares.append(above[drawn].sum() / counts[0, drawn].sum())
    for name, values in (("gap", means), ("wrong_above@0.5", shares)):
        low, high = np.percentile(values, (2.5, 97.5))
        estimate = metrics[name]
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.15 * (high - low))
    again, same, other = (str(verification(found, resamples=50, seed=seed)) for seed in (0, 0, 1))
    assert again == same != other


# ---- decisions


def answers(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    units = np.repeat(np.arange(20), 6)
    enrolled = units < 14
    right = enrolled & (rng.random(120) < 0.8)
    scores = rng.normal(0.3, 0.15, 120) + 0.4 * right
    scores[rng.random(120) < 0.05] = -np.inf
    return tuple(torch.from_numpy(v) for v in (scores, right, enrolled, units))  # type: ignore[return-value]


def by_hand(scores: list, right: list, enrolled: list, t: float) -> dict[str, float]:
    rows = list(zip(scores, right, enrolled, strict=True))
    tp = sum(r and s >= t for s, r, _ in rows)
    fp = sum(not r and s >= t for s, r, _ in rows)
    known = sum(e for *_, e in rows)
    return {
        "precision": tp / (tp + fp),
        "recall": tp / known,
        "f1": 2 * tp / (tp + fp + known),
        "fpir": sum(not e and s >= t for s, _, e in rows) / (len(rows) - known),
        "fnir": 1 - tp / known,
    }


def test_decisions_are_the_loops_and_their_intervals_explicit_resampling():
    scores, right, enrolled, units = answers()
    metrics = decisions(scores, right, units, threshold=0.5, enrolled=enrolled)
    assert {name: e.value for name, e in metrics.items()} == pytest.approx(
        by_hand(scores.tolist(), right.tolist(), enrolled.tolist(), 0.5)
    )
    rng, drawn = np.random.default_rng(1), []
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(units.numpy() == u) for u in rng.integers(20, size=20)])
        drawn.append(by_hand(scores[rows].tolist(), right[rows].tolist(), enrolled[rows].tolist(), 0.5))
    for name in ("f1", "recall", "fpir"):
        low, high = np.percentile([d[name] for d in drawn], (2.5, 97.5))
        estimate = metrics[name]
        assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=0.15 * (high - low))
        assert (estimate.n, estimate.queries) == (20, 120)


def test_differences_of_decisions_draw_the_same_classes_for_both():
    scores, right, enrolled, units = answers()
    better = scores + 0.1 * right
    found = decision_differences(
        (scores, right), (better, right), units, thresholds=(0.5, 0.55), enrolled=enrolled, seed=3
    )
    both = [(scores, 0.5), (better, 0.55)]
    before, after = (decisions(s, right, units, threshold=t, enrolled=enrolled, seed=3) for s, t in both)
    for name, estimate in found.items():
        assert estimate.value == pytest.approx(after[name].value - before[name].value)
    rng, drawn = np.random.default_rng(1), []
    for _ in range(2000):
        rows = np.concatenate([np.flatnonzero(units.numpy() == u) for u in rng.integers(20, size=20)])
        one, other = (
            by_hand(s[rows].tolist(), right[rows].tolist(), enrolled[rows].tolist(), t)["f1"] for s, t in both
        )
        drawn.append(other - one)
    low, high = np.percentile(drawn, (2.5, 97.5))
    assert (found["f1"].low, found["f1"].high) == pytest.approx((low, high), abs=0.15 * (high - low))
    assert found["f1"].high - found["f1"].low < before["f1"].high - before["f1"].low
    with pytest.raises(InputError, match="enrolled is needed"):
        decision_differences((scores, right), (better, right), units, thresholds=(0.5, 0.5))


@pytest.mark.parametrize("rate", [None, 0.3], ids=["f1", "rate"])
def test_a_threshold_has_an_interval_by_fitting_it_anew(rate: float | None):
    scores, right, enrolled, units = answers(2)
    rule = OpenSetThreshold(rate=rate, confidence=None).fit(scores, right, enrolled=enrolled, fingerprint="m")
    metrics = calibrate(rule, scores, right, units + 100, enrolled=enrolled, resamples=400)
    assert metrics["threshold"].value == pytest.approx(rule.threshold_)
    assert metrics["eer"].value == pytest.approx(rule.eer_)
    assert metrics["f1"].value == pytest.approx(rule.f1_)
    assert metrics["fpir"].value == pytest.approx(rule.false_accept_)
    rng, drawn = np.random.default_rng(3), []
    for _ in range(400):
        rows = np.concatenate([np.flatnonzero(units.numpy() == u) for u in rng.integers(20, size=20)])
        if enrolled[rows].all():
            continue
        again = OpenSetThreshold(rate=rate, confidence=None).fit(
            scores[rows], right[rows], enrolled=enrolled[rows], fingerprint="m"
        )
        drawn.append(again.threshold_)
    low, high = np.percentile(drawn, (2.5, 97.5))
    estimate = metrics["threshold"]
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=max(0.02, 0.3 * (high - low)))


def test_one_class_has_no_interval():
    metrics = decisions([0.9, 0.1], [True, False], torch.tensor([4, 4]), threshold=0.5)
    assert metrics["f1"].value == 1.0
    assert math.isnan(metrics["f1"].low)
    assert math.isnan(metrics["f1"].high)


# ---- bad input


def test_bad_input_is_named():
    good = made()
    other = Embeddings(good.vectors, good.labels, good.ids, tuple(reversed(good.classes)))
    bad = Embeddings(good.vectors * math.nan, good.labels, good.ids, good.classes)
    single = Embeddings(good.vectors[:6], good.labels[:6], good.ids[:6], good.classes)
    one = Embeddings(good.vectors, good.labels * 0, good.ids, good.classes)
    for query, gallery, says in (
        (good, other, "other classes"),
        (bad, None, "not finite"),
        (good.where(good.labels > 9), None, "not one image"),
        (single, None, "not one such pair"),
        (one, None, "not one such pair"),
    ):
        with pytest.raises(InputError, match=says):
            similarities(query, gallery)
    with pytest.raises(InputError, match="1 classes for 2 scores"):
        decisions([0.1, 0.2], [True, False], torch.tensor([0]), threshold=0.5)
    with pytest.raises(ValueError, match="resamples"):
        verification(similarities(good), resamples=0)
