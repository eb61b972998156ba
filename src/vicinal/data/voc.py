"""Pascal VOC files: one XML a picture with the objects on it; read to a Manifest, and written.

Letters: N rows, one an object. Two layouts are read, and anything between them:

    LogoDet-3K   <category>/<brand>/<n>.jpg with <n>.xml beside it
    VOC          JPEGImages/<name>.jpg, Annotations/<name>.xml, ImageSets/Main/train.txt …

A box is xmin, ymin, xmax, ymax as it stands, the far edge excluded: x0 = xmin, x1 = xmax, counted from 0. The VOC of
2007 counts from 1 and includes the far edge; `one_based=True` reads it so: x0 = xmin - 1, x1 = xmax. The two differ by
the one pixel at the near edge.

The column `group` holds the brand that a class is a variant of (`base_brand`): `lexus-1`, `lexus-2` and `Lexus_text`
are three classes of the group `lexus`. `split: {grouped: {column: group}}` keeps a group on one side, and pair losses
take two of a group for neither alike nor different. Two brands on one picture stay two groups: their boxes are
different pictures.
"""

from __future__ import annotations

import logging
import math
import os
import re
import unicodedata
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from xml.parsers import expat

import numpy as np
from PIL import Image

from vicinal.data.images import Member, image_size, read_bytes
from vicinal.data.manifest import FEW, IMAGE_ENDINGS, SPLIT_WORDS, Manifest, box_array, box_values
from vicinal.data.splits import official
from vicinal.types import InputError

__all__ = ["base_brand", "read_voc", "write_voc"]

Source = str | Path
Box = tuple[float, float, float, float]

log = logging.getLogger(__name__)
_VARIANT = re.compile(r"(?:-\d+|_text|_symbol)+$")
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_ORIENTATION = 0x0112


def base_brand(name: str) -> str:
    """The brand that a class is a variant of: lower case, without `-1`, `_text` or `_symbol` at its end.

    >>> base_brand("Lexus-2"), base_brand(" adidas_text"), base_brand("jus-rol"), base_brand("76")
    ('lexus', 'adidas', 'jus-rol', '76')
    """
    name = unicodedata.normalize("NFKC", name).casefold().strip()
    return _VARIANT.sub("", name) or name


def read_voc(
    root: Source | Mapping[str, Source],
    *,
    min_side: float | int = 16,
    one_based: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
) -> Manifest:
    """A folder of VOC files: one row for each object, cut to its box; the class is the object's name.

    The picture of `7.xml` is `7.jpg` (or another image ending, in any case) beside it, or below `JPEGImages` where the
    file lies below `Annotations`; else the one that its `filename` names. Boxes are cut at the edges of the picture,
    inverted corners are exchanged, and what is then under `min_side` is left out; the log counts each. The size is the
    picture's own. A picture that EXIF turns is turned with its boxes where the recorded size is that of the raw one. A
    box that is the whole picture is no box.

    Columns: `group` (see above), `difficult` (as marked), `category` (the folder above the brand's, where there is
    one), and `split` where ImageSets/Main has train.txt, val.txt or test.txt; pictures in none of these are left out.

    Args:
        root: the folder, or a mapping of train, val, test to one folder each.
        min_side: the shorter side of the smallest box that is kept, in pixels of the picture. 16 for logos.
        one_based: whether boxes count from 1 and include their far edge.
        on_error: "skip" leaves files with a mistake out, counted in the log.

    Raises:
        InputError: no such folder, no XML file in it, no box left; or, unless they are skipped, files that are not
            XML, objects without a name or four numbers, boxes wholly outside of their picture, pictures that are
            missing or unreadable: the file and its line.
    """
    if isinstance(root, Mapping):
        return Manifest.united(
            {
                part: read_voc(one, min_side=min_side, one_based=one_based, on_error=on_error)
                for part, one in root.items()
            }
        )
    root = Path(root).expanduser()
    if not root.is_dir():
        raise InputError(f"{root} {'is a file; give the folder' if root.exists() else 'does not exist'}")
    files = sorted(_xml_files(root))
    if not files:
        raise InputError(f"{root} holds no .xml files; pictures in folders of classes are read by read_folder")
    parts = _parts(root)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda file: _read_one(root, file, min_side, one_based), files))
    faults = [one for one in found if isinstance(one, str)]
    if faults and on_error == "raise":
        more = f"; and {len(faults) - FEW:,} more" if len(faults) > FEW else ""
        raise InputError(
            f"{root}: {len(faults):,} of {len(files):,} .xml files cannot be used ({'; '.join(faults[:FEW])}{more}). "
            "Mend them, or leave them out by on_error=skip"
        )
    pictures = [one for one in found if not isinstance(one, str)]
    if parts:
        pictures = [one for one in pictures if one.stem in parts]
    _tell(root, len(files), faults, pictures, len(found) - len(faults) - len(pictures))
    rows = [(one, *row) for one in pictures for row in one.objects]
    if not rows:
        raise InputError(f"{root}: no box is left of {len(files):,} .xml files; the smallest taken is {min_side:g} px")
    columns: dict[str, Any] = {
        "image": [one.image for one, *_ in rows],
        "label": [name for _, name, _, _ in rows],
        "group": [base_brand(name) for _, name, _, _ in rows],
        "difficult": [difficult for *_, difficult in rows],
    }
    categories = [one.category for one, *_ in rows]
    if any(categories):
        columns["category"] = categories
    if parts:
        columns["split"] = [parts[one.stem] for one, *_ in rows]
    corners = np.array([(np.nan,) * 4 if box is None else box for _, _, box, _ in rows])
    if not np.isnan(corners).all():
        columns["box"] = box_values(corners)
    return Manifest.build(columns, root, name=str(root))


