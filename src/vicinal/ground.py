"""What every training of a recipe stands on: the data, divided, without leaks, and the model before any change.

What the user gave wrong is said here, before the first training step.
"""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vicinal.bring import bring, open_model, reads_text
from vicinal.data.check import leaks
from vicinal.data.division import Division, divide
from vicinal.data.manifest import Manifest
from vicinal.data.splits import official
from vicinal.embedding import NothingReadableError, Precision, autocast_dtype, default_cache, embed
from vicinal.evaluation.metrics import topk
from vicinal.forgetting import Probe
from vicinal.losses import (
    CONTRASTIVE_LOSSES,
)
from vicinal.models.encoder import Encoder
from vicinal.progress import Bar
from vicinal.recipe import Recipe
from vicinal.texts import Texts, kinds_of
from vicinal.training.devices import Processes
from vicinal.types import Embeddings, InputError

__all__ = [
    "SAME_PICTURE",
    "Ground",
    "Say",
    "can_select",
    "division_of",
    "embed_shared",
    "environment",
    "has_neighbours",
    "prepare",
    "refuse_same_pictures",
    "seed_everything",
    "write_whole",
]

Say = Callable[[str], None]
MEASURED_CAPTIONS = 20_000  # whose length in tokens is looked at: a second
SAME_PICTURE = 0.998  # cosine; bf16 rounds the embedding of one picture in two batches to above .9999


@dataclass(frozen=True, slots=True)
class Ground:
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


def prepare(
    recipe: Recipe, say: Say, processes: Processes, fits: Callable[[Encoder, Manifest, Division], None]
) -> Ground:
    """Bring, divide, and embed with the model as it is; what the user gave wrong is said here, before any training.

    Args:
        recipe: what to do.
        say: is told each stage.
        processes: that share the images.
        fits: called before the first image is embedded; raises where the recipe's parts and this data do not fit.
    """
    seed_everything(recipe.seed)
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
    # Whatever can be found wrong is said before the first image is embedded; leaks alone are found by embeddings.
    division = division_of(manifest, recipe)
    if contrastive:
        known = division.notes
        division = _captioned(manifest, division)
        for note in division.notes[len(known) :]:
            say(f"captions: {note}")
    original = processes.main_first(lambda: open_model(recipe))
    say(f"model: {original.source}, licence {original.licence or 'unknown: see its model card'}")
    if contrastive:
        original.tokenize(["a caption"])  # or an error that says what is missing
    reads = reads_text(original) and not any(adapter.chosen[0] == "linear_head" for adapter in recipe.adapt)
    if reads and recipe.kinds is not None:
        kinds_of(manifest, recipe.kinds)
    probe = _probe(recipe, original, manifest.where(division.train))
    fits(original, manifest, division)
    untuned = embed_shared(original, manifest, recipe, "baseline", say, processes)
    manifest, skipped = _readable(manifest, untuned)
    division = _without_leaks(manifest, division_of(manifest, recipe), untuned, recipe)
    say(f"split: {division}")
    if contrastive:
        division = _captioned(manifest, division)
        if cut := _cut_captions(original, manifest.where(division.train)):
            say(f"captions: {cut}")
            division = replace(division, notes=(*division.notes, cut))
    if recipe.data.streamed is not None:
        unseen = "what is streamed is not compared with what is measured: pictures that stand in both are not found"
        classes = "which classes are streamed is not known: those that are measured may be new or not"
        division = replace(division, notes=(*division.notes, unseen, classes))
    if probe is not None:
        vectors = embed_shared(original, probe.manifest, recipe, "baseline, probe", say, processes)
        probe = replace(probe, manifest=_readable(probe.manifest, vectors)[0])
        own = manifest.where(division.train), untuned.where(division.train)
        _refuse_trained_on("the probe", probe.manifest, vectors, *own)
    trained = division.train | division.val
    for name, other in elsewhere.items():
        vectors = embed_shared(original, other, recipe, f"baseline, {name}", say, processes)
        elsewhere[name], _ = _readable(other, vectors)
        own = manifest.where(trained), untuned.where(trained)
        _refuse_trained_on(f"elsewhere.{name}", elsewhere[name], vectors, *own)
    return Ground(manifest, skipped, division, original, untuned, reads, probe, elsewhere)


