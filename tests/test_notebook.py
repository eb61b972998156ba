"""The notebook in examples/: its cells run in order, in one namespace, without jupyter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vicinal.models import backbones
from vicinal.models.encoder import Encoder

NOTEBOOK = Path(__file__).parent.parent / "examples" / "tour.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
WEIGHTS = Path(backbones.__file__).parent / "nano" / "model.safetensors"
SMALLER = {
    '"characters": "latin"': '"characters": "greek"',
    '"images_per_face": 2': '"images_per_face": 1',
    "STEPS = 250": "STEPS = 2",
}


def test_the_notebook_is_as_it_was_written() -> None:
    """No outputs of some machine, nothing to download."""
    assert len(CODE) == 9
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in CELLS if cell["cell_type"] == "code")
    assert not any("download" in code or "open_clip:" in code or "timm:" in code for code in CODE)


def without_weights(load: Callable[..., Encoder]) -> Callable[..., Encoder]:
    """The built-in model with random weights."""

    def loaded(uri: str | Path, **settings: Any) -> Encoder:  # noqa: ANN401  as load_encoder has them
        return load(uri, **(settings | {"random_init": True}) if uri == "vicinal:nano" else settings)

    return loaded


@pytest.mark.slow
def test_its_cells_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On fewer characters and for two steps; before the weights are packaged, on random ones."""
    monkeypatch.chdir(tmp_path)
    if not WEIGHTS.is_file():
        load = without_weights(backbones.load_encoder)
        monkeypatch.setattr("vicinal.load_encoder", load, raising=False)
        monkeypatch.setattr("vicinal.run.load_encoder", load)
    source = "\n\n# %%\n".join(CODE)
    for written, smaller in SMALLER.items():
        assert source.count(written) == 1, written
        source = source.replace(written, smaller)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, code in enumerate(source.split("\n\n# %%\n")):
        exec(compile(code, f"tour.ipynb, code cell {number}", "exec"), namespace)
    assert (tmp_path / "runs" / "tour" / "report.html").is_file()
    printed = capsys.readouterr().out
    assert printed.count("right by name") == 2
    assert printed.count("right from one image a class") == 2
    assert len(namespace["unseen"]) == len(namespace["glyphs"].classes) // 2
    assert not set(namespace["asked"].classes) & set(namespace["seen"])
