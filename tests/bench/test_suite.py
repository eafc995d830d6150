"""The benchmark suite: its workers, its pairing and its report, without the peers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

for package in ("click", "matplotlib", "pandas", "PIL"):
    pytest.importorskip(package)

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "peers")]

import cvxdistill_auto  # noqa: E402
import pandas as pd  # noqa: E402
import startup  # noqa: E402
import suite  # noqa: E402
import suite_problems  # noqa: E402
import suite_report  # noqa: E402
from ladder import Marks  # noqa: E402
from serving import Worker  # noqa: E402

from cvxdistill.solvers import GatedReLUProblem, choose_solver  # noqa: E402

needs_data = pytest.mark.skipif(
    not os.environ.get("CVXDISTILL_DATA"), reason="CVXDISTILL_DATA is not set"
)


@pytest.fixture
def small(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "CACHE", tmp_path)
    make = lambda: suite_problems.noise(80, 3, 8, 2)  # noqa: E731
    return suite_problems.SuiteProblem("growth/n/80", "growth in n", make, 0.05)


class FakeField:
    """A field whose peers take what they are told."""

    limit, repeats = 60.0, 3

    def __init__(self, found):
        self.found, self.asked = found, []

    def ours(self, measured, tol):
        self.asked.append(("ours", tol))
        return {
            **{"seconds": 0.5, "good": True, "relative_gap": tol, "solver": "Some"},
            **{"peak_growth": 10, "versions": "ours 1"},
        }

    def oracle(self, name, measured):
        self.asked.append((name, None))
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    climb = oracle

    def at_tolerance(self, name, measured, tol):
        self.asked.append((name, tol))
        return {"seconds": 3.0}


def answer(seconds, **more):
    return {"seconds": seconds, "peak_growth": 5, "versions": "theirs 2", **more}


def test_optimum_and_suboptimality_are_those_of_the_programme(small):
    measured = suite.Measured(small)
    assert measured.optimum_gap <= suite.REFERENCE
    data = small.make()
    programme = GatedReLUProblem(data["X"], data["Y"], data["D"])
    zeros = np.zeros(programme.weights_shape)
    at_zero = np.mean((data["Y"] ** 2).sum(axis=1)) / 2
    assert measured.suboptimality(zeros) == pytest.approx(at_zero / measured.optimum - 1)
    best = choose_solver(programme, tol=1e-9).solve(programme, measured.alpha)
    assert 0 <= measured.suboptimality(best.V) + 1e-9 <= 2e-9
    # The optimum is read from the cache the second time.
    assert suite.Measured(small).optimum == measured.optimum


def test_our_worker_answers_with_weights(small, tmp_path):
    measured = suite.Measured(small)
    job = {
        **{"data": str(measured.file), "result": str(measured.result), "alpha": measured.alpha},
        **{"penalty": "neuron", "tol": 1e-6, "time_limit": 60.0},
    }
    said = cvxdistill_auto.solve(job)
    assert said["relative_gap"] <= 1e-6 and said["seconds"] > 0
    with np.load(measured.result) as file:
        assert measured.suboptimality(file["V"]) <= 1e-6


def test_adam_minimises_the_same_objective(small):
    torch_adam = pytest.importorskip("torch_adam")
    measured = suite.Measured(small)
    job = {
        **{"data": str(measured.file), "result": str(measured.result), "alpha": measured.alpha},
        **{"targets": [1.3 * measured.optimum, 0.0], "time_limit": 2.0, "threads": 1},
        **{"rates": [1e-2, 3e-2], "pilot": 0.3, "batch": None},
    }
    said = torch_adam.solve(job)
    with np.load(measured.result) as file:
        assert (file["D"] == measured.data["D"]).all()
        assert -1e-9 <= measured.suboptimality(file["V"]) < 0.3
    assert said["seconds"][0] < 2.0 and said["seconds"][1] is None and said["rate"] in (1e-2, 3e-2)


def test_marks_are_the_first_times():
    marks = Marks([1.0, 0.1], 10.0)
    assert not marks.stop(5.0, 1.0)
    assert not marks.stop(0.5, 2.0)
    assert not marks.stop(0.2, 3.0)
    assert marks.stop(0.1, 4.0) and marks.seconds == [2.0, 4.0]
    assert Marks([0.0], 1.0).stop(1.0, 2.0)


def test_a_pair_is_repeated_and_medians_count(small):
    field = FakeField({1e-3: answer(2.0, tolerance=1e-5), 1e-6: answer(20.0, tolerance=1e-9)})
    row = suite.peer_row(field, suite.Measured(small), "adelie")
    assert row["to 0.001"] == 3.0 and row["ours to 0.001"] == 0.5
    assert row["to 1e-06"] == 20.0 and row["reached 1e-06"]
    again = [("adelie", 1e-5), ("ours", 1e-3)] * 2
    assert field.asked == [("adelie", None), ("ours", 1e-3), *again, ("ours", 1e-6)]


def test_who_does_not_get_there_counts_with_the_limit(small):
    measured = suite.Measured(small)
    row = suite.peer_row(FakeField({1e-3: answer(2.0)}), measured, "pyscnn")
    assert row["reached 0.001"] and not row["reached 1e-06"] and row["to 1e-06"] == 60.0
    late = suite.peer_row(FakeField(TimeoutError()), measured, "skglm")
    assert late["why"] == "time" and not late["reached 0.001"]
    full = suite.peer_row(FakeField(MemoryError()), measured, "skglm")
    assert full["why"] == "memory"
    with pytest.raises(RuntimeError, match="not ours"):
        suite.peer_row(FakeField(RuntimeError("its objective is not ours")), measured, "skglm")


SLOW = """
import os, signal, sys, time
sys.path.insert(0, {peers!r})
from serving import serve

