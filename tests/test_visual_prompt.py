"""Visual prompts, and the two halves of the image tower, against the libraries' own forward passes."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny_encoders
from tiny_encoders import disturb
from vicinal.models import encoder as encoder_module
from vicinal.models.adapters import (
    BitFit,
    Bottleneck,
    Full,
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
from vicinal.models.encoder import Encoder
from vicinal.models.merging import interpolate
from vicinal.models.prompts import Prompts, through_blocks
from vicinal.recipe import Recipe
from vicinal.types import InputError

# ------------------------------------------------------------------------------------------- models of every kind, tiny


def _timm(name: str, size: int = 32) -> Callable[[Path], Encoder]:
    return lambda folder: load_encoder(f"timm:{name}", size=size, random_init=True)


SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 16}


def _registers(folder: Path) -> Encoder:
    from transformers import Dinov2WithRegistersConfig

    config = Dinov2WithRegistersConfig(**SHAPE, image_size=32, num_register_tokens=3)
    return tiny_encoders._of_transformers(config, folder)


def _vit(folder: Path) -> Encoder:
    from transformers import ViTConfig

    return tiny_encoders._of_transformers(ViTConfig(**SHAPE, image_size=32), folder)


def _naflex(folder: Path) -> Encoder:
    from transformers import Siglip2Config

    text = {**SHAPE, "vocab_size": 64, "max_position_embeddings": 12, "eos_token_id": 63, "bos_token_id": 0}
    config = Siglip2Config(vision_config={**SHAPE, "num_patches": 16}, text_config=text)
    return tiny_encoders._of_transformers(config, folder)


def _open_clip(size: int | None = None, **changes: Any) -> Callable[[Path], Encoder]:  # noqa: ANN401 (pieces of JSON)
    def make(folder: Path) -> Encoder:
        config = {
            "embed_dim": 32,
            "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 16},
            "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        }
        for key, value in changes.items():
            config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        return load_encoder(f"open_clip:local-dir:{folder}", size=size, random_init=True)

    return make


COCA = {
    "custom_text": True,
    "multimodal_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    "vision_cfg": {"output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 4},
    "text_cfg": {"embed_cls": True, "output_tokens": True},
}
SIGLIP_TOWER = {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160}
MODELS: dict[str, Callable[[Path], Encoder]] = {
    "timm, class token": _timm("test_vit"),
    "timm, registers, mean": _timm("test_vit2"),
    "timm, attention pooling": _timm("test_vit3"),
    "timm, distilled": _timm("deit_tiny_distilled_patch16_224"),
    "timm, rotary positions": _timm("eva02_tiny_patch14_224", 28),
    "open_clip": tiny_encoders.open_clip,
    "open_clip, mean": _open_clip(vision_cfg={"pool_type": "avg", "final_ln_after_pool": True}),
    "open_clip, CoCa": _open_clip(**COCA),
    "open_clip, timm": _open_clip(32, embed_dim=96, custom_text=True, vision_cfg=SIGLIP_TOWER),
    "transformers, CLIP": tiny_encoders.transformers,
    "transformers, SigLIP": tiny_encoders.siglip,
    "transformers, NaFlex": _naflex,
    "transformers, DINOv2": tiny_encoders.dinov2,
    "transformers, registers": _registers,
    "transformers, ViT": _vit,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Encoder]:
    folder, encoders = tmp_path_factory.mktemp("models"), {}

    def get(name: str) -> Encoder:
        if name not in encoders:
            torch.manual_seed(0)
            encoders[name] = MODELS[name](folder / name.replace(", ", "_").replace(" ", "_"))
            disturb(dict(encoders[name].named_parameters()), scale=0.1)  # no layer scale stays at 1e-5
        return encoders[name]

    return get


@pytest.fixture(params=list(MODELS))
def encoder(request: pytest.FixtureRequest, made: Callable[[str], Encoder]) -> Encoder:
    return made(request.param)


def images(encoder: Encoder, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *encoder.preprocess.size, generator=torch.Generator().manual_seed(7))


def blocks_of(encoder: Encoder) -> list[nn.Module]:
    return [encoder.model.get_submodule(name) for name in encoder.anatomy.image.blocks]


def close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-5 * float(expected.detach().abs().max()))


@contextmanager
def hooked(encoder: Encoder, prompts: list[Tensor], shallow: bool = False) -> Iterator[Encoder]:
    """The same by hand, in the library's own forward pass: prompts *behind* the image's tokens, by hooks on blocks."""
    blocks, handles = blocks_of(encoder), []
    rotary = hasattr(encoder.model, "rope")  # there the first places are those that are not turned

    def join(P: Tensor) -> Callable[..., tuple[Tensor, ...]]:
        def hook(block: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            parts = [inputs[0], P.expand(len(inputs[0]), -1, -1)]
            return (torch.cat(parts[::-1] if rotary else parts, dim=1), *inputs[1:])

        return hook

    def drop(count: int) -> Callable[..., Tensor]:
        return lambda block, inputs, output: output[:, count:] if rotary else output[:, : output.shape[1] - count]

    for i, P in enumerate(prompts):
        last = blocks[-1] if shallow else blocks[i]
        handles += [blocks[i].register_forward_pre_hook(join(P)), last.register_forward_hook(drop(P.shape[-2]))]
        for block in blocks if rotary and shallow else blocks[i : i + 1] if rotary else []:
            block.attn.num_prefix_tokens += P.shape[-2]
    try:
        yield encoder
    finally:
        for handle in handles:
            handle.remove()
        for i, P in enumerate(prompts):
            for block in blocks if rotary and shallow else blocks[i : i + 1] if rotary else []:
                block.attn.num_prefix_tokens -= P.shape[-2]


# ----------------------------------------------------------------------------------------------------------- the halves


def test_every_kind_is_here() -> None:
    assert len(MODELS) == 15
    assert {name.partition(",")[0] for name in MODELS} == {"timm", "open_clip", "transformers"}


def test_the_halves_make_the_whole(encoder: Encoder) -> None:
    x = images(encoder, 3)
    with torch.no_grad():
        whole, tokens = encoder.encode_image(x), encoder.patch_tokens(x)
        assert tokens.dim() == 3
        assert len(tokens) == 3
        close(encoder.encode_tokens(tokens), whole)
        none = torch.zeros(3, 0, tokens.shape[-1])
        close(encoder.encode_tokens(tokens, [none] * len(blocks_of(encoder))), whole)  # no prompts: the plain tower


@pytest.mark.parametrize("size", [(48, 48), (32, 64)], ids=str)
@pytest.mark.parametrize("name", ["timm, class token", "open_clip", "transformers, CLIP", "transformers, SigLIP"])
def test_the_halves_at_another_size(name: str, size: tuple[int, int], made: Callable[[str], Encoder], tmp_path: Path):
    adapted = adapt(made(name), VisualPrompt(tokens=2))
    other = load_encoder(adapted.save(tmp_path / "model"), size=size)
    x = torch.randn(2, 3, *size)
    assert other.preprocess.size == size
    prompts = [tokens.detach() for tokens in other.prompts.tokens]  # type: ignore[union-attr]
    result = other(x)
    other.prompts = None
    close(other.encode_tokens(other.patch_tokens(x)), other(x))
    with hooked(other, prompts):
        close(result, other(x))


def test_what_cannot_be_cut_open_says_so() -> None:
    for name in ("resnet10t", "vit_relpos_small_patch16_224"):
        encoder = load_encoder(f"timm:{name}", random_init=True)
        with pytest.raises(InputError, match="cannot be cut open in front of its blocks"):
            encoder.patch_tokens(images(encoder))
    with pytest.raises(InputError, match="cannot be cut open"):
        adapt(encoder, VisualPrompt())
    with pytest.raises(InputError, match="no transformer blocks"):
        adapt(load_encoder("timm:resnet10t", random_init=True), VisualPrompt())


def test_a_tower_that_runs_its_blocks_otherwise_is_refused(made: Callable[[str], Encoder]) -> None:
    """A class derived from a known one, which does something more between the blocks."""
    encoder = copy.deepcopy(made("timm, class token"))
    kind = type(encoder.model)
    encoder.model.__class__ = type("Other", (kind,), {"forward_head": lambda m, x: kind.forward_head(m, x)})
    assert adapt(encoder, VisualPrompt()).prompts is not None  # a derived class is no mistake in itself
    encoder.model.__class__ = type("Other", (kind,), {"forward": lambda m, x: kind.forward(m, x).flip(-1)})
    with pytest.raises(InputError, match="in a way of its own"):
        adapt(encoder, VisualPrompt())


# ------------------------------------------------------------------------------------------------- placed and dropped


@pytest.mark.parametrize(
    "method",
    [VisualPrompt(3, std=1.0), VisualPrompt(4, depth=2, decrement=3, std=1.0), VisualPrompt(3, "shallow", std=1.0)],
    ids=["deep", "two", "shallow"],
)
def test_equals_the_librarys_own_forward_with_hooks(encoder: Encoder, method: VisualPrompt) -> None:
    adapted = adapt(encoder, method)
    prompts = [tokens.detach() for tokens in adapted.prompts.tokens]  # type: ignore[union-attr]
    counts = {"deep": [3] * len(blocks_of(encoder)), 2: [4, 1], "shallow": [3]}[method.depth]
    assert [len(P) for P in prompts] == counts
    with hooked(encoder, prompts, shallow=method.depth == "shallow"):
        expected = encoder(images(encoder))
    close(adapted(images(encoder)), expected)
    assert (adapted(images(encoder)) - encoder(images(encoder))).abs().max() > 1e-4 * expected.abs().max()


def test_prompts_are_dropped_before_the_pooling(encoder: Encoder) -> None:
    seen: list[int] = []
    adapted = adapt(encoder, VisualPrompt(5))
    tokens = adapted.patch_tokens(images(encoder))
    halves = adapted._halves()
    pool = lambda x: seen.append(x.shape[1]) or halves.pool(x)  # noqa: E731
    adapted._halves = lambda: halves._replace(pool=pool)  # type: ignore[method-assign]
    adapted(images(encoder))
    assert seen == [tokens.shape[1]]


def test_each_image_may_have_prompts_of_its_own(encoder: Encoder) -> None:
    """What class prompts need: given prompts stand in the place of the encoder's own, image by image."""
    adapted = adapt(encoder, VisualPrompt(2))
    x = images(encoder)
    C, blocks = adapted.patch_tokens(x).shape[-1], len(blocks_of(encoder))
    given = [torch.randn(2, 3, C, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(blocks)]
    result = adapted.encode_tokens(adapted.patch_tokens(x), given)
    for i in range(2):
        with hooked(encoder, [P[i].detach() for P in given]):
            close(result[i : i + 1], encoder(x[i : i + 1]))
    result[0].square().sum().backward()
    for P in given:
        assert P.grad is not None
        assert P.grad[0].any()
        assert not P.grad[1].any()
    with pytest.raises(ValueError, match=f"prompts for {blocks + 1} blocks"):
        adapted.encode_tokens(adapted.patch_tokens(x), [*given, given[0]])


def test_the_patch_embedding_is_computed_once_for_two_towers(made: Callable[[str], Encoder]) -> None:
    adapted = adapt(made("timm, class token"), VisualPrompt(2), LinearHead(5))
    calls: list[int] = []
    adapted.model.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    tokens = adapted.patch_tokens(images(adapted))
    head = nn.Linear(64, 7)
    sample, proxy = adapted.encode_tokens(tokens), adapted.encode_tokens(tokens, [torch.zeros(2, 1, 64)], head=head)
    assert (sample.shape, proxy.shape) == ((2, 5), (2, 7))
    assert calls == [1]
    torch.testing.assert_close(sample, adapted(images(adapted)))


def test_through_blocks_by_hand() -> None:
    """Blocks that add up all tokens show what stood in front of them."""
    seen: list[list[float]] = []

    def step(block: nn.Module, tokens: Tensor, front: int) -> Tensor:
        seen.append([*tokens[0, :, 0].tolist(), front])
        return tokens + 10

    def P(value: float, count: int = 1) -> Tensor:
        return torch.full((1, count, 1), value)

    blocks, tokens = [nn.Identity()] * 4, torch.zeros(1, 2, 1)
    assert through_blocks(step, blocks, tokens, [P(1), P(2, 2), None])[0, :, 0].tolist() == [40.0, 40.0]
    assert seen == [[1, 0, 0, 1], [2, 2, 10, 10, 2], [12, 12, 20, 20, 2], [30, 30, 0]]
    assert not tokens.any()  # what it is given stays


# ---------------------------------------------------------------------------------------------- numbers, start, dropout


@pytest.mark.parametrize(
    ("method", "width", "number"),
    [
        (VisualPrompt(10), 384, 46_080),  # CUB, ViT-S
        (VisualPrompt(20), 768, 184_320),
        (VisualPrompt(80, depth=11, decrement=2), 384, 295_680),  # Cars, ViT-S
        (VisualPrompt(80, depth=10, decrement=2), 768, 545_280),
        (VisualPrompt(90), 384, 414_720),  # SOP, ViT-S
        (VisualPrompt(90, decrement=5), 768, 576_000),
        (VisualPrompt(90), 768, 829_440),  # In-Shop, ViT-B
        (VisualPrompt(10, "shallow"), 384, 3_840),
        (VisualPrompt(5, depth=4, decrement=5), 768, 3_840),  # what comes to none takes no memory
    ],
    ids=str,
)
def test_as_many_numbers_as_are_used(method: VisualPrompt, width: int, number: int) -> None:
    prompts = Prompts(method.counts(blocks=12), width)
    assert sum(p.numel() for p in prompts.parameters()) == number
    assert all(p.numel() for p in prompts.parameters())


def test_they_start_normal() -> None:
    torch.manual_seed(0)
    tokens = torch.cat([*Prompts([50] * 12, 384, std=0.03).tokens]).detach()
    assert abs(float(tokens.std()) - 0.03) < 3e-4
    assert abs(float(tokens.mean())) < 3e-4
    assert float(tokens.abs().max()) > 0.1  # no truncated or uniform distribution


def test_dropout_differs_from_image_to_image_in_training_alone(made: Callable[[str], Encoder]) -> None:
    adapted = adapt(made("timm, class token"), VisualPrompt(3, dropout=0.5))
    x = images(adapted, 1).expand(2, -1, -1, -1)
    still = adapted.eval()(x)
    torch.testing.assert_close(still[0], still[1], rtol=0, atol=1e-6)
    moving = adapted.train()(x)
    assert (moving[0] - moving[1]).abs().max() > 1e-4
    kept = adapted.prompts(4, 12)[0]  # type: ignore[misc]
    zero = (kept == 0).float().mean()
    assert 0.4 < float(zero) < 0.6
    torch.testing.assert_close(kept[kept != 0], 2 * adapted.prompts.tokens[0].expand(4, -1, -1)[kept != 0])  # type: ignore[union-attr]


def test_prompts_stay_in_float32_on_a_half_precision_backbone(encoder: Encoder) -> None:
    half = copy.deepcopy(encoder).bfloat16()
    adapted = adapt(half, VisualPrompt(2))
    assert {p.dtype for p in trainable(adapted).values()} == {torch.float32}
    z = adapted(images(encoder).bfloat16())
    assert z.dtype == torch.bfloat16
    z.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable(adapted).values())
    with torch.autocast("cpu", torch.bfloat16):
        assert adapt(encoder, VisualPrompt(2))(images(encoder)).isfinite().all()


