"""The parts that a recipe names, made for its data: adapters, transform, sampler, objective, optimiser, steps."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from vicinal.data.division import Division
from vicinal.data.manifest import Manifest
from vicinal.data.samplers import HardClassSampler, NoDuplicateSampler, PKSampler, ShuffleSampler
from vicinal.data.stream import BUFFER, StreamPlan
from vicinal.data.transforms import MultiCrop, TrainTransform, multi_crop, train_transform
from vicinal.embedding import choose_precision, embed, embed_text, pick_device
from vicinal.evaluation.metrics import class_neighbours
from vicinal.ground import Say
from vicinal.losses import (
    CONTRASTIVE_LOSSES,
    DINO,
    LINEAR_LOSSES,
    PAIR_LOSSES,
    PROXY_LOSSES,
    CrossBatchMemory,
    InfoNCE,
    SigLIP,
    WeightedSum,
)
from vicinal.losses.contrastive import fit_scale_and_bias
from vicinal.losses.margin import start_from_class_means
from vicinal.losses.pair import Pair
from vicinal.models.adapters import VisualPrompt, adapt, adapters_from_config, check_adapted, locked_towers
from vicinal.models.encoder import Encoder
from vicinal.models.modules import DINOHead
from vicinal.recipe import PK, HardClass, NoDuplicate, Recipe, Sampler, Shards
from vicinal.training.devices import check_trackers
from vicinal.training.distillation import SelfDistillation
from vicinal.training.grad_cache import check_parts
from vicinal.training.image_text import ImageTextObjective, kin_of
from vicinal.training.locked import LockedTowers, lock
from vicinal.training.objectives import LabelObjective
from vicinal.training.optim import build_optimizer, clip_each, parameter_groups
from vicinal.training.semantic_proxies import ACCUMULATORS, PromptTable, RowAdam, SemanticProxies
from vicinal.types import Embeddings, InputError

__all__ = [
    "Batches",
    "adapters_of",
    "evaluate_every",
    "locked_of",
    "nested",
    "objective_of",
    "optimizer_of",
    "rehearse",
    "sampler_of",
    "small_classes",
    "steps_of",
    "trained_aside",
    "trained_rows",
    "transform_of",
]

CLASS_PROMPTS = "class_prompts"  # in the run folder: the table of semantic proxies, where it lies on the disk
Objective = LabelObjective | ImageTextObjective | SemanticProxies | SelfDistillation
Batches = StreamPlan | ShuffleSampler | NoDuplicateSampler | PKSampler | HardClassSampler


def trained_rows(manifest: Manifest, division: Division, recipe: Recipe) -> Manifest:
    """The rows that are trained on, as the loss and the sampler are to see them."""
    train = manifest.where(division.train).compact()
    if recipe.captions.trained == "first":
        train = train.with_first_captions()
    if "group" in train.names() and not nested(train):
        train = replace(train, table=train.table.drop_columns(["group"]))
    return train


def rehearse(original: Encoder, train: Manifest, recipe: Recipe, folders: Sequence[Path], processes: int) -> list[str]:
    """Make every part once, as far as that needs no image: what is wrong is said before the first is embedded.

    Nothing is kept, and no random number is used up.

    Args:
        original: the model.
        train: the rows that are trained on, as far as that is known yet.
        recipe: what to do.
        folders: those of the trainings to come.
        processes: that share a batch.

    Returns:
        What the user should know before it begins, a line each.

    Raises:
        InputError: a part cannot be made of this model, with this data, in this place.
    """
    told: list[str] = []
    check_trackers(recipe.trackers, folders[0])
    choose_precision(recipe.precision, pick_device(recipe.device))
    with torch.random.fork_rng(devices=[]):
        encoder = adapt(original, *adapters_from_config(adapters_of(recipe)))
        transform_of(encoder, recipe)
        sampler = sampler_of(train, None, recipe)
        if (size := sampler.batch_size) % processes:
            raise InputError(f"a batch of {size} cannot be shared evenly by {processes} processes: change sampler")
        noise = torch.randn(2, 3, *encoder.preprocess.size, generator=torch.Generator().manual_seed(0))
        check_adapted(encoder, noise)
        objective: Objective
        if recipe.loss.chosen[0] == "semantic_proxies":
            if processes > 1:
                raise InputError("semantic proxies are trained by one process; start one, or take proxy_anchor")
            objective = proxies = _semantic(encoder, 1, None, recipe)  # the table of all classes may not fit
            told += _room(proxies.table, len(train.classes), recipe, [folder / CLASS_PROMPTS for folder in folders])
        else:
            objective = objective_of(encoder, original, train, None, sampler, recipe, folders[0])
        optimizer_of(objective, recipe)
        if recipe.micro_batch is not None:
            check_parts(objective.train())
    return told


def _room(table: PromptTable, classes: int, recipe: Recipe, folders: Sequence[Path]) -> list[str]:
    settings = recipe.loss.chosen[1]
    folders = folders if settings.on_disk else []
    size = PromptTable.check(
        classes, *table.shape, max_bytes=settings.max_bytes, on_disk=settings.on_disk, folders=folders
    )
    if not folders:
        return []
    several = f" of {len(folders)} seeds" if len(folders) > 1 else ""
    return [
        f"class prompts: {size / 1e9:.3g} GB in {folders[0]}, with copies for the checkpoints{several} up to "
        f"{PromptTable.needed(size, len(folders)) / 1e9:.3g} GB; resume=last needs them, nothing else"
    ]


def objective_of(
    encoder: Encoder,
    original: Encoder,
    train: Manifest,
    untuned: Embeddings | None,
    sampler: Batches,
    recipe: Recipe,
    out: Path,
) -> Objective:
    """The encoder with the recipe's loss, which starts from class means, a learnt scale, or nothing, as it says.

    Without `untuned`, the vectors of the images by the model as it is, it starts from nothing.
    """
    name, settings = recipe.loss.chosen
    if name == "dino":
        return _distillation(encoder, steps_of(recipe, sampler), recipe)
    if name == "semantic_proxies":
        objective = _semantic(encoder, len(train.classes), out / CLASS_PROMPTS if settings.on_disk else None, recipe)
        if recipe.class_means and untuned is not None:
            objective.start_from_class_means(_through_head(encoder, train, untuned, recipe), train.labels())
        return objective
    anchor: dict[str, Any] = {"retention": recipe.retention, "reference": original if recipe.retention else None}
    if name in CONTRASTIVE_LOSSES:
        loss = _contrastive(name, settings.model_dump(), original, train, untuned, sampler, recipe)
        return ImageTextObjective(encoder, loss, **anchor)
    if name in (*PAIR_LOSSES, "sum"):
        pair: Pair | WeightedSum
        if name == "sum":
            parts = settings.parts().items()
            pair = WeightedSum([(p.weight, PAIR_LOSSES[n](**p.model_dump(exclude={"weight"}))) for n, p in parts])
        else:
            pair = PAIR_LOSSES[name](**settings.model_dump())
        memory = recipe.memory
        return LabelObjective(
            encoder, pair if memory is None else CrossBatchMemory(pair, encoder.embedding_dim, size=memory), **anchor
        )
    if name in LINEAR_LOSSES:
        linear = LINEAR_LOSSES[name](encoder.embedding_dim, len(train.classes), **settings.model_dump())
        return LabelObjective(encoder, linear, **anchor)
    proxies = PROXY_LOSSES[name](encoder.embedding_dim, len(train.classes), **settings.model_dump())
    if recipe.class_means and untuned is not None:
        start_from_class_means(proxies, _through_head(encoder, train, untuned, recipe), train.labels())
    return LabelObjective(encoder, proxies, **anchor)


def _semantic(encoder: Encoder, classes: int, folder: Path | None, recipe: Recipe) -> SemanticProxies:
    settings = recipe.loss.chosen[1]
    kind, of_it = settings.accumulator.chosen
    given = of_it.model_dump() | ({"dim": encoder.embedding_dim} if kind == "gru" else {})
    return SemanticProxies(
        encoder,
        classes,
        VisualPrompt(**settings.prompts.model_dump()),
        ACCUMULATORS[kind](**given),
        folder=folder,
        **settings.model_dump(include={"share", "margin", "alpha", "max_bytes"}),
    )


def _through_head(encoder: Encoder, train: Manifest, untuned: Embeddings, recipe: Recipe) -> Tensor:
    """The training images as the encoder sees them before its first step: a new head has changed what is known."""
    if isinstance(encoder.head, torch.nn.Identity):
        return untuned.vectors
    return embed(encoder, train, device=recipe.device, precision=recipe.precision).vectors


def trained_aside(objective: torch.nn.Module) -> int:
    """How many numbers are trained that are no part of the encoder, and serve nothing afterwards."""
    own = [p for name, p in objective.named_parameters() if p.requires_grad and not name.startswith("encoder.")]
    prompts = objective.table.table.shape[0] * objective.table.numbers if isinstance(objective, SemanticProxies) else 0
    return sum(p.numel() for p in own) + prompts


def _distillation(encoder: Encoder, steps: int, recipe: Recipe) -> SelfDistillation:
    dino = recipe.loss.chosen[1]
    small = cast(MultiCrop, transform_of(encoder, recipe)).small
    temperatures = dino.model_dump(include={"student_temperature", "teacher_temperature", "centre_momentum"})
    head = DINOHead(encoder.embedding_dim, dino.prototypes, hidden=dino.hidden, bottleneck=dino.bottleneck)
    return SelfDistillation(
        encoder,
        DINO(dino.prototypes, **temperatures),
        head,
        steps=steps,
        warmup=round(dino.temperature_warmup * steps),
        small_size=small[0].preprocess.size if small else None,
        **dino.model_dump(include={"train_head", "momentum", "first_temperature"}),
    )


def _contrastive(
    name: str,
    settings: dict[str, Any],
    original: Encoder,
    train: Manifest,
    untuned: Embeddings | None,
    sampler: Batches,
    recipe: Recipe,
) -> InfoNCE | SigLIP:
    """The loss with the scale (and bias) that the encoder has learnt; from random weights, with those of the papers."""
    if recipe.random_init or recipe.text_tower is not None or original.logit_scale is None:
        return CONTRASTIVE_LOSSES[name](**settings)
    if name == "infonce":
        return InfoNCE(scale=min(original.logit_scale, 100.0), **settings)
    if original.logit_bias is not None:
        return SigLIP(scale=original.logit_scale, bias=original.logit_bias, **settings)
    if untuned is None:
        return SigLIP(**settings)
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed))[:4096]
    draw = random.Random(recipe.seed)
    told = train.captions()
    captions = [draw.choice(told[i]) for i in some.tolist()]  # as training draws them
    texts = embed_text(original, captions, device=recipe.device, precision=recipe.precision)
    ids = kin_of(captions, train.labels()[some])
    scale, bias = fit_scale_and_bias(untuned.vectors[some], texts, ids=ids, batch=sampler.batch_size)
    return SigLIP(scale=scale, bias=bias, **settings)


def locked_of(encoder: Encoder, train: Manifest, untuned: Embeddings, recipe: Recipe, say: Say) -> LockedTowers:
    """The vectors of towers that a loss of images and texts does not train; other losses run the encoder whole."""
    if recipe.loss.chosen[0] not in CONTRASTIVE_LOSSES:
        return LockedTowers()
    settings: dict[str, Any] = {"device": recipe.device, "precision": recipe.precision}
    kept = lock(encoder, train, untuned.vectors, augmented=recipe.augment != "none", **settings)
    for name in kept.names:
        say(f"locked: the {name} tower is not trained, and not run at each step: its vectors are known")
    if "image" in locked_towers(encoder) and kept.image is None:
        say("locked: the image tower is not trained, but run at each step for augment's sake; augment=none spares that")
    return kept


def sampler_of(train: Manifest, untuned: Embeddings | None, recipe: Recipe) -> Batches:
    """Which images stand together in a batch; without vectors, no class is known to be near to another.

    Raises:
        InputError: the data has fewer images than a batch, lacks a column, or an epoch of it has no length.
    """
    if (streamed := recipe.data.streamed) is not None and isinstance(recipe.data.shards, Shards):
        size = recipe.sampler.shuffle.batch_size if recipe.sampler.shuffle else 64
        buffer = BUFFER if recipe.data.shards.shuffle is True else int(recipe.data.shards.shuffle)
        plan = StreamPlan(streamed, size, recipe.seed, buffer, recipe.data.columns.get("label"))
        if (recipe.steps is None or recipe.evaluate_every == "epoch") and plan.items is None:
            raise InputError(
                "how many samples the shards of data.shards.train have stands nowhere (no shards.json beside them), so "
                "an epoch has no length: give steps" + (", and evaluate_every in steps" if recipe.steps else "")
            )
        return plan
    match recipe.sampler:
        case Sampler(pk=PK() as pk):
            return PKSampler(train.labels(), **pk.model_dump(), seed=recipe.seed)
        case Sampler(hard_class=HardClass(neighbours=k) as hard):
            nearest = torch.empty(len(train.classes), 0, dtype=torch.long)
            if untuned is not None:
                nearest = class_neighbours(untuned.vectors, train.labels(), k)
            settings = hard.model_dump(exclude={"neighbours"})
            return HardClassSampler(train.labels(), nearest, **settings, seed=recipe.seed)
        case Sampler(no_duplicate=NoDuplicate(batch_size=size, by=by)):
            return NoDuplicateSampler(_alike(train, by), batch_size=size, seed=recipe.seed)
        case Sampler(shuffle=shuffle):
            size = shuffle.batch_size if shuffle else 64
            if recipe.loss.chosen[0] in CONTRASTIVE_LOSSES and size > len(train):
                raise InputError(
                    f"sampler.shuffle.batch_size={size}, but there are only {len(train)} images with captions to train "
                    f"on, and the others of a batch are what loss.{recipe.loss.chosen[0]} compares with; set "
                    f"sampler.shuffle.batch_size={len(train)} or less"
                )
            return ShuffleSampler(len(train), min(size, len(train)), seed=recipe.seed)


def small_classes(sampler: Batches) -> dict[str, int]:
    """Classes whose images repeat within a batch; nothing where there are none, or batches are not made by class."""
    if not isinstance(sampler, PKSampler | HardClassSampler) or not sampler.repeated:
        return {}
    return {"too_small": sampler.repeated, "single": sampler.singles}


def _alike(train: Manifest, by: Sequence[str]) -> list[list[tuple[str, Any]]]:
    """Of each row what it must not share with another of its batch."""
    missing = [name for name in by if name != "text" and name not in train.names()]
    if missing or ("text" in by and not any(train.captions())):
        name = (missing or ["text"])[0]
        raise InputError(f"sampler.no_duplicate.by: the data has no column {name}; leave it out of by, or add it")
    keys: list[list[tuple[str, Any]]] = [[] for _ in range(len(train))]
    for name in by:
        values = train.captions() if name == "text" else [[value] for value in train.column(name)]
        for own, several in zip(keys, values, strict=True):
            own += [(name, value) for value in several if value is not None]
    return keys


def optimizer_of(objective: Objective, recipe: Recipe) -> torch.optim.Optimizer:
    """Over all that is trained; prompts of classes have a table and an optimiser of their own."""
    rates: dict[str, Any] = {"lr": recipe.lr, "loss_lr": recipe.loss_lr, "layer_decay": recipe.layer_decay}
    groups = parameter_groups(objective, **rates, weight_decay=recipe.weight_decay)
    optimizer = build_optimizer(recipe.optimizer, groups)
    if recipe.clip_each is not None:
        clip_each(optimizer, recipe.clip_each)
    if isinstance(objective, SelfDistillation):
        objective.follow(optimizer)
    if not isinstance(objective, SemanticProxies):
        return optimizer
    return RowAdam(optimizer, objective.table, lr=recipe.loss.chosen[1].lr or recipe.lr)


def adapters_of(recipe: Recipe) -> list[dict[str, Any]]:
    """The methods of adaptation, as `adapters_from_config` takes them."""
    return [{name: settings.model_dump()} for name, settings in (adapter.chosen for adapter in recipe.adapt)]


def transform_of(encoder: Encoder, recipe: Recipe) -> TrainTransform | MultiCrop:
    """What is done to a training image: one view, or the several of self-distillation."""
    name, settings = recipe.loss.chosen
    if name != "dino":
        return train_transform(encoder.preprocess, recipe.augment)
    crops = settings.model_dump(include={"large_scale", "small_scale", "small_crops"})
    size = None if settings.small_size is None else (settings.small_size, settings.small_size)
    return multi_crop(encoder.preprocess, recipe.augment, small_size=size, **crops)


def steps_of(recipe: Recipe, sampler: Batches) -> int:
    """Of the optimiser: as given, or those of the epochs."""
    return recipe.steps or max(1, math.ceil((recipe.epochs or 12) * len(sampler) / recipe.accumulate))


def evaluate_every(recipe: Recipe, steps: int, batches: int) -> int:
    """After how many steps the validation part is measured; five times by default."""
    if recipe.evaluate_every == "epoch":
        return max(1, math.ceil(batches / recipe.accumulate))
    return recipe.evaluate_every or max(1, math.ceil(steps / 5))


def nested(train: Manifest) -> bool:
    """Whether each class lies within one group, as the variants of a brand do.

    Only then are two items of one group no negatives of each other: of a photographer's pictures of several classes,
    which a class shares with other photographers, the pair losses would lose what tells the classes apart.
    """
    pairs = train.table.group_by(["label", "group"]).aggregate([]).num_rows
    return bool(pairs == len(train.classes))
