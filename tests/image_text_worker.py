"""One of several processes: `python image_text_worker.py OUT LOSS ...`, its rank in the environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vicinal.losses.contrastive import InfoNCE, SigLIP
from vicinal.training.devices import leave
from vicinal.training.image_text import ImageTextObjective
from vicinal.types import Batch

CAPTIONS = ["rose", "tulip", "rose", "daisy", "lily", "lily", "iris", "aster"]  # some in both shares, some in one
LABELS = [0, 1, 2, 3, 3, 4, 5, -1]


class Encoder(nn.Module):
    """As much of an image-text encoder as an objective needs."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8))
        self.text = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 8))

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[ord(letter) % 32 / 16 - 1 for letter in f"{text:6}"[:6]] for text in texts])

    def encode_image(self, images: Tensor) -> Tensor:
        embeddings: Tensor = self.image(images)
        return embeddings

    def encode_text(self, texts: Sequence[str]) -> Tensor:
        embeddings: Tensor = self.text(self.tokenize(texts))
        return embeddings


def main(out: Path, loss: str) -> None:
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    criterion = {
        "infonce": lambda: InfoNCE(scale=8.0),
        "infonce, positives": lambda: InfoNCE(scale=8.0, equal="multi_positive"),
        "siglip": lambda: SigLIP(scale=8.0, bias=-2.0),
        "siglip, masked": lambda: SigLIP(scale=8.0, bias=-2.0, equal="mask"),
    }[loss]()
    objective = ImageTextObjective(Encoder(), criterion, retention=0.5)  # type: ignore[arg-type]
    with torch.no_grad():  # so that retention has something to hold
        for parameter in objective.encoder.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    model: nn.Module = objective
    if processes > 1:
        model = DistributedDataParallel(objective)
    images = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    own = slice(8 * rank // processes, 8 * (rank + 1) // processes)
    batch: Batch = {"image": images[own], "text": CAPTIONS[own], "label": torch.tensor(LABELS[own])}
    parts = model(batch)
    parts["loss"].backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.requires_grad}
    values = {name: value.detach() for name, value in parts.items() if name != "embeddings"}
    torch.save({"gradients": gradients, "values": values}, out / f"rank{rank}.pt")


if __name__ == "__main__":
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo")  # once: a second store on the port would race with the first
    for name in sys.argv[2:]:
        (Path(sys.argv[1]) / name).mkdir(exist_ok=True)
        main(Path(sys.argv[1]) / name, name)
    leave()
