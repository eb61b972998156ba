"""Every loss of the tables against a loop in plain Python, and the contract that all of them keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from vicinal.losses import (
    PAIR_LOSSES,
    PROXY_LOSSES,
    ArcFace,
    CosFace,
    EasyArcFace,
    NTXent,
    Retention,
    SubCenterArcFace,
    SupCon,
    Triplet,
    WeightedSum,
    start_from_class_means,
)
from vicinal.losses import classes as class_sums
from vicinal.losses.pair import CrossBatchMemory, MultiSimilarity, mean_similarities
from vicinal.losses.proxy import ProxyAnchor, ProxyNCA

CLASS_LOSSES: dict[str, Callable[..., nn.Module]] = {
    **PROXY_LOSSES,
    "proxy_anchor": ProxyAnchor,
    "proxy_nca": ProxyNCA,
}
PAIRS: dict[str, Callable[..., nn.Module]] = {**PAIR_LOSSES, "multi_similarity": MultiSimilarity}
Vectors = Sequence[Sequence[float]]
B, D, C = 14, 6, 4


# ------------------------------------------------------------------------------------------- the loops to compare with


def cosine(x: Sequence[float], y: Sequence[float]) -> float:
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / (math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y)))


def softmax_loss(x: Vectors, y: Sequence[int], cosines: list[list[float]], target: Callable[[float], float], s: float):
    total = 0.0
    for i in range(len(x)):
        logits = [s * (target(c) if j == y[i] else c) for j, c in enumerate(cosines[i])]
        total += math.log(sum(math.exp(v - logits[y[i]]) for v in logits))
    return total / len(x)


def arc(m: float) -> Callable[[float], float]:
    def target(c: float) -> float:
        theta = math.acos(max(-1.0, min(1.0, c)))
        return math.cos(theta + m) if theta < math.pi - m else c - m * math.sin(m)

    return target


def easy_arc(m: float) -> Callable[[float], float]:
    return lambda c: math.cos(math.acos(min(1.0, c)) + m) if c > 0 else c


def loop_arcface(loss: nn.Module, x: Vectors, y: Sequence[int], groups: Sequence[int] | None) -> float:
    cosines = [[cosine(a, w) for w in loss.weight.tolist()] for a in x]
    return softmax_loss(x, y, cosines, arc(loss.margin), loss.scale)


def loop_easy_arcface(loss: nn.Module, x: Vectors, y: Sequence[int], groups: Sequence[int] | None) -> float:
    cosines = [[cosine(a, w) for w in loss.weight.tolist()] for a in x]
    return softmax_loss(x, y, cosines, easy_arc(loss.margin), loss.scale)


def loop_subcenter(loss: nn.Module, x: Vectors, y: Sequence[int], groups: Sequence[int] | None) -> float:
    cosines = [[max(cosine(a, w) for w in centres) for centres in loss.weight.tolist()] for a in x]
    return softmax_loss(x, y, cosines, arc(loss.margin), loss.scale)


def loop_cosface(loss: nn.Module, x: Vectors, y: Sequence[int], groups: Sequence[int] | None) -> float:
    cosines = [[cosine(a, w) for w in loss.weight.tolist()] for a in x]
    return softmax_loss(x, y, cosines, lambda c: c - loss.margin, loss.scale)


def loop_proxy_anchor(loss: nn.Module, x: Vectors, y: Sequence[int], groups: Sequence[int] | None) -> float:
    proxies = loss.weight.tolist()
    pull, push = [], []
    for j, proxy in enumerate(proxies):
        own = [math.exp(-loss.alpha * (cosine(a, proxy) - loss.margin)) for a, c in zip(x, y, strict=True) if c == j]
        others = [math.exp(loss.alpha * (cosine(a, proxy) + loss.margin)) for a, c in zip(x, y, strict=True) if c != j]
        if own:
            pull.append(math.log(1 + sum(own)))
        push.append(math.log(1 + sum(others)))
    return average(pull) + average(push)


def loop_proxy_nca(loss: nn.Module, x: Vectors, y: Sequence[int], groups: Sequence[int] | None) -> float:
    terms = []
    for a, c in zip(x, y, strict=True):
        near = []
        for proxy in loss.weight.tolist():
            long_a, long_p = math.hypot(*a), math.hypot(*proxy)
            squared = sum((u / long_a - v / long_p) ** 2 for u, v in zip(a, proxy, strict=True))
            near.append(math.exp(-squared / loss.temperature))
        terms.append(-math.log(near[c] / sum(near)))
    return average(terms)


def relations(y: Sequence[int], groups: Sequence[int] | None) -> list[tuple[list[int], list[int]]]:
    found = []
    for i in range(len(y)):
        positives = [j for j in range(len(y)) if j != i and y[j] == y[i]]
        negatives = [j for j in range(len(y)) if y[j] != y[i] and (groups is None or groups[j] != groups[i])]
        found.append((positives, negatives))
    return found


def average(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def loop_ntxent(loss: nn.Module, x: Vectors, y: Sequence[int], groups: Sequence[int] | None) -> float:
    terms = []
    for i, (positives, negatives) in enumerate(relations(y, groups)):
        below = sum(math.exp(cosine(x[i], x[n]) / loss.temperature) for n in negatives)
        for p in positives:
            above = math.exp(cosine(x[i], x[p]) / loss.temperature)
            terms.append(-math.log(above / (above + below)))
    return average(terms)


def loop_supcon(loss: nn.Module, x: Vectors, y: Sequence[int], groups: Sequence[int] | None) -> float:
    terms = []
    for i, (positives, negatives) in enumerate(relations(y, groups)):
        if positives:
            below = sum(math.exp(cosine(x[i], x[a]) / loss.temperature) for a in positives + negatives)
            logs = [math.log(math.exp(cosine(x[i], x[p]) / loss.temperature) / below) for p in positives]
            terms.append(-average(logs))
    return average(terms)


def loop_triplet(loss: nn.Module, x: Vectors, y: Sequence[int], groups: Sequence[int] | None) -> float:
    terms = []
    for i, (positives, negatives) in enumerate(relations(y, groups)):
        distance = [1 - cosine(x[i], other) for other in x]
        if loss.mining == "batch_hard" and positives and negatives:
            hardest = max(distance[p] for p in positives) - min(distance[n] for n in negatives)
            terms.append(max(0.0, hardest + loss.margin))
        for p in positives:
            if loss.mining == "semi_hard":
                farther = [distance[n] for n in negatives if distance[n] > distance[p]]
                if farther:
                    terms.append(max(0.0, distance[p] - min(farther) + loss.margin))
            if loss.mining == "all":
                terms += [h for n in negatives if (h := distance[p] - distance[n] + loss.margin) > 0]
    return average(terms)


def loop_multi_similarity(loss: nn.Module, x: Vectors, y: Sequence[int], groups: Sequence[int] | None) -> float:
    terms = []
    for i, (positives, negatives) in enumerate(relations(y, groups)):
        near = {j: cosine(x[i], x[j]) for j in positives + negatives}
        kept, left = positives, negatives
        if loss.epsilon is not None:
            kept = [p for p in positives if any(near[p] - loss.epsilon < near[n] for n in negatives)]
            left = [n for n in negatives if any(near[n] + loss.epsilon > near[p] for p in positives)]
        if positives:
            pull = math.log(1 + sum(math.exp(-loss.alpha * (near[p] - loss.base)) for p in kept)) / loss.alpha
            push = math.log(1 + sum(math.exp(loss.beta * (near[n] - loss.base)) for n in left)) / loss.beta
            terms.append(pull + push)
    return average(terms)


LOOPS: dict[str, Callable[[nn.Module, Vectors, Sequence[int], Sequence[int] | None], float]] = {
    "arcface": loop_arcface,
    "easy_arcface": loop_easy_arcface,
    "subcenter_arcface": loop_subcenter,
    "cosface": loop_cosface,
    "proxy_anchor": loop_proxy_anchor,
    "proxy_nca": loop_proxy_nca,
    "ntxent": loop_ntxent,
    "supcon": loop_supcon,
    "triplet": loop_triplet,
    "multi_similarity": loop_multi_similarity,
}
# Settings beside the defaults; a soft scale too, at which every term of a sum weighs.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "arcface": [{}, {"margin": 0.3, "scale": 4.0}, {"margin": 2.0, "scale": 2.0}, {"margin": 0.0}],
    "easy_arcface": [{}, {"margin": 0.3, "scale": 4.0}],
    "subcenter_arcface": [{}, {"subcenters": 1}, {"subcenters": 2, "margin": 0.3, "scale": 4.0}],
    "cosface": [{}, {"margin": 0.2, "scale": 4.0}],
    "proxy_anchor": [{}, {"margin": 0.3, "alpha": 4.0}],
    "proxy_nca": [{}, {"temperature": 1.0}],
    "ntxent": [{}, {"temperature": 0.5}],
    "supcon": [{}, {"temperature": 0.5}],
    "triplet": [{}, {"mining": "semi_hard"}, {"mining": "all"}, {"mining": "all", "margin": 1.5}],
    "multi_similarity": [{}, {"epsilon": None}, {"alpha": 4.0, "beta": 6.0, "base": 0.2, "epsilon": 0.02}],
}
CASES = [
    (name, settings, way)
    for name, variants in VARIANTS.items()
    for settings in variants
    for way in (("whole", "tiles") if name in CLASS_LOSSES else ("whole",))
]
every_loss = pytest.mark.parametrize(
    ("name", "settings", "way"), CASES, ids=[f"{n}-{s}-{w}" for n, s, w in CASES], indirect=["way"]
)


@pytest.fixture(autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Whether class losses take their few classes in tiles, as if they were thousands."""
    way = getattr(request, "param", "whole")
    if way == "tiles":
        monkeypatch.setattr(class_sums, "TILED_FROM", 0)
        monkeypatch.setattr(class_sums, "TILE_CPU", 3)  # of four classes; a class of three vectors alone
    return way


