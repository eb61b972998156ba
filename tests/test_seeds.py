"""Several trainings of one recipe: one baseline, a folder each, one table, and an interval that holds the seeds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import vicinal.run as room
from pictures import write_folder
from test_run import MODEL, recipe
from vicinal.bring import open_uri
from vicinal.evaluation.intervals import mean, over_seeds, paired_difference
from vicinal.evaluation.scores import load_scores
from vicinal.models.backbones import load_encoder
from vicinal.run import remake_report, run
from vicinal.types import InputError, PerQuery


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def common(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A model of fixed weights: `random_init` would draw others with another seed."""
    folder = tmp_path_factory.mktemp("model")
    load_encoder(MODEL, size=32, random_init=True).save(folder)
    data = {"folder": str(photos)}
    return {"data": data, "model": str(folder), "random_init": False, "augment": "standard", "lr": 0.01}


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def finished(common: dict[str, object], told: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = recipe(**common, seeds=2, also=["map@r_legacy", "nmi"])
    return run(settings, tmp_path_factory.mktemp("runs") / "two", say=told.append)


def test_what_serves_to_compare_with_tables_is_measured_where_it_is_asked_for(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    for side in ("before", "after"):
        metrics = results[side]["unseen"]
        assert 0 < metrics["map@r_legacy"]["value"] < metrics["map@r"]["value"]
    assert set(results["nmi"]["before"]) == set(results["before"])
    assert len(results["nmi"]["after"]) == 2
    assert all(0 <= one["unseen"] <= 1 for one in results["nmi"]["after"])
    assert "MAP@R" in (finished / "report.html").read_text()


def test_what_is_common_is_done_once_and_the_test_half_is_measured_last(finished: Path, told: list[str]) -> None:
    stages = [line.split(":")[0].split(",")[0] for line in told]
    assert stages.count("baseline") == stages.count("data") == stages.count("split") == 1
    kept = [stage for stage in stages if stage in ("seed 42", "seed 43", "after")]
    assert kept == ["seed 42", "seed 43", "after", "after"]


def test_each_training_is_the_one_of_its_seed(finished: Path, common: dict[str, object], tmp_path: Path) -> None:
    alone = recipe(**common, seed=43)
    straight = run(alone, tmp_path / "alone", say=lambda _: None)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (straight, finished / "seed43")]
    assert weights[0] == weights[1]
    assert weights[1] != (finished / "seed42" / "model" / "model.safetensors").read_bytes()
    one, other = (load_scores(folder / "scores" / "after.safetensors") for folder in (straight, finished / "seed43"))
    assert torch.equal(one["unseen"][0].values["map@r"], other["unseen"][0].values["map@r"])


def test_the_run_folder_holds_all_of_them_and_the_first_one_for_use(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert [row["seed"] for row in results["seeds"]] == [42, 43]
    scores = load_scores(finished / "scores" / "after.safetensors")["unseen"]
    for protocol in scores:
        for name, estimate in mean(protocol).items():
            assert protocol.values[name].shape[0] == 2
            assert results["after"]["unseen"][name]["value"] == pytest.approx(estimate.value, nan_ok=True)
            assert results["after"]["unseen"][name]["low"] == pytest.approx(estimate.low, nan_ok=True)
    for name in ("map@r", "recall@1"):
        each = [row["after"]["unseen"][name] for row in results["seeds"]]
        assert results["after"]["unseen"][name]["value"] == pytest.approx(sum(each) / 2)
    assert open_uri(str(finished)).embedding_dim == open_uri(str(finished / "seed43")).embedding_dim
    first = (finished / "seed42" / "model" / "model.safetensors").read_bytes()
    assert (finished / "model" / "model.safetensors").read_bytes() == first
    page = remake_report(finished).read_text()
    assert "Seed by seed" in page
    assert "after 2 trainings of other seeds" in page
    assert "over classes and over the 2 training seeds" in page


def test_a_stopped_one_goes_on_and_trains_no_seed_twice(
    finished: Path, common: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(**common, seeds=2, checkpoint_every=1)
    original, begun = room.train_batches, []

    def cut(*arguments: object, start_step: int = 0, seed: int = 0, **named: object) -> object:
        for step, batch in enumerate(original(*arguments, start_step=start_step, seed=seed, **named), start_step):
            if seed == 43 and step == 2 and len(begun) < 1:
                begun.append(seed)
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(room, "train_batches", cut)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "run", say=lambda _: None)
    assert not (tmp_path / "run" / "seed42" / "scores").exists(), "nothing is measured before all have trained"
    with pytest.raises(InputError, match="resume=last"):
        run(settings, tmp_path / "run", say=lambda _: None)
    with pytest.raises(InputError, match="several seeds"):
        run(settings.model_copy(update={"seeds": 1}), tmp_path / "run", resume="last", say=lambda _: None)
    with pytest.raises(InputError, match="not from one checkpoint"):
        run(settings, tmp_path / "run", resume="step-1", say=lambda _: None)
    history = (tmp_path / "run" / "seed42" / "history.jsonl").read_bytes()
    out = run(settings, tmp_path / "run", resume="last", say=lambda _: None)
    assert (out / "seed42" / "history.jsonl").read_bytes() == history
    for seed in ("seed42", "seed43"):
        weights = [(folder / seed / "model" / "model.safetensors").read_bytes() for folder in (finished, out)]
        assert weights[0] == weights[1]
    more = run(settings.model_copy(update={"seeds": 3}), tmp_path / "run", resume="last", say=lambda _: None)
    assert [row["seed"] for row in json.loads((more / "results.json").read_text())["seeds"]] == [42, 43, 44]


def test_the_interval_holds_the_seeds() -> None:
    """Seeds that differ widen the interval; ten classes that do not differ leave nothing else to widen it."""
    units = torch.arange(10)
    zeros = PerQuery({"recall@1": torch.zeros(1, 10)}, units)
    ones = PerQuery({"recall@1": torch.ones(1, 10)}, units)
    same, other = over_seeds([ones, ones]), over_seeds([zeros, ones])
    narrow, wide = (paired_difference(zeros, after)["recall@1"] for after in (same, other))
    assert (narrow.low, narrow.high) == (1, 1)
    assert (wide.value, wide.low, wide.high) == (0.5, 0, 1)


def test_draws_are_averaged_within_a_seed_and_nothing_else_is() -> None:
    draws = torch.tensor([[1.0, 0.0, torch.nan], [0.0, torch.nan, torch.nan]])
    one = PerQuery({"accuracy@1shot": draws}, torch.arange(3), macro=True)
    found = over_seeds([one, PerQuery({"accuracy@1shot": 1 - draws}, torch.arange(3), macro=True)])
    expected = torch.tensor([[0.5, 0.0, torch.nan], [0.5, 1.0, torch.nan]])
    assert torch.equal(found.values["accuracy@1shot"].nan_to_num(9), expected.nan_to_num(9))
    assert found.macro
    with pytest.raises(InputError, match="same queries"):
        over_seeds([one, PerQuery({"accuracy@1shot": draws}, torch.tensor([0, 0, 1]), macro=True)])
    with pytest.raises(InputError, match="no training"):
        over_seeds([])
