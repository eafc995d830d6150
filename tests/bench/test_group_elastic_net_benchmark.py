"""The benchmark of group elastic nets: its measure, its ratios, and a job of our own worker."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

for package in ("click", "matplotlib", "pandas", "PIL", "sklearn"):
    pytest.importorskip(package)

import group_elastic_net as benchmark  # noqa: E402
import pandas as pd  # noqa: E402

from cvxdistill.solvers import (  # noqa: E402
    BlockCoordinateDescent,
    GroupElasticNetProblem,
    alpha_grid,
    group_alpha_max,
)

sys.path.append(str(Path(benchmark.__file__).parent / "peers"))


@pytest.fixture
def small():
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((40, 12)), rng.standard_normal((40, 2))
    return X, Y, GroupElasticNetProblem(X, Y, 3)


def test_the_gaps_of_a_path_are_measured_from_its_coefficients_alone(small):
    _, _, problem = small
    alphas = alpha_grid(group_alpha_max(problem), 5, 0.05)
    path = BlockCoordinateDescent(tol=1e-8).path(problem, alphas)
    good = benchmark.measured(problem, path.coefs, alphas)
    assert good["largest_gap"] <= 1.01e-8
    assert good["active_groups"] == path[-1].n_active_groups
    bad = benchmark.measured(problem, path.coefs + 0.01, alphas)
    assert bad["largest_gap"] > 1e-4


def test_our_worker_answers_a_job(tmp_path, small):
    import cvxdistill_path

    X, Y, problem = small
    np.savez(tmp_path / "data.npz", X=X, Y=Y)
    alphas = alpha_grid(group_alpha_max(problem), 4, 0.1)
    job = {"data": str(tmp_path / "data.npz"), "result": str(tmp_path / "result.npy")}
    job |= {"alphas": alphas.tolist(), "groups": 3, "loss": "squared", "intercept": True}
    answer = cvxdistill_path.solve({**job, "tol": 1e-6, "time_limit": 60.0})
    coefs = np.load(tmp_path / "result.npy")
    assert coefs.shape == (4, 12, 2)
    assert answer["alphas_done"] == 4
    assert benchmark.measured(problem, coefs, alphas)["largest_gap"] <= 1.01e-6


def test_peak_memory_sees_what_is_allocated_and_freed():
    # In a process of its own: what others have freed in this one may be used again.
    source = "import numpy as np; from memory import PeakMemory; memory = PeakMemory()\n"
    source += "with memory: np.ones(10_000_000).sum()\nprint(memory.growth)"
    folder = Path(benchmark.__file__).parent / "peers"
    call = [sys.executable, "-c", source]
    answer = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=True)
    if answer.stdout.strip() == "None":
        pytest.skip("no /proc here")
    assert 60e6 < int(answer.stdout) < 200e6


def test_the_many_groups_are_as_described():
    data = benchmark.many_groups_data()
    X = data["X"][:, :2000]
    correlation = np.corrcoef(X, rowvar=False)
    assert np.diagonal(correlation, 1).mean() == pytest.approx(0.5, abs=0.01)
    assert np.diagonal(correlation, 2).mean() == pytest.approx(0.25, abs=0.01)


def test_ratios_are_the_peers_seconds_divided_by_ours(tmp_path):
    rows = pd.DataFrame(
        [
            {"case": case, "solver": solver, "seconds": seconds, "our_seconds": ours}
            | {"reached": solver != "adelie" or case == "one"}
            for case, solver, seconds, ours in [
                ("one", "cvxdistill", 2.0, 2.0),
                ("one", "adelie", 8.0, 2.0),
                ("one", "skglm", 3.0, 2.0),
                ("two", "cvxdistill", 1.0, 1.0),
                ("two", "adelie", 0.5, 0.5),
            ]
        ]
    )
    table = benchmark.ratios(rows)
    assert table.loc["one", "adelie / ours"] == 4
    assert table.loc["one", "skglm / ours"] == 1.5
    assert np.isnan(table.loc["two", "skglm / ours"])
    text = benchmark.report(rows.assign(versions="", input_bytes=0, peak_growth=0))
    assert "adelie / ours: geometric mean 2" in text
    assert "1 times the peer did not get there" in text
    benchmark.draw(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0
