"""open_clip: `NAME/TAG`, `hf-hub:ORG/NAME`, `NAME@FILE`, `NAME@FOLDER`, `local-dir:FOLDER`. Image and text towers.

Its own vision transformers, timm's as image tower, transformers' as text tower, CoCa, OpenAI's ResNets. Input sizes: as
its `force_image_size` does (bicubic, antialiased).
"""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from vicinal.models.anatomy import check_divides, find_tower, has_weights, pair, resample, with_weights
from vicinal.models.encoder import Anatomy, Family, Tokenizer, Tower
from vicinal.models.from_timm import timm_anatomy, timm_halves, timm_resize
from vicinal.models.prompts import Halves
from vicinal.models.tokenizers import TOKENIZER_FILES, OpenClipTokenizer, without_tokenizer
from vicinal.models.weights import (
    Crop,
    Found,
    Hub,
    card_licence,
    config_json,
    known_licence,
    log,
    misfit,
    nearest,
    read_weights,
)
from vicinal.types import InputError, Preprocess

__all__ = ["CROPS", "OPEN_CLIP", "WEIGHT_FILES", "build", "find"]

CROPS: dict[str, Crop] = {"shortest": "crop", "longest": "pad", "squash": "squash"}
"""open_clip's word -> ours."""


def find(rest: str, uri: str, hub: Hub, random_init: bool) -> Found:
    """What a uri of open_clip leads to."""
    name, _, place = rest.partition("@")
    if rest.startswith("hf-hub:"):
        found = _in_hub(rest.removeprefix("hf-hub:"), uri, hub, random_init)
    elif rest.startswith("local-dir:"):
        found = _in_folder(Path(rest.removeprefix("local-dir:")).expanduser(), None)
    elif place and Path(place).expanduser().is_dir():
        found = _in_folder(Path(place).expanduser(), name)
    elif place:
        file = Path(place).expanduser()
        if not file.is_file():
            read_weights(file)  # says what is wrong
        found = _Place(*_named(name), lambda: file)
    else:
        found = _tagged(rest, hub, random_init)
    config = json.loads(json.dumps(found.config))  # a copy of our own: open_clip shares its table
    architecture = {"family": "open_clip", "config": config, "text_config": None, "size": None}
    config["vision_cfg"].pop("timm_model_pretrained", None)
    config["text_cfg"].pop("hf_model_pretrained", None)
    if "hf_model_name" in config["text_cfg"]:
        architecture["text_config"] = _text_config(config["text_cfg"]["hf_model_name"], hub, found.folder)
    cfg = found.preprocess
    size = config["vision_cfg"].get("image_size", 224)
    preprocess = Preprocess(
        size=pair(size) or (224, 224),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation="bilinear" if cfg["interpolation"] == "bilinear" else "bicubic",
        crop=CROPS[cfg["resize_mode"]],
    )
    return Found(
        architecture,
        preprocess,
        None if random_init else lambda model: _weights(model, found.weights(), uri),
        licence=None if random_init else found.licence,
        tokenizer=_tokenizer(config["text_cfg"], hub, found.folder),
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """What a uri of open_clip leads to, before anything large is read or downloaded."""

    config: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    weights: Callable[[], Path]
    licence: str | None = None
    folder: Path | None = None


def _named(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Architecture and preprocessing of a name that open_clip knows, for weights that come from elsewhere."""
    import open_clip
    from open_clip.transform import PreprocessCfg

    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        raise InputError(
            f"open_clip has no model {name!r}{nearest(name, open_clip.list_models())}; for a folder with "
            "open_clip_config.json write open_clip:local-dir:FOLDER"
        )
    fields = ("mean", "std", "interpolation", "resize_mode")
    default = {key: value for key, value in dataclasses.asdict(PreprocessCfg()).items() if key in fields}
    known = [
        {key: _published(name, tag)[key] for key in fields} for tag in open_clip.list_pretrained_tags_by_model(name)
    ]
    if known and all(other == known[0] for other in known):
        return config, known[0]
    if known:
        log.warning(
            "%s was published with more than one preprocessing; open_clip's default is taken (mean %s, std %s, %s). "
            "A folder with open_clip_config.json can say otherwise",
            name,
            *(default[key] for key in ("mean", "std", "resize_mode")),
        )
    return config, default


def _published(name: str, tag: str) -> dict[str, Any]:
    from open_clip.pretrained import get_pretrained_cfg

    return cast("dict[str, Any]", get_pretrained_cfg(name, tag))


def _tagged(rest: str, hub: Hub, random_init: bool) -> _Place:
    import open_clip

    name, _, tag = rest.partition("/")
    config, preprocess = _named(name)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tag and random_init:
        return _Place(config, preprocess, Path)
    published = _published(name, tag) if tag else {}
    if not published:
        mistake = f"open_clip has no weights {tag!r} for {name}{nearest(tag, tags)}" if tag else "which weights?"
        there = f"there are {', '.join(tags)}" if tags else "none are published for it"
        own = f"weights of your own are open_clip:{name}@FILE, random ones need random_init"
        raise InputError(f"open_clip:{rest}: {mistake}; {there}; {own}")
    if published.get("quick_gelu", False) and not config.get("quick_gelu", False):  # open_clip itself only warns
        log.info("%s/%s was trained with QuickGELU: used, as in %s-quickgelu", name, tag, name)
        config["quick_gelu"] = True

    def download() -> Path:
        if published.get("hf_hub"):
            repository, _, filename = published["hf_hub"].rpartition("/")
            safe = re.sub(r"\.(bin|pt|pth)$", ".safetensors", filename)
            names = tuple(dict.fromkeys((safe, filename))) if filename else WEIGHT_FILES
            return hub.file(repository, names, f"open_clip:{name}@FILE")
        return hub.url(published["url"], f"open_clip:{name}@FILE")

    return _Place(config, published, download, known_licence(f"open_clip:{rest}"))


WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of the weights in a repository or folder of open_clip, best first."""


def _in_hub(repository: str, uri: str, hub: Hub, random_init: bool) -> _Place:
    instead = "open_clip:local-dir:FOLDER, with open_clip_config.json, weights and tokenizer files in it"
    config = _config(hub.file(repository, ("open_clip_config.json",), instead))
    return _Place(*config, lambda: hub.file(repository, WEIGHT_FILES, instead), known_licence(uri))


def _in_folder(folder: Path, name: str | None) -> _Place:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    file = folder / "open_clip_config.json"
    if file.is_file():
        config, preprocess = _config(file)
    elif name:
        config, preprocess = _named(name)
    else:
        raise InputError(f"{folder} has no open_clip_config.json; name the architecture: open_clip:NAME@{folder}")

    def weights() -> Path:
        names = (*WEIGHT_FILES, "model.safetensors", "pytorch_model.bin")
        here = [folder / name for name in names if (folder / name).is_file()]
        others = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
        if not here and len(others) != 1:
            listed = ", ".join(path.name for path in others) or "none"
            raise InputError(f"{folder} should hold one file of weights, such as {names[0]}; it holds {listed}")
        return (here or others)[0]

    return _Place(config, preprocess, weights, card_licence(folder), folder)


def _config(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from open_clip.transform import PreprocessCfg

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        config = content["model_cfg"]
        _ = config["embed_dim"], config["vision_cfg"], config["text_cfg"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is not a configuration of open_clip ({error!r})") from error
    default = dataclasses.asdict(PreprocessCfg())
    said = {key: value for key, value in content.get("preprocess_cfg", {}).items() if value is not None}
    return config, {**default, **said}


def _weights(model: nn.Module, file: Path, uri: str) -> nn.Module:
    import open_clip

    if file.suffix not in (".npz", ".npy"):  # big_vision's arrays, which open_clip converts
        read_weights(file)  # open_clip's own messages do not say what to do
    try:
        open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
    except (RuntimeError, KeyError) as error:
        wrong = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise InputError(misfit(f"{uri} ({file.name})", wrong)) from error
    return model


def _tokenizer(text_cfg: Mapping[str, Any], hub: Hub, folder: Path | None) -> Tokenizer:
    context_length = text_cfg.get("context_length", 77)
    settings = dict(text_cfg.get("tokenizer_kwargs") or {})
    settings.pop("reduction_mask", None)
    name = text_cfg.get("hf_tokenizer_name")
    if not name:
        return OpenClipTokenizer.make(context_length, settings, None, {})
    if text_cfg.get("tokenizer_mode"):
        settings["tokenizer_mode"] = text_cfg["tokenizer_mode"]
    here = folder is not None and any((folder / file).is_file() for file in TOKENIZER_FILES)
    source = str(folder) if here else name
    options = {"cache_dir": None, "local_files_only": True} if here else hub.options()
    try:
        return OpenClipTokenizer.make(context_length, settings, source, options)
    except (OSError, ValueError) as error:
        return without_tokenizer(source, context_length, error)


def _text_config(name: str, hub: Hub, folder: Path | None) -> dict[str, Any]:
    """The configuration of a text tower from transformers, kept so that the model is built again with no download."""
    from transformers import AutoConfig

    local = folder if folder is not None and (folder / "config.json").is_file() else None
    try:
        config = AutoConfig.from_pretrained(local or name, trust_remote_code=False, **hub.options())
    except (OSError, ValueError) as error:
        raise InputError(hub.advice(f"config.json of the text tower {name}", "open_clip:local-dir:FOLDER")) from error
    return config_json(config)


def build(architecture: Mapping[str, Any]) -> tuple[nn.Module, Family, Anatomy]:
    """The module with random weights, at the input size of its configuration."""
    import open_clip
    from open_clip.model import CustomTextCLIP

    config = json.loads(json.dumps(architecture["config"]))
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    kind = open_clip.CoCa if custom and "multimodal_cfg" in config else CustomTextCLIP if custom else open_clip.CLIP
    config["vision_cfg"]["timm_model_pretrained"] = False
    with tempfile.TemporaryDirectory() as scratch:
        if architecture["text_config"] is not None:  # open_clip reads it from a folder only
            folder = Path(scratch) / Path(config["text_cfg"]["hf_model_name"]).name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(architecture["text_config"]), encoding="utf-8")
            config["text_cfg"].update(hf_model_name=str(folder), hf_model_pretrained=False)
        model = kind(**config)
    return model, OPEN_CLIP, _anatomy(model)


def _anatomy(model: nn.Module) -> Anatomy:
    visual = cast(Any, model).visual
    parts = dict(model.named_children())
    prefix, norm = ("text.", "text.ln_final") if "text" in parts else ("transformer.", "ln_final")
    text = find_tower(model, prefix, norm)
    if hasattr(visual, "trunk"):  # a timm tower
        image = timm_anatomy(visual.trunk, "visual.trunk.")
        heads = (*image.heads, *with_weights(model, "visual.head"))
        return dataclasses.replace(image, text=text, heads=heads)
    if hasattr(visual, "attnpool"):  # OpenAI's ResNet
        return Anatomy("visual.conv1", Tower(), text, "map", ("visual.attnpool",))
    named = {"tok": "token"}.get(visual.pool_type, visual.pool_type)
    pool = "map" if has_weights(model, "visual.attn_pool") else named
    heads = with_weights(model, "visual.attn_pool", "visual.attn_pool_contrastive", "visual.proj")
    return Anatomy("visual.conv1", find_tower(model, "visual.", "visual.ln_post"), text, pool, heads)


def _encode_image(model: nn.Module, images: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, model).encode_image(images, normalize=False))  # CoCa's own default is True


def _encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, model).encode_text(tokens, normalize=False))


