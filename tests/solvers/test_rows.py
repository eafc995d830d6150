from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvxdistill.solvers.rows import BLOCK_BYTES, SMALLEST_BLOCK, check_rows, even_blocks, row_blocks
from cvxdistill.solvers.threads import one_blas_thread, run_in_threads


@given(st.integers(1, 10**5), st.integers(1, 10**4), st.sampled_from([np.float32, np.float64]))
def test_blocks_cover_all_rows_once_in_order_and_fit_in_cache(n, width, dtype):
    blocks = list(row_blocks(n, width, dtype))
    assert blocks[0].start == 0 and blocks[-1].stop == n
    assert all(a.stop == b.start for a, b in itertools.pairwise(blocks))
    for block in blocks:
        rows = block.stop - block.start
        size = rows * width * np.dtype(dtype).itemsize
        assert rows > 0 and (size <= BLOCK_BYTES or rows <= SMALLEST_BLOCK)


@given(st.integers(1, 10**4), st.integers(1, 50), st.integers(1, 9))
def test_even_blocks_are_as_many_for_each_thread(n, count, threads):
    blocks = even_blocks(n, count, threads)
    assert blocks[0].start == 0 and blocks[-1].stop == n
    assert all(a.stop == b.start for a, b in itertools.pairwise(blocks))
    sizes = [block.stop - block.start for block in blocks]
    assert 0 < min(sizes) <= max(sizes) <= min(sizes) + 1
    assert len(blocks) == n or (len(blocks) >= count and len(blocks) % threads == 0)


@pytest.mark.parametrize("given_as", ["float32", "float64"])
def test_float_arrays_are_taken_as_they_are(given_as):
    X = np.ones((3, 2), given_as, order="F")
    assert check_rows(X) is X


@pytest.mark.parametrize(
    ("given_as", "becomes"), [("float16", "float32"), ("int8", "float64"), ("bool", "float64")]
)
def test_other_numbers_become_floats(given_as, becomes):
    assert check_rows(np.ones((3, 2), given_as)).dtype == becomes


def test_row_sources_and_memory_maps_are_taken_as_they_are(rows_only, tmp_path):
    source = rows_only(np.ones((3, 2)))
    assert check_rows(source) is source
    np.save(tmp_path / "X.npy", np.ones((3, 2)))
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    assert check_rows(mapped) is mapped


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_blocks_and_answer_in_order(monkeypatch, threads):
    monkeypatch.setattr("cvxdistill.solvers.threads.n_threads", lambda: threads)
    blocks = list(row_blocks(7 * SMALLEST_BLOCK, BLOCK_BYTES, np.float64))
    assert len(blocks) == 7
    with one_blas_thread():
        answers = run_in_threads(list, blocks)
    assert len(answers) == min(threads, 7)
    assert [block for run in answers for block in run] == blocks


def test_an_error_in_a_thread_reaches_the_caller(monkeypatch):
    monkeypatch.setattr("cvxdistill.solvers.threads.n_threads", lambda: 2)

    def fail(blocks):
        raise RuntimeError("rows cannot be read")

    with pytest.raises(RuntimeError, match="rows cannot be read"):
        run_in_threads(fail, [slice(0, 1), slice(1, 2)])
