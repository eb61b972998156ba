"""transformers: `ORG/NAME` or `FOLDER`, of CLIP, SigLIP, SigLIP 2, DINOv2, ViT.

Input sizes: square ones are resampled once, others at every call, both as `interpolate_pos_encoding` does (bicubic).
SigLIP 2 at one resolution is a "siglip"; "siglip2" is NaFlex, which here takes images all of one size.

Letters: B batch, H W height and width in pixels, T patches, C numbers of a patch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from vicinal.models.anatomy import check_divides, find_tower, pair, resample, with_weights
from vicinal.models.encoder import Anatomy, Family, Tokenizer
from vicinal.models.prompts import Halves
from vicinal.models.tokenizers import TransformersTokenizer, without_tokenizer
from vicinal.models.weights import Found, Hub, card_licence, config_json, first_line, known_licence, log, misfit
from vicinal.types import InputError, Preprocess

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["KINDS", "build", "find"]


def find(rest: str, uri: str, hub: Hub, random_init: bool) -> Found:
    """What a uri of transformers leads to."""
    import transformers

    folder = Path(rest).expanduser()
    local = folder.is_dir()
    if not local and (rest.startswith((".", "/", "~")) or rest.count("/") > 1 or folder.exists()):
        raise InputError(f"{uri}: there is no folder {rest}")
    where = str(folder) if local else rest
    options = {"cache_dir": None, "local_files_only": True} if local else hub.options()
    licence = None if random_init else card_licence(folder) if local else known_licence(uri)
    failed = (
        f"{uri} cannot be read"
        if local
        else hub.advice(f"the model {rest}", "transformers:FOLDER")
        if options["local_files_only"]
        else f"the Hub has no model {rest} that you can read"
    )
    try:
        config = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"{failed} ({first_line(error)})") from error
    if config.model_type not in KINDS:
        raise InputError(
            f"{uri} is a {config.model_type!r} of transformers; supported are {', '.join(KINDS)}. "
            "Many others are in timm or open_clip"
        )
    kind = KINDS[config.model_type]
    architecture = {"family": "transformers", "config": config_json(config), "size": None}
    preprocess = _preprocess(where, config, kind, options)
    tokenizer = None
    if kind.family.encode_text is not None:
        tokenizer = _tokenizer(where, config.text_config.max_position_embeddings, options)

    def read(model: nn.Module) -> nn.Module:
        try:
            with _without_bar():
                loaded, report = type(model).from_pretrained(  # type: ignore[attr-defined]  # a model of transformers
                    where,
                    config=config,
                    dtype=torch.float32,  # the default is what the file is in, which may be half
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # to name them below
                    **kind.options,
                    **options,
                )
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"{failed} ({first_line(error)})") from error
        wrong = [f"missing: {key}" for key in sorted(report["missing_keys"])]
        wrong += [
            f"shape: {key} is {tuple(there)} in the file, {tuple(here)} in the model"
            for key, there, here in report["mismatched_keys"]
        ]
        if wrong:
            raise InputError(misfit(uri, wrong))
        return cast(nn.Module, loaded)

    return Found(architecture, preprocess, None if random_init else read, _native_size(config), licence, tokenizer)


@contextmanager
def _without_bar() -> Iterator[None]:
    """No bar while weights are put into the model, which takes a second; that of a download stays."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    unwanted = are_progress_bars_disabled()  # by the user, for downloads
    logging.disable_progress_bar()  # both kinds
    if not unwanted:
        enable_progress_bars()
    try:
        yield
    finally:
        if not unwanted:
            logging.enable_progress_bar()


def build(architecture: Mapping[str, Any]) -> tuple[nn.Module, Family, Anatomy]:
    """The module with random weights, at the input size of its configuration."""
    import transformers

    settings = dict(architecture["config"])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    kind = KINDS[config.model_type]
    model = getattr(transformers, kind.model)(config, **kind.options).float()
    text = None if kind.text_norm is None else find_tower(model, "text_model.", kind.text_norm)
    anatomy = Anatomy(
        kind.patch_embed,
        find_tower(model, kind.image, kind.norm),
        text,
        kind.pool,
        with_weights(model, *kind.heads),
    )
    return model, kind.family, anatomy


