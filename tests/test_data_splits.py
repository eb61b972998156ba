"""Splits: the published ones to the letter; disjoint; and (but for CoOp's) blind to the order of the rows."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vicinal.data.splits import class_disjoint, grouped, holdout_images, kshot, official, split_word, straddling
from vicinal.types import InputError

anytime = settings(deadline=None, max_examples=60)  # nothing is timed here
FLOWERS_UNSEEN = {1, 9, 10, 15, 32, 33, 37, 41, 44, 45, 47, 50, 56, 58, 66, 67, 72, 78, 80, 82}


# ------------------------------------------------------------------------------------------------- class_disjoint


def test_the_flowers_split_of_seed_42_is_reproduced():
    names = [f"flower {i}" for i in range(102)]  # in label order, which is not the sorted one
    seen, unseen = class_disjoint(names, holdout=0.2, seed=42)
    assert {names.index(c) for c in unseen} == FLOWERS_UNSEEN
    assert len(seen) == 82
    assert list(unseen) == [names[i] for i in sorted(FLOWERS_UNSEEN)], "each side is in the order of the classes"


@anytime
@given(st.integers(2, 300), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_seen_and_unseen_are_disjoint_and_whole(count: int, holdout: float, seed: int):
    classes = [str(i) for i in range(count)]
    if int(count * holdout) == 0:
        with pytest.raises(InputError, match="both sides need at least one"):
            class_disjoint(classes, holdout=holdout, seed=seed)
        return
    seen, unseen = class_disjoint(classes, holdout=holdout, seed=seed)
    assert not set(seen) & set(unseen)
    assert set(seen) | set(unseen) == set(classes)
    assert len(unseen) == int(count * holdout)


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(holdout: float):
    with pytest.raises(InputError, match="holdout"):
        class_disjoint(["a", "b", "c"], holdout=holdout, seed=0)


def test_a_class_named_twice_is_refused():
    with pytest.raises(ValueError, match="each class once"):
        class_disjoint(["a", "b", "a"], holdout=0.5, seed=0)


# -------------------------------------------------------------------------------------------------------- grouped


@anytime
@given(st.lists(st.sampled_from("abcdefg"), min_size=8, max_size=60), st.integers(0, 1000), st.randoms())
def test_a_group_never_straddles_whatever_the_order(groups: list[str], seed: int, shuffler: random.Random):
    if int(len(set(groups)) * 0.4) == 0:
        return
    mask = grouped(groups, holdout=0.4, seed=seed)
    held = {g for g, m in zip(groups, mask.tolist(), strict=True) if m}
    kept = {g for g, m in zip(groups, mask.tolist(), strict=True) if not m}
    assert held
    assert kept
    assert not held & kept
    assert len(held) == int(len(set(groups)) * 0.4)
    order = list(range(len(groups)))
    shuffler.shuffle(order)
    assert grouped([groups[i] for i in order], holdout=0.4, seed=seed).tolist() == mask[order].tolist()


def test_a_row_without_a_group_is_named():
    with pytest.raises(InputError, match="no group in row 2"):
        grouped(["a", None, "b"], holdout=0.5, seed=0)


# ---------------------------------------------------------------------------------------------------------- kshot


def coop(labels: list[int], k: int, stream: random.Random) -> set[int]:
    """CoOp's procedure, written down again: group by label as it first appears, then sample items."""
    items = defaultdict(list)
    for row, label in enumerate(labels):
        items[label].append((f"picture {row}", row))
    chosen = set()
    for have in items.values():
        chosen |= {row for _, row in (stream.sample(have, k) if len(have) >= k else have)}
    return chosen


@anytime
@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.integers(1, 16), st.integers(1, 3))
def test_kshot_is_coops(labels: list[int], k: int, seed: int):
    ours, theirs = random.Random(seed), random.Random(seed)
    for _ in range(2):  # train, then val in the same stream
        mask = kshot(torch.tensor(labels), k, seed=ours)
        assert set(mask.nonzero().flatten().tolist()) == coop(labels, k, theirs)
    counts = torch.bincount(torch.tensor(labels)[mask], minlength=7)
    assert counts.tolist() == [min(k, labels.count(c)) for c in range(7)]


