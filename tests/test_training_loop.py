"""The loop: the same as ten plain lines, and everything it adds to them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training_parts import Tiny, batch_at, batches, optimise
from vicinal.embedding import choose_precision
from vicinal.training import checkpoint, devices, loop
from vicinal.training.checkpoint import Checkpoints
from vicinal.training.collapse import collapsed, effective_rank, spread
from vicinal.training.history import History
from vicinal.training.loop import FitResult, fit
from vicinal.types import Batch, Estimate, InputError


def train(objective: nn.Module, steps: int, *, lr: float = 1e-2, **settings: Any) -> FitResult:  # noqa: ANN401
    """`fit` in fp32, every step logged, unless said otherwise."""
    settings = {"precision": "fp32", "log_every": 1, "progress": False, "batches": batches()} | settings
    optimizer, scheduler = optimise(objective, steps, lr=lr)
    return fit(objective, settings.pop("batches"), optimizer, scheduler, steps=steps, **settings)


def losses(result: FitResult) -> list[float]:
    return [row["loss"] for row in result.history if "loss" in row]


def weights(objective: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in objective.named_parameters()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def scripted(
    objective: nn.Module, values: list[float]
) -> tuple[Callable[[], dict[str, float]], list[dict[str, Tensor]]]:
    """An evaluation that gives these values in turn, the last one for ever, and remembers the weights it saw."""
    seen: list[dict[str, Tensor]] = []

    def evaluate() -> dict[str, float]:
        assert not objective.training
        seen.append(weights(objective))
        return {"map@r": values[min(len(seen), len(values)) - 1], "other": 1.0}

    return evaluate, seen


# ------------------------------------------------------------------------------------------------------ the plain loop


def test_equals_a_bare_loop_of_ten_lines():
    bare = Tiny(dropout=0.0)
    optimizer, scheduler = optimise(bare, 12)
    expected = []
    for t in range(12):
        loss = bare(batch_at(t))["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    ours = Tiny(dropout=0.0)
    assert losses(train(ours, 12)) == expected
    assert equal(weights(ours), weights(bare))


def test_ten_seeded_steps_are_the_same_twice_and_others_with_another_seed():
    def ten(seed: int) -> tuple[list[float], dict[str, Tensor]]:
        objective = Tiny(dropout=0.5)
        torch.manual_seed(seed)
        return losses(train(objective, 10)), weights(objective)

    first, second, other = ten(1), ten(1), ten(2)
    assert first[0] == second[0]
    assert equal(first[1], second[1])
    assert first[0] != other[0]  # the dropout is really drawn from the seed


def test_how_often_it_is_evaluated_changes_nothing_that_is_trained():
    def run(every: int) -> list[float]:
        objective = Tiny(dropout=0.5)
        torch.manual_seed(0)

        def evaluate() -> dict[str, float]:
            return {"map@r": torch.rand(1).item()}

        return losses(train(objective, 8, evaluate=evaluate, evaluate_every=every))

    assert run(1) == run(3) == run(100)


def test_it_learns():
    result = train(Tiny(), 60)
    assert sum(losses(result)[-5:]) < 0.3 * sum(losses(result)[:5])


def test_two_halves_accumulated_are_one_whole():
    def halves(start: int) -> Iterator[Batch]:
        t = start
        while True:
            whole = batch_at(t // 2)
            part = slice(0, 8) if t % 2 == 0 else slice(8, 16)
            yield {"image": whole["image"][part], "label": whole["label"][part]}
            t += 1

    whole, two = Tiny(dropout=0.0), Tiny(dropout=0.0)
    expected = train(whole, 6, clip=None)
    result = train(two, 6, clip=None, accumulate=2, batches=halves)
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in result.history] == pytest.approx([row[key] for row in expected.history], rel=1e-3)
    for name, value in weights(whole).items():
        assert torch.allclose(weights(two)[name], value, atol=1e-4), name


@pytest.mark.parametrize("clip", [None, 0.01])
def test_clipping_bounds_the_step(clip: float | None):
    objective = Tiny(dropout=0.0)
    before = weights(objective)
    optimizer, scheduler = optimise(objective, 1, lr=1.0, name="sgd")
    for group in optimizer.param_groups:
        group |= {"lr": 1.0, "initial_lr": 1.0, "weight_decay": 0.0}
    result = fit(objective, batches(), optimizer, scheduler, steps=1, clip=clip, precision="fp32", progress=False)
    moved = math.sqrt(sum((before[n] - p).square().sum().item() for n, p in weights(objective).items()))
    norm = result.history[-1]["grad_norm"]
    assert norm > 1
    assert moved == pytest.approx(norm if clip is None else clip, rel=1e-3)


def test_batches_that_run_out_are_an_error():
    with pytest.raises(ValueError, match="ran out at step 3"):
        train(Tiny(), 5, batches=lambda start: iter([batch_at(t) for t in range(start, 3)]))


def test_an_optimiser_without_the_class_weights_is_an_error():
    objective = Tiny()
    optimizer = torch.optim.SGD(objective.encoder.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(ValueError, match=r"does not know criterion\.weight"):
        fit(objective, batches(), optimizer, scheduler, steps=1, precision="fp32", progress=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be"),
        ({"evaluate_every": 0}, "evaluate_every must be"),
        ({"accumulate": 0}, "accumulate must be"),
        ({"patience": 0}, "patience must be"),
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
        ({"resume": "last"}, "resume"),
        ({"trackers": ("tensorbord",), "out": Path("unused")}, "did you mean tensorboard"),
        ({"trackers": ("tensorboard",)}, "give out"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"evaluate": lambda: {"recall@1": 1.0}}, r"no metric 'map@r'.*recall@1"),
        ({"ema": 1.5}, "ema"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value[:20],
)
def test_settings_that_cannot_be_used_are_refused(settings: dict[str, Any], message: str):
    objective = Tiny()
    optimizer, scheduler = optimise(objective, 5)
    with pytest.raises(InputError, match=message):
        fit(objective, batches(), optimizer, scheduler, progress=False, **({"steps": 5} | settings))


def test_a_tracker_that_is_not_installed_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(devices.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install wandb"):
        train(Tiny(), 2, trackers=("wandb",), out=tmp_path)


# ---------------------------------------------------------------------------------------- what is written, and the best


def test_the_history(tmp_path: Path):
    objective = Tiny()
    evaluate, _ = scripted(objective, [0.1, 0.2, 0.3])
    result = train(objective, 25, log_every=10, evaluate=evaluate, evaluate_every=20, out=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert rows == result.history
    assert [row["step"] for row in rows if "val" in row] == [0, 20, 25]
    logged = [row for row in rows if "loss" in row]
    assert [row["step"] for row in logged] == [10, 20, 25]
    assert all(
        set(row) == {"step", "loss", "grad_norm", "lr", "images_per_second", "seconds"}
        and all(math.isfinite(value) for value in row.values())
        for row in logged
    )
    every = losses(train(Tiny(), 25))
    assert [row["loss"] for row in logged] == pytest.approx(
        [sum(every[a:b]) / (b - a) for a, b in ((0, 10), (10, 20), (20, 25))]
    )
    assert (result.steps, result.best_step, result.best_value) == (25, 25, 0.3)


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_best_weights_are_restored_and_measured_again(tmp_path: Path, in_memory: bool):
    objective = Tiny()
    evaluate, seen = scripted(objective, [0.1, 0.2, 0.9, 0.3, 0.9])
    result = train(objective, 8, evaluate=evaluate, evaluate_every=2, out=None if in_memory else tmp_path)
    assert (result.best_step, result.best_value) == (4, 0.9)
    assert len(seen) == 6  # steps 0, 2, 4, 6, 8, and once more
    assert equal(weights(objective), seen[2])
    assert equal(seen[5], seen[2])
    assert not equal(seen[4], seen[2])
    assert not objective.training


def test_a_training_that_only_harms_leaves_the_untrained_model():
    objective = Tiny()
    before = weights(objective)
    evaluate, _ = scripted(objective, [0.5, 0.4, 0.3, 0.2, 0.5])
    result = train(objective, 6, evaluate=evaluate, evaluate_every=2)
    assert result.best_step == 0
    assert equal(weights(objective), before)


@pytest.mark.parametrize(("last_high", "best"), [(0.89, 4), (0.9, 8)])
def test_with_intervals_the_last_step_is_kept_unless_the_best_lies_above_them(last_high: float, best: int):
    objective = Tiny()
    highs = iter([0.95, 0.95, 0.95, 0.95, last_high, 0.95])
    evaluate, seen = scripted(objective, [0.1, 0.2, 0.9, 0.3, 0.7, 0.9])

    def estimates() -> dict[str, Estimate]:
        high = next(highs)
        return {name: Estimate(value, 0.0, high, n=9, queries=9) for name, value in evaluate().items()}

    result = train(objective, 8, evaluate=estimates, evaluate_every=2)
    assert (result.best_step, result.best_value) == ((4, 0.9) if best == 4 else (8, 0.7))
    assert equal(weights(objective), seen[best // 2])


def test_an_evaluation_that_cannot_be_repeated_is_said(caplog: pytest.LogCaptureFixture):
    objective = Tiny()
    evaluate, _ = scripted(objective, [0.5, 0.4, 0.3, 0.2])
    with caplog.at_level(logging.WARNING):
        result = train(objective, 4, evaluate=evaluate, evaluate_every=2)
    assert result.best_value == 0.2
    assert "not deterministic" in caplog.text


@pytest.mark.parametrize(
    ("values", "patience", "min_delta", "stops_at", "best"),
    [
        ([0.1, 0.2, 0.2, 0.1, 0.2], 2, 0.0, 6, 2),  # no gain at 4 and 6
        ([0.1, 0.2, 0.1, 0.3, 0.2, 0.1, 0.3], 2, 0.0, 10, 6),  # the gain at 6 begins the count anew
        ([0.1, 0.2, 0.21, 0.22, 0.22], 2, 0.05, 6, 6),  # too little to wait on, but kept
        ([0.5, 0.4, 0.5], 1, 0.0, 2, 0),
        ([0.1, math.nan, math.nan, 0.1], 2, 0.0, 4, 0),
        ([math.nan, math.nan, 0.2, 0.1, 0.1, 0.2], 3, 0.0, 10, 4),
        ([0.1, 0.2, 0.1], None, 0.0, 12, 2),
    ],
)
def test_early_stopping(
    tmp_path: Path, values: list[float], patience: int | None, min_delta: float, stops_at: int, best: int
):
    objective = Tiny()
    evaluate, seen = scripted(objective, values)
    result = train(
        objective, 12, evaluate=evaluate, evaluate_every=2, patience=patience, min_delta=min_delta, out=tmp_path
    )
    assert (result.steps, result.best_step) == (stops_at, best)
    assert result.stopped_early == (stops_at < 12)
    assert equal(weights(objective), seen[best // 2])
    # a run that has stopped is not begun again by a resume
    again = Tiny()
    evaluate, _ = scripted(again, [result.best_value])
    resumed = train(again, 12, evaluate=evaluate, evaluate_every=2, patience=patience, out=tmp_path, resume="last")
    assert (resumed.steps, resumed.best_step, resumed.stopped_early) == (stops_at, best, stops_at < 12)
    assert equal(weights(again), weights(objective))


def test_ema_is_what_is_evaluated_and_kept(tmp_path: Path):
    objective, plain = Tiny(), Tiny()
    evaluate, seen = scripted(objective, [0.1, 0.2, 0.3])
    result = train(objective, 4, evaluate=evaluate, evaluate_every=2, ema=0.5, out=tmp_path)
    # by hand, over the weights of the same run without an average
    average = weights(plain)
    states: list[dict[str, Tensor]] = []

    class Watched(Tiny):
        def forward(self, batch: Batch) -> dict[str, Tensor]:
            states.append(weights(self))
            return super().forward(batch)

    watched = Watched()
    train(watched, 4)
    states.append(weights(watched))
    for t, state in enumerate(states[1:]):
        decay = min(0.5, (1 + t) / (10 + t))
        average = {name: decay * average[name] + (1 - decay) * state[name] for name in average}
    assert losses(result) == losses(train(Tiny(), 4))
    assert all(torch.allclose(seen[-1][name], average[name], atol=1e-6) for name in average)
    assert equal(weights(objective), seen[-1])
    assert not equal(weights(objective), states[-1])
    # without evaluation the averages are left, too
    unmeasured = Tiny()
    train(unmeasured, 4, ema=0.5)
    assert all(torch.allclose(weights(unmeasured)[name], average[name], atol=1e-6) for name in average)


def test_tensorboard_gets_losses_and_metrics(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    objective = Tiny()
    evaluate, _ = scripted(objective, [0.1, 0.2, 0.3])
    result = train(objective, 4, evaluate=evaluate, evaluate_every=2, out=tmp_path, trackers=("tensorboard",))
    events = EventAccumulator(str(tmp_path / "logs" / "vicinal"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(result))
    assert [(event.step, event.value) for event in events.Scalars("val/map@r")] == [
        (0, pytest.approx(0.1)),
        (2, pytest.approx(0.2)),
        (4, pytest.approx(0.3)),
    ]


# ----------------------------------------------------------------------------------------------------------- precision


def test_bf16_runs_the_network_in_bf16_and_the_loss_in_fp32():
    objective = Tiny()
    result = train(objective, 30, precision="bf16")
    assert set(objective.seen) == {torch.bfloat16}
    assert {p.dtype for p in objective.parameters()} == {torch.float32}
    assert sum(losses(result)[-5:]) < 0.5 * sum(losses(result)[:5])
    exact = Tiny()
    other = train(exact, 30, precision="fp32")  # another precision in one process, after the first
    assert set(exact.seen) == {torch.float32}
    assert losses(result)[:5] == pytest.approx(losses(other)[:5], rel=0.05)
    assert losses(result) != losses(other)


@pytest.mark.parametrize("overflows", [False, True])
def test_a_loss_scaler_changes_nothing_but_skips_what_overflows(monkeypatch: pytest.MonkeyPatch, overflows: bool):
    """What fp16 needs on a GPU, here with a scaler on the CPU: gradients are scaled back before they are clipped."""
    expected = train(Tiny(), 8)
    plain = loop.accelerator_for
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127 if overflows else 2.0**10, growth_interval=3)

    def with_scaler(*arguments: Any) -> Any:  # noqa: ANN401
        accelerator = plain(*arguments)
        accelerator.scaler = scaler
        return accelerator

    monkeypatch.setattr(loop, "accelerator_for", with_scaler)
    objective = Tiny()
    before = weights(objective)
    result = train(objective, 8 if not overflows else 2)
    norms = [row["grad_norm"] for row in result.history]
    if overflows:
        assert norms[0] is None
        assert equal(weights(objective), before) == (norms[1] is None)
        assert scaler.get_scale() < 2.0**127
    else:
        assert losses(result) == pytest.approx(losses(expected), rel=1e-4)
        assert norms == pytest.approx([row["grad_norm"] for row in expected.history], rel=1e-3)
        assert scaler.get_scale() == 2.0**12  # doubled after each three steps


@pytest.mark.parametrize(
    ("has", "auto"),
    [
        ({"cpu": "avx512"}, "bf16"),
        ({"cpu": "amx"}, "bf16"),
        ({"cpu": ""}, "fp32"),
        ({"cuda": True}, "bf16"),
        ({"cuda": False}, "fp16"),
        ({"mps": None}, "fp32"),
    ],
    ids=str,
)
def test_what_auto_means(monkeypatch: pytest.MonkeyPatch, has: dict[str, Any], auto: str):
    ((kind, support),) = has.items()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: support == "avx512")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: support == "amx")
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: support or including_emulation
    )
    assert choose_precision("auto", torch.device(kind)) == auto
    assert choose_precision("fp32", torch.device(kind)) == "fp32"
    assert choose_precision("bf16", torch.device(kind)) == "bf16"


# --------------------------------------------------------------------------------------------------- when it goes wrong


class Breaks(Tiny):
    """The loss is not a number from a step on."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        parts = super().forward(batch)
        self.left -= 1
        return parts if self.left >= 0 else parts | {"loss": parts["loss"] * math.nan}


