"""The few-shot data sets on miniatures in CoOp's layout: no pictures of the originals, the same files and lists."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from vicinal.data.benchmarks import BENCHMARKS, Count, load_benchmark
from vicinal.data.splits import coop_shots
from vicinal.data.templates import TEMPLATES
from vicinal.types import InputError

# data set -> folder, split file, folder of the pictures: DATASETS.md of CoOp
SPLIT_FILES = {
    "coop_caltech101": ("caltech-101", "split_zhou_Caltech101.json", "101_ObjectCategories/"),
    "coop_oxford_pets": ("oxford_pets", "split_zhou_OxfordPets.json", "images/"),
    "coop_stanford_cars": ("stanford_cars", "split_zhou_StanfordCars.json", ""),
    "coop_flowers102": ("oxford_flowers", "split_zhou_OxfordFlowers.json", "jpg/"),
    "coop_food101": ("food-101", "split_zhou_Food101.json", "images/"),
    "coop_sun397": ("sun397", "split_zhou_SUN397.json", "SUN397/"),
    "coop_dtd": ("dtd", "split_zhou_DescribableTextures.json", "images/"),
    "coop_eurosat": ("eurosat", "split_zhou_EuroSAT.json", "2750/"),
    "coop_ucf101": ("ucf101", "split_zhou_UCF101.json", "UCF-101-midframes/"),
}
# not by label, and labels not by name: the order of the file is what counts
ROWS = {
    "train": [["b/3.jpg", 1, "a bee"], ["c/1.jpg", 0, "cat"], ["b/1.jpg", 1, "a bee"], ["c/2.jpg", 0, "cat"]],
    "val": [["c/9.jpg", 0, "cat"], ["b/9.jpg", 1, "a bee"]],
    "test": [["b/5.jpg", 1, "a bee"], ["c/5.jpg", 0, "cat"], ["c/6.jpg", 0, "cat"]],
}
SYNSETS = ["n02 crane", "n01 drake", "n03 crane"]  # as ImageNet has them: not sorted by name, two of one name


def paint(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)


def small(name: str, monkeypatch: pytest.MonkeyPatch, **parts: tuple[int, int]) -> None:
    counts = {part: Count(*count) for part, count in parts.items()}
    known = BENCHMARKS[name]
    classes = max(count.classes for count in counts.values())
    monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(known, parts=counts, classes=classes))


def split_file(name: str, root: Path, content: object = ROWS) -> Path:
    folder, file, images = SPLIT_FILES[name]
    for rows in ROWS.values():
        for image, _, _ in rows:
            paint(root / folder / images / image)
    (root / folder / file).write_text(json.dumps(content))
    return root / folder / file


def test_there_are_fifteen_and_each_has_its_templates():
    ours = [name for name in BENCHMARKS if name.startswith(("coop_", "imagenet"))]
    assert len(ours) == 15
    assert {name.removeprefix("coop_") for name in ours} <= set(TEMPLATES)
    assert set(SPLIT_FILES) == {n for n in ours if n.startswith("coop_")} - {"coop_fgvc_aircraft"}


@pytest.mark.parametrize("name", SPLIT_FILES)
def test_a_split_file_is_read_in_its_order(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    split_file(name, tmp_path)
    small(name, monkeypatch, train=(2, 4), val=(2, 2), test=(2, 3))
    found = load_benchmark(name, root=tmp_path)
    images = SPLIT_FILES[name][2]
    assert found.column("image") == [images + row[0] for part in ROWS.values() for row in part]
    assert found.classes == ("cat", "a bee")
    assert found.labels().tolist() == [row[1] for part in ROWS.values() for row in part]
    assert found.column("split") == [part for part, rows in ROWS.items() for _ in rows]
    train = [word == "train" for word in found.column("split")]
    shots, _ = coop_shots(found.where(train).labels(), found.where([not t for t in train]).labels(), 1, seed=1)
    assert [found.where(train).column("image")[i] for i in shots.nonzero().flatten().tolist()] == [
        f"{images}{image}" for image in ("b/3.jpg", "c/1.jpg")
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"train": [], "val": []}, "no list 'test'"),
        ([], "no list 'train'"),
        (ROWS | {"val": [["c/9.jpg", 0]]}, "val, item 0: .* is not .path, label, class name."),
        (ROWS | {"test": [["b/5.jpg", 1, "wasp"]]}, "test, item 0: label 1 is 'a bee' and 'wasp'"),
        (ROWS | {"test": [["b/5.jpg", 2, "cat"]]}, "two labels are called 'cat'"),
        (ROWS | {"val": []}, "has 0 classes in val, the official data set has 2"),
    ],
)
def test_what_is_no_split_file(content: object, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    split_file("coop_dtd", tmp_path, content)
    small("coop_dtd", monkeypatch, train=(2, 4), val=(2, 2), test=(2, 3))
    with pytest.raises(InputError, match=says):
        load_benchmark("coop_dtd", root=tmp_path)


def test_counts_are_asserted_and_files_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = split_file("coop_dtd", tmp_path)
    with pytest.raises(InputError, match="has 2 classes in train, the official data set has 47"):
        load_benchmark("coop_dtd", root=tmp_path)
    small("coop_dtd", monkeypatch, train=(2, 4), val=(2, 2), test=(2, 3))
    (tmp_path / "dtd" / "images" / "c" / "6.jpg").unlink()
    with pytest.raises(InputError, match=r"c/6\.jpg"):
        load_benchmark("coop_dtd", root=tmp_path)
    path.write_text("not JSON")
    with pytest.raises(InputError, match="is not JSON"):
        load_benchmark("coop_dtd", root=tmp_path)


def test_aircraft_has_lists_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = tmp_path / "fgvc_aircraft"
    home.mkdir()
    (home / "variants.txt").write_text("707-320\nA 300\n")
    for i, part in enumerate(("train", "val", "test")):
        (home / f"images_variant_{part}.txt").write_text(f"01{i} A 300\n02{i} 707-320\n")
        paint(home / "images" / f"01{i}.jpg")
        paint(home / "images" / f"02{i}.jpg")
    small("coop_fgvc_aircraft", monkeypatch, train=(2, 2), val=(2, 2), test=(2, 2))
    found = load_benchmark("coop_fgvc_aircraft", root=tmp_path)
    assert found.classes == ("707-320", "A 300")
    assert found.labels().tolist() == [1, 0] * 3
    (home / "images_variant_val.txt").write_text("011 A 310\n")
    with pytest.raises(InputError, match=r"images_variant_val.txt, line 1: 'A 310' is not in variants.txt"):
        load_benchmark("coop_fgvc_aircraft", root=tmp_path)


def test_imagenet_and_its_kin_agree_on_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folders = {
        "imagenet": ["imagenet/images/train", "imagenet/images/val"],
        "imagenet_v2": ["imagenetv2/imagenetv2-matched-frequency-format-val"],
        "imagenet_sketch": ["imagenet-sketch/images"],
        "imagenet_a": ["imagenet-adversarial/imagenet-a"],
        "imagenet_r": ["imagenet-rendition/imagenet-r"],
    }
    for name, several in folders.items():
        for folder in several:
            own = ["0", "1", "2"] if name == "imagenet_v2" else ["n02", "n01", "n03"]
            for c in own[: 2 if name in ("imagenet_a", "imagenet_r") else 3]:
                paint(tmp_path / folder / c / "1.jpg")
            (tmp_path / folder / "README.txt").write_text("no class")
        (tmp_path / several[0].split("/")[0] / "classnames.txt").write_text("\n".join(SYNSETS))
    small("imagenet", monkeypatch, train=(3, 3), test=(3, 3))
    found = {"imagenet": load_benchmark("imagenet", root=tmp_path)}
    for name in ("imagenet_v2", "imagenet_sketch", "imagenet_a", "imagenet_r"):
        count = 2 if name in ("imagenet_a", "imagenet_r") else 3
        small(name, monkeypatch, test=(count, count))
        found[name] = load_benchmark(name, root=tmp_path)
    assert found["imagenet"].classes == found["imagenet_v2"].classes == ("n02", "n01", "n03")  # of classnames.txt
    assert found["imagenet_a"].classes == ("n02", "n01")
    called = dict(line.split() for line in SYNSETS)
    for manifest in found.values():
        assert [called[synset] for synset in manifest.column("label")] == manifest.column("name")
    v2 = found["imagenet_v2"]
    assert dict(zip(v2.column("image"), v2.column("label"), strict=True)) == {
        f"imagenetv2-matched-frequency-format-val/{i}/1.jpg": line.split()[0] for i, line in enumerate(SYNSETS)
    }
    paint(tmp_path / "imagenet-sketch" / "images" / "n99" / "1.jpg")
    with pytest.raises(InputError, match=r"n99 is not in classnames.txt"):
        load_benchmark("imagenet_sketch", root=tmp_path)
