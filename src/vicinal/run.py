"""Everything that happens in a run, in the order it happens: bring, divide, baseline, adapt, prove, ship.

A run folder always holds `recipe.yaml` (resolved), `results.json`, `report.html`, `history.jsonl`, `checkpoints/`,
`embeddings/` and `scores/` (what was measured: vectors, and one value a query, so that the page and any average can be
made anew) and `model/` (a folder that `load_encoder` takes).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from vicinal.data.benchmarks import load_benchmark
from vicinal.data.check import leaks
from vicinal.data.division import Division, Part, divide
from vicinal.data.glyphs import load_glyphs
from vicinal.data.loader import train_batches
from vicinal.data.manifest import IMAGE_ENDINGS, Manifest
from vicinal.data.samplers import HardClassSampler, NoDuplicateSampler, PKSampler, ShuffleSampler
from vicinal.data.sources import read_coco, read_folder, read_hub, read_open_images, read_shards, read_table, read_voc
from vicinal.data.splits import official
from vicinal.data.stream import BUFFER, StreamBatches, StreamPlan
from vicinal.data.transforms import MultiCrop, TrainTransform, multi_crop, train_transform
from vicinal.embedding import Precision, autocast_dtype, default_cache, embed, embed_text, pick_device
from vicinal.evaluation.intervals import mean
from vicinal.evaluation.metrics import class_neighbours, nmi, topk
from vicinal.evaluation.overlap import overlap, overlap_change
from vicinal.evaluation.protocols import prototype_scores, retrieval_scores
from vicinal.evaluation.report import Record, report
from vicinal.evaluation.scores import differences, estimates, load_scores, plain, save_scores
from vicinal.evaluation.verification import similarities, verification
from vicinal.forgetting import Lost, Probe, Sweep, sweep
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
from vicinal.models.adapters import (
    VisualPrompt,
    adapt,
    adapters_from_config,
    check_adapted,
    locked_towers,
    merge,
    parameter_counts,
)
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.models.merging import interpolate
from vicinal.models.modules import DINOHead
from vicinal.models.text_tower import TextTower, with_text_tower
from vicinal.models.tokenizers import MissingTokenizer
from vicinal.progress import Bar
from vicinal.recipe import PK, Data, HardClass, NoDuplicate, Recipe, Sampler, Shards, TrainValTest
from vicinal.seeds import own_resume, pooled, promote, seed_rows, trainings
from vicinal.texts import Texts
from vicinal.training.devices import Processes
from vicinal.training.distillation import SelfDistillation
from vicinal.training.image_text import ImageTextObjective
from vicinal.training.locked import LockedTowers, lock
from vicinal.training.loop import FitResult, fit
from vicinal.training.objectives import LabelObjective
from vicinal.training.optim import build_optimizer, clip_each, parameter_groups, warmup_cosine
from vicinal.training.semantic_proxies import ACCUMULATORS, RowAdam, SemanticProxies
from vicinal.types import Batch, Embeddings, InputError, Metrics, PerQuery
from vicinal.watching import Watch, found_both_ways, some_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "Texts",
    "bring",
    "bring_path",
    "bring_pictures",
    "environment",
    "evaluate",
    "load_scores",
    "measure",
    "open_model",
    "open_uri",
    "picture_of",
    "reads_text",
    "remake_report",
    "run",
    "save_scores",
]

Say = Callable[[str], None]
MEASURED_CAPTIONS = 20_000  # whose length in tokens is looked at: a second
SAME_PICTURE = 0.998  # cosine; bf16 rounds the embedding of one picture in two batches to above .9999
Batches = StreamPlan | ShuffleSampler | NoDuplicateSampler | PKSampler | HardClassSampler
PAIRED = 5000  # images of which all pairs are compared at each validation


def run(recipe: Recipe, out: str | Path, *, resume: str | Path | None = None, say: Say = print) -> Path:
    """Adapt a model as the recipe says, and prove what it did: baseline, training, difference, page.

    Started by torchrun or `accelerate launch`, the processes share each batch and the embedding of images; the first
    of them measures and writes.

    With `seeds` above 1, as many trainings, whose seeds count up from `seed`, share one baseline and one page: see
    `vicinal.seeds` for what then lies where.

    Args:
        recipe: what to do; see `Recipe`.
        out: the run folder, made if need be.
        resume: "last", or the path of a checkpoint of this same recipe, to go on from.
        say: is told each stage in one line.

    Returns:
        The run folder.

    Raises:
        InputError: something the user gave is wrong. Found before the first training step, wherever it can be.
    """
    out = Path(out).expanduser()
    started = time.monotonic()
    processes = Processes.joined(pick_device(recipe.device))
    say = say if processes.main else _nothing
    _refuse_other_run(recipe, out, resume)
    processes.wait()  # before anything is written
    out.mkdir(parents=True, exist_ok=True)
    if processes.main:
        _write(out / "recipe.yaml", recipe.to_yaml())
    ground = _prepare(recipe, say, processes)
    manifest, division, needed = ground.manifest, ground.division, ground.division.measured()
    parts = division.parts_within(needed)
    lost = None
    kept = out / "embeddings"
    others = _elsewhere(ground, ground.original, recipe, "baseline", kept / "before", say, processes)
    before = ground.untuned.where(needed)
    if processes.main:
        before_scores = measure(before, parts, recipe, ground.texts(ground.original, recipe)) | others
        before_scores = before_scores if recipe.seeds == 1 else pooled([before_scores])
        save_scores(before_scores, out / "scores" / "before.safetensors")
        _save_embeddings(out, "before", before, parts)
        if ground.probe is not None:
            lost = Lost(ground.probe, ground.original, halved=recipe.wise_ft == "auto")

    folders = trainings(recipe, out)
    trained: dict[Path, dict[str, Any]] = {}
    for folder, own in folders.items():
        if recipe.seeds > 1:
            say(f"seed {own.seed}, {len(trained) + 1} of {recipe.seeds}")
        trained[folder] = _train(ground, own, folder, own_resume(recipe, folder, resume), say, processes)

    measured: list[dict[str, list[PerQuery]]] = []
    clusters: list[dict[str, float]] = []
    for folder in trained:  # the test half, once for each training, after all of them
        tuned = load_encoder(str(folder / "model"))
        after = _embed(tuned, manifest.where(needed), recipe, "after", say, processes) if parts else before
        others = _elsewhere(ground, tuned, recipe, "after", None if measured else kept / "after", say, processes)
        if not processes.main:
            continue
        measured.append(measure(after, parts, recipe, ground.texts(tuned, recipe)) | others)
        clusters.append(_clusters(after, parts, recipe))
        if lost is not None:
            lost.ask(tuned)
        if len(measured) == 1:
            _save_embeddings(out, "after", after, parts)
            promote(folder, out)
        if folder != out:
            save_scores(measured[-1], folder / "scores" / "after.safetensors")
    if not processes.main:
        return out
    after_scores = measured[0] if recipe.seeds == 1 else pooled(measured)
    save_scores(after_scores, out / "scores" / "after.safetensors")

    changes = differences(before_scores, after_scores)
    facts = list(trained.values())
    results = {
        "before": {part: plain(scores) for part, scores in estimates(before_scores).items()},
        "after": {part: plain(scores) for part, scores in estimates(after_scores).items()},
        "difference": {part: plain(scores) for part, scores in changes.items()},
        "environment": environment(pick_device(recipe.device), recipe.precision),
        "data": {
            "images": len(manifest),
            "classes": len(manifest.classes),
            "train_images": int(division.train.sum()),
            "train_classes": int(torch.unique(manifest.labels()[division.train]).numel()),
            "trained_on": list(manifest.where(division.train).compact().classes),
            "val_images": int(division.val.sum()),
            "parts": {name: _part_counts(manifest, part) for name, part in division.parts.items()}
            | {name: _part_counts(other, _whole(other)) for name, other in ground.elsewhere.items()},
            "skipped": ground.skipped,
            "notes": [*manifest.notes, *division.notes],
        },
        "training": facts[0],
        "model": {
            "source": ground.original.source,
            "licence": ground.original.licence,
            "embedding_dim": tuned.embedding_dim,
            "size": list(tuned.preprocess.size),
            "preprocess": asdict(tuned.preprocess),
        },
        "seed": recipe.seed,
        "seconds": round(time.monotonic() - started, 1),
    }
    if ground.elsewhere:
        results["overlap"] = _overlaps(kept, ground.elsewhere)
    if recipe.seeds > 1:
        results["seeds"] = seed_rows([own.seed for own in folders.values()], facts, measured)
    if "nmi" in recipe.also:
        results["nmi"] = {"before": _clusters(before, parts, recipe), "after": clusters}
    if lost is not None:
        results["probe"] = {side: plain(found) for side, found in lost.metrics().items()}
        save_scores(lost.scores(), out / "scores" / "probe.safetensors")
        say(str(lost))
    _write(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    page = remake_report(out, manifests=(manifest, *ground.elsewhere.values()))
    for line in _headlines(estimates(before_scores), estimates(after_scores), changes):
        say(line)
    say(f"report: {page}")
    return out


# ------------------------------------------------------------------------------------------------------- the stages


@dataclass(frozen=True, slots=True)
class _Ground:
    """What every training of a recipe stands on: the data, its division, and the model before any change."""

    manifest: Manifest
    skipped: list[str]
    division: Division
    original: Encoder
    untuned: Embeddings
    reads: bool
    probe: Probe | None
    elsewhere: dict[str, Manifest]

    def texts(self, encoder: Encoder, recipe: Recipe) -> Texts | None:
        """What the measured images are called, if the model still reads text."""
        measured = self.division.measured()
        return Texts.of(encoder, self.manifest.where(measured), recipe) if self.reads and measured.any() else None


def _nothing(words: str) -> None:
    """What a process says that is not the first."""


def _prepare(recipe: Recipe, say: Say, processes: Processes) -> _Ground:
    """Bring, divide, and embed with the model as it is; what the user gave wrong is said here, before any training."""
    _seed(recipe.seed)
    manifest = processes.main_first(lambda: bring(recipe.data))
    say(f"data: {len(manifest):,} images of {len(manifest.classes):,} classes")
    contrastive = recipe.loss.chosen[0] in CONTRASTIVE_LOSSES
    if contrastive and not any(manifest.captions()):
        raise InputError(
            f"loss.{recipe.loss.chosen[0]} learns from captions, and the data has none; it needs a table (data.table) "
            "with a column text, or captions; data.columns: {text: …} says which it is"
        )
    if not manifest.classes and recipe.loss.chosen[0] != "dino":
        raise InputError(
            f"loss.{recipe.loss.chosen[0]} learns from labels, and the data has none; data.columns: {{label: …}} says "
            "which column holds them, loss: {dino: {}} needs none"
        )
    elsewhere = processes.main_first(lambda: {name: bring(data) for name, data in recipe.elsewhere.items()})
    if unlabelled := [name for name, other in elsewhere.items() if not other.classes]:
        raise InputError(f"elsewhere.{unlabelled[0]} has no labels, by which it could be measured")
    _divide(manifest, recipe)  # a split that cannot be made is said before the first image is embedded
    original = processes.main_first(lambda: open_model(recipe))
    say(f"model: {original.source}, licence {original.licence or 'unknown: see its model card'}")
    untuned = _embed(original, manifest, recipe, "baseline", say, processes)
    manifest, skipped = _readable(manifest, untuned)
    division = _without_leaks(manifest, _divide(manifest, recipe), untuned, recipe)
    say(f"split: {division}")
    if contrastive:
        division = _captioned(manifest, division)
        if cut := _cut_captions(original, manifest.where(division.train)):
            say(f"captions: {cut}")
            division = replace(division, notes=(*division.notes, cut))
    reads = reads_text(original) and not any(adapter.chosen[0] == "linear_head" for adapter in recipe.adapt)
    probe = _probe(recipe, original, manifest.where(division.train))
    trained = division.train | division.val
    for name, other in elsewhere.items():
        vectors = _embed(original, other, recipe, f"baseline, {name}", say, processes)
        elsewhere[name], _ = _readable(other, vectors)
        _refuse_trained_on(name, elsewhere[name], vectors, manifest.where(trained), untuned.where(trained))
    return _Ground(manifest, skipped, division, original, untuned, reads, probe, elsewhere)


def _train(
    ground: _Ground, recipe: Recipe, out: Path, resume: str | Path | None, say: Say, processes: Processes
) -> dict[str, Any]:
    """One training, from the untuned model to `out/model`; the measured images take no part in it. Its facts."""
    _seed(recipe.seed)
    device = pick_device(recipe.device)
    watched = ground.division.val & _watched(ground.manifest)
    if watched.any():
        ground = replace(ground, division=replace(ground.division, val=watched))
    manifest, division, original = ground.manifest, ground.division, ground.original
    train = manifest.where(division.train).compact()
    if recipe.captions.trained == "first":
        train = train.with_first_captions()
    if "group" in train.names() and not _nested(train):
        train = replace(train, table=train.table.drop_columns(["group"]))
    encoder = adapt(original, *adapters_from_config(_adapters(recipe)))
    counts = parameter_counts(encoder)
    untuned = ground.untuned.where(division.train)
    sampler = _sampler(train, untuned, recipe)
    if (size := sampler.batch_size) % processes.count:
        raise InputError(f"a batch of {size} cannot be shared evenly by {processes.count} processes: change sampler")
    small = _small_classes(sampler)
    if small:
        less = f"{small['too_small']:,} classes have fewer images than a batch takes of each"
        say(f"sampler: {less}, {small['single']:,} of them one")
    objective = _objective(encoder, original, train, untuned, sampler, recipe, out)
    counts["aside"] = _trained_aside(objective)
    kept = LockedTowers() if recipe.data.streamed is not None else _locked(encoder, train, untuned, recipe, say)
    transform = None if kept.image is not None else _transform(encoder, recipe)
    steps = _steps(recipe, sampler)

    streams: list[StreamBatches] = []

    def batches(start_step: int) -> Iterator[Batch]:
        if isinstance(sampler, StreamPlan):
            assert isinstance(transform, TrainTransform)  # a loss of images and captions has no other
            streams.append(sampler.batches(transform, recipe.workers, start_step, processes.rank, processes.count))
            return streams[-1]
        drawn = train_batches(
            train,
            transform,
            sampler,
            seed=recipe.seed,
            workers=recipe.workers,
            start_step=start_step,
            rank=processes.rank,
            world_size=processes.count,
        )
        return kept.fill(drawn)

    first = Batch() if recipe.data.streamed is not None else next(iter(batches(0)))
    check_adapted(encoder, first["image"][:2] if "image" in first else torch.zeros(2, 3, *encoder.preprocess.size))
    aside = f", {counts['aside']:,} more for the loss alone" if counts["aside"] else ""
    say(f"training: {counts['trained']:,} of {counts['total']:,} parameters{aside}, {steps:,} steps on {device}")
    optimizer = _optimizer(objective, recipe)
    teacher = objective.as_teacher if isinstance(objective, SelfDistillation) else nullcontext
    val = manifest.where(division.val)
    selected = _can_select(val, recipe)
    locked = "image" in locked_towers(encoder)
    watch = _watch(encoder, recipe, ground, val, locked, out) if isinstance(objective, ImageTextObjective) else None

    learnt = manifest.where(division.train & _watched(manifest))

    def validate() -> Metrics:
        with teacher():  # of self-distillation it is the teacher that is used in the end
            seen = _validate(encoder, learnt, recipe) if _has_neighbours(learnt) else {}
            return {**_validate(encoder, val, recipe), **{f"train/{name}": value for name, value in seen.items()}}

    fitted = fit(
        objective.to(device),
        batches,
        optimizer,
        warmup_cosine(
            optimizer,
            steps=steps,
            warmup=min(steps - 1, round(recipe.warmup * steps)),
            final=recipe.final_lr / recipe.lr,
            final_decay=recipe.final_weight_decay,
        ),
        steps=steps,
        evaluate=(watch or validate) if selected else None,
        evaluated=None if watch is None else watch.write,
        evaluate_every=_evaluate_every(recipe, steps, len(sampler)),
        monitor=recipe.monitor,
        out=out,
        precision=recipe.precision,
        clip=recipe.clip,
        accumulate=recipe.accumulate,
        micro_batch=recipe.micro_batch,
        patience=recipe.patience,
        min_delta=recipe.min_delta,
        ema=recipe.ema,
        checkpoint_every=recipe.checkpoint_every,
        keep=recipe.keep,
        resume=resume,
        trackers=tuple(recipe.trackers),
        identity=_identity(recipe),
    )
    if isinstance(objective, ImageTextObjective):
        objective.keep_scale()
    if isinstance(objective, SelfDistillation):
        objective.keep_teacher()
    between: dict[str, Any] = {"wise_ft": {"weight": 1.0, "curve": []}, "towers_not_run": list(kept.names)}
    between |= {"sampler": small} if small else {}
    if processes.main:
        chosen = _interpolated(original, encoder.cpu(), val, recipe, ground.probe, say)
        chosen.encoder.save(out / "model")
        between["wise_ft"] = {"weight": chosen.weight, "curve": chosen.curve}
    processes.wait()
    if streams:
        left_out = dict(pair for several in processes.gathered(streams[-1].skipped) for pair in several)
        between["stream"] = {"left_out": len(left_out), "first": [f"{k}: {v}" for k, v in list(left_out.items())[:5]]}
        if left_out:
            say(f"stream: {len(left_out):,} samples or shards left out (first: {between['stream']['first'][0]})")
    return _training(fitted, counts, selected) | between


def bring(data: Data) -> Manifest:
    """The manifest that a recipe's `data` names."""
    kind, where = data.source
    if isinstance(where, Shards):
        parts = ("train", "val", "test", "train_eval", "val_eval")
        where = {part: shards for part in parts if (shards := getattr(where, part)) is not None}
        if data.streamed is not None:
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
    if path.is_dir() and _holds_voc(path):
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
    files = Manifest.build({"image": [path.absolute().as_posix() for path in here]}, Path.cwd(), name="the pictures")
    files.refuse_missing("the pictures")
    return files


