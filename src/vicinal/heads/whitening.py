"""ZCA whitening: the control that an adapter has to beat. It learns nothing but a mean and a covariance.

    S = (1 - a) C + a tr(C) / D I,     z = S^(-1/2) (x - m),     then z / |z|

Letters: N rows, D numbers an embedding, m and C mean and covariance of unit vectors, a shrinkage.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from vicinal.types import InputError

__all__ = ["Whitening"]


class Whitening(TransformerMixin, BaseEstimator):  # type: ignore[misc]    # scikit-learn has no types
    """Make the directions of a generic set's vectors alike in strength, of any set's: a scikit-learn transformer.

    Of all whitenings ZCA stays nearest to the vectors it is given. Fitted without labels, on generic images: it is the
    least that "trained on other data" could mean. What comes out is of length one.

    Args:
        shrinkage: a, from 0 (the covariance as it is, which must then be of full rank) to 1 (a rotation of nothing:
            the mean alone is taken off). 0.1 is a beginning.

    >>> x = np.random.default_rng(0).normal(size=(500, 3)) * [1.0, 0.2, 0.2] + [0.0, 0.0, 3.0]
    >>> white = Whitening(shrinkage=0.0).fit(x)
    >>> unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    >>> bool(np.allclose(np.cov(((unit - white.mean_) @ white.matrix_).T, bias=True), np.eye(3)))
    True
    """

    def __init__(self, *, shrinkage: float = 0.1) -> None:
        self.shrinkage = shrinkage

    def fit(self, X: ArrayLike, y: object = None) -> Whitening:
        """Learn the mean and the covariance.

        Args:
            X: "N D"; lengths do not matter.
            y: not used.

        Raises:
            InputError: the shrinkage is not from 0 to 1, or is 0 with vectors that do not fill their space.
        """
        if not 0 <= self.shrinkage <= 1:
            raise InputError(f"shrinkage must be from 0 to 1, not {self.shrinkage}")
        x = _unit(validate_data(self, X, dtype=(np.float64, np.float32), ensure_min_samples=2)).astype(np.float64)
        self.mean_ = x.mean(0)
        covariance = np.cov(x.T, bias=True).reshape(x.shape[1], x.shape[1])
        level = np.trace(covariance) / len(covariance)
        strengths, directions = np.linalg.eigh(
            (1 - self.shrinkage) * covariance + self.shrinkage * level * np.eye(len(covariance))
        )
        if strengths[0] <= 1e-10 * max(strengths[-1], 1e-300):
            raise InputError("these vectors do not fill their space, so that nothing can whiten them: raise shrinkage")
        self.matrix_ = (directions / np.sqrt(strengths)) @ directions.T
        return self

    def transform(self, X: ArrayLike) -> Float[np.ndarray, "N D"]:
        """Whitened vectors of length one.

        Args:
            X: "N D".
        """
        check_is_fitted(self)
        x = validate_data(self, X, dtype=(np.float64, np.float32), reset=False)
        white: np.ndarray = _unit((_unit(x).astype(np.float64) - self.mean_) @ self.matrix_).astype(x.dtype)
        return white


def _unit(x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D"]:
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    unit: np.ndarray = x / np.maximum(lengths, 1e-12)
    return unit
