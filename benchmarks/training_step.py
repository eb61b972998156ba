"""Steps of training ViT-Tiny with ArcFace: `vicinal.training.fit` against the plain loop one would write by hand.

    python benchmarks/training_step.py                              # LoRA and full tuning, bf16 and fp32
    python benchmarks/training_step.py --methods lora --parts       # what each part of the gain is worth
    python benchmarks/training_step.py --methods prompts proxies --memory

The plain loop: timm's model with fused attention, peft's LoRA (rank 8, attention and MLP), torch.autocast, AdamW,
clipping, the same ArcFace. Both take the same batches from memory (decoding is measured elsewhere), start from the same
weights, and follow the same schedule; their last losses stand in the table, so that one sees it is the same training.
With prompts, the plain loop concatenates them in front of each block and cuts them off behind it; with semantic
proxies it runs the tower a second time, on the prompts of the images' classes, which are one parameter of AdamW, and a
GRU written out. There the rows of classes that are absent move on in AdamW, so the losses part a little.

A round runs each way once, in turning order; the ratio is the median over rounds of time(plain) / time(vicinal), its
interval the 95 % percentile bootstrap over rounds. The first round warms up and is left out. Time is that of the CPU.
Memory is the peak above what is held before the first step, batches and imports included, each way in a process of its
own. Freed memory goes back at once there (glibc's thresholds at 64 KB), or the peak would be that of what the allocator
keeps, which changes from run to run.
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
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from vicinal.losses import ArcFace
from vicinal.models.adapters import Full, LoRA, VisualPrompt, adapt
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.models.modules import FoldedLinear, plain_attention, prepare_for
from vicinal.training.loop import fit
from vicinal.training.objectives import LabelObjective
from vicinal.training.optim import build_optimizer, parameter_groups, warmup_cosine
from vicinal.training.semantic_proxies import RowAdam, SemanticProxies
from vicinal.types import Batch

CLASSES, BATCH, LR = 512, 64, 1e-3
PROMPTS, CLASS_PROMPTS = 10, 3
METHODS = {"lora": LoRA(rank=8), "full": Full(), "prompts": VisualPrompt(PROMPTS), "proxies": VisualPrompt(PROMPTS)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def batches(size: int, images: int = BATCH) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "image": torch.randn(images, 3, size, size, generator=generator),
            "label": torch.randint(CLASSES, (images,), generator=generator),
        }
        for _ in range(4)
    ]


class PlainPrompts(nn.Module):
    """timm's ViT with prompts in front of each block, as one writes it."""

    def __init__(self, model: nn.Module, prompts: list[Tensor]) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.prompts = nn.ParameterList(prompts)

    def forward(self, images: Tensor, own: list[Tensor] | None = None) -> Tensor:
        """The class token; `own` prompts are those of each image."""
        x = self.model._pos_embed(self.model.patch_embed(images))
        for block, prompt in zip(self.model.blocks, own or self.prompts, strict=True):
            prompt = prompt if own else prompt.expand(len(x), -1, -1)
            x = block(torch.cat([prompt.to(x.dtype), x], 1))[:, prompt.shape[1] :]
        return self.model.norm(x)[:, 0]


class PlainProxies(nn.Module):
    """Semantic proxies as one writes them: the tower twice, class prompts as one parameter, a GRU, Proxy-Anchor."""

    def __init__(self, tower: PlainPrompts, like: SemanticProxies) -> None:
        super().__init__()
        self.tower = tower
        blocks = len(tower.prompts)
        start = like.table.table[:, : like.table.numbers].view(CLASSES, blocks, CLASS_PROMPTS, -1)
        self.class_prompts = nn.Parameter(start.clone())
        self.gru = copy.deepcopy(like.accumulator)
        self.learnt = nn.Parameter(like.criterion.weight.detach().clone())
        self.known = like.stored.clone()

    def forward(self, batch: Batch) -> Tensor:
        """The loss."""
        images, labels = batch["image"], batch["label"]
        x = self.tower(images)
        p = self.tower(images, list(self.class_prompts[labels].unbind(1)))
        with torch.autocast("cpu", enabled=False):
            known = self.known.clone()
            for embedding, label in zip(nn.functional.normalize(p.float()), labels.tolist(), strict=True):
                state, gru = known[label], self.gru
                z, r, n = gru.input(embedding).chunk(3)
                of_z, of_r, of_n = gru.hidden(state).chunk(3)
                z, r = torch.sigmoid(z + of_z), torch.sigmoid(r + of_r)
                state = z * state + (1 - z) * torch.relu(n + r * of_n)
                known = known.index_put((torch.tensor(label),), state)
            known = nn.functional.normalize(known)
            proxies = nn.functional.normalize(0.5 * self.learnt + 0.5 * known)
            cosine = nn.functional.normalize(x.float()) @ proxies.T
            own = nn.functional.one_hot(labels, CLASSES).bool()
            pull = torch.where(own, torch.exp(-32 * (cosine - 0.1)), 0).sum(0)
            push = torch.where(own, 0, torch.exp(32 * (cosine + 0.1))).sum(0)
            loss = torch.log1p(pull).sum() / own.any(0).sum() + torch.log1p(push).mean()
        self.known = known.detach()
        return loss


