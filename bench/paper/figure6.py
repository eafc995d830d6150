"""The paper's figures 3b and 6: students of ``layer4`` from few unlabelled images, beside Adam's.

    python bench/paper/figure6.py                ten seeds of each, hours of one core
    python bench/paper/figure6.py --part 3b      100 images a class, sizes of figure 4
    python bench/paper/figure6.py --part 6       10 to 1,000 images a class, along a path
    python bench/paper/figure6.py --quick        two seeds of less, into bench/.cache

The network is the ResNet-18 on CIFAR-10. A seed draws the images, the gates, the first weights and
the batches. Labels serve to draw as many images of each class, and for the accuracy on the 10,000
test images. Seconds are CPU seconds of one thread.

Part 3b. 1,000 images in all; whatever stands in the block's place may store as many numbers as the
paper's student with 1, 2, 4, ..., 512 filters. The students of ``figure4.py``:

    linear, several     ``compress`` of the block alone, or of its layers too
    distilled           the linear students of ``distill``, as near the block's outputs as they get
    gated               those of ``distill(student="gated")``, the block's own gates
    best convex         of linear, several and gated, by held-out images
    Adam                the ReLU student, for as many seconds as "linear" took, and for ten times
    pruning, SVD, ridge

Part 6. The dense gated student of ``one_vs_all.py``, 25 gates, along its path of strengths; once
more with the outputs weighted by how the network uses them, a loss that Adam may choose, too. At
each point of the first path Adam's ReLU student stores as many numbers and trains for as long as
the path took up to there. A full linear map, a ridge's, is drawn beside them.

Adam's learning rate and loss are chosen for each size, or each point, on the images of seed 0, and
kept. It then trains on all images, those held out too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import cpu_clock
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from baselines import AdamSettings
from contest import (
    BEST,
    LONG,
    Made,
    Measures,
    Opponents,
    Task,
    block_numbers,
    compressing,
    distilled,
    inside,
)
from few_per_class import (
    BLOCK,
    CLASSES,
    LEAST_SECONDS,
    Drawing,
    all_images,
    as_settings,
    relu_by_adam,
    tuned,
)
from figure4 import FILTERS
from machine import describe_machine
from matplotlib.ticker import LogLocator, NullFormatter
from one_vs_all import STRENGTHS, Point, path
from unfinished import append_rows, read_rows, rows_file

import cvxdistill
from cvxdistill.adapters import table1_parameters

SEEDS, A_CLASS = 10, 100
# Images a class, and seeds at most: the larger ones vary less and take much longer.
SWEEP = {10: 10, 30: 10, 100: 10, 300: 5, 1000: 3}
QUICK_SEEDS, QUICK_FILTERS, QUICK_A_CLASS = 2, (2, 32), 20
QUICK_SWEEP, QUICK_STRENGTHS = {10: 2, 20: 2}, (0.1, 0.03)
QUICK_TEST_IMAGES = 1_000
# A full linear map of all inputs stores fewer numbers.
WHOLE_MAP = 600_000
LINEAR, SEVERAL, DISTILLED, GATED = "linear", "several", "distilled", "gated"
ADAM, LONGER = "Adam", "Adam, 10 times"
ONE_VS_ALL, WEIGHTED, RIDGE = "gated, one-vs-all", "gated, weighted", "ridge"
STYLES = {
    LINEAR: "C0o-",
    SEVERAL: "C1s-",
    GATED: "C2^-",
    ADAM: "C6x:",
    LONGER: "C3v--",
    "pruning": "C4d--",
    "SVD": "C5d--",
    RIDGE: "C7.:",
    ONE_VS_ALL: "C2^-",
    WEIGHTED: "C0o-",
}
# Of a table's columns.
ORDER = (BEST, LINEAR, SEVERAL, GATED, ONE_VS_ALL, WEIGHTED, ADAM, LONGER, "pruning", "SVD", RIDGE)
Row = dict[str, Any]


class Few:
    """One seed's task of part 3b, and its students of any size."""

    def __init__(self, drawing: Drawing, a_class: int, seed: int):
        self.seed = seed
        self.task = drawing.task(a_class, seed)
        self.measures = Measures(self.task, BLOCK.name)
        self.opponents = Opponents(self.task, BLOCK, self.measures)
        self.whole = block_numbers(self.task.model, BLOCK.name)
        self.sites = inside(self.task, [BLOCK.name])
        name, whole, n = BLOCK.name, self.whole, len(FILTERS)
        within = distilled(self.task, name, "outputs", n)
        self.ways: dict[str, Callable[[int], Made]] = {
            LINEAR: compressing(self.task, [name], whole, n),
            SEVERAL: compressing(self.task, self.sites, whole, n),
            GATED: lambda budget: within("gated", budget),
            DISTILLED: lambda budget: within("linear", budget),
        }

    def budget(self, m: int) -> int:
        """Numbers of the paper's student with m filters."""
        data = self.opponents.fitted
        return table1_parameters(data.inputs.shape[1], data.outputs.shape[1], m)

    def students(self, m: int, way: AdamSettings | None) -> Iterator[tuple[str, Made, Row]]:
        """All of a size, and what is to be kept of them; without settings Adam's are tuned."""
        budget = self.budget(m)
        made: dict[str, Made] = {}
        for name, convex in self.ways.items():
            with suppress(ValueError):  # None is so small.
                made[name] = convex(budget)
                yield name, made[name], {}
        yield BEST, self.opponents.best([made[n] for n in made if n != DISTILLED]), {}
        for name, other in self.opponents.quick(budget):
            yield name, other, {}
        seconds = max(made[LINEAR].seconds, LEAST_SECONDS)
        way = way or tuned(self.opponents, budget, seconds)
        kept = {"learning_rate": way.learning_rate, "weighted": way.weighted}
        for name, share in {ADAM: 1, LONGER: LONG}.items():
            yield name, relu_by_adam(self.opponents, budget, way, share * seconds, self.seed), kept

    def rows(self, m: int, way: AdamSettings | None) -> Iterator[Row]:
        """Measured."""
        for name, made, kept in self.students(m, way):
            yield {
                "seed": self.seed,
                "filters": m,
                "budget": self.budget(m),
                "student": name,
                **measured(self.measures, made),
                **kept,
            }


