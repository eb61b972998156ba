"""The methods of adaptation on one footing: same data, same steps, same batches, selection on validation classes.

    python benchmarks/methods.py --data brands=brand_logos/table.csv emoji=emoji/table.csv \
        --model timm:vit_tiny_patch16_224@vit_tiny_patch16_224.safetensors --out runs/methods

Half of the classes is measured and never seen; a tenth of the other half is selected on. Each method is one `vicinal
train` of several seeds for each data set, and the loss is Proxy-Anchor, but for the last. What is finished is not
done again, and a command that was stopped goes on where it was: give more `--data`, `--seeds` or `--methods` later.

1. rates    each method's learning rate, on the first data set's training half alone, its classes split once more
            (seed 7): the best MAP@R of a short run for each rate in `RATES`, one seed
2. cells    method x data x seed; the test half is measured once for each, after its training
3. costs    seconds of CPU (of a GPU: elapsed) a step, in turning order; peak memory, each method in its own process
4. tables   DIR/methods.md

A stage alone: `--only rates`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vicinal.data.manifest import Manifest
from vicinal.data.splits import class_disjoint
from vicinal.data.tables import read_table, write_table
from vicinal.evaluation.intervals import mean, paired_difference
from vicinal.evaluation.scores import load_scores
from vicinal.recipe import Recipe
from vicinal.run import run
from vicinal.types import Estimate, Metrics, PerQuery

PROMPT = {"visual_prompt": {"tokens": 10}}
ANCHOR: dict[str, Any] = {"proxy_anchor": {}}
GATED = {"gru": {"keep": 0.9}}  # the authors' 0.5 came to less on the training half: docs/methods.md


def semantic(accumulator: dict[str, Any]) -> dict[str, Any]:
    return {"semantic_proxies": {"prompts": {"tokens": 3}, "share": 0.5, "accumulator": accumulator}}


@dataclass(frozen=True)
class Method:
    """What is adapted, on which loss, and the method whose learning rate it takes."""

    adapt: list[dict[str, Any]]
    loss: dict[str, Any]
    rate_of: str


METHODS = {
    "linear head": Method([{"linear_head": {}}], ANCHOR, "linear head"),
    "BitFit": Method([{"bitfit": {}}], ANCHOR, "BitFit"),
    "VPT": Method([PROMPT], ANCHOR, "VPT"),
    "VPT + BitFit": Method([PROMPT, {"bitfit": {}}], ANCHOR, "VPT"),
    "bottleneck": Method([{"bottleneck": {"dim": 64}}], ANCHOR, "bottleneck"),
    "LoRA": Method([{"lora": {"rank": 8}}], ANCHOR, "LoRA"),
    "full": Method([{"full": {}}], ANCHOR, "full"),
    "VPTSP-G": Method([PROMPT], semantic(GATED), "VPTSP-G"),
    "VPTSP-G + BitFit": Method([PROMPT, {"bitfit": {}}], semantic(GATED), "VPTSP-G"),
    "VPTSP-M": Method([PROMPT], semantic({"ema": {}}), "VPTSP-M"),
    "VPT, ArcFace": Method([PROMPT], {"arcface": {"margin": 0.3, "scale": 20.0}}, "VPT"),
}
RATES = {  # wider on the side where the best of the first two lay at the edge
    "linear head": (1e-3, 3e-3, 1e-2),
    "BitFit": (1e-3, 3e-3, 1e-2),
    "VPT": (1e-3, 3e-3, 1e-2),
    "bottleneck": (1e-3, 3e-3, 1e-2),
    "LoRA": (1e-3, 2e-3, 4e-3),
    "full": (1e-4, 3e-4, 1e-3),
    "VPTSP-G": (1e-4, 3e-4, 1e-3),
    "VPTSP-M": (1e-4, 3e-4, 1e-3),
}
PROXY_RATE = 1e-2  # of the learnt ones beside semantic proxies, whatever the rate, as the authors have it
PAIRS = [
    ("VPT", "VPTSP-G"),
    ("VPT + BitFit", "VPTSP-G + BitFit"),
    ("VPT, ArcFace", "VPTSP-G"),
    ("VPT", "VPTSP-M"),
    ("VPTSP-G", "VPTSP-M"),
    ("VPT", "VPT + BitFit"),
    ("VPT", "LoRA"),
    ("VPTSP-G + BitFit", "LoRA"),
]
METRICS = ("recall@1", "map@r")


def recipe(name: str, data: dict[str, Any], rate: float, a: argparse.Namespace, **changes: object) -> Recipe:
    method = METHODS[name]
    content = {
        "data": data | {"leaks": "drop"},
        "split": {"class_disjoint": {"holdout": 0.5, "seed": 42, "val": 0.1, "seen": 0.0}},
        "model": a.model,
        "preprocess": {"size": a.size},
        "adapt": method.adapt,
        "loss": method.loss,
        "sampler": {"pk": {"classes": a.batch // 2, "images_per_class": 2}},
        "augment": a.augment,
        "steps": a.steps,
        "lr": rate,
        "loss_lr": PROXY_RATE if "semantic_proxies" in method.loss else None,  # None: ten times the rate
        "seed": 43,
        "evaluate_every": a.steps,
        "checkpoint_every": 25,
        "shots": [1],
        "draws": 1,
        "recall_at": [1],
        "workers": a.workers,
        "trackers": [],
        "device": a.device,
        "cache": str(a.out / "cache"),
    }
    return Recipe.parse(content | changes, name=name)


def done(settings: Recipe, folder: Path) -> Path:
    """The folder of the finished run; made, or gone on with, where it is not finished."""
    finished = (folder / "results.json").exists() and Recipe.load(folder / "recipe.yaml") == settings
    if not finished:
        run(settings, folder, resume="last" if any(folder.glob("**/checkpoints/*")) else None)
    return folder


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower()).replace("___", "_")


def training_half(source: str, a: argparse.Namespace) -> str:
    """The classes that the cells train on, as a table of their own."""
    table = a.out / "training_half.parquet"
    if not table.exists():
        whole: Manifest = read_table(source)
        seen, _ = class_disjoint(whole.classes, holdout=0.5, seed=42)
        kept = torch.isin(whole.labels(), torch.tensor([whole.classes.index(name) for name in seen]))
        write_table(whole.where(kept).compact(), table)
    return str(table)


def rates(sources: dict[str, str], a: argparse.Namespace) -> dict[str, float]:
    """The rate of each method that has one of its own: the best on held-out classes of the first training half."""
    file = a.out / "rates.json"
    known: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.exists() else {}
    half = {"table": training_half(next(iter(sources.values())), a)}
    split = {"class_disjoint": {"holdout": 0.5, "seed": 7, "val": 0.0, "seen": 0.0}}
    for name in dict.fromkeys(METHODS[method].rate_of for method in a.methods):
        for rate in RATES[name]:
            if str(rate) in known.get(name, {}):
                continue
            settings = recipe(name, half, rate, a, split=split, steps=a.rate_steps, evaluate_every=None)
            folder = done(settings, a.out / "rates" / slug(name) / str(rate))
            value = json.loads((folder / "results.json").read_text())["after"]["unseen"]["map@r"]["value"]
            known.setdefault(name, {})[str(rate)] = value
            file.write_text(json.dumps(known, indent=1))
    return {name: float(max(found, key=lambda rate: found[rate])) for name, found in known.items()}


def cells(sources: dict[str, str], chosen: dict[str, float], a: argparse.Namespace) -> None:
    for data, table in sources.items():
        for name in a.methods:
            settings = recipe(name, {"table": table}, chosen[METHODS[name].rate_of], a, seeds=a.seeds)
            began = time.monotonic()
            done(settings, a.out / data / slug(name))
            print(f"{data}, {name}: {time.monotonic() - began:.0f} s", flush=True)


# -------------------------------------------------------------------------------------------------------------- costs


class Bench:
    """One method on batches that lie in memory: a step of it, as the loop takes it."""

    def __init__(self, name: str, classes: int, a: argparse.Namespace) -> None:
        from vicinal.losses import PROXY_LOSSES
        from vicinal.models.adapters import VisualPrompt, adapt, adapters_from_config
        from vicinal.models.backbones import load_encoder
        from vicinal.training.objectives import LabelObjective
        from vicinal.training.optim import build_optimizer, parameter_groups
        from vicinal.training.semantic_proxies import EMAAccumulator, GRUAccumulator, RowAdam, SemanticProxies

        torch.manual_seed(0)
        self.device = torch.device("cuda" if a.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu")
        encoder = adapt(load_encoder(a.model, size=a.size), *adapters_from_config(METHODS[name].adapt))
        ((loss, settings),) = METHODS[name].loss.items()
        if loss == "semantic_proxies":
            ((kind, given),) = settings["accumulator"].items()
            accumulator = GRUAccumulator(encoder.embedding_dim, **given) if kind == "gru" else EMAAccumulator(**given)
            prompts = VisualPrompt(**settings["prompts"])
            self.objective = SemanticProxies(encoder, classes, prompts, accumulator, share=settings["share"]).to(
                self.device
            )
        else:
            proxies = PROXY_LOSSES[loss](encoder.embedding_dim, classes, **settings)
            self.objective = LabelObjective(encoder, proxies).to(self.device)
        self.optimizer = build_optimizer("adamw", parameter_groups(self.objective, lr=1e-3))
        if loss == "semantic_proxies":
            self.optimizer = RowAdam(self.optimizer, self.objective.table, lr=1e-3)
        image = torch.randn(a.batch, 3, a.size, a.size, device=self.device)
        self.batch = {"image": image.contiguous(memory_format=torch.channels_last)}
        self.batch["label"] = torch.arange(a.batch, device=self.device) // 2
        self.objective.train()

    def step(self) -> float:
        """Seconds: of the CPU, or on a GPU elapsed."""
        from vicinal.models.modules import prepare_for

        on_gpu = self.device.type == "cuda"
        clock = time.perf_counter if on_gpu else time.process_time
        began = clock()
        with prepare_for(self.objective, self.device.type, torch.bfloat16):
            with torch.autocast(self.device.type, torch.bfloat16):
                loss = self.objective(self.batch)["loss"]
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - began


def held(what: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most so far; what getrusage gives may be its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e6


def peak(name: str, classes: int, a: argparse.Namespace) -> float:
    """MB above imports and model, in the process that calls this; on a GPU all that is allocated."""
    bench = Bench(name, classes, a)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        bench.step()
        bench.step()
        return torch.cuda.max_memory_allocated() / 1e6
    table = bench.objective.table.table.nbytes / 1e6 if hasattr(bench.objective, "table") else 0.0  # of one kind alone
    before = held("VmRSS") - table
    bench.step()
    bench.step()
    return held("VmHWM") - before


def costs(classes: int, a: argparse.Namespace) -> dict[str, dict[str, float]]:
    file = a.out / "costs.json"
    if file.exists():
        known: dict[str, dict[str, float]] = json.loads(file.read_text())
        if set(known) == set(a.methods):
            return known
    benches = {name: Bench(name, classes, a) for name in a.methods}
    seconds: dict[str, list[float]] = {name: [] for name in benches}
    for turn in range(a.rounds + 1):
        for name in list(benches) if turn % 2 else reversed(list(benches)):
            taken = benches[name].step()
            if turn:
                seconds[name].append(taken)
    found = {}
    for name in benches:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name, "--peak-classes", str(classes)]
        memory = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        found[name] = {"seconds": statistics.median(seconds[name]), "megabytes": memory}
    file.write_text(json.dumps(found, indent=1))
    return found


# -------------------------------------------------------------------------------------------------------------- tables


def retrieval(folder: Path, side: str = "after") -> PerQuery:
    return load_scores(folder / "scores" / f"{side}.safetensors")["unseen"][0]


def difference(one: Path, other: Path) -> Metrics:
    """Of the seeds that both have."""
    sides = [retrieval(folder) for folder in (one, other)]
    seeds = min(len(values) for side in sides for values in side.values.values())
    cut = [PerQuery({k: v[:seeds] for k, v in side.values.items()}, side.units, side.macro) for side in sides]
    return paired_difference(*cut)


def shown(estimate: Estimate, *, signed: bool = False) -> str:
    form = "+.3f" if signed else ".3f"
    value, low, high = (format(x, form).replace("0.", ".", 1) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def short(number: float) -> str:
    return f"{number / 1e6:.2f} M" if number >= 1e5 else f"{number / 1e3:.1f} k" if number >= 1e3 else f"{number:.0f}"


def tables(sources: dict[str, str], chosen: dict[str, float], cost: dict[str, Any], a: argparse.Namespace) -> str:
    """Markdown: a table a data set of the methods that are finished, and the paired differences."""
    machine = platform.processor() or platform.machine()
    lines = [f"{machine}, torch {torch.__version__}, {a.steps} steps of {a.batch} images"]
    for data in sources:
        folders = {name: a.out / data / slug(name) for name in METHODS}
        folders = {name: folder for name, folder in folders.items() if (folder / "results.json").exists()}
        estimates = mean(retrieval(next(iter(folders.values())), "before"))
        one = estimates["map@r"]
        lines += ["", f"### {data}: {one.n} unseen classes, {one.queries:,} queries", ""]
        lines += ["| method | lr | seeds | R@1 | MAP@R | trained | of these aside | added | ms a step | peak MB |"]
        lines += ["|---|---|---|---|---|---|---|---|---|---|"]
        cells = [shown(estimates[metric]) for metric in METRICS]
        lines += [f"| not tuned | | | {' | '.join(cells)} | | | | | |"]
        for name, folder in folders.items():
            results = json.loads((folder / "results.json").read_text())
            facts, aside = results["training"], results["training"]["trained_aside"]
            estimates = mean(retrieval(folder))
            row = [name, f"{chosen[METHODS[name].rate_of]:g}", str(len(results["seeds"]))]
            row += [shown(estimates[metric]) for metric in METRICS]
            row += [short(facts["trained_parameters"] + aside), short(aside), short(facts["added_parameters"])]
            row += (
                [f"{1000 * cost[name]['seconds']:.0f}", f"{cost[name]['megabytes']:.0f}"] if name in cost else ["", ""]
            )
            lines.append(f"| {' | '.join(row)} |")
        lines += ["", "| difference | R@1 | MAP@R |", "|---|---|---|"]
        for one_name, other in PAIRS:
            if one_name in folders and other in folders:
                found = difference(folders[one_name], folders[other])
                cells = [shown(found[metric], signed=True) for metric in METRICS]
                lines.append(f"| {other} less {one_name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="NAME=TABLE")
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate-steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=32, help="two images a class")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--augment", default="drawing")
    parser.add_argument("--rounds", type=int, default=7, help="of the costs")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", choices=["rates", "cells", "costs", "tables"])
    parser.add_argument("--peak-of", choices=list(METHODS), help=argparse.SUPPRESS)
    parser.add_argument("--peak-classes", type=int, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.peak_of:
        print(peak(a.peak_of, a.peak_classes, a))
        return
    a.out.mkdir(parents=True, exist_ok=True)
    sources = dict(word.split("=", 1) for word in a.data)
    chosen = rates(sources, a)
    print("rates:", chosen, flush=True)
    if a.only in (None, "cells"):
        cells(sources, chosen, a)
    cost: dict[str, Any] = {}
    if a.only in (None, "costs"):
        cost = costs(len(read_table(next(iter(sources.values()))).classes) // 2, a)
    elif (a.out / "costs.json").exists():
        cost = json.loads((a.out / "costs.json").read_text())
    if a.only in (None, "tables"):
        text = tables(sources, chosen, cost, a)
        (a.out / "methods.md").write_text(text)
        print(text)


if __name__ == "__main__":
    main()