def _holds_voc(folder: Path) -> bool:
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


def measure(
    embeddings: Embeddings, parts: Mapping[str, Part], recipe: Recipe, texts: Texts | None = None
) -> dict[str, list[PerQuery]]:
    """The protocols on each part: leave-one-out retrieval, k-shot prototypes, and with texts names and captions.

    One value a query; nothing is averaged here.
    """
    scores = {}
    for name, part in parts.items():
        queries = embeddings.where(part.queries)
        catalog = embeddings.where(part.catalog) if part.catalog is not None else None
        fallback = embeddings.where(part.fallback) if part.fallback is not None else None
        scores[name] = [
            retrieval_scores(
                queries,
                embeddings.where(part.gallery) if part.gallery is not None else None,
                ks=tuple(recipe.recall_at),
                legacy="map@r_legacy" in recipe.also,
            ),
            prototype_scores(
                queries, catalog, shots=tuple(recipe.shots), draws=recipe.draws, seed=recipe.seed, fallback=fallback
            ),
        ]
        if texts is not None:
            scores[name] += texts.scores(queries, part.queries)
    return scores


def _clusters(embeddings: Embeddings, parts: Mapping[str, Part], recipe: Recipe) -> dict[str, float]:
    """NMI of each part, where the recipe asks for it: one number of all queries, so without an interval."""
    asked = {name: embeddings.where(part.queries) for name, part in parts.items() if "nmi" in recipe.also}
    return {name: nmi(queries.vectors, queries.labels) for name, queries in asked.items()}


