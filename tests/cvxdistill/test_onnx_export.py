"""Models with students as ONNX files: run by onnxruntime, they give what torch gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from torch import nn  # noqa: E402

import cvxdistill  # noqa: E402
from cvxdistill.adapters import LinearStudent, export_onnx, onnx_export  # noqa: E402


class Net(nn.Module):
    """Two convolutional stages and a dense one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.stage = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1)
        )
        self.down = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 4))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(4, 5))

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.down(x + self.stage(x)))


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def run(path: Path, feed: dict[str, Any]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def check(path: Path, model: nn.Module) -> None:
    for count in (1, 7, 64):
        data = images(count, seed=count)
        with torch.no_grad():
            wanted = model(data).numpy()
        (found,) = run(path, {"input": data.numpy()})
        np.testing.assert_allclose(found, wanted, atol=1e-4)


STUDENTS = {
    "convolutional": ("stage", {"student": "gated", "n_gates": 8}),
    "linear": ("stage", {"student": "linear"}),
    "dense": ("down", {"student": "gated", "n_gates": 8}),
    "polished": ("stage", {"student": "gated", "polish": "group_elastic_net", "max_neurons": 6}),
    "low rank": ("down", {"penalty": "nuclear", "n_gates": 4}),
    "span": ("stem:stage", {"student": "linear"}),
}


@pytest.mark.parametrize("kind", STUDENTS)
def test_distilled_models_give_what_torch_gives(net, tmp_path, kind):
    block, options = STUDENTS[kind]
    if kind == "span":
        net, block = nn.Sequential(*net.stem, *net.stage, *net.down, *net.head).eval(), "2:5"
    result = cvxdistill.distill(net, block, images(300), verbose=0, **options)
    path = tmp_path / "model.onnx"
    assert result.export_onnx(path) <= 1e-4
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    check(path, result.model)


@pytest.fixture(scope="module")
def compressed(net) -> cvxdistill.Compression:
    return cvxdistill.compress(net, images(300), max_parameters=1500, verbose=0)


def test_compressed_models_give_what_torch_gives(compressed, tmp_path):
    assert compressed.choices
    compressed.export_onnx(tmp_path / "model.onnx")
    check(tmp_path / "model.onnx", compressed.model)


def test_batches_that_are_dictionaries(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    model = transformers.BertModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (40, 9), generator=generator)
    mask = (torch.arange(9) < torch.randint(3, 10, (40, 1), generator=generator)).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    block = "encoder.layer.0.intermediate:encoder.layer.0.output.dense"
    result = cvxdistill.distill(model, block, batch, student="linear", verbose=0)
    result.export_onnx(tmp_path / "bert.onnx")
    with torch.no_grad():
        wanted = result.model(**batch).last_hidden_state.numpy()
    found = run(tmp_path / "bert.onnx", {name: value.numpy() for name, value in batch.items()})
    np.testing.assert_allclose(found[0], wanted, atol=1e-4)


def test_a_student_alone(compressed, tmp_path):
    for student in compressed.model.modules():
        if isinstance(student, LinearStudent):
            inputs = torch.randn(5, *student.layout.input_shape)
            export_onnx(student, inputs, tmp_path / "student.onnx")
            (found,) = run(tmp_path / "student.onnx", {"input": inputs.numpy()})
            np.testing.assert_allclose(found, student(inputs).detach().numpy(), atol=1e-4)
            return
    raise AssertionError("no student")


def test_a_file_that_differs_is_not_kept(net, compressed, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="differ from torch's by"):
        export_onnx(net, images(2), path, tolerance=1e-30)
    assert not [*tmp_path.iterdir()]
    path.write_bytes(b"what was there")
    with pytest.raises(ValueError, match="differ from torch's by"):
        compressed.export_onnx(path, tolerance=1e-30)
    assert path.read_bytes() == b"what was there"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    with pytest.raises(FileNotFoundError, match=r"path: the folder .* does not exist"):
        compressed.export_onnx(tmp_path / "nowhere" / "model.onnx")


class Choosy(nn.Module):
    """Looks at its numbers to decide what to do: no graph says that."""

    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_models_that_onnx_cannot_express_are_refused(tmp_path):
    with pytest.raises(ValueError, match="torch cannot express this model in ONNX"):
        export_onnx(Choosy(), torch.ones(2, 3), tmp_path / "model.onnx")
    assert not [*tmp_path.iterdir()]


def test_the_model_stays_in_training_mode(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, torch.randn(2, 4), tmp_path / "model.onnx")
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_is_not_installed_is_named(net, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnx" else name)
    with pytest.raises(ImportError, match=r'export_onnx needs onnx: pip install "cvxdistill\[onnx'):
        export_onnx(net, images(2), tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="tolerance must be positive"):
        monkeypatch.undo()
        export_onnx(net, images(2), tmp_path / "model.onnx", tolerance=0)