def _resize(model: nn.Module, size: tuple[int, int]) -> bool:
    visual = cast(Any, model).visual
    if hasattr(visual, "trunk"):
        timm_resize(visual.trunk, size)
    elif hasattr(visual, "attnpool"):
        check_divides(size, 32)
        height, width = pair(visual.image_size) or size
        pool, old, new = visual.attnpool, (height // 32, width // 32), (size[0] // 32, size[1] // 32)
        pool.positional_embedding = resample(pool.positional_embedding, old, new, prefix=1, antialias=True)
    else:
        check_divides(size, visual.patch_size)
        new = (size[0] // visual.patch_size[0], size[1] // visual.patch_size[1])
        positions = resample(visual.positional_embedding, tuple(visual.grid_size), new, prefix=1, antialias=True)
        visual.positional_embedding, visual.grid_size = positions, new
    visual.image_size = size
    return True


def _halves(model: nn.Module) -> Halves | None:
    visual = cast(Any, model).visual
    if hasattr(visual, "trunk"):
        trunk = timm_halves(visual.trunk)
        return trunk and trunk._replace(pool=lambda tokens: visual.head(trunk.pool(tokens)))
    if not visual.transformer.batch_first:
        return None

    def pool(tokens: Tensor) -> Tensor:
        feature = cast(Tensor, visual._pool(tokens)[0])
        return feature if visual.proj is None else feature @ visual.proj

    return Halves(visual._embeds, lambda block, tokens, prompts: block(tokens), pool)


OPEN_CLIP = Family("open_clip", _encode_image, _encode_text, _resize, _halves)
