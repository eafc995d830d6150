from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset, TensorDataset  # noqa: E402

from cvxdistill.adapters.capture import capture  # noqa: E402


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


X = torch.from_numpy(np.random.default_rng(0).standard_normal((23, 5)).astype(np.float32))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Temporary files go to a folder of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def loader_of_dicts():
    return [{"input": X[:9], "labels": torch.zeros(9)}, {"input": X[9:], "labels": None}]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


@pytest.mark.parametrize(
    "data",
    [
        X,
        X.numpy(),
        X.numpy().astype(np.float64)[::-1].copy()[::-1],
        X.double(),
        DataLoader(TensorDataset(X, torch.zeros(23)), batch_size=4),
        DataLoader(Stream(), batch_size=10),
        [X[:10], X[10:]],
        (batch for batch in (X[:10].numpy(), X[10:].numpy())),
        [(X[:20], torch.zeros(20), "name"), [X[20:], None]],
        loader_of_dicts(),
    ],
    ids=[
        "tensor", "array", "negative strides", "other dtype", "loader", "stream",
        "list", "generator", "tuples", "dicts",
    ],
)  # fmt: skip
def test_every_form_of_data_gives_the_blocks_inputs_and_outputs(data):
    model = mlp()
    with capture(model, "2", data, batch_size=6, verbose=0) as recorded:
        with torch.no_grad():
            hidden = model[1](model[0](X))
            expected = model[2](hidden)
        np.testing.assert_allclose(recorded.inputs, hidden.numpy(), atol=1e-6)
        np.testing.assert_allclose(recorded.outputs, expected.numpy(), atol=1e-6)
        assert recorded.inputs.dtype == recorded.outputs.dtype == np.float32
        assert len(recorded) == 23 and not recorded.on_disk


def test_a_stage_of_a_real_network_is_recorded(resnet):
    images = torch.randn(6, 3, 32, 32)
    recorded = capture(resnet, "layer4", images, batch_size=4, verbose=0)
    assert recorded.inputs.shape == (6, 16, 2, 2) and recorded.outputs.shape == (6, 32, 1, 1)
    resnet.eval()
    with torch.no_grad():
        again = resnet.layer4(torch.from_numpy(recorded.inputs))
    np.testing.assert_allclose(recorded.outputs, again.numpy(), atol=1e-5)


def test_the_model_is_left_as_it_was(resnet):
    resnet.train()
    resnet.layer1.eval()
    flags = [module.training for module in resnet.modules()]
    state = {name: value.clone() for name, value in resnet.state_dict().items()}
    capture(resnet, "layer2", torch.randn(4, 3, 32, 32), verbose=0)
    assert [module.training for module in resnet.modules()] == flags
    assert all(torch.equal(state[name], value) for name, value in resnet.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in resnet.modules())
    assert all(p.grad is None and p.requires_grad for p in resnet.parameters())


def test_flags_and_hooks_are_restored_when_a_batch_fails():
    model = mlp().train()
    with pytest.raises(RuntimeError):
        capture(model, "2", [X, X[:, :3]], verbose=0)
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_nothing_after_the_block_is_computed():
    called = []

    class Bomb(nn.Module):
        def forward(self, x):
            called.append(x.device.type)
            raise RuntimeError("computed after the block")

    model = nn.Sequential(nn.Linear(5, 3), Bomb())
    recorded = capture(model, "0", X, batch_size=5, verbose=0)
    assert recorded.outputs.shape == (23, 3)
    # The check for a second call runs on shapes alone.
    assert set(called) <= {"meta"}


