"""InfoNCE and SigLIP forward and backward: vicinal against open_clip's ClipLoss and SigLipLoss.

    python benchmarks/contrastive.py                                    # B = 8,192: time; B = 16,384: memory
    python benchmarks/contrastive.py --time 2048 --memory 4096 --rounds 3

Unit vectors of 512 numbers with cosines near .25 for pairs and .15 for others, as a pretrained model has them; scale
100 for InfoNCE, 10 with a bias of -10 for SigLIP. Both sides under bf16 autocast, and both in float32. A round runs
each once, in turning order, in one process, in CPU time; the ratio is the median over rounds of time(open_clip) /
time(vicinal), its interval the 95 % percentile bootstrap over rounds. The first round warms up and is left out. `error`
is the relative error of the images' gradient against float64 (left out above B = 8,192). Memory is the peak of forward
and backward above what imports, inputs and a small first call hold, each side in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

WIDTH = 512
SETTINGS = {"infonce": (100.0, 0.0), "siglip": (10.0, -10.0)}
Loss = Callable[[Tensor, Tensor], Tensor]


def pairs(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shared = normalize(torch.randn(WIDTH, generator=generator), dim=0)
    image, text, both = (normalize(torch.randn(batch, WIDTH, generator=generator), dim=1) for _ in range(3))
    return tuple(normalize(0.4 * shared + 0.3 * both + 0.87 * own, dim=1) for own in (image, text))  # type: ignore[return-value]


def vicinal(name: str) -> Loss:
    from vicinal.losses.contrastive import InfoNCE, SigLIP

    scale, bias = SETTINGS[name]
    return InfoNCE(scale=scale) if name == "infonce" else SigLIP(scale=scale, bias=bias)


def open_clip(name: str) -> Loss:
    from open_clip.loss import ClipLoss, SigLipLoss

    scale, bias = (torch.tensor(value, requires_grad=True) for value in SETTINGS[name])
    clip, siglip = ClipLoss(), SigLipLoss()
    if name == "infonce":
        return lambda x, y: clip(normalize(x, dim=1), normalize(y, dim=1), scale)
    return lambda x, y: siglip(normalize(x, dim=1), normalize(y, dim=1), scale, bias)


TOOLS: dict[str, Callable[[str], Loss]] = {"vicinal": vicinal, "open_clip": open_clip}


def step(loss: Loss, image: Tensor, text: Tensor, precision: str) -> tuple[float, Tensor]:
    x, y = (vectors.clone().requires_grad_() for vectors in (image, text))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        value = loss(x, y)
    value.backward()
    assert x.grad is not None
    return value.item(), x.grad


def status(field: str) -> float:
    """Megabytes of this process, from /proc."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) / 1024


def peak(tool: str, name: str, precision: str, batch: int) -> float:
    """Megabytes above what imports, vectors and a first small call hold."""
    image, text = pairs(batch)
    loss = TOOLS[tool](name)
    step(loss, image[:256], text[:256], precision)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    step(loss, image, text, precision)
    return status("VmHWM") - before


def interval(ratios: list[float]) -> str:
    """Median and its 95 % bootstrap interval."""
    draws = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def timed(name: str, precision: str, batch: int, rounds: int) -> None:
    image, text = pairs(batch)
    losses = {tool: make(name) for tool, make in TOOLS.items()}
    seconds: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    found: dict[str, tuple[float, Tensor]] = {}
    for turn in range(rounds + 1):
        for tool in list(TOOLS) if turn % 2 else reversed(list(TOOLS)):
            began = time.process_time()
            found[tool] = step(losses[tool], image, text, precision)
            if turn:
                seconds[tool].append(time.process_time() - began)
    ratios = [theirs / ours for ours, theirs in zip(seconds["vicinal"], seconds["open_clip"], strict=True)]
    errors = dict.fromkeys(TOOLS, "")
    if batch <= 8192:
        exact = step(losses["vicinal"], image.double(), text.double(), "fp32")[1]
        errors = {t: f"{((g - exact).norm() / exact.norm()).item():.1e}" for t, (_, g) in found.items()}
    middles = " / ".join(f"{statistics.median(taken):.2f}" for taken in reversed(list(seconds.values())))
    values = " / ".join(f"{found[tool][0]:.4f}" for tool in reversed(list(TOOLS)))
    wrong = " / ".join(errors[tool] for tool in reversed(list(TOOLS)))
    print(f"| {name} | {precision} | {batch:,} | {middles} | {interval(ratios)} | {values} | {wrong} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--precisions", nargs="+", choices=["bf16", "fp32"], default=["bf16", "fp32"])
    parser.add_argument("--time", nargs="*", type=int, default=[8192], metavar="B")
    parser.add_argument("--memory", nargs="*", type=int, default=[16384], metavar="B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak", nargs=4, metavar=("TOOL", "LOSS", "PRECISION", "B"), help="print one peak, and end")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        tool, name, precision, batch = arguments.peak
        print(peak(tool, name, precision, int(batch)))
        return

    print(f"{platform.machine()}, torch {torch.__version__}, one thread each, {arguments.rounds} rounds, CPU time")
    print(
        "| loss | products | B | open_clip / vicinal, s | ratio | loss | error of the gradient |\n" + "|---" * 7 + "|"
    )
    for batch in arguments.time:
        for name in arguments.losses:
            for precision in arguments.precisions:
                timed(name, precision, batch, arguments.rounds)
    print("\n| loss | products | B | open_clip / vicinal, MB | ratio |\n" + "|---" * 5 + "|")
    for batch in arguments.memory:
        for name in arguments.losses:
            for precision in arguments.precisions:
                commands = [[sys.executable, __file__, "--peak", t, name, precision, str(batch)] for t in TOOLS]
                ours, theirs = (
                    float(subprocess.run(c, check=True, capture_output=True, text=True).stdout) for c in commands
                )
                print(
                    f"| {name} | {precision} | {batch:,} | {theirs:.0f} / {ours:.0f} | {theirs / ours:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
