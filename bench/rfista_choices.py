"""Choices inside R-FISTA, counted rather than timed: dual points, and how far a step size grows.

Run ``CVXDISTILL_DATA=... python bench/rfista_choices.py``; writes
``bench/results/rfista_dual_points.csv`` and ``rfista_line_search.csv``.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path

import numpy as np
import pandas as pd
from datasets import load_uci
from machine import describe_machine

from cvxdistill.solvers import (
    RFISTA,
    DualCertificate,
    GatedOperator,
    GatedReLUProblem,
    activation_patterns,
    sample_gates,
)

RESULTS = Path(__file__).parent / "results"
TABLES = ("banknote", "glass", "sonar", "vote", "wine")
# Share of alpha_max, and the relative gap asked for there.
TARGETS = ((0.1, 1e-4), (0.01, 1e-4), (0.001, 1e-3))
MEMORY, MOST = 5, 8000


def problem(table: str) -> GatedReLUProblem:
    """The largest class against the rest, 100 Gaussian gates."""
    X, y = load_uci(table)
    X = X.astype(np.float64)
    classes, counts = np.unique(y, return_counts=True)
    target = np.where(y == classes[counts.argmax()], 1.0, -1.0)
    D, _ = activation_patterns(X, sample_gates(X.shape[1], 100, random_state=0))
    return GatedReLUProblem(X, target, D)


def extrapolated(recent: deque) -> tuple[np.ndarray, np.ndarray] | None:
    """Dual extrapolation (Massias, Gramfort and Salmon 2018) of the recent residuals."""
    differences = np.diff(np.stack([R.ravel() for R, _ in recent]), axis=0)
    try:
        weights = np.linalg.solve(differences @ differences.T, np.ones(len(differences)))
    except np.linalg.LinAlgError:
        return None
    weights /= weights.sum()
    pairs = list(recent)[1:]
    return (
        sum(w * R for w, (R, _) in zip(weights, pairs, strict=True)),
        sum(w * C for w, (_, C) in zip(weights, pairs, strict=True)),
    )


def iterations_to_certify(programme: GatedReLUProblem, share: float, tol: float) -> dict[str, int]:
    """Iterations until each kind of dual point, best so far, certifies the gap on one solve."""
    alpha = share * programme.alpha_max()
    solver = RFISTA(metric="plain")
    state = solver.init(programme, alpha, programme.zeros())
    kinds = ("scaled residual", "extrapolated", "corrected")
    certificates = {kind: DualCertificate(programme, alpha) for kind in kinds}
    recent: deque = deque(maxlen=MEMORY + 1)
    reached: dict[str, int] = {}
    for iteration in range(MOST + 1):
        if iteration:
            state = solver.step(programme, alpha, state)
        if iteration % 10:
            continue
        recent.append((state.R, state.C))
        for certificate in certificates.values():
            certificate.offer(state.R, state.C)
        point = extrapolated(recent) if len(recent) == MEMORY + 1 else None
        if point is not None:
            certificates["extrapolated"].offer(*point)
        certificates["corrected"].offer_corrected(state.R, state.C, state.V)
        b = programme.intercept(state.Z)
        objective = programme.loss.value(state.Z + b)
        objective += alpha * programme.regularizer.value(state.V)
        for kind, certificate in certificates.items():
            if certificate.gap(state.V, state.Z, b) <= tol * objective:
                reached.setdefault(kind, iteration)
        if len(reached) == len(kinds):
            break
    return {kind: reached.get(kind, MOST) for kind in kinds}


class CountingOperator(GatedOperator):
    """A gated operator that counts its products."""

    calls = 0

    def forward(self, V: np.ndarray) -> np.ndarray:
        """Count, and apply."""
        self.calls += 1
        return super().forward(V)

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        """Count, and apply."""
        self.calls += 1
        return super().adjoint(R)


def products_to_converge(programme: GatedReLUProblem, solver: RFISTA, share: float) -> int:
    """Forward and adjoint products of one whole solve."""
    operator = CountingOperator(programme.operator.X, programme.operator.D)
    programme.operator = operator
    solver.solve(programme, share * programme.alpha_max())
    return operator.calls


def main() -> None:
    """Count both, print both, write both."""
    print(describe_machine("numpy", "cvxdistill"))
    problems = {table: problem(table) for table in TABLES}
    dual = pd.DataFrame(
        {"table": table, "alpha_share": share, **iterations_to_certify(p, share, tol)}
        for table, p in problems.items()
        for share, tol in TARGETS
    )
    print(f"\nIterations until the gap is certified\n{dual.to_string(index=False)}")
    ratio = (dual["corrected"] / dual["scaled residual"]).median()
    print(f"median of corrected / scaled residual: {ratio:.2f}")
    line = pd.DataFrame(
        {
            "growth": growth,
            "looseness": looseness,
            "products": sum(
                products_to_converge(
                    p,
                    RFISTA(
                        tol=tol,
                        metric="plain",
                        growth=growth,
                        looseness=looseness,
                        max_iter=MOST,
                    ),
                    share,
                )
                for p in problems.values()
                for share, tol in TARGETS
            ),
        }
        for growth, looseness in (
            (1.0, 10),
            (1.1, 10),
            (1.1, 100),
            (1.25, 1.5),
            (1.25, 5),
            (1.5, 5),
        )
    )
    print(f"\nForward and adjoint products, all problems\n{line.to_string(index=False)}")
    RESULTS.mkdir(exist_ok=True)
    dual.to_csv(RESULTS / "rfista_dual_points.csv", index=False)
    line.to_csv(RESULTS / "rfista_line_search.csv", index=False)


if __name__ == "__main__":
    main()