def embed_shared(
    encoder: Encoder, manifest: Manifest, recipe: Recipe, stage: str, say: Say, processes: Processes
) -> Embeddings:
    """Each process embeds its share, and has all of them. What goes wrong in one is raised by all: none waits for it.

    Raises:
        InputError: as `embed`; where unreadable images are skipped, a share of nothing else is left out.
    """
    say(f"{stage}: embedding {len(manifest):,} images")
    own = processes.share(len(manifest))
    rows = np.zeros(len(manifest), bool)
    rows[own] = True
    embedded: Embeddings | InputError
    with Bar(stage, int(rows.sum()), shown=processes.main) as bar:
        try:
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
        except InputError as error:
            embedded = error
    shares = [embedded] if rows.all() else processes.gathered(embedded)
    found = [share for share in shares if isinstance(share, Embeddings)]
    wrong = [share for share in shares if isinstance(share, InputError)]
    grave = [error for error in wrong if not isinstance(error, NothingReadableError)]
    if grave or not found:
        raise (grave or wrong)[0]
    if len(found) == 1:
        return found[0]
    vectors, labels = (torch.cat([getattr(share, name) for share in found]) for name in ("vectors", "labels"))
    return Embeddings(vectors, labels, tuple(name for share in found for name in share.ids), found[0].classes)


def _readable(manifest: Manifest, embeddings: Embeddings) -> tuple[Manifest, list[str]]:
    """The manifest without the rows that could not be embedded, and their ids."""
    got = set(embeddings.ids)
    keep = [name in got for name in manifest.ids()]
    return manifest.where(torch.tensor(keep)), [name for name, ok in zip(manifest.ids(), keep, strict=True) if not ok]


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
            f"{len(same)} pictures of {name} are trained on (first: {same[0].file}, as {same[0].other}); take them out "
            "of one side"
        )


def division_of(manifest: Manifest, recipe: Recipe) -> Division:
    """The split of a recipe, made and checked against what is to be selected on it.

    Raises:
        InputError: it cannot be made, or leaves nothing to select on where the recipe wants to.
    """
    kind, settings = recipe.split.chosen
    division = divide(manifest, kind, **settings.model_dump())
    if recipe.data.streamed is not None:
        division = division.as_one(manifest)
    if not can_select(manifest.where(division.val), recipe):
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


def can_select(val: Manifest, recipe: Recipe) -> bool:
    """Two classes of two images: among those of one class every neighbour is right, a lone image has none.

    Where captions find images, two classes with captions.
    """
    if recipe.monitor.startswith("full/"):
        return len({label for label, told in zip(val.labels().tolist(), val.captions(), strict=True) if told}) >= 2
    return has_neighbours(val)


def has_neighbours(val: Manifest) -> bool:
    """Two classes of two images at least: with fewer nothing can be right or wrong."""
    return int((torch.bincount(val.labels()) > 1).sum()) >= 2 if len(val) else False


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
    told = manifest.captions()
    without = division.train & ~torch.tensor([bool(captions) for captions in told])
    distinct = {caption for i in division.train.nonzero().flatten().tolist() for caption in told[i]}
    if not distinct and division.train.any():
        raise InputError("no image of the training part has a caption; give the column text to its rows")
    if len(distinct) == 1:
        raise InputError(
            f"all images of the training part have one caption, {distinct.pop()!r}: there is nothing to tell apart; "
            "give them captions of their own"
        )
    if not without.any():
        return division
    note = f"{int(without.sum())} images left out of training: they have no caption"
    return replace(division, train=division.train & ~without, notes=(*division.notes, note))


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
    trained, asked = (
        [os.path.normpath(side.root.resolve() / file) for file in side.column("image")] for side in (train, manifest)
    )
    if both := set(trained).intersection(asked):
        raise InputError(
            f"probe: {len(both)} of its pictures are trained on, the first {min(both)}; take others, such as "
            "probe.part=test"
        )
    settings = {"device": recipe.device, "precision": recipe.precision}
    cache = default_cache() if recipe.cache == "auto" else recipe.cache
    return Probe(manifest.compact(), recipe.probe.templates, settings, cache)


def seed_everything(seed: int) -> None:
    """Every generator that a run, or what it calls, draws from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  third-party code draws from numpy's global state
    torch.manual_seed(seed)


def refuse_same_pictures(catalog: Manifest, queries: Manifest, workers: int | None) -> None:
    """A picture that stands on both sides would find itself.

    Raises:
        InputError: there is one.
    """
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


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all, whatever interrupts."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
