"""export: an encoder -> a folder that another library loads, compared with the encoder before it is kept.

    d = max over rows of  max |theirs - ours| / ||ours||        the difference that `tolerance` limits

ours: vectors of this encoder, adapters in place, in float32; theirs: those of the other library, in a fresh process,
from the merged folder. Pictures that each side fits to the model's size by itself differ by what their resampling
differs (Pillow here, torchvision there), so these have a limit of their own, `RESAMPLING`.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import vicinal
from vicinal.data.transforms import eval_transform
from vicinal.models.adapters import merge
from vicinal.models.encoder import Encoder, Tokenizer
from vicinal.models.tokenizers import MissingTokenizer, OpenClipTokenizer, TransformersTokenizer
from vicinal.serving import parity
from vicinal.serving.layouts import clip_to_open_clip, open_clip_to_transformers
from vicinal.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FORMATS", "MARK", "RESAMPLING", "Format", "export"]

Format = Literal["transformers", "open_clip"]

MARK: Final = "vicinal_export.json"
"""In every export: formats, source, fingerprint of the encoder, the differences found. Marks what may be replaced."""

RESAMPLING: Final = 0.1
"""The limit of d for pictures that each library resizes by itself. Two correct resizes differ by .01 to .03 on nano."""

TEXTS: Final = (
    "a photo of a bird",
    "small Greek letter alpha",
    "two red shoes on a white table",
    "a very long caption " * 40,
)
"""What text towers are compared on; the last is longer than any context."""


def export(
    encoder: Encoder,
    out: str | Path,
    *,
    format: Format | Sequence[Format],
    pictures: Sequence[Image.Image | str | Path] | None = None,
    tolerance: float = 1e-3,
) -> Path:
    """Write a folder that another library loads, without vicinal; load it there, compare, and only then keep it.

    Args:
        encoder: of any family, adapted or not. Low-rank updates are merged into the weights.
        out: the folder; an earlier export there is replaced.
        format: one of `FORMATS`, or several that share one folder ("transformers" and "open_clip" can).
        pictures: images or files to compare on, the more like yours the better; None: eight that are drawn.
        tolerance: the largest difference d of the vectors, see the module.

    Raises:
        InputError: the format cannot hold the model (the message says which can), the vectors differ by more than
            `tolerance` (it says by how much), a library is missing, or `out` holds something else. Nothing is left
            behind.
    """
    formats = (format,) if isinstance(format, str) else tuple(format)
    _check_formats(formats)
    out = Path(out)
    if out.exists() and not (out.is_dir() and ((out / MARK).is_file() or not any(out.iterdir()))):
        raise InputError(f"{out} exists and is not an export; choose another folder or remove it")
    plain = merge(encoder).cpu().float().eval()
    for name in formats:
        _check_held(plain, name)
    views = _views(encoder, pictures)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.parent / f".{out.name}.{uuid.uuid4().hex}"  # not tempfile's, which nobody else could read
    fresh = scratch / out.name
    fresh.mkdir(parents=True)
    try:
        for name in formats:
            FORMATS[name].write(plain, fresh)
        ours = _ours(encoder, views)
        found = {name: _compare(name, fresh, views, ours, tolerance) for name in formats}
        mark = {
            "formats": formats,
            "source": encoder.source,
            "licence": encoder.licence,
            "fingerprint": encoder.fingerprint(),
            "vicinal": vicinal.__version__,
            "differences": found,
        }
        (fresh / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
        for file in fresh.iterdir():  # safetensors makes its files readable by their owner alone
            file.chmod((fresh / MARK).stat().st_mode)
        _put_in_place(fresh, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _check_formats(formats: Sequence[str]) -> None:
    for name in formats:
        if name not in FORMATS:
            near = difflib.get_close_matches(name, FORMATS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"there is no format {name!r}{hint} There are {', '.join(FORMATS)}")
    if not formats:
        raise InputError(f"which format? There are {', '.join(FORMATS)}")


def _check_held(plain: Encoder, name: str) -> None:
    """Refuse what the format cannot hold, and say which can."""
    if (reason := _refusal(plain, name)) is not None:
        others = [other for other in FORMATS if other != name and _refusal(plain, other) is None]
        can = f"it can be exported as {' or '.join(others)}" if others else "no format of others can hold it"
        raise InputError(f"{plain.source} cannot be exported as {name}: {reason}; {can} (`encoder.save` keeps all)")


def _refusal(plain: Encoder, name: str) -> str | None:
    try:
        FORMATS[name].check(plain)
    except InputError as error:
        return str(error)
    return None


def _put_in_place(fresh: Path, out: Path) -> None:
    """A folder cannot be renamed over a full one: the old one is moved aside first, and back if that fails."""
    if not out.exists():
        fresh.rename(out)
        return
    old = fresh.with_name("old")
    out.rename(old)
    try:
        fresh.rename(out)
    except OSError:
        old.rename(out)
        raise


# What can be held ------------------------------------------------------------------------------------------------


def _check_plain(plain: Encoder) -> None:
    """The model is one that its own library builds, and takes square images."""
    if plain.adapters or not isinstance(plain.head, nn.Identity) or plain.prompts is not None:
        kinds = ", ".join(type(method).__name__ for method in plain.adapters) or "a head"
        raise InputError(f"its layout has no place for what adaptation has added ({kinds})")
    if isinstance(plain.tokenizer, MissingTokenizer):
        raise InputError(plain.tokenizer.reason)


def _check_open_clip(plain: Encoder) -> None:
    _check_plain(plain)
    if plain.family.name == "open_clip":
        if plain.architecture["size"] is not None and hasattr(plain.model.visual, "trunk"):
            raise InputError("open_clip builds a timm tower at its own size only")
    elif _model_type(plain) == "clip":
        if plain.preprocess.size[0] != plain.preprocess.size[1]:
            raise InputError("its images are not square, so its positions are resampled at every call")
        clip_to_open_clip(plain.model, plain.preprocess.size[0])
    else:
        raise InputError(f"open_clip has no {_kind(plain)} of this layout")
    if plain.preprocess.crop == "crop" and plain.preprocess.crop_pct != 1:
        raise InputError(
            f"open_clip's crop keeps all of the short side, this model's keeps {plain.preprocess.crop_pct:.3f} of it; "
            "load it with crop='squash' or 'pad'"
        )


def _check_transformers(plain: Encoder) -> None:
    _check_plain(plain)
    if plain.preprocess.size[0] != plain.preprocess.size[1]:
        raise InputError("transformers' positions are of square images")
    if plain.preprocess.crop == "pad":
        raise InputError("transformers' processors do not pad; load it with crop='squash' or 'crop'")
    if plain.family.name == "open_clip":
        _as_transformers(plain)
    elif plain.family.name != "transformers":
        raise InputError(f"transformers has no {_kind(plain)} of this layout")
    elif _model_type(plain) == "siglip2":
        raise InputError("transformers' own processor of it keeps the aspect ratio, which a batch of one size cannot")


def _model_type(plain: Encoder) -> str | None:
    return str(cast(Any, plain.model).config.model_type) if plain.family.name == "transformers" else None


def _kind(plain: Encoder) -> str:
    return f"{plain.family.name} {_model_type(plain) or type(plain.model).__name__}"


# Writing ---------------------------------------------------------------------------------------------------------


def _write_open_clip(plain: Encoder, folder: Path) -> None:
    """open_clip_config.json, open_clip_model.safetensors, and the tokenizer's files where it is one of transformers."""
    seen = plain.preprocess
    if plain.family.name == "open_clip":
        model_cfg = copy.deepcopy(plain.architecture["config"])
        model_cfg["vision_cfg"]["image_size"] = list(seen.size) if seen.size[0] != seen.size[1] else seen.size[0]
        state = plain.model.state_dict()
    else:
        model_cfg, state = clip_to_open_clip(plain.model, seen.size[0])
    tokenizer = plain.tokenizer
    inner = tokenizer.inner if isinstance(tokenizer, TransformersTokenizer) else None
    if isinstance(tokenizer, OpenClipTokenizer) and tokenizer.wrapped:
        inner = cast(Any, tokenizer.inner).tokenizer
    if inner is not None:
        inner.save_pretrained(folder)
        # open_clip looks into a local folder whatever the name; from the Hub it takes the name, see `push_to_hub`
        model_cfg["text_cfg"].setdefault("hf_tokenizer_name", folder.name)
    preprocess_cfg: dict[str, Any] = {
        "mean": seen.mean,
        "std": seen.std,
        "interpolation": seen.interpolation,
        "resize_mode": {"crop": "shortest", "pad": "longest", "squash": "squash"}[seen.crop],
    }
    if seen.crop == "pad":
        preprocess_cfg["fill_color"] = [round(255 * mean) for mean in seen.mean]
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _save_state(state, folder / "open_clip_model.safetensors")


