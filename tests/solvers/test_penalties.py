from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cvxdistill.solvers.gated_operator import empty_weights
from cvxdistill.solvers.penalties import (
    PENALTIES,
    FeaturePenalty,
    GatePenalty,
    L1Penalty,
    NeuronPenalty,
    NoPenalty,
    NuclearPenalty,
    Regularizer,
    find_regularizer,
)

NORMS = [penalty for name, penalty in PENALTIES.items() if name != "none"]
L1_RATIOS = [1.0, 0.4, 0.0]
WEIGHTS = arrays(np.float64, (3, 4, 2), elements=st.floats(-10, 10).map(lambda v: round(v, 3)))
ANY_NORM = pytest.mark.parametrize("penalty", NORMS, ids=lambda p: type(p).__name__)
ANY_PENALTY = pytest.mark.parametrize(
    "penalty", [*NORMS, NoPenalty()], ids=lambda p: type(p).__name__
)
ANY_RATIO = pytest.mark.parametrize("l1_ratio", L1_RATIOS)
FEW = settings(max_examples=40, deadline=None)


def written_out(penalty, V):
    """R(V) and R°(V) by their formulas, with NumPy's matrix norms."""
    if isinstance(penalty, NeuronPenalty):
        groups = [np.linalg.norm(v) for W in V for v in W.T]
    elif isinstance(penalty, GatePenalty):
        groups = [np.linalg.norm(W, "fro") for W in V]
    elif isinstance(penalty, NuclearPenalty):
        return sum(np.linalg.norm(W, "nuc") for W in V), max(np.linalg.norm(W, 2) for W in V)
    elif isinstance(penalty, FeaturePenalty):
        groups = [np.linalg.norm(V[:, i, :], "fro") for i in range(V.shape[1])]
    else:
        groups = np.abs(V).ravel()
    return sum(groups), max(groups)


@ANY_NORM
@FEW
@given(WEIGHTS)
def test_values_and_dual_norms_are_those_of_the_formulas(penalty, V):
    value, dual_norm = written_out(penalty, V)
    assert penalty.value(V) == pytest.approx(value, rel=1e-12, abs=1e-12)
    assert penalty.dual_norm(V) == pytest.approx(dual_norm, rel=1e-12, abs=1e-12)
    blend = Regularizer(penalty, 0.25).value(V)
    assert blend == pytest.approx(0.25 * value + 0.375 * np.sum(V**2), rel=1e-12, abs=1e-12)


def test_values_of_small_weights_by_hand():
    V = np.zeros((2, 2, 2))
    V[0] = [[3, 1], [4, 0]]  # columns of length 5 and 1, Frobenius norm sqrt(26)
    V[1] = [[0, 0], [0, 2]]
    assert NeuronPenalty().value(V) == pytest.approx(5 + 1 + 2)
    assert GatePenalty().value(V) == pytest.approx(np.sqrt(26) + 2)
    # Singular values of V[0] multiply to |det| = 4 and their squares add up to 26.
    assert NuclearPenalty().value(V) == pytest.approx(np.sqrt(26 + 2 * 4) + 2)
    assert FeaturePenalty().value(V) == pytest.approx(np.sqrt(10) + np.sqrt(16 + 4))
    assert L1Penalty().value(V) == pytest.approx(10)
    assert NoPenalty().value(V) == 0
    assert NeuronPenalty().dual_norm(V) == pytest.approx(5)
    assert GatePenalty().dual_norm(V) == pytest.approx(np.sqrt(26))
    assert Regularizer(NeuronPenalty(), 0.25).value(V) == pytest.approx(0.25 * 8 + 0.375 * 30)
    assert find_regularizer("ridge", 1.0).value(V) == pytest.approx(15)


def test_prox_shrinks_norms_and_leaves_directions():
    V = np.zeros((1, 2, 2))
    V[0] = [[3, 0.6], [4, 0.8]]
    np.testing.assert_allclose(NeuronPenalty().prox(V, 2.5)[0], [[1.5, 0], [2, 0]])
    np.testing.assert_array_equal(GatePenalty().prox(V, 10.0), np.zeros_like(V))
    np.testing.assert_allclose(L1Penalty().prox(V, 0.7)[0], [[2.3, 0], [3.3, 0.1]])
    size = np.sqrt(9 + 0.36)
    expected = np.array([V[0, 0] * (1 - 1 / size), V[0, 1] * (1 - 1 / np.hypot(4, 0.8))])
    np.testing.assert_allclose(FeaturePenalty().prox(V, 1.0)[0], expected)
    np.testing.assert_array_equal(NoPenalty().prox(V, 1.0), V)


def test_nuclear_prox_lowers_the_rank_of_each_gate():
    A, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 3)))
    B, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))
    V = np.stack([A * [3, 2, 1] @ B.T, A * [0.5, 0, 0] @ B.T])
    W = NuclearPenalty().prox(V, 1.5)
    np.testing.assert_allclose(W[0], A * [1.5, 0.5, 0] @ B.T, atol=1e-14)
    np.testing.assert_allclose(W[1], 0, atol=1e-14)


