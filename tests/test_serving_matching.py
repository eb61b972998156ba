"""The matcher against loops over queries, classes and references; what belongs to another model or setting."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vicinal.heads.calibration import OpenSetThreshold
from vicinal.serving import matching as module
from vicinal.serving.matching import Matcher
from vicinal.types import Embeddings, InputError

MODEL = "m" * 64
COUNTS = (3, 1, 0, 5, 3, 2)  # references of each class; the third has none
CLASSES = ("a", "b", "empty", "c", "d", "e")
CASES = [
    {"fusion": "max"},
    {"fusion": "mean"},
    {"fusion": "topk", "k": 2},
    {"fusion": "topk", "k": 9},
    {"fusion": "multi-ref", "k": 2},
    {"fusion": "multi-ref", "k": 3, "vote_threshold": 0.55},
]


def references(dim: int = 5, counts: tuple[int, ...] = COUNTS, seed: int = 0) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = torch.randperm(len(labels), generator=generator)  # classes come mixed
    vectors = normalize(torch.randn(len(labels), dim, generator=generator), dim=1)
    return Embeddings(vectors, labels[order], tuple(f"r{i}" for i in range(len(labels))), CLASSES[: len(counts)])


def queries(size: int = 50, dim: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(size, dim, generator=torch.Generator().manual_seed(seed))


def cosines(q: Tensor, refs: Embeddings, c: int) -> list[float]:
    q = q.double() / q.double().norm()
    rows = (refs.labels == c).nonzero().flatten().tolist()
    return sorted((float(q @ (refs.vectors[r].double() / refs.vectors[r].double().norm())) for r in rows), reverse=True)


def fused(
    s: list[float], fusion: str, k: int = 3, min_votes: int = 1, vote_threshold: float | None = None
) -> tuple[float, bool]:
    """The score by the rule, and whether the votes are there."""
    if fusion == "max":
        return s[0], True
    if fusion == "mean":
        return sum(s) / len(s), True
    best = s[: min(k, len(s))]
    mean = sum(best) / len(best)
    if fusion == "topk":
        return mean, True
    if vote_threshold is None:
        return min(mean, s[min_votes - 1]), True
    return mean, sum(v >= vote_threshold for v in s) >= min_votes


def by_hand(q: Tensor, refs: Embeddings, **case: object) -> dict[int, float]:
    found = {}
    for c in range(len(refs.classes)):
        if s := cosines(q, refs, c):
            score, votes = fused(s, **case)
            found[c] = score if votes else -math.inf
    return found


# ---- scores


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_answers_are_the_loops(case: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CELLS", 14 * 7)  # blocks of seven queries
    refs, x = references(), queries()
    matcher = Matcher(refs, fingerprint=MODEL, threshold=0.5, margin=0.1, **case)
    found = matcher.match(x, fingerprint=MODEL)
    answers = set()
    for i, q in enumerate(x):
        scores = by_hand(q, refs, **case)
        best = max(scores, key=lambda c: (scores[c], -c))
        rest = sorted((v for c, v in scores.items() if c != best), reverse=True)
        if scores[best] == -math.inf:
            assert (int(found.labels[i]), bool(found.known[i]), float(found.margins[i])) == (-1, False, 0.0)
            answers.add("no votes")
            continue
        assert int(found.labels[i]) == best
        assert float(found.scores[i]) == pytest.approx(scores[best], abs=1e-6)
        assert float(found.margins[i]) == pytest.approx(scores[best] - rest[0], abs=1e-6)
        known = scores[best] >= 0.5 and scores[best] - rest[0] >= 0.1
        assert bool(found.known[i]) == known
        assert found.names()[i] == (CLASSES[best] if known else None)
        if rest[0] > -math.inf:
            assert scores[int(found.seconds[i])] == rest[0]
            assert float(found.ratios[i]) == pytest.approx((1 - scores[best]) / (1 - rest[0]), rel=1e-4)
        s = cosines(q, refs, best)
        wide = 1 if case["fusion"] == "max" else case.get("k", 3)
        got = [float(v) for v in found.similarities[i] if v > -math.inf]
        assert got == pytest.approx(s[:wide], abs=1e-6)
        names = found.deciding()[i]
        assert len(names) == len(got)
        for name, cosine in zip(names, got, strict=True):
            row = refs.ids.index(name)
            assert int(refs.labels[row]) == best
            assert float(normalize(q, dim=0) @ refs.vectors[row]) == pytest.approx(cosine, abs=1e-6)
        answers.add(known)
    assert {True, False} <= answers
    assert ("no votes" in answers) == ("vote_threshold" in case)


@pytest.mark.parametrize("votes", [1, 2, 3])
def test_multi_ref_is_the_rule_at_every_threshold(votes: int):
    refs, x = references(counts=(3, 4, 5)), queries(80)
    seen = set()
    for t in (0.1, 0.4, 0.6):
        matcher = Matcher(refs, fingerprint=MODEL, fusion="multi-ref", k=2, min_votes=votes, threshold=t, margin=0.0)
        found = matcher.match(x, fingerprint=MODEL)
        passing = torch.zeros(len(x), dtype=torch.bool)
        for i, q in enumerate(x):
            for c in range(3):
                s = cosines(q, refs, c)
                passing[i] |= (s[0] + s[1]) / 2 >= t and sum(v >= t for v in s) >= votes
        assert torch.equal(found.known, passing)
        seen |= set(passing.tolist())
    assert seen == {True, False}


def test_equal_scores_go_to_the_first_class_and_have_no_margin():
    x = torch.eye(3)[[0, 0, 1]]
    refs = Embeddings(x, torch.tensor([1, 0, 2]), ("p", "q", "r"), ("a", "b", "c"))
    found = Matcher(refs, fingerprint=MODEL).match(x[:1], fingerprint=MODEL)
    assert (int(found.labels), int(found.seconds), float(found.margins), bool(found.known)) == (0, 1, 0.0, False)
    assert found.deciding() == [("q",)]


def test_one_class_has_no_second():
    refs = Embeddings(torch.eye(2), torch.zeros(2, dtype=torch.long), ("p", "q"), ("a",))
    found = Matcher(refs, fingerprint=MODEL, threshold=0.4).match(torch.tensor([[1.0, 0.0]]), fingerprint=MODEL)
    assert (int(found.seconds), float(found.margins), found.names()) == (-1, math.inf, ["a"])
    assert len(Matcher(refs, fingerprint=MODEL).match(torch.zeros(0, 2), fingerprint=MODEL)) == 0


def test_a_class_may_have_its_own_threshold():
    x = torch.eye(3)
    refs = Embeddings(x, torch.arange(3), ("p", "q", "r"), ("a", "b", "c"))
    matcher = Matcher(refs, fingerprint=MODEL, threshold=0.9, class_thresholds={"b": 1.5, "c": 0.1})
    tilted = normalize(x + 0.4 * x.roll(1, 0), dim=1)  # cosines of .93
    assert matcher.match(tilted, fingerprint=MODEL).names() == ["a", None, "c"]
    far = normalize(x + 0.8 * x.roll(1, 0), dim=1)  # .78
    assert matcher.match(far, fingerprint=MODEL).names() == [None, None, "c"]


# ---- normalisation


@pytest.mark.parametrize("cohort", [None, 2, 3], ids=str)
@pytest.mark.parametrize("kind", ["z", "t", "s"])
def test_normalised_scores_are_the_loops(kind: str, cohort: int | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "CELLS", 14 * 7)
    refs, x, behind = references(), queries(20), queries(30, seed=9)
    matcher = Matcher(
        refs,
        fingerprint=MODEL,
        fusion="max",
        normalisation=kind,
        cohort=cohort,
        background=None if kind == "t" else behind,
    )
    found = matcher.match(x, fingerprint=MODEL)

    def normal(value: float, others: list[float]) -> float:
        kept = torch.tensor(sorted(others, reverse=True)[:cohort], dtype=torch.float64)
        return float((value - kept.mean()) / kept.std(correction=0))

    for i, q in enumerate(x):
        raw = by_hand(q, refs, fusion="max")
        scores = {}
        for c, value in raw.items():
            z = normal(value, [cosines(b, refs, c)[0] for b in behind])
            t = normal(value, [v for d, v in raw.items() if d != c])
            scores[c] = {"z": z, "t": t, "s": (z + t) / 2}[kind]
        best = max(scores, key=lambda c: scores[c])
        assert int(found.labels[i]) == best
        assert float(found.scores[i]) == pytest.approx(scores[best], rel=1e-3)


# ---- thresholds


def test_trials_fit_a_threshold_that_this_matcher_takes_and_no_other(tmp_path: Path):
    generator = torch.Generator().manual_seed(5)
    centres = normalize(torch.randn(12, 16, generator=generator), dim=1)
    labels = torch.arange(12).repeat_interleave(6)
    vectors = normalize(centres[labels] + 0.2 * torch.randn(72, 16, generator=generator), dim=1)
    names = tuple(f"brand {i}" for i in range(12))
    everything = Embeddings(vectors, labels, tuple(map(str, range(72))), names)
    shown = (torch.arange(72) % 6 < 3) & (labels < 8)
    refs, asked = everything.where(shown), everything.where(torch.arange(72) % 6 >= 3)
    mixed = Embeddings(asked.vectors, 11 - asked.labels, asked.ids, names[::-1])  # another order of the same names
    matcher = Matcher(refs, fingerprint=MODEL)
    for given in (asked, mixed):
        trials = matcher.trials(given, fingerprint=MODEL)
        assert torch.equal(trials.enrolled, asked.labels < 8)
        assert torch.equal(trials.units, given.labels)
        assert trials.right[asked.labels < 8].float().mean() > 0.9
        assert not trials.right[asked.labels >= 8].any()
    rule = OpenSetThreshold().fit(
        trials.scores,
        trials.right,
        enrolled=trials.enrolled,
        fingerprint=MODEL,
        settings=matcher.settings,
        gallery_size=8,
    )
    back = OpenSetThreshold.load(rule.save(tmp_path / "t.json"), fingerprint=MODEL, settings=matcher.settings)
    decided = matcher.decide_by(back)
    found = decided.match(asked.vectors, fingerprint=MODEL)
    want = [n if n is not None and s >= rule.threshold_ else None for n, s in zip(
        matcher.match(asked.vectors, fingerprint=MODEL).names(), found.scores.tolist(), strict=True)]  # fmt: skip
    assert found.names() == want
    assert matcher.threshold is None  # the first one stays as it was
    accepted = found.known & trials.right.flip(0) if given is not asked else found.known
    assert int(accepted.sum()) > 0
    with pytest.raises(InputError, match="fitted with fusion='topk', and here it is 'max'"):
        Matcher(refs, fingerprint=MODEL, fusion="max").decide_by(rule)
    with pytest.raises(InputError, match="margin"):
        Matcher(refs, fingerprint=MODEL, margin=0.5).decide_by(rule)
    with pytest.raises(InputError, match="scores of the model"):
        Matcher(refs, fingerprint="o" * 64).decide_by(rule)
    rule.gallery_size_ = 3
    with pytest.warns(UserWarning, match="among 3 classes, and here are 8"):
        matcher.decide_by(rule)
    rule.gallery_size_ = 6
    matcher.decide_by(rule)  # of the best F1, fewer than twice as many: no warning
    rule.rate = 0.05
    with pytest.warns(
        UserWarning, match=r"its rate of 0.05 among 6 classes, and here are 8, among which it may be 0.066"
    ):
        matcher.decide_by(rule)
    rule.gallery_size_ = 8
    matcher.decide_by(rule)


def test_what_the_margin_refuses_no_threshold_accepts():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    refs = Embeddings(x, torch.arange(2), ("p", "q"), ("a", "b"))
    asked = Embeddings(torch.tensor([[1.0, 0.99], [1.0, 0.0]]), torch.tensor([0, 0]), ("s", "t"), ("a",))
    trials = Matcher(refs, fingerprint=MODEL).trials(asked, fingerprint=MODEL)
    assert trials.scores.tolist() == [-math.inf, 1.0]
    assert trials.right.tolist() == [True, True]


# ---- files, bad input


@pytest.mark.parametrize("case", [CASES[2], {**CASES[5], "normalisation": "s", "cohort": 2}], ids=["plain", "all"])
def test_a_matcher_comes_back(case: dict, tmp_path: Path):
    behind = queries(9, seed=3) if "normalisation" in case else None
    matcher = Matcher(
        references(), fingerprint=MODEL, threshold=0.3, class_thresholds={"d": 0.1}, background=behind, **case
    )
    back = Matcher.load(matcher.save(tmp_path / "deep" / "x.matcher"))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.matcher"]
    one, two = (m.match(queries(), fingerprint=MODEL) for m in (matcher, back))
    for name in ("labels", "scores", "known", "references"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert (back.settings, back.class_thresholds, back.ids) == (matcher.settings, {"d": 0.1}, references().ids)
    (tmp_path / "bad").write_text("no")
    for path in (tmp_path / "bad", tmp_path / "missing"):
        with pytest.raises(InputError, match="is not a matcher"):
            Matcher.load(path)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"class_thresholds": {"empty": 0.5}}, "'empty' has no reference"),
        ({"class_thresholds": {"nobody": 0.5}}, "'nobody' has no reference"),
        ({"fusion": "multi-ref", "min_votes": 2}, "b has 1 references and could never get 2 votes"),
        ({"normalisation": "z"}, "needs background vectors"),
        ({"background": torch.ones(3, 5)}, "used by the normalisations z and s alone"),
        ({"normalisation": "z", "background": torch.ones(3, 4)}, "background: 4 numbers a vector"),
        ({"normalisation": "t", "cohort": 1}, "two other classes"),
    ],
    ids=["empty", "nobody", "votes", "z", "unused", "width", "t"],
)
def test_bad_settings_are_named(settings: dict, says: str):
    with pytest.raises(InputError, match=says):
        Matcher(references(), fingerprint=MODEL, **settings)


def test_bad_input_is_named():
    refs = references()
    matcher = Matcher(refs, fingerprint=MODEL)
    with pytest.raises(InputError, match="references are of the model mmmm"):
        matcher.match(queries(), fingerprint="o" * 64)
    with pytest.raises(InputError, match="queries: row 0 is zero"):
        matcher.match(torch.zeros(1, 5), fingerprint=MODEL)
    with pytest.raises(InputError, match="queries: 4 numbers"):
        matcher.match(torch.ones(1, 4), fingerprint=MODEL)
    with pytest.raises(InputError, match="not one reference"):
        Matcher(refs.where(refs.labels > 9), fingerprint=MODEL)
    with pytest.raises(InputError, match="reference r0 is of none of the 2 classes"):
        Matcher(Embeddings(refs.vectors, refs.labels * 0 + 5, refs.ids, ("a", "b")), fingerprint=MODEL)
    with pytest.raises(InputError, match="no labels"):
        matcher.trials(Embeddings(refs.vectors, refs.labels * 0, refs.ids, ()), fingerprint=MODEL)
    for wrong in ({"k": 0}, {"fusion": "median"}, {"normalisation": "q"}):
        with pytest.raises(Exception, match=r"at least 1|is one of|type-check|Type-check"):
            Matcher(refs, fingerprint=MODEL, **wrong)
