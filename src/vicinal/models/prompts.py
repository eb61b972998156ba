"""Visual prompts: learnt tokens beside those of the image, from block to block. Jia et al. 2022, arXiv:2203.12119.

    deep:     [_,   E_i] = L_i [P_i,     E_i-1],   i = 0 .. depth - 1;  then E_i = L_i E_i-1       P_i: "N_i C"
    shallow:  [Z_i, E_i] = L_i [Z_i-1, E_i-1],   Z_-1 = P_0

Prompts stand in front of all tokens of the image (class and register tokens, then patches), have no position, and are
dropped before the final norm and the pooling, so whatever pools sees as many tokens as it would without them. Attention
does not care for the order of tokens: behind the class token they would give the same.

Letters: L_i block i of the tower, E tokens of the image, Z what has become of the prompts, N_i prompts of block i, C
numbers of a token, B batch, H W height and width in pixels, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

__all__ = ["Halves", "Prompts", "through_blocks"]


class Halves(NamedTuple):
    """An image tower, cut open in front of its first block."""

    tokens: Callable[[Tensor], Tensor]
    """Images "B 3 H W" -> what enters the first block, "B T C"."""
    block: Callable[[nn.Module, Tensor, int], Tensor]
    """(a block, its tokens, how many of them are prompts) -> the tokens after it."""
    pool: Callable[[Tensor], Tensor]
    """What leaves the last block -> the feature, "B F"."""


class Prompts(nn.Module):
    """The prompts of one encoder.

    Args:
        counts: N_i of the blocks that have any, from the first on.
        width: C.
        std: of the normal distribution that they start from.
        dropout: of their numbers, while training.
        carried: the first block's prompts go on through the others, see "shallow" above.

    >>> [None if P is None else tuple(P.shape) for P in Prompts([3, 1], 8)(2, 12)]
    [(2, 3, 8), (2, 1, 8)]
    """

    def __init__(
        self, counts: Sequence[int], width: int, *, std: float = 0.02, dropout: float = 0.0, carried: bool = False
    ) -> None:
        super().__init__()
        self.tokens = nn.ParameterList(std * torch.randn(count, width) for count in counts)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.carried = carried

    def forward(self, batch: int, blocks: int) -> list[Tensor | None]:
        """What `through_blocks` takes, for B images and a tower of so many blocks."""
        given: list[Tensor | None] = [self.dropout(tokens.expand(batch, -1, -1)) for tokens in self.tokens]
        return given + [None] * (blocks - len(given)) if self.carried else given


def through_blocks(
    step: Callable[[nn.Module, Tensor, int], Tensor],
    blocks: Sequence[nn.Module],
    tokens: Float[Tensor, "B T C"],
    prompts: Sequence[Tensor | None],
) -> Float[Tensor, "B T C"]:
    """Run the blocks, the i-th with `prompts[i]` in front of the image's tokens, and give the latter back.

    Args:
        step: how a block is run, see `Halves.block`.
        blocks: of the tower.
        tokens: of the image.
        prompts: "B N_i C" each, in the place of those of the block before; None: what became of those goes on. Blocks
            after the list's end have none.

    Raises:
        ValueError: more prompts than blocks.
    """
    if len(prompts) > len(blocks):
        raise ValueError(f"there are prompts for {len(prompts)} blocks, but only {len(blocks)} blocks")
    front = 0
    for i, block in enumerate(blocks):
        if i >= len(prompts):
            tokens, front = tokens[:, front:], 0
        elif (P := prompts[i]) is not None:
            tokens, front = torch.cat([P.to(tokens.dtype), tokens[:, front:]], dim=1), P.shape[1]
        tokens = step(block, tokens, front)
    return tokens[:, front:]
