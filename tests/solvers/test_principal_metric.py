"""R-FISTA in the metric of X^T X: its proximal operator by optimality conditions, its optima."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxdistill.solvers import RFISTA, GatedReLUProblem, activation_patterns, sample_gates
from cvxdistill.solvers.principal_metric import PrincipalComposite


def programme(n=60, d=4, p=8, c=2, seed=0, correlated=False, **options):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    if correlated:
        X += 10 * rng.standard_normal((n, 1))
    D, _ = activation_patterns(X, sample_gates(d, p, random_state=seed))
    return GatedReLUProblem(X, rng.standard_normal((n, c)), D, **options)


@settings(max_examples=100, deadline=None)
@given(
    d=st.integers(1, 6),
    c=st.integers(1, 3),
    penalty=st.sampled_from(["neuron", "gate"]),
    l1_ratio=st.sampled_from([1.0, 0.6, 0.0]),
    s=st.floats(1e-3, 1e3),
    alpha=st.floats(1e-3, 10),
    seed=st.integers(0, 2**16),
)
def test_its_proximal_operator_is_optimal(d, c, penalty, l1_ratio, s, alpha, seed):
    problem = programme(20, d, 3, c, seed, penalty=penalty, l1_ratio=l1_ratio)
    composite = PrincipalComposite(problem, alpha)
    Z = np.random.default_rng(seed).standard_normal(problem.weights_shape)
    U = composite.prox(Z, s)
    norm, ridge = alpha * l1_ratio, alpha * (1 - l1_ratio)
    mu = composite.mu[:, None]
    for u, z in zip(U, Z, strict=True):
        columns = [slice(0, c)] if penalty == "gate" else [slice(k, k + 1) for k in range(c)]
        for k in columns:
            length = np.linalg.norm(u[:, k] / np.sqrt(mu))
            if length > 0:
                pull = (norm / length + ridge) * u[:, k] / mu
                np.testing.assert_allclose(u[:, k] + s * pull, z[:, k], rtol=1e-7, atol=1e-9)
            else:
                assert np.linalg.norm(z[:, k] * np.sqrt(mu)) <= s * norm * (1 + 1e-9)


def test_weights_go_there_and_back():
    problem = programme(60, 5, 7, 3)
    composite = PrincipalComposite(problem, 0.1)
    V = problem.zeros()
    V[...] = np.random.default_rng(1).standard_normal(V.shape)
    V[2] = 0
    U = composite.from_weights(V)
    np.testing.assert_allclose(composite.weights(U), V, atol=1e-12)
    np.testing.assert_allclose(composite.forward(U), problem.forward(V), atol=1e-10)
    R = np.random.default_rng(2).standard_normal((60, 3))
    np.testing.assert_allclose(
        np.vdot(composite.adjoint(R), U), np.vdot(problem.adjoint(R), V), rtol=1e-10
    )
    np.testing.assert_allclose(
        composite.gradient(composite.adjoint(R)), problem.adjoint(R), atol=1e-12
    )


@pytest.mark.parametrize("loss", ["squared", "huber"])
@pytest.mark.parametrize("penalty", ["neuron", "gate"])
def test_both_metrics_find_the_same_optimum(penalty, loss):
    options = {"penalty": penalty, "loss": loss, "fit_intercept": True, "l1_ratio": 0.9}
    problem = programme(**options, sample_weight=np.linspace(0.5, 2, 60))
    alpha = 0.1 * problem.alpha_max()
    plain, principal = (
        RFISTA(tol=1e-8, max_iter=50_000, metric=metric).solve(problem, alpha)
        for metric in ("plain", "principal")
    )
    assert plain.converged and principal.converged
    assert principal.objective == pytest.approx(plain.objective, rel=1e-7)
    np.testing.assert_allclose(principal.V, plain.V, atol=2e-3)
    value = problem.objective(principal.V, principal.intercept, alpha)
    assert principal.objective == pytest.approx(value, rel=1e-12)


def test_correlated_inputs_take_fewer_steps():
    problem = programme(300, 10, 20, 1, correlated=True)
    alpha = 0.01 * problem.alpha_max()
    steps = {
        metric: RFISTA(tol=1e-5, max_iter=50_000, metric=metric).solve(problem, alpha).n_iter
        for metric in ("plain", "principal")
    }
    assert steps["principal"] < 0.7 * steps["plain"]


def test_single_precision_stays_so():
    problem = programme()
    data = problem.operator
    small = GatedReLUProblem(
        data.X.astype(np.float32), problem.Y.astype(np.float32), data.D, penalty="neuron"
    )
    solution = RFISTA(metric="principal").solve(small, 0.1 * small.alpha_max())
    assert solution.converged and solution.V.dtype == np.float32


def test_a_warm_start_is_where_it_starts():
    problem = programme()
    alpha = 0.1 * problem.alpha_max()
    solver = RFISTA(tol=1e-6, metric="principal")
    solution = solver.solve(problem, alpha)
    assert solver.solve(problem, alpha, warm_start=solution).n_iter == 0


def test_what_has_no_such_metric_is_refused_by_name_and_left_alone_otherwise():
    problem = programme(penalty="nuclear")
    with pytest.raises(ValueError, match=r"^metric='principal' is for gated ReLU programmes"):
        RFISTA(metric="principal").solve(problem, 0.1)
    assert RFISTA().solve(problem, 0.5 * problem.alpha_max()).converged
    with pytest.raises(ValueError, match="metric must be 'auto', 'principal' or 'plain'"):
        RFISTA(metric="other")
