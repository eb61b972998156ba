"""One of several trainings: `python grad_cache_worker.py OUT MICRO_BATCH LOSS ...`, its rank in the environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from torch import nn

import image_text_worker
import processes_worker
from vicinal.losses import ArcFace, NTXent, SupCon
from vicinal.losses.contrastive import InfoNCE, SigLIP
from vicinal.training.devices import leave
from vicinal.training.image_text import ImageTextObjective
from vicinal.training.loop import fit
from vicinal.training.objectives import LabelObjective
from vicinal.training.optim import build_optimizer, parameter_groups, warmup_cosine
from vicinal.types import Batch

STEPS, BATCH = 3, 12
CAPTIONS = ["rose", "tulip", "daisy", "lily", "iris", "aster", "poppy", "violet"]


def objective_of(loss: str) -> nn.Module:
    torch.manual_seed(0)
    if loss in ("infonce", "siglip"):
        criterion = InfoNCE(scale=8.0) if loss == "infonce" else SigLIP(scale=8.0, bias=-2.0)
        objective = ImageTextObjective(image_text_worker.Encoder(), criterion, retention=0.5)  # type: ignore[arg-type]
    else:
        of_labels = {"ntxent": NTXent, "supcon": SupCon, "arcface": lambda: ArcFace(8, 4, scale=16.0)}[loss]()
        objective = LabelObjective(processes_worker.Encoder(), of_labels, retention=0.5)  # type: ignore[arg-type,assignment]
    with torch.no_grad():  # so that retention has something to hold
        for parameter in objective.encoder.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return objective


def main(out: Path, micro_batch: int | None, loss: str) -> None:
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    objective = objective_of(loss)

    def batches(start: int) -> Iterator[Batch]:
        for step in count(start):
            g = torch.Generator().manual_seed(step)
            images, labels = torch.randn(BATCH, 3, 2, 2, generator=g), torch.arange(BATCH) % 4
            text = [CAPTIONS[i] for i in torch.randint(len(CAPTIONS), (BATCH,), generator=g).tolist()]
            own = slice(BATCH * rank // processes, BATCH * (rank + 1) // processes)
            batch: Batch = {"image": images[own], "label": labels[own]}
            if loss in ("infonce", "siglip"):
                batch = {"image": images[own], "text": text[own]}
            yield batch

    optimizer = build_optimizer("sgd", parameter_groups(objective, lr=0.05))
    result = fit(
        objective,
        batches,
        optimizer,
        warmup_cosine(optimizer, steps=STEPS),
        steps=STEPS,
        accumulate=2,
        micro_batch=micro_batch,
        precision="fp32",
        progress=False,
        log_every=1,
    )
    weights = {name: p.detach() for name, p in objective.named_parameters() if p.requires_grad}
    kept = {"weights": weights, "losses": [row["loss"] for row in result.history]}
    torch.save(kept | {"norms": [row["grad_norm"] for row in result.history]}, out / f"{loss}-rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[3:]:
        main(Path(sys.argv[1]), int(sys.argv[2]) or None, name)
    leave()
