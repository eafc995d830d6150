"""The parts of the benchmark of polishing that could silently measure something else."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(("network", "block"), [("resnet20", "layer2"), ("resnet18", "layer4")])
def test_the_rest_of_a_network_gives_its_outputs_from_the_blocks_inputs(network, block):
    import polishing
    import teachers

    from cvxdistill.adapters import capture

    torch.manual_seed(0)
    model = getattr(teachers, network)().eval()
    images = torch.randn(5, 3, 32, 32)
    with torch.no_grad(), capture(model, block, images, verbose=0) as captured:
        rest = polishing.from_here(model, block)
        expected, got = model(images), rest(torch.from_numpy(np.array(captured.inputs)))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_truncation_keeps_the_units_that_contribute_most():
    import polishing

    from cvxdistill.adapters import DenseLayout, build_student, student_neurons

    rng = np.random.default_rng(0)
    W1, gates = rng.standard_normal((6, 8)), rng.standard_normal((6, 8))
    W2 = rng.standard_normal((8, 3)) * np.where(np.arange(8) % 2, 5.0, 0.1)[:, None]
    student = build_student(DenseLayout((5,), (3,)), W1, W2, np.arange(8), gates, np.zeros(3))
    X = np.hstack([rng.standard_normal((200, 5)), np.ones((200, 1))])
    left = polishing.truncated(student, 4, X, rng.standard_normal((200, 3)))
    np.testing.assert_allclose(student_neurons(left).neurons.W1, W1[:, 1::2], rtol=1e-6)
