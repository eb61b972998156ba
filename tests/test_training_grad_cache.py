"""Micro batches: the gradients of the whole batch, for every loss, with dropout drawn the same twice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_encoders
from several import started
from training_parts import Tiny, batch_at, batches, optimise
from vicinal.losses import ArcFace, CrossBatchMemory, MultiSimilarity, NTXent, ProxyAnchor, SupCon, Triplet
from vicinal.losses.contrastive import InfoNCE, SigLIP
from vicinal.losses.distillation import DINO
from vicinal.models.adapters import Full, LinearHead, LoRA, VisualPrompt, adapt
from vicinal.models.backbones import load_encoder
from vicinal.training import loop
from vicinal.training.distillation import SelfDistillation
from vicinal.training.grad_cache import backward_in_parts, items, parts_of
from vicinal.training.image_text import ImageTextObjective
from vicinal.training.locked import LockedTowers
from vicinal.training.loop import FitResult, fit
from vicinal.training.objectives import LabelObjective
from vicinal.training.optim import build_optimizer, parameter_groups, warmup_cosine
from vicinal.training.semantic_proxies import RowAdam, SemanticProxies
from vicinal.types import Batch, InputError

WORKER = Path(__file__).with_name("grad_cache_worker.py")
SIZE = 10  # items a batch


class Plain:
    """As much of an Accelerator as one process in float32 needs."""

    def autocast(self) -> Any:  # noqa: ANN401
        return torch.autocast("cpu", enabled=False)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def batch_of(size: int = SIZE, classes: int = 3) -> Batch:
    g = torch.Generator().manual_seed(4)
    captions = [f"{chr(97 + i % 7)}{chr(98 + i)} photo" for i in range(size)]
    return {
        "image": torch.randn(size, 3, 32, 32, generator=g),
        "label": torch.arange(size) % classes,
        "text": captions,
        "index": torch.arange(size),
    }


def gradients(objective: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in objective.named_parameters() if p.requires_grad and p.grad is not None}
    objective.zero_grad()
    return found


def by_parts(objective: nn.Module, batch: Batch, micro_batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parts = backward_in_parts(
        Plain(),  # type: ignore[arg-type]
        objective,
        objective,
        batch,
        micro_batch=micro_batch,
        divisor=1,
        seed=torch.manual_seed,
        joined=True,
    )
    return gradients(objective), parts


def whole(objective: Any, batch: Batch, micro_batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # noqa: ANN401
    """One graph of everything, drawn part by part as micro batches draw it."""
    vectors = []
    for number, part in enumerate(parts_of(batch, micro_batch)):
        torch.manual_seed(number)
        vectors.append(objective.embed(part))
    parts = objective.loss(torch.cat(vectors), batch)
    parts["loss"].backward()
    return gradients(objective), parts


LABELLED: dict[str, Callable[[], nn.Module]] = {
    "arcface": lambda: ArcFace(64, 3, scale=16.0),
    "proxy_anchor": lambda: ProxyAnchor(64, 3),
    "ntxent": NTXent,
    "supcon": SupCon,
    "triplet": Triplet,
    "multi_similarity": MultiSimilarity,
    "memory": lambda: CrossBatchMemory(NTXent(), 64, size=8),
}


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 9])
@pytest.mark.parametrize("loss", sorted(LABELLED))
def test_every_loss_of_labels(loss: str, micro_batch: int):
    torch.manual_seed(0)
    encoder = adapt(load_encoder("timm:test_vit", size=32, random_init=True), LoRA(rank=2, dropout=0.4))
    tiny_encoders.disturb({n: p for n, p in encoder.named_parameters() if p.requires_grad}, 0.1)
    batch = batch_of()

    def objective() -> LabelObjective:  # a memory remembers: each side has its own
        torch.manual_seed(1)
        return LabelObjective(encoder, LABELLED[loss](), retention=0.5).train()

    expected, values = whole(objective(), batch, micro_batch)
    found, parts = by_parts(objective(), batch, micro_batch)
    assert found.keys() == expected.keys()
    assert max(float(g.abs().max()) for g in found.values()) > 1e-4
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    for name in ("loss", "criterion", "retention"):
        torch.testing.assert_close(parts[name], values[name])
    assert parts["embeddings"].shape == (SIZE, 64)


@pytest.mark.parametrize("family", ["open_clip", "siglip", "siglip2"])
@pytest.mark.parametrize("loss", [InfoNCE(scale=8.0), SigLIP(scale=8.0, bias=-2.0)], ids=["infonce", "siglip"])
@pytest.mark.parametrize("method", [Full("both"), LoRA(rank=2, tower="both", dropout=0.3), Full("text")], ids=str)
def test_images_and_texts(family: str, loss: InfoNCE | SigLIP, method: Any, tmp_path: Path):  # noqa: ANN401
    torch.manual_seed(0)
    original = getattr(tiny_encoders, family)(tmp_path / "m")
    encoder = adapt(original, method)
    tiny_encoders.disturb({n: p for n, p in encoder.named_parameters() if p.requires_grad}, 0.05)
    objective = ImageTextObjective(encoder, loss, retention=0.5, reference=original).train()
    batch = batch_of()
    expected, values = whole(objective, batch, 4)
    found, parts = by_parts(objective, batch, 4)
    assert found.keys() == expected.keys()
    assert {"criterion.log_scale"} <= set(found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-6, msg=name)
    for name in values:
        torch.testing.assert_close(parts[name], values[name])
    if method == Full("text"):  # and with the vectors of the locked tower in the image's place
        with torch.no_grad():
            vectors = encoder.encode_image(batch["image"])
        (filled,) = LockedTowers(vectors).fill(iter([Batch(**{k: v for k, v in batch.items() if k != "image"})]))  # type: ignore[typeddict-item]
        again, _ = by_parts(objective, filled, 4)
        for name, gradient in expected.items():
            torch.testing.assert_close(again[name], gradient, rtol=1e-3, atol=2e-6, msg=name)


def test_dropout_is_drawn_the_same_twice_and_not_alike_in_all_parts():
    """With the draws of the second pass others, the gradients are not those of the batch."""
    torch.manual_seed(0)
    encoder = adapt(load_encoder("timm:test_vit", size=32, random_init=True), LoRA(rank=2, dropout=0.5))
    tiny_encoders.disturb({n: p for n, p in encoder.named_parameters() if p.requires_grad}, 0.3)
    objective = LabelObjective(encoder, NTXent()).train()
    batch = batch_of()
    expected, _ = whole(objective, batch, 3)
    calls = count()

    def careless(number: int) -> None:
        torch.manual_seed(next(calls))

    backward_in_parts(
        Plain(),  # type: ignore[arg-type]
        objective,
        objective,
        batch,
        micro_batch=3,
        divisor=1,
        seed=careless,
        joined=True,
    )
    wrong = gradients(objective)
    apart = max(float((wrong[n] - g).norm() / g.norm()) for n, g in expected.items() if g.norm() > 0)
    assert apart > 0.05
    same = {**batch, "image": batch["image"][:1].expand(6, -1, -1, -1), "label": torch.arange(6), "text": ["a"] * 6}
    _, parts = by_parts(objective, {**same, "index": torch.arange(6)}, 3)  # type: ignore[typeddict-item]
    assert not torch.allclose(parts["embeddings"][:3], parts["embeddings"][3:], rtol=1e-3)


def test_semantic_proxies():
    """Class prompts get the sum of what the parts say, and the stored proxies are renewed once."""
    found = []
    for micro_batch in (None, 4):
        torch.manual_seed(0)
        encoder = adapt(load_encoder("timm:test_vit", size=32, random_init=True), VisualPrompt(tokens=2))
        objective = SemanticProxies(encoder, classes=3, prompts=VisualPrompt(tokens=2, depth=1))
        optimizer = RowAdam(build_optimizer("sgd", parameter_groups(objective, lr=0.1)), objective.table, lr=0.01)

        def same(start: int) -> Iterator[Batch]:
            while True:
                yield batch_of()

        fit(
            objective,
            same,
            optimizer,
            warmup_cosine(optimizer, steps=3),
            steps=3,
            micro_batch=micro_batch,
            precision="fp32",
            progress=False,
        )
        found.append({n: p.detach() for n, p in objective.named_parameters()} | dict(objective.named_buffers()))
    assert "table.table" in found[0]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_self_distillation():
    """The teacher and its centre see the whole batch."""
    g = torch.Generator().manual_seed(1)
    batch: Batch = {
        "views": torch.rand(7, 2, 3, 32, 32, generator=g),
        "crops": torch.rand(7, 2, 3, 16, 16, generator=g),
    }  # type: ignore[typeddict-unknown-key]

    def objective() -> SelfDistillation:
        torch.manual_seed(0)
        encoder = adapt(load_encoder("timm:test_vit", size=32, random_init=True), LoRA(rank=2))
        made = SelfDistillation(encoder, DINO(16), steps=10, small_size=(16, 16))
        made.follow(torch.optim.SGD([p for p in made.parameters() if p.requires_grad], lr=0.1))
        return made.train()

    (expected, values), (found, parts) = whole(objective(), batch, 3), by_parts(objective(), batch, 3)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    for name in values:
        torch.testing.assert_close(parts[name], values[name])


# ------------------------------------------------------------------------------------------------------------ the loop


class Halved(Tiny):
    """`Tiny` with its two halves; it counts how many items had a graph at a time."""

    def __init__(self, *, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__(dropout=dropout, seed=seed)
        self.criterion = SupCon(temperature=0.3)
        self.most = 0

    def embed(self, batch: Batch) -> Tensor:
        if torch.is_grad_enabled():
            self.most = max(self.most, len(batch["image"]))
        embeddings: Tensor = self.encoder(batch["image"])
        self.seen.append(embeddings.dtype)
        return embeddings

    def loss(self, embeddings: Tensor, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.criterion(embeddings, batch["label"]), "embeddings": embeddings.detach()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return self.loss(self.embed(batch), batch)


def train(objective: nn.Module, steps: int, **settings: Any) -> FitResult:  # noqa: ANN401
    settings = {"precision": "fp32", "log_every": 1, "progress": False, "batches": batches()} | settings
    optimizer, scheduler = optimise(objective, steps)
    return fit(objective, settings.pop("batches"), optimizer, scheduler, steps=steps, **settings)


def of(result: FitResult, key: str) -> list[float]:
    return [row[key] for row in result.history if key in row]


@pytest.mark.parametrize(
    "settings", [{}, {"accumulate": 2}, {"clip": 0.1}, {"ema": 0.5}, {"precision": "bf16"}], ids=str
)
@pytest.mark.parametrize("micro_batch", [5, 8, 16, 99])
def test_a_training_is_the_same_with_micro_batches(settings: dict[str, Any], micro_batch: int):
    plain, parts = Halved(dropout=0.0), Halved(dropout=0.0)
    expected, found = train(plain, 6, **settings), train(parts, 6, micro_batch=micro_batch, **settings)
    near = 2e-2 if "precision" in settings else 1e-4
    for key in ("loss", "grad_norm"):
        assert of(found, key) == pytest.approx(of(expected, key), rel=near)
    for name, value in plain.named_parameters():
        torch.testing.assert_close(dict(parts.named_parameters())[name], value, rtol=near, atol=near)
    assert plain.most == 16
    assert parts.most == min(micro_batch, 16)
    assert set(parts.seen) == {torch.bfloat16 if "precision" in settings else torch.float32}


def test_with_a_loss_scaler(monkeypatch: pytest.MonkeyPatch):
    expected = train(Halved(dropout=0.0), 8)
    plain = loop.accelerator_for
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)

    def with_scaler(*arguments: Any) -> Any:  # noqa: ANN401
        accelerator = plain(*arguments)
        accelerator.scaler = scaler
        return accelerator

    monkeypatch.setattr(loop, "accelerator_for", with_scaler)
    found = train(Halved(dropout=0.0), 8, micro_batch=5)
    for key in ("loss", "grad_norm"):
        assert of(found, key) == pytest.approx(of(expected, key), rel=1e-3)
    assert scaler.get_scale() == 2.0**12


class KilledError(Exception):
    """In place of SIGKILL, within one process."""


@pytest.mark.parametrize("at", [4, 9])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, at: int):
    def interrupted(step: int) -> Iterator[Batch]:
        for t, batch in enumerate(batches()(step), start=step):
            if t == at:
                raise KilledError
            yield batch

    def run(out: Path, **more: Any) -> tuple[FitResult, Halved]:  # noqa: ANN401
        objective = Halved(dropout=0.5)
        torch.manual_seed(5)
        return train(objective, 12, micro_batch=6, checkpoint_every=3, out=out, **more), objective

    expected, final = run(tmp_path / "whole")
    with pytest.raises(KilledError):
        run(tmp_path / "killed", batches=interrupted)
    torch.manual_seed(77)
    result, resumed = run(tmp_path / "killed", resume="last")
    assert of(result, "loss") == of(expected, "loss")
    assert all(torch.equal(p, q) for p, q in zip(final.parameters(), resumed.parameters(), strict=True))


def test_the_collapse_is_watched_in_micro_batches_too(caplog: pytest.LogCaptureFixture):
    class Collapses(Halved):
        def loss(self, embeddings: Tensor, batch: Batch) -> dict[str, Tensor]:
            return super().loss(embeddings, batch) | {"embeddings": torch.ones(len(embeddings), 8)}

    train(Collapses(), 4, micro_batch=4)
    assert "may have collapsed" in caplog.text


def test_what_has_no_halves_or_mixes_items_is_refused():
    with pytest.raises(InputError, match="Tiny has no two halves"):
        train(Tiny(), 2, micro_batch=4)
    with pytest.raises(InputError, match="micro_batch must be at least 1"):
        train(Halved(), 2, micro_batch=0)

    def objective(*methods: Any) -> LabelObjective:  # noqa: ANN401
        return LabelObjective(adapt(load_encoder("timm:test_resnet", size=32, random_init=True), *methods), NTXent())

    def pictures(start: int) -> Iterator[Batch]:
        while True:
            yield batch_of()

    with pytest.raises(
        InputError, match=r"micro_batch: encoder\.model\.conv1\.1 is a batch norm in training mode.*leave"
    ):
        train(objective(Full()), 2, micro_batch=4, batches=pictures)
    result = train(objective(LinearHead(dim=8)), 2, micro_batch=4, batches=pictures)  # their statistics are frozen
    assert result.steps == 2


def test_parts_are_of_every_column():
    batch = batch_of(5)
    parts = list(parts_of(batch, 2))
    assert [items(part) for part in parts] == [2, 2, 1]
    assert [text for part in parts for text in part["text"]] == batch["text"]
    assert torch.equal(torch.cat([part["label"] for part in parts]), batch["label"])


def test_a_loss_whose_first_half_is_not_trained():
    objective = Halved(dropout=0.0)
    objective.criterion = ArcFace(8, 5, margin=0.2, scale=16.0)
    objective.encoder.requires_grad_(False)
    before = objective.criterion.weight.detach().clone()
    train(objective, 3, micro_batch=5)
    plain = Halved(dropout=0.0)
    plain.criterion = ArcFace(8, 5, margin=0.2, scale=16.0)
    plain.encoder.requires_grad_(False)
    plain.criterion.load_state_dict({"weight": before})
    train(plain, 3)
    torch.testing.assert_close(objective.criterion.weight, plain.criterion.weight)
    assert batch_at(0)["image"].shape[0] == 16


# --------------------------------------------------------------------------------------------------- several processes


def trained(out: Path, micro_batch: int, losses: list[str], processes: int) -> list[dict[str, Any]]:
    out.mkdir()
    started(WORKER, out, micro_batch, *losses, processes=processes)
    return [torch.load(path, weights_only=True) for path in sorted(out.iterdir())]


@pytest.mark.slow
def test_two_processes_with_micro_batches_are_one_without(tmp_path: Path):
    losses = ["arcface", "infonce", "ntxent", "siglip", "supcon"]
    alone = trained(tmp_path / "one", 0, losses, 1)
    both = trained(tmp_path / "two", 2, losses, 2)  # three micro batches of each process's six items
    assert len(alone) == 5
    assert len(both) == 10
    for i, loss in enumerate(losses):
        first, second = both[2 * i : 2 * i + 2]
        for name, weight in alone[i]["weights"].items():
            assert torch.equal(first["weights"][name], second["weights"][name]), (loss, name)
            torch.testing.assert_close(first["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=f"{loss}: {name}")
        assert first["norms"] == pytest.approx(alone[i]["norms"], rel=1e-3), loss
