"""Data and oracles that the tests of the solvers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cvxdistill.solvers import GatedReLUProblem, activation_patterns, sample_gates


class RowsOnly:
    """A row source that has nothing but a shape, a dtype and slices of rows."""

    def __init__(self, X: np.ndarray):
        self._X = X
        self.shape = X.shape
        self.dtype = X.dtype

    def __getitem__(self, rows: slice) -> np.ndarray:
        assert isinstance(rows, slice)
        return self._X[rows].copy()


def explicit_matrix(X: np.ndarray, D: np.ndarray) -> np.ndarray:
    """[D_1 X, ..., D_p X], of shape (n, p d)."""
    return np.hstack([D[:, [j]] * X for j in range(D.shape[1])])


def random_problem(
    n: int = 40,
    d: int = 5,
    p: int = 8,
    c: int = 2,
    seed: int = 0,
    dtype: Any = float,
    **options: Any,
) -> GatedReLUProblem:
    """A problem whose targets are partly a gated network and partly noise."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)).astype(dtype)
    D, _ = activation_patterns(X, sample_gates(d, p, random_state=seed, dtype=dtype))
    hidden = np.maximum(X @ rng.standard_normal((d, 3)), 0)
    Y = hidden @ rng.standard_normal((3, c)) + 0.3 * rng.standard_normal((n, c)) + 0.5
    return GatedReLUProblem(X, Y, D, **options)


@pytest.fixture(scope="session")
def rows_only() -> type[RowsOnly]:
    return RowsOnly


@pytest.fixture(scope="session")
def gated_matrix() -> Callable[..., np.ndarray]:
    return explicit_matrix


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., GatedReLUProblem]:
    return random_problem
