"""Which rows make a batch: any; K images each of P classes, any or hard to tell apart; or no two that are alike.

An epoch is a pure function of (seed, epoch): nothing is carried from one to the next, so that training can restart at
any batch without replaying those before.

Letters: N rows, C classes, n_c rows of class c, P classes a batch, K images a class, L batches an epoch, G = P L groups
of K rows in an epoch, q_c groups of class c, M neighbours of a class.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from vicinal.types import InputError

__all__ = ["HardClassSampler", "NoDuplicateSampler", "PKSampler", "Sampler", "ShuffleSampler", "occurrence"]


@runtime_checkable
class Sampler(Protocol):
    """What `train_batches` needs: the number of batches in an epoch, and the rows of each."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int) -> list[list[int]]:
        """The rows of every batch of that epoch, the same whenever it is asked."""
        ...


class ShuffleSampler:
    """Every row once an epoch, in random order.

    Args:
        size: N, the number of rows.
        batch_size: rows a batch. If there are fewer rows, they make the one batch.
        seed: of the shuffles.
        drop_last: leave out the rows that do not fill a batch (others each epoch), so that all batches are equal.

    Raises:
        InputError: there are no rows, or the batch size is not positive.

    >>> sampler = ShuffleSampler(size=5, batch_size=2, seed=0, drop_last=False)
    >>> len(sampler), sorted(row for batch in sampler.epoch(0) for row in batch)
    (3, [0, 1, 2, 3, 4])
    """

    def __init__(self, size: int, batch_size: int, *, seed: int, drop_last: bool = True) -> None:
        if size < 1:
            raise InputError("there are no rows to train on")
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} must be at least 1")
        self.size = size
        self.batch_size = min(batch_size, size)
        self.seed = seed
        self.drop_last = drop_last

    def __len__(self) -> int:
        return self.size // self.batch_size if self.drop_last else math.ceil(self.size / self.batch_size)

    def epoch(self, epoch: int) -> list[list[int]]:
        """The rows of every batch."""
        order = _random(self.seed, epoch, self.size).argsort(kind="stable").tolist()
        return [order[at : at + self.batch_size] for at in range(0, len(self) * self.batch_size, self.batch_size)]


