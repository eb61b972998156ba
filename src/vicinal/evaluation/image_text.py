"""Protocols of images and texts: retrieval both ways, and classification by names. One value a query.

    rank(q)    = 1 + #{g not relevant: s_qg > s*},   s* = max over relevant g of s_qg
    recall@k   = P(rank <= k),   mrr = E(1 / rank),   ties in random order

An image and a text are relevant to one another if the text is a caption of the image's *item*: an item may have several
images and several captions, and a caption several items. Texts are searched, and asked with, once each, however often
they occur. Where u items that are not relevant and r that are have the similarity s*, they stand in random order and
the values are expectations: constant embeddings score as chance does, and no order of rows makes a difference.

Three protocols, named in every metric, for their numbers cannot be compared:

    full        an image asks all texts, a text asks all images
    sampled100  of each query's candidates one is relevant and 100 are not (FashionGen's; they are drawn, several times)
    index       the i-th image and the i-th text belong together and nothing else does, though captions repeat: for
                comparison with numbers made so. `recall_ceiling@1` says what a model that knows all captions gets

A query without a relevant candidate (an item without captions or without images) has no value: NaN.

Letters: I images, T rows of texts, C distinct texts (or classes), G candidates, Q queries, q those of one block, R
draws, D numbers an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vicinal.evaluation.intervals import LEVELS, _weights, mean
from vicinal.types import Embeddings, Estimate, InputError, Metrics, PerQuery

__all__ = ["PROTOCOLS", "Protocol", "averaged", "image_text", "image_text_scores", "zero_shot", "zero_shot_scores"]

Protocol = Literal["full", "sampled100", "index"]

BLOCK_BYTES = 64 * 2**20  # of similarities at once
NEGATIVES = 100
PROTOCOLS = ("full", "sampled100", "index")


def image_text_scores(
    images: Embeddings,
    texts: Embeddings,
    *,
    captions: Sequence[str] | None = None,
    protocol: Protocol = "full",
    ks: Sequence[int] = (1, 5, 10),
    kinds: Sequence[object] | None = None,
    most: int = 1000,
    draws: int = 5,
    seed: int = 0,
) -> PerQuery:
    """Recall at k, reciprocal rank and rank of every image among the texts, and of every text among the images.

    Args:
        images: their labels are the items.
        texts: one row for each caption of an item; their labels are the items, from the same list of classes.
        captions: the texts themselves, by which equal ones are known, T of them; None: all are distinct.
        protocol: "full", "sampled100" or "index", see the head of this module.
        ks: the k of recall@k.
        kinds: sampled100 alone: of each class, what the negatives should have in common with it (FashionGen: the
            subcategory). Where there are fewer than 100 of a kind, the rest is drawn from all.
        most: sampled100 alone: how many queries each way a draw takes.
        draws: R, sampled100 alone.
        seed: of the draws; with the ids and texts it settles them.

    Returns:
        `{protocol}/image_to_text_recall@{k}`, `…_mrr` and `…_rank`, the same of `text_to_image_…`, and for "index"
        `…_recall_ceiling@1`: values "R Q". The queries are the I images, then the distinct texts in the order in which
        they come (for "index" all rows of texts); a value of one way is NaN at the queries of the other. Units are the
        items; a text of several items counts to the first.

    Raises:
        InputError: there is nothing to ask or to find; not the same classes on both sides; an embedding is not finite;
            the number of captions or kinds is wrong; for "index", not as many texts as images.

    >>> seen = Embeddings(torch.eye(2), torch.tensor([0, 1]), ("a.jpg", "b.jpg"), ("cat", "dog"))
    >>> read = Embeddings(torch.eye(2), torch.tensor([0, 1]), ("a", "b"), ("cat", "dog"))
    >>> image_text_scores(seen, read, ks=(1,)).values["full/text_to_image_recall@1"]
    tensor([[nan, nan, 1., 1.]])
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"protocol must be one of {', '.join(PROTOCOLS)}, not {protocol!r}")
    if min(ks, default=1) < 1 or draws < 1 or most < 1:
        raise InputError(f"ks, draws and most must be at least 1; here ks={list(ks)}, draws={draws}, most={most}")
    images, texts = _here(images), _here(texts)
    known = _check_pair(images, texts, captions)
    if protocol == "index":
        return _by_index(images, texts, known, ks)
    pool = _Pool.of(images, texts, known)
    if protocol == "full":
        ranks = [_full(pool.image_vectors, pool.text_vectors, pool.texts_of_images)]
        ranks.append(_full(pool.text_vectors, pool.image_vectors, pool.images_of_texts))
    else:
        kind = _kinds_of_classes(kinds, images.classes)
        ranks = _sampled(pool, kind, most, draws, seed)
    return _per_query(protocol, ranks, [images.labels, pool.first_item], ks)


