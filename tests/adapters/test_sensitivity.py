"""How a network uses a block's outputs: against its Jacobian, and against running it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from cvxdistill.adapters import change_when_rewritten, find_span, output_metrics


class Pooled(nn.Module):
    """Two convolutions, an average over all positions, and a linear layer."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.Conv2d(6, 8, 3, padding=1)
        self.after = after
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.after(self.body(torch.relu(self.stem(x)))).mean(dim=(2, 3)))


def batches(count=40):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(50, 3, 5, 5, generator=generator) for _ in range(count)]


def metric(net, name, data):
    (found,) = output_metrics(net, [find_span(net, name, data[0])], data, np.random.default_rng(0))
    return found


def test_the_metric_is_the_mean_of_the_squared_jacobian():
    net = Pooled(nn.ReLU()).eval()
    data = batches()
    found = metric(net, "body", data)
    # Of the logits by the outputs of ``body``, by autograd, on the first examples.
    examples = torch.cat(data[:2])
    with torch.no_grad():
        z = net.body(torch.relu(net.stem(examples)))
    jacobian = torch.autograd.functional.jacobian(
        lambda z: net.fc(torch.relu(z).mean(dim=(2, 3))).sum(0), z
    )
    rows = jacobian.movedim(2, -1).reshape(-1, 8).double().numpy()
    total = rows.T @ rows
    got = found.matrix / found.matrix.trace()
    np.testing.assert_allclose(got, total / total.trace(), atol=0.03)
    assert not found.uniform


@pytest.mark.parametrize(
    ("after", "name", "uniform"),
    [
        (nn.Identity(), "body", True),
        (nn.BatchNorm2d(8), "body", True),
        (nn.ReLU(), "after", True),
        (nn.ReLU(), "body", False),
        # Borders count less.
        (nn.AvgPool2d(3, 1, padding=1), "body", False),
        (nn.Identity(), "stem", False),
    ],
)
def test_what_is_averaged_later_is_uniform(after, name, uniform):
    net = Pooled(after).eval()
    assert metric(net, name, batches(2)).uniform == uniform


def test_rewriting_is_measured_and_undone():
    net = Pooled(nn.Identity()).eval()
    data = batches(2)
    with torch.no_grad():
        before = [net(x) for x in data]
    span = find_span(net, "body", data[0])

    def mean(z):
        return z.mean(dim=(2, 3), keepdim=True).expand_as(z)

    assert change_when_rewritten(net, span, mean, data) < 1e-6
    assert change_when_rewritten(net, span, torch.relu, data) > 1e-2
    assert change_when_rewritten(net, span, lambda z: z * np.inf, data) == np.inf
    # All of the outputs gone: what is left is the bias of the head.
    with torch.no_grad():
        wrong = sum(float(((y - net.fc.bias) ** 2).sum()) for y in before)
        whole = sum(float((y**2).sum()) for y in before)
    expected = (wrong / whole) ** 0.5
    assert change_when_rewritten(net, span, torch.zeros_like, data) == pytest.approx(expected, 1e-5)
    with torch.no_grad():
        assert all(torch.equal(net(x), y) for x, y in zip(data, before, strict=True))


def test_a_model_without_gradients_has_no_metric():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4)

        def forward(self, x):
            return torch.round(self.layer(x)).long()

    net = Rounded().eval()
    assert metric(net, "layer", [torch.randn(5, 3)]) is None
