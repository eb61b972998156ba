"""timm: `NAME`, `NAME.TAG`, `NAME@WEIGHTS`. Image towers; the classifier is left out.

Input sizes: as timm's `set_input_size` does (bicubic, antialiased); convolutional networks take any.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from vicinal.models.anatomy import check_divides, find_tower, has_weights, submodule, with_weights
from vicinal.models.encoder import Anatomy, Family, Tower
from vicinal.models.prompts import Halves
from vicinal.models.weights import Crop, Found, Hub, load_strictly, misfit, mismatches, nearest, read_weights
from vicinal.types import InputError, Preprocess

__all__ = ["CROPS", "TIMM", "build", "find", "timm_anatomy", "timm_halves", "timm_resize"]

CROPS: dict[str, Crop] = {"center": "crop", "squash": "squash", "border": "pad"}
"""timm's word -> ours."""


def find(rest: str, uri: str, hub: Hub, random_init: bool) -> Found:
    """What a uri of timm leads to."""
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    name, _, file = rest.partition("@")
    _check_name(name)
    table = get_pretrained_cfg(name)
    published = {} if table is None else table.to_dict()
    data = resolve_data_config(pretrained_cfg=published or {"input_size": (3, 224, 224)})
    licence = None if file or random_init else published.get("license")
    if random_init:
        load = None
    elif file:
        load = _weights(lambda: read_weights(Path(file).expanduser()), uri)
    elif not (published.get("hf_hub_id") or published.get("url")):
        raise InputError(
            f"timm publishes no weights for {name}; use timm:{name}@FILE with your own, or random_init to have none"
        )
    else:
        load = _weights(lambda: _download(published, hub, name), uri)
    preprocess = Preprocess(
        size=tuple(data["input_size"][1:]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        crop=CROPS[data["crop_mode"]],
        crop_pct=data["crop_pct"],
    )
    return Found({"family": "timm", "name": name, "size": None}, preprocess, load, licence=licence)


def _check_name(name: str) -> None:
    import timm
    from timm.models import list_pretrained

    architecture, _, tag = name.partition(".")
    if not architecture or not timm.is_model(architecture):
        known = timm.list_models()
        raise InputError(f"timm has no model {architecture!r}{nearest(architecture, known)}; it has {len(known)}")
    tags = [full.partition(".")[2] for full in list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise InputError(
            f"timm has no weights {tag!r} for {architecture}{nearest(tag, tags)}; there are {', '.join(tags) or 'none'}"
        )


def _download(published: Mapping[str, Any], hub: Hub, name: str) -> dict[str, Tensor]:
    """The weights that timm publishes; `published` is what its table says of them."""
    instead = f"timm:{name}@FILE"
    if published.get("hf_hub_id"):
        named = published.get("hf_hub_filename")
        names = (named,) if named else ("model.safetensors", "pytorch_model.bin")
        return read_weights(hub.file(published["hf_hub_id"], names, instead))
    return read_weights(hub.url(published["url"], instead))


def _weights(read: Callable[[], dict[str, Tensor]], uri: str) -> Callable[[nn.Module], nn.Module]:
    """Load what `read` gives, but for the classifier; what fits only after timm's own conversion is converted."""

    def load(model: nn.Module) -> nn.Module:
        state = read()
        plain = _without_classifier(model, state)
        if wrong := mismatches(model, plain):
            # position embeddings of another size, names of the original authors: what timm itself accepts
            convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # not in every module
            try:
                plain = _without_classifier(model, convert(dict(state), model)) if convert else plain
            except Exception as error:  # conversions index and reshape what they expect to find
                raise InputError(misfit(uri, wrong)) from error
        load_strictly(model, plain, uri)
        return model

    return load


def _without_classifier(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the classifier and what timm drops with it: norms and layers of the same head."""
    named = cast(Any, model).pretrained_cfg.get("classifier") or ()
    classifiers = (named,) if isinstance(named, str) else tuple(named)
    heads = tuple(f"{name.rpartition('.')[0]}." for name in classifiers if "." in name)
    own = model.state_dict()
    return {
        key: value
        for key, value in state.items()
        if not key.startswith(tuple(f"{name}." for name in classifiers)) and (key in own or not key.startswith(heads))
    }


def build(architecture: Mapping[str, Any]) -> tuple[nn.Module, Family, Anatomy]:
    """The module without a classifier, at its native input size."""
    import timm

    model = timm.create_model(architecture["name"], pretrained=False, num_classes=0)
    return model, TIMM, timm_anatomy(model, "")


def timm_anatomy(trunk: nn.Module, prefix: str) -> Anatomy:
    """Of a timm model that stands at `prefix` of a larger one, "" if it is all."""
    parts = dict(trunk.named_modules())
    norm = next((name for name in ("norm", "fc_norm", "head.norm") if has_weights(trunk, name)), None)
    tower = find_tower(trunk, "", norm)
    first = cast(Any, trunk).pretrained_cfg.get("first_conv") or ""
    stem = "patch_embed" if "patch_embed" in parts else first if isinstance(first, str) else first[0]
    pool = parts.get("global_pool", parts.get("head.global_pool"))  # a module, or a word, or nothing
    word = getattr(trunk, "global_pool", "") if pool is None else getattr(pool, "pool_type", "avg")
    head = ("head",) if isinstance(parts.get("head"), nn.Linear) else ("head.fc",)  # open_clip may project with it
    return Anatomy(
        patch_embed=prefix + stem,
        image=Tower(
            tuple(prefix + name for name in tower.blocks),
            tower.attention,
            tower.mlp,
            None if tower.norm is None else prefix + tower.norm,
        ),
        pool=word if isinstance(word, str) and word else "none",
        heads=tuple(prefix + name for name in with_weights(trunk, "attn_pool", *head)),
    )


def _encode_image(model: nn.Module, images: Tensor) -> Tensor:
    return cast(Tensor, model(images))


def timm_resize(model: nn.Module, size: tuple[int, int]) -> bool:
    """Make a model of timm take another input size, in place. Always True, see `Family`.

    Raises:
        InputError: its architecture cannot, or its patches do not divide the size.
    """
    trunk = cast(Any, model)
    embed = submodule(model, "patch_embed")
    patch = getattr(embed, "patch_size", None)  # convolutional stems have none
    if patch is not None:
        check_divides(size, patch)
    if hasattr(trunk, "set_input_size"):  # timm's transformers with absolute positions or windows
        trunk.set_input_size(img_size=size)
    elif trunk.pretrained_cfg.get("fixed_input_size", False):
        native = trunk.pretrained_cfg["input_size"][1:]
        raise InputError(f"this architecture of timm takes images of {native[0]} x {native[1]} pixels only")
    return True


def timm_halves(model: nn.Module) -> Halves | None:
    """Of the plain vision transformers, and of those with rotary positions (EVA-02, DINOv3); None for others."""
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    vit = cast(Any, model)
    if isinstance(model, VisionTransformer):
        return Halves(
            lambda images: vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images)))),
            lambda block, tokens, prompts: block(tokens),
            lambda tokens: vit.forward_head(vit.norm(tokens)),
        )
    mixed = getattr(model, "rope_mixed", False)  # earlier versions of timm have none that differ from block to block
    if not isinstance(model, Eva) or mixed or vit.patch_drop is not None:
        return None
    angles = None if vit.rope is None else vit.rope.get_embed(shape=vit.patch_embed.grid_size)

    def turned(block: nn.Module, tokens: Tensor, prompts: int) -> Tensor:
        attention = cast(Any, block).attn
        attention.num_prefix_tokens += prompts  # prompts have no place in the image: they are not turned
        try:
            return cast(Tensor, block(tokens, rope=angles))
        finally:
            attention.num_prefix_tokens -= prompts

    return Halves(
        lambda images: vit.norm_pre(vit._pos_embed(vit.patch_embed(images))[0]),
        turned,
        lambda tokens: vit.forward_head(vit.norm(tokens)),
    )


TIMM = Family("timm", _encode_image, None, timm_resize, timm_halves)
