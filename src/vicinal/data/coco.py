"""COCO files: pictures, boxes on them, and the categories of the boxes; read to a Manifest, and written.

Letters: N rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float

from vicinal.data.images import image_size
from vicinal.data.manifest import Manifest, box_array, box_values
from vicinal.types import InputError

__all__ = ["read_coco", "write_coco"]

Source = str | Path


def read_coco(
    path: Source | Mapping[str, Source],
    *,
    images: Source | Mapping[str, Source] | None = None,
    check_files: bool = True,
) -> Manifest:
    """A COCO file: one row for each annotation, cut to its box; the class is the category's name.

    A box is x, y, width, height in pixels; an annotation without one, or whose box is the whole recorded picture,
    stands for the whole picture. Annotations with `iscrowd` are left out: their box holds many objects. Categories
    without an annotation are no classes. What stands in an annotation's `attributes` becomes columns.

    Args:
        path: the file, or a mapping of train, val, test to one file each.
        images: the folder that `file_name` starts from, or a mapping like that of `path`. None: the file's folder, its
            parent, or `images` in one of them, wherever the first image lies.
        check_files: False leaves missing image files to whoever reads them.

    Raises:
        InputError: a key, an image or a category is missing, two categories share a name, a box has no area or reaches
            more than a pixel beyond the recorded size of its picture, or image files are missing.
    """
    if isinstance(path, Mapping):
        folders = images if isinstance(images, Mapping) else dict.fromkeys(path, images)
        return Manifest.united(
            {part: read_coco(one, images=folders.get(part), check_files=check_files) for part, one in path.items()}
        )
    if isinstance(images, Mapping):
        raise InputError("images: a mapping needs `path` to be one too")
    path = Path(path).expanduser()
    name = str(path)
    content = _read_coco_json(path)
    pictures = {_key(image, "id", "image", i, name): image for i, image in enumerate(content["images"])}
    categories = {_key(c, "id", "category", i, name): c for i, c in enumerate(content["categories"])}
    names = {number: str(_key(c, "name", "category", number, name)) for number, c in categories.items()}
    firsts: dict[str, object] = {}
    for number, called in names.items():
        first = firsts.setdefault(called, number)
        if first != number:
            raise InputError(f"{name}: categories {first} and {number} are both called {called!r}; rename one")
    rows = [a for a in content["annotations"] if not a.get("iscrowd")]
    if not rows:
        raise InputError(f"{name} has no annotations; images without a label are read by read_folder(labels=False)")
    files, labels, boxes = [], [], np.full((len(rows), 4), np.nan)
    for i, row in enumerate(rows):
        number = row.get("id", i)
        picture = pictures.get(_key(row, "image_id", "annotation", number, name))
        label = names.get(_key(row, "category_id", "annotation", number, name))
        if picture is None or label is None:
            key = "image_id" if picture is None else "category_id"
            raise InputError(f"{name}: annotation {number} has {key} {row[key]}, which the file does not define")
        files.append(str(_key(picture, "file_name", "image", picture["id"], name)))
        labels.append(label)
        boxes[i] = _coco_box(row.get("bbox"), picture, number, name)
    table = {"image": files, "label": labels}
    attributes = _attributes(rows)
    columns: dict[str, Any] = table | {key: values for key, values in attributes.items() if key not in table}
    if not np.isnan(boxes).all():
        columns["box"] = box_values(boxes)
    root = Path(images).expanduser() if images is not None else _coco_root(path, files[0])
    manifest = Manifest.build(columns, root, name=name)
    if check_files:
        manifest.refuse_missing(name, hint="images")
    return manifest


def _read_coco_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    needed = ("images", "annotations", "categories")
    missing = [k for k in needed if not isinstance(content, dict) or not isinstance(content.get(k), list)]
    if missing:
        has = ", ".join(content) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise InputError(f"{path} lacks {', '.join(missing)}: a COCO file has {', '.join(needed)}; this has {has}")
    return dict(content)


def _key(entry: Mapping[str, Any], key: str, what: str, number: object, name: str) -> Any:  # noqa: ANN401, a JSON value
    if key not in entry:
        raise InputError(f"{name}: {what} {number} has no {key!r}; it has {', '.join(entry)}")
    return entry[key]


def _coco_box(box: Sequence[Any] | None, picture: Mapping[str, Any], number: object, name: str) -> Sequence[float]:
    """x0, y0, x1, y1, or NaN for the whole picture."""
    whole = (np.nan,) * 4
    if not box:
        return whole
    width, height = picture.get("width"), picture.get("height")
    if list(box) == [0, 0, width, height]:
        return whole
    try:
        x, y, w, h = (float(v) for v in box)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: annotation {number} has bbox {box}; give x, y, width, height") from error
    if not (w > 0 and h > 0):
        raise InputError(f"{name}: annotation {number} has a bbox without area, {box} (x, y, width, height)")
    if width and height and (x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1):
        raise InputError(
            f"{name}: annotation {number} has the bbox {box} (x, y, width, height) outside its image "
            f"{picture.get('file_name')} of {width} x {height} pixels"
        )
    return x, y, x + w, y + h


def _attributes(rows: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
    """The columns that the annotations' `attributes` make; those of mixed kinds as words."""
    keys = dict.fromkeys(key for row in rows if isinstance(row.get("attributes"), dict) for key in row["attributes"])
    columns = {}
    for key in keys:
        values = [(row.get("attributes") or {}).get(key) for row in rows]
        try:
            columns[key] = pa.array(values)
        except pa.ArrowException:
            columns[key] = pa.array([None if v is None else v if isinstance(v, str) else json.dumps(v) for v in values])
    return columns


