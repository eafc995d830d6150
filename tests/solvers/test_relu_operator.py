from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxdistill.solvers import activation_patterns, sample_gates
from cvxdistill.solvers.relu_operator import ReLUOperator, relu_predictions


@st.composite
def operator_cases(draw):
    n, d, p, c = (draw(st.integers(1, top)) for top in (40, 7, 6, 4))
    return {
        "shape": (n, d, p, c),
        "dtype": draw(st.sampled_from([np.float32, np.float64])),
        "order": draw(st.sampled_from("CF")),
        "source": draw(st.booleans()),
        "blocks": draw(st.sampled_from([1, 3, 10_000])),
        "threads": draw(st.sampled_from([1, 3])),
        "scaled": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**20)),
    }


@settings(max_examples=60, deadline=None)
@given(operator_cases())
def test_all_four_maps_equal_explicit_matrices(rows_only, gated_matrix, case):
    n, d, p, c = case["shape"]
    dtype = case["dtype"]
    rng = np.random.default_rng(case["seed"])
    X = np.asarray(rng.standard_normal((n, d)), dtype=dtype, order=case["order"])
    D = rng.random((n, p)) < 0.5
    W = (rng.standard_normal((2 * p, d, c)) * (rng.random((2 * p, 1, 1)) < 0.7)).astype(dtype)
    R = rng.standard_normal((n, c)).astype(dtype)
    multipliers = rng.random((n, 2 * p * c)).astype(dtype)
    scale = rng.uniform(0.5, 2, d).astype(dtype) if case["scaled"] else None
    error = 1e-4 if dtype == np.float32 else 1e-11
    tolerance = {"rtol": error, "atol": error}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cvxdistill.solvers.rows.BLOCK_BYTES", 1)
        patch.setattr("cvxdistill.solvers.rows.SMALLEST_BLOCK", case["blocks"])
        if case["threads"] > 1:
            patch.setattr("cvxdistill.solvers.gated_operator.SMALLEST_PARALLEL_WORK", 0)
            patch.setattr("cvxdistill.solvers.threads.n_threads", lambda: 3)
        A = ReLUOperator(rows_only(X) if case["source"] else X, D, scale=scale)
        Z, C, T = A.forward(W), A.adjoint(R), A.margins(W)
        M = A.margins_adjoint(multipliers)

    for result, shape in ((Z, (n, c)), (C, W.shape), (T, (n, 2 * p * c)), (M, W.shape)):
        assert result.dtype == dtype and result.shape == shape
    units = (X if scale is None else X / scale).astype(float)
    gated = gated_matrix(units, D)
    both = np.hstack([gated, -gated])
    np.testing.assert_allclose(Z, both @ W.reshape(-1, c).astype(float), **tolerance)
    np.testing.assert_allclose(C.reshape(-1, c), both.T @ R.astype(float), **tolerance)
    signs = 2.0 * D - 1
    for j in range(2 * p):
        side = signs[:, [j % p]] * units
        columns = slice(j * c, (j + 1) * c)
        np.testing.assert_allclose(T[:, columns], side @ W[j].astype(float), **tolerance)
        np.testing.assert_allclose(
            M[j], side.T @ multipliers[:, columns].astype(float), **tolerance
        )


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rows", [slice(0, 40), slice(3, 17)])
def test_contributions_are_what_single_blocks_add_to_a_block_of_rows(scaled, rows):
    rng = np.random.default_rng(0)
    X, D = rng.standard_normal((40, 4)), rng.random((40, 5)) < 0.5
    A = ReLUOperator(X, D, scale=rng.uniform(0.5, 2, 4) if scaled else None)
    W, blocks = rng.standard_normal((3, 4, 2)), np.array([1, 6, 9])
    T = A.contributions(W, blocks, rows)
    for m, block in enumerate(blocks):
        alone = np.zeros((10, 4, 2))
        alone[block] = W[m]
        np.testing.assert_allclose(T[:, m], A.forward(alone)[rows], atol=1e-13)


def test_the_adjoint_has_the_memory_order_of_weights():
    A = ReLUOperator(np.ones((4, 3)), np.ones((4, 2), bool))
    C = A.adjoint(np.ones((4, 2)))
    assert C.transpose(0, 2, 1).flags.c_contiguous


def test_margins_do_not_write_to_the_multipliers():
    A = ReLUOperator(np.ones((4, 3)), np.zeros((4, 2), bool))
    multipliers = np.ones((4, 8))
    A.margins_adjoint(multipliers)
    assert np.all(multipliers == 1)


@pytest.mark.parametrize("c", [1, 3])
def test_in_the_cones_gates_predict_what_relu_does(c):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((50, 4))
    D, G = activation_patterns(X, sample_gates(4, 6, random_state=0))
    p = G.shape[1]
    # Positive multiples of the gates themselves lie in their cones.
    W = G.T[None, :, :, None] * rng.random((2, p, 1, c))
    gated = ReLUOperator(X, D).forward(W.reshape(2 * p, 4, c))
    assert (ReLUOperator(X, D).margins(W.reshape(2 * p, 4, c)) >= 0).all()
    np.testing.assert_allclose(relu_predictions(X, W), gated, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("blocks", [3, 10_000])
def test_relu_predictions_are_those_of_the_network(monkeypatch, rows_only, dtype, blocks):
    monkeypatch.setattr("cvxdistill.solvers.rows.BLOCK_BYTES", 1)
    monkeypatch.setattr("cvxdistill.solvers.rows.SMALLEST_BLOCK", blocks)
    rng = np.random.default_rng(0)
    X, V = rng.standard_normal((20, 4)).astype(dtype), rng.standard_normal((2, 5, 4, 3))
    V[0, 2] = V[1, :2] = 0
    V = V.astype(dtype)
    expected = sum(np.maximum(X @ V[0, j], 0) - np.maximum(X @ V[1, j], 0) for j in range(5))
    for source in (X, rows_only(X)):
        Z = relu_predictions(source, V)
        assert Z.dtype == dtype
        np.testing.assert_allclose(Z, expected, atol=1e-5 if dtype == np.float32 else 1e-12)


def test_weights_of_zero_predict_zero():
    np.testing.assert_array_equal(relu_predictions(np.ones((3, 2)), np.zeros((2, 4, 2, 1))), 0)


def test_the_representation_names_the_sizes():
    A = ReLUOperator(np.ones((4, 2), np.float32), np.ones((4, 3), bool))
    assert repr(A) == "ReLUOperator(n=4, d=2, p=3, dtype=float32)"
    assert A.n_blocks == 6
