"""A step with micro batches (GradCache) against the same images without: time and memory.

    python benchmarks/grad_cache.py                                   # LoRA and full tuning, bf16 and fp32
    python benchmarks/grad_cache.py --memory 256 512 1024             # peaks alone

ViT-Tiny at 112 px, SupCon over a batch of 256 in micro batches of 64, all through `vicinal.fit`. Three ways with equal
images: `whole`, the batch at once; `accumulated`, four batches of 64 with their gradients averaged, so 63 others to
compare with instead of 255; `micro`. A round runs each once, in turning order, in CPU time; ratios are medians over
rounds of time(micro) / time(other), with the 95 % percentile bootstrap over rounds. The first round warms up and is
left out. Memory is the peak of three steps above what model and images hold, each way in a process of its own, where
freed memory goes back at once (glibc's thresholds at 64 KB): else it is that of what the allocator keeps.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from contrastive import interval, status
from vicinal.losses import SupCon
from vicinal.models.adapters import Full, LoRA, adapt
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.training.loop import fit
from vicinal.training.objectives import LabelObjective
from vicinal.training.optim import build_optimizer, parameter_groups, warmup_cosine
from vicinal.types import Batch

PIXELS, PARTS = 112, 64
WAYS = ("whole", "accumulated", "micro")


def pictures(size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, PIXELS, PIXELS, generator=generator).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(size) // 4


def encoder_of(method: str) -> Encoder:
    torch.manual_seed(0)
    start = load_encoder("timm:vit_tiny_patch16_224", size=PIXELS, random_init=True)
    return adapt(start, LoRA(rank=8) if method == "lora" else Full())


def trained(encoder: Encoder, size: int, way: str, precision: str, steps: int) -> float:
    """The last loss; seconds are the caller's."""
    images, labels = pictures(size)
    objective = LabelObjective(encoder, SupCon())
    optimizer = build_optimizer("adamw", parameter_groups(objective, lr=1e-4))
    taken = PARTS if way == "accumulated" else size

    def batches(start: int) -> Iterator[Batch]:
        for at in itertools.cycle(range(0, size, taken)):
            yield {"image": images[at : at + taken], "label": labels[at : at + taken]}

    result = fit(
        objective,
        batches,
        optimizer,
        warmup_cosine(optimizer, steps=steps),
        steps=steps,
        accumulate=size // PARTS if way == "accumulated" else 1,
        micro_batch=PARTS if way == "micro" else None,
        precision=precision,  # type: ignore[arg-type]
        progress=False,
        log_every=steps,
    )
    return float(result.history[-1]["loss"])


def timed(method: str, precision: str, size: int, steps: int, rounds: int) -> None:
    encoder = encoder_of(method)
    ways: dict[str, Callable[[], float]] = {
        way: lambda way=way: trained(copy.deepcopy(encoder), size, way, precision, steps)  # type: ignore[misc]
        for way in WAYS
    }
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    losses: dict[str, float] = {}
    for turn in range(rounds + 1):
        for way in WAYS[turn % 3 :] + WAYS[: turn % 3]:
            began = time.process_time()
            losses[way] = ways[way]()
            if turn:
                seconds[way].append(time.process_time() - began)
    middles = " / ".join(f"{1000 * statistics.median(seconds[way]) / steps:.0f}" for way in WAYS)
    ratios = [
        interval([m / o for m, o in zip(seconds["micro"], seconds[other], strict=True)])
        for other in ("whole", "accumulated")
    ]
    print(
        f"| {method} | {precision} | {size} | {middles} | {ratios[0]} | {ratios[1]} "
        f"| {losses['whole']:.4f} / {losses['micro']:.4f} |",
        flush=True,
    )


def peak(way: str, method: str, precision: str, size: int) -> float:
    """Megabytes above what imports, images and a first step on few of them hold."""
    encoder = encoder_of(method)
    images, _ = pictures(size)
    trained(
        copy.deepcopy(encoder), 2 * PARTS if way == "micro" else 16, "whole" if way != "micro" else way, precision, 1
    )
    del images
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    trained(encoder, size, way, precision, 3)
    held = size * 3 * PIXELS**2 * 4 / 2**20
    return status("VmHWM") - before - held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=["lora", "full"], default=["full", "lora"])
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--time", nargs="*", type=int, default=[256], metavar="B")
    parser.add_argument("--memory", nargs="*", type=int, default=[], metavar="B")
    parser.add_argument("--steps", type=int, default=1, help="in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", nargs=4, metavar=("WAY", "METHOD", "PRECISION", "B"), help="print one peak, and end")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("vicinal.training").setLevel(logging.ERROR)  # random weights see noise all alike
    if arguments.peak:
        way, method, precision, size = arguments.peak
        print(peak(way, method, precision, int(size)))
        return
    print(f"{platform.machine()}, torch {torch.__version__}, one thread, {arguments.rounds} rounds, CPU time")
    chosen = list(itertools.product(arguments.methods, arguments.precisions))
    if arguments.time:
        print("| method | precision | B | whole / accumulated / micro, ms | x whole | x accumulated | losses |")
        print("|---" * 7 + "|")
    for size, (method, precision) in itertools.product(arguments.time, chosen):
        timed(method, precision, size, arguments.steps, arguments.rounds)
    if arguments.memory:
        print("| method | precision | B | peak, MB: whole / accumulated / micro |\n" + "|---" * 4 + "|")
    for size, (method, precision) in itertools.product(arguments.memory, chosen):
        found = []
        for way in WAYS:
            command = [sys.executable, __file__, "--peak", way, method, precision, str(size)]
            lean = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
            found.append(float(subprocess.run(command, env=lean, check=True, capture_output=True, text=True).stdout))
        print(f"| {method} | {precision} | {size:,} | {' / '.join(f'{mb:.0f}' for mb in found)} |", flush=True)


if __name__ == "__main__":
    main()
