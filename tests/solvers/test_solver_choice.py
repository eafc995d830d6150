from __future__ import annotations

import numpy as np
import pytest

from cvxdistill.solvers import (
    ADMM,
    RFISTA,
    AugmentedLagrangian,
    BlockCoordinateDescent,
    ReLUProblem,
    RidgeNewton,
    SemismoothNewton,
    activation_patterns,
    choose_solver,
    sample_gates,
)
from cvxdistill.solvers.fista import iteration_work
from cvxdistill.solvers.gated_newton import step_work
from cvxdistill.solvers.solver_choice import (
    MOST_DESCENT_FEATURES,
    MOST_DIRECT_FEATURES,
    SOLVERS,
)

PENALTIES = ["neuron", "gate", "nuclear", "feature", "l1", "ridge", "none"]


def make_relu_problem(**options):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((20, 4))
    D, G = activation_patterns(X, sample_gates(4, 6, random_state=0))
    return ReLUProblem(X, np.abs(X[:, 0]), D, G=G, **options)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("loss", ["squared", "huber"])
def test_newton_is_chosen_for_a_ridge_of_the_squared_loss_only(make_problem, penalty, loss):
    solver = choose_solver(make_problem(penalty=penalty, loss=loss))
    expected = RFISTA
    if loss == "squared" and penalty in ("ridge", "neuron", "gate"):
        expected = RidgeNewton if penalty == "ridge" else SemismoothNewton
    assert type(solver) is expected


def test_a_norm_without_share_is_a_ridge_and_a_blend_is_none(make_problem):
    assert isinstance(choose_solver(make_problem(l1_ratio=0.0)), RidgeNewton)
    assert isinstance(choose_solver(make_problem(l1_ratio=0.5)), SemismoothNewton)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("loss", ["squared", "huber", "logistic"])
def test_block_descent_is_chosen_for_one_output_and_groups(make_problem, penalty, loss):
    options = {"penalty": penalty, "loss": loss, "c": 1}
    if penalty == "none" and loss == "logistic":
        return
    solver = choose_solver(make_problem(**options))
    if penalty == "ridge" and loss == "squared":
        expected = RidgeNewton
    elif penalty in ("neuron", "gate") and loss == "squared":
        expected = SemismoothNewton
    else:
        expected = RFISTA if penalty in ("nuclear", "none") else BlockCoordinateDescent
    assert type(solver) is expected


