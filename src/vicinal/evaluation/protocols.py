"""How a set of embeddings is questioned: retrieval, and few-shot prototypes.

Letters: Q queries, G gallery items, C classes, D numbers an embedding, R draws of a support set.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from vicinal.evaluation.intervals import mean
from vicinal.evaluation.metrics import _average_precision, _precision, _recall, topk
from vicinal.types import Embeddings, Metrics, PerQuery

__all__ = ["prototype_scores", "prototypes", "retrieval", "retrieval_scores"]


def retrieval_scores(
    query: Embeddings, gallery: Embeddings | None = None, *, ks: Sequence[int] = (1, 5, 10)
) -> PerQuery:
    """recall@k, map@r and r_precision of each query; without a gallery, each against all the others."""
    side = query if gallery is None else gallery
    sizes = torch.bincount(side.labels, minlength=len(query.classes))
    count = sizes[query.labels] - (1 if gallery is None else 0)
    depth = max(*ks, int(count.max()))
    exclude = torch.arange(len(query)) if gallery is None else None
    _, rows = topk(query.vectors, side.vectors, depth, exclude=exclude)
    ranked = side.labels[rows] == query.labels[:, None]
    if exclude is not None:
        ranked &= rows != exclude[:, None]
    values = {f"recall@{k}": _recall(ranked, count, k)[None] for k in ks}
    values["map@r"] = _average_precision(ranked, count)[None]
    values["r_precision"] = _precision(ranked, count)[None]
    return PerQuery(values, query.labels)


def retrieval(query: Embeddings, gallery: Embeddings | None = None, *, ks: Sequence[int] = (1, 5, 10)) -> Metrics:
    """`retrieval_scores`, averaged, with intervals over classes."""
    return mean(retrieval_scores(query, gallery, ks=ks))


def prototype_scores(
    queries: Embeddings,
    catalog: Embeddings | None = None,
    *,
    shots: Sequence[int] = (1, 3, 10),
    draws: int = 20,
    seed: int = 0,
    fallback: Embeddings | None = None,
) -> PerQuery:
    """Nearest prototype of k shots: whether each query's class is right, in each draw of the support set."""
    pool = queries if catalog is None else catalog
    if fallback is not None:
        lacking = torch.isin(fallback.labels, queries.labels) & ~torch.isin(fallback.labels, pool.labels)
        extra = fallback.where(lacking)
        pool = Embeddings(
            torch.cat([pool.vectors, extra.vectors]),
            torch.cat([pool.labels, extra.labels]),
            pool.ids + extra.ids,
            pool.classes,
        )
    vectors = functional.normalize(pool.vectors, dim=1)
    labels = pool.labels.numpy()
    sizes = np.bincount(labels, minlength=len(pool.classes))
    values = {f"accuracy@{k}shot": torch.full((draws, len(queries)), torch.nan) for k in shots}
    for draw in range(draws):
        key = np.random.default_rng([seed, draw]).random(len(labels))
        order = np.lexsort((key, labels))
        position = np.empty_like(order)
        position[order] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        for k in shots:
            cap = np.minimum(k, sizes - 1 if catalog is None else sizes)
            chosen = torch.from_numpy(position < cap[labels])
            sums = torch.zeros(len(pool.classes), vectors.shape[1]).index_add_(0, pool.labels[chosen], vectors[chosen])
            there = torch.from_numpy(cap > 0)
            best = (queries.vectors @ functional.normalize(sums, dim=1).T).masked_fill(~there, -torch.inf).argmax(1)
            right = torch.where(there[queries.labels], (best == queries.labels).float(), torch.nan)
            if catalog is None:
                right = torch.where(chosen[: len(queries)], torch.nan, right)
            values[f"accuracy@{k}shot"][draw] = right
    return PerQuery(values, queries.labels, macro=True)


def prototypes(
    queries: Embeddings,
    catalog: Embeddings | None = None,
    *,
    shots: Sequence[int] = (1, 3, 10),
    draws: int = 20,
    seed: int = 0,
    fallback: Embeddings | None = None,
) -> Metrics:
    """`prototype_scores`, averaged over classes and draws, with intervals over both."""
    return mean(prototype_scores(queries, catalog, shots=shots, draws=draws, seed=seed, fallback=fallback))
