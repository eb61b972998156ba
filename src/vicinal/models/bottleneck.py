"""A narrow way beside the MLP of a block that has its norms in front. Chen et al. 2022, arXiv:2205.13535.

    u + MLP(norm(u)) + s (Wup relu(Wdown u + bdown) + bup)

Letters: u what comes out of the block's attention, "B T C"; s scale, fixed; Wdown "dim C"; Wup "C dim"; B batch, T
tokens, C numbers of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Detour", "norm_of_mlp"]


class Detour(nn.Module):
    """A narrow way beside the MLP of a block: s (Wup dropout(relu(Wdown u + bdown)) + bup). Starts as zero.

    It is a child of the block, so it is saved, moved and trained with it. Two hooks do the rest: the norm of the MLP
    shows u as it comes in, and the result is added to what the block gives (outside of its layer scale).

    Args:
        width: C, numbers of u.
        dim: numbers of the narrow side.
        scale: s, fixed.
        dropout: on the narrow side, while training.

    >>> Detour(8, 2, scale=0.1)(torch.randn(1, 3, 8)).abs().sum().item()
    0.0
    """

    def __init__(self, width: int, dim: int, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.down = nn.Linear(width, dim)
        self.up = nn.Linear(dim, width)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale
        self._u: Tensor | None = None
        nn.init.zeros_(self.down.bias)  # the weight is Kaiming-uniform with a = sqrt(5), as torch has it
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def attach(self, block: nn.Module, norm: nn.Module) -> None:
        """Put it beside the MLP of `block`, whose norm is `norm`."""
        block.add_module("bottleneck", self)
        norm.register_forward_pre_hook(self._see)
        block.register_forward_hook(self._add)

    def forward(self, u: Float[Tensor, "*T C"]) -> Float[Tensor, "*T C"]:
        """What is added. The scale is put on the weights, where it costs nothing."""
        h = self.dropout(F.relu(self.down(u.to(self.down.weight.dtype))))
        return F.linear(h, self.scale * self.up.weight, self.scale * self.up.bias)

    def _see(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (self._u,) = inputs

    def _add(self, block: nn.Module, inputs: object, output: Tensor) -> Tensor:
        u, self._u = cast(Tensor, self._u), None
        return output + cast(Tensor, self(u)).to(output.dtype)


@torch.no_grad()
def norm_of_mlp(block: nn.Module, layer: str, run: Callable[[], object]) -> str | None:
    """Which child of a block is the norm of its MLP: what it gives is what the MLP's first layer takes. None: none is.

    So a block whose norms come after its layers is told apart, whatever it calls them.

    Args:
        block: of a tower.
        layer: dotted name of the first layer of its MLP.
        run: runs the model, on anything.
    """
    given: dict[str, object] = {}
    found: list[str] = []

    def note(name: str) -> Callable[[nn.Module, object, object], None]:
        return lambda module, inputs, output: given.update({name: output})

    handles = [child.register_forward_hook(note(name)) for name, child in block.named_children()]
    handles.append(
        block.get_submodule(layer).register_forward_pre_hook(
            lambda module, inputs: found.extend(name for name, output in given.items() if output is inputs[0])
        )
    )
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
