"""The one loop: batches in, a trained objective out, and everything written down on the way.

    for each step:  seed; for each part of it: loss, backward;  clip;  step;  now and then: log, evaluate, save

It knows neither what a loss nor what a metric is: the objective gives the one, a callable the other. accelerate brings
mixed precision, several processes and trackers.

**Exact resume.** What the network draws at random (dropout) in a step is seeded by the run's seed, the step and the
process, and the batch of a step is a function of the step; so a run that was killed and resumed gives, bit by bit, the
losses of one that was not, however often the loader was restarted or an evaluation drew numbers in between.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vicinal.training.checkpoint import Checkpoints, load_checkpoint, load_trained_state, trained_state
from vicinal.training.collapse import collapsed
from vicinal.training.history import History
from vicinal.types import Batch, InputError

__all__ = ["FitResult", "choose_precision", "fit"]

logger = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a training came to. The objective then holds the weights of `best_step`.

    Args:
        steps: taken, those before a resume included.
        best_step: the step of the best evaluation; 0 means the untrained model. Without evaluation, the last step.
        best_value: the monitored metric there, measured once more after the weights were restored; NaN without.
        history: the rows of `history.jsonl`.
        stopped_early: for want of improvement.
        seconds: of training, those before a resume and the evaluations included.
    """

    steps: int
    best_step: int
    best_value: float
    history: list[dict[str, Any]]
    stopped_early: bool
    seconds: float


@dataclass(slots=True)
class _Progress:
    """What, beside weights and optimiser, a continuation has to know."""

    seed: int
    step: int = 0
    best_step: int | None = None
    best_value: float = -math.inf
    evaluations_since_best: int = 0
    stopped: bool = False
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    summed: int = 0


