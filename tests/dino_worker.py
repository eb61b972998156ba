"""One of several processes with a share of a batch: `python dino_worker.py OUT`, its rank in the environment."""

from __future__ import annotations

import os
import sys
from itertools import count
from pathlib import Path

import torch

from vicinal.losses import DINO
from vicinal.models.adapters import Bottleneck, adapt
from vicinal.models.backbones import load_encoder
from vicinal.models.modules import DINOHead
from vicinal.training.devices import leave
from vicinal.training.distillation import SelfDistillation
from vicinal.training.loop import fit
from vicinal.training.optim import build_optimizer, parameter_groups, warmup_cosine

STEPS = 4


def main(out: Path) -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = adapt(load_encoder("timm:test_vit", size=32, random_init=True), Bottleneck(dim=4, dropout=0.0))
    head = DINOHead(encoder.embedding_dim, 12, hidden=16, bottleneck=8)
    objective = SelfDistillation(encoder, DINO(12), head, steps=STEPS, momentum=0.5, small_size=(16, 16))

    def batches(start: int):
        for step in count(start):
            g = torch.Generator().manual_seed(step)
            share = slice(8 * rank // world_size, 8 * (rank + 1) // world_size)
            views, crops = torch.randn(8, 2, 3, 32, 32, generator=g), torch.randn(8, 2, 3, 16, 16, generator=g)
            yield {"image": views[share, 0], "views": views[share], "crops": crops[share], "label": torch.zeros(8)}

    optimizer = build_optimizer("sgd", parameter_groups(objective, lr=0.5))
    objective.follow(optimizer)
    schedule = warmup_cosine(optimizer, steps=STEPS)
    fit(objective, batches, optimizer, schedule, steps=STEPS, out=out, precision="fp32", progress=False, log_every=1)
    weights = {name: p.detach() for name, p in objective.named_parameters() if p.requires_grad}
    buffers = {name: b for name, b in objective.named_buffers() if name.startswith(("criterion.", "teacher."))}
    torch.save({"weights": weights, "buffers": buffers}, out / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
