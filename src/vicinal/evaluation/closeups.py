"""What the report shows of the embeddings themselves: neighbours, classes, prototypes, similarities.

Whatever is sampled is sampled with the run's seed and bounded: queries (`POOL`), pairs (`PAIRS`), classes of the heat
map (`HEAT_CLASSES`), pictures (`THUMBNAIL` pixels, `PICTURE_BYTES` characters for all of them together).

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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vicinal.evaluation.charts import Series, density, panel
from vicinal.evaluation.metrics import retrieval_values, topk
from vicinal.evaluation.wording import as_number, part_order
from vicinal.types import Embeddings

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "PICTURE_BYTES",
    "POOL",
    "TEMPERATURE",
    "THUMBNAIL",
    "Album",
    "View",
    "class_table",
    "entropy",
    "gallery",
    "heat",
    "similarity",
    "views",
]

POOL = 4096
PAIRS = 20_000
HEAT_CLASSES = 8
NEIGHBOURS = 5
TEMPERATURE = 0.05
THUMBNAIL = 96
PICTURE_BYTES = 2_000_000


@dataclass(frozen=True, slots=True)
class Side:
    """One model's embeddings of a part, and its K nearest neighbours and scores for the sampled queries."""

    name: str
    label: str
    embeddings: Embeddings
    rows: Int[Tensor, "P K"]
    cosines: Float[Tensor, "P K"]
    hit: Bool[Tensor, "P"]
    map_at_r: Float[Tensor, "P"]


@dataclass(frozen=True, slots=True)
class View:
    """One part as the page looks at it: sides with equal rows, and the rows that were sampled as queries."""

    part: str
    pool: Int[Tensor, "P"]
    sides: tuple[Side, ...]
    eligible: int

    @property
    def classes(self) -> str:
        """What its classes are called."""
        return f"{self.part} classes" if self.part in ("seen", "unseen") else "classes"

    @property
    def first(self) -> Embeddings:
        """What was measured first; labels, ids and classes are the same on all sides."""
        return self.sides[0].embeddings

    @property
    def last(self) -> Side:
        """The adapted model, or the only one."""
        return self.sides[-1]


def views(before: Mapping[str, Embeddings], after: Mapping[str, Embeddings], seed: int) -> list[View]:
    """The parts to look at closely: unseen and seen; or the first that there is, where there is neither."""
    found: list[View] = []
    for part in sorted({*before, *after}, key=part_order):
        if (part in ("unseen", "seen") or not found) and (view := _view(before, after, part, seed)) is not None:
            found.append(view)
    return found


def _view(before: Mapping[str, Embeddings], after: Mapping[str, Embeddings], part: str, seed: int) -> View | None:
    """Bring the two sides to the same rows, sample queries that can be right at all, and find their neighbours."""
    given = {name: side[part] for name, side in (("before", before), ("after", after)) if part in side}
    if len(given) == 2 and given["before"].ids != given["after"].ids:
        place = {name: i for i, name in enumerate(given["after"].ids)}
        both = [(i, place[name]) for i, name in enumerate(given["before"].ids) if name in place]
        picked = torch.tensor(both, dtype=torch.int64).reshape(-1, 2)
        given = {name: _take(e, picked[:, column]) for column, (name, e) in enumerate(given.items())}
    one = next(iter(given.values()))
    sizes = torch.bincount(one.labels, minlength=len(one.classes))
    eligible = (sizes[one.labels] > 1).nonzero().flatten()
    if len(eligible) == 0:
        return None
    order = torch.randperm(len(eligible), generator=torch.Generator().manual_seed(seed))[:POOL]
    pool = eligible[order.sort().values]
    labels = {"before": "before", "after": "after"} if len(given) == 2 else dict.fromkeys(given, "measured")
    sides = tuple(_side(name, labels[name], embeddings, pool) for name, embeddings in given.items())
    return View(part, pool, sides, len(eligible))


def _take(embeddings: Embeddings, rows: Int[Tensor, "n"]) -> Embeddings:
    ids = tuple(embeddings.ids[i] for i in rows.tolist())
    return Embeddings(embeddings.vectors[rows], embeddings.labels[rows], ids, embeddings.classes)


def _side(name: str, label: str, embeddings: Embeddings, pool: Int[Tensor, "P"]) -> Side:
    """Neighbours and MAP@R of the sampled queries among all items of the part, each query itself left out."""
    vectors, labels = embeddings.vectors.float(), embeddings.labels
    cosines, rows = topk(vectors[pool], vectors, min(NEIGHBOURS, len(embeddings) - 1), exclude=pool)
    values = retrieval_values(vectors[pool], labels[pool], vectors, labels, ks=(1,), exclude=pool)
    return Side(name, label, embeddings, rows, cosines, labels[rows[:, 0]] == labels[pool], values["map@r"])


# ---------------------------------------------------------------------------------------------------------- pictures


class Album:
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


def _tile(view: View, row: int, album: Album, size: int = THUMBNAIL) -> dict[str, Any]:
    name = view.first.ids[row]
    label = view.first.classes[int(view.first.labels[row])]
    return {"uri": album.uri(name, size), "label": label, "id": name}


def gallery(view: View, album: Album, seed: int) -> dict[str, Any]:
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
        most = {"kept": 4, "wrong": 4}
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
        "noun": view.classes,
        "queries": len(view.pool),
        "eligible": view.eligible,
        "groups": groups,
        "bar": sorted(groups, key=lambda group: order.index(str(group["key"]))),
    }


