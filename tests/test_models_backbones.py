"""load_encoder: small random models, saved in each library's own format and loaded back; sizes; anatomy; bad input.

The reference is always the library itself, run on the same files.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vicinal.models import from_open_clip, from_transformers, weights
from vicinal.models.anatomy import ATTENTION, MLP, find_tower, resample
from vicinal.models.backbones import FAMILIES, load_encoder
from vicinal.models.encoder import Encoder
from vicinal.types import InputError

TEXTS = ["a red shirt", "shirt", "a photo of a small red shirt with a collar and four buttons", ""]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reaches for the network, wherever it runs."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


# ----------------------------------------------------------------------------------------- models in their own formats


@dataclass(frozen=True)
class Made:
    """A model on disk, and what its own library computes with it."""

    uri: str
    image: Callable[[Tensor], Tensor]
    text: Callable[[list[str]], Tensor] | None = None
    other_size: Callable[[Tensor], Tensor] | None = None  # the library's own way to another input size


def liven(model: nn.Module) -> None:
    """No weight stays at a constant, which would hide a swap; positions matter as much as pixels."""
    for name, parameter in model.requires_grad_(False).named_parameters():
        if "pos" in name and "embed" in name:
            nn.init.normal_(parameter)
        elif parameter.ndim and parameter.eq(parameter.flatten()[0]).all():
            nn.init.normal_(parameter, mean=float(parameter.flatten()[0]), std=0.02)


def make_timm(folder: Path, name: str) -> Made:
    import timm

    model = timm.create_model(name, num_classes=7).eval()  # a classifier of another width than published
    liven(model)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "weights.safetensors")
    file = folder / "weights.safetensors"

    def other_size(x: Tensor) -> Tensor:
        cfg = {"file": str(file), "num_classes": 7}
        size = {} if "vit" not in name else {"img_size": tuple(x.shape[-2:])}
        other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cfg, num_classes=0, **size).eval()
        return other(x)

    return Made(
        f"timm:{name}@{file}",
        lambda x: model.forward_head(model.forward_features(x), pre_logits=True),
        None,
        other_size,
    )


CLIP_TEXT = {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
CLIP_IMAGE = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "vit": {"embed_dim": 24, "vision_cfg": CLIP_IMAGE, "text_cfg": CLIP_TEXT},
    "quickgelu": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": CLIP_IMAGE, "text_cfg": CLIP_TEXT},
    "custom_text": {"embed_dim": 24, "custom_text": True, "vision_cfg": CLIP_IMAGE, "text_cfg": CLIP_TEXT},
    "siglip": {
        "embed_dim": 96,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {
            **CLIP_TEXT,
            "vocab_size": 64,
            "hf_tokenizer_name": "nobody/tiny",
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
        },
    },
    "eva": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 160,
            "timm_model_name": "test_vit",
            "timm_pool": "token",
            "timm_proj": "linear",
        },
        "text_cfg": CLIP_TEXT,
    },
    "bert": {
        "embed_dim": 24,
        "vision_cfg": CLIP_IMAGE,
        "text_cfg": {
            "hf_model_name": "nobody/tiny-bert",
            "hf_tokenizer_name": "nobody/tiny-bert",
            "context_length": 12,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "mean_pooler",
        },
    },
    "coca": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": {**CLIP_IMAGE, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": {**CLIP_TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {
            "width": 24,
            "context_length": 12,
            "vocab_size": 49408,
            "mlp_ratio": 2,
            "layers": 2,
            "heads": 2,
            "dim_head": 12,
            "n_queries": 16,
        },
    },
    "resnet": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
        "text_cfg": CLIP_TEXT,
    },
}
TOKENIZER_FILES = {"siglip", "bert"}


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of a few words, as files of transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<unk>", "<s>", "</s>", *sorted({word for text in TEXTS for word in text.split()})]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(folder)


def save_bert(folder: Path) -> None:
    from transformers import BertConfig

    BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    ).save_pretrained(folder)


def make_open_clip(folder: Path, name: str, **preprocess: object) -> Made:
    """In the layout of `local-dir:`, written by hand: open_clip has no function for it without a Hub account."""
    import open_clip
    from open_clip.coca_model import CoCa
    from open_clip.model import CustomTextCLIP

    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(json.dumps(OPEN_CLIP[name]))
    if name in TOKENIZER_FILES:
        save_tokenizer(folder)
    if name == "bert":
        save_bert(folder)
    built = json.loads(json.dumps(config))
    custom = built.pop("custom_text", False) or name == "bert"
    if name == "bert":
        built["text_cfg"] |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    kind = CoCa if name == "coca" else CustomTextCLIP if custom else open_clip.CLIP
    model = kind(**built).eval()
    liven(model)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(copy.deepcopy(model).state_dict(), folder / "open_clip_model.safetensors")
    if name in TOKENIZER_FILES:
        tokenizer = open_clip.tokenizer.HFTokenizer(str(folder), context_length=12)
    else:
        tokenizer = open_clip.SimpleTokenizer(context_length=12)

    def other_size(x: Tensor) -> Tensor:
        other = open_clip.create_model(f"local-dir:{folder}", force_image_size=tuple(x.shape[-2:]))
        return other.eval().encode_image(x, normalize=False)

    return Made(
        f"open_clip:local-dir:{folder}",
        lambda x: model.encode_image(x, normalize=False),
        lambda texts: model.encode_text(tokenizer(texts), normalize=False),
        None if name in ("resnet", "bert") else other_size,  # open_clip cannot (bert: it wants its Hub)
    )


_BLOCKS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_IMAGE = {**_BLOCKS, "image_size": 32, "patch_size": 8}
_WORDS = {**_BLOCKS, "vocab_size": 64, "max_position_embeddings": 12, "num_hidden_layers": 3}
_CLIP_WORDS = {**_WORDS, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}


def make_transformers(folder: Path, name: str) -> Made:
    import transformers as hf

    text: Callable[[list[str]], Tensor] | None = None
    if name in ("clip", "siglip"):
        save_tokenizer(folder)
    elif name == "siglip2":  # which has a class of its own, that transformers takes whatever the files say
        specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
        vocabulary = {token: i for i, token in enumerate([*specials, *"abcdefghijklmnopqrstuvwxyz"])}
        hf.Siglip2Tokenizer(vocabulary, [], padding_side="right").save_pretrained(folder)

    def tokens(texts: list[str]) -> dict[str, Tensor]:
        tokenizer = hf.AutoTokenizer.from_pretrained(folder)
        found = tokenizer(texts, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
        return {key: found[key] for key in ("input_ids", "attention_mask")}

    if name == "clip":
        model = hf.CLIPModel(hf.CLIPConfig(vision_config=_IMAGE, text_config=_CLIP_WORDS, projection_dim=24))
        processor = hf.CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
        image = lambda x: model.get_image_features(x).pooler_output  # noqa: E731
        text = lambda texts: model.get_text_features(**tokens(texts)).pooler_output  # noqa: E731
    elif name == "clip_vision_model":
        model = hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**_IMAGE, projection_dim=24))
        processor = hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        image = lambda x: model(x).image_embeds  # noqa: E731
    elif name == "siglip":
        model = hf.SiglipModel(hf.SiglipConfig(vision_config=_IMAGE, text_config={**_WORDS, "projection_size": 32}))
        processor = hf.SiglipImageProcessor(size={"height": 32, "width": 32})
        image = lambda x: model.get_image_features(x).pooler_output  # noqa: E731
        text = lambda texts: model.get_text_features(tokens(texts)["input_ids"]).pooler_output  # noqa: E731
    elif name == "siglip2":
        settings = {**_BLOCKS, "patch_size": 8, "num_patches": 16}
        model = hf.Siglip2Model(hf.Siglip2Config(vision_config=settings, text_config={**_WORDS, "projection_size": 32}))
        processor = hf.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
        text = lambda texts: model.get_text_features(tokens(texts)["input_ids"]).pooler_output  # noqa: E731

        def image(x: Tensor) -> Tensor:
            flat = F.unfold(x, 8, stride=8).transpose(1, 2)  # channels first within a patch; the model wants them last
            flat = flat.reshape(len(x), -1, 3, 64).transpose(2, 3).flatten(2)
            shapes = torch.tensor([[x.shape[2] // 8, x.shape[3] // 8]] * len(x))
            out = model.get_image_features(flat, torch.ones(flat.shape[:2], dtype=torch.int32), shapes)
            return out.pooler_output

    elif name == "vit":
        model = hf.ViTForImageClassification(hf.ViTConfig(**_IMAGE))  # as published: with a classifier, without pooler
        processor = hf.ViTImageProcessor(size={"height": 32, "width": 32})
        image = lambda x: model.vit(x).last_hidden_state[:, 0]  # noqa: E731
    else:
        config = {**_IMAGE, "image_size": 64}  # DINOv2's grid is larger than the images it is used on
        config.pop("intermediate_size")
        if name == "dinov2":
            model = hf.Dinov2Model(hf.Dinov2Config(**config))
        else:
            model = hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**config, num_register_tokens=2))
        processor = hf.BitImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
        image = lambda x: model(x).pooler_output  # noqa: E731
    liven(model)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)

    def other_size(x: Tensor) -> Tensor:
        if name == "vit":
            return model.vit(x, interpolate_pos_encoding=True).last_hidden_state[:, 0]
        if name == "clip_vision_model":
            return model(x, interpolate_pos_encoding=True).image_embeds
        if name in ("clip", "siglip"):
            return model.get_image_features(x, interpolate_pos_encoding=True).pooler_output
        return image(x)  # DINOv2 and NaFlex resample in every forward

    return Made(f"transformers:{folder}", image, text, other_size)


MADE: dict[str, Callable[[Path], Made]] = {
    **{
        f"timm:{name}": lambda f, n=name: make_timm(f, n)
        for name in ("test_vit", "test_vit2", "test_vit3", "test_convnext")
    },
    **{f"open_clip:{name}": lambda f, n=name: make_open_clip(f, n) for name in OPEN_CLIP},
    **{f"transformers:{name}": lambda f, n=name: make_transformers(f, n) for name in from_transformers.KINDS},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """Each model is made once."""
    kept: dict[str, Made] = {}

    def get(name: str) -> Made:
        if name not in kept:
            torch.manual_seed(3)
            kept[name] = MADE[name](tmp_path_factory.mktemp("made") / name.replace(":", "-"))
        return kept[name]

    return get


def images(encoder: Encoder, size: tuple[int, int] | None = None) -> Tensor:
    return torch.randn(3, 3, *(size or encoder.preprocess.size), generator=torch.Generator().manual_seed(0))


def test_the_tables_are_what_the_issue_names():
    assert set(FAMILIES) == {"vicinal", "timm", "open_clip", "transformers"}
    assert {"clip", "siglip", "siglip2", "dinov2", "vit"} <= set(from_transformers.KINDS)
    assert len(MADE) == 19


@torch.no_grad()
@pytest.mark.parametrize("name", MADE)
def test_loads_what_its_library_saved_and_computes_the_same(name: str, made: Callable[[str], Made]):
    model = made(name)
    encoder = load_encoder(model.uri)
    assert not encoder.training
    assert encoder.source == model.uri
    x = images(encoder)
    expected = model.image(x)
    torch.testing.assert_close(encoder.encode_image(x), expected, rtol=1e-5, atol=1e-6)
    assert encoder.embedding_dim == expected.shape[1]
    assert expected.std() > 1e-3
    if model.text is None:
        assert encoder.anatomy.text is None
        assert encoder.context_length is None
        with pytest.raises(InputError, match="no text tower"):
            encoder.encode_text(TEXTS)
    else:
        torch.testing.assert_close(encoder.encode_text(TEXTS), model.text(TEXTS), rtol=1e-5, atol=1e-6)
        assert encoder.context_length == 12


@torch.no_grad()
@pytest.mark.parametrize("name", MADE)
def test_a_saved_folder_needs_nothing_but_itself(
    name: str, made: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    encoder = load_encoder(made(name).uri)
    x = images(encoder)
    folder = encoder.save(tmp_path / "model")
    origin = Path(made(name).uri.rpartition("@")[2].rpartition(":")[2])
    aside = origin.with_name(origin.name + ".aside")
    origin.rename(aside)
    try:
        again = load_encoder(folder)
    finally:
        aside.rename(origin)
    # within rounding: attention pooling takes torch's fast path where no weight is marked as trained
    torch.testing.assert_close(again.encode_image(x), encoder.encode_image(x), rtol=1e-5, atol=2e-6)
    assert again.fingerprint() == encoder.fingerprint()
    for field in (
        *("source", "licence", "embedding_dim", "preprocess", "anatomy", "architecture"),
        *("logit_scale", "logit_bias", "context_length"),
    ):
        assert getattr(again, field) == getattr(encoder, field), field
    if encoder.anatomy.text is not None:
        assert torch.equal(again.encode_text(TEXTS), encoder.encode_text(TEXTS))
        assert again.token_lengths(TEXTS) == encoder.token_lengths(TEXTS)


def test_logit_scale_and_bias_are_the_models_own(made: Callable[[str], Made]):
    clip = load_encoder(made("open_clip:vit").uri)
    assert clip.logit_scale == pytest.approx(1 / 0.07)
    assert clip.logit_bias is None
    siglip = load_encoder(made("open_clip:siglip").uri)
    assert siglip.logit_bias == pytest.approx(-10)
    other = load_encoder(made("transformers:siglip").uri)
    assert other.logit_scale == pytest.approx(other.model.logit_scale.exp().item())
    assert other.logit_bias == pytest.approx(other.model.logit_bias.item())
    assert load_encoder(made("timm:test_vit").uri).logit_scale is None


# ------------------------------------------------------------------------------------------------------------- anatomy

QKV = {"qkv": "attn.qkv", "out": "attn.proj"}
FUSED = {"fused": "attn"}
SPLIT = {role: f"self_attn.{name}_proj" for role, name in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "out"))}
PLAIN = {role: f"attention.{name}_proj" for role, name in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))}
FC = ("mlp.fc1", "mlp.fc2")
C_FC = ("mlp.c_fc", "mlp.c_proj")

ANATOMY: dict[str, tuple[Any, ...]] = {
    # name: (image blocks, attention, mlp, norm, pool, heads, text blocks, text attention, patch_embed)
    "timm:test_vit": (6, QKV, FC, "norm", "token", (), None, None, "patch_embed"),
    "timm:test_vit2": (8, QKV, FC, "fc_norm", "avg", (), None, None, "patch_embed"),
    "timm:test_vit3": (9, QKV, FC, "norm", "map", ("attn_pool",), None, None, "patch_embed"),
    "timm:test_convnext": (0, {}, (), "head.norm", "avg", (), None, None, "stem.0"),
    "timm:resnet18": (0, {}, (), None, "avg", (), None, None, "conv1"),
    "timm:vit_tiny_patch16_224": (12, QKV, FC, "norm", "token", (), None, None, "patch_embed"),
    "timm:vit_small_patch14_reg4_dinov2": (12, QKV, FC, "norm", "token", (), None, None, "patch_embed"),
    "timm:swin_tiny_patch4_window7_224": (12, QKV, FC, "norm", "avg", (), None, None, "patch_embed"),
    "timm:eva02_tiny_patch14_224": (12, QKV, FC, "fc_norm", "avg", (), None, None, "patch_embed"),
    "open_clip:vit": (2, FUSED, C_FC, "visual.ln_post", "token", ("visual.proj",), 3, FUSED, "visual.conv1"),
    "open_clip:quickgelu": (2, FUSED, C_FC, "visual.ln_post", "token", ("visual.proj",), 3, FUSED, "visual.conv1"),
    "open_clip:custom_text": (2, FUSED, C_FC, "visual.ln_post", "token", ("visual.proj",), 3, FUSED, "visual.conv1"),
    "open_clip:siglip": (
        9,
        QKV,
        FC,
        "visual.trunk.norm",
        "map",
        ("visual.trunk.attn_pool",),
        3,
        FUSED,
        "visual.trunk.patch_embed",
    ),
    "open_clip:eva": (6, QKV, FC, "visual.trunk.norm", "token", ("visual.head",), 3, FUSED, "visual.trunk.patch_embed"),
    "open_clip:bert": (
        *(2, FUSED, C_FC, "visual.ln_post", "token", ("visual.proj",)),
        *(
            3,
            {role: f"attention.self.{word}" for role, word in zip("qkv", ("query", "key", "value"), strict=True)}
            | {"out": "attention.output.dense"},
        ),
        "visual.conv1",
    ),
    "open_clip:coca": (
        2,
        FUSED,
        C_FC,
        "visual.ln_post",
        "map",
        ("visual.attn_pool", "visual.proj"),
        3,
        FUSED,
        "visual.conv1",
    ),
    "open_clip:resnet": (0, {}, (), None, "map", ("visual.attnpool",), 3, FUSED, "visual.conv1"),
    "transformers:clip": (
        2,
        SPLIT,
        FC,
        "vision_model.post_layernorm",
        "token",
        ("visual_projection",),
        3,
        SPLIT,
        "vision_model.embeddings.patch_embedding",
    ),
    "transformers:clip_vision_model": (
        2,
        SPLIT,
        FC,
        "vision_model.post_layernorm",
        "token",
        ("visual_projection",),
        None,
        None,
        "vision_model.embeddings.patch_embedding",
    ),
    "transformers:siglip": (
        2,
        SPLIT,
        FC,
        "vision_model.post_layernorm",
        "map",
        ("vision_model.head",),
        3,
        SPLIT,
        "vision_model.embeddings.patch_embedding",
    ),
    "transformers:siglip2": (
        2,
        SPLIT,
        FC,
        "vision_model.post_layernorm",
        "map",
        ("vision_model.head",),
        3,
        SPLIT,
        "vision_model.embeddings.patch_embedding",
    ),
    "transformers:dinov2": (2, PLAIN, FC, "layernorm", "token", (), None, None, "embeddings.patch_embeddings"),
    "transformers:dinov2_with_registers": (
        2,
        PLAIN,
        FC,
        "layernorm",
        "token",
        (),
        None,
        None,
        "embeddings.patch_embeddings",
    ),
    "transformers:vit": (2, PLAIN, FC, "layernorm", "token", (), None, None, "embeddings.patch_embeddings"),
}


@pytest.mark.parametrize("name", ANATOMY)
def test_every_name_of_the_anatomy_is_there(name: str, made: Callable[[str], Made]):
    uri = made(name).uri if name in MADE else name
    encoder = load_encoder(
        uri,
        random_init=name not in MADE,
        size=32 if "dinov2" not in name and name not in MADE and "vit_tiny" in name else None,
    )
    blocks, attention, mlp, norm, pool, heads, text_blocks, text_attention, patch_embed = ANATOMY[name]
    anatomy = encoder.anatomy
    assert len(anatomy.image.blocks) == len(set(anatomy.image.blocks)) == blocks
    assert dict(anatomy.image.attention) == attention
    assert anatomy.image.mlp == mlp
    assert anatomy.image.norm == norm
    assert (anatomy.pool, anatomy.heads, anatomy.patch_embed) == (pool, heads, patch_embed)
    if text_blocks is None:
        assert anatomy.text is None
    else:
        assert anatomy.text is not None
        assert len(anatomy.text.blocks) == text_blocks
        assert dict(anatomy.text.attention) == text_attention
        assert not set(anatomy.text.blocks) & set(anatomy.image.blocks)
    modules, parameters = dict(encoder.model.named_modules()), dict(encoder.model.named_parameters())
    assert anatomy.patch_embed in modules
    assert all(head in modules or head in parameters for head in heads)
    for tower in filter(None, (anatomy.image, anatomy.text)):
        assert tower.norm is None or tower.norm in modules
        for block in tower.blocks:
            named = {f"{block}.{layer}" for layer in tower.layers()}
            linear = {
                key
                for key, module in modules.items()
                if key.startswith(f"{block}.") and isinstance(module, nn.Linear | nn.MultiheadAttention)
            }
            # nothing of a block is left out; the out_proj of a fused attention belongs to it
            assert {
                key.removesuffix(".out_proj") if tower.attention.keys() == {"fused"} else key for key in linear
            } == named


def block_of(attention: Mapping[str, str], mlp: tuple[str, ...]) -> nn.Module:
    """A bare module with children at the names of a layout."""
    block = nn.Module()
    for role, name in (*attention.items(), *((None, name) for name in mlp)):
        parent, _, last = name.rpartition(".")
        at = block
        for part in parent.split(".") if parent else ():
            if part not in dict(at.named_children()):
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.add_module(last, nn.MultiheadAttention(4, 2) if role == "fused" else nn.Linear(4, 4))
    return block


@pytest.mark.parametrize("attention", ATTENTION, ids=lambda roles: next(iter(roles.values())))
@pytest.mark.parametrize("mlp", MLP, ids=lambda names: names[0])
def test_every_layout_of_the_tables_is_found(attention: Mapping[str, str], mlp: tuple[str, ...]):
    tower = nn.Sequential(nn.Linear(4, 4), block_of(attention, mlp), block_of(attention, mlp))
    found = find_tower(nn.ModuleDict({"a": tower, "b": copy.deepcopy(tower)}), "a.")
    assert (found.blocks, dict(found.attention), found.mlp) == (("a.1", "a.2"), dict(attention), mlp)


def test_a_tower_of_an_unknown_layout_is_empty():
    assert find_tower(nn.TransformerEncoderLayer(8, 2)).blocks == ()
    assert find_tower(block_of({"q": "attn.q", "k": "attn.kv"}, MLP[0])).blocks == ()


# --------------------------------------------------------------------------------------------------------------- sizes


@torch.no_grad()
@pytest.mark.parametrize("name", MADE)
def test_the_size_it_has_changes_nothing(name: str, made: Callable[[str], Made]):
    encoder = load_encoder(made(name).uri)
    again = load_encoder(made(name).uri, size=encoder.preprocess.size)
    assert torch.equal(again(images(encoder)), encoder(images(encoder)))
    assert again.fingerprint() == encoder.fingerprint()


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (96, 64)], ids=str)
@pytest.mark.parametrize("name", MADE)
def test_another_size_is_resampled_as_its_library_does(
    name: str, size: tuple[int, int], made: Callable[[str], Made], tmp_path: Path
):
    model = made(name)
    encoder = load_encoder(model.uri, size=size)
    assert encoder.preprocess.size == size
    x = images(encoder)
    z = encoder.encode_image(x)
    assert z.shape == (3, encoder.embedding_dim)
    if model.other_size is not None:
        torch.testing.assert_close(z, model.other_size(x), rtol=1e-5, atol=1e-6)
    again = load_encoder(encoder.save(tmp_path / "saved"))
    torch.testing.assert_close(again.encode_image(x), z, rtol=1e-5, atol=2e-6)
    assert again.preprocess == encoder.preprocess
    native = load_encoder(model.uri)
    back = load_encoder(tmp_path / "saved", size=native.preprocess.size)  # a saved one can change its size too
    assert back.encode_image(images(native)).shape == z.shape


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("timm:test_vit", 100, "not a multiple.*16 x 16.*nearest is 96 x 96"),
        ("open_clip:vit", 30, "not a multiple.*8 x 8.*nearest is 32 x 32"),
        ("open_clip:siglip", 100, "not a multiple"),
        ("open_clip:resnet", 100, "not a multiple"),
        ("transformers:clip", (32, 30), "not a multiple"),
        ("transformers:siglip2", 30, "not a multiple"),
        ("transformers:dinov2", 30, "not a multiple"),
        ("transformers:vit", 0, "not a size"),
    ],
)
def test_a_size_that_does_not_fit_is_refused(name: str, size: int, message: str, made: Callable[[str], Made]):
    with pytest.raises(InputError, match=message):
        load_encoder(made(name).uri, size=size)


def test_an_architecture_of_one_size_says_so():
    with pytest.raises(InputError, match="224 x 224 pixels only"):
        load_encoder("timm:levit_128s", size=192, random_init=True)


def test_positions_of_a_constant_grid_stay_constant():
    rows = torch.cat([torch.full((1, 4), 7.0), torch.ones(16, 4)])
    new = resample(rows, (4, 4), (6, 5), prefix=1, antialias=True)
    torch.testing.assert_close(new.data, torch.cat([torch.full((1, 4), 7.0), torch.ones(30, 4)]))
    ramp = torch.arange(4.0).repeat_interleave(4)[:, None]  # grows from row to row
    tall = resample(ramp, (4, 4), (8, 4), prefix=0, antialias=False).data.reshape(8, 4)
    assert torch.equal(tall, tall[:, :1].expand(8, 4))
    assert (tall[1:, 0] > tall[:-1, 0]).all()


# ---------------------------------------------------------------------------------------------------------- preprocess

HALF, IMAGENET, OPENAI = (0.5,) * 3, (0.485, 0.456, 0.406), (0.48145466, 0.4578275, 0.40821073)


@pytest.mark.parametrize(
    ("name", "size", "mean", "interpolation", "crop", "crop_pct"),
    [
        ("timm:test_vit", (160, 160), HALF, "bicubic", "crop", 0.95),
        ("open_clip:vit", (32, 32), OPENAI, "bicubic", "crop", 1.0),
        ("transformers:clip", (32, 32), OPENAI, "bicubic", "crop", 32 / 36),
        ("transformers:siglip", (32, 32), HALF, "bicubic", "squash", 1.0),
        ("transformers:siglip2", (32, 32), HALF, "bilinear", "squash", 1.0),
        ("transformers:vit", (32, 32), HALF, "bilinear", "squash", 1.0),
        ("transformers:dinov2", (32, 32), OPENAI, "bicubic", "crop", 32 / 40),
    ],
)
def test_preprocess_is_what_the_library_says(
    name: str,
    size: tuple[int, int],
    mean: tuple[float, ...],
    interpolation: str,
    crop: str,
    crop_pct: float,
    made: Callable[[str], Made],
):
    found = load_encoder(made(name).uri).preprocess
    assert (found.size, found.mean, found.interpolation, found.crop) == (size, pytest.approx(mean), interpolation, crop)
    assert found.crop_pct == pytest.approx(crop_pct)
    padded = load_encoder(made(name).uri, crop="pad").preprocess
    assert padded == dataclasses.replace(found, crop="pad")


@pytest.mark.parametrize(("mode", "crop"), from_open_clip.CROPS.items())
def test_open_clip_preprocess_of_a_folder(mode: str, crop: str, tmp_path: Path):
    uri = make_open_clip(tmp_path / "m", "vit", resize_mode=mode, mean=[0.1, 0.2, 0.3], interpolation="bilinear").uri
    found = load_encoder(uri).preprocess
    assert (found.crop, found.mean, found.interpolation) == (crop, (0.1, 0.2, 0.3), "bilinear")
    assert found.std == pytest.approx(
        (0.26862954, 0.26130258, 0.27577711)
    )  # not said in the folder: open_clip's default


def test_open_clip_weights_from_elsewhere_get_the_preprocessing_of_their_name(caplog: pytest.LogCaptureFixture):
    _, siglip = from_open_clip._named("ViT-B-16-SigLIP-384")
    assert (tuple(siglip["mean"]), siglip["resize_mode"]) == (HALF, "squash")
    assert not caplog.records
    from_open_clip._named("ViT-L-14")  # published with OpenAI's and with Inception's mean
    assert "more than one preprocessing" in caplog.text


def test_quickgelu_is_taken_from_the_tag():
    hub = weights.Hub(None)
    assert from_open_clip._tagged("ViT-B-32/openai", hub, False).config["quick_gelu"] is True
    assert not from_open_clip._tagged("ViT-B-32/laion2b_s34b_b79k", hub, False).config.get("quick_gelu", False)
    import open_clip

    assert not open_clip.get_model_config("ViT-B-32").get("quick_gelu", False)  # its own table is left alone


def test_transformers_without_a_preprocessor_config_says_so(
    made: Callable[[str], Made], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    import shutil

    source = Path(made("transformers:vit").uri.partition(":")[2])
    shutil.copytree(source, tmp_path / "m")
    (tmp_path / "m" / "preprocessor_config.json").unlink()
    found = load_encoder(f"transformers:{tmp_path / 'm'}").preprocess
    assert found == load_encoder(made("transformers:vit").uri).preprocess
    assert "no preprocessor_config.json" in caplog.text


def test_transformers_shows_no_bar_over_weights_and_keeps_its_own_setting(
    made: Callable[[str], Made], capfd: pytest.CaptureFixture[str]
):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    uri = made("transformers:vit").uri
    capfd.readouterr()
    load_encoder(uri)
    assert "it/s" not in capfd.readouterr().err
    assert (logging.is_progress_bar_enabled(), are_progress_bars_disabled()) == before


# ------------------------------------------------------------------------------------------------------------- weights


def test_random_weights_have_to_be_asked_for_and_are_said():
    torch.manual_seed(0)
    first = load_encoder("timm:test_vit", random_init=True)
    assert first.source == "timm:test_vit (random weights)"
    assert first.licence is None
    second = load_encoder("timm:test_vit", random_init=True)
    assert first.fingerprint() != second.fingerprint()
    torch.manual_seed(0)
    assert load_encoder("timm:test_vit", random_init=True).fingerprint() == first.fingerprint()


def test_loading_weights_leaves_the_random_numbers_alone(made: Callable[[str], Made]):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    load_encoder(made("timm:test_vit").uri)
    assert torch.equal(torch.rand(3), expected)


@torch.no_grad()
def test_timm_drops_all_of_a_head_that_is_more_than_a_layer(tmp_path: Path):
    import timm

    model = timm.create_model("shvit_s1", num_classes=5).eval()  # its classifier is head.l, next to head.bn
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    encoder = load_encoder(f"timm:shvit_s1@{tmp_path / 'w.safetensors'}")
    x = images(encoder)
    torch.testing.assert_close(encoder(x), model.forward_features(x).mean((2, 3)))


@pytest.mark.parametrize(
    "name", ["timm:test_vit", "timm:test_vit3", "open_clip:vit", "open_clip:eva", "transformers:clip"]
)
def test_a_loaded_encoder_can_be_trained(name: str, made: Callable[[str], Made]):
    encoder = load_encoder(made(name).uri)
    assert all(p.requires_grad for p in encoder.parameters())
    encoder(images(encoder)).square().sum().backward()
    first = encoder.model.get_submodule(encoder.anatomy.image.blocks[0])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in first.parameters())


@pytest.mark.parametrize("wrap", ["state_dict", "state_dict_ema", "model", None])
def test_timm_reads_checkpoints_of_trainers(wrap: str | None, made: Callable[[str], Made], tmp_path: Path):
    file = made("timm:test_vit").uri.partition("@")[2]
    state = {f"module.{key}": value for key, value in load_file(file).items()}
    torch.save(state if wrap is None else {"epoch": 3, wrap: state}, tmp_path / "last.pth")
    encoder = load_encoder(f"timm:test_vit@{tmp_path / 'last.pth'}")
    plain = load_encoder(made("timm:test_vit").uri)
    assert encoder.fingerprint() == plain.fingerprint()


def test_timm_resamples_a_checkpoint_of_another_size(tmp_path: Path):
    import timm

    other = timm.create_model("test_vit", img_size=96).eval()
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    encoder = load_encoder(f"timm:test_vit@{tmp_path / 'w.safetensors'}")
    assert encoder.preprocess.size == (160, 160)
    assert torch.equal(encoder.model.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    assert encoder(images(encoder)).shape == (3, 64)


def test_open_clip_file_and_folder_without_a_config(
    made: Callable[[str], Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import open_clip
    from open_clip import factory

    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", OPEN_CLIP["vit"])
    source = Path(made("open_clip:vit").uri.removeprefix("open_clip:local-dir:"))
    expected = load_encoder(made("open_clip:vit").uri)
    state = load_file(source / "open_clip_model.safetensors")
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "epoch_1.pt"
    )
    assert "tiny" in open_clip.list_models()
    for place in (source / "open_clip_model.safetensors", tmp_path / "epoch_1.pt", tmp_path):
        encoder = load_encoder(f"open_clip:tiny@{place}")
        assert encoder.fingerprint() == expected.fingerprint()
    (tmp_path / "epoch_2.pt").write_bytes(b"")
    with pytest.raises(InputError, match="should hold one file of weights"):
        load_encoder(f"open_clip:tiny@{tmp_path}")
    random = load_encoder("open_clip:tiny", random_init=True)
    assert random.source.endswith("(random weights)")
    assert random.encode_text(TEXTS).shape == (4, 24)


def test_transformers_in_half_precision_is_computed_in_float32(made: Callable[[str], Made], tmp_path: Path):
    import transformers as hf

    model = hf.AutoModel.from_pretrained(made("transformers:dinov2").uri.partition(":")[2], dtype=torch.float16)
    model.save_pretrained(tmp_path / "half")
    encoder = load_encoder(f"transformers:{tmp_path / 'half'}")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    again = load_encoder(encoder.save(tmp_path / "saved"))
    assert {p.dtype for p in again.parameters()} == {torch.float32}


# ----------------------------------------------------------------------------------------------------- the Hub's cache


def put_into_cache(cache: Path, repository: str, files: Path) -> None:
    """As the Hub's client lays it out."""
    import shutil

    home = cache / ("models--" + repository.replace("/", "--"))
    shutil.copytree(files, home / "snapshots" / ("0" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)


def test_what_is_in_the_cache_needs_no_network(made: Callable[[str], Made], tmp_path: Path):
    import timm

    torch.manual_seed(5)
    model = timm.create_model("test_vit").eval()
    (tmp_path / "timm").mkdir()
    save_file(model.state_dict(), tmp_path / "timm" / "model.safetensors")
    cache = tmp_path / "cache"
    put_into_cache(cache, "timm/test_vit.r160_in1k", tmp_path / "timm")
    put_into_cache(cache, "org/clip", Path(made("open_clip:vit").uri.removeprefix("open_clip:local-dir:")))
    put_into_cache(cache, "org/siglip", Path(made("transformers:siglip").uri.removeprefix("transformers:")))

    encoder = load_encoder("timm:test_vit.r160_in1k", cache_dir=cache)
    assert encoder.licence == "apache-2.0"
    x = images(encoder)
    torch.testing.assert_close(encoder(x), model.forward_head(model.forward_features(x), pre_logits=True))
    clip = load_encoder("open_clip:hf-hub:org/clip", cache_dir=cache)
    assert clip.fingerprint() == load_encoder(made("open_clip:vit").uri).fingerprint()
    siglip = load_encoder("transformers:org/siglip", cache_dir=cache)
    same = load_encoder(made("transformers:siglip").uri)
    assert siglip.fingerprint() == same.fingerprint()
    assert torch.equal(siglip.encode_text(TEXTS), same.encode_text(TEXTS))


@pytest.mark.parametrize(
    ("uri", "what", "instead"),
    [
        (
            "timm:vit_tiny_patch16_224",
            "model.safetensors of timm/vit_tiny_patch16_224",
            "timm:vit_tiny_patch16_224@FILE",
        ),
        ("timm:gcvit_xxtiny.in1k", "gcvit_xxtiny_224", "timm:gcvit_xxtiny.in1k@FILE"),
        ("open_clip:ViT-S-32-alt/none", "no weights", "open_clip:ViT-S-32-alt@FILE"),
        ("open_clip:hf-hub:nobody/nothing", "open_clip_config.json of nobody/nothing", "open_clip:local-dir:FOLDER"),
        ("transformers:nobody/nothing", "the model nobody/nothing", "transformers:FOLDER"),
    ],
)
def test_without_a_network_the_message_says_what_to_fetch(
    uri: str, what: str, instead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(url: str, file: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    with pytest.raises(InputError) as caught:
        load_encoder(uri, cache_dir=tmp_path / "cache")
    assert what in str(caught.value)
    assert instead in str(caught.value)


def test_open_clip_downloads_the_file_of_the_tag(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked: list[tuple[str, tuple[str, ...]]] = []

    def file(self: weights.Hub, repository: str, names: tuple[str, ...], instead: str) -> Path:
        asked.append((repository, tuple(names)))
        return tmp_path

    monkeypatch.setattr(weights.Hub, "file", file)
    hub = weights.Hub(tmp_path)
    for uri in ("ViT-B-16/datacomp_xl_s13b_b90k", "ViTamin-S-LTT/datacomp1b", "ViT-B-32/OpenAI"):
        from_open_clip._tagged(uri, hub, False).weights()
    assert asked[0] == ("laion/CLIP-ViT-B-16-DataComp.XL-s13B-b90K", from_open_clip.WEIGHT_FILES)
    assert asked[1] == ("jienengchen/ViTamin-S-LTT", ("pytorch_model.safetensors", "pytorch_model.bin"))
    assert asked[2][0] == "timm/vit_base_patch32_clip_224.openai"


# ------------------------------------------------------------------------------------------------------------ licences


@pytest.mark.parametrize(
    ("uri", "licence"),
    [
        ("open_clip:ViT-B-16/openai", "mit"),
        ("open_clip:ViT-B-16/datacomp_xl_s13b_b90k", "mit"),
        ("open_clip:ViT-B-16-SigLIP2/webli", "apache-2.0"),
        ("open_clip:ViT-H-14-quickgelu/metaclip_fullcc", "cc-by-nc-4.0"),
        ("open_clip:ViT-H-14-378-quickgelu/dfn5b", "apple-ascl"),
        ("open_clip:MobileCLIP2-S0/dfndr2b", "apple-amlr"),
        ("transformers:openai/clip-vit-base-patch32", "mit"),
        ("transformers:google/siglip2-base-patch16-224", "apache-2.0"),
        ("transformers:someone/else", None),
    ],
)
def test_licences_of_well_known_weights(uri: str, licence: str | None):
    assert weights.known_licence(uri) == licence


def test_the_licence_is_said_before_the_download(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="vicinal")
    with pytest.raises(InputError):
        load_encoder("timm:vit_small_patch16_dinov3.lvd1689m", cache_dir=tmp_path)
    assert "dinov3-license" in caplog.text
    assert any(record.levelno == logging.WARNING for record in caplog.records)
    caplog.clear()
    with pytest.raises(InputError):
        load_encoder("timm:vit_tiny_patch16_224", cache_dir=tmp_path)
    assert "apache-2.0" in caplog.text
    assert all(record.levelno == logging.INFO for record in caplog.records)


def test_the_licence_of_a_folder_stands_in_its_card(made: Callable[[str], Made], tmp_path: Path):
    import shutil

    shutil.copytree(made("transformers:vit").uri.partition(":")[2], tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("---\ntags: [x]\nlicense: cc-by-4.0\n---\n# A model\nlicense: no\n")
    encoder = load_encoder(f"transformers:{tmp_path / 'm'}")
    assert encoder.licence == "cc-by-4.0"
    assert load_encoder(encoder.save(tmp_path / "saved")).licence == "cc-by-4.0"


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("timm:vit_tiny_patch16_242", r"no model 'vit_tiny_patch16_242'.*nearest: vit_tiny_patch16_224"),
        ("timm:vit_tiny_patch16_224.nope", r"no weights 'nope'.*there are .*augreg_in21k"),
        ("timm:test_vit4@{tmp}/nothing.safetensors", "no file of weights"),
        ("timm:resnet14t", "no weights|does not answer|publishes"),
        ("open_clip:ViT-B-16", r"which weights\?.*openai.*random_init"),
        ("open_clip:ViT-B-16/datacomp_xl_s13b_b90", r"nearest: datacomp_xl_s13b_b90k"),
        ("open_clip:ViT-B-61/openai", "nearest: ViT-B-16"),
        ("open_clip:ViT-B-16@{tmp}/nothing.pt", "no file of weights"),
        ("open_clip:local-dir:{tmp}/nothing", "no folder"),
        ("open_clip:local-dir:{tmp}", "no open_clip_config.json"),
        ("open_clip:NotAModel@{tmp}", "no model 'NotAModel'"),
        ("transformers:{tmp}/nothing", "no folder"),
        ("transformers:{tmp}", "cannot be read"),
        ("opne_clip:ViT-B-16/openai", "did you mean open_clip:"),
        ("vit_tiny_patch16_224", "write timm:vit_tiny_patch16_224"),
        ("{tmp}", "without vicinal.json"),
        ("{tmp}/nothing", "no folder"),
        ("{tmp}/file.pt", "say what architecture"),
        ("timm:", "names no model"),
    ],
)
def test_what_is_not_there_is_an_error_with_the_mend(uri: str, message: str, tmp_path: Path):
    (tmp_path / "file.pt").write_bytes(b"x")
    with pytest.raises(InputError, match=message):
        load_encoder(uri.format(tmp=tmp_path), cache_dir=tmp_path / "cache")


def test_folders_of_the_libraries_name_the_right_uri(made: Callable[[str], Made]):
    for name, message in (("open_clip:vit", "write open_clip:local-dir:"), ("transformers:vit", "write transformers:")):
        folder = made(name).uri.rpartition(":")[2]
        with pytest.raises(InputError, match=message):
            load_encoder(folder)


def test_a_crop_that_does_not_exist():
    with pytest.raises(InputError, match="nearest: squash"):
        load_encoder("timm:test_vit", crop="sqash", random_init=True)


def test_another_type_of_transformers_is_refused(tmp_path: Path):
    save_bert(tmp_path)
    with pytest.raises(InputError, match=r"'bert'.*clip.*siglip.*dinov2.*vit"):
        load_encoder(f"transformers:{tmp_path}")


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        *((name, fault) for name in ("timm:test_vit", "open_clip:vit") for fault in ("missing", "unknown", "shape")),
        *(("transformers:dinov2", fault) for fault in ("missing", "shape")),  # it leaves out other models' heads
    ],
)
def test_weights_that_do_not_fit_are_listed(name: str, fault: str, made: Callable[[str], Made], tmp_path: Path):
    import shutil

    origin = Path(made(name).uri.rpartition("@")[2].rpartition(":")[2])
    origin = origin.parent if origin.is_file() else origin
    shutil.copytree(origin, tmp_path / "m")
    uri = made(name).uri.replace(str(origin), str(tmp_path / "m"))
    (file,) = (tmp_path / "m").glob("*.safetensors")
    state = load_file(file)
    key = max((key for key in state if key.endswith(("mlp.fc1.weight", "c_fc.weight"))), key=len)
    if fault == "missing":
        del state[key]
    elif fault == "unknown":
        state[f"{key}.extra"] = torch.zeros(1)
    else:
        state[key] = state[key][:-1].clone()
    save_file(state, file, {"format": "pt"})
    with pytest.raises(InputError, match=key.replace(".", r"\.")):
        load_encoder(uri)


def test_a_file_with_code_in_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from open_clip import factory

    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", OPEN_CLIP["vit"])

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Evil()}, tmp_path / "evil.pth")
    for uri in (f"timm:test_vit@{tmp_path / 'evil.pth'}", f"open_clip:tiny@{tmp_path / 'evil.pth'}"):
        with pytest.raises(InputError, match="refused"):
            load_encoder(uri)
    assert not (tmp_path / "ran").exists()


