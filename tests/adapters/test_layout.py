from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from cvxdistill.adapters.layout import ConvLayout, DenseLayout, infer_layout  # noqa: E402

rng = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("input_shape", "output_shape", "kernel", "stride", "padding"),
    [
        ((64, 8, 8), (64, 8, 8), 3, 1, 1),
        ((64, 8, 8), (128, 4, 4), 3, 2, 1),
        ((32, 16, 16), (64, 8, 8), 3, 2, 1),
        ((16, 7, 7), (32, 4, 4), 3, 2, 1),
        ((16, 28, 28), (32, 7, 7), 3, 4, 1),
        ((256, 2, 2), (512, 1, 1), 2, 2, 0),
        ((8, 3, 3), (4, 1, 1), 3, 3, 0),
        ((8, 1, 1), (4, 1, 1), 1, 1, 0),
        ((3, 30, 30), (8, 28, 28), 3, 1, 0),
        ((3, 9, 9), (8, 4, 4), 3, 2, 0),
        ((3, 8, 8), (8, 7, 7), 2, 1, 0),
        ((3, 12, 12), (8, 8, 8), 5, 1, 0),
    ],
)
def test_kernel_stride_and_padding_follow_from_the_shapes(
    input_shape, output_shape, kernel, stride, padding
):
    layout = infer_layout(input_shape, output_shape)
    assert isinstance(layout, ConvLayout)
    assert layout.kernel_size == (kernel, kernel)
    assert layout.stride == (stride, stride)
    assert layout.padding == (padding, padding)
    assert layout.n_features == input_shape[0] * kernel**2 + 1
    assert layout.n_outputs == output_shape[0]


def test_axes_are_inferred_apart_and_pairs_are_taken():
    layout = infer_layout((3, 8, 9), (4, 4, 9), kernel_size=(5, 3))
    assert (layout.kernel_size, layout.stride, layout.padding) == ((5, 3), (2, 1), (2, 1))


def test_overrides_are_kept():
    layout = infer_layout((3, 9, 9), (4, 4, 4), kernel_size=5, stride=2, padding=1)
    assert (layout.kernel_size, layout.stride, layout.padding) == ((5, 5), (2, 2), (1, 1))
    assert infer_layout((8, 2, 2), (4, 1, 1), kernel_size=3).padding == (1, 1)
    assert infer_layout((8, 2, 2), (4, 1, 1), padding=1).kernel_size == (3, 3)


@settings(max_examples=60, deadline=None)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    channels=st.integers(1, 3),
    n=st.integers(1, 4),
    cut=st.tuples(st.integers(0, 400), st.integers(0, 400)),
    double=st.booleans(),
)
def test_rows_are_the_patches_that_torch_unfolds(
    size, kernel, stride, padding, channels, n, cut, double
):
    grid = [
        (h + 2 * p - k) // s + 1 for h, k, s, p in zip(size, kernel, stride, padding, strict=True)
    ]
    assume(min(h + 2 * p - k for h, k, p in zip(size, kernel, padding, strict=True)) >= 0)
    dtype = np.float64 if double else np.float32
    images = rng.standard_normal((n, channels, *size)).astype(dtype)
    layout = ConvLayout((channels, *size), (2, *grid), kernel, stride, padding)
    rows = layout.rows(images)
    patches = torch.nn.functional.unfold(
        torch.from_numpy(images), kernel, padding=padding, stride=stride
    )
    patches = patches.transpose(1, 2).reshape(-1, layout.n_features - 1).numpy()
    expected = np.hstack([patches, np.ones((len(patches), 1), dtype)])
    assert rows.shape == expected.shape and rows.dtype == dtype and len(rows) == len(expected)
    np.testing.assert_array_equal(rows[:], expected)
    start, stop = sorted(cut)
    np.testing.assert_array_equal(rows[start:stop], expected[start:stop])
    assert rows[start:stop].dtype == dtype
    indices = rng.integers(0, len(expected), 15)
    np.testing.assert_array_equal(rows.take(indices), expected[indices])
    np.testing.assert_array_equal(rows[::-2], expected[::-2])


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 20),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    padding=st.integers(0, 3),
    given_kernel=st.booleans(),
)
def test_every_convolution_that_does_not_enlarge_has_a_layout(
    size, kernel, stride, padding, given_kernel
):
    out = (size + 2 * padding - kernel) // stride + 1
    assume(1 <= out <= size and size + 2 * padding >= kernel and padding < kernel)
    if given_kernel:
        layout = infer_layout(
            (2, size, size), (3, out, out), kernel_size=kernel, stride=stride, padding=padding
        )
        assert layout.stride == (stride, stride)
    else:
        try:
            layout = infer_layout((2, size, size), (3, out, out))
        except ValueError as error:
            assert "nearest that works" in str(error)
            return
    convolution = torch.nn.Conv2d(2, 3, layout.kernel_size, layout.stride, layout.padding)
    assert convolution(torch.zeros(1, 2, size, size)).shape[1:] == (3, out, out)