def fit(
    objective: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    steps: int,
    evaluate: Callable[[], Mapping[str, float]] | None = None,
    evaluate_every: int = 500,
    monitor: str = "map@r",
    out: Path | None = None,
    precision: Precision = "auto",
    clip: float | None = 1.0,
    accumulate: int = 1,
    patience: int | None = None,
    min_delta: float = 0.0,
    ema: float | None = None,
    checkpoint_every: int | None = None,
    keep: int = 1,
    resume: str | Path | None = None,
    progress: bool = True,
    trackers: Sequence[str] = (),
    log_every: int = 10,
    identity: str = "",
) -> FitResult:
    """Train `objective`, in place, on the device where it is.

    Args:
        objective: `objective(batch)` gives a mapping with "loss"; other scalars in it are logged, and "embeddings" are
            watched for collapse.
        batches: given the number of batches already taken, an iterator over those that follow. Under several processes
            each gives its own share.
        optimizer: over all trained parameters, the loss's own included: see `parameter_groups`.
        scheduler: stepped once a step: see `warmup_cosine`.
        steps: of the optimiser.
        evaluate: gives the metrics of the objective as it then is, larger being better. It is called before the first
            step (so that a training that only harms is found out), every `evaluate_every` steps, and after the last.
        evaluate_every: in steps.
        monitor: the metric by which the best step is chosen and early stopping decides.
        out: the run folder, which gets `history.jsonl`, `checkpoints/` and the trackers' files. None: nothing is
            written, the best weights are kept in memory.
        precision: "auto" is bf16 where the device has it, fp16 with a loss scaler on a GPU without, else fp32.
            Parameters stay in fp32 in each.
        clip: the largest norm of the gradient over all parameters; None: no limit.
        accumulate: batches a step, their gradients averaged. For a loss that compares the items of a batch this is not
            a larger batch: each part sees its own negatives alone.
        patience: stop after so many evaluations in a row without improvement; None: never.
        min_delta: what counts as improvement.
        ema: decay of an exponential moving average of the trained weights, which is what is then evaluated, kept as
            best and left in the objective; for instance 0.99. None: none.
        checkpoint_every: in steps; by default at each evaluation, and without one at the end.
        keep: how many of the newest checkpoints are kept.
        resume: None begins anew; "last" goes on from the newest checkpoint below `out`, from the start if there is
            none yet; a path goes on from that checkpoint.
        progress: show a bar, if there is a terminal.
        trackers: any of "tensorboard", "wandb", "mlflow".
        log_every: in steps; the loss logged is the mean over them.
        identity: of the recipe: a checkpoint of another is refused.

    Returns:
        What it came to; the objective holds the best weights, in evaluation mode.

    Raises:
        InputError: a setting cannot be used, a checkpoint not be read or written, or the loss is no longer finite.
    """
    device = next(objective.parameters()).device
    resolved = choose_precision(precision, device)
    _check(steps, evaluate_every, accumulate, patience, ema, checkpoint_every, log_every, out, resume)
    accelerator = _accelerator(device, resolved, trackers, out)
    main = accelerator.is_main_process
    checkpoints = Checkpoints(out / "checkpoints", keep) if out is not None else None
    path = _resume_from(resume, checkpoints)

    model = accelerator.prepare(objective) if accelerator.num_processes > 1 else objective
    stepper = accelerator.prepare(optimizer)
    trained = [p for p in objective.parameters() if p.requires_grad]
    average = _Average(trained, ema) if ema is not None else None
    state = _Progress(seed=torch.initial_seed())
    if path is not None:
        _restore(path, objective, optimizer, scheduler, accelerator.scaler, average, state, identity)
        if main and checkpoints is not None:
            checkpoints.drop_after(state.step)
    history = History(out / "history.jsonl" if out is not None and main else None, until=state.step if path else -1)
    best_in_memory: dict[str, Tensor] = {}
    warned = False
    began = time.monotonic() - state.seconds
    sums: dict[str, Tensor] = {name: torch.tensor(value, device=device) for name, value in state.sums.items()}
    images, clock = 0, time.monotonic()

    def measure() -> dict[str, float]:
        """Evaluate on one process, with the averaged weights where there are such, and tell the others."""
        objective.eval()
        metrics: list[Any] = [None]
        with average.swapped_in() if average is not None else contextlib.nullcontext():
            if main and evaluate is not None:
                metrics = [{name: float(value) for name, value in evaluate().items()}]
        objective.train()
        if accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(metrics)
        values: dict[str, float] = metrics[0]
        if monitor not in values:
            raise InputError(f"monitor: there is no metric {monitor!r}; the evaluation gives {', '.join(values)}")
        return values

    def evaluate_now() -> None:
        """Measure, write it down, and remember the weights if they are the best so far."""
        values = measure()
        _write(history, accelerator, {"step": state.step, "val": values})
        if state.best_step is None or values[monitor] > state.best_value + min_delta:
            state.best_step, state.best_value, state.evaluations_since_best = state.step, values[monitor], 0
            with average.swapped_in() if average is not None else contextlib.nullcontext():
                if checkpoints is None:
                    best_in_memory.update({n: t.clone() for n, t in trained_state(objective).items()})
                elif main:
                    checkpoints.save_best(state.step, trained_state(objective))
        else:
            state.evaluations_since_best += 1
            state.stopped = patience is not None and state.evaluations_since_best >= patience

    def save_now() -> None:
        if checkpoints is None or not main:
            return
        state.seconds = time.monotonic() - began
        state.sums = {name: float(value) for name, value in sums.items()}
        content = {
            "progress": {name: getattr(state, name) for name in _Progress.__dataclass_fields__},
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
            "average": average.shadow if average is not None else None,
            "identity": identity,
        }
        checkpoints.save(state.step, trained_state(objective), content)
        checkpoints.drop_best_but(state.best_step)

    bar = _Bar(steps, state.step, shown=progress and main)
    objective.train()
    with bar, _attention_for(objective, device, resolved):
        if evaluate is not None and state.best_step is None:
            evaluate_now()
        stream = batches(state.step * accumulate) if state.step < steps and not state.stopped else iter(())
        while state.step < steps and not state.stopped:
            _seed_everything(state.seed, state.step, accelerator.process_index)
            for part in range(accumulate):
                batch = _to(next(stream), device)
                with accelerator.no_sync(model) if part < accumulate - 1 else contextlib.nullcontext():
                    with accelerator.autocast():
                        parts = dict(model(batch))
                    accelerator.backward(parts["loss"] / accumulate)
                embeddings = parts.pop("embeddings", None)
                for name, value in parts.items():
                    sums[name] = sums.get(name, 0) + value.detach() / accumulate
                images += len(batch["label"])
            norm = accelerator.clip_grad_norm_(trained, math.inf if clip is None else clip)
            stepper.step()
            scheduler.step()
            stepper.zero_grad()
            if average is not None:
                average.update()
            sums["grad_norm"] = sums.get("grad_norm", 0) + norm.detach()
            state.summed += 1
            state.step += 1

            end = state.step == steps
            logs = end or state.step % log_every == 0
            evaluates = evaluate is not None and (end or state.step % evaluate_every == 0)
            every = checkpoint_every or (evaluate_every if evaluate is not None else steps)
            saves = checkpoints is not None and (end or state.step % every == 0)
            if logs or evaluates or saves:  # the only steps that wait for the device
                _check_finite(sums, state, resolved, checkpoints)
            if logs:
                row: dict[str, Any] = {"step": state.step}
                row |= {name: float(value) / state.summed for name, value in sums.items()}
                now = time.monotonic()
                row["lr"] = optimizer.param_groups[0]["lr"]
                row["images_per_second"] = images * accelerator.num_processes / (now - clock)
                row["seconds"] = now - began
                _write(history, accelerator, row)
                bar.show(row)
                if embeddings is not None and not warned and (wrong := collapsed(embeddings, batch["label"])):
                    warned = True
                    logger.warning(
                        "step %d: the model may have collapsed: %s; lower lr, or the margin", state.step, wrong
                    )
                sums, state.summed, images, clock = {}, 0, 0, now
            bar.advance()
            paused = time.monotonic()
            if evaluates:
                evaluate_now()
            if saves:
                save_now()
            clock += time.monotonic() - paused  # the speed is that of training

    if state.stopped:
        save_now()
    if average is not None and evaluate is None:
        average.keep()
    if state.best_step is not None:
        best = best_in_memory
        if checkpoints is not None:
            from safetensors.torch import load_file

            accelerator.wait_for_everyone()
            best = load_file(checkpoints.best(state.best_step))
        load_trained_state(objective, best)
        average = None  # the best weights are averages already
        state.best_value = measure()[monitor]
    accelerator.end_training()
    objective.eval()
    return FitResult(
        steps=state.step,
        best_step=state.step if state.best_step is None else state.best_step,
        best_value=math.nan if state.best_step is None else state.best_value,
        history=history.rows,
        stopped_early=state.stopped,
        seconds=time.monotonic() - began,
    )


