from __future__ import annotations

import numpy as np
import pytest

from cvxdistill.solvers import RFISTA, GatedReLUProblem


@pytest.mark.parametrize("penalty", ["neuron", "gate"])
@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"fit_intercept": True}, {"normalize": True}])
def test_alpha_max_is_the_edge_of_the_zero_solution(make_problem, penalty, l1_ratio, options):
    problem = make_problem(c=3, penalty=penalty, l1_ratio=l1_ratio, **options)
    alpha_max = problem.alpha_max()
    above = RFISTA(tol=1e-9).solve(problem, 1.0001 * alpha_max)
    below = RFISTA(tol=1e-9).solve(problem, 0.995 * alpha_max)
    assert above.converged and not above.V.any()
    assert below.converged and below.V.any()


def test_alpha_max_is_that_of_the_formula(make_problem, gated_matrix):
    problem = make_problem(c=3, l1_ratio=0.5)
    A, Y = gated_matrix(problem.operator.X, problem.operator.D), problem.Y
    C = (A.T @ Y / len(Y)).reshape(-1, 5, 3)
    assert problem.alpha_max() == pytest.approx(np.linalg.norm(C, axis=1).max() / 0.5)


def test_an_intercept_centres_the_targets_in_alpha_max(make_problem):
    plain = make_problem(fit_intercept=True)
    X, Y, D = plain.operator.X, plain.Y, plain.operator.D
    shifted = GatedReLUProblem(X, Y + 100.0, D, fit_intercept=True)
    centred = GatedReLUProblem(X, Y - Y.mean(axis=0), D)
    assert shifted.alpha_max() == pytest.approx(plain.alpha_max(), rel=1e-9)
    assert centred.alpha_max() == pytest.approx(plain.alpha_max(), rel=1e-9)


def test_the_intercept_is_not_penalised(make_problem):
    plain = make_problem(fit_intercept=True)
    alpha = 0.1 * plain.alpha_max()
    shifted = GatedReLUProblem(
        plain.operator.X, plain.Y + 100.0, plain.operator.D, fit_intercept=True
    )
    one, two = (RFISTA(tol=1e-9).solve(problem, alpha) for problem in (plain, shifted))
    assert two.objective == pytest.approx(one.objective, rel=1e-6)
    np.testing.assert_allclose(two.intercept, one.intercept + 100, atol=1e-2)


def test_the_objective_is_a_mean_so_repeated_rows_change_nothing(make_problem):
    plain = make_problem(fit_intercept=True)
    X, Y, D = plain.operator.X, plain.Y, plain.operator.D
    doubled = GatedReLUProblem(
        np.vstack([X, X]), np.vstack([Y, Y]), np.vstack([D, D]), fit_intercept=True
    )
    assert doubled.alpha_max() == pytest.approx(plain.alpha_max())
    alpha = 0.1 * plain.alpha_max()
    one, two = (RFISTA(tol=1e-9).solve(problem, alpha) for problem in (plain, doubled))
    assert two.objective == pytest.approx(one.objective, rel=1e-8)


@pytest.mark.parametrize("s", [0.1, 7.0])
def test_scaling_all_of_x_with_alpha_only_rescales_the_weights(make_problem, s):
    """One scalar for all of X is a change of units: X s, alpha s, V / s have the same objective."""
    plain = make_problem()
    X, Y, D = plain.operator.X, plain.Y, plain.operator.D
    scaled = GatedReLUProblem(s * X, Y, D)
    assert scaled.alpha_max() == pytest.approx(s * plain.alpha_max())
    alpha = 0.1 * plain.alpha_max()
    one = RFISTA(tol=1e-9).solve(plain, alpha)
    two = RFISTA(tol=1e-9).solve(scaled, s * alpha)
    assert two.objective == pytest.approx(one.objective, rel=1e-8)
    assert scaled.objective(one.V / s, one.intercept, s * alpha) == pytest.approx(one.objective)
    np.testing.assert_allclose(
        scaled.predict(two.V), plain.predict(one.V), atol=1e-3 * np.abs(Y).max()
    )


def test_scaling_the_targets_scales_alpha_and_the_weights(make_problem):
    plain = make_problem()
    scaled = GatedReLUProblem(plain.operator.X, 10 * plain.Y, plain.operator.D)
    alpha = 0.1 * plain.alpha_max()
    one = RFISTA(tol=1e-9).solve(plain, alpha)
    two = RFISTA(tol=1e-9).solve(scaled, 10 * alpha)
    assert two.objective == pytest.approx(100 * one.objective, rel=1e-8)


