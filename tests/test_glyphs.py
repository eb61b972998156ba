"""Glyphs: what the fonts really have, one class for one drawing, the same pictures everywhere, and boxes that fit."""

# ruff: noqa: RUF001 (letters that look alike are what this is about)

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import unicodedata
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw

from vicinal.data import glyphs
from vicinal.data.division import divide
from vicinal.data.glyph_captions import captions_of, script_of
from vicinal.data.glyphs import CHARACTERS, FAMILIES, glyph_scenes, load_glyphs
from vicinal.data.manifest import Manifest
from vicinal.data.splits import class_disjoint
from vicinal.types import InputError

ATLAS = glyphs._atlas()
XYZ = ("x", "y", "z")
FACES = [(family, face) for family, faces in FAMILIES.items() for face in faces]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn")


# ----------------------------------------------------------------------------------------- which characters there are


def test_the_counts_are_the_published_ones() -> None:
    assert len(FACES) == 16
    assert len(ATLAS.common) == 2383
    assert len(ATLAS.standing) == 2116
    # the last few depend on how a version of FreeType rounds
    assert abs(len(set(ATLAS.leader.values())) - 1963) <= 10


def test_a_character_that_is_drawn_has_an_outline_of_its_own_in_every_face() -> None:
    looked = 0
    for key in FACES:
        with TTFont(glyphs._file(*key), lazy=True) as font:
            names, places = font.getBestCmap(), font["loca"]
            bytes_of = font.reader["glyf"]

            def outline(name: str, font: TTFont = font, places: object = places, data: bytes = bytes_of) -> bytes:
                number = font.getGlyphID(name)
                return data[places[number] : places[number + 1]]  # type: ignore[index]

            placeholder = outline(".notdef")
            for character in ATLAS.alike[key]:
                own = outline(names[ord(character)])
                assert own
                assert own != placeholder
                looked += 1
    assert looked > 26_000


def test_fonts_that_map_codes_to_something_else_are_seen_through() -> None:
    folder = glyphs._file("stix", "regular").parent
    assert not set("{|}~<>") & glyphs._characters_of(folder / "cmr10.ttf")  # dashes, accents, marks of Spanish
    assert not set("!#$%+") & glyphs._characters_of(folder / "cmsy10.ttf")  # arrows
    assert set("Aéя{~ΩȷÅ") <= glyphs._characters_of(folder / "DejaVuSans.ttf")


def test_no_two_classes_have_one_drawing() -> None:
    """Rendered anew and compared one by one: a loop against the matrix product of the atlas."""
    for key, least in ((("stix", "regular"), 1000), (("stix", "italic"), 600)):
        font = glyphs._font(*key, 64)
        cells = []
        for character in ATLAS.alike[key]:
            image = Image.new("L", (128, 112))
            ImageDraw.Draw(image).text((64, 80), character, font=font, fill=255, anchor="ms")
            cells.append(np.asarray(image, np.float32).reshape(28, 4, 32, 4).mean((1, 3)).ravel() / 255)
        table = np.array(cells)
        assert len(table) > least
        for i in range(len(table) - 1):
            assert np.abs(table[i + 1 :] - table[i]).max(1).min() > glyphs.SAME - 0.01  # reduce() rounds to bytes


def test_look_alikes_are_one_class() -> None:
    for one in ("AΑА", "BΒВ", "OΟОՕ", "oοоօ", "xх", "ÄӒ", "μµ", "ΩΩ", ";;", "΄´"):
        assert len({ATLAS.leader[c] for c in one}) == 1, one
    for two in ("Oo", "O0", "Il", "nп", "ґг", "éè", "ăǎ", "З3", ".,", ".·", "-_"):
        assert ATLAS.leader[two[0]] != ATLAS.leader[two[1]], two
    # the one of the plain alphabets gives the name
    assert [ATLAS.leader[c] for c in "ΑАµƩƂɛΩ"] == ["A", "A", "μ", "Σ", "Б", "ε", "Ω"]


def test_what_a_picture_shows_is_said_face_by_face() -> None:
    sans, italic = ATLAS.alike["dejavu_sans", "regular"], ATLAS.alike["dejavu_serif", "italic"]
    assert sans["A"] == "AΑА"
    assert "п" in sans
    assert "п" not in italic  # it is an n there
    assert "n" in italic
    for key in FACES:
        for character, alike in ATLAS.alike[key].items():
            assert alike[0] == character == ATLAS.leader[character]
            assert {ATLAS.leader[c] for c in alike} == {character}


