"""Run as a script, in a process of its own: an exported folder is loaded by the library it is for, and by it alone.

    python -P parity.py FORMAT FOLDER WORK

WORK holds `inputs.safetensors` (images "B 3 H W", tokens "B L"), pictures `0.png`, `1.png`, … and `texts.json`; what
the library makes of them is written to `outputs.safetensors`: from the same tensors ("images"), and from the pictures
and texts by its own preprocessing ("pictures", "texts"). Nothing of vicinal is imported: who loads the folder later has
no vicinal either.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

Vectors = dict[str, "Tensor"]


def open_clip(folder: Path, images: Tensor, pictures: list[Image.Image], texts: list[str]) -> Vectors:
    """`create_model_and_transforms` and `get_tokenizer` of a local folder."""
    import open_clip as library
    import torch

    uri = f"local-dir:{folder}"
    model, _, preprocess = library.create_model_and_transforms(uri)
    model.eval()
    tokenize = library.get_tokenizer(uri)
    seen = torch.stack([preprocess(picture) for picture in pictures])
    found = {"images": model.encode_image(images), "pictures": model.encode_image(seen)}
    if texts:
        found["texts"] = model.encode_text(tokenize(texts))
    logits = [model.logit_scale, *([] if model.logit_bias is None else [model.logit_bias])]
    return {**found, "logits": torch.cat([value.reshape(1) for value in logits])}


def transformers(folder: Path, images: Tensor, pictures: list[Image.Image], texts: list[str]) -> Vectors:
    """`AutoModel` and `AutoProcessor`; the class that the folder names, where that has no text tower."""
    import torch
    import transformers as library

    name = library.AutoConfig.from_pretrained(folder).architectures[0]
    kind = library.AutoModel if texts else getattr(library, name)
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    lost = [key for key in (*report["missing_keys"], *report["unexpected_keys"]) if not key.startswith("pooler.")]
    if lost:
        raise SystemExit(f"{lost[0]} and {len(lost) - 1} others are missing or unknown")
    model.eval()
    processor = (library.AutoProcessor if texts else library.AutoImageProcessor).from_pretrained(folder)
    seen = processor(images=pictures, return_tensors="pt")["pixel_values"]
    found = {"images": _image_features(model, images), "pictures": _image_features(model, seen)}
    if texts:
        tokens = processor(text=texts, padding="max_length", truncation=True, return_tensors="pt")
        found["texts"] = _plain(model.get_text_features(**tokens))
        logits = [model.logit_scale, *([model.logit_bias] if hasattr(model, "logit_bias") else [])]
        found["logits"] = torch.cat([value.reshape(1) for value in logits])
    return found


def _image_features(model: PreTrainedModel, images: Tensor) -> Tensor:
    if hasattr(model, "get_image_features"):
        return _plain(model.get_image_features(pixel_values=images))
    answer = model(pixel_values=images)
    projected = getattr(answer, "image_embeds", None)
    return cast("Tensor", answer.last_hidden_state[:, 0] if projected is None else projected)


def _plain(answer: object) -> Tensor:
    return cast("Tensor", getattr(answer, "pooler_output", answer))  # transformers 4 answers with the tensor itself


def sentence_transformers(folder: Path, images: Tensor, pictures: list[Image.Image], texts: list[str]) -> Vectors:
    """`SentenceTransformer(folder).encode` of pictures and of texts. It takes no tensors of images."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    given: dict[str, Any] = {"pictures": pictures, **({"texts": texts} if texts else {})}
    return {name: model.encode(items, convert_to_tensor=True) for name, items in given.items()}


FORMATS: dict[str, Callable[[Path, Tensor, list[Image.Image], list[str]], Vectors]] = {
    "open_clip": open_clip,
    "transformers": transformers,
    "sentence_transformers": sentence_transformers,
}
"""Name of the format -> what its library makes of a folder."""


def main(kind: str, folder: Path, work: Path) -> None:
    """Load, encode, write."""
    import torch
    from safetensors.torch import load_file, save_file

    images = load_file(work / "inputs.safetensors")["images"]
    texts = json.loads((work / "texts.json").read_text(encoding="utf-8"))
    pictures = [Image.open(work / f"{row}.png").convert("RGB") for row in range(len(images))]
    with torch.no_grad():
        found = FORMATS[kind](folder, images, pictures, texts)
    save_file(
        {name: value.detach().float().contiguous() for name, value in found.items()}, work / "outputs.safetensors"
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
