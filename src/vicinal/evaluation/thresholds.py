"""Pictures of what a threshold does: right and wrong pairs, how many wrong ones pass, precision and recall over it.

Letters: Q queries, T distinct scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from vicinal.evaluation.verification import Similarities
from vicinal.heads.calibration import curve

__all__ = ["Shown", "draw"]

COLOURS = {"baseline": "#8a8f98", "model": "#2b54b8"}
RIGHT, WRONG, HARDEST = "#00755a", "#c2410c", "#b4500f"


@dataclass(frozen=True, slots=True)
class Shown:
    """One model: its pairs, its answers, its threshold.

    Args:
        pairs: of `similarities`.
        scores: "Q", of the best class of each query.
        right: "Q", whether it is the query's.
        enrolled: "Q", whether the query's class had references.
        threshold: t.
    """

    pairs: Similarities
    scores: Float[np.ndarray, "Q"]
    right: Bool[np.ndarray, "Q"]
    enrolled: Bool[np.ndarray, "Q"]
    threshold: float


def draw(sides: Mapping[str, Shown], path: str | Path, *, title: str = "") -> None:
    """Write one PNG: a column a model, and below them what they have in common.

    Args:
        sides: "model", and before it "baseline" where there is one to compare with.
        path: the file.
        title: above all.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2 * max(2, len(sides)), 9.2), layout="constrained")
    if title:
        figure.suptitle(title)
    places: Any = figure.subplots(2, max(2, len(sides)))
    low = min(_range(side)[0] for side in sides.values())
    for place, (name, side) in zip(places[0], sides.items(), strict=False):
        _distributions(place, side, f"pairs, {name}" if len(sides) > 1 else "pairs", low)
    if len(sides) == 1:
        _decisions(places[0][1], sides, "answers over the threshold")
        _errors(places[1][1], sides)
    else:
        _decisions(places[1][1], sides, "answers over the threshold")
    _wrong_above(places[1][0], sides, low)
    figure.savefig(Path(path), dpi=110)


def _range(side: Shown) -> tuple[float, float]:
    found = side.pairs.percentiles((0.5, 99.5))
    return min(values[0] for values in found.values()), 1.0


def _smooth(counts: Float[np.ndarray, "T"], width: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Shares of bins `width` times as wide, and their centres."""
    whole = counts[: len(counts) // width * width].reshape(-1, width).sum(1)
    whole[-1] += counts[len(counts) // width * width :].sum()
    return (np.arange(len(whole)) + 0.5) * width * 0.001 - 1, whole / max(counts.sum(), 1)


def _distributions(place: Any, side: Shown, title: str, low: float) -> None:  # noqa: ANN401  matplotlib's axes
    kinds = (
        ("wrong", side.pairs.wrong, WRONG, "-"),
        ("wrong, the nearest of each query", side.pairs.hardest, HARDEST, "--"),
        ("right", side.pairs.right, RIGHT, "-"),
    )
    for name, table, colour, line in kinds:
        x, y = _smooth(table.sum(0))
        place.plot(x, y, line, color=colour, label=name)
        if line == "-":
            place.fill_between(x, y, color=colour, alpha=0.15)
    place.axvline(side.threshold, color="black", linewidth=1)
    place.annotate(f"threshold {side.threshold:.3f}", (side.threshold, 1), (0, 3), xycoords=("data", "axes fraction"),
                   textcoords="offset points", fontsize=9, ha="center")  # fmt: skip
    place.set(xlabel="cosine", ylabel="share of pairs", xlim=(low, 1.0), ylim=(0, None))
    place.set_title(title, pad=18)
    place.legend(loc="upper left", frameon=False, fontsize=9)


def _wrong_above(place: Any, sides: Mapping[str, Shown], low: float) -> None:  # noqa: ANN401
    for name, side in sides.items():
        total = side.pairs.wrong.sum(0)
        share = total[::-1].cumsum()[::-1] / max(total.sum(), 1)
        place.plot(side.pairs.edges, np.where(share > 0, share, np.nan), color=COLOURS[name], label=name)
        place.axvline(side.threshold, color=COLOURS[name], linestyle=":", linewidth=1)
    place.set(title="wrong pairs at a cosine or above", xlabel="cosine", ylabel="share", yscale="log", xlim=(low, 1.0))
    place.grid(alpha=0.3)
    place.legend(frameon=False, fontsize=9)


def _decisions(place: Any, sides: Mapping[str, Shown], title: str) -> None:  # noqa: ANN401
    low, high = 1.0, -1.0
    for name, side in sides.items():
        found = curve(side.scores, side.right, enrolled=side.enrolled)
        for metric, line in (("precision", "--"), ("recall", ":"), ("f1", "-")):
            place.plot(found.thresholds, getattr(found, metric), line, color=COLOURS[name], label=f"{metric}, {name}")
        place.axvline(side.threshold, color=COLOURS[name], linewidth=0.8)
        low = min(low, float(np.quantile(found.thresholds, 0.02)))
        high = max(high, float(found.thresholds[0]))
    place.set(title=title, xlabel="threshold", xlim=(low, high), ylim=(0, 1.02))
    place.grid(alpha=0.3)
    place.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=len(sides) + 1)


def _errors(place: Any, sides: Mapping[str, Shown]) -> None:  # noqa: ANN401
    for name, side in sides.items():
        found = curve(side.scores, side.right, enrolled=side.enrolled)
        place.plot(found.thresholds, found.false_accept, color=COLOURS[name], label="unknown accepted (FPIR)")
        place.plot(found.thresholds, 1 - found.recall, "--", color=COLOURS[name], label="known missed (FNIR)")
        place.axvline(side.threshold, color=COLOURS[name], linewidth=0.8)
    place.set(title="errors over the threshold", xlabel="threshold", ylim=(0, 1.02))
    place.grid(alpha=0.3)
    place.legend(frameon=False, fontsize=9)
