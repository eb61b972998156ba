"""Run as a script, in a process of its own: an exported folder is loaded by the library it is for, and by it alone.

    python -P parity.py FORMAT FOLDER WORK

WORK holds what both sides encode, as `put` writes it; what the library makes of that goes to `outputs.safetensors`:
from the same tensors ("images", and "texts" from tokens where the format has no tokenizer), and from the pictures and
texts by the library's own preprocessing ("pictures", "texts"). Nothing of vicinal is imported: who loads the folder
later has no vicinal either.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor, nn

    Vectors = dict[str, Tensor]

__all__ = ["FORMATS", "Given", "main"]


@dataclass(frozen=True, slots=True)
class Given:
    """What both sides encode.

    Args:
        images: "B 3 H W", resized and normalised.
        tokens: "L T" of the texts.
        pictures: B of them, before any resizing.
        texts: L of them; none without a text tower.
        base: for an adapter alone: the model it belongs to, as `torch.save` wrote it.
    """

    images: Tensor
    tokens: Tensor
    pictures: Sequence[Image.Image]
    texts: Sequence[str]
    base: Path | None = None

    def put(self, work: Path) -> None:
        """Write all of it into a folder."""
        from safetensors.torch import save_file

        save_file({"images": self.images, "tokens": self.tokens}, work / "inputs.safetensors")
        (work / "texts.json").write_text(json.dumps(list(self.texts)), encoding="utf-8")
        for row, picture in enumerate(self.pictures):
            picture.save(work / f"{row}.png")

    @classmethod
    def take(cls, work: Path) -> Given:
        """What `put` wrote."""
        from safetensors.torch import load_file

        inputs = load_file(work / "inputs.safetensors")
        pictures = [Image.open(work / f"{row}.png").convert("RGB") for row in range(len(inputs["images"]))]
        texts = json.loads((work / "texts.json").read_text(encoding="utf-8"))
        return cls(inputs["images"], inputs["tokens"], pictures, texts, work / "base.pt")


def open_clip(folder: Path, given: Given) -> Vectors:
    """`create_model_and_transforms` and `get_tokenizer` of a local folder."""
    import open_clip as library
    import torch

    uri = f"local-dir:{folder}"
    model, _, preprocess = library.create_model_and_transforms(uri)
    model.eval()
    tokenize = library.get_tokenizer(uri)
    seen = torch.stack([preprocess(picture) for picture in given.pictures])
    found = {"images": model.encode_image(given.images), "pictures": model.encode_image(seen)}
    if given.texts:
        found["texts"] = model.encode_text(tokenize(list(given.texts)))
    logits = [model.logit_scale, *([] if model.logit_bias is None else [model.logit_bias])]
    return {**found, "logits": torch.cat([value.reshape(1) for value in logits])}


def transformers(folder: Path, given: Given) -> Vectors:
    """`AutoModel` and `AutoProcessor`; the class that the folder names, where that has no text tower."""
    import torch
    import transformers as library

    name = library.AutoConfig.from_pretrained(folder).architectures[0]
    kind = library.AutoModel if given.texts else getattr(library, name)
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    lost = [key for key in (*report["missing_keys"], *report["unexpected_keys"]) if not key.startswith("pooler.")]
    if lost:
        raise SystemExit(f"{lost[0]} and {len(lost) - 1} others are missing or unknown")
    model.eval()
    processor = (library.AutoProcessor if given.texts else library.AutoImageProcessor).from_pretrained(folder)
    seen = processor(images=given.pictures, return_tensors="pt")["pixel_values"]
    found = {"images": _images(model, given.images), "pictures": _images(model, seen)}
    if given.texts:
        length = processor.tokenizer.model_max_length  # named, or a processor takes that of the last one it saw
        settings = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        tokens = processor(text=list(given.texts), **settings)
        found["texts"] = _plain(model.get_text_features(**tokens))
        logits = [model.logit_scale, *([model.logit_bias] if hasattr(model, "logit_bias") else [])]
        found["logits"] = torch.cat([value.reshape(1) for value in logits])
    return found


def _images(model: nn.Module, images: Tensor) -> Tensor:
    of = cast(Any, model)
    if hasattr(model, "encode_image"):  # open_clip
        return cast("Tensor", of.encode_image(images))
    if hasattr(model, "get_image_features"):
        return _plain(of.get_image_features(pixel_values=images))
    answer = of(images)
    if not hasattr(answer, "last_hidden_state"):  # timm
        return cast("Tensor", answer)
    projected = getattr(answer, "image_embeds", None)
    return cast("Tensor", answer.last_hidden_state[:, 0] if projected is None else projected)


def _plain(answer: object) -> Tensor:
    return cast("Tensor", getattr(answer, "pooler_output", answer))  # transformers 4 answers with the tensor itself


def sentence_transformers(folder: Path, given: Given) -> Vectors:
    """`SentenceTransformer(folder).encode` of pictures and of texts. It takes no tensors of images."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    items: dict[str, Any] = {"pictures": given.pictures, **({"texts": given.texts} if given.texts else {})}
    # one by one: beside a long text a short one is padded, which hides whether it has to be
    return {name: model.encode(list(of), batch_size=1, convert_to_tensor=True) for name, of in items.items()}


def onnx(folder: Path, given: Given) -> Vectors:
    """onnxruntime, on the CPU: one item, then the others, since any number is to be taken."""
    import torch

    session_of = import_module("onnxruntime").InferenceSession  # it has no types

    found = {}
    for name, file, inputs in (("images", "image.onnx", given.images), ("texts", "text.onnx", given.tokens)):
        if (folder / file).exists():
            session = session_of(folder / file, providers=["CPUExecutionProvider"])
            called = session.get_inputs()[0].name
            parts = [session.run(None, {called: part.numpy()})[0] for part in (inputs[:1], inputs[1:]) if len(part)]
            found[name] = torch.cat([torch.from_numpy(part) for part in parts])
    return found


def adapter(folder: Path, given: Given) -> Vectors:
    """peft, on the plain model."""
    import torch
    from peft import PeftModel

    # a whole model is more than tensors; its file was written by the process that started this one, a moment ago
    base = torch.load(cast(Path, given.base), weights_only=False)
    model = PeftModel.from_pretrained(base, folder).eval().base_model.model
    found = {"images": _images(model, given.images)}
    if given.texts:
        encode = getattr(model, "get_text_features", None) or model.encode_text  # open_clip's name
        found["texts"] = _plain(encode(given.tokens))
    return found


FORMATS: dict[str, Callable[[Path, Given], Vectors]] = {
    "transformers": transformers,
    "open_clip": open_clip,
    "sentence_transformers": sentence_transformers,
    "onnx": onnx,
    "adapter": adapter,
}
"""Name of the format -> what its library makes of a folder."""


def main(kind: str, folder: Path, work: Path) -> None:
    """Load, encode, write."""
    import torch
    from safetensors.torch import save_file

    with torch.no_grad():
        found = FORMATS[kind](folder, Given.take(work))
    save_file(
        {name: value.detach().float().contiguous() for name, value in found.items()}, work / "outputs.safetensors"
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
