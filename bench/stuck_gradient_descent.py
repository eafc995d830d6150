"""Gradient descent gets stuck: ten seeds of SGD against the exact convex programme on toy data.

    python bench/stuck_gradient_descent.py            four data sets, four widths, ten seeds
    python bench/stuck_gradient_descent.py --quick    fewer of each, into bench/.cache

A two-layer ReLU network with weight decay,

    P(W1, W2) = 1/(2n) ||relu(X W1) W2 - y||^2 + alpha/2 (||W1||^2 + ||W2||^2),

is trained by SGD in torch: batches of n/5 examples, momentum 0.9, a cosine schedule down to zero,
and for each data set and width the best of five learning rates. Where SGD ends, L-BFGS on all
examples goes on for as long as its line search descends. It often ends at once, on the kink of an
example; how little more steps of SGD bring is seen with ``--epochs 16000``.

C-ReLU over *every* activation pattern is solved to a certified gap. Its optimum is that of all
networks with at least m* neurons, m* <= n, and its solution is such a network. How many neurons
suffice is counted: a linear programme re-weights those of the solution at no higher objective, and
a vertex of it has at most n. The excess of SGD is measured from that network's objective.

The data, with a constant feature as the last column of X and alpha = 0.01 alpha_max:

    five points    x = -2, -1, 0, 1, 2 and y = 1, -1, 1, 1, -1 (Pilanci and Ergen 2020)
    planted        25 points N(0, I), y a network of five neurons with N(0, 1) weights, no noise
    xor            the same points, y = sign(x_1 x_2)
    random signs   the same points, y = +1 or -1 by a fair coin
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from machine import describe_machine
from scipy.optimize import linprog, minimize

from cvxdistill.solvers import (
    ADMM,
    GatedReLUProblem,
    ReLUProblem,
    activation_patterns,
    enumerate_gates,
    neurons_from_weights,
)

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "stuck_gradient_descent"
CACHE = HERE / ".cache"
DATA = ("five points", "planted", "xor", "random signs")
WIDTHS = (5, 10, 25, 100)
QUICK_DATA, QUICK_WIDTHS = ("five points", "random signs"), (5, 25)
LEARNING_RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
ALPHA_SHARE = 0.01
TOLERANCE, REFINEMENTS = 1e-3, 5000  # certified relative gap; iterations after that
N_POINTS, N_TEACHERS = 25, 5
BATCHES, MOMENTUM = 5, 0.9
RECORD_EVERY = 10  # epochs
STUCK = 0.01  # relative excess over the optimum
SHOWN = ("random signs", 25)  # the training curves in the picture


@dataclass(frozen=True)
class Optimum:
    """A network found by convex optimisation, its objective, and by how much it can exceed P*."""

    objective: float
    gap: float
    W1: np.ndarray
    W2: np.ndarray


@dataclass(frozen=True)
class Training:
    """Networks (runs, d, m), (runs, m, 1) after SGD, and their objectives at ``epochs``."""

    W1: torch.Tensor
    W2: torch.Tensor
    epochs: np.ndarray
    objectives: np.ndarray


def toy_data(name: str) -> tuple[np.ndarray, np.ndarray]:
    """X (n, d), whose last column is constant, and y (n,)."""
    if name == "five points":
        x = np.arange(-2.0, 3.0)
        return np.column_stack([x, np.ones(5)]), np.array([1.0, -1.0, 1.0, 1.0, -1.0])
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.standard_normal((N_POINTS, 2)), np.ones(N_POINTS)])
    if name == "planted":
        W1, W2 = rng.standard_normal((3, N_TEACHERS)), rng.standard_normal(N_TEACHERS)
        return X, np.maximum(X @ W1, 0) @ W2
    if name == "xor":
        return X, np.sign(X[:, 0] * X[:, 1])
    return X, rng.choice([-1.0, 1.0], N_POINTS)


def network_objective(
    X: torch.Tensor, y: torch.Tensor, W1: torch.Tensor, W2: torch.Tensor, alpha: float
) -> torch.Tensor:
    """P(W1, W2) of each network; W1 (..., d, m), W2 (..., m, 1)."""
    error = (torch.relu(X @ W1) @ W2).squeeze(-1) - y
    decay = W1.square().sum((-2, -1)) + W2.square().sum((-2, -1))
    return error.square().mean(-1) / 2 + alpha / 2 * decay


def network_gradient(
    X: torch.Tensor, y: torch.Tensor, W1: torch.Tensor, W2: torch.Tensor, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of ``network_objective``, each network on its own examples X (runs, n, d).

    Written out, because a tape costs more than the products of networks this small.
    """
    H = torch.relu(X @ W1)
    error = (H @ W2 - y[..., None]) / y.shape[-1]
    return X.mT @ ((error @ W2.mT) * (H > 0)) + alpha * W1, H.mT @ error + alpha * W2


