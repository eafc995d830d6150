"""Gates outside a set whose dual constraints a residual violates.

At the optimum on some gates, the programme over *all* gates of the data is solved too if no other
gate violates its dual constraint; the gates that do are those whose weights would leave zero.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cvxdistill.solvers.gate_margins import nudge_gates
from cvxdistill.solvers.gate_search import (
    GatedObjective,
    GatewisePenalty,
    ReLUObjective,
    SearchObjective,
    climb,
)
from cvxdistill.solvers.gates import check_count, check_gates, distinct_patterns, evaluate_gates
from cvxdistill.solvers.penalties import NeuronPenalty, Penalty, Regularizer, find_regularizer
from cvxdistill.solvers.rows import check_rows

ACTIVATIONS = ("gated_relu", "relu")
# Circles for each start of a search.
MAX_STEPS = 40
# Before a search without success is believed, it is repeated with this many times the starts.
SECOND_LOOK = 4


def violating_gates(
    X: Any,
    R: Any,
    alpha: float,
    *,
    G: Any = None,
    activation: str = "gated_relu",
    penalty: str | Penalty = "neuron",
    bias: bool = False,
    n_starts: int = 32,
    random_state: int | np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Gates outside the set G whose dual constraint the residual R violates.

    With C_g = X^T diag(D(g)) R / n, a gate g violates R°(C_g) <= alpha; for ReLU networks, if
    |R[:, k]^T relu(X u)| / n > alpha ||u|| for some output k and some u in its cone.

    Parameters
    ----------
    X : array of shape (n, d)
    R : array of shape (n,) or (n, c)
        Residual, -n grad L(Z).
    alpha : float
        Regularisation strength (alpha rho for a penalty blended with a ridge).
    G : array of shape (d, p) or (d + 1, p), optional
        Gates of the set; some of the starts of the search.
    activation : {"gated_relu", "relu"}
    penalty : {"neuron", "gate", "nuclear", "l1"} or Penalty
        For "relu" only "neuron".
    bias : bool, default=False
        Look for gates with a bias, of shape (d + 1,); with ``G``, its shape decides.
    n_starts : int, default=32
    random_state : int, Generator or None

    Returns
    -------
    G : ndarray of shape (d, p') or (d + 1, p')
        Violators, the worst first, with distinct patterns that are neither zero nor in the set;
        p' <= 2 n_starts, and 0 if none was found. For "relu" all rows of X are clear of their
        hyperplanes, as ``nudge_gates`` leaves them.
    values : ndarray of shape (p',)
        R°(C_g), or |R[:, k]^T relu(X g)| / (n ||g||): larger than alpha.

    Raises
    ------
    ValueError, TypeError
        If the arguments do not fit, or the penalty is not a sum over gates ("feature": its dual
        constraints join all gates), or bounds no dual variable ("ridge", "none": all gates violate
        theirs).
    """
    finder = GateFinder(
        X,
        regularizer=find_regularizer(penalty, 1.0),
        activation=activation,
        bias=bias,
        n_starts=n_starts,
        random_state=random_state,
        G=G,
    )
    X = finder.X
    R = np.asarray(R)
    R = R[:, None] if R.ndim == 1 else R
    if R.ndim != 2 or len(R) != len(X) or R.dtype.kind not in "fiub" or not np.isfinite(R).all():
        raise ValueError(
            f"R must hold finite numbers of shape ({len(X)},) or ({len(X)}, c), got {R.shape}."
        )
    if not isinstance(alpha, (int, float, np.number)) or isinstance(alpha, bool):
        raise TypeError(f"alpha must be a number, got {alpha!r}.")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha must be positive and finite, got {alpha!r}.")
    known = np.empty((finder.inputs.shape[1], 0), X.dtype) if G is None else np.asarray(G, X.dtype)
    objective = finder.objective(R)
    found, values = finder.search(objective, known, n_starts)
    new = finder.new_gates(known, found)
    new = new[values[new] > alpha]
    return found[:, new], values[new]


