"""The bottleneck beside the MLP, against the formula written out block by block."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_encoders import FAMILIES, dinov2, disturb, images, siglip
from vicinal.models.adapters import (
    BitFit,
    Bottleneck,
    LastBlocks,
    LinearHead,
    LoRA,
    VisualPrompt,
    adapt,
    adapters_from_config,
    check_adapted,
    merge,
    parameter_counts,
    trainable,
)
from vicinal.models.backbones import load_encoder
from vicinal.models.bottleneck import Detour, norm_of_mlp
from vicinal.models.encoder import Encoder
from vicinal.types import InputError

MODELS: dict[str, Callable[[Path], Encoder]] = {
    **FAMILIES,
    "timm": lambda folder: load_encoder("timm:test_vit3", size=32, random_init=True),  # layer scale, attention pooling
    "dinov2": dinov2,
    "siglip": siglip,
}
NORMS = {
    "timm": "norm2",
    "open_clip": "ln_2",
    "transformers": "layer_norm2",
    "dinov2": "norm2",
    "siglip": "layer_norm2",
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    torch.manual_seed(0)
    made = {name: make(tmp_path_factory.mktemp(name)) for name, make in MODELS.items()}
    for encoder in made.values():
        disturb(dict(encoder.named_parameters()), scale=0.1)  # no layer scale stays at 1e-5
    return made


@pytest.fixture(params=list(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def encoder(encoders: dict[str, Encoder], name: str) -> Encoder:
    return encoders[name]


def blocks_of(encoder: Encoder) -> list[nn.Module]:
    return [encoder.model.get_submodule(name) for name in encoder.anatomy.image.blocks]


def detours(encoder: Encoder) -> list[Detour]:
    return [module for module in encoder.modules() if isinstance(module, Detour)]


def test_changes_nothing_at_the_start(encoder: Encoder) -> None:
    """Not a bit: frozen and adapted features are one before the first step."""
    adapted = adapt(encoder, Bottleneck(dim=4))
    assert len(detours(adapted)) == len(blocks_of(encoder))
    frozen = adapt(encoder)  # torch multiplies matrices in another order where a gradient may be asked for
    with torch.no_grad():
        assert torch.equal(adapted(images()), frozen(images()))


def attention(name: str, block: nn.Module, x: Tensor) -> Tensor:
    """What comes out of it, the way round it included, by the parts of the block."""
    if name == "timm":
        return x + block.ls1(block.attn(block.norm1(x)))  # type: ignore[operator]
    if name == "open_clip":
        y = block.ln_1(x)  # type: ignore[operator]
        return x + block.attn(y, y, y, need_weights=False)[0]  # type: ignore[operator]
    if name == "dinov2":
        return x + block.layer_scale1(block.attention(block.norm1(x))[0])  # type: ignore[operator]
    return x + block.self_attn(block.layer_norm1(x), attention_mask=None)[0]  # type: ignore[operator]


def mlp(name: str, block: nn.Module, u: Tensor) -> Tensor:
    y = block.mlp(getattr(block, NORMS[name])(u))  # type: ignore[operator]
    scale = {"timm": "ls2", "dinov2": "layer_scale2"}.get(name)
    return getattr(block, scale)(y) if scale else y


def test_equals_the_formula_written_out(encoder: Encoder, name: str) -> None:
    adapted = adapt(encoder, Bottleneck(dim=4, scale=0.7, first_block=1)).double()
    disturb(trainable(adapted), scale=0.5)
    plain = copy.deepcopy(encoder).double()
    x = adapted.patch_tokens(images().double())
    result = x
    for i, (own, block) in enumerate(zip(blocks_of(adapted), blocks_of(plain), strict=True)):
        u = attention(name, block, x)
        x = u + mlp(name, block, u)
        if i >= 1:
            layer = own.bottleneck
            h = (u @ layer.down.weight.T + layer.down.bias).clamp(min=0)  # type: ignore[union-attr,operator]
            x = x + 0.7 * (h @ layer.up.weight.T + layer.up.bias)  # type: ignore[union-attr,operator]
        result = own(result, None) if name in ("transformers", "siglip") else own(result)
        torch.testing.assert_close(result, x, rtol=1e-9, atol=1e-9)
    whole = adapted._halves().pool(x)
    torch.testing.assert_close(adapted(images().double()), whole, rtol=1e-9, atol=1e-9)
    assert (whole - plain(images().double())).abs().max() > 1e-3


def test_gradients_are_those_of_the_formula() -> None:
    detour = Detour(6, 3, scale=0.3).double()
    disturb(dict(detour.named_parameters()), scale=0.5)
    u = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    leaves = [u, *detour.parameters()]
    by_hand = 0.3 * F.linear(
        F.relu(F.linear(u, detour.down.weight, detour.down.bias)), detour.up.weight, detour.up.bias
    )
    weight = torch.randn(2, 4, 6, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((detour(u) * weight).sum(), leaves),
        torch.autograd.grad((by_hand * weight).sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_numbers_and_start() -> None:
    """12 blocks of ViT-B with 64: 1,189,632 (the overlap adapter)."""
    torch.manual_seed(0)
    detour = Detour(768, 64, scale=0.1)
    assert 12 * sum(p.numel() for p in detour.parameters()) == 1_189_632
    assert not any(p.any() for p in (detour.up.weight, detour.up.bias, detour.down.bias))
    bound = 768**-0.5  # Kaiming-uniform with a = sqrt(5)
    assert 0.99 * bound < float(detour.down.weight.detach().abs().max()) <= bound
    assert abs(float(detour.down.weight.detach().std()) - bound / 3**0.5) < 2e-4
    assert (Bottleneck().dim, Bottleneck().scale, Bottleneck().dropout) == (64, 0.1, 0.1)


def test_dropout_is_alive_in_training_alone(encoder: Encoder) -> None:
    adapted = adapt(encoder, Bottleneck(dim=8, dropout=0.5))
    disturb(trainable(adapted), scale=0.3)
    assert torch.equal(adapted.eval()(images()), adapted(images()))
    assert not torch.equal(adapted.train()(images()), adapted(images()))
    assert not adapt(copy.deepcopy(encoder).eval(), Bottleneck()).training


def test_trains_itself_alone_and_each_is_alive(encoder: Encoder) -> None:
    adapted = adapt(encoder, Bottleneck(dim=4))
    check_adapted(adapted, images())
    assert len(trainable(adapted)) == 4 * len(blocks_of(encoder))
    assert all(".bottleneck." in name for name in trainable(adapted))
    adapted(images()).square().sum().backward()
    before = adapted(images())
    for detour in detours(adapted):
        assert detour.up.weight.grad is not None
        assert detour.up.weight.grad.any()
        assert not detour.down.weight.grad.any()  # type: ignore[union-attr]  # behind a zero, until the second step
        with torch.no_grad():
            detour.up.weight.add_(0.1)
            assert not torch.equal(adapted(images()), before)
            detour.up.weight.zero_()


def test_the_check_finds_one_that_is_not_used(encoder: Encoder) -> None:
    adapted = adapt(encoder, Bottleneck(dim=4))
    block = blocks_of(adapted)[1]
    block._forward_hooks.clear()
    expected = rf"{adapted.anatomy.image.blocks[1]} was adapted, but its update gets no gradient"
    with pytest.raises(InputError, match=expected):
        check_adapted(adapted, images())


def test_copies_are_independent(encoder: Encoder) -> None:
    adapted = adapt(encoder, Bottleneck(dim=4))
    disturb(trainable(adapted))
    expected = adapted(images())
    for other in (copy.deepcopy(adapted), adapt(adapted, LinearHead(3))):
        disturb({n: p for n, p in other.named_parameters() if ".bottleneck." in n}, scale=1.0)
        assert torch.equal(adapted(images()), expected)
        other.head = nn.Identity()
        assert (other(images()) - expected).abs().max() > 1e-3
    if "transformers" not in type(encoder.model).__module__:
        assert torch.equal(pickle.loads(pickle.dumps(adapted))(images()), expected)
    assert not detours(encoder)


@pytest.mark.parametrize("first", [0, 1])
def test_saved_loaded_merged(encoder: Encoder, first: int, tmp_path: Path) -> None:
    adapted = adapt(encoder, Bottleneck(dim=4, first_block=first, scale=0.5))
    assert len(detours(adapted)) == len(blocks_of(encoder)) - first
    disturb(trainable(adapted), scale=0.2)
    for other in (load_encoder(adapted.save(tmp_path / "model")), merge(adapted)):
        torch.testing.assert_close(other(images()), adapted(images()), rtol=0, atol=2e-5)
        assert other.adapters == adapted.adapters
        assert trainable(other) == {}


@pytest.mark.parametrize(
    "methods",
    [
        (LoRA(rank=2), Bottleneck(dim=4), VisualPrompt(2), BitFit()),
        (BitFit(), VisualPrompt(2), Bottleneck(dim=4), LoRA(rank=2), LinearHead(5)),
        (Bottleneck(dim=4, first_block=1), LastBlocks(1), LoRA(rank=2, targets=("mlp",))),
    ],
    ids=["first", "last", "blocks"],
)
def test_with_other_methods(encoder: Encoder, methods: tuple[LoRA, ...], tmp_path: Path) -> None:
    adapted = adapt(encoder, *methods)
    check_adapted(adapted, images())
    disturb(trainable(adapted), scale=0.05)
    expected = adapted(images())
    merged = merge(adapted)
    counts = parameter_counts(adapted)
    assert counts["inference"] == sum(p.numel() for p in merged.parameters())
    scale = float(expected.detach().abs().max())
    for other in (merged, load_encoder(adapted.save(tmp_path / "model"))):
        torch.testing.assert_close(other(images()), expected, rtol=0, atol=3e-5 * scale)


def test_stays_in_float32_on_a_half_precision_backbone(encoder: Encoder) -> None:
    adapted = adapt(copy.deepcopy(encoder).bfloat16(), Bottleneck(dim=4))
    assert {p.dtype for p in trainable(adapted).values()} == {torch.float32}
    disturb(trainable(adapted), scale=0.1)
    z = adapted(images().bfloat16())
    assert z.dtype == torch.bfloat16
    z.float().square().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        assert adapt(encoder, Bottleneck(dim=4))(images()).isfinite().all()


def test_the_norm_is_found_by_what_it_feeds(encoder: Encoder, name: str) -> None:
    block, layer = blocks_of(encoder)[0], encoder.anatomy.image.mlp[0]
    assert norm_of_mlp(block, layer, lambda: encoder(images())) == NORMS[name]
    assert not block._forward_hooks
    assert not block.get_submodule(layer)._forward_pre_hooks


def test_norms_behind_the_layers_are_told_apart() -> None:
    from timm.models.eva import EvaBlockPostNorm
    from timm.models.vision_transformer import Block, ResPostBlock

    x = torch.randn(1, 3, 8)
    for kind, found in ((Block, "norm2"), (ResPostBlock, None), (EvaBlockPostNorm, None)):
        block = kind(8, 2)
        assert norm_of_mlp(block, "mlp.fc1", lambda block=block: block(x)) == found  # type: ignore[misc]


def test_mistakes_are_named(encoders: dict[str, Encoder]) -> None:
    for settings, message in (
        ({"dim": 0}, "dim is 0"),
        ({"scale": 0.0}, "scale is 0, which adds nothing"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
    ):
        with pytest.raises(InputError, match=rf"bottleneck\.{message}"):
            Bottleneck(**settings)  # type: ignore[arg-type]
    encoder = encoders["open_clip"]
    with pytest.raises(InputError, match=r"first_block is 3, but the image tower of .* has 3 blocks, counted from 0"):
        adapt(encoder, Bottleneck(first_block=3))
    with pytest.raises(InputError, match=r"3 blocks of .* have a bottleneck already"):
        adapt(encoder, Bottleneck(), Bottleneck())
    with pytest.raises(InputError, match="no transformer blocks"):
        adapt(load_encoder("timm:resnet10t", random_init=True), Bottleneck())
    assert adapters_from_config([{"bottleneck": {"dim": 32, "scale": 0.03}}]) == (Bottleneck(dim=32, scale=0.03),)
