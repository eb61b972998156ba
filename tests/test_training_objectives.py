"""LabelObjective: two halves, retention, and what stays frozen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vicinal.losses import ArcFace, NTXent
from vicinal.models.adapters import LinearHead, LoRA, adapt
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.training.checkpoint import trained_state
from vicinal.training.objectives import LabelObjective
from vicinal.training.optim import parameter_groups
from vicinal.types import Batch, InputError


@pytest.fixture(scope="module")
def original() -> Encoder:
    torch.manual_seed(0)
    return load_encoder("timm:test_vit", size=32, random_init=True)


@pytest.fixture
def batch() -> Batch:
    return {"image": torch.randn(6, 3, 32, 32), "label": torch.tensor([0, 0, 1, 1, 2, 2])}


def test_the_whole_is_its_two_halves(original: Encoder, batch: Batch):
    encoder = adapt(original, LoRA(rank=2))
    objective = LabelObjective(encoder, ArcFace(encoder.embedding_dim, 3))
    embeddings = objective.embed(batch)
    parts = objective(batch)
    assert torch.equal(parts["embeddings"], embeddings)
    assert not parts["embeddings"].requires_grad
    assert parts["loss"].item() == objective.loss(embeddings, batch)["loss"].item()
    assert parts["loss"].item() == objective.criterion(embeddings, batch["label"]).item()
    assert set(parts) == {"loss", "embeddings"}


def test_retention_is_zero_at_first_and_then_the_distance_to_the_original(original: Encoder, batch: Batch):
    encoder = adapt(original, LoRA(rank=2))
    objective = LabelObjective(encoder, NTXent(), retention=3.0).train()
    assert objective(batch)["retention"].item() == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    parts = objective(batch)
    tuned, first = encoder.encode_image(batch["image"]), original.eval().encode_image(batch["image"])
    expected = 3.0 * (1 - torch.cosine_similarity(tuned, first)).mean().item()
    assert expected > 1e-3
    assert parts["retention"].item() == pytest.approx(expected, rel=1e-4)
    assert parts["loss"].item() == pytest.approx(parts["criterion"].item() + expected, rel=1e-5)
    assert not parts["retention"].requires_grad


def test_the_original_is_neither_trained_nor_saved_nor_set_to_train(original: Encoder, batch: Batch):
    encoder = adapt(original, LoRA(rank=2))
    objective = LabelObjective(encoder, ArcFace(encoder.embedding_dim, 3), retention=1.0).train()
    assert objective.reference is not None
    assert not objective.reference.training
    assert encoder.training
    objective(batch)["loss"].backward()
    assert all(p.grad is None for p in objective.reference.parameters())
    trained = {id(p) for group in parameter_groups(objective, lr=1.0) for p in group["params"]}
    assert trained == {id(p) for p in encoder.parameters() if p.requires_grad} | {id(objective.criterion.weight)}
    assert not any(name.startswith("reference.") for name in trained_state(objective) if "weight" in name)


def test_a_given_reference_is_used_and_left_alone(original: Encoder, batch: Batch):
    torch.manual_seed(7)
    other = load_encoder("timm:test_vit", size=32, random_init=True)
    frozen = [p.requires_grad for p in other.parameters()]
    objective = LabelObjective(adapt(original, LoRA(rank=2)), NTXent(), retention=1.0, reference=other)
    distance = 1 - torch.cosine_similarity(
        original.eval().encode_image(batch["image"]), other.eval().encode_image(batch["image"])
    )
    assert objective.eval()(batch)["retention"].item() == pytest.approx(distance.mean().item(), rel=1e-3)
    assert [p.requires_grad for p in other.parameters()] == frozen


def test_retention_refuses_embeddings_of_another_width(original: Encoder):
    encoder = adapt(original, LinearHead(dim=5))
    with pytest.raises(InputError, match="retention"):
        LabelObjective(encoder, NTXent(), retention=1.0, reference=original)


def test_groups_reach_pair_losses_and_no_others(original: Encoder, batch: Batch):
    encoder = adapt(original, LoRA(rank=2))
    grouped: Batch = {**batch, "group": torch.tensor([0, 0, 0, 0, 1, 1])}
    pair = LabelObjective(encoder, NTXent())
    assert pair(grouped)["loss"].item() != pytest.approx(pair(batch)["loss"].item(), rel=1e-4)
    classes = LabelObjective(encoder, ArcFace(encoder.embedding_dim, 3))
    assert classes(grouped)["loss"].item() == classes(batch)["loss"].item()


@pytest.mark.filterwarnings("ignore")
def test_losses_of_pytorch_metric_learning_drop_in(original: Encoder, batch: Batch):
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    encoder = adapt(original, LoRA(rank=2))
    objective = LabelObjective(encoder, losses.ArcFaceLoss(3, encoder.embedding_dim))
    objective(batch)["loss"].backward()
    assert "loss" in [group["name"] for group in parameter_groups(objective, lr=1.0)]
    assert objective.criterion.W.grad is not None


def test_frozen_batch_norms_keep_their_statistics(original: Encoder):
    encoder = adapt(original, LoRA(rank=2))
    objective = LabelObjective(encoder, nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, affine=False)))
    objective.criterion[0].requires_grad_(False)
    objective.train()
    assert [norm.training for norm in objective.criterion] == [False, False]
    objective.criterion[0].requires_grad_(True)
    objective.train()
    assert [norm.training for norm in objective.criterion] == [True, False]
