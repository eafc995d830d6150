"""Generated gates beside sampled ones on 14 UCI tables: objective, violation and test error.

    python bench/gate_generation.py                  all tables
    python bench/gate_generation.py --tables wine    some of them

C-GReLU with squared loss, penalty "neuron", an intercept and at most 100 gates, at 0.1 and 0.01
alpha_max of the training problem with standard normal gates: the same alpha for all. The test rows
are the first fifth of ``default_rng(0).permutation(n)``; inputs and numbers are scaled to mean 0
and standard deviation 1 over the training rows. (The tables come scaled over all rows, which
scaling again undoes.) Two classes are one column of +1 and -1, more are one-hot columns.

The violation is that of the worst gate *found* outside the set, which one local search looks for
after each solve: max R°(C_g) / alpha - 1, with biases where the gates have them. It would be 0 at
the optimum over all gates. The test error is the share of wrong labels, or the root mean square
error in training standard deviations.
"""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from datasets import UCI_TABLES, load_uci
from machine import describe_machine
from uci_rfista import chosen

from cvxdistill.solvers import (
    RFISTA,
    GatedOperator,
    GatedReLUProblem,
    Solution,
    activation_patterns,
    draw_gates,
    evaluate_gates,
    generate_gates,
    violating_gates,
)
from cvxdistill.solvers.gate_samplers import GATE_SAMPLERS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "gate_generation"
CACHE = HERE / ".cache" / "gate_generation"
N_GATES = 100
ALPHA_RATIOS = (0.1, 0.01)
GATES_PER_ROUND = 10
SOLVER = RFISTA(tol=1e-3, max_iter=10**6, time_limit=60.0)
BASELINE = "gaussian"
GENERATED = {"generated": False, "generated-bias": True}
METHODS = (*GATE_SAMPLERS, *GENERATED)
# Starts of a search: fewer where each takes long.
MANY_ROWS, STARTS, STARTS_OF_MANY_ROWS = 10_000, 32, 6


class Split(NamedTuple):
    """Scaled inputs and targets (n, c) of a table, and the labels or numbers to predict."""

    X: np.ndarray
    Y: np.ndarray
    X_test: np.ndarray
    y_test: np.ndarray
    classes: np.ndarray | None


