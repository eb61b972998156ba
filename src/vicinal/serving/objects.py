"""Objects in a picture, and what they are: a detector finds boxes, each is cut out and embedded, a matcher names it.

    picture -> boxes with a score -> cut-outs -> vectors -> (class, score) or unknown

Boxes come from one of three places: a detector, the caller, or tiles, which stand in where there is no detector. Those
of a detector lose what is under `min_side`, then, best first, each that overlaps a kept one by more than `overlap`
(intersection over union, whatever the detector calls it); they are widened by `pad` of their longer side before they
are cut, from the picture at its own size. Boxes that are given are taken as they are, unless `pad` is stated. Tiles are
squares on a grid of half a side; a tile is kept if the matcher knows it, and the best-matching one wins where two
overlap.

Letters: P pictures, n boxes of one, D numbers an embedding, H W height and width of a picture in pixels.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice, repeat
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.ops import nms

from vicinal.data.images import Cutout, pixel_box, read_image
from vicinal.data.manifest import Manifest
from vicinal.data.sources import read_folder
from vicinal.embedding import Precision, default_cache, embed, embed_cutouts, pick_device
from vicinal.heads.calibration import OpenSetThreshold
from vicinal.models.backbones import FAMILIES, load_encoder
from vicinal.models.encoder import CONFIG_NAME, Encoder
from vicinal.serving.detectors import Boxes, Detector, Tiles, load_detector
from vicinal.serving.index import Index
from vicinal.serving.matching import Fusion, Matcher
from vicinal.types import Embeddings, InputError

__all__ = [
    "Answer",
    "DetectLogosDETR",
    "Detection",
    "ObjectMatcher",
    "draw",
    "open_encoder",
]

Box = tuple[float, float, float, float]
Picture = str | Path | Image.Image | Tensor  # 3 H W, of bytes: others are told in the answer
KNOWN, UNKNOWN = (0, 122, 61), (166, 84, 0)  # colours of a drawing
CANDIDATES = 5  # classes that are told of an object
PAD = 0.08  # of a detector's boxes
THRESHOLD_NAME = "threshold.json"  # what `vicinal calibrate` writes beside a model


@dataclass(frozen=True, slots=True)
class Detection:
    """One object: where it is, and what the matcher says of it.

    Args:
        box: x0, y0, x1, y1 in pixels of the upright picture, not widened.
        box_score: the detector's; 1 for a box that was given, and for a tile.
        kind: the detector's own word for it, None where it has none.
        label: the class, None: unknown.
        score: of the best class, also where it is not good enough; -inf where none had the votes, NaN without
            references.
        best: the best class, whether it is good enough or not; None where there is none.
        second: the next class, None where there is none.
        margin: how far the second class is behind.
        stranger_share: of what was unknown where the threshold was fitted, the share that scored as high: near 0 is
            sure, whatever the score's scale. NaN without a fitted threshold. See `OpenSetThreshold.stranger_share`.
        candidates: the best classes and their scores, best first, whether they are good enough or not.
        references: the references that decided and their cosines, nearest first.
    """

    box: Box
    box_score: float
    kind: str | None = None
    label: str | None = None
    score: float = math.nan
    best: str | None = None
    second: str | None = None
    margin: float = math.nan
    stranger_share: float = math.nan
    candidates: tuple[tuple[str, float], ...] = ()
    references: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer(Sequence[Detection]):
    """What was found in one picture: a sequence of its objects, empty where there are none.

    Args:
        name: the picture's path, or its place among those asked for.
        size: height and width, None where it could not be read.
        objects: best box first.
        error: why the picture could not be read, else None.
    """

    name: str
    size: tuple[int, int] | None
    objects: tuple[Detection, ...] = ()
    error: str | None = None

    def __len__(self) -> int:
        return len(self.objects)

    def __getitem__(self, at: Any) -> Any:  # noqa: ANN401  (an index or a slice: an object, or several)
        return self.objects[at]

    @property
    def boxes(self) -> list[Box]:
        """Where the objects are."""
        return [one.box for one in self.objects]

    @property
    def labels(self) -> list[str | None]:
        """What they are; None: unknown."""
        return [one.label for one in self.objects]

    @property
    def scores(self) -> list[float]:
        """How alike each is to its best class."""
        return [one.score for one in self.objects]

    @property
    def unknown(self) -> tuple[Detection, ...]:
        """The objects that are of no class here."""
        return tuple(one for one in self.objects if one.label is None)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no infinity and no NaN: they are null."""
        return {
            "image": self.name,
            "size": self.size,
            "error": self.error,
            "objects": [
                {
                    "box": [round(v, 2) for v in one.box],
                    "box_score": _finite(one.box_score),
                    "kind": one.kind,
                    "label": one.label,
                    "score": _finite(one.score),
                    "best": one.best,
                    "second": one.second,
                    "margin": _finite(one.margin),
                    "stranger_share": _finite(one.stranger_share),
                    "candidates": [{"class": name, "score": _finite(score)} for name, score in one.candidates],
                    "references": [{"id": name, "cosine": _finite(cosine)} for name, cosine in one.references],
                }
                for one in self.objects
            ],
        }


