"""Paths of group elastic nets beside adelie's ``grpnet`` and skglm: 50 alphas to 0.01 alpha_max.

* uci: the gated ReLU programme as a group lasso on the 14 UCI tables, 100 gates, penalty "gate";
* polishing: 1,000 gated units of a ResNet-18's last block, its 512 outputs, 20,000 images, rows;
* mnist: multinomial, 10,000 images, 784 pixels, groups of 1 and of 28 (image rows);
* many: 2,000 examples, 20,000 Gaussian columns of correlation 0.5^|i-j| in groups of 5, 50 true.

All are measured alike, by our relative duality gap of the coefficients that they return. Ours stops
at a certified gap of 1e-4; each peer at the loosest power of ten of its tolerance for which every
gap of its path is at most that. A peer's path ends at the first alpha after its time limit; then it
is compared with ours for as many alphas. One thread each: on two, adelie took longer on every table
tried.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from datasets import UCI_TABLES, load_cifar10, load_mnist, load_uci, normalise
from machine import describe_machine
from peers.environment import peers_python
from peers.serving import Worker
from uci_rfista import problem_data

from cvxdistill.solvers import (
    GatedOperator,
    GroupElasticNetProblem,
    alpha_grid,
    group_alpha_max,
)

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "group_elastic_net"
CACHE = HERE / ".cache" / "group_elastic_net"
GAP = 1e-4
N_ALPHAS, SMALLEST = 50, 0.01
THREADS = 1
OURS = "cvxdistill"
# The tolerances that a peer may stop at, loosest first; adelie's bounds a change of the objective.
LADDERS = {
    "adelie": [10.0**-k for k in range(9, 17)],
    "skglm": [10.0**-k for k in range(4, 10)],
}
REPEATS, REPEAT_BELOW = 3, 3.0  # seconds


@dataclass(frozen=True)
class Case:
    """A problem, by what makes its data."""

    name: str
    make: Callable[[], dict[str, np.ndarray]]
    groups: int = 0  # their size; 0 stands for a gate's
    loss: str = "squared"
    intercept: bool = False


def polishing_data() -> dict[str, np.ndarray]:
    """Units diag(x g >= 0) x w, Gaussian g and w, on the block's inputs; of mean square 1."""
    import torch
    from teachers import load_teacher

    from cvxdistill.adapters import capture, infer_layout

    n, units = 20_000, 1000
    teacher, rng = load_teacher("resnet18"), np.random.default_rng(0)
    images, _ = load_cifar10("train", n)
    batch = torch.from_numpy(normalise(images, teacher.mean, teacher.std))
    with capture(teacher.model, "layer4", batch, verbose=0) as captured:
        layout = infer_layout(captured.inputs.shape[1:], captured.outputs.shape[1:])
        rows = np.arange(n * layout.n_positions)[:n]
        X, Y = layout.rows(captured.inputs)[:n], layout.targets(captured.outputs, rows)
    G, W = rng.standard_normal((2, X.shape[1], 2 * units)).astype(X.dtype)
    H = (X @ W) * (X @ G >= 0)
    H = H[:, np.count_nonzero(H, axis=0) > n / 100][:, :units].astype(np.float64)
    H /= np.sqrt((H**2).mean(axis=0))
    return {"X": H, "Y": Y.astype(np.float64)}


def mnist_data() -> dict[str, np.ndarray]:
    """10,000 images, pixels in [0, 1], classes one-hot."""
    images, labels = load_mnist("train")
    chosen = np.random.default_rng(0).permutation(len(labels))[:10_000]
    X = images[chosen].reshape(len(chosen), -1) / 255.0
    return {"X": X, "Y": np.eye(10)[labels[chosen]]}


