"""load_encoder: a uri -> Encoder, from timm, open_clip, transformers, or a folder that vicinal saved.

Every way leads through one road: uri -> architecture (JSON, enough to build the module with no download) -> module ->
weights. A saved folder holds the architecture, so it comes back the same way. Nothing is ever random unless asked for.
"""

from __future__ import annotations

import difflib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vicinal.models.encoder import CONFIG_NAME, FORMAT, WEIGHTS_NAME, Anatomy, Encoder, Family, Tower
from vicinal.types import InputError, Preprocess

__all__ = ["load_encoder"]

log = logging.getLogger("vicinal")


def load_encoder(
    uri: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    crop: str | None = None,
    cache_dir: str | Path | None = None,
    random_init: bool = False,
) -> Encoder:
    """Load a pretrained model, in eval mode, in float32, on the CPU.

    Args:
        uri: `timm:NAME`, `timm:NAME@WEIGHTS`, or a folder saved by vicinal.
        size: of the input, in pixels (height and width, or one number for both). None: what the model was trained on.
        crop: "crop", "pad" or "squash"; None: as the model was trained.
        cache_dir: where downloads are kept; None: the library's own place.
        random_init: build without weights. The encoder's `source` says so.
    """
    uri = str(uri)
    scheme, _, rest = uri.partition(":")
    if scheme == "timm":
        name, _, weights = rest.partition("@")
        encoder = _timm({"family": "timm", "name": name, "size": _pair(size)}, uri)
        if weights:
            _load_strictly(encoder.model, _read_weights(Path(weights)), uri, drop=("head.",))
        elif not random_init:
            raise InputError("downloads are not wired yet")
        else:
            encoder.source = f"{uri} (random)"
    else:
        encoder = _load_saved(Path(uri))
    return encoder.eval()


def _pair(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (size, size) if isinstance(size, int) else size


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise InputError(f"there is no file of weights at {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return cast(dict[str, Tensor], load_file(path))
    return cast(dict[str, Tensor], torch.load(path, map_location="cpu", weights_only=True))


def _load_strictly(model: nn.Module, state: Mapping[str, Tensor], where: str, drop: Sequence[str] = ()) -> None:
    kept = {key: value for key, value in state.items() if not key.startswith(tuple(drop))}
    try:
        model.load_state_dict(kept, strict=True)
    except RuntimeError as error:
        raise InputError(f"{where}: {error}") from error


def _timm(architecture: Mapping[str, Any], source: str) -> Encoder:
    import timm
    from timm.data import resolve_model_data_config

    model = timm.create_model(architecture["name"], pretrained=False, num_classes=0)
    if architecture["size"] is not None:
        model.set_input_size(img_size=tuple(architecture["size"]))
    data = resolve_model_data_config(model)
    size = tuple(architecture["size"] or data["input_size"][1:])
    preprocess = Preprocess(
        size=size,
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation=data["interpolation"],
        crop_pct=data["crop_pct"],
    )
    blocks = tuple(f"blocks.{i}" for i in range(len(model.blocks)))
    tower = Tower(blocks, {"qkv": "attn.qkv", "out": "attn.proj"}, ("mlp.fc1", "mlp.fc2"), "norm")
    return Encoder(
        model,
        family=TIMM,
        anatomy=Anatomy("patch_embed", tower, None, model.global_pool),
        preprocess=preprocess,
        source=source,
        architecture=architecture,
        embedding_dim=model.num_features,
    )


def _timm_image(model: nn.Module, images: Tensor) -> Tensor:
    return cast(Tensor, model(images))


TIMM = Family("timm", _timm_image)


def _load_saved(folder: Path) -> Encoder:
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    encoder = _timm(config["architecture"], config["source"])
    if config["adapters"]:
        from vicinal.models.adapters import ADAPTERS, adapt

        methods = [ADAPTERS[name](**options) for entry in config["adapters"] for name, options in entry.items()]
        encoder = adapt(encoder, *methods)
    _load_strictly(encoder, _read_weights(folder / WEIGHTS_NAME), str(folder))
    return encoder
