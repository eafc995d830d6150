from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import huber, softmax
from sklearn.metrics import log_loss

from cvxdistill.solvers.losses import (
    LOSSES,
    HuberLoss,
    LogisticLoss,
    MultinomialLoss,
    SquaredLoss,
    find_loss,
)

ANY_LOSS = pytest.mark.parametrize("name", LOSSES)
LOG_LOSS = pytest.mark.parametrize("name", ["logistic", "multinomial"])
SEED = given(seed=st.integers(0, 2**20))
FEW = settings(max_examples=25, deadline=None)
# Of finite differences: second derivatives of these losses are at most 1.
STEP = 1e-5


def targets(name, rng, n=6, c=3):
    """Targets that the loss takes; every other row of the multinomial's is a soft label."""
    if name == "logistic":
        return rng.choice([-1.0, 1.0], (n, 1))
    if name == "multinomial":
        Y = np.eye(c)[rng.integers(0, c, n)]
        Y[::2] = rng.dirichlet(np.ones(c), n)[::2]
        return Y
    return 2 * rng.standard_normal((n, c))


def draw(name, seed, size=2.0):
    """The loss, predictions, other predictions and targets."""
    rng = np.random.default_rng(seed)
    Y = targets(name, rng)
    return find_loss(name), *(size * rng.standard_normal((2, *Y.shape))), Y


def dual_points(name, seed):
    """Points theta inside the domain of the conjugate: residuals of any predictions, shrunk."""
    loss, Z, _, Y = draw(name, seed)
    return loss.residual(Z, Y) * np.random.default_rng(seed).random((len(Y), 1))


def slopes(function, Z):
    """Central differences in each column of Z of what gives one number, or one row, a row."""
    columns = []
    for k in range(Z.shape[1]):
        E = np.zeros_like(Z)
        E[:, k] = STEP
        columns.append((function(Z + E) - function(Z - E)) / (2 * STEP))
    return np.stack(columns, axis=-1)


def test_squared_loss_is_half_the_squared_distance():
    Z, Y = np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [3.0, 0.0]])
    np.testing.assert_allclose(SquaredLoss().value(Z, Y), [2.5, 4.5])


@pytest.mark.parametrize("delta", [0.5, 1.35, 10.0])
def test_huber_loss_is_scipys_summed_over_outputs(delta):
    _, Z, _, Y = draw("huber", 0)
    expected = huber(delta, Z - Y).sum(axis=1)
    np.testing.assert_allclose(HuberLoss(delta).value(Z, Y), expected, rtol=1e-14)


def test_logistic_loss_is_scikit_learns():
    loss, Z, _, Y = draw("logistic", 0)
    for z, y, value in zip(Z, Y, loss.value(Z, Y), strict=True):
        probability = 1 / (1 + np.exp(-z[0]))
        expected = log_loss(y, [[1 - probability, probability]], labels=[-1, 1])
        assert value == pytest.approx(expected, rel=1e-12)


def test_multinomial_loss_is_scikit_learns():
    Z, labels = np.random.default_rng(0).standard_normal((6, 3)), np.array([0, 2, 1, 1, 0, 2])
    values = MultinomialLoss().value(Z, np.eye(3)[labels])
    for z, label, value in zip(Z, labels, values, strict=True):
        expected = log_loss([label], softmax(z)[None], labels=[0, 1, 2])
        assert value == pytest.approx(expected, rel=1e-12)


def test_multinomial_loss_of_soft_labels_is_the_mean_over_labels():
    loss, Z, _, Y = draw("multinomial", 0)
    one_hot = [loss.value(Z, np.eye(3)[[k] * len(Z)]) for k in range(3)]
    np.testing.assert_allclose(loss.value(Z, Y), np.sum(Y.T * one_hot, axis=0), rtol=1e-12)


def test_two_classes_are_one_loss_in_two_forms():
    loss, Z, _, Y = draw("logistic", 0)
    pair, one_hot = np.hstack([0 * Z, Z]), np.hstack([Y < 0, Y > 0]).astype(float)
    multinomial = MultinomialLoss()
    np.testing.assert_allclose(multinomial.value(pair, one_hot), loss.value(Z, Y), rtol=1e-13)
    residual = multinomial.residual(pair, one_hot)
    np.testing.assert_allclose(residual[:, 1:], loss.residual(Z, Y), rtol=1e-13)


