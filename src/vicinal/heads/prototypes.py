"""The two plainest heads: text alone, and images alone.

    ZeroShot            logits_c = s x . t_c
    NearestPrototype    logits_c = s x . p_c,     p_c = v_c / |v_c|,  v_c = sum over the images j of class c of x_j

Letters: x the query, t_c the text of class c, p_c its prototype, all of length 1; s the logit scale.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from sklearn.utils.validation import column_or_1d, validate_data

from vicinal.heads.head import Head
from vicinal.heads.selection import Learned, Points, Selection
from vicinal.heads.support import Support, Text, Validation, as_numpy, text_rows, unit
from vicinal.types import InputError

__all__ = ["NearestPrototype", "ZeroShot"]


class NearestPrototype(Head):
    """The class whose mean direction is nearest: argmax_c x . p_c. Snell et al. 2017, arXiv:1703.05175, with cosines.

    Text, if given, is checked and not used.

    Args:
        logit_scale: s, of the logits. CLIP's: 100. It settles probabilities alone.

    >>> head = NearestPrototype().fit([[1.0, 0.1], [1.0, -0.1], [0.0, 1.0]], ["cat", "cat", "dog"])
    >>> head.predict([[2.0, 0.5]]).tolist()
    ['cat']
    """

    text_use: ClassVar[Literal["needed", "optional", "unused"]] = "unused"

    def __init__(self, *, logit_scale: float = 100.0) -> None:
        self.logit_scale = logit_scale

    def _learn(self, support: Support, points: Points) -> Learned:
        sums = np.zeros((support.classes, support.image.shape[1]), dtype=support.image.dtype)
        np.add.at(sums, support.labels, support.image)
        return {"prototypes": unit(sums)}

    def _base(self, X: Float[np.ndarray, "v D"], text: Float[np.ndarray, "C D"] | None) -> Float[np.ndarray, "v C"]:
        return super()._base(X, None)

    def _terms(
        self, learned: Learned, points: Points, X: Float[np.ndarray, "v D"], image: Float[np.ndarray, "v E"]
    ) -> Iterator[Sequence[Float[np.ndarray, "v C"]]]:
        for _ in points:
            yield ((image @ learned["prototypes"].T) * image.dtype.type(self.logit_scale),)


class ZeroShot(Head):
    """The class whose text is nearest: argmax_c x . t_c. Radford et al. 2021, arXiv:2103.00020.

    No image is learned from, so classes without images are welcome. An ensemble of prompts is one text vector a class:
    the mean of the prompts' unit vectors.

    Args:
        logit_scale: s, of the logits. CLIP's: 100. It settles probabilities alone.

    >>> head = ZeroShot().fit(text={"cat": [1.0, 0.0], "dog": [0.0, 1.0]})
    >>> head.predict([[2.0, 0.5]]).tolist()
    ['cat']
    """

    text_use: ClassVar[Literal["needed", "optional", "unused"]] = "needed"
    adapted_use: ClassVar[Literal["yes", "without text", "no"]] = "no"

    def __init__(self, *, logit_scale: float = 100.0) -> None:
        self.logit_scale = logit_scale

    def fit(
        self,
        X: ArrayLike | None = None,
        y: ArrayLike | None = None,
        *,
        text: Text | None = None,
        adapted: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        validation: Validation | None = None,
    ) -> ZeroShot:
        """Take the text vectors.

        Args:
            X: checked, if given, and not used.
            y: labels; each must have a text. Not used otherwise.
            text: the text vector of each class; see `vicinal.heads.Text`.
            adapted: refused: adapted features never meet text.
            groups: not used.
            validation: refused: there is nothing to choose.

        Raises:
            InputError: no text, a label without one, a text of another width than X, adapted features.
        """
        self._refuse(text is not None, adapted is not None)
        assert text is not None
        if validation is not None:
            raise InputError("ZeroShot has no hyper-parameter to choose; leave validation away")
        labels = None if y is None else np.unique(column_or_1d(as_numpy(y)))
        self.classes_, rows = text_rows(text, labels)
        self.n_features_in_ = rows.shape[1]
        if X is not None:
            vectors = validate_data(self, as_numpy(X))
            if vectors.shape[1] != rows.shape[1]:
                raise InputError(
                    f"text vectors have {rows.shape[1]} numbers, image vectors {vectors.shape[1]}; embed both with one "
                    "model"
                )
            rows = rows.astype(vectors.dtype) if vectors.dtype == np.float32 else rows
        self.adapted_, self._adapted_width = False, 0
        self._settle(Selection("fixed", "fixed", "", {}))
        self._text, self._learned = unit(rows), {}
        return self

    def _learn(self, support: Support, points: Points) -> Learned:
        return {}

    def _terms(
        self, learned: Learned, points: Points, X: Float[np.ndarray, "v D"], image: Float[np.ndarray, "v E"]
    ) -> Iterator[Sequence[Float[np.ndarray, "v C"]]]:
        for _ in points:
            yield (np.zeros((1, 1), dtype=X.dtype),)
