"""The paper's figure 7: polishing the students of ``layer4`` that 100 images a class give.

    python bench/paper/figure7.py            ten seeds
    python bench/paper/figure7.py --quick    two seeds of 20 images a class, into bench/.cache

The network is the ResNet-18 on CIFAR-10, the images are those of ``figure6.py``, and so are the
dense gated students: ``one_vs_all.py``, by R-FISTA along a path of strengths, plainly and with the
outputs weighted by how the network uses them. Each point of a path is then polished
(``cvxdistill.polish``, in the same metric): its first layer stays, its second is computed anew for
all outputs by a group elastic net, and units drop out. Compared, point by point:

    gated, one-vs-all    as R-FISTA leaves it
    polished             the fewest units whose held-out error is no larger
    gated, weighted      as R-FISTA leaves it, outputs weighted
    polished, weighted   the least held-out error of no more units than these
    Adam, as polished    a ReLU student of as many units as "polished" has, and as many seconds
    Adam, as weighted    the same for "polished, weighted"

Seconds are CPU seconds of one thread, from the activations on, with all stronger points of the path
and with the polishing of this one. A tenth of the images is held out; it judges the polishing and
Adam's learning rate and loss, which are chosen for each point on the images of seed 0 and kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import cpu_clock
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from contest import Made, Measures, Opponents, Task
from cpu_clock import CpuClock
from few_per_class import (
    BLOCK,
    Drawing,
    as_settings,
    relu_by_adam,
    tuned,
)
from figure6 import ONE_VS_ALL, WEIGHTED, Row, bands, measured, placed, verdicts
from machine import describe_machine
from one_vs_all import STRENGTHS, Point, layout_of, path
from unfinished import append_rows, read_rows, rows_file

import cvxdistill
from cvxdistill.adapters import GatedStudent, build_student
from cvxdistill.solvers import Neurons

SEEDS, A_CLASS = 10, 100
QUICK_SEEDS, QUICK_A_CLASS, QUICK_STRENGTHS, QUICK_TEST_IMAGES = 2, 20, (0.1, 0.03), 1_000
POLISHED, POLISHED_WEIGHTED = "polished", "polished, weighted"
ADAM, ADAM_WEIGHTED = "Adam, as polished", "Adam, as weighted"
PAIRS = (
    (POLISHED, ONE_VS_ALL),
    (POLISHED, ADAM),
    (POLISHED_WEIGHTED, WEIGHTED),
    (POLISHED_WEIGHTED, ADAM_WEIGHTED),
)
STYLES = {
    ONE_VS_ALL: "C2^:",
    POLISHED: "C2o-",
    WEIGHTED: "C0^:",
    POLISHED_WEIGHTED: "C0o-",
    ADAM: "C3v--",
    ADAM_WEIGHTED: "C6x--",
}


def polished(
    point: Point, opponents: Opponents, root: np.ndarray, *, best: bool
) -> tuple[GatedStudent, int, float]:
    """A point's student polished, errors times ``root``; its units, and the CPU seconds of that."""
    clock = CpuClock()
    with clock:
        layout = layout_of(opponents.fitted)
        (X, Y), held_out = (
            (layout.rows(data.inputs.numpy())[:], layout.targets(data.outputs.numpy()) @ root)
            for data in (opponents.fitted, opponents.held_out)
        )
        units = point.neurons()
        result = cvxdistill.polish(
            Neurons(units.W1, units.W2 @ root, units.gate),
            X,
            Y,
            gates=point.G,
            intercept=point.intercept @ root,
            max_neurons=point.units if best else None,
            validation_data=held_out,
        )
        left = result.network
        W2, b = (np.linalg.solve(root.T, part.T).T for part in (left.W2, result.intercept))
        student = build_student(layout, left.W1, W2, left.gate, point.G, b)
    return student.eval(), len(left), clock.seconds


def relu_numbers(units: int, opponents: Opponents) -> int:
    """That a ReLU student of so many units stores."""
    data = opponents.fitted
    d, c = data.inputs[0].numel(), data.outputs.shape[1]
    return units * (d + 1 + c) + c


def along_path(
    task: Task, seed: int, strengths: tuple[float, ...], ways: dict[tuple[float, str], Row]
) -> Iterator[Row]:
    """One seed; ``ways`` are Adam's settings for each strength and size, where they are known."""
    measures = Measures(task, BLOCK.name)
    opponents = Opponents(task, BLOCK, measures)

    def row(point: Point, name: str, units: int, made: Made, **kept: Any) -> Row:
        """Measured."""
        own = {"seed": seed, "strength": point.strength, "student": name, "units": units}
        return {**own, **measured(measures, made), **kept}

    weights = opponents.root.numpy()
    task_of = (opponents.fitted, opponents.module, seed, strengths)
    for names, root, best in (
        ((ONE_VS_ALL, POLISHED, ADAM), None, False),
        ((WEIGHTED, POLISHED_WEIGHTED, ADAM_WEIGHTED), weights, True),
    ):
        given, smaller, by_adam = names
        for point in path(*task_of, root=root):
            yield row(point, given, point.units, placed(task, point))
            metric = np.eye(len(weights), dtype=weights.dtype) if root is None else root
            student, units, seconds = polished(point, opponents, metric, best=best)
            seconds += point.seconds
            model = cvxdistill.swap_block(task.model, BLOCK.name, student)
            made = Made(model, student.parameters_stored, seconds, f"{student.n_gates} gates")
            yield row(point, smaller, units, made)
            budget = relu_numbers(units, opponents)
            kept = ways.get((point.strength, by_adam))
            if kept is None:
                way = tuned(opponents, budget, seconds)
                kept = {"learning_rate": way.learning_rate, "weighted": way.weighted}
            made = relu_by_adam(opponents, budget, as_settings(kept), seconds, seed)
            yield row(point, by_adam, units, made, **kept)


