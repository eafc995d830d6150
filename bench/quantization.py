"""Students in float32, float16 and int8: bytes, activation error and accuracy.

Linear and gated students of ``layer4`` of a ResNet-18 and of ``layer3.2`` of a ResNet-20 are
distilled from unlabelled training images, and are then quantised without any further data. Errors
and accuracies are those of test images.

A last row for each gated student says what its gates are worth: "int8, gates too" rounds them as
well, and flips some; int8 itself leaves them alone.

Run ``CVXDISTILL_DATA=... python bench/quantization.py``; writes ``bench/results/quantization.csv``.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import load_cifar10, normalise
from machine import describe_machine
from polishing import from_here
from teachers import accuracy, load_teacher
from torch import Tensor, nn

import cvxdistill
from cvxdistill.adapters import (
    DenseLayout,
    GatedStudent,
    Int8Layer,
    capture,
    quantize_student,
)
from cvxdistill.model_size import ModelSize

RESULTS = Path(__file__).parent / "results"
BLOCKS = (("resnet18", "layer4"), ("resnet20", "layer3.2"))
STUDENTS: dict[str, dict[str, Any]] = {
    "linear": {"student": "linear", "n_neurons": 64},
    "gated, 16 gates": {"student": "gated", "n_neurons": 256, "n_gates": 16},
    "gated, 64 gates": {"student": "gated", "n_neurons": 256, "n_gates": 64},
}
DISTILL = {"max_rows": 20_000, "tol": 2e-2, "time_limit": 15, "verbose": 0}


def variants(student: GatedStudent) -> dict[str, GatedStudent]:
    """The student as it is stored, by name."""
    found = {"float32": student}
    for dtype in ("float16", "int8"):
        found[dtype] = quantize_student(student, dtype)
    if student.gate is not None:
        found["int8, gates too"] = quantize_student(student, "int8")
        found["int8, gates too"].gate = Int8Layer(student.gate)
    return found


def flipped_gates(student: GatedStudent, of: GatedStudent, inputs: Tensor) -> float:
    """The share of gates, over all positions, that are on in one and off in the other."""
    if student.gate is None or of.gate is None:
        return 0.0
    flat = isinstance(of.layout, DenseLayout) and not of.layout.per_position
    z = inputs.flatten(1) if flat else inputs
    on = student.gate(z.to(student.dtype)) >= 0
    return float((on != (of.gate(z) >= 0)).double().mean())


def measure(
    student: GatedStudent, given: GatedStudent, block: np.ndarray, outputs: np.ndarray
) -> dict[str, float]:
    """Activation error, flipped gates and seconds over the test images as they reach the block."""
    wrong = total = flipped = seconds = 0.0
    with torch.inference_mode():
        for start in range(0, len(block), 250):
            inputs = torch.from_numpy(block[start : start + 250])
            begin = time.perf_counter()
            Z = student(inputs).numpy()
            seconds += time.perf_counter() - begin
            Y = outputs[start : start + 250]
            wrong += float(np.sum((Z - Y) ** 2, dtype=float))
            total += float(np.sum(Y**2, dtype=float))
            flipped += flipped_gates(student, given, inputs) * len(inputs)
    return {
        "activation_error": (wrong / total) ** 0.5,
        "flipped_gates": flipped / len(block),
        "student_seconds": seconds,
    }


def stage_of(model: nn.Module, block: str) -> tuple[nn.Module, str]:
    """The model from the stage that holds the block on, and the name of that stage."""
    stage = block.partition(".")[0]
    return from_here(model, stage), stage


def run(
    images: int = 5_000,
    test_images: int | None = None,
    blocks: tuple[tuple[str, str], ...] = BLOCKS,
    name: str = "quantization",
) -> pd.DataFrame:
    """Measure all students in all precisions and write the table."""
    print(describe_machine("torch", "numpy", "cvxdistill"))
    photos, _ = load_cifar10("train", images)
    test, labels = load_cifar10("test", test_images)
    rows: list[dict[str, Any]] = []
    for network, block_name in blocks:
        teacher = load_teacher(network)
        prepared = normalise(photos, teacher.mean, teacher.std)
        tested = normalise(test, teacher.mean, teacher.std)
        rest, stage = stage_of(teacher.model, block_name)
        with capture(teacher.model, stage, tested, verbose=0) as captured:
            stage_inputs = np.array(captured.inputs)
        with capture(teacher.model, block_name, tested, verbose=0) as captured:
            inputs, outputs = np.array(captured.inputs), np.array(captured.outputs)
        top = accuracy(rest, stage_inputs, labels)
        size = ModelSize(bytes=True)
        print(
            f"\n{network} {block_name}: model of {size.model(teacher.model):,} bytes, accuracy "
            f"{top:.4f} on {len(labels):,} test images",
            flush=True,
        )
        for kind, options in STUDENTS.items():
            start = time.perf_counter()
            result = cvxdistill.distill(
                teacher.model, block_name, prepared, **{**DISTILL, **options}
            )
            print(f"{kind}: distilled in {time.perf_counter() - start:.0f} s", flush=True)
            given = result.student
            swapped = cvxdistill.swap_block(rest, block_name, given)
            for stored, student in variants(given).items():
                # ``swap_block`` would make it float32 again.
                model = in_place_of(swapped, block_name, student)
                whole = in_place_of(result.model, block_name, student)
                row = {"network": network, "block": block_name, "student": kind, "stored": stored}
                row |= {"units": result.report.chosen.n_neurons, "gates": given.n_gates}
                row |= {"student_bytes": student.bytes_stored, "model_bytes": size.model(whole)}
                row |= measure(student, given, inputs, outputs)
                row |= {"accuracy": accuracy(model, stage_inputs, labels)}
                rows.append({**row, "teacher_accuracy": top})
            shown = pd.DataFrame(rows)
            shown = shown[(shown.network == network) & (shown.student == kind)]
            print(
                shown.drop(columns=["network", "block", "student", "teacher_accuracy"]).to_string(
                    index=False, float_format="%.4f"
                ),
                flush=True,
            )
    frame = pd.DataFrame(rows)
    RESULTS.mkdir(exist_ok=True)
    frame.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.6g")
    return frame


def in_place_of(model: nn.Module, block: str, student: nn.Module) -> nn.Module:
    """A copy of the model with this very student, in its own precision, in a block's place."""
    return copy.deepcopy(model, {id(model.get_submodule(block)): student})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5_000, help="unlabelled training images")
    parser.add_argument("--test-images", type=int, default=None, help="default: all 10,000")
    arguments = parser.parse_args()
    run(arguments.images, arguments.test_images)
