"""The comparison of generated with sampled gates: what surrounds the solves."""

from __future__ import annotations

import os

import numpy as np
import pytest

for package in ("click", "matplotlib", "pandas", "PIL"):
    pytest.importorskip(package)

import gate_generation as bench  # noqa: E402
import pandas as pd  # noqa: E402

needs_data = pytest.mark.skipif(
    not os.environ.get("CVXDISTILL_DATA"), reason="CVXDISTILL_DATA is not set"
)


@pytest.fixture
def table(monkeypatch):
    """Put a table in the place of the UCI tables."""

    def put(X, y):
        monkeypatch.setattr(bench, "load_uci", lambda name: (X.astype(np.float32), y))

    return put


def rows(generated_error=0.2):
    """The CSV's rows of two tables, for Gaussian and generated gates."""
    shared = {"active_gates": 50, "violation": 0.1, "seconds": 1.0}
    return pd.DataFrame(
        {"table": name, "alpha_ratio": ratio, "method": method, **figures, **shared}
        for name in ("glass", "wine")
        for ratio in bench.ALPHA_RATIOS
        for method, figures in {
            "gaussian": {"objective": 2.0, "test_error": 0.25},
            "generated": {"objective": 1.0, "test_error": generated_error},
        }.items()
    )


def test_scaling_knows_nothing_of_the_test_rows(table):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((50, 3)) * [1, 5, 9] + 4, rng.standard_normal(50).astype(np.float32)
    table(X, y)
    split = bench.split_table("any")
    assert split.X.shape == (40, 3) and split.X_test.shape == (10, 3)
    np.testing.assert_allclose(split.X.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(split.X.std(axis=0), 1, atol=1e-6)
    test = np.random.default_rng(0).permutation(50)[:10]
    X[test] += 100
    table(X, y)
    np.testing.assert_array_equal(bench.split_table("any").X, split.X)


def test_two_classes_are_one_column_and_more_are_one_hot(table):
    X = np.random.default_rng(0).standard_normal((30, 2))
    for classes, columns in ((2, 1), (3, 3)):
        y = (np.arange(30) % classes).astype(np.int16)
        table(X, y)
        split = bench.split_table("any")
        assert split.Y.shape == (24, columns)
        scores = np.eye(classes)[split.y_test] if classes > 2 else 2.0 * split.y_test[:, None] - 1
        assert bench.prediction_error(split, scores) == 0
        wrong = np.roll(scores, 1, axis=1) if classes > 2 else -scores
        assert bench.prediction_error(split, wrong) == 1


def test_the_error_of_numbers_is_the_root_mean_square(table):
    X, y = np.random.default_rng(0).standard_normal((2, 30, 1))
    table(X, y[:, 0].astype(np.float32))
    split = bench.split_table("any")
    Z = split.y_test[:, None] + 3
    assert bench.prediction_error(split, Z) == pytest.approx(3)


def test_generated_gates_have_a_lower_objective_than_as_many_sampled_ones(table, monkeypatch):
    monkeypatch.setattr(bench, "N_GATES", 20)
    monkeypatch.setattr(bench, "METHODS", ("gaussian", "generated"))
    rng = np.random.default_rng(0)
    X = rng.standard_normal((150, 4))
    table(X, (np.prod(X, axis=1) > 0).astype(np.int16))
    gaussian, generated = bench.compare("any", 0.01)
    assert generated["objective"] < 0.9 * gaussian["objective"]
    assert generated["gates"] <= 20 and gaussian["gates"] <= 20
    assert 0 <= generated["violation"] < gaussian["violation"]
    assert 0 <= generated["test_error"] <= 1 and generated["alpha"] == gaussian["alpha"]


def test_the_report_counts_tables_with_lower_and_higher_errors():
    text = bench.report(rows())
    assert "median 0.500" in text and "lower on 2, higher on 0 of 2 tables" in text
    assert "lower on 0, higher on 2 of 2 tables" in bench.report(rows(generated_error=0.5))


def test_the_picture_is_written(tmp_path):
    bench.draw(rows(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@needs_data
def test_a_table_of_classes_is_read():
    split = bench.split_table("glass")
    assert split.Y.shape[1] == len(split.classes) == 6
    assert len(split.X) + len(split.X_test) == 214