def test_half_a_file_is_refused(made: Callable[[str], Made], tmp_path: Path):
    whole = Path(made("timm:test_vit").uri.partition("@")[2]).read_bytes()
    (tmp_path / "half.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_encoder(f"timm:test_vit@{tmp_path / 'half.safetensors'}")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(InputError, match="holds no state_dict"):
        load_encoder(f"timm:test_vit@{tmp_path / 'tensor.pth'}")


# ---------------------------------------------------------------------------------------------------------- tokenizers


def test_a_missing_tokenizer_stops_texts_not_images(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    uri = make_open_clip(tmp_path / "m", "siglip").uri
    for file in (tmp_path / "m").glob("tokenizer*"):
        file.unlink()
    encoder = load_encoder(uri)
    assert "nobody/tiny" in caplog.text
    for one in (encoder, load_encoder(encoder.save(tmp_path / "saved"))):
        assert one(images(one)).shape == (3, 96)
        with pytest.raises(InputError, match="the tokenizer of nobody/tiny could not be loaded"):
            one.encode_text(TEXTS)
        with pytest.raises(InputError, match="tokenizer"):
            one.token_lengths(TEXTS)


@pytest.mark.parametrize("name", [name for name in MADE if name.startswith(("open_clip:", "transformers:"))])
def test_lengths_before_the_cut(name: str, made: Callable[[str], Made]):
    encoder = load_encoder(made(name).uri)
    if encoder.tokenizer is None:
        return
    tokens = encoder.tokenize(TEXTS)
    assert tokens.shape == (4, 12)
    assert tokens.dtype == torch.int64
    lengths = encoder.token_lengths(TEXTS)
    assert lengths[1] < lengths[0] < 12 < lengths[2]
    assert encoder.tokenize([]).shape == (0, 12)
    assert encoder.token_lengths([]) == []
    pad = tokens[3, -1]
    for row, length in zip(tokens[:2], lengths[:2], strict=True):  # what is counted is what is not padding
        assert (row[length:] == pad).all()
        assert (row[:length] != pad).all()


def test_a_long_text_gives_the_same_tokens_every_time():
    config = {"context_length": 8, "tokenizer_kwargs": {"reduction_mask": "simple"}}  # CLIPA's: a random window
    tokenizer = from_open_clip._tokenizer(config, weights.Hub(None), None)
    first = tokenizer([TEXTS[2]])
    assert all(torch.equal(tokenizer([TEXTS[2]]), first) for _ in range(10))


# ----------------------------------------------------------------------------------------------------------- real data


@torch.no_grad()
def test_real_weights_at_other_sizes_see_the_same_pictures(real_data: Path):
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor

    uri = f"timm:vit_tiny_patch16_224@{real_data / 'weights' / 'vit_tiny_patch16_224.safetensors'}"
    files = sorted((real_data / "grocery").rglob("*.jpg"))[::400][:8]
    assert len(files) == 8
    pictures = [pil_to_tensor(Image.open(file).convert("RGB"))[None].float() / 255 for file in files]

    def embeddings(size: int) -> Tensor:
        encoder = load_encoder(uri, size=size)
        sized = [F.interpolate(x, (size, size), mode="bicubic", antialias=True) for x in pictures]
        return F.normalize(encoder(torch.cat(sized).sub(0.5).div(0.5)), dim=1)

    native = embeddings(224)
    for size in (160, 288):
        similarity = embeddings(size) @ native.T
        assert similarity.diagonal().mean() > 0.8
        assert torch.equal(similarity.argmax(1), torch.arange(8))  # nearest to itself, among all
