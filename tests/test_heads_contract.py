"""What every head of the table keeps: scikit-learn's checks, order, batches, labels, files, two spaces, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import estimator_checks_generator

from vicinal.heads import (
    APE,
    CLAP,
    GDA,
    HEADS,
    Head,
    LinearProbe,
    NearestPrototype,
    ProKeR,
    TipAdapter,
    TipAdapterF,
    TipX,
    ZeroShot,
    check_support,
    load_head,
)
from vicinal.types import InputError

C, K, D, E = 5, 4, 12, 9
FAST: dict[str, dict[str, Any]] = {"tip_adapter_f": {"epochs": 3}, "clap": {"epochs": 5}}


def make(name: str) -> Head:
    return HEADS[name](**FAST.get(name, {}))


ADAPTING = [name for name, head in HEADS.items() if head.adapted_use != "no"]
WITHOUT_TEXT = [name for name, head in HEADS.items() if head.text_use != "needed"]
BOTH_WAYS = [(name, adapted) for name in HEADS for adapted in (False, True)[: 1 + (name in ADAPTING)]]
TEXT_OR_NOT = [(name, text) for name in HEADS for text in (True, False)[: 1 + (name in WITHOUT_TEXT)]]
EVERY = pytest.mark.parametrize("name", list(HEADS))


class Task:
    """Clusters that overlap, texts a little off their centres."""

    def __init__(self, shots: int = K, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        centres = rng.normal(size=(C, D))
        self.y = np.repeat(np.arange(C), shots)
        self.X = centres[self.y] + 0.8 * rng.normal(size=(len(self.y), D))
        self.asked = rng.integers(0, C, 40)
        self.Q = centres[self.asked] + 0.8 * rng.normal(size=(40, D))
        self.text = centres + rng.normal(size=(C, D))
        turn = rng.normal(size=(D, E))
        self.A, self.QA = np.tanh(self.X @ turn), np.tanh(self.Q @ turn)


def fitted(name: str, task: Task, *, adapted: bool = False) -> Head:
    head = make(name)
    text = None if adapted and head.adapted_use == "without text" else task.text
    return head.fit(task.X, task.y, text=text, adapted=task.A if adapted else None)


def test_the_table_is_whole():
    assert len(HEADS) == 11
    assert {head.text_use for head in HEADS.values()} == {"needed", "optional", "unused"}
    for head in HEADS.values():
        assert set(head.linear) <= set(head.hyperparameters) <= set(head().get_params())


# What needs text cannot be fitted by these checks, which have none. APE would keep one channel of two.
IMAGE_HEADS = [
    NearestPrototype(),
    TipAdapter(),
    TipAdapterF(epochs=2),
    TipX(),
    APE(channels=1.0),
    GDA(),
    ProKeR(),
    LinearProbe(iterations=100),
]
LEFT_OUT = {"check_array_api_input"}  # arrays of other libraries: not promised
if hasattr(
    TipAdapter.logits, "__wrapped__"
):  # types are checked as the tests run, and these give wrong ones on purpose
    LEFT_OUT |= {"check_do_not_raise_errors_in_init_or_set_params", "check_requires_y_none"}
    LEFT_OUT |= {"check_estimator_sparse_array", "check_estimator_sparse_matrix"}
CHECKS = [
    pytest.param(estimator, check, id=f"{type(estimator).__name__}-{check.func.__name__}")
    for head in IMAGE_HEADS
    for estimator, check in estimator_checks_generator(head)
    if check.func.__name__ not in LEFT_OUT
]


@pytest.mark.parametrize(("estimator", "check"), CHECKS)
def test_scikit_learn(estimator: Head, check: Callable[[Head], None]):
    check(estimator)


def test_scikit_learn_has_many_checks():
    assert len(CHECKS) > 40 * len(IMAGE_HEADS)


@EVERY
def test_clones_and_keeps_its_settings(name: str):
    head = make(name)
    again = clone(head)
    assert again.get_params() == head.get_params()
    assert not [key for key in vars(again) if key.endswith("_")]


@pytest.mark.parametrize(("name", "adapted"), BOTH_WAYS)
def test_rows_in_any_order(name: str, adapted: bool):
    task = Task()
    head = fitted(name, task, adapted=adapted)
    order = np.random.default_rng(1).permutation(len(task.y))
    other = Task()
    other.X, other.y, other.A = task.X[order], task.y[order], task.A[order]
    shuffled = fitted(name, other, adapted=adapted)
    assert shuffled.selection_ == head.selection_
    queries = {"adapted": task.QA} if adapted else {}
    assert np.array_equal(head.logits(task.Q, **queries), shuffled.logits(task.Q, **queries))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@EVERY
def test_answers_do_not_depend_on_the_batch(name: str, dtype: type):
    task = Task()
    task.X, task.Q, task.text = (a.astype(dtype) for a in (task.X, task.Q, task.text))
    head = fitted(name, task)
    together = head.logits(task.Q)
    assert together.dtype == dtype
    alone = np.concatenate([head.logits(row[None]) for row in task.Q])
    np.testing.assert_allclose(alone, together, rtol=1e-4 if dtype is np.float32 else 1e-11, atol=1e-4)
    far = np.concatenate([-task.Q, 100 * task.Q, task.Q[:3]])
    assert np.array_equal(head.predict(far)[-3:], head.predict(task.Q[:3]))
    many = np.tile(task.Q, (400, 1))  # several blocks
    assert np.array_equal(head.predict(many), np.tile(head.predict(task.Q), 400))


@pytest.mark.parametrize(
    "names",
    [
        np.array(["e", "b", "d", "a", "c"]),
        np.array([7, -3, 0, 40, 5]),
        np.array(["x", "yy", "z", "w", "v"], dtype=object),
    ],
    ids=["strings", "integers", "objects"],
)
@EVERY
def test_any_labels(name: str, names: np.ndarray, tmp_path: Path):
    task = Task()
    plain = fitted(name, task)
    head = make(name).fit(task.X, names[task.y], text=dict(zip(names.tolist(), task.text, strict=True)))
    assert head.classes_.tolist() == sorted(names.tolist())
    assert np.array_equal(head.predict(task.Q), names[plain.predict(task.Q)]) or name in FAST  # these draw batches
    head.save(tmp_path / "head.safetensors")
    again = load_head(tmp_path / "head.safetensors")
    assert type(again) is type(head)
    assert again.classes_.dtype == head.classes_.dtype
    assert np.array_equal(again.predict(task.Q), head.predict(task.Q))


@EVERY
def test_tensors_are_arrays(name: str):
    task = Task()
    head = fitted(name, task)
    tensors = make(name).fit(torch.from_numpy(task.X), torch.from_numpy(task.y), text=torch.from_numpy(task.text))
    assert np.array_equal(tensors.logits(torch.from_numpy(task.Q)), head.logits(task.Q))
    half = make(name).fit(torch.from_numpy(task.X).bfloat16(), task.y, text=torch.from_numpy(task.text).bfloat16())
    assert half.logits(torch.from_numpy(task.Q).half()).dtype == np.float32


@pytest.mark.parametrize(("name", "adapted"), BOTH_WAYS)
def test_saved_and_read(name: str, adapted: bool, tmp_path: Path):
    task = Task()
    head = fitted(name, task, adapted=adapted)
    queries = {"adapted": task.QA} if adapted else {}
    head.save(tmp_path / "head.safetensors")
    again = type(head).load(tmp_path / "head.safetensors")
    assert np.array_equal(again.logits(task.Q, **queries), head.logits(task.Q, **queries))
    assert np.array_equal(again.predict_proba(task.Q, **queries), head.predict_proba(task.Q, **queries))
    assert again.selection_ == head.selection_
    assert again.get_params() == head.get_params()
    other = next(kind for kind in HEADS.values() if kind is not type(head))
    with pytest.raises(InputError, match="load_head"):
        other.load(tmp_path / "head.safetensors")


def test_not_a_file_of_a_head(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"no")
    for path in (tmp_path / "x", tmp_path / "none"):
        with pytest.raises(InputError, match="not a file of a head"):
            load_head(path)
        with pytest.raises(InputError, match="not a file of a head"):
            TipAdapter.load(path)


@pytest.mark.parametrize("shots", [1, 2, 3])
@pytest.mark.parametrize(("name", "text"), TEXT_OR_NOT)
def test_few_shots(name: str, text: bool, shots: int):
    task = Task(shots)
    head = make(name).fit(task.X, task.y, text=task.text if text else None)
    assert (head.predict(task.Q) == task.asked).mean() > 0.4  # chance: 0.2
    if head.hyperparameters:
        assert (head.policy_, bool(head.selection_.reason)) == (
            ("fixed", True) if shots == 1 else ("support_cv", False)
        )


@pytest.mark.parametrize("name", [name for name in HEADS if name not in WITHOUT_TEXT])
def test_heads_that_need_text_say_so(name: str):
    task = Task()
    with pytest.raises(InputError, match="needs the text"):
        make(name).fit(task.X, task.y)


@pytest.mark.parametrize(("name", "text"), TEXT_OR_NOT)
def test_one_class(name: str, text: bool):
    task = Task()
    head = make(name).fit(task.X[:3], ["only"] * 3, text={"only": task.text[0]} if text else None)
    assert head.predict(task.Q).tolist() == ["only"] * 40
    assert head.predict_proba(task.Q).tolist() == [[1.0]] * 40


@EVERY
def test_two_classes_the_scikit_learn_way(name: str):
    task = Task()
    two = task.y < 2
    head = make(name).fit(task.X[two], task.y[two], text=task.text[:2])
    logits = head.logits(task.Q)
    assert logits.shape == (40, 2)
    assert np.array_equal(head.decision_function(task.Q), logits[:, 1] - logits[:, 0])


@EVERY
def test_classes_of_unlike_size(name: str):
    task = Task()
    kept = np.array([0, 4, 5, 8, 9, 10, 12, 13, 14, 15, 16, 17])  # 1, 2, 3, 4 and 2 images
    head = make(name).fit(task.X[kept], task.y[kept], text=task.text)
    assert (head.predict(task.Q) == task.asked).mean() > 0.4
    np.testing.assert_allclose(head.predict_proba(task.Q).sum(1), 1, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------- two spaces


@pytest.mark.parametrize("name", ADAPTING)
def test_adapted_features_that_are_the_frozen_ones_change_nothing(name: str):
    task = Task()
    text = None if make(name).adapted_use == "without text" else task.text
    plain = make(name).fit(task.X, task.y, text=text)
    head = make(name).fit(task.X, task.y, text=text, adapted=task.X)
    assert np.array_equal(head.logits(task.Q, adapted=task.Q), plain.logits(task.Q))
    assert head.selection_ == plain.selection_


@pytest.mark.parametrize("name", ["nearest_prototype", "tip_adapter", "tip_x", "gda", "proker"])
def test_text_never_sees_adapted_features(name: str):
    """A turn of the adapted space leaves all products of two images as they are, and would spoil those with text.

    Not so APE, which chooses single channels, nor TipAdapterF, since AdamW looks at single numbers.
    """
    task = Task()
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(D, D)))[0]
    plain = fitted(name, task)
    head = make(name).fit(task.X, task.y, text=task.text, adapted=task.X @ turn)
    np.testing.assert_allclose(head.logits(task.Q, adapted=task.Q @ turn), plain.logits(task.Q), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        [head.selection_.values[key] for key in head.hyperparameters],
        [plain.selection_.values[key] for key in head.hyperparameters],
        rtol=1e-4,
    )


def test_adapted_features_meet_no_text():
    task = Task()
    for refusing in (ZeroShot(), CLAP(), LinearProbe()):
        with pytest.raises(InputError, match="different spaces"):
            refusing.fit(task.X, task.y, text=task.text, adapted=task.A)
    LinearProbe().fit(task.X, task.y, adapted=task.A).predict(task.Q, adapted=task.QA)


def test_adapted_features_on_one_side_only():
    task = Task()
    both = TipAdapter().fit(task.X, task.y, text=task.text, adapted=task.A)
    with pytest.raises(InputError, match="give those of the queries too"):
        both.predict(task.Q)
    with pytest.raises(InputError, match="has 3 rows, X 40"):
        both.predict(task.Q, adapted=task.QA[:3])
    with pytest.raises(InputError, match="have 12 numbers, those of the support set 9"):
        both.predict(task.Q, adapted=task.Q)
    with pytest.raises(InputError, match="fitted without adapted"):
        TipAdapter().fit(task.X, task.y).predict(task.Q, adapted=task.QA)
    with pytest.raises(InputError, match="has 3 rows, X 20"):
        TipAdapter().fit(task.X, task.y, adapted=task.A[:3])


# ----------------------------------------------------------------------------------------------------------- bad input


@EVERY
def test_bad_text(name: str):
    task = Task()
    head = make(name)
    names = [f"n{i}" for i in range(C)]
    words = dict(zip(names, task.text, strict=True))
    y = np.array(names)[task.y]
    for text, labels, match in [
        (task.text[:, :5], task.y, "text vectors have 5 numbers, image vectors 12"),
        (task.text[:4], task.y, "label 4 has no text"),
        (task.text, y, "do not say which row of text is theirs"),
        ({k: v for k, v in words.items() if k != "n2"}, y, "label 'n2' has no text"),
        ({**words, "n2": task.text[2, :4]}, y, "not all of one width"),
        (np.where(np.eye(C, D) > 0, np.nan, task.text), task.y, "class 0 is not finite"),
        (task.text[0], task.y, "one vector a class"),
        ({}, y, "no class"),
    ]:
        with pytest.raises(InputError, match=match):
            head.fit(task.X, labels, text=text)
    if name != "zero_shot":
        with pytest.raises(InputError, match="class 'more' has a text and no image"):
            head.fit(task.X, y, text={**words, "more": task.text[0]})
        with pytest.raises(InputError, match="class 5 has a text and no image"):
            head.fit(task.X, task.y, text=np.concatenate([task.text, task.text[:1]]))


def test_zero_shot_takes_classes_without_images():
    task = Task()
    head = ZeroShot().fit(text=dict(zip("abcde", task.text, strict=True)))
    assert head.predict(task.Q[:1]).dtype.kind == "U"
    with pytest.raises(ValueError, match="12 features"):
        head.predict(task.Q[:, :4])


@pytest.mark.parametrize("bad", ["nan", "rows", "empty"])
@pytest.mark.parametrize("name", [name for name in HEADS if name != "zero_shot"])
def test_bad_vectors(name: str, bad: str):
    task = Task()
    X = {"nan": np.where(np.eye(C * K, D) > 0, np.nan, task.X), "rows": task.X[:-1], "empty": task.X[:0]}[bad]
    with pytest.raises(ValueError, match=r"NaN|inconsistent|0 sample"):
        make(name).fit(X, task.y, text=task.text)


def test_groups_of_another_length():
    task = Task()
    with pytest.raises(InputError, match="groups has shape"):
        TipAdapter().fit(task.X, task.y, groups=["a"])


def test_a_support_set_that_is_not_what_it_says():
    task = Task()
    names = np.array(["ant", "bee", "cow", "dog", "elk"])[task.y]
    check_support(task.X, names, shots=K, queries=task.Q, ids=range(20), query_ids=range(20, 60))
    with pytest.raises(InputError, match="class bee has 2 images, fewer than the 4 shots"):
        check_support(np.delete(task.X, [4, 5], 0), np.delete(names, [4, 5]), shots=K)
    with pytest.raises(InputError, match="holds 1 query image, the first 7"):
        check_support(task.X, names, ids=range(20), query_ids=[7, 80])
    asked = torch.from_numpy(np.concatenate([task.Q, task.X[3:4]]))
    with pytest.raises(InputError, match="number for number, the first query row 40"):
        check_support(task.X, names, queries=asked)
    with pytest.raises(ValueError, match="go together"):
        check_support(task.X, names, ids=range(20))
