"""Few-shot heads: the published grid against the published loop, a whole table of methods, memory at ImageNet's size.

    python benchmarks/heads.py                     # all three
    python benchmarks/heads.py grid --rounds 5
    python benchmarks/heads.py table
    python benchmarks/heads.py memory

grid: 100 classes x 16 shots, 5,000 validation queries of 512 numbers, 200 alphas x 20 betas. The published double loop
(torch, strict >) takes minutes, so a round times it on every 79th of its 4,000 pairs and multiplies. Its two products
of vectors, which the published code repeats for each pair, are made once and not counted. The winner to compare with
is that of the same loop over all pairs, with each beta's cache made once. vicinal is timed whole: from vectors to the
winner. One thread, CPU time; the ratio is the median over rounds, its interval the 95 % percentile bootstrap over
rounds; the first round warms up and is left out.

table: the training-free heads and the linear probe by the few-shot protocol, on cached vectors of 10,000 images: 8
methods x 5 shots x 3 seeds, 100 classes, support_cv, each cell with its interval.

memory: TipAdapter is fitted on 16,000 images of 1,000 classes and predicts 50,000; the peak above what imports and
inputs hold.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from vicinal.data.splits import kshot
from vicinal.evaluation.few_shot import Features, few_shot_scores
from vicinal.evaluation.intervals import mean
from vicinal.heads import HEADS, TipAdapter, Validation
from vicinal.heads.selection import ALPHAS, BETAS

WIDTH = 512
TABLE = ("zero_shot", "nearest_prototype", "tip_adapter", "tip_x", "ape", "gda", "proker", "linear_probe")


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


class Task:
    """Class centres, texts near them, images farther off, and one direction that all images share."""

    def __init__(self, classes: int, images: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        centres = unit(rng.normal(size=(classes, WIDTH)))
        shared = unit(rng.normal(size=(1, WIDTH)))
        self.text = unit(centres + 1.5 * unit(rng.normal(size=(classes, WIDTH))))
        self.labels = np.arange(images) % classes
        noise = unit(rng.normal(size=(images, WIDTH)))
        self.images = unit(centres[self.labels] + 4 * noise + 2 * shared)


def published_loop(task: Task, support: np.ndarray, queries: np.ndarray, every: int) -> float:
    """The seconds that all pairs would take, from every so many-th."""
    keys, values = torch.from_numpy(task.images[support]), torch.eye(len(task.text))[task.labels[support]]
    features, labels = torch.from_numpy(task.images[queries]), torch.from_numpy(task.labels[queries])
    clip_logits = 100.0 * features @ torch.from_numpy(task.text).T
    affinity = features @ keys.T
    best = 0.0
    pairs = [(beta, alpha) for beta in BETAS.tolist() for alpha in ALPHAS.tolist()]
    tried = pairs[::every]
    started = time.process_time()
    for beta, alpha in tried:
        cache_logits = ((-1) * (beta - beta * affinity)).exp() @ values
        logits = clip_logits + cache_logits * alpha
        accuracy = float((logits.topk(1, 1).indices[:, 0] == labels).float().mean())
        if accuracy > best:
            best = accuracy
    return (time.process_time() - started) / len(tried) * len(pairs)


def winner(task: Task, support: np.ndarray, queries: np.ndarray) -> tuple[float, float, float]:
    """The first best of all pairs by the plain loop, not timed."""
    features, labels = task.images[queries], task.labels[queries]
    clip_logits = 100.0 * features @ task.text.T
    affinity = features @ task.images[support].T
    values = np.eye(len(task.text), dtype=np.float32)[task.labels[support]]
    best = (0.0, 0.0, 0.0)
    for beta in BETAS.tolist():
        cache_logits = np.exp(beta * affinity - beta) @ values
        for alpha in ALPHAS.tolist():
            accuracy = float(((clip_logits + cache_logits * alpha).argmax(1) == labels).mean())
            best = max(best, (accuracy, beta, alpha), key=lambda found: found[0])  # the first of equal ones
    return best


def grid(rounds: int) -> None:
    task = Task(100, 6600)
    support, queries = np.arange(1600), np.arange(1600, 6600)
    held = Validation(task.images[queries], task.labels[queries])

    def search() -> TipAdapter:
        head = TipAdapter(policy="full_val")
        return head.fit(task.images[support], task.labels[support], text=task.text, validation=held)

    ratios, ours, theirs = [], [], []
    for turn in range(rounds + 1):
        for tool in ("vicinal", "loop") if turn % 2 else ("loop", "vicinal"):
            if tool == "loop":
                loop = published_loop(task, support, queries, 79)
                continue
            started = time.process_time()
            head = search()
            mine = time.process_time() - started
        if turn:
            ours.append(mine)
            theirs.append(loop)
            ratios.append(loop / mine)
    print(f"grid: published loop {statistics.median(theirs):.0f} s, vicinal {statistics.median(ours):.2f} s")
    print(f"      times vicinal {interval(ratios)}; accuracy {head.selection_.accuracy:.4f} at", head.selection_.values)
    accuracy, beta, alpha = winner(task, support, queries)
    print(f"      the loop's winner {accuracy:.4f} at beta {beta}, alpha {alpha}")


def table() -> None:
    """By the protocol of `vicinal fewshot`: its refusals and its intervals are part of the price."""
    task = Task(100, 10_000)
    vectors, labels, text = (torch.from_numpy(a) for a in (task.images, task.labels, task.text))
    everything = Features(vectors, labels, tuple(map(str, range(len(labels)))))
    spent = dict.fromkeys(TABLE, 0.0)
    wall = time.perf_counter()
    asked = torch.zeros(len(labels), dtype=torch.bool)
    asked[torch.from_numpy(np.random.default_rng(0).permutation(len(labels))[5000:])] = True
    queries = everything.where(asked)
    for seed in (1, 2, 3):
        for shots in (1, 2, 4, 8, 16):
            drawn = torch.zeros_like(asked)
            drawn[~asked] = kshot(labels[~asked], shots, seed=seed)
            support, row = everything.where(drawn), []
            for name in TABLE:
                started = time.process_time()
                found = few_shot_scores(HEADS[name](), support, queries, shots=shots, text=text)
                row.append(f"{mean(found.scores['test'])['accuracy']}")
                spent[name] += time.process_time() - started
            print(f"  seed {seed}, {shots:2} shots: " + " ".join(word.split()[0] for word in row), flush=True)
    print("  " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in spent.items()))
    print(f"table: {time.perf_counter() - wall:.0f} s on the clock, {sum(spent.values()):.0f} s of one core")


def status(field: str) -> float:
    """Megabytes of this process, from /proc."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(field))
    return int(line.split()[1]) / 1024


def peak() -> None:
    task = Task(1000, 66_000)
    head = TipAdapter(policy="fixed").fit(task.images[:2000], task.labels[:2000], text=task.text)
    head.predict(task.images[:100])
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before, started = status("VmRSS"), time.process_time()
    head = TipAdapter(policy="fixed").fit(task.images[:16_000], task.labels[:16_000], text=task.text)
    right = (head.predict(task.images[16_000:]) == task.labels[16_000:]).mean()
    seconds = time.process_time() - started
    print(f"memory: 50,000 x 16,000 in {seconds:.0f} s, {status('VmHWM') - before:.0f} MB; accuracy {right:.3f}")


def interval(ratios: list[float]) -> str:
    """Median and its 95 % bootstrap interval."""
    draws = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{statistics.median(ratios):.0f} [{low:.0f}, {high:.0f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="grid, table, memory; all of them if none is named")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}, numpy {np.__version__}, one thread", flush=True)
    for what in arguments.what or ("grid", "table", "memory"):
        if what == "grid":
            grid(arguments.rounds)
        elif what == "table":
            table()
        elif what == "memory":  # in a process of its own
            subprocess.run([sys.executable, __file__, "peak"], check=True)
        else:
            peak()


if __name__ == "__main__":
    main()
