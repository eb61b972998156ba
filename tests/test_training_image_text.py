"""ImageTextObjective: who is whose negative, what is trained and kept, and several processes as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_encoders
from several import started
from vicinal.losses.contrastive import InfoNCE, SigLIP
from vicinal.models.adapters import Full, LoRA, adapt
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.training.image_text import ImageTextObjective, _joined
from vicinal.training.loop import fit
from vicinal.training.optim import build_optimizer, parameter_groups, warmup_cosine
from vicinal.types import Batch, InputError

WORKER = Path(__file__).with_name("image_text_worker.py")
FAMILIES: dict[str, Callable[[Path], Encoder]] = {
    "open_clip": tiny_encoders.open_clip,
    "transformers": tiny_encoders.transformers,
    "siglip": tiny_encoders.siglip,
    "siglip2": tiny_encoders.siglip2,
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    torch.manual_seed(0)
    return FAMILIES[request.param](tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    torch.manual_seed(0)
    return tiny_encoders.open_clip(tmp_path_factory.mktemp("model"))


def some(captions: str = "abcdef") -> Batch:
    return {"image": tiny_encoders.images(len(captions)), "text": [f"{c * 3}, a photo" for c in captions]}


def test_the_whole_is_its_two_halves_and_the_losses_own_value(original: Encoder):
    objective = ImageTextObjective(adapt(original, Full("both")), SigLIP(scale=5.0, bias=-1.0))
    batch = some()
    embeddings = objective.embed(batch)
    assert embeddings.shape == (6, 2, objective.encoder.embedding_dim)
    assert torch.equal(embeddings[:, 0], objective.encoder.encode_image(batch["image"]))
    assert torch.equal(embeddings[:, 1], objective.encoder.encode_text(batch["text"]))
    parts = objective(batch)
    assert set(parts) == {"loss", "scale", "bias", "batch_recall@1"}
    assert parts["loss"].item() == objective.loss(embeddings, batch)["loss"].item()
    assert parts["loss"].item() == pytest.approx(objective.criterion(embeddings[:, 0], embeddings[:, 1]).item())
    assert parts["scale"].item() == pytest.approx(5.0)
    assert parts["bias"].item() == -1.0
    cosines = torch.nn.functional.cosine_similarity(embeddings[:, None, 0], embeddings[None, :, 1], dim=2)
    assert parts["batch_recall@1"].item() == pytest.approx((cosines.argmax(1) == torch.arange(6)).float().mean().item())
    assert all(not value.requires_grad for name, value in parts.items() if name != "loss")


@pytest.mark.parametrize(
    ("captions", "labels", "kin", "ids"),
    [
        ("abcabc", None, ("label",), [0, 1, 2, 0, 1, 2]),
        ("abcdef", [0, 0, 1, 1, 2, 3], ("label",), [0, 0, 1, 1, 2, 3]),
        ("abcdef", [0, 0, 1, 1, 2, 3], (), [0, 1, 2, 3, 4, 5]),
        ("abcaef", [0, 0, 1, 1, 2, 3], ("label",), [0, 0, 0, 0, 2, 3]),  # a chain: b - a - a - c
        ("abcdef", [-1, -1, -1, 0, 0, 1], ("label",), [0, 1, 2, 3, 3, 4]),  # unlabelled: of no kin
    ],
    ids=["captions", "labels", "no kin", "chain", "unlabelled"],
)
@pytest.mark.parametrize("loss", [InfoNCE(scale=5.0), SigLIP(scale=5.0)], ids=["infonce", "siglip"])
def test_equal_captions_and_labels_are_no_negatives(
    clip: Encoder,
    captions: str,
    labels: list[int] | None,
    kin: tuple[Any, ...],
    ids: list[int],
    loss: InfoNCE | SigLIP,
):
    batch = some(captions)
    if labels is not None:
        batch["label"] = torch.tensor(labels)
    objective = ImageTextObjective(adapt(clip, Full("both")), loss, kin=kin)
    embeddings = objective.embed(batch)
    expected = loss(embeddings[:, 0], embeddings[:, 1], ids=torch.tensor(ids))
    parts = objective(batch)
    assert parts["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert ("embeddings" in parts) == (labels is not None)


def test_joined_is_transitive():
    one, other = torch.tensor([1, 2, 2, 3, 4, 4]), torch.tensor([7, 7, 8, 9, 8, 5])
    assert _joined(one, other).tolist() == [0, 0, 0, 3, 0, 0]
    chain = torch.arange(40)
    assert _joined(chain // 2, (chain + 1) // 2).unique().tolist() == [0]


def test_lit_trains_the_text_tower_and_the_scale_alone(original: Encoder):
    objective = ImageTextObjective(adapt(original, Full("text")), InfoNCE())
    before = {name: p.clone() for name, p in objective.named_parameters()}
    embeddings = objective.embed(some())
    assert not objective.encoder.encode_image(some()["image"]).requires_grad
    objective.loss(embeddings, some())["loss"].backward()
    trained = {name for name, p in objective.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in objective.named_parameters() if p.requires_grad}
    assert "criterion.log_scale" in trained
    assert len(trained) > 10
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if name in trained:
                parameter += 0.1 * torch.randn_like(parameter)
    assert torch.equal(objective.embed(some())[:, 0], embeddings[:, 0])
    assert not torch.allclose(objective.embed(some())[:, 1], embeddings[:, 1])
    assert all(torch.equal(p, before[n]) for n, p in objective.named_parameters() if n not in trained)


def test_every_trained_parameter_gets_a_gradient(original: Encoder):
    """The model's own scale and bias would not: they are frozen."""
    for loss in (InfoNCE(), SigLIP()):
        objective = ImageTextObjective(adapt(original, Full("both")), loss)
        objective(some())["loss"].backward()
        missing = [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []
        assert parameter_groups(objective, lr=1.0)[-1]["name"] == "loss"


def test_the_learnt_scale_is_kept_with_the_model(original: Encoder, tmp_path: Path):
    objective = ImageTextObjective(adapt(original, Full("both")), SigLIP(scale=31.0, bias=-7.0))
    had_bias = objective.encoder.logit_bias is not None
    objective.keep_scale()
    again = load_encoder(str(objective.encoder.save(tmp_path / "model")))
    assert again.logit_scale == pytest.approx(31.0, rel=1e-5)
    assert again.logit_bias == (pytest.approx(-7.0) if had_bias else None)


def test_retention_holds_images_and_texts(clip: Encoder):
    objective = ImageTextObjective(adapt(clip, LoRA(rank=2, tower="both")), InfoNCE(), retention=3.0).train()
    assert objective.reference is not None
    assert not objective.reference.training
    assert objective(some())["retention"].item() == pytest.approx(0.0, abs=1e-5)
    tiny_encoders.disturb({n: p for n, p in objective.encoder.named_parameters() if p.requires_grad}, 0.3)
    parts = objective(some())
    tuned = objective.embed(some())
    first = torch.stack([clip.encode_image(some()["image"]), clip.encode_text(some()["text"])], 1)
    expected = 3.0 * (1 - torch.cosine_similarity(tuned, first, dim=2)).mean().item()
    assert expected > 1e-3
    assert parts["retention"].item() == pytest.approx(expected, rel=1e-4)
    assert parts["loss"].item() == pytest.approx(parts["criterion"].item() + expected, rel=1e-5)
    parts["loss"].backward()
    assert all(p.grad is None for p in objective.reference.parameters())


def test_what_cannot_be_trained_is_named(clip: Encoder):
    with pytest.raises(InputError, match="no text tower"):
        ImageTextObjective(load_encoder("timm:test_vit", size=32, random_init=True), InfoNCE())
    objective = ImageTextObjective(adapt(clip, Full("both")), InfoNCE())
    with pytest.raises(InputError, match="captions"):
        objective({"image": tiny_encoders.images(2)})
    with pytest.raises(InputError, match="all one"):
        objective(some("aaaa"))


@pytest.mark.parametrize("loss", [InfoNCE(scale=10.0), SigLIP(scale=10.0, bias=-2.0)], ids=["infonce", "siglip"])
def test_it_learns_in_the_loop(clip: Encoder, loss: InfoNCE | SigLIP):
    objective = ImageTextObjective(adapt(clip, Full("both")), loss)

    def batches(start: int) -> Iterator[Batch]:
        while True:
            yield some("abcdefgh")

    optimizer = build_optimizer("adamw", parameter_groups(objective, lr=2e-3))
    schedule = warmup_cosine(optimizer, steps=12)
    result = fit(objective, batches, optimizer, schedule, steps=12, precision="bf16", log_every=1, progress=False)
    first, last = result.history[0], result.history[-1]
    assert last["loss"] < 0.7 * first["loss"]
    assert last["batch_recall@1"] > first["batch_recall@1"]
    assert last["scale"] != first["scale"]


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path: Path):
    losses = ["infonce", "infonce, positives", "siglip", "siglip, masked"]
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
        started(WORKER, tmp_path / str(processes), *losses, processes=processes)
    for loss in losses:
        alone = torch.load(tmp_path / "1" / loss / "rank0.pt", weights_only=True)
        both = [torch.load(tmp_path / "2" / loss / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert {"criterion.log_scale", "encoder.image.1.weight", "encoder.text.2.bias"} < set(alone["gradients"])
        for name, gradient in alone["gradients"].items():
            assert gradient.abs().max() > 1e-5, name
            for process in both:
                torch.testing.assert_close(process["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
        for name in ("criterion", "scale"):  # what is logged is of the whole batch
            for process in both:
                torch.testing.assert_close(process["values"][name], alone["values"][name], rtol=1e-5, atol=1e-6)
        recalls = [process["values"]["batch_recall@1"] for process in both]
        torch.testing.assert_close(sum(recalls) / 2, alone["values"]["batch_recall@1"])