def evaluate(
    encoder: Encoder,
    catalog: Manifest,
    queries: Manifest,
    *,
    shots: Sequence[int] = (1, 3, 10),
    ks: Sequence[int] = (1, 5, 10),
    draws: int = 20,
    seed: int = 0,
    cache: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
) -> Metrics:
    """How well a model finds the class of `queries` among `catalog`: retrieval and k-shot prototypes.

    Labels are matched by class name. A query whose class the catalog lacks cannot be right; it is an error.

    Raises:
        InputError: a class of the queries is not in the catalog.
    """
    missing = sorted(set(queries.compact().classes) - set(catalog.compact().classes))
    if missing:
        raise InputError(
            f"{len(missing)} classes of the queries are not in the catalog (first: {', '.join(missing[:5])}); "
            "add a reference image of each, or leave those queries out"
        )
    classes = catalog.compact().classes
    _refuse_same_pictures(catalog, queries, workers)
    gallery, asked = (
        embed(encoder, side.with_classes(classes), cache=cache, device=device, workers=workers)
        for side in (catalog, queries)
    )
    return {
        **mean(retrieval_scores(asked, gallery, ks=tuple(ks))),
        **mean(prototype_scores(asked, gallery, shots=tuple(shots), draws=draws, seed=seed)),
    }


