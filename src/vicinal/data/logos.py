"""References of each brand, scenes to find them in, and one SQLite file that says what is what: written, and read.

    OUT/reference_logos/<category>/<brand>/<n>.png   cut out of pictures: what a matcher is given
    OUT/test_images/…                                whole scenes; no reference was cut from one, or from its like
    OUT/test_data_mapping.db                         what is what: the tables of SCHEMA

Brands are divided by their base brand (`data.voc.base_brand`), whatever else there is:

    u = sha256(seed, base brand) / 2^256          test if u < h / 2,  val if u < h,  else train

so a brand stays where it is when others are added, and its variants stay together. A picture, with all that look like
it, lies on the side of the most held out of its brands: test, else val, else train. Boxes of a brand of another side
are in the file, but are no rows of what is read: not trained on, since the picture is measured, and not asked about.

Letters: h the share held out, N rows, F files.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sqlite3
import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor, from_numpy

from vicinal.data.check import Alike, alike
from vicinal.data.manifest import Manifest, box_array, box_values
from vicinal.data.voc import base_brand
from vicinal.types import InputError

__all__ = ["DATABASE", "read_logos", "references_and_queries", "write_logos"]

DATABASE: Final = "test_data_mapping.db"
SIDES: Final = ("train", "val", "test")
SCHEMA: Final = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT);
CREATE TABLE logos(id INTEGER PRIMARY KEY, brand TEXT, base_brand TEXT, category TEXT, split TEXT,
    UNIQUE(brand, category));
CREATE TABLE images(id INTEGER PRIMARY KEY, path TEXT UNIQUE, width INTEGER, height INTEGER, phash TEXT, split TEXT);
CREATE TABLE annotations(id INTEGER PRIMARY KEY, image_id INTEGER REFERENCES images, logo_id INTEGER REFERENCES logos,
    x1 REAL, y1 REAL, x2 REAL, y2 REAL, area_frac REAL, difficult INTEGER);
CREATE TABLE reference_images(id INTEGER PRIMARY KEY, logo_id INTEGER REFERENCES logos, path TEXT UNIQUE,
    source_image_id INTEGER REFERENCES images, source_annotation_id INTEGER REFERENCES annotations, rank INTEGER);
CREATE TABLE test_images(image_id INTEGER PRIMARY KEY REFERENCES images, n_logos INTEGER);
CREATE INDEX annotations_image ON annotations(image_id);
CREATE INDEX annotations_logo ON annotations(logo_id);
CREATE INDEX references_logo ON reference_images(logo_id);
"""


def write_logos(
    manifest: Manifest,
    out: str | Path,
    *,
    holdout: float = 0.2,
    seed: int = 42,
    references: int = 5,
    workers: int | None = None,
) -> Path:
    """Divide a data set by brand, cut references, copy scenes, and write the database; `read_logos` reads it back.

    Each brand of val and test gets up to `references` references, one from a picture, and keeps one picture at least to
    be asked about; a brand with one picture has none, and is unknown to whoever is given the references. Pictures that
    are trained on stay where they are.

    Args:
        manifest: labelled, as `read_voc` gives it; `group`, where it is there, stands for the base brand, and
            `category` names the folders.
        out: the folder; one that this function wrote is replaced.
        holdout: h, half of it to test, half to calibrate (val).
        seed: of the division and of the choice of references.
        references: the most a brand.
        workers: threads that look at pictures; None: one for each core.

    Returns:
        The database.

    Raises:
        InputError: no labels, a side without a brand, an unreadable picture, or `out` holds something else.
    """
    out = Path(out).expanduser()
    if not manifest.classes:
        raise InputError("logos need labels: the brand of each picture, or of each box")
    if not 0 < holdout < 1 or references < 1:
        raise InputError(f"holdout is a share between 0 and 1, references at least 1; not {holdout} and {references}")
    if out.exists() and not (out.is_dir() and (_is_ours(out / DATABASE) or not any(out.iterdir()))):
        raise InputError(f"{out} exists and was not written by `vicinal prepare --format logos`; choose another folder")
    brands = _base_brands(manifest)
    side = _sides(brands, holdout, seed)
    seen = alike(manifest, workers=workers)
    if seen.unreadable:
        first = min(seen.unreadable)
        raise InputError(f"{seen.files[first]}: {seen.unreadable[first]}; `vicinal check` lists all such files")
    side_of_row = np.array([SIDES.index(side[brand]) for brand in brands])
    side_of_head = np.zeros(len(seen.files), np.int64)
    np.maximum.at(side_of_head, seen.head[seen.of_row], side_of_row)
    chosen = _references(manifest, seen, side_of_row, side_of_head, references, seed)
    fresh = out.parent / f".{out.name}.{uuid.uuid4().hex}"
    fresh.mkdir(parents=True)
    try:
        rows = _Rows(manifest, seen, brands, side_of_row, side_of_head[seen.head])
        _fill(fresh, out, rows, chosen, {"seed": seed, "holdout": holdout, "references": references})
        if out.exists():
            shutil.rmtree(out)
        fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)  # gone already, if all went well
    return out / DATABASE


