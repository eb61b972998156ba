"""How a head's hyper-parameters are chosen, and the record of it: no number without the labels it took.

    policy       chosen by                                                       labels beside the support set
    fixed        defaults of the literature                                      none
    support_cv   cross-validated likelihood of the support set (the default)     none
    transfer     values given, found on another data set (see `transferred`)     none here
    fewshot_val  accuracy on a validation set of at most min(K, 4) a class       few
    full_val     accuracy on any validation set: not few-shot any more           many
    oracle_test  accuracy on the test set: refused

All heads give logits of one form, and both searches live on it:

    logits = base + sum_t w_t T_t(p)

base: the zero-shot logits; T_t "V C": terms; w_t >= 0: the weights, over which no loop is needed; p: a point of the
other hyper-parameters (beta ...), over which one is.

Accuracy, on the published grids. For one row and p, class y wins over c where dz + w ds > 0, with dz = base_y - base_c
and ds = T_y - T_c: a bound on w from below or above. The row is thus right on one interval of w, and all the values of
w cost one pass. The first best wins, in the published order of the loops; a tie between classes is a miss.

Likelihood. The mean of -log softmax(a base + sum_t b_t T_t)[y] over held-out rows is convex in (a, b): Newton's method
finds its minimum, w = b / a, and 1 / a is the temperature by which `predict_proba` is calibrated. A normal prior keeps
it near zero-shot, a ~ N(1, 1), b ~ N(0, 20^2), which decides where held-out rows do not: no infinite weights on
separable data. Where the terms gain less than one standard error (over classes) on zero-shot alone, their weights are
0. Keys and statistics are made anew from the rest in each fold, and a row never meets a view of itself.

With one image a class nothing can be held out, but the names have seen no image: a is fitted on the support set with
the names alone, and the terms' default weights are divided by it. Names that say little then weigh little, and names
that fit (a near 1) as much as ever.

Letters: V held-out rows, C classes, T terms, P points, A values of the first weight, G of the second, K images a class.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, clone

from vicinal.heads.support import Support
from vicinal.types import InputError

__all__ = [
    "ALPHAS",
    "BETAS",
    "GAMMAS",
    "POLICIES",
    "Selection",
    "blocks",
    "check_policy",
    "choose",
    "search_accuracy",
    "transferred",
    "trust",
]

POLICIES = ("fixed", "support_cv", "fewshot_val", "transfer", "full_val")
"""What `policy=` may be."""

ALPHAS = np.linspace(0, 20, 200)
BETAS = np.linspace(0, 20, 20)
GAMMAS = np.linspace(0, 30, 50)
"""The published grids of the overlap paper's code, the same for frozen and adapted features."""

Points = Sequence[Mapping[str, float]]
Learned = dict[str, np.ndarray]
_H = TypeVar("_H", bound=BaseEstimator)
_PRIOR_WIDTH = 20.0
_HELD_NUMBERS = 2**25  # at most so many cross-validated logits are kept: 128 MB


@runtime_checkable
class Searchable(Protocol):
    """What `choose` needs of a head."""

    policy: str
    hyperparameters: tuple[str, ...]
    linear: tuple[str, ...]
    beside_text: tuple[str, ...]

    def _defaults(self, support: Support) -> dict[str, float]: ...
    def _grid(self, support: Support, *, published: bool) -> dict[str, np.ndarray]: ...
    def _learn(self, support: Support, points: Points) -> Learned: ...
    def _base(self, X: np.ndarray, text: np.ndarray | None) -> np.ndarray: ...
    def _terms(
        self, learned: Learned, points: Points, X: np.ndarray, image: np.ndarray
    ) -> Iterator[Sequence[np.ndarray]]: ...


@dataclass(frozen=True, slots=True)
class Selection:
    """How the hyper-parameters of a fitted head came about.

    Args:
        policy: what was done.
        asked: what was asked for.
        reason: why the two differ, or empty.
        values: name -> value, of every hyper-parameter.
        temperature: by which `predict_proba` divides the logits.
        accuracy: of the chosen values, on the rows that chose them; None where none did. Not a result to quote.
        nll: their mean negative log-likelihood there, where it was the criterion.
        candidates: how many points were tried; a weight solved for counts once.
        labels: how many labelled images all of it took, the support set included.
    """

    policy: str
    asked: str
    reason: str
    values: dict[str, float]
    temperature: float = 1.0
    accuracy: float | None = None
    nll: float | None = None
    candidates: int = 0
    labels: int = 0


