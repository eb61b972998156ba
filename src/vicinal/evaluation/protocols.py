"""How embeddings are questioned: retrieval, and prototypes of a few shots. One value a query; nothing is averaged here.

    retrieval    q is right at k if one of its k nearest items, itself left out, has its class
    prototypes   p_c = v / |v|,  v = sum over j <= k of x_cj / |x_cj|;   q is right if argmax_c x_q . p_c is its class

where x_c1, x_c2, ... are the items of class c in an order drawn from (seed, draw, the class's name). Two models, two
sets of queries or two orders of the rows thus get the same shots, and those of k = 1 are among those of k = 3.

Which queries count, and which do not:

- Retrieval: a query whose class has no other item (in the gallery, if there is one) can be neither found nor missed. It
  has no value, in recall@k as in map@r and r_precision, but stays a wrong answer for others.
- Prototypes: a query whose class has no prototype has no value; with support drawn from the queries themselves, nor
  have the items that are support in that draw. There, k is capped so that each class keeps one query.

`Estimate.queries` says how many counted, `Estimate.n` of how many classes; `len(query)` says how many there were.

Letters: Q queries, G gallery items, C classes, S items that support is drawn from, D numbers an embedding, R draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vicinal.evaluation.intervals import mean
from vicinal.evaluation.metrics import retrieval_values, topk
from vicinal.types import Embeddings, InputError, Metrics, PerQuery

__all__ = ["prototype_scores", "prototypes", "retrieval", "retrieval_scores"]


def retrieval_scores(
    query: Embeddings, gallery: Embeddings | None = None, *, ks: Sequence[int] = (1, 5, 10), legacy: bool = False
) -> PerQuery:
    """recall@k, map@r and r_precision of each query: among all the other queries, or in a gallery.

    Similarity is the inner product, so the cosine for unit rows. Exact, in bounded memory: see `evaluation.metrics`.

    Args:
        query: what is asked about.
        gallery: what is searched; None leaves each query out in turn and searches the rest. The query itself is left
            out by its row, never by its rank, so exact duplicates of it are found.
        ks: the k of recall@k.
        legacy: give map@r_legacy too, which serves to compare with tables that were made by it.

    Returns:
        Values "1 Q", NaN for a query that nothing in the gallery matches. Units are the classes.

    Raises:
        InputError: no queries, or an empty gallery; not the same classes on both sides; an embedding is not finite; a
            query stands in the gallery too.

    >>> x = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=1)
    >>> found = Embeddings(x, torch.tensor([0, 0, 1]), ("a", "b", "c"), ("cat", "dog"))
    >>> retrieval_scores(found, ks=(1,)).values["recall@1"]
    tensor([[1., 1., nan]])
    """
    _check(query, "queries")
    if gallery is None:
        side, exclude = query, torch.arange(len(query), device=query.labels.device)
    else:
        _check(gallery, "gallery")
        _check_apart(query, gallery, "gallery")
        side, exclude = gallery, None
    values = retrieval_values(
        query.vectors, query.labels, side.vectors, side.labels, ks=ks, exclude=exclude, legacy=legacy
    )
    return PerQuery({name: value[None] for name, value in values.items()}, query.labels)


def retrieval(query: Embeddings, gallery: Embeddings | None = None, *, ks: Sequence[int] = (1, 5, 10)) -> Metrics:
    """`retrieval_scores`, averaged over queries, with intervals over classes.

    Args:
        query: as in `retrieval_scores`.
        gallery: as in `retrieval_scores`.
        ks: as in `retrieval_scores`.

    Raises:
        InputError: as in `retrieval_scores`.

    >>> x = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=1)
    >>> metrics = retrieval(Embeddings(x, torch.tensor([0, 0, 1]), ("a", "b", "c"), ("cat", "dog")))
    >>> metrics["map@r"].value, metrics["map@r"].queries
    (1.0, 2)
    """
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
    """Whether each query is nearest to its own class's prototype, made of k shots, in each draw of the shots.

    The candidates are the classes of the catalog, and those of the queries that the fallback can serve; whoever wants
    seen and unseen classes scored jointly hands in the union of both.

    Args:
        queries: what is asked about.
        catalog: what the shots are drawn from; None draws them from the queries, which do not count where they are
            drawn.
        shots: the k's. A class with fewer items gives what it has; without a catalog, all but one.
        draws: R, how often the shots are drawn. A number from one draw carries several points of luck at k = 1.
        seed: of the draws. With the class names, the ids and nothing else, it settles them.
        fallback: where the shots of a class are drawn from that has queries, and none in the catalog (or, without a
            catalog, no second image). Its other classes are not looked at.

    Returns:
        `accuracy@{k}shot` -> values "R Q", 1 or 0, NaN where the query does not count. Units are the classes, and
        `macro` is set: the mean is one over classes.

    Raises:
        InputError: no queries; k or draws under 1; not the same classes on all sides; an embedding is not finite; a
            query stands in the catalog or fallback too.

    >>> x = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    >>> found = Embeddings(x, torch.tensor([0, 0, 1, 1]), ("a", "b", "c", "d"), ("cat", "dog"))
    >>> scores = prototype_scores(found, shots=(1,), draws=2)
    >>> scores.values["accuracy@1shot"].nansum(1)
    tensor([2., 2.])
    """
    if min(shots, default=1) < 1 or draws < 1:
        raise InputError(f"shots and draws must be at least 1; here shots={list(shots)}, draws={draws}")
    _check(queries, "queries")
    support = _Support.of(queries, catalog, fallback, seed)
    deepest = max(1, int(support.most.max()))
    right = {
        k: torch.empty(draws, len(queries), device=queries.vectors.device) for k in {min(k, deepest) for k in shots}
    }
    for draw in range(draws):
        rows = support.draw(draw, max(right))
        for k, values in right.items():
            if draw and k == deepest and catalog is not None:
                values[draw] = values[0]  # every class gives all it has, whatever the order
                continue
            values[draw] = _right(queries, support, rows[:, :k])
    return PerQuery({f"accuracy@{k}shot": right[min(k, deepest)] for k in shots}, queries.labels, macro=True)


def prototypes(
    queries: Embeddings,
    catalog: Embeddings | None = None,
    *,
    shots: Sequence[int] = (1, 3, 10),
    draws: int = 20,
    seed: int = 0,
    fallback: Embeddings | None = None,
) -> Metrics:
    """`prototype_scores`, averaged over classes and draws (macro top-1), with intervals over both.

    Args:
        queries: as in `prototype_scores`.
        catalog: as in `prototype_scores`.
        shots: as in `prototype_scores`.
        draws: as in `prototype_scores`.
        seed: as in `prototype_scores`.
        fallback: as in `prototype_scores`.

    Raises:
        InputError: as in `prototype_scores`.

    >>> x = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]), dim=1)
    >>> found = Embeddings(x, torch.tensor([0, 0, 1, 1]), ("a", "b", "c", "d"), ("cat", "dog"))
    >>> prototypes(found, shots=(1,))["accuracy@1shot"].value
    1.0
    """
    return mean(prototype_scores(queries, catalog, shots=shots, draws=draws, seed=seed, fallback=fallback))


@dataclass(frozen=True, slots=True)
class _Support:
    """What shots are drawn from, by class, then id: so that the order in which rows came does not matter.

    Args:
        vectors: "S D", unit rows.
        labels: "S", ascending.
        query: "S", which query the row is; -1 where it is none.
        start: "C", where each class begins.
        most: "C", how many shots a class can give; a class that can give none is no candidate.
        state: "C", what a class's draws begin with.
    """

    vectors: Float[Tensor, "S D"]
    labels: Int[Tensor, "S"]
    query: Int[Tensor, "S"]
    start: Int[Tensor, "C"]
    most: Int[Tensor, "C"]
    state: NDArray[np.uint64]

    @classmethod
    def of(cls, queries: Embeddings, catalog: Embeddings | None, fallback: Embeddings | None, seed: int) -> _Support:
        classes = len(queries.classes)
        asked = torch.bincount(queries.labels, minlength=classes) > 0
        if catalog is None:
            several = torch.bincount(queries.labels, minlength=classes) > 1
            rows = several[queries.labels].nonzero().flatten()
            parts, query = [queries.where(several[queries.labels])], [rows]
        else:
            _check_apart(queries, catalog, "catalog")
            parts, query = [catalog], [torch.full_like(catalog.labels, -1)]
        if fallback is not None:
            lacking = asked & (torch.bincount(parts[0].labels, minlength=classes) == 0)
            used = fallback.where(lacking[fallback.labels])
            _check_apart(queries, used, "fallback")
            parts, query = [*parts, used], [*query, torch.full_like(used.labels, -1)]
        labels, ids = torch.cat([part.labels for part in parts]), [name for part in parts for name in part.ids]
        by_class_and_id = sorted(zip(labels.tolist(), ids, range(len(ids)), strict=True))
        order = torch.tensor([i for _, _, i in by_class_and_id], dtype=torch.long, device=labels.device)
        vectors = functional.normalize(torch.cat([part.vectors for part in parts])[order], dim=1)
        labels, row = labels[order], torch.cat(query)[order]
        size = torch.bincount(labels, minlength=classes)
        kept_back = torch.bincount(labels[row >= 0], minlength=classes).clamp(max=1)  # one query of its own
        words = [hashlib.blake2b(f"{seed}\n{name}".encode(), digest_size=8).digest() for name in queries.classes]
        state = np.frombuffer(b"".join(words), dtype="<u8").astype(np.uint64)
        return cls(vectors, labels, row, size.cumsum(0) - size, size - kept_back, state)

    def draw(self, draw: int, k: int) -> Int[Tensor, "C k"]:
        """Row of each class's j-th shot in this draw, -1 where it has no j-th."""
        label = self.labels.cpu().numpy()
        within = np.arange(len(label)) - self.start.cpu().numpy()[label]
        key = _mixed(_mixed(self.state, np.full(1, draw))[label], within)
        order = torch.from_numpy(np.lexsort((key, label))).to(self.labels.device)
        place = self.start[:, None] + torch.arange(k, device=order.device)
        there = torch.arange(k, device=order.device) < self.most[:, None]
        return torch.where(there, order[place.clamp(max=max(0, len(order) - 1))], -1) if len(order) else place * 0 - 1


