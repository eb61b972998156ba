"""Leave-one-out retrieval metrics: vicinal against faiss with numpy, and pytorch-metric-learning.

    python benchmarks/retrieval.py                                  # 20,000 and 60,502 embeddings, 5 a class; 6,000, 60
    python benchmarks/retrieval.py --cases 20000x5 --rounds 5

Every tool computes recall@1, map@r and r_precision (vicinal and faiss recall@5 and @10 too) of unit vectors of 512
numbers: class centres at random, and noise of such a length that map@r is near a half. A round runs each tool once, in
turning order, in one process, with one thread each, in CPU time; the ratio is the median over rounds of time(peer) /
time(vicinal), its interval the 95 % percentile bootstrap over rounds. The first round warms up and is left out. Memory
is the peak above what imports, embeddings and a small first call hold, each tool in a process of its own. `error` is
the largest distance of a metric from that of float64 products: all tools rank in float32, where a pair within 1e-7 of
each other may fall either way.
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
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

WIDTH = 512
CASES = {
    "20000x5": (20_000, 5, 2.2),
    "60502x5": (60_502, 5, 2.12),
    "6000x60": (6_000, 60, 2.6),
}  # items, a class, noise
Values = dict[str, float]


def clusters(case: str) -> tuple[Tensor, Tensor]:
    items, per_class, noise = CASES[case]
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(items) // per_class
    centres = normalize(torch.randn(int(labels[-1]) + 1, WIDTH, generator=generator), dim=1)
    vectors = normalize(torch.randn(items, WIDTH, generator=generator), dim=1).mul_(noise).add_(centres[labels])
    order = torch.randperm(items, generator=generator)
    return normalize(vectors, dim=1)[order], labels[order]


def vicinal(x: Tensor, y: Tensor) -> Values:
    from vicinal.evaluation.metrics import retrieval_values

    values = retrieval_values(x, y, x, y, exclude=torch.arange(len(y)))
    return {name: float(value.double().nanmean()) for name, value in values.items()}


def faiss_numpy(x: Tensor, y: Tensor) -> Values:
    import faiss

    faiss.omp_set_num_threads(1)
    labels = y.numpy()
    count = np.bincount(labels)[labels] - 1
    index = faiss.IndexFlatIP(WIDTH)
    index.add(x.numpy())
    found = index.search(x.numpy(), max(10, int(count.max())) + 1)[1]
    others = found != np.arange(len(labels))[:, None]
    others[others.all(1), -1] = False  # the query itself was not among them: drop the last
    found = found[others].reshape(len(labels), -1)
    return summary(labels[found] == labels[:, None], count)


def summary(relevant: NDArray[np.bool_], count: NDArray[np.int64]) -> Values:
    """Metrics from ranked relevance, in numpy."""
    relevant, count = relevant[count > 0], count[count > 0]
    hits = relevant & (np.arange(relevant.shape[1]) < count[:, None])
    precision = hits.cumsum(1) / np.arange(1, relevant.shape[1] + 1)
    values = {f"recall@{k}": float(relevant[:, :k].any(1).mean()) for k in (1, 5, 10)}
    values["map@r"] = float(((precision * hits).sum(1) / count).mean())
    values["r_precision"] = float((hits.sum(1) / count).mean())
    return values


def metric_learning(x: Tensor, y: Tensor) -> Values:
    import faiss
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    faiss.omp_set_num_threads(1)
    names = {"precision_at_1": "recall@1", "mean_average_precision_at_r": "map@r", "r_precision": "r_precision"}
    calculator = AccuracyCalculator(include=tuple(names), k="max_bin_count", device=torch.device("cpu"))
    return {names[name]: value for name, value in calculator.get_accuracy(x, y).items()}


TOOLS: dict[str, Callable[[Tensor, Tensor], Values]] = {
    "vicinal": vicinal,
    "faiss+numpy": faiss_numpy,
    "pytorch-metric-learning": metric_learning,
}


def reference(x: Tensor, y: Tensor) -> Values:
    """The same in float64."""
    count = torch.bincount(y)[y] - 1
    depth, wide = max(10, int(count.max())), x.double()
    relevant = []
    for start in range(0, len(y), 500):
        similarity = wide[start : start + 500] @ wide.T
        rows = torch.arange(len(similarity))
        similarity[rows, start + rows] = -torch.inf
        relevant.append(y[similarity.topk(depth, dim=1).indices] == y[start : start + 500, None])
    return summary(torch.cat(relevant).numpy(), count.numpy())


def status(field: str) -> float:
    """Megabytes of this process, from /proc."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) / 1024


def peak(tool: str, case: str) -> float:
    """Megabytes above what imports, embeddings and a first small call hold."""
    x, y = clusters(case)
    TOOLS[tool](x[:5000].clone(), y[:5000].clone())
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    TOOLS[tool](x, y)
    return status("VmHWM") - before


def interval(ratios: list[float]) -> str:
    """Median and its 95 % bootstrap interval."""
    draws = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--no-reference", action="store_true", help="leave out the float64 products")
    parser.add_argument("--peak", nargs=2, metavar=("TOOL", "CASE"), help="print the peak memory of one, and end")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(peak(*arguments.peak))
        return

    print(f"{platform.machine()}, torch {torch.__version__}, one thread each, {arguments.rounds} rounds, CPU time")
    for case in arguments.cases:
        x, y = clusters(case)
        seconds: dict[str, list[float]] = {tool: [] for tool in arguments.tools}
        values: dict[str, Values] = {}
        for turn in range(arguments.rounds + 1):
            for i in range(len(arguments.tools)):
                tool = arguments.tools[(turn + i) % len(arguments.tools)]
                started = time.process_time()
                values[tool] = TOOLS[tool](x, y)
                seconds[tool].append(time.process_time() - started)
        truth = values[arguments.tools[0]] if arguments.no_reference else reference(x, y)
        print(f"\n{case}: {', '.join(f'{name} {value:.7f}' for name, value in truth.items())}")
        print(f"{'':24}{'seconds':>8}  {'times vicinal':20}{'MB':>6}  error")
        for tool in arguments.tools:
            ratios = [t / v for t, v in zip(seconds[tool][1:], seconds[arguments.tools[0]][1:], strict=True)]
            command = [sys.executable, __file__, "--peak", tool, case]
            megabytes = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            error = max(abs(value - truth[name]) for name, value in values[tool].items())
            middle = statistics.median(seconds[tool][1:])
            print(f"{tool:24}{middle:8.2f}  {interval(ratios):20}{megabytes:6.0f}  {error:.1e}", flush=True)


if __name__ == "__main__":
    main()
