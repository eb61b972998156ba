"""Every Python and YAML block of the README, run as it is written, on drawn pictures and a small random model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from pictures import write_folder
from vicinal.models import backbones
from vicinal.models.encoder import Encoder
from vicinal.recipe import Recipe

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
YAML = [code for language, code in BLOCKS if language == "yaml"]


def test_the_blocks_are_found() -> None:
    assert (len(PYTHON), len(YAML)) == (2, 1)


@pytest.mark.parametrize("code", YAML)
def test_recipes_are_recipes(code: str) -> None:
    Recipe.parse(yaml.safe_load(code))


@pytest.mark.parametrize("code", PYTHON)
def test_python_runs_as_written(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the download is replaced: the named model by a small random one, the number of steps by three."""
    original = backbones.load_encoder

    def small(uri: str, **settings: object) -> Encoder:
        if Path(uri).is_dir() or uri == "vicinal:nano":
            return original(uri)
        return original("timm:test_vit", **(settings | {"size": 32, "random_init": True}))

    monkeypatch.setattr(backbones, "load_encoder", small)
    monkeypatch.setattr("vicinal.load_encoder", small, raising=False)
    monkeypatch.setattr("vicinal.bring.load_encoder", small)
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "photos")
    exec(compile(code.replace('"steps": 300', '"steps": 3'), "README.md", "exec"), {})
    if "run(" in code:
        assert (tmp_path / "runs" / "photos" / "report.html").exists()
