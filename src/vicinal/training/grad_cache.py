"""GradCache: the gradients of a whole batch, with the memory of a part of it.

    for each part k:  x_k = embed(part k)                     no graph but that of the last part
    L = loss(x_1 ... x_n),  g = dL/dx                         the loss sees the whole batch, and nothing behind x
    for each part k:  backward of x_k = embed(part k) from g_k    the same x_k again, now with its graph

Gao et al. 2021, arXiv:2101.06983. By the chain rule the sum over parts of g_k dx_k/dtheta is dL/dtheta: a loss that
compares the items of a batch has all of its negatives, while the graph of only one part exists at a time. Gradients of
the loss's own parameters (scale, bias, class weights) arise in the middle, once.

**What is drawn at random** in a part is seeded by its number before each of its two passes, so dropout drops the same
in both. Views and captions were drawn when the batch was made. The last part goes first to the graph and is not run
again, so of n parts n - 1 are run twice.

**What cannot be had**: batch norms that normalise by the batch they see would see a part. They are an error, unless
they are frozen.

**Several processes** gather embeddings in the objective's second half, once, as without parts. The gradients of
parameters are joined once a step, in the backward pass of the last part that is run; all before it goes past
DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor, nn

from vicinal.types import Batch, InputError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Halves", "backward_in_parts", "check_parts", "items", "parts_of"]


class _Objective(Protocol):
    """What an objective needs for this."""

    def embed(self, batch: Batch) -> Tensor: ...

    def loss(self, embeddings: Tensor, batch: Batch) -> dict[str, Tensor]: ...


class Halves(nn.Module):
    """An objective under a forward of which DistributedDataParallel can run the whole or the first half.

    Args:
        objective: with `embed` and `loss`.
    """

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Batch, *, first: bool = False) -> dict[str, Tensor] | tuple[Tensor, Tensor]:
        """The whole; or the embeddings, and a zero that depends on all that the first half does not train.

        Of these parameters the gradient is there already. The zero's makes DistributedDataParallel, which waits for a
        gradient of each, send it to the other processes.
        """
        if not first:
            parts: dict[str, Tensor] = self.objective(batch)
            return parts
        elsewhere = [
            p for n, p in self.objective.named_parameters() if p.requires_grad and not n.startswith("encoder.")
        ]
        zero = sum((0 * p.sum() for p in elsewhere), torch.zeros((), device=next(self.parameters()).device))
        return cast(_Objective, self.objective).embed(batch), zero


def check_parts(objective: nn.Module) -> None:
    """Refuse what has not the same gradients in parts; the objective is in training mode.

    Raises:
        InputError: it has no two halves, or a batch norm that normalises by the batch it sees.
    """
    if not (hasattr(objective, "embed") and hasattr(objective, "loss")):  # an objective of the user's own may have none
        raise InputError(
            f"micro_batch: {type(objective).__name__} has no two halves, embed(batch) and loss(embeddings, batch); "
            "write them, or leave micro_batch out"
        )
    for name, module in objective.named_modules():
        of_batch = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
        if of_batch and not name.startswith("criterion."):  # a loss sees the whole batch
            raise InputError(
                f"micro_batch: {name} is a batch norm in training mode, which would normalise by a micro batch instead "
                "of the batch; leave micro_batch out, or train what keeps its batch norms frozen, as linear_head does"
            )


def backward_in_parts(
    accelerator: Accelerator,
    model: nn.Module,
    objective: nn.Module,
    batch: Batch,
    *,
    micro_batch: int,
    divisor: int,
    seed: Callable[[int], None],
    joined: bool,
) -> dict[str, Tensor]:
    """Add the gradients of the whole batch to those of the parameters, and give what `objective.loss` said.

    Args:
        accelerator: its precision and loss scaler are used.
        model: `Halves` of the objective, as the accelerator prepared it.
        objective: with `embed` and `loss`; `embed` must not mix items.
        batch: of more items than `micro_batch`.
        micro_batch: items at a time.
        divisor: of the loss.
        seed: called with the number of a part before each of its passes.
        joined: whether the processes join their gradients now.
    """
    halves = cast(_Objective, objective)
    parts = list(parts_of(batch, micro_batch))
    last = len(parts) - 1
    vectors = []
    # One autocast a pass: it remembers weights that it has rounded, and those of a pass without a graph have none.
    with torch.no_grad(), accelerator.autocast():
        for k in range(last):
            seed(k)
            vectors.append(halves.embed(parts[k]))
    seed(last)
    with accelerator.autocast():
        kept = halves.embed(parts[last])
    whole = torch.cat([*vectors, kept.detach()]).requires_grad_()
    with accelerator.autocast():
        found = halves.loss(whole, batch)
    accelerator.backward(found["loss"] / divisor)
    assert whole.grad is not None
    gradients = torch.split(whole.grad, micro_batch)
    trained = kept.requires_grad  # else there is nothing in the first half to run again for
    if trained:
        torch.autograd.backward(kept, gradients[last])
    del kept
    for k in range(last):
        through = joined and k == last - 1 and model is not objective
        if not (trained or through):
            continue
        seed(k)
        if through:
            again, zero = model(parts[k], first=True)
            roots = [(again, gradients[k].to(again.dtype)), (zero, torch.ones_like(zero))]
            roots = [(root, gradient) for root, gradient in roots if root.requires_grad]  # each half may be untrained
            torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
        else:
            with accelerator.autocast():
                again = halves.embed(parts[k])
            torch.autograd.backward(again, gradients[k])
    return found


def items(batch: Batch) -> int:
    """How many a batch holds, whichever of its columns there are."""
    return len(next(iter(_columns(batch).values())))


def parts_of(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in parts of so many items, the last one maybe smaller."""
    for at in range(0, items(batch), size):
        part = {name: column[at : at + size] for name, column in _columns(batch).items()}
        yield cast(Batch, part)


def _columns(batch: Batch) -> Mapping[str, Tensor | list[str]]:
    return cast("Mapping[str, Tensor | list[str]]", batch)