def draw(table: pd.DataFrame, file: Any) -> None:
    """Accuracy by units, and by numbers stored: means over the seeds and two deviations."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    top = 100 * table["teacher_accuracy"].iloc[0]
    for axis, column in zip(axes, ("units", "parameters"), strict=True):
        for name, style in STYLES.items():
            points = table[table["student"] == name].groupby("strength")
            accuracy = 100 * points["accuracy"].agg(["mean", "std"])
            axis.errorbar(
                points[column].mean(),
                accuracy["mean"],
                2 * accuracy["std"].fillna(0),
                fmt=style,
                ms=4,
                capsize=3,
                lw=1,
                label=name,
            )
        axis.axhline(top, color="black", lw=0.8, ls=":", label="teacher")
        axis.set(xscale="log")
    axes[0].set(xlabel="hidden units", ylabel="test accuracy [%]")
    axes[1].set(xlabel="numbers stored, gates included")
    axes[0].legend(fontsize=8)
    seeds = table["seed"].nunique()
    figure.suptitle(f"Polishing students of layer4: means and 2 standard deviations, {seeds} seeds")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds, accuracies with two standard deviations."""
    by = ["strength", "student"]
    groups = table.groupby(by, sort=False)
    summary = groups[["units", "parameters", "seconds", "activation_error"]].mean()
    summary[["units", "parameters"]] = summary[["units", "parameters"]].round().astype(int)
    accuracy = bands(table, ["strength"]).stack().rename("accuracy")
    return summary.assign(seeds=groups["seed"].nunique()).join(accuracy).reset_index()


@click.command()
@click.option("--seeds", default=SEEDS, show_default=True, type=click.IntRange(1))
@click.option("--quick", is_flag=True, help="Two seeds of fewer images and strengths.")
def main(seeds: int, quick: bool) -> None:
    """Fit, measure, print the table and write it with its picture.

    An interrupted run goes on where it stopped. Fewer seeds are written to bench/.cache.
    """
    cpu_clock.one_thread()
    print(describe_machine("numpy", "torch", "numba", "cvxdistill"), flush=True)
    a_class, strengths = (QUICK_A_CLASS, QUICK_STRENGTHS) if quick else (A_CLASS, STRENGTHS)
    seeds = min(seeds, QUICK_SEEDS) if quick else seeds
    everything = seeds >= SEEDS and not quick
    output = (cpu_clock.RESULTS if everything else cpu_clock.CACHE) / "figure7"
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = rows_file("figure7", quick)
    rows = read_rows(unfinished)
    drawing: Drawing | None = None
    for seed in range(seeds):
        if seed in {row["seed"] for row in rows}:
            continue
        drawing = drawing or Drawing(QUICK_TEST_IMAGES if quick else None)
        ways = {
            (row["strength"], row["student"]): {n: row[n] for n in ("learning_rate", "weighted")}
            for row in rows
            if row["seed"] == 0 and row["student"] in (ADAM, ADAM_WEIGHTED)
        }
        new = list(along_path(drawing.task(a_class, seed), seed, strengths, ways))
        append_rows(unfinished, new)
        rows += new
        for row in new:
            print(
                f"seed {seed}, {row['strength']:g}, {row['student']}: {row['units']} units, "
                f"{row['parameters']:,} numbers, {100 * row['accuracy']:.2f} %, activation error "
                f"{row['activation_error']:.4f}, {row['seconds']:.1f} s",
                flush=True,
            )
    table = pd.DataFrame([row for row in rows if row["seed"] < seeds])
    table.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
    draw(table, output.with_suffix(".png"))
    if everything or quick:
        unfinished.unlink()
    print(f"\nTeacher: {100 * table['teacher_accuracy'].iloc[0]:.2f} %. Means over the seeds:")
    summary = summarise(table)
    summary.to_csv(f"{output}_summary.csv", index=False, float_format="%.3g")
    print(summary.to_string(index=False, float_format="%.3g"))
    for ours, theirs in PAIRS:
        lines = verdicts(table, ["strength"], ours, theirs)
        print("\n" + lines.to_string(index=False, float_format="%.4g"))
    print(f"wrote {output}.csv and .png")


if __name__ == "__main__":
    main()