def many_groups_data() -> dict[str, np.ndarray]:
    """Autoregressive columns; noise of a third of the signal's standard deviation."""
    n, d, size, true = 2000, 20_000, 5, 50
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, d))
    for j in range(1, d):
        X[:, j] = 0.5 * X[:, j - 1] + np.sqrt(0.75) * X[:, j]
    coef = np.zeros((d // size, size))
    coef[rng.choice(d // size, true, replace=False)] = rng.standard_normal((true, size))
    signal = X @ coef.ravel()
    y = signal + rng.standard_normal(n) * signal.std() / 3
    return {"X": X, "Y": y[:, None]}


def table_data(table: str) -> dict[str, np.ndarray]:
    """A UCI table with the patterns of 100 Gaussian gates."""
    data = problem_data(table)
    return {"X": data["X"], "Y": data["Y"][:, None], "D": data["D"]}


def cases() -> dict[str, Case]:
    """All, by name."""
    several = [
        Case("polishing", polishing_data, 1, intercept=True),
        Case("mnist, groups of 1", mnist_data, 1, "multinomial", True),
        Case("mnist, groups of 28", mnist_data, 28, "multinomial", True),
        Case("many groups", many_groups_data, 5, intercept=True),
    ]
    tables = sorted(UCI_TABLES, key=lambda table: load_uci(table)[0].size)
    several += [Case(f"uci {table}", lambda table=table: table_data(table)) for table in tables]
    return {case.name: case for case in several}


def compare(case: Case, workers: dict[str, Worker], limit: float) -> Iterator[dict[str, Any]]:
    """One row for each solver that has such a problem."""
    data = case.make()
    X, Y, D = data["X"], data["Y"], data.get("D")
    problem = GroupElasticNetProblem(
        X if D is None else GatedOperator(X, D),
        Y,
        case.groups or X.shape[1],
        loss=case.loss,
        fit_intercept=case.intercept,
    )
    alphas = alpha_grid(group_alpha_max(problem), N_ALPHAS, SMALLEST)
    files = {"data": str(CACHE / "data.npz"), "result": str(CACHE / "result.npy")}
    np.savez(files["data"], **data)
    job = {
        **files,
        "alphas": alphas.tolist(),
        "groups": case.groups or X.shape[1],
        "loss": case.loss,
        "intercept": case.intercept,
        "threads": THREADS,
    }
    n, d = problem.columns.shape
    shared = {"case": case.name, "n": n, "features": d, "groups": len(problem.members)}
    shared |= {"outputs": Y.shape[1], "input_bytes": sum(a.nbytes for a in data.values())}
    for name, worker in workers.items():
        if name == "skglm" and case.loss == "multinomial":
            continue
        for tol in LADDERS.get(name, [GAP]):
            answer = worker(**job, tol=tol, time_limit=1e9 if name == OURS else limit)
            answer |= measured(problem, np.load(files["result"], mmap_mode="r"), alphas)
            whole = answer["alphas_done"] == N_ALPHAS
            if answer["largest_gap"] <= GAP:
                break
        seconds = [answer["seconds"]]
        while whole and seconds[0] < REPEAT_BELOW and len(seconds) < REPEATS:
            seconds.append(worker(**job, tol=tol, time_limit=limit)["seconds"])
        answer["seconds"] = float(np.median(seconds))
        answer["reached"] = whole and answer["largest_gap"] <= GAP
        if name == OURS:
            share = np.cumsum(answer.pop("alpha_seconds")) / answer["seconds"]
            ours, share = answer["seconds"], share / share[-1]
        # Ours for the alphas that this solver finished.
        answer["our_seconds"] = ours * share[answer["alphas_done"] - 1]
        yield shared | {"solver": name, "tol": tol} | answer


def measured(
    problem: GroupElasticNetProblem, coefs: np.ndarray, alphas: np.ndarray
) -> dict[str, Any]:
    """Largest and median relative gap of the points of a path, and groups in use at its end."""
    gaps = []
    for coef, alpha in zip(coefs, alphas, strict=False):
        B = np.asarray(coef)
        Z = problem.columns.forward(B)
        gap = problem.duality_gap(B, alpha)
        gaps.append(gap / problem.objective(B, problem.intercept(Z), alpha))
    used = problem.penalties(1.0).lengths(np.asarray(coefs[-1])[problem.order]) > 0
    return {
        "largest_gap": max(gaps),
        "median_gap": float(np.median(gaps)),
        "active_groups": int(used.sum()),
    }


def ratios(rows: pd.DataFrame) -> pd.DataFrame:
    """Seconds of each solver by case, and the peers' divided by ours for as many alphas."""
    order = rows["case"].drop_duplicates()
    table = rows.pivot(index="case", columns="solver", values="seconds").loc[order]
    ours = rows.pivot(index="case", columns="solver", values="our_seconds").loc[order]
    for peer in LADDERS:
        if peer in table:
            table[f"{peer} / ours"] = table[peer] / ours[peer]
    return table


def report(rows: pd.DataFrame) -> str:
    """Return an aligned table, the ratios, and their geometric means."""
    shown = rows.drop(columns=["versions", "input_bytes", "peak_growth", "our_seconds"])
    number = "{:.3g}".format
    lines = [shown.to_string(index=False, float_format=number, na_rep="")]
    table = ratios(rows)
    lines += ["", table.to_string(float_format=number, na_rep="")]
    for peer in LADDERS:
        if f"{peer} / ours" in table:
            all_of = table[f"{peer} / ours"].dropna()
            mean = float(np.exp(np.log(all_of).mean()))
            short = rows[(rows["solver"] == peer) & ~rows["reached"].astype(bool)]
            lines.append(
                f"{peer} / ours: geometric mean {mean:.3g}, least {all_of.min():.3g}, of "
                f"{len(all_of)} cases; {len(short)} times the peer did not get there"
            )
    memory = rows[rows["case"] == "polishing"].dropna(subset=["peak_growth"])
    for row in memory.itertuples():
        lines.append(
            f"polishing, {row.solver}: resident memory peaked {row.peak_growth / 2**20:.0f} MiB "
            f"above where it began; inputs {row.input_bytes / 2**20:.0f} MiB"
        )
    return "\n".join(lines)


def draw(rows: pd.DataFrame, file: Path) -> None:
    """Draw the peers' seconds divided by ours; triangles where a peer did not get there."""
    table = ratios(rows)
    reached = rows.pivot(index="case", columns="solver", values="reached").loc[table.index]
    figure, ax = plt.subplots(figsize=(8, 4.5))
    places = np.arange(len(table))
    for peer in LADDERS:
        if peer not in table:
            continue
        ratio, good = table[f"{peer} / ours"], reached[peer].fillna(False).astype(bool)
        points = ax.scatter(places[good], ratio[good], label=peer)
        colour = points.get_facecolor()
        ax.scatter(places[~good], ratio[~good], marker="^", facecolors="none", edgecolors=colour)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set(yscale="log", ylabel="seconds / ours", title=f"paths of {N_ALPHAS} alphas, gap {GAP:g}")
    ax.set_xticks(places, table.index, rotation=60, ha="right")
    ax.legend(title="triangles: cut off, for as many alphas")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--cases", "chosen", help="Names that begin so, separated by semicolons.")
@click.option("--limit", default=60.0, show_default=True, help="Seconds of a peer's path.")
def main(chosen: str | None, limit: float) -> None:
    """Time paths of group elastic nets; an interrupted run goes on where it stopped.

    A run over all cases writes the CSV and the picture in bench/results; a smaller one leaves its
    own in bench/.cache/group_elastic_net.
    """
    everything = cases()
    wanted = tuple(everything) if chosen is None else tuple(chosen.split(";"))
    names = [name for name in everything if name.startswith(wanted)]
    if not names:
        raise click.BadParameter(f"no case begins like {chosen}.", None, "--cases")
    CACHE.mkdir(parents=True, exist_ok=True)
    RESULTS.parent.mkdir(exist_ok=True)
    output = RESULTS if len(names) == len(everything) else CACHE / "subset"
    unfinished = CACHE / "unfinished.jsonl"
    rows = (
        [json.loads(line) for line in unfinished.read_text().splitlines()]
        if unfinished.exists()
        else []
    )
    done = {row["case"] for row in rows}
    machine = describe_machine("numpy", "numba", "cvxdistill")
    print(f"{machine}, {THREADS} thread", flush=True)
    scripts = {
        OURS: (sys.executable, "cvxdistill_path.py"),
        "adelie": (peers_python(), "adelie_path.py"),
        "skglm": (peers_python(), "skglm_path.py"),
    }
    with ExitStack() as stack:
        workers = {
            name: stack.enter_context(Worker(python, HERE / "peers" / script, THREADS))
            for name, (python, script) in scripts.items()
        }
        warm_up(workers)
        for name in names:
            if name in done:
                continue
            new = list(compare(everything[name], workers, limit))
            with unfinished.open("a") as file:
                file.writelines(json.dumps(row, default=float) + "\n" for row in new)
            rows += new
            print(name, *(f"{row['solver']} {row['seconds']:.3g} s" for row in new), flush=True)
    frame = pd.DataFrame([row for row in rows if row["case"] in names])
    print(report(frame))
    print(machine)
    for version in sorted(set(frame["versions"])):
        print(version)
    frame.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
    draw(frame, output.with_suffix(".png"))
    unfinished.unlink()
    print(f"wrote {output.relative_to(HERE.parent)}.csv and .png")


def warm_up(workers: dict[str, Worker]) -> None:
    """Compile both sides on small problems of every kind; not kept."""
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((60, 40)), rng.standard_normal((60, 3))
    D = rng.random((60, 6)) < 0.5
    labels = np.eye(3)[rng.integers(0, 3, 60)]
    wide = rng.standard_normal((60, 400))
    small = [
        Case("", lambda: {"X": X[:, :4], "Y": Y[:, :1], "D": D}),
        Case("", lambda: {"X": wide[:, :80], "Y": Y[:, :1], "D": D}),
        Case("", lambda: {"X": X, "Y": Y}, 1, intercept=True),
        Case("", lambda: {"X": X, "Y": labels}, 4, "multinomial", True),
        Case("", lambda: {"X": wide, "Y": Y[:, :1]}, 5, intercept=True),
    ]
    for case in small:
        list(compare(case, workers, 10.0))


if __name__ == "__main__":
    main()