def test_nothing_is_drawn_that_cannot_stand_alone() -> None:
    assert not {unicodedata.category(c)[0] for c in ATLAS.standing} & set("ZCM")
    assert not set("─█⎜\u00a0\u0301\u00ad\ufffc") & set(ATLAS.standing)
    assert all(glyphs._chosen(name, "all") for name in CHARACTERS)


# ------------------------------------------------------------------------------------------------------------ captions


def test_every_character_has_captions() -> None:
    said: dict[str, set[str]] = defaultdict(set)
    for character in ATLAS.standing:
        captions = captions_of(character)
        assert len(captions) >= 3
        assert len(set(captions)) == len(captions)
        assert captions[0] == unicodedata.name(character).lower()
        for caption in captions:
            assert caption == " ".join(caption.split())
            said[caption].add(character)
    assert {c: sorted(s) for c, s in said.items() if len(s) > 1 and len({ATLAS.leader[x] for x in s}) > 3} == {}


@pytest.mark.parametrize(
    ("character", "caption"),
    [
        pytest.param("α", "small Greek letter alpha", id="alpha"),
        pytest.param("α", "Greek alpha, lower case", id="alpha-case"),
        pytest.param("Λ", "uppercase Greek Lambda", id="lambda"),
        pytest.param("é", "small Latin e with an acute accent", id="acute"),
        pytest.param("ა", "Georgian letter an", id="no-case"),
        pytest.param("7", "the number seven", id="digit"),
        pytest.param("←", "arrow pointing left", id="arrow"),
        pytest.param("⇖", "double arrow pointing north west", id="diagonal"),
        pytest.param("♥", "solid heart suit", id="suit"),
        pytest.param("/", "a forward slash", id="slash"),
    ],
)
def test_captions_in_words_people_use(character: str, caption: str) -> None:
    assert caption in captions_of(character)


def test_scripts() -> None:
    assert [script_of(c) for c in "aяαა7µԱ"] == [
        "latin",
        "cyrillic",
        "greek",
        "georgian",
        "common",
        "common",
        "armenian",
    ]


# --------------------------------------------------------------------------------------------------------- the pictures


def test_the_table(cache: Path) -> None:
    table = load_glyphs(characters=["A", "αβ", "digits"], families=["dejavu_sans", "stix"], size=32, cache=cache)
    assert set(table.classes) == {unicodedata.name(c).lower() for c in "Aαβ0123456789"}
    assert table.names() == (
        *("image", "label", "text", "captions", "character", "alike", "script", "category", "family", "face"),
    )
    rows = table.table.to_pylist()
    assert len(rows) == len({row["image"] for row in rows}) >= 4 * 13 + 13
    for row in rows:
        assert row["text"] in row["captions"]
        assert row["label"] == unicodedata.name(row["character"]).lower() == row["captions"][0]
        assert row["face"] in FAMILIES[row["family"]]
        assert row["category"] == unicodedata.category(row["character"])
    capital = next(row for row in rows if row["character"] == "A" and row["family"] == "dejavu_sans")
    assert capital["alike"] == "AΑА"
    assert {"latin capital letter a", "greek capital letter alpha", "Cyrillic A, upper case"} <= set(
        capital["captions"]
    )
    assert len({row["text"] for row in rows}) > 20
    assert table.image(0).shape == (3, 32, 32)


def test_greek_includes_its_look_alikes_under_their_one_name() -> None:
    chosen = glyphs._chosen("greek", "all")
    assert {"α", "A", "o", "Σ"} <= set(chosen)
    assert "Α" not in chosen


def test_every_picture_has_ink_that_can_be_seen(cache: Path) -> None:
    drawn = load_glyphs(characters="ascii", families=["stix"], size=32, cache=cache)
    assert len(drawn) == 4 * 94
    for row in range(len(drawn)):
        grey = drawn.image(row).float().mean(0)
        paper = grey.median()
        assert (grey - paper).abs().max() > 60, drawn.column("image")[row]


