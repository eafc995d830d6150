from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.linear_model import HuberRegressor

from cvxdistill.solvers.average_loss import AverageLoss
from cvxdistill.solvers.losses import LOSSES, HuberLoss, find_loss

ANY_LOSS = pytest.mark.parametrize("name", LOSSES)
CURVED = pytest.mark.parametrize("name", [name for name in LOSSES if name != "squared"])
SEED = given(seed=st.integers(0, 2**20))
FEW = settings(max_examples=20, deadline=None)


def draw(name, seed=0, n=12, c=3):
    """Predictions and targets; every class has an example."""
    rng = np.random.default_rng(seed)
    if name == "logistic":
        Y = np.where(np.arange(n)[:, None] % 3 > 0, 1.0, -1.0)
    elif name == "multinomial":
        Y = np.eye(c)[np.arange(n) % c]
    else:
        Y = 2 * rng.standard_normal((n, c))
    return rng.standard_normal(Y.shape), Y, rng


@ANY_LOSS
@FEW
@SEED
def test_integer_weights_are_repeated_rows(name, seed):
    Z, Y, rng = draw(name, seed)
    counts = rng.integers(1, 4, len(Y))
    weighted = AverageLoss(find_loss(name), Y, counts, fit_intercept=True)
    repeated = AverageLoss(find_loss(name), Y.repeat(counts, axis=0), fit_intercept=True)
    Z2 = Z + rng.standard_normal(Z.shape)
    many, many2 = (A.repeat(counts, axis=0) for A in (Z, Z2))
    assert weighted.value(Z) == pytest.approx(repeated.value(many), rel=1e-12)
    assert weighted.bregman(Z2, Z) == pytest.approx(repeated.bregman(many2, many), rel=1e-10)
    # -n grad L: what the copies of a row pull together, a mean over examples each.
    residual, copies = weighted.residual(Z) / len(Y), repeated.residual(many) / counts.sum()
    starts = np.r_[0, counts.cumsum()[:-1]]
    np.testing.assert_allclose(residual, np.add.reduceat(copies, starts), atol=1e-14)
    np.testing.assert_allclose(
        weighted.best_intercept(Z), repeated.best_intercept(many), rtol=1e-9, atol=1e-9
    )
    theta = 0.5 * residual * len(Y)
    spread = 0.5 * repeated.residual(many)
    assert weighted.dual_value(theta) == pytest.approx(repeated.dual_value(spread), rel=1e-10)
    assert weighted.fenchel_gap(Z, theta) == pytest.approx(
        repeated.fenchel_gap(many, spread), rel=1e-8, abs=1e-14
    )
    np.testing.assert_allclose(
        weighted.mean_hessian(weighted.residual(Z)),
        repeated.mean_hessian(repeated.residual(many)),
        atol=1e-13,
    )


@ANY_LOSS
@pytest.mark.parametrize("weighted", [False, True])
def test_residual_is_minus_n_times_the_gradient(name, weighted):
    Z, Y, rng = draw(name)
    loss = AverageLoss(find_loss(name), Y, rng.uniform(0.5, 2, len(Y)) if weighted else None)
    step, R = 1e-5, loss.residual(Z)
    for i, k in np.ndindex(*Z.shape):
        E = np.zeros_like(Z)
        E[i, k] = step
        slope = (loss.value(Z + E) - loss.value(Z - E)) / (2 * step)
        assert R[i, k] == pytest.approx(-len(Y) * slope, abs=1e-5)


@ANY_LOSS
@pytest.mark.parametrize("weighted", [False, True])
def test_hessian_is_n_times_the_second_derivative(name, weighted):
    Z, Y, rng = draw(name)
    loss = AverageLoss(find_loss(name), Y, rng.uniform(0.5, 2, len(Y)) if weighted else None)
    T, step = rng.standard_normal(Z.shape), 1e-6
    H = loss.hessian(loss.residual(Z))
    HT = H * T if H.ndim == 2 else np.einsum("nkl,nl->nk", H, T)
    expected = -(loss.residual(Z + step * T) - loss.residual(Z - step * T)) / (2 * step)
    np.testing.assert_allclose(HT, expected, atol=1e-6)
    np.testing.assert_allclose(
        loss.mean_hessian(loss.residual(Z)), H.mean(axis=0), rtol=1e-12, atol=1e-16
    )


@ANY_LOSS
@pytest.mark.parametrize("weighted", [False, True])
def test_the_pieces_of_the_fenchel_gap_add_up(name, weighted):
    Z, Y, rng = draw(name)
    loss = AverageLoss(find_loss(name), Y, rng.uniform(0.5, 2, len(Y)) if weighted else None)
    theta = 0.7 * loss.residual(rng.standard_normal(Z.shape))
    pieces = loss.value(Z) - loss.dual_value(theta) + np.vdot(Z, theta) / len(Y)
    assert loss.fenchel_gap(Z, theta) == pytest.approx(pieces, rel=1e-10)
    assert loss.fenchel_gap(Z, loss.residual(Z)) == pytest.approx(0, abs=1e-15)


