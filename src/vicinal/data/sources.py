"""Readers and writers: from a folder, a table, COCO, VOC, shards or a Hub data set as it is to a Manifest, and back.

Letters: N rows, C classes.

Every reader gives the same manifest for the same pictures. Classes are the distinct labels, sorted (integers as
integers). A mapping `{"train": A, "val": B, "test": C}` instead of one source reads each, and gives one manifest with a
`split` column and the classes of all together, so that a label means the same in every part.

Boxes are x0, y0, x1, y1 in pixels of the picture as it is shown, that is with its EXIF rotation applied: what
annotation tools draw on. COCO files hold x, y, width, height instead; that is changed on the way in and out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vicinal.data.coco import read_coco, write_coco
from vicinal.data.hub import read_hub
from vicinal.data.manifest import FEW, IMAGE_ENDINGS, SPLIT_WORDS, Manifest, split_word
from vicinal.data.open_images import read_open_images
from vicinal.data.shards import read_shards, write_shards
from vicinal.data.splits import class_disjoint, official
from vicinal.data.tables import read_table, write_table
from vicinal.data.voc import read_voc, write_voc
from vicinal.types import InputError

__all__ = [
    "prepare",
    "read_coco",
    "read_folder",
    "read_hub",
    "read_open_images",
    "read_shards",
    "read_table",
    "read_voc",
    "write_coco",
    "write_shards",
    "write_table",
    "write_voc",
]

Source = str | Path


def read_folder(root: Source | Mapping[str, Source], *, labels: bool = True) -> Manifest:
    """A folder with one folder for each class; a nested folder's class is its path below `root`.

    Top folders that are called train, val, test (or a word like it, see `SPLIT_WORDS`) become the `split` column, and
    the class folders are looked for below them. Hidden files and files that are no images are passed over; links are
    followed.

    Args:
        root: the folder, or a mapping of train, val, test to one folder each.
        labels: False takes every image below `root`, without labels.

    Raises:
        InputError: no such folder, no images in it, images outside of any class folder, or top folders of which only
            some are called like parts of a split.
    """
    if isinstance(root, Mapping):
        return Manifest.united({part: read_folder(one, labels=labels) for part, one in root.items()})
    root = Path(root).expanduser()
    if not root.is_dir():
        what = "is a file; read it by read_table or read_coco" if root.exists() else "does not exist"
        raise InputError(f"{root} {what}")
    images = _images_below(root)
    if not images:
        hint = "; it holds tars, which read_shards reads" if any(root.glob("*.tar")) else ""
        raise InputError(f"{root} holds no images (looked for {', '.join(IMAGE_ENDINGS)}){hint}")
    depths = [image.count("/") for image in images]
    tops = sorted({image.split("/", 1)[0] for image, depth in zip(images, depths, strict=True) if depth})
    parts = _split_folders(root, tops, images)
    if not labels:
        table = {"image": images}
    else:
        loose = [image for image, depth in zip(images, depths, strict=True) if depth < (2 if parts else 1)]
        if loose:
            raise InputError(
                f"{root}: {len(loose):,} images lie outside of any class folder (first: {loose[0]}). Put them into a "
                "folder of their class's name, or read them by labels=False where no labels are needed"
            )
        folders = [image.rpartition("/")[0] for image in images]
        table = {"image": images, "label": [f.split("/", 1)[1] for f in folders] if parts else folders}
    if parts:
        table["split"] = [parts[image.split("/", 1)[0]] for image in images]
    return Manifest.build(table, root, name=str(root))


def _images_below(root: Path) -> list[str]:
    """Image files below a folder, as relative paths with forward slashes, sorted."""
    found = []
    walked = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in walked:  # a link that leads back up would go on for ever
            folders.clear()
            continue
        walked.add(real)
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__MACOSX"]
        relative = Path(folder).relative_to(root).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        found += [prefix + f for f in files if f.lower().endswith(IMAGE_ENDINGS) and not f.startswith(".")]
    return sorted(found)


def _split_folders(root: Path, tops: Sequence[str], images: Sequence[str]) -> dict[str, str]:
    """Top folders that are parts of a split, with the part's name; empty if they are classes."""
    words = {top: part for top in tops if (part := split_word(top))}
    if not words:
        return {}
    if len(words) == len(tops):
        # a lone folder `test` with pictures right in it is a class; train/cat/1.png is a split
        return words if any(image.count("/") >= 2 for image in images) or len(words) > 1 else {}
    if "train" in words.values() and len(words) > 1:
        others = [top for top in tops if top not in words]
        raise InputError(
            f"{root}: the folders {', '.join(words)} look like parts of a split, but {', '.join(others[:FEW])} "
            f"do{'' if len(others) > 1 else 'es'} not; move one kind elsewhere, or name the parts: "
            f"{{train: {root / next(iter(words))}, …}}"
        )
    return {}


