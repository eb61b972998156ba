"""Encoder: what it computes, its fingerprint, and the folder it saves, whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from vicinal.models import encoder as module
from vicinal.models.adapters import BitFit, Bottleneck, Full, LinearHead, LoRA, VisualPrompt, adapt
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.types import InputError

CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


@pytest.fixture
def timm_encoder() -> Encoder:
    torch.manual_seed(0)
    return load_encoder("timm:test_vit", size=32, random_init=True)


@pytest.fixture
def clip_encoder(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    from open_clip import factory

    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny", CLIP)
    torch.manual_seed(0)
    return load_encoder("open_clip:tiny", random_init=True)


def x(encoder: Encoder) -> torch.Tensor:
    return torch.randn(2, 3, *encoder.preprocess.size, generator=torch.Generator().manual_seed(0))


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_forward_is_encode_image_through_the_head(timm_encoder: Encoder):
    images = x(timm_encoder)
    plain = timm_encoder.encode_image(images)
    assert torch.equal(timm_encoder(images), plain)
    assert plain.norm(dim=1).sub(1).abs().min() > 1e-3  # not normalised
    timm_encoder.head = nn.Linear(64, 5)
    torch.testing.assert_close(timm_encoder(images), timm_encoder.head(plain))


def test_a_copy_is_independent(clip_encoder: Encoder):
    images = x(clip_encoder)
    before = clip_encoder(images)
    texts = clip_encoder.encode_text(["a cat"])
    other = copy.deepcopy(clip_encoder)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    assert torch.equal(clip_encoder(images), before)
    assert not torch.allclose(other(images), before)
    assert torch.equal(pickle.loads(pickle.dumps(clip_encoder)).encode_text(["a cat"]), texts)


def test_texts_after_a_linear_head_are_refused(clip_encoder: Encoder):
    adapted = adapt(clip_encoder, LinearHead(dim=8))
    assert adapted(x(adapted)).shape == (2, 8)
    with pytest.raises(InputError, match="linear_head"):
        adapted.encode_text(["a cat"])
    assert adapted.tokenize(["a cat"]).shape == (1, 12)


def test_texts_without_a_tower_are_refused(timm_encoder: Encoder):
    for call in (timm_encoder.encode_text, timm_encoder.tokenize, timm_encoder.token_lengths):
        with pytest.raises(InputError, match="no text tower"):
            call(["a cat"])


# --------------------------------------------------------------------------------------------------------- fingerprint


def _weight(encoder: Encoder) -> None:
    next(encoder.model.parameters()).data.view(-1)[3] += 1e-6


def _swapped(encoder: Encoder) -> None:
    first, second = encoder.model.visual.transformer.resblocks
    a, b = first.ln_1.bias.data.clone(), second.ln_1.bias.data.clone()
    first.ln_1.bias.data, second.ln_1.bias.data = b + 1, a


def _preprocess(encoder: Encoder) -> None:
    encoder.preprocess = dataclasses.replace(encoder.preprocess, interpolation="bilinear")


def _architecture(encoder: Encoder) -> None:
    encoder.architecture["config"]["quick_gelu"] = True


def _half(encoder: Encoder) -> None:
    encoder.half()


@pytest.mark.parametrize("change", [_weight, _swapped, _preprocess, _architecture, _half])
def test_the_fingerprint_sees(change: Callable[[Encoder], None], clip_encoder: Encoder):
    before = clip_encoder.fingerprint()
    assert len(before) == 64
    change(clip_encoder)
    assert clip_encoder.fingerprint() != before


def test_the_fingerprint_sees_adapters(timm_encoder: Encoder):
    prints = {
        timm_encoder.fingerprint(),
        adapt(timm_encoder, BitFit()).fingerprint(),
        *(_adapted(timm_encoder, LoRA(rank=2, alpha=alpha)).fingerprint() for alpha in (2.0, 4.0)),
    }
    assert len(prints) == 4  # alpha changes no weight, but what they mean


def _adapted(encoder: Encoder, method: LoRA) -> Encoder:
    torch.manual_seed(1)
    return adapt(encoder, method)


def test_the_fingerprint_does_not_see_names_and_modes(clip_encoder: Encoder):
    before = clip_encoder.fingerprint()
    other = copy.deepcopy(clip_encoder).train().requires_grad_(False)
    other.source, other.licence = "elsewhere", "mit"
    assert other.fingerprint() == before


# ---------------------------------------------------------------------------------------------------------------- save


@pytest.mark.parametrize(
    "methods",
    [
        (Full(),),
        (LoRA(rank=2),),
        (LoRA(rank=2, targets=("attention",)), LinearHead(dim=8)),
        (BitFit(), LinearHead()),
        (VisualPrompt(depth="shallow"), Bottleneck(dim=4, first_block=1), LinearHead()),
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["timm_encoder", "clip_encoder"])
def test_an_adapted_encoder_comes_back(
    family: str, methods: tuple[LoRA, ...], request: pytest.FixtureRequest, tmp_path: Path
):
    encoder = adapt(request.getfixturevalue(family), *methods)
    for parameter in encoder.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    again = load_encoder(encoder.save(tmp_path / "model"))
    with torch.no_grad():  # with gradients torch's attention takes another way where something is trained
        assert torch.equal(again(x(again)), encoder(x(encoder)))
    assert again.adapters == encoder.adapters
    assert again.embedding_dim == encoder.embedding_dim
    assert again.anatomy == encoder.anatomy
    assert again.fingerprint() == encoder.fingerprint()
    assert not any(p.requires_grad for p in again.parameters())  # what is trained next, the next `adapt` says


def test_the_folder_says_what_it_is(timm_encoder: Encoder, tmp_path: Path):
    timm_encoder.licence = "apache-2.0"
    folder = adapt(timm_encoder, LoRA(rank=2)).save(tmp_path / "deep" / "model")
    config = json.loads((folder / "vicinal.json").read_text())
    assert names_in(folder) == {"vicinal.json", "model.safetensors"}
    assert config["format"] == 1
    assert config["source"] == "timm:test_vit (random weights)"
    assert (config["family"], config["licence"], config["embedding_dim"]) == ("timm", "apache-2.0", 64)
    assert config["preprocess"]["size"] == [32, 32]
    assert [next(iter(entry)) for entry in config["adapters"]] == ["lora"]
    assert config["adapters"][0]["lora"]["rank"] == 2
    assert str(tmp_path) not in json.dumps(config)
    assert names_in(tmp_path / "deep") == {"model"}  # nothing is left beside it


def test_the_folder_can_be_read_by_others(timm_encoder: Encoder, tmp_path: Path):
    (tmp_path / "ordinary").mkdir()
    folder = timm_encoder.save(tmp_path / "model")
    assert stat.S_IMODE(folder.stat().st_mode) == stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)


def test_saving_again_replaces(timm_encoder: Encoder, tmp_path: Path):
    folder = timm_encoder.save(tmp_path / "model")
    _weight(timm_encoder)
    timm_encoder.save(folder)
    assert load_encoder(folder).fingerprint() == timm_encoder.fingerprint()
    assert names_in(tmp_path) == {"model"}


@pytest.mark.parametrize("step", ["save_file", "_sync", "_replace"])
def test_a_failed_save_leaves_the_last_good_one(
    step: str, timm_encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = timm_encoder.save(tmp_path / "model")
    before = timm_encoder.fingerprint()
    _weight(timm_encoder)

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file" if step == "save_file" else f"{module.__name__}.{step}", full)
    with pytest.raises(OSError, match="no space"):
        timm_encoder.save(folder)
    assert load_encoder(folder).fingerprint() == before
    assert names_in(tmp_path) == {"model"}


def test_a_failed_rename_puts_the_old_one_back(timm_encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = timm_encoder.save(tmp_path / "model")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if target == folder and not self.name.endswith(".old"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"):
        timm_encoder.save(folder)
    assert load_encoder(folder).fingerprint() == timm_encoder.fingerprint()


def test_save_does_not_overwrite_what_it_did_not_write(timm_encoder: Encoder, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    timm_encoder.save(tmp_path / "mine")  # empty: fine
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    for name in ("photos", "file"):
        with pytest.raises(InputError, match="not a model saved by vicinal"):
            timm_encoder.save(tmp_path / name)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_tied_weights_are_saved_and_tied_again(timm_encoder: Encoder, tmp_path: Path):
    blocks = timm_encoder.model.blocks
    blocks[1].mlp.fc1.weight = blocks[0].mlp.fc1.weight
    folder = timm_encoder.save(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    assert torch.equal(state["model.blocks.0.mlp.fc1.weight"], state["model.blocks.1.mlp.fc1.weight"])
    again = load_encoder(folder)
    assert torch.equal(again(x(again)), timm_encoder(x(timm_encoder)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("{}", "damaged.*format"),
        ('{"format": 2}', "newer vicinal"),
        ('{"format": 1, "architecture": {}}', "damaged"),
    ],
)
def test_a_damaged_folder_says_so(content: str, message: str, timm_encoder: Encoder, tmp_path: Path):
    folder = timm_encoder.save(tmp_path / "model")
    (folder / "vicinal.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_encoder(folder)


def test_a_folder_without_its_weights_says_so(timm_encoder: Encoder, tmp_path: Path):
    folder = timm_encoder.save(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no file of weights at .*model\.safetensors"):
        load_encoder(folder)


def test_a_run_folder_and_random_init_of_a_saved_one(timm_encoder: Encoder, tmp_path: Path):
    timm_encoder.save(tmp_path / "run" / "model")
    assert load_encoder(tmp_path / "run").fingerprint() == timm_encoder.fingerprint()
    with pytest.raises(InputError, match="holds trained weights"):
        load_encoder(tmp_path / "run", random_init=True)
