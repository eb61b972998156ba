"""Retrieval metrics, one value per query, and the exact nearest neighbours that they are read from.

Let rel_i be 1 where the i-th best item of the gallery has the query's class, else 0, and let R be the number of such
items in the whole gallery, the query itself excluded:

    recall@k    = max(rel_1 .. rel_k)
    r_precision = (rel_1 + ... + rel_R) / R
    map@r       = (1 / R) sum over i <= R of rel_i (rel_1 + ... + rel_i) / i         (Musgrave et al. 2020, 2003.08505)
    map@r_legacy is the same with R + 1 for R, as in some published code: only to compare with tables made by it

A query without any relevant item has no value: NaN. Equal similarities are ranked in the order of the gallery.

The neighbours are exact, yet found cheaply (`topk`). Let s_qg = x_q . y_g, and s'_qg the same from rounded vectors
x', y', itself rounded to u of its size; y is taken less its mean, which changes no ranking and shrinks the error:

    |s'_qg - s_qg| <= a_q + u |s_qg|,    a_q = |x_q - x'_q| max |y_g| + |x'_q| max |y_g - y'_g|
    L_q = the k-th largest of the maxima of disjoint groups of s'_q, so at least k items reach it
    s_qg is among the k largest  =>  s'_qg >= L_q - 2 a_q - u |L_q|

The few items that pass are scored again in float32, those that it cannot tell apart in float64, and only they are
sorted: the ranking is that of float64 products, whichever way it was found. On a processor with bfloat16 products
this is bound by them, about four times as fast as by float32 products. Q x G is never held.

Letters: Q queries, q queries of one block, G gallery items, D numbers an embedding, k neighbours, R relevant items,
P pairs of a query and a gallery item.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

__all__ = [
    "class_neighbours",
    "map_at_r",
    "map_at_r_legacy",
    "nmi",
    "r_precision",
    "recall_at_k",
    "retrieval_values",
    "topk",
]

BLOCK = 512  # queries at once; fewer where their similarities would exceed BLOCK_BYTES
BLOCK_BYTES = 64 * 2**20
TILE = 1024  # gallery items at once: with BLOCK queries, about what a second-level cache holds
FINE = 8  # the fewest gallery items of which only the best is looked at first
PRUNE_FROM = 4096  # gallery items; for fewer, all similarities cost less than choosing among them
EXACT_CLASSES = 30_000  # six seconds of one core
SPREAD = 8  # groups there must be for each neighbour asked for, so that seldom two of them share one
UNIT_BF16 = 2.0**-8
UNIT_FP32 = 2.0**-24
CLOSE = 64  # units of rounding by which two float32 products may fall in the wrong order


def recall_at_k(similarity: Float[Tensor, "q G"], relevant: Bool[Tensor, "q G"], k: int) -> Float[Tensor, "q"]:
    """Whether any of the k most similar items is relevant: 1 or 0.

    Args:
        similarity: higher is nearer. A query's own column is masked by the caller: -inf here, and False in `relevant`.
        relevant: whether the item has the query's class.
        k: at least 1; where it exceeds G, all items count.

    Returns:
        One value a query, NaN where nothing is relevant.

    Raises:
        ValueError: k < 1, or a similarity is NaN.

    >>> recall_at_k(torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[False, True, False]]), k=2)
    tensor([1.])
    """
    return _recall(_ranked(similarity, relevant), relevant.sum(1), k)


def map_at_r(similarity: Float[Tensor, "q G"], relevant: Bool[Tensor, "q G"]) -> Float[Tensor, "q"]:
    """Mean average precision at R: precision at each hit among the R best, a miss counting 0. Musgrave et al. 2020.

    Args:
        similarity: as in `recall_at_k`.
        relevant: as in `recall_at_k`; R is its sum along a row.

    Returns:
        One value a query, NaN where nothing is relevant.

    Raises:
        ValueError: a similarity is NaN.

    >>> map_at_r(torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[True, False, True, False]]))
    tensor([0.5000])
    """
    return _average_precision(_ranked(similarity, relevant), relevant.sum(1))


def map_at_r_legacy(similarity: Float[Tensor, "q G"], relevant: Bool[Tensor, "q G"]) -> Float[Tensor, "q"]:
    """MAP@R with R + 1 for R: the query counted as one of its relevant items, although it is left out of the ranking.

    So the code of VPTSP-G (arXiv:2402.02340) has it. A perfect ranking of a class of n has (n - 1) / n and no more, so
    where classes are small the values are far below those of `map_at_r`. To be quoted only beside numbers that were
    computed like this.

    Args:
        similarity: as in `recall_at_k`.
        relevant: as in `recall_at_k`.

    Returns:
        One value a query, NaN where nothing is relevant.

    Raises:
        ValueError: a similarity is NaN.

    >>> map_at_r_legacy(torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[True, False, True, False]]))
    tensor([0.5556])
    """
    return _legacy(_ranked(similarity, relevant), relevant.sum(1))


def r_precision(similarity: Float[Tensor, "q G"], relevant: Bool[Tensor, "q G"]) -> Float[Tensor, "q"]:
    """The share of relevant items among the R best, R being how many there are.

    Args:
        similarity: as in `recall_at_k`.
        relevant: as in `recall_at_k`.

    Returns:
        One value a query, NaN where nothing is relevant.

    Raises:
        ValueError: a similarity is NaN.

    >>> r_precision(torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([[True, False, True, False]]))
    tensor([0.5000])
    """
    return _precision(_ranked(similarity, relevant), relevant.sum(1))


def retrieval_values(
    queries: Float[Tensor, "Q D"],
    query_labels: Int[Tensor, "Q"],
    gallery: Float[Tensor, "G D"],
    gallery_labels: Int[Tensor, "G"],
    *,
    ks: Sequence[int] = (1, 5, 10),
    exclude: Int[Tensor, "Q"] | None = None,
    legacy: bool = False,
) -> dict[str, Float[Tensor, "Q"]]:
    """recall@k, map@r and r_precision from embeddings, without ever holding Q x G similarities.

    Of each query only its max(R, k) nearest items are ranked, in blocks of queries of like R.

    Args:
        queries: unit rows, where cosines are meant.
        query_labels: the class of each query.
        gallery: what is searched.
        gallery_labels: the class of each item, from the same list.
        ks: the k of recall@k.
        exclude: the gallery row that is the query itself, -1 for none; it neither counts as relevant nor as a miss.
        legacy: give map@r_legacy too.

    Returns:
        Metric name -> one value a query, NaN where the gallery holds nothing relevant.

    Raises:
        ValueError: some k < 1, or an embedding is not finite.

    >>> x = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=1)
    >>> y = torch.tensor([0, 0, 1])
    >>> retrieval_values(x, y, x, y, ks=(1,), exclude=torch.arange(3))["recall@1"]
    tensor([1., 1., nan])
    """
    if min(ks, default=1) < 1:
        raise ValueError(f"recall@k needs k >= 1, not {min(ks)}")
    classes = 1 + max((int(labels.max()) for labels in (query_labels, gallery_labels) if len(labels)), default=-1)
    count = torch.bincount(gallery_labels, minlength=classes)[query_labels]
    if exclude is not None:
        own = (exclude >= 0).nonzero().flatten()
        count[own] -= (gallery_labels[exclude[own]] == query_labels[own]).long()
    names = [*(f"recall@{k}" for k in ks), "map@r", "r_precision", *(["map@r_legacy"] if legacy else [])]
    values = {name: torch.full((len(queries),), torch.nan, device=queries.device) for name in names}
    asked = count.nonzero().flatten()  # the others have no value: their neighbours need not be found
    depth = (count + legacy).clamp(min=max(ks, default=1))
    for rows, _, found in _neighbours(queries, gallery, asked, depth[asked], exclude):
        ranked = gallery_labels[found] == query_labels[rows, None]  # itself, where all are ranked, comes after the R-th
        for k in ks:
            values[f"recall@{k}"][rows] = _recall(ranked, count[rows], k)
        values["map@r"][rows] = _average_precision(ranked, count[rows])
        values["r_precision"][rows] = _precision(ranked, count[rows])
        if legacy:
            values["map@r_legacy"][rows] = _legacy(ranked, count[rows])
    return values


def class_neighbours(vectors: Float[Tensor, "N D"], labels: Int[Tensor, "N"], k: int) -> Int[Tensor, "C k"]:
    """The k classes nearest to each class, by the cosine of their means: what `HardClassSampler` takes.

    Exact up to EXACT_CLASSES. All pairs of 100,000 classes of 512 numbers would cost 10^13 operations, and a sampler
    has no need of the very nearest: where there are more, each is compared with a sixteenth of them, those whose
    clusters are nearest to its own, in bfloat16. What that misses: `benchmarks/neighbours.py`.

    Args:
        vectors: normalised here, so that long ones do not outweigh others.
        labels: the class of each row. Classes are numbered here in ascending order of those that there are.
        k: neighbours of each; all other classes where there are fewer.

    Returns:
        Numbers of classes, nearest first; never a class itself.

    Raises:
        ValueError: k < 1, or a vector is not finite.

    >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    >>> class_neighbours(x, torch.tensor([3, 5, 8]), k=1)
    tensor([[1],
            [0],
            [1]])
    """
    place = (torch.bincount(labels) > 0).cumsum(0) - 1
    classes = int(place[-1]) + 1
    unit = functional.normalize(vectors.detach().float(), dim=1)
    sums = unit.new_zeros(classes, unit.shape[1]).index_add_(0, place[labels], unit)
    means = functional.normalize(sums, dim=1)
    if k < 1 or not torch.isfinite(sums).all():  # what `topk` says of it holds whatever the number of classes
        return topk(means, means, k)[1]
    if classes > max(EXACT_CLASSES, 64 * k):
        return _near_by_cluster(means, k)
    nearest = topk(means, means, k, exclude=torch.arange(classes, device=means.device))[1]
    return nearest[:, : classes - 1]


def nmi(vectors: Float[Tensor, "N D"], labels: Int[Tensor, "N"], *, iterations: int = 20, seed: int = 0) -> float:
    """Normalised mutual information of the classes and of as many k-means clusters; 1 if they are the same.

    2 I(labels; clusters) / (H(labels) + H(clusters)), as in most tables of metric learning; 1 for one class. It says
    little that recall@1 and map@r do not, moves with the seed of k-means, and chance alone gives a high value where
    classes are small. It is one number for all queries, so it has no interval.

    Args:
        vectors: unit rows, where cosines are meant.
        labels: the class of each row.
        iterations: the most that k-means takes, from rows drawn at random. The usual, faiss's: 20.
        seed: of the rows that k-means starts from.

    Raises:
        ValueError: there are no rows, or a vector is not finite.

    >>> x = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [5.1, 5.0]])
    >>> nmi(x, torch.tensor([7, 7, 2, 2]))
    1.0
    """
    from sklearn.cluster import KMeans  # heavy, and needed by those alone who ask for this
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import normalized_mutual_info_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than classes: some clusters are empty
        clusters = KMeans(
            n_clusters=int((torch.bincount(labels) > 0).sum()),
            init="random",
            n_init=1,
            max_iter=iterations,
            random_state=seed,
        ).fit_predict(vectors.detach().float().cpu().numpy())
    return float(normalized_mutual_info_score(labels.cpu().numpy(), clusters))


def topk(
    queries: Float[Tensor, "Q D"],
    gallery: Float[Tensor, "G D"],
    k: int,
    *,
    exclude: Int[Tensor, "Q"] | None = None,
    block: int | None = None,
) -> tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]:
    """The k gallery rows of largest inner product with each query, best first: exact, as float64 ranks them.

    Memory beside the result: a bfloat16 copy of the gallery where the processor multiplies those natively, and 64 MB
    of similarities at a time (512 MB on a GPU), however many queries there are.

    Args:
        queries: of any float; compared in float32, without gradients.
        gallery: likewise, on the same device.
        k: how many; all of the gallery where it has fewer.
        exclude: the gallery row that is the query itself, -1 for none. It comes last, with score -inf, and only where
            k reaches the whole gallery.
        block: the most queries at once, to hold less memory than the default.

    Returns:
        Scores and gallery rows, each with min(k, G) columns. Equal scores stand in the order of the gallery.

    Raises:
        ValueError: k < 1, or an embedding is not finite.

    >>> scores, rows = topk(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.6, 0.8], [1.0, 0.0]]), k=2)
    >>> rows
    tensor([[2, 1]])
    """
    if k < 1:
        raise ValueError(f"topk needs k >= 1, not {k}")
    k = min(k, len(gallery))
    scores = torch.empty(len(queries), k, device=queries.device)
    found = torch.empty(len(queries), k, dtype=torch.long, device=queries.device)
    everyone = torch.arange(len(queries), device=queries.device)
    depth = torch.full_like(everyone, k)
    for rows, best, columns in _neighbours(queries, gallery, everyone, depth, exclude, block=block):
        scores[rows], found[rows] = best, columns
    return scores, found


# ---- from ranked relevance to values


def _ranked(similarity: Float[Tensor, "q G"], relevant: Bool[Tensor, "q G"]) -> Bool[Tensor, "q G"]:
    if similarity.isnan().any():
        raise ValueError("a similarity is NaN, which has no rank: some embedding is not finite")
    return relevant.gather(1, similarity.argsort(dim=1, descending=True, stable=True))


def _recall(ranked: Bool[Tensor, "q K"], count: Int[Tensor, "q"], k: int) -> Float[Tensor, "q"]:
    if k < 1:
        raise ValueError(f"recall@k needs k >= 1, not {k}")
    return _where_any(ranked[:, :k].any(1).float(), count)


def _precision(ranked: Bool[Tensor, "q K"], count: Int[Tensor, "q"]) -> Float[Tensor, "q"]:
    return _where_any((ranked & _within(ranked, count)).sum(1).float() / count, count)


def _average_precision(ranked: Bool[Tensor, "q K"], count: Int[Tensor, "q"]) -> Float[Tensor, "q"]:
    hits = (ranked & _within(ranked, count)).double()
    precision = hits.cumsum(1) / torch.arange(1, ranked.shape[1] + 1, device=ranked.device)
    return _where_any(((precision * hits).sum(1) / count).float(), count)


def _legacy(ranked: Bool[Tensor, "q K"], count: Int[Tensor, "q"]) -> Float[Tensor, "q"]:
    return torch.where(count > 0, _average_precision(ranked, count + 1), torch.nan)


def _within(ranked: Bool[Tensor, "q K"], count: Int[Tensor, "q"]) -> Bool[Tensor, "q K"]:
    return torch.arange(ranked.shape[1], device=ranked.device) < count[:, None]


def _where_any(value: Float[Tensor, "q"], count: Int[Tensor, "q"]) -> Float[Tensor, "q"]:
    return torch.where(count > 0, value, torch.nan)


# ---- neighbours that need not be the nearest


def _near_by_cluster(rows: Float[Tensor, "C D"], k: int) -> Int[Tensor, "C k"]:
    """Near rows of each unit row, itself left out: the best k of C / 16, those of the clusters nearest to its own.

    About sqrt(C) clusters, from rows drawn with one seed, so that the answer is always the same.
    """
    count, clusters = len(rows), round(len(rows) ** 0.5)
    half = rows.bfloat16()
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:clusters]
    centres = rows[drawn.to(rows.device)]
    for _ in range(2):  # two rounds of k-means
        own = torch.cat([(part @ centres.bfloat16().T).argmax(1) for part in torch.split(half, 8 * BLOCK)])
        centres = functional.normalize((1e-3 * centres).index_add(0, own, rows))  # an empty one stays where it is
    own = torch.cat([(part @ centres.bfloat16().T).argmax(1) for part in torch.split(half, 8 * BLOCK)])
    sizes = torch.bincount(own, minlength=clusters)
    members = torch.split(own.argsort(stable=True), sizes.tolist())
    order = (centres @ centres.T).argsort(1, descending=True)
    several = (sizes[order].cumsum(1) < count // 16).sum(1) + 1
    found = torch.empty(count, k, dtype=torch.long, device=rows.device)
    for cluster, near in enumerate(order):
        items = torch.cat([members[other] for other in near[: several[cluster]].tolist()])
        pool = half[items]
        for asked in torch.split(members[cluster], BLOCK):
            similarity = (half[asked] @ pool.T).masked_fill_(items == asked[:, None], -torch.inf)
            found[asked] = items[_best_of_groups(similarity, k)]
    return found


def _best_of_groups(similarity: Float[Tensor, "q G"], k: int) -> Int[Tensor, "q k"]:
    """Columns of the k largest of each row: they stand in the k groups with the largest maxima."""
    size, width = similarity.shape
    groups = width // (2 * FINE)
    if groups < 2 * k:
        return similarity.topk(k, dim=1).indices
    whole = similarity[:, : groups * 2 * FINE].view(size, 2 * FINE, groups)
    best = whole.amax(1).topk(k, dim=1, sorted=False).indices
    columns = (best[:, None] + torch.arange(0, groups * 2 * FINE, groups, device=best.device)[:, None]).flatten(1)
    rest = torch.arange(groups * 2 * FINE, width, device=best.device).expand(size, -1)
    columns = torch.cat([columns, rest], 1)
    return columns.gather(1, similarity.gather(1, columns).topk(k, dim=1).indices)


# ---- exact neighbours


def _neighbours(
    queries: Float[Tensor, "Q D"],
    gallery: Float[Tensor, "G D"],
    rows: Int[Tensor, "n"],
    depth: Int[Tensor, "n"],
    exclude: Int[Tensor, "Q"] | None,
    *,
    block: int | None = None,
) -> Iterator[tuple[Int[Tensor, "q"], Float[Tensor, "q K"], Int[Tensor, "q K"]]]:
    """Blocks of (query rows, scores, gallery rows), at least `depth` of each query in `rows` and at most all."""
    queries, gallery = queries.detach().float(), gallery.detach().float()
    for vectors in (queries, gallery):
        if not torch.isfinite(vectors.sum()) and not torch.isfinite(vectors).all():
            raise ValueError("an embedding is not finite (NaN or infinity), so it has no nearest neighbours")
    if len(gallery) == 0 or len(rows) == 0:
        return
    on_cpu = queries.device.type == "cpu"
    if bool((depth[1:] < depth[:-1]).any()):  # like depths together, so that no block is deeper than it need be
        order = depth.argsort(stable=True)
        rows, depth = rows[order], depth[order]
    most = BLOCK if on_cpu else 8 * BLOCK
    fits = (BLOCK_BYTES if on_cpu else 8 * BLOCK_BYTES) // (4 * len(gallery))
    step = max(1, min(block or most, max(16, fits)))
    index: _Pruned | None = None
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        k = min(int(depth[start : start + step].max()), len(gallery))
        own = exclude[part] if exclude is not None else None
        with torch.autocast(queries.device.type, enabled=False):
            if on_cpu and len(gallery) >= max(PRUNE_FROM, (k + 1) * SPREAD * FINE):
                index = index or _Pruned.build(gallery, step)
                scores, found = index.search(queries[part], k, own)
            else:
                scores, found = _plain(queries[part], gallery, k, own)
        yield part, scores, found


def _plain(
    queries: Float[Tensor, "q D"], gallery: Float[Tensor, "G D"], k: int, exclude: Int[Tensor, "q"] | None
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """Every similarity in float32, then the k best; equal ones in the order of the gallery."""
    similarity = queries @ gallery.T
    if exclude is not None:
        own = (exclude >= 0).nonzero().flatten()
        similarity[own, exclude[own]] = -torch.inf
    wider = min(k + 4, len(gallery))  # the order at the k-th place, too, is settled below
    best, found = similarity.topk(wider, dim=1)
    tied = ((similarity >= best[:, -1:]).sum(1) > wider).nonzero().flatten()  # more than k: topk took any of them
    if len(tied):
        found[tied] = similarity[tied].argsort(dim=1, descending=True, stable=True)[:, :wider]
    found = found.sort(dim=1).values
    return _ordered(queries, gallery, similarity.gather(1, found), found, k, float(gallery.norm(dim=1).max()))


@dataclass(frozen=True, slots=True)
class _Pruned:
    """A gallery on a CPU, rounded for cheap products, and how far those can be from the float32 ones.

    Args:
        gallery: as given, "G D".
        rounded: "G D": less its mean, in bfloat16; or, where that is not fast, the gallery itself.
        length: max |y_g| of the gallery as given.
        rounded_length: max |y_g| of what was rounded.
        error: max |y_g - y'_g|.
        scores: where a block's approximate similarities go, tile after tile.
    """

    gallery: Float[Tensor, "G D"]
    rounded: Tensor
    length: float
    rounded_length: float
    error: float
    scores: Tensor

    @classmethod
    def build(cls, gallery: Float[Tensor, "G D"], block: int) -> _Pruned:
        if not _multiplies_bf16():
            length = float(gallery.norm(dim=1).max())
            return cls(gallery, gallery, length, length, 0.0, _scores(block, len(gallery), torch.float32))
        mean = gallery.mean(0)
        rounded = torch.empty_like(gallery, dtype=torch.bfloat16)
        length = rounded_length = error = 0.0
        for start in range(0, len(gallery), TILE):
            part = gallery[start : start + TILE]
            centred = part - mean
            rounded[start : start + TILE] = centred
            length = max(length, float(part.norm(dim=1).max()))
            rounded_length = max(rounded_length, float(centred.norm(dim=1).max()))
            error = max(error, float((centred - rounded[start : start + TILE]).norm(dim=1).max()))
        return cls(gallery, rounded, length, rounded_length, error, _scores(block, len(gallery), torch.bfloat16))

    def search(
        self, queries: Float[Tensor, "q D"], k: int, exclude: Int[Tensor, "q"] | None
    ) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
        wanted = k if exclude is None else k + 1  # the query itself may be among the best, and is then left out
        row, column, heavy = self._candidates(queries, wanted)
        if exclude is not None:
            kept = column != exclude[row]
            row, column = row[kept], column[kept]
        score = _inner_products(queries, self.gallery, row, column)
        scores, found = _ordered(queries, self.gallery, *_rows(row, column, score, len(queries), k), k, self.length)
        if len(heavy):  # so many items within the rounding error that scoring all is cheaper
            own = exclude[heavy] if exclude is not None else None
            scores[heavy], found[heavy] = _plain(queries[heavy], self.gallery, k, own)
        return scores, found

    def _candidates(
        self, queries: Float[Tensor, "q D"], k: int
    ) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"], Int[Tensor, "h"]]:
        """Pairs that may be among a query's k best, by query, then gallery row; and the queries with too many."""
        dtype = self.rounded.dtype
        size, tiles = len(queries), self.scores.shape[0]
        width = self.scores.shape[2]
        rounded = queries.to(dtype)
        # Groups of `fan` times FINE items: as coarse as leaves SPREAD groups for each neighbour.
        fan = next(n for n in (8, 4, 2, 1) if n == 1 or n * FINE * SPREAD * k <= len(self.gallery))
        groups = width // FINE
        # Positive floats are ordered as their bits are, and integers are compared four times as fast. Of a group of
        # negative numbers this takes the wrong one, which is why a cut that is not positive makes a query heavy.
        bits = torch.int16 if dtype == torch.bfloat16 else torch.int32
        best_fine = torch.empty(size, tiles, groups, dtype=bits)
        for t in range(tiles):
            tile = self.rounded[t * width : (t + 1) * width]
            out = self.scores[t, :size]
            if len(tile) == width:
                torch.mm(rounded, tile.T, out=out)
            else:
                out[:, : len(tile)] = rounded @ tile.T
                out[:, len(tile) :] = -torch.inf
            torch.amax(out.view(bits).view(size, FINE, groups), 1, out=best_fine[:, t])
        maxima = best_fine.view(dtype).view(size, tiles * groups)
        best_coarse = best_fine.view(size, fan, -1).amax(1).view(dtype)
        cut = self._cut(queries, rounded, best_coarse.float().topk(k, dim=1, sorted=False).values.amin(1))

        row, group = (best_coarse >= cut[:, None]).nonzero(as_tuple=True)
        count = torch.bincount(row, minlength=size)
        heavy = (count > 4 * k + 64) | (cut <= 0)
        if heavy.any():
            light = ~heavy[row]
            row, group = row[light], group[light]
        if fan > 1:
            group = group[:, None] + torch.arange(0, fan * best_coarse.shape[1], best_coarse.shape[1])
            pair, member = (maxima[row[:, None], group] >= cut[row, None]).nonzero(as_tuple=True)
            row, group = row[pair], group[pair, member]
        tile_of, within = group // groups, group % groups
        place = (tile_of * self.scores.shape[1] + row) * width + within
        items = self.scores.view(-1)[place[:, None] + torch.arange(0, width, groups)]
        pair, member = (items >= cut[row, None]).nonzero(as_tuple=True)
        row, column = row[pair], (tile_of * width + within)[pair] + member * groups
        order = (row * len(self.gallery) + column).argsort()
        return row[order], column[order], heavy.nonzero().flatten()

    def _cut(self, queries: Float[Tensor, "q D"], rounded: Tensor, reached: Float[Tensor, "q"]) -> Tensor:
        """What an approximate similarity must reach: see the head of this module."""
        length = queries.norm(dim=1)
        longest = max(self.length, self.rounded_length)
        sums = 2 * (queries.shape[1] + 4) * UNIT_FP32 * length * longest  # of both products, in any order
        error = (queries - rounded.float()).norm(dim=1) * self.rounded_length + 1.01 * length * self.error + sums
        unit = UNIT_BF16 / (1 - UNIT_BF16) if rounded.dtype == torch.bfloat16 else 0.0
        cut: Tensor = reached - 2 * error - unit * reached.abs()
        return cut.to(rounded.dtype)  # what it is compared with was rounded too, and rounding is monotone