def test_usual_strided_blocks_get_their_stride_and_centring():
    for size in range(2, 33):
        for stride in (1, 2):
            out = (size - 1) // stride + 1
            if (size, out) in {(2, 1), (3, 1)}:
                continue
            layout = infer_layout((2, size, size), (3, out, out))
            assert (layout.kernel_size[0], layout.padding[0]) == (3, 1), (size, out)
            if out > 1:
                assert layout.stride[0] == stride


def test_rows_read_memory_maps_lazily(tmp_path):
    images = rng.standard_normal((6, 3, 5, 5)).astype(np.float32)
    path = tmp_path / "images"
    images.tofile(path)
    mapped = np.memmap(path, dtype=np.float32, mode="r", shape=images.shape)
    layout = infer_layout((3, 5, 5), (4, 3, 3))
    rows = layout.rows(mapped)
    # No row has been cut yet: what is written afterwards is seen.
    changed = np.memmap(path, dtype=np.float32, mode="r+", shape=images.shape)
    changed[3] = 1
    changed.flush()
    images[3] = 1
    np.testing.assert_array_equal(rows[:], layout.rows(images)[:])
    assert type(rows[2:9]) is np.ndarray


def test_cutting_in_pieces_gives_the_same_rows(monkeypatch):
    from cvxdistill.adapters import patches

    images = rng.standard_normal((9, 3, 6, 6)).astype(np.float32)
    rows = infer_layout((3, 6, 6), (4, 3, 3)).rows(images)
    whole, some = rows[:], rows.take(np.arange(80)[::-1])
    monkeypatch.setattr(patches, "PIECE_BYTES", 3000)
    np.testing.assert_array_equal(rows[:], whole)
    np.testing.assert_array_equal(rows.take(np.arange(80)[::-1]), some)
    np.testing.assert_array_equal(some, whole[79::-1])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_targets_are_in_the_order_of_the_rows(dtype):
    layout = infer_layout((2, 6, 5), (3, 6, 5))
    convolution = torch.nn.Conv2d(2, 3, 3, padding=1)
    convolution = convolution.to(torch.float64 if dtype == np.float64 else torch.float32)
    images = rng.standard_normal((4, 2, 6, 5)).astype(dtype)
    with torch.no_grad():
        outputs = convolution(torch.from_numpy(images)).numpy()
        W = convolution.weight.reshape(3, -1).T.numpy()
        b = convolution.bias.numpy()
    Y = layout.targets(outputs)
    np.testing.assert_allclose(layout.rows(images)[:] @ np.vstack([W, b]), Y, atol=1e-5)
    picked = np.array([7, 100, 3, 3])
    np.testing.assert_array_equal(layout.targets(outputs, picked), Y[picked])
    assert Y.dtype == dtype