class ObjectMatcher:
    """Finds objects in pictures and names each, or says that it is unknown: detector, embedding model, matcher.

    Args:
        detector: a folder or Hub id of any object detector of transformers (DETR and its kin, YOLOS, RT-DETR, …); or a
            function, pictures -> one `Boxes` each; or None: tiles, where no boxes are given.
        embedding_model: an `Encoder`; or what `open_encoder` takes: a model's address, a bare Hub id, a folder that
            vicinal saved, a run, or a folder exported for open_clip, transformers or sentence-transformers.
        references: labelled pictures of each class: a folder of class folders, a manifest, an `Index`, embeddings; or a
            `Matcher` ready made, which brings its own settings. None: objects are found, and all are unknown.
        threshold: from which score on a class is known: a number; a fitted `OpenSetThreshold`, or its file, which is
            refused where it was fitted for another model or other settings. None: `threshold.json` beside the model
            where there is one, else any score is enough.
        fusion: see `Matcher`, as `k` and `margin`. None: as the threshold was fitted, else the matcher's own defaults.
        k: see `Matcher`.
        margin: see `Matcher`.
        detect_threshold: from which score on a detector's box is looked at. 0.5.
        pad: by which share of its longer side a box is widened before it is cut. None: 0.08 of a detector's, which may
            have lost an edge, and 0 of one that is given.
        min_side: the shorter side of the smallest box of a detector that is looked at, in pixels. 16.
        overlap: of two boxes that overlap more, as intersection over union, the better one stays. 0.7.
        levels: of tiles: for each number l, squares of 1/l of the shorter side.
        batch_size: pictures read at once, and cut-outs embedded at once. Memory: as many pictures at their own size.
        device: "auto", "cpu", "cuda:0", …
        precision: of the embedding model; the detector computes in float32.
        logger: is told what was loaded and which pictures could not be read; None: the module's own.

    Raises:
        InputError: the detector is none or is not whole; references, threshold or model cannot be used; a number is
            out of its range.

    >>> from vicinal.models.backbones import load_encoder
    >>> encoder = load_encoder("vicinal:nano")
    >>> red, blue = torch.zeros(2, 3, 40, 40, dtype=torch.uint8)
    >>> red[0], blue[2] = 255, 255
    >>> vectors = embed_cutouts(encoder, [Cutout.whole(red), Cutout.whole(blue)])
    >>> references = Embeddings(vectors, torch.tensor([0, 1]), ("red.png", "blue.png"), ("red", "blue"))
    >>> matcher = ObjectMatcher(embedding_model=encoder, references=references, threshold=0.99)
    >>> scene = torch.cat([red, blue], dim=2)
    >>> [answer] = matcher.detect([scene], boxes=[[(0, 0, 40, 40), (40, 0, 80, 40)]])
    >>> answer.labels
    ['red', 'blue']
    """

    def __init__(
        self,
        detector: str | Path | Detector | None = None,
        *,
        embedding_model: str | Path | Encoder,
        references: str | Path | Manifest | Index | Embeddings | Matcher | None = None,
        threshold: float | int | np.floating[Any] | str | Path | OpenSetThreshold | None = None,
        fusion: Fusion | None = None,
        k: int | None = None,
        margin: float | None = None,
        detect_threshold: float = 0.5,
        pad: float | None = None,
        min_side: float | int = 16,
        overlap: float = 0.7,
        levels: Sequence[int] = (1, 2, 3),
        batch_size: int = 16,
        device: str | torch.device = "auto",
        precision: Precision = "auto",
        logger: logging.Logger | None = None,
    ) -> None:
        if (pad or 0) < 0 or not 0 < overlap <= 1 or batch_size < 1:
            raise InputError("pad is 0 or more, overlap above 0 and at most 1, batch_size at least 1")
        self.log = logger or logging.getLogger(__name__)
        self.device, self.precision, self.batch_size = pick_device(str(device)), precision, batch_size
        self.pad, self.min_side, self.overlap = pad, min_side, overlap
        self.tiled = detector is None
        self.detector_name = "tiles" if detector is None else str(detector)
        self.detector: Detector
        if detector is None:
            self.detector = Tiles(levels)
        elif isinstance(detector, str | Path):
            self.detector = load_detector(detector, threshold=detect_threshold, device=self.device)
            self.log.info("detector %s: finds %s", detector, ", ".join(self.detector.kinds[:5]))
        else:
            self.detector, self.detector_name = detector, getattr(detector, "name", "a function")  # ours have a name
        self.encoder = open_encoder(embedding_model)
        self.encoder.eval().to(self.device)
        self.fingerprint = self.encoder.fingerprint()
        rule = self.rule = _rule(threshold, embedding_model)
        stated = {name: v for name, v in (("fusion", fusion), ("k", k), ("margin", margin)) if v is not None}
        self.matcher = self._matcher(references, rule, stated)
        if self.matcher is not None and isinstance(threshold, Real):  # numpy's numbers, too
            self.matcher = self.matcher.with_threshold(float(threshold))
        self.skipped: list[tuple[str, str]] = []

    def _matcher(
        self,
        references: str | Path | Manifest | Index | Embeddings | Matcher | None,
        rule: OpenSetThreshold | None,
        stated: dict[str, Any],
    ) -> Matcher | None:
        """Of the references, with the settings stated, else those that the threshold was fitted with."""
        if references is None:
            return None
        if isinstance(references, Matcher):
            for name, value in stated.items():
                if references.settings[name] != value:
                    raise InputError(
                        f"the matcher has {name}={references.settings[name]!r}, and {name}={value!r} is asked for: "
                        "make the matcher so, or leave it away"
                    )
            matcher, found = references, references.fingerprint
        else:
            vectors, found = self._embedded(references)
            settings = {**(rule.settings_ if rule else {}), **stated}
            matcher = Matcher(vectors, fingerprint=found, **settings)
        if found != self.fingerprint:
            raise InputError(
                f"the references are of the model {found[:12]}…, and the embedding model is {self.fingerprint[:12]}…: "
                "embed them anew with this model"
            )
        return matcher if rule is None else matcher.decide_by(rule)

    def _embedded(self, references: str | Path | Manifest | Index | Embeddings) -> tuple[Embeddings, str]:
        if isinstance(references, Index):
            return references.embeddings(), references.fingerprint
        if isinstance(references, Embeddings):
            return references, self.fingerprint
        manifest = references if isinstance(references, Manifest) else read_folder(references)
        if not manifest.classes:
            raise InputError("the references have no labels; put each class's pictures into a folder of its name")
        found = embed(self.encoder, manifest, cache=default_cache(), device=self.device, precision=self.precision)
        return found, self.fingerprint

    @property
    def about(self) -> dict[str, Any]:
        """What decides an answer, in plain values: for the head of what is written."""
        matcher = self.matcher
        return {
            "detector": self.detector_name,
            "model": self.encoder.source,
            "fingerprint": self.fingerprint,
            "threshold": None if matcher is None else matcher.threshold,
            "matcher": None if matcher is None else matcher.settings,
            "classes": 0 if matcher is None else len(matcher.present),
            "references": 0 if matcher is None else len(matcher.ids),
        }

    # ---- asking it

    def detect(
        self,
        images: Sequence[Picture],
        *,
        boxes: Sequence[Sequence[Sequence[float | int]]] | None = None,
        on_error: Literal["raise", "skip"] = "skip",
    ) -> list[Answer]:
        """The objects of each picture, in the order of the pictures.

        Args:
            images: paths, PIL images, or tensors "3 H W" of bytes.
            boxes: of each picture, which then takes the place of the detector.
            on_error: a picture that cannot be read, or does not hold its box, has an `error` and no objects, and is
                counted in `skipped` ("skip"); or stops everything ("raise").

        Raises:
            InputError: as `on_error` says; boxes for another number of pictures, or not of four numbers.
        """
        if boxes is not None and len(boxes) != len(images):
            raise InputError(f"boxes: {len(boxes)} lists for {len(images)} pictures; give one list a picture")
        return list(self.stream(images, boxes=boxes, on_error=on_error))

    def stream(
        self,
        images: Iterable[Picture],
        *,
        boxes: Iterable[Sequence[Sequence[float | int]]] | None = None,
        on_error: Literal["raise", "skip"] = "skip",
    ) -> Iterator[Answer]:
        """As `detect`, one answer after another: of any number of pictures, `batch_size` are in memory at a time."""
        self.skipped = []
        given: Iterator[Sequence[Sequence[float | int]] | None] = repeat(None) if boxes is None else iter(boxes)
        asked = zip(enumerate(images), given, strict=False)
        while part := list(islice(asked, self.batch_size)):
            for answer in self._answers([(f"#{n}", image, own) for (n, image), own in part], on_error):
                if answer.error is not None:
                    self.skipped.append((answer.name, answer.error))
                    self.log.warning("left out: %s", answer.error)
                yield answer

    def _answers(
        self, asked: Sequence[tuple[str, Picture, Sequence[Sequence[float | int]] | None]], on_error: str
    ) -> list[Answer]:
        """A batch of pictures: read, search, cut, embed, match."""
        names = [str(image) if isinstance(image, str | Path) else name for name, image, _ in asked]
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(_read, [image for _, image, _ in asked], names))
        errors = [one if isinstance(one, str) else None for one in read]
        searched = [i for i, one in enumerate(read) if isinstance(one, Tensor) and asked[i][2] is None]
        pictures = [one for i in searched if isinstance(one := read[i], Tensor)]
        found = dict(zip(searched, self.detector(pictures) if pictures else [], strict=True))
        boxes: list[Boxes] = []
        cuts: list[Cutout] = []
        for i, (picture, (_, _, own)) in enumerate(zip(read, asked, strict=True)):
            boxes.append(Boxes(torch.zeros(0, 4), torch.zeros(0)))
            if isinstance(picture, str):
                continue
            size = (picture.shape[1], picture.shape[2])
            if own is None:
                boxes[i] = self._worth_a_look(found[i], size)
            elif len(own):
                if any(len(box) != 4 for box in own):
                    raise InputError(f"{names[i]}: a box is x0, y0, x1, y1 in pixels, not {own[0]}")
                boxes[i] = Boxes(torch.tensor([[float(v) for v in box] for box in own]), torch.ones(len(own)))
            padding = (PAD if own is None else 0.0) if self.pad is None else self.pad
            if own is None and self.tiled:
                padding = 0.0
            try:
                cuts += [_cut(picture, box, padding, names[i]) for box in boxes[i].corners.tolist()]
            except InputError as error:
                errors[i], boxes[i] = str(error), Boxes(torch.zeros(0, 4), torch.zeros(0))
        if on_error == "raise" and (first := next((e for e in errors if e is not None), None)):
            raise InputError(first)
        named = self._named(boxes, cuts)
        answers = []
        for i, objects in enumerate(named):
            picture = read[i]
            if self.tiled and asked[i][2] is None:
                objects = self._best_tiles(objects)
            shape = None if isinstance(picture, str) else (int(picture.shape[1]), int(picture.shape[2]))
            answers.append(Answer(names[i], shape, tuple(objects), errors[i]))
        return answers

    def _worth_a_look(self, found: Boxes, size: tuple[int, int]) -> Boxes:
        """Within the picture, large enough, and each thing once; best first."""
        height, width = size
        corners = found.corners.float().cpu()
        corners = torch.stack([corners[:, i].clamp(0, (width, height)[i % 2]) for i in range(4)], dim=1)
        side = (corners[:, 2:] - corners[:, :2]).amin(1)
        smallest = 0 if self.tiled else self.min_side
        rows = (torch.isfinite(found.corners).all(1).cpu() & (side > 0) & (side >= smallest)).nonzero().flatten()
        scores = found.scores.float().cpu()
        if not self.tiled:
            rows = rows[nms(corners[rows], scores[rows], self.overlap)]
        kinds = tuple(found.kinds[i] for i in rows.tolist()) if found.kinds else ()
        return Boxes(corners[rows], scores[rows], kinds)

    def _named(self, boxes: Sequence[Boxes], cuts: Sequence[Cutout]) -> list[list[Detection]]:
        """Each picture's objects: all cut-outs of the batch are embedded and matched together."""
        plain = [
            [
                Detection(tuple(box), score, found.kinds[j] if found.kinds else None)
                for j, (box, score) in enumerate(zip(found.corners.tolist(), found.scores.tolist(), strict=True))
            ]
            for found in boxes
        ]
        if self.matcher is None or not cuts:
            return plain
        vectors = embed_cutouts(
            self.encoder, cuts, batch_size=self.batch_size, device=self.device, precision=self.precision
        )
        found = self.matcher.match(vectors, fingerprint=self.fingerprint, top=CANDIDATES)
        classes = (*found.classes, None)  # -1: none
        shares = torch.full((len(vectors),), torch.nan)
        if self.rule is not None:  # fitted on scores that are none where margin or votes refuse them
            shares = torch.from_numpy(self.rule.stranger_share(found.scores.where(found.decisive, -torch.inf)))
        columns = zip(
            found.names(),
            found.scores.tolist(),
            found.labels.tolist(),
            found.seconds.tolist(),
            found.margins.tolist(),
            shares.tolist(),
            found.candidates.tolist(),
            found.candidate_scores.tolist(),
            found.deciding(),
            found.similarities.tolist(),
            strict=True,
        )
        named = [
            Detection(
                one.box,
                one.box_score,
                one.kind,
                label,
                score,
                classes[best],
                classes[second],
                margin,
                share,
                tuple((found.classes[c], v) for c, v in zip(candidates, values, strict=True) if c >= 0),
                tuple(zip(references, cosines, strict=False)),
            )
            for one, (label, score, best, second, margin, share, candidates, values, references, cosines) in zip(
                chain.from_iterable(plain), columns, strict=True
            )
        ]
        left = iter(named)
        return [list(islice(left, len(one))) for one in plain]

    def _best_tiles(self, objects: Sequence[Detection]) -> list[Detection]:
        """The known ones, each thing once: a tile that is unknown says nothing."""
        known = [one for one in objects if one.label is not None]
        if not known:
            return []
        corners, scores = torch.tensor([one.box for one in known]), torch.tensor([one.score for one in known])
        # Tiles of two sizes on one object overlap by a quarter only, so any overlap beyond a tenth is the same one.
        return [known[i] for i in nms(corners, scores, min(self.overlap, 0.1)).tolist()]