def _refuse_same_pictures(catalog: Manifest, queries: Manifest, workers: int | None) -> None:
    common = Path(os.path.commonpath([catalog.root.resolve(), queries.root.resolve()]))
    sides = [side.rebased(common) for side in (catalog, queries)]
    if any("split" in side.names() for side in sides):  # the word of interest here is which side a row is on
        sides = [replace(side, table=side.table.select([c for c in side.names() if c != "split"])) for side in sides]
    both = Manifest.united({"train": sides[0], "test": sides[1]})
    asked = torch.tensor([word == "test" for word in both.column("split")])
    found = leaks(both, {"catalog": ~asked, "queries": asked}, workers=workers)
    if found:
        raise InputError(
            f"{len(found)} pictures stand in the queries and in the catalog, the first {found[0].file} and "
            f"{found[0].other}, and would find themselves; take them out of one side"
        )


def remake_report(out: str | Path, *, manifests: Sequence[Manifest] | None = None) -> Path:
    """Write a run folder's page from its files; no model and no GPU are needed, pictures come from the images."""
    out = Path(out)
    try:
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
        recipe_text = (out / "recipe.yaml").read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{out} is not a finished run folder: {error.filename} is missing") from error
    history_path = out / "history.jsonl"
    history = [json.loads(line) for line in history_path.read_text().splitlines()] if history_path.exists() else []
    sides = {
        side: {p.stem: Embeddings.load(p) for p in sorted((out / "embeddings" / side).glob("*.safetensors"))}
        for side in ("before", "after")
    }
    record = Record(results=results, history=history, recipe=recipe_text, before=sides["before"], after=sides["after"])
    page = out / "report.html"
    try:
        if manifests is None:
            recipe = Recipe.load(out / "recipe.yaml")
            manifests = [bring(data) for data in (recipe.data, *recipe.elsewhere.values())]
        pictures = picture_of(*manifests)
    except InputError as error:
        logging.getLogger(__name__).warning("the page is made without pictures: %s", error)
        pictures = _no_picture
    _write(page, report(record, pictures))
    return page


def _no_picture(name: str) -> None:
    """No images, no thumbnails; the rest of the page needs none."""


def picture_of(*manifests: Manifest) -> Callable[[str], Image | None]:
    """A callable from a row's id to its picture, or None where it cannot be opened; of equal ids the first's."""
    from PIL import Image

    rows = {name: (manifest, i) for manifest in reversed(manifests) for i, name in enumerate(manifest.ids())}

    def picture(name: str) -> Image.Image | None:
        if name not in rows:
            return None
        try:
            manifest, row = rows[name]
            return Image.fromarray(manifest.image(row, at_least=(96, 96)).permute(1, 2, 0).numpy())
        except InputError:
            return None

    return picture


