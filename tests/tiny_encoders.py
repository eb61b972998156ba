"""Tiny encoders of the three families, with random weights, loaded through the library's own road."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder, Tokenizer

SIZE = 32


def timm(folder: Path) -> Encoder:
    """A plain ViT: 12 blocks of width 192, qkv in one layer."""
    return load_encoder("timm:vit_tiny_patch16_224", size=SIZE, random_init=True)


def open_clip(folder: Path) -> Encoder:
    """CLIP with fused attention: 3 blocks an image, 2 a text."""
    config = {
        "model_cfg": {
            "embed_dim": 24,
            "vision_cfg": {"image_size": SIZE, "layers": 3, "width": 64, "head_width": 16, "patch_size": 16},
            "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        }
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return load_encoder(f"open_clip:local-dir:{folder}", random_init=True)


def siglip2(folder: Path) -> Encoder:
    """The layout of OpenCLIP's SigLIP2: timm's image tower with attention pooling, a text tower of its own."""
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    config = {
        "model_cfg": {
            "embed_dim": 96,
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
            "text_cfg": {**text, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        }
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return load_encoder(f"open_clip:local-dir:{folder}", size=SIZE, random_init=True)


class Codes:
    """The tokenizer of `transformers`: letters as numbers, ended by the end token."""

    context_length = 12

    def __init__(self, stands_for: Tokenizer) -> None:
        self.save = stands_for.save

    def __call__(self, texts: list[str]) -> Tensor:
        rows = [[ord(letter) % 60 + 1 for letter in text[:11]] + [63] for text in texts]
        return torch.tensor([row + [63] * (12 - len(row)) for row in rows])

    def lengths(self, texts: list[str]) -> list[int]:
        return [len(text) + 1 for text in texts]


def transformers(folder: Path) -> Encoder:
    """CLIP of transformers: q, k, v and out apart; 3 blocks an image, 2 a text."""
    from transformers import CLIPConfig

    config = CLIPConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": 16,
        },
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vocab_size": 64,
            "max_position_embeddings": 12,
            "bos_token_id": 0,
            "eos_token_id": 63,
            "pad_token_id": 63,
        },
        projection_dim=24,
    )
    return _of_transformers(config, folder)


def clip_of(folder: Path, *, layers: int) -> Encoder:
    """A CLIP of so many thin image layers, saved into `folder` with its weights."""
    from transformers import CLIPConfig, CLIPModel

    thin = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    vision = {**thin, "num_hidden_layers": layers, "image_size": SIZE, "patch_size": 16}
    text = {**thin, "num_hidden_layers": 1, "vocab_size": 49408, "max_position_embeddings": 12}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=24)).save_pretrained(folder)
    return load_encoder(f"transformers:{folder}")


def dinov2(folder: Path) -> Encoder:
    """DINOv2 of transformers: 3 blocks, an image tower alone."""
    from transformers import Dinov2Config

    settings = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    return _of_transformers(Dinov2Config(image_size=SIZE, patch_size=16, **settings), folder)


def siglip(folder: Path) -> Encoder:
    """SigLIP of transformers: 3 blocks an image, attention pooling."""
    from transformers import SiglipConfig

    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {**shape, "vocab_size": 64, "max_position_embeddings": 12, "eos_token_id": 63, "bos_token_id": 0}
    config = SiglipConfig(vision_config={**shape, "image_size": SIZE, "patch_size": 16}, text_config=text)
    return _of_transformers(config, folder)


def _of_transformers(config: object, folder: Path) -> Encoder:
    config.save_pretrained(folder)  # type: ignore[attr-defined]
    encoder = load_encoder(f"transformers:{folder}", size=SIZE, random_init=True)
    if encoder.anatomy.text is not None:
        encoder.tokenizer = Codes(encoder.tokenizer)  # type: ignore[assignment]
    return encoder


FAMILIES: dict[str, Callable[[Path], Encoder]] = {"timm": timm, "open_clip": open_clip, "transformers": transformers}


def images(count: int = 2) -> Tensor:
    """Noise, the same each time."""
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))


def disturb(parameters: dict[str, torch.nn.Parameter], scale: float = 0.02, seed: int = 3) -> None:
    """As if trained: some noise on each weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
