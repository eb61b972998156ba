"""What is in a data set and what is wrong with it, before the first minute of training.

Letters: N rows, F image files, H, W height and width of an image in pixels.

Every file is decoded once. Files with the same upright RGB pixels are *exact* duplicates, whatever their bytes: a file
copied, renamed, or saved anew without loss. *Near* duplicates are found in two steps:

1. a difference hash of 64 bits: the image as 8 x 9 grey cells, a bit for each pair of neighbours, set if the left is
   darker by more than 2 of 256 levels (so that flat backgrounds do not flip bits). Candidates differ in at most 6 bits;
2. the images as 16 x 16 colour cells a and b are compared: |a - b| / max(sd(a), sd(b)), as root mean squares, of 0.2
   or less is near. Saving anew at JPEG quality 50, or at half the size, moves an image by 0.02 to 0.15; different logos
   on white, which a hash alone confuses, mostly lie above 0.3.

Memory stays bounded: hashes are compared block by block, and the cells lie in a temporary file.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from PIL import Image
from torch import Tensor

from vicinal.data.images import read_image
from vicinal.data.manifest import Manifest, box_array
from vicinal.data.splits import official
from vicinal.types import InputError

__all__ = ["Alike", "Findings", "Leak", "alike", "check", "leaks"]

Progress = Callable[[int, int], None]

CELLS = 16  # an image is compared as 16 x 16 cells of colour
MARGIN = 2  # grey levels, of 256, by which neighbours must differ for a bit of the hash
BITS = 6  # hashes that differ in more bits are not looked at
NEAR = 0.2  # relative distance of the cells
BLOCK = 1024  # hashes compared with each other at a time: a million pairs, 8 MB
MOST_PAIRS = 1_000_000  # near pairs kept; a data set with more has other worries
TINY = 5  # a class with fewer images is called tiny
SHOWN = 3  # how many of a kind are named on the page; to_dict() has all


class Leak(NamedTuple):
    """The same pixels in two parts of a split: the file and part of one, the file and part of the other."""

    file: str
    part: str
    other: str
    other_part: str


@dataclass(frozen=True, slots=True)
class Findings:
    """What `check` found. `errors` must be mended before a training, `warnings` should be looked at; `str()` is a page.

    Args:
        images: N, the rows.
        files: F, the image files that they lie in.
        classes: the name of each class and its number of rows.
        parts: part of the split -> (images, classes, classes with one image), where there is a `split` column.
        unreadable: file and reason.
        outside: row and box of boxes that reach more than a pixel beyond their image.
        leaks: pictures in more than one part of the split.
        duplicates: groups of files with the same pixels.
        near: groups of files that look alike, directly or through another of the group.
        near_leaks: files that look alike and lie in different parts.
        repeated: rows that repeat the picture, box and label of an earlier row.
        ambiguous: pictures (with their boxes) that stand in several classes, and those.
        single: classes with one image: nothing of their own can be found, so MAP@R leaves them out.
        tiny: classes with fewer than five images, but more than one.
        spelling: names of classes that differ only in case, blanks, - or _.
        faults: what else is wrong with the table.
        notes: what was left out when the data was read, and what was not looked at.
    """

    images: int
    files: int
    classes: Mapping[str, int]
    parts: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    unreadable: tuple[tuple[str, str], ...] = ()
    outside: tuple[tuple[str, str], ...] = ()
    leaks: tuple[Leak, ...] = ()
    duplicates: tuple[tuple[str, ...], ...] = ()
    near: tuple[tuple[str, ...], ...] = ()
    near_leaks: tuple[Leak, ...] = ()
    repeated: tuple[str, ...] = ()
    ambiguous: tuple[tuple[str, tuple[str, ...]], ...] = ()
    single: tuple[str, ...] = ()
    tiny: tuple[str, ...] = ()
    spelling: tuple[tuple[str, ...], ...] = ()
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def errors(self) -> list[str]:
        """What makes a training or its measurement wrong, one sentence each, with the mend."""
        said = list(self.faults)
        if self.unreadable:
            said.append(
                f"{_count(self.unreadable, 'image file')} cannot be read: "
                f"{_some(f'{name} ({why})' for name, why in self.unreadable)}. "
                "Replace them, leave their rows out, or train with on_error=skip"
            )
        if self.outside:
            said.append(
                f"{_count(self.outside, 'box', 'boxes')} outside of the image: "
                f"{_some(f'{name} ({why})' for name, why in self.outside)}. "
                "A box is x0, y0, x1, y1 in pixels of the picture as it is shown (EXIF rotation applied)"
            )
        if self.leaks:
            said.append(
                f"{_count(self.leaks, 'picture')} in more than one part of the split, so that what is measured was "
                f"trained on: {_some(_pair(leak) for leak in self.leaks)}. Keep one of each"
            )
        return said

    @property
    def warnings(self) -> list[str]:
        """What may be meant so, one sentence each."""
        said = []
        if self.duplicates:
            surplus = sum(len(group) - 1 for group in self.duplicates)
            said.append(
                f"{surplus:,} file{_s(surplus)} with the same pixels as another: "
                f"{_some(' = '.join(group[:3]) for group in self.duplicates)}. "
                "Retrieval finds a twin first: in its own class that flatters, in another it cannot be right"
            )
        if self.repeated:
            said.append(f"{_count(self.repeated, 'row')} repeated: {_some(self.repeated)}")
        if self.near_leaks:
            said.append(
                f"{_count(self.near_leaks, 'pair')} of near duplicates in different parts of the split: "
                f"{_some(_pair(leak) for leak in self.near_leaks)}"
            )
        if self.near:
            surplus = sum(len(group) - 1 for group in self.near)
            said.append(
                f"{_count(self.near, 'group')} of near duplicates, {surplus:,} image{_s(surplus)} too many if they are "
                f"the same (scaled, saved anew, hardly changed): {_some(' ~ '.join(group[:3]) for group in self.near)}"
            )
        if self.ambiguous:
            said.append(
                f"{_count(self.ambiguous, 'picture')} in several classes: "
                f"{_some(f'{name} ({_and(classes)})' for name, classes in self.ambiguous)}"
            )
        if self.spelling:
            said.append(f"classes whose names hardly differ: {_some(' / '.join(names) for names in self.spelling)}")
        if self.single:
            said.append(
                f"{_count(self.single, 'class', 'classes')} with a single image, kept out of MAP@R (of "
                f"such a class there is nothing else to find): {_some(self.single)}"
            )
        if self.tiny:
            said.append(
                f"{_count(self.tiny, 'class', 'classes')} with fewer than {TINY} images, of which none is kept back to "
                f"measure seen classes: {_some(self.tiny)}"
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file; the lists are whole."""
        whole = asdict(self)
        whole["leaks"] = [leak._asdict() for leak in self.leaks]
        whole["near_leaks"] = [leak._asdict() for leak in self.near_leaks]
        return {"errors": self.errors, "warnings": self.warnings, **whole}

    def __str__(self) -> str:
        sizes = sorted(self.classes.values())
        lines = [f"{self.images:,} image{_s(self.images)} in {self.files:,} file{_s(self.files)}"]
        if sizes:
            smallest, largest = (
                next(c for c, n in self.classes.items() if n == size) for size in (sizes[0], sizes[-1])
            )
            span = f"{sizes[0]:,} ({smallest}) to {sizes[-1]:,} ({largest}) images, median {sizes[len(sizes) // 2]:,}"
            same = f"{sizes[0]:,} image{_s(sizes[0])}{' each' if len(sizes) > 1 else ''}"
            classes = f"{len(sizes):,} class{'es' if len(sizes) > 1 else ''}"
            lines.append(f"{classes} of {span if sizes[0] < sizes[-1] else same}")
        else:
            lines.append("no labels")
        if self.parts:
            width = max(len(part) for part in self.parts)
            for part, (images, present, single) in self.parts.items():
                lone = f", {single:,} of them with one image" if single else ""
                lines.append(f"  {part:<{width}}  {images:>9,} images  {present:>6,} classes{lone}")
        for title, found in (("errors", self.errors), ("warnings", self.warnings), ("notes", self.notes)):
            if found:
                lines += ["", f"{title} ({len(found)})", *(f"  - {sentence}" for sentence in found)]
        if not self.errors:
            lines += ["", "Ready to train." if not self.warnings else "Nothing that stands in the way of a training."]
        return "\n".join(lines)


