"""ImageTextObjective: an encoder trained on images and their captions.

    L = criterion(x, y, ids) + w mean (1 - cos(x_i, z_i)) over images and texts

**Locked towers.** Where a batch brings `image_vector` or `text_vector` (see `LockedTowers`), that tower is not run.

Letters: B batch, b the share of one of W processes, D numbers an embedding, x image and y text embeddings, z those by
the frozen original, w the weight of retention.

**Who is whose negative.** Equal captions never are, nor are equal labels (or whatever columns `kin` names): the loss
gets as ids the groups that these join.

**Several processes.** The embeddings and ids of all are gathered here, once, with gradient; each process takes the loss
of its own share of images and texts against the whole batch. The gradient of a gathered embedding is summed over the
processes, that of the parameters averaged afterwards: together that of one process with the whole batch.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vicinal.losses import Retention
from vicinal.losses.contrastive import InfoNCE, SigLIP
from vicinal.losses.cosine import unit
from vicinal.models.encoder import Encoder
from vicinal.training.objectives import as_it_was, keep_frozen_statistics, of_all_processes
from vicinal.types import Batch, InputError

__all__ = ["ImageTextObjective", "kin_of"]

BLOCK = 1024  # images at once, to see which text is nearest


class ImageTextObjective(nn.Module):
    """An encoder trained on images with captions.

    What `adapt` left trainable in either tower is trained; a tower without any (LiT: the image tower) costs no backward
    pass. The encoder's own scale and bias are frozen here, since the loss has them: see `keep_scale`.

    Args:
        encoder: an image-text model.
        loss: its scale and bias start from the encoder's own, or from `fit_scale_and_bias`.
        retention: w, the weight of the distance of images and texts to the frozen original's; None or 0: none. It costs
            a second forward pass of every batch.
        reference: the frozen original; without one, a copy of `encoder` as it is now.
        kin: what, beside equal captions, makes two items no negatives: columns of the batch, where it has them.

    Raises:
        InputError: the encoder has no text tower.

    >>> from vicinal.models.backbones import load_encoder
    >>> ImageTextObjective(load_encoder("timm:test_vit", size=32, random_init=True), InfoNCE())
    Traceback (most recent call last):
    vicinal.types.InputError: timm:test_vit (random weights) has no text tower, so it has no tokenizer
    """

    def __init__(
        self,
        encoder: Encoder,
        loss: InfoNCE | SigLIP,
        *,
        retention: float | None = None,
        reference: Encoder | None = None,
        kin: Sequence[Literal["label", "group"]] = ("label",),
    ) -> None:
        super().__init__()
        encoder.tokenize(["a caption"])  # or an error that says what is missing
        self.encoder = encoder
        self.criterion = loss
        self.kin = tuple(kin)
        self.retention = Retention(weight=retention) if retention else None
        self.reference: Encoder | None = None
        if self.retention is not None:
            self.reference = copy.deepcopy(encoder if reference is None else reference).requires_grad_(False).eval()
        for parameter in _own_scale(encoder).values():
            parameter.requires_grad_(False)  # unused, and DistributedDataParallel waits for what is unused

    def train(self, mode: bool = True) -> ImageTextObjective:
        """As usual, but what is frozen keeps its statistics: batch norms without a trained parameter, the original."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        keep_frozen_statistics(self)
        return self

    def embed(self, batch: Batch) -> Float[Tensor, "B 2 D"]:
        """Of each item the embeddings of its image and of its caption, not normalised."""
        return _both(self.encoder, batch)

    def loss(self, embeddings: Float[Tensor, "B 2 D"], batch: Batch) -> dict[str, Tensor]:
        """The loss of the whole batch under "loss", its parts, the scale (and bias), and recall at 1 in the batch.

        For labelled batches also the images' "embeddings", without a graph, to be watched over.

        Under several processes the value is that of the whole batch, the gradient that of this process's share of it.

        Raises:
            InputError: all captions of the batch are of one id: there is nothing to tell apart.
        """
        ids = self._ids(batch).to(embeddings.device)
        gathered = of_all_processes(embeddings)
        rank, share = _rank(), len(embeddings)
        own = slice(rank * share, (rank + 1) * share)
        criterion = self.criterion(gathered[:, 0], gathered[:, 1], ids=ids, share=own)
        criterion = criterion + (_mean_over_processes(criterion.detach()) - criterion.detach())
        parts = {"loss": criterion}
        if self.retention is not None and self.reference is not None:
            reference = self.reference
            original = as_it_was(lambda part: _both(reference, part), batch)
            retention = self.retention(embeddings.flatten(0, 1), original.flatten(0, 1))
            parts = {"loss": criterion + retention, "criterion": criterion.detach(), "retention": retention.detach()}
        parts["scale"] = self.criterion.scale.detach()
        if isinstance(self.criterion, SigLIP):
            parts["bias"] = self.criterion.bias.detach()
        if "label" in batch:
            parts["embeddings"] = embeddings[:, 0].detach()
        return {**parts, "batch_recall@1": _recall(gathered.detach(), ids, own)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Both halves."""
        return self.loss(self.embed(batch), batch)

    @torch.no_grad()
    def keep_scale(self) -> None:
        """Write the learnt scale and bias into the encoder, where its model has them: they are then saved."""
        own = _own_scale(self.encoder)
        if "logit_scale" in own:
            own["logit_scale"].fill_(self.criterion.scale.log())
        if "logit_bias" in own and isinstance(self.criterion, SigLIP):
            own["logit_bias"].fill_(self.criterion.bias)

    def _ids(self, batch: Batch) -> Int[Tensor, "B"]:
        """Of the whole batch: equal for items that equal captions, or equal columns of `kin`, join."""
        columns = [_numbers(batch["text"]), *(batch[name].cpu() for name in self.kin if name in batch)]
        device = next(self.parameters()).device  # where processes can exchange them
        ids = _kindred(of_all_processes(torch.stack(columns, 1).to(device)).cpu())
        if len(ids) > 1 and bool((ids == ids[0]).all()):
            raise InputError(
                f"the {len(ids)} items of a batch are all one: their captions, or the columns {', '.join(self.kin)}, "
                "join them, so there is nothing to tell apart; use larger batches, or a sampler of distinct captions"
            )
        return ids


def kin_of(texts: Sequence[str], *columns: Int[Tensor, "N"]) -> Int[Tensor, "N"]:
    """Numbers that are equal for items that are never each other's negatives.

    Args:
        texts: the caption of each item; equal ones join their items.
        columns: labels and the like, which join, too; -1 is none.

    >>> kin_of(["a cat", "a dog", "a cat", "a bird"], torch.tensor([7, 8, 9, 8])).tolist()
    [0, 1, 0, 1]
    """
    return _kindred(torch.stack([_numbers(texts), *columns], 1))


def _both(encoder: Encoder, batch: Batch) -> Float[Tensor, "B 2 D"]:
    if "text" not in batch:
        raise InputError("image-text training needs captions: give the table a column text")
    image = batch["image_vector"] if "image_vector" in batch else encoder.encode_image(batch["image"])
    text = batch["text_vector"] if "text_vector" in batch else encoder.encode_text(batch["text"])
    return torch.stack([image, text], 1)  # in the wider type of the two


def _own_scale(encoder: Encoder) -> dict[str, nn.Parameter]:
    """The parameters of the model itself that a loss of its own replaces here."""
    named = dict(encoder.model.named_parameters(recurse=False))
    return {name: named[name] for name in ("logit_scale", "logit_bias") if name in named}


def _numbers(texts: Sequence[str]) -> Int[Tensor, "N"]:
    """The same for equal texts in every process, which Python's hash is not."""
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])


