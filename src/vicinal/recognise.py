"""Recognition over folders and tables: what is in these pictures, and how often that is right.

`recognise` writes what was found in every picture: matches.json, matches.csv, drawings, and a sheet of the first of
them. `measure` compares the answers with a table that knows the truth:

    an object and a box are one where their intersection over union is at least IOU, one to one, best box first
    TP   a box on an object, accepted as the object's class
    FP   any other box that is accepted: as another class, on an object without references, or on nothing
    P = TP / (TP + FP),   R = TP / objects whose class has references,   F1 = 2 TP / (TP + FP + those objects)

A wrong name thus costs twice: a false positive, and the object that is still missed. `fpir` is the share accepted of
what should be unknown: objects of classes without references, and boxes on nothing. Whole classes are resampled for the
intervals; a box on nothing counts with the class of the first object of its picture.

Letters: Q answers that are judged: the objects, then the boxes on nothing.
"""

from __future__ import annotations

import csv
import difflib
import json
import math
import random
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from vicinal.bring import bring_path, bring_pictures, holds_voc, starting_model
from vicinal.data.images import image_size
from vicinal.data.manifest import IMAGE_ENDINGS, Manifest
from vicinal.data.sources import read_folder, read_table, read_voc
from vicinal.evaluation.intervals import mean
from vicinal.evaluation.scores import plain
from vicinal.evaluation.verification import UNDEFINED, decision_differences, decisions
from vicinal.ground import Say
from vicinal.models.encoder import Encoder
from vicinal.serving.detectors import load_detector
from vicinal.serving.index import Index
from vicinal.serving.matching import Fusion, Matcher
from vicinal.serving.objects import THRESHOLD_NAME, Answer, Box, ObjectMatcher, draw, open_encoder
from vicinal.types import InputError, Metrics, PerQuery

__all__ = [
    "Judged",
    "Scenes",
    "Settings",
    "compare",
    "judge",
    "match_pictures",
    "measure",
    "measure_models",
    "open_models",
    "read_references",
    "read_truth",
    "recognise",
]

ALIKE = 0.9999  # a cosine from which on an object may well be the very picture of a reference
IOU = 0.5  # from which on a box is on an object
ON_SHEET = 24
SHOWN = ("precision", "recall", "f1", "fpir")
FIELDS = (
    *("image", "x0", "y0", "x1", "y1", "box_score", "kind"),
    *("label", "score", "best", "second", "margin", "stranger_share", "reference", "cosine"),
)


# ---- what is asked


