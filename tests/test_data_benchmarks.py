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

from vicinal.data.benchmarks import BENCHMARKS, Count, load_benchmark
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
    parts = {part: Count(known.classes, EACH[part] * known.classes) for part in known.parts}
    monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(known, parts=parts))


METRIC_LEARNING = ("cub200", "cars196", "sop", "inshop", "inaturalist")
FEW_SHOT = tuple(name for name in BENCHMARKS if name.startswith(("coop_", "imagenet")))  # tests/test_data_coop.py


def test_the_official_counts_are_written_down():
    assert {
        name: {part: tuple(count) for part, count in known.parts.items()} for name, known in BENCHMARKS.items()
    } == {
        "flowers102": {"train": (102, 1020), "val": (102, 1020), "test": (102, 6149)},
        "food101": {"train": (101, 75750), "test": (101, 25250)},
        "cub200": {"train": (100, 5864), "test": (100, 5924)},
        "cars196": {"train": (98, 8054), "test": (98, 8131)},
        "sop": {"train": (11318, 59551), "test": (11316, 60502)},
        "inshop": {"train": (3997, 25882), "query": (3985, 14218), "gallery": (3985, 12612)},
        "inaturalist": {"train": (5690, 325846), "test": (2452, 136093)},
        # CoOp's split files: specification of the few-shot protocol, table of sizes
        "coop_caltech101": {"train": (100, 4128), "val": (100, 1649), "test": (100, 2465)},
        "coop_oxford_pets": {"train": (37, 2944), "val": (37, 736), "test": (37, 3669)},
        "coop_stanford_cars": {"train": (196, 6509), "val": (196, 1635), "test": (196, 8041)},
        "coop_flowers102": {"train": (102, 4093), "val": (102, 1633), "test": (102, 2463)},
        "coop_food101": {"train": (101, 50500), "val": (101, 20200), "test": (101, 30300)},
        "coop_fgvc_aircraft": {"train": (100, 3334), "val": (100, 3333), "test": (100, 3333)},
        "coop_sun397": {"train": (397, 15880), "val": (397, 3970), "test": (397, 19850)},
        "coop_dtd": {"train": (47, 2820), "val": (47, 1128), "test": (47, 1692)},
        "coop_eurosat": {"train": (10, 13500), "val": (10, 5400), "test": (10, 8100)},
        "coop_ucf101": {"train": (101, 7639), "val": (101, 1898), "test": (101, 3783)},
        "imagenet": {"train": (1000, 1281167), "test": (1000, 50000)},
        "imagenet_v2": {"test": (1000, 10000)},
        "imagenet_sketch": {"test": (1000, 50889)},
        "imagenet_a": {"test": (200, 7500)},
        "imagenet_r": {"test": (200, 30000)},
    }
    fewshot = {name: max(count.classes for count in BENCHMARKS[name].parts.values()) for name in FEW_SHOT}
    assert {name: known.classes for name, known in BENCHMARKS.items()} == fewshot | {
        "flowers102": 102,
        "food101": 101,
        "cub200": 200,
        "cars196": 196,
        "sop": 22634,
        "inshop": 7982,
        "inaturalist": 8142,
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
    with pytest.raises(InputError, match="has 102 classes in all its parts together, the official data set has 101"):
        load_benchmark("food101", root=tmp_path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_where_nothing_is_it_says_what_to_place_where(name: str, tmp_path: Path):
    with pytest.raises(
        InputError, match=r"is missing from .* Place .* into .*; they are offered (at|by|as) "
    ) as caught:
        load_benchmark(name, root=tmp_path)
    assert ("download=true" in str(caught.value)) == (name in ("flowers102", "food101"))


@pytest.mark.parametrize("name", METRIC_LEARNING)
def test_what_cannot_be_fetched_says_so(name: str, tmp_path: Path):
    with pytest.raises(InputError, match=f"{name} cannot be downloaded by itself. Place .* offered "):
        load_benchmark(name, root=tmp_path, download=True)


@pytest.mark.parametrize("name", ["flowers102", "food101"])
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


# ---------------------------------------------------------------------------------------- the metric-learning data sets

# what the miniatures below hold: classes and images of each part, and classes of all
SMALL: dict[str, tuple[dict[str, Count], int]] = {
    "cub200": ({"train": Count(2, 4), "test": Count(2, 3)}, 4),
    "cars196": ({"train": Count(2, 4), "test": Count(2, 3)}, 4),
    "sop": ({"train": Count(2, 3), "test": Count(1, 2)}, 3),
    "inshop": ({"train": Count(1, 2), "query": Count(2, 2), "gallery": Count(2, 3)}, 3),
    "inaturalist": ({"train": Count(2, 3), "test": Count(1, 2)}, 3),
}
BIRDS = {
    "001.Black_footed_Albatross": 2,
    "002.Laysan_Albatross": 2,
    "10.Red_faced_Cormorant": 2,  # by number, not by letter: 10 comes after 9
    "9.Brewer_Blackbird": 1,
}
CARS = {"Acura TL Sedan 2012": 2, "AM General Hummer SUV 2000": 2, "Audi A5 Coupe 2012": 2, "smart fortwo 2012": 1}
PRODUCTS = {
    "train": ["1 1 1 bicycle_final/11_0.JPG", "2 1 1 bicycle_final/11_1.JPG", "3 2 12 toaster_final/22_0.JPG"],
    "test": ["4 10 12 toaster_final/33_0.JPG", "5 10 12 toaster_final/33_1.JPG"],
}
CLOTHES = [
    "img/WOMEN/Dresses/id_00000002/02_1_front.jpg    id_00000002 train",
    "img/WOMEN/Dresses/id_00000002/02_2_side.jpg     id_00000002 train",
    "img/WOMEN/Blouses_Shirts/id_00000001/02_1_front.jpg    id_00000001   query",
    "img/WOMEN/Blouses_Shirts/id_00000001/02_2_side.jpg     id_00000001   gallery",
    "img/MEN/Denim/id_00000010/01_1_front.jpg    id_00000010   query",
    "img/MEN/Denim/id_00000010/01_2_side.jpg     id_00000010   gallery",
    "img/MEN/Denim/id_00000010/01_3_back.jpg     id_00000010   gallery",
]
SPECIES = {
    "train": ["train_val2018/Aves/2761/a.jpg", "train_val2018/Aves/2761/b.jpg", "train_val2018/Insecta/12/c.jpg"],
    "test": ["train_val2018/Plantae/2761/d.jpg", "train_val2018/Plantae/2761/e.jpg"],  # another 2761
}


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_miniature(name: str, root: Path) -> Path:
    """A few classes in the very layout of the whole."""
    home = root / name
    match name:
        case "cub200" | "cars196":
            for folder, images in (BIRDS if name == "cub200" else CARS).items():
                for i in range(images):
                    paint(home / "images" / folder / f"{i}.jpg")
            (home / "images" / ".cache").mkdir()
            (home / "images" / "README").write_text("a stray file is no class")
            (home / "images" / "._stray.jpg").write_text("")
            next(iter((home / "images").glob("*/0.jpg"))).with_name("._0.jpg").write_text("")
        case "sop":
            for part, lines in PRODUCTS.items():
                write(home / "Info_Files" / f"Ebay_{part}.txt", "image_id class_id super_class_id path", *lines)
                for line in lines:
                    paint(home / "images" / line.split()[3])
        case "inshop":
            write(home / "list_eval_partition.txt", "7", "image_name item_id evaluation_status", *CLOTHES)
            for line in CLOTHES:
                paint(home / line.split()[0])
        case _:
            for part, lines in SPECIES.items():
                write(home / f"Inaturalist_{part}_set1.txt", *lines)
                for line in lines:
                    paint(home / line)
    return home


@pytest.fixture
def miniatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, (parts, classes) in SMALL.items():
        write_miniature(name, tmp_path)
        monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(BENCHMARKS[name], parts=parts, classes=classes))
    return tmp_path


def test_there_are_five():
    assert set(SMALL) == set(METRIC_LEARNING) == set(BENCHMARKS) - {"flowers102", "food101", *FEW_SHOT}


@pytest.mark.parametrize("name", METRIC_LEARNING)
def test_no_class_is_trained_on_and_measured(name: str, miniatures: Path):
    m = load_benchmark(name, root=miniatures)
    trained = {label for label, part in zip(m.column("label"), m.column("split"), strict=True) if part == "train"}
    measured = {label for label, part in zip(m.column("label"), m.column("split"), strict=True) if part != "train"}
    assert trained
    assert measured
    assert not trained & measured
    assert trained | measured == set(m.classes)
    assert m.image(0).shape == (3, 8, 8)
    assert m.root == miniatures / name


def test_birds_stand_in_the_order_of_their_numbers(miniatures: Path):
    m = load_benchmark("cub200", root=miniatures)
    assert m.classes == ("Black_footed_Albatross", "Laysan_Albatross", "Brewer_Blackbird", "Red_faced_Cormorant")
    assert m.column("split") == ["train"] * 4 + ["test"] * 3
    assert m.column("image")[4] == "images/9.Brewer_Blackbird/0.jpg"


def test_cars_stand_in_the_order_of_their_bytes(miniatures: Path):
    m = load_benchmark("cars196", root=miniatures)
    assert m.classes == ("AM General Hummer SUV 2000", "Acura TL Sedan 2012", "Audi A5 Coupe 2012", "smart fortwo 2012")
    assert m.column("split") == ["train"] * 4 + ["test"] * 3


def test_cars_as_their_authors_gave_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    savemat = pytest.importorskip("scipy.io").savemat
    names = sorted(CARS)
    numbers = [3, 1, 2, 1, 2, 4, 3]
    annotations = np.zeros((1, 7), dtype=[("relative_im_path", "O"), ("bbox_x1", "O"), ("class", "O"), ("test", "O")])
    for i, number in enumerate(numbers):
        paint(tmp_path / "cars196" / "car_ims" / f"{i:06d}.jpg")
        annotations[0, i] = (f"car_ims/{i:06d}.jpg", 3, number, i % 2)  # the task of classification has other parts
    savemat(
        tmp_path / "cars196" / "cars_annos.mat",
        {"annotations": annotations, "class_names": np.array(names, dtype=object)[None]},
    )
    parts, classes = SMALL["cars196"]
    monkeypatch.setitem(BENCHMARKS, "cars196", dataclasses.replace(BENCHMARKS["cars196"], parts=parts, classes=classes))
    m = load_benchmark("cars196", root=tmp_path)
    assert m.classes == tuple(names)
    assert (m.labels() + 1).tolist() == numbers
    assert m.column("split") == ["train" if number < 3 else "test" for number in numbers]
    savemat(tmp_path / "cars196" / "cars_annos.mat", {"something": 1})
    with pytest.raises(InputError, match=r"cars_annos.mat does not hold class_names and annotations"):
        load_benchmark("cars196", root=tmp_path)


def test_products(miniatures: Path):
    m = load_benchmark("sop", root=miniatures)
    assert m.classes == ("1", "2", "10"), "as numbers"
    assert m.column("category") == ["bicycle", "bicycle", "toaster", "toaster", "toaster"]
    assert m.column("image")[0] == "images/bicycle_final/11_0.JPG"


def test_products_as_the_archive_unpacks(miniatures: Path):
    expected = load_benchmark("sop", root=miniatures)
    flat = miniatures / "Stanford_Online_Products"
    (miniatures / "sop" / "images").rename(flat)
    for file in (miniatures / "sop" / "Info_Files").iterdir():
        file.rename(flat / file.name)
    (miniatures / "sop").rename(miniatures / "gone")
    m = load_benchmark("sop", root=miniatures)
    assert [f"images/{image}" for image in m.column("image")] == expected.column("image")
    assert m.labels().tolist() == expected.labels().tolist()


def test_clothes_are_queries_and_a_gallery(miniatures: Path):
    m = load_benchmark("inshop", root=miniatures)
    assert m.classes == ("1", "2", "10")
    assert m.column("split") == ["train", "train", "query", "gallery", "query", "gallery", "gallery"]
    assert m.column("label") == ["2", "2", "1", "1", "10", "10", "10"]


def test_clothes_as_the_archive_unpacks(miniatures: Path):
    expected = load_benchmark("inshop", root=miniatures)
    home = miniatures / "inshop"
    for folder, name in (("Img", "img"), ("Eval", "list_eval_partition.txt")):
        (home / folder).mkdir()
        (home / name).rename(home / folder / name)
    home.rename(miniatures / "In-shop Clothes Retrieval Benchmark")
    m = load_benchmark("inshop", root=miniatures)
    assert m.column("image") == [f"Img/{image}" for image in expected.column("image")]
    assert m.column("split") == expected.column("split")


def test_species_of_one_number_in_two_categories_are_two(miniatures: Path):
    m = load_benchmark("inaturalist", root=miniatures)
    assert m.classes == ("Aves/2761", "Insecta/12", "Plantae/2761")
    assert m.column("category") == ["Aves", "Aves", "Insecta", "Plantae", "Plantae"]


@pytest.mark.parametrize("name", METRIC_LEARNING)
def test_a_miniature_is_not_the_whole(name: str, tmp_path: Path):
    write_miniature(name, tmp_path)
    official = BENCHMARKS[name].parts["train"].classes
    with pytest.raises(InputError, match=f"classes in train, the official data set has {official:,}.* are offered "):
        load_benchmark(name, root=tmp_path)


@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("cub200", "images"),
        ("cars196", "images"),
        ("sop", "Info_Files/Ebay_test.txt"),
        ("inshop", "list_eval_partition.txt"),
        ("inaturalist", "Inaturalist_train_set1.txt"),
    ],
)
def test_the_file_that_is_missing_is_named(name: str, gone: str, miniatures: Path):
    (miniatures / name / gone).rename(miniatures / "elsewhere")
    with pytest.raises(InputError, match=rf"{name} is missing from .*, or damaged \(.*{Path(gone).name}.*\). Place "):
        load_benchmark(name, root=miniatures)


