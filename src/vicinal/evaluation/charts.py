"""Numbers -> coordinates for the report's charts. No markup here: the template draws, so every string is escaped there.

Letters: N values, B bins. Coordinates are in the units of a panel's view box, y pointing down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Curve", "Mark", "Panel", "Series", "Tick", "density", "panel", "thin", "ticks"]


@dataclass(frozen=True, slots=True)
class Series:
    """A line to draw: its points in data units, and the style it is drawn in ("before", "after", "same", ...)."""

    x: Sequence[float]
    y: Sequence[float]
    style: str
    filled: bool = False
    dotted: bool = False


@dataclass(frozen=True, slots=True)
class Tick:
    """A place on an axis, in view-box units, and its label."""

    at: float
    label: str


@dataclass(frozen=True, slots=True)
class Curve:
    """A series in view-box units: an SVG path, the path of the area below it ("" if it is not filled), its points."""

    line: str
    area: str
    points: tuple[tuple[float, float], ...]
    style: str


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line with a label, in view-box units; `level` is the line of text that the label stands on."""

    x: float
    label: str
    style: str
    anchor: str
    level: int


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart, ready to draw."""

    title: str
    description: str
    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Curve, ...]
    marks: tuple[Mark, ...]
    x_label: str


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], about `count` of them.

    >>> ticks(0.0, 0.9)
    [0.0, 0.2, 0.4, 0.6, 0.8]
    >>> ticks(3.0, 3.0)
    [3.0]
    """
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.7)
    if low + step == low:  # an interval too narrow for floating point
        return [low]
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # through a decimal string, so that 3 * 0.1 is 0.3
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def thin(x: Sequence[float], y: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """At most `most` of the points: evenly spaced, the first and the last among them.

    >>> thin([0.0, 1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0, 9.0], 3)
    ([0.0, 2.0, 4.0], [5.0, 7.0, 9.0])
    """
    if len(x) <= most:
        return list(x), list(y)
    rows = [round(i * (len(x) - 1) / (most - 1)) for i in range(most)]
    return [x[i] for i in rows], [y[i] for i in rows]


def density(values: Float[Tensor, "N"], low: float, high: float, bins: int = 72) -> tuple[list[float], list[float]]:
    """Share of the values in each of B equal bins of [low, high], smoothed twice by (1, 2, 1) / 4; they sum to 1.

    Returns:
        The centres of the bins, and the shares.

    >>> centres, shares = density(torch.tensor([0.1, 0.1, 0.9]), 0.0, 1.0, bins=4)
    >>> centres, [round(s, 3) for s in shares]
    ([0.125, 0.375, 0.625, 0.875], [0.417, 0.229, 0.146, 0.208])
    """
    width = (high - low) / bins
    position = ((values.double() - low) / width).floor().long().clamp(0, bins - 1)
    share = torch.bincount(position, minlength=bins).double() / max(len(values), 1)
    for _ in range(2):
        padded = torch.cat([share[:1], share, share[-1:]])  # the ends keep what would fall outside: the sum stays one
        share = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    return [low + (i + 0.5) * width for i in range(bins)], share.tolist()


def panel(
    title: str,
    series: Sequence[Series],
    *,
    description: str = "",
    x_label: str = "",
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = None,
    x_log: bool = False,
    y_axis: bool = True,
    marks: Sequence[tuple[float, str, str]] = (),
    width: float = 340.0,
    height: float = 190.0,
) -> Panel:
    """Lay series out in a view box of `width` x `height`.

    Args:
        title: above the chart.
        series: lines; points that are not finite are left out.
        description: what a reader who cannot see the chart is told.
        x_label: below the chart.
        x_range: data units; by default that of the points.
        y_range: data units; by default that of the points with some air.
        x_log: a logarithmic x axis; all x are then positive.
        y_axis: whether the y axis has labels (a density needs none).
        marks: (x, label, style) of vertical lines.
        width: of the view box.
        height: of the view box.
    """
    kept = [[(a, b) for a, b in zip(s.x, s.y, strict=True) if math.isfinite(a) and math.isfinite(b)] for s in series]
    xs = [a for points in kept for a, _ in points] or [0.0, 1.0]
    ys = [b for points in kept for _, b in points] or [0.0, 1.0]
    x0, x1 = x_range or (min(xs), max(xs))
    y0, y1 = y_range or _with_air(min(ys), max(ys))
    if not x1 > x0:
        x0, x1 = (x0 / 2, x0 * 2) if x_log else (x0 - 0.5, x0 + 0.5)
    y_values = ticks(y0, y1, 4) if y_axis else []
    labels = [_short(v, y_values) for v in y_values]
    levels = min(len(marks), 2)
    left, right = (12.0 + 6.4 * max(map(len, labels), default=0) if y_axis else 8.0), width - 8
    top, bottom = 10.0 + 14 * levels, height - (38 if x_label else 24)

    def across(value: float) -> float:
        a, b, c = (math.log(v) for v in (x0, x1, value)) if x_log else (x0, x1, value)
        return round(left + (right - left) * min(max((c - a) / (b - a), 0.0), 1.0), 1)

    def down(value: float) -> float:
        return round(bottom - (bottom - top) * min(max((value - y0) / (y1 - y0), 0.0), 1.0), 1)

    curves = []
    for one, points in zip(series, kept, strict=True):
        if not points:
            continue
        placed = [(across(a), down(b)) for a, b in points]
        line = "M" + "L".join(f"{a:g} {b:g}" for a, b in placed)
        area = f"{line}L{placed[-1][0]:g} {bottom:g}L{placed[0][0]:g} {bottom:g}Z" if one.filled else ""
        curves.append(Curve(line, area, tuple(placed) if one.dotted else (), one.style))

    x_values = _powers(x0, x1) if x_log else ticks(x0, x1, 4)
    middle = (left + right) / 2
    placed_marks = [
        Mark(across(x), label, style, "start" if across(x) < middle else "end", level % 2)
        for level, (x, label, style) in enumerate(marks)
    ]
    return Panel(
        title=title,
        description=description or title,
        width=width,
        height=height,
        left=left,
        right=right,
        top=top,
        bottom=bottom,
        x_ticks=tuple(Tick(across(v), _short(v, x_values)) for v in x_values),
        y_ticks=tuple(Tick(down(v), text) for v, text in zip(y_values, labels, strict=True)),
        curves=tuple(curves),
        marks=tuple(placed_marks),
        x_label=x_label,
    )


def _with_air(low: float, high: float) -> tuple[float, float]:
    """A little room above and below; data that never go below zero get no room below it."""
    air = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return (max(low - air, 0.0) if low >= 0 else low - air), high + air


def _powers(low: float, high: float) -> list[float]:
    """1, 10, 100 ... within [low, high]; with 2 and 5 between them where there would be fewer than three."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [f * 10.0**e for e in exponents for f in factors if low * 0.999 <= f * 10.0**e <= high * 1.001]
        if len(found) >= 3:
            break
    return found


def _short(value: float, among: Sequence[float]) -> str:
    """A label as short as its neighbours allow: 1,500 · 0.25 · 3e-05.

    >>> _short(0.5, [0.0, 0.5, 1.0]), _short(1500.0, [0.0, 1500.0]), _short(2e-5, [0.0, 2e-5])
    ('0.5', '1,500', '2e-5')
    """
    size = max((abs(v) for v in among), default=0.0)
    if value and size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    elif size >= 1000 and float(value).is_integer():
        text = f"{value:,.0f}"
    else:
        text = f"{value:.6g}"
    return text.replace("e-", "e§").replace("-", "\N{MINUS SIGN}").replace("e§", "e-")
