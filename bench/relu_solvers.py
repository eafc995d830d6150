"""The convex ReLU programme on the UCI tables: our three solvers beside pyscnn's.

For each table 100 Gaussian gates, moved clear of the rows, at 0.1 and 0.01 alpha_max (that of the
gated programme), neuron penalty, no intercept, float64. Ours stop at a certified relative duality
gap of 1e-4 with weights in their cones, and ``choose_solver``'s once more at 1e-6; pyscnn's
augmented Lagrangian by its own test with its default tolerances. Then the ReLU network that each
set of weights is gets measured alike: its objective against our best lower bound, and how far its
weights are outside their cones. The last run of ours also tells when it was as near the optimum as
pyscnn's network in the end, from above or below, with weights in their cones.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from itertools import product
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
    Solution,
    choose_solver,
    evaluate_gates,
    nudge_gates,
)
from cvxdistill.solvers.cones import cone_violations
from cvxdistill.solvers.gates import distinct_patterns

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "relu_solvers"
CACHE = HERE / ".cache" / "relu_solvers"
RATIOS = (0.1, 0.01)
TOLERANCE, TIGHT = 1e-4, 1e-6
THREADS = 2
OURS = {"RFISTA": RFISTA, "AugmentedLagrangian": AugmentedLagrangian, "ADMM": ADMM}
AUTO, PEER = "auto, to 1e-6", "pyscnn AL"
LIMIT, PEER_LIMIT = 300.0, 60.0  # seconds
# Columns shorter than this share of the longest are rounding, and their directions say nothing.
SHORTEST_COLUMN = 1e-6


def setting(table: str, ratio: float) -> tuple[dict[str, np.ndarray], ReLUProblem, float]:
    """Return data with nudged gates and their distinct patterns, the problem and alpha."""
    data = problem_data(table)
    X, G = data["X"], nudge_gates(data["X"], data["G"], random_state=0)
    D = evaluate_gates(X, G)
    keep = distinct_patterns(D)
    data |= {"G": G[:, keep], "D": D[:, keep]}
    alpha = ratio * GatedReLUProblem(X, data["Y"], data["D"]).alpha_max()
    return data, ReLUProblem(X, data["Y"], data["D"], G=data["G"]), alpha


def our_rows(
    problem: ReLUProblem, alpha: float, limit: float, names: Collection[str] = tuple(OURS)
) -> tuple[list[dict[str, Any]], Solution]:
    """Solve with some of our solvers and ``choose_solver``'s; rows, and the latter's solution."""
    limits = {"time_limit": limit, "max_iter": 10**9}
    solvers = {name: OURS[name](tol=TOLERANCE, **limits) for name in names}
    solvers[AUTO] = choose_solver(problem, tol=TIGHT, **limits)
    rows = []
    for name, solver in solvers.items():
        with threadpool_limits(THREADS):
            solution = solver.solve(problem, alpha)
        rows.append(
            {
                "solver": name,
                "seconds": solution.seconds,
                "n_iter": solution.n_iter,
                "status": solution.status,
                "relative_gap": solution.relative_gap,
                "kkt_residual": solution.kkt_residual,
                "raw_violation": solution.trace.violation[-1],
                "lower_bound": solution.objective - solution.duality_gap,
                **measured(problem, solution.V, alpha),
            }
        )
    return rows, solution


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
    violation, active = worst_violation(problem.operator.X, problem.operator.D, V)
    objective = problem.objective(V, 0.0, alpha)
    return {"objective": objective, "violation": violation, "active_neurons": active}


def worst_violation(X: np.ndarray, D: np.ndarray, V: np.ndarray) -> tuple[float, int]:
    """Largest violation by a longer column of V (2, p, d, c), and how many of these there are."""
    W = V.reshape(-1, *V.shape[2:])
    violations, lengths = cone_violations(X, D, W), np.linalg.norm(W, axis=1)
    long = lengths > SHORTEST_COLUMN * lengths.max()
    return float(violations[long].max(initial=0.0)), int(long.sum())


def compare(
    table: str,
    ratio: float,
    limit: float,
    peer_limit: float,
    worker: Worker,
    ours: Collection[str] = tuple(OURS),
) -> list[dict[str, Any]]:
    """One row for each solver on one table, with the suboptimality of each network."""
    data, problem, alpha = setting(table, ratio)
    n, d = data["X"].shape
    shared = {"table": table, "ratio": ratio, "n": n, "d": d, "gates": data["D"].shape[1]}
    rows, tightest = our_rows(problem, alpha, limit, ours)
    rows.append({"solver": PEER, **peer_row(data, problem, alpha, peer_limit, worker)})
    best = max(row["lower_bound"] for row in rows if "lower_bound" in row)
    rows = [shared | {"alpha": alpha} | row for row in rows]
    for row in rows:
        row["suboptimality"] = row["objective"] / best - 1
    peers = abs(rows[-1]["suboptimality"])
    rows[-2]["seconds as good as the peer"] = seconds_to(tightest, (1 + peers) * best)
    return rows


def seconds_to(solution: Solution, objective: float) -> float:
    """When the weights in their cones first had no larger an objective; infinite if never."""
    reached = np.flatnonzero(solution.trace.objective <= objective)
    return float(solution.trace.seconds[reached[0]]) if len(reached) else np.inf


def report(rows: pd.DataFrame) -> str:
    """Return an aligned table and the ratios of seconds."""
    shown = rows.drop(columns=["lower_bound", "alpha", "objective"])
    lines = [shown.to_string(index=False, float_format=lambda value: f"{value:.2g}", na_rep="")]
    for ratio, mine in rows.groupby("ratio", sort=False):
        seconds = mine.pivot(index="table", columns="solver", values="seconds")
        seconds["as good as the peer"] = mine.set_index("table")[
            "seconds as good as the peer"
        ].dropna()
        pairs = [(PEER, name) for name in (*OURS, AUTO, "as good as the peer")]
        for over, under in [*pairs, ("AugmentedLagrangian", "RFISTA"), ("ADMM", "RFISTA")]:
            if not {over, under} <= set(seconds):
                continue
            share = seconds[over] / seconds[under]
            mean = np.exp(np.log(share).mean())
            lines.append(
                f"at {ratio:g} alpha_max, {over} / {under}: geometric mean {mean:.2g}, median "
                f"{share.median():.2g}, {share.min():.2g} to {share.max():.2g}"
            )
    wide = rows.pivot(index=["table", "ratio"], columns="solver", values="seconds")
    marks = rows[rows["solver"] == AUTO].set_index(["table", "ratio"])
    wide["as good as the peer"] = marks["seconds as good as the peer"]
    ended = rows[rows["solver"] == PEER].set_index(["table", "ratio"])["status"] == "converged"
    for what, some in (("all", wide), (f"those that {PEER} ended", wide[ended.loc[wide.index]])):
        for under in ("as good as the peer", AUTO) if len(some) else ():
            share = some[PEER] / some[under]
            lines.append(
                f"{what} ({len(some)}), {PEER} / {under}: geometric mean "
                f"{np.exp(np.log(share).mean()):.2g}, {share.min():.2g} to {share.max():.2g}"
            )
    return "\n".join(lines)


def draw(rows: pd.DataFrame, file: Path) -> None:
    """Draw seconds of every solver on every table; hollow where it did not arrive."""
    order = rows.groupby("table")["seconds"].min().sort_values().index
    place = {table: k for k, table in enumerate(order)}
    ratios = rows["ratio"].unique()
    figure, axes = plt.subplots(
        1, len(ratios), figsize=(6 * len(ratios), 4.5), sharey=True, squeeze=False
    )
    for ax, ratio in zip(axes[0], ratios, strict=True):
        at = rows[rows["ratio"] == ratio]
        for (name, mine), marker in zip(at.groupby("solver", sort=False), "osD^v"):
            x = mine["table"].map(place)
            points = ax.scatter([], [], marker=marker, label=name)
            colour = points.get_facecolor()[0]
            arrived = (mine["status"] == "converged").to_numpy()
            face = [colour if ok else "none" for ok in arrived]
            ax.scatter(x, mine["seconds"], marker=marker, facecolors=face, edgecolors=[colour])
        ax.set(yscale="log", title=f"convex ReLU programme, 100 gates, {ratio:g} alpha_max")
        ax.set_xticks(range(len(order)), order, rotation=60, ha="right")
    axes[0, 0].set_ylabel("seconds")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--tables", help="Comma-separated names; all by default.")
@click.option("--limit", default=LIMIT, show_default=True, help="Seconds of one solve.")
@click.option("--peer-limit", default=PEER_LIMIT, show_default=True, help="Of one of the peer's.")
@click.option("--auto-only", is_flag=True, help="Of ours, only what choose_solver takes.")
def main(tables: str | None, limit: float, peer_limit: float, auto_only: bool) -> None:
    """Solve the convex ReLU programme of every table with every solver.

    An interrupted run goes on where it stopped. The CSV and the picture in bench/results are
    written by a run over all tables; a smaller one leaves its own in bench/.cache/relu_solvers.
    """
    names = UCI_TABLES if tables is None else tuple(tables.split(","))
    unknown = sorted(set(names) - set(UCI_TABLES))
    if unknown:
        raise click.BadParameter(f"{unknown} not among {', '.join(UCI_TABLES)}", None, "--tables")
    ours = () if auto_only else tuple(OURS)
    everything = set(names) == set(UCI_TABLES) and not auto_only
    CACHE.mkdir(parents=True, exist_ok=True)
    RESULTS.parent.mkdir(exist_ok=True)
    output = RESULTS if everything else CACHE / "subset"
    unfinished = CACHE / f"unfinished{'-auto' * auto_only}.csv"
    machine = describe_machine("numpy", "numba", "cvxdistill")
    print(f"{machine}, {THREADS} threads", flush=True)
    done = (
        pd.read_csv(unfinished) if unfinished.exists() else pd.DataFrame(columns=["table", "ratio"])
    )
    start = time.perf_counter()
    with Worker(peers_python(), HERE / "peers" / "pyscnn_al.py", THREADS) as worker:
        # Not kept: it compiles and warms up both sides.
        compare("wine", RATIOS[0], 1.0, 1.0, worker, ours)
        for table, ratio in product(names, RATIOS):
            if ((done["table"] == table) & (done["ratio"] == ratio)).any():
                continue
            new = pd.DataFrame(compare(table, ratio, limit, peer_limit, worker, ours))
            new.to_csv(unfinished, mode="a", header=not unfinished.exists(), index=False)
            print(f"[{time.perf_counter() - start:4.0f} s] {table}, {ratio:g}", flush=True)
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
