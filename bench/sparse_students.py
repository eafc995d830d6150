"""Whole networks made smaller by ``Compressor``, with and without sparse students, beside pruning.

    CVXDISTILL_DATA=... python bench/sparse_students.py
    CVXDISTILL_DATA=... python bench/sparse_students.py --network resnet18 --times 10,20,40

10,000 unlabelled training images, no fine-tuning; the 10,000 test images and their labels are used
once for each network. Pruning keeps the weights of the largest magnitude, of each layer the same
share or of all layers together, with the running means of the batch norms estimated anew: the best
of both by held-out images. Its numbers are the weights that are left and the biases; those of
sparse students count the places, too. Writes ``bench/results/sparse_students_*.csv``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from baselines import pruned, stored_numbers, with_norms_anew
from datasets import load_cifar10, normalise
from machine import describe_machine
from teachers import accuracy, load_teacher
from torch import Tensor, nn

import cvxdistill

HERE = Path(__file__).resolve().parent
IMAGES, HELD_OUT = 10_000, 1_000
HEADS = {"resnet18": "fc", "resnet20": "linear"}


def answers(model: nn.Module, images: Tensor) -> np.ndarray:
    """The classes that a model chooses."""
    with torch.inference_mode():
        return torch.cat([model(part).argmax(1) for part in images.split(250)]).numpy()


def best_pruned(model: nn.Module, budget: int, images: Tensor) -> nn.Module:
    """Of both ways that which classifies most of the last images as the original does.

    ``budget`` is for the convolutions and their biases.
    """
    held_out = images[-HELD_OUT:]
    wanted = answers(model, held_out)
    found = [
        with_norms_anew(pruned(model, budget, alike=alike), images[:-HELD_OUT])
        for alike in (True, False)
    ]
    return max(found, key=lambda each: (answers(each, held_out) == wanted).mean())


@click.command()
@click.option("--network", default="resnet20", show_default=True, type=click.Choice([*HEADS]))
@click.option("--times", default="2,4,8", show_default=True, help="How much smaller.")
@click.option("--images", default=IMAGES, show_default=True, help="Unlabelled training images.")
def main(network: str, times: str, images: int) -> None:
    """Compress, prune, measure, and write a table."""
    torch.set_num_threads(1)
    print(describe_machine("torch", "numpy", "cvxdistill"), flush=True)
    teacher = load_teacher(network)
    photos, _ = load_cifar10("train", images)
    test, labels = load_cifar10("test", None)
    inputs = torch.from_numpy(normalise(photos, teacher.mean, teacher.std))
    test_inputs = normalise(test, teacher.mean, teacher.std)
    before = sum(p.numel() for p in teacher.model.parameters())
    top = accuracy(teacher.model, test_inputs, labels)
    print(f"teacher: {before:,} parameters, accuracy {top:.4f}", flush=True)
    head = sum(p.numel() for p in teacher.model.get_submodule(HEADS[network]).parameters())
    compressors = {}
    for kind, sparse in (("low rank", False), ("sparse too", True)):
        start = time.process_time()
        compressors[kind] = cvxdistill.Compressor(
            teacher.model, inputs, criterion="agreement", sparse=sparse, verbose=0
        )
        print(f"curves, {kind}: {time.process_time() - start:.0f} CPU s", flush=True)
    rows: list[dict[str, Any]] = []
    for factor in sorted(float(text) for text in times.split(",")):
        budget = int(before / factor)
        for kind in (*compressors, "pruning"):
            start = time.process_time()
            otherwise = float("nan")
            if kind == "pruning":
                model = best_pruned(teacher.model, budget - head, inputs)
                numbers = stored_numbers(model) + head
            else:
                result = compressors[kind].compress(max_parameters=budget)
                model, numbers, otherwise = result.model, result.after, result.error
            rows.append(
                {
                    "times_smaller": factor,
                    "students": kind,
                    "numbers": numbers,
                    "classified_otherwise": otherwise,
                    "accuracy": accuracy(model, test_inputs, labels),
                    "cpu_seconds": time.process_time() - start,
                }
            )
            print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
    output = HERE / "results" / f"sparse_students_{network}.csv"
    pd.DataFrame(rows).to_csv(output, index=False, float_format="%.6g")
    print(f"teacher: {top:.4f}; wrote {output.relative_to(HERE.parent)}")


if __name__ == "__main__":
    main()