@dataclass(slots=True)
class _Picture:
    """What one XML file says: its picture, the objects kept (name, box, difficult), and what was mended, counted."""

    stem: str
    image: str
    category: str | None
    objects: list[tuple[str, Box | None, bool]] = field(default_factory=list)
    mended: Counter[str] = field(default_factory=Counter)


def _xml_files(root: Path) -> Iterator[str]:
    """XML files below a folder, as relative paths with forward slashes."""
    walked = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in walked:  # a link that leads back up would go on for ever
            folders.clear()
            continue
        walked.add(real)
        folders[:] = [f for f in folders if not f.startswith(".") and f != "__MACOSX"]
        relative = Path(folder).relative_to(root)
        yield from ((relative / f).as_posix() for f in files if f.lower().endswith(".xml") and not f.startswith("."))


def _parts(root: Path) -> dict[str, str]:
    """The part of each picture, by the path of its XML file without ending, as ImageSets/Main lists them."""
    found: dict[str, str] = {}
    for part in SPLIT_WORDS:
        listed = root / "ImageSets" / "Main" / f"{part}.txt"
        if not listed.is_file():
            continue
        for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), start=1):
            stem = line.strip()
            if stem and found.setdefault(stem, part) != part:
                raise InputError(f"{listed}, line {number}: {stem} is in {found[stem]}.txt too; keep one of the two")
    return found


