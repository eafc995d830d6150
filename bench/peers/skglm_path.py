"""skglm as a worker of ``bench/group_elastic_net.py``; it runs in the peers' environment.

``GroupBCD`` for one response; for many and single rows ``MultiTaskBCD``, its solver for that
penalty. Neither takes gated features, which are formed for it (not timed), and it has no
multinomial loss. Each alpha starts at the solution of the one before.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

import numpy as np
from memory import PeakMemory
from serving import serve
from skglm.datafits import QuadraticGroup, QuadraticMultiTask
from skglm.penalties import L2_1, WeightedGroupL2
from skglm.solvers import GroupBCD, MultiTaskBCD
from skglm.utils.data import grp_converter


def solve(job: dict[str, Any]) -> dict[str, Any]:
    """Solve one path, write its coefficients (alphas, d, c), and return seconds and counts."""
    with np.load(job["data"]) as file:
        X, Y, D = file["X"], file["Y"], file.get("D")
    if D is not None:
        X = np.hstack([X * D[:, [j]] for j in range(D.shape[1])])
    X = np.asfortranarray(X)
    one = Y.shape[1] == 1
    with PeakMemory() as memory:
        start = time.perf_counter()
        coefs = (_groups if one else _rows)(X, Y, job, start + job["time_limit"])
        seconds = time.perf_counter() - start
    np.save(job["result"], np.array(coefs))
    return {
        "seconds": seconds,
        "alphas_done": len(coefs),
        "peak_growth": memory.growth,
        "versions": f"skglm {version('skglm')}, numpy {np.__version__}",
    }


def _groups(X: np.ndarray, Y: np.ndarray, job: dict[str, Any], limit: float) -> list[np.ndarray]:
    y, intercept = Y[:, 0].copy(), job["intercept"]
    d = X.shape[1]
    indices, pointers = grp_converter(job["groups"], d)
    datafit = QuadraticGroup(pointers, indices)
    weights = np.ones(len(pointers) - 1)
    solver = GroupBCD(
        tol=job["tol"], fit_intercept=intercept, warm_start=True, max_iter=10_000, max_epochs=1000
    )
    w, fit = np.zeros(d + intercept), np.zeros(len(y))
    coefs: list[np.ndarray] = []
    for alpha in job["alphas"]:
        penalty = WeightedGroupL2(alpha, weights, pointers, indices)
        w = solver.solve(X, y, datafit, penalty, w.copy(), fit)[0]
        fit = X @ w[:d] + (w[d] if intercept else 0.0)
        coefs.append(w[:d, None].copy())
        if time.perf_counter() > limit:
            break
    return coefs


def _rows(X: np.ndarray, Y: np.ndarray, job: dict[str, Any], limit: float) -> list[np.ndarray]:
    if job["groups"] != 1:
        raise ValueError("MultiTaskBCD has groups of one feature only.")
    Y, intercept = np.asfortranarray(Y), job["intercept"]
    d = X.shape[1]
    datafit = QuadraticMultiTask()
    solver = MultiTaskBCD(tol=job["tol"], fit_intercept=intercept, warm_start=True, max_iter=10_000)
    W, fit = np.zeros((d + intercept, Y.shape[1])), np.zeros_like(Y)
    coefs: list[np.ndarray] = []
    for alpha in job["alphas"]:
        penalty = L2_1(alpha)
        W = solver.solve(X, Y, datafit, penalty, W.copy(), fit)[0]
        fit = np.asfortranarray(X @ W[:d] + (W[d] if intercept else 0.0))
        coefs.append(W[:d].copy())
        if time.perf_counter() > limit:
            break
    return coefs


if __name__ == "__main__":
    serve(solve)
