"""How long one forward pass takes: several models in turn, so that noise hits all of them alike."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cvxdistill.adapters.batches import (
    Batch,
    repeat_examples,
    run_model,
    where_tensors_go,
)
from cvxdistill.adapters.module_tree import evaluating

# Passes of each model before any is timed, and then at least and at most so many that are; between
# the two until so many seconds have passed.
WARM_UP, LEAST_ROUNDS, MOST_ROUNDS, SECONDS = 3, 7, 300, 2.0


@dataclass(frozen=True)
class Latency:
    """Seconds of one forward pass.

    Attributes
    ----------
    batch_size : int
    median, low, high : float
        Over the rounds; low and high are the quartiles.
    rounds : int
        Passes that were timed.
    """

    batch_size: int
    median: float
    low: float
    high: float
    rounds: int


def measure_latency(
    models: Sequence[nn.Module], example: Batch, batch_sizes: Sequence[int] = (1, 64)
) -> list[tuple[Latency, ...]]:
    """Time models that take the same inputs, one pass of each after the other, round by round.

    Every second round goes through them backwards. Torch runs with the threads that it has.

    Parameters
    ----------
    models : sequence of nn.Module
        Left as they were: they run in eval mode without gradients.
    example : Tensor or dict
        At least one example of their inputs, on their device; repeated to fill a batch.
    batch_sizes : sequence of int, default=(1, 64)

    Returns
    -------
    list of tuple of Latency
        For every batch size one for each model.

    Raises
    ------
    ValueError, TypeError
        If ``batch_sizes`` does not hold positive integers.
    """
    found = []
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(evaluating(model))
        for size in check_batch_sizes(batch_sizes):
            batch = repeat_examples(example, size)
            found.append(_in_turn([_model_pass(model, batch) for model in models], size))
    return found


def measure_onnx_latency(
    paths: Sequence[str | Path], example: Batch, batch_sizes: Sequence[int] = (1, 64)
) -> list[tuple[Latency, ...]]:
    """Time ONNX files as ``measure_latency`` times models: onnxruntime, on the processor.

    onnxruntime gets as many threads as torch has.

    Raises
    ------
    ImportError
        If onnxruntime is not installed.
    ValueError, TypeError
        If ``batch_sizes`` does not hold positive integers.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    sessions = [
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for path in paths
    ]
    found = []
    for size in check_batch_sizes(batch_sizes):
        batch = repeat_examples(example, size)
        found.append(_in_turn([_session_pass(session, batch) for session in sessions], size))
    return found


def check_batch_sizes(batch_sizes: Any) -> tuple[int, ...]:
    """Return the sizes; raise TypeError or ValueError unless they are positive integers."""
    if isinstance(batch_sizes, (str, bytes)) or not isinstance(batch_sizes, Sequence):
        raise TypeError(f"batch_sizes must be a sequence of integers, got {batch_sizes!r}.")
    for size in batch_sizes:
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"batch_sizes must hold positive integers, got {batch_sizes!r}.")
    if not batch_sizes:
        raise ValueError("batch_sizes must hold at least one integer, got none.")
    return tuple(int(size) for size in batch_sizes)


def describe_device(model: nn.Module) -> str:
    """What a model runs on: the processor and torch's threads, or the accelerator's name."""
    device = where_tensors_go(model)[0]
    if device is not None and device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    if device is not None and device.type != "cpu":
        return f"{device.type}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"


def processor() -> str:
    """The name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _model_pass(model: nn.Module, batch: Batch) -> Callable[[], Any]:
    device = where_tensors_go(model)[0]
    if device is None or device.type == "cpu":
        return lambda: run_model(model, batch)

    def call() -> None:
        run_model(model, batch)
        # An accelerator only queues what it is told to do.
        getattr(torch, device.type).synchronize()

    return call


def _session_pass(session: Any, batch: Batch) -> Callable[[], Any]:
    names = [given.name for given in session.get_inputs()]
    tensors = batch if isinstance(batch, dict) else {names[0]: batch}
    feed = {name: tensors[name].detach().cpu().numpy() for name in names}
    return lambda: session.run(None, feed)


def _in_turn(calls: Sequence[Callable[[], Any]], batch_size: int) -> tuple[Latency, ...]:
    """The latency of each call."""
    for call in calls:
        for _ in range(WARM_UP):
            call()
    seconds: list[list[float]] = [[] for _ in calls]
    order = list(zip(calls, seconds, strict=True))
    start = time.perf_counter()
    for done in range(MOST_ROUNDS):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > SECONDS:
            break
        for call, times in order:
            before = time.perf_counter()
            call()
            times.append(time.perf_counter() - before)
        order.reverse()
    found = []
    for times in seconds:
        low, median, high = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
        found.append(Latency(batch_size, median, low, high, len(times)))
    return tuple(found)
