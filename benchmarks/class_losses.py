"""One step of a class loss over 100,000 classes: vicinal against plain torch and pytorch-metric-learning.

    python benchmarks/class_losses.py                               # ArcFace and Proxy-Anchor, batch 128, 512 numbers
    python benchmarks/class_losses.py --losses arcface --classes 20000 --rounds 5

A step is the loss and its gradient for embeddings and class weights, under bfloat16 autocast for all but the last, and
the plain forms are what one writes by hand. A round runs each tool once, in turning order, in one process, with one
thread each, in CPU time; the ratio is the median over rounds of time(peer) / time(vicinal), its interval the 95 %
bootstrap over rounds. The first round warms up and is left out. Memory is the peak above what imports, weights and
a small first step hold, each tool in a process of its own; the gradient of the weights alone is 205 MB. `error` is the
distance of the gradients of embeddings and weights from those in float64, as a share of their length.
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
import torch.nn.functional as F
from torch import Tensor, nn

BATCH, WIDTH, MARGIN, SCALE, ALPHA = 128, 512, 0.5, 64.0, 32.0
Loss = Callable[[Tensor, Tensor, nn.Parameter], Tensor]


def plain_arcface(x: Tensor, y: Tensor, weight: nn.Parameter) -> Tensor:
    cosine = F.linear(F.normalize(x), F.normalize(weight)).float()
    own = cosine.gather(1, y[:, None])
    target = torch.cos(torch.acos(own.clamp(-1 + 1e-7, 1 - 1e-7)) + MARGIN)
    return F.cross_entropy(SCALE * cosine.scatter(1, y[:, None], target), y)


def plain_proxy_anchor(x: Tensor, y: Tensor, weight: nn.Parameter) -> Tensor:
    cosine = F.linear(F.normalize(x), F.normalize(weight)).float()
    own = F.one_hot(y, len(weight)).bool()
    pull = torch.where(own, torch.exp(-ALPHA * (cosine - 0.1)), 0).sum(0)
    push = torch.where(own, 0, torch.exp(ALPHA * (cosine + 0.1))).sum(0)
    return torch.log1p(pull).sum() / own.any(0).sum() + torch.log1p(push).mean()


def vicinal_arcface(x: Tensor, y: Tensor, weight: nn.Parameter) -> Tensor:
    from vicinal.losses import ArcFace

    loss = ArcFace(1, 1, margin=MARGIN, scale=SCALE)
    loss.weight = weight
    return loss(x, y)


def vicinal_proxy_anchor(x: Tensor, y: Tensor, weight: nn.Parameter) -> Tensor:
    from vicinal.losses.proxy import proxy_anchor

    return proxy_anchor(x, y, weight, margin=0.1, alpha=ALPHA)


PEERS: dict[int, nn.Module] = {}  # pytorch-metric-learning's losses make their weights, so each is made once


def metric_learning_arcface(x: Tensor, y: Tensor, weight: nn.Parameter) -> Tensor:
    from pytorch_metric_learning.losses import ArcFaceLoss

    if id(weight) not in PEERS:
        PEERS[id(weight)] = ArcFaceLoss(1, WIDTH, margin=float(np.degrees(MARGIN)), scale=SCALE)
        PEERS[id(weight)].num_classes = len(weight)
        PEERS[id(weight)].W = nn.Parameter(weight.detach().T.contiguous())
    PEERS[id(weight)].zero_grad()
    return PEERS[id(weight)](x, y)


def metric_learning_proxy_anchor(x: Tensor, y: Tensor, weight: nn.Parameter) -> Tensor:
    from pytorch_metric_learning.losses import ProxyAnchorLoss

    if id(weight) not in PEERS:
        PEERS[id(weight)] = ProxyAnchorLoss(1, WIDTH, margin=0.1, alpha=ALPHA)
        PEERS[id(weight)].num_classes = len(weight)
        PEERS[id(weight)].proxies = weight
    return PEERS[id(weight)](x, y)


def in_float32(loss: Loss) -> Loss:
    """What one gets who opens no autocast around the loss."""

    def wide(x: Tensor, y: Tensor, weight: nn.Parameter) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return loss(x, y, weight)

    return wide


TOOLS: dict[str, dict[str, Loss]] = {
    "arcface": {
        "vicinal": vicinal_arcface,
        "plain torch": plain_arcface,
        "pytorch-metric-learning": metric_learning_arcface,
        "the same in float32": in_float32(metric_learning_arcface),
    },
    "proxy_anchor": {
        "vicinal": vicinal_proxy_anchor,
        "plain torch": plain_proxy_anchor,
        "pytorch-metric-learning": metric_learning_proxy_anchor,
        "the same in float32": in_float32(metric_learning_proxy_anchor),
    },
}


def case(classes: int) -> tuple[Tensor, Tensor, nn.Parameter]:
    """Embeddings at a cosine of about 0.4 to their class weights, as some way into a training."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(classes, WIDTH, generator=generator)
    y = torch.randint(classes, (BATCH,), generator=generator)
    x = weight[y] + 2.3 * torch.randn(BATCH, WIDTH, generator=generator)
    return x.requires_grad_(), y, nn.Parameter(weight)


