"""What the tests of training share: a tiny objective, and batches that are a function of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vicinal.losses import ArcFace
from vicinal.training.optim import build_optimizer, parameter_groups, warmup_cosine
from vicinal.types import Batch

CLASSES, DIM = 5, 8


class Tiny(nn.Module):
    """Two layers, dropout and ArcFace: an objective without an Encoder, as the loop allows."""

    def __init__(self, *, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(
            nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, DIM)
        )
        self.criterion: nn.Module = ArcFace(DIM, CLASSES, margin=0.2, scale=16.0)
        self.seen: list[torch.dtype] = []

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        embeddings = self.encoder(batch["image"])
        self.seen.append(embeddings.dtype)
        return {"loss": self.criterion(embeddings, batch["label"]), "embeddings": embeddings.detach()}


def batch_at(step: int, size: int = 16) -> Batch:
    """Batch t: noisy images of five classes."""
    means = torch.randn(CLASSES, 3, 2, 2, generator=torch.Generator().manual_seed(-1 % 2**31))
    g = torch.Generator().manual_seed(step)
    label = torch.randint(CLASSES, (size,), generator=g)
    return {"image": means[label] + torch.randn(size, 3, 2, 2, generator=g), "label": label}


def batches(size: int = 16) -> Callable[[int], Iterator[Batch]]:
    """For `fit`; it draws from the global generators too, as a loader may."""

    def start(step: int) -> Iterator[Batch]:
        torch.rand(step + 3)
        for t in count(step):
            torch.rand(1)
            yield batch_at(t, size)

    return start


def optimise(
    objective: nn.Module, steps: int, *, lr: float = 1e-2, name: str = "adamw"
) -> tuple[Optimizer, LRScheduler]:
    optimizer = build_optimizer(name, parameter_groups(objective, lr=lr, weight_decay=0.05))
    return optimizer, warmup_cosine(optimizer, steps=steps, warmup=min(2, steps - 1))
