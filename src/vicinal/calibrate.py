"""From which score on an answer counts: a threshold for one model, fitted on classes it was not trained on, and shown.

    references of some classes, queries of these and of others  ->  scores  ->  threshold, intervals, what it is worth

Half of the classes are enrolled, and queries of the others are strangers, whom nothing should match; then the halves
change places. So each class is asked about once as a known one and once as an unknown one. Beside the decisions stand
the pairs: how alike two pictures of one class are, and two of different classes, before and after tuning.

Letters: Q queries, C classes that have references, N references or classes of a gallery, r the stated rate.
"""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from sklearn.base import clone
from torch import Tensor

from vicinal.bring import bring, bring_path, open_uri, starting_model
from vicinal.data.logos import references_and_queries
from vicinal.data.manifest import Manifest
from vicinal.embedding import default_cache, embed
from vicinal.evaluation import verification
from vicinal.evaluation.scores import plain
from vicinal.evaluation.thresholds import Shown, draw
from vicinal.ground import division_of, refuse_same_pictures
from vicinal.heads.calibration import OpenSetThreshold
from vicinal.models.encoder import Encoder
from vicinal.recipe import Recipe
from vicinal.serving.matching import Matcher, Trials
from vicinal.serving.objects import THRESHOLD_NAME, open_encoder
from vicinal.types import Embeddings, InputError, Metrics

__all__ = ["Bench", "calibrate", "enrolments", "trials_of"]

ABOVE = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
DECIDED = ("precision", "recall", "f1", "fpir")
MANY = 200_000  # scores, from which on fewer resamples are drawn
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Bench:
    """What is compared: references and queries, with one list of classes.

    Args:
        references: labelled.
        queries: labelled; classes without references are unknown whoever is enrolled.
    """

    references: Manifest
    queries: Manifest

    @classmethod
    def of(cls, references: Manifest, queries: Manifest) -> Bench:
        """Both with the classes that either has.

        Raises:
            InputError: one of them is empty, or has no labels; no class of the queries has a reference.
        """
        for name, side in (("references", references), ("queries", queries)):
            if len(side) == 0 or not side.classes:
                raise InputError(f"{name}: there is not one labelled picture; give some")
        given, asked = references.compact().classes, queries.compact().classes
        if not set(given) & set(asked):
            raise InputError(
                f"none of the {len(asked)} classes asked about ({', '.join(asked[:3])}, …) has a reference; the "
                f"references are of {', '.join(given[:3])}, …: names must be equal"
            )
        classes = sorted({*given, *asked})
        return cls(references.with_classes(classes), queries.with_classes(classes))

    @classmethod
    def drawn(cls, manifest: Manifest, references: int, seed: int) -> Bench:
        """Of one manifest: see `references_and_queries`."""
        chosen, asked = references_and_queries(manifest, references=references, seed=seed)
        return cls.of(manifest.where(chosen), manifest.where(asked))

    def groups(self) -> dict[str, str]:
        """Class -> what it is a variant of: itself, without a column `group` or where one holds parts of classes."""
        found: dict[str, set[str]] = {}
        for side in (self.references, self.queries):
            labels = side.column("label")
            named = side.column("group") if "group" in side.names() else labels
            for label, group in zip(labels, named, strict=True):
                found.setdefault(label, set()).add(group or label)
        nested = all(len(groups) == 1 for groups in found.values())
        return {label: next(iter(groups)) if nested else label for label, groups in found.items()}


