"""The command line as a person types it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pictures import write_csv, write_folder
from vicinal import cli
from vicinal.serving.index import Index


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos") / "shapes", classes=10)


def vicinal(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["vicinal", *map(str, words)])
    try:
        cli.main()
    except SystemExit as ending:
        return int(ending.code or 0)
    return 0


def test_stopped_by_hand_it_says_that_nothing_is_lost(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vicinal.bring.bring_path", stop)
    assert vicinal(monkeypatch, "check", photos) == 130
    assert capsys.readouterr().err == "vicinal: stopped; what was computed is kept\n"


SMALL = (
    "random_init=true",
    "preprocess.size=32",
    "steps=3",
    "draws=2",
    "workers=0",
    "device=cpu",
    "sampler.shuffle.batch_size=8",
    "trackers=[]",
)


def test_from_a_folder_to_a_page(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, out = tmp_path / "shapes.yaml", tmp_path / "run"
    assert vicinal(monkeypatch, "init", photos, "--out", recipe, "--model", "timm:test_vit") == 0
    assert "60 images of 10 classes" in capsys.readouterr().out
    assert vicinal(monkeypatch, "train", recipe, *SMALL, f"out={out}") == 0
    printed = capsys.readouterr().out
    assert "unseen classes, map@r" in printed
    assert str(out / "report.html") in printed
    assert vicinal(monkeypatch, "report", out) == 0
    metrics = tmp_path / "metrics.json"
    rows = write_csv(photos, photos / "all.csv").read_text().splitlines()
    for name, part in (("a.csv", rows[1::2]), ("b.csv", rows[2::2])):
        (photos / name).write_text("\n".join([rows[0], *part]))
    sides = ("--catalog", photos / "a.csv", "--queries", photos / "b.csv")
    assert vicinal(monkeypatch, "eval", out, *sides, "--k", 1, 3, "--device", "cpu", "--json", metrics) == 0
    assert vicinal(monkeypatch, "eval", out, "--catalog", photos, "--queries", photos) == 2
    assert "60 pictures stand in the queries and in the catalog" in capsys.readouterr().err
    assert {"accuracy@1shot", "accuracy@3shot"} <= set(json.loads(metrics.read_text()))
    vectors = tmp_path / "vectors.safetensors"
    assert vicinal(monkeypatch, "embed", out, photos, "--out", vectors, "--device", "cpu") == 0
    assert vectors.exists()


def test_check_tells_and_ends_with_its_finding(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vicinal(monkeypatch, "check", photos) == 0
    assert "60" in capsys.readouterr().out
    broken = write_folder(tmp_path / "broken", classes=3)
    (next(broken.iterdir()) / "0.png").write_bytes(b"no picture")
    assert vicinal(monkeypatch, "check", broken, "--json", tmp_path / "found.json") == 1
    assert "0.png" in capsys.readouterr().out
    assert "0.png" in (tmp_path / "found.json").read_text()


def test_prepare_writes_public_and_holdout(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert vicinal(monkeypatch, "prepare", photos, "--out", tmp_path / "out", "--holdout", 0.3) == 0
    names = {path.name for path in (tmp_path / "out").rglob("*.json")}
    assert any("public" in name for name in names)
    assert any("holdout" in name for name in names)


def test_a_mistake_is_one_line_on_stderr(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: {{folder: {photos}}}\nmodel: timm:test_vit\nstepz: 3\n")
    assert vicinal(monkeypatch, "train", recipe) == 2
    error = capsys.readouterr().err
    assert "did you mean 'steps'?" in error
    assert "Traceback" not in error
    assert vicinal(monkeypatch, "train", tmp_path / "none.yaml") == 2
    assert "none.yaml" in capsys.readouterr().err
    assert vicinal(monkeypatch, "report", tmp_path) == 2
    assert vicinal(monkeypatch, "init", tmp_path / "nothing") == 2


def test_schema_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert vicinal(monkeypatch, "schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Recipe"


def test_import_stays_light() -> None:
    heavy = "open_clip timm transformers peft accelerate matplotlib datasets tensorboard"
    code = f"import sys, vicinal, vicinal.cli; print([m for m in '{heavy}'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_index_is_made_asked_and_changed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VICINAL_CACHE", str(tmp_path / "cache"))
    shelf, answers = tmp_path / "x.index", tmp_path / "found.json"

    def ask(*words: object) -> list[dict[str, Any]]:
        assert vicinal(monkeypatch, "search", shelf, *words, "--json", answers) == 0
        return list(json.loads(answers.read_text()))

    assert vicinal(monkeypatch, "index", "vicinal:nano", photos, "--out", shelf, "--size", 32) == 0
    assert "60 items of 10 classes" in capsys.readouterr().out
    picture = photos / "ellipse-00" / "0.png"
    (found,) = ask(picture, "-k", 3)
    assert found["query"] == picture.as_posix()
    assert found["neighbours"][0] == {
        "id": "ellipse-00/0.png",
        "class": "ellipse-00",
        "score": pytest.approx(1, abs=1e-3),
    }
    assert len(found["neighbours"]) == 3
    assert "ellipse-00/0.png" in capsys.readouterr().out
    assert [one["query"] for one in ask("--text", "a cross", "--text", "an ellipse")] == ["a cross", "an ellipse"]
    for size, status in ((32, 0), (48, 2)):  # vectors of another input size are another model's
        words = ("embed", "vicinal:nano", photos / "cross-03", "--out", tmp_path / "v.safetensors", "--size", size)
        shutil.rmtree(tmp_path / "lone", ignore_errors=True)
        lone = shutil.copytree(photos / "cross-03", tmp_path / "lone" / "cross-03").parent
        assert vicinal(monkeypatch, *words[:2], lone, *words[3:]) == 0
        assert (
            vicinal(monkeypatch, "search", shelf, "--vectors", tmp_path / "v.safetensors", "--json", answers) == status
        )
        capsys.readouterr()
    assert len(json.loads(answers.read_text())) == 6

    one = "ellipse-00/0.png"
    assert vicinal(monkeypatch, "index", "--out", shelf, "--remove", one) == 0
    assert ask(picture, "-k", 1)[0]["neighbours"][0]["id"] != one
    assert vicinal(monkeypatch, "index", "--out", shelf, "--remove", one) == 2
    assert "not in the index" in capsys.readouterr().err
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(picture, bare / "new.png")
    assert vicinal(monkeypatch, "index", "vicinal:nano", bare, "--out", shelf, "--add", "--size", 32) == 0
    assert ask(picture, "-k", 1)[0]["neighbours"][0] == {
        "id": "new.png",
        "class": None,
        "score": pytest.approx(1, abs=1e-3),
    }
    assert vicinal(monkeypatch, "index", "vicinal:nano", bare, "--out", shelf, "--add", "--size", 48) == 2
    assert "holds vectors of the model" in capsys.readouterr().err
    assert vicinal(monkeypatch, "index", "vicinal:nano", photos, "--out", shelf) == 2
    assert "exists already" in capsys.readouterr().err
    more = ("index", "vicinal:nano", bare, "--out", shelf, "--add", "--size", 32)
    assert vicinal(monkeypatch, *more, "--faiss", "HNSW32") == 2
    assert "was made exact, and stays so" in capsys.readouterr().err
    emptied = shutil.copy(shelf, tmp_path / "emptied.index")
    gone = [word for name in Index.load(emptied).ids for word in ("--remove", name)]
    assert vicinal(monkeypatch, "index", "--out", emptied, *gone) == 0
    assert vicinal(monkeypatch, "index", "vicinal:nano", bare, "--out", emptied, "--add", "--size", 48) == 2
    assert "holds vectors of the model" in capsys.readouterr().err
    assert vicinal(monkeypatch, "search", shelf) == 2
    assert "one of them" in capsys.readouterr().err
    assert vicinal(monkeypatch, "search", shelf, picture, "--model", "timm:no_such_model") == 2


def test_our_own_warnings_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vicinal", "schema", "--help"])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back after the test
    with pytest.raises(SystemExit):
        cli.main()
    own = Path(cli.__file__).parent / "serving" / "matching.py"
    assert warnings.formatwarning("among 40", UserWarning, str(own), 7) == "vicinal: among 40\n"
    assert "other.py:7: UserWarning: x" in warnings.formatwarning("x", UserWarning, "/site/other.py", 7)


def test_what_is_not_there_is_said(
    photos_index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vicinal(monkeypatch, "search", photos_index, "nothing.jpg", "also-nothing.png") == 2
    assert "nothing.jpg: there is no such picture, and 1 more are missing" in capsys.readouterr().err
    assert vicinal(monkeypatch, "index", "--out", photos_index, "--remove", "cros-03/0.png") == 2
    assert "is not in the index of 4 items; its names are like cross-03/0.png" in capsys.readouterr().err


@pytest.fixture
def photos_index(tmp_path: Path) -> Path:
    from vicinal.models.backbones import load_encoder
    from vicinal.types import Embeddings

    encoder = load_encoder("vicinal:nano")
    ids = ("cross-03/0.png", "cross-03/1.png", "ellipse-00/0.png", "ellipse-00/1.png")
    vectors = Embeddings(torch.eye(4, encoder.embedding_dim), torch.tensor([0, 0, 1, 1]), ids, ("cross", "ellipse"))
    index = Index(encoder.fingerprint(), about={"model": "vicinal:nano", "size": None})
    index.add(vectors, fingerprint=encoder.fingerprint())
    return index.save(tmp_path / "photos.index")
