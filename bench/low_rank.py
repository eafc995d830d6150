"""The nuclear programme of ResNet-18's blocks, in factored form, with its certificate.

* capped: layer4, 50,000 examples, 1,025 inputs, 512 outputs, 256 hidden units at a small alpha:
  seconds and memory of the sums and of the solve, and where the time goes;
* certified: three blocks at several alphas without a limit of units, to a gap of 1e-4;
* R-FISTA: a part of a block that is small enough for it, to the same gap.

The gates are one that is always on and those filters of the block's first layer that split its
inputs most evenly. Each case runs in a process of its own, whose peak memory is reported: it holds
the inputs and the targets, which sums that are streamed would not need. Capturing the activations
is not part of the time.
"""

from __future__ import annotations

import cProfile
import json
import multiprocessing
import pstats
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from machine import describe_machine

from cvxdistill.solvers import (
    RFISTA,
    GatedReLUProblem,
    GatedStatistics,
    LowRankNewton,
    LowRankProblem,
    evaluate_gates,
)
from cvxdistill.solvers.threads import n_threads

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "low_rank"
CACHE = HERE / ".cache" / "low_rank"
GAP = 1e-4
TIME_LIMIT = 300.0
# Images to capture, and rows to keep of all their positions.
BLOCKS = {"layer4": (50_000, 50_000), "layer3.1": (10_000, 40_000), "layer2.1": (2_000, 30_000)}
PHASES = ("hidden", "precondition", "residual_products", "blocks", "eigh")


@dataclass(frozen=True)
class Case:
    """A block, its gates, and alphas as shares of alpha_max."""

    name: str
    block: str
    gates: int
    shares: tuple[float, ...]
    max_neurons: int | None = None
    rfista: bool = False


CASES = [
    Case("capped", "layer4", 8, (1e-3,), 256),
    Case("certified layer4", "layer4", 8, (0.1, 0.03)),
    Case("certified layer3.1", "layer3.1", 4, (0.1, 0.03)),
    Case("certified layer2.1", "layer2.1", 8, (0.1, 0.03, 0.01)),
    Case("R-FISTA", "layer2.1", 4, (0.1, 0.01, 0.001), rfista=True),
]


def captured(block: str) -> dict[str, np.ndarray]:
    """Rows, targets and teacher's gates of a block, kept in the cache."""
    file = CACHE / f"{block}.npz"
    if not file.exists():
        import torch
        from datasets import load_cifar10, normalise
        from teachers import load_teacher

        from cvxdistill.adapters import capture, infer_layout, teacher_gates

        n_images, n_rows = BLOCKS[block]
        teacher = load_teacher("resnet18")
        images, _ = load_cifar10("train", n_images)
        batch = torch.from_numpy(normalise(images, teacher.mean, teacher.std))
        with capture(teacher.model, block, batch, verbose=0) as activations:
            inputs, outputs = activations.inputs, activations.outputs
            layout = infer_layout(inputs.shape[1:], outputs.shape[1:])
            order = np.random.default_rng(0).permutation(n_images * layout.n_positions)
            rows = np.sort(order[:n_rows])
            X, Y = layout.rows(inputs).take(rows), layout.targets(outputs, rows)
            G = teacher_gates(teacher.model.get_submodule(block), inputs, layout)
        CACHE.mkdir(parents=True, exist_ok=True)
        np.savez(file, X=X, Y=Y, G=G)
    return dict(np.load(file))


def chosen_gates(X: np.ndarray, G: np.ndarray, count: int) -> np.ndarray:
    """One gate that is always on, and those that are on for nearest to half of some rows."""
    balance = np.abs(evaluate_gates(X[:5000], G).mean(axis=0) - 0.5)
    return np.hstack([np.zeros_like(G[:, :1]), G[:, np.argsort(balance)[:count]]])


