"""The students that ``distill`` chooses from: linear and gated, along a path of alphas and sizes.

Each comes from a convex programme on the rows of a layout, solved to a certified gap. The weights
become hidden units, the leading units are kept, and the second layer is refitted to all outputs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cvxdistill.solvers import (
    RFISTA,
    GatedReLUProblem,
    Neurons,
    RidgeNewton,
    RowSource,
    Solution,
    activation_patterns,
    alpha_grid,
    gram_matrix,
    leading_neurons,
    refit_second_layer,
)
from cvxdistill.solvers.ridge import MOST_FEATURES

if TYPE_CHECKING:
    from cvxdistill.adapters import ConvLayout, DenseLayout, FollowingMap, GatedStudent

# Sizes that are tried when none is asked for.
UNITS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# The gated programme sees at most this many leading principal components of the outputs; the
# second layer is refitted to all of them afterwards.
MOST_COMPONENTS = 32
# Students are judged on about so many bytes of inputs and outputs at a time: tokens are small rows,
# images are not.
BATCH_BYTES = 16 * 2**20
# Strengths of the ridge, relative to the mean variance of a feature.
RIDGE_STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4)
# The gated path: this many alphas, from the first share of alpha_max down to the second.
GATED_PATH = (6, 0.3, 1e-3)


@dataclass(frozen=True)
class FitData:
    """What a student is fitted to and judged by.

    Attributes
    ----------
    layout : DenseLayout or ConvLayout
    X : row source of shape (n, d)
        Rows to fit.
    Y : ndarray of shape (n, c)
    inputs, outputs : ndarray of shape (N, ...)
        The block's activations, of all examples.
    held_out : ndarray of int
        The examples that are not fitted.
    """

    layout: ConvLayout | DenseLayout
    X: RowSource
    Y: np.ndarray
    inputs: np.ndarray = field(repr=False)
    outputs: np.ndarray = field(repr=False)
    held_out: np.ndarray = field(repr=False)

    def error(self, student: GatedStudent) -> float:
        """||Y' - Y||_F / ||Y||_F of the deployed module on the held-out examples."""
        return activation_error(student, self.inputs, self.outputs, self.held_out)


