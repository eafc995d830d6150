from __future__ import annotations

import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from cvxdistill.inspection import BlockTable, inspect  # noqa: E402

EXAMPLE = torch.zeros(2, 1, 8, 8)


def convnet():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.Sequential(nn.Conv2d(8, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1)),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )


@pytest.fixture
def table():
    return inspect(convnet(), EXAMPLE)


def test_blocks_are_read_by_name_by_position_and_in_order(table):
    assert [info.name for info in table] == ["0", "1", "1.0", "1.1", "1.2", "2", "3"]
    assert len(table) == 7 and table[1] is table["1"] and "1.2" in table and "9" not in table
    assert table["1"].output_shape == (64, 4, 4)
    assert [info.name for info in table[:2]] == ["0", "1"]
    with pytest.raises(KeyError, match="'9' is not in the table; it has"):
        table["9"]


def test_a_span_is_the_sum_of_its_blocks(table):
    span = table["1:3"]
    assert span.name == "1:3" and span.calls == 1
    assert span.input_shape == table["1"].input_shape and span.output_shape == (10,)
    assert span.parameters == table["1"].parameters + table["3"].parameters
    assert span.multiply_adds == table["1"].multiply_adds + table["3"].multiply_adds
    with pytest.raises(KeyError, match="'1:9' is not in the table"):
        table["1:9"]


def test_it_prints_as_an_aligned_table_with_a_total(table):
    lines = str(table).splitlines()
    assert repr(table) == str(table)
    assert lines[0].split() == [
        "block", "type", "input", "output", "parameters", "share", "multiply-adds", "calls",
    ]  # fmt: skip
    row = next(line for line in lines if line.startswith("1 "))
    assert "Sequential  8 x 8 x 8   64 x 4 x 4" in row
    assert "41,600" in row and "80.1%" in row and "663,552" in row
    assert lines[-1].startswith("total  Sequential") and "51,930  100.0%" in lines[-1]
    assert len({line.rstrip()[-1] for line in lines[2:-2]}) == 1
    assert len({len(line) for line in lines}) == 1


def test_depth_limits_the_rows():
    assert [info.name for info in inspect(convnet(), EXAMPLE, depth=1)] == ["0", "1", "2", "3"]


def test_the_frame_holds_the_same_numbers(table):
    pytest.importorskip("pandas")
    frame = table.to_frame()
    assert list(frame.index) == [info.name for info in table]
    assert frame.loc["1", "parameters"] == 41_600
    assert frame["multiply_adds"].dtype == "int64"
    assert frame.loc["1", "input_shape"] == (8, 8, 8)


def test_without_pandas_the_frame_says_what_to_install(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        table.to_frame()


def test_the_heaviest_block_is_a_container_or_a_layer_but_not_the_model(table):
    assert table.heaviest() == "1"
    assert inspect(nn.Sequential(convnet()), EXAMPLE).heaviest() == "0.1"


def test_the_heaviest_block_can_be_distilled():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 50)
            self.twice = nn.Linear(50, 50)
            self.up = nn.ConvTranspose2d(1, 200, 4, 4)
            self.once = nn.Linear(50, 5)

        def forward(self, x):
            self.up(x)
            x = self.lstm(x.flatten(1, 2).transpose(0, 1))[0]
            return self.once(self.twice(self.twice(x)))

    assert inspect(Model(), EXAMPLE).heaviest() == "once"


def test_the_heaviest_by_computation_may_be_another():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(256, 10))
    table = inspect(model, EXAMPLE)
    assert table.heaviest() == "2"
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(32, 10)
    )
    table = inspect(model, EXAMPLE)
    assert (table.heaviest(), table.heaviest("multiply_adds")) == ("3", "0")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: inspect(convnet(), EXAMPLE, depth=0), ValueError, "depth must be at least 1"),
        (lambda: inspect(convnet(), EXAMPLE, depth="2"), TypeError, "depth must be an integer"),
        (lambda: inspect(None, EXAMPLE), TypeError, "model must be a torch.nn.Module"),
        (
            lambda: inspect(convnet(), EXAMPLE).heaviest("size"),
            ValueError,
            "by must be 'parameters'",
        ),
        (lambda: inspect(nn.Linear(8, 8), EXAMPLE).heaviest(), ValueError, "no block to distil"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_importing_the_module_imports_no_torch():
    code = "import sys, cvxdistill.inspection; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_table_is_a_sequence(table):
    assert isinstance(table, BlockTable)
    assert next(reversed(table)).name == "3"
