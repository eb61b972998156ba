"""Encoder: one final class around the model of any family; Anatomy says where its parts are.

    z = head(image(x)),   t = text(tokens)
    image(x) = pool(blocks(tokens(x)))        the two halves that prompts need: `patch_tokens` and `encode_tokens`

x: images, "B 3 H W", resized and normalised as `preprocess` says; z, t: embeddings, "B D", not normalised. `image` and
`text` are plain functions of the family (timm, open_clip, transformers); `head` is the identity, until a LinearHead
replaces it. Dotted names are those of `Encoder.model.named_modules()`.

Letters: B batch, H W height and width in pixels, T tokens of an image, C numbers of each, D numbers an embedding, L
tokens of a text.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vicinal.models.prompts import Halves, Prompts, through_blocks
from vicinal.types import InputError, Preprocess

__all__ = ["CONFIG_NAME", "FORMAT", "WEIGHTS_NAME", "Anatomy", "Encoder", "Family", "Tokenizer", "Tower"]

FORMAT = 1
"""Version of the folder layout that `Encoder.save` writes."""
CONFIG_NAME = "vicinal.json"
WEIGHTS_NAME = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Tower:
    """The transformer blocks of one tower, all of one layout. No blocks: a convolutional network, or an unknown layout.

    Args:
        blocks: dotted names of the blocks, first to last.
        attention: role -> dotted name within a block. Roles: "qkv" (one Linear for all three) or "q", "k", "v"; "out";
            or "fused" alone (an `nn.MultiheadAttention`, whole).
        mlp: dotted names of the Linear layers of the feed-forward part, within a block.
        norm: dotted name, within the model, of the norm after the last block.

    >>> Tower(("blocks.0",), {"qkv": "attn.qkv", "out": "attn.proj"}, ("mlp.fc1", "mlp.fc2"), "norm").layers()
    ('attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2')
    """

    blocks: tuple[str, ...] = ()
    attention: Mapping[str, str] = dataclasses.field(default_factory=dict)
    mlp: tuple[str, ...] = ()
    norm: str | None = None

    def layers(self) -> tuple[str, ...]:
        """Dotted names within a block of all that can be adapted: attention, then mlp."""
        return (*self.attention.values(), *self.mlp)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Where the parts of a model are: dotted names within `Encoder.model`.

    Args:
        patch_embed: the module that turns pixels into tokens (the stem of a convolutional network).
        image: the image tower.
        text: the text tower, or None.
        pool: how tokens become one vector, in words: "token" (the class token), "avg", "map" (attention pooling),
            "max" or "none".
        heads: what follows the pooling of the *image* tower: projections, as names of modules or of parameters.
    """

    patch_embed: str
    image: Tower
    text: Tower | None = None
    pool: str = "token"
    heads: tuple[str, ...] = ()


@runtime_checkable
class Tokenizer(Protocol):
    """What turns texts into token ids: one small class for each library."""

    context_length: int

    def __call__(self, texts: list[str]) -> Int[Tensor, "B L"]:
        """Token ids, padded or cut to `context_length`."""

    def lengths(self, texts: list[str]) -> list[int]:
        """How many tokens each text has *before* it is cut, start and end tokens included."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Write what is needed into `folder`; the answer is JSON from which the loader builds the tokenizer again."""


@dataclass(frozen=True, slots=True)
class Family:
    """How the models of one library are run: plain functions of the model, so that a copy of an Encoder runs its copy.

    Args:
        name: of the library, as in a uri.
        encode_image: (model, images "B 3 H W") -> "B D".
        encode_text: (model, tokens "B L") -> "B D"; None for image-only models.
        resize: (model, (height, width)) -> whether its positions are now those of that size: makes the model take
            another input size, in place. False: it takes it all the same, by resampling as it runs.
        halves: model -> its image tower, cut open in front of the first block; None where that is not known how.
    """

    name: str
    encode_image: Callable[[nn.Module, Tensor], Tensor]
    encode_text: Callable[[nn.Module, Tensor], Tensor] | None
    resize: Callable[[nn.Module, tuple[int, int]], bool]
    halves: Callable[[nn.Module], Halves | None]