@ANY_NORM
@FEW
@given(WEIGHTS, st.floats(0.01, 20))
def test_moreau_decomposition(penalty, V, t):
    """V = prox(V) + a point of the dual ball of radius t that attains t R at prox(V)."""
    W = penalty.prox(V, t)
    rest = V - W
    assert penalty.dual_norm(rest) <= t * (1 + 1e-9)
    assert np.vdot(rest, W) == pytest.approx(t * penalty.value(W), rel=1e-8, abs=1e-8)


@ANY_NORM
@FEW
@given(WEIGHTS, WEIGHTS)
def test_dual_norm_bounds_every_inner_product(penalty, C, V):
    bound = penalty.dual_norm(C) * penalty.value(V)
    assert np.vdot(C, V) <= bound * (1 + 1e-9) + 1e-9


def attaining_weights(penalty, C):
    """Weights with <C, V> = R°(C) R(V), supported on the group that is largest in C."""
    V = np.zeros_like(C)
    if isinstance(penalty, NeuronPenalty):
        norms = np.linalg.norm(C, axis=1)
        j, k = np.unravel_index(norms.argmax(), norms.shape)
        V[j, :, k] = C[j, :, k]
    elif isinstance(penalty, GatePenalty):
        j = np.linalg.norm(C, axis=(1, 2)).argmax()
        V[j] = C[j]
    elif isinstance(penalty, NuclearPenalty):
        j = np.linalg.norm(C, 2, axis=(1, 2)).argmax()
        A, _, Bt = np.linalg.svd(C[j])
        V[j] = np.outer(A[:, 0], Bt[0])
    elif isinstance(penalty, FeaturePenalty):
        i = np.linalg.norm(C, axis=(0, 2)).argmax()
        V[:, i] = C[:, i]
    else:
        largest = np.unravel_index(np.abs(C).argmax(), C.shape)
        V[largest] = C[largest]
    return V


@ANY_NORM
def test_dual_norms_are_attained(penalty):
    C = np.random.default_rng(0).standard_normal((3, 4, 2))
    V = attaining_weights(penalty, C)
    assert np.vdot(C, V) == pytest.approx(penalty.dual_norm(C) * penalty.value(V))


@pytest.mark.parametrize(
    "penalty", [NeuronPenalty(), GatePenalty(), NuclearPenalty()], ids=lambda p: type(p).__name__
)
def test_polar_directions_attain_the_dual_norm_of_each_group(penalty):
    C = np.random.default_rng(0).standard_normal((3, 4, 2))
    C[1] = 0
    norms, U = Regularizer(penalty).polar(C)
    summed = "pdc,pdc->pc" if norms.ndim == 2 else "pdc,pdc->p"
    np.testing.assert_allclose(np.einsum(summed, U, C), norms, atol=1e-12)
    assert norms.max() == pytest.approx(penalty.dual_norm(C))
    assert not norms[1].any()
    assert penalty.value(U[[0, 2]]) == pytest.approx(np.count_nonzero(norms))
    assert Regularizer(penalty, 0.5).polar(C) is None


@pytest.mark.parametrize("name", ["feature", "l1", "none", "ridge"])
def test_groups_that_are_not_gates_have_no_polar_directions(name):
    assert find_regularizer(name, 1.0).polar(np.ones((3, 4, 2))) is None


def cvxpy_norm(cp, penalty, gates):
    """R of a list of gates (d, c) as cvxpy expressions."""
    if isinstance(penalty, NeuronPenalty):
        return cp.sum([cp.sum(cp.norm(v, 2, axis=0)) for v in gates])
    if isinstance(penalty, GatePenalty):
        return cp.sum([cp.norm(v, "fro") for v in gates])
    if isinstance(penalty, NuclearPenalty):
        return cp.sum([cp.normNuc(v) for v in gates])
    if isinstance(penalty, FeaturePenalty):
        rows = range(gates[0].shape[0])
        return cp.sum([cp.norm(cp.hstack([v[i] for v in gates]), 2) for i in rows])
    if isinstance(penalty, L1Penalty):
        return cp.sum([cp.sum(cp.abs(v)) for v in gates])
    return 0


@ANY_PENALTY
@ANY_RATIO
def test_prox_of_the_blend_is_that_of_cvxpy(penalty, l1_ratio):
    cp = pytest.importorskip("cvxpy")
    t = 0.7
    V = np.random.default_rng(1).standard_normal((2, 3, 2))
    gates = [cp.Variable((3, 2)) for _ in V]
    blend = l1_ratio * cvxpy_norm(cp, penalty, gates)
    blend += (1 - l1_ratio) / 2 * cp.sum([cp.sum_squares(v) for v in gates])
    distance = cp.sum([cp.sum_squares(v - W) for v, W in zip(gates, V, strict=True)]) / 2
    cp.Problem(cp.Minimize(distance + t * blend)).solve(solver=cp.CLARABEL)
    expected = np.stack([v.value for v in gates])
    np.testing.assert_allclose(Regularizer(penalty, l1_ratio).prox(V, t), expected, atol=1e-5)