def check(
    manifest: Manifest, *, workers: int | None = None, near: bool = True, progress: Progress | None = None
) -> Findings:
    """Look at every image of a manifest and say what is wrong.

    Args:
        manifest: read with `check_files=False`, so that missing files are listed and not refused.
        workers: threads that decode; None: one for each core.
        near: look for near duplicates too. Comparing the hashes takes seconds for 60,000 images and grows with the
            square of their number.
        progress: called with (files done, files to do).

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as root:
    ...     Image.new("RGB", (8, 8), "red").save(f"{root}/a.png")
    ...     Image.new("RGB", (8, 8), "red").save(f"{root}/b.png")
    ...     m = Manifest.build({"image": ["a.png", "b.png", "c.png"], "label": ["x", "x", "x"]}, root)
    ...     findings = check(m)
    >>> findings.duplicates, findings.unreadable
    ((('a.png', 'b.png'),), (('c.png', 'there is no such file'),))
    """
    files, of_row = _files(manifest)
    seen = _look_at_all(manifest, files, workers, progress, near=near)
    names, part_of_row, faults = _parts(manifest)
    labels = manifest.labels().numpy()
    sizes = np.bincount(labels, minlength=len(manifest.classes)) if manifest.classes else np.zeros(0, np.int64)
    pairs, notes = np.zeros((0, 2), np.int64), ["near duplicates were not looked for"]
    if near:
        pairs, notes = _near_pairs(seen, workers)
    return Findings(
        images=len(manifest),
        files=len(files),
        classes=dict(zip(manifest.classes, sizes.tolist(), strict=True)),
        parts={part: _part_sizes(labels[part_of_row == i]) for i, part in enumerate(names)},
        unreadable=tuple((files[i], seen.unreadable[i]) for i in sorted(seen.unreadable)),
        outside=_outside(manifest, of_row, seen.size),
        leaks=_leaks(files, of_row, seen.twin[of_row], part_of_row, names),
        duplicates=tuple(tuple(files[i] for i in group) for group in _groups(seen.twin)),
        near=tuple(tuple(files[i] for i in group) for group in _groups(_joined(pairs, len(files)))),
        near_leaks=_near_leaks(files, of_row, seen.twin, pairs, part_of_row, names),
        repeated=_repeated(manifest, of_row, labels),
        ambiguous=_ambiguous(manifest, files, seen.twin[of_row], labels),
        single=tuple(c for c, n in zip(manifest.classes, sizes, strict=True) if n == 1),
        tiny=tuple(c for c, n in zip(manifest.classes, sizes, strict=True) if 1 < n < TINY),
        spelling=_spelling(manifest.classes),
        faults=tuple(faults),
        notes=(*manifest.notes, *notes),
    )