def _save_state(state: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().clone() for name, tensor in state.items()}, file, {"format": "pt"})


def _write_transformers(plain: Encoder, folder: Path) -> None:
    """config.json, model.safetensors, preprocessor_config.json and the tokenizer's files."""
    import transformers

    seen = plain.preprocess
    model = cast(Any, plain.model if plain.family.name == "transformers" else _as_transformers(plain))
    vision = getattr(model.config, "vision_config", model.config)  # image-only models have no such part
    vision.image_size = seen.size[0]
    model.save_pretrained(folder)
    settings: dict[str, Any] = {
        "image_mean": list(seen.mean),
        "image_std": list(seen.std),
        "resample": {"bilinear": 2, "bicubic": 3}[seen.interpolation],  # PIL's numbers
    }
    square = {"height": seen.size[0], "width": seen.size[1]}
    if seen.crop == "crop":
        short = int(seen.size[0] / seen.crop_pct)
        settings |= {"size": {"shortest_edge": short}, "do_center_crop": True, "crop_size": square}
    else:
        settings |= {"size": square, "do_center_crop": False}
    siglip = model.config.model_type == "siglip" and seen.crop == "squash"
    kind = transformers.SiglipImageProcessor if siglip else transformers.CLIPImageProcessor
    kind(**settings).save_pretrained(folder)
    if plain.tokenizer is not None:
        tokenizer = _tokenizer_of_transformers(plain.tokenizer)
        tokenizer.model_max_length = plain.tokenizer.context_length
        tokenizer.save_pretrained(folder)


