"""Brands among the unknown: how well a tuned model tells them, with a threshold fitted on other brands.

    python benchmarks/logos.py --data $VICINAL_DATA --out runs/logos            # three seeds; finished ones are skipped
    python benchmarks/logos.py --data $VICINAL_DATA --out runs/logos --develop lr=1e-3   # on training brands alone

The brands of `logo_scenes` are divided in three (`division`): trained on, calibrated on, tested. A picture with brands
of two sides is used by none. Trained on are the boxes of the training brands' scenes and all that `brand_logos` has of
brands that are not held out. Asked about are boxes, as given; the references of a brand come from another icon
collection than the marks in its scenes. Half of the brands are enrolled, and the others are unknown; then the halves
change places. The thresholds (best F1; a stated share of unknown boxes accepted) are fitted on the calibration brands
and looked at on the test brands once. `vehicle_logos` (photos of badges) is divided likewise, and nothing is trained
on it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from vicinal.data.manifest import Manifest
from vicinal.data.sources import read_table, read_voc
from vicinal.data.voc import base_brand
from vicinal.recipe import Recipe
from vicinal.run import run

ROOT = Path(__file__).parent.parent
SIDES = ("test", "calibration", "train")


def division(scenes: Manifest, *, seed: int = 42) -> dict[str, dict[str, list[str]]]:
    """Brands and pictures of each side: the sorted brands, shuffled: 80 to test, 60 to calibrate, 100 to train on."""
    brands = sorted(set(scenes.column("group")))
    random.Random(seed).shuffle(brands)
    side = {b: SIDES[0] if i < 80 else SIDES[1] if i < 140 else SIDES[2] for i, b in enumerate(brands)}
    on: dict[str, set[str]] = {}
    for picture, brand in zip(scenes.column("image"), scenes.column("group"), strict=True):
        on.setdefault(picture, set()).add(side[brand])
    pictures = {s: sorted(p for p, sides in on.items() if sides == {s}) for s in SIDES}
    return {s: {"brands": sorted(b for b in brands if side[b] == s), "pictures": pictures[s]} for s in SIDES}


def of_pictures(scenes: Manifest, pictures: list[str]) -> Manifest:
    wanted = set(pictures)
    return scenes.where([p in wanted for p in scenes.column("image")]).compact()


def training_table(data: Path, out: Path, *, develop: bool) -> Path:
    """Marks and boxes of training brands; what the run reports on is none of the test's.

    It reports on the calibration brands, or, to develop settings, on a fifth of the training brands.
    """
    scenes = read_voc(data / "logo_scenes")
    sides = division(scenes)
    icons = read_table(data / "brand_logos" / "table.csv").rebased(data)
    references = read_table(data / "logo_scenes" / "references.csv").rebased(data)
    held = {*sides["test"]["brands"], *sides["calibration"]["brands"]}
    asked = set(sides["calibration"]["brands"])
    trained = of_pictures(scenes, sides["train"]["pictures"]).rebased(data)
    measured = of_pictures(scenes, sides["calibration"]["pictures"]).rebased(data)
    if develop:
        asked = set(random.Random(7).sample(sides["train"]["brands"], 20))
        held |= asked
        on: dict[str, set[bool]] = {}
        for picture, brand in zip(trained.column("image"), trained.column("group"), strict=True):
            on.setdefault(picture, set()).add(brand in asked)
        measured = trained.where([on[p] == {True} for p in trained.column("image")])
        trained = trained.where([on[p] == {False} for p in trained.column("image")])
    shown = references.where([base_brand(b) in asked for b in references.column("label")])
    icons = icons.where([base_brand(b) not in held for b in icons.column("label")])
    rows = [(m, part) for m, part in ((trained, "train"), (icons, "train"), (measured, "test"), (shown, "test"))]
    table = {
        "image": [p for m, _ in rows for p in m.column("image")],
        "label": [p for m, _ in rows for p in m.column("label")],
        "group": [base_brand(p) for m, _ in rows for p in m.column("label")],
        "split": [part for m, part in rows for _ in range(len(m))],
        "box": [b for m, _ in rows for b in (m.column("box") if "box" in m.names() else [None] * len(m))],
    }
    path = out / ("develop.parquet" if develop else "training.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    Manifest.build(table, data).save(path)
    return path


def recipe_of(data: Path, table: Path, overrides: list[str], seed: int) -> Recipe:
    weights = data / "weights" / "vit_tiny_patch16_224.safetensors"
    model = f"model=timm:vit_tiny_patch16_224@{weights}"
    own = [f"data.table={table}", "data.on_error=raise", "split.official={}", model, f"seed={seed}"]
    return Recipe.load(ROOT / "recipes" / "logos_small.yaml", [*own, *overrides])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[43, 44, 45])
    parser.add_argument(
        "--develop", action="store_true", help="one run on training brands alone, to choose settings by"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = training_table(given.data, given.out, develop=given.develop)
    if given.develop:
        name = "-".join(given.overrides).replace("/", "_") or "as-is"
        folder = run(recipe_of(given.data, table, given.overrides, 43), given.out / "develop" / name)
        found = json.loads((folder / "results.json").read_text())
        for part in found["difference"]:
            for metric in ("recall@1", "map@r", "accuracy@1shot", "accuracy@3shot"):
                before, after, d = (found[s][part][metric] for s in ("before", "after", "difference"))
                change = f"{before['value']:.3f} -> {after['value']:.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
                print(f"{part} {metric}: {change}")
        return


if __name__ == "__main__":
    main()
