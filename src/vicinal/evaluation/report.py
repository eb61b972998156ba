"""The page that proves it: one self-contained HTML file of a run, made from its files alone: no model, no network.

Everything on it is a function of the record and the pictures: the same record gives the same bytes. This module
holds the words, tables and facts; `closeups` what is shown of the embeddings, `charts` the geometry, `wording` how
numbers are said, and `report.html.j2` all of the markup, where every string of the user's is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vicinal.evaluation import closeups
from vicinal.evaluation.charts import Panel, Series, panel, thin
from vicinal.evaluation.wording import as_change, as_number, as_text, counted, known, metric_name, part_order
from vicinal.types import Embeddings

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Record", "report"]

Results = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """What a run leaves behind, read from its files; every part but the results may be missing.

    Args:
        results: the content of `results.json`.
        history: the rows of `history.jsonl`: {"step", "loss", "lr", ...} and {"step", "val": {metric: value}}.
        recipe: the resolved recipe, as YAML text.
        before: part ("seen", "unseen", "joint", "all") -> the queries of that part, embedded by the original model.
        after: the same, by the adapted model. Rows are matched by their ids.

    >>> Record(results={"seed": 42}).history
    []
    """

    results: Mapping[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    recipe: str = ""
    before: Mapping[str, Embeddings] = field(default_factory=dict)
    after: Mapping[str, Embeddings] = field(default_factory=dict)


def report(record: Record, pictures: Callable[[str], Image | None]) -> str:
    """Write the page of a run.

    Args:
        record: what the run left behind.
        pictures: an id of an embedding -> its picture, or None where there is none; called for some hundred ids.

    Returns:
        One HTML document that loads nothing from anywhere: styles, charts and pictures are inside. It reads in light
        and dark, on paper and on a phone, and is about 1 MB: never above 3, as pictures get 2 MB together.

    >>> page = report(Record(results={"before": {"all": {"map@r": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9,
    ...                                                             "queries": 90}}}}), lambda name: None)
    >>> "MAP@R is .500 [.400, .600]" in page
    True
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vicinal.evaluation", "."),
        autoescape=True,  # every string of the user's is escaped, whatever the template is called
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"num": as_number, "signed": as_change, "plain": as_text, "metric": metric_name}
    seed = int(record.results.get("seed") or 0)
    album = closeups.Album(pictures)
    shown = closeups.views(record.before, record.after, seed)
    return environment.get_template("report.html.j2").render(
        headline=_headline(record.results),
        hero=_hero(record.results),
        facts=_key_facts(record),
        parts=(tables := _part_tables(record.results)),
        few=any(0 < (row["n"] or 0) < 20 for table in tables for row in table["rows"]),
        paired=bool(record.results.get("after")),
        seeds=_seeds(record.results),
        galleries=[closeups.gallery(view, album, seed) for view in shown],
        heat=closeups.heat(shown[0], album, seed) if shown else None,
        entropies=[entropy for view in shown if (entropy := closeups.entropy(view)) is not None],
        similarities=[pairs for view in shown if (pairs := closeups.similarity(view, seed)) is not None],
        training=_training(record),
        elsewhere=_lost_elsewhere(record.results),
        classes=closeups.class_table(shown[0], album) if shown else None,
        notes=_notes(record),
        groups=_fact_groups(record.results),
        recipe=record.recipe.strip(),
        seed=record.results.get("seed"),
        temperature=closeups.TEMPERATURE,
        placeholders=album.missing,
        over_budget=album.over_budget,
        limits={
            "pool": closeups.POOL,
            "thumbnail": closeups.THUMBNAIL,
            "megabytes": closeups.PICTURE_BYTES / 1e6,
        },
    )


# ---------------------------------------------------------------------------------------------------------- headline


def _part_names(results: Results) -> list[str]:
    """The parts that were measured, the most telling first."""
    found = list(dict.fromkeys([*(results.get("before") or {}), *(results.get("after") or {})]))
    return sorted(found, key=part_order)


def _of(results: Results, side: str, part: str, metric: str) -> Mapping[str, Any] | None:
    estimate = ((results.get(side) or {}).get(part) or {}).get(metric)
    return estimate if estimate is not None and known(estimate.get("value")) else None