def choose_precision(precision: Precision, device: torch.device) -> Literal["fp32", "bf16", "fp16"]:
    """What "auto" means on this device: bf16 where it is in the hardware, fp16 on other GPUs, else fp32.

    On a CPU, bf16 in software is slower than fp32, so it takes AVX-512 bf16, AMX, or an Arm CPU with bf16.

    Raises:
        InputError: fp16 on a CPU, where it would be slow and its loss scaler is missing.

    >>> choose_precision("fp32", torch.device("cpu"))
    'fp32'
    """
    if precision == "fp16" and device.type != "cuda":
        raise InputError(f"precision: fp16 needs an NVIDIA or AMD GPU, and this is {device.type}; use auto")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and _cpu_has_bf16():
        return "bf16"
    return "fp32"


def _cpu_has_bf16() -> bool:
    if torch.backends.cpu.get_cpu_capability() in ("SVE", "SVE256"):
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class _Average:
    """An exponential moving average of the trained weights: a <- a + (1 - decay) (w - a)."""

    def __init__(self, parameters: list[nn.Parameter], decay: float) -> None:
        self.parameters = parameters
        self.decay = decay
        self.shadow = [p.detach().clone() for p in parameters]

    def update(self) -> None:
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - self.decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        own = [p.detach().clone() for p in self.parameters]
        self.keep()
        try:
            yield
        finally:
            torch._foreach_copy_([p.detach() for p in self.parameters], own)

    def keep(self) -> None:
        torch._foreach_copy_([p.detach() for p in self.parameters], self.shadow)


class _Bar:
    """A progress bar with loss, speed and the time left; nothing where there is no terminal."""

    def __init__(self, steps: int, done: int, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            disable=not (shown and console.is_terminal),
        )
        self.task = self.bar.add_task("training", total=steps, completed=done, text="")

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def advance(self) -> None:
        self.bar.advance(self.task)

    def show(self, row: Mapping[str, Any]) -> None:
        self.bar.update(self.task, text=f"loss {row['loss']:.3f}  {row['images_per_second']:.0f} images/s")


