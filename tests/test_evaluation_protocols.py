"""Protocols against loops that draw and average one class at a time, and the rules of who counts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import pytest
import torch
from torch.nn.functional import normalize

from vicinal.evaluation.protocols import prototype_scores, prototypes, retrieval, retrieval_scores
from vicinal.types import Embeddings, InputError

NAMES = tuple(f"class {c}" for c in range(12))


def clustered(sizes: Sequence[int], *, seed: int, noise: float = 1.0, prefix: str = "", width: int = 12) -> Embeddings:
    """`sizes[c]` items around the centre of class c, in random order; centres do not depend on the seed."""
    centres = normalize(torch.randn(len(NAMES), width, generator=torch.Generator().manual_seed(99)), dim=1)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    spread = normalize(torch.randn(len(labels), width, generator=generator), dim=1)
    order = torch.randperm(len(labels), generator=generator)
    ids = tuple(f"{prefix}{seed}/{i}.jpg" for i in order.tolist())
    return Embeddings(normalize(centres[labels] + noise * spread, dim=1)[order], labels[order], ids, NAMES)


def permuted(e: Embeddings, order: torch.Tensor) -> Embeddings:
    return Embeddings(e.vectors[order], e.labels[order], tuple(e.ids[i] for i in order.tolist()), e.classes)


def with_vectors(e: Embeddings, vectors: torch.Tensor) -> Embeddings:
    return Embeddings(vectors, e.labels, e.ids, e.classes)


# ---- retrieval


def loop_retrieval(query: Embeddings, gallery: Embeddings | None) -> list[dict[str, float]]:
    rows = []
    side = gallery or query
    for q in range(len(query)):
        items = [g for g in range(len(side)) if gallery is not None or g != q]
        scores = [float(side.vectors[g].double() @ query.vectors[q].double()) for g in items]
        order = sorted(range(len(items)), key=lambda i, s=scores: -s[i])
        found = [bool(side.labels[items[i]] == query.labels[q]) for i in order]
        R = sum(found)
        values = {f"recall@{k}": float(any(found[:k])) if R else math.nan for k in (1, 4)}
        precision = [sum(found[: i + 1]) / (i + 1) for i in range(len(found))]
        values["map@r"] = sum(p for p, hit in zip(precision[:R], found, strict=False) if hit) / R if R else math.nan
        values["r_precision"] = sum(found[:R]) / R if R else math.nan
        rows.append(values)
    return rows


@pytest.mark.parametrize("with_gallery", [False, True])
def test_retrieval_equals_the_loop(with_gallery: bool):
    query = clustered([4, 1, 9, 2, 0, 6], seed=0)
    gallery = clustered([3, 0, 5, 1, 7, 2], seed=1) if with_gallery else None
    found = retrieval_scores(query, gallery, ks=(1, 4))
    expected = loop_retrieval(query, gallery)
    assert torch.equal(found.units, query.labels)
    assert not found.macro
    assert list(found.values) == ["recall@1", "recall@4", "map@r", "r_precision"]
    for name, values in found.values.items():
        assert values.shape == (1, len(query))
        reference = torch.tensor([[row[name] for row in expected]])
        torch.testing.assert_close(values, reference, equal_nan=True, rtol=1e-6, atol=0)
    assert found.values["map@r"].isnan().sum() == 1  # class 1: alone, or absent from the gallery


def test_a_class_of_one_is_left_out_of_every_metric_and_counted():
    metrics = retrieval(clustered([4, 1, 9, 1], seed=0))
    assert {m.queries for m in metrics.values()} == {13}
    assert {m.n for m in metrics.values()} == {2}
    assert list(metrics) == ["recall@1", "recall@5", "recall@10", "map@r", "r_precision"]


def test_a_class_of_one_is_still_a_wrong_answer_for_others():
    x = normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]]), dim=1)
    e = Embeddings(x, torch.tensor([0, 0, 1]), ("a", "b", "lone"), NAMES)
    assert retrieval_scores(e, ks=(1,)).values["recall@1"].nan_to_num(nan=-1).tolist() == [[0.0, 0.0, -1.0]]


def test_duplicates_are_found_and_only_the_query_itself_is_masked():
    """Removing the best hit instead of the query's own row would call the first pair found, and the second not."""
    x = torch.eye(4)[[0, 0, 1, 1]]
    pairs = Embeddings(x, torch.tensor([0, 0, 1, 1]), ("a", "b", "c", "d"), NAMES)
    assert retrieval_scores(pairs, ks=(1,)).values["recall@1"].tolist() == [[1.0] * 4]
    crossed = Embeddings(x, torch.tensor([0, 1, 0, 1]), ("a", "b", "c", "d"), NAMES)
    assert retrieval_scores(crossed, ks=(1,)).values["recall@1"].tolist() == [[0.0] * 4]


