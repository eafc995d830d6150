"""The benchmark of MNIST's ten digits, on few images of noise."""

from __future__ import annotations

import numpy as np
import pytest

for package in ("click", "matplotlib", "pandas", "PIL"):
    pytest.importorskip(package)

import mnist_outputs  # noqa: E402
from click.testing import CliRunner  # noqa: E402


def noise(part):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (60_000, 5, 5), dtype=np.uint8), rng.integers(0, 10, 60_000)


def test_the_row_is_certified_and_written(monkeypatch, tmp_path):
    monkeypatch.setattr(mnist_outputs, "RESULTS", tmp_path / "results" / "row.csv")
    monkeypatch.setattr(mnist_outputs, "load_mnist", noise)
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(mnist_outputs, "IMAGES", 200)
    done = CliRunner().invoke(mnist_outputs.main)
    assert done.exit_code == 0, done.output
    names, values = (tmp_path / "results" / "row.csv").read_text().splitlines()
    row = dict(zip(names.split(","), values.split(","), strict=True))
    assert row["images"] == "200" and row["status"] == "converged"
    assert float(row["relative_gap"]) <= mnist_outputs.GAP
    assert float(row["seconds"]) > 0 and 0 < float(row["peak_GiB"]) < 24
