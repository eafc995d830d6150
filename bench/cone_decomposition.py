"""Cone decompositions on the UCI tables: what turning a gated solution into a ReLU network costs.

    python bench/cone_decomposition.py                      all tables
    python bench/cone_decomposition.py --tables glass,wine  some of them

For each table 100 Gaussian gates, moved clear of the rows, and C-GReLU with squared loss and
penalty "neuron" at 0.01 alpha_max, solved to a relative gap of 1e-4. Every method that applies then
decomposes the solution: the closed form where X has full row rank, which are the first clearly
independent rows of four tables. "shift" is what a direction inside the cone alone can do:
v = w + t h and u = t h with the smallest t.

Norm growth is the sum of lengths of all v and u over that of the weights; the loss changes by
rounding only, because v - u is the weight. An interrupted run goes on where it stopped.

Right after ours pyscnn decomposes the gates that are not zero by its own approximate method, with
its default tolerance. Its pairs may be outside their cones, and so the network's loss is another.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from datasets import UCI_TABLES
from machine import describe_machine
from peers.environment import peers_python
from peers.serving import Worker
from relu_solvers import worst_violation
from uci_rfista import chosen, problem_data

from cvxdistill.solvers import RFISTA, GatedReLUProblem, evaluate_gates, nudge_gates
from cvxdistill.solvers.cone_decomposition import decompose
from cvxdistill.solvers.cones import cone_violations, interior_directions, shift_into_cones
from cvxdistill.solvers.gates import distinct_patterns
from cvxdistill.solvers.relu_operator import relu_predictions

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "cone_decomposition"
CACHE = HERE / ".cache" / "cone_decomposition"
ALPHA_RATIO, TOLERANCE = 0.01, 1e-4
MARGIN = 1e-5  # of every gate
INDEPENDENT = 0.1  # sine of the angle between a row and the span of the earlier ones
FEW_ROWS = ("sonar", "supermarket", "credit-g", "adult")
SUFFIX = " (few rows)"
CASES = (*UCI_TABLES, *(table + SUFFIX for table in FEW_ROWS))
METHODS = ("exact", "approximate", "closed-form", "shift")
PEER, PEER_LIMIT, THREADS = "pyscnn", 60.0, 2


def independent_rows(X: np.ndarray) -> np.ndarray:
    """Indices of the rows that are no combination, nor nearly one, of the earlier ones kept."""
    kept: list[int] = []
    basis = np.empty((0, X.shape[1]))
    for i, row in enumerate(X / np.linalg.norm(X, axis=1, keepdims=True)):
        for _ in range(2):
            row = row - (basis @ row) @ basis
        length = np.linalg.norm(row)
        if length > INDEPENDENT:
            kept.append(i)
            basis = np.vstack([basis, row / length])
        if len(kept) == X.shape[1]:
            break
    return np.array(kept)


def setting(case: str) -> dict[str, Any]:
    """Return X, Y, the nudged gates G and patterns D, and the gated solution V with its loss."""
    data: dict[str, Any] = problem_data(case.removesuffix(SUFFIX))
    X, Y = data["X"], data["Y"]
    if case.endswith(SUFFIX):
        rows = independent_rows(X)
        X, Y = X[rows], Y[rows]
    G = nudge_gates(X, data["G"], margin=MARGIN, random_state=0)
    D = evaluate_gates(X, G)
    keep = distinct_patterns(D)
    G, D = G[:, keep], np.ascontiguousarray(D[:, keep])
    problem = GatedReLUProblem(X, Y, D)
    alpha = ALPHA_RATIO * problem.alpha_max()
    solution = RFISTA(tol=TOLERANCE, max_iter=10**9).solve(problem, alpha)
    loss = problem.loss.value(problem.predict(solution.V))
    return {"X": X, "G": G, "D": D, "V": solution.V, "problem": problem, "loss": loss}


def shifted(X: np.ndarray, D: np.ndarray, V: np.ndarray, G: np.ndarray) -> dict[str, Any]:
    """Weights w + t h and t h, h the direction of largest margin, and their measures."""
    H, _ = interior_directions(X, D, G, best=True)
    before = cone_violations(X, D, V).max()
    weights = np.stack(shift_into_cones(X, D, V, np.zeros_like(V), H)[:2])
    lengths = np.linalg.norm(weights, axis=2).sum() / np.linalg.norm(V, axis=1).sum()
    after = cone_violations(X, D, weights.reshape(-1, *V.shape[1:])).max()
    return {
        "weights": weights,
        "violation_before_repair": before,
        "violation": after,
        "norm_growth": lengths,
        "relative_gap": None,
    }


def decomposed(method: str, data: dict[str, Any]) -> dict[str, Any]:
    """Decompose by one method; its measures and seconds, without the weights."""
    X, G, D, V = (data[name] for name in "XGDV")
    start = time.perf_counter()
    if method == "shift":
        measures = shifted(X, D, V, G)
    else:
        result = decompose(X, D, V, method=method, G=G)
        names = ("weights", "violation_before_repair", "violation", "norm_growth", "relative_gap")
        measures = {name: getattr(result, name) for name in names}
    measures["seconds"] = time.perf_counter() - start
    loss = data["problem"].loss.value(relu_predictions(X, measures.pop("weights")))
    return {"method": method, **measures, "loss_change": abs(loss / data["loss"] - 1)}


def peer_decomposed(data: dict[str, Any], worker: Worker) -> dict[str, Any]:
    """pyscnn's approximate method on the gates that are not zero, measured alike."""
    CACHE.mkdir(parents=True, exist_ok=True)
    files = {"data": str(CACHE / "data.npz"), "result": str(CACHE / "result.npy")}
    X, V = data["X"], data["V"]
    active = V.any(axis=(1, 2))
    G, D = data["G"][:, active], np.ascontiguousarray(data["D"][:, active])
    np.savez(files["data"], X=X, G=G, D=D, V=V[active])
    answer = worker(**files, time_limit=PEER_LIMIT)
    weights = np.load(files["result"])
    violation, _ = worst_violation(X, D, weights)
    loss = data["problem"].loss.value(relu_predictions(X, weights))
    lengths = np.linalg.norm(weights, axis=2).sum() / np.linalg.norm(V, axis=1).sum()
    return {
        "method": PEER,
        "violation_before_repair": violation,
        "violation": violation,
        "norm_growth": lengths,
        "seconds": answer["seconds"],
        "loss_change": abs(loss / data["loss"] - 1),
        "status": answer["status"],
    }