def activation_error(
    student: GatedStudent,
    inputs: np.ndarray,
    outputs: np.ndarray,
    examples: np.ndarray,
    following: FollowingMap | None = None,
) -> float:
    """||Y' - Y||_F / ||Y||_F of a student on some examples, of what follows it where that is given.

    Parameters
    ----------
    student : GatedStudent
    inputs, outputs : ndarray of shape (N, ...)
        Of the block.
    examples : ndarray of int
    following : FollowingMap, optional
        Y and Y' are what it makes of the outputs.
    """
    import torch

    example_bytes = (inputs[:1].nbytes + outputs[:1].nbytes) or 1
    batch_size = max(1, BATCH_BYTES // example_bytes)
    wrong = total = 0.0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        Y = outputs[batch]
        with torch.inference_mode():
            Z = student(torch.from_numpy(inputs[batch])).numpy()
        if following is not None:
            Y, Z = following(Y), following(Z)
        wrong += float(np.sum((Z - Y) ** 2, dtype=np.float64))
        total += float(np.sum(Y**2, dtype=np.float64))
    return (wrong / total) ** 0.5 if total > 0 else wrong**0.5


@dataclass(frozen=True)
class Candidate:
    """A student, and what it costs and loses.

    Attributes
    ----------
    kind : {"linear", "gated", "linear, polished", "gated, polished"}
    student : GatedStudent
    alpha : float
        Of the convex programme that it comes from; of a polished student the group elastic net's.
    n_neurons, n_gates : int
        Hidden units, and gates stored (none for always-on units).
    parameters, trainable : int
        Stored numbers, gates included; those that are not gates.
    error : float
        Relative activation error on held-out examples.
    duality_gap : float
        Relative duality gap of the convex programme, before units were dropped and the second
        layer refitted.
    seconds : float
        Of the convex programme, with the path before it.
    """

    kind: str
    student: GatedStudent = field(repr=False)
    alpha: float
    n_neurons: int
    n_gates: int
    parameters: int
    trainable: int
    error: float
    duality_gap: float
    seconds: float


@dataclass(frozen=True)
class PathPoint:
    """One alpha of the path that students come from.

    Attributes
    ----------
    kind : {"linear", "gated"}
    alpha : float
    n_neurons : int
        Hidden units of the best student of this alpha.
    error : float
        Its relative activation error on held-out examples; nan where none is small enough.
    duality_gap : float
        Relative duality gap of the convex programme.
    """

    kind: str
    alpha: float
    n_neurons: int
    error: float
    duality_gap: float

    @classmethod
    def best_of(
        cls, kind: str, alpha: float, duality_gap: float, found: Sequence[Candidate]
    ) -> PathPoint:
        """The point of an alpha with these students."""
        if not found:
            return cls(kind, alpha, 0, float("nan"), duality_gap)
        best = min(found, key=lambda candidate: candidate.error)
        return cls(kind, alpha, best.n_neurons, best.error, duality_gap)


def linear_candidates(
    data: FitData,
    *,
    alpha: float | None,
    n_neurons: int | None,
    most_parameters: int,
    refit: bool,
    tol: float,
) -> tuple[list[Candidate], list[PathPoint]]:
    """Linear students: C-GReLU with one gate that is always on, ridge, truncated to low rank.

    Without ``alpha`` the best of a few ridge strengths on held-out examples is taken. The path
    holds the students of full rank, before the second layer is refitted.
    """
    start = time.perf_counter()
    n, d = data.X.shape
    G = np.zeros((d, 1), data.X.dtype)
    problem = GatedReLUProblem(
        data.X, data.Y, np.ones((n, 1), dtype=bool), penalty="ridge", fit_intercept=True
    )
    solver: RFISTA | RidgeNewton
    if d <= MOST_FEATURES:
        gram = gram_matrix(problem.operator, center=True)
        variance = float(np.trace(gram)) / d
        solver = RidgeNewton(gram=gram, tol=min(tol, 1e-4))
    else:
        variance = _mean_variance(data.X)
        solver = RFISTA(tol=tol, metric="plain")
    strengths = [alpha] if alpha is not None else [s * (variance or 1.0) for s in RIDGE_STRENGTHS]
    full = max(min(d, data.Y.shape[1]), 1)
    fits = []
    path = []
    for strength in strengths:
        solution = solver.solve(problem, strength)
        # A prefix of the leading units is the answer for each smaller size.
        units = _units(problem, solution, full)
        error = data.error(_student(data, G, units, solution.intercept))
        fits.append((error, solution, units))
        path.append(PathPoint("linear", strength, len(units), error, solution.relative_gap))
    _, solution, units = min(fits, key=lambda fit: fit[0])
    seconds = time.perf_counter() - start
    sizes = [n_neurons] if n_neurons else [*(m for m in UNITS if m < full), full]
    found = _sized(
        data, "linear", problem, solution, units, G, sizes, most_parameters, refit, seconds
    )
    return list(found), path


def gated_candidates(
    data: FitData,
    G: np.ndarray,
    *,
    alpha: float | None,
    n_neurons: int | None,
    penalty: str,
    l1_ratio: float,
    most_parameters: int,
    refit: bool,
    tol: float,
    max_iter: int,
    time_limit: float | None,
    verbose: int,
) -> tuple[list[Candidate], list[PathPoint]]:
    """Gated students: for each size the best along a path of alphas, warm-started; and the path.

    The path ends early when two alphas in a row make no size better.
    """
    start = time.perf_counter()
    D, G = activation_patterns(data.X, G)
    # Centred, because float32 loses digits to targets far from zero.
    center = data.Y.mean(axis=0, dtype=np.float64).astype(data.Y.dtype)
    targets = data.Y - center
    basis = _principal_components(targets, MOST_COMPONENTS)
    if basis is not None:
        targets = targets @ basis
    problem = GatedReLUProblem(
        data.X, targets, D, penalty=penalty, l1_ratio=l1_ratio, fit_intercept=True
    )
    # Plain steps leave weights at 0 that do the intercept's work, which units do not carry.
    solver = RFISTA(
        tol=tol, max_iter=max_iter, time_limit=time_limit, verbose=verbose, metric="plain"
    )
    sizes = [n_neurons] if n_neurons else list(UNITS)
    best: dict[int, Candidate] = {}
    path = []
    solution: Solution | None = None
    without_progress = 0
    for strength in [alpha] if alpha is not None else _gated_alphas(problem, data):
        solution = solver.solve(problem, strength, warm_start=solution)
        seconds = time.perf_counter() - start
        units = _units(problem, solution, max(sizes))
        intercept = solution.intercept
        if basis is not None:
            units = Neurons(units.W1, units.W2 @ basis.T, units.gate)
            intercept = basis @ intercept
        sized = _sized(
            data,
            "gated",
            problem,
            solution,
            units,
            G,
            sizes,
            most_parameters,
            refit,
            seconds,
            intercept=intercept + center,
        )
        found = list(sized)
        path.append(PathPoint.best_of("gated", solution.alpha, solution.relative_gap, found))
        progress = False
        for size, candidate in zip(sizes, found, strict=False):
            if size not in best or candidate.error < best[size].error:
                progress = True
                best[size] = candidate
        # Before the first unit nothing can get worse: a time limit may have ended the solve.
        without_progress = 0 if progress or not len(units) else without_progress + 1
        if without_progress == 2:
            break
    return list(best.values()), path


def _gated_alphas(problem: GatedReLUProblem, data: FitData) -> Sequence[float] | np.ndarray:
    count, first, last = GATED_PATH
    if problem.regularizer.l1_ratio == 0:
        return _mean_variance(data.X) * np.array(RIDGE_STRENGTHS)
    return alpha_grid(problem.alpha_max() * first, count, last / first)


def _units(problem: GatedReLUProblem, solution: Solution, m: int) -> Neurons:
    return leading_neurons(problem.operator, solution.V, m, center=True)


def _sized(
    data: FitData,
    kind: str,
    problem: GatedReLUProblem,
    solution: Solution,
    units: Neurons,
    G: np.ndarray,
    sizes: Sequence[int],
    most_parameters: int,
    refit: bool,
    seconds: float,
    intercept: np.ndarray | None = None,
) -> Iterator[Candidate]:
    """The candidates of one solution, smallest first, while they are small enough."""
    for m in sizes:
        kept = Neurons(units.W1[:, :m], units.W2[:m], units.gate[:m])
        b = solution.intercept if intercept is None else intercept
        if refit:
            kept, b = refit_second_layer(problem.operator, kept, data.Y)
        student = _student(data, G, kept, b)
        if student.parameters_stored > most_parameters:
            return
        yield Candidate(
            kind=kind,
            student=student,
            alpha=solution.alpha,
            n_neurons=len(kept),
            n_gates=student.n_gates,
            parameters=student.parameters_stored,
            trainable=student.trainable,
            error=data.error(student),
            duality_gap=solution.relative_gap,
            seconds=seconds,
        )
        if len(units) <= m:
            return


def _student(data: FitData, G: np.ndarray, neurons: Neurons, b: np.ndarray) -> GatedStudent:
    from cvxdistill.adapters import build_student

    return build_student(data.layout, neurons.W1, neurons.W2, neurons.gate, G, b).eval()


def _principal_components(centered: np.ndarray, most: int) -> np.ndarray | None:
    """Leading eigenvectors (c, most) of the covariance of Y; None where c is no larger."""
    if centered.shape[1] <= most:
        return None
    _, vectors = np.linalg.eigh((centered.T @ centered).astype(np.float64))
    return np.ascontiguousarray(vectors[:, ::-1][:, :most], dtype=centered.dtype)


def _mean_variance(X: RowSource, rows: int = 2048) -> float:
    """Mean variance of the columns of the first rows of X."""
    return float(np.var(X[:rows], axis=0, dtype=np.float64).mean())
