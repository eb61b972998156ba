"""What adapters against intra-modal overlap do to data they were not trained on, beside controls of the same budget.

    python benchmarks/overlap.py --runs runs/sup43 runs/sup44 … --data grocery=grocery.csv … --out out

Each run is one `vicinal train` of a recipe with `split: {all: {}}`. For every data set come: the overlap before and
after each adapter and control, with intervals; a table of few-shot heads with each of them as adapted features
(`vicinal fewshot`, policy `support_cv`, the same search in both spaces); and over all cells the rank correlation of the
change in overlap with the change in accuracy.

Controls: `whitened` (ZCA of shrinkage .1, fitted on the frozen vectors of the generic set), and of the runs under
--random `random-…`, a bottleneck of random weights that moves images of the generic set as far as the run's does.

A table of heads that lies in `out` already is not made again.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from vicinal.bring import bring, open_model
from vicinal.data.loader import eval_batches
from vicinal.data.manifest import Manifest
from vicinal.data.sources import read_table
from vicinal.data.transforms import eval_transform
from vicinal.embedding import default_cache, embed
from vicinal.evaluation.overlap import overlap, overlap_change, overlap_plot, proxy_a_distance
from vicinal.fewshot import Settings, fewshot
from vicinal.heads import Whitening
from vicinal.models.backbones import load_encoder
from vicinal.models.controls import moved, random_bottleneck
from vicinal.models.encoder import Encoder
from vicinal.recipe import Recipe
from vicinal.types import Embeddings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True)
    parser.add_argument(
        "--random", type=Path, nargs="*", default=[], help="those of the runs that get a random control"
    )
    parser.add_argument("--data", nargs="+", required=True, help="NAME=TABLE=SHOTS, as grocery=grocery.csv=1,4")
    parser.add_argument("--methods", nargs="+", default=["nearest_prototype", "tip_adapter", "gda", "proker"])
    parser.add_argument("--model", default=None, help="for the few-shot tables; none: that of the runs")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    recipe = Recipe.load(arguments.runs[0] / "recipe.yaml")
    frozen, generic = open_model(recipe), bring(recipe.data)
    known = embed(frozen, generic, cache=default_cache(), workers=0)
    models = adapters(frozen, generic, arguments.runs, arguments.random)
    white = Whitening(shrinkage=0.1).fit(known.vectors.numpy())

    rows: list[dict[str, object]] = []
    for word in arguments.data:
        name, table, shots = word.split("=")
        manifest = read_table(table)
        before = embed(frozen, manifest, cache=default_cache(), workers=0)
        sides = {"frozen": before} | {
            side: embed(encoder, manifest, cache=default_cache(), workers=0) for side, encoder in models.items()
        }
        vectors = torch.from_numpy(white.transform(before.vectors.numpy()))
        sides["whitened"] = Embeddings(vectors, before.labels, before.ids, before.classes)
        files = {side: out / "embeddings" / name / f"{side}.safetensors" for side in sides}
        for side, embeddings in sides.items():
            files[side].parent.mkdir(parents=True, exist_ok=True)
            embeddings.save(files[side])
            found, change = overlap(embeddings), overlap_change(before, embeddings)
            for metric in found:
                rows.append({"data": name, "space": side, "metric": metric, **asdict(found[metric])})
                rows.append({"data": name, "space": side, "metric": f"change of {metric}", **asdict(change[metric])})
            print(f"{name:14} {side:16} overlap {found['overlap']}  change {change['overlap']}", flush=True)
        rows.append({"data": name, "space": "frozen", "metric": "proxy_a", **asdict(proxy_a_distance(known, before))})
        first = arguments.runs[0].name
        overlap_plot(
            {name: [sides["frozen"], sides[first], sides["whitened"]]},
            ["frozen", first, "whitened"],
            out / f"{name}.png",
        )
        folder = out / "fewshot" / name
        if not (folder / "results.json").exists():
            spaces = [str(file) for side, file in files.items() if side != "frozen"]
            settings = [f"methods=[{','.join(arguments.methods)}]", f"shots=[{shots}]", f"adapter=[{','.join(spaces)}]"]
            settings += [f"size={frozen.preprocess.size[0]}", "fewer=take", "leaks=drop", f"data={name}"]
            fewshot(arguments.model or recipe.model, table, Settings.parse(settings), folder)
    write(out / "overlap.csv", rows)
    correlate(out, rows)


def adapters(frozen: Encoder, generic: Manifest, runs: list[Path], randomly: list[Path]) -> dict[str, Encoder]:
    """The runs' models, and random bottlenecks that move 128 generic images as far as those do."""
    drawn = torch.randperm(len(generic), generator=torch.Generator().manual_seed(0))[:128]
    mask = torch.zeros(len(generic), dtype=torch.bool)
    mask[drawn] = True
    batches = eval_batches(generic.where(mask), eval_transform(frozen.preprocess), batch_size=128, workers=0)
    images = next(iter(batches))["image"]
    found = {}
    for run in runs:
        found[run.name] = load_encoder(str(run))
        distance = moved(found[run.name], frozen, images)
        print(f"{run.name} moves generic images by {distance:.4f}", flush=True)
        if run in randomly:
            method = found[run.name].adapters[0]
            found[f"random-{run.name}"] = random_bottleneck(frozen, method, images, distance=distance)
    return found


def correlate(out: Path, rows: list[dict[str, object]]) -> None:
    """Spearman's rank correlation of two changes over cells; its interval resamples pairs of data set and space."""
    moved_by = {
        (row["data"], row["space"]): float(str(row["value"])) for row in rows if row["metric"] == "change of overlap"
    }
    cells = []
    for data, space in moved_by:
        with (out / "fewshot" / str(data) / "differences.csv").open() as file:
            cells += [
                {"data": data, "space": space, "overlap": moved_by[data, space], **cell}
                for cell in csv.DictReader(file)
                if cell["adapter"] == space
            ]
    write(out / "cells.csv", cells)
    groups = {
        method: [cell for cell in cells if cell["method"] == method]
        for method in dict.fromkeys(c["method"] for c in cells)
    }
    learnt = [cell for cell in cells if not str(cell["space"]).startswith(("random-", "whitened"))]
    for name, chosen in ({"all": cells, "adapters alone": learnt} | groups).items():
        units = sorted({(c["data"], c["space"]) for c in chosen})
        place = np.array([units.index((c["data"], c["space"])) for c in chosen])
        x, y = (np.array([float(c[key]) for c in chosen]) for key in ("overlap", "difference"))
        rng, drawn = np.random.default_rng(0), []
        for _ in range(2000):
            counts = np.bincount(rng.integers(len(units), size=len(units)), minlength=len(units))[place]
            if len(set(np.repeat(x, counts))) > 1:  # else there is no rank to compare
                drawn.append(spearmanr(np.repeat(x, counts), np.repeat(y, counts)).statistic)
        low, high = np.percentile(drawn, [2.5, 97.5])
        value = spearmanr(x, y).statistic
        print(f"{name:18} rho {value:+.2f} [{low:+.2f}, {high:+.2f}]  {len(chosen)} cells of {len(units)} pairs")


def write(path: Path, rows: list[dict[str, object]]) -> None:
    """A CSV of rows with the same keys."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
