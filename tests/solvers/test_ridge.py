from __future__ import annotations

import numpy as np
import pytest

from cvxdistill.solvers import RFISTA, GatedReLUProblem, RidgeNewton, gram_matrix

LinearModel = pytest.importorskip("sklearn.linear_model")
ALPHA = 0.07


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_newton_equals_scikit_learns_ridge_on_the_gated_features(
    make_problem, gated_matrix, c, fit_intercept, dtype
):
    problem = make_problem(c=c, penalty="ridge", fit_intercept=fit_intercept, dtype=dtype)
    A = gated_matrix(problem.operator.X, problem.operator.D).astype(float)
    # scikit-learn minimises the sum of squares: its alpha is n times ours.
    ridge = LinearModel.Ridge(alpha=len(A) * ALPHA, fit_intercept=fit_intercept)
    ridge.fit(A, problem.Y.astype(float))
    tol = 1e-10 if dtype == np.float64 else 1e-5
    solution = RidgeNewton(tol=tol).solve(problem, ALPHA)
    expected = np.atleast_2d(ridge.coef_).T.reshape(solution.V.shape)
    assert solution.converged and solution.V.dtype == dtype
    np.testing.assert_allclose(solution.V, expected, atol=1e-9 if tol == 1e-10 else 1e-4)
    np.testing.assert_allclose(
        solution.intercept, ridge.intercept_ if fit_intercept else 0, atol=1e-8 + tol
    )


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_newton_with_sample_weights_equals_scikit_learns(make_problem, gated_matrix, fit_intercept):
    w = np.random.default_rng(0).uniform(0.2, 3, 40)
    problem = make_problem(penalty="ridge", fit_intercept=fit_intercept, sample_weight=w)
    A = gated_matrix(problem.operator.X, problem.operator.D)
    ridge = LinearModel.Ridge(alpha=w.sum() * ALPHA, fit_intercept=fit_intercept)
    ridge.fit(A, problem.Y, sample_weight=w)
    solution = RidgeNewton(tol=1e-10).solve(problem, ALPHA)
    assert solution.converged and solution.n_iter == 1
    np.testing.assert_allclose(solution.V, ridge.coef_.T.reshape(solution.V.shape), atol=1e-9)
    if fit_intercept:
        np.testing.assert_allclose(solution.intercept, ridge.intercept_, atol=1e-9)


def test_newton_is_exact_in_one_step(make_problem):
    problem = make_problem(penalty="ridge", fit_intercept=True)
    solution = RidgeNewton(tol=1e-12).solve(problem, ALPHA)
    assert solution.n_iter == 1 and solution.converged


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fit_intercept": True},
        {"normalize": True},
        {"sample_weight": np.linspace(0.2, 3, 40), "fit_intercept": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_fista_finds_what_newton_finds(make_problem, options):
    problem = make_problem(penalty="ridge", **options)
    newton = RidgeNewton(tol=1e-10).solve(problem, ALPHA)
    fista = RFISTA(tol=1e-9).solve(problem, ALPHA)
    assert fista.objective == pytest.approx(newton.objective, rel=1e-8)


def test_ridge_is_any_penalty_with_l1_ratio_0(make_problem):
    objectives = [
        RidgeNewton(tol=1e-10).solve(problem, ALPHA).objective
        for problem in (make_problem(penalty="ridge"), make_problem(penalty="neuron", l1_ratio=0))
    ]
    assert objectives[0] == pytest.approx(objectives[1], rel=1e-10)


def test_one_always_on_gate_is_plain_ridge():
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((30, 4)), rng.standard_normal((30, 2))
    problem = GatedReLUProblem(X, Y, np.ones((30, 1), bool), penalty="ridge", fit_intercept=True)
    solution = RidgeNewton(tol=1e-10).solve(problem, ALPHA)
    ridge = LinearModel.Ridge(alpha=30 * ALPHA).fit(X, Y)
    np.testing.assert_allclose(solution.V[0], ridge.coef_.T, atol=1e-8)


def test_a_shared_gram_matrix_gives_the_same_solution(make_problem):
    problem = make_problem(penalty="ridge", fit_intercept=True)
    gram = gram_matrix(problem.operator, center=True)
    shared = RidgeNewton(tol=1e-10, gram=gram).solve(problem, ALPHA)
    np.testing.assert_array_equal(shared.V, RidgeNewton(tol=1e-10).solve(problem, ALPHA).V)
