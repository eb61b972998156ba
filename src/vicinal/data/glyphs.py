"""The built-in data set: a class is a character, an image of it one typeface; drawn here, so nothing is downloaded.

matplotlib, a dependency anyway, ships three families of DejaVu and one of STIX with their regular, bold and slanted
faces. Its other fonts are not used: one maps every code to a placeholder, the Computer Modern ones map codes to other
characters than their names say. 2,383 characters stand in all 12 faces of DejaVu. Blanks, controls and combining marks,
which cannot stand alone, and pieces of larger drawings (boxes, blocks, parts of tall brackets), which are nothing away
from their neighbours, are left out.

*One drawing is one class.* Two characters look alike in a face if their drawings, at 64 pixels an em, differ by no more
than `SAME` in any cell of 1/16 em. Those that look alike in at least half of the faces that have both (Latin A, Greek
Alpha, Cyrillic A) are one class, drawn by the one that stands first in the plain alphabets and captioned with the names
of all whose drawing it is in that face. Not to be negatives of each other would not do: a picture of A has no one right
name among three, so any score of a model would be wrong. Characters that coincide in fewer faces (Cyrillic п is an n in
italics) stay two classes, and where they coincide the second has no picture. So no picture could be of two classes. The
classes are found among all characters, whichever are asked for: a character has the same label in every selection.

*Families are held out, never faces.* The column is `family` and not `group`, which pair losses read as "never each
other's negatives". With `test_families` the column `split` says test for those families and train for the others, and
`split: {class_disjoint: …}` then trains on seen characters in seen families and measures `seen` on seen characters and
`unseen` on unseen characters, both in families never seen. `portion` parts the classes themselves in two, so that a
model pretrained on "pretraining" has met no character of "adaptation".

Letters: S side of an image in pixels; an em is 0.72 S, and a capital about 0.73 em high.
"""

from __future__ import annotations

import colorsys
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import PIL
import simplejpeg
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features

from vicinal.data.glyph_captions import SCRIPTS, captions_of, script_of
from vicinal.data.manifest import Manifest
from vicinal.progress import watched
from vicinal.types import InputError

__all__ = ["CHARACTERS", "FAMILIES", "Portion", "glyph_scenes", "load_glyphs"]

Portion = Literal["all", "pretraining", "adaptation"]

FAMILIES: Final[Mapping[str, Mapping[str, str]]] = {
    "dejavu_sans": {
        "regular": "DejaVuSans",
        "bold": "DejaVuSans-Bold",
        "oblique": "DejaVuSans-Oblique",
        "bold_oblique": "DejaVuSans-BoldOblique",
    },
    "dejavu_mono": {
        "regular": "DejaVuSansMono",
        "bold": "DejaVuSansMono-Bold",
        "oblique": "DejaVuSansMono-Oblique",
        "bold_oblique": "DejaVuSansMono-BoldOblique",
    },
    "dejavu_serif": {
        "regular": "DejaVuSerif",
        "bold": "DejaVuSerif-Bold",
        "italic": "DejaVuSerif-Italic",
        "bold_italic": "DejaVuSerif-BoldItalic",
    },
    "stix": {
        "regular": "STIXGeneral",
        "bold": "STIXGeneralBol",
        "italic": "STIXGeneralItalic",
        "bold_italic": "STIXGeneralBolIta",
    },
}
"""Each family's faces and the names of their files."""

SAME: Final = 0.15
"""Drawings that differ by no more than this share of full ink in any cell are one. It lies where few pairs do: 237
coincide in some face at 0.05, 259 here, 267 at 0.2, and 361 at 0.3, where breves begin to be taken for carons."""

PRETRAINING: Final = 0.6
"""The share of the classes in the portion of that name."""

_PLAIN: Final = (("A", "Z"), ("a", "z"), ("0", "9"), ("Α", "Ω"), ("α", "ω"), ("А", "я"))  # noqa: RUF001
_PLAIN_TOO: Final = (("\u0531", "\u0556"), ("\u0561", "\u0586"), ("\u10d0", "\u10f0"))  # Armenian, Georgian
_PIECES: Final = ((0x239B, 0x23B3), (0x2500, 0x259F))  # of tall brackets; box drawings and blocks
# Glyphs whose PostScript name means another code in Adobe's list than in the font's map, and are right.
_NAMED_OTHERWISE: Final = {"dotlessj": "ȷ", "Omega": "Ω"}

