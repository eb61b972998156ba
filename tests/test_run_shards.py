"""Runs on shards: what files would have given, streams from the disk and from a web server, and going on with them."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from vicinal.bring import bring
from vicinal.data.glyphs import load_glyphs
from vicinal.data.manifest import Manifest
from vicinal.data.shards import write_shards
from vicinal.data.sources import write_table
from vicinal.recipe import Recipe
from vicinal.run import run
from vicinal.types import InputError

GLYPHS: dict[str, Any] = {"families": ["dejavu_sans", "dejavu_serif"], "characters": "αβγδεζηθ"}


def recipe(data: object, **more: object) -> Recipe:
    content: dict[str, Any] = {
        "data": {"shards": data} if not isinstance(data, dict) or "train" in data else data,
        "split": {"official": {}},
        "model": "vicinal:nano",
        "random_init": True,
        "adapt": [{"full": {"tower": "both"}}],
        "loss": {"infonce": {}},
        "sampler": {"shuffle": {"batch_size": 8}},
        "steps": 4,
        "draws": 2,
        "shots": [1],
        "workers": 0,
        "device": "cpu",
        "precision": "fp32",
        "trackers": [],
    }
    return Recipe.parse(content | more)


def untimed(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in rows]


def losses(out: Path) -> list[float]:
    rows = [json.loads(line) for line in (out / "history.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def measured(out: Path) -> dict[str, dict[str, float]]:
    """All that was measured, but for the few-shot metrics, whose draws are settled by the names of the files."""
    results = json.loads((out / "results.json").read_text())
    return {
        f"{side} {part} {name}": estimate
        for side in ("before", "after", "difference")
        for part, metrics in results[side].items()
        for name, estimate in metrics.items()
        if name == "accuracy@0shot" or not name.endswith("shot")
    }


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Characters with several captions each; of each four images to train on, two to select on, two to test on."""
    found = load_glyphs(**GLYPHS, images_per_face=1)
    turn: dict[str, int] = {}
    words = []
    for label in found.column("label"):
        turn[label] = turn.get(label, -1) + 1
        words.append(("train", "train", "train", "train", "val", "val", "test", "test")[turn[label] % 8])
    columns = {name: found.column(name) for name in ("label", "text", "captions")}
    images = [str(found.path(i)) for i in range(len(found))]
    return Manifest.build({"image": images, **columns, "split": words}, tmp_path_factory.mktemp("glyphs"))


