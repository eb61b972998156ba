"""A division's masks: disjoint, whole, and as the split column says."""

from __future__ import annotations

import pytest
import torch

from vicinal.data.division import divide
from vicinal.data.manifest import Manifest
from vicinal.types import InputError


def manifest(classes: int = 10, each: int = 10, split: list[str] | None = None, **columns: list[str]) -> Manifest:
    labels = [f"c{c}" for c in range(classes) for _ in range(each)]
    table = {"image": [f"{i}.png" for i in range(len(labels))], "label": labels, **columns}
    return Manifest.build(table | ({"split": split} if split else {}), ".")


def classes_of(m: Manifest, mask: torch.Tensor) -> set[int]:
    return set(m.labels()[mask].tolist())


def assert_disjoint(m: Manifest, division: object) -> None:
    masks = [division.train, division.val, *(division.parts[p].queries for p in division.parts if p != "joint")]
    assert torch.stack(masks).sum(0).max() == 1


def test_class_disjoint_without_a_split_column() -> None:
    m = manifest()
    d = divide(m, "class_disjoint", holdout=0.2, seed=1, val=0.25, seen=0.2)
    assert set(d.parts) == {"seen", "unseen"}
    assert len(classes_of(m, d.parts["unseen"].queries)) == 2
    assert len(classes_of(m, d.val)) == 2
    assert classes_of(m, d.train) == classes_of(m, d.parts["seen"].queries)
    assert int(d.parts["seen"].queries.sum()) == 6 * 2, "a fifth of each trained class is kept back"
    assert not classes_of(m, d.train) & (classes_of(m, d.val) | classes_of(m, d.parts["unseen"].queries))
    assert torch.equal(d.parts["seen"].catalog, d.train), "shots of a seen class come from its training images"
    assert_disjoint(m, d)


def test_class_disjoint_respects_the_split_column() -> None:
    m = manifest(split=(["train"] * 5 + ["val"] * 2 + ["test"] * 3) * 10)
    d = divide(m, "class_disjoint", holdout=0.3, seed=42, val=0.3)
    words = m.column("split")
    assert {words[i] for i in d.train.nonzero().flatten()} == {"train"}
    for name, classes in (("seen", 5), ("unseen", 3), ("joint", 8)):
        part = d.parts[name]
        assert {words[i] for i in part.queries.nonzero().flatten()} == {"test"}, name
        assert {words[i] for i in part.catalog.nonzero().flatten()} == {"val"}, name
        assert not part.fallback.any(), "every class has val images"
        assert len(classes_of(m, part.queries)) == classes, name
    assert_disjoint(m, d)
    joint = d.parts["joint"]
    assert torch.equal(d.measured(), joint.queries | joint.catalog | joint.fallback)


def test_shots_come_from_train_where_val_lacks_the_class() -> None:
    words = (["train"] * 5 + ["val"] * 2 + ["test"] * 3) * 9 + ["train"] * 7 + ["test"] * 3
    m = manifest(split=words)
    d = divide(m, "official")
    assert classes_of(m, d.parts["all"].fallback) == {9}
    assert {words[i] for i in d.parts["all"].fallback.nonzero().flatten()} == {"train"}
    assert 9 not in classes_of(m, d.parts["all"].catalog)


def test_small_classes_are_not_measured_as_seen() -> None:
    d = divide(manifest(each=3), "class_disjoint", holdout=0.5, val=0.0)
    assert set(d.parts) == {"unseen"}
    assert "seen classes are not measured" in d.notes[0]
    assert not d.val.any()


def test_official_with_and_without_new_classes() -> None:
    same = divide(manifest(split=(["train"] * 6 + ["test"] * 4) * 10), "official")
    assert set(same.parts) == {"all"}
    new = divide(manifest(split=["train"] * 50 + ["test"] * 50), "official")
    assert set(new.parts) == {"unseen"}
    assert int(new.parts["unseen"].queries.sum()) == 50


def test_grouped_never_straddles() -> None:
    groups = [f"g{i % 7}" for i in range(100)]
    m = manifest(group=groups)
    d = divide(m, "grouped", column="group", holdout=0.3, val=0.2, seed=3)
    sides = [{groups[i] for i in mask.nonzero().flatten()} for mask in (d.train, d.val, d.parts["all"].queries)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 7


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("official", {}, "needs a `split` column"),
        ("grouped", {"column": "shop"}, "no column 'shop'"),
        ("sideways", {}, "class_disjoint, official, grouped or all"),
        ("class_disjoint", {"holdout": 0.9, "val": 0.0}, "lower split.class_disjoint.holdout"),
        ("class_disjoint", {"holdout": 0.01}, r"split\.class_disjoint\.holdout=0\.01 of 10 classes leaves 0 held out"),
        ("grouped", {"column": "label", "holdout": 0.01}, r"split\.grouped\.holdout=0\.01 of 10 groups"),
    ],
)
def test_a_split_that_cannot_be_made_says_why(kind: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        divide(manifest(), kind, **settings)


@pytest.mark.parametrize("words", [("train", "test", "test"), ("train", "query", "gallery")])
def test_official_keeps_trained_classes_back_to_select_on_where_nothing_else_is(words: tuple[str, str, str]) -> None:
    m = manifest(classes=20, each=2, split=[words[0]] * 20 + [words[1], words[2]] * 10)
    rest = {m.classes.index(f"c{c}") for c in range(10)}
    d = divide(m, "official", val=0.3)
    assert len(classes_of(m, d.val)) == 3
    assert len(classes_of(m, d.train)) == 7
    assert classes_of(m, d.val) | classes_of(m, d.train) == rest
    assert classes_of(m, d.queries()) == set(range(20)) - rest, "the measured half stays whole"
    assert_disjoint(m, d)
    assert torch.equal(divide(m, "official", val=0.3, seed=7).queries(), d.queries())
    assert not torch.equal(divide(m, "official", val=0.3, seed=7).val, d.val)
    for none in (divide(m, "official", val=0.0), divide(m, "official", val=0.1)):  # a tenth of ten: one, too few
        assert not none.val.any()
        assert classes_of(m, none.train) == rest


def test_official_keeps_nothing_back_where_val_rows_are_named_or_trained_classes_are_measured() -> None:
    named = manifest(classes=20, each=2, split=["train"] * 20 + ["val"] * 4 + ["test"] * 16)
    assert classes_of(named, divide(named, "official", val=0.3).val) == {named.classes.index(c) for c in ("c10", "c11")}
    closed = manifest(classes=20, each=2, split=["train", "test"] * 20)
    assert not divide(closed, "official", val=0.3).val.any()


def test_masks_follow_a_narrower_manifest() -> None:
    m = manifest()
    d = divide(m, "class_disjoint", holdout=0.2, seed=1)
    needed = d.measured()
    narrow = m.where(needed)
    for name, part in d.parts_within(needed).items():
        assert narrow.where(part.queries).ids() == m.where(d.parts[name].queries).ids()


def test_too_few_classes_to_select_on_is_said() -> None:
    d = divide(manifest(), "class_disjoint", holdout=0.2, val=0.1)
    assert not d.val.any()
    assert "nothing is selected on" in d.notes[0]
