"""Solutions of a path begin on the line through the last two."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvxdistill.solvers import (
    RFISTA,
    GatedReLUProblem,
    SemismoothNewton,
    activation_patterns,
    extrapolation,
    sample_gates,
    solve_path,
)
from cvxdistill.solvers.extrapolation import FARTHEST, ahead, share_ahead


@given(*[st.floats(1e-8, 1e8)] * 3)
def test_the_share_is_a_share_and_none_of_long_steps_or_upwards(alpha, last, before):
    share = share_ahead(alpha, last, before)
    assert 0 <= share <= 1
    assert (share > 0) == (alpha < last < before and last <= FARTHEST * alpha)


def test_even_steps_go_as_far_again():
    assert share_ahead(1 / 1.21, 1 / 1.1, 1.0) == pytest.approx(1.0)
    assert share_ahead(1 / 1.1**3, 1 / 1.21, 1.0) == pytest.approx(0.5)


def test_what_is_zero_stays_zero_and_the_rest_is_on_the_line():
    before, last = np.float32([1, 0, 2]), np.float32([0, 1, 3])
    found = ahead(last, before, 0.5)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [0, 1.5, 3.5])


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("solver", [RFISTA(tol=1e-6, check_every=5), SemismoothNewton(tol=1e-6)])
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
