"""The few-shot protocol: a head fitted on K labelled images a class, and asked about images of those classes.

    right_q = [argmax_c head(x_q)_c = y_q]         one value a query; nothing is averaged here

The hyper-parameters are chosen by the head's policy from what the protocol hands it: the support set, a few validation
images, or what another run found. Never from the queries. Under `shift` the same fitted head, with the same
hyper-parameters, is asked about other sources of the same classes: another drawing style, other photographers.

An answer is a function of the query and of the fitted head alone: not of the other queries, nor of how many there are.

Letters: N support rows, Q queries, C classes, D numbers an embedding, E numbers an adapted embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.base import clone
from torch import Tensor

from vicinal.evaluation.intervals import mean
from vicinal.heads import Head, Selection, Validation, check_support
from vicinal.types import InputError, Metrics, PerQuery

__all__ = ["Features", "FewShot", "few_shot", "few_shot_scores"]

BLOCK = 4096  # queries whose logits are held at once, where columns of them are chosen


@dataclass(frozen=True, slots=True)
class Features:
    """Images as a head sees them.

    Args:
        frozen: "N D": of the tower that the class texts belong to. They may meet text.
        labels: "N": positions in a list of classes that all sides share.
        ids: what each row is a picture of. Rows with one id are views of one image.
        adapted: "N E": the same rows by an adapted tower, or None. They meet one another, and never text.
    """

    frozen: Float[Tensor, "N D"]
    labels: Int[Tensor, "N"]
    ids: tuple[str, ...]
    adapted: Float[Tensor, "N E"] | None = None

    def __post_init__(self) -> None:
        rows = {len(self.frozen), len(self.labels), len(self.ids)}
        if len(rows | ({len(self.adapted)} if self.adapted is not None else set())) > 1:
            raise ValueError("Features: frozen, labels, ids and adapted do not have equally many rows")

    def __len__(self) -> int:
        return len(self.ids)

    def where(self, mask: Bool[Tensor, "N"]) -> Features:
        """The rows where `mask` is true, in order."""
        rows = mask.nonzero().flatten()
        ids = tuple(self.ids[i] for i in rows.tolist())
        return Features(self.frozen[rows], self.labels[rows], ids, None if self.adapted is None else self.adapted[rows])


@dataclass(frozen=True, slots=True)
class FewShot:
    """What the protocol gives.

    Args:
        scores: part -> `accuracy`, "1 Q", 1 or 0, NaN for a query whose class has no support image.
        head: as it was fitted.
    """

    scores: Mapping[str, PerQuery]
    head: Head

    @property
    def selection(self) -> Selection:
        """How the hyper-parameters came about."""
        return self.head.selection_


def few_shot_scores(
    head: Head,
    support: Features,
    queries: Features | Mapping[str, Features],
    *,
    shots: int | None = None,
    text: Float[Tensor, "C D"] | None = None,
    validation: Features | None = None,
    candidates: Mapping[str, Int[Tensor, "c"]] | None = None,
) -> FewShot:
    """Fit a copy of a head, and ask it; see the module's text.

    Args:
        head: unfitted, or fitted elsewhere: what it learnt there is not used.
        support: K images a class, or K times V rows of V views each (equal ids).
        queries: what is asked: one part, called "test", or several, for a shift.
        shots: K. Given, a class with fewer images is an error.
        text: a vector for each class, or None: images alone. Taken by heads that use text.
        validation: labelled images for the policies fewshot_val and full_val; other policies want None.
        candidates: part -> the classes that its queries may be given; of all others the logits are left out, as is
            custom for ImageNet-A and -R. A part that it does not name may be given all.

    Returns:
        One value a query and part. Units are the classes.

    Raises:
        InputError: a class with fewer images than shots, a support set that holds a query, no queries, or what the
            head refuses: an unknown policy or one that chooses on test, text of another width, a class without
            image or text, adapted features on one side only.

    >>> x = torch.tensor([[1.0, 0.1], [0.0, 1.0], [1.0, 0.0], [0.2, 1.0]])
    >>> support = Features(x[:2], torch.tensor([0, 1]), ("a", "b"))
    >>> from vicinal.heads import TipAdapter
    >>> found = few_shot_scores(TipAdapter(), support, Features(x[2:], torch.tensor([0, 1]), ("c", "d")))
    >>> found.scores["test"].values["accuracy"], found.selection.policy, found.selection.asked
    (tensor([[1., 1.]]), 'fixed', 'support_cv')
    """
    parts = {"test": queries} if isinstance(queries, Features) else dict(queries)
    _refuse(support, parts, shots)
    fitted = clone(head)
    uses_text = text is not None and fitted.text_use != "unused"
    present, labels = torch.unique(support.labels, return_inverse=True)
    classes = present.numpy()
    held = None
    if validation is not None and fitted.hyperparameters:
        known = validation.where(torch.isin(validation.labels, present))
        held = Validation(known.frozen.numpy(), _positions(classes, known.labels), _array(known.adapted))
    fitted.fit(
        support.frozen.numpy(),
        labels.numpy(),
        text=text[present].numpy() if uses_text and text is not None else None,
        adapted=_array(support.adapted),
        groups=np.unique(np.array(support.ids, dtype=object), return_inverse=True)[1],
        validation=held,
    )
    scores = {}
    for name, part in parts.items():
        allowed = None if candidates is None or name not in candidates else torch.isin(present, candidates[name])
        if allowed is not None and not allowed.any():
            raise InputError(f"{name}: none of its candidates has a support image")
        answer = torch.from_numpy(classes[_answers(fitted, part, allowed)])
        right = (answer == part.labels).float()
        right[~torch.isin(part.labels, present)] = torch.nan
        scores[name] = PerQuery({"accuracy": right[None]}, part.labels)
    return FewShot(scores, fitted)


def few_shot(
    head: Head,
    support: Features,
    queries: Features,
    *,
    shots: int | None = None,
    text: Float[Tensor, "C D"] | None = None,
    validation: Features | None = None,
) -> Metrics:
    """`few_shot_scores`, averaged over the queries (top-1, as CoOp reports it), with an interval over classes.

    Args:
        head: as in `few_shot_scores`.
        support: as in `few_shot_scores`.
        queries: as in `few_shot_scores`.
        shots: as in `few_shot_scores`.
        text: as in `few_shot_scores`.
        validation: as in `few_shot_scores`.

    Raises:
        InputError: as in `few_shot_scores`.
    """
    found = few_shot_scores(head, support, queries, shots=shots, text=text, validation=validation)
    return mean(found.scores["test"])


def _refuse(support: Features, parts: Mapping[str, Features], shots: int | None) -> None:
    if not len(support):
        raise InputError("the support set is empty; give at least one image a class")
    first: dict[str, int] = {}
    for row, name in enumerate(support.ids):
        first.setdefault(name, row)
    images = list(first.values())  # one row of each image
    check_support(support.frozen[images].numpy(), support.labels[images].numpy(), shots=shots)
    for name, part in parts.items():
        if not len(part):
            raise InputError(f"{name}: there is not one image to ask about")
        if (part.adapted is None) != (support.adapted is None):
            raise InputError(f"give adapted features of the support set and of {name}, or of neither")
        check_support(
            support.frozen.numpy(),
            support.labels.numpy(),
            queries=part.frozen.numpy(),
            ids=support.ids,
            query_ids=part.ids,
        )


def _answers(head: Head, part: Features, allowed: Bool[Tensor, "C"] | None) -> Int[np.ndarray, "Q"]:
    """The position of each query's class, of those allowed."""
    if allowed is None:
        return np.asarray(head.predict(part.frozen.numpy(), adapted=_array(part.adapted)), dtype=np.int64)
    columns = allowed.nonzero().flatten().numpy()
    answers = np.empty(len(part), dtype=np.int64)
    for start in range(0, len(part), BLOCK):
        rows = slice(start, start + BLOCK)
        adapted = None if part.adapted is None else part.adapted[rows].numpy()
        answers[rows] = columns[head.logits(part.frozen[rows].numpy(), adapted=adapted)[:, columns].argmax(1)]
    return answers


def _positions(classes: Int[np.ndarray, "C"], labels: Int[Tensor, "V"]) -> Int[np.ndarray, "V"]:
    return np.searchsorted(classes, labels.numpy())


def _array(values: Float[Tensor, "n E"] | None) -> Float[np.ndarray, "n E"] | None:
    return None if values is None else values.numpy()
