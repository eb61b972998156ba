"""Shards read as they come, for sets that lie behind addresses or are too large to be indexed.

Nothing is looked up: tars are read from their first byte to their last (by webdataset's iterators), so that any number
of them can be trained on, from a web server, too. What then is in a batch follows from the seed, and from how many
processes and workers read:

1. epoch e shuffles the shards by (seed, e), alike in every process;
2. of n readers (each worker of each process is one) reader r takes every n-th shard from place (r + e) mod n on: the
   processes divide the shards, and the workers of a process divide its part; with fewer shards than readers, they take
   turns;
3. a buffer of samples, not yet decoded, is shuffled by (seed, e, r);
4. then the reader's next epoch begins, in the same batch: no sample is dropped, each is seen once an epoch, and every
   process has batches without end, so that unequal shards leave nobody waiting.

A sample that cannot be used (no image, no caption, broken bytes) is left out and counted, and another of its batch
stands twice in its place, which keeps batches equal and their order a matter of counting alone. Training goes on at any
batch with what it would have seen: the samples before are read again but not decoded, and whole epochs of whole shards
that are counted in `shards.json` are not read.

Letters: B items of a batch in one process.
"""

from __future__ import annotations

import hashlib
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vicinal.data.images import Cutout, decode_bytes
from vicinal.data.loader import default_workers, mixed, one_of
from vicinal.data.shards import TRIES, Patterns, expand, image_kind, kinds_of, opened, recorded, said
from vicinal.data.transforms import EvalTransform, TrainTransform
from vicinal.types import Batch, InputError

__all__ = ["BUFFER", "StreamBatches", "StreamPlan", "stream_batches", "stream_once"]

BUFFER = 5000  # samples that are shuffled at a time: 75 MB a worker of photos of 256 pixels (15 kB each)
BARREN = 100  # batches in a row without one usable sample, after which something else is wrong

Sample = Mapping[str, Any]
Transform = Callable[[UInt8[Tensor, "3 H W"]], Float[Tensor, "3 h w"]]


class _Streamed(NamedTuple):
    images: Tensor | None
    texts: list[str]
    labels: list[int] | None
    skipped: list[tuple[str, str]]
    error: str | None


@dataclass(slots=True)
class _Reading:
    """How a stream is read; the same in every reader."""

    shards: list[str]
    counts: dict[str, int]
    whole: set[str]  # of those that are counted: an epoch of them can be skipped unread
    transform: Transform
    batch_size: int  # of this process
    seed: int
    shuffle: int
    identity: str | None
    captions: bool
    on_error: Literal["raise", "skip"]
    rank: int
    world_size: int
    start: int
    endless: bool


