"""The whole way, on drawn pictures and a small random model: what a run folder holds, and what stops a run early."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import vicinal.run
from pictures import write_csv, write_folder
from vicinal.assembly import nested
from vicinal.bring import bring, open_uri
from vicinal.data.manifest import Manifest
from vicinal.embedding import embed
from vicinal.evaluation.intervals import mean
from vicinal.evaluation.scores import load_scores
from vicinal.models.backbones import load_encoder
from vicinal.recipe import Recipe
from vicinal.run import evaluate, remake_report, run
from vicinal.training.semantic_proxies import PromptTable
from vicinal.types import InputError

MODEL = "timm:test_vit"


def recipe(**changes: object) -> Recipe:
    content = {
        "model": MODEL,
        "random_init": True,
        "preprocess": {"size": 32},
        "split": {"class_disjoint": {"holdout": 0.34, "seed": 1, "val": 0.3, "seen": 0.34}},
        "adapt": [{"lora": {"rank": 2}}],
        "sampler": {"shuffle": {"batch_size": 8}},
        "steps": 3,
        "draws": 3,
        "shots": [1, 2],
        "workers": 0,
        "precision": "fp32",
        "device": "cpu",
        "trackers": [],
    }
    return Recipe.parse(content | changes)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(recipe(data={"folder": str(photos)}), tmp_path_factory.mktemp("runs") / "run", say=lambda _: None)


def test_a_run_folder_holds_what_it_promises(finished: Path) -> None:
    for name in ("recipe.yaml", "results.json", "report.html", "history.jsonl", "checkpoints", "model", "embeddings"):
        assert (finished / name).exists(), name
    results = json.loads((finished / "results.json").read_text())
    assert set(results["before"]) == set(results["after"]) == set(results["difference"]) == {"seen", "unseen"}
    for side in ("before", "after", "difference"):
        for part in results[side].values():
            assert {"recall@1", "map@r", "r_precision", "accuracy@1shot", "accuracy@2shot"} <= set(part)
            for estimate in part.values():
                assert set(estimate) == {"value", "low", "high", "n", "queries"}
                assert estimate["low"] <= estimate["value"] <= estimate["high"]
    assert results["training"]["steps"] == 3
    assert results["training"]["trained_parameters"] > 0
    assert results["data"]["skipped"] == []
    assert results["environment"]["precision"] == "float32"
    assert Recipe.load(finished / "recipe.yaml").steps == 3


def test_before_is_the_untouched_model_and_after_the_saved_one(finished: Path, photos: Path) -> None:
    """The published numbers can be made again from the model folder alone."""
    results = json.loads((finished / "results.json").read_text())
    scores = load_scores(finished / "scores" / "after.safetensors")
    again = {k: asdict(v) for values in scores["unseen"] for k, v in mean(values).items()}
    assert again == results["after"]["unseen"]
    from vicinal.types import Embeddings

    kept = Embeddings.load(finished / "embeddings" / "after" / "unseen.safetensors")
    manifest = bring(recipe(data={"folder": str(photos)}).data)
    rows = torch.tensor([name in set(kept.ids) for name in manifest.ids()])
    fresh = embed(open_uri(str(finished)), manifest.where(rows), device="cpu", precision="fp32", workers=0)
    assert fresh.ids == kept.ids
    torch.testing.assert_close(fresh.vectors, kept.vectors, atol=1e-5, rtol=0)


def test_the_difference_is_paired(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    for part in results["difference"]:
        for name, d in results["difference"][part].items():
            change = results["after"][part][name]["value"] - results["before"][part][name]["value"]
            assert d["value"] == pytest.approx(change, abs=1e-6), (part, name)


def test_a_page_is_made_anew_from_files(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    (finished / "report.html").unlink()
    assert remake_report(finished).read_text() == page


def test_a_second_run_computes_no_baseline(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = recipe(data={"folder": str(photos)}, cache=str(tmp_path / "cache"))
    run(same, tmp_path / "a", say=lambda _: None)
    import vicinal.embedding as room

    computed: list[int] = []
    original = room._compute

    def counted(encoder: object, part: object, rows: list[int], *rest: object) -> None:
        computed.append(len(rows))
        original(encoder, part, rows, *rest)

    monkeypatch.setattr(room, "_compute", counted)
    run(same, tmp_path / "b", say=lambda _: None)
    assert len(bring(same.data)) not in computed
    first, second = (json.loads((tmp_path / n / "results.json").read_text()) for n in "ab")
    assert first["before"] == second["before"]
    assert first["after"] == second["after"], "the same recipe and seed give the same model"


def test_wise_ft_is_chosen_on_validation(photos: Path, tmp_path: Path) -> None:
    out = run(recipe(data={"folder": str(photos)}, wise_ft="auto", lr=0.05), tmp_path / "run", say=lambda _: None)
    chosen = json.loads((out / "results.json").read_text())["training"]["wise_ft"]
    best = max(point["map@r"] for point in chosen["curve"])
    assert next(p for p in chosen["curve"] if p["weight"] == chosen["weight"])["map@r"] == best
    assert len(chosen["curve"]) == 11


def test_the_split_column_gives_seen_unseen_and_joint(photos: Path, tmp_path: Path) -> None:
    path = write_csv(photos, photos / "table.csv", split=True)
    try:
        out = run(recipe(data={"table": str(path)}, loss={"cosface": {}}), tmp_path / "run", say=lambda _: None)
    finally:
        path.unlink()
    assert set(json.loads((out / "results.json").read_text())["after"]) == {"seen", "unseen", "joint"}


@pytest.mark.parametrize("memory", [None, 12])
@pytest.mark.parametrize("loss", ["ntxent", "supcon", "triplet", "multi_similarity"])
def test_pair_losses_run(photos: Path, tmp_path: Path, loss: str, memory: int | None) -> None:
    settings = recipe(
        data={"folder": str(photos)},
        loss={loss: {}},
        sampler={"pk": {"classes": 4, "images_per_class": 2}},
        memory=memory,
    )
    run(settings, tmp_path / "run", say=lambda _: None)


def test_classes_that_are_too_small_for_a_batch_are_counted(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos")
    trained = run(recipe(data={"folder": str(photos)}), tmp_path / "first", say=lambda _: None)
    names = json.loads((trained / "results.json").read_text())["data"]["trained_on"]
    kept = sorted((photos / names[0]).iterdir())
    for gone in kept[1:]:
        gone.unlink()
    told: list[str] = []
    settings = recipe(data={"folder": str(photos)}, sampler={"pk": {"classes": 3, "images_per_class": 2}})
    out = run(settings, tmp_path / "second", say=told.append)
    assert json.loads((out / "results.json").read_text())["training"]["sampler"] == {"too_small": 1, "single": 1}
    assert "sampler: 1 classes have fewer images than a batch takes of each, 1 of them one" in told


@pytest.mark.parametrize("loss", ["proxy_anchor", "proxy_nca"])
def test_proxy_losses_run_on_hard_classes(photos: Path, tmp_path: Path, loss: str) -> None:
    sampler = {"hard_class": {"classes": 3, "images_per_class": 2, "neighbours": 4}}
    run(recipe(data={"folder": str(photos)}, loss={loss: {}}, sampler=sampler), tmp_path / "run", say=lambda _: None)


@pytest.mark.parametrize("on_disk", [False, True])
def test_semantic_proxies_run(photos: Path, tmp_path: Path, on_disk: bool) -> None:
    loss = {"semantic_proxies": {"prompts": {"tokens": 2, "depth": "deep"}, "on_disk": on_disk}}
    adapters = [{"visual_prompt": {"tokens": 2}}, {"bitfit": {}}]
    settings = recipe(data={"folder": str(photos)}, loss=loss, adapt=adapters)
    out = run(settings, tmp_path / "run", say=lambda _: None)
    assert json.loads((out / "results.json").read_text())["training"]["steps"] == settings.steps
    too_small = recipe(data={"folder": str(photos)}, loss={"semantic_proxies": {"max_bytes": 10}}, adapt=adapters)
    with pytest.raises(InputError, match="max_bytes"):
        run(too_small, tmp_path / "refused", say=lambda _: None)


FEW = {"pk": {"classes": 99, "images_per_class": 2}}
FEW_HARD = {"hard_class": {"classes": 99, "images_per_class": 2}}
SEMANTIC = {"semantic_proxies": {"prompts": {"tokens": 2, "depth": "deep"}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": FEW}, r"sampler\.pk\.classes=99, but there are only \d classes .*set sampler\.pk\.classes=\d"),
        ({"sampler": FEW_HARD}, r"sampler\.hard_class\.classes=99, but there are only \d classes"),
        ({"sampler": {"no_duplicate": {"batch_size": 8, "by": ["group"]}}}, "no column group"),
        ({"sampler": {"no_duplicate": {"batch_size": 30, "by": ["label"]}}}, r"no_duplicate\.batch_size="),
        ({"adapt": [{"lora": {"first_block": 99}}]}, "first_block"),
        ({"adapt": [{"visual_prompt": {"tokens": 2, "depth": 99}}]}, "blocks"),
        ({"adapt": [{"last_blocks": {"n": 99}}]}, r"last_blocks\.n is 99, but"),
        ({"adapt": [{"linear_head": {"dim": 8}}], "retention": 1.0}, "leave out retention"),
        ({"loss": {"semantic_proxies": {"prompts": {"tokens": 2, "depth": 99}}}}, "lower depth"),
        ({"loss": {"semantic_proxies": {"max_bytes": 10}}}, "classes, .* above max_bytes"),
        ({"loss": {"dino": {"small_crops": 2, "small_size": 33}}}, r"small_size"),
        ({"trackers": ["mlflow"]}, "mlflow is not installed"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"probe": {"data": {"folder": "."}, "templates": ["{}"]}}, "reads no texts"),
    ],
)
def test_what_is_wrong_is_said_before_the_first_image_is_embedded(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    def embedded(*_: object, **__: object) -> None:
        raise AssertionError("an image was embedded first")

    monkeypatch.setattr("vicinal.ground.embed", embedded)
    monkeypatch.setattr("vicinal.assembly.embed", embedded)
    if "trackers" in changes:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(InputError, match=message):
        run(recipe(data={"folder": str(photos)}, **changes), tmp_path / "run", say=lambda _: None)


def test_a_cache_that_cannot_be_written_is_said(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=r"cache: embeddings cannot be kept in .*file: .*choose another folder"):
        run(recipe(data={"folder": str(photos)}, cache=str(tmp_path / "file")), tmp_path / "run", say=lambda _: None)


def test_a_table_on_the_disk_tells_its_size_and_needs_room_for_its_copies(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    loss = {"semantic_proxies": {**SEMANTIC["semantic_proxies"], "on_disk": True}}
    settings = recipe(data={"folder": str(photos)}, loss=loss, keep=3, checkpoint_every=1)
    told: list[str] = []
    most: list[int] = []
    keep = PromptTable.keep

    def watched(self: PromptTable, name: str, earlier: str | None) -> None:
        keep(self, name, earlier)
        most.append(len(list((tmp_path / "run" / "class_prompts").iterdir())))

    monkeypatch.setattr(PromptTable, "keep", watched)
    out = run(settings, tmp_path / "run", say=told.append)
    assert most == [2, 3, 3], "the table and two copies, whatever keep says"
    (left,) = (out / "class_prompts").iterdir()
    assert left.name == "class_prompts-00000003.bin"
    size = left.stat().st_size
    line = next(words for words in told if words.startswith("class prompts: "))
    assert line.startswith(f"class prompts: {size / 1e9:.3g} GB in {out / 'class_prompts'}, with copies")
    assert f"up to {3 * size / 1e9:.3g} GB;" in line
    assert told.index(line) < next(i for i, words in enumerate(told) if words.startswith("baseline"))
    model = (out / "model" / "model.safetensors").read_bytes()
    run(settings, out, resume="last", say=told.append)  # a finished training is gone on with
    assert (out / "model" / "model.safetensors").read_bytes() == model

    usage, size = shutil.disk_usage(tmp_path), 4 * 10 * (3 * 8 * 64 + 1)
    for seeds, free, refused in ((1, 3 * size, False), (1, 3 * size - 1, True), (2, 4 * size - 1, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: usage._replace(free=free))
        folders = [tmp_path / "new" / str(seed) for seed in range(seeds)]
        if refused:
            with pytest.raises(InputError, match=r"with copies for the checkpoints.* GB, and .* has room for"):
                PromptTable.check(10, 8, 64, max_bytes=2**31, on_disk=True, folders=folders)
        else:
            assert PromptTable.check(10, 8, 64, max_bytes=2**31, on_disk=True, folders=folders) == size


def test_an_unreadable_image_stops_before_training_or_is_skipped(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos")
    broken = next(photos.iterdir()) / "0.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"0\.png"):
        run(recipe(data={"folder": str(photos)}), tmp_path / "stopped", say=lambda _: None)
    assert not (tmp_path / "stopped" / "history.jsonl").exists()
    out = run(recipe(data={"folder": str(photos), "on_error": "skip"}), tmp_path / "skipped", say=lambda _: None)
    skipped = json.loads((out / "results.json").read_text())["data"]["skipped"]
    assert len(skipped) == 1
    assert skipped[0].endswith("0.png")
    assert "0.png" in (out / "report.html").read_text()


def test_an_adapter_that_matches_nothing_is_refused(photos: Path, tmp_path: Path) -> None:
    changes = {"adapt": [{"lora": {"first_block": 99}}]}
    with pytest.raises(InputError):
        run(recipe(data={"folder": str(photos)}, **changes), tmp_path / "run", say=lambda _: None)


def test_embeddings_are_kept_by_content(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    import vicinal.embedding as room

    encoder = load_encoder(MODEL, size=32, random_init=True)
    settings = {"cache": tmp_path / "cache", "device": "cpu", "precision": "fp32", "workers": 0}
    manifest = bring(recipe(data={"folder": str(photos)}).data)
    first = embed(encoder, manifest, **settings)
    moved = shutil.copytree(photos, tmp_path / "elsewhere")
    monkeypatch.setattr(room, "_compute", lambda *_: pytest.fail("computed again"))
    again = embed(encoder, bring(recipe(data={"folder": str(moved)}).data), **settings)
    assert torch.equal(first.vectors, again.vectors)
    monkeypatch.undo()
    with torch.no_grad():
        next(encoder.parameters()).add_(0.01)
    assert not torch.equal(embed(encoder, manifest, **settings).vectors, first.vectors), "other weights, other vectors"


def test_an_interrupted_embedding_keeps_its_rows(photos: Path, tmp_path: Path) -> None:
    encoder = load_encoder(MODEL, size=32, random_init=True)
    manifest = bring(recipe(data={"folder": str(photos)}).data)
    settings = {"cache": tmp_path / "cache", "device": "cpu", "precision": "fp32", "workers": 0, "batch_size": 8}

    def stop(done: int, _: int) -> None:
        if done >= 16:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(encoder, manifest, progress=stop, **settings)
    left: list[int] = []
    whole = embed(encoder, manifest, progress=lambda _, todo: left.append(todo), **settings)
    assert left[0] == len(manifest) - 16
    straight = embed(encoder, manifest, **(settings | {"cache": None}))
    assert torch.equal(whole.vectors, straight.vectors)


def test_evaluate_matches_classes_by_name(photos: Path) -> None:
    manifest = bring(recipe(data={"folder": str(photos)}).data)
    encoder = load_encoder(MODEL, size=32, random_init=True)
    even = torch.arange(len(manifest)) % 2 == 0
    metrics = evaluate(encoder, manifest.where(even), manifest.where(~even), shots=[1, 3], workers=0, draws=3)
    assert {"recall@1", "map@r", "accuracy@1shot", "accuracy@3shot"} <= set(metrics)
    lacking = manifest.where(even & (manifest.labels() != 3))
    with pytest.raises(InputError, match=manifest.classes[3]):
        evaluate(encoder, lacking, manifest.where(~even), workers=0)


def test_min_images_leaves_small_classes_out(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos", classes=4, each=4)
    for extra in sorted(photos.iterdir())[0].iterdir():
        extra.unlink()
        break
    kept = bring(recipe(data={"folder": str(photos), "min_images": 4}).data)
    assert isinstance(kept, Manifest)
    assert len(kept.classes) == 3
    with pytest.raises(InputError, match="min_images=9"):
        bring(recipe(data={"folder": str(photos), "min_images": 9}).data)


def test_the_same_pixels_are_not_trained_on_and_measured(tmp_path: Path) -> None:
    photos = write_folder(tmp_path / "photos")
    pictures = sorted(photos.rglob("0.png"))
    for other in pictures[1:]:
        other.write_bytes(pictures[0].read_bytes())
    with pytest.raises(InputError, match=r"two sides of the split.*0\.png.*data\.leaks=drop"):
        run(recipe(data={"folder": str(photos)}), tmp_path / "refused", say=lambda _: None)
    assert not (tmp_path / "refused" / "history.jsonl").exists()
    out = run(recipe(data={"folder": str(photos), "leaks": "drop"}), tmp_path / "dropped", say=lambda _: None)
    results = json.loads((out / "results.json").read_text())
    assert any("the same pixels are asked about" in note for note in results["data"]["notes"])
    clean_photos = write_folder(tmp_path / "clean")
    clean_out = run(recipe(data={"folder": str(clean_photos)}), tmp_path / "c", say=lambda _: None)
    clean = json.loads((clean_out / "results.json").read_text())
    assert results["data"]["train_images"] < clean["data"]["train_images"]
    counts = [{name: part["queries"] for name, part in r["data"]["parts"].items()} for r in (results, clean)]
    assert counts[0] == counts[1], "what is asked about stays"


def test_a_stopped_run_goes_on_to_the_same_model(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe(data={"folder": str(photos)}, steps=6, checkpoint_every=2, augment="standard")
    straight = run(settings, tmp_path / "straight", say=lambda _: None)
    import vicinal.run as room

    original = room.train_batches

    def cut(*arguments: object, start_step: int = 0, **named: object) -> object:
        for step, batch in enumerate(original(*arguments, start_step=start_step, **named)):
            if start_step == 0 and step == 5:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(room, "train_batches", cut)
    with pytest.raises(KeyboardInterrupt):
        run(settings, tmp_path / "stopped", say=lambda _: None)
    monkeypatch.undo()
    with pytest.raises(InputError, match="resume"):
        run(settings, tmp_path / "stopped", say=lambda _: None)
    with pytest.raises(InputError):
        run(settings.model_copy(update={"lr": 0.5}), tmp_path / "stopped", resume="last", say=lambda _: None)
    resumed = run(settings, tmp_path / "stopped", resume="last", say=lambda _: None)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (straight, resumed)]
    assert weights[0] == weights[1]
    steps = [json.loads(line)["step"] for line in (resumed / "history.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def test_a_shot_is_never_the_query_itself(tmp_path: Path) -> None:
    """A twin of a query, under another name, in the rows that only shots are drawn from."""
    photos = write_folder(tmp_path / "photos")
    path = write_csv(photos, photos / "table.csv", split=True)
    for folder in (p for p in photos.iterdir() if p.is_dir()):
        (folder / "3.png").write_bytes((folder / "4.png").read_bytes())  # val and test
    with pytest.raises(InputError, match=r"\(test\) and .*3\.png \(catalog\)|3\.png \((catalog|val)\)"):
        run(recipe(data={"table": str(path)}), tmp_path / "refused", say=lambda _: None)
    dropped = recipe(data={"table": str(path), "leaks": "drop"})
    out = run(dropped, tmp_path / "dropped", say=lambda _: None)
    assert json.loads((out / "results.json").read_text())["data"]["parts"]["joint"]["catalog"] == 0


def test_a_refused_run_leaves_the_finished_one_as_it_was(finished: Path, photos: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    other = recipe(data={"folder": str(photos)}, lr=0.5, draws=4)
    for resume in (None, "last"):
        with pytest.raises(InputError, match=r"earlier run|another recipe"):
            run(other, finished, resume=resume, say=lambda _: None)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_nothing_is_selected_on_lone_images(tmp_path: Path) -> None:
    split = {"class_disjoint": {"holdout": 0.34, "seed": 1, "val": 0.3}}
    settings = recipe(data={"folder": str(write_folder(tmp_path / "lone", each=1))}, split=split, draws=1)
    with pytest.raises(InputError, match="wise_ft: auto"):
        run(settings.model_copy(update={"wise_ft": "auto"}), tmp_path / "refused", say=lambda _: None)
    with pytest.raises(InputError, match=r"patience: there is nothing to evaluate on.*split\.class_disjoint\.val"):
        run(settings.model_copy(update={"patience": 2}), tmp_path / "refused", say=lambda _: None)
    assert not (tmp_path / "refused" / "embeddings").exists(), "said before the baseline"


def test_a_page_without_its_pictures(photos: Path, tmp_path: Path) -> None:
    import shutil

    moved = shutil.copytree(photos, tmp_path / "moved")
    out = run(recipe(data={"folder": str(moved)}), tmp_path / "run", say=lambda _: None)
    shutil.rmtree(moved)
    assert "MAP@R" in remake_report(out).read_text()


def test_epochs_count_images_whatever_is_accumulated(photos: Path, tmp_path: Path) -> None:
    steps = []
    for name, accumulate in (("one", 1), ("two", 2)):
        settings = recipe(data={"folder": str(photos)}, steps=None, epochs=2, accumulate=accumulate)
        out = run(settings, tmp_path / name, say=lambda _: None)
        steps.append(json.loads((out / "results.json").read_text())["training"]["steps"])
    assert steps[0] == 2 * steps[1]


def test_evaluate_refuses_the_same_picture_under_another_name(photos: Path, tmp_path: Path) -> None:
    import shutil

    copied = shutil.copytree(photos, tmp_path / "copied")
    encoder = load_encoder(MODEL, size=32, random_init=True)
    sides = [bring(recipe(data={"folder": str(side)}).data) for side in (photos, copied)]
    with pytest.raises(InputError, match="would find themselves"):
        evaluate(encoder, *sides, workers=0)


@pytest.mark.parametrize(("groups", "kept"), [("aabb", True), ("abab", False)], ids=["brands", "photographers"])
def test_groups_are_no_negatives_only_where_they_hold_whole_classes(groups: str, kept: bool) -> None:
    """Two variants of a brand are alike; the pictures of one photographer are of anything."""
    labels = ["x-1", "x-2", "y-1", "y-2"] if kept else ["x", "x", "y", "y"]
    rows = {"image": [f"{i}.png" for i in range(4)], "label": labels, "group": list(groups)}
    assert nested(Manifest.build(rows, ".")) is kept


@pytest.mark.parametrize("kind", ["brands", "photographers"])
def test_pair_losses_see_groups_of_whole_classes_alone(
    kind: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = ["image,label,group"]
    for folder in sorted(photos.iterdir()):
        for i, image in enumerate(sorted(folder.iterdir())):
            rows.append(f"{image},{folder.name},{folder.name.split('-')[0] if kind == 'brands' else i % 3}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    seen: list[tuple[str, ...]] = []
    whole = vicinal.run.train_batches

    def watched(train: Manifest, *more: object, **settings: object) -> object:
        seen.append(train.names())
        return whole(train, *more, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr("vicinal.run.train_batches", watched)
    pairs = {"loss": {"ntxent": {}}, "sampler": {"pk": {"classes": 4, "images_per_class": 2}}}
    run(recipe(data={"table": str(tmp_path / "t.csv")}, **pairs), tmp_path / "run", say=lambda _: None)
    assert seen
    assert all(("group" in names) is (kind == "brands") for names in seen)
