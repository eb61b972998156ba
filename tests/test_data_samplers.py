"""Batches keep what their docstrings promise, for any sizes of classes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vicinal.data.samplers import HardClassSampler, NoDuplicateSampler, PKSampler, Sampler, ShuffleSampler, occurrence
from vicinal.types import InputError


def labels_of(sizes: list[int], seed: int = 0) -> torch.Tensor:
    """Labels with these class sizes, shuffled, with gaps in the numbering (as after a split)."""
    labels = np.repeat(np.arange(len(sizes)) * 3 + 1, sizes)
    return torch.from_numpy(np.random.default_rng(seed).permutation(labels))


def ring(classes: int, neighbours: int) -> np.ndarray:
    """Classes in a ring: the nearest are the next, then the one before, then the one after the next."""
    steps = np.array([(i // 2 + 1) * (-1) ** i for i in range(neighbours)])
    return (np.arange(classes)[:, None] + steps) % classes


# --- all ------------------------------------------------------------------------------------------------------------

SAMPLERS = {
    "shuffle": lambda seed: ShuffleSampler(103, 10, seed=seed),
    "shuffle to the last": lambda seed: ShuffleSampler(103, 10, seed=seed, drop_last=False),
    "pk": lambda seed: PKSampler(labels_of([3, 4, 5, 30, 1, 9, 12, 40]), classes=4, images_per_class=3, seed=seed),
    "hard": lambda seed: HardClassSampler(
        labels_of([3, 4, 5, 30, 1, 9, 12, 40]), ring(8, 5), classes=4, images_per_class=3, seed=seed
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_epoch_is_a_function_of_seed_and_epoch(name: str) -> None:
    sampler: Sampler = SAMPLERS[name](7)
    later = sampler.epoch(5)
    sampler.epoch(0)
    assert sampler.epoch(5) == later == SAMPLERS[name](7).epoch(5)
    # Hashed, not added: epoch 5 of seed 7 is not epoch 7 of seed 5, nor epoch 6 of seed 6.
    others = [SAMPLERS[name](seed).epoch(epoch) for seed, epoch in ((7, 6), (5, 7), (6, 6), (8, 5))]
    assert later not in others
    assert all(len(epoch) == len(sampler) for epoch in (later, *others))


@pytest.mark.parametrize("name", SAMPLERS)
def test_epochs_do_not_touch_the_global_generators(name: str) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002  (it is this state that must stay)
    SAMPLERS[name](0).epoch(1)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == np.random.get_state()[1].tolist()  # noqa: NPY002


# --- ShuffleSampler -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 60), batch_size=st.integers(1, 70), drop_last=st.booleans(), epoch=st.integers(0, 5))
def test_shuffle_shows_every_row_once(size: int, batch_size: int, drop_last: bool, epoch: int) -> None:
    sampler = ShuffleSampler(size, batch_size, seed=3, drop_last=drop_last)
    batches = sampler.epoch(epoch)
    assert len(batches) == len(sampler) >= 1
    rows = [row for batch in batches for row in batch]
    assert len(set(rows)) == len(rows)
    if drop_last:
        assert {len(batch) for batch in batches} == {min(batch_size, size)}
        assert size - len(rows) < min(batch_size, size)
    else:
        assert sorted(rows) == list(range(size))


def test_shuffle_drops_others_each_epoch() -> None:
    sampler = ShuffleSampler(11, 10, seed=0)
    dropped = {frozenset(range(11)) - frozenset(sampler.epoch(epoch)[0]) for epoch in range(20)}
    assert len(dropped) > 4


def test_every_place_gets_every_row_alike() -> None:
    first = Counter(ShuffleSampler(5, 5, seed=0).epoch(epoch)[0][0] for epoch in range(1000))
    assert max(first.values()) < 260
    assert min(first.values()) > 140


@pytest.mark.parametrize(("size", "batch_size"), [(0, 4), (4, 0)])
def test_shuffle_refuses_nothing(size: int, batch_size: int) -> None:
    with pytest.raises(InputError):
        ShuffleSampler(size, batch_size, seed=0)


# --- PKSampler ------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=25),
    p=st.integers(1, 8),
    k=st.integers(1, 6),
    seed=st.integers(0, 3),
)
def test_pk_batches(sizes: list[int], p: int, k: int, seed: int) -> None:
    labels = labels_of(sizes)
    p = min(p, len(sizes))
    sampler = PKSampler(labels, classes=p, images_per_class=k, seed=seed)
    assert sampler.batch_size == p * k
    assert sampler.repeated == sum(size < k for size in sizes)
    assert sampler.singles == sizes.count(1)
    of_class = {int(label): (labels == label).nonzero().flatten().tolist() for label in labels.unique()}
    for epoch in range(2):
        batches = sampler.epoch(epoch)
        assert len(batches) == len(sampler) >= 1
        for batch in batches:
            groups = [batch[at : at + k] for at in range(0, p * k, k)]
            assert len(batch) == p * k
            classes = [set(labels[group].tolist()) for group in groups]
            assert all(len(found) == 1 for found in classes)
            assert len(set.union(*classes)) == p  # no class twice
            for group, found in zip(groups, classes, strict=True):
                size = len(of_class[found.pop()])
                assert len(set(group)) == min(k, size)
        times = Counter(row for batch in batches for row in batch)
        for rows in of_class.values():  # no image a second time before all of its class have come once
            seen = [times[row] for row in rows]
            assert max(seen) - min(seen) <= 1


@pytest.mark.parametrize(("sizes", "p", "k"), [([8] * 12, 4, 4), ([4, 8, 12, 16, 4, 4], 3, 4), ([6, 6, 6], 3, 2)])
def test_pk_shows_every_image_exactly_once_where_sizes_allow(sizes: list[int], p: int, k: int) -> None:
    sampler = PKSampler(labels_of(sizes), classes=p, images_per_class=k, seed=1)
    assert len(sampler) == sum(sizes) // (p * k)
    for epoch in range(4):
        assert sorted(row for batch in sampler.epoch(epoch) for row in batch) == list(range(sum(sizes)))


def test_pk_shows_every_image_about_once() -> None:
    sizes = np.random.default_rng(0).integers(2, 60, 81).tolist()
    sampler = PKSampler(labels_of(sizes), classes=16, images_per_class=4, seed=0)
    assert abs(len(sampler) - sum(sizes) / 64) <= 2
    epochs = 60
    times = Counter(row for epoch in range(epochs) for batch in sampler.epoch(epoch) for row in batch)
    labels = labels_of(sizes).numpy()
    size_of_row = np.bincount(labels)[labels]
    mean = np.array([times[row] for row in range(len(labels))]) / epochs
    large = size_of_row >= 4
    assert (np.abs(mean[large] - 1) < 0.25).all()  # the share of an image is a mean of 60 draws of about 0 or 1
    assert abs(mean[large].mean() - 1) < 0.03
    small = size_of_row < 4  # one group an epoch: 4 / 2 or 4 / 3 times
    assert small.any()
    assert (np.abs(mean[small] - 4 / size_of_row[small]) < 0.25).all()


def test_pk_one_large_class_stands_in_every_batch_at_most_once() -> None:
    sampler = PKSampler(labels_of([1000, 6, 6, 6]), classes=3, images_per_class=2, seed=0)
    labels = labels_of([1000, 6, 6, 6])
    large = [int((labels[batch] == 1).sum()) for batch in sampler.epoch(0)]
    assert set(large) == {2}  # more would not fit, less would waste it
    rest = Counter(int(labels[row]) for batch in sampler.epoch(0) for row in batch)
    assert max(rest[c] for c in (4, 7, 10)) - min(rest[c] for c in (4, 7, 10)) <= 2


def test_pk_mixes_companions() -> None:
    """Which classes meet in a batch is drawn anew: over epochs, every pair meets."""
    sampler = PKSampler(labels_of([8] * 10), classes=3, images_per_class=4, seed=0)
    labels = labels_of([8] * 10)
    met = {frozenset(pair) for epoch in range(40) for batch in sampler.epoch(epoch) for pair in _pairs(labels[batch])}
    assert len(met) == 45


def _pairs(labels: torch.Tensor) -> list[tuple[int, int]]:
    classes = sorted(set(labels.tolist()))
    return [(a, b) for a in classes for b in classes if a < b]


@pytest.mark.parametrize(("p", "k"), [(4, 2), (0, 2), (2, 0)])
def test_pk_refuses_what_cannot_be(p: int, k: int) -> None:
    with pytest.raises(InputError):
        PKSampler(labels_of([5, 5, 5]), classes=p, images_per_class=k, seed=0)


def test_pk_names_the_key_to_mend() -> None:
    with pytest.raises(InputError, match=r"sampler\.pk\.classes=3"):
        PKSampler(labels_of([5, 5, 5]), classes=16, images_per_class=2, seed=0)


# --- HardClassSampler -----------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=25),
    p=st.integers(1, 8),
    k=st.integers(1, 6),
    m=st.integers(0, 12),
    seed=st.integers(0, 3),
)
def test_hard_batches_keep_what_pk_promises(sizes: list[int], p: int, k: int, m: int, seed: int) -> None:
    """Any sizes and any lists, also of hubs, too short or empty."""
    labels = labels_of(sizes)
    p = min(p, len(sizes))
    lists = np.random.default_rng(seed).integers(0, 1 + len(sizes) // 2, (len(sizes), m)) % len(sizes)
    sampler = HardClassSampler(labels, lists, classes=p, images_per_class=k, seed=seed)
    plain = PKSampler(labels, classes=p, images_per_class=k, seed=seed)
    assert (len(sampler), sampler.batch_size) == (len(plain), plain.batch_size)
    assert (sampler.repeated, sampler.singles) == (plain.repeated, plain.singles)
    for epoch in range(2):
        batches = sampler.epoch(epoch)
        assert len(batches) == len(sampler)
        for batch in batches:
            groups = [batch[at : at + k] for at in range(0, p * k, k)]
            classes = [set(labels[group].tolist()) for group in groups]
            assert len(batch) == p * k
            assert all(len(found) == 1 for found in classes)
            assert len(set.union(*classes)) == p
        # Every class comes as often as without neighbours, and so does every image.
        assert class_counts(labels, batches) == class_counts(labels, plain.epoch(epoch))
        times = Counter(row for batch in batches for row in batch)
        for label in labels.unique():
            seen = [times[row] for row in (labels == label).nonzero().flatten().tolist()]
            assert max(seen) - min(seen) <= 1
    if m == 0:
        assert sampler.epoch(3) == plain.epoch(3)


def class_counts(labels: torch.Tensor, batches: list[list[int]]) -> Counter[int]:
    return Counter(labels[[row for batch in batches for row in batch]].tolist())


def test_each_batch_is_a_class_and_its_nearest() -> None:
    """Lists against a nested loop: whoever begins, the rest are the nearest that have something left, then any."""
    labels, lists = labels_of([8] * 30), ring(30, 6)
    sampler = HardClassSampler(labels, lists, classes=4, images_per_class=4, seed=2)
    left = Counter(dict.fromkeys(range(30), 2))
    whole = 0
    for batch in sampler.epoch(0):
        classes = list(dict.fromkeys(((labels[batch] - 1) // 3).tolist()))

        def follows(c: int, batch_of: list[int] = classes) -> bool:
            nearest = [n for n in lists[c].tolist() if left[n]][:3]
            return set(nearest) <= set(batch_of) and (len(nearest) < 3 or {c, *nearest} == set(batch_of))

        assert any(follows(c) for c in classes)
        whole += any(len([n for n in lists[c] if left[n]]) >= 3 and follows(c) for c in classes)
        left.subtract(classes)
    assert whole >= len(sampler) / 2
    assert set(left.values()) == {0}


def test_neighbours_meet_far_more_often_than_strangers() -> None:
    classes = 200
    labels, lists = labels_of([12] * classes), ring(classes, 24)
    near = {(c, int(n)) for c in range(classes) for n in lists[c, :8]}

    def share(sampler: Sampler) -> float:
        met = [pair for batch in sampler.epoch(0) for pair in _pairs((labels[batch] - 1) // 3)]
        return sum(pair in near for pair in met) / len(met)

    hard = share(HardClassSampler(labels, lists, classes=8, images_per_class=4, seed=0))
    assert hard > 0.5
    assert share(PKSampler(labels, classes=8, images_per_class=4, seed=0)) < 0.06


def test_companions_change_from_epoch_to_epoch() -> None:
    labels = labels_of([4] * 24)
    sampler = HardClassSampler(labels, ring(24, 6), classes=4, images_per_class=4, seed=0)
    met = {frozenset(labels[batch].tolist()) for epoch in range(10) for batch in sampler.epoch(epoch)}
    assert len(met) > 12


def test_hard_takes_tensors_and_many_classes() -> None:
    classes = 20_000
    labels = torch.arange(classes).repeat(4)
    lists = torch.from_numpy(ring(classes, 16))
    sampler = HardClassSampler(labels, lists, classes=16, images_per_class=4, seed=0)
    rows = [row for batch in sampler.epoch(0) for row in batch]
    assert sorted(rows) == list(range(4 * classes))


def test_hard_refuses_lists_of_other_classes() -> None:
    labels = labels_of([5, 5, 5])
    with pytest.raises(InputError, match="4 classes, but 3"):
        HardClassSampler(labels, ring(4, 2), classes=2, images_per_class=2, seed=0)
    with pytest.raises(InputError, match="from 0 to 2"):
        HardClassSampler(labels, np.array([[1], [3], [0]]), classes=2, images_per_class=2, seed=0)
    with pytest.raises(InputError, match="from 0 to 2"):
        HardClassSampler(labels, np.array([[1], [-1], [0]]), classes=2, images_per_class=2, seed=0)
    with pytest.raises(InputError, match=r"sampler\.hard_class\.classes=3"):
        HardClassSampler(labels, ring(3, 2), classes=4, images_per_class=2, seed=0)


def test_occurrence_counts_what_stood_before() -> None:
    values = np.random.default_rng(0).integers(0, 9, 200)
    expected = [int((values[:i] == value).sum()) for i, value in enumerate(values)]
    assert occurrence(values).tolist() == expected


# ------------------------------------------------------------------------------------------------ no two that are alike


def alike(keys: list[list[str]], batch: list[int]) -> int:
    """How many keys stand in a batch more than once."""
    return sum(count - 1 for count in Counter(key for row in batch for key in set(keys[row])).values())


def products(n: int, most: int, seed: int = 0) -> list[list[str]]:
    """Rows of products of one to `most` photos, with captions of which some are shared among products."""
    g = np.random.default_rng(seed)
    sizes = g.integers(1, most + 1, n)
    return [
        [f"product {i}", f"caption {g.integers(3 * n) if g.random() < 0.9 else 'shoe'}"]
        for i, size in enumerate(sizes)
        for _ in range(size)
    ]


@pytest.mark.parametrize("batch_size", [2, 7, 16, 40])
@pytest.mark.parametrize("keys", [products(200, 4), products(90, 12), [[]] * 333], ids=["few", "many", "none alike"])
def test_no_two_of_a_batch_are_alike_and_every_row_comes_once(keys: list[list[str]], batch_size: int):
    sampler = NoDuplicateSampler(keys, batch_size=batch_size, seed=3)
    shoes = sum("caption shoe" in own for own in keys)
    for epoch in range(3):
        batches = sampler.epoch(epoch)
        assert len(batches) == len(sampler)
        assert all(len(batch) == batch_size and not alike(keys, batch) for batch in batches)
        times = Counter(row for batch in batches for row in batch)
        rest = len(keys) - len(batches) * batch_size
        never = len(keys) - len(times)
        over = max(0, shoes - len(batches))  # a caption of more rows than batches cannot come more often
        assert never <= max(rest, over) + 2
        if epoch == 0:
            assert sampler.left_out == never
            assert sampler.repeated == sum(times.values()) - len(times)
    assert sampler.alike == sum(any(sum(key in other for other in keys) > 1 for key in own) for own in keys)


@pytest.mark.parametrize(
    ("sizes", "batch_size", "batches"),
    [
        ([5] * 8, 8, 5),  # each batch must hold every key
        ([10, 10, 5, 5, 5, 5], 4, 10),  # two keys in each batch
        ([10] + [1] * 30, 4, 10),  # one key in each
        ([30, 1, 1, 1, 1], 2, 4),  # more rows than there can be batches
        ([7, 7, 1], 3, 1),
    ],
    ids=str,
)
def test_as_many_batches_as_there_can_be(sizes: list[int], batch_size: int, batches: int):
    keys = [[f"{key}"] for key, size in enumerate(sizes) for _ in range(size)]
    for seed in range(20):
        sampler = NoDuplicateSampler(keys, batch_size=batch_size, seed=seed)
        assert len(sampler) == batches
        rows = [row for batch in sampler.epoch(seed) for row in batch]
        assert len(set(rows)) == len(rows) == batches * batch_size
        assert sampler.left_out == len(keys) - len(rows)
        assert sampler.repeated == 0


def test_what_is_left_out_is_others_each_epoch():
    keys = [["shoe"]] * 30 + [[f"{i}"] for i in range(10)]
    sampler = NoDuplicateSampler(keys, batch_size=2, seed=1)
    assert (len(sampler), sampler.left_out) == (10, 20)
    shoes = [{row for batch in sampler.epoch(epoch) for row in batch if row < 30} for epoch in range(12)]
    assert all(len(some) == 10 for some in shoes)
    assert set().union(*shoes) == set(range(30))


def test_no_duplicates_is_a_function_of_seed_and_epoch():
    keys = products(60, 3)
    one, again = (NoDuplicateSampler(keys, batch_size=8, seed=5) for _ in range(2))
    assert one.epoch(4) == again.epoch(4)
    assert one.epoch(4) == one.epoch(4)
    assert one.epoch(4) != one.epoch(5)
    assert one.epoch(4) != NoDuplicateSampler(keys, batch_size=8, seed=6).epoch(4)
    assert isinstance(one, Sampler)
    firsts = {one.epoch(epoch)[0][0] for epoch in range(20)}
    assert len(firsts) > 10


def test_rows_of_several_keys_that_do_not_come_out_even():
    """Each row is alike to two others in a ring of three: the last batch is filled with what came before."""
    keys = [[f"{i // 3}", f"{i % 3} {i // 9}"] for i in range(27)]
    for seed in range(10):
        sampler = NoDuplicateSampler(keys, batch_size=5, seed=seed)
        for batch in sampler.epoch(seed):
            assert len(set(batch)) == 5
            assert not alike(keys, batch)
        assert sampler.left_out + 5 * len(sampler) - sampler.repeated == 27


@pytest.mark.parametrize(
    ("keys", "batch_size", "message"),
    [
        ([["a"], ["b"]], 3, "there are only 2 items.*no_duplicate.batch_size=2 or less"),
        ([["a"]] * 9, 2, "only 1 of the 9 items can stand together.*batch_size=1 or less"),
        ([["a"], ["a", "b"], ["b"], ["b"]], 3, "only 2 of the 4 items"),
        ([], 1, "only 0 items"),
        ([["a"]], 0, "at least 1"),
    ],
)
def test_batches_that_cannot_be_are_refused(keys: list[list[str]], batch_size: int, message: str):
    with pytest.raises(InputError, match=message):
        NoDuplicateSampler(keys, batch_size=batch_size, seed=0)


def test_a_large_epoch_is_dealt_whole():
    g = np.random.default_rng(0)
    keys = [
        [f"product {p}", f"caption {c}"]
        for p, c in zip(g.integers(20_000, size=50_000), g.zipf(1.5, 50_000), strict=True)
    ]
    sampler = NoDuplicateSampler(keys, batch_size=512, seed=0)
    batches = sampler.epoch(1)
    assert not any(alike(keys, batch) for batch in batches)
