"""Who is trained on and who is measured: seeded, disjoint, and the same whatever the order of the rows.

Letters: N rows, C classes, G groups, k images a class.

Every function gives masks over rows, or names of classes, and touches no file. Only `kshot` depends on the order of the
rows, since the published few-shot lists do.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vicinal.data.manifest import SPLIT_WORDS, row_list, split_word
from vicinal.types import InputError

__all__ = [
    "SPLIT_WORDS",
    "class_disjoint",
    "coop_shots",
    "grouped",
    "holdout_images",
    "kshot",
    "official",
    "split_word",
    "straddling",
]


def class_disjoint(classes: Sequence[str], *, holdout: float, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Classes to train on and classes never seen: a seeded shuffle of positions, of which the first are held out.

    Python's `random.Random(seed)` shuffles `0 .. C-1`; the first `int(C * holdout)` are unseen. With 102 classes, a
    share of 0.2 and seed 42 these are the 20 unseen flowers of the embedding-tuning system.

    Args:
        classes: C different names, in the order that the data set gives them (sorted, unless it has its own).
        holdout: the share of the classes that is held out, between 0 and 1.
        seed: of the shuffle.

    Returns:
        The seen and the unseen classes, each in the order of `classes`.

    Raises:
        InputError: a share that leaves no class on one of the sides.
        ValueError: a class that is named twice.

    >>> class_disjoint(["a", "b", "c", "d", "e"], holdout=0.4, seed=42)
    (('a', 'c', 'e'), ('b', 'd'))
    """
    if len(set(classes)) != len(classes):
        raise ValueError("class_disjoint takes each class once")
    held = _first_of_shuffle(len(classes), holdout, seed, "classes")
    seen = tuple(c for i, c in enumerate(classes) if i not in held)
    return seen, tuple(c for i, c in enumerate(classes) if i in held)


def grouped(groups: Sequence[str | None], *, holdout: float, seed: int) -> Bool[Tensor, "N"]:
    """Rows of the groups that are held out; a group is never on both sides.

    The distinct groups, sorted, are shuffled as in `class_disjoint`, and the first `int(G * holdout)` are held out: a
    share of the groups, not of the rows.

    Args:
        groups: the group of each row: who took the photo, which shop, which patient.
        holdout: the share of the groups that is held out, between 0 and 1.
        seed: of the shuffle.

    Raises:
        InputError: a row without a group, or a share that leaves no group on one of the sides.

    >>> grouped(["anna", "ben", "anna", "cleo"], holdout=0.4, seed=0).tolist()
    [True, False, True, False]
    """
    column = pa.chunked_array([pa.array(groups)])
    missing = np.flatnonzero(pc.is_null(column).to_numpy())
    if len(missing):
        raise InputError(f"no group in {row_list(missing)}; give every row one, or leave those rows out")
    names = sorted(pc.unique(column).to_pylist())
    held = _first_of_shuffle(len(names), holdout, seed, "groups")
    chosen = pa.array([name for i, name in enumerate(names) if i in held])
    return _mask(pc.is_in(column, value_set=chosen))


