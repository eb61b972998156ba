"""Every recipe in `recipes/`, three steps of it, on a miniature in its own layout and with a small random model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pictures import COLOURS, SHAPES, draw, write_folder
from test_data_benchmarks import flowers as flowers_miniature
from test_data_benchmarks import shrunk
from vicinal.recipe import Recipe
from vicinal.run import run

RECIPES = {path.stem: path for path in sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))}
PARTS = {
    "folder": {"unseen", "seen"},
    "flowers": {"seen", "unseen", "joint"},
    "flowers_all": {"all"},
    "nano": {"seen", "unseen", "joint"},
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


def test_every_recipe_says_what_was_measured_or_that_it_was_not() -> None:
    for path in RECIPES.values():
        head = path.read_text().split("data:")[0]
        assert "MAP@R" in head or "Not measured here" in head, path
        assert yaml.safe_load(path.read_text())["model"]
