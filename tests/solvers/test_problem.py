from __future__ import annotations

import numpy as np
import pytest

from cvxdistill.solvers import RFISTA, GatedReLUProblem


@pytest.mark.parametrize("penalty", ["neuron", "gate", "nuclear", "feature", "l1"])
@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fit_intercept": True},
        {"normalize": True},
        {"loss": "huber", "fit_intercept": True},
        {"loss": "multinomial", "sample_weight": np.linspace(0.5, 2, 40)},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
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


def test_alpha_max_uses_the_residual_of_the_best_constant(make_problem, gated_matrix):
    """For log loss: labels less the shares of the classes, weighted."""
    w = np.linspace(0.5, 2, 40)
    for loss, half in (("multinomial", 1.0), ("logistic", 2.0)):
        problem = make_problem(c=3, loss=loss, fit_intercept=True, sample_weight=w)
        Y = problem.Y
        shares = np.average(Y, axis=0, weights=w)
        R = w[:, None] / w.mean() * (Y - shares) / half
        C = gated_matrix(problem.operator.X, problem.operator.D).T @ R / len(Y)
        norms = np.linalg.norm(C.reshape(-1, 5, Y.shape[1]), axis=1)
        assert problem.alpha_max() == pytest.approx(norms.max(), rel=1e-9)


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


@pytest.mark.parametrize("loss", ["squared", "huber", "logistic", "multinomial"])
def test_integer_sample_weights_are_repeated_rows(make_problem, loss):
    counts = np.random.default_rng(0).integers(1, 4, 40)
    weighted = make_problem(loss=loss, fit_intercept=True, sample_weight=counts)
    X, Y, D = (
        A.repeat(counts, axis=0) for A in (weighted.operator.X, weighted.Y, weighted.operator.D)
    )
    repeated = GatedReLUProblem(X, Y, D, loss=loss, fit_intercept=True)
    assert weighted.alpha_max() == pytest.approx(repeated.alpha_max(), rel=1e-9)
    alpha = 0.1 * weighted.alpha_max()
    one, two = (RFISTA(tol=1e-9).solve(problem, alpha) for problem in (weighted, repeated))
    assert one.objective == pytest.approx(two.objective, rel=1e-8)
    np.testing.assert_allclose(one.V, two.V, atol=1e-3)
    np.testing.assert_allclose(one.intercept, two.intercept, atol=1e-3)


def test_two_classes_of_softmax_are_one_column_of_logistic_loss(make_problem):
    """z = (-v, v) / 2 has the norm |v| / sqrt(2) of v: gate's alpha grows by sqrt(2)."""
    one = make_problem(loss="logistic", penalty="gate", fit_intercept=True)
    X, D, Y = one.operator.X, one.operator.D, one.Y
    two = GatedReLUProblem(
        X, np.hstack([Y < 0, Y > 0]), D, loss="multinomial", penalty="gate", fit_intercept=True
    )
    alpha = 0.1 * one.alpha_max()
    assert two.alpha_max() == pytest.approx(np.sqrt(2) * one.alpha_max(), rel=1e-9)
    single = RFISTA(tol=1e-10).solve(one, alpha)
    pair = RFISTA(tol=1e-10).solve(two, np.sqrt(2) * alpha)
    assert pair.objective == pytest.approx(single.objective, rel=1e-8)
    np.testing.assert_allclose(pair.V[..., 1:] - pair.V[..., :1], single.V, atol=1e-3)


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


def test_boolean_one_hot_targets_become_numbers(make_problem):
    problem = make_problem(c=3, loss="multinomial")
    X, D = problem.operator.X, problem.operator.D
    assert GatedReLUProblem(X, problem.Y > 0, D, loss="multinomial").Y.dtype == np.float64


def test_bregman_and_residual_are_those_of_the_loss_at_its_best_intercept(make_problem):
    """Finite differences of F(Z) = min over b of L(Z + 1 b^T)."""
    for loss in ("squared", "huber", "logistic", "multinomial"):
        problem = make_problem(n=8, c=3, loss=loss, fit_intercept=True)
        rng = np.random.default_rng(0)
        Z, direction = rng.standard_normal((2, *problem.Y.shape))

        def value(Z, problem=problem):
            return problem.loss.value(Z + problem.intercept(Z))

        slope = (value(Z + 1e-6 * direction) - value(Z - 1e-6 * direction)) / 2e-6
        R = problem.residual(Z)
        assert slope == pytest.approx(-np.vdot(R, direction) / 8, abs=1e-8)
        expected = value(Z + direction) - value(Z) + np.vdot(R, direction) / 8
        assert problem.bregman(Z + direction, Z) == pytest.approx(expected, rel=1e-8)


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
    text = repr(make_problem(loss="huber"))
    assert text.startswith("GatedReLUProblem(n=40, d=5, p=8, c=2, ")
    assert "loss=HuberLoss(delta=1.35)" in text
