from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

from cvxdistill import OnlineStudent, load_online, load_student, online, swap_block  # noqa: E402
from cvxdistill.adapters import build_student, infer_layout, save_student, storage  # noqa: E402
from cvxdistill.solvers import (  # noqa: E402
    GatedOperator,
    Neurons,
    evaluate_gates,
    refit_second_layer,
)

LAYOUTS = {
    "conv": infer_layout((2, 7, 6), (5, 4, 6), kernel_size=(3, 5)),
    "dense": infer_layout((6,), (5,)),
    "tokens": infer_layout((3, 5), (3, 5)),
    "flattened": infer_layout((2, 3, 1), ()),
}
# Gate 2 is always on: one unit is a linear path of rank 1, many are one matrix.
GATES = {
    "gated": [0, 1],
    "shared": [0, 1, 0, 1],
    "low rank": [0, 1, 2],
    "linear": [2],
    "full": [0, 1, 0] + [2] * 40,
    "matrix": [2] * 40,
    "constant": [],
}
ANY_LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
ANY_GATES = pytest.mark.parametrize("gate", GATES.values(), ids=GATES.keys())


class Network:
    """A student, and the NumPy arrays that it was built from."""

    def __init__(self, layout, gate, dtype=torch.float64, seed=0):
        rng = np.random.default_rng(seed)
        d = layout.n_features
        self.layout, self.gate = layout, np.array(gate, int)
        self.G = rng.standard_normal((d, 3))
        self.G[:, 2] = 0
        self.W1 = rng.standard_normal((d, len(gate)))
        W2 = rng.standard_normal((len(gate), layout.n_outputs))
        b = rng.standard_normal(layout.n_outputs)
        self.student = build_student(layout, self.W1, W2, self.gate, self.G, b, dtype=dtype).eval()

    def features(self, inputs):
        """H from the rows of the layout, and the weights W2 and b that the student now has."""
        X = np.asarray(self.layout.rows(inputs)[0 : len(inputs) * self.layout.n_positions])
        D = evaluate_gates(X, self.G)
        units = self.gate != 2
        H = (X @ self.W1[:, units]) * D[:, self.gate[units]]
        if self.student.linear_rank == 0:
            return np.hstack([H, X[:, :-1]])
        if self.student.linear_rank:
            return np.hstack([H, X[:, :-1] @ self.W1[:-1, ~units]])
        return H

    def predict(self, inputs):
        with torch.no_grad():
            return self.student(torch.tensor(inputs, dtype=self.student.dtype)).double().numpy()


