"""What the images of a run are called, and how well names and captions find them, in vectors of one encoder.

Letters: N rows of a manifest, C classes, T distinct captions, D numbers an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vicinal.data.manifest import Manifest
from vicinal.embedding import embed_classes, embed_text
from vicinal.evaluation.image_text import Protocol, image_text_scores, zero_shot_scores
from vicinal.models.encoder import Encoder
from vicinal.recipe import Recipe
from vicinal.types import Embeddings, InputError, PerQuery

__all__ = ["Texts", "kinds_of"]


@dataclass(frozen=True, slots=True)
class Texts:
    """What the images of a manifest are called.

    Args:
        names: a vector for each class, "C D".
        told: of each row the captions that count, the first foremost; none where it has none.
        place: of each distinct caption its row in `vectors`.
        vectors: "T D".
        kinds: of each class, what the negatives of `sampled100` should have in common with it; None: all are alike.
        protocols: what to measure with captions.
        ks: the k of recall@k.
        seed: of the draws of `sampled100`.
    """

    names: Float[Tensor, "C D"]
    told: list[list[str]]
    place: dict[str, int]
    vectors: Float[Tensor, "T D"]
    kinds: Sequence[object] | None = None
    protocols: Sequence[Protocol] = ("full",)
    ks: tuple[int, ...] = (1, 5, 10)
    seed: int = 0

    @classmethod
    def of(cls, encoder: Encoder, manifest: Manifest, recipe: Recipe) -> Texts:
        """The class names through the recipe's templates, and the captions that its key `captions` lets count.

        Raises:
            InputError: there is no column of the name that the recipe's `kinds` gives.
        """
        settings: dict[str, Any] = {"device": recipe.device, "precision": recipe.precision}
        written = [name.replace("_", " ") for name in manifest.classes]
        names = embed_classes(encoder, written, recipe.templates, **settings)
        told = manifest.captions()
        if recipe.captions.measured == "first":
            told = [several[:1] for several in told]
        place: dict[str, int] = {}
        for several in told:
            for caption in several:
                place.setdefault(caption, len(place))
        vectors = embed_text(encoder, list(place), **settings) if place else torch.zeros(0, encoder.embedding_dim)
        kinds = None if recipe.kinds is None else kinds_of(manifest, recipe.kinds)
        return cls(names, told, place, vectors, kinds, recipe.protocols, tuple(recipe.recall_at), recipe.seed)

    def scores(self, queries: Embeddings, rows: Bool[Tensor, "N"]) -> list[PerQuery]:
        """Zero-shot among the classes of the queries, then retrieval of images by captions and back, items by class.

        Args:
            queries: the images of `rows`, embedded.
            rows: which of the manifest's rows they are.
        """
        present, labels = torch.unique(queries.labels, return_inverse=True)
        classes = tuple(queries.classes[i] for i in present.tolist())
        scores = [zero_shot_scores(replace(queries, labels=labels, classes=classes), self.names[present])]
        told = [self.told[row] for row in rows.nonzero()[:, 0].tolist()]
        if any(told):
            scores += [self._found(queries, told, protocol) for protocol in self.protocols]
        return scores

    def _found(self, queries: Embeddings, told: list[list[str]], protocol: Protocol) -> PerQuery:
        """By one protocol. Of `index` the images are those with a caption, each with its first."""
        if protocol == "index":
            queries = queries.where(torch.tensor([bool(several) for several in told]))
            pairs = list(enumerate(several[0] for several in told if several))
        else:
            of_item = {(int(label), c): i for i, label in enumerate(queries.labels) for c in told[i]}
            pairs = [(i, caption) for (_, caption), i in of_item.items()]
        captions = [caption for _, caption in pairs]
        vectors = self.vectors[[self.place[caption] for caption in captions]]
        texts = Embeddings(vectors, queries.labels[[i for i, _ in pairs]], tuple(captions), queries.classes)
        return image_text_scores(
            queries, texts, captions=captions, protocol=protocol, ks=self.ks, kinds=self.kinds, seed=self.seed
        )


def kinds_of(manifest: Manifest, column: str) -> list[object]:
    """The value of a column in the first row of each class.

    Raises:
        InputError: there is no such column.
    """
    if column not in manifest.names():
        raise InputError(f"kinds: no column {column!r}; the data has {', '.join(manifest.names())}")
    values: dict[int, object] = {}
    for label, value in zip(manifest.labels().tolist(), manifest.column(column), strict=True):
        values.setdefault(label, value)
    return [values.get(i) for i in range(len(manifest.classes))]