def measured(measures: Measures, made: Made) -> Row:
    """The columns that both parts have."""
    return {
        "parameters": made.numbers,
        "agreement": measures.agreement(made.model),
        "accuracy": measures.accuracy(made.model),
        "teacher_accuracy": measures.teacher_accuracy,
        "activation_error": measures.activation_error(made.model),
        "relative_gap": made.gap,
        "seconds": made.seconds,
        "settings": made.settings,
    }


def along_path(
    task: Task, a_class: int, seed: int, strengths: tuple[float, ...], ways: dict[float, Row]
) -> Iterator[Row]:
    """One task of part 6; ``ways`` are Adam's settings for each strength, where they are known."""
    measures = Measures(task, BLOCK.name)
    opponents = Opponents(task, BLOCK, measures)
    first = {"seed": seed, "images_a_class": a_class}
    made = opponents.placed(opponents.ridges.student(WHOLE_MAP), 0.0, "")
    yield {**first, "student": RIDGE, "strength": float("nan"), **measured(measures, made)}
    # Nothing is chosen along a path: it has all images, as Adam has.
    task_of = (all_images(opponents), opponents.module, seed, strengths)
    for name, root in {ONE_VS_ALL: None, WEIGHTED: opponents.root.numpy()}.items():
        for point in path(*task_of, root=root):
            row = {**first, "student": name, "strength": point.strength}
            yield {**row, **measured(measures, placed(task, point))}
            if name == WEIGHTED:
                continue
            kept = ways.get(point.strength)
            if kept is None:
                way = tuned(opponents, point.numbers, point.seconds)
                kept = {"learning_rate": way.learning_rate, "weighted": way.weighted}
            made = relu_by_adam(opponents, point.numbers, as_settings(kept), point.seconds, seed)
            yield {**row, "student": ADAM, **measured(measures, made), **kept}


def placed(task: Task, point: Point) -> Made:
    """A point of the path in the network."""
    model = cvxdistill.swap_block(task.model, BLOCK.name, point.student())
    about = f"{point.units} units, {point.gates} gates"
    return Made(model, point.numbers, point.seconds, about, point.gap)


