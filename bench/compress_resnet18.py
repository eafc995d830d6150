"""A whole ResNet-18 made 15 to 60 times smaller by one ``Compressor``.

    CVXDISTILL_DATA=... python bench/compress_resnet18.py

50,000 unlabelled training images, no fine-tuning. The 10,000 test images and their labels are used
once for each compressed network, after every choice is made. Writes
``bench/results/compress_resnet18.csv`` and ``.png``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import torch
from datasets import load_cifar10, normalise
from machine import describe_machine
from teachers import accuracy, load_teacher

import cvxdistill

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "compress_resnet18"
CACHE = HERE / ".cache"


@click.command()
@click.option("--images", default=50_000, show_default=True, help="Unlabelled training images.")
@click.option("--times", default="15,20,40,60", show_default=True, help="How much smaller.")
@click.option("--test-images", default=None, type=int, help="All 10,000 by default.")
@click.option("--threads", default=None, type=int, help="Of torch.")
@click.option("--sparse", is_flag=True, help="Students of few weights, too; into bench/.cache.")
@click.option("--verbose", default=0, show_default=True)
def main(
    images: int,
    times: str,
    test_images: int | None,
    threads: int | None,
    sparse: bool,
    verbose: int,
) -> None:
    """Compress, measure, and write a table and a picture."""
    if threads:
        torch.set_num_threads(threads)
    print(describe_machine("torch", "numpy", "cvxdistill"), flush=True)
    teacher = load_teacher("resnet18")
    train, _ = load_cifar10("train", images)
    test, labels = load_cifar10("test", test_images)
    inputs = normalise(train, teacher.mean, teacher.std)
    test_inputs = normalise(test, teacher.mean, teacher.std)
    before = sum(p.numel() for p in teacher.model.parameters())
    top = accuracy(teacher.model, test_inputs, labels)
    print(f"teacher: {before:,} parameters, accuracy {top:.4f}", flush=True)
    start = time.perf_counter()
    compressor = cvxdistill.Compressor(
        teacher.model, inputs, criterion="agreement", sparse=sparse, verbose=verbose
    )
    curves = time.perf_counter() - start
    rows: list[dict[str, Any]] = []
    figure, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for factor in sorted(float(text) for text in times.split(",")):
        start = time.perf_counter()
        result = compressor.compress(max_parameters=int(before / factor))
        seconds = time.perf_counter() - start
        print(f"\n{result}\n", flush=True)
        reached = accuracy(result.model, test_inputs, labels)
        stored = sum(t.numel() for t in result.model.state_dict().values())
        rows.append(
            {
                "asked": factor,
                "parameters": result.after,
                "times_smaller": before / result.after,
                "state_dict_numbers": stored,
                "students": len(result.choices),
                "classified_otherwise": result.error,
                "accuracy": reached,
                "loss_points": 100 * (top - reached),
                "seconds_of_curves": curves,
                "seconds": seconds,
            }
        )
        print(pd.DataFrame(rows).to_string(index=False, float_format="%.4g"), flush=True)
        if len(rows) == 1:
            ax.step(*result.frontier.T, where="post", label="predicted, best allocation")
        ax.plot(result.after, result.error, "o", color="C1")
        label = f"{before / result.after:.0f} x, {100 * reached:.2f} %"
        ax.annotate(label, (result.after, result.error), fontsize=8, ha="left", va="bottom")
    ax.set(xscale="log", xlabel="parameters", ylabel="held-out examples classified otherwise")
    ax.set_title(f"ResNet-18 on CIFAR-10 ({100 * top:.2f} %), no labels, no fine-tuning")
    ax.legend(fontsize=8)
    whole = images == 50_000 and test_images is None and not sparse
    output = RESULTS if whole else CACHE / "compress_resnet18"
    output.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
    figure.savefig(output.with_suffix(".png"), dpi=110)
    print(f"wrote {output.relative_to(HERE.parent)}.csv and .png")


if __name__ == "__main__":
    main()
