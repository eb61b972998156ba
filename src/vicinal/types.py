"""The nouns that every room shares: Preprocess, Embeddings, PerQuery, Estimate, Metrics, Batch, InputError.

Letters: N items, D numbers an embedding, Q queries, R replicates (draws of a support set, or training seeds), B batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Batch", "Embeddings", "Estimate", "InputError", "Metrics", "PerQuery", "Preprocess"]


class InputError(ValueError):
    """What the user gave cannot be used. The message names the file, row or key, and the way to mend it."""


@dataclass(frozen=True, slots=True)
class Preprocess:
    """What a backbone was trained to see: the size, colour statistics and resampling of its evaluation images.

    Args:
        size: height and width, in pixels.
        mean: of R, G, B, in the range 0 to 1.
        std: of R, G, B, in the range 0 to 1.
        interpolation: of the resize; always antialiased.
        crop: how an image that is not of the target's shape is made to fit: "crop" resizes the short side and cuts the
            centre, "pad" resizes the long side and fills the rest with the mean, "squash" ignores the aspect ratio.
        crop_pct: the share of the resized image that the centre crop keeps (timm's term), used by "crop" alone.

    >>> Preprocess(size=(224, 224), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).crop
    'crop'
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop: Literal["crop", "pad", "squash"] = "crop"
    crop_pct: float = 1.0


class Batch(TypedDict, total=False):
    """What a loader yields. `image` is float "B 3 H W", normalised; `index` is the row in the manifest.

    `image_vector` and `text_vector`, "B D", stand in the place of what a locked tower would make of image and text.
    Of several views, `views` "B G 3 H W" are those in the backbone's size (the first is `image`), `crops` "B L 3 h w"
    smaller ones.
    """

    image: Tensor
    label: Tensor
    index: Tensor
    text: list[str]
    group: Tensor
    views: Tensor
    image_vector: Tensor
    text_vector: Tensor
    crops: Tensor


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Unit vectors with their labels and ids: all that the evaluation of a model ever sees.

    Args:
        vectors: "N D", float32, each row of length 1.
        labels: "N", int64, positions in `classes`.
        ids: N names, unique, by which pictures are found again.
        classes: the names of the labels, C of them. Two Embeddings are comparable if their `classes` are equal.

    >>> import torch
    >>> e = Embeddings(torch.eye(2), torch.tensor([0, 1]), ("a.png", "b.png"), ("cat", "dog"))
    >>> len(e), e.where(e.labels == 1).ids
    (2, ('b.png',))
    """

    vectors: Float[Tensor, "N D"]
    labels: Int[Tensor, "N"]
    ids: tuple[str, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, mask: Bool[Tensor, "N"]) -> Embeddings:
        """The rows where `mask` is true, in order; `classes` stay as they are, so labels stay comparable."""
        rows = mask.nonzero().flatten()
        ids = tuple(self.ids[i] for i in rows.tolist())
        return Embeddings(self.vectors[rows], self.labels[rows], ids, self.classes)

    def save(self, path: str | Path, *, fingerprint: str | None = None) -> None:
        """Write one safetensors file; ids and class names stand in its metadata.

        Args:
            path: the file.
            fingerprint: of the model, `Encoder.fingerprint()`, so that an index can tell whose vectors these are.
        """
        from safetensors.torch import save_file

        metadata = {"ids": json.dumps(self.ids), "classes": json.dumps(self.classes)}
        metadata |= {"fingerprint": fingerprint} if fingerprint else {}
        save_file({"vectors": self.vectors.contiguous(), "labels": self.labels.contiguous()}, path, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Embeddings:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                vectors, labels = file.get_tensor("vectors"), file.get_tensor("labels")
            ids, classes = (tuple(json.loads(metadata[key])) for key in ("ids", "classes"))
        except (OSError, KeyError, SafetensorError) as error:
            raise InputError(f"{path} is not a file of embeddings ({error}); make one with `vicinal embed`") from error
        return cls(vectors, labels, ids, classes)

    @staticmethod
    def fingerprint_in(path: str | Path) -> str:
        """The model that a file of embeddings is of.

        Raises:
            InputError: the file is none, or does not say.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                return str((file.metadata() or {})["fingerprint"])
        except (OSError, KeyError, SafetensorError) as error:
            raise InputError(
                f"{path} does not say which model its vectors are of ({error}); write it with `vicinal embed`"
            ) from error


@dataclass(frozen=True, slots=True)
class PerQuery:
    """One value for each query: what a protocol returns before anything is averaged.

    Args:
        values: metric name -> "R Q". R is 1, or the number of replicates: draws of a support set, or training seeds.
            NaN: this query does not count in this replicate.
        units: "Q", the independent unit that each query belongs to: its class, where classes are sampled.
        macro: average over units first (macro accuracy), instead of over queries.

    >>> import torch
    >>> PerQuery({"recall@1": torch.tensor([[1.0, 0.0]])}, torch.tensor([0, 0])).macro
    False
    """

    values: Mapping[str, Float[Tensor, "R Q"]]
    units: Int[Tensor, "Q"]
    macro: bool = False


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number that is never without its 95 % interval: over `n` independent units (classes), from `queries` queries.

    >>> Estimate(value=0.5, low=0.4, high=0.6, n=40, queries=1200).excludes_zero
    True
    """

    value: float
    low: float
    high: float
    n: int
    queries: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies wholly above or wholly below zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undefined"
        ends = "no interval" if math.isnan(self.low) else f"{self.low:.3f}, {self.high:.3f}"
        return f"{self.value:.3f} [{ends}]"


Metrics = Mapping[str, Estimate]
