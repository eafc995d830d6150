"""Every loss with every penalty, gated ReLU and ReLU, by every solver that takes it.

The objectives are compared with those of cvxpy and Clarabel. ``docs/combinations.rst`` says which
combinations there are; with CVXDISTILL_WRITE_DOCS=1 in the environment the test of that page
writes it anew instead.
"""

from __future__ import annotations

import itertools
import os
import textwrap
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cvxdistill.solvers import GatedReLUProblem
from cvxdistill.solvers.augmented_lagrangian import AugmentedLagrangian
from cvxdistill.solvers.relu_problem import ReLUProblem
from cvxdistill.solvers.solver_choice import SOLVERS, choose_solver

PROGRAMMES = {"gated ReLU": GatedReLUProblem, "ReLU": ReLUProblem}
PENALTIES = ["neuron", "gate", "nuclear", "feature", "l1", "ridge", "none"]
LOSSES = ["squared", "huber", "logistic", "multinomial"]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "combinations.rst"
N = 30
# Of the solvers, and of the comparison with the optimum.
TOLERANCE, AGREEMENT = 1e-6, 1e-5


class Combination(NamedTuple):
    programme: str
    penalty: str
    loss: str

    @property
    def refused(self) -> bool:
        return self.penalty == "none" and self.loss in ("logistic", "multinomial")


COMBINATIONS = list(
    itertools.starmap(Combination, itertools.product(PROGRAMMES, PENALTIES, LOSSES))
)
SOLVED = [combination for combination in COMBINATIONS if not combination.refused]


def options_of(combination, fit_intercept=False):
    """Loss, penalty and intercept, with sample weights in every other combination."""
    _, penalty, loss = combination
    options = {"penalty": penalty, "loss": loss, "fit_intercept": fit_intercept}
    if (LOSSES.index(loss) + PENALTIES.index(penalty) + fit_intercept) % 2:
        options["sample_weight"] = np.random.default_rng(1).uniform(0.3, 3, N)
    return options


@pytest.fixture(scope="module")
def build(make_problem):
    def problem_of(combination, **options):
        c = 3 if combination.loss == "multinomial" else 2
        programme = PROGRAMMES[combination.programme]
        return make_problem(n=N, d=3, p=5, c=c, seed=2, programme=programme, **options)

    return problem_of


def suitable_solvers(problem):
    """The solvers that take the problem, the one that is chosen for it first."""
    solvers = [type(choose_solver(problem))]
    for name, solver in SOLVERS.items():
        try:
            choose_solver(problem, name)
        except ValueError:
            continue
        if solver not in solvers:
            solvers.append(solver)
    return solvers


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("combination", SOLVED, ids="-".join)
def test_every_solver_that_takes_it_finds_the_optimum_of_cvxpy(
    build, solve_with_cvxpy, combination, fit_intercept
):
    options = options_of(combination, fit_intercept)
    problem = build(combination, **options)
    certified = combination.penalty != "none"
    unbounded = combination.penalty in ("ridge", "none")
    alpha = 0.05 if unbounded else 0.1 * problem.alpha_max()
    X, D = problem.operator.X, problem.operator.D
    relu = combination.programme == "ReLU"
    best, _ = solve_with_cvxpy(X, problem.Y, D, alpha, relu=relu, **options)
    for solver in suitable_solvers(problem):
        if solver is AugmentedLagrangian and fit_intercept and combination.loss != "squared":
            continue  # Its many intercepts would take most of this file's time.
        solution = solver(tol=TOLERANCE, max_iter=50_000).solve(problem, alpha)
        name = solver.__name__
        assert solution.converged, f"{name}: {solution.message}"
        # By the weights that it returns, in the network itself.
        value = problem.objective(solution.V, solution.intercept, alpha)
        assert value == pytest.approx(best, rel=AGREEMENT), name
        assert solution.violation < 1e-8, name
        assert np.isfinite(solution.duality_gap) == certified, name
        # Clarabel's own error is far below the slack here.
        assert not certified or solution.duality_gap >= value - best - 1e-8 * best, name


@pytest.mark.parametrize("combination", [one for one in COMBINATIONS if one.refused], ids="-".join)
def test_log_loss_without_a_penalty_is_refused_with_its_reason(build, combination):
    """Nothing bounds the weights where the gated features separate the classes."""
    with pytest.raises(ValueError, match=r"^Log loss without a penalty has no minimiser"):
        build(combination, **options_of(combination))


def cell(build, combination):
    """What the page says of a combination."""
    try:
        problem = build(combination, **options_of(combination))
    except ValueError:
        return "refused"
    certificate = "gap" if problem.regularizer.bounds_the_dual else "KKT"
    names = ", ".join(f"``{solver.__name__}``" for solver in suitable_solvers(problem))
    return f"{certificate}: {names}"


def page(build):
    """The text of docs/combinations.rst."""
    refused = Combination("gated ReLU", "none", "logistic")
    with pytest.raises(ValueError) as reason:
        build(refused, **options_of(refused))
    lines = [
        "Losses, penalties and solvers",
        "=============================",
        "",
        "Every loss can be combined with every penalty, for gated ReLU and for ReLU networks, with",
        "and without an intercept and sample weights. Each solver that a cell names finds the",
        "optimum of that combination, and the first one is chosen automatically for the test's",
        "small problems. The test that wrote this page compares all of them with cvxpy and",
        "Clarabel, to a relative 1e-5 of the objective, with an intercept and without",
        "(``AugmentedLagrangian`` with one for the squared loss only).",
        "",
        "*gap*",
        "    The solver stops on a duality gap, which bounds how far the objective is from the",
        "    optimum.",
        "*KKT*",
        "    There is no bounded dual point without a penalty; the solver stops on the residual of",
        "    the first-order conditions.",
        "*refused*",
        *textwrap.wrap(str(reason.value), 86, initial_indent="    ", subsequent_indent="    "),
    ]
    for programme in PROGRAMMES:
        title = programme[0].upper() + programme[1:]
        lines += ["", title, "-" * len(title), "", ".. list-table::"]
        lines += ["   :header-rows: 1", "   :stub-columns: 1", "", "   * - penalty"]
        lines += [f"     - {loss}" for loss in LOSSES]
        for penalty in PENALTIES:
            lines.append(f"   * - {penalty}")
            lines += [f"     - {cell(build, Combination(programme, penalty, k))}" for k in LOSSES]
    lines += [
        "",
        "This page is made by ``tests/solvers/test_combinations.py``; after a change write it anew",
        "with::",
        "",
        "    CVXDISTILL_WRITE_DOCS=1 pytest tests/solvers/test_combinations.py -k page",
        "",
    ]
    return "\n".join(lines)


def test_the_page_says_what_there_is(build):
    text = page(build)
    if os.environ.get("CVXDISTILL_WRITE_DOCS") == "1":
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(text, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == text