@ANY_LOSS
@FEW
@SEED
def test_residual_is_minus_the_gradient(name, seed):
    loss, Z, _, Y = draw(name, seed)
    expected = -slopes(lambda A: loss.value(A, Y), Z)
    np.testing.assert_allclose(loss.residual(Z, Y), expected, atol=1e-5)


@ANY_LOSS
def test_residual_is_minus_the_gradient_that_torch_finds(name):
    torch = pytest.importorskip("torch")
    loss, Z, _, Y = draw(name, 0)
    z, y = torch.tensor(Z, requires_grad=True), torch.tensor(Y)
    value = {
        "squared": lambda: torch.nn.functional.mse_loss(z, y, reduction="sum") / 2,
        "huber": lambda: torch.nn.functional.huber_loss(z, y, reduction="sum", delta=1.35),
        "logistic": lambda: torch.nn.functional.soft_margin_loss(z, y, reduction="sum"),
        "multinomial": lambda: torch.nn.functional.cross_entropy(z, y, reduction="sum"),
    }[name]()
    value.backward()
    assert loss.value(Z, Y).sum() == pytest.approx(value.item(), rel=1e-12)
    np.testing.assert_allclose(loss.residual(Z, Y), -z.grad.numpy(), atol=1e-12)


@ANY_LOSS
@FEW
@SEED
def test_hessian_is_minus_the_derivative_of_the_residual(name, seed):
    loss, Z, _, Y = draw(name, seed)
    if name == "huber":  # not at a kink
        Z = np.where(np.abs(np.abs(Y - Z) - 1.35) < 0.01, Z + 0.05, Z)
    H = loss.hessian(loss.residual(Z, Y), Y)
    if H.ndim == 2:
        H = H[:, :, None] * np.eye(H.shape[1])
    expected = -slopes(lambda A: loss.residual(A, Y), Z)
    np.testing.assert_allclose(H, expected, atol=1e-5)
    assert np.linalg.eigvalsh(H).max() <= loss.smoothness * (1 + 1e-12)


def test_smoothness_is_reached():
    for loss, Z, Y in (
        (SquaredLoss(), [[0.0, 0.0]], [[1.0, 2.0]]),
        (HuberLoss(), [[0.0, 0.0]], [[1.0, 2.0]]),
        (LogisticLoss(), [[0.0]], [[1.0]]),
        (MultinomialLoss(), [[0.0, 0.0, -50.0]], [[1.0, 0.0, 0.0]]),
    ):
        Z, Y = np.array(Z), np.array(Y)
        H = loss.hessian(loss.residual(Z, Y), Y)[0]
        largest = H.max() if H.ndim == 1 else np.linalg.eigvalsh(H).max()
        assert largest == pytest.approx(loss.smoothness)


@ANY_LOSS
@pytest.mark.parametrize("size", [1e-2, 1.0, 30.0])
@FEW
@SEED
def test_bregman_is_the_error_of_the_first_order_model(name, seed, size):
    loss, Z, Z_new, Y = draw(name, seed, size)
    linear = np.sum(loss.residual(Z, Y) * (Z_new - Z), axis=1)
    expected = loss.value(Z_new, Y) - loss.value(Z, Y) + linear
    np.testing.assert_allclose(loss.bregman(Z_new, Z, Y), expected, rtol=1e-10, atol=1e-12 * size)


@ANY_LOSS
@FEW
@SEED
def test_bregman_of_near_neighbours_keeps_its_digits(name, seed):
    """Half the curvature along the way, where subtracting values would leave no digit."""
    loss, Z, direction, Y = draw(name, seed)
    way = 1e-8 * direction
    H = loss.hessian(loss.residual(Z, Y), Y)
    Hw = H * way if H.ndim == 2 else np.einsum("nkl,nl->nk", H, way)
    expected = np.sum(way * Hw, axis=1) / 2
    np.testing.assert_allclose(loss.bregman(Z + way, Z, Y), expected, rtol=1e-4, atol=1e-30)


