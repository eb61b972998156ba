"""Who is trained on and who is measured: seeded, disjoint, and the same whatever the order of the rows.

Letters: N rows, C classes, k images a class.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from vicinal.types import InputError

__all__ = ["class_disjoint"]


def class_disjoint(classes: Sequence[str], *, holdout: float, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Classes to train on and classes never seen: a seeded shuffle of positions, of which the first are held out.

    Python's `random.Random(seed)` shuffles `0 .. C-1`; the first `int(C * holdout)` are unseen. With 102 classes, a
    share of 0.2 and seed 42 these are the 20 unseen flowers of the embedding-tuning system.

    Returns:
        The seen and the unseen classes, each in the order of `classes`.

    Raises:
        InputError: a share that leaves no class on one of the sides.

    >>> class_disjoint(["a", "b", "c", "d", "e"], holdout=0.4, seed=42)
    (('a', 'c', 'e'), ('b', 'd'))
    """
    order = list(range(len(classes)))
    random.Random(seed).shuffle(order)
    unseen = set(order[: int(len(classes) * holdout)])
    if not 0 < len(unseen) < len(classes):
        raise InputError(
            f"holdout={holdout} of {len(classes)} classes leaves {len(unseen)} unseen and "
            f"{len(classes) - len(unseen)} seen; both sides need at least one"
        )
    return (
        tuple(c for i, c in enumerate(classes) if i not in unseen),
        tuple(c for i, c in enumerate(classes) if i in unseen),
    )
