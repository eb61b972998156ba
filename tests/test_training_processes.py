"""Two processes train what one process trains on the whole batch; pair losses see the items of both."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("processes_worker.py")


def train(out: Path, loss: str, processes: int) -> list[dict[str, Any]]:
    """What each process ended with."""
    out.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        place = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        if processes > 1:
            environment |= {name: str(value) for name, value in place.items()}
        command = [sys.executable, str(WORKER), str(out), loss, "2"]
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()
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