def step(loss: Loss, x: Tensor, y: Tensor, weight: nn.Parameter) -> float:
    """Loss and gradient; the answer is the loss."""
    x.grad = weight.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x, y, weight)
    value.backward()
    return float(value.detach())


def errors(name: str, tool: str, classes: int) -> str:
    """Relative distance of the gradients from float64's."""
    x, y, weight = case(classes)
    loss = TOOLS[name][tool]
    step(loss, x, y, weight)
    grad = weight.grad if weight.grad is not None else PEERS[id(weight)].W.grad.T
    wide_x, wide_weight = x.detach().double().requires_grad_(), nn.Parameter(weight.detach().double())
    TOOLS[name]["plain torch"](wide_x, y, wide_weight).backward()
    pairs = ((x.grad, wide_x.grad), (grad, wide_weight.grad))
    return ", ".join(f"{float((a - b).norm() / b.norm()):.1e}" for a, b in pairs)


def status(field: str) -> float:
    """Megabytes of this process, from /proc."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) / 1024


def peak(name: str, tool: str, classes: int) -> float:
    """Megabytes above what imports, weights and a first small step hold."""
    loss = TOOLS[name][tool]
    step(loss, *case(10_000))
    PEERS.clear()  # a new weight may get the place of the one that is gone
    x, y, weight = case(classes)
    if tool in ("pytorch-metric-learning", "the same in float32"):
        with torch.no_grad():  # makes its weights
            loss(x[:1], y[:1], weight)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    step(loss, x, y, weight)
    return status("VmHWM") - before


def interval(ratios: list[float]) -> str:
    """Median and its 95 % bootstrap interval."""
    draws = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--losses", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--peak", nargs=2, metavar=("LOSS", "TOOL"), help="print the peak memory of one, and end")
    parser.add_argument("--no-errors", action="store_true", help="leave out the float64 gradients")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    classes = arguments.classes
    if arguments.peak:
        print(peak(*arguments.peak, classes))
        return

    print(f"{platform.machine()}, torch {torch.__version__}, one thread each, {arguments.rounds} rounds, CPU time")
    for name in arguments.losses:
        tools, (x, y, weight) = TOOLS[name], case(classes)
        order = list(tools)
        seconds: dict[str, list[float]] = {tool: [] for tool in order}
        values: dict[str, float] = {}
        for turn in range(arguments.rounds + 1):
            for i in range(len(order)):
                tool = order[(turn + i) % len(order)]
                started = time.process_time()
                values[tool] = step(tools[tool], x, y, weight)
                seconds[tool].append(time.process_time() - started)
        print(f"\n{name}, {classes:,} classes, batch {BATCH}, {WIDTH} numbers")
        print(f"{'':24}{'ms':>8}  {'times vicinal':20}{'MB':>6}  {'loss':>8}  error")
        for tool in order:
            ratios = [t / v for t, v in zip(seconds[tool][1:], seconds["vicinal"][1:], strict=True)]
            command = [sys.executable, __file__, "--classes", str(classes), "--peak", name, tool]
            megabytes = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            error = "" if arguments.no_errors else errors(name, tool, classes)
            middle = 1000 * statistics.median(seconds[tool][1:])
            row = f"{tool:24}{middle:8.0f}  {interval(ratios):20}{megabytes:6.0f}  {values[tool]:8.4f}  {error}"
            print(row, flush=True)
        PEERS.clear()


if __name__ == "__main__":
    main()