def build(name: str, settings: dict[str, Any], *, dim: int = D, classes: int = C) -> nn.Module:
    if name in CLASS_LOSSES:
        return CLASS_LOSSES[name](dim, classes, **settings)
    return PAIRS[name](**settings)


def some(seed: int, batch: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of float64 near four centres, labels of four classes, and two groups that join classes."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(C, (batch,), generator=g)
    centres = torch.randn(C, D, generator=g, dtype=torch.float64)
    vectors = centres[labels] + 1.2 * torch.randn(batch, D, generator=g, dtype=torch.float64)
    return vectors, labels, labels // 2


# --------------------------------------------------------------------------------------------------------- the contract


def test_every_loss_of_the_tables_is_tested():
    assert set(LOOPS) == set(VARIANTS) == set(CLASS_LOSSES) | set(PAIRS)
    assert len(CLASS_LOSSES) == 6
    assert len(PAIRS) == 4
    assert len(CASES) == 41


@every_loss
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_the_loop(name: str, settings: dict[str, Any], seed: int):
    vectors, labels, _ = some(seed)
    loss = build(name, settings).double()
    expected = LOOPS[name](loss, vectors.tolist(), labels.tolist(), None)
    assert loss(vectors, labels).item() == pytest.approx(expected, abs=1e-9)
    single = build(name, settings)
    single.load_state_dict(loss.state_dict())
    assert single(vectors.float(), labels).item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("settings", VARIANTS["triplet"] + [{"mining": "all", "margin": 1.0}], ids=str)
def test_ties_of_distances_are_as_in_the_loop(settings: dict[str, Any]):
    """Positives and negatives at exactly one distance, and hinges of exactly zero."""
    axes = torch.eye(D, dtype=torch.float64)
    vectors = axes[[0, 1, 1, 1, 0, 2, 3, 2]]
    labels = torch.tensor([0, 0, 1, 1, 0, 1, 2, 2])
    loss = build("triplet", settings)
    expected = loop_triplet(loss, vectors.tolist(), labels.tolist(), None)
    assert loss(vectors, labels).item() == pytest.approx(expected, abs=1e-12)


@every_loss
def test_gradient_is_that_of_finite_differences(name: str, settings: dict[str, Any]):
    vectors, labels, _ = some(3, batch=8)
    loss = build(name, settings).double()
    weights = [p.detach().clone().requires_grad_() for p in loss.parameters()]

    def value(x: Tensor, *w: Tensor) -> Tensor:
        return torch.func.functional_call(
            loss, dict(zip([n for n, _ in loss.named_parameters()], w, strict=True)), (x, labels)
        )

    assert value(vectors, *weights).item() > 1e-3  # a loss of zero would prove nothing
    assert torch.autograd.gradcheck(value, (vectors.requires_grad_(), *weights), atol=1e-5)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_items_of_one_group_are_never_negatives(name: str):
    for settings in VARIANTS[name]:
        loss = build(name, settings)
        changed = 0
        for seed in range(4):
            vectors, labels, groups = some(seed)
            expected = LOOPS[name](loss, vectors.tolist(), labels.tolist(), groups.tolist())
            assert loss(vectors, labels, groups=groups).item() == pytest.approx(expected, abs=1e-9)
            changed += loss(vectors, labels).item() != pytest.approx(expected, abs=1e-6)
        assert changed >= 2


@pytest.mark.parametrize("name", sorted(CLASS_LOSSES))
def test_class_losses_refuse_groups(name: str):
    vectors, labels, groups = some(4)
    with pytest.raises(ValueError, match="groups"):
        build(name, {})(vectors.float(), labels, groups=groups)


@every_loss
def test_batch_order_and_length_of_vectors_do_not_matter(name: str, settings: dict[str, Any]):
    vectors, labels, _ = some(5)
    loss = build(name, settings).double()
    order = torch.randperm(B, generator=torch.Generator().manual_seed(0))
    value = loss(vectors, labels).item()
    assert loss(vectors[order], labels[order]).item() == pytest.approx(value, abs=1e-12)
    assert loss(vectors * torch.linspace(0.1, 50, B)[:, None], labels).item() == pytest.approx(value, abs=1e-12)


def edges() -> dict[str, tuple[Tensor, Tensor]]:
    e = torch.eye(D)
    return {
        "on its class weight": (e[[0, 1, 2, 3]], torch.tensor([0, 1, 2, 3])),
        "opposite its class weight": (-e[[0, 1, 2, 3]], torch.tensor([0, 1, 2, 3])),
        "equal and opposite pairs": (torch.stack([e[0], e[0], -e[0], -e[0]]), torch.tensor([0, 0, 0, 1])),
        "all equal": (e[[0]].repeat(6, 1), torch.tensor([0, 0, 1, 1, 2, 2])),
        "one class": (torch.randn(5, D, generator=torch.Generator().manual_seed(0)), torch.full((5,), 2)),
        "no positive": (torch.randn(4, D, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])),
        "one item": (e[[1]], torch.tensor([1])),
        "a vector of zeros": (torch.stack([e[0], 0 * e[0], e[1], e[2]]), torch.tensor([0, 0, 1, 1])),
    }


