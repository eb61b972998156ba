"""The few-shot data sets as CoOp lays them out on disk: its split files, FGVC's lists, ImageNet and its shifted kin.

    split_zhou_<Dataset>.json    {"train": [[path, label, class name], ...], "val": [...], "test": [...]}

Rows keep the order of those lists, since the published shots depend on it (`vicinal.data.splits.coop_shots`). ImageNet
has no list: CoOp's order is that of an unsorted folder, so its shots cannot be drawn again; here files are sorted.

Zhou et al. 2022, arXiv:2109.01134, and the file DATASETS.md beside its code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from vicinal.data.manifest import IMAGE_ENDINGS
from vicinal.types import InputError

__all__ = ["aircraft", "imagenet", "numbered", "split_file", "synsets"]

Listed = tuple[dict[str, list[str]], Sequence[str]]
"""The columns of a manifest, and the classes in their order."""


def split_file(home: Path, name: str, images: str) -> Listed:
    """What `split_zhou_*.json` lists, in its order; paths start from the folder `images` ("": the set's own)."""
    path = home / name
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON ({error})") from error
    columns: dict[str, list[str]] = {"image": [], "label": [], "split": []}
    classes: dict[int, str] = {}
    for part in ("train", "val", "test"):
        if not isinstance(content, dict) or not isinstance(content.get(part), list):
            raise InputError(f"{path} has no list {part!r}; it is not one of CoOp's split files")
        for row, item in enumerate(content[part]):
            try:
                image, label, word = item
                number = int(label)
            except (TypeError, ValueError) as error:
                raise InputError(f"{path}, {part}, item {row}: {item!r} is not [path, label, class name]") from error
            if classes.setdefault(number, word) != word:
                raise InputError(f"{path}, {part}, item {row}: label {number} is {classes[number]!r} and {word!r}")
            columns["image"].append(f"{images}/{image}" if images else image)
            columns["label"].append(word)
            columns["split"].append(part)
    names = [classes[number] for number in sorted(classes)]
    if len(set(names)) != len(names):
        twice = next(word for word in names if names.count(word) > 1)
        raise InputError(f"{path}: two labels are called {twice!r}")
    return columns, names


def aircraft(home: Path) -> Listed:
    """FGVC's own lists: `variants.txt` and `images_variant_{train,val,test}.txt`, pictures in `images`."""
    names = [line.strip() for line in (home / "variants.txt").read_text(encoding="utf-8").splitlines() if line.strip()]
    columns: dict[str, list[str]] = {"image": [], "label": [], "split": []}
    for part in ("train", "val", "test"):
        path = home / f"images_variant_{part}.txt"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            image, _, word = line.strip().partition(" ")
            if word not in names:
                raise InputError(f"{path}, line {number}: {word!r} is not in variants.txt")
            columns["image"].append(f"images/{image}.jpg")
            columns["label"].append(word)
            columns["split"].append(part)
    return columns, names


def imagenet(home: Path) -> Listed:
    """`images/train/<synset>` and `images/val/<synset>`: the latter is the test part, since there is no other."""
    names = _class_names(home)
    train = synsets(home, "images/train", "train", names)
    test = synsets(home, "images/val", "test", names)
    return {column: train[0][column] + test[0][column] for column in train[0]}, list(names)


def synsets(home: Path, folder: str, part: str = "test", names: dict[str, str] | None = None) -> Listed:
    """`<folder>/<synset>/*`, labelled by synset, since some share a name; the column `name` is what to prompt."""
    names = names or _class_names(home)
    with os.scandir(home / folder) as entries:
        found = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    unknown = [synset for synset in found if synset not in names]
    if unknown:
        raise InputError(f"{home / folder / unknown[0]} is not in classnames.txt")
    return _pictures(home, folder, {synset: synset for synset in found}, part, names), [s for s in names if s in found]


def numbered(home: Path, folder: str) -> Listed:
    """ImageNet-V2: `<folder>/<0 .. 999>/*`, numbered as the lines of `classnames.txt`."""
    names = _class_names(home)
    return _pictures(home, folder, {str(i): s for i, s in enumerate(names)}, "test", names), list(names)


def _class_names(home: Path) -> dict[str, str]:
    """Synset -> name, in the order of `classnames.txt`."""
    path = home / "classnames.txt"
    pairs = [line.strip().split(" ", 1) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    wrong = next((pair for pair in pairs if len(pair) != 2), None)
    if wrong:
        raise InputError(f"{path}: {wrong[0]!r} has no name; each line is <synset> <name>")
    return dict(pairs)


def _pictures(
    home: Path, folder: str, synset_of: dict[str, str], part: str, names: dict[str, str]
) -> dict[str, list[str]]:
    """The pictures of the folders that `synset_of` names, sorted."""
    columns: dict[str, list[str]] = {"image": [], "label": [], "name": [], "split": []}
    for own, synset in synset_of.items():
        with os.scandir(home / folder / own) as entries:
            files = sorted(e.name for e in entries if e.name.lower().endswith(IMAGE_ENDINGS) and e.name[0] != ".")
        columns["image"] += [f"{folder}/{own}/{file}" for file in files]
        columns["label"] += [synset] * len(files)
        columns["name"] += [names[synset]] * len(files)
        columns["split"] += [part] * len(files)
    return columns