def _coco_root(path: Path, file: str) -> Path:
    """The folder that a COCO file's images most likely start from: where its first image lies."""
    here = path.parent
    for folder in (
        here,
        here.parent,
        here / "images",
        here.parent / "images",
        here.parent / path.stem,
        here / path.stem,
    ):
        if (folder / file).is_file():
            return folder
    return here


def write_coco(manifest: Manifest, path: Source) -> None:
    """Write a manifest as a COCO file; `read_coco` reads it back. Images are neither copied nor encoded anew.

    Image paths are relative to the file's folder. A row without a box gets that of the whole picture. Only the classes
    that rows have are written; their ids are positions in `manifest.classes`, the same in every part of a manifest.
    Further columns go into each annotation's `attributes`.

    Raises:
        InputError: a row has no label, or an image's size cannot be read.
    """
    path = Path(path).expanduser()
    if not manifest.classes:
        raise InputError("a COCO file needs labels; write images without labels by write_table")
    table = manifest.rebased(path.parent).table.drop_columns(["_copy"] if "_copy" in manifest.names() else [])
    files = pc.unique(table["image"]).to_pylist()
    with ThreadPoolExecutor(16) as pool:
        sizes = dict(zip(files, pool.map(lambda file: image_size(path.parent / file), files), strict=True))
    number = {file: i for i, file in enumerate(files)}
    used = set(np.unique(manifest.labels().numpy()).tolist())
    further = [c for c in table.column_names if c not in ("image", "label", "box")]
    corners = box_array(table) if "box" in table.column_names else np.full((len(manifest), 4), np.nan)
    spans = _spans(corners)
    annotations = []
    attributes = table.select(further).to_pylist() if further else [{}] * len(manifest)
    labels = manifest.labels().tolist()
    for i, file in enumerate(table["image"].to_pylist()):
        height, width = sizes[file]
        box = [0, 0, width, height] if np.isnan(corners[i, 0]) else [*corners[i, :2].tolist(), *spans[i].tolist()]
        entry = {"id": i, "image_id": number[file], "category_id": labels[i], "bbox": box, "area": box[2] * box[3]}
        entry["iscrowd"] = 0
        if further:
            entry["attributes"] = attributes[i]
        annotations.append(entry)
    content = {
        "images": [{"id": i, "file_name": f, "width": w, "height": h} for i, (f, (h, w)) in enumerate(sizes.items())],
        "annotations": annotations,
        "categories": [{"id": i, "name": c} for i, c in enumerate(manifest.classes) if i in used],
    }
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(content, ensure_ascii=False, default=str), encoding="utf-8")
    part.replace(path)


def _spans(corners: Float[np.ndarray, "N 4"]) -> Float[np.ndarray, "N 2"]:
    """Widths and heights such that x0 + width is x1 again, to the last bit."""
    start, end = corners[:, :2], corners[:, 2:]
    span: np.ndarray = end - start
    for other in (np.nextafter(span, np.inf), np.nextafter(span, -np.inf)):
        span = np.where((start + span != end) & (start + other == end), other, span)
    return span