@dataclass(frozen=True, slots=True)
class Scenes:
    """Pictures, each once, with the boxes and classes that a table has for them.

    Args:
        paths: the files.
        names: what they are called in what is written: their paths in the table or folder.
        boxes: of each picture; empty where the table has none for it.
        labels: the class of each box.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    boxes: tuple[tuple[Box, ...], ...]
    labels: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, manifest: Manifest, *, whole: bool = False) -> Scenes:
        """The rows of a manifest by picture.

        Args:
            manifest: N rows, one a picture or a box.
            whole: whether a row without a box is a box around all of its picture.
        """
        names = manifest.column("image")
        boxes = manifest.column("box") if "box" in manifest.names() else [None] * len(names)
        labels = manifest.column("label") if manifest.classes else [""] * len(names)
        rows: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            rows.setdefault(name, []).append(i)
        paths = {name: manifest.path(some[0]) for name, some in rows.items()}
        around = {
            name: (0.0, 0.0, float(size[1]), float(size[0]))
            for name, some in rows.items()
            if whole and any(boxes[i] is None for i in some)
            for size in [image_size(paths[name])]
        }
        found: dict[str, list[Box]] = {name: [] for name in rows}
        named: dict[str, list[str]] = {name: [] for name in rows}
        for name, box, label in zip(names, boxes, labels, strict=True):
            if box is not None or whole:
                found[name].append(around[name] if box is None else (box[0], box[1], box[2], box[3]))
                named[name].append(label)
        return cls(
            tuple(paths.values()),
            tuple(rows),
            tuple(tuple(some) for some in found.values()),
            tuple(tuple(some) for some in named.values()),
        )

    def __len__(self) -> int:
        return len(self.paths)

    def drawn(self, count: int | None, seed: int) -> Scenes:
        """As many pictures, drawn by seed, in the order they stand in; all where `count` is None or too many."""
        if count is not None and count < 1:
            raise InputError(f"{count} pictures are none; give one at least, or leave the number away for all")
        if count is None or count >= len(self):
            return self
        rows = sorted(random.Random(seed).sample(range(len(self)), count))
        columns = (self.paths, self.names, self.boxes, self.labels)
        return Scenes(*(tuple(column[i] for i in rows) for column in columns))  # type: ignore[arg-type]


def read_references(path: str | Path, columns: Mapping[str, str] | None = None) -> Manifest | Index | Matcher:
    """References of each class: a folder of class folders, any table, an index (.index) or a matcher (.matcher).

    Args:
        path: where they are. Of a database of `vicinal prepare --format logos`, the references of its test brands.
        columns: of a table, see `read_table`.

    Raises:
        InputError: nothing is there, or pictures without classes.
    """
    path = Path(path).expanduser()
    if path.suffix == ".matcher":
        return Matcher.load(path)
    if path.suffix == ".index":
        return Index.load(path)
    manifest = bring_path(path, columns)[1]
    if "role" in manifest.names():
        manifest = _only(_only(manifest, "split", "test"), "role", "reference").compact()
    if not manifest.classes:
        raise InputError(f"{path}: a reference needs a class; put each class's pictures into a folder of its name")
    return manifest


def read_truth(
    path: str | Path, columns: Mapping[str, str] | None = None, *, count: int | None = None, seed: int = 42
) -> Scenes:
    """Pictures whose objects are known: VOC, COCO, a table, or what `vicinal prepare --format logos` wrote.

    Args:
        path: where they are. Where a split column has test rows, these; a row without a box is a whole picture.
        columns: of a table, see `read_table`.
        count: pictures, drawn by seed. None: all.
        seed: of the draw.

    Raises:
        InputError: nothing is there, or rows without a class.
    """
    manifest = bring_path(path, columns)[1]
    if not manifest.classes:
        raise InputError(f"{path}: the truth needs a class for each object; name its column: --column label=NAME")
    if "split" in manifest.names() and "test" in set(manifest.column("split")):
        manifest = _only(manifest, "split", "test")
    if "role" in manifest.names():
        manifest = _only(manifest, "role", "query")
    return Scenes.of(manifest, whole=True).drawn(count, seed)


def _refuse_own(references: Manifest | Index | Matcher, scenes: Scenes) -> None:
    """An object that is its own reference would find itself. Of an index or a matcher `ALIKE` tells, after the fact."""
    if not isinstance(references, Manifest):
        return
    boxes = references.column("box") if "box" in references.names() else [None] * len(references)
    given = {(references.path(row).resolve(), None if box is None else tuple(box)) for row, box in enumerate(boxes)}
    both = [
        name
        for path, name, own in zip(scenes.paths, scenes.names, scenes.boxes, strict=True)
        if any((path.resolve(), box) in given for box in (None, *own))
    ]
    if both:
        raise InputError(
            f"{len(both)} pictures of the truth are references too, the first {both[0]}, and would find themselves: "
            "take them out of one side"
        )


def _only(manifest: Manifest, column: str, value: str) -> Manifest:
    return manifest.where(np.array([one == value for one in manifest.column(column)], dtype=bool))


def open_models(models: Sequence[str], *, size: int | None = None, baseline: bool = False) -> dict[str, Encoder]:
    """Embedding models by the name they are called by.

    Args:
        models: what `open_encoder` takes.
        size: of the input in pixels. None: as they were trained.
        baseline: before each run, what it began with.

    Raises:
        InputError: a model cannot be opened; a baseline of what is no run.
    """
    opened: dict[str, Encoder] = {}
    for model in models:
        if baseline:
            start = starting_model(model)
            opened[f"{start.source} (before {model})"] = start
        opened[model] = open_encoder(model, size=size)
    return opened


# ---- what is in these pictures


def recognise(matcher: ObjectMatcher, scenes: Scenes, out: str | Path, *, pictures: bool = True) -> dict[str, int]:
    """Find and name what is in each picture, and write it.

    Into `out` come matches.json (all that is known of each box, and which references decided), matches.csv (a row for
    each box), and with `pictures` the folder pictures/ and sheet.jpg, the first of them on one page. Files of an
    earlier call are replaced, once the new ones are whole. Why a picture could not be read stands in matches.json.

    Args:
        matcher: detector, model and references.
        scenes: the pictures; where the matcher has no detector, those with boxes are cut by them.
        out: the folder.
        pictures: whether they are drawn.

    Returns:
        How many pictures, objects, known and unknown ones there were, and how many pictures were left out.
    """
    out = Path(out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    parts = {name: out / f".{name}.part" for name in ("matches.json", "matches.csv", "pictures")}
    shutil.rmtree(parts["pictures"], ignore_errors=True)
    counts = {"pictures": 0, "objects": 0, "known": 0, "unknown": 0, "left_out": 0}
    shown: list[Image.Image] = []
    with (
        parts["matches.json"].open("w", encoding="utf-8") as as_json,
        parts["matches.csv"].open("w", encoding="utf-8", newline="") as as_csv,
    ):
        table = csv.DictWriter(as_csv, FIELDS)
        table.writeheader()
        about = matcher.about | ({"detector": "boxes given"} if _given(matcher, scenes) else {})
        head = json.dumps({"about": about, "pictures": []}, indent=1, ensure_ascii=False)
        as_json.write(head.removesuffix("[]\n}") + "[")
        asked = matcher.stream(scenes.paths, boxes=_given(matcher, scenes))
        for n, answer in enumerate(asked):
            plain = {**answer.to_dict(), "image": scenes.names[n]}
            as_json.write(("," if n else "") + "\n" + json.dumps(plain, ensure_ascii=False))
            table.writerows(_rows(scenes.names[n], answer))
            counts["pictures"] += 1
            counts["objects"] += len(answer)
            counts["unknown"] += len(answer.unknown)
            counts["left_out"] += answer.error is not None
            if pictures and answer.error is None:
                drawing = draw(scenes.paths[n], answer)
                file = _free(parts["pictures"] / _inside(scenes.names[n]))
                file.parent.mkdir(parents=True, exist_ok=True)
                drawing.save(file, quality=88)
                if len(shown) < ON_SHEET:
                    drawing.thumbnail((480, 480))
                    shown.append(drawing)
        counts["known"] = counts["objects"] - counts["unknown"]
        as_json.write(f'\n],\n"counts": {json.dumps(counts)}\n}}\n')
    if pictures:
        shutil.rmtree(out / "pictures", ignore_errors=True)
        if shown:
            sheet(shown).save(out / "sheet.jpg", quality=88)
    for name, part in parts.items():
        if part.exists():
            part.replace(out / name)
    return counts


def _given(matcher: ObjectMatcher, scenes: Scenes) -> Sequence[Sequence[Box]] | None:
    """The boxes of the table, where there is no detector to find others."""
    return scenes.boxes if matcher.tiled and any(scenes.boxes) else None


def _rows(name: str, answer: Answer) -> Iterable[dict[str, Any]]:
    for one in answer.to_dict()["objects"]:
        first = one["references"][0] if one["references"] else {"id": None, "cosine": None}
        corners = dict(zip(("x0", "y0", "x1", "y1"), one["box"], strict=True))
        told = ("box_score", "kind", "label", "score", "best", "second", "margin", "stranger_share")
        kept = {key: one[key] for key in told}
        yield {"image": name, **corners, **kept, "reference": first["id"], "cosine": first["cosine"]}


def _inside(name: str) -> Path:
    """Where a picture's drawing lies: as the picture does, but never outside of the folder."""
    parts = [part for part in Path(name).with_suffix(".jpg").parts if part not in ("..", "/", Path(name).anchor)]
    return Path(*parts)