def leaks(
    manifest: Manifest,
    parts: Mapping[str, Bool[Tensor, "N"]],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[Leak, ...]:
    """Pictures that stand in more than one of several parts: the same file, or a file with the same pixels.

    Of a picture with boxes, each box is a picture of its own: two objects of one photo may lie in two parts.

    Args:
        manifest: N rows.
        parts: name -> its rows. Rows in no part are not looked at.
        workers: threads that decode; None: one for each core.
        progress: called with (files done, files to do).

    Raises:
        InputError: an image cannot be read.
    """
    masks = np.stack([mask.cpu().numpy() for mask in parts.values()])
    looked_at = np.asarray(masks.any(0))
    manifest = manifest.where(looked_at)
    part_of_row = masks[:, looked_at].argmax(0)
    files, of_row = _files(manifest)
    seen = _look_at_all(manifest, files, workers, progress, near=False)
    if seen.unreadable:
        first = min(seen.unreadable)
        raise InputError(f"{files[first]}: {seen.unreadable[first]}; `vicinal check` lists all such files")
    _, crop = np.unique(_crops(manifest, seen.twin[of_row]), axis=0, return_inverse=True)
    return _leaks(files, of_row, crop, part_of_row, list(parts))


@dataclass(frozen=True, slots=True)
class Alike:
    """Which files of a manifest are one picture, or nearly: F files, N rows.

    Args:
        files: F paths, relative to the manifest's root.
        of_row: "N", the file of each row.
        head: "F", the first file of those that look alike; itself, where it is alone.
        size: "F 2", height and width.
        hash: "F", 64 bits: see the module.
        unreadable: file number -> why.
    """

    files: list[str]
    of_row: Int[np.ndarray, "N"]
    head: Int[np.ndarray, "F"]
    size: Int[np.ndarray, "F 2"]
    hash: Shaped[np.ndarray, "F"]
    unreadable: Mapping[int, str]


def alike(manifest: Manifest, *, workers: int | None = None, progress: Progress | None = None) -> Alike:
    """Group the files of a manifest by their looks: equal pixels, and near duplicates, and what these have in common.

    Args:
        manifest: N rows.
        workers: threads that decode; None: one for each core.
        progress: called with (files done, files to do).
    """
    files, of_row = _files(manifest)
    seen = _look_at_all(manifest, files, workers, progress, near=True)
    pairs, _ = _near_pairs(seen, workers)
    twins = np.stack([seen.twin, np.arange(len(files))], 1)
    head = _joined(np.concatenate([twins, pairs]), len(files))
    return Alike(files, of_row, head, seen.size, seen.hash, seen.unreadable)


# ------------------------------------------------------------------------------------------------- looking at files


class _Seen(NamedTuple):
    """What is kept of each of F files."""

    twin: Int[np.ndarray, "F"]  # the first file with the same pixels: itself, where there is none or it is unreadable
    size: Int[np.ndarray, "F 2"]  # height and width; 0 where unreadable
    hash: Shaped[np.ndarray, "F"]  # 64 bits
    cells: UInt8[np.ndarray, "F n"]  # CELLS x CELLS x 3, in a temporary file
    unreadable: Mapping[int, str]


def _files(manifest: Manifest) -> tuple[list[str], Int[np.ndarray, "N"]]:
    """The distinct files, and each row's position among them."""
    distinct = pc.unique(manifest.table["image"])
    return distinct.to_pylist(), pc.index_in(manifest.table["image"], value_set=distinct).to_numpy()


def _look_at_all(
    manifest: Manifest, files: Sequence[str], workers: int | None, progress: Progress | None, *, near: bool
) -> _Seen:
    count = len(files)
    digest = np.zeros((count, 2), np.uint64)
    size = np.zeros((count, 2), np.int32)
    hashes = np.zeros(count, np.uint64)
    with tempfile.TemporaryFile() as file:  # the map keeps what it needs of it, and it vanishes with the map
        cells = np.memmap(file, np.uint8, shape=(count if near else 1, CELLS * CELLS * 3))
    unreadable: dict[int, str] = {}

    def look(i: int) -> None:
        try:
            pixels = read_image(manifest.root / files[i]).permute(1, 2, 0).numpy()
        except (InputError, MemoryError) as error:
            # the reason alone: without the file's name before it and the mend after it
            text = str(error).removeprefix(f"{manifest.root / files[i]}: ") or type(error).__name__
            unreadable[i] = text.split(";")[0]
            return
        size[i] = pixels.shape[:2]
        content = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16, salt=size[i].tobytes())
        digest[i] = np.frombuffer(content.digest(), np.uint64)
        if near:
            hashes[i], cells[i] = _impression(pixels)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for done, _ in enumerate(pool.map(look, range(count)), 1):
            if progress is not None:
                progress(done, count)
    for i in unreadable:
        digest[i] = (i, 0)  # alone: nothing is known to be the same
    _, first, inverse = np.unique(digest, axis=0, return_index=True, return_inverse=True)
    return _Seen(first[inverse.ravel()], size, hashes, cells, unreadable)


