"""The comparison with pyscnn: what surrounds the two solvers, without running the peer."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

for package in ("click", "matplotlib", "pandas", "PIL"):
    pytest.importorskip(package)

BENCH = Path(__file__).resolve().parents[2] / "bench"
# The scripts of bench/ import each other by plain names, as when they are run.
sys.path[:0] = [str(BENCH), str(BENCH / "peers")]

import pandas as pd  # noqa: E402
import uci_rfista  # noqa: E402
from cvxdistill_rfista import solve  # noqa: E402
from ladder import Ladder  # noqa: E402
from serving import Worker  # noqa: E402

from cvxdistill.solvers import (  # noqa: E402
    RFISTA,
    GatedReLUProblem,
    activation_patterns,
    sample_gates,
)

needs_data = pytest.mark.skipif(
    not os.environ.get("CVXDISTILL_DATA"), reason="CVXDISTILL_DATA is not set"
)


def small_problem():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((40, 3))
    Y = np.sign(X[:, 0] * X[:, 1])
    D, G = activation_patterns(X, sample_gates(3, 12, random_state=0))
    return {"X": X, "Y": Y, "G": G, "D": D}


def rows(theirs, ours=1.0, limit=30.0):
    """The CSV's rows of one table and alpha, with these seconds in every column."""
    return pd.DataFrame(
        {
            "table": "glass",
            "alpha_ratio": 0.1,
            "solver": name,
            "dtype": dtype,
            "limit": limit,
            "seconds": ours if name == uci_rfista.OURS else theirs,
            "seconds_to_objective": ours if name == uci_rfista.OURS else theirs,
        }
        for name, dtype in uci_rfista.SOLVERS
    )


def test_weights_come_back_in_the_order_of_our_patterns():
    D = small_problem()["D"]
    V = np.arange(3.0 * D.shape[1]).reshape(-1, 3)
    shuffled = np.random.default_rng(1).permutation(D.shape[1])
    np.testing.assert_array_equal(uci_rfista.same_order(V[shuffled], D[:, shuffled], D), V)


def test_a_peer_that_solved_other_patterns_is_refused():
    D = small_problem()["D"]
    other = D.copy()
    other[0, 0] = not other[0, 0]
    with pytest.raises(ValueError, match="1 of the 12 expected ones"):
        uci_rfista.same_order(np.ones((12, 3)), other, D)


def test_a_ladder_stops_at_the_loosest_tolerance_with_a_good_objective():
    ladder = Ladder([1e-1, 1e-2, 1e-3], target=1.0, time_limit=60)
    assert not ladder.stop(5e-2, objective=2.0, seconds=1)  # 1e-1 would stop here, too early
    assert not ladder.stop(5e-2, objective=0.9, seconds=2)
    assert ladder.stop(5e-3, objective=0.8, seconds=3)
    assert (ladder.stopped_by, ladder.seconds, ladder.seconds_to_objective) == (1e-2, 3, 2)


def test_a_ladder_gives_up_at_the_time_limit_and_when_no_tolerance_is_left():
    late = Ladder([1e-3], target=1.0, time_limit=5)
    assert late.stop(1.0, objective=0.5, seconds=6)
    spent = Ladder([1e-3], target=1.0, time_limit=5)
    assert spent.stop(1e-4, objective=2.0, seconds=1)
    assert late.stopped_by is None and spent.stopped_by is None


def test_our_worker_reports_the_weights_and_times_of_a_certified_solve(tmp_path):
    data = small_problem()
    problem = GatedReLUProblem(data["X"], data["Y"], data["D"])
    alpha = 0.1 * problem.alpha_max()
    optimum = RFISTA(tol=1e-8).solve(problem, alpha).objective
    np.savez(tmp_path / "data.npz", **data)
    job = {"data": str(tmp_path / "data.npz"), "result": str(tmp_path / "result.npz")}
    target = {"tol": 1e-4, "target_objective": optimum * (1 + 1e-4), "time_limit": 10}
    answer = solve({**job, **target, "alpha": alpha, "dtype": "float32"})
    with np.load(tmp_path / "result.npz") as file:
        V = uci_rfista.same_order(file["V"].astype(float), file["D"], data["D"])
    assert problem.objective(V[:, :, None], 0.0, alpha) <= optimum * (1 + 1e-4)
    assert answer["dtype"] == "float32" and answer["relative_gap"] <= 1e-4
    assert 0 < answer["seconds_to_objective"] <= answer["seconds"]


def test_a_worker_answers_jobs_whatever_it_prints_and_says_when_it_dies(tmp_path):
    script = tmp_path / "doubling.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCH / 'peers')!r})\n"
        "from serving import serve\n"
        "def solve(job):\n    print('noise')\n    return {'twice': 2 * job['x']}\n"
        "serve(solve)\n"
    )
    with Worker(sys.executable, script, threads=1) as worker:
        assert worker(x=2) == {"twice": 4}
        assert worker(x=3) == {"twice": 6}
        with pytest.raises(RuntimeError, match="ended during the job"):
            worker(y=0)


@pytest.mark.parametrize(
    ("theirs", "ours", "bound"),
    [(4.0, 2.0, 2.0), (np.nan, 2.0, 15.0), (4.0, np.nan, 0.0)],
    ids=["both arrive", "the peer at its limit", "we at the limit"],
)
def test_ratios_are_lower_bounds(theirs, ours, bound):
    table = uci_rfista.side_by_side(rows(theirs, ours))
    assert uci_rfista.ratios(table, "seconds", "float64").tolist() == [bound]


def test_a_repeat_at_the_time_limit_counts_as_longer_than_any_other():
    assert uci_rfista.median_or_none([2.0, None, 1.0]) == 2.0
    assert uci_rfista.median_or_none([2.0, None, None]) is None


def test_a_pair_that_nobody_finished_has_no_ratio():
    table = uci_rfista.side_by_side(rows(np.nan, np.nan))
    assert uci_rfista.ratios(table, "seconds", "float64").empty


def test_the_report_says_who_was_at_the_limit():
    text = uci_rfista.report(rows(np.nan))
    assert "> 30" in text and "median at least 30.00" in text and "pyscnn 1" in text


def test_the_picture_is_written(tmp_path):
    uci_rfista.draw(pd.concat([rows(3.0)]), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@needs_data
def test_the_target_is_the_largest_class_against_the_rest():
    from datasets import load_uci

    X, y = load_uci("glass")
    data = uci_rfista.problem_data("glass")
    _, counts = np.unique(y, return_counts=True)
    assert set(data["Y"]) == {-1.0, 1.0} and (data["Y"] == 1).sum() == counts.max()
    assert data["D"].shape == (len(X), 100) and data["X"].dtype == np.float64


@needs_data
def test_numbers_are_standardised():
    Y = uci_rfista.problem_data("abalone")["Y"]
    np.testing.assert_allclose([Y.mean(), Y.std()], [0, 1], atol=1e-12)
