"""load_encoder: a uri -> Encoder, from timm, open_clip, transformers, or a folder that vicinal saved.

Every way leads along one road: uri -> architecture (JSON, enough to build the module with no download) -> module ->
weights, loaded strictly -> input size. A saved folder holds the architecture, so it comes back the same way. Nothing is
ever random unless it is asked for.

Letters: B batch, H W height and width in pixels, T tokens, C numbers a token, L tokens of a text.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from vicinal.models.encoder import CONFIG_NAME, FORMAT, WEIGHTS_NAME, Anatomy, Encoder, Family, Tokenizer, Tower
from vicinal.types import InputError, Preprocess

__all__ = ["FAMILIES", "find_tower", "load_encoder"]

log = logging.getLogger("vicinal")

Crop = Literal["crop", "pad", "squash"]


def load_encoder(
    uri: str | Path,
    *,
    size: int | Sequence[int] | None = None,
    crop: Crop | None = None,
    cache_dir: str | Path | None = None,
    random_init: bool = False,
) -> Encoder:
    """Load a pretrained model: in eval mode, in float32, on the CPU.

    The licence of the weights is logged where it is known, before anything is downloaded, and kept as `Encoder.licence`.

    Args:
        uri: where the model comes from, one of

            - `timm:NAME` or `timm:NAME.TAG` (downloaded), `timm:NAME@WEIGHTS.safetensors` (or .pth, .bin);
            - `open_clip:NAME/TAG` or `open_clip:hf-hub:ORG/NAME` (downloaded), `open_clip:NAME@FILE`,
              `open_clip:NAME@FOLDER` or `open_clip:local-dir:FOLDER` (a folder with open_clip_config.json);
            - `transformers:ORG/NAME` (downloaded) or `transformers:FOLDER`: CLIP, SigLIP, SigLIP 2, DINOv2, ViT;
            - a folder that `Encoder.save` wrote, or a run folder that holds one as `model/`.
        size: of the input in pixels: a number, or height and width; position embeddings are resampled as the model's own
            library does. None: the size it was trained at.
        crop: how images are made to fit: "crop", "pad" or "squash". None: as the model was trained.
        cache_dir: where downloads are kept and looked for. None: the library's own place.
        random_init: build the architecture with random weights, which `Encoder.source` then says. With timm's and
            open_clip's names this needs no network.

    Raises:
        InputError: an unknown name, tag or file; weights of another shape; no network; a size the model cannot take. The
            message says what there is, and what to do.

    >>> encoder = load_encoder("timm:vit_tiny_patch16_224", size=64, random_init=True)
    >>> encoder.embedding_dim, encoder.preprocess.size, len(encoder.anatomy.image.blocks)
    (192, (64, 64), 12)
    """
    uri = str(uri)
    if crop is not None and crop not in get_args(Crop):
        raise InputError(f"crop={crop!r}{_nearest(crop, get_args(Crop))}; there are {', '.join(get_args(Crop))}")
    scheme, _, rest = uri.partition(":")
    hub = _Hub(None if cache_dir is None else Path(cache_dir).expanduser())
    # weights that are overwritten at once must not use up the caller's random numbers
    with torch.random.fork_rng(devices=[], enabled=not random_init):
        if scheme in FAMILIES and rest:
            encoder = FAMILIES[scheme].load(rest, uri, hub, random_init)
        else:
            encoder = _load_saved(uri, random_init)
    if random_init:
        encoder.source = f"{uri} (random weights)"
    wanted = _pair(size)
    if wanted is not None and wanted != encoder.preprocess.size:
        _resize(encoder, wanted, uri)
    if crop is not None:
        encoder.preprocess = dataclasses.replace(encoder.preprocess, crop=crop)
    return encoder.eval()


@dataclass(frozen=True, slots=True)
class _Loader:
    """One family: a uri -> Encoder, and an architecture (JSON) -> the bare module with its Family and Anatomy."""

    load: Callable[[str, str, _Hub, bool], Encoder]
    build: Callable[[Mapping[str, Any]], tuple[nn.Module, Family, Anatomy]]


# ---------------------------------------------------------------------------------------------------------- the one road


def _assemble(
    architecture: Mapping[str, Any],
    source: str,
    preprocess: Preprocess,
    *,
    licence: str | None,
    tokenizer: Tokenizer | None = None,
    weights: Callable[[nn.Module], nn.Module] | None = None,
) -> Encoder:
    """Architecture -> module -> `weights` (changes the module, or gives another of the same architecture) -> Encoder."""
    model, family, anatomy = FAMILIES[architecture["family"]].build(architecture)
    if architecture["size"] is not None:
        family.resize(model, tuple(architecture["size"]))
    if weights is not None:
        model = weights(model)
    encoder = Encoder(
        model.eval(),
        family=family,
        anatomy=anatomy,
        preprocess=preprocess,
        source=source,
        architecture=architecture,
        embedding_dim=0,
        licence=licence,
        tokenizer=tokenizer,
    )
    encoder.embedding_dim = _width(encoder, source)
    return encoder


@torch.inference_mode()
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
        encoder.family.resize(encoder.model, size)
    except InputError as error:
        raise InputError(f"{uri}: {error}") from error
    encoder.preprocess = dataclasses.replace(encoder.preprocess, size=size)
    encoder.architecture["size"] = list(size)
    _width(encoder, uri)  # some architectures find out in their forward only
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
        fields = config["preprocess"]
        preprocess = Preprocess(
            **{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        )
        tokenizer = architecture.pop("tokenizer", None)
        encoder = _assemble(
            architecture,
            config["source"],
            preprocess,
            licence=config["licence"],
            tokenizer=None if tokenizer is None else TOKENIZERS[tokenizer["kind"]].restore(tokenizer, folder),
        )
        adapters = config["adapters"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(f"{folder / CONFIG_NAME} is damaged ({error!r}); copy or train the model again") from error
    if adapters:
        from vicinal.models.adapters import adapt, adapters_from_config

        encoder = adapt(encoder, *adapters_from_config(adapters)).requires_grad_(True)
    _load_strictly(encoder, _read_weights(folder / WEIGHTS_NAME), f"{folder / WEIGHTS_NAME}")
    return encoder


def _not_a_model(uri: str, folder: Path) -> str:
    forms = "timm:NAME, open_clip:NAME/TAG, transformers:ORG/NAME, or a folder saved by vicinal"
    if (folder / "open_clip_config.json").is_file():
        return f"{uri} is a folder of open_clip; write open_clip:local-dir:{uri}"
    if (folder / "config.json").is_file():
        return f"{uri} is a folder of transformers; write transformers:{uri}"
    if folder.is_dir():
        return f"{uri} is a folder without {CONFIG_NAME}; a model is {forms}"
    if folder.is_file():
        return f"{uri} is a file; say what architecture it is for: timm:NAME@{uri} or open_clip:NAME@{uri}"
    scheme = uri.partition(":")[0]
    if ":" in uri and (near := difflib.get_close_matches(scheme, FAMILIES, n=1)):
        return f"unknown family {scheme!r} in {uri}; did you mean {near[0]}:? A model is {forms}"
    import timm

    if timm.is_model(uri.partition(".")[0]):
        return f"{uri} is no folder; write timm:{uri}"
    return f"there is no folder {uri}; a model is {forms}"


# ---------------------------------------------------------------------------------------------------------------- weights


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of one that `torch.save` wrote (nothing else in it is ever run)."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"there is no file of weights at {path}{hint}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return cast("dict[str, Tensor]", load_file(path))
        except SafetensorError as error:
            raise InputError(f"{path} is not a whole safetensors file ({error}); copy it again") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the unpickler, zip and tar readers raise: a dozen types
        raise InputError(
            f"{path} cannot be read as plain tensors ({str(error).splitlines()[0]}); files that would run code are "
            "refused: save the state_dict of the model as .safetensors"
        ) from error
    while isinstance(state, dict):  # trainers wrap the weights in a dictionary
        inner = next((state[key] for key in ("state_dict_ema", "state_dict", "model") if key in state), None)
        if not isinstance(inner, dict):
            break
        state = inner
    tensors = (
        {key: value for key, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    )
    if not tensors:
        raise InputError(f"{path} holds no state_dict; save `model.state_dict()` as .safetensors")
    prefix = "module."  # what DistributedDataParallel puts before every name
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


def _mismatches(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    own = model.state_dict()
    return [
        *(f"missing: {key} {tuple(own[key].shape)}" for key in own if key not in state),
        *(f"unknown: {key} {tuple(state[key].shape)}" for key in state if key not in own),
        *(
            f"shape: {key} is {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
            for key in own
            if key in state and own[key].shape != state[key].shape
        ),
    ]


def _load_strictly(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    if wrong := _mismatches(model, state):
        raise InputError(_misfit(where, wrong))
    model.load_state_dict(state, strict=True)


def _misfit(where: str, wrong: Sequence[str]) -> str:
    shown = "\n  ".join(wrong[:12])
    more = f"\n  … and {len(wrong) - 12} more" if len(wrong) > 12 else ""
    return f"the weights of {where} do not fit the architecture ({len(wrong)} differences):\n  {shown}{more}"


class _Hub:
    """The Hugging Face Hub, or only its cache where there is no network: asked once, for five seconds at most."""

    def __init__(self, cache_dir: Path | None) -> None:
        self.cache_dir = cache_dir
        self._online: bool | None = None

    def online(self) -> bool:
        """Whether the Hub answers. Without this its client tries for most of a minute, file by file."""
        if self._online is None:
            from huggingface_hub import constants, get_session

            if constants.HF_HUB_OFFLINE:
                self._online = False
            else:
                try:
                    get_session().head(constants.ENDPOINT, timeout=5.0)
                    self._online = True
                except Exception:  # whatever it is, a download would fail on it too
                    self._online = False
        return self._online

    def options(self) -> dict[str, Any]:
        """Keyword arguments for transformers' from_pretrained."""
        return {"cache_dir": self.cache_dir, "local_files_only": not self.online()}

    def file(self, repository: str, names: Sequence[str], instead: str) -> Path:
        """The first of `names` that the repository has; `instead` is the uri to use with a file copied by hand."""
        from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

        for name in names:
            known = try_to_load_from_cache(repository, name, cache_dir=self.cache_dir)
            if isinstance(known, str):
                return Path(known)
        if not self.online():
            raise InputError(self.advice(f"{names[0]} of {repository}", instead))
        for name in names:
            try:
                return Path(hf_hub_download(repository, name, cache_dir=self.cache_dir))
            except errors.EntryNotFoundError:
                continue
            except errors.GatedRepoError as error:
                raise InputError(
                    f"{repository} is gated: ask for access on its page at the Hub, then `hf auth login`"
                ) from error
            except errors.RepositoryNotFoundError as error:
                raise InputError(f"the Hub has no repository {repository} that you can read; check the name") from error
            except Exception as error:  # network, disk and checksum errors of several libraries
                raise InputError(f"{name} of {repository} could not be downloaded: {error}") from error
        raise InputError(f"{repository} at the Hub holds none of {', '.join(names)}")

    def advice(self, what: str, instead: str) -> str:
        """What to do without a network."""
        place = f"in {self.cache_dir}" if self.cache_dir else "in its cache"
        return (
            f"the Hugging Face Hub does not answer, and {what} is not {place}. On a machine with a network, download it "
            f"from the Hub, copy it here and use {instead}; or copy that machine's cache and pass it as cache_dir"
        )