# ------------------------------------------------------------------------------------- trained, saved, merged, combined


def test_a_step_changes_the_prompts_alone(encoder: Encoder) -> None:
    adapted = adapt(encoder, VisualPrompt(2)).train()
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    optimizer = torch.optim.SGD(trainable(adapted).values(), lr=0.1)
    z = adapted(images(encoder))
    (z * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
    optimizer.step()
    changed = {  # bits are compared: CoCa has a weight that is never filled, and may be NaN
        name
        for name, tensor in adapted.state_dict().items()
        if tensor.numpy(force=True).tobytes() != before[name].numpy(force=True).tobytes()
    }
    assert changed == {f"prompts.tokens.{i}" for i in range(len(blocks_of(encoder)))}


@pytest.mark.parametrize("depth", ["shallow", 2])
@pytest.mark.parametrize("name", ["timm, rotary positions", "open_clip", "transformers, SigLIP"])
def test_saved_loaded_merged(name: str, depth: Any, made: Callable[[str], Encoder], tmp_path: Path) -> None:  # noqa: ANN401
    encoder = made(name)
    adapted = adapt(encoder, VisualPrompt(3, depth), LoRA(rank=2, targets=("mlp",)))
    disturb(trainable(adapted))
    expected = adapted(images(encoder))
    loaded, merged = load_encoder(adapted.save(tmp_path / "model")), merge(adapted)
    again = load_encoder(merged.save(tmp_path / "merged"))
    for other in (loaded, merged, again):
        close(other(images(encoder)), expected)
        assert trainable(other) == {}
    assert loaded.adapters == adapted.adapters
    assert merged.adapters == again.adapters == (VisualPrompt(3, depth),)
    assert len({e.fingerprint() for e in (encoder, adapted, merged)}) == 3
    with torch.no_grad():
        merged.prompts.tokens[0].add_(1)  # type: ignore[union-attr]
    close(adapted(images(encoder)), expected)  # the given one is another


PAPER = [{"visual_prompt": {"tokens": 10}}, {"bitfit": {}}, {"linear_head": {"dim": 16}}]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_the_papers_combination_in_any_order(order: tuple[int, ...], made: Callable[[str], Encoder], tmp_path: Path):
    encoder = made("timm, class token")
    adapted = adapt(encoder, *adapters_from_config([PAPER[i] for i in order]))
    blocks, C = len(blocks_of(encoder)), 64
    biases = {name for name, _ in encoder.named_parameters() if name.endswith("bias")}
    head = {f"head.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")}
    assert set(trainable(adapted)) == biases | head | {f"prompts.tokens.{i}" for i in range(blocks)}
    added = blocks * 10 * C + 2 * C + 16 * C + 16
    total = sum(p.numel() for p in encoder.parameters())
    assert parameter_counts(adapted) == {
        "trained": added + sum(encoder.get_parameter(name).numel() for name in biases),
        "total": total + added,
        "inference": total + added,
        "added": added,
    }
    check_adapted(adapted, images(encoder))
    disturb(trainable(adapted))
    close(load_encoder(adapted.save(tmp_path / "model"))(images(encoder)), adapted(images(encoder)))


