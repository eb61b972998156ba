"""Proxy-Anchor's published numbers, and class losses over so many classes that they are taken in tiles."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from vicinal.losses import ArcFace, CosFace, SubCenterArcFace, classes, start_from_class_means
from vicinal.losses.classes import own_and_others
from vicinal.losses.proxy import ProxyAnchor, ProxyNCA, proxy_anchor

# ------------------------------------------------------------------------------------------------------- golden values

SIMILARITY = [[0.2, 0.1, -0.3], [0.05, 0.3, 0.0], [0.1, 0.0, 0.2], [-0.1, 0.15, 0.1]]
LABELS = torch.tensor([0, 0, 1, 1])


def published() -> tuple[Tensor, Tensor]:
    """Embeddings and proxies with these cosines: proxies are axes, and each embedding has an axis for its rest."""
    cosines = torch.tensor(SIMILARITY, dtype=torch.float64)
    rest = torch.diag((1 - cosines.square().sum(1)).sqrt())
    return torch.cat([cosines, rest], dim=1), torch.eye(3, 7, dtype=torch.float64)


@pytest.fixture(params=["whole", "tiles"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    if request.param == "tiles":
        monkeypatch.setattr(classes, "TILED_FROM", 0)
        monkeypatch.setattr(classes, "TILE_CPU", 2)
    return request.param


def test_proxy_anchor_of_the_specification(way: str):
    x, proxies = published()
    loss = ProxyAnchor(7, 3).double()
    loss.weight.data = proxies
    assert loss(x, LABELS).item() == pytest.approx(
        12.134808567, abs=1e-8
    )  # not 11.295049507, with the positives over C
    assert proxy_anchor(5 * x, LABELS, 3 * proxies).item() == pytest.approx(12.134808567, abs=1e-8)
    assert proxy_anchor(x, LABELS, proxies[:2]).item() == pytest.approx(12.121767451, abs=1e-8)  # of the batch alone


def test_proxies_made_elsewhere_get_their_gradient(way: str):
    x, proxies = published()
    made = proxies.clone().requires_grad_()
    proxy_anchor(x, LABELS, (2 * made).tanh()).backward()
    expected = proxies.clone().requires_grad_()
    loss = ProxyAnchor(7, 3).double()
    loss.weight.data = (2 * proxies).tanh()
    loss(x, LABELS).backward()
    (2 * expected).tanh().backward(loss.weight.grad)
    assert made.grad is not None
    torch.testing.assert_close(made.grad, expected.grad)


def test_what_needs_no_gradient_gets_none(way: str):
    x, proxies = published()
    for loss in (
        lambda a, b: proxy_anchor(a, LABELS, b),
        lambda a, b: own_and_others(a, b, LABELS, 2.0, over="classes")[1].sum(),
    ):
        for first, second in ((True, False), (False, True)):
            a, b = x.clone().requires_grad_(first), proxies.clone().requires_grad_(second)
            loss(a, b).backward()
            assert (a.grad is not None, b.grad is not None) == (first, second)


# --------------------------------------------------------------------------------------------------------------- tiles

LOSSES: dict[str, Callable[[int, int], nn.Module]] = {
    "arcface": ArcFace,
    "cosface": CosFace,
    "subcenter": lambda dim, count: SubCenterArcFace(dim, count, subcenters=3),
    "proxy_anchor": ProxyAnchor,
    "proxy_nca": ProxyNCA,
}
every_loss = pytest.mark.parametrize("name", LOSSES)


def many(name: str, count: int, dim: int = 32, batch: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    """Items of a few classes, some of them twice, near their weights and not of length one."""
    torch.manual_seed(0)
    loss = LOSSES[name](dim, count)
    labels = torch.randint(count, (batch // 2,)).repeat(2)
    own = loss.weight.detach()[labels]
    x = 3 * normalize(own.view(batch, -1, dim)[:, -1], dim=1) + 0.4 * torch.randn(batch, dim)
    return loss, x.requires_grad_(), labels


def gradients(loss: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x.grad = None
    loss.zero_grad()
    value = loss(x, labels)
    (3 * value).backward()
    assert x.grad is not None
    return value.detach(), x.grad, loss.weight.grad


@every_loss
@pytest.mark.parametrize("tile", [7, 512])  # classes do not fill the last
def test_tiles_change_nothing(name: str, tile: int, monkeypatch: pytest.MonkeyPatch):
    loss, x, labels = many(name, 700)
    loss, x = loss.double(), x.detach().double().requires_grad_()
    loss.weight.data[[3, int(labels[0])]] *= 1e-9  # too short to be made of length one
    monkeypatch.setattr(classes, "TILED_FROM", 10**9)
    expected = gradients(loss, x, labels)
    monkeypatch.setattr(classes, "TILED_FROM", 0)
    monkeypatch.setattr(classes, "TILE_CPU", tile)
    for found, wanted in zip(gradients(loss, x, labels), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@every_loss
def test_tiles_of_bfloat16_are_nearer_than_autocast(name: str, monkeypatch: pytest.MonkeyPatch):
    """Against float64; autocast's is the whole computation with its own casts."""
    loss, x, labels = many(name, 700)
    monkeypatch.setattr(classes, "TILED_FROM", 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(loss, x, labels)
    assert all(part.dtype == torch.float32 for part in found)
    monkeypatch.setattr(classes, "TILED_FROM", 10**9)
    monkeypatch.setattr(classes, "cosines", plain_cosines)
    monkeypatch.setattr("vicinal.losses.proxy.cosines", plain_cosines)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = gradients(loss, x, labels)
    wide = gradients(loss.double(), x.detach().double().requires_grad_(), labels)
    for ours, theirs, truth in zip(found, plain, wide, strict=True):
        error, peer = ((part.double() - truth).norm() / truth.norm() for part in (ours, theirs))
        assert error < max(0.8 * peer, 2e-4)
        assert error < 0.01


def plain_cosines(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.linear(normalize(x, dim=1), normalize(y, dim=1)).to(
        torch.promote_types(x.dtype, torch.float32)
    )


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made, views left aside."""

    numel = 0

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor) and not func.is_view:
                self.numel = max(self.numel, tensor.numel())
        return made


@every_loss
def test_the_cosines_are_never_whole(name: str):
    """With thousands of classes, and nothing set: of the size of the weight there is its gradient, and no B x C."""
    loss, x, labels = many(name, classes.TILED_FROM, dim=4, batch=64)
    with Largest() as forward:
        value = loss(x, labels)
    with Largest() as backward:
        value.backward()
    tile = 64 * classes.TILE_CPU
    assert tile / 4 < forward.numel <= tile < 64 * classes.TILED_FROM / 4
    assert tile / 4 < backward.numel <= max(tile, loss.weight.numel())


def test_an_item_that_lies_on_its_weight_and_classes_that_are_alone(way: str):
    for over in ("classes", "items"):
        x, w = torch.eye(3).requires_grad_(), torch.cat([torch.eye(3), torch.zeros(1, 3)]).requires_grad_()
        own, others = own_and_others(x, w, torch.arange(3), 8.0, over=over)
        (own.sum() + torch.nn.functional.softplus(others).sum()).backward()
        assert own.tolist() == [1.0, 1.0, 1.0]
        assert x.grad is not None
        assert x.grad.isfinite().all()
        assert w.grad is not None
        assert w.grad.isfinite().all()
    x, w = torch.randn(2, 3).requires_grad_(), torch.randn(1, 3).requires_grad_()
    for over in ("classes", "items"):  # nothing is summed
        x.grad = w.grad = None
        _, others = own_and_others(x, w, torch.zeros(2, dtype=torch.long), 8.0, over=over)
        softened = torch.nn.functional.softplus(others).sum()
        softened.backward()
        assert softened.item() == 0
        assert not x.grad.any()
        assert not w.grad.any()


@every_loss
@pytest.mark.parametrize("label", [-1, 4])
def test_labels_that_are_no_class_are_refused(name: str, label: int, way: str):
    with pytest.raises((IndexError, RuntimeError), match=r"out of|bounds"):
        LOSSES[name](3, 4)(torch.randn(2, 3), torch.tensor([0, label]))


def test_sums_over_items_are_for_one_vector_a_class():
    with pytest.raises(ValueError, match="one vector"):
        own_and_others(torch.eye(2), torch.ones(2, 3, 2), torch.arange(2), 1.0, over="items")


def test_proxies_start_from_class_means():
    for loss in (ProxyAnchor(2, 2), ProxyNCA(2, 2)):
        start_from_class_means(loss, torch.tensor([[5.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        torch.testing.assert_close(loss.weight.data, torch.eye(2) * math.sqrt(2))
