"""Pair losses: the items of a batch are compared with one another, and with those of a memory, by their labels.

    s_ij = x_i . x_j / (|x_i| |x_j|),   d_ij = 1 - s_ij
    P(i) = {p != i: y_p = y_i}          the positives of an anchor i
    N(i) = {n: y_n != y_i}              its negatives; with groups g, those of another group: and g_n != g_i

    NTXent   mean over all (i, p) of  -log( e^(s_ip/tau) / (e^(s_ip/tau) + sum_N(i) e^(s_in/tau)) )
    SupCon   mean_i  -1/|P(i)| sum_P(i) log( e^(s_ip/tau) / sum_(P(i) and N(i)) e^(s_ia/tau) )
    Triplet  mean of max(0, d_ip - d_in + m) over the triplets that `mining` picks
    MultiSimilarity  mean_i  1/alpha log(1 + sum_P(i) e^(-alpha (s_ip - lambda)))
                              + 1/beta log(1 + sum_N(i) e^(beta (s_in - lambda)))   over the pairs that mining leaves

Letters: B batch, M items of a memory, R = B + M items that are compared with, D numbers an embedding, x embeddings, y
labels, i anchor, p positive, n negative, tau temperature, m margin, alpha and beta scales, lambda base.

An anchor without a positive does not count; a batch without any gives zero, with a graph. Groups: items of one group,
say two variants of one brand, are never each other's negatives. Memory grows with B R, never with B^3, and everything
is in float32 under autocast.

`WeightedSum` adds several of them up, w_1 L_1 + w_2 L_2 + ….

`CrossBatchMemory` around any of them keeps the items of the batches before. Those are compared with, as positives and
as negatives, but are no anchors and get no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad, relu, softplus

from vicinal.losses.cosine import cosines, unit

__all__ = [
    "CrossBatchMemory",
    "Memory",
    "MultiSimilarity",
    "NTXent",
    "SupCon",
    "Triplet",
    "WeightedSum",
    "mean_similarities",
]


class Memory(NamedTuple):
    """Items that a batch is compared with besides itself. `groups` must be there if the batch has groups."""

    embeddings: Float[Tensor, "M D"]
    labels: Int[Tensor, "M"]
    groups: Int[Tensor, "M"] | None = None


class NTXent(nn.Module):
    """InfoNCE over labelled pairs: each positive against the anchor's negatives. Sohn 2016; Chen et al. 2020.

    The reading of pytorch-metric-learning's `NTXentLoss`: one positive in each denominator, mean over all pairs. It is
    not SupCon, whose denominator holds the other positives too.

    Args:
        temperature: tau. SimCLR (arXiv:2002.05709): 0.05 to 0.5; CLIP starts from 0.07.

    Raises:
        ValueError: the temperature is not above 0.

    >>> loss = NTXent(temperature=1.0)
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> loss(x, torch.tensor([0, 0, 1])).item()    # two pairs: log(1 + e^-1)
    0.31326...
    """

    def __init__(self, *, temperature: float = 0.07) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.temperature = temperature

    def forward(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Int[Tensor, "B"],
        *,
        groups: Int[Tensor, "B"] | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, ""]:
        """The mean over all positive pairs of the batch."""
        positive_BR, negative_BR = _relations(labels, groups, memory)
        logits_BR = _cosines(embeddings, memory) / self.temperature
        # -log(e^p / (e^p + sum e^n)) = softplus(logsumexp(n) - p): one number an anchor, so nothing of B^3.
        all_negatives_B1 = _logsumexp(logits_BR, negative_BR)[:, None]
        return _mean(softplus(all_negatives_B1 - logits_BR), positive_BR)


class SupCon(nn.Module):
    """Supervised contrastive loss, the sum outside the logarithm. Khosla et al. 2020, arXiv:2004.11362, eq. 2.

    Args:
        temperature: tau. The paper: 0.1. Its factor tau / tau_base is left out, as in most implementations.

    Raises:
        ValueError: the temperature is not above 0.

    >>> loss = SupCon(temperature=1.0)
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> loss(x, torch.tensor([0, 0, 1])).item()    # two anchors: log(1 + e^-1)
    0.31326...
    """

    def __init__(self, *, temperature: float = 0.1) -> None:
        super().__init__()
        _check_temperature(temperature)
        self.temperature = temperature

    def forward(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Int[Tensor, "B"],
        *,
        groups: Int[Tensor, "B"] | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, ""]:
        """The mean over the anchors that have a positive."""
        positive_BR, negative_BR = _relations(labels, groups, memory)
        logits_BR = _cosines(embeddings, memory) / self.temperature
        others_B = _logsumexp(logits_BR, positive_BR | negative_BR)
        count_B = positive_BR.sum(1)
        positives_B = logits_BR.masked_fill(~positive_BR, 0).sum(1) / count_B.clamp_min(1)
        return _mean(others_B - positives_B, count_B > 0)


class Triplet(nn.Module):
    """Triplet margin loss on cosine distance, max(0, d_ip - d_in + m). Schroff et al. 2015, arXiv:1503.03832.

    Args:
        margin: m, on d = 1 - cosine, from 0 to 2. FaceNet: 0.2, on squared Euclidean distance, which is 2 d.
        mining: which triplets of the batch count.
            "batch_hard": for each anchor its farthest positive and nearest negative; the mean over anchors that have
            both. Hermans et al. 2017, arXiv:1703.07737.
            "semi_hard": for each anchor and positive the nearest negative that is farther than the positive; the mean
            over pairs that have one. Schroff et al. 2015.
            "all": every triplet; the mean over those above zero, which is pytorch-metric-learning's default.

    Raises:
        ValueError: the margin is out of its range, or the mining unknown.

    >>> loss = Triplet(margin=0.2)
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    >>> loss(x, torch.tensor([0, 0, 1])).item()    # all distances are 0: the margin is left
    0.2000...
    """

    def __init__(
        self, *, margin: float = 0.2, mining: Literal["batch_hard", "semi_hard", "all"] = "batch_hard"
    ) -> None:
        super().__init__()
        if not 0 < margin <= 2:
            raise ValueError(f"margin is on the cosine distance, from above 0 to 2, not {margin}")
        if mining not in ("batch_hard", "semi_hard", "all"):
            raise ValueError(f"mining must be batch_hard, semi_hard or all, not {mining!r}")
        self.margin = margin
        self.mining = mining

    def forward(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Int[Tensor, "B"],
        *,
        groups: Int[Tensor, "B"] | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, ""]:
        """The mean over the triplets that count."""
        positive_BR, negative_BR = _relations(labels, groups, memory)
        distance_BR = 1 - _cosines(embeddings, memory)
        if self.mining == "batch_hard":
            return self._batch_hard(distance_BR, positive_BR, negative_BR)
        # The negatives of each anchor in order of distance, so that a search takes the place of a third axis.
        sorted_BR = distance_BR.masked_fill(~negative_BR, torch.inf).sort(dim=1).values
        if self.mining == "semi_hard":
            return self._semi_hard(distance_BR, positive_BR, negative_BR, sorted_BR)
        return self._all(distance_BR, positive_BR, sorted_BR)

    def _batch_hard(self, distance_BR: Tensor, positive_BR: Tensor, negative_BR: Tensor) -> Float[Tensor, ""]:
        # Distances lie in [0, 2], so -1 and 3 never win against a real one.
        farthest_B = distance_BR.masked_fill(~positive_BR, -1).max(1).values
        nearest_B = distance_BR.masked_fill(~negative_BR, 3).min(1).values
        return _mean(relu(farthest_B - nearest_B + self.margin), positive_BR.any(1) & negative_BR.any(1))

    def _semi_hard(
        self, distance_BR: Tensor, positive_BR: Tensor, negative_BR: Tensor, sorted_BR: Tensor
    ) -> Float[Tensor, ""]:
        # right=True: the first negative that is strictly farther.
        next_BR = torch.searchsorted(sorted_BR.detach(), distance_BR.detach().contiguous(), right=True)
        found_BR = next_BR < negative_BR.sum(1, keepdim=True)
        chosen_BR = sorted_BR.gather(1, next_BR.where(found_BR, 0))
        hinge_BR = relu(distance_BR - chosen_BR.masked_fill(~found_BR, 3) + self.margin)
        return _mean(hinge_BR, positive_BR & found_BR)

    def _all(self, distance_BR: Tensor, positive_BR: Tensor, sorted_BR: Tensor) -> Float[Tensor, ""]:
        # A pair's active negatives are the first k in order, those nearer than d_ip + m; their hinges sum to
        # k (d_ip + m) less the sum of their distances.
        bound_BR = distance_BR + self.margin
        active_BR = torch.searchsorted(sorted_BR.detach(), bound_BR.detach().contiguous()) * positive_BR
        finite_BR = sorted_BR.masked_fill(sorted_BR.isinf(), 0)
        sums_BR = pad(finite_BR.cumsum(1), (1, 0)).gather(1, active_BR)
        count = active_BR.sum()
        return ((active_BR * bound_BR) - sums_BR).sum() / count.clamp_min(1)


class MultiSimilarity(nn.Module):
    """Multi-similarity: soft extremes of the positives and of the negatives, after mining. Wang et al. 2019.

    arXiv:1904.06627. A negative counts if it is more similar than the least similar positive less epsilon; a positive,
    if it is less similar than the most similar negative plus epsilon.

    Args:
        alpha: of the positives: the larger, the more the farthest of them weighs. pytorch-metric-learning: 2.
        beta: of the negatives, the nearest of them. pytorch-metric-learning: 50.
        base: lambda, the cosine about which similarities are weighed. The authors' code: 0.5.
        epsilon: of mining, a difference of cosines. The authors' code: 0.1. None: all pairs count, as they do in
            pytorch-metric-learning unless its miner is set before it.

    Raises:
        ValueError: alpha, beta or epsilon is out of its range.

    >>> loss = MultiSimilarity(alpha=1.0, beta=1.0, base=1.0)
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    >>> loss(x, torch.tensor([0, 0, 1])).item()    # for each of two anchors a positive and a negative: 2 log 2
    1.38629...
    """

    def __init__(
        self, *, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5, epsilon: float | None = 0.1
    ) -> None:
        super().__init__()
        if not (alpha > 0 and beta > 0):
            raise ValueError(f"alpha and beta must be above 0, not {alpha} and {beta}")
        if epsilon is not None and not epsilon >= 0:
            raise ValueError(f"epsilon must be 0 or above, or None, not {epsilon}")
        self.alpha = alpha
        self.beta = beta
        self.base = base
        self.epsilon = epsilon

    def forward(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Int[Tensor, "B"],
        *,
        groups: Int[Tensor, "B"] | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, ""]:
        """The mean over the anchors that have a positive."""
        positive_BR, negative_BR = _relations(labels, groups, memory)
        cos_BR = _cosines(embeddings, memory)
        counts_B = positive_BR.any(1)
        if self.epsilon is not None:
            # Beyond any cosine where there is none: then no pair of the other kind is left either.
            farthest_B1 = cos_BR.masked_fill(~positive_BR, 9).amin(1, keepdim=True)
            nearest_B1 = cos_BR.masked_fill(~negative_BR, -9).amax(1, keepdim=True)
            negative_BR = negative_BR & (cos_BR + self.epsilon > farthest_B1)
            positive_BR = positive_BR & (cos_BR - self.epsilon < nearest_B1)
        pull_B = softplus(_logsumexp(self.alpha * (self.base - cos_BR), positive_BR)) / self.alpha
        push_B = softplus(_logsumexp(self.beta * (cos_BR - self.base), negative_BR)) / self.beta
        return _mean(pull_B + push_B, counts_B)


Pair: TypeAlias = NTXent | SupCon | Triplet | MultiSimilarity


class WeightedSum(nn.Module):
    """Several pair losses of one batch, added up: L = sum_i w_i L_i. The logo system: 1 NTXent + 0.5 Triplet.

    Args:
        losses: (w_i, L_i), each w_i above 0.

    Raises:
        ValueError: no losses, a weight that is not above 0, or something that is no pair loss.

    >>> loss = WeightedSum([(1.0, NTXent(temperature=1.0)), (0.5, Triplet(margin=0.2))])
    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    >>> loss(x, torch.tensor([0, 0, 1])).item()    # log 2 + 0.5 x 0.2
    0.79314...
    """

    def __init__(self, losses: Sequence[tuple[float, Pair]]) -> None:
        super().__init__()
        if not losses:
            raise ValueError("a weighted sum takes one loss at least")
        for weight, loss in losses:
            if not isinstance(loss, NTXent | SupCon | Triplet | MultiSimilarity):
                raise ValueError(f"a weighted sum takes pair losses; {type(loss).__name__} compares no items")
            if not 0 < weight < math.inf:
                raise ValueError(f"the weight of {type(loss).__name__} must be above 0, not {weight}")
        self.weights = tuple(weight for weight, _ in losses)
        self.losses = nn.ModuleList([loss for _, loss in losses])

    def forward(
        self,
        embeddings: Float[Tensor, "B D"],
        labels: Int[Tensor, "B"],
        *,
        groups: Int[Tensor, "B"] | None = None,
        memory: Memory | None = None,
    ) -> Float[Tensor, ""]:
        """The sum; each loss has its own mean over its own anchors."""
        parts = [loss(embeddings, labels, groups=groups, memory=memory) for loss in self.losses]
        return torch.stack([weight * part for weight, part in zip(self.weights, parts, strict=True)]).sum()


class CrossBatchMemory(nn.Module):
    """A pair loss that sees the last items of earlier batches too: XBM. Wang et al. 2020, arXiv:1912.06798.

    Features drift slowly, so those of some batches ago still tell which pairs are hard; they cost no forward pass. An
    item of the batch meets the others of its batch, with their gradient, and the items kept, never its own copy: the
    batch enters the memory afterwards, the oldest items leaving. An image that comes again meets what it was before.
    While the memory is empty, this is the plain loss; in evaluation mode the memory is used, and stays as it is.

    Everything is kept in buffers: saved, resumed, and moved with the loss. Where features move fast, as they do from
    random weights, what is kept is stale: the authors' code then begins after 1,000 steps.

    Args:
        loss: one of the pair losses, or a sum of them.
        dim: D, the width of the embeddings.
        size: M, the most items kept. The paper: up to all training images; pytorch-metric-learning: 1,024.

    Raises:
        ValueError: the size or the width is below 1, or the loss is none that a memory fits.

    >>> loss = CrossBatchMemory(NTXent(temperature=1.0), dim=2, size=4)
    >>> loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).item()    # nothing to compare with
    0.0
    >>> _ = loss(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    >>> loss(torch.tensor([[1.0, 0.0]]), torch.tensor([0])).item()    # a positive and a negative: log(1 + e^-1)
    0.31326...
    """

    embeddings: Tensor
    labels: Tensor
    groups: Tensor
    seen: Tensor

    def __init__(self, loss: Pair | WeightedSum, dim: int, *, size: int = 1024) -> None:
        super().__init__()
        if not isinstance(loss, NTXent | SupCon | Triplet | MultiSimilarity | WeightedSum):
            raise ValueError(f"a memory must be that of a pair loss; {type(loss).__name__} compares no items")
        if dim < 1 or size < 1:
            raise ValueError(f"dim and size must be at least 1, not {dim} and {size}")
        self.loss = loss
        self.register_buffer("embeddings", torch.zeros(size, dim))
        self.register_buffer("labels", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("groups", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(
        self, embeddings: Float[Tensor, "B D"], labels: Int[Tensor, "B"], *, groups: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, ""]:
        """The loss of the batch among itself and the memory; groups in every batch, or in none."""
        kept = min(int(self.seen), len(self.labels))
        memory = Memory(self.embeddings[:kept], self.labels[:kept], self.groups[:kept]) if kept else None
        loss: Tensor = self.loss(embeddings, labels, groups=groups, memory=memory)
        if self.training:
            self._keep(embeddings, labels, groups)
        return loss

    @torch.no_grad()
    def _keep(self, embeddings: Tensor, labels: Tensor, groups: Tensor | None) -> None:
        size, batch = len(self.labels), len(labels)
        places = ((self.seen + torch.arange(batch, device=labels.device)) % size)[-size:]
        self.embeddings[places] = unit(embeddings[-size:]).to(self.embeddings.dtype)
        self.labels[places] = labels[-size:].to(torch.int64)
        # Without groups each item is alone; the number of a group that comes later must not be equal by chance.
        self.groups[places] = torch.iinfo(torch.int64).min if groups is None else groups[-size:].to(torch.int64)
        self.seen += batch


@torch.no_grad()
def mean_similarities(
    embeddings: Float[Tensor, "B D"], labels: Int[Tensor, "B"], *, groups: Int[Tensor, "B"] | None = None
) -> dict[str, Tensor]:
    """How alike the right and the wrong pairs of a batch are on average, and the gap: what a pair loss drives apart.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> {name: value.item() for name, value in mean_similarities(x, torch.tensor([0, 0, 1])).items()}
    {'right_mean': 1.0, 'wrong_mean': 0.0, 'gap': 1.0}
    """
    cosine_BB = cosines(embeddings, embeddings)
    right, wrong = (_mean(cosine_BB, where) for where in _relations(labels, groups, None))
    return {"right_mean": right, "wrong_mean": wrong, "gap": right - wrong}


def _relations(
    labels: Tensor, groups: Tensor | None, memory: Memory | None
) -> tuple[Bool[Tensor, "B R"], Bool[Tensor, "B R"]]:
    """Who is whose positive, and who is whose negative: of each of the batch among the batch, then the memory."""
    same_BR = labels[:, None] == (labels if memory is None else torch.cat([labels, memory.labels]))
    kin_BR = same_BR
    if groups is not None:
        if memory is not None and memory.groups is None:
            raise ValueError("the batch has groups, but the memory does not know those of its items")
        others = groups if memory is None or memory.groups is None else torch.cat([groups, memory.groups])
        kin_BR = same_BR | (groups[:, None] == others)
    return same_BR.clone().fill_diagonal_(False), ~kin_BR


def _cosines(embeddings: Tensor, memory: Memory | None) -> Float[Tensor, "B R"]:
    others = embeddings if memory is None else torch.cat([embeddings, memory.embeddings])
    return cosines(embeddings, others)


def _logsumexp(logits_BR: Float[Tensor, "B R"], where_BR: Bool[Tensor, "B R"]) -> Float[Tensor, "B"]:
    # A finite floor below any logit: a row with nothing to sum never meets -inf - -inf in its gradient.
    return logits_BR.masked_fill(~where_BR, -1e9).logsumexp(1)


def _mean(values: Tensor, where: Tensor) -> Float[Tensor, ""]:
    """The mean where it is true; zero, with a graph, if it is nowhere."""
    return values.masked_fill(~where, 0).sum() / where.sum().clamp_min(1)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
