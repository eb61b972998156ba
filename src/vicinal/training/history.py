"""The history of a run: one JSON object a line, whole lines only, so that it can be read while it grows.

{"step": 20, "loss": 1.3, "lr": 0.001, "grad_norm": 0.8, "images_per_second": 210.0, "seconds": 6.1}
{"step": 20, "val": {"map@r": 0.41}}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vicinal.types import InputError

__all__ = ["History"]


class History:
    """Rows in memory, and in `history.jsonl` where there is a run folder.

    Args:
        path: the file; None keeps the rows in memory alone.
        until: rows of later steps are dropped; -1 begins anew.

    >>> history = History(None)
    >>> history.add({"step": 1, "loss": 0.5})
    >>> history.rows
    [{'step': 1, 'loss': 0.5}]
    """

    def __init__(self, path: Path | None, *, until: int = -1) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        if path.exists() and until >= 0:
            self.rows = [row for row in _whole_rows(path) if row["step"] <= until]
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.tmp")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in self.rows), encoding="utf-8")
        fresh.replace(path)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row; it is in the file when this returns.

        Raises:
            InputError: the disk is full, or cannot be written to.
        """
        self.rows.append(row)
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise InputError(f"could not write {self.path}: {error}; make room and go on with resume=last") from error


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the line in which a killed process was; what comes after it is no history of one run
    return rows
