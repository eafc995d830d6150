"""A compressed network comes back from its file as it was saved."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from cvxdistill.adapters import (
    build_linear_student,
    find_span,
    infer_layout,
    load_compressed,
    save_compressed,
    save_student,
    swap_block,
)
from cvxdistill.adapters.student import GatedStudent


class Net(nn.Module):
    """Two convolutions with batch norm, pooled, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        z = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(self.conv2(z).mean(dim=(2, 3)))


@pytest.fixture
def compressed():
    torch.manual_seed(0)
    net = Net().eval()
    x = torch.randn(5, 3, 6, 6)
    rng = np.random.default_rng(0)
    spans = [find_span(net, name, x) for name in ("conv1:bn1", "conv2")]
    model = net
    shapes = zip(spans, (3, 8), (8, 6), ((2, 5), (4, None)), (None, [4, 0, 5]), strict=True)
    for span, channels, c, (r1, r2), written in shapes:
        layout = infer_layout((channels, 6, 6), (c, 6, 6))
        s = c if written is None else len(written)
        student = build_linear_student(
            layout,
            rng.standard_normal((channels, r1)),
            rng.standard_normal((r1 * 9, r2 or s)),
            None if r2 is None else rng.standard_normal((r2, s)),
            rng.standard_normal(s),
            written=None if written is None else np.array(written),
        )
        model = swap_block(model, span, student)
    return net, model, spans, x


def test_what_was_saved_comes_back(compressed, tmp_path):
    net, model, spans, x = compressed
    file = tmp_path / "small.safetensors"
    save_compressed(model, spans, file)
    other = Net().eval()
    before = copy.deepcopy(other.state_dict())
    loaded = load_compressed(other, file)
    torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    # Neither the original nor the model that it was loaded into is touched.
    assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())
    assert not torch.allclose(net(x), model(x))


def test_a_file_of_another_architecture_is_refused(compressed, tmp_path):
    _, model, spans, _ = compressed
    file = tmp_path / "small.safetensors"
    save_compressed(model, spans, file)
    with pytest.raises(ValueError, match="of another architecture"):
        load_compressed(nn.Sequential(nn.Linear(2, 2)), file)
    other = Net()
    other.fc = nn.Linear(6, 5)
    with pytest.raises(ValueError, match="of another architecture"):
        load_compressed(other, file)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_compressed(Net(), tmp_path / "nothing")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_compressed(Net(), tmp_path / "text")
    layout = infer_layout((4,), (2,))
    save_student(GatedStudent(layout, n_units=0, n_gates=0), tmp_path / "student")
    with pytest.raises(ValueError, match="no compressed model"):
        load_compressed(Net(), tmp_path / "student")
    with pytest.raises(TypeError, match="model must be"):
        load_compressed("net", tmp_path / "student")


def test_an_interrupted_save_leaves_the_file_that_was_there(compressed, tmp_path, monkeypatch):
    _, model, spans, _ = compressed
    file = tmp_path / "small.safetensors"
    file.write_text("before")

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("cvxdistill.adapters.storage.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_compressed(model, spans, file)
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        save_compressed(model, spans, tmp_path / "nowhere" / "file")
