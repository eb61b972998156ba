"""Manifest -> batches, in worker processes, the same whatever their number.

Batch t of training is a pure function of (seed, t): t = epoch L + position, the sampler says which rows that is, and
the augmentation of a row is drawn from a generator seeded by (seed, epoch, row, n), n being how often the row has come
before in this epoch. So training restarts at any step exactly, without making the batches before it, and neither the
number of workers nor the random numbers drawn elsewhere (dropout) change what is seen.

Letters: N rows, B batch, L batches an epoch, t step.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vicinal.data.images import decode
from vicinal.data.manifest import Manifest
from vicinal.data.samplers import Sampler, occurrence
from vicinal.data.transforms import EvalTransform, MultiCrop, TrainTransform
from vicinal.types import Batch, InputError

__all__ = ["EvalBatches", "TrainBatches", "default_workers", "eval_batches", "mixed", "one_of", "train_batches"]

# One view, "3 h w", which comes as `image`; or several by the names they have in a batch, `image` among them.
Transform = Callable[[UInt8[Tensor, "3 H W"]], Tensor | dict[str, Tensor]]

_MOST_WORKERS: Final = 8
_MASK: Final = (1 << 64) - 1


def default_workers() -> int:
    """One process that decodes for each core but the one that feeds the model; at most 8, at least 1.

    >>> 1 <= default_workers() <= 8
    True
    """
    # Not there on macOS and Windows; where it is, it knows which cores this process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(max(cores - 1, 1), _MOST_WORKERS)


class _Item(NamedTuple):
    row: int
    seed: int | None  # None: the transform draws nothing


class _Made(NamedTuple):
    images: dict[str, Tensor] | None
    rows: list[int]
    seeds: list[int | None]
    skipped: list[tuple[int, str]]
    error: str | None


class _Maker(Dataset[_Made]):
    """Rows to a batch of images: what runs in the workers. Errors of the input come back as words, not as traces."""

    def __init__(
        self,
        manifest: Manifest,
        transform: Transform | None,
        on_error: Literal["raise", "skip"],
        spares: _Spares | None,
    ) -> None:
        self.manifest = manifest
        self.transform = transform
        self.on_error = on_error
        self.spares = spares
        self.boxes = manifest.column("box") if "box" in manifest.names() else None

    def view(self, row: int, seed: int | None) -> Tensor | dict[str, Tensor]:
        """One image through the transform, drawn from `seed`."""
        assert self.transform is not None
        if isinstance(self.transform, EvalTransform | TrainTransform | MultiCrop):
            path, box = self.manifest.path(row), self.boxes[row] if self.boxes else None
            cutout = decode(path, box=box, padding=self.manifest.padding, at_least=self.transform.at_least)
            if seed is not None:
                torch.default_generator.manual_seed(seed)
            return self.transform.view(cutout)
        image = self.manifest.image(row)  # a function of the user's own gets every pixel
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        return self.transform(image)

    def __getitem__(self, items: Sequence[_Item]) -> _Made:
        images: dict[str, Tensor] = {}
        rows: list[int] = []
        seeds: list[int | None] = []
        skipped: list[tuple[int, str]] = []
        if self.transform is None:
            return _Made(None, [item.row for item in items], [item.seed for item in items], [], None)
        with torch.random.fork_rng(devices=[]):
            for item in items:
                candidates = [item.row] if self.spares is None else self.spares.after(item.row)
                for row in candidates:
                    try:
                        view = self.view(row, item.seed)
                    except InputError as error:
                        if self.on_error == "raise":
                            return _Made(None, [], [], [], str(error))
                        skipped.append((row, str(error)))
                        continue
                    named = view if isinstance(view, dict) else {"image": view}
                    if not rows:
                        images = {name: _room(len(items), one) for name, one in named.items()}
                    for name, one in named.items():
                        images[name][len(rows)] = one
                    rows.append(row)
                    seeds.append(item.seed)
                    break
        made = {name: stack[: len(rows)] for name, stack in images.items()}
        return _Made(made if rows else None, rows, seeds, skipped, None)


def _room(size: int, view: Float[Tensor, "*v"]) -> Float[Tensor, "B *v"]:
    """Memory for so many views; of one image each channels-last, see transforms.py."""
    form = torch.channels_last if view.dim() == 3 else torch.contiguous_format
    return torch.empty((size, *view.shape), dtype=view.dtype, memory_format=form)


class _Spares:
    """For a row that cannot be read: the others of its class, in a fixed order, so that a replacement is no chance."""

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels
        self.order = labels.argsort(kind="stable")
        self.place = np.empty_like(self.order)
        self.place[self.order] = np.arange(len(labels))
        self.first = np.searchsorted(labels[self.order], labels, side="left")
        self.end = np.searchsorted(labels[self.order], labels, side="right")

    def after(self, row: int) -> Iterator[int]:
        first, size, place = int(self.first[row]), int(self.end[row] - self.first[row]), int(self.place[row])
        for step in range(size):
            yield int(self.order[first + (place - first + step) % size])


class _Columns:
    """What of the table goes into a batch besides the images."""

    def __init__(self, manifest: Manifest) -> None:
        self.labels = manifest.labels()
        names = manifest.names()
        self.captions = manifest.captions() if {"text", "captions"} & set(names) else None
        self.groups: Tensor | None = None
        if "group" in names:
            numbers: dict[object, int] = {}
            # A row of no group is a group of its own: else all of them would count as one.
            groups = [("row", row) if group is None else group for row, group in enumerate(manifest.column("group"))]
            self.groups = torch.tensor([numbers.setdefault(group, len(numbers)) for group in groups], dtype=torch.int64)

    def batch(self, made: _Made, images: dict[str, Tensor] | None) -> Batch:
        rows = made.rows
        index = torch.tensor(rows, dtype=torch.int64)
        batch = cast(Batch, {**(images or {}), "label": self.labels[index], "index": index})
        if self.captions is not None:
            drawn = zip((self.captions[row] for row in rows), made.seeds, strict=True)
            batch["text"] = [one_of(several, seed) for several, seed in drawn]
        if self.groups is not None:
            batch["group"] = self.groups[index]
        return batch


def one_of(captions: Sequence[str], seed: int | None) -> str:
    """In training a caption drawn by the row's seed, in evaluation always the first; "" of none."""
    if not captions:
        return ""
    return captions[0] if seed is None else captions[mixed(seed, 1) % len(captions)]


