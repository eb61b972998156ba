"""Runs that learn from captions, on the built-in characters with nano's architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pictures import write_folder
from vicinal.models.backbones import load_encoder
from vicinal.recipe import Recipe
from vicinal.run import run
from vicinal.types import InputError

GLYPHS = {"families": ["dejavu_sans", "dejavu_serif"], "test_families": ["dejavu_serif"], "characters": "αβγδεζηθικλμ"}


def recipe(**more: object) -> Recipe:
    content: dict[str, Any] = {
        "data": {"glyphs": GLYPHS},
        "split": {"class_disjoint": {"holdout": 0.34, "seed": 1, "val": 0.25}},
        "model": "vicinal:nano",
        "random_init": True,
        "adapt": [{"full": {"tower": "both"}}],
        "loss": {"infonce": {}},
        "sampler": {"shuffle": {"batch_size": 16}},
        "steps": 3,
        "draws": 2,
        "workers": 0,
        "device": "cpu",
        "precision": "fp32",
        "cache": None,
        "trackers": [],
    }
    return Recipe.parse(content | more)


@pytest.mark.parametrize("loss", ["infonce", "siglip"])
def test_a_run_on_captions(tmp_path: Path, loss: str) -> None:
    out = run(recipe(loss={loss: {}}), tmp_path / "run", say=lambda _: None)
    results = json.loads((out / "results.json").read_text())
    for side in ("before", "after", "difference"):
        assert {"accuracy@0shot", "full/text_to_image_recall@1", "map@r"} <= set(results[side]["unseen"])
    assert results["after"]["unseen"]["accuracy@0shot"]["n"] == 4
    assert results["after"]["unseen"]["full/text_to_image_median_rank"]["value"] >= 1
    assert not any(name.endswith("_rank") for name in results["difference"]["unseen"]), "less is more"
    row = json.loads((out / "history.jsonl").read_text().splitlines()[-2])
    assert row["scale"] > 0
    assert ("bias" in row) == (loss == "siglip")
    tuned, fresh = load_encoder(out / "model"), load_encoder("vicinal:nano", random_init=True)
    assert tuned.logit_scale != pytest.approx(fresh.logit_scale, abs=1e-9)
    assert "Zero-shot accuracy" in (out / "report.html").read_text()


def test_siglip_from_a_softmax_model_starts_from_a_fitted_scale_and_bias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vicinal.assembly as room

    fitted: list[tuple[float, float]] = []

    def spy(*arguments: object, **named: object) -> tuple[float, float]:
        fitted.append((7.0, -3.0))
        assert named["batch"] == 16
        return fitted[-1]

    monkeypatch.setattr(room, "fit_scale_and_bias", spy)
    folder = tmp_path / "softmax"
    load_encoder("vicinal:nano", random_init=True).save(folder)
    settings = recipe(model=str(folder), random_init=False, loss={"siglip": {}}, steps=1, lr=1e-9)
    told: list[str] = []
    run(settings, tmp_path / "run", say=told.append)
    assert fitted
    assert "loss: starts from scale 7.00, bias -3.00" in told
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    row = next(row for row in rows if "scale" in row)
    assert (row["scale"], row["bias"]) == (pytest.approx(7.0), pytest.approx(-3.0))


def test_labels_alone_lose_nothing_by_a_text_tower(tmp_path: Path) -> None:
    """Names are measured, captions too, and the text tower stays as it was."""
    settings = recipe(loss={"arcface": {}}, adapt=[{"lora": {"rank": 2}}], class_means=False, lr=0.01)
    out = run(settings, tmp_path / "run", say=lambda _: None)
    assert "accuracy@0shot" in json.loads((out / "results.json").read_text())["difference"]["unseen"]
    torch.manual_seed(settings.seed)
    tuned = load_encoder(out / "model")
    assert torch.isfinite(tuned.encode_text(["greek small letter alpha"])).all()


def test_captions_are_asked_for_before_anything_is_computed(tmp_path: Path) -> None:
    settings = recipe(data={"folder": str(write_folder(tmp_path / "photos"))})
    with pytest.raises(InputError, match=r"loss\.infonce learns from captions.*column text, or captions"):
        run(settings, tmp_path / "run", say=lambda _: None)
    assert not (tmp_path / "run" / "embeddings").exists()


def test_a_model_that_reads_no_text_and_a_checkpoint_that_is_none_are_refused_before_the_baseline(
    tmp_path: Path,
) -> None:
    told: list[str] = []
    for settings, resume, message in (
        (recipe(model="timm:test_vit"), None, "has no text tower"),
        (recipe(), tmp_path / "step-1", "step-1 is no checkpoint"),
        (recipe(seeds=2), tmp_path / "step-1", "not from one checkpoint"),
    ):
        with pytest.raises(InputError, match=message):
            run(settings, tmp_path / "run", resume=resume, say=told.append)
    assert not any("embedding" in line for line in told)


def test_a_new_head_ends_what_texts_can_say(tmp_path: Path) -> None:
    settings = recipe(loss={"arcface": {}}, adapt=[{"lora": {"rank": 2}}, {"linear_head": {"dim": 16}}])
    out = run(settings, tmp_path / "run", say=lambda _: None)
    assert "accuracy@0shot" not in json.loads((out / "results.json").read_text())["before"]["unseen"]


def test_captions_that_are_cut_are_counted_and_said(tmp_path: Path) -> None:
    from vicinal.data.glyphs import load_glyphs

    glyphs = load_glyphs(**GLYPHS)
    rows = [{"image": str(glyphs.path(i)), "label": glyphs.column("label")[i]} for i in range(len(glyphs))]
    for i, row in enumerate(rows):
        row["text"] = f"{row['label']} " + ("long " * 200 if i % 2 else "")
    table = tmp_path / "long.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows))
    said: list[str] = []
    out = run(recipe(data={"table": str(table)}, steps=1), tmp_path / "run", say=said.append)
    (line,) = [line for line in said if line.startswith("captions: ")]
    notes = json.loads((out / "results.json").read_text())["data"]["notes"]
    assert line.removeprefix("captions: ") in notes
    words = line.split()
    assert 2 * int(words[1]) == int(words[3]), "every second one"


def test_rows_without_a_caption_are_measured_and_not_trained_on(tmp_path: Path) -> None:
    from vicinal.data.glyphs import load_glyphs

    glyphs = load_glyphs(**GLYPHS)
    rows = [{"image": str(glyphs.path(i)), "label": glyphs.column("label")[i]} for i in range(len(glyphs))]
    for i, row in enumerate(rows):
        row["text"] = "" if i % 4 == 0 else glyphs.column("text")[i]
    table = tmp_path / "some.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows))
    results, said = [], []
    for loss in ("infonce", "arcface"):
        out = run(recipe(data={"table": str(table)}, loss={loss: {}}), tmp_path / loss, say=said.append)
        results.append(json.loads((out / "results.json").read_text())["data"])
    assert results[0]["parts"] == results[1]["parts"]
    assert results[0]["train_images"] < results[1]["train_images"]
    (note,) = [note for note in results[0]["notes"] if "no caption" in note]
    assert said.count(f"captions: {note}") == 1, "said once, and of the training on captions alone"


@pytest.mark.parametrize(("text", "message"), [("", "no image .* has a caption"), ("a sign", "one caption, 'a sign'")])
def test_captions_that_tell_nothing_apart_are_refused_before_the_baseline(tmp_path: Path, text: str, message: str):
    from vicinal.data.glyphs import load_glyphs

    glyphs = load_glyphs(**GLYPHS)
    held_out = sorted(set(glyphs.column("label")))[::2]
    rows = [
        {"image": str(glyphs.path(i)), "label": glyphs.column("label")[i], "text": text} for i in range(len(glyphs))
    ]
    for row in rows:
        row["split"] = "test" if row["label"] in held_out else "train"
        row["text"] = row["label"] if row["split"] == "test" else text
    table = tmp_path / "alike.jsonl"
    table.write_text("\n".join(json.dumps(row) for row in rows))
    told: list[str] = []
    with pytest.raises(InputError, match=message):
        run(recipe(data={"table": str(table)}, split={"official": {}}), tmp_path / "run", say=told.append)
    assert not any("embedding" in line for line in told)


@pytest.mark.parametrize("by", [["text", "label"], ["label"]], ids=str)
def test_batches_without_two_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: list[str]) -> None:
    """And in micro batches: what the loss sees is the whole batch."""
    import vicinal.run as room

    seen: list[list[str]] = []
    plain = room.train_batches

    def watched(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401
        for batch in plain(*arguments, **named):
            seen.append(list(batch["text"]))
            yield batch

    monkeypatch.setattr(room, "train_batches", watched)
    data = {"glyphs": GLYPHS | {"images_per_face": 3}}
    run(
        recipe(data=data, sampler={"no_duplicate": {"batch_size": 5, "by": by}}, steps=6, micro_batch=2),
        tmp_path / "run",
        say=lambda _: None,
    )
    assert len(seen) >= 6
    assert all(len(set(texts)) == len(texts) == 5 for texts in seen)


def test_batches_that_cannot_be_filled_are_refused(tmp_path: Path) -> None:
    cases = {
        r"sampler\.shuffle\.batch_size=99, but there are only 24 images with captions": {"shuffle": {"batch_size": 99}},
        r"batch_size=99, but there are only 24 items.*batch_size=24 or less": {"no_duplicate": {"batch_size": 99}},
        r"no_duplicate\.by: the data has no column group": {"no_duplicate": {"batch_size": 4, "by": ["group"]}},
    }
    for number, (message, sampler) in enumerate(cases.items()):
        with pytest.raises(InputError, match=message):
            run(recipe(sampler=sampler), tmp_path / str(number), say=lambda _: None)


def test_protocols_stand_in_every_metrics_name_and_captions_may_all_count(tmp_path: Path) -> None:
    """Three protocols of one run; asked with all captions there are more queries than with the first of each."""
    settings = recipe(
        protocols=["full", "sampled100", "index"], kinds="script", captions={"measured": "all"}, steps=1, seeds=2
    )
    out = run(settings, tmp_path / "run", say=lambda _: None)
    results = json.loads((out / "results.json").read_text())
    found = results["after"]["unseen"]
    for protocol in ("full", "sampled100", "index"):
        for way in ("image_to_text", "text_to_image"):
            names = {f"{protocol}/{way}_{m}" for m in ("recall@1", "recall@5", "recall@10", "mrr", "median_rank")}
            assert names <= set(found)
    assert found["index/image_to_text_recall_ceiling@1"]["value"] < 1
    images = found["full/image_to_text_mrr"]["queries"]
    assert found["index/text_to_image_mrr"]["queries"] == images, "one text an image"
    first = run(recipe(steps=1), tmp_path / "first", say=lambda _: None)
    once = json.loads((first / "results.json").read_text())["after"]["unseen"]
    assert found["full/text_to_image_mrr"]["queries"] > once["full/text_to_image_mrr"]["queries"]
    page = (out / "report.html").read_text()
    assert "Image to text Median rank, full: " in page
    assert "Of a rank, less is better" in page
    with pytest.raises(InputError, match="kinds: no column 'colour'"):
        run(recipe(protocols=["sampled100"], kinds="colour", steps=1), tmp_path / "wrong", say=lambda _: None)


def test_trained_on_the_first_caption_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vicinal.run as room

    seen: dict[str, set[str]] = {}
    plain = room.train_batches

    def spy(train: Any, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401  as the loader has them
        seen[which] = {caption for told in train.captions() for caption in told}
        return plain(train, *arguments, **named)

    monkeypatch.setattr(room, "train_batches", spy)
    for which in ("any", "first"):
        run(recipe(captions={"trained": which}, steps=1), tmp_path / which, say=lambda _: None)
    assert seen["first"] < seen["any"]