def prepare(
    manifest: Manifest, out: Source, *, holdout: float | None = None, seed: int = 42, format: str = "coco"
) -> tuple[Path, ...]:
    """Write a data set's parts with some classes held out, for trainings and tests that read separate files.

    For each part of the `split` column (or one called `all`, where there is none) three files come into
    `out/annotations`: `<part>` with every class, `public_<part>` with those to train on, `holdout_<part>` with those
    never seen; which are which, `class_disjoint` says. Images stay where they are, and paths to them are relative. Each
    file lists only the classes that it has. `split.json` keeps seed, share and classes.

    As shards the pictures are copied, to `out/shards`: a part as `<part>_000000.tar` and so on or, with classes held
    out, in two halves, `public_<part>_…` and `holdout_<part>_…`.

    Files of an earlier `prepare` that this one would not write are removed, so that parts of two seeds never mix.

    Args:
        manifest: what to divide.
        out: a folder, made if need be.
        holdout: the share of the classes that is held out. None: 0.2, and of shards none.
        seed: of the choice.
        format: "coco", "parquet" or "shards".

    Returns:
        The files written.

    Raises:
        InputError: an unknown format, a word in `split` that is none, or files in `out` that something else wrote.
    """
    endings = {"coco": ".json", "parquet": ".parquet", "shards": "_%06d.tar"}
    if format not in endings:
        raise InputError(f"format: {format!r} is unknown; use {' or '.join(endings)}")
    if holdout is None:
        holdout = 0.0 if format == "shards" else 0.2
    seen: tuple[str, ...] = manifest.classes
    unseen: tuple[str, ...] = ()
    if holdout or format != "shards":
        seen, unseen = class_disjoint(manifest.classes, holdout=holdout, seed=seed)
    held = pc.is_in(manifest.table["label"], value_set=pa.array(unseen, pa.string())).to_numpy()
    parts: Mapping[str, np.ndarray] = {"all": np.ones(len(manifest), bool)}
    if "split" in manifest.names():
        files = manifest.column("image")
        parts = {part: mask.numpy() for part, mask in official(manifest.column("split"), images=files).items()}
    sides = {"": np.ones_like(held), "public_": ~held, "holdout_": held}
    if format == "shards":  # these hold the pictures, so no picture stands in two of them
        sides = {"": sides[""]} if not unseen else {side: sides[side] for side in ("public_", "holdout_")}
    wanted = {f"{side}{part}": mask & chosen for part, mask in parts.items() for side, chosen in sides.items()}
    folder = Path(out).expanduser() / ("shards" if format == "shards" else "annotations")
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}{endings[format]}" for name, mask in wanted.items() if mask.any()}
    note = folder / "split.json"
    _clear_earlier(note, folder)
    note.write_text(json.dumps({"files": [path.name for path in paths.values()], "unfinished": True}), encoding="utf-8")
    if format == "shards":
        tars = {name: write_shards(manifest.where(wanted[name]), path, seed=seed) for name, path in paths.items()}
        counts = {paths[name].name: int(wanted[name].sum()) for name in tars}
        _write_note(note, manifest, seed, holdout, seen, unseen, counts)
        return tuple(tar for several in tars.values() for tar in several)
    write: Callable[[Manifest, Source], None] = write_coco if format == "coco" else write_table
    for name, path in paths.items():
        write(manifest.where(wanted[name]).compact() if format == "parquet" else manifest.where(wanted[name]), path)
    counts = {path.name: int(wanted[name].sum()) for name, path in paths.items()}
    _write_note(note, manifest, seed, holdout, seen, unseen, counts)
    return tuple(paths.values())


def _write_note(
    note: Path,
    manifest: Manifest,
    seed: int,
    holdout: float,
    seen: Sequence[str],
    unseen: Sequence[str],
    files: Mapping[str, int],
) -> None:
    about = {
        "seed": seed,
        "holdout": holdout,
        "classes": manifest.classes,
        "public": seen,
        "holdout_classes": unseen,
        "classes_sha256": hashlib.sha256("\n".join(manifest.classes).encode()).hexdigest(),
        "files": files,
    }
    note.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _clear_earlier(note: Path, folder: Path) -> None:
    """Remove what an earlier `prepare` wrote; refuse to touch what something else did."""
    ours: set[str] = set()
    if note.exists():
        try:
            ours = set(json.loads(note.read_text(encoding="utf-8"))["files"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{note} is not by vicinal; choose another folder") from error
    parts = "|".join(("all", *SPLIT_WORDS))
    foreign = [
        f.name
        for f in folder.iterdir()
        if re.fullmatch(rf"(public_|holdout_)?({parts})\.(json|parquet)", f.name) and f.name not in ours
    ]
    if foreign:
        raise InputError(
            f"{folder} holds {', '.join(sorted(foreign)[:FEW])}, of which no split.json tells the seed: remove them, "
            "or choose another folder"
        )
    for name in ours:
        if name.endswith(".tar"):
            for tar in folder.glob(name.replace("%06d", "[0-9]" * 6)):
                tar.unlink()
        (folder / Path(name).name).unlink(missing_ok=True)
