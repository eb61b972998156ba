"""The page that proves it: one self-contained HTML file of a run, made from its files alone. No model, no GPU, no network.

Everything on the page is a function of the record and the pictures: the same record gives the same bytes. Whatever is
sampled is sampled with the run's seed and bounded, and the page says how many: queries (`POOL`), pairs (`PAIRS`),
classes of the heat map (`HEAT_CLASSES`), pictures (`THUMBNAIL` pixels, `PICTURE_BYTES` for all of them together).

Formulas, with x a unit vector, S_c the sum of the unit vectors of class c, and T = `TEMPERATURE`:

    prototype              mu_c = S_c / |S_c|; for a query of class c itself, (S_c - x) / |S_c - x|: never its own
    softmax over them      p_c = exp(x . mu_c / T) / sum_k exp(x . mu_k / T)
    entropy                H = -sum_c p_c ln p_c, in nats; exp(H) is the effective number of classes, 1 to C
    AUROC of a similarity  P(same > different) + P(same = different) / 2, over sampled pairs

Letters: N items, D numbers an embedding, C classes, P sampled queries, K neighbours, M sampled pairs.
"""

from __future__ import annotations

import base64
import io
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vicinal.evaluation.charts import Panel, Series, density, panel, thin
from vicinal.evaluation.metrics import retrieval_values, topk
from vicinal.types import Embeddings

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Record", "report"]

POOL = 4096
PAIRS = 20_000
HEAT_CLASSES = 8
NEIGHBOURS = 5
TEMPERATURE = 0.05
THUMBNAIL = 96
PICTURE_BYTES = 2_000_000
PROTOTYPES = 8192

PARTS = ("unseen", "seen", "joint", "all")
METRIC_NAMES = {"map@r": "MAP@R", "r_precision": "R-precision"}

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
        One HTML document that loads nothing from anywhere: styles, charts and pictures are inside. It reads in light and
        dark, on paper and on a phone, and stays under 4 MB (typically 1 MB).

    >>> page = report(Record(results={"before": {"all": {"map@r": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9,
    ...                                                             "queries": 90}}}}), lambda name: None)
    >>> "On 9 classes,</span> <span class=\"what\">MAP@R is .500 [.400, .600]" in page
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
    environment.filters |= {"num": _number, "signed": _signed, "plain": _plain, "metric": _metric}
    seed = int(record.results.get("seed") or 0)
    album = _Album(pictures)
    views = {name: view for name in _parts(record) if (view := _view(record, name, seed)) is not None}
    shown = [views[name] for name in ("unseen", "seen") if name in views] or list(views.values())[:1]
    return environment.get_template("report.html.j2").render(
        headline=_headline(record.results),
        hero=_hero(record.results),
        facts=_key_facts(record),
        parts=_part_tables(record.results),
        paired=bool(record.results.get("after")),
        galleries=[_gallery(view, album, seed) for view in shown],
        heat=_heat(shown[0], album, seed) if shown else None,
        entropies=[entropy for view in shown if (entropy := _entropy(view)) is not None],
        similarities=[pairs for view in shown if (pairs := _similarity(view, seed)) is not None],
        training=_training(record),
        classes=_class_table(shown[0], album) if shown else None,
        notes=_notes(record, views),
        groups=_fact_groups(record.results),
        recipe=record.recipe.strip(),
        seed=record.results.get("seed"),
        temperature=TEMPERATURE,
        placeholders=album.missing,
        over_budget=album.over_budget,
        limits={"pool": POOL, "pairs": PAIRS, "thumbnail": THUMBNAIL, "megabytes": PICTURE_BYTES / 1e6},
    )


# ----------------------------------------------------------------------------------------------------------- numbers


