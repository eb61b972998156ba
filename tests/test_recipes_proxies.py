"""The recipes of semantic proxies: each is as large as the spec counts, and is trained on a miniature."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import test_data_benchmarks as layouts
from pictures import COLOURS, SHAPES, draw, write_folder
from test_recipes import PARTS, RECIPES
from vicinal.data.benchmarks import BENCHMARKS, Count
from vicinal.models.adapters import VisualPrompt
from vicinal.recipe import Recipe
from vicinal.run import run
from vicinal.training.semantic_proxies import PromptTable
from vicinal.types import InputError

# Millions of shared prompts and of class prompts, and GB of the latter with Adam's averages: spec B2.5, of all classes.
COUNTED = {
    "proxies_cub": (0.046, 1.38, 0.02),
    "proxies_cub_vitb": (0.184, 0.384, 0.005),
    "proxies_cars": (0.296, 12.95, 0.16),
    "proxies_cars_vitb": (0.545, 25.9, 0.31),
    "proxies_sop": (0.415, 260.8, 3.1),
    "proxies_sop_vitb": (0.576, 347.7, 4.2),
    "proxies_inshop": (0.415, 1473, 17.7),
    "proxies_inshop_vitb": (0.829, 2210, 26.5),
    "proxies_inat": (0.288, 262.2, 3.1),
    "proxies_inat_vitb": (0.576, 524, 6.3),
}
PROXIES = [name for name in RECIPES if name.startswith("proxies_") and name != "proxies_small"]

FEW = [
    "model=timm:test_vit",
    "random_init=true",
    "preprocess.size=32",
    "steps=2",
    "draws=1",
    "workers=0",
    "device=cpu",
    "trackers=[]",
    "cache=null",
    "sampler.pk.classes=2",
    "adapt.0.visual_prompt.tokens=3",
    "adapt.0.visual_prompt.depth=2",
    "loss.semantic_proxies.prompts.tokens=2",
    "loss.semantic_proxies.prompts.depth=2",
]


@pytest.fixture
def miniatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four classes to train on and three to measure, of two pictures each, in the five layouts."""
    kinds = [("train", c) for c in range(4)] + [("test", c) for c in range(4, 7)]
    monkeypatch.setattr(layouts, "BIRDS", {f"{c + 1:03d}.bird_{c}": 2 for c in range(7)} | {"008.bird_7": 2})
    monkeypatch.setattr(layouts, "CARS", {f"car {c}": 2 for c in range(8)})
    monkeypatch.setattr(
        layouts,
        "PRODUCTS",
        {
            part: [f"{2 * c + i} {c} 1 mug_final/{c}_{i}.JPG" for p, c in kinds if p == part for i in range(2)]
            for part in ("train", "test")
        },
    )
    clothes = [f"img/WOMEN/id_{c:08d}/{i}.jpg id_{c:08d} train" for p, c in kinds if p == "train" for i in range(2)]
    for c in range(4, 7):
        clothes += [f"img/MEN/id_{c:08d}/{i}.jpg id_{c:08d} {part}" for i, part in enumerate(("query", "gallery"))]
    monkeypatch.setattr(layouts, "CLOTHES", clothes)
    monkeypatch.setattr(
        layouts,
        "SPECIES",
        {
            part: [f"train_val2018/Aves/{c}/{i}.jpg" for p, c in kinds if p == part for i in range(2)]
            for part in ("train", "test")
        },
    )
    three = ({"train": Count(4, 8), "test": Count(3, 6)}, 7)
    counts = {
        "cub200": ({"train": Count(4, 8), "test": Count(4, 8)}, 8),
        "cars196": ({"train": Count(4, 8), "test": Count(4, 8)}, 8),
        "sop": three,
        "inshop": ({"train": Count(4, 8), "query": Count(3, 3), "gallery": Count(3, 3)}, 7),
        "inaturalist": three,
    }
    for name, (parts, classes) in counts.items():
        home = layouts.write_miniature(name, tmp_path)
        monkeypatch.setitem(BENCHMARKS, name, dataclasses.replace(BENCHMARKS[name], parts=parts, classes=classes))
        pictures = [p for p in sorted(home.rglob("*")) if p.suffix.lower() == ".jpg" and not p.name.startswith("._")]
        for number, path in enumerate(pictures):  # no two alike: equal ones would be leaks
            draw(SHAPES[number % 4], COLOURS[number % 6], number).save(path)
    return tmp_path


def test_there_are_two_for_each_of_the_five() -> None:
    assert set(PROXIES) == set(COUNTED)


@pytest.mark.parametrize("name", PROXIES)
def test_prompts_are_as_many_as_the_spec_counts(name: str) -> None:
    recipe = Recipe.load(RECIPES[name])
    settings = recipe.loss.chosen[1]
    classes = BENCHMARKS[recipe.data.benchmark.name].parts["train"].classes
    width = 384 if "small" in recipe.model else 768
    shared, own = (
        sum(VisualPrompt(**prompts.model_dump()).counts(12)) * width
        for prompts in (recipe.adapt[0].visual_prompt, settings.prompts)
    )
    millions, of_classes, gigabytes = COUNTED[name]
    assert shared / 1e6 == pytest.approx(millions, abs=5e-4)
    assert own * classes / 1e6 == pytest.approx(of_classes, rel=2e-3)
    assert 12 * own * classes / 1e9 == pytest.approx(gigabytes, abs=0.06)
    assert 4 * (3 * own + 1) * classes <= settings.max_bytes < 1.2 * 4 * (3 * own + 1) * classes + 2**31
    assert settings.on_disk == (gigabytes > 2)


def test_the_largest_table_is_refused_without_its_limit_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"3,997 classes, 960 of 384 .* 17\.7 GB .* max_bytes, 2\.1 GB"):
        PromptTable(classes=3997, tokens=12 * 80, width=384, folder=tmp_path / "prompts")
    assert not (tmp_path / "prompts").exists()


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if "vitb" in n else ()) for n in PROXIES])
def test_each_is_trained_on_a_miniature(name: str, miniatures: Path, tmp_path: Path) -> None:
    changes = [*FEW, f"data.benchmark.root={miniatures}", "split.official.val=0.5", "seeds=1"]
    out = run(
        Recipe.load(RECIPES[name], [*changes, "adapt.2.linear_head.dim=16"]), tmp_path / "run", say=lambda _: None
    )
    results = json.loads((out / "results.json").read_text())
    assert set(results["after"]) == PARTS[name]
    recall = Recipe.load(RECIPES[name]).recall_at
    assert {f"recall@{k}" for k in recall} <= set(results["after"]["unseen"])
    assert results["training"]["selected_on"] == "validation"
    assert results["data"]["train_classes"] == 2
    settings = Recipe.load(out / "recipe.yaml").loss.chosen[1].prompts
    prompts = sum(VisualPrompt(**settings.model_dump()).counts(12)) * 64 * 2
    head, accumulator, learnt = (2 * 64 + 64 * 16 + 16), (2 * 3 * 16 * 16 + 3 * 16), 2 * 16
    assert results["training"]["trained_aside"] == prompts + head + accumulator + learnt
    assert results["training"]["added_parameters"] < results["training"]["trained_parameters"]


def test_the_small_one(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos")
    changes = [*FEW, f"data.folder={photos}", "seeds=2"]
    out = run(Recipe.load(RECIPES["proxies_small"], changes), tmp_path / "run", say=lambda _: None)
    results = json.loads((out / "results.json").read_text())
    assert set(results["after"]) == PARTS["proxies_small"]
    assert len(results["seeds"]) == 2
