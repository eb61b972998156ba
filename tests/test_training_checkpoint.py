"""Checkpoints: whole or not at all."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vicinal.training.checkpoint import Checkpoints, load_checkpoint, load_trained_state, trained_state
from vicinal.types import InputError


def weights(value: float, numbers: int = 4) -> dict[str, Tensor]:
    return {"a": torch.full((numbers,), value), "b.c": torch.tensor(3)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writing fails beyond this size, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_saved_is_loaded(tmp_path: Path):
    state = {"step": 7, "numbers": [1.5, torch.arange(3)], "nested": {"x": None}}
    path = Checkpoints(tmp_path).save(7, weights(1.0), state)
    loaded, content = load_checkpoint(path)
    assert path.name == "step-00000007"
    assert loaded.keys() == weights(1.0).keys()
    assert torch.equal(loaded["a"], weights(1.0)["a"])
    assert content["step"] == 7
    assert torch.equal(content["numbers"][1], torch.arange(3))


def test_the_newest_are_kept_and_the_best_besides(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    assert checkpoints.last() is None
    for step, best in ((1, 1), (2, 1), (3, 3), (4, 3)):
        if step == best:
            checkpoints.save_best(step, weights(step))
        checkpoints.save(step, weights(step), {}, best_step=best)
    assert names(tmp_path) == ["best-00000003.safetensors", "step-00000003", "step-00000004"]
    assert checkpoints.last() == tmp_path / "step-00000004"
    assert checkpoints.load_best(3)["a"][0] == 3
    # one file under two names: the best weights cost their space once
    assert (tmp_path / "step-00000004" / "best.safetensors").samefile(checkpoints.best(3))


def test_going_on_from_an_earlier_checkpoint_brings_its_best_back_and_drops_the_later(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save_best(step, weights(step))
        checkpoints.save(step, weights(step), {}, best_step=step)
    assert not checkpoints.best(2).exists()
    checkpoints.go_on_from(tmp_path / "step-00000002", 2, 2)
    assert [path.name for path in checkpoints.all()] == ["step-00000001", "step-00000002"]
    assert checkpoints.load_best(2)["a"][0] == 2


def test_a_step_can_be_saved_again(tmp_path: Path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, weights(1.0), {})
    checkpoints.save(5, weights(2.0), {})
    assert load_checkpoint(tmp_path / "step-00000005")[0]["a"][0] == 2


@pytest.mark.parametrize("large", ["weights", "state"])
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, large: str):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save_best(5, weights(1.0))
    checkpoints.save(5, weights(1.0), {"step": 5}, best_step=5)
    before = names(tmp_path)
    many = torch.zeros(100_000)
    with no_file_above(50_000), pytest.raises(InputError, match=r"could not write .*step-00000005"):
        checkpoints.save(
            6,
            weights(2.0, 100_000 if large == "weights" else 4),
            {"many": many if large == "state" else None},
            best_step=5,
        )
    with no_file_above(50_000), pytest.raises(InputError, match="resume=last"):
        checkpoints.save_best(6, weights(2.0, 100_000))
    assert names(tmp_path) == before
    assert load_checkpoint(checkpoints.last() or Path())[1] == {"step": 5}


def test_a_full_disk_at_the_very_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, weights(1.0), {})

    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(InputError, match="No space left"):
        checkpoints.save(6, weights(2.0), {})
    assert names(tmp_path) == ["step-00000005"]


@pytest.mark.parametrize("damage", ["missing", "weights", "state", "pickle"])
def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path, damage: str):
    path = tmp_path / "step-00000009"
    if damage != "missing":
        path = Checkpoints(tmp_path).save(9, weights(1.0), {})
    if damage in ("weights", "state"):
        file = path / {"weights": "weights.safetensors", "state": "state.pt"}[damage]
        file.write_bytes(file.read_bytes()[:-20])
    if damage == "pickle":  # code is not run, whoever wrote it
        torch.save({"x": Path("y")}, path / "state.pt")
    with pytest.raises(InputError, match="step-00000009 is not a checkpoint"):
        load_checkpoint(path)


def test_keep_below_one_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)


def module() -> nn.Sequential:
    built = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    built[0].requires_grad_(False)
    return built


def test_only_what_training_changes_is_stored():
    state = trained_state(module())
    assert sorted(state) == [
        "1.bias",
        "1.num_batches_tracked",
        "1.running_mean",
        "1.running_var",
        "1.weight",
        "2.bias",
        "2.weight",
    ]


def test_the_trained_state_is_put_back():
    one, other = module(), module()
    one(torch.randn(8, 2))  # moves the running statistics
    load_trained_state(other, trained_state(one))
    assert all(torch.equal(other.state_dict()[name], value) for name, value in trained_state(one).items())
    assert not torch.equal(other[0].weight, one[0].weight)


@pytest.mark.parametrize("change", ["missing", "stranger", "shape"])
def test_the_state_of_another_model_is_refused(change: str):
    state = trained_state(module())
    if change == "missing":
        del state["2.weight"]
    elif change == "stranger":
        state["3.weight"] = torch.zeros(1)
    else:
        state["2.weight"] = torch.zeros(1, 5)
    with pytest.raises(InputError, match=r"another model.*'(2|3)\.weight'"):
        load_trained_state(module(), state)
