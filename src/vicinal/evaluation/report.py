"""One self-contained HTML page of a run, made from its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vicinal.types import Embeddings

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Record", "report"]


@dataclass(frozen=True, slots=True)
class Record:
    """What a run leaves behind: the content of its files."""

    results: Mapping[str, Any]
    history: list[dict[str, Any]] = field(default_factory=list)
    recipe: str = ""
    before: Mapping[str, Embeddings] = field(default_factory=dict)
    after: Mapping[str, Embeddings] = field(default_factory=dict)


def report(record: Record, pictures: Callable[[str], Image | None]) -> str:
    """The page, as one string of HTML."""
    from html import escape

    rows = []
    for part in record.results.get("before", {}):
        for metric in record.results["before"][part]:
            cells = []
            for side in ("before", "after", "difference"):
                e = record.results.get(side, {}).get(part, {}).get(metric)
                known = e is not None and e["value"] is not None
                cells.append(f"<td>{e['value']:.3f} [{e['low']}, {e['high']}]</td>" if known else "<td>–</td>")
            rows.append(f"<tr><th>{escape(part)} {escape(metric)}</th>{''.join(cells)}</tr>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>vicinal</title><h1>Before and after</h1>"
        f"<table>{''.join(rows)}</table><pre>{escape(record.recipe)}</pre></html>"
    )
