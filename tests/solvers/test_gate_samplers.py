from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import correlate
from scipy.stats import chisquare, kstest

from cvxdistill.solvers import (
    activation_patterns,
    draw_gates,
    evaluate_gates,
    sample_convolutional_gates,
    sample_gates,
    sample_pair_gates,
    sample_quantile_gates,
    sample_sparse_gates,
    sample_wedge_gates,
)
from cvxdistill.solvers.gate_samplers import GATE_SAMPLERS

RNG = np.random.default_rng(0)
X = RNG.standard_normal((40, 6))
Y = RNG.integers(0, 3, 40)
IMAGE = (2, 6, 7)
LEAST_P_VALUE = 1e-3  # of tests with fixed seeds


def test_the_same_seed_gives_the_same_gates_and_another_does_not():
    G = sample_gates(4, 6, random_state=3)
    np.testing.assert_array_equal(G, sample_gates(4, 6, random_state=3))
    np.testing.assert_array_equal(G, np.random.default_rng(3).standard_normal((4, 6)))
    assert not np.array_equal(G, sample_gates(4, 6, random_state=4))


def test_a_generator_moves_on():
    rng = np.random.default_rng(0)
    assert not np.array_equal(
        sample_gates(3, 3, random_state=rng), sample_gates(3, 3, random_state=rng)
    )


def test_gates_are_standard_normal():
    G = sample_gates(50, 2000, random_state=0)
    assert abs(G.mean()) < 0.02 and abs(G.std() - 1) < 0.02


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bias_and_always_on_gates_add_a_row_and_a_first_column(dtype):
    G = sample_gates(4, 6, bias=True, always_on=True, random_state=0, dtype=dtype)
    assert G.shape == (5, 7) and G.dtype == dtype
    assert not G[:, 0].any() and G[:, 1:].all()
    assert evaluate_gates(np.random.default_rng(0).standard_normal((9, 4)), G)[:, 0].all()


@pytest.mark.parametrize(
    ("d", "n_nonzero", "expected"),
    [
        (30, None, 5),
        (1, None, 1),
        (2, None, 1),
        (30, 4, 4),
        (30, 0.5, 15),
        (30, 1.0, 30),
        (3, 0.1, 1),
    ],
)
def test_a_sparse_gate_sees_the_number_of_features_asked_for(d, n_nonzero, expected):
    G = sample_sparse_gates(d, 50, n_nonzero=n_nonzero, random_state=0)
    assert G.shape == (d, 50)
    np.testing.assert_array_equal((G != 0).sum(axis=0), expected)