def _chosen_metric(results: Results, part: str) -> str | None:
    """MAP@R where it is known, then the sharpest of the others."""
    known = [m for m in _metrics(results, part) if any(_of(results, s, part, m) for s in ("before", "after"))]
    return next((m for m in ("map@r", "accuracy@1shot", "recall@1", *known) if m in known), None)


def _metrics(results: Results, part: str) -> list[str]:
    sides = [(results.get(side) or {}).get(part) or {} for side in ("before", "after")]
    names = dict.fromkeys(name for side in sides for name in side if not _is_rank(name))
    order = ("map@r", "recall@1", "recall@5", "recall@10", "r_precision")
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _is_rank(name: str) -> bool:
    """Ranks are no shares of one, and less is more: they stand below the table, on no axis."""
    return name.endswith("median_rank")


def _ranks(results: Results, part: str) -> list[str]:
    """One line for each median rank: before, after, with intervals."""
    names = dict.fromkeys(
        name for side in ("before", "after") for name in (results.get(side) or {}).get(part) or {} if _is_rank(name)
    )
    lines = []
    for name in names:
        values = [one for side in ("before", "after") if (one := _of(results, side, part, name)) is not None]
        said = [
            f"{one['value']:g} [{one['low']:g}, {one['high']:g}]" if known(one.get("low")) else f"{one['value']:g}"
            for one in values
        ]
        lines.append(f"{metric_name(name)}: {' → '.join(said)}")
    return lines


def _interval(estimate: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """[low, high], or the empty string where there is none."""
    if estimate is None or not (known(estimate.get("low")) and known(estimate.get("high"))):
        return ""
    show = as_change if signed else as_number
    return f"[{show(estimate['low'])}, {show(estimate['high'])}]"


def _verdict(difference: Mapping[str, Any] | None) -> str:
    """What its interval allows to say of a difference: up, down, flat (it holds zero), or unknown (there is none)."""
    if difference is None or not (known(difference.get("low")) and known(difference.get("high"))):
        return "unknown"
    return "up" if difference["low"] > 0 else "down" if difference["high"] < 0 else "flat"


def _where(part: str, classes: int, *, paired: bool) -> str:
    some = counted(classes, "class")
    match part:
        case "unseen":
            return f"On {some} the model never saw"
        case "seen":
            return f"On new images of {some} the model was trained on"
        case "joint":
            return f"Among all {some}, seen and unseen together"
        case "all":
            return f"On new images of {some}" if paired else f"On {some}"
        case _:
            return f"On {some} of \N{LEFT DOUBLE QUOTATION MARK}{part}\N{RIGHT DOUBLE QUOTATION MARK}"


def _headline(results: Results) -> dict[str, str]:
    """The one sentence that matters, what it allows to say, and what happened elsewhere."""
    part = next((p for p in _part_names(results) if _chosen_metric(results, p)), None)
    metric = _chosen_metric(results, part) if part is not None else None
    if part is None or metric is None:
        return {"where": "Nothing was measured", "what": "", "change": "", "verdict": "", "tone": "unknown", "rest": ""}
    before, after, difference = (_of(results, side, part, metric) for side in ("before", "after", "difference"))
    one = after or before or {}
    where = _where(part, int(one.get("n", 0)), paired=before is not None and after is not None)
    basis = f"{counted(int(one.get('queries', 0)), 'query')} of {counted(int(one.get('n', 0)), 'class')}"
    if trainings := results.get("seeds"):
        basis += f", after {counted(len(trainings), 'training')} of other seeds"
    if before is None or after is None:
        what = f"{metric_name(metric)} is {as_number(one['value'])} {_interval(one)}".rstrip()
        verdict = f"Measured once, on {basis}; there is nothing here to compare it with."
        return {"where": where, "what": what, "change": "", "verdict": verdict, "tone": "unknown", "rest": ""}
    change = after["value"] - before["value"] if difference is None else difference["value"]
    tone = _verdict(difference)
    verb = {"up": "rose", "down": "fell"}.get(tone, "went")
    verdict = {
        "up": f"The whole 95 % interval lies above zero: the adapted model is better here. Measured on {basis}.",
        "down": f"The whole 95 % interval lies below zero: the adapted model is worse here. Measured on {basis}.",
        "flat": f"The 95 % interval holds zero: these data cannot tell the change from none. Measured on {basis}.",
        "unknown": f"The difference has no interval: nothing is known of its certainty. Measured on {basis}.",
    }[tone]
    return {
        "where": where,
        "what": f"{metric_name(metric)} {verb} from {as_number(before['value'])} to {as_number(after['value'])}",
        "change": f"{as_change(change)} {_interval(difference, signed=True)}".rstrip(),
        "verdict": verdict,
        "tone": tone,
        "rest": _elsewhere(results, part, metric),
    }


def _elsewhere(results: Results, headline: str, metric: str) -> str:
    """The same metric on the other parts, in words, so that a loss elsewhere is never below the fold."""
    names = {"seen": "seen classes", "unseen": "unseen classes", "joint": "all classes together", "all": "all classes"}
    said = []
    for part in _part_names(results):
        before, after, change = (_of(results, side, part, metric) for side in ("before", "after", "difference"))
        if part == headline or before is None or after is None:
            continue
        difference = as_change(change["value"] if change else after["value"] - before["value"])
        text = f"{names.get(part, part)} {as_number(before['value'])} to {as_number(after['value'])}"
        hint = ", not distinguishable from zero" if _verdict(change) == "flat" else ""
        said.append(f"{text} ({f'{difference} {_interval(change, signed=True)}'.rstrip()}{hint})")
    return f"Elsewhere, {metric_name(metric)}: " + "; ".join(said) + "." if said else ""


# ------------------------------------------------------------------------------------------------ tables and whiskers


@dataclass(frozen=True, slots=True)
class _Whisker:
    """A dot with its interval, in per cent of the axis."""

    at: float
    low: float
    high: float
    style: str


def _whisker(estimate: Mapping[str, Any] | None, low: float, high: float, style: str) -> _Whisker | None:
    if estimate is None:
        return None

    def place(value: float) -> float:
        return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 2)

    at = place(estimate["value"])
    bounds = [place(estimate[k]) if known(estimate.get(k)) else at for k in ("low", "high")]
    return _Whisker(at, bounds[0], bounds[1], style)


