"""Texts and class names to vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import tiny_encoders
from vicinal.embedding import embed_classes, embed_text
from vicinal.models.encoder import Encoder
from vicinal.types import InputError


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return tiny_encoders.transformers(tmp_path_factory.mktemp("clip") / "model")


def test_texts_are_unit_rows_in_their_order_whatever_the_batch(encoder: Encoder) -> None:
    texts = ["a", "bb", "a", "c d", "bb", "e"]
    vectors = embed_text(encoder, texts, precision="fp32", device="cpu")
    with torch.no_grad():
        expected = F.normalize(encoder.encode_text(texts), dim=-1)
    torch.testing.assert_close(vectors, expected)
    assert torch.equal(vectors[0], vectors[2])
    torch.testing.assert_close(embed_text(encoder, texts, precision="fp32", device="cpu", batch_size=2), vectors)
    assert embed_text(encoder, [], device="cpu").shape == (0, encoder.embedding_dim)


def test_a_class_is_the_mean_over_its_templates(encoder: Encoder) -> None:
    templates = ["{}", "a photo of a {}."]
    vectors = embed_classes(encoder, ["x", "y"], templates, precision="fp32", device="cpu")
    by_hand = [
        F.normalize(
            sum(F.normalize(encoder.encode_text([t.format(name)])[0], dim=0) for t in templates), dim=0
        ).detach()
        for name in ("x", "y")
    ]
    torch.testing.assert_close(vectors, torch.stack(by_hand))
    with pytest.raises(InputError, match=r"write \{\} once"):
        embed_classes(encoder, ["x"], ["a photo"])
    with pytest.raises(InputError, match="text tower"):
        embed_classes(tiny_encoders.timm(Path()), ["x"])
