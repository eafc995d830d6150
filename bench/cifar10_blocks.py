"""Distil one block of a trained CIFAR-10 network and measure the accuracy at every size.

``cifar10_resnet20.py`` and ``cifar10_resnet18.py`` call this. No label is used before the accuracy
is measured, and the test images are used for nothing else.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
from datasets import load_cifar10, normalise
from machine import describe_machine
from teachers import accuracy, load_teacher

import cvxdistill

RESULTS = Path(__file__).parent / "results"


def run(
    teacher_name: str,
    block: str,
    *,
    configurations: dict[str, dict[str, Any]],
    images: int = 10_000,
    test_images: int | None = None,
    name: str,
) -> pd.DataFrame:
    """Measure the teacher and, for each configuration of ``distill``, all of its candidates.

    Parameters
    ----------
    teacher_name : {"resnet20", "resnet18"}
    block : str
    configurations : dict
        Label to keyword arguments of ``distill``.
    images : int
        Unlabelled training images.
    test_images : int, optional
        All 10,000 by default.
    name : str
        Of the CSV and PNG under ``bench/results``.
    """
    print(describe_machine("torch", "numpy", "cvxdistill"))
    teacher = load_teacher(teacher_name)
    train, _ = load_cifar10("train", images)
    test, labels = load_cifar10("test", test_images)
    train_inputs = normalise(train, teacher.mean, teacher.std)
    test_inputs = normalise(test, teacher.mean, teacher.std)
    start = time.perf_counter()
    teacher_accuracy = accuracy(teacher.model, test_inputs, labels)
    parameters = sum(p.numel() for p in teacher.model.parameters())
    print(
        f"{teacher_name}: {parameters:,} parameters, accuracy {teacher_accuracy:.4f} on "
        f"{len(labels):,} test images ({time.perf_counter() - start:.1f} s)"
    )
    rows: list[dict[str, Any]] = []
    measured: set[tuple[str, str, int]] = set()
    for label, options in configurations.items():
        result = cvxdistill.distill(teacher.model, block, train_inputs, **options)
        report = result.report
        # A linear student knows no gates: what tells two apart is the kernel.
        kernel = " x ".join(map(str, report.layout.kernel_size))
        print(f"\n{label}: {options}\n{report}\n", flush=True)
        for candidate in result.candidates:
            if candidate.n_neurons < 4:
                continue
            own_label = label if candidate.kind == "gated" else kernel
            key = (own_label, candidate.kind, candidate.n_neurons)
            if key in measured:
                continue
            measured.add(key)
            swapped = cvxdistill.swap_block(teacher.model, block, candidate.student)
            rows.append(
                {
                    "configuration": own_label,
                    "student": candidate.kind,
                    "units": candidate.n_neurons,
                    "gates": candidate.n_gates,
                    "parameters": candidate.parameters,
                    "block_share": candidate.parameters / report.block_parameters,
                    "activation_error": candidate.error,
                    "accuracy": accuracy(swapped, test_inputs, labels),
                    "relative_gap": candidate.duality_gap,
                    "alpha": candidate.alpha,
                    "seconds": candidate.seconds,
                    "chosen": candidate is report.chosen,
                }
            )
    frame = pd.DataFrame(rows)
    RESULTS.mkdir(exist_ok=True)
    frame.to_csv(RESULTS / f"{name}.csv", index=False, float_format="%.6g")
    with pd.option_context("display.width", 160, "display.max_rows", None):
        print(frame.drop(columns=["alpha"]).to_string(index=False, float_format="%.4g"))
    _draw(frame, teacher_name, block, report.block_parameters, teacher_accuracy, name)
    return frame


def _draw(
    frame: pd.DataFrame, teacher: str, block: str, block_parameters: int, top: float, name: str
) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colors: dict[tuple[str, str], str] = {}
    for (label, kind), group in frame.groupby(["configuration", "student"], sort=False):
        line = sorted(zip(group.parameters, group.accuracy, group.activation_error, strict=True))
        x, y, error = zip(*line, strict=True)
        style = "o--" if kind == "linear" else "s-"
        color = colors.setdefault((label, kind), f"C{len(colors)}")
        axes[0].semilogx(x, y, style, color=color, label=f"{kind}, {label}")
        axes[1].semilogx(x, error, style, color=color)
    axes[0].axhline(top, color="black", lw=1, label=f"teacher ({block_parameters:,} in {block})")
    axes[0].set(ylabel="test accuracy", xlabel="parameters of the student (gates included)")
    axes[1].set(ylabel="relative activation error", xlabel="parameters of the student")
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{teacher} on CIFAR-10: {block} replaced, no labels, no fine-tuning")
    figure.savefig(RESULTS / f"{name}.png", dpi=110)
    plt.close(figure)


def parse_arguments(description: str) -> argparse.Namespace:
    """--images, --test-images, --threads: smaller runs of the same shape."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--images", type=int, default=10_000, help="unlabelled training images")
    parser.add_argument("--test-images", type=int, default=None, help="default: all 10,000")
    parser.add_argument("--threads", type=int, default=None, help="torch threads")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    return arguments
