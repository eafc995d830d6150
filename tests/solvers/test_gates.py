from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxdistill.solvers import activation_patterns, evaluate_gates, sample_gates


def test_an_example_on_the_hyperplane_is_on():
    X = np.array([[1.0, -1.0], [1.0, -1.0001], [0.0, 0.0]])
    np.testing.assert_array_equal(evaluate_gates(X, np.ones((2, 1)))[:, 0], [True, False, True])


def test_the_last_row_is_a_bias():
    X = np.array([[1.0], [2.0], [3.0]])
    D = evaluate_gates(X, np.array([[1.0, -1.0], [-2.0, 2.0]]))
    np.testing.assert_array_equal(D, [[False, True], [True, True], [True, False]])


def test_duplicate_and_empty_patterns_are_removed_in_order_with_their_gates():
    X = np.array([[1.0, 2.0], [2.0, 1.0], [3.0, 1.0]])
    #              all on  all off  first   all on  last two  first
    G = np.array([[1.0, -1.0, -1.0, 2.0, 1.0, -1.5], [1.0, -1.0, 1.0, 2.0, -1.0, 1.5]])
    D, kept = activation_patterns(X, G)
    np.testing.assert_array_equal(kept, G[:, [0, 2, 4]])
    np.testing.assert_array_equal(
        D, np.array([[1, 1, 1], [1, 0, 0], [0, 1, 1]], bool).T[:, [0, 1, 2]]
    )
    assert D.dtype == np.bool_


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 4), st.integers(1, 30), st.booleans(), st.integers(0, 10**6)
)
def test_kept_patterns_are_those_of_the_definition(n, d, p, bias, seed):
    rng = np.random.default_rng(seed)
    X = rng.integers(-2, 3, (n, d)).astype(float)
    G = rng.integers(-2, 3, (d + bias, p)).astype(float)
    scores = X @ G[:d] + (G[d] if bias else 0)
    expected, seen = [], set()
    for j in range(p):
        pattern = tuple(scores[:, j] >= 0)
        if any(pattern) and pattern not in seen:
            seen.add(pattern)
            expected.append(j)
    if not expected:
        with pytest.raises(ValueError, match=f"None of the {p} gates is on"):
            activation_patterns(X, G)
        return
    D, kept = activation_patterns(X, G)
    np.testing.assert_array_equal(D, scores[:, expected] >= 0)
    np.testing.assert_array_equal(kept, G[:, expected])


def test_a_row_source_in_many_blocks_has_the_patterns_of_its_array(rows_only, monkeypatch):
    monkeypatch.setattr("cvxdistill.solvers.rows.BLOCK_BYTES", 1)
    monkeypatch.setattr("cvxdistill.solvers.rows.SMALLEST_BLOCK", 3)
    X = np.random.default_rng(0).standard_normal((20, 4))
    G = sample_gates(4, 9, bias=True, random_state=0)
    np.testing.assert_array_equal(evaluate_gates(rows_only(X), G), X @ G[:4] + G[4] >= 0)


def test_gates_are_evaluated_in_the_type_of_the_data():
    X = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    G = sample_gates(3, 8, random_state=0)
    np.testing.assert_array_equal(evaluate_gates(X, G), X @ G.astype(np.float32) >= 0)
