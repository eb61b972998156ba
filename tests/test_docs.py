"""What the pages of docs/ say: their code runs, their recipes parse, their messages and names stand in the source."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from pictures import write_folder
from vicinal.cli import app
from vicinal.data.benchmarks import BENCHMARKS
from vicinal.data.glyphs import CHARACTERS, FAMILIES, SCRIPTS, load_glyphs
from vicinal.data.manifest import SPLIT_WORDS
from vicinal.data.tables import COLUMNS, CORNER_AND_SIZE, CORNERS
from vicinal.data.transforms import AUGMENT
from vicinal.fewshot import Settings
from vicinal.heads import HEADS
from vicinal.models import backbones
from vicinal.models.encoder import Encoder
from vicinal.recipe import Recipe, apply_override

ROOT = Path(__file__).parent.parent
NAMES = ("choosing", "datasets", "fewshot", "install", "overlap", "troubleshooting", "logos")
PAGES = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in NAMES}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = {name: FENCED.findall(page) for name, page in PAGES.items()}
PROSE = {name: FENCED.sub("", page) for name, page in PAGES.items()}
SPANS = {name: re.findall(r"`([^`\n]+)`", page) for name, page in PROSE.items()}


def blocks(language: str) -> list[Any]:
    found = [(name, code) for name, all_of in BLOCKS.items() for kind, code in all_of if kind == language]
    return [pytest.param(code, id=f"{name}-{number}") for number, (name, code) in enumerate(found)]


def test_the_blocks_are_found() -> None:
    languages = ("python", "yaml", "bash", "text")
    assert [len(blocks(language)) for language in languages] == [3, 16, 20, 40]
    assert {kind for all_of in BLOCKS.values() for kind, _ in all_of} == {"", *languages}


# ------------------------------------------------------------------------------------------------------------- recipes


def parsed(text: str) -> Recipe:
    """A recipe, or a part of one with what is missing filled in."""
    return Recipe.parse({"data": {"folder": "photos"}, "model": "timm:test_vit"} | yaml.safe_load(text))


@pytest.mark.parametrize("code", blocks("yaml"))
def test_recipes_are_recipes(code: str) -> None:
    assert parsed(code)


def test_parts_of_recipes_in_the_text_are_recipes() -> None:
    keys = "|".join(Recipe.model_fields)
    found = [span for spans in SPANS.values() for span in spans if re.match(rf"({keys}): ", span)]
    assert len(found) >= 25
    for span in found:
        assert parsed(span), span


def test_overrides_in_the_text_are_overrides() -> None:
    keys = "|".join(Recipe.model_fields)
    recipes = [spans for name, spans in SPANS.items() if name != "fewshot"]
    found = [span for spans in recipes for span in spans if re.match(rf"({keys})[.\w]*=[^…\s]+", span)]
    assert len(found) >= 25
    for words in found:
        assert overridden(words.split()), words


def test_settings_of_few_shots_are_settings() -> None:
    keys = "|".join(Settings.model_fields)
    found = [span for span in SPANS["fewshot"] if re.match(rf"({keys})=[^…]+", span)]
    assert len(found) >= 10
    together = {"policy=transfer": "transfer=x", "views_mode": "views=2", "shift": "source=x"}
    for words in found:
        more = [word for word, other in together.items() if words.startswith(word) and " " not in words]
        content = [word for word in words.split() if "RUN" not in word] + [together[word] for word in more]
        if "oracle_test" not in words:
            assert Settings.parse(content), words


def overridden(words: list[str], start: str = "") -> Recipe:
    content = yaml.safe_load((ROOT / (start or "recipes/folder.yaml")).read_text(encoding="utf-8"))
    for word in words:
        apply_override(content, word)
    if content.get("loss", {}).keys() & {"ntxent", "supcon", "triplet", "multi_similarity"}:
        apply_override(content, "sampler.pk={}")
    return Recipe.parse(content)


# ------------------------------------------------------------------------------------------------------------ commands


def commands() -> Iterator[tuple[str, list[str]]]:
    for name in NAMES:
        lines = [line for kind, code in BLOCKS[name] if kind == "bash" for line in code.splitlines()]
        for line in [*lines, *(span for span in SPANS[name] if span.startswith("vicinal "))]:
            yield name, shlex.split(line)


def test_commands_are_taken_by_their_programs(capsys: pytest.CaptureFixture[str]) -> None:
    known = typer.main.get_command(app)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    seen = []
    for page, words in commands():
        seen.append(words[0])
        match words:
            case ["vicinal", verb]:
                assert verb in known.commands, verb
            case ["vicinal", verb, *rest]:
                command = known.commands[verb]
                context = command.make_context(verb, list(rest))
                if verb == "fewshot":
                    assert Settings.parse([w for w in context.params["overrides"] if not w.startswith("out=")]), words
                if verb == "train":
                    recipe = context.params["recipe"]
                    settings = [word for word in context.params["overrides"] if not word.startswith("out=")]
                    assert overridden(settings, str(recipe) if recipe.parts[0] == "recipes" else ""), words
            case ["pip", "install", *rest] | ["uv", "pip", "install", *rest]:
                named = [extra for word in rest for extra in re.findall(r"^\.\[([\w,]+)\]$", word)]
                assert {extra for group in named for extra in group.split(",")} <= set(extras), words
            case ["python", "-c", code]:
                exec(compile(code, page, "exec"), {})
            case ["uv", "venv"]:
                pass
            case _:
                pytest.fail(f"{page}: {words} is run by no test")
    assert set(seen) == {"vicinal", "pip", "uv", "python"}
    assert len(seen) >= 20
    assert capsys.readouterr().out


def test_every_extra_is_told() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) <= set(SPANS["install"])


# ---------------------------------------------------------------------------------------------------------------- code


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs_as_written(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the download is replaced: the named model by the built-in one with random weights."""
    original = backbones.load_encoder

    def small(uri: str) -> Encoder:
        assert uri.startswith("open_clip:")
        return original("vicinal:nano", random_init=True)

    monkeypatch.setattr("vicinal.load_encoder", small, raising=False)
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "photos", classes=4)
    exec(compile(code, "docs", "exec"), {})


