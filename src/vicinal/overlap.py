"""Overlap of images of one class and of several, before and after an adapter, on data it was not trained on.

The folder that it writes:

    overlap.json    data set -> before, after, difference -> measure -> value, low, high, n, queries
    overlap.png     the two distributions of each data set before and after
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vicinal.bring import bring_path, open_uri, starting_model
from vicinal.embedding import default_cache, embed
from vicinal.evaluation.overlap import overlap, overlap_change, overlap_plot
from vicinal.evaluation.scores import plain
from vicinal.ground import Say
from vicinal.models.encoder import Encoder
from vicinal.types import Embeddings, InputError

__all__ = ["measure_overlap"]


@dataclass(frozen=True, slots=True)
class _Models:
    before: Encoder
    after: Encoder


def measure_overlap(
    model: str,
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    before: str | None = None,
    size: int | None = None,
    device: str = "auto",
    say: Say = print,
) -> Path:
    """Measure, write and draw: see the module's text.

    Args:
        model: a run folder (its tuned model), a model's folder, or an address.
        sources: folders, tables, COCO JSON or VOC, labelled.
        out: the folder to write, made if need be.
        before: the model without the adapter. None: what the run's recipe began with.
        size: input size in pixels of `before`. None: that of the tuned model.
        device: to embed on.
        say: is told each line.

    Returns:
        `out`.

    Raises:
        InputError: no model to compare with is named and the first is no run folder; a source is not there, or has no
            labels or no two images of one class.
    """
    out = Path(out).expanduser()
    brought = {_name(source): bring_path(source)[1] for source in sources}
    if len(brought) < len(sources):
        raise InputError("two sources have one name; give folders or tables of different names")
    models = _open(model, before, size)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    sides: dict[str, list[Embeddings]] = {}
    for name, manifest in brought.items():
        pair = [embed(one, manifest, cache=default_cache(), device=device) for one in (models.before, models.after)]
        first, second, change = overlap(pair[0]), overlap(pair[1]), overlap_change(*pair)
        results[name] = {"before": plain(first), "after": plain(second), "difference": plain(change)}
        sides[name] = pair
        for measure, difference in change.items():
            say(
                f"{name:14} {measure:14} {first[measure].value:.3f} -> {second[measure].value:.3f}   "
                f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]   {difference.n} classes"
            )
    (out / "overlap.json").write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    overlap_plot(sides, ["before", "after"], out / "overlap.png")
    return out


def _open(model: str, before: str | None, size: int | None) -> _Models:
    after = open_uri(model)
    if before is not None:
        return _Models(open_uri(before, size=size or after.preprocess.size[0]), after)
    try:
        return _Models(starting_model(model), after)
    except InputError as error:
        raise InputError(f"{error} (--before MODEL)") from error


def _name(source: str | Path) -> str:
    path = Path(source)
    return path.parent.name if path.stem == "table" and path.parent.name else path.stem