def train(
    X: np.ndarray,
    y: np.ndarray,
    alpha: float,
    width: int,
    learning_rates: tuple[float, ...],
    seeds: int,
    epochs: int,
) -> Training:
    """SGD on seeds x learning rates networks at once; run k has seed k % seeds.

    Weights start as those of ``torch.nn.Linear``: uniform within 1 / sqrt(inputs). Runs that
    differ in their learning rate only start at the same weights and see the same batches.
    """
    inputs, targets = torch.from_numpy(X), torch.from_numpy(y)
    n, d = X.shape
    generators = [torch.Generator().manual_seed(seed) for seed in range(seeds)]

    def draw_for_each_run(*shape: int) -> torch.Tensor:
        drawn = [torch.rand(shape, generator=g, dtype=torch.float64) for g in generators]
        return torch.stack(drawn).repeat(len(learning_rates), *(1 for _ in shape))

    W1 = (2 * draw_for_each_run(d, width) - 1) / d**0.5
    W2 = (2 * draw_for_each_run(width, 1) - 1) / width**0.5
    V1, V2 = torch.zeros_like(W1), torch.zeros_like(W2)
    peak = torch.tensor(learning_rates, dtype=torch.float64).repeat_interleave(seeds)[:, None, None]
    recorded = [network_objective(inputs, targets, W1, W2, alpha)]
    for epoch in range(epochs):
        order = draw_for_each_run(n).argsort(dim=1)
        for k, batch in enumerate(order.split(n // BATCHES, dim=1)):
            rate = peak * (1 + np.cos(np.pi * (epoch + k / BATCHES) / epochs)) / 2
            G1, G2 = network_gradient(inputs[batch], targets[batch], W1, W2, alpha)
            W1 -= rate * V1.mul_(MOMENTUM).add_(G1)
            W2 -= rate * V2.mul_(MOMENTUM).add_(G2)
        if (epoch + 1) % RECORD_EVERY == 0 or epoch + 1 == epochs:
            recorded.append(network_objective(inputs, targets, W1, W2, alpha))
    at = [0, *(e for e in range(1, epochs + 1) if e % RECORD_EVERY == 0 or e == epochs)]
    objectives = torch.stack(recorded).numpy()
    return Training(W1, W2, np.array(at), np.where(np.isfinite(objectives), objectives, np.inf))


def descend(X: np.ndarray, y: np.ndarray, alpha: float, W1: np.ndarray, W2: np.ndarray) -> float:
    """The objective at which L-BFGS on all examples ends that starts at this network."""
    inputs, targets, shape = torch.from_numpy(X), torch.from_numpy(y), W1.shape

    def objective(w: np.ndarray) -> tuple[float, np.ndarray]:
        layers = torch.from_numpy(w[: W1.size]).view(shape), torch.from_numpy(w[W1.size :, None])
        gradient = [G.numpy().ravel() for G in network_gradient(inputs, targets, *layers, alpha)]
        return network_objective(inputs, targets, *layers, alpha).item(), np.concatenate(gradient)

    start = np.concatenate([W1.ravel(), W2.ravel()])
    options = {"maxiter": 5000, "ftol": 1e-14, "gtol": 1e-10}
    return float(minimize(objective, start, jac=True, method="L-BFGS-B", options=options).fun)


def convex_optimum(X: np.ndarray, y: np.ndarray) -> tuple[float, Optimum]:
    """Alpha, and the optimum of C-ReLU over all activation patterns.

    The solution over all patterns gives the lower bound. Another over those that it uses is
    nearer to the optimum in less time.
    """
    D, G = activation_patterns(X, enumerate_gates(X))
    alpha = ALPHA_SHARE * GatedReLUProblem(X, y, D).alpha_max()
    whole = ADMM(tol=TOLERANCE, max_iter=100_000).solve(ReLUProblem(X, y, D, G=G), alpha)
    if not whole.converged:
        raise RuntimeError(f"The convex programme is not solved: {whole.message}.")
    used = np.flatnonzero(whole.V.any(axis=(0, 2, 3)))
    refined = ADMM(tol=1e-7, max_iter=REFINEMENTS).solve(
        ReLUProblem(X, y, D[:, used], G=G[:, used]), alpha, warm_start=whole.V[:, used]
    )
    best = min(whole, refined, key=lambda solution: solution.objective)
    network = neurons_from_weights(best.V)
    W1, W2 = fewest_neurons(X, network.W1, network.W2)
    objective = network_objective(*map(torch.from_numpy, (X, y, W1, W2)), alpha).item()
    return alpha, Optimum(objective, objective - whole.objective + whole.duality_gap, W1, W2)


def fewest_neurons(X: np.ndarray, W1: np.ndarray, W2: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most n neurons with the same predictions and no more weight decay; W2 (m, 1).

    A vertex of min sum_h t_h |W2_h| ||W1_h||  subject to  sum_h t_h relu(X W1_h) W2_h =
    relu(X W1) W2, t >= 0, with each layer of neuron h scaled by sqrt(t_h).
    """
    contributions = np.maximum(X @ W1, 0) * W2.T
    sizes = np.linalg.norm(W1, axis=0) * np.abs(W2[:, 0])
    vertex = linprog(sizes, A_eq=contributions, b_eq=contributions.sum(axis=1), method="highs-ds").x
    kept = vertex > 0
    scale = np.sqrt(vertex[kept])
    return W1[:, kept] * scale, W2[kept] * scale[:, None]


def compare(name: str, widths: tuple[int, ...], seeds: int, epochs: int) -> tuple[list, dict]:
    """The rows of one data set's table, and the curves (epochs, objectives) of its widths."""
    start = time.perf_counter()
    X, y = toy_data(name)
    alpha, optimum = convex_optimum(X, y)
    print(
        f"{name}: alpha {alpha:.4g}, optimum {optimum.objective:.6g}, relative gap "
        f"{optimum.gap / optimum.objective:.0e}, {optimum.W1.shape[1]} neurons suffice "
        f"({time.perf_counter() - start:.1f} s)",
        flush=True,
    )
    rows, curves = [], {}
    for width in widths:
        training = train(X, y, alpha, width, LEARNING_RATES, seeds, epochs)
        finals = training.objectives[-1].reshape(-1, seeds)
        best = int(finals.mean(axis=1).argmin())
        runs = slice(best * seeds, (best + 1) * seeds)
        curves[width] = training.epochs, training.objectives[:, runs], optimum.objective
        weights = zip(training.W1[runs].numpy(), training.W2[runs].numpy())
        for seed, (W1, W2) in enumerate(weights):
            rows.append(
                {
                    "data": name,
                    "n": len(X),
                    "alpha": alpha,
                    "optimum": optimum.objective,
                    "duality_gap": optimum.gap,
                    "sufficient_neurons": optimum.W1.shape[1],
                    "width": width,
                    "seed": seed,
                    "learning_rate": LEARNING_RATES[best],
                    "sgd": finals[best, seed],
                    "sgd_then_lbfgs": descend(X, y, alpha, W1, W2),
                    "sgd_best_rate_of_seed": finals[:, seed].min(),
                }
            )
    return rows, curves


def excess(table: pd.DataFrame) -> pd.Series:
    """By how much SGD and then L-BFGS end above the optimum, relative to it."""
    return table["sgd_then_lbfgs"] / table["optimum"] - 1


def report(table: pd.DataFrame) -> str:
    """One line for each data set and width."""
    groups = table.assign(excess=excess(table)).groupby(["data", "width"], sort=False)
    summary = groups.agg(
        sufficient=("sufficient_neurons", "first"),
        learning_rate=("learning_rate", "first"),
        best=("excess", "min"),
        median=("excess", "median"),
        worst=("excess", "max"),
        stuck=("excess", lambda values: f"{(values > STUCK).sum()} of {len(values)}"),
    )
    percent = "{:.2%}".format
    formatters = {"best": percent, "median": percent, "worst": percent}
    return (
        "Excess over the convex optimum, best learning rate, after L-BFGS; stuck: more than "
        f"{STUCK:.0%}\n{summary.to_string(formatters=formatters)}"
    )


def draw(table: pd.DataFrame, curves: dict, shown: tuple[str, int], file: Path) -> None:
    """Objective against epochs for one data set and width; the final excess by width for all."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5))
    epochs, objectives, optimum = curves[shown]
    left.plot(epochs, objectives, color="tab:red", lw=0.8, alpha=0.7)
    left.plot([], [], color="tab:red", lw=0.8, label=f"SGD, {objectives.shape[1]} seeds")
    left.axhline(optimum, color="black", ls="--", label="convex optimum, all patterns")
    left.set(yscale="log", xlabel="epochs", ylabel="objective", xlim=(0, epochs[-1]))
    sufficient = table.loc[table["data"] == shown[0], "sufficient_neurons"].iloc[0]
    left.set_title(f"{shown[0]}, {shown[1]} neurons ({sufficient} suffice)")
    left.legend()

    names, widths = list(table["data"].unique()), list(table["width"].unique())
    floor = 1e-6
    for i, (name, lines) in enumerate(table.groupby("data", sort=False)):
        offset = (i - (len(names) - 1) / 2) * 0.17
        at = lines["width"].map(widths.index) + offset
        label = f"{name} ({lines['sufficient_neurons'].iloc[0]} suffice)"
        right.scatter(at, excess(lines).clip(lower=floor), s=14, alpha=0.7, label=label)
    right.axhline(STUCK, color="0.6", lw=1, zorder=0)
    right.set(yscale="log", xlabel="neurons", ylabel="excess over the convex optimum")
    right.set_xticks(range(len(widths)), [str(width) for width in widths])
    right.set_title("where SGD, then L-BFGS, ends (P / P* - 1)")
    right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--seeds", default=10, show_default=True, type=click.IntRange(1))
@click.option("--epochs", default=4000, show_default=True, type=click.IntRange(1))
@click.option("--quick", is_flag=True, help="Two data sets, two widths, into bench/.cache.")
def main(seeds: int, epochs: int, quick: bool) -> None:
    """Train, solve, print the table and write it with its picture."""
    torch.set_num_threads(1)
    machine = describe_machine("numpy", "torch", "cvxdistill")
    print(machine)
    names, widths = (QUICK_DATA, QUICK_WIDTHS) if quick else (DATA, WIDTHS)
    output = (CACHE if quick else RESULTS.parent) / RESULTS.name
    start = time.perf_counter()
    rows, curves = [], {}
    for name in names:
        new, of_widths = compare(name, widths, seeds, epochs)
        rows += new
        curves |= {(name, width): curve for width, curve in of_widths.items()}
    table = pd.DataFrame(rows)
    print(report(table))
    output.parent.mkdir(exist_ok=True)
    table.to_csv(output.with_suffix(".csv"), index=False, float_format="%.8g")
    draw(table, curves, SHOWN, output.with_suffix(".png"))
    print(f"wrote {output}.csv and .png, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