@pytest.mark.parametrize("name", ["timm, class token", "open_clip", "transformers, CLIP"])
def test_with_every_other_method(name: str, made: Callable[[str], Encoder], tmp_path: Path) -> None:
    encoder = made(name)
    methods = (LoRA(rank=2), VisualPrompt(2), Bottleneck(dim=4), LinearHead(6), BitFit())
    adapted = adapt(adapt(encoder, *methods[:2]), *methods[2:])
    check_adapted(adapted, images(encoder))
    disturb(trainable(adapted))
    close(merge(adapted)(images(encoder)), adapted(images(encoder)))
    close(load_encoder(adapted.save(tmp_path / "model"))(images(encoder)), adapted(images(encoder)))
    everything = adapt(encoder, VisualPrompt(2), Full())
    assert {n for n in trainable(everything) if n.startswith("prompts.")}
    assert not {n for n in trainable(everything) if n.startswith(("model.text", "model.transformer."))}
    if encoder.anatomy.text is not None:
        text = adapt(encoder, VisualPrompt(2)).encode_text(["a bird"])
        torch.testing.assert_close(text, encoder.encode_text(["a bird"]))
        assert not any(n.startswith("prompts.") for n in trainable(adapt(merge(adapted), Full("text"))))


@pytest.mark.parametrize("method", [BitFit(), Full()], ids=["bitfit", "full"])
def test_no_dead_weight_is_trained(encoder: Encoder, method: BitFit | Full) -> None:
    """No classifier of pre-training, no mask token: what is counted as trained gets a gradient."""
    adapted = adapt(encoder, method)
    adapted(images(encoder)).square().sum().backward()
    assert [name for name, p in trainable(adapted).items() if p.grad is None] == []


