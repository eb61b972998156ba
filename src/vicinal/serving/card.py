"""The model card of an export: README.md, with what the Hub reads at its head."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vicinal.heads.calibration import OpenSetThreshold
from vicinal.models.encoder import Encoder
from vicinal.types import Estimate, InputError

__all__ = ["base_model", "model_card", "of_run", "threshold_on_card"]

_LIBRARIES = {
    "transformers": "transformers",
    "open_clip": "open_clip",
    "sentence_transformers": "sentence-transformers",
    "onnx": "onnx",
    "adapter": "peft",
}
"""Format -> what the Hub calls its library."""

_USE = {
    "transformers": """from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("FOLDER")
processor = AutoProcessor.from_pretrained("FOLDER")""",
    "open_clip": """import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")""",
    "sentence_transformers": """from sentence_transformers import SentenceTransformer

model = SentenceTransformer("FOLDER")
vectors = model.encode([picture]), model.encode(["a text"])""",
    "onnx": """from onnxruntime import InferenceSession

session = InferenceSession("FOLDER/image.onnx")         # what it expects to see: onnx.json
vectors = session.run(None, {"images": images})[0]""",
    "adapter": """from peft import PeftModel

model = PeftModel.from_pretrained(model, "FOLDER")      # on the base model named above""",
}
"""Format -> how it is loaded."""


def base_model(source: str) -> str | None:
    """The name at the Hub of what a model was made from, where its uri has one.

    >>> base_model("transformers:openai/clip-vit-base-patch32"), base_model("vicinal:nano")
    ('openai/clip-vit-base-patch32', None)
    """
    if found := re.fullmatch(r"(?:transformers:|open_clip:hf-hub:)([\w.-]+/[\w.-]+)", source):
        return found.group(1)
    found = re.fullmatch(r"timm:(\w+\.\w+)", source)
    return f"timm/{found.group(1)}" if found else None


def model_card(
    name: str, encoder: Encoder, differences: Mapping[str, Mapping[str, float]], card: Mapping[str, Any]
) -> str:
    """The text of README.md.

    Args:
        name: of the model.
        encoder: what was exported.
        differences: format -> what was encoded -> largest difference found.
        card: headings -> text, or mappings (of mappings) of numbers and texts, which become a table.
    """
    import yaml

    base, reads = base_model(encoder.source), encoder.tokenizer is not None
    libraries = [_LIBRARIES[kind] for kind in differences]
    head: dict[str, Any] = {"license": encoder.licence} if encoder.licence else {}
    head |= {"base_model": base} if base else {}
    head |= {"library_name": libraries[0], "tags": ["vicinal", *libraries]}
    head["pipeline_tag"] = "zero-shot-image-classification" if reads else "image-feature-extraction"
    kinds = ", ".join(type(method).__name__ for method in encoder.adapters)
    height, width = encoder.preprocess.size
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {name}",
        "",
        f"- made from: `{_without_folder(encoder.source)}`" + (f", adapted by {kinds}" if kinds else ""),
        f"- licence of the base model: {encoder.licence or 'unknown here; see its own card before use'}",
        f"- embeddings: {encoder.embedding_dim} numbers, not scaled to length 1; images: {height} x {width} pixels",
        f"- exported by vicinal {version('vicinal')}",
    ]
    for heading, content in card.items():
        lines += ["", f"## {heading.replace('_', ' ').capitalize()}", "", *_section(content)]
    lines += ["", "## Use"]
    for kind in differences:
        lines += ["", "```python", _USE[kind].replace("FOLDER", name), "```"]
    lines += [
        "",
        "## Checked",
        "",
        "Largest difference from the model as trained, relative to the vectors' length:",
        "",
    ]
    lines += ["| loaded by | what | difference |", "|---|---|---|"]
    for kind, found in differences.items():
        lines += [f"| {_LIBRARIES[kind]} | {what} | {value:.1e} |" for what, value in found.items()]
    return "\n".join(lines) + "\n"


def of_run(folder: Path) -> dict[str, Any]:
    """What the card of a run's model says: the data and what was measured; nothing of a folder that is no run.

    Raises:
        InputError: results.json is damaged.
    """
    try:
        results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise InputError(f"{folder / 'results.json'} is damaged ({error}); run the recipe again") from error
    about, card = results.get("data", {}), {}
    names = {"images": "images", "classes": "classes", "train_images": "trained on, images",
             "train_classes": "trained on, classes"}  # fmt: skip
    if data := {words: about[key] for key, words in names.items() if about.get(key) is not None}:
        card["data"] = data
    main = ("map@r", "recall@1", "accuracy@1shot", "accuracy@0shot")
    sides = {
        side: {part: {m: metrics[m] for m in main if m in metrics} for part, metrics in results[side].items()}
        for side in ("before", "after", "difference")
        if side in results
    }
    return card | ({"results": sides} if sides else {})


def threshold_on_card(rule: OpenSetThreshold) -> dict[str, Any]:
    """The threshold, how it was chosen, and what it is worth."""
    metrics = {name: asdict(e) for name, e in rule.metrics_.items() if name != "threshold"}
    tested = rule.about_.get("tested", {}).get("decisions")
    return {
        "score": rule.threshold_,
        "chosen for": rule.aim,
        "matcher": rule.settings_,
        "on the classes it was fitted on": metrics,
        **({"on others": tested} if tested else {}),
    }


def _without_folder(source: str) -> str:
    """A source without the folder that a file of weights lay in, which is of no use to others.

    >>> _without_folder("timm:vit_tiny_patch16_224@/home/me/tiny.safetensors")
    'timm:vit_tiny_patch16_224@tiny.safetensors'
    """
    name, at, path = source.partition("@")
    return name + at + re.split(r"[\\/]", path)[-1]


def _section(content: Any) -> list[str]:  # noqa: ANN401  # whatever results.json holds
    if not isinstance(content, Mapping):
        return [str(content)]
    rows = list(_rows(content, ()))
    return ["| | value |", "|---|---|", *(f"| {' · '.join(path)} | {value} |" for path, value in rows)]


def _rows(content: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """One row a number; an estimate is one number with its interval."""
    for key, value in content.items():
        here = (*path, str(key))
        if isinstance(value, Mapping) and {"value", "low", "high"} <= set(value):
            n = f", n = {value['n']}" if "n" in value else ""
            number, low, high = (math.nan if value[end] is None else value[end] for end in ("value", "low", "high"))
            yield here, f"{Estimate(number, low, high, n=0, queries=0)}{n}"
        elif isinstance(value, Mapping):
            yield from _rows(value, here)
        else:
            yield here, f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