def _impression(pixels: UInt8[np.ndarray, "H W 3"]) -> tuple[np.uint64, UInt8[np.ndarray, "n"]]:
    """The difference hash of an image, and its cells of colour."""
    image = Image.fromarray(pixels)
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    bits = np.packbits(grey[:, 1:] - grey[:, :-1] > MARGIN)
    return bits.view(np.uint64)[0], np.asarray(image.resize((CELLS, CELLS), Image.Resampling.BOX)).ravel()


# ----------------------------------------------------------------------------------------------------- near duplicates


def _near_pairs(seen: _Seen, workers: int | None) -> tuple[Int[np.ndarray, "p 2"], list[str]]:
    """Pairs of files that look alike, each file standing for all with its very pixels."""
    files = np.array([i for i in np.flatnonzero(seen.twin == np.arange(len(seen.twin))) if i not in seen.unreadable])
    if len(files) < 2:
        return np.zeros((0, 2), np.int64), []
    hashes = seen.hash[files]
    found: list[np.ndarray] = []

    def search(start: int) -> np.ndarray:
        alike = []
        mine = hashes[start : start + BLOCK, None]
        for other in range(start, len(files), BLOCK):
            a, b = np.nonzero(_popcount(mine ^ hashes[None, other : other + BLOCK]) <= BITS)
            a, b = a + start, b + other
            alike.append(_verified(files[a[a < b]], files[b[a < b]], seen.cells))
        return np.concatenate(alike)

    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for pairs in pool.map(search, range(0, len(files), BLOCK)):
            found.append(pairs)
            if sum(map(len, found)) > MOST_PAIRS:
                pool.shutdown(cancel_futures=True)
                return np.concatenate(found), [f"the search for near duplicates ended after {MOST_PAIRS:,} pairs"]
    return np.concatenate(found), []