def split_table(table: str) -> Split:
    """Return training and test rows of a table, scaled by what the training rows say."""
    X, y = load_uci(table)
    order = np.random.default_rng(0).permutation(len(X))
    test, train = order[: len(X) // 5], order[len(X) // 5 :]
    X = X.astype(np.float64)
    deviation = X[train].std(axis=0)
    X = (X - X[train].mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    if y.dtype.kind == "f":
        y = y.astype(np.float64)
        y = (y - y[train].mean()) / y[train].std()
        return Split(X[train], y[train, None], X[test], y[test], None)
    classes = np.unique(y)
    one_hot = (y[train, None] == classes).astype(np.float64)
    Y = 2 * one_hot[:, 1:] - 1 if len(classes) == 2 else one_hot
    return Split(X[train], Y, X[test], y[test], classes)


def prediction_error(split: Split, Z: np.ndarray) -> float:
    """Return the share of wrong labels, or the root mean square error, of predictions Z."""
    if split.classes is None:
        return float(np.sqrt(np.mean((Z[:, 0] - split.y_test) ** 2)))
    if len(split.classes) == 2:
        predicted = split.classes[(Z[:, 0] > 0).astype(int)]
    else:
        predicted = split.classes[Z.argmax(axis=1)]
    return float(np.mean(predicted != split.y_test))


def run(split: Split, method: str, alpha: float) -> dict[str, Any]:
    """Return the figures of one way to choose gates."""
    X, Y = split.X, split.Y
    starts = STARTS if len(X) < MANY_ROWS else STARTS_OF_MANY_ROWS
    start = time.perf_counter()
    if method in GENERATED:
        generated = generate_gates(
            X,
            Y,
            alpha=alpha,
            n_gates=N_GATES,
            n_initial=GATES_PER_ROUND,
            gates_per_round=GATES_PER_ROUND,
            bias=GENERATED[method],
            solver=SOLVER,
            n_starts=starts,
            tol=1e-2,
            max_rounds=25,
            random_state=0,
            fit_intercept=True,
        )
        seconds = time.perf_counter() - start
        G, solution, violation = generated.G, generated.solution, generated.violation
        rounds, status = len(generated.rounds), generated.status
    else:
        D, G = activation_patterns(X, draw_gates(method, X, Y, N_GATES, 0))
        problem = GatedReLUProblem(X, Y, D, fit_intercept=True)
        solution = SOLVER.solve(problem, alpha)
        seconds = time.perf_counter() - start
        R = problem.residual(problem.forward(solution.V))
        _, values = violating_gates(X, R, alpha, G=G, n_starts=starts, random_state=0)
        violation = values.max(initial=alpha) / alpha - 1
        rounds, status = 1, solution.status
    return {
        "method": method,
        "gates": G.shape[1],
        "active_gates": solution.n_active_gates,
        "objective": solution.objective,
        "relative_gap": solution.relative_gap,
        "violation": violation,
        "test_error": prediction_error(split, predict(split.X_test, G, solution)),
        "rounds": rounds,
        "status": status,
        "seconds": seconds,
    }


def predict(X: np.ndarray, G: np.ndarray, solution: Solution) -> np.ndarray:
    """Return the predictions (n, c) of a gated ReLU solution for other rows."""
    return GatedOperator(X, evaluate_gates(X, G)).forward(solution.V) + solution.intercept


def compare(table: str, ratio: float) -> list[dict[str, Any]]:
    """Return one row for each way to choose gates."""
    split = split_table(table)
    D, _ = activation_patterns(split.X, draw_gates(BASELINE, split.X, split.Y, N_GATES, 0))
    alpha = ratio * GatedReLUProblem(split.X, split.Y, D, fit_intercept=True).alpha_max()
    if split.classes is None:
        constant = float(np.sqrt(np.mean(split.y_test**2)))
    else:
        majority = split.Y.mean(axis=0)
        constant = prediction_error(split, np.tile(majority, (len(split.y_test), 1)))
    shared = {
        "table": table,
        "n": len(split.X),
        "n_test": len(split.X_test),
        "d": split.X.shape[1],
        "c": split.Y.shape[1],
        "alpha_ratio": ratio,
        "alpha": alpha,
        "constant_error": constant,
    }
    return [shared | run(split, method, alpha) for method in METHODS]


def report(rows: pd.DataFrame) -> str:
    """Return the aligned table and, for each method, medians beside Gaussian gates."""
    lines = [
        f"{'table':18}{'alpha':>6} {'method':15}{'gates':>6}{'objective':>11}{'to gaussian':>12}"
    ]
    lines[0] += f"{'violation':>11}{'test error':>12}{'seconds':>9}"
    for row in relative_to_baseline(rows).itertuples():
        lines.append(
            f"{row.table:18}{row.alpha_ratio:>6g} {row.method:15}{row.active_gates:>6}"
            f"{row.objective:>11.5f}{row.objective_ratio:>12.3f}{row.violation:>11.3g}{row.test_error:>12.4f}"
            f"{row.seconds:>9.2f}"
        )
    keys = ["alpha_ratio", "method"]
    for (ratio, method), group in relative_to_baseline(rows).groupby(keys, sort=False):
        fewer = int((group["error_difference"] < 0).sum())
        more = int((group["error_difference"] > 0).sum())
        lines.append(
            f"{ratio:>5g} {method:15} objective / gaussian: median "
            f"{group['objective_ratio'].median():.3f}, {group['objective_ratio'].min():.3f} to "
            f"{group['objective_ratio'].max():.3f}; violation: median "
            f"{group['violation'].median():.2f}; test error lower on {fewer}, higher on {more} of "
            f"{len(group)} tables, mean difference {group['error_difference'].mean():+.4f}"
        )
    return "\n".join(lines)


def relative_to_baseline(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows with the objective over that of Gaussian gates and the errors' difference."""
    keys = ["table", "alpha_ratio"]
    figures = ["objective", "test_error"]
    base = rows[rows["method"] == BASELINE].set_index(keys)[figures].add_prefix("base_")
    beside = rows.join(base, on=keys)
    return rows.assign(
        objective_ratio=beside["objective"] / beside["base_objective"],
        error_difference=beside["test_error"] - beside["base_test_error"],
    )


def draw(rows: pd.DataFrame, file: Path) -> None:
    """Draw objectives, violations and test errors of all methods, table by table."""
    rows = relative_to_baseline(rows)
    tables = list(dict.fromkeys(rows["table"]))
    panels = {
        "objective_ratio": "objective / Gaussian gates'",
        "violation": "largest violation found",
        "error_difference": "test error - Gaussian gates'",
    }
    figure, axes = plt.subplots(2, 3, figsize=(13, 11), sharey=True, sharex="col")
    for line, ratio in zip(axes, ALPHA_RATIOS):
        for ax, (column, title) in zip(line, panels.items()):
            for k, method in enumerate(METHODS):
                chosen_rows = (rows["method"] == method) & (rows["alpha_ratio"] == ratio)
                values = rows[chosen_rows].set_index("table")[column].reindex(tables)
                generated = method in GENERATED
                ax.scatter(
                    values,
                    range(len(tables)),
                    marker="D" if generated else ".",
                    color=("k", "tab:red")[GENERATED[method]] if generated else f"C{k}",
                    label=method,
                    zorder=3 if generated else 2,
                )
            ax.set_title(f"{title}, {ratio:g} alpha_max")
            ax.grid(axis="y", color="0.9")
        line[0].axvline(1, color="0.6", lw=1, zorder=0)
        line[2].axvline(0, color="0.6", lw=1, zorder=0)
        line[1].set_xscale("symlog", linthresh=0.01)
    axes[0, 0].set_yticks(range(len(tables)), tables)
    axes[0, 0].invert_yaxis()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, fontsize=8)
    figure.suptitle(f"at most {N_GATES} gates")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(file, dpi=100)
    plt.close(figure)


@click.command()
@click.option("--tables", help="Comma-separated names; all by default.")
def main(tables: str | None) -> None:
    """Compare ways to choose gates; an interrupted run goes on where it stopped.

    The CSV and the picture in bench/results are written by a run over all tables; a smaller one
    leaves its own in bench/.cache/gate_generation.
    """
    names = chosen(tables, UCI_TABLES, "--tables")
    output = RESULTS if set(names) == set(UCI_TABLES) else CACHE / "subset"
    CACHE.mkdir(parents=True, exist_ok=True)
    RESULTS.parent.mkdir(exist_ok=True)
    unfinished = CACHE / "unfinished.csv"
    machine = describe_machine("numpy", "numba", "cvxdistill")
    print(machine, flush=True)
    keys = ["table", "alpha_ratio"]
    done = pd.read_csv(unfinished) if unfinished.exists() else pd.DataFrame(columns=keys)
    finished = set(zip(done["table"], done["alpha_ratio"]))
    start = time.perf_counter()
    for table, ratio in product(names, ALPHA_RATIOS):
        if (table, ratio) in finished:
            continue
        new = pd.DataFrame(compare(table, ratio))
        new.to_csv(unfinished, mode="a", header=not unfinished.exists(), index=False)
        print(f"[{time.perf_counter() - start:4.0f} s] {table}, {ratio:g} alpha_max", flush=True)
    rows = pd.read_csv(unfinished)
    rows = rows[rows["table"].isin(names)]
    print(report(rows))
    print(machine)
    rows.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
    draw(rows, output.with_suffix(".png"))
    unfinished.unlink()
    print(f"wrote {output.relative_to(HERE.parent)}.csv and .png")


if __name__ == "__main__":
    main()
