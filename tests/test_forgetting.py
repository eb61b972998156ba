"""What tuning costs elsewhere: the probe, the sweep over weights, the share kept, and their place in a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from pictures import write_folder
from vicinal.data.manifest import Manifest
from vicinal.evaluation.intervals import paired_ratio
from vicinal.forgetting import PROBE, WISE_FT_WEIGHTS, Probe, sweep
from vicinal.models.backbones import load_encoder
from vicinal.models.encoder import Encoder
from vicinal.models.merging import interpolate
from vicinal.recipe import Recipe
from vicinal.run import run
from vicinal.types import Estimate, InputError, Metrics, PerQuery

GREEK = {"families": ["dejavu_sans", "dejavu_serif"], "test_families": ["dejavu_serif"], "characters": "αβγδεζηθικλμ"}
CYRILLIC = {"families": ["dejavu_sans"], "characters": "бвджзийклп"}


def test_the_share_kept_is_that_of_a_loop() -> None:
    """Ratios of means, NaN left out on both sides, classes weighted alike under macro."""
    before = torch.tensor([[1.0, 0.0, 1.0, 1.0, torch.nan, 1.0]])
    after = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, torch.nan]])
    units = torch.tensor([0, 0, 1, 2, 2, 3])
    plain = paired_ratio(PerQuery({"m": before}, units), PerQuery({"m": after}, units))["m"]
    assert plain.value == pytest.approx(2 / 3)
    assert (plain.n, plain.queries) == (3, 4)
    macro = paired_ratio(PerQuery({"m": before}, units, True), PerQuery({"m": after}, units, True))["m"]
    assert macro.value == pytest.approx((1.0 + 0 + 0) / (0.5 + 1 + 1))
    assert macro.low <= macro.value <= macro.high


def test_nothing_known_before_is_no_share() -> None:
    nothing = PerQuery({"m": torch.zeros(1, 3)}, torch.arange(3))
    some = PerQuery({"m": torch.ones(1, 3)}, torch.arange(3))
    kept = paired_ratio(nothing, some)["m"]
    assert kept.value != kept.value
    assert paired_ratio(some, some)["m"].value == 1.0
    assert (paired_ratio(some, some)["m"].low, paired_ratio(some, some)["m"].high) == (1.0, 1.0)


def test_halves_divide_each_class_and_do_not_depend_on_the_order() -> None:
    rows = {"image": [f"{i}.png" for i in range(7)], "label": ["a", "a", "a", "b", "b", "c", "a"]}
    select, report = Probe(Manifest.build(rows, ".")).halves()
    assert torch.equal(select, ~report)
    assert select.sum() == 3
    back = {name: values[::-1] for name, values in rows.items()}
    assert torch.equal(Probe(Manifest.build(back, ".")).halves()[0].flip(0), select)


def test_a_probe_needs_two_classes() -> None:
    with pytest.raises(InputError, match="two classes"):
        Probe(Manifest.build({"image": ["a.png"], "label": ["a"]}, "."))


def vector(encoder: Encoder) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in encoder.parameters()])


def two_models() -> tuple[Encoder, Encoder]:
    before = load_encoder("vicinal:nano", random_init=True)
    after = load_encoder("vicinal:nano", random_init=True)
    return before, after


@pytest.mark.parametrize(("with_probe", "expected"), [(False, 1.0), (True, 0.3)])
def test_the_best_weight_counts_the_probe(monkeypatch: pytest.MonkeyPatch, with_probe: bool, expected: float) -> None:
    """Validation rises by .1 a tenth, the probe falls by .4 a tenth after .3; of equals the largest is taken."""
    before, after = two_models()
    seen: list[float] = []

    def weight_of(encoder: Encoder) -> float:
        ours, old, new = (vector(e) for e in (encoder, before, after))
        return round(float((ours - old).norm() / (new - old).norm()), 4)

    def validate(encoder: Encoder) -> Metrics:
        seen.append(weight_of(encoder))
        return {"map@r": Estimate(seen[-1], 0.0, 1.0, 1, 1)}

    class Known(Probe):
        def __init__(self) -> None: ...

        def scores(self, encoder: Encoder, rows: Any = None) -> PerQuery:  # noqa: ANN401  unused here
            value = max(0.0, 1.0 - 4 * max(0.0, weight_of(encoder) - 0.3))
            return PerQuery({"accuracy@0shot": torch.full((1, 2), value)}, torch.arange(2), True)

    found = sweep(before, after, validate, monitor="map@r", probe=Known() if with_probe else None)
    assert seen == pytest.approx(list(WISE_FT_WEIGHTS), abs=1e-3)
    assert found.weight == expected
    assert (PROBE in found.curve[0]) == with_probe
    expected_model = interpolate(before, after, expected)
    assert torch.equal(vector(found.encoder), vector(expected_model))


def test_a_monitor_that_is_not_measured_is_named() -> None:
    before, after = two_models()
    with pytest.raises(InputError, match="'recall@3' is not measured on validation; there are weight, map@r"):
        sweep(before, after, lambda _: {"map@r": Estimate(0.0, 0.0, 0.0, 1, 1)}, monitor="recall@3")


def recipe(**more: object) -> Recipe:
    content: dict[str, Any] = {
        "data": {"glyphs": GREEK},
        "split": {"class_disjoint": {"holdout": 0.34, "seed": 1, "val": 0.25}},
        "model": "vicinal:nano",
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
        "probe": {"data": {"glyphs": CYRILLIC}, "templates": ["a {}"]},
    }
    return Recipe.parse(content | more)


def test_a_run_says_what_was_lost(tmp_path: Path) -> None:
    """The probe in its results and on its page; with wise_ft: auto a curve, chosen on the half that is not reported."""
    out = run(recipe(wise_ft="auto", lr=3e-3), tmp_path / "run", say=lambda _: None)
    results = json.loads((out / "results.json").read_text())
    probe = results["probe"]
    assert set(probe) == {"before", "after", "difference", "kept"}
    assert probe["before"]["accuracy@0shot"]["queries"] == 20
    curve = results["training"]["wise_ft"]["curve"]
    assert [point["weight"] for point in curve] == list(WISE_FT_WEIGHTS)
    assert all(0 <= point[PROBE] <= 1 for point in curve)
    page = (out / "report.html").read_text()
    assert "What was lost elsewhere" in page
    chosen = results["training"]["wise_ft"]["weight"]
    assert Recipe.load(out / "recipe.yaml") == recipe(wise_ft="auto", lr=3e-3)
    assert load_encoder(out / "model").adapters == ()
    best = max(curve, key=lambda point: point["map@r"] + point[PROBE])
    assert chosen >= best["weight"]


def test_a_probe_that_is_trained_on_is_refused(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos")
    same = recipe(
        data={"folder": str(photos)},
        loss={"arcface": {}},
        split={"class_disjoint": {"holdout": 0.5, "val": 0}},
        probe={"data": {"folder": str(photos)}},
    )
    with pytest.raises(InputError, match="of its pictures are trained on"):
        run(same, tmp_path / "run", say=lambda _: None)


def test_a_picture_of_the_probe_that_is_trained_on_under_another_name_is_refused(tmp_path: Path) -> None:
    photos, others = write_folder(tmp_path / "photos", classes=6), write_folder(tmp_path / "others", classes=6)
    for number, picture in enumerate(sorted(others.rglob("*.png"))):
        Image.open(picture).rotate(90 + number).save(picture)  # drawn alike: now no more
    for copied in photos.rglob("2.png"):
        Image.open(copied).save(others / "cross-03" / f"{copied.parent.name}.bmp")  # other bytes, the same pixels
    told: list[str] = []
    settings = recipe(
        data={"folder": str(photos)},
        loss={"arcface": {}},
        split={"class_disjoint": {"holdout": 0.5, "val": 0}},
        probe={"data": {"folder": str(others)}},
    )
    with pytest.raises(InputError, match=r"3 pictures of the probe are trained on \(first: .*\.(png|bmp), as .*; take"):
        run(settings, tmp_path / "run", say=told.append)
    assert "baseline, probe: embedding 42 images" in told
    assert not any(line.startswith("training") for line in told)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "timm:test_vit", "random_init": True, "loss": {"arcface": {}}, "adapt": [{"lora": {}}]}, "no texts"),
        ({"probe": {"data": {"glyphs": CYRILLIC}, "part": "val"}}, "no column split"),
    ],
)
def test_a_probe_that_cannot_be_asked(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        run(recipe(**change), tmp_path / "run", say=lambda _: None)


def test_probe_and_linear_head_exclude_each_other() -> None:
    parse: Callable[[], Recipe] = lambda: recipe(adapt=[{"linear_head": {}}], loss={"arcface": {}})  # noqa: E731
    with pytest.raises(InputError, match="linear_head moves images away from the names"):
        parse()
