"""What every head shares: checked input, the two spaces kept apart, blocks of queries, files.

    logits(x) = base(x) + sum_t w_t T_t(x),        base(x) = s x . W   or 0 without text

A head says what its terms T are (`_learn`, `_terms`) and which hyper-parameters they have; `selection` chooses those.

Letters: N support rows, Q queries, D numbers an embedding, E numbers an adapted embedding, C classes, s logit scale.
"""

from __future__ import annotations

import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import ClassVar, Literal, TypeVar

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from vicinal.heads.selection import Learned, Points, Selection, blocks, check_policy, choose
from vicinal.heads.support import Support, Text, Validation, as_numpy, text_rows, unit
from vicinal.types import InputError

__all__ = ["Head"]

_FLOATS = (np.float64, np.float32)
_H = TypeVar("_H", bound="Head")  # beartype cannot check Self


class Head(ClassifierMixin, BaseEstimator, ABC):  # type: ignore[misc]    # scikit-learn has no types
    """A classifier of vectors, as scikit-learn has them. Abstract: the heads are in the modules beside this one.

    After `fit`: `classes_`, `selection_` (how the hyper-parameters were chosen), `policy_`, `temperature_`, `adapted_`
    (whether adapted features belong to it), and each hyper-parameter with an underscore: `alpha_`, `beta_`.
    """

    text_use: ClassVar[Literal["needed", "optional", "unused"]]
    adapted_use: ClassVar[Literal["yes", "without text", "no"]] = "yes"
    hyperparameters: ClassVar[tuple[str, ...]] = ()
    linear: ClassVar[tuple[str, ...]] = ()  # of these the weights of terms
    beside_text: ClassVar[tuple[str, ...]] = ()  # of these what weighs text, and is the default without it

    logit_scale: float
    policy: str
    classes_: Shaped[np.ndarray, "C"]
    n_features_in_: int
    adapted_: bool
    selection_: Selection
    policy_: str
    temperature_: float

    # ------------------------------------------------------------------------------------ what a head says of itself

    @abstractmethod
    def _learn(self, support: Support, points: Points) -> Learned:
        """All that is kept of the support set, at each point of the hyper-parameters."""

    @abstractmethod
    def _terms(
        self, learned: Learned, points: Points, X: Float[np.ndarray, "v D"], image: Float[np.ndarray, "v E"]
    ) -> Iterator[Sequence[Float[np.ndarray, "v C"]]]:
        """For each point, the terms of the logits: one for each linear hyper-parameter, or one of weight 1."""

    def _defaults(self, support: Support) -> dict[str, float]:
        """What the policy `fixed` takes."""
        return {}

    def _grid(self, support: Support, *, published: bool) -> dict[str, Float[np.ndarray, "n"]]:
        """What is searched: the published grid, or a coarse one for each fold; weights solved for need none there."""
        return {}

    def _base(self, X: Float[np.ndarray, "v D"], text: Float[np.ndarray, "C D"] | None) -> Float[np.ndarray, "v C"]:
        if text is None:
            return np.zeros((len(X), self._class_count()), dtype=X.dtype)
        zero_shot: np.ndarray = (X @ text.T) * X.dtype.type(self.logit_scale)
        return zero_shot

    # ------------------------------------------------------------------------------------------- scikit-learn's verbs

    def fit(
        self: _H,
        X: ArrayLike,
        y: ArrayLike,
        *,
        text: Text | None = None,
        adapted: ArrayLike | None = None,
        groups: ArrayLike | None = None,
        validation: Validation | None = None,
    ) -> _H:
        """Learn from labelled vectors.

        Args:
            X: "N D", frozen image features: those of the tower that the text belongs to. Lengths do not matter.
            y: N labels, strings or integers.
            text: the text vector of each class; see `vicinal.heads.Text`. None: images alone.
            adapted: "N E", the same images by an adapted tower, for all that is between image and image.
            groups: N names, equal for rows that are views of one image (or of one source): never held out apart.
            validation: labelled images that hyper-parameters are chosen by, with policy fewshot_val or full_val.

        Raises:
            InputError: a class without images, a label without a text, a text of another width, adapted features where
                they would meet text, rows that do not match, a validation image that stands in the support set, or a
                policy that cannot be followed.
            ValueError: X or y is not what scikit-learn takes: NaN, no rows, sparse.
        """
        vectors, labels = validate_data(self, _plain(X), _plain(y), dtype=_FLOATS)
        with warnings.catch_warnings():  # scikit-learn takes one image a class for a regression
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
            check_classification_targets(labels)
        if self.hyperparameters:
            check_policy(self.policy, validation is not None)
        elif validation is not None:
            raise InputError(f"{type(self).__name__} has no hyper-parameter to choose; leave validation away")
        self._refuse(text is not None, adapted is not None)
        self.classes_, position = np.unique(labels, return_inverse=True)
        rows = None
        if text is not None:
            names, rows = text_rows(text, self.classes_)
            self._match(names, rows, vectors)
        self.adapted_ = adapted is not None
        shifted = None if adapted is None else _companion(adapted, vectors, "adapted")
        self._adapted_width = 0 if shifted is None else shifted.shape[1]
        support = Support.build(
            vectors,
            position,
            text=None if rows is None else rows.astype(vectors.dtype),
            adapted=shifted,
            groups=None if groups is None else _per_row(groups, vectors),
        )
        held = None if validation is None else self._validation(validation, vectors)
        self._fit(support, held)
        return self

    def logits(self, X: ArrayLike, *, adapted: ArrayLike | None = None) -> Float[np.ndarray, "Q C"]:
        """The logits of each class, in the order of `classes_`, however many classes there are.

        Args:
            X: "Q D", frozen features.
            adapted: "Q E", needed if the head was fitted with adapted features, and refused otherwise.

        Raises:
            InputError: adapted features are missing, or not wanted, or do not match.
            ValueError: X is not what the head was fitted on.
        """
        X, image = self._queries(X, adapted)
        return np.concatenate([self._block(X[rows], image[rows]) for rows in self._blocks(len(X))])

    def decision_function(
        self, X: ArrayLike, *, adapted: ArrayLike | None = None
    ) -> Float[np.ndarray, "Q C"] | Float[np.ndarray, "Q"]:
        """`logits`; of two classes, by scikit-learn's custom, the second's minus the first's.

        Args:
            X: as in `logits`.
            adapted: as in `logits`.
        """
        logits = self.logits(X, adapted=adapted)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict(self, X: ArrayLike, *, adapted: ArrayLike | None = None) -> Shaped[np.ndarray, "Q"]:
        """The class of the largest logit; the first of equal ones. Memory does not grow with queries times keys.

        Args:
            X: as in `logits`.
            adapted: as in `logits`.
        """
        X, image = self._queries(X, adapted)
        best = [self._block(X[rows], image[rows]).argmax(1) for rows in self._blocks(len(X))]
        labels: np.ndarray = self.classes_[np.concatenate(best)]
        return labels

    def predict_proba(self, X: ArrayLike, *, adapted: ArrayLike | None = None) -> Float[np.ndarray, "Q C"]:
        """softmax(logits / temperature_). Calibrated where cross-validation set the temperature (`support_cv`).

        Args:
            X: as in `logits`.
            adapted: as in `logits`.
        """
        scaled = self.logits(X, adapted=adapted) / self.temperature_
        p = np.exp(scaled - scaled.max(1, keepdims=True))
        probability: np.ndarray = p / p.sum(1, keepdims=True)
        return probability

    # ---------------------------------------------------------------------------------------------------------- files

    def save(self, path: str | Path) -> None:
        """Write one safetensors file: arrays as tensors, all else as JSON in its metadata.

        Raises:
            InputError: a class name that JSON does not hold.
        """
        from safetensors.numpy import save_file

        check_is_fitted(self)
        parameters = self.get_params(deep=False)
        state = {name: value for name, value in vars(self).items() if name not in parameters}
        learned = state.pop("_learned")
        arrays = {f"learned.{name}": np.ascontiguousarray(value) for name, value in learned.items()}
        if state["_text"] is not None:
            arrays["text"] = np.ascontiguousarray(state["_text"])
        del state["_text"]
        state["selection_"] = asdict(state["selection_"])
        for name in ("classes_", "feature_names_in_"):
            if name in state:
                state[name] = {"dtype": str(state[name].dtype), "values": state[name].tolist()}
        try:
            notes = {"head": type(self).__name__, "parameters": parameters, "state": state}
            metadata = {name: json.dumps(value) for name, value in notes.items()}
        except TypeError as error:
            raise InputError(f"the head cannot be saved: {error}; use strings, integers or floats as labels") from error
        save_file(arrays, path, metadata)

    @classmethod
    def load(cls: type[_H], path: str | Path) -> _H:
        """Read what `save` wrote, by the class that wrote it. `vicinal.heads.load_head` reads any.

        Raises:
            InputError: the file is missing, or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="np") as file:
                notes = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
            kind, parameters, state = notes["head"], notes["parameters"], notes["state"]
        except (OSError, KeyError, ValueError, SafetensorError) as error:
            raise InputError(f"{path} is not a file of a head ({error}); write one with head.save") from error
        if kind != cls.__name__:
            raise InputError(f"{path} holds a {kind}, not a {cls.__name__}; read it with vicinal.heads.load_head")
        head = cls(**parameters)
        for name in ("classes_", "feature_names_in_"):
            if name in state:
                state[name] = np.array(state[name]["values"], dtype=state[name]["dtype"])
        state["selection_"] = Selection(**state["selection_"])
        state["_text"] = arrays.pop("text", None)
        state["_learned"] = {name.removeprefix("learned."): array for name, array in arrays.items()}
        head.__dict__.update(state)
        return head

    # --------------------------------------------------------------------------------------------------------- inside

    def _fit(self, support: Support, validation: Support | None) -> None:
        self._text = support.text
        self._settle(choose(self, support, validation) if self.hyperparameters else Selection("fixed", "fixed", "", {}))
        self._learned = self._learn(support, [self._point()])

    def _settle(self, selection: Selection) -> None:
        self.selection_ = selection
        self.policy_, self.temperature_ = selection.policy, selection.temperature
        for name, value in selection.values.items():
            setattr(self, f"{name}_", value)

    def _point(self) -> dict[str, float]:
        return {name: value for name, value in self.selection_.values.items() if name not in self.linear}

    def _class_count(self) -> int:
        return len(self.classes_)

    def _block(self, X: Float[np.ndarray, "v D"], image: Float[np.ndarray, "v E"]) -> Float[np.ndarray, "v C"]:
        logits = self._base(X, self._text)
        (terms,) = self._terms(self._learned, [self._point()], X, image)
        weights = [self.selection_.values[name] for name in self.linear] or [1.0]
        for weight, term in zip(weights, terms, strict=True):
            logits += logits.dtype.type(weight) * term
        return logits

    def _blocks(self, rows: int) -> Iterator[slice]:
        return blocks(rows, max([self._class_count(), *map(len, self._learned.values())]))

    def _queries(
        self, X: ArrayLike, adapted: ArrayLike | None
    ) -> tuple[Float[np.ndarray, "Q D"], Float[np.ndarray, "Q E"]]:
        check_is_fitted(self)
        vectors = validate_data(self, _plain(X), dtype=_FLOATS, reset=False)
        if not self.adapted_:
            if adapted is not None:
                raise InputError("this head was fitted without adapted features; fit it with them, or leave them away")
            frozen = unit(vectors)
            return frozen, frozen
        if adapted is None:
            raise InputError("this head was fitted with adapted features: give those of the queries too, adapted=…")
        image = _companion(adapted, vectors, "adapted")
        if image.shape[1] != self._adapted_width:
            raise InputError(
                f"adapted features have {image.shape[1]} numbers, those of the support set {self._adapted_width}; "
                "embed both with one adapted model"
            )
        return unit(vectors), unit(image)

    def _validation(self, validation: Validation, vectors: Float[np.ndarray, "N D"]) -> Support:
        """Checked, in unit rows, in its own order."""
        X, y, adapted = validation
        asked = check_array(_plain(X), dtype=vectors.dtype, input_name="validation")
        labels = column_or_1d(_plain(y))
        if asked.shape[1] != vectors.shape[1] or len(labels) != len(asked):
            raise InputError(
                f"validation has {len(asked)} rows of {asked.shape[1]} numbers and {len(labels)} labels; the support "
                f"set has rows of {vectors.shape[1]} numbers"
            )
        unknown = sorted(set(labels.tolist()) - set(self.classes_.tolist()), key=str)
        if unknown:
            raise InputError(f"validation has label {unknown[0]!r}, which no support image has; leave it away")
        if {row.tobytes() for row in vectors}.intersection(row.tobytes() for row in asked):
            raise InputError("a validation image stands in the support set too; take it out of one of them")
        if (adapted is not None) != self.adapted_:
            raise InputError("give adapted features of the support and the validation set, or of neither")
        frozen = unit(asked)
        image = frozen if adapted is None else unit(_companion(adapted, asked, "validation.adapted"))
        if adapted is not None and image.shape[1] != self._adapted_width:
            raise InputError(f"adapted features of validation have {image.shape[1]} numbers, not {self._adapted_width}")
        position: Int[np.ndarray, "V"] = np.searchsorted(self.classes_, labels)
        return Support(frozen, image, position, np.arange(len(asked)), None, None)

    def _refuse(self, text: bool, adapted: bool) -> None:
        name = type(self).__name__
        if self.text_use == "needed" and not text:
            raise InputError(f"{name} needs the text vectors of the classes, text=…; NearestPrototype needs none")
        if adapted and (self.adapted_use == "no" or (self.adapted_use == "without text" and text)):
            raise InputError(
                f"{name} would multiply adapted features with text, which live in different spaces: give it the frozen "
                "features alone" + (", or no text" if self.adapted_use == "without text" else "")
            )

    def _match(self, names: Shaped[np.ndarray, "C"], rows: np.ndarray, vectors: Float[np.ndarray, "N D"]) -> None:
        """Refuse texts of another width, and classes that no image has."""
        if rows.shape[1] != vectors.shape[1]:
            raise InputError(
                f"text vectors have {rows.shape[1]} numbers, image vectors {vectors.shape[1]}; embed both with one "
                "model"
            )
        empty = sorted(set(names.tolist()) - set(self.classes_.tolist()), key=str)
        if empty:
            others = f" (nor have {len(empty) - 1} others)" if len(empty) > 1 else ""
            raise InputError(
                f"class {empty[0]!r} has a text and no image{others}; give it one, leave it out, or use ZeroShot"
            )


def _plain(values: ArrayLike) -> ArrayLike:
    """Tensors as arrays; all else is scikit-learn's to judge."""
    return as_numpy(values) if isinstance(values, Tensor) else values


def _companion(values: ArrayLike, X: Float[np.ndarray, "n D"], name: str) -> Float[np.ndarray, "n E"]:
    """A second matrix with the rows of X."""
    array: np.ndarray = check_array(_plain(values), dtype=X.dtype, input_name=name)
    if len(array) != len(X):
        raise InputError(f"{name} has {len(array)} rows, X {len(X)}; both must hold the same images in the same order")
    return array


def _per_row(groups: ArrayLike, X: Float[np.ndarray, "n D"]) -> Shaped[np.ndarray, "n"]:
    array = as_numpy(groups)
    if array.shape != (len(X),):
        raise InputError(f"groups has shape {array.shape} for {len(X)} rows; give each row the name of its image")
    return array