def _kindred(columns: Int[Tensor, "N C"]) -> Int[Tensor, "N"]:
    """Of numbers of captions and further columns, where below 0 is none."""
    ids: Tensor
    ids, *others = columns.T.contiguous()
    for column in others:
        # Unlabelled: of no kin. Numbers of their own, below all labels.
        ids = _joined(ids, torch.where(column < 0, -1 - torch.arange(len(column)), column))
    return ids


def _joined(one: Int[Tensor, "B"], other: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
    """Numbers that are equal where a chain of equal numbers, in either column, leads from one item to the other."""
    columns = [torch.unique(column, return_inverse=True)[1] for column in (one, other)]
    least = torch.arange(len(one))
    while True:
        before = least
        for column in columns:
            least = torch.full_like(least, len(one)).scatter_reduce(0, column, least, "amin")[column]
        if torch.equal(least, before):
            return least


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0


def _mean_over_processes(value: Tensor) -> Tensor:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value / torch.distributed.get_world_size()


@torch.no_grad()
def _recall(embeddings: Float[Tensor, "B 2 D"], ids: Int[Tensor, "B"], own: slice) -> Float[Tensor, ""]:
    """The share of own images whose nearest text of the whole batch is theirs, or of their id."""
    image, text = unit(embeddings[own, 0]), unit(embeddings[:, 1])
    nearest = torch.cat([(image[at : at + BLOCK] @ text.mT).argmax(1) for at in range(0, len(image), BLOCK)])
    return (ids[nearest] == ids[own]).float().mean()
