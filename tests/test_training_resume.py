"""A training that is killed three times and resumed is, bit by bit, the one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from vicinal.data.sources import read_folder, write_shards

STEPS = 30
WORKER = Path(__file__).with_name("resume_worker.py")


def begin(*arguments: object) -> subprocess.Popen[bytes]:
    """In a session of its own, so that the loader's workers die with it."""
    return subprocess.Popen(
        [sys.executable, str(WORKER), *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors.decode()


def rows(out: Path) -> list[dict[str, float]]:
    path = out / "history.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def kill_at(process: subprocess.Popen[bytes], out: Path, step: int) -> None:
    until = time.monotonic() + 240
    while max((row["step"] for row in rows(out)), default=0) < step:
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1].decode())
        assert time.monotonic() < until
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def draw(root: Path) -> None:
    """Three classes of sixteen pictures."""
    generator = np.random.default_rng(0)
    for label in "abc":
        for i in range(16):
            (root / label).mkdir(parents=True, exist_ok=True)
            pixels = generator.integers(0, 255, (40, 52, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{i}.png")


def untimed(out: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows(out)]


@pytest.mark.slow
def test_killed_three_times_and_resumed(tmp_path: Path):
    draw(tmp_path / "images")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(begin(tmp_path / "images", whole, STEPS))

    moments = sorted(random.Random(0).sample(range(2, STEPS - 2), 3))
    reached = []
    for step in moments:
        process = begin(tmp_path / "images", killed, STEPS, "last")
        kill_at(process, killed, step)
        reached.append(max(row["step"] for row in rows(killed)))
    assert all(step <= at < STEPS for step, at in zip(moments, reached, strict=True))
    finish(begin(tmp_path / "images", killed, STEPS, "last"))

    assert len([row for row in rows(whole) if "loss" in row]) == STEPS
    assert untimed(killed) == untimed(whole)
    last = f"checkpoints/step-{STEPS:08d}/weights.safetensors"
    one, other = load_file(whole / last), load_file(killed / last)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert sorted(path.name for path in (killed / "checkpoints").iterdir()) == sorted(
        path.name for path in (whole / "checkpoints").iterdir()
    )


@pytest.mark.slow
def test_killed_between_shards_and_resumed(tmp_path: Path):
    """Shards of five images, batches of eight: every step goes over the end of one. Files give the very same losses."""
    draw(tmp_path / "images")
    write_shards(read_folder(tmp_path / "images"), tmp_path / "shards" / "%d.tar", items=5, seed=None)
    whole, killed, plain = (tmp_path / name for name in ("whole", "killed", "plain"))
    finish(begin(tmp_path / "images", plain, 12))
    finish(begin(tmp_path / "shards", whole, 12))
    kill_at(begin(tmp_path / "shards", killed, 12, "last"), killed, 6)
    assert max(row["step"] for row in rows(killed)) < 12
    finish(begin(tmp_path / "shards", killed, 12, "last"))
    assert len([row for row in rows(whole) if "loss" in row]) == 12
    assert untimed(killed) == untimed(whole) == untimed(plain)