def block(layout, n, seed=1, size=1.0, dtype=float):
    """Inputs and outputs of something that is no student: the block that is distilled."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((n, *layout.input_shape)) * size
    X = np.asarray(layout.rows(inputs)[0 : n * layout.n_positions])
    T = np.random.default_rng(99).standard_normal((layout.n_features, layout.n_outputs))
    Y = np.tanh(X @ T) + 3
    if len(layout.output_shape) == 3:
        _, height, width = layout.output_shape
        Y = Y.reshape(n, height, width, -1).transpose(0, 3, 1, 2)
    return inputs.astype(dtype), np.ascontiguousarray(Y.reshape(n, *layout.output_shape), dtype)


def count(layout):
    """Enough examples for least squares."""
    return 70 if layout.n_positions == 1 else 40


def fit(student, batches, **options):
    refined = OnlineStudent(student, **options)
    for inputs, outputs in batches:
        assert refined.partial_fit(inputs, outputs) is refined
    return refined


def batches_of(data, count=10):
    return list(zip(*(np.array_split(array, count) for array in data), strict=True))


def predict(student, inputs):
    with torch.no_grad():
        return student(torch.tensor(inputs, dtype=student.dtype)).double().numpy()


def assert_close(Z, expected, rtol):
    assert np.linalg.norm(Z - expected) <= rtol * np.linalg.norm(expected)


def error(student, data):
    return np.linalg.norm(predict(student, data[0]) - data[1]) / np.linalg.norm(data[1])


def snapshot(refined):
    state = {name: tensor.clone() for name, tensor in refined.student.state_dict().items()}
    arrays = {name: array.copy() for name, array in refined.statistics.arrays().items()}
    return state, arrays, refined.n_examples_seen


def assert_same(refined, other):
    (state, arrays, seen), (state_2, arrays_2, seen_2) = (
        side if isinstance(side, tuple) else snapshot(side) for side in (refined, other)
    )
    assert seen == seen_2 and list(state) == list(state_2)
    assert all(torch.equal(state[name], state_2[name]) for name in state)
    assert all(np.array_equal(arrays[name], arrays_2[name]) for name in arrays)


@ANY_GATES
@ANY_LAYOUT
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ten_batches_are_one_fit_to_their_union(layout, gate, dtype):
    network = Network(layout, gate, getattr(torch, dtype))
    data, (new, _) = block(layout, count(layout), dtype=dtype), block(layout, 20, seed=2)
    ten = fit(network.student, batches_of(data))
    one = fit(network.student, [data])
    assert_close(predict(ten.student, new), predict(one.student, new), 1e-6)
    assert ten.n_examples_seen == len(data[0]) and ten.error == pytest.approx(one.error, rel=1e-6)
    assert ten.n_rows == one.n_rows == len(data[0]) * layout.n_positions


@ANY_GATES
@ANY_LAYOUT
@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.1])
def test_ten_batches_are_scikit_learn_on_their_union(layout, gate, ridge):
    network = Network(layout, gate)
    data, (new, _) = block(layout, count(layout)), block(layout, 20, seed=2)
    refined = fit(network.student, batches_of(data), ridge=ridge, prior_rows=0)

    def flat(outputs):
        return layout.targets(outputs.reshape(len(outputs), *layout.output_shape))

    H, H_new = network.features(data[0]), network.features(new)
    left, Z = flat(data[1]) - flat(network.predict(data[0])), flat(network.predict(new))
    if H.shape[1] == 0:
        expected = Z + left.mean(axis=0)
    elif ridge == 0:
        ones = np.ones((len(H), 1))
        theta = np.linalg.lstsq(np.hstack([H, ones]), left, rcond=None)[0]
        expected = Z + H_new @ theta[:-1] + theta[-1]
    else:
        model = Ridge(alpha=ridge * H.var(axis=0).mean() * len(H), solver="svd").fit(H, left)
        expected = Z + model.predict(H_new).reshape(Z.shape)
    assert_close(flat(predict(refined.student, new)), expected, 1e-6)


@ANY_LAYOUT
def test_a_student_without_a_second_layer_gets_the_one_of_a_batch_refit(layout):
    network = Network(layout, GATES["shared"])
    with torch.no_grad():
        network.student.second.weight.zero_()
        network.student.second.bias.zero_()
    data, (new, _) = block(layout, count(layout)), block(layout, 20, seed=2)
    refined = fit(network.student, batches_of(data), ridge=1e-4, prior_rows=0)
    X = np.asarray(layout.rows(data[0])[0 : len(data[0]) * layout.n_positions])
    units = Neurons(network.W1, np.zeros((4, layout.n_outputs)), network.gate)
    operator = GatedOperator(X, evaluate_gates(X, network.G))
    units, b = refit_second_layer(operator, units, layout.targets(data[1]), ridge=1e-4)
    expected = build_student(
        layout, units.W1, units.W2, units.gate, network.G, b, dtype=torch.float64
    )
    assert_close(predict(refined.student, new), predict(expected, new), 1e-9)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["dense", "conv"]),
    st.lists(st.integers(1, 39), max_size=9, unique=True),
    st.permutations(range(40)),
)
def test_neither_the_number_nor_the_order_of_batches_matters(name, ends, order):
    layout = LAYOUTS[name]
    network = Network(layout, GATES["low rank"])
    inputs, outputs = block(layout, 40)
    whole = fit(network.student, [(inputs, outputs)])
    parts = [np.split(array[order], sorted(ends)) for array in (inputs, outputs)]
    split = fit(network.student, zip(*parts, strict=True))
    assert_close(predict(split.student, inputs), predict(whole.student, inputs), 1e-9)


@ANY_LAYOUT
def test_blocks_of_a_large_batch_change_nothing(layout, monkeypatch):
    network = Network(layout, GATES["full"])
    data = block(layout, count(layout))
    whole = fit(network.student, [data])
    monkeypatch.setattr(online, "BLOCK_SIZE", 1)
    blocks = fit(network.student, [data])
    assert_close(predict(blocks.student, data[0]), predict(whole.student, data[0]), 1e-9)


@ANY_GATES
@ANY_LAYOUT
def test_saved_and_loaded_it_continues_as_without_interruption(layout, gate, tmp_path):
    network = Network(layout, gate, torch.float32)
    batches = batches_of(block(layout, count(layout)))
    options = {"ridge": 1e-3, "prior_rows": 7.5}
    uninterrupted = fit(network.student, batches[:4], **options).forget(0.5)
    for batch in batches[4:]:
        uninterrupted.partial_fit(*batch)
    path = tmp_path / "online.safetensors"
    begun = fit(network.student, batches[:4], **options).forget(0.5)
    begun.save(path)
    continued = load_online(str(path))
    assert_same(continued, begun)
    assert repr(continued) == repr(begun) and not continued.student.training
    for batch in batches[4:]:
        continued.partial_fit(*batch)
    assert_same(continued, uninterrupted)
    assert (continued.ridge, continued.prior_rows) == (1e-3, 3.75)
    assert [file.name for file in tmp_path.iterdir()] == ["online.safetensors"]


def test_it_can_be_saved_before_the_first_batch(tmp_path):
    network = Network(LAYOUTS["dense"], GATES["full"])
    fresh = OnlineStudent(network.student)
    assert np.isnan(fresh.error) and "n_examples_seen=0" in repr(fresh)
    fresh.save(tmp_path / "s")
    data = block(LAYOUTS["dense"], 30)
    assert_same(load_online(tmp_path / "s").partial_fit(*data), fresh.partial_fit(*data))


def test_the_student_alone_can_be_read_from_its_file(tmp_path):
    layout = LAYOUTS["conv"]
    refined = fit(Network(layout, GATES["full"]).student, [block(layout, 30)])
    refined.save(tmp_path / "s")
    student = load_student(tmp_path / "s")
    state = refined.student.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in student.state_dict().items())
    assert student.layout == layout and not student.training


def test_statistics_of_several_devices_add_up():
    layout = LAYOUTS["tokens"]
    network = Network(layout, GATES["low rank"])
    data = block(layout, 40)
    batches = batches_of(data, 4)
    devices = [fit(network.student, [batch]) for batch in batches]
    statistics = sum((d.statistics for d in devices[1:]), devices[0].statistics)
    merged = OnlineStudent(network.student, statistics=statistics)
    whole = fit(network.student, [data])
    assert merged.n_examples_seen == 40
    assert_close(predict(merged.student, data[0]), predict(whole.student, data[0]), 1e-9)
    batch = block(layout, 8, seed=5)
    assert_close(
        predict(merged.partial_fit(*batch).student, data[0]),
        predict(whole.partial_fit(*batch).student, data[0]),
        1e-9,
    )


def deployed(layout, gate=(0, 1, 0, 1, 2)):
    """A student that was fitted to many examples before it was deployed."""
    network = Network(layout, list(gate))
    network.student = fit(network.student, [block(layout, 3000)], prior_rows=0).student
    return network.student


def drifted(n, seed):
    """The dense block after its outputs have changed."""
    inputs, outputs = block(LAYOUTS["dense"], n, seed)
    return inputs, outputs + np.abs(inputs[:, :1]) + inputs[:, 1:2] - 0.5


def test_after_a_drift_the_error_on_new_data_goes_down_batch_by_batch():
    student, test = deployed(LAYOUTS["dense"]), drifted(2000, 3)
    refined = OnlineStudent(student)
    errors = [error(refined.student, test)]
    for seed in range(10, 14):
        errors.append(error(refined.partial_fit(*drifted(50, seed)).student, test))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]
    best = error(fit(student, [test], prior_rows=0).student, test)
    assert errors[-1] < 1.03 * best


def test_what_is_forgotten_no_longer_holds_a_drift_back():
    layout = LAYOUTS["dense"]
    old, test = block(layout, 1000), drifted(2000, 3)
    slow, quick = (fit(Network(layout, [0, 1, 0, 1, 2]).student, [old]) for _ in range(2))
    for seed in range(10, 14):
        slow.partial_fit(*drifted(50, seed))
        quick.forget(0.3).partial_fit(*drifted(50, seed))
    assert error(quick.student, test) < 0.9 * error(slow.student, test)
    assert quick.n_examples_seen == slow.n_examples_seen == 1200
    assert slow.n_rows == 1200
    assert quick.n_rows == pytest.approx(1000 * 0.3**4 + 50 * (1 + 0.3 + 0.09 + 0.027))


@pytest.mark.parametrize("n", [1, 3, 6, 10, 50])
def test_a_first_small_batch_refines_rather_than_destroys(n):
    layout = LAYOUTS["dense"]
    student, test = deployed(layout), block(layout, 2000, seed=3)
    before = error(student, test)
    after = [error(fit(student, [block(layout, n, s)]).student, test) for s in range(20, 40)]
    assert max(after) < 1.25 * before and np.mean(after) < 1.05 * before
    if n == 6:
        bare = [
            error(fit(student, [block(layout, n, s)], prior_rows=0).student, test)
            for s in range(20, 40)
        ]
        assert np.mean(bare) > 1.5 * before, "the prior is worth nothing"


def model_with(student):
    return torch.nn.Sequential(torch.nn.Identity(), student)


def test_in_place_a_student_is_refined_inside_its_model():
    layout = LAYOUTS["conv"]
    shell = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Conv2d(2, 5, 1)).double()
    model = swap_block(shell, "1", Network(layout, GATES["full"]).student, inplace=True)
    student = model[1]
    parameters = dict(student.named_parameters())
    data = block(layout, 40)
    x = torch.tensor(data[0])
    refined = OnlineStudent(student, prior_rows=0, inplace=True).partial_fit(*data)
    assert refined.student is student is model[1]
    assert all(parameters[name] is p for name, p in student.named_parameters())
    assert_close(model(x).detach().numpy(), data[1], refined.error * (1 + 1e-6))
    assert refined.error < 0.3


def test_by_default_the_given_student_stays_and_so_do_gates_and_first_layers():
    network = Network(LAYOUTS["dense"], GATES["low rank"])
    network.student.train()
    before = {name: tensor.clone() for name, tensor in network.student.state_dict().items()}
    refined = fit(network.student, [block(LAYOUTS["dense"], 40)])
    after = refined.student.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"second.weight", "second.bias", "linear.1.weight"}
    given = network.student.state_dict()
    assert all(torch.equal(before[name], given[name]) for name in before)
    assert refined.student.training
    frozen = [name for name, p in refined.student.named_parameters() if not p.requires_grad]
    assert frozen == ["gate.weight", "gate.bias"]


@ANY_GATES
@ANY_LAYOUT
def test_the_error_is_that_on_all_rows_so_far(layout, gate):
    data = block(layout, count(layout))
    refined = fit(Network(layout, gate).student, batches_of(data, 3))
    assert refined.error == pytest.approx(error(refined.student, data), rel=1e-6)


def test_a_gate_is_on_at_zero_as_in_the_student():
    student = Network(LAYOUTS["dense"], GATES["shared"]).student
    with torch.no_grad():
        student.gate.bias.zero_()
    inputs, outputs = block(LAYOUTS["dense"], 40)
    inputs[::2] = 0
    refined = fit(student, [(inputs, outputs)])
    assert refined.error == pytest.approx(error(refined.student, (inputs, outputs)), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["conv", "dense"])
def test_students_of_half_precision_keep_it(name, dtype):
    layout = LAYOUTS[name]
    student = Network(layout, GATES["full"], dtype).student
    data = block(layout, 60)
    refined = fit(student, batches_of([torch.tensor(a).to(dtype) for a in data], 3))
    assert refined.student.dtype == dtype
    assert refined.error < 0.5 * error(student, data)


def test_batches_may_be_arrays_or_tensors_of_any_real_type():
    layout = LAYOUTS["dense"]
    network = Network(layout, GATES["low rank"])
    inputs, outputs = (np.round(4 * array) for array in block(layout, 30))
    expected = fit(network.student, [(inputs, outputs)])
    inputs.setflags(write=False)
    variants = [
        (inputs.tolist(), outputs.tolist()),
        (inputs[::-1][::-1], np.asfortranarray(outputs)),
        (inputs.astype(np.float16), outputs.astype(">f4")),
        (inputs.astype(np.int8), outputs.astype(np.int64)),
        (torch.tensor(inputs).requires_grad_(), torch.tensor(outputs).to(torch.bfloat16)),
        (torch.tensor(inputs).to(torch.int32), torch.tensor(outputs).half()),
    ]
    for variant in variants:
        refined = fit(network.student, [variant])
        for name, array in expected.statistics.arrays().items():
            np.testing.assert_allclose(refined.statistics.arrays()[name], array, atol=1e-9)


def with_value(array, value):
    array = array.copy()
    array[-1, -1] = value
    return array


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda x, y: (with_value(x, np.nan), y), ValueError, "inputs contain NaN or infinity"),
        (lambda x, y: (x, with_value(y, np.inf)), ValueError, "outputs contain NaN or infinity"),
        (lambda x, y: (x[:, 1:], y), ValueError, r"inputs must have shape \(N, 6\).*\(30, 5\)"),
        (lambda x, y: (x[0], y[0]), ValueError, r"inputs must have shape \(N, 6\).*\(6,\)"),
        (lambda x, y: (x, y[:, 0]), ValueError, r"outputs must have shape \(N, 5\).*\(30,\)"),
        (lambda x, y: (x, y[1:]), ValueError, "as many, got 30 and 29"),
        (lambda x, y: (x[:0], y[:0]), ValueError, "inputs must hold at least one example"),
        (lambda x, y: (x, 3.0), ValueError, r"outputs must have shape .*got \(\)"),
        (lambda x, y: (x + 1j, y), TypeError, "inputs must hold real numbers, got dtype complex"),
        (lambda x, y: (x.astype(str), y), TypeError, "inputs must hold real numbers"),
        (lambda x, y: (torch.tensor(x + 1j), y), TypeError, "inputs must hold real numbers"),
        (lambda x, y: (with_value(x, 1e200), y), ValueError, "its hidden features overflow"),
        (lambda x, y: (x, with_value(y, 1e200)), ValueError, "sums of their squares overflow"),
        (lambda x, y: (x, with_value(y, 1e100)), ValueError, "too large for torch.float32"),
    ],
)
def test_bad_batches_are_refused_and_change_nothing(change, kind, message, monkeypatch):
    layout = LAYOUTS["dense"]
    refined = fit(Network(layout, GATES["full"], torch.float32).student, [block(layout, 40)])
    before = snapshot(refined)
    monkeypatch.setattr(online, "BLOCK_SIZE", 5 * 14)
    with pytest.raises(kind, match=message):
        refined.partial_fit(*change(*block(layout, 30, seed=4)))
    assert_same(refined, before)
    with pytest.raises(ValueError, match="factor must lie"):
        refined.forget(0)
    assert_same(refined, before)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"ridge": -1.0}, ValueError, "ridge must be finite and at least 0, got -1.0"),
        ({"ridge": float("nan")}, ValueError, "ridge must be finite"),
        ({"ridge": "small"}, TypeError, "ridge must be a number, got 'small'"),
        ({"prior_rows": float("inf")}, ValueError, "prior_rows must be finite"),
        ({"prior_rows": True}, TypeError, "prior_rows must be a number"),
        ({"statistics": {}}, TypeError, "statistics must be HiddenStatistics, got dict"),
    ],
)
def test_bad_options_are_refused(options, kind, message):
    with pytest.raises(kind, match=message):
        OnlineStudent(Network(LAYOUTS["dense"], [0]).student, **options)


def test_other_modules_and_other_statistics_are_refused():
    with pytest.raises(TypeError, match="student must be a GatedStudent, got Linear"):
        OnlineStudent(torch.nn.Linear(2, 2))
    layout = LAYOUTS["dense"]
    other = fit(Network(layout, [0, 1, 0]).student, [block(layout, 30)]).statistics
    student = Network(layout, [0]).student
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with pytest.raises(ValueError, match=r"\(m, c\) = \(1, 5\), got \(3, 5\)"):
        OnlineStudent(student, statistics=other, inplace=True)
    assert all(torch.equal(before[name], t) for name, t in student.state_dict().items())
    with torch.no_grad():
        student.second.weight[0] = torch.nan
    with pytest.raises(ValueError, match="its second layer contains NaN"):
        OnlineStudent(student)


def changed_options(**changes):
    def change(metadata, tensors):
        metadata["options"] = json.dumps(json.loads(metadata["options"]) | changes)

    return change


def remove(name):
    def change(metadata, tensors):
        del tensors[name]

    return change


def replace(name, value):
    def change(metadata, tensors):
        tensors[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metadata, _: metadata.update(format_version="2"), "format version '2'"),
        (lambda metadata, _: metadata.update(format="x"), "refined online: .*got 'x'"),
        (lambda metadata, _: metadata.update(options="3"), "damaged: options 3"),
        (lambda metadata, _: metadata.pop("options"), "damaged"),
        (changed_options(ridge=-1), "damaged: ridge must be"),
        (changed_options(n_examples_seen="many"), "damaged.*'many' examples"),
        (remove("student.second.bias"), "damaged.*second.bias"),
        (remove("statistics.gram"), "damaged: statistics lack gram"),
        (remove("prior.W2"), "damaged: 'W2'"),
        (replace("prior.W2", torch.zeros(2, 2).double()), "damaged: prior of shapes"),
        (replace("statistics.cross", torch.zeros(3, 5)), "damaged: cross must be float64"),
    ],
)
def test_damaged_files_are_refused(change, message, tmp_path):
    path = tmp_path / "online.safetensors"
    layout = LAYOUTS["dense"]
    fit(Network(layout, GATES["low rank"]).student, [block(layout, 30)]).save(path)
    with storage.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    change(metadata, tensors)
    safetensors_torch.save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"(?s)online\.safetensors.*" + message):
        load_online(path)


def test_a_plain_student_is_not_continued_but_the_error_says_how_to_read_it(tmp_path):
    save_student(Network(LAYOUTS["dense"], [0]).student, tmp_path / "s")
    with pytest.raises(ValueError, match=r"no student that is refined online.*load_student"):
        load_online(tmp_path / "s")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_online(tmp_path / "nothing")


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "online.safetensors"
    refined = fit(Network(LAYOUTS["dense"], [0]).student, [block(LAYOUTS["dense"], 30)])
    refined.save(path)
    before = path.read_bytes()

    def fail(tensors, filename, metadata):
        filename.write_bytes(b"half a fi")
        raise OSError("no space left")

    monkeypatch.setattr(storage, "save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        refined.partial_fit(*block(LAYOUTS["dense"], 30)).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        refined.save(tmp_path / "nowhere" / "s")