def compare(case: str, worker: Worker) -> list[dict[str, Any]]:
    """One row for each method on one case."""
    data = setting(case)
    n, d = data["X"].shape
    shared = {"table": case, "n": n, "d": d, "active_gates": int(data["V"].any(axis=(1, 2)).sum())}
    methods = METHODS if n <= d else tuple(m for m in METHODS if m != "closed-form")
    rows = [decomposed(method, data) for method in methods]
    return [shared | row for row in (*rows, peer_decomposed(data, worker))]


def compile_loops() -> None:
    """Decompose something small, so that no method's seconds contain compiling."""
    rng = np.random.default_rng(0)
    X, G = rng.standard_normal((20, 3)), rng.standard_normal((3, 4))
    for method in ("exact", "approximate"):
        decompose(X, X @ G >= 0, rng.standard_normal((4, 3, 1)), method=method)


def report(rows: pd.DataFrame) -> str:
    """Return the aligned table and what holds for all of it."""
    lines = [rows.to_string(index=False, float_format=lambda value: f"{value:.3g}", na_rep="")]
    for name, some in (("ours", rows["method"] != PEER), (PEER, rows["method"] == PEER)):
        if some.any():
            lines.append(
                f"{name}: largest violation {rows['violation'][some].max():.1e}, largest relative "
                f"change of the loss {rows['loss_change'][some].max():.1e}"
            )
    growth = rows.pivot(index="table", columns="method", values="norm_growth")
    for method in growth.columns.drop("exact"):
        ratio = (growth[method] / growth["exact"]).dropna()
        if len(ratio):
            lines.append(
                f"{method}: {ratio.median():.3f} times the norm of exact (median of {len(ratio)}, "
                f"from {ratio.min():.3f} to {ratio.max():.3f})"
            )
    seconds = rows.pivot(index="table", columns="method", values="seconds")
    if PEER in seconds:
        for method in seconds.columns.intersection(METHODS):
            ratio = (seconds[PEER] / seconds[method]).dropna()
            lines.append(
                f"{PEER}: {np.exp(np.log(ratio).mean()):.2g} times the seconds of {method} "
                f"(geometric mean of {len(ratio)}, from {ratio.min():.2g} to {ratio.max():.2g})"
            )
    return "\n".join(lines)


def draw(rows: pd.DataFrame, file: Path) -> None:
    """Draw the norm growth of every method on every table."""
    growth = rows.pivot(index="table", columns="method", values="norm_growth")
    growth = growth.sort_values("exact")
    figure, ax = plt.subplots(figsize=(9, 0.3 * len(growth) + 2))
    for method, marker in zip((*METHODS, PEER), "osD|x"):
        if method in growth:
            ax.plot(growth[method], np.arange(len(growth)), marker, label=method, alpha=0.8)
    ax.set_yticks(np.arange(len(growth)), growth.index)
    ax.set(xscale="log", xlabel="norm of the ReLU network / norm of the gated solution")
    ax.grid(axis="x", alpha=0.3)
    ax.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--tables", help="Comma-separated, such as 'glass,sonar (few rows)'; all by default.")
def main(tables: str | None) -> None:
    """Decompose on every table; the CSV and the picture in bench/results need all of them."""
    cases = chosen(tables, CASES, "--tables")
    CACHE.mkdir(parents=True, exist_ok=True)
    RESULTS.parent.mkdir(exist_ok=True)
    unfinished = CACHE / "unfinished.csv"
    output = RESULTS if set(cases) == set(CASES) else CACHE / "subset"
    print(describe_machine("numpy", "scipy", "cvxdistill"), flush=True)
    compile_loops()
    done = pd.read_csv(unfinished) if unfinished.exists() else pd.DataFrame(columns=["table"])
    with Worker(peers_python(), HERE / "peers" / "pyscnn_decomposition.py", THREADS) as worker:
        for case in cases:
            if case in set(done["table"]):
                continue
            start = time.perf_counter()
            new = pd.DataFrame(compare(case, worker))
            new.to_csv(unfinished, mode="a", header=not unfinished.exists(), index=False)
            print(f"[{time.perf_counter() - start:4.0f} s] {case}", flush=True)
    rows = pd.read_csv(unfinished)
    rows = rows[rows["table"].isin(cases)]
    print(report(rows))
    rows.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
    draw(rows, output.with_suffix(".png"))
    unfinished.unlink()
    print(f"wrote {output.relative_to(HERE.parent)}.csv and .png")


if __name__ == "__main__":
    main()
