from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from cvxdistill.solvers import RFISTA, DualCertificate
from cvxdistill.solvers.dual_correction import (
    _contribution_grams,
    residual_correction,
    solve_bounded,
)
from cvxdistill.solvers.losses import LOSSES
from cvxdistill.solvers.relu_problem import ReLUProblem

ANY_LOSS = pytest.mark.parametrize("loss", LOSSES)
# Which of an intercept and sample weights there are.
OPTIONS = {"plain": (False, False), "intercept": (True, False), "both": (True, True)}
ANY_OPTION = pytest.mark.parametrize("option", OPTIONS)


def make(make_problem, loss, penalty, option, n=40, **shape):
    fit_intercept, weighted = OPTIONS[option]
    weights = np.random.default_rng(5).uniform(0.5, 2, n) if weighted else None
    return make_problem(
        n=n,
        c=1 if loss == "logistic" else 3,
        loss=loss,
        penalty=penalty,
        fit_intercept=fit_intercept,
        sample_weight=weights,
        **shape,
    )


def whole_hessian(H):
    """n times the Hessian of the loss as one matrix (n c, n c), rows before outputs."""
    if H.ndim == 2:
        return np.diag(H.ravel())
    n, c, _ = H.shape
    out = np.zeros((n, c, n, c))
    out[np.arange(n), :, np.arange(n), :] = H
    return out.reshape(n * c, n * c)


def constants(n, c):
    """Columns that are 1 for one output: what an intercept adds."""
    return np.tile(np.eye(c), (n, 1))


@pytest.mark.parametrize("penalty", ["neuron", "gate", "nuclear"])
@ANY_LOSS
@ANY_OPTION
def test_the_gap_near_the_optimum_is_of_second_order(make_problem, loss, penalty, option):
    """Weights off by eps leave an excess and a gap of eps^2; scaling alone leaves eps."""
    problem = make(make_problem, loss, penalty, option)
    alpha = 0.2 * problem.alpha_max()
    best = RFISTA(tol=1e-11, max_iter=30_000).solve(problem, alpha)
    assert best.converged
    if penalty == "nuclear" and loss != "logistic":
        assert np.linalg.matrix_rank(best.V, tol=1e-6).max() > 1
    rng = np.random.default_rng(1)
    turn = rng.standard_normal((problem.operator.p, 5, 5))  # of columns: keeps zeros and ranks
    scaled, corrected, excess = [], [], []
    for eps in (1e-3, 1e-5):
        W = problem.weights_from_user(best.V + eps * np.einsum("pij,pjc->pic", turn, best.V))
        Z = problem.forward(W)
        R = problem.residual(Z)
        C, b = problem.adjoint(R), problem.intercept(Z)
        certificate = DualCertificate(problem, alpha)
        certificate.offer(R, C)
        scaled.append(certificate.gap(W, Z, b))
        certificate.offer_corrected(R, C, W)
        corrected.append(certificate.gap(W, Z, b))
        delta, _ = residual_correction(problem, alpha, R, C, W)
        norm = problem.regularizer.penalty.dual_norm(C + problem.adjoint(delta))
        excess.append(abs(norm / alpha - 1))
        if problem.fit_intercept:
            np.testing.assert_allclose(delta.sum(axis=0), 0, atol=1e-10 * np.abs(R).sum())
    assert scaled[0] / scaled[1] < 300
    assert corrected[0] / corrected[1] > 3000
    assert excess[0] / excess[1] > 3000


@pytest.mark.parametrize("penalty", ["neuron", "gate"])
@ANY_LOSS
@ANY_OPTION
def test_the_move_solves_the_bounded_problem_and_shortens_the_weights_by_it(
    make_problem, loss, penalty, option
):
    """min 1/2 <delta, H^-1 delta> - sum_g t_g (alpha - R°(C_g)), t_g <= R(W_g): by SciPy."""
    problem = make(make_problem, loss, penalty, option, n=25, d=4, p=5)
    A, c = problem.operator, problem.n_outputs
    alpha = 0.3 * problem.alpha_max()
    W = RFISTA(tol=1e-2).solve(problem, alpha).V
    R = problem.residual(problem.forward(problem.weights_from_user(W)))
    C = problem.adjoint(R)
    contributions, excess, lengths, directions = [], [], [], []
    groups = [(j, slice(k, k + 1)) for j in range(A.p) for k in range(c)]
    for j, k in groups if penalty == "neuron" else [(j, slice(None)) for j in range(A.p)]:
        norm = np.linalg.norm(C[j, :, k])
        if norm > alpha or W[j, :, k].any():
            U = np.zeros_like(W)
            U[j, :, k] = C[j, :, k] / norm
            contributions.append(A.forward(U).ravel())
            excess.append(alpha - norm)
            lengths.append(np.linalg.norm(W[j, :, k]))
            directions.append(U)
    values, vectors = np.linalg.eigh(whole_hessian(problem.loss.hessian(R)))
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    T = root @ np.array(contributions).T
    if problem.fit_intercept:
        ones = root @ constants(A.n, c)
        T -= ones @ np.linalg.lstsq(ones, T, rcond=1e-10)[0]
    target = np.linalg.lstsq(T.T, A.n * np.array(excess), rcond=1e-10)[0]
    t = lsq_linear(T, target, (-np.inf, lengths), tol=1e-14).x
    delta, moved = residual_correction(problem, alpha, R, C, W)
    np.testing.assert_allclose(delta.ravel(), root @ T @ t, atol=1e-6 * np.abs(delta).max())
    expected = np.einsum("g,gjik->jik", np.array(lengths) - t, np.array(directions))
    np.testing.assert_allclose(moved, expected, atol=1e-6 * np.abs(expected).max())


