"""VOC files: the two layouts, boxes and their conventions, variants of a brand, each mistake by file and line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vicinal.data.division import divide
from vicinal.data.manifest import Manifest
from vicinal.data.sources import read_voc, write_voc
from vicinal.data.voc import base_brand
from vicinal.losses import NTXent
from vicinal.types import InputError

Object = tuple[str, tuple[Any, Any, Any, Any]]


def paint(path: Path, size: tuple[int, int] = (60, 40), orientation: int = 1, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)
    image.save(path, **({"exif": exif} if orientation != 1 else {}))


def annotate(path: Path, *objects: Object, filename: str = "", size: tuple[int, int] | None = (60, 40)) -> None:
    """An XML file as the annotation tools write it, a tag a line."""
    lines = ["<annotation>", f"<filename>{filename or path.with_suffix('.jpg').name}</filename>"]
    if size:
        lines.append(f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>")
    for name, box in objects:
        corners = "".join(f"<{c}>{v}</{c}>" for c, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
        lines += ["<object>", f"<name>{name}</name>", f"<bndbox>{corners}</bndbox>", "</object>"]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, "</annotation>"]), encoding="utf-8")


def one(root: Path, *objects: Object, **settings: Any) -> Path:  # noqa: ANN401
    """A data set of one picture."""
    paint(root / "Food" / "lexus-1" / "1.jpg")
    annotate(root / "Food" / "lexus-1" / "1.xml", *objects, **settings)
    return root


def test_logodet(tmp_path: Path):
    for i, (folder, image) in enumerate(
        [("Food/lexus-1", "1.jpg"), ("Food/lexus-1", "2.JPG"), ("Sports/lexus_text", "1.png")]
    ):
        paint(tmp_path / folder / image, seed=i)
    annotate(tmp_path / "Food/lexus-1/1.xml", ("lexus-1", (1, 2, 30, 40)), ("76", (30, 5, 60, 25)))
    annotate(tmp_path / "Food/lexus-1/2.xml", ("lexus-1", (0, 0, 60, 40)), filename="1.jpg")  # another's name
    annotate(tmp_path / "Sports/lexus_text/1.xml", ("Lexus_text", (10.5, 3, 40, 20)))
    m = read_voc(tmp_path)
    assert m.column("image") == [
        "Food/lexus-1/1.jpg",
        "Food/lexus-1/1.jpg",
        "Food/lexus-1/2.JPG",
        "Sports/lexus_text/1.png",
    ]
    assert m.column("label") == ["lexus-1", "76", "lexus-1", "Lexus_text"]
    assert m.classes == ("76", "Lexus_text", "lexus-1")
    assert m.column("group") == ["lexus", "76", "lexus", "lexus"]
    assert m.column("category") == ["Food", "Food", "Food", "Sports"]
    assert m.column("box") == [[1, 2, 30, 40], [30, 5, 60, 25], None, [10.5, 3, 40, 20]]
    assert m.image(0).shape == (3, 38, 29)
    assert m.image(2).shape == (3, 40, 60)


def test_voc(tmp_path: Path):
    for i, name in enumerate(["2007_1", "2007_2", "2007_3", "2007_4"]):
        paint(tmp_path / "JPEGImages" / f"{name}.jpg", seed=i)
        annotate(tmp_path / "Annotations" / f"{name}.xml", ("dog", (1, 1, 30, 40)))
    (tmp_path / "Annotations" / "2007_2.xml").write_text(
        "<annotation><object><name>cat</name><difficult>1</difficult><part><name>head</name><bndbox><xmin>0</xmin>"
        "</bndbox></part><bndbox><xmax>30</xmax><xmin>1</xmin><ymax>40</ymax><ymin>1</ymin></bndbox></object></annotation>"
    )
    sets = tmp_path / "ImageSets" / "Main"
    sets.mkdir(parents=True)
    (sets / "train.txt").write_text("2007_1\n2007_3\n")
    (sets / "val.txt").write_text("2007_2\n")
    (sets / "trainval.txt").write_text("2007_1\n2007_2\n2007_3\n")
    m = read_voc(tmp_path)
    assert m.column("image") == [f"JPEGImages/2007_{i}.jpg" for i in (1, 2, 3)], "2007_4 is in no list"
    assert m.column("split") == ["train", "val", "train"]
    assert m.column("difficult") == [False, True, False]
    assert "category" not in m.names()
    (sets / "test.txt").write_text("2007_4\n2007_1\n")
    with pytest.raises(InputError, match=r"test.txt, line 2: 2007_1 is in train.txt too"):
        read_voc(tmp_path)


def test_the_near_edge_depends_on_where_counting_starts(tmp_path: Path):
    one(tmp_path, ("lexus-1", (1, 1, 20, 30)))
    assert read_voc(tmp_path).column("box") == [[1, 1, 20, 30]]
    assert read_voc(tmp_path, one_based=True).column("box") == [[0, 0, 20, 30]]
    annotate(tmp_path / "Food/lexus-1/1.xml", ("lexus-1", (1, 1, 60, 40)))
    assert "box" not in read_voc(tmp_path, one_based=True).names(), "the whole picture"


def test_what_is_mended_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    one(
        tmp_path,
        ("lexus-1", (-3, 2, 30, 41)),
        ("lexus-2", (30, 39, 5, 2)),
        ("lexus-3", (5, 5, 20.9, 30)),
        ("lexus-4", (50, 5, 70, 30)),
        size=(600, 400),
    )
    paint(tmp_path / "Food/lexus-1/2.jpg")
    annotate(tmp_path / "Food/lexus-1/2.xml", size=None)
    paint(tmp_path / "Food/bmw/1.jpg")
    annotate(tmp_path / "Food/bmw/1.xml", ("audi", (1, 1, 20, 20)))
    with caplog.at_level(logging.INFO):
        m = read_voc(tmp_path)
    assert m.column("label") == ["audi", "lexus-1", "lexus-2"]
    assert m.column("box")[1:] == [[0, 2, 30, 40], [5, 2, 30, 39]]
    for told in (
        "2 boxes cut at the edge of their picture (first: Food/lexus-1/1.jpg)",
        "1 boxes with inverted corners",
        "2 boxes under 16 pixels left out",
        "1 pictures of another size than their file records",
        "1 pictures without objects left out (first: Food/lexus-1/2.jpg)",
        "1 pictures with no object called like their folder (first: Food/bmw/1.jpg)",
    ):
        assert told in caplog.text
    assert len(read_voc(tmp_path, min_side=10)) == 5
    with pytest.raises(InputError, match=r"no box is left of 3 .xml files; the smallest taken is 50 px"):
        read_voc(tmp_path, min_side=50)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_turned_picture_turns_its_boxes_if_they_were_drawn_on_the_raw_one(orientation: int, tmp_path: Path):
    path = tmp_path / "Food/lexus-1/1.jpg"
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[2:22, 5:35] = 255
    path.parent.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif, quality=100)
    annotate(path.with_suffix(".xml"), ("lexus-1", (5, 2, 35, 22)), size=(60, 40))
    m = read_voc(tmp_path)
    assert m.image(0).shape == (3, 30, 20)
    assert m.image(0).float().mean() > 250, "the white box, wherever it is now"
    annotate(path.with_suffix(".xml"), ("lexus-1", (5, 2, 35, 22)), size=(40, 60))
    assert read_voc(tmp_path).column("box") == [[5, 2, 35, 22]], "drawn on the upright one"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("<annotation>\n<object>\n</annotation>", r"1.xml, line 3: it is not XML \(mismatched tag"),
        ("", r"1.xml, line 1: it is not XML \(no element"),
        ('<?xml version="1.0" encoding="gbk"?>\n<annotation/>', r"1.xml, line 1: it cannot be read \(multi-byte"),
        ('<?xml version="1.0" encoding="klingon"?>\n<annotation/>', r"1.xml, line 1: it cannot be read \(unknown enc"),
        ("<annotation>\n<object>\n<name> </name></object></annotation>", "1.xml, line 2: an object has no name"),
        (
            "<annotation>\n<!-- <object> -->\n<object><name>a</name></object></annotation>",
            "line 3: the box of 'a' has no number as xmin, ymin, xmax, ymax",
        ),
        (
            "<annotation><object><name>a</name><bndbox><xmin>1</xmin><ymin>nan</ymin><xmax>9</xmax><ymax>wide</ymax>"
            "</bndbox></object></annotation>",
            "line 1: the box of 'a' has no number as ymin, ymax",
        ),
    ],
    ids=["cut off", "empty", "GBK", "no encoding", "no name", "no box", "no numbers"],
)
def test_a_broken_file_is_named_with_its_line(content: str, message: str, tmp_path: Path):
    one(tmp_path)
    (tmp_path / "Food/lexus-1/1.xml").write_text(content)
    with pytest.raises(InputError, match=message):
        read_voc(tmp_path)


@pytest.mark.parametrize("box", [(61, 0, 90, 30), (0, 40, 30, 80), (-30, 0, -1, 30), (0, -30, 30, -2)])
def test_a_box_outside_of_its_picture(box: tuple[int, int, int, int], tmp_path: Path):
    one(tmp_path, ("lexus-1", (0, 0, 30, 30)), ("lexus-2", box))
    with pytest.raises(
        InputError, match=r"1.xml, line 8: the box \[.*\] of 'lexus-2' lies outside of its 60 x 40 pixels"
    ):
        read_voc(tmp_path)


def test_mistakes_are_left_out_where_that_is_wanted(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    one(tmp_path, ("lexus-1", (0, 0, 30, 30)))
    annotate(tmp_path / "Food/lexus-1/2.xml", ("lexus-1", (0, 0, 30, 30)))
    paint(tmp_path / "Food/lexus-1/3.jpg")
    (tmp_path / "Food/lexus-1/3.jpg").write_bytes(b"no picture")
    annotate(tmp_path / "Food/lexus-1/3.xml", ("lexus-1", (0, 0, 30, 30)))
    with pytest.raises(
        InputError, match=r"2 of 3 .xml files cannot be used \(Food/lexus-1/2.xml: its picture is not there"
    ):
        read_voc(tmp_path)
    assert read_voc(tmp_path, on_error="skip").column("image") == ["Food/lexus-1/1.jpg"]
    assert "2 of 3 .xml files left out" in caplog.text


def test_folders_that_are_none(tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        read_voc(tmp_path / "gone")
    with pytest.raises(InputError, match=r"holds no .xml files; .* read_folder"):
        read_voc(tmp_path)
    (tmp_path / "a.xml").write_text("")
    with pytest.raises(InputError, match="is a file; give the folder"):
        read_voc(tmp_path / "a.xml")


def test_parts_in_folders_of_their_own(tmp_path: Path):
    one(tmp_path / "a", ("lexus-1", (0, 0, 30, 30)))
    one(tmp_path / "b", ("bmw", (0, 0, 30, 30)))
    m = read_voc({"train": tmp_path / "a", "test": tmp_path / "b"})
    assert m.column("split") == ["train", "test"]
    assert m.classes == ("bmw", "lexus-1")


@pytest.mark.parametrize(
    ("name", "brand"),
    [
        ("Adidas_text", "adidas"),
        ("adidas_symbol-2", "adidas"),
        ("new_balance-12", "new_balance"),
        ("jus-rol", "jus-rol"),
        ("text", "text"),
        ("-1", "-1"),
        ("STRASSE", "strasse"),
        ("stra\u00dfe", "strasse"),
        ("\uff21\uff22\uff23-1", "abc"),
    ],
)
def test_brands(name: str, brand: str):
    assert base_brand(name) == brand


def brands(root: Path) -> Manifest:
    """Six brands of two variants, two pictures of each."""
    for b in range(6):
        for variant in ("-1", "_text"):
            for n in (1, 2):
                path = root / "Food" / f"brand{b}{variant}" / f"{n}.jpg"
                paint(path, seed=b)
                annotate(path.with_suffix(".xml"), (f"brand{b}{variant}", (0, 0, 30, 30)))
    return read_voc(root)


def test_variants_of_a_brand_never_straddle(tmp_path: Path):
    m = brands(tmp_path)
    assert len(m.classes) == 12
    division = divide(m, "grouped", holdout=0.34, val=0.25, seed=0)
    sides = [division.train, division.val, division.queries()]
    assert [int(side.sum()) for side in sides] == [12, 4, 8]
    groups = [{g for g, inside in zip(m.column("group"), side.tolist(), strict=True) if inside} for side in sides]
    assert sum(len(g) for g in groups) == len(set().union(*groups)) == 6


def test_variants_of_a_brand_are_never_negatives(tmp_path: Path):
    m = brands(tmp_path)
    m = m.where([b in ("brand0", "brand1") for b in m.column("group")])
    numbers: dict[str, int] = {}
    groups = torch.tensor([numbers.setdefault(g, len(numbers)) for g in m.column("group")])
    labels = m.labels()
    torch.manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(8, 5), dim=1).requires_grad_()
    s = x @ x.T / 0.1
    expected = []
    for i in range(8):
        for p in range(8):
            if p != i and labels[p] == labels[i]:
                negatives = [s[i, n] for n in range(8) if groups[n] != groups[i]]
                expected.append(torch.logsumexp(torch.stack([s[i, p], *negatives]), 0) - s[i, p])
    found = NTXent(temperature=0.1)(x, labels, groups=groups)
    assert torch.allclose(found, torch.stack(expected).mean(), atol=1e-5)


def test_a_round_trip(tmp_path: Path):
    for i in range(3):
        paint(tmp_path / "in" / "sub" / f"{i}.{'png' if i else 'jpg'}", seed=i, orientation=6 if i == 0 else 1)
    m = Manifest.build(
        {
            "image": ["sub/0.jpg", "sub/0.jpg", "sub/1.png", "sub/2.png"],
            "label": ["a & b", "caf\u00e9", "a & b", "<c>"],
            "box": [[0.25, 1 / 3, 20, 30], None, [2, 3, 40, 30], None],
            "split": ["train", "train", "val", "test"],
        },
        tmp_path / "in",
    )
    write_voc(m, tmp_path / "out")
    back = read_voc(tmp_path / "out")
    assert back.column("box") == m.column("box")
    assert back.column("split") == m.column("split")
    assert back.classes == m.classes
    assert back.labels().tolist() == m.labels().tolist()
    assert all(torch.equal(back.image(i), m.image(i)) for i in range(4))
    assert back.column("image")[0] == "JPEGImages/sub/0.jpg"
    write_voc(back, tmp_path / "again")
    assert read_voc(tmp_path / "again").column("box") == m.column("box")


def test_what_a_voc_folder_cannot_hold(tmp_path: Path):
    paint(tmp_path / "a.png")
    paint(tmp_path / "a.jpg")
    with pytest.raises(InputError, match=r"a.jpg and a.png would both be a in a VOC folder"):
        write_voc(Manifest.build({"image": ["a.jpg", "a.png"], "label": ["x", "y"]}, tmp_path), tmp_path / "out")
    with pytest.raises(InputError, match="needs labels"):
        write_voc(Manifest.build({"image": ["a.jpg"]}, tmp_path), tmp_path / "out")


def test_the_real_scenes(real_data: Path):
    m = read_voc(real_data / "logo_scenes")
    assert len(m) == 1278
    assert len(m.classes) == 240
    assert len(set(m.column("image"))) == 960
    assert len(set(m.column("group"))) == 240
    assert set(m.column("category")) == {"even", "odd"}
    division = divide(m, "grouped", holdout=0.2, seed=42)
    assert int(division.train.sum() + division.val.sum() + division.queries().sum()) == 1278
    boxes = np.array(m.column("box"))
    assert m.image(0).shape[1:] == tuple((boxes[0, 3:1:-1] - boxes[0, 1::-1]).astype(int))
