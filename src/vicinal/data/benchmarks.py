"""Published data sets by name, in their official layout and protocol, their counts asserted when they are read.

The column `split` names the official parts. Of the classification sets these are train, val and test, of the same
classes. Of the metric-learning sets no class is on two sides:

    train, test             cub200, cars196, sop, inaturalist: each test image asks for its like among all the others
    train, query, gallery   inshop: a query is looked for in the gallery alone, and never among the queries

    train, val, test        coop_*: the ten few-shot sets in CoOp's layout and by its split files
    train, test             imagenet: its validation images are the test part, as in CoOp
    test                    imagenet_v2, imagenet_sketch, imagenet_a, imagenet_r: never trained on

The names of coop_* are those of `vicinal.data.templates` behind the prefix: coop_food101 is CoOp's Food-101, and
food101 the official one. ImageNet and its kin are labelled by synset, and named in the column `name`.

flowers102 and food101 are read, and where wanted fetched, by torchvision. Labels are 0-based and classes stand in the
official order, so that `class_disjoint(holdout=0.2, seed=42)` on `flowers102` holds out the 20 flowers of the
embedding-tuning system.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from vicinal.data import coop
from vicinal.data.manifest import IMAGE_ENDINGS, Manifest
from vicinal.types import InputError

__all__ = ["BENCHMARKS", "Benchmark", "Count", "load_benchmark"]


class Count(NamedTuple):
    """How much one official part holds."""

    classes: int
    images: int


class _Listing(NamedTuple):
    """What a reader found: columns of a manifest, and the order of the classes; None sorts them."""

    columns: dict[str, list[str]]
    classes: Sequence[str] | None = None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What a published data set is known to hold.

    Args:
        read: lists what lies in the data set's folder.
        folders: what that folder is called below the root; the first is the usual name, a further one the archive's.
        parts: the classes and images of each official part.
        classes: C, of all parts together.
        files: what to place in the folder by hand.
        offered: where those files are had.
        fetch: downloads them into the root. None: that needs a person who accepts terms or joins archives.
    """

    read: Callable[[Path], _Listing]
    folders: tuple[str, ...]
    parts: Mapping[str, Count]
    classes: int
    files: str
    offered: str
    fetch: Callable[[Path], None] | None = None


def load_benchmark(name: str, *, root: str | Path, download: bool = False) -> Manifest:
    """A published data set as a manifest, its official parts in the column `split`.

    ===========  ======================  ==============================  ========================  =====================
    name         classes                 images                          published recall at       paper
    ===========  ======================  ==============================  ========================  =====================
    flowers102   102                     1,020 / 1,020 / 6,149           (accuracy)                Nilsback & Zisserman
    food101      101                     75,750 / 25,250                 (accuracy)                Bossard et al. 2014
    cub200       100 / 100               5,864 / 5,924                   1, 2, 4, 8                Wah et al. 2011
    cars196      98 / 98                 8,054 / 8,131                   1, 2, 4, 8                Krause et al. 2013
    sop          11,318 / 11,316         59,551 / 60,502                 1, 10, 100, 1000          Song et al. 2016
    inshop       3,997 / 3,985 / 3,985   25,882 / 14,218 / 12,612        1, 10, 20, 30, 40, 50     Liu et al. 2016
    inaturalist  5,690 / 2,452           325,846 / 136,093               1, 4, 16, 32              Brown et al. 2020
    ===========  ======================  ==============================  ========================  =====================

    Numbers are of train / val / test, of train / test, and for inshop of train / query / gallery. sop and inaturalist
    have a further column `category`: the super-category of each picture.

    ====================  =======  ==========================
    few-shot set          classes  images, train / val / test
    ====================  =======  ==========================
    coop_caltech101       100      4,128 / 1,649 / 2,465
    coop_oxford_pets      37       2,944 / 736 / 3,669
    coop_stanford_cars    196      6,509 / 1,635 / 8,041
    coop_flowers102       102      4,093 / 1,633 / 2,463
    coop_food101          101      50,500 / 20,200 / 30,300
    coop_fgvc_aircraft    100      3,334 / 3,333 / 3,333
    coop_sun397           397      15,880 / 3,970 / 19,850
    coop_dtd              47       2,820 / 1,128 / 1,692
    coop_eurosat          10       13,500 / 5,400 / 8,100
    coop_ucf101           101      7,639 / 1,898 / 3,783
    imagenet              1,000    1,281,167 / - / 50,000
    imagenet_v2           1,000    - / - / 10,000
    imagenet_sketch       1,000    - / - / 50,889
    imagenet_a            200      - / - / 7,500
    imagenet_r            200      - / - / 30,000
    ====================  =======  ==========================

    Args:
        name: as in the table.
        root: the folder that holds, or shall hold, the data sets, each in a folder of its own.
        download: fetch what is missing, where there is a network and the data set may be fetched.

    Raises:
        InputError: an unknown name, files that are missing and not to be had, or other counts than the official ones.
    """
    if name not in BENCHMARKS:
        raise InputError(f"benchmark {name!r} is unknown; there are {', '.join(BENCHMARKS)}")
    known = BENCHMARKS[name]
    root = Path(root).expanduser()
    home = next((root / folder for folder in known.folders if (root / folder).is_dir()), root / known.folders[0])
    place = f"Place {known.files} into {home}; they are offered {known.offered}"
    if download:
        _fetch(known, root, home, place)
    try:
        if not home.is_dir():
            raise InputError(f"there is no folder {' or '.join(known.folders)}")
        columns, classes = known.read(home)
    except ImportError as error:  # the labels of the flowers, and of some copies of the cars, are MATLAB files
        raise InputError(f"{name}: reading it needs scipy; pip install scipy ({error})") from error
    except (InputError, OSError, RuntimeError, ValueError) as error:
        or_fetch = "; or set download=true where there is a network" if known.fetch else ""
        raise InputError(f"{name} is missing from {root}, or damaged ({error}). {place}{or_fetch}") from error
    _refuse_other_counts(name, known, columns, f"{home} has", f"{known.files} are offered {known.offered}")
    manifest = Manifest.build(columns, home, classes=classes, name=name)
    manifest.refuse_missing(f"{name}: {home}", hint="root")
    return manifest