def image_text(
    images: Embeddings,
    texts: Embeddings,
    *,
    captions: Sequence[str] | None = None,
    protocol: Protocol = "full",
    ks: Sequence[int] = (1, 5, 10),
    kinds: Sequence[object] | None = None,
    most: int = 1000,
    draws: int = 5,
    seed: int = 0,
) -> Metrics:
    """`image_text_scores`, averaged over queries, with intervals over items; the median of ranks in place of ranks.

    Args:
        images: as in `image_text_scores`.
        texts: as in `image_text_scores`.
        captions: as in `image_text_scores`.
        protocol: as in `image_text_scores`.
        ks: as in `image_text_scores`.
        kinds: as in `image_text_scores`.
        most: as in `image_text_scores`.
        draws: as in `image_text_scores`.
        seed: as in `image_text_scores`.

    Raises:
        InputError: as in `image_text_scores`.

    >>> seen = Embeddings(torch.eye(2), torch.tensor([0, 1]), ("a.jpg", "b.jpg"), ("cat", "dog"))
    >>> read = Embeddings(torch.eye(2), torch.tensor([0, 1]), ("a", "b"), ("cat", "dog"))
    >>> metrics = image_text(seen, read)
    >>> metrics["full/image_to_text_mrr"].value, metrics["full/image_to_text_median_rank"].value
    (1.0, 1.0)
    """
    scores = image_text_scores(
        images,
        texts,
        captions=captions,
        protocol=protocol,
        ks=ks,
        kinds=kinds,
        most=most,
        draws=draws,
        seed=seed,
    )
    return averaged(scores)


def averaged(scores: PerQuery) -> Metrics:
    """The means of scores, and in place of a mean of ranks (`…_rank`) their median, `…_median_rank`.

    Args:
        scores: of `image_text_scores`, or any others.

    >>> averaged(PerQuery({"full/image_to_text_rank": torch.tensor([[1.0, 1.0, 70.0]])}, torch.arange(3)))[
    ...     "full/image_to_text_median_rank"].value
    1.0
    """
    metrics: dict[str, Estimate] = {}
    for name, estimate in mean(scores).items():
        if name.endswith("_rank"):
            low, middle, high = _median(scores.values[name], scores.units)
            name = f"{name.removesuffix('_rank')}_median_rank"
            estimate = Estimate(middle, low, high, n=estimate.n, queries=estimate.queries)
        metrics[name] = estimate
    return metrics