def transferred(head: _H) -> _H:
    """An unfitted copy of a fitted head that will use the hyper-parameters found there, on other data.

    Raises:
        ValueError: the head is not fitted.
    """
    if not hasattr(head, "selection_"):  # fitted attributes are absent until then, by scikit-learn's contract
        raise ValueError("transferred takes a fitted head: its hyper-parameters are what is transferred")
    copy: _H = clone(head).set_params(**head.selection_.values, policy="transfer")
    return copy


def check_policy(asked: str, validation: bool) -> None:
    """Refuse a policy that is unknown, that chooses on test, or that does not fit with what is there.

    Raises:
        InputError: an unknown policy or oracle_test; a validation set missing, or not wanted.
    """
    if asked == "oracle_test":
        raise InputError(
            "policy oracle_test would choose hyper-parameters on the test set, and the accuracy there would mean "
            f"nothing; choose one of {', '.join(POLICIES)}"
        )
    if asked not in POLICIES:
        raise InputError(f"policy {asked!r} is unknown; there are {', '.join(POLICIES)}")
    wants = asked in ("fewshot_val", "full_val")
    if wants and not validation:
        raise InputError(f"policy {asked} needs validation=Validation(X, y); or choose support_cv, which needs none")
    if validation and not wants:
        raise InputError(
            f"policy {asked} does not use a validation set; leave it away, or choose fewshot_val or full_val"
        )


def choose(head: Searchable, support: Support, validation: Support | None) -> Selection:
    """Every hyper-parameter that is None, by the head's policy, which `check_policy` has seen.

    Raises:
        InputError: a validation set too large for its policy, or values missing for a transfer.
    """
    asked = head.policy
    given = {name: float(value) for name in head.hyperparameters if (value := getattr(head, name)) is not None}
    defaults = head._defaults(support)
    if support.text is None:
        given = {name: defaults[name] for name in head.beside_text} | given
    used = Selection(asked, asked, "", {**defaults, **given}, labels=_images(support))
    free = [name for name in head.hyperparameters if name not in given]
    if asked == "transfer" and free:
        raise InputError(f"policy transfer needs a value for {', '.join(free)}; see vicinal.heads.transferred")
    if asked in ("fixed", "transfer"):
        return used
    if not free:
        return _instead(used, "every hyper-parameter was given")
    if validation is None:
        return _by_likelihood(head, support, given, used)
    if asked == "fewshot_val":
        most = min(4, int(support.images_per_class().max()))
        counts = np.bincount(validation.labels)
        if counts.max() > most:
            raise InputError(
                f"policy fewshot_val takes at most min(K, 4) = {most} validation images a class, and one has "
                f"{counts.max()}; leave some away, or say full_val: it is not few-shot any more"
            )
    return _by_accuracy(head, support, validation, given, used)


def search_accuracy(
    base: Float[np.ndarray, "V C"],
    terms: Sequence[Float[np.ndarray, "V C"]],
    labels: Int[np.ndarray, "V"],
    grids: Sequence[Float[np.ndarray, "_"]],
) -> Int[np.ndarray, "A G"]:
    """How many rows are right at each value of the weights: the first in closed form, the second in a loop.

    Args:
        base: logits without the terms.
        terms: one or two of them.
        labels: the right class of each row.
        grids: the values of each term's weight, ascending; as many as there are terms.

    >>> base, term = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> search_accuracy(base, [term], np.array([1]), [np.array([0.0, 0.5, 1.0, 1.5])])[:, 0]    # a tie is a miss
    array([0, 0, 0, 1])
    """
    rows = np.arange(len(labels))
    alphas = grids[0]
    gain = terms[0][rows, labels][:, None] - terms[0]
    rising = gain >= 0
    right = np.empty((len(alphas), 1 if len(grids) == 1 else len(grids[1])), dtype=np.int64)
    for g, second in enumerate(grids[1] if len(grids) == 2 else (None,)):
        z = base if second is None else base + terms[1].dtype.type(second) * terms[1]
        lead = z[rows, labels][:, None] - z
        lead[rows, labels] = 1  # a class has nothing to fear from itself
        with np.errstate(divide="ignore", invalid="ignore"):
            bound = -lead / gain  # gain 0: +-inf by the sign of the lead; a tie for good is NaN, and no value will do
        above = np.where(rising, bound, -np.inf).max(1)
        below = np.where(rising, np.inf, bound).min(1)
        first = np.searchsorted(alphas, above, side="right")
        last = np.searchsorted(alphas, below, side="left")
        some = first < last
        size = len(alphas) + 1
        steps = np.bincount(first[some], minlength=size) - np.bincount(last[some], minlength=size)
        right[:, g] = steps.cumsum()[:-1]
    return right