def _gallery_row(view: View, position: int, album: Album) -> dict[str, Any]:
    row = int(view.pool[position])
    label = int(view.first.labels[row])
    sides = []
    for side in view.sides:
        neighbours = []
        for found, cosine in zip(side.rows[position].tolist(), side.cosines[position].tolist(), strict=True):
            hit = int(view.first.labels[found]) == label
            neighbours.append(_tile(view, found, album) | {"hit": hit, "cosine": cosine})
        sides.append({"name": side.label, "neighbours": neighbours})
    return {"query": _tile(view, row, album), "sides": sides}


# -------------------------------------------------------------------------------------------------------- prototypes


def _present(labels: Int[Tensor, "N"]) -> tuple[Int[Tensor, "C"], Int[Tensor, "N"]]:
    """The labels that occur, in order, and each row's position among them."""
    occurs = torch.bincount(labels) > 0
    return occurs.nonzero().flatten(), (occurs.cumsum(0) - 1)[labels]


def _sums(embeddings: Embeddings) -> tuple[Float[Tensor, "C D"], Int[Tensor, "N"]]:
    """The sum of the unit vectors of each class that occurs, and each row's position among these classes."""
    present, position = _present(embeddings.labels)
    sums = torch.zeros(len(present), embeddings.vectors.shape[1])
    return sums.index_add_(0, position, embeddings.vectors.float()), position


def heat(view: View, album: Album, seed: int) -> dict[str, Any] | None:
    """Cosines between the prototypes of a few seeded classes, before and after, with the mean over all pairs."""
    present, position = _present(view.first.labels)
    if len(present) < 2:
        return None
    chosen = sorted(random.Random(f"{seed}/heat").sample(range(len(present)), min(HEAT_CLASSES, len(present))))
    first_row = {c: int((position == c).nonzero()[0]) for c in chosen}
    tiles = [_tile(view, first_row[c], album, THUMBNAIL // 2) for c in chosen]
    sides = []
    for side in view.sides:
        unit = torch.nn.functional.normalize(_sums(side.embeddings)[0], dim=1)
        count = len(unit)
        # the mean over pairs i != j of mu_i . mu_j is (|sum mu|^2 - C) / (C (C - 1)): no C x C matrix
        mean = float((unit.double().sum(0).square().sum() - count) / (count * (count - 1)))
        cosine = (unit[chosen] @ unit[chosen].T).clamp(-1, 1)
        off = cosine[~torch.eye(len(chosen), dtype=torch.bool)]
        sides.append(
            {
                "name": side.label,
                "cells": cosine.tolist(),
                "mean": mean,
                "low": float(off.min()),
                "high": float(off.max()),
            }
        )
    return {"noun": view.classes, "tiles": tiles, "sides": sides, "classes": len(present)}


def entropy(view: View) -> dict[str, Any] | None:
    """The entropy of the softmax over prototypes, for the sampled queries."""
    classes = len(_present(view.first.labels)[0])
    if classes < 2:
        return None
    values = [(side, _entropies(side.embeddings, view.pool)) for side in view.sides]
    top = math.log(classes)
    series, marks = [], []
    for side, nats in values:
        x, y = density(nats, 0.0, top, bins=60)
        series.append(Series([math.exp(v) for v in x], y, side.name, filled=True))
        middle = math.exp(float(nats.median()))
        marks.append((middle, f"{side.label} {middle:,.1f}", side.name))
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
        {
            "name": side.label,
            "mean": float(v.mean()),
            "share": float(v.mean()) / top,
            "effective": math.exp(float(v.median())),
        }
        for side, v in values
    ]
    return {
        "noun": view.classes,
        "chart": chart,
        "rows": rows,
        "classes": classes,
        "queries": len(view.pool),
        "top": top,
    }


def _entropies(embeddings: Embeddings, pool: Int[Tensor, "P"], block: int = 256) -> Float[Tensor, "P"]:
    """H of each query, in nats; a query's own class is represented by its other images alone."""
    sums, position = _sums(embeddings)
    prototypes = torch.nn.functional.normalize(sums, dim=1)
    found = []
    for start in range(0, len(pool), block):
        part = pool[start : start + block]
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


def similarity(view: View, seed: int) -> dict[str, Any] | None:
    """Cosines of same-class and of different-class pairs; the same pairs before and after."""
    pairs = _pairs(view.first.labels, seed)
    if pairs is None:
        return None
    found = []
    for side in view.sides:
        vectors = side.embeddings.vectors.float()
        same, different = ((vectors[p[:, 0]] * vectors[p[:, 1]]).sum(1) for p in pairs)
        found.append((side.label, same, different))
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
                f"{name.capitalize()}: AUROC {as_number(area)}",
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
            {
                "name": name,
                "auroc": area,
                "overlap": overlap,
                "same": float(same.mean()),
                "other": float(different.mean()),
            }
        )
    return {"noun": view.classes, "panels": panels, "rows": rows, "same": len(pairs[0]), "different": len(pairs[1])}


# --------------------------------------------------------------------------------------------------------- per class


def class_table(view: View, album: Album, most: int = 8) -> dict[str, Any] | None:
    """The classes that gained and lost most in MAP@R."""
    if len(view.sides) < 2:
        return None
    present, position = _present(view.first.labels[view.pool])
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
    counts = [
        ("better", int(better.sum())),
        ("unchanged", len(present) - len(gains) - len(losses)),
        ("worse", len(losses)),
    ]
    return {
        "noun": view.classes,
        "gains": rows(gains[:most]),
        "losses": rows(losses[:most]),
        "counts": [{"key": key, "count": n, "share": n / len(present)} for key, n in counts],
        "classes": len(present),
        "whole": len(view.pool) == view.eligible,
    }