def _span(estimates: Iterable[Mapping[str, Any] | None], *, include: Sequence[float] = ()) -> tuple[float, float]:
    """The tenths around all intervals."""
    keys = ("value", "low", "high")
    found = [float(e[k]) for e in estimates if e is not None for k in keys if known(e.get(k))] + list(include)
    low, high = math.floor(min(found, default=0.0) * 10) / 10, math.ceil(max(found, default=1.0) * 10) / 10
    return (low, high) if high - low > 0.15 else (low - 0.1, high + 0.1)


def _axis(low: float, high: float, *, signed: bool = False) -> list[dict[str, Any]]:
    tenths = round((high - low) * 10)
    step = next(s for s in (1, 2, 5, 10, 100) if tenths / s <= 6)
    first = math.ceil(round(low * 10, 6) / step) * step
    values = [i / 10 for i in range(first, round(high * 10) + 1, step)]
    show = as_change if signed else as_number
    return [{"at": round(100 * (v - low) / (high - low), 2), "label": show(v, 1), "zero": v == 0} for v in values]


def _part_tables(results: Results) -> list[dict[str, Any]]:
    """The table of every part, on common axes, so that a dot means the same in each."""
    estimates = {
        side: [_of(results, side, p, m) for p in _part_names(results) for m in _metrics(results, p)]
        for side in ("before", "after", "difference")
    }
    values = _span([*estimates["before"], *estimates["after"]])
    changes = _span(estimates["difference"], include=(0.0,))
    return [_part_table(results, part, values, changes) for part in _part_names(results)]


