"""Proxy losses: one vector stands for a class, and a whole batch is compared with the proxies instead of with itself.

    s_ij = x_i . p_j / (|x_i| |p_j|)
    ProxyAnchor  1/|P+| sum over j in P+ of log(1 + sum over i: y_i = j of e^(-alpha (s_ij - m)))
                 + 1/C sum over j of        log(1 + sum over i: y_i != j of e^(alpha (s_ij + m)))
    ProxyNCA     mean_i -log softmax_j(-d_ij / tau)[y_i],      d_ij = 2 - 2 s_ij, the squared distance of unit vectors

Letters: B batch, D numbers an embedding, C classes, x embeddings, p proxies, y labels, P+ the classes that the batch
holds, alpha scale, m margin, tau temperature.

The positive sum of ProxyAnchor is divided by the proxies present, as in the paper. Divided by all C, as in some code,
it would hardly pull where classes are many: at 0.3 % of its weight with 32 items of 11,318 classes.

Precision is as in `losses.classes`, and with thousands of classes the B x C cosines are never whole.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import softplus

from vicinal.losses.classes import check_sizes, is_tiled, margin_softmax, own_and_others, refuse_groups
from vicinal.losses.cosine import cosines

__all__ = ["ProxyAnchor", "ProxyNCA", "proxy_anchor"]


def proxy_anchor(
    embeddings: Float[Tensor, "B D"],
    labels: Int[Tensor, "B"],
    proxies: Float[Tensor, "C D"],
    *,
    margin: float = 0.1,
    alpha: float = 32.0,
) -> Float[Tensor, ""]:
    """Proxy-Anchor for proxies made elsewhere, which get a gradient too: what `ProxyAnchor` is with its own.

    Args:
        embeddings: x.
        labels: y, rows of `proxies`.
        proxies: p, of any length. For the classes of the batch alone, hand in their rows, and labels that count those.
        margin: m.
        alpha: alpha.

    >>> proxy_anchor(torch.tensor([[3.0, 0.0]]), torch.tensor([0]), torch.eye(2), margin=0.0, alpha=1.0).item()
    0.6598...
    """
    if is_tiled(proxies):
        own_B, others_C = own_and_others(embeddings, proxies, labels, alpha, over="items")
    else:
        cos_BC = cosines(embeddings, proxies)
        own_B = cos_BC.gather(1, labels[:, None]).squeeze(1)
        # A finite floor: the column of a class that all items belong to sums nothing.
        others_C = (alpha * cos_BC).scatter(1, labels[:, None], -1e9).logsumexp(0)
    negative = softplus(others_C + alpha * margin).mean()
    # Of each item's class, so one that has n items stands here n times, at a weight of 1 / n.
    same_BB = labels[:, None] == labels
    pull_B = (alpha * (margin - own_B)).expand_as(same_BB).masked_fill(~same_BB, -1e9).logsumexp(1)
    share_B = 1 / same_BB.to(pull_B.dtype).sum(1)
    return (softplus(pull_B) * share_B).sum() / share_B.sum() + negative


class ProxyAnchor(nn.Module):
    """Each proxy pulls the items of its class and pushes all others, the farther off the harder. Kim et al. 2020.

    arXiv:2003.13911, eq. 4. For proxies made elsewhere, call `proxy_anchor`.

    Args:
        dim: D, the width of the embeddings.
        classes: C, labels are 0 .. C - 1.
        margin: m, a difference of cosines. The paper: 0.1.
        alpha: alpha, the inverse temperature. The paper: 32.

    Raises:
        ValueError: a size or setting is out of its range.

    >>> loss = ProxyAnchor(dim=2, classes=2, margin=0.0, alpha=1.0)
    >>> _ = loss.weight.data.copy_(torch.eye(2))
    >>> loss(torch.tensor([[3.0, 0.0]]), torch.tensor([0])).item()    # log(1 + e^-1) + (0 + log 2) / 2
    0.6598...
    """

    weight: nn.Parameter

    def __init__(self, dim: int, classes: int, *, margin: float = 0.1, alpha: float = 32.0) -> None:
        super().__init__()
        check_sizes(dim, classes)
        if not 0 <= margin < 2:
            raise ValueError(f"margin is a difference of cosines, from 0 to below 2, not {margin}")
        if not alpha > 0:
            raise ValueError(f"alpha must be above 0, not {alpha}")
        self.margin = margin
        self.alpha = alpha
        self.weight = nn.Parameter(torch.randn(classes, dim))

    def forward(
        self, embeddings: Float[Tensor, "B D"], labels: Int[Tensor, "B"], *, groups: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, ""]:
        """The mean over the proxies. `groups` belong to pair losses and are refused."""
        refuse_groups(groups)
        return proxy_anchor(embeddings, labels, self.weight, margin=self.margin, alpha=self.alpha)


class ProxyNCA(nn.Module):
    """ProxyNCA++: softmax over the distances to all proxies. Teh et al. 2020, arXiv:2004.01113.

    Unlike the first ProxyNCA (Movshovitz-Attias et al. 2017), the own proxy stands in the denominator too, and there is
    a temperature. As d = 2 - 2 cosine, it is CosFace without a margin, at a scale of 2 / tau. The paper's other parts
    (pooling, faster proxies) are settings of model and optimiser.

    Args:
        dim: D, the width of the embeddings.
        classes: C, labels are 0 .. C - 1.
        temperature: tau, on the squared distance. The paper: 1/9.

    Raises:
        ValueError: a size or setting is out of its range.

    >>> loss = ProxyNCA(dim=2, classes=2, temperature=2.0)
    >>> _ = loss.weight.data.copy_(torch.eye(2))
    >>> loss(torch.tensor([[3.0, 0.0]]), torch.tensor([0])).item()    # log(1 + e^-1)
    0.31326...
    """

    weight: nn.Parameter

    def __init__(self, dim: int, classes: int, *, temperature: float = 1 / 9) -> None:
        super().__init__()
        check_sizes(dim, classes)
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, not {temperature}")
        self.temperature = temperature
        self.weight = nn.Parameter(torch.randn(classes, dim))

    def forward(
        self, embeddings: Float[Tensor, "B D"], labels: Int[Tensor, "B"], *, groups: Int[Tensor, "B"] | None = None
    ) -> Float[Tensor, ""]:
        """The mean loss of the batch. `groups` belong to pair losses and are refused."""
        refuse_groups(groups)
        return margin_softmax(embeddings, self.weight, labels, lambda cos_B: cos_B, 2 / self.temperature)
