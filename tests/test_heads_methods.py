"""Each head against its formula in float64, by loops that know nothing of the code."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from vicinal.heads import (
    APE,
    CLAP,
    GDA,
    Head,
    LinearProbe,
    LPPlusPlus,
    NearestPrototype,
    ProKeR,
    TipAdapter,
    TipAdapterF,
    TipX,
    Validation,
    ZeroShot,
)
from vicinal.heads.cache import class_sums, kernels
from vicinal.types import InputError

C, D, E, Q = 4, 7, 5, 9
SHOTS = {"even": [3, 3, 3, 3], "odd": [1, 4, 2, 3]}
Rows = list[list[float]]


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(a: Sequence[float]) -> list[float]:
    length = math.sqrt(dot(a, a))
    return [x / length for x in a]


def softmax(a: Sequence[float]) -> list[float]:
    e = [math.exp(x - max(a)) for x in a]
    return [x / sum(e) for x in e]


class Task:
    """Support, queries and text, as arrays and as unit rows in plain lists."""

    def __init__(self, shots: str) -> None:
        rng = np.random.default_rng(len(shots))
        self.y = np.repeat(np.arange(C), SHOTS[shots])
        n = len(self.y)
        centres = rng.normal(size=(C, D))
        self.X, self.T = centres[self.y] + rng.normal(size=(n, D)), centres + rng.normal(size=(C, D))
        self.Q = rng.normal(size=(Q, D))
        self.Q[0] = self.X[0]  # nearer to an image than any two of the support set
        self.A, self.QA = rng.normal(size=(n, E)), rng.normal(size=(Q, E))
        self.A += 2 * rng.normal(size=(C, E))[self.y]
        self.F, self.f, self.W, self.G, self.g = (
            [unit(row) for row in rows.tolist()] for rows in (self.X, self.Q, self.T, self.A, self.QA)
        )

    def zero_shot(self) -> Rows:
        return [[100 * dot(f, w) for w in self.W] for f in self.f]

    def spaces(self, adapted: bool) -> tuple[Rows, Rows]:
        return (self.G, self.g) if adapted else (self.F, self.f)


@pytest.fixture(params=list(SHOTS))
def task(request: pytest.FixtureRequest) -> Task:
    return Task(request.param)


both = pytest.mark.parametrize("adapted", [False, True])


def same(head: Head, task: Task, adapted: bool, expected: Rows, text: bool = True) -> None:
    head.fit(task.X, task.y, text=task.T if text else None, adapted=task.A if adapted else None)
    found = head.logits(task.Q, adapted=task.QA if adapted else None)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_zero_shot(task: Task):
    np.testing.assert_allclose(ZeroShot().fit(text=task.T).logits(task.Q), task.zero_shot(), rtol=1e-12)


@both
def test_nearest_prototype(task: Task, adapted: bool):
    keys, queries = task.spaces(adapted)
    prototypes = []
    for c in range(C):
        rows = [key for key, label in zip(keys, task.y, strict=True) if label == c]
        prototypes.append(unit([sum(column) for column in zip(*rows, strict=True)]))
    same(NearestPrototype(), task, adapted, [[100 * dot(q, p) for p in prototypes] for q in queries])


def cache(keys: Rows, queries: Rows, y: Sequence[int], beta: float, weight: Sequence[float] | None = None) -> Rows:
    sums = [[0.0] * C for _ in queries]
    for i, q in enumerate(queries):
        for j, key in enumerate(keys):
            sums[i][y[j]] += math.exp(-beta * (1 - dot(q, key))) * (weight[j] if weight else 1)
    return sums


def added(*parts: tuple[float, Rows]) -> Rows:
    return [[sum(w * rows[i][c] for w, rows in parts) for c in range(C)] for i in range(Q)]


@both
@pytest.mark.parametrize("text", [True, False])
def test_tip_adapter(task: Task, adapted: bool, text: bool):
    keys, queries = task.spaces(adapted)
    near = cache(keys, queries, task.y.tolist(), 3.3)
    base = task.zero_shot() if text else [[0.0] * C] * Q
    same(TipAdapter(alpha=2.5, beta=3.3), task, adapted, added((1, base), (2.5, near)), text)


def test_the_kernel_is_a_gaussian_on_the_sphere(task: Task):
    near = cache(task.F, task.f, task.y.tolist(), 3.0)
    gauss = [[0.0] * C for _ in range(Q)]
    for i, f in enumerate(task.f):
        for j, key in enumerate(task.F):
            gauss[i][task.y[j]] += math.exp(-1.5 * sum((a - b) ** 2 for a, b in zip(f, key, strict=True)))
    np.testing.assert_allclose(near, gauss, rtol=1e-12)


def test_no_cache_is_zero_shot_exactly(task: Task):
    plain = ZeroShot().fit(text=task.T).logits(task.Q)
    for head in (
        TipAdapter(alpha=0.0, beta=5.5),
        TipAdapterF(alpha=0.0, beta=5.5, epochs=2),
        TipX(alpha=0.0, beta=5.5, gamma=0.0),
        APE(alpha=0.0, beta=5.5, gamma=0.1),
        GDA(alpha=0.0),
    ):
        assert np.array_equal(head.fit(task.X, task.y, text=task.T).logits(task.Q), plain), head


@both
def test_tip_x(task: Task, adapted: bool):
    keys, queries = task.spaces(adapted)
    y = task.y.tolist()

    def known(f: Sequence[float]) -> list[float]:
        return softmax([dot(f, w) / 0.5 for w in task.W])

    def divergence(a: Sequence[float], b: Sequence[float]) -> float:
        return sum(p * math.log(p / q) for p, q in zip(known(a), known(b), strict=True))

    pairs = [(i, j) for i in range(len(y)) for j in range(len(y)) if i != j]
    kls = [divergence(task.F[i], task.F[j]) for i, j in pairs]
    cosines = [dot(keys[i], keys[j]) for i, j in pairs]
    k0, k1, a0, a1 = min(kls), max(kls), min(cosines), max(cosines)
    pushed = [[0.0] * C for _ in range(Q)]
    clamped = 0
    for i in range(Q):
        for j in range(len(y)):
            share = (divergence(task.f[i], task.F[j]) - k0) / (k1 - k0)
            clamped += not 0 <= share <= 1
            pushed[i][y[j]] += a0 + (a1 - a0) * min(1.0, max(0.0, share))
    assert clamped
    expected = added((1, task.zero_shot()), (2.0, cache(keys, queries, y, 3.0)), (-0.7, pushed))
    same(TipX(alpha=2.0, beta=3.0, gamma=0.7), task, adapted, expected)


@pytest.mark.parametrize("space", ["frozen", "same width", "other width"])
def test_ape(task: Task, space: str):
    if space == "same width":
        task.A, task.QA = task.X[:, ::-1] ** 3, task.Q[:, ::-1] ** 3
        task.G, task.g = ([unit(row) for row in rows.tolist()] for rows in (task.A, task.QA))
    adapted = space != "frozen"
    keys, queries = task.spaces(adapted)
    y, share, w, gamma = task.y.tolist(), 0.7, 0.3, 0.8

    def channels(image: Rows, text: Rows | None) -> list[int]:
        pool = [(c, "image", j) for j, c in enumerate(y)] + [(c, "text", c) for c in range(C) if text]
        width = len(image[0])
        score = []
        for d in range(width):
            products = []
            for c, kind, i in pool:
                for c2, kind2, j in pool:
                    if c != c2:  # only two images are looked at in the adapted space
                        side = image if (kind, kind2) == ("image", "image") else task.F
                        products.append(
                            (side if kind == "image" else task.W)[i][d] * (side if kind2 == "image" else task.W)[j][d]
                        )
            s = sum(products) / len(products)
            if text:
                mean = sum(t[d] for t in text) / C
                s = w * s - (1 - w) * sum((t[d] - mean) ** 2 for t in text) / (C - 1)
            score.append(s)
        return sorted(sorted(range(width), key=lambda d: score[d])[: int(share * width)])

    def refined(rows: Rows, kept: Sequence[int]) -> Rows:
        return [unit([row[d] for d in kept]) for row in rows]

    kept = channels(keys, None if space == "other width" else task.W)
    own = channels(task.F, task.W)
    texts = refined(task.W, own)
    weight = []
    for j, key in enumerate(refined(task.F, own)):
        p = softmax([dot(key, t) for t in texts])[y[j]]
        weight.append(math.exp(gamma * math.log2((1 + 1e-6) / (p + 1e-6))))
    near = cache(refined(keys, kept), refined(queries, kept), y, 3.0, weight)
    head = APE(alpha=2.0, beta=3.0, gamma=gamma, channels=share, similarity=w)
    same(head, task, adapted, added((1, task.zero_shot()), (2.0, near)))


@both
def test_gda(task: Task, adapted: bool):
    keys, queries = (np.array(rows) for rows in task.spaces(adapted))
    n, width = keys.shape
    mean = np.stack([keys[task.y == c].mean(0) for c in range(C)])
    sigma = np.cov((keys - mean[task.y]).T)
    precision = width * np.linalg.pinv((n - 1) * sigma + np.trace(sigma) * np.eye(width))
    gauss = [[q @ precision @ m + math.log(1 / C) - m @ precision @ m / 2 for m in mean] for q in queries]
    same(GDA(alpha=0.3), task, adapted, added((1, task.zero_shot()), (0.3, gauss)))


def test_gda_of_one_shot_is_isotropic():
    task = Task("even")
    first = np.array([0, 3, 6, 9])
    head = GDA(alpha=1.0).fit(task.X[first], task.y[first])
    keys = np.array(task.F)[first]
    assert GDA(policy="fixed").fit(task.X[first], task.y[first], text=task.T).alpha_ == 0.1
    assert GDA(policy="fixed").fit(task.X, task.y, text=task.T).alpha_ == 1.0
    distance = ((np.array(task.f)[:, None] - keys) ** 2).sum(2)
    assert np.array_equal(head.predict(task.Q), distance.argmin(1))


@both
@pytest.mark.parametrize("text", [True, False])
def test_proker(task: Task, adapted: bool, text: bool):
    keys, queries = (np.array(rows) for rows in task.spaces(adapted))
    beta, ridge = 1.3, 0.07
    prior = np.array(task.F) @ np.array(task.W).T if text else np.zeros((len(keys), C))
    asked = np.array(task.f) @ np.array(task.W).T if text else np.zeros((Q, C))
    kernel = np.exp(-beta * (1 - keys @ keys.T))
    solved = np.linalg.inv(kernel / ridge + np.eye(len(keys))) @ (np.eye(C)[task.y] - prior)
    for weight in (1.0, 3.0):
        expected = 100 * (asked + weight * np.exp(-beta * (1 - queries @ keys.T)) @ solved)
        same(ProKeR(beta=beta, ridge=ridge, correction=weight), task, adapted, expected.tolist(), text)
    textbook = np.linalg.inv(kernel + ridge * np.eye(len(keys))) @ (np.eye(C)[task.y] - prior)
    np.testing.assert_allclose(solved, ridge * textbook, rtol=1e-8)


def test_proker_knows_its_size(monkeypatch: pytest.MonkeyPatch):
    task = Task("even")
    monkeypatch.setattr(ProKeR, "_MOST_SEARCHED", 3)
    head = ProKeR().fit(task.X, task.y)
    assert (head.beta_, head.ridge_) == (1.5, 0.05)  # three shots are nearer to four than to two
    monkeypatch.setattr(ProKeR, "_MOST", 3)
    with pytest.raises(InputError, match="12 x 12 numbers"):
        ProKeR().fit(task.X, task.y)


def test_linear_probe_is_logistic_regression(task: Task):
    for strength in (0.3, 30.0):
        head = LinearProbe(C=strength).fit(task.X, task.y)
        other = LogisticRegression(C=strength, tol=1e-10, max_iter=5000).fit(np.array(task.F), task.y)
        np.testing.assert_allclose(head.predict_proba(task.Q), other.predict_proba(np.array(task.f)), atol=1e-3)


def test_linear_probe_with_text_starts_from_zero_shot(task: Task):
    plain = ZeroShot().fit(text=task.T).logits(task.Q)
    for weight in (1.0, 0.3):
        near = LinearProbe(C=1e-9, names=weight).fit(task.X, task.y, text=task.T).logits(task.Q)
        np.testing.assert_allclose(near, weight * plain, atol=1e-6)
    free = LinearProbe(C=1e3).fit(task.X, task.y, text=task.T)
    assert (free.predict(task.X) == task.y).all()


def test_linear_probe_learns_what_weighed_names_leave_over(task: Task):
    """The gradient of the loss, taken by hand, is zero at what it found."""
    weight, strength = 0.3, 5.0
    head = LinearProbe(C=strength, names=weight).fit(task.X, task.y, text=task.T)
    F, W = np.array(task.F), np.array(task.W)
    learnt = head._learned["weight"][0] - (weight - 1) * 100 * W
    logits = 100 * weight * F @ W.T + F @ learnt.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    slope = (p - np.eye(C)[task.y]).T @ F / len(F) + learnt / (strength * len(F))
    assert np.abs(slope).max() < 1e-4 < np.abs(learnt).max()
    np.testing.assert_allclose(head.logits(task.X), logits, atol=1e-6)


def test_tip_adapter_f_before_training_is_tip_adapter(task: Task):
    plain = TipAdapter(alpha=2.0, beta=3.0).fit(task.X, task.y, text=task.T, adapted=task.A)
    head = TipAdapterF(alpha=2.0, beta=3.0, epochs=0).fit(task.X, task.y, text=task.T, adapted=task.A)
    np.testing.assert_allclose(head.logits(task.Q, adapted=task.QA), plain.logits(task.Q, adapted=task.QA), rtol=1e-12)


def test_tip_adapter_f_by_hand():
    """Two full-batch steps of AdamW on the cross-entropy, each key blind to its own image."""
    task = Task("odd")
    alpha, beta, lr = 2.0, 3.0, 0.05
    order = sorted(range(len(task.y)), key=lambda j: task.y[j])
    keys = torch.tensor([task.F[j] for j in order], dtype=torch.float64, requires_grad=True)
    images, y = keys.detach().clone(), torch.tensor([int(task.y[j]) for j in order])
    text = torch.tensor(task.W, dtype=torch.float64)
    first, second = torch.zeros_like(images), torch.zeros_like(images)
    for step in (1, 2):
        rate = lr * (1 + math.cos(math.pi * (step - 1) / 2)) / 2
        loss = torch.zeros((), dtype=torch.float64)
        for i in range(len(y)):
            logits = 100 * images[i] @ text.T
            for j in range(len(y)):
                if i != j:
                    bump = torch.zeros(C, dtype=torch.float64)
                    bump[y[j]] = 1
                    logits = logits + alpha * torch.exp(-beta * (1 - images[i] @ keys[j])) * bump
            loss = loss - torch.log_softmax(logits, 0)[y[i]] / len(y)
        (gradient,) = torch.autograd.grad(loss, keys)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        move = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-4)
        keys = (keys.detach() * (1 - rate * 0.01) - rate * move).requires_grad_()
    near = [[0.0] * C for _ in range(Q)]
    for i, f in enumerate(task.f):
        for j, key in enumerate(keys.tolist()):
            near[i][int(y[j])] += math.exp(-beta * (1 - dot(f, key)))
    head = TipAdapterF(alpha=alpha, beta=beta, epochs=2, lr=lr)
    same(head, task, False, added((1, task.zero_shot()), (alpha, near)))


@pytest.mark.parametrize("kind", [TipAdapterF, CLAP])
def test_a_seed_settles_training(kind: type):
    task = Task("even")

    def logits(seed: int) -> np.ndarray:
        return kind(epochs=4, batch_size=4, seed=seed, lr=0.1).fit(task.X, task.y, text=task.T).logits(task.Q)

    torch.manual_seed(1)
    one = logits(0)
    torch.manual_seed(2)
    assert np.array_equal(logits(0), one)
    assert not np.array_equal(logits(1), one)


@both
@pytest.mark.parametrize("epochs", [0, 9, 23])
def test_lp_plus_plus_by_hand(task: Task, adapted: bool, epochs: int):
    """The same descent by torch's autograd and its SGD."""
    keys, queries = (torch.tensor(rows, dtype=torch.float64) for rows in task.spaces(adapted))
    F, W, f = (torch.tensor(rows, dtype=torch.float64) for rows in (task.F, task.W, task.f))
    y = torch.from_numpy(task.y)
    V = torch.stack([keys[y == c].sum(0) for c in range(C)]).requires_grad_()
    b = torch.zeros(C, dtype=torch.float64, requires_grad=True)
    own = torch.stack([F[i] @ W[c] for i, c in enumerate(y)])
    alpha = (250 * own.mean()).expand(C).clone().requires_grad_()
    rate = 4 * len(keys) / torch.linalg.matrix_norm(keys, 2).item() ** 2
    of_alpha = len(keys) / (4 * max(sum((F[i] @ W[c]).item() ** 2 for i in range(len(F))) for c in range(C)))
    optimizer = torch.optim.SGD([{"params": [V], "lr": rate}, {"params": [b], "lr": 4.0}], momentum=0.9)
    for epoch in range(1, epochs + 1):
        optimizer.zero_grad()
        alpha.grad = None
        torch.nn.functional.cross_entropy(keys @ V.T + b + alpha * (F @ W.T), y).backward()
        optimizer.step()
        if epoch % 10 == 0:
            alpha.data -= of_alpha * alpha.grad
    expected = (queries @ V.T + b + alpha * (f @ W.T)).detach()
    same(LPPlusPlus(epochs=epochs), task, adapted, expected.tolist(), True)


