"""Cache heads: each support image is a key, and a query is drawn to the classes of the keys that it is near.

    Z     = s f . W                                             zero-shot, frozen features; 0 without text
    S(b)  = exp(-b (1 - g G^T)) L                               image and image: adapted features, or the frozen ones

    TipAdapter, TipAdapterF    Z + alpha S(beta)                            the F: after training G
    TipX                       Z + alpha S(beta) - gamma R L                R: KL divergence of zero-shot distributions
    APE                        Z + alpha exp(-beta (1 - g' G'^T)) diag(r_gamma) L      g', G': chosen channels, unit

    R_ij = a0 + (a1 - a0) clamp((KL(p(f_i) || p(F_j)) - k0) / (k1 - k0)),     p(f) = softmax(f . W / 0.5)
    r_j  = exp(gamma log2((1 + 1e-6) / (softmax(F'_j . W')_{y_j} + 1e-6)))

The published TipX rescales by the extremes of the whole test set, so that an answer depends on the other questions;
here [k0, k1] and [a0, a1] are the extremes of KL and affinity between different images of the support set, and a query
beyond them is clamped. Sums over keys have no denominator, as published: a class with more images weighs more.

Letters: f, g queries and F, G keys (frozen and adapted, unit rows), W unit texts, L "N C" one-hot labels, s logit
scale, N keys, C classes, v queries of a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn
from torch.nn.functional import cross_entropy

from vicinal.heads.head import Head
from vicinal.heads.selection import ALPHAS, BETAS, GAMMAS, Learned, Points, Selection, choose
from vicinal.heads.support import Support, unit

__all__ = ["APE", "TipAdapter", "TipAdapterF", "TipX", "class_sums", "kernels"]

TextUse = Literal["needed", "optional", "unused"]
_ONE = np.ones(1)


def kernels(affinity: Float[np.ndarray, "v N"], betas: Sequence[float]) -> Iterator[Float[np.ndarray, "v N"]]:
    """exp(-beta (1 - affinity)) for each beta in turn, in one array that the next overwrites. `affinity` is used up.

    Where betas are equally spaced, each is the last times exp(-step (1 - affinity)), a third of the price; every 25th
    is made anew, so that roundings do not add up. Cosines above 1 by rounding count as 1.
    """
    behind = np.minimum(np.subtract(affinity, 1, out=affinity), 0, out=affinity)
    dtype = behind.dtype.type
    kernel = np.empty_like(behind) if len(betas) > 1 else behind
    steps = np.diff(betas)
    even = len(betas) > 2 and bool(np.allclose(steps, steps[0], rtol=1e-6, atol=0))
    factor = np.exp(behind * dtype(steps[0])) if even else None
    for i, beta in enumerate(betas):
        if factor is not None and i % 25:
            kernel *= factor
        else:
            np.exp(np.multiply(behind, dtype(beta), out=kernel), out=kernel)
        yield kernel


def class_sums(values: Float[np.ndarray, "v N"], labels: Int[np.ndarray, "N"]) -> Float[np.ndarray, "v C"]:
    """The product with L, for ascending labels without a gap, but without a one-hot matrix."""
    classes = int(labels[-1]) + 1
    start = np.searchsorted(labels, np.arange(classes))
    each, odd = divmod(len(labels), classes)
    if not odd and np.array_equal(start, np.arange(classes) * each):
        sums = values.reshape(-1, each) @ np.ones(each, dtype=values.dtype)
        return sums.reshape(len(values), classes)
    return np.add.reduceat(values, start, axis=1)


class TipAdapter(Head):
    """A cache beside zero-shot: Z + alpha exp(-beta (1 - g G^T)) L. Zhang et al. 2021, arXiv:2111.03930.

    Args:
        alpha: weight of the cache; None: chosen. The paper, on ImageNet: 1.
        beta: sharpness; None: chosen. The paper, on ImageNet: 5.5.
        logit_scale: s. CLIP's: 100.
        policy: how None is filled; see `vicinal.heads.selection`.

    >>> X, y = [[1.0, 0.1], [1.0, -0.1], [0.0, 1.0], [0.1, 1.0]], ["cat", "cat", "dog", "dog"]
    >>> head = TipAdapter(policy="fixed").fit(X, y, text={"cat": [1.0, 0.0], "dog": [0.0, 1.0]})
    >>> head.predict([[2.0, 0.5]]).tolist(), head.alpha_, head.beta_
    (['cat'], 1.0, 5.5)
    """

    text_use: ClassVar[TextUse] = "optional"
    hyperparameters: ClassVar[tuple[str, ...]] = ("beta", "alpha")
    linear: ClassVar[tuple[str, ...]] = ("alpha",)

    alpha_: float
    beta_: float

    def __init__(
        self,
        *,
        alpha: float | None = None,
        beta: float | None = None,
        logit_scale: float = 100.0,
        policy: str = "support_cv",
    ) -> None:
        self.alpha = alpha
        self.beta = beta
        self.logit_scale = logit_scale
        self.policy = policy

    def _defaults(self, support: Support) -> dict[str, float]:
        return {"beta": 5.5, "alpha": 1.0}

    def _grid(self, support: Support, *, published: bool) -> dict[str, Float[np.ndarray, "n"]]:
        return {"beta": BETAS, "alpha": _ONE if support.text is None else ALPHAS}

    def _learn(self, support: Support, points: Points) -> Learned:
        return {"keys": support.image, "labels": support.labels}

    def _terms(
        self, learned: Learned, points: Points, X: Float[np.ndarray, "v D"], image: Float[np.ndarray, "v E"]
    ) -> Iterator[Sequence[Float[np.ndarray, "v C"]]]:
        for kernel in kernels(image @ learned["keys"].T, [point["beta"] for point in points]):
            yield (class_sums(kernel, learned["labels"]),)


class TipAdapterF(Head):
    """TipAdapter whose keys are trained: cross-entropy of Z + alpha exp(-beta (1 - g G^T)) L over G. The same paper.

    The last epoch is what is kept: the published code keeps the epoch that is best on test. Every key is blind to its
    own image while it is trained, as it would only learn to know itself; the published code has fresh augmentations
    there, which vectors do not. alpha and beta are those of TipAdapter on the same support (policy support_cv), or are
    chosen after training on the validation set, as published.

    Args:
        alpha: as in `TipAdapter`.
        beta: as in `TipAdapter`.
        epochs: The paper: 20 (EuroSAT 100).
        lr: of AdamW (eps 1e-4), falling as a cosine. The paper: 1e-3.
        weight_decay: of AdamW. The paper: 0.01.
        batch_size: The paper: 256.
        seed: of the order of the images.
        logit_scale: s. CLIP's: 100.
        policy: as in `TipAdapter`.

    >>> X, y = [[1.0, 0.1], [1.0, -0.1], [0.0, 1.0], [0.1, 1.0]], ["cat", "cat", "dog", "dog"]
    >>> TipAdapterF(policy="fixed").fit(X, y).predict([[2.0, 0.5]]).tolist()
    ['cat']
    """

    text_use: ClassVar[TextUse] = "optional"
    hyperparameters: ClassVar[tuple[str, ...]] = ("beta", "alpha")
    linear: ClassVar[tuple[str, ...]] = ("alpha",)

    alpha_: float
    beta_: float

    def __init__(
        self,
        *,
        alpha: float | None = None,
        beta: float | None = None,
        epochs: int = 20,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        batch_size: int = 256,
        seed: int = 0,
        logit_scale: float = 100.0,
        policy: str = "support_cv",
    ) -> None:
        self.alpha = alpha
        self.beta = beta
        self.epochs = epochs
        self.lr = lr
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.seed = seed
        self.logit_scale = logit_scale
        self.policy = policy

    def _free(self) -> TipAdapter:
        return TipAdapter(alpha=self.alpha, beta=self.beta, logit_scale=self.logit_scale, policy=self.policy)

    def _defaults(self, support: Support) -> dict[str, float]:
        return self._free()._defaults(support)

    def _grid(self, support: Support, *, published: bool) -> dict[str, Float[np.ndarray, "n"]]:
        return self._free()._grid(support, published=published)

    def _fit(self, support: Support, validation: Support | None) -> None:
        self._text = support.text
        selection: Selection | None = None
        if validation is None:
            free = self._free()
            free.classes_ = self.classes_
            selection = choose(free, support, None)
            start = selection.values
        else:
            start = {
                **self._defaults(support),
                **{n: v for n in self.hyperparameters if (v := getattr(self, n)) is not None},
            }
        self._trained = self._train(support, start["alpha"], start["beta"])
        self._settle(selection or choose(self, support, validation))
        self._learned = self._trained
        del self._trained

    def _learn(self, support: Support, points: Points) -> Learned:
        return self._trained

    def _train(self, support: Support, alpha: float, beta: float) -> Learned:
        image, labels = torch.from_numpy(support.image), torch.from_numpy(support.labels)
        zero_shot = torch.from_numpy(self._base(support.frozen, support.text))
        keys = nn.Parameter(image.clone())
        optimizer = torch.optim.AdamW([keys], lr=self.lr, eps=1e-4, weight_decay=self.weight_decay)
        generator = torch.Generator().manual_seed(self.seed)
        steps = self.epochs * math.ceil(len(labels) / self.batch_size)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        for _ in range(self.epochs):
            for rows in torch.randperm(len(labels), generator=generator).split(self.batch_size):  # type: ignore[no-untyped-call]
                kernel = torch.exp(beta * (image[rows] @ keys.T - 1))
                itself = torch.zeros_like(kernel).scatter_(1, rows[:, None], 1).bool()
                near = torch.zeros_like(zero_shot[rows]).index_add(1, labels, kernel.masked_fill(itself, 0))
                loss = cross_entropy(zero_shot[rows] + alpha * near, labels[rows])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                scheduler.step()
        return {"keys": keys.detach().numpy(), "labels": support.labels}

    def _terms(
        self, learned: Learned, points: Points, X: Float[np.ndarray, "v D"], image: Float[np.ndarray, "v E"]
    ) -> Iterator[Sequence[Float[np.ndarray, "v C"]]]:
        behind = image @ learned["keys"].T - 1
        for point in points:  # trained keys are longer than 1, so an affinity may exceed it, as in training
            yield (class_sums(np.exp(behind * behind.dtype.type(point["beta"])), learned["labels"]),)


class TipX(Head):
    """TipAdapter less the divergence of zero-shot distributions. Udandarao et al. 2022, arXiv:2211.16198 (SuS-X).

    Without text there is no such divergence, and it is TipAdapter.

    Args:
        alpha: as in `TipAdapter`.
        beta: as in `TipAdapter`.
        gamma: weight of the divergence; None: chosen. Without a choice: 1.
        temperature: of the distributions. The paper: 0.5 on cosines, so they are almost flat.
        logit_scale: s. CLIP's: 100.
        policy: as in `TipAdapter`.
    """

    text_use: ClassVar[TextUse] = "optional"
    hyperparameters: ClassVar[tuple[str, ...]] = ("beta", "alpha", "gamma")
    linear: ClassVar[tuple[str, ...]] = ("alpha", "gamma")

    alpha_: float
    beta_: float
    gamma_: float

    def __init__(
        self,
        *,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        temperature: float = 0.5,
        logit_scale: float = 100.0,
        policy: str = "support_cv",
    ) -> None:
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature
        self.logit_scale = logit_scale
        self.policy = policy

    def _defaults(self, support: Support) -> dict[str, float]:
        return {"beta": 5.5, "alpha": 1.0, "gamma": 0.0 if support.text is None else 1.0}

    def _grid(self, support: Support, *, published: bool) -> dict[str, Float[np.ndarray, "n"]]:
        if support.text is None:
            return {"beta": BETAS, "alpha": _ONE, "gamma": np.zeros(1)}
        return {"beta": BETAS, "alpha": ALPHAS, "gamma": GAMMAS}

    def _learn(self, support: Support, points: Points) -> Learned:
        learned = {"keys": support.image, "labels": support.labels}
        if support.text is None:
            return learned
        learned["text"] = support.text
        learned["log_p"] = self._log_p(support.frozen, support.text)
        low, high = np.array([np.inf, np.inf]), np.array([-np.inf, -np.inf])
        step = max(1, len(support) ** 2 // 2**27)
        for i in range(0, len(support), 64 * step):
            rows = slice(i, min(i + 64, len(support)))
            apart = support.groups[rows, None] != support.groups
            if apart.any():
                both = [
                    self._divergence(learned["log_p"][rows], learned["log_p"]),
                    support.image[rows] @ support.image.T,
                ]
                low = np.minimum(low, [x[apart].min() for x in both])
                high = np.maximum(high, [x[apart].max() for x in both])
        extremes = np.stack([low, high]) if np.isfinite(low).all() else np.zeros((2, 2))
        learned["extremes"] = extremes.astype(support.frozen.dtype)
        return learned

    def _log_p(self, X: Float[np.ndarray, "n D"], text: Float[np.ndarray, "C D"]) -> Float[np.ndarray, "n C"]:
        return log_softmax(X @ text.T / X.dtype.type(self.temperature))

    @staticmethod
    def _divergence(p: Float[np.ndarray, "v C"], q: Float[np.ndarray, "N C"]) -> Float[np.ndarray, "v N"]:
        """KL(p || q) of logarithms, in one product."""
        weight = np.exp(p)
        divergence: np.ndarray = (weight * p).sum(1, keepdims=True) - weight @ q.T
        return divergence

    def _terms(
        self, learned: Learned, points: Points, X: Float[np.ndarray, "v D"], image: Float[np.ndarray, "v E"]
    ) -> Iterator[Sequence[Float[np.ndarray, "v C"]]]:
        if "text" in learned:
            (k0, a0), (k1, a1) = learned["extremes"]
            away = self._divergence(self._log_p(X, learned["text"]), learned["log_p"])
            away = np.clip((away - k0) / (k1 - k0), 0, 1) if k1 > k0 else np.zeros_like(away)
            pushed = -class_sums(a0 + (a1 - a0) * away, learned["labels"])
        else:
            pushed = np.zeros((1, 1), dtype=X.dtype)
        for kernel in kernels(image @ learned["keys"].T, [point["beta"] for point in points]):
            yield class_sums(kernel, learned["labels"]), pushed


class APE(Head):
    """A cache of chosen channels, keys weighed by how little zero-shot knows them. Zhu et al. 2023, arXiv:2304.01195.

    Channel d scores J_d = -w S_d + (1 - w) V_d and the best Q are kept: S_d, the mean product of channel d over pairs
    of vectors (images and text) of different classes; V_d, its variance over the texts. In closed form, with u_c the
    sum of the m_c vectors of class c, S = ((sum u_c)^2 - sum u_c^2) / ((sum m_c)^2 - sum m_c^2).

    With adapted features, S takes its products of two images from them, and those with text from frozen ones; where
    their width is another, they choose by themselves. The keys' weights come from frozen features. Without text, S of
    the images chooses alone, and keys weigh the same.

    Args:
        alpha: weight of the cache; None: chosen. Without a choice: 1.
        beta: sharpness; None: chosen. Without a choice: 5.
        gamma: of the weights of keys; None: chosen. Without a choice: 0.1.
        channels: Q / D, the share of channels that is kept. The paper's choices for 1,024: 0.4 to 0.8.
        similarity: w. The paper: 0.1 to 0.9 by data set.
        logit_scale: s. CLIP's: 100.
        policy: as in `TipAdapter`.
    """

    text_use: ClassVar[TextUse] = "optional"
    hyperparameters: ClassVar[tuple[str, ...]] = ("beta", "gamma", "alpha")
    linear: ClassVar[tuple[str, ...]] = ("alpha",)

    alpha_: float
    beta_: float
    gamma_: float

    def __init__(
        self,
        *,
        alpha: float | None = None,
        beta: float | None = None,
        gamma: float | None = None,
        channels: float = 0.7,
        similarity: float = 0.5,
        logit_scale: float = 100.0,
        policy: str = "support_cv",
    ) -> None:
        self.alpha = alpha
        self.beta = beta
        self.gamma = gamma
        self.channels = channels
        self.similarity = similarity
        self.logit_scale = logit_scale
        self.policy = policy

    def _defaults(self, support: Support) -> dict[str, float]:
        return {"beta": 5.0, "gamma": 0.0 if support.text is None else 0.1, "alpha": 1.0}

    def _grid(self, support: Support, *, published: bool) -> dict[str, Float[np.ndarray, "n"]]:
        if support.text is None:
            return {"beta": BETAS, "gamma": np.zeros(1), "alpha": _ONE}
        gammas = np.linspace(0, 1, 20) if published else np.array([0.0, 0.1, 0.3, 1.0])
        return {"beta": BETAS, "gamma": gammas, "alpha": ALPHAS}

    def _learn(self, support: Support, points: Points) -> Learned:
        kept = self._channels(support, support.image)
        keys = unit(support.image[:, kept])
        confidence = np.zeros(len(support), dtype=keys.dtype)
        if support.text is not None:
            rows = np.arange(len(support))
            aligned = self._channels(support, support.frozen)
            known = log_softmax(unit(support.frozen[:, aligned]) @ unit(support.text[:, aligned]).T)
            confidence = np.log2((1 + 1e-6) / (np.exp(known[rows, support.labels]) + 1e-6)).astype(keys.dtype)
        return {"keys": keys, "labels": support.labels, "kept": kept, "confidence": confidence}

    def _channels(self, support: Support, image: Float[np.ndarray, "N E"]) -> Int[np.ndarray, "k"]:
        """The channels that are kept, ascending."""
        text = support.text if image.shape[1] == support.frozen.shape[1] else None
        count = np.bincount(support.labels).astype(np.float64)
        sums = _sums(image, support.labels)
        similar = sums.sum(0) ** 2 - (sums**2).sum(0)
        if text is not None:
            words, aligned = text.astype(np.float64), _sums(support.frozen, support.labels)
            similar += words.sum(0) ** 2 - (words**2).sum(0)
            similar += 2 * (words.sum(0) * aligned.sum(0) - (words * aligned).sum(0))
            count += 1
        pairs = count.sum() ** 2 - (count**2).sum()
        score = -similar / max(pairs, 1.0)
        if text is not None and len(text) > 1:
            score = self.similarity * score + (1 - self.similarity) * text.var(0, ddof=1, dtype=np.float64)
        best = np.argsort(-score, kind="stable")[: max(1, int(self.channels * image.shape[1]))]
        return np.sort(best)

    def _terms(
        self, learned: Learned, points: Points, X: Float[np.ndarray, "v D"], image: Float[np.ndarray, "v E"]
    ) -> Iterator[Sequence[Float[np.ndarray, "v C"]]]:
        affinity = unit(image[:, learned["kept"]]) @ learned["keys"].T
        gammas = list(dict.fromkeys(point["gamma"] for point in points))
        betas = list(dict.fromkeys(point["beta"] for point in points))  # points are their product, beta outermost
        weights = [np.exp(learned["confidence"] * learned["confidence"].dtype.type(gamma)) for gamma in gammas]
        for kernel in kernels(affinity, betas):
            for gamma, weight in zip(gammas, weights, strict=True):
                yield (class_sums(kernel * weight if gamma else kernel, learned["labels"]),)


def log_softmax(logits: Float[np.ndarray, "n C"]) -> Float[np.ndarray, "n C"]:
    """Of each row."""
    behind = logits - logits.max(1, keepdims=True)
    normal: np.ndarray = behind - np.log(np.exp(behind).sum(1, keepdims=True))
    return normal


def _sums(X: Float[np.ndarray, "N E"], labels: Int[np.ndarray, "N"]) -> Float[np.ndarray, "C E"]:
    """Of each class."""
    return np.add.reduceat(X.astype(np.float64), np.searchsorted(labels, np.arange(labels[-1] + 1)), axis=0)