DetectLogosDETR = ObjectMatcher
"""The name that the logo system gave it."""


def open_encoder(model: str | Path | Encoder, *, size: int | None = None) -> Encoder:
    """The embedding model of an address, or of a folder in any of the layouts that are exported.

    Args:
        model: an encoder; what `load_encoder` takes; a run folder; a bare Hub id, `openai/clip-vit-large-patch14`; or a
            folder of open_clip, transformers or sentence-transformers, without a word before it.
        size: of the input in pixels. None: as it was trained, or the encoder has it.

    Raises:
        InputError: nothing that is known is there.
    """
    if isinstance(model, Encoder):
        return model
    uri = str(model)
    folder = Path(uri).expanduser()
    if not folder.is_dir():
        hub_id = uri.count("/") == 1 and uri.partition(":")[0] not in FAMILIES and not uri.startswith((".", "/", "~"))
        return load_encoder(f"transformers:{uri}" if hub_id else uri, size=size)
    if (folder / CONFIG_NAME).is_file() or (folder / "model" / CONFIG_NAME).is_file():
        return load_encoder(folder, size=size)
    if (folder / "open_clip_config.json").is_file():
        return load_encoder(f"open_clip:local-dir:{folder}", size=size)
    if (folder / "modules.json").is_file():  # sentence-transformers: its first module holds the model
        try:
            first = json.loads((folder / "modules.json").read_text(encoding="utf-8"))[0]["path"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InputError(f"{folder / 'modules.json'} is damaged ({error!r}); export the model again") from error
        folder = folder / first
    if (folder / "config.json").is_file():
        return load_encoder(f"transformers:{folder}", size=size)
    return load_encoder(folder, size=size)


def _rule(threshold: object, model: str | Path | Encoder) -> OpenSetThreshold | None:
    """A fitted threshold that was given, or lies beside the model; None where it is a number, or there is none."""
    if isinstance(threshold, OpenSetThreshold):
        return threshold
    if isinstance(threshold, str | Path):
        file = Path(threshold).expanduser()
        if not file.exists():
            raise InputError(
                f"the threshold {str(threshold)!r} is neither a number nor a file; `vicinal calibrate` writes one"
            )
        return OpenSetThreshold.load(file)
    if threshold is None and isinstance(model, str | Path):
        beside = Path(model).expanduser() / THRESHOLD_NAME
        return OpenSetThreshold.load(beside) if beside.is_file() else None
    return None


def _read(image: Picture, name: str) -> UInt8[Tensor, "3 H W"] | str:
    """The pixels, or why they cannot be had."""
    try:
        if isinstance(image, str | Path):
            return read_image(image)
        if isinstance(image, Image.Image):
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (InputError, OSError) as error:
        return str(error) if isinstance(error, InputError) else f"{name}: {error}"
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        return f"{name}: a tensor is 3 x H x W of bytes, not {tuple(image.shape)} of {image.dtype}"
    return image


def _cut(picture: UInt8[Tensor, "3 H W"], box: Sequence[float], padding: float, name: str) -> Cutout:
    left, top, right, bottom = pixel_box(box, (picture.shape[1], picture.shape[2]), padding=padding, name=name)
    return Cutout.whole(picture[:, top:bottom, left:right])


def draw(picture: Picture, answer: Answer, *, least: int = 640) -> Image.Image:
    """The picture with its boxes: green and named where known, brown with the nearest class where unknown.

    Args:
        picture: what was asked; read again where it is a path.
        answer: what was found in it.
        least: smaller pictures are enlarged until their longer side has as many pixels, so that names can be read.

    Raises:
        InputError: the picture cannot be read.
    """
    pixels = _read(picture, answer.name)
    if isinstance(pixels, str):
        raise InputError(pixels)
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    scale = max(1.0, least / max(image.size))
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    line = max(2, round(max(image.size) / 220))
    font = ImageFont.load_default(size=max(13, max(image.size) / 40))
    placed: list[Box] = []
    for one in answer.objects:
        x0, y0, x1, y1 = (v * scale for v in one.box)
        colour = UNKNOWN if one.label is None else KNOWN
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=line)
        words = "unknown" if one.best is None else f"unknown ({one.best}? {one.score:.2f})"
        if one.label is not None:
            words = f"{one.label} {one.score:.2f}"
        width, height = (round(v) + 6 for v in pen.textbbox((0, 0), words, font=font)[2:])
        left = min(max(x0, 0), max(image.width - width, 0))
        tops = [top for top in (y0 - height, y1, y0, y1 - height) if 0 <= top <= image.height - height] or [0.0]
        plates = [(left, top, left + width, top + height) for top in tops]
        plate = next((one for one in plates if not any(_meet(one, other) for other in placed)), plates[0])
        placed.append(plate)
        pen.rectangle(plate, fill=colour)
        pen.text((plate[0] + 3, plate[1] + 2), words, fill="white", font=font)
    return image


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
