"""SemanticProxies: the proxies of classes are made by the network itself, from their images and from learnt prompts.

    x_i = head(tower(image_i))                    the sample, as the encoder embeds it
    p_i = head'(tower(image_i; T_y))              the same tokens, with the prompts of the sample's class in front
    K_c <- accumulator(K_c; p_i of y_i = c)       what is known of class c so far, of length 1
    Q   = unit(share O + (1 - share) K)           the proxies of all classes
    L   = ProxyAnchor(x, y, Q)

    EMA:  K_c <- unit(keep K_c + (1 - keep) mean of the p_i)
    GRU:  for each p_i in turn, h from K_c on:    z = sigmoid(Wz p + Uz h + bz),   r = sigmoid(Wr p + Ur h + br)
                                                  h <- z h + (1 - z) relu(Wn p + r (Un h) + bn);    K_c <- unit(h)

Letters: B batch, b of one class, C classes, S classes in the batch, D numbers an embedding, W numbers of a token, N
prompts of a class over all blocks, x embeddings, p their proxies, y labels, T the classes' prompts, K what was
accumulated, O learnt proxies.

Ren et al. 2024, arXiv:2402.02340 (VPTSP-G). Only the encoder is needed afterwards: all else here serves training.

**Prompts of many classes.** With Adam's two averages they are 3 N W + 1 numbers a class, a row of one table. Only the
rows of a batch's classes are read, stepped and written (`RowAdam`), each with its own count of steps: a class that is
drawn rarely is not moved in between, and its averages are corrected for its own steps. The table is a buffer, or a
memory-mapped file.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.optim import Optimizer

from vicinal.losses.cosine import unit
from vicinal.losses.margin import start_from_class_means
from vicinal.losses.proxy import ProxyAnchor, proxy_anchor
from vicinal.models.encoder import Encoder
from vicinal.models.methods import VisualPrompt, _check_halves
from vicinal.training.objectives import keep_frozen_statistics
from vicinal.types import Batch, InputError

__all__ = ["ACCUMULATORS", "EMAAccumulator", "GRUAccumulator", "PromptTable", "RowAdam", "SemanticProxies"]

COPIES = 2  # of a table on the disk: that of the last checkpoint, and that of the one before while it is written
AT_ONCE = 2**22  # numbers drawn in one go, when a table is filled


class EMAAccumulator(nn.Module):
    """A running average of each class's proxies: unit(keep K_c + (1 - keep) mean p_i). VPTSP-M of arXiv:2402.02340.

    Args:
        keep: the share of what was there. The authors' code: 0.8.

    Raises:
        ValueError: `keep` is not from 0 to below 1.

    >>> EMAAccumulator(keep=0.5)(torch.eye(2), torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    tensor([[0.7071, 0.7071],
            [0.0000, 1.0000]])
    """

    def __init__(self, *, keep: float = 0.8) -> None:
        super().__init__()
        if not 0 <= keep < 1:
            raise ValueError(f"keep is a share, from 0 to below 1, not {keep}")
        self.keep = keep

    def forward(
        self, stored: Float[Tensor, "S D"], proxies: Float[Tensor, "B D"], classes: Int[Tensor, "B"]
    ) -> Float[Tensor, "S D"]:
        """The rows of `stored` after the proxies; `classes` are rows of it, in any order, and rows may have none."""
        counts_S = torch.bincount(classes, minlength=len(stored))[:, None]
        mean_SD = torch.zeros_like(stored).index_add(0, classes, proxies) / counts_S.clamp(min=1)
        return unit(torch.where(counts_S > 0, self.keep * stored + (1 - self.keep) * mean_SD, stored))


class GRUAccumulator(nn.Module):
    """A gated recurrent unit with ReLU, whose state is K_c: see the formula above. VPTSP-G of arXiv:2402.02340.

    The proxies of one class enter one after another, in the order in which they stand in the batch; how those of
    different classes are mingled changes nothing.

    Args:
        dim: D.
        dropout: of the state after each step, while training. The authors' code: 0, and 0.1 to 0.5 for many classes.
        keep: the share of the state that a step keeps before anything is learnt: sigmoid(bz). The authors: 0.5. A new
            GRU makes much the same of every class; where steps are few, a larger share keeps the classes apart.

    Raises:
        ValueError: `dropout` is not from 0 to below 1, or `keep` not between 0 and 1.

    >>> gru = GRUAccumulator(384)
    >>> sum(p.numel() for p in gru.parameters())
    885888
    """

    def __init__(self, dim: int, *, dropout: float = 0.0, keep: float = 0.5) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a share, from 0 to below 1, not {dropout}")
        if not 0 < keep < 1:
            raise ValueError(f"keep is a share, between 0 and 1, not {keep}")
        self.dropout = dropout
        self.input = nn.Linear(dim, 3 * dim)
        self.hidden = nn.Linear(dim, 3 * dim, bias=False)
        for block in (*self.input.weight.data.chunk(3), *self.hidden.weight.data.chunk(3)):
            nn.init.xavier_uniform_(block)
        nn.init.zeros_(self.input.bias)
        self.input.bias.data[:dim] = math.log(keep / (1 - keep))

    def forward(
        self, stored: Float[Tensor, "S D"], proxies: Float[Tensor, "B D"], classes: Int[Tensor, "B"]
    ) -> Float[Tensor, "S D"]:
        """The rows of `stored` after the proxies; `classes` are rows of it, in any order, and rows may have none."""
        counts_S = torch.bincount(classes, minlength=len(stored))
        # Items class by class, those of one class in the batch's order; then the turn that each has within its class.
        order_B = classes.argsort(stable=True)
        turn_B = torch.arange(len(classes), device=classes.device)
        turn_B = turn_B - (counts_S.cumsum(0) - counts_S)[classes[order_B]]
        state_SD = stored
        for turn in range(int(counts_S.max())):
            items_b = order_B[turn_B == turn]
            rows_b = classes[items_b]
            state_SD = state_SD.index_copy(0, rows_b, self._step(state_SD[rows_b], proxies[items_b]))
        return unit(state_SD)

    def _step(self, state: Float[Tensor, "b D"], proxies: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
        z, r, n = self.input(proxies).chunk(3, dim=1)
        of_z, of_r, of_n = self.hidden(state).chunk(3, dim=1)
        z, r = torch.sigmoid(z + of_z), torch.sigmoid(r + of_r)
        state = z * state + (1 - z) * torch.relu(n + r * of_n)
        return dropout(state, self.dropout, self.training)


ACCUMULATORS: dict[str, type[GRUAccumulator | EMAAccumulator]] = {"gru": GRUAccumulator, "ema": EMAAccumulator}
"""The name in a recipe -> the class."""


class PromptTable(nn.Module):
    """The prompts of every class and Adam's averages of them, a row a class: in a buffer, or in a memory-mapped file.

    A row holds N W prompts, as many averages of gradients, as many of their squares, and the count of its steps.

    Args:
        classes: C.
        tokens: N.
        width: W.
        std: of the normal distribution that the prompts start from.
        folder: where the file lies; it is made anew, and each checkpoint keeps a copy beside it, of which the last two
            stay, however many checkpoints do: one to go on from while the next is written. So the disk needs room for
            three; of a finished training one stays. None: a buffer, part of every checkpoint.
        max_bytes: the largest table to make.
        seed: of the first prompts; None: torch's.

    Raises:
        InputError: the table would be larger than `max_bytes`, or the disk has no room for it; see `check`.

    >>> PromptTable(classes=3997, tokens=12 * 80, width=384)
    Traceback (most recent call last):
    vicinal.types.InputError: the prompts of 3,997 classes, 960 of 384 numbers each, take 17.7 GB with Adam's \
averages, above max_bytes, 2.1 GB; raise it, give fewer prompts or a smaller depth, or a folder to keep them on the disk
    """

    table: Tensor

    def __init__(
        self,
        classes: int,
        tokens: int,
        width: int,
        *,
        std: float = 0.02,
        folder: str | Path | None = None,
        max_bytes: int = 2**31,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.shape = (tokens, width)
        self.numbers = tokens * width
        self.check(classes, tokens, width, max_bytes=max_bytes, on_disk=folder is not None)
        shape = (classes, 3 * self.numbers + 1)
        size = 4 * shape[0] * shape[1]
        self.file = None if folder is None else Path(folder).expanduser() / "class_prompts.bin"
        if self.file is None:
            self.register_buffer("table", torch.zeros(shape))
        else:
            _reserve(self.file, size)
            # A plain attribute: no buffer, so it is neither moved to the device nor copied into checkpoints.
            self.table = torch.from_file(str(self.file), shared=True, size=shape[0] * shape[1]).view(shape)
        generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)
        for part in torch.split(self.table[:, : self.numbers], max(1, AT_ONCE // self.numbers)):
            part.copy_(std * torch.randn(part.shape, generator=generator))
        self.classes: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.is_stepped = False

    @staticmethod
    def check(
        classes: int, tokens: int, width: int, *, max_bytes: int, on_disk: bool, folders: Sequence[str | Path] = ()
    ) -> int:
        """How many bytes a table takes, before it is made.

        Args:
            classes: as of the table.
            tokens: as of the table.
            width: as of the table.
            max_bytes: as of the table.
            on_disk: whether it is to lie on the disk.
            folders: of the tables to come, one after another; the disk of the first must have room for all.

        Raises:
            InputError: it is larger than `max_bytes`, or the disk has no room for `needed(size, len(folders))`.
        """
        size = 4 * classes * (3 * tokens * width + 1)
        if size > max_bytes:
            raise InputError(
                f"the prompts of {classes:,} classes, {tokens} of {width} numbers each, take {size / 1e9:.1f} GB with "
                f"Adam's averages, above max_bytes, {max_bytes / 1e9:.1f} GB; raise it, give fewer prompts or a "
                "smaller depth" + ("" if on_disk else ", or a folder to keep them on the disk")
            )
        paths = [Path(folder).expanduser().absolute() for folder in folders]
        if paths:
            disk = next(path for path in (paths[0], *paths[0].parents) if path.exists())
            there = sum(file.stat().st_size for path in paths for file in path.glob("class_prompts*.bin"))
            room, needed = shutil.disk_usage(disk).free + there, PromptTable.needed(size, len(paths))
            if room < needed:
                several = f" of {len(paths)} seeds" if len(paths) > 1 else ""
                raise InputError(
                    f"the prompts of the classes take {size / 1e9:.1f} GB, with copies for the checkpoints{several} "
                    f"{needed / 1e9:.1f} GB, and {disk} has room for {room / 1e9:.1f} GB; make "
                    "room, choose another out, or give fewer prompts"
                )
        return size

    @staticmethod
    def needed(size: int, trainings: int) -> int:
        """Bytes of the disk at most: the table and its copies of one training, and a copy of each that is finished."""
        return (trainings + COPIES) * size

    def forward(self, classes: Int[Tensor, "S"]) -> Float[Tensor, "S N W"]:
        """The prompts of these classes, each named once, on the labels' device; their gradient is for `RowAdam`.

        Raises:
            ValueError: gradients of earlier ones wait, and no `RowAdam` takes them.
        """
        own = classes.to(self.table.device)
        prompts = self.table[:, : self.numbers].index_select(0, own).view(-1, *self.shape).to(classes.device)
        if torch.is_grad_enabled():
            if not self.is_stepped and any(leaf.grad is not None for leaf in self.leaves):
                raise ValueError("nothing trains the prompts of the classes: put RowAdam around the optimiser")
            self.classes.append(own)
            self.leaves.append(prompts.requires_grad_())
        return prompts

    @torch.no_grad()
    def step(self, lr: float, betas: tuple[float, float], eps: float) -> None:
        """One step of Adam for the rows that have a gradient, each at its own count of steps."""
        found = [(own, leaf.grad) for own, leaf in zip(self.classes, self.leaves, strict=True) if leaf.grad is not None]
        if not found:
            return
        # Parts of one step may share classes: their gradients are summed.
        rows, places = torch.unique(torch.cat([own for own, _ in found]), return_inverse=True)
        given = torch.cat([gradient.flatten(1) for _, gradient in found])
        g = given.new_zeros(len(rows), self.numbers).index_add_(0, places.to(given.device), given)
        records = self.table.index_select(0, rows).to(g.device)
        prompts, m, v, t = torch.split(
            records, [self.numbers] * 3 + [1], dim=1
        )  # views: what is done to them is done to it
        t += 1
        m.lerp_(g, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(g, g, value=1 - betas[1])
        count = t.cpu().double()  # 1 - beta^t loses its digits in float32, and some devices have no float64
        rate = (lr / (1 - betas[0] ** count)).float().to(g.device)
        root = (1 - betas[1] ** count).sqrt().float().to(g.device)
        prompts -= rate * m / (v.sqrt() / root + eps)
        self.table.index_copy_(0, rows, records.to(self.table.device))

    def clear(self) -> None:
        """Forget the gradients."""
        self.classes.clear()
        self.leaves.clear()

    def keep(self, name: str, earlier: str | None) -> None:
        """Copy the file for a checkpoint, under this name; only the `earlier` copy stays beside it. A buffer: nothing.

        Raises:
            InputError: the disk has no room.
        """
        if self.file is None:
            return
        for old in self.file.parent.glob(f"{self.file.stem}-*.bin"):
            if old not in (self._copy(name), None if earlier is None else self._copy(earlier)):
                old.unlink()
        fresh = self.file.with_name(f".{self.file.name}.tmp")
        try:
            shutil.copyfile(self.file, fresh)  # a mapped file and its mapping are one: nothing has to be written first
            with fresh.open("rb+") as handle:
                os.fsync(handle.fileno())
            fresh.replace(self._copy(name))
        except OSError as error:
            fresh.unlink(missing_ok=True)
            raise InputError(f"could not keep a copy of {self.file} for a checkpoint: {error}; make room") from error

    def leave(self, name: str | None) -> None:
        """The training is over: only the copy of that name stays, for going on. A buffer: nothing."""
        if self.file is None or name is None:
            return
        for file in self.file.parent.glob(f"{self.file.stem}*.bin"):
            if file != self._copy(name):
                with suppress(OSError):  # Windows keeps a file that is mapped
                    file.unlink()

    def go_back(self, name: str) -> None:
        """Put the copy of that name back. A buffer: nothing, it is in the checkpoint itself.

        Raises:
            InputError: there is no such copy, or it is of another size.
        """
        if self.file is None:
            return
        kept = self._copy(name)
        try:
            if kept.stat().st_size != 4 * self.table.numel():
                raise InputError(f"{kept} holds the prompts of other classes; go on with the recipe it came from")
            # Written into the mapped file itself, not put in its place: the mapping would stay with the old one.
            with kept.open("rb") as source, self.file.open("rb+") as target:
                shutil.copyfileobj(source, target, 2**24)
        except OSError as error:
            raise InputError(
                f"the prompts of the classes at that checkpoint cannot be read: {error}; go on from the last one"
            ) from error

    def _copy(self, name: str) -> Path:
        assert self.file is not None
        return self.file.with_name(f"{self.file.stem}-{name}.bin")


class RowAdam(Optimizer):
    """An optimiser of all else, and beside it Adam for the rows of a `PromptTable`. Kingma & Ba, arXiv:1412.6980.

    A row that has no gradient keeps its values, its averages and its count of steps. Rows do not decay. Their gradient
    is not part of the loop's clipping, which would change little: the length of a step does not depend on it.

    `state_dict` keeps a copy of a memory-mapped table, since it is called for a checkpoint; `load_state_dict` goes back
    to that copy.

    Args:
        optimizer: of all else.
        table: the prompts.
        lr: of the prompts; a schedule changes it with the others. The authors: that of the encoder.
        betas: decay of the averages of gradients and of their squares.
        eps: added to the root of the latter.

    >>> table = PromptTable(classes=3, tokens=1, width=2)
    >>> optimizer = RowAdam(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), table, lr=0.5)
    >>> before = table.table.clone()
    >>> table(torch.tensor([1])).sum().backward()
    >>> optimizer.step(); optimizer.zero_grad()
    >>> (before - table.table)[:, :2].round(decimals=4).abs()
    tensor([[0.0000, 0.0000],
            [0.5000, 0.5000],
            [0.0000, 0.0000]])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        table: PromptTable,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.optimizer = optimizer
        self.table = table
        self.steps = 0
        self.kept: str | None = None
        self.rows: dict[str, Any] = {"name": "class prompts", "params": [], "lr": lr, "betas": betas, "eps": eps}
        # The groups are the other optimiser's own, so a schedule that sets their rate sets it there.
        super().__init__([*optimizer.param_groups, self.rows], {})
        self.rows["params"] = table.leaves  # the list itself: a loss scaler finds the gradients of each batch in it
        table.is_stepped = True

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of both."""
        value = None if closure is None else closure()
        self.optimizer.step()
        self.table.step(self.rows["lr"], self.rows["betas"], self.rows["eps"])
        self.steps += 1
        return value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of both."""
        self.optimizer.zero_grad(set_to_none)
        self.table.clear()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs; the table's copy is beside its file."""
        name = f"{self.steps:08d}"
        if name != self.kept:
            self.table.keep(name, self.kept)
            self.kept = name
        return {"optimizer": self.optimizer.state_dict(), "steps": self.steps, "lr": self.rows["lr"]}

    def leave(self) -> None:
        """No step follows: of a table on the disk only what the last checkpoint needs stays."""
        self.table.leave(self.kept)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            InputError: the table's copy is not there, or is of other classes.
        """
        self.optimizer.load_state_dict(dict(state["optimizer"]))
        self.param_groups[:] = [*self.optimizer.param_groups, self.rows]  # loading made new groups
        self.steps, self.rows["lr"] = state["steps"], state["lr"]
        self.kept = f"{self.steps:08d}"
        self.table.go_back(self.kept)


class SemanticProxies(nn.Module):
    """An encoder trained against proxies that its own tower makes of images and of the prompts of their classes.

    The tower is run twice a batch, over patch embeddings computed once. The prompts of classes stand in the place of
    the encoder's own in the second run, which has a head of its own too. `RowAdam` around the optimiser trains them.

    Args:
        encoder: the model; what `adapt` left trainable is trained, by both runs.
        classes: C, labels are 0 .. C - 1.
        prompts: those of each class: how many in which blocks, and their std and dropout. The authors: 3 in all blocks
            (CUB, ViT-S) to 50 in 8 (Cars) and 80 in all (In-Shop).
        accumulator: (K of the batch's classes, proxies, whose they are) -> K. Default: a `GRUAccumulator`.
        share: of O in the proxies; the rest is K. The authors: 0.1 to 0.7, mostly 0.2 to 0.5.
        margin: of Proxy-Anchor.
        alpha: of Proxy-Anchor.
        head: of the second run. Default: a copy of the encoder's, trained apart.
        folder: of the prompts' table, see `PromptTable`.
        max_bytes: the largest table to make.

    Raises:
        InputError: the table would be too large, or the encoder takes no prompts or not in so many blocks.
        ValueError: a setting is out of its range.

    >>> from vicinal.models.backbones import load_encoder
    >>> encoder = load_encoder("timm:test_vit", size=32, random_init=True)
    >>> objective = SemanticProxies(encoder, classes=2, prompts=VisualPrompt(tokens=2, depth=1))
    >>> batch = {"image": torch.rand(3, 3, 32, 32), "label": torch.tensor([0, 1, 0])}
    >>> sorted(objective(batch)), tuple(objective.embed(batch).shape)
    (['embeddings', 'loss'], (3, 2, 64))
    """

    stored: Tensor

    def __init__(
        self,
        encoder: Encoder,
        classes: int,
        prompts: VisualPrompt,
        accumulator: GRUAccumulator | EMAAccumulator | None = None,
        *,
        share: float = 0.5,
        margin: float = 0.1,
        alpha: float = 32.0,
        head: nn.Module | None = None,
        folder: str | Path | None = None,
        max_bytes: int = 2**31,
    ) -> None:
        super().__init__()
        if not 0 <= share <= 1:
            raise ValueError(f"share is that of the learnt proxies, from 0 to 1, not {share}")
        dim, blocks = encoder.embedding_dim, len(encoder.anatomy.image.blocks)
        width = _check_halves(encoder)
        self.counts = prompts.counts(blocks)
        if len(self.counts) > blocks:
            raise InputError(f"prompts in {len(self.counts)} blocks, but {encoder.source} has {blocks}: lower depth")
        self.carried = blocks - 1 if prompts.depth == "shallow" else 0
        self.dropout = prompts.dropout
        self.share = share
        self.encoder = encoder
        self.head = copy.deepcopy(encoder.head).requires_grad_(True) if head is None else head
        self.accumulator = GRUAccumulator(dim) if accumulator is None else accumulator
        self.criterion = ProxyAnchor(dim, classes, margin=margin, alpha=alpha)
        nn.init.xavier_uniform_(self.criterion.weight.data).div_(8)  # shorter than K, which leads at first
        self.table = PromptTable(classes, sum(self.counts), width, std=prompts.std, folder=folder, max_bytes=max_bytes)
        self.register_buffer("stored", unit(torch.randn(classes, dim)))

    def start_from_class_means(self, embeddings: Float[Tensor, "N D"], labels: Int[Tensor, "N"]) -> None:
        """Let K begin with the mean direction of each class's embeddings by the encoder as it is, instead of at random.

        The authors begin at random; with few steps the first of them then go into finding what is already known.
        """
        known = ProxyAnchor(self.stored.shape[1], len(self.stored)).to(self.stored.device)
        known.weight.data.copy_(self.stored)  # what a class without embeddings keeps
        start_from_class_means(known, embeddings, labels)
        self.stored.copy_(unit(known.weight.detach()))

    def train(self, mode: bool = True) -> SemanticProxies:
        """As usual, but batch norms without a trained parameter keep their statistics."""
        super().train(mode)
        keep_frozen_statistics(self)
        return self

    def embed(self, batch: Batch) -> Float[Tensor, "B 2 D"]:
        """Of each image the embedding, and the proxy that the prompts of its class make of it; neither normalised.

        Raises:
            InputError: there are several processes, each of which would train a table of its own.
        """
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and torch.distributed.get_world_size() > 1:
            raise InputError("semantic proxies are trained by one process; start one, or take proxy_anchor")
        present, places = torch.unique(batch["label"], return_inverse=True)
        prompts_BNW = dropout(self.table(present), self.dropout, self.training)[places]
        prompts: list[Tensor | None] = [*torch.split(prompts_BNW, self.counts, dim=1), *[None] * self.carried]
        tokens = self.encoder.patch_tokens(batch["image"])
        sample = self.encoder.encode_tokens(tokens)
        return torch.stack([sample, self.encoder.encode_tokens(tokens, prompts, head=self.head)], 1)

    def loss(self, embeddings: Float[Tensor, "B 2 D"], batch: Batch) -> dict[str, Tensor]:
        """The loss of the images against the proxies of all classes; while training, these are then remembered.

        The images' "embeddings", without a graph, stand beside it to be watched over.
        """
        images, proxies = embeddings.unbind(1)
        with torch.autocast(embeddings.device.type, enabled=False):
            present, places = torch.unique(batch["label"], return_inverse=True)
            fresh = self.accumulator(self.stored[present], unit(proxies), places)
            known = self.stored.index_copy(0, present, fresh)
            mixed = unit(self.share * self.criterion.weight + (1 - self.share) * known)
            loss = proxy_anchor(images, batch["label"], mixed, margin=self.criterion.margin, alpha=self.criterion.alpha)
        if self.training:
            self.stored[present] = fresh.detach()
        return {"loss": loss, "embeddings": images.detach()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Both halves."""
        return self.loss(self.embed(batch), batch)


def _reserve(file: Path, size: int) -> None:
    """An empty file of so many bytes that the disk has: a write into a mapped file that finds no room kills Python."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("wb") as handle:
            handle.truncate(size)
            if hasattr(os, "posix_fallocate"):  # macOS and Windows have none
                os.posix_fallocate(handle.fileno(), 0, size)
            elif shutil.disk_usage(file.parent).free < size:
                raise OSError("no space left on the disk")
    except OSError as error:
        file.unlink(missing_ok=True)
        raise InputError(
            f"the prompts of the classes need {size / 1e9:.1f} GB in {file.parent}: {error}; make room, or choose "
            "another folder"
        ) from error