def _free(file: Path) -> Path:
    """The file, or where a.png and a.jpg meet, one beside it."""
    n = 2
    while file.exists():
        file = file.with_name(f"{file.stem.removesuffix(f'-{n - 1}')}-{n}.jpg")
        n += 1
    return file


def sheet(pictures: Sequence[Image.Image], *, columns: int = 4, width: int = 480) -> Image.Image:
    """Pictures side by side on one page, row by row.

    Args:
        pictures: one at least.
        columns: pictures a row.
        width: of each, in pixels; the height of a row is that of its tallest.
    """
    scaled = [one.resize((width, max(1, round(one.height * width / one.width)))) for one in pictures]
    left = iter(scaled)
    rows = []
    while row := list(islice(left, columns)):
        rows.append(row)
    gap = 8
    page_width = min(columns, len(scaled)) * (width + gap) + gap
    page = Image.new("RGB", (page_width, sum(max(p.height for p in row) + gap for row in rows) + gap), "white")
    y = gap
    for row in rows:
        for i, one in enumerate(row):
            page.paste(one, (gap + i * (width + gap), y))
        y += max(p.height for p in row) + gap
    return page


# ---- how often that is right


@dataclass(frozen=True, slots=True)
class Judged:
    """Answers beside the truth.

    Args:
        accepted: "Q", whether the matcher named it at all.
        right: "Q", whether the best class is the object's; False for a box on nothing.
        enrolled: "Q", whether the object's class has references; False for a box on nothing.
        units: "Q", the class of each, as a position in `classes`: what is resampled.
        found: "Q", whether the object has a box; of a box on nothing False.
        objects: "Q", whether it is an object; else a box on nothing.
        classes: the names of the units.
        pictures: how many there were.
        left_out: pictures that could not be read, with the reason; their objects are missed.
        alike: pictures with an object that is all but equal to a reference that decided.
    """

    accepted: Bool[Tensor, "Q"]
    right: Bool[Tensor, "Q"]
    enrolled: Bool[Tensor, "Q"]
    units: Int[Tensor, "Q"]
    found: Bool[Tensor, "Q"]
    objects: Bool[Tensor, "Q"]
    classes: tuple[str, ...]
    pictures: int
    left_out: tuple[tuple[str, str], ...] = ()
    alike: tuple[str, ...] = ()

    @classmethod
    def together(cls, *parts: Judged) -> Judged:
        """Several askings about the same pictures as one: with one half of the classes enrolled, then with the other.

        Raises:
            ValueError: they are of other pictures.
        """
        if len({(part.classes, part.pictures) for part in parts}) != 1:
            raise ValueError("these are judgements of different pictures")
        return cls(
            accepted=torch.cat([part.accepted for part in parts]),
            right=torch.cat([part.right for part in parts]),
            enrolled=torch.cat([part.enrolled for part in parts]),
            units=torch.cat([part.units for part in parts]),
            found=torch.cat([part.found for part in parts]),
            objects=torch.cat([part.objects for part in parts]),
            classes=parts[0].classes,
            pictures=parts[0].pictures,
            left_out=parts[0].left_out,
            alike=tuple(dict.fromkeys(name for part in parts for name in part.alike)),
        )


