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


def test_the_report_and_the_picture_show_every_method(tmp_path):
    rows = pd.concat([rows_of(4), rows_of(40)])
    text = cone_decomposition.report(rows)
    for method in ("approximate", "closed-form", "shift"):
        assert f"{method}: " in text
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