def test_retrieval_does_not_depend_on_the_order_of_rows():
    e = clustered([4, 3, 9, 2], seed=3)
    order = torch.randperm(len(e), generator=torch.Generator().manual_seed(0))
    plain, shuffled = retrieval_scores(e), retrieval_scores(permuted(e, order))
    for name in plain.values:
        assert torch.equal(plain.values[name][:, order], shuffled.values[name])


# ---- prototypes


def shots_of(e: Embeddings, label: int, draw: int, seed: int) -> list[int]:
    """All rows of a class in the order that this draw takes them: splitmix64 on Python's integers."""

    def mixed(state: int, step: int) -> int:
        z = (state + (step + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    digest = hashlib.blake2b(f"{seed}\n{e.classes[label]}".encode(), digest_size=8).digest()
    state = mixed(int.from_bytes(digest, "little"), draw)
    rows = sorted((i for i in range(len(e)) if e.labels[i] == label), key=lambda i: e.ids[i])
    return [rows[j] for j in sorted(range(len(rows)), key=lambda j: mixed(state, j))]


def loop_prototypes(
    queries: Embeddings, catalog: Embeddings | None, fallback: Embeddings | None, k: int, draw: int, seed: int
) -> list[float]:
    prototypes, used = {}, set()
    for label in range(len(NAMES)):
        asked = bool((queries.labels == label).any())
        pool = queries if catalog is None else catalog
        rows = shots_of(pool, label, draw, seed)
        if catalog is None:
            rows = rows[: len(rows) - 1]
            used |= set(rows[:k])
        if not rows and asked and fallback is not None:
            pool, rows = fallback, shots_of(fallback, label, draw, seed)
        if rows:
            shots = [pool.vectors[i].double() / pool.vectors[i].double().norm() for i in rows[:k]]
            prototype = sum(shots) / len(shots)
            prototypes[label] = prototype / prototype.norm()
    values = []
    for q in range(len(queries)):
        label = int(queries.labels[q])
        best = max(prototypes, key=lambda c, q=q: float(prototypes[c] @ queries.vectors[q].double()))
        values.append(math.nan if q in used or label not in prototypes else float(best == label))
    return values


CASES = {
    "from the queries": ([5, 2, 1, 0, 12], None, None),
    "from the queries, one class from elsewhere": ([5, 2, 1, 0, 12], None, [3, 3, 3, 3, 3]),
    "from a catalog": ([5, 2, 1, 0, 12], [2, 14, 0, 3, 1], None),
    "from a catalog, one class from elsewhere": ([5, 2, 1, 0, 12], [2, 14, 0, 3, 1], [4, 4, 4, 4, 4, 4]),
    "from an empty catalog": ([5, 2, 1], [0, 0, 0], [4, 4, 0, 4]),
}


@pytest.mark.parametrize("case", CASES)
def test_prototypes_equal_the_loop(case: str):
    sizes, in_catalog, in_fallback = CASES[case]
    queries = clustered(sizes, seed=1, noise=1.5)
    catalog = clustered(in_catalog, seed=2, noise=1.5) if in_catalog else None
    fallback = clustered(in_fallback, seed=3, noise=1.5) if in_fallback else None
    found = prototype_scores(queries, catalog, shots=(1, 3, 10, 20), draws=4, seed=7, fallback=fallback)
    assert found.macro
    assert torch.equal(found.units, queries.labels)
    assert list(found.values) == ["accuracy@1shot", "accuracy@3shot", "accuracy@10shot", "accuracy@20shot"]
    for k in (1, 3, 10, 20):
        expected = torch.tensor([loop_prototypes(queries, catalog, fallback, k, draw, 7) for draw in range(4)])
        assert torch.equal(found.values[f"accuracy@{k}shot"].nan_to_num(nan=-1), expected.nan_to_num(nan=-1)), k


def test_support_from_the_queries_does_not_count_and_leaves_each_class_one():
    e = clustered([5, 2, 1, 12], seed=1)
    for name, k in (("accuracy@1shot", 1), ("accuracy@3shot", 3), ("accuracy@10shot", 10)):
        values = prototype_scores(e, draws=6).values[name]
        for label, size in enumerate((5, 2, 1, 12)):
            counted = (~values[:, e.labels == label].isnan()).sum(1)
            assert counted.tolist() == [size - min(k, size - 1) if size > 1 else 0] * 6
    assert prototypes(e)["accuracy@1shot"].n == 3


def drawn(e: Embeddings, k: int = 1, draws: int = 20, seed: int = 0) -> dict[str, list[bool]]:
    """Id -> whether it was support, in each draw."""
    nan = prototype_scores(e, shots=(k,), draws=draws, seed=seed).values[f"accuracy@{k}shot"].isnan()
    return {ident: nan[:, i].tolist() for i, ident in enumerate(e.ids)}


def test_draws_depend_on_seed_class_and_ids_alone():
    e = clustered([5, 4, 0, 8], seed=1)
    first = drawn(e)
    assert drawn(permuted(e, torch.randperm(len(e), generator=torch.Generator().manual_seed(1)))) == first
    assert drawn(with_vectors(e, clustered([5, 4, 0, 8], seed=2).vectors)) == first
    alone = drawn(e.where(e.labels == 3))
    assert alone == {ident: first[ident] for ident in alone}
    assert drawn(e, seed=1) != first
    assert len({tuple(column) for column in zip(*first.values(), strict=True)}) > 15  # draws differ


def test_fewer_shots_are_among_more():
    e = clustered([6, 12], seed=1)
    one, three = drawn(e, 1), drawn(e, 3)
    assert all(not a or b for ident in e.ids for a, b in zip(one[ident], three[ident], strict=True))


def test_every_item_is_drawn_alike():
    e = clustered([8, 8], seed=1)
    counts = torch.tensor([sum(column) for column in drawn(e, 2, draws=800).values()]).double()
    assert counts.sum() == 2 * 2 * 800
    chi_squared = ((counts - 200) ** 2 / 200).sum().item()
    assert chi_squared < 45  # 14 degrees of freedom: 1 in 20,000


def test_each_shot_is_normalised_first():
    queries, catalog = clustered([5, 5, 5], seed=1, noise=2.0), clustered([4, 4, 4], seed=2, noise=2.0)
    plain = prototype_scores(queries, catalog)
    loud = with_vectors(catalog, catalog.vectors * torch.logspace(-2, 2, 12)[:, None])
    for name, values in prototype_scores(queries, loud).values.items():
        assert torch.equal(values, plain.values[name])


def test_a_class_of_the_catalog_without_queries_distracts_but_is_no_zero_in_the_mean():
    queries, catalog = clustered([5, 5], seed=1, noise=0.1), clustered([4, 4, 4], seed=2, noise=0.1)
    estimate = prototypes(queries, catalog)["accuracy@3shot"]
    assert (estimate.value, estimate.n) == (1.0, 2)
    thief = catalog.where(catalog.labels == 2)
    thief = with_vectors(thief, queries.vectors[queries.labels == 0][:1].expand(4, -1))
    merged = catalog.where(catalog.labels < 2)
    merged = Embeddings(
        torch.cat([merged.vectors, thief.vectors]),
        torch.cat([merged.labels, thief.labels]),
        merged.ids + thief.ids,
        NAMES,
    )
    assert prototypes(queries, merged)["accuracy@3shot"].value < 1


def test_a_query_without_a_prototype_is_left_out_and_counted():
    queries, catalog = clustered([5, 5, 3], seed=1, noise=0.1), clustered([4, 4], seed=2, noise=0.1)
    estimate = prototypes(queries, catalog)["accuracy@1shot"]
    assert (estimate.value, estimate.n, estimate.queries) == (1.0, 2, 10)
    nothing = prototypes(queries, catalog.where(catalog.labels > 5))["accuracy@1shot"]
    assert (math.isnan(nothing.value), nothing.n, nothing.queries) == (True, 0, 0)


def test_accuracy_is_over_classes_not_queries():
    """99 right of class 0 and 1 wrong of class 1: macro top-1 is one half."""
    x = torch.eye(12)[:2]
    queries = Embeddings(x[[0] * 100], torch.tensor([0] * 99 + [1]), tuple(map(str, range(100))), NAMES)
    catalog = Embeddings(x, torch.tensor([0, 1]), ("x", "y"), NAMES)
    assert prototypes(queries, catalog, shots=(1,))["accuracy@1shot"].value == 0.5


def test_a_catalog_that_gives_all_it_has_leaves_nothing_to_luck():
    queries, catalog = clustered([5, 5, 5], seed=1, noise=2.5), clustered([4, 3, 4], seed=2, noise=2.5)
    values = prototype_scores(queries, catalog, shots=(1, 4, 10), draws=8).values
    assert (values["accuracy@10shot"] == values["accuracy@10shot"][0]).all()
    assert torch.equal(values["accuracy@4shot"], values["accuracy@10shot"])
    assert not (values["accuracy@1shot"] == values["accuracy@1shot"][0]).all()


def test_many_classes_take_the_same_way_as_few(monkeypatch: pytest.MonkeyPatch):
    """With thousands of classes the nearest prototype is found by pruning; nobody should notice."""
    from vicinal.evaluation import metrics

    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300).repeat_interleave(3)
    x = normalize(
        normalize(torch.randn(300, 16, generator=generator), dim=1)[labels]
        + 0.2 * torch.randn(900, 16, generator=generator),
        dim=1,
    )
    e = Embeddings(x, labels, tuple(map(str, range(900))), tuple(map(str, range(300))))
    plain = prototype_scores(e, shots=(1, 2), draws=2)
    monkeypatch.setattr(metrics, "PRUNE_FROM", 0)
    for name, values in prototype_scores(e, shots=(1, 2), draws=2).values.items():
        assert torch.equal(values.nan_to_num(nan=-1), plain.values[name].nan_to_num(nan=-1))
    assert 0.2 < prototypes(e, shots=(1,))["accuracy@1shot"].value < 0.9


def test_nothing_is_changed_in_place():
    queries, catalog = clustered([5, 5], seed=1), clustered([4, 4], seed=2)
    queries, catalog = with_vectors(queries, queries.vectors * 3), with_vectors(catalog, catalog.vectors * 3)
    kept = queries.vectors.clone(), catalog.vectors.clone()
    prototype_scores(queries, catalog)
    prototype_scores(queries)
    retrieval_scores(queries, catalog)
    assert torch.equal(queries.vectors, kept[0])
    assert torch.equal(catalog.vectors, kept[1])


# ---- bad input


def test_what_cannot_be_measured_is_refused_by_name():
    e, other = clustered([4, 4], seed=1), clustered([4, 4], seed=2)
    renamed = Embeddings(other.vectors, other.labels, other.ids, NAMES[::-1])
    broken = e.vectors.clone()
    broken[3, 0] = torch.nan
    unlabelled = Embeddings(e.vectors, torch.where(e.labels == 1, -1, 0), e.ids, NAMES)
    for protocol in (retrieval_scores, prototype_scores):
        with pytest.raises(InputError, match="not one image"):
            protocol(e.where(e.labels > 5))
        with pytest.raises(InputError, match=e.ids[3]):
            protocol(with_vectors(e, broken))
        with pytest.raises(InputError, match="not finite"):
            protocol(other, with_vectors(e, broken))
        with pytest.raises(InputError, match="no label"):
            protocol(unlabelled)
        with pytest.raises(InputError, match="labels cannot be compared"):
            protocol(e, renamed)
    with pytest.raises(InputError, match="gallery: there is not one"):
        retrieval_scores(e, other.where(other.labels > 5))
    with pytest.raises(InputError, match="shots and draws"):
        prototype_scores(e, draws=0)
    with pytest.raises(InputError, match="shots and draws"):
        prototype_scores(e, shots=(0,))


def test_a_picture_on_both_sides_is_refused_a_shared_name_is_not():
    e, other = clustered([4, 4], seed=1), clustered([4, 4], seed=2)
    both = Embeddings(
        torch.cat([other.vectors, e.vectors[2:3]]),
        torch.cat([other.labels, e.labels[2:3]]),
        (*other.ids, e.ids[2]),
        NAMES,
    )
    with pytest.raises(InputError, match=f"1 queries stand in the gallery too, the first {e.ids[2]}"):
        retrieval_scores(e, both)
    with pytest.raises(InputError, match="stand in the catalog too"):
        prototype_scores(e, both)
    with pytest.raises(InputError, match="stand in the fallback too"):
        prototype_scores(e, other.where(other.labels == 9), fallback=both)
    namesakes = Embeddings(other.vectors, other.labels, e.ids, NAMES)
    assert retrieval_scores(e, namesakes).values["recall@1"].shape == (1, 8)
    assert prototype_scores(e, namesakes, draws=2).values["accuracy@1shot"].shape == (2, 8)
