"""The notebooks in examples/: their cells run in order, in one namespace, without jupyter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vicinal.models import backbones
from vicinal.models.encoder import Encoder

NOTEBOOKS = {path.stem: path for path in sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))}
CELLS = {name: json.loads(path.read_text(encoding="utf-8"))["cells"] for name, path in NOTEBOOKS.items()}
CODE = {
    name: ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"] for name, cells in CELLS.items()
}
COUNTS = {"image_text": 9, "tour": 9}
WEIGHTS = Path(backbones.__file__).parent / "nano" / "model.safetensors"
SMALLER = {
    "image_text": {'"characters": "latin"': '"characters": "greek"', "STEPS = 60": "STEPS = 4"},
    "tour": {
        '"characters": "latin"': '"characters": "greek"',
        '"images_per_face": 2': '"images_per_face": 1',
        "STEPS = 250": "STEPS = 2",
    },
}


def test_the_notebooks_are_found() -> None:
    assert {name: len(code) for name, code in CODE.items()} == COUNTS


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_a_notebook_is_as_it_was_written(name: str) -> None:
    """No outputs of some machine, nothing to download, no cell twice."""
    cells = CELLS[name]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code")
    assert not any("download" in code or "open_clip:" in code or "timm:" in code for code in CODE[name])
    assert len({cell["id"] for cell in cells}) == len(cells)


def run_all(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The cells in order, on fewer characters and for a few steps; before the weights are packaged, on random ones."""
    monkeypatch.chdir(folder)
    if not WEIGHTS.is_file():
        load = without_weights(backbones.load_encoder)
        monkeypatch.setattr("vicinal.load_encoder", load, raising=False)
        monkeypatch.setattr("vicinal.bring.load_encoder", load)
    source = "\n\n# %%\n".join(CODE[name])
    for written, smaller in SMALLER[name].items():
        assert source.count(written) == 1, written
        source = source.replace(written, smaller)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, code in enumerate(source.split("\n\n# %%\n")):
        exec(compile(code, f"{name}.ipynb, code cell {number}", "exec"), namespace)
    return namespace


def without_weights(load: Callable[..., Encoder]) -> Callable[..., Encoder]:
    """The built-in model with random weights."""

    def loaded(uri: str | Path, **settings: Any) -> Encoder:  # noqa: ANN401  as load_encoder has them
        return load(uri, **(settings | {"random_init": True}) if uri == "vicinal:nano" else settings)

    return loaded


@pytest.mark.slow
def test_the_tour_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    namespace = run_all("tour", tmp_path, monkeypatch)
    assert (tmp_path / "runs" / "tour" / "report.html").is_file()
    printed = capsys.readouterr().out
    assert printed.count("right by name") == 2
    assert printed.count("right from one image a class") == 2
    assert len(namespace["unseen"]) == len(namespace["glyphs"].classes) // 2
    assert not set(namespace["asked"].classes) & set(namespace["seen"])


@pytest.mark.slow
def test_images_and_texts_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Part by part, and by a recipe, which learns from captions, asks the probe and writes its page."""
    monkeypatch.setattr("vicinal.progress.in_notebook", lambda: True)
    namespace = run_all("image_text", tmp_path, monkeypatch)
    printed, bars = capsys.readouterr()
    assert printed.count("probe, accuracy@0shot") == 3
    assert "full/text_to_image_recall@10" in printed
    assert "training: 100%" in bars
    assert namespace["before"] != namespace["after"]
    assert namespace["results"]["probe"]["kept"]["accuracy@0shot"]["value"] > 0
    page = (tmp_path / "runs" / "image_text" / "report.html").read_text(encoding="utf-8")
    assert "What was lost elsewhere" in page