# ---------------------------------------------------------------------------------------------------------- pieces


def _embed(
    encoder: Encoder, manifest: Manifest, recipe: Recipe, stage: str, say: Say, processes: Processes
) -> Embeddings:
    """Each process embeds its share, and has all of them."""
    say(f"{stage}: embedding {len(manifest):,} images")
    own = processes.share(len(manifest))
    rows = np.zeros(len(manifest), bool)
    rows[own] = True
    with Bar(stage, int(rows.sum()), shown=processes.main) as bar:
        embedded = embed(
            encoder,
            manifest.where(rows),
            batch_size=recipe.embed_batch_size,
            cache=default_cache() if recipe.cache == "auto" else recipe.cache,
            workers=recipe.workers,
            device=recipe.device,
            precision=recipe.precision,
            on_error=recipe.data.on_error,
            progress=bar.to,
        )
    if processes.count == 1 or rows.all():
        return embedded
    shares = processes.gathered(embedded)
    vectors, labels = (torch.cat([getattr(share, name) for share in shares]) for name in ("vectors", "labels"))
    return Embeddings(vectors, labels, tuple(name for share in shares for name in share.ids), embedded.classes)


def reads_text(encoder: Encoder) -> bool:
    """Whether texts and images meet in one space: a text tower, its tokenizer, and no new head on the images."""
    readable = encoder.tokenizer is not None and not isinstance(encoder.tokenizer, MissingTokenizer)
    return readable and encoder.family.encode_text is not None and isinstance(encoder.head, torch.nn.Identity)


def _readable(manifest: Manifest, embeddings: Embeddings) -> tuple[Manifest, list[str]]:
    """The manifest without the rows that could not be embedded, and their ids."""
    got = set(embeddings.ids)
    keep = [name in got for name in manifest.ids()]
    return manifest.where(torch.tensor(keep)), [name for name, ok in zip(manifest.ids(), keep, strict=True) if not ok]


def _whole(manifest: Manifest) -> Part:
    return Part(torch.ones(len(manifest), dtype=torch.bool))


def _elsewhere(
    ground: _Ground,
    encoder: Encoder,
    recipe: Recipe,
    stage: str,
    vectors: Path | None,
    say: Say,
    processes: Processes,
) -> dict[str, list[PerQuery]]:
    """The protocols on data of which nothing was trained on, each set whole; its vectors are kept in a folder."""
    scores: dict[str, list[PerQuery]] = {}
    for name, manifest in ground.elsewhere.items():
        embeddings = _embed(encoder, manifest, recipe, f"{stage}, {name}", say, processes)
        if not processes.main:
            continue
        texts = Texts.of(encoder, manifest, recipe) if ground.reads else None
        scores |= measure(embeddings, {name: _whole(manifest)}, recipe, texts)
        if vectors is not None:
            vectors.mkdir(parents=True, exist_ok=True)
            embeddings.save(vectors / f"{name}.safetensors")
    return scores


def _overlaps(kept: Path, names: Iterable[str]) -> dict[str, dict[str, dict[str, dict[str, float | None]]]]:
    """How much images of one class and of several overlap elsewhere, before, after, and the difference."""
    found: dict[str, dict[str, dict[str, dict[str, float | None]]]] = {"before": {}, "after": {}, "difference": {}}
    for name in names:
        before, after = (Embeddings.load(kept / side / f"{name}.safetensors") for side in ("before", "after"))
        found["before"][name], found["after"][name] = plain(overlap(before)), plain(overlap(after))
        found["difference"][name] = plain(overlap_change(before, after))
    return found


def _refuse_trained_on(name: str, other: Manifest, vectors: Embeddings, trained: Manifest, known: Embeddings) -> None:
    """A picture that is measured elsewhere must not be trained on: those with an equal vector are opened, compared."""
    near, rows = topk(vectors.vectors, known.vectors, 1)
    alike = near[:, 0] > SAME_PICTURE
    if not alike.any():
        return
    asked = torch.zeros(len(trained), dtype=torch.bool)
    asked[rows[alike, 0]] = True
    sides = [side.table.select([c for c in ("image", "box") if c in side.names()]) for side in (trained, other)]
    both = Manifest.together(
        [
            replace(side, table=table, padding=0.0).where(mask)
            for side, table, mask in zip((trained, other), sides, (asked, alike), strict=True)
        ]
    )
    first = torch.arange(len(both)) < int(asked.sum())
    if same := leaks(both, {"train": first, "test": ~first}):
        raise InputError(
            f"{len(same)} pictures of elsewhere.{name} are trained on (first: {same[0].file}, as {same[0].other}); "
            "take them out of one side"
        )


def _steps(recipe: Recipe, sampler: Batches) -> int:
    return recipe.steps or max(1, math.ceil((recipe.epochs or 12) * len(sampler) / recipe.accumulate))


def _transform(encoder: Encoder, recipe: Recipe) -> TrainTransform | MultiCrop:
    name, settings = recipe.loss.chosen
    if name != "dino":
        return train_transform(encoder.preprocess, recipe.augment)
    crops = settings.model_dump(include={"large_scale", "small_scale", "small_crops"})
    size = None if settings.small_size is None else (settings.small_size, settings.small_size)
    return multi_crop(encoder.preprocess, recipe.augment, small_size=size, **crops)