def _known(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _number(value: float | None, digits: int = 3) -> str:
    """A share of one without its zero: .514; an unknown is a dash.

    >>> _number(0.51449), _number(1.0), _number(-0.02), _number(None)
    ('.514', '1.000', '−.020', '–')
    """
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    text = f"{abs(value):.{digits}f}"
    sign = "\N{MINUS SIGN}" if value < 0 and float(text) > 0 else ""
    return sign + (text[1:] if text.startswith("0.") else text)


def _signed(value: float | None, digits: int = 3) -> str:
    """A difference, with its sign: +.282.

    >>> _signed(0.282), _signed(-0.1), _signed(0.0), _signed(None)
    ('+.282', '−.100', '.000', '–')
    """
    text = _number(value, digits)
    return f"+{text}" if value is not None and math.isfinite(value) and float(f"{value:.{digits}f}") > 0 else text


def _plain(value: object) -> str:
    """Any value of the record, for reading."""
    match value:
        case None:
            return "\N{EN DASH}"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}" if abs(value) >= 10_000 else str(value)
        case float():
            return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
        case list() | tuple() if all(not isinstance(v, (list, tuple, dict)) for v in value):
            return " \N{MULTIPLICATION SIGN} ".join(map(_plain, value)) if _is_size(value) else ", ".join(map(_plain, value))
        case _:
            return str(value)


def _is_size(value: Sequence[object]) -> bool:
    return len(value) == 2 and all(isinstance(v, int) for v in value)


def _metric(name: str) -> str:
    """A metric's name, for reading.

    >>> _metric("map@r"), _metric("recall@5"), _metric("accuracy@1shot"), _metric("f1")
    ('MAP@R', 'Recall@5', '1-shot accuracy', 'f1')
    """
    kind, _, detail = name.partition("@")
    if kind == "accuracy" and detail.endswith("shot"):
        return f"{detail.removesuffix('shot')}-shot accuracy"
    return METRIC_NAMES.get(name) or (f"Recall@{detail}" if kind == "recall" and detail else name)


def _count(number: int, noun: str) -> str:
    """A number and its noun.

    >>> _count(1, "class"), _count(1446, "class"), _count(2, "query")
    ('1 class', '1,446 classes', '2 queries')
    """
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


# ---------------------------------------------------------------------------------------------------------- headline


def _part_names(results: Results) -> list[str]:
    """The parts that were measured, the most telling first."""
    found = list(dict.fromkeys([*(results.get("before") or {}), *(results.get("after") or {})]))
    return sorted(found, key=lambda name: PARTS.index(name) if name in PARTS else len(PARTS))


def _of(results: Results, side: str, part: str, metric: str) -> Mapping[str, Any] | None:
    estimate = ((results.get(side) or {}).get(part) or {}).get(metric)
    return estimate if estimate is not None and _known(estimate.get("value")) else None


def _chosen_metric(results: Results, part: str) -> str | None:
    """MAP@R where it is known, then the sharpest of the others."""
    known = [m for m in _metrics(results, part) if any(_of(results, s, part, m) for s in ("before", "after"))]
    return next((m for m in ("map@r", "accuracy@1shot", "recall@1", *known) if m in known), None)


def _metrics(results: Results, part: str) -> list[str]:
    sides = [(results.get(side) or {}).get(part) or {} for side in ("before", "after")]
    names = dict.fromkeys(name for side in sides for name in side)
    order = ("map@r", "recall@1", "recall@5", "recall@10", "r_precision")
    return sorted(names, key=lambda name: order.index(name) if name in order else len(order))


