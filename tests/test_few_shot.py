"""The few-shot protocol: who is asked, what is refused, and that an answer depends on its query alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vicinal.evaluation.few_shot import BLOCK, Features, few_shot, few_shot_scores
from vicinal.heads import CLAP, GDA, HEADS, Head, LinearProbe, NearestPrototype, TipAdapter, TipX, ZeroShot
from vicinal.types import InputError

C, K, Q, D, E = 5, 3, 60, 12, 9


class Task:
    def __init__(self, views: int = 1, spread: float = 0.5) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=draw)

        centres, turn = normal(C, D), normal(D, E)

        def features(labels: torch.Tensor, name: str, each: int = 1) -> Features:
            images = centres[labels] + spread * normal(len(labels), D)
            rows = images.repeat_interleave(each, 0) + (0.1 * normal(len(labels) * each, D) if each > 1 else 0)
            ids = tuple(f"{name}{i}" for i in range(len(labels)) for _ in range(each))
            return Features(rows, labels.repeat_interleave(each), ids, torch.tanh(rows @ turn))

        self.support = features(torch.arange(C).repeat(K), "s", views)
        self.queries = features(torch.randint(0, C, (Q,), generator=draw), "q")
        self.validation = features(torch.arange(C), "v")
        self.text = centres + normal(C, D)


def plain(features: Features) -> Features:
    return Features(features.frozen, features.labels, features.ids)


def head_of(name: str) -> Head:
    head = HEADS[name]()
    return head.set_params(epochs=3) if "epochs" in head.get_params() else head


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", HEADS)
def test_each_value_is_that_of_the_head_alone(name: str, adapted: bool):
    task = Task(views=2)
    head = head_of(name)
    if adapted and head.adapted_use != "yes":
        with pytest.raises(InputError, match="would multiply adapted features with text"):
            few_shot_scores(head, task.support, task.queries, text=task.text)
        return
    sides = [task.support, task.queries] if adapted else [plain(task.support), plain(task.queries)]
    found = few_shot_scores(head, *sides, shots=K, text=task.text)
    s, q = (side.adapted.numpy() if adapted else None for side in sides)
    groups = np.array(task.support.ids)
    text = task.text.numpy() if head.text_use != "unused" else None
    again = head_of(name).fit(
        task.support.frozen.numpy(), task.support.labels.numpy(), text=text, adapted=s, groups=groups
    )
    right = again.predict(task.queries.frozen.numpy(), adapted=q) == task.queries.labels.numpy()
    assert found.scores["test"].values["accuracy"][0].tolist() == right.astype(float).tolist()
    assert found.selection == again.selection_
    assert found.selection.labels in (C * K, 0)  # views of an image are one label


@pytest.mark.parametrize("name", HEADS)
def test_an_answer_depends_on_its_query_alone(name: str):
    task = Task(spread=1.5)
    support, queries = plain(task.support), plain(task.queries)
    together = few_shot_scores(head_of(name), support, queries, text=task.text).scores["test"].values["accuracy"][0]
    assert 0.2 < together.mean() < 0.99  # not all alike
    order = torch.randperm(Q, generator=torch.Generator().manual_seed(1))
    parts = {"first": queries.where(torch.arange(Q) < 1), "rest": queries.where(torch.arange(Q) >= 1)}
    shuffled = Features(queries.frozen[order], queries.labels[order], tuple(queries.ids[i] for i in order.tolist()))
    apart = few_shot_scores(head_of(name), support, parts | {"shuffled": shuffled}, text=task.text).scores
    assert torch.equal(torch.cat([apart[part].values["accuracy"][0] for part in parts]), together)
    assert torch.equal(apart["shuffled"].values["accuracy"][0], together[order])


def test_a_shift_keeps_head_and_hyper_parameters():
    task = Task(spread=1.0)
    support = plain(task.support)
    other = Features(task.queries.frozen + 2.0, task.queries.labels, tuple(f"o{i}" for i in range(Q)))
    both = few_shot_scores(TipX(), support, {"own": plain(task.queries), "other": other}, text=task.text)
    alone = few_shot_scores(TipX(), support, plain(task.queries), text=task.text)
    assert both.selection == alone.selection
    assert torch.equal(both.scores["own"].values["accuracy"], alone.scores["test"].values["accuracy"])
    assert not torch.equal(both.scores["other"].values["accuracy"], both.scores["own"].values["accuracy"])


def test_candidates_leave_other_columns_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("vicinal.evaluation.few_shot.BLOCK", 7)
    task = Task(spread=2.0)
    support, queries = plain(task.support), plain(task.queries)
    few = torch.tensor([0, 3])
    part = queries.where(torch.isin(queries.labels, few))
    found = few_shot_scores(GDA(), support, {"part": part}, text=task.text, candidates={"part": few})
    logits = torch.from_numpy(found.head.logits(part.frozen.numpy()))[:, few]
    assert torch.equal(found.scores["part"].values["accuracy"][0], (few[logits.argmax(1)] == part.labels).float())
    every = few_shot_scores(GDA(), support, {"part": part}, text=task.text)
    assert found.scores["part"].values["accuracy"].mean() > every.scores["part"].values["accuracy"].mean()
    with pytest.raises(InputError, match="part: none of its candidates has a support image"):
        few_shot_scores(GDA(), support, {"part": part}, candidates={"part": torch.tensor([C])})
    assert BLOCK == 4096


def test_a_class_without_support_does_not_count_and_labels_may_have_gaps():
    task = Task()
    support = plain(task.support).where(~torch.isin(task.support.labels, torch.tensor([1])))
    found = few_shot_scores(NearestPrototype(), support, plain(task.queries))
    values = found.scores["test"].values["accuracy"][0]
    assert torch.equal(values.isnan(), task.queries.labels == 1)
    assert values.nanmean() > 0.8
    with_text = few_shot_scores(TipAdapter(), support, plain(task.queries), text=task.text)
    assert torch.equal(with_text.scores["test"].values["accuracy"][0].isnan(), task.queries.labels == 1)


def test_zero_adapters_change_nothing():
    task = Task(spread=1.0)

    def same(features: Features) -> Features:
        return Features(features.frozen, features.labels, features.ids, features.frozen.clone())

    for name, head in HEADS.items():
        if head.adapted_use == "yes":
            base = few_shot_scores(head_of(name), plain(task.support), plain(task.queries), text=task.text)
            plus = few_shot_scores(head_of(name), same(task.support), same(task.queries), text=task.text)
            assert plus.selection == base.selection, name
            assert torch.equal(plus.scores["test"].values["accuracy"], base.scores["test"].values["accuracy"]), name


def test_average_has_an_interval_over_classes():
    task = Task(spread=1.5)
    found = few_shot(LinearProbe(policy="fixed"), plain(task.support), plain(task.queries), shots=K)["accuracy"]
    assert found.low < found.value < found.high
    assert (found.n, found.queries) == (C, Q)


@pytest.mark.parametrize("policy", ["fewshot_val", "full_val"])
def test_validation_is_used_by_policies_that_say_so(policy: str):
    task = Task(spread=1.5)
    support, queries, held = plain(task.support), plain(task.queries), plain(task.validation)
    found = few_shot_scores(TipAdapter(policy=policy), support, queries, text=task.text, validation=held)
    assert found.selection.policy == policy
    assert found.selection.labels == C * K + C
    assert few_shot_scores(ZeroShot(), support, queries, text=task.text, validation=held).selection.policy == "fixed"
    with pytest.raises(InputError, match="does not use a validation set"):
        few_shot_scores(TipAdapter(), support, queries, text=task.text, validation=held)
    leaked = Features(support.frozen[:C], support.labels[:C], ("x",) * C)
    with pytest.raises(InputError, match="a validation image stands in the support set too"):
        few_shot_scores(TipAdapter(policy=policy), support, queries, text=task.text, validation=leaked)


def test_what_is_refused():
    task = Task()
    support, queries = plain(task.support), plain(task.queries)
    with pytest.raises(InputError, match="policy oracle_test would choose hyper-parameters on the test set"):
        few_shot_scores(TipAdapter(policy="oracle_test"), support, queries)
    with pytest.raises(InputError, match=f"class 0 has {K} images, fewer than the 4 shots, and so do {C - 1} others"):
        few_shot_scores(TipAdapter(), support, queries, shots=4)
    with pytest.raises(InputError, match="class 0 has 3 images, fewer than the 4 shots"):  # views are no images
        few_shot_scores(TipAdapter(), plain(Task(views=2).support), queries, shots=4)
    with pytest.raises(InputError, match="support set holds 1 query image, the first s0"):
        few_shot_scores(TipAdapter(), support, Features(queries.frozen, queries.labels, ("s0", *queries.ids[1:])))
    copied = queries.frozen.clone()
    copied[[4, 9]] = support.frozen[[1, 2]]
    with pytest.raises(InputError, match="support set holds 2 query images, number for number, the first query row 4"):
        few_shot_scores(TipAdapter(), support, Features(copied, queries.labels, queries.ids))
    with pytest.raises(InputError, match="text vectors have 3 numbers, image vectors 12"):
        few_shot_scores(TipAdapter(), support, queries, text=torch.ones(C, 3))
    with pytest.raises(InputError, match="CLAP needs the text vectors"):
        few_shot_scores(CLAP(), support, queries)
    with pytest.raises(InputError, match="adapted features of the support set and of test, or of neither"):
        few_shot_scores(TipAdapter(), task.support, queries)
    with pytest.raises(InputError, match="the support set is empty"):
        few_shot_scores(TipAdapter(), support.where(support.labels < 0), queries)
    with pytest.raises(InputError, match="test: there is not one image to ask about"):
        few_shot_scores(TipAdapter(), support, queries.where(queries.labels < 0))
    with pytest.raises(ValueError, match="do not have equally many rows"):
        Features(support.frozen, support.labels, support.ids[1:])