# ---------------------------------------------------------------------------------------------------------------- licences

LICENCES: tuple[tuple[str, str], ...] = (
    (r"^open_clip:.*/openai$", "mit"),
    (r"^open_clip:.*/(laion2b|laion400m|laion5b|laion_aesthetic|frozen_laion5b|datacomp|commonpool)_", "mit"),
    (r"^open_clip:EVA0\d.*/", "mit"),
    (r"^open_clip:.*SigLIP.*/webli$", "apache-2.0"),
    (r"^open_clip:.*/metaclip", "cc-by-nc-4.0"),
    (r"^open_clip:MobileCLIP.*/", "apple-amlr"),
    (r"^open_clip:.*/dfn", "apple-ascl"),
    (r"^transformers:openai/clip-", "mit"),
    (r"^transformers:google/(siglip|vit-)", "apache-2.0"),
    (r"^transformers:facebook/dinov2", "apache-2.0"),
)
"""uri -> licence of the published weights, for well-known ones; timm's are in its own table. As of November 2026."""

RESTRICTED = ("-nc", "noncommercial", "amlr", "ascl", "dinov3", "seer", "unknown")
"""Words in the names of licences that are worth a warning: no commercial use, research only, gated, or unclear."""


def _licence(uri: str) -> str | None:
    return next((licence for pattern, licence in LICENCES if re.search(pattern, uri)), None)


