"""Tokenizers: one small class for each library, each able to live in a saved folder.

Letters: B texts, L tokens of a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from vicinal.models.encoder import Tokenizer
from vicinal.models.weights import first_line, log
from vicinal.types import InputError

if TYPE_CHECKING:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "TOKENIZERS",
    "TOKENIZER_FILES",
    "MissingTokenizer",
    "OpenClipTokenizer",
    "TransformersTokenizer",
    "without_tokenizer",
]


class OpenClipTokenizer:
    """open_clip's tokenizer: its own byte-pair one, or one of transformers in open_clip's wrapper.

    CLIPA's `reduction_mask` (a random choice of the words of a long text) is left out: the same text, the same tokens.
    """

    def __init__(
        self, inner: SimpleTokenizer | HFTokenizer, context_length: int, settings: Mapping[str, Any], wrapped: bool
    ) -> None:
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
        return untruncated(self.inner.tokenizer, clean)

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


class TransformersTokenizer:
    """A tokenizer of transformers: ids padded or cut to one length."""

    def __init__(self, inner: PreTrainedTokenizerBase, context_length: int) -> None:
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
        return untruncated(self.inner, texts) if texts else []

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the tokenizer's files."""
        self.inner.save_pretrained(folder / "tokenizer")
        return {"kind": "transformers", "context_length": self.context_length}

    @classmethod
    def restore(cls, config: Mapping[str, Any], folder: Path) -> TransformersTokenizer:
        """What `save` wrote."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True), config["context_length"])


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


def untruncated(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    return [len(ids) for ids in tokenizer(texts, padding=False, truncation=False, verbose=False)["input_ids"]]


def without_tokenizer(source: str, context_length: int, error: Exception) -> Tokenizer:
    """The stand-in for a tokenizer that failed to load with `error`; says so at once."""
    reason = (
        f"the tokenizer of {source} could not be loaded ({first_line(error)}), so texts cannot be embedded; put its "
        "files (tokenizer.json, tokenizer_config.json) into the folder of the model, or load it once with a network"
    )
    log.warning("%s", reason)
    return MissingTokenizer(reason, context_length)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model")
"""A folder with any of these has a tokenizer of transformers."""


TOKENIZERS: dict[str, type[OpenClipTokenizer] | type[TransformersTokenizer] | type[MissingTokenizer]] = {
    "open_clip": OpenClipTokenizer,
    "transformers": TransformersTokenizer,
    "missing": MissingTokenizer,
}
"""The "kind" in a saved folder -> the class that restores it."""