def _read_one(root: Path, file: str, min_side: float | int, one_based: bool) -> _Picture | str:
    """One XML file with its picture; a string says what is wrong with it."""
    data = (root / file).read_bytes()
    try:
        content = ET.fromstring(data)
    except ET.ParseError as error:
        return f"{file}, line {error.position[0]}: it is not XML ({error})"
    except (ValueError, LookupError) as error:  # of encodings that the parser does not have, such as GBK
        return f"{file}, line 1: it cannot be read ({error}); write it as UTF-8"
    image = _image_of(root, file, (content.findtext("filename") or "").strip())
    if image is None:
        return f"{file}: its picture is not there, neither {Path(file).stem}.jpg nor {content.findtext('filename')!r}"
    try:
        height, width = image_size(root / image)
    except InputError as error:
        return f"{file}: {error}"
    folders = Path(file).parent.parts
    in_brand = "Annotations" not in folders and len(folders) >= 2
    stem = file.removeprefix("Annotations/")[: -len(".xml")]
    picture = _Picture(stem, image, folders[-2] if in_brand else None)
    turn, matches = _turn(content, root / image, height, width)
    if not matches:
        picture.mended["pictures of another size than their file records"] += 1
    names = set()
    for i, item in enumerate(content.findall("object")):
        name = (item.findtext("name") or "").strip()
        if not name:
            return f"{file}, line {_line(data, i)}: an object has no name"
        names.add(base_brand(name))
        corners = [_number(item.findtext(f"bndbox/{corner}")) for corner in _CORNERS]
        if None in corners:
            lacking = ", ".join(c for c, value in zip(_CORNERS, corners, strict=True) if value is None)
            return f"{file}, line {_line(data, i)}: the box of {name!r} has no number as {lacking}"
        x0, y0, x1, y1 = (float(c) for c in corners if c is not None)
        if x0 > x1 or y0 > y1:
            x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
            picture.mended["boxes with inverted corners"] += 1
        x0, y0, x1, y1 = turn((x0 - one_based, y0 - one_based, x1, y1))
        if x1 < 0 or y1 < 0 or x0 >= width or y0 >= height:
            where = f"{file}, line {_line(data, i)}"
            return f"{where}: the box {corners} of {name!r} lies outside of its {width} x {height} pixels"
        box = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
        if box != (x0, y0, x1, y1):
            picture.mended["boxes cut at the edge of their picture"] += 1
        side = min(box[2] - box[0], box[3] - box[1])
        if side < min_side or side <= 0:
            picture.mended[f"boxes under {min_side:g} pixels left out"] += 1
            continue
        whole = box == (0, 0, width, height)
        difficult = (item.findtext("difficult") or "").strip() in ("1", "true", "True")
        picture.objects.append((name, None if whole else box, difficult))
    if not names:
        picture.mended["pictures without objects left out"] += 1
    elif in_brand and base_brand(folders[-1]) not in names:
        picture.mended["pictures with no object called like their folder"] += 1
    return picture


def _image_of(root: Path, file: str, filename: str) -> str | None:
    """The picture of an XML file, relative to the root.

    The one of the same stem goes before the one that `filename` names: in LogoDet-3K that name is often another
    picture's.
    """
    path = Path(file)
    folders = [path.parent]
    if "Annotations" in path.parts:
        at = path.parts.index("Annotations")
        folders = [Path(*path.parts[:at], "JPEGImages", *path.parts[at + 1 : -1]), *folders]
    named = Path(filename.replace("\\", "/")).name
    names = [named] if Path(named).stem == path.stem else []
    names += [path.stem + end for ending in IMAGE_ENDINGS for end in (ending, ending.upper(), ending.capitalize())]
    names += [named]
    for folder in folders:
        for name in names:
            if name and (root / folder / name).is_file():
                return (folder / name).as_posix()
    return None


def _turn(content: ET.Element, path: Path, height: int, width: int) -> tuple[Any, bool]:
    """How to turn a box into the picture as it is shown, and whether the recorded size is one of the picture's."""
    recorded = tuple(_number(content.findtext(f"size/{side}")) for side in ("width", "height"))
    upright = recorded == (width, height) or not all(recorded)  # none recorded, or 0 as some tools write
    if upright or recorded != (height, width):
        return (lambda box: box), upright
    with Image.open(path) as image:
        orientation = image.getexif().get(_ORIENTATION, 1)
    if orientation not in (5, 6, 7, 8):
        return (lambda box: box), False

    def turned(box: Box) -> Box:  # the raw picture is `height` wide and `width` high
        x0, y0, x1, y1 = box
        left, right = (y0, y1) if orientation in (5, 8) else (width - y1, width - y0)
        top, bottom = (x0, x1) if orientation in (5, 6) else (height - x1, height - x0)
        return left, top, right, bottom

    return turned, True


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _line(data: bytes, index: int) -> int:
    """The line on which the object of this number begins."""
    lines: list[int] = []
    parser = expat.ParserCreate()
    parser.StartElementHandler = lambda tag, _: lines.append(parser.CurrentLineNumber) if tag == "object" else None
    parser.Parse(data, True)
    return lines[index]