def _by_accuracy(
    head: Searchable, support: Support, validation: Support, given: Mapping[str, float], used: Selection
) -> Selection:
    grid = {**head._grid(support, published=True), **{name: np.array([value]) for name, value in given.items()}}
    points = _points(head, grid)
    weights = [grid[name] for name in head.linear] or [np.ones(1)]
    learned = head._learn(support, points)
    right: np.ndarray | None = None
    for rows in blocks(len(validation), max(map(len, learned.values()))):
        X, image, y = validation.frozen[rows], validation.image[rows], validation.labels[rows]
        base = head._base(X, support.text)
        found = [search_accuracy(base, terms, y, weights) for terms in head._terms(learned, points, X, image)]
        counts = np.stack(found)
        right = counts if right is None else right + counts
    assert right is not None
    best = np.unravel_index(right.argmax(), right.shape)  # the first of the best
    chosen = {name: float(grid[name][best[1 + t]]) for t, name in enumerate(head.linear)}
    values = {**used.values, **points[best[0]], **chosen}
    return Selection(
        used.policy,
        used.asked,
        "",
        {name: values[name] for name in head.hyperparameters},
        accuracy=float(right[best]) / len(validation),
        candidates=right.size,
        labels=used.labels + len(validation),
    )


def _by_likelihood(head: Searchable, support: Support, given: Mapping[str, float], used: Selection) -> Selection:
    folds = support.folds()
    if support.classes < 2:
        return _instead(used, "there is one class, so every value is right")
    if not folds:
        return _by_names(head, support, given, used)
    grid = {**head._grid(support, published=False), **{name: np.array([value]) for name, value in given.items()}}
    points = _points(head, grid)
    base, terms, labels = _held_out(head, support, folds, points)
    fixed = [given.get(name) for name in head.linear] if head.linear else [1.0]  # None: solved for
    free = [t for t, weight in enumerate(fixed) if weight is None]
    best: tuple[float, np.ndarray, int] | None = None
    scale: np.ndarray | None = None
    for p, term in enumerate(terms):
        known = base + sum(base.dtype.type(weight) * term[t] for t, weight in enumerate(fixed) if weight is not None)
        loss, scale = _likelihood(np.stack([known, *term[free]]), labels, scale)
        if best is None or loss < best[0]:
            best = loss, scale, p
    assert best is not None
    _, scale, p = best
    solved = iter((scale[1:] / scale[0]).tolist())
    weights = [next(solved) if weight is None else weight for weight in fixed]
    total = base + sum(base.dtype.type(weight) * term for weight, term in zip(weights, terms[p], strict=True))
    nll = _nll(total, scale[0], labels)
    if len(free) == len(fixed) and support.text is not None:  # zero-shot may be as good
        _, alone = _likelihood(base[None], labels, None)
        nll_alone = _nll(base, alone[0], labels)
        if not _beyond_chance(nll_alone - nll, labels):
            weights, total, nll, scale = [0.0 for _ in fixed], base, nll_alone, alone
    values = {**used.values, **points[p], **dict(zip(head.linear, weights, strict=False))}
    right = (total.argmax(1) == labels) & ((total == total.max(1, keepdims=True)).sum(1) == 1)
    return Selection(
        used.policy,
        used.asked,
        "",
        {name: values[name] for name in head.hyperparameters},
        temperature=float(1 / scale[0]),
        accuracy=float(right.mean()),
        nll=float(nll.mean(dtype=np.float64)),
        candidates=len(points),
        labels=used.labels,
    )


def _by_names(head: Searchable, support: Support, given: Mapping[str, float], used: Selection) -> Selection:
    """The defaults, their weights divided by a: the scale at which names alone make the support labels likeliest."""
    why = "no class has two images, so none can be held out"
    if support.text is None or set(head.linear) | set(head.beside_text) <= set(given):
        return _instead(used, why)
    scale = trust(head, support)
    weights = {name: value / scale for name, value in used.values.items() if name in head.linear}
    names = {name: scale for name in head.beside_text if name not in head.linear}
    return replace(
        _instead(used, f"{why}; the weight of names is fitted to them, and the rest is default"),
        values={**used.values, **weights, **names, **given},
        temperature=1 / scale if weights else 1.0,
    )


def trust(head: Searchable, support: Support) -> float:
    """a: the scale at which the names alone, which have seen no image, make the labels of the support set likeliest."""
    if support.text is None:
        return 1.0
    _, (scale,) = _likelihood(head._base(support.frozen, support.text)[None], support.labels, None)
    return float(scale)


