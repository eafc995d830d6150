"""MNIST's ten digits, one-hot, in one programme: seconds and memory to a certified gap of 1e-4.

    python bench/mnist_outputs.py

60,000 images of 784 pixels in [0, 1], less their mean, in float32; 100 standard normal gates of
seed 0, penalty "neuron", 0.01 alpha_max, the solver that suits the programme, all cores. Memory is
the largest resident set of the process, with libraries and data.
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from datasets import load_mnist
from machine import describe_machine

from cvxdistill.solvers import (
    GatedReLUProblem,
    activation_patterns,
    choose_solver,
    sample_gates,
)

RESULTS = Path(__file__).resolve().parent / "results" / "mnist_outputs.csv"
IMAGES, GATES, STRENGTH, GAP = 60_000, 100, 0.01, 1e-4


def measure(images: np.ndarray, labels: np.ndarray, verbose: int = 0) -> dict[str, Any]:
    """The row of so many images."""
    X = images.reshape(len(images), -1).astype(np.float32) / 255
    X -= X.mean(axis=0)
    D, _ = activation_patterns(X, sample_gates(X.shape[1], GATES, random_state=0))
    problem = GatedReLUProblem(X, np.eye(10)[labels], D)
    solver = choose_solver(problem, tol=GAP, verbose=verbose)
    solution = solver.solve(problem, STRENGTH * problem.alpha_max())
    return {
        "images": len(X),
        "gates": D.shape[1],
        "solver": type(solver).__name__,
        "seconds": solution.seconds,
        "n_iter": solution.n_iter,
        "status": solution.status,
        "relative_gap": solution.relative_gap,
        "active_gates": solution.n_active_gates,
        "peak_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


@click.command()
def main() -> None:
    """Solve, print the row, and write it."""
    print(describe_machine("numpy", "numba", "cvxdistill"), flush=True)
    pictures, labels = load_mnist("train")
    row = measure(pictures[:IMAGES], labels[:IMAGES], verbose=1)
    table = pd.DataFrame([row])
    print(table.to_string(index=False, float_format="%.3g"))
    RESULTS.parent.mkdir(exist_ok=True)
    table.to_csv(RESULTS, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