class PKSampler:
    """P different classes a batch, K images of each, laid class by class: what pair losses and mining need.

    Class c comes up q_c = min(L, s g_c) times an epoch, g_c = max(1, n_c / K), where s is such that all groups fill L
    batches exactly; the fraction of q_c is drawn anew each epoch. So every image is seen about once an epoch (s = 1)
    unless a class is too small (it comes once, and its images repeat within the group) or so large that it would have
    to stand twice in a batch. Within an epoch no image of a class comes a second time before all have come once.

    Args:
        labels: "N", the class of each row.
        classes: P, different classes a batch.
        images_per_class: K.
        seed: of the draws.

    Attributes:
        repeated: how many classes have fewer than K images, so that some come twice in a group.
        singles: how many of them have one image: K views of the same, no positive pair that teaches anything but
            invariance to the augmentation.

    Raises:
        InputError: there are fewer than P classes.

    >>> import torch
    >>> sampler = PKSampler(torch.tensor([0, 0, 1, 1, 2, 2]), classes=3, images_per_class=2, seed=0)
    >>> len(sampler), sorted(sampler.epoch(0)[0])
    (1, [0, 1, 2, 3, 4, 5])
    """

    def __init__(
        self, labels: Int[Tensor, "N"] | Int[np.ndarray, "N"], *, classes: int, images_per_class: int, seed: int
    ) -> None:
        found, position, counts = np.unique(np.asarray(labels), return_inverse=True, return_counts=True)
        if classes < 1 or images_per_class < 1:
            raise InputError(f"classes={classes} and images_per_class={images_per_class} must be at least 1")
        if len(found) < classes:
            raise InputError(
                f"sampler.pk.classes={classes}, but there are only {len(found)} classes to train on; "
                f"set sampler.pk.classes={len(found)} or less"
            )
        self.classes = classes
        self.images_per_class = images_per_class
        self.seed = seed
        self.repeated = int((counts < images_per_class).sum())
        self.singles = int((counts == 1).sum())
        self._position = position
        self._counts = counts
        self._starts = counts.cumsum() - counts
        natural = np.maximum(1.0, counts / images_per_class)
        self._batches = max(1, round(float(natural.sum()) / classes))
        self._quota = _fill(natural, limit=self._batches, total=classes * self._batches)

    @property
    def batch_size(self) -> int:
        """P K."""
        return self.classes * self.images_per_class

    def __len__(self) -> int:
        return self._batches

    def epoch(self, epoch: int) -> list[list[int]]:
        """The rows of every batch: P runs of K rows of one class."""
        return self._epoch(epoch, None)

    def _epoch(self, epoch: int, neighbours: Int[np.ndarray, "C M"] | None) -> list[list[int]]:
        rows, per_class = len(self._position), len(self._counts)
        draws = _random(self.seed, epoch, rows + per_class + self.classes * self._batches + 1)
        by_row, by_class, by_group, offset = np.split(
            draws, np.cumsum([rows, per_class, len(draws) - 1 - rows - per_class])
        )
        # Rows class by class, shuffled within the class.
        shuffled = np.lexsort((by_row, self._position))
        # Systematic sampling: q_c is rounded up or down at random, and the sum stays exactly P L.
        order = by_class.argsort(kind="stable")
        edges = np.floor(self._quota[order].cumsum() + offset)
        edges[-1] = self.classes * self._batches  # the sum, free of rounding errors
        groups = np.empty(per_class, dtype=np.int64)
        groups[order] = np.diff(edges, prepend=0.0).astype(np.int64)
        tokens = np.repeat(np.arange(per_class), groups)[by_group.argsort(kind="stable")]
        plan = np.array(_deal(tokens.tolist(), groups.tolist(), self._batches, self.classes, neighbours))
        # The j-th group of a class takes its rows j K … j K + K - 1, counted round and round.
        flat = plan.reshape(-1)
        nth = occurrence(flat)
        within = nth[:, None] * self.images_per_class + np.arange(self.images_per_class)
        taken = shuffled[self._starts[flat][:, None] + within % self._counts[flat][:, None]]
        batches: list[list[int]] = taken.reshape(self._batches, self.batch_size).tolist()
        return batches


class HardClassSampler:
    """Batches of a class and those nearest to it, K images of each: pairs of random classes soon teach nothing more.

    Each batch is begun by a class at random and filled with the nearest of its neighbours that are not used up in this
    epoch, and, where its list is at an end, with other classes at random. Everything else is as in `PKSampler`: how
    often a class comes up in an epoch does not depend on its neighbours, so no class is forgotten because it is no
    other's, and none takes over because it is everyone's. Towards the end of an epoch, batches are less hard.

    Args:
        labels: "N", the class of each row.
        neighbours: "C M", for each class in ascending order of labels its M nearest classes, nearest first, as places
            in that order. `evaluation.metrics.class_neighbours` makes it. M of a few times P is best; M may be less.
        classes: P, different classes a batch.
        images_per_class: K.
        seed: of the draws.

    Attributes:
        repeated: as in `PKSampler`.
        singles: as in `PKSampler`.

    Raises:
        InputError: there are fewer than P classes, or `neighbours` is not of these classes.

    >>> labels = np.array([0, 0, 1, 1, 2, 2, 3, 3])    # 0 and 2 are alike, and 1 and 3
    >>> nearest = np.array([[2], [3], [0], [1]])
    >>> sampler = HardClassSampler(labels, nearest, classes=2, images_per_class=2, seed=0)
    >>> sorted(sorted(batch) for batch in sampler.epoch(0))
    [[0, 1, 4, 5], [2, 3, 6, 7]]
    """

    def __init__(
        self,
        labels: Int[Tensor, "N"] | Int[np.ndarray, "N"],
        neighbours: Int[Tensor, "C M"] | Int[np.ndarray, "C M"],
        *,
        classes: int,
        images_per_class: int,
        seed: int,
    ) -> None:
        self._neighbours = np.asarray(neighbours)
        found, known = len(np.unique(np.asarray(labels))), len(self._neighbours)
        if found < classes:
            raise InputError(
                f"sampler.hard_class.classes={classes}, but there are only {found} classes to train on; "
                f"set sampler.hard_class.classes={found} or less"
            )
        self._pk = PKSampler(labels, classes=classes, images_per_class=images_per_class, seed=seed)
        if known != found:
            raise InputError(
                f"there are neighbours of {known} classes, but {found} classes to train on: make them anew"
            )
        if self._neighbours.size and not 0 <= self._neighbours.min() <= self._neighbours.max() < found:
            raise InputError(f"neighbours must be places among the {found} classes, from 0 to {found - 1}")
        self.seed = seed
        self.classes = classes
        self.images_per_class = images_per_class
        self.repeated = self._pk.repeated
        self.singles = self._pk.singles

    @property
    def batch_size(self) -> int:
        """P K."""
        return self._pk.batch_size

    def __len__(self) -> int:
        return len(self._pk)

    def epoch(self, epoch: int) -> list[list[int]]:
        """The rows of every batch: P runs of K rows of one class."""
        return self._pk._epoch(epoch, self._neighbours)