def test_lp_plus_plus_does_not_diverge_on_spread_features():
    """At the rate of V, as published, the bias swings ever wider here."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(20), 8)
    X, text = rng.normal(size=(160, 200)), rng.normal(size=(20, 200))
    logits = [LPPlusPlus(epochs=epochs).fit(X, y, text=text).logits(X) for epochs in (0, 100, 300)]
    losses = [torch.nn.functional.cross_entropy(torch.from_numpy(z), torch.from_numpy(y)).item() for z in logits]
    assert losses[0] > losses[1] > losses[2]
    assert np.abs(LPPlusPlus(epochs=300).fit(X, y, text=text)._learned["bias"]).max() < 5


def test_lp_plus_plus_keeps_the_epoch_that_validates_best():
    X, y, text = (np.array(v) for v in (Task("even").X, Task("even").y, Task("even").T))
    rng = np.random.default_rng(3)
    held = Validation(X + 0.8 * rng.normal(size=X.shape), y)
    head = LPPlusPlus(policy="full_val").fit(X, y, text=text, validation=held)
    right = {e: (LPPlusPlus(epochs=e).fit(X, y, text=text).predict(held.X) == y).sum() for e in range(0, 301, 10)}
    best = max(right.values())
    assert head.epochs_ == max(e for e, n in right.items() if n == best)
    assert head.selection_.accuracy == best / len(y)


def test_clap_by_hand():
    task = Task("odd")
    X = np.array(task.F, dtype=np.float32)
    text = np.array(task.W, dtype=np.float32)
    known = np.array([softmax(row) for row in (100 * X.astype(np.float64) @ text.T.astype(np.float64)).tolist()])
    strength = torch.tensor([known[task.y == c, c].mean() for c in range(C)])
    start = 10 * torch.from_numpy(text).double()
    weight, velocity = start.clone().requires_grad_(), torch.zeros_like(start)
    for epoch in range(3):
        rate = 1e-5 if epoch == 0 else 0.1 * (1 + math.cos(math.pi * epoch / 3)) / 2
        logits = 100 * torch.from_numpy(X).double() @ (weight / weight.norm(dim=1, keepdim=True)).T
        held = (strength * ((weight - start) ** 2).sum(1)).sum() / C
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(task.y)) + held
        (gradient,) = torch.autograd.grad(loss, weight)
        velocity = 0.9 * velocity + gradient
        weight = (weight.detach() - rate * velocity).requires_grad_()
    final = (weight / weight.norm(dim=1, keepdim=True)).detach().numpy()
    head = CLAP(epochs=3).fit(X, task.y, text=text)
    np.testing.assert_allclose(head.logits(task.Q), 100 * np.array(task.f) @ final.T, atol=1e-2)
    longer = CLAP(epochs=3).fit(X, task.y, text=4 * text)  # its own length is kept
    assert not np.allclose(longer.logits(task.Q), head.logits(task.Q), atol=1e-2)


def test_kernels_by_steps_are_kernels():
    affinity = np.random.default_rng(0).uniform(-1, 1, size=(6, 8)).astype(np.float32)
    affinity[0, 0] = 1 + 1e-6
    for betas in (np.linspace(0, 20, 200), np.linspace(0, 20, 20), [5.5], [1.0, 2.0, 7.0], [3.0, 1.0]):
        for beta, kernel in zip(betas, kernels(affinity.copy(), list(betas)), strict=True):
            expected = np.exp(-beta * (1 - np.minimum(affinity.astype(np.float64), 1)))
            np.testing.assert_allclose(kernel, expected, rtol=2e-5)


def test_sums_over_classes():
    values = np.random.default_rng(0).normal(size=(3, 6))
    for labels in ([0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 2], [0] * 6):
        expected = values @ np.eye(max(labels) + 1)[labels]
        np.testing.assert_allclose(class_sums(values, np.array(labels)), expected, rtol=1e-12)
