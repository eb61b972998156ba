"""CLIP and SigLIP in the layout of another library: open_clip <-> transformers, weights and configuration.

    open_clip                        transformers
    attn.in_proj_weight   "3W W"     self_attn.q_proj.weight, k_proj, v_proj    "W W" each, one below the other
    visual.proj           "W D"      visual_projection.weight                   "D W", transposed
    text_projection       "W D"      text_projection.weight                     "D W", transposed
    visual.trunk.attn_pool.q, kv     vision_model.head.attention.in_proj        SigLIP: a timm tower with a pooling

All else is another name for the same tensor. What one library computes and the other does not is refused here, with
the reason; the caller says which formats remain.

Letters: W width of a tower, D numbers an embedding, i number of a block.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vicinal.types import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["clip_to_open_clip", "open_clip_to_transformers"]

_CLIP: tuple[tuple[str, str], ...] = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.weight", "visual.conv1.weight"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
    ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.final_layer_norm.", "ln_final."),
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("logit_scale", "logit_scale"),
)
"""Names that begin so in transformers -> in open_clip."""

_BLOCK: tuple[tuple[str, str], ...] = (
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
)
"""Within a block of open_clip's own transformer."""

_SIGLIP: tuple[tuple[str, str], ...] = (
    ("vision_model.embeddings.patch_embedding.", "visual.trunk.patch_embed.proj."),
    ("vision_model.post_layernorm.", "visual.trunk.norm."),
    ("vision_model.encoder.layers.", "visual.trunk.blocks."),
    ("vision_model.head.layernorm.", "visual.trunk.attn_pool.norm."),
    ("vision_model.head.mlp.", "visual.trunk.attn_pool.mlp."),
    ("vision_model.head.attention.out_proj.", "visual.trunk.attn_pool.proj."),
    ("text_model.embeddings.token_embedding.weight", "text.token_embedding.weight"),
    ("text_model.embeddings.position_embedding.weight", "text.positional_embedding"),
    ("text_model.final_layer_norm.", "text.ln_final."),
    ("text_model.encoder.layers.", "text.transformer.resblocks."),
    ("text_model.head.", "text.text_projection."),
)
"""The same for SigLIP, whose image tower is timm's in open_clip."""

_TRUNK: tuple[tuple[str, str], ...] = (
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.out_proj.", ".attn.proj."),
)
"""Within a block of timm's."""

_ACTIVATIONS = {"gelu": {}, "gelu_pytorch_tanh": {"approximate": "tanh"}}
"""transformers' word -> `act_kwargs` of open_clip, where the activation is torch's GELU."""


