"""Locked towers: what is looked up is what would be computed, and nothing is computed that is looked up."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_encoders
from pictures import write_folder
from test_run_image_text import recipe
from vicinal.data.loader import train_batches
from vicinal.data.manifest import Manifest
from vicinal.data.samplers import ShuffleSampler
from vicinal.data.transforms import train_transform
from vicinal.embedding import Precision, embed
from vicinal.losses.contrastive import InfoNCE
from vicinal.models.adapters import Full, LoRA, adapt, locked_towers
from vicinal.models.encoder import Encoder
from vicinal.models.methods import Method
from vicinal.run import run
from vicinal.training.image_text import ImageTextObjective
from vicinal.training.locked import LockedTowers, lock
from vicinal.training.loop import fit
from vicinal.training.optim import build_optimizer, parameter_groups, warmup_cosine
from vicinal.types import Batch, InputError

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
def photos(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """16 pictures with two captions each, of which training draws one."""
    root = write_folder(tmp_path_factory.mktemp("photos"), classes=4, each=4)
    files = sorted(root.rglob("*.png"))
    assert len(files) == 16
    table = {
        "image": [file.relative_to(root).as_posix() for file in files],
        "label": [str(i) for i in range(16)],
        "captions": [[f"{chr(97 + i)} photo", f"{chr(65 + i)} view"] for i in range(16)],
    }
    return Manifest.build(table, root)


@pytest.mark.parametrize(
    ("methods", "locked"),
    [
        ((Full("text"),), ("image",)),
        ((Full("image"),), ("text",)),
        ((LoRA(rank=2, tower="text"),), ("image",)),
        ((LoRA(rank=2, tower="image"),), ("text",)),
        ((LoRA(rank=2, tower="both"),), ()),
        ((Full("text"), LoRA(rank=2, tower="image")), ()),
    ],
    ids=str,
)
def test_which_towers_are_locked(original: Encoder, methods: tuple[Method, ...], locked: tuple[str, ...]):
    encoder = adapt(original, *methods)
    assert locked_towers(encoder) == locked
    image, text = encoder.encode_image(tiny_encoders.images()), encoder.encode_text(["a photo"])
    assert image.requires_grad == ("image" not in locked)
    assert text.requires_grad == ("text" not in locked)


@pytest.mark.parametrize("trained", ["image", "text"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_training_is_the_same_and_the_tower_is_not_run(
    original: Encoder, photos: Manifest, trained: str, precision: Precision, monkeypatch: pytest.MonkeyPatch
):
    vectors = embed(original, photos, device="cpu", precision=precision).vectors

    def losses(*, keep: bool) -> tuple[list[float], dict[str, int]]:
        encoder = adapt(original, Full(trained))  # type: ignore[arg-type]
        kept = lock(encoder, photos, vectors, augmented=False, device="cpu", precision=precision)
        assert kept.names == (("image",) if trained == "text" else ("text",))
        if not keep:
            kept = LockedTowers()
        transform = None if kept.image is not None else train_transform(encoder.preprocess, "none")
        sampler = ShuffleSampler(len(photos), 8, seed=1)
        calls = {"image": 0, "text": 0}
        for tower in calls:
            run_it = getattr(encoder, f"encode_{tower}")

            def counted(given: Any, tower: str = tower, run_it: Any = run_it) -> Any:  # noqa: ANN401
                calls[tower] += 1
                return run_it(given)

            monkeypatch.setattr(encoder, f"encode_{tower}", counted, raising=True)

        def batches(start: int) -> Iterator[Batch]:
            return kept.fill(train_batches(photos, transform, sampler, seed=1, workers=0, start_step=start))

        torch.manual_seed(0)
        objective = ImageTextObjective(encoder, InfoNCE(scale=10.0))
        optimizer = build_optimizer("adamw", parameter_groups(objective, lr=1e-3))
        result = fit(
            objective,
            batches,
            optimizer,
            warmup_cosine(optimizer, steps=5),
            steps=5,
            precision=precision,
            log_every=1,
            progress=False,
        )
        return [row["loss"] for row in result.history], calls

    (ran, all_calls), (looked_up, calls) = losses(keep=False), losses(keep=True)
    assert looked_up == pytest.approx(ran, rel=1e-4 if precision == "fp32" else 2e-2)
    assert looked_up[-1] < looked_up[0]
    assert all_calls == {"image": 5, "text": 5}
    assert calls == {trained: 5, "text" if trained == "image" else "image": 0}


def test_with_augmentation_the_image_tower_is_run(original: Encoder, photos: Manifest):
    kept = lock(adapt(original, Full("text")), photos, torch.zeros(16, 24), augmented=True, device="cpu")
    assert kept.names == ()


def test_captions_are_looked_up_by_their_words(original: Encoder, photos: Manifest):
    encoder = adapt(original, Full("image"))
    kept = lock(encoder, photos, torch.zeros(16, 24), augmented=True, device="cpu", precision="fp32")
    assert kept.text is not None
    assert len(kept.text) == 32
    (batch,) = kept.fill(iter([Batch(text=["C view", "a photo", "C view"], index=torch.tensor([2, 0, 2]))]))
    expected = torch.nn.functional.normalize(encoder.eval().encode_text(batch["text"]).detach(), dim=1)
    torch.testing.assert_close(batch["text_vector"], expected)
    with pytest.raises(InputError, match="'d view' was not among the captions"):
        next(kept.fill(iter([Batch(text=["d view"])])))


def test_retention_of_a_locked_tower_is_zero(original: Encoder, photos: Manifest):
    encoder = adapt(original, Full("text"))
    vectors = embed(original, photos, device="cpu", precision="fp32").vectors
    objective = ImageTextObjective(encoder, InfoNCE(scale=10.0), retention=1.0, reference=original)
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    rows = torch.arange(8)
    text = [photos.captions()[i][0] for i in range(8)]
    images = torch.stack([train_transform(original.preprocess, "none")(photos.image(i)) for i in range(8)])
    batch = Batch(image=images, text=text, index=rows)
    (filled,) = LockedTowers(vectors).fill(iter([Batch(text=text, index=rows)]))
    ran, looked_up = objective.eval()(batch), objective(filled)
    for name in ("loss", "criterion", "retention"):
        torch.testing.assert_close(looked_up[name], ran[name], rtol=1e-4, atol=1e-5)
    assert ran["retention"] > 1e-3


def test_batches_without_images_open_no_file(photos: Manifest, tmp_path: Path):
    sampler = ShuffleSampler(len(photos), 4, seed=3)
    with_images = train_batches(photos, lambda image: image.float(), sampler, seed=5, workers=0, start_step=2)
    elsewhere = Manifest.build(photos.table, tmp_path)
    without = train_batches(elsewhere, None, sampler, seed=5, start_step=2)
    for one, other in itertools.islice(zip(with_images, without, strict=False), 7):
        assert "image" not in other
        assert torch.equal(one["index"], other["index"])
        assert torch.equal(one["label"], other["label"])
        assert one["text"] == other["text"]  # the same caption is drawn
    assert without.skipped == []


@pytest.mark.parametrize(
    ("tower", "augment", "not_run"),
    [("text", "none", ["image"]), ("text", "light", []), ("image", "light", ["text"]), ("both", "none", [])],
)
def test_a_run_runs_no_tower_that_it_need_not(tmp_path: Path, tower: str, augment: str, not_run: list[str]):
    said: list[str] = []
    settings = recipe(adapt=[{"full": {"tower": tower}}], augment=augment, layer_decay=0.8)
    out = run(settings, tmp_path / "run", say=said.append)
    assert json.loads((out / "results.json").read_text())["training"]["towers_not_run"] == not_run
    locked = [line for line in said if line.startswith("locked")]
    assert len(locked) == (tower != "both")
    if (tower, augment) == ("text", "light"):
        assert "augment=none spares that" in locked[0]
