"""What a run measured: part -> what each protocol gave there, one value a query; averaged, compared, kept in a file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from vicinal.evaluation.image_text import averaged
from vicinal.evaluation.intervals import paired_difference
from vicinal.types import InputError, Metrics, PerQuery

__all__ = ["Scores", "differences", "estimates", "load_scores", "plain", "save_scores"]

Scores = Mapping[str, Sequence[PerQuery]]
"""Part -> what each protocol gave there."""


def estimates(scores: Scores) -> dict[str, Metrics]:
    """Part -> metric -> its mean; of ranks the median."""
    return {
        part: {k: v for values in protocols for k, v in averaged(values).items()} for part, protocols in scores.items()
    }


def differences(before: Scores, after: Scores) -> dict[str, Metrics]:
    """Part -> metric -> the mean of what changed, query by query; of ranks none, since there less is more."""
    return {
        part: {
            name: estimate
            for b, a in zip(before[part], after[part], strict=True)
            for name, estimate in paired_difference(_without_ranks(b), a).items()
        }
        for part in before
    }


def _without_ranks(scores: PerQuery) -> PerQuery:
    return replace(scores, values={name: v for name, v in scores.values.items() if not name.endswith("_rank")})


def plain(metrics: Metrics) -> dict[str, dict[str, float | None]]:
    """For JSON, which has no NaN and no infinity: such a value or bound is null."""
    return {
        name: {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(estimate).items()}
        for name, estimate in metrics.items()
    }


def save_scores(scores: Scores, path: Path) -> None:
    """Write the per-query values of a measurement to one safetensors file; `load_scores` reads them back."""
    from safetensors.torch import save_file

    tensors, macro = {}, {}
    for part, protocols in scores.items():
        for i, values in enumerate(protocols):
            tensors[f"{part}/{i}/units"] = values.units.clone()
            macro[f"{part}/{i}"] = str(values.macro)
            tensors |= {f"{part}/{i}/values/{name}": v.clone() for name, v in values.values.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, macro)


def load_scores(path: str | Path) -> dict[str, list[PerQuery]]:
    """What `save_scores` wrote: part -> protocols.

    Raises:
        InputError: there is no such file.
    """
    from safetensors import safe_open

    if not Path(path).exists():
        raise InputError(f"{path} is missing: the run did not finish")
    scores: dict[str, list[PerQuery]] = {}
    with safe_open(str(path), framework="pt") as file:
        for key, macro in sorted(file.metadata().items()):
            names = [name for name in file.keys() if name.startswith(f"{key}/values/")]  # noqa: SIM118  no iterator
            values = {name.removeprefix(f"{key}/values/"): file.get_tensor(name) for name in names}
            part = PerQuery(values, file.get_tensor(f"{key}/units"), macro == "True")
            scores.setdefault(key.rsplit("/", 1)[0], []).append(part)
    return scores