def _interval(estimate: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """[low, high], or the empty string where there is none."""
    if estimate is None or not (_known(estimate.get("low")) and _known(estimate.get("high"))):
        return ""
    show = _signed if signed else _number
    return f"[{show(estimate['low'])}, {show(estimate['high'])}]"


def _verdict(difference: Mapping[str, Any] | None) -> str:
    """"up" or "down" where the interval excludes zero, "flat" where it holds it, "unknown" without one."""
    if difference is None or not (_known(difference.get("low")) and _known(difference.get("high"))):
        return "unknown"
    return "up" if difference["low"] > 0 else "down" if difference["high"] < 0 else "flat"


def _where(part: str, classes: int, *, paired: bool) -> str:
    some = _count(classes, "class")
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
    basis = f"{_count(int(one.get('queries', 0)), 'query')} of {_count(int(one.get('n', 0)), 'class')}"
    if before is None or after is None:
        what = f"{_metric(metric)} is {_number(one['value'])} {_interval(one)}".rstrip()
        verdict = f"Measured once, on {basis}; there is nothing here to compare it with."
        return {"where": where, "what": what, "change": "", "verdict": verdict, "tone": "unknown", "rest": ""}
    change = after["value"] - before["value"] if difference is None else difference["value"]
    tone = _verdict(difference)
    verb = {"up": "rose", "down": "fell"}.get(tone, "went")
    verdict = {
        "up": f"The whole 95 % interval lies above zero: the adapted model is better here. Measured on {basis}.",
        "down": f"The whole 95 % interval lies below zero: the adapted model is worse here. Measured on {basis}.",
        "flat": f"The 95 % interval holds zero: these data cannot tell the change from none. Measured on {basis}.",
        "unknown": f"There is no interval for this difference, so nothing can be said of its certainty. Measured on {basis}.",
    }[tone]
    return {
        "where": where,
        "what": f"{_metric(metric)} {verb} from {_number(before['value'])} to {_number(after['value'])}",
        "change": f"{_signed(change)} {_interval(difference, signed=True)}".rstrip(),
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
        difference = _signed(change["value"] if change else after["value"] - before["value"])
        text = f"{names.get(part, part)} {_number(before['value'])} to {_number(after['value'])}"
        hint = ", not distinguishable from zero" if _verdict(change) == "flat" else ""
        said.append(f"{text} ({f'{difference} {_interval(change, signed=True)}'.rstrip()}{hint})")
    return f"Elsewhere, {_metric(metric)}: " + "; ".join(said) + "." if said else ""


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
    bounds = [place(estimate[k]) if _known(estimate.get(k)) else at for k in ("low", "high")]
    return _Whisker(at, bounds[0], bounds[1], style)


def _span(estimates: Iterable[Mapping[str, Any] | None], *, include: Sequence[float] = ()) -> tuple[float, float]:
    """The tenths around all intervals."""
    keys = ("value", "low", "high")
    found = [float(e[k]) for e in estimates if e is not None for k in keys if _known(e.get(k))] + list(include)
    low, high = math.floor(min(found, default=0.0) * 10) / 10, math.ceil(max(found, default=1.0) * 10) / 10
    return (low, high) if high - low > 0.15 else (low - 0.1, high + 0.1)


def _axis(low: float, high: float, *, signed: bool = False) -> list[dict[str, Any]]:
    tenths = round((high - low) * 10)
    step = next(s for s in (1, 2, 5, 10, 100) if tenths / s <= 6)
    first = math.ceil(round(low * 10, 6) / step) * step
    values = [i / 10 for i in range(first, round(high * 10) + 1, step)]
    show = _signed if signed else _number
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
    rows = []
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
    best = max(rows, key=lambda row: row["queries"] or 0, default=None)
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
    }


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
                "classes": _count(int(one.get("n", 0)), "class"),
                "queries": _count(int(one.get("queries", 0)), "query"),
                "before": _whisker(before, low, high, "before"),
                "after": _whisker(after, low, high, "after"),
                "change": _signed(difference["value"]) if difference else "",
                "interval": _interval(difference, signed=True),
                "text": " to ".join(_number(e["value"]) for e in (before, after) if e),
            }
        )
    return {"metric": metric, "rows": rows, "axis": _axis(low, high)}


# ------------------------------------------------------------------------------------------------------------- views


@dataclass(frozen=True, slots=True)
class _Side:
    """One model's embeddings of a part, and its K nearest neighbours and scores for the sampled queries."""

    name: str
    embeddings: Embeddings
    rows: Int[Tensor, "P K"]
    cosines: Float[Tensor, "P K"]
    hit: Bool[Tensor, "P"]
    map_at_r: Float[Tensor, "P"]


@dataclass(frozen=True, slots=True)
class _View:
    """One part as the page looks at it: sides with equal rows, and the rows that were sampled as queries."""

    part: str
    pool: Int[Tensor, "P"]
    sides: tuple[_Side, ...]
    eligible: int
    lone: tuple[str, ...]

    @property
    def first(self) -> Embeddings:
        return self.sides[0].embeddings

    @property
    def last(self) -> _Side:
        return self.sides[-1]


