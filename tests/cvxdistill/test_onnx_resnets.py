"""Two trained ResNets with every kind of student as ONNX: one file gives torch's outputs.

They need the folder CVXDISTILL_DATA.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from torch import nn  # noqa: E402

import cvxdistill  # noqa: E402
from cvxdistill.adapters import DenseLayout  # noqa: E402

pytestmark = pytest.mark.skipif(
    not os.environ.get("CVXDISTILL_DATA"), reason="CVXDISTILL_DATA is not set"
)

FEW = {"n_gates": 8, "max_rows": 2000, "tol": 0.1, "time_limit": 5, "verbose": 0}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"student": "gated", "n_neurons": 16, "alpha": 1e-3},
    "convolutional": {"student": "gated", "n_neurons": 16, "alpha": 1e-3},
    "low rank": {"penalty": "nuclear", "n_neurons": 8, "n_gates": 4, "alpha": 1e-2},
    "polished": {
        "student": "gated",
        "n_neurons": 32,
        "polish": "group_elastic_net",
        "max_neurons": 12,
        "alpha": 1e-3,
    },
    "span": {"student": "linear", "n_neurons": 16},
}
BLOCKS = {
    "resnet18": {"dense": "fc", "span": "layer3:layer4"},
    "resnet20": {"dense": "linear", "span": "layer3.1:layer3.2"},
}
BLOCK = {"resnet18": "layer4", "resnet20": "layer3.2"}


@pytest.fixture(scope="module", params=sorted(BLOCKS))
def network(request) -> tuple[str, nn.Module, np.ndarray]:
    from datasets import load_cifar10, normalise
    from teachers import load_teacher

    teacher = load_teacher(request.param)
    photos, _ = load_cifar10("train", 300)
    return request.param, teacher.model, normalise(photos, teacher.mean, teacher.std)


def distilled(network: tuple[str, nn.Module, np.ndarray], kind: str) -> cvxdistill.Distillation:
    name, model, images = network
    block = BLOCKS[name].get(kind, BLOCK[name])
    return cvxdistill.distill(model, block, images, **{**FEW, **KINDS[kind]})


def differences(path: Path, model: nn.Module, images: np.ndarray) -> np.ndarray:
    """Of each example, the largest; at batch 1 and 64, from the same file."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found, wanted = [], []
    for part in (*np.split(images[:8], 8), *np.split(images[-128:], 2)):
        found.append(session.run(None, {"input": part})[0])
        with torch.no_grad():
            wanted.append(model(torch.from_numpy(part)).numpy())
        assert found[-1].shape == wanted[-1].shape == (len(part), 10)
    return np.abs(np.concatenate(found) - np.concatenate(wanted)).max(axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_gives_what_torch_gives(network, kind, tmp_path):
    result = distilled(network, kind)
    assert isinstance(result.student.layout, DenseLayout) == (kind == "dense")
    if kind in ("dense", "convolutional", "polished"):
        assert result.student.gate is not None
    assert result.report.polished if kind == "polished" else not result.report.polished
    assert ":" in str(result.span) if kind == "span" else ":" not in str(result.span)
    assert result.export_onnx(tmp_path / "model.onnx") <= 1e-4
    off = differences(tmp_path / "model.onnx", result.model, network[2])
    assert off.max() <= 1e-4
    # It is the student's network, not the original.
    assert differences(tmp_path / "model.onnx", network[1], network[2]).max() > 1e-2


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_quantised_student_gives_what_torch_gives(network, dtype, tmp_path):
    result = distilled(network, "convolutional")
    path = tmp_path / f"{dtype}.onnx"
    result.export_onnx(tmp_path / "float32.onnx")
    quantised = result.quantize(dtype)
    quantised.export_onnx(path)
    images = network[2]
    off = differences(path, quantised.model, images)
    with torch.no_grad():
        scale = float(result.model(torch.from_numpy(images[:64])).abs().max())
    if dtype == "int8":
        # What lies between two integers may be rounded to either; that is rare.
        assert np.median(off) <= 1e-4 and (off > 1e-4).mean() <= 0.2
    else:
        # A gate whose sum is 0 but for the last bit of half may be on or off; that is rarer.
        assert np.median(off) <= 1e-3 * scale and (off > 5e-3 * scale).mean() <= 0.05
    assert off.max() <= 0.05 * scale
    # The file shrinks by what the student does, but for some tens of bytes for each node.
    saved = (tmp_path / "float32.onnx").stat().st_size - path.stat().st_size
    expected = result.student.bytes_stored - quantised.student.bytes_stored
    assert abs(saved - expected) <= 30_000