def zero_shot_scores(images: Embeddings, class_vectors: Float[Tensor, "C D"]) -> PerQuery:
    """Whether an image is nearest to the text vector of its own class, with no example of it: 1 or 0.

    Args:
        images: what is asked about.
        class_vectors: of each of `images.classes`, made of its name and templates (`embed_classes`); of equal ones,
            each is the nearest as often as another.

    Returns:
        `accuracy@0shot`: values "1 Q". Units are the classes, and `macro` is set: the mean is one over classes.

    Raises:
        InputError: there is no image, not one vector for each class, an image without a label, or an embedding is not
            finite.

    >>> found = Embeddings(torch.eye(2), torch.tensor([0, 0]), ("a", "b"), ("cat", "dog"))
    >>> zero_shot_scores(found, torch.eye(2)).values["accuracy@0shot"]
    tensor([[1., 0.]])
    """
    images = _here(images)
    _check_side(images, "images")
    C = len(images.classes)
    if class_vectors.shape != (C, images.vectors.shape[1]):
        raise InputError(
            f"there must be a vector of {images.vectors.shape[1]} numbers for each of the {C} classes, but their shape "
            f"is {tuple(class_vectors.shape)}: embed the names of these classes with the model of the images"
        )
    if not bool(torch.isfinite(class_vectors).all()):
        raise InputError("a class's text vector is not finite; the training diverged (lower lr)")
    own = images.labels

    def relevant(rows: Int[Tensor, "q"]) -> Bool[Tensor, "q C"]:
        return own[rows, None] == torch.arange(C)

    ranks = _full(images.vectors, class_vectors.cpu(), relevant)
    return PerQuery({"accuracy@0shot": ranks.recall(1).float()}, own, macro=True)


def zero_shot(images: Embeddings, class_vectors: Float[Tensor, "C D"]) -> Metrics:
    """`zero_shot_scores`, averaged over classes (macro top-1), with intervals over them.

    Args:
        images: as in `zero_shot_scores`.
        class_vectors: as in `zero_shot_scores`.

    Raises:
        InputError: as in `zero_shot_scores`.

    >>> found = Embeddings(torch.eye(2), torch.tensor([0, 0]), ("a", "b"), ("cat", "dog"))
    >>> zero_shot(found, torch.eye(2))["accuracy@0shot"].value
    0.5
    """
    return mean(zero_shot_scores(images, class_vectors))


# ---- ranks


@dataclass(frozen=True, slots=True)
class _Ranks:
    """Where the best relevant candidate of each query stands.

    Args:
        above: how many candidates are more similar; NaN where the query has none that is relevant, or was not drawn.
        wrong: u, how many are as similar and not relevant.
        right: r, how many are as similar and relevant, itself included.
    """

    above: Float[Tensor, "R Q"]
    wrong: Float[Tensor, "R Q"]
    right: Float[Tensor, "R Q"]

    def recall(self, k: int) -> Float[Tensor, "R Q"]:
        """P(rank <= k) = 1 - product over l < k - above of (u - l) / (u + r - l)."""
        missed = torch.ones_like(self.above)
        for place in range(k):
            before = place - self.above  # how many of the tied stand before this place
            still = (self.wrong - before).clamp(min=0) / (self.wrong + self.right - before).clamp(min=1)
            missed = torch.where(before >= 0, missed * still, missed)
        return torch.where(self.above.isnan(), torch.nan, 1 - missed)

    def rank(self) -> Float[Tensor, "R Q"]:
        """E(rank) = above + (u + r + 1) / (r + 1)."""
        return self.above + (self.wrong + self.right + 1) / (self.right + 1)

    def reciprocal(self) -> Float[Tensor, "R Q"]:
        """E(1 / rank): if all before it were wrong, the l-th of the tied is right with probability r / (u + r - l)."""
        values = 1 / (self.above + 1)
        tied = (self.wrong > 0) & ~self.above.isnan()
        cases = torch.stack([self.above[tied], self.wrong[tied], self.right[tied]], 1)
        if len(cases) == 0:
            return values
        # Constant embeddings tie everything, but then alike for all queries.
        alike, which = np.unique(cases.numpy(), axis=0, return_inverse=True)
        expected = []
        for above, u, r in alike:
            place = np.arange(u + 1)
            missed = np.cumprod(np.concatenate([[1.0], (u - place[:-1]) / (u + r - place[:-1])]))
            expected.append((missed * r / (u + r - place) / (above + place + 1)).sum())
        values[tied] = torch.tensor(expected, dtype=values.dtype)[torch.from_numpy(which.reshape(-1))]
        return values


Relevant = Callable[[Int[Tensor, "q"]], Bool[Tensor, "q G"]]