def _parts(record: Record) -> list[str]:
    found = list(dict.fromkeys([*record.before, *record.after]))
    return sorted(found, key=lambda name: PARTS.index(name) if name in PARTS else len(PARTS))


def _view(record: Record, part: str, seed: int) -> _View | None:
    """Bring the two sides to the same rows, sample queries that can be right at all, and find their neighbours."""
    given = {name: side[part] for name, side in (("before", record.before), ("after", record.after)) if part in side}
    if len(given) == 2 and given["before"].ids != given["after"].ids:
        place = {name: i for i, name in enumerate(given["after"].ids)}
        both = [(i, place[name]) for i, name in enumerate(given["before"].ids) if name in place]
        picked = torch.tensor(both, dtype=torch.int64).reshape(-1, 2)
        given = {name: _take(e, picked[:, column]) for column, (name, e) in enumerate(given.items())}
    one = next(iter(given.values()))
    sizes = torch.bincount(one.labels, minlength=len(one.classes))
    lone = tuple(one.classes[c] for c in (sizes == 1).nonzero().flatten().tolist())
    eligible = (sizes[one.labels] > 1).nonzero().flatten()
    if len(eligible) == 0:
        return None
    order = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(seed))[:POOL]
    pool = eligible[order.sort().values]
    sides = tuple(_side(name, embeddings, pool) for name, embeddings in given.items())
    return _View(part, pool, sides, len(eligible), lone)


def _take(embeddings: Embeddings, rows: Int[Tensor, "n"]) -> Embeddings:
    ids = tuple(embeddings.ids[i] for i in rows.tolist())
    return Embeddings(embeddings.vectors[rows], embeddings.labels[rows], ids, embeddings.classes)


def _side(name: str, embeddings: Embeddings, pool: Int[Tensor, "P"]) -> _Side:
    """Neighbours and MAP@R of the sampled queries among all items of the part, each query itself left out."""
    vectors, labels = embeddings.vectors.float(), embeddings.labels
    cosines, rows = topk(vectors[pool], vectors, min(NEIGHBOURS, len(embeddings) - 1), exclude=pool)
    values = retrieval_values(vectors[pool], labels[pool], vectors, labels, ks=(1,), exclude=pool)
    return _Side(name, embeddings, rows, cosines, labels[rows[:, 0]] == labels[pool], values["map@r"])


# ---------------------------------------------------------------------------------------------------------- pictures


class _Album:
    """Pictures as data URIs, each made once, within `PICTURE_BYTES`."""

    def __init__(self, pictures: Callable[[str], Image | None]) -> None:
        self.pictures = pictures
        self.made: dict[tuple[str, int], str | None] = {}
        self.bytes = 0
        self.missing = 0
        self.over_budget = False

    def uri(self, name: str, size: int = THUMBNAIL) -> str | None:
        """The picture as a JPEG of at most `size` x `size`, or None."""
        key = (name, size)
        if key not in self.made:
            self.made[key] = self._make(name, size)
        found = self.made[key]
        # every use is written out once more, so every use counts
        if found is not None and self.bytes + len(found) > PICTURE_BYTES:
            self.over_budget = True
            return None
        self.bytes += len(found or "")
        return found

    def _make(self, name: str, size: int) -> str | None:
        try:
            picture = self.pictures(name)
        except (OSError, ValueError):  # a file that went away since: the page is worth more than one picture
            picture = None
        if picture is None:
            self.missing += 1
            return None
        file = io.BytesIO()
        small = _flat(picture)
        small.thumbnail((size, size))
        small.save(file, format="JPEG", quality=82, optimize=True)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _flat(picture: Image) -> Image:
    """RGB, transparency over white."""
    from PIL import Image

    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layered = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    return picture.convert("RGB")


def _tile(view: _View, row: int, album: _Album, size: int = THUMBNAIL) -> dict[str, Any]:
    name = view.first.ids[row]
    label = view.first.classes[int(view.first.labels[row])]
    return {"uri": album.uri(name, size), "label": label, "id": name}