def kshot(labels: Int[Tensor, "N"], k: int, *, seed: int | random.Random) -> Bool[Tensor, "N"]:
    """The k rows of each class that CoOp's few-shot protocol draws (Zhou et al. 2022, arXiv:2109.01134).

    Labels are visited in the order of their first appearance; of each, Python's `random.sample` draws k rows, or all
    are taken where there are fewer. The published lists (seeds 1, 2, 3; k of 1, 2, 4, 8, 16) come out of it only if the
    rows stand in the order of the published split file. CoOp's validation shots go on in the same stream of random
    numbers, so hand one `random.Random` to both:

    >>> stream = random.Random(1)
    >>> train = kshot(torch.tensor([0, 0, 0, 1, 1, 1]), 2, seed=stream)
    >>> val = kshot(torch.tensor([0, 0, 1, 1]), min(2, 4), seed=stream)
    >>> train.tolist(), int(val.sum())
    ([True, False, True, True, True, False], 4)

    Args:
        labels: the class of each row.
        k: how many rows a class, at least 1.
        seed: a number, or a generator that goes on from where it is.

    Raises:
        ValueError: k below 1.
    """
    if k < 1:
        raise ValueError(f"kshot takes k of at least 1, not {k}")
    stream = seed if isinstance(seed, random.Random) else random.Random(seed)
    array = labels.cpu().numpy()
    _, first, inverse, counts = np.unique(array, return_index=True, return_inverse=True, return_counts=True)
    rows = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])
    chosen = torch.zeros(len(array), dtype=torch.bool)
    for label in np.argsort(first):
        have = rows[label]
        # sampling positions draws the same numbers as sampling the items themselves
        take = have[stream.sample(range(len(have)), k)] if len(have) >= k else have
        chosen[torch.from_numpy(take)] = True
    return chosen


def coop_shots(
    train: Int[Tensor, "N"], val: Int[Tensor, "M"], k: int, *, seed: int
) -> tuple[Bool[Tensor, "N"], Bool[Tensor, "M"]]:
    """The shots of a split file that CoOp publishes: k rows a class of its train list, min(k, 4) of its val list.

    Both come from one stream of random numbers, train first. With the rows in the order of the published
    `split_zhou_*.json`, k of 1, 2, 4, 8, 16 and seeds 1, 2, 3, these are the published lists.

    Args:
        train: the class of each row of the train list.
        val: the class of each row of the val list; it may be empty.
        k: shots a class, at least 1.
        seed: of both draws.

    Returns:
        A mask over each of the two lists.

    >>> dtd = torch.arange(47).repeat_interleave(60), torch.arange(47).repeat_interleave(24)    # Describable Textures
    >>> train, val = coop_shots(*dtd, 1, seed=1)
    >>> train.nonzero().flatten()[:4].tolist(), val.nonzero().flatten()[:4].tolist()
    ([8, 96, 174, 231], [13, 47, 48, 88])
    """
    stream = random.Random(seed)
    return kshot(train, k, seed=stream), kshot(val, min(k, 4), seed=stream)


def official(
    split: Sequence[str | None], *, images: Sequence[str] | None = None, name: str = "the split column"
) -> dict[str, Bool[Tensor, "N"]]:
    """The parts that a split column names: train, val, test, in that order, those that there are.

    Understood are the words of `vicinal.data.manifest.SPLIT_WORDS`, in any case.

    Args:
        split: one word a row.
        images: the image file of each row. Given, a file that stands in two parts is an error.
        name: what error messages call the column.

    Raises:
        InputError: an unknown word, a row without one, or a file in two parts.

    >>> official(["train", "Validation", "train"])
    {'train': tensor([ True, False,  True]), 'val': tensor([False,  True, False])}
    """
    column = pa.chunked_array([pa.array(split, pa.string())])
    words = pc.unique(column).to_pylist()
    known = {word: split_word(word) for word in words if word is not None}
    strange = np.flatnonzero(pc.invert(_is_in(column, [w for w, part in known.items() if part])).to_numpy())
    if len(strange):
        unknown = ", ".join(sorted(repr(w) for w, part in known.items() if part is None)) or "no word at all"
        accepted = "; ".join(f"{part}: {', '.join(aliases)}" for part, aliases in SPLIT_WORDS.items())
        raise InputError(f"{name} has {unknown} in {row_list(strange)}; the words understood are {accepted}")
    parts = {
        part: _mask(_is_in(column, [w for w, p in known.items() if p == part]))
        for part in SPLIT_WORDS
        if part in known.values()
    }
    if images is not None:
        both = straddling(images, parts)
        if both:
            file, (row, in_row), (other, in_other) = both[0]
            raise InputError(
                f"{len(both):,} image file{'s are' if len(both) > 1 else ' is'} in more than one part of {name}: "
                f"{file} is in {in_row} (row {row + 1}) and in {in_other} (row {other + 1}). What is measured must not "
                "be trained on: keep one of the two"
            )
    return parts


