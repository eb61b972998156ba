"""Benchmarks on miniature copies in the very layout that the originals have on disk; nothing is downloaded."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from vicinal.data.benchmarks import BENCHMARKS, load_benchmark
from vicinal.data.splits import class_disjoint
from vicinal.types import InputError

EACH = {"train": 1, "val": 1, "test": 2}  # images a class


def paint(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


@pytest.fixture
def flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """flowers-102: numbered pictures, their labels 1 .. 102 and the three lists of numbers in MATLAB files."""
    savemat = pytest.importorskip("scipy.io").savemat
    home = tmp_path / "flowers-102"
    labels = np.tile(np.arange(1, 103), 4)
    for number in range(1, len(labels) + 1):
        paint(home / "jpg" / f"image_{number:05d}.jpg")
    order = np.random.default_rng(0).permutation(102)  # the official lists are not sorted either
    savemat(home / "imagelabels.mat", {"labels": labels[None]})
    lists = {"trnid": order + 1, "valid": order + 103, "tstid": np.concatenate([order + 205, order + 307])}
    savemat(home / "setid.mat", {name: numbers[None] for name, numbers in lists.items()})
    sums = {
        key: (name, hashlib.md5((home / name).read_bytes()).hexdigest())
        for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))
    }
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", {**datasets.Flowers102._file_dict, **sums})
    return home


@pytest.fixture
def food(tmp_path: Path) -> Path:
    """food-101: a folder a class, and two JSON files that list the images of each."""
    home = tmp_path / "food-101"
    classes = [f"dish_{c:03d}" for c in range(101)]
    start = 0
    for part in ("train", "test"):
        listed = {c: [f"{c}/{i}" for i in range(start, start + EACH[part])] for c in reversed(classes)}
        start += EACH[part]
        for images in listed.values():
            for image in images:
                paint(home / "images" / f"{image}.jpg")
        (home / "meta").mkdir(exist_ok=True)
        (home / "meta" / f"{part}.json").write_text(json.dumps(listed))
    return home


def shrunk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the counts of the miniature pass for the official ones."""
    known = BENCHMARKS[name]
    parts = {part: EACH[part] * known.classes for part in known.parts}
    monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(known, parts=parts))


def test_the_official_counts_are_written_down():
    assert {name: dict(known.parts) for name, known in BENCHMARKS.items()} == {
        "flowers102": {"train": 1020, "val": 1020, "test": 6149},
        "food101": {"train": 75750, "test": 25250},
    }


def test_flowers(flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shrunk("flowers102", monkeypatch)
    m = load_benchmark("flowers102", root=tmp_path)
    assert len(m) == 408
    assert m.classes == tuple(datasets.Flowers102.classes), "the official order, which is not the sorted one"
    assert m.classes != tuple(sorted(m.classes))
    for row in (0, 150, 407):  # labels are 0-based: picture 1 is the first flower
        assert m.labels()[row] == (int(m.column("image")[row][-9:-4]) - 1) % 102
    assert [m.column("split").count(part) for part in EACH] == [102, 102, 204]
    assert m.root == flowers
    _, unseen = class_disjoint(m.classes, holdout=0.2, seed=42)
    assert {m.classes.index(c) for c in unseen} >= {1, 9, 10, 15, 32, 82}
    assert "hard-leaved pocket orchid" in unseen


def test_food(food: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shrunk("food101", monkeypatch)
    m = load_benchmark("food101", root=str(tmp_path))
    assert len(m) == 303
    assert m.classes == tuple(f"dish_{c:03d}" for c in range(101))
    assert all(
        image.startswith(f"images/{label}/") for image, label in zip(m.column("image"), m.column("label"), strict=True)
    )
    assert [m.column("split").count(part) for part in ("train", "test")] == [101, 202]


@pytest.mark.usefixtures("flowers", "food")
@pytest.mark.parametrize(
    ("name", "message"), [("flowers102", "102 images in train, .* has 1,020"), ("food101", "101 .* 75,750")]
)
def test_other_counts_than_the_official_ones_are_refused(name: str, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        load_benchmark(name, root=tmp_path)


def test_a_missing_class_and_a_missing_picture_are_refused(food: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shrunk("food101", monkeypatch)
    (food / "images" / "dish_007" / "0.jpg").unlink()
    with pytest.raises(InputError, match=r"1 of 303 image files are missing .* images/dish_007/0.jpg"):
        load_benchmark("food101", root=tmp_path)
    paint(food / "images" / "dish_007" / "0.jpg")
    official = (food / "meta" / "train.json").read_text()
    meta = json.loads(official)
    meta["dish_000"] += meta.pop("dish_001")
    (food / "meta" / "train.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="has 100 classes in train, the official data set has 101"):
        load_benchmark("food101", root=tmp_path)
    (food / "meta" / "train.json").write_text(official.replace("dish_001", "dash_001"))
    with pytest.raises(InputError, match="does not have the 101 official classes in every part"):
        load_benchmark("food101", root=tmp_path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_where_nothing_is_it_says_what_to_place_where(name: str, tmp_path: Path):
    with pytest.raises(InputError, match=r"is missing from .* Place .* into .*; they are offered at .* download=true"):
        load_benchmark(name, root=tmp_path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_without_a_network_it_says_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def no_network(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr(sys.modules[datasets.Flowers102.__module__], "download_and_extract_archive", no_network)
    monkeypatch.setattr(sys.modules[datasets.Food101.__module__], "download_and_extract_archive", no_network)
    with pytest.raises(InputError, match=r"cannot be downloaded \(.*no route to host.*\). Place "):
        load_benchmark(name, root=tmp_path, download=True)


@pytest.mark.usefixtures("flowers")
def test_without_scipy_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(InputError, match="reading it needs scipy; pip install scipy"):
        load_benchmark("flowers102", root=tmp_path)


def test_a_damaged_label_file_is_not_read(flowers: Path, tmp_path: Path):
    (flowers / "imagelabels.mat").write_bytes(b"not what it was")
    with pytest.raises(InputError, match=r"is missing from .*, or damaged"):
        load_benchmark("flowers102", root=tmp_path)


def test_an_unknown_name_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="'cub' is unknown; there are flowers102, food101"):
        load_benchmark("cub", root=tmp_path)
