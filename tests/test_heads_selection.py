"""How hyper-parameters are chosen: the searches against plain loops, honesty of the folds, the policies."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize, minimize_scalar

from vicinal.heads import (
    APE,
    GDA,
    HEADS,
    POLICIES,
    Head,
    LinearProbe,
    ProKeR,
    TipAdapter,
    TipX,
    Validation,
    transferred,
)
from vicinal.heads.selection import ALPHAS, BETAS, GAMMAS, _likelihood, search_accuracy
from vicinal.heads.support import Support
from vicinal.types import InputError

C, D = 6, 16


def clusters(shots: int, seed: int = 0, noise: float = 0.9) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(C, D))
    y = np.repeat(np.arange(C), shots)
    text = centres + np.random.default_rng(98).normal(size=(C, D))
    return centres[y] + noise * rng.normal(size=(len(y), D)) + 0.5, y, text


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# -------------------------------------------------------------------------------------------------------- the searches


def test_all_weights_at_once_are_the_double_loop():
    rng = np.random.default_rng(0)
    base, near, far = rng.normal(size=(300, 9)), rng.normal(size=(300, 9)), rng.normal(size=(300, 9))
    y = rng.integers(0, 9, 300)
    alphas, gammas = np.linspace(0, 3, 31), np.linspace(0, 2, 7)
    found = search_accuracy(base, [near, far], y, [alphas, gammas])
    for (a, alpha), (g, gamma) in itertools.product(enumerate(alphas), enumerate(gammas)):
        assert found[a, g] == ((base + alpha * near + gamma * far).argmax(1) == y).sum()


def test_a_tie_is_a_miss():
    y = np.array([0, 1])
    zeros = np.zeros((2, 3))
    assert search_accuracy(zeros, [zeros], y, [np.array([0.0, 1.0])]).tolist() == [[0], [0]]
    led = np.array([[1.0, 0, 0], [0, 1, 0]])
    assert search_accuracy(led, [zeros], y, [np.array([0.0, 1.0])]).tolist() == [[2], [2]]
    assert search_accuracy(zeros, [led], y, [np.array([0.0, 1.0])]).tolist() == [[0], [2]]


def test_likeliest_scales_are_the_minimum():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 60)
    features = rng.normal(size=(3, 60, 5))
    features[1, np.arange(60), y] += 1.5
    features[2, np.arange(60), y] -= 1.0  # of no use: its scale must be 0

    def loss(s: np.ndarray) -> float:
        logits = np.tensordot(s, features, 1)
        nll = np.log(np.exp(logits - logits[np.arange(60), y][:, None]).sum(1)).mean()
        return nll + ((s[0] - 1) ** 2 + (s[1] ** 2 + s[2] ** 2) / 400) / 120

    value, scale = _likelihood(features, y, None)
    other = minimize(loss, [1.0, 0, 0], bounds=[(1e-2, None), (0, None), (0, None)], method="L-BFGS-B")
    np.testing.assert_allclose(value, other.fun, rtol=1e-5)
    np.testing.assert_allclose(scale, other.x, atol=5e-3)
    assert scale[2] == 0
    again, _ = _likelihood(features, y, np.array([3.0, 0.0, 9.0]))  # from anywhere
    np.testing.assert_allclose(again, value, rtol=1e-5)


def published_loop(
    head: Head,
    X: np.ndarray,
    y: np.ndarray,
    Q: np.ndarray,
    asked: np.ndarray,
    text: np.ndarray,
    gammas: np.ndarray | None,
):
    """The double (triple) loop of the published code, strict >, for Tip-Adapter and Tip-X."""
    plain = type(head)(**dict.fromkeys(head.hyperparameters, 0.0), policy="fixed").fit(X, y, text=text)
    far = plain.logits(Q) * 0
    if gammas is not None:
        far = type(head)(alpha=0.0, beta=1.0, gamma=1.0).fit(X, y, text=text).logits(Q) - plain.logits(Q)
    base, affinity, onehot = 100 * unit(Q) @ unit(text).T, unit(Q) @ unit(X).T, np.eye(C)[y]
    best, winner = -1.0, None
    for beta in BETAS:
        near = np.exp(-beta * (1 - affinity)) @ onehot
        for alpha in ALPHAS:
            for gamma in [0.0] if gammas is None else gammas:
                accuracy = float(((base + alpha * near + gamma * far).argmax(1) == asked).mean())
                if accuracy > best:
                    best, winner = accuracy, (beta, alpha, gamma)
    return best, winner


def test_the_published_grid_has_the_winner_of_the_published_loop():
    X, y, text = clusters(4, noise=2.0)
    Q, asked, _ = clusters(20, seed=1, noise=2.0)
    head = TipAdapter(policy="full_val").fit(X, y, text=text, validation=Validation(Q, asked))
    best, (beta, alpha, _) = published_loop(head, X, y, Q, asked, text, None)
    assert (head.beta_, head.alpha_) == (beta, alpha)
    assert head.selection_.accuracy == best
    assert head.selection_.candidates == 4000
    assert (head.predict(Q) == asked).mean() == best
    assert head.alpha_ > 0


def test_three_weights_too(monkeypatch: pytest.MonkeyPatch):
    X, y, text = clusters(3, noise=2.0)
    Q, asked, _ = clusters(8, seed=1, noise=2.0)
    head = TipX(policy="full_val").fit(X, y, text=text, validation=Validation(Q, asked))
    assert head.selection_.candidates == 200 * 20 * 50
    import vicinal.heads.cache as cache

    few = {"BETAS": BETAS[::5], "ALPHAS": ALPHAS[::10], "GAMMAS": GAMMAS[::7]}
    for name, grid in few.items():
        monkeypatch.setattr(cache, name, grid)
        monkeypatch.setitem(globals(), name, grid)
    head = TipX(policy="full_val").fit(X, y, text=text, validation=Validation(Q, asked))
    best, (beta, alpha, gamma) = published_loop(head, X, y, Q, asked, text, few["GAMMAS"])
    assert (head.beta_, head.alpha_, head.gamma_) == (beta, alpha, gamma)
    assert head.selection_.accuracy == best


@pytest.mark.parametrize("kind", [TipAdapter, TipX, APE, GDA, ProKeR, LinearProbe])
def test_chosen_values_are_as_good_as_it_says(kind: type):
    X, y, text = clusters(4, noise=2.0)
    Q, asked, _ = clusters(10, seed=1, noise=2.0)
    head = kind(policy="full_val").fit(X, y, text=text, validation=Validation(Q, asked))
    assert (head.predict(Q) == asked).mean() == pytest.approx(head.selection_.accuracy, abs=0.02)
    assert head.policy_ == "full_val"
    assert head.selection_.labels == len(y) + len(asked)


# --------------------------------------------------------------------------------------------------------- the folds


def noise_views(labels_of: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images that say nothing of their class, each in three almost equal views."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(24 * C, 40))
    X = np.repeat(images, 3, axis=0) + (1e-3 * rng.normal(size=(72 * C, 40)) if labels_of == "near" else 0)
    return X, np.repeat(np.arange(C), 72), np.repeat(np.arange(24 * C), 3)


@pytest.mark.parametrize("kind", [TipAdapter, TipX, APE, GDA, ProKeR, LinearProbe])
def test_a_row_never_meets_a_view_of_itself(kind: type):
    X, y, groups = noise_views("near")
    text = np.random.default_rng(1).normal(size=(C, 40))
    honest = kind().fit(X, y, text=text, groups=groups).selection_
    assert honest.policy == "support_cv"
    assert honest.accuracy == pytest.approx(1 / C, abs=0.09)
    assert honest.nll > np.log(C) - 0.15
    fooled = kind().fit(X, y, text=text).selection_
    assert fooled.accuracy > 0.3  # so this test can fail


def test_exact_copies_are_one_image():
    X, y, _ = noise_views("same")
    text = np.random.default_rng(1).normal(size=(C, 40))
    head = TipAdapter().fit(X, y, text=text)
    assert head.selection_.accuracy == pytest.approx(1 / C, abs=0.09)
    assert head.selection_.labels == 24 * C


def support(y: np.ndarray, groups: np.ndarray | None = None) -> Support:
    X = np.random.default_rng(0).normal(size=(len(y), D))
    return Support.build(X, y, text=None, adapted=None, groups=groups)


def test_folds_leave_every_class_the_same():
    for shots, count in ((2, 2), (3, 3), (4, 4), (8, 4), (16, 4)):
        parts = support(np.repeat(np.arange(C), shots))
        folds = parts.folds()
        assert len(folds) == count
        assert np.array_equal(np.sum(folds, axis=0), np.ones(len(parts)))
        for mask in folds:
            left = np.bincount(parts.labels[~mask])
            assert left.max() - left.min() <= 1
    assert support(np.arange(C)).folds() == []


def test_folds_keep_groups_whole_and_classes_alive():
    y = np.array([0] * 6 + [1] * 6 + [2] * 2 + [3])
    groups = np.array(list("aabbccddaaeeffg"))  # a in two classes, f and g the only ones of theirs
    parts = support(y, groups)
    folds = parts.folds()
    assert folds
    for mask in folds:
        assert set(parts.labels[~mask].tolist()) == {0, 1, 2, 3}
        out = set(parts.groups[mask].tolist())
        assert out.isdisjoint(parts.groups[~mask].tolist())
    never = ~np.any(folds, axis=0)
    assert set(parts.labels[never].tolist()) == {2, 3}


def test_one_shot_cannot_be_validated():
    X, y, text = clusters(1)
    for name, kind in HEADS.items():
        if kind.hyperparameters:
            settings = {"epochs": 2} if name == "tip_adapter_f" else {}
            head = kind(**settings).fit(X, y, text=text)
            assert (head.policy_, head.selection_.asked) == ("fixed", "support_cv")
            assert "none can be held out" in head.selection_.reason
    head = TipAdapter().fit(np.repeat(X, 5, axis=0), np.repeat(y, 5), text=text)
    assert head.policy_ == "fixed"  # five copies of an image are one


def test_one_shot_weighs_names_by_how_well_they_fit():
    X, y, text = clusters(1)
    poor = text + 3 * np.random.default_rng(0).normal(size=text.shape)
    base = 100 * unit(X) @ unit(poor).T

    def loss(a: float) -> float:
        logits = a * (base - base[np.arange(C), y][:, None])
        return np.log(np.exp(logits).sum(1)).mean() + (a - 1) ** 2 / 2 / C

    best = minimize_scalar(loss, bounds=(1e-2, 5), method="bounded").x
    head = TipX(gamma=2.0).fit(X, y, text=poor)
    assert head.alpha_ == pytest.approx(1 / best, rel=1e-2)
    assert (head.beta_, head.gamma_) == (5.5, 2.0)  # not a weight; given
    assert head.temperature_ == pytest.approx(1 / best, rel=1e-2)
    assert ProKeR().fit(X, y, text=poor).correction_ == pytest.approx(1 / best, rel=1e-2)
    assert LinearProbe().fit(X, y, text=poor).names_ == pytest.approx(best, rel=1e-2)
    assert (ProKeR().fit(X, y).correction_, LinearProbe().fit(X, y).names_) == (1, 1)  # no names
    assert GDA().fit(X, y).alpha_ == 0.1


@pytest.mark.parametrize(("kind", "gain"), [(GDA, 0.1), (ProKeR, 0.03), (LinearProbe, 0.1)])
def test_one_shot_beside_good_and_poor_names(kind: type, gain: float):
    rng = np.random.default_rng(2)
    centres, y = unit(rng.normal(size=(60, 64))), np.arange(60)
    X = unit(centres + 2 * unit(rng.normal(size=(60, 64))))
    asked = np.tile(y, 10)
    Q = unit(centres[asked] + 2 * unit(rng.normal(size=(600, 64))))
    right = {}
    for name, distance in (("good", 0.5), ("poor", 6.0)):
        text = unit(centres + distance * unit(rng.normal(size=(60, 64))))
        for policy in ("fixed", "support_cv"):
            head = kind(policy=policy).fit(X, y, text=text)
            right[name, policy] = (head.predict(Q) == asked).mean()
            defaults = {"alpha": 0.1} if kind is GDA else {"correction": 1.0} if kind is ProKeR else {"names": 1.0}
            assert policy != "fixed" or head.selection_.values.items() >= defaults.items()  # to the digit
    assert right["poor", "support_cv"] > right["poor", "fixed"] + gain
    assert right["good", "support_cv"] > right["good", "fixed"] - 0.02


def test_cross_validation_is_worth_it():
    """Text that says little, images that say much: the chosen weights must see it; and the other way round."""
    X, y, text = clusters(8)
    Q, asked, _ = clusters(40, seed=1)
    noise = np.random.default_rng(0).normal(size=text.shape)
    poor = text + 3 * noise
    chosen, fixed = (TipAdapter(policy=p).fit(X, y, text=poor) for p in ("support_cv", "fixed"))
    assert (chosen.predict(Q) == asked).mean() > (fixed.predict(Q) == asked).mean() + 0.1
    rng = np.random.default_rng(1)
    nothing, nowhere = rng.normal(size=X.shape), rng.normal(size=Q.shape)
    kept = TipAdapter().fit(X, y, text=text, adapted=nothing)
    zero_shot = HEADS["zero_shot"]().fit(text=text).predict(Q)
    assert (kept.predict(Q, adapted=nowhere) == zero_shot).mean() > 0.97


def test_probabilities_are_calibrated_by_it():
    X, y, text = clusters(8, noise=1.5)
    Q, asked, _ = clusters(40, seed=1, noise=1.5)
    head = GDA().fit(X, y, text=text)

    def nll(temperature: float) -> float:
        head.temperature_ = temperature
        return float(-np.log(head.predict_proba(Q)[np.arange(len(asked)), asked] + 1e-300).mean())

    fitted = head.temperature_
    assert fitted > 1.5  # text logits times 100 are too sure here
    assert nll(fitted) < 0.5 * nll(1.0)
    assert nll(fitted) < min(nll(t) for t in np.geomspace(0.1, 100, 40)) + 0.1


# ------------------------------------------------------------------------------------------------------ the policies


def test_choosing_on_test_is_refused():
    X, y, text = clusters(2)
    for kind in (kind for kind in HEADS.values() if kind.hyperparameters):
        with pytest.raises(InputError, match="would choose hyper-parameters on the test set"):
            kind(policy="oracle_test").fit(X, y, text=text, validation=Validation(X + 1, y))
    assert "oracle_test" not in POLICIES


def test_policies_say_what_they_need():
    X, y, text = clusters(2)
    held = Validation(X + 1, y)
    for policy, validation, match in [
        ("best", None, "unknown; there are fixed"),
        ("full_val", None, "needs validation"),
        ("fewshot_val", None, "needs validation"),
        ("fixed", held, "does not use a validation set"),
        ("support_cv", held, "does not use a validation set"),
        ("transfer", None, "needs a value for beta, alpha"),
        ("fewshot_val", Validation(np.tile(X, (2, 1)) + np.arange(1, 25)[:, None], np.tile(y, 2)), r"min\(K, 4\) = 2"),
        ("full_val", Validation(X, y), "stands in the support set"),
        ("full_val", Validation(X + 1, y + 1), "label 6, which no support image has"),
        ("full_val", Validation(X[:, :3], y), "rows of 3 numbers"),
        ("full_val", Validation(X + 1, y, X), "or of neither"),
    ]:
        with pytest.raises(InputError, match=match):
            TipAdapter(policy=policy).fit(X, y, text=text, validation=validation)
    with pytest.raises(InputError, match="no hyper-parameter to choose"):
        HEADS["nearest_prototype"]().fit(X, y, validation=held)
    with pytest.raises(InputError, match="no hyper-parameter to choose"):
        HEADS["zero_shot"]().fit(X, y, text=text, validation=held)


def test_given_values_stay():
    X, y, text = clusters(4)
    head = TipAdapter(beta=7.0).fit(X, y, text=text)
    assert (head.beta_, head.policy_) == (7.0, "support_cv")
    assert head.alpha_ != 1.0
    head = TipX(alpha=2.0, gamma=3.0).fit(X, y, text=text)
    assert (head.alpha_, head.gamma_) == (2.0, 3.0)
    head = TipAdapter(alpha=2.0, beta=7.0).fit(X, y, text=text)
    assert (head.policy_, head.selection_.reason) == ("fixed", "every hyper-parameter was given")
    held = Validation(X + 0.1, y)
    head = TipAdapter(alpha=2.0, policy="full_val").fit(X, y, text=text, validation=held)
    assert (head.alpha_, head.selection_.candidates) == (2.0, 20)


def test_transfer():
    X, y, text = clusters(4)
    here = TipX().fit(X, y, text=text)
    there = transferred(here).fit(X[:, ::-1] + 1, y, text=text)
    assert there.policy_ == "transfer"
    assert there.selection_.values == here.selection_.values
    assert not hasattr(transferred(here), "selection_")
    with pytest.raises(ValueError, match="fitted head"):
        transferred(TipX())


def test_a_few_validation_shots():
    X, y, text = clusters(2)
    V, w, _ = clusters(2, seed=5)
    head = TipAdapter(policy="fewshot_val").fit(X, y, text=text, validation=Validation(V, w))
    assert (head.policy_, head.selection_.labels) == ("fewshot_val", 24)
    adapted = TipAdapter(policy="fewshot_val").fit(X, y, text=text, adapted=X, validation=Validation(V, w, V))
    assert adapted.selection_ == head.selection_


def test_a_large_support_is_searched_on_a_part(monkeypatch: pytest.MonkeyPatch):
    import vicinal.heads.selection as selection

    X, y, text = clusters(100, noise=2.0)
    whole = TipAdapter().fit(X, y, text=text)
    monkeypatch.setattr(selection, "_HELD_NUMBERS", 20 * C * 300)
    part = TipAdapter().fit(X, y, text=text)
    assert part.selection_.accuracy == pytest.approx(whole.selection_.accuracy, abs=0.06)
    assert part.selection_.nll != whole.selection_.nll
