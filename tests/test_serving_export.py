"""Exports: loaded by the library they are for, with the same vectors; refused where not, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd
from PIL import Image
from tokenizers.normalizers import NFC
from torch import Tensor, nn

import tiny_encoders
from pictures import write_folder
from test_cli import vicinal
from tiny_encoders import disturb
from vicinal.heads.calibration import OpenSetThreshold
from vicinal.models.adapters import LinearHead, LoRA, VisualPrompt, adapt, merge, trainable
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.serving import export as exports
from vicinal.serving import parity
from vicinal.serving.card import _section
from vicinal.serving.export import MARK, export, push_to_hub
from vicinal.serving.layouts import clip_to_open_clip
from vicinal.serving.objects import ObjectMatcher, open_encoder
from vicinal.types import Embeddings, InputError

TEXTS = ["a bird", "small Greek letter alpha", "two red shoes on a white table " * 9]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check in this process: the fresh one costs seconds of imports. `test_fresh_process` is the real one."""

    def in_this_process(name: str, folder: Path, work: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what libraries say of each other does not reach us from a fresh process
            parity.main(name, folder, work)

    monkeypatch.setattr(exports, "_in_fresh_process", in_this_process)


@pytest.fixture(scope="module")
def nano() -> Encoder:
    """The built-in model, with random weights, so that nothing depends on how it was trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = load_encoder("vicinal:nano", random_init=True)
    tiny_encoders.disturb(dict(encoder.named_parameters()), scale=0.05)
    return encoder


def images(encoder: Encoder, count: int = 3) -> Tensor:
    return torch.randn(count, 3, *encoder.preprocess.size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(one: Encoder, other: Encoder, limit: float = 1e-6) -> None:
    x = images(one)
    for ours, theirs in (
        (one.encode_image(x), other.encode_image(x)),
        (one.encode_text(TEXTS), other.encode_text(TEXTS)),
    ):
        assert ((ours - theirs).abs().amax(1) / ours.norm(dim=1)).max() < limit
        assert (ours[0] - ours[1]).norm() > 1e-3 * ours.norm()  # it does depend on what is encoded
    assert one.logit_scale == pytest.approx(other.logit_scale, rel=1e-6)


def test_nano_is_loaded_by_both_libraries_from_one_folder(nano: Encoder, tmp_path: Path, here: None) -> None:
    folder = export(nano, tmp_path / "both", format=("transformers", "open_clip"))
    assert_same(nano, load_encoder(f"open_clip:local-dir:{folder}"))
    assert_same(nano, load_encoder(f"transformers:{folder}"))
    assert load_encoder(f"open_clip:local-dir:{folder}").preprocess == nano.preprocess
    assert load_encoder(f"transformers:{folder}").preprocess == nano.preprocess
    found = json.loads((folder / MARK).read_text())["differences"]
    for kind in ("transformers", "open_clip"):
        assert max(found[kind][key] for key in ("images", "texts", "logits")) < 1e-6
    modes = {file.stat().st_mode for file in folder.iterdir()}
    assert len(modes) == 1, "every file is as readable as the others"
    assert [path.name for path in tmp_path.iterdir()] == ["both"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(parity.FORMATS))
def test_fresh_process(kind: str, nano: Encoder, tmp_path: Path) -> None:
    for module in exports.FORMATS[kind].needs:
        pytest.importorskip(module, reason=f"{module} is not installed")
    adapted = adapt(nano, LoRA(rank=2))
    tiny_encoders.disturb(trainable(adapted), scale=0.1)
    folder = export(adapted, tmp_path / kind, format=kind)
    found = json.loads((folder / MARK).read_text())["differences"][kind]
    assert max(value for key, value in found.items() if key != "pictures") < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == [kind]


def test_a_table_for_writing_and_one_for_loading() -> None:
    assert list(exports.FORMATS) == list(parity.FORMATS)
    assert len(exports.FORMATS) == 5


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("eos", [2, 500, 1023])
def test_clip_of_transformers_as_open_clip(act: str, eos: int) -> None:
    import open_clip
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_act": act}
    config = CLIPConfig(
        vision_config={**tower, "intermediate_size": 77, "image_size": 32, "patch_size": 16, "layer_norm_eps": 1e-3},
        text_config={**tower, "hidden_size": 56, "intermediate_size": 61, "vocab_size": 1024, "eos_token_id": eos},
        projection_dim=24,
    )
    torch.manual_seed(0)
    theirs = CLIPModel(config).eval()
    tiny_encoders.disturb(dict(theirs.named_parameters()), scale=0.1)
    model_cfg, state = clip_to_open_clip(theirs, 32)
    ours = open_clip.CLIP(**json.loads(json.dumps(model_cfg))).eval()
    ours.load_state_dict(state, strict=True)
    tokens = torch.randint(3, 500, (4, 77), generator=torch.Generator().manual_seed(0))
    tokens[:, 5] = 900  # the highest, where 500 is the end
    tokens[:, 20:] = 500
    tokens[:, 30:] = eos if eos > 2 else 1000
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = theirs.get_image_features(pixel_values=x).pooler_output
        text = theirs.get_text_features(input_ids=tokens).pooler_output
        assert torch.allclose(ours.encode_image(x), image, atol=2e-6, rtol=1e-5)
        assert torch.allclose(ours.encode_text(tokens), text, atol=2e-6, rtol=1e-5)


def test_towers_of_two_activations_are_refused(nano: Encoder) -> None:
    from transformers import CLIPModel

    config = type(nano.model.config).from_dict(nano.model.config.to_dict())
    config.text_config.hidden_act = "quick_gelu"
    with pytest.raises(InputError, match="gelu and quick_gelu"):
        clip_to_open_clip(CLIPModel(config), 48)


@pytest.mark.parametrize("settings", [{}, {"quick_gelu": True}, {"custom_text": True}], ids=["clip", "quick", "custom"])
def test_clip_of_open_clip_as_transformers(settings: dict[str, bool], tmp_path: Path, here: None) -> None:
    file = tmp_path / "base" / "open_clip_config.json"
    tiny_encoders.open_clip(file.parent)
    content = json.loads(file.read_text())
    content["model_cfg"] |= settings
    file.write_text(json.dumps(content))
    encoder = load_encoder(f"open_clip:local-dir:{file.parent}", random_init=True)
    tiny_encoders.disturb(dict(encoder.named_parameters()), scale=0.05)
    folder = export(encoder, tmp_path / "out", format="transformers")
    assert_same(encoder, load_encoder(f"transformers:{folder}"))
    again = export(load_encoder(f"transformers:{folder}"), tmp_path / "again", format="open_clip")
    assert_same(encoder, load_encoder(f"open_clip:local-dir:{again}"))
    own = export(encoder, tmp_path / "own", format="open_clip")
    assert_same(encoder, load_encoder(f"open_clip:local-dir:{own}"))


@pytest.fixture(scope="module")
def siglip(nano: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """SigLIP as open_clip has it, two blocks a tower, with a tokenizer of transformers and "canonicalize"."""
    import timm
    from timm.models import VisionTransformer, build_model_with_cfg, register_model

    def vit_test_siglip_32(pretrained: bool = False, **kwargs: object) -> nn.Module:
        shape = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.5}
        settings = {**shape, "class_token": False, "global_pool": "map", "act_layer": "gelu_tanh", **kwargs}
        settings["pretrained_cfg"] = {"input_size": (3, 32, 32)}
        return build_model_with_cfg(VisionTransformer, "vit_test_siglip_32", False, **settings)

    if not timm.is_model("vit_test_siglip_32"):
        register_model(vit_test_siglip_32)
    text = {"context_length": 16, "vocab_size": 1024, "width": 32, "heads": 4, "layers": 2, "mlp_ratio": 2.5}
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    text |= {
        "act_kwargs": {"approximate": "tanh"},
        "hf_tokenizer_name": "x",
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    vision = {"image_size": 32, "timm_model_name": "vit_test_siglip_32", "timm_pool": "map", "timm_proj": "none"}
    config = {"embed_dim": 32, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision, "text_cfg": text}
    folder = tmp_path_factory.mktemp("siglip")
    seen = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": seen}))
    tokenizer = copy.deepcopy(nano.tokenizer.inner)
    tokenizer.backend_tokenizer.normalizer = NFC()  # upper case is left to open_clip
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = load_encoder(f"open_clip:local-dir:{folder}", random_init=True)
    tiny_encoders.disturb(dict(encoder.named_parameters()), scale=0.1)
    return encoder


def test_siglip_of_open_clip_as_transformers(siglip: Encoder, tmp_path: Path, here: None) -> None:
    folder = export(siglip, tmp_path / "out", format="transformers")
    again = load_encoder(f"transformers:{folder}")
    assert_same(siglip, again)
    assert again.logit_bias == siglip.logit_bias
    assert again.preprocess == siglip.preprocess
    assert type(again.model).__name__ == "SiglipModel"
    dirty = ["A BIRD,  on_the (rocks)!", "it's"]
    assert torch.equal(siglip.tokenize(dirty), again.tokenize(dirty))


def test_lora_is_merged(nano: Encoder, tmp_path: Path, here: None) -> None:
    adapted = adapt(nano, LoRA(rank=2))
    tiny_encoders.disturb(trainable(adapted), scale=0.1)
    folder = export(adapted, tmp_path / "out", format="open_clip")
    assert_same(adapted, load_encoder(f"open_clip:local-dir:{folder}"), limit=1e-5)
    with torch.no_grad():
        assert (adapted.encode_image(images(nano)) - nano.encode_image(images(nano))).abs().max() > 1e-2


@pytest.mark.parametrize("crop", ["squash", "pad"])
def test_how_images_are_fitted_goes_along(crop: str, nano: Encoder, tmp_path: Path, here: None) -> None:
    fitted = load_encoder("vicinal:nano", random_init=True, crop=crop, size=32)
    folder = export(fitted, tmp_path / "out", format="open_clip")
    assert load_encoder(f"open_clip:local-dir:{folder}").preprocess == fitted.preprocess
    pictures = json.loads((folder / MARK).read_text())["differences"]["open_clip"]["pictures"]
    assert pictures < 0.02
    if crop == "pad":
        with pytest.raises(InputError, match=r"do not pad.*exported as open_clip"):
            export(fitted, tmp_path / "other", format="transformers")


def test_share_of_a_crop_goes_along(nano: Encoder, tmp_path: Path, here: None) -> None:
    cut = load_encoder("vicinal:nano", random_init=True)
    cut.preprocess = dataclasses.replace(cut.preprocess, crop_pct=0.875)
    folder = export(cut, tmp_path / "out", format="transformers")
    assert load_encoder(f"transformers:{folder}").preprocess.crop_pct == pytest.approx(0.875, abs=0.02)
    with pytest.raises(InputError, match=r"0\.875.*exported as transformers"):
        export(cut, tmp_path / "other", format="open_clip")


def _broken(folder: Path, given: parity.Given) -> dict[str, Tensor]:
    found = parity.open_clip(folder, given)
    return {**found, "texts": found["texts"] + 0.05}


def test_what_differs_is_refused_and_nothing_is_left(
    nano: Encoder, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.FORMATS, "open_clip", _broken)
    with pytest.raises(InputError, match=r"texts differ by \d\.\d+e-0\d, more than 0\.001"):
        export(nano, tmp_path / "out", format="open_clip")
    assert not list(tmp_path.iterdir())
    export(nano, tmp_path / "out", format="open_clip", tolerance=1.0)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="texts differ"):  # and what was there before stays
        export(nano, tmp_path / "out", format="open_clip")
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_is_replaced_and_nothing_else_is(nano: Encoder, tmp_path: Path, here: None) -> None:
    export(nano, tmp_path / "out", format="open_clip")
    (tmp_path / "out" / "old.txt").write_text("of the first")
    export(nano, tmp_path / "out", format="transformers")
    assert not (tmp_path / "out" / "old.txt").exists()
    assert not (tmp_path / "out" / "open_clip_config.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not an export"):
        export(nano, tmp_path / "mine", format="open_clip")


REFUSED: dict[str, tuple[Callable[[Encoder, Path], Encoder], str]] = {
    "head": (lambda nano, folder: adapt(nano, LinearHead(dim=8)), "LinearHead"),
    "prompts": (lambda nano, folder: adapt(nano, VisualPrompt(tokens=2)), "VisualPrompt"),
    "timm": (lambda nano, folder: tiny_encoders.timm(folder), "transformers has no timm VisionTransformer"),
    "wide": (lambda nano, folder: load_encoder("vicinal:nano", size=(48, 64), random_init=True), "square"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_held_is_refused(case: str, nano: Encoder, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    encoder = make(nano, tmp_path / "base")
    with pytest.raises(InputError, match=message):
        export(encoder, tmp_path / "out", format="transformers")
    assert not (tmp_path / "out").exists()


def test_bad_formats_and_pictures(nano: Encoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean open_clip"):
        export(nano, tmp_path / "out", format="openclip")
    with pytest.raises(InputError, match="at least one"):
        export(nano, tmp_path / "out", format="open_clip", pictures=[])
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(InputError, match=r"x\.png cannot be read"):
        export(nano, tmp_path / "out", format="open_clip", pictures=[tmp_path / "x.png"])
    assert not (tmp_path / "out").exists()


def test_sentence_transformers(nano: Encoder, siglip: Encoder, tmp_path: Path, here: None) -> None:
    library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    folder = export(nano, tmp_path / "clip", format="sentence_transformers")
    model = library.SentenceTransformer(str(folder), device="cpu")
    picture = Image.new("RGB", (48, 48), (200, 30, 30))
    assert model.encode([picture]).shape == (1, 96)
    with torch.no_grad():
        assert torch.allclose(
            model.encode(["a bird"], convert_to_tensor=True)[0], nano.encode_text(["a bird"])[0], atol=1e-5, rtol=1e-5
        )
    folder = export(siglip, tmp_path / "siglip", format="sentence_transformers")  # its texts need their padding
    model = library.SentenceTransformer(str(folder), device="cpu")
    with torch.no_grad():
        ours = siglip.encode_text(["a bird", "Two birds, here"])
    assert torch.allclose(
        model.encode(["a bird", "Two birds, here"], convert_to_tensor=True), ours, atol=1e-5, rtol=1e-5
    )


def _runs_onnx() -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason=f"{module} is not installed")


def test_onnx_holds_both_towers_for_any_number(nano: Encoder, tmp_path: Path, here: None) -> None:
    _runs_onnx()
    from onnxruntime import InferenceSession

    folder = export(nano, tmp_path / "out", format="onnx", tolerance=1e-5)
    x = images(nano, 5)
    for file, inputs, ours in (
        ("image.onnx", x, nano.encode_image(x)),
        ("text.onnx", nano.tokenize(TEXTS), nano.encode_text(TEXTS)),
    ):
        session = InferenceSession(folder / file, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        assert torch.allclose(torch.from_numpy(found), ours.detach(), atol=1e-5, rtol=1e-4)
    said = json.loads((folder / "onnx.json").read_text())
    assert (said["image"]["size"], said["embedding_dim"]) == ([48, 48], 96)
    assert said["text"]["context_length"] == 32
    assert said["logit_scale"] == pytest.approx(nano.logit_scale)


ADDED = {
    "head": lambda nano, folder: adapt(nano, LinearHead(dim=8)),
    "prompts": lambda nano, folder: adapt(nano, VisualPrompt(tokens=2), LoRA(rank=2)),
    "open_clip": lambda nano, folder: adapt(tiny_encoders.open_clip(folder), LoRA(rank=2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ADDED)
def test_onnx_holds_what_others_cannot(case: str, nano: Encoder, tmp_path: Path, here: None) -> None:
    _runs_onnx()
    encoder = ADDED[case](nano, tmp_path / "base")
    tiny_encoders.disturb(trainable(encoder), scale=0.1)
    folder = export(encoder, tmp_path / "out", format="onnx", tolerance=1e-5)
    assert (folder / "text.onnx").exists() == (case != "head")


def test_adapter_alone(nano: Encoder, tmp_path: Path, here: None) -> None:
    adapted = adapt(nano, LoRA(rank=2, targets=("q", "v"), tower="both"))
    tiny_encoders.disturb(trainable(adapted), scale=0.2)
    adapted.source = "transformers:some/base"
    folder = export(adapted, tmp_path / "out", format="adapter", merged=False, tolerance=1e-6)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    found = json.loads((folder / MARK).read_text())["differences"]["adapter"]
    assert set(found) == {"images", "texts"}
    card = (folder / "README.md").read_text()
    assert "base_model: some/base\n" in card
    assert "library_name: peft\n" in card
    assert not any("lora" in name for name, _ in exports._without_updates(adapted).named_modules())
    assert any("lora" in name for name, _ in adapted.named_modules())  # the encoder itself is as it was
    with pytest.raises(InputError, match=r"no lora.*exported as transformers or open_clip"):
        export(nano, tmp_path / "none", format="adapter")


@pytest.mark.parametrize("family", ["timm", "open_clip"])
def test_adapter_of_other_families(family: str, tmp_path: Path, here: None) -> None:
    adapted = adapt(tiny_encoders.FAMILIES[family](tmp_path / "base"), LoRA(rank=2, targets=("mlp",)))
    tiny_encoders.disturb(trainable(adapted), scale=0.1)
    folder = export(adapted, tmp_path / "out", format="adapter", tolerance=1e-5)
    assert (folder / "adapter_model.safetensors").exists()


def test_merged_or_not(nano: Encoder, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="format='adapter'"):
        export(nano, tmp_path / "out", format="transformers", merged=False)
    with pytest.raises(InputError, match="never merged"):
        export(nano, tmp_path / "out", format="adapter", merged=True)
    with pytest.raises(InputError, match="a folder of its own"):
        export(nano, tmp_path / "out", format=("transformers", "adapter"))


def test_a_missing_library_is_named(nano: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"needs sentence_transformers: pip install 'vicinal\[sentence-transformers\]'"
    ):
        export(nano, tmp_path / "out", format="sentence_transformers")


def test_card(nano: Encoder, tmp_path: Path, here: None) -> None:
    said = {
        "data": "ten thousand | glyphs",
        "results": {"after": {"unseen": {"recall@1": {"value": 0.5, "low": 0.4, "high": 0.625, "n": 40}}}},
        "threshold": {"score": 0.81234567, "false accepts": "1 in 100"},
    }
    licensed = adapt(nano, LoRA(rank=2))
    licensed.licence = "mit"
    card = (export(licensed, tmp_path / "marks", format="open_clip", card=said) / "README.md").read_text()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "mit"
    assert head["tags"] == ["vicinal", "open_clip"]
    assert "# marks\n" in card
    assert "adapted by LoRA" in card
    assert "| after · unseen · recall@1 | 0.500 [0.400, 0.625], n = 40 |" in card
    assert "| score | 0.8123 |" in card
    assert "| open_clip | images |" in card
    assert load_encoder(f"open_clip:local-dir:{tmp_path / 'marks'}").licence == "mit"


def test_push_to_hub(nano: Encoder, tmp_path: Path, here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    sent: dict[str, bytes] = {}

    class Api:
        def __init__(self, token: str | None) -> None:
            assert token == "t"

        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            return f"hub/{repo_id}"

        def create_commit(self, repo_id: str, operations: list[CommitOperationAdd], commit_message: str) -> None:
            for operation in operations:
                with operation.as_file() as file:
                    sent[operation.path_in_repo] = file.read()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    folder = export(nano, tmp_path / "out", format="open_clip")
    assert push_to_hub(folder, "me/marks", token="t") == "hub/me/marks"
    assert set(sent) == {file.name for file in folder.iterdir()}
    assert json.loads(sent["open_clip_config.json"])["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "me/marks"
    with pytest.raises(InputError, match="not an export"):
        push_to_hub(tmp_path, "me/marks")


def test_image_models_of_transformers(tmp_path: Path, here: None) -> None:
    encoder = tiny_encoders.dinov2(tmp_path / "base")
    folder = export(encoder, tmp_path / "out", format="transformers")
    again = load_encoder(f"transformers:{folder}")
    x = images(encoder)
    assert torch.equal(encoder.encode_image(x), again.encode_image(x))
    assert again.preprocess == encoder.preprocess


@pytest.mark.parametrize("kind", ["transformers", "open_clip", "onnx"])
def test_a_threshold_goes_along_and_holds_there(kind: str, nano: Encoder, tmp_path: Path, here: None) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    tuned = adapt(nano, LoRA(rank=2))
    disturb(trainable(tuned))
    scores, right = [0.9, 0.8, 0.3, 0.2], [True, True, False, False]
    settings = {"fusion": "max", "k": 3, "min_votes": 1, "vote_threshold": None, "margin": 0.0, "normalisation": None}
    settings |= {"cohort": None}
    rule = OpenSetThreshold().fit(scores, right, fingerprint=tuned.fingerprint(), settings=settings)
    file = rule.save(tmp_path / "threshold.json")
    out = export(tuned, tmp_path / "out", format=kind, threshold=file)
    card = (out / "README.md").read_text()
    assert "## Threshold" in card
    assert f"| score | {rule.threshold_:.4g} |" in card
    assert "| matcher · fusion | max |" in card
    kept = OpenSetThreshold.load(out / "threshold.json")
    assert kept.threshold_ == rule.threshold_
    if kind != "onnx":
        loaded = open_encoder(out)
        assert kept.fingerprint_ == loaded.fingerprint()
        x = torch.nn.functional.normalize(torch.randn(4, loaded.embedding_dim), dim=1)
        given = Embeddings(x, torch.tensor([0, 0, 1, 1]), ("a", "b", "c", "d"), ("x", "y"))
        matcher = ObjectMatcher(embedding_model=out, references=given).matcher
        assert matcher is not None
        assert matcher.threshold == rule.threshold_
    with pytest.raises(InputError, match="was fitted on scores of the model"):
        export(nano, tmp_path / "other", format=kind, threshold=file)
    assert not (tmp_path / "other").exists()


def test_an_export_has_the_fingerprint_of_its_merged_encoder(nano: Encoder, tmp_path: Path, here: None) -> None:
    tuned = adapt(nano, LoRA(rank=2))
    disturb(trainable(tuned))
    merged = merge(tuned)
    out = export(merged, tmp_path / "out", format="transformers")
    assert load_encoder(f"transformers:{out}").fingerprint() == merged.fingerprint() != nano.fingerprint()


def test_a_run_is_exported_with_its_data_results_and_threshold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: None
) -> None:
    """What `vicinal calibrate` and `vicinal train` left beside a model stands on its card."""
    photos = write_folder(tmp_path / "photos", classes=4, each=2)
    home = tmp_path / "run"
    encoder = load_encoder("vicinal:nano")
    encoder.save(home / "model")
    results = {"data": {"images": 120, "train_classes": 9}, "after": {"unseen": {"map@r": {"value": 0.5}, "other": 1}}}
    (home / "results.json").write_text(json.dumps(results))
    fingerprint = load_encoder(home).fingerprint()
    OpenSetThreshold().fit([0.9, 0.1], [True, False], fingerprint=fingerprint).save(home / "threshold.json")
    words = ("export", home, "--format", "transformers", "--out", tmp_path / "out", "--pictures", photos)
    assert vicinal(monkeypatch, *words) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for line in (
        "| images | 120 |",
        "| trained on, classes | 9 |",
        "| after · unseen · map@r · value | 0.5 |",
        "| score | 0.5 |",
    ):
        assert line in card
    (home / "results.json").write_text("{")
    assert vicinal(monkeypatch, *words) == 2


def test_a_card_says_what_is_undefined() -> None:
    undefined = {"value": None, "low": None, "high": None, "n": 3, "queries": 9}
    alone = {"value": 0.5, "low": None, "high": None, "n": 1, "queries": 9}
    lines = _section({"precision": undefined, "recall": alone})
    assert lines[2:] == ["| precision | undefined, n = 3 |", "| recall | 0.500 [no interval], n = 1 |"]