@pytest.mark.parametrize("p", [MOST_DESCENT_FEATURES // 30, MOST_DESCENT_FEATURES // 30 + 1])
def test_many_features_are_left_to_rfista(make_problem, p):
    problem = make_problem(n=400, d=30, p=p, c=1, loss="huber")
    assert problem.operator.p == p
    few = p * 30 <= MOST_DESCENT_FEATURES
    assert type(choose_solver(problem)) is (BlockCoordinateDescent if few else RFISTA)


@pytest.mark.parametrize("steps", [0.9, 1.1])
def test_newtons_dear_steps_are_left_alone(make_problem, monkeypatch, steps):
    problem = make_problem(n=100, d=5, p=20)
    dear = steps * step_work(problem) / iteration_work(problem)
    monkeypatch.setattr("cvxdistill.solvers.solver_choice.MOST_ITERATIONS", dear)
    assert type(choose_solver(problem)) is (RFISTA if steps < 1 else SemismoothNewton)


def test_newtons_matrices_are_not_to_fill_the_memory(make_problem, monkeypatch):
    problem = make_problem(n=100, d=5, p=20)
    monkeypatch.setattr("cvxdistill.solvers.gated_newton.MOST_EXAMPLES", 99)
    assert type(choose_solver(problem)) is SemismoothNewton
    monkeypatch.setattr("cvxdistill.solvers.gated_newton.MOST_FEATURES", 99)
    assert type(choose_solver(problem)) is RFISTA


@pytest.mark.parametrize("p", [MOST_DIRECT_FEATURES // 20, MOST_DIRECT_FEATURES // 20 + 1])
def test_a_large_ridge_is_solved_iteratively(make_problem, p):
    problem = make_problem(n=200, d=20, p=p, penalty="ridge")
    assert problem.operator.p == p
    direct = p * 20 <= MOST_DIRECT_FEATURES
    assert isinstance(choose_solver(problem), RidgeNewton if direct else RFISTA)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("loss", ["squared", "huber"])
def test_admm_is_chosen_for_relu_networks_unless_they_are_large(monkeypatch, penalty, loss):
    problem = make_relu_problem(penalty=penalty, loss=loss)
    assert type(choose_solver(problem)) is ADMM
    monkeypatch.setattr("cvxdistill.solvers.solver_choice.MOST_FACTORED", 1)
    lengths = penalty not in ("nuclear", "feature", "l1")
    assert type(choose_solver(problem)) is (RFISTA if lengths else ADMM)


def test_what_is_asked_for_is_given(make_problem):
    ridge, relu = make_problem(penalty="ridge"), make_relu_problem()
    for name in ("block_descent", "rfista", "ridge_newton"):
        assert type(choose_solver(ridge, name)) is SOLVERS[name]
    for name in ("rfista", "augmented_lagrangian", "admm"):
        assert type(choose_solver(relu, name)) is SOLVERS[name]
    assert type(choose_solver(make_problem(), "semismooth_newton")) is SemismoothNewton
    assert list(SOLVERS.values()) == [
        SemismoothNewton,
        BlockCoordinateDescent,
        RFISTA,
        RidgeNewton,
        AugmentedLagrangian,
        ADMM,
    ]


def test_settings_are_passed_on(make_problem):
    for problem in (make_problem(), make_problem(penalty="ridge"), make_relu_problem()):
        solver = choose_solver(problem, tol=1e-7, max_iter=17, verbose=0)
        assert solver.tol == 1e-7 and solver.max_iter == 17


@pytest.mark.parametrize(
    ("name", "options", "suitable"),
    [
        ("ridge_newton", {}, "['auto', 'rfista', 'augmented_lagrangian', 'admm']"),
        ("block_descent", {}, "['auto', 'rfista', 'augmented_lagrangian', 'admm']"),
        ("rfista", {"penalty": "l1"}, "['auto', 'augmented_lagrangian', 'admm']"),
        ("rfista", {"penalty": "nuclear"}, "['auto', 'augmented_lagrangian', 'admm']"),
        ("rfista", {"penalty": "feature"}, "['auto', 'augmented_lagrangian', 'admm']"),
    ],
)
def test_what_does_not_suit_a_relu_network_is_refused(name, options, suitable):
    with pytest.raises(ValueError, match=f"{name!r} does not solve the ReLU programme") as error:
        choose_solver(make_relu_problem(**options), name)
    assert str(error.value).endswith(f"choose one of {suitable}.")


@pytest.mark.parametrize(
    ("name", "options", "suitable"),
    [
        ("admm", {}, "['auto', 'semismooth_newton', 'block_descent', 'rfista']"),
        ("semismooth_newton", {"loss": "huber"}, "['auto', 'block_descent', 'rfista']"),
        (
            "augmented_lagrangian",
            {"penalty": "ridge"},
            "['auto', 'block_descent', 'rfista', 'ridge_newton']",
        ),
        ("block_descent", {"penalty": "nuclear"}, "['auto', 'rfista']"),
        ("ridge_newton", {}, "['auto', 'semismooth_newton', 'block_descent', 'rfista']"),
        (
            "ridge_newton",
            {"penalty": "ridge", "loss": "huber"},
            "['auto', 'block_descent', 'rfista']",
        ),
        ("ridge_newton", {"penalty": "none"}, "['auto', 'rfista']"),
    ],
)
def test_what_does_not_suit_a_gated_programme_is_refused(make_problem, name, options, suitable):
    with pytest.raises(ValueError, match=f"{name!r} does not solve the gated ReLU") as error:
        choose_solver(make_problem(**options), name)
    assert str(error.value).endswith(f"choose one of {suitable}.")


def test_an_unknown_solver_is_refused(make_problem):
    with pytest.raises(ValueError, match=r"solver must be one of \['auto', .*\], got 'adam'"):
        choose_solver(make_problem(), "adam")
    with pytest.raises(ValueError, match="tol must be"):
        choose_solver(make_problem(), tol=-1.0)