class _Reader(IterableDataset[_Streamed]):
    """What runs in a worker. Errors of the input come back as words, not as traces."""

    def __init__(self, reading: _Reading) -> None:
        self.reading = reading
        self.lost: list[tuple[str, str]] = []

    def __iter__(self) -> Iterator[_Streamed]:
        how, info = self.reading, get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        # Batch t is made by worker t mod workers; the loader asks its worker 0 first, who takes the first one's place.
        mine = (worker + how.start) % workers
        before = len(range(mine, how.start, workers)) * how.batch_size
        samples = self._samples(how.rank + how.world_size * mine, how.world_size * workers, before)
        try:
            while drawn := list(islice(samples, how.batch_size)):
                yield self._made(drawn)
                self.lost = []
            if self.lost:
                yield _Streamed(None, [], None, self.lost, None)
        except InputError as error:
            yield _Streamed(None, [], None, [], str(error))

    def _samples(self, reader: int, readers: int, before: int) -> Iterator[tuple[int, Sample]]:
        """This reader's samples with their epoch, from one epoch into the next, without the first `before`."""
        how, epoch, barren = self.reading, 0, 0
        while True:
            order = np.arange(len(how.shards))
            if how.shuffle:
                order = np.random.default_rng((how.seed, epoch)).permutation(len(how.shards))
            own = [how.shards[i] for i in order[(reader + epoch) % readers :: readers]]
            counted = sum(how.counts[shard] if shard in how.whole else -(10**12) for shard in own)
            if 0 < counted <= before:
                before -= counted
            else:
                came = False
                raw = (sample for shard in own for sample in self._of_shard(shard))
                for sample in self._mixed(raw, mixed(how.seed, epoch, reader)):
                    came = True
                    if before:
                        before -= 1
                    else:
                        yield epoch, sample
                barren = 0 if came else barren + 1
            if not how.endless:
                return
            if barren > readers:
                reason = f" ({self.lost[0][0]}: {self.lost[0][1]})" if self.lost else ""
                raise InputError(f"no sample came out of any of {len(how.shards):,} shards{reason}")
            epoch += 1

    def _mixed(self, samples: Iterator[Sample], seed: int) -> Iterator[Sample]:
        size = self.reading.shuffle
        if not size:
            return samples
        from webdataset.filters import shuffle

        mixing: Iterator[Sample] = shuffle(size, initial=max(size // 5, 1), rng=random.Random(seed))(samples)
        return mixing

    def _of_shard(self, shard: str) -> Iterator[Sample]:
        """The samples of one tar in order. A connection that breaks is taken up again where it broke."""
        from webdataset.tariterators import group_by_keys, tar_file_expander

        remote = urlsplit(shard).scheme in ("http", "https")
        given = 0
        for attempt in range(TRIES if remote else 1):
            broken: list[Exception] = []
            twice: list[Exception] = []

            def go_on(error: Exception, broken: list[Exception] = broken, twice: list[Exception] = twice) -> bool:
                (twice if isinstance(error, ValueError) else broken).append(error)
                return isinstance(error, ValueError)  # a file that stands twice; anything else ends the tar

            try:
                stream = opened(shard)
            except InputError as error:
                self.lost.append((shard, str(error)))
                return
            number, first, last = 0, set[str](), None
            with stream:
                files = tar_file_expander(iter([{"url": shard, "stream": stream}]), handler=go_on)
                for sample in group_by_keys(files, handler=go_on):
                    if last is not None:
                        number += 1
                        if number > given:
                            given = number
                            yield last
                    first, last = first or kinds_of(sample), sample
            # The last one may be what a cut left of a sample.
            if last is not None and (not broken or kinds_of(last) >= first):
                number += 1
                if number > given:
                    given = number
                    yield last
            self.lost += [(shard, str(error.args[0])) for error in twice]
            expected = self.reading.counts.get(shard)
            if not broken and (expected is None or given >= expected):
                return
            if attempt == TRIES - 1 or not remote:
                why = str(broken[0].args[0] if broken[0].args else broken[0]) if broken else "it ended"
                of = f" of {expected:,}" if expected else ""
                self.lost.append((shard, f"cut or damaged: {given:,}{of} samples came ({why})"))

    def _made(self, drawn: Sequence[tuple[int, Sample]]) -> _Streamed:
        how = self.reading
        images: Tensor | None = None
        texts: list[str] = []
        labels: list[int] = []
        skipped = list(self.lost)
        with torch.random.fork_rng(devices=[]):
            for epoch, sample in drawn:
                name = f"{sample['__url__']}/{sample['__key__']}"
                short = "/".join(name.rsplit("/", 2)[-2:])  # where the shards lie makes no difference
                seed = mixed(how.seed, epoch, _number(short)) if how.endless else None
                try:
                    view, text, label = self._one(sample, name, seed)
                except (InputError, ValueError) as error:
                    if how.on_error == "raise":
                        raise InputError(str(error) if name in str(error) else f"{name}: {error}") from error
                    skipped.append((name, str(error).removeprefix(f"{name}: ")))
                    continue
                if images is None:  # channels-last, see transforms.py
                    shape = (len(drawn), *view.shape)
                    images = torch.empty(shape, dtype=view.dtype, memory_format=torch.channels_last)
                images[len(texts)] = view
                texts.append(text)
                labels.append(label)
        if images is None:
            return _Streamed(None, [], None, skipped, None)
        good, full = len(texts), len(drawn) if how.endless else len(texts)
        for place in range(good, full):
            images[place] = images[place % good]
        filled = [i % good for i in range(full)]
        return _Streamed(
            images[:full],
            [texts[i] for i in filled],
            None if how.identity is None else [labels[i] for i in filled],
            skipped,
            None,
        )

    def _one(self, sample: Sample, name: str, seed: int | None) -> tuple[Float[Tensor, "3 h w"], str, int]:
        """One sample's view, caption and label."""
        how = self.reading
        files = {kind: content for kind, content in sample.items() if not kind.startswith("__")}
        kind = image_kind(list(files))
        if kind is None:
            raise ValueError(f"no image, only {', '.join(files)}")
        told = said(files)
        if how.captions and not told.texts:
            raise ValueError("no caption")
        at_least = how.transform.at_least if isinstance(how.transform, EvalTransform | TrainTransform) else None
        cutout: Cutout = decode_bytes(files[kind], name, at_least=at_least)
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        if isinstance(how.transform, EvalTransform | TrainTransform):
            view = how.transform.view(cutout)
        else:
            view = how.transform(cutout.pixels)
        value = told.label if how.identity == "cls" else told.fields.get(how.identity or "")
        return view, one_of(told.texts, seed), -1 if value is None else _number(str(value)) >> 1


def _number(text: str) -> int:
    """64 bits, the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class StreamBatches(Iterator[Batch]):
    """What `stream_batches` and `stream_once` return.

    Attributes:
        skipped: sample, or shard, and reason of each that was left out so far, once each.
        items: how many samples the shards have, where that is recorded; else None.
    """

    def __init__(self, reading: _Reading, workers: int, pin_memory: bool) -> None:
        known = [reading.counts.get(shard) for shard in reading.shards]
        self.items = None if None in known else sum(count for count in known if count is not None)
        self._skipped: dict[str, str] = {}
        self._barren = 0
        loader: DataLoader[_Streamed] = DataLoader(
            _Reader(reading),
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_is,
            pin_memory=pin_memory,
            generator=torch.Generator().manual_seed(0),  # else torch draws from the global one
            worker_init_fn=_one_thread if workers else None,
            prefetch_factor=2 if workers else None,
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of forking beside threads, which torch always has. The workers only decode.
            warnings.filterwarnings("ignore", message=".*use of fork.*", category=DeprecationWarning)
            self._made = iter(loader)

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """Sample, or shard, and reason."""
        return list(self._skipped.items())

    def __next__(self) -> Batch:
        while True:
            made = next(self._made)
            if made.error is not None:
                raise InputError(made.error)
            self._skipped.update(made.skipped)
            if made.images is not None:
                self._barren = 0
                batch = Batch(image=made.images, text=made.texts)
                if made.labels is not None:
                    batch["label"] = torch.tensor(made.labels, dtype=torch.int64)
                return batch
            self._barren += 1
            if self._barren > BARREN:
                name, reason = next(iter(self._skipped.items()))
                raise InputError(f"no sample of {BARREN} batches in a row can be used, the first: {name}: {reason}")


def _as_is(made: Any) -> Any:  # noqa: ANN401  (torch's type for it is a list, which one batch is not)
    return made


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True, slots=True)
class StreamPlan:
    """What is trained on, before it is known by whom: it has the length of a sampler, and gives a stream.

    Args:
        shards: see `expand`.
        batch_size: of all processes together.
        seed: of the order, the captions drawn and the augmentation.
        shuffle: samples in the buffer of each worker.
        identity: a value of the `.json` that makes samples one item.
    """

    shards: Patterns
    batch_size: int
    seed: int
    shuffle: int = BUFFER
    identity: str | None = None

    @property
    def items(self) -> int | None:
        """How many samples there are; None where that is not recorded."""
        found = expand(self.shards)
        counts = _counted(found)
        return sum(counts.values()) if len(counts) == len(found) else None

    def __len__(self) -> int:
        """Batches an epoch; 1 where that is not known."""
        return max((self.items or 0) // self.batch_size, 1)

    def batches(
        self, transform: Transform, workers: int | None, start_step: int, rank: int, world_size: int
    ) -> StreamBatches:
        """See `stream_batches`."""
        return stream_batches(
            self.shards,
            transform,
            batch_size=self.batch_size,
            seed=self.seed,
            shuffle=self.shuffle,
            identity=self.identity,
            workers=workers,
            start_step=start_step,
            rank=rank,
            world_size=world_size,
        )


def stream_batches(
    shards: Patterns,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    shuffle: int = BUFFER,
    identity: str | None = None,
    workers: int | None = None,
    start_step: int = 0,
    on_error: Literal["raise", "skip"] = "skip",
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> StreamBatches:
    """Batches of images and captions without end, from shards read as they come; see the module for their order.

    Args:
        shards: see `vicinal.data.shards.expand`; addresses or files, packed ones (`.tar.gz`), too.
        transform: bytes to floats; it draws from torch's global generator, and from nowhere else.
        batch_size: of all processes together.
        seed: of the order, the captions drawn and the augmentation.
        shuffle: samples in the buffer of each worker; 0: shards and samples in their order.
        identity: a value of the `.json` (or `cls`) that makes samples one item; it comes as "label", -1 without one.
        workers: processes that read and decode, no more than shards; 0: this one. None: `default_workers()`.
        start_step: number of the first batch. The batches are those of an uninterrupted stream if seed, `world_size`
            and `workers` are the same, and each shard gives what it gave.
        on_error: leave a sample or shard that cannot be used out and count it ("skip"), or stop ("raise": samples).
        rank: which of `world_size` processes this is.
        world_size: how many processes train together.
        pin_memory: in page-locked memory, for copies to a GPU.

    Raises:
        InputError: a pattern matches nothing, a batch cannot be shared evenly, or (while iterating) nothing comes.
    """
    if batch_size < 1 or batch_size % world_size:
        raise InputError(f"a batch of {batch_size} cannot be shared evenly by {world_size} processes")
    found = expand(shards)
    workers, counts = _workers(workers, len(found), world_size), _counted(found)
    reading = _Reading(
        found, counts, {shard for shard in counts if _is_whole(shard)}, transform, batch_size // world_size, seed,
        int(shuffle), identity, True, on_error, rank, world_size, start_step, endless=True,
    )  # fmt: skip
    return StreamBatches(reading, workers, pin_memory)


def stream_once(
    shards: Patterns,
    transform: Transform,
    *,
    batch_size: int,
    identity: str | None = None,
    workers: int | None = None,
    on_error: Literal["raise", "skip"] = "skip",
) -> StreamBatches:
    """Every sample of the shards once, in their order within a worker, the last batch of each worker smaller.

    With one worker or none the order is that of the shards. A sample without a caption has the caption "".

    Args:
        shards: see `stream_batches`, as for the arguments below.
        transform: bytes to floats.
        batch_size: samples a batch.
        identity: what comes as "label".
        workers: processes that read and decode.
        on_error: leave what cannot be used out and count it ("skip"), or stop ("raise").

    Raises:
        InputError: a pattern matches nothing.
    """
    found = expand(shards)
    reading = _Reading(
        found, _counted(found), set(), transform, batch_size, 0, 0, identity, False, on_error, 0, 1, 0, endless=False
    )
    return StreamBatches(reading, _workers(workers, len(found), 1), False)


def _workers(workers: int | None, shards: int, world_size: int) -> int:
    return min(default_workers() if workers is None else workers, max(shards // world_size, 1))


def _is_whole(shard: str) -> bool:
    """Whether a file ends as a tar does, in two blocks of zeros: a cut one gives less than is counted of it.

    What lies behind an address is taken to be whole.
    """
    if urlsplit(shard).scheme in ("http", "https"):
        return True
    try:
        with Path(shard).open("rb") as file:
            file.seek(-1024, os.SEEK_END)
            return file.read() == bytes(1024)
    except OSError:
        return False


def _counted(shards: Sequence[str]) -> dict[str, int]:
    """How many samples each shard has, where whoever wrote them says so."""
    folders = {shard.rpartition("/")[0] or "." for shard in shards}
    known = {folder: recorded(folder) for folder in folders}
    found = {shard: known[shard.rpartition("/")[0] or "."].get(shard.rpartition("/")[2]) for shard in shards}
    return {shard: count for shard, count in found.items() if count is not None}