def test_a_models_own_except_clause_does_not_stop_the_early_exit():
    class Guarded(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.after = nn.Linear(5, 3), 0

        def forward(self, x):
            try:
                return self.block(x)
            except Exception:
                self.after += 1
                return x

    model = Guarded()
    assert len(capture(model, "block", X, verbose=0)) == 23
    assert model.after == 0


def test_changes_in_place_do_not_reach_the_record():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(2).add_(1)

    model = nn.Sequential(nn.Identity(), InPlace(), nn.ReLU(inplace=True))
    data = X.clone()
    recorded = capture(model, "1", [data], verbose=0)
    np.testing.assert_array_equal(recorded.inputs, X.numpy())
    np.testing.assert_array_equal(recorded.outputs, (X * 2 + 1).numpy())


def test_a_single_named_tensor_and_flags_are_a_single_input():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Inner()

        def forward(self, x):
            return self.block(hidden=x, mask=None, scale=2.0)

    class Inner(nn.Module):
        def forward(self, hidden, mask, scale):
            return hidden * scale

    recorded = capture(Named(), "block", X, verbose=0)
    np.testing.assert_array_equal(recorded.outputs, 2 * recorded.inputs)


def test_dicts_are_passed_by_name():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Identity()

        def forward(self, ids, scale):
            return self.block(ids - scale)

    batch = {"scale": 3.0, "labels": X, "ids": X}
    recorded = capture(TwoInputs(), "block", [batch, batch], verbose=0)
    np.testing.assert_allclose(recorded.inputs[:23], X.numpy() - 3)


def test_other_dtypes_are_recorded_as_float32():
    recorded = capture(mlp().double(), "2", X, verbose=0)
    assert recorded.inputs.dtype == np.float32
    assert recorded.dtypes == (torch.float64, torch.float64)


def test_max_examples_stops_early_and_draws_no_further_batch():
    drawn = []

    def batches():
        for i in range(0, 23, 5):
            drawn.append(i)
            yield X[i : i + 5]

    recorded = capture(mlp(), "0", batches(), max_examples=8, verbose=0)
    np.testing.assert_array_equal(recorded.inputs, X[:8].numpy())
    assert drawn == [0, 5]


def test_beyond_the_limit_activations_are_memory_mapped_and_removed_on_close(folder):
    whole = capture(mlp(), "2", X, batch_size=4, verbose=0)
    assert not list(folder.iterdir())
    # 48 bytes an example: the limit is passed in the third batch.
    with capture(mlp(), "2", X, batch_size=4, memory_limit=400, verbose=0) as recorded:
        assert recorded.on_disk and isinstance(recorded.inputs, np.memmap)
        np.testing.assert_array_equal(recorded.inputs, whole.inputs)
        np.testing.assert_array_equal(recorded.outputs, whole.outputs)
        assert len(list(folder.iterdir())) == 1
    assert not list(folder.iterdir())
    with pytest.raises(ValueError, match="capture is closed"):
        _ = recorded.inputs
    recorded.close()


def test_the_temporary_folder_goes_with_the_object(folder):
    recorded = capture(mlp(), "2", X, memory_limit=0, verbose=0)
    assert list(folder.iterdir())
    del recorded
    gc.collect()
    assert not list(folder.iterdir())


def test_the_temporary_folder_goes_when_a_batch_fails(folder):
    def batches():
        yield X
        assert list(folder.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as failure:
        capture(mlp(), "2", batches(), memory_limit=0, verbose=0)
    assert not list(folder.iterdir())
    # Not by luck: the traceback still holds whatever had opened the folder.
    assert failure.tb is not None


def test_the_temporary_folder_goes_when_python_exits(tmp_path):
    code = (
        "import torch; from cvxdistill.adapters import capture\n"
        "model = torch.nn.Sequential(torch.nn.Linear(2, 2))\n"
        "kept = capture(model, '0', torch.zeros(4, 2), memory_limit=0, verbose=0)\n"
        "import os, tempfile; print(len(os.listdir(tempfile.gettempdir())))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) >= 1
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("cvxdistill")]


def test_memory_maps_can_be_changed_without_changing_the_files(folder):
    with capture(mlp(), "0", X, memory_limit=0, verbose=0) as recorded:
        recorded.inputs[:] = 0
        (files,) = folder.iterdir()
        stored = np.fromfile(files / "0.f32", dtype=np.float32)
        np.testing.assert_array_equal(stored, X.numpy().ravel())


def test_progress_goes_to_stderr_and_verbose_0_is_silent(capsys):
    capture(mlp(), "2", X, verbose=0)
    assert capsys.readouterr() == ("", "")
    capture(mlp(), "2", X, verbose=1)
    out, err = capsys.readouterr()
    assert out == "" and "capture 2" in err


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.Linear(5, 5)
        self.unused = nn.Linear(5, 5)
        self.pair = Pair()
        self.lstm = nn.LSTM(5, 5)

    def forward(self, x):
        x = self.lstm(x)[0]
        return self.pair(self.block(self.block(x)), x)


class Pair(nn.Module):
    def forward(self, x, y):
        return x + y


class Fail(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.block = nn.Identity()
        self.after = Change(change)

    def forward(self, x):
        return self.after(self.block(x))


class Change(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


BAD = torch.tensor([[float("nan")] * 5])


@pytest.mark.parametrize(
    ("model", "block", "data", "options", "error", "message"),
    [
        (mlp(), "0", [], {}, ValueError, "data holds no examples"),
        (mlp(), "0", iter(()), {}, ValueError, "data holds no examples"),
        (mlp(), "0", X[:0], {}, ValueError, "data holds no examples"),
        (mlp(), "0", [X[:0]], {}, ValueError, "data holds no examples"),
        (mlp(), "0", 3, {}, TypeError, "data must be a DataLoader.*got int"),
        (mlp(), "0", "images", {}, TypeError, "data must be a DataLoader.*got str"),
        (mlp(), "0", {"labels": X}, {}, ValueError, "data is one dict, but none of"),
        (
            mlp(), "0", {"input": X, "mask": X[:3]}, {}, ValueError,
            "different numbers of examples: 'input' 23, 'mask' 3",
        ),
        (mlp(), "0", TensorDataset(X), {}, TypeError, "yields examples, not batches"),
        (mlp(), "0", torch.tensor(1.0), {}, ValueError, "axis of examples"),
        (mlp(), "0", ["a"], {}, TypeError, "batch 0 must be a tensor.*got str"),
        (mlp(), "0", [X, ()], {}, ValueError, "batch 1 is an empty tuple"),
        (mlp(), "9", X, {}, ValueError, "no block named '9'"),
        (lambda x: x, "0", X, {}, TypeError, "model must be a torch.nn.Module"),
        (mlp(), "0", X, {"max_examples": 0}, ValueError, "max_examples must be at least 1, got 0"),
        (mlp(), "0", X, {"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        (mlp(), "0", X, {"memory_limit": -1}, ValueError, "memory_limit must be at least 0"),
        (mlp(), "0", X, {"memory_limit": 1.5}, TypeError, "memory_limit must be an integer"),
        (Twice(), "block", X, {}, ValueError, "'block' is called 2 times in one forward pass"),
        (Twice(), "unused", X, {}, ValueError, "'unused' was not called"),
        (Twice(), "pair", X, {}, ValueError, "exactly one tensor, but was called with: Tensor, T"),
        (Twice(), "lstm", X, {}, ValueError, "output of block 'lstm' must be one .* got tuple"),
        (mlp(), "0", [X, BAD], {}, ValueError, "input of block '0' contains NaN.* in batch 1"),
        (Fail(torch.log), "after", [-X.abs()], {}, ValueError, "output of block 'after' contains"),
        (Fail(torch.sum), "after", X, {}, ValueError, "must keep its examples along axis 0"),
        (Fail(torch.t), "after", X, {}, ValueError, r"maps \(23, 5\) to \(5, 23\)"),
        (
            Fail(torch.relu), "block", [X, X[:, :4]], {}, ValueError,
            r"shape \('n', 4\) in batch 1 but \('n', 5\) in batch 0",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused(model, block, data, options, error, message):
    with pytest.raises(error, match=message):
        capture(model, block, data, verbose=0, **options)
