from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
from safetensors.torch import save_file  # noqa: E402

from cvxdistill.adapters.model_loading import load_model, load_weights  # noqa: E402

SOURCE = """
import torch
from torch import nn

def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))

instance = nn.Linear(3, 2)
number = 3

class Network(nn.Linear):
    def __init__(self):
        super().__init__(3, 2)

def tensor():
    return torch.zeros(2)

def needs_an_argument(width):
    return nn.Linear(3, width)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "networks.py"
    path.write_text(SOURCE)
    return path


def trained_weights(source: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    state = load_model(f"{source}:network").state_dict()
    return {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in state.items()}


def same(model: torch.nn.Module, state: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    found = model.state_dict()
    return all(torch.allclose(found[k].double(), state[k].double(), atol=tolerance) for k in state)


@pytest.mark.parametrize("attribute", ["network", "Network", "instance"])
def test_a_factory_a_class_and_an_instance_each_give_a_module_in_eval_mode(
    source: Path, attribute: str
) -> None:
    model = load_model(f"{source}:{attribute}")
    assert model(torch.zeros(2, 3)).shape == (2, 2)
    assert not any(module.training for module in model.modules())


def test_a_module_is_imported_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "our_networks_7f").mkdir()
    (tmp_path / "our_networks_7f" / "small.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert isinstance(load_model("our_networks_7f.small:network"), torch.nn.Sequential)
    assert sys.path == path


def test_a_file_may_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "widths_7f.py").write_text("WIDTH = 5\n")
    file = tmp_path / "net.py"
    file.write_text(
        "from torch import nn\nfrom widths_7f import WIDTH\n"
        "def make():\n    return nn.Linear(WIDTH, 1)\n"
    )
    assert load_model(f"{file}:make").in_features == 5


@pytest.mark.parametrize("wrap", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_torch_files_are_unwrapped(
    source: Path, tmp_path: Path, wrap: str | None, prefix: str
) -> None:
    state = trained_weights(source)
    saved = {prefix + name: tensor for name, tensor in state.items()}
    file = tmp_path / "weights.pt"
    torch.save(saved if wrap is None else {wrap: saved, "epoch": 3}, file)
    assert same(load_model(f"{source}:network", file), state)


def test_half_precision_safetensors_become_the_dtype_of_the_model(
    source: Path, tmp_path: Path
) -> None:
    state = trained_weights(source)
    file = tmp_path / "weights.safetensors"
    save_file({k: t.half() if t.is_floating_point() else t for k, t in state.items()}, file)
    model = load_model(f"{source}:network", file)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert same(model, state, 1e-3)
    assert not same(model, state)


def test_a_model_that_has_a_child_called_module_keeps_its_prefix(tmp_path: Path) -> None:
    model = torch.nn.Sequential()
    model.add_module("module", torch.nn.Linear(2, 1))
    file = tmp_path / "weights.pt"
    torch.save({k: torch.ones_like(t) for k, t in model.state_dict().items()}, file)
    load_weights(model, file)
    assert bool((model.module.weight == 1).all())


def test_mismatched_names_are_listed_nearest_first_and_the_model_is_left_alone(
    source: Path, tmp_path: Path
) -> None:
    state = trained_weights(source)
    state["3.weigth"] = state.pop("3.weight")
    state["1.bias"] = state["1.bias"] + 1
    file = tmp_path / "weights.pt"
    torch.save(state, file)
    model = load_model(f"{source}:network")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    message = "Missing from the file: '3.weight'. Not in the model: '3.weigth'"
    with pytest.raises(ValueError, match=message):
        load_weights(model, file)
    assert same(model, before)


def test_at_most_five_names_are_listed(tmp_path: Path) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(6)))
    file = tmp_path / "weights.pt"
    torch.save({"other": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="and 7 more") as caught:
        load_weights(model, file)
    assert str(caught.value).count(".weight'") + str(caught.value).count(".bias'") == 5


def test_wrong_shapes_are_named(source: Path, tmp_path: Path) -> None:
    state = trained_weights(source)
    state["0.weight"] = torch.zeros(4, 7)
    file = tmp_path / "weights.pt"
    torch.save(state, file)
    message = r"'0.weight' is \(4, 7\) in the file and \(4, 3\) in the model"
    with pytest.raises(ValueError, match=message):
        load_model(f"{source}:network", file)


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (pytest.fail, ("the pickle was run",))


def test_a_pickle_is_refused_and_not_run(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    torch.save({"0.weight": Malicious()}, file)
    with pytest.raises(ValueError, match="must hold tensors only"):
        load_model(f"{source}:network", file)


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all"])
def test_a_damaged_file_is_refused(
    source: Path, tmp_path: Path, ending: str, content: bytes
) -> None:
    file = tmp_path / f"weights.{ending}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights: .*weights\."):
        load_model(f"{source}:network", file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "must hold a state_dict, got a list"),
        ({}, "must hold a state_dict, got a dict"),
        ({"epoch": 3}, "entries 'epoch' are not tensors"),
        ({0: torch.zeros(1)}, "entries 0 are not tensors"),
    ],
)
def test_what_is_no_state_dict_is_refused(
    source: Path, tmp_path: Path, content: object, message: str
) -> None:
    file = tmp_path / "weights.pt"
    torch.save(content, file)
    with pytest.raises(ValueError, match=message):
        load_model(f"{source}:network", file)


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("{file}", ValueError, "must be 'package.module:factory' or 'path/file.py:factory'"),
        (":network", ValueError, "must be 'package.module:factory'"),
        ("{file}:", ValueError, "must be 'package.module:factory'"),
        (7, TypeError, "must be a string"),
        ("absent.py:network", FileNotFoundError, "there is no file absent.py"),
        ("absent_package_7f:network", ValueError, "there is no module 'absent_package_7f'"),
        ("torch.absent_7f:network", ValueError, "there is no module 'torch.absent_7f'"),
        ("{file}:netwrok", ValueError, "has no 'netwrok'. Did you mean 'network'"),
        ("{file}:number", TypeError, "must be a torch.nn.Module or a function.*got a int"),
        ("{file}:tensor", TypeError, "must return a torch.nn.Module, got a Tensor"),
        ("{file}:needs_an_argument", ValueError, "without arguments failed: TypeError.*'width'"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused(
    source: Path, spec: object, error: type[Exception], message: str
) -> None:
    if isinstance(spec, str):
        spec = spec.format(file=source)
    with pytest.raises(error, match=message):
        load_model(spec)


def test_a_file_that_fails_says_how(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import a_module_that_is_absent_7f\n")
    with pytest.raises(ValueError, match=r"running .*broken.py failed: ModuleNotFoundError"):
        load_model(f"{file}:network")


def test_a_module_whose_imports_fail_is_not_called_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_7f.py").write_text("import a_module_that_is_absent_7f\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="importing 'broken_7f' failed: ModuleNotFoundError"):
        load_model("broken_7f:network")


def test_missing_weights_are_noticed_before_the_model_is_made(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text("raise RuntimeError('ran')\n")
    with pytest.raises(FileNotFoundError, match="weights: there is no file"):
        load_model(f"{file}:network", tmp_path / "absent.pt")