def test_kshot_visits_classes_as_they_first_appear():
    labels = [5] * 30 + [2] * 30
    mask = kshot(torch.tensor(labels), 2, seed=1)
    stream = random.Random(1)
    assert mask.nonzero().flatten().tolist() == sorted(
        stream.sample(range(30), 2) + [30 + i for i in stream.sample(range(30), 2)]
    )
    assert mask.nonzero().flatten().tolist() == [4, 18, 55, 57]  # golden: CPython's generator


def test_kshot_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        kshot(torch.tensor([0]), 0, seed=1)


# ------------------------------------------------------------------------------------------------------- official


def test_every_word_is_understood_in_any_case():
    words = ["train", "Training", "val", "VALID", "validation", "dev", " test", "testing"]
    parts = official(words)
    assert {name: mask.nonzero().flatten().tolist() for name, mask in parts.items()} == {
        "train": [0, 1],
        "val": [2, 3, 4, 5],
        "test": [6, 7],
    }


def test_only_the_parts_that_there_are_come_back():
    assert list(official(["test", "train"])) == ["train", "test"]


def test_unknown_words_are_named_with_their_rows():
    with pytest.raises(InputError, match=r"'galery', 'trian' in rows 2, 4; the words understood are train: train, tra"):
        official(["train", "trian", "test", "galery"])
    with pytest.raises(InputError, match="no word at all in row 2"):
        official(["train", None])


def test_many_unknown_rows_are_counted():
    with pytest.raises(InputError, match="rows 1, 2, 3, 4, 5 and 95 more"):
        official(["x"] * 100)


def test_a_file_in_two_parts_is_an_error():
    with pytest.raises(
        InputError, match=r"1 image file is in more than one part .* a.png is in train \(row 1\) and in "
    ):
        official(["train", "train", "test"], images=["a.png", "b.png", "a.png"])
    assert len(official(["train", "train", "test"], images=["a.png", "a.png", "b.png"])) == 2


def test_straddling_finds_each_file_once():
    parts = {"train": torch.tensor([1, 1, 1, 0, 0, 0], dtype=torch.bool)}
    parts["test"] = ~parts["train"]
    found = straddling(["a", "b", "a", "a", "a", "c"], parts)
    assert found == [("a", (0, "train"), (3, "test"))]


def test_official_does_not_care_for_row_order():
    words = ["train", "test", "dev", "training"] * 5
    order = np.random.default_rng(0).permutation(len(words))
    parts = official(words)
    again = official([words[i] for i in order])
    assert all(again[name].tolist() == parts[name][order].tolist() for name in parts)


def test_split_word():
    assert [split_word(w) for w in ("dev", "TESTING", "tests", "")] == ["val", "test", None, None]


# ------------------------------------------------------------------------------------------------- holdout_images


@anytime
@given(st.lists(st.integers(0, 4), min_size=1, max_size=120), st.floats(0.05, 0.95), st.integers(0, 99), st.randoms())
def test_each_class_keeps_its_share_back(labels: list[int], share: float, seed: int, shuffler: random.Random):
    tensor = torch.tensor(labels)
    ids = [f"{(i * 7919) % 1009:04d}.png" for i in range(len(labels))]
    mask = holdout_images(tensor, share=share, seed=seed, ids=ids)
    for label in set(labels):
        n = labels.count(label)
        kept = int(mask[tensor == label].sum())
        if n < 5:
            assert kept == 0
        else:
            assert abs(kept - n * share) <= 1 or kept in (1, n - 1)
            assert 1 <= kept < n
    order = list(range(len(labels)))
    shuffler.shuffle(order)
    again = holdout_images(tensor[order], share=share, seed=seed, ids=[ids[i] for i in order])
    assert again.tolist() == mask[order].tolist()


def test_holdout_images_depends_on_its_seed():
    labels = torch.zeros(100, dtype=torch.long)
    one, two = (holdout_images(labels, share=0.5, seed=s) for s in (0, 1))
    assert one.sum() == two.sum() == 50
    assert not torch.equal(one, two)
    assert torch.equal(one, holdout_images(labels, share=0.5, seed=0))


def test_at_least():
    labels = torch.tensor([0] * 9 + [1] * 10)
    mask = holdout_images(labels, share=0.2, seed=0, at_least=10)
    assert mask[:9].sum() == 0
    assert mask[9:].sum() == 2


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_that_is_none_or_all_is_refused(share: float):
    with pytest.raises(InputError, match="between 0 and 1"):
        holdout_images(torch.zeros(9, dtype=torch.long), share=share, seed=0)
