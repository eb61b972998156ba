"""Exact search and matching: vicinal's index against faiss's flat index, and what opening a file costs.

    python benchmarks/index.py                          # 1,000,000 x 512 in float32, k = 10; 2 GB of memory twice
    python benchmarks/index.py --items 20000 --rounds 3

Both search the same unit vectors for 1, 64 and 1,024 queries, in one process, with one thread each, in CPU time. A
round runs each tool once, in turning order; the ratio is the median over rounds of time(faiss) / time(vicinal), its
interval the 95 % percentile bootstrap over rounds. The first round warms up and is left out. `equal` is the share of
queries for which both name the same items; the others hold cosines that float32 cannot tell apart. Opening is the wall
time of `Index.load` and of reading one name, the median of 20. Matching is 1,000 queries against 10,000 references of
2,000 classes.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import faiss
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vicinal.serving.index import Index
from vicinal.serving.matching import Matcher
from vicinal.types import Embeddings

K, WIDTH, MODEL = 10, 512, "benchmark"


def unit(rows: int, seed: int) -> Tensor:
    vectors = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))
    return normalize(vectors, dim=1, out=vectors)


def interval(ratios: list[float]) -> str:
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.percentile(np.median(drawn, 1), (2.5, 97.5))
    return f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--items", type=int, default=1_000_000)
    arguments.add_argument("--queries", type=int, nargs="+", default=[1, 64, 1024])
    arguments.add_argument("--rounds", type=int, default=7)
    given = arguments.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, faiss {faiss.__version__}")

    vectors = unit(given.items, 0)
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(vectors.numpy())
    index = Index(MODEL)
    names = tuple(f"picture-{i}" for i in range(given.items))
    index.add(Embeddings(vectors, torch.zeros(given.items, dtype=torch.long), names, ("all",)), fingerprint=MODEL)
    del vectors
    for size in given.queries:
        queries = unit(size, 1)
        tools = [
            lambda q=queries: index.neighbours(q, K, fingerprint=MODEL),
            lambda q=queries: flat.search(q.numpy(), K),
        ]
        equal = float(np.mean((tools[0]()[1].numpy() == tools[1]()[1]).all(1)))
        times: list[tuple[float, float]] = []
        for turn in range(given.rounds + 1):
            took = [0.0, 0.0]
            for tool in (0, 1) if turn % 2 else (1, 0):
                took[tool] = seconds(tools[tool])
            times.append((took[0], took[1]))
        own, ratios = [t[0] for t in times[1:]], [t[1] / t[0] for t in times[1:]]
        print(
            f"{given.items:,} items, {size} queries: vicinal {statistics.median(own) * 1000:.1f} ms, times faiss "
            f"{interval(ratios)}, equal {equal:.4f}"
        )

    with tempfile.TemporaryDirectory() as folder:
        path = index.save(Path(folder) / "x.index")
        opened = []
        for _ in range(20):
            start = time.perf_counter()
            assert Index.load(path).ids[given.items - 1] == names[-1]
            opened.append(time.perf_counter() - start)
        print(f"opening {path.stat().st_size / 1e6:,.0f} MB: {statistics.median(opened) * 1000:.1f} ms")

    references = Embeddings(unit(10_000, 2), torch.arange(10_000) % 2000, tuple(map(str, range(10_000))), names[:2000])
    queries = unit(1000, 3)
    for fusion in ("max", "mean", "topk", "multi-ref"):
        matcher = Matcher(references, fingerprint=MODEL, fusion=fusion)
        took = statistics.median(seconds(lambda m=matcher: m.match(queries, fingerprint=MODEL)) for _ in range(3))
        print(f"matching 1,000 against 10,000 references, {fusion}: {took * 1000:.0f} ms")


if __name__ == "__main__":
    main()