def _check(
    steps: int,
    evaluate_every: int,
    accumulate: int,
    patience: int | None,
    ema: float | None,
    checkpoint_every: int | None,
    log_every: int,
    out: Path | None,
    resume: str | Path | None,
) -> None:
    counts = {
        "steps": steps,
        "evaluate_every": evaluate_every,
        "accumulate": accumulate,
        "patience": patience,
        "checkpoint_every": checkpoint_every,
        "log_every": log_every,
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if ema is not None and not 0 < ema < 1:
        raise InputError(f"ema is a decay between 0 and 1, not {ema}")
    if resume is not None and out is None:
        raise InputError("resume needs the run folder: give out")


def _accelerator(device: torch.device, precision: str, trackers: Sequence[str], out: Path | None) -> Any:  # noqa: ANN401
    """Accelerate's Accelerator for the device where the objective is."""
    import difflib

    known = ("tensorboard", "wandb", "mlflow")
    for name in trackers:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise InputError(
                f"trackers: there is no {name!r}; " + (f"did you mean {near[0]!r}?" if near else str(known))
            )
        if importlib.util.find_spec(name) is None:
            raise InputError(f"trackers: {name} is not installed; pip install {name}, or leave it out of trackers")
    if trackers and out is None:
        raise InputError("trackers write into the run folder: give out")

    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # Accelerate keeps device and precision in process-wide state, and refuses a second training with another.
    AcceleratorState._reset_state(reset_partial_state=not several)
    before = os.environ.get("ACCELERATE_TORCH_DEVICE")
    if not several:
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no" if precision == "fp32" else precision,
            log_with=list(trackers) or None,
            project_dir=str(out) if out is not None else None,
            step_scheduler_with_optimizer=False,
        )
    finally:
        if before is None:
            os.environ.pop("ACCELERATE_TORCH_DEVICE", None)
        else:
            os.environ["ACCELERATE_TORCH_DEVICE"] = before
    if str(accelerator.distributed_type.value) not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise InputError(f"{accelerator.distributed_type.value} is not supported: launch plain data-parallel processes")
    if trackers:
        accelerator.init_trackers("logs")
    return accelerator


def _resume_from(resume: str | Path | None, checkpoints: Checkpoints | None) -> Path | None:
    if checkpoints is None:
        return None
    last = checkpoints.last()
    if resume is None:
        if last is not None:
            raise InputError(
                f"{checkpoints.folder} holds the checkpoints of an earlier run; go on with resume=last, choose another "
                "out, or delete them"
            )
        return None
    if str(resume) == "last":
        if last is None:
            logger.warning("resume=last: there is no checkpoint in %s yet; beginning at step 0", checkpoints.folder)
        return last
    return Path(resume)


def _restore(
    path: Path,
    objective: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    scaler: Any,  # noqa: ANN401  (torch's GradScaler, or None)
    average: _Average | None,
    state: _Progress,
    identity: str,
) -> None:
    weights, content = load_checkpoint(path)
    if content["identity"] != identity:
        raise InputError(f"{path} was made by another recipe; resume with the one it was made by, or begin anew")
    load_trained_state(objective, weights)
    optimizer.load_state_dict(content["optimizer"])
    scheduler.load_state_dict(content["scheduler"])
    if scaler is not None:
        scaler.load_state_dict(content["scaler"])
    if average is not None:
        torch._foreach_copy_(average.shadow, list(content["average"]))
    for name, value in copy.deepcopy(content["progress"]).items():
        setattr(state, name, value)


def _write(history: History, accelerator: Any, row: dict[str, Any]) -> None:  # noqa: ANN401
    history.add(row)
    values = (
        {f"val/{k}": v for k, v in row["val"].items()} if "val" in row else {f"train/{k}": v for k, v in row.items()}
    )
    accelerator.log(values, step=row["step"])


def _check_finite(
    sums: Mapping[str, Tensor], state: _Progress, precision: str, checkpoints: Checkpoints | None
) -> None:
    # Under fp16 the scaler skips a step whose gradient overflowed: that is its work, not a fault.
    bad = [n for n, value in sums.items() if not (n == "grad_norm" and precision == "fp16") and not value.isfinite()]
    if not bad:
        return
    last = checkpoints.last() if checkpoints is not None else None
    raise InputError(
        f"at step {state.step} or shortly before, {' and '.join(bad)} became infinite or NaN: lower lr, or set "
        "precision=fp32. " + (f"The last good checkpoint is {last}" if last else "There is no checkpoint yet")
    )


def _seed_everything(seed: int, step: int, process: int) -> None:
    """What is drawn in a step depends on the run, the step and the process, and on nothing that came before."""
    number = np.random.SeedSequence([seed % 2**64, step, process]).generate_state(1, np.uint32).item()
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  (the global one is what other people's transforms draw from)
    torch.manual_seed(number)


def _to(batch: Batch, device: torch.device) -> Batch:
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return cast(Batch, moved)


@contextlib.contextmanager
def _attention_for(objective: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Attention in the form that is fastest for this device and precision, for the time of the training."""
    yield