def plain_model(start: Encoder, size: int, method: str, adapted: Encoder) -> nn.Module:
    """What one writes by hand: timm and peft."""
    from peft import LoraConfig, get_peft_model

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=size)
    model.load_state_dict(start.model.state_dict())
    if method in ("prompts", "proxies"):
        tower = PlainPrompts(model, [nn.Parameter(p.detach().clone()) for p in adapted.prompts.tokens])
        return tower if method == "prompts" else PlainProxies(tower, semantic_proxies(adapted))
    if method == "lora":
        targets = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    return model


def semantic_proxies(encoder: Encoder) -> SemanticProxies:
    torch.manual_seed(2)
    return SemanticProxies(encoder, CLASSES, VisualPrompt(CLASS_PROMPTS))


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
                if isinstance(model, PlainProxies):
                    loss = model(batch)
                else:
                    loss = criterion(model(batch["image"]), batch["label"])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([*encoder, *criterion.parameters()], 1.0)
            optimizer.step()
            scheduler.step()
    return float(loss.detach())


def vicinal_loop(encoder: Encoder, data: list[Batch], steps: int, precision: str, method: str) -> float:
    objective = semantic_proxies(encoder) if method == "proxies" else LabelObjective(encoder, class_loss())
    rates = {"lr": LR, "loss_lr": LR if method == "proxies" else 10 * LR}
    optimizer = build_optimizer("adamw", parameter_groups(objective, **rates, weight_decay=0.0))
    if isinstance(objective, SemanticProxies):
        optimizer = RowAdam(optimizer, objective.table, lr=LR)

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
    start: Encoder, size: int, method: str, precision: str, steps: int, parts: bool, images: int = BATCH
) -> dict[str, Callable[[], float]]:
    data = batches(size, images)
    torch.manual_seed(3)
    adapted = adapt(start, METHODS[method])
    model = plain_model(start, size, method, adapted)

    def alone(within: Callable[[Encoder], AbstractContextManager[object]]) -> Callable[[], float]:
        def run() -> float:
            encoder = copy.deepcopy(adapted)
            return plain_loop(encoder, data, steps, precision, within(encoder))

        return run

    found = {
        "plain": lambda: plain_loop(copy.deepcopy(model), data, steps, precision, nullcontext()),
        "vicinal": lambda: vicinal_loop(copy.deepcopy(adapted), data, steps, precision, method),
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
            began = time.process_time()
            losses[name] = found[name]()
            if turn:
                seconds[name].append(time.process_time() - began)
    return seconds, losses


def peak(way: str, size: int, method: str, precision: str) -> float:
    """MB above what is held before the first step, in the process that calls this."""
    torch.manual_seed(0)
    start = load_encoder("timm:vit_tiny_patch16_224", size=size, random_init=True)
    step = ways(start, size, method, precision, 2, False)[way]
    for small in ways(start, size, method, precision, 2, False, images=2).values():
        small()  # imports what it needs, and makes what every thread keeps
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = held("VmRSS")
    step()
    return held("VmHWM") - before


def held(what: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most so far; what getrusage gives may be its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e6


def peak_apart(way: str, size: int, method: str, precision: str, threads: int) -> float:
    command = [sys.executable, __file__, "--threads", str(threads), "--peak", way, str(size), method, precision]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    return float(
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()[-1]
    )


def ratio(plain: list[float], other: list[float]) -> tuple[float, float, float]:
    ratios = np.array(plain) / np.array(other)
    draws = np.random.default_rng(0).choice(ratios, (5000, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["lora", "full"], choices=list(METHODS))
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp32"], choices=list(DTYPES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[112, 224])
    parser.add_argument("--steps", type=int, default=4, help="in a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--parts", action="store_true", help="measure each part of the gain too")
    parser.add_argument("--memory", action="store_true", help="measure the peak of memory too")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("vicinal.training").setLevel(logging.ERROR)  # random weights see noise all alike: a collapse
    if arguments.peak:
        way, size, method, precision = arguments.peak
        print(peak(way, int(size), method, precision))
        return
    print(f"{platform.processor() or platform.machine()}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"batch {BATCH}, {arguments.steps} steps a round, {arguments.rounds} rounds")
    print("| method | px | precision | way | ms a step | times the plain loop's speed | last loss | peak MB |")
    print("|---|---|---|---|---|---|---|---|")
    for size, method, precision in itertools.product(arguments.sizes, arguments.methods, arguments.precisions):
        torch.manual_seed(0)
        start = load_encoder("timm:vit_tiny_patch16_224", size=size, random_init=True)
        found = ways(start, size, method, precision, arguments.steps, arguments.parts)
        seconds, losses = measure(found, arguments.rounds)
        for name, taken in seconds.items():
            value, low, high = ratio(seconds["plain"], taken)
            speed = "" if name == "plain" else f"{value:.2f} [{low:.2f}, {high:.2f}]"
            milliseconds = 1000 * statistics.median(taken) / arguments.steps
            measured = arguments.memory and name in ("plain", "vicinal")
            memory = f"{peak_apart(name, size, method, precision, arguments.threads):.0f}" if measured else ""
            row = (method, size, precision, name, f"{milliseconds:.0f}", speed, f"{losses[name]:.3f}", memory)
            print("|", " | ".join(str(cell) for cell in row), "|", flush=True)


if __name__ == "__main__":
    main()
