"""Newton's systems and directions: against dense algebra, and each way to them alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvxdistill.solvers import (
    GatedReLUProblem,
    SemismoothNewton,
    activation_patterns,
    gated_newton,
    newton_directions,
    sample_gates,
)
from cvxdistill.solvers.gated_newton import NewtonSystem
from cvxdistill.solvers.newton_directions import NewtonDirections
from cvxdistill.solvers.scaled_gates import ScaledGates


def programme(n=40, d=3, p=6, c=2, seed=0, weighted=False, **options):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    D, _ = activation_patterns(X, sample_gates(d, p, random_state=seed))
    Y = np.maximum(X @ rng.standard_normal((d, c)), 0) + 0.3 * rng.standard_normal((n, c))
    if weighted:
        options["sample_weight"] = rng.uniform(0.3, 3, n)
    return GatedReLUProblem(X, Y, D, **options)


def dense_features(problem):
    """The columns of A, centred and scaled, formed one gate after the other; gate, then input."""
    A = problem.operator
    h = np.ones(A.n) if problem.loss.weights is None else problem.loss.weights
    columns = []
    for gate in A.D.T:
        part = gate[:, None] * A.X
        if problem.fit_intercept:
            part = part - h @ part / h.sum()
        columns.append(np.sqrt(h)[:, None] * part)
    return np.hstack(columns)


def dense_system(problem, shares, B, kappa):
    """(n c, n c)."""
    A, c = problem.operator, problem.n_outputs
    big = np.kron(dense_features(problem), np.eye(c))  # rows (example, output)
    M = np.zeros((big.shape[1], big.shape[1]))  # (gate, input, output)
    for g in np.flatnonzero(shares):
        mine = slice(g * A.d * c, (g + 1) * A.d * c)
        w = B[g].reshape(c, A.d).T.ravel()
        w = w / np.linalg.norm(w)
        M[mine, mine] = shares[g] * np.eye(A.d * c) + (1 - shares[g]) * np.outer(w, w)
    return np.eye(A.n * c) + kappa * big @ M @ big.T


@st.composite
def systems(draw, kappa):
    """A random programme with shares, weights and kappa, and a right-hand side."""
    sizes = [draw(st.integers(*ends)) for ends in ((4, 25), (1, 5), (1, 6), (1, 3))]
    seed = draw(st.integers(0, 2**16))
    problem = programme(*sizes, seed, draw(st.booleans()), fit_intercept=draw(st.booleans()))
    (p, d, c), rng = problem.weights_shape, np.random.default_rng(seed)
    shares = np.where(rng.random(p) < 0.7, rng.uniform(0.01, 0.99, p), 0)
    shares[0] = 0.5
    B = rng.standard_normal((p, c * d)) * (shares > 0)[:, None]
    G = ScaledGates(problem).scaled(rng.standard_normal((sizes[0], c)))
    return problem, (shares, B, draw(kappa)), G


def of_features(patch, features):
    """Which matrix is factorised."""
    patch.setattr(gated_newton, "examples_work", lambda *_: float(features))
    patch.setattr(gated_newton, "features_work", lambda *_: float(not features))


@settings(max_examples=60, deadline=None)
@given(systems(st.floats(1e-3, 1e3)), st.booleans())
def test_products_and_inverses_are_those_of_the_dense_system(drawn, features):
    problem, (shares, B, kappa), G = drawn
    dense = dense_system(problem, shares, B, kappa)
    with pytest.MonkeyPatch.context() as patch:
        of_features(patch, features)
        system = NewtonSystem(ScaledGates(problem), shares, B, kappa)
        found = system.inverse()(G)
    wanted = np.linalg.solve(dense, G.ravel()).reshape(G.shape)
    np.testing.assert_allclose(found, wanted, atol=1e-7 * np.abs(G).max())
    wanted = (dense @ G.ravel()).reshape(G.shape)
    np.testing.assert_allclose(system.product(G), wanted, atol=1e-9 * np.abs(wanted).max())


def relative_error(problem, system, found, G):
    """In the norm of the system, which conjugate gradients make small."""
    dense = dense_system(problem, *system)
    wanted = np.linalg.solve(dense, G.ravel())
    off = found.ravel() - wanted
    return np.sqrt((off @ dense @ off) / (wanted @ dense @ wanted))


class Ways:
    """Directions of a programme, and by what they were found."""

    def __init__(self, patch, problem, large=0.0, dear=0.0):
        self.factors, self.solved, self.fails = [], [], False
        inverse, solve = NewtonSystem.inverse, newton_directions._solve

        def seen(system, dtype=np.float64):
            self.factors.append(dtype)
            return inverse(system, dtype)

        def tried(system, of, G, left):
            found = None if self.fails else solve(system, of, G, left)
            self.solved.append((left, found is not None))
            return found

        patch.setattr(NewtonSystem, "inverse", seen)
        patch.setattr(newton_directions, "_solve", tried)
        patch.setattr(newton_directions, "LARGE", large)
        patch.setattr(newton_directions, "DEARER", dear)
        self.directions = NewtonDirections(ScaledGates(problem))

    def __call__(self, system, G):
        self.factors.clear()
        self.solved.clear()
        shares, B, kappa = system
        return self.directions(shares, B, G, kappa)


@settings(max_examples=40, deadline=None)
@given(systems(st.floats(1e-5, 1e-4)))
def test_easy_systems_need_no_factor(drawn):
    problem, system, G = drawn
    with pytest.MonkeyPatch.context() as patch:
        ways = Ways(patch, problem)
        found = ways(system, G)
        assert ways.factors == [] and ways.solved == [(newton_directions.ROUGH, True)]
    # Without a preconditioner it is the residual that is small; the system is no smaller than 1.
    assert relative_error(problem, system, found, G) <= 2 * newton_directions.ROUGH


@settings(max_examples=60, deadline=None)
@given(systems(st.floats(0.1, 10)), st.booleans())
def test_single_precision_is_mended(drawn, features):
    problem, system, G = drawn
    with pytest.MonkeyPatch.context() as patch:
        of_features(patch, features)
        ways = Ways(patch, problem, large=-1.0, dear=np.inf)
        found = ways(system, G)
        assert ways.factors == [np.float32]
        assert ways.solved == [(newton_directions.MENDED, True)]
    assert found.dtype == np.float64
    assert relative_error(problem, system, found, G) <= 2 * newton_directions.MENDED


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("c", [1, 2])
def test_a_later_system_is_solved_by_an_earlier_inverse(features, c, monkeypatch):
    problem = programme(60, 4, 12, c, fit_intercept=True, weighted=True)
    (p, d, _), rng = problem.weights_shape, np.random.default_rng(0)
    shares, B = rng.uniform(0.2, 0.8, p), rng.standard_normal((p, c * d))
    G = ScaledGates(problem).scaled(rng.standard_normal((60, c)))
    of_features(monkeypatch, features)
    monkeypatch.setattr(newton_directions, "ITERATIONS", 25)
    ways = Ways(monkeypatch, problem, large=np.inf, dear=-1.0)
    first = ways((shares, B, 10.0), G)
    assert ways.factors == [np.float64] and ways.solved == [(newton_directions.ROUGH, False)]
    assert relative_error(problem, (shares, B, 10.0), first, G) <= 1e-7
    shares[3] = 0.0
    later = (shares, B + 0.1 * rng.standard_normal(B.shape), 50.0)
    found = ways(later, G)
    assert ways.factors == [] and ways.solved == [(newton_directions.EARLIER, True)]
    assert relative_error(problem, later, found, G) <= 3 * newton_directions.EARLIER
    # Not good enough, after it has served: there is another.
    ways.fails = True
    ways(later, G)
    assert ways.factors == [np.float64] and ways.solved == [(newton_directions.EARLIER, False)]
    # That does not serve, and is the last.
    ways(later, G)
    assert ways.factors == [np.float64] and ways.solved == [(newton_directions.EARLIER, False)]
    ways(later, G)
    assert ways.factors == [np.float64] and ways.solved == []


def test_what_is_singular_in_single_precision_is_factorised_in_double(monkeypatch):
    problem = programme(30, 4, 6, 1)
    (p, d, _), rng = problem.weights_shape, np.random.default_rng(0)
    system = (rng.uniform(0.2, 0.8, p), rng.standard_normal((p, d)), 1.0)
    G = rng.standard_normal((30, 1))
    ways = Ways(monkeypatch, problem, large=-1.0, dear=np.inf)
    found = gated_newton._factorised

    def singular(M):
        if M.dtype == np.float32:
            raise FloatingPointError
        return found(M)

    monkeypatch.setattr(gated_newton, "_factorised", singular)
    assert relative_error(problem, system, ways(system, G), G) <= 1e-7
    assert ways.factors == [np.float32, np.float64]
    ways(system, G)
    assert ways.factors == [np.float64]


@pytest.mark.parametrize("penalty", ["neuron", "gate"])
@pytest.mark.parametrize(
    ("large", "dear"), [(-1.0, np.inf), (np.inf, -1.0), (-1.0, -1.0)], ids=["single", "cg", "both"]
)
def test_every_way_leads_to_the_same_optimum(monkeypatch, penalty, large, dear):
    problem = programme(n=120, p=20, penalty=penalty, fit_intercept=True, weighted=True)
    alpha = 0.003 * problem.alpha_max()
    exact = SemismoothNewton(tol=1e-9).solve(problem, alpha)
    ways = Ways(monkeypatch, problem, large, dear)
    found = SemismoothNewton(tol=1e-9).solve(problem, alpha)
    assert found.converged and sum(enough for _, enough in ways.solved) > 5
    assert found.objective == pytest.approx(exact.objective, rel=1e-8)