def _right(queries: Embeddings, support: _Support, rows: Int[Tensor, "C k"]) -> Float[Tensor, "Q"]:
    """1 where a query's nearest prototype is its class's, 0 where it is another's, NaN where it does not count."""
    candidates = (support.most > 0).nonzero().flatten()
    if len(candidates) == 0:
        return torch.full((len(queries),), torch.nan, device=queries.vectors.device)
    sums = support.vectors.new_zeros(len(candidates), support.vectors.shape[1])
    for shot in rows[candidates].T:  # a shot of every class at a time: C x D at once, however many shots
        there = (shot >= 0).nonzero().flatten()
        sums[there] += support.vectors[shot[there]]
    nearest = topk(queries.vectors, functional.normalize(sums, dim=1), 1)[1][:, 0]
    right = (candidates[nearest] == queries.labels).float()
    right[support.most[queries.labels] == 0] = torch.nan
    used = support.query[rows[rows >= 0]]
    right[used[used >= 0]] = torch.nan
    return right


def _mixed(state: NDArray[np.uint64], step: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The output of the generator splitmix64 (Steele et al. 2014) that starts from `state`, after `step` steps."""
    z: NDArray[np.uint64] = state + (step.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _check(embeddings: Embeddings, name: str) -> None:
    """Refuse what no protocol can use: nothing at all, a row without a label, a vector that is not finite."""
    if len(embeddings) == 0:
        raise InputError(f"{name}: there is not one image to measure; name a split, folder or table that has some")
    _check_rows(embeddings, name)


def _check_rows(embeddings: Embeddings, name: str) -> None:
    outside = (embeddings.labels < 0) | (embeddings.labels >= len(embeddings.classes))
    if outside.any():
        first = embeddings.ids[int(outside.nonzero()[0])]
        raise InputError(f"{name}: {first} has no label among the {len(embeddings.classes)} classes; give it one")
    bad = ~torch.isfinite(embeddings.vectors).all(1)
    if bad.any():
        raise InputError(
            f"{name}: {int(bad.sum())} embeddings are not finite, the first that of "
            f"{embeddings.ids[int(bad.nonzero()[0])]}; the training diverged (lower lr), or its image is broken"
        )


def _check_apart(queries: Embeddings, others: Embeddings, name: str) -> None:
    """Refuse other classes, and a picture that would be found by itself; a shared name alone is no such picture."""
    if queries.classes != others.classes:
        raise InputError(
            f"queries have {len(queries.classes)} classes, the {name} {len(others.classes)}, and the two lists are not "
            "equal, so their labels cannot be compared: embed both from manifests with one list of classes"
        )
    _check_rows(others, name)
    rows = {ident: i for i, ident in enumerate(others.ids)}
    pairs = torch.tensor([(i, rows[ident]) for i, ident in enumerate(queries.ids) if ident in rows], dtype=torch.long)
    if len(pairs) == 0:
        return
    same = (queries.vectors[pairs[:, 0]] == others.vectors[pairs[:, 1]]).all(1)
    if same.any():
        first = queries.ids[int(pairs[int(same.nonzero()[0]), 0])]
        raise InputError(
            f"{int(same.sum())} queries stand in the {name} too, the first {first}, and would find themselves: take "
            f"them out of one side, or leave the {name} away so that each query is left out in turn"
        )