def _verified(a: Int[np.ndarray, "c"], b: Int[np.ndarray, "c"], cells: UInt8[np.ndarray, "F n"]) -> np.ndarray:
    """Of candidate pairs those whose cells are near; a few thousand at a time."""
    kept = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(a), BLOCK):
        i, j = a[start : start + BLOCK], b[start : start + BLOCK]
        kept.append(np.stack([i, j], 1)[_distance(cells[i], cells[j]) <= NEAR])
    return np.concatenate(kept)


def _distance(a: UInt8[np.ndarray, "c n"], b: UInt8[np.ndarray, "c n"]) -> Float[np.ndarray, "c"]:
    """Root mean square of a - b, in units of the larger standard deviation; flat images count as one of 4 levels."""
    x, y = a.astype(np.float32), b.astype(np.float32)
    spread = np.maximum(np.maximum(x.std(1), y.std(1)), 4.0)
    return np.asarray(np.sqrt(((x - y) ** 2).mean(1)) / spread)


def _popcount(words: Shaped[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """How many of the 64 bits are set."""
    if hasattr(np, "bitwise_count"):  # numpy 2
        return np.asarray(np.bitwise_count(words))
    words = words - (words >> np.uint64(1) & np.uint64(0x5555555555555555))
    words = (words & np.uint64(0x3333333333333333)) + (words >> np.uint64(2) & np.uint64(0x3333333333333333))
    words = words + (words >> np.uint64(4)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (words * np.uint64(0x0101010101010101) >> np.uint64(56)).astype(np.uint8)


def _joined(pairs: Int[np.ndarray, "p 2"], count: int) -> Int[np.ndarray, "F"]:
    """The smallest member of each file's group, where pairs belong together."""
    head = list(range(count))

    def root(i: int) -> int:
        while head[i] != i:
            head[i] = head[head[i]]
            i = head[i]
        return i

    for i, j in pairs.tolist():
        a, b = root(i), root(j)
        head[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(count)], np.int64)


# --------------------------------------------------------------------------------------------- what the rows tell


def _parts(manifest: Manifest) -> tuple[list[str], Int[np.ndarray, "N"], list[str]]:
    """The names of the split's parts, each row's position among them (-1: none), and what is wrong with the column."""
    nowhere = np.full(len(manifest), -1)
    if "split" not in manifest.names():
        return [], nowhere, []
    try:
        masks = official(manifest.column("split"))
    except InputError as error:
        return [], nowhere, [str(error)]
    for i, mask in enumerate(masks.values()):
        nowhere[mask.numpy()] = i
    return list(masks), nowhere, []


def _part_sizes(labels: Int[np.ndarray, "n"]) -> tuple[int, int, int]:
    _, counts = np.unique(labels, return_counts=True)
    return len(labels), len(counts), int((counts == 1).sum())


def _leaks(
    files: Sequence[str],
    of_row: Int[np.ndarray, "N"],
    picture: Int[np.ndarray, "N"],
    part: Int[np.ndarray, "N"],
    names: Sequence[str],
) -> tuple[Leak, ...]:
    """Pictures with rows in more than one part: the first row of each of two parts stands for them."""
    rows = np.flatnonzero(part >= 0)
    pairs, first = np.unique(np.stack([picture[rows], part[rows]], 1), axis=0, return_index=True)
    again = np.flatnonzero(pairs[1:, 0] == pairs[:-1, 0])
    found = []
    for i in again:
        one, other = rows[first[i]], rows[first[i + 1]]
        found.append(Leak(files[of_row[one]], names[part[one]], files[of_row[other]], names[part[other]]))
    return tuple(found)


def _near_leaks(
    files: Sequence[str],
    of_row: Int[np.ndarray, "N"],
    twin: Int[np.ndarray, "F"],
    pairs: Int[np.ndarray, "p 2"],
    part: Int[np.ndarray, "N"],
    names: Sequence[str],
) -> tuple[Leak, ...]:
    """Near pairs whose files lie in different parts. A file that itself is in two parts is told of by `_leaks`."""
    part_of_file = np.full(len(files), -1)
    part_of_file[twin[of_row]] = part
    ends = part_of_file[pairs]
    apart = pairs[(ends >= 0).all(1) & (ends[:, 0] != ends[:, 1])]
    return tuple(Leak(files[i], names[part_of_file[i]], files[j], names[part_of_file[j]]) for i, j in apart.tolist())


def _outside(
    manifest: Manifest, of_row: Int[np.ndarray, "N"], size: Int[np.ndarray, "F 2"]
) -> tuple[tuple[str, str], ...]:
    if "box" not in manifest.names():
        return ()
    corners = box_array(manifest.table)
    height, width = size[of_row].T
    with np.errstate(invalid="ignore"):  # rows without a box
        beyond = (corners[:, :2].min(1) < -1) | (corners[:, 2] > width + 1) | (corners[:, 3] > height + 1)
    rows = np.flatnonzero(beyond & (height > 0))
    files = manifest.table["image"].take(rows).to_pylist()
    return tuple(
        (file, f"box {', '.join(format(v, 'g') for v in corners[row])} in {width[row]} x {height[row]} pixels")
        for file, row in zip(files, rows, strict=True)
    )


def _crops(manifest: Manifest, picture: Int[np.ndarray, "N"]) -> Float[np.ndarray, "N c"]:
    """What tells one picture, or box of a picture, from another."""
    key = picture.astype(np.float64)[:, None]
    if "box" in manifest.names():
        key = np.concatenate([key, np.nan_to_num(box_array(manifest.table), nan=-np.inf)], 1)
    return key


def _repeated(manifest: Manifest, of_row: Int[np.ndarray, "N"], labels: Int[np.ndarray, "N"]) -> tuple[str, ...]:
    if "_copy" not in manifest.names():
        return ()
    key = np.concatenate([_crops(manifest, of_row), labels[:, None]], 1)
    _, first = np.unique(key, axis=0, return_index=True)
    again = np.ones(len(manifest), bool)
    again[first] = False
    return manifest.where(again).ids()


def _ambiguous(
    manifest: Manifest, files: Sequence[str], picture: Int[np.ndarray, "N"], labels: Int[np.ndarray, "N"]
) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Pictures that stand in several classes, with the classes."""
    key = np.unique(np.concatenate([_crops(manifest, picture), labels[:, None]], 1), axis=0)
    same = np.concatenate([[False], (key[1:, :-1] == key[:-1, :-1]).all(1)])
    found: dict[tuple[float, ...], list[str]] = defaultdict(list)
    for i in np.flatnonzero(same):
        crop = tuple(key[i, :-1].tolist())
        found[crop] = found[crop] or [manifest.classes[int(key[i - 1, -1])]]
        found[crop].append(manifest.classes[int(key[i, -1])])
    return tuple((files[int(crop[0])], tuple(classes)) for crop, classes in found.items())


def _spelling(classes: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    alike: dict[str, list[str]] = defaultdict(list)
    for name in classes:
        alike[re.sub(r"[\s_-]+", "", name.casefold())].append(name)
    return tuple(tuple(names) for names in alike.values() if len(names) > 1)


def _groups(head: Int[np.ndarray, "F"]) -> list[list[int]]:
    """Members of each group of two and more, where `head` names a member that stands for the group."""
    order = np.argsort(head, kind="stable")
    cuts = np.flatnonzero(np.diff(head[order])) + 1
    return [group.tolist() for group in np.split(order, cuts) if len(group) > 1]


# ------------------------------------------------------------------------------------------------------------ words


def _some(items: Iterable[str]) -> str:
    """The first few, and how many more."""
    listed = list(items)
    more = f", and {len(listed) - SHOWN:,} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def _pair(leak: Leak) -> str:
    if leak.file == leak.other:
        return f"{leak.file} ({leak.part} and {leak.other_part})"
    return f"{leak.file} ({leak.part}) = {leak.other} ({leak.other_part})"


def _count(things: Sequence[object], one: str, many: str = "") -> str:
    return f"{len(things):,} {one if len(things) == 1 else many or f'{one}s'}"


def _and(words: Sequence[str]) -> str:
    return " and ".join(words)


def _s(count: int) -> str:
    return "" if count == 1 else "s"
