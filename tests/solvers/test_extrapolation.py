"""Solutions of a path begin on the line through the last two."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvxdistill.solvers import (
    RFISTA,
    BlockCoordinateDescent,
    GatedReLUProblem,
    GroupElasticNetProblem,
    SemismoothNewton,
    activation_patterns,
    extrapolation,
    sample_gates,
    solve_path,
)
from cvxdistill.solvers.extrapolation import FARTHEST, LastTwo


def two(before, last, *, at=(1.0, 1 / 1.1)):
    """Ends of two solves of one number or array each."""
    past = LastTwo()
    for alpha, x in zip(at, (before, last), strict=True):
        past.add(alpha, np.asarray(x))
    return past


@given(*[st.floats(1e-8, 1e8)] * 3)
def test_it_goes_no_further_than_the_last_step_and_nowhere_after_long_steps(alpha, last, before):
    found = two(1.0, 2.0, at=(before, last)).ahead(alpha)
    assert (found is None) == (not (alpha < last < before and last <= FARTHEST * alpha))
    if found is not None:
        assert 2 <= found[0] <= 3


def test_fewer_than_two_ends_have_no_line():
    past = LastTwo()
    assert past.ahead(1.0) is None
    assert past.last() is None
    past.add(1.0, np.ones(1))
    assert past.ahead(0.9) is None
    assert past.last() == (1.0,)


def test_even_steps_go_as_far_again():
    past = two(1.0, 2.0)
    assert past.ahead(1 / 1.21)[0] == pytest.approx(3.0)
    assert past.ahead(1 / 1.1**1.5)[0] == pytest.approx(2.5)
    past.add(1 / 1.21, np.asarray(4.0))
    assert past.ahead(1 / 1.1**3)[0] == pytest.approx(6.0)


def test_what_is_zero_stays_zero_and_the_rest_is_on_the_line():
    (found,) = two(np.float32([1, 0, 2]), np.float32([0, 1, 3])).ahead(1 / 1.21)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [0, 2, 4], rtol=1e-6)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(
    "solver",
    [
        RFISTA(tol=1e-6, check_every=5),
        SemismoothNewton(tol=1e-6),
        BlockCoordinateDescent(tol=1e-6),
        BlockCoordinateDescent(tol=1e-6, form="naive"),
    ],
)
def test_paths_take_fewer_iterations_to_the_same_optima(solver, outputs, monkeypatch):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((150, 5))
    Y = np.maximum(X @ rng.standard_normal((5, outputs)), 0) + rng.standard_normal((150, outputs))
    D, _ = activation_patterns(X, sample_gates(5, 20, random_state=0))
    problem = GatedReLUProblem(X, Y, D, fit_intercept=True)
    path = solve_path(solver, problem, n_alphas=40)
    monkeypatch.setattr(extrapolation, "FARTHEST", 0.0)
    plain = solve_path(solver, problem, n_alphas=40)
    for one, other in zip(path, plain, strict=True):
        assert one.converged and other.converged
        assert one.objective == pytest.approx(other.objective, rel=3e-6)
    assert sum(s.n_iter for s in path) < 0.9 * sum(s.n_iter for s in plain)


@pytest.mark.parametrize("loss", ["squared", "logistic", "multinomial"])
@pytest.mark.parametrize("d", [40, 400])
def test_group_paths_take_fewer_sweeps_to_the_same_optima(loss, d, monkeypatch):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, d)) + rng.standard_normal((200, 1))
    signal = X[:, :8] @ rng.standard_normal((8, 3)) + rng.standard_normal((200, 3))
    Y = {
        "squared": signal,
        "logistic": np.sign(signal[:, 0]),
        "multinomial": np.eye(3)[signal.argmax(axis=1)],
    }[loss]
    problem = GroupElasticNetProblem(X, Y, groups=np.arange(d) // 4, loss=loss)
    solver = BlockCoordinateDescent(tol=1e-7)
    path = solver.path(problem, n_alphas=40, eps=0.05)
    monkeypatch.setattr(extrapolation, "FARTHEST", 0.0)
    plain = solver.path(problem, n_alphas=40, eps=0.05)
    for one, other in zip(path, plain, strict=True):
        assert one.converged and other.converged
        assert one.objective == pytest.approx(other.objective, rel=3e-7)
    assert sum(s.n_iter for s in path) < 0.9 * sum(s.n_iter for s in plain)