def _part_table(
    results: Results, part: str, values: tuple[float, float], changes: tuple[float, float]
) -> dict[str, Any]:
    """All metrics of one part: numbers, dots and whiskers."""
    names = _metrics(results, part)
    sides = {s: {m: _of(results, s, part, m) for m in names} for s in ("before", "after", "difference")}
    rows: list[dict[str, Any]] = []
    for name in names:
        before, after, difference = (sides[s][name] for s in ("before", "after", "difference"))
        one = after or before
        rows.append(
            {
                "name": name,
                "before": before,
                "after": after,
                "difference": difference,
                "intervals": [_interval(before), _interval(after), _interval(difference, signed=True)],
                "verdict": _verdict(difference),
                "n": int(one.get("n", 0)) if one else None,
                "queries": int(one.get("queries", 0)) if one else None,
                "values": [w for w in (_whisker(before, *values, "before"), _whisker(after, *values, "after")) if w],
                "change": _whisker(difference, *changes, _verdict(difference)),
            }
        )
    titles = {"unseen": "Unseen classes", "seen": "Seen classes", "joint": "Joint", "all": "All classes"}
    explain = {
        "unseen": "no image of these classes took part in training",
        "seen": "classes of the training, images that took no part in it",
        "joint": "queries of seen and unseen classes, each scored among all classes",
        "all": "every class was trained on; these images took no part in it",
    }
    best: dict[str, Any] | None = max(rows, key=lambda row: int(row["queries"] or 0), default=None)
    return {
        "id": "".join(c if c.isalnum() else "-" for c in part),
        "title": titles.get(part, part),
        "explain": explain.get(part, "") if results.get("after") else "",  # a bare measurement trained nothing
        "n": best["n"] if best else None,
        "queries": best["queries"] if best else None,
        "rows": rows,
        "axis": _axis(*values),
        "change_axis": _axis(*changes, signed=True),
        "has_change": any(row["change"] for row in rows),
        "ranks": _ranks(results, part),
    }


def _seeds(results: Results) -> dict[str, Any] | None:
    """Part by part what each training seed came to, and all together; None after one training."""
    trainings = results.get("seeds") or []
    if not trainings:
        return None
    tables = []
    for part in _part_names(results):
        names = _metrics(results, part)
        rows = [
            {"seed": one["seed"], "values": [(one["after"].get(part) or {}).get(name) for name in names]}
            for one in trainings
        ]
        together = [_of(results, "after", part, name) for name in names]
        tables.append({"part": part, "names": names, "rows": rows, "mean": [e and e["value"] for e in together]})
    return {"count": len(trainings), "first": trainings[0]["seed"], "tables": tables}


def _hero(results: Results) -> dict[str, Any] | None:
    """The chart below the headline: its metric, before and after, on every part."""
    parts = _part_names(results)
    metric = next((m for p in parts if (m := _chosen_metric(results, p))), None)
    if metric is None:
        return None
    found = [(p, _of(results, "before", p, metric), _of(results, "after", p, metric)) for p in parts]
    found = [row for row in found if row[1] or row[2]]
    low, high = _span(e for _, before, after in found for e in (before, after))
    low, high = max(low, 0.0), min(high, 1.0)
    rows = []
    for part, before, after in found:
        difference = _of(results, "difference", part, metric)
        one = after or before or {}
        rows.append(
            {
                "part": part,
                "classes": counted(int(one.get("n", 0)), "class"),
                "queries": counted(int(one.get("queries", 0)), "query"),
                "before": _whisker(before, low, high, "before"),
                "after": _whisker(after, low, high, "after"),
                "change": as_change(difference["value"]) if difference else "",
                "interval": _interval(difference, signed=True),
                "text": " to ".join(as_number(e["value"]) for e in (before, after) if e),
            }
        )
    return {"metric": metric, "rows": rows, "axis": _axis(low, high)}


# ---------------------------------------------------------------------------------------------------------- training