@every_loss
@pytest.mark.parametrize("edge", sorted(edges()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_finite_at_the_edges(name: str, settings: dict[str, Any], edge: str, dtype: torch.dtype):
    vectors, labels = edges()[edge]
    vectors = vectors.to(dtype).requires_grad_()
    loss = build(name, settings)
    for weight in loss.parameters():
        weight.data.zero_()
        weight.data[..., :C, :].view(C, -1, D)[:] = torch.eye(C, D)[:, None]
    value = loss(vectors, labels)
    value.backward()
    assert value.dtype == torch.float32
    assert value.isfinite()
    for leaf in (vectors, *loss.parameters()):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_without_a_positive_the_loss_is_zero(name: str):
    vectors, labels = edges()["no positive"]
    for settings in VARIANTS[name]:
        assert build(name, settings)(vectors, labels).item() == 0.0


@pytest.mark.parametrize("way", ["whole", "tiles"], indirect=True)
@pytest.mark.parametrize("name", sorted(set(CLASS_LOSSES) - {"proxy_anchor"}))  # which still pulls to the proxy
def test_a_softmax_of_one_class_is_zero(name: str, way: str):
    vectors, _, _ = some(0)
    value = build(name, {}, classes=1)(vectors.float(), torch.zeros(B, dtype=torch.long))
    assert value.item() == pytest.approx(0.0, abs=1e-6)


@every_loss
def test_autocast_does_not_round_weights_or_logits(name: str, settings: dict[str, Any], way: str):
    """But for the products with other classes' weights where these are in tiles."""
    vectors, labels, _ = some(6)
    loss = build(name, settings)
    outside = loss(vectors.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = torch.nn.functional.linear(vectors.float(), vectors.float())
        inside = loss(vectors.float(), labels)
    assert rounded.dtype == torch.bfloat16  # autocast was on
    assert inside.dtype == torch.float32
    if way == "tiles":
        assert inside.item() == pytest.approx(outside.item(), rel=0.03, abs=0.01)
        assert inside.item() != outside.item()
    else:
        assert inside.item() == pytest.approx(outside.item(), rel=1e-6, abs=1e-7)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


@every_loss
def test_nothing_grows_with_the_cube_of_the_batch(name: str, settings: dict[str, Any]):
    batch, dim = 96, 16
    vectors = torch.randn(batch, dim, requires_grad=True)
    loss = build(name, settings, dim=dim)
    with Largest() as largest:
        loss(vectors, torch.arange(batch) % C).backward()
    assert batch < largest.numel <= batch * (batch + 1)


# ------------------------------------------------------------------------------------------------------- golden values


@pytest.mark.parametrize(
    ("cos", "hard", "easy"),
    [
        (0.8, 26.52229, 26.52229),
        (0.0, -30.68323, 0.0),
        (-0.5, -54.6551, -32.0),
        (-0.9, -72.94162, -57.6),
        (0.99999, 56.0275, 56.0275),
    ],
)
def test_target_logits_of_the_flowers_system(cos: float, hard: float, easy: float):
    """Published logits of the true class, m = 0.5 and s = 64, read off the loss against a logit of zero."""
    x = torch.tensor([[cos, math.sqrt(1 - cos * cos), 0.0]], dtype=torch.float64)
    for kind, expected in ((ArcFace, hard), (EasyArcFace, easy)):
        loss = kind(3, 2).double()
        loss.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
        value = loss(x, torch.tensor([0])).item()  # log(1 + e^-t)
        assert value == pytest.approx(math.log1p(math.exp(-expected)), rel=1e-4)


@pytest.mark.parametrize(
    ("row", "expected"),
    [((0.8, 0.3, 0.1), 6.604336e-4), ((0.6, 0.5, 0.1), 22.847417), ((0.2, 0.5, 0.1), 50.830250)],
)
def test_losses_of_the_flowers_system(row: tuple[float, ...], expected: float):
    rest = math.sqrt(1 - sum(c * c for c in row))
    loss = ArcFace(4, 3).double()
    loss.weight.data = torch.eye(3, 4, dtype=torch.float64)
    assert loss(torch.tensor([[*row, rest]], dtype=torch.float64), torch.tensor([0])).item() == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (NTXent(temperature=0.07), 1.532585852789),
        (SupCon(temperature=0.07), 3.128947645591),
        (Triplet(margin=0.2), 0.320740352834),
        (Triplet(margin=0.2, mining="all"), 0.265083707969),
    ],
    ids=str,
)
def test_values_of_the_logo_system(loss: nn.Module, expected: float):
    rows = [
        [math.sin(0.37 * i + 1.7 * j + 0.5) + 0.3 * math.cos(0.9 * i * j + 0.5) for j in range(6)] for i in range(12)
    ]
    vectors = torch.tensor(rows, dtype=torch.float64)
    assert loss(vectors, torch.arange(12) // 4).item() == pytest.approx(expected, abs=1e-9)


# -------------------------------------------------------------------------------------- pytorch-metric-learning agrees


@pytest.mark.filterwarnings("ignore")
def test_equals_pytorch_metric_learning():
    pml = pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import distances, losses, miners, reducers

    assert pml.__version__
    vectors, labels, _ = some(7)
    vectors = vectors.float()
    cosine_similarity = distances.CosineSimilarity()
    degrees = math.degrees(0.3)
    class_losses = [
        (ArcFace(D, C, margin=0.3, scale=16.0), losses.ArcFaceLoss(C, D, margin=degrees, scale=16)),
        (CosFace(D, C, margin=0.2, scale=16.0), losses.CosFaceLoss(C, D, margin=0.2, scale=16)),
        (
            SubCenterArcFace(D, C, subcenters=2, margin=0.3, scale=16.0),
            losses.SubCenterArcFaceLoss(num_classes=C, embedding_size=D, margin=degrees, scale=16, sub_centers=2),
        ),
        (ProxyAnchor(D, C, margin=0.2, alpha=16.0), losses.ProxyAnchorLoss(C, D, margin=0.2, alpha=16)),
        (ProxyNCA(D, C), losses.ProxyNCALoss(C, D, softmax_scale=9)),
    ]
    for ours, theirs in class_losses:
        if hasattr(theirs, "proxies"):
            theirs.proxies.data = ours.weight.data.clone()
        else:
            theirs.W.data = ours.weight.data.reshape(-1, D).T.clone()
        assert ours(vectors, labels).item() == pytest.approx(theirs(vectors, labels).item(), rel=1e-4)
    hard = miners.BatchHardMiner(distance=cosine_similarity)(vectors, labels)
    informative = miners.MultiSimilarityMiner(epsilon=0.1)(vectors, labels)
    assert (labels.bincount() > 1).all()  # for what lone anchors count is not the same
    pair_losses = [
        (NTXent(temperature=0.2), losses.NTXentLoss(temperature=0.2), None),
        (SupCon(temperature=0.2), losses.SupConLoss(temperature=0.2), None),
        (MultiSimilarity(epsilon=None), losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5), None),
        (MultiSimilarity(), losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5), informative),
        (Triplet(margin=0.3, mining="all"), losses.TripletMarginLoss(0.3, distance=cosine_similarity), None),
        (
            Triplet(margin=0.3),
            losses.TripletMarginLoss(0.3, distance=cosine_similarity, reducer=reducers.MeanReducer()),
            hard,
        ),
    ]
    for ours, theirs, triplets in pair_losses:
        assert ours(vectors, labels).item() == pytest.approx(theirs(vectors, labels, triplets).item(), rel=1e-4)


