"""The deployed linear student is the map that it was built from, in as many numbers as it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxdistill.adapters import (
    ConvLayout,
    DenseLayout,
    build_linear_student,
    input_channels,
    linear_student_size,
    stored_orders,
)

LAYOUTS = {
    "convolution": ConvLayout((12, 6, 6), (10, 3, 3), (3, 3), (2, 2), (1, 1)),
    "whole image": ConvLayout((12, 2, 2), (10, 1, 1), (2, 2), (1, 1), (0, 0)),
    "flattened image": DenseLayout((12, 2, 3), (2, 5)),
    "vector": DenseLayout((24,), (10,)),
    "tokens": DenseLayout((24,), (10,), per_position=True),
}


def made(layout, input_rank, rank, seed=0, outputs=None):
    rng = np.random.default_rng(seed)
    C, c = input_channels(layout), outputs or layout.n_outputs
    T = (layout.n_features - 1) // C
    P = None if input_rank is None else np.linalg.qr(rng.standard_normal((C, input_rank)))[0]
    W1 = rng.standard_normal(((input_rank or C) * T, rank or c))
    W2 = None if rank is None else rng.standard_normal((rank, c))
    return P, W1, W2, rng.standard_normal(c)


def predicted(layout, P, W1, W2, b, inputs):
    """On the layout's rows, in float64."""
    X = layout.rows(inputs)[:][:, :-1]
    C = input_channels(layout)
    if P is not None:
        W1 = np.einsum("ca,atk->ctk", P, W1.reshape(P.shape[1], -1, W1.shape[1]))
        W1 = W1.reshape(-1, W1.shape[-1])
    assert X.shape[1] % C == 0
    return X @ (W1 if W2 is None else W1 @ W2) + b


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from([*LAYOUTS]),
    input_rank=st.one_of(st.none(), st.integers(1, 11)),
    rank=st.one_of(st.none(), st.integers(1, 9)),
    seed=st.integers(0, 1000),
)
def test_the_module_predicts_the_map(name, input_rank, rank, seed):
    layout = LAYOUTS[name]
    if input_channels(layout) == 1:
        input_rank = None
    factors = made(layout, input_rank, rank, seed)
    student = build_linear_student(layout, *factors, dtype=torch.float64)
    inputs = np.random.default_rng(seed).standard_normal((4, *layout.input_shape))
    with torch.no_grad():
        outputs = student(torch.from_numpy(inputs)).numpy()
    assert outputs.shape == (4, *layout.output_shape)
    expected = predicted(layout, *factors, inputs)
    np.testing.assert_allclose(
        layout.targets(outputs), expected, atol=1e-7 * np.abs(expected).max()
    )
    assert student.parameters_stored == linear_student_size(layout, input_rank, rank)
    assert student.parameters_stored == sum(t.numel() for t in student.state_dict().values())


@settings(max_examples=60)
@given(
    name=st.sampled_from([*LAYOUTS]),
    input_rank=st.one_of(st.none(), st.integers(1, 11)),
    written=st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True),
    rank=st.integers(1, 10),
    seed=st.integers(0, 1000),
)
def test_outputs_that_are_not_written_are_zero(name, input_rank, written, rank, seed):
    layout = LAYOUTS[name]
    if input_channels(layout) == 1:
        input_rank = None
    s = len(written)
    r2 = rank if rank < s else None
    factors = made(layout, input_rank, r2, seed, s)
    student = build_linear_student(layout, *factors, written=np.array(written), dtype=torch.float64)
    inputs = np.random.default_rng(seed).standard_normal((4, *layout.input_shape))
    with torch.no_grad():
        outputs = student(torch.from_numpy(inputs)).numpy()
    assert outputs.shape == (4, *layout.output_shape)
    got, expected = layout.targets(outputs), predicted(layout, *factors, inputs)
    np.testing.assert_allclose(got[:, written], expected, atol=1e-7 * np.abs(expected).max())
    assert not np.delete(got, written, axis=1).any()
    sizes = (layout, input_rank, r2, s)
    assert student.parameters_stored == linear_student_size(*sizes)
    assert student.parameters_stored - student.trainable == stored_orders(*sizes)


@pytest.mark.parametrize("written", [[0, 0, 1], [-1, 2, 3], [1, 2, 10], []])
def test_outputs_that_do_not_exist_are_refused(written):
    layout = LAYOUTS["vector"]
    with pytest.raises(ValueError, match="written must be different outputs from 0 to 9"):
        build_linear_student(
            layout, *made(layout, None, None, outputs=3), written=np.array(written, int)
        )


def test_what_the_factors_leave_free_is_not_stored():
    layout = LAYOUTS["convolution"]
    student = build_linear_student(layout, *made(layout, 6, 7))
    # (6 of 12 channels, 9 places) to 7 of 10 outputs; orders of 12 and 10, biases of 10.
    assert student.parameters_stored == 6 * 6 + 12 + 6 * 9 * 7 + 7 * 3 + 10 + 10
    assert student.trainable == student.parameters_stored - 22
    plain = 12 * 6 + 6 * 9 * 7 + 7 * 10 + 10
    assert student.parameters_stored < plain