def _training(record: Record) -> dict[str, Any] | None:
    """Loss, learning rate and the validation metric against steps; the interpolation's choice, where there was one."""
    # a resumed run may have written a step twice: the last counts
    rows = {int(r["step"]): r for r in record.history if "step" in r and "val" not in r}
    checks = {int(r["step"]): r["val"] for r in record.history if "step" in r and isinstance(r.get("val"), Mapping)}
    steps, checked = sorted(rows), sorted(checks)
    panels: list[Panel] = []
    last = float(max([*steps, *checked], default=1))
    if len(steps) > 1:
        loss = [(float(s), float(rows[s]["loss"])) for s in steps if known(rows[s].get("loss"))]
        if len(loss) > 1:
            x, y = [s for s, _ in loss], [v for _, v in loss]
            series = [Series(*thin(x, y, 240), style="raw"), Series(*thin(x, _smooth(y), 240), style="after")]
            panels.append(panel("Training loss", series, x_label="step", x_range=(0.0, last)))
        rate = [(float(s), float(rows[s]["lr"])) for s in steps if known(rows[s].get("lr"))]
        if len(rate) > 1:
            line = Series(*thin([s for s, _ in rate], [v for _, v in rate], 120), style="after")
            top = max(v for _, v in rate) * 1.06 or 1.0
            panels.append(panel("Learning rate", [line], x_label="step", x_range=(0.0, last), y_range=(0.0, top)))
    facts = record.results.get("training") or {}
    monitor = _monitor(record, checks)
    best = facts.get("best_step")
    if monitor is not None and checked:
        points = [(float(s), float(checks[s][monitor])) for s in checked if known(checks[s].get(monitor))]
        line = Series([s for s, _ in points], [v for _, v in points], "after", dotted=True)
        marks = [(float(best), f"chosen: step {best:,}", "chosen")] if known(best) else []
        panels.append(
            panel(f"Validation {metric_name(monitor)}", [line], x_label="step", x_range=(0.0, last), marks=marks)
        )
    given = facts.get("wise_ft")
    blend = given if isinstance(given, Mapping) else {}
    curve = [p for p in blend.get("curve") or [] if known(p.get("weight"))]
    name = next((m for m in (monitor, "map@r") if m and curve and all(known(p.get(m)) for p in curve)), None)
    if len(curve) > 1 and name is not None:
        line = Series([float(p["weight"]) for p in curve], [float(p[name]) for p in curve], "after", dotted=True)
        marks = (
            [(float(blend["weight"]), f"chosen: {blend['weight']:g}", "chosen")] if known(blend.get("weight")) else []
        )
        panels.append(
            panel(
                f"Interpolation, validation {metric_name(name)}",
                [line],
                x_label="0 = original weights, 1 = tuned weights",
                marks=marks,
            )
        )
    return {"panels": panels} if panels else None


def _lost_elsewhere(results: Results) -> dict[str, Any] | None:
    """The probe before and after, and what each weight between the two models keeps of it."""
    given = results.get("probe")
    if not isinstance(given, Mapping):
        return None
    rows = []
    for name, after in (given.get("after") or {}).items():
        before, difference, kept = ((given.get(side) or {}).get(name) for side in ("before", "difference", "kept"))
        rows.append(
            {
                "name": name,
                "before": before,
                "after": after,
                "difference": difference,
                "kept": kept,
                "intervals": [
                    _interval(before),
                    _interval(after),
                    _interval(difference, signed=True),
                    _interval(kept),
                ],
                "verdict": _verdict(difference),
                "n": int(after.get("n", 0)),
                "queries": int(after.get("queries", 0)),
            }
        )
    blend = (results.get("training") or {}).get("wise_ft") or {}
    name = "probe/accuracy@0shot"
    curve = [p for p in blend.get("curve") or [] if known(p.get("weight")) and known(p.get(name))]
    panels = []
    if len(curve) > 1:
        line = Series([float(p["weight"]) for p in curve], [float(p[name]) for p in curve], "after", dotted=True)
        marks = [(float(blend["weight"]), f"chosen: {blend['weight']:g}", "chosen")]
        label = "0 = original weights, 1 = tuned weights"
        panels.append(panel("Interpolation, probe's zero-shot accuracy", [line], x_label=label, marks=marks))
    return {"rows": rows, "panels": panels} if rows else None


def _monitor(record: Record, checks: Mapping[int, Mapping[str, Any]]) -> str | None:
    """The validation metric that chose the step: the recipe says which; else MAP@R; else the first there is."""
    names = list(dict.fromkeys(name for values in checks.values() for name in values))
    lines = [line.partition(":") for line in record.recipe.splitlines()]
    asked = next((value.strip().strip("'\"") for key, _, value in lines if key == "monitor"), None)
    return next((name for name in (asked, "map@r", *names) if name in names), None)


