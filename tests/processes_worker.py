"""One of several training processes: `python processes_worker.py OUT LOSS ACCUMULATE`, its rank in the environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from torch import Tensor, nn

from vicinal.losses import ArcFace, NTXent
from vicinal.training.devices import leave
from vicinal.training.loop import fit
from vicinal.training.objectives import LabelObjective
from vicinal.training.optim import build_optimizer, parameter_groups, warmup_cosine
from vicinal.types import Batch

STEPS = 6


class Encoder(nn.Module):
    """As much of an encoder as an objective needs."""

    embedding_dim = 8

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8))
        self.drawn: list[float] = []

    def encode_image(self, images: Tensor) -> Tensor:
        self.drawn.append(torch.rand(1).item())  # as dropout would
        embeddings: Tensor = self.layers(images)
        return embeddings


def main(out: Path, loss: str, accumulate: int) -> None:
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    encoder = Encoder()
    objective = LabelObjective(encoder, NTXent() if loss == "ntxent" else ArcFace(8, 4, scale=16.0))  # type: ignore[arg-type]

    def batches(start: int) -> Iterator[Batch]:
        for step in count(start):
            g = torch.Generator().manual_seed(step)
            images, labels = torch.randn(16, 3, 2, 2, generator=g), torch.arange(16) // 4
            share = slice(16 * rank // world_size, 16 * (rank + 1) // world_size)
            yield {"image": images[share], "label": labels[share]}

    def evaluate() -> dict[str, float]:
        assert rank == 0  # the others are told
        return {"map@r": objective.encoder.layers[1].weight.sum().item()}

    optimizer = build_optimizer("sgd", parameter_groups(objective, lr=0.05))
    schedule = warmup_cosine(optimizer, steps=STEPS)
    settings = {"steps": STEPS, "evaluate_every": 2, "accumulate": accumulate, "log_every": 1}
    result = fit(
        objective,
        batches,
        optimizer,
        schedule,
        evaluate=evaluate,
        out=out,
        precision="fp32",
        progress=False,
        **settings,
    )
    weights = {name: p.detach() for name, p in objective.named_parameters()}
    torch.save({"weights": weights, "best": result.best_value, "drawn": encoder.drawn}, out / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    leave()
