"""The one loop: batches in, a trained objective out, and everything written down on the way.

    for each step:  for each part of it: batch, seed, loss, gradient;  clip;  step;  now and then: log, evaluate, save

A batch whose graph is too large for memory is embedded in micro batches: see `grad_cache`.

The loop knows neither what a loss nor what a metric is: the objective gives the one, a callable the other.

**Exact resume.** What the network draws at random in a step (dropout) is seeded by the run's seed, the step and the
process (and the micro batch), and the batch of a step is a function of the step. So a run that was killed and resumed
gives, bit by bit, the losses of one that was not, however often the loader was restarted or an evaluation drew numbers
in between.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vicinal.embedding import choose_precision
from vicinal.models.merging import EMA
from vicinal.models.modules import prepare_for
from vicinal.progress import Bar
from vicinal.training.checkpoint import Checkpoints, load_checkpoint, load_trained_state, trained_state
from vicinal.training.collapse import collapsed
from vicinal.training.devices import accelerator_for
from vicinal.training.grad_cache import Halves, backward_in_parts, check_parts, items
from vicinal.training.history import History, Meter
from vicinal.types import Batch, Estimate, InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["FitResult", "fit"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FitResult:
    """What a training came to. The objective then holds the weights of `best_step`.

    Args:
        steps: taken, those before a resume included.
        best_step: the step whose weights were kept; 0 is the model before training. Without evaluation, the last step.
        best_value: the monitored metric there, measured once more after the weights were restored; NaN without.
        history: the rows of `history.jsonl`.
        stopped_early: for want of improvement.
        seconds: of training, evaluations and those before a resume included.
    """

    steps: int
    best_step: int
    best_value: float
    history: list[dict[str, Any]]
    stopped_early: bool
    seconds: float


def fit(
    objective: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    optimizer: Optimizer,
    scheduler: LRScheduler,
    *,
    steps: int,
    evaluate: Callable[[], Mapping[str, float | Estimate]] | None = None,
    evaluate_every: int = 500,
    evaluated: Callable[[int], None] | None = None,
    monitor: str = "map@r",
    out: Path | None = None,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    clip: float | None = 1.0,
    accumulate: int = 1,
    micro_batch: int | None = None,
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
        batches: given the number of batches already taken, an iterator over those that follow. Of several processes
            each gives its own share.
        optimizer: over all that is trained, the loss's own parameters included: see `parameter_groups`.
        scheduler: stepped once a step: see `warmup_cosine`.
        steps: of the optimiser.
        evaluate: measures the objective as it then is; larger is better. It is called before the first step (so a
            training that only harms is found out), every `evaluate_every` steps, after the last, and after the best
            weights were restored. Where it gives intervals, the last step is kept unless the best lies above its
            interval: the best of several noisy looks is often only the luckiest, and its learning rate was still high.
        evaluate_every: in steps.
        evaluated: told the step after each evaluation that stands in the history, in the process that measured.
        monitor: the metric by which the best step is chosen and early stopping decides.
        out: the run folder, which gets `history.jsonl`, `checkpoints/` and the trackers' files. None: nothing is
            written, and the best weights are kept in memory.
        precision: "auto" is bf16 where the device has it, fp16 with a loss scaler on a GPU without, else fp32.
            Parameters stay in fp32 in each.
        clip: the largest norm of the gradient over all parameters; None: no limit.
        accumulate: batches a step, their gradients averaged. For a loss that compares the items of a batch this is not
            a larger batch: each part sees its own negatives alone.
        micro_batch: embed so many items of a batch at a time; the gradients are those of the whole batch, for every
            loss (GradCache, arXiv:2101.06983). Memory is that of a micro batch, and the forward pass is run twice but
            for the last micro batch. None: the whole batch at once.
        patience: stop after so many evaluations in a row without improvement; None: never.
        min_delta: how much better counts as improvement.
        ema: decay of a moving average of the trained weights, which is then what is evaluated, kept as best and left in
            the objective; for instance 0.99. None: none.
        checkpoint_every: in steps; by default at each evaluation, and without one ten times.
        keep: how many of the newest checkpoints are kept; the best weights are kept besides.
        resume: None begins anew; "last" goes on from the newest checkpoint below `out`, from the start if there is
            none yet; a path goes on from that checkpoint, and drops those of later steps.
        progress: show a bar, if there is a terminal or a notebook.
        trackers: any of "tensorboard", "wandb", "mlflow".
        log_every: in steps; a logged loss is the mean over them.
        identity: of the recipe: a checkpoint of another is refused.

    Returns:
        What it came to; the objective holds the best weights, in evaluation mode.

    Raises:
        InputError: a setting cannot be used, a checkpoint not be read or written, or the loss is no longer finite.
        ValueError: the optimiser lacks a trained parameter, or the batches run out.

    >>> class Objective(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.line = nn.Linear(2, 1)
    ...     def forward(self, batch):
    ...         return {"loss": (self.line(batch["image"]).squeeze() - batch["label"]).square().mean()}
    >>> def batches(start):
    ...     while True:
    ...         yield {"image": torch.eye(2), "label": torch.tensor([1.0, 3.0])}
    >>> objective = Objective()
    >>> optimizer = torch.optim.SGD(objective.parameters(), lr=0.2)
    >>> constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    >>> result = fit(objective, batches, optimizer, constant, steps=100, clip=None, precision="fp32", progress=False)
    >>> result.steps, len(result.history), result.history[-1]["loss"] < 1e-6
    (100, 10, True)
    """
    counts = {"steps": steps, "evaluate_every": evaluate_every, "accumulate": accumulate, "micro_batch": micro_batch}
    counts |= {"patience": patience, "checkpoint_every": checkpoint_every, "log_every": log_every}
    _check_settings(counts, out, resume)
    device = next(objective.parameters()).device
    precision = choose_precision(precision, device)
    checkpoints = None if out is None else Checkpoints(out / "checkpoints", keep)
    start_from = _start_from(resume, checkpoints)
    accelerator = accelerator_for(device, precision, trackers, out)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    run = _Run(objective, optimizer, scheduler, accelerator, checkpoints, evaluate, monitor, ema, identity, dtype)
    run.evaluated = evaluated
    if start_from is not None:
        run.restore(start_from)
    state, meter = run.state, run.meter
    run.history = History(
        out / "history.jsonl" if out is not None and accelerator.is_main_process else None,
        until=-1 if start_from is None else state.step,
    )
    model = objective
    if accelerator.num_processes > 1:
        model = accelerator.prepare(objective if micro_batch is None else Halves(objective))
    scaler: torch.amp.GradScaler | None = accelerator.scaler
    trained = _trained(objective, optimizer)
    checkpoint_every = checkpoint_every or (math.ceil(steps / 10) if evaluate is None else evaluate_every)
    bar = Bar("training", steps, done=state.step, shown=progress and accelerator.is_main_process, lasting=True)

    try:
        with bar:
            run.set_to_train()
            if micro_batch is not None:
                check_parts(objective)
            if evaluate is not None and state.best_step is None:
                run.evaluate(min_delta)
            over = state.stopped or state.step >= steps
            stream = iter(()) if over else batches(state.step * accumulate)
            meter.clock = time.monotonic()
            while state.step < steps and not state.stopped:
                images = 0
                for part in range(accumulate):
                    batch = _to(_next(stream, state.step), device)
                    seed = partial(_seed_everything, device, state.seed, state.step, part, accelerator.process_index)
                    later = part < accumulate - 1
                    if micro_batch is not None and items(batch) > micro_batch:
                        parts = backward_in_parts(
                            accelerator,
                            model,
                            objective,
                            batch,
                            micro_batch=micro_batch,
                            divisor=accumulate,
                            seed=seed,
                            joined=not later,
                        )
                    else:
                        seed()
                        with _joined_later(accelerator, model, later):
                            with accelerator.autocast():
                                parts = model(batch)
                            accelerator.backward(parts["loss"] / accumulate)
                    meter.add({k: v for k, v in parts.items() if k != "embeddings"}, weight=1 / accumulate)
                    images += items(batch)
                if scaler is not None:
                    scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(trained, math.inf if clip is None else clip)
                lr = optimizer.param_groups[0]["lr"]
                if scaler is None:
                    optimizer.step()
                else:
                    scaler.step(optimizer)
                    scaler.update()
                scheduler.step()
                optimizer.zero_grad()
                if run.average is not None:
                    run.average.update()
                meter.add({"grad_norm": norm})
                meter.count(images=images * accelerator.num_processes)
                state.step += 1
                bar.advance()

                last = state.step == steps
                logs = last or state.step % log_every == 0
                evaluates = evaluate is not None and (last or state.step % evaluate_every == 0)
                saves = last or state.step % checkpoint_every == 0
                if logs or evaluates or saves:  # the only steps that wait for the device
                    run.check_finite()
                if logs:
                    row = run.log(lr)
                    bar.say(f"loss {row['loss']:.3f}  {row['images_per_second']:.0f} images/s")
                    if 4 * state.step >= steps:  # a training from random weights begins with all alike
                        run.warn_of_collapse(parts, batch)
                paused = time.monotonic()
                if evaluates:
                    run.evaluate(min_delta, last=last)
                    state.stopped = patience is not None and state.evaluations_since_best >= patience
                if saves or state.stopped:
                    run.save()
                meter.pause(time.monotonic() - paused)
        del stream  # and with it the loader's processes
        run.leave_best_weights()
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        run.set_to_use()
    return FitResult(
        steps=state.step,
        best_step=state.step if state.best_step is None else state.best_step,
        best_value=math.nan if state.best_step is None else state.best_value,
        history=run.history.rows,
        stopped_early=state.stopped,
        seconds=run.seconds(),
    )


