"""R-FISTA here and in pyscnn on 14 UCI tables: seconds to the same relative suboptimality.

    python bench/uci_rfista.py            all tables, three alphas
    python bench/uci_rfista.py --quick    three small tables

The problem is C-GReLU with squared loss, penalty "neuron", 100 standard normal gates and no
intercept; the target is the largest class against the rest (+1, -1), or the standardised number.
The accuracy asked for is a relative 1e-4 at 0.1 and 0.01 alpha_max and 1e-3 at 0.001 alpha_max.
Each solver stops by its own rule:

* here, on the *certified* relative duality gap, which bounds the suboptimality from above;
* pyscnn, on the loosest of its tolerances (powers of ten) whose result has
  objective <= (1 + accuracy) * optimum, as if somebody had told its user which one that is.

Beside that stands the time to the first iterate with such an objective, as if an oracle had
stopped each. The optimum is that of a solve to a hundredth of the accuracy, in float64.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from datasets import UCI_TABLES, load_uci
from machine import describe_machine
from peers.environment import peers_python
from peers.serving import Worker

from cvxdistill.solvers import RFISTA, GatedReLUProblem, activation_patterns, sample_gates

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "uci_rfista"
CACHE = HERE / ".cache" / "uci_rfista"
ACCURACY = {0.1: 1e-4, 0.01: 1e-4, 0.001: 1e-3}  # by alpha / alpha_max
N_GATES = 100
THREADS = 2
LADDER = [10.0**-k for k in range(17)]
QUICK_TABLES = ("glass", "wine", "banknote")
OURS, PEER = "cvxdistill", "pyscnn"
# Ours in float64 first: what it takes sets the limits of the others.
SOLVERS = ((OURS, "float64"), (PEER, "float64"), (OURS, "float32"), (PEER, "float32"))
REFERENCE_LIMIT = 600.0  # seconds; also that of our float64 solve, which everything hangs on
# The others may take this many times as long as our float64 solve, within these seconds.
PATIENCE, SHORTEST_LIMIT, LONGEST_LIMIT = 10, 3.0, 30.0
RULES = {"seconds": "to its own stop", "seconds_to_objective": "to the objective"}
REPEATS = 3
REPEAT_BELOW = 3.0  # seconds; a longer solve is timed once


def problem_data(table: str) -> dict[str, np.ndarray]:
    """Return X (n, d), Y (n,), the gates G (d, p) and their patterns D (n, p) of one table."""
    X, y = load_uci(table)
    X = X.astype(np.float64)
    if y.dtype.kind == "f":
        y = y.astype(np.float64)
        Y = (y - y.mean()) / y.std()
    else:
        Y = np.where(y == np.bincount(y).argmax(), 1.0, -1.0)
    D, G = activation_patterns(X, sample_gates(X.shape[1], N_GATES, random_state=0))
    return {"X": X, "Y": Y, "G": G, "D": D}


def setting(
    table: str, ratio: float
) -> tuple[dict[str, np.ndarray], GatedReLUProblem, dict[str, float]]:
    """Return data and problem, and alpha with its optimum and the relative gap of that optimum.

    The optimum is the objective of a solve to a hundredth of the accuracy, kept in the cache.
    """
    data = problem_data(table)
    problem = GatedReLUProblem(data["X"], data["Y"], data["D"], penalty="neuron")
    contents = b"".join(data[name].tobytes() for name in ("X", "Y", "D"))
    key = hashlib.sha1(contents + f"{ratio} {ACCURACY[ratio]}".encode()).hexdigest()[:16]
    file = CACHE / f"optimum-{table}-{ratio:g}-{key}.json"
    if not file.exists():
        solver = RFISTA(tol=ACCURACY[ratio] / 100, max_iter=10**9, time_limit=REFERENCE_LIMIT)
        solution = solver.solve(problem, ratio * problem.alpha_max())
        if not solution.converged:
            raise RuntimeError(f"no reference for {table} at {ratio:g}: {solution.message}.")
        optimum = {"optimum": solution.objective, "optimum_gap": solution.relative_gap}
        file.write_text(json.dumps({"alpha": solution.alpha, **optimum}))
    return data, problem, json.loads(file.read_text())


def same_order(V: np.ndarray, D_from: np.ndarray, D: np.ndarray) -> np.ndarray:
    """Return the weights V (p, d) of the patterns D_from in the order of the patterns D.

    Raises
    ------
    ValueError
        If the two do not hold the same patterns: then two different problems were solved.
    """
    place = {column.tobytes(): j for j, column in enumerate(np.packbits(D_from, axis=0).T)}
    wanted = [column.tobytes() for column in np.packbits(D, axis=0).T]
    if set(wanted) != set(place):
        missing = len(set(wanted) - set(place))
        raise ValueError(
            f"the solver found {len(place)} activation patterns, {missing} of the {len(wanted)} "
            "expected ones are not among them."
        )
    return V[[place[column] for column in wanted]]


def compare(
    table: str, ratio: float, workers: dict[str, Worker], repeats: int, longest_limit: float
) -> list[dict[str, Any]]:
    """Time every solver on one table and one alpha, in turns; one row for each solver."""
    data, problem, best = setting(table, ratio)
    alpha, accuracy = best["alpha"], ACCURACY[ratio]
    data_file, result_file = CACHE / "data.npz", CACHE / "result.npz"
    np.savez(data_file, **data)
    job = {
        "data": str(data_file),
        "result": str(result_file),
        "alpha": alpha,
        "tol": accuracy,
        "ladder": LADDER,
        "target_objective": (1 + accuracy) * best["optimum"],
    }
    limits = dict.fromkeys(SOLVERS, REFERENCE_LIMIT)
    answers: dict[tuple[str, str], list[dict[str, Any]]] = {solver: [] for solver in SOLVERS}
    for turn in range(repeats):
        for (name, dtype), earlier in answers.items():
            if turn and (earlier[0]["tolerance"] is None or earlier[0]["seconds"] > REPEAT_BELOW):
                continue
            answer = workers[name](**job, dtype=dtype, time_limit=limits[name, dtype])
            with np.load(result_file) as file:
                V = same_order(file["V"].astype(np.float64), file["D"], data["D"])
            # Whatever the solver says of its result, this is our objective there, in float64.
            objective = problem.objective(V[:, :, None], 0.0, alpha)
            answer["suboptimality"] = objective / best["optimum"] - 1
            earlier.append(answer)
            if not turn and (name, dtype) == SOLVERS[0]:
                patience = max(PATIENCE * answer["seconds"], SHORTEST_LIMIT)
                limits |= dict.fromkeys(SOLVERS[1:], min(patience, longest_limit))
    n, d = data["X"].shape
    shared = {"table": table, "n": n, "d": d, "gates": data["D"].shape[1], "alpha_ratio": ratio}
    shared |= {"accuracy": accuracy, **best}
    return [
        shared | {"solver": name, "dtype": dtype, "limit": limits[name, dtype]} | summarise(got)
        for (name, dtype), got in answers.items()
    ]


def summarise(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the repeats of one solver; no seconds where most hit the time limit."""
    first = answers[0]
    to_stop = [a["seconds"] if a["tolerance"] is not None else None for a in answers]
    return {
        "seconds": median_or_none(to_stop),
        "seconds_to_objective": median_or_none([a["seconds_to_objective"] for a in answers]),
        "repeats": len(answers),
        "n_iter": first["n_iter"],
        "stopped_by": first["tolerance"],
        "suboptimality": first["suboptimality"],
        "relative_gap": first.get("relative_gap"),
        "versions": first["versions"],
    }