@ANY_LOSS
def test_only_ratios_of_weights_matter(name):
    Z, Y, rng = draw(name)
    w = rng.uniform(0.5, 2, len(Y))
    one, ten = (AverageLoss(find_loss(name), Y, s * w) for s in (1, 10))
    assert one.value(Z) == pytest.approx(ten.value(Z), rel=1e-14)
    equal = AverageLoss(find_loss(name), Y, np.full(len(Y), 3.0))
    assert equal.value(Z) == AverageLoss(find_loss(name), Y).value(Z)


@ANY_LOSS
@FEW
@SEED
@pytest.mark.parametrize("offset", [0.0, 20.0, 1e4])
@pytest.mark.parametrize("weighted", [False, True])
def test_best_intercept_leaves_no_mean_residual_however_far_it_is(name, weighted, offset, seed):
    Z, Y, rng = draw(name, seed)
    Z += offset * rng.permutation([1.0, 0.0, -1.0])[: Z.shape[1]]
    weights = rng.uniform(0.1, 10, len(Y)) if weighted else None
    loss = AverageLoss(find_loss(name), Y, weights, fit_intercept=True)
    with np.errstate(all="raise", under="ignore"):
        b = loss.best_intercept(Z)
    assert b.shape == (Z.shape[1],)
    np.testing.assert_allclose(loss.residual(Z + b).mean(axis=0), 0, atol=1e-11 + 1e-15 * offset)


@CURVED
def test_best_intercept_is_where_scipy_finds_the_minimum(name):
    Z, Y, rng = draw(name)
    loss = AverageLoss(find_loss(name), Y, rng.uniform(0.5, 2, len(Y)), fit_intercept=True)
    b = loss.best_intercept(Z)
    found = minimize(lambda b: loss.value(Z + b), np.zeros(Z.shape[1]), tol=1e-10)
    np.testing.assert_allclose(b, found.x, atol=1e-5)
    assert loss.value(Z + b) <= found.fun + 1e-12


def test_best_intercept_of_huber_loss_withstands_outliers():
    rng = np.random.default_rng(0)
    Y = np.array([3.0, -5.0]) + rng.standard_normal((41, 2))
    Y[:5], Y[5:9, 1] = 1e6, -1e9
    loss = AverageLoss(HuberLoss(), Y, fit_intercept=True)
    b = loss.best_intercept(np.zeros_like(Y))
    np.testing.assert_allclose(loss.residual(np.zeros_like(Y) + b).mean(axis=0), 0, atol=1e-8)
    assert np.all(np.abs(b - [3.0, -5.0]) < 1)


def test_best_intercept_of_huber_loss_where_most_of_the_loss_is_flat():
    """Two far clusters: between them there is no curvature, and any point is as good."""
    Y = np.array([[0.0], [0.0], [1000.0], [1000.0]])
    loss = AverageLoss(HuberLoss(), Y, fit_intercept=True)
    b = loss.best_intercept(np.zeros_like(Y))
    np.testing.assert_allclose(loss.residual(np.zeros_like(Y) + b).mean(axis=0), 0, atol=1e-12)
    Y = np.array([[0.0], [0.0], [0.0], [1000.0], [1000.0]])
    loss = AverageLoss(HuberLoss(), Y, fit_intercept=True)
    b = loss.best_intercept(np.full_like(Y, -500.0))
    assert b[0] == pytest.approx(500 + 2 * 1.35 / 3)  # three pull back what two pull on


def test_huber_loss_without_scale_is_scikit_learns_objective_at_scale_1():
    """scikit-learn minimises sum(sigma + h_2(u / sigma) sigma), with h_2 twice ours."""
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((30, 2)), rng.standard_normal((30, 1))
    model = HuberRegressor(epsilon=1.35, alpha=0, tol=1e-10).fit(X, Y[:, 0])
    # At its scale sigma our loss of targets in units of sigma has no slope in the intercept.
    loss = AverageLoss(HuberLoss(1.35), Y / model.scale_, fit_intercept=True)
    b = loss.best_intercept(X @ model.coef_[:, None] / model.scale_)
    assert b[0] * model.scale_ == pytest.approx(model.intercept_, abs=1e-5)


def test_best_intercept_of_log_losses_is_the_log_odds():
    Y = np.array([[1.0], [1.0], [1.0], [-1.0]])
    loss = AverageLoss(find_loss("logistic"), Y, fit_intercept=True)
    assert loss.best_intercept(np.zeros_like(Y))[0] == pytest.approx(np.log(3), rel=1e-12)
    Y = np.eye(3)[[0, 1, 1, 2, 2, 2]]
    loss = AverageLoss(find_loss("multinomial"), Y, fit_intercept=True)
    b = loss.best_intercept(np.zeros_like(Y))
    np.testing.assert_allclose(b - b[0], np.log([1, 2, 3]), rtol=1e-12)
    assert b.sum() == pytest.approx(0, abs=1e-14)


