"""Objectives: what is trained, and on what loss. `embed` runs the network, `loss` judges; the loop knows neither.

    L = criterion(x, y) + w mean_i (1 - cos(x_i, z_i))

Letters: B batch, D numbers an embedding, x embeddings, y labels, z embeddings by the frozen original, w the weight of
retention.

The two halves are apart because a loss that couples the whole batch can then be taken over more images than fit into
memory at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from vicinal.losses import PAIR_LOSSES, CrossBatchMemory, Retention, WeightedSum
from vicinal.losses.pair import mean_similarities
from vicinal.models.encoder import Encoder
from vicinal.training.grad_cache import parts_of
from vicinal.types import Batch, InputError

__all__ = ["LabelObjective", "as_it_was", "keep_frozen_statistics", "of_all_processes"]


class LabelObjective(nn.Module):
    """An encoder trained on images with labels.

    Args:
        encoder: the model; what `adapt` left trainable is trained.
        loss: any `loss(embeddings, labels)`: one of vicinal's, or of pytorch-metric-learning's. Its parameters are
            trained too.
        retention: w, the weight of the distance to the frozen original; None or 0: none. It costs a second forward
            pass of every batch.
        reference: the frozen original; without one, a copy of `encoder` as it is now, which is the original as long as
            nothing was trained and no new head was put on.

    Raises:
        InputError: the reference's embeddings have another width, as after a new head that narrows them.

    >>> from vicinal.losses import NTXent
    >>> from vicinal.models.backbones import load_encoder
    >>> objective = LabelObjective(load_encoder("timm:test_vit", size=32, random_init=True), NTXent(), retention=1.0)
    >>> batch = {"image": torch.rand(4, 3, 32, 32), "label": torch.tensor([0, 0, 1, 1])}
    >>> sorted(objective(batch))
    ['criterion', 'embeddings', 'gap', 'loss', 'retention', 'right_mean', 'wrong_mean']
    """

    def __init__(
        self, encoder: Encoder, loss: nn.Module, *, retention: float | None = None, reference: Encoder | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.criterion = loss
        self.retention = Retention(weight=retention) if retention else None
        self.reference: Encoder | None = None
        if self.retention is not None:
            self.reference = copy.deepcopy(encoder if reference is None else reference).requires_grad_(False).eval()
            if self.reference.embedding_dim != encoder.embedding_dim:
                raise InputError(
                    f"retention compares embeddings with the original's, but those have {self.reference.embedding_dim} "
                    f"numbers and the tuned ones {encoder.embedding_dim}; leave out retention, or the new head"
                )

    def train(self, mode: bool = True) -> LabelObjective:
        """As usual, but what is frozen keeps its statistics: batch norms without a trained parameter, the original."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        keep_frozen_statistics(self)
        return self

    def embed(self, batch: Batch) -> Float[Tensor, "B D"]:
        """The embeddings of the batch's images, not normalised."""
        return self.encoder.encode_image(batch["image"])

    def loss(self, embeddings: Float[Tensor, "B D"], batch: Batch) -> dict[str, Tensor]:
        """The loss under "loss"; beside it its parts, if there are several, and of a pair loss how alike pairs are.

        The "embeddings", without a graph, stand there too, for whoever watches over them.
        """
        watched = {"embeddings": embeddings.detach()}
        alike: dict[str, Tensor] = {}
        if not isinstance(self.criterion, (*PAIR_LOSSES.values(), WeightedSum, CrossBatchMemory)):
            # Class losses have no use for groups, and other libraries' losses do not know them.
            loss = self.criterion(embeddings, batch["label"])
        else:
            # Several processes: a pair loss compares the items of all of them, not each share with itself.
            groups = of_all_processes(batch["group"]) if "group" in batch else None
            everyone, labels = of_all_processes(embeddings), of_all_processes(batch["label"])
            loss = self.criterion(everyone, labels, groups=groups)
            alike = mean_similarities(everyone, labels, groups=groups)
        if self.retention is None or self.reference is None:
            return {"loss": loss, **alike, **watched}
        reference = self.reference
        retention = self.retention(embeddings, as_it_was(lambda part: reference.encode_image(part["image"]), batch))
        parts = {"loss": loss + retention, "criterion": loss.detach(), "retention": retention.detach()}
        return {**parts, **alike, **watched}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Both halves."""
        return self.loss(self.embed(batch), batch)


def as_it_was(embed: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """What a frozen original says of a batch: 256 items at a time, which without a graph is little memory."""
    with torch.no_grad():
        return torch.cat([embed(part) for part in parts_of(batch, 256)])


def keep_frozen_statistics(objective: nn.Module) -> None:
    """Batch norms without a trained parameter go on with the statistics that the pretrained weights were made with."""
    for module in objective.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
            p.requires_grad for p in module.parameters()
        ):
            module.eval()


def of_all_processes(share: Shaped[Tensor, "b ..."]) -> Shaped[Tensor, "B ..."]:
    """The shares of all processes, one after another, with their gradients; with one process, its own.

    Each process then has the loss of the whole batch. Its gradient for a share is summed over the processes here, and
    the gradients of the parameters are averaged over them afterwards: together that is the gradient of one process.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_world_size() == 1:
        return share
    gathered: Tensor = _Gathered.apply(share)
    return gathered


class _Gathered(torch.autograd.Function):
    """All-gather, with the sum over processes as its gradient. The shares must be of one size."""

    @staticmethod
    def forward(ctx: Any, share: Tensor) -> Tensor:  # noqa: ANN401  (torch gives it no public type)
        shares = [torch.empty_like(share) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(shares, share.contiguous())
        return torch.cat(shares)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        gradient = gradient.clone()
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]
