"""InfoNCE and SigLIP against loops in plain Python and open_clip's losses; their tiles, shares and edges."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from vicinal.losses import contrastive
from vicinal.losses.contrastive import InfoNCE, SigLIP, fit_scale_and_bias
from vicinal.types import InputError

Vectors = Sequence[Sequence[float]]
B, D = 9, 5
LOSSES: dict[str, Callable[..., Any]] = {"infonce": InfoNCE, "siglip": SigLIP}
SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("infonce", {"scale": 100.0, "equal": "mask"}),
    ("infonce", {"scale": 3.0, "equal": "mask"}),
    ("infonce", {"scale": 3.0, "equal": "multi_positive"}),
    ("siglip", {"scale": 112.0, "bias": -16.0, "equal": "multi_positive"}),
    ("siglip", {"scale": 3.0, "bias": -1.0, "equal": "multi_positive"}),
    ("siglip", {"scale": 3.0, "bias": -1.0, "equal": "mask"}),
]
every_loss = pytest.mark.parametrize(("name", "settings"), SETTINGS, ids=[f"{n}-{s}" for n, s in SETTINGS])


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of which even the smallest batch has several, and ragged ones."""
    monkeypatch.setattr(contrastive, "TILE", (2, 4))


def some(seed: int, size: int = B) -> tuple[Tensor, Tensor, Tensor]:
    """Images and texts of float64 that belong together, and ids of which some are equal."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, D, generator=g, dtype=torch.float64)
    y = x + torch.randn(size, D, generator=g, dtype=torch.float64)
    return x, y, torch.randint(size // 2 + 1, (size,), generator=g)


# ------------------------------------------------------------------------------------------- the loops to compare with


def cosine(x: Sequence[float], y: Sequence[float]) -> float:
    dot = sum(a * b for a, b in zip(x, y, strict=True))
    return dot / (math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y)))


def loop_infonce(x: Vectors, y: Vectors, ids: Sequence[int], *, scale: float, equal: str) -> float:
    z = [[scale * cosine(a, b) for b in y] for a in x]
    n = len(x)
    total = 0.0
    for logits in (z, [list(column) for column in zip(*z, strict=True)]):
        for i in range(n):
            kin = [j for j in range(n) if ids[j] == ids[i]]
            if equal == "mask":
                below, positives = [j for j in range(n) if j == i or j not in kin], [i]
            else:
                below, positives = list(range(n)), kin
            top = max(logits[i][j] for j in below)
            whole = top + math.log(sum(math.exp(logits[i][j] - top) for j in below))
            total += whole - sum(logits[i][j] for j in positives) / len(positives)
    return total / (2 * n)


def loop_siglip(x: Vectors, y: Vectors, ids: Sequence[int], *, scale: float, bias: float, equal: str) -> float:
    total = 0.0
    for i, a in enumerate(x):
        for j, b in enumerate(y):
            if i != j and ids[i] == ids[j] and equal == "mask":
                continue
            z = scale * cosine(a, b) + bias
            z = -z if ids[i] == ids[j] else z
            total += max(z, 0.0) + math.log1p(math.exp(-abs(z)))
    return total / len(x)


LOOPS: dict[str, Callable[..., float]] = {"infonce": loop_infonce, "siglip": loop_siglip}


@every_loss
@pytest.mark.parametrize("tile", [(1, 1), (2, 4), (512, 2048)], ids=str)
@pytest.mark.parametrize("repeated", [False, True])
def test_equals_the_loop(
    monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any], tile: tuple[int, int], repeated: bool
):
    monkeypatch.setattr(contrastive, "TILE", tile)
    for size in (1, 2, B):
        x, y, ids = some(size, size)
        distinct = torch.arange(size)
        expected = LOOPS[name](x.tolist(), y.tolist(), (ids if repeated else distinct).tolist(), **settings)
        loss = LOSSES[name](**settings).double()
        assert loss(x, y, ids=ids if repeated else None).item() == pytest.approx(expected, rel=1e-6, abs=1e-7)
        if not repeated:
            assert loss(x, y, ids=distinct).item() == loss(x, y).item()


def exact(loss: nn.Module, scale: float) -> nn.Module:
    """The logarithm of a scale is kept in float32: here one of float64."""
    loss.double()
    loss.log_scale.data.fill_(math.log(scale))
    return loss


@pytest.mark.parametrize(
    ("loss", "scale", "ids", "expected"),
    [
        (InfoNCE(), 14.285714285714286, None, 0.171420086577),
        (InfoNCE(equal="multi_positive"), 14.285714285714286, [0, 0, 1, 2, 2, 3], 1.578396610534),
        (InfoNCE(equal="mask"), 14.285714285714286, [0, 0, 1, 2, 2, 3], 0.152538835968),
        (SigLIP(bias=-10.0), 10.0, None, 1.195777284822),
        (SigLIP(bias=-10.0), 100.0, None, 115.248639558942),
        (SigLIP(bias=-10.0), 10.0, [0, 0, 1, 2, 2, 3], 3.514965222835),
    ],
    ids=["infonce", "infonce, positives", "infonce, masked", "siglip", "siglip at 100", "siglip, positives"],
)
def test_values_of_the_fashion_system(loss: nn.Module, scale: float, ids: list[int] | None, expected: float):
    def rows(a: float, b: float, c: float) -> Tensor:
        grid = [[math.sin(a * i + b * j + c) + 0.3 * math.cos(0.9 * i * j + c) for j in range(5)] for i in range(6)]
        return normalize(torch.tensor(grid, dtype=torch.float64))

    image = rows(0.7, 1.3, 0.2)
    text = normalize(image + 0.5 * rows(1.1, 0.4, 0.9))
    value = exact(loss, scale)(image, text, ids=None if ids is None else torch.tensor(ids))
    assert value.item() == pytest.approx(expected, abs=1e-9)


# ------------------------------------------------------------------------------------------------- open_clip agrees


def peer(name: str, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    from open_clip.loss import ClipLoss, SigLipLoss

    value: Tensor = ClipLoss()(x, y, scale) if name == "infonce" else SigLipLoss()(x, y, scale, bias)
    return value


@pytest.mark.parametrize("name", sorted(LOSSES))
@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_equals_open_clip_in_value_and_gradient(name: str, scale: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contrastive, "TILE", (32, 64))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(150, 48, generator=g)
    x, y = normalize(x), normalize(0.3 * x + torch.randn(150, 48, generator=g))
    loss = LOSSES[name](scale=scale)
    found, expected = [], []
    for into in (found, expected):
        a, b = (v.clone().requires_grad_() for v in (x, y))
        t, c = torch.tensor(scale, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
        value = loss(a, b) if into is found else peer(name, normalize(a), normalize(b), t, c)
        value.backward()
        of_scale = loss.log_scale.grad / scale if into is found else t.grad
        of_bias = (loss.bias.grad if into is found else c.grad) if name == "siglip" else torch.zeros(())
        into += [value.detach(), a.grad, b.grad, of_scale, of_bias]
    for one, other in zip(found, expected, strict=True):
        size = max(1.0, other.abs().max().item())
        assert (one - other).abs().max().item() < 1e-5 * size


# ---------------------------------------------------------------------------------------------------------- gradients


@every_loss
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_gradient_is_that_of_finite_differences(name: str, settings: dict[str, Any], repeated: bool):
    x, y, ids = some(3, 7)
    loss = LOSSES[name](**{**settings, "scale": min(settings["scale"], 20.0)}).double()
    names = [n for n, _ in loss.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in loss.parameters()]

    def value(x: Tensor, y: Tensor, *w: Tensor) -> Tensor:
        return torch.func.functional_call(
            loss, dict(zip(names, w, strict=True)), (x, y), {"ids": ids if repeated else None}
        )

    assert value(x, y, *weights).item() > 1e-3  # a loss of zero would prove nothing
    assert torch.autograd.gradcheck(value, (x.requires_grad_(), y.requires_grad_(), *weights), atol=1e-6)


def gradients(loss: nn.Module, x: Tensor, y: Tensor, **settings: Any) -> list[Tensor]:  # noqa: ANN401
    loss.zero_grad()
    a, b = (v.clone().requires_grad_() for v in (x, y))
    loss(a, b, **settings).backward()
    found = [a.grad, b.grad, *(p.grad for p in loss.parameters())]
    assert all(gradient is not None for gradient in found)
    return [gradient.clone() for gradient in found]


@every_loss
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.usefixtures("small_tiles")
def test_shares_make_the_whole(name: str, settings: dict[str, Any], repeated: bool):
    """The mean over shares, in value and gradient, is the whole batch's."""
    x, y, ids = some(5, 12)
    loss = LOSSES[name](**settings).double()
    arguments = {"ids": ids} if repeated else {}
    shares = [slice(0, 4), slice(4, 8), slice(8, 12)]
    values = [loss(x, y, share=share, **arguments).item() for share in shares]
    assert sum(values) / 3 == pytest.approx(loss(x, y, **arguments).item(), rel=1e-12)
    assert len(set(values)) == 3
    whole = gradients(loss, x, y, **arguments)
    parts = [gradients(loss, x, y, share=share, **arguments) for share in shares]
    for gradient, *of_shares in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(of_shares) / 3, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("share", [slice(0, 0), slice(0, 4, 2), slice(9, 12)], ids=str)
