"""One of several processes that embed together: `python embed_shared_worker.py FOLDER OUT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from vicinal.data.sources import read_folder
from vicinal.ground import embed_shared
from vicinal.models.backbones import load_encoder
from vicinal.recipe import Recipe
from vicinal.training.devices import Processes, leave
from vicinal.types import InputError


def main(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    processes = Processes.joined(torch.device("cpu"))
    encoder = load_encoder("timm:test_vit", random_init=True, size=32)
    recipe = Recipe.parse(
        {
            "data": {"folder": str(folder)},
            "model": "timm:test_vit",
            "loss": {"arcface": {}},
            "device": "cpu",
            "precision": "fp32",
            "cache": None,
            "workers": 0,
        }
    )
    manifest = read_folder(folder)
    found: dict[str, dict[str, Any]] = {}
    for on_error in ("skip", "raise"):
        asked = recipe.model_copy(update={"data": recipe.data.model_copy(update={"on_error": on_error})})
        for count in range(1, len(manifest) + 1):
            some = manifest.where(torch.arange(len(manifest)) < count)
            try:
                embedded = embed_shared(encoder, some, asked, "baseline", lambda _: None, processes)
            except InputError as error:
                found[f"{on_error} {count}"] = {"error": str(error)}
                continue
            got = {"ids": list(embedded.ids), "vectors": embedded.vectors, "labels": embedded.labels}
            found[f"{on_error} {count}"] = got
    torch.save({"found": found, "count": processes.count}, out / f"rank{processes.rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    leave()
