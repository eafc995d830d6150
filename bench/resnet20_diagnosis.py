"""Why one layer falls short of ResNet-20's ``layer3``: linear students by block and kernel size.

A full linear student for each block: what a wider receptive field brings, how much of the error
the pooling behind the block forgives, and what it costs to replace fewer layers.

Run ``CVXDISTILL_DATA=... python bench/resnet20_diagnosis.py``; writes
``bench/results/resnet20_diagnosis.csv``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import load_cifar10, normalise
from machine import describe_machine
from teachers import accuracy, load_teacher

import cvxdistill
from cvxdistill.adapters import capture

RESULTS = Path(__file__).parent / "results"
CASES = {
    "layer3": (1, 3, 5, 7),
    "layer3.0": (3, 5),
    "layer3.1": (3, 5),
    "layer3.2": (3, 5),
    "layer2": (3, 5),
    "layer2.2": (3,),
}


def relative(Z: np.ndarray, Y: np.ndarray) -> float:
    """||Z - Y|| / ||Y||."""
    return float(np.linalg.norm(Z - Y) / np.linalg.norm(Y))


def main() -> None:
    """Fit, measure, print and write."""
    print(describe_machine("torch", "numpy", "cvxdistill"))
    teacher = load_teacher("resnet20")
    train, _ = load_cifar10("train", 4000)
    test, labels = load_cifar10("test", 2000)
    train_inputs = normalise(train, teacher.mean, teacher.std)
    test_inputs = normalise(test, teacher.mean, teacher.std)
    print(f"teacher: {accuracy(teacher.model, test_inputs, labels):.4f}")
    rows = []
    for block, kernels in CASES.items():
        seen = capture(teacher.model, block, test_inputs, verbose=0)
        for kernel in kernels:
            result = cvxdistill.distill(
                teacher.model,
                block,
                train_inputs,
                student="linear",
                kernel_size=kernel,
                n_neurons=64,
                verbose=0,
            )
            with torch.inference_mode():
                Z = result.student(torch.from_numpy(seen.inputs)).numpy()
            rows.append(
                {
                    "block": block,
                    "kernel": kernel,
                    "block_parameters": result.report.block_parameters,
                    "parameters": result.report.parameters,
                    "activation_error": relative(Z, seen.outputs),
                    "error_after_pooling": relative(
                        Z.mean(axis=(2, 3)), seen.outputs.mean(axis=(2, 3))
                    ),
                    "accuracy": accuracy(result.model, test_inputs, labels),
                }
            )
            print(rows[-1], flush=True)
    frame = pd.DataFrame(rows)
    print(frame.to_string(index=False, float_format="%.4g"))
    RESULTS.mkdir(exist_ok=True)
    frame.to_csv(RESULTS / "resnet20_diagnosis.csv", index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
