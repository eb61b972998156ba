"""Decision rules on scores: from which score on an answer is accepted, and how sure a softmax may be. Arithmetic alone.

Let s_q be the score of query q, right_q whether what it was given is right, e_q whether a right answer existed at all,
P the number of queries with e_q, I the set of impostors: those without e_q or, where e is not given, those not right.
With the threshold t, walked down the distinct scores,

    TP(t) = |right, s >= t|    FP(t) = |not right, s >= t|    precision = TP / (TP + FP)    recall = TP / P
    F1(t) = 2 TP / (TP + FP + P)       FAR(t) = |I, s >= t| / |I|       FRR(t) = 1 - recall
    EER   = FAR = FRR, where the two cross, on the straight line between the two nearest thresholds

So a wrong class that is accepted costs twice: it is a false positive, and its query stays missed. With e, FAR is the
share of unknown things that are taken for something known (FPIR) and FRR its counterpart (FNIR). From scores of pairs,
a query against a gallery of N references is wrong, as if the N were independent, in

    FPIR = 1 - (1 - FAR)^N,      so a stated rate r asks for FAR <= 1 - (1 - r)^(1 / N)

A threshold that accepts the share r of the impostors at hand accepts more than r of others in half of all cases. To be
within r with confidence c, it may accept at most the share r' of those at hand, whose upper confidence bound is r:

    r' = max{p : B(c; n p + 1, n (1 - p)) <= r},     B the quantile of the beta distribution

(Clopper and Pearson 1934; as a limit for later draws, Wilks 1941; a bound at each threshold, walked down until it
passes r, needs no correction for the walk: Bates et al. 2021, 2101.02703). Not all of r' fits into few: with none
accepted the bound is 1 - (1 - c)^(1 / n), so r = .05 at c = .95 takes n = 59, r = .01 takes 299. As many classes are
asked for, since a kind of class that was never seen cannot be allowed for. Queries of one class go wrong together, so n
is not |I| but what they are worth (Kish 1965; Korn and Graubard 1998): with G classes of impostors, a_q whether q is
among the best r of them, p the mean of a, and e_u the sum of a_q - p over class u,

    V = G / (G - 1) sum_u e_u^2 / |I|^2       n = p (1 - p) / V (t_|I|-1 / t_G-1)^2  <= |I|

with t the quantiles at (1 + c) / 2 of Student's distribution, of so many degrees of freedom. The classes that are
enrolled are taken as given, and that two alike ones are taken for each other both ways is not in the bound: on real
classes r is exceeded in .03 to .10 of draws at c = .95, not in .05 at most (docs/logos.md).

    temperature   argmin_T  - sum_q log softmax(z_q / T)_{y_q}                        (Guo et al. 2017, 1706.04599)

Intervals are not made here: `evaluation.verification` resamples classes, with `weights`.

Letters: Q queries (or pairs), T distinct scores, C classes, G classes of impostors, R sets of weights, N references of
a gallery.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from vicinal.heads.support import as_numpy
from vicinal.types import Estimate, InputError, Metrics

__all__ = ["Curve", "OpenSetThreshold", "TemperatureScaling", "curve"]

RANKS = 300  # of impostors' scores that are kept, dense at the top
GALLERIES = (10, 100, 1000)  # for which a threshold is recommended: one fitted with 20 fails with 500
_B = TypeVar("_B", bound="_Bound")  # beartype cannot check Self


@dataclass(frozen=True, slots=True)
class Curve:
    """What is accepted at each threshold. The leading axis R is there if weights "R Q" were given.

    Args:
        thresholds: "T", the distinct scores, descending.
        right: "R T" or "T", right ones accepted: TP.
        wrong: the same, wrong ones accepted: FP.
        impostors: the same, impostors accepted.
        enrolled: "R" or "", P.
        strangers: "R" or "", how many impostors there are.
    """

    thresholds: Float[np.ndarray, "T"]
    right: Float[np.ndarray, "*R T"]
    wrong: Float[np.ndarray, "*R T"]
    impostors: Float[np.ndarray, "*R T"]
    enrolled: Float[np.ndarray, "*R"]
    strangers: Float[np.ndarray, "*R"]

    @property
    def precision(self) -> Float[np.ndarray, "*R T"]:
        """TP / (TP + FP); NaN where nothing is accepted."""
        return _share(self.right, self.right + self.wrong)

    @property
    def recall(self) -> Float[np.ndarray, "*R T"]:
        """TP / P; NaN where nothing was enrolled."""
        return _share(self.right, self.enrolled[..., None])

    @property
    def f1(self) -> Float[np.ndarray, "*R T"]:
        """2 TP / (TP + FP + P)."""
        return _share(2 * self.right, self.right + self.wrong + self.enrolled[..., None])

    @property
    def false_accept(self) -> Float[np.ndarray, "*R T"]:
        """FAR: impostors accepted / impostors; NaN where there are none."""
        return _share(self.impostors, self.strangers[..., None])

    def best_f1(self) -> Float[np.ndarray, "*R"]:
        """The threshold of the best F1: the largest of equals, midway to the next lower score."""
        place = np.nan_to_num(self.f1, nan=-1.0).argmax(-1)
        return np.asarray(_midway(self.thresholds)[place])

    def at_rate(self, rate: float) -> Float[np.ndarray, "*R"]:
        """The smallest score that as threshold keeps FAR <= `rate`; above all if none does; NaN without impostors."""
        allowed = rate * self.strangers + 1e-9 * np.maximum(self.strangers, 1.0)  # 0.29 x 100 is not quite 29
        place = (self.impostors <= allowed[..., None]).sum(-1)
        steps = np.concatenate([_above(self.thresholds[:1]), self.thresholds])
        return np.where(self.strangers > 0, steps[place], np.nan)

    def equal_error(self) -> Float[np.ndarray, "*R"]:
        """EER; NaN without impostors, or without anything enrolled."""
        far = np.concatenate([np.zeros((*self.enrolled.shape, 1)), self.false_accept], axis=-1)
        gap = np.concatenate([np.ones((*self.enrolled.shape, 1)), 1 - self.recall], axis=-1) - far
        after = np.minimum((gap > 0).sum(-1), gap.shape[-1] - 1)[..., None]
        before = np.maximum(after - 1, 0)
        high, low = np.take_along_axis(gap, before, -1), np.take_along_axis(gap, after, -1)
        ends = np.take_along_axis(far, before, -1), np.take_along_axis(far, after, -1)
        step = _share(high, high - low)
        return np.asarray((ends[0] + step * (ends[1] - ends[0]))[..., 0])

    def true_accept(self, rate: float) -> Float[np.ndarray, "*R"]:
        """TAR @ FAR: the largest recall with FAR <= `rate`; NaN, not measurable, with fewer than 1 / rate impostors."""
        allowed = rate * self.strangers + 1e-9 * np.maximum(self.strangers, 1.0)
        fits = self.impostors <= allowed[..., None]
        best = np.where(fits, self.recall, 0.0).max(-1, initial=0.0)
        return np.where(allowed >= 1, best, np.nan)


def curve(
    scores: ArrayLike,
    right: ArrayLike,
    *,
    enrolled: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> Curve:
    """Count what each threshold accepts, for all thresholds at once. O(Q log Q), and O(R Q) for the weights.

    Args:
        scores: "Q"; -inf is never accepted.
        right: "Q", whether the answer (or the pair) is right.
        enrolled: "Q", whether a right answer existed. None: where `right`, as it is with pairs.
        weights: "Q" or "R Q", how often each counts.

    Raises:
        InputError: rows that do not match, a score that is NaN or +inf, no finite score, a right answer where none
            existed.

    >>> found = curve([0.9, 0.8, 0.3], [True, False, True])
    >>> found.f1.round(2).tolist(), round(float(found.best_f1()), 2)
    ([0.67, 0.5, 0.8], 0.3)
    """
    score, good, there = _checked(scores, right, enrolled)
    weight = np.ones(len(score)) if weights is None else np.asarray(as_numpy(weights), dtype=np.float64)
    if weight.shape[-1:] != score.shape:
        raise InputError(f"weights: {weight.shape[-1:]} of them for {len(score)} scores; give one a score")
    impostor = ~good if there is None else ~there
    rows = np.flatnonzero(np.isfinite(score))
    order = rows[np.argsort(-score[rows], kind="stable")]
    descending = score[order]
    ends = np.flatnonzero(np.append(np.diff(descending) != 0, True))

    def accepted(chosen: Bool[np.ndarray, "Q"]) -> Float[np.ndarray, "*R T"]:
        return np.asarray((weight[..., order] * chosen[order]).cumsum(-1)[..., ends])

    def total(chosen: Bool[np.ndarray, "Q"]) -> Float[np.ndarray, "*R"]:
        return np.asarray(weight[..., chosen].sum(-1))

    return Curve(
        descending[ends],
        accepted(good),
        accepted(~good),
        accepted(impostor),
        total(good if there is None else there),
        total(impostor),
    )


class _Bound(BaseEstimator):  # type: ignore[misc]    # scikit-learn has no types
    """What is fitted on the scores of one model under one setting, and refused for any other."""

    kind: ClassVar[str]
    fingerprint_: str
    settings_: dict[str, Any]

    def _bind(self, fingerprint: str, settings: Mapping[str, Any] | None) -> None:
        self.fingerprint_, self.settings_ = fingerprint, json.loads(json.dumps(dict(settings or {})))

    def check(self, *, fingerprint: str, settings: Mapping[str, Any] | None = None) -> None:
        """Refuse another model, or other settings of the matcher, than those of the scores it was fitted on.

        Args:
            fingerprint: of the model, `Encoder.fingerprint()`.
            settings: of the matcher, `Matcher.settings`.

        Raises:
            InputError: one of them differs; the message names which.
        """
        check_is_fitted(self)
        if fingerprint != self.fingerprint_:
            raise InputError(
                f"the {self.kind} was fitted on scores of the model {self.fingerprint_[:12]}…, and this is "
                f"{fingerprint[:12]}…: fit it anew with `vicinal calibrate`"
            )
        given = json.loads(json.dumps(dict(settings or {})))
        for name in sorted(given.keys() | self.settings_.keys()):
            if given.get(name) != self.settings_.get(name):
                raise InputError(
                    f"the {self.kind} was fitted with {name}={self.settings_.get(name)!r}, and here it is "
                    f"{given.get(name)!r}: fit it anew with `vicinal calibrate`, or set it back"
                )

    def _write(self, path: str | Path, values: Mapping[str, Any]) -> Path:
        path = Path(path)
        notes = {
            "schema": 1,
            "kind": self.kind,
            "model_hash": self.fingerprint_,
            "settings": self.settings_,
            **values,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_text(json.dumps(notes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
        return path

    @classmethod
    def _read(cls: type[_B], path: str | Path) -> dict[str, Any]:
        try:
            notes = json.loads(Path(path).read_text(encoding="utf-8"))
            if notes["kind"] != cls.kind:
                raise InputError(f"{path} holds {_a(notes['kind'])}, not {_a(cls.kind)}; name another file")
            return dict(notes)
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is not a file of {_a(cls.kind)} ({error!r}); write one with save") from error


class OpenSetThreshold(_Bound):
    """The score from which on an answer counts; below it, *unknown*. Best F1, or a stated rate of false accepts.

    To be fitted on classes that were neither trained on nor will be reported on. Without `rate`: the best F1, of equal
    ones the largest threshold, placed midway to the next lower score. With it: the smallest score at which the upper
    confidence bound of FAR is within the rate, so the largest recall that can be had with that confidence. It speaks of
    impostors of other classes, drawn as those at hand were, against as many classes: see the module's text.

    After `fit`: `threshold_`, `f1_`, `precision_`, `recall_`, `false_accept_` at it, `eer_`, `counts_` (right, wrong,
    impostors), `about_` (see `save`), and what `stranger_share` looks up. With a rate: `allowed_`, r', and
    `independent_`, n. For scores of pairs `by_gallery_`: N -> the threshold for a gallery of N, or None where it cannot
    be stated.

    Args:
        rate: r, the share of impostors that may be accepted, above 0 and below 1. None: the best F1.
        gallery: N, for scores of pairs: r is then per query, against N references. None: r is per score.
        confidence: c, with which the rate holds, from 0.5 on and below 1. None: the rate is that of the impostors at
            hand, and as often passed by others as not.

    >>> rule = OpenSetThreshold().fit([0.9, 0.8, 0.3, 0.2], [True, True, False, False], fingerprint="abc")
    >>> round(rule.threshold_, 2), rule.predict([0.5, 0.6]).tolist()
    (0.55, [False, True])
    >>> scores, right = np.arange(100) / 100, np.arange(100) >= 50    # fifty impostors, from .00 to .49
    >>> rules = [OpenSetThreshold(rate=0.1, confidence=c) for c in (None, 0.95)]
    >>> [round(rule.fit(scores, right, fingerprint="abc").threshold_, 2) for rule in rules]
    [0.45, 0.49]
    """

    kind: ClassVar[str] = "open-set threshold"

    def __init__(
        self, *, rate: float | None = None, gallery: int | None = None, confidence: float | None = 0.95
    ) -> None:
        self.rate = rate
        self.gallery = gallery
        self.confidence = confidence

    def fit(
        self,
        scores: ArrayLike,
        right: ArrayLike,
        *,
        fingerprint: str,
        enrolled: ArrayLike | None = None,
        units: ArrayLike | None = None,
        settings: Mapping[str, Any] | None = None,
        gallery_size: int | None = None,
    ) -> OpenSetThreshold:
        """Find the threshold.

        Args:
            scores: "Q", of pairs or of the best class of each query. `Matcher.trials` gives all three.
            right: "Q", whether the pair is of one class, or the best class the right one.
            fingerprint: of the model that the scores come from.
            enrolled: "Q", whether the query's class was among those to choose from: FAR is then that of the others.
            units: "Q", the query's class, whose scores go wrong together. None: each score stands alone.
            settings: of the matcher that the scores come from.
            gallery_size: how many classes there were to choose from, kept to warn by.

        Raises:
            InputError: rows that do not match, a score that is NaN, none right, a rate or confidence that is none, a
                rate that so few impostors cannot show with that confidence (it says which they can, and how many would
                do), a gallery for scores that have met one.
        """
        if self.rate is not None and not 0 < self.rate < 1:
            raise InputError(f"rate={self.rate} is not a share of false accepts; give one above 0 and below 1")
        if self.gallery is not None and (self.rate is None or self.gallery < 1):
            raise InputError("gallery needs a rate to keep and at least one reference; leave it away for the best F1")
        if self.confidence is not None and not 0.5 <= self.confidence < 1:
            raise InputError(
                f"confidence={self.confidence} is none to keep a rate with; give one from 0.5 on and below 1, or None"
            )
        if self.gallery is not None and enrolled is not None:
            raise InputError("gallery is for scores of pairs; these have met their gallery already: leave it away")
        found = curve(scores, right, enrolled=enrolled)
        if found.right[-1] == 0:
            raise InputError("no right answer has a score, so no threshold can be fitted; check labels and references")
        strangers = _Strangers.of(scores, right, enrolled, units, self.confidence)
        self.by_gallery_: dict[int, float | None] = {}
        self.allowed_, self.independent_ = math.nan, math.nan
        if self.rate is None:
            self.threshold_ = float(found.best_f1())
        else:
            self.independent_, allowed = strangers.allowed(self.pair_rate)
            if allowed is None or strangers.classes < self.classes_needed:
                raise InputError(self._not_stated(strangers))
            self.allowed_ = allowed
            self.threshold_ = float(found.at_rate(allowed))
            if enrolled is None:
                shares = {n: strangers.allowed(_per_pair(self.rate, n))[1] for n in GALLERIES}
                self.by_gallery_ = {
                    n: None if share is None else float(found.at_rate(share)) for n, share in shares.items()
                }
        best_first = -np.sort(-strangers.scores)
        self.strangers_ = len(best_first)
        self.ranks_ = np.unique(np.geomspace(1, max(len(best_first), 1), RANKS).round().astype(int))[: len(best_first)]
        self.ranked_ = best_first[self.ranks_ - 1]
        good, impostors = _checked(scores, right, enrolled)[1], found.strangers
        self.counts_ = {"right": int(good.sum()), "wrong": int((~good).sum()), "impostors": int(impostors)}
        accepted = int((found.thresholds >= self.threshold_).sum()) - 1
        self.f1_, self.precision_, self.recall_, self.false_accept_ = (
            float(values[accepted]) if accepted >= 0 else empty
            for values, empty in (
                (found.f1, 0.0),
                (found.precision, math.nan),
                (found.recall, 0.0),
                (found.false_accept, 0.0),
            )
        )
        self.eer_ = float(found.equal_error())
        self.gallery_size_ = gallery_size
        self.metrics_: dict[str, Estimate] = {}
        self.about_: dict[str, Any] = {}
        self._bind(fingerprint, settings)
        return self

    @property
    def pair_rate(self) -> float:
        """The rate that one score may have: 1 - (1 - r)^(1 / N).

        Raises:
            ValueError: there is no rate; the best F1 was asked for.
        """
        if self.rate is None:
            raise ValueError("a threshold of the best F1 keeps no stated rate")
        return _per_pair(self.rate, self.gallery or 1)

    @property
    def classes_needed(self) -> int:
        """How many classes of impostors the rate takes at least: log(1 - c) / log(1 - r); 1 without a rate."""
        if self.rate is None or self.confidence is None:
            return 1
        return math.ceil(_independent_for(self.rate, self.confidence) - 1e-9)

    @property
    def aim(self) -> str:
        """What it was fitted for, in words."""
        if self.rate is None:
            return "best F1"
        among = self.gallery or getattr(self, "gallery_size_", None)  # not there before fit
        words = f"at most {self.rate:g} of unknown queries accepted" + (f" among {among:,} classes" if among else "")
        return words if self.confidence is None else f"{words}, with confidence {self.confidence:g}"

    def _not_stated(self, strangers: _Strangers) -> str:
        """Why a rate cannot be stated, which can, and what it takes."""
        count, classes = len(strangers.scores), strangers.classes
        if self.confidence is None or count == 0:
            rate = self.pair_rate
            return (
                f"a false-accept rate of {rate:.3g} a score is not measurable on {count:,} impostors: give at least "
                f"{math.ceil(1 / rate - 1e-9):,}, or state a higher rate"
            )
        few = classes < self.classes_needed
        needed = self.classes_needed if few else math.ceil(_independent_for(self.pair_rate, self.confidence) - 1e-9)
        n = classes if few else self.independent_
        lowest = 1 - (1 - self.confidence) ** ((1 if few else self.gallery or 1) / max(n, 1))
        lowest = math.ceil(lowest * 1000) / 1000
        growth = 1.0 if self.gallery is None else 0.5  # pairs grow as the square of the classes
        bring = needed if few else math.ceil(classes * (needed / n) ** growth)
        among = "" if self.gallery is None else f" among {self.gallery:,}"
        return (
            f"a false-accept rate of {self.rate:g}{among} cannot be stated "
            f"with confidence {self.confidence:g}: the {count:,} impostors are of {classes:,} classes, "
            + ("" if few else f"and worth {n:,.0f} independent ones, ")
            + f"and it takes {needed:,} even if none is accepted. Bring some "
            f"{bring:,} such classes"
            + (f", state a rate of {lowest:g}" if lowest < 1 else "")
            + ", or be content with a lower confidence"
        )

    def predict(self, scores: ArrayLike) -> Bool[np.ndarray, "Q"]:
        """Whether each score is accepted: s >= threshold_.

        Args:
            scores: "Q".
        """
        check_is_fitted(self)
        return np.asarray(as_numpy(scores) >= self.threshold_)

    def stranger_share(self, scores: ArrayLike) -> Float[np.ndarray, "Q"]:
        """How unusual a score is for what is unknown: the share of impostors that score as high, a score among them.

        (1 + |I, s_i >= s|) / (1 + |I|), the conformal p-value (Vovk et al. 2005): of unknown queries of classes like
        those it was fitted on, about a share p gets p or less, whatever the score's own scale. Of pairs,
        1 - (1 - p)^N, with N of `gallery`. Near 0 is sure. Where more than some thirty are as high, it is rounded up by
        some 6 % at most. NaN where nothing was unknown, or the file is of before this was kept.

        Args:
            scores: "Q".

        >>> rule = OpenSetThreshold().fit([0.9, 0.3, 0.2, 0.1], [True, False, False, False], fingerprint="abc")
        >>> rule.stranger_share([0.9, 0.25, 0.0]).tolist()
        [0.25, 0.5, 1.0]
        """
        check_is_fitted(self)
        if not self.strangers_:
            return np.full(np.shape(as_numpy(scores)), np.nan)
        above = np.searchsorted(-self.ranked_, -np.asarray(as_numpy(scores), dtype=np.float64), side="right")
        share = np.append(self.ranks_, self.strangers_ + 1)[above] / (self.strangers_ + 1)
        return np.asarray(share if self.gallery is None else 1 - (1 - share) ** self.gallery)

    def save(self, path: str | Path, *, metrics: Metrics | None = None, about: Mapping[str, Any] | None = None) -> Path:
        """Write a JSON file: threshold, model, settings and what was measured. It appears whole or not at all.

        Args:
            path: the file, by custom `threshold.json` beside the model.
            metrics: estimates with intervals, from `evaluation.verification.calibrate`.
            about: whatever else is to be known of the fit, such as how many references a class had.
        """
        check_is_fitted(self)
        names = ("threshold_", "f1_", "precision_", "recall_", "false_accept_", "eer_")
        measured = {**self.metrics_, **(metrics or {})}
        values = {
            "rate": self.rate,
            "confidence": None if self.rate is None else self.confidence,
            "allowed": _number(self.allowed_),
            "independent": _number(self.independent_),
            "gallery": self.gallery,
            "gallery_size": self.gallery_size_,
            **{name[:-1]: _number(getattr(self, name)) for name in names},
            "by_gallery": self.by_gallery_,
            "counts": self.counts_,
            "strangers": {
                "count": self.strangers_,
                "ranks": self.ranks_.tolist(),
                "scores": [_number(float(v)) for v in self.ranked_],
            },
            "metrics": {n: {k: _number(v) for k, v in asdict(e).items()} for n, e in measured.items()},
            "about": {**self.about_, **(about or {})},
        }
        return self._write(path, values)

    @classmethod
    def load(
        cls, path: str | Path, *, fingerprint: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> OpenSetThreshold:
        """Read what `save` wrote, and refuse it for another model or other settings.

        Args:
            path: the file.
            fingerprint: of the model it is to serve; None leaves the check to `check`, or to `Matcher.decide_by`.
            settings: of the matcher it is to serve.

        Raises:
            InputError: the file is missing or holds something else; it was fitted for another model or matcher.
        """
        notes = cls._read(path)
        try:
            # Files of before there was a confidence have none: their rate was that of the impostors at hand.
            rule = cls(rate=notes["rate"], gallery=notes["gallery"], confidence=notes.get("confidence"))
            allowed = notes.get("allowed", None if rule.rate is None else rule.pair_rate)
            rule.allowed_ = math.nan if allowed is None else float(allowed)
            rule.independent_ = math.nan if notes.get("independent") is None else float(notes["independent"])
            for name in ("f1", "precision", "recall", "false_accept", "eer"):
                setattr(rule, f"{name}_", math.nan if notes[name] is None else float(notes[name]))
            rule.threshold_ = float(notes["threshold"])
            known = notes.get("strangers") or {"count": 0, "ranks": [], "scores": []}  # older files have none
            rule.strangers_, rule.ranks_ = int(known["count"]), np.array(known["ranks"], dtype=int)
            rule.ranked_ = np.array([-np.inf if v is None else float(v) for v in known["scores"]])
            rule.gallery_size_, rule.counts_ = notes["gallery_size"], notes["counts"]
            rule.by_gallery_ = {int(n): t for n, t in notes["by_gallery"].items()}
            rule.metrics_ = {name: _estimate(values) for name, values in notes["metrics"].items()}
            rule.about_ = dict(notes.get("about") or {})
            rule._bind(notes["model_hash"], notes["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not whole ({error}); write it anew with `vicinal calibrate`") from error
        if fingerprint is not None:
            rule.check(fingerprint=fingerprint, settings=settings)
        return rule


@dataclass(frozen=True, slots=True)
class _Strangers:
    """The impostors of a fit: how large a share of them may be accepted for a rate to hold.

    Args:
        scores: "I", of the impostors alone.
        unit: "I", the class of each, from 0 to G - 1.
        confidence: c. None: of these alone.
    """

    scores: Float[np.ndarray, "I"]
    unit: Int[np.ndarray, "I"]
    confidence: float | None

    @classmethod
    def of(
        cls,
        scores: ArrayLike,
        right: ArrayLike,
        enrolled: ArrayLike | None,
        units: ArrayLike | None,
        confidence: float | None,
    ) -> _Strangers:
        score, good, there = _checked(scores, right, enrolled)
        unit = np.arange(len(score)) if units is None else np.asarray(as_numpy(units))
        if unit.shape != score.shape:
            raise InputError(f"units: {unit.shape} classes for {len(score)} scores; give one a score")
        chosen = ~good if there is None else ~there
        return cls(score[chosen], np.unique(unit[chosen], return_inverse=True)[1], confidence)

    @property
    def classes(self) -> int:
        """G."""
        return int(self.unit.max(initial=-1)) + 1

    def allowed(self, rate: float) -> tuple[float, float | None]:
        """n, and r'; None where not even none accepted would show the rate."""
        from scipy.optimize import brentq
        from scipy.stats import beta

        count = len(self.scores)
        if self.confidence is None or count == 0:
            return float(count), rate if count * rate >= 1 - 1e-9 else None
        n = self._independent(rate, self.confidence)
        if n < _independent_for(rate, self.confidence) - 1e-9:
            return n, None

        def beyond(share: float) -> float:
            return float(beta.ppf(self.confidence, n * share + 1, n * (1 - share))) - rate

        return n, 0.0 if beyond(0.0) >= 0 else float(brentq(beyond, 0.0, rate, xtol=1e-12))

    def _independent(self, rate: float, confidence: float) -> float:
        """n: the design effect is that of the best `rate` of them, tails of fewer being too few to tell it by."""
        from scipy.stats import t

        count, classes = len(self.scores), self.classes
        if classes < 2 or classes == count:
            return float(classes)
        best = max(1, math.ceil(rate * count - 1e-9))
        limit = np.partition(self.scores, count - best)[count - best]
        accepted = (self.scores >= limit) & np.isfinite(self.scores)
        share = accepted.mean()
        together = np.bincount(self.unit, accepted - share)
        variance = classes / (classes - 1) * float(together @ together) / count**2
        if variance == 0:
            return float(classes)
        level = (1 + confidence) / 2
        few = float(t.ppf(level, count - 1) / t.ppf(level, classes - 1)) ** 2  # the variance is an estimate, too
        return float(min(count, share * (1 - share) / variance * few))