def _divide(manifest: Manifest, recipe: Recipe) -> Division:
    kind, settings = recipe.split.chosen
    division = divide(manifest, kind, **settings.model_dump())
    if not _can_select(manifest.where(division.val), recipe):
        if recipe.wise_ft == "auto":
            raise InputError(
                "wise_ft: auto chooses on validation images, and this split keeps no two classes of two images for it; "
                f"raise split.{kind}.val, or give wise_ft a number"
            )
        unused = [key for key in ("patience", "evaluate_every") if getattr(recipe, key) is not None]
        if unused:
            raise InputError(
                f"{' and '.join(unused)}: there is nothing to evaluate on while training: the validation part of this "
                f"split has no two classes of two images. Raise split.{kind}.val, or leave {' and '.join(unused)} out"
            )
        why = "everything is trained on" if kind == "all" else "the validation part has no two classes of two images"
        note = f"nothing is selected on: {why}; the last step is kept"
        division = replace(division, notes=(*division.notes, note))
    elif recipe.wise_ft == "auto" and not division.selects_on_new_classes(manifest):
        raise InputError(
            "wise_ft: auto chooses on classes that were not trained on; under this split the validation classes were: "
            "use split.class_disjoint, or give wise_ft a number"
        )
    return division


def _can_select(val: Manifest, recipe: Recipe) -> bool:
    """Two classes of two images: among those of one class every neighbour is right, a lone image has none.

    Where captions find images, two classes with captions.
    """
    if recipe.monitor.startswith("full/"):
        return len({label for label, told in zip(val.labels().tolist(), val.captions(), strict=True) if told}) >= 2
    return _has_neighbours(val)


def _has_neighbours(val: Manifest) -> bool:
    return int((torch.bincount(val.labels()) > 1).sum()) >= 2 if len(val) else False


def _refuse_other_run(recipe: Recipe, out: Path, resume: str | Path | None) -> None:
    """Before anything in the folder is written over."""
    found = {path.parent.parent for path in (*out.glob("checkpoints/*"), *out.glob("seed*/checkpoints/*"))}
    if resume is None and found:
        raise InputError(
            f"{out} holds the checkpoints of an earlier run; go on with resume=last (--resume last), choose another "
            "out, or delete it"
        )
    kept = out / "recipe.yaml"
    if resume is not None and kept.exists() and _identity(Recipe.load(kept)) != _identity(recipe):
        raise InputError(f"{out} holds a run of another recipe, which this one cannot resume; choose another out")
    if (out in found) != (recipe.seeds == 1) and found:
        raise InputError(f"{out} holds {'one seed' if out in found else 'several seeds'}; choose another out")


def _cut_captions(encoder: Encoder, train: Manifest) -> str:
    """How many captions are longer than what the model reads; nothing where none is. Of very many, the first count."""
    told = list(dict.fromkeys(caption for captions in train.captions() for caption in captions))
    some = told[:MEASURED_CAPTIONS]
    longer = sum(length > (encoder.context_length or 0) for length in encoder.token_lengths(some))
    if not longer:
        return ""
    among = f"{len(some):,}" + ("" if len(some) == len(told) else f" looked at, of {len(told):,},")
    return f"{longer:,} of {among} distinct captions are cut: longer than the {encoder.context_length} tokens read"


def _captioned(manifest: Manifest, division: Division) -> Division:
    """A loss of images and texts is trained on the rows that have a caption; what is measured stays as it is."""
    without = division.train & ~torch.tensor([bool(captions) for captions in manifest.captions()])
    if not without.any():
        return division
    if torch.equal(without, division.train):
        raise InputError("no image of the training part has a caption; give the column text to its rows")
    note = f"{int(without.sum())} images left out of training: they have no caption"
    return replace(division, train=division.train & ~without, notes=(*division.notes, note))


def _nested(train: Manifest) -> bool:
    """Whether each class lies within one group, as the variants of a brand do.

    Only then are two items of one group no negatives of each other: of a photographer's pictures of several classes,
    which a class shares with other photographers, the pair losses would lose what tells the classes apart.
    """
    pairs = train.table.group_by(["label", "group"]).aggregate([]).num_rows
    return bool(pairs == len(train.classes))


def _without_leaks(manifest: Manifest, division: Division, untuned: Embeddings, recipe: Recipe) -> Division:
    """The same picture must not be a query and be trained on, selected on, or drawn as a shot, under whatever name.

    The queries stay as they are: with `data.leaks: drop` the other copy goes. Equal pixels have equal embeddings up to
    rounding, so only pictures that have such a neighbour are opened again and compared.
    """
    if not division.parts:
        return division
    itself = torch.arange(len(untuned))
    alike = topk(untuned.vectors, untuned.vectors, 1, exclude=itself)[0][:, 0] > SAME_PICTURE
    tested = division.queries()
    support = division.measured() & ~tested & ~division.train & ~division.val
    sides = {"test": tested, "val": division.val, "catalog": support, "train": division.train}
    sides = {name: mask & alike for name, mask in sides.items()}
    ids = np.array(manifest.column("image"))
    gone = torch.zeros_like(tested)
    while found := [
        leak
        for leak in leaks(manifest, {name: mask & ~gone for name, mask in sides.items()}, workers=recipe.workers)
        if "catalog" not in (leak.part, leak.other_part) or "test" in (leak.part, leak.other_part)
    ]:
        if recipe.data.leaks == "raise":
            pairs = "; ".join(f"{a.file} ({a.part}) and {a.other} ({a.other_part})" for a in found[:3])
            raise InputError(
                f"{len(found)} pictures stand on two sides of the split: {pairs}. `vicinal check` lists all "
                "that are in the data twice; remove one of each, or train without them by data.leaks=drop"
            )
        for leak in found:
            files = {leak.part: leak.file, leak.other_part: leak.other}
            part = next(name for name in ("train", "catalog", "val") if name in files)
            gone |= torch.from_numpy(ids == files[part]) & sides[part]
    if not gone.any():
        return division
    note = (
        f"{int(gone.sum())} images left out of training, selection, shots, galleries: the same pixels are asked about"
    )
    return division.without(gone, note)


def _adapters(recipe: Recipe) -> list[dict[str, Any]]:
    return [{name: settings.model_dump()} for name, settings in (adapter.chosen for adapter in recipe.adapt)]