def read_logos(path: str | Path) -> Manifest:
    """What `write_logos` wrote, as one table: label (brand), group (base brand), category, split, role, box, difficult.

    `role` is "train", or in val and test "reference" or "query". So `split: official` trains on the training brands,
    and selects and measures among references and queries of brands that it has not seen.

    Args:
        path: the database; it is opened read-only.

    Raises:
        InputError: it is missing, no such database, or lists pictures that are gone.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"{path} does not exist; write one with `vicinal prepare --format logos`")
    try:
        connection = sqlite3.connect(f"file:{path.resolve().as_posix()}?mode=ro", uri=True)
        try:
            boxed = connection.execute(
                "SELECT i.path, l.brand, l.base_brand, l.category, i.split, "
                "CASE i.split WHEN 'train' THEN 'train' ELSE 'query' END, a.difficult, "
                "a.x1, a.y1, a.x2, a.y2, i.width, i.height FROM annotations a "
                "JOIN images i ON i.id = a.image_id JOIN logos l ON l.id = a.logo_id WHERE l.split = i.split "
                "AND (i.split = 'train' OR i.id IN (SELECT image_id FROM test_images)) ORDER BY a.id"
            ).fetchall()
            cut = connection.execute(
                "SELECT r.path, l.brand, l.base_brand, l.category, l.split, 'reference', 0, NULL, NULL, NULL, NULL, "
                "NULL, NULL FROM reference_images r JOIN logos l ON l.id = r.logo_id ORDER BY r.id"
            ).fetchall()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise InputError(f"{path} is no database of logos ({error}); write one with `vicinal prepare`") from error
    rows = [*boxed, *cut]
    if not rows:
        raise InputError(f"{path} lists no picture; write it anew with `vicinal prepare --format logos`")
    names = ("image", "label", "group", "category", "split", "role", "difficult")
    columns: dict[str, Any] = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    columns["difficult"] = [bool(value) for value in columns["difficult"]]
    corners = np.array([row[7:11] for row in rows], float)
    whole = (corners == np.array([(0, 0, row[11], row[12]) for row in rows], float)).all(1)
    corners[whole] = np.nan
    columns["box"] = box_values(corners)
    manifest = Manifest.build(columns, path.parent, name=str(path))
    manifest.refuse_missing(str(path))
    return manifest


def references_and_queries(
    manifest: Manifest, *, references: int = 5, seed: int = 42
) -> tuple[Bool[Tensor, "N"], Bool[Tensor, "N"]]:
    """Which rows stand for their class, and which are asked about: never two boxes of one file on both sides.

    Where the manifest has a column `role`, as `read_logos` gives it, that decides. Else each class gives up to
    `references` rows, one a file, drawn by seed and file name, and keeps a file at least to be asked about; a class in
    one file gives none, and is unknown.

    Args:
        manifest: labelled.
        references: the most a class.
        seed: of the draw.

    Raises:
        InputError: no class has two files, so there is no reference.

    >>> m = Manifest.build({"image": ["a", "b", "c", "d"], "label": ["x", "x", "x", "y"]}, ".")
    >>> chosen, asked = references_and_queries(m, references=1)
    >>> chosen.sum().item(), asked.tolist()[3]
    (1, True)
    """
    if "role" in manifest.names():
        roles = np.array(manifest.column("role"))
        return from_numpy(roles == "reference"), from_numpy(roles == "query")
    files = manifest.column("image")
    numbers = {file: i for i, file in enumerate(dict.fromkeys(files))}
    of_row = np.array([numbers[file] for file in files])
    rows = _drawn(manifest, of_row, np.arange(len(files)), references, seed)
    if not rows:
        raise InputError("no class has pictures in two files: one to be a reference, one to be asked about; bring more")
    chosen = np.zeros(len(files), bool)
    chosen[rows] = True
    return from_numpy(chosen), from_numpy(~np.isin(of_row, of_row[rows]))


# ---- dividing


def _base_brands(manifest: Manifest) -> list[str]:
    labels = manifest.column("label")
    groups = manifest.column("group") if "group" in manifest.names() else [None] * len(labels)
    return [group or base_brand(label) for group, label in zip(groups, labels, strict=True)]


def _sides(brands: Sequence[str], holdout: float, seed: int) -> dict[str, str]:
    place = {
        brand: int.from_bytes(hashlib.sha256(f"{seed}:{brand}".encode()).digest(), "big") / 2**256 for brand in brands
    }
    sides = {b: "test" if u < holdout / 2 else "val" if u < holdout else "train" for b, u in place.items()}
    for side in SIDES:
        if side not in sides.values():
            raise InputError(
                f"holdout={holdout} of {len(sides)} brands leaves none to {side}; change the share or the seed"
            )
    return sides


def _references(
    manifest: Manifest,
    seen: Alike,
    side_of_row: Int[np.ndarray, "N"],
    side_of_head: Int[np.ndarray, "F"],
    most: int,
    seed: int,
) -> list[int]:
    """Rows to cut references from: held out brands, on pictures of their own side."""
    head = seen.head[seen.of_row]
    rows = np.flatnonzero((side_of_row > 0) & (side_of_row == side_of_head[head]))
    return _drawn(manifest, head, rows, most, seed)


def _drawn(
    manifest: Manifest, picture: Int[np.ndarray, "N"], rows: Int[np.ndarray, "n"], most: int, seed: int
) -> list[int]:
    """Up to `most` rows of each class, one a picture, such that each class keeps a picture that gave none to any."""
    labels = manifest.labels().numpy()
    files = manifest.column("image")
    of_class: dict[int, dict[int, int]] = defaultdict(dict)  # class -> picture -> its first row there
    for row in rows.tolist():
        of_class[int(labels[row])].setdefault(int(picture[row]), row)
    free = {label: len(pictures) for label, pictures in of_class.items()}
    classes_on = defaultdict(set)
    for label, pictures in of_class.items():
        for one in pictures:
            classes_on[one].add(label)
    chosen: list[int] = []
    taken: set[int] = set()
    for label in sorted(of_class, key=lambda c: (free[c], manifest.classes[c])):

        def lot(one: int, rows_of: Mapping[int, int] = of_class[label]) -> bytes:
            return hashlib.sha256(f"{seed}:{files[rows_of[one]]}".encode()).digest()

        count = 0
        for one in sorted(of_class[label], key=lot):
            if count == most:
                break
            if one not in taken:
                if any(free[other] <= 1 for other in classes_on[one]):
                    continue
                taken.add(one)
                for other in classes_on[one]:
                    free[other] -= 1
            chosen.append(of_class[label][one])
            count += 1
    return sorted(chosen)


# ---- writing


class _Rows:
    """A manifest's rows as the database has them."""

    def __init__(
        self,
        manifest: Manifest,
        seen: Alike,
        brands: Sequence[str],
        side_of_row: Int[np.ndarray, "N"],
        side_of_file: Int[np.ndarray, "F"],
    ) -> None:
        names = manifest.names()
        self.manifest, self.seen, self.brands, self.side_of_file = manifest, seen, brands, side_of_file
        self.labels = manifest.column("label")
        categories = manifest.column("category") if "category" in names else [None] * len(manifest)
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for label, category in zip(self.labels, categories, strict=True):
            counts[label][category or "logos"] += 1
        # A brand that stands on a picture of another category keeps its own.
        self.category = {label: min(count, key=lambda c: (-count[c], c)) for label, count in counts.items()}
        self.difficult = manifest.column("difficult") if "difficult" in names else [False] * len(manifest)
        self.corners = box_array(manifest.table) if "box" in names else np.full((len(manifest), 4), np.nan)
        self.side_of_row = side_of_row

    def logo(self, row: int) -> tuple[str, str]:
        return self.labels[row], self.category[self.labels[row]]


