from __future__ import annotations

import numpy as np
import pytest

from cvxdistill.solvers import RFISTA, DualCertificate
from cvxdistill.solvers.problem import residual_and_adjoint


@pytest.fixture(params=[("neuron", 1.0), ("gate", 0.5), ("ridge", 1.0)], ids=str)
def problem(request, make_problem):
    penalty, l1_ratio = request.param
    return make_problem(c=3, penalty=penalty, l1_ratio=l1_ratio, fit_intercept=True)


ALPHA = 0.05


def test_every_dual_point_lies_below_every_objective(problem):
    rng = np.random.default_rng(0)
    best = RFISTA(tol=1e-9).solve(problem, ALPHA)
    certificate = DualCertificate(problem, ALPHA)
    for size in (0.0, 0.1, 1.0, 10.0):
        V = problem.weights_from_user(best.V + size * rng.standard_normal(best.V.shape))
        Z = problem.operator.forward(V)
        value = certificate.offer(*residual_and_adjoint(problem, Z))
        assert value <= best.objective * (1 + 1e-9)
    assert certificate.value == pytest.approx(best.objective, rel=1e-3)


def test_gap_is_the_objective_less_the_best_dual_value(problem):
    rng = np.random.default_rng(0)
    certificate = DualCertificate(problem, ALPHA)
    values = []
    for _ in range(4):
        V = problem.weights_from_user(0.1 * rng.standard_normal(problem.zeros().shape))
        Z = problem.operator.forward(V)
        values.append(certificate.offer(*residual_and_adjoint(problem, Z)))
    b = problem.intercept(Z)
    assert certificate.value == max(values)
    expected = problem.objective(V, b, ALPHA) - max(values)
    assert certificate.gap(V, Z, b) == pytest.approx(expected, rel=1e-9)


def test_without_a_dual_point_the_gap_is_infinite(problem):
    V = problem.zeros()
    Z = problem.operator.forward(V)
    certificate = DualCertificate(problem, ALPHA)
    assert certificate.gap(V, Z, problem.intercept(Z)) == np.inf


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize(("penalty", "c"), [("neuron", 1), ("neuron", 3), ("gate", 3)])
def test_correcting_the_residual_is_valid_and_tightens_the_gap(
    make_problem, penalty, c, fit_intercept
):
    problem = make_problem(n=60, d=8, p=20, c=c, penalty=penalty, fit_intercept=fit_intercept)
    alpha = 0.01 * problem.alpha_max()
    best = RFISTA(tol=1e-9).solve(problem, alpha).objective
    plain, corrected = DualCertificate(problem, alpha), DualCertificate(problem, alpha)
    solver = RFISTA()
    state = solver.init(problem, alpha, problem.zeros())
    for _ in range(300):
        state = solver.step(problem, alpha, state)
        plain.offer(state.R, state.C)
        corrected.offer(state.R, state.C)
        corrected.offer_corrected(state.R, state.C, state.V)
        assert plain.value <= corrected.value <= best * (1 + 1e-9)
    assert best - corrected.value < 0.2 * (best - plain.value)
    np.testing.assert_allclose(
        corrected.theta.sum(axis=0) if fit_intercept else 0.0, 0.0, atol=1e-9
    )