def _scores(block: int, items: int, dtype: torch.dtype) -> Tensor:
    width = min(TILE, -(-items // 64) * 64)
    return torch.empty(-(-items // width), block, width, dtype=dtype)


def _inner_products(
    queries: Float[Tensor, "q D"], gallery: Float[Tensor, "G D"], row: Int[Tensor, "P"], column: Int[Tensor, "P"]
) -> Float[Tensor, "P"]:
    """x_row . y_column of each pair, in float32; pairs in the order of rows. Equal vectors give equal products."""
    ends = torch.bincount(row, minlength=len(queries)).cumsum(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse")  # torch calls its sparse layouts a beta
        pairs = torch.sparse_csr_tensor(
            functional.pad(ends, (1, 0)),
            column,
            queries.new_zeros(len(column)),
            (len(queries), len(gallery)),
            check_invariants=False,
        )
        products: Tensor = torch.sparse.sampled_addmm(pairs, queries, gallery.T, beta=0.0)
        return products.values()


def _rows(
    row: Int[Tensor, "P"], column: Int[Tensor, "P"], score: Float[Tensor, "P"], size: int, k: int
) -> tuple[Float[Tensor, "q w"], Int[Tensor, "q w"]]:
    """Pairs in the order of rows, then columns, as one row a query, of at least k places; -inf where there is none."""
    count = torch.bincount(row, minlength=size)
    place = torch.arange(len(row)) - (count.cumsum(0) - count)[row]
    width = max(k, int(count.max()))
    scores = score.new_full((size, width), -torch.inf)
    columns = torch.zeros(size, width, dtype=torch.long)
    scores[row, place], columns[row, place] = score, column
    return scores, columns


def _ordered(
    queries: Float[Tensor, "q D"],
    gallery: Float[Tensor, "G D"],
    scores: Float[Tensor, "q w"],
    columns: Int[Tensor, "q w"],
    k: int,
    length: float,
) -> tuple[Float[Tensor, "q k"], Int[Tensor, "q k"]]:
    """The k best of each row, whose columns ascend; what float32 cannot tell apart is settled in float64.

    `length` is the largest |y_g|.
    """
    best, order = scores.sort(dim=1, descending=True, stable=True)
    close = best[:, :-1] - best[:, 1:] <= CLOSE * UNIT_FP32 * length * queries.norm(dim=1, keepdim=True)
    if close.any():
        unclear = functional.pad(close, (0, 1)) | functional.pad(close, (1, 0))
        row, place = unclear.nonzero(as_tuple=True)
        place = order[row, place]
        settled = scores.double()
        for start in range(0, len(row), 4096):
            q, w = row[start : start + 4096], place[start : start + 4096]
            settled[q, w] = (queries[q].double() * gallery[columns[q, w]].double()).sum(1)
        again = unclear.any(1).nonzero().flatten()
        order[again] = settled[again].argsort(dim=1, descending=True, stable=True)
        best[again] = settled[again].gather(1, order[again]).float()
    return best[:, :k], columns.gather(1, order[:, :k])


@lru_cache(maxsize=1)
def _multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 products of its own; emulated ones are slower than float32."""
    # Only newer versions of torch can tell; older ones then take the float32 products, which are as exact.
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16"))
