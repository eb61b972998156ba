"""One table for every data set: an image path, a label, and whatever else is known about the picture.

Letters: N rows, C classes. A row is one picture, or one box of a picture. Columns (only `image` and
`label` are always there):

    image   str    path, relative to `root` (or absolute), with forward slashes; inside a tar, see `images.Member`
    label   str    name of the class; empty in every row where the data has no labels
    text    str    a caption
    captions       a list of captions, of which training draws one each time; evaluation takes `text`
    box     4 x f  x0, y0, x1, y1 in pixels of the picture as it is shown (EXIF rotation applied)
    group   str    what must never straddle a split: a photographer, a shop, a patient
    split   str    train, val or test
    _copy   int    which of several rows with the same picture and box this is; only there where such rows exist

Any further column is carried along. The table is Arrow's, so no step here walks over rows in Python.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from vicinal.data.images import IN_TAR, read_image
from vicinal.types import InputError

__all__ = ["Manifest", "box_array", "box_values", "row_list", "split_word"]

BOX = pa.list_(pa.float64(), 4)
WORDS = ("label", "text", "group", "split")  # columns that hold a word in each row
IMAGE_ENDINGS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# what a split column, a folder or a file of a data set may call its parts
SPLIT_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
    "query": ("query",),
    "gallery": ("gallery",),
}
FEW = 5  # how many offenders a message names before it only counts


@dataclass(frozen=True, slots=True)
class Manifest:
    """A table of images with their classes; built by the `read_*` functions or by `Manifest.build`.

    Args:
        table: the columns of the module's docstring, and any more.
        root: the folder that relative image paths start from.
        classes: C names; a row's label is a position in this tuple.
        padding: by which share of its longer side each box is widened on every side before the picture is cut.
        notes: what was left out or found odd while reading, a sentence each.

    >>> m = Manifest.build({"image": ["a.png", "b.png", "c.png"], "label": [10, 9, 10]}, "photos")
    >>> m.classes, m.labels().tolist(), m.ids()
    (('9', '10'), [1, 0, 1], ('a.png', 'b.png', 'c.png'))
    """

    table: pa.Table
    root: Path
    classes: tuple[str, ...]
    padding: float = 0.0
    notes: tuple[str, ...] = ()

    @classmethod
    def build(
        cls,
        table: pa.Table | dict[str, Any],
        root: str | Path,
        *,
        classes: Sequence[str] | None = None,
        padding: float = 0.0,
        name: str = "the table",
    ) -> Manifest:
        """A manifest from any table with an `image` column; types are mended, mistakes are named.

        Args:
            table: an Arrow table, or a mapping of column names to values.
            root: the folder that relative image paths start from.
            classes: the names of the classes in their order. None: the distinct labels, sorted; integers as integers.
            padding: see `Manifest`.
            name: what error messages call the table, usually its file.

        Raises:
            InputError: no image column, a row without an image, some rows with a label and some without, a label that
                `classes` lacks, a box that is not four finite numbers with x0 < x1 and y0 < y1.
        """
        if not isinstance(table, pa.Table):
            table = pa.table(table)
        table = _typed(table, name)
        if classes is None:
            classes = _sorted_names(table["label"])
        else:
            classes = tuple(str(c) for c in classes)
            if classes and table["label"].null_count:
                raise InputError(f"{name} has no labels, but is to have {len(classes)} classes")
            known = pc.is_in(table["label"], value_set=pa.array(classes, pa.string()))
            strange = pc.unique(table["label"].filter(pc.and_(pc.invert(known), pc.is_valid(table["label"]))))
            if len(strange):
                raise InputError(f"{name}: {_named(strange.to_pylist())} not among the {len(classes)} classes given")
        return cls(_numbered(table), Path(root).expanduser(), tuple(classes), padding)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def names(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(self.table.column_names)

    def column(self, name: str) -> list[Any]:
        """The values of a column as Python objects.

        Raises:
            InputError: there is no such column.
        """
        if name not in self.table.column_names:
            raise InputError(f"there is no column {name!r}; the table has {', '.join(self.table.column_names)}")
        return list(self.table[name].to_pylist())

    def captions(self) -> list[list[str]]:
        """What is said of each row: `text` first, then the others of the column `captions`; an empty list of none."""
        nothing: list[None] = [None] * len(self)
        texts = self.column("text") if "text" in self.names() else nothing
        several = self.column("captions") if "captions" in self.names() else nothing
        return [
            list(dict.fromkeys(c for c in ([text] if text else []) + list(more or []) if c))
            for text, more in zip(texts, several, strict=True)
        ]

    def with_first_captions(self) -> Manifest:
        """The same rows, of each only what `captions` has first, as `text`.

        >>> rows = {"image": ["a.png", "b.png"], "captions": [["a cat", "a pet"], None]}
        >>> Manifest.build(rows, ".").with_first_captions().captions()
        [['a cat'], []]
        """
        kept = [name for name in self.names() if name not in ("text", "captions")]
        first = [several[0] if several else None for several in self.captions()]
        return replace(self, table=self.table.select(kept).append_column("text", pa.array(first, pa.string())))

    def labels(self) -> Int[Tensor, "N"]:
        """Each row's position in `classes`, int64; 0 everywhere where the data has no labels (`classes` is empty)."""
        if not self.classes:
            return torch.zeros(len(self), dtype=torch.int64)
        found = pc.index_in(self.table["label"], value_set=pa.array(self.classes, pa.string()))
        return torch.from_numpy(found.to_numpy().astype(np.int64))

    def ids(self) -> tuple[str, ...]:
        """One name a row, the same in every part of the manifest.

        The image path; with `#x0,y0,x1,y1` where the row has a box; with `#2`, `#3` for the second and third row of the
        same picture and box.

        >>> m = Manifest.build({"image": ["a.png"] * 3, "label": ["x"] * 3, "box": [[0, 0, 2, 2], None, None]}, ".")
        >>> m.ids(), m.where([False, False, True]).ids()
        (('a.png#0,0,2,2', 'a.png', 'a.png#2'), ('a.png#2',))
        """
        ids = self.column("image")
        if "box" in self.table.column_names:
            boxes = self.column("box")
            ids = [
                i if b is None else f"{i}#{','.join(format(v, '.12g') for v in b)}"
                for i, b in zip(ids, boxes, strict=True)
            ]
        if "_copy" in self.table.column_names:
            ids = [i if n == 0 else f"{i}#{n + 1}" for i, n in zip(ids, self.column("_copy"), strict=True)]
        return tuple(ids)

    def where(self, mask: Bool[Tensor, "N"] | np.ndarray | Sequence[bool]) -> Manifest:
        """The rows where `mask` is true, in order. `classes` stay, so labels stay comparable; see `compact`."""
        keep = np.asarray(mask)
        if keep.dtype != np.bool_ or keep.shape != (len(self),):
            raise ValueError(f"where takes {len(self)} truth values, not {keep.dtype} of shape {keep.shape}")
        return replace(self, table=self.table.filter(pa.array(keep)))

    def compact(self) -> Manifest:
        """The same rows, with only the classes that they use, in their order."""
        used = set(pc.unique(self.table["label"]).to_pylist())
        return replace(self, classes=tuple(c for c in self.classes if c in used))

    def with_classes(self, classes: Sequence[str]) -> Manifest:
        """The same rows with other classes, so that labels count positions in those.

        Raises:
            InputError: a row's class is not among them.
        """
        return replace(Manifest.build(self.table, self.root, classes=classes, padding=self.padding), notes=self.notes)

    def with_padding(self, padding: float) -> Manifest:
        """The same rows, each box widened by this share of its longer side when the picture is read."""
        if not (np.isfinite(padding) and padding >= 0):
            raise InputError(f"padding is a share of the box's longer side, 0 or more, not {padding}")
        return replace(self, padding=float(padding))

    def concat(self, *others: Manifest) -> Manifest:
        """The rows of all, one after another. They must share root, classes and padding.

        Raises:
            ValueError: they do not.
        """
        for other in others:
            if (other.root, other.classes, other.padding) != (self.root, self.classes, self.padding):
                raise ValueError("concat takes manifests of the same root, classes and padding")
        tables = [m.table.drop_columns(["_copy"] if "_copy" in m.names() else []) for m in (self, *others)]
        table = pa.concat_tables(tables, promote_options="default")
        return Manifest.build(table, self.root, classes=self.classes, padding=self.padding)

    def path(self, row: int) -> Path:
        """Where the image file of a row lies."""
        file: str = self.table["image"][row].as_py()
        return self.root / file

    @classmethod
    def united(cls, parts: Mapping[str, Manifest]) -> Manifest:
        """The manifests of train, val and test as one: a `split` column, paths from their common folder, all classes.

        Raises:
            InputError: a key that is no part of a split, or columns of different kinds.
        """
        if not parts:
            raise InputError("no source is given; name at least one of train, val, test")
        words = {part: split_word(part) for part in parts}
        strange = [part for part, word in words.items() if word is None]
        if strange:
            raise InputError(f"{strange[0]!r} is no part of a split; name the sources {', '.join(SPLIT_WORDS)}")
        said = [
            replace(
                manifest,
                table=manifest.table.drop_columns(["split"] if "split" in manifest.names() else []).append_column(
                    "split", pa.array([words[part]] * len(manifest), pa.string())
                ),
            )
            for part, manifest in parts.items()
        ]
        return cls.together(said, names=tuple(parts))

    @classmethod
    def together(cls, manifests: Sequence[Manifest], *, names: Sequence[str] = ()) -> Manifest:
        """The rows of several sources as one: paths from their common folder, all classes, all columns.

        Labels that are spelt alike are one class. A column that a source lacks is empty in its rows; `split` is kept
        only if all have it, since an empty word there means nothing.

        Args:
            manifests: one or more.
            names: what an error calls them.

        Raises:
            InputError: no sources, columns of different kinds, or labels in some and none in others.
        """
        if not manifests:
            raise InputError("no source is given; name at least one")
        called = ", ".join(names) or ", ".join(str(m.root) for m in manifests)
        roots = [m.root for m in manifests]
        root = roots[0] if len(set(roots)) == 1 else Path(os.path.commonpath([os.path.realpath(r) for r in roots]))
        dropped = {"_copy"} if all("split" in m.names() for m in manifests) else {"_copy", "split"}
        tables = [m.rebased(root).table for m in manifests]
        tables = [table.drop_columns([c for c in table.column_names if c in dropped]) for table in tables]
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(f"the sources of {called} have columns of different kinds ({error})") from error
        if len({m.padding for m in manifests}) > 1:
            raise InputError(f"the sources of {called} widen their boxes differently; give all one padding")
        notes = tuple(note for manifest in manifests for note in manifest.notes)
        built = cls.build(table, root, padding=manifests[0].padding, name=f"{called} together")
        return replace(built, notes=notes)

    def rebased(self, root: str | Path) -> Manifest:
        """The same images, with paths that start from another folder."""
        root = Path(root).expanduser()
        prefix = _way(self.root, root)
        if prefix == ".":
            return replace(self, root=root)
        images = self.table["image"]
        absolute = pc.match_substring_regex(images, r"^([A-Za-z]:)?/")
        images = pc.if_else(absolute, images, pc.binary_join_element_wise(prefix, images, "/"))
        return replace(self, root=root, table=self.table.set_column(self.names().index("image"), "image", images))

    def missing(self) -> Bool[Tensor, "N"]:
        """Rows whose image file does not exist. Folders are listed once each, so that a million files take seconds.

        Of an image inside a tar, the tar is looked for.
        """
        files = pc.replace_substring_regex(self.table["image"], IN_TAR, r"\1")
        if len(self) <= 2000:
            there = [Path(self.root, file).is_file() for file in files.to_pylist()]
            return ~torch.tensor(there, dtype=torch.bool)
        folders = pc.replace_substring_regex(files, "[^/]*$", "")
        listed: dict[str, list[str]] = {}
        for folder in pc.unique(folders).to_pylist():
            if (self.root / folder).is_dir():
                with os.scandir(self.root / folder) as entries:
                    listed[folder] = [folder + entry.name for entry in entries if entry.is_file()]
        names = pa.chunked_array([pa.array(found, pa.string()) for found in listed.values()], pa.string())
        absent = np.array(pc.invert(pc.is_in(files, value_set=names)).to_numpy())
        # a listing may spell a name otherwise than the disk takes it (case, accents): ask again, file by file
        doubtful = absent & pc.is_in(folders, value_set=pa.array(list(listed), pa.string())).to_numpy()
        for row in np.flatnonzero(doubtful).tolist():
            absent[row] = not Path(self.root, files[row].as_py()).is_file()
        return torch.from_numpy(absent)

    def refuse_missing(self, name: str = "the table", *, hint: str = "root") -> None:
        """Nothing, if every image file exists.

        Args:
            name: what the error calls the source of the rows.
            hint: the argument of the reader that says where images lie.

        Raises:
            InputError: some do not; names the first, counts all, and says where the first is found, if it is near.
        """
        absent = self.missing().numpy()
        if not absent.any():
            return
        rows = np.flatnonzero(absent)
        files = self.table["image"].take(rows[:FEW]).to_pylist()
        listed = "; ".join(f"row {row + 1}: {file}" for row, file in zip(rows[:FEW], files, strict=True))
        mend = "leave those rows out" if len(rows) < len(self) else f"give the folder that they start from as {hint}"
        near = (Path(), self.root.parent, self.root / "images", self.root.parent / "images")
        found = [folder.absolute() for folder in near if (folder / files[0]).is_file()]
        if re.match(r"(https?|s3|gs)://", files[0]):
            mend = "these are addresses: fetch the images first, and give their paths"
        elif found:
            mend = f"the first is in {found[0]}: give {hint}={str(found[0])!r}"
        elif (self.root / files[0].replace("\\", "/")).is_file():
            mend = "write paths with / instead of \\"
        raise InputError(
            f"{name}: {len(rows):,} of {len(self):,} image files are missing below {self.root} ({listed}"
            f"{'; …' if len(rows) > FEW else ''}); {mend}"
        )

    def image(self, row: int, at_least: tuple[int, int] | None = None) -> UInt8[Tensor, "3 H W"]:
        """The picture of a row: rotated as EXIF says, cut to its box, RGB. See `vicinal.data.images.read_image`."""
        box = self.table["box"][row].as_py() if "box" in self.table.column_names else None
        return read_image(
            self.path(row), box=None if box is None else tuple(box), padding=self.padding, at_least=at_least
        )

    def save(self, path: str | Path) -> None:
        """Write one Parquet file. `root` is stored relative to it, so that a folder with its data can be moved."""
        path = Path(path).expanduser()
        root = _way(self.root, path.parent)
        known = {"classes": self.classes, "root": root, "padding": self.padding}
        table = self.table.replace_schema_metadata({"vicinal": json.dumps(known)})
        part = path.with_name(f".{path.name}.part")
        pq.write_table(table, part, compression="zstd")
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Manifest:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, or holds something else.
        """
        path = Path(path).expanduser()
        try:
            table = pq.read_table(path, memory_map=True)
            known = json.loads(table.schema.metadata[b"vicinal"])
        except (OSError, pa.ArrowException, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not a manifest saved by vicinal ({error}); read tables with read_table"
            ) from error
        root = path.parent if known["root"] == "." else Path(os.path.realpath(path.parent / known["root"]))
        return cls.build(
            table.replace_schema_metadata(None),
            root,
            classes=known["classes"],
            padding=known["padding"],
            name=str(path),
        )


def _typed(table: pa.Table, name: str) -> pa.Table:
    """The table with each known column in its own type and no row that cannot be used."""
    if "image" not in table.column_names:
        raise InputError(f"{name} has no column 'image'; it has {', '.join(table.column_names) or 'no columns'}")
    if table.num_rows == 0:
        raise InputError(f"{name} has no rows")
    columns = {"image": _words(table["image"], "image", name)}
    columns["label"] = (
        _words(table["label"], "label", name)
        if "label" in table.column_names
        else pa.chunked_array([pa.nulls(table.num_rows, pa.string())])
    )
    for column in table.column_names:
        if column not in columns:
            columns[column] = _words(table[column], column, name) if column in WORDS else table[column]
    if "box" in columns:
        columns["box"] = _boxes(columns["box"], name)
    empty = _rows(pc.is_null(columns["image"]))
    if len(empty):
        raise InputError(f"{name}: no image in {row_list(empty)}")
    unlabelled = _rows(pc.is_null(columns["label"]))
    if 0 < len(unlabelled) < table.num_rows:
        raise InputError(f"{name}: no label in {row_list(unlabelled)}; give one, or leave those rows out")
    return pa.table(columns)


def _words(column: pa.ChunkedArray, what: str, name: str) -> pa.ChunkedArray:
    """A column as strings without blanks around them; the empty string is no value."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        hint = "; data sets with the pictures inside are read by read_hub" if what == "image" else ""
        raise InputError(f"{name}: column {what!r} holds {kind}, not words{hint}")
    if pa.types.is_floating(kind):  # integers with gaps are read as floats by some writers: 3.0 means the class 3
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, kind), column)
        whole = pc.all(pc.and_(pc.is_finite(column), pc.equal(column, pc.floor(column)))).as_py()
        column = column if whole is False else column.cast(pa.int64())
    words = column.cast(pa.string())
    words = words if what == "text" else pc.utf8_trim_whitespace(words)
    return pc.if_else(pc.equal(words, ""), pa.scalar(None, pa.string()), words)