@ANY_LOSS
@pytest.mark.parametrize("weighted", [False, True])
def test_float32_stays_float32(name, weighted):
    Z, Y, rng = draw(name)
    weights = rng.uniform(0.5, 2, len(Y)) if weighted else None
    loss = AverageLoss(find_loss(name), Y.astype(np.float32), weights, fit_intercept=True)
    exact = AverageLoss(find_loss(name), Y, weights, fit_intercept=True)
    Z32 = Z.astype(np.float32)
    R, b = loss.residual(Z32), loss.best_intercept(Z32)
    assert R.dtype == loss.hessian(R).dtype == b.dtype == np.float32
    assert loss.value(Z32) == pytest.approx(exact.value(Z), rel=1e-6)
    np.testing.assert_allclose(b, exact.best_intercept(Z), atol=1e-5)


def test_sums_accumulate_in_float64():
    n = 200_000
    Z, Y = np.full((n, 1), 0.1, np.float32), np.zeros((n, 1), np.float32)
    exact = float(np.float32(0.1)) ** 2 / 2
    for weights in (None, np.r_[2.0, np.ones(n - 1)]):
        loss = AverageLoss(find_loss("squared"), Y, weights)
        assert loss.value(Z) == pytest.approx(exact, rel=1e-7)
        assert loss.best_intercept(Z)[0] == pytest.approx(-0.1, rel=1e-6)


def test_means_of_hessians_are_formed_block_by_block(monkeypatch):
    Z, Y, rng = draw("multinomial", n=30)
    weights = rng.uniform(0.5, 2, len(Y))
    loss = AverageLoss(find_loss("multinomial"), Y, weights)
    R = loss.residual(Z)
    whole = loss.mean_hessian(R)
    monkeypatch.setattr("cvxdistill.solvers.rows.BLOCK_BYTES", 1)
    monkeypatch.setattr("cvxdistill.solvers.rows.SMALLEST_BLOCK", 7)
    np.testing.assert_allclose(loss.mean_hessian(R), whole, rtol=1e-13)


ONE_CLASS = np.ones((4, 1))
TWO_OF_THREE = np.eye(3)[[0, 1, 0, 1]]
REFUSED = {
    "logistic of zeros and ones": (
        lambda: AverageLoss(find_loss("logistic"), np.array([[0.0], [1.0]])),
        r"one column that holds only -1 and \+1, got 1 column\(s\) with values from 0 to 1",
    ),
    "logistic of two columns": (
        lambda: AverageLoss(find_loss("logistic"), np.ones((3, 2))),
        r"got 2 column\(s\) .* use 'multinomial'",
    ),
    "multinomial of one column": (
        lambda: AverageLoss(find_loss("multinomial"), ONE_CLASS),
        r"at least two classes, .* got 1 column\(s\)",
    ),
    "multinomial of negative targets": (
        lambda: AverageLoss(find_loss("multinomial"), np.array([[1.5, -0.5]])),
        "values from -0.5 to 1.5",
    ),
    "multinomial of targets that do not add up": (
        lambda: AverageLoss(find_loss("multinomial"), np.array([[0.5, 0.4]])),
        "not negative, with sum 1",
    ),
    "an intercept for one class": (
        lambda: AverageLoss(find_loss("logistic"), ONE_CLASS, fit_intercept=True),
        "examples of both classes in Y, got only 1",
    ),
    "an intercept for a class without examples": (
        lambda: AverageLoss(find_loss("multinomial"), TWO_OF_THREE, fit_intercept=True),
        r"examples of every class, got none of columns \[2\] of Y",
    ),
    "weights of text": (
        lambda: AverageLoss(find_loss("squared"), ONE_CLASS, ["a"] * 4),
        "sample_weight must hold real numbers, got dtype <U1",
    ),
    "too few weights": (
        lambda: AverageLoss(find_loss("squared"), ONE_CLASS, np.ones(3)),
        r"sample_weight must have shape \(4,\), got \(3,\)",
    ),
    "weights in a column": (
        lambda: AverageLoss(find_loss("squared"), ONE_CLASS, np.ones((4, 1))),
        r"sample_weight must have shape \(4,\), got \(4, 1\)",
    ),
    **{
        f"a weight of {value}": (
            lambda value=value: AverageLoss(find_loss("squared"), ONE_CLASS, [1, 1, value, 1]),
            "sample_weight must be positive and finite; leave rows of weight zero out",
        )
        for value in (0.0, -1.0, np.nan, np.inf)
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_without_an_intercept_one_class_will_do():
    Z = np.zeros((4, 1))
    assert AverageLoss(find_loss("logistic"), ONE_CLASS).value(Z) == pytest.approx(np.log(2))
    loss = AverageLoss(find_loss("multinomial"), TWO_OF_THREE)
    assert loss.value(np.zeros((4, 3))) == pytest.approx(np.log(3))


def test_the_representation_names_the_loss_and_the_sizes():
    loss = AverageLoss(find_loss("squared"), np.ones((4, 2)), [1, 2, 3, 4])
    assert repr(loss) == "AverageLoss(SquaredLoss(), n=4, c=2, weighted)"