class NoDuplicateSampler:
    """Batches without two rows that are alike: of one product, one caption, one label.

    Contrastive losses take the other items of a batch as negatives, and two photos of one product, or two products of
    one caption, would be wrong ones. Rows are alike if they share any of their keys. Every row comes once an epoch, as
    far as that can be: a key that stands in more rows than there are batches keeps some of them out, others each epoch,
    and rows that do not fill a batch stay out as in `ShuffleSampler`.

    Rows of one key are spread evenly over the epoch, and a key with as many rows left as there are batches left has to
    be served now. The number of batches L is the largest for which sum_k min(n_k, L) >= B L, n_k being the rows whose
    most frequent key is k. Where rows have several keys each, that may be one too many for a given order: the last
    batches are then filled with rows that came before in the epoch. So all batches are of one size, and none has two
    alike.

    Args:
        keys: of each of N rows; for instance ("product 7", "red shoe"). Rows without any are like no other.
        batch_size: B.
        seed: of the order.

    Attributes:
        alike: how many rows share a key with another.
        left_out: how many rows an epoch leaves out, in epoch 0.
        repeated: how many places an epoch fills with rows that came before, in epoch 0.

    Raises:
        InputError: there are fewer rows than a batch takes, or fewer that are not alike.

    >>> sampler = NoDuplicateSampler([["shoe"], ["shoe"], ["hat"], ["coat"]], batch_size=2, seed=0)
    >>> sorted(sorted(batch) for batch in sampler.epoch(0)) in ([[0, 2], [1, 3]], [[0, 3], [1, 2]])
    True
    """

    def __init__(self, keys: Sequence[Sequence[Hashable]], *, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size} must be at least 1")
        if len(keys) < batch_size:
            raise InputError(
                f"sampler.no_duplicate.batch_size={batch_size}, but there are only {len(keys)} items to train on; set "
                f"sampler.no_duplicate.batch_size={max(len(keys), 1)} or less"
            )
        self.batch_size = batch_size
        self.seed = seed
        counts = Counter(key for own in keys for key in set(own))
        number = {key: i for i, (key, count) in enumerate(counts.items()) if count > 1}
        # Only what several rows share can collide; the most frequent first.
        self._keys = [
            tuple(
                number[key] for key in sorted({k for k in own if counts[k] > 1}, key=lambda k: (-counts[k], number[k]))
            )
            for own in keys
        ]
        self._members: dict[int, list[int]] = {}
        for row, own in enumerate(self._keys):
            for key in own:
                self._members.setdefault(key, []).append(row)
        self.alike = sum(1 for own in self._keys if own)
        # Rows of rare keys first: as many as can stand together, or nearly.
        order = sorted(range(len(keys)), key=lambda row: sum(len(self._members[key]) for key in self._keys[row]))
        self._together = _Batch(self._keys, batch_size)
        self._together.fill(order)
        if len(self._together.rows) < batch_size:
            most = len(self._together.rows)
            raise InputError(
                f"sampler.no_duplicate.batch_size={batch_size}, but only {most} of the {len(keys)} items can stand "
                f"together without two of one caption, label or group; set sampler.no_duplicate.batch_size={most} or "
                "less, or name fewer columns in sampler.no_duplicate.by"
            )
        self._batches = self._count()
        first = self.epoch(0)
        seen = {row for batch in first for row in batch}
        self.left_out = len(keys) - len(seen)
        self.repeated = len(first) * batch_size - len(seen)

    def __len__(self) -> int:
        return self._batches

    def epoch(self, epoch: int) -> list[list[int]]:
        """The rows of every batch."""
        places = self._spread(epoch)
        order = places.argsort(kind="stable").tolist()
        members = {key: deque(sorted(rows, key=places.__getitem__)) for key, rows in self._members.items()}
        left = {key: len(rows) for key, rows in members.items()}  # rows of the key that are still to come
        # The batch from which on a key must be in all: a heap, corrected when entries come due.
        due = [(self._batches - count, key) for key, count in left.items()]
        heapq.heapify(due)
        forced: set[int] = set()
        waiting: dict[int, deque[int]] = {}  # rows whose turn came beside an equal key, by that key
        fresh = set(order)
        queue = iter(order)
        plan = []
        for number in range(self._batches):
            while due and due[0][0] <= number:
                _, key = heapq.heappop(due)
                if left[key] >= self._batches - number:
                    forced.add(key)
                elif left[key]:
                    heapq.heappush(due, (self._batches - left[key], key))
            batch = _Batch(self._keys, self.batch_size)
            for key in sorted(forced, key=lambda key: -left[key]):
                batch.serve(key, (row for row in members[key] if row in fresh))
            for key in sorted(waiting, key=lambda key: -len(waiting[key])):
                batch.serve(key, (row for row in waiting[key] if row in fresh))
            while len(batch.rows) < self.batch_size and (row := next(queue, None)) is not None:
                if row in fresh and (met := batch.add(row)) is not None:
                    waiting.setdefault(met, deque()).append(row)
            batch.fill(order)  # the last of an epoch: with those that came before
            if len(batch.rows) < self.batch_size:
                batch = self._together
            served = {key for row in batch.rows if row in fresh for key in self._keys[row]}
            fresh.difference_update(batch.rows)
            for key in served:
                for rows in (members[key], waiting.get(key, deque())):
                    while rows and rows[0] not in fresh:
                        rows.popleft()
                left[key] -= 1
                if not members[key]:
                    forced.discard(key)
                if not waiting.get(key, True):
                    del waiting[key]
            plan.append(list(batch.rows))
        return plan

    def _count(self) -> int:
        """L, at least 1: concave in L, sum_k min(n_k, L) - B L is at least 0 from 0 up to it."""
        sizes = np.array(list(Counter(own[0] if own else -1 - row for row, own in enumerate(self._keys)).values()))
        low, high = 1, len(self._keys) // self.batch_size
        while low < high:
            middle = (low + high + 1) // 2
            if np.minimum(sizes, middle).sum() >= self.batch_size * middle:
                low = middle
            else:
                high = middle - 1
        return low

    def _spread(self, epoch: int) -> Float[np.ndarray, "N"]:
        """A place in [0, 1) for each row: at random, but the j-th of n rows of one key within [j/n, (j + 1)/n)."""
        draws = _random(self.seed, epoch, 2 * len(self._keys))
        places, by_row = draws[: len(self._keys)].copy(), draws[len(self._keys) :]
        first = np.array([own[0] if own else -1 for own in self._keys])
        shared = np.flatnonzero(first >= 0)
        shared = shared[np.lexsort((by_row[shared], first[shared]))]
        sizes = np.bincount(first[shared]) if len(shared) else np.zeros(0, dtype=np.int64)
        places[shared] = (occurrence(first[shared]) + places[shared]) / sizes[first[shared]]
        return places


