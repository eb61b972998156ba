"""Checkpoints: what was trained, and all that an exact continuation needs. Written whole or not at all.

A run's `checkpoints/` holds

    step-00000500/weights.safetensors     the trained parameters and the buffers, of encoder and loss, by name
    step-00000500/state.pt                step, optimiser, schedule, scaler, averages, early stopping
    step-00000500/best.safetensors        the best weights up to then: the same file as the next, not a copy
    best-00000400.safetensors             the weights at the best evaluation so far

The frozen part of the model is not stored: it is found again where it came from. A checkpoint is written beside its
place, flushed to the disk and then renamed, so that a killed process or a full disk leaves the last one whole. Nothing
is pickled: `state.pt` is read with `weights_only=True`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vicinal.types import InputError

__all__ = ["Checkpoints", "load_checkpoint", "load_trained_state", "trained_state"]


def trained_state(module: nn.Module) -> dict[str, Tensor]:
    """What training changes: parameters that take a gradient, and buffers, by name. Not copies, except the buffers.

    >>> layer = nn.BatchNorm1d(2, affine=False)
    >>> sorted(trained_state(layer))
    ['num_batches_tracked', 'running_mean', 'running_var']
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    state = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    return state | {name: b.detach().clone() for name, b in module.state_dict().items() if name not in parameters}


@torch.no_grad()
def load_trained_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back, in place, what `trained_state` took.

    Raises:
        InputError: the names or shapes are not those of this module's trained state.
    """
    own = trained_state(module)
    strangers, missing = sorted(state.keys() - own.keys()), sorted(own.keys() - state.keys())
    shapes = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if strangers or missing or shapes:
        first = (strangers + missing + shapes)[0]
        raise InputError(
            f"the checkpoint was made with another model, adapter or loss: {len(missing)} tensors are missing, "
            f"{len(strangers)} unknown and {len(shapes)} of another shape, the first being {first!r}"
        )
    targets = dict(module.named_parameters()) | dict(module.named_buffers(remove_duplicate=False))
    for name, value in state.items():
        targets[name].copy_(value)


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights and the state of a checkpoint folder.

    Raises:
        InputError: it is not there, or not a whole checkpoint.
    """
    import pickle

    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        return load_file(path / "weights.safetensors"), state
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise InputError(f"{path} is not a checkpoint to go on from: {error}") from error


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they lie.
        keep: how many of the newest are kept; the best is kept besides.

    Raises:
        ValueError: `keep` is below 1.

    >>> import tempfile
    >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()), keep=2)
    >>> for step in (10, 20, 30):
    ...     path = checkpoints.save(step, {"weight": torch.zeros(2)}, {"step": step})
    >>> [path.name for path in checkpoints.all()], load_checkpoint(path)[1]
    (['step-00000020', 'step-00000030'], {'step': 30})
    """

    folder: Path
    keep: int = 1

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1: the last checkpoint is always kept, not {self.keep}")

    def all(self) -> list[Path]:
        """Every whole checkpoint, oldest first."""
        return sorted(self.folder.glob("step-*"))

    def last(self) -> Path | None:
        """The newest, or None."""
        return next(reversed(self.all()), None)

    def save(
        self, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any], *, best_step: int | None = None
    ) -> Path:
        """Write a checkpoint, then drop those beyond `keep`, and the best weights of all steps but `best_step`.

        Raises:
            InputError: the disk is full, or cannot be written to.
        """
        from safetensors.torch import save_file

        def write(fresh: Path) -> None:
            fresh.mkdir()
            save_file(_plain(weights), fresh / "weights.safetensors")
            torch.save(dict(state), fresh / "state.pt")
            if best_step is not None:
                _link(self.best(best_step), fresh / "best.safetensors")
            for file in fresh.iterdir():
                _sync(file)
            _sync(fresh)

        path = self._replace(self.folder / f"step-{step:08d}", write)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old)
        for best in self.folder.glob("best-*.safetensors"):
            if best_step is None or best != self.best(best_step):
                best.unlink()
        return path

    def save_best(self, step: int, weights: Mapping[str, Tensor]) -> Path:
        """Write the weights of the best step so far. Those before it go when the next checkpoint is safe.

        Raises:
            InputError: the disk is full, or cannot be written to.
        """
        from safetensors.torch import save_file

        def write(fresh: Path) -> None:
            save_file(_plain(weights), fresh)
            _sync(fresh)

        return self._replace(self.best(step), write)

    def best(self, step: int) -> Path:
        """Where the weights of the best step lie."""
        return self.folder / f"best-{step:08d}.safetensors"

    def load_best(self, step: int) -> dict[str, Tensor]:
        """Read them.

        Raises:
            InputError: they are not there.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            weights: dict[str, Tensor] = load_file(self.best(step))
        except (OSError, SafetensorError) as error:
            raise InputError(f"the best weights, of step {step}, cannot be read: {error}") from error
        return weights

    def go_on_from(self, path: Path, step: int, best_step: int | None) -> None:
        """The run goes on from `path`: bring its best weights back, drop the checkpoints of later steps."""
        for later in self.all():
            if int(later.name.removeprefix("step-")) > step:
                shutil.rmtree(later)
        if best_step is not None and not self.best(best_step).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            _link(path / "best.safetensors", self.best(best_step))

    def _replace(self, path: Path, write: Callable[[Path], None]) -> Path:
        from safetensors import SafetensorError

        fresh = path.with_name(f".{path.name}.tmp")
        _remove(fresh)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write(fresh)
            _remove(path)  # a folder cannot be renamed onto one that is not empty; only a repeated step comes here
            fresh.rename(path)
            _sync(self.folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            _remove(fresh)
            last = self.last()
            raise InputError(
                f"could not write the checkpoint {path}: {error}. "
                + (
                    f"The last good one is {last}; make room and go on with resume=last"
                    if last
                    else "There is none yet"
                )
            ) from error
        return path


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def _link(source: Path, target: Path) -> None:
    """The same file under a second name, or a copy where the file system has no such links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until the disk has it: without this a power cut can leave a renamed, empty file."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