def _loader(maker: _Maker, batches: Iterable[list[_Item]], workers: int, pin_memory: bool) -> Iterator[_Made]:
    loader: DataLoader[_Made] = DataLoader(
        maker,
        batch_size=None,
        sampler=batches,
        num_workers=workers,
        collate_fn=_as_is,
        pin_memory=pin_memory,
        # Else torch draws the workers' base seed from the global generator, and dropout would depend on restarts.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_one_thread if workers else None,
        prefetch_factor=2 if workers else None,
    )
    with warnings.catch_warnings():
        # Python 3.12 warns of forking beside threads, which torch always has. The workers only decode, on one thread.
        warnings.filterwarnings("ignore", message=".*use of fork.*", category=DeprecationWarning)
        return iter(loader)


def _as_is(made: Any) -> Any:  # noqa: ANN401  (torch's type for it is a list, which one batch is not)
    return made


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


@dataclass(eq=False)
class EvalBatches:
    """What `eval_batches` returns: iterate it (again, if you like).

    Attributes:
        skipped: id and reason of each row left out, after iterating with on_error="skip".
    """

    manifest: Manifest
    transform: Transform
    batch_size: int
    workers: int
    on_error: Literal["raise", "skip"]
    pin_memory: bool

    def __post_init__(self) -> None:
        self.skipped: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return -(-len(self.manifest) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = []
        ids = self.manifest.ids()
        columns = _Columns(self.manifest)
        rows = range(len(self.manifest))
        plan = [[_Item(row, None) for row in rows[at : at + self.batch_size]] for at in rows[:: self.batch_size]]
        maker = _Maker(self.manifest, self.transform, self.on_error, None)
        for made in _loader(maker, plan, min(self.workers, len(plan)), self.pin_memory):
            if made.error is not None:
                raise InputError(made.error)
            self.skipped += [(ids[row], reason) for row, reason in made.skipped]
            if made.images is not None:
                yield columns.batch(made, made.images)


def eval_batches(
    manifest: Manifest,
    transform: Transform,
    *,
    batch_size: int,
    workers: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    pin_memory: bool = False,
) -> EvalBatches:
    """Every row once, in order; the last batch may be smaller.

    Args:
        manifest: N rows.
        transform: bytes to floats; `transform.at_least`, where there is one, lets large JPEGs be decoded smaller.
        batch_size: rows a batch.
        workers: processes that decode; 0: this one. None: `default_workers()`, or 0 for less than two batches.
        on_error: an image that cannot be read stops the iteration ("raise"), or its row is left out of its batch and
            listed in `.skipped` ("skip"). A batch of nothing else is not yielded.
        pin_memory: in page-locked memory, for copies to a GPU.

    Raises:
        InputError: (while iterating) an image cannot be read; the message names the file.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be at least 1")
    if workers is None:
        workers = default_workers() if len(manifest) > 2 * batch_size else 0
    return EvalBatches(manifest, transform, batch_size, workers, on_error, pin_memory)


class _Steps:
    """The endless plan of training from a step on: for each step the rows, each with its own seed."""

    def __init__(self, sampler: Sampler, seed: int, start_step: int, rank: int, world_size: int) -> None:
        self.sampler, self.seed, self.start_step = sampler, seed, start_step
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[list[_Item]]:
        length = len(self.sampler)
        epoch, position = divmod(self.start_step, length)
        while True:
            batches = self.sampler.epoch(epoch)
            times = occurrence(np.concatenate([np.asarray(batch, dtype=np.int64) for batch in batches])).tolist()
            at = sum(len(batch) for batch in batches[:position])
            for batch in batches[position:]:
                low, high = (len(batch) * part // self.world_size for part in (self.rank, self.rank + 1))
                if len(batch) < self.world_size:
                    raise InputError(f"a batch of {len(batch)} rows cannot be shared by {self.world_size} processes")
                yield [_Item(batch[i], mixed(self.seed, epoch, batch[i], times[at + i])) for i in range(low, high)]
                at += len(batch)
            epoch, position = epoch + 1, 0


def mixed(*values: int) -> int:
    """A seed from several numbers, by splitmix64: neighbours, sums and permutations do not meet.

    >>> mixed(0, 1, 2) != mixed(0, 2, 1)
    True
    """
    state = 0
    for value in values:
        state = (state + 0x9E3779B97F4A7C15 + value) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


class TrainBatches(Iterator[Batch]):
    """What `train_batches` returns: an iterator without end."""

    def __init__(self, made: Iterator[_Made], manifest: Manifest) -> None:
        self._made = made
        self._columns = _Columns(manifest)
        self._ids = manifest.ids()
        self._skipped: dict[int, str] = {}

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Id and reason of each image that could not be read so far, once each."""
        return [(self._ids[row], reason) for row, reason in sorted(self._skipped.items())]

    def __next__(self) -> Batch:
        while True:
            made = next(self._made)
            if made.error is not None:
                raise InputError(made.error)
            self._skipped.update(dict(made.skipped))
            if made.rows:
                return self._columns.batch(made, made.images)
            if len(self._skipped) == len(self._ids):
                raise InputError("no image can be read; `vicinal check` lists the reasons")


def train_batches(
    manifest: Manifest,
    transform: Transform | None,
    sampler: Sampler,
    *,
    seed: int,
    workers: int | None = None,
    start_step: int = 0,
    on_error: Literal["raise", "skip"] = "raise",
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> TrainBatches:
    """Batches without end; batch t depends on (seed, t) alone.

    Args:
        manifest: N rows.
        transform: bytes to floats; it draws from torch's global generator, and from nowhere else. None: no image is
            opened, and batches hold all but images.
        sampler: which rows make the batches of an epoch.
        seed: of the augmentation.
        workers: processes that decode; 0: this one. None: `default_workers()`.
        start_step: t of the first batch.
        on_error: an image that cannot be read stops the iteration ("raise"), or the next readable one of its class
            takes its place ("skip"), so that a batch keeps its classes; if there is none, the batch is smaller.
        rank: which of `world_size` processes this is; each gets its own consecutive share of every batch.
        world_size: how many processes train together.
        pin_memory: in page-locked memory, for copies to a GPU.

    Raises:
        InputError: (while iterating) an image cannot be read; the message names the file.
    """
    if workers is None:
        workers = default_workers()
    if transform is None:
        workers = 0
    spares = _Spares(manifest.labels().numpy()) if on_error == "skip" else None
    maker = _Maker(manifest, transform, on_error, spares)
    steps = _Steps(sampler, seed, start_step, rank, world_size)
    return TrainBatches(_loader(maker, steps, workers, pin_memory), manifest)