@given(seed=st.integers(0, 2**32 - 1), m=st.integers(1, 40), rank=st.integers(1, 60))
def test_bounded_systems_are_solved_as_by_scipy(seed, m, rank):
    rng = np.random.default_rng(seed)
    A = np.vstack([rng.standard_normal((rank, m)), 1e-3 * np.eye(m)])
    w = rng.exponential(size=m) * (rng.random(m) < 0.7)
    e = rng.standard_normal(m) * 10 ** rng.uniform(-2, 2)
    G = A.T @ A
    t = solve_bounded(G, e, w)
    expected = lsq_linear(A, np.linalg.lstsq(A.T, e)[0], (-np.inf, w), method="bvls").x
    value, least = (x @ G @ x / 2 - e @ x for x in (t, expected))
    assert (t <= w).all()
    assert value <= least + 1e-7 * abs(least)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("programme", ["gated", "relu"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("fit_intercept", [False, True])
@ANY_LOSS
def test_grams_are_those_of_what_each_block_contributes(
    make_problem, monkeypatch, threads, programme, normalize, fit_intercept, loss
):
    monkeypatch.setattr("cvxdistill.solvers.rows.BLOCK_BYTES", 1)
    monkeypatch.setattr("cvxdistill.solvers.rows.SMALLEST_BLOCK", 7)
    monkeypatch.setattr("cvxdistill.solvers.gated_operator.SMALLEST_PARALLEL_WORK", 0)
    monkeypatch.setattr("cvxdistill.solvers.threads.n_threads", lambda: threads)
    options = {"programme": ReLUProblem} if programme == "relu" else {}
    c = 1 if loss == "logistic" else 3
    problem = make_problem(
        n=30, d=4, p=5, c=c, loss=loss, fit_intercept=fit_intercept, normalize=normalize, **options
    )
    A = problem.operator
    rng = np.random.default_rng(0)
    H = problem.loss.hessian(problem.residual(rng.standard_normal((30, c))))
    blocks = np.array([0, 2, A.n_blocks - 1])
    U = rng.standard_normal((3, 4, c))
    whole, ones = whole_hessian(H), constants(30, c)
    pulls = np.linalg.pinv(ones.T @ whole @ ones) if fit_intercept else None
    grams = _contribution_grams(problem, U, blocks, H, pulls)
    if fit_intercept:
        whole = whole - whole @ ones @ pulls @ ones.T @ whole
    for (k, other), gram in grams.items():
        one, two = (np.zeros((3, 30, c)) for _ in range(2))
        for m, block in enumerate(blocks):
            W = problem.zeros()
            W[block] = U[m]
            one[m, :, k] = A.forward(W)[:, k]
            two[m, :, other] = A.forward(W)[:, other]
        expected = one.reshape(3, -1) @ whole @ two.reshape(3, -1).T
        np.testing.assert_allclose(gram, expected, atol=1e-11)
    coupled = {(k, m) for k in range(c) for m in range(c)}
    assert set(grams) == (coupled if loss == "multinomial" else {(k, k) for k in range(c)})


def test_nothing_is_corrected_where_no_group_is_active_or_violated(make_problem):
    problem = make_problem()
    alpha = 1.1 * problem.alpha_max()
    W = problem.zeros()
    R = problem.residual(problem.forward(W))
    assert residual_correction(problem, alpha, R, problem.adjoint(R), W) is None


@pytest.mark.parametrize(
    ("penalty", "l1_ratio"),
    [("feature", 1.0), ("l1", 1.0), ("ridge", 1.0), ("none", 1.0), ("gate", 0.5)],
)
def test_penalties_without_groups_of_gates_and_blends_are_left_alone(
    make_problem, penalty, l1_ratio
):
    problem = make_problem(penalty=penalty, l1_ratio=l1_ratio)
    W = problem.weights_from_user(np.ones(problem.weights_shape))
    R = problem.residual(problem.forward(W))
    assert residual_correction(problem, 0.1, R, problem.adjoint(R), W) is None


def test_systems_that_would_not_fit_in_memory_are_not_formed(make_problem, monkeypatch):
    problem = make_problem()
    W = problem.weights_from_user(np.ones(problem.weights_shape))
    R = problem.residual(problem.forward(W))
    C = problem.adjoint(R)
    assert residual_correction(problem, 0.1, R, C, W) is not None
    monkeypatch.setattr("cvxdistill.solvers.dual_correction.MOST_GRAM_ENTRIES", 3)
    assert residual_correction(problem, 0.1, R, C, W) is None


def test_float32_residuals_get_float32_corrections(make_problem):
    for loss in ("squared", "multinomial"):
        problem = make(make_problem, loss, "neuron", "both", dtype=np.float32)
        W = problem.weights_from_user(np.ones(problem.weights_shape))
        R = problem.residual(problem.forward(W))
        delta, _ = residual_correction(problem, 0.1, R, problem.adjoint(R), W)
        assert delta.dtype == np.float32 and np.isfinite(delta).all()