def _card_licence(folder: Path) -> str | None:
    """What the model card of a local folder says."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    header = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:\s*(\S+)", header.group(1), re.MULTILINE) if header else None
    return found.group(1) if found else None


def _say_licence(uri: str, licence: str | None) -> None:
    if licence is None:
        log.info("%s: licence of the weights unknown here, see the model card", uri)
    elif any(word in licence.lower() for word in RESTRICTED):
        log.warning("%s: licence of the weights: %s. Read its terms before any commercial use", uri, licence)
    else:
        log.info("%s: licence of the weights: %s", uri, licence)


# ----------------------------------------------------------------------------------------------------------------- anatomy

ATTENTION: tuple[Mapping[str, str], ...] = (
    {"qkv": "attn.qkv", "out": "attn.proj"},  # timm
    {"q": "attn.q_proj", "k": "attn.k_proj", "v": "attn.v_proj", "out": "attn.proj"},  # timm, EVA
    {"fused": "attn"},  # open_clip
    {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.out_proj"},  # CLIP
    {"q": "attention.q_proj", "k": "attention.k_proj", "v": "attention.v_proj", "out": "attention.o_proj"},  # ViT
    {  # ViT and DINOv2 of earlier transformers 5
        "q": "attention.attention.query",
        "k": "attention.attention.key",
        "v": "attention.attention.value",
        "out": "attention.output.dense",
    },
    {  # BERT and its kin: text towers in open_clip
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "out": "attention.output.dense",
    },
)
"""How the attention of a block is laid out: role -> name within the block. The first that fits is taken."""

MLP: tuple[tuple[str, ...], ...] = (
    ("mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"),  # timm, SwiGLU
    ("mlp.fc1", "mlp.fc2"),
    ("mlp.w12", "mlp.w3"),
    ("mlp.c_fc", "mlp.c_proj"),
    ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ("mlp.weights_in", "mlp.weights_out"),
    ("intermediate.dense", "output.dense"),
)
"""How the feed-forward part of a block is laid out. The first that fits is taken."""


def find_tower(model: nn.Module, prefix: str = "", norm: str | None = None) -> Tower:
    """The transformer blocks below `prefix`, found by their layout: a block is what holds an attention and an MLP.

    A tower without any (a convolutional network, or a layout not in `ATTENTION` and `MLP`) has no blocks.

    >>> layer = nn.TransformerEncoderLayer(8, 2)      # torch's own layout is not in the tables
    >>> find_tower(layer).blocks
    ()
    """
    found: list[str] = []
    layout: tuple[Mapping[str, str], tuple[str, ...]] | None = None
    for name, module in model.named_modules():
        if not name.startswith(prefix):
            continue
        attention = next((roles for roles in ATTENTION if _fits(module, roles)), None)
        mlp = next((names for names in MLP if _fits(module, dict.fromkeys(names)) and names), None)
        if attention is None or mlp is None:
            continue
        if layout is None:
            layout = (attention, mlp)
        if layout == (attention, mlp):
            found.append(name)
    norm = norm if norm is not None and _has_weights(model, norm) else None
    return Tower(tuple(found), dict(layout[0]), layout[1], norm) if layout else Tower(norm=norm)


def _fits(block: nn.Module, roles: Mapping[str, str | None]) -> bool:
    """Whether all names are there, as Linear layers; "fused" as an nn.MultiheadAttention."""
    for role, name in roles.items():
        kind: type[nn.Module] = nn.MultiheadAttention if role == "fused" else nn.Linear
        if not isinstance(_submodule(block, name or role), kind):
            return False
    return True


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        child = module._modules.get(part)
        if child is None:
            return None
        module = child
    return module


def _has_weights(model: nn.Module, name: str) -> bool:
    """Whether `name` is a parameter, or a module with any (an Identity has none)."""
    return any(key == name or key.startswith(f"{name}.") for key, _ in model.named_parameters())


def _with_weights(model: nn.Module, *names: str) -> tuple[str, ...]:
    return tuple(name for name in names if _has_weights(model, name))


# ------------------------------------------------------------------------------------------------------------- input sizes


def _pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Height and width, from either form."""
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise InputError(f"size {height} x {width} is not a size in pixels")
    return height, width


def _check_divides(size: tuple[int, int], patch: int | Sequence[int]) -> None:
    patches = _pair(patch) or (1, 1)
    if any(pixels % step for pixels, step in zip(size, patches, strict=True)):
        near = [max(round(pixels / step), 1) * step for pixels, step in zip(size, patches, strict=True)]
        raise InputError(
            f"size {size[0]} x {size[1]} is not a multiple of the model's patches of {patches[0]} x {patches[1]} pixels; "
            f"the nearest is {near[0]} x {near[1]}"
        )


def _resample(
    positions: Float[Tensor, "T C"],
    old: tuple[int, int],
    new: tuple[int, int],
    *,
    prefix: int,
    antialias: bool,
) -> nn.Parameter:
    """Position embeddings of an `old` grid of patches -> a `new` one, bicubic; the first `prefix` rows stay."""
    kept = positions.detach()
    if old != new:
        grid_11HW = kept[prefix:].float().reshape(1, *old, -1).permute(0, 3, 1, 2)
        grid_11HW = F.interpolate(grid_11HW, size=new, mode="bicubic", antialias=antialias, align_corners=False)
        rows = grid_11HW.permute(0, 2, 3, 1).flatten(0, 2).to(kept.dtype)
        kept = torch.cat([kept[:prefix], rows])
    return nn.Parameter(kept, requires_grad=positions.requires_grad)