def _native_size(config: PretrainedConfig) -> tuple[int, int] | None:
    """The size whose grid of positions the weights hold; None for NaFlex, which resamples as it runs."""
    vision = getattr(config, "vision_config", config)  # image-only models have no such part
    return None if config.model_type == "siglip2" else pair(vision.image_size)


def _preprocess(where: str, config: PretrainedConfig, kind: _Kind, options: Mapping[str, Any]) -> Preprocess:
    import transformers

    try:
        said = transformers.AutoImageProcessor.from_pretrained(where, **options).to_dict()
    except (OSError, ValueError):
        said = getattr(transformers, kind.processor)().to_dict()
        if (native := _native_size(config)) is not None:
            square = {"height": native[0], "width": native[1]}
            said["size"] = {"shortest_edge": min(native)} if said.get("do_center_crop") else square
            said["crop_size"] = square
        log.warning("%s has no preprocessor_config.json; the defaults of %s are taken", where, kind.processor)
    size = {key: value for key, value in (said.get("size") or {}).items() if value is not None}
    crop_size = {key: value for key, value in (said.get("crop_size") or {}).items() if value is not None}
    normalize = said.get("do_normalize", True)
    common: dict[str, Any] = {
        "mean": tuple(said["image_mean"]) if normalize else (0.0, 0.0, 0.0),
        "std": tuple(said["image_std"]) if normalize else (1.0, 1.0, 1.0),
        "interpolation": "bilinear" if said.get("resample") == 2 else "bicubic",  # PIL's number for it
    }
    if "max_num_patches" in said:  # NaFlex keeps the aspect ratio; here a batch is one tensor, so a square
        side = int(said["max_num_patches"] ** 0.5) * said["patch_size"]
        return Preprocess(size=(side, side), crop="squash", **common)
    if said.get("do_center_crop") and crop_size:
        target = (crop_size["height"], crop_size["width"])
        short = size.get("shortest_edge") or min(size.get("height", target[0]), size.get("width", target[1]))
        return Preprocess(size=target, crop="crop", crop_pct=min(min(target) / short, 1.0), **common)
    if "shortest_edge" in size:
        return Preprocess(size=(size["shortest_edge"],) * 2, crop="crop", **common)
    return Preprocess(size=(size["height"], size["width"]), crop="squash", **common)


def _tokenizer(where: str, context_length: int, options: Mapping[str, Any]) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError) as error:
        return without_tokenizer(where, context_length, error)
    return TransformersTokenizer(inner, context_length)


def _clip_vision(model: nn.Module, images: Tensor) -> Tensor:
    vision = cast(Any, model).vision_model
    return cast(Tensor, vision(pixel_values=images, interpolate_pos_encoding=_clip_other(vision, images)).pooler_output)


def _clip_other(vision: nn.Module, images: Tensor) -> bool:
    side = cast(Any, vision).embeddings.image_size  # of a square; any other size is resampled at every call
    return tuple(images.shape[-2:]) != (side, side)


def _clip_image(model: nn.Module, images: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, model).visual_projection(_clip_vision(model, images)))


def _clip_text(model: nn.Module, tokens: Tensor) -> Tensor:
    clip = cast(Any, model)  # padding stands behind the end token, where the causal mask hides it: no mask needed
    return cast(Tensor, clip.text_projection(clip.text_model(input_ids=tokens).pooler_output))


def _siglip_image(model: nn.Module, images: Tensor) -> Tensor:
    return _clip_vision(model, images)


def _siglip_text(model: nn.Module, tokens: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, model).text_model(input_ids=tokens).pooler_output)  # trained on padding, unmasked