def _as_transformers(plain: Encoder) -> nn.Module:
    tokenizer = _tokenizer_of_transformers(plain.tokenizer)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    special = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    config = plain.architecture["config"]
    return cast(nn.Module, open_clip_to_transformers(plain.model, config, plain.preprocess.size[0], special))


def _tokenizer_of_transformers(tokenizer: Tokenizer | None) -> PreTrainedTokenizerBase:
    """A tokenizer of transformers that gives the same tokens."""
    if isinstance(tokenizer, TransformersTokenizer):
        return tokenizer.inner
    if not isinstance(tokenizer, OpenClipTokenizer):
        raise InputError("its tokenizer is none of transformers or open_clip")
    if tokenizer.wrapped:
        return _with_cleaning(
            copy.deepcopy(cast(Any, tokenizer.inner).tokenizer), tokenizer.settings.get("clean", "whitespace")
        )
    from transformers import CLIPTokenizer

    inner = cast(Any, tokenizer.inner)  # open_clip's own: the same byte pairs, other names for start and end
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): row for token, row in inner.encoder.items()}
    merges = [pair for pair, _ in sorted(inner.bpe_ranks.items(), key=lambda item: item[1])]
    return cast("PreTrainedTokenizerBase", CLIPTokenizer(vocab=vocabulary, merges=merges))