def test_normalize_is_another_problem_but_weights_stay_in_the_users_units(make_problem):
    plain = make_problem()
    X = plain.operator.X * np.array([1.0, 100.0, 0.01, 1.0, 1.0])
    options = {"D": plain.operator.D, "normalize": True}
    problem = GatedReLUProblem(X, plain.Y, **options)
    unscaled = GatedReLUProblem(plain.operator.X, plain.Y, **options)
    # Unit columns do not know the units of X.
    alpha = 0.1 * problem.alpha_max()
    assert unscaled.alpha_max() == pytest.approx(problem.alpha_max())
    one, two = (RFISTA(tol=1e-9).solve(each, alpha) for each in (problem, unscaled))
    assert one.objective == pytest.approx(two.objective, rel=1e-8)
    np.testing.assert_allclose(
        problem.predict(one.V), unscaled.predict(two.V), atol=1e-3 * np.abs(plain.Y).max()
    )
    assert plain.alpha_max() != pytest.approx(problem.alpha_max(), rel=0.1)


def test_a_column_of_zeros_survives_normalize(make_problem):
    plain = make_problem()
    X = plain.operator.X.copy()
    X[:, 2] = 0
    problem = GatedReLUProblem(X, plain.Y, plain.operator.D, normalize=True)
    solution = RFISTA().solve(problem, 0.1 * problem.alpha_max())
    assert solution.converged and not solution.V[:, 2].any()


def test_a_row_source_is_solved_like_its_array(make_problem, rows_only, monkeypatch):
    monkeypatch.setattr("cvxdistill.solvers.rows.BLOCK_BYTES", 1)
    monkeypatch.setattr("cvxdistill.solvers.rows.SMALLEST_BLOCK", 7)
    plain = make_problem(fit_intercept=True, normalize=True)
    X, Y, D = plain.operator.X, plain.Y, plain.operator.D
    streamed = GatedReLUProblem(rows_only(X), Y, D, fit_intercept=True, normalize=True)
    alpha = 0.1 * plain.alpha_max()
    one, two = (RFISTA(tol=1e-7).solve(problem, alpha) for problem in (plain, streamed))
    assert two.objective == pytest.approx(one.objective, rel=1e-6)


def test_one_column_of_targets_may_be_flat(make_problem):
    plain = make_problem(c=1)
    flat = GatedReLUProblem(plain.operator.X, plain.Y[:, 0], plain.operator.D)
    assert flat.Y.shape == (40, 1) and flat.alpha_max() == plain.alpha_max()


def test_x_is_not_copied_and_nothing_given_is_written_to(make_problem):
    rng = np.random.default_rng(0)
    X, Y = np.asfortranarray(rng.standard_normal((30, 4))), rng.standard_normal((30, 2))
    D = rng.random((30, 3)) < 0.5
    copies = X.copy(), Y.copy(), D.copy()
    problem = GatedReLUProblem(X, Y, D, fit_intercept=True, normalize=True)
    assert problem.operator.X is X
    RFISTA().solve(problem, 0.1)
    for given, copy in zip((X, Y, D), copies, strict=True):
        np.testing.assert_array_equal(given, copy)


def test_lists_and_integers_become_floats():
    problem = GatedReLUProblem([[1, 2], [3, 4]], [1, 0], np.ones((2, 1), bool))
    assert problem.dtype == np.float64
    assert RFISTA().solve(problem, 0.1).converged


def test_one_always_on_gate_is_the_group_lasso_with_one_group():
    """With X^T X / n = I the solution is a shrunken least-squares solution."""
    X, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 3)))
    X *= np.sqrt(20)
    w = np.array([1.0, -2.0, 0.5])
    problem = GatedReLUProblem(X, X @ w, np.ones((20, 1), bool))
    solution = RFISTA(tol=1e-10).solve(problem, 0.3)
    expected = w * (1 - 0.3 / np.linalg.norm(w))
    np.testing.assert_allclose(solution.V[0, :, 0], expected, rtol=1e-4)


def test_the_representation_names_the_sizes(make_problem):
    assert repr(make_problem()).startswith("GatedReLUProblem(n=40, d=5, p=8, c=2, ")