def median_or_none(seconds: list[float | None]) -> float | None:
    """Return the median, with None (the time limit) larger than any number."""
    middle = median(np.inf if value is None else value for value in seconds)
    return middle if np.isfinite(middle) else None


def side_by_side(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one line for each table and alpha, and limit and seconds of each solver in columns."""
    rows = rows.assign(who=rows["solver"] + " " + rows["dtype"])
    keys, values = ["table", "alpha_ratio"], ["limit", *RULES]
    return rows.pivot(index=keys, columns="who", values=values).astype(float)


def ratios(table: pd.DataFrame, rule: str, dtype: str) -> pd.Series:
    """Return lower bounds of the peer's seconds over ours.

    At its limit the peer counts as that limit; where only we are at the limit, the bound is 0; a
    pair of which neither arrived is left out.
    """
    ours, theirs = table[rule, f"{OURS} {dtype}"], table[rule, f"{PEER} {dtype}"]
    bound = (theirs.fillna(table["limit", f"{PEER} {dtype}"]) / ours).fillna(0.0)
    return bound[ours.notna() | theirs.notna()]


def report(rows: pd.DataFrame) -> str:
    """Return the aligned table and the median ratios."""
    table = side_by_side(rows)
    who = [f"{name} {dtype}" for name, dtype in SOLVERS]
    lines = ["seconds until it stops by its own rule (s), until the objective is good enough (o)"]
    lines.append(f"{'':25}" + "".join(f"{name:>20}" for name in who))
    lines.append(f"{'table':18}{'alpha':>7}" + f"{'(s)':>11}{'(o)':>9}" * len(who))
    for (name, ratio), line in table.iterrows():
        text = f"{name:18}{ratio:>7g}"
        for solver in who:
            for rule, width in zip(RULES, (11, 9)):
                value, limit = line[rule, solver], line["limit", solver]
                text += (f"> {limit:.0f}" if np.isnan(value) else f"{value:.3f}").rjust(width)
        lines.append(text)
    for rule, what in RULES.items():
        for dtype in ("float64", "float32"):
            ratio = ratios(table, rule, dtype)
            missed = {s: int(table[rule, f"{s} {dtype}"].isna().sum()) for s in (OURS, PEER)}
            least = "at least " if any(missed.values()) else ""
            lines.append(
                f"{PEER} / {OURS}, {dtype}, {what}: median {least}{ratio.median():.2f} of "
                f"{len(ratio)} pairs, from {ratio.min():.2f} to {ratio.max():.2f}; at the limit: "
                + ", ".join(f"{solver} {count}" for solver, count in missed.items())
            )
    return "\n".join(lines)


def draw(rows: pd.DataFrame, file: Path) -> None:
    """Draw the peer's seconds against ours, one point for each table and alpha."""
    table = side_by_side(rows)
    figure, axes = plt.subplots(2, 2, figsize=(9, 8.5), sharex=True, sharey=True)
    for row, (rule, what) in zip(axes, RULES.items()):
        for ax, dtype in zip(row, ("float64", "float32")):
            for ratio, marker in zip(ACCURACY, "osD"):
                lines = table[table.index.get_level_values("alpha_ratio") == ratio]
                ours, theirs = lines[rule, f"{OURS} {dtype}"], lines[rule, f"{PEER} {dtype}"]
                label = f"{ratio:g} alpha_max, to {ACCURACY[ratio]:g}"
                points = ax.scatter(ours, theirs, marker=marker, s=28, label=label)
                late = lines["limit", f"{PEER} {dtype}"][theirs.isna()]
                ax.scatter(ours[late.index], late, marker="^", s=60, color=points.get_facecolor())
            ax.axline((1, 1), (10, 10), color="0.6", lw=1, zorder=0)
            ax.set(xscale="log", yscale="log", title=f"{dtype}, {what}")
    for ax in axes[1]:
        ax.set_xlabel(f"{OURS} R-FISTA (s)")
    for ax in axes[:, 0]:
        ax.set_ylabel(f"{PEER} R-FISTA (s)")
    axes[0, 0].legend(loc="lower right", fontsize=8)
    figure.suptitle("above the line: cvxdistill is faster; triangles: pyscnn at its time limit")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def chosen(values: str | None, known: tuple[Any, ...], option: str) -> tuple[Any, ...]:
    """Return the comma-separated ``values`` of an option, all of ``known`` by default."""
    if values is None:
        return known
    picked = tuple(type(known[0])(value) for value in values.split(","))
    unknown = [value for value in picked if value not in known]
    if unknown:
        raise click.BadParameter(f"{unknown} not among {', '.join(map(str, known))}", None, option)
    return picked


@click.command()
@click.option("--tables", help="Comma-separated names; all by default.")
@click.option("--alphas", help="Comma-separated multiples of alpha_max: 0.1, 0.01, 0.001.")
@click.option("--limit", default=LONGEST_LIMIT, show_default=True, help="Seconds of one solve.")
@click.option("--quick", is_flag=True, help="Three small tables, once, 5 s at most each.")
@click.option("--references", is_flag=True, help="Only compute the optima, for a later run.")
def main(
    tables: str | None, alphas: str | None, limit: float, quick: bool, references: bool
) -> None:
    """Time R-FISTA beside pyscnn's; an interrupted run goes on where it stopped.

    The CSV and the picture in bench/results are written by a run over everything; a smaller
    one leaves its own in bench/.cache/uci_rfista.
    """
    names = chosen(tables, QUICK_TABLES if quick and tables is None else UCI_TABLES, "--tables")
    alpha_ratios = chosen(alphas, tuple(ACCURACY), "--alphas")
    repeats, limit = (1, min(limit, 5.0)) if quick else (REPEATS, limit)
    everything = set(names) == set(UCI_TABLES) and len(alpha_ratios) == len(ACCURACY) and not quick
    CACHE.mkdir(parents=True, exist_ok=True)
    RESULTS.parent.mkdir(exist_ok=True)
    if references:
        for table, ratio in product(names, alpha_ratios):
            best = setting(table, ratio)[2]
            print(f"{table}, {ratio:g} alpha_max: optimum {best['optimum']:.8g}", flush=True)
        return
    unfinished = CACHE / ("quick.csv" if quick else "unfinished.csv")
    output = RESULTS if everything else CACHE / "subset"
    machine = describe_machine("numpy", "numba", "cvxdistill")
    print(f"{machine}, {THREADS} threads", flush=True)

    done = (
        pd.read_csv(unfinished)
        if unfinished.exists()
        else pd.DataFrame(columns=["table", "alpha_ratio"])
    )
    finished = set(zip(done["table"], done["alpha_ratio"]))
    start = time.perf_counter()
    peers = HERE / "peers"
    ours_worker = Worker(sys.executable, peers / "cvxdistill_rfista.py", THREADS)
    with ours_worker, Worker(peers_python(), peers / "pyscnn_rfista.py", THREADS) as peer_worker:
        workers = {OURS: ours_worker, PEER: peer_worker}
        compare("wine", 0.1, workers, 1, 1.0)  # not kept: it compiles and warms up both sides
        for table, ratio in product(names, alpha_ratios):
            if (table, ratio) in finished:
                continue
            new = pd.DataFrame(compare(table, ratio, workers, repeats, limit))
            new.to_csv(unfinished, mode="a", header=not unfinished.exists(), index=False)
            elapsed = time.perf_counter() - start
            print(f"[{elapsed:4.0f} s] {table}, {ratio:g} alpha_max", flush=True)
    rows = pd.read_csv(unfinished)
    rows = rows[rows["table"].isin(names) & rows["alpha_ratio"].isin(alpha_ratios)]
    print(report(rows))
    print(machine)
    for version in sorted(set(rows["versions"])):
        print(version)
    rows.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
    draw(rows, output.with_suffix(".png"))
    unfinished.unlink()
    print(f"wrote {output.relative_to(HERE.parent)}.csv and .png")


if __name__ == "__main__":
    main()
