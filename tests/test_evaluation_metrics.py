"""Metrics and neighbours against nested loops, with ties, k beyond the gallery, and queries that nothing matches."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from vicinal.evaluation import metrics
from vicinal.evaluation.metrics import (
    class_neighbours,
    map_at_r,
    map_at_r_legacy,
    nmi,
    r_precision,
    recall_at_k,
    retrieval_values,
    topk,
)

# ---- references: one query, Python floats


def ranked(scores: list[float]) -> list[int]:
    """Positions from the best to the worst; of equal ones the first first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def loop_recall(scores: list[float], relevant: list[bool], k: int):
    if not any(relevant):
        return math.nan
    return float(any(relevant[i] for i in ranked(scores)[:k]))


def loop_map_at_r(scores: list[float], relevant: list[bool]):
    R, hits, total = sum(relevant), 0, 0.0
    for place, i in enumerate(ranked(scores)[:R], start=1):
        if relevant[i]:
            hits += 1
            total += hits / place
    return total / R if R else math.nan


def loop_map_at_r_legacy(scores: list[float], relevant: list[bool]):
    """The released code's way: R of the whole class, the query included; its ranking without the query."""
    size = sum(relevant) + 1
    order = [relevant[i] for i in ranked(scores)][:size]
    hits = [sum(order[: i + 1]) / (i + 1) for i in range(len(order)) if order[i]]
    return sum(hits) / size if any(relevant) else math.nan


def loop_r_precision(scores: list[float], relevant: list[bool]):
    R = sum(relevant)
    return sum(relevant[i] for i in ranked(scores)[:R]) / R if R else math.nan


METRICS = {
    "recall@1": (lambda s, r: recall_at_k(s, r, 1), lambda s, r: loop_recall(s, r, 1)),
    "recall@3": (lambda s, r: recall_at_k(s, r, 3), lambda s, r: loop_recall(s, r, 3)),
    "recall@1000": (lambda s, r: recall_at_k(s, r, 1000), lambda s, r: loop_recall(s, r, 1000)),
    "map@r": (map_at_r, loop_map_at_r),
    "map@r_legacy": (map_at_r_legacy, loop_map_at_r_legacy),
    "r_precision": (r_precision, loop_r_precision),
}


@pytest.mark.parametrize("name", METRICS)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_every_metric_equals_the_loop(name: str, data: st.DataObject):
    q, G = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    steps = data.draw(st.sampled_from([2, 5, 1000]))  # few steps: many ties
    scores = [[data.draw(st.integers(-steps, steps)) / steps for _ in range(G)] for _ in range(q)]
    relevant = [[data.draw(st.booleans()) for _ in range(G)] for _ in range(q)]
    fast, loop = METRICS[name]
    found = fast(torch.tensor(scores), torch.tensor(relevant))
    expected = torch.tensor([loop(s, r) for s, r in zip(scores, relevant, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_the_table_of_metrics_is_whole():
    assert len(METRICS) == 6


def test_toy_of_the_specification():
    scores, relevant = torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[True, False, True, False]])
    assert map_at_r(scores, relevant).tolist() == [0.5]
    assert map_at_r_legacy(scores, relevant).item() == pytest.approx(0.555556, abs=1e-6)
    assert r_precision(scores, relevant).tolist() == [0.5]
    assert recall_at_k(scores, relevant, 1).tolist() == [1.0]


def test_misses_before_the_hit_lower_map_but_not_r_precision():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]])
    late = torch.tensor([[False, True, True, True]])
    assert map_at_r(scores, late).item() == pytest.approx((1 / 2 + 2 / 3) / 3)
    assert r_precision(scores, late).item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("n", [2, 5, 60, 83])
def test_a_perfect_ranking_is_one_but_not_in_the_legacy_way(n: int):
    x = torch.nn.functional.one_hot(torch.arange(4)).float().repeat_interleave(n, 0)
    y = torch.arange(4).repeat_interleave(n)
    found = retrieval_values(x, y, x, y, exclude=torch.arange(4 * n), legacy=True)
    assert (found["map@r"] == 1).all()
    torch.testing.assert_close(found["map@r_legacy"], torch.full((4 * n,), (n - 1) / n))


