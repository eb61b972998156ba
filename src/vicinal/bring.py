"""What a recipe or a command names, opened: the manifest of a data section or a path, the encoder of an address."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vicinal.data.benchmarks import load_benchmark
from vicinal.data.glyphs import load_glyphs
from vicinal.data.manifest import IMAGE_ENDINGS, Manifest
from vicinal.data.shards import Patterns, expand
from vicinal.data.sources import read_coco, read_folder, read_hub, read_open_images, read_shards, read_table, read_voc
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.models.text_tower import TextTower, with_text_tower
from vicinal.models.tokenizers import MissingTokenizer
from vicinal.recipe import Data, Recipe, Shards, TrainValTest
from vicinal.types import InputError

__all__ = [
    "bring",
    "bring_path",
    "bring_pictures",
    "holds_voc",
    "open_model",
    "open_uri",
    "reads_text",
    "starting_model",
]


def bring(data: Data) -> Manifest:
    """The manifest that a recipe's `data` names."""
    kind, where = data.source
    if isinstance(where, Shards):
        parts = ("train", "val", "test", "train_eval", "val_eval")
        where = {part: shards for part in parts if (shards := getattr(where, part)) is not None}
        if data.streamed is not None:
            _refuse_mixed(data.streamed, where)
            where["train"] = where["train_eval"]
    if isinstance(where, TrainValTest):
        where = {name: path for name, path in where.model_dump().items() if path is not None}
    all_there = data.on_error == "raise"
    match kind:
        case "folder":
            manifest = read_folder(where, labels=data.labels)
        case "table":
            settings: dict[str, Any] = {"columns": data.columns, "root": data.root, "labels": data.labels}
            manifest = read_table(where, **settings, check_files=all_there)
        case "open_images":
            manifest = read_open_images(where.root, where.csv)
        case "together":
            manifest = Manifest.together([bring(one) for one in where])
        case "coco":
            manifest = read_coco(where, images=data.root, check_files=all_there)
        case "voc":
            manifest = read_voc(where, on_error=data.on_error)
        case "hub":
            manifest = read_hub(where, columns=data.columns)
        case "shards":
            manifest = read_shards(where, columns=data.columns, on_error=data.on_error)
        case "glyphs":
            manifest = load_glyphs(**where.model_dump())
        case _:
            manifest = load_benchmark(where.name, root=where.root, download=where.download)
    manifest = manifest.with_padding(data.padding)
    if data.min_images > 1:
        labels = manifest.labels()
        sizes = torch.bincount(labels, minlength=len(manifest.classes))
        manifest = manifest.where(sizes[labels] >= data.min_images).compact()
        if len(manifest) == 0:
            raise InputError(f"data.min_images={data.min_images} leaves no class; the largest has {sizes.max()} images")
    return manifest


def _refuse_mixed(streamed: Patterns, parts: Mapping[str, Patterns]) -> None:
    """What is streamed is not indexed, so `read_shards` cannot see that it is measured, or not looked at, too."""

    def named(patterns: Patterns) -> dict[str, str]:
        return {shard if "://" in shard else os.path.realpath(shard): shard for shard in expand(patterns)}

    trained = named(streamed)
    for part in sorted(parts.keys() - {"train", "train_eval"}):
        if both := [shard for place, shard in named(parts[part]).items() if place in trained]:
            raise InputError(f"data.shards: {both[0]} is among the shards of train and of {part}; an item has one part")
    if absent := [shard for place, shard in named(parts["train_eval"]).items() if place not in trained]:
        raise InputError(
            f"data.shards.train_eval: {absent[0]} is not among the shards of train, so it would tell nothing of them"
        )


def bring_path(
    path: str | Path, columns: Mapping[str, str] | None = None, *, check_files: bool = True
) -> tuple[str, Manifest]:
    """The manifest at a path, by what stands there: a folder, shards, a COCO file, a table. Returns its kind with it.

    Raises:
        InputError: nothing is there, or nothing that is known.
    """
    path = Path(path).expanduser()
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        return "shards", read_shards(path, columns=columns or {}, on_error="raise" if check_files else "skip")
    if path.is_dir() and holds_voc(path):
        return "voc", read_voc(path)
    if path.is_dir():
        return "folder", read_folder(path)
    if path.suffix == ".json":
        return "coco", read_coco(path, check_files=check_files)
    return "table", read_table(path, columns=columns or {}, check_files=check_files)


def bring_pictures(
    paths: Sequence[str | Path], columns: Mapping[str, str] | None = None, *, check_files: bool = True
) -> Manifest:
    """Image files, or one source of them, labelled or not: a folder with no folders in it has no classes.

    Raises:
        InputError: as in `bring_path`; a file is missing.
    """
    here = [Path(path).expanduser() for path in paths]
    if len(here) == 1 and here[0].is_dir() and not any(p.is_dir() for p in here[0].iterdir()):
        return read_folder(here[0], labels=False)
    if len(here) == 1 and (here[0].is_dir() or here[0].suffix.lower() not in IMAGE_ENDINGS):
        return bring_path(here[0], columns, check_files=check_files)[1]
    if missing := [path for path in here if not path.is_file()]:
        more = f", and {len(missing) - 1:,} more are missing" if len(missing) > 1 else ""
        raise InputError(f"{missing[0]}: there is no such picture{more}")
    return Manifest.build({"image": [path.absolute().as_posix() for path in here]}, Path.cwd(), name="the pictures")


def holds_voc(folder: Path) -> bool:
    """Annotations in the generic layout, or beside the pictures of categories and brands; one stray file is neither."""
    if (folder / "Annotations").is_dir():
        return True
    found = next(folder.glob("*/*/*.xml"), None)
    return found is not None and b"<annotation" in found.read_bytes()[:1000]


def open_uri(model: str, *, size: int | None = None) -> Encoder:
    """The encoder of a model's address, of a folder that holds one, or of a run folder (its tuned model)."""
    tuned = Path(model).expanduser() / "model"
    return load_encoder(str(tuned) if (tuned / "vicinal.json").exists() else model, size=size)


def open_model(recipe: Recipe) -> Encoder:
    """The encoder that a recipe names, before any change but that of its preprocessing, and a new text tower."""
    encoder = load_encoder(
        recipe.model,
        size=recipe.preprocess.size,
        crop=recipe.preprocess.crop,
        cache_dir=recipe.cache_dir,
        random_init=recipe.random_init,
    )
    if recipe.text_tower is None:
        return encoder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return with_text_tower(encoder, TextTower(**recipe.text_tower.model_dump()))


def starting_model(run: str | Path) -> Encoder:
    """The model that a run began with, under the run's own preprocessing: what its tuned one is to be compared with.

    Raises:
        InputError: this is no run folder, or it began with random weights, which are gone.
    """
    recipe = Path(run).expanduser() / "recipe.yaml"
    if not recipe.is_file():
        raise InputError(
            f"{run} is no run folder (it has no recipe.yaml), so what it began with is not known; name a model to "
            "compare with"
        )
    settings = Recipe.load(recipe)
    if settings.random_init:
        raise InputError(f"{run} began with random weights, which are gone; name another model to compare with")
    return open_model(settings)


def reads_text(encoder: Encoder) -> bool:
    """Whether texts and images meet in one space: a text tower, its tokenizer, and no new head on the images."""
    readable = encoder.tokenizer is not None and not isinstance(encoder.tokenizer, MissingTokenizer)
    return readable and encoder.family.encode_text is not None and isinstance(encoder.head, torch.nn.Identity)
