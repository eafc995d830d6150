"""The order in which examples are drawn."""

from __future__ import annotations

import numpy as np
import pytest

from cvxdistill.solvers.random_order import random_order


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_every_example_is_there_once_and_the_seed_decides(n):
    first, same = (random_order(np.random.default_rng(3), n) for _ in range(2))
    np.testing.assert_array_equal(np.sort(first), np.arange(n))
    np.testing.assert_array_equal(first, same)
    assert n < 1000 or not np.array_equal(first, random_order(np.random.default_rng(4), n))


@pytest.mark.parametrize("seed", range(5))
def test_data_shuffled_with_the_same_seed_are_not_sorted_again(seed):
    labels = np.repeat(np.arange(10), 500)
    places = np.random.default_rng(seed).permutation(5000)
    for shuffled in (labels[places], labels[np.argsort(places)]):
        first = shuffled[random_order(np.random.default_rng(seed), 5000)[:500]]
        # 50 of each class are expected, with a standard deviation of 6.4.
        assert np.abs(np.bincount(first, minlength=10) - 50).max() < 5 * 6.4
        below = shuffled[random_order(np.random.default_rng(seed), 5000) < 500]
        assert np.abs(np.bincount(below, minlength=10) - 50).max() < 5 * 6.4
