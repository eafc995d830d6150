"""The parts of the benchmark of quantisation that could silently measure something else."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402


def student():
    from cvxdistill.adapters import build_student, infer_layout

    layout = infer_layout((64, 8, 8), (64, 8, 8))
    rng = np.random.default_rng(0)
    d = layout.n_features
    return build_student(
        layout,
        rng.standard_normal((d, 6)),
        rng.standard_normal((6, 64)),
        np.arange(6),
        rng.standard_normal((d, 6)),
        np.zeros(64),
    ).eval()


def test_students_are_measured_in_the_precision_that_is_said():
    import quantization
    import teachers

    torch.manual_seed(0)
    model = teachers.resnet20().eval()
    rest, stage = quantization.stage_of(model, "layer3.2")
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        seen = model.layer2(model.layer1(torch.relu(model.bn1(model.conv1(images)))))
        torch.testing.assert_close(rest(seen), model(images), rtol=1e-4, atol=1e-5)
    assert stage == "layer3"
    found = quantization.variants(student())
    assert list(found) == ["float32", "float16", "int8", "int8, gates too"]
    for variant in found.values():
        placed = quantization.in_place_of(rest, "layer3.2", variant).get_submodule("layer3.2")
        assert placed is variant
    assert isinstance(rest.get_submodule("layer3.2"), nn.Module)
    sizes = [variant.bytes_stored for variant in found.values()]
    assert sizes[0] == 2 * sizes[1] > sizes[2] > sizes[3]


def test_flipped_gates_are_counted():
    import copy

    import quantization

    given = student()
    other = copy.deepcopy(given)
    x = torch.randn(5, 64, 8, 8)
    assert quantization.flipped_gates(given, given, x) == 0
    with torch.no_grad():
        other.gate.weight[:2] *= -1
        other.gate.bias[:2] *= -1
    assert quantization.flipped_gates(other, given, x) == pytest.approx(2 / 6)
