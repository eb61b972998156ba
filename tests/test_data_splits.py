"""Splits: the published ones to the letter; disjoint; and (but for CoOp's) blind to the order of the rows."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vicinal.data.splits import (
    class_disjoint,
    coop_shots,
    grouped,
    holdout_images,
    kshot,
    official,
    split_word,
    straddling,
)
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


# Published index lists of Describable Textures (47 classes, 60 train and 24 val images each), from cross-modal
# adaptation's indices/dtd/shot_K-seed_S.json, MIT. The val draws go on where the train draws stopped, so each of
# them says that the train draws were right as well.
PUBLISHED = {
    (1, 1, "train"): "8 96 174 231 288 304 376 427 511 588 628 690 761 804 890 913 966 1051 1081 1197 1253 1284 1347 "
    "1418 1488 1549 1560 1664 1708 1757 1846 1911 1934 2017 2046 2157 2180 2221 2281 2341 2441 2494 2520 2636 2664 "
    "2743 2773",
    (1, 1, "val"): "13 47 48 88 103 134 159 185 199 227 247 285 295 326 345 360 397 425 452 459 485 524 551 561 579 "
    "623 634 671 694 712 733 760 789 798 825 849 882 903 928 948 978 985 1023 1039 1079 1092 1117",
    (1, 2, "val"): "16 29 65 77 103 127 144 173 202 221 244 280 304 323 352 381 401 413 446 469 503 520 539 570 587 "
    "611 638 653 684 718 743 758 788 808 823 855 872 903 928 952 971 1005 1022 1046 1067 1098 1127",
    (2, 3, "val"): "10 21 24 32 67 69 94 77 118 106 137 138 162 147 190 188 198 212 234 224 249 243 266 279 308 303 "
    "314 323 338 349 364 360 393 397 421 411 433 451 475 457 492 502 522 514 545 536 568 559 577 585 600 602 627 643 "
    "665 649 678 685 705 715 728 724 766 745 778 779 796 804 828 830 856 852 884 883 909 905 915 931 952 944 973 980 "
    "1007 1006 1015 1017 1045 1040 1072 1065 1097 1090 1104 1117",
    (8, 1, "val"): "17 15 7 2 47 25 26 28 53 65 54 56 82 91 88 80 107 106 99 105 127 139 142 135 148 162 161 147 178 "
    "169 181 170 204 196 202 195 235 234 228 218 258 257 247 242 272 275 273 282 305 291 302 296 315 313 321 312 355 "
    "357 336 338 373 363 361 366 391 402 397 389 411 422 413 429 439 437 455 435 469 468 473 465 497 488 502 495 514 "
    "507 510 524 538 529 528 537 575 571 562 566 588 586 578 595 614 603 608 606 643 641 646 639 669 659 656 653 689 "
    "678 681 679 707 698 704 710 722 740 738 730 751 756 753 745 778 773 786 777 799 802 795 809 835 834 818 823 847 "
    "840 852 842 872 881 866 887 890 888 908 897 923 927 916 915 952 946 938 957 965 964 970 969 987 1006 1000 1003 "
    "1017 1012 1014 1025 1055 1033 1042 1051 1077 1073 1079 1078 1086 1085 1089 1093 1121 1109 1105 1126",
    (16, 3, "val"): "3 17 4 10 44 47 43 37 65 57 68 53 86 87 81 77 118 98 99 101 137 138 143 132 155 147 152 156 169 "
    "172 183 184 200 199 214 208 227 226 228 230 257 242 251 255 267 268 272 282 291 309 306 311 315 317 334 318 354 "
    "349 357 359 372 383 364 378 403 388 396 390 425 424 413 426 437 438 440 443 465 456 470 469 492 490 497 498 513 "
    "524 519 520 549 550 537 543 552 571 558 575 596 576 579 597 607 615 605 616 644 638 630 640 654 649 664 668 686 "
    "675 690 681 717 700 710 698 739 721 720 731 763 751 760 746 783 785 768 778 802 803 814 796 818 835 817 838 842 "
    "863 850 846 866 870 877 886 895 903 898 891 913 925 914 918 958 941 948 951 975 982 962 977 997 990 1004 999 "
    "1017 1008 1022 1030 1044 1046 1037 1033 1079 1064 1067 1070 1096 1091 1099 1092 1111 1104 1110 1112",
}


@pytest.mark.parametrize(("k", "seed", "part"), PUBLISHED)
def test_the_published_shots_are_reproduced(k: int, seed: int, part: str):
    train, val = coop_shots(
        torch.arange(47).repeat_interleave(60), torch.arange(47).repeat_interleave(24), k, seed=seed
    )
    chosen = {"train": train, "val": val}[part].nonzero().flatten().tolist()
    assert chosen == sorted(int(row) for row in PUBLISHED[k, seed, part].split())


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