def rows_where(unfinished: Path, **where: Any) -> list[Row]:
    """What is done, by this run or another, of some seed and size."""
    rows = read_rows(unfinished)
    return [row for row in rows if all(row[name] == value for name, value in where.items())]


def chosen(rows: list[Row], seed: int, **where: Any) -> Row | None:
    """Adam's settings of seed 0, from the rows that are done; None for that seed itself.

    Raises
    ------
    RuntimeError
        If seed 0 is not done.
    """
    if seed == 0:
        return None
    for row in rows:
        of_adam = row["seed"] == 0 and row["student"] == ADAM
        if of_adam and all(row[name] == value for name, value in where.items()):
            return {name: row[name] for name in ("learning_rate", "weighted")}
    raise RuntimeError(f"seed 0, on whose images Adam is tuned, comes first; not done: {where}.")


def bands(table: pd.DataFrame, by: list[str], column: str = "accuracy") -> pd.DataFrame:
    """Mean and two standard deviations over the seeds as text, a column for each student."""
    scale, digits = (100, 1) if column == "accuracy" else (1, 3)
    found = scale * table.groupby([*by, "student"])[column].agg(["mean", "std"])
    text = [f"{mean:.{digits}f} ± {2 * std:.{digits}f}" for mean, std in found.fillna(0).to_numpy()]
    wide = pd.Series(text, found.index).unstack("student")
    order = [name for name in ORDER if name in wide] + [n for n in wide if n not in ORDER]
    return wide[order].fillna("-")


def verdicts(table: pd.DataFrame, by: list[str], ours: str, theirs: str) -> pd.DataFrame:
    """How one student does beside another, from seeds that have both: points of accuracy.

    ``lead`` is the mean difference, ``wins`` the number of seeds in which the first is ahead;
    ``apart`` says whether it is ahead and the bands of 2 standard deviations do not touch.
    """
    wide = table.pivot_table("accuracy", [*by, "seed"], "student")[[ours, theirs]].dropna() * 100
    rows = []
    for key, pair in wide.groupby(by, sort=True):
        lead = pair[ours] - pair[theirs]
        spread = 2 * (pair[ours].std() + pair[theirs].std())
        rows.append(
            {
                **dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True)),
                "seeds": len(pair),
                ours: pair[ours].mean(),
                theirs: pair[theirs].mean(),
                "lead": lead.mean(),
                "wins": int((lead > 0).sum()),
                "apart": bool(lead.mean() > spread),
            }
        )
    return pd.DataFrame(rows)


BESIDE = ["lead", "wins", "apart"]


def gates_buy(table: pd.DataFrame) -> pd.DataFrame:
    """Linear beside gated students of ``distill`` within the same numbers."""
    both = table[table["student"].isin([DISTILLED, GATED])]
    columns = {
        f"{column.replace('_', ' ')}, {name}": bands(both, ["filters"], column)[name]
        for column in ("activation_error", "accuracy")
        for name in (DISTILLED, GATED)
    }
    return pd.DataFrame(columns).reset_index()


def summarise_sizes(table: pd.DataFrame) -> pd.DataFrame:
    """Figure 3b: accuracies of each size, and how the best convex student does beside Adam's."""
    table = table[table["student"] != DISTILLED]
    budgets = table.groupby("filters")["budget"].first().rename("numbers")
    of_seeds = verdicts(table, ["filters"], BEST, ADAM).set_index("filters")
    summary = pd.concat([budgets, bands(table, ["filters"]), of_seeds[["seeds", *BESIDE]]], axis=1)
    of_longer = verdicts(table, ["filters"], BEST, LONGER).set_index("filters")[BESIDE]
    return summary.join(of_longer.add_suffix(", 10 times")).reset_index()


