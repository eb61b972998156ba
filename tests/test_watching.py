"""What is measured while a model learns from images and texts: two parts, a file each time, a table, the gain."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from test_run_image_text import GLYPHS, recipe
from vicinal.data.glyphs import load_glyphs
from vicinal.embedding import embed
from vicinal.models.backbones import load_encoder
from vicinal.recipe import Recipe
from vicinal.run import run
from vicinal.types import InputError
from vicinal.watching import Watch, found_both_ways, some_of


def table_of(out: Path) -> list[dict[str, str]]:
    with (out / "evaluations.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_writes_down_each_evaluation(tmp_path: Path) -> None:
    out = run(
        recipe(steps=5, evaluate_every=2, lr=3e-3, checkpoint_every=1, keep=9), tmp_path / "run", say=lambda _: None
    )
    files = sorted((out / "evaluations").glob("*.json"))
    assert [path.stem for path in files] == [f"step-{step:08d}" for step in (0, 2, 4, 5)]
    found = [json.loads(path.read_text()) for path in files]
    first, last = (content["parts"] for content in (found[0], found[-1]))
    assert found[0]["monitor"] == "full/text_to_image_recall@10"
    assert set(first) == {"validation", "train"}
    assert first["validation"]["items"] == 2  # a quarter of the eight classes that are not held out
    assert first["train"]["images"] == first["validation"]["images"]
    assert first["train"]["texts"] > 1
    metrics = last["validation"]["metrics"]
    assert {f"full/{way}_recall@{k}" for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)} < set(metrics)
    assert {"full/text_to_image_median_rank", "full/mean_recall", "map@r"} < set(metrics)
    for part in ("validation", "train"):
        for name, values in last[part]["metrics"].items():
            before = first[part]["metrics"][name]["value"]
            assert values["zero_shot"] == before
            assert values["gain"] == pytest.approx(values["value"] - before)
            if before:
                assert values["relative_gain"] == pytest.approx(values["value"] / before - 1)
            else:
                assert values["relative_gain"] is None
        assert all(values["gain"] == 0 for values in first[part]["metrics"].values())
    assert any(values["gain"] for values in last["train"]["metrics"].values())

    rows = table_of(out)
    assert len(rows) == sum(len(part["metrics"]) for content in found for part in content["parts"].values())
    (row,) = [r for r in rows if (r["step"], r["part"], r["metric"]) == ("5", "train", "full/mean_recall")]
    assert float(row["gain"]) == pytest.approx(last["train"]["metrics"]["full/mean_recall"]["gain"])

    history = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    values = [row["val"] for row in history if "val" in row]
    for row, content in zip(values, found, strict=True):
        assert (
            row["full/text_to_image_recall@5"]
            == content["parts"]["validation"]["metrics"]["full/text_to_image_recall@5"]["value"]
        )
        assert row["train/full/mean_recall"] == content["parts"]["train"]["metrics"]["full/mean_recall"]["value"]
    training = json.loads((out / "results.json").read_text())["training"]
    assert training["best_value"] == max(row["full/text_to_image_recall@10"] for row in values)
    assert "Text to image Recall@10" in (out / "report.html").read_text()

    table = (out / "evaluations.csv").read_text()  # a run that goes back drops what came later, and comes to the same
    again = tmp_path / "again"
    shutil.copytree(out, again)
    settings = recipe(steps=5, evaluate_every=2, lr=3e-3, checkpoint_every=1, keep=9)
    run(settings, again, resume=again / "checkpoints" / "step-00000003", say=lambda _: None)
    assert (again / "evaluations.csv").read_text() == table


def test_validation_of_one_image_a_class_is_enough_for_captions(tmp_path: Path) -> None:
    """No image has another of its class to find, so only captions can select."""
    glyphs = load_glyphs(**GLYPHS)
    rows, seen = [], set()
    for i in range(len(glyphs)):
        label = glyphs.column("label")[i]
        if label not in seen:
            seen.add(label)
            split = ["train", "train", "val", "test"][len(seen) % 4]
            rows.append(
                {"image": str(glyphs.path(i)), "label": label, "text": glyphs.column("text")[i], "split": split}
            )
    table = tmp_path / "one.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows))
    settings = {"data": {"table": str(table)}, "split": {"official": {}}, "sampler": {"shuffle": {"batch_size": 4}}}
    out = run(recipe(**settings, monitor="full/mean_recall"), tmp_path / "run", say=lambda _: None)
    training = json.loads((out / "results.json").read_text())["training"]
    assert training["selected_on"] == "validation"
    metrics = json.loads((out / "evaluations" / "step-00000000.json").read_text())["parts"]["validation"]["metrics"]
    assert "map@r" not in metrics
    assert metrics["full/text_to_image_recall@1"]["queries"] == 3


def test_the_metrics_are_those_of_the_protocol() -> None:
    glyphs = load_glyphs(**GLYPHS)
    torch.manual_seed(0)
    encoder = load_encoder("vicinal:nano", random_init=True)
    images = embed(encoder, glyphs, device="cpu", precision="fp32")
    metrics = found_both_ways(encoder, glyphs, recipe(recall_at=[1, 2]), images)
    four = [metrics[f"full/{way}_recall@{k}"].value for way in ("text_to_image", "image_to_text") for k in (1, 2)]
    assert metrics["full/mean_recall"].value == pytest.approx(sum(four) / 4)
    assert metrics["full/image_to_text_recall@1"].queries == len(glyphs)


def test_a_part_of_the_training_is_bounded_and_always_the_same() -> None:
    glyphs = load_glyphs(**GLYPHS)
    mask = some_of(glyphs, 7)
    assert int(mask.sum()) == 7
    assert torch.equal(mask, some_of(glyphs, 7))
    assert bool(some_of(glyphs, 10**6).all())


@pytest.mark.parametrize(
    ("given", "monitor"),
    [
        ({}, "full/text_to_image_recall@10"),
        ({"recall_at": [1, 3]}, "full/text_to_image_recall@3"),
        ({"monitor": "text_to_image_recall@5"}, "full/text_to_image_recall@5"),
        ({"monitor": "image_to_text_mrr"}, "full/image_to_text_mrr"),
        ({"monitor": "full/mean_recall"}, "full/mean_recall"),
        ({"monitor": "map@r"}, "map@r"),
        ({"loss": {"arcface": {}}}, "map@r"),
    ],
    ids=str,
)
def test_what_selects(given: dict[str, Any], monitor: str) -> None:
    made = recipe(**given)
    assert made.monitor == monitor
    again = Recipe.parse(json.loads(made.model_dump_json(exclude_none=True)))
    assert again.monitor == monitor


def test_what_cannot_select_is_named() -> None:
    with pytest.raises(InputError, match=r"'full/text_to_image_recall@20' is not measured.*text_to_image_recall@10"):
        recipe(monitor="text_to_image_recall@20")
    with pytest.raises(InputError, match="'full/mean_recall' is not measured"):
        recipe(loss={"arcface": {}}, monitor="full/mean_recall")


def test_later_evaluations_are_of_a_run_that_went_back(tmp_path: Path) -> None:
    glyphs = load_glyphs(**GLYPHS)
    from vicinal.types import Estimate

    values = iter([0.5, 0.6, 0.7, 0.9])
    watch = Watch(
        recipe(),
        {"validation": (glyphs, lambda: {"full/mean_recall": Estimate(next(values), 0.0, 1.0, 3, 9)})},
        tmp_path,
    )
    for step in (0, 5, 10, 5):
        assert set(watch()) == {"full/mean_recall"}
        watch.write(step)
    rows = table_of(tmp_path)
    assert [(row["step"], row["value"], row["zero_shot"]) for row in rows] == [("0", "0.5", "0.5"), ("5", "0.9", "0.5")]
    assert float(rows[1]["relative_gain"]) == pytest.approx(0.8)
