"""Every recipe in `recipes/`, three steps of it, on a miniature in its own layout and with a small random model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from pictures import COLOURS, SHAPES, draw, write_folder
from test_data_benchmarks import flowers as flowers_miniature
from test_data_benchmarks import shrunk
from test_data_voc import annotate, paint
from tiny_encoders import clip_of
from vicinal.data.manifest import Manifest
from vicinal.data.shards import write_shards
from vicinal.models.adapters import LoRA, adapt
from vicinal.models.backbones import load_encoder
from vicinal.recipe import Recipe
from vicinal.run import run

RECIPES = {path.stem: path for path in sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))}
PARTS = {
    "folder": {"unseen", "seen"},
    "flowers": {"seen", "unseen", "joint"},
    "flowers_all": {"all"},
    "nano": {"seen", "unseen", "joint"},
    "fashion": {"unseen"},
    "lit": {"unseen"},
    "logos": {"unseen"},
    "logos_jetson": {"unseen"},
    "logos_small": {"unseen"},
    "proxies_small": {"seen", "unseen"},
    **{f"overlap_{way}{size}": {"mine"} for way in ("supervised", "dino") for size in ("", "_small")},
    **{
        f"proxies_{name}{size}": {"unseen"}
        for name in ("cub", "cars", "sop", "inshop", "inat")
        for size in ("", "_vitb")
    },
}
flowers = flowers_miniature

SMALL = [
    "model=timm:test_vit",
    "random_init=true",
    "preprocess.size=32",
    "steps=3",
    "draws=2",
    "workers=0",
    "device=cpu",
    "trackers=[]",
    "sampler.shuffle.batch_size=8",
]


def test_the_recipes_are_found() -> None:
    assert set(RECIPES) == set(PARTS)


def test_folder(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos")
    out = run(Recipe.load(RECIPES["folder"], [*SMALL, f"data.folder={photos}"]), tmp_path / "run", say=lambda _: None)
    assert set(json.loads((out / "results.json").read_text())["after"]) == PARTS["folder"]


def test_nano(tmp_path: Path) -> None:
    few = ["data.glyphs.characters=greek", "data.glyphs.images_per_face=1", "sampler.shuffle.batch_size=32"]
    settings = ["steps=3", "draws=2", "workers=0", "device=cpu", "trackers=[]", "cache=null"]
    out = run(Recipe.load(RECIPES["nano"], [*few, *settings]), tmp_path / "run", say=lambda _: None)
    results = json.loads((out / "results.json").read_text())
    assert set(results["after"]) == PARTS["nano"]
    assert "accuracy@0shot" in results["after"]["unseen"]
    assert results["training"]["trained_parameters"] > 0.99 * results["training"]["total_parameters"], "both towers"


def captioned(folder: Path) -> Path:
    """Twelve classes of four pictures with two captions each, the last four classes in no training."""
    photos = write_folder(folder / "photos")
    files = sorted(photos.rglob("*.png"))
    names = sorted({file.parent.name for file in files})
    rows = {
        "image": [str(file.relative_to(folder)) for file in files],
        "label": [file.parent.name for file in files],
        "text": [file.parent.name for file in files],
        "captions": [[file.parent.name, f"a drawing, {file.parent.name}"] for file in files],
        "split": ["train" if names.index(file.parent.name) < len(names) * 2 // 3 else "test" for file in files],
    }
    pq.write_table(pa.table(rows), folder / "captions.parquet")
    return folder / "captions.parquet"


def test_lit_trains_a_new_text_tower_and_nothing_else(tmp_path: Path) -> None:
    table = captioned(tmp_path)
    small = ["model=timm:test_vit", "random_init=true", "preprocess.size=32", "steps=3", "sampler.pk.classes=4"]
    fast = ["workers=0", "device=cpu", "trackers=[]", "draws=2", "cache=null", "text_tower.width=64"]
    recipe = Recipe.load(RECIPES["lit"], [f"data.table={table}", *small, *fast])
    out = run(recipe, tmp_path / "run", say=lambda _: None)
    results = json.loads((out / "results.json").read_text())
    assert set(results["after"]) == PARTS["lit"]
    assert results["training"]["towers_not_run"] == ["image"]
    tuned, image = load_encoder(out / "model"), load_encoder("timm:test_vit", size=32, random_init=True)
    assert tuned.encode_text(["a circle"]).shape == (1, image.embedding_dim)
    assert results["difference"]["unseen"]["map@r"]["value"] == 0
    assert results["difference"]["unseen"]["full/text_to_image_mrr"]["value"] != 0
    assert Recipe.load(out / "recipe.yaml") == recipe


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve products of six views, three captions each, in shards: six to train on, two to select, four to test."""
    root = tmp_path_factory.mktemp("shop")
    files = sorted(write_folder(root / "photos").rglob("*.png"))
    products = sorted({file.parent.name for file in files})
    for part, (start, end) in {"train": (0, 6), "val": (6, 8), "test": (8, 12)}.items():
        mine = [file for file in files if products.index(file.parent.name) in range(start, end)]
        rows = {
            "image": [str(file.relative_to(root)) for file in mine],
            "product_id": [products.index(file.parent.name) for file in mine],
            "category": [file.parent.name.split("-")[0] for file in mine],
            "text": [file.parent.name for file in mine],
            "captions": [[file.parent.name, f"one {file.parent.name}", f"{file.parent.name} again"] for file in mine],
        }
        write_shards(Manifest.build(pa.table(rows), root), root / "shards" / f"{part}_%06d.tar", items=12, workers=0)
    return root / "shards"