def _naflex_image(model: nn.Module, images: Tensor) -> Tensor:
    vision = cast(Any, model).vision_model
    patches_BTC, shapes = _naflex_patches(vision, images)
    mask = torch.ones(patches_BTC.shape[:2], dtype=torch.int32, device=images.device)
    return cast(Tensor, vision(patches_BTC, pixel_attention_mask=mask, spatial_shapes=shapes).pooler_output)


def _naflex_patches(vision: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    B, channels, H, W = images.shape
    p = cast(Any, vision).embeddings.patch_size
    rows, columns = H // p, W // p
    patches_BTC = images.reshape(B, channels, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return patches_BTC, torch.tensor([[rows, columns]], device=images.device).expand(B, 2)


def _vit_image(model: nn.Module, images: Tensor) -> Tensor:
    vit = cast(Any, model)
    other = _vit_other(vit, images)
    return cast(Tensor, vit(pixel_values=images, interpolate_pos_encoding=other).last_hidden_state[:, 0])


def _vit_other(vit: nn.Module, images: Tensor) -> bool:
    return tuple(images.shape[-2:]) != pair(cast(Any, vit).embeddings.patch_embeddings.image_size)


def _dino_image(model: nn.Module, images: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, model)(pixel_values=images).last_hidden_state[:, 0])


def _clip_halves(model: nn.Module) -> Halves:
    clip = cast(Any, model)
    vision = clip.vision_model

    def tokens(images: Tensor) -> Tensor:
        embedded = vision.embeddings(images, interpolate_pos_encoding=_clip_other(vision, images))
        return cast(Tensor, vision.pre_layrnorm(embedded))

    return Halves(tokens, _masked_block, lambda tokens: clip.visual_projection(vision.post_layernorm(tokens[:, 0])))


def _siglip_halves(model: nn.Module) -> Halves:
    vision = cast(Any, model).vision_model

    def tokens(images: Tensor) -> Tensor:
        return cast(Tensor, vision.embeddings(images, interpolate_pos_encoding=_clip_other(vision, images)))

    return Halves(tokens, _masked_block, lambda tokens: vision.head(vision.post_layernorm(tokens)))


def _naflex_halves(model: nn.Module) -> Halves:
    vision = cast(Any, model).vision_model
    return _siglip_halves(model)._replace(tokens=lambda images: vision.embeddings(*_naflex_patches(vision, images)))


def _vit_halves(model: nn.Module) -> Halves:
    vit = cast(Any, model)

    def tokens(images: Tensor) -> Tensor:
        return cast(Tensor, vit.embeddings(images, interpolate_pos_encoding=_vit_other(vit, images)))

    return _dino_halves(model)._replace(tokens=tokens)


def _dino_halves(model: nn.Module) -> Halves:
    dino = cast(Any, model)
    return Halves(
        dino.embeddings, lambda block, tokens, prompts: block(tokens), lambda tokens: dino.layernorm(tokens)[:, 0]
    )


def _masked_block(block: nn.Module, tokens: Tensor, prompts: int) -> Tensor:
    return cast(Tensor, block(tokens, None))  # the mask has no default


def _clip_resize(model: nn.Module, size: tuple[int, int]) -> bool:
    vision = cast(Any, model).vision_model
    embeddings = vision.embeddings
    check_divides(size, embeddings.patch_size)
    if size[0] != size[1]:
        return False
    new = size[0] // embeddings.patch_size
    prefix = int(hasattr(embeddings, "class_embedding"))  # CLIP has a class token, SigLIP none
    old = round((embeddings.position_embedding.weight.shape[0] - prefix) ** 0.5)
    weight = resample(embeddings.position_embedding.weight, (old, old), (new, new), prefix=prefix, antialias=False)
    embeddings.position_embedding.weight = weight
    embeddings.position_embedding.num_embeddings = embeddings.num_positions = weight.shape[0]
    embeddings.num_patches = new * new
    embeddings.position_ids = torch.arange(weight.shape[0], device=weight.device).expand((1, -1))
    embeddings.image_size = vision.config.image_size = size[0]
    return True


def _naflex_resize(model: nn.Module, size: tuple[int, int]) -> bool:
    check_divides(size, cast(Any, model).vision_model.embeddings.patch_size)
    return False


def _vit_resize(model: nn.Module, size: tuple[int, int]) -> bool:
    embeddings = cast(Any, model).embeddings
    patches = embeddings.patch_embeddings
    check_divides(size, patches.patch_size)
    if size[0] != size[1]:
        return False
    patch = pair(patches.patch_size) or (1, 1)
    new = (size[0] // patch[0], size[1] // patch[1])
    old = round((embeddings.position_embeddings.shape[1] - 1) ** 0.5)
    smooth = hasattr(embeddings, "register_tokens")  # transformers resamples those of that DINOv2 antialiased
    positions = resample(embeddings.position_embeddings[0], (old, old), new, prefix=1, antialias=smooth)
    embeddings.position_embeddings = nn.Parameter(positions.detach()[None], positions.requires_grad)
    patches.num_patches = new[0] * new[1]
    patches.image_size = size
    cast(Any, model).config.image_size = size[0]
    if hasattr(embeddings, "image_size"):  # ViT keeps a second copy
        embeddings.image_size = size
    return True


@dataclass(frozen=True, slots=True)
class _Kind:
    """One model type of transformers: its classes, and where its parts are."""

    model: str
    processor: str
    family: Family
    image: str
    patch_embed: str
    norm: str
    text_norm: str | None = None
    pool: str = "token"
    heads: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


CLIP = Family("transformers", _clip_image, _clip_text, _clip_resize, _clip_halves)


SIGLIP = Family("transformers", _siglip_image, _siglip_text, _clip_resize, _siglip_halves)


NAFLEX = Family("transformers", _naflex_image, _siglip_text, _naflex_resize, _naflex_halves)


VIT = Family("transformers", _vit_image, None, _vit_resize, _vit_halves)


DINO = Family("transformers", _dino_image, None, _vit_resize, _dino_halves)


_DINO_PARTS = ("", "embeddings.patch_embeddings", "layernorm")


_PAIR_PARTS = (
    "vision_model.",
    "vision_model.embeddings.patch_embedding",
    "vision_model.post_layernorm",
    "text_model.final_layer_norm",
)


KINDS: dict[str, _Kind] = {
    "clip": _Kind("CLIPModel", "CLIPImageProcessor", CLIP, *_PAIR_PARTS, "token", ("visual_projection",)),
    "clip_vision_model": _Kind(
        "CLIPVisionModelWithProjection",
        "CLIPImageProcessor",
        dataclasses.replace(CLIP, encode_text=None),
        *_PAIR_PARTS[:3],
        None,
        "token",
        ("visual_projection",),
    ),
    "siglip": _Kind("SiglipModel", "SiglipImageProcessor", SIGLIP, *_PAIR_PARTS, "map", ("vision_model.head",)),
    "siglip2": _Kind("Siglip2Model", "Siglip2ImageProcessor", NAFLEX, *_PAIR_PARTS, "map", ("vision_model.head",)),
    "dinov2": _Kind("Dinov2Model", "BitImageProcessor", DINO, *_DINO_PARTS),
    "dinov2_with_registers": _Kind("Dinov2WithRegistersModel", "BitImageProcessor", DINO, *_DINO_PARTS),
    # the pooler of ViT is not in the published classifiers: it would be random
    "vit": _Kind("ViTModel", "ViTImageProcessor", VIT, *_DINO_PARTS, options={"add_pooling_layer": False}),
}
"""model_type of transformers -> how it is run. SigLIP 2 at one resolution is a "siglip"; "siglip2" is NaFlex."""