def _fetch(known: Benchmark, root: Path, home: Path, place: str) -> None:
    if known.fetch is None:
        if not home.is_dir():
            raise InputError(f"{known.folders[0]} cannot be downloaded by itself. {place}")
        return
    try:
        known.fetch(root)
    except ImportError:
        pass  # what is read next says so
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{known.folders[0]} cannot be downloaded ({error}). {place}") from error


def _refuse_other_counts(
    name: str, known: Benchmark, columns: Mapping[str, Sequence[str]], has: str, mend: str
) -> None:
    """Nothing, if each part has its official classes and images, and all parts together have theirs."""
    classes: dict[str, set[str]] = {part: set() for part in known.parts}
    images = dict.fromkeys(known.parts, 0)
    for part, label in zip(columns["split"], columns["label"], strict=True):
        classes[part].add(label)
        images[part] += 1
    found = {part: Count(len(classes[part]), images[part]) for part in known.parts}
    for part, official in known.parts.items():
        for what, here, there in zip(Count._fields, found[part], official, strict=True):
            if here != there:
                raise InputError(
                    f"{name}: {has} {here:,} {what} in {part}, the official data set has {there:,}. Some are missing, "
                    f"or do not belong there: {mend}"
                )
    altogether = len(set().union(*classes.values()))
    if altogether != known.classes:
        raise InputError(
            f"{name}: {has} {altogether:,} classes in all its parts together, the official data set has "
            f"{known.classes:,}: {mend}"
        )


# ------------------------------------------------------------------------------------------------- read by torchvision


def _torchvision(dataset: str, parts: Sequence[str], home: Path) -> _Listing:
    """What the class of `torchvision.datasets` finds."""
    from torchvision import datasets

    columns: dict[str, list[str]] = {"image": [], "label": [], "split": []}
    classes: Sequence[str] = ()
    for part in parts:
        found = getattr(datasets, dataset)(home.parent, split=part)
        classes = classes or found.classes
        # torchvision offers the decoded pictures in public and the paths and labels only under these names
        columns["image"] += [Path(file).relative_to(home).as_posix() for file in found._image_files]
        columns["label"] += [found.classes[number] for number in found._labels]
        columns["split"] += [part] * len(found._labels)
    return _Listing(columns, classes if set(columns["label"]) <= set(classes) else None)


def _torchvision_fetch(dataset: str, parts: Sequence[str], root: Path) -> None:
    from torchvision import datasets

    for part in parts:
        getattr(datasets, dataset)(root, split=part, download=True)


