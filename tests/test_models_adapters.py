"""Every adapter in the table, on every family: the contract of adaptation, and the errors."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tiny_encoders import FAMILIES, dinov2, disturb, images, siglip, timm
from vicinal.models.adapters import (
    ADAPTERS,
    BitFit,
    Bottleneck,
    Full,
    LastBlocks,
    LinearHead,
    LoRA,
    VisualPrompt,
    adapt,
    adapter_state,
    adapters_from_config,
    check_adapted,
    load_adapter_state,
    merge,
    parameter_counts,
    save_peft,
    trainable,
)
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.models.modules import SplitAttention
from vicinal.types import InputError

EXAMPLES = {
    "full": Full(),
    "last_blocks": LastBlocks(2),
    "linear_head": LinearHead(dim=16),
    "bitfit": BitFit(),
    "lora": LoRA(rank=4),
    "visual_prompt": VisualPrompt(tokens=3),
    "bottleneck": Bottleneck(dim=5),
}
TEXT_NAMES = {
    "timm": (),
    "open_clip": ("transformer.", "token_embedding", "positional_embedding", "ln_final", "text_projection"),
    "transformers": ("text_model.", "text_projection"),
}
LORA_LAYERS = {"timm": 12 * 4, "open_clip": 3 * 6, "transformers": 3 * 6}


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoder]:
    folder = tmp_path_factory.mktemp("tiny")
    return {name: make(folder / name) for name, make in FAMILIES.items()}


@pytest.fixture
def encoder(encoders: dict[str, Encoder], family: str) -> Encoder:
    return encoders[family]


@pytest.fixture(params=list(EXAMPLES))
def example(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_entry_of_the_table_is_walked(encoders: dict[str, Encoder]) -> None:
    assert set(EXAMPLES) == set(ADAPTERS)
    assert len(ADAPTERS) == 7
    assert len(encoders) == 3


def expected(encoder: Encoder, family: str, example: str) -> set[str]:
    """What should be trained, said again in another way: by names alone."""
    names = [name.removeprefix("model.") for name, _ in encoder.named_parameters()]
    image = [n for n in names if not n.startswith((*TEXT_NAMES[family], "logit_"))]
    if example == "full":
        return {f"model.{n}" for n in image}
    if example == "bitfit":
        return {f"model.{n}" for n in image if n.split(".")[-1] in ("bias", "in_proj_bias")}
    if example == "linear_head":
        return {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}
    if example == "last_blocks":
        last = 12 if family == "timm" else 3
        keep = "|".join(rf"(blocks|layers)\.{i}\." for i in (last - 2, last - 1))
        after = r"^norm\.|ln_post|visual\.proj|post_layernorm|visual_projection"
        return {f"model.{n}" for n in image if re.search(f"{keep}|{after}", n)}
    blocks = range(12 if family == "timm" else 3)
    if example == "visual_prompt":
        return {f"prompts.tokens.{i}" for i in blocks}
    if example == "bottleneck":
        stem = {
            "timm": "blocks",
            "open_clip": "visual.transformer.resblocks",
            "transformers": "vision_model.encoder.layers",
        }
        parts = [f"{layer}.{part}" for layer in ("down", "up") for part in ("weight", "bias")]
        return {f"model.{stem[family]}.{i}.bottleneck.{part}" for i in blocks for part in parts}
    raise AssertionError(example)


def loss_of(encoder: Encoder) -> Tensor:
    z = encoder.encode_image(images())
    return (z * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))).sum()


def test_output_is_the_same_before_the_first_step(encoder: Encoder, example: str) -> None:
    adapted = adapt(encoder, EXAMPLES[example])
    if example == "linear_head":
        assert adapted.embedding_dim == 16
        assert adapted(images()).shape == (2, 16)
    elif example == "visual_prompt":  # tokens among tokens are felt from the start
        assert adapted(images()).shape == encoder(images()).shape
        adapted.prompts = None
        torch.testing.assert_close(adapted(images()), encoder(images()), rtol=0, atol=2e-6)
    else:
        torch.testing.assert_close(adapted(images()), encoder(images()), rtol=0, atol=2e-6)


def test_trains_only_what_it_should(encoder: Encoder, family: str, example: str) -> None:
    given = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    modules = [type(module) for module in encoder.modules()]
    adapted = adapt(encoder, EXAMPLES[example])
    trained = set(trainable(adapted))
    if example == "lora":
        assert all(re.search(r"\.lora_[AB]\.", name) for name in trained)
        assert len(trained) == 2 * LORA_LAYERS[family]
    else:
        assert trained == expected(encoder, family, example)

    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    optimizer = torch.optim.SGD(trainable(adapted).values(), lr=0.1)
    for _ in range(2):  # LoRA's A and a bottleneck's Wdown move in the second step
        optimizer.zero_grad()
        loss_of(adapted).backward()
        optimizer.step()
    changed = {name for name, tensor in adapted.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed <= trained
    assert len(changed) > 0.8 * len(trained)  # a bias of k moves nothing, by the invariance of the softmax
    assert all(torch.equal(tensor, given[name]) for name, tensor in encoder.state_dict().items())
    assert [type(module) for module in encoder.modules()] == modules
    assert encoder.adapters == ()
    assert adapted.adapters == (EXAMPLES[example],)


def test_lora_adapts_as_many_layers_as_the_anatomy_says(encoder: Encoder, family: str) -> None:
    adapted = adapt(encoder, LoRA(rank=4))
    assert sum(hasattr(module, "lora_A") for module in adapted.modules()) == LORA_LAYERS[family]
    tower = adapted.anatomy.image
    for block in tower.blocks:
        for layer in tower.layers():
            assert hasattr(adapted.model.get_submodule(f"{block}.{layer}"), "lora_B")


def test_each_zero_factor_gets_a_gradient_and_changes_the_output(encoder: Encoder, family: str) -> None:
    adapted = adapt(encoder, LoRA(rank=2))
    loss_of(adapted).backward()
    before = adapted(images())
    factors = {name: p for name, p in adapted.named_parameters() if ".lora_B." in name}
    assert len(factors) == LORA_LAYERS[family]
    for name, factor in factors.items():
        assert not factor.any()
        assert factor.grad is not None
        assert factor.grad.any(), name
        with torch.no_grad():
            factor.add_(0.1)
            assert not torch.equal(adapted(images()), before), name
            factor.zero_()


def test_merges_into_the_plain_architecture(encoder: Encoder, example: str) -> None:
    adapted = adapt(encoder, EXAMPLES[example])
    disturb(trainable(adapted))
    merged = merge(adapted)
    torch.testing.assert_close(merged(images()), adapted(images()), rtol=0, atol=1e-5)
    if example == "bottleneck":
        assert list(merged.model.state_dict()) == list(adapted.model.state_dict())
    else:
        assert list(merged.model.state_dict()) == list(encoder.model.state_dict())
        types = [type(module) for module in merged.model.modules()]
        assert types == [type(module) for module in encoder.model.modules()]
    assert merged.anatomy == encoder.anatomy
    assert "peft_config" not in vars(merged.model)
    assert trainable(merged) == {}
    if example != "linear_head":
        assert (merged(images()) - encoder(images())).abs().max() > 1e-3
        assert merged.adapters == ((EXAMPLES[example],) if example in ("visual_prompt", "bottleneck") else ())
    assert adapted.adapters == (EXAMPLES[example],)  # the given one stays


def test_state_holds_what_was_trained_and_comes_back(encoder: Encoder, example: str) -> None:
    adapted = adapt(encoder, EXAMPLES[example])
    disturb(trainable(adapted))
    state = adapter_state(adapted)
    assert set(state) == set(trainable(adapted))
    fresh = adapt(encoder, EXAMPLES[example])
    load_adapter_state(fresh, state)
    assert torch.equal(fresh(images()), adapted(images()))
    state[next(iter(state))].zero_()
    assert torch.equal(fresh(images()), adapted(images()))  # a copy, not a view


def test_state_is_strict(encoders: dict[str, Encoder]) -> None:
    adapted = adapt(encoders["timm"], LoRA(rank=4))
    state = adapter_state(adapted)
    with pytest.raises(InputError, match="another adaptation"):
        load_adapter_state(adapted, dict(list(state.items())[1:]))
    with pytest.raises(InputError, match="another adaptation"):
        load_adapter_state(adapted, state | {"model.norm.weight": torch.zeros(192)})
    with pytest.raises(InputError, match=r"\(8, 192\) in the file, \(4, 192\)"):
        load_adapter_state(adapted, adapter_state(adapt(encoders["timm"], LoRA(rank=8))))


def test_state_holds_running_statistics_of_trained_modules() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[2].requires_grad_(False)
    assert [name for name in adapter_state(model) if name.startswith("1.running")] == [
        "1.running_mean",
        "1.running_var",
    ]
    assert not [name for name in adapter_state(model) if name.startswith("2.")]


def test_an_adapted_encoder_is_saved_and_loaded(encoder: Encoder, example: str, tmp_path: Path) -> None:
    adapted = adapt(encoder, EXAMPLES[example])
    disturb(trainable(adapted))
    loaded = load_encoder(adapted.save(tmp_path / "adapted"))
    assert trainable(loaded) == {}  # whatever was: what is trained next, the next `adapt` says
    assert loaded.fingerprint() == adapted.fingerprint()
    torch.testing.assert_close(loaded(images()), adapted(images()), rtol=0, atol=5e-6)  # frozen, torch fuses more
    merged = load_encoder(merge(adapted).save(tmp_path / "merged"))
    torch.testing.assert_close(merged(images()), adapted(images()), rtol=0, atol=1e-5)
    assert trainable(merged) == {}


# --------------------------------------------------------------------------------------------------------- combinations


def test_first_block_and_last_blocks_together(encoders: dict[str, Encoder]) -> None:
    adapted = adapt(encoders["timm"], LastBlocks(2), LoRA(rank=2, first_block=5))
    blocks = {
        int(match.group(1)) for name in trainable(adapted) if (match := re.search(r"blocks\.(\d+)\..*lora", name))
    }
    assert blocks == {5, 6, 7, 8, 9}  # 10 and 11 are trained in full
    names = set(trainable(adapted))
    assert "model.blocks.11.mlp.fc1.weight" in names
    assert "model.norm.weight" in names
    assert not any(re.search(r"blocks\.[0-4]\.", name) for name in names)
    disturb(trainable(adapted))
    torch.testing.assert_close(merge(adapted)(images()), adapted(images()), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="trains them all in full"):
        adapt(encoders["timm"], Full(), LoRA())


def test_lora_before_others_keeps_what_each_trains(encoder: Encoder) -> None:
    """The injection of peft freezes everything else, and so does a second one with the first."""
    adapted = adapt(
        encoder, BitFit(), LoRA(rank=2, targets=("attention",)), LoRA(rank=3, targets=("mlp",)), LinearHead(8)
    )
    names = list(trainable(adapted))
    ranks = {p.shape[0] for name, p in trainable(adapted).items() if ".lora_A." in name}
    assert ranks == {2, 3}
    assert sum(name.startswith("head.") for name in names) == 4
    assert sum(name.endswith("bias") and not name.startswith("head.") for name in names) > 10
    check_adapted(adapted, images())  # every factor of both is alive
    disturb(trainable(adapted))
    torch.testing.assert_close(merge(adapted)(images()), adapted(images()), rtol=0, atol=1e-5)
    assert merge(adapted).adapters == (LinearHead(8),)


def test_adapting_twice_adds(encoders: dict[str, Encoder]) -> None:
    once = adapt(encoders["open_clip"], LoRA(rank=2))
    twice = adapt(once, LinearHead(8))
    assert twice.adapters == (LoRA(rank=2), LinearHead(8))
    assert set(trainable(once)) < set(trainable(twice))
    again = adapt(twice, LinearHead(5, norm=False))
    assert again(images()).shape == (2, 5)
    assert again.embedding_dim == 5


def test_a_new_head_moves_images_out_of_the_space_of_texts(encoders: dict[str, Encoder]) -> None:
    adapted = adapt(encoders["open_clip"], LinearHead())
    assert adapted.embedding_dim == encoders["open_clip"].embedding_dim
    linear = adapted.head[1]  # type: ignore[index]
    assert not linear.bias.any()
    bound = (6 / (24 + 24)) ** 0.5  # Xavier-uniform
    assert 0.9 * bound < linear.weight.abs().max() <= bound
    with pytest.raises(InputError, match="linear_head"):
        adapted.encode_text(["a bird"])


@pytest.mark.parametrize("family", ["open_clip", "transformers"])
def test_the_text_tower(encoders: dict[str, Encoder], family: str) -> None:
    encoder, texts = encoders[family], ["a bird", "two logos"]
    text = adapt(encoder, LoRA(rank=2, tower="text"))
    assert sum(hasattr(module, "lora_A") for module in text.modules()) == 2 * 6
    torch.testing.assert_close(text.encode_text(texts), encoder.encode_text(texts), rtol=0, atol=2e-6)
    check_adapted(text, images())
    disturb(trainable(text))
    torch.testing.assert_close(text(images()), encoder(images()), rtol=0, atol=2e-6)
    assert (text.encode_text(texts) - encoder.encode_text(texts)).abs().max() > 1e-3
    torch.testing.assert_close(merge(text).encode_text(texts), text.encode_text(texts), rtol=0, atol=1e-5)
    assert merge(text).anatomy == encoder.anatomy

    both = adapt(encoder, LoRA(rank=2, tower="both"))
    assert sum(hasattr(module, "lora_A") for module in both.modules()) == 2 * 6 + 3 * 6
    check_adapted(both, images())
    names = {name.removeprefix("model.") for name in trainable(adapt(encoder, Full("text")))}
    assert names == {n for n, _ in encoder.model.named_parameters() if n.startswith(TEXT_NAMES[family])}
    assert set(trainable(adapt(encoder, Full("both")))) == {name for name, _ in encoder.named_parameters()}


@pytest.mark.parametrize("make", [dinov2, siglip])
def test_other_transformers(make: Callable[[Path], Encoder], tmp_path: Path) -> None:
    encoder = make(tmp_path)
    adapted = adapt(encoder, LoRA(rank=2), LastBlocks(1))
    check_adapted(adapted, images())
    pooling = [name for name in trainable(adapted) if "vision_model.head" in name]
    assert bool(pooling) == (make is siglip)  # attention pooling follows the blocks
    disturb(trainable(adapted))
    torch.testing.assert_close(merge(adapted)(images()), adapted(images()), rtol=0, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- targets


def layers_of(encoder: Encoder, *targets: str) -> set[str]:
    adapted = adapt(encoder, LoRA(rank=2, targets=targets))
    block = adapted.anatomy.image.blocks[0]
    return {
        name.removeprefix(f"{block}.")
        for name, module in adapted.model.named_modules()
        if hasattr(module, "lora_A") and name.startswith(f"{block}.")
    }


def test_words_of_targets(encoders: dict[str, Encoder]) -> None:
    assert layers_of(encoders["timm"], "attention") == {"attn.qkv", "attn.proj"}
    assert layers_of(encoders["timm"], "qkv") == {"attn.qkv"}
    assert layers_of(encoders["timm"], "mlp", "mlp") == {"mlp.fc1", "mlp.fc2"}
    assert layers_of(encoders["open_clip"], "q", "v") == {"attn.q", "attn.v"}
    assert layers_of(encoders["open_clip"], "out") == {"attn.out"}
    assert layers_of(encoders["open_clip"], "qkv") == {"attn.q", "attn.k", "attn.v"}
    assert layers_of(encoders["transformers"], "k") == {"self_attn.k_proj"}
    untouched = adapt(encoders["open_clip"], LoRA(rank=2, targets=("mlp",)))
    assert not any(isinstance(module, SplitAttention) for module in untouched.modules())


def test_wrong_words_are_errors_that_say_which_there_are(encoders: dict[str, Encoder]) -> None:
    with pytest.raises(InputError, match=r"did you mean 'attention'\?\); it has attention, mlp, qkv, out"):
        adapt(encoders["timm"], LoRA(targets=("attentoin",)))
    with pytest.raises(InputError, match=r"q, k and v are one layer there, attn\.qkv, so take qkv"):
        adapt(encoders["timm"], LoRA(targets=("q",)))
    with pytest.raises(InputError, match="it has attention, mlp, q, k, v, out, qkv"):
        adapt(encoders["open_clip"], LoRA(targets=("proj",)))
    with pytest.raises(InputError, match="targets is empty"):
        adapt(encoders["timm"], LoRA(targets=()))
    with pytest.raises((InputError, TypeError), match=r"give a list: \[mlp\]|parameter 'targets'"):
        LoRA(targets="mlp")  # type: ignore[arg-type]


def test_what_does_not_fit_is_an_error(encoders: dict[str, Encoder]) -> None:
    with pytest.raises(InputError, match="has no text tower"):
        adapt(encoders["timm"], LoRA(tower="text"))
    with pytest.raises(InputError, match="has no text tower"):
        adapt(encoders["timm"], Full("both"))
    with pytest.raises(InputError, match=r"first_block is 12, but the image tower of .* has 12 blocks"):
        adapt(encoders["timm"], LoRA(first_block=12))
    with pytest.raises(InputError, match=r"last_blocks\.n is 4, but .* has 3 blocks"):
        adapt(encoders["open_clip"], LastBlocks(4))
    with pytest.raises(InputError, match="has a lora already"):
        adapt(encoders["timm"], LoRA(), LoRA(targets=("mlp",)))
    for wrong in (lambda: LoRA(rank=0), lambda: LoRA(dropout=1.0), lambda: LastBlocks(0), lambda: LinearHead(0)):
        with pytest.raises(InputError):
            wrong()
    network = copy.deepcopy(encoders["timm"])
    network.anatomy = type(network.anatomy)("patch_embed", type(network.anatomy.image)())
    with pytest.raises(InputError, match="no transformer blocks; use linear_head or full"):
        adapt(network, LoRA())
    for parameter_name, _ in list(network.model.named_parameters()):
        if parameter_name.endswith("bias"):
            owner, _, last = parameter_name.rpartition(".")
            setattr(network.model.get_submodule(owner), last, None)
    with pytest.raises(InputError, match=r"BitFit.* matches no weight of"):
        adapt(network, BitFit())


def test_recipes() -> None:
    methods = adapters_from_config([{"lora": {"rank": 16, "targets": ["q", "v"]}}, {"linear_head": {"dim": 512}}])
    assert methods == (LoRA(rank=16, targets=("q", "v")), LinearHead(dim=512))
    assert adapters_from_config([{"full": None}, {"bitfit": {}}]) == (Full(), BitFit())
    with pytest.raises(InputError, match=r"unknown method 'loar' in `adapt` \(did you mean 'lora'\?\)"):
        adapters_from_config([{"loar": {}}])
    with pytest.raises(InputError, match=r"lora has no setting 'rnak' \(did you mean 'rank'\?\); it has rank, alpha"):
        adapters_from_config([{"lora": {"rnak": 4}}])
    with pytest.raises(InputError, match="one method with its settings"):
        adapters_from_config([{"lora": {}, "full": {}}])
    with pytest.raises(InputError, match=r"last_blocks: .*'n'"):
        adapters_from_config([{"last_blocks": {}}])
    assert LoRA(rank=4).scale == 2.0
    assert LoRA(rank=4, alpha=4.0).scale == 1.0


def test_scale_is_alpha_over_rank(encoder: Encoder) -> None:
    adapted = adapt(encoder, LoRA(rank=4, alpha=6.0, targets=("mlp",)))
    disturb(trainable(adapted))
    tower = adapted.anatomy.image
    layer = adapted.model.get_submodule(f"{tower.blocks[0]}.{tower.mlp[0]}")
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # type: ignore[index]
    x = torch.randn(3, A.shape[1])
    by_hand = layer.base_layer(x) + 1.5 * (x @ A.T @ B.T)  # type: ignore[operator]
    torch.testing.assert_close(layer(x), by_hand)


def test_dropout_is_alive_in_training_alone(encoder: Encoder) -> None:
    adapted = adapt(encoder, LoRA(rank=2, dropout=0.5, targets=("attention",)))
    disturb(trainable(adapted), scale=0.3)
    assert torch.equal(adapted.eval()(images()), adapted(images()))
    assert not torch.equal(adapted.train()(images()), adapted(images()))


def test_factors_are_float32_on_a_half_precision_backbone(encoder: Encoder) -> None:
    adapted = adapt(copy.deepcopy(encoder).bfloat16(), LoRA(rank=2))
    assert {p.dtype for p in trainable(adapted).values()} == {torch.float32}
    disturb(trainable(adapted))
    assert adapted(images().bfloat16()).dtype == torch.bfloat16
    assert {p.dtype for p in merge(adapted).parameters()} == {torch.bfloat16}


def test_counts(encoders: dict[str, Encoder]) -> None:
    encoder = encoders["timm"]
    total = sum(p.numel() for p in encoder.parameters())
    lora = 12 * 4 * ((192 + 576) + (192 + 192) + (192 + 768) + (768 + 192))  # r (in + out) for each layer
    assert parameter_counts(adapt(encoder, LoRA(rank=4))) == {
        "trained": lora,
        "total": total + lora,
        "inference": total,
        "added": 0,
    }
    head = 2 * 192 + 192 * 16 + 16
    counts = parameter_counts(adapt(encoder, LinearHead(16)))
    assert counts == {"trained": head, "total": total + head, "inference": total + head, "added": head}
    biases = sum(p.numel() for name, p in encoder.named_parameters() if name.endswith("bias"))
    prompts, narrow = 12 * 10 * 192, 12 * (2 * 192 * 64 + 64 + 192)
    adapted = adapt(encoder, VisualPrompt(10), BitFit(), Bottleneck(64), LoRA(rank=4), LinearHead(16))
    added = prompts + narrow + head
    assert parameter_counts(adapted) == {
        "trained": added + biases + lora,
        "total": total + added + lora,
        "inference": total + added,
        "added": added,
    }
    assert sum(p.numel() for p in merge(adapted).parameters()) == total + added  # what is left to run, counted


# ------------------------------------------------------------------------------------------------------- start-up check


def snapshot(encoder: Encoder) -> tuple[dict[str, Tensor], list[Tensor | None], list[bool], Tensor]:
    return (
        {name: tensor.clone() for name, tensor in encoder.state_dict().items()},
        [None if p.grad is None else p.grad.clone() for p in encoder.parameters()],
        [module.training for module in encoder.modules()],
        torch.get_rng_state(),
    )


def test_check_passes_and_leaves_no_trace(encoder: Encoder, example: str) -> None:
    adapted = adapt(encoder, EXAMPLES[example]).train()
    adapted.model.eval()
    next(iter(trainable(adapted).values())).grad = torch.ones_like(next(iter(trainable(adapted).values())))
    before = snapshot(adapted)
    with torch.no_grad():  # it turns gradients on for itself
        check_adapted(adapted, images())
    after = snapshot(adapted)
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    assert [g is None for g in before[1]] == [g is None for g in after[1]]
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True) if a is not None and b is not None)
    assert before[2] == after[2]
    assert torch.equal(before[3], after[3])


def test_check_passes_after_training_too(encoder: Encoder) -> None:
    adapted = adapt(encoder, LoRA(rank=2))
    disturb(trainable(adapted), scale=0.1)
    check_adapted(adapted, images())


class Bypass(nn.Module):
    """A layer that is adapted, but used by its weight alone: what happens to `out_proj` in fused attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)  # type: ignore[arg-type]


