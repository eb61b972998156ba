"""Parameter groups and the schedule."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny_encoders
from training_parts import Tiny
from vicinal.losses import NTXent
from vicinal.models.adapters import Full, LinearHead, LoRA, VisualPrompt, adapt
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
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


def rates(encoder: Encoder, decay: float) -> dict[str, tuple[float, float]]:
    """Rate and weight decay of each trained parameter."""
    objective = nn.Module()
    objective.encoder, objective.criterion = encoder, nn.Linear(3, 2)
    groups = parameter_groups(objective, lr=1.0, weight_decay=0.05, layer_decay=decay)
    assert [group["name"] for group in groups[-1:]] == ["loss"]
    assert [group["lr"] for group in groups[:-1]] == sorted((g["lr"] for g in groups[:-1]), reverse=True)
    known = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    found = {name: known[id(p)] for name, p in encoder.named_parameters() if p.requires_grad}
    assert len(known) == len(found) + 2
    return found


def test_layer_decay_is_timms_for_a_model_with_a_classifier(tmp_path: Path):
    """But for the last norm, which timm counts with the last block, and BEiT with what follows it."""
    import timm
    from timm.optim._param_groups import param_groups_layer_decay

    ours = rates(adapt(tiny_encoders.timm(tmp_path), Full()), 0.75)
    classifier = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32)
    names = {id(p): f"model.{name}" for name, p in classifier.named_parameters()}
    theirs = param_groups_layer_decay(classifier, weight_decay=0.05, layer_decay=0.75)
    expected = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in theirs for p in g["params"]}
    assert ours.keys() == {name for name in expected if not name.startswith("model.head.")}
    for name, (rate, decay) in ours.items():
        assert rate == pytest.approx(1.0 if name.startswith("model.norm.") else expected[name][0]), name
        if name not in ("model.cls_token", "model.pos_embed"):  # which have three axes, and decay here as ever
            assert decay == expected[name][1], name


BLOCKS = 9  # of timm's test_vit3
TOWERS = {
    "open_clip": {
        "visual.class_embedding": 4,
        "visual.positional_embedding": 4,
        "visual.conv1.weight": 4,
        "visual.ln_pre.weight": 4,
        "visual.transformer.resblocks.0.ln_1.weight": 3,
        "visual.transformer.resblocks.2.mlp.c_fc.weight": 1,
        "visual.ln_post.weight": 0,
        "visual.proj": 0,
        "token_embedding.weight": 3,
        "positional_embedding": 3,
        "transformer.resblocks.0.ln_1.weight": 2,
        "transformer.resblocks.1.mlp.c_fc.bias": 1,
        "ln_final.weight": 0,
        "text_projection": 0,
    },
    "transformers": {
        "vision_model.embeddings.position_embedding.weight": 4,
        "vision_model.pre_layrnorm.weight": 4,
        "vision_model.encoder.layers.0.mlp.fc1.weight": 3,
        "vision_model.post_layernorm.weight": 0,
        "visual_projection.weight": 0,
        "text_model.embeddings.token_embedding.weight": 3,
        "text_model.encoder.layers.1.mlp.fc1.weight": 1,
        "text_model.final_layer_norm.bias": 0,
        "text_projection.weight": 0,
    },
    "siglip2": {
        "visual.trunk.patch_embed.proj.weight": BLOCKS + 1,
        "visual.trunk.pos_embed": BLOCKS + 1,
        "visual.trunk.blocks.0.norm1.weight": BLOCKS,
        f"visual.trunk.blocks.{BLOCKS - 1}.mlp.fc1.weight": 1,
        "visual.trunk.norm.weight": 0,
        "visual.trunk.attn_pool.latent": 0,
        "text.positional_embedding": 3,
        "text.token_embedding.weight": 3,
        "text.transformer.resblocks.0.ln_1.weight": 2,
        "text.ln_final.weight": 0,
        "text.text_projection.bias": 0,
    },
    "siglip": {
        "vision_model.embeddings.patch_embedding.weight": 4,
        "vision_model.encoder.layers.2.mlp.fc1.weight": 1,
        "vision_model.head.probe": 0,
        "text_model.embeddings.position_embedding.weight": 4,
        "text_model.encoder.layers.0.mlp.fc1.weight": 3,
        "text_model.head.weight": 0,
        "logit_scale": 0,
    },
}


@pytest.mark.parametrize("family", sorted(TOWERS))
def test_layer_decay_in_both_towers(tmp_path: Path, family: str):
    found = rates(adapt(getattr(tiny_encoders, family)(tmp_path / "m"), Full("both")), 0.5)
    for name, depth in TOWERS[family].items():
        assert found[f"model.{name}"][0] == 0.5**depth, name


def test_layer_decay_of_low_rank_updates_and_of_a_head(tmp_path: Path):
    found = rates(adapt(tiny_encoders.open_clip(tmp_path / "m"), LoRA(rank=2, tower="text")), 0.5)
    assert {rate for rate, _ in found.values()} == {0.5, 0.25}
    found = rates(adapt(tiny_encoders.timm(tmp_path), LoRA(rank=2, first_block=10), LinearHead(dim=4)), 0.5)
    assert {rate for rate, _ in found.values()} == {1.0, 0.5, 0.25}
    assert {name for name, (rate, _) in found.items() if rate == 1.0} == {n for n in found if n.startswith("head.")}


def test_layer_decay_needs_blocks():
    encoder = adapt(load_encoder("timm:test_resnet", size=32, random_init=True), Full())
    with pytest.raises(InputError, match="layer_decay: the blocks of the image tower"):
        rates(encoder, 0.5)