class _Batch:
    """Rows of which no two share a key, up to a size."""

    def __init__(self, keys: Sequence[tuple[int, ...]], size: int) -> None:
        self.keys = keys
        self.size = size
        self.rows: dict[int, None] = {}
        self.used: set[int] = set()

    def add(self, row: int) -> int | None:
        """Take the row, unless one of its keys is in use: then that key."""
        for key in self.keys[row]:
            if key in self.used:
                return key
        self.rows[row] = None
        self.used.update(self.keys[row])
        return None

    def serve(self, key: int, rows: Iterable[int]) -> None:
        """Take the first of `rows`, all of this key, that fits."""
        for row in rows:
            if len(self.rows) == self.size or key in self.used:
                return
            self.add(row)

    def fill(self, rows: Iterable[int]) -> None:
        """Take those of `rows` that fit, until the batch is full."""
        for row in rows:
            if len(self.rows) == self.size:
                return
            if row not in self.rows:
                self.add(row)


def _random(seed: int, epoch: int, count: int) -> Float[np.ndarray, "count"]:
    """Numbers in [0, 1), a function of seed and epoch (hashed together, so that (1, 2) and (2, 1) differ)."""
    draws: np.ndarray = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, epoch)))).random(count)
    return draws


def _fill(natural: Float[np.ndarray, "C"], *, limit: int, total: int) -> Float[np.ndarray, "C"]:
    """min(limit, s natural), with s such that the sum is `total` (which C limits suffice for)."""
    descending = np.sort(natural)[::-1]
    rest = descending[::-1].cumsum()[::-1]  # the sum from the k-th on
    # With the k largest at the limit, s = (total - k limit) / rest_k; the right k is the first whose next fits.
    for k in range(len(natural)):
        scale = (total - k * limit) / rest[k]
        if scale * descending[k] <= limit:
            filled: np.ndarray = np.minimum(limit, scale * natural)
            return filled
    return np.full_like(natural, float(limit))