def summarise_sweep(table: pd.DataFrame) -> pd.DataFrame:
    """Figure 6: accuracies of each number of images along the path."""
    by = ["images_a_class", "strength"]
    ridges = table[table["student"] == RIDGE]
    of_path = table[table["student"] != RIDGE]
    ours = of_path[of_path["student"] == ONE_VS_ALL].groupby(by)
    theirs = of_path[of_path["student"] == WEIGHTED].groupby(by)
    of_weighted = verdicts(of_path, by, WEIGHTED, ADAM).set_index(by)[BESIDE]
    summary = pd.concat(
        [
            ours["parameters"].mean().round().astype(int).rename("numbers"),
            theirs["parameters"].mean().round().astype(int).rename("numbers, weighted"),
            ours["seconds"].mean().round(1),
            of_path.groupby(by)["relative_gap"].max().rename("largest gap"),
            bands(of_path, by),
            verdicts(of_path, by, ONE_VS_ALL, ADAM).set_index(by)[["seeds", *BESIDE]],
            of_weighted.add_suffix(", weighted"),
        ],
        axis=1,
    )
    summary = summary.reset_index().sort_values(by, ascending=[True, False])
    full = bands(ridges, by[:1])[RIDGE]
    return summary.assign(**{"ridge, full map": summary["images_a_class"].map(full)})


