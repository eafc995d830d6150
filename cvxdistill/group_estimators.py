"""Scikit-learn estimator of the group elastic net: linear models whose features come in groups.

The mathematics is in ``cvxdistill.solvers``; the choice of alpha by cross-validation is in
``cvxdistill.group_cross_validation``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cvxdistill.estimator_base import all_or_nothing
from cvxdistill.group_estimator_base import GroupLinearModel, check_l1_ratio, check_number


class GroupElasticNet(GroupLinearModel):
    """A linear model with the group elastic net penalty, solved to a certified optimum.

    Minimises over B (d, c) and b

        L(X B + 1 b^T + O, Y) + alpha * sum_g w_g (rho ||B_g||_F + (1 - rho)/2 ||B_g||_F^2)

    for groups g of features, L the weighted mean of the losses of the examples, O fixed offsets
    and rho the ``l1_ratio``. With many responses each group has one norm for all of them. It is a
    classifier for loss="log_loss" and a regressor for the others. Sparse X is accepted and made
    dense. float32 stays float32.

    Parameters
    ----------
    alpha : float, default=1.0
        Strength of the penalty, positive. The loss is averaged over examples.
    groups : int, array of int of shape (d,), or sequence of sequences of int, optional
        A size (consecutive features in groups of it), a label for each feature, or the features of
        each group: every feature in one of them. By default every feature by itself.
    group_weights : array of shape (n_groups,), optional
        w_g >= 0, 1 by default; of labels, in increasing order. Groups of weight 0 are not
        penalised.
    l1_ratio : float in [0, 1], default=1.0
        rho: 1 is the group lasso, 0 ridge regression.
    loss : {"squared", "huber", "poisson", "log_loss"}, default="squared"
        1/2 ||f - y||^2; Huber's, quadratic up to errors of 1.35, in units of y, then linear; half
        the Poisson deviance of counts y with mean exp(f); the logistic loss for two classes and
        the multinomial one for more.
    fit_intercept : bool, default=True
        Whether there is an unpenalised b.
    form : {"auto", "covariance", "naive"}, default="auto"
        What the solver keeps up to date: inner products of features, which suits many examples, or
        residuals, which suits many features.
    tol : float, default=1e-4
        Relative tolerance: stop when the duality gap is at most ``tol`` times the objective.
    max_iter : int, default=100000
        Most sweeps. A stop short of ``tol`` is a ``ConvergenceWarning``.
    time_limit : float, optional
        Most seconds.
    warm_start : bool, default=False
        Start at ``coef_`` of the last fit if it has the right shape.

    Attributes
    ----------
    coef_ : ndarray of shape (d,), (c, d), (1, d) for two classes or (n_classes, d)
        B^T.
    intercept_ : float or ndarray of shape (c,), (1,) or (n_classes,)
        b.
    classes_ : ndarray of shape (n_classes,)
        The labels, sorted; only with log loss.
    groups_ : list of ndarray of int
        The features of each group.
    n_active_groups_ : int
        Number of groups whose coefficients are not all 0.
    objective_ : float
        The minimum that was reached.
    duality_gap_ : float
        Absolute: ``objective_`` exceeds the optimum by at most this.
    n_iter_ : int
        Sweeps made, at least 1.
    n_features_in_ : int
        Number d of features.
    feature_names_in_ : ndarray of shape (d,)
        Names of the columns, where X had names that are all strings.

    References
    ----------
    Yuan and Lin 2006; Simon and Tibshirani 2012; Yang and Hastie 2024.

    Examples
    --------
    >>> import numpy as np
    >>> from cvxdistill import GroupElasticNet
    >>> X = np.random.default_rng(0).standard_normal((100, 6))
    >>> y = X[:, 0] - 2 * X[:, 1]
    >>> model = GroupElasticNet(alpha=0.1, groups=[[0, 1], [2, 3], [4, 5]]).fit(X, y)
    >>> np.flatnonzero(model.coef_).tolist()
    [0, 1]
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        groups: Any = None,
        group_weights: Any = None,
        l1_ratio: float = 1.0,
        loss: str = "squared",
        fit_intercept: bool = True,
        form: str = "auto",
        tol: float = 1e-4,
        max_iter: int = 100_000,
        time_limit: float | None = None,
        warm_start: bool = False,
    ):
        self.alpha = alpha
        self.groups = groups
        self.group_weights = group_weights
        self.l1_ratio = l1_ratio
        self.loss = loss
        self.fit_intercept = fit_intercept
        self.form = form
        self.tol = tol
        self.max_iter = max_iter
        self.time_limit = time_limit
        self.warm_start = warm_start

    def fit(self, X: Any, y: Any, sample_weight: Any = None, offset: Any = None) -> GroupElasticNet:
        """Fit the model.

        Parameters
        ----------
        X : array, sparse matrix or data frame of shape (n, d)
            Inputs; a sparse matrix is made dense.
        y : array of shape (n,) or (n, c)
            Targets: one column for Poisson's loss, and labels for log loss.
        sample_weight : array of shape (n,), optional
            Weights of the examples, not negative; only their ratios matter. Those of weight 0
            are left out.
        offset : array of shape (n,) or (n, c), optional
            O, added to the linear predictor.

        Returns
        -------
        GroupElasticNet
            The estimator itself.

        Raises
        ------
        ValueError, TypeError
            If a parameter, X or y is not what it should be; the message names it.
        """
        self._check_parameters()
        with all_or_nothing(self):
            examples = self._examples(X, y, sample_weight, offset)
            problem = self._problem(examples, self.l1_ratio)
            shape = problem.columns.shape[1], problem.n_outputs
            start = None
            if self.warm_start and hasattr(self, "coef_"):
                last = np.atleast_2d(self.coef_).T
                start = last if last.shape == shape else None
            solution = self._solver().solve(problem, self.alpha, warm_start=start)
            self._warn([] if solution.converged else [solution], 1)
            self._keep(examples.uncentred(solution), problem, examples)
        return self

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_number("alpha", self.alpha)
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"alpha must be positive and finite, got {self.alpha!r}.")
        check_l1_ratio(self.l1_ratio)