# ---------------------------------------------------------------------------------------------- starting class weights


def test_class_weights_start_from_class_means():
    vectors, labels, _ = some(8)
    labels[labels == 2] = 0  # class 2 has no images
    for name in sorted(CLASS_LOSSES):
        loss = build(name, {})
        before = loss.weight.detach().clone()
        start_from_class_means(loss, vectors.float(), labels)
        rows = loss.weight.detach()
        assert torch.equal(rows[2], before[2])
        for c in (0, 1, 3):
            own = torch.nn.functional.normalize(vectors[labels == c], dim=1)
            if name == "subcenter_arcface":
                expected = torch.stack([own[k::3].mean(0) if len(own) > k else own.mean(0) for k in range(3)])
            else:
                expected = own.mean(0)
            expected = torch.nn.functional.normalize(expected, dim=-1) * math.sqrt(D)
            assert torch.allclose(rows[c], expected.float(), atol=1e-5)


def test_sub_centres_of_a_class_with_one_image_start_from_it():
    loss = SubCenterArcFace(2, 1, subcenters=3)
    start_from_class_means(loss, torch.tensor([[0.0, 3.0]]), torch.tensor([0]))
    assert torch.allclose(loss.weight, torch.tensor([0.0, math.sqrt(2)]).expand(1, 3, 2))


