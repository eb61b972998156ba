"""Published data sets by name, in their official layout and protocol, their counts asserted when they are read.

torchvision knows the files and fetches them; labels are 0-based and classes stand in the official order, so that
`class_disjoint(holdout=0.2, seed=42)` on `flowers102` holds out the 20 flowers of the embedding-tuning system.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vicinal.data.manifest import Manifest
from vicinal.types import InputError

__all__ = ["BENCHMARKS", "Benchmark", "load_benchmark"]


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What a published data set is known to hold.

    Args:
        dataset: the class of `torchvision.datasets` that reads it.
        folder: where it lies below the root.
        parts: the images of each official part.
        classes: C.
        files: what to place in the folder by hand, where it cannot be fetched.
        address: of the page that offers those files.
    """

    dataset: str
    folder: str
    parts: Mapping[str, int]
    classes: int
    files: str
    address: str


BENCHMARKS: dict[str, Benchmark] = {
    "flowers102": Benchmark(
        dataset="Flowers102",
        folder="flowers-102",
        parts={"train": 1020, "val": 1020, "test": 6149},
        classes=102,
        files="jpg/image_00001.jpg … (the unpacked 102flowers.tgz), imagelabels.mat and setid.mat",
        address="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
    ),
    "food101": Benchmark(
        dataset="Food101",
        folder="food-101",
        parts={"train": 75750, "test": 25250},
        classes=101,
        files="images/<class>/<number>.jpg, meta/train.json and meta/test.json (the unpacked food-101.tar.gz)",
        address="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
    ),
}


def load_benchmark(name: str, *, root: str | Path, download: bool = False) -> Manifest:
    """A published data set as a manifest, its official parts in the column `split`.

    ===========  =======  ======  =====  ======  ===================================
    name         classes  train   val    test    paper
    ===========  =======  ======  =====  ======  ===================================
    flowers102   102      1,020   1,020  6,149   Nilsback and Zisserman 2008
    food101      101      75,750  none   25,250  Bossard et al. 2014
    ===========  =======  ======  =====  ======  ===================================

    Args:
        name: as in the table.
        root: the folder that holds, or shall hold, the data sets, each in a folder of its own.
        download: fetch what is missing, where there is a network.

    Raises:
        InputError: an unknown name, files that are missing and not to be had, or other counts than the official ones.
    """
    if name not in BENCHMARKS:
        raise InputError(f"benchmark {name!r} is unknown; there are {', '.join(BENCHMARKS)}")
    known = BENCHMARKS[name]
    root = Path(root).expanduser()
    home = root / known.folder
    sets = {part: _open(known, part, root, download) for part in known.parts}
    anew = f"fetch it anew from {known.address}"
    for part, dataset in sets.items():  # each part numbers its own classes: they must be the same ones
        if len(dataset.classes) != known.classes:
            raise InputError(
                f"{name}: {home} has {len(dataset.classes)} classes in {part}, the official data set has "
                f"{known.classes}; {anew}"
            )
    classes = tuple(sets["train"].classes)
    images, labels, split = [], [], []
    for part, dataset in sets.items():
        # torchvision offers the decoded pictures in public and the paths and labels only under these names
        files, numbers = dataset._image_files, dataset._labels
        if len(files) != known.parts[part]:
            raise InputError(
                f"{name}: {home} has {len(files):,} images in {part}, the official data set has "
                f"{known.parts[part]:,}; {anew}"
            )
        images += [Path(file).relative_to(home).as_posix() for file in files]
        labels += [classes[number] for number in numbers]
        split += [part] * len(files)
    if len(set(labels)) != known.classes or any(tuple(dataset.classes) != classes for dataset in sets.values()):
        raise InputError(f"{name}: {home} does not have the {known.classes} official classes in every part; {anew}")
    manifest = Manifest.build({"image": images, "label": labels, "split": split}, home, classes=classes, name=name)
    manifest.refuse_missing(f"{name}: {home}", hint="root")
    return manifest


def _open(known: Benchmark, part: str, root: Path, download: bool) -> Any:  # noqa: ANN401, a torchvision data set
    """One part as torchvision reads it."""
    from torchvision import datasets

    place = f"Place {known.files} into {root / known.folder}; they are offered at {known.address}"
    try:
        return getattr(datasets, known.dataset)(root, split=part, download=download)
    except ImportError as error:  # the flowers' labels are a MATLAB file
        raise InputError(f"{known.folder}: reading it needs scipy; pip install scipy ({error})") from error
    except (OSError, RuntimeError, ValueError) as error:
        if download:
            raise InputError(f"{known.folder} cannot be downloaded ({error}). {place}") from error
        raise InputError(
            f"{known.folder} is missing from {root}, or damaged. {place}; or set download=true where there is a network"
        ) from error
