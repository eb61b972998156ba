"""Several trainings of one recipe, which differ in their seed alone: where each lies, and what they say together.

    out/recipe.yaml, results.json, report.html, scores/       of all together
    out/seed42, out/seed43, …                                 of each: history, checkpoints, model, scores
    out/history.jsonl, model/, embeddings/                    of the first, for the page and for use

The data, its division, the untuned model and what that scores are common. The test half is measured after the last
training, once for each; nothing that is chosen looks at it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vicinal.evaluation.intervals import mean, over_seeds
from vicinal.evaluation.scores import Scores
from vicinal.recipe import Recipe
from vicinal.types import InputError, PerQuery

__all__ = ["own_resume", "pooled", "promote", "seed_rows", "trainings"]


def trainings(recipe: Recipe, out: Path) -> dict[Path, Recipe]:
    """The folder of each training -> the recipe of that one; a single training lies in the run folder itself.

    >>> recipe = Recipe.parse({"data": {"folder": "."}, "model": "vicinal:nano", "seeds": 2})
    >>> {str(folder): own.seed for folder, own in trainings(recipe, Path("runs")).items()}
    {'runs/seed42': 42, 'runs/seed43': 43}
    """
    if recipe.seeds == 1:
        return {out: recipe}
    seeds = range(recipe.seed, recipe.seed + recipe.seeds)
    return {out / f"seed{seed}": recipe.model_copy(update={"seed": seed, "seeds": 1}) for seed in seeds}


def own_resume(recipe: Recipe, folder: Path, resume: str | Path | None) -> str | Path | None:
    """What one of several trainings goes on from: its last checkpoint, once it has one.

    Raises:
        InputError: a checkpoint is named, which can be of one training only.
    """
    if recipe.seeds == 1 or resume is None:
        return resume
    if str(resume) != "last":
        raise InputError(f"several seeds go on with resume=last, not from one checkpoint, {resume}")
    return "last" if any((folder / "checkpoints").glob("*")) else None


def pooled(measured: Sequence[Scores]) -> dict[str, list[PerQuery]]:
    """One measurement for all trainings, see `over_seeds`."""
    return {
        part: [over_seeds([scores[part][i] for scores in measured]) for i in range(len(protocols))]
        for part, protocols in measured[0].items()
    }


def seed_rows(
    seeds: Sequence[int], trained: Sequence[Mapping[str, Any]], measured: Sequence[Scores]
) -> list[dict[str, Any]]:
    """A row a training for `results.json` and the page: its seed, what its training came to, its values by part."""
    return [
        {
            "seed": seed,
            "training": dict(facts),
            "after": {
                part: {
                    name: None if math.isnan(e.value) else e.value
                    for one in protocols
                    for name, e in mean(one, resamples=1).items()
                    if not name.endswith("_rank")
                }
                for part, protocols in scores.items()
            },
        }
        for seed, facts, scores in zip(seeds, trained, measured, strict=True)
    ]


def promote(folder: Path, out: Path) -> None:
    """Let the run folder hold what one training left, as that of a single training does."""
    if folder == out:
        return
    shutil.rmtree(out / "model", ignore_errors=True)
    shutil.copytree(folder / "model", out / "model")
    shutil.copyfile(folder / "history.jsonl", out / "history.jsonl")