def _objective(
    encoder: Encoder,
    original: Encoder,
    train: Manifest,
    untuned: Embeddings,
    sampler: Batches,
    recipe: Recipe,
    out: Path,
) -> LabelObjective | ImageTextObjective | SemanticProxies | SelfDistillation:
    name, settings = recipe.loss.chosen
    if name == "dino":
        return _distillation(encoder, _steps(recipe, sampler), recipe)
    if name == "semantic_proxies":
        kind, of_it = settings.accumulator.chosen
        given = of_it.model_dump() | ({"dim": encoder.embedding_dim} if kind == "gru" else {})
        objective = SemanticProxies(
            encoder,
            len(train.classes),
            VisualPrompt(**settings.prompts.model_dump()),
            ACCUMULATORS[kind](**given),
            folder=out / "class_prompts" if settings.on_disk else None,
            **settings.model_dump(include={"share", "margin", "alpha", "max_bytes"}),
        )
        if recipe.class_means:
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
    if recipe.class_means:
        start_from_class_means(proxies, _through_head(encoder, train, untuned, recipe), train.labels())
    return LabelObjective(encoder, proxies, **anchor)


def _through_head(encoder: Encoder, train: Manifest, untuned: Embeddings, recipe: Recipe) -> Tensor:
    """The training images as the encoder sees them before its first step: a new head has changed what is known."""
    if isinstance(encoder.head, torch.nn.Identity):
        return untuned.vectors
    return embed(encoder, train, device=recipe.device, precision=recipe.precision).vectors


def _trained_aside(objective: torch.nn.Module) -> int:
    """How many numbers are trained that are no part of the encoder, and serve nothing afterwards."""
    own = [p for name, p in objective.named_parameters() if p.requires_grad and not name.startswith("encoder.")]
    prompts = objective.table.table.shape[0] * objective.table.numbers if isinstance(objective, SemanticProxies) else 0
    return sum(p.numel() for p in own) + prompts


def _distillation(encoder: Encoder, steps: int, recipe: Recipe) -> SelfDistillation:
    dino = recipe.loss.chosen[1]
    small = cast(MultiCrop, _transform(encoder, recipe)).small
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
    untuned: Embeddings,
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
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.seed))[:4096]
    told = train.captions()
    captions = [told[i][0] for i in some.tolist()]
    texts = embed_text(original, captions, device=recipe.device, precision=recipe.precision)
    scale, bias = fit_scale_and_bias(untuned.vectors[some], texts, ids=train.labels()[some], batch=sampler.batch_size)
    return SigLIP(scale=scale, bias=bias, **settings)


def _locked(encoder: Encoder, train: Manifest, untuned: Embeddings, recipe: Recipe, say: Say) -> LockedTowers:
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


def _sampler(train: Manifest, untuned: Embeddings, recipe: Recipe) -> Batches:
    if (streamed := recipe.data.streamed) is not None and isinstance(recipe.data.shards, Shards):
        size = recipe.sampler.shuffle.batch_size if recipe.sampler.shuffle else 64
        buffer = BUFFER if recipe.data.shards.shuffle is True else int(recipe.data.shards.shuffle)
        plan = StreamPlan(streamed, size, recipe.seed, buffer, recipe.data.columns.get("label"))
        if plan.items is None and recipe.steps is None:
            raise InputError(
                "how many samples the shards of data.shards.train have stands nowhere (no shards.json beside them), so "
                "an epoch has no length: give steps"
            )
        return plan
    match recipe.sampler:
        case Sampler(pk=PK() as pk):
            return PKSampler(train.labels(), **pk.model_dump(), seed=recipe.seed)
        case Sampler(hard_class=HardClass(neighbours=k) as hard):
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


def _small_classes(sampler: Batches) -> dict[str, int]:
    """Classes whose images repeat within a batch; nothing where there are none, or batches are not made by class."""
    if not isinstance(sampler, PKSampler | HardClassSampler) or not sampler.repeated:
        return {}
    return {"too_small": sampler.repeated, "single": sampler.singles}


def _watched(manifest: Manifest) -> Bool[Tensor, "N"]:
    """The rows that are to be looked at while training, where the data says which; else none."""
    named = manifest.column("watched") if "watched" in manifest.names() else [False] * len(manifest)
    return torch.tensor(named, dtype=torch.bool)


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


def _optimizer(
    objective: LabelObjective | ImageTextObjective | SemanticProxies | SelfDistillation, recipe: Recipe
) -> torch.optim.Optimizer:
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


def _evaluate_every(recipe: Recipe, steps: int, batches: int) -> int:
    if recipe.evaluate_every == "epoch":
        return max(1, math.ceil(batches / recipe.accumulate))
    return recipe.evaluate_every or max(1, math.ceil(steps / 5))


def _watch(encoder: Encoder, recipe: Recipe, ground: _Ground, val: Manifest, locked: bool, out: Path) -> Watch:
    """Validation and as many of the training's images, or those that the data names.

    Of a locked image tower their vectors are known.
    """
    division = ground.division
    rows = division.train & _watched(ground.manifest)
    if not rows.any():
        rows = division.train.clone()
        rows[division.train] = some_of(ground.manifest.where(division.train), len(val))
    some, untuned = ground.manifest.where(rows), ground.untuned

    def train() -> Metrics:
        images = untuned.where(rows) if locked else _quickly(encoder, some, recipe)
        return found_both_ways(encoder, some, recipe, images)

    def validation() -> Metrics:
        return _validate(encoder, val, recipe, untuned.where(division.val) if locked else None)

    return Watch(recipe, {"validation": (val, validation), "train": (some, train)}, out)


def _quickly(encoder: Encoder, manifest: Manifest, recipe: Recipe) -> Embeddings:
    """Vectors of an encoder as it is in the middle of a training: not worth keeping."""
    return embed(
        encoder, manifest, workers=recipe.workers, device=recipe.device, precision=recipe.precision, batch_size=128
    )