def clip_b(folder: Path) -> str:
    """ViT-B-32 and ViT-B-16 in small: open_clip's own tower, causal texts, a softmax scale."""
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    return saved_open_clip(folder, {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text})


def siglip2(folder: Path) -> str:
    """ViT-B-16-SigLIP2-256 in small: timm's tower with attention pooling, texts that see both ways, scale and bias."""
    real = open_clip.get_model_config("ViT-B-16-SigLIP2-256")
    config = json.loads(json.dumps(real)) | {"embed_dim": 64}
    config["vision_cfg"] |= {"image_size": 160, "timm_model_name": "test_vit"}
    config["text_cfg"] |= {"context_length": 12, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    del config["text_cfg"]["hf_tokenizer_name"], config["text_cfg"]["tokenizer_kwargs"]
    return saved_open_clip(folder, config)


def saved_open_clip(folder: Path, config: dict[str, object]) -> str:
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    uri = f"open_clip:local-dir:{folder}"
    torch.manual_seed(0)
    save_file(load_encoder(uri, random_init=True).model.state_dict(), folder / "open_clip_model.safetensors")
    return uri


@pytest.mark.parametrize(
    ("model", "loss", "captions"), [(clip_b, "infonce", "any"), (clip_b, "siglip", "first"), (siglip2, "siglip", "any")]
)
def test_fashion(model: Callable[[Path], str], loss: str, captions: str, shop: Path, tmp_path: Path) -> None:
    """The models in small, both losses, augmented and not, from shards by pattern, with what the head says."""
    shards = [f"data.shards.{part}={shop}/{part}_{{000000..{n:06d}}}.tar" for part, n in PARTS_OF_SHOP.items()]
    words = [f"model={model(tmp_path / 'model')}", f"loss.{loss}={{}}", f"captions.trained={captions}"]
    small = ["sampler.no_duplicate.batch_size=4", "micro_batch=2", "epochs=1", "evaluate_every=2"]
    small += ["patience=null", "preprocess.size=32"]
    fast = ["workers=0", "device=cpu", "trackers=[]", "draws=2", "cache=null"]
    recipe = Recipe.load(RECIPES["fashion"], [*shards, *words, *small, *fast])
    out = run(recipe, tmp_path / "run", say=lambda _: None)
    results = json.loads((out / "results.json").read_text())
    assert set(results["after"]) == PARTS["fashion"]
    found = results["after"]["unseen"]
    assert all(f"{protocol}/image_to_text_recall@10" in found for protocol in ("full", "sampled100", "index"))
    assert found["full/image_to_text_mrr"]["queries"] == 24, "every picture of the four products"
    assert found["full/text_to_image_mrr"]["queries"] == 4, "each text once"
    assert found["index/image_to_text_recall_ceiling@1"]["value"] == pytest.approx(1 / 6)
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    step = next(row for row in rows if "scale" in row)
    assert ("bias" in step) == (loss == "siglip")
    if model is siglip2:
        assert step["bias"] == pytest.approx(-10, abs=0.01), "the model's own"
    assert any("full/mean_recall" in row.get("val", {}) for row in rows)
    assert load_encoder(out / "model").embedding_dim == (64 if model is siglip2 else 24)


PARTS_OF_SHOP = {"train": 2, "val": 0, "test": 1}
"""The number of the last shard of each."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width", "size", "context"),
    [
        ("ViT-B-32/laion2b_s34b_b79k", 512, 224, 77),
        ("ViT-B-16/laion2b_s34b_b88k", 512, 224, 77),
        ("ViT-B-16-SigLIP2-256/webli", 768, 256, 64),
    ],
)
def test_the_three_models_of_fashion_at_their_real_size(name: str, width: int, size: int, context: int) -> None:
    """Random weights, the real architectures and preprocessing; LoRA reaches both towers."""
    encoder = load_encoder(f"open_clip:{name}", random_init=True)
    siglip = "SigLIP" in name
    assert (encoder.embedding_dim, encoder.preprocess.size, encoder.context_length) == (width, (size, size), context)
    assert encoder.preprocess.crop == ("squash" if siglip else "crop")
    assert encoder.preprocess.mean[0] == pytest.approx(0.5 if siglip else 0.48145466)
    assert encoder.logit_bias == (pytest.approx(-10) if siglip else None)
    assert encoder.anatomy.text is not None
    assert (len(encoder.anatomy.image.blocks), len(encoder.anatomy.text.blocks)) == (12, 12)
    with torch.no_grad():
        assert encoder.encode_image(torch.zeros(1, 3, size, size)).shape == (1, width)
        tokens = torch.zeros(1, context, dtype=torch.long)  # the tokenizer of SigLIP 2 is on the Hub
        assert encoder.family.encode_text is not None
        assert encoder.family.encode_text(encoder.model, tokens).shape == (1, width)
    tuned = adapt(encoder, LoRA(rank=2, tower="both"))
    towers = {"visual" if "visual" in n else "text" for n, p in tuned.named_parameters() if p.requires_grad}
    assert towers == {"visual", "text"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flowers", "flowers_all"])
def test_flowers(name: str, flowers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, path in enumerate(sorted((flowers / "jpg").iterdir())):
        draw(SHAPES[number % 4], COLOURS[number % 6], number).save(path)
    shrunk("flowers102", monkeypatch)
    overrides = [*SMALL, f"data.benchmark.root={tmp_path}", "data.benchmark.download=false"]
    out = run(Recipe.load(RECIPES[name], overrides), tmp_path / "run", say=lambda _: None)
    results = json.loads((out / "results.json").read_text())
    assert set(results["after"]) == PARTS[name]
    if name == "flowers":
        assert results["data"]["parts"]["unseen"]["classes"] == 20
        assert results["data"]["train_classes"] == 82 - 8, "a tenth of the seen classes is selected on"


@pytest.fixture(scope="module")
def brands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty brands of two variants in LogoDet-3K's layout, three pictures of each, a box on each."""
    root = tmp_path_factory.mktemp("logos")
    for b in range(20):
        for v in (1, 2):
            for n in range(3):
                path = root / "Food" / f"brand{b:02d}-{v}" / f"{n}.jpg"
                paint(path, seed=100 * b + 10 * v + n)
                annotate(path.with_suffix(".xml"), (f"brand{b:02d}-{v}", (2, 2, 40 + n, 38)))
    return root


@pytest.mark.parametrize("name", ["logos", "logos_jetson"])
def test_logos_adapt_q_and_v_of_the_layers_from_12_on(name: str, brands: Path, tmp_path: Path) -> None:
    """A CLIP of 24 thin layers: the tuned one differs from it where the recipe says, and nowhere else."""
    original = clip_of(tmp_path / "clip", layers=24)
    settings = [f"data.voc={brands}", f"model=transformers:{tmp_path / 'clip'}", "steps=3", "evaluate_every=2"]
    small = ["sampler.pk.classes=4", "workers=0", "device=cpu", "trackers=[]", "draws=2", "cache=null"]
    out = run(Recipe.load(RECIPES[name], [*settings, *small]), tmp_path / "run", say=lambda _: None)
    results = json.loads((out / "results.json").read_text())
    assert set(results["after"]) == PARTS[name]
    assert results["data"]["train_classes"] == 2 * (20 - 2 - 1), "two variants of each brand that is not held out"
    trained = 12 * 2 * 16 * (32 + 32)
    assert results["training"]["trained_parameters"] == trained
    tuned, before = load_file(out / "model" / "model.safetensors"), original.state_dict()
    changed = {key for key, value in tuned.items() if not torch.equal(value, before[key])}
    layers = [f"model.vision_model.encoder.layers.{i}.self_attn.{p}_proj.weight" for i in range(12, 24) for p in "qv"]
    assert changed == set(layers)
    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    step = next(row for row in history if "loss" in row)
    assert step["gap"] == pytest.approx(step["right_mean"] - step["wrong_mean"], abs=1e-5)
    checks = [row["val"] for row in history if "val" in row]
    assert all(check["gap"] == pytest.approx(check["right_mean"] - check["wrong_mean"], abs=1e-5) for check in checks)
    assert {"f1", "eer"} <= set(checks[0])


@pytest.mark.parametrize(
    ("loss", "model"),
    [
        ("loss.sum.triplet.weight=0.5", "timm:test_vit"),
        ("loss.supcon.temperature=0.1", "timm:test_vit"),
        ("loss.triplet.margin=0.2", "vicinal:nano"),
    ],
)
def test_logos_small_with_overrides(loss: str, model: str, brands: Path, tmp_path: Path) -> None:
    sums = ["loss.sum.ntxent.temperature=0.07"] if "sum" in loss else []
    small = [f"model={model}", *(["random_init=true"] if "timm" in model else []), "preprocess.size=32", "steps=3"]
    small += ["sampler.pk.classes=4", "workers=0", "device=cpu", "trackers=[]", "draws=2", "cache=null"]
    recipe = Recipe.load(RECIPES["logos_small"], [f"data.voc={brands}", loss, *sums, *small])
    assert recipe.loss.chosen[0] == loss.split(".")[1]
    out = run(recipe, tmp_path / "run", say=lambda _: None)
    assert set(json.loads((out / "results.json").read_text())["after"]) == PARTS["logos_small"]
    assert Recipe.load(out / "recipe.yaml") == recipe
    assert load_encoder(out / "model").preprocess.crop == "pad"


def test_every_recipe_says_what_was_measured_or_that_it_was_not() -> None:
    for path in RECIPES.values():
        head = path.read_text().split("data:")[0]
        assert "MAP@R" in head or "Zero-shot" in head or "Not measured here" in head, path
        assert yaml.safe_load(path.read_text())["model"]


@pytest.mark.parametrize("name", sorted(name for name in PARTS if name.startswith("overlap_")))
def test_overlap(name: str, tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos")
    generic = tmp_path / "generic"
    generic.mkdir()
    for number in range(8):
        draw(SHAPES[number % 4], COLOURS[number % 6], 100 + number).rotate(90).resize((30, 30)).save(
            generic / f"{number}.png"
        )
    rows = "".join(f"{number},{SHAPES[number % 4]},train\n" for number in range(8))
    (tmp_path / "list.csv").write_text("ImageID,DisplayName,type\n" + rows)
    table = "".join(f"generic/{number}.png,{SHAPES[number % 4]}\n" for number in range(8))
    (tmp_path / "table.csv").write_text("image,label\n" + table)
    words = [*SMALL, "preprocess.size=32", f"elsewhere.mine.folder={photos}", "adapt.0.bottleneck.dim=4"]
    if name == "overlap_supervised":
        words += [f"data.open_images.root={generic}", f"data.open_images.csv={tmp_path / 'list.csv'}"]
    elif name == "overlap_dino":
        words += [f"data.folder={generic}"]
    else:
        words += [f"data.together.0.table={tmp_path / 'table.csv'}", "data.together.1.glyphs.characters=αβ"]
    if "dino" in name:
        words += [
            "loss.dino.prototypes=16",
            "loss.dino.hidden=16",
            "loss.dino.small_crops=2",
            "loss.dino.small_size=16",
        ]
    out = run(Recipe.load(RECIPES[name], [*words, "cache=null"]), tmp_path / "run", say=lambda _: None)
    results = json.loads((out / "results.json").read_text())
    assert set(results["after"]) == PARTS[name]
    assert set(results["overlap"]["difference"]) == {"mine"}
    assert results["training"]["steps"] == 3
    weights = load_file(out / "model" / "model.safetensors")
    assert any(value.any() for key, value in weights.items() if "bottleneck.up.weight" in key)
