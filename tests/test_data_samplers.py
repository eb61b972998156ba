"""Batches keep what their docstrings promise, for any sizes of classes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vicinal.data.samplers import PKSampler, Sampler, ShuffleSampler, occurrence
from vicinal.types import InputError


def labels_of(sizes: list[int], seed: int = 0) -> torch.Tensor:
    """Labels with these class sizes, shuffled, with gaps in the numbering (as after a split)."""
    labels = np.repeat(np.arange(len(sizes)) * 3 + 1, sizes)
    return torch.from_numpy(np.random.default_rng(seed).permutation(labels))


# --- both -----------------------------------------------------------------------------------------------------------

SAMPLERS = {
    "shuffle": lambda seed: ShuffleSampler(103, 10, seed=seed),
    "shuffle to the last": lambda seed: ShuffleSampler(103, 10, seed=seed, drop_last=False),
    "pk": lambda seed: PKSampler(labels_of([3, 4, 5, 30, 1, 9, 12, 40]), classes=4, images_per_class=3, seed=seed),
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


def test_occurrence_counts_what_stood_before() -> None:
    values = np.random.default_rng(0).integers(0, 9, 200)
    expected = [int((values[:i] == value).sum()) for i, value in enumerate(values)]
    assert occurrence(values).tolist() == expected
