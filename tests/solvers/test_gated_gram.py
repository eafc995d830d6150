"""The Gram matrix of gated features, and a matrix that grows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvxdistill.solvers.gated_gram import MANY_INPUTS, gated_gram
from cvxdistill.solvers.growing_matrix import GrowingMatrix


@pytest.mark.parametrize("d", [1, 3, MANY_INPUTS - 1, MANY_INPUTS])
@pytest.mark.parametrize("first", [0, 2, 4, 10])
@pytest.mark.parametrize("larger", [(), (0,), (0, 0)])
@pytest.mark.parametrize("most", [2**14, 2**26])
def test_it_is_the_product_of_the_columns(d, first, larger, most, monkeypatch):
    for name, value in (("SUMMED", larger), ("GATHERED", larger), ("MOST_BYTES", most)):
        monkeypatch.setattr(f"cvxdistill.solvers.gated_gram.{name}", value)
    rng = np.random.default_rng(0)
    n, gates = 700, 11
    X, D, h = rng.standard_normal((n, d)), rng.random((n, gates)) < 0.5, rng.random(n)
    D[:, 3] = False
    D[:, 7] = True
    h[:10] = 0
    A = (D[:, :, None] * X[:, None, :]).reshape(n, gates * d)
    expected = (A * h[:, None]).T @ A[:, first * d :]
    np.testing.assert_allclose(gated_gram(X.__getitem__, D, h, first), expected, atol=1e-11)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_a_matrix_grows_to_what_it_would_be_at_once(sizes, seed):
    whole = np.random.default_rng(seed).standard_normal((sum(sizes), sum(sizes)))
    whole += whole.T
    matrix, m = GrowingMatrix(), 0
    for k in sizes:
        e = m + k
        matrix.grow(whole[:m, m:e].copy(), whole[m:e, m:e].copy())
        m = e
        assert matrix.values.flags.c_contiguous
        np.testing.assert_array_equal(matrix.values, whole[:m, :m])
