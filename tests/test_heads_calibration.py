"""Thresholds and temperatures against loops, scikit-learn and a grid; what belongs to another model is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import precision_recall_curve, roc_curve

from vicinal.heads.calibration import OpenSetThreshold, TemperatureScaling, curve
from vicinal.types import Estimate, InputError


def trials(seed: int, size: int = 300, *, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    right = rng.random(size) < 0.4
    scores = rng.normal(0.3, 0.2, size) + 0.3 * right
    return (scores.round(1) if ties else scores), right


def by_hand(scores: np.ndarray, right: np.ndarray, enrolled: np.ndarray, t: float) -> dict[str, float]:
    tp = fp = fn = accepted = strangers = 0
    for s, r, e in zip(scores, right, enrolled, strict=True):
        tp += bool(r and s >= t)
        fp += bool(not r and s >= t)
        fn += bool(e and not (r and s >= t))
        strangers += not e
        accepted += bool(not e and s >= t)
    return {
        "f1": 2 * tp / (2 * tp + fp + fn),
        "precision": tp / (tp + fp) if tp + fp else math.nan,
        "recall": tp / (tp + fn),
        "false_accept": accepted / strangers,
    }


# ---- the curve


@pytest.mark.parametrize("ties", [False, True])
def test_the_curve_is_scikit_learns(ties: bool):
    scores, right = trials(0, ties=ties)
    found = curve(scores, right)
    precision, recall, thresholds = precision_recall_curve(right, scores)
    np.testing.assert_array_equal(found.thresholds, thresholds[::-1])
    np.testing.assert_allclose(found.precision, precision[:-1][::-1])
    np.testing.assert_allclose(found.recall, recall[:-1][::-1])
    far, _, at = roc_curve(right, scores, drop_intermediate=False)
    np.testing.assert_allclose(found.false_accept, far[1:])
    np.testing.assert_array_equal(found.thresholds, at[1:])


def test_a_wrong_class_costs_twice_and_unknown_ones_are_the_impostors():
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    right = np.array([True, False, False, True, False])
    enrolled = np.array([True, True, False, True, False])
    found = curve(scores, right, enrolled=enrolled)
    for i, t in enumerate(scores):
        want = by_hand(scores, right, enrolled, t)
        got = {name: float(getattr(found, name)[i]) for name in want}
        assert got == pytest.approx(want)


def test_weights_count_as_repetition_does():
    scores, right = trials(1, 60, ties=True)
    weights = np.random.default_rng(2).integers(0, 4, (3, 60))
    found = curve(scores, right, weights=weights)
    for r in range(3):
        times = np.repeat(np.arange(60), weights[r])
        one = curve(scores[times], right[times])
        places = np.searchsorted(-found.thresholds, -one.thresholds)
        np.testing.assert_allclose(found.f1[r][places], one.f1)
        assert found.equal_error()[r] == pytest.approx(float(one.equal_error()))
        assert found.true_accept(0.1)[r] == pytest.approx(float(one.true_accept(0.1)))
        assert found.at_rate(0.1)[r] <= one.at_rate(0.1)  # a score of no weight may lie lower still


def test_what_has_no_score_is_missed_and_never_accepted():
    found = curve([0.9, -np.inf, -np.inf], [True, True, False])
    assert found.thresholds.tolist() == [0.9]
    assert (found.recall[0], found.false_accept[0]) == (0.5, 0.0)


# ---- the threshold


@pytest.mark.parametrize("seed", range(5))
def test_best_f1_is_the_best_of_all_and_survives_float32(seed: int):
    scores, right = trials(seed, ties=seed % 2 == 1)
    scores = scores.astype(np.float32)
    rule = OpenSetThreshold().fit(scores, right, fingerprint="m")
    best = max(by_hand(scores, right, right, t)["f1"] for t in scores)
    assert rule.f1_ == pytest.approx(best)
    accepted = rule.predict(scores)  # float32 compared with the saved number
    assert by_hand(np.where(accepted, 1.0, 0.0), right, right, 0.5)["f1"] == pytest.approx(best)


def test_of_equal_f1_the_largest_threshold_midway_to_the_next_score():
    rule = OpenSetThreshold().fit([1.0, 0.5, 0.25, 0.0], [True, False, True, True], fingerprint="m")
    assert rule.threshold_ == 0.0  # the lowest score has no next
    tied = OpenSetThreshold().fit([0.75, 0.5, 0.25], [True, False, False], fingerprint="m")
    assert (tied.threshold_, tied.f1_) == (0.625, 1.0)
    equal = OpenSetThreshold().fit([0.9, 0.8, 0.7, 0.6], [True, False, False, True], fingerprint="m")
    assert equal.f1_ == pytest.approx(2 / 3)  # at .9 and at .6
    assert equal.threshold_ == pytest.approx(0.85)
    neighbours = np.array([1.0, np.nextafter(np.float32(1.0), np.float32(0.0))], dtype=np.float32)
    close = OpenSetThreshold().fit(neighbours, [True, False], fingerprint="m")
    assert close.predict(neighbours).tolist() == [True, False]


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.29])
def test_the_stated_rate_is_kept_and_used_up(rate: float):
    rng = np.random.default_rng(3)
    scores, right = rng.permutation(np.linspace(0, 1, 200)), np.arange(200) < 100
    rule = OpenSetThreshold(rate=rate, confidence=None).fit(scores, right, fingerprint="m")
    wrong = scores[~right]
    assert (wrong >= rule.threshold_).mean() == pytest.approx(rate)  # 100 impostors: each rate can be hit
    assert rule.false_accept_ == pytest.approx(rate)
    lower = scores[scores < rule.threshold_].max()
    assert (wrong >= lower).mean() > rate
    assert rule.recall_ == pytest.approx((scores[right] >= rule.threshold_).mean())


def test_impostors_on_top_leave_a_threshold_above_them():
    scores = np.array([0.9] * 30 + [0.1] * 10)
    rule = OpenSetThreshold(rate=0.1, confidence=None).fit(scores, np.arange(40) >= 30, fingerprint="m")
    assert rule.threshold_ > 0.9
    assert not rule.predict(scores.astype(np.float32)).any()
    assert (rule.recall_, rule.false_accept_) == (0.0, 0.0)


def test_a_rate_per_query_holds_for_that_many_references():
    rng = np.random.default_rng(4)
    wrong, right = rng.random(50_000), rng.random(100) + 0.5
    scores, good = np.concatenate([wrong, right]), np.arange(50_100) >= 50_000
    rule = OpenSetThreshold(rate=0.05, gallery=50, confidence=None).fit(scores, good, fingerprint="m")
    queries = rng.random((4000, 50))  # fresh ones, each against fifty references
    assert (queries.max(1) >= rule.threshold_).mean() == pytest.approx(0.05, abs=0.02)
    assert rule.by_gallery_[10] < rule.threshold_ < rule.by_gallery_[100] < rule.by_gallery_[1000]
    sure = OpenSetThreshold(rate=0.05, gallery=50).fit(scores, good, fingerprint="m")
    assert rule.threshold_ < sure.threshold_ < rule.by_gallery_[100]
    few = OpenSetThreshold(rate=0.05).fit(scores[49_500:], good[49_500:], fingerprint="m")
    assert few.by_gallery_[1000] is None  # 500 pairs say nothing of a rate of 5e-5


# ---- the confidence of a rate


def strangers(scores: np.ndarray, units: np.ndarray, **settings: float | None) -> OpenSetThreshold:
    """A threshold fitted on these impostors, and on one right answer above all."""
    right = np.append(np.zeros(len(scores), bool), True)
    rule = OpenSetThreshold(**{"rate": 0.05, **settings})
    return rule.fit(np.append(scores, 99.0), right, enrolled=right, units=np.append(units, -1), fingerprint="m")


@pytest.mark.parametrize(("count", "accepted"), [(59, 0), (92, 0), (93, 1), (124, 2), (153, 3), (181, 4)])
def test_of_independent_ones_as_many_may_pass_as_in_tables_of_tolerance_limits(count: int, accepted: int):
    scores = np.random.default_rng(0).permutation(count).astype(float)
    rule = strangers(scores, np.arange(count))
    assert int(rule.predict(scores).sum()) == accepted
    assert rule.independent_ == count
    with pytest.raises(InputError, match=r"are of 58 classes, and it takes 59 .* Bring some 59 .* a rate of 0.051"):
        strangers(scores[:58], np.arange(58))


def test_copies_of_a_class_are_worth_one():
    rng = np.random.default_rng(1)
    once = rng.normal(size=400)
    alone = strangers(once, np.arange(400))
    copied = strangers(np.repeat(once, 5), np.repeat(np.arange(400), 5))
    assert copied.independent_ == pytest.approx(400, rel=0.02)
    assert copied.threshold_ == pytest.approx(alone.threshold_, abs=0.1)
    apart = strangers(rng.normal(size=2000), np.repeat(np.arange(400), 5))
    assert apart.independent_ > 1500
    few = np.repeat(np.arange(20), 100)
    with pytest.raises(InputError, match=r"2,000 impostors are of 20 classes, and it takes 59 .* a rate of 0.14,"):
        strangers(rng.normal(size=2000), few)
    uneven = np.repeat(np.arange(61), [300, *[1] * 60])  # most of what is asked is of one class
    with pytest.raises(InputError, match=r"of 61 classes, and worth \d independent .* Bring some [\d,]{3,} such"):
        strangers(np.where(uneven == 0, 1.0, rng.normal(size=360)), uneven)


@pytest.mark.parametrize(
    ("classes", "most", "alike", "rate"),
    [(100, 7, 0.9, 0.05), (150, 12, 0.5, 0.05), (60, 3, 0.3, 0.1), (80, 1, 0, 0.05)],
)
def test_a_stated_rate_holds_as_often_as_its_confidence_says(classes: int, most: int, alike: float, rate: float):
    """Scores of classes of 1 to `most` crops, correlated by `alike` within a class: what passes of others is known."""
    rng = np.random.default_rng(2)
    beyond: dict[float | None, list[bool]] = {None: [], 0.8: [], 0.95: []}
    for _ in range(200):
        units = np.repeat(np.arange(classes), rng.integers(1, most + 1, classes))
        scores = alike**0.5 * rng.normal(size=classes)[units] + (1 - alike) ** 0.5 * rng.normal(size=len(units))
        for confidence, found in beyond.items():
            rule = strangers(scores, units, rate=rate, confidence=confidence)
            found.append(norm.sf(rule.threshold_) > rate)
    share = {confidence: np.mean(found) for confidence, found in beyond.items()}
    assert 0.35 < share[None] < 0.6, "a quantile is passed as often as not"
    assert share[0.8] <= 0.2 + 0.06  # two standard errors of 200 draws
    assert share[0.95] <= 0.05 + 0.035
    assert share[0.95] < share[0.8] < share[None]


def test_the_share_of_strangers_that_score_as_high():
    rng = np.random.default_rng(5)
    rule = strangers(rng.normal(size=250), np.arange(250))
    fresh = rng.normal(size=4000)
    share = rule.stranger_share(fresh)
    assert [(share <= p).mean() for p in (0.05, 0.2, 0.5)] == pytest.approx([0.05, 0.2, 0.5], abs=0.06)
    assert (np.diff(share[np.argsort(-fresh)]) >= 0).all()
    assert rule.stranger_share([98.0, -np.inf]).tolist() == [1 / 251, 1.0]
    few = strangers(np.arange(30.0), np.arange(30), rate=0.1)
    by_hand = [(1 + (np.arange(30) >= s).sum()) / 31 for s in (29.5, 29, 12.2, 0, -1)]
    assert few.stranger_share([29.5, 29, 12.2, 0, -1]).tolist() == pytest.approx(by_hand)
    many = strangers(np.linspace(0, 1, 100_000), np.arange(100_000))
    asked = rng.random(1000)
    truth = (1 + np.ceil((1 - asked) * 99_999)) / 100_001
    assert ((many.stranger_share(asked) / truth > 0.999) & (many.stranger_share(asked) / truth < 1.07)).mean() > 0.99
    assert len(many.ranks_) <= 300
    of_pairs = OpenSetThreshold(rate=0.05, gallery=10).fit(
        np.append(np.arange(1e4), 1e5), np.arange(10_001) == 10_000, fingerprint="m"
    )
    assert of_pairs.stranger_share([9998.5])[0] == pytest.approx(1 - (1 - 2 / 10_001) ** 10)


def test_equal_error_by_hand():
    found = curve([0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [True, True, False, True, False, False])
    assert float(found.equal_error()) == pytest.approx(1 / 3)
    apart = curve([0.9, 0.8, 0.2, 0.1], [True, True, False, False])
    assert float(apart.equal_error()) == pytest.approx(0.0)
    scores, right = trials(6, 2000)
    far, tar, _ = roc_curve(right, scores, drop_intermediate=False)
    near = np.abs(far - (1 - tar)).argmin()
    assert float(curve(scores, right).equal_error()) == pytest.approx((far[near] + 1 - tar[near]) / 2, abs=2e-3)
    assert math.isnan(float(curve([0.5], [True]).equal_error()))


def test_true_accept_rate_by_hand():
    scores, right = trials(7)
    found = curve(scores, right)
    want = max((scores[right] >= t).mean() for t in [*scores, 9.0] if (scores[~right] >= t).mean() <= 0.1)
    assert float(found.true_accept(0.1)) == pytest.approx(want)
    assert math.isnan(float(found.true_accept(1e-4)))


@pytest.mark.parametrize(
    ("rule", "arguments", "says"),
    [
        (OpenSetThreshold(rate=2.0), {}, "rate=2.0"),
        (OpenSetThreshold(rate=0.001, confidence=None), {}, "not measurable on 2 impostors: give at least 1,000"),
        (OpenSetThreshold(rate=0.05), {}, "2 impostors are of 2 classes, and it takes 59"),
        (OpenSetThreshold(rate=0.5), {"enrolled": [True] * 4}, "not measurable on 0 impostors"),
        (OpenSetThreshold(rate=0.5, confidence=0.3), {}, "confidence=0.3"),
        (OpenSetThreshold(rate=0.5), {"units": [1, 2]}, "units"),
        (OpenSetThreshold(gallery=5), {}, "gallery needs a rate"),
        (OpenSetThreshold(rate=0.5, gallery=5), {"enrolled": [True] * 4}, "met their gallery"),
        (OpenSetThreshold(), {"right": [False] * 4}, "no right answer"),
        (OpenSetThreshold(), {"right": [True]}, "same length"),
        (OpenSetThreshold(), {"scores": [0.1, math.nan, 0.2, 0.3]}, "NaN"),
        (OpenSetThreshold(), {"scores": [-math.inf] * 4}, "no score"),
        (OpenSetThreshold(), {"enrolled": [False] * 4}, "not to be enrolled"),
    ],
    ids=[
        "rate",
        "few",
        "unsure",
        "no-stranger",
        "confidence",
        "units",
        "gallery",
        "met",
        "none-right",
        "length",
        "nan",
        "no-score",
        "enrolled",
    ],
)
def test_bad_input_is_named(rule: OpenSetThreshold, arguments: dict, says: str):
    given = {"scores": [0.9, 0.8, 0.3, 0.2], "right": [True, True, False, False], "fingerprint": "m", **arguments}
    with pytest.raises(InputError, match=says):
        rule.fit(given.pop("scores"), given.pop("right"), **given)


# ---- files


def test_a_threshold_comes_back_and_is_refused_for_others(tmp_path: Path):
    scores, right = trials(8)
    settings = {"fusion": "topk", "k": 3, "margin": 0.02}
    rule = OpenSetThreshold(rate=0.1, confidence=0.9)
    rule.fit(scores, right, units=np.arange(300) // 3, fingerprint="a" * 64, settings=settings, gallery_size=20)
    assert rule.aim == "at most 0.1 of unknown queries accepted among 20 classes, with confidence 0.9"
    assert OpenSetThreshold().aim == "best F1"
    path = rule.save(tmp_path / "deep" / "t.json", metrics={"f1": Estimate(0.5, 0.4, math.nan, 3, 9)})
    assert [p.name for p in path.parent.iterdir()] == ["t.json"]  # nothing is left beside it
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = OpenSetThreshold.load(path, fingerprint="a" * 64, settings=settings)
    for name in ("threshold_", "f1_", "eer_", "by_gallery_", "counts_", "gallery_size_", "rate", "settings_",
                 "confidence", "allowed_", "independent_", "aim"):  # fmt: skip
        assert getattr(back, name) == getattr(rule, name)
    notes = json.loads(path.read_text())
    old = tmp_path / "old.json"  # of before there was a confidence
    old.write_text(
        json.dumps({k: v for k, v in notes.items() if k not in ("confidence", "allowed", "independent", "strangers")})
    )
    assert np.isnan(OpenSetThreshold.load(old).stranger_share([0.5])).all()
    back_share, share = back.stranger_share(scores), rule.stranger_share(scores)
    np.testing.assert_array_equal(back_share, share)
    assert (OpenSetThreshold.load(old).confidence, OpenSetThreshold.load(old).allowed_) == (None, rule.pair_rate)
    assert (back.metrics_["f1"].low, math.isnan(back.metrics_["f1"].high)) == (0.4, True)
    assert OpenSetThreshold.load(back.save(tmp_path / "again.json")).metrics_["f1"].n == 3  # kept, too
    with pytest.raises(InputError, match="model aaaaaaaaaaaa"):
        OpenSetThreshold.load(path, fingerprint="b" * 64, settings=settings)
    with pytest.raises(InputError, match="fusion='topk', and here it is 'max'"):
        OpenSetThreshold.load(path, fingerprint="a" * 64, settings={**settings, "fusion": "max"})
    with pytest.raises(InputError, match="margin"):
        OpenSetThreshold.load(path, fingerprint="a" * 64, settings={"fusion": "topk", "k": 3})
    with pytest.raises(InputError, match="not a temperature"):
        TemperatureScaling.load(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "open-set threshold"}'])
def test_what_is_no_threshold_is_said_to_be_none(tmp_path: Path, text: str):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(InputError, match=r"t\.json is not"):
        OpenSetThreshold.load(tmp_path / "t.json")
    with pytest.raises(InputError, match=r"none\.json is not"):
        OpenSetThreshold.load(tmp_path / "none.json")


# ---- temperature


def test_temperature_is_the_best_of_a_grid(tmp_path: Path):
    rng = np.random.default_rng(9)
    logits = rng.normal(0, 3, (400, 5))
    p = np.exp(logits / 2.5)
    y = np.array([rng.choice(5, p=row / row.sum()) for row in p])  # drawn at T = 2.5

    def nll(t: float) -> float:
        z = logits / t
        return float((np.log(np.exp(z).sum(1)) - z[np.arange(400), y]).mean())

    scaling = TemperatureScaling().fit(logits, y, fingerprint="m")
    assert scaling.temperature_ == pytest.approx(2.5, rel=0.2)
    assert scaling.nll_ == pytest.approx(nll(scaling.temperature_))
    assert all(nll(t) >= scaling.nll_ - 1e-12 for t in np.linspace(0.5, 6, 500))
    assert nll(scaling.temperature_ * 1.0001) > scaling.nll_ < nll(scaling.temperature_ * 0.9999)
    np.testing.assert_allclose(scaling.predict_proba(logits + 1000).sum(1), 1)
    back = TemperatureScaling.load(scaling.save(tmp_path / "t.json"), fingerprint="m")
    assert back.temperature_ == scaling.temperature_
    with pytest.raises(InputError, match="fitted on scores of the model"):
        TemperatureScaling.load(tmp_path / "t.json", fingerprint="n")


def test_temperature_where_there_is_no_optimum():
    assert TemperatureScaling().fit([[1.0, 0.0]], [0], fingerprint="m").temperature_ == pytest.approx(1e-3)
    assert TemperatureScaling().fit([[1.0, 0.0]], [1], fingerprint="m").temperature_ == pytest.approx(1e3)
    for logits, y in (([[1.0]], [0]), ([[1.0, math.nan]], [0]), ([[1.0, 0.0]], [2]), ([[1.0, 0.0]], [0.5])):
        with pytest.raises(InputError):
            TemperatureScaling().fit(logits, y, fingerprint="m")