def test_a_share_of_nothing_is_refused(share: slice):
    x, y, _ = some(0)
    with pytest.raises(ValueError, match="share"):
        InfoNCE()(x, y, share=share)


@every_loss
@pytest.mark.usefixtures("small_tiles")
def test_the_order_of_the_batch_does_not_matter(name: str, settings: dict[str, Any]):
    x, y, ids = some(4)
    order = torch.randperm(B, generator=torch.Generator().manual_seed(1))
    loss = LOSSES[name](**settings).double()
    assert loss(x[order], y[order], ids=ids[order]).item() == pytest.approx(loss(x, y, ids=ids).item(), rel=1e-12)
    assert loss(3 * x, 0.2 * y, ids=ids).item() == pytest.approx(loss(x, y, ids=ids).item(), rel=1e-9)


# -------------------------------------------------------------------------------------------------------------- edges


def edges() -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
    e = torch.eye(D)
    g = torch.Generator().manual_seed(0)
    return {
        "learnt": (e, e, None),
        "opposite": (e, -e, None),
        "all equal": (e[[0] * 6], e[[0] * 6], None),
        "all opposite": (e[[0] * 6], -e[[0] * 6], None),
        "one far from its own, one near": (torch.stack([e[0], e[0]]), torch.stack([-e[0], e[0]]), None),
        "one item": (e[[1]], e[[2]], None),
        "one id": (torch.randn(5, D, generator=g), torch.randn(5, D, generator=g), torch.full((5,), 3)),
        "vectors of zeros": (torch.stack([e[0], 0 * e[0], e[1]]), torch.stack([0 * e[0], e[1], e[1]]), None),
    }


