"""Readers and writers: from a folder or a table as it is to a Manifest, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv

from vicinal.data.manifest import Manifest
from vicinal.types import InputError

__all__ = ["read_folder", "read_table"]

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def read_folder(root: str | Path) -> Manifest:
    """One folder a class; a nested folder's class is its path below `root`."""
    root = Path(root).expanduser()
    images = sorted(
        Path(folder, name).relative_to(root).as_posix()
        for folder, _, names in os.walk(root)
        for name in names
        if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    )
    if not images:
        raise InputError(f"{root} holds no images in folders")
    return Manifest.build({"image": images, "label": [i.rpartition("/")[0] for i in images]}, root, name=str(root))


def read_table(path: str | Path, *, columns: Mapping[str, str] = {}, root: str | Path | None = None) -> Manifest:
    """A CSV with at least the columns image and label."""
    path = Path(path).expanduser()
    try:
        table = pacsv.read_csv(path, convert_options=pacsv.ConvertOptions(column_types={"label": pa.string()}))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    back = {theirs: ours for ours, theirs in columns.items()}
    table = table.rename_columns([back.get(c, c) for c in table.column_names])
    return Manifest.build(table, root or path.parent, name=str(path))