def _gallery(view: _View, album: _Album, seed: int) -> dict[str, Any]:
    """Seeded queries with their neighbours, chosen by outcome, so that failures are always among them."""
    if len(view.sides) == 2:
        before, after = (side.hit for side in view.sides)
        outcomes = {
            "gained": (~before & after, "Gained", "the first neighbour was wrong, and is right now"),
            "lost": (before & ~after, "Lost", "the first neighbour was right, and is wrong now"),
            "wrong": (~before & ~after, "Still wrong", "the first neighbour is wrong before and after"),
            "kept": (before & after, "Kept", "the first neighbour is right before and after"),
        }
    else:
        hit = view.last.hit
        outcomes = {
            "kept": (hit, "Right", "the first neighbour is of the same class"),
            "wrong": (~hit, "Wrong", "the first neighbour is of another class"),
        }
    most = {"unseen": {"gained": 4, "lost": 3, "wrong": 3, "kept": 1}}.get(
        view.part, {"gained": 2, "lost": 2, "wrong": 2, "kept": 1}
    )
    if len(view.sides) == 1:
        most = {"kept": 5, "wrong": 5}
    groups = []
    for key, (mask, title, explain) in outcomes.items():
        found = mask.nonzero().flatten().tolist()
        chosen = sorted(random.Random(f"{seed}/{view.part}/{key}").sample(found, min(most[key], len(found))))
        groups.append(
            {
                "key": key,
                "title": title,
                "explain": explain,
                "count": len(found),
                "share": len(found) / len(view.pool),
                "rows": [_gallery_row(view, i, album) for i in chosen],
            }
        )
    order = ("gained", "kept", "lost", "wrong")  # right, then wrong: the bar is read from its left
    return {
        "part": view.part,
        "queries": len(view.pool),
        "eligible": view.eligible,
        "groups": groups,
        "bar": sorted(groups, key=lambda group: order.index(str(group["key"]))),
    }


def _gallery_row(view: _View, position: int, album: _Album) -> dict[str, Any]:
    row = int(view.pool[position])
    label = int(view.first.labels[row])
    sides = []
    for side in view.sides:
        neighbours = []
        for found, cosine in zip(side.rows[position].tolist(), side.cosines[position].tolist(), strict=True):
            hit = int(view.first.labels[found]) == label
            neighbours.append(_tile(view, found, album) | {"hit": hit, "cosine": cosine})
        sides.append({"name": side.name, "neighbours": neighbours})
    return {"query": _tile(view, row, album), "sides": sides}


# -------------------------------------------------------------------------------------------------------- prototypes


def _sums(embeddings: Embeddings) -> tuple[Int[Tensor, "c"], Float[Tensor, "c D"], Int[Tensor, "N"]]:
    """The classes present, the sum of the unit vectors of each, and each row's position among them."""
    present, position = embeddings.labels.unique(return_inverse=True)
    sums = torch.zeros(len(present), embeddings.vectors.shape[1])
    return present, sums.index_add_(0, position, embeddings.vectors.float()), position


