"""The folder of logos: divided by brand, references apart from scenes, read back as a table."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from test_cli import vicinal
from test_data_voc import annotate
from vicinal.bring import bring
from vicinal.data.logos import DATABASE, read_logos, references_and_queries, write_logos
from vicinal.data.manifest import Manifest
from vicinal.data.sources import read_table
from vicinal.data.voc import read_voc
from vicinal.recipe import Recipe
from vicinal.run import run
from vicinal.types import InputError


def paint(path: Path, seed: int, quality: int = 95) -> None:
    """A picture that looks like no other; near the same where only the quality differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((80, 60), Image.Resampling.BICUBIC).save(path, quality=quality)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 brands of two variants, three pictures of each, some with a box of the next brand too."""
    root = tmp_path_factory.mktemp("source")
    for b in range(30):
        for variant in ("-1", "_text"):
            for n in range(3):
                path = root / ("Food" if b % 2 else "Sports") / f"brand{b:02d}{variant}" / f"{n}.jpg"
                paint(path, seed=1000 * b + 10 * n + (variant == "_text"))
                boxes = [(f"brand{b:02d}{variant}", (0, 0, 40, 40))]
                if n == 0:
                    boxes.append((f"brand{(b + 1) % 30:02d}-1", (42, 5, 78, 55)))
                annotate(path.with_suffix(".xml"), *boxes, size=(80, 60))
    return root


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_logos(read_voc(source), tmp_path_factory.mktemp("out") / "logos", holdout=0.5, references=2)


def rows(database: Path, question: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(database)
    try:
        return connection.execute(question).fetchall()
    finally:
        connection.close()


def test_the_folder_and_the_database_say_the_same(written: Path, source: Path) -> None:
    out = written.parent
    assert written.name == DATABASE
    found = {path.relative_to(out).as_posix() for path in (out / "reference_logos").rglob("*.png")}
    assert found == {path for (path,) in rows(written, "SELECT path FROM reference_images")}
    assert len(found) > 20
    for (path,) in rows(written, "SELECT path FROM images"):
        assert (out / str(path)).is_file()
        assert "\\" not in str(path)
    scenes = {path.relative_to(out).as_posix() for path in (out / "test_images").rglob("*.jpg")}
    assert scenes == {
        path for (path,) in rows(written, "SELECT path FROM images JOIN test_images ON image_id = images.id")
    }
    assert dict(rows(written, "SELECT key, value FROM meta"))["seed"] == "42"
    ours = read_voc(source)
    assert rows(written, "SELECT count(*) FROM annotations") == [(len(ours),)]
    assert rows(written, "SELECT DISTINCT area_frac FROM annotations ORDER BY 1") == [
        (pytest.approx(40 * 40 / 4800),),
        (pytest.approx(36 * 50 / 4800),),
    ]
    assert rows(written, "SELECT count(*) FROM logos")[0][0] == 60
    assert all(len(str(h)) == 16 for (h,) in rows(written, "SELECT phash FROM images"))


def test_a_brand_with_its_variants_lies_on_one_side(written: Path) -> None:
    sides = rows(written, "SELECT base_brand, count(DISTINCT split) FROM logos GROUP BY base_brand")
    assert len(sides) == 30
    assert {count for _, count in sides} == {1}
    assert {split for (split,) in rows(written, "SELECT DISTINCT split FROM logos")} == {"train", "val", "test"}


def test_no_reference_comes_from_a_scene_and_nothing_held_out_is_trained_on(written: Path) -> None:
    given = {image for (image,) in rows(written, "SELECT source_image_id FROM reference_images")}
    scenes = {image for (image,) in rows(written, "SELECT image_id FROM test_images")}
    assert not given & scenes
    m = read_logos(written)
    brands = {s: {g for g, x in zip(m.column("group"), m.column("split"), strict=True) if x == s} for s in
              ("train", "val", "test")}  # fmt: skip
    assert not brands["train"] & brands["val"]
    assert not (brands["train"] | brands["val"]) & brands["test"]
    trained = {f for f, r in zip(m.column("image"), m.column("role"), strict=True) if r == "train"}
    shared = rows(
        written,
        "SELECT i.path FROM images i JOIN annotations a ON a.image_id = i.id JOIN logos l ON l.id = a.logo_id "
        "WHERE l.split <> 'train'",
    )
    assert not trained & {path for (path,) in shared}, "a picture with a held-out brand on it is not trained on"


def test_each_held_out_class_keeps_a_scene(written: Path) -> None:
    m = read_logos(written)
    for part in ("val", "test"):
        of = [
            (r, c) for r, c, s in zip(m.column("role"), m.column("label"), m.column("split"), strict=True) if s == part
        ]
        referenced, asked = ({c for r, c in of if r == role} for role in ("reference", "query"))
        assert referenced <= asked
        assert all(sum(c == one for r, c in of if r == "reference") <= 2 for one in referenced)


def test_it_is_one_more_table(written: Path, tmp_path: Path) -> None:
    m = read_table(written)
    assert m.ids() == read_logos(written).ids()
    row = m.column("role").index("reference")
    assert m.image(row).shape[0] == 3
    assert m.column("box")[row] is None
    settings = {"model": "timm:test_vit", "random_init": True, "preprocess": {"size": 32}, "steps": 2, "workers": 0}
    settings |= {"device": "cpu", "trackers": [], "draws": 2, "cache": None, "loss": {"ntxent": {}}}
    sampler = {"pk": {"classes": 4, "images_per_class": 2}}
    content = {"data": {"table": str(written)}, "split": {"official": {}}, "sampler": sampler, **settings}
    recipe = Recipe.parse(content)
    assert bring(recipe.data).classes == m.classes
    results = json.loads((run(recipe, tmp_path / "run", say=lambda _: None) / "results.json").read_text())
    assert set(results["after"]) == {"unseen"}


def test_brands_stay_where_they_are_when_others_are_added(written: Path, source: Path, tmp_path: Path) -> None:
    grown = shutil.copytree(source, tmp_path / "grown")
    paint(grown / "Food" / "another" / "1.jpg", seed=99_999)
    annotate(grown / "Food" / "another" / "1.xml", ("another", (0, 0, 40, 40)), size=(80, 60))
    later = write_logos(read_voc(grown), tmp_path / "out", holdout=0.5, references=2)
    sides = dict(rows(later, "SELECT brand, split FROM logos"))
    assert sides.pop("another") in ("train", "val", "test")
    assert sides == dict(rows(written, "SELECT brand, split FROM logos"))


def test_near_duplicates_lie_on_one_side_and_never_face_each_other(source: Path, tmp_path: Path) -> None:
    both = shutil.copytree(source, tmp_path / "both")
    for b in range(29):  # the same picture, saved anew, among those of the next brand
        paint(both / "Food" / f"brand{b + 1:02d}-1" / "9.jpg", seed=1000 * b + 10, quality=60)
        annotate(
            both / "Food" / f"brand{b + 1:02d}-1" / "9.xml", (f"brand{b + 1:02d}-1", (0, 0, 40, 40)), size=(80, 60)
        )
    database = write_logos(read_voc(both), tmp_path / "out", holdout=0.5, references=2)
    pairs = rows(
        database,
        "SELECT a.split, b.split, a.id, b.id FROM images a JOIN images b ON a.phash = b.phash AND a.id < b.id",
    )
    assert len(pairs) > 15
    assert all(one == other for one, other, *_ in pairs)
    given = {image for (image,) in rows(database, "SELECT source_image_id FROM reference_images")}
    scenes = {image for (image,) in rows(database, "SELECT image_id FROM test_images")}
    assert not any({a, b} & given and {a, b} & scenes for *_, a, b in pairs)


def test_what_cannot_be_written_or_read(source: Path, written: Path, tmp_path: Path) -> None:
    m = read_voc(source)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="was not written by"):
        write_logos(m, tmp_path / "full")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    with pytest.raises(InputError, match="leaves none to"):
        write_logos(m.where([b == "brand00" for b in m.column("group")]), tmp_path / "few")
    with pytest.raises(InputError, match="a share between"):
        write_logos(m, tmp_path / "few", holdout=1.5)
    with pytest.raises(InputError, match="does not exist"):
        read_logos(tmp_path / "none.db")
    (tmp_path / "other.db").write_bytes(b"SQLite format 3" + bytes(100))
    with pytest.raises(InputError, match="no database of logos"):
        read_table(tmp_path / "other.db")
    with pytest.raises(InputError, match="its own columns"):
        read_table(written, columns={"label": "brand"})
    lost = shutil.copytree(written.parent, tmp_path / "far" / "away")
    with pytest.raises(InputError, match="image files are missing"):
        read_logos(lost / DATABASE)  # training pictures are found by the way from the folder
    assert not list(tmp_path.glob(".*"))


def test_an_earlier_folder_is_replaced(source: Path, tmp_path: Path) -> None:
    m = read_voc(source)
    write_logos(m, tmp_path / "out", holdout=0.5, references=2)
    database = write_logos(m, tmp_path / "out", holdout=0.5, references=1)
    assert all(rank == 0 for (rank,) in rows(database, "SELECT rank FROM reference_images"))
    found = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.png")}
    assert found == {path for (path,) in rows(database, "SELECT path FROM reference_images")}


def test_references_are_drawn_apart_from_queries() -> None:
    images = ["a", "a", "b", "b", "c", "d", "e", "f", "g", "h"]
    labels = ["x", "x", "x", "y", "y", "y", "z", "z", "z", "alone"]
    m = Manifest.build({"image": images, "label": labels}, ".")
    chosen, asked = references_and_queries(m, references=2, seed=1)
    assert not set(np.array(images)[chosen.numpy()]) & set(np.array(images)[asked.numpy()])
    for name in "xyz":
        mine = np.array(labels) == name
        assert 1 <= (chosen.numpy() & mine).sum() <= 2
        assert (asked.numpy() & mine).sum() >= 1
    assert asked[9]
    assert not chosen[9]
    again = references_and_queries(m.where(np.ones(10, bool)), references=2, seed=1)
    assert again[0].equal(chosen)
    with pytest.raises(InputError, match="no class has pictures in two files"):
        references_and_queries(m.where(np.array(labels) == "alone"))


def test_prepare_by_the_command_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("prepare", source, "--format", "logos", "--out", tmp_path / "out", "--holdout", 0.5, "--references", 1)
    assert vicinal(monkeypatch, *words) == 0
    assert str(tmp_path / "out" / DATABASE) in capsys.readouterr().out