def judge(matcher: ObjectMatcher, truth: Scenes, *, boxes: Literal["found", "given"]) -> Judged:
    """Ask about each picture, and set the answers beside the truth.

    Args:
        matcher: detector, model and references.
        truth: pictures with the boxes and classes of their objects.
        boxes: "found": by the matcher's detector, or its tiles; "given": those of the truth, so that nothing is missed.

    Raises:
        InputError: not one class of the truth has a reference.
    """
    if matcher.matcher is None:
        raise InputError("there are no references, so nothing can be named; give some of each class")
    known = set(matcher.matcher.present)
    classes = tuple(sorted({label for labels in truth.labels for label in labels}))
    if not known & set(classes):
        near = [f"{c} ({m[0]}?)" for c in classes[:200] if (m := difflib.get_close_matches(c, known, 1, 0.8))]
        raise InputError(
            f"not one of the {len(classes)} classes of the truth ({', '.join(classes[:5])}, …) has a reference; the "
            f"references show {', '.join(sorted(known)[:5])}, …"
            + (f". Spell them alike: {', '.join(near[:5])}" if near else "")
        )
    place = {name: i for i, name in enumerate(classes)}
    rows: list[tuple[bool, bool, bool, int, bool]] = []
    on_nothing: list[tuple[bool, bool, bool, int, bool]] = []
    alike: list[str] = []
    given = truth.boxes if boxes == "given" else None
    for n, answer in enumerate(matcher.stream(truth.paths, boxes=given)):
        labels = truth.labels[n]
        if any(cosine >= ALIKE for one in answer for _, cosine in one.references):
            alike.append(truth.names[n])
        if given is None:
            answers = _one_to_one(answer, truth.boxes[n])
        else:
            answers = list(range(len(labels))) if answer.error is None else [None] * len(labels)
        for label, at in zip(labels, answers, strict=True):
            one = None if at is None else answer.objects[at]
            accepted = one is not None and one.label is not None
            right = one is not None and one.best == label
            rows.append((accepted, right, label in known, place[label], one is not None))
        used = {at for at in answers if at is not None}
        on_nothing += [
            (one.label is not None, False, False, place[labels[0]], False)
            for i, one in enumerate(answer.objects)
            if i not in used and labels
        ]
    columns = [torch.tensor(column) for column in zip(*rows, *on_nothing, strict=True)]
    return Judged(
        accepted=columns[0],
        right=columns[1],
        enrolled=columns[2],
        units=columns[3],
        found=columns[4],
        objects=torch.arange(len(columns[0])) < len(rows),
        classes=classes,
        pictures=len(truth),
        left_out=tuple(matcher.skipped),
        alike=tuple(alike),
    )