@ANY_PENALTY
@ANY_RATIO
def test_where_only_lengths_matter_the_prox_in_cones_follows_the_projection(penalty, l1_ratio):
    """And only there: in these cones, by cvxpy, the others' is something else."""
    cp = pytest.importorskip("cvxpy")
    rng = np.random.default_rng(0)
    S, V, t = rng.standard_normal((5, 3)), rng.standard_normal((2, 3, 2)), 0.3
    regularizer = Regularizer(penalty, l1_ratio)

    def nearest(t):
        gates = [cp.Variable((3, 2)) for _ in V]
        blend = l1_ratio * cvxpy_norm(cp, penalty, gates)
        blend += (1 - l1_ratio) / 2 * cp.sum([cp.sum_squares(v) for v in gates])
        distance = cp.sum([cp.sum_squares(v - W) for v, W in zip(gates, V, strict=True)]) / 2
        programme = cp.Problem(cp.Minimize(distance + t * blend), [S[:2] @ v >= 0 for v in gates])
        programme.solve(solver=cp.CLARABEL)
        return np.stack([v.value for v in gates])

    distance = np.abs(regularizer.prox(nearest(0), t) - nearest(t)).max()
    assert distance < 1e-5 if regularizer.of_lengths else distance > 1e-3
    lengths = isinstance(penalty, NeuronPenalty | GatePenalty | NoPenalty) or l1_ratio == 0
    assert regularizer.of_lengths == lengths


@ANY_PENALTY
@ANY_RATIO
@FEW
@given(WEIGHTS, st.floats(0.01, 20))
def test_columns_that_are_surely_zero_are_zero(penalty, l1_ratio, V, t):
    regularizer = Regularizer(penalty, l1_ratio)
    if not regularizer.of_lengths:
        return
    zero, W = regularizer.surely_zero(V, t), regularizer.prox(V, t)
    assert zero.shape == (3, 2) and not (W.any(axis=1) & zero).any()
    if l1_ratio > 0 and not isinstance(penalty, NoPenalty):
        np.testing.assert_array_equal(zero.all(axis=1), ~W.any(axis=(1, 2)))


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


@ANY_NORM
def test_a_pure_norm_scales_to_the_edge_of_the_dual_ball(penalty):
    regularizer = Regularizer(penalty)
    C = np.random.default_rng(0).standard_normal((3, 4, 2))
    s = regularizer.feasible_scale(C, 0.5)
    assert 0 < s < 1 and penalty.dual_norm(s * C) == pytest.approx(0.5)
    assert regularizer.feasible_scale(C, 100.0) == 1
    assert Regularizer(penalty, 0.5).feasible_scale(C, 0.5) == 1
    assert regularizer.conjugate(s * C, 0.5) == 0


def test_nothing_to_penalise_bounds_no_dual():
    none = find_regularizer("none", 0.3)
    assert none == Regularizer(NoPenalty(), 1.0) and not none.bounds_the_dual
    C = np.ones((3, 4, 2))
    assert none.penalty.dual_norm(C) == np.inf and none.penalty.dual_norm(0 * C) == 0
    assert none.feasible_scale(C, 0.5) == 0
    for penalty in NORMS:
        assert Regularizer(penalty).bounds_the_dual
    assert Regularizer(NoPenalty(), 0.5).bounds_the_dual  # a ridge of half the strength


def test_a_penalty_is_found_by_name_or_is_itself():
    for name, penalty in PENALTIES.items():
        assert find_regularizer(name, 1.0).penalty == penalty
    penalty = GatePenalty()
    assert find_regularizer(penalty, 0.5).penalty is penalty
    assert find_regularizer("ridge", 0.5).l1_ratio == 0


@ANY_PENALTY
@ANY_RATIO
def test_float32_stays_float32(penalty, l1_ratio):
    V = np.random.default_rng(0).standard_normal((2, 3, 2))
    regularizer = Regularizer(penalty, l1_ratio)
    W = regularizer.prox(V.astype(np.float32), np.float64(0.1))
    assert W.dtype == np.float32
    np.testing.assert_allclose(W, regularizer.prox(V, 0.1), atol=1e-6)


@ANY_PENALTY
@ANY_RATIO
def test_the_prox_keeps_the_memory_order_that_products_want(penalty, l1_ratio):
    V = empty_weights(5, 3, 2, np.float64)
    V[...] = np.random.default_rng(0).standard_normal(V.shape)
    assert Regularizer(penalty, l1_ratio).prox(V, 0.1).strides == V.strides
