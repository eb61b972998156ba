"""Two processes train what one process trains on the whole batch; pair losses see the items of both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from several import started
from vicinal.training.devices import leave

WORKER = Path(__file__).with_name("processes_worker.py")


def train(out: Path, loss: str, processes: int) -> list[dict[str, Any]]:
    """What each process ended with."""
    out.mkdir()
    started(WORKER, out, loss, 2, processes=processes)
    return [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["arcface", "ntxent"])
def test_two_processes_are_one(tmp_path: Path, loss: str):
    (alone,) = train(tmp_path / "one", loss, 1)
    both = train(tmp_path / "two", loss, 2)
    for name, weight in alone["weights"].items():
        assert torch.equal(both[0]["weights"][name], both[1]["weights"][name])
        assert torch.allclose(both[0]["weights"][name], weight, atol=1e-5), name
    assert both[0]["best"] == both[1]["best"] == pytest.approx(alone["best"], abs=1e-4)
    drawn = [number for process in both for number in process["drawn"]]
    assert len(set(drawn)) == len(drawn) == 2 * 2 * 6  # each process, part and step draws its own
    histories = [
        [json.loads(line) for line in (tmp_path / out / "history.jsonl").read_text().splitlines()]
        for out in ("one", "two")
    ]
    assert [row["step"] for row in histories[0]] == [row["step"] for row in histories[1]]
    if loss == "ntxent":  # its loss is that of the whole batch in each process
        logged = [[row["loss"] for row in history if "loss" in row] for history in histories]
        assert logged[1] == pytest.approx(logged[0], rel=1e-4)


def test_leaving_runs_what_waits_for_the_end_and_gives_the_code(tmp_path: Path):
    store = f"init_method='file://{tmp_path / 'store'}'"
    words = [
        "import atexit, torch, vicinal.training.devices as devices",
        f"torch.distributed.init_process_group('gloo', {store}, rank=0, world_size=1)",
        "atexit.register(print, 'at exit')",
        "print('before')",
        "devices.leave(3)",
        "print('after')",
    ]
    ended = subprocess.run([sys.executable, "-c", "\n".join(words)], capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (3, "before\nat exit\n"), ended.stderr


def test_alone_there_is_nothing_to_leave():
    leave(3)