def measure(case: Case) -> list[dict[str, Any]]:
    """One row for each alpha, and one for each of R-FISTA's."""
    warm_up()
    data = captured(case.block)
    X, Y = data["X"], data["Y"]
    G = chosen_gates(X, data["G"], case.gates)
    if case.rfista:
        D = evaluate_gates(X[:4000], G)
        X, Y = np.ascontiguousarray(X[:4000, 4::9]), np.ascontiguousarray(Y[:4000, :64])
    start, cpu = time.perf_counter(), time.process_time()
    if case.rfista:
        statistics = GatedStatistics.from_data(X, Y, D)
    else:
        statistics = GatedStatistics(G.shape[1], X.shape[1], Y.shape[1], gates=G).update(X, Y)
    sums, sums_cpu = time.perf_counter() - start, time.process_time() - cpu
    start = time.perf_counter()
    problem = LowRankProblem(statistics)
    alpha_max = problem.alpha_max()
    setup = time.perf_counter() - start
    rows, last = [], None
    solver = LowRankNewton(tol=GAP, max_neurons=case.max_neurons, time_limit=TIME_LIMIT)
    shared = {"case": case.name, "n": len(X), "d": X.shape[1], "gates": G.shape[1]}
    shared |= {"outputs": Y.shape[1], "sums_seconds": sums, "setup_seconds": setup}
    for share in case.shares:
        cpu = time.process_time()
        with cProfile.Profile() as profile:
            last = solver.solve(problem, share * alpha_max, warm_start=last)
        fit = 2 * (last.objective - last.alpha * last.neurons.weight_decay())
        row = shared | {"solver": "LowRankNewton", "alpha / alpha_max": share}
        row |= {"seconds": last.seconds, "steps": last.n_iter, "rank": last.rank}
        row |= {"objective": last.objective, "relative_gap": last.relative_gap}
        row |= {"residual": np.sqrt(fit / problem.operator.target_square), "status": last.status}
        row |= {"cpu_seconds": time.process_time() - cpu, "sums_cpu_seconds": sums_cpu}
        row |= phases(profile)
        row["peak_GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        rows.append(row)
    if case.rfista:
        convex = GatedReLUProblem(X, Y, D, penalty="nuclear", fit_intercept=True)
        solution = None
        for share in case.shares:
            peer = RFISTA(tol=GAP, time_limit=90.0)
            cpu = time.process_time()
            solution = peer.solve(convex, share * alpha_max, warm_start=solution)
            row = shared | {"solver": "RFISTA", "alpha / alpha_max": share}
            row |= {"seconds": solution.seconds, "steps": solution.n_iter}
            row |= {"cpu_seconds": time.process_time() - cpu}
            ranks = (np.linalg.matrix_rank(V, tol=1e-6) for V in solution.V)
            row |= {"rank": sum(int(rank) for rank in ranks), "objective": solution.objective}
            row |= {"relative_gap": solution.relative_gap, "status": solution.status}
            rows.append(row)
    return rows


def warm_up() -> None:
    """Compile what is compiled; not kept."""
    X = np.random.default_rng(0).standard_normal((50, 3)).astype(np.float32)
    problem = LowRankProblem(GatedStatistics.from_data(X, np.abs(X), X >= 0))
    LowRankNewton().solve(problem, 0.1 * problem.alpha_max())
    convex = GatedReLUProblem(X, np.abs(X), X >= 0, penalty="nuclear", fit_intercept=True)
    RFISTA().solve(convex, 0.1 * problem.alpha_max())


def phases(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds inside the functions that take the most."""
    seconds = dict.fromkeys(PHASES, 0.0)
    for (file, _, name), values in pstats.Stats(profile).stats.items():
        if name in seconds and ("low_rank" in file or name == "eigh"):
            # Products with hidden units run in threads, of which the profile sees nothing.
            seconds[name] += values[3 if name == "hidden" else 2]
    return {f"{name}_seconds": value for name, value in seconds.items()}


def draw(rows: pd.DataFrame, file: Path) -> None:
    """Draw seconds by case, stacked by phase."""
    ours = rows[rows["solver"] == "LowRankNewton"]
    labels = [f"{c}, {a:g}" for c, a in zip(ours["case"], ours["alpha / alpha_max"])]
    figure, ax = plt.subplots(figsize=(10, 4.5))
    bottom = np.zeros(len(ours))
    for name in PHASES:
        values = ours[f"{name}_seconds"].to_numpy()
        ax.bar(labels, values, bottom=bottom, label=name)
        bottom += values
    rest = np.maximum(ours["seconds"].to_numpy() - bottom, 0)
    ax.bar(labels, rest, bottom=bottom, label="all else")
    for place, (seconds, rank, gap) in enumerate(
        zip(ours["seconds"], ours["rank"], ours["relative_gap"])
    ):
        ax.annotate(f"{rank} units\n{gap:.0e}", (place, seconds), ha="center", va="bottom")
    ax.set(ylabel="seconds of the solve", title="alpha / alpha_max below; rank and relative gap")
    ax.margins(y=0.2)
    ax.tick_params(axis="x", labelrotation=45, labelsize=8)
    ax.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--cases", "chosen", help="Names that begin so, separated by semicolons.")
def main(chosen: str | None) -> None:
    """Solve all cases; an interrupted run goes on where it stopped.

    A run over some of them leaves its files in bench/.cache/low_rank.
    """
    wanted = ("",) if chosen is None else tuple(chosen.split(";"))
    cases = [case for case in CASES if case.name.startswith(wanted)]
    if not cases:
        raise click.BadParameter(f"no case begins like {chosen}.", None, "--cases")
    machine = f"{describe_machine('numpy', 'scipy', 'cvxdistill')}, {n_threads()} threads"
    print(machine, flush=True)
    CACHE.mkdir(parents=True, exist_ok=True)
    RESULTS.parent.mkdir(exist_ok=True)
    unfinished = CACHE / "unfinished.jsonl"
    kept = unfinished.read_text().splitlines() if unfinished.exists() else []
    rows = [json.loads(line) for line in kept]
    for block in {case.block for case in cases}:
        captured(block)
    for case in cases:
        if case.name in {row["case"] for row in rows}:
            continue
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context) as process:
            new = process.submit(measure, case).result()
        with unfinished.open("a") as file:
            file.writelines(json.dumps(row, default=float) + "\n" for row in new)
        rows += new
        shown = pd.DataFrame(new)[
            [
                "case",
                "solver",
                "alpha / alpha_max",
                "seconds",
                "cpu_seconds",
                "rank",
                "objective",
                "relative_gap",
                "status",
            ]
        ]
        print(shown.to_string(index=False), flush=True)
    names = [case.name for case in cases]
    frame = pd.DataFrame([row for row in rows if row["case"] in names])
    print(frame.to_string(index=False, float_format="{:.4g}".format, na_rep=""))
    print(machine)
    output = RESULTS if len(cases) == len(CASES) else CACHE / "subset"
    frame.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
    draw(frame, output.with_suffix(".png"))
    unfinished.unlink()
    print(f"wrote {output.relative_to(HERE.parent)}.csv and .png")


if __name__ == "__main__":
    main()
