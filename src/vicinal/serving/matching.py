"""Which class is it, or none: several references a class, fused into one score, a margin and a threshold.

Let s_1 >= s_2 >= ... >= s_n be the cosines of a query with the n references of class c, in descending order.

    max         f_c = s_1
    mean        f_c = (s_1 + ... + s_n) / n
    topk        f_c = (s_1 + ... + s_m) / m,     m = min(k, n)
    multi-ref   topk, and at least v references reach t_v: passes at t if topk >= t and s_v >= t_v. Where t_v is not
                stated it is t, and f_c = min(topk, s_v) >= t says the same

    z-norm      (f_c - mu_c) / sigma_c,    over the background's scores with class c
    t-norm      (f_c - mu_q) / sigma_q,    over the query's scores with the other classes
    s-norm      the mean of both.          Adaptive: mu and sigma over the N largest of those scores alone

    known       f_b >= t_b  and  f_b - f_second >= margin,     b = argmax_c f_c, the first of equal ones

The largest of n cosines grows with n, so a threshold holds for the fusion that it was fitted with, and `max` for about
as many references a class. All is done for blocks of queries and for all classes of one size n at once.

Letters: Q queries, q queries of one block, R references, C classes that have references, n references of one class, m
references shown, D numbers an embedding, B background vectors.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from vicinal.heads.calibration import OpenSetThreshold
from vicinal.types import Embeddings, InputError

__all__ = ["Fusion", "Matcher", "Matches", "Normalisation", "Trials"]

Fusion = Literal["max", "mean", "topk", "multi-ref"]
Normalisation = Literal["z", "t", "s"]
CELLS = 2**24  # similarities at once: 64 MB
SMALLEST = 1e-6  # sigma of scores that are all but equal
SCHEMA = "vicinal matcher 1"


@dataclass(frozen=True, slots=True)
class Matches:
    """What a matcher answers, a row a query.

    Args:
        labels: "Q", the best class, also where it is not good enough; -1 where no class had the votes.
        scores: "Q", its score; -inf where no class had the votes.
        seconds: "Q", the second class, -1 where there is none.
        margins: "Q", how far the second class is behind; infinite where there is none.
        known: "Q", whether the best class is the answer; else it is unknown.
        decisive: "Q", whether margin and votes would allow it, whatever the threshold.
        references: "Q m", the rows of the references that decided, nearest first; -1 where there are fewer. All k of
            the best class, its nearest with `max`, its k nearest with `mean`.
        similarities: "Q m", their cosines, -inf where there are fewer.
        candidates: "Q t", the t best classes, best first; -1 where fewer have the votes.
        candidate_scores: "Q t", their scores, -inf where there are fewer.
        classes: the names of the labels.
        ids: the names of the references.
    """

    labels: Int[Tensor, "Q"]
    scores: Float[Tensor, "Q"]
    seconds: Int[Tensor, "Q"]
    margins: Float[Tensor, "Q"]
    known: Bool[Tensor, "Q"]
    decisive: Bool[Tensor, "Q"]
    references: Int[Tensor, "Q m"]
    similarities: Float[Tensor, "Q m"]
    candidates: Int[Tensor, "Q t"]
    candidate_scores: Float[Tensor, "Q t"]
    classes: tuple[str, ...]
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def ratios(self) -> Float[Tensor, "Q"]:
        """(1 - s_best) / (1 - s_second) of scores that are cosines: near 0 is clear, near 1 is a toss-up."""
        return (1 - self.scores) / (1 - (self.scores - self.margins))

    def names(self) -> list[str | None]:
        """The class of each query; None: unknown."""
        pairs = zip(self.labels.tolist(), self.known.tolist(), strict=True)
        return [self.classes[label] if known else None for label, known in pairs]

    def deciding(self) -> list[tuple[str, ...]]:
        """The names of the references that decided, nearest first."""
        return [tuple(self.ids[row] for row in rows if row >= 0) for rows in self.references.tolist()]


@dataclass(frozen=True, slots=True)
class Trials:
    """What a threshold is fitted on, and measured on.

    Args:
        scores: "Q", of the best class; -inf where margin or votes refuse it at any threshold.
        right: "Q", whether the best class is the query's.
        enrolled: "Q", whether the query's class has references at all.
        units: "Q", the query's class, in the list of the queries: what is resampled.
    """

    scores: Float[Tensor, "Q"]
    right: Bool[Tensor, "Q"]
    enrolled: Bool[Tensor, "Q"]
    units: Int[Tensor, "Q"]


class Matcher:
    """Names what a vector shows by references of each class, or says that it is none of them. See the module's text.

    Args:
        references: labelled; a class of the list without any is no candidate. `Index.embeddings` gives them too.
        fingerprint: of the model that made them; another's queries are refused.
        fusion: how the cosines with the references of a class become one score.
        k: of topk and multi-ref. 3.
        min_votes: v of multi-ref. 1, with which it is topk unless `vote_threshold` is higher than the threshold.
        vote_threshold: t_v of multi-ref, a cosine. None: the threshold itself.
        margin: how far the second *class* must be behind, in units of the score. 0.02.
        threshold: t, the score from which on a class is known. None: any is. `decide_by` sets a fitted one.
        class_thresholds: class -> its own threshold, in the place of t.
        normalisation: None, "z", "t" or "s": makes scores of different classes or queries comparable.
        cohort: N of the adaptive form, 100 to 300 by custom. None: all.
        background: "B D", vectors of what is no class here (unknown things, false boxes): needed for "z" and "s".

    Raises:
        InputError: no references, a class threshold for a class without any, fewer references of a class than votes,
            normalisation without a background or with too few classes, a vector that is zero or not finite; k or
            min_votes below 1, an unknown fusion or normalisation.

    >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    >>> references = Embeddings(x, torch.tensor([0, 0, 1]), ("a1", "a2", "b1"), ("a", "b"))
    >>> matcher = Matcher(references, fingerprint="abc", fusion="max", threshold=0.9)
    >>> found = matcher.match(torch.tensor([[1.0, 0.1], [-1.0, 0.0]]), fingerprint="abc")
    >>> found.names(), found.deciding()[0]
    (['a', None], ('a1',))
    """

    def __init__(
        self,
        references: Embeddings,
        *,
        fingerprint: str,
        fusion: Fusion = "topk",
        k: int = 3,
        min_votes: int = 1,
        vote_threshold: float | None = None,
        margin: float = 0.02,
        threshold: float | None = None,
        class_thresholds: Mapping[str, float] | None = None,
        normalisation: Normalisation | None = None,
        cohort: int | None = None,
        background: Float[Tensor, "B D"] | None = None,
    ) -> None:
        self._settle(fusion, k, min_votes, vote_threshold, margin, normalisation, cohort)
        self.fingerprint, self.threshold = fingerprint, threshold
        self._arrange(references)
        self.class_thresholds = dict(class_thresholds or {})
        self._limit()
        self._background: tuple[Tensor, Tensor] | None = None
        if normalisation in ("t", "s") and min(len(self._present) - 1, cohort or len(self._present)) < 2:
            raise InputError(f"{normalisation}-norm needs two other classes at least; here are {len(self._present)}")
        if normalisation in ("z", "s"):
            if background is None or len(background) < 2 or (cohort or 2) < 2:
                raise InputError(
                    f"{normalisation}-norm needs background vectors, two at least and better hundreds: things that are "
                    "of none of the classes"
                )
            self._background = self._moments(_unit(background, "background", self.dim))
        elif background is not None:
            raise InputError("background vectors are used by the normalisations z and s alone; name one, or leave them")

    # ---- what it is

    @property
    def dim(self) -> int:
        """D."""
        return int(self._vectors.shape[1])

    @property
    def present(self) -> tuple[str, ...]:
        """The classes that have references, in the order of `classes`."""
        return tuple(self.classes[i] for i in self._present.tolist())

    @property
    def settings(self) -> dict[str, Any]:
        """What a score depends on beside the model: a threshold is refused where any of it differs."""
        names = ("fusion", "k", "min_votes", "vote_threshold", "margin", "normalisation", "cohort")
        return {name: getattr(self, name) for name in names}

    def decide_by(self, rule: OpenSetThreshold) -> Matcher:
        """The same matcher with a fitted threshold. Thresholds of single classes stay.

        Warns where unknown things will be taken for known ones more often than it was fitted for: with a stated rate
        where there are more classes than it was stated among, else where there are more than twice as many.

        Raises:
            InputError: it was fitted for another model, or other settings.
        """
        rule.check(fingerprint=self.fingerprint, settings=self.settings)
        here, there = len(self._present), rule.gallery_size_
        if there and rule.rate is not None and here > there:
            warnings.warn(
                f"the threshold keeps its rate of {rule.rate:g} among {there:,} classes, and here are {here:,}, among "
                f"which it may be {1 - (1 - rule.rate) ** (here / there):.3f}: fit it with gallery={here} (--gallery)",
                stacklevel=2,
            )
        elif there and here > 2 * there:
            warnings.warn(
                f"the threshold was fitted among {there:,} classes, and here are {here:,}: more unknown things will be "
                "accepted than there; fit it with as many",
                stacklevel=2,
            )
        return self.with_threshold(rule.threshold_)

    def with_threshold(self, threshold: float | None) -> Matcher:
        """The same matcher with another threshold t, not checked against anything. Those of single classes stay.

        Args:
            threshold: a score, or None: any is enough.
        """
        matcher = copy.copy(self)
        matcher.threshold = None if threshold is None else float(threshold)
        matcher._limit()
        return matcher

    # ---- asking it

    def match(self, queries: Float[Tensor, "Q D"], *, fingerprint: str, top: int = 2) -> Matches:
        """Name each query, or not.

        Args:
            queries: lengths do not matter.
            fingerprint: of the model that made them.
            top: t, how many of the best classes are told; no more than there are.

        Raises:
            InputError: another model, another width, a vector that is zero or not finite.
        """
        self._refuse(fingerprint)
        unit = _unit(queries, "queries", self.dim)
        width = min(int(self._size.max()), 1 if self.fusion == "max" else max(self.k, self.min_votes))
        count = len(unit)
        labels, seconds = (torch.full((count,), -1) for _ in range(2))
        scores, margins = (torch.empty(count) for _ in range(2))
        references, similarities = torch.empty(count, width, dtype=torch.long), torch.empty(count, width)
        top = min(top, len(self._present))
        candidates, candidate_scores = torch.empty(count, top, dtype=torch.long), torch.empty(count, top)
        step = max(1, CELLS // len(self._vectors))
        for start in range(0, count, step):
            part = slice(start, start + step)
            similarity = unit[part] @ self._vectors.T
            fused = self._score(similarity)
            candidate_scores[part], places = fused.topk(top, dim=1)
            candidates[part] = self._present[places].masked_fill(candidate_scores[part] == -torch.inf, -1)
            scores[part], best = fused.max(1)
            others = fused.scatter(1, best[:, None], -torch.inf).max(1)
            labels[part] = torch.where(scores[part] > -torch.inf, self._present[best], -1)
            seconds[part] = torch.where(others.values > -torch.inf, self._present[others.indices], -1)
            margins[part] = torch.where(seconds[part] >= 0, scores[part] - others.values, torch.inf)
            margins[part][labels[part] < 0] = 0.0
            references[part], similarities[part] = self._nearest(similarity, best, width)
        decisive = (labels >= 0) & (margins >= self.margin)
        known = decisive & (scores >= self._limits[labels.clamp(min=0)])
        return Matches(
            labels,
            scores,
            seconds,
            margins,
            known,
            decisive,
            references,
            similarities,
            candidates,
            candidate_scores,
            self.classes,
            self.ids,
        )

    def scores(
        self, queries: Float[Tensor, "Q D"], *, fingerprint: str
    ) -> tuple[Float[Tensor, "Q C"], Int[Tensor, "C"]]:
        """The score of each query with each class that has references, and which classes these are.

        Args:
            queries: as in `match`. The answer has Q x C numbers.
            fingerprint: of the model that made them.

        Raises:
            InputError: as in `match`.
        """
        self._refuse(fingerprint)
        unit = _unit(queries, "queries", self.dim)
        step = max(1, CELLS // len(self._vectors))
        blocks = [self._score(part @ self._vectors.T) for part in torch.split(unit, step)]
        return torch.cat(blocks) if blocks else torch.zeros(0, len(self._present)), self._present

    def trials(self, queries: Embeddings, *, fingerprint: str) -> Trials:
        """Scores with the truth beside them, for `OpenSetThreshold.fit` and `evaluation.verification`.

        Args:
            queries: labelled; classes are compared by name, and may be ones without references.
            fingerprint: of the model that made them.

        Raises:
            InputError: as in `match`; a query without a label.
        """
        if len(queries) and not queries.classes:
            raise InputError("queries: they have no labels, so no answer can be called right; give them a label column")
        found = self.match(queries.vectors, fingerprint=fingerprint)
        place = {self.classes[i]: i for i in self._present.tolist()}
        truth = torch.tensor([place.get(name, -1) for name in queries.classes] or [-1])[queries.labels]
        right = (truth >= 0) & (truth == found.labels)
        return Trials(found.scores.where(found.decisive, -torch.inf), right, truth >= 0, queries.labels)

    # ---- files

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file; it appears whole or not at all.

        Args:
            path: the file, by custom with the ending .matcher.
        """
        from safetensors.torch import save_file

        path = Path(path)
        original = self._order.argsort()
        tensors = {"vectors": self._vectors[original], "labels": self._labels[original]}
        if self._background is not None:
            tensors["background.mean"], tensors["background.deviation"] = self._background
        notes = {
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "threshold": self.threshold,
            "class_thresholds": self.class_thresholds,
            "ids": self.ids,
            "classes": self.classes,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            save_file({name: t.contiguous() for name, t in tensors.items()}, part, {"matcher": json.dumps(notes)})
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Matcher:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                notes = json.loads((file.metadata() or {})["matcher"])
                if notes["schema"] != SCHEMA:
                    raise InputError(f"{path} is of another version ({notes['schema']}): make it anew")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
            matcher = cls.__new__(cls)
            matcher._settle(**notes["settings"])
            matcher.fingerprint, matcher.threshold = notes["fingerprint"], notes["threshold"]
            names = tuple(notes["ids"]), tuple(notes["classes"])
            matcher._arrange(Embeddings(tensors["vectors"], tensors["labels"], *names))
            matcher._vectors = tensors["vectors"][matcher._order]  # to the last digit
            matcher.class_thresholds = notes["class_thresholds"]
            matcher._limit()
            matcher._background = None
            if "background.mean" in tensors:
                matcher._background = tensors["background.mean"], tensors["background.deviation"]
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path} is not a matcher ({error}); write one with save") from error
        return matcher

    # ---- inside

    def _refuse(self, fingerprint: str) -> None:
        if fingerprint != self.fingerprint:
            raise InputError(
                f"the references are of the model {self.fingerprint[:12]}…, and the queries of {fingerprint[:12]}…: "
                "embed both with one model"
            )

    def _settle(
        self,
        fusion: Fusion,
        k: int,
        min_votes: int,
        vote_threshold: float | None,
        margin: float,
        normalisation: Normalisation | None,
        cohort: int | None,
    ) -> None:
        if fusion not in get_args(Fusion) or normalisation not in (None, *get_args(Normalisation)):
            raise InputError(f"fusion is one of {get_args(Fusion)}, normalisation of {get_args(Normalisation)} or None")
        if k < 1 or min_votes < 1:
            raise InputError(f"k and min_votes must be at least 1, not {k} and {min_votes}")
        self.fusion, self.k, self.margin, self.normalisation, self.cohort = fusion, k, margin, normalisation, cohort
        self.min_votes, self.vote_threshold = min_votes, vote_threshold

    def _arrange(self, references: Embeddings) -> None:
        """References by the size of their class, then class: each size is one block of equal rows."""
        if len(references) == 0:
            raise InputError("there is not one reference: give some pictures of each class")
        self.classes, self.ids = references.classes, references.ids
        labels = references.labels.cpu()
        outside = (labels < 0) | (labels >= len(self.classes))
        if outside.any():
            name = self.ids[int(outside.nonzero()[0])]
            raise InputError(f"reference {name} is of none of the {len(self.classes)} classes; give it a label")
        size = torch.bincount(labels, minlength=len(self.classes))
        if self.fusion == "multi-ref" and ((size > 0) & (size < self.min_votes)).any():
            few = int(((size > 0) & (size < self.min_votes)).nonzero()[0])
            raise InputError(
                f"{self.classes[few]} has {int(size[few])} references and could never get {self.min_votes} votes: "
                "give more, or lower min_votes"
            )
        # By size, then class, then as given: stable sorts from the last key to the first.
        order = labels.argsort(stable=True)
        self._order = order[size[labels[order]].argsort(stable=True)]
        self._labels = labels[self._order]
        self._vectors = _unit(references.vectors, "references", references.vectors.shape[1])[self._order]
        self._present = (size > 0).nonzero().flatten()
        self._size = size[self._present]
        place = torch.full((len(self.classes),), -1)
        place[self._present] = torch.arange(len(self._present))
        first = torch.ones(len(labels), dtype=torch.bool)
        first[1:] = self._labels[1:] != self._labels[:-1]
        self._start = torch.empty_like(self._present)
        self._start[place[self._labels[first]]] = first.nonzero().flatten()
        self._blocks = []  # (references a class, first row, last row, columns): one for each size
        at = 0
        for n in sorted(set(self._size.tolist())):
            columns = (self._size == n).nonzero().flatten()
            self._blocks.append((n, at, at + n * len(columns), columns))
            at += n * len(columns)

    def _limit(self) -> None:
        self._limits = torch.full((len(self.classes),), -torch.inf if self.threshold is None else self.threshold)
        place = {self.classes[i]: i for i in self._present.tolist()}
        for name, limit in self.class_thresholds.items():
            if name not in place:
                raise InputError(f"class_thresholds: {name!r} has no reference here; name one of the classes that have")
            self._limits[place[name]] = limit

    def _score(self, similarity: Float[Tensor, "q R"]) -> Float[Tensor, "q C"]:
        fused, votes = self._fuse(similarity)
        normal = fused
        if self.normalisation in ("z", "s"):
            assert self._background is not None
            normal = (fused - self._background[0]) / self._background[1]
        if self.normalisation in ("t", "s"):
            by_query = _among_others(fused, self.cohort)
            normal = by_query if self.normalisation == "t" else (normal + by_query) / 2
        return normal if votes is None else normal.masked_fill(~votes, -torch.inf)

    def _fuse(self, similarity: Float[Tensor, "q R"]) -> tuple[Float[Tensor, "q C"], Bool[Tensor, "q C"] | None]:
        """f, and whether a class has the votes, where a threshold of their own is stated."""
        fused = similarity.new_empty(len(similarity), len(self._present))
        stated = self.fusion == "multi-ref" and self.vote_threshold is not None
        votes = torch.empty(fused.shape, dtype=torch.bool) if stated else None
        for n, start, stop, columns in self._blocks:
            block = similarity[:, start:stop].view(len(similarity), -1, n)
            deep = min(self.k, n)
            if self.fusion == "max":
                fused[:, columns] = block.amax(2)
            elif self.fusion == "mean" or (self.fusion == "topk" and deep == n):
                fused[:, columns] = block.mean(2)
            elif self.fusion == "topk":
                fused[:, columns] = block.topk(deep, dim=2, sorted=False).values.mean(2)
            else:
                best = block.topk(max(deep, self.min_votes), dim=2).values
                mean, vote = best[:, :, :deep].mean(2), best[:, :, self.min_votes - 1]
                fused[:, columns] = mean if stated else torch.minimum(mean, vote)
                if votes is not None:
                    assert self.vote_threshold is not None
                    votes[:, columns] = vote >= self.vote_threshold
        return fused, votes

    def _nearest(
        self, similarity: Float[Tensor, "q R"], best: Int[Tensor, "q"], width: int
    ) -> tuple[Int[Tensor, "q m"], Float[Tensor, "q m"]]:
        """The nearest references of each query's best class, and their cosines."""
        place = torch.arange(int(self._size.max()))
        rows = self._start[best][:, None] + place
        there = place < self._size[best][:, None]
        rows = torch.where(there, rows, 0)
        cosines = similarity.gather(1, rows).masked_fill(~there, -torch.inf)
        top = cosines.topk(width, dim=1)
        found = self._order[rows.gather(1, top.indices)]
        return found.masked_fill(top.values == -torch.inf, -1), top.values

    def _moments(self, background: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "C"], Float[Tensor, "C"]]:
        """Mean and deviation of each class's scores with the background, or of the N largest of them."""
        step = max(1, CELLS // len(self._vectors))
        total = torch.zeros(2, len(self._present), dtype=torch.float64)
        largest = torch.empty(0, len(self._present))
        for start in range(0, len(background), step):
            scores = self._fuse(background[start : start + step] @ self._vectors.T)[0]
            if self.cohort is None:
                total += torch.stack([scores.double().sum(0), scores.double().square().sum(0)])
            else:
                largest = torch.cat([largest, scores])
                largest = largest.topk(min(self.cohort, len(largest)), dim=0, sorted=False).values
        count = len(background) if self.cohort is None else len(largest)
        if self.cohort is not None:
            total = torch.stack([largest.double().sum(0), largest.double().square().sum(0)])
        mean = total[0] / count
        deviation = (total[1] / count - mean.square()).clamp(min=0).sqrt().clamp(min=SMALLEST)
        return mean.float(), deviation.float()


def _among_others(scores: Float[Tensor, "q C"], cohort: int | None) -> Float[Tensor, "q C"]:
    """(f_c - mu) / sigma over the query's scores with the other classes, or the N largest of them."""
    wide = scores.double()
    n = min(cohort or scores.shape[1], scores.shape[1] - 1)
    top = wide.topk(n + 1, dim=1).values
    left_out = torch.maximum(wide, top[:, -1:])  # the class itself where it is one of the N + 1, else the last of them
    mean = (top.sum(1, keepdim=True) - left_out) / n
    square = (top.square().sum(1, keepdim=True) - left_out.square()) / n
    deviation = (square - mean.square()).clamp(min=0).sqrt().clamp(min=SMALLEST)
    return ((wide - mean) / deviation).float()


def _unit(vectors: Float[Tensor, "N D"], name: str, dim: int) -> Float[Tensor, "N D"]:
    if vectors.shape[1] != dim:
        raise InputError(f"{name}: {vectors.shape[1]} numbers a vector, and the references have {dim}")
    vectors = vectors.detach().cpu().float()
    length = vectors.norm(dim=1)
    wrong = ~(torch.isfinite(length) & (length > 0))
    if wrong.any():
        raise InputError(f"{name}: row {int(wrong.nonzero()[0])} is zero or not finite; embed it anew")
    return functional.normalize(vectors, dim=1)
