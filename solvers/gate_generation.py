"""Gate generation: solve on few gates, add gates whose dual constraints are violated, repeat.

The programme over *all* gates of the data has a dual constraint for each of them, of which a
solution on some gates meets those of its own. Gates with violated constraints are the ones whose
weights would leave zero, so they lower the objective as no sampled gates do: column generation, or
the convex counterpart of boosting. When no gate violates its constraint the solution is that of
the full network. The search for violators is local (see ``gate_search``), so the violation that it
reports is a lower bound of the largest.

References
----------
Bengio et al. 2005, "Convex neural networks" (the same idea for single neurons); Pilanci and Ergen
2020 (the programme over all patterns).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from cvxdistill.solvers.gate_samplers import sample_gates
from cvxdistill.solvers.gate_violations import GateFinder, complementary_gates
from cvxdistill.solvers.gates import activation_patterns, check_count, check_gates, evaluate_gates
from cvxdistill.solvers.penalties import find_regularizer
from cvxdistill.solvers.problem import ConvexProblem, GatedReLUProblem
from cvxdistill.solvers.relu_problem import ReLUProblem
from cvxdistill.solvers.solution import CONVERGED, Solution, relative
from cvxdistill.solvers.solver import Solver
from cvxdistill.solvers.solver_choice import choose_solver

GATE_BUDGET = "gate budget"
ROUND_LIMIT = "round limit"
SOLVER_TOLERANCE = "solver tolerance"


@dataclass(frozen=True)
class GenerationRound:
    """One solve and the search after it.

    Attributes
    ----------
    n_gates, n_active_gates : int
        Gates in the programme, and those with weights that are not zero.
    objective : float
    violation : float
        max over the gates found of R°(C_g) / (alpha rho) - 1, at this round's solution.
    seconds : float
        Since the start.
    """

    n_gates: int
    n_active_gates: int
    objective: float
    violation: float
    seconds: float


@dataclass(frozen=True, repr=False)
class GateGeneration:
    """Generated gates, the solution on them, and how near it is to that over all gates.

    Attributes
    ----------
    G : ndarray of shape (d, p) or (d + 1, p)
        The gates with weights that are not zero.
    D : ndarray of bool, shape (n, p)
        Their activation patterns.
    solution : Solution
    rounds : tuple of GenerationRound
    violation : float
        Largest R°(C_g) / (alpha rho) - 1 of any gate found at the solution: about 0 at the
        optimum over all gates. The search is local: this is a lower bound.
    full_gap : float
        Relative gap between the objective and the dual value of the residual, scaled until no gate
        *that was found* violates its constraint. Over all gates the optimum is lower by no more,
        if the search missed none that is worse. NaN for l1_ratio < 1.
    status : str
        "converged" (violation <= tol), "gate budget" or "round limit" (both with violators left),
        or "solver tolerance" (those left are gates of the set, or lower the objective by less
        than the solver's tolerance: solve more accurately).
    """

    G: np.ndarray
    D: np.ndarray
    solution: Solution
    rounds: tuple[GenerationRound, ...]
    violation: float
    full_gap: float
    status: str

    def __repr__(self) -> str:
        return (
            f"GateGeneration(p={self.G.shape[1]}, objective={self.solution.objective:.6g}, "
            f"violation={self.violation:.1e}, full_gap={self.full_gap:.1e}, "
            f"rounds={len(self.rounds)}, status={self.status!r})"
        )

    @property
    def converged(self) -> bool:
        """Whether no gate was found that violates its dual constraint by more than ``tol``."""
        return self.status == CONVERGED

    @property
    def message(self) -> str:
        """Why it ended, in a sentence."""
        return (
            f"{self.status} after {len(self.rounds)} rounds and {self.rounds[-1].seconds:.2f} s, "
            f"{self.G.shape[1]} gates, largest violation found {self.violation:.1e}"
        )


def generate_gates(
    X: Any,
    Y: Any,
    *,
    alpha: float,
    n_gates: int = 100,
    n_initial: int = 10,
    gates_per_round: int | None = None,
    G: Any = None,
    activation: str = "gated_relu",
    bias: bool = False,
    solver: Solver | None = None,
    tol: float = 1e-3,
    max_rounds: int = 100,
    n_starts: int = 32,
    random_state: int | np.random.Generator | None = None,
    verbose: int = 0,
    **problem_options: Any,
) -> GateGeneration:
    """Fit a gated ReLU or ReLU programme whose gates are chosen as it is solved.

    Each round solves the programme on the present gates, starting at the last solution, and then
    searches for gates that violate their dual constraints. New ones are taken one by one, each
    time the worst violator of the residual that the best steps of those before would leave; so
    they complement each other. Gates with zero weights make room when the budget is reached.

    Parameters
    ----------
    X : array of shape (n, d)
    Y : array of shape (n,) or (n, c)
    alpha : float
    n_gates : int, default=100
        Budget: at most so many gates at any time.
    n_initial : int, default=10
        Gates to begin with, sampled by ``sample_gates``.
    gates_per_round : int, optional
        Most gates to add in a round; a twentieth of ``n_gates`` by default.
    G : array of shape (d, p) or (d + 1, p), optional
        Gates to begin with, instead of sampled ones.
    activation : {"gated_relu", "relu"}
    bias : bool, default=False
        Gates with a bias (gated ReLU only); with ``G``, its shape decides.
    solver : Solver, optional
        By default ``choose_solver(problem)``. Its tolerance bounds how small a violation means
        anything.
    tol : float, default=1e-3
        Converged when no gate is found with R°(C_g) > (1 + tol) alpha rho.
    max_rounds : int, default=100
    n_starts : int, default=32
        Starts of each search, and four times as many before it is believed that there is none.
    random_state : int, Generator or None
    verbose : int, default=0
        1 shows a progress bar.
    **problem_options
        ``penalty``, ``l1_ratio``, ``loss``, ``fit_intercept``, ``normalize``, ``sample_weight``,
        as of ``GatedReLUProblem`` and ``ReLUProblem``.

    Returns
    -------
    GateGeneration

    Raises
    ------
    ValueError, TypeError
        As ``violating_gates`` and the problems; if the budget is smaller than the gates to begin
        with; if these are on for no row.
    """
    start = time.perf_counter()
    check_count("n_gates", n_gates)
    check_count("max_rounds", max_rounds)
    if gates_per_round is None:
        gates_per_round = max(1, n_gates // 20)
    check_count("gates_per_round", gates_per_round)
    if not isinstance(tol, (int, float)) or not tol >= 0:
        raise ValueError(f"tol must be a number >= 0, got {tol!r}.")
    finder = GateFinder(
        X,
        regularizer=find_regularizer(
            problem_options.get("penalty", "neuron"), problem_options.get("l1_ratio", 1.0)
        ),
        activation=activation,
        bias=bias,
        n_starts=n_starts,
        random_state=random_state,
        G=G,
    )
    X = finder.X
    D, G = _initial_gates(finder, G, n_initial, n_gates)
    rounds: list[GenerationRound] = []
    warm_start: np.ndarray | None = None
    with tqdm(total=n_gates, disable=not verbose, desc="gates") as bar:
        while True:
            problem = _problem(X, Y, D, G, activation, problem_options)
            chosen_solver = solver or choose_solver(problem)
            solution = chosen_solver.solve(problem, alpha, warm_start=warm_start)
            V = solution.V
            active = np.flatnonzero(V.any(axis=tuple({*range(V.ndim)} - {V.ndim - 3})))
            R = problem.loss.residual(problem.predict(V, solution.intercept))
            bound = alpha * problem.regularizer.l1_ratio
            objective = finder.objective(R, problem.scale)
            new, worst = finder.violators(objective, G, bound * (1 + tol))
            now = GenerationRound(
                G.shape[1],
                len(active),
                solution.objective,
                worst / bound - 1,
                time.perf_counter() - start,
            )
            rounds.append(now)
            bar.n = G.shape[1]
            bar.set_postfix_str(f"objective {now.objective:.6g}, violation {now.violation:.1e}")
            room = n_gates - len(active)
            idle = solution.n_iter == 0 and warm_start is not None
            verdict = _verdict(now, tol, new, idle, room, last=len(rounds) == max_rounds)
            if verdict is not None:
                break
            chosen = complementary_gates(objective, new, bound, min(room, gates_per_round))
            if G.shape[1] + len(chosen) > n_gates:
                G, V = G[:, active], np.take(V, active, axis=-3)
            G = np.hstack([G, new[:, chosen]])
            D = evaluate_gates(X, G)
            shape = (*V.shape[:-3], len(chosen), *V.shape[-2:])
            warm_start = np.concatenate([V, np.zeros(shape, V.dtype)], axis=-3)
    full_gap = _full_gap(problem, solution, R, worst)
    if len(active):
        D, G = np.ascontiguousarray(D[:, active]), G[:, active]
        solution = replace(solution, V=np.take(V, active, axis=-3))
    return GateGeneration(G, D, solution, tuple(rounds), now.violation, full_gap, verdict)


def _initial_gates(
    finder: GateFinder, G: Any, n_initial: int, n_gates: int
) -> tuple[np.ndarray, np.ndarray]:
    """Patterns and gates to begin with."""
    X = finder.X
    if G is None:
        G = sample_gates(
            X.shape[1],
            check_count("n_initial", n_initial),
            bias=finder.bias,
            random_state=finder.rng,
            dtype=X.dtype,
        )
    else:
        G = check_gates(G, X.shape[1], X.dtype)
    if G.shape[1] > n_gates:
        raise ValueError(
            f"n_gates must be no smaller than the number of gates to begin with, {G.shape[1]}, "
            f"got {n_gates}."
        )
    if finder.activation == "relu":
        G = finder.clear_of_rows(G)
    return activation_patterns(X, G)


def _verdict(
    now: GenerationRound, tol: float, new: np.ndarray, idle: bool, room: int, last: bool
) -> str | None:
    """Why to stop here, or None; ``idle`` if the gates of the last round changed nothing."""
    if now.violation <= tol:
        return CONVERGED
    if new.shape[1] == 0 or idle:
        return SOLVER_TOLERANCE
    if room == 0:
        return GATE_BUDGET
    return ROUND_LIMIT if last else None


def _problem(
    X: np.ndarray,
    Y: Any,
    D: np.ndarray,
    G: np.ndarray,
    activation: str,
    options: dict[str, Any],
) -> ConvexProblem:
    if activation == "relu":
        return ReLUProblem(X, Y, D, G=G, **options)
    return GatedReLUProblem(X, Y, D, **options)


def _full_gap(problem: ConvexProblem, solution: Solution, R: np.ndarray, worst: float) -> float:
    """Relative gap to the dual value of R scaled by alpha / worst, in the certificate's order."""
    if problem.regularizer.l1_ratio < 1:
        return math.nan
    theta = R * np.asarray(min(1.0, solution.alpha / worst) if worst else 1.0, R.dtype)
    Z = problem.predict(solution.V)
    gap = problem.loss.fenchel_gap(Z + solution.intercept, theta)
    penalty = solution.objective - problem.loss.value(Z + solution.intercept)
    gap += penalty - float(np.sum(Z * theta, dtype=np.float64)) / len(Z)
    return relative(float(np.maximum(0.0, gap)), solution.objective)
