"""Data and oracles that the tests of the solvers share."""

from __future__ import annotations

import warnings
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


def random_targets(loss: str, H: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Targets that a loss takes, partly explained by H (n, c); one column for "logistic"."""
    noise = rng.standard_normal(H.shape)
    if loss == "squared":
        return H + 0.3 * noise + 0.5
    if loss == "huber":
        return H + 0.5 + 3 * noise * (rng.random(H.shape) < 0.3)
    scores = (H - np.median(H, axis=0)) / H.std(axis=0) + noise
    if loss == "logistic":
        return np.where(scores[:, :1] > 0, 1.0, -1.0)
    return np.eye(H.shape[1])[scores.argmax(axis=1)]


def random_problem(
    n: int = 40,
    d: int = 5,
    p: int = 8,
    c: int = 2,
    seed: int = 0,
    dtype: Any = float,
    loss: str = "squared",
    programme: Any = GatedReLUProblem,
    **options: Any,
) -> Any:
    """A problem whose targets are partly a gated network and partly noise."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d)).astype(dtype)
    D, _ = activation_patterns(X, sample_gates(d, p, random_state=seed, dtype=dtype))
    hidden = np.maximum(X @ rng.standard_normal((d, 3)), 0)
    Y = random_targets(loss, hidden @ rng.standard_normal((3, c)), rng)
    return programme(X, Y, D, loss=loss, **options)


def cvxpy_optimum(
    X: np.ndarray,
    Y: np.ndarray,
    D: np.ndarray,
    alpha: float,
    *,
    loss: str = "squared",
    penalty: str = "neuron",
    l1_ratio: float = 1.0,
    fit_intercept: bool = False,
    sample_weight: np.ndarray | None = None,
    relu: bool = False,
) -> tuple[float, np.ndarray]:
    """Optimal value of the whole programme, written out for cvxpy and solved by Clarabel.

    The weights come with it, of shape (p, d, c), or (2, p, d, c) for ReLU networks.
    """
    cp = pytest.importorskip("cvxpy")
    (n, d), p, c = X.shape, D.shape[1], Y.shape[1]
    A, w = explicit_matrix(X, D), np.ones(n) if sample_weight is None else sample_weight
    sides = [cp.Variable((p * d, c)) for _ in range(2 if relu else 1)]
    b = cp.Variable((1, c)) if fit_intercept else np.zeros((1, c))
    Z = A @ sides[0] - A @ sides[1] if relu else A @ sides[0]
    Z = Z + np.ones((n, 1)) @ b
    if loss == "squared":
        losses = cp.sum(cp.square(Z - Y), axis=1) / 2
    elif loss == "huber":
        losses = cp.sum(cp.huber(Z - Y, 1.35), axis=1) / 2
    elif loss == "logistic":
        losses = cp.logistic(-cp.multiply(Y, Z))[:, 0]
    else:
        losses = cp.log_sum_exp(Z, axis=1) - cp.sum(cp.multiply(Y, Z), axis=1)
    gates = [W[j * d : (j + 1) * d] for W in sides for j in range(p)]
    norm = {
        "neuron": lambda: cp.sum([cp.sum(cp.norm(v, 2, axis=0)) for v in gates]),
        "gate": lambda: cp.sum([cp.norm(v, "fro") for v in gates]),
        "nuclear": lambda: cp.sum([cp.normNuc(v) for v in gates]),
        "feature": lambda: cp.sum([cp.norm(cp.hstack([v[i] for v in gates])) for i in range(d)]),
        "l1": lambda: cp.sum([cp.sum(cp.abs(v)) for v in gates]),
        "ridge": lambda: cp.sum([cp.sum_squares(v) for v in gates]) / 2,
        "none": lambda: 0,
    }[penalty]()
    squares = cp.sum([cp.sum_squares(v) for v in gates])
    omega = l1_ratio * norm + (1 - l1_ratio) / 2 * squares if l1_ratio < 1 else norm
    margins = [(2 * D[:, [j % p]] - 1) * X @ v for j, v in enumerate(gates)] if relu else []
    programme = cp.Problem(
        cp.Minimize(w @ losses / w.sum() + alpha * omega), [margin >= 0 for margin in margins]
    )
    tolerances = {"tol_gap_abs": 1e-10, "tol_gap_rel": 1e-10, "tol_feas": 1e-10}
    with warnings.catch_warnings():
        # Clarabel may stop short of these; the comparison says whether it was near enough.
        warnings.filterwarnings("ignore", "Solution may be inaccurate", UserWarning)
        programme.solve(solver=cp.CLARABEL, **tolerances)
    assert programme.status in ("optimal", "optimal_inaccurate")
    V = np.stack([W.value.reshape(p, d, c) for W in sides])
    return programme.value, V if relu else V[0]


@pytest.fixture(scope="session")
def rows_only() -> type[RowsOnly]:
    return RowsOnly


@pytest.fixture(scope="session")
def gated_matrix() -> Callable[..., np.ndarray]:
    return explicit_matrix


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., Any]:
    return random_problem


@pytest.fixture(scope="session")
def make_targets() -> Callable[..., np.ndarray]:
    return random_targets


@pytest.fixture(scope="session")
def solve_with_cvxpy() -> Callable[..., tuple[float, np.ndarray]]:
    return cvxpy_optimum
