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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from vicinal.assembly import (
    adapters_of,
    evaluate_every,
    locked_of,
    objective_of,
    optimizer_of,
    rehearse,
    sampler_of,
    small_classes,
    steps_of,
    trained_aside,
    trained_rows,
    transform_of,
)
from vicinal.bring import bring
from vicinal.data.division import Division, Part
from vicinal.data.loader import train_batches
from vicinal.data.manifest import Manifest
from vicinal.data.stream import StreamBatches, StreamPlan
from vicinal.data.transforms import TrainTransform
from vicinal.embedding import embed, pick_device
from vicinal.evaluation.intervals import mean
from vicinal.evaluation.metrics import nmi
from vicinal.evaluation.overlap import overlap, overlap_change
from vicinal.evaluation.protocols import prototype_scores, retrieval_scores
from vicinal.evaluation.report import Record, report
from vicinal.evaluation.scores import differences, estimates, plain, save_scores
from vicinal.evaluation.verification import similarities, verification
from vicinal.forgetting import Lost, Probe, Sweep, sweep
from vicinal.ground import (
    Ground,
    Say,
    can_select,
    embed_shared,
    environment,
    has_neighbours,
    prepare,
    refuse_same_pictures,
    seed_everything,
    write_whole,
)
from vicinal.losses import (
    CONTRASTIVE_LOSSES,
)
from vicinal.models.adapters import (
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
from vicinal.recipe import Recipe
from vicinal.seeds import own_resume, pooled, promote, seed_rows, trainings
from vicinal.texts import Texts
from vicinal.training.devices import Processes
from vicinal.training.distillation import SelfDistillation
from vicinal.training.image_text import ImageTextObjective
from vicinal.training.locked import LockedTowers
from vicinal.training.loop import FitResult, fit
from vicinal.training.optim import warmup_cosine
from vicinal.training.semantic_proxies import RowAdam
from vicinal.types import Batch, Embeddings, InputError, Metrics, PerQuery
from vicinal.watching import Watch, found_both_ways, some_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["evaluate", "measure", "picture_of", "remake_report", "run"]

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
        write_whole(out / "recipe.yaml", recipe.to_yaml())
    folders = trainings(recipe, out)

    def fits(original: Encoder, manifest: Manifest, division: Division) -> None:
        train = trained_rows(manifest, division, recipe)
        for line in rehearse(original, train, recipe, list(folders), processes.count):
            say(line)

    ground = prepare(recipe, say, processes, fits)
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

    trained: dict[Path, dict[str, Any]] = {}
    for folder, own in folders.items():
        if recipe.seeds > 1:
            say(f"seed {own.seed}, {len(trained) + 1} of {recipe.seeds}")
        trained[folder] = _train(ground, own, folder, own_resume(recipe, folder, resume), say, processes)

    measured: list[dict[str, list[PerQuery]]] = []
    clusters: list[dict[str, float]] = []
    for folder in trained:  # the test half, once for each training, after all of them
        tuned = load_encoder(str(folder / "model"))
        after = embed_shared(tuned, manifest.where(needed), recipe, "after", say, processes) if parts else before
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
            **_trained_on(recipe, manifest.where(division.train), facts[0]),
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
    write_whole(out / "results.json", json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    page = remake_report(out, manifests=(manifest, *ground.elsewhere.values()))
    for line in _headlines(estimates(before_scores), estimates(after_scores), changes):
        say(line)
    say(f"report: {page}")
    return out


# ------------------------------------------------------------------------------------------------------- the stages


def _nothing(words: str) -> None:
    """What a process says that is not the first."""


def _train(
    ground: Ground, recipe: Recipe, out: Path, resume: str | Path | None, say: Say, processes: Processes
) -> dict[str, Any]:
    """One training, from the untuned model to `out/model`; the measured images take no part in it. Its facts."""
    seed_everything(recipe.seed)
    device = pick_device(recipe.device)
    watched = ground.division.val & _watched(ground.manifest)
    if watched.any():
        ground = replace(ground, division=replace(ground.division, val=watched))
    manifest, division, original = ground.manifest, ground.division, ground.original
    train = trained_rows(manifest, division, recipe)
    encoder = adapt(original, *adapters_from_config(adapters_of(recipe)))
    counts = parameter_counts(encoder)
    untuned = ground.untuned.where(division.train)
    sampler = sampler_of(train, untuned, recipe)
    if (size := sampler.batch_size) % processes.count:
        raise InputError(f"a batch of {size} cannot be shared evenly by {processes.count} processes: change sampler")
    small = small_classes(sampler)
    if small:
        less = f"{small['too_small']:,} classes have fewer images than a batch takes of each"
        say(f"sampler: {less}, {small['single']:,} of them one")
    objective = objective_of(encoder, original, train, untuned, sampler, recipe, out)
    if isinstance(objective, ImageTextObjective):
        say(f"loss: starts from {objective.criterion}")
    counts["aside"] = trained_aside(objective)
    kept = LockedTowers() if recipe.data.streamed is not None else locked_of(encoder, train, untuned, recipe, say)
    transform = None if kept.image is not None else transform_of(encoder, recipe)
    steps = steps_of(recipe, sampler)

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
    optimizer = optimizer_of(objective, recipe)
    teacher = objective.as_teacher if isinstance(objective, SelfDistillation) else nullcontext
    val = manifest.where(division.val)
    selected = can_select(val, recipe)
    locked = "image" in locked_towers(encoder)
    watch = _watch(encoder, recipe, ground, val, locked, out) if isinstance(objective, ImageTextObjective) else None

    learnt = manifest.where(division.train & _watched(manifest))

    def validate() -> Metrics:
        with teacher():  # of self-distillation it is the teacher that is used in the end
            seen = _validate(encoder, learnt, recipe) if has_neighbours(learnt) else {}
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
        evaluate_every=evaluate_every(recipe, steps, len(sampler)),
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
    if isinstance(optimizer, RowAdam):
        optimizer.leave()
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
    if isinstance(sampler, StreamPlan):
        between["streamed_items"] = sampler.items
    if streams:
        left_out = dict(pair for several in processes.gathered(streams[-1].skipped) for pair in several)
        between["stream"] = {"left_out": len(left_out), "first": [f"{k}: {v}" for k, v in list(left_out.items())[:5]]}
        if left_out:
            say(f"stream: {len(left_out):,} samples or shards left out (first: {between['stream']['first'][0]})")
    return _training(fitted, counts, selected) | between


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
    refuse_same_pictures(catalog, queries, workers)
    gallery, asked = (
        embed(encoder, side.with_classes(classes), cache=cache, device=device, workers=workers)
        for side in (catalog, queries)
    )
    return {
        **mean(retrieval_scores(asked, gallery, ks=tuple(ks))),
        **mean(prototype_scores(asked, gallery, shots=tuple(shots), draws=draws, seed=seed)),
    }


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
    write_whole(page, report(record, pictures))
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


def _whole(manifest: Manifest) -> Part:
    return Part(torch.ones(len(manifest), dtype=torch.bool))


def _elsewhere(
    ground: Ground,
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
        embeddings = embed_shared(encoder, manifest, recipe, f"{stage}, {name}", say, processes)
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


def _refuse_other_run(recipe: Recipe, out: Path, resume: str | Path | None) -> None:
    """Before anything in the folder is written over."""
    own_resume(recipe, out, resume)
    if resume is not None and str(resume) != "last" and not (Path(resume) / "state.pt").is_file():
        raise InputError(f"resume: {resume} is no checkpoint; name a folder such as {out}/checkpoints/step-00000500")
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


def _watched(manifest: Manifest) -> Bool[Tensor, N]:
    """The rows that are to be looked at while training, where the data says which; else none."""
    named = manifest.column("watched") if "watched" in manifest.names() else [False] * len(manifest)
    return torch.tensor(named, dtype=torch.bool)


def _watch(encoder: Encoder, recipe: Recipe, ground: Ground, val: Manifest, locked: bool, out: Path) -> Watch:
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
        if not has_neighbours(val):
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


def _trained_on(recipe: Recipe, train: Manifest, facts: Mapping[str, Any]) -> dict[str, int | None]:
    """How many images and classes; of a stream, of which a few shards are looked at, what is recorded of it."""
    if recipe.data.streamed is not None:
        return {"train_images": facts["streamed_items"], "train_classes": None}
    return {"train_images": len(train), "train_classes": len(train.compact().classes)}


def _training(fitted: FitResult, counts: Mapping[str, int], selected: bool) -> dict[str, Any]:
    rates = [row["images_per_second"] for row in fitted.history if "images_per_second" in row]
    return {
        "steps": fitted.steps,
        "best_step": fitted.best_step,
        "best_value": None if math.isnan(fitted.best_value) else fitted.best_value,  # NaN is no JSON
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