def _held_out(
    head: Searchable, support: Support, folds: Sequence[np.ndarray], points: Points
) -> tuple[Float[np.ndarray, "V C"], Float[np.ndarray, "P T V C"], Int[np.ndarray, "V"]]:
    """Logits of rows that the rest of the support set knows nothing of."""
    count = max(1, len(head.linear))
    most = max(256, _HELD_NUMBERS // (support.classes * len(points) * count))
    step = max(1, -(-sum(int(mask.sum()) for mask in folds) // most))  # every so many-th row, where there are too many
    held = [np.flatnonzero(mask)[::step] for mask in folds]
    labels = np.concatenate([support.labels[rows] for rows in held])
    base = np.empty((len(labels), support.classes), dtype=support.frozen.dtype)
    terms = np.empty((len(points), count, *base.shape), dtype=base.dtype)
    at = 0
    for mask, rows in zip(folds, held, strict=True):
        rest = support.where(~mask)
        learned = head._learn(rest, points)
        for block in blocks(len(rows), max(map(len, learned.values()))):
            X, image = support.frozen[rows[block]], support.image[rows[block]]
            to = slice(at, at + len(X))
            at += len(X)
            base[to] = head._base(X, support.text)
            for p, found in enumerate(head._terms(learned, points, X, image)):
                for t, term in enumerate(found):
                    terms[p, t, to] = term
    return base, terms, labels


def _likelihood(
    features: Float[np.ndarray, "m V C"], labels: Int[np.ndarray, "V"], start: np.ndarray | None
) -> tuple[float, Float[np.ndarray, "m"]]:
    """The scales (a, b) of the features that make the labels likeliest, under the prior; and the loss there."""
    rows = np.arange(len(labels))
    behind = features - features[:, rows, labels][:, :, None]
    mean = np.zeros(len(features))
    mean[0] = 1
    tight = np.full(len(features), _PRIOR_WIDTH**-2.0)
    tight[0] = 1
    floor = np.zeros(len(features))
    floor[0] = 1e-2

    def loss(scale: np.ndarray, deep: bool) -> tuple[float, np.ndarray, np.ndarray]:
        logits = np.tensordot(scale.astype(behind.dtype), behind, 1)
        top = logits.max(1, keepdims=True)
        p = np.exp(logits - top)
        total = p.sum(1, keepdims=True)
        off = scale - mean
        value = float((np.log(total) + top).mean(dtype=np.float64)) + float(off @ (tight * off)) / 2 / len(rows)
        if not deep:
            return value, mean, mean
        p /= total
        weighted = p * behind
        expected = weighted.sum(2, dtype=np.float64)
        gradient = expected.mean(1) + tight * off / len(rows)
        second = np.array([[np.vdot(w, b) for b in behind] for w in weighted], dtype=np.float64)
        return value, gradient, (second - expected @ expected.T) / len(rows) + np.diag(tight / len(rows))

    scale = np.maximum(mean if start is None else start, floor)
    value, gradient, curvature = loss(scale, True)
    for _ in range(50):
        free = (scale > floor) | (gradient < 0)
        if not free.any():
            break
        move = np.zeros_like(scale)
        move[free] = -np.linalg.solve(curvature[np.ix_(free, free)], gradient[free])
        size = 1.0
        while size > 1e-4:
            trial = np.maximum(scale + size * move, floor)
            if loss(trial, False)[0] < value - 1e-9:
                break
            size /= 2
        else:
            break
        before = value
        scale = trial
        value, gradient, curvature = loss(scale, True)
        if before - value < 1e-6:
            break
    return value, scale


def _nll(logits: Float[np.ndarray, "V C"], scale: float, labels: Int[np.ndarray, "V"]) -> Float[np.ndarray, "V"]:
    behind = (logits - logits[np.arange(len(labels)), labels][:, None]) * logits.dtype.type(scale)
    top = behind.max(1, keepdims=True)
    loss: np.ndarray = np.log(np.exp(behind - top).sum(1)) + top[:, 0]
    return loss


def _beyond_chance(gain: Float[np.ndarray, "V"], labels: Int[np.ndarray, "V"]) -> bool:
    """Whether the mean over classes is above its standard error."""
    count = np.bincount(labels)
    mean = (np.bincount(labels, gain) / np.maximum(count, 1))[count > 0]
    return len(mean) > 1 and float(mean.mean()) > float(mean.std(ddof=1)) / len(mean) ** 0.5


def _points(head: Searchable, grid: Mapping[str, np.ndarray]) -> list[dict[str, float]]:
    names = [name for name in head.hyperparameters if name not in head.linear]
    return [dict(zip(names, map(float, p), strict=True)) for p in itertools.product(*(grid[name] for name in names))]


def _instead(used: Selection, reason: str) -> Selection:
    return Selection("fixed", used.asked, reason, used.values, labels=used.labels)


def _images(support: Support) -> int:
    return int(support.images_per_class().sum())


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of rows, few enough that a block against `width` others is half a megabyte: it stays in the cache."""
    size = max(16, 2**17 // max(1, width))
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))
