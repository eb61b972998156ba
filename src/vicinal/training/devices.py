"""Where, in which precision and in how many processes a training runs: the thin layer over accelerate."""

from __future__ import annotations

import atexit
import difflib
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from vicinal.types import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TRACKERS", "Processes", "accelerator_for", "check_trackers", "leave"]

TRACKERS = ("tensorboard", "wandb", "mlflow")
PATIENCE = timedelta(hours=6)  # how long the others wait while one measures, or fetches data

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that train together, and which of them this is.

    Args:
        rank: of this one, from 0.
        count: how many there are.

    >>> alone = Processes()
    >>> alone.main, alone.gathered("mine"), alone.told("mine")
    (True, ['mine'], 'mine')
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def joined(cls, device: torch.device) -> Processes:
        """Join those that torchrun or `accelerate launch` started beside this one; alone, where none were.

        Each then has a GPU of its own, as "cuda" means it; on the CPU they talk by gloo.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device.type == "cpu", timeout=PATIENCE)
        atexit.register(_destroy_group)
        return cls(state.process_index, state.num_processes)

    @property
    def main(self) -> bool:
        """Whether this is the one that writes files, measures and speaks."""
        return self.rank == 0

    def share(self, count: int) -> slice:
        """The part of `count` things in a row that is this one's; all of them, where there are not enough to share.

        >>> [Processes(rank, 3).share(10) for rank in range(3)]
        [slice(0, 3, None), slice(3, 6, None), slice(6, 10, None)]
        """
        if count < self.count:
            return slice(0, count)
        return slice(count * self.rank // self.count, count * (self.rank + 1) // self.count)

    def gathered(self, value: T) -> list[T]:
        """What each gave, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def told(self, value: T) -> T:
        """What the main one gave."""
        if self.count == 1:
            return value
        values: list[Any] = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        told: T = values[0]
        return told

    def wait(self) -> None:
        """Until all are here."""
        self.gathered(None)

    def main_first(self, work: Callable[[], T]) -> T:
        """Let the main one do it before the others: what it writes into a cache they then find."""
        if self.main:
            done = work()
            self.wait()
            return done
        self.wait()
        return work()


def leave(code: int = 0) -> None:
    """End this process, where it is one of several that talk to each other; alone, do nothing.

    What was registered to run at exit runs, what was written is flushed, and the process ends without finalising the
    interpreter: torch keeps a group alive once a model has been wrapped for it, whether it was destroyed or not, and
    a thread of gloo that asks for the interpreter while it is finalised aborts the process, all its work done.

    Args:
        code: what the process ends with.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    atexit._run_exitfuncs()  # the group's end among them
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _destroy_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def accelerator_for(device: torch.device, precision: str, trackers: Sequence[str], out: Path | None) -> Accelerator:
    """Accelerate's Accelerator for this device, its trackers begun below `out`/logs.

    Raises:
        InputError: a tracker is unknown or not installed, or the processes were launched in a way that is not plain
            data parallelism.
    """
    check_trackers(trackers, out)
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # Accelerate keeps device and precision for the whole process, and refuses a second training with others.
    AcceleratorState._reset_state(reset_partial_state=not several)
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if not several:  # torchrun's processes choose theirs by rank
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=list(trackers) or None,
            project_dir=None if out is None else str(out / "logs"),
            step_scheduler_with_optimizer=False,
        )
    finally:
        if before is not None:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before
        elif not several:
            del os.environ["ACCELERATE_TORCH_DEVICE"]
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise InputError(f"launched as {kind}, which this loop cannot save; launch plain data-parallel processes")
    if trackers:
        accelerator.init_trackers("vicinal")
    return accelerator


def check_trackers(trackers: Sequence[str], out: Path | None) -> None:
    """Whether these can write.

    Raises:
        InputError: one is unknown or not installed, or there is no folder.
    """
    for name in trackers:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, 1)
            mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(TRACKERS)}"
            raise InputError(f"trackers: there is no {name!r}; {mend}")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"trackers: {name} is not installed; pip install {name}, or leave it out of trackers")
    if trackers and out is None:
        raise InputError("trackers write into the run folder: give out")