def test_class_means_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="3 numbers"):
        start_from_class_means(ArcFace(2, 2), torch.ones(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="0 to 1"):
        start_from_class_means(ArcFace(2, 2), torch.ones(1, 2), torch.tensor([2]))


def test_a_start_from_class_means_is_a_better_start():
    vectors, labels, _ = some(9)
    torch.manual_seed(0)
    loss = ArcFace(D, C)
    random = loss(vectors.float(), labels).item()
    start_from_class_means(loss, vectors.float(), labels)
    assert loss(vectors.float(), labels).item() < random / 2


# ------------------------------------------------------------------------------------------------- retention, settings


def test_retention_is_the_mean_cosine_distance():
    x, y = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y.requires_grad_()
    expected = 3.0 * average([1 - cosine(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)])
    value = Retention(weight=3.0)(x.requires_grad_(), y)
    value.backward()
    assert value.item() == pytest.approx(expected, abs=1e-12)
    assert y.grad is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ArcFace(0, 2),
        lambda: ArcFace(2, 0),
        lambda: ArcFace(2, 2, scale=0.0),
        lambda: ArcFace(2, 2, margin=28.6),  # degrees
        lambda: EasyArcFace(2, 2, margin=-0.1),
        lambda: SubCenterArcFace(2, 2, subcenters=0),
        lambda: CosFace(2, 2, margin=2.0),
        lambda: NTXent(temperature=0.0),
        lambda: SupCon(temperature=-1.0),
        lambda: Triplet(margin=0.0),
        lambda: MultiSimilarity(alpha=0.0),
        lambda: MultiSimilarity(beta=-1.0),
        lambda: MultiSimilarity(epsilon=-0.1),
        lambda: ProxyAnchor(2, 0),
        lambda: ProxyAnchor(2, 2, margin=-0.1),
        lambda: ProxyAnchor(2, 2, alpha=0.0),
        lambda: ProxyNCA(2, 2, temperature=0.0),
        lambda: Retention(weight=-1.0),
        lambda: WeightedSum([(0.0, NTXent())]),
    ],
)
def test_settings_out_of_range_are_refused(wrong: Callable[[], nn.Module]):
    with pytest.raises(ValueError, match=r"must|is an angle|is a difference|is on the cosine"):
        wrong()


