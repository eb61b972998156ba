"""Open Images as the overlap adapter's authors list it: a CSV of ImageID, DisplayName and type, pictures by their id.

ImageID,DisplayName,type
000a1249af2bc5f0,Tomato,train          ->  ROOT/000a1249af2bc5f0.jpg, or ROOT/train/000a1249af2bc5f0.jpg
"""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa

from vicinal.data.manifest import FEW, IMAGE_ENDINGS, Manifest
from vicinal.data.tables import read_rows
from vicinal.types import InputError

__all__ = ["read_open_images"]

COLUMNS = ("ImageID", "DisplayName", "type")


def read_open_images(root: str | Path, csv: str | Path) -> Manifest:
    r"""The generic set of the overlap adapter: one label (DisplayName) a row, in the classes' order of the file.

    A picture may stand in several rows, with other labels. `type` (train, validation, test in Open Images) is kept as
    the column `type`, and is not a split: all rows are trained on. Pictures lie in `root`, or in a folder of it that is
    called as their type; any ending of an image will do.

    Args:
        root: the folder of the pictures.
        csv: the table; a column `type` is optional.

    Raises:
        InputError: the table cannot be read, lacks a column, has an empty cell, or pictures are missing.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()); (folder / "train").mkdir(); (folder / "train" / "7f.jpg").touch()
    >>> _ = (folder / "list.csv").write_text("ImageID,DisplayName,type\n7f,Tomato,train\n")
    >>> read_open_images(folder, folder / "list.csv").ids()
    ('train/7f.jpg',)
    """
    root, path = Path(root).expanduser(), Path(csv).expanduser()
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; root is where the pictures of {path.name} lie")
    table = read_rows(path)
    missing = [name for name in COLUMNS[:2] if name not in table.column_names]
    if missing:
        raise InputError(
            f"{path} has no column {missing[0]}; Open Images lists {', '.join(COLUMNS)}, and this file has "
            f"{', '.join(table.column_names)}. Tables of other columns are read by read_table"
        )
    ids, labels = (table[name].to_pylist() for name in COLUMNS[:2])
    kinds = table["type"].to_pylist() if "type" in table.column_names else [None] * len(ids)
    for name, words in ((COLUMNS[0], ids), (COLUMNS[1], labels)):
        if empty := [row + 1 for row, word in enumerate(words) if not word]:
            raise InputError(
                f"{path}: no {name} in row {empty[0]} and {len(empty) - 1} more; fill it, or delete the row"
            )
    known = {folder: _pictures(root / folder) for folder in ("", *sorted({kind for kind in kinds if kind}))}
    images, absent = [], []
    for row, (name, kind) in enumerate(zip(ids, kinds, strict=True)):
        found = next((f"{at}/{known[at][name]}" for at in (kind or "", "") if name in known[at]), None)
        images.append((found or name).removeprefix("/"))
        if found is None:
            absent.append(row)
    if absent:
        listed = "; ".join(f"row {row + 1}: {ids[row]}" for row in absent[:FEW])
        raise InputError(
            f"{path}: {len(absent):,} of {len(ids):,} pictures are missing in {root} and its folders of types "
            f"({listed}{'; …' if len(absent) > FEW else ''}); fetch them, or leave those rows out"
        )
    columns = {"image": images, "label": labels} | ({"type": kinds} if any(kinds) else {})
    return Manifest.build(pa.table(columns), root, classes=tuple(dict.fromkeys(labels)), name=str(path))


def _pictures(folder: Path) -> dict[str, str]:
    """Name without ending -> file name, of the pictures right in a folder."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        files = sorted(entry.name for entry in entries if entry.name.lower().endswith(IMAGE_ENDINGS))
    return {os.path.splitext(name)[0]: name for name in files}  # noqa: PTH122  a million times
