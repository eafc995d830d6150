"""The method of conjugate gradients, for one system that is known by its products."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def conjugate_gradients(
    product: Callable[[np.ndarray], np.ndarray],
    precondition: Callable[[np.ndarray], np.ndarray],
    b: np.ndarray,
    tol: float,
    max_iter: int,
) -> tuple[np.ndarray, bool]:
    """x with A x = b to a residual of tol, in the norm of the preconditioner, and whether it is.

    It gives up where A or the preconditioner is not positive definite.
    """
    x = np.zeros_like(b)
    r = b.copy()
    z = precondition(r)
    p = z.copy()
    rz = first = float(np.vdot(r, z))
    for _ in range(max_iter):
        if 0 <= rz <= tol**2 * first:
            return x, True
        Ap = product(p)
        curvature = float(np.vdot(p, Ap))
        if not (rz > 0 and curvature > 0):
            return x, False
        step = rz / curvature
        x += step * p
        r -= step * Ap
        z = precondition(r)
        before, rz = rz, float(np.vdot(r, z))
        p = z + (rz / before) * p
    return x, 0 <= rz <= tol**2 * first
