"""Models with students of every kind go through torch.export and torch.compile as they are."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import cvxdistill  # noqa: E402
from cvxdistill.adapters import LinearStudent  # noqa: E402


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


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "convolutional": ("stage", {"student": "gated", "n_gates": 8, "n_neurons": 16}),
    "linear": ("stage", {"student": "linear", "n_neurons": 4}),
    "dense": ("down", {"student": "gated", "n_gates": 8, "n_neurons": 16}),
    "polished": (
        "stage",
        {"student": "gated", "polish": "group_elastic_net", "max_neurons": 6, "n_gates": 8},
    ),
    "low rank": ("down", {"penalty": "nuclear", "n_gates": 4}),
    "span": ("2:5", {"student": "linear"}),
}
DTYPES = ("float32", "float16", "int8")
# Half rounds after every step; where a step is left out, as compilers do, outputs differ by that.
TOLERANCE = {"float32": 1e-5, "float16": 5e-3, "int8": 1e-5}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    net = Net().eval()
    flat = nn.Sequential(*net.stem, *net.stage, *net.down, *net.head).eval()
    found: dict[str, Any] = {
        kind: cvxdistill.distill(
            flat if kind == "span" else net, block, images(300), verbose=0, **options
        )
        for kind, (block, options) in STUDENTS.items()
    }
    found["compressed"] = cvxdistill.compress(net, images(300), max_parameters=1500, verbose=0)
    assert any(isinstance(m, LinearStudent) for m in found["compressed"].model.modules())
    return found


def model_of(results: dict[str, Any], kind: str, dtype: str) -> nn.Module:
    result = results[kind]
    return (result if dtype == "float32" else result.quantize(dtype)).model


def check(program: Any, model: nn.Module, dtype: str, counts: tuple[int, ...] = (1, 7, 64)) -> None:
    for count in counts:
        x = images(count, seed=count)
        with torch.no_grad():
            wanted = model(x)
            found = program(x)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        off = (found - wanted).abs().amax(1)
        if dtype == "int8":
            # What lies between two integers may be rounded to either.
            assert off.median() <= TOLERANCE[dtype] and off.max() <= 0.05
        else:
            assert off.max() <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*STUDENTS, "compressed"])
def test_torch_export_with_any_number_of_examples(results, kind, dtype):
    model = model_of(results, kind, dtype)
    shapes = ({0: torch.export.Dim("examples")},)
    program = torch.export.export(model, (images(2),), dynamic_shapes=shapes)
    check(program.module(), model, dtype)
    stored = {name: (t.dtype, t.shape) for name, t in model.state_dict().items()}
    assert {name: (t.dtype, t.shape) for name, t in program.state_dict.items()} == stored


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [*STUDENTS, "compressed"])
def test_torch_compile_without_a_graph_break(results, kind, dtype):
    model = model_of(results, kind, dtype)
    torch.compiler.reset()
    # A break in the graph is an error here.
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    check(compiled, model, dtype, counts=(2, 7, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_default_compiler(results, dtype):
    from torch._inductor import exc

    model = copy.deepcopy(model_of(results, "convolutional", dtype))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    try:
        with torch.no_grad():
            compiled(images(2))
    except exc.InductorError as error:
        pytest.skip(f"inductor does not work on this machine: {str(error).splitlines()[0]}")
    check(compiled, model, dtype, counts=(7, 64))
