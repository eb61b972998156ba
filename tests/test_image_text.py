"""Image-text protocols against loops over all orders of ties, and the rules of who counts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from vicinal.evaluation import image_text as module
from vicinal.evaluation.image_text import Protocol, image_text, image_text_scores, zero_shot, zero_shot_scores
from vicinal.evaluation.intervals import mean, paired_difference
from vicinal.types import Embeddings, InputError

WAYS = ("image_to_text", "text_to_image")


def side(vectors: Tensor, labels: Sequence[int], *, prefix: str = "i", items: int = 6) -> Embeddings:
    ids = tuple(f"{prefix}{row}" for row in range(len(labels)))
    return Embeddings(vectors, torch.tensor(labels), ids, tuple(f"item {k}" for k in range(items)))


def shuffled(e: Embeddings, order: Tensor) -> Embeddings:
    return Embeddings(e.vectors[order], e.labels[order], tuple(e.ids[i] for i in order.tolist()), e.classes)


def coarse(seed: int, rows: int) -> Tensor:
    """Vectors of few values, so that many similarities are exactly equal."""
    return torch.randint(-1, 2, (rows, 3), generator=torch.Generator().manual_seed(seed)).float()


# ---- the loop to compare with


def expected(similarity: Sequence[float], relevant: Sequence[bool], k: int) -> dict[str, float]:
    """Recall, reciprocal rank and rank, averaged over every order of the candidates that tie with the best relevant."""
    if not any(relevant):
        return dict.fromkeys((f"recall@{k}", "mrr", "rank"), math.nan)
    best = max(s for s, r in zip(similarity, relevant, strict=True) if r)
    above = sum(s > best for s in similarity)
    tied = [r for s, r in zip(similarity, relevant, strict=True) if s == best]
    ranks = [above + order.index(True) + 1 for order in itertools.permutations(tied)]
    return {
        f"recall@{k}": sum(rank <= k for rank in ranks) / len(ranks),
        "mrr": sum(1 / rank for rank in ranks) / len(ranks),
        "rank": sum(ranks) / len(ranks),
    }


def dots(x: Tensor, y: Tensor) -> list[list[float]]:
    return [[sum(a * b for a, b in zip(row, other, strict=True)) for other in y.tolist()] for row in x.tolist()]


def loop_full(images: Embeddings, texts: Embeddings, captions: Sequence[str], k: int) -> dict[str, list[float]]:
    distinct = list(dict.fromkeys(captions))
    first = [captions.index(caption) for caption in distinct]
    items = {c: {int(i) for i, other in zip(texts.labels, captions, strict=True) if other == c} for c in distinct}
    scores = dots(images.vectors, texts.vectors[first])
    rows = [expected(scores[i], [int(images.labels[i]) in items[c] for c in distinct], k) for i in range(len(images))]
    columns = [
        expected([row[j] for row in scores], [int(label) in items[c] for label in images.labels], k)
        for j, c in enumerate(distinct)
    ]
    return both_ways(rows, columns)


def both_ways(rows: list[dict[str, float]], columns: list[dict[str, float]]) -> dict[str, list[float]]:
    found = {}
    for name in rows[0]:
        found[f"image_to_text_{name}"] = [row[name] for row in rows] + [math.nan] * len(columns)
        found[f"text_to_image_{name}"] = [math.nan] * len(rows) + [column[name] for column in columns]
    return found


def equal(values: Tensor, reference: Sequence[float]) -> None:
    torch.testing.assert_close(values, torch.tensor([reference]), equal_nan=True, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [1, 2, 20])
def test_full_equals_the_loop_with_ties_and_shared_captions(monkeypatch: pytest.MonkeyPatch, seed: int, k: int):
    monkeypatch.setattr(module, "BLOCK_BYTES", 8 * 7 * 3)  # blocks of a few queries
    images = side(coarse(seed, 7), [0, 0, 1, 2, 2, 3, 4])  # item 4 has no caption, item 5 no image
    texts = side(coarse(seed + 50, 7), [0, 1, 1, 2, 3, 5, 2], prefix="t")
    captions = ["a", "b", "a", "c", "c", "d", "e"]  # two items share "a", two "c"
    found = image_text_scores(images, texts, captions=captions, ks=(k,))
    reference = loop_full(images, texts, captions, k)
    assert {f"full/{name}" for name in reference} == set(found.values)
    for name, values in reference.items():
        equal(found.values[f"full/{name}"], values)
    assert found.units.tolist() == [0, 0, 1, 2, 2, 3, 4, 0, 1, 2, 5, 2]
    assert not found.macro
    nan = found.values["full/image_to_text_mrr"][0].isnan()
    assert nan.tolist() == [False] * 6 + [True] * 6


@pytest.mark.parametrize("seed", range(3))
def test_index_equals_the_loop(seed: int):
    images, texts = side(coarse(seed, 6), [0] * 6), side(coarse(seed + 9, 6), [0] * 6, prefix="t")
    found = image_text_scores(images, texts, captions=list("aabcad"), protocol="index", ks=(2,))
    scores = dots(images.vectors, texts.vectors)
    own = [[i == j for j in range(6)] for i in range(6)]
    rows = [expected(scores[i], own[i], 2) for i in range(6)]
    columns = [expected([row[j] for row in scores], own[j], 2) for j in range(6)]
    for name, values in both_ways(rows, columns).items():
        equal(found.values[f"index/{name}"], values)
    ceiling = [1 / 3, 1 / 3, 1, 1, 1 / 3, 1]
    equal(found.values["index/image_to_text_recall_ceiling@1"], ceiling + [math.nan] * 6)
    equal(found.values["index/text_to_image_recall_ceiling@1"], [math.nan] * 6 + ceiling)


def test_published_ranks():
    """Set 3 of the fashion system."""

    def rows(a: float, b: float, c: float) -> Tensor:
        grid = [[math.sin(a * i + b * j + c) + 0.3 * math.cos(0.9 * i * j + c) for j in range(5)] for i in range(6)]
        return normalize(torch.tensor(grid, dtype=torch.float64)).float()

    products = [0, 0, 1, 2, 2, 3]
    images, texts = side(rows(0.7, 1.3, 0.2), products), side(rows(1.1, 0.4, 0.9), products, prefix="t")
    for protocol, ranks in (("index", "212112 112221"), ("full", "112112 112121")):
        found = image_text_scores(images, texts, protocol=protocol, ks=(1, 2)).values
        for way, expected_ranks in zip(WAYS, ranks.split(), strict=True):
            values = found[f"{protocol}/{way}_rank"][0]
            assert values[~values.isnan()].tolist() == [float(rank) for rank in expected_ranks]
    metrics = image_text(images, texts, ks=(1, 2))
    assert metrics["full/image_to_text_recall@1"].value == pytest.approx(2 / 3)
    assert metrics["full/text_to_image_mrr"].value == pytest.approx(5 / 6)
    assert metrics["full/text_to_image_recall@2"].value == 1.0


def test_a_model_that_knows_all_captions_reaches_the_ceiling_of_index_and_all_of_full():
    captions = ["a", "b", "a", "c", "a", "b"]
    known = torch.eye(3)[[0, 1, 0, 2, 0, 1]]
    images, texts = side(known, list(range(6))), side(known, list(range(6)), prefix="t")
    metrics = image_text(images, texts, captions=captions, protocol="index")
    for way in WAYS:
        ceiling = metrics[f"index/{way}_recall_ceiling@1"].value
        assert ceiling == pytest.approx((3 / 3 + 2 / 2 + 1) / 6)
        assert metrics[f"index/{way}_recall@1"].value == pytest.approx(ceiling)
    by_caption = image_text(images, texts, captions=captions)
    assert by_caption["full/image_to_text_recall@1"].value == 1.0
    assert by_caption["full/text_to_image_recall@1"].value == 1.0
    assert by_caption["full/text_to_image_recall@1"].queries == 3  # each distinct text once
    assert by_caption["full/image_to_text_recall@1"].queries == 6


@pytest.mark.parametrize("protocol", ["full", "sampled100", "index"])
def test_constant_embeddings_score_as_chance_does(protocol: Protocol):
    n = 300
    constant = torch.ones(n, 4) / 2
    images, texts = side(constant, list(range(n)), items=n), side(constant, list(range(n)), prefix="t", items=n)
    found = image_text(images, texts, protocol=protocol, draws=1)
    candidates = 101 if protocol == "sampled100" else n
    for way in WAYS:
        assert found[f"{protocol}/{way}_recall@10"].value == pytest.approx(10 / candidates, rel=1e-5)
        assert found[f"{protocol}/{way}_median_rank"].value == pytest.approx((candidates + 1) / 2, rel=1e-5)
        harmonic = sum(1 / rank for rank in range(1, candidates + 1)) / candidates
        assert found[f"{protocol}/{way}_mrr"].value == pytest.approx(harmonic, rel=1e-5)
        assert found[f"{protocol}/{way}_recall@1"].queries == n


def clustered(seed: int, items: int = 40, noise: float = 1.0) -> tuple[Embeddings, Embeddings, list[str]]:
    """Three images and two captions an item, every fifth caption shared with the next item."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(items, 16, generator=g)
    seen, read = torch.arange(3 * items) // 3, torch.arange(2 * items) // 2
    captions = [f"caption {row - row % 10 if row % 5 == 0 else row}" for row in range(2 * items)]
    x = normalize(centres[seen] + noise * torch.randn(len(seen), 16, generator=g))
    text_of = {caption: torch.randn(16, generator=g) for caption in dict.fromkeys(captions)}
    y = normalize(centres[read] + noise * torch.stack([text_of[caption] for caption in captions]))
    first = {caption: row for row, caption in reversed(list(enumerate(captions)))}
    y = y[[first[caption] for caption in captions]]
    images = side(x, seen.tolist(), items=items)
    return images, side(y, read.tolist(), prefix="t", items=items), captions