def _boxes(column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """A column as four floats a row, or null."""
    try:
        boxes = column.cast(BOX)
    except pa.ArrowException as error:
        raise InputError(f"{name}: a box is four numbers x0, y0, x1, y1, or nothing ({error})") from error
    given = np.flatnonzero(pc.is_valid(boxes).to_numpy())
    corners = np.asarray(pc.list_flatten(boxes.drop_null()).to_numpy(), float).reshape(-1, 4)
    good = np.isfinite(corners).all(1) & (corners[:, 0] < corners[:, 2]) & (corners[:, 1] < corners[:, 3])
    if not good.all():
        first = np.flatnonzero(~good)[0]
        raise InputError(
            f"{name}: a box is x0, y0, x1, y1 with x0 < x1 and y0 < y1; {row_list(given[~good])}: "
            f"{corners[first].tolist()}"
        )
    return boxes


def _numbered(table: pa.Table) -> pa.Table:
    """The table with a column `_copy`, where several rows have the same picture and box."""
    if "_copy" in table.column_names or pc.count_distinct(table["image"]).as_py() == table.num_rows:
        return table
    pictures = pc.index_in(table["image"], value_set=pc.unique(table["image"])).to_numpy()
    key = pictures.astype(np.float64)[:, None]
    if "box" in table.column_names:
        key = np.concatenate([key, np.nan_to_num(box_array(table), nan=-np.inf)], 1)
    _, same = np.unique(key, axis=0, return_inverse=True)
    order = np.argsort(same, kind="stable")
    starts = np.flatnonzero(np.diff(same[order], prepend=-1))
    copy = np.empty(len(same), np.int32)
    copy[order] = np.arange(len(same)) - np.repeat(starts, np.diff(starts, append=len(same)))
    return table.append_column("_copy", pa.array(copy)) if copy.any() else table


def _sorted_names(labels: pa.ChunkedArray) -> tuple[str, ...]:
    """The distinct labels in order; all integers: as integers."""
    names = sorted(name for name in pc.unique(labels).to_pylist() if name is not None)
    if names and all(name.removeprefix("-").isdecimal() for name in names):
        names.sort(key=int)
    return tuple(names)


def box_array(table: pa.Table) -> Float[np.ndarray, "N 4"]:
    """The column `box` as numbers; NaN where a row has none."""
    boxes = table["box"]
    corners = np.full((table.num_rows, 4), np.nan)
    corners[pc.is_valid(boxes).to_numpy()] = pc.list_flatten(boxes.drop_null()).to_numpy().reshape(-1, 4)
    return corners


def split_word(word: str) -> str | None:
    """The part that a word means: "train", "val" or "test"; None for any other word.

    >>> split_word("Validation"), split_word("extra")
    ('val', None)
    """
    word = word.strip().lower()
    return next((part for part, words in SPLIT_WORDS.items() if word in words), None)


def box_values(corners: Float[np.ndarray, "N 4"]) -> pa.ChunkedArray:
    """Numbers as a column `box`; a row of NaN has none."""
    none = pa.array(np.isnan(corners).all(1))
    return pa.chunked_array([pa.FixedSizeListArray.from_arrays(pa.array(corners.ravel()), 4, mask=none)])


def _way(root: Path, folder: Path) -> str:
    """How to get to `root` from a folder, with forward slashes; the whole path where there is no way (Windows)."""
    real = Path(os.path.realpath(root))
    try:
        return Path(os.path.relpath(real, os.path.realpath(folder))).as_posix()
    except ValueError:
        return real.as_posix()


def _rows(mask: pa.ChunkedArray) -> np.ndarray:
    return np.flatnonzero(mask.to_numpy())


def row_list(rows: np.ndarray) -> str:
    """Rows for a message: counted from 1, the header of a file not counted."""
    first = ", ".join(str(r + 1) for r in rows[:FEW])
    more = f" and {len(rows) - FEW:,} more" if len(rows) > FEW else ""
    return f"row{'s' if len(rows) > 1 else ''} {first}{more}"


def _named(words: Sequence[str]) -> str:
    """Words for a message: the first few, then a count, then the verb."""
    more = f" and {len(words) - FEW:,} more" if len(words) > FEW else ""
    return f"{', '.join(repr(w) for w in words[:FEW])}{more} {'are' if len(words) > 1 else 'is'}"
