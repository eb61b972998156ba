"""Recipes: strict, with the nearest name on a typo; overrides; the way there and back through YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml

from vicinal.recipe import ONE_OF, Recipe, apply_override, json_schema
from vicinal.types import InputError

ROOT = Path(__file__).parent.parent
LEAST = {"data": {"folder": "photos"}, "model": "timm:vit_tiny_patch16_224"}
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def write(tmp_path: Path, content: dict[str, object]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stepz": 3}, "stepz: unknown key; did you mean 'steps'?"),
        ({"data": {"foldr": "x"}}, "did you mean 'folder'?"),
        ({"loss": {"arcfaze": {}}}, "did you mean 'arcface'?"),
        ({"loss": {"arcface": {"margn": 0.1}}}, "did you mean 'margin'?"),
        ({"adapt": [{"lora": {"ranks": 4}}]}, "did you mean 'rank'?"),
        ({"adapt": [{"loora": {}}]}, "did you mean 'lora'?"),
        ({"augment": "lite"}, "did you mean 'light'?"),
        ({"split": {"class_disjoint": {"holdout": 1.5}}}, "split.class_disjoint.holdout"),
        ({"loss": {"arcface": {}, "cosface": {}}}, "exactly one"),
        ({"data": {"folder": "a", "table": "b"}}, "exactly one of folder, table, coco, voc, shards, hub, benchmark"),
        ({"adapt": []}, "adapt"),
        ({"data": {"folder": "a", "columns": {"label": "x"}}}, "columns has no meaning for data.folder"),
        ({"loss": {"triplet": {}}}, "sampler: {pk:"),
        ({"loss": {"supcon": {}}, "sampler": {"pk": {"images_per_class": 1}}}, "sampler: {pk:"),
        ({"wise_ft": 0.5, "adapt": [{"lora": {}}, {"bottleneck": {}}]}, "bottleneck adds new ones"),
        ({"loss": {"infonce": {}}, "adapt": [{"linear_head": {"dim": 8}}]}, "leave it out"),
        ({"templates": ["a photo"]}, "write {} once"),
        ({"memory": 100}, "only a pair loss remembers"),
        ({"steps": "many"}, "steps"),
        ({"seeds": 0}, "seeds"),
        ({"monitor": "recal@5"}, "monitor: 'recal@5' is not measured on validation; did you mean 'recall@5'?"),
        ({"monitor": "recall@20"}, "monitor: 'recall@20'"),
        ({"wise_ft": "auto", "split": {"class_disjoint": {"val": 0.0}}}, "split.class_disjoint.val"),
    ],
)
def test_a_mistake_is_named_with_its_place(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as error:
        Recipe.parse(LEAST | wrong, name="mine.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith("mine.yaml: ")


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(InputError) as error:
        Recipe.parse({"stepz": 3, "lrr": 1})
    assert all(word in str(error.value) for word in ("stepz", "lrr", "data: is required", "model: is required"))


def test_an_override_of_a_list_that_the_file_leaves_to_its_default(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, LEAST), ["adapt.0.lora.rank=4"])
    assert [a.chosen[0] for a in recipe.adapt] == ["lora"]
    assert recipe.adapt[0].chosen[1].rank == 4


def test_an_override_replaces_the_alternative(tmp_path: Path) -> None:
    path = write(tmp_path, LEAST | {"loss": {"arcface": {"margin": 0.4}}, "adapt": [{"lora": {"rank": 4}}]})
    overrides = [
        "data.table=t.csv",
        "loss.cosface.margin=0.2",
        "adapt.0.lora.rank=16",
        "adapt.1.linear_head.dim=64",
        "split.official={}",
        "lr=3e-4",
        "preprocess.size=112",
    ]
    recipe = Recipe.load(path, overrides)
    assert recipe.data.source == ("table", "t.csv")
    assert recipe.loss.chosen[0] == "cosface"
    assert recipe.loss.chosen[1].margin == 0.2
    assert [adapter.chosen[0] for adapter in recipe.adapt] == ["lora", "linear_head"]
    assert recipe.adapt[0].chosen[1].rank == 16
    assert recipe.split.chosen[0] == "official"
    assert recipe.lr == 3e-4
    assert recipe.preprocess.size == 112


@pytest.mark.parametrize("override", ["steps", "=3", "adapt.x.lora.rank=2", "adapt.7.lora.rank=2", "model.name=3"])
def test_an_override_that_says_nothing_is_refused(override: str) -> None:
    with pytest.raises(InputError):
        apply_override({"adapt": [{"lora": {}}], "model": "timm:x"}, override)


def test_the_resolved_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = Recipe.parse(
        LEAST
        | {"data": {"coco": {"train": "a.json", "test": "b.json"}}, "sampler": {"pk": {}}, "adapt": [{"full": {}}]}
    )
    path = tmp_path / "resolved.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe
    assert "steps:" in recipe.to_yaml(), "defaults are written out"


def test_the_schema_accepts_recipes_and_refuses_typos() -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    validator.validate(LEAST)
    assert len(RECIPES) >= 7
    for path in RECIPES:
        validator.validate(yaml.safe_load(path.read_text()))
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(LEAST | {"stepz": 1})


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        Recipe.load(tmp_path / "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1")
    with pytest.raises(InputError, match="is not YAML"):
        Recipe.load(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(InputError, match="must be a mapping"):
        Recipe.load(tmp_path / "list.yaml")


def test_every_alternative_is_reachable() -> None:
    assert {"arcface", "cosface", "ntxent", "supcon", "triplet"} <= set(ONE_OF["loss"])
    assert {"lora", "full", "last_blocks", "linear_head", "bitfit"} <= set(ONE_OF["adapt"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"arcface": {"margin": 9}}}, r"loss\.arcface: margin is an angle"),
        ({"loss": {"proxy_anchor": {"alpha": 0}}}, r"loss\.proxy_anchor: alpha must be above 0"),
        ({"loss": {"sum": {"ntxent": {"temperature": -1.0}}}, "sampler": {"pk": {"classes": 2, "images_per_class": 2}}},
         r"loss\.sum\.ntxent: temperature"),
        ({"loss": {"semantic_proxies": {"accumulator": {"gru": {"keep": 2.0}}}}}, r"accumulator\.gru: keep is a share"),
        ({"adapt": [{"lora": {"rank": 0}}]}, r"adapt\.0\.lora: lora\.rank is 0; give at least 1"),
    ],
)  # fmt: skip
def test_a_setting_out_of_its_range_is_said_with_its_key_and_no_random_number_is_used_up(
    changes: dict[str, Any], message: str
) -> None:
    state = torch.get_rng_state()
    with pytest.raises(InputError, match=message):
        Recipe.parse({"data": {"folder": "."}, "model": "vicinal:nano"} | changes)
    Recipe.parse({"data": {"folder": "."}, "model": "vicinal:nano", "loss": {"proxy_nca": {}}})
    assert torch.equal(state, torch.get_rng_state())