def test_sparse_gates_are_standard_normal_on_features_that_are_equally_likely():
    G = sample_sparse_gates(12, 4000, n_nonzero=3, bias=True, random_state=0)
    assert G.shape == (13, 4000)
    assert chisquare((G[:12] != 0).sum(axis=1)).pvalue > LEAST_P_VALUE
    assert kstest(G[:12][G[:12] != 0], "norm").pvalue > LEAST_P_VALUE
    assert kstest(G[12], "norm").pvalue > LEAST_P_VALUE


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_convolutional_gate_is_one_output_of_a_valid_convolution(data):
    channels, height, width = (data.draw(st.integers(1, most)) for most in (3, 7, 8))
    kernel = (data.draw(st.integers(1, height)), data.draw(st.integers(1, width)))
    seed = data.draw(st.integers(0, 1000))
    G = sample_convolutional_gates((channels, height, width), kernel, 3, random_state=seed)
    image = np.random.default_rng(seed).standard_normal((channels, height, width))
    for g in G.T:
        gate = g.reshape(channels, height, width)
        rows = np.flatnonzero(gate.any(axis=(0, 2)))
        columns = np.flatnonzero(gate.any(axis=(0, 1)))
        filter_ = gate[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert filter_.shape == (channels, *kernel) and filter_.all()
        outputs = correlate(image, filter_, mode="valid", method="direct")[0]
        np.testing.assert_allclose(image.ravel() @ g, outputs[rows[0], columns[0]], atol=1e-12)


def test_filters_are_standard_normal_and_all_positions_inside_the_image_equally_likely():
    G = sample_convolutional_gates(IMAGE, 3, 4000, bias=True, random_state=0)
    assert G.shape == (2 * 6 * 7 + 1, 4000)
    assert kstest(G[:-1][G[:-1] != 0], "norm").pvalue > LEAST_P_VALUE
    assert kstest(G[-1], "norm").pvalue > LEAST_P_VALUE
    corners = (G[:-1] != 0).argmax(axis=0)  # the first pixel of the first channel
    positions, counts = np.unique(corners, return_counts=True)
    expected = [row * 7 + column for row in range(6 - 3 + 1) for column in range(7 - 3 + 1)]
    np.testing.assert_array_equal(positions, expected)
    assert chisquare(counts).pvalue > LEAST_P_VALUE


def test_a_kernel_of_the_size_of_the_image_gives_gaussian_gates():
    G = sample_convolutional_gates(IMAGE, (6, 7), 500, random_state=0)
    assert G.all() and kstest(G.ravel(), "norm").pvalue > LEAST_P_VALUE


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gaussian_gates_drawn_by_name_are_those_of_the_sampler(dtype, seed):
    data = X.astype(dtype)
    np.testing.assert_array_equal(
        draw_gates("gaussian", data, Y, 9, seed), sample_gates(6, 9, random_state=seed, dtype=dtype)
    )
    np.testing.assert_array_equal(
        draw_gates("gaussian-bias", data, Y, 9, seed),
        sample_gates(6, 9, bias=True, random_state=seed, dtype=dtype),
    )


def test_the_other_names_stand_for_their_samplers():
    expected = {
        "quantile-bias": sample_quantile_gates(X, 9, random_state=5),
        "sparse": sample_sparse_gates(6, 9, random_state=5),
        "pairs": sample_pair_gates(X, Y, 9, random_state=5),
        "pairs-bias": sample_pair_gates(X, Y, 9, bias=True, random_state=5),
        "wedge": sample_wedge_gates(X, 9, random_state=5),
        "wedge-bias": sample_wedge_gates(X, 9, bias=True, random_state=5),
    }
    assert {*expected, "gaussian", "gaussian-bias"} == set(GATE_SAMPLERS)
    for name, G in expected.items():
        np.testing.assert_array_equal(draw_gates(name, X, Y, 9, 5), G)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", GATE_SAMPLERS)
def test_every_sampler_gives_gates_of_the_type_of_the_data_that_split_it(name, dtype):
    G = draw_gates(name, X.astype(dtype), Y, 30, np.random.default_rng(1))
    assert G.shape == (6 + name.endswith("bias"), 30) and G.dtype == dtype
    assert np.isfinite(G).all()
    D, _ = activation_patterns(X.astype(dtype), G)
    assert D.shape[1] > 15 and 0.2 < D.mean() < 0.8
    assert evaluate_gates(X, G).shape == (40, 30)


@pytest.mark.parametrize("name", GATE_SAMPLERS)
def test_a_generator_moves_on_with_every_sampler(name):
    rng = np.random.default_rng(0)
    first, second = (draw_gates(name, X, Y, 3, rng) for _ in range(2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("name", GATE_SAMPLERS)
def test_a_row_source_has_the_gates_of_its_array(name, rows_only, monkeypatch):
    monkeypatch.setattr("cvxdistill.solvers.rows.BLOCK_BYTES", 1)
    monkeypatch.setattr("cvxdistill.solvers.rows.SMALLEST_BLOCK", 7)
    G = draw_gates(name, X, Y, 8, 0)
    np.testing.assert_allclose(draw_gates(name, rows_only(X), Y, 8, 0), G, rtol=1e-9, atol=1e-12)


BAD = {
    "sampler": (
        lambda: draw_gates("gausian", X, Y, 5),
        r"gates must be one of \['gaussian', .*\] or an array, got 'gausian'",
    ),
    "vector": (lambda: draw_gates("gaussian", X[0], Y, 5), r"X must have shape \(n, d\)"),
    "no gates": (
        lambda: sample_sparse_gates(3, 0),
        "n_gates must be a positive integer, got 0",
    ),
    "no feature": (lambda: sample_sparse_gates(3, 5, n_nonzero=0), "from 1 to 3 .* got 0"),
    "too many features": (lambda: sample_sparse_gates(3, 5, n_nonzero=4), "from 1 to 3 .* got 4"),
    "more than all": (lambda: sample_sparse_gates(3, 5, n_nonzero=1.5), "fraction .* got 1.5"),
    "true features": (lambda: sample_sparse_gates(3, 5, n_nonzero=True), "got True"),
    "two sides": (
        lambda: sample_convolutional_gates((28, 28), 3, 5),
        r"image_shape must be \(channels, height, width\), got \(28, 28\)",
    ),
    "no channels": (
        lambda: sample_convolutional_gates((0, 8, 8), 3, 5),
        "image_shape must be a positive integer, got 0",
    ),
    "large kernel": (
        lambda: sample_convolutional_gates((1, 8, 4), 5, 5),
        r"kernel_size must be at most the image's \(8, 4\), got 5",
    ),
    "three sides": (
        lambda: sample_convolutional_gates((1, 8, 8), (3, 3, 3), 5),
        r"kernel_size must be an integer or \(height, width\), got \(3, 3, 3\)",
    ),
    "half a pixel": (
        lambda: sample_convolutional_gates((1, 8, 8), 2.5, 5),
        "kernel_size must be a positive integer, got 2.5",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_sampler_or_size_is_refused(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