def _fill(fresh: Path, out: Path, rows: _Rows, chosen: Sequence[int], settings: Mapping[str, Any]) -> None:
    manifest, seen = rows.manifest, rows.seen
    gave = set(seen.head[seen.of_row[list(chosen)]].tolist())
    scenes = [f for f, side in enumerate(rows.side_of_file.tolist()) if side > 0 and int(seen.head[f]) not in gave]
    paths = _scene_paths([seen.files[f] for f in scenes])
    path_of = dict(zip(scenes, paths, strict=True))
    for f, path in path_of.items():
        (fresh / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(manifest.root / seen.files[f], fresh / path)
    logos = {logo: i for i, logo in enumerate(dict.fromkeys(map(rows.logo, range(len(manifest)))), 1)}
    first = {logo: row for row, logo in reversed(list(enumerate(map(rows.logo, range(len(manifest))))))}
    connection = sqlite3.connect(fresh / DATABASE)
    try:
        connection.executescript(SCHEMA)
        meta = {
            "schema_version": 1,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "source_root": Path(os.path.realpath(manifest.root)).as_posix(),
            "tool_version": version("vicinal"),
            **settings,
        }
        connection.executemany("INSERT INTO meta VALUES (?, ?)", [(k, str(v)) for k, v in meta.items()])
        connection.executemany(
            "INSERT INTO logos VALUES (?, ?, ?, ?, ?)",
            [
                (
                    i,
                    brand,
                    rows.brands[first[brand, category]],
                    category,
                    SIDES[rows.side_of_row[first[brand, category]]],
                )
                for (brand, category), i in logos.items()
            ],
        )
        way = Path(os.path.relpath(os.path.realpath(manifest.root), os.path.realpath(out.parent) + f"/{out.name}"))
        connection.executemany(
            "INSERT INTO images VALUES (?, ?, ?, ?, ?, ?)",
            [
                (
                    f + 1,
                    path_of[f] if f in path_of else (way / file).as_posix(),
                    int(seen.size[f, 1]),
                    int(seen.size[f, 0]),
                    f"{int(seen.hash[f]):016x}",
                    SIDES[rows.side_of_file[f]],
                )
                for f, file in enumerate(seen.files)
            ],
        )
        size = seen.size[seen.of_row][:, ::-1].astype(float)  # width, height
        whole = np.concatenate([np.zeros_like(size), size], 1)
        corners = np.where(np.isnan(rows.corners), whole, rows.corners)
        area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1]) / size.prod(1)
        connection.executemany(
            "INSERT INTO annotations VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (
                    row + 1,
                    int(seen.of_row[row]) + 1,
                    logos[rows.logo(row)],
                    *corners[row].tolist(),
                    float(area[row]),
                    hard,
                )
                for row, hard in enumerate(map(bool, rows.difficult))
            ],
        )
        connection.executemany(
            "INSERT INTO reference_images VALUES (?, ?, ?, ?, ?, ?)", _cut(fresh, rows, logos, chosen)
        )
        objects = np.bincount(seen.of_row, minlength=len(seen.files))
        connection.executemany("INSERT INTO test_images VALUES (?, ?)", [(f + 1, int(objects[f])) for f in scenes])
        connection.commit()
    finally:
        connection.close()


