"""Overlap of paired and unpaired images, its change, proxy-A, and the controls: against loops and closed forms."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from tiny_encoders import images, timm
from vicinal.evaluation.overlap import (
    Overlap,
    overlap,
    overlap_change,
    overlap_coefficient,
    overlap_plot,
    proxy_a_distance,
)
from vicinal.heads import Whitening
from vicinal.models.adapters import adapt
from vicinal.models.controls import moved, random_bottleneck
from vicinal.models.methods import Bottleneck
from vicinal.types import Embeddings, InputError

C = 6


def some(spread: float, *, seed: int = 0, each: tuple[int, ...] = (5, 4, 3, 2, 2, 1), dim: int = 8) -> Embeddings:
    """Classes of several sizes about centres of their own."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(each)), torch.tensor(each))
    centres = torch.randn(len(each), dim, generator=generator)
    vectors = centres[labels] + spread * torch.randn(len(labels), dim, generator=generator)
    ids = tuple(str(i) for i in range(len(labels)))
    return Embeddings(normalize(vectors, dim=1), labels, ids, tuple(f"class {i}" for i in range(len(each))))


# ------------------------------------------------------------------------------------------------------ the coefficient


def test_the_same_apart_and_two_gaussians():
    rng = np.random.default_rng(0)
    one = rng.normal(size=200_000)
    assert overlap_coefficient(one, one) == pytest.approx(1)
    assert overlap_coefficient(one, one + 50) == 0
    for gap in (0.5, 1.0, 2.0):
        expected = math.erfc(gap / 2 / math.sqrt(2))  # 2 Phi(-gap / 2)
        assert overlap_coefficient(one, rng.normal(size=200_000) + gap) == pytest.approx(expected, abs=0.01)
    with pytest.raises(ValueError, match="empty"):
        overlap_coefficient(one, [])


# --------------------------------------------------------------------------------------------------- of a set of images


def by_hand(e: Embeddings) -> dict[str, float]:
    """Loops over pairs; every class counts once."""
    cosine = (e.vectors.double() @ e.vectors.double().T).numpy()
    labels = e.labels.tolist()
    paired, unpaired = {}, {}
    for i, a in enumerate(labels):
        for j, b in enumerate(labels):
            if i != j:
                (paired if a == b else unpaired).setdefault(a, []).append(cosine[i, j])
    sides = []
    for side in (paired, unpaired):
        values = np.concatenate([side[u] for u in side])
        weights = np.concatenate([np.full(len(side[u]), 1 / len(side[u]) / len(side)) for u in side])
        sides.append((values, weights))
    (p, wp), (q, wq) = sides
    edges = np.histogram_bin_edges(np.concatenate([p, q]), 200)
    shares = [np.histogram(v, edges, weights=w)[0] for v, w in sides]
    auroc = sum(a * float(wq[q < x].sum() + wq[q == x].sum() / 2) for x, a in zip(p, wp, strict=True))
    means = [(v * w).sum() for v, w in sides]
    variances = [(w * v**2).sum() - m**2 for (v, w), m in zip(sides, means, strict=True)]
    x = e.vectors.double()
    return {
        "overlap": float(np.minimum(*shares).sum()),
        "auroc": auroc,
        "d_prime": (means[0] - means[1]) / math.sqrt(sum(variances) / 2),
        "paired_mean": means[0],
        "unpaired_mean": means[1],
        "variance": float((x - x.mean(0)).square().sum(1).mean()),
    }


