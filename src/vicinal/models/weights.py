"""Weights on their way in: the Hub and its cache, files of tensors, strict loading, licences.

Nothing that a file holds is ever run: safetensors, or `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from vicinal.models.encoder import Tokenizer
from vicinal.types import InputError, Preprocess

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = [
    "LICENCES",
    "Crop",
    "Found",
    "Hub",
    "card_licence",
    "config_json",
    "first_line",
    "known_licence",
    "load_strictly",
    "log",
    "misfit",
    "mismatches",
    "nearest",
    "read_weights",
    "say_licence",
]

log = logging.getLogger("vicinal")

Crop = Literal["crop", "pad", "squash"]
"""How `Preprocess` makes an image fit."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a uri leads to, before anything large is read or downloaded.

    Args:
        architecture: JSON from which its family builds the module.
        preprocess: what the model was trained to see.
        weights: module -> the module with its weights (it may be another one, of the same architecture); None: random.
        grid: the input size whose positions the weights hold, where it is not that of `preprocess`.
        licence: of the weights, None where unknown.
        tokenizer: None without a text tower.
    """

    architecture: dict[str, Any]
    preprocess: Preprocess
    weights: Callable[[nn.Module], nn.Module] | None
    grid: tuple[int, int] | None = None
    licence: str | None = None
    tokenizer: Tokenizer | None = None


class Hub:
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

    def url(self, url: str, instead: str) -> Path:
        """A file that is published outside the Hub; `instead` as in `file`."""
        folder = self.cache_dir or Path(torch.hub.get_dir()) / "checkpoints"
        file = folder / Path(url).name
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(url, str(file))
            except OSError as error:
                raise InputError(
                    f"{url} could not be downloaded ({error}); fetch it elsewhere and put it into {folder}, or use "
                    f"{instead}"
                ) from error
        return file

    def advice(self, what: str, instead: str) -> str:
        """What to do without a network."""
        place = f"in {self.cache_dir}" if self.cache_dir else "in its cache"
        return (
            f"the Hugging Face Hub does not answer, and {what} is not {place}. On a machine with a network, download "
            f"it from the Hub, copy it here and use {instead}; or copy that machine's cache and pass it as cache_dir"
        )


def read_weights(path: Path) -> dict[str, Tensor]:
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
    items = state.items() if isinstance(state, dict) else ()
    tensors = {key: value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{path} holds no state_dict; save `model.state_dict()` as .safetensors")
    prefix = "module."  # what DistributedDataParallel puts before every name
    return {key.removeprefix(prefix): value for key, value in tensors.items()}


def mismatches(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What keeps `state` from being the weights of `model`, one line for each tensor."""
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


def load_strictly(model: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load all of `state` into all of `model`.

    Raises:
        InputError: a name is missing or unknown, or a shape differs; `where` names the file.
    """
    if wrong := mismatches(model, state):
        raise InputError(misfit(where, wrong))
    model.load_state_dict(state, strict=True)


def misfit(where: str, wrong: Sequence[str]) -> str:
    """The message that weights do not fit, with the first of the reasons."""
    shown = "\n  ".join(wrong[:12])
    more = f"\n  … and {len(wrong) - 12} more" if len(wrong) > 12 else ""
    return f"the weights of {where} do not fit the architecture ({len(wrong)} differences):\n  {shown}{more}"


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


def known_licence(uri: str) -> str | None:
    """The licence of published weights, from the table.

    >>> known_licence("open_clip:ViT-B-16/openai")
    'mit'
    """
    return next((licence for pattern, licence in LICENCES if re.search(pattern, uri)), None)


def card_licence(folder: Path) -> str | None:
    """What the model card of a local folder says."""
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    header = re.match(r"---\n(.*?)\n---", card, re.DOTALL)
    found = re.search(r"^license:\s*(\S+)", header.group(1), re.MULTILINE) if header else None
    return found.group(1) if found else None


def say_licence(uri: str, licence: str | None) -> None:
    """Log the licence: as a warning, where it restricts what one may do."""
    if licence is None:
        log.info("%s: licence of the weights unknown here, see the model card", uri)
    elif any(word in licence.lower() for word in RESTRICTED):
        log.warning("%s: licence of the weights: %s. Read its terms before any commercial use", uri, licence)
    else:
        log.info("%s: licence of the weights: %s", uri, licence)


def nearest(word: str, words: Iterable[str]) -> str:
    """For an error message: the words most like `word`, in brackets, or nothing.

    >>> nearest("vit_tiny", ["vit_tiny_16", "resnet18"])
    ' (nearest: vit_tiny_16)'
    """
    near = difflib.get_close_matches(word, list(words), n=3, cutoff=0.5)
    return f" (nearest: {', '.join(near)})" if near else ""


def config_json(config: PretrainedConfig) -> dict[str, Any]:
    """A configuration of transformers as JSON, without what changes when a model is exported and read back.

    That is the path it was read from, how its numbers were stored, and who wrote it: an export has the fingerprint of
    what it was made from.
    """
    content = json.loads(config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "dtype", "transformers_version"):
        content.pop(name, None)
    return cast("dict[str, Any]", content)


def first_line(error: Exception) -> str:
    """Of an error's message, which in these libraries can be a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