def test_an_unknown_mining_is_refused():
    with pytest.raises((ValueError, TypeError), match="mining"):  # a TypeError where types are checked at run time
        Triplet(mining="hard")


def test_a_weighted_sum_is_the_sum_of_its_losses_also_with_groups_and_a_memory():
    vectors, labels, groups = some(0)
    parts = [(1.0, NTXent(temperature=0.07)), (0.5, Triplet(mining="all")), (2.0, SupCon())]
    both = WeightedSum(parts)
    for given in (None, groups):
        expected = sum(weight * loss(vectors, labels, groups=given) for weight, loss in parts)
        torch.testing.assert_close(both(vectors, labels, groups=given), expected, rtol=0, atol=1e-9)
    alone, sums = CrossBatchMemory(parts[0][1], D, size=20), CrossBatchMemory(WeightedSum(parts[:1]), D, size=20)
    for seed in range(3):
        x, y, g = some(seed)
        torch.testing.assert_close(sums(x.float(), y, groups=g), alone(x.float(), y, groups=g))
    with pytest.raises(ValueError, match="at least"):
        WeightedSum([])


def test_mean_similarities_are_those_of_the_logo_system():
    rows = [
        [math.sin(0.37 * i + 1.7 * j + 0.5) + 0.3 * math.cos(0.9 * i * j + 0.5) for j in range(6)] for i in range(12)
    ]
    found = mean_similarities(torch.tensor(rows, dtype=torch.float64), torch.arange(12) // 4)
    assert found["right_mean"].item() == pytest.approx(0.709147184552, abs=1e-9)
    assert found["wrong_mean"].item() == pytest.approx(-0.127732269508, abs=1e-9)
    assert found["gap"].item() == pytest.approx(0.836879454061, abs=1e-9)
    apart = mean_similarities(torch.tensor(rows), torch.arange(12) // 4, groups=torch.zeros(12, dtype=torch.long))
    assert apart["wrong_mean"].item() == 0.0  # one group: no wrong pair is left
