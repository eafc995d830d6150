"""What the HTML report measures when it is written: sizes and latencies before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from torch import nn

    from cvxdistill.adapters import Latency
    from cvxdistill.adapters.batches import Batch


@dataclass(frozen=True)
class Timing:
    """One batch size in one runtime.

    Attributes
    ----------
    runtime : {"torch", "onnxruntime"}
    batch_size : int
    before : Latency or None
        None where there is no original.
    after : Latency
    """

    runtime: str
    batch_size: int
    before: Latency | None
    after: Latency


@dataclass(frozen=True)
class Measurements:
    """Sizes and latencies of a model before and after.

    Attributes
    ----------
    state_bytes, onnx_bytes : tuple of (int or None)
        Of the tensors in the state dict, and of the ONNX files, before and after; None where there
        is no original, or no file.
    timings : tuple of Timing
    device : str
        What torch ran on.
    onnx_note : str
        Why there are no ONNX figures; empty where there are.
    """

    state_bytes: tuple[int | None, int]
    onnx_bytes: tuple[int | None, int | None]
    timings: tuple[Timing, ...]
    device: str
    onnx_note: str


def measure(
    original: nn.Module | None,
    model: nn.Module,
    example: Batch,
    *,
    onnx: bool,
    batch_sizes: Sequence[int],
    verbose: int,
) -> Measurements:
    """Measure a model, and the original where there is one.

    Parameters
    ----------
    original : nn.Module or None
    model : nn.Module
    example : Tensor or dict
        Examples of their inputs.
    onnx : bool
        Also export both, and time the files.
    batch_sizes : sequence of int
    verbose : int
        0 shows no progress.
    """
    from cvxdistill.adapters import measure_latency, measure_onnx_latency
    from cvxdistill.adapters.latency import describe_device

    models = [model] if original is None else [original, model]
    sizes = [state_bytes(each) for each in models]
    onnx_sizes: list[int] = []
    note = "" if onnx else "ONNX files were not asked for."
    with tqdm(
        total=1 + (len(models) + 1 if onnx else 0), desc="measuring", disable=not verbose
    ) as bar:
        timings = _timings("torch", measure_latency(models, example, batch_sizes))
        bar.update()
        if onnx:
            with TemporaryDirectory() as folder:
                paths: list[Path] = []
                try:
                    for each in models:
                        paths.append(_exported(each, example, Path(folder) / str(len(paths))))
                        bar.update()
                # Not installed, or not expressed: whatever it is, the page says so.
                except Exception as error:
                    note = f"No ONNX figures: {error}"
                else:
                    onnx_sizes = [
                        sum(file.stat().st_size for file in path.parent.iterdir()) for path in paths
                    ]
                    found = measure_onnx_latency(paths, example, batch_sizes)
                    timings += _timings("onnxruntime", found)
                bar.update()
    before = sizes[0] if original is not None else None
    onnx_before = onnx_sizes[0] if original is not None and onnx_sizes else None
    return Measurements(
        state_bytes=(before, sizes[-1]),
        onnx_bytes=(onnx_before, onnx_sizes[-1] if onnx_sizes else None),
        timings=tuple(timings),
        device=describe_device(model),
        onnx_note=note,
    )


def state_bytes(model: nn.Module) -> int:
    """Bytes of the tensors in the state dict; one under two names counts once."""
    import torch

    tensors = [t for t in model.state_dict().values() if isinstance(t, torch.Tensor)]
    return sum({(t.data_ptr(), t.nbytes): t.nbytes for t in tensors}.values())


def _timings(runtime: str, found: list[tuple[Latency, ...]]) -> list[Timing]:
    return [
        Timing(runtime, row[-1].batch_size, row[0] if len(row) > 1 else None, row[-1])
        for row in found
    ]


def _exported(model: nn.Module, example: Batch, folder: Path) -> Path:
    """The path of the model's ONNX file, in a folder of its own: large weights lie beside it."""
    from cvxdistill.adapters import export_onnx

    folder.mkdir()
    path = folder / "model.onnx"
    export_onnx(model, example, path)
    return path