def _heat(view: _View, album: _Album, seed: int) -> dict[str, Any] | None:
    """Cosines between the prototypes of a few seeded classes, before and after, with the mean over all pairs."""
    present, _, position = _sums(view.first)
    if len(present) < 2:
        return None
    chosen = sorted(random.Random(f"{seed}/heat").sample(range(len(present)), min(HEAT_CLASSES, len(present))))
    first_row = {c: int((position == c).nonzero()[0]) for c in chosen}
    tiles = [_tile(view, first_row[c], album, THUMBNAIL // 2) for c in chosen]
    sides = []
    for side in view.sides:
        sums = _sums(side.embeddings)[1][:PROTOTYPES]
        unit = torch.nn.functional.normalize(sums, dim=1)
        count = len(unit)
        # the mean over pairs i != j of mu_i . mu_j is (|sum mu|^2 - C) / (C (C - 1)): no C x C matrix
        mean = float((unit.double().sum(0).square().sum() - count) / (count * (count - 1)))
        few = torch.nn.functional.normalize(_sums(side.embeddings)[1][chosen], dim=1)
        cosine = (few @ few.T).clamp(-1, 1)
        off = cosine[~torch.eye(len(chosen), dtype=torch.bool)]
        sides.append(
            {
                "name": side.name,
                "cells": cosine.tolist(),
                "mean": mean,
                "low": float(off.min()),
                "high": float(off.max()),
            }
        )
    # the same headers serve every panel, so their pictures are written once more for each
    return {"part": view.part, "tiles": tiles, "sides": sides, "classes": min(len(present), PROTOTYPES)}


def _entropy(view: _View) -> dict[str, Any] | None:
    """The entropy of the softmax over prototypes, for the sampled queries."""
    if int(view.first.labels.unique().numel()) < 2:
        return None
    values = {side.name: _entropies(side.embeddings, view.pool) for side in view.sides}
    classes = int(view.first.labels.unique().numel())
    top = math.log(classes)
    series, marks = [], []
    for name, nats in values.items():
        x, y = density(nats, 0.0, top, bins=60)
        series.append(Series([math.exp(v) for v in x], y, name, filled=True))
        marks.append((math.exp(float(nats.median())), f"{name} {math.exp(float(nats.median())):,.1f}", name))
    chart = panel(
        "Effective number of classes",
        series,
        description=f"Distribution of the effective number of classes of {len(view.pool)} queries",
        x_label=f"exp(H), 1 to {classes:,}; log scale",
        x_range=(1.0, float(classes)),
        y_range=(0.0, max(max(s.y) for s in series) * 1.08),
        x_log=True,
        y_axis=False,
        marks=marks,
    )
    rows = [
        {"name": n, "mean": float(v.mean()), "share": float(v.mean()) / top, "effective": math.exp(float(v.median()))}
        for n, v in values.items()
    ]
    return {"part": view.part, "chart": chart, "rows": rows, "classes": classes, "queries": len(view.pool), "top": top}


def _entropies(embeddings: Embeddings, pool: Int[Tensor, "P"], block: int = 512) -> Float[Tensor, "P"]:
    """H of each query, in nats; a query's own class is represented by its other images alone."""
    _, sums, position = _sums(embeddings)
    prototypes = torch.nn.functional.normalize(sums, dim=1)
    found = []
    for part in pool.split(block):
        x, own = embeddings.vectors[part].float(), position[part]
        cosine = x @ prototypes.T
        others = torch.nn.functional.normalize(sums[own] - x, dim=1)
        cosine[torch.arange(len(part)), own] = (x * others).sum(1)
        log_p = torch.log_softmax(cosine / TEMPERATURE, dim=1)
        found.append(-(log_p.exp() * log_p).sum(1))
    return torch.cat(found)


# -------------------------------------------------------------------------------------------------------- similarity


def _pairs(labels: Int[Tensor, "N"], seed: int) -> tuple[Int[Tensor, "M 2"], Int[Tensor, "m 2"]] | None:
    """Rows of sampled pairs of one class, and of sampled pairs of two classes; None where there is no such pair."""
    generator = torch.Generator().manual_seed(seed + 1)
    order = labels.argsort(stable=True)
    sizes = torch.bincount(labels)
    starts = sizes.cumsum(0) - sizes
    many = (sizes[labels] > 1).nonzero().flatten()
    if len(many) == 0 or int((sizes > 0).sum()) < 2:
        return None
    first = many[torch.randint(len(many), (PAIRS,), generator=generator)]
    own = labels[first]
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    # a step of 1 to R around the ring of the class: any other image of it, equally often
    step = 1 + (torch.rand(PAIRS, generator=generator) * (sizes[own] - 1)).long().clamp(max=sizes[own] - 2)
    second = order[starts[own] + (place[first] - starts[own] + step) % sizes[own]]
    apart = torch.randint(len(labels), (PAIRS, 2), generator=generator)
    apart = apart[labels[apart[:, 0]] != labels[apart[:, 1]]]
    if len(apart) == 0:
        return None
    return torch.stack([first, second], dim=1), apart


def _auroc(same: Float[Tensor, "M"], different: Float[Tensor, "m"]) -> float:
    """P(same > different) + P(same = different) / 2, by ranks.

    >>> _auroc(torch.tensor([0.9, 0.5]), torch.tensor([0.5, 0.1]))
    0.875
    """
    ordered = different.sort().values
    below = torch.searchsorted(ordered, same, right=False).double()
    upto = torch.searchsorted(ordered, same, right=True).double()
    return float((below + upto).mean() / 2 / len(different))


def _similarity(view: _View, seed: int) -> dict[str, Any] | None:
    """Cosines of same-class and of different-class pairs; the same pairs before and after."""
    pairs = _pairs(view.first.labels, seed)
    if pairs is None:
        return None
    found = []
    for side in view.sides:
        vectors = side.embeddings.vectors.float()
        found.append((side.name, *((vectors[p[:, 0]] * vectors[p[:, 1]]).sum(1) for p in pairs)))
    low = min(float(torch.cat([same, different]).quantile(0.0005)) for _, same, different in found)
    low = max(-1.0, math.floor(low * 5) / 5)
    panels, rows = [], []
    curves = {name: [density(v, low, 1.0) for v in (same, different)] for name, same, different in found}
    top = max(max(y) for both in curves.values() for _, y in both) * 1.08
    for name, same, different in found:
        (x, y_same), (_, y_different) = curves[name]
        area = _auroc(same, different)
        overlap = sum(min(a, b) for a, b in zip(y_same, y_different, strict=True))
        panels.append(
            panel(
                f"{name.capitalize()}: AUROC {_number(area)}",
                [Series(x, y_different, "different", filled=True), Series(x, y_same, "same", filled=True)],
                description=f"Cosines {name}: same-class pairs around {float(same.mean()):.2f}, "
                f"different-class pairs around {float(different.mean()):.2f}",
                x_label="cosine",
                x_range=(low, 1.0),
                y_range=(0.0, top),
                y_axis=False,
            )
        )
        rows.append(
            {"name": name, "auroc": area, "overlap": overlap, "same": float(same.mean()), "other": float(different.mean())}
        )
    return {"part": view.part, "panels": panels, "rows": rows, "same": len(pairs[0]), "different": len(pairs[1])}


# --------------------------------------------------------------------------------------------------------- per class


def _class_table(view: _View, album: _Album, most: int = 8) -> dict[str, Any] | None:
    """The classes that gained and lost most in MAP@R."""
    if len(view.sides) < 2:
        return None
    present, position = view.first.labels[view.pool].unique(return_inverse=True)
    count = torch.bincount(position).double()
    before, after = (
        torch.zeros(len(present), dtype=torch.float64).index_add_(0, position, side.map_at_r.double()) / count
        for side in view.sides
    )
    change = after - before
    better, worse = change > 1e-6, change < -1e-6
    sizes = torch.bincount(view.first.labels, minlength=len(view.first.classes))

    def rows(order: Iterable[int]) -> list[dict[str, Any]]:
        return [
            {
                "tile": _tile(view, int(view.pool[int((position == c).nonzero()[0])]), album, THUMBNAIL // 2),
                "images": int(sizes[present[c]]),
                "before": float(before[c]),
                "after": float(after[c]),
                "change": float(change[c]),
            }
            for c in order
        ]

    order = change.argsort(stable=True).tolist()
    gains, losses = [c for c in order[::-1] if better[c]], [c for c in order if worse[c]]
    counts = [("better", int(better.sum())), ("unchanged", len(present) - len(gains) - len(losses)), ("worse", len(losses))]
    return {
        "part": view.part,
        "gains": rows(gains[:most]),
        "losses": rows(losses[:most]),
        "counts": [{"key": key, "count": n, "share": n / len(present)} for key, n in counts],
        "classes": len(present),
        "whole": len(view.pool) == view.eligible,
    }


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
        loss = [(s, float(rows[s]["loss"])) for s in steps if _known(rows[s].get("loss"))]
        if len(loss) > 1:
            x, y = [s for s, _ in loss], [v for _, v in loss]
            series = [Series(*thin(x, y, 240), style="raw"), Series(*thin(x, _smooth(y), 240), style="after")]
            panels.append(panel("Training loss", series, x_label="step", x_range=(0.0, last)))
        rate = [(s, float(rows[s]["lr"])) for s in steps if _known(rows[s].get("lr"))]
        if len(rate) > 1:
            line = Series(*thin([s for s, _ in rate], [v for _, v in rate], 120), style="after")
            top = max(v for _, v in rate) * 1.06 or 1.0
            panels.append(panel("Learning rate", [line], x_label="step", x_range=(0.0, last), y_range=(0.0, top)))
    facts = record.results.get("training") or {}
    monitor = _monitor(record, checks)
    best = facts.get("best_step")
    if monitor is not None and checked:
        points = [(s, float(checks[s][monitor])) for s in checked if _known(checks[s].get(monitor))]
        line = Series([s for s, _ in points], [v for _, v in points], "after", dotted=True)
        marks = [(float(best), f"chosen: step {best:,}", "chosen")] if _known(best) else []
        panels.append(
            panel(f"Validation {_metric(monitor)}", [line], x_label="step", x_range=(0.0, last), marks=marks)
        )
    blend = facts.get("wise_ft") if isinstance(facts.get("wise_ft"), Mapping) else {}
    curve = [p for p in blend.get("curve") or [] if _known(p.get("weight"))]
    name = next((m for m in (monitor, "map@r") if m and curve and all(_known(p.get(m)) for p in curve)), None)
    if len(curve) > 1 and name is not None:
        line = Series([p["weight"] for p in curve], [p[name] for p in curve], "after", dotted=True)
        marks = [(float(blend["weight"]), f"chosen: {blend['weight']:g}", "chosen")] if _known(blend.get("weight")) else []
        panels.append(
            panel(
                f"Interpolation, validation {_metric(name)}",
                [line],
                x_label="0 = original weights, 1 = tuned weights",
                marks=marks,
            )
        )
    return {"panels": panels} if panels else None


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
    if _known(data.get("images")):
        more = _count(int(data["classes"]), "class") if _known(data.get("classes")) else ""
        facts.append({"name": "Data", "value": _count(int(data["images"]), "image"), "more": more})
    trained, total = training.get("trained_parameters"), training.get("total_parameters")
    if _known(trained):
        more = f"{100 * trained / total:.1f} % of {_large(total)}" if _known(total) and total else ""
        facts.append({"name": "Trained parameters", "value": _large(trained), "more": more})
    if _known(training.get("steps")):
        seconds = training.get("seconds")
        more = f"{_duration(seconds)}" if _known(seconds) else ""
        facts.append({"name": "Steps", "value": f"{training['steps']:,}", "more": more})
    return facts


def _large(number: float) -> str:
    """A large number, short: 92,160 stays, 5,616,576 is 5.62 M."""
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:.3g} M" if number < 1e9 else f"{number / 1e9:.3g} G"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _fact_groups(results: Results) -> list[dict[str, Any]]:
    """Everything else the run recorded, whatever its keys are: nothing is dropped because a name is new."""
    shown_elsewhere = {"before", "after", "difference"}
    groups = []
    titles = {"data": "Data", "model": "Model", "training": "Training", "environment": "Environment"}
    for key, title in titles.items():
        skip = {"skipped", "notes"} if key == "data" else {"wise_ft"} if key == "training" else set()
        given = results.get(key)
        rows = _flatten({k: v for k, v in given.items() if k not in skip}) if isinstance(given, Mapping) else []
        blend = given.get("wise_ft") if key == "training" and isinstance(given, Mapping) else None
        if isinstance(blend, Mapping) and _known(blend.get("weight")):
            rows.append(("weight of the tuned model (WiSE-FT)", blend["weight"]))
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


def _notes(record: Record, views: Mapping[str, _View]) -> dict[str, Any]:
    """What a reader must know of the data: skipped images, classes of one image, notes of the run."""
    data = record.results.get("data") or {}
    skipped = []
    for one in data.get("skipped") or []:
        name, reason = (one, "") if isinstance(one, str) else (str(one[0]), " ".join(map(str, one[1:])))
        skipped.append({"name": name, "reason": reason})
    lone = [{"part": name, "classes": view.lone[:60], "count": len(view.lone)} for name, view in views.items() if view.lone]
    return {"skipped": skipped[:200], "skipped_count": len(skipped), "notes": list(data.get("notes") or []), "lone": lone}
