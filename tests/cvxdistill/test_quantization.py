"""``quantize`` of a distillation and of a compression: what changes, what stays, what is said."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import cvxdistill  # noqa: E402
from cvxdistill.adapters import LinearStudent, stored_dtype  # noqa: E402
from cvxdistill.model_size import ModelSize  # noqa: E402


class Net(nn.Module):
    """Two convolutional stages and a dense one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.stage = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 1)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x):
        return self.head(self.stage(self.stem(x)))


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def distilled() -> cvxdistill.Distillation:
    return cvxdistill.distill(
        Net().eval(), "stage", images(300), student="gated", n_gates=8, n_neurons=16, verbose=0
    )


@pytest.fixture(scope="module")
def compressed() -> cvxdistill.Compression:
    result = cvxdistill.compress(Net().eval(), images(300), max_parameters=800, verbose=0)
    assert result.choices
    return result


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def check_unchanged(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert list(module.state_dict()) == list(before)
    for name, tensor in module.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_distillation_is_quantised_in_a_copy(distilled, dtype, tmp_path):
    before = state(distilled.model)
    result = distilled.quantize(dtype)
    check_unchanged(distilled.model, before)
    assert distilled.model.stage is distilled.student and not distilled.report.quantized
    assert result.model.stage is result.student and result.student is not distilled.student
    assert stored_dtype(result.student) == dtype
    # The rest of the model is the same, in copies.
    for name, tensor in result.model.state_dict().items():
        if not name.startswith("stage."):
            assert torch.equal(tensor, before[name])
            assert tensor.data_ptr() != distilled.model.state_dict()[name].data_ptr()
    x = images(50, seed=1)
    with torch.no_grad():
        wanted, found = distilled.model(x), result.model(x)
    assert 0 < (found - wanted).norm() <= 0.03 * wanted.norm()
    for text in (str(result.report), repr(result.report)):
        assert f"{dtype}: {distilled.student.bytes_stored:,} -> " in text
        assert f"{result.student.bytes_stored:,} bytes" in text
    assert f"bytes={result.student.bytes_stored}" in repr(result)
    result.save(tmp_path / "student")
    check_unchanged(cvxdistill.load_student(tmp_path / "student"), state(result.student))


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_compression_is_quantised_in_a_copy(compressed, dtype, tmp_path):
    before = state(compressed.model)
    result = compressed.quantize(dtype)
    check_unchanged(compressed.model, before)
    students = [m for m in result.model.modules() if isinstance(m, LinearStudent)]
    assert len(students) == len(result.choices)
    assert {stored_dtype(student) for student in students} == {dtype}
    x = images(50, seed=1)
    with torch.no_grad():
        wanted, found = compressed.model(x), result.model(x)
    assert 0 < (found - wanted).norm() <= 0.03 * wanted.norm()
    old, new = (
        sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
        for model in (compressed.model, result.model)
    )
    assert new < old and ModelSize(bytes=True).model(result.model) == new
    for text in (str(result), repr(result)):
        assert f"{dtype}: {old:,} -> {new:,} bytes" in text
        assert "quantised" not in str(compressed)
    assert result.after == ModelSize(bytes=False).model(result.model)
    result.save(tmp_path / "model")
    loaded = cvxdistill.load_compressed(Net().eval(), tmp_path / "model")
    check_unchanged(loaded, state(result.model))
    np.testing.assert_array_equal(loaded(x).detach(), result.model(x).detach())


def test_the_frontier_does_not_say_that_a_quantised_model_was_measured(compressed):
    pytest.importorskip("matplotlib")
    for result, said in ((compressed, False), (compressed.quantize("int8"), True)):
        labels = [text.get_text() for text in result.plot_frontier().get_legend().get_texts()]
        assert any("before it was quantised" in label for label in labels) == said


def test_other_dtypes_and_a_second_time_are_refused(distilled, compressed):
    for result in (distilled, compressed):
        with pytest.raises(ValueError, match=r"dtype must be one of .* got 'int4'"):
            result.quantize("int4")
        with pytest.raises(ValueError, match="in int8 already"):
            result.quantize("int8").quantize("int8")


def test_what_would_change_weights_in_int8_is_refused(distilled):
    student = distilled.quantize("int8").student
    features = student.layout.n_features
    X, Y = np.ones((4, features - 1), np.float32), np.ones((4, student.layout.n_outputs))
    with pytest.raises(TypeError, match="is in int8"):
        cvxdistill.OnlineStudent(student)
    with pytest.raises(TypeError, match="is in int8"):
        cvxdistill.polish(student, X, Y, verbose=0)
