"""`vicinal calibrate`: on classes not trained on, each known once and unknown once; bound to model and matcher."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pictures import write_folder
from test_cli import vicinal
from test_run import recipe
from vicinal import models
from vicinal.calibrate import Bench, _kin, _pair_scores, calibrate, enrolments, trials_of
from vicinal.data.manifest import Manifest
from vicinal.data.sources import read_folder
from vicinal.embedding import embed
from vicinal.heads.calibration import OpenSetThreshold
from vicinal.models.backbones import load_encoder
from vicinal.run import run
from vicinal.serving.card import threshold_on_card
from vicinal.serving.matching import Matcher
from vicinal.types import Embeddings, InputError

FAST: dict[str, Any] = {"size": 32, "resamples": 50, "device": "cpu", "say": lambda _: None, "references": 2}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VICINAL_CACHE", str(tmp_path_factory.getbasetemp() / "calibrate-cache"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos") / "shapes", classes=12)


@pytest.fixture(scope="module")
def bench(photos: Path) -> Bench:
    return Bench.drawn(read_folder(photos), references=2, seed=42)


def of(bench: Bench, size: int = 32) -> tuple[Embeddings, Embeddings, str]:
    encoder = load_encoder("vicinal:nano", size=size)
    return (*(embed(encoder, side, device="cpu") for side in (bench.references, bench.queries)), encoder.fingerprint())


def test_each_class_is_known_once_and_unknown_once(bench: Bench) -> None:
    given, asked, fingerprint = of(bench)
    found, gallery = trials_of(given, asked, bench.groups(), fingerprint=fingerprint, settings={"fusion": "max"})
    assert gallery == 6
    assert len(found.scores) == 2 * len(asked)
    first, second = found.enrolled.view(2, -1)
    assert torch.equal(first, ~second)
    assert not (found.right & ~found.enrolled).any()
    half = enrolments(given, bench.groups(), 42)[0]
    matcher = Matcher(given.where(half), fingerprint=fingerprint, fusion="max")
    assert torch.equal(matcher.trials(asked, fingerprint=fingerprint).scores, found.scores[: len(asked)])


def test_variants_are_enrolled_together() -> None:
    labels = [f"{brand}-{v}" for brand in "abcdef" for v in (1, 2) for _ in range(2)]
    rows = {"image": [f"{i}.png" for i in range(24)], "label": labels, "group": [name[0] for name in labels]}
    bench = Bench.of(Manifest.build(rows, "."), Manifest.build(rows, "."))
    vectors = torch.nn.functional.normalize(torch.randn(24, 4), dim=1)
    given = Embeddings(vectors, bench.references.labels(), bench.references.ids(), bench.references.classes)
    for half in enrolments(given, bench.groups(), 0):
        names = [given.classes[i] for i in given.labels[half].tolist()]
        assert len(set(names)) == 6
        assert len({name[0] for name in names}) == 3
    kin = _kin(given.classes, bench.groups())
    scores, right, _ = _pair_scores(Matcher(given, fingerprint="m", fusion="max"), given, kin)
    assert len(scores) == 24 * (12 - 1)  # all classes but the other variant
    assert int(right.sum()) == 24
    shared = rows | {"group": ["one", "two"] * 12}  # photographers: of no use here
    assert Bench.of(Manifest.build(shared, "."), Manifest.build(shared, ".")).groups()["a-1"] == "a-1"


def test_scores_are_what_match_chooses_among(bench: Bench) -> None:
    given, asked, fingerprint = of(bench)
    for fusion in ("max", "mean", "topk", "multi-ref"):
        matcher = Matcher(given, fingerprint=fingerprint, fusion=fusion)  # type: ignore[arg-type]
        scores, classes = matcher.scores(asked.vectors, fingerprint=fingerprint)
        found = matcher.match(asked.vectors, fingerprint=fingerprint)
        assert torch.equal(scores.max(1).values, found.scores)
        assert torch.equal(classes[scores.argmax(1)], found.labels)
    with pytest.raises(InputError, match="embed both with one model"):
        matcher.scores(asked.vectors, fingerprint="other")


def test_side_by_side_with_a_baseline(photos: Path, tmp_path: Path, bench: Bench) -> None:
    lines: list[str] = []
    settings = {"fusion": "mean", "margin": 0.0}
    path = calibrate(
        "vicinal:nano",
        photos,
        baseline="timm:vit_tiny_patch16_224@" + _weights(tmp_path),
        settings=settings,
        out=tmp_path / "out",
        **(FAST | {"say": lines.append}),
    )
    given, asked, fingerprint = of(bench)
    trials, _ = trials_of(given, asked, bench.groups(), fingerprint=fingerprint, settings=settings)
    expected = OpenSetThreshold().fit(trials.scores, trials.right, enrolled=trials.enrolled, fingerprint=fingerprint)
    matcher = Matcher(given, fingerprint=fingerprint, fusion="mean", margin=0.0)
    rule = OpenSetThreshold.load(path, fingerprint=fingerprint, settings=matcher.settings)
    assert rule.threshold_ == pytest.approx(expected.threshold_, abs=1e-6)
    assert rule.gallery_size_ == 6
    assert rule.metrics_["threshold"].n == 12
    assert json.loads(path.read_text())["about"]["references_per_class"] == 2
    assert matcher.decide_by(rule).threshold == rule.threshold_
    for other in ({"fusion": "max", "margin": 0.0}, {"fusion": "mean", "margin": 0.1}):
        with pytest.raises(InputError, match="was fitted with"):
            Matcher(given, fingerprint=fingerprint, **other).decide_by(rule)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="was fitted on scores of the model"):
        OpenSetThreshold.load(path, fingerprint=of(bench, size=48)[2])

    content = json.loads((tmp_path / "out" / "calibration.json").read_text())
    found = content["model"]["fitted"]
    assert found["decisions"]["f1"]["value"] == pytest.approx(expected.f1_)
    change = content["difference"]["fitted"]["f1"]["value"]
    assert change == pytest.approx(expected.f1_ - content["baseline"]["fitted"]["decisions"]["f1"]["value"])
    wrong = (asked.vectors @ given.vectors.T)[asked.labels[:, None] != given.labels[None]]
    assert found["pairs"]["wrong_mean"]["value"] == pytest.approx(wrong.mean().item(), abs=1e-4)
    assert found["pairs"]["wrong_above@0.75"]["value"] == pytest.approx((wrong >= 0.75).float().mean().item(), abs=2e-3)
    assert f"wrong_above@{content['above']:g}" in found["pairs"]
    assert content["above"] == content["baseline"]["threshold"]
    with (tmp_path / "out" / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["query"] for row in rows] == list(asked.ids)
    assert {row["answer"] for row in rows} - {""} <= set(given.classes)
    assert any(line.startswith("  f1") and "+" not in line for line in lines)
    with Image.open(tmp_path / "out" / "calibration.png") as picture:
        assert picture.size[0] > 1000


def _weights(folder: Path) -> str:
    """A ViT-Tiny of random weights, as a file."""
    from safetensors.torch import save_file

    encoder = load_encoder("timm:vit_tiny_patch16_224", random_init=True)
    extra = {"head.weight": torch.zeros(1000, 192), "head.bias": torch.zeros(1000)}
    state = {n.removeprefix("model."): t.contiguous() for n, t in encoder.state_dict().items()}
    save_file(state | extra, folder / "tiny.safetensors")
    return str(folder / "tiny.safetensors")


def test_a_stated_rate_and_a_larger_gallery(photos: Path, tmp_path: Path, bench: Bench) -> None:
    given, vectors, fingerprint = of(bench)
    trials, _ = trials_of(given, vectors, bench.groups(), fingerprint=fingerprint, settings={})
    by_class = OpenSetThreshold(rate=0.5).fit(
        trials.scores, trials.right, enrolled=trials.enrolled, units=trials.units, fingerprint=fingerprint
    )
    assert by_class.independent_ < 40, "48 queries of twelve classes"
    found = {}
    lines: list[str] = []
    asked = {"plain": {}, "bare": {"confidence": 0.5}, "many": {"gallery": 8}, "more": {"gallery": 20}}
    for name, more in asked.items():
        path = calibrate("vicinal:nano", photos, rate=0.5, out=tmp_path / name, **(FAST | {"say": lines.append} | more))
        rule = OpenSetThreshold.load(path)
        content = json.loads((tmp_path / name / "calibration.json").read_text())["model"]
        assert set(content["by_gallery"]) == {"10", "100", "1000"}
        found[name] = rule.threshold_
        saved = json.loads(path.read_text())
        for key in ("rate", "confidence", "allowed", "independent"):
            assert content[key] == saved[key] is not None
        assert rule.confidence == more.get("confidence", 0.95)
        assert threshold_on_card(rule)["chosen for"] == rule.aim
        assert f"threshold for: {rule.aim}" in lines
        if "gallery" in more:
            assert rule.gallery_size_ == more["gallery"]
        else:
            assert content["fitted"]["decisions"]["fpir"]["value"] <= rule.allowed_ < 0.5
            if name == "plain":
                assert rule.independent_ == pytest.approx(by_class.independent_)
                assert rule.threshold_ == pytest.approx(by_class.threshold_, abs=1e-6)
    assert any(re.search(r"model: so that others keep it, \d+\.\d\d% of these unknown", line) for line in lines)
    assert found["plain"] > found["bare"]
    assert found["more"] > found["many"], "among more classes more strangers find one that is like them"
    with pytest.raises(InputError, match="give both"):
        calibrate("vicinal:nano", photos, gallery=8, out=tmp_path / "x", **FAST)
    with pytest.raises(InputError, match="not a share"):
        calibrate("vicinal:nano", photos, rate=5.0, out=tmp_path / "x", **FAST)
    with pytest.raises(InputError, match=r"takes 29,956 classes .* here are 12: .* a rate of 0.221"):
        calibrate("no such model", photos, rate=0.0001, out=tmp_path / "x", **FAST)
    with pytest.raises(InputError, match=r"model: .* rate of 0.3 among 1,000,000 cannot .* some 1,\d\d\d such"):
        calibrate("vicinal:nano", photos, rate=0.3, gallery=1_000_000, out=tmp_path / "x", **FAST)
    with pytest.raises(InputError, match=r"confidence=1\.0 is none"):
        calibrate("no such model", photos, rate=0.5, confidence=1.0, out=tmp_path / "x", **FAST)


def test_a_run_is_calibrated_on_its_validation_classes_and_never_on_those_it_was_trained_on(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    split = {"class_disjoint": {"holdout": 0.34, "seed": 1, "val": 0.5, "seen": 0.34}}
    begun = {"model": "vicinal:nano", "random_init": False}
    out = run(recipe(data={"folder": str(photos)}, split=split, **begun), tmp_path / "run", say=lambda _: None)
    words = ("calibrate", out, "--references", 2, "--device", "cpu", "--fusion", "max", "--baseline", "start")
    assert vicinal(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    assert "fitted on 4 classes" in said
    assert "tested on 4 classes" in said
    results = json.loads((out / "results.json").read_text())
    content = json.loads((out / "calibration" / "calibration.json").read_text())
    assert content["tested"]["classes"] == 4
    assert len(results["data"]["trained_on"]) == results["data"]["train_classes"] == 4
    encoder = load_encoder(out)
    for folder in (out, out / "model"):
        rule = OpenSetThreshold.load(folder / "threshold.json")
        assert rule.fingerprint_ == encoder.fingerprint()
        assert rule.settings_["fusion"] == "max"
    tested = content["model"]["tested"]["decisions"]["f1"]["value"]
    assert rule.about_["tested"]["decisions"]["f1"]["value"] == tested
    on_card = threshold_on_card(rule)
    assert on_card["on others"]["f1"]["value"] == tested
    assert on_card["on the classes it was fitted on"]["f1"]["n"] == 4
    start = OpenSetThreshold.load(out / "calibration" / "threshold-baseline.json")
    assert start.fingerprint_ != rule.fingerprint_
    assert start.settings_ == rule.settings_
    with pytest.raises(InputError, match=r"is no run folder .*; name a model"):
        calibrate("vicinal:nano", photos, baseline="start", out=tmp_path / "x", **FAST)
    with pytest.raises(InputError, match="4 of the 12 classes were trained on"):
        calibrate(out, photos, **FAST)
    bare = recipe(data={"folder": str(photos)}, split={"class_disjoint": {"holdout": 0.34, "seed": 1, "val": 0.0}})
    lone = run(bare, tmp_path / "bare", say=lambda _: None)
    with pytest.raises(InputError, match="kept no classes back"):
        calibrate(lone, **FAST)


def test_references_and_queries_apart_and_an_export_as_the_model(photos: Path, tmp_path: Path) -> None:
    for folder in sorted(photos.iterdir()):
        for i, picture in enumerate(sorted(folder.iterdir())):
            side = tmp_path / ("references" if i < 2 else "queries") / folder.name
            side.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, side / picture.name)
    exported = tmp_path / "exported"
    load_encoder("vicinal:nano").model.save_pretrained(exported)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(Path(models.__file__).parent / "nano" / name, exported / name)
    settings = {"resamples": 50, "device": "cpu", "say": lambda _: None}
    path = calibrate(exported, tmp_path / "references", queries=tmp_path / "queries", **settings)
    assert path == exported / "threshold.json"
    assert OpenSetThreshold.load(path).fingerprint_ == load_encoder(f"transformers:{exported}").fingerprint()
    fitted = json.loads((exported / "calibration" / "calibration.json").read_text())["fitted"]
    assert (fitted["references"], fitted["queries"], fitted["classes"]) == (24, 48, 12)


def test_what_cannot_be_fitted(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder to keep a threshold in"):
        calibrate("vicinal:nano", photos, **FAST)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="is no run folder"):
        calibrate(tmp_path / "none", **FAST)
    three = tmp_path / "three"
    for name in ("cross-03", "ellipse-00", "rectangle-01"):
        shutil.copytree(photos / name, three / name)
    with pytest.raises(InputError, match="at least four"):
        calibrate("vicinal:nano", three, out=tmp_path / "x", **FAST)
    table = tmp_path / "t.csv"
    table.write_text("image,label,split\n" + "".join(f"{p},x,train\n" for p in photos.glob("cross-03/*.png")))
    with pytest.raises(InputError, match="says val"):
        calibrate("vicinal:nano", table, out=tmp_path / "x", **FAST)
    other = shutil.copytree(photos / "cross-03", tmp_path / "other" / "CROSS-03").parent
    with pytest.raises(InputError, match="names must be equal"):
        calibrate("vicinal:nano", photos, queries=other, out=tmp_path / "x", **FAST)
    same = shutil.copytree(photos / "cross-03", tmp_path / "same" / "cross-03").parent
    with pytest.raises(InputError, match="stand in the queries and in the catalog"):
        calibrate("vicinal:nano", photos, queries=same, out=tmp_path / "x", **FAST)
    with pytest.raises(InputError, match="queries need references"):
        calibrate(tmp_path / "none", queries=photos, **FAST)
    assert not (tmp_path / "x" / "threshold.json").exists()
