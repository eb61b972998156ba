"""What `HardClassSampler` costs: the neighbours of many classes, and an epoch of batches.

    python benchmarks/neighbours.py                       # 100,000 classes of 3 images, 512 numbers, 64 neighbours
    python benchmarks/neighbours.py --device cuda

Seconds of the CPU (on a GPU elapsed), once for each thing: the first takes long enough. Vectors are random directions
about a random direction of their class, which is the hard case: nothing is far away. Errors: neighbours of 200 classes
that a float64 product of all means does not give.
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    clock = time.process_time if a.device == "cpu" else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(a.classes).repeat_interleave(a.images)
    centres = torch.nn.functional.normalize(torch.randn(a.classes, a.dim, generator=generator))
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
    expected = products.topk(a.neighbours).indices
    wrong = int((nearest[some] != expected).any(1).sum())
    print(f"{platform.processor() or platform.machine()}, {a.device}, {a.threads} threads, torch {torch.__version__}")
    print(f"neighbours: {neighbours_took:.1f} s; {wrong} of {len(some)} classes differ from float64")
    print(f"an epoch of {len(batches):,} batches: {epoch_took:.1f} s")


if __name__ == "__main__":
    main()
