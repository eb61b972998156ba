"""Runs on generic data: trained on whole, without labels too, and measured elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from pictures import write_folder
from vicinal.bring import bring
from vicinal.data.division import divide
from vicinal.data.manifest import Manifest
from vicinal.data.sources import read_folder, read_open_images
from vicinal.evaluation.overlap import overlap
from vicinal.evaluation.scores import load_scores
from vicinal.models.backbones import load_encoder
from vicinal.overlap import measure_overlap
from vicinal.recipe import Recipe, apply_override
from vicinal.run import run
from vicinal.types import Embeddings, InputError

SMALL = {
    "model": "timm:test_vit",
    "random_init": True,
    "preprocess": {"size": 32},
    "steps": 4,
    "draws": 2,
    "workers": 0,
    "device": "cpu",
    "trackers": [],
    "cache": None,
    "sampler": {"shuffle": {"batch_size": 8}},
    "adapt": [{"bottleneck": {"dim": 4}}],
    "lr": 0.01,
}
DINO = {"dino": {"prototypes": 16, "hidden": 16, "bottleneck": 8, "small_crops": 2, "small_size": 16}}


@pytest.fixture(scope="module")
def generic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images without class folders, of other colours than those that are measured."""
    folder = tmp_path_factory.mktemp("generic")
    for number in range(12):
        image = Image.effect_noise((40, 48), 40 + 10 * number).convert("RGB")
        image.save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos") / "photos")


def quiet(line: str) -> None:
    pass


def test_images_without_labels_are_trained_on_and_others_measured(generic: Path, photos: Path, tmp_path: Path):
    recipe = Recipe.parse(
        {**SMALL, "data": {"folder": str(generic), "labels": False}, "split": {"all": {}}, "loss": DINO}
        | {"elsewhere": {"photos": {"folder": str(photos)}}, "augment": "dino", "clip": None, "clip_each": 0.3}
        | {"final_weight_decay": 0.4, "weight_decay": 0.04}
        | {"model": str(load_encoder("timm:test_vit", size=32, random_init=True).save(tmp_path / "untuned"))}
        | {"random_init": False}
    )
    out = run(recipe, tmp_path / "run", say=quiet)
    results = json.loads((out / "results.json").read_text())
    assert set(results["before"]) == set(results["after"]) == set(results["difference"]) == {"photos"}
    assert results["data"]["train_images"] == 12
    assert results["data"]["parts"]["photos"]["queries"] == results["after"]["photos"]["map@r"]["queries"]
    assert results["training"]["selected_on"] == "nothing: the last step"
    assert results["training"]["best_value"] is None, "NaN is no JSON"
    assert "photos" in (out / "report.html").read_text()
    before, after = (Embeddings.load(out / "embeddings" / side / "photos.safetensors") for side in ("before", "after"))
    assert results["overlap"]["before"]["photos"]["overlap"]["value"] == overlap(before)["overlap"].value
    change = results["overlap"]["difference"]["photos"]
    assert change["auroc"]["value"] == pytest.approx(overlap(after)["auroc"].value - overlap(before)["auroc"].value)
    assert load_scores(out / "scores" / "after.safetensors").keys() == {"photos"}
    # what is saved is the teacher: the average, which with so large a momentum has hardly moved
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert rows[-1]["teacher_entropy"] > 0
    up = load_encoder(str(out)).model.get_submodule("blocks.0.bottleneck.up").weight
    assert 0 < up.abs().max() < 4 * 0.01 / 2
    assert Recipe.load(out / "recipe.yaml") == recipe

    lines: list[str] = []
    made = measure_overlap(str(out), [photos], tmp_path / "overlap", device="cpu", say=lines.append)
    told = json.loads((made / "overlap.json").read_text())["photos"]
    assert told["after"]["overlap"] == results["overlap"]["after"]["photos"]["overlap"]
    assert told["difference"]["auroc"]["value"] == pytest.approx(change["auroc"]["value"])
    assert any(line.split()[:2] == ["photos", "overlap"] and "->" in line for line in lines)
    with Image.open(made / "overlap.png") as picture:
        assert picture.size[0] > 300
    with pytest.raises(InputError, match="--before MODEL"):
        measure_overlap(str(out / "model"), [photos], tmp_path / "again")
    (out / "recipe.yaml").write_text(Recipe.parse(recipe.model_dump() | {"random_init": True}).to_yaml())
    with pytest.raises(InputError, match="began with random weights"):
        measure_overlap(str(out), [photos], tmp_path / "again")


def test_a_throw_away_head_on_several_sources(photos: Path, tmp_path: Path):
    shutil.copytree(photos, tmp_path / "more" / "other")
    for number, path in enumerate(sorted((tmp_path / "more").rglob("*.*"))):  # other pixels, and labels "other/..."
        Image.effect_noise((36, 36), 30 + number).convert("RGB").save(path.with_suffix(".png"))
    recipe = Recipe.parse(
        {
            **SMALL,
            "data": {
                "together": [
                    {"folder": str(tmp_path / "more")},
                    {"glyphs": {"characters": "αβγ", "families": ["dejavu_mono"]}},
                ]
            },
            "split": {"all": {}},
            "loss": {"cross_entropy": {}},
        }
        | {"elsewhere": {"photos": {"folder": str(photos)}}, "loss_lr": 0.01, "final_lr": 0.01, "warmup": 0}
    )
    out = run(recipe, tmp_path / "run", say=quiet)
    results = json.loads((out / "results.json").read_text())
    assert results["data"]["train_classes"] == len(read_folder(photos).classes) + 3
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    assert {row["lr"] for row in rows} == {0.01}, "constant"