def _cut(
    fresh: Path, rows: _Rows, logos: Mapping[tuple[str, str], int], chosen: Sequence[int]
) -> list[tuple[int, int, str, int, int, int]]:
    """Write the reference pictures; their rows."""
    count: dict[int, int] = defaultdict(int)
    found = []
    for number, row in enumerate(chosen, 1):
        brand, category = rows.logo(row)
        logo = logos[brand, category]
        path = f"reference_logos/{_file_name(category)}/{_file_name(brand)}/{count[logo]}.png"
        (fresh / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rows.manifest.image(row).permute(1, 2, 0).numpy()).save(fresh / path)
        found.append((number, logo, path, int(rows.seen.of_row[row]) + 1, row + 1, count[logo]))
        count[logo] += 1
    return found


def _scene_paths(files: Sequence[str]) -> list[str]:
    """Where scenes are copied to: their own path, without what leads out of the folder."""
    stripped = [re.sub(r"^(?:[A-Za-z]:)?(?:\.{0,2}/)+", "", file) for file in files]
    if len(set(stripped)) < len(stripped):  # from several roots
        stripped = [f"{i}/{path}" for i, path in enumerate(stripped)]
    return [f"test_images/{path}" for path in stripped]


def _file_name(name: str) -> str:
    """A name that every file system takes; distinct names stay distinct."""
    plain = re.sub(r'[\\/:*?"<>|\x00-\x1f]|^\.+|[. ]+$', "_", name)
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def _is_ours(database: Path) -> bool:
    if not database.is_file():
        return False
    try:
        connection = sqlite3.connect(f"file:{database.resolve().as_posix()}?mode=ro", uri=True)
        try:
            return connection.execute("SELECT value FROM meta WHERE key = 'schema_version'").fetchone() is not None
        finally:
            connection.close()
    except sqlite3.Error:
        return False