class TemperatureScaling(_Bound):
    """One number that makes a softmax honest: T of softmax(z / T), by maximum likelihood. Guo et al. 2017, 1706.04599.

    It changes no answer. The likelihood is concave in 1 / T, so the optimum is one root, found to 1e-9. T stays within
    0.001 to 1,000: where every answer is right the likelihood grows as T falls, where logits say nothing as T grows.

    After `fit`: `temperature_`, `nll_` (mean, at T).

    >>> scaling = TemperatureScaling().fit([[4.0, 0.0], [4.0, 0.0], [4.0, 0.0]], [0, 0, 1], fingerprint="abc")
    >>> scaling.predict_proba([[4.0, 0.0]]).round(3).tolist()
    [[0.667, 0.333]]
    """

    kind: ClassVar[str] = "temperature"

    def fit(
        self, logits: ArrayLike, y: ArrayLike, *, fingerprint: str, settings: Mapping[str, Any] | None = None
    ) -> TemperatureScaling:
        """Find the temperature.

        Args:
            logits: "Q C", of samples that nothing was trained on.
            y: "Q", which column is right.
            fingerprint: of the model that the logits come from.
            settings: of the head or matcher that the logits come from.

        Raises:
            InputError: no samples, fewer than two classes, a label that is no column, a logit that is not finite.
        """
        from scipy.optimize import brentq

        z, labels = np.asarray(as_numpy(logits), dtype=np.float64), np.asarray(as_numpy(y))
        if z.ndim != 2 or len(z) == 0 or z.shape[1] < 2 or labels.shape != z.shape[:1]:
            raise InputError(f"a temperature needs logits 'Q C' of two classes or more and Q labels; not {z.shape}")
        if not np.isfinite(z).all():
            raise InputError("a logit is not finite: the training diverged, or an image is broken")
        if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= z.shape[1]:
            raise InputError(f"labels must be columns of the logits, 0 to {z.shape[1] - 1}")
        z = z - z.max(1, keepdims=True)
        true = z[np.arange(len(z)), labels]

        def slope(log_beta: float) -> float:
            """The derivative of the negative log-likelihood by 1 / T; it never falls."""
            p = np.exp(np.exp(log_beta) * z)
            return float(((p * z).sum(1) / p.sum(1) - true).mean())

        low, high = math.log(1e-3), math.log(1e3)
        if slope(low) >= 0:
            root = low
        elif slope(high) <= 0:
            root = high
        else:
            root = brentq(slope, low, high, xtol=1e-12, rtol=1e-10)
        self.temperature_ = math.exp(-root)
        scaled = z / self.temperature_
        self.nll_ = float((np.log(np.exp(scaled).sum(1)) - true / self.temperature_).mean())
        self._bind(fingerprint, settings)
        return self

    def predict_proba(self, logits: ArrayLike) -> Float[np.ndarray, "Q C"]:
        """softmax(logits / temperature_).

        Args:
            logits: "Q C".
        """
        check_is_fitted(self)
        scaled = np.asarray(as_numpy(logits), dtype=np.float64) / self.temperature_
        p = np.exp(scaled - scaled.max(1, keepdims=True))
        return np.asarray(p / p.sum(1, keepdims=True))

    def save(self, path: str | Path) -> Path:
        """Write a JSON file; it appears whole or not at all.

        Args:
            path: the file.
        """
        check_is_fitted(self)
        return self._write(path, {"temperature": self.temperature_, "nll": self.nll_})

    @classmethod
    def load(
        cls, path: str | Path, *, fingerprint: str | None = None, settings: Mapping[str, Any] | None = None
    ) -> TemperatureScaling:
        """Read what `save` wrote, and refuse it for another model or other settings.

        Args:
            path: the file.
            fingerprint: of the model it is to serve; None leaves the check to `check`.
            settings: of the head or matcher it is to serve.

        Raises:
            InputError: the file is missing or holds something else; it was fitted for another model or other settings.
        """
        notes = cls._read(path)
        try:
            scaling = cls()
            scaling.temperature_, scaling.nll_ = float(notes["temperature"]), float(notes["nll"])
            scaling._bind(notes["model_hash"], notes["settings"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} is not whole ({error}); fit it anew") from error
        if fingerprint is not None:
            scaling.check(fingerprint=fingerprint, settings=settings)
        return scaling


def _checked(
    scores: ArrayLike, right: ArrayLike, enrolled: ArrayLike | None
) -> tuple[Float[np.ndarray, "Q"], Bool[np.ndarray, "Q"], Bool[np.ndarray, "Q"] | None]:
    score = np.asarray(as_numpy(scores), dtype=np.float64)
    good = np.asarray(as_numpy(right)).astype(bool)
    there = None if enrolled is None else np.asarray(as_numpy(enrolled)).astype(bool)
    if score.ndim != 1 or good.shape != score.shape or (there is not None and there.shape != score.shape):
        raise InputError("scores, right and enrolled must be three rows of the same length")
    if np.isnan(score).any() or (score == np.inf).any():
        raise InputError("a score is NaN or infinite: some embedding is not finite; embed anew")
    if not np.isfinite(score).any():
        raise InputError("there is no score to fit a threshold on; give some, of right and of wrong answers")
    if there is not None and (good & ~there).any():
        raise InputError("an answer is said to be right whose class is said not to be enrolled; check both")
    return score, good, there


def _share(part: Float[np.ndarray, "..."], whole: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    part, whole = np.broadcast_arrays(part, whole)
    return np.asarray(np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0))


def _midway(thresholds: Float[np.ndarray, "T"]) -> Float[np.ndarray, "T"]:
    """Each halfway to the next lower, as a float32 (which scores are compared in); the last stays where it is."""
    below = np.append(thresholds[1:], thresholds[-1:])
    middle = ((thresholds + below) / 2).astype(np.float32).astype(np.float64)
    return np.where((middle > below) & (middle <= thresholds), middle, thresholds)


def _above(threshold: Float[np.ndarray, "1"]) -> Float[np.ndarray, "1"]:
    """The next float32 above, so that float32 scores too are below it."""
    higher = np.nextafter(threshold.astype(np.float32), np.float32(np.inf))
    return np.asarray(higher.astype(np.float64))


def _independent_for(rate: float, confidence: float) -> float:
    """Of how many independent impostors none must be accepted, so that the bound is the rate."""
    return math.log1p(-confidence) / math.log1p(-rate)


def _per_pair(rate: float, gallery: int) -> float:
    """1 - (1 - rate)^(1 / N), without the loss of digits."""
    return -math.expm1(math.log1p(-rate) / gallery)


def _a(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def _number(value: float | int | None) -> float | int | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no NaN


def _estimate(values: Mapping[str, Any]) -> Estimate:
    value, low, high = (math.nan if values[name] is None else float(values[name]) for name in ("value", "low", "high"))
    return Estimate(value, low, high, n=values["n"], queries=values["queries"])