class GradientAlone(nn.Module):
    """A layer whose update gets a gradient and has no effect."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return self.layer.base_layer(x) + (y - y.detach())  # type: ignore[operator]


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [(Bypass, "gets no gradient"), (GradientAlone, "changes nothing")],
    ids=["bypass", "gradient"],
)
def test_check_finds_a_dead_update(encoder: Encoder, wrapper: type[nn.Module], message: str) -> None:
    adapted = adapt(encoder, LoRA(rank=2))
    tower = adapted.anatomy.image
    name = f"{tower.blocks[1]}.{tower.mlp[1]}"
    parent, _, child = name.rpartition(".")
    setattr(adapted.model.get_submodule(parent), child, wrapper(adapted.model.get_submodule(name)))
    before = snapshot(adapted)
    with pytest.raises(InputError, match=f"{re.escape(name)}.* was adapted, but its update {message}"):
        check_adapted(adapted, images())
    after = snapshot(adapted)
    assert all(torch.equal(before[0][key], after[0][key]) for key in before[0])
    assert all(gradient is None for gradient in after[1])


def test_check_finds_blocks_that_do_not_reach_the_embedding(encoders: dict[str, Encoder]) -> None:
    adapted = adapt(encoders["timm"], LastBlocks(2))
    adapted.model.blocks[10].register_forward_hook(lambda module, x, y: y.detach())  # type: ignore[index,union-attr]
    with pytest.raises(InputError, match=r"model\.blocks\.10 is trained, but gets no gradient"):
        check_adapted(adapted, images())
    with pytest.raises(InputError, match="nothing is trained"):
        check_adapted(adapt(encoders["timm"]), images())
    detached = adapt(encoders["timm"], LinearHead(4))
    detached.head.register_forward_hook(lambda module, x, y: (y - y.detach()) * 0 + x[0][:, :4])
    with pytest.raises(InputError, match="all else that is trained gets no gradient"):
        check_adapted(detached, images())


def test_check_needs_few_forward_passes(tmp_path: Path) -> None:
    adapted = adapt(timm(tmp_path), LoRA())
    calls = []
    adapted.model.register_forward_hook(lambda module, x, y: calls.append(1))
    check_adapted(adapted, images())
    assert len(calls) == 3  # one with the backward pass, two with all 48 factors moved


def test_no_bias_that_bitfit_trains_is_dead(encoders: dict[str, Encoder]) -> None:
    """No classifier of the pretraining, no pooler that is not used: each bias takes part in the embedding."""
    assert len(encoders) >= 3
    for family, encoder in encoders.items():
        adapted = adapt(encoder, BitFit())
        adapted(images()).square().sum().backward()
        trained = trainable(adapted)
        assert trained, family
        assert all(name.endswith("bias") for name in trained), family
        dead = [name for name, parameter in trained.items() if parameter.grad is None]
        assert not dead, (family, dead)


# ---------------------------------------------------------------------------------------------------------- peft layout


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft asks a model of transformers
@pytest.mark.parametrize("more", [(), (BitFit(),)], ids=["lora", "lora and bitfit"])
@pytest.mark.parametrize("family", ["timm", "transformers"])
def test_peft_reads_what_is_saved(
    encoders: dict[str, Encoder], family: str, more: tuple[BitFit, ...], tmp_path: Path
) -> None:
    from peft import PeftModel

    encoder = encoders[family]
    adapted = adapt(
        encoder, LoRA(rank=4, targets=("attention",)), LoRA(rank=2, alpha=2.0, targets=("mlp",), first_block=1), *more
    )
    disturb(trainable(adapted))
    folder = save_peft(adapted, tmp_path / "adapter")
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    plain = copy.deepcopy(encoder)
    plain.model = PeftModel.from_pretrained(plain.model, folder).eval()
    plain.family = type(plain.family)(  # the wrapper has the methods of the model, but not its attributes' names
        **{f: getattr(plain.family, f) for f in plain.family.__dataclass_fields__}
        | {"encode_image": lambda model, x: encoder.family.encode_image(model.base_model.model, x)}
    )
    torch.testing.assert_close(plain(images()), adapted(images()), rtol=0, atol=1e-6)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["bias"] == ("all" if more else "none")
    assert config["inference_mode"] is True
    names = {name for name, module in adapted.model.named_modules() if hasattr(module, "lora_A")}
    assert set(config["target_modules"]) == names


def test_peft_layout_of_the_text_tower_of_open_clip(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    """Its names end those of the image tower, and peft takes names as endings."""
    from peft import PeftModel

    encoder = encoders["open_clip"]
    adapted = adapt(encoder, LoRA(rank=2, targets=("mlp",), tower="text"))
    disturb(trainable(adapted))
    model = PeftModel.from_pretrained(
        copy.deepcopy(encoder.model), save_peft(adapted, tmp_path)
    ).base_model.model.eval()
    tokens = encoder.tokenize(["a bird"])
    torch.testing.assert_close(model.encode_text(tokens), adapted.model.encode_text(tokens), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.encode_image(images()), encoder.model.encode_image(images()), rtol=0, atol=2e-6)


def test_peft_layout_refuses_what_it_cannot_hold(encoders: dict[str, Encoder], tmp_path: Path) -> None:
    for encoder, methods, message in (
        (encoders["timm"], (LoRA(), LinearHead(8)), "holds lora and bitfit alone, here is .*LinearHead"),
        (encoders["timm"], (LoRA(), VisualPrompt()), "holds lora and bitfit alone, here is .*VisualPrompt"),
        (encoders["timm"], (Bottleneck(), LoRA()), "holds lora and bitfit alone, here is .*Bottleneck"),
        (encoders["timm"], (), "holds lora and bitfit alone, here is no lora"),
        (encoders["timm"], (BitFit(),), "here is no lora"),
        (encoders["open_clip"], (LoRA(),), "one fused layer"),
        (
            encoders["timm"],
            (LoRA(targets=("mlp",), dropout=0.1), LoRA(targets=("attention",))),
            "one dropout for all layers",
        ),
    ):
        with pytest.raises(InputError, match=message):
            save_peft(adapt(encoder, *methods), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