@ANY_LOSS
@FEW
@SEED
def test_conjugate_satisfies_fenchel_young_with_equality_at_the_residual(name, seed):
    loss, Z, other, Y = draw(name, seed)
    theta = loss.residual(Z, Y)
    conjugate = loss.conjugate(theta, Y)
    reached = -np.sum(theta * Z, axis=1) - loss.value(Z, Y)
    np.testing.assert_allclose(conjugate, reached, rtol=1e-10, atol=1e-10)
    assert np.all(-np.sum(theta * other, axis=1) - loss.value(other, Y) <= conjugate + 1e-10)


@ANY_LOSS
@pytest.mark.parametrize("seed", range(3))
def test_conjugate_is_the_largest_value_that_scipy_finds(name, seed):
    """Without using the residual's formula: theta are shrunk residuals of other predictions."""
    loss, _, _, Y = draw(name, seed)
    theta = dual_points(name, seed)
    for t, y, conjugate in zip(theta, Y, loss.conjugate(theta, Y), strict=True):
        found = minimize(
            lambda z, t=t, y=y: t @ z + loss.value(z[None], y[None])[0], np.zeros(len(t))
        )
        assert conjugate == pytest.approx(-found.fun, abs=1e-6)


def test_conjugates_are_finite_up_to_the_edges_of_their_domains():
    edge = HuberLoss(0.5).conjugate(np.array([[0.5, -0.5], [0.51, 0.0]]), np.zeros((2, 2)))
    np.testing.assert_allclose(edge, [0.25, np.inf])
    Y = np.array([[1.0], [1.0], [-1.0], [-1.0], [1.0], [1.0]])
    edge = LogisticLoss().conjugate(np.array([[0.0], [1.0], [-1.0], [0.1], [-0.1], [1.1]]), Y)
    np.testing.assert_array_equal(edge, [0, 0, 0, np.inf, np.inf, np.inf])
    Y = np.tile([1.0, 0.0, 0.0], (4, 1))
    theta = np.array([[0, 0, 0], [1.0, -1.0, 0], [-0.1, 0.1, 0.0], [0.1, 0.1, 0.1]])
    expected = [0, 0, np.inf, np.inf]
    np.testing.assert_array_equal(MultinomialLoss().conjugate(theta, Y), expected)
    np.testing.assert_array_equal(
        np.isinf(MultinomialLoss().fenchel_gap(0 * Y, theta, Y)), np.isinf(expected)
    )


@ANY_LOSS
@FEW
@SEED
def test_outside_the_domain_of_the_conjugate_the_fenchel_gap_is_infinite_too(name, seed):
    loss, Z, _, Y = draw(name, seed)
    theta = 3 * np.random.default_rng(seed).standard_normal(Z.shape)
    with np.errstate(invalid="ignore"):
        gap, conjugate = loss.fenchel_gap(Z, theta, Y), loss.conjugate(theta, Y)
    np.testing.assert_array_equal(np.isinf(gap), np.isinf(conjugate))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_does_not_push_a_point_over_the_edge(dtype):
    eps = np.finfo(dtype).eps
    theta = np.array([[1.35 * (1 + 2 * eps)]], dtype)
    assert np.isfinite(HuberLoss().conjugate(theta, np.zeros_like(theta))).all()
    theta = np.array([[1 + 2 * eps], [-2 * eps]], dtype)
    loss, Y = LogisticLoss(), np.ones_like(theta)
    assert np.isfinite(loss.conjugate(theta, Y)).all()
    assert np.isfinite(loss.fenchel_gap(np.zeros_like(theta), theta, Y)).all()
    loss, Y = MultinomialLoss(), np.array([[1, 0]], dtype)
    theta = np.array([[-2 * eps, 2 * eps]], dtype)
    assert np.isfinite(loss.conjugate(theta, Y)).all()
    assert np.isfinite(loss.fenchel_gap(np.zeros_like(theta), theta, Y)).all()


