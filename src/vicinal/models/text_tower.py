"""A text tower for an image tower that has none, from random weights: what LiT trains.

    t = W norm(x_e),   x = blocks(E[tokens] + P)      Zhai et al. 2022 (LiT), arXiv:2111.07991

x_e is the token at the end of the text; the blocks are causal, as CLIP's. The tower gives vectors as wide as those of
the image tower, which keeps its weights and its vectors. The whole is a model of open_clip with timm's tower in it, and
is saved, exported and loaded as such.

Letters: L tokens of a text, C numbers of a token, D numbers an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vicinal.models import from_open_clip
from vicinal.models.encoder import Encoder
from vicinal.models.tokenizers import OpenClipTokenizer
from vicinal.types import InputError

__all__ = ["TextTower", "with_text_tower"]


@dataclass(frozen=True, slots=True)
class TextTower:
    """The size of a text tower. Its tokens are open_clip's own: 49,408 pieces of words, of which most words are one.

    Args:
        layers: blocks. CLIP: 12.
        width: C. CLIP: 512; a few thousand captions teach no more than a small one can hold.
        heads: of the attention; None: one for each 64 numbers of the width.
        context_length: L, with a start and an end token; longer texts are cut. CLIP: 77.

    Raises:
        InputError: a number below 1, or a width that the heads do not divide.

    >>> TextTower(width=192).config()["heads"]
    3
    """

    layers: int = 4
    width: int = 256
    heads: int | None = None
    context_length: int = 32

    def __post_init__(self) -> None:
        if min(self.layers, self.width) < 1 or self.context_length < 3:
            raise InputError(
                f"text_tower: layers={self.layers}, width={self.width}, context_length={self.context_length}; give at "
                "least 1 layer, 1 number and 3 tokens, two of which are start and end"
            )
        if self.width % self._heads():
            raise InputError(f"text_tower.width is {self.width}, which {self._heads()} heads do not divide evenly")

    def _heads(self) -> int:
        return max(1, self.width // 64 if self.heads is None else self.heads)

    def config(self) -> dict[str, Any]:
        """The words of open_clip for it."""
        return {
            "context_length": self.context_length,
            "vocab_size": 49408,
            "width": self.width,
            "heads": self._heads(),
            "layers": self.layers,
        }


def with_text_tower(encoder: Encoder, tower: TextTower) -> Encoder:
    """An image-text encoder of an image encoder and a new text tower, whose weights are drawn from torch's generator.

    Args:
        encoder: a model of timm's, not adapted. It is copied: images get the same vectors, at the same size.
        tower: how large.

    Raises:
        InputError: the encoder has a text tower already, is adapted, or is not timm's.

    >>> from vicinal.models.backbones import load_encoder
    >>> image = load_encoder("timm:test_vit", size=32, random_init=True)
    >>> both = with_text_tower(image, TextTower(layers=1, width=64, context_length=8))
    >>> x = torch.rand(1, 3, 32, 32)
    >>> torch.equal(both.encode_image(x), image.encode_image(x)), both.encode_text(["a mark"]).shape[1]
    (True, 64)
    """
    if encoder.family.encode_text is not None:
        raise InputError(f"text_tower: {encoder.source} has a text tower already; leave text_tower out to train that")
    if encoder.family.name != "timm":
        raise InputError(
            f"text_tower: {encoder.source} is of {encoder.family.name}; a new text tower goes with timm's models, such "
            "as timm:vit_small_patch16_224.augreg_in21k"
        )
    if encoder.adapters:
        raise InputError("text_tower: put it on before the image tower is adapted")
    size = encoder.architecture["size"]
    config = {
        "embed_dim": encoder.embedding_dim,
        "custom_text": True,
        "vision_cfg": {
            "image_size": list(encoder.preprocess.size),
            "timm_model_name": encoder.architecture["name"],
            "timm_pool": encoder.anatomy.pool,
            "timm_proj": "none",  # the vectors are the image tower's own
        },
        "text_cfg": tower.config(),
    }
    architecture = {"family": "open_clip", "config": config, "text_config": None, "size": size}
    model, family, anatomy = from_open_clip.build(architecture)
    if size is not None:
        family.resize(model, tuple(size))
    trunk: nn.Module = model.get_submodule("visual.trunk")
    trunk.load_state_dict(encoder.model.state_dict(), strict=True)
    both = Encoder(
        model.eval().requires_grad_(False),
        family=family,
        anatomy=anatomy,
        preprocess=encoder.preprocess,
        source=f"{encoder.source} with a new text tower",
        architecture=architecture,
        embedding_dim=encoder.embedding_dim,
        licence=encoder.licence,
        tokenizer=OpenClipTokenizer.make(tower.context_length, {}, None, {}),
    )
    both.to(encoder.device)
    _check_same(encoder, both)
    return both


@torch.no_grad()
def _check_same(image: Encoder, both: Encoder) -> None:
    """Pooling differs from model to model: proof that open_clip runs the tower as timm does."""
    blank = torch.linspace(-1, 1, 3 * image.preprocess.size[0] * image.preprocess.size[1], device=image.device)
    picture = blank.reshape(1, 3, *image.preprocess.size)
    if not torch.allclose(image.encode_image(picture), both.encode_image(picture), rtol=1e-3, atol=1e-4):
        raise InputError(f"text_tower: open_clip does not run {image.source} as timm does; take another image tower")