def test_varied_pictures_still_show_their_character(cache: Path) -> None:
    """Told by plain correlation with the upright drawings of the same face: ten digits, so chance is a tenth."""
    options = {"characters": "digits", "size": 48, "cache": cache}
    clean, varied = load_glyphs(variation=0, **options), load_glyphs(images_per_face=2, **options)

    def shapes(manifest: Manifest) -> torch.Tensor:
        grey = torch.stack([manifest.image(i).float().mean(0) for i in range(len(manifest))]).flatten(1)
        grey = grey - grey.mean(1, keepdim=True)
        return grey / grey.norm(dim=1, keepdim=True)

    scores = (shapes(varied) @ shapes(clean).T).abs()  # light on dark correlates negatively
    faces = [list(zip(m.column("family"), m.column("face"), strict=True)) for m in (varied, clean)]
    scores *= torch.tensor([[a == b for b in faces[1]] for a in faces[0]])
    found = clean.labels()[scores.argmax(1)]
    assert (found == varied.labels()).float().mean() > 0.75


def test_without_variation_the_drawings_are_black_on_white_and_all_different(cache: Path) -> None:
    clean = load_glyphs(characters="armenian", families=["dejavu_mono"], variation=0, cache=cache)
    seen = defaultdict(set)
    for row, face in enumerate(clean.column("face")):
        pixels = clean.image(row)
        assert pixels[:, 0, 0].min() > 250
        assert pixels.min() < 40
        seen[face].add(pixels.numpy().tobytes())
    assert sum(map(len, seen.values())) == len(clean)


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.jpg")
    }


PROGRAM = """
import json, sys
from vicinal.data.glyphs import glyph_scenes, load_glyphs
settings = {"seed": 3, "cache": sys.argv[1], "size": 96}
m = load_glyphs(characters=["Ω", "a", "b"], images_per_face=2, **settings)
s = glyph_scenes(characters="digits", scenes=3, **settings)
print(json.dumps([str(m.root), m.column("text"), str(s.root), s.column("box")]))
"""


def test_pictures_are_the_same_in_another_process(tmp_path: Path) -> None:
    settings = {"seed": 3, "cache": tmp_path / "here", "size": 96}
    here = load_glyphs(characters=["Ω", "a", "b"], images_per_face=2, **settings)
    scenes = glyph_scenes(characters="digits", scenes=3, **settings)
    environment = {**os.environ, "PYTHONHASHSEED": "77", "VICINAL_CACHE": str(tmp_path / "no")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "there")]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    root, texts, scene_root, boxes = json.loads(ran.stdout)
    assert digests(here.root) == digests(Path(root))
    assert len(digests(here.root)) == len(here) == len(here.classes) * 16 * 2
    assert here.column("text") == texts
    assert digests(scenes.root) == digests(Path(scene_root))
    assert scenes.column("box") == boxes


def test_a_picture_does_not_depend_on_what_else_is_drawn(tmp_path: Path) -> None:
    few = load_glyphs(characters=["b", "q"], families=["dejavu_mono"], size=24, cache=tmp_path)
    more = load_glyphs(characters="ascii", families=["stix", "dejavu_mono"], images_per_face=2, size=24, cache=tmp_path)
    common = digests(few.root)
    assert len(common) == 8
    assert common.items() <= digests(more.root).items()
    other = load_glyphs(characters=["b", "q"], families=["dejavu_mono"], size=24, seed=1, cache=tmp_path)
    assert not common.items() & digests(other.root).items()


@pytest.mark.parametrize("size", [pytest.param(16, id="16"), pytest.param(97, id="odd")])
def test_wide_and_high_characters_fit(size: int, cache: Path) -> None:
    drawn = load_glyphs(
        characters=list("‱⌨⟷Ӝᾯᾖ⌠Ǡ"), families=["dejavu_serif"], size=size, images_per_face=3, cache=cache
    )
    assert len(drawn) == 8 * 4 * 3
    for row in range(0, len(drawn), 5):
        assert drawn.image(row).shape == (3, size, size)


def test_images_of_a_face_differ(cache: Path) -> None:
    several = load_glyphs(characters="R", families=["dejavu_mono"], images_per_face=5, size=24, cache=cache)
    assert len(set(digests(several.root).values())) == 20


# ----------------------------------------------------------------------------------------------------- who is held out