@pytest.mark.parametrize("protocol", ["full", "sampled100"])
def test_neither_the_order_of_rows_nor_of_blocks_matters(protocol: Protocol, monkeypatch: pytest.MonkeyPatch):
    images, texts, captions = clustered(0)
    once = image_text(images, texts, captions=captions, protocol=protocol, most=30)
    i = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    t = torch.randperm(len(texts), generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(module, "BLOCK_BYTES", 8 * 100)
    again = image_text(
        shuffled(images, i),
        shuffled(texts, t),
        captions=[captions[row] for row in t.tolist()],
        protocol=protocol,
        most=30,
    )
    for name, estimate in once.items():
        assert again[name].value == pytest.approx(estimate.value, abs=1e-6), name
        assert again[name].queries == estimate.queries


def test_sampled_candidates_are_one_relevant_and_a_hundred_of_one_kind_that_are_not(
    monkeypatch: pytest.MonkeyPatch,
):
    images, texts, captions = clustered(1, items=150)
    kinds = [k % 2 for k in range(150)]
    taken = 0
    plain = module._candidates

    def watched(wanted: torch.Tensor, alike: torch.Tensor, generator: np.random.Generator) -> tuple[torch.Tensor, ...]:
        nonlocal taken
        good, bad, there = plain(wanted, alike, generator)
        assert wanted.gather(1, good[:, None]).all()
        assert there.all()
        assert bad.shape == (len(wanted), 100)
        assert not wanted.gather(1, bad).any()
        assert alike.gather(1, bad).all()  # there are more of each kind
        assert all(len(set(row)) == 100 for row in bad.tolist())
        taken += len(wanted)
        return good, bad, there

    monkeypatch.setattr(module, "_candidates", watched)
    monkeypatch.setattr(module, "BLOCK_BYTES", 8 * 101 * 8 * 7)  # several blocks
    found = image_text_scores(images, texts, captions=captions, protocol="sampled100", kinds=kinds, most=20, draws=3)
    assert taken == 2 * 3 * 20
    assert found.values["sampled100/image_to_text_rank"].shape == (3, 450 + len(set(captions)))
    counted = (~found.values["sampled100/image_to_text_rank"].isnan()).sum(1)
    assert counted.tolist() == [20, 20, 20]
    rank = found.values["sampled100/image_to_text_rank"]
    assert float(rank[~rank.isnan()].max()) <= 101
    monkeypatch.undo()
    whole = image_text_scores(images, texts, captions=captions, protocol="sampled100", kinds=kinds, most=20, draws=3)
    for name, values in found.values.items():
        assert torch.equal(values.nan_to_num(-1), whole.values[name].nan_to_num(-1)), "blocks make no difference"


def test_sampled_is_full_where_there_are_no_more_than_a_hundred_others():
    images, texts, _ = clustered(2, items=20)
    one = side(texts.vectors[::2], list(range(20)), prefix="t", items=20)
    photos = shuffled(images, torch.arange(0, 60, 3))
    full = image_text(photos, one)
    sampled = image_text(photos, one, protocol="sampled100", draws=2)
    for name, estimate in full.items():
        assert sampled[name.replace("full/", "sampled100/")].value == pytest.approx(estimate.value)


def test_two_models_are_compared_query_by_query_on_the_same_draws():
    images, texts, captions = clustered(3, noise=1.5)
    better = clustered(3, noise=0.5)
    for protocol in ("full", "sampled100"):
        before = image_text_scores(images, texts, captions=captions, protocol=protocol, most=50)
        after = image_text_scores(better[0], better[1], captions=captions, protocol=protocol, most=50)
        for name in before.values:
            assert torch.equal(before.values[name].isnan(), after.values[name].isnan())
        gain = paired_difference(before, after)[f"{protocol}/text_to_image_recall@1"]
        assert gain.value > 0
        assert gain.excludes_zero
        assert gain.n == 40


def test_median_rank_is_numpys_and_its_interval_holds_it():
    images, texts, captions = clustered(4, noise=2.0)
    scores = image_text_scores(images, texts, captions=captions)
    metrics = image_text(images, texts, captions=captions)
    assert list(metrics)[:5] == [
        f"full/image_to_text_{n}" for n in ("recall@1", "recall@5", "recall@10", "mrr", "median_rank")
    ]
    for way in WAYS:
        ranks = scores.values[f"full/{way}_rank"]
        median = metrics[f"full/{way}_median_rank"]
        assert median.value == pytest.approx(float(np.nanmedian(ranks.numpy())))
        assert median.low <= median.value <= median.high
        assert median.low < median.high
        assert median.n == mean(scores)[f"full/{way}_rank"].n
    # the same resamples, done by hand
    units = scores.units.numpy()
    table = scores.values["full/image_to_text_rank"][0].double().numpy()
    there = ~np.isnan(table)
    generator = np.random.default_rng(np.random.SeedSequence(5))
    medians = []
    for _ in range(2000):
        times = np.bincount(generator.integers(40, size=40), minlength=40)[units[there]]
        medians.append(np.median(np.repeat(table[there], times)))
    low, high = np.percentile(medians, [2.5, 97.5])
    assert metrics["full/image_to_text_median_rank"].low == pytest.approx(low, abs=1.0)
    assert metrics["full/image_to_text_median_rank"].high == pytest.approx(high, abs=1.0)


# ---- zero-shot


def test_zero_shot_is_the_share_of_each_class_averaged_over_classes():
    vectors = normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    classes = normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    labels = (torch.arange(50) ** 2 % 5).tolist()
    images = side(vectors, labels)
    right = [
        max(range(6), key=row.__getitem__) == label for row, label in zip(dots(vectors, classes), labels, strict=True)
    ]
    scores = zero_shot_scores(images, classes)
    assert scores.values["accuracy@0shot"].tolist() == [[float(r) for r in right]]
    assert scores.macro
    present = sorted(set(labels))
    shares = [np.mean([r for r, y in zip(right, labels, strict=True) if y == c]) for c in present]
    assert zero_shot(images, classes)["accuracy@0shot"].value == pytest.approx(float(np.mean(shares)))


def test_classes_of_one_name_share_their_images():
    images = side(torch.eye(3), [0, 1, 2], items=3)
    scores = zero_shot_scores(images, torch.eye(3)[[0, 0, 2]])
    # The second image is as near to all three: none of them is like it.
    torch.testing.assert_close(scores.values["accuracy@0shot"], torch.tensor([[1 / 2, 1 / 3, 1.0]]))


# ---- what cannot be used


def wrong() -> dict[str, tuple[dict[str, Any], str]]:
    images, texts = side(torch.eye(3), [0, 1, 2]), side(torch.eye(3), [0, 1, 2], prefix="t")
    few = side(torch.eye(3)[:2], [0, 1], prefix="t")
    return {
        "protocol": ({"protocol": "fully"}, "protocol"),
        "ks": ({"ks": (0,)}, "ks"),
        "draws": ({"draws": 0}, "draws"),
        "captions": ({"captions": ["a"]}, "captions"),
        "kinds": ({"protocol": "sampled100", "kinds": [1]}, "kinds"),
        "not as many": ({"texts": few, "protocol": "index"}, "index"),
        "another width": ({"texts": side(torch.eye(4)[:3], [0, 1, 2], prefix="t")}, "numbers"),
        "other items": ({"texts": side(torch.eye(3), [0, 1, 2], prefix="t", items=5)}, "items"),
        "not finite": ({"images": side(torch.eye(3) * torch.nan, [0, 1, 2])}, "i0"),
        "no label": ({"texts": side(torch.eye(3), [0, -1, 2], prefix="t")}, "t1"),
        "no texts": ({"texts": texts.where(texts.labels > 9)}, "texts"),
        "": ({"images": images, "texts": texts}, ""),
    }


@pytest.mark.parametrize("name", sorted(set(wrong()) - {""}))
def test_bad_input_is_named(name: str):
    change, word = wrong()[name]
    arguments: dict[str, Any] = {**wrong()[""][0], **change}
    images, texts = arguments.pop("images"), arguments.pop("texts")
    with pytest.raises((InputError, TypeError), match=word):  # a TypeError where types are checked at run time
        image_text_scores(images, texts, **arguments)


def test_class_vectors_of_another_shape_are_refused():
    with pytest.raises(InputError, match="6 classes"):
        zero_shot_scores(side(torch.eye(3), [0, 1, 2]), torch.eye(3))
    with pytest.raises(InputError, match="not finite"):
        zero_shot_scores(side(torch.eye(3), [0, 1, 2], items=3), torch.full((3, 3), torch.nan))


def test_too_few_of_a_kind_are_filled_up_from_the_others():
    """The others are far from every image here, so that a rank tells how many of its kind were taken."""
    items = 150
    kinds = [0] * 10 + [1] * (items - 10)
    near, far = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])
    images = side(near.repeat(items, 1), list(range(items)), items=items)
    vectors = torch.stack([2 * near if kind == 0 else far for kind in kinds])
    vectors[0] = near
    texts = side(vectors, list(range(items)), prefix="t", items=items)
    found = image_text_scores(images, texts, protocol="sampled100", kinds=kinds, most=items, draws=2)
    assert found.values["sampled100/image_to_text_rank"][:, 0].tolist() == [10.0, 10.0]  # the 9 others of its kind
