"""The benchmark on trained networks, small: it needs the folder CVXDISTILL_DATA."""

from __future__ import annotations

import os

import pytest

pytest.importorskip("torch")
needs_data = pytest.mark.skipif(
    not os.environ.get("CVXDISTILL_DATA"), reason="CVXDISTILL_DATA is not set"
)


@needs_data
def test_a_linear_student_keeps_the_accuracy_of_resnet18(tmp_path, monkeypatch):
    import cifar10_blocks

    monkeypatch.setattr(cifar10_blocks, "RESULTS", tmp_path)
    frame = cifar10_blocks.run(
        "resnet18",
        "layer4",
        configurations={"any": {"student": "linear", "n_neurons": 32, "verbose": 0}},
        images=1500,
        test_images=500,
        name="small",
    )
    (row,) = frame.to_dict("records")
    assert row["configuration"] == "2 x 2" and row["units"] == 32
    assert row["parameters"] == 1024 * 32 + 32 * 512 + 512
    assert row["activation_error"] < 0.3
    assert row["accuracy"] > 0.82
    assert (tmp_path / "small.csv").exists() and (tmp_path / "small.png").exists()


@needs_data
def test_the_corrected_dual_point_certifies_a_real_table_sooner():
    import rfista_choices

    counts = rfista_choices.iterations_to_certify(rfista_choices.problem("wine"), 0.01, 1e-4)
    assert counts["corrected"] < 0.8 * counts["scaled residual"]