def test_unseen_characters_in_unseen_families(cache: Path) -> None:
    table = load_glyphs(
        families=["dejavu_mono", "dejavu_serif"],
        characters="cyrillic",
        size=16,
        test_families=["dejavu_serif"],
        portion="adaptation",
        cache=cache,
    )
    family, split = np.array(table.column("family")), np.array(table.column("split"))
    assert set(family[split == "test"]) == {"dejavu_serif"}
    assert "dejavu_serif" not in family[split == "train"]
    division = divide(table, "class_disjoint", holdout=0.3, val=0.0)
    seen, unseen = class_disjoint(table.classes, holdout=0.3, seed=42)
    labels = np.array(table.column("label"))
    train, parts = division.train.numpy(), {name: part.queries.numpy() for name, part in division.parts.items()}
    assert set(labels[train]) <= set(seen)
    assert len(set(seen) - set(labels[train])) <= 2  # Г is a Γ in mono, so only the other family shows it
    assert set(labels[parts["unseen"]]) <= set(unseen)
    assert len(set(labels[parts["unseen"]])) == len(unseen)
    assert set(labels[parts["seen"]]) <= set(seen)
    for asked in parts.values():
        assert set(family[asked]) == {"dejavu_serif"}
    assert "dejavu_serif" not in family[train]


def test_a_division_by_family_holds_out_whole_families(cache: Path) -> None:
    table = load_glyphs(characters="digits", size=16, cache=cache)
    division = divide(table, "grouped", column="family", holdout=0.3, val=0.0)
    family = np.array(table.column("family"))
    test = next(iter(division.parts.values())).queries.numpy()
    assert test.any()
    assert not set(family[test]) & set(family[division.train.numpy()])


def test_portions_share_no_class_and_are_all(cache: Path) -> None:
    for name in (None, "plain", "greek"):
        first, second = (set(glyphs._chosen(name, portion)) for portion in ("pretraining", "adaptation"))
        assert not first & second
        assert first | second == set(glyphs._chosen(name, "all"))
        assert 0.45 < len(first) / len(first | second) < 0.75
    # a portion is a property of the character, whatever else is asked for
    assert set(glyphs._chosen("greek", "adaptation")) <= set(glyphs._chosen(None, "adaptation"))


# --------------------------------------------------------------------------------------------------------------- scenes


def test_boxes_hold_the_ink_and_no_more(cache: Path) -> None:
    pages = glyph_scenes(scenes=8, size=160, characters="plain", variation=0, fewest=2, most=6, cache=cache)
    boxes_of = defaultdict(list)
    for image, box in zip(pages.column("image"), pages.column("box"), strict=True):
        boxes_of[image].append([int(edge) for edge in box])
    assert len(boxes_of) == 8
    for image, boxes in boxes_of.items():
        assert 2 <= len(boxes) <= 6
        ink = 255 - np.asarray(Image.open(pages.root / image).convert("L"), np.int64)
        outside = ink.copy()
        for left, top, right, bottom in boxes:
            assert 0 <= left < right <= 160
            assert 0 <= top < bottom <= 160
            inside = ink[top:bottom, left:right]
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                assert edge.max() >= 8
            outside[top:bottom, left:right] = 0
        assert outside.max() <= 12  # what JPEG smears
        for a, b in pairwise(sorted(boxes)):
            assert a[2] <= b[0] or a[3] <= b[1] or b[3] <= a[1]


def test_pages(cache: Path) -> None:
    pages = glyph_scenes(
        scenes=9, size=128, characters=["plain"], families=["stix", "dejavu_mono"], test_families=["stix"], cache=cache
    )
    rows = pages.table.to_pylist()
    families, counts = defaultdict(set), defaultdict(int)
    for row in rows:
        families[row["image"]].add((row["family"], row["split"]))
        counts[row["image"]] += 1
        assert row["text"] in row["captions"]
    assert len(families) == 9
    assert all(len(found) == 1 for found in families.values())
    assert {next(iter(found)) for found in families.values()} == {("stix", "test"), ("dejavu_mono", "train")}
    assert all(3 <= count <= 7 for count in counts.values())
    assert len(set(pages.ids())) == len(pages)
    left, top, right, bottom = rows[0]["box"]
    assert pages.image(0).shape == (3, bottom - top, right - left)


def test_a_crowded_page_still_has_the_fewest(cache: Path) -> None:
    pages = glyph_scenes(scenes=4, size=96, characters="math", fewest=9, most=20, cache=cache)
    counts = np.unique(pages.column("image"), return_counts=True)[1]
    assert len(counts) == 4
    assert counts.min() >= 9


