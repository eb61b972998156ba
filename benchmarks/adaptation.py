"""What a recipe does to classes seen and never seen, over several training seeds, in one table.

    python benchmarks/adaptation.py recipes/folder.yaml data.table=… model=… --seeds 43 44 45 46 47 --out runs/emoji

Each seed is one `vicinal train`, skipped where its folder is finished. The interval of a difference holds both
variances: classes and seeds are resampled. k-shot accuracies are averaged over their draws first, within a seed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from vicinal.evaluation.intervals import mean, paired_difference
from vicinal.recipe import Recipe
from vicinal.run import load_scores, run
from vicinal.types import Estimate, PerQuery


def pooled(scores: list[PerQuery]) -> PerQuery:
    """One replicate a seed: the mean over a seed's draws, where a query counts if it counted in any."""
    values = {name: torch.cat([s.values[name].nanmean(0, keepdim=True) for s in scores]) for name in scores[0].values}
    return PerQuery(values, scores[0].units, scores[0].macro)


def table(folders: list[Path]) -> dict[str, dict[str, dict[str, Estimate]]]:
    """Part -> metric -> before, after, difference."""
    sides = {side: [load_scores(f / "scores" / f"{side}.safetensors") for f in folders] for side in ("before", "after")}
    rows: dict[str, dict[str, dict[str, Estimate]]] = {}
    for part, protocols in sides["before"][0].items():
        for i in range(len(protocols)):
            before, after = (pooled([seed[part][i] for seed in sides[side]]) for side in ("before", "after"))
            for name, difference in paired_difference(before, after).items():
                rows.setdefault(part, {})[name] = {
                    "before": mean(before)[name],
                    "after": mean(after)[name],
                    "difference": difference,
                }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[43, 44, 45, 46, 47])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    folders = []
    for seed in arguments.seeds:
        folder = arguments.out / f"seed{seed}"
        recipe = Recipe.load(arguments.recipe, [*arguments.overrides, f"seed={seed}"])
        if not (folder / "results.json").exists():
            run(recipe, folder, resume="last")
        elif Recipe.load(folder / "recipe.yaml") != recipe:
            raise SystemExit(f"{folder} is of another recipe; choose another --out")
        folders.append(folder)
    rows = table(folders)
    for part, metrics in rows.items():
        for name, row in metrics.items():
            difference = row["difference"]
            print(
                f"{part:7} {name:16} {row['before'].value:.3f} -> {row['after'].value:.3f}   "
                f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]   "
                f"{difference.n} classes, {difference.queries} queries, {len(folders)} seeds"
            )
    plain = {p: {m: {k: asdict(e) for k, e in row.items()} for m, row in ms.items()} for p, ms in rows.items()}
    (arguments.out / "summary.json").write_text(json.dumps(plain, indent=1))


if __name__ == "__main__":
    main()