def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"step 12.*loss and grad_norm became .*lower lr.*step-00000008"):
        train(Breaks(after=10), 20, log_every=4, checkpoint_every=4, out=tmp_path)
    good = Checkpoints(tmp_path / "checkpoints").last()
    assert good is not None
    rows = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 8]
    with pytest.raises(InputError, match="no checkpoint yet"):
        train(Breaks(after=2), 20, log_every=4)


class Collapses(Tiny):
    """All embeddings the same."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        parts = super().forward(batch)
        return parts | {"embeddings": torch.ones(len(batch["label"]), 8) + 1e-4 * parts["embeddings"]}


def test_collapse_is_said_once(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        train(Tiny(), 10)
        assert not caplog.records
        train(Collapses(), 10)
    assert [record.getMessage() for record in caplog.records] == [
        "step 3: the model may have collapsed: all images get nearly the same embedding (mean cosine 1.000); "
        "lower lr or the margin"
    ]


def test_effective_rank_and_spread_against_their_definitions():
    g = torch.Generator().manual_seed(0)
    vectors = torch.randn(20, 6, generator=g, dtype=torch.float64) * torch.tensor([9.0, 3.0, 1.0, 1.0, 0.5, 0.1])
    unit = torch.nn.functional.normalize(vectors, dim=1)
    variances = torch.linalg.svdvals(unit - unit.mean(0)).square()
    assert effective_rank(vectors).item() == pytest.approx((variances.sum().square() / variances.square().sum()).item())
    pairs = [1 - float(a @ b) for a in unit for b in unit]
    assert spread(vectors).item() == pytest.approx(sum(pairs) / len(pairs))


def test_one_line_is_a_collapse_only_with_enough_classes():
    line = torch.tensor([[1.0, 0.0]] * 4 + [[-1.0, 0.001]] * 4)
    assert "effective rank 1.0" in (collapsed(line, torch.arange(8) // 2) or "")
    assert collapsed(line, torch.arange(8) // 4) is None


# -------------------------------------------------------------------------------------------------------------- resume


class KilledError(Exception):
    """In place of SIGKILL, within one process."""


def interrupted(at: int) -> Callable[[int], Iterator[Batch]]:
    def start(step: int) -> Iterator[Batch]:
        for t, batch in enumerate(batches()(step), start=step):
            if t == at:
                raise KilledError
            yield batch

    return start


@pytest.mark.parametrize("at", [1, 5, 6, 11])
@pytest.mark.parametrize("settings", [{}, {"ema": 0.9}, {"precision": "bf16"}, {"log_every": 4}], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, at: int, settings: dict[str, Any]):
    def run(out: Path, **more: Any) -> tuple[FitResult, dict[str, Tensor]]:  # noqa: ANN401
        objective = Tiny(dropout=0.3)

        def evaluate() -> dict[str, float]:
            with torch.no_grad():
                return {"map@r": -objective(batch_at(999))["loss"].item()}

        torch.manual_seed(5)
        result = train(
            objective, 12, evaluate=evaluate, evaluate_every=5, checkpoint_every=3, out=out, **settings, **more
        )
        return result, weights(objective)

    expected, final = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", batches=interrupted(at))
    torch.manual_seed(77)  # whatever the new process draws first
    result, resumed = run(tmp_path / "killed", resume="last")
    untimed = [[{k: v for k, v in row.items() if "second" not in k} for row in r.history] for r in (expected, result)]
    assert untimed[0] == untimed[1]
    assert equal(final, resumed)
    assert (result.best_step, result.best_value) == (expected.best_step, expected.best_value)
    rows = [json.loads(line) for line in (tmp_path / "killed" / "history.jsonl").read_text().splitlines()]
    assert rows == result.history


def test_resume_from_a_path_drops_what_came_later(tmp_path: Path):
    expected = train(Tiny(), 9, checkpoint_every=3, keep=3, out=tmp_path)
    first = tmp_path / "checkpoints" / "step-00000003"
    with pytest.raises(ValueError, match="ran out"):
        train(Tiny(), 9, checkpoint_every=3, out=tmp_path, resume=first, batches=lambda start: iter([batch_at(start)]))
    assert [path.name for path in Checkpoints(tmp_path / "checkpoints").all()] == ["step-00000003"]
    result = train(Tiny(), 9, checkpoint_every=3, out=tmp_path, resume=first)
    assert losses(result) == losses(expected)


def test_what_cannot_be_resumed_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        train(Tiny(), 4, out=tmp_path, resume="last", identity="one")
    assert "beginning at step 0" in caplog.text  # killed before its first checkpoint, or never begun
    with pytest.raises(InputError, match="an earlier run"):
        train(Tiny(), 4, out=tmp_path)
    with pytest.raises(InputError, match="another recipe"):
        train(Tiny(), 4, out=tmp_path, resume="last", identity="two")
    with pytest.raises(InputError, match="another ema"):
        train(Tiny(), 4, out=tmp_path, resume="last", identity="one", ema=0.5)
    with pytest.raises(InputError, match="is not a checkpoint"):
        train(Tiny(), 4, out=tmp_path, resume=tmp_path / "nowhere", identity="one")
    other = Tiny()
    other.encoder[1] = nn.Linear(12, 16, bias=False)
    with pytest.raises(InputError, match="another model"):
        train(other, 4, out=tmp_path, resume="last", identity="one")


def test_a_full_disk_while_training_leaves_a_checkpoint_to_go_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected = losses(train(Tiny(), 9, checkpoint_every=3, out=tmp_path / "whole"))
    saves = 0

    def full(path: Path) -> None:
        nonlocal saves
        saves += path.name == "state.pt"
        if saves == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(InputError, match=r"No space left on device.*step-00000003.*resume=last"):
        train(Tiny(), 9, checkpoint_every=3, out=tmp_path / "full")
    monkeypatch.undo()
    assert losses(train(Tiny(), 9, checkpoint_every=3, out=tmp_path / "full", resume="last")) == expected


def test_a_line_cut_off_by_a_kill_is_dropped_from_the_history(tmp_path: Path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "lo')
    history = History(path, until=1)
    history.add({"step": 2, "loss": 0.5})
    history.add({"step": 2, "val": {"map@r": math.nan, "recall@1": 0.5}})
    assert [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 0.5},
        {"step": 2, "val": {"map@r": None, "recall@1": 0.5}},
    ]
