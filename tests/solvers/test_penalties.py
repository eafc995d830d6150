from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cvxdistill.solvers.penalties import (
    GatePenalty,
    NeuronPenalty,
    Regularizer,
    find_regularizer,
)

PENALTIES = [NeuronPenalty(), GatePenalty()]
L1_RATIOS = [1.0, 0.4, 0.0]
WEIGHTS = arrays(np.float64, (3, 4, 2), elements=st.floats(-10, 10).map(lambda v: round(v, 3)))
ANY_PENALTY = pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: type(p).__name__)
ANY_RATIO = pytest.mark.parametrize("l1_ratio", L1_RATIOS)
FEW = settings(max_examples=40, deadline=None)


def test_values_are_those_of_the_formulas():
    V = np.zeros((2, 2, 2))
    V[0] = [[3, 1], [4, 0]]  # columns of length 5 and 1, Frobenius norm sqrt(26)
    V[1] = [[0, 0], [0, 2]]
    assert NeuronPenalty().value(V) == pytest.approx(5 + 1 + 2)
    assert GatePenalty().value(V) == pytest.approx(np.sqrt(26) + 2)
    assert NeuronPenalty().dual_norm(V) == pytest.approx(5)
    assert GatePenalty().dual_norm(V) == pytest.approx(np.sqrt(26))
    assert Regularizer(NeuronPenalty(), 0.25).value(V) == pytest.approx(0.25 * 8 + 0.375 * 30)
    assert find_regularizer("ridge", 1.0).value(V) == pytest.approx(15)


def test_prox_shrinks_norms_and_leaves_directions():
    V = np.zeros((1, 2, 2))
    V[0] = [[3, 0.6], [4, 0.8]]
    np.testing.assert_allclose(NeuronPenalty().prox(V, 2.5)[0], [[1.5, 0], [2, 0]])
    np.testing.assert_array_equal(GatePenalty().prox(V, 10.0), np.zeros_like(V))


@ANY_PENALTY
@FEW
@given(WEIGHTS, st.floats(0.01, 20))
def test_moreau_decomposition(penalty, V, t):
    """V = prox(V) + a point of the dual ball of radius t that attains t R at prox(V)."""
    W = penalty.prox(V, t)
    rest = V - W
    assert penalty.dual_norm(rest) <= t * (1 + 1e-9)
    assert np.vdot(rest, W) == pytest.approx(t * penalty.value(W), rel=1e-8, abs=1e-8)


@ANY_PENALTY
@FEW
@given(WEIGHTS, WEIGHTS)
def test_dual_norm_bounds_every_inner_product(penalty, C, V):
    bound = penalty.dual_norm(C) * penalty.value(V)
    assert np.vdot(C, V) <= bound * (1 + 1e-9) + 1e-9


def test_dual_norms_are_attained():
    C = np.random.default_rng(0).standard_normal((3, 4, 2))
    columns = np.linalg.norm(C, axis=1)
    j, k = np.unravel_index(columns.argmax(), columns.shape)
    V = np.zeros_like(C)
    V[j, :, k] = C[j, :, k]
    assert np.vdot(C, V) == pytest.approx(NeuronPenalty().dual_norm(C) * NeuronPenalty().value(V))
    V = np.zeros_like(C)
    j = np.linalg.norm(C, axis=(1, 2)).argmax()
    V[j] = C[j]
    assert np.vdot(C, V) == pytest.approx(GatePenalty().dual_norm(C) * GatePenalty().value(V))


@ANY_PENALTY
def test_polar_directions_attain_the_dual_norm_of_each_group(penalty):
    C = np.random.default_rng(0).standard_normal((3, 4, 2))
    C[1] = 0
    norms, U = Regularizer(penalty).polar(C)
    summed = "pdc,pdc->pc" if norms.ndim == 2 else "pdc,pdc->p"
    np.testing.assert_allclose(np.einsum(summed, U, C), norms, atol=1e-12)
    assert norms.max() == pytest.approx(penalty.dual_norm(C))
    assert penalty.value(U) == pytest.approx(np.count_nonzero(norms))
    assert not U[1].any()
    assert Regularizer(penalty, 0.5).polar(C) is None


@ANY_PENALTY
@ANY_RATIO
def test_prox_of_the_blend_is_that_of_cvxpy(penalty, l1_ratio):
    cp = pytest.importorskip("cvxpy")
    t = 0.7
    V = np.random.default_rng(1).standard_normal((2, 3, 2))
    for j, W in enumerate(Regularizer(penalty, l1_ratio).prox(V, t)):
        x = cp.Variable((3, 2))
        neuron = isinstance(penalty, NeuronPenalty)
        norm = cp.sum(cp.norm(x, 2, axis=0)) if neuron else cp.norm(x, "fro")
        blend = l1_ratio * norm + (1 - l1_ratio) / 2 * cp.sum_squares(x)
        cp.Problem(cp.Minimize(cp.sum_squares(x - V[j]) / 2 + t * blend)).solve(solver=cp.CLARABEL)
        np.testing.assert_allclose(W, x.value, atol=1e-5)


@ANY_PENALTY
@pytest.mark.parametrize("l1_ratio", [0.4, 0.0])
@FEW
@given(WEIGHTS, WEIGHTS, st.floats(0.05, 5))
def test_conjugate_satisfies_fenchel_young_with_equality_at_the_maximiser(
    penalty, l1_ratio, C, V, alpha
):
    regularizer = Regularizer(penalty, l1_ratio)
    conjugate = regularizer.conjugate(C, alpha)
    assert alpha * regularizer.value(V) + conjugate >= np.vdot(C, V) * (1 - 1e-9) - 1e-8
    shrunk = penalty.prox(C, alpha * l1_ratio) if l1_ratio else C
    best = shrunk / (alpha * (1 - l1_ratio))
    reached = np.vdot(C, best) - alpha * regularizer.value(best)
    assert reached == pytest.approx(conjugate, rel=1e-8, abs=1e-8)


@ANY_PENALTY
def test_a_pure_norm_scales_to_the_edge_of_the_dual_ball(penalty):
    regularizer = Regularizer(penalty)
    C = np.random.default_rng(0).standard_normal((3, 4, 2))
    s = regularizer.feasible_scale(C, 0.5)
    assert 0 < s < 1 and penalty.dual_norm(s * C) == pytest.approx(0.5)
    assert regularizer.feasible_scale(C, 100.0) == 1
    assert Regularizer(penalty, 0.5).feasible_scale(C, 0.5) == 1
    assert regularizer.conjugate(s * C, 0.5) == 0


@ANY_PENALTY
@ANY_RATIO
def test_float32_stays_float32(penalty, l1_ratio):
    V = np.ones((2, 3, 2), np.float32)
    assert Regularizer(penalty, l1_ratio).prox(V, 0.1).dtype == np.float32
