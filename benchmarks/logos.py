"""Brands among the unknown: how well a tuned model tells them, with a threshold fitted on other brands.

    python benchmarks/logos.py --data $VICINAL_DATA --out runs/logos            # three seeds; finished ones are skipped
    python benchmarks/logos.py --data $VICINAL_DATA --out runs/logos --develop lr=1e-3   # on training brands alone

The brands of `logo_scenes` are divided in three (`division`): trained on, calibrated on, tested. A picture with brands
of two sides is used by none. Trained on are the boxes of the training brands' scenes and all that `brand_logos` has of
brands that are not held out. Asked about are boxes, as given; the references of a brand come from another icon
collection than the marks in its scenes. Half of the brands are enrolled, and the others are unknown; then the halves
change places. The thresholds are fitted on the calibration brands and looked at on the test brands (`RULES`): that of
the best F1, and that of a stated share of unknown boxes accepted: as counted on the calibration brands; with a
confidence of .95, among as many brands as were enrolled there; the same among as many as the test enrols.
`vehicle_logos` (photos of badges) is divided likewise, and nothing is trained on it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from vicinal.bring import open_model
from vicinal.calibrate import Bench, _kin, _pair_scores, trials_of
from vicinal.data.manifest import Manifest
from vicinal.data.sources import read_table, read_voc
from vicinal.data.splits import class_disjoint
from vicinal.data.voc import base_brand
from vicinal.embedding import default_cache, embed
from vicinal.evaluation.verification import Similarities, _per_unit, _rates, similarities, verification
from vicinal.heads.calibration import OpenSetThreshold
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.recipe import Recipe
from vicinal.run import run
from vicinal.serving.matching import Matcher, Trials
from vicinal.types import InputError

ROOT = Path(__file__).parent.parent
SIDES = ("test", "calibration", "train")
SETTINGS = {"fusion": "topk", "k": 3, "margin": 0.02}  # the matcher's own defaults
RATE = 0.05  # of unknown boxes that may be accepted
RULES = ("best F1", f"rate {RATE}, as counted", f"rate {RATE}", f"rate {RATE}, gallery")


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
    own = [f"data.table={table}", "data.on_error=raise", "split.official.val=0", model, f"seed={seed}"]
    return Recipe.load(ROOT / "recipes" / "logos_small.yaml", [*own, *overrides])


def recognition_table(data: Path, out: Path) -> Path:
    """References and boxes of the calibration (val) and test brands, as `vicinal calibrate` takes them."""
    scenes = read_voc(data / "logo_scenes")
    references = read_table(data / "logo_scenes" / "references.csv").rebased(data)
    table: dict[str, list[object]] = {name: [] for name in ("image", "label", "group", "split", "role", "box")}
    for side, split in (("calibration", "val"), ("test", "test")):
        on = division(scenes)[side]
        boxes = of_pictures(scenes, on["pictures"]).rebased(data)
        shown = references.where([base_brand(b) in on["brands"] for b in references.column("label")])
        for part, role in ((boxes, "query"), (shown, "reference")):
            table["image"] += part.column("image")
            table["label"] += part.column("label")
            table["group"] += [base_brand(b) for b in part.column("label")]
            table["split"] += [split] * len(part)
            table["role"] += [role] * len(part)
            table["box"] += part.column("box") if "box" in part.names() else [None] * len(part)
    path = out / "recognition.parquet"
    Manifest.build(table, data).save(path)
    return path


def benches(data: Path, out: Path) -> dict[str, dict[str, Bench]]:
    """Data set -> "val", to fit on, and "test"."""
    logos = read_table(recognition_table(data, out))
    split = logos.column("split")
    found = {"logo_scenes": {s: Bench.drawn(logos.where([x == s for x in split]), 5, 42) for s in ("val", "test")}}
    badges = read_table(data / "vehicle_logos" / "table.csv")
    seen, held = class_disjoint(badges.classes, holdout=0.5, seed=42)
    found["vehicle_logos"] = {
        s: Bench.drawn(badges.where([label in classes for label in badges.column("label")]), 5, 42)
        for s, classes in (("val", set(seen)), ("test", set(held)))
    }
    return found


@dataclass(frozen=True)
class Told:
    """What one model says on one data set; a rule that so few brands cannot show is left out."""

    rules: dict[str, OpenSetThreshold]
    trials: Trials
    pairs: Similarities
    enrolled: int


def told(encoder: Encoder, sides: dict[str, Bench]) -> Told:
    fingerprint, asked = encoder.fingerprint(), {}
    for name, bench in sides.items():
        given, queries = (embed(encoder, side, cache=default_cache()) for side in (bench.references, bench.queries))
        of = bench.groups()
        found, enrolled = trials_of(given, queries, of, fingerprint=fingerprint, settings=SETTINGS)
        matcher = Matcher(given, fingerprint=fingerprint, **SETTINGS)
        pairs = _pair_scores(matcher, queries, _kin(queries.classes, of))
        asked[name] = found, enrolled, similarities(queries, given), pairs
    fitted, (scores, right, units) = asked["val"][0], asked["val"][3]
    rules = {}
    for name, rule in zip(
        RULES,
        (
            OpenSetThreshold(),
            OpenSetThreshold(rate=RATE, confidence=None),
            OpenSetThreshold(rate=RATE),
            OpenSetThreshold(rate=RATE, gallery=asked["test"][1]),
        ),
        strict=True,
    ):
        try:
            if rule.gallery:
                rules[name] = rule.fit(scores, right, units=units, fingerprint=fingerprint)
            else:
                rules[name] = rule.fit(
                    fitted.scores, fitted.right, enrolled=fitted.enrolled, units=fitted.units, fingerprint=fingerprint
                )
        except InputError as error:
            print(f"{name}: {error}")
    return Told(rules, asked["test"][0], asked["test"][2], asked["test"][1])


def changed(before: Told, after: list[Told], rule: str, draws: int = 2000) -> dict[str, dict[str, list[float]]]:
    """Metric -> before, after (mean over seeds) and difference, each with its 95 % interval over brands and seeds."""
    tables = [
        _per_unit(
            one.trials.scores, one.trials.right, one.trials.units, one.trials.enrolled, one.rules[rule].threshold_
        )
        for one in (before, *after)
    ]
    rng = np.random.default_rng(0)
    units = len(tables[0])
    weights = np.concatenate([np.ones((1, units)), rng.multinomial(units, np.full(units, 1 / units), draws)])
    rates = [_rates(weights, table) for table in tables]
    seeds = np.concatenate([[np.arange(len(after))], rng.integers(len(after), size=(draws, len(after)))])
    rows = np.arange(draws + 1)[:, None]
    found = {}
    for metric in ("precision", "recall", "f1", "fpir"):
        old = rates[0][metric]
        new = np.stack([one[metric] for one in rates[1:]], 1)[rows, seeds].mean(1)
        found[metric] = {
            name: [float(v[0]), *np.nanpercentile(v[1:], (2.5, 97.5)).tolist()]
            for name, v in (("before", old), ("after", new), ("difference", new - old))
        }
    return found


def measure(data: Path, out: Path, folders: list[Path], original: Encoder) -> dict[str, object]:
    content: dict[str, object] = {"seeds": len(folders), "settings": SETTINGS, "rate": RATE}
    tuned = [load_encoder(folder) for folder in folders]
    for name, sides in benches(data, out).items():
        before, after = told(original, sides), [told(encoder, sides) for encoder in tuned]
        reference = before.rules["best F1"].threshold_
        of = {
            "brands": len(torch.unique(before.trials.units)),
            "queries": len(sides["test"].queries),
            "references": len(sides["test"].references),
            "enrolled": before.enrolled,
            "threshold of the baseline": reference,
        }
        rules = [rule for rule in RULES if all(rule in one.rules for one in (before, *after))]
        of |= {rule: changed(before, after, rule) for rule in rules}
        of["thresholds"] = {r: [one.rules[r].threshold_ for one in (before, *after)] for r in rules}
        pairs = [verification(one.pairs, thresholds=(0.75, reference)) for one in (before, *after)]
        of["pairs"] = {
            m: [[e.value, e.low, e.high] for e in (one[m] for one in pairs)]
            for m in ("right_mean", "wrong_mean", "gap", "eer", "f1", "wrong_above@0.75", f"wrong_above@{reference:g}",
                      f"hardest_above@{reference:g}")
        }  # fmt: skip
        content[name] = of
        print(f"\n{name}: {of['brands']} brands, {of['queries']} queries, {of['references']} references, "
              f"{of['enrolled']} enrolled at a time")  # fmt: skip
        for rule in rules:
            print(f"  {rule}: thresholds {', '.join(f'{t:.3f}' for t in of['thresholds'][rule])}")
            for metric, row in of[rule].items():
                old, new, d = row["before"], row["after"], row["difference"]
                print(f"    {metric:10} {old[0]:.3f} [{old[1]:.3f}, {old[2]:.3f}] -> {new[0]:.3f} [{new[1]:.3f}, "
                      f"{new[2]:.3f}]   {d[0]:+.3f} [{d[1]:+.3f}, {d[2]:+.3f}]")  # fmt: skip
        for metric, rows in of["pairs"].items():
            print(f"  pairs {metric:24} " + " ".join(f"{v:.4f} [{low:.4f}, {high:.4f}]" for v, low, high in rows))
    return content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[43, 44, 45])
    parser.add_argument("--train-only", action="store_true", help="do not look at the test brands")
    parser.add_argument(
        "--develop", action="store_true", help="one run on training brands alone, to choose settings by"
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    table = training_table(given.data, given.out, develop=given.develop)
    if given.develop:
        name = "-".join(given.overrides).replace("/", "_") or "as-is"
        folder = given.out / "develop" / name
        if not (folder / "results.json").exists():
            run(recipe_of(given.data, table, given.overrides, 43), folder, resume="last")
        found = json.loads((folder / "results.json").read_text())
        for part in found["difference"]:
            for metric in ("recall@1", "map@r", "accuracy@1shot", "accuracy@3shot"):
                before, after, d = (found[s][part][metric] for s in ("before", "after", "difference"))
                change = f"{before['value']:.3f} -> {after['value']:.3f} [{d['low']:+.3f}, {d['high']:+.3f}]"
                print(f"{part} {metric}: {change}")
        return
    folders = [given.out / f"seed{seed}" for seed in given.seeds]
    for seed, folder in zip(given.seeds, folders, strict=True):
        recipe = recipe_of(given.data, table, given.overrides, seed)
        if not (folder / "results.json").exists():
            run(recipe, folder, resume="last")
        elif Recipe.load(folder / "recipe.yaml") != recipe:
            raise SystemExit(f"{folder} is of another recipe; choose another --out")
    if given.train_only:
        return
    original = open_model(recipe_of(given.data, table, given.overrides, 0))
    content = measure(given.data, given.out, folders, original)
    (given.out / "summary.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