@pytest.mark.parametrize("spread", [0.2, 0.6, 1.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_loop(spread: float, seed: int):
    e = some(spread, seed=seed)
    found, expected = overlap(e, resamples=10), by_hand(e)
    assert set(found) == set(expected)
    for name, value in expected.items():
        # the histogram's edges fall between bins of .001, and one pair in a few hundred may be on the other side
        tolerance = 0.06 if name == "overlap" else 0.003
        assert found[name].value == pytest.approx(value, abs=tolerance), name
        assert found[name].n == C
        assert found[name].queries == 17


def test_of_many_pairs_the_overlap_is_that_of_its_histograms():
    e = some(0.8, each=(40,) * 10, dim=16)
    assert overlap(e, resamples=2)["overlap"].value == pytest.approx(by_hand(e)["overlap"], abs=0.01)
    assert overlap(some(0.01, each=(9,) * 5), resamples=2)["overlap"].value == 0


def test_an_interval_holds_what_other_classes_would_have_given():
    e = some(0.8, each=(12,) * 30, dim=16)
    found = overlap(e, resamples=300)
    for name in ("overlap", "auroc", "d_prime", "variance"):
        assert found[name].low <= found[name].value <= found[name].high or name == "variance"
        assert 0 < found[name].high - found[name].low < 0.5 * max(1, abs(found[name].value))
    assert overlap(e, resamples=300) == found, "seeded"


def test_a_change_is_paired():
    one, other = some(0.9, each=(8,) * 12), some(0.3, each=(8,) * 12)
    change = overlap_change(one, other, resamples=200)
    for name in change:
        assert change[name].value == pytest.approx(
            overlap(other, resamples=2)[name].value - overlap(one, resamples=2)[name].value
        )
    assert change["overlap"].high < 0 < change["auroc"].low
    none = overlap_change(one, one, resamples=50)
    assert all(e.value == e.low == e.high == 0 for e in none.values())
    with pytest.raises(InputError, match="same images"):
        overlap_change(one, other.where(other.labels > 0))


def test_many_images_are_drawn_alike_from_the_classes():
    e = some(0.8, each=(50, 50, 3, 2))
    counts = Overlap.of(e, most=25).counts
    assert counts.tolist() == [10, 10, 3, 2]
    assert torch.equal(torch.tensor(Overlap.of(e, most=25).sums), torch.tensor(Overlap.of(e, most=25).sums))
    with pytest.raises(InputError, match="two images of one class"):
        overlap(some(0.5, each=(1, 1, 1)))


def test_classes_of_one_image_have_no_pair_and_still_count_as_others():
    e = some(0.8, each=(6, 6, 1))
    without = overlap(e.where(e.labels < 2), resamples=2)
    assert overlap(e, resamples=2)["paired_mean"].value == pytest.approx(without["paired_mean"].value)
    assert overlap(e, resamples=2)["unpaired_mean"].value != pytest.approx(without["unpaired_mean"].value)


def test_a_plot_is_written(tmp_path: Path):
    sides = {"photos": [some(0.9, each=(8,) * 6), some(0.3, each=(8,) * 6)]}
    overlap_plot(sides, ["before", "after"], tmp_path / "overlap.png")
    with Image.open(tmp_path / "overlap.png") as picture:
        assert picture.size[0] > picture.size[1] > 100


# -------------------------------------------------------------------------------------------------------------- proxy-A


def shifted(by: float, seed: int) -> Embeddings:
    e = some(1.0, each=(6,) * 20, seed=seed)
    vectors = e.vectors.clone()
    vectors[:, 0] += by
    return Embeddings(normalize(vectors, dim=1), e.labels, e.ids, e.classes)


def test_proxy_a_grows_with_the_distance():
    found = [proxy_a_distance(shifted(0.0, 0), shifted(by, 1), resamples=200) for by in (0.0, 0.6, 4.0)]
    assert found[0].value < 0.6 < found[1].value < found[2].value
    assert found[2].value == 2.0
    assert all(0 <= f.low <= f.value <= f.high <= 2 for f in found)
    assert found[0].n == 20, "half of the classes of both sides are asked about"
    with pytest.raises(InputError, match="one width"):
        proxy_a_distance(shifted(0, 0), some(1.0, dim=9))
    with pytest.raises(InputError, match="four classes"):
        proxy_a_distance(shifted(0, 0), some(1.0, each=(5, 5)))


# ------------------------------------------------------------------------------------------------------------- controls


def test_whitening_makes_directions_alike():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(800, 5)) * [3, 1, 1, 0.3, 0.1] + [0, 0, 0, 0, 4]
    white = Whitening(shrinkage=0.0).fit(x)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    plain = (unit - unit.mean(0)) @ white.matrix_
    assert np.allclose(plain.T @ plain / len(x), np.eye(5), atol=1e-8)
    assert np.allclose(white.matrix_, white.matrix_.T), "ZCA is symmetric"
    z = white.transform(x)
    assert np.allclose(np.linalg.norm(z, axis=1), 1)
    assert np.allclose(z, plain / np.linalg.norm(plain, axis=1, keepdims=True))
    assert np.allclose(Whitening(shrinkage=0.0).fit(7 * x).transform(2 * x), z), "lengths do not matter"
    level = np.trace(np.cov(unit.T, bias=True)) / 5
    assert np.allclose(Whitening(shrinkage=1.0).fit(x).matrix_, np.eye(5) / math.sqrt(level))
    assert Whitening().fit(x.astype(np.float32)).transform(x.astype(np.float32)).dtype == np.float32
    with pytest.raises(InputError, match="raise shrinkage"):
        Whitening(shrinkage=0.0).fit(rng.normal(size=(3, 5)))
    with pytest.raises(InputError, match="from 0 to 1"):
        Whitening(shrinkage=2.0).fit(x)


@pytest.mark.parametrize("distance", [0.01, 0.2])
def test_a_random_bottleneck_moves_as_far_as_is_asked(tmp_path: Path, distance: float):
    original, method = timm(tmp_path), Bottleneck(dim=4)
    control = random_bottleneck(original, method, images(4), distance=distance, seed=1)
    assert moved(control, original, images(4)) == pytest.approx(distance, rel=0.011)
    assert not any(p.requires_grad for p in control.parameters())
    again = random_bottleneck(original, method, images(4), distance=distance, seed=1)
    other = random_bottleneck(original, method, images(4), distance=distance, seed=2)
    assert torch.equal(control.encode_image(images(1)), again.encode_image(images(1)))
    assert not torch.equal(control.encode_image(images(1)), other.encode_image(images(1)))
    assert moved(adapt(original, method).eval(), original, images(4)) == pytest.approx(0, abs=1e-6)
    with pytest.raises(InputError, match="ask for less"):
        random_bottleneck(original, method, images(4), distance=2.1)  # a cosine is never below -1