def test_small_letters_that_are_capitals_but_for_their_size_are_not_placed() -> None:
    chosen = glyphs._chosen("plain", "all")
    placed = glyphs._whatever_the_size("dejavu_sans", "regular", chosen)
    assert {"O", "C", "a", "g", "б", "α", "R", "r"} <= set(placed)
    assert not {"o", "c", "x", "z", "к"} & set(placed)
    assert glyphs._whatever_the_size("dejavu_sans", "regular", ["o", "c"]) == ["o", "c"]


# ------------------------------------------------------------------------------------------------------------ the cache


def test_a_second_reading_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_glyphs(characters=XYZ, size=16, cache=tmp_path)
    monkeypatch.setattr(glyphs, "_picture", None)
    monkeypatch.setattr(glyphs, "_atlas", None)
    second = load_glyphs(characters=XYZ, size=16, cache=tmp_path)
    assert second.table.equals(first.table)
    assert (second.classes, second.root.resolve()) == (first.classes, first.root.resolve())


def test_a_killed_drawing_leaves_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, count = glyphs._save, [0]

    def stopped(picture: np.ndarray, path: Path) -> None:
        count[0] += 1
        if count[0] == 7:
            raise KeyboardInterrupt
        save(picture, path)

    monkeypatch.setattr(glyphs, "_save", stopped)
    with pytest.raises(KeyboardInterrupt):
        load_glyphs(characters=XYZ, size=16, cache=tmp_path)
    assert list((tmp_path / "glyphs").iterdir()) == []
    monkeypatch.setattr(glyphs, "_save", save)
    # a process that was killed outright cannot clear up: its folder is hidden, never taken, and swept later
    stale = tmp_path / "glyphs" / ".0123.abc"
    stale.mkdir()
    os.utime(stale, (0, 0))
    whole = load_glyphs(characters=XYZ, size=16, cache=tmp_path)
    assert not whole.missing().any()
    assert not stale.exists()


def test_a_picture_that_was_deleted_is_drawn_again(tmp_path: Path) -> None:
    first = load_glyphs(characters=XYZ, size=16, cache=tmp_path)
    before = digests(first.root)
    first.path(5).unlink()
    again = load_glyphs(characters=XYZ, size=16, cache=tmp_path)
    assert not again.missing().any()
    assert digests(again.root) == before


def test_the_cache_of_the_environment_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VICINAL_CACHE", str(tmp_path))
    assert load_glyphs(characters="w", size=16).root.is_relative_to(tmp_path)


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"families": ["dejavu_serf"]}, "did you mean 'dejavu_serif'", id="family"),
        pytest.param({"families": []}, "none is named", id="no-family"),
        pytest.param({"characters": ["greeek"]}, "did you mean 'greek'", id="set"),
        pytest.param({"characters": "abc"}, "one by one", id="word"),
        pytest.param({"characters": "中"}, "U\\+4E2D .* is not in all 12 faces", id="not-there"),
        pytest.param({"characters": ["\u0301"]}, "COMBINING ACUTE ACCENT is a blank, a mark", id="mark"),
        pytest.param({"characters": []}, "nothing to draw", id="nothing"),
        pytest.param({"test_families": ["stix"], "families": ["dejavu_mono"]}, "not among the families", id="test"),
        pytest.param({"test_families": ["stix"], "families": ["stix"]}, "none is left", id="no-train"),
        pytest.param({"size": 8}, "size lies between 16 and 512, not at 8", id="size"),
        pytest.param({"images_per_face": 0}, "images_per_face", id="images"),
        pytest.param({"variation": 1.5}, "variation", id="variation"),
        pytest.param({"variation": 0, "images_per_face": 2}, "all images of a face are one", id="same-images"),
    ],
)
def test_mistakes_are_named(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_glyphs(**settings, cache=tmp_path)  # type: ignore[arg-type]


def test_an_unknown_portion_is_named(tmp_path: Path) -> None:
    with pytest.raises((InputError, TypeError), match="portion"):  # a TypeError where types are checked
        load_glyphs(portion="half", cache=tmp_path)  # type: ignore[arg-type]


def test_mistakes_of_scenes_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stix has none of these"):
        glyph_scenes(characters="ა", cache=tmp_path)
    with pytest.raises(InputError, match="most"):
        glyph_scenes(fewest=5, most=4, cache=tmp_path)
