"""A table of few-shot heads as a picture and as one self-contained page, made from its `results.json` alone."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vicinal.evaluation.wording import as_change, as_number, counted, known

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["few_shot_page", "few_shot_plot"]

Results = Mapping[str, Any]
Row = Mapping[str, Any]
# of Okabe and Ito, told apart by most colour-blind readers; two greys for what needs no images or no text
COLOURS = ("#7c828a", "#1c1e21", "#e69f00", "#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#8c6bb1", "#999933")
MARKS = "osD^vP<X>*"


def few_shot_plot(results: Results, path: str | Path) -> None:
    """Write the accuracy over shots as a PNG: a panel for each part and each feature space, a line a method.

    Args:
        results: the content of a table's `results.json`.
        path: the file to write.
    """
    _figure(results).savefig(path, dpi=144)


def few_shot_page(results: Results) -> str:
    """The page of a table: one HTML document that loads nothing from anywhere.

    Args:
        results: the content of a table's `results.json`.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vicinal.evaluation", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"num": as_number, "signed": as_change}
    picture = BytesIO()
    _figure(results).savefig(picture, dpi=144)
    summary = results["summary"]
    parts = list(dict.fromkeys(row["part"] for row in summary))
    return environment.get_template("few_shot.html.j2").render(
        data=results["data"],
        model=results["model"],
        settings=results["settings"],
        environment=results["environment"],
        few_shot=results["few_shot"],
        shots=(shots := sorted({row["shots"] for row in summary})),
        tables=[
            {
                "part": part,
                "units": counted(max(row["n"] for row in summary if row["part"] == part), "class"),
                "queries": counted(max(row["queries"] for row in summary if row["part"] == part), "query"),
                "rows": _table([row for row in summary if row["part"] == part], shots, "accuracy"),
                "differences": _table(
                    [row for row in results["differences"] if row["part"] == part], shots, "difference"
                ),
            }
            for part in parts
        ],
        policies=sorted({cell["policy"] for cell in results["cells"]}),
        reasons=sorted({cell["selection"]["reason"] for cell in results["cells"]} - {""}),
        picture=base64.b64encode(picture.getvalue()).decode(),
    )


def _table(rows: Sequence[Row], shots: Sequence[int], value: str) -> list[dict[str, Any]]:
    """A line for each method, space and reference, a place for each K; the best accuracy of each K is marked."""
    lines: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in rows:
        lines.setdefault((row["method"], row["adapter"], row.get("against", "")), {})[row["shots"]] = row
    best = {
        k: max((row[value] for row in rows if row["shots"] == k and known(row[value])), default=None) for k in shots
    }
    return [
        {
            "method": method,
            "adapter": adapter,
            "against": against,
            "cells": [
                None
                if (cell := found.get(k)) is None
                else {
                    "value": cell[value],
                    "low": cell["low"],
                    "high": cell["high"],
                    "best": value == "accuracy" and known(cell[value]) and cell[value] == best[k],
                    "sure": value == "difference" and known(cell["low"]) and (cell["low"] > 0 or cell["high"] < 0),
                }
                for k in shots
            ],
        }
        for (method, adapter, against), found in lines.items()
    ]


def _figure(results: Results) -> Figure:
    from matplotlib.figure import Figure

    summary = results["summary"]
    parts, spaces, methods, shots = (
        list(dict.fromkeys(row[key] for row in summary)) for key in ("part", "adapter", "method", "shots")
    )
    figure = Figure(figsize=(1.6 + 3.6 * len(spaces), 0.6 + 3.1 * len(parts)), layout="constrained")
    panels = figure.subplots(len(parts), len(spaces), sharex=True, sharey="row", squeeze=False)
    handles: dict[str, Any] = {}
    for i, part in enumerate(parts):
        for j, space in enumerate(spaces):
            axes = panels[i][j]
            for m, method in enumerate(methods):
                rows = [r for r in summary if (r["part"], r["adapter"], r["method"]) == (part, space, method)]
                rows = [row for row in rows if known(row["accuracy"])]
                if not rows:
                    continue
                rows.sort(key=lambda row: row["shots"])
                y = [row["accuracy"] for row in rows]
                # side by side, so that intervals do not cover each other
                x = [row["shots"] * (1 + 0.02 * (m - len(methods) / 2)) for row in rows]
                reach = [
                    [v - row["low"] if known(row["low"]) else 0.0 for v, row in zip(y, rows, strict=True)],
                    [row["high"] - v if known(row["high"]) else 0.0 for v, row in zip(y, rows, strict=True)],
                ]
                drawn = axes.errorbar(
                    x,
                    y,
                    yerr=reach,
                    color=COLOURS[m % len(COLOURS)],
                    marker=MARKS[m % len(MARKS)],
                    markersize=4,
                    linewidth=1.4,
                    elinewidth=0.8,
                )
                handles.setdefault(method, drawn)
            axes.set_xscale("log", base=2)
            axes.set_xticks(shots, [str(k) for k in shots])
            axes.minorticks_off()
            axes.grid(axis="y", color="#e4e3dd", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_title(" · ".join(filter(None, (part if len(parts) > 1 else "", space or "frozen"))), fontsize=9)
            if i == len(parts) - 1:
                axes.set_xlabel("images a class", fontsize=9)
            if j == 0:
                axes.set_ylabel("accuracy", fontsize=9)
            axes.tick_params(labelsize=8)
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=8, frameon=False)
    return figure
