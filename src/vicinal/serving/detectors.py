"""What finds boxes: any object detector of transformers, or tiles where there is none.

A detector is a function, pictures -> one `Boxes` each; `load_detector` makes one of a folder or id, `Tiles` looks at
nothing, and any other function of that shape will do (a YOLO, a segmenter, a service).

Letters: n boxes of a picture, H W its height and width in pixels, l level of tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from vicinal.embedding import pick_device
from vicinal.types import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["Boxes", "Detector", "Tiles", "load_detector"]

_FORMS = "the folder or Hub id of an object detector of transformers"


class Boxes(NamedTuple):
    """What a detector finds in one picture.

    Args:
        corners: "n 4": x0, y0, x1, y1 in pixels.
        scores: "n", how sure the detector is that something is there.
        kinds: n words of the detector's own ("logo"); empty where it has none.
    """

    corners: Float[Tensor, "n 4"]
    scores: Float[Tensor, "n"]
    kinds: tuple[str, ...] = ()


Detector = Callable[[Sequence[UInt8[Tensor, "3 _ _"]]], list[Boxes]]


class Tiles:
    """Squares that cover a picture, for where there is no detector: a `Detector` that looks at nothing.

    Args:
        levels: for each number l, squares of 1/l of the shorter side, half a side or less apart.

    >>> found = Tiles([1, 2])([torch.zeros(3, 100, 200, dtype=torch.uint8)])[0]
    >>> len(found.corners), found.corners[1].tolist()
    (24, [50.0, 0.0, 150.0, 100.0])
    """

    def __init__(self, levels: Sequence[int]) -> None:
        if not levels or min(levels) < 1:
            raise InputError(f"levels of tiles are whole numbers of at least 1, not {list(levels)}")
        self.levels = tuple(levels)

    def __call__(self, pictures: Sequence[UInt8[Tensor, "3 _ _"]]) -> list[Boxes]:
        """The tiles of each picture; all have the score 1."""
        answers = []
        for picture in pictures:
            height, width = picture.shape[1:]
            parts = []
            for level in self.levels:
                side = min(height, width) / level
                tops, lefts = (
                    torch.linspace(0, length - side, math.ceil((length - side) / (side / 2) - 1e-9) + 1)
                    for length in (height, width)
                )
                corner = torch.cartesian_prod(tops, lefts).flip(1)
                parts.append(torch.cat([corner, corner + side], dim=1))
            corners = torch.cat(parts)
            answers.append(Boxes(corners, torch.ones(len(corners))))
        return answers


class _OfTransformers:
    """An object detector of transformers. Pictures are prepared one by one, so none is padded for another's sake."""

    def __init__(  # what AutoModel and AutoImageProcessor give has no type of its own
        self,
        name: str,
        model: Any,  # noqa: ANN401
        processor: Any,  # noqa: ANN401
        threshold: float,
        device: torch.device,
    ) -> None:
        self.name = name
        self.model, self.processor, self.threshold, self.device = model, processor, threshold, device
        self.names = {int(i): str(name) for i, name in model.config.id2label.items()}

    @property
    def kinds(self) -> list[str]:
        """The words of its classes."""
        return list(self.names.values())

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[UInt8[Tensor, "3 _ _"]]) -> list[Boxes]:
        """Boxes whose score is above the threshold."""
        views = [self._prepared(picture) for picture in pictures]
        alike: dict[tuple[int, ...], list[int]] = {}
        for i, view in enumerate(views):
            alike.setdefault(tuple(view.shape), []).append(i)
        answers: dict[int, Boxes] = {}
        for rows in alike.values():
            outputs = self.model(pixel_values=torch.stack([views[i] for i in rows]).to(self.device))
            sizes = [(int(pictures[i].shape[1]), int(pictures[i].shape[2])) for i in rows]
            found = self.processor.post_process_object_detection(outputs, threshold=self.threshold, target_sizes=sizes)
            for i, one in zip(rows, found, strict=True):
                kinds = tuple(self.names.get(int(label), str(int(label))) for label in one["labels"])
                answers[i] = Boxes(one["boxes"].float().cpu(), one["scores"].float().cpu(), kinds)
        return [answers[i] for i in range(len(pictures))]

    def _prepared(self, picture: UInt8[Tensor, "3 H W"]) -> Float[Tensor, "3 h w"]:
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        values: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return values


def load_detector(uri: str | Path, *, threshold: float = 0.5, device: str | torch.device = "auto") -> _OfTransformers:
    """An object detector of transformers, with its image processor: a folder, or an id of the Hub.

    Args:
        uri: the folder or id, with or without `transformers:` before it.
        threshold: the score above which a box is kept.
        device: "auto", "cpu", "cuda:0", …

    Raises:
        InputError: there is no such model, it finds no boxes, or its weights or image processor are not whole.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as KINDS

    where = str(uri).removeprefix("transformers:")
    folder = Path(where).expanduser()
    if folder.is_dir():
        where = str(folder)
        if not (folder / "config.json").is_file():
            held = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
            raise InputError(f"{where} is no detector: it has no config.json, but {held}. Give {_FORMS}")
    elif where.startswith((".", "/", "~")) or where.count("/") > 1 or folder.exists():
        raise InputError(f"there is no detector folder {where}; give {_FORMS}")
    try:
        config: PretrainedConfig = transformers.AutoConfig.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{where} is no detector that can be read ({_first_line(error)}); give {_FORMS}") from error
    if config.model_type not in KINDS:
        made_for = ", ".join(config.architectures or []) or "an unknown purpose"
        raise InputError(
            f"{where} is a {config.model_type!r} ({made_for}), which finds no boxes; give {_FORMS}: {', '.join(KINDS)}"
        )
    try:
        model, report = transformers.AutoModelForObjectDetection.from_pretrained(
            where, trust_remote_code=False, output_loading_info=True
        )
        processor = transformers.AutoImageProcessor.from_pretrained(where, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{where} is not whole ({_first_line(error)}); download or save it again") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        names = sorted(str(key) for key in (*report["missing_keys"], *report["mismatched_keys"]))
        raise InputError(
            f"{where} is a {config.model_type!r} without the weights of a detector ({len(names)} are missing, first "
            f"{names[0]}), so its boxes would be random; give {_FORMS}"
        )
    if not callable(getattr(processor, "post_process_object_detection", None)):  # only those of detectors have it
        raise InputError(
            f"{where}: its image processor, {type(processor).__name__}, makes no boxes of what the model says; save "
            "the detector's own beside it"
        )
    target = pick_device(str(device))
    return _OfTransformers(where, model.eval().to(target), processor, threshold, target)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
