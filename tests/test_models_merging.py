"""Averages of weights: between two encoders, of several, and over steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tiny_encoders import FAMILIES, disturb, images, timm
from vicinal.models.adapters import BitFit, Full, LastBlocks, LinearHead, LoRA, adapt, merge, trainable
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.models.merging import EMA, average, interpolate
from vicinal.types import InputError


@pytest.fixture(scope="module", params=list(FAMILIES))
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return FAMILIES[request.param](tmp_path_factory.mktemp("tiny"))


def tuned(encoder: Encoder, *methods: Full | LastBlocks | LinearHead | BitFit | LoRA) -> Encoder:
    adapted = adapt(encoder, *methods)
    disturb(trainable(adapted))
    return adapted


def test_every_weight_lies_between(encoder: Encoder) -> None:
    after = tuned(encoder, LoRA(rank=2), BitFit())
    given = {name: tensor.clone() for name, tensor in after.state_dict().items()}
    middle = interpolate(encoder, after, 0.3)
    old, new = encoder.state_dict(), merge(after).state_dict()
    assert list(middle.state_dict()) == list(old)
    moved = 0
    for name, tensor in middle.state_dict().items():
        if tensor.is_floating_point():
            expected = 0.7 * old[name].double() + 0.3 * new[name].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=1e-6)
            moved += not torch.equal(tensor, old[name])
    assert moved > 10
    assert trainable(middle) == {}
    assert middle.adapters == ()
    assert middle.anatomy == encoder.anatomy
    assert all(torch.equal(tensor, given[name]) for name, tensor in after.state_dict().items())
    assert (middle(images()) - encoder(images())).abs().max() > 1e-4


def test_the_ends_are_exact(encoder: Encoder) -> None:
    after = tuned(encoder, LoRA(rank=2))
    for weight, end in ((0.0, encoder), (1.0, merge(after))):
        state = interpolate(encoder, after, weight).state_dict()
        assert all(torch.equal(tensor, end.state_dict()[name]) for name, tensor in state.items())


def test_a_soup_is_the_weighted_mean_of_every_weight(encoder: Encoder) -> None:
    several = []
    for seed in range(3):
        one = adapt(encoder, LoRA(rank=2) if seed else BitFit())
        disturb(trainable(one), seed=seed)
        several.append(one)
    states = [merge(one).state_dict() for one in several]
    for shares, expected in (
        (None, (1 / 3, 1 / 3, 1 / 3)),
        ((2.0, 1.0, 1.0), (0.5, 0.25, 0.25)),
        ((0.0, 0.0, 3.0), (0, 0, 1)),
    ):
        soup = average(several, shares)
        assert soup.adapters == ()
        for name, tensor in soup.state_dict().items():
            if tensor.is_floating_point():
                mean = sum(v * state[name].double() for v, state in zip(expected, states, strict=True))
                torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6)
    again = [merge(one).state_dict() for one in several]
    for state, same in zip(states, again, strict=True):
        assert all(torch.equal(value, same[name]) for name, value in state.items()), "they are left alone"


@pytest.mark.parametrize("shares", [[], [1.0], [1.0, -1.0], [0.0, 0.0]])
def test_shares_of_a_soup_that_make_no_mean(shares: list[float]) -> None:
    one = load_encoder("timm:test_vit", size=32, random_init=True)
    with pytest.raises(InputError, match="not all of them 0"):
        average([one, one], shares)


def test_a_soup_of_a_head_and_none_is_refused() -> None:
    one = load_encoder("timm:test_vit", size=32, random_init=True)
    with pytest.raises(InputError, match="nothing to average it with"):
        average([one, adapt(one, LinearHead(dim=8))])
    with pytest.raises(InputError, match="one at least"):
        average([])


def test_two_ways_of_adapting_meet(encoder: Encoder) -> None:
    one, other = tuned(encoder, LoRA(rank=2)), tuned(encoder, LastBlocks(1))
    middle = interpolate(one, other, 0.5)
    name = f"{encoder.anatomy.image.blocks[-1]}.{encoder.anatomy.image.mlp[0]}.weight"
    weights = [e.model.state_dict()[name] for e in (merge(one), other, middle)]
    torch.testing.assert_close(weights[2], (weights[0] + weights[1]) / 2, rtol=0, atol=1e-6)


def test_a_new_head_is_left_alone(encoder: Encoder, tmp_path: Path) -> None:
    after = tuned(encoder, LinearHead(6), LoRA(rank=2))
    middle = interpolate(encoder, after, 0.25)
    assert all(torch.equal(tensor, after.head.state_dict()[name]) for name, tensor in middle.head.state_dict().items())
    assert middle(images()).shape == (2, 6)
    assert middle.adapters == (LinearHead(6),)

    again = tuned(middle, LinearHead(6))  # a second head of the same shape is new as well
    halfway = interpolate(middle, again, 0.5)
    assert torch.equal(halfway.head[1].weight, again.head[1].weight)  # type: ignore[index,union-attr]

    with_head = merge(after)
    further = tuned(with_head, Full())  # trains the head that there is
    between = interpolate(with_head, further, 0.5).head[1].weight  # type: ignore[index,union-attr]
    expected = (with_head.head[1].weight + further.head[1].weight) / 2  # type: ignore[index,union-attr]
    torch.testing.assert_close(between, expected, rtol=0, atol=1e-6)


def test_a_saved_interpolation_comes_back(encoder: Encoder, tmp_path: Path) -> None:
    middle = interpolate(encoder, tuned(encoder, LinearHead(6)), 0.5)
    loaded = load_encoder(middle.save(tmp_path / "model"))
    torch.testing.assert_close(loaded(images()), middle(images()), rtol=0, atol=1e-6)


def test_what_does_not_fit_is_an_error(tmp_path: Path) -> None:
    encoder = timm(tmp_path)
    larger = load_encoder("timm:vit_tiny_patch16_224", size=48, random_init=True)
    with pytest.raises(InputError, match=r"pos_embed is not the same in both; they must be one architecture"):
        interpolate(encoder, larger, 0.5)
    for weight in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match=r"give 0 \(the original\) to 1"):
            interpolate(encoder, encoder, weight)


# ------------------------------------------------------------------------------------------------------------------ EMA


def test_ema_by_hand() -> None:
    layer = nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    ema = EMA(layer, decay=0.3)
    average = layer.weight.detach().double().clone()
    for step in range(5):
        nn.init.constant_(layer.weight, float(step))
        ema.update()
        decay = min(0.3, (1 + step) / (10 + step))  # 0.1, 0.18, 0.25, then 0.3
        average = decay * average + (1 - decay) * step
    assert set(ema.average) == {"weight"}
    torch.testing.assert_close(ema.average["weight"].double(), average, rtol=1e-6, atol=1e-6)


def test_ema_is_applied_and_taken_back_bit_for_bit() -> None:
    layer = nn.Linear(3, 3).bfloat16()
    ema = EMA(layer, decay=0.9)
    nn.init.normal_(layer.weight)
    ema.update()
    own = layer.weight.detach().clone()
    with ema.applied():
        assert torch.equal(layer.weight, ema.average["weight"].bfloat16())
        assert not torch.equal(layer.weight, own)
    assert torch.equal(layer.weight, own)
    assert ema.average["weight"].dtype == torch.float32


def test_ema_resumes_exactly() -> None:
    layer = nn.Linear(3, 3)
    ema, resumed = EMA(layer, decay=0.9), EMA(layer, decay=0.9)
    for _ in range(3):
        nn.init.normal_(layer.weight)
        ema.update()
    state = ema.state_dict()
    ema.update()
    resumed.load_state_dict(state)
    resumed.update()
    assert all(torch.equal(resumed.average[name], value) for name, value in ema.average.items())
    assert resumed.updates == ema.updates == 4
    with pytest.raises(InputError, match="averages of other weights"):
        EMA(nn.Linear(3, 3, bias=False)).load_state_dict(state)
    with pytest.raises(InputError, match="decay from 0 up to 1"):
        EMA(layer, decay=1.0)