@pytest.mark.parametrize("name", ["sop", "inshop", "inaturalist"])
def test_a_picture_that_a_list_names_must_be_there(name: str, miniatures: Path):
    image = load_benchmark(name, root=miniatures).column("image")[-1]
    (miniatures / name / image).unlink()
    with pytest.raises(InputError, match=rf"{name}: .* 1 of . image files are missing .*{image}"):
        load_benchmark(name, root=miniatures)


@pytest.mark.parametrize(
    ("name", "file", "line", "message"),
    [
        ("sop", "Info_Files/Ebay_train.txt", "4 2 12", "line 5: '4 2 12' is not image_id class_id super_class_id path"),
        ("inshop", "list_eval_partition.txt", "img/a.jpg id_7 val", "line 10: id_7 val is no id_<number> of train"),
        ("inshop", "list_eval_partition.txt", "img/a.jpg seven query", "line 10: seven query is no id_<number>"),
        ("inshop", "list_eval_partition.txt", "img/a.jpg query", "line 10: .* is not image_name item_id evaluation"),
        ("inaturalist", "Inaturalist_test_set1.txt", "Aves/a.jpg", "line 3: Aves/a.jpg does not lie in"),
    ],
    ids=["sop", "inshop part", "inshop item", "inshop fields", "inaturalist"],
)
def test_a_strange_line_is_named(name: str, file: str, line: str, message: str, miniatures: Path):
    path = miniatures / name / file
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=message):
        load_benchmark(name, root=miniatures)


def test_a_bird_without_a_number(miniatures: Path):
    (miniatures / "cub200" / "images" / "Dodo").mkdir()
    with pytest.raises(InputError, match=r"Dodo is not called like 001.Black_footed_Albatross"):
        load_benchmark("cub200", root=miniatures)


def test_a_class_on_both_sides_is_refused(miniatures: Path):
    lists = miniatures / "inaturalist" / "Inaturalist_test_set1.txt"
    lists.write_text("\n".join(["train_val2018/Insecta/12/c.jpg"] * 2))
    with pytest.raises(InputError, match="has 2 classes in all its parts together, the official data set has 3"):
        load_benchmark("inaturalist", root=miniatures)
