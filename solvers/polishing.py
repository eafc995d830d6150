"""Polishing: fewer hidden units from a first layer that stays, by a group elastic net.

With W1 frozen and the features H[:, h] = D[:, gate[h]] * (X W1[:, h]), the second layer is

    minimise over W2, b   1/(2n) ||H W2 + 1 b^T - Y||_F^2
                          + alpha * sum_h w_h (rho ||B[h, :]|| + (1 - rho)/2 ||B[h, :]||^2)

with B[h, :] = s_h W2[h, :] and s_h the standard deviation of H[:, h] over the rows: what is charged
is a unit's contribution to the output, however its two layers are scaled. The weights are adaptive,
w_h = 1 / ||B[h, :]|| of least squares on all units: those that contribute much are hardly shrunk,
and fewer of the others are needed to make up for it. A unit whose row is zero is gone, and a gate
with its last unit.

The programme is in ``second_layer.py``; here are the path and the choice.

References
----------
Varshney and Pilanci 2024, section 4.3 and appendix A.2; Zou 2006 and Wang and Leng 2008 (adaptive
weights).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from cvxdistill.solvers.gated_operator import GatedOperator
from cvxdistill.solvers.network import Neurons
from cvxdistill.solvers.path import alpha_grid
from cvxdistill.solvers.rows import RowSource
from cvxdistill.solvers.second_layer import (
    RowSums,
    SecondLayer,
    SecondLayerProgramme,
    activation_error,
    sum_rows,
)

# The path: this many alphas down to this share of alpha_max, then halvings of the last step.
N_ALPHAS, SMALLEST_SHARE, HALVINGS = 40, 1e-6, 6
# By this share the elastic net's own weights must be better than least squares. They are shrunken,
# which lowers the error a little and can cost whatever follows the network much more.
SHRINKAGE_MARGIN = 0.005


@dataclass(frozen=True)
class PolishingPoint:
    """One network of the path.

    Attributes
    ----------
    alpha : float or None
        0 for least squares on all units, None for the network that was given.
    n_neurons, n_gates : int
        Units, and gates that they use.
    parameters : int
        Stored numbers, gates included.
    error : float
        ||Y' - Y||_F / ||Y||_F on the held-out rows.
    refitted : bool
        Whether W2 is that of least squares on the units that are left, not the elastic net's.
    duality_gap : float
        Relative duality gap of the group elastic net.
    """

    alpha: float | None
    n_neurons: int
    n_gates: int
    parameters: int
    error: float
    refitted: bool = False
    duality_gap: float = 0.0


@dataclass(frozen=True, repr=False)
class Polishing:
    """What polishing did; ``print`` it for the path.

    Attributes
    ----------
    neurons : Neurons
        The units that are left, with the numbers of their gates as they were.
    intercept : ndarray of shape (c,)
    units, gates : ndarray of int
        Numbers of the units that are left, and of the gates that they use.
    before, after : PolishingPoint
        The same where nothing was as good as the network given, which is then returned as it was.
    path : tuple of PolishingPoint
        All networks that were tried, in that order.
    """

    neurons: Neurons = field(repr=False)
    intercept: np.ndarray
    units: np.ndarray
    gates: np.ndarray
    before: PolishingPoint
    after: PolishingPoint
    path: tuple[PolishingPoint, ...]

    @property
    def changed(self) -> bool:
        """False if the network is the one that was given."""
        return self.after is not self.before

    @property
    def alpha(self) -> float | None:
        """Of the network chosen; None if it is the one that was given."""
        return self.after.alpha

    @property
    def summary(self) -> str:
        """Neurons, parameters and held-out error before and after, on one line."""
        before, after = self.before, self.after
        if not self.changed:
            return (
                f"{before.n_neurons:,} units stay, {before.parameters:,} parameters, held-out "
                f"error {before.error:.4f}: no network tried met the criterion"
            )
        return (
            f"{before.n_neurons:,} -> {after.n_neurons:,} units, {before.n_gates:,} -> "
            f"{after.n_gates:,} gates, {before.parameters:,} -> {after.parameters:,} parameters, "
            f"held-out error {before.error:.4f} -> {after.error:.4f}"
        )

    def __repr__(self) -> str:
        return f"Polishing({self.summary})"

    def __str__(self) -> str:
        lines = [f"  {'alpha':>9}  {'units':>6}  {'gates':>6}  {'parameters':>11}  {'error':>8}"]
        for point in (self.before, *self.path):
            alpha = "given" if point.alpha is None else f"{point.alpha:.2e}"
            lines.append(
                f"{'*' if point is self.after else ' '} {alpha:>9}  {point.n_neurons:>6,}  "
                f"{point.n_gates:>6,}  {point.parameters:>11,}  {point.error:>8.4f}"
                f"{'  refitted' if point.refitted else ''}"
            )
        return "\n".join([self.summary, "", *lines])


def polish_neurons(
    neurons: Neurons,
    intercept: np.ndarray,
    operator: GatedOperator,
    Y: RowSource,
    held_out: GatedOperator,
    held_out_Y: RowSource,
    *,
    max_neurons: int | None = None,
    max_error: float | None = None,
    l1_ratio: float = 1.0,
    tol: float = 1e-3,
    measure: Callable[[np.ndarray], tuple[int, int]] | None = None,
    verbose: int = 0,
) -> Polishing:
    """Recompute W2 of a network along a path of alphas and choose by the held-out error.

    The path goes down from the alpha at which no unit is left, each point started at the solution
    before or at the given W2, whichever has the lower objective, and ends where the criterion is
    met; the last step is then halved. At each alpha least squares on the units that are left
    replaces the elastic net's weights, unless these are better by 0.5 %. Units that are constant on
    the rows (the intercept has them) or multiples of others are dropped first.

    Parameters
    ----------
    neurons : Neurons
        W1 (d, m), W2 (m, c), gate (m,).
    intercept : ndarray of shape (c,)
    operator, held_out : GatedOperator
        Rows to fit and rows to judge by, with their patterns.
    Y, held_out_Y : array or row source of shape (n, c)
    max_neurons : int, optional
        Choose the best held-out error among networks of at most so many units; a given network of
        no more units than that is one of them.
    max_error : float, optional
        Otherwise choose the fewest units with at most this held-out error, by default that of the
        given network. A network with as many units as the given one must not have a larger error.
    l1_ratio : float in (0, 1], default=1.0
        rho.
    tol : float, default=1e-3
        Relative duality gap of each group elastic net.
    measure : callable, optional
        From the gate numbers of units to how many gates and how many numbers their network stores;
        by default (d + c) numbers for each unit, d for each gate, and c.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    Polishing
        The given network, unchanged, where none that was tried meets the criterion.

    Raises
    ------
    ValueError
        If shapes do not fit, or an option is out of range.
    """
    _check(neurons, operator, Y, held_out, held_out_Y)
    if not 0 < l1_ratio <= 1:
        raise ValueError(f"l1_ratio must lie in (0, 1], to drop units at all; got {l1_ratio!r}.")
    if max_neurons is not None and (max_neurons < 1 or max_error is not None):
        raise ValueError(
            f"max_neurons must be at least 1 and come without max_error, got {max_neurons!r} and "
            f"max_error={max_error!r}."
        )
    theta = np.vstack([neurons.W2, np.reshape(intercept, (1, -1))]).astype(np.float64)
    sums = sum_rows(operator, neurons, theta, Y)
    search = _Search(
        neurons,
        theta,
        SecondLayerProgramme(sums, theta, l1_ratio, tol, neurons.W2.dtype),
        sum_rows(held_out, neurons, theta, held_out_Y),
        measure or _plain_measure(neurons),
        (max_neurons, max_error),
    )
    search.run(verbose)
    path = tuple(sorted(search.path, key=lambda point: point.alpha or 0.0, reverse=True))
    if search.best is not None:
        after, layer = search.best
        left = Neurons(neurons.W1[:, layer.units], layer.W2, neurons.gate[layer.units])
        # Once more from the rows: sums decide but for rounding, and this is a promise.
        again = np.vstack([layer.W2, layer.intercept]).astype(np.float64)
        if activation_error(held_out, left, again, held_out_Y) <= search.criterion.limit:
            gates = np.unique(left.gate)
            return Polishing(left, layer.intercept, layer.units, gates, search.before, after, path)
    units, gates = np.arange(len(neurons)), np.unique(neurons.gate)
    before = search.before
    return Polishing(neurons, np.asarray(intercept), units, gates, before, before, path)


class _Search:
    """The path, and the best network on it."""

    def __init__(
        self,
        neurons: Neurons,
        theta: np.ndarray,
        programme: SecondLayerProgramme,
        judge: RowSums,
        measure: Callable[[np.ndarray], tuple[int, int]],
        wanted: tuple[int | None, float | None],
    ):
        self.gate, self.theta = neurons.gate, theta
        self.programme, self.judge, self.measure = programme, judge, measure
        self.before = self._point(self.gate, judge.error(np.zeros_like(theta)), alpha=None)
        self.criterion = _Criterion(self.before, *wanted)
        self.path: list[PolishingPoint] = []
        self.best: tuple[PolishingPoint, SecondLayer] | None = None

    def run(self, verbose: int) -> None:
        """Go down until the criterion is met, then find out more closely where it first is."""
        largest = self.programme.alpha_max()
        alphas = alpha_grid(largest, N_ALPHAS, SMALLEST_SHARE) if largest > 0 else np.zeros(0)
        high, units_at_high, error = 0.0, 0, np.inf
        for alpha in tqdm(alphas, disable=not verbose, desc="polish", leave=False):
            point = self.attempt(float(alpha))
            if self.criterion.reached(point):
                break
            if point.n_neurons == len(self.programme.units) and point.error >= error:
                # All are in, and less shrinkage does no good.
                self.attempt(0.0)
                return
            high, units_at_high, error = float(alpha), point.n_neurons, point.error
        else:
            self.attempt(0.0)
            return
        low, units_at_low = float(alpha), point.n_neurons
        for _ in range(HALVINGS if high else 0):
            if units_at_low - units_at_high <= 1:
                return
            middle = (high * low) ** 0.5
            point = self.attempt(middle)
            if self.criterion.reached(point):
                low, units_at_low = middle, point.n_neurons
            else:
                high, units_at_high = middle, point.n_neurons

    def attempt(self, alpha: float) -> PolishingPoint:
        """Solve for one alpha, judge, and keep what is best."""
        gap, layers = self.programme.solve(alpha)
        errors = [self.judge.error(layer.weights(len(self.gate)) - self.theta) for layer in layers]
        k = len(errors) - 1
        if errors[0] < (1 - SHRINKAGE_MARGIN) * errors[k]:
            k = 0
        point = self._point(
            self.gate[layers[k].units],
            errors[k],
            alpha=alpha,
            refitted=k > 0 or alpha == 0,
            duality_gap=gap,
        )
        self.path.append(point)
        if self.criterion.admits(point) and (
            self.best is None or self.criterion.rank(point) < self.criterion.rank(self.best[0])
        ):
            self.best = point, layers[k]
        return point

    def _point(self, gate: np.ndarray, error: float, **more: Any) -> PolishingPoint:
        n_gates, parameters = self.measure(gate)
        return PolishingPoint(
            n_neurons=len(gate), n_gates=n_gates, parameters=parameters, error=error, **more
        )


@dataclass(frozen=True)
class _Criterion:
    """Which networks will do, and which of them is the best."""

    before: PolishingPoint
    max_neurons: int | None
    max_error: float | None

    @property
    def limit(self) -> float:
        if self.max_neurons is not None:
            keeps = self.before.n_neurons <= self.max_neurons
            return self.before.error if keeps else np.inf
        return self.before.error if self.max_error is None else self.max_error

    def admits(self, point: PolishingPoint) -> bool:
        if point.error > self.limit:
            return False
        if self.max_neurons is not None:
            return point.n_neurons <= self.max_neurons
        return point.n_neurons < self.before.n_neurons or point.error <= self.before.error

    def reached(self, point: PolishingPoint) -> bool:
        """Whether smaller alphas have nothing more to offer."""
        if self.max_neurons is not None:
            return point.n_neurons >= self.max_neurons
        return self.admits(point)

    def rank(self, point: PolishingPoint) -> tuple[float, float]:
        if self.max_neurons is not None:
            return point.error, point.n_neurons
        return point.n_neurons, point.error


def _check(
    neurons: Neurons,
    operator: GatedOperator,
    Y: RowSource,
    held_out: GatedOperator,
    held_out_Y: RowSource,
) -> None:
    d, c = neurons.W1.shape[0], neurons.W2.shape[1]
    for A, targets, name in ((operator, Y, "Y"), (held_out, held_out_Y, "held_out_Y")):
        if A.d != d or tuple(targets.shape) != (A.n, c):
            raise ValueError(
                f"W1 {neurons.W1.shape}, W2 {neurons.W2.shape}, {A} and {name} of shape "
                f"{tuple(targets.shape)} do not fit."
            )
        if len(neurons) and not 0 <= neurons.gate.min() <= neurons.gate.max() < A.p:
            raise ValueError(f"Each unit's gate must lie in range({A.p}), got {neurons.gate}.")


def _plain_measure(neurons: Neurons) -> Callable[[np.ndarray], tuple[int, int]]:
    d, c = neurons.W1.shape[0], neurons.W2.shape[1]

    def measure(gate: np.ndarray) -> tuple[int, int]:
        n_gates = len(np.unique(gate))
        return n_gates, len(gate) * (d + c) + n_gates * d + c

    return measure
