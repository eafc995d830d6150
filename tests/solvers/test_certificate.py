from __future__ import annotations

import numpy as np
import pytest

from cvxdistill.solvers import RFISTA, DualCertificate, duality_gap
from cvxdistill.solvers.certificate import KKTResidual

CASES = [
    ("squared", "neuron", 1.0),
    ("squared", "gate", 0.5),
    ("squared", "ridge", 1.0),
    ("huber", "nuclear", 1.0),
    ("logistic", "l1", 1.0),
    ("multinomial", "feature", 1.0),
    ("multinomial", "nuclear", 0.5),
]


@pytest.fixture(params=CASES, ids=str)
def problem(request, make_problem):
    loss, penalty, l1_ratio = request.param
    return make_problem(
        c=1 if loss == "logistic" else 3,
        loss=loss,
        penalty=penalty,
        l1_ratio=l1_ratio,
        fit_intercept=True,
        sample_weight=np.random.default_rng(3).uniform(0.5, 2, 40),
    )


ALPHA = 0.05


def direction(problem, Z):
    """What a solver offers: the residual R and C = A^T R / n."""
    R = problem.residual(Z)
    return R, problem.adjoint(R)


def test_every_dual_point_lies_below_every_objective(problem):
    rng = np.random.default_rng(0)
    best = RFISTA(tol=1e-9, max_iter=30_000).solve(problem, ALPHA)
    certificate = DualCertificate(problem, ALPHA)
    for size in (0.0, 0.1, 1.0, 10.0):
        V = problem.weights_from_user(best.V + size * rng.standard_normal(best.V.shape))
        value = certificate.offer(*direction(problem, problem.forward(V)))
        assert value <= best.objective * (1 + 1e-9)
    assert certificate.value == pytest.approx(best.objective, rel=1e-3)


def test_gap_is_the_objective_less_the_best_dual_value(problem):
    rng = np.random.default_rng(0)
    certificate = DualCertificate(problem, ALPHA)
    values = []
    for _ in range(4):
        V = problem.weights_from_user(0.1 * rng.standard_normal(problem.zeros().shape))
        Z = problem.forward(V)
        values.append(certificate.offer(*direction(problem, Z)))
    b = problem.intercept(Z)
    # Each output may have its own best point.
    assert certificate.value >= max(values)
    if len(problem.parts) == 1:
        assert certificate.value == max(values)
    expected = problem.objective(V, b, ALPHA) - certificate.value
    assert certificate.gap(V, Z, b) == pytest.approx(expected, rel=1e-9)


def test_dual_points_have_no_mean_when_there_is_an_intercept(problem):
    certificate = DualCertificate(problem, ALPHA)
    V = problem.weights_from_user(np.ones(problem.weights_shape))
    R, C = direction(problem, problem.forward(V))
    certificate.offer(R, C)
    np.testing.assert_allclose(certificate.theta.sum(axis=0), 0, atol=1e-9)
    certificate.offer_corrected(R, C, V)
    np.testing.assert_allclose(certificate.theta.sum(axis=0), 0, atol=1e-9)