def clip_to_open_clip(model: nn.Module, image_size: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A CLIPModel of transformers -> `model_cfg` of open_clip and the state of its `CLIP`.

    Args:
        model: merged, plain.
        image_size: height and width of the images, in pixels.

    Raises:
        InputError: the reason why open_clip has no such model.
    """
    config = cast(Any, model).config
    vision, text = config.vision_config, config.text_config
    acts = {vision.hidden_act, text.hidden_act}
    quick = acts == {"quick_gelu"}
    if not quick and acts - set(_ACTIVATIONS):
        raise InputError(f"open_clip has no model with the activations {' and '.join(sorted(acts))}")
    vocabulary = cast(Any, model).text_model.embeddings.token_embedding.weight.shape[0]
    highest = text.eos_token_id in (2, vocabulary - 1)  # 2 stands in old files of OpenAI's: transformers takes argmax
    model_cfg: dict[str, Any] = {
        "embed_dim": config.projection_dim,
        "quick_gelu": quick,
        "vision_cfg": {
            "image_size": image_size,
            "patch_size": vision.patch_size,
            "head_width": vision.hidden_size // vision.num_attention_heads,
            **_tower(vision, quick),
        },
        "text_cfg": {
            "context_length": text.max_position_embeddings,
            "vocab_size": vocabulary,
            "heads": text.num_attention_heads,
            **({} if highest else {"pool_type": "eos", "eos_id": text.eos_token_id}),
            **_tower(text, quick),
        },
    }
    state: dict[str, Tensor] = {}
    given = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, tensor in given.items():
        if name.endswith(("visual_projection.weight", "text_projection.weight")):
            state["visual.proj" if name.startswith("visual") else "text_projection"] = tensor.T.contiguous()
        elif ".self_attn.q_proj." in name:
            parts = [given[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            fused = name.replace(".self_attn.q_proj.", ".attn.in_proj_")
            state[_renamed(fused, _CLIP, _BLOCK)] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]_proj\.|\.position_ids$", name):
            state[_renamed(name, _CLIP, _BLOCK)] = tensor
    return model_cfg, state


def _tower(config: PretrainedConfig, quick: bool) -> dict[str, Any]:
    width, inner = config.hidden_size, config.intermediate_size
    ratio = inner / width
    if int(width * ratio) != inner:  # open_clip rounds down
        ratio = math.nextafter(ratio, math.inf)
    act = {} if quick else _ACTIVATIONS[config.hidden_act]
    return {
        "width": width,
        "layers": config.num_hidden_layers,
        "mlp_ratio": ratio,
        **({"act_kwargs": act} if act else {}),
        **({} if config.layer_norm_eps == 1e-5 else {"norm_kwargs": {"eps": config.layer_norm_eps}}),
    }


def _renamed(name: str, *tables: tuple[tuple[str, str], ...]) -> str:
    """Each table's first fit, from its left to its right."""
    for table in tables:
        for old, new in table:
            if name.startswith(old) or (old.startswith(".") and old in name):
                name = name.replace(old, new, 1)
                break
    return name


def _turned(table: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    return tuple((right, left) for left, right in table)


def open_clip_to_transformers(
    model: nn.Module, config: Mapping[str, Any], image_size: int, special: Mapping[str, int]
) -> PreTrainedModel:
    """A CLIP or SigLIP of open_clip -> a CLIPModel or SiglipModel of transformers, with its weights.

    Args:
        model: merged, plain.
        config: its `model_cfg`.
        image_size: height and width of the images, in pixels.
        special: ids of the tokenizer's start, end and padding: `bos_token_id`, `eos_token_id`, `pad_token_id`.

    Raises:
        InputError: the reason why transformers has no such model.
    """
    import open_clip

    clip = cast(Any, model)
    visual = clip.visual
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return _to_clip(clip, image_size, special)
    if "siglip" in str(config["vision_cfg"].get("timm_model_name")) and hasattr(visual, "trunk"):
        return _to_siglip(clip, image_size, special)
    kind = config["vision_cfg"].get("timm_model_name") or type(visual).__name__
    raise InputError(f"transformers has no CLIP with the image tower {kind}")


def _to_clip(model: nn.Module, image_size: int, special: Mapping[str, int]) -> PreTrainedModel:
    import transformers
    from open_clip.transformer import TextTransformer

    clip = cast(Any, model)
    text = clip.text if "text" in clip._modules else clip  # CustomTextCLIP keeps its text tower apart
    visual = clip.visual
    if text is not clip and not isinstance(text, TextTransformer):
        raise InputError("transformers' CLIP has a text tower of its own, not one of another model")
    pool = text.pool_type if text is not clip else clip.text_pool_type
    end = text.eos_id if text is not clip else clip.text_eos_id
    vocabulary = text.token_embedding.weight.shape[0]
    if pool == "argmax":
        end = vocabulary - 1
    odd = [
        said
        for said, here in (
            ("pools its patches instead of taking the class token", visual.pool_type != "tok"),
            ("pools its patches by attention", visual.attn_pool is not None),
            ("has no norm before its blocks", isinstance(visual.ln_pre, nn.Identity)),
            (f"takes the text's {pool} token", pool not in ("argmax", "eos")),
            ("has no causal mask in its text tower", text.attn_mask is None),
            ("has a class token in its text tower", text is not clip and text.cls_emb is not None),
            ("hides the padding of its texts", text is not clip and text.use_pad_mask),
            ("has no plain projection of the text", not isinstance(text.text_projection, (nn.Parameter, Tensor))),
        )
        if here
    ]
    if odd:
        raise InputError(f"this model {odd[0]}, which transformers' CLIP does not")
    towers = {
        "vision_config": {
            **_tower_config(visual.transformer.resblocks, "c_fc", "gelu"),
            "image_size": image_size,
            "patch_size": _square(visual.patch_size),
        },
        "text_config": {
            **_tower_config(text.transformer.resblocks, "c_fc", "gelu"),
            "vocab_size": vocabulary,
            "max_position_embeddings": text.positional_embedding.shape[0],
            **special,
            "eos_token_id": end,
        },
    }
    config = transformers.CLIPConfig(**towers, projection_dim=visual.proj.shape[1])
    given = {name.removeprefix("text."): tensor.detach() for name, tensor in clip.state_dict().items()}
    state: dict[str, Tensor] = {}
    for name, tensor in given.items():
        if name in ("visual.proj", "text_projection"):
            state["visual_projection.weight" if name.startswith("visual") else f"{name}.weight"] = tensor.T.contiguous()
        elif ".attn.in_proj_" in name:
            _split(state, _renamed(name, _turned(_CLIP)), ".attn.in_proj_", tensor)
        else:
            state[_renamed(name, _turned(_CLIP), _turned(_BLOCK))] = tensor
    return _filled(transformers.CLIPModel, config, state)


def _to_siglip(model: nn.Module, image_size: int, special: Mapping[str, int]) -> PreTrainedModel:
    import transformers

    clip = cast(Any, model)
    trunk, text = clip.visual.trunk, clip.text
    odd = [
        said
        for said, here in (
            ("pools its patches otherwise", trunk.attn_pool is None),
            ("has a class token", trunk.cls_token is not None),
            ("has a layer behind its image tower", any(True for _ in clip.visual.head.parameters())),
            (f"takes the text's {text.pool_type} token", text.pool_type != "last"),
            ("has a causal mask in its text tower", text.attn_mask is not None),
            ("has no biased projection of the text", not isinstance(text.text_projection, nn.Linear)),
            ("hides the padding of its texts", text.use_pad_mask),
            ("has no bias of its logits", clip.logit_bias is None),
        )
        if here
    ]
    if odd:
        raise InputError(f"this model {odd[0]}, which transformers' SigLIP does not")
    vision = _tower_config(trunk.blocks, "fc1", "act")
    pool = trunk.attn_pool
    if (_activation(pool.mlp.act), pool.num_heads) != (vision["hidden_act"], vision["num_attention_heads"]):
        raise InputError("the pooling of this model differs from its blocks, which that of transformers' SigLIP cannot")
    config = transformers.SiglipConfig(
        vision_config={**vision, "image_size": image_size, "patch_size": _square(trunk.patch_embed.patch_size)},
        text_config={
            **_tower_config(text.transformer.resblocks, "c_fc", "gelu"),
            "vocab_size": text.token_embedding.weight.shape[0],
            "max_position_embeddings": text.positional_embedding.shape[0],
            "projection_size": text.text_projection.weight.shape[0],
            **special,
        },
    )
    given = {name: tensor.detach() for name, tensor in clip.state_dict().items()}
    state: dict[str, Tensor] = {}
    for name, tensor in given.items():
        if name == "visual.trunk.pos_embed":
            state["vision_model.embeddings.position_embedding.weight"] = tensor[0]
        elif name == "visual.trunk.attn_pool.latent":
            state["vision_model.head.probe"] = tensor
        elif name.startswith("visual.trunk.attn_pool.q."):
            both = torch.cat([tensor, given[name.replace(".q.", ".kv.")]])
            state[f"vision_model.head.attention.in_proj_{name.rpartition('.')[2]}"] = both
        elif name.startswith("visual.trunk.attn_pool.kv."):
            continue
        elif ".attn.qkv." in name:
            _split(state, _renamed(name, _turned(_SIGLIP)), ".attn.qkv.", tensor)
        elif ".attn.in_proj_" in name:
            _split(state, _renamed(name, _turned(_SIGLIP)), ".attn.in_proj_", tensor)
        elif name in ("logit_scale", "logit_bias"):
            state[name] = tensor.reshape(1)
        else:
            state[_renamed(name, _turned(_SIGLIP), _turned(_BLOCK), _turned(_TRUNK))] = tensor
    return _filled(transformers.SiglipModel, config, state)


def _split(state: dict[str, Tensor], name: str, fused: str, tensor: Tensor) -> None:
    for part, third in zip("qkv", tensor.chunk(3), strict=True):
        state[name.replace(fused, f".self_attn.{part}_proj.")] = third.clone()


def _square(patch: Sequence[int]) -> int:
    height, width = patch
    if height != width:
        raise InputError(f"its patches are {height} x {width}, those of transformers are square")
    return int(height)


def _tower_config(blocks: nn.Sequential | nn.ModuleList, first: str, act: str) -> dict[str, Any]:
    """Read from the modules themselves, so that a default of one library cannot differ from the other's."""
    block = cast(Any, blocks[0])
    if scaled := [name for name, _ in block.named_parameters() if re.match(r"ls_?[12]\.|.*\.(q|k)_norm\.", name)]:
        raise InputError(f"its blocks have {scaled[0]}, which those of transformers lack")
    linear = getattr(block.mlp, first)
    return {
        "hidden_size": linear.in_features,
        "intermediate_size": linear.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _activation(getattr(block.mlp, act)),
        "layer_norm_eps": (block.ln_1 if hasattr(block, "ln_1") else block.norm1).eps,  # open_clip's name or timm's
    }


def _activation(module: nn.Module) -> str:
    name = type(module).__name__
    if name == "QuickGELU":
        return "quick_gelu"
    if name == "GELUTanh" or (isinstance(module, nn.GELU) and module.approximate == "tanh"):
        return "gelu_pytorch_tanh"
    if name == "GELU":
        return "gelu"
    raise InputError(f"its activation is {name}, which transformers' CLIP and SigLIP lack")


def _filled(
    kind: Callable[[PretrainedConfig], nn.Module], config: PretrainedConfig, state: Mapping[str, Tensor]
) -> PreTrainedModel:
    from vicinal.models.weights import load_strictly

    with torch.random.fork_rng(devices=[]):  # weights that are overwritten must not use up the caller's random numbers
        model = kind(config).float().eval()
    load_strictly(model, state, "this model")
    return cast("PreTrainedModel", model)