def _with_cleaning(tokenizer: PreTrainedTokenizerBase, clean: str) -> PreTrainedTokenizerBase:
    """What open_clip does to a text before its tokenizer, done by the tokenizer."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if clean in ("lower", "canonicalize"):
        steps.append(normalizers.Lowercase())
    if clean == "canonicalize":
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(r"[!-/:-@\[-`{-~]"), "")]
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    backend = cast(Any, tokenizer).backend_tokenizer
    backend.normalizer = normalizers.Sequence([*steps, *([backend.normalizer] if backend.normalizer else [])])
    return tokenizer


# Comparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Views:
    """What both sides encode."""

    images: Tensor
    pictures: Sequence[Image.Image]
    texts: Sequence[str]


def _views(encoder: Encoder, pictures: Sequence[Image.Image | str | Path] | None) -> _Views:
    opened = _drawn(encoder.preprocess.size) if pictures is None else [_opened(picture) for picture in pictures]
    if not opened:
        raise InputError("an export is compared on pictures: give at least one, or leave `pictures` out")
    transform = eval_transform(encoder.preprocess)
    seen = [transform(torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()) for picture in opened]
    reads = encoder.family.encode_text is not None and isinstance(encoder.head, nn.Identity)
    return _Views(torch.stack(seen).contiguous(), opened, TEXTS if reads else ())


def _opened(picture: Image.Image | str | Path) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    try:
        with Image.open(picture) as file:
            return file.convert("RGB")
    except OSError as error:
        raise InputError(f"{picture} cannot be read as a picture ({error})") from error


def _drawn(size: tuple[int, int]) -> list[Image.Image]:
    """Eight smooth, coloured pictures, four of the model's size and four larger and not square."""
    generator = np.random.default_rng(7)
    height, width = size
    pictures = []
    for row in range(8):
        coarse = Image.fromarray(generator.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        shape = (width, height) if row < 4 else (width * 3 // 2 + row, height * 4 // 3)
        pictures.append(coarse.resize(shape, Image.Resampling.BICUBIC))
    return pictures


@torch.no_grad()
def _ours(encoder: Encoder, views: _Views) -> dict[str, Tensor]:
    """Vectors of the encoder as it is, adapters apart, on the CPU in float32."""
    own = copy.deepcopy(encoder).cpu().float().eval()
    images = own.encode_image(views.images)
    found = {"images": images, "pictures": images}
    if views.texts:
        found["texts"] = own.encode_text(views.texts)
        model = cast(Any, own.model)
        logits = [getattr(model, name, None) for name in ("logit_scale", "logit_bias")]  # not all have both
        found["logits"] = torch.stack([value.reshape(()) for value in logits if value is not None])
    return {name: value.float() for name, value in found.items()}


def _compare(name: str, folder: Path, views: _Views, ours: Mapping[str, Tensor], tolerance: float) -> dict[str, float]:
    """Differences by what was encoded.

    Raises:
        InputError: one is above its limit.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        save_file({"images": views.images}, work / "inputs.safetensors")
        (work / "texts.json").write_text(json.dumps(list(views.texts)), encoding="utf-8")
        for row, picture in enumerate(views.pictures):
            picture.save(work / f"{row}.png")
        _in_fresh_process(name, folder, work)
        theirs = load_file(work / "outputs.safetensors")
    found = {key: _difference(ours[key], value) for key, value in theirs.items()}
    for key, value in found.items():
        limit = max(tolerance, RESAMPLING) if key == "pictures" else tolerance
        if not value <= limit:  # NaN is above every limit
            raise InputError(
                f"{name} loads the export, but its {key} differ by {value:.2e}, more than {limit:g}; nothing is kept"
            )
    return found


def _difference(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        return float("inf")
    if ours.dim() == 1:
        return float((theirs - ours).abs().max())
    return float(((theirs - ours).abs().amax(1) / ours.norm(dim=1)).max())


def _in_fresh_process(name: str, folder: Path, work: Path) -> None:
    """-P: the folder of the script is no place to import from. No network: what is exported must be enough."""
    command = [sys.executable, "-P", str(Path(parity.__file__)), name, str(folder.resolve()), str(work)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise InputError(f"{name} cannot load the export ({last}); nothing is kept")


@dataclass(frozen=True, slots=True)
class _Format:
    """How one library's layout is written: `check` raises InputError where it cannot hold the model."""

    check: Callable[[Encoder], None]
    write: Callable[[Encoder, Path], None]


FORMATS: Final[Mapping[str, _Format]] = {
    "transformers": _Format(_check_transformers, _write_transformers),
    "open_clip": _Format(_check_open_clip, _write_open_clip),
}
"""Name -> how it is written. `parity.FORMATS` says how it is loaded."""
assert tuple(FORMATS) == get_args(Format)
