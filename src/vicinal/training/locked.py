"""Towers of which nothing is trained are run once, not at every step.

A locked tower makes of an image, or of a caption, the same vector at each step, as long as it is shown the same picture
of it: images only if nothing is augmented. So its vectors are taken at the start and looked up from then on. LiT (Zhai
et al. 2022, arXiv:2111.07991: image tower locked, text tower trained) then costs no forward pass of images, and not
even their decoding.

What is kept is the tower in use: in evaluation mode (no dropout), its vectors of length 1, which is all that a loss of
images and texts asks of them. Memory: 4 D bytes an image, or a distinct caption.

Letters: N rows, T distinct captions, D numbers an embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from vicinal.data.manifest import Manifest
from vicinal.embedding import Precision, embed_text
from vicinal.models.adapters import locked_towers
from vicinal.models.encoder import Encoder
from vicinal.types import Batch, InputError

__all__ = ["LockedTowers", "lock"]


@dataclass(frozen=True, slots=True)
class LockedTowers:
    """The vectors of the locked towers; of a tower that is trained, or whose view changes, none.

    Args:
        image: "N D", of each row of the training manifest.
        text: "T D", of each distinct caption.
        place: of a caption in `text`.

    >>> import torch
    >>> towers = LockedTowers(image=torch.eye(3))
    >>> next(towers.fill(iter([{"index": torch.tensor([2])}])))["image_vector"]
    tensor([[0., 0., 1.]])
    """

    image: Float[Tensor, "N D"] | None = None
    text: Float[Tensor, "T D"] | None = None
    place: dict[str, int] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The towers that need not be run."""
        return tuple(name for name, kept in (("image", self.image), ("text", self.text)) if kept is not None)

    def fill(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches with `image_vector` and `text_vector`, which `ImageTextObjective` takes.

        Raises:
            InputError: (while iterating) a batch brings a caption that is not the manifest's.
        """
        for batch in batches:
            if self.image is not None:
                batch["image_vector"] = self.image[batch["index"]]
            if self.text is not None:
                batch["text_vector"] = self.text[[self._of(text) for text in batch["text"]]]
            yield batch

    def _of(self, text: str) -> int:
        if text not in self.place:
            raise InputError(f"the text tower is locked, and {text[:60]!r} was not among the captions at the start")
        return self.place[text]


def lock(
    encoder: Encoder,
    train: Manifest,
    vectors: Float[Tensor, "N D"],
    *,
    augmented: bool,
    device: str = "auto",
    precision: Precision = "auto",
) -> LockedTowers:
    """What of an adapted encoder need not be run: found from what `adapt` left trainable.

    Args:
        encoder: adapted.
        train: N rows, with captions.
        vectors: of its images by the encoder before training, as `embed` gives them.
        augmented: whether training shows other views than those; then a locked image tower has to be run all the same.
        device: for the captions.
        precision: for the captions.
    """
    locked = locked_towers(encoder)
    image = vectors if "image" in locked and not augmented else None
    if "text" not in locked:
        return LockedTowers(image)
    captions = list(dict.fromkeys(text for told in train.captions() for text in told))
    text = embed_text(encoder, captions, device=device, precision=precision)
    return LockedTowers(image, text, {caption: i for i, caption in enumerate(captions)})
