"""A run started by torchrun in two processes is the run of one process: what it trains, measures and writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import yaml

from pictures import write_folder
from several import free_port
from vicinal.recipe import Recipe
from vicinal.run import run
from vicinal.training.devices import Processes
from vicinal.types import InputError

T = TypeVar("T")

RECIPE: dict[str, Any] = {
    "data": {
        "glyphs": {
            "families": ["dejavu_sans", "dejavu_serif"],
            "test_families": ["dejavu_serif"],
            "characters": "αβγδεζηθικλμ",
        }
    },
    "split": {"class_disjoint": {"holdout": 0.34, "seed": 1, "val": 0.25}},
    "model": "vicinal:nano",
    "random_init": True,
    "adapt": [{"full": {"tower": "both"}}],
    "loss": {"infonce": {}},
    "sampler": {"shuffle": {"batch_size": 16}},
    "steps": 2,
    "shots": [1],
    "draws": 2,
    "workers": 0,
    "device": "cpu",
    "precision": "fp32",
    "trackers": [],
}


def launched(recipe: Path, out: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    return subprocess.run(
        [*launcher, "-m", "vicinal", "train", str(recipe), f"out={out}", *overrides],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    done = launched(tmp_path / "recipe.yaml", tmp_path / "two")
    assert done.returncode == 0, done.stderr
    said: list[str] = []
    run(Recipe.parse(RECIPE), tmp_path / "one", say=said.append)
    assert [line.split(":")[0] for line in done.stdout.splitlines() if line in said][:6] == [
        "data",
        "model",
        "baseline",
        "split",
        "loss",
        "training",
    ]
    assert done.stdout.count("report: ") == 1, "one of them speaks"
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for mine, theirs in zip(one, two, strict=True):
        if "loss" in mine:  # each has its own half of the batch, and the loss of the whole of it
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
            assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    for side in ("before", "after"):
        for part, metrics in results[0][side].items():
            for name, estimate in metrics.items():
                assert results[1][side][part][name]["n"] == estimate["n"]
                assert results[1][side][part][name]["value"] == pytest.approx(estimate["value"], abs=0.05), (part, name)
    assert results[1]["data"] == results[0]["data"]
    files = [{p.relative_to(out).as_posix() for p in out.rglob("*")} for out in (tmp_path / "one", tmp_path / "two")]
    assert files[0] == files[1]


class First(Processes):
    """The first of two, of which the other never answers."""

    def share(self, count: int) -> slice:
        return slice(0, count)

    def gathered(self, value: T) -> list[T]:
        return [value, value]


def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Processes, "joined", lambda device: First(0, 2))
    odd = Recipe.parse(RECIPE | {"sampler": {"shuffle": {"batch_size": 15}}})
    with pytest.raises(InputError, match="a batch of 15 cannot be shared evenly by 2 processes"):
        run(odd, tmp_path / "run", say=lambda _: None)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_shares_are_all_and_none_twice() -> None:
    for count in (2, 3, 10, 11):
        rows = [row for rank in range(2) for row in range(count)[Processes(rank, 2).share(count)]]
        assert rows == list(range(count))
    assert [Processes(rank, 4).share(3) for rank in range(4)] == [slice(0, 3)] * 4, "too few to share: each has all"


def test_what_is_embedded_together_is_what_one_embeds_and_none_waits(tmp_path: Path) -> None:
    """By `accelerate launch`, in two processes: too few images, a share of unreadable ones, an error of one."""
    photos = write_folder(tmp_path / "photos", classes=2, each=3)
    broken = sorted(photos.rglob("*.png"))[:2]
    for file in broken:
        file.write_bytes(b"no picture")
    worker = Path(__file__).with_name("embed_shared_worker.py")
    launcher = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
    launcher += ["--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={free_port()}"]
    for out, command in (("one", [str(worker)]), ("two", ["-m", *launcher, str(worker)])):
        (tmp_path / out).mkdir()
        done = subprocess.run(
            [sys.executable, *command, str(photos), str(tmp_path / out)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
    alone, *both = (
        torch.load(tmp_path / name, weights_only=True) for name in ("one/rank0.pt", "two/rank0.pt", "two/rank1.pt")
    )
    assert (alone["count"], both[0]["count"]) == (1, 2)
    assert len(alone["found"]) == 12
    assert {name for name, got in alone["found"].items() if "error" in got} == (
        {"skip 1", "skip 2"} | {f"raise {count}" for count in range(1, 7)}
    )
    for process in both:
        for name, got in alone["found"].items():
            assert process["found"][name].keys() == got.keys(), name
            if "error" not in got:
                assert process["found"][name]["ids"] == got["ids"], name
                assert torch.equal(process["found"][name]["labels"], got["labels"])
                torch.testing.assert_close(process["found"][name]["vectors"], got["vectors"], atol=1e-5, rtol=0)
            else:
                assert process["found"][name] == got, name
