from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from cvxdistill.solvers import (
    RFISTA,
    BlockCoordinateDescent,
    GatedOperator,
    GatedReLUProblem,
    GroupElasticNetProblem,
    group_alpha_max,
)
from cvxdistill.solvers.group_elastic_net import GROUP_LOSSES

FORMS = pytest.mark.parametrize("form", ["covariance", "naive"])


def targets(loss, signal, rng):
    """Targets that suit the loss, from a signal (n, c)."""
    if loss == "logistic":
        return np.where(signal[:, :1] + 0.5 * rng.standard_normal((len(signal), 1)) > 0, 1.0, -1.0)
    if loss == "multinomial":
        return np.eye(signal.shape[1])[(signal + rng.gumbel(size=signal.shape)).argmax(axis=1)]
    if loss == "poisson":
        return rng.poisson(np.exp(0.3 * signal[:, :1])).astype(float)
    return signal + rng.standard_normal(signal.shape)


def random_problem(seed, loss, n=40, c=3, **options):
    """A problem with groups of 1 to 5 features in random places, some of them unpenalised."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, size=6)
    d = int(sizes.sum())
    labels = rng.permutation(np.repeat(np.arange(6), sizes))
    X = rng.standard_normal((n, d)) + rng.standard_normal((n, 1))
    signal = X[:, :4] @ rng.standard_normal((4, c)) / 2
    Y = targets(loss, signal, rng)
    weights = rng.uniform(0.5, 2, 6)
    if rng.random() < 0.4:
        weights[rng.integers(6)] = 0
    settings_ = {
        "group_weights": weights,
        "l1_ratio": float(rng.choice([1.0, 0.7])),
        "fit_intercept": bool(rng.random() < 0.6),
        "offset": 0.3 * rng.standard_normal(Y.shape) if rng.random() < 0.5 else None,
        "sample_weight": rng.uniform(0.3, 3, n) if rng.random() < 0.5 else None,
    }
    return GroupElasticNetProblem(X, Y, labels, loss=loss, **{**settings_, **options}), X, Y


def separated(problem, X, Y):
    """Whether a direction of the unpenalised features alone never hurts a class, and helps one.

    Then the log loss has no minimiser. By a linear programme: the largest sum of the margins
    u_i^T (w_(class of i) - w_k) >= 0 over directions w_k in a box.
    """
    U = X[:, problem.order[problem.starts[-2] :]]
    if problem.fit_intercept:
        U = np.hstack([U, np.ones((len(U), 1))])
    if Y.shape[1] == 1:
        Y = np.hstack([Y > 0, Y < 0])
    signs = [own - other for own in np.eye(Y.shape[1]) for other in np.eye(Y.shape[1])]
    classes = Y.argmax(axis=1)
    margins = np.array(
        [
            np.kron(sign, u)
            for u, k in zip(U, classes, strict=True)
            for sign in signs
            if sign[k] == 1
        ]
    )
    best = linprog(-margins.sum(axis=0), -margins, np.zeros(len(margins)), bounds=(-1, 1))
    return -best.fun > 1e-6


def cvxpy_objective(problem, X, Y, alpha):
    """The least objective, by Clarabel."""
    cp = pytest.importorskip("cvxpy")
    n, c = Y.shape
    B, b = cp.Variable((X.shape[1], c)), cp.Variable((1, c))
    F = X @ B
    if problem.fit_intercept:
        F = F + np.ones((n, 1)) @ b
    if problem.offset is not None:
        F = F + problem.offset
    omega = np.ones(n) if problem.loss.weights is None else problem.loss.weights
    name = type(problem.loss.loss).__name__
    if name == "SquaredLoss":
        fit = cp.sum(cp.multiply(omega[:, None], cp.square(F - Y))) / 2
    elif name == "HuberLoss":
        fit = cp.sum(cp.multiply(omega[:, None], cp.huber(F - Y, 1.35))) / 2
    elif name == "LogisticLoss":
        fit = cp.sum(cp.multiply(omega[:, None], cp.logistic(-cp.multiply(Y, F))))
    elif name == "PoissonLoss":
        deviance = Y * np.log(np.where(Y > 0, Y, 1)) - Y
        fit = cp.sum(cp.multiply(omega[:, None], cp.exp(F) - cp.multiply(Y, F) + deviance))
    else:
        rows = cp.log_sum_exp(F, axis=1) - cp.sum(cp.multiply(Y, F), axis=1)
        fit = omega @ rows
    penalty = 0
    for group, w in zip(problem.members, problem.group_weights, strict=True):
        if w:
            penalty += w * problem.l1_ratio * cp.norm(B[group], "fro")
            penalty += w * (1 - problem.l1_ratio) / 2 * cp.sum_squares(B[group])
    programme = cp.Problem(cp.Minimize(fit / n + alpha * penalty))
    tight = {"tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
    programme.solve(cp.CLARABEL, **tight)
    return programme.value


@FORMS
@pytest.mark.parametrize("loss", GROUP_LOSSES)
@pytest.mark.parametrize("seed", range(6))
def test_objective_is_that_of_cvxpy(loss, seed, form):
    problem, X, Y = random_problem(seed, loss)
    alpha = 0.1 * group_alpha_max(problem)
    solution = BlockCoordinateDescent(tol=1e-9, form=form).solve(problem, alpha)
    assert solution.converged
    value = problem.objective(solution.coef, solution.intercept, alpha)
    assert value == pytest.approx(solution.objective, rel=1e-9)
    best = cvxpy_objective(problem, X, Y, alpha)
    assert solution.objective == pytest.approx(best, rel=1e-7)
    assert solution.duality_gap >= solution.objective - best - 1e-8 * best
    assert problem.duality_gap(solution.coef, alpha) <= 1e-8 * best


@FORMS
@pytest.mark.parametrize("l1_ratio", [1.0, 0.5])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_it_is_the_multi_task_elastic_net_of_scikit_learn(form, l1_ratio, fit_intercept):
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    X = rng.standard_normal((50, 8)) + 1
    Y = X[:, :3] @ rng.standard_normal((3, 4)) + rng.standard_normal((50, 4))
    settings_ = {"alpha": 0.1, "l1_ratio": l1_ratio, "fit_intercept": fit_intercept}
    settings_ |= {"tol": 1e-12, "max_iter": 100_000}
    problem = GroupElasticNetProblem(X, Y, l1_ratio=l1_ratio, fit_intercept=fit_intercept)
    solution = BlockCoordinateDescent(tol=1e-12, form=form).solve(problem, 0.1)
    twin = linear.MultiTaskElasticNet(**settings_).fit(X, Y)
    np.testing.assert_allclose(solution.coef, twin.coef_.T, atol=1e-6)
    np.testing.assert_allclose(solution.intercept, twin.intercept_, atol=1e-6)
    problem = GroupElasticNetProblem(X, Y[:, 0], l1_ratio=l1_ratio, fit_intercept=fit_intercept)
    solution = BlockCoordinateDescent(tol=1e-12, form=form).solve(problem, 0.1)
    twin = linear.ElasticNet(**settings_).fit(X, Y[:, 0])
    np.testing.assert_allclose(solution.coef[:, 0], twin.coef_, atol=1e-6)


def gated(n=80, d=4, p=6, c=2, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    D = X @ rng.standard_normal((d, p)) >= 0
    Y = np.abs(X[:, :1]) + X @ rng.standard_normal((d, c)) + 0.1 * rng.standard_normal((n, c))
    return X, D, Y


@FORMS
@pytest.mark.parametrize("loss", ["squared", "multinomial"])
@pytest.mark.parametrize("fit_intercept", [True, False])
def test_a_gated_operator_gives_the_c_grelu_programme(form, loss, fit_intercept):
    X, D, Y = gated()
    if loss == "multinomial":
        Y = np.eye(2)[Y.argmax(axis=1)]
    twin = GatedReLUProblem(X, Y, D, penalty="gate", loss=loss, fit_intercept=fit_intercept)
    problem = GroupElasticNetProblem(GatedOperator(X, D), Y, loss=loss, fit_intercept=fit_intercept)
    assert group_alpha_max(problem) == pytest.approx(twin.alpha_max())
    alpha = 0.05 * twin.alpha_max()
    solution = BlockCoordinateDescent(tol=1e-9, form=form).solve(problem, alpha)
    other = RFISTA(tol=1e-9, max_iter=100_000).solve(twin, alpha)
    assert solution.converged and other.converged
    assert solution.objective == pytest.approx(other.objective, rel=1e-8)
    V = solution.coef.reshape(D.shape[1], 4, 2)
    assert twin.objective(V, solution.intercept, alpha) == pytest.approx(other.objective, rel=1e-8)


@given(seed=st.integers(0, 2**32 - 1), loss=st.sampled_from(sorted(GROUP_LOSSES)))
@example(seed=167810726, loss="huber")
@settings(max_examples=25, deadline=None)
def test_both_forms_agree_along_a_path_and_are_certified(seed, loss):
    problem, X, Y = random_problem(seed, loss)
    if loss in ("logistic", "multinomial") and (problem.group_weights == 0).any():
        assume(not separated(problem, X, Y))
    paths = [
        BlockCoordinateDescent(tol=1e-7, form=form).path(problem, n_alphas=6, eps=0.05)
        for form in ("covariance", "naive")
    ]
    for one, two in zip(*paths, strict=True):
        assert one.converged and two.converged
        assert one.objective == pytest.approx(two.objective, rel=3e-7, abs=1e-12)
    assert paths[0].active_groups[0] <= 1 + (problem.group_weights == 0).sum()


@FORMS
def test_unpenalised_features_that_separate_the_classes_are_never_certified(form):
    problem, X, Y = random_problem(510510, "multinomial")
    assert separated(problem, X, Y)
    solution = BlockCoordinateDescent(tol=1e-7, form=form).solve(problem, 0.1)
    assert solution.status == "no progress" and solution.duality_gap == np.inf


@FORMS
def test_what_the_strong_rule_discards_wrongly_comes_back(form, monkeypatch):
    """With a rule that keeps nothing every group has to come in as a violator."""
    problem, _, _ = random_problem(3, "squared", n=60)
    alphas = group_alpha_max(problem) * np.array([0.5, 0.1])
    solver = BlockCoordinateDescent(tol=1e-9, form=form)
    expected = solver.path(problem, alphas)
    module = "cvxdistill.solvers.working_set_descent"
    monkeypatch.setattr(f"{module}.MOST_GRAM_FEATURES", 0)
    monkeypatch.setattr(
        f"{module}.WorkingSetDescent._strong", lambda self, alpha: np.zeros(0, dtype=int)
    )
    found = solver.path(problem, alphas)
    for one, two in zip(found, expected, strict=True):
        assert one.converged
        assert one.objective == pytest.approx(two.objective, rel=1e-8)


def test_at_alpha_max_only_unpenalised_features_are_used():
    problem, _, _ = random_problem(0, "squared", group_weights=[1, 1, 0, 1, 2, 1], offset=None)
    alpha = group_alpha_max(problem)
    above, below = BlockCoordinateDescent(tol=1e-9).path(problem, [alpha * 1.001, alpha * 0.99])
    free = problem.members[2]
    np.testing.assert_array_equal(np.sort(above.features), np.sort(free))
    assert below.n_active_groups == 2


def test_ridge_alone_has_no_alpha_max_and_is_scikit_learns():
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((30, 5)), rng.standard_normal((30, 2))
    problem = GroupElasticNetProblem(X, Y, l1_ratio=0.0)
    assert group_alpha_max(problem) == np.inf
    with pytest.raises(ValueError, match="say which alphas"):
        BlockCoordinateDescent().path(problem)
    solution = BlockCoordinateDescent(tol=1e-12).solve(problem, 0.1)
    twin = linear.Ridge(alpha=3.0).fit(X, Y)
    np.testing.assert_allclose(solution.coef, twin.coef_.T, atol=1e-7)


def test_float32_data_stay_float32_and_are_certified():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 30)).astype(np.float32)
    Y = (X[:, :3] @ rng.standard_normal((3, 2))).astype(np.float32) + 1
    for form in ("covariance", "naive"):
        problem = GroupElasticNetProblem(X, Y, 3)
        assert problem.columns.forward(np.ones((30, 2))).dtype == np.float32
        path = BlockCoordinateDescent(tol=1e-4, form=form).path(problem, n_alphas=8, eps=1e-2)
        assert path.relative_gaps.max() <= 1e-4


def test_a_warm_start_at_the_solution_needs_no_sweep():
    problem, _, _ = random_problem(1, "logistic")
    alpha = 0.1 * group_alpha_max(problem)
    solver = BlockCoordinateDescent(tol=1e-6)
    first = solver.solve(problem, alpha)
    again = solver.solve(problem, alpha, warm_start=first)
    assert first.n_iter > 0 and again.n_iter == 0
    np.testing.assert_allclose(again.coef, first.coef)


def test_limits_are_kept_and_said():
    problem, _, _ = random_problem(2, "squared", n=30)
    alpha = 1e-3 * group_alpha_max(problem)
    solution = BlockCoordinateDescent(tol=1e-12, max_iter=1).solve(problem, alpha)
    assert solution.status == "iteration limit" and "iteration limit" in solution.message
    path = BlockCoordinateDescent().path(problem, callback=lambda point: point.n_active_groups > 2)
    assert 1 < len(path) < 100 and "GroupPath" in repr(path)
    assert path.coefs.shape == (len(path), *path[0].shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": 7}, "divides"),
        ({"groups": [[0, 1], [1, 2, 3, 4]]}, "exactly once"),
        ({"groups": [[0, 1, 2, 3, 4], []]}, "empty group"),
        ({"groups": [[0.0, 1.9], [2, 3, 4]]}, "numbers of features"),
        ({"groups": np.zeros(3, dtype=int)}, "integer labels"),
        ({"group_weights": [1, 2]}, "shape"),
        ({"group_weights": [-1, 1, 1, 1, 1]}, "not negative"),
        ({"l1_ratio": 1.5}, "l1_ratio"),
        ({"loss": "absolute"}, "loss must be one of"),
        ({"offset": np.zeros(4)}, "offset"),
        ({"sample_weight": np.zeros(9)}, "sample_weight"),
        ({"Y": np.full(9, np.nan)}, "finite"),
        ({"X": np.full((9, 5), np.inf)}, "finite"),
        ({"Y": np.zeros(4)}, "as many rows"),
        ({"loss": "poisson", "Y": -np.ones(9)}, "Poisson"),
        ({"loss": "poisson", "Y": np.zeros(9)}, "> 0"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    given_ = {"X": np.random.default_rng(0).standard_normal((9, 5)), "Y": np.arange(9.0)} | change
    with pytest.raises(ValueError, match=message):
        GroupElasticNetProblem(
            given_.pop("X"), given_.pop("Y"), given_.pop("groups", None), **given_
        )


@pytest.mark.parametrize(
    "setting", [{"tol": -1}, {"max_iter": 0}, {"time_limit": 0}, {"form": "dual"}]
)
def test_settings_out_of_range_are_refused_by_name(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        BlockCoordinateDescent(**setting)


def test_bad_alphas_and_warm_starts_are_refused():
    problem, X, _ = random_problem(0, "squared")
    for alpha in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="alpha"):
            BlockCoordinateDescent().solve(problem, alpha)
    with pytest.raises(ValueError, match="coef must have shape"):
        BlockCoordinateDescent().solve(problem, 0.1, warm_start=np.zeros((X.shape[1], 7)))


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(
    ("n", "c", "l1_ratio"), [(30, 1, 1.0), (30, 1, 0.6), (90, 1, 1.0), (30, 3, 1.0), (90, 3, 0.6)]
)
def test_gated_columns_that_are_never_formed_give_the_path_of_those_that_are(
    n, c, l1_ratio, intercept
):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((n, 5)), rng.standard_normal((n, c))
    D = rng.random((n, 12)) < 0.5
    kind = {
        "l1_ratio": l1_ratio,
        "fit_intercept": intercept,
        "sample_weight": rng.uniform(0.5, 2, n),
    }
    operator = GroupElasticNetProblem(GatedOperator(X, D), y, **kind)
    formed = np.hstack([X * D[:, [j]] for j in range(D.shape[1])])
    matrix = GroupElasticNetProblem(formed, y, 5, **kind)
    paths = [
        BlockCoordinateDescent(tol=1e-9, form="naive").path(problem, n_alphas=8, eps=0.02)
        for problem in (operator, matrix)
    ]
    for one, two in zip(*paths, strict=True):
        assert one.converged
        assert two.converged
        np.testing.assert_allclose(one.coef, two.coef, atol=1e-4)
        np.testing.assert_allclose(one.intercept, two.intercept, atol=1e-4)
        assert matrix.duality_gap(one.coef, one.alpha) <= 2e-9 * one.objective
    # And from a solution: the descent is told where it is.
    again = BlockCoordinateDescent(tol=1e-9, form="naive").solve(
        operator, paths[0][-1].alpha, warm_start=paths[1][-1]
    )
    assert again.n_iter <= 2
    np.testing.assert_allclose(again.coef, paths[1][-1].coef, atol=1e-4)
    classes = ("multinomial", np.eye(c)[y.argmax(axis=1)]) if c > 1 else ("logistic", np.sign(y))
    for loss, targets in (classes, ("huber", 5 * y)):
        glm, dense = (
            BlockCoordinateDescent(tol=1e-8, form="naive").path(
                GroupElasticNetProblem(A, targets, 5, loss=loss, **kind), n_alphas=4, eps=0.1
            )
            for A in (GatedOperator(X, D), formed)
        )
        np.testing.assert_allclose(glm.coefs, dense.coefs, atol=1e-3)


@FORMS
@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("l1_ratio, free", [(0.0, False), (0.0, True), (0.5, True), (1.0, True)])
def test_gates_without_penalty_or_with_a_ridge_alone(form, fit_intercept, l1_ratio, free):
    """More gated features than examples; a matrix of them as the other way, and least squares."""
    rng = np.random.default_rng(0)
    n, d, p, alpha = 40, 8, 8, 1e-3
    X, Y = rng.standard_normal((n, d)), rng.standard_normal((n, 1))
    D = X @ rng.standard_normal((d, p)) >= 0
    A = (D[:, :, None] * X[:, None, :]).reshape(n, -1)
    weights = np.ones(p)
    if free:
        weights[-1] = 0
    options = {"group_weights": weights, "l1_ratio": l1_ratio, "fit_intercept": fit_intercept}
    solver = BlockCoordinateDescent(tol=1e-8, form=form)
    solution = solver.solve(GroupElasticNetProblem(GatedOperator(X, D), Y, d, **options), alpha)
    assert solution.converged
    dense = solver.solve(GroupElasticNetProblem(A, Y, d, **options), alpha)
    assert solution.objective == pytest.approx(dense.objective, rel=1e-7)
    if l1_ratio == 0:
        ones = np.ones((n, int(fit_intercept)))
        root = np.sqrt(n * alpha * np.repeat(weights, d))
        left = np.vstack(
            [np.hstack([A, ones]), np.eye(p * d, p * d + fit_intercept) * root[:, None]]
        )
        right = np.concatenate([Y[:, 0], np.zeros(p * d)])
        residual = right - left @ np.linalg.lstsq(left, right)[0]
        assert solution.objective == pytest.approx(residual @ residual / (2 * n), rel=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_huber_with_large_targets_and_nearly_separable_classes_converge(dtype):
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((100, 8)).astype(dtype), 20 * rng.standard_normal((100, 2))
    problem = GroupElasticNetProblem(X, Y.astype(dtype), loss="huber")
    path = BlockCoordinateDescent(max_iter=200).path(problem, n_alphas=20)
    assert all(solution.converged for solution in path)
    few = rng.standard_normal((10, 4)).astype(dtype)
    classes = np.eye(3, dtype=dtype)[rng.integers(0, 3, 10)]
    problem = GroupElasticNetProblem(few, classes, loss="multinomial")
    path = BlockCoordinateDescent(max_iter=200).path(problem, n_alphas=20)
    assert all(solution.converged for solution in path)


def test_a_tolerance_that_rounding_forbids_ends_without_progress():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((60, 5)).astype(np.float32)
    y = np.sign(rng.standard_normal(60)).astype(np.float32)
    problem = GroupElasticNetProblem(X, y, loss="logistic")
    solution = BlockCoordinateDescent(tol=1e-14).solve(problem, 0.1 * group_alpha_max(problem))
    assert solution.status in ("no progress", "converged")
    assert solution.relative_gap < 1e-5