def test_what_is_measured_elsewhere_is_not_trained_on(photos: Path, tmp_path: Path):
    recipe = Recipe.parse(
        {**SMALL, "data": {"folder": str(photos)}, "split": {"all": {}}, "elsewhere": {"mine": {"folder": str(photos)}}}
    )
    with pytest.raises(InputError, match=r"elsewhere\.mine are trained on"):
        run(recipe, tmp_path / "run", say=quiet)


def test_a_loss_of_labels_says_that_there_are_none(generic: Path, photos: Path, tmp_path: Path):
    content = {**SMALL, "split": {"all": {}}, "elsewhere": {"photos": {"folder": str(photos)}}}
    content["data"] = {"together": [{"folder": str(generic), "labels": False}]}
    with pytest.raises(InputError, match=r"loss\.arcface learns from labels, and the data has none"):
        run(Recipe.parse(content), tmp_path / "run", say=quiet)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": {"all": {}}}, "nothing would be measured"),
        ({"elsewhere": {"seen": {"folder": "a"}}}, "name of a part"),
        ({"data": {"folder": "a", "labels": False}}, "needs split: {all: {}} and loss: {dino: {}}"),
        ({"data": {"glyphs": {}, "labels": False}}, "no meaning for data.glyphs"),
        ({"data": {"together": []}}, "data.together"),
        ({"data": {"together": [{"foldr": "a"}]}}, "did you mean 'folder'?"),
        ({"final_lr": 1.0}, "a rate only falls"),
        ({"loss": {"dino": {}}, "retention": 1.0}, "dino has none"),
        ({"loss": {"dino": {"prototype": 4}}}, "did you mean 'prototypes'?"),
    ],
)
def test_a_mistake_is_named(wrong: dict[str, object], message: str):
    with pytest.raises(InputError) as error:
        Recipe.parse({"data": {"folder": "a"}, "model": "timm:test_vit"} | wrong)
    assert message in str(error.value)


def test_overrides_reach_every_source():
    content: dict[str, object] = {"elsewhere": {"mine": {"folder": "a"}}, "data": {"together": [{"folder": "a"}]}}
    for word in ("elsewhere.mine.table=t.csv", "data.together.0.table=u.csv", "data.together.1.folder=b"):
        apply_override(content, word)
    assert content == {
        "elsewhere": {"mine": {"table": "t.csv"}},
        "data": {"together": [{"table": "u.csv"}, {"folder": "b"}]},
    }


def test_sources_together(photos: Path, tmp_path: Path):
    shutil.copytree(photos, tmp_path / "a" / "copy")
    one, other = read_folder(photos), read_folder(tmp_path / "a")
    both = Manifest.together([one, other])
    assert len(both) == len(one) + len(other)
    assert set(both.classes) == set(one.classes) | set(other.classes)
    assert all(both.path(row).is_file() for row in (0, len(both) - 1))
    assert torch.equal(both.image(len(one)), other.image(0))
    with pytest.raises(InputError, match="no label"):
        Manifest.together([one, read_folder(tmp_path / "a", labels=False)])
    division = divide(both, "all")
    assert division.train.all()
    assert not division.measured().any()
    assert not division.queries().any()


# ---------------------------------------------------------------------------------------------------------- Open Images


def open_images(tmp_path: Path, text: str) -> Manifest:
    for name in ("train/1f.jpg", "train/2f.png", "validation/3f.jpg", "4f.JPG"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6), (10 * len(name), 0, 0)).save(path)
    (tmp_path / "list.csv").write_text(text)
    return bring(
        Recipe.parse(
            {"data": {"open_images": {"root": str(tmp_path / "images"), "csv": str(tmp_path / "list.csv")}}}
            | {"model": "timm:test_vit"}
        ).data
    )


def test_open_images(tmp_path: Path):
    text = (
        "ImageID,DisplayName,type\n1f,Tomato,train\n2f,Bear,train\n3f,Tomato,validation\n4f,Axe,test\n1f,Bear,train\n"
    )
    found = open_images(tmp_path, text)
    assert found.classes == ("Tomato", "Bear", "Axe"), "in the order of the file"
    assert found.labels().tolist() == [0, 1, 0, 2, 1]
    assert found.ids() == ("train/1f.jpg", "train/2f.png", "validation/3f.jpg", "4f.JPG", "train/1f.jpg#2")
    assert found.column("type") == ["train", "train", "validation", "test", "train"]
    assert "split" not in found.names()
    assert found.image(3).shape == (3, 6, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ImageID,LabelName\n1f,/m/01\n", "no column DisplayName"),
        ("ImageID,DisplayName,type\n1f,Tomato,train\n9f,Axe,test\n", r"1 of 2 pictures are missing .*row 2: 9f"),
        ("ImageID,DisplayName,type\n1f,,train\n", "no DisplayName in row 1"),
    ],
)
def test_open_images_says_what_is_wrong(tmp_path: Path, text: str, message: str):
    with pytest.raises(InputError, match=message):
        open_images(tmp_path, text)
    with pytest.raises(InputError, match="not a folder"):
        read_open_images(tmp_path / "nowhere", tmp_path / "list.csv")
