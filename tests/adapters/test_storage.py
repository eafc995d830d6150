from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from cvxdistill.adapters import storage  # noqa: E402
from cvxdistill.adapters.layout import infer_layout  # noqa: E402
from cvxdistill.adapters.storage import (  # noqa: E402
    OnlineState,
    load_online_state,
    load_student,
    save_online_state,
    save_student,
)
from cvxdistill.adapters.student import build_student  # noqa: E402
from cvxdistill.solvers import HiddenStatistics  # noqa: E402

LAYOUTS = {
    "conv": infer_layout((3, 7, 6), (4, 4, 6), kernel_size=(3, 5)),
    "dense": infer_layout((5,), (4,)),
    "tokens": infer_layout((6, 5), (6, 3)),
    "flattened": infer_layout((2, 3, 4), ()),
}
GATES = {"shared": [0, 1, 0], "linear": [2], "both": [0, 1, 2], "constant": [], "full": [2] * 40}


def make(layout, gate, dtype=torch.float32):
    rng = np.random.default_rng(0)
    G = rng.standard_normal((layout.n_features, 3))
    G[:, 2] = 0
    W1 = rng.standard_normal((layout.n_features, len(gate)))
    W2 = rng.standard_normal((len(gate), layout.n_outputs))
    b = rng.standard_normal(layout.n_outputs)
    return build_student(layout, W1, W2, np.array(gate, int), G, b, dtype=dtype)


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_student_comes_back_exactly(layout, gate, tmp_path):
    student = make(layout, gate)
    path = tmp_path / "student.safetensors"
    save_student(student, path)
    loaded = load_student(str(path))
    assert loaded.layout == student.layout and repr(loaded) == repr(student)
    assert not loaded.training
    assert list(loaded.state_dict()) == list(student.state_dict())
    x = torch.randn(3, *layout.input_shape)
    assert torch.equal(loaded(x), student(x))
    assert loaded.trainable == student.trainable
    frozen = [name for name, p in loaded.named_parameters() if not p.requires_grad]
    assert frozen == [name for name, p in student.named_parameters() if not p.requires_grad]
    assert [file.name for file in tmp_path.iterdir()] == ["student.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_its_dtype_comes_back(dtype, tmp_path):
    student = make(LAYOUTS["conv"], GATES["shared"], dtype)
    save_student(student, tmp_path / "s")
    loaded = load_student(tmp_path / "s")
    assert loaded.dtype == dtype
    for name, value in student.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name])


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "student.safetensors"
    save_student(make(LAYOUTS["dense"], [0]), path)
    before = path.read_bytes()

    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half a fi")
        raise OSError("no space left")

    monkeypatch.setattr(storage, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_student(make(LAYOUTS["conv"], [0]), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def write_text(path):
    path.write_text("not a model")


def write_nothing(path):
    path.write_bytes(b"")


def write_other_tensors(path):
    safetensors_torch.save_file({"fc.weight": torch.zeros(2, 2)}, path)


def write_with(change):
    def write(path):
        save_student(make(LAYOUTS["dense"], [0]), path)
        with storage.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        change(metadata, tensors)
        safetensors_torch.save_file(tensors, path, metadata=metadata)

    return write


def another_version(metadata, tensors):
    metadata["format_version"] = "2"


def no_weights(metadata, tensors):
    del tensors["first.weight"]


def other_header(key, value):
    def change(metadata, tensors):
        metadata["student"] = json.dumps(json.loads(metadata["student"]) | {key: value})

    return change


def broken_header(metadata, tensors):
    metadata["student"] = "{"


def pickled(path):
    torch.save(make(LAYOUTS["dense"], [0]).state_dict(), path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_text, "is not a safetensors file"),
        (write_nothing, "is not a safetensors file"),
        (pickled, "is not a safetensors file"),
        (write_other_tensors, "holds no student.*got None"),
        (write_with(another_version), "format version '2'; this release reads version 1"),
        (write_with(no_weights), "is damaged.*first.weight"),
        (write_with(broken_header), "is damaged"),
        (write_with(other_header("n_units", 3)), "is damaged.*size mismatch"),
        (write_with(other_header("layout", {"class": "Other"})), "is damaged"),
        (write_with(other_header("dtype", "nn")), "is damaged"),
    ],
)
def test_other_files_are_refused(write, message, tmp_path):
    path = tmp_path / "student.safetensors"
    write(path)
    with pytest.raises(ValueError, match=r"(?s)student\.safetensors.*" + message):
        load_student(path)


def test_missing_files_and_folders_and_other_modules_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing"):
        load_student(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        save_student(make(LAYOUTS["dense"], [0]), tmp_path / "nowhere" / "s")
    with pytest.raises(TypeError, match="student must be a GatedStudent, got Linear"):
        save_student(torch.nn.Linear(2, 2), tmp_path / "s")


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())
def test_an_online_state_comes_back_exactly_and_so_does_its_student_alone(gate, tmp_path):
    student = make(LAYOUTS["conv"], gate)
    rng = np.random.default_rng(0)
    m, c = len(gate), 4
    statistics = HiddenStatistics.of_rows(rng.random((9, m)), rng.random((9, c)))
    prior = rng.random((m, c)), rng.random(c)
    options = {"ridge": 0.1, "n_examples_seen": 3}
    path = tmp_path / "online.safetensors"
    save_online_state(OnlineState(student, statistics, prior, options), path)
    state = load_online_state(str(path))
    assert state.options == options and not state.student.training
    for name, array in statistics.arrays().items():
        np.testing.assert_array_equal(state.statistics.arrays()[name], array)
    np.testing.assert_array_equal(state.prior[0], prior[0])
    np.testing.assert_array_equal(state.prior[1], prior[1])
    for loaded in (state.student, load_student(path)):
        assert loaded.layout == student.layout and repr(loaded) == repr(student)
        for name, value in student.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[name])
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_students_and_of_online_states_are_told_apart(tmp_path):
    path = tmp_path / "student.safetensors"
    save_student(make(LAYOUTS["dense"], [0]), path)
    with pytest.raises(ValueError, match=r"cvxdistill-online-student.*load_student reads it"):
        load_online_state(path)
    write_other_tensors(path)
    for load in (load_student, load_online_state):
        with pytest.raises(ValueError, match=r"student.*got None\.$"):
            load(path)
