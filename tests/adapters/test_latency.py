"""Latencies: models take turns, in eval mode, at the batch sizes asked for."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from cvxdistill.adapters import latency  # noqa: E402
from cvxdistill.adapters.latency import (  # noqa: E402
    LEAST_ROUNDS,
    WARM_UP,
    measure_latency,
    measure_onnx_latency,
)


class Sleeper(nn.Module):
    """Takes so many seconds, and notes every pass: its name, the batch, the modes."""

    def __init__(self, name: str, seconds: float, passes: list) -> None:
        super().__init__()
        self.name, self.seconds, self.passes = name, seconds, passes
        self.linear = nn.Linear(3, 2)

    def forward(self, x, scale=1.0):
        self.passes.append((self.name, len(x), self.training, torch.is_grad_enabled()))
        time.sleep(self.seconds)
        return self.linear(x) * scale


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.0)


def test_the_median_is_the_time_of_a_pass_and_models_take_turns():
    passes: list = []
    models = [Sleeper("slow", 0.02, passes).train(), Sleeper("quick", 0.005, passes).eval()]
    found = measure_latency(models, torch.ones(2, 3), (1, 5))
    assert [[one.batch_size for one in row] for row in found] == [[1, 1], [5, 5]]
    for slow, quick in found:
        assert slow.rounds == quick.rounds == LEAST_ROUNDS
        # A loaded machine may take longer, never less.
        assert 0.02 <= slow.low <= slow.median <= slow.high
        assert 0.005 <= quick.low <= quick.median <= quick.high
        assert quick.median < slow.median
    assert models[0].training and not models[1].training
    assert {which[2:] for which in passes} == {(False, False)}
    each = 2 * (WARM_UP + LEAST_ROUNDS)
    assert [which[1] for which in passes] == [1] * each + [5] * each
    timed = [which[0] for which in passes[2 * WARM_UP : each]]
    rounds = [timed[k : k + 2] for k in range(0, len(timed), 2)]
    assert rounds[:2] == [["slow", "quick"], ["quick", "slow"]]
    assert all(set(pair) == {"slow", "quick"} for pair in rounds)


def test_dictionaries_are_passed_by_name_and_repeated():
    passes: list = []
    example = {"x": torch.ones(2, 3), "scale": 2.0}
    measure_latency([Sleeper("one", 0.0, passes)], example, [3])
    assert {which[1] for which in passes} == {3}


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((), ValueError, "at least one"),
        ((1, 0), ValueError, r"positive integers, got \(1, 0\)"),
        ((1, True), ValueError, "positive integers"),
        ((2.0,), ValueError, "positive integers"),
        (64, TypeError, "sequence of integers, got 64"),
        ("64", TypeError, "sequence of integers"),
    ],
)
def test_sizes_that_no_batch_can_have_are_refused(sizes, error, message):
    passes: list = []
    with pytest.raises(error, match=message):
        measure_latency([Sleeper("one", 0.0, passes)], torch.ones(2, 3), sizes)
    assert not passes


def test_onnx_files_are_timed_at_the_same_sizes(tmp_path):
    for name in ("onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    from cvxdistill.adapters import export_onnx

    example, paths = torch.randn(2, 6), [tmp_path / "wide.onnx", tmp_path / "narrow.onnx"]
    for path, width in zip(paths, (4096, 4), strict=True):
        export_onnx(nn.Sequential(nn.Linear(6, width), nn.Linear(width, 256)), example, path)
    ((wide, narrow),) = measure_onnx_latency(paths, example, (64,))
    assert wide.batch_size == narrow.batch_size == 64
    # 64 * 4096 * 262 multiply-adds against a thousandth of them.
    assert wide.median > narrow.median > 0
