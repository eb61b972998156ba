"""Parameter groups and the schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from training_parts import Tiny
from vicinal.losses import NTXent
from vicinal.models.adapters import LinearHead, VisualPrompt, adapt
from vicinal.models.backbones import load_encoder
from vicinal.training.objectives import LabelObjective
from vicinal.training.optim import build_optimizer, parameter_groups, warmup_cosine
from vicinal.types import InputError


class Objective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
        self.criterion = nn.Linear(2, 3)
        self.encoder[0].weight.requires_grad_(False)


def test_each_trained_parameter_is_in_one_group_and_no_other_in_any():
    objective = Objective()
    groups = parameter_groups(objective, lr=0.5, weight_decay=0.1)
    got = [id(p) for group in groups for p in group["params"]]
    assert len(got) == len(set(got))
    assert set(got) == {id(p) for p in objective.parameters() if p.requires_grad}
    by_name = {group["name"]: group for group in groups}
    encoder = objective.encoder
    assert [id(p) for p in by_name["encoder"]["params"]] == [id(encoder[2].weight)]
    assert all(p.dim() == 1 for p in by_name["encoder, no decay"]["params"])
    assert len(by_name["encoder, no decay"]["params"]) == 4
    assert {id(p) for p in by_name["loss"]["params"]} == {id(p) for p in objective.criterion.parameters()}
    assert {name: (g["lr"], g["weight_decay"]) for name, g in by_name.items()} == {
        "encoder": (0.5, 0.1),
        "encoder, no decay": (0.5, 0.0),
        "loss": (5.0, 0.0),
    }
    assert parameter_groups(objective, lr=0.5, loss_lr=0.2)[-1]["lr"] == 0.2


def test_class_weights_move_at_their_own_rate():
    objective = Tiny(dropout=0.0)
    before = {n: p.detach().clone() for n, p in objective.named_parameters()}
    optimizer = build_optimizer("adamw", parameter_groups(objective, lr=1e-4))
    objective({"image": torch.randn(8, 3, 2, 2), "label": torch.arange(8) % 5})["loss"].backward()
    optimizer.step()
    moved = {n: (p - before[n]).abs().max().item() for n, p in objective.named_parameters()}
    assert moved["criterion.weight"] == pytest.approx(1e-3, rel=0.05)  # Adam's first step is the rate itself
    assert moved["encoder.1.weight"] == pytest.approx(1e-4, rel=0.05)


def test_groups_without_parameters_are_left_out_and_nothing_trained_is_an_error():
    objective = Objective()
    objective.encoder.requires_grad_(False)
    assert [group["name"] for group in parameter_groups(objective, lr=1.0)] == ["loss"]
    objective.criterion.requires_grad_(False)
    with pytest.raises(InputError, match="frozen"):
        parameter_groups(objective, lr=1.0)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (10, 0), (10, 1), (100, 5), (445, 22)])
def test_the_rate_of_every_step(steps: int, warmup: int):
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.3}])
    schedule = warmup_cosine(optimizer, steps=steps, warmup=warmup)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [0.3 * (t + 1) / warmup for t in range(warmup)]
    expected += [0.15 * (1 + math.cos(math.pi * t / (steps - warmup))) for t in range(steps - warmup)]
    assert rates == pytest.approx(expected)
    assert min(rates) > 0
    assert max(rates) == pytest.approx(0.3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_a_warmup_that_never_ends_is_refused(warmup: int):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="warmup"):
        warmup_cosine(optimizer, steps=10, warmup=warmup)


def test_optimisers_by_name():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.1}]
    assert isinstance(build_optimizer("adamw", groups), torch.optim.AdamW)
    assert isinstance(build_optimizer("sgd", groups), torch.optim.SGD)
    with pytest.raises(InputError, match="adam'"):
        build_optimizer("adam", groups)


def test_prompts_do_not_decay() -> None:
    encoder = adapt(load_encoder("timm:test_vit", size=32, random_init=True), VisualPrompt(tokens=2), LinearHead(dim=8))
    groups = {g["name"]: g for g in parameter_groups(LabelObjective(encoder, NTXent()), lr=0.1, weight_decay=0.5)}
    prompts = {id(p) for p in encoder.prompts.parameters()}
    assert prompts
    assert prompts <= {id(p) for p in groups["encoder, no decay"]["params"]}
    assert groups["encoder"]["weight_decay"] == 0.5