def _smooth(values: Sequence[float]) -> list[float]:
    """The mean over a window of a fifteenth of the points, centred, so that the line does not lag; cut at the ends.

    >>> _smooth([0.0, 6.0])
    [0.0, 6.0]
    """
    half = len(values) // 30
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - half) : i + half + 1])]


# ------------------------------------------------------------------------------------------------------------- facts


def _key_facts(record: Record) -> list[dict[str, str]]:
    """The line of facts below the headline; only those that are known."""
    data, model, training = (record.results.get(key) or {} for key in ("data", "model", "training"))
    facts = []
    if model.get("source"):
        licence = f"licence: {model['licence']}" if model.get("licence") else "licence unknown: see its model card"
        facts.append({"name": "Model", "value": str(model["source"]), "more": licence})
    if known(data.get("images")):
        more = counted(int(data["classes"]), "class") if known(data.get("classes")) else ""
        facts.append({"name": "Data", "value": counted(int(data["images"]), "image"), "more": more})
    trained, total = training.get("trained_parameters"), training.get("total_parameters")
    if known(trained):
        more = f"{100 * trained / total:.1f} % of {_large(total)}" if known(total) and total else ""
        if training.get("trained_aside"):
            more += f"{', and ' if more else ''}{_large(training['trained_aside'])} for the loss alone"
        facts.append({"name": "Trained parameters", "value": _large(trained), "more": more})
    if known(training.get("steps")):
        seconds = training.get("seconds")
        more = f"{_duration(seconds)}" if known(seconds) else ""
        facts.append({"name": "Steps", "value": f"{training['steps']:,}", "more": more})
    return facts


def _large(number: float | int) -> str:
    """A large number, short: 92,160 stays, 5,616,576 is 5.62 M."""
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:.3g} M" if number < 1e9 else f"{number / 1e9:.3g} G"


def _duration(seconds: float | int) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _fact_groups(results: Results) -> list[dict[str, Any]]:
    """Everything else the run recorded, whatever its keys are: nothing is dropped because a name is new."""
    shown_elsewhere = {"before", "after", "difference", "seeds", "probe"}
    groups = []
    titles = {"data": "Data", "model": "Model", "training": "Training", "environment": "Environment"}
    for key, title in titles.items():
        skip = {"skipped", "notes"} if key == "data" else {"wise_ft"} if key == "training" else set()
        given = results.get(key)
        rows = _flatten({k: v for k, v in given.items() if k not in skip}) if isinstance(given, Mapping) else []
        blend = given.get("wise_ft") if key == "training" and isinstance(given, Mapping) else None
        if isinstance(blend, Mapping) and known(blend.get("weight")):
            rows.append(("interpolation weight", blend["weight"]))
        if rows:
            groups.append({"title": title, "rows": rows})
    rest = _flatten({k: v for k, v in results.items() if k not in shown_elsewhere | set(titles)})
    return [*groups, {"title": "Run", "rows": rest}] if rest else groups


def _flatten(given: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in given.items():
        name = f"{above} · {key}" if above else str(key)
        name = name.replace("_", " ") if above != "versions" else str(key)
        if isinstance(value, Mapping):
            rows += _flatten(value, "versions" if key == "versions" else name)
        else:
            rows.append((name, value))
    return rows


def _notes(record: Record) -> dict[str, Any]:
    """What a reader must know of the data: skipped images, classes of one image, notes of the run."""
    data = record.results.get("data") or {}
    skipped = []
    for one in data.get("skipped") or []:
        name, reason = (one, "") if isinstance(one, str) else (str(one[0]), " ".join(map(str, one[1:])))
        skipped.append({"name": name, "reason": reason})
    lone = []
    for part in sorted({*record.before, *record.after}, key=part_order):
        one = record.before.get(part) or record.after[part]
        alone = (torch.bincount(one.labels, minlength=len(one.classes)) == 1).nonzero().flatten().tolist()
        if alone and part != "joint":  # joint holds seen and unseen: its list would say the same again
            lone.append({"part": part, "classes": [one.classes[c] for c in alone[:60]], "count": len(alone)})
    return {
        "skipped": skipped[:200],
        "skipped_count": len(skipped),
        "notes": list(data.get("notes") or []),
        "lone": lone,
    }