def _one_to_one(answer: Answer, boxes: Sequence[Box]) -> list[int | None]:
    """Which object of the answer stands on each box: the best-scored first, each on its nearest free box."""
    taken: list[int | None] = [None] * len(boxes)
    if not answer.objects or not boxes:
        return taken
    iou = box_iou(torch.tensor(answer.boxes), torch.tensor(boxes))
    for i in sorted(range(len(answer.objects)), key=lambda i: -answer.objects[i].box_score):
        free = [(float(iou[i, j]), -j) for j in range(len(boxes)) if taken[j] is None]
        if free and max(free)[0] >= IOU:
            taken[-max(free)[1]] = i
    return taken


def measure(judged: Judged, *, resamples: int = 2000, seed: int = 0) -> Metrics:
    """Precision, recall, F1, fpir and fnir, with intervals over classes, and how well boxes were found.

    Args:
        judged: what `judge` gave.
        resamples: of the bootstrap.
        seed: of the resampling.

    Returns:
        What `evaluation.verification.decisions` has; `recall_macro`, the mean of the classes' recalls; `box_recall`,
        the share of objects with a box, and `box_precision`, the share of boxes on an object.
    """
    answers = decisions(
        judged.accepted.double(),
        judged.right,
        judged.units,
        threshold=0.5,
        enrolled=judged.enrolled,
        resamples=resamples,
        seed=seed,
    )
    hit = torch.where(judged.enrolled, (judged.accepted & judged.right).double(), torch.nan)
    macro = mean(PerQuery({"recall_macro": hit[None]}, judged.units, macro=True), resamples=resamples, seed=seed)
    values = {
        "box_recall": torch.where(judged.objects, judged.found.double(), torch.nan)[None],
        "box_precision": torch.where(judged.objects & ~judged.found, torch.nan, judged.found.double())[None],
    }
    return {**answers, **macro, **mean(PerQuery(values, judged.units), resamples=resamples, seed=seed)}


def compare(before: Judged, after: Judged, *, resamples: int = 2000, seed: int = 0) -> Metrics:
    """What a second model changes, after - before, on the same objects and boxes.

    Args:
        before: of one model.
        after: of another, for the same pictures and by the same detector, or by the same given boxes.
        resamples: of the bootstrap.
        seed: of the resampling.

    Raises:
        InputError: other objects, boxes or references: tiles that are kept, for instance, depend on the model.
    """
    same = torch.equal(before.units, after.units) and torch.equal(before.enrolled, after.enrolled)
    if not same or before.classes != after.classes:
        raise InputError("the two models were not asked about the same boxes and classes, so nothing is paired")
    return decision_differences(
        (before.accepted.double(), before.right),
        (after.accepted.double(), after.right),
        before.units,
        thresholds=(0.5, 0.5),
        enrolled=before.enrolled,
        resamples=resamples,
        seed=seed,
    )


# ---- the verb


