"""A training as a process of its own, to be killed: `python resume_worker.py IMAGES OUT STEPS [last]`.

IMAGES is a folder of class folders, or of shards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from vicinal.bring import bring_path
from vicinal.data.loader import train_batches
from vicinal.data.samplers import ShuffleSampler
from vicinal.data.transforms import train_transform
from vicinal.losses import ArcFace
from vicinal.models.adapters import LoRA, adapt
from vicinal.models.backbones import load_encoder
from vicinal.training.loop import fit
from vicinal.training.objectives import LabelObjective
from vicinal.training.optim import build_optimizer, parameter_groups, warmup_cosine
from vicinal.types import Batch


def main(images: Path, out: Path, steps: int, resume: str | None) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    manifest = bring_path(images)[1]
    encoder = adapt(load_encoder("timm:test_vit", size=32, random_init=True), LoRA(rank=4, dropout=0.2))
    objective = LabelObjective(encoder, ArcFace(encoder.embedding_dim, len(manifest.classes), margin=0.2, scale=16.0))
    transform = train_transform(encoder.preprocess, "standard")
    sampler = ShuffleSampler(len(manifest), 8, seed=3)

    def batches(start: int) -> Iterator[Batch]:
        return train_batches(manifest, transform, sampler, seed=3, workers=2, start_step=start)

    def evaluate() -> dict[str, float]:
        with torch.no_grad():
            return {"map@r": encoder.encode_image(torch.ones(2, 3, 32, 32)).std().item()}

    optimizer = build_optimizer("adamw", parameter_groups(objective, lr=1e-2, weight_decay=0.01))
    torch.manual_seed(3)
    fit(
        objective,
        batches,
        optimizer,
        warmup_cosine(optimizer, steps=steps, warmup=3),
        steps=steps,
        evaluate=evaluate,
        evaluate_every=9,
        checkpoint_every=4,
        out=out,
        ema=0.9,
        accumulate=2,
        resume=resume,
        log_every=1,
        progress=False,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] if len(sys.argv) > 4 else None)
