"""The cross-batch memory against a list kept by hand, and against pytorch-metric-learning's."""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vicinal.losses import NTXent, SupCon, Triplet
from vicinal.losses.margin import ArcFace
from vicinal.losses.pair import CrossBatchMemory, Memory, MultiSimilarity

D, SIZE = 5, 11
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "ntxent": lambda: NTXent(temperature=0.3),
    "supcon": lambda: SupCon(temperature=0.3),
    "triplet batch_hard": lambda: Triplet(margin=0.5),
    "triplet semi_hard": lambda: Triplet(margin=0.5, mining="semi_hard"),
    "triplet all": lambda: Triplet(margin=0.5, mining="all"),
    "multi_similarity": lambda: MultiSimilarity(),
    "multi_similarity all": lambda: MultiSimilarity(epsilon=None),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
Item = tuple[list[float], int, int]  # vector, label, group


def stream(seed: int = 0, sizes: tuple[int, ...] = (6, 4, 6, 13, 6, 1, 6)) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches of several sizes, one longer than the memory; two classes a group."""
    g = torch.Generator().manual_seed(seed)
    batches = []
    for size in sizes:
        labels = torch.randint(4, (size,), generator=g)
        vectors = torch.randn(4, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)[labels]
        vectors = vectors + torch.randn(size, D, generator=g, dtype=torch.float64)
        batches.append((vectors, labels, labels // 2))
    return batches


# ---- the loops to compare with: anchors are of the batch, all others of the batch or the memory


def cosine(x: list[float], y: list[float]) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))


def loop(loss: nn.Module, batch: list[Item], memory: list[Item], grouped: bool) -> float:
    terms: list[float] = []
    for i, (x, label, group) in enumerate(batch):
        others = [*batch[:i], *batch[i + 1 :], *memory]
        p = [cosine(x, v) for v, c, _ in others if c == label]
        n = [cosine(x, v) for v, c, g in others if c != label and not (grouped and g == group)]
        if p:
            terms += TERMS[type(loss)](loss, p, n)
    return sum(terms) / len(terms) if terms else 0.0


def ntxent(loss: nn.Module, p: list[float], n: list[float]) -> list[float]:
    below = sum(math.exp(s / loss.temperature) for s in n)
    return [-math.log(math.exp(s / loss.temperature) / (math.exp(s / loss.temperature) + below)) for s in p]


def supcon(loss: nn.Module, p: list[float], n: list[float]) -> list[float]:
    below = math.log(sum(math.exp(s / loss.temperature) for s in p + n))
    return [sum(below - s / loss.temperature for s in p) / len(p)]


def triplet(loss: nn.Module, p: list[float], n: list[float]) -> list[float]:
    if loss.mining == "batch_hard":
        return [max(0.0, max(n) - min(p) + loss.margin)] if n else []
    if loss.mining == "semi_hard":
        return [max(0.0, max(s for s in n if s < a) - a + loss.margin) for a in p if any(s < a for s in n)]
    return [h for a in p for s in n if (h := s - a + loss.margin) > 0]


def multi_similarity(loss: nn.Module, p: list[float], n: list[float]) -> list[float]:
    kept, left = p, n
    if loss.epsilon is not None:
        kept = [a for a in p if n and a - loss.epsilon < max(n)]
        left = [s for s in n if s + loss.epsilon > min(p)]
    pull = math.log(1 + sum(math.exp(-loss.alpha * (a - loss.base)) for a in kept)) / loss.alpha
    return [pull + math.log(1 + sum(math.exp(loss.beta * (s - loss.base)) for s in left)) / loss.beta]


TERMS = {NTXent: ntxent, SupCon: supcon, Triplet: triplet, MultiSimilarity: multi_similarity}


# ---- what it keeps


@every_loss
@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "groups"])
def test_equals_a_list_kept_by_hand(name: str, grouped: bool):
    loss = LOSSES[name]()
    xbm = CrossBatchMemory(loss, D, size=SIZE).double()
    kept: deque[Item] = deque(maxlen=SIZE)
    differs = 0
    for vectors, labels, groups in stream():
        batch = list(zip(vectors.tolist(), labels.tolist(), groups.tolist(), strict=True))
        expected = loop(loss, batch, list(kept), grouped)
        found = xbm(vectors, labels, groups=groups if grouped else None)
        assert found.item() == pytest.approx(expected, abs=1e-9)
        differs += expected != pytest.approx(loop(loss, batch, [], grouped))
        kept.extend(batch)
    assert differs >= 4  # the memory was of use


def test_an_empty_memory_is_the_plain_loss_to_the_bit():
    vectors, labels, _ = stream()[0]
    for name, loss in LOSSES.items():
        assert CrossBatchMemory(loss(), D, size=SIZE)(vectors, labels).item() == loss()(vectors, labels).item(), name


@every_loss
def test_gradients_go_to_the_batch_alone_and_are_those_of_finite_differences(name: str):
    (first, first_labels, _), (vectors, labels, _) = stream()[:2]
    vectors, labels = torch.cat([vectors, first + 0.3]), torch.cat([labels, first_labels])
    memory = Memory(first.clone().requires_grad_(), first_labels)
    loss = LOSSES[name]()
    vectors.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, memory=memory), (vectors,), atol=1e-5)
    xbm = CrossBatchMemory(loss, D, size=SIZE).double()
    xbm(first.requires_grad_(), first_labels)
    value = xbm(vectors, labels)
    assert value.item() == pytest.approx(loss(vectors, labels, memory=memory).item(), abs=1e-12)
    value.backward()
    assert vectors.grad is not None
    assert vectors.grad.any()
    assert first.grad is None
    assert not xbm.embeddings.requires_grad


def test_two_losses_before_one_backward_pass():
    """The second fills the memory that the first was computed from."""
    batches = stream()
    xbm = CrossBatchMemory(NTXent(), D, size=4).double()
    xbm(*batches[0][:2])
    x, y = (b[0].clone().requires_grad_() for b in batches[1:3])
    total = xbm(x, batches[1][1]) + xbm(y, batches[2][1])
    total.backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_the_memory_is_saved_and_goes_on_where_it_was():
    batches = stream()
    xbm = CrossBatchMemory(SupCon(), D, size=SIZE)
    for vectors, labels, groups in batches[:3]:
        xbm(vectors.float(), labels, groups=groups)
    state = {name: value.clone() for name, value in xbm.state_dict().items()}
    assert sorted(state) == ["embeddings", "groups", "labels", "seen"]
    other = CrossBatchMemory(SupCon(), D, size=SIZE)
    other.load_state_dict(state)
    for vectors, labels, groups in batches[3:]:
        expected = xbm(vectors.float(), labels, groups=groups)
        assert torch.equal(other(vectors.float(), labels, groups=groups), expected)


def test_evaluation_leaves_the_memory_as_it_is():
    (a, y, _), (b, z, _) = stream()[:2]
    xbm = CrossBatchMemory(NTXent(), D, size=SIZE)
    xbm(a.float(), y)
    before = copy.deepcopy(xbm.state_dict())
    xbm.eval()
    xbm(b.float(), z)
    assert all(torch.equal(before[name], value) for name, value in xbm.state_dict().items())


def test_items_without_a_group_are_in_no_group():
    """Not even in group 0, which is what an empty place holds."""
    xbm = CrossBatchMemory(NTXent(), 2, size=4)
    x = torch.eye(2)
    xbm(x, torch.tensor([0, 1]))
    with_groups = xbm(x, torch.tensor([0, 1]), groups=torch.tensor([0, 0]))
    assert with_groups.item() > 0


def test_half_precision_around_it_is_kept_in_full():
    vectors, labels, _ = stream()[0]
    xbm = CrossBatchMemory(NTXent(), D, size=2 * len(labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        xbm(vectors.float(), labels)
        value = xbm(vectors.bfloat16(), labels)
    assert value.dtype == xbm.embeddings.dtype == torch.float32
    torch.testing.assert_close(xbm.embeddings[:6], torch.nn.functional.normalize(vectors.float(), dim=1))


def test_what_no_memory_fits_is_refused():
    with pytest.raises((ValueError, TypeError), match=r"memory|loss"):  # a TypeError where types are checked
        CrossBatchMemory(ArcFace(2, 2), 2, size=4)
    for wrong in ({"dim": 0, "size": 4}, {"dim": 2, "size": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            CrossBatchMemory(NTXent(), **wrong)
    with pytest.raises(ValueError, match="groups"):
        NTXent()(torch.eye(2), torch.arange(2), groups=torch.arange(2), memory=Memory(torch.eye(2), torch.arange(2)))


@pytest.mark.filterwarnings("ignore")
def test_equals_pytorch_metric_learning():
    """Whose memory holds the batch too, without a gradient: so it is larger by one batch, and its loss is the same."""
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import losses

    pairs = [
        (NTXent(temperature=0.3), losses.NTXentLoss(temperature=0.3)),
        (SupCon(temperature=0.3), losses.SupConLoss(temperature=0.3)),
        (MultiSimilarity(epsilon=None), losses.MultiSimilarityLoss()),
    ]
    for ours, theirs in pairs:
        xbm = CrossBatchMemory(ours, D, size=12)
        peer = losses.CrossBatchMemory(theirs, D, memory_size=12 + 6)
        labels = torch.arange(6) % 2  # no lone anchors: what these count is not the same
        for vectors, _, _ in stream(sizes=(6,) * 8):
            assert xbm(vectors.float(), labels).item() == pytest.approx(peer(vectors.float(), labels).item(), rel=1e-4)