CHARACTERS: Final[Mapping[str, Callable[[str], bool]]] = {
    "ascii": lambda c: c < "\x7f",
    "plain": lambda c: any(first <= c <= last for first, last in (*_PLAIN, *_PLAIN_TOO)),
    **{script: functools.partial(lambda script, c: script_of(c) == script, script) for script in SCRIPTS},
    "accented": lambda c: unicodedata.category(c)[0] == "L" and unicodedata.normalize("NFD", c)[1:] != "",
    "digits": lambda c: unicodedata.category(c) == "Nd",
    "numbers": lambda c: unicodedata.category(c)[0] == "N",
    "punctuation": lambda c: unicodedata.category(c)[0] == "P",
    "currency": lambda c: unicodedata.category(c) == "Sc",
    "math": lambda c: unicodedata.category(c) == "Sm",
    "arrows": lambda c: "ARROW" in unicodedata.name(c),
    "symbols": lambda c: unicodedata.category(c)[0] == "S",
}
"""The sets of characters that have a name. "plain" are the unaccented letters of five alphabets, and the digits."""


def load_glyphs(
    *,
    size: int = 48,
    families: Sequence[str] | None = None,
    characters: str | Sequence[str] | None = None,
    images_per_face: int = 1,
    test_families: Sequence[str] = (),
    portion: Portion = "all",
    variation: float | int = 1.0,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Manifest:
    """Characters in typefaces: drawn once into a cache, then read like any other images.

    Columns besides `image` and `label` (the Unicode name in lower case): `text` (one of the captions, drawn by seed),
    `captions` (a list of all), `character`, `alike` (every character that this picture shows, the first is
    `character`), `script`, `category` (Unicode's: Lu, Sm, …), `family`, `face` and, with `test_families`, `split`.

    An image is a function of the size, the variation, the seed, the character, the face and its number alone: another
    selection has the same pictures of what both have.

    Args:
        size: S, height and width in pixels, from 16 to 512.
        families: names of `FAMILIES`. None: all four. STIX lacks two thirds of the characters.
        characters: a name of `CHARACTERS`, several characters ("αβγ"), or a list of such. None: all.
        images_per_face: how often each character is drawn in each face.
        test_families: those of `families` that the column `split` calls test. None of them: there is no such column.
        portion: "pretraining" or "adaptation" for one of two fixed, disjoint portions of the classes.
        variation: how far weight, slant, rotation, scale, place, colour, paper, blur and noise vary; 0 draws black on
            white, upright; 1 still leaves everything to be read by a person.
        seed: of the variations and the choice of captions.
        cache: where the pictures go. None: $VICINAL_CACHE, else ~/.cache/vicinal.

    Raises:
        InputError: an unknown family, set or character, a number out of its range, or nothing left to draw.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     glyphs = load_glyphs(characters="αβ", families=["dejavu_mono"], cache=folder)
    ...     glyphs.image(0).shape
    torch.Size([3, 48, 48])
    >>> len(glyphs), glyphs.classes
    (8, ('greek small letter alpha', 'greek small letter beta'))
    """
    families, test_families = _families(families, test_families)
    _refuse_outside("size", size, 16, 512)
    _refuse_outside("images_per_face", images_per_face, 1, 1000)
    _refuse_outside("variation", variation, 0, 1)
    if variation == 0 and images_per_face > 1:
        raise InputError("images_per_face: without variation all images of a face are one; set it to 1")

    def draw(folder: Path) -> Iterator[dict[str, Any]]:
        chosen = _chosen(characters, portion)
        for family, face in _faces(families):
            alike = _atlas().alike[family, face]
            font = _font(family, face, 2 * _em(size))  # twice as large as needed, then halved: smooth edges
            (folder / family / face).mkdir(parents=True)
            for character in (c for c in chosen if c in alike):
                row = _row(alike[character], family, face, test_families)
                for number in range(images_per_face):
                    rng = _rng(seed, character, family, face, number)
                    image = f"{family}/{face}/{_code(character)}-{number}.jpg"
                    row["text"] = row["captions"][rng.integers(len(row["captions"]))]
                    _save(_picture(font, character, size, variation, rng), folder / image)
                    yield {"image": image, **row}

    def pictures() -> int:
        chosen = _chosen(characters, portion)
        faces = [_atlas().alike[pair] for pair in _faces(families)]
        return images_per_face * sum(c in alike for alike in faces for c in chosen)

    settings = {"kind": "glyphs", "size": size, "images_per_face": images_per_face}
    asked = _asked(families, test_families, characters, portion, variation, seed)
    return _cached(cache, draw, settings | asked, pictures)


def glyph_scenes(
    *,
    scenes: int = 200,
    size: int = 256,
    fewest: int = 3,
    most: int = 7,
    families: Sequence[str] | None = None,
    characters: str | Sequence[str] | None = None,
    test_families: Sequence[str] = (),
    portion: Portion = "all",
    variation: float | int = 1.0,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Manifest:
    """Pages with a few characters each, their boxes known: a row is one character, so a picture has several rows.

    All characters of a page are of one family, so that a division by family never cuts through a page. They differ in
    size (an em is 0.15 to 0.4 of the page's side, less as it fills), face and ink, and do not overlap. Where both cases
    of a letter are asked for and have one shape (O and o), only the capital is placed: without a line of text, nothing
    tells them apart. `box` holds all the ink that was drawn, and no more. Other columns are those of `load_glyphs`.

    Args:
        scenes: how many pages.
        size: S, height and width of a page in pixels, from 96 to 1024.
        fewest: characters a page, at least; a page that is full may get fewer than were drawn by lot, but not fewer.
        most: characters a page, at most.
        families: names of `FAMILIES`; pages go round them in turn.
        characters: which; see `load_glyphs`.
        test_families: see `load_glyphs`.
        portion: see `load_glyphs`.
        variation: see `load_glyphs`.
        seed: of everything.
        cache: see `load_glyphs`.

    Raises:
        InputError: as `load_glyphs`; or a family that has none of the characters.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pages = glyph_scenes(scenes=2, characters="digits", fewest=3, most=3, cache=folder)
    >>> len(pages), pages.ids()[0].split("#")[0]
    (6, 'dejavu_sans/0.jpg')
    """
    families, test_families = _families(families, test_families)
    _refuse_outside("scenes", scenes, 1, 1_000_000)
    _refuse_outside("size", size, 96, 1024)
    _refuse_outside("fewest", fewest, 1, 9)
    _refuse_outside("most", most, fewest, 20)
    _refuse_outside("variation", variation, 0, 1)

    def draw(folder: Path) -> Iterator[dict[str, Any]]:
        chosen = _chosen(characters, portion)
        pairs = {
            family: [(face, c) for _, face in _faces([family]) for c in _whatever_the_size(family, face, chosen)]
            for family in families
        }
        lacking = [family for family in families if not pairs[family]]
        if lacking:
            raise InputError(f"families: {lacking[0]} has none of these characters; leave it out")
        for number in range(scenes):
            family = families[number % len(families)]
            (folder / family).mkdir(exist_ok=True)
            rng = _rng(seed, "scene", family, number)
            picture, placed = _scene(pairs[family], family, size, (fewest, most), variation, rng)
            image = f"{family}/{number}.jpg"
            _save(picture, folder / image)
            for face, character, box in placed:
                row = _row(_atlas().alike[family, face][character], family, face, test_families)
                row["text"] = row["captions"][rng.integers(len(row["captions"]))]
                yield {"image": image, "box": box, **row}

    settings = {"kind": "scenes", "scenes": scenes, "size": size, "fewest": fewest, "most": most}
    return _cached(cache, draw, settings | _asked(families, test_families, characters, portion, variation, seed))


# ------------------------------------------------------------------------------------------- which characters there are


class _Atlas(NamedTuple):
    """What there is to draw.

    Args:
        common: the characters of all 12 faces of DejaVu, also those that are not drawn.
        standing: those of them that are drawn.
        leader: each of these -> the character that stands for its class.
        alike: (family, face) -> the characters that are drawn in this face -> all that this drawing shows.
    """

    common: frozenset[str]
    standing: tuple[str, ...]
    leader: Mapping[str, str]
    alike: Mapping[tuple[str, str], Mapping[str, str]]


@functools.cache
def _atlas() -> _Atlas:
    maps = {key: _characters_of(_file(*key)) for key in _faces(FAMILIES)}
    common = frozenset.intersection(*(found for (family, _), found in maps.items() if family.startswith("dejavu")))
    standing = tuple(sorted(filter(_stands_alone, common)))
    there = {key: [c for c in standing if c in found] for key, found in maps.items()}
    pairs = {key: _same_drawings(key, characters) for key, characters in there.items()}

    votes: dict[tuple[str, str], int] = defaultdict(int)
    for found in pairs.values():
        for pair in found:
            votes[pair] += 1
    leader = {c: c for c in standing}
    for (a, b), same in sorted(votes.items()):
        if 2 * same >= sum(a in found and b in found for found in maps.values()):
            first, second = sorted((leader[a], leader[b]), key=_rank)
            leader = {c: first if led == second else led for c, led in leader.items()}

    alike = {}
    for key, characters in there.items():
        same_as: dict[str, set[str]] = defaultdict(set)
        for a, b in pairs[key]:
            same_as[a].add(b)
            same_as[b].add(a)
        drawn: dict[str, str] = {}
        for c in sorted(characters, key=_rank):
            if leader[c] == c and not same_as[c] & drawn.keys():
                drawn[c] = c + "".join(sorted((o for o in same_as[c] if leader[o] == c), key=_rank))
        alike[key] = drawn
    return _Atlas(common, standing, leader, alike)


def _characters_of(file: Path) -> frozenset[str]:
    """The characters of a font file that have a glyph with an outline under their own name."""
    from fontTools import agl  # type: ignore[import-untyped]  # as matplotlib's own dependency it is there
    from fontTools.ttLib import TTFont  # type: ignore[import-untyped]

    with TTFont(file, lazy=True) as font:
        names = font.getBestCmap()
        own = {
            chr(code) for code, name in names.items() if chr(code) in (agl.toUnicode(name), _NAMED_OTHERWISE.get(name))
        }
    return frozenset(own)


def _stands_alone(character: str) -> bool:
    return (
        unicodedata.category(character)[0] not in "ZCM"
        and character != "\ufffc"  # a placeholder for an object, and empty
        and not any(first <= ord(character) <= last for first, last in _PIECES)
    )


def _rank(character: str) -> tuple[int, str]:
    """Where a character stands: the plain alphabets first, then all others by code."""
    at = next((i for i, (first, last) in enumerate(_PLAIN) if first <= character <= last), len(_PLAIN))
    return at, character


def _same_drawings(key: tuple[str, str], characters: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs of characters that look alike in a face, in order."""
    em, cell = 64, 4
    font = _font(*key, em)
    cells = np.empty((len(characters), 28 * 32), np.float32)
    for i, character in enumerate(characters):
        image = Image.new("L", (2 * em, 7 * em // 4))
        ImageDraw.Draw(image).text((em, 5 * em // 4), character, font=font, fill=255, anchor="ms")
        cells[i] = np.asarray(image.reduce(cell), np.float32).ravel() / 255
    # Drawings that are alike in every cell are alike in sum, which is quick to tell; the few left are compared.
    squares, inked = (cells**2).sum(1), (cells > 0).sum(1)
    apart = squares[:, None] + squares - 2 * (cells @ cells.T)
    near = np.argwhere(np.triu(apart <= SAME**2 * (inked[:, None] + inked), 1))
    worst = np.abs(cells[near[:, 0]] - cells[near[:, 1]]).max(1)
    return [(characters[a], characters[b]) for a, b in near[worst <= SAME]]


def _chosen(wanted: str | Sequence[str] | None, portion: Portion) -> list[str]:
    """The characters that stand for the classes asked for."""
    standing, leader = _atlas().standing, _atlas().leader
    characters: Collection[str] = standing
    if wanted is not None:
        characters = {c for item in ([wanted] if isinstance(wanted, str) else wanted) for c in _named(item)}
    leaders = sorted({leader[c] for c in characters}, key=_rank)
    if portion != "all":
        if portion not in ("pretraining", "adaptation"):
            raise InputError(f"portion: {portion!r} is unknown; use all, pretraining or adaptation")
        leaders = [c for c in leaders if _is_for_pretraining(c) == (portion == "pretraining")]
    if not leaders:
        raise InputError(f"characters: nothing to draw; choose among {', '.join(CHARACTERS)}, or leave it out for all")
    return leaders


def _named(item: str) -> list[str]:
    """The characters that a set's name or a string of characters means."""
    standing = _atlas().standing
    if item in CHARACTERS:
        return [c for c in standing if CHARACTERS[item](c)]
    if len(item) > 1 and item.isascii() and item.isalpha():
        near = get_close_matches(item.lower(), CHARACTERS, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(CHARACTERS)};"
        raise InputError(f"characters: {item!r} is no set of characters; {mend} List single letters one by one")
    for character in item:
        if character not in _atlas().leader:
            why = "is a blank, a mark or a piece that does not stand alone"
            why = why if character in _atlas().common else "is not in all 12 faces of DejaVu"
            raise InputError(f"characters: {_code(character)} {unicodedata.name(character, '')} {why}; leave it out")
    return list(item)


def _is_for_pretraining(character: str) -> bool:
    digest = hashlib.sha256(f"portion {_code(character)}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < PRETRAINING * 2**32


def _families(families: Sequence[str] | None, test: Sequence[str]) -> tuple[list[str], list[str]]:
    chosen = list(FAMILIES) if families is None else list(dict.fromkeys(families))
    for name in (*chosen, *test):
        if name not in FAMILIES:
            near = get_close_matches(name, FAMILIES, n=1, cutoff=0.4)
            mend = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(FAMILIES)}"
            raise InputError(f"families: {name!r} is unknown; {mend}")
    if not chosen:
        raise InputError(f"families: none is named; choose among {', '.join(FAMILIES)}, or leave it out for all")
    lacking = [name for name in test if name not in chosen]
    if lacking:
        raise InputError(f"test_families: {lacking[0]} is not among the families {', '.join(chosen)}; add it there")
    if set(test) == set(chosen):
        raise InputError("test_families: every family is tested on, and none is left to train on")
    return chosen, sorted(set(test))


def _faces(families: Collection[str]) -> list[tuple[str, str]]:
    return [(family, face) for family in families for face in FAMILIES[family]]


def _refuse_outside(what: str, value: float | int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise InputError(f"{what} lies between {low} and {high}, not at {value}")


def _code(character: str) -> str:
    return f"U+{ord(character):04X}"


def _row(alike: str, family: str, face: str, test_families: Collection[str]) -> dict[str, Any]:
    character = alike[0]
    row: dict[str, Any] = {
        "label": unicodedata.name(character).lower(),
        "text": "",
        "captions": list(dict.fromkeys(caption for c in alike for caption in captions_of(c))),
        "character": character,
        "alike": alike,
        "script": script_of(character),
        "category": unicodedata.category(character),
        "family": family,
        "face": face,
    }
    if test_families:
        row["split"] = "test" if family in test_families else "train"
    return row


# ------------------------------------------------------------------------------------------------------------- drawing


def _visible(ink: int) -> int:
    """Less than a twentieth of full ink is none: boxes end where something is seen."""
    return ink if ink >= 12 else 0


def _em(size: int) -> int:
    return round(0.72 * size)


def _file(family: str, face: str) -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{FAMILIES[family][face]}.ttf"


def _font(family: str, face: str, em: int) -> ImageFont.FreeTypeFont:
    # The basic layout draws the one glyph that the font maps the code to, on every machine.
    return ImageFont.truetype(str(_file(family, face)), em, layout_engine=ImageFont.Layout.BASIC)


def _rng(*key: object) -> np.random.Generator:
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))


class _Ink(NamedTuple):
    """A drawn character, cut to its ink.

    Args:
        mask: "h w", how much ink, 0 to 1.
        left: of the mask, from where the character's baseline begins to be centred.
        top: of the mask, from its baseline; negative, for what stands above.
    """

    mask: Float[np.ndarray, "h w"]
    left: int
    top: int


def _ink(
    font: ImageFont.FreeTypeFont, character: str, room: float | int, variation: float | int, rng: np.random.Generator
) -> _Ink:
    """A character with weight, slant, rotation, scale and blur of its own, not wider or higher than `room`."""
    weight, slant, angle, scale, soft = (variation * rng.uniform(-1, 1, 5)).tolist()
    # Shear, then rotation (by up to 5 degrees), then scale, from twice the size to the size: "2 2" on column vectors.
    turn = math.radians(5) * angle
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    matrix = rotation @ np.array([[1, -0.16 * slant], [0, 1]]) * (1 + 0.06 * scale)
    left, top, right, bottom = font.getbbox(character, anchor="ms")
    corners = matrix @ np.array([[left, left, right, right], [top, bottom, top, bottom]], float)
    extent = (corners.max(1) - corners.min(1)).max() / 2
    if extent > room:
        matrix, corners = matrix * room / extent, corners * room / extent
    margin = 4 + round(font.size / 24)  # for weight and blur
    start = np.floor(corners.min(1) / 2).astype(int) * 2 - 2 * margin
    width, height = (np.ceil(corners.max(1) / 2).astype(int) * 2 + 2 * margin - start).tolist()

    drawn = Image.new("L", (round(right - left) + 4, round(bottom - top) + 4))
    ImageDraw.Draw(drawn).text((2 - left, 2 - top), character, font=font, fill=255, anchor="ms")
    back = np.linalg.inv(matrix)
    origin = back @ start + (2 - left, 2 - top)
    plan = (back[0, 0], back[0, 1], origin[0], back[1, 0], back[1, 1], origin[1])
    image = drawn.transform((width, height), Image.Transform.AFFINE, plan, Image.Resampling.BILINEAR)
    if weight:  # towards the widened or, less far, the narrowed stroke: hairlines must not vanish
        stroke = 2 * round(font.size / 90) + 1
        stroke = max(stroke, 3)
        changed = image.filter(ImageFilter.MaxFilter(stroke) if weight > 0 else ImageFilter.MinFilter(stroke))
        image = Image.blend(image, changed, weight * 0.8 if weight > 0 else -weight * 0.35)
    image = image.reduce(2)
    if soft > 0:
        image = image.filter(ImageFilter.GaussianBlur(soft * font.size / 128))
    image = image.point(_visible)
    box = image.getbbox()
    if box is None:
        raise ValueError(f"{_code(character)} has no ink in {font.getname()}")
    mask = np.asarray(image.crop(box), np.float32) / 255
    return _Ink(mask, start[0] // 2 + box[0], start[1] // 2 + box[1])


def _picture(
    font: ImageFont.FreeTypeFont, character: str, size: int, variation: float | int, rng: np.random.Generator
) -> UInt8[np.ndarray, "S S 3"]:
    """One character on its own paper."""
    ink = _ink(font, character, 0.94 * size - 2, variation, rng)
    drawn = ink.mask[:size, :size]  # at the smallest sizes, weight and blur may take more room than was left
    height, width = drawn.shape
    away = rng.uniform(-0.025, 0.025, 2) * _em(size) * variation
    left = round(size / 2 + ink.left + away[0])
    top = round(size / 2 + 0.35 * _em(size) + ink.top + away[1])  # room for accents above and for tails below
    left, top = (min(max(at, 0), size - length) for at, length in ((left, width), (top, height)))
    paper = _paper(variation, rng)
    picture = np.broadcast_to(paper, (size, size, 3)).copy()
    picture[top : top + height, left : left + width] += ink.mask[..., None] * (
        _colour_on(paper, variation, rng) - paper
    )
    return _developed(picture, variation, rng)


def _whatever_the_size(family: str, face: str, chosen: Sequence[str]) -> list[str]:
    """The characters of a face without the small letters that are capitals but for their size."""
    there = _atlas().alike[family, face]
    font = _font(family, face, 64)

    def shape(character: str) -> tuple[float, Float[np.ndarray, "n"]]:
        drawn = Image.new("L", (160, 112))
        ImageDraw.Draw(drawn).text((80, 80), character, font=font, fill=255, anchor="ms")
        drawn = drawn.crop(drawn.getbbox())
        cells = np.asarray(drawn.resize((16, 16), Image.Resampling.BOX), np.float32).ravel()
        return drawn.width / drawn.height, cells / np.linalg.norm(cells)

    def is_small_capital(character: str) -> bool:
        capital = character.upper()
        if capital == character or _atlas().leader.get(capital) not in chosen:
            return False
        (ratio, cells), (other_ratio, other_cells) = shape(character), shape(capital)
        return bool(cells @ other_cells > 0.9 and abs(math.log(ratio / other_ratio)) < 0.25)

    return [c for c in chosen if c in there and not is_small_capital(c)]


def _scene(
    pairs: Sequence[tuple[str, str]],
    family: str,
    size: int,
    number: tuple[int, int],
    variation: float | int,
    rng: np.random.Generator,
) -> tuple[UInt8[np.ndarray, "S S 3"], list[tuple[str, str, list[float]]]]:
    """A page, and the face, the character and the box of each thing on it."""
    paper = _paper(variation, rng)
    picture = np.broadcast_to(paper, (size, size, 3)).copy()
    wanted = int(rng.integers(number[0], number[1] + 1))
    placed: list[tuple[str, str, list[float]]] = []
    shrink, gap, misses = 1.0, size / 64, 0
    while len(placed) < wanted and (misses < 100 or len(placed) < number[0]):
        face, character = pairs[int(rng.integers(len(pairs)))]
        em = shrink * size * rng.uniform(0.15, 0.4)
        ink = _ink(_font(family, face, round(2 * em)), character, 0.5 * size, variation, rng)
        height, width = ink.mask.shape
        left, top = (int(rng.integers(0, size - length + 1)) for length in (width, height))
        right, bottom = left + width, top + height
        if any(
            left < box[2] + gap and box[0] < right + gap and top < box[3] + gap and box[1] < bottom + gap
            for *_, box in placed
        ):
            misses += 1
            shrink = max(shrink * 0.98, 0.5 if misses < 100 else 0.3)  # the page fills up: smaller ones still fit
            continue
        colour = _colour_on(paper, variation, rng)
        picture[top:bottom, left:right] += ink.mask[..., None] * (colour - paper)
        placed.append((face, character, [float(edge) for edge in (left, top, right, bottom)]))
    return _developed(picture, variation, rng), placed


def _paper(variation: float | int, rng: np.random.Generator) -> Float[np.ndarray, "3"]:
    """The colour of a paper, 0 to 1: mostly light."""
    light, shade = rng.random() >= 0.3 * variation, rng.random()
    return _colour(1 - 0.3 * variation * shade if light else 0.25 * shade, 0.3 * variation, rng)


def _colour_on(
    paper: Float[np.ndarray, "3"], variation: float | int, rng: np.random.Generator
) -> Float[np.ndarray, "3"]:
    """An ink on this paper: from the other end of the scale, so that it is read whatever its hue."""
    shade = variation * rng.random()
    return _colour(0.3 * shade if paper.mean() > 0.5 else 1 - 0.25 * shade, 0.8 * variation, rng)


def _colour(lightness: float | int, most: float | int, rng: np.random.Generator) -> Float[np.ndarray, "3"]:
    """A colour as light as a grey of this lightness, of any hue, as saturated as the lightness bears."""
    pure = colorsys.hsv_to_rgb(rng.random(), 1, 1)
    grey = 0.299 * pure[0] + 0.587 * pure[1] + 0.114 * pure[2]
    tint = [channel - grey for channel in pure]
    bears = min((1 - lightness) / t if t > 0 else lightness / -t for t in tint if t)
    share = most * rng.random() * min(bears, 1.0)
    return np.array([lightness + share * t for t in tint], np.float32)


def _developed(
    picture: Float[np.ndarray, "S S 3"], variation: float | int, rng: np.random.Generator
) -> UInt8[np.ndarray, "S S 3"]:
    """The picture in bytes, with stains and fibres of the paper and the noise of a sensor."""
    if variation:
        size = len(picture)
        stains, fibres, noise = (variation * np.array((0.05, 0.03, 0.04)) * rng.random(3)).astype(np.float32)
        uneven = noise * rng.standard_normal((size, size), dtype=np.float32)
        for cells, depth in ((4, stains), (size // 3, fibres)):
            grid = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
            uneven += depth * np.asarray(grid.resize((size, size), Image.Resampling.BILINEAR))
        picture = picture + uneven[..., None]
    return (picture * 255 + 0.5).clip(0, 255).astype(np.uint8)


def _save(picture: UInt8[np.ndarray, "S S 3"], path: Path) -> None:
    # A third of the time and of the bytes of a PNG, which noise does not let shrink; and faster to read.
    path.write_bytes(simplejpeg.encode_jpeg(picture, quality=95, colorsubsampling="444"))


# ------------------------------------------------------------------------------------------------------------ the cache


def _asked(
    families: Sequence[str],
    test_families: Sequence[str],
    characters: str | Sequence[str] | None,
    portion: Portion,
    variation: float | int,
    seed: int,
) -> dict[str, Any]:
    return {
        "families": families,
        "test_families": test_families,
        "characters": [characters] if isinstance(characters, str) else characters and list(characters),
        "portion": portion,
        "variation": float(variation),
        "seed": seed,
    }


def _cached(
    cache: str | Path | None,
    draw: Callable[[Path], Iterator[dict[str, Any]]],
    settings: Mapping[str, Any],
    rows_to_draw: Callable[[], int] | None = None,
) -> Manifest:
    """The manifest of these settings: read from its folder, or drawn into one that appears only when it is whole."""
    home = Path(cache or os.environ.get("VICINAL_CACHE") or "~/.cache/vicinal").expanduser() / "glyphs"
    known = json.dumps({**settings, "drawn_by": _drawn_by()}, sort_keys=True)
    folder = home / hashlib.sha256(known.encode()).hexdigest()[:24]
    for _ in range(2):
        if (folder / "manifest.parquet").is_file():
            manifest = Manifest.load(folder / "manifest.parquet")
            if not manifest.missing().any():
                return manifest
            shutil.rmtree(folder)  # someone tidied up in it
        home.mkdir(parents=True, exist_ok=True)
        _sweep(home)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=home))
        try:
            total = None if rows_to_draw is None else rows_to_draw()
            rows = list(watched(draw(part), "drawing glyphs, once", total))
            table = {name: [row[name] for row in rows] for name in rows[0]}
            Manifest.build(table, part, name="the glyphs").save(part / "manifest.parquet")
            part.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was as quick, and has drawn the same
                raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
    raise InputError(f"{folder} changes while it is read; clear it, or give another folder as cache")


def _sweep(home: Path) -> None:
    """Remove what killed processes left unfinished an hour ago or more."""
    for part in home.glob(".*.*"):
        if time.time() - part.stat().st_mtime > 3600:
            shutil.rmtree(part, ignore_errors=True)


@functools.cache
def _drawn_by() -> list[str]:
    """What a picture depends on besides its settings: this code, the fonts, the rasteriser and its libraries."""
    here = Path(__file__)
    files = [here, here.with_name("glyph_captions.py"), *(_file(*key) for key in _faces(FAMILIES))]
    digest = hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()
    return [digest, PIL.__version__, str(features.version("freetype2")), np.__version__, unicodedata.unidata_version]
