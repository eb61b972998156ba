"""The history of a run, on the disk and on the screen.

`history.jsonl` holds one JSON object a line, whole lines only, so that it can be read while it grows:

    {"step": 20, "loss": 1.3, "grad_norm": 0.8, "lr": 0.001, "images_per_second": 210.0, "seconds": 6.1}
    {"step": 20, "val": {"map@r": 0.41}}

A loss is the mean over the steps since the row before.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vicinal.types import InputError

__all__ = ["History", "Meter"]


class History:
    """Rows in memory, and in a file where there is a run folder.

    Args:
        path: the file; None keeps the rows in memory alone.
        until: rows of later steps are dropped from it; -1 begins anew.

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
        """Append a row; it is in the file when this returns. Infinite numbers and NaN, not being JSON, become null.

        Raises:
            InputError: the disk is full, or cannot be written to.
        """
        row = {key: _as_json(value) for key, value in row.items()}
        self.rows.append(row)
        if self.path is None:
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise InputError(f"could not write {self.path}: {error}; make room and go on with resume=last") from error


def _as_json(value: Any) -> Any:  # noqa: ANN401  (what JSON can hold)
    if isinstance(value, dict):
        return {key: _as_json(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _whole_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # where a process was killed; what follows is not the history of one run
    return rows


class Meter:
    """Means over the steps since the last row. The sums stay on the device: adding to them waits for nothing.

    >>> meter = Meter(torch.device("cpu"))
    >>> for loss in (1.0, 3.0):
    ...     meter.add({"loss": torch.tensor(loss)})
    ...     meter.count(images=8)
    >>> meter.means()
    {'loss': 2.0}
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Forget everything, and begin to count the time."""
        self.sums: dict[str, Tensor] = {}
        self.steps = self.images = 0
        self.clock = time.monotonic()

    def add(self, values: Mapping[str, Tensor], *, weight: float = 1.0) -> None:
        """Add scalars; with a weight below 1, a part of a step."""
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name].add_(value, alpha=weight) if name in self.sums else value * weight

    def count(self, *, images: int) -> None:
        """A step is done."""
        self.steps += 1
        self.images += images

    def pause(self, seconds: float) -> None:
        """This time was not spent training."""
        self.clock += seconds

    def means(self) -> dict[str, float]:
        """The mean of each scalar."""
        return {name: float(total) / self.steps for name, total in self.sums.items()}

    def speed(self) -> float:
        """Images a second."""
        return self.images / max(time.monotonic() - self.clock, 1e-9)

    def broken(self) -> list[str]:
        """The names of those that are infinite or not numbers."""
        return [name for name, total in self.sums.items() if not bool(total.isfinite())]

    def state_dict(self) -> dict[str, Any]:
        """What a continuation in the middle of a row needs."""
        return {"sums": {name: total.clone() for name, total in self.sums.items()}, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.begin()
        self.sums = {name: total.to(self.device) for name, total in state["sums"].items()}
        self.steps = state["steps"]