# ------------------------------------------------------------------------------------------------- never a silent no-op


def test_the_check_passes(encoder: Encoder) -> None:
    for method in (VisualPrompt(2), VisualPrompt(2, "shallow")):
        check_adapted(adapt(encoder, method), images(encoder))


def test_the_check_finds_prompts_that_are_not_used(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = adapt(encoder, VisualPrompt(2))

    def forgets(step: Any, blocks: Any, tokens: Tensor, prompts: list[Tensor]) -> Tensor:  # noqa: ANN401
        return through_blocks(step, blocks, tokens, [prompts[0], *(P.detach() for P in prompts[1:])])

    monkeypatch.setattr(encoder_module, "through_blocks", forgets)
    with pytest.raises(InputError, match=r"prompts\.tokens\.1 was adapted, but its update gets no gradient"):
        check_adapted(adapted, images(encoder))


@pytest.mark.parametrize("method", [VisualPrompt(2), Bottleneck(4)], ids=["prompts", "bottleneck"])
def test_nothing_lies_between_with_and_without(method: VisualPrompt, made: Callable[[str], Encoder]) -> None:
    encoder = made("timm, class token")
    after = adapt(encoder, method, LinearHead(4))
    for pair in ((encoder, after), (after, encoder)):
        with pytest.raises(InputError, match=r"where the tuned model has .*leave wise_ft out"):
            interpolate(*pair, 0.5)
    further = adapt(after, Full())
    disturb(trainable(further), scale=0.1)
    middle = interpolate(after, further, 0.5).state_dict()
    for name, tensor in after.state_dict().items():
        torch.testing.assert_close(middle[name], (tensor + further.state_dict()[name]) / 2)


def test_mistakes_are_named(made: Callable[[str], Encoder]) -> None:
    for settings, message in (
        ({"tokens": 0}, "tokens is 0"),
        ({"depth": 0}, "depth is 0; give at least 1 block"),
        ({"decrement": -1}, "decrement is -1"),
        ({"decrement": 1, "depth": "shallow"}, r"decrement is 1; .*\(shallow: 0\)"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
        ({"std": 0.0}, r"std is 0\.0"),
    ):
        with pytest.raises(InputError, match=rf"visual_prompt\.{message}"):
            VisualPrompt(**settings)  # type: ignore[arg-type]
    encoder = made("timm, class token")
    with pytest.raises(InputError, match=r"depth is 99, but .* has \d+ blocks in its image tower"):
        adapt(encoder, VisualPrompt(depth=99))
    with pytest.raises(InputError, match="has visual prompts already"):
        adapt(adapt(encoder, VisualPrompt()), VisualPrompt())
    with pytest.raises(InputError, match=r"visual_prompt has no setting 'token' \(did you mean 'tokens'\?\)"):
        adapters_from_config([{"visual_prompt": {"token": 3}}])


def test_a_recipe_takes_them_by_name(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: {folder: pictures}\nmodel: timm:test_vit\n"
        "adapt: [{visual_prompt: {tokens: 5, depth: shallow}}, {bottleneck: {dim: 8}}, {bitfit: {}}]\n"
    )
    chosen = [adapter.chosen for adapter in Recipe.load(path).adapt]
    config = [{name: settings.model_dump()} for name, settings in chosen]
    assert adapters_from_config(config) == (VisualPrompt(5, "shallow"), Bottleneck(dim=8), BitFit())
    chosen = [adapter.chosen for adapter in Recipe.load(path, ["adapt.0.visual_prompt.depth=4"]).adapt]
    assert adapters_from_config([{chosen[0][0]: chosen[0][1].model_dump()}]) == (VisualPrompt(5, 4),)