@dataclass(frozen=True, slots=True)
class Settings:
    """What `vicinal match` is told beside pictures and models; see `ObjectMatcher`.

    Args:
        references: where they are, see `read_references`.
        detector: a folder or Hub id. None: the boxes of the table, or tiles.
        thresholds: a number or a file for each model, or one for all. Empty: what lies beside each model.
        fusion: as k and margin, None: as the threshold was fitted, else the matcher's own default.
        k: of the fusion.
        margin: of the second class.
        detect_threshold: score of a box from which on it is looked at.
        overlap: of two boxes, beyond which the better one stays.
        pad: by which share a box is widened. None: a detector's by 0.08, given ones not.
        size: of the embedding model's input.
        device: "auto", "cpu", "cuda:0", …
        columns: of tables, see `read_table`.
    """

    references: Path
    detector: str | None = None
    thresholds: tuple[str, ...] = ()
    fusion: str | None = None
    k: int | None = None
    margin: float | None = None
    detect_threshold: float = 0.5
    overlap: float = 0.7
    pad: float | None = None
    size: int | None = None
    device: str = "auto"
    columns: Mapping[str, str] | None = None

    def matchers(self, models: Mapping[str, Encoder], places: Sequence[str]) -> Iterable[tuple[str, ObjectMatcher]]:
        """One matcher after another, all with the same references and one detector.

        Args:
            models: encoders by name.
            places: where each lies, for the threshold beside it; "" for none.

        Raises:
            InputError: another number of thresholds than of models; what `ObjectMatcher` refuses.
        """
        if len(self.thresholds) not in (0, 1, len(models)):
            raise InputError(
                f"{len(self.thresholds)} thresholds for {len(models)} models ({', '.join(models)}): give "
                "one for all, or one for each in this order"
            )
        fusion = self.fusion
        if fusion is not None and fusion not in get_args(Fusion):
            raise InputError(f"fusion: {fusion!r} is unknown; there are {', '.join(get_args(Fusion))}")
        references = read_references(self.references, self.columns)
        detector = None
        if self.detector is not None:
            detector = load_detector(self.detector, threshold=self.detect_threshold, device=self.device)
        for i, (name, encoder) in enumerate(models.items()):
            given = self.thresholds[min(i, len(self.thresholds) - 1)] if self.thresholds else None
            beside = Path(places[i]).expanduser() / THRESHOLD_NAME
            yield (
                name,
                ObjectMatcher(
                    detector,
                    embedding_model=encoder,
                    references=references,
                    threshold=_threshold(given) if given is not None else beside if beside.is_file() else None,
                    fusion=cast("Fusion | None", fusion),
                    k=self.k,
                    margin=self.margin,
                    overlap=self.overlap,
                    pad=self.pad,
                    device=self.device,
                ),
            )


def _threshold(given: str) -> float | Path:
    try:
        return float(given)
    except ValueError:
        return Path(given)


def match_pictures(
    sources: Sequence[str | Path],
    models: Sequence[str],
    settings: Settings,
    *,
    out: Path,
    pictures: bool,
    say: Say = print,
) -> None:
    """`vicinal match PICTURES`: one model, answers into a folder.

    Raises:
        InputError: several models; pictures, references, model, detector or threshold cannot be used.
    """
    if len(models) != 1:
        raise InputError("several models are compared with --truth; to name pictures, give one")
    scenes = Scenes.of(_pictures(sources, settings.columns, boxes=settings.detector is None))
    opened = open_models(models, size=settings.size)
    [(_, matcher)] = settings.matchers(opened, models)
    if matcher.matcher is not None and matcher.matcher.threshold is None:
        say("no threshold is given, so every box gets its nearest class: fit one with `vicinal calibrate`")
    if matcher.tiled and _given(matcher, scenes) is None:
        say("no detector is named, so tiles of each picture are looked at, and what is unknown is not told")
    counts = recognise(matcher, scenes, out, pictures=pictures)
    say(
        f"{out}: {counts['pictures']:,} pictures, {counts['objects']:,} objects: {counts['known']:,} known, "
        f"{counts['unknown']:,} unknown" + (f"; {counts['left_out']:,} pictures left out" if counts["left_out"] else "")
    )


def _pictures(sources: Sequence[str | Path], columns: Mapping[str, str] | None, *, boxes: bool) -> Manifest:
    """Picture files, every picture below a folder, or a table with or without classes; `boxes`: of VOC, where it is."""
    one = Path(sources[0]).expanduser() if len(sources) == 1 else None
    if one is not None and one.is_dir():
        return read_voc(one) if boxes and holds_voc(one) else read_folder(one, labels=False)
    if one is not None and one.suffix.lower() not in IMAGE_ENDINGS and one.suffix not in (".json", ".db"):
        return read_table(one, columns=columns or {}, labels=False)
    return bring_pictures(sources, columns)


