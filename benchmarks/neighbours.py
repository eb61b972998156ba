"""What `HardClassSampler` costs: the neighbours of many classes, and an epoch of batches.

    python benchmarks/neighbours.py                       # 100,000 classes of 3 images, 512 numbers, 64 neighbours
    python benchmarks/neighbours.py --device cuda

Seconds of the CPU (on a GPU elapsed), once for each thing: the first takes long enough. Vectors are random directions
about a random direction of their class. With `--decay 0` the classes' directions have no order at all, so nothing is
far away, and clusters say little; with the default the i-th of their principal axes has a variance of 1 / i, somewhat
as embeddings have. Of 200 classes the neighbours are compared with those by a float64 product of all means.
"""

from __future__ import annotations

import argparse
import platform
import time

import torch

from vicinal.data.samplers import HardClassSampler
from vicinal.evaluation.metrics import class_neighbours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--images", type=int, default=3, help="of each class")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--neighbours", type=int, default=64)
    parser.add_argument("--decay", type=float, default=1.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    clock = time.process_time if a.device == "cpu" else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(a.classes).repeat_interleave(a.images)
    axes = torch.arange(1, a.dim + 1) ** (-a.decay / 2)
    centres = torch.nn.functional.normalize(torch.randn(a.classes, a.dim, generator=generator) * axes)
    vectors = centres[labels] + 0.5 * torch.randn(len(labels), a.dim, generator=generator) / a.dim**0.5

    began = clock()
    nearest = class_neighbours(vectors.to(a.device), labels.to(a.device), a.neighbours).cpu()
    neighbours_took = clock() - began

    sampler = HardClassSampler(labels, nearest, classes=16, images_per_class=a.images, seed=0)
    began = clock()
    batches = sampler.epoch(0)
    epoch_took = clock() - began

    unit = torch.nn.functional.normalize(vectors)
    means = torch.nn.functional.normalize(unit.view(a.classes, a.images, a.dim).sum(1).double())
    some = torch.arange(0, a.classes, max(1, a.classes // 200))
    products = means[some] @ means.T
    products[torch.arange(len(some)), some] = -9
    expected = products.topk(a.neighbours)
    wrong = int((nearest[some] != expected.indices).any(1).sum())
    shared = [
        float((nearest[some, :n, None] == expected.indices[:, None, :n]).any(2).double().mean())
        for n in (1, 16, a.neighbours)
    ]
    reached = float(products.gather(1, nearest[some]).mean()), float(expected.values.mean())
    print(f"{platform.processor() or platform.machine()}, {a.device}, {a.threads} threads, torch {torch.__version__}")
    print(f"neighbours: {neighbours_took:.1f} s; {wrong} of {len(some)} classes differ from float64")
    print("share of the first 1, 16 and all that are found: " + ", ".join(f"{part:.3f}" for part in shared))
    print(f"mean cosine to a neighbour: {reached[0]:.3f}, to one of the exact: {reached[1]:.3f}")
    print(f"an epoch of {len(batches):,} batches: {epoch_took:.1f} s")


if __name__ == "__main__":
    main()