@pytest.mark.parametrize(
    ("input_shape", "output_shape", "per_position", "d", "c", "positions"),
    [
        ((5,), (3,), False, 6, 3, 1),
        ((7, 5), (7, 3), True, 6, 3, 7),
        ((2, 7, 4, 5), (2, 7, 4, 3), True, 6, 3, 56),
        ((2, 3, 3), (4,), False, 19, 4, 1),
        ((7, 5), (6, 3), False, 36, 18, 1),
        ((5,), (), False, 6, 1, 1),
        ((), (3,), False, 2, 3, 1),
    ],
)
def test_dense_layouts_flatten_or_go_by_position(
    input_shape, output_shape, per_position, d, c, positions
):
    layout = infer_layout(input_shape, output_shape)
    assert layout == DenseLayout(input_shape, output_shape, per_position)
    assert (layout.n_features, layout.n_outputs, layout.n_positions) == (d, c, positions)
    inputs = rng.standard_normal((4, *input_shape)).astype(np.float32)
    outputs = rng.standard_normal((4, *output_shape)).astype(np.float32)
    rows, Y = layout.rows(inputs), layout.targets(outputs)
    expected = np.hstack([inputs.reshape(-1, d - 1), np.ones((4 * positions, 1), np.float32)])
    np.testing.assert_array_equal(rows[:], expected)
    np.testing.assert_array_equal(rows[1:3], expected[1:3])
    np.testing.assert_array_equal(rows.take(np.array([2, 0, 2])), expected[[2, 0, 2]])
    np.testing.assert_array_equal(Y, outputs.reshape(-1, c))
    np.testing.assert_array_equal(layout.targets(outputs, np.array([2, 0])), Y[[2, 0]])


IMAGES = np.zeros((2, 3, 4, 4), np.float32)
SAME = ConvLayout((3, 4, 4), (5, 4, 4), (3, 3), (1, 1), (1, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: infer_layout((3, 8, 8), (5, 8, 8), kernel_size=2),
            ValueError,
            r"kernel_size=2, stride=1 cannot turn the input \(3, 8, 8\) into the block's output "
            r"\(5, 8, 8\).*height must become 8.*nearest that works is kernel_size=1",
        ),
        (
            lambda: infer_layout((3, 8, 8), (5, 4, 4), kernel_size=3, stride=3, padding=1),
            ValueError,
            "it gives 3.*nearest that works is kernel_size=3, stride=2, padding=1",
        ),
        (
            lambda: infer_layout((3, 8, 8), (5, 8, 4), kernel_size=3, stride=1),
            ValueError,
            "the width must become 4 from 8.*nearest that works",
        ),
        (lambda: infer_layout((3, 4, 4), (3, 8, 8)), ValueError, "enlarges its images, from 4 x 4"),
        (lambda: infer_layout((3, 4, 4), (3, 4, 4), kernel_size=0), ValueError, "at least 1"),
        (lambda: infer_layout((3, 4, 4), (3, 4, 4), padding=-1), ValueError, "padding must be"),
        (lambda: infer_layout((3, 4, 4), (3, 4, 4), stride="2"), TypeError, "stride must be an in"),
        (lambda: infer_layout((3, 4, 4), (3, 4, 4), kernel_size=(3,)), TypeError, "pair of int"),
        (lambda: infer_layout((8,), (4,), kernel_size=3), ValueError, "kernel_size=3 is for bl"),
        (lambda: infer_layout((3, 0, 4), (3, 4, 4)), ValueError, "input_shape must have positive"),
        (lambda: infer_layout(5, (3,)), TypeError, "input_shape must be a tuple"),
        (lambda: infer_layout((2.5,), (3,)), TypeError, "input_shape must be a tuple"),
        (lambda: DenseLayout((2, 3), (3, 3), True), ValueError, "equal leading axes"),
        (lambda: ConvLayout((3, 4), (3, 4), 1, 1, 0), ValueError, "must be .channels, height"),
        (
            lambda: SAME.rows(IMAGES.astype(np.float16)),
            TypeError,
            "float32 or float64, got float16",
        ),
        (lambda: SAME.rows(IMAGES[:, :2]), ValueError, r"shape \('n', 3, 4, 4\).*got \(2, 2, 4"),
        (lambda: SAME.rows([[1]]), TypeError, "inputs must be a NumPy array, got list"),
        (lambda: SAME.targets(IMAGES), ValueError, r"outputs must have shape \('n', 5, 4, 4\)"),
        (lambda: SAME.rows(IMAGES)[3], TypeError, "rows are read by slices"),
        (lambda: SAME.rows(IMAGES).take(np.array([99])), IndexError, r"in \[0, 32\), got 99"),
        (lambda: SAME.rows(IMAGES).take(np.array([-1])), IndexError, r"in \[0, 32\), got -1"),
        (lambda: SAME.rows(IMAGES).take(np.array([0.5])), TypeError, "array of integers"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