def test_tokens_have_any_leading_axes_and_the_input_s_dtype_comes_back():
    layout = LAYOUTS["tokens"]
    student = build_linear_student(layout, *made(layout, None, 4))
    z = torch.randn(2, 3, 24)
    assert student(z).shape == (2, 3, 10)
    assert student(z.to(torch.bfloat16)).dtype == torch.bfloat16
    torch.testing.assert_close(student(hidden_states=z), student(z))


@pytest.mark.parametrize("name", [*LAYOUTS])
def test_it_exports(name):
    layout = LAYOUTS[name]
    ranks = (None if input_channels(layout) == 1 else 5, 4)
    student = build_linear_student(layout, *made(layout, *ranks))
    z = torch.randn(2, *layout.input_shape)
    exported = torch.export.export(student, (z,)).module()
    torch.testing.assert_close(exported(z), student(z))


def test_its_state_can_be_copied_into_another():
    layout = LAYOUTS["convolution"]
    student = build_linear_student(layout, *made(layout, 5, 7))
    other = build_linear_student(layout, *made(layout, 5, 7, seed=1))
    other.load_state_dict(student.state_dict())
    z = torch.randn(2, *layout.input_shape)
    torch.testing.assert_close(other(z), student(z))


@pytest.mark.parametrize("which", ["P", "W1", "W2", "intercept"])
def test_factors_that_do_not_fit_are_refused(which):
    layout = LAYOUTS["convolution"]
    factors = dict(zip(("P", "W1", "W2", "intercept"), made(layout, 5, 7), strict=True))
    with pytest.raises(ValueError, match=f"{which} must have shape|W1 must have shape"):
        build_linear_student(layout, **(factors | {which: factors[which][:-1]}))
    broken = factors[which].copy()
    broken.flat[0] = np.nan
    with pytest.raises(ValueError, match=f"{which} contains NaN"):
        build_linear_student(layout, **(factors | {which: broken}))


def sparse(layout, share=0.3, seed=0, outputs=None):
    rng = np.random.default_rng(seed)
    shape = (layout.n_features - 1, outputs or layout.n_outputs)
    places = rng.random(shape) < share
    return np.where(places, rng.standard_normal(shape), 0), rng.standard_normal(shape[1]), places


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from([*LAYOUTS]),
    share=st.floats(0, 1),
    written=st.one_of(st.none(), st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True)),
    seed=st.integers(0, 1000),
)
def test_sparse_students_predict_the_map_in_few_numbers(name, share, written, seed):
    layout = LAYOUTS[name]
    s = None if written is None else len(written)
    W, b, places = sparse(layout, share, seed, s)
    student = build_linear_student(
        layout,
        None,
        W,
        None,
        b,
        written=None if written is None else np.array(written),
        places=places,
        dtype=torch.float64,
    )
    inputs = np.random.default_rng(seed).standard_normal((4, *layout.input_shape))
    with torch.no_grad():
        outputs = layout.targets(student(torch.from_numpy(inputs)).numpy())
    expected = predicted(layout, None, W, None, b, inputs)
    got = outputs if written is None else outputs[:, written]
    np.testing.assert_allclose(got, expected, atol=1e-9)
    kept = int(places.sum())
    assert student.parameters_stored == linear_student_size(layout, None, None, s, kept)
    orders = stored_orders(layout, None, None, s, sparse=True)
    assert student.parameters_stored == kept + (s or layout.n_outputs) + orders
    assert student.bytes_stored == 8 * (student.parameters_stored - orders) + 4 * orders
    # Its weights are for no gradient.
    assert student.trainable == (s or layout.n_outputs)


def test_sparse_students_export():
    layout = LAYOUTS["convolution"]
    W, b, places = sparse(layout)
    student = build_linear_student(layout, None, W, None, b, places=places)
    z = torch.randn(2, *layout.input_shape)
    torch.testing.assert_close(torch.export.export(student, (z,)).module()(z), student(z))
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z), student(z))


def test_sparse_students_have_no_ranks_and_a_place_for_each_weight():
    layout = LAYOUTS["convolution"]
    W, b, places = sparse(layout)
    with pytest.raises(ValueError, match=r"places must be booleans of shape \(108, 10\)"):
        build_linear_student(layout, None, W, None, b, places=places[1:])
    with pytest.raises(ValueError, match="places must be booleans"):
        build_linear_student(layout, None, W, None, b, places=places.astype(int))
    P, W1, W2, _ = made(layout, 5, 7)
    with pytest.raises(ValueError, match="a sparse student has no ranks, got 5 and 7"):
        build_linear_student(layout, P, W1, W2, b, places=np.ones(W1.shape, bool))
