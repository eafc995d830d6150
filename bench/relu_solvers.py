"""The convex ReLU programme on the UCI tables: our three solvers beside pyscnn's.

For each table 100 Gaussian gates, moved clear of the rows, at 0.01 alpha_max (that of the gated
programme), neuron penalty, no intercept, float64. Ours stop at a certified relative duality gap of
1e-4 with weights in their cones; pyscnn's augmented Lagrangian by its own test with its default
tolerances. Then the ReLU network that each set of weights is gets measured alike: its objective
against our best lower bound, and how far its weights are outside their cones.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from datasets import UCI_TABLES
from machine import describe_machine
from peers.environment import peers_python
from peers.serving import Worker
from threadpoolctl import threadpool_limits
from uci_rfista import problem_data, same_order

from cvxdistill.solvers import (
    ADMM,
    RFISTA,
    AugmentedLagrangian,
    GatedReLUProblem,
    ReLUProblem,
    evaluate_gates,
    nudge_gates,
)
from cvxdistill.solvers.cones import cone_violations
from cvxdistill.solvers.gates import distinct_patterns

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "relu_solvers"
CACHE = HERE / ".cache" / "relu_solvers"
ALPHA_RATIO = 0.01
TOLERANCE = 1e-4
THREADS = 2
OURS = {"RFISTA": RFISTA, "AugmentedLagrangian": AugmentedLagrangian, "ADMM": ADMM}
PEER = "pyscnn AL"
LIMIT, PEER_LIMIT = 600.0, 60.0  # seconds
# Columns shorter than this share of the longest are rounding, and their directions say nothing.
SHORTEST_COLUMN = 1e-6


def setting(table: str) -> tuple[dict[str, np.ndarray], ReLUProblem, float]:
    """Return data with nudged gates and their distinct patterns, the problem and alpha."""
    data = problem_data(table)
    X, G = data["X"], nudge_gates(data["X"], data["G"], random_state=0)
    D = evaluate_gates(X, G)
    keep = distinct_patterns(D)
    data |= {"G": G[:, keep], "D": D[:, keep]}
    alpha = ALPHA_RATIO * GatedReLUProblem(X, data["Y"], data["D"]).alpha_max()
    return data, ReLUProblem(X, data["Y"], data["D"], G=data["G"]), alpha


def our_row(name: str, problem: ReLUProblem, alpha: float, limit: float) -> dict[str, Any]:
    """Solve with one of our solvers."""
    solver = OURS[name](tol=TOLERANCE, time_limit=limit, max_iter=10**9)
    with threadpool_limits(THREADS):
        solution = solver.solve(problem, alpha)
    return {
        "seconds": solution.seconds,
        "n_iter": solution.n_iter,
        "status": solution.status,
        "relative_gap": solution.relative_gap,
        "kkt_residual": solution.kkt_residual,
        "raw_violation": solution.trace.violation[-1],
        "lower_bound": solution.objective - solution.duality_gap,
        **measured(problem, solution.V, alpha),
    }


def peer_row(
    data: dict[str, np.ndarray], problem: ReLUProblem, alpha: float, limit: float, worker: Worker
) -> dict[str, Any]:
    """Solve with pyscnn's augmented Lagrangian."""
    CACHE.mkdir(parents=True, exist_ok=True)
    data_file, result_file = CACHE / "data.npz", CACHE / "result.npz"
    np.savez(data_file, **data)
    answer = worker(data=str(data_file), result=str(result_file), alpha=alpha, time_limit=limit)
    with np.load(result_file) as file:
        V = np.stack([same_order(side, file["D"], data["D"]) for side in file["V"]])
    names = ("seconds", "n_iter", "status")
    return {name: answer[name] for name in names} | measured(problem, V[..., None], alpha)


def measured(problem: ReLUProblem, V: np.ndarray, alpha: float) -> dict[str, float]:
    """Objective of the ReLU network with weights V, and the violation of its longer columns."""
    W = V.reshape(-1, *V.shape[2:])
    violations = cone_violations(problem.operator.X, problem.operator.D, W)
    lengths = np.linalg.norm(W, axis=1)
    long = lengths > SHORTEST_COLUMN * lengths.max()
    return {
        "objective": problem.objective(V, 0.0, alpha),
        "violation": float(violations[long].max(initial=0.0)),
        "active_neurons": int(long.sum()),
    }