def draw_sizes(table: pd.DataFrame, file: Any) -> None:
    """Figure 3b: accuracy by numbers stored, mean and two standard deviations."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, line in table.groupby("student", sort=False):
        if name not in STYLES:
            continue
        by_size = 100 * line.groupby("budget")["accuracy"].agg(["mean", "std"])
        (drawn,) = axis.plot(by_size.index, by_size["mean"], STYLES[name], label=name, ms=4)
        low, high = (by_size["mean"] + k * by_size["std"].fillna(0) for k in (-2, 2))
        axis.fill_between(by_size.index, low, high, color=drawn.get_color(), alpha=0.15, lw=0)
    top = 100 * table["teacher_accuracy"].iloc[0]
    axis.axhline(top, color="black", lw=0.8, ls=":", label="teacher")
    axis.set(xscale="log", xlabel="numbers stored in place of the block", ylim=(40, 90))
    axis.set(ylabel="test accuracy [%]", title=f"layer4 from few images, {_seeds(table)}")
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_sweep(table: pd.DataFrame, file: Any) -> None:
    """Figure 6: accuracy along the path by seconds, a panel for each number of images."""
    counts = sorted(table["images_a_class"].unique())
    figure, axes = plt.subplots(
        1, len(counts), figsize=(3.4 * len(counts), 4.2), layout="constrained", sharey=True
    )
    top = 100 * table["teacher_accuracy"].iloc[0]
    for axis, count in zip(np.atleast_1d(axes), counts, strict=True):
        here = table[table["images_a_class"] == count]
        for name in (ONE_VS_ALL, WEIGHTED, ADAM):
            by_point = here[here["student"] == name].groupby("strength", sort=True)
            accuracy = 100 * by_point["accuracy"].agg(["mean", "std"])
            seconds = by_point["seconds"].mean()
            (drawn,) = axis.plot(seconds, accuracy["mean"], STYLES[name], label=name, ms=4)
            low, high = (accuracy["mean"] + k * accuracy["std"].fillna(0) for k in (-2, 2))
            axis.fill_between(seconds, low, high, color=drawn.get_color(), alpha=0.15, lw=0)
        ridge = 100 * here[here["student"] == RIDGE]["accuracy"].mean()
        axis.axhline(ridge, color="C7", ls="--", lw=1, label="ridge, full map")
        axis.axhline(top, color="black", lw=0.8, ls=":", label="teacher")
        axis.set(xscale="log", xlabel="CPU seconds", title=f"{count:,} a class, {_seeds(here)}")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    np.atleast_1d(axes)[0].set_ylabel("test accuracy [%]")
    np.atleast_1d(axes)[0].legend(fontsize=8)
    figure.suptitle("layer4 as a dense student along a path: means and 2 standard deviations")
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _seeds(table: pd.DataFrame) -> str:
    return f"{table['seed'].nunique()} seeds"


def part_3b(drawing: Drawing, seeds: Sequence[int], quick: bool, unfinished: Any) -> pd.DataFrame:
    """All seeds and sizes that are not done yet, and then all rows."""
    a_class, sizes = (QUICK_A_CLASS, QUICK_FILTERS) if quick else (A_CLASS, FILTERS)
    for seed in seeds:
        left = [m for m in sizes if not rows_where(unfinished, seed=seed, filters=m)]
        if not left:
            continue
        few = Few(drawing, a_class, seed)
        for m in left:
            kept = chosen(read_rows(unfinished), seed, filters=m)
            new = list(few.rows(m, None if kept is None else as_settings(kept)))
            append_rows(unfinished, new)
            for row in new:
                print(
                    f"seed {seed}, {m} filters, {row['student']}: {row['parameters']:,} of "
                    f"{row['budget']:,}, {100 * row['accuracy']:.2f} %, {row['seconds']:.1f} s, "
                    f"{row['settings']}",
                    flush=True,
                )
    return pd.DataFrame([row for seed in seeds for row in rows_where(unfinished, seed=seed)])


def part_6(drawing: Drawing, seeds: Sequence[int], quick: bool, unfinished: Any) -> pd.DataFrame:
    """All seeds and numbers of images that are not done yet, and then all rows."""
    sweep, strengths = (QUICK_SWEEP, QUICK_STRENGTHS) if quick else (SWEEP, STRENGTHS)
    for seed in seeds:
        for a_class, most in sweep.items():
            where = {"images_a_class": a_class}
            if rows_where(unfinished, seed=seed, **where) or seed >= most:
                continue
            rows = read_rows(unfinished)
            known = {s: chosen(rows, seed, strength=s, **where) for s in strengths}
            ways = {s: kept for s, kept in known.items() if kept is not None}
            task = drawing.task(a_class, seed)
            new = list(along_path(task, a_class, seed, strengths, ways))
            append_rows(unfinished, new)
            for row in new:
                print(
                    f"seed {seed}, {CLASSES * a_class:,} images, {row['strength']:g}, "
                    f"{row['student']}: {row['parameters']:,} numbers, "
                    f"{100 * row['accuracy']:.2f} %, {row['seconds']:.1f} s, {row['settings']}",
                    flush=True,
                )
    return pd.DataFrame([row for seed in seeds for row in rows_where(unfinished, seed=seed)])


PARTS = {
    "3b": ("figure3b", part_3b, draw_sizes, {"summary": summarise_sizes, "gates": gates_buy}),
    "6": ("figure6", part_6, draw_sweep, {"summary": summarise_sweep}),
}


@click.command()
@click.option(
    "--part", multiple=True, default=[*PARTS], show_default=True, type=click.Choice([*PARTS])
)
@click.option("--seeds", default=SEEDS, show_default=True, type=click.IntRange(1))
@click.option(
    "--only",
    multiple=True,
    type=click.IntRange(0),
    help="Only this one of the seeds; may be given more than once. Another run may do the others.",
)
@click.option("--quick", is_flag=True, help="Two seeds of fewer images and sizes.")
def main(part: tuple[str, ...], seeds: int, only: tuple[int, ...], quick: bool) -> None:
    """Fit, measure, print the tables and write them with their pictures.

    An interrupted run goes on where it stopped. Fewer seeds are written to bench/.cache.
    """
    cpu_clock.one_thread()
    print(describe_machine("numpy", "torch", "numba", "cvxdistill"), flush=True)
    wanted = only or tuple(range(min(seeds, QUICK_SEEDS) if quick else seeds))
    everything = set(wanted) >= set(range(SEEDS)) and not quick
    folder = cpu_clock.RESULTS if everything else cpu_clock.CACHE
    folder.mkdir(parents=True, exist_ok=True)
    drawing = Drawing(QUICK_TEST_IMAGES if quick else None)
    for name in part:
        title, compute, draw, summaries = PARTS[name]
        unfinished = rows_file(title, quick)
        table = compute(drawing, wanted, quick, unfinished)
        if only:
            continue
        output = folder / title
        table.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
        draw(table, output.with_suffix(".png"))
        print(f"\nTeacher: {100 * table['teacher_accuracy'].iloc[0]:.2f} %. Over the seeds:")
        for kind, summarise in summaries.items():
            summary = summarise(table)
            summary.to_csv(f"{output}_{kind}.csv", index=False, float_format="%.3g")
            print(summary.to_string(index=False, float_format="%.3g") + "\n")
        print(f"wrote {output}.csv and .png")
        if everything or quick:
            unfinished.unlink()


if __name__ == "__main__":
    main()
