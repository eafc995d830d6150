"""The benchmark of solvers of the convex ReLU programme, on a table that is made up."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

relu_solvers = pytest.importorskip("relu_solvers")

from cvxdistill.solvers import ReLUProblem, activation_patterns, sample_gates  # noqa: E402


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((40, 3))
    D, G = activation_patterns(X, sample_gates(3, 6, random_state=0))
    return ReLUProblem(X, np.abs(X[:, :1]) + 0.1 * rng.standard_normal((40, 1)), D, G=G)


def test_our_rows_are_certified_and_the_tightest_tells_when_it_was_how_good(problem):
    rows, tightest = relu_solvers.our_rows(problem, 0.02, 60.0)
    assert [row["solver"] for row in rows] == [*relu_solvers.OURS, relu_solvers.AUTO]
    for row in rows:
        tol = relu_solvers.TIGHT if row["solver"] == relu_solvers.AUTO else relu_solvers.TOLERANCE
        assert row["status"] == "converged" and row["relative_gap"] <= tol
        assert row["violation"] <= 1e-9
        assert row["objective"] >= row["lower_bound"]
    assert tightest.objective == pytest.approx(rows[-1]["objective"], rel=1e-9)
    trace = tightest.trace
    assert relu_solvers.seconds_to(tightest, np.inf) == trace.seconds[0]
    assert relu_solvers.seconds_to(tightest, trace.objective[-1]) <= trace.seconds[-1]
    assert relu_solvers.seconds_to(tightest, rows[-1]["lower_bound"] * (1 - 1e-9)) == np.inf


def test_the_report_compares_at_each_strength():
    peer, auto = relu_solvers.PEER, relu_solvers.AUTO
    seconds = {**dict.fromkeys(relu_solvers.OURS, 1.0), auto: 2.0, peer: 30.0}
    rows = pd.DataFrame(
        {"table": "a", "ratio": ratio, "solver": name, "seconds": value}
        for ratio in relu_solvers.RATIOS
        for name, value in seconds.items()
    ).assign(lower_bound=0.0, alpha=1.0, objective=1.0, status="converged")
    rows.loc[(rows["solver"] == peer) & (rows["ratio"] == 0.01), ["seconds", "status"]] = (
        60.0,
        "limit",
    )
    rows["seconds as good as the peer"] = np.where(rows["solver"] == auto, 0.5, np.nan)
    said = relu_solvers.report(rows)
    for ratio, least in ((0.1, 30), (0.01, 60)):
        assert f"at {ratio:g} alpha_max, {peer} / ADMM: geometric mean {least}" in said
        assert (
            f"at {ratio:g} alpha_max, {peer} / as good as the peer: geometric mean "
            f"{'60' if ratio == 0.1 else '1.2e+02'}"
        ) in said
    assert f"all (2), {peer} / {auto}: geometric mean 21, 15 to 30" in said
    assert f"ended (1), {peer} / {auto}: geometric mean 15, 15 to 15" in said