def compare(table: str, limit: float, peer_limit: float, worker: Worker) -> list[dict[str, Any]]:
    """One row for each solver on one table, with the suboptimality of each network."""
    data, problem, alpha = setting(table)
    n, d = data["X"].shape
    shared = {"table": table, "n": n, "d": d, "gates": data["D"].shape[1], "alpha": alpha}
    rows = [{"solver": name, **our_row(name, problem, alpha, limit)} for name in OURS]
    rows.append({"solver": PEER, **peer_row(data, problem, alpha, peer_limit, worker)})
    best = max(row["lower_bound"] for row in rows if "lower_bound" in row)
    return [shared | row | {"suboptimality": row["objective"] / best - 1} for row in rows]


def report(rows: pd.DataFrame) -> str:
    """Return an aligned table and the median ratios of seconds."""
    shown = rows.drop(columns=["lower_bound", "alpha", "objective"])
    lines = [shown.to_string(index=False, float_format=lambda value: f"{value:.2g}", na_rep="")]
    seconds = rows.pivot(index="table", columns="solver", values="seconds")
    for name in OURS:
        ratio = seconds[PEER] / seconds[name]
        lines.append(
            f"{PEER} / {name}: median {ratio.median():.1f}, {ratio.min():.1f} to {ratio.max():.1f}"
        )
    for name in ("AugmentedLagrangian", "ADMM"):
        ratio = seconds[name] / seconds["RFISTA"]
        lines.append(
            f"{name} / RFISTA: median {ratio.median():.1f}, {ratio.min():.2f} to {ratio.max():.1f}"
        )
    return "\n".join(lines)


def draw(rows: pd.DataFrame, file: Path) -> None:
    """Draw seconds of every solver on every table; hollow where it did not arrive."""
    order = rows.groupby("table")["seconds"].min().sort_values().index
    place = {table: k for k, table in enumerate(order)}
    figure, ax = plt.subplots(figsize=(8, 4.5))
    for (name, mine), marker in zip(rows.groupby("solver", sort=False), "osDv"):
        x = mine["table"].map(place)
        points = ax.scatter([], [], marker=marker, label=name)
        colour = points.get_facecolor()[0]
        arrived = (mine["status"] == "converged").to_numpy()
        face = [colour if ok else "none" for ok in arrived]
        ax.scatter(x, mine["seconds"], marker=marker, facecolors=face, edgecolors=[colour])
    ax.set(yscale="log", ylabel="seconds", title="convex ReLU programme, 100 gates, 0.01 alpha_max")
    ax.set_xticks(range(len(order)), order, rotation=60, ha="right")
    ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--tables", help="Comma-separated names; all by default.")
@click.option("--limit", default=LIMIT, show_default=True, help="Seconds of one solve.")
@click.option("--peer-limit", default=PEER_LIMIT, show_default=True, help="Of one of the peer's.")
def main(tables: str | None, limit: float, peer_limit: float) -> None:
    """Solve the convex ReLU programme of every table with every solver.

    An interrupted run goes on where it stopped. The CSV and the picture in bench/results are
    written by a run over all tables; a smaller one leaves its own in bench/.cache/relu_solvers.
    """
    names = UCI_TABLES if tables is None else tuple(tables.split(","))
    unknown = sorted(set(names) - set(UCI_TABLES))
    if unknown:
        raise click.BadParameter(f"{unknown} not among {', '.join(UCI_TABLES)}", None, "--tables")
    everything = set(names) == set(UCI_TABLES)
    CACHE.mkdir(parents=True, exist_ok=True)
    RESULTS.parent.mkdir(exist_ok=True)
    output = RESULTS if everything else CACHE / "subset"
    unfinished = CACHE / "unfinished.csv"
    machine = describe_machine("numpy", "numba", "cvxdistill")
    print(f"{machine}, {THREADS} threads", flush=True)
    done = pd.read_csv(unfinished) if unfinished.exists() else pd.DataFrame(columns=["table"])
    start = time.perf_counter()
    with Worker(peers_python(), HERE / "peers" / "pyscnn_al.py", THREADS) as worker:
        compare("wine", 1.0, 1.0, worker)  # not kept: it compiles and warms up both sides
        for table in names:
            if table in set(done["table"]):
                continue
            new = pd.DataFrame(compare(table, limit, peer_limit, worker))
            new.to_csv(unfinished, mode="a", header=not unfinished.exists(), index=False)
            print(f"[{time.perf_counter() - start:4.0f} s] {table}", flush=True)
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