# ----------------------------------------------------------------------------------------- the metric-learning layouts


def _cub200(home: Path) -> _Listing:
    """`images/001.Black_footed_Albatross/*.jpg`: by number, the first half of the classes is trained on."""
    folders = _class_folders(home / "images")
    strange = [folder for folder in folders if not folder.partition(".")[0].isdecimal()]
    if strange:
        raise InputError(f"{home / 'images' / strange[0]} is not called like 001.Black_footed_Albatross")
    folders.sort(key=lambda folder: int(folder.partition(".")[0]))
    return _halves(home, folders, [folder.partition(".")[2] for folder in folders])


def _cars196(home: Path) -> _Listing:
    """`images/<class>/*.jpg`, or `car_ims/*.jpg` and `cars_annos.mat`: in order, the first half is trained on."""
    if (home / "cars_annos.mat").is_file() and not (home / "images").is_dir():
        return _cars196_numbered(home)
    folders = sorted(_class_folders(home / "images"))
    return _halves(home, folders, folders)


def _cars196_numbered(home: Path) -> _Listing:
    """The original files: pictures by number, and a MATLAB table of their classes (1 to 196)."""
    from scipy.io import loadmat

    try:
        content = loadmat(home / "cars_annos.mat", simplify_cells=True)
        classes = [str(name) for name in content["class_names"]]
        images = [str(row["relative_im_path"]) for row in content["annotations"]]
        numbers = [int(row["class"]) for row in content["annotations"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{home / 'cars_annos.mat'} does not hold class_names and annotations ({error})") from error
    split = ["train" if number <= len(classes) // 2 else "test" for number in numbers]
    return _Listing({"image": images, "label": [classes[n - 1] for n in numbers], "split": split}, classes)


def _sop(home: Path) -> _Listing:
    """`images/<super>_final/*.JPG` and `Info_Files/Ebay_train.txt`; the archive has neither of the two folders."""
    base = "images/" if (home / "images").is_dir() else ""
    columns: dict[str, list[str]] = {"image": [], "label": [], "category": [], "split": []}
    for part in ("train", "test"):
        listed = _either(home, f"Info_Files/Ebay_{part}.txt", f"Ebay_{part}.txt")
        for _, product, _, image in _rows(listed, skip=1, columns="image_id class_id super_class_id path"):
            columns["image"].append(base + image)
            columns["label"].append(product)
            columns["category"].append(image.partition("/")[0].removesuffix("_final"))
            columns["split"].append(part)
    return _Listing(columns)


def _inshop(home: Path) -> _Listing:
    """`img/…` and `list_eval_partition.txt`; the archive has them in `Img` and `Eval`."""
    listed = _either(home, "list_eval_partition.txt", "Eval/list_eval_partition.txt")
    base = "" if (home / "img").is_dir() else "Img/"
    columns: dict[str, list[str]] = {"image": [], "label": [], "split": []}
    for number, (image, item, part) in enumerate(
        _rows(listed, skip=2, columns="image_name item_id evaluation_status"), start=3
    ):
        product = item.rpartition("_")[2]
        if not product.isdecimal() or part not in ("train", "query", "gallery"):
            raise InputError(f"{listed}, line {number}: {item} {part} is no id_<number> of train, query or gallery")
        columns["image"].append(base + image)
        columns["label"].append(str(int(product)))
        columns["split"].append(part)
    return _Listing(columns)


def _inaturalist(home: Path) -> _Listing:
    """`train_val2018/<super-category>/<species>/*.jpg` and two lists of such paths."""
    columns: dict[str, list[str]] = {"image": [], "label": [], "category": [], "split": []}
    for part in ("train", "test"):
        file = f"Inaturalist_{part}_set1.txt"
        listed = _either(home, file, f"Inat_dataset_splits/{file}")
        for number, (image,) in enumerate(_rows(listed, skip=0, columns="path"), start=1):
            folders = image.split("/")[:-1]
            if len(folders) < 2:
                raise InputError(f"{listed}, line {number}: {image} does not lie in <super-category>/<species>")
            columns["image"].append(image)
            columns["label"].append("/".join(folders[-2:]))
            columns["category"].append(folders[-2])
            columns["split"].append(part)
    return _Listing(columns)


def _class_folders(images: Path) -> list[str]:
    """The folders of a folder; files that stray there are no classes."""
    with os.scandir(images) as entries:
        return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]


def _halves(home: Path, folders: Sequence[str], classes: Sequence[str]) -> _Listing:
    """The pictures of `images/<folder>`, the first half of the folders in train."""
    columns: dict[str, list[str]] = {"image": [], "label": [], "split": []}
    for i, (folder, name) in enumerate(zip(folders, classes, strict=True)):
        with os.scandir(home / "images" / folder) as entries:
            there = [entry.name for entry in entries if not entry.name.startswith(".")]
        files = sorted(file for file in there if file.lower().endswith(IMAGE_ENDINGS))
        columns["image"] += [f"images/{folder}/{file}" for file in files]
        columns["label"] += [name] * len(files)
        columns["split"] += ["train" if i < len(folders) // 2 else "test"] * len(files)
    return _Listing(columns, classes)


def _either(home: Path, *names: str) -> Path:
    """The first of the files that is there."""
    for name in names:
        if (home / name).is_file():
            return home / name
    raise InputError(f"{home} has no {' or '.join(names)}")


def _rows(path: Path, *, skip: int, columns: str) -> Iterator[list[str]]:
    """The lines of a list after its first `skip`, each cut at blanks into as many fields as there are `columns`."""
    width = len(columns.split())
    lines = path.read_text(encoding="utf-8").splitlines()
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines[skip:], start=skip + 1):
        fields = line.split(None, width - 1)
        if len(fields) != width:
            raise InputError(f"{path}, line {number}: {line!r} is not {columns}")
        yield [field.strip() for field in fields]


def _of_torchvision(
    dataset: str, folder: str, parts: Mapping[str, Count], *, classes: int, files: str, offered: str
) -> Benchmark:
    read = partial(_torchvision, dataset, tuple(parts))
    return Benchmark(
        read, (folder,), parts, classes, files, offered, fetch=partial(_torchvision_fetch, dataset, tuple(parts))
    )


_COOP = "by the authors of CoOp (the split file, see DATASETS.md beside their code) and of the data set (the images)"


def _of_coop(file: str, folder: str, images: str, counts: tuple[int, int, int], classes: int) -> Benchmark:
    """A set that one of CoOp's split files divides."""

    def read(home: Path) -> _Listing:
        return _Listing(*coop.split_file(home, file, images))

    parts = {part: Count(classes, count) for part, count in zip(("train", "val", "test"), counts, strict=True)}
    return Benchmark(read, (folder,), parts, classes, f"{images or 'cars_train, cars_test'} and {file}", _COOP)


def _shifted(folder: str, images: str, read: Callable[[Path, str], coop.Listed], classes: int, count: int) -> Benchmark:
    """A test set for models of ImageNet."""
    return Benchmark(
        lambda home: _Listing(*read(home, images)),
        (folder,),
        {"test": Count(classes, count)},
        classes,
        f"{images} and ImageNet's classnames.txt",
        "by its authors (the images) and those of CoOp (classnames.txt, see DATASETS.md beside their code)",
    )


BENCHMARKS: dict[str, Benchmark] = {
    "flowers102": _of_torchvision(
        "Flowers102",
        "flowers-102",
        {"train": Count(102, 1020), "val": Count(102, 1020), "test": Count(102, 6149)},
        classes=102,
        files="jpg/image_00001.jpg … (the unpacked 102flowers.tgz), imagelabels.mat and setid.mat",
        offered="at https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    "food101": _of_torchvision(
        "Food101",
        "food-101",
        {"train": Count(101, 75750), "test": Count(101, 25250)},
        classes=101,
        files="images/<class>/<number>.jpg, meta/train.json and meta/test.json (the unpacked food-101.tar.gz)",
        offered="at https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    ),
    "cub200": Benchmark(
        read=_cub200,
        folders=("cub200", "CUB_200_2011"),
        parts={"train": Count(100, 5864), "test": Count(100, 5924)},
        classes=200,
        files="images/001.Black_footed_Albatross/*.jpg … (the unpacked CUB_200_2011.tgz)",
        offered="by Caltech's data repository as Caltech-UCSD Birds-200-2011",
    ),
    "cars196": Benchmark(
        read=_cars196,
        folders=("cars196",),
        parts={"train": Count(98, 8054), "test": Count(98, 8131)},
        classes=196,
        files="images/<class>/*.jpg with all 196 classes (the training and test images of the classification task in "
        "one), or car_ims/*.jpg and cars_annos.mat",
        offered="as Stanford Cars; the authors' page is gone, copies of it are on Kaggle and on the Hugging Face Hub",
    ),
    "sop": Benchmark(
        read=_sop,
        folders=("sop", "Stanford_Online_Products"),
        parts={"train": Count(11318, 59551), "test": Count(11316, 60502)},
        classes=22634,
        files="images/<super>_final/*.JPG, Info_Files/Ebay_train.txt and Info_Files/Ebay_test.txt (or the unpacked "
        "Stanford_Online_Products.zip as it is)",
        offered="by Stanford's Computational Vision and Geometry Lab as Stanford Online Products",
    ),
    "inshop": Benchmark(
        read=_inshop,
        folders=("inshop", "In-shop Clothes Retrieval Benchmark"),
        parts={"train": Count(3997, 25882), "query": Count(3985, 14218), "gallery": Count(3985, 12612)},
        classes=7982,
        files="img/… (the unpacked img.zip) and list_eval_partition.txt",
        offered="by the Multimedia Laboratory of the Chinese University of Hong Kong as DeepFashion, In-shop Clothes "
        "Retrieval Benchmark, to those who sign its agreement",
    ),
    "inaturalist": Benchmark(
        read=_inaturalist,
        folders=("inaturalist",),
        parts={"train": Count(5690, 325846), "test": Count(2452, 136093)},
        classes=8142,
        files="train_val2018/<super-category>/<species>/*.jpg (the unpacked train_val2018.tar.gz), "
        "Inaturalist_train_set1.txt and Inaturalist_test_set1.txt",
        offered="by the iNaturalist 2018 competition; the two lists by the authors of Smooth-AP (Brown et al. 2020)",
    ),
    "coop_caltech101": _of_coop(
        "split_zhou_Caltech101.json", "caltech-101", "101_ObjectCategories", (4128, 1649, 2465), 100
    ),
    "coop_oxford_pets": _of_coop("split_zhou_OxfordPets.json", "oxford_pets", "images", (2944, 736, 3669), 37),
    "coop_stanford_cars": _of_coop("split_zhou_StanfordCars.json", "stanford_cars", "", (6509, 1635, 8041), 196),
    "coop_flowers102": _of_coop("split_zhou_OxfordFlowers.json", "oxford_flowers", "jpg", (4093, 1633, 2463), 102),
    "coop_food101": _of_coop("split_zhou_Food101.json", "food-101", "images", (50500, 20200, 30300), 101),
    "coop_fgvc_aircraft": Benchmark(
        lambda home: _Listing(*coop.aircraft(home)),
        ("fgvc_aircraft",),
        {"train": Count(100, 3334), "val": Count(100, 3333), "test": Count(100, 3333)},
        100,
        "images, variants.txt and images_variant_{train,val,test}.txt (the folder data of fgvc-aircraft-2013b.tar.gz)",
        "by the Visual Geometry Group of Oxford as FGVC-Aircraft",
    ),
    "coop_sun397": _of_coop("split_zhou_SUN397.json", "sun397", "SUN397", (15880, 3970, 19850), 397),
    "coop_dtd": _of_coop("split_zhou_DescribableTextures.json", "dtd", "images", (2820, 1128, 1692), 47),
    "coop_eurosat": _of_coop("split_zhou_EuroSAT.json", "eurosat", "2750", (13500, 5400, 8100), 10),
    "coop_ucf101": _of_coop("split_zhou_UCF101.json", "ucf101", "UCF-101-midframes", (7639, 1898, 3783), 101),
    "imagenet": Benchmark(
        lambda home: _Listing(*coop.imagenet(home)),
        ("imagenet",),
        {"train": Count(1000, 1281167), "test": Count(1000, 50000)},
        1000,
        "images/train/<synset>/*, images/val/<synset>/* and classnames.txt",
        "by image-net.org to those who register (the images) and by the authors of CoOp (classnames.txt)",
    ),
    "imagenet_v2": _shifted("imagenetv2", "imagenetv2-matched-frequency-format-val", coop.numbered, 1000, 10000),
    "imagenet_sketch": _shifted("imagenet-sketch", "images", coop.synsets, 1000, 50889),
    "imagenet_a": _shifted("imagenet-adversarial", "imagenet-a", coop.synsets, 200, 7500),
    "imagenet_r": _shifted("imagenet-rendition", "imagenet-r", coop.synsets, 200, 30000),
}