class GateFinder:
    """Searches for violators on the same rows, one after the other.

    Parameters
    ----------
    X, activation, bias, n_starts, random_state
        As of ``violating_gates``.
    regularizer : Regularizer
    G : array of shape (d, p) or (d + 1, p), optional
        Gates whose shape says whether there are biases.

    Raises
    ------
    ValueError, TypeError
        As ``violating_gates``.
    """

    def __init__(
        self,
        X: Any,
        *,
        regularizer: Regularizer,
        activation: str,
        bias: bool,
        n_starts: int,
        random_state: int | np.random.Generator | None,
        G: Any = None,
    ):
        X = check_rows(X)
        if not isinstance(X, np.ndarray):
            raise TypeError(
                "X must be a NumPy array: the search for gates takes its rows in any order, got "
                f"{type(X).__name__}."
            )
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}.")
        if G is not None:
            bias = len(check_gates(G, X.shape[1])) > X.shape[1]
        if bias and activation == "relu":
            raise ValueError(
                "bias must be False for activation='relu', whose gates are weights; put a "
                "constant column into X instead."
            )
        self.penalty = _gatewise_penalty(regularizer, activation)
        self.X, self.activation, self.bias = X, activation, bool(bias)
        self.inputs = np.hstack([X, np.ones((len(X), 1), X.dtype)]) if bias else X
        self.n_starts = check_count("n_starts", n_starts)
        self.rng = np.random.default_rng(random_state)

    def objective(self, R: np.ndarray, scale: np.ndarray | None = None) -> SearchObjective:
        """What the dual constraint bounds, for weights of X with columns divided by ``scale``."""
        if self.activation == "relu":
            return ReLUObjective(self.X, R, scale)
        X = self.X if scale is None else self.X / scale
        return GatedObjective(X, self.inputs, R, self.penalty)

    def search(
        self, objective: SearchObjective, G: np.ndarray, n_starts: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """What climbs from ``n_starts`` gates reach, and the values, the largest first.

        A quarter of the starts are gates of G, a quarter normals of the hyperplanes midway between
        two rows, and the others standard normal.
        """
        X, rng = self.X, self.rng
        known = G[:, rng.permutation(G.shape[1])[: n_starts // 4]]
        first, second = X[rng.integers(len(X), size=(2, n_starts // 4))]
        pairs = (first - second).T
        if self.bias:
            offsets = np.einsum("md,md->m", second - first, second + first) / 2
            pairs = np.vstack([pairs, offsets])
        others = rng.standard_normal((len(G), n_starts - known.shape[1] - pairs.shape[1]))
        starts = np.hstack([known, pairs, others])
        found = climb(objective, starts, max_steps=MAX_STEPS, rng=rng)
        if self.activation == "relu":
            found = self.clear_of_rows(found)
        values = objective.values(found)
        order = np.argsort(-values)
        return found[:, order], values[order]

    def violators(
        self, objective: SearchObjective, G: np.ndarray, bound: float
    ) -> tuple[np.ndarray, float]:
        """New gates with values above the bound, and the largest value of old and new gates."""
        worst = float(objective.values(G).max())
        for n_starts in (self.n_starts, SECOND_LOOK * self.n_starts):
            found, values = self.search(objective, G, n_starts)
            worst = max(worst, float(values.max(initial=0)))
            new = self.new_gates(G, found)
            new = new[values[new] > bound]
            if len(new):
                break
        return found[:, new], worst

    def new_gates(self, G: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Indices of the gates found whose patterns are not zero, nor those of G or each other."""
        both = np.hstack([G, found])
        if both.shape[1] == 0:
            return np.arange(0)
        keep = distinct_patterns(evaluate_gates(self.X, both))
        return keep[keep >= G.shape[1]] - G.shape[1]

    def clear_of_rows(self, G: np.ndarray) -> np.ndarray:
        """The gates moved clear of the rows of X; those that cannot be are left out."""
        try:
            return nudge_gates(self.X, G, random_state=self.rng)
        except ValueError:
            if G.shape[1] <= 1:
                return G[:, :0]
        return np.hstack([self.clear_of_rows(g[:, None]) for g in G.T])


def complementary_gates(
    objective: SearchObjective, G: np.ndarray, bound: float, count: int
) -> list[int]:
    """Indices of the worst violator, of the worst after the best step of that, and so on.

    Ends at ``count`` gates, or when none is left that violates the bound.
    """
    left = list(range(G.shape[1]))
    chosen: list[int] = []
    while left and len(chosen) < count:
        values = objective.values(G[:, left])
        worst = int(values.argmax())
        if values[worst] <= bound:
            break
        chosen.append(left.pop(worst))
        objective = objective.after_step(G[:, chosen[-1]], bound)
    return chosen


def _gatewise_penalty(regularizer: Regularizer, activation: str) -> GatewisePenalty:
    penalty = regularizer.penalty
    if regularizer.l1_ratio == 0 or not regularizer.bounds_the_dual:
        raise ValueError(
            "penalty must bound the dual variables: with a pure ridge or none every gate that is "
            "left out violates its constraint."
        )
    if not isinstance(penalty, GatewisePenalty):
        raise ValueError(
            f"penalty must be one of 'neuron', 'gate', 'nuclear', 'l1', got {penalty!r}: others do "
            "not have a dual constraint for each gate ('feature' has one for all gates together)."
        )
    if activation == "relu" and not isinstance(penalty, NeuronPenalty):
        raise ValueError(
            f"penalty must be 'neuron' for activation='relu', got {penalty!r}: only then are the "
            "dual constraints of a gate those of its single neurons."
        )
    return penalty