def measure_models(
    truth: str | Path,
    models: Sequence[str],
    settings: Settings,
    *,
    count: int | None = None,
    seed: int = 42,
    baseline: bool = False,
    out: Path | None = None,
    json_out: Path | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """`vicinal match --truth TABLE`: each model by given boxes, and by the detector where there is one.

    Args:
        truth: see `read_truth`.
        models: several are compared with the first.
        settings: all the rest.
        count: pictures, drawn by seed. None: all.
        seed: of the draw.
        baseline: measure, before each run, the model that it began with.
        out: where the answers of the last model are written and drawn.
        json_out: where the metrics are written.
        say: is told each line.

    Returns:
        "given" and "found" -> model -> metric -> value, low, high, n; "difference" of the last to the first.

    Raises:
        InputError: as `judge` and `ObjectMatcher` say; a picture of the truth is a reference too.
    """
    scenes = read_truth(truth, settings.columns, count=count, seed=seed)
    _refuse_own(read_references(settings.references, settings.columns), scenes)
    opened = open_models(models, size=settings.size, baseline=baseline)
    places = [model for model in models for _ in range(1 + baseline)]
    if baseline:  # a run's threshold is of its tuned model
        places = [place if i % 2 else "" for i, place in enumerate(places)]
    ways: tuple[Literal["given", "found"], ...] = ("given",) if settings.detector is None else ("given", "found")
    judged: dict[str, dict[str, Judged]] = {way: {} for way in ways}
    limits: dict[str, float | None] = {}
    settled: dict[str, Any] = {}
    for name, matcher in settings.matchers(opened, places):
        assert matcher.matcher is not None
        limits[name], settled = matcher.matcher.threshold, matcher.matcher.settings
        for way in ways:
            judged[way][name] = judge(matcher, scenes, boxes=way)
        if out is not None and name == list(opened)[-1]:
            recognise(matcher, scenes, out)
    first = next(iter(judged["given"].values()))
    objects, there = int(first.objects.sum()), int(first.enrolled.sum())
    say(
        f"{first.pictures:,} pictures, {objects:,} objects of {len(first.classes):,} classes; {there:,} have "
        f"references; {settled['fusion']}, k {settled['k']}, margin {settled['margin']:g}"
        + (f"; {len(first.left_out):,} pictures could not be read" if first.left_out else "")
    )
    results: dict[str, Any] = {"pictures": first.pictures, "objects": objects, "thresholds": limits}
    alike = list(dict.fromkeys(name for one in judged["given"].values() for name in one.alike))
    results["alike"] = alike
    if alike:
        say(
            f"{len(alike):,} pictures hold an object that is all but equal to a reference (cosine {ALIKE} or above), "
            f"the first {alike[0]}: if it is the same picture it finds itself, and what follows is too good; take it "
            "out of one side"
        )
    for way in ways:
        say("boxes given" if way == "given" else f"boxes by {settings.detector}")
        measured = {name: measure(one, seed=seed) for name, one in judged[way].items()}
        if way == "found":
            boxes = next(iter(measured.values()))
            say(f"  boxes: recall {boxes['box_recall']}, precision {boxes['box_precision']}, at IoU {IOU}")
        for name, metrics in measured.items():
            at = "no threshold" if limits[name] is None else f"t = {limits[name]:.3f}"
            say(f"  {name}, {at}")
            say("    " + "   ".join(f"{key} {metrics[key]}" for key in SHOWN))
            for key in (key for key in SHOWN if math.isnan(metrics[key].value)):
                say(f"    {key} is {UNDEFINED[key]}")
        results[way] = {name: plain(metrics) for name, metrics in measured.items()}
        if len(measured) > 1:
            one, *_, other = judged[way].values()
            difference = compare(one, other, seed=seed)
            say(f"  difference, {list(measured)[-1]} - {next(iter(measured))}")
            say("    " + "   ".join(f"{key} {difference[key]}" for key in SHOWN))
            results[way]["difference"] = plain(difference)
    if json_out is not None:
        json_out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return results