def _validate(encoder: Encoder, val: Manifest, recipe: Recipe, images: Embeddings | None = None) -> Metrics:
    """Retrieval, and how alike right and wrong pairs are: means, gap, best F1, equal error rate; and by captions."""
    embeddings = _quickly(encoder, val, recipe) if images is None else images
    texts: Metrics = {}
    if recipe.loss.chosen[0] in CONTRASTIVE_LOSSES:
        texts = found_both_ways(encoder, val, recipe, embeddings) if any(val.captions()) else {}
        if not _has_neighbours(val):
            return texts
    metrics = {**texts, **mean(retrieval_scores(embeddings, ks=tuple(recipe.recall_at)))}
    found = similarities(_some_classes(embeddings, PAIRED))
    return metrics | dict(verification(found, thresholds=(), rates=(), resamples=200))


def _some_classes(embeddings: Embeddings, most: int) -> Embeddings:
    """Whole classes, always the same, of about `most` images together: pairs grow with the square."""
    if len(embeddings) <= most:
        return embeddings
    sizes = torch.bincount(embeddings.labels, minlength=len(embeddings.classes))
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0))
    order = order[sizes[order] > 1]  # an image alone has no right pair
    reached = sizes[order].cumsum(0)
    chosen = order[: max(2, int((reached <= most).sum()))]
    return embeddings.where(torch.isin(embeddings.labels, chosen))


def _interpolated(
    original: Encoder, tuned: Encoder, val: Manifest, recipe: Recipe, probe: Probe | None, say: Say
) -> Sweep:
    """WiSE-FT: theta = (1 - w) original + w tuned; "auto" takes the w that is best on validation, and on the probe."""
    if recipe.wise_ft is None:
        return Sweep(merge(tuned), 1.0, [])
    if recipe.wise_ft != "auto":
        return Sweep(interpolate(original, tuned, recipe.wise_ft), recipe.wise_ft, [])
    rows = None if probe is None else probe.halves()[0]
    found = sweep(original, tuned, lambda e: _validate(e, val, recipe), monitor=recipe.monitor, probe=probe, rows=rows)
    say(f"interpolation: weight {found.weight} is best on validation{' and the probe' if probe else ''}")
    return found


def _probe(recipe: Recipe, encoder: Encoder, train: Manifest) -> Probe | None:
    """The recipe's probe, none of whose pictures is trained on."""
    if recipe.probe is None:
        return None
    if not reads_text(encoder):
        raise InputError(
            f"probe: {encoder.source} reads no texts, so nothing can be recognised by name; leave probe out"
        )
    manifest = bring(recipe.probe.data)
    if (part := recipe.probe.part) is not None:
        parts = official(manifest.column("split")) if "split" in manifest.names() else {}
        if part not in parts:
            raise InputError(f"probe.part is {part}, and the probe's data has {', '.join(parts) or 'no column split'}")
        manifest = manifest.where(parts[part])
    trained = {train.path(i).resolve() for i in range(len(train))}
    both = [i for i in range(len(manifest)) if manifest.path(i).resolve() in trained]
    if both:
        raise InputError(
            f"probe: {len(both)} of its pictures are trained on, the first {manifest.path(both[0])}; take others, such "
            "as probe.part=test"
        )
    settings = {"device": recipe.device, "precision": recipe.precision}
    cache = default_cache() if recipe.cache == "auto" else recipe.cache
    return Probe(manifest.compact(), recipe.probe.templates, settings, cache)


def _headlines(
    before: Mapping[str, Metrics], after: Mapping[str, Metrics], difference: Mapping[str, Metrics]
) -> Iterator[str]:
    """One line a part and main metric, for those that are defined."""
    for part, metrics in difference.items():
        for name, d in metrics.items():
            if (name == "map@r" or name.startswith("accuracy@")) and not math.isnan(d.value):
                yield (
                    f"{part} classes, {name}: {before[part][name].value:.3f} -> {after[part][name].value:.3f}, "
                    f"difference {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}], {d.n} classes"
                )


def _part_counts(manifest: Manifest, part: Part) -> dict[str, int]:
    labels = manifest.labels()
    return {
        "queries": int(part.queries.sum()),
        "classes": int(torch.unique(labels[part.queries]).numel()),
        "catalog": int(part.catalog.sum()) if part.catalog is not None else 0,
    }


def _training(fitted: FitResult, counts: Mapping[str, int], selected: bool) -> dict[str, Any]:
    rates = [row["images_per_second"] for row in fitted.history if "images_per_second" in row]
    return {
        "steps": fitted.steps,
        "best_step": fitted.best_step,
        "best_value": fitted.best_value,
        "selected_on": "validation" if selected else "nothing: the last step",
        "stopped_early": fitted.stopped_early,
        "seconds": round(fitted.seconds, 1),
        "images_per_second": round(float(np.median(rates)), 1) if rates else None,
        "trained_parameters": counts["trained"],
        "trained_aside": counts["aside"],
        "inference_parameters": counts["inference"],
        "added_parameters": counts["added"],
        "total_parameters": counts["total"],
    }


def _save_embeddings(out: Path, side: str, embeddings: Embeddings, parts: Mapping[str, Part]) -> None:
    folder = out / "embeddings" / side
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        embeddings.where(part.queries).save(folder / f"{name}.safetensors")


def environment(device: torch.device, precision: Precision) -> dict[str, Any]:
    """What the numbers were made with: versions, hardware, arithmetic, date."""
    names = ("vicinal", "torch", "torchvision", "timm", "open_clip_torch", "transformers", "peft")
    dtype = autocast_dtype(precision, device)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "precision": str(dtype or torch.float32).removeprefix("torch."),
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": {name: version(name) for name in names},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _identity(recipe: Recipe) -> str:
    """What a resumed run must share: all of the recipe but where and how fast it is computed."""
    free = {
        "seeds",
        "device",
        "workers",
        "cache",
        "checkpoint_every",
        "keep",
        "trackers",
        "cache_dir",
        "embed_batch_size",
    }
    content = json.dumps(recipe.model_dump(mode="json", exclude=free), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  third-party code draws from numpy's global state
    torch.manual_seed(seed)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