def holdout_images(
    labels: Int[Tensor, "N"], *, share: float, seed: int, at_least: int = 5, ids: Sequence[str] | None = None
) -> Bool[Tensor, "N"]:
    """Rows kept back of each class, to measure the classes that are trained on.

    Of a class of n rows `round(n * share)` are kept back, at least one and never all; of a class with fewer than
    `at_least` rows, none.

    Args:
        labels: the class of each row.
        share: the share of each class, between 0 and 1.
        seed: of the choice.
        at_least: the smallest class that gives any.
        ids: a name for each row. Given, the choice is the same whatever the order of the rows.

    Raises:
        InputError: a share that is not between 0 and 1.

    >>> holdout_images(torch.tensor([0, 0, 0, 0, 0, 1, 1]), share=0.2, seed=0).tolist()
    [False, False, False, True, False, False, False]
    """
    if not 0 < share < 1:
        raise InputError(f"the share of images kept back lies between 0 and 1, not at {share}")
    array = labels.cpu().numpy()
    order = np.arange(len(array)) if ids is None else np.argsort(np.asarray(ids, dtype=object), kind="stable")
    lot = np.empty(len(array))
    lot[order] = np.random.default_rng(seed).random(len(array))
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    kept = np.clip(np.rint(counts * share).astype(np.int64), 1, np.maximum(counts - 1, 0))
    kept[counts < at_least] = 0
    by_class = np.lexsort((lot, inverse))
    rank = np.empty(len(array), np.int64)
    rank[by_class] = np.arange(len(array)) - np.repeat(np.cumsum(counts) - counts, counts)
    return torch.from_numpy(rank < kept[inverse])


def straddling(
    images: Sequence[str], parts: dict[str, Bool[Tensor, "N"]]
) -> list[tuple[str, tuple[int, str], tuple[int, str]]]:
    """Image files with rows in more than one part: the file, then a row and its part, twice.

    >>> two = {"train": torch.tensor([True, True, False]), "test": torch.tensor([False, False, True])}
    >>> straddling(["a.png", "b.png", "a.png"], two)
    [('a.png', (0, 'train'), (2, 'test'))]
    """
    files = pa.array(images, pa.string()).dictionary_encode()
    codes = files.indices.to_numpy()
    first: dict[str, np.ndarray] = {}
    for part, mask in parts.items():
        rows = np.flatnonzero(mask.cpu().numpy())
        first[part] = np.full(len(files.dictionary), -1, np.int64)
        first[part][codes[rows[::-1]]] = rows[::-1]  # the last assignment wins: the first row
    found = []
    count = sum((at >= 0).astype(np.int64) for at in first.values())
    for code in np.flatnonzero(np.asarray(count) > 1):
        places = [(int(at[code]), part) for part, at in first.items() if at[code] >= 0]
        found.append((files.dictionary[int(code)].as_py(), places[0], places[1]))
    return found


def _first_of_shuffle(count: int, holdout: float, seed: int, what: str) -> set[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    held = set(order[: int(count * holdout)]) if 0 < holdout < 1 else set()
    if not 0 < len(held) < count:
        raise InputError(
            f"holdout={holdout} of {count} {what} leaves {len(held)} held out and {count - len(held)} to train on; "
            "both sides need at least one"
        )
    return held


def _is_in(column: pa.ChunkedArray, words: Sequence[str]) -> pa.ChunkedArray:
    return pc.is_in(column, value_set=pa.array(words, pa.string()))


def _mask(truth: pa.ChunkedArray) -> Bool[Tensor, "N"]:
    return torch.from_numpy(np.array(truth.to_numpy()))
