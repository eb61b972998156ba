"""Steps of training ViT-Tiny with ArcFace: `vicinal.training.fit` against the plain loop one would write by hand.

    python benchmarks/training_step.py                              # LoRA and full tuning, bf16 and fp32
    python benchmarks/training_step.py --methods lora --parts       # what each part of the gain is worth

The plain loop: timm's model with fused attention, peft's LoRA (rank 8, attention and MLP), torch.autocast, AdamW,
clipping, the same ArcFace. Both take the same batches from memory (decoding is measured elsewhere), start from the same
weights, and follow the same schedule; their last losses stand in the table, so that one sees it is the same training.

A round runs each way once, in turning order; the ratio is the median over rounds of time(plain) / time(vicinal), its
interval the 95 % percentile bootstrap over rounds. The first round warms up and is left out.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import timm
import torch
from torch import nn

from vicinal.losses import ArcFace
from vicinal.models.adapters import Full, LoRA, adapt
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.models.modules import FoldedLinear, plain_attention, prepare_for
from vicinal.training.loop import fit
from vicinal.training.objectives import LabelObjective
from vicinal.training.optim import build_optimizer, parameter_groups, warmup_cosine
from vicinal.types import Batch

CLASSES, BATCH, LR = 512, 64, 1e-3
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def batches(size: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randn(BATCH, 3, size, size, generator=generator),
            "label": torch.randint(CLASSES, (BATCH,), generator=generator),
        }
        for _ in range(4)
    ]


def plain_model(start: Encoder, size: int, method: str) -> nn.Module:
    """What one writes by hand: timm and peft."""
    from peft import LoraConfig, get_peft_model

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=size)
    model.load_state_dict(start.model.state_dict())
    if method == "lora":
        targets = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    return model


def class_loss() -> ArcFace:
    torch.manual_seed(1)
    return ArcFace(192, CLASSES, margin=0.3, scale=20.0)


def plain_loop(
    model: nn.Module, data: list[Batch], steps: int, precision: str, within: AbstractContextManager[object]
) -> float:
    """Seconds are the caller's; the answer is the last loss."""
    criterion = class_loss()
    encoder = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": encoder, "lr": LR}, {"params": criterion.parameters(), "lr": 10 * LR}], weight_decay=0.0
    )
    scheduler = warmup_cosine(optimizer, steps=steps, warmup=1)
    model.train()
    loss = torch.zeros(())
    with within:
        for _, batch in zip(range(steps), itertools.cycle(data), strict=False):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                embeddings = model(batch["image"])
                loss = criterion(embeddings, batch["label"])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*encoder, *criterion.parameters()], 1.0)
            optimizer.step()
            scheduler.step()
    return float(loss.detach())


def vicinal_loop(encoder: Encoder, data: list[Batch], steps: int, precision: str) -> float:
    objective = LabelObjective(encoder, class_loss())
    optimizer = build_optimizer("adamw", parameter_groups(objective, lr=LR, weight_decay=0.0))

    def stream(start_step: int) -> Iterator[Batch]:
        return itertools.islice(itertools.cycle(data), start_step, None)

    schedule = warmup_cosine(optimizer, steps=steps, warmup=1)
    result = fit(
        objective,
        stream,
        optimizer,
        schedule,
        steps=steps,
        evaluate=None,
        precision=precision,
        progress=False,
        log_every=1,
    )
    return float(result.history[-1]["loss"])


def folded(encoder: Encoder) -> AbstractContextManager[object]:
    """`prepare_for` without the attention: in float32 it folds alone."""
    assert any(FoldedLinear.takes(module) for module in encoder.modules())
    return prepare_for(encoder, "cpu", torch.float32)


def ways(
    start: Encoder, size: int, method: str, precision: str, steps: int, parts: bool
) -> dict[str, Callable[[], float]]:
    data = batches(size)
    model = plain_model(start, size, method)
    adapted = adapt(start, LoRA(rank=8) if method == "lora" else Full())

    def alone(within: Callable[[Encoder], AbstractContextManager[object]]) -> Callable[[], float]:
        def run() -> float:
            encoder = copy.deepcopy(adapted)
            return plain_loop(encoder, data, steps, precision, within(encoder))

        return run

    found = {
        "plain": lambda: plain_loop(copy.deepcopy(model), data, steps, precision, nullcontext()),
        "vicinal": lambda: vicinal_loop(copy.deepcopy(adapted), data, steps, precision),
    }
    if parts:
        found["plain attention alone"] = alone(lambda encoder: plain_attention(encoder, True))
        if method == "lora":
            found["folded alone"] = alone(folded)
    return found


def measure(found: dict[str, Callable[[], float]], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    seconds: dict[str, list[float]] = {name: [] for name in found}
    losses: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name in list(found) if turn % 2 else reversed(list(found)):
            began = time.perf_counter()
            losses[name] = found[name]()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds, losses


def ratio(plain: list[float], other: list[float]) -> tuple[float, float, float]:
    ratios = np.array(plain) / np.array(other)
    draws = np.random.default_rng(0).choice(ratios, (5000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], choices=list(DTYPES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[112, 224])
    parser.add_argument("--steps", type=int, default=4, help="in a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--parts", action="store_true", help="measure each part of the gain too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("vicinal.training").setLevel(logging.ERROR)  # random weights see noise all alike: a collapse
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"batch {BATCH}, {arguments.steps} steps a round, {arguments.rounds} rounds")
    print("| method | px | precision | way | ms a step | times the plain loop's speed | last loss |")
    print("|---|---|---|---|---|---|---|")
    for size, method, precision in itertools.product(arguments.sizes, arguments.methods, arguments.precisions):
        torch.manual_seed(0)
        start = load_encoder("timm:vit_tiny_patch16_224", size=size, random_init=True)
        found = ways(start, size, method, precision, arguments.steps, arguments.parts)
        seconds, losses = measure(found, arguments.rounds)
        for name, taken in seconds.items():
            value, low, high = ratio(seconds["plain"], taken)
            speed = "" if name == "plain" else f"{value:.2f} [{low:.2f}, {high:.2f}]"
            milliseconds = 1000 * statistics.median(taken) / arguments.steps
            row = (method, size, precision, name, f"{milliseconds:.0f}", speed, f"{losses[name]:.3f}")
            print("|", " | ".join(str(cell) for cell in row), "|", flush=True)


if __name__ == "__main__":
    main()
