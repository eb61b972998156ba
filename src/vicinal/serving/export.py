"""export: an encoder -> a folder that another library loads, compared with the encoder before it is kept.

    d = max over rows of  max |theirs - ours| / ||ours||        the difference that `tolerance` limits

ours: vectors of this encoder, adapters in place, in float32; theirs: those of the other library, in a fresh process,
from the merged folder. Pictures that each side fits to the model's size by itself differ by what their resampling
differs (Pillow here, torchvision there), so these have a limit of their own, `RESAMPLING`.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vicinal.data.transforms import eval_transform
from vicinal.heads.calibration import OpenSetThreshold
from vicinal.models.adapters import BitFit, merge, save_peft
from vicinal.models.encoder import Encoder, Tokenizer
from vicinal.models.modules import put
from vicinal.models.tokenizers import MissingTokenizer, OpenClipTokenizer, TransformersTokenizer
from vicinal.serving import parity
from vicinal.serving.card import base_model, model_card, threshold_on_card
from vicinal.serving.layouts import clip_to_open_clip, open_clip_to_transformers
from vicinal.serving.objects import THRESHOLD_NAME, open_encoder
from vicinal.serving.parity import Given
from vicinal.types import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FORMATS", "MARK", "RESAMPLING", "Format", "export", "push_to_hub"]

OPEN_CLIP_CONFIG: Final = "open_clip_config.json"

MARK: Final = "vicinal_export.json"
"""In every export: formats, source, fingerprint of the encoder, the differences found. Marks what may be replaced."""

RESAMPLING: Final = 0.1
"""The limit of d for pictures that each library fits by itself. Pillow and torchvision differ by a level or two in 255,
and transformers cuts the centre one pixel off ours where the rest is odd: d up to .003 on `vicinal:nano`, up to .044 on
random models of 32 pixels. With another library's mean, or another crop, nano is at .17 or more."""

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
    format: str | Sequence[str],
    merged: bool | None = None,
    pictures: Sequence[Image.Image | str | Path] | None = None,
    tolerance: float = 1e-3,
    card: Mapping[str, Any] | None = None,
    threshold: str | Path | OpenSetThreshold | None = None,
) -> Path:
    """Write a folder that another library loads, without vicinal; load it there, compare, and only then keep it.

    - "transformers": `AutoModel` and `AutoProcessor`; a whole CLIPModel or SiglipModel, or the image model it was.
    - "open_clip": `create_model_and_transforms("local-dir:FOLDER")` and `get_tokenizer("local-dir:FOLDER")`.
    - "sentence_transformers": `SentenceTransformer(FOLDER)`, which encodes pictures and texts.
    - "onnx": image.onnx and text.onnx for onnxruntime, any number of items; what they expect is in onnx.json.
    - "adapter": the low-rank updates alone, for `peft.PeftModel.from_pretrained(model, FOLDER)`.

    Args:
        encoder: of any family, adapted or not.
        out: the folder; an earlier export there is replaced.
        format: one of `FORMATS`, or several that share one folder: "transformers", "open_clip" and "onnx" can.
        merged: whether low-rank updates are summed into the weights. None: as the format has it, which is True for all
            but "adapter"; the other answer is refused.
        pictures: images or files to compare on, the more like yours the better; None: eight that are drawn.
        tolerance: the largest difference d of the vectors, see the module.
        card: what the model card says besides the licence: "data", "results" (as in results.json), "threshold", and
            whatever else; text, or mappings of it.
        threshold: fitted for this encoder, or the file of one: it goes along as threshold.json, bound to the export as
            `load_encoder` reads it, and onto the card.

    Raises:
        InputError: the format cannot hold the model (the message says which can), the vectors differ by more than
            `tolerance` (it says by how much), a library is missing, the threshold is another model's, or `out` holds
            something else. Nothing is left behind.
    """
    formats: tuple[str, ...] = (format,) if isinstance(format, str) else tuple(format)
    _check_formats(formats, merged)
    out = Path(out)
    if out.exists() and not (out.is_dir() and ((out / MARK).is_file() or not any(out.iterdir()))):
        raise InputError(f"{out} exists and is not an export; choose another folder or remove it")
    rule = OpenSetThreshold.load(threshold) if isinstance(threshold, str | Path) else threshold
    if rule is not None:
        rule.check(fingerprint=encoder.fingerprint(), settings=rule.settings_)
    forms = _Forms.of(encoder)
    for name in formats:
        _check_held(forms, name)
    given = _given(forms.own, pictures)
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.parent / f".{out.name}.{uuid.uuid4().hex}"  # not tempfile's, which nobody else could read
    fresh = scratch / out.name
    fresh.mkdir(parents=True)
    try:
        for name in formats:
            FORMATS[name].write(forms.of_format(name), fresh)
        ours = _ours(forms.own, given)
        found = {name: _compare(name, fresh, forms.own, given, ours, tolerance) for name in formats}
        said = dict(card or {})
        if rule is not None:
            _bound_to(rule, fresh, formats).save(fresh / THRESHOLD_NAME)
            said = {"threshold": threshold_on_card(rule), **said}
        (fresh / "README.md").write_text(model_card(out.name, encoder, found, said), encoding="utf-8")
        mark = {
            "formats": formats,
            "source": encoder.source,
            "licence": encoder.licence,
            "fingerprint": encoder.fingerprint(),
            "vicinal": version("vicinal"),
            "differences": found,
        }
        (fresh / MARK).write_text(json.dumps(mark, indent=2) + "\n", encoding="utf-8")
        for file in fresh.rglob("*"):  # safetensors makes its files readable by their owner alone
            if file.is_file():
                file.chmod((fresh / MARK).stat().st_mode)
        _put_in_place(fresh, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _bound_to(rule: OpenSetThreshold, folder: Path, formats: Sequence[str]) -> OpenSetThreshold:
    """The same threshold for the export, whose vectors are the encoder's own, as they were just found to be."""
    if not {"transformers", "open_clip", "sentence_transformers"} & set(formats):
        return rule  # no encoder is loaded from graphs, or from updates alone
    other = copy.copy(rule)
    other.fingerprint_ = open_encoder(folder).fingerprint()
    return other


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
    """Upload an export to the Hugging Face Hub, in one commit; its url.

    Args:
        folder: what `export` wrote.
        repo_id: ORG/NAME; made if it is not there.
        private: whether a new one is.
        token: None: that of `hf auth login`.

    Raises:
        InputError: `folder` is no export.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder)
    if not (folder / MARK).is_file():
        raise InputError(f"{folder} is not an export ({MARK} is missing); make one with `vicinal export`")
    files: dict[str, bytes | Path] = {
        file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()
    }
    if (config := folder / OPEN_CLIP_CONFIG).is_file():  # from the Hub, open_clip takes the tokenizer by this name
        content = json.loads(config.read_text(encoding="utf-8"))
        if content["model_cfg"]["text_cfg"].get("hf_tokenizer_name"):
            content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = repo_id
        files[config.name] = json.dumps(content, indent=2).encode()
    api = HfApi(token=token)
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()]
    api.create_commit(repo_id, operations, commit_message="Exported by vicinal")
    return str(url)


@dataclass(frozen=True, slots=True)
class _Forms:
    """One encoder twice, on the CPU, in float32 and eval mode: with its adapters apart, and merged."""

    own: Encoder
    plain: Encoder

    @classmethod
    def of(cls, encoder: Encoder) -> _Forms:
        own = copy.deepcopy(encoder).cpu().float().eval()
        return cls(own, merge(own).eval())

    def of_format(self, name: str) -> Encoder:
        return self.plain if FORMATS[name].merged else self.own


def _check_formats(formats: Sequence[str], merged: bool | None) -> None:
    for name in formats:
        if name not in FORMATS:
            near = difflib.get_close_matches(name, FORMATS, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise InputError(f"there is no format {name!r}{hint} There are {', '.join(FORMATS)}")
        kind = FORMATS[name]
        if merged not in (None, kind.merged):
            raise InputError(
                f"{name} is always merged; updates apart are format='adapter'"
                if merged is False
                else (f"{name} holds updates apart, never merged; merged weights are {' or '.join(_MERGED)}")
            )
        if missing := [module for module in kind.needs if importlib.util.find_spec(module) is None]:
            raise InputError(f"{name} needs {', '.join(missing)}: pip install 'vicinal[{name.replace('_', '-')}]'")
    alone = [name for name in formats if name in ("sentence_transformers", "adapter")]
    if not formats or (len(formats) > 1 and alone):
        raise InputError(
            f"{alone[0]} takes a folder of its own" if formats else f"which format? There are {', '.join(FORMATS)}"
        )


def _check_held(forms: _Forms, name: str) -> None:
    """Refuse what the format cannot hold, and say which can."""
    if (reason := _refusal(forms, name)) is not None:
        others = [other for other in FORMATS if other != name and _refusal(forms, other) is None]
        can = f"it can be exported as {' or '.join(others)}" if others else "no format of others can hold it"
        raise InputError(f"{forms.own.source} cannot be exported as {name}: {reason}; {can} (`encoder.save` keeps all)")


def _refusal(forms: _Forms, name: str) -> str | None:
    try:
        FORMATS[name].check(forms.of_format(name))
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
        if "hf_model_name" in plain.architecture["config"]["text_cfg"]:
            raise InputError("open_clip would look for the layout of its text tower at the Hub")
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
        _as_transformers(plain, {})
    elif plain.family.name != "transformers":
        raise InputError(f"transformers has no {_kind(plain)} of this layout")
    elif _model_type(plain) == "siglip2":
        raise InputError("transformers' own processor of it keeps the aspect ratio, which a batch of one size cannot")


def _check_sentence_transformers(plain: Encoder) -> None:
    _check_transformers(plain)
    if plain.family.encode_text is None:
        raise InputError("sentence-transformers pools the tokens of an image tower alone in its own way")


def _check_onnx(plain: Encoder) -> None:
    """A graph holds whatever has been added: heads, prompts, bottlenecks."""


def _check_adapter(own: Encoder) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        save_peft(own, scratch)


def _model_type(plain: Encoder) -> str | None:
    return str(cast(Any, plain.model).config.model_type) if plain.family.name == "transformers" else None


def _has_siglip_text(plain: Encoder) -> bool:
    """Whether the padding of a text is part of it."""
    return _model_type(plain) == "siglip" or (hasattr(plain.model, "text") and plain.model.logit_bias is not None)


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
    if not isinstance(plain.tokenizer, OpenClipTokenizer) or plain.tokenizer.wrapped:
        _save_tokenizer(plain, _tokenizer_of_transformers(plain.tokenizer), folder)
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
    (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _save_state(state, folder / "open_clip_model.safetensors")


def _save_state(state: Mapping[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: tensor.detach().cpu().clone() for name, tensor in state.items()}, file, {"format": "pt"})


def _write_transformers(plain: Encoder, folder: Path) -> None:
    """config.json, model.safetensors, preprocessor_config.json and the tokenizer's files."""
    import transformers

    seen = plain.preprocess
    tokenizer = None if plain.tokenizer is None else _tokenizer_of_transformers(plain.tokenizer)
    ids = {name: getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    special = {name: number for name, number in ids.items() if number is not None}  # not every tokenizer has all
    own = plain.family.name == "transformers"
    model = cast(Any, plain.model if own else _as_transformers(plain, special))
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
    if tokenizer is not None:
        _save_tokenizer(plain, tokenizer, folder)


def _save_tokenizer(plain: Encoder, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Its files: the same tokens at the same length, whoever loads them."""
    tokenizer.model_max_length = plain.context_length
    if tokenizer.is_fast:  # it would keep the padding of its last call
        cast(Any, tokenizer).backend_tokenizer.no_padding()
        cast(Any, tokenizer).backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only"):  # how it was loaded here is nothing to those who load it there
        config.pop(key, None)
    if _has_siglip_text(plain):
        config["model_input_names"] = ["input_ids"]  # no mask: SigLIP was trained to see its padding
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_sentence_transformers(plain: Encoder, folder: Path) -> None:
    """What `SentenceTransformer.save_pretrained` writes."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer

    with tempfile.TemporaryDirectory() as scratch:
        _write_transformers(plain, Path(scratch))
        text: dict[str, Any] = {"max_length": plain.context_length, "truncation": True}
        if _has_siglip_text(plain):
            text["padding"] = "max_length"  # it takes its text from the last token, filled up as in training
        model = SentenceTransformer(
            modules=[Transformer(scratch, processing_kwargs={"text": text})], device="cpu", similarity_fn_name="cosine"
        )
        model.save_pretrained(str(folder), create_model_card=False)


def _write_onnx(plain: Encoder, folder: Path) -> None:
    """image.onnx, text.onnx, onnx.json, and the tokenizer's files where it is one of transformers."""
    height, width = plain.preprocess.size
    _write_graph(
        _Call(plain, functools.partial(_encode_image, plain)),
        torch.zeros(2, 3, height, width),
        "images",
        folder / "image.onnx",
    )
    content: dict[str, Any] = {
        "image": {"file": "image.onnx", "input": "images", **dataclasses.asdict(plain.preprocess)},
        "embedding_dim": plain.embedding_dim,
    }
    if _reads(plain):
        encode = functools.partial(cast(Any, plain.family.encode_text), plain.model)
        _write_graph(_Call(plain, encode), plain.tokenize(TEXTS[:2]), "tokens", folder / "text.onnx")
        length, scale, bias = plain.context_length, plain.logit_scale, plain.logit_bias
        content["text"] = {"file": "text.onnx", "input": "tokens", "context_length": length}
        content |= {"logit_scale": scale, "logit_bias": bias}
        _save_tokenizer(plain, _tokenizer_of_transformers(plain.tokenizer), folder)
    (folder / "onnx.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _encode_image(plain: Encoder, images: Tensor) -> Tensor:
    """`Encoder.encode_image`, for any number of images: len() of a tensor would fix theirs in the graph."""
    if plain.prompts is None:
        return plain.encode_image(images)
    tokens = plain.patch_tokens(images)
    of_one = plain.prompts(1, len(plain.anatomy.image.blocks))
    return plain.encode_tokens(tokens, [P if P is None else P.expand(tokens.shape[0], -1, -1) for P in of_one])


class _Call(nn.Module):
    """One of an encoder's functions as a module, which is what the exporter takes."""

    def __init__(self, encoder: Encoder, encode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encoder = encoder
        self.encode = encode

    def forward(self, inputs: Tensor) -> Tensor:
        """Vectors."""
        return self.encode(inputs)


def _write_graph(module: nn.Module, example: Tensor, name: str, file: Path) -> None:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a kernel of its own, which ONNX does not have
    large = sum(p.numel() * p.element_size() for p in module.parameters()) > 1 << 30  # a protobuf ends at 2 GiB
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter's own insides
            torch.onnx.export(
                module.eval(),
                (example,),
                str(file),
                input_names=[name],
                output_names=["embeddings"],
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
                external_data=large,
                verbose=False,
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _write_adapter(own: Encoder, folder: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, under the base model's own name."""
    save_peft(own, folder)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base_model(own.source) or own.source
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _without_updates(own: Encoder) -> nn.Module:
    """The model that an adapter belongs to."""
    model = copy.deepcopy(own.model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):  # peft's layers
            put(model, name, cast(nn.Module, module.base_layer))
    if any(isinstance(method, BitFit) for method in own.adapters):
        with torch.no_grad():  # what they were is not known here; none at all shows whether the adapter brings its own
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and name.endswith("bias"):
                    parameter.zero_()
    return model


def _as_transformers(plain: Encoder, special: Mapping[str, int]) -> nn.Module:
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


def _reads(encoder: Encoder) -> bool:
    """Whether it embeds texts in the space of its images, and can."""
    plain = isinstance(encoder.head, nn.Identity) and not isinstance(encoder.tokenizer, MissingTokenizer)
    return encoder.family.encode_text is not None and plain


def _given(encoder: Encoder, pictures: Sequence[Image.Image | str | Path] | None) -> Given:
    opened = _drawn(encoder.preprocess.size) if pictures is None else [_opened(picture) for picture in pictures]
    if not opened:
        raise InputError("an export is compared on pictures: give at least one, or leave `pictures` out")
    transform = eval_transform(encoder.preprocess)
    seen = [transform(torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()) for picture in opened]
    texts = TEXTS if _reads(encoder) else ()
    tokens = encoder.tokenize(texts) if texts else torch.zeros(0, 0, dtype=torch.long)
    return Given(torch.stack(seen).contiguous(), tokens, opened, texts)


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
def _ours(own: Encoder, given: Given) -> dict[str, Tensor]:
    images = own.encode_image(given.images)
    found = {"images": images, "pictures": images}
    if given.texts:
        found["texts"] = own.encode_text(given.texts)
        model = cast(Any, own.model)
        logits = [getattr(model, name, None) for name in ("logit_scale", "logit_bias")]  # not all have both
        found["logits"] = torch.stack([value.reshape(()) for value in logits if value is not None])
    return found


def _compare(
    name: str, folder: Path, own: Encoder, given: Given, ours: Mapping[str, Tensor], tolerance: float
) -> dict[str, float]:
    """Differences by what was encoded.

    Raises:
        InputError: one is above its limit.
    """
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        given.put(work)
        if name == "adapter":
            torch.save(_without_updates(own), work / "base.pt")
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
class Format:
    """How one library's layout is written.

    Args:
        check: raises InputError where it cannot hold the model.
        write: puts the files into a folder.
        needs: modules that are not among vicinal's own requirements.
        merged: whether updates are summed into the weights.
    """

    check: Callable[[Encoder], None]
    write: Callable[[Encoder, Path], None]
    needs: tuple[str, ...] = ()
    merged: bool = True


FORMATS: Final[Mapping[str, Format]] = {
    "transformers": Format(_check_transformers, _write_transformers),
    "open_clip": Format(_check_open_clip, _write_open_clip),
    "sentence_transformers": Format(
        _check_sentence_transformers, _write_sentence_transformers, ("sentence_transformers",)
    ),
    "onnx": Format(_check_onnx, _write_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "adapter": Format(_check_adapter, _write_adapter, merged=False),
}
"""Name -> how it is written. `parity.FORMATS` says how it is loaded."""

_MERGED: Final = tuple(name for name, kind in FORMATS.items() if kind.merged)