# -------------------------------------------------------------------------------------------------------------------- timm


def _load_timm(rest: str, uri: str, hub: _Hub, random_init: bool) -> Encoder:
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    name, _, file = rest.partition("@")
    _check_timm_name(name)
    published = get_pretrained_cfg(name)
    if published is None:
        published_weights, data = False, resolve_data_config({"input_size": (3, 224, 224)})
    else:
        published_weights, data = bool(published.has_weights), resolve_data_config(pretrained_cfg=published.to_dict())
    licence = published.license if published is not None and not file and not random_init else None
    if random_init:
        load = None
    elif file:
        load = _timm_weights(lambda: _read_weights(Path(file).expanduser()), uri)
    elif not published_weights:
        raise InputError(
            f"timm publishes no weights for {name}; use timm:{name}@FILE with your own, or random_init to start from none"
        )
    else:
        _say_licence(uri, licence)
        load = _timm_weights(lambda: _timm_download(published, hub, name), uri)
    preprocess = Preprocess(
        size=tuple(data["input_size"][1:]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        crop=cast(Crop, {"squash": "squash", "border": "pad"}.get(data["crop_mode"], "crop")),
        crop_pct=data["crop_pct"],
    )
    return _assemble({"family": "timm", "name": name, "size": None}, uri, preprocess, licence=licence, weights=load)


def _check_timm_name(name: str) -> None:
    import timm
    from timm.models import list_pretrained

    architecture, _, tag = name.partition(".")
    if not architecture or not timm.is_model(architecture):
        known = timm.list_models()
        raise InputError(f"timm has no model {architecture!r}{_nearest(architecture, known)}; it has {len(known)}")
    tags = [full.partition(".")[2] for full in list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise InputError(
            f"timm has no weights {tag!r} for {architecture}{_nearest(tag, tags)}; there are {', '.join(tags) or 'none'}"
        )


def _timm_download(published: Any, hub: _Hub, name: str) -> dict[str, Tensor]:
    """The weights that timm publishes. `published` is a timm PretrainedCfg."""
    instead = f"timm:{name}@FILE"
    if published.hf_hub_id:
        names = (
            (published.hf_hub_filename,) if published.hf_hub_filename else ("model.safetensors", "pytorch_model.bin")
        )
        return _read_weights(hub.file(published.hf_hub_id, names, instead))
    folder = hub.cache_dir or Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(published.url).name
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(published.url, str(file))
        except OSError as error:
            raise InputError(
                f"{published.url} could not be downloaded ({error}); fetch it elsewhere, put it into {folder}, or use "
                f"{instead}"
            ) from error
    return _read_weights(file)


def _timm_weights(read: Callable[[], dict[str, Tensor]], uri: str) -> Callable[[nn.Module], nn.Module]:
    """Load what `read` gives, but for the classifier; what fits only after timm's own conversion is converted."""

    def load(model: nn.Module) -> nn.Module:
        state = read()
        plain = _without_classifier(model, state)
        if wrong := _mismatches(model, plain):
            # position embeddings of another size, names of the original authors: what timm itself accepts
            convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)  # not in every module
            try:
                plain = _without_classifier(model, convert(dict(state), model)) if convert else plain
            except Exception as error:  # conversions index and reshape what they expect to find
                raise InputError(_misfit(uri, wrong)) from error
        _load_strictly(model, plain, uri)
        return model

    return load


def _without_classifier(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = cast(Any, model).pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    return {key: value for key, value in state.items() if not key.startswith(heads)}


def _build_timm(architecture: Mapping[str, Any]) -> tuple[nn.Module, Family, Anatomy]:
    import timm

    model = timm.create_model(architecture["name"], pretrained=False, num_classes=0)
    return model, TIMM, _timm_anatomy(model, "")


def _timm_anatomy(trunk: nn.Module, prefix: str) -> Anatomy:
    """Of a timm model that stands at `prefix` of a larger one, "" if it is all."""
    parts = dict(trunk.named_modules())
    norm = next((name for name in ("norm", "fc_norm", "head.norm") if _has_weights(trunk, name)), None)
    tower = find_tower(trunk, "", norm)
    first = cast(Any, trunk).pretrained_cfg.get("first_conv") or ""
    stem = "patch_embed" if "patch_embed" in parts else first if isinstance(first, str) else first[0]
    pool = parts.get("global_pool")
    word = (
        getattr(trunk, "global_pool", "") if pool is None else getattr(pool, "pool_type", "avg")
    )  # a word, or a module
    return Anatomy(
        patch_embed=prefix + stem,
        image=Tower(
            tuple(prefix + name for name in tower.blocks),
            tower.attention,
            tower.mlp,
            None if tower.norm is None else prefix + tower.norm,
        ),
        pool=word if isinstance(word, str) and word else "none",
        heads=tuple(prefix + name for name in _with_weights(trunk, "attn_pool")),
    )


def _timm_image(model: nn.Module, images: Tensor) -> Tensor:
    return cast(Tensor, model(images))


def _timm_resize(model: nn.Module, size: tuple[int, int]) -> None:
    trunk = cast(Any, model)
    embed = _submodule(model, "patch_embed")
    patch = getattr(embed, "patch_size", None)  # convolutional stems have none
    if patch is not None:
        _check_divides(size, patch)
    if hasattr(trunk, "set_input_size"):  # timm's transformers with absolute positions or windows
        trunk.set_input_size(img_size=size)
    elif trunk.pretrained_cfg.get("fixed_input_size", False):
        native = trunk.pretrained_cfg["input_size"][1:]
        raise InputError(f"this architecture of timm takes images of {native[0]} x {native[1]} pixels only")


TIMM = Family("timm", _timm_image, None, _timm_resize)


# --------------------------------------------------------------------------------------------------------------- open_clip


def _load_open_clip(rest: str, uri: str, hub: _Hub, random_init: bool) -> Encoder:
    name, _, place = rest.partition("@")
    if rest.startswith("hf-hub:"):
        found = _open_clip_hub(rest.removeprefix("hf-hub:"), uri, hub, random_init)
    elif rest.startswith("local-dir:"):
        found = _open_clip_folder(Path(rest.removeprefix("local-dir:")).expanduser(), None)
    elif place and Path(place).expanduser().is_dir():
        found = _open_clip_folder(Path(place).expanduser(), name)
    elif place:
        file = Path(place).expanduser()
        if not file.is_file():
            _read_weights(file)  # says what is wrong
        found = _OpenClip(*_open_clip_named(name), lambda: file)
    else:
        found = _open_clip_tag(rest, hub, random_init)
    if not random_init:
        _say_licence(uri, found.licence)
    config = json.loads(json.dumps(found.config))  # a copy of our own: open_clip shares its table
    architecture = {"family": "open_clip", "config": config, "text_config": None, "size": None}
    config["vision_cfg"].pop("timm_model_pretrained", None)
    config["text_cfg"].pop("hf_model_pretrained", None)
    if "hf_model_name" in config["text_cfg"]:
        architecture["text_config"] = _text_config(config["text_cfg"]["hf_model_name"], hub, found.folder)
    cfg = found.preprocess
    size = config["vision_cfg"].get("image_size", 224)
    preprocess = Preprocess(
        size=_pair(size) or (224, 224),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        interpolation="bilinear" if cfg["interpolation"] == "bilinear" else "bicubic",
        crop=cast(Crop, {"shortest": "crop", "longest": "pad", "squash": "squash"}[cfg["resize_mode"]]),
    )
    return _assemble(
        architecture,
        uri,
        preprocess,
        licence=None if random_init else found.licence,
        tokenizer=_open_clip_tokenizer(config["text_cfg"], hub, found.folder),
        weights=None if random_init else lambda model: _open_clip_weights(model, found.weights(), uri),
    )


@dataclass(frozen=True, slots=True)
class _OpenClip:
    """What a uri of open_clip leads to, before anything large is read or downloaded."""

    config: Mapping[str, Any]
    preprocess: Mapping[str, Any]
    weights: Callable[[], Path]
    licence: str | None = None
    folder: Path | None = None


def _open_clip_named(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Architecture and preprocessing of a name that open_clip knows, for weights that come from elsewhere."""
    import open_clip
    from open_clip.transform import PreprocessCfg

    config = open_clip.get_model_config(name) if name in open_clip.list_models() else None
    if config is None:
        raise InputError(
            f"open_clip has no model {name!r}{_nearest(name, open_clip.list_models())}; for a folder with "
            "open_clip_config.json write open_clip:local-dir:FOLDER"
        )
    fields = ("mean", "std", "interpolation", "resize_mode")
    default = {key: value for key, value in dataclasses.asdict(PreprocessCfg()).items() if key in fields}
    known = [
        {key: _open_clip_published(name, tag)[key] for key in fields}
        for tag in open_clip.list_pretrained_tags_by_model(name)
    ]
    if known and all(other == known[0] for other in known):
        return config, known[0]
    if known:
        log.warning(
            "%s was published with more than one preprocessing; open_clip's default is taken (mean %s, std %s, %s). A folder "
            "with open_clip_config.json can say otherwise",
            name,
            *(default[key] for key in ("mean", "std", "resize_mode")),
        )
    return config, default


def _open_clip_published(name: str, tag: str) -> dict[str, Any]:
    from open_clip.pretrained import get_pretrained_cfg

    return cast("dict[str, Any]", get_pretrained_cfg(name, tag))


def _open_clip_tag(rest: str, hub: _Hub, random_init: bool) -> _OpenClip:
    import open_clip

    name, _, tag = rest.partition("/")
    config, preprocess = _open_clip_named(name)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not tag and random_init:
        return _OpenClip(config, preprocess, Path)
    published = _open_clip_published(name, tag) if tag else {}
    if not published:
        mistake = f"open_clip has no weights {tag!r} for {name}{_nearest(tag, tags)}" if tag else "which weights?"
        there = f"there are {', '.join(tags)}" if tags else "none are published for it"
        own = f"weights of your own are open_clip:{name}@FILE, random ones need random_init"
        raise InputError(f"open_clip:{rest}: {mistake}; {there}; {own}")
    if bool(config.get("quick_gelu", False)) != bool(published.get("quick_gelu", False)) and published.get(
        "quick_gelu"
    ):
        log.info("%s/%s was trained with QuickGELU: used, as in %s-quickgelu", name, tag, name)
        config["quick_gelu"] = True

    def download() -> Path:
        if published.get("hf_hub"):
            repository, _, filename = published["hf_hub"].rpartition("/")
            safe = re.sub(r"\.(bin|pt|pth)$", ".safetensors", filename)
            names = tuple(dict.fromkeys((safe, filename))) if filename else OPEN_CLIP_FILES
            return hub.file(repository, names, f"open_clip:{name}@FILE")
        from open_clip.pretrained import download_pretrained_from_url

        try:
            return Path(download_pretrained_from_url(published["url"], cache_dir=hub.cache_dir and str(hub.cache_dir)))
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"{published['url']} could not be downloaded ({error}); fetch it elsewhere and use open_clip:{name}@FILE"
            ) from error

    return _OpenClip(config, published, download, _licence(f"open_clip:{rest}"))


OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
"""Names of the weights in a repository or folder of open_clip, best first."""


def _open_clip_hub(repository: str, uri: str, hub: _Hub, random_init: bool) -> _OpenClip:
    instead = "open_clip:local-dir:FOLDER, with open_clip_config.json, weights and tokenizer files in it"
    config = _open_clip_config(hub.file(repository, ("open_clip_config.json",), instead))
    return _OpenClip(*config, lambda: hub.file(repository, OPEN_CLIP_FILES, instead), _licence(uri))


def _open_clip_folder(folder: Path, name: str | None) -> _OpenClip:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    file = folder / "open_clip_config.json"
    if file.is_file():
        config, preprocess = _open_clip_config(file)
    elif name:
        config, preprocess = _open_clip_named(name)
    else:
        raise InputError(f"{folder} has no open_clip_config.json; name the architecture: open_clip:NAME@{folder}")

    def weights() -> Path:
        names = (*OPEN_CLIP_FILES, "model.safetensors", "pytorch_model.bin")
        here = [folder / name for name in names if (folder / name).is_file()]
        others = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
        if not here and len(others) != 1:
            listed = ", ".join(path.name for path in others) or "none"
            raise InputError(f"{folder} should hold one file of weights, such as {names[0]}; it holds {listed}")
        return (here or others)[0]

    return _OpenClip(config, preprocess, weights, _card_licence(folder), folder)


def _open_clip_config(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
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


def _open_clip_weights(model: nn.Module, file: Path, uri: str) -> nn.Module:
    import open_clip

    if file.suffix not in (".npz", ".npy"):  # big_vision's arrays, which open_clip converts
        _read_weights(file)  # open_clip's own messages do not say what to do
    try:
        open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
    except (RuntimeError, KeyError) as error:
        wrong = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise InputError(_misfit(f"{uri} ({file.name})", wrong)) from error
    return model


def _text_config(name: str, hub: _Hub, folder: Path | None) -> dict[str, Any]:
    """The configuration of a text tower from transformers, kept so that the model is built again with no download."""
    from transformers import AutoConfig

    local = folder if folder is not None and (folder / "config.json").is_file() else None
    try:
        config = AutoConfig.from_pretrained(local or name, trust_remote_code=False, **hub.options())
    except (OSError, ValueError) as error:
        raise InputError(hub.advice(f"config.json of the text tower {name}", "open_clip:local-dir:FOLDER")) from error
    return _config_json(config)


def _config_json(config: Any) -> dict[str, Any]:
    """A transformers configuration, without the path it was read from."""
    content = json.loads(config.to_json_string(use_diff=False))
    content.pop("_name_or_path", None)
    return cast("dict[str, Any]", content)


def _build_open_clip(architecture: Mapping[str, Any]) -> tuple[nn.Module, Family, Anatomy]:
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
    return model, OPEN_CLIP, _open_clip_anatomy(model)


def _open_clip_anatomy(model: nn.Module) -> Anatomy:
    visual = cast(Any, model).visual
    parts = dict(model.named_children())
    text = (
        find_tower(model, "text.", "text.ln_final")
        if "text" in parts
        else find_tower(model, "transformer.", "ln_final")
    )
    if hasattr(visual, "trunk"):  # a timm tower
        image = _timm_anatomy(visual.trunk, "visual.trunk.")
        heads = (*image.heads, *_with_weights(model, "visual.head"))
        return dataclasses.replace(image, text=text, heads=heads)
    if hasattr(visual, "attnpool"):  # OpenAI's ResNet
        return Anatomy("visual.conv1", Tower(), text, "map", ("visual.attnpool",))
    pool = (
        "map" if _has_weights(model, "visual.attn_pool") else {"tok": "token"}.get(visual.pool_type, visual.pool_type)
    )
    heads = _with_weights(model, "visual.attn_pool", "visual.attn_pool_contrastive", "visual.proj")
    return Anatomy("visual.conv1", find_tower(model, "visual.", "visual.ln_post"), text, pool, heads)


def _open_clip_image(model: nn.Module, images: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, model).encode_image(images, normalize=False))  # CoCa's own default is True


def _open_clip_text(model: nn.Module, tokens: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, model).encode_text(tokens, normalize=False))


def _open_clip_resize(model: nn.Module, size: tuple[int, int]) -> None:
    visual = cast(Any, model).visual
    if hasattr(visual, "trunk"):
        _timm_resize(visual.trunk, size)
    elif hasattr(visual, "attnpool"):
        _check_divides(size, 32)
        # the pool's own grid is square as published; after a first resize, the recorded size tells it
        old = tuple(pixels // 32 for pixels in _pair(visual.image_size) or (1, 1))
        pool, new = visual.attnpool, (size[0] // 32, size[1] // 32)
        pool.positional_embedding = _resample(pool.positional_embedding, old, new, prefix=1, antialias=True)
    else:
        _check_divides(size, visual.patch_size)
        new = (size[0] // visual.patch_size[0], size[1] // visual.patch_size[1])
        positions = _resample(visual.positional_embedding, tuple(visual.grid_size), new, prefix=1, antialias=True)
        visual.positional_embedding, visual.grid_size = positions, new
    visual.image_size = size


OPEN_CLIP = Family("open_clip", _open_clip_image, _open_clip_text, _open_clip_resize)


# ------------------------------------------------------------------------------------------------------------ transformers


def _load_transformers(rest: str, uri: str, hub: _Hub, random_init: bool) -> Encoder:
    import transformers

    folder = Path(rest).expanduser()
    local = folder.is_dir()
    if not local and (rest.startswith((".", "/", "~")) or rest.count("/") > 1 or folder.exists()):
        raise InputError(f"{uri}: there is no folder {rest}")
    where = str(folder) if local else rest
    options = {"cache_dir": None, "local_files_only": True} if local else hub.options()
    licence = None if random_init else _card_licence(folder) if local else _licence(uri)
    if not random_init:
        _say_licence(uri, licence)
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
        raise InputError(f"{failed} ({_first_line(error)})") from error
    if config.model_type not in KINDS:
        raise InputError(
            f"{uri} is a {config.model_type!r} of transformers; supported are {', '.join(KINDS)}. Many others are in timm or "
            "open_clip"
        )
    kind = KINDS[config.model_type]
    architecture = {"family": "transformers", "config": _config_json(config), "size": None}
    preprocess = _transformers_preprocess(where, config, kind, options)
    native = _transformers_size(config)
    if native is not None and native != preprocess.size:
        architecture["size"] = None  # resized below, from the grid it was trained on
    tokenizer = None
    if kind.family.encode_text is not None:
        tokenizer = _transformers_tokenizer(where, config.text_config.max_position_embeddings, options)

    def read(model: nn.Module) -> nn.Module:
        if random_init:
            loaded = model
        else:
            try:
                loaded, report = _model_class(kind).from_pretrained(
                    where,
                    config=config,
                    dtype=torch.float32,  # the default is what the file is in, which may be half
                    output_loading_info=True,
                    **kind.options,
                    **options,
                )
            except (OSError, RuntimeError, ValueError) as error:
                raise InputError(f"{failed} ({_first_line(error)})") from error
            if missing := sorted(report["missing_keys"]):
                raise InputError(_misfit(uri, [f"missing: {key}" for key in missing]))
        if native is not None and native != preprocess.size:
            kind.family.resize(loaded, preprocess.size)
            architecture["size"] = list(preprocess.size)
        return cast(nn.Module, loaded)

    return _assemble(architecture, uri, preprocess, licence=licence, tokenizer=tokenizer, weights=read)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _build_transformers(architecture: Mapping[str, Any]) -> tuple[nn.Module, Family, Anatomy]:
    import transformers

    settings = dict(architecture["config"])
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    kind = KINDS[config.model_type]
    model = _model_class(kind)(config, **kind.options).float()
    text = None if kind.text_norm is None else find_tower(model, "text_model.", kind.text_norm)
    anatomy = Anatomy(
        kind.patch_embed,
        find_tower(model, kind.image, kind.norm),
        text,
        kind.pool,
        _with_weights(model, *kind.heads),
    )
    return model, kind.family, anatomy


def _model_class(kind: _Kind) -> Any:
    import transformers

    return getattr(transformers, kind.model)  # a name out of KINDS: lazily, for transformers is slow to import


def _transformers_size(config: Any) -> tuple[int, int] | None:
    """The size whose grid of positions the weights hold; None for NaFlex, which resamples as it runs."""
    vision = getattr(config, "vision_config", config)  # image-only models have no such part
    return None if config.model_type == "siglip2" else _pair(vision.image_size)


def _transformers_preprocess(where: str, config: Any, kind: _Kind, options: Mapping[str, Any]) -> Preprocess:
    import transformers

    try:
        said = transformers.AutoImageProcessor.from_pretrained(where, **options).to_dict()
    except (OSError, ValueError):
        said = getattr(transformers, kind.processor)().to_dict()
        if (native := _transformers_size(config)) is not None:
            square = {"height": native[0], "width": native[1]}
            said["size"] = {"shortest_edge": min(native)} if said.get("do_center_crop") else square
            said["crop_size"] = square
        log.warning("%s has no preprocessor_config.json; the defaults of %s are taken", where, kind.processor)
    size = {key: value for key, value in (said.get("size") or {}).items() if value is not None}
    crop_size = {key: value for key, value in (said.get("crop_size") or {}).items() if value is not None}
    normalize = said.get("do_normalize", True)
    common = {
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


def _clip_vision(model: Any, images: Tensor) -> Tensor:
    side = model.vision_model.embeddings.image_size
    other = tuple(images.shape[-2:]) != (side, side)  # not square: resampled at every call, transformers knows one side
    return cast(Tensor, model.vision_model(pixel_values=images, interpolate_pos_encoding=other).pooler_output)


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
    B, channels, H, W = images.shape
    p = vision.embeddings.patch_size
    rows, columns = H // p, W // p
    patches_BTC = images.reshape(B, channels, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    shapes = torch.tensor([[rows, columns]], device=images.device).expand(B, 2)
    mask = torch.ones(B, rows * columns, dtype=torch.int32, device=images.device)
    return cast(Tensor, vision(patches_BTC, pixel_attention_mask=mask, spatial_shapes=shapes).pooler_output)


def _vit_image(model: nn.Module, images: Tensor) -> Tensor:
    vit = cast(Any, model)
    other = tuple(images.shape[-2:]) != _pair(vit.embeddings.patch_embeddings.image_size)
    return cast(Tensor, vit(pixel_values=images, interpolate_pos_encoding=other).last_hidden_state[:, 0])


def _dino_image(model: nn.Module, images: Tensor) -> Tensor:
    return cast(Tensor, cast(Any, model)(pixel_values=images).last_hidden_state[:, 0])


def _clip_resize(model: nn.Module, size: tuple[int, int]) -> None:
    vision = cast(Any, model).vision_model
    embeddings = vision.embeddings
    _check_divides(size, embeddings.patch_size)
    if size[0] != size[1]:
        return  # the forward resamples
    new = size[0] // embeddings.patch_size
    prefix = int(hasattr(embeddings, "class_embedding"))  # CLIP has a class token, SigLIP none
    old = round((embeddings.position_embedding.weight.shape[0] - prefix) ** 0.5)
    weight = _resample(embeddings.position_embedding.weight, (old, old), (new, new), prefix=prefix, antialias=False)
    embeddings.position_embedding.weight = weight
    embeddings.position_embedding.num_embeddings = embeddings.num_positions = weight.shape[0]
    embeddings.num_patches = new * new
    embeddings.position_ids = torch.arange(weight.shape[0], device=weight.device).expand((1, -1))
    embeddings.image_size = vision.config.image_size = size[0]


def _naflex_resize(model: nn.Module, size: tuple[int, int]) -> None:
    _check_divides(size, cast(Any, model).vision_model.embeddings.patch_size)


def _vit_resize(model: nn.Module, size: tuple[int, int]) -> None:
    embeddings = cast(Any, model).embeddings
    patches = embeddings.patch_embeddings
    _check_divides(size, patches.patch_size)
    if size[0] != size[1]:
        return  # the forward resamples
    patch = _pair(patches.patch_size) or (1, 1)
    new = (size[0] // patch[0], size[1] // patch[1])
    old = round((embeddings.position_embeddings.shape[1] - 1) ** 0.5)
    positions = _resample(embeddings.position_embeddings[0], (old, old), new, prefix=1, antialias=False)
    embeddings.position_embeddings = nn.Parameter(
        positions[None].detach(), embeddings.position_embeddings.requires_grad
    )
    patches.num_patches = new[0] * new[1]
    patches.image_size = size
    cast(Any, model).config.image_size = size[0]
    if hasattr(embeddings, "image_size"):  # ViT keeps a second copy
        embeddings.image_size = size


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


CLIP = Family("transformers", _clip_image, _clip_text, _clip_resize)
SIGLIP = Family("transformers", _siglip_image, _siglip_text, _clip_resize)
NAFLEX = Family("transformers", _naflex_image, _siglip_text, _naflex_resize)
VIT = Family("transformers", _vit_image, None, _vit_resize)
DINO = Family("transformers", _dino_image, None, _vit_resize)

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


# -------------------------------------------------------------------------------------------------------------- tokenizers


class OpenClipTokenizer:
    """open_clip's tokenizer: its own byte-pair one, or one of transformers in open_clip's wrapper.

    CLIPA's `reduction_mask` (a random choice of the words of a long text) is left out: the same text, the same tokens.
    """

    def __init__(self, inner: Any, context_length: int, settings: Mapping[str, Any], wrapped: bool) -> None:
        self.inner = inner
        self.context_length = context_length
        self.settings = dict(settings)
        self.wrapped = wrapped

    def __call__(self, texts: list[str]) -> Int[Tensor, "B L"]:
        """Token ids, padded or cut to `context_length`."""
        if not texts:
            return torch.zeros(0, self.context_length, dtype=torch.long)
        return cast(Tensor, self.inner(texts, context_length=self.context_length))

    def lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text before it is cut, start and end included."""
        if not self.wrapped:
            return [len(self.inner.encode(text)) + 2 for text in texts]
        if not texts:
            return []
        clean = [self.inner.clean_fn(text) for text in texts]
        if self.settings.get("tokenizer_mode") == "clips":  # open_clip adds start, end and class tokens itself
            return [len(ids) + 3 for ids in self.inner.tokenizer(clean, add_special_tokens=False)["input_ids"]]
        return _untruncated(self.inner.tokenizer, clean)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the tokenizer's files, if it has any."""
        if self.wrapped:
            self.inner.tokenizer.save_pretrained(folder / "tokenizer")
        return {
            "kind": "open_clip",
            "context_length": self.context_length,
            "wrapped": self.wrapped,
            "settings": self.settings,
        }

    @classmethod
    def restore(cls, config: Mapping[str, Any], folder: Path) -> OpenClipTokenizer:
        """What `save` wrote."""
        return cls.make(
            config["context_length"],
            config["settings"],
            str(folder / "tokenizer") if config["wrapped"] else None,
            {"local_files_only": True},
        )

    @classmethod
    def make(
        cls, context_length: int, settings: Mapping[str, Any], source: str | None, options: Mapping[str, Any]
    ) -> OpenClipTokenizer:
        """From open_clip's settings; `source` is a folder or a repository of transformers, None for open_clip's own."""
        from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

        if source is None:
            inner = SimpleTokenizer(context_length=context_length, **settings)
        else:
            inner = HFTokenizer(source, context_length=context_length, **settings, **options)
        return cls(inner, context_length, settings, source is not None)


def _open_clip_tokenizer(text_cfg: Mapping[str, Any], hub: _Hub, folder: Path | None) -> Tokenizer:
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
        return _without_tokenizer(source, context_length, error)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
"""A folder with any of these has a tokenizer of transformers."""


class TransformersTokenizer:
    """A tokenizer of transformers: ids padded or cut to one length."""

    def __init__(self, inner: Any, context_length: int) -> None:
        self.inner = inner
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> Int[Tensor, "B L"]:
        """Token ids, padded or cut to `context_length`."""
        if not texts:
            return torch.zeros(0, self.context_length, dtype=torch.long)
        ids = self.inner(
            texts, padding="max_length", truncation=True, max_length=self.context_length, return_tensors="pt"
        )
        return cast(Tensor, ids["input_ids"])

    def lengths(self, texts: list[str]) -> list[int]:
        """Tokens of each text before it is cut, start and end included."""
        return _untruncated(self.inner, texts) if texts else []

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the tokenizer's files."""
        self.inner.save_pretrained(folder / "tokenizer")
        return {"kind": "transformers", "context_length": self.context_length}

    @classmethod
    def restore(cls, config: Mapping[str, Any], folder: Path) -> TransformersTokenizer:
        """What `save` wrote."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True), config["context_length"])


def _untruncated(tokenizer: Any, texts: list[str]) -> list[int]:
    logging.getLogger("transformers.tokenization_utils_base")
    return [len(ids) for ids in tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]]


def _transformers_tokenizer(where: str, context_length: int, options: Mapping[str, Any]) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        inner = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError) as error:
        return _without_tokenizer(where, context_length, error)
    return TransformersTokenizer(inner, context_length)


class MissingTokenizer:
    """Stands where a tokenizer could not be had: images work, texts say why not."""

    def __init__(self, reason: str, context_length: int) -> None:
        self.reason = reason
        self.context_length = context_length

    def __call__(self, texts: list[str]) -> Int[Tensor, "B L"]:
        """Raise InputError."""
        raise InputError(self.reason)

    def lengths(self, texts: list[str]) -> list[int]:
        """Raise InputError."""
        raise InputError(self.reason)

    def save(self, folder: Path) -> dict[str, Any]:
        """Keep the reason."""
        return {"kind": "missing", "reason": self.reason, "context_length": self.context_length}

    @classmethod
    def restore(cls, config: Mapping[str, Any], folder: Path) -> MissingTokenizer:
        """What `save` wrote."""
        return cls(config["reason"], config["context_length"])


def _without_tokenizer(source: str, context_length: int, error: Exception) -> Tokenizer:
    reason = (
        f"the tokenizer of {source} could not be loaded ({_first_line(error)}), so texts cannot be embedded; put its files "
        "(tokenizer.json, tokenizer_config.json) into the folder of the model, or load it once with a network"
    )
    log.warning("%s", reason)
    return MissingTokenizer(reason, context_length)


TOKENIZERS: dict[str, type[OpenClipTokenizer] | type[TransformersTokenizer] | type[MissingTokenizer]] = {
    "open_clip": OpenClipTokenizer,
    "transformers": TransformersTokenizer,
    "missing": MissingTokenizer,
}
"""The "kind" in a saved folder -> the class that restores it."""


# ------------------------------------------------------------------------------------------------------------------- words


def _nearest(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(near)})" if near else ""


FAMILIES: dict[str, _Loader] = {
    "timm": _Loader(_load_timm, _build_timm),
    "open_clip": _Loader(_load_open_clip, _build_open_clip),
    "transformers": _Loader(_load_transformers, _build_transformers),
}
"""The word before the colon of a uri -> its loader."""
