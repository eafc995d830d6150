"""The benchmark of cone decompositions: its cases and its figures, on one small table."""

from __future__ import annotations

import os

import numpy as np
import pytest

for package in ("click", "matplotlib", "pandas", "PIL"):
    pytest.importorskip(package)

import cone_decomposition  # noqa: E402
import pandas as pd  # noqa: E402

from cvxdistill.solvers import GatedReLUProblem, evaluate_gates, sample_gates  # noqa: E402
from cvxdistill.solvers.cone_decomposition import decompose  # noqa: E402

needs_data = pytest.mark.skipif(
    not os.environ.get("CVXDISTILL_DATA"), reason="CVXDISTILL_DATA is not set"
)


def small_data(n, d=4, p=6):
    rng = np.random.default_rng(0)
    X, V = rng.standard_normal((n, d)), rng.standard_normal((p, d, 1))
    G = sample_gates(d, p, random_state=0)
    D = evaluate_gates(X, G)
    problem = GatedReLUProblem(X, rng.standard_normal(n), D)
    loss = problem.loss.value(problem.predict(V))
    return {"X": X, "G": G, "D": D, "V": V, "problem": problem, "loss": loss}


def peer(data, *, outside=0.0):
    """A peer's row where it finds our exact pairs, moved by so much out of their cones."""

    def worker(data, result, time_limit):
        with np.load(data) as file:
            X, D, G, V = (file[name] for name in "XDGV")
        assert V.any(axis=(1, 2)).all() and D.shape[1] == G.shape[1] == len(V)
        pairs = decompose(X, D, V, method="exact").weights
        np.save(result, pairs - outside * pairs.mean(axis=1, keepdims=True))
        return {"seconds": 2.0, "status": "converged"}

    return cone_decomposition.peer_decomposed(data, worker)


def rows_of(n):
    methods = cone_decomposition.METHODS if n <= 4 else ("exact", "approximate", "shift")
    data = small_data(n)
    return pd.DataFrame(
        {"table": f"{n} rows", **cone_decomposition.decomposed(method, data)} for method in methods
    )


def test_independent_rows_are_clearly_so():
    X = np.random.default_rng(0).standard_normal((30, 5))
    X[1] = 2 * X[0] + 0.01 * X[1]
    rows = cone_decomposition.independent_rows(X)
    assert 1 not in rows and len(rows) == 5
    assert np.linalg.matrix_rank(X[rows]) == 5


@pytest.mark.parametrize("n", [4, 40])
def test_every_method_keeps_the_loss_and_ends_inside_and_exact_is_shortest(n):
    rows = rows_of(n).set_index("method")
    assert rows["loss_change"].max() <= 1e-9 and rows["violation"].max() <= 1e-9
    assert (rows["norm_growth"] >= rows.loc["exact", "norm_growth"] * (1 - 1e-7)).all()
    assert rows.loc["shift", "norm_growth"] > 1
    assert rows.loc["shift", "violation_before_repair"] > 1e-3


def test_a_peer_is_measured_by_its_own_network(monkeypatch, tmp_path):
    monkeypatch.setattr(cone_decomposition, "CACHE", tmp_path)
    data = small_data(40)
    data["V"][2] = 0
    data["loss"] = data["problem"].loss.value(data["problem"].predict(data["V"]))
    exact = cone_decomposition.decomposed("exact", data)
    inside, outside = peer(data), peer(data, outside=0.5)
    assert inside["norm_growth"] == pytest.approx(exact["norm_growth"], rel=1e-9)
    assert max(inside["violation"], inside["loss_change"]) < 1e-9
    assert min(outside["violation"], outside["loss_change"]) > 1e-3


def test_the_report_and_the_picture_show_every_method(monkeypatch, tmp_path):
    monkeypatch.setattr(cone_decomposition, "CACHE", tmp_path)
    theirs = [{"table": f"{n} rows", **peer(small_data(n))} for n in (4, 40)]
    rows = pd.concat([rows_of(4), rows_of(40), pd.DataFrame(theirs)])
    text = cone_decomposition.report(rows)
    for method in ("approximate", "closed-form", "shift", "pyscnn"):
        assert f"{method}: " in text
    assert "pyscnn: largest violation" in text and "times the seconds of approximate" in text
    assert "largest relative change of the loss" in text
    cone_decomposition.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@needs_data
def test_a_table_of_few_rows_has_full_row_rank():
    data = cone_decomposition.setting("sonar (few rows)")
    n, d = data["X"].shape
    assert 30 < n <= d == 60 and np.linalg.matrix_rank(data["X"]) == n
    margins = np.abs(data["X"] @ data["G"]) / np.linalg.norm(data["X"], axis=1)[:, None]
    assert (margins.min(axis=0) >= 1e-5 * np.linalg.norm(data["G"], axis=0) * (1 - 1e-9)).all()