def solve(job):
    if job.get("die"):
        raise SystemExit
    if job.get("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    bytearray(job.get("bytes", 0))
    time.sleep(job["seconds"])
    return {{"first": job.get("first", False)}}

serve(solve)
"""


def test_a_worker_that_is_late_or_dies_is_replaced(tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(peers=str(BENCH / "peers")))
    with Worker(sys.executable, script, 1, first={"seconds": 0}, memory=2**33) as worker:
        assert worker(seconds=0) == {"first": False}
        with pytest.raises(TimeoutError, match=r"more than 0\.2 s"):
            worker(0.2, seconds=60)
        assert worker(30.0, seconds=0) == {"first": False}
        with pytest.raises(RuntimeError, match="ended during"):
            worker(die=True)
        assert worker(seconds=0) == {"first": False}
        with pytest.raises(MemoryError, match="too little memory"):
            worker(bytes=2**34)
        with pytest.raises(MemoryError, match="ended during"):
            worker(killed=True)
        assert worker(seconds=0) == {"first": False}


def test_starting_is_told_apart_from_the_job(tmp_path, monkeypatch):
    script = tmp_path / "slow.py"
    script.write_text(SLOW.format(peers=str(BENCH / "peers")))
    caches = []

    def worker(name, folder):
        caches.append(os.environ["NUMBA_CACHE_DIR"])
        return Worker(sys.executable, script, 1, first={"seconds": 0.5})

    monkeypatch.setattr(startup, "worker", worker)
    monkeypatch.setattr(startup, "small_job", lambda name, folder: {"seconds": 0.1})
    row = startup.measure("some")
    assert row["solver"] == "some" and 0.1 <= row["again"] < 0.5
    assert row["empty cache"] >= 0.5 and row["cached"] >= 0.5
    assert caches[0] == caches[1] != os.environ.get("NUMBA_CACHE_DIR")


def table():
    def row(problem, solver, seconds, ours=None, reached=True):
        return {
            **{"problem": problem, "group": problem.split("/")[0], "solver": solver},
            **{"to 0.001": seconds, "reached 0.001": reached, "ours to 0.001": ours},
            **{"reached 1e-08": reached, "peak_growth": 2**20},
        }

    return pd.DataFrame(
        [
            row("uci/a", "us", 1.0),
            row("uci/a", "fast", 4.0, 1.0),
            row("uci/a", "slow", 60.0, 1.0, reached=False),
            row("uci/b", "us", 2.0),
            row("uci/b", "fast", 1.0, 2.0),
            row("uci/b", "slow", 20.0, 2.0),
        ]
    )


def test_ratios_are_of_pairs_and_the_best_peer_of_each_problem():
    found = suite_report.ratios(table(), "us", 1e-3)
    assert found.loc["uci/a"].tolist() == [4.0, 60.0, 4.0]
    assert found.loc["uci/b"].tolist() == [0.5, 10.0, 0.5]
    assert suite_report.geometric_mean(found["best"]) == pytest.approx(2**0.5)
    text = suite_report.report(table(), "us", (1e-3,), 1e-8)
    assert "uci: 2 of 2 problems certified to 1e-08; others: none" in text
    summary = suite_report.summary(table(), "us", (1e-3,))
    assert suite_report.rst_table(summary, "uci, beside us") in text
    assert summary["problems"].tolist() == [2, 2, 2]
    assert summary["0.001: times ours"].tolist() == pytest.approx([2**0.5, 600**0.5, 2**0.5])
    assert summary["0.001: ours slower on"].tolist() == [1, 0, 1]
    assert summary["0.001: solved"].tolist() == [2, 1, 2]


def test_tables_are_those_of_restructured_text():
    frame = pd.DataFrame({"much": [1234.5, 0.123], "many": [1234, 5]}, index=["a", "bb"])
    assert suite_report.rst_table(frame, "solver").splitlines() == [
        "======  =====  =====",
        "solver   much   many",
        "======  =====  =====",
        "a       1,200  1,234",
        "bb       0.12      5",
        "======  =====  =====",
    ]


def test_pictures_are_drawn(tmp_path):
    suite_report.draw_profile(table(), "us", (1e-3,), tmp_path / "profile.png")
    grown = table().assign(group="growth in n")
    grown["problem"] = grown["problem"].map({"uci/a": "growth/n/10", "uci/b": "growth/n/100"})
    suite_report.draw_growth(grown, 1e-3, tmp_path / "growth.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 0 for name in ("profile", "growth"))
    assert suite_report.exponent(np.array([1, 10.0, 100]), np.array([2, 20.0, 200])) == (
        pytest.approx(1.0)
    )


@needs_data
def test_the_grid_is_that_of_the_tables():
    found = suite_problems.problems()
    uci = [name for name in found if name.startswith("uci/")]
    assert len(uci) == (14 * 2 - 1) * 3 and "uci/adult/500/0.1" not in found
    data = found["uci/glass/100/0.01"].make()
    assert data["Y"].shape == (214, 1) and set(np.unique(data["Y"])) == {-1.0, 1.0}
    assert data["D"].shape[1] <= 100 and data["G"].shape == (9, data["D"].shape[1])
    one_hot = found["classes/wine/0.1"].make()["Y"]
    assert (one_hot.sum(axis=1) == 1).all() and one_hot.shape == (178, 3)
    assert not suite.takes("Adam", found["uci/glass/500/0.1"])
    assert suite.takes("Adam", found["uci/glass/100/0.1"])
    assert not suite.takes("skglm", found["classes/wine/0.1"])
    block = suite_problems.block("resnet20", "layer3", images=10, rows=300, n_gates=8)
    assert block["X"].shape == (300, 289) and block["Y"].shape == (300, 5)
    assert block["X"].std() == pytest.approx(1) and block["D"].shape == (300, 8)


def test_growth_changes_one_size_only():
    for sizes in suite_problems.GROWTH.values():
        assert sizes[-1] == 100 * sizes[0]
    shape = suite_problems.noise(50, 3, 7, 2)
    assert shape["X"].shape == (50, 3) and shape["Y"].shape == (50, 2)
    np.testing.assert_allclose(shape["Y"].std(axis=0), 1)


def test_the_readme_has_the_table_of_the_results():
    table = pd.read_csv(suite.RESULTS.with_suffix(".csv"))
    rows = table[table["group"] == "uci"]
    text = suite_report.rst_table(
        suite_report.summary(rows, suite.OURS, suite.TARGETS), f"uci, beside {suite.OURS}"
    )
    assert text in (BENCH.parent / "README.rst").read_text()
