"""load_encoder: a uri -> Encoder, from timm, open_clip, transformers, or a folder that vicinal saved.

Every way leads along one road: uri -> architecture (JSON, enough to build the module with no download) -> module ->
weights, loaded strictly -> input size. A saved folder holds the architecture, so it comes back the same way. Nothing is
ever random unless it is asked for.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import nn

from vicinal.models import from_open_clip, from_timm, from_transformers
from vicinal.models.anatomy import pair
from vicinal.models.encoder import CONFIG_NAME, FORMAT, WEIGHTS_NAME, Anatomy, Encoder, Family
from vicinal.models.tokenizers import TOKENIZERS
from vicinal.models.weights import (
    Crop,
    Found,
    Hub,
    load_strictly,
    log,
    nearest,
    read_weights,
    say_licence,
)
from vicinal.types import InputError, Preprocess

__all__ = ["FAMILIES", "load_encoder"]


def load_encoder(
    uri: str | Path,
    *,
    size: int | Sequence[int] | None = None,
    crop: str | None = None,
    cache_dir: str | Path | None = None,
    random_init: bool = False,
) -> Encoder:
    """Load a pretrained model: in eval mode, in float32, on the CPU.

    The licence of the weights is logged where it is known, before they are downloaded, and kept as `Encoder.licence`.

    Args:
        uri: where the model comes from, one of

            - `timm:NAME` or `timm:NAME.TAG` (downloaded), `timm:NAME@WEIGHTS.safetensors` (or .pth, .bin);
            - `open_clip:NAME/TAG` or `open_clip:hf-hub:ORG/NAME` (downloaded), `open_clip:NAME@FILE`,
              `open_clip:NAME@FOLDER` or `open_clip:local-dir:FOLDER` (a folder with open_clip_config.json);
            - `vicinal:nano`, a small image-text model of glyphs that is built in: see `data.glyphs`;
            - `transformers:ORG/NAME` (downloaded) or `transformers:FOLDER`: CLIP, SigLIP, SigLIP 2, DINOv2, ViT;
            - a folder that `Encoder.save` wrote, or a run folder that holds one as `model/`.
        size: of the input in pixels: a number, or height and width; position embeddings are resampled as the model's
            own library does. None: the size it was trained at.
        crop: how images are made to fit: "crop", "pad" or "squash". None: as the model was trained.
        cache_dir: where downloads are kept and looked for. None: the library's own place.
        random_init: build the architecture with random weights, which `Encoder.source` then says. With timm's and
            open_clip's names this needs no network.

    Raises:
        InputError: an unknown name, tag or file; weights of another shape; no network; a size the model cannot take.
            The message says what there is, and what to do.

    >>> encoder = load_encoder("timm:vit_tiny_patch16_224", size=64, random_init=True)
    >>> encoder.embedding_dim, encoder.preprocess.size, len(encoder.anatomy.image.blocks)
    (192, (64, 64), 12)
    """
    uri = str(uri)
    if crop is not None and crop not in get_args(Crop):
        raise InputError(f"crop={crop!r}{nearest(crop, get_args(Crop))}; there are {', '.join(get_args(Crop))}")
    wanted = pair(size)
    scheme, _, rest = uri.partition(":")
    hub = Hub(None if cache_dir is None else Path(cache_dir).expanduser())
    # weights that are overwritten at once must not use up the caller's random numbers
    with torch.random.fork_rng(devices=[], enabled=not random_init):
        if scheme in FAMILIES and rest:
            found = FAMILIES[scheme].find(rest, uri, hub, random_init)
            if not random_init:
                say_licence(uri, found.licence)
            encoder = _assemble(found, uri)
            held = found.grid or found.preprocess.size
        else:
            encoder = _load_saved(uri, random_init)
            held = encoder.preprocess.size
    if random_init:
        encoder.source = f"{uri} (random weights)"
    target = wanted or encoder.preprocess.size
    if {target} != {held, encoder.preprocess.size}:  # in one step, from the positions that were trained
        _resize(encoder, target, uri)
    if crop is not None:
        encoder.preprocess = dataclasses.replace(encoder.preprocess, crop=cast(Crop, crop))
    return encoder.eval()


@dataclass(frozen=True, slots=True)
class _Loader:
    """One family: a uri -> Found, and its architecture (JSON) -> the bare module with its Family and Anatomy."""

    find: Callable[[str, str, Hub, bool], Found]
    build: Callable[[Mapping[str, Any]], tuple[nn.Module, Family, Anatomy]]


def _assemble(found: Found, source: str) -> Encoder:
    """Architecture -> module -> weights -> Encoder."""
    architecture = dict(found.architecture)
    model, family, anatomy = FAMILIES[architecture["family"]].build(architecture)
    if architecture["size"] is not None:
        family.resize(model, tuple(architecture["size"]))
    if found.weights is not None:
        model = found.weights(model)
    encoder = Encoder(
        model.eval(),
        family=family,
        anatomy=anatomy,
        preprocess=found.preprocess,
        source=source,
        architecture=architecture,
        embedding_dim=0,
        licence=found.licence,
        tokenizer=found.tokenizer,
    )
    encoder.embedding_dim = _width(encoder, source)
    return encoder


@torch.no_grad()  # not inference_mode: what a module caches on the way could not be trained with
def _width(encoder: Encoder, source: str) -> int:
    """D, from the model itself: a table of widths would be wrong for the next model."""
    height, width = encoder.preprocess.size
    try:
        return int(encoder.encode_image(torch.zeros(1, 3, height, width, device=encoder.device)).shape[-1])
    except (RuntimeError, ValueError, AssertionError) as error:
        raise InputError(f"{source} cannot take images of {height} x {width} pixels: {error}") from error


def _resize(encoder: Encoder, size: tuple[int, int], uri: str) -> None:
    old = encoder.preprocess.size
    try:
        if encoder.family.resize(encoder.model, size):
            encoder.architecture["size"] = list(size)
    except InputError as error:
        raise InputError(f"{uri}: {error}") from error
    encoder.preprocess = dataclasses.replace(encoder.preprocess, size=size)
    _width(encoder, uri)  # some architectures find out in their forward only
    if size != old:
        log.info("%s: input size %s x %s instead of %s x %s", uri, *size, *old)


def _load_saved(uri: str, random_init: bool) -> Encoder:
    folder = Path(uri).expanduser()
    if not (folder / CONFIG_NAME).is_file() and (folder / "model" / CONFIG_NAME).is_file():
        folder = folder / "model"
    if not (folder / CONFIG_NAME).is_file():
        raise InputError(_not_a_model(uri, folder))
    if random_init:
        raise InputError(f"{folder} holds trained weights; random_init is for uris like timm:NAME")
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        if config["format"] > FORMAT:
            raise InputError(
                f"{folder} was saved by a newer vicinal (format {config['format']}, this one reads {FORMAT}); upgrade"
            )
        architecture = dict(config["architecture"])
        tokenizer = architecture.pop("tokenizer", None)
        fields = config["preprocess"].items()
        preprocess: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields}
        found = Found(
            architecture,
            Preprocess(**preprocess),
            None,  # below, after the adapters are in place
            licence=config["licence"],
            tokenizer=None if tokenizer is None else TOKENIZERS[tokenizer["kind"]].restore(tokenizer, folder),
        )
        source, adapters = config["source"], config["adapters"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{folder / CONFIG_NAME} is damaged ({error!r}); copy or train the model again") from error
    encoder = _assemble(found, source)
    if adapters:
        from vicinal.models.adapters import adapt, adapters_from_config

        encoder = adapt(encoder, *adapters_from_config(adapters))
    load_strictly(encoder, read_weights(folder / WEIGHTS_NAME), f"{folder / WEIGHTS_NAME}")
    return encoder.requires_grad_(False)  # what was trained then is not what is trained next: `adapt` says that


def _not_a_model(uri: str, folder: Path) -> str:
    forms = "vicinal:nano, timm:NAME, open_clip:NAME/TAG, transformers:ORG/NAME, or a folder saved by vicinal"
    if (folder / "open_clip_config.json").is_file():
        return f"{uri} is a folder of open_clip; write open_clip:local-dir:{uri}"
    if (folder / "config.json").is_file():
        return f"{uri} is a folder of transformers; write transformers:{uri}"
    if folder.is_dir():
        return f"{uri} is a folder without {CONFIG_NAME}; a model is {forms}"
    if folder.is_file():
        return f"{uri} is a file; say what architecture it is for: timm:NAME@{uri} or open_clip:NAME@{uri}"
    scheme = uri.partition(":")[0]
    if scheme in FAMILIES:
        return f"{uri} names no model; a model is {forms}"
    if ":" in uri and (near := difflib.get_close_matches(scheme, FAMILIES, n=1)):
        return f"unknown family {scheme!r} in {uri}; did you mean {near[0]}:? A model is {forms}"
    import timm

    if timm.is_model(uri.partition(".")[0]):
        return f"{uri} is no folder; write timm:{uri}"
    return f"there is no folder {uri}; a model is {forms}"


def _built_in(name: str, uri: str, hub: Hub, random_init: bool) -> Found:
    """What is packaged: a folder of transformers beside this file."""
    folder = Path(__file__).parent / name
    if not name.isidentifier() or not (folder / "config.json").is_file():
        raise InputError(f"{uri}: the one model that is built in is vicinal:nano")
    found = from_transformers.find(str(folder), uri, hub, random_init)
    return dataclasses.replace(found, weights=_told_places_apart) if random_init else found


@torch.no_grad()
def _told_places_apart(model: nn.Module) -> nn.Module:
    """Embeddings of places and tokens as large as what they are added to.

    transformers starts them at .02; at nano's width a training from nothing then takes several times as long to see
    that shapes have parts (docs/log.md).
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("position_embedding.weight", "token_embedding.weight")):
            parameter.normal_(std=0.1 if "text_model" in name and "position" in name else 0.3)
    return model


FAMILIES: dict[str, _Loader] = {
    "vicinal": _Loader(_built_in, from_transformers.build),
    "timm": _Loader(from_timm.find, from_timm.build),
    "open_clip": _Loader(from_open_clip.find, from_open_clip.build),
    "transformers": _Loader(from_transformers.find, from_transformers.build),
}
"""The word before the colon of a uri -> its loader."""
