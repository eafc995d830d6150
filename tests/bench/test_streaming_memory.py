"""The benchmark of streamed fits."""

from __future__ import annotations

import numpy as np
import pytest

for package in ("click", "matplotlib", "pandas"):
    pytest.importorskip(package)

import pandas as pd  # noqa: E402
import streaming_memory  # noqa: E402
from click.testing import CliRunner  # noqa: E402

from cvxdistill.solvers import GatedStatistics, LowRankProblem, sample_gates  # noqa: E402


def test_what_is_streamed_is_the_programme_of_all_rows():
    X, Y = (np.concatenate(parts) for parts in zip(*streaming_memory.batches(9000), strict=True))
    assert X.shape == (9000, 64) and Y.shape == (9000, 4)
    G = sample_gates(64, 16, random_state=0)
    problem = LowRankProblem(GatedStatistics(16, 64, 4, gates=G).update(X, Y))
    solution = streaming_memory.streamed(9000)
    assert solution.relative_gap <= streaming_memory.GAP
    assert solution.alpha == pytest.approx(streaming_memory.STRENGTH * problem.alpha_max())


def test_the_table_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming_memory, "RESULTS", tmp_path / "table.csv")
    done = CliRunner().invoke(streaming_memory.main, ["--largest", "10000"])
    assert done.exit_code == 0, done.output
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table["rows"]) == ["streamed", "in memory"]
    assert (table["relative_gap"] <= streaming_memory.GAP).all()
    assert (table["seconds"] > 0).all() and not (table["peak_MiB"] < 0).any()
