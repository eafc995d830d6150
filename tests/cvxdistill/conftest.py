"""Data that the tests of the estimators share."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest


class Data(NamedTuple):
    X: np.ndarray
    y: np.ndarray
    Y: np.ndarray
    labels: np.ndarray
    three: np.ndarray


@pytest.fixture(scope="module")
def data() -> Data:
    """Inputs, one target, two targets, two classes, three classes."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((80, 4))
    Y = np.stack([np.abs(X[:, 0]) + X[:, 1], np.maximum(X[:, 2], 0)], axis=1)
    Y = Y + 0.1 * rng.standard_normal(Y.shape) + 2.0
    three = np.digitize(Y[:, 0], [2.0, 3.0])
    return Data(X, Y[:, 0], Y, np.where(Y[:, 0] > 2.5, "high", "low"), three)


@pytest.fixture
def quick() -> dict[str, Any]:
    return {"n_gates": 12, "alpha": 1e-2, "random_state": 0}
