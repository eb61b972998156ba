"""Heads that are linear in features or in kernels, two of them in closed form.

    GDA          Z + alpha (g . P mu_c + log(1/C) - mu_c . P mu_c / 2)
                 P = E ((n - 1) Sigma + tr(Sigma) I)^-1
    ProKeR       s (f . W + c k(g, G) A),  A = (K / lambda + I)^-1 (L - F . W),    k(x, y) = exp(-beta (1 - x . y))
    LinearProbe  a Z + g . U + b,          U, b = argmin mean_i CE_i + |U|^2 / (2 C n);   b = 0 with text
    LPPlusPlus   g . V + b + alpha_c (f . w_c),    V, b, alpha = argmin mean_i CE_i, stopped early
    CLAP         s f . w_c / |w_c|,        w = argmin mean_i CE_i + (1/C) sum_c lambda_c |w_c - t_c|^2

Z = s f . W is zero-shot (frozen features), 0 without text; g, G are adapted features, or the frozen ones.

Letters: n support rows, C classes, E numbers a feature, mu_c class means, Sigma covariance about them, L one-hot
labels. `LinearProbe`'s C is scikit-learn's: the inverse strength of the penalty.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from vicinal.heads.cache import kernels, log_softmax
from vicinal.heads.head import Head
from vicinal.heads.selection import Learned, Points, trust
from vicinal.heads.support import Support
from vicinal.types import InputError

__all__ = ["CLAP", "GDA", "LPPlusPlus", "LinearProbe", "ProKeR"]

TextUse = Literal["needed", "optional", "unused"]


class GDA(Head):
    """Gaussian discriminant analysis beside zero-shot. Wang et al. 2024, arXiv:2402.04087 ("a hard-to-beat baseline").

    One covariance for all classes, ridged after Kubokawa and Srivastava; n counts views, as published, so stack the
    views of an image rather than average them. With one row a class there is no covariance: an isotropic one of
    trace 1 is taken, and an alpha of 0.1 without a choice, since 1 can lose half of what zero-shot knows.

    Args:
        alpha: weight of the Gaussians; None: chosen. Published logs: 0.1 to 100, mostly 1. Without a choice: 1.
        logit_scale: s. CLIP's: 100.
        policy: how None is filled; see `vicinal.heads.selection`.

    >>> X, y = [[1.0, 0.1], [1.0, -0.1], [0.0, 1.0], [0.1, 1.0]], ["cat", "cat", "dog", "dog"]
    >>> GDA(policy="fixed").fit(X, y).predict([[2.0, 0.5]]).tolist()
    ['cat']
    """

    text_use: ClassVar[TextUse] = "optional"
    hyperparameters: ClassVar[tuple[str, ...]] = ("alpha",)
    linear: ClassVar[tuple[str, ...]] = ("alpha",)

    alpha_: float

    def __init__(self, *, alpha: float | None = None, logit_scale: float = 100.0, policy: str = "support_cv") -> None:
        self.alpha = alpha
        self.logit_scale = logit_scale
        self.policy = policy

    def _defaults(self, support: Support) -> dict[str, float]:
        return {"alpha": 1.0 if len(support) > support.classes else 0.1}

    def _grid(self, support: Support, *, published: bool) -> dict[str, Float[np.ndarray, "n"]]:
        return {"alpha": np.ones(1) if support.text is None else 10.0 ** np.arange(-4, 3)}

    def _learn(self, support: Support, points: Points) -> Learned:
        x = support.image.astype(np.float64)
        width, rows = x.shape[1], len(x)
        mean = np.zeros((support.classes, width))
        np.add.at(mean, support.labels, x)
        mean /= np.bincount(support.labels)[:, None]
        x -= mean[support.labels]
        scatter = x.T @ x  # (n - 1) Sigma
        trace = np.trace(scatter) / max(1, rows - 1)
        if trace <= 1e-12:
            scatter, trace = np.eye(width) * (max(1, rows - 1) / width), 1.0
        scatter[np.diag_indices(width)] += trace
        weight = width * cho_solve(cho_factor(scatter, lower=True, overwrite_a=True), mean.T).T
        bias = -np.log(support.classes) - (mean * weight).sum(1) / 2
        return {"weight": weight.astype(support.image.dtype), "bias": bias.astype(support.image.dtype)}

    def _terms(
        self, learned: Learned, points: Points, X: Float[np.ndarray, "v D"], image: Float[np.ndarray, "v E"]
    ) -> Iterator[Sequence[Float[np.ndarray, "v C"]]]:
        for _ in points:
            yield (image @ learned["weight"].T + learned["bias"],)


class ProKeR(Head):
    """Kernel ridge regression on what zero-shot leaves over. Bendou et al. 2025, arXiv:2501.11175.

    The published correction is lambda times that of the textbook: at one image a class a twentieth, so that names which
    know little drown it. So it has a weight of its own here, which support_cv solves for.

    Args:
        beta: sharpness of the kernel; None: chosen. Without a choice, the paper's for the next number of shots.
        ridge: lambda; None: chosen. Without a choice, the paper's for the next number of shots.
        correction: c, the weight of what is learnt; None: chosen. Without a choice, and by fewshot_val and full_val, 1,
            as published. Without text it weighs against nothing, and is 1.
        logit_scale: s. CLIP's: 100.
        policy: how None is filled; see `vicinal.heads.selection`. Above 5,000 rows support_cv takes the paper's.

    Raises:
        InputError: at `fit`: more than 20,000 support rows, since n x n numbers are solved.
    """

    text_use: ClassVar[TextUse] = "optional"
    hyperparameters: ClassVar[tuple[str, ...]] = ("beta", "ridge", "correction")
    linear: ClassVar[tuple[str, ...]] = ("correction",)
    beside_text: ClassVar[tuple[str, ...]] = ("correction",)

    beta_: float
    ridge_: float
    correction_: float

    _MOST = 20_000
    _MOST_SEARCHED = 5_000
    _PUBLISHED: ClassVar[dict[int, tuple[float, float]]] = {
        1: (3.0, 0.05),
        2: (2.6, 0.05),
        4: (1.5, 0.05),
        8: (1.66, 0.07),
        16: (1.7, 0.1),
    }

    def __init__(
        self,
        *,
        beta: float | None = None,
        ridge: float | None = None,
        correction: float | None = None,
        logit_scale: float = 100.0,
        policy: str = "support_cv",
    ) -> None:
        self.beta = beta
        self.ridge = ridge
        self.correction = correction
        self.logit_scale = logit_scale
        self.policy = policy

    def _fit(self, support: Support, validation: Support | None) -> None:
        if len(support) > self._MOST:
            raise InputError(
                f"ProKeR solves for {len(support):,} x {len(support):,} numbers; give it at most {self._MOST:,} rows "
                "(average the views of an image), or take GDA"
            )
        super()._fit(support, validation)

    def _defaults(self, support: Support) -> dict[str, float]:
        shots = float(np.median(support.images_per_class()))
        nearest = min(self._PUBLISHED, key=lambda k: abs(math.log(k / shots)))
        beta, ridge = self._PUBLISHED[nearest]
        return {"beta": beta, "ridge": ridge, "correction": 1.0}

    def _grid(self, support: Support, *, published: bool) -> dict[str, Float[np.ndarray, "n"]]:
        if not published and len(support) > self._MOST_SEARCHED:
            return {name: np.array([value]) for name, value in self._defaults(support).items()}
        if published:
            return {"beta": np.linspace(0.5, 3, 20), "ridge": np.linspace(1e-3, 1, 10), "correction": np.ones(1)}
        return {"beta": np.array([0.5, 1.0, 2.0, 3.0]), "ridge": np.array([0.01, 0.05, 0.2, 1.0])}

    def _learn(self, support: Support, points: Points) -> Learned:
        rows = len(support)
        # a search can do with half the digits in half the time
        exact = len(points) == 1 and rows <= self._MOST_SEARCHED
        dtype: type[np.floating[Any]] = np.float64 if exact else np.float32
        keys = support.image.astype(dtype)
        left = np.zeros((rows, support.classes), dtype=dtype)
        left[np.arange(rows), support.labels] = 1
        if support.text is not None:
            left -= support.frozen.astype(dtype) @ support.text.astype(dtype).T
        affinity = keys @ keys.T
        solved = np.empty((len(points), rows, support.classes), dtype=support.image.dtype)
        for p, point in enumerate(points):
            (kernel,) = kernels(affinity.copy(), [point["beta"]])
            kernel[np.diag_indices(rows)] += dtype(point["ridge"])
            factor = cho_factor(kernel, lower=True, overwrite_a=True, check_finite=False)
            solved[p] = point["ridge"] * cho_solve(factor, left, check_finite=False)
        return {"solved": solved, "keys": support.image}

    def _terms(
        self, learned: Learned, points: Points, X: Float[np.ndarray, "v D"], image: Float[np.ndarray, "v E"]
    ) -> Iterator[Sequence[Float[np.ndarray, "v C"]]]:
        betas = list(dict.fromkeys(point["beta"] for point in points))  # points are a product, beta outermost
        each, p = len(points) // len(betas), 0
        scale = image.dtype.type(self.logit_scale)
        for kernel in kernels(image @ learned["keys"].T, betas):
            for _ in range(each):
                yield ((kernel @ learned["solved"][p]) * scale,)
                p += 1


class LinearProbe(Head):
    """Logistic regression; with text, on what zero-shot leaves over, so that no evidence means zero-shot.

    Without text it is scikit-learn's LogisticRegression on unit vectors. With text, weights start at the text and the
    penalty is on the distance from it, as in Silva-Rodriguez et al. 2024, arXiv:2312.12730 (ZS-LP, with a ridge).

    Args:
        C: inverse strength of the penalty; None: chosen. CLIP's 0.316 is for vectors about 10 long: 31.6 for unit ones.
        names: a, the weight of zero-shot; None: chosen. support_cv takes that at which names alone make the support
            labels likeliest (they have seen none of its images): names that fit weigh about 1, others little. Without a
            choice, and by fewshot_val and full_val, 1, as published.
        iterations: of L-BFGS, at most. CLIP's: 1,000.
        logit_scale: s. CLIP's: 100.
        policy: how None is filled; see `vicinal.heads.selection`.
    """

    text_use: ClassVar[TextUse] = "optional"
    adapted_use: ClassVar[Literal["yes", "without text", "no"]] = "without text"
    hyperparameters: ClassVar[tuple[str, ...]] = ("C", "names")
    beside_text: ClassVar[tuple[str, ...]] = ("names",)

    C_: float
    names_: float

    def __init__(
        self,
        *,
        C: float | None = None,
        names: float | None = None,
        iterations: int = 1000,
        logit_scale: float = 100.0,
        policy: str = "support_cv",
    ) -> None:
        self.C = C
        self.names = names
        self.iterations = iterations
        self.logit_scale = logit_scale
        self.policy = policy

    def _defaults(self, support: Support) -> dict[str, float]:
        return {"C": 31.6, "names": 1.0}

    def _grid(self, support: Support, *, published: bool) -> dict[str, Float[np.ndarray, "n"]]:
        names = 1.0 if published else trust(self, support)
        return {"C": 10.0 ** np.arange(-1, 5), "names": np.array([names])}  # C ascends: a start is the last solution

    def _learn(self, support: Support, points: Points) -> Learned:
        x, y = support.image.astype(np.float64), support.labels
        biased = support.text is None
        centre = x.mean(0) * biased  # under a free bias this changes the steps to the solution and not the solution
        x -= centre
        zero_shot = self._base(support.frozen, support.text).astype(np.float64)
        rows, classes = np.arange(len(y)), support.classes
        at = np.zeros(classes * (x.shape[1] + 1))
        found = np.empty((len(points), classes, x.shape[1] + 1))

        def loss(flat: np.ndarray, strength: float, base: np.ndarray) -> tuple[float, np.ndarray]:
            weight = flat.reshape(classes, -1)
            log_p = log_softmax(base + x @ weight[:, :-1].T + weight[:, -1])
            off = np.exp(log_p)
            off[rows, y] -= 1
            off /= len(y)
            gradient = np.empty_like(weight)
            gradient[:, :-1] = off.T @ x + weight[:, :-1] * strength
            gradient[:, -1] = off.sum(0) * biased
            value = -log_p[rows, y].mean() + strength / 2 * float((weight[:, :-1] ** 2).sum())
            return float(value), gradient.ravel()

        final = len(points) == 1
        limits = {"maxiter": self.iterations if final else 100, "ftol": 1e-10 if final else 1e-7, "gtol": 1e-6}
        for p, point in enumerate(points):
            strength = 1 / (point["C"] * len(y))
            given = (strength, point["names"] * zero_shot)
            at = minimize(loss, at, args=given, jac=True, method="L-BFGS-B", options=limits).x
            found[p] = at.reshape(classes, -1)
            if support.text is not None:  # a Z = Z + (a - 1) Z, and Z is linear, too
                found[p, :, :-1] += (point["names"] - 1) * self.logit_scale * support.text
        found[:, :, -1] -= found[:, :, :-1] @ centre
        weights = found.astype(support.image.dtype)
        return {"weight": weights[:, :, :-1], "bias": weights[:, :, -1]}

    def _terms(
        self, learned: Learned, points: Points, X: Float[np.ndarray, "v D"], image: Float[np.ndarray, "v E"]
    ) -> Iterator[Sequence[Float[np.ndarray, "v C"]]]:
        for weight, bias in zip(learned["weight"], learned["bias"], strict=True):
            yield (image @ weight.T + bias,)


class LPPlusPlus(Head):
    """A linear probe with a trained weight for each class's text. Huang et al. 2024, arXiv:2404.02285 (LP++).

    Full-batch descent with no learning rate to choose: V with momentum 0.9 at 4 n / lambda, where lambda is the largest
    eigenvalue of G^T G, b likewise at 4, alpha at n / (4 max_c sum_i (f_i . w_c)^2), every tenth epoch. It starts from
    the sums of each class's images and from alpha = 250 times the mean cosine of an image with its own text.

    The published code differs in three ways: b moves at the rate of V, at which it diverges where features are spread;
    it starts at random; and the gradient of alpha, never set back, adds up all earlier ones.

    Args:
        epochs: after which it stops; None: chosen. Without a choice: 300, which are trained in the paper, where the
            epoch that is best on validation is kept, the later of equals.
        policy: how None is filled; see `vicinal.heads.selection`.
        logit_scale: unused; the text's weight is trained.
    """

    text_use: ClassVar[TextUse] = "needed"
    hyperparameters: ClassVar[tuple[str, ...]] = ("epochs",)

    epochs_: float

    def __init__(self, *, epochs: int | None = None, policy: str = "support_cv", logit_scale: float = 100.0) -> None:
        self.epochs = epochs
        self.policy = policy
        self.logit_scale = logit_scale

    def _defaults(self, support: Support) -> dict[str, float]:
        return {"epochs": 300.0}

    def _grid(self, support: Support, *, published: bool) -> dict[str, Float[np.ndarray, "n"]]:
        return {"epochs": np.arange(300, -1, -10.0)}  # the first of equals wins: the later

    def _learn(self, support: Support, points: Points) -> Learned:
        assert support.text is not None
        labels, rows = support.labels, np.arange(len(support))
        x = np.hstack([support.image, np.ones((len(support), 1), dtype=support.image.dtype)])
        cosines = support.frozen @ support.text.T
        weight = np.zeros((support.classes, x.shape[1]), dtype=x.dtype)
        np.add.at(weight, labels, x)
        weight[:, -1] = 0
        alpha = np.full(support.classes, 250 * cosines[rows, labels].mean(), dtype=x.dtype)
        rate = np.full(x.shape[1], 4 * len(x) / np.linalg.eigvalsh(support.image.T @ support.image)[-1], dtype=x.dtype)
        rate[-1] = 4
        rate_of_alpha = len(x) / (4 * np.square(cosines).sum(0).max())
        moving = np.zeros_like(weight)
        asked = [int(point["epochs"]) for point in points]
        weights, alphas = (
            np.empty((len(points), *weight.shape), x.dtype),
            np.empty((len(points), *alpha.shape), x.dtype),
        )
        for epoch in range(max(asked) + 1):
            for p in (p for p, last in enumerate(asked) if last == epoch):
                weights[p], alphas[p] = weight, alpha
            off = np.exp(log_softmax(x @ weight.T + alpha * cosines))
            off[rows, labels] -= 1
            off /= len(x)
            if epoch % 10 == 9:
                alpha = alpha - rate_of_alpha * (off * cosines).sum(0)
            moving = x.dtype.type(0.9) * moving + off.T @ x
            weight = weight - rate * moving
        return {"weight": weights[:, :, :-1], "bias": weights[:, :, -1], "alpha": alphas, "text": support.text}

    def _base(self, X: Float[np.ndarray, "v D"], text: Float[np.ndarray, "C D"] | None) -> Float[np.ndarray, "v C"]:
        return super()._base(X, None)  # the text has a weight of its own

    def _terms(
        self, learned: Learned, points: Points, X: Float[np.ndarray, "v D"], image: Float[np.ndarray, "v E"]
    ) -> Iterator[Sequence[Float[np.ndarray, "v C"]]]:
        cosines = X @ learned["text"].T
        for weight, bias, alpha in zip(learned["weight"], learned["bias"], learned["alpha"], strict=True):
            yield (image @ weight.T + bias + alpha * cosines,)


class CLAP(Head):
    """Text prototypes tuned under a penalty that each class earns. Silva-Rodriguez et al. 2024, arXiv:2312.12730.

    lambda_c is the mean zero-shot probability of class c for its own support images: what zero-shot knows is held
    fast. Nothing is chosen on labels, so there is no policy.

    Args:
        epochs: of SGD with momentum 0.9, its rate falling as a cosine; the first at 1e-5. The paper: 300.
        lr: The paper: 0.1.
        batch_size: The paper: 256.
        length: that unit text vectors are given. The paper has CLIP's raw text vectors; the penalty and the step depend
            on their length. Text of another length than 1 keeps its own.
        seed: of the order of the images.
        logit_scale: s. CLIP's: 100.
    """

    text_use: ClassVar[TextUse] = "needed"
    adapted_use: ClassVar[Literal["yes", "without text", "no"]] = "no"

    def __init__(
        self,
        *,
        epochs: int = 300,
        lr: float = 0.1,
        batch_size: int = 256,
        length: float = 10.0,
        seed: int = 0,
        logit_scale: float = 100.0,
    ) -> None:
        self.epochs = epochs
        self.lr = lr
        self.batch_size = batch_size
        self.length = length
        self.seed = seed
        self.logit_scale = logit_scale

    def _learn(self, support: Support, points: Points) -> Learned:
        assert support.text is not None
        assert support.lengths is not None
        known = np.exp(log_softmax(super()._base(support.frozen, support.text)))
        own = known[np.arange(len(support)), support.labels]
        strength = torch.from_numpy(np.bincount(support.labels, own) / np.bincount(support.labels)).to(torch.float32)
        lengths = np.where(np.abs(support.lengths - 1) < 1e-3, self.length, support.lengths)
        start = torch.from_numpy(support.text * lengths[:, None]).float()
        images, labels = torch.from_numpy(support.frozen).float(), torch.from_numpy(support.labels)
        weight = nn.Parameter(start.clone())
        optimizer = torch.optim.SGD([weight], lr=self.lr, momentum=0.9)
        generator = torch.Generator().manual_seed(self.seed)
        for epoch in range(self.epochs):
            rate = 1e-5 if epoch == 0 else self.lr * (1 + math.cos(math.pi * epoch / self.epochs)) / 2
            optimizer.param_groups[0]["lr"] = rate
            for rows in torch.randperm(len(labels), generator=generator).split(self.batch_size):  # type: ignore[no-untyped-call]
                logits = self.logit_scale * images[rows] @ normalize(weight, dim=1).T
                held = (strength * (weight - start).square().sum(1)).mean()
                loss = cross_entropy(logits, labels[rows]) + held
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return {"weight": normalize(weight.detach(), dim=1).numpy().astype(support.frozen.dtype)}

    def _base(self, X: Float[np.ndarray, "v D"], text: Float[np.ndarray, "C D"] | None) -> Float[np.ndarray, "v C"]:
        return super()._base(X, None)  # the trained prototypes stand in its place

    def _terms(
        self, learned: Learned, points: Points, X: Float[np.ndarray, "v D"], image: Float[np.ndarray, "v E"]
    ) -> Iterator[Sequence[Float[np.ndarray, "v C"]]]:
        for _ in points:
            yield ((X @ learned["weight"].T) * X.dtype.type(self.logit_scale),)
