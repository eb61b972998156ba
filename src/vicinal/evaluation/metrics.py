"""Retrieval metrics, one value per query, and the exact nearest neighbours that they are read from.

Let rel_i be 1 where the i-th best item of the gallery has the query's class, else 0, and let R be the number of such
items in the whole gallery, the query itself excluded:

    recall@k    = max(rel_1 .. rel_k)
    r_precision = (rel_1 + ... + rel_R) / R
    map@r       = (1 / R) sum over i <= R of rel_i * (rel_1 + ... + rel_i) / i        (Musgrave et al. 2020, 2003.08505)

A query without any relevant item has no value: NaN. Equal similarities are ranked in the order of the gallery.

Letters: Q queries, q queries of one block, G gallery items, D numbers an embedding, k neighbours, R relevant items.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["map_at_r", "r_precision", "recall_at_k", "topk"]

BLOCK_BYTES = 64 * 2**20


def recall_at_k(similarity: Float[Tensor, "q G"], relevant: Bool[Tensor, "q G"], k: int) -> Float[Tensor, "q"]:
    """Whether any of the k most similar items is relevant: 1 or 0, and NaN where no item is.

    >>> recall_at_k(torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[False, True, False]]), k=2)
    tensor([1.])
    """
    return _recall(_ranked(similarity, relevant), relevant.sum(1), k)


def map_at_r(similarity: Float[Tensor, "q G"], relevant: Bool[Tensor, "q G"]) -> Float[Tensor, "q"]:
    """Mean average precision at R: the mean of the precision at each hit among the R best, misses counting 0.

    >>> map_at_r(torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[True, False, True, False]]))
    tensor([0.5000])
    """
    return _average_precision(_ranked(similarity, relevant), relevant.sum(1))


def r_precision(similarity: Float[Tensor, "q G"], relevant: Bool[Tensor, "q G"]) -> Float[Tensor, "q"]:
    """The share of relevant items among the R best.

    >>> r_precision(torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[True, False, True, False]]))
    tensor([0.5000])
    """
    return _precision(_ranked(similarity, relevant), relevant.sum(1))


def topk(
    queries: Float[Tensor, "Q D"],
    gallery: Float[Tensor, "G D"],
    k: int,
    *,
    exclude: Int[Tensor, "Q"] | None = None,
    block: int | None = None,
) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
    """The k gallery rows of largest inner product with each query, best first: exact, in blocks of queries."""
    k = min(k, len(gallery))
    block = block or max(1, BLOCK_BYTES // (8 * max(1, len(gallery))))
    scores, rows = [], []
    for start in range(0, len(queries), block):
        similarity = queries[start : start + block] @ gallery.T
        if exclude is not None:
            similarity.scatter_(1, exclude[start : start + block, None], -torch.inf)
        order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
        scores.append(similarity.gather(1, order))
        rows.append(order)
    return torch.cat(scores), torch.cat(rows)


def _ranked(similarity: Float[Tensor, "q G"], relevant: Bool[Tensor, "q G"]) -> Bool[Tensor, "q G"]:
    return relevant.gather(1, similarity.argsort(dim=1, descending=True, stable=True))


def _recall(ranked: Bool[Tensor, "q K"], count: Int[Tensor, "q"], k: int) -> Float[Tensor, "q"]:
    return _where_any(ranked[:, :k].any(1).float(), count)


def _precision(ranked: Bool[Tensor, "q K"], count: Int[Tensor, "q"]) -> Float[Tensor, "q"]:
    counted = ranked & _within(ranked, count)
    return _where_any((counted.sum(1) / count.clamp(min=1)).float(), count)


def _average_precision(ranked: Bool[Tensor, "q K"], count: Int[Tensor, "q"]) -> Float[Tensor, "q"]:
    counted = (ranked & _within(ranked, count)).double()
    rank = torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    precision = counted.cumsum(1) / rank
    return _where_any(((precision * counted).sum(1) / count.clamp(min=1)).float(), count)


def _within(ranked: Bool[Tensor, "q K"], count: Int[Tensor, "q"]) -> Bool[Tensor, "q K"]:
    return torch.arange(ranked.shape[1], device=ranked.device) < count[:, None]


def _where_any(value: Float[Tensor, "q"], count: Int[Tensor, "q"]) -> Float[Tensor, "q"]:
    return torch.where(count > 0, value, torch.nan)
