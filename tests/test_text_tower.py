"""A new text tower for an image tower: the images' vectors stay, the whole is saved and exported as any model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vicinal.models.adapters import LoRA, adapt
from vicinal.models.backbones import load_encoder
from vicinal.models.text_tower import TextTower, with_text_tower
from vicinal.types import InputError

SMALL = TextTower(layers=1, width=64, context_length=8)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("test_vit", 32),
        ("vit_tiny_patch16_224", 48),  # another size than its own
        ("test_convnext", 64),
        ("test_resnet", 64),
        ("vit_base_patch16_siglip_224", 32),  # pools by attention
    ],
)
def test_images_keep_their_vectors(name: str, size: int, tmp_path: Path) -> None:
    image = load_encoder(f"timm:{name}", size=size, random_init=True)
    both = with_text_tower(image, SMALL)
    x = torch.rand(2, 3, size, size)
    assert torch.equal(both.encode_image(x), image.encode_image(x))
    assert both.encode_text(["a", "b c"]).shape == (2, image.embedding_dim)
    assert both.context_length == 8
    again = load_encoder(both.save(tmp_path / "model"))
    assert torch.equal(again.encode_image(x), both.encode_image(x))
    assert torch.equal(again.encode_text(["a mark"]), both.encode_text(["a mark"]))


def test_it_is_a_copy_and_nothing_is_trained_yet() -> None:
    image = load_encoder("timm:test_vit", size=32, random_init=True)
    both = with_text_tower(image, SMALL)
    with torch.no_grad():
        for parameter in both.parameters():
            parameter.zero_()
    assert any(bool(p.any()) for p in image.parameters())
    assert not any(p.requires_grad for p in both.parameters())


def test_the_text_tower_comes_from_torchs_generator() -> None:
    image = load_encoder("timm:test_vit", size=32, random_init=True)
    vectors = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        vectors.append(with_text_tower(image, SMALL).encode_text(["a mark"]))
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])


def test_its_layers_can_be_adapted() -> None:
    both = with_text_tower(load_encoder("timm:test_vit", size=32, random_init=True), SMALL)
    tuned = adapt(both, LoRA(rank=2, tower="both"))
    assert {name.split(".")[1] for name, p in tuned.named_parameters() if p.requires_grad} == {"visual", "text"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: TextTower(width=100, heads=3), "which 3 heads do not divide"),
        (lambda: TextTower(context_length=2), "two of which are start and end"),
        (lambda: with_text_tower(load_encoder("vicinal:nano", random_init=True), SMALL), "has a text tower already"),
        (
            lambda: with_text_tower(
                adapt(load_encoder("timm:test_vit", size=32, random_init=True), LoRA(rank=2)), SMALL
            ),
            "before the image tower is adapted",
        ),
    ],
)
def test_what_cannot_have_one(make: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()  # type: ignore[operator]
