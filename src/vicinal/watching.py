"""What is measured while a model learns from images and texts, and written down: is it better, and where does it stop?

    out/evaluations/step-00000500.json     each evaluation: its parts, metrics with intervals, gain over step 0
    out/evaluations.csv                    all of them, a row for each step, part and metric

Step 0 is the model before training, so its row is zero-shot; gain = value - zero-shot, relative gain = gain by
zero-shot. Two parts are measured: validation, which selects, and as many of the images that are trained on (at most
2,000, always the same), which tells learning by heart from learning. The test half takes no part.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from vicinal.data.manifest import Manifest
from vicinal.embedding import embed_text
from vicinal.evaluation.image_text import image_text
from vicinal.evaluation.scores import plain
from vicinal.ground import write_whole
from vicinal.models.encoder import Encoder
from vicinal.recipe import Recipe
from vicinal.types import Embeddings, Estimate, Metrics

__all__ = ["Watch", "found_both_ways", "some_of"]

MOST = 2000  # of the images that are trained on
COLUMNS = ("step", "part", "metric", "value", "low", "high", "n", "queries", "zero_shot", "gain", "relative_gain")


def found_both_ways(encoder: Encoder, manifest: Manifest, recipe: Recipe, images: Embeddings) -> Metrics:
    """Captions find images of their class, and images captions: protocol `full`, and the mean recall over k and ways.

    Args:
        encoder: an image-text model.
        manifest: rows without a caption are found, and ask nothing.
        recipe: its `recall_at`, `device` and `precision` are used.
        images: what the encoder makes of the images.
    """
    settings: dict[str, Any] = {"device": recipe.device, "precision": recipe.precision}
    told = [several[0] if several else "" for several in manifest.captions()]
    rows = [i for i, caption in enumerate(told) if caption]
    captions = [told[i] for i in rows]
    texts = Embeddings(
        embed_text(encoder, captions, **settings), images.labels[rows], tuple(map(str, rows)), images.classes
    )
    metrics = dict(image_text(images, texts, captions=captions, ks=tuple(recipe.recall_at)))
    recalls = [estimate for name, estimate in metrics.items() if "_recall@" in name]
    value = sum(estimate.value for estimate in recalls) / len(recalls)
    # No interval: the two ways have different queries.
    metrics["full/mean_recall"] = Estimate(value, math.nan, math.nan, n=recalls[0].n, queries=len(images) + len(texts))
    return metrics


def some_of(train: Manifest, size: int) -> Bool[Tensor, "N"]:
    """A mask of `size` labelled rows of the training, at most 2,000, always the same."""
    rows = (train.labels() >= 0).nonzero()[:, 0]
    chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: min(size, MOST)]]
    return torch.zeros(len(train), dtype=torch.bool).index_fill_(0, chosen, True)


class Watch:
    """Measures each part while a model is trained, for `fit`, and writes each evaluation down.

    Args:
        recipe: of the run.
        parts: "validation" and "train", each with its rows, and what measures the model on them as it then is.
        out: the run folder.
    """

    def __init__(self, recipe: Recipe, parts: Mapping[str, tuple[Manifest, Callable[[], Metrics]]], out: Path) -> None:
        self.recipe = recipe
        self.parts = parts
        self.out = out
        self.last: dict[str, Metrics] = {}

    def __call__(self) -> dict[str, Estimate]:
        """The metrics of validation, and those of other parts with the part before their names: `train/…`."""
        self.last = {name: measured() for name, (_, measured) in self.parts.items()}
        return {
            metric if part == "validation" else f"{part}/{metric}": estimate
            for part, metrics in self.last.items()
            for metric, estimate in metrics.items()
        }

    def write(self, step: int) -> None:
        """Write the last evaluation as that of this step, and the table anew; later ones are of a run gone back."""
        folder = self.out / "evaluations"
        folder.mkdir(parents=True, exist_ok=True)
        for later in folder.glob("step-*.json"):
            if int(later.stem.removeprefix("step-")) > step:
                later.unlink()
        first = folder / f"step-{0:08d}.json"
        zero = json.loads(first.read_text(encoding="utf-8"))["parts"] if step and first.exists() else {}
        content = {
            "schema": 1,
            "step": step,
            "model": self.recipe.model,
            "loss": self.recipe.loss.chosen[0],
            "protocol": "full",
            "monitor": self.recipe.monitor,
            "seed": self.recipe.seed,
            "parts": {
                name: self._counts(name) | {"metrics": _with_gain(plain(metrics), zero.get(name, {}).get("metrics"))}
                for name, metrics in self.last.items()
            },
        }
        write_whole(folder / f"step-{step:08d}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        self._table(folder)

    def _counts(self, name: str) -> dict[str, int]:
        part = self.parts[name][0]
        captions = {several[0] for several in part.captions() if several}
        items = int(torch.unique(part.labels()).numel())
        return {"images": len(part), "texts": len(captions), "items": items}

    def _table(self, folder: Path) -> None:
        fresh = self.out / ".evaluations.csv.part"
        with fresh.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for path in sorted(folder.glob("step-*.json")):
                found = json.loads(path.read_text(encoding="utf-8"))
                for part, content in found["parts"].items():
                    for metric, values in content["metrics"].items():
                        writer.writerow({"step": found["step"], "part": part, "metric": metric} | values)
        fresh.replace(self.out / "evaluations.csv")


def _with_gain(metrics: dict[str, Any], zero: Mapping[str, Any] | None) -> dict[str, Any]:
    """Beside each value what the model before training had, and the gain over it; null where that cannot be said."""
    zero = metrics if zero is None else zero
    for name, found in metrics.items():
        before, value = zero.get(name, {}).get("value"), found["value"]
        known = before is not None and value is not None
        found["zero_shot"] = before
        found["gain"] = value - before if known else None
        found["relative_gain"] = (value - before) / before if known and before else None
    return metrics