@pytest.fixture(scope="module")
def folder(glyphs: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pattern for each part, of five items a shard."""
    out = tmp_path_factory.mktemp("shards")
    for part in ("train", "val", "test"):
        rows = [word == part for word in glyphs.column("split")]
        write_shards(glyphs.where(rows), out / f"{part}_%03d.tar", items=5, seed=None)
    return out


def parts(folder: Path | str, **more: object) -> dict[str, Any]:
    return {part: f"{folder}/{part}_*.tar" for part in ("train", "val", "test")} | more


def test_a_run_on_shards_is_the_run_on_files(glyphs: Manifest, tmp_path: Path) -> None:
    write_table(glyphs, tmp_path / "files.jsonl")
    tars = write_shards(glyphs, tmp_path / "shards" / "%d.tar", items=7, seed=None)
    one = run(recipe({"table": str(tmp_path / "files.jsonl")}), tmp_path / "one", say=lambda _: None)
    other = run(
        recipe([f"{tmp_path}/shards/{n}.tar" for n in range(len(tars))]), tmp_path / "other", say=lambda _: None
    )
    assert losses(one) == losses(other)
    assert measured(one) == measured(other)
    assert "data:image" in (other / "report.html").read_text(), "the page shows pictures out of the tars"


def test_shards_to_look_at_while_training(folder: Path, tmp_path: Path) -> None:
    watched = {"train_eval": f"{folder}/train_00[0-3].tar", "val_eval": f"{folder}/val_00[0-2].tar"}
    for loss, metric in (("arcface", "map@r"), ("infonce", "full/text_to_image_recall@1")):
        settings = recipe(parts(folder) | watched, loss={loss: {}}, evaluate_every=2)
        out = run(settings, tmp_path / loss, say=lambda _: None)
        rows = [json.loads(line)["val"] for line in (out / "history.jsonl").read_text().splitlines() if '"val"' in line]
        assert len(rows) >= 3
        assert all({metric, f"train/{metric}"} <= set(row) for row in rows)
        if loss == "infonce":
            parted = json.loads(next((out / "evaluations").glob("*.json")).read_text())["parts"]
            assert (parted["train"]["images"], parted["validation"]["images"]) == (20, 15)


def test_a_streamed_run_goes_on_exactly_and_says_what_it_left_out(folder: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(folder, shards)
    broken = sorted(shards.glob("train_*.tar"))[-1]
    broken.write_bytes(broken.read_bytes()[:3000])
    streamed = parts(shards, stream=True, train_eval=f"{shards}/train_000.tar", shuffle=6)
    settings = recipe(streamed, steps=6, checkpoint_every=2, keep=4)
    said: list[str] = []
    out = run(settings, tmp_path / "run", say=said.append)
    results = json.loads((out / "results.json").read_text())
    stream = results["training"]["stream"]
    assert stream["left_out"] >= 1
    assert any("not compared with what is measured" in note for note in results["data"]["notes"])
    assert f"{broken.name}: cut or damaged" in stream["first"][0]
    assert any(line.startswith("stream: ") for line in said)
    whole = untimed(out)
    run(settings, out, resume=out / "checkpoints" / "step-00000002", say=lambda _: None)
    assert untimed(out) == whole


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()
    thread.join()


def test_shards_behind_addresses_are_streamed_and_the_others_fetched(server: str, folder: Path, tmp_path: Path) -> None:
    numbers = {part: len(list(folder.glob(f"{part}_*.tar"))) - 1 for part in ("train", "val", "test")}
    remote: dict[str, Any] = {part: f"{server}/{part}_{{000..{last:03d}}}.tar" for part, last in numbers.items()}
    remote["train_eval"] = f"{server}/train_{{000..001}}.tar"
    local = parts(folder, stream=True, train_eval=f"{folder}/train_{{000..001}}.tar")
    outs = [
        run(recipe(data, steps=None, epochs=1), tmp_path / name, say=lambda _: None)
        for name, data in (("remote", remote), ("local", local))
    ]
    assert losses(outs[0]) == losses(outs[1])
    results = [json.loads((out / "results.json").read_text()) for out in outs]
    assert results[0]["training"]["steps"] == results[1]["training"]["steps"] > 1, "an epoch, counted by shards.json"
    assert measured(outs[0]) == measured(outs[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_eval": None}, "train_eval: name a few of the shards of train"),
        ({"stream": None, "train": "a.tar", "shuffle": False}, "indexed ones are shuffled whole"),
        ({"loss": {"arcface": {}}}, r"loss.arcface needs to know all classes"),
        ({"split": {"class_disjoint": {}}}, "divided by file"),
        ({"sampler": {"pk": {}}}, "streamed shards come as they are"),
    ],
)
def test_what_a_stream_cannot_do_is_said_by_the_recipe(change: dict[str, Any], message: str) -> None:
    shards = {"train": "https://h/{0..9}.tar", "train_eval": "https://h/0.tar", "val": "v.tar"}
    inner = {key: value for key, value in change.items() if key in ("train_eval", "stream", "shuffle", "train")}
    outer = {key: value for key, value in change.items() if key not in inner}
    with pytest.raises(InputError, match=message):
        recipe({key: value for key, value in (shards | inner).items() if value is not None}, **outer)


def test_an_epoch_of_unknown_length_needs_steps(folder: Path, tmp_path: Path) -> None:
    for tar in folder.glob("*.tar"):
        shutil.copy(tar, tmp_path / tar.name)
    streamed = parts(tmp_path, stream=True, train_eval=f"{tmp_path}/train_000.tar")
    with pytest.raises(InputError, match=r"no shards\.json beside them.* give steps"):
        run(recipe(streamed, steps=None, epochs=2), tmp_path / "run", say=lambda _: None)
    with pytest.raises(InputError, match="give steps, and evaluate_every in steps"):
        run(recipe(streamed, steps=4, evaluate_every="epoch"), tmp_path / "other", say=lambda _: None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": "{train,test}_000.tar"}, r"test_000\.tar is among the shards of train and of test"),
        ({"val_eval": "train_001.tar"}, r"train_001\.tar is among the shards of train and of val_eval"),
        ({"train_eval": "val_000.tar"}, r"train_eval: .*val_000\.tar is not among the shards of train"),
    ],
)
def test_a_stream_and_what_is_measured_share_no_shard(folder: Path, change: dict[str, str], message: str) -> None:
    shards = parts(folder, stream=True, train_eval=f"{folder}/../{folder.name}/train_000.tar")
    given = recipe(shards | {part: f"{folder}/{pattern}" for part, pattern in change.items()})
    with pytest.raises(InputError, match=message):
        bring(given.data)


def test_of_a_stream_it_is_not_claimed_which_classes_are_new(glyphs: Manifest, tmp_path: Path) -> None:
    """The one shard that is looked at holds half of the classes; all of them are trained on."""
    first = glyphs.where(glyphs.labels() < 4)
    second = glyphs.where(glyphs.labels() >= 4)
    for number, half in enumerate((first, second)):
        rows = [word == "train" for word in half.column("split")]
        write_shards(half.where(rows), tmp_path / f"train{number}_%d.tar", items=100)
    for part in ("val", "test"):
        write_shards(glyphs.where([word == part for word in glyphs.column("split")]), tmp_path / f"{part}_%d.tar")
    streamed = parts(tmp_path, train=f"{tmp_path}/train*.tar", train_eval=f"{tmp_path}/train0_0.tar", stream=True)
    out = run(recipe(streamed, steps=2), tmp_path / "run", say=lambda _: None)
    results = json.loads((out / "results.json").read_text())
    assert list(results["data"]["parts"]) == ["all"]
    assert results["data"]["train_images"] == sum(word == "train" for word in glyphs.column("split"))
    assert results["data"]["train_classes"] is None
    assert any("which classes are streamed is not known" in note for note in results["data"]["notes"])


def test_fewer_items_than_a_batch(folder: Path, tmp_path: Path) -> None:
    few = parts(folder, train=f"{folder}/train_000.tar")
    with pytest.raises(InputError, match=r"sampler\.shuffle\.batch_size=8, but there are only 5 images with captions"):
        run(recipe(few), tmp_path / "run", say=lambda _: None)
