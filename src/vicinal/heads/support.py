"""What a head is fitted on: checked, in unit rows, and in an order that only its content settles.

    frozen_i = x_i / |x_i|        image_i = a_i / |a_i|,  or frozen_i where there are no adapted features
    text_c   = t_c / |t_c|

Two spaces, and the wall between them: `frozen` may meet `text`; `image` may meet `image` alone. Adapted features have
left the space that text vectors live in, so a product of the two is a number without a meaning.

Rows are sorted by class, and within a class by a hash of their numbers. So no result depends on the order in which rows
came, the folds of a cross-validation included, and exact copies of a row are known as one image.

Letters: N support rows, D numbers an embedding, E numbers an adapted embedding, C classes, F folds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from numpy.typing import ArrayLike
from torch import Tensor

from vicinal.types import InputError

__all__ = ["Support", "Text", "Validation", "as_numpy", "check_support", "named", "text_rows", "unit"]

Text = Mapping[Any, ArrayLike] | ArrayLike
"""label -> its text vector; or "C D", where labels are the integers 0 .. C - 1 and row c is the text of class c."""


class Validation(NamedTuple):
    """Labelled images beside the support set, to choose hyper-parameters by. Never those that a result is quoted on.

    Args:
        X: "V D".
        y: V labels, all of them classes of the support set.
        adapted: "V E", where the head is fitted with adapted features.
    """

    X: ArrayLike
    y: ArrayLike
    adapted: ArrayLike | None = None


@dataclass(frozen=True, slots=True)
class Support:
    """A checked support set; see the module's text for the order of its rows.

    Args:
        frozen: "N D", unit rows.
        image: "N E", unit rows: the adapted features, or `frozen` itself.
        labels: "N", ascending, positions in the classes; none of which is empty.
        groups: "N", what a row is a view of.
        text: "C D", unit rows, or None.
        lengths: "C", the lengths that the text vectors came with, or None.
    """

    frozen: Float[np.ndarray, "N D"]
    image: Float[np.ndarray, "N E"]
    labels: Int[np.ndarray, "N"]
    groups: Int[np.ndarray, "N"]
    text: Float[np.ndarray, "C D"] | None
    lengths: Float[np.ndarray, "C"] | None

    @classmethod
    def build(
        cls,
        X: Float[np.ndarray, "N D"],
        labels: Int[np.ndarray, "N"],
        *,
        text: Float[np.ndarray, "C D"] | None,
        adapted: Float[np.ndarray, "N E"] | None,
        groups: Shaped[np.ndarray, "N"] | None,
    ) -> Support:
        """Unit rows in their order. The arguments are checked already."""
        digest = _digests(X)
        order = np.lexsort((digest if adapted is None else _digests(adapted), digest, labels))
        group = np.unique(digest if groups is None else groups, return_inverse=True)[1].reshape(-1)
        frozen = unit(X[order])
        image = frozen if adapted is None else unit(adapted[order])
        lengths = None if text is None else np.linalg.norm(text, axis=1)
        return cls(frozen, image, labels[order], group[order], None if text is None else unit(text), lengths)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        """C."""
        return int(self.labels[-1]) + 1

    def images_per_class(self) -> Int[np.ndarray, "C"]:
        """K of each class: its images, however many views there are of each."""
        pairs = np.unique(np.stack([self.labels, self.groups]), axis=1)
        return np.bincount(pairs[0], minlength=self.classes)

    def where(self, mask: Bool[np.ndarray, "N"]) -> Support:
        """The rows where `mask` is true; every class must keep one."""
        image = self.frozen[mask] if self.image is self.frozen else self.image[mask]
        frozen = image if self.image is self.frozen else self.frozen[mask]
        return Support(frozen, image, self.labels[mask], self.groups[mask], self.text, self.lengths)

    def folds(self, most: int = 4) -> list[Bool[np.ndarray, "N"]]:
        """The rows to hold out in each fold; no fold where no class has two images.

        Each class gives a like share to each of min(`most`, K) folds, so that no class has more images left than
        another. All the views of an image, or all rows of a group, are in one fold; a class that a fold would take
        whole is not held out in it.
        """
        count = min(most, int(self.images_per_class().max()))
        if count < 2:
            return []
        _, first, group = np.unique(self.groups, return_index=True, return_inverse=True)
        order = np.argsort(first)  # groups by their first class, then by hash
        label = self.labels[first][order]
        start = np.searchsorted(label, np.arange(self.classes))
        fold_of = np.empty(len(first), dtype=np.int64)
        # small classes start anywhere, by their content and not by their name
        fold_of[order] = (
            np.arange(len(order)) - start[label] + order[np.minimum(start, len(order) - 1)][label]
        ) % count
        fold = fold_of[group.reshape(-1)]
        held = []
        for f in range(count):
            mask = fold == f
            left = np.bincount(self.labels[~mask], minlength=self.classes)
            held.append(mask & (left[self.labels] > 0))
        return [mask for mask in held if mask.any()]


def check_support(
    X: ArrayLike,
    y: ArrayLike,
    *,
    shots: int | None = None,
    queries: ArrayLike | None = None,
    ids: Sequence[Hashable] | None = None,
    query_ids: Sequence[Hashable] | None = None,
) -> None:
    """Refuse a support set that is not what an experiment says it is.

    Args:
        X: "N D", the support vectors.
        y: their N labels.
        shots: K; each class must have at least so many rows.
        queries: "Q D", what will be asked; none may be a row of the support set, number for number.
        ids: of the support rows.
        query_ids: of the queries; none may be among `ids`.

    Raises:
        InputError: a class has fewer rows than shots, or a query stands in the support set.
        ValueError: ids of the one side without those of the other.

    >>> check_support([[1.0, 0.0], [0.0, 1.0]], ["cat", "dog"], shots=2)
    Traceback (most recent call last):
    vicinal.types.InputError: class cat has 1 image, fewer than the 2 shots, and so do 1 others; ...
    """
    vectors, labels = as_numpy(X), as_numpy(y)
    if (ids is None) != (query_ids is None):
        raise ValueError("ids and query_ids go together")
    if shots is not None:
        classes, counts = np.unique(labels, return_counts=True)
        few = np.flatnonzero(counts < shots)
        if len(few):
            others = f", and so do {len(few) - 1} others" if len(few) > 1 else ""
            raise InputError(
                f"class {classes[few[0]]} has {named(int(counts[few[0]]), 'image')}, fewer than the {shots} shots"
                f"{others}; take fewer shots, add images, or leave the class out"
            )
    if ids is not None and query_ids is not None:
        both = set(ids).intersection(query_ids)
        if both:
            first = next(name for name in ids if name in both)
            raise InputError(
                f"the support set holds {named(len(both), 'query image')}, the first {first}; draw the support from "
                "images that are not asked about"
            )
    if queries is not None:
        known = set(_digests(vectors).tolist())
        asked = [i for i, digest in enumerate(_digests(as_numpy(queries).astype(vectors.dtype))) if digest in known]
        if asked:
            raise InputError(
                f"the support set holds {named(len(asked), 'query image')}, number for number, the first query row "
                f"{asked[0]}; draw the support from images that are not asked about"
            )


def text_rows(text: Text, labels: Shaped[np.ndarray, "n"] | None) -> tuple[Shaped[np.ndarray, "C"], np.ndarray]:
    """The classes, ascending, and their text vectors "C D", as given.

    Args:
        text: see `Text`.
        labels: the distinct labels of the images, each of which needs a text; None takes the text's own.

    Raises:
        InputError: a label without a text, a vector that is not finite, or texts of several widths.
    """
    if isinstance(text, Mapping):
        if not text:
            raise InputError("text holds no class; give each label its text vector")
        names = np.asarray(list(text))
        try:
            rows = np.stack([np.asarray(as_numpy(vector), dtype=np.float64).reshape(-1) for vector in text.values()])
        except ValueError as error:
            raise InputError("the vectors in text are not all of one width; embed them with one model") from error
        if labels is not None:
            missing = [label for label in labels.tolist() if label not in text]
            if missing:
                raise InputError(
                    f"label {missing[0]!r} has no text, nor have {len(missing) - 1} others; name each class"
                )
        order = np.argsort(names, kind="stable")
        names, rows = names[order], rows[order]
    else:
        rows = np.asarray(as_numpy(text), dtype=np.float64)
        if rows.ndim != 2 or not len(rows):
            raise InputError(f'text must be "C D", one vector a class, and has shape {rows.shape}')
        names = np.arange(len(rows))
        if labels is not None:
            if labels.dtype.kind not in "iu":
                raise InputError(
                    f"labels like {labels[0]!r} do not say which row of text is theirs; give text as a mapping "
                    "label -> vector, or labels as row numbers"
                )
            outside = labels[(labels < 0) | (labels >= len(rows))]
            if len(outside):
                raise InputError(f"label {outside[0]} has no text: there are {len(rows)} rows, numbered from 0")
            names = names.astype(labels.dtype)
    if not np.isfinite(rows).all():
        bad = names[~np.isfinite(rows).all(1)]
        raise InputError(f"the text vector of class {bad[0]} is not finite; embed the names anew")
    return names, rows


def as_numpy(values: ArrayLike | Tensor) -> np.ndarray:
    """Arrays and lists as they are; a tensor from any device, half precisions widened."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype in (torch.float16, torch.bfloat16) else values).numpy()
    return np.asarray(values)


def unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Rows of length 1; a row of zeros stays one."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length > 0, length, 1)


def named(count: int, noun: str) -> str:
    """A number with its noun.

    >>> named(1, "image"), named(2, "query image")
    ('1 image', '2 query images')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _digests(x: Float[np.ndarray, "n d"]) -> Int[np.ndarray, "n"]:
    """A hash of each row; equal rows have equal ones, 0.0 and -0.0 being equal."""
    rows = np.ascontiguousarray(x + 0.0)
    words = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows)
    return np.frombuffer(words, dtype="<i8")
