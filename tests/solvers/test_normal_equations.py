"""Sums over the examples of gated features, beside the matrix that is never formed."""

from __future__ import annotations

import numpy as np
import pytest

from cvxdistill.solvers import GatedReLUProblem, gram_matrix
from cvxdistill.solvers.normal_equations import normal_equations


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_in_blocks_are_those_of_the_explicit_matrix(
    make_problem, gated_matrix, rows_only, monkeypatch, center, weighted
):
    monkeypatch.setattr("cvxdistill.solvers.rows.BLOCK_BYTES", 1)
    monkeypatch.setattr("cvxdistill.solvers.rows.SMALLEST_BLOCK", 7)
    plain = make_problem(dtype=np.float32)
    X, D = plain.operator.X, plain.operator.D
    problem = GatedReLUProblem(rows_only(X), plain.Y, D)
    A = gated_matrix(X.astype(float), D)
    w = np.random.default_rng(0).uniform(0.2, 3, len(A)) if weighted else np.ones(len(A))
    w /= w.mean()
    expected = np.cov(A.T, bias=True, aweights=w) if center else (w * A.T) @ A / len(A)
    options = {"center": center, "weights": w if weighted else None}
    np.testing.assert_allclose(gram_matrix(problem.operator, **options), expected, atol=1e-12)
    R = np.random.default_rng(1).standard_normal((len(A), 3))
    if center:
        R -= np.average(R, axis=0, weights=w)
        A -= np.average(A, axis=0, weights=w)
    gram, pull = normal_equations(problem.operator, R, **options)
    np.testing.assert_array_equal(gram, gram_matrix(problem.operator, **options))
    np.testing.assert_allclose(pull, (w * A.T) @ R / len(A), atol=1e-12)
