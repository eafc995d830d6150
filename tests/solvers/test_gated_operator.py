from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxdistill.solvers import GatedOperator, activation_patterns, sample_gates
from cvxdistill.solvers.pattern_products import adjoint_pays, forward_pays


def random_weights(rng, p, d, c, dtype):
    """Weights of which some gates are zero, so that the shortcut for them is taken."""
    V = rng.standard_normal((p, d, c)) * (rng.random((p, 1, 1)) < 0.7)
    return V.astype(dtype)


@st.composite
def operator_cases(draw):
    n, d, p = (draw(st.integers(1, top)) for top in (40, 7, 10))
    c = draw(st.sampled_from([1, 2, 3, 4, 5, 16, 19]))
    return {
        "shape": (n, d, p, c),
        "dtype": draw(st.sampled_from([np.float32, np.float64])),
        "order": draw(st.sampled_from("CF")),
        "source": draw(st.booleans()),
        "blocks": draw(st.sampled_from([1, 3, 10_000])),
        "threads": draw(st.sampled_from([1, 3])),
        "scaled": draw(st.booleans()),
        "patterns": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**20)),
    }


@settings(max_examples=100, deadline=None)
@given(operator_cases())
def test_forward_and_adjoint_equal_the_explicit_matrix(rows_only, gated_matrix, case):
    n, d, p, c = case["shape"]
    dtype = case["dtype"]
    rng = np.random.default_rng(case["seed"])
    X = np.asarray(rng.standard_normal((n, d)), dtype=dtype, order=case["order"])
    D = rng.random((n, p)) < 0.5
    V, R = random_weights(rng, p, d, c, dtype), rng.standard_normal((n, c)).astype(dtype)
    scale = rng.uniform(0.5, 2, d).astype(dtype) if case["scaled"] else None
    error = 1e-4 if dtype == np.float32 else 1e-11
    tolerance = {"rtol": error, "atol": error}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cvxdistill.solvers.rows.BLOCK_BYTES", 1)
        patch.setattr("cvxdistill.solvers.rows.SMALLEST_BLOCK", case["blocks"])
        if case["threads"] > 1:
            patch.setattr("cvxdistill.solvers.gated_operator.SMALLEST_PARALLEL_WORK", 0)
            patch.setattr("cvxdistill.solvers.threads.n_threads", lambda: 3)
        if case["patterns"]:
            for name in ("FEWEST_ROWS", "FEWEST_OUTPUTS", "FEWEST_BYTES"):
                patch.setattr(f"cvxdistill.solvers.pattern_products.{name}", 1)
            patch.setattr("cvxdistill.solvers.pattern_products.MOST_ROWS", case["blocks"])
        A = GatedOperator(rows_only(X) if case["source"] else X, D, scale=scale)
        Z, C, norms = A.forward(V), A.adjoint(R), A.gate_gradient_norms(R)

    explicit = gated_matrix(X if scale is None else X / scale, D).astype(float)
    expected = explicit.T @ R.astype(float)
    assert Z.dtype == C.dtype == norms.dtype == dtype
    assert Z.shape == (n, c) and C.shape == (p, d, c) and norms.shape == (p,)
    np.testing.assert_allclose(Z, explicit @ V.reshape(p * d, c).astype(float), **tolerance)
    np.testing.assert_allclose(C.reshape(p * d, c), expected, **tolerance)
    np.testing.assert_allclose(
        norms, np.linalg.norm(expected.reshape(p, d * c), axis=1), **tolerance
    )
    # <A V, R> = <V, A^T R>
    assert np.vdot(Z, R) == pytest.approx(np.vdot(V, C), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("c", [1, 3])
def test_weights_in_any_memory_order_give_the_same_predictions(order, c):
    rng = np.random.default_rng(0)
    A = GatedOperator(rng.standard_normal((20, 4)), rng.random((20, 3)) < 0.5)
    V = rng.standard_normal((3, 4, c))
    np.testing.assert_array_equal(A.forward(np.asarray(V, order=order)), A.forward(V))


@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_that_agree_on_gates_share_their_products(gated_matrix, order):
    n, d, p, c = 1100, 70, 9, 6
    rng = np.random.default_rng(0)
    X, D = rng.standard_normal((n, d)), rng.random((n, p)) < 0.4
    X = np.asarray(X, order=order)
    V, R = random_weights(rng, p, d, c, float), rng.standard_normal((n, c))
    assert forward_pays(n, np.count_nonzero(V.any(axis=(1, 2))), c)
    assert adjoint_pays(n, d, float, p, c)
    A, explicit = GatedOperator(X, D), gated_matrix(X, D)
    np.testing.assert_allclose(A.forward(V), explicit @ V.reshape(-1, c), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(A.adjoint(R).reshape(-1, c), explicit.T @ R, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("c", [2, 6])
def test_what_is_not_a_number_is_not_lost(c):
    rng = np.random.default_rng(0)
    X, D = rng.standard_normal((600, 70)), rng.random((600, 8)) < 0.5
    A = GatedOperator(X, D)
    V, R = rng.standard_normal((8, 70, c)), rng.standard_normal((600, c))
    V[3, 5, 1], R[7, 0] = np.nan, np.inf
    assert np.isnan(A.forward(V)[D[:, 3], 1]).all()
    assert not np.isfinite(A.adjoint(R)[D[7], :, 0]).any()


@pytest.mark.parametrize("c", [2, 6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_array_of_n_times_p_times_d_exists(dtype, c):
    n, d, p = 6000, 130, 80
    X = np.random.default_rng(0).standard_normal((n, d)).astype(dtype)
    D, G = activation_patterns(X, sample_gates(d, p, random_state=0, dtype=dtype))
    A = GatedOperator(X, D)
    V = np.ones((G.shape[1], d, c), dtype)
    A.adjoint(A.forward(V))  # compiled and warm
    tracemalloc.start()
    try:
        A.adjoint(A.forward(V))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < n * p * d * np.dtype(dtype).itemsize / 8


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rows", [slice(0, 40), slice(3, 17)])
def test_contributions_are_what_single_gates_add_to_a_block_of_rows(scaled, rows):
    rng = np.random.default_rng(0)
    X, D = rng.standard_normal((40, 4)), rng.random((40, 5)) < 0.5
    U = rng.standard_normal((5, 4, 3))
    scale = rng.uniform(0.5, 2, 4) if scaled else None
    gates = np.array([0, 2, 3])
    A = GatedOperator(X, D, scale=scale)
    T = A.contributions(U[gates], gates, rows)
    units = X if scale is None else X / scale
    expected = np.stack([D[:, [j]] * (units @ U[j]) for j in gates], axis=1)
    np.testing.assert_allclose(T, expected[rows], atol=1e-13)
    every = A.contributions(U, np.arange(5), slice(0, 40)).sum(axis=1)
    np.testing.assert_allclose(every, A.forward(U), atol=1e-12)


def test_patterns_are_held_as_booleans():
    X = np.random.default_rng(0).standard_normal((30, 3))
    D, _ = activation_patterns(X, sample_gates(3, 5, random_state=0))
    assert GatedOperator(X, np.asfortranarray(D)).D.dtype == np.bool_


def test_zero_weights_predict_zero():
    A = GatedOperator(np.ones((4, 2)), np.ones((4, 3), bool))
    np.testing.assert_array_equal(A.forward(np.zeros((3, 2, 2))), np.zeros((4, 2)))


def test_the_representation_names_the_sizes():
    A = GatedOperator(np.ones((4, 2), np.float32), np.ones((4, 3), bool))
    assert repr(A) == "GatedOperator(n=4, d=2, p=3, dtype=float32)"