def _full(queries: Float[Tensor, "Q D"], gallery: Float[Tensor, "G D"], relevant: Relevant) -> _Ranks:
    """The rank of each query's best relevant candidate among all of them, in float64, and ties by float32."""
    counts = torch.full((3, len(queries)), torch.nan, dtype=torch.float64)
    wide = gallery.double()
    step = max(1, BLOCK_BYTES // (8 * max(1, len(gallery))))
    for start in range(0, len(queries), step):
        rows = torch.arange(start, min(start + step, len(queries)))
        # Equal vectors have equal products whatever the order of the sums: float64 has digits to spare for that.
        similarity = (queries[rows].double() @ wide.T).float()
        wanted = relevant(rows)
        best = similarity.masked_fill(~wanted, -torch.inf).amax(1, keepdim=True)
        level = similarity == best
        right = (level & wanted).sum(1)
        found = torch.stack([(similarity > best).sum(1), level.sum(1) - right, right]).double()
        counts[:, rows] = found.masked_fill(~wanted.any(1), torch.nan)
    return _Ranks(*counts[:, None])


def _per_query(protocol: str, ranks: Sequence[_Ranks], units: Sequence[Tensor], ks: Sequence[int]) -> PerQuery:
    """Both ways in one: the queries of the first, then those of the second."""
    values = {}
    for way, found in zip(("image_to_text", "text_to_image"), ranks, strict=True):
        columns = {f"recall@{k}": found.recall(k) for k in ks} | {"mrr": found.reciprocal(), "rank": found.rank()}
        for name, column in columns.items():
            parts = [column if other is found else torch.full_like(other.above, torch.nan) for other in ranks]
            values[f"{protocol}/{way}_{name}"] = torch.cat(parts, 1).float()
    return PerQuery(values, torch.cat(list(units)))


def _median(values: Float[Tensor, "R Q"], units: Int[Tensor, "Q"]) -> tuple[float, float, float]:
    """The median of what is not NaN between the ends of its interval, units and replicates resampled as for means."""
    table = values.double().numpy()
    replicate, query = np.nonzero(~np.isnan(table))
    if len(query) == 0:
        return (float("nan"),) * 3
    unit = np.unique(units.numpy()[query], return_inverse=True)[1]
    order = table[replicate, query].argsort(kind="stable")
    ranked, replicate, unit = table[replicate, query][order], replicate[order], unit[order]
    middle = float(np.median(ranked))
    if unit.max() == 0:
        return float("nan"), middle, float("nan")
    over_units, over_replicates = (np.random.default_rng(s) for s in np.random.SeedSequence(0).spawn(2))
    drawn: list[float] = []
    of_replicates = np.concatenate(list(_weights(len(table), 2000, over_replicates)))
    for of_units in _weights(int(unit.max()) + 1, 2000, over_units):
        for w, a in zip(of_units, of_replicates[len(drawn) :], strict=False):
            total = (w[unit] * (a[replicate] if len(table) > 1 else 1.0)).cumsum()
            places = np.searchsorted(total, [total[-1] / 2, total[-1] / 2 + 1e-9])
            drawn.append(float(ranked[places.clip(max=len(ranked) - 1)].mean()))
    low, high = np.percentile(drawn, LEVELS)
    return float(low), middle, float(high)


# ---- who belongs to whom


@dataclass(frozen=True, slots=True)
class _Pool:
    """Images and distinct texts, and which item each belongs to.

    Args:
        image_vectors: "I D".
        text_vectors: "C D", of each distinct text its first row's.
        image_items: "I".
        item_of_pair: "P", of each pair of an item and one of its texts, ascending.
        text_of_pair: "P".
        first_item: "C", of each text.
        items: how many there can be.
        names: ids of the images and of the texts: what draws go by, so that the order of rows does not matter.
    """

    image_vectors: Float[Tensor, "I D"]
    text_vectors: Float[Tensor, "C D"]
    image_items: Int[Tensor, "I"]
    item_of_pair: Int[Tensor, "P"]
    text_of_pair: Int[Tensor, "P"]
    first_item: Int[Tensor, "C"]
    items: int
    names: tuple[Sequence[str], Sequence[str]]

    @classmethod
    def of(cls, images: Embeddings, texts: Embeddings, captions: Sequence[str]) -> _Pool:
        number: dict[str, int] = {}
        text = torch.tensor([number.setdefault(caption, len(number)) for caption in captions])
        first = torch.from_numpy(np.unique(text.numpy(), return_index=True)[1])
        pairs = np.unique(torch.stack([texts.labels, text], 1).numpy(), axis=0)
        item_of_pair, text_of_pair = torch.from_numpy(pairs).T.contiguous()
        return cls(
            images.vectors,
            texts.vectors[first],
            images.labels,
            item_of_pair,
            text_of_pair,
            texts.labels[first],
            len(images.classes),
            (images.ids, list(number)),
        )

    def texts_of_images(self, rows: Int[Tensor, "q"]) -> Bool[Tensor, "q C"]:
        """Whether a text is one of the image's item."""
        item = self.image_items[rows]
        found = torch.zeros(len(rows), len(self.text_vectors), dtype=torch.bool)
        start = torch.searchsorted(self.item_of_pair, item)
        count = torch.searchsorted(self.item_of_pair, item, right=True) - start
        row = torch.arange(len(rows)).repeat_interleave(count)
        place = torch.arange(len(row)) - (count.cumsum(0) - count)[row] + start[row]
        found[row, self.text_of_pair[place]] = True
        return found

    def images_of_texts(self, rows: Int[Tensor, "q"]) -> Bool[Tensor, "q I"]:
        """Whether an image is of one of the text's items."""
        place = torch.full((len(self.text_vectors),), -1)
        place[rows] = torch.arange(len(rows))
        row = place[self.text_of_pair]
        has = torch.zeros(len(rows), self.items, dtype=torch.bool)
        has[row[row >= 0], self.item_of_pair[row >= 0]] = True
        return has[:, self.image_items]


def _by_index(images: Embeddings, texts: Embeddings, captions: Sequence[str], ks: Sequence[int]) -> PerQuery:
    if len(images) != len(texts):
        raise InputError(
            f"protocol=index pairs the i-th image with the i-th text, but there are {len(images)} and {len(texts)}; "
            "take protocol=full, or one text for each image"
        )

    def itself(rows: Int[Tensor, "q"]) -> Bool[Tensor, "q G"]:
        return rows[:, None] == torch.arange(len(images))

    ways = [_full(images.vectors, texts.vectors, itself), _full(texts.vectors, images.vectors, itself)]
    found = _per_query("index", ways, [images.labels, texts.labels], ks)
    copies = dict.fromkeys(captions, 0)
    for caption in captions:
        copies[caption] += 1
    ceiling, none = torch.tensor([[1 / copies[c] for c in captions]]), torch.full((1, len(captions)), torch.nan)
    ceilings = {
        "index/image_to_text_recall_ceiling@1": torch.cat([ceiling, none], 1),
        "index/text_to_image_recall_ceiling@1": torch.cat([none, ceiling], 1),
    }
    return PerQuery({**found.values, **ceilings}, found.units)


# ---- a hundred others


def _sampled(pool: _Pool, kind_of_item: Int[Tensor, "items"], most: int, draws: int, seed: int) -> list[_Ranks]:
    kinds = kind_of_item[pool.image_items], kind_of_item[pool.first_item]
    vectors = pool.image_vectors, pool.text_vectors
    relevant = pool.texts_of_images, pool.images_of_texts
    ways = []
    for way in (0, 1):
        generator = np.random.default_rng([seed, way])
        asked, others = (np.argsort(np.array(pool.names[side]), kind="stable") for side in (way, 1 - way))
        gallery = torch.from_numpy(others)
        counts = torch.full((3, draws, len(asked)), torch.nan, dtype=torch.float64)
        step = max(1, BLOCK_BYTES // (8 * max(len(gallery), (NEGATIVES + 1) * vectors[0].shape[1])))
        for draw in range(draws):
            queries = torch.from_numpy(asked[generator.permutation(len(asked))[:most]])
            for start in range(0, len(queries), step):
                rows = queries[start : start + step]
                wanted = relevant[way](rows)[:, gallery]
                alike = kinds[1 - way][gallery] == kinds[way][rows, None]
                good, bad, there = _candidates(wanted, alike, generator)
                found = vectors[1 - way][gallery[torch.cat([good[:, None], bad], 1)]].double()
                similarity = torch.einsum("qd,qnd->qn", vectors[way][rows].double(), found).float()
                best, rest = similarity[:, :1], similarity[:, 1:]
                above, level = ((rest > best) & there).sum(1), ((rest == best) & there).sum(1)
                ranks = torch.stack([above, level, torch.ones_like(level)]).double()
                counts[:, draw, rows] = ranks.masked_fill(~wanted.any(1), torch.nan)
        ways.append(_Ranks(*counts))
    return ways


def _candidates(
    wanted: Bool[Tensor, "q G"], alike: Bool[Tensor, "q G"], generator: np.random.Generator
) -> tuple[Int[Tensor, "q"], Int[Tensor, "q N"], Bool[Tensor, "q N"]]:
    """Of each query one relevant candidate, up to a hundred that are not (those alike first), and which there are.

    Every candidate gets a random number, and the least are taken: all queries of a block at once.
    """
    key = torch.from_numpy(generator.random(tuple(wanted.shape)))
    good = key.masked_fill(~wanted, torch.inf).argmin(1)
    least = (key + (~alike).double()).masked_fill(wanted, torch.inf)
    values, bad = least.topk(min(NEGATIVES, wanted.shape[1]), largest=False)
    return good, bad, values.isfinite()


def _kinds_of_classes(kinds: Sequence[object] | None, classes: Sequence[str]) -> Int[Tensor, "items"]:
    if kinds is None:
        return torch.zeros(len(classes), dtype=torch.long)
    if len(kinds) != len(classes):
        raise InputError(f"kinds must be one for each of the {len(classes)} classes, not {len(kinds)}")
    number: dict[object, int] = {}
    return torch.tensor([number.setdefault(kind, len(number)) for kind in kinds])


# ---- what cannot be used


def _here(side: Embeddings) -> Embeddings:
    """On the CPU, where float64 and numpy are."""
    return Embeddings(side.vectors.detach().cpu(), side.labels.cpu(), side.ids, side.classes)


def _check_pair(images: Embeddings, texts: Embeddings, captions: Sequence[str] | None) -> list[str]:
    """The texts themselves; numbers, where they are not given."""
    _check_side(images, "images")
    _check_side(texts, "texts")
    if images.classes != texts.classes:
        raise InputError(
            f"images have {len(images.classes)} items, texts {len(texts.classes)}, and the two lists are not equal, so "
            "their labels cannot be compared: label both by one list of items"
        )
    if images.vectors.shape[1] != texts.vectors.shape[1]:
        raise InputError(
            f"images have {images.vectors.shape[1]} numbers each and texts {texts.vectors.shape[1]}: embed both with "
            "one model"
        )
    if captions is None:
        return [str(row) for row in range(len(texts))]
    if len(captions) != len(texts):
        raise InputError(f"captions must be one for each of the {len(texts)} texts, not {len(captions)}")
    return list(captions)


def _check_side(side: Embeddings, name: str) -> None:
    if len(side) == 0:
        raise InputError(f"{name}: there is not one to measure; name a split or folder that has some")
    outside = (side.labels < 0) | (side.labels >= len(side.classes))
    if outside.any():
        first = side.ids[int(outside.nonzero()[0])]
        raise InputError(f"{name}: {first} has no label among the {len(side.classes)} classes; give it one")
    bad = ~torch.isfinite(side.vectors).all(1)
    if bad.any():
        raise InputError(
            f"{name}: {int(bad.sum())} embeddings are not finite, the first that of {side.ids[int(bad.nonzero()[0])]}; "
            "the training diverged (lower lr), or its image is broken"
        )
