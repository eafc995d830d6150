"""Normal equations of least squares on gated features: sums over the examples, in float64.

With A = [diag(D[:, 1]) X, ..., diag(D[:, p]) X], weights h of mean 1 and H = diag(h),

    A^T H A / n     and     A^T H R / n,

of columns that are centred with these weights where there is an intercept to be minimised over. The
first is added up by the gates' patterns (``cvxdistill.solvers.gated_gram``).
"""

from __future__ import annotations

import numpy as np

from cvxdistill.solvers.feature_columns import GatedColumns
from cvxdistill.solvers.gated_operator import GatedOperator


def normal_equations(
    operator: GatedOperator,
    R: np.ndarray,
    *,
    center: bool = False,
    weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """A^T H A / n and A^T H R / n.

    Parameters
    ----------
    operator : GatedOperator
    R : ndarray of shape (n, c)
        Centred where ``center``.
    center : bool, default=False
        Subtract the column means of A: what is left when an intercept is minimised over.
    weights : ndarray of shape (n,), optional
        Weights of the rows, with mean 1.

    Returns
    -------
    gram : ndarray of shape (p d, p d)
        Feature i of gate j is row j d + i.
    pull : ndarray of shape (p d, c)

    Raises
    ------
    ValueError
        If rows of X are not finite.
    """
    n = operator.n
    h = np.ones(n) if weights is None else weights
    every = np.arange(operator.p * operator.d)
    _, gram, pull, mean = GatedColumns(operator).moments(every[:0], every, h, R * h[:, None])
    if center:
        # Row by row, for another matrix of this size may not fit.
        for row, own in zip(gram, mean / n, strict=True):
            row -= own * mean
    gram /= n
    pull /= n
    return gram, pull


def gram_matrix(
    operator: GatedOperator, *, center: bool = False, weights: np.ndarray | None = None
) -> np.ndarray:
    """A^T H A / n alone, of shape (p d, p d); see ``normal_equations``."""
    return normal_equations(operator, np.zeros((operator.n, 0)), center=center, weights=weights)[0]