@ANY_LOSS
@FEW
@SEED
def test_fenchel_gap_is_its_pieces_and_never_negative(name, seed):
    loss, Z, _, Y = draw(name, seed)
    theta = dual_points(name, seed + 1) if name in ("squared", "huber") else dual_points(name, seed)
    gap = loss.fenchel_gap(Z, theta, Y)
    pieces = loss.value(Z, Y) + loss.conjugate(theta, Y) + np.sum(Z * theta, axis=1)
    np.testing.assert_allclose(gap, pieces, rtol=1e-10, atol=1e-12)
    assert np.all(gap >= -1e-15)


@ANY_LOSS
@FEW
@SEED
def test_fenchel_gap_of_near_neighbours_is_as_small_as_their_distance_squared(name, seed):
    loss, Z, direction, Y = draw(name, seed)
    for size in (1e-3, 1e-6, 1e-9, 0.0):
        gap = loss.fenchel_gap(Z, loss.residual(Z + size * direction, Y), Y)
        assert np.all(gap >= -1e-15)
        assert np.all(gap <= size**2 * np.sum(direction**2, axis=1) + 1e-15)


@LOG_LOSS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_log_losses_are_right_at_margins_that_overflow(name, dtype):
    """At a margin m the loss is 0 or m, its slope 0 or 1, and nothing is NaN on the way."""
    m = 1e4
    if name == "logistic":
        loss, right, Y = LogisticLoss(), np.array([[m]], dtype), np.array([[1]], dtype)
        slope, span = np.array([[1]], dtype), m
    else:
        loss, Y = MultinomialLoss(), np.array([[1, 0, 0]], dtype)
        right, slope, span = (m * Y).astype(dtype), np.array([[1, -0.5, -0.5]], dtype), m
    wrong = -right
    extra = 0 if name == "logistic" else np.log(2)  # two classes share what is left
    with np.errstate(all="raise", under="ignore"):
        assert loss.value(right, Y)[0] == 0
        assert loss.value(wrong, Y)[0] == pytest.approx(span + extra, rel=1e-6)
        np.testing.assert_array_equal(loss.residual(right, Y), 0 * slope)
        np.testing.assert_allclose(loss.residual(wrong, Y), slope, rtol=1e-6)
        assert not loss.hessian(loss.residual(right, Y), Y).any()
        # From a flat piece to the other: the whole loss, however deep the flat piece.
        assert loss.bregman(wrong, right, Y)[0] == pytest.approx(span + extra, rel=1e-6)
        far_back = np.sum(slope * (right - wrong)) - span - extra
        assert loss.bregman(right, wrong, Y)[0] == pytest.approx(far_back, rel=1e-5)
        assert loss.bregman(wrong, wrong, Y)[0] == 0
        for Z in (right, wrong):
            gap = loss.fenchel_gap(Z, loss.residual(Z, Y), Y)[0]
            assert abs(gap) <= 4 * np.finfo(dtype).eps * m
        assert loss.fenchel_gap(wrong, 0 * Y, Y)[0] == pytest.approx(span + extra, rel=1e-6)


@ANY_LOSS
def test_float32_stays_float32_and_says_what_float64_says(name):
    loss, *arrays = draw(name, 0)
    results = []
    for dtype in (np.float32, np.float64):
        Z, Z_new, Y = (A.astype(dtype) for A in arrays)
        residual = loss.residual(Z, Y)
        theta = (dtype(0.9) * residual).astype(dtype)
        H = loss.hessian(residual, Y)
        assert residual.dtype == H.dtype == dtype
        gap = loss.fenchel_gap(Z_new, theta, Y)
        values = loss.value(Z, Y), loss.bregman(Z_new, Z, Y), loss.conjugate(theta, Y), gap
        results.append([residual, H, *values])
    for float32, float64 in zip(*results, strict=True):
        np.testing.assert_allclose(float32, float64, rtol=1e-5, atol=2e-6)


def test_huber_refuses_a_delta_that_is_not_positive():
    for delta in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="delta must be positive and finite, got"):
            HuberLoss(delta)


def test_a_loss_is_found_by_name_or_is_itself():
    loss = HuberLoss(2.0)
    assert find_loss("squared") == SquaredLoss() and find_loss(loss) is loss
    assert find_loss("huber") == HuberLoss(1.35)
