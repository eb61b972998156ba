"""Reading local shards against reading the same plain files: batches to train on, and bytes alone; one thread.

    VICINAL_DATA=… python benchmarks/shards.py

Both sides give the same rows in the same random order through `train_batches` in one process (224-pixel photos of
`grocery` to a 224-pixel tensor, 112-pixel drawings of `emoji` to a 112-pixel one), and take turns batch by batch; who
begins changes each time. A round is an epoch. The speed is that of the shards over that of the files, the median over
rounds, its interval a bootstrap over rounds; in CPU time (that of the system included) and by the clock. The files lie
in the page cache on both sides: what a disk costs is not measured. Beside it stands how long the first reading of the
shards takes (the index), and a later one.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from vicinal.data.images import read_bytes
from vicinal.data.loader import train_batches
from vicinal.data.manifest import Manifest
from vicinal.data.samplers import ShuffleSampler
from vicinal.data.sources import read_shards, read_table, write_shards
from vicinal.data.transforms import eval_transform
from vicinal.types import Preprocess

CASES = {"grocery": 224, "emoji": 112}
BATCH = 32


def interval(ratios: np.ndarray, resamples: int = 2000) -> str:
    """Median and its 95 % bootstrap interval."""
    draws = np.random.default_rng(0).choice(ratios, (resamples, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return f"{np.median(ratios):.3f} [{low:.3f}, {high:.3f}]"


def timed(work: Callable[..., object], *arguments: object) -> np.ndarray:
    """Seconds of CPU, and by the clock."""
    cpu, clock = time.process_time(), time.perf_counter()
    work(*arguments)
    return np.array([time.process_time() - cpu, time.perf_counter() - clock])


def turns(sides: list[Callable[[int], object]], steps: int, rounds: int) -> np.ndarray:
    """Seconds, "rounds sides 2": the sides take turns at each step, and in who begins."""
    spent = np.zeros((rounds, len(sides), 2))
    for number in range(rounds):
        for step in range(steps):
            for side in range(len(sides))[:: 1 if (number + step) % 2 else -1]:
                spent[number, side] += timed(sides[side], step)
    return spent


def opened(manifest: Manifest) -> Callable[[int], object]:
    """Reads the bytes of a batch's images, in random order."""
    paths = [manifest.path(row) for row in range(len(manifest))]
    order = np.random.default_rng(1).permutation(len(paths))
    return lambda step: [read_bytes(paths[i]) for i in order[step * BATCH :][:BATCH]]


def compared(name: str, spent: np.ndarray, items: int) -> None:
    files, shards = spent[:, 0], spent[:, 1]
    each = np.median(spent[:, :, 0], axis=0) / items * 1e6
    ratio = files / shards
    print(
        f"{name:28} {each[0]:7.1f} {each[1]:7.1f} us   speed by CPU {interval(ratio[:, 0])}, by clock "
        f"{interval(ratio[:, 1])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':28} {'files':>7} {'shards':>7} an image, CPU")
    for name, size in CASES.items():
        with tempfile.TemporaryDirectory() as work:
            plain = read_table(Path(os.environ["VICINAL_DATA"]) / name / "table.csv")
            chosen = np.zeros(len(plain), bool)
            chosen[np.random.default_rng(0).permutation(len(plain))[: arguments.images]] = True
            plain = plain.where(chosen)
            write_shards(plain, Path(work) / "%06d.tar", items=200, seed=None)
            first, later = timed(read_shards, work)[1], timed(read_shards, work)[1]
            packed = read_shards(work)
            preprocess = Preprocess(size=(size, size), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
            sampler = ShuffleSampler(len(plain), BATCH, seed=0)
            view, both = eval_transform(preprocess), (plain, packed)
            streams = [train_batches(m, view, sampler, seed=0, workers=0) for m in both]
            one, other = (next(stream) for stream in streams)
            assert torch.equal(one["image"], other["image"])
            steps = len(sampler)
            spent = turns([lambda _, s=stream: next(s) for stream in streams], steps, arguments.rounds)
            compared(f"{name}, batches", spent, steps * BATCH)

            spent = turns([opened(plain), opened(packed)], steps, arguments.rounds)
            compared(f"{name}, bytes alone", spent, steps * BATCH)
            print(f"{name}, index of {len(packed):,}: {first:.2f} s at first, {later:.2f} s later")


if __name__ == "__main__":
    main()