@dataclass(slots=True)
class _State:
    """How far a run is: what, beside weights and optimiser, its continuation has to know."""

    seed: int
    step: int = 0
    best_step: int | None = None
    best_value: float = -math.inf
    to_beat: float = -math.inf
    evaluations_since_best: int = 0
    stopped: bool = False
    seconds: float = 0.0


class _Run:
    """What a run does now and then, beside its steps."""

    def __init__(
        self,
        objective: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        accelerator: Accelerator,
        checkpoints: Checkpoints | None,
        evaluate: Callable[[], Mapping[str, float | Estimate]] | None,
        monitor: str,
        ema: float | None,
        identity: str,
        dtype: torch.dtype,
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.accelerator = accelerator
        self.checkpoints = checkpoints
        self.measure = evaluate
        self.monitor = monitor
        self.average = None if ema is None else EMA(objective, ema)
        self.identity = identity
        self.dtype = dtype
        self.prepared = ExitStack()
        self.state = _State(seed=torch.initial_seed())
        self.meter = Meter(next(objective.parameters()).device)
        self.history = History(None)
        self.best: dict[str, Tensor] = {}
        self.evaluated: Callable[[int], None] | None = None
        self.warned = False
        self.began = time.monotonic()

    def seconds(self) -> float:
        return self.state.seconds + time.monotonic() - self.began

    def set_to_train(self) -> None:
        """Training mode, and the encoder in the form that trains fastest on this device in this precision."""
        self.objective.train()
        self.prepared.enter_context(prepare_for(self.objective, self.meter.device.type, self.dtype))

    def set_to_use(self) -> None:
        """Evaluation mode, and the encoder as it was given: what is measured is what will be used."""
        self.prepared.close()
        self.objective.eval()

    def log(self, lr: float) -> dict[str, Any]:
        row = {"step": self.state.step, **self.meter.means(), "lr": lr}
        row |= {"images_per_second": self.meter.speed(), "seconds": self.seconds()}
        self.history.add(row)
        self.accelerator.log({f"train/{k}": v for k, v in row.items() if k != "step"}, step=self.state.step)
        self.meter.begin()
        return row

    def warn_of_collapse(self, parts: Mapping[str, Tensor], batch: Batch) -> None:
        if self.warned or "embeddings" not in parts or not self.accelerator.is_main_process:
            return
        wrong = collapsed(parts["embeddings"], batch["label"])
        if wrong is not None:
            self.warned = True
            logger.warning("step %d: the model may have collapsed: %s; lower lr or the margin", self.state.step, wrong)

    def check_finite(self) -> None:
        # A loss scaler skips a step whose gradient overflowed: that is its work, not a fault.
        scaled = self.accelerator.scaler is not None
        broken = [name for name in self.meter.broken() if not (scaled and name == "grad_norm")]
        if not broken:
            return
        last = None if self.checkpoints is None else self.checkpoints.last()
        raise InputError(
            f"at or shortly before step {self.state.step}, {' and '.join(broken)} became infinite or NaN: lower lr, or "
            "set precision=fp32. " + (f"The last good checkpoint is {last}" if last else "There is no checkpoint yet")
        )

    def evaluate(self, min_delta: float = 0.0, *, last: bool = False) -> None:
        """Measure, write it down, and keep the weights if they are the best so far, or as good by what is known."""
        state = self.state
        with self._averaged():
            values, high = self._measured()
            self.history.add({"step": state.step, "val": values})
            if self.evaluated is not None and self.accelerator.is_main_process:
                self.evaluated(state.step)
            self.accelerator.log({f"val/{k}": v for k, v in values.items()}, step=state.step)
            value = values[self.monitor] if math.isfinite(values[self.monitor]) else -math.inf
            if state.best_step is None or value > state.best_value or (last and high >= state.best_value):
                state.best_step, state.best_value = state.step, value
                self._keep_as_best()
        # Any gain is worth keeping, but only one of more than min_delta is worth waiting on.
        if value > state.to_beat:
            state.to_beat, state.evaluations_since_best = value + min_delta, 0
        else:
            state.evaluations_since_best += 1

    def _measured(self) -> tuple[dict[str, float], float]:
        """The metrics by one process, and how high the watched one may lie; told to all, so that they decide alike."""
        told: list[Any] = [None, -math.inf]
        if self.accelerator.is_main_process and self.measure is not None:
            self.set_to_use()
            estimates = self.measure()
            told[0] = {name: float(e.value if isinstance(e, Estimate) else e) for name, e in estimates.items()}
            if isinstance(watched := estimates.get(self.monitor), Estimate):
                told[1] = watched.high
            self.set_to_train()
        if self.accelerator.num_processes > 1:
            from accelerate.utils import broadcast_object_list

            broadcast_object_list(told)
        values: dict[str, float] = told[0]
        if self.monitor not in values:
            known = ", ".join(values) or "nothing"
            raise InputError(f"monitor: there is no metric {self.monitor!r}; the evaluation gives {known}")
        return values, told[1]

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.applied()

    def _keep_as_best(self) -> None:
        if self.checkpoints is None:
            self.best = {name: tensor.clone() for name, tensor in trained_state(self.objective).items()}
        elif self.accelerator.is_main_process:
            self.checkpoints.save_best(self.state.step, trained_state(self.objective))

    def leave_best_weights(self) -> None:
        """Put the best weights into the objective, and measure them again: what is left is what was reported."""
        state = self.state
        if state.best_step is None:  # without evaluation the last are the best
            with self._averaged():
                averages = {name: tensor.clone() for name, tensor in trained_state(self.objective).items()}
            load_trained_state(self.objective, averages)
            return
        if state.best_step == state.step and self.average is None:
            return
        self.accelerator.wait_for_everyone()
        load_trained_state(
            self.objective, self.best if self.checkpoints is None else self.checkpoints.load_best(state.best_step)
        )
        again = self._measured()[0][self.monitor]
        if abs(again - state.best_value) > 1e-3:
            logger.warning(
                "%s was %.4f at step %d, and is %.4f after its weights were restored: the evaluation is not "
                "deterministic", self.monitor, state.best_value, state.best_step, again,
            )  # fmt: skip
        state.best_value = again

    def save(self) -> None:
        """Write a checkpoint from which the run can go on exactly."""
        if self.checkpoints is None or not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        content = {
            "state": asdict(self.state) | {"seconds": self.seconds()},
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "meter": self.meter.state_dict(),
            "identity": self.identity,
        }
        self.checkpoints.save(self.state.step, trained_state(self.objective), content, best_step=self.state.best_step)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint."""
        weights, content = load_checkpoint(path)
        if content["identity"] != self.identity:
            raise InputError(f"{path} was made by another recipe; go on with that one, or begin anew in another out")
        scaler = self.accelerator.scaler
        if (scaler is None) != (content["scaler"] is None) or (self.average is None) != (content["average"] is None):
            raise InputError(f"{path} was made in another precision, or with another ema; go on with the same")
        load_trained_state(self.objective, weights)
        self.optimizer.load_state_dict(content["optimizer"])
        self.scheduler.load_state_dict(content["scheduler"])
        if scaler is not None:
            scaler.load_state_dict(content["scaler"])
        if self.average is not None:
            self.average.load_state_dict(content["average"])
        self.meter.load_state_dict(content["meter"])
        for name, value in content["state"].items():
            setattr(self.state, name, value)
        if self.checkpoints is not None and self.accelerator.is_main_process:
            self.checkpoints.go_on_from(path, self.state.step, self.state.best_step)


def _check_settings(counts: Mapping[str, int | None], out: Path | None, resume: str | Path | None) -> None:
    for name, value in counts.items():
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if resume is not None and out is None:
        raise InputError("resume looks for checkpoints in the run folder: give out")


def _trained(objective: nn.Module, optimizer: Optimizer) -> list[nn.Parameter]:
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    forgotten = [n for n, p in objective.named_parameters() if p.requires_grad and id(p) not in known]
    if forgotten:
        raise ValueError(f"the optimiser does not know {', '.join(forgotten[:3])}: build it from parameter_groups")
    return [p for p in objective.parameters() if p.requires_grad]


def _start_from(resume: str | Path | None, checkpoints: Checkpoints | None) -> Path | None:
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
    if str(resume) != "last":
        return Path(resume)
    if last is None:
        logger.warning("resume=last: there is no checkpoint in %s yet; beginning at step 0", checkpoints.folder)
    return last


def _seed_everything(device: torch.device, seed: int, step: int, part: int, process: int, *micro: int) -> None:
    """What the network draws depends on the run, the step and the process, and on nothing that came before."""
    number = np.random.SeedSequence([seed % 2**64, step, part, process, *micro]).generate_state(1, np.uint32).item()
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002  (the global one: an objective of the user's may draw from it)
    # Not torch.manual_seed, which takes half a millisecond to tell every kind of device there could be.
    torch.default_generator.manual_seed(number)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(number)


def _next(stream: Iterator[Batch], step: int) -> Batch:
    batch = next(stream, None)
    if batch is None:
        raise ValueError(f"the batches ran out at step {step}: they have to go on for as many steps as are asked for")
    return batch


def _to(batch: Batch, device: torch.device) -> Batch:
    moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    return cast(Batch, moved)


def _joined_later(accelerator: Accelerator, model: nn.Module, later: bool) -> AbstractContextManager[None]:
    """Between processes, gradients are joined once a step, in its last part."""
    return cast(AbstractContextManager[None], accelerator.no_sync(model)) if later else nullcontext()