def enrolments(references: Embeddings, groups: Mapping[str, str], seed: int) -> list[Bool[Tensor, "R"]]:
    """The references of either half of the classes; variants of one brand stay together.

    Raises:
        InputError: fewer than four groups of classes have references.
    """
    present = torch.unique(references.labels).tolist()
    names = sorted({groups.get(references.classes[i], references.classes[i]) for i in present})
    if len(names) < 4:
        raise InputError(
            f"{len(names)} classes have references: at least four are needed, half of them to be unknown, and "
            "better fifty"
        )
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    half = {names[i] for i in order[: len(names) // 2]}
    inside = torch.tensor([groups.get(name, name) in half for name in references.classes])
    return [inside[references.labels], ~inside[references.labels]]


def trials_of(
    references: Embeddings,
    queries: Embeddings,
    groups: Mapping[str, str],
    *,
    fingerprint: str,
    settings: Mapping[str, Any],
    seed: int = 42,
) -> tuple[Trials, int]:
    """Ask a matcher of each half for every query: what it says, 2 Q of it, and how many classes were enrolled at once.

    Args:
        references: labelled, with the classes of `queries`.
        queries: labelled.
        groups: class -> what it is a variant of.
        fingerprint: of the model that made both.
        settings: of the matcher.
        seed: of the halves.

    Raises:
        InputError: as in `Matcher` and `enrolments`.
    """
    found, gallery = [], 0
    for half in enrolments(references, groups, seed):
        enrolled = references.where(half)
        gallery = max(gallery, len(torch.unique(enrolled.labels)))
        found.append(Matcher(enrolled, fingerprint=fingerprint, **settings).trials(queries, fingerprint=fingerprint))
    one, other = found
    joined = Trials(
        torch.cat([one.scores, other.scores]),
        torch.cat([one.right, other.right]),
        torch.cat([one.enrolled, other.enrolled]),
        torch.cat([one.units, other.units]),
    )
    return joined, gallery


def calibrate(
    model: str | Path,
    source: str | Path | None = None,
    *,
    queries: str | Path | None = None,
    baseline: str | Path | None = None,
    rate: float | None = None,
    confidence: float = 0.95,
    gallery: int | None = None,
    settings: Mapping[str, Any] | None = None,
    references: int = 5,
    seed: int = 42,
    size: int | None = None,
    columns: Mapping[str, str] | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    resamples: int = 2000,
    say: Say = print,
) -> Path:
    """Fit a model's threshold, write it beside the model, and show what it is worth.

    Beside the model (a folder) comes `threshold.json`; into `out` come `calibration.json` (all that is printed),
    `calibration.png` (the plots, of what was looked at where there is any) and `scores.csv` (each query's answer).

    Args:
        model: a run folder, or any model's address. It must be a folder unless `out` is given.
        source: pictures of classes that the model was not trained on. Where there is a column `split`, its `val` rows
            are fitted on and its `test` rows looked at; without, all are fitted on. A column `role` (`vicinal prepare
            --format logos`) says which are references; else they are drawn. None: what the run was trained with; its
            validation classes are fitted on, its unseen classes looked at.
        queries: other pictures, to be asked about; all of `source` are then references.
        baseline: a model to compare with, or "start": what the run began with, under its own preprocessing. A
            threshold of its own is fitted in the same way, and lies in `out` as `threshold-baseline.json`.
        rate: r, the share of unknown queries that may be accepted (FPIR). None: the best F1.
        confidence: with which the rate holds for queries of other classes, see `OpenSetThreshold`. 0.95; at 0.5 it is
            passed as often as not.
        gallery: N classes that will be enrolled; r is then fitted from scores of pairs, for so many. None: for as many
            as are enrolled here.
        settings: of the `Matcher`: fusion, k, margin, min_votes, vote_threshold.
        references: drawn for a class, at most, where none are given.
        seed: of draws and halves.
        size: input size of models that are no folder of ours.
        columns: of a table: ours -> its own.
        out: a folder. None: `calibration` beside the model.
        device: "auto", "cpu", "cuda:0", …
        resamples: of the bootstrap over classes.
        say: is told each line.

    Returns:
        The threshold's file.

    Raises:
        InputError: nothing to fit on, a picture that is reference and query, classes that the model was trained on, a
            rate that so few strangers cannot show, and what `Matcher` refuses.
    """
    path = Path(model).expanduser()
    if not path.is_dir() and out is None:
        raise InputError(f"{model} is no folder to keep a threshold in; name one by out (--out)")
    if rate is not None and not 0 < rate < 1:
        raise InputError(f"rate={rate} is not a share of unknown queries; give one above 0 and below 1")
    if gallery is not None and (rate is None or gallery < 1):
        raise InputError("gallery needs a rate to keep for so many classes; give both (--rate --gallery)")
    if not 0.5 <= confidence < 1:
        raise InputError(f"confidence={confidence} is none to keep a rate with; give one from 0.5 on and below 1")
    aim = OpenSetThreshold(rate=rate, gallery=gallery, confidence=confidence)
    folder = Path(out).expanduser() if out is not None else path / "calibration"
    settings = dict(settings or {})
    benches = _benches(path, source, queries, references, seed, columns)
    _refuse_trained(path, benches["fitted"])
    _refuse_few(aim, benches["fitted"])
    sides = {"baseline": baseline, "model": model} if baseline is not None else {"model": model}
    found = {
        name: _Side.of(name, _opened(path, str(uri), size), benches, settings, aim, seed, device, resamples, say)
        for name, uri in sides.items()
    }
    own = found["model"]
    folder.mkdir(parents=True, exist_ok=True)
    content = _content(found, benches, resamples)
    (folder / "calibration.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part = "tested" if "tested" in benches else "fitted"
    about = content[part]
    title = f"{part} on {about['classes']:,} classes, {about['enrolled_at_once']:,} enrolled at a time"
    title += f"\nthreshold for {own.rule.aim}"
    draw({name: side.shown(part) for name, side in found.items()}, folder / "calibration.png", title=title)
    own.write_scores(folder / "scores.csv")
    for line in _lines(found, content):
        say(line)
    if "baseline" in found:
        found["baseline"].rule.save(folder / "threshold-baseline.json", metrics=found["baseline"].intervals)
    kept = {"references_per_class": _largest(benches["fitted"].references), "fitted": content["fitted"]}
    if "tested" in benches:
        kept["tested"] = content["tested"] | {"decisions": content["model"]["tested"]["decisions"]}
    target = (path if path.is_dir() else folder) / THRESHOLD_NAME
    own.rule.save(target, metrics=own.intervals, about=kept)
    if (path / "model" / "vicinal.json").exists():  # of a run folder: its model is a folder of its own
        own.rule.save(path / "model" / THRESHOLD_NAME, metrics=own.intervals, about=kept)
    say(f"threshold: {target}\nplots: {folder / 'calibration.png'}")
    return target


def _opened(model: Path, uri: str, size: int | None) -> Encoder:
    if uri != "start":  # a folder may be an export, too
        return open_encoder(uri) if size is None and Path(uri).expanduser().is_dir() else open_uri(uri, size=size)
    return starting_model(model)


# ---- what is compared


def _benches(
    model: Path,
    source: str | Path | None,
    queries: str | Path | None,
    references: int,
    seed: int,
    columns: Mapping[str, str] | None,
) -> dict[str, Bench]:
    if source is None:
        if queries is not None:
            raise InputError("queries need references: name the pictures of the classes before them")
        return _of_run(model, references, seed)
    manifest = bring_path(source, columns)[1]
    if queries is not None:
        asked = bring_path(queries, columns)[1]
        bench = Bench.of(manifest, asked)
        refuse_same_pictures(manifest, asked, None)
        return {"fitted": bench}
    if "split" not in manifest.names():
        return {"fitted": Bench.drawn(manifest, references, seed)}
    split = np.array(manifest.column("split"))
    if not (split == "val").any():
        raise InputError(
            f"{source} has a column split, and no row of it says val: those are fitted on. Leave the column out "
            "(--column split=) to fit on all"
        )
    parts = {"fitted": split == "val", "tested": split == "test"}
    return {name: Bench.drawn(manifest.where(rows), references, seed) for name, rows in parts.items() if rows.any()}


def _of_run(model: Path, references: int, seed: int) -> dict[str, Bench]:
    """A run's own validation classes, and those it never saw."""
    if not (model / "recipe.yaml").is_file():
        raise InputError(f"{model} is no run folder, so name the pictures to fit on: classes it was not trained on")
    recipe = Recipe.load(model / "recipe.yaml")
    manifest = bring(recipe.data)
    division = division_of(manifest, recipe)
    kept = manifest.where(division.val)
    if not len(kept) or not division.selects_on_new_classes(manifest):
        raise InputError(
            f"{model} kept no classes back to fit on: train with split.{recipe.split.chosen[0]}.val above 0, or name "
            "pictures of classes that it was not trained on"
        )
    benches = {"fitted": Bench.drawn(kept, references, seed)}
    if "unseen" in division.parts:
        benches["tested"] = Bench.drawn(manifest.where(division.parts["unseen"].queries), references, seed)
    return benches


def _refuse_trained(model: Path, bench: Bench) -> None:
    """A threshold fitted on classes that were trained on is too hopeful."""
    results = model / "results.json"
    if not results.is_file():
        return
    trained = set(json.loads(results.read_text(encoding="utf-8")).get("data", {}).get("trained_on", []))
    both = [name for name in bench.queries.classes if name in trained]
    if both:
        raise InputError(
            f"{len(both)} of the {len(bench.queries.classes)} classes were trained on (first: {', '.join(both[:3])}), "
            "and look better than new ones will: fit on others"
        )


def _refuse_few(aim: OpenSetThreshold, bench: Bench) -> None:
    """As `fit` will say, but before anything is embedded."""
    classes = len(torch.unique(bench.queries.labels()))
    if classes < aim.classes_needed:
        assert aim.confidence is not None
        lowest = math.ceil((1 - (1 - aim.confidence) ** (1 / classes)) * 1000) / 1000
        raise InputError(
            f"a rate of {aim.rate:g} with confidence {aim.confidence:g} takes {aim.classes_needed:,} classes to fit it "
            f"on, even if none is taken for another, and here are {classes:,}: bring more (of a run: a larger "
            f"split.….val), state a rate of {lowest:g}, or be content with a lower confidence"
        )


# ---- one model


@dataclass(frozen=True, slots=True)
class _Side:
    """One model on both benches."""

    rule: OpenSetThreshold
    trials: dict[str, Trials]
    enrolled: dict[str, int]
    pairs: dict[str, verification.Similarities]
    intervals: Metrics
    decisions: dict[str, Metrics]
    by_gallery: dict[int, float | None]
    answers: list[tuple[str, str, str | None, float, float, str | None]]
    confused: list[tuple[str, str, int]]

    @classmethod
    def of(
        cls,
        who: str,
        encoder: Encoder,
        benches: Mapping[str, Bench],
        settings: Mapping[str, Any],
        aim: OpenSetThreshold,
        seed: int,
        device: str,
        resamples: int,
        say: Say,
    ) -> _Side:
        fingerprint = encoder.fingerprint()
        trials: dict[str, Trials] = {}
        pairs, enrolled, last, scores = {}, {}, None, None
        for name, bench in benches.items():
            say(f"{who}, {name}: {len(bench.queries):,} queries, {len(bench.references):,} references")
            given, asked = (
                embed(encoder, side, cache=default_cache(), device=device) for side in (bench.references, bench.queries)
            )
            of = bench.groups()
            trials[name], enrolled[name] = trials_of(
                given, asked, of, fingerprint=fingerprint, settings=settings, seed=seed
            )
            kin = _kin(asked.classes, of)
            pairs[name] = verification.similarities(asked, given, kin=kin)
            if name == "fitted":
                matcher = Matcher(given, fingerprint=fingerprint, **settings)
                scores = _pair_scores(matcher, asked, kin) if aim.rate is not None else None
            last = (given, asked)
        fitted = trials["fitted"]
        rule = clone(aim)
        by_gallery: dict[int, float | None] = {}
        if scores is not None:
            with suppress(InputError):  # too few wrong pairs for the rate itself: then for no gallery either
                of_pairs = clone(aim).set_params(gallery=1)
                by_gallery = of_pairs.fit(*scores[:2], units=scores[2], fingerprint=fingerprint).by_gallery_
        fitted_on, right, units, known = fitted.scores, fitted.right, fitted.units, fitted.enrolled
        there: Tensor | None = known
        if aim.gallery is not None:
            assert scores is not None
            fitted_on, right, units, there = *scores, None
        try:
            rule.fit(
                fitted_on,
                right,
                fingerprint=fingerprint,
                enrolled=there,
                units=units,
                settings=matcher.settings,
                gallery_size=aim.gallery or enrolled["fitted"],
            )
        except InputError as error:
            raise InputError(f"{who}: {error}") from error
        fewer = resamples if len(fitted_on) < MANY else min(resamples, 200)
        intervals = verification.calibrate(rule, fitted_on, right, units, enrolled=there, resamples=fewer)
        decisions = {
            name: verification.decisions(
                one.scores, one.right, one.units, threshold=rule.threshold_, enrolled=one.enrolled, resamples=resamples
            )
            for name, one in trials.items()
        }
        assert last is not None
        everyone = Matcher(last[0], fingerprint=fingerprint, **settings).with_threshold(rule.threshold_)
        answers, confused = _answers(everyone, last[1], fingerprint)
        return cls(rule, trials, enrolled, pairs, intervals, decisions, by_gallery, answers, confused)

    def shown(self, part: str) -> Shown:
        one = self.trials[part]
        return Shown(
            self.pairs[part], one.scores.numpy(), one.right.numpy(), one.enrolled.numpy(), self.rule.threshold_
        )

    def write_scores(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["query", "class", "best", "score", "margin", "answer"])
            rows.writerows(self.answers)


def _kin(classes: Sequence[str], groups: Mapping[str, str]) -> Int[Tensor, "C"]:
    """Of each class a number that variants of one brand share."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(groups.get(name, name), len(numbers)) for name in classes])


def _pair_scores(matcher: Matcher, queries: Embeddings, kin: Int[Tensor, "C"]) -> tuple[Tensor, Tensor, Tensor]:
    """Score, whether right, and the query's class, of every query with every class but variants of its own."""
    scores, present = matcher.scores(queries.vectors, fingerprint=matcher.fingerprint)
    right = present[None] == queries.labels[:, None]
    counts = right | (kin[present][None] != kin[queries.labels][:, None])
    units = queries.labels[:, None].expand_as(right)
    return scores[counts], right[counts], units[counts]


def _answers(
    matcher: Matcher, queries: Embeddings, fingerprint: str
) -> tuple[list[tuple[str, str, str | None, float, float, str | None]], list[tuple[str, str, int]]]:
    """Each query's answer with all classes enrolled, and which classes are taken for which."""
    found = matcher.match(queries.vectors, fingerprint=fingerprint)
    best = [found.classes[i] if i >= 0 else None for i in found.labels.tolist()]
    truth = [queries.classes[i] for i in queries.labels.tolist()]
    rows = list(
        zip(queries.ids, truth, best, found.scores.tolist(), found.margins.tolist(), found.names(), strict=True)
    )
    wrong = Counter((true, said) for true, said in zip(truth, found.names(), strict=True) if said not in (None, true))
    return rows, [(true, str(said), n) for (true, said), n in wrong.most_common(20)]


# ---- what is said


def _content(found: Mapping[str, _Side], benches: Mapping[str, Bench], resamples: int) -> dict[str, Any]:
    reference = (found.get("baseline") or found["model"]).rule.threshold_
    content: dict[str, Any] = {
        name: {
            "classes": len(torch.unique(bench.queries.labels())),
            "queries": len(bench.queries),
            "references": len(bench.references),
            "enrolled_at_once": found["model"].enrolled[name],
        }
        for name, bench in benches.items()
    }
    content["above"] = reference
    for name, side in found.items():
        content[name] = {
            "model_hash": side.rule.fingerprint_,
            "rate": side.rule.rate,
            "confidence": None if side.rule.rate is None else side.rule.confidence,
            "allowed": None if side.rule.rate is None else side.rule.allowed_,
            "independent": None if side.rule.rate is None else side.rule.independent_,
            "gallery": side.rule.gallery,
            "settings": side.rule.settings_,
            "threshold": side.rule.threshold_,
            "intervals": plain(side.intervals),
            "by_gallery": side.by_gallery,
            "confused": side.confused,
        }
        for part, pairs in side.pairs.items():
            metrics = verification.verification(pairs, thresholds=(*ABOVE, reference), resamples=resamples)
            content[name][part] = {
                "decisions": plain(side.decisions[part]),
                "pairs": plain(metrics),
                "percentiles": pairs.percentiles(),
            }
    if "baseline" in found:
        content["difference"] = {
            part: plain(_difference(found["baseline"], found["model"], part, resamples)) for part in benches
        }
    return content


def _difference(before: _Side, after: _Side, part: str, resamples: int) -> Metrics:
    one, other = before.trials[part], after.trials[part]
    return verification.decision_differences(
        (one.scores, one.right),
        (other.scores, other.right),
        one.units,
        thresholds=(before.rule.threshold_, after.rule.threshold_),
        enrolled=one.enrolled,
        resamples=resamples,
    )


def _lines(found: Mapping[str, _Side], content: Mapping[str, Any]) -> list[str]:
    names = list(found)
    reference = content["above"]

    def row(what: str, cells: list[str]) -> str:
        return f"{what:44}" + "".join(f"{cell:>26}" for cell in cells)

    def number(value: Mapping[str, Any]) -> str:
        if value["value"] is None:
            return "undefined"
        ends = "" if value["low"] is None else f" [{value['low']:.3f}, {value['high']:.3f}]"
        return f"{value['value']:.3f}{ends}"

    rule = found["model"].rule
    lines = [f"threshold for: {rule.aim}"]
    if rule.rate is not None:
        what = "pairs" if rule.gallery else "unknown queries"
        lines += [
            f"  {n}: so that others keep it, {found[n].rule.allowed_:.2%} of these {what} may pass, of "
            f"{found[n].rule.pair_rate:.2%}; the {found[n].rule.counts_['impostors']:,} are worth "
            f"{found[n].rule.independent_:,.0f} independent ones"
            for n in names
        ]
    head = [*names, "difference"] if "difference" in content else names
    lines += [row("", head), row("threshold", [number(content[n]["intervals"]["threshold"]) for n in names])]
    for part in ("fitted", "tested"):
        if part not in content:
            continue
        about = content[part]
        lines += ["", f"{part} on {about['classes']:,} classes, {about['queries']:,} queries, {about['references']:,} "
                  f"references, {about['enrolled_at_once']:,} classes enrolled at a time"]  # fmt: skip
        rows = {m: [content[n][part]["decisions"][m] for n in names] for m in DECIDED}
        change = content["difference"][part] if "difference" in content else {}
        lines += [
            row(f"  {m}", [number(v) for v in (*values, *([change[m]] if change else []))])
            for m, values in rows.items()
        ]
        lines += [
            f"  {m} is {verification.UNDEFINED[m]}"
            for m, values in rows.items()
            if any(v["value"] is None for v in values)
        ]
        of = {n: content[n][part]["pairs"] for n in names}
        for metric, what in (("right_mean", "right pairs, mean cosine"), ("wrong_mean", "wrong pairs"), ("gap", "gap"),
                             ("eer", "equal error rate of pairs")):  # fmt: skip
            lines.append(row(f"  {what}", [number(of[n][metric]) for n in names]))
        for t in (*ABOVE, reference):
            values = [of[n][f"wrong_above@{t:g}"] for n in names]
            what = f"at {t:g} or above" if t != reference else f"at the first threshold, {t:.3f}"
            if t == reference or any((v["high"] or v["value"] or 0.0) >= 0.0005 for v in values):
                lines.append(row(f"  wrong pairs {what}", [number(v) for v in values]))
    if found["model"].by_gallery:
        many = ", ".join(
            f"{n:,}: {'too few here to state it' if t is None else f'{t:.3f}'}"
            for n, t in found["model"].by_gallery.items()
        )
        lines += ["", f"threshold for so many classes enrolled, from pairs, at a rate of {rule.rate:g}: {many}"]
    if found["model"].confused:
        worst = "; ".join(f"{true} for {said} ({n})" for true, said, n in found["model"].confused[:5])
        lines += ["", f"taken for another (all classes enrolled): {worst}"]
    return lines


def _largest(references: Manifest) -> int:
    return int(torch.bincount(references.labels()).max())