def test_a_masked_column_is_never_found():
    scores = torch.tensor([[-torch.inf, 0.1, 0.2]])
    relevant = torch.tensor([[False, True, False]])
    assert recall_at_k(scores, relevant, 1).item() == 0
    assert recall_at_k(scores, relevant, 2).item() == 1


def test_equal_scores_are_ranked_in_the_order_of_the_gallery():
    scores = torch.zeros(1, 100)
    first, last = torch.zeros(1, 100, dtype=torch.bool), torch.zeros(1, 100, dtype=torch.bool)
    first[0, 0], last[0, 99] = True, True
    assert recall_at_k(scores, first, 1).item() == 1
    assert recall_at_k(scores, last, 99).item() == 0


def test_nan_and_bad_k_are_refused():
    relevant = torch.tensor([[True, False]])
    for metric in (map_at_r, r_precision, lambda s, r: recall_at_k(s, r, 1)):
        with pytest.raises(ValueError, match="NaN"):
            metric(torch.tensor([[0.5, torch.nan]]), relevant)
    with pytest.raises(ValueError, match="k >= 1"):
        recall_at_k(torch.tensor([[0.5, 0.1]]), relevant, 0)


# ---- neighbours


@pytest.fixture(params=["bf16", "fp32", "all"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Each of the three ways to the same neighbours, whatever this processor would take."""
    if request.param != "all":
        monkeypatch.setattr(metrics, "PRUNE_FROM", 0)
        monkeypatch.setattr(metrics, "TILE", 256)  # several tiles, the last one partial
        monkeypatch.setattr(metrics, "_multiplies_bf16", lambda: request.param == "bf16")
    return request.param


def whole_numbers(rows: int, width: int, most: int, seed: int) -> torch.Tensor:
    """Vectors whose inner products are exact in float32, but not in bfloat16, and often equal."""
    return torch.randint(-most, most + 1, (rows, width), generator=torch.Generator().manual_seed(seed)).float()


def exact_topk(queries: torch.Tensor, gallery: torch.Tensor, k: int, exclude: torch.Tensor | None = None):
    scores = queries.double() @ gallery.double().T
    if exclude is not None:
        own = (exclude >= 0).nonzero().flatten()
        scores[own, exclude[own]] = -torch.inf
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return scores.gather(1, order).float(), order


@pytest.mark.parametrize(
    ("width", "most", "k"), [(4, 2, 1), (4, 2, 10), (8, 600, 10), (16, 300, 3), (3, 1000, 12), (1, 1, 5)]
)
def test_topk_is_exact_to_the_last_tie(way: str, width: int, most: int, k: int):
    queries, gallery = whole_numbers(70, width, most, 1), whole_numbers(1500, width, most, 2)
    scores, rows = topk(queries, gallery, k)
    expected_scores, expected_rows = exact_topk(queries, gallery, k)
    assert torch.equal(scores, expected_scores)
    assert torch.equal(rows, expected_rows)


def test_topk_leaves_out_what_it_is_told_to(way: str):
    gallery = whole_numbers(1400, 6, 40, 3)
    queries, exclude = gallery[100:200], torch.arange(100, 200)
    exclude[::3] = -1
    scores, rows = topk(queries, gallery, 9, exclude=exclude)
    expected_scores, expected_rows = exact_topk(queries, gallery, 9, exclude)
    assert torch.equal(rows, expected_rows)
    assert torch.equal(scores, expected_scores)
    assert not (rows[1::3] == exclude[1::3, None]).any()


@pytest.mark.parametrize("offset", [0.0, 5.0, 100.0, 400.0])
def test_topk_of_unit_vectors_in_a_narrow_cone(way: str, offset: float):
    """Cosines of 0.99 and more, that differ by less than bfloat16 can hold."""
    x = torch.randn(1600, 32, generator=torch.Generator().manual_seed(0))
    x[:, 0] += offset
    x = torch.nn.functional.normalize(x, dim=1)
    scores, rows = topk(x[:80], x, 8)
    expected_scores, expected_rows = exact_topk(x[:80], x, 8)
    assert torch.equal(rows, expected_rows)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=4e-7)


def test_what_float32_cannot_tell_apart_is_told_apart(way: str):
    """Each query is nearer to the second of two items by 2^-26 of its length: float32 has both equal."""
    x = torch.randn(1500, 8, generator=torch.Generator().manual_seed(4))
    x = torch.nn.functional.normalize(x, dim=1) / 2
    x[70] = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])
    x[900] = torch.tensor([1.0, 2**-13, 0, 0, 0, 0, 0, 0])
    queries = torch.tensor([[1.0, 2**-13, 0, 0, 0, 0, 0, 0], [1.0, -(2**-13), 0, 0, 0, 0, 0, 0]])
    scores, rows = topk(queries, x, 2)
    assert rows.tolist() == [[900, 70], [70, 900]]
    assert scores.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert topk(queries, x, 1)[1].tolist() == [[900], [70]]


def test_the_worst_rounding_of_the_gallery_and_the_scores(way: str):
    """All errors at their bounds, and against the best item: 1 + 2^-8 lies midway between two numbers of bfloat16."""
    up, down = 1 + 2**-8 + 2**-13, 1 + 2**-8 - 2**-13
    best = [down, up, 63.75, 2**-4]  # 0.9970 in truth; 0.9883 rounded
    second = [up, down, 63.75, 2**-8]  # 0.9964 in truth; 1.0078 rounded
    gallery = torch.zeros(1500, 4)
    gallery[1200], gallery[40] = torch.tensor(best), torch.tensor(second)
    gallery[1201], gallery[41] = -gallery[1200], -gallery[40]  # so that the mean is 0
    scores, rows = topk(torch.tensor([[1.0, -1.0, 2**-6, 2**-6]]), gallery, 1)
    assert rows.tolist() == [[1200]]
    assert scores.item() == 1 - 2**-8 + 2**-10 - 2**-12


def test_the_worst_rounding_of_a_query(way: str):
    up, down = 1 + 2**-8 + 2**-13, 1 + 2**-8 - 2**-13
    gallery = torch.zeros(1500, 3)
    gallery[1200], gallery[40] = torch.tensor([1.0, -1.0, 2**-4 + 2**-10]), torch.tensor([-1.0, 1.0, 2**-4])
    gallery[1201], gallery[41] = -gallery[1200], -gallery[40]
    assert topk(torch.tensor([[down, up, 1.0]]), gallery, 1)[1].tolist() == [[1200]]


def test_the_end_of_the_last_tile_holds_nothing(way: str, monkeypatch: pytest.MonkeyPatch):
    """All scores are negative, and what lies behind the gallery's last item is larger than any."""
    made = metrics._scores
    monkeypatch.setattr(metrics, "_scores", lambda *shape: made(*shape).fill_(1e4))
    gallery, queries = whole_numbers(1299, 4, 30, 7).abs() + 1, -whole_numbers(20, 4, 30, 8).abs() - 1
    assert torch.equal(topk(queries, gallery, 5)[1], exact_topk(queries, gallery, 5)[1])


def test_topk_where_nearly_everything_is_equal(way: str, monkeypatch: pytest.MonkeyPatch):
    """More items within the rounding error than are worth scoring again: such queries are compared with all."""
    scored = metrics._inner_products

    def few(queries: torch.Tensor, gallery: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        assert len(row) <= 2
        return scored(queries, gallery, row, column)

    monkeypatch.setattr(metrics, "_inner_products", few)
    gallery = torch.ones(12000, 4)
    gallery[700] = 2.0
    gallery[900:905] = 3.0
    scores, rows = topk(torch.ones(3, 4), gallery, 8)
    assert rows.tolist() == [[900, 901, 902, 903, 904, 700, 0, 1]] * 3
    assert scores[0].tolist() == [12.0] * 5 + [8.0] + [4.0] * 2
    _, rows = topk(torch.ones(2, 4), gallery, 7, exclude=torch.tensor([901, -1]))
    assert rows.tolist() == [[900, 902, 903, 904, 700, 0, 1], [900, 901, 902, 903, 904, 700, 0]]


@pytest.mark.parametrize("way", ["bf16", "fp32"], indirect=True)  # a matrix product may sum columns in other orders
def test_equal_vectors_have_equal_scores_wherever_they_stand(way: str):
    x = torch.nn.functional.normalize(torch.randn(1500, 48, generator=torch.Generator().manual_seed(1)), dim=1)
    x[[3, 256, 1023, 1499]] = x[777].clone()
    scores, rows = topk(x[777:778], x, 5)
    assert rows.tolist() == [[3, 256, 777, 1023, 1499]]
    assert scores.unique().numel() == 1


def test_the_block_does_not_matter(way: str):
    x = torch.randn(1300, 24, generator=torch.Generator().manual_seed(2))
    scores, rows = topk(x, x, 7)
    for block in (1, 33, 1300):
        again = topk(x[:200], x, 7, block=block)
        assert torch.equal(again[1], rows[:200])
        torch.testing.assert_close(again[0], scores[:200])


@pytest.mark.parametrize("k", [1, 4, 5, 50])
def test_topk_of_a_gallery_that_is_smaller_than_k(k: int):
    gallery = whole_numbers(5, 3, 5, 4)
    scores, rows = topk(gallery, gallery, k, exclude=torch.arange(5))
    assert rows.shape == scores.shape == (5, min(k, 5))
    assert torch.equal(rows, exact_topk(gallery, gallery, k, torch.arange(5))[1])
    if k >= 5:
        assert torch.isinf(scores[:, -1]).all()


def test_topk_of_what_an_encoder_gives_during_training(way: str):
    """Half precision, a graph behind it, and autocast around it: compared in float32 all the same."""
    x = whole_numbers(1400, 6, 100, 9).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores, rows = topk(x[:50], x, 6)
    assert torch.equal(rows, exact_topk(x[:50], x, 6)[1])
    assert not scores.requires_grad


def test_topk_of_nothing():
    assert topk(torch.zeros(0, 3), torch.zeros(4, 3), 2)[1].shape == (0, 2)
    assert topk(torch.zeros(2, 3), torch.zeros(0, 3), 2)[1].shape == (2, 0)


def test_topk_refuses_what_has_no_rank():
    with pytest.raises(ValueError, match="k >= 1"):
        topk(torch.zeros(1, 3), torch.zeros(2, 3), 0)
    for bad in (torch.nan, torch.inf):
        for side in (0, 1):
            both = [torch.zeros(2, 3), torch.zeros(2, 3)]
            both[side][1, 2] = bad
            with pytest.raises(ValueError, match="not finite"):
                topk(*both, 1)


@pytest.mark.parametrize(("offset", "most"), [(0, 16), (24, 26)])  # of random directions; of cosines about 0.9
def test_few_pairs_are_scored_again(offset: float, most: int, monkeypatch: pytest.MonkeyPatch):
    """The cut is not only safe but tight: a handful of items a query passes it, in a narrow cone too."""
    monkeypatch.setattr(metrics, "PRUNE_FROM", 0)
    seen = []
    scored = metrics._inner_products

    def counting(queries: torch.Tensor, gallery: torch.Tensor, row: torch.Tensor, column: torch.Tensor):
        seen.append(len(row) / len(queries))
        return scored(queries, gallery, row, column)

    monkeypatch.setattr(metrics, "_inner_products", counting)
    monkeypatch.setattr(metrics, "_multiplies_bf16", lambda: True)
    x = torch.randn(5000, 64, generator=torch.Generator().manual_seed(3))
    x[:, 0] += offset
    x = torch.nn.functional.normalize(x, dim=1)
    topk(x[:512], x, 10)
    assert len(seen) == 1
    assert 10 <= seen[0] < most  # under 10 a query, some were left to the slow way


class Largest(TorchDispatchMode):
    """The size in bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            # A sparse tensor holds what its values hold, and they are counted where they are made.
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("size", [3000, 12000])  # all similarities; pruned
def test_the_whole_matrix_is_never_held(size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "BLOCK_BYTES", 2**22)
    x = torch.nn.functional.normalize(torch.randn(size, 8, generator=torch.Generator().manual_seed(4)), dim=1)
    y = torch.arange(size) // 4
    with Largest() as largest:
        retrieval_values(x[:2000], y[:2000], x, y, exclude=torch.arange(2000))
    assert largest.bytes <= 2**23
    assert largest.bytes < 2000 * size * 4 / 2


# ---- embeddings to values


def clustered(sizes: list[int], width: int, noise: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    centres = torch.nn.functional.normalize(torch.randn(len(sizes), width, generator=generator), dim=1)
    spread = torch.nn.functional.normalize(torch.randn(len(labels), width, generator=generator), dim=1)
    x = torch.nn.functional.normalize(centres[labels] + noise * spread, dim=1)
    order = torch.randperm(len(labels), generator=generator)
    return x[order], labels[order]


def test_leave_one_out_equals_the_loop(way: str):
    """Classes of 1 to 40 in one set, so that blocks differ in depth."""
    x, y = clustered([1, 2, 3, 40, 5, 1, 7] + [6] * 240, 16, 1.2, 0)
    found = retrieval_values(x, y, x, y, ks=(1, 5), exclude=torch.arange(len(y)), legacy=True)
    assert list(found) == ["recall@1", "recall@5", "map@r", "r_precision", "map@r_legacy"]
    asked = [*range(0, len(y), 17), *(y == 3).nonzero().flatten().tolist(), *(y == 0).nonzero().flatten().tolist()]
    for q in asked:
        scores = (x.double() @ x[q].double()).tolist()
        others = [i for i in range(len(y)) if i != q]
        s, r = [scores[i] for i in others], [bool(y[i] == y[q]) for i in others]
        expected = {
            "recall@1": loop_recall(s, r, 1),
            "recall@5": loop_recall(s, r, 5),
            "map@r": loop_map_at_r(s, r),
            "map@r_legacy": loop_map_at_r_legacy(s, r),
            "r_precision": loop_r_precision(s, r),
        }
        for name, value in expected.items():
            assert found[name][q].item() == pytest.approx(value, nan_ok=True, rel=1e-6), (name, q)
    assert found["map@r"].isnan().sum() == 2  # the classes of one


def test_query_and_gallery_equals_the_loop():
    x, y = clustered([3, 1, 5, 8], 8, 1.0, 1)
    g, h = clustered([2, 0, 9, 4], 8, 1.0, 2)
    found = retrieval_values(x, y, g, h, ks=(1, 100))
    for q in range(len(y)):
        s, r = (g.double() @ x[q].double()).tolist(), [bool(label == y[q]) for label in h]
        assert found["recall@1"][q].item() == pytest.approx(loop_recall(s, r, 1), nan_ok=True)
        assert found["recall@100"][q].item() == pytest.approx(1.0 if any(r) else math.nan, nan_ok=True)
        assert found["map@r"][q].item() == pytest.approx(loop_map_at_r(s, r), nan_ok=True, rel=1e-6)
        assert found["r_precision"][q].item() == pytest.approx(loop_r_precision(s, r), nan_ok=True, rel=1e-6)
    assert found["map@r"].isnan().sum() == 1


def test_values_without_queries_or_matches():
    x, y = torch.eye(3), torch.arange(3)
    assert all(len(v) == 0 for v in retrieval_values(x[:0], y[:0], x, y).values())
    assert all(v.isnan().all() for v in retrieval_values(x, y, x, y, exclude=torch.arange(3)).values())
    assert all(v.isnan().all() for v in retrieval_values(x, y, x[:0], y[:0]).values())
    with pytest.raises(ValueError, match="k >= 1"):
        retrieval_values(x, y, x, y, ks=(0,))


def test_the_peers_find_the_same():
    """pytorch-metric-learning's accuracies, and faiss with ten lines of numpy, to seven digits."""
    faiss = pytest.importorskip("faiss")
    calculator = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator").AccuracyCalculator
    x, y = clustered([5] * 1000, 64, 1.3, 5)
    found = {k: v.double().mean().item() for k, v in retrieval_values(x, y, x, y, exclude=torch.arange(5000)).items()}

    peer = calculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
    ).get_accuracy(x, y)
    assert found["recall@1"] == pytest.approx(peer["precision_at_1"], abs=5e-8)
    assert found["map@r"] == pytest.approx(peer["mean_average_precision_at_r"], abs=5e-8)
    assert found["r_precision"] == pytest.approx(peer["r_precision"], abs=5e-8)

    index = faiss.IndexFlatIP(64)
    index.add(x.numpy())
    rows = torch.from_numpy(index.search(x.numpy(), 11)[1])
    for k in (1, 5, 10):
        hit = [(y[r[r != q][:k]] == y[q]).any().item() for q, r in enumerate(rows)]
        assert found[f"recall@{k}"] == pytest.approx(sum(hit) / 5000, abs=5e-8)
    assert 0.2 < found["map@r"] < 0.9


# ---- classes


def test_class_neighbours_equal_the_loop():
    x, y = clustered([3, 1, 5, 8, 2, 2], 6, 1.0, 3)
    x, y = x * torch.linspace(0.5, 3, len(x))[:, None], y * 4 + 1  # of several lengths, with gaps in the numbering
    means = []
    for label in sorted(set(y.tolist())):
        rows = [x[i].double() / x[i].double().norm() for i in range(len(y)) if y[i] == label]
        means.append(sum(rows) / len(rows))
    for c, found in enumerate(class_neighbours(x, y, 4).tolist()):
        cosines = {o: float(means[c] @ m / (means[c].norm() * m.norm())) for o, m in enumerate(means) if o != c}
        assert found == sorted(cosines, key=lambda o: -cosines[o])[:4]
    assert class_neighbours(x, y, 50).shape == (6, 5)
    assert class_neighbours(x[:1], y[:1], 3).shape == (1, 0)
    with pytest.raises(ValueError, match="k >= 1"):
        class_neighbours(x, y, 0)


@pytest.mark.parametrize("kind", ["clustered", "all in one cluster"])
def test_neighbours_of_very_many_classes_are_near(kind: str, monkeypatch: pytest.MonkeyPatch):
    x, _ = clustered([1] * 60 if kind == "clustered" else [1], 32, 1.0, 0)
    generator = torch.Generator().manual_seed(1)
    x = (x[torch.arange(3000) % len(x)] + 0.6 * torch.randn(3000, 32, generator=generator) / 32**0.5).float()
    y = torch.arange(3000)
    exact = class_neighbours(x, y, 20)
    monkeypatch.setattr(metrics, "EXACT_CLASSES", 2000)
    found = class_neighbours(x, y, 20)
    assert found.shape == (3000, 20)
    assert 0 <= found.min() <= found.max() < 3000
    assert (found != y[:, None]).all()  # never itself
    assert (found.sort(1).values.diff(dim=1) > 0).all()  # nor one twice
    unit = torch.nn.functional.normalize(x)
    cosine, best = ((unit[:, None] * unit[rows]).sum(2) for rows in (found, exact))
    assert (cosine.diff(dim=1) < 0.02).all()  # nearest first, as far as bfloat16 can tell
    if kind == "clustered":
        shared = (found[:, :, None] == exact[:, None]).any(2).float().mean()
        assert shared > 0.6  # by chance, among all: .007; among a sixteenth: .11
        assert float(cosine.mean()) > float(best.mean()) - 0.02
    assert torch.equal(found, class_neighbours(x, y, 20))
    with pytest.raises(ValueError, match="not finite"):
        class_neighbours(x.masked_fill(y[:, None] == 7, torch.nan), y, 20)


def test_the_best_of_groups_are_the_best():
    similarity = torch.randn(40, 16 * 30 + 7, generator=torch.Generator().manual_seed(0))
    for k in (1, 5, 15, 16, 60):
        assert torch.equal(metrics._best_of_groups(similarity, k), similarity.topk(k).indices)


def test_nmi_is_that_of_the_counts():
    """Clusters that are plain to see, so that k-means has one answer; the information by hand."""
    places = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    labels = torch.tensor([4, 4, 4, 9, 9, 9, 9, 5, 5, 4])
    x = torch.nn.functional.one_hot(places).float() + 0.01 * torch.arange(10)[:, None] % 3

    def entropy(values: list[object]):
        return -sum(math.log(values.count(v) / len(values)) * values.count(v) / len(values) for v in set(values))

    pairs = list(zip(places.tolist(), labels.tolist(), strict=True))
    joint, both = entropy(pairs), entropy(places.tolist()) + entropy(labels.tolist())
    found = max(nmi(x, labels, seed=seed) for seed in range(5))  # from some starts k-means joins two places
    assert found == pytest.approx(2 * (both - joint) / both, abs=1e-9)
    assert nmi(x, labels) == nmi(x, labels)
    assert nmi(x, places + 3, seed=1) <= 1.0


def test_nmi_where_rows_are_equal_or_of_one_class():
    assert nmi(torch.ones(4, 2), torch.tensor([0, 0, 1, 1])) == 0.0
    assert nmi(torch.eye(3), torch.zeros(3, dtype=torch.long)) == 1.0