def _tell(root: Path, files: int, faults: Sequence[str], pictures: Sequence[_Picture], unlisted: int) -> None:
    """Log everything that was mended or left out, counted, with the first picture it happened to."""
    counts: Counter[str] = sum((one.mended for one in pictures), Counter())
    for what, count in counts.items():
        first = next(one.image for one in pictures if one.mended[what])
        log.info("%s: %s %s (first: %s)", root, f"{count:,}", what, first)
    if unlisted:
        log.info("%s: %s pictures left out that ImageSets/Main does not list", root, f"{unlisted:,}")
    if faults:
        log.warning("%s: %s of %s .xml files left out (first: %s)", root, f"{len(faults):,}", f"{files:,}", faults[0])


def write_voc(manifest: Manifest, root: Source) -> None:
    """Write a manifest as a VOC folder; `read_voc` reads it back. Pictures are copied byte by byte.

    `JPEGImages`, `Annotations` and, where there is a column `split`, `ImageSets/Main`. Boxes are written as they are,
    counted from 0, those of rows without one as the whole picture. Columns that VOC has no place for are not written;
    `group` is made of the class anew.

    Raises:
        InputError: a row has no label, two pictures would share a name, or a picture cannot be read.
    """
    root = Path(root).expanduser()
    if not manifest.classes:
        raise InputError("a VOC folder needs labels; write images without labels by write_table")
    labels, files = manifest.column("label"), manifest.column("image")
    corners = box_array(manifest.table) if "box" in manifest.names() else np.full((len(manifest), 4), np.nan)
    difficult = manifest.column("difficult") if "difficult" in manifest.names() else [False] * len(manifest)
    rows: dict[str, list[int]] = {}
    for row, file in enumerate(files):
        rows.setdefault(file, []).append(row)
    stems: dict[str, str] = {}
    for file in rows:
        stem = re.sub(r"^(?:[A-Za-z]:)?(?:\.{0,2}/)+", "", _outside_of_tar(file).with_suffix("").as_posix())
        first = stems.setdefault(stem, file)
        if first != file or ".." in Path(stem).parts:
            raise InputError(f"{first} and {file} would both be {stem} in a VOC folder; rename one")
    for stem, file in stems.items():
        height, width = image_size(manifest.root / file)
        target = root / "JPEGImages" / f"{stem}{_outside_of_tar(file).suffix}"
        content = ET.Element("annotation")
        ET.SubElement(content, "folder").text = "JPEGImages"
        ET.SubElement(content, "filename").text = target.name
        size = ET.SubElement(content, "size")
        for name, value in (("width", width), ("height", height), ("depth", 3)):
            ET.SubElement(size, name).text = str(value)
        for row in rows[file]:
            item = ET.SubElement(content, "object")
            ET.SubElement(item, "name").text = labels[row]
            ET.SubElement(item, "difficult").text = str(int(bool(difficult[row])))
            box = ET.SubElement(item, "bndbox")
            edges = (0, 0, width, height) if np.isnan(corners[row, 0]) else corners[row].tolist()
            for name, edge in zip(_CORNERS, edges, strict=True):
                ET.SubElement(box, name).text = str(int(edge) if edge == int(edge) else edge)
        annotation = root / "Annotations" / f"{stem}.xml"
        for path in (target, annotation):
            path.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(read_bytes(manifest.root / file))
        ET.indent(content)
        ET.ElementTree(content).write(annotation, encoding="utf-8", xml_declaration=True)
    if "split" in manifest.names():
        sets = root / "ImageSets" / "Main"
        sets.mkdir(parents=True, exist_ok=True)
        stem_of = {file: stem for stem, file in stems.items()}
        for part, mask in official(manifest.column("split"), images=files).items():
            inside = dict.fromkeys(stem_of[file] for file, keep in zip(files, mask.tolist(), strict=True) if keep)
            (sets / f"{part}.txt").write_text("".join(f"{stem}\n" for stem in inside), encoding="utf-8")


def _outside_of_tar(file: str) -> Path:
    """The path that a picture has as a file of its own: a tar becomes a folder."""
    member = Member.of(file)
    return Path(file) if member is None else Path(member.tar).with_suffix("") / member.name