class Encoder(nn.Module):
    """A pretrained model of any family, with all that is needed to use, adapt and save it. Made by `load_encoder`.

    Final: composed, never subclassed. `copy.deepcopy` gives an independent one.

    Args:
        model: the library's own module.
        family: how it is run.
        anatomy: where its parts are.
        preprocess: what it was trained to see, at the size it now takes.
        source: the uri it was loaded from; says so where the weights are random.
        architecture: JSON from which `load_encoder` builds the module again without any download.
        embedding_dim: D after the head.
        licence: of the base model's weights, None where unknown.
        tokenizer: None without a text tower.
    """

    model: nn.Module
    head: nn.Module
    prompts: Prompts | None

    def __init__(
        self,
        model: nn.Module,
        *,
        family: Family,
        anatomy: Anatomy,
        preprocess: Preprocess,
        source: str,
        architecture: Mapping[str, Any],
        embedding_dim: int,
        licence: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.head = nn.Identity()
        self.prompts = None
        self.family = family
        self.anatomy = anatomy
        self.preprocess = preprocess
        self.source = source
        self.architecture = dict(architecture)
        self.embedding_dim = embedding_dim
        self.licence = licence
        self.tokenizer = tokenizer
        self.adapters: tuple[Any, ...] = ()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def logit_scale(self) -> float | None:
        """The factor on similarities that image-text training learnt (exponentiated: CLIP's is 100), or None."""
        return self._logit("logit_scale", torch.exp)

    @property
    def logit_bias(self) -> float | None:
        """The number added to scaled similarities before the sigmoid (SigLIP), or None."""
        return self._logit("logit_bias", torch.Tensor.clone)

    def _logit(self, name: str, of: Callable[[Tensor], Tensor]) -> float | None:
        value = getattr(self.model, name, None)  # not every family has one; open_clip sets logit_bias to None without
        return None if value is None else float(of(value.detach().float()).item())

    @property
    def context_length(self) -> int | None:
        """L, the tokens that the text tower takes; longer texts are cut. None without a text tower."""
        return None if self.tokenizer is None else self.tokenizer.context_length

    def encode_image(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Embeddings of normalised images, not scaled to length 1, in the mode (train or eval) the encoder is in."""
        if self.prompts is not None:
            return self.encode_tokens(self.patch_tokens(images))
        return cast(Tensor, self.head(self.family.encode_image(self.model, images)))

    def patch_tokens(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B T C"]:
        """The first half of `encode_image`: what enters the first block, class and register tokens included.

        Raises:
            InputError: it is not known how to cut this architecture open.
        """
        return self._halves().tokens(images)

    def encode_tokens(
        self,
        tokens: Float[Tensor, "B T C"],
        prompts: Sequence[Tensor | None] | None = None,
        *,
        head: nn.Module | None = None,
    ) -> Float[Tensor, "B D"]:
        """The second half of `encode_image`: the blocks, with prompts in front of the tokens, the pooling, the head.

        Args:
            tokens: from `patch_tokens`.
            prompts: "B N_i C" for each block from the first on, in the place of the encoder's own; they may differ from
                image to image. They are dropped after their block; a None lets those of the block before go on. Blocks
                after the list's end have none. None in all: the encoder's own, where it has any.
            head: in the place of the encoder's own.

        Raises:
            InputError: it is not known how to cut this architecture open.
        """
        halves = self._halves()
        blocks = [self.model.get_submodule(name) for name in self.anatomy.image.blocks]
        if prompts is None:
            prompts = [] if self.prompts is None else self.prompts(len(tokens), len(blocks))
        features = halves.pool(through_blocks(halves.block, blocks, tokens, prompts))
        return cast(Tensor, (self.head if head is None else head)(features))

    def _halves(self) -> Halves:
        halves = self.family.halves(self.model) if self.anatomy.image.blocks else None
        if halves is None:
            raise InputError(
                f"{self.source} cannot be cut open in front of its blocks, so it takes no prompts; use another method, "
                "such as bitfit or linear_head"
            )
        return halves

    def at_size(self, size: tuple[int, int]) -> Encoder:
        """A second encoder of the same weights for images of another size: what is trained in one is in the other.

        Position embeddings alone are its own: resampled, and frozen.

        Args:
            size: height and width of the images.

        Raises:
            InputError: the architecture takes no such size, or position embeddings are trained, which there would be
                two of.
        """
        shared: dict[int, Any] = {id(t): t for t in (*self.parameters(), *self.buffers())}
        other = copy.deepcopy(self, shared)
        if other.family.resize(other.model, size):
            other.architecture["size"] = list(size)
        other.preprocess = dataclasses.replace(self.preprocess, size=size)
        own = dict(self.named_parameters())
        for name, parameter in other.named_parameters():
            if parameter is own.get(name):
                continue
            if name in own and own[name].requires_grad:
                raise InputError(
                    f"{name} of {self.source} is trained, and depends on the size of the image: leave it frozen (adapt "
                    f"by lora or bottleneck, not full), or give all images {self.preprocess.size}"
                )
            parameter.requires_grad_(False)
        return other

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """The same as `encode_image`."""
        return self.encode_image(images)

    def encode_text(self, texts: Sequence[str]) -> Float[Tensor, "B D"]:
        """Embeddings of texts in the space of the images, not scaled to length 1. Longer texts are cut, see `tokenize`.

        Raises:
            InputError: the model has no text tower, or a LinearHead has moved the images out of the texts' space.
        """
        if self.family.encode_text is None:
            raise InputError(
                f"{self.source} has no text tower; texts need an image-text model, such as open_clip:ViT-B-16/openai"
            )
        if not isinstance(self.head, nn.Identity):
            raise InputError(
                "a linear_head has moved the images out of the space of the texts; adapt without it to use texts"
            )
        return self.family.encode_text(self.model, self.tokenize(texts).to(self.device))

    def tokenize(self, texts: Sequence[str]) -> Int[Tensor, "B L"]:
        """Token ids of texts, padded or cut to `context_length`.

        Raises:
            InputError: the model has no text tower.
        """
        return self._tokenizer()(list(texts))

    def token_lengths(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each text has before it is cut: those above `context_length` lose their end.

        Raises:
            InputError: the model has no text tower.
        """
        return self._tokenizer().lengths(list(texts))

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError(f"{self.source} has no text tower, so it has no tokenizer")
        return self.tokenizer

    def fingerprint(self) -> str:
        """Hash of what decides an image's embedding: weights, architecture, adapters, preprocessing. 64 hex digits."""
        digest = hashlib.sha256()
        decisive = {key: value for key, value in self.architecture.items() if key != "tokenizer"}
        config = {
            "architecture": decisive,
            "preprocess": dataclasses.asdict(self.preprocess),
            "adapters": _adapters_to_config(self.adapters),
        }
        digest.update(json.dumps(config, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def save(self, folder: str | Path) -> Path:
        """Write a folder that `load_encoder` takes, with no network: vicinal.json, model.safetensors, tokenizer files.

        The folder appears whole or not at all: it is written beside, then renamed. A folder that `save` wrote earlier
        is replaced.

        Raises:
            InputError: `folder` exists and holds something else.
        """
        from safetensors.torch import save_file

        folder = Path(folder)
        if folder.exists() and not (folder.is_dir() and ((folder / CONFIG_NAME).exists() or not any(folder.iterdir()))):
            raise InputError(f"{folder} exists and is not a model saved by vicinal; choose another folder or remove it")
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = folder.parent / f".{folder.name}.{uuid.uuid4().hex}"
        fresh.mkdir()  # not tempfile's, which nobody else could read
        try:
            architecture = dict(self.architecture)
            if self.tokenizer is not None:
                architecture["tokenizer"] = self.tokenizer.save(fresh)
            config = {
                "format": FORMAT,
                "source": self.source,
                "family": self.family.name,
                "licence": self.licence,
                "embedding_dim": self.embedding_dim,
                "preprocess": dataclasses.asdict(self.preprocess),
                "adapters": _adapters_to_config(self.adapters),
                "architecture": architecture,
            }
            (fresh / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_file(dict(_unshared(self.state_dict())), fresh / WEIGHTS_NAME, {"format": "pt"})
            for path in (*fresh.rglob("*"), fresh):
                _sync(path)
            _replace(fresh, folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)  # gone already, if all went well
        return folder


def _adapters_to_config(adapters: Sequence[Any]) -> list[dict[str, Any]]:
    """The form that recipes use: [{"lora": {"rank": 8, ...}}, ...]."""
    if not adapters:
        return []
    from vicinal.models.adapters import ADAPTERS

    names = {cls: name for name, cls in ADAPTERS.items()}
    return [{names[type(adapter)]: dataclasses.asdict(adapter)} for adapter in adapters]


def _unshared(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that share memory (tied weights) apart: safetensors refuses them, and loading ties them again."""
    seen: set[int] = set()
    for name, tensor in state.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        yield name, tensor.clone() if storage in seen else tensor
        seen.add(storage)


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(fresh: Path, folder: Path) -> None:
    """A folder cannot be renamed over a full one: move the old one aside first, and back if that fails."""
    if not folder.exists():
        fresh.rename(folder)
        return
    old = fresh.with_name(f"{fresh.name}.old")
    folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