@every_loss
@pytest.mark.parametrize("edge", sorted(edges()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_finite_at_the_edges(name: str, settings: dict[str, Any], edge: str, dtype: torch.dtype):
    x, y, ids = edges()[edge]
    loss = LOSSES[name](**settings)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = gradients(loss, x.to(dtype), y.to(dtype), ids=ids)
            value = loss(x.to(dtype), y.to(dtype), ids=ids)
        assert value.dtype == torch.float32
        assert all(tensor.isfinite().all() for tensor in (value, *found))
        assert value.item() >= -1e-6


@every_loss
@pytest.mark.parametrize("edge", sorted(set(edges()) - {"vectors of zeros"}))
def test_float32_is_exact_at_the_edges(name: str, settings: dict[str, Any], edge: str):
    """Logits from -100 to 100 too, whose exponentials float32 does not hold side by side."""
    x, y, ids = edges()[edge]
    known = list(range(len(x))) if ids is None else ids.tolist()
    expected = LOOPS[name](x.tolist(), y.tolist(), known, **settings)
    assert LOSSES[name](**settings)(x, y, ids=ids).item() == pytest.approx(expected, rel=2e-6, abs=1e-5)


def test_a_pair_that_is_all_but_learnt_keeps_its_gradient():
    """1 - p is 4e-9 here: less than what float32 can tell from zero if it subtracts p from 1."""
    x = torch.eye(4)
    exactly = gradients(InfoNCE(scale=20.0).double(), x.double(), x.double() + 0.01)
    found = gradients(InfoNCE(scale=20.0), x, x + 0.01)
    for one, other in zip(found, exactly, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------- precision and memory


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
def test_the_logits_never_exist_whole(name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contrastive, "TILE", (16, 32))
    batch, dim = 200, 8
    ids = torch.arange(batch) // 2
    loss = LOSSES[name](**settings)
    with Largest() as largest:
        gradients(loss, torch.randn(batch, dim), torch.randn(batch, dim), ids=ids)
    assert 16 * 32 <= largest.numel <= batch * dim


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_under_autocast_the_gradient_is_nearer_than_open_clips(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(contrastive, "TILE", (64, 128))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=g)
    y = 0.4 * x + torch.randn(256, 64, generator=g)
    x, y = normalize(x + 1), normalize(y + 1)  # two cones, as of a pretrained model
    errors = []
    for ours in (True, False):
        found = []
        for dtype in (torch.float64, torch.float32):
            a = x.to(dtype, copy=True).requires_grad_()
            b = y.to(dtype, copy=True).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
                if ours:
                    value = LOSSES[name](scale=30.0)(a, b)
                else:
                    value = peer(name, normalize(a), normalize(b), torch.tensor(30.0), torch.tensor(-10.0))
            value.backward()
            assert a.grad is not None
            assert b.grad is not None
            found.append(torch.cat([a.grad, b.grad]).double())
        errors.append(((found[1] - found[0]).norm() / found[0].norm()).item())
    assert errors[0] < 0.8 * errors[1]
    assert errors[0] < 0.02


@every_loss
def test_without_gradient_it_is_the_same_value(name: str, settings: dict[str, Any]):
    x, y, ids = some(1)
    loss = LOSSES[name](**settings).double()
    value = loss(x.requires_grad_(), y, ids=ids)
    with torch.no_grad():
        assert loss(x, y, ids=ids).item() == value.item()
    assert value.requires_grad


# ----------------------------------------------------------------------------------------------- scale and bias


def test_infonce_never_scales_by_more_than_100_and_comes_back():
    loss = InfoNCE(scale=99.0)
    optimizer = torch.optim.SGD(loss.parameters(), lr=1e4)
    x = torch.eye(3)
    y = normalize(x + 0.9 * x.roll(1, 0))
    optimizer.zero_grad()
    loss(x, y).backward()
    optimizer.step()
    assert loss.log_scale.item() > math.log(100)
    assert loss.scale.item() == pytest.approx(100.0)
    loss(x, y.roll(1, 0)).backward()  # wrong pairs: a smaller scale would be better
    assert loss.log_scale.grad is not None
    assert loss.log_scale.grad.item() > 0
    assert loss.log_scale.item() == pytest.approx(math.log(100))


def test_siglip_keeps_the_scale_of_a_checkpoint():
    loss = SigLIP(scale=112.3, bias=-16.5)
    loss(torch.eye(3), torch.eye(3))
    assert loss.scale.item() == pytest.approx(112.3, rel=1e-6)
    assert loss.bias.item() == -16.5


@every_loss
@pytest.mark.usefixtures("small_tiles")
def test_a_locked_tower_changes_no_other_gradient(name: str, settings: dict[str, Any]):
    x, y, ids = some(2)
    loss = LOSSES[name](**settings).double()
    both = gradients(loss, x, y, ids=ids)
    for locked in (0, 1):
        loss.zero_grad()
        pair = [v.clone().requires_grad_(k != locked) for k, v in enumerate((x, y))]
        loss(*pair, ids=ids).backward()
        assert pair[locked].grad is None
        torch.testing.assert_close(pair[1 - locked].grad, both[1 - locked])
        for parameter, gradient in zip(loss.parameters(), both[2:], strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    loss.zero_grad()
    loss(x, y, ids=ids).backward()  # nothing but scale and bias
    for parameter, gradient in zip(loss.parameters(), both[2:], strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_what_is_not_to_be_learnt_gets_no_gradient():
    for loss in (InfoNCE(learn_scale=False), SigLIP(learn=False)):
        x = torch.randn(4, 3, requires_grad=True)
        loss(x, torch.randn(4, 3)).backward()
        assert x.grad is not None
        assert all(p.grad is None for p in loss.parameters())


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: InfoNCE(scale=101.0), "scale"),
        (lambda: InfoNCE(scale=0.0), "scale"),
        (lambda: SigLIP(scale=-1.0), "scale"),
        (lambda: SigLIP(scale=math.nan), "scale"),
        (lambda: InfoNCE(equal="both"), "equal"),
        (lambda: SigLIP(equal="both"), "equal"),
    ],
    ids=range(6),
)
def test_settings_that_cannot_be_are_refused(build: Callable[[], object], words: str):
    with pytest.raises((ValueError, TypeError), match=words):  # a TypeError where types are checked at run time
        build()


@pytest.mark.parametrize("batch", [None, 16])
@pytest.mark.parametrize("repeated", [False, True])
def test_fitted_scale_and_bias_are_those_of_scikit_learn(batch: int | None, repeated: bool):
    linear_model = pytest.importorskip("sklearn.linear_model")
    g = torch.Generator().manual_seed(0)
    n = 60
    x = torch.randn(n, 6, generator=g)
    y = x + 1.5 * torch.randn(n, 6, generator=g)
    ids = torch.arange(n) // 2 if repeated else torch.arange(n)
    cosines = (normalize(x).double() @ normalize(y).double().T).numpy().reshape(-1, 1)
    same = (ids[:, None] == ids).numpy().ravel()
    # A batch holds an item's own text always, others (of its kin, too) by chance.
    weight = np.where(np.eye(n, dtype=bool).ravel(), 1.0, 1.0 if batch is None else (batch - 1) / (n - 1))
    model = linear_model.LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(cosines, same, weight)
    t, b = fit_scale_and_bias(x, y, ids=ids if repeated else None, batch=batch, least=0.01)
    assert t == pytest.approx(model.coef_.item(), rel=1e-4)
    assert b == pytest.approx(model.intercept_.item(), rel=1e-4)


def test_fitted_scale_and_bias_lower_the_loss_of_a_softmax_model():
    """As CLIP's: cosines of .3 for pairs and .2 for others, and a scale of 100."""
    g = torch.Generator().manual_seed(0)
    both = torch.randn(256, 64, generator=g)
    x, y = normalize(both + 1.2), normalize(0.5 * both + torch.randn(256, 64, generator=g) - 0.2)
    t, b = fit_scale_and_bias(x, y)
    fitted = SigLIP(scale=t, bias=b)
    start = gradients(fitted, x, y)
    assert abs(start[2].item()) < 1e-3
    assert abs(start[3].item()) < 1e-3
    assert fitted(x, y).item() < 0.5 * SigLIP(scale=100.0, bias=-10.0)(x, y).item()


def test_separable_pairs_get_the_largest_scale():
    x = torch.eye(6)
    t, b = fit_scale_and_bias(x, x, most=50.0)
    assert t == pytest.approx(50.0)
    assert abs(gradients(SigLIP(scale=50.0, bias=b).double(), x.double(), x.double())[3].item()) < 1e-5


def test_the_fit_is_that_of_the_batches_to_come_where_texts_repeat():
    """Six texts of a thousand items: batches of 16 hold few kin, so the bias must not be that of the whole set."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(6, (960,), generator=g)
    kinds = torch.randn(6, 16, generator=g)
    x, y = kinds[ids] + torch.randn(960, 16, generator=g), kinds[ids]
    t, b = fit_scale_and_bias(x, y, ids=ids, batch=16)
    loss = SigLIP(scale=t, bias=b).double()
    slopes = torch.zeros(2)
    for rows in torch.randperm(960, generator=g).view(60, 16):
        slopes += torch.stack(gradients(loss, x[rows].double(), y[rows].double(), ids=ids[rows])[2:]).float() / 60
        loss.zero_grad()
    assert slopes.abs().max() < 0.15, "neither the scale nor the bias has to move"
    assert b < 0


@pytest.mark.parametrize("known", ["nothing", "the contrary"])
def test_a_model_that_knows_nothing_of_a_domain_starts_from_the_least_scale(known: str):
    """At a scale of 0 no gradient comes back to the vectors."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 8, generator=g)
    y = torch.randn(64, 8, generator=g) if known == "nothing" else -x
    t, b = fit_scale_and_bias(x, y, batch=16)
    assert t == 10.0
    slope = gradients(SigLIP(scale=t, bias=b).double(), x.double(), y.double())[3]
    whole = fit_scale_and_bias(x, y)
    assert abs(gradients(SigLIP(scale=10.0, bias=whole[1]).double(), x.double(), y.double())[3].item()) < 1e-5
    assert slope > 0, "a batch of 16 has fewer negatives, so its bias is higher"


def test_vectors_that_cannot_be_fitted_are_refused():
    x, y, _ = some(0)
    with pytest.raises(InputError, match="no negative pair"):
        fit_scale_and_bias(x, y, ids=torch.zeros(B, dtype=torch.long))
