"""SelfDistillation: an encoder trained on images alone, by a teacher that is the running average of itself.

    teacher <- m teacher + (1 - m) student after each step,     m = 1 - (1 - m0) (1 + cos(pi t / T)) / 2
    tau(t)  = tau0 + (tau1 - tau0) min(1, t / W)                the teacher's temperature

Caron et al. 2021, arXiv:2104.14294. Both look at views of an image through encoder and head: the student at all of
them, the teacher at the large ones. What they are to agree on, `losses.DINO` says.

The teacher is an average of what is *trained*: all else is frozen, so it is the student's own. Its weights, the centre
and the count of steps are buffers: they lie in a checkpoint, and a resumed run is exact.

**Collapse.** With q the teacher's assignments in a batch and qm their mean, I = H(qm) - mean H(q) is what an assignment
says about the image, in nats. It is zero if all images get one prototype, and if each gets all of them.

Letters: B batch, G large views, L small ones, S = G + L, D numbers an embedding, K prototypes, t steps taken, T all
steps, W those of the temperature's warm-up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from vicinal.losses.distillation import DINO
from vicinal.models.encoder import Encoder
from vicinal.models.modules import DINOHead
from vicinal.training.objectives import keep_frozen_statistics
from vicinal.types import Batch, InputError

__all__ = ["SelfDistillation"]

LOOKS = 10  # batches from one look at the collapse to the next: a look waits for the device
LEAST = 0.02  # nats; a healthy teacher says at least a tenth of a nat


class SelfDistillation(nn.Module):
    """An encoder and a throw-away head, trained to see in one view of an image what a teacher sees in another.

    `follow` ties the teacher to the optimiser, and `keep_teacher` leaves its weights in the encoder in the end: it is
    the teacher that is used.

    Args:
        encoder: what `adapt` left trainable is trained.
        loss: of as many prototypes as the head has; its `teacher_temperature` is tau1.
        head: from D to K. None: a `DINOHead`.
        steps: T, of the optimiser.
        train_head: whether the head learns too, as DINO's does; else it stays as it was drawn, a fixed random
            projection, as in the overlap adapter.
        momentum: m0. DINO: .996; the overlap adapter: .9998 over some thousand steps.
        first_temperature: tau0. DINO: .04.
        warmup: W, in steps. The overlap adapter: three of ten epochs.
        small_size: height and width of the small views; None: there are none, or of the encoder's own size.

    Raises:
        InputError: nothing of the encoder is trained, or it takes no small views.
        ValueError: a setting is out of its range.

    >>> from vicinal.models.adapters import Bottleneck, adapt
    >>> from vicinal.models.backbones import load_encoder
    >>> encoder = adapt(load_encoder("timm:test_vit", size=32, random_init=True), Bottleneck(dim=4))
    >>> objective = SelfDistillation(encoder, DINO(16), steps=10, small_size=(16, 16))
    >>> objective.follow(torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1))
    >>> batch = {"views": torch.rand(4, 2, 3, 32, 32), "crops": torch.rand(4, 3, 3, 16, 16)}
    >>> sorted(objective(batch)), tuple(objective.embed(batch).shape)
    (['centre_norm', 'embeddings', 'information', 'loss', 'teacher_entropy'], (4, 5, 64))
    """

    taken: Tensor
    information: Tensor

    def __init__(
        self,
        encoder: Encoder,
        loss: DINO,
        head: nn.Module | None = None,
        *,
        steps: int,
        train_head: bool = True,
        momentum: float = 0.996,
        first_temperature: float = 0.04,
        warmup: int = 0,
        small_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be from 0 to 1, not {momentum}")
        if not first_temperature > 0:
            raise ValueError(f"first_temperature must be above 0, not {first_temperature}")
        if steps < 1 or not 0 <= warmup <= steps:
            raise ValueError(f"warmup must be from 0 to the {steps} steps, not {warmup}")
        if not any(p.requires_grad for p in encoder.parameters()):
            raise InputError("nothing is trained: every parameter is frozen; give `adapt` a method, as bottleneck")
        self.encoder = encoder
        self.head = DINOHead(encoder.embedding_dim, len(loss.centre)) if head is None else head
        self.head.requires_grad_(train_head)
        self.criterion = loss
        same = small_size is None or small_size == encoder.preprocess.size
        self.small: Encoder | None = None
        if small_size is not None and not same:
            try:
                self.small = encoder.at_size(small_size)
            except InputError as error:
                raise InputError(f"small crops of {small_size[0]} x {small_size[1]} (small_size): {error}") from error
        self.steps, self.momentum, self.warmup = steps, momentum, warmup
        self.temperatures = (first_temperature, float(loss.teacher_temperature))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self.register_buffer("information", torch.zeros(()))
        self.teacher = nn.Module()
        for name, parameter in self._student().items():
            self.teacher.register_buffer(_flat(name), parameter.detach().clone())
        self.followed = False
        self.looked = 0

    def train(self, mode: bool = True) -> SelfDistillation:
        """As usual, but batch norms without a trained parameter keep their statistics."""
        super().train(mode)
        keep_frozen_statistics(self)
        return self

    def follow(self, optimizer: Optimizer) -> None:
        """From now on, after each of its steps, the teacher moves towards the student."""
        optimizer.register_step_post_hook(self._move_teacher)
        self.followed = True

    def embed(self, batch: Batch) -> Float[Tensor, "B S D"]:
        """The student's embeddings of all views, the large ones first; not normalised.

        Raises:
            InputError: the batch has no views.
        """
        if "views" not in batch:
            raise InputError("self-distillation compares views of an image: load batches with `multi_crop`")
        found = [_each(self.encoder, batch["views"])]
        if "crops" in batch:
            found.append(_each(self.encoder if self.small is None else self.small, batch["crops"]))
        return torch.cat(found, 1)

    def loss(self, embeddings: Float[Tensor, "B S D"], batch: Batch) -> dict[str, Tensor]:
        """The loss, and of the teacher the mean entropy, the information and the length of the centre.

        Raises:
            InputError: the teacher has collapsed.
            ValueError: while training: no optimiser is followed, so the teacher would never move.
        """
        if self.training and not self.followed:
            raise ValueError("the teacher follows no optimiser: call follow(optimizer) before training")
        teacher_TBK = self.teach(batch).transpose(0, 1)
        student_SBK = self.head(embeddings).transpose(0, 1)
        first, last = self.temperatures
        risen = (self.taken / max(self.warmup, 1)).clamp(max=1) if self.warmup else 1.0
        self.criterion.teacher_temperature = first + (last - first) * risen
        entropy, information = self._watch(teacher_TBK)
        return {
            "loss": self.criterion(student_SBK, teacher_TBK),
            "teacher_entropy": entropy,
            "information": information,
            "centre_norm": self.criterion.centre.norm(),
        }

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Both halves; the student's "embeddings" of the first view, without a graph, stand beside the loss."""
        embeddings = self.embed(batch)
        return {**self.loss(embeddings, batch), "embeddings": embeddings[:, 0].detach()}

    @torch.no_grad()
    def teach(self, batch: Batch) -> Float[Tensor, "B G K"]:
        """The teacher's logits of the large views; without dropout."""
        training = self.training
        self.encoder.eval()
        try:
            weights = {name: self.teacher.get_buffer(_flat(name)) for name in self._student()}
            of_encoder, of_head = (
                {name.removeprefix(part): value for name, value in weights.items() if name.startswith(part)}
                for part in ("encoder.", "head.")
            )
            images = batch["views"].flatten(0, 1)
            embeddings = functional_call(self.encoder, of_encoder, (images,))
            logits: Tensor = functional_call(self.head, of_head, (embeddings,))
        finally:
            self.train(training)
        return logits.view(*batch["views"].shape[:2], -1)

    @contextmanager
    def as_teacher(self) -> Iterator[None]:
        """Within: encoder and head hold the teacher's weights. After: their own, bit for bit."""
        own = {name: p.detach().clone() for name, p in self._student().items()}
        self.keep_teacher()
        try:
            yield
        finally:
            self._set(own)

    def keep_teacher(self) -> None:
        """Leave the teacher's weights in encoder and head: they are then used and saved."""
        self._set({name: self.teacher.get_buffer(_flat(name)) for name in self._student()})

    def _student(self) -> dict[str, nn.Parameter]:
        """What is trained, by name; `small` shares it."""
        named = (("encoder.", self.encoder), ("head.", self.head))
        return {f"{at}{n}": p for at, module in named for n, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _set(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self._student().items():
            parameter.copy_(values[name])

    @torch.no_grad()
    def _move_teacher(self, optimizer: Optimizer, arguments: Any, settings: Any) -> None:  # noqa: ANN401  of a step
        share = (1 - self.momentum) * 0.5 * (1 + torch.cos(math.pi * (self.taken / self.steps).clamp(max=1)))
        self.taken += 1
        for name, parameter in self._student().items():
            self.teacher.get_buffer(_flat(name)).lerp_(parameter.detach(), share)

    @torch.no_grad()
    def _watch(self, teacher_TBK: Tensor) -> tuple[Tensor, Tensor]:
        """Mean entropy and information of the teacher's assignments, over all processes; a collapse raises."""
        q_NK = self.criterion.assigned(teacher_TBK).flatten(0, 1)
        found = torch.stack([_entropy(q_NK).mean(), _entropy(q_NK.mean(0))])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(found)
            found = found / torch.distributed.get_world_size()
        entropy, information = found[0], found[1] - found[0]
        if self.training:
            self.information.lerp_(information, 0.1)
            self.looked += 1
            if self.looked % LOOKS == 0 and 4 * self.taken >= self.steps and self.information < LEAST:
                raise InputError(
                    f"step {int(self.taken)}: the teacher has collapsed: its assignments tell {self.information:.3f} "
                    f"nats about an image (mean entropy {entropy:.2f} of at most {math.log(q_NK.shape[1]):.2f}); lower "
                    "lr, teacher_temperature or centre_momentum, or raise momentum"
                )
        return entropy, information


def _each(encoder: Encoder, views: Float[Tensor, "B V 3 H W"]) -> Float[Tensor, "B V D"]:
    """One pass for all views of one size."""
    flat = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return encoder.encode_image(flat).view(*views.shape[:2], -1)


def _entropy(p: Float[Tensor, "*N K"]) -> Float[Tensor, "*N"]:
    nats: Tensor = torch.special.entr(p).sum(-1)
    return nats


def _flat(name: str) -> str:
    """Of a buffer: a name without dots."""
    return name.replace(".", "/")
