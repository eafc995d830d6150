"""A model as an ONNX file, for any number of examples, checked against torch before it is kept."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cvxdistill.adapters.batches import Batch, holds_examples, repeat_examples, run_model
from cvxdistill.adapters.call_structure import tensors_in
from cvxdistill.adapters.module_tree import evaluating
from cvxdistill.adapters.quantization import Int8Layer

# Numbers of examples that the file is tried with.
CHECKED_BATCHES = (1, 3, 64)
TOLERANCE = 1e-4
# What a number that is rounded to int8 the other way, or a gate that flips in float16, may change,
# relative to the largest output.
ROUNDED_OTHERWISE = 0.05
# Constants of more numbers are not computed beforehand: weights stay in int8 in the file.
FOLDED = 64


def export_onnx(
    model: nn.Module, example: Batch, path: str | Path, *, tolerance: float | None = None
) -> float:
    """Write a model to an ONNX file that takes any number of examples, and run it.

    Parameters
    ----------
    model : nn.Module
        Exported as it is in eval mode; left as it was.
    example : Tensor or dict
        At least one example of its inputs; of a dict, what are no tensors are constants.
    path : str or Path
        A file that is there is overwritten.
    tolerance : float, optional
        What onnxruntime's outputs for 1, 3 and 64 examples may differ from torch's, relative to the
        largest of them if that is above 1. By default 1e-4, or 5 units in the last place of the
        model's coarsest dtype if that is more: 5e-3 for float16.

        With layers in int8 or float16 half of the examples must be as close; the others may be off
        by 0.05: where a number lies between two integers, or a gate's sum at 0, the last bit before
        it decides, in torch as well from one batch size to the next.

    Returns
    -------
    float
        The largest difference, so measured.

    Raises
    ------
    ImportError
        If onnx, onnxscript or onnxruntime is not installed.
    ValueError
        If torch cannot express the model in ONNX, or the file's outputs differ by more than
        ``tolerance``. No file is there then.
    OSError
        If the file cannot be written.
    """
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(f'export_onnx needs {", ".join(missing)}: pip install "cvxdistill[onnx]"')
    floats = {t.dtype for t in model.state_dict().values() if t.is_floating_point()}
    if tolerance is None:
        tolerance = max([TOLERANCE, *(5 * torch.finfo(dtype).eps for dtype in floats)])
    if isinstance(tolerance, bool) or not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance!r}.")
    # One example would be taken for a constant.
    two = repeat_examples(example, 2)
    path, worst = Path(path), 0.0
    rounds = any(isinstance(module, Int8Layer) for module in model.modules())
    coarse = rounds or any(dtype.itemsize < 4 for dtype in floats)
    with evaluating(model):
        program = _exported(model, two, rounds)
        try:
            with _quiet():
                program.save(path)
            for count in CHECKED_BATCHES:
                found = _differences(model, repeat_examples(example, count), path)
                worst = max(worst, float(found.max()))
                typical = float(np.median(found))
                if coarse and typical <= tolerance and worst <= max(ROUNDED_OTHERWISE, tolerance):
                    continue
                if not worst <= tolerance:
                    raise ValueError(
                        f"onnxruntime's outputs differ from torch's by {worst:.1e}, more than "
                        f"tolerance ({tolerance:.1e})."
                    )
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return worst


def _exported(model: nn.Module, batch: Batch, rounds: bool) -> Any:
    import onnxscript

    examples = torch.export.Dim("examples")
    if isinstance(batch, dict):
        args: tuple[Tensor, ...] = ()
        kwargs = dict(batch)
        shapes: Any = {k: {0: examples} if holds_examples(v) else None for k, v in batch.items()}
        names = [name for name, value in batch.items() if holds_examples(value)]
    else:
        args, kwargs = (batch,), {}
        first = next(iter(inspect.signature(model.forward).parameters.values()), None)
        several = first is not None and first.kind is inspect.Parameter.VAR_POSITIONAL
        shapes, names = ((({0: examples},),) if several else ({0: examples},)), ["input"]
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                model,
                args,
                kwargs=kwargs,
                dynamic_shapes=shapes,
                input_names=names,
                dynamo=True,
                verbose=False,
                optimize=not rounds,
            )
            if rounds:
                program.model = onnxscript.optimizer.optimize(
                    program.model, input_size_limit=FOLDED
                )
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"torch cannot express this model in ONNX: {reason[0]}") from error
    # Where in the Python code each node comes from would be a good part of a small file.
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    return program


def _differences(model: nn.Module, batch: Batch, path: Path) -> np.ndarray:
    """The largest difference between the file's outputs and the model's, for each example."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    tensors = batch if isinstance(batch, dict) else {names[0]: batch}
    feed = {name: tensors[name].detach().cpu().numpy() for name in names}
    wanted = [t.detach().cpu() for t in tensors_in(run_model(model, batch))]
    found = session.run(None, feed)
    if [tuple(t.shape) for t in wanted] != [np.shape(f) for f in found]:
        return np.full(1, np.inf)
    count = next(len(value) for value in tensors.values() if holds_examples(value))
    worst = np.zeros(count)
    for tensor, array in zip(wanted, found, strict=True):
        target = tensor.double().numpy()
        scale = max(1.0, float(np.abs(target).max(initial=0.0)))
        off = np.abs(array - target) / scale
        # What is not one for each example is everybody's.
        off = off.reshape(count, -1) if off.shape[:1] == (count,) else off.reshape(1, -1)
        worst = np.maximum(worst, off.max(axis=1, initial=0.0))
    return worst


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on what is not installed and what is deprecated."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