def _deal(
    tokens: list[int],
    remaining: list[int],
    batches: int,
    classes: int,
    neighbours: Int[np.ndarray, "C M"] | None = None,
) -> list[list[int]]:
    """Lay groups (named by their class) into batches of `classes` different ones, in the order given where it can be.

    A class with as many groups left as there are batches left has to be taken now. That is enough to never get stuck:
    groups left = classes x batches left, and no class has more than batches left, hold before and after every batch.

    Args:
        tokens: one class for each group, shuffled.
        remaining: groups of each class; none above `batches`, their sum `classes` x `batches`. Counted down here.
        batches: L.
        classes: P.
        neighbours: of each class; a batch is then filled with those of its first class while they have groups left.
    """
    queue = deque(tokens)
    # The batch from which on a class must be in all, if it is in none before: a heap, corrected when entries come due.
    due = [(batches - count, c) for c, count in enumerate(remaining) if count]
    heapq.heapify(due)
    forced: set[int] = set()
    ahead = [0] * len(remaining)  # groups taken as someone's neighbour, whose turns in the queue are still to come
    plan = []
    for batch in range(batches):
        while due and due[0][0] <= batch:
            _, c = heapq.heappop(due)
            if remaining[c] == batches - batch:
                forced.add(c)
            else:
                heapq.heappush(due, (batches - remaining[c], c))
        chosen = dict.fromkeys(forced)
        deferred = []
        begun = neighbours is None
        while len(chosen) < classes:
            c = queue.popleft()
            if ahead[c]:
                ahead[c] -= 1
            elif c in chosen:
                if c not in forced:  # which need no turn in the queue any more
                    deferred.append(c)
            else:
                chosen[c] = None
                for near in () if begun or neighbours is None else neighbours[c].tolist():
                    if len(chosen) < classes and near not in chosen and remaining[near]:
                        chosen[near] = None
                        ahead[near] += 1
                begun = True
        queue.extendleft(reversed(deferred))
        for c in chosen:
            remaining[c] -= 1
        plan.append(list(chosen))
    return plan


def occurrence(values: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """How many equal values stand before each one.

    >>> occurrence(np.array([7, 3, 7, 7, 3])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = values.argsort(kind="stable")
    ordered = values[order]
    first = np.r_[True, ordered[1:] != ordered[:-1]]
    run_start = np.maximum.accumulate(np.where(first, np.arange(len(values)), 0))
    result: np.ndarray = np.empty(len(values), dtype=np.int64)
    result[order] = np.arange(len(values)) - run_start
    return result
