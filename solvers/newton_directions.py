"""Newton's directions on the dual of gated ReLU, each in the cheapest way that is good enough.

Conjugate gradients solve a system roughly, or to what a direction needs, from the inverse of
another one: that of an earlier step, whose gates and kappa were others, or its own in single
precision.
"""

from __future__ import annotations

import numpy as np

from cvxdistill.solvers.conjugate_gradients import conjugate_gradients
from cvxdistill.solvers.gated_newton import Inverse, NewtonSystem
from cvxdistill.solvers.scaled_gates import ScaledGates

# Most conjugate gradients for a direction, and how many times dearer a factorisation must be.
ITERATIONS, DEARER = 12, 2.0
# The share of the residual that they may leave: by themselves, from an earlier inverse, and from a
# factor in single precision.
ROUGH, EARLIER, MENDED = 0.1, 1e-2, 1e-3
# Operations from which on single precision saves more than mending it costs.
LARGE = 3e8


class NewtonDirections:
    """Solutions of the systems of one solve, (I + kappa A M A^T)^-1 G.

    What was not good enough once is not tried again.

    Parameters
    ----------
    gates : ScaledGates
    """

    def __init__(self, gates: ScaledGates):
        self.gates = gates
        self._roughly = self._singly = self._keeping = True
        self._earlier: Inverse | None = None
        self._served = False

    def __call__(
        self, shares: np.ndarray, B: np.ndarray, G: np.ndarray, kappa: float
    ) -> np.ndarray:
        """(I + kappa A M A^T)^-1 G, see ``NewtonSystem``, or about that.

        Parameters
        ----------
        shares : ndarray of shape (p,)
        B : ndarray of shape (p, c d)
        G : ndarray of shape (n, c)
        kappa : float

        Returns
        -------
        ndarray of shape (n, c)

        Raises
        ------
        FloatingPointError
            If the matrix is singular to working precision.
        """
        system = NewtonSystem(self.gates, shares, B, kappa)
        if len(system.gates) == 0:
            return G
        dear = system.factor_work > DEARER * ITERATIONS * system.product_work
        found = None
        if dear:
            found = self._without_a_factor(system, G)
        if found is None and self._singly and system.factor_work > LARGE:
            found = self._mended(system, G)
        if found is None:
            inverse = system.inverse()
            self._keep(inverse)
            found = inverse(G)
        return found

    def _without_a_factor(self, system: NewtonSystem, G: np.ndarray) -> np.ndarray | None:
        if self._roughly:
            rough = _solve(system, lambda R: R, G, ROUGH)
            if rough is not None:
                return rough
            self._roughly = False
        if self._earlier is not None:
            found = _solve(system, self._earlier, G, EARLIER)
            if found is not None:
                self._served = True
                return found
            # Where even the last step's inverse is too far off, none is worth a try.
            self._keeping = self._served
            self._earlier = None
        return None

    def _mended(self, system: NewtonSystem, G: np.ndarray) -> np.ndarray | None:
        try:
            single = system.inverse(np.float32)
        except FloatingPointError:
            found = None
        else:
            found = _solve(system, single, G, MENDED)
        if found is None:
            self._singly = False
        else:
            self._keep(single)
        return found

    def _keep(self, inverse: Inverse) -> None:
        if self._keeping:
            self._earlier, self._served = inverse, False


def _solve(system: NewtonSystem, inverse: Inverse, G: np.ndarray, left: float) -> np.ndarray | None:
    """By conjugate gradients; None if ITERATIONS are not enough, or the inverse is too rough."""
    found, enough = conjugate_gradients(system.product, inverse, G, left, ITERATIONS)
    return found if enough else None
