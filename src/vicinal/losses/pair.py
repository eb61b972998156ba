"""Pair losses: the items of a batch are compared with one another, by their labels.

    s_ij = x_i . x_j / (|x_i| |x_j|),   d_ij = 1 - s_ij
    P(i) = {p != i: y_p = y_i}          the positives of an anchor i
    N(i) = {n: y_n != y_i}              its negatives; with groups g, those of another group: and g_n != g_i

    NTXent   mean over all (i, p) of  -log( e^(s_ip/tau) / (e^(s_ip/tau) + sum_N(i) e^(s_in/tau)) )
    SupCon   mean_i  -1/|P(i)| sum_P(i) log( e^(s_ip/tau) / sum_(P(i) and N(i)) e^(s_ia/tau) )
    Triplet  mean of max(0, d_ip - d_in + m) over the triplets that `mining` picks

Letters: B batch, D numbers an embedding, x embeddings, y labels, i anchor, p positive, n negative, tau temperature, m
margin.

An anchor without a positive does not count; a batch without any gives zero, with a graph. Groups: items of one group,
say two variants of one brand, are never each other's negatives. Memory grows with B^2, never with B^3, and everything
is in float32 under autocast.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad, relu, softplus

from vicinal.losses.cosine import cosines

__all__ = ["NTXent", "SupCon", "Triplet"]


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
        self, embeddings: Float[Tensor, "B D"], labels: Int[Tensor, "B"], *, groups: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, ""]:
        """The mean over all positive pairs of the batch."""
        positive_BB, negative_BB = _relations(labels, groups)
        logits_BB = cosines(embeddings, embeddings) / self.temperature
        # -log(e^p / (e^p + sum e^n)) = softplus(logsumexp(n) - p): one number an anchor, so nothing of B^3.
        all_negatives_B1 = _logsumexp(logits_BB, negative_BB)[:, None]
        return _mean(softplus(all_negatives_B1 - logits_BB), positive_BB)


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
        self, embeddings: Float[Tensor, "B D"], labels: Int[Tensor, "B"], *, groups: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, ""]:
        """The mean over the anchors that have a positive."""
        positive_BB, negative_BB = _relations(labels, groups)
        logits_BB = cosines(embeddings, embeddings) / self.temperature
        others_B = _logsumexp(logits_BB, positive_BB | negative_BB)
        count_B = positive_BB.sum(1)
        positives_B = logits_BB.masked_fill(~positive_BB, 0).sum(1) / count_B.clamp_min(1)
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
        self, embeddings: Float[Tensor, "B D"], labels: Int[Tensor, "B"], *, groups: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, ""]:
        """The mean over the triplets that count."""
        positive_BB, negative_BB = _relations(labels, groups)
        distance_BB = 1 - cosines(embeddings, embeddings)
        if self.mining == "batch_hard":
            return self._batch_hard(distance_BB, positive_BB, negative_BB)
        # The negatives of each anchor in order of distance, so that a search takes the place of a third axis.
        sorted_BB = distance_BB.masked_fill(~negative_BB, torch.inf).sort(dim=1).values
        if self.mining == "semi_hard":
            return self._semi_hard(distance_BB, positive_BB, negative_BB, sorted_BB)
        return self._all(distance_BB, positive_BB, sorted_BB)

    def _batch_hard(self, distance_BB: Tensor, positive_BB: Tensor, negative_BB: Tensor) -> Float[Tensor, ""]:
        # Distances lie in [0, 2], so -1 and 3 never win against a real one.
        farthest_B = distance_BB.masked_fill(~positive_BB, -1).max(1).values
        nearest_B = distance_BB.masked_fill(~negative_BB, 3).min(1).values
        return _mean(relu(farthest_B - nearest_B + self.margin), positive_BB.any(1) & negative_BB.any(1))

    def _semi_hard(
        self, distance_BB: Tensor, positive_BB: Tensor, negative_BB: Tensor, sorted_BB: Tensor
    ) -> Float[Tensor, ""]:
        # right=True: the first negative that is strictly farther.
        next_BB = torch.searchsorted(sorted_BB.detach(), distance_BB.detach().contiguous(), right=True)
        found_BB = next_BB < negative_BB.sum(1, keepdim=True)
        chosen_BB = sorted_BB.gather(1, next_BB.where(found_BB, 0))
        hinge_BB = relu(distance_BB - chosen_BB.masked_fill(~found_BB, 3) + self.margin)
        return _mean(hinge_BB, positive_BB & found_BB)

    def _all(self, distance_BB: Tensor, positive_BB: Tensor, sorted_BB: Tensor) -> Float[Tensor, ""]:
        # A pair's active negatives are the first k in order, those nearer than d_ip + m; their hinges sum to
        # k (d_ip + m) less the sum of their distances.
        bound_BB = distance_BB + self.margin
        active_BB = torch.searchsorted(sorted_BB.detach(), bound_BB.detach().contiguous()) * positive_BB
        finite_BB = sorted_BB.masked_fill(sorted_BB.isinf(), 0)
        sums_BB = pad(finite_BB.cumsum(1), (1, 0)).gather(1, active_BB)
        count = active_BB.sum()
        return ((active_BB * bound_BB) - sums_BB).sum() / count.clamp_min(1)


def _relations(labels: Tensor, groups: Tensor | None) -> tuple[Bool[Tensor, "B B"], Bool[Tensor, "B B"]]:
    """Who is whose positive, and who is whose negative."""
    same_BB = labels[:, None] == labels
    positive_BB = same_BB & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    kin_BB = same_BB if groups is None else same_BB | (groups[:, None] == groups)
    return positive_BB, ~kin_BB


def _logsumexp(logits_BB: Float[Tensor, "B B"], where_BB: Bool[Tensor, "B B"]) -> Float[Tensor, "B"]:
    # A finite floor below any logit: a row with nothing to sum never meets -inf - -inf in its gradient.
    return logits_BB.masked_fill(~where_BB, -1e9).logsumexp(1)


def _mean(values: Tensor, where: Tensor) -> Float[Tensor, ""]:
    """The mean where it is true; zero, with a graph, if it is nowhere."""
    return values.masked_fill(~where, 0).sum() / where.sum().clamp_min(1)


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
