"""Squared loss in the sums of its gated features: the same programme, and the same optimum."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pytest

from cvxdistill.solvers import (
    RFISTA,
    GatedReLUProblem,
    choose_solver,
    duality_gap,
    fista,
    solve_path,
    triangular_form,
)
from cvxdistill.solvers.solver import IterativeSolver
from cvxdistill.solvers.triangular_form import TriangularProblem, triangular_form_pays

SIZES = {"n": 1500, "d": 4, "p": 6, "c": 8}
OPTIONS = [
    {},
    {"penalty": "gate", "fit_intercept": True},
    {"penalty": "nuclear", "normalize": True},
    {"penalty": "l1", "l1_ratio": 0.5},
    {"penalty": "feature", "fit_intercept": True},
    {"sample_weight": np.linspace(0.5, 2, SIZES["n"]), "normalize": True, "fit_intercept": True},
]


@pytest.fixture
def forms(monkeypatch):
    """The forms that were made."""
    seen = []
    make = GatedReLUProblem.triangular.func
    remember = cached_property(lambda self: seen.append(make(self)) or seen[-1])
    remember.__set_name__(GatedReLUProblem, "triangular")
    monkeypatch.setattr(GatedReLUProblem, "triangular", remember)
    return seen


def by_rows(monkeypatch, problem, alpha, **settings):
    """The solution without these sums."""
    with monkeypatch.context() as patch:
        patch.setattr(fista, "triangular_form_pays", lambda problem: False)
        return RFISTA(**settings).solve(problem, alpha)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_objective_gradient_and_bregman_distance_are_those_of_the_examples(make_problem, options):
    problem = make_problem(**SIZES, **options)
    form = problem.triangular
    assert isinstance(form, TriangularProblem) and form.operator.n == SIZES["d"] * SIZES["p"] + 1
    rng = np.random.default_rng(1)
    W, W_new = (problem.weights_from_user(rng.standard_normal(problem.weights_shape)) for _ in "01")
    Z, Z_new = problem.forward(W), problem.forward(W_new)
    T, T_new = form.forward(W), form.forward(W_new)
    value = problem.loss.value(Z + problem.intercept(Z))
    assert form.loss.value(T) == pytest.approx(value, rel=1e-10)
    C = problem.adjoint(problem.residual(Z))
    np.testing.assert_allclose(form.adjoint(form.residual(T)), C, atol=1e-10 * np.abs(C).max())
    assert form.bregman(T_new, T) == pytest.approx(problem.bregman(Z_new, Z), rel=1e-9)
    assert form.alpha_max() == pytest.approx(problem.alpha_max(), rel=1e-10)
    R = rng.standard_normal(T.shape)
    assert np.vdot(R, T) == pytest.approx(len(R) * np.vdot(form.adjoint(R), W), rel=1e-10)


def test_contributions_add_up_to_predictions(make_problem):
    form = make_problem(**SIZES).triangular
    A = form.operator
    W = np.random.default_rng(0).standard_normal(form.weights_shape)
    gates = np.array([1, 4, 5])
    parts = [A.contributions(W[gates], gates, rows) for rows in (slice(0, 7), slice(7, A.n))]
    others = np.setdiff1d(np.arange(A.p), gates)
    W[others] = 0
    np.testing.assert_allclose(np.concatenate(parts).sum(axis=1), A.forward(W), atol=1e-12)
    assert not parts[1][-1].any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_optimum_is_certified_on_the_examples(make_problem, forms, monkeypatch, options):
    problem = make_problem(**SIZES, **options)
    alpha, seen = 0.05 * problem.alpha_max(), []
    solution = RFISTA(tol=1e-7).solve(problem, alpha, callback=seen.append)
    (form,) = forms
    assert isinstance(form, TriangularProblem) and solution.converged
    own = problem.objective(solution.V, solution.intercept, alpha)
    assert solution.objective == pytest.approx(own, rel=1e-12)
    assert duality_gap(problem, solution.V, alpha) <= 3e-7 * own
    other = by_rows(monkeypatch, problem, alpha, tol=1e-7)
    assert solution.objective == pytest.approx(other.objective, rel=2e-7)
    assert [p.iteration for p in seen] == list(solution.trace.iteration)
    for values in (solution.trace.iteration, solution.trace.seconds):
        assert (np.diff(values) >= 0).all()
    assert solution.n_iter == solution.trace.iteration[-1]


@pytest.mark.parametrize("options", [{}, {"penalty": "gate", "fit_intercept": True}], ids=str)
def test_the_optimum_is_that_of_cvxpy(make_problem, solve_with_cvxpy, forms, monkeypatch, options):
    monkeypatch.setattr(fista, "triangular_form_pays", lambda problem: True)
    problem = make_problem(n=60, d=3, p=5, c=3, **options)
    alpha = 0.05 * problem.alpha_max()
    solution = RFISTA(tol=1e-8).solve(problem, alpha)
    A = problem.operator
    best, _ = solve_with_cvxpy(A.X, problem.Y, A.D, alpha, **options)
    assert len(forms) == 1 and solution.converged
    assert solution.objective == pytest.approx(best, rel=1e-7)


@pytest.mark.parametrize("metric", ["plain", "principal"])
def test_iterations_are_those_on_the_examples(make_problem, metric):
    problem = make_problem(**SIZES, fit_intercept=True)
    alpha = 0.02 * problem.alpha_max()
    solver = RFISTA(tol=0.0, max_iter=30, metric=metric)
    mine, other = (
        IterativeSolver._run(solver, form, alpha, form.zeros(), None)
        for form in (problem.triangular, problem)
    )
    assert mine.n_iter == other.n_iter == 30
    np.testing.assert_allclose(mine.V, other.V, atol=1e-8 * np.abs(other.V).max())
    np.testing.assert_allclose(mine.trace.objective, other.trace.objective, rtol=1e-9)


def test_dear_ones_begin_in_single_precision(make_problem, forms, monkeypatch):
    monkeypatch.setattr(fista, "DEAR", 0)
    problem = make_problem(**SIZES)
    solution = RFISTA(tol=1e-8).solve(problem, 0.05 * problem.alpha_max())
    single = forms[0].in_single
    assert single.dtype == single.Y.dtype == np.float32 and solution.converged
    huge = make_problem(**SIZES)
    huge = GatedReLUProblem(1e14 * huge.operator.X, huge.Y, huge.operator.D)
    assert RFISTA(tol=1e-6).solve(huge, 0.05 * huge.alpha_max()).converged
    assert "in_single" not in vars(forms[1])


def test_examples_in_single_precision_stay_there(make_problem, forms):
    problem = make_problem(**SIZES, dtype=np.float32, penalty="gate")
    alpha = 0.05 * problem.alpha_max()
    solution = RFISTA(tol=1e-5).solve(problem, alpha)
    assert solution.V.dtype == np.float32 and solution.converged
    assert len(forms) == 1 and forms[0].operator.F.dtype == np.float32


def test_a_row_source_is_read_a_few_times(make_problem, rows_only, forms):
    problem = make_problem(**SIZES)
    alpha = 0.01 * problem.alpha_max()

    class Counted(rows_only):
        rows_read = 0

        def __getitem__(self, rows):
            X = super().__getitem__(rows)
            self.rows_read += len(X)
            return X

    A = problem.operator
    source = Counted(A.X)
    rows = GatedReLUProblem(source, problem.Y, A.D)
    solution = RFISTA(tol=1e-7).solve(rows, alpha)
    assert len(forms) == 1 and solution.converged
    assert source.rows_read <= 20 * SIZES["n"] < solution.n_iter * SIZES["n"]


def test_rows_that_are_not_finite_are_refused(make_problem, rows_only):
    problem = make_problem(**SIZES, penalty="l1")
    A = problem.operator
    X = A.X.copy()
    X[700, 2] = np.nan
    broken = GatedReLUProblem(rows_only(X), problem.Y, A.D, penalty="l1")
    with pytest.raises(ValueError, match="X contains NaN"):
        RFISTA().solve(broken, 0.1)


@pytest.mark.parametrize("offset", [0.0, 1e9])
def test_features_that_depend_on_each_other_are_no_obstacle(make_problem, forms, offset):
    problem = make_problem(**SIZES)
    X, D = problem.operator.X.copy(), problem.operator.D.copy()
    X[:, 3] = X[:, 0] + offset  # The centred Gram matrix of such a feature is only rounding.
    D[:, 2], D[:, 3], D[:, 4] = True, D[:, 0], False
    problem = GatedReLUProblem(X, problem.Y, D, fit_intercept=True)
    alpha = 0.05 * problem.alpha_max()
    solution = RFISTA(tol=1e-4).solve(problem, alpha)
    assert len(forms) == 1 and solution.converged
    own = problem.objective(solution.V, solution.intercept, alpha)
    assert duality_gap(problem, solution.V, alpha) <= 3e-4 * own


def test_a_matrix_without_a_factor_gets_a_larger_diagonal(monkeypatch):
    rng = np.random.default_rng(0)
    A = rng.standard_normal((30, 12))
    A[:, 3:] = A[:, :3] @ rng.standard_normal((3, 9))
    H, seen = A.T @ A, []
    potrf = triangular_form.linalg.lapack.dpotrf
    monkeypatch.setattr(triangular_form, "RIDGES", (-1e-3, 1e-10))
    monkeypatch.setattr(
        triangular_form.linalg.lapack, "dpotrf", lambda *a, **b: seen.append(0) or potrf(*a, **b)
    )
    F = triangular_form._cholesky(H.copy())
    assert len(seen) == 2 and not np.tril(F, -1).any()
    np.testing.assert_allclose(F.T @ F, H, atol=1e-8)
    monkeypatch.setattr(triangular_form, "RIDGES", (-1e-3,))
    assert triangular_form._cholesky(H.copy()) is None


def test_without_a_factor_it_goes_on_with_the_examples(make_problem, monkeypatch):
    monkeypatch.setattr(triangular_form, "RIDGES", ())
    problem = make_problem(**SIZES)
    solution = RFISTA(tol=1e-6).solve(problem, 0.05 * problem.alpha_max())
    assert problem.triangular is None and solution.converged


@pytest.mark.parametrize("after", [1, 3, 8])
def test_a_callback_stops_it(make_problem, forms, after):
    problem, seen = make_problem(**SIZES), []
    solver = RFISTA(tol=1e-9, check_every=1)
    solution = solver.solve(
        problem,
        0.01 * problem.alpha_max(),
        callback=lambda p: seen.append(p) or len(seen) == after,
    )
    assert len(forms) == 1 and solution.status == "stopped by callback"
    assert len(seen) == after and solution.n_iter <= after - 1
    assert np.isfinite(solution.relative_gap)


@pytest.mark.parametrize("most", [1, 2, 3, 40])
def test_limits_are_those_of_all_forms_together(make_problem, forms, most):
    problem = make_problem(**SIZES)
    alpha = 1e-3 * problem.alpha_max()
    short = RFISTA(tol=1e-12, max_iter=most).solve(problem, alpha)
    assert short.status == "iteration limit" and short.n_iter == most
    late = RFISTA(tol=1e-12, time_limit=1e-9).solve(problem, alpha)
    assert late.status == "time limit" and late.n_iter == 0


def test_a_path_makes_the_sums_once(make_problem, forms):
    problem = make_problem(**SIZES, penalty="nuclear")
    path = solve_path(RFISTA(tol=1e-5), problem, n_alphas=5)
    assert len(forms) == 1 and all(solution.converged for solution in path)


def test_newtons_method_leaves_many_outputs_to_it(make_problem, forms):
    problem = make_problem(n=1500, d=4, p=6, c=40)
    alpha = 0.05 * problem.alpha_max()
    solution = choose_solver(problem, tol=1e-6).solve(problem, alpha)
    assert len(forms) == 1 and solution.converged
    assert solution.n_iter == RFISTA(tol=1e-6).solve(problem, alpha).n_iter


def test_few_outputs_are_left_to_newtons_method(make_problem, forms):
    problem = make_problem(n=4000, d=4, p=6, c=3)
    assert triangular_form_pays(problem)
    solution = choose_solver(problem, tol=1e-6).solve(problem, 0.05 * problem.alpha_max())
    assert solution.converged and forms == []


def test_it_is_for_squared_loss_and_many_more_examples_than_features(make_problem):
    assert triangular_form_pays(make_problem(**SIZES))
    assert not triangular_form_pays(make_problem(**SIZES, loss="huber"))
    assert not triangular_form_pays(make_problem(**SIZES, penalty="none"))
    assert not triangular_form_pays(make_problem(**SIZES | {"n": 30}))
    assert not triangular_form_pays(make_problem(n=12_000, d=111, p=100, c=1))
    assert "TriangularOperator(d=4, p=6" in repr(make_problem(**SIZES).triangular.operator)