def test_without_a_dual_point_the_gap_is_infinite(problem):
    V = problem.zeros()
    Z = problem.forward(V)
    certificate = DualCertificate(problem, ALPHA)
    assert certificate.gap(V, Z, problem.intercept(Z)) == np.inf


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize(
    ("loss", "penalty", "c"),
    [
        ("squared", "neuron", 1),
        ("squared", "neuron", 3),
        ("squared", "gate", 3),
        ("squared", "nuclear", 3),
        ("huber", "neuron", 3),
        ("logistic", "neuron", 1),
        ("multinomial", "gate", 3),
    ],
)
def test_correcting_the_residual_is_valid_and_tightens_the_gap(
    make_problem, loss, penalty, c, fit_intercept
):
    problem = make_problem(
        n=60, d=8, p=20, c=c, loss=loss, penalty=penalty, fit_intercept=fit_intercept
    )
    alpha = (0.01 if loss == "squared" else 0.05) * problem.alpha_max()
    best = RFISTA(tol=1e-9).solve(problem, alpha).objective
    plain, corrected = DualCertificate(problem, alpha), DualCertificate(problem, alpha)
    solver = RFISTA()
    state = solver.init(problem, alpha, problem.zeros())
    for step in range(300):
        state = solver.step(problem, alpha, state)
        if (loss, penalty) != ("squared", "neuron") and step % 20:
            continue
        seen = solver.seen(state)
        plain.offer(seen.R, seen.C)
        corrected.offer(seen.R, seen.C)
        corrected.offer_corrected(seen.R, seen.C, seen.V)
        assert plain.value <= corrected.value <= best * (1 + 1e-9)
    assert best - corrected.value < 0.2 * (best - plain.value)
    np.testing.assert_allclose(
        corrected.theta.sum(axis=0) if fit_intercept else 0.0, 0.0, atol=1e-9
    )


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("penalty", ["neuron", "nuclear", "l1", "none"])
def test_kkt_residual_vanishes_at_the_optimum_that_cvxpy_finds_and_only_there(
    make_problem, solve_with_cvxpy, penalty, fit_intercept
):
    options = {"penalty": penalty, "fit_intercept": fit_intercept}
    problem = make_problem(n=60, d=4, p=4, **options)
    alpha = 0.05
    kkt = KKTResidual(problem, alpha)
    X, D = problem.operator.X, problem.operator.D
    W = problem.weights_from_user(solve_with_cvxpy(X, problem.Y, D, alpha, **options)[1])

    def residual(W):
        return kkt(W, problem.adjoint(problem.residual(problem.forward(W))))

    assert residual(W) < 2e-5
    rng = np.random.default_rng(0)
    sizes = [residual(W + size * rng.standard_normal(W.shape)) for size in (0.01, 0.1, 1.0)]
    assert 1e-3 < sizes[0] < sizes[1] < sizes[2]
    assert residual(problem.zeros()) > 0.1


def test_kkt_residual_without_a_penalty_is_the_relative_gradient(make_problem, gated_matrix):
    problem = make_problem(penalty="none")
    A, Y = gated_matrix(problem.operator.X, problem.operator.D), problem.Y
    W = problem.weights_from_user(np.random.default_rng(0).standard_normal(problem.weights_shape))
    C = problem.adjoint(problem.residual(problem.forward(W)))
    gradient = A.T @ (Y - A @ W.reshape(len(A.T), -1))
    expected = np.linalg.norm(gradient) / np.linalg.norm(A.T @ Y)
    assert KKTResidual(problem, 0.1)(W, C) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", ["squared", "huber"])
def test_without_a_penalty_there_is_no_gap_and_the_kkt_residual_stops_the_solver(
    make_problem, gated_matrix, loss
):
    problem = make_problem(n=80, d=3, p=4, penalty="none", loss=loss, fit_intercept=True)
    solution = RFISTA(tol=1e-7).solve(problem, 1.0)
    assert solution.converged and solution.kkt_residual <= 1e-7
    assert solution.duality_gap == solution.relative_gap == np.inf
    assert duality_gap(problem, solution.V, 1.0) == np.inf
    assert "KKT residual" in solution.message and "gap" not in solution.message
    if loss == "squared":
        A = gated_matrix(problem.operator.X, problem.operator.D)
        with_ones = np.hstack([A, np.ones((len(A), 1))])
        coefficients, *_ = np.linalg.lstsq(with_ones, problem.Y)
        best = ((with_ones @ coefficients - problem.Y) ** 2).sum() / (2 * len(A))
        assert solution.objective == pytest.approx(best, rel=1e-10)
    short = RFISTA(tol=1e-7, max_iter=3).solve(problem, 1.0)
    assert not short.converged and short.kkt_residual > 1e-7
