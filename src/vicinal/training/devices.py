"""Where and in which precision a training runs: the thin layer over accelerate."""

from __future__ import annotations

import difflib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vicinal.types import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["TRACKERS", "accelerator_for"]

TRACKERS = ("tensorboard", "wandb", "mlflow")


def accelerator_for(device: torch.device, precision: str, trackers: Sequence[str], out: Path | None) -> Accelerator:
    """Accelerate's Accelerator for this device, its trackers begun below `out`/logs.

    Raises:
        InputError: a tracker is unknown or not installed, or the processes were launched in a way that is not plain
            data parallelism.
    """
    _check_trackers(trackers, out)
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


def _check_trackers(trackers: Sequence[str], out: Path | None) -> None:
    for name in trackers:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, 1)
            mend = f"did you mean {near[0]}?" if near else f"there are {', '.join(TRACKERS)}"
            raise InputError(f"trackers: there is no {name!r}; {mend}")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"trackers: {name} is not installed; pip install {name}, or leave it out of trackers")
    if trackers and out is None:
        raise InputError("trackers write into the run folder: give out")
