"""Modules that stand in for others: the same numbers, the same gradients, and all put back."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_encoders import FAMILIES, disturb, images, timm
from vicinal.models.adapters import Full, LinearHead, LoRA, adapt, merge, trainable
from vicinal.models.encoder import Encoder
from vicinal.models.modules import FoldedLinear, SplitAttention, plain_attention, prepare_for, unprepared
from vicinal.types import InputError

B, L, D, H = 3, 5, 16, 4
CASES = list(
    itertools.product(
        ["self", "cross", "unbatched"],  # what attends to what
        [True, False],  # batch_first
        ["none", "bool", "float", "each", "padding", "padding and mask"],
        [True, False],  # need_weights
    )
)


def attention(seed: int = 0, **options: float) -> nn.MultiheadAttention:
    torch.manual_seed(seed)
    module = nn.MultiheadAttention(D, H, **options)
    for parameter in module.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)  # zero by default, which would hide a lost bias
    return module.eval()


def call(module: nn.Module, kind: str, batch_first: bool, mask: str, need_weights: bool) -> tuple[Any, Any]:
    """The result, and the gradient of the query, of one way to call an attention."""
    torch.manual_seed(1)
    S = L if kind == "self" else 7
    query = torch.randn(B, L, D)
    key = query if kind == "self" else torch.randn(B, S, D)
    if kind == "unbatched":
        query, key = query[0], key[0]
    elif not batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    query = query.clone().requires_grad_()
    key = query if kind == "self" else key
    value = query if kind == "self" else torch.randn(key.shape)
    options: dict[str, Any] = {}
    hidden = torch.ones(L, S, dtype=torch.bool).triu(2)
    if mask in ("bool", "padding and mask"):
        options["attn_mask"] = hidden
    elif mask == "float":
        options["attn_mask"] = torch.randn(L, S)
    elif mask == "each":
        options["attn_mask"] = torch.randn((1 if kind == "unbatched" else B) * H, L, S)
    if "padding" in mask:
        padded = torch.zeros(B, S, dtype=torch.bool)
        padded[1, -2:] = True
        options["key_padding_mask"] = padded[1] if kind == "unbatched" else padded
    out, weights = module(query, key, value, need_weights=need_weights, **options)
    (gradient,) = torch.autograd.grad(out.sin().sum(), query)
    return (out, weights), gradient


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "fused"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(part) for part in case))
def test_split_attention_is_multihead_attention(case: tuple[str, bool, str, bool], plain: bool) -> None:
    fused = attention(batch_first=case[1])
    split = SplitAttention(fused)
    whole = copy.deepcopy(fused)
    plain_attention(split, plain)
    plain_attention(whole, plain)
    (out, weights), gradient = call(fused, *case)
    for module in (split, whole):
        (theirs, their_weights), their_gradient = call(module, *case)
        torch.testing.assert_close(theirs, out, rtol=0, atol=1e-6)
        torch.testing.assert_close(their_gradient, gradient, rtol=0, atol=2e-6)
        assert (weights is None) == (their_weights is None)
        if weights is not None:
            torch.testing.assert_close(their_weights, weights, rtol=0, atol=1e-6)


def test_number_of_cases() -> None:
    assert len(CASES) == 3 * 2 * 6 * 2


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 6, "vdim": 10}], ids=str)
def test_split_and_fused_again(options: dict[str, Any]) -> None:
    module = attention(batch_first=True, dropout=0.25, **options)
    split = SplitAttention(module)
    again = split.fused()
    assert type(again) is nn.MultiheadAttention
    assert list(again.state_dict()) == list(module.state_dict())
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in module.state_dict().items())
    assert (again.dropout, again.batch_first, again.training) == (0.25, True, False)
    query, key, value = (
        torch.randn(2, 3, D),
        torch.randn(2, 4, split.k.in_features),
        torch.randn(2, 4, split.v.in_features),
    )
    for other in (split, again):
        torch.testing.assert_close(other(query, key, value)[0], module(query, key, value)[0], rtol=0, atol=1e-6)
    with plain_attention(again, True):
        torch.testing.assert_close(again(query, key, value)[0], module(query, key, value)[0], rtol=0, atol=1e-6)


def test_weights_of_each_head_and_the_causal_hint() -> None:
    module = attention(batch_first=True)
    x, mask = torch.randn(2, L, D), nn.Transformer.generate_square_subsequent_mask(L)
    for other in (SplitAttention(module), copy.deepcopy(module)):
        plain_attention(other, True)
        ours = other(x, x, x, attn_mask=mask, is_causal=True, average_attn_weights=False)
        theirs = module(x, x, x, attn_mask=mask, is_causal=True, average_attn_weights=False)
        assert ours[1].shape == (2, H, L, L)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        with pytest.raises(ValueError, match="attn_mask, which is missing"):
            other(x, x, x, is_causal=True)


def test_which_parts_are_trained_is_kept() -> None:
    module = attention()
    module.in_proj_weight.requires_grad_(False)
    module.out_proj.bias.requires_grad_(False)
    split = SplitAttention(module)
    trained = {name for name, p in split.named_parameters() if p.requires_grad}
    assert trained == {"q.bias", "k.bias", "v.bias", "out.weight"}


def test_unusual_attention_is_refused() -> None:
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        module = attention(**options)
        with pytest.raises(InputError, match="adapt its mlp instead"):
            SplitAttention(module)
        plain_attention(module, True)
        assert type(module) is nn.MultiheadAttention  # left as it is


def test_dropout_of_attention_is_kept() -> None:
    split = SplitAttention(attention(dropout=0.5, batch_first=True)).train()
    x = torch.randn(2, L, D)
    for plain in (False, True):
        plain_attention(split, plain)
        assert not torch.equal(split(x, x, x)[0], split(x, x, x)[0])


# -------------------------------------------------------------------------------------------------------- folded linear


def lora_layer(out: int, width: int, bias: bool = True, rank: int = 3, **options: float) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(width, out, bias=bias))
    model = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=5, target_modules="0", **options), model)
    layer = model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def gradients(layer: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    inputs = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]  # type: ignore[index]
    return [y.detach(), *torch.autograd.grad(y, inputs, g.to(y.dtype))]


@pytest.mark.parametrize("bias", [True, False])
def test_folded_linear_equals_a_float64_loop(bias: bool) -> None:
    layer = lora_layer(6, 4, bias)
    x, g = torch.randn(2, 5, 4), torch.randn(2, 5, 6)
    W, A, C = (p.weight.detach().double() for p in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]))
    b = layer.base_layer.bias.detach().double() if bias else torch.zeros(6)
    s = 5 / 3
    y, dx, dA, dB = torch.zeros(2, 5, 6), torch.zeros_like(x), torch.zeros_like(A), torch.zeros_like(C)
    y, dx = y.double(), dx.double()
    for n, t in itertools.product(range(2), range(5)):
        v, u = x[n, t].double(), g[n, t].double()
        y[n, t] = W @ v + b + s * (C @ (A @ v))
        dx[n, t] = W.T @ u + s * (A.T @ (C.T @ u))
        dA += s * torch.outer(C.T @ u, v)
        dB += s * torch.outer(u, A @ v)
    for ours, reference in zip(gradients(FoldedLinear(layer), x, g), (y, dx, dA, dB), strict=True):
        torch.testing.assert_close(ours.double(), reference, rtol=1e-5, atol=1e-5)
    for theirs, reference in zip(gradients(layer, x, g), (y, dx, dA, dB), strict=True):  # and so does peft
        torch.testing.assert_close(theirs.double(), reference, rtol=1e-5, atol=1e-5)


def test_folded_linear_under_autocast_is_as_exact_as_lora() -> None:
    layer = lora_layer(192, 192, rank=8)
    nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    x, g = torch.randn(400, 192), torch.randn(400, 192)
    exact = gradients(layer, x, g)
    with torch.autocast("cpu", torch.bfloat16):
        plain, folded = gradients(layer, x, g), gradients(FoldedLinear(layer), x, g)
    assert folded[0].dtype == plain[0].dtype == torch.bfloat16
    assert [t.dtype for t in folded[2:]] == [torch.float32] * 2
    for reference, theirs, ours in zip(exact, plain, folded, strict=True):
        errors = [(t.float() - reference).norm() / reference.norm() for t in (theirs, ours)]
        assert 1e-4 < errors[0] < 0.02
        assert errors[1] < 1.1 * errors[0]


def test_small_updates_are_not_lost_under_autocast() -> None:
    """W + s B A is summed in float32: an update below the last bit of W still moves the output on average."""
    layer = lora_layer(64, 256, rank=1)
    with torch.no_grad():
        layer.base_layer.weight.uniform_(0.5, 1.0)  # one bit of bfloat16 is 0.004 there
        layer.lora_A["default"].weight.fill_(1.0)
        layer.lora_B["default"].weight.fill_(0.0005 / 5)
        x = torch.ones(1, 256)
        with torch.autocast("cpu", torch.bfloat16):
            folded = FoldedLinear(layer)(x).float()
        without = layer.base_layer(x)
    moved = float((folded - without).mean())
    assert 0.06 < moved < 0.2  # 256 x 0.0005 = 0.128


def test_folded_linear_takes_only_what_it_can() -> None:
    assert FoldedLinear.takes(lora_layer(4, 4))
    assert not FoldedLinear.takes(nn.Linear(4, 4))
    assert not FoldedLinear.takes(lora_layer(4, 4, lora_dropout=0.1))
    assert not FoldedLinear.takes(lora_layer(4, 4, use_dora=True))
    trained = lora_layer(4, 4)
    trained.base_layer.bias.requires_grad_(True)  # BitFit
    assert not FoldedLinear.takes(trained)


def test_first_layer_needs_no_gradient_of_its_input() -> None:
    folded = FoldedLinear(lora_layer(6, 4))
    folded(torch.randn(2, 4)).sum().backward()
    assert folded.lora_B["default"].weight.grad.any()


# -------------------------------------------------------------------------------------------------------------- prepare


@pytest.fixture(scope="module", params=list(FAMILIES))
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    encoder = adapt(FAMILIES[request.param](tmp_path_factory.mktemp("tiny")), LoRA(rank=2))
    disturb(trainable(encoder))
    return encoder


def attention_state(encoder: Encoder) -> list[object]:
    found: list[object] = [type(module) for module in encoder.modules()]
    for module in encoder.modules():
        found += [getattr(module, name) for name in ("plain", "fused_attn") if hasattr(module, name)]
    if hasattr(encoder.model, "config"):
        found.append(encoder.model.config._attn_implementation)
    return found


def test_prepared_encoders_compute_the_same(adapted: Encoder) -> None:
    before = attention_state(adapted)
    names, identities = list(adapted.state_dict()), [id(p) for p in adapted.parameters()]
    direction = torch.randn(2, adapted.embedding_dim, generator=torch.Generator().manual_seed(5))

    def run() -> list[Tensor]:
        z = adapted(images())
        return [z, *torch.autograd.grad((z * direction).sum(), list(trainable(adapted).values()))]

    plain = run()
    for dtype in (torch.float32, torch.bfloat16):
        with prepare_for(adapted, "cpu", dtype):
            assert attention_state(adapted) != before
            assert any(isinstance(module, FoldedLinear) for module in adapted.modules())
            assert list(adapted.state_dict()) == names
            assert [id(p) for p in adapted.parameters()] == identities
            for ours, theirs in zip(run(), plain, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            assert not any(isinstance(module, FoldedLinear) for module in merge(adapted).modules())
            copied = adapt(adapted, LinearHead(4))
            assert not any(isinstance(module, FoldedLinear) for module in copied.modules())
        assert attention_state(adapted) == before
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(run(), plain, strict=True))


def test_attention_takes_its_plain_form_in_bfloat16_alone(adapted: Encoder) -> None:
    def plain() -> bool:
        module = adapted.model
        if hasattr(module, "config"):
            return str(module.config._attn_implementation) == "eager"
        flags = [m.plain if isinstance(m, SplitAttention) else not m.fused_attn for m in _attentions(adapted)]
        assert len(flags) in (3, 12)
        assert len(set(flags)) == 1
        return bool(flags[0])

    assert not plain()
    with prepare_for(adapted, "cpu", torch.float32):
        assert not plain()
    with prepare_for(adapted, "cpu", torch.bfloat16):
        assert plain()
        with plain_attention(adapted, False):  # an evaluation in float32, in the middle of training
            assert not plain()
        assert plain()
    assert not plain()


def _attentions(encoder: Encoder) -> list[Any]:
    image = [
        m for name, m in encoder.model.named_modules() if any(name.startswith(b) for b in encoder.anatomy.image.blocks)
    ]
    return [m for m in image if isinstance(m, SplitAttention) or hasattr(m, "fused_attn")]


def test_prepared_is_undone_after_an_error_and_on_request(adapted: Encoder) -> None:
    before = attention_state(adapted)
    with pytest.raises(KeyboardInterrupt), prepare_for(adapted, "cpu", torch.bfloat16):
        raise KeyboardInterrupt
    assert attention_state(adapted) == before
    with prepare_for(adapted, "cpu", torch.float32):
        twin = copy.deepcopy(adapted)
    assert attention_state(unprepared(twin)) == before
    shared = {id(p) for p in twin.parameters()} & {id(p) for p in adapted.parameters()}
    assert not shared


def test_other_devices_are_left_alone(adapted: Encoder) -> None:
    before = attention_state(adapted)
    with prepare_for(adapted, "cuda", torch.bfloat16):
        assert attention_state(adapted) == before


def test_full_tuning_of_fused_attention_becomes_plain_and_comes_back(tmp_path: Path) -> None:
    encoder = adapt(FAMILIES["open_clip"](tmp_path), Full())
    fused = [type(module) for module in encoder.modules()]
    assert fused.count(nn.MultiheadAttention) == 5
    expected = encoder(images())
    with prepare_for(encoder, "cpu", torch.bfloat16):
        assert [type(module) for module in encoder.modules()].count(nn.MultiheadAttention) == 0
        torch.testing.assert_close(encoder(images()), expected, rtol=0, atol=2e-6)
        assert [type(module) for module in merge(encoder).modules()] == fused
    assert [type(module) for module in encoder.modules()] == fused


def test_ten_steps_of_training_are_the_same(tmp_path: Path) -> None:
    """The prepared form is a matter of speed alone: ten seeded steps give the same losses."""

    def losses(prepared: bool, dtype: torch.dtype) -> Tensor:
        torch.manual_seed(0)
        encoder = adapt(start, LoRA(rank=4))
        weight = nn.Parameter(torch.randn(6, 192))
        optimizer = torch.optim.AdamW([*trainable(encoder).values(), weight], lr=3e-3)
        x, y = torch.randn(12, 3, 32, 32), torch.arange(12) % 6
        found = []
        with prepare_for(encoder, "cpu" if prepared else "other", dtype):
            for _ in range(10):
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    z = encoder(x)
                logits = 10 * nn.functional.normalize(z.float()) @ nn.functional.normalize(weight).T
                loss = nn.functional.cross_entropy(logits, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                found.append(loss.detach())
        return torch.stack(found)

    start = timm(tmp_path)
    exact = losses(False, torch.float32)
    assert exact[-1] < 0.5 * exact[0]
    torch.testing.assert_close(losses(True, torch.float32), exact, rtol=1e-3, atol=1e-4)
    error = (losses(False, torch.bfloat16) - exact).abs().max()
    assert (losses(True, torch.bfloat16) - exact).abs().max() < 2 * error + 0.02
