"""Has the model collapsed? All images at one point, or all on one line, while the loss sticks at the margin.

    spread = 1 - |mean_i x_i|^2                  the mean cosine distance of two embeddings of the batch
    rank   = tr(G)^2 / |G|_F^2                   the number of directions they fill

Letters: B batch, D numbers an embedding, x unit embeddings, G the Gram matrix of the centred ones. The rank is the
participation ratio of their principal components: no decomposition, so it costs less than the network by far.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from vicinal.losses.cosine import unit

__all__ = ["collapsed", "effective_rank", "spread"]


def spread(embeddings: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """The mean cosine distance between embeddings of the batch, each with itself included.

    >>> import torch
    >>> spread(torch.tensor([[1.0, 0.0], [0.0, 2.0]])).item()
    0.5
    """
    return 1 - unit(embeddings).mean(0).square().sum()


def effective_rank(embeddings: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
    """How many directions the centred unit embeddings fill; 0 where they are all the same.

    >>> import torch
    >>> round(effective_rank(torch.eye(5)).item(), 3)
    4.0
    """
    centred_BD = unit(embeddings)
    centred_BD = centred_BD - centred_BD.mean(0)
    gram_BB = centred_BD @ centred_BD.T
    return gram_BB.trace().square() / gram_BB.square().sum().clamp_min(1e-20)


def collapsed(embeddings: Float[Tensor, "B D"], labels: Int[Tensor, "B"]) -> str | None:
    """What is wrong with these embeddings, in words; None if nothing is.

    A batch of C classes, perfectly separated, fills C - 1 directions: one direction is a collapse only from 4 classes.

    >>> import torch
    >>> collapsed(torch.ones(4, 3), torch.tensor([0, 1, 2, 3]))
    'all images get nearly the same embedding (mean cosine 1.000)'
    >>> collapsed(torch.eye(4), torch.tensor([0, 1, 2, 3]))
    """
    width = float(spread(embeddings))
    if width < 0.005:
        return f"all images get nearly the same embedding (mean cosine {1 - width:.3f})"
    rank = float(effective_rank(embeddings))
    if rank < 1.5 and len(set(labels.tolist())) >= 4:
        return f"the embeddings lie on one line (effective rank {rank:.1f})"
    return None