# ------------------------------------------------------------------------------------------------------------ messages


def messages_of_the_source() -> set[str]:
    """Every text in src, with … for each value that is put into it."""
    found = set()
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                text = "".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = re.sub(r"%[.\d]*[dsf]", "…", node.value)
            else:
                continue
            found.add(re.sub("…+", "…", text))
    return found


SOURCE = messages_of_the_source()


@pytest.mark.parametrize("code", blocks("text"))
def test_messages_are_those_of_the_source(code: str) -> None:
    message = " ".join(code.split())
    candidates = {message, message.removeprefix("… ")}
    assert any(candidate in text for text in SOURCE for candidate in candidates), message


def test_a_message_that_the_source_lacks_is_found_out() -> None:
    assert not any("there is no file of weights in …" in text for text in SOURCE)


# ---------------------------------------------------------------------------------------------------- names and figures


def test_every_name_that_a_table_of_columns_knows_is_told() -> None:
    page = PAGES["datasets"]
    for ours, aliases in COLUMNS.items():
        assert f"| {ours} | {', '.join(aliases)} |" in page, ours
    for corners in CORNERS:
        assert " ".join(corners) in page, corners
    for corner_and_size in CORNER_AND_SIZE:
        assert " ".join(corner_and_size) in page, corner_and_size
    for words in SPLIT_WORDS.values():
        assert all(re.search(rf"\b{word}\b", page) for word in words), words


def test_every_benchmark_is_told_with_its_counts() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*)$", PAGES["datasets"].split("## Benchmarks")[1], re.MULTILINE))
    for name, known in BENCHMARKS.items():
        counts = [f"{int(number):,}" for number in re.findall(r"\d+", str(list(known.parts.values())))]
        assert len(counts) >= 2
        assert all(re.search(rf"\b{count}\b", rows[name]) for count in [*counts, *known.parts]), name


def test_every_glyph_setting_is_told() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGES["datasets"].split("## Glyphs")[1].split("##")[0], re.MULTILINE)
    assert rows == [name for name in inspect.signature(load_glyphs).parameters if name != "cache"]
    for name in [*FAMILIES, *(set(CHARACTERS) - set(SCRIPTS))]:
        assert re.search(rf"\b{name}\b", PAGES["datasets"]), name


def test_every_augmentation_and_head_is_told() -> None:
    assert set(AUGMENT) <= set(SPANS["choosing"])
    assert {head.__name__ for head in HEADS.values()} <= set(SPANS["choosing"])


def test_figures_stand_in_the_log() -> None:
    log = (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
    pages = [
        page for name, page in PROSE.items() if name not in ("fewshot", "logos", "overlap")
    ]  # with tables and commands
    found = [figure for page in pages for figure in re.findall(r"(?<![\d.])\.\d{3}\b", page)]
    assert len(found) >= 35
    assert all(figure in log for figure in found), [figure for figure in found if figure not in log]


def test_links_lead_somewhere() -> None:
    links = [(name, target) for name, page in PROSE.items() for target in re.findall(r"\]\(([^)]+)\)", page)]
    assert len(links) >= 25
    for name, target in links:
        file, _, heading = target.partition("#")
        path = ROOT / "docs" / file if file else ROOT / "docs" / f"{name}.md"
        assert path.is_file(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", FENCED.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, target
