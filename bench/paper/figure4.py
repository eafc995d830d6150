"""The paper's figures 3a and 4: students of a block at ten sizes, beside pruning and Adam.

    python bench/paper/figure4.py                              ResNet-18: layer3, layer4 and both
    python bench/paper/figure4.py --network resnet20           layer3, layer3.2 and layer2
    python bench/paper/figure4.py --network resnet20 --norms-anew
    python bench/paper/figure4.py --quick                      three sizes, 2,000 images

The sizes are those of the paper's convex student with m = 1, 2, 4, ..., 512 filters of 3 x 3, gates
and batch norms counted (``table1_parameters``), as far as they are smaller than the block. Whatever
stands in the block's place may store so many numbers. Nobody sees a label before the accuracy is
measured on the 10,000 test images; a tenth of the 10,000 training images is held out and chooses.
All start from the recorded inputs of the first block, and the rest of the network.

Convex students:

    linear      ``compress`` of the block alone: one linear student
    several     ``compress`` of the block and all its layers: several small ones, or one
    sparse      the same with students of few weights among them; their places are counted, too
    gated       ``distill(student="gated")``, the block's own gates, fitted to what the network
                makes of the block's outputs

Baselines, see ``bench/baselines.py``: the ReLU student by Adam with batches of 128 and with full
batches, the gated one by Adam, magnitude pruning, truncated singular value decompositions, ridge
regression. Which student of a kind is best, and which kind, is decided by how many held-out images
it classifies otherwise than the teacher; among those level, by the divergence of the classes'
probabilities from the teacher's.

With ``--norms-anew`` the network to be compressed is another: the block's batch norms have the
means and variances of the training images, as the baselines' may have. That alone makes the
ResNet-20 better.

Times are CPU seconds on one thread. One ``Compressor`` makes the students of all sizes of a block,
and one ``distill`` call the gated ones; what the sizes share counts for each as its equal part. The
best convex student's time T at a size, but at least 10 s, is Adam's measure: each setting (learning
rate, kernel, plain or weighted loss) is tried for T / 4, the best of a kind trained for T, and the
best of all ReLU students for 10 T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import cpu_clock
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from contest import (
    BEST,
    CONVEX,
    NETWORKS,
    Block,
    Made,
    Measures,
    Opponents,
    block_numbers,
    compressing,
    distilled,
    inside,
    make_task,
    with_block_norms_anew,
)
from machine import describe_machine
from teachers import Teacher, load_teacher
from unfinished import append_rows, read_rows, rows_file

import cvxdistill
from cvxdistill.adapters import table1_parameters

FILTERS = tuple(2**k for k in range(10))
IMAGES = 10_000
QUICK_FILTERS, QUICK_IMAGES = (2, 16, 128), 2_000
STYLES = {
    BEST: "k-",
    "linear": "C0o-",
    "several": "C1s-",
    "sparse": "C9P-",
    "gated": "C2^-",
    "Adam, 10 times": "C3v--",
    "Adam, batches": "C3x:",
    "Adam, full batches": "C6x:",
    "Adam, gated": "C8x:",
    "pruning": "C4d--",
    "SVD": "C5d--",
    "ridge": "C7.:",
}
TITLES = {"resnet18": "ResNet-18", "resnet20": "ResNet-20"}


class Contest:
    """One block: the convex students and their opponents at any size."""

    def __init__(
        self,
        teacher: Teacher,
        block: Block,
        images: int,
        test_images: int | None,
        *,
        norms_anew: bool,
    ):
        self.task = make_task(teacher, block.start, images, test_images)
        if norms_anew:
            self.task = with_block_norms_anew(self.task, block.name)
        self.block = block
        self.measures = Measures(self.task, block.name)
        self.opponents = Opponents(self.task, block, self.measures)
        self.whole = block_numbers(self.task.model, block.name)
        self.sites = inside(self.task, [block.name])

    def budget(self, m: int) -> int:
        """Numbers of the paper's student with m filters."""
        data = self.opponents.fitted
        return table1_parameters(data.inputs.shape[1], data.outputs.shape[1], m)

    @property
    def sizes(self) -> int:
        """How many sizes of the figure are smaller than the block."""
        return sum(self.budget(m) < self.whole for m in FILTERS)

    @cached_property
    def ways(self) -> dict[str, Callable[[int], Made]]:
        """What makes a convex student within a budget, by its name."""
        name, task, whole, n = self.block.name, self.task, self.whole, self.sizes
        gated = distilled(task, name, self.block.match, n)
        return {
            "linear": compressing(task, [name], whole, n),
            "several": compressing(task, self.sites, whole, n),
            "sparse": compressing(task, self.sites, whole, n, sparse=True),
            "gated": lambda budget: gated("gated", budget),
        }

    def students(self, m: int) -> Iterator[tuple[str, Made]]:
        """All of them, the convex ones first."""
        budget = self.budget(m)
        convex: list[Made] = []
        for name, way in self.ways.items():
            try:
                convex.append(way(budget))
            except ValueError as error:
                print(f"{self.block.name}, {m} filters, {name}: {error}")
                continue
            yield name, convex[-1]
        best = self.opponents.best(convex)
        yield BEST, best
        yield from self.opponents.quick(budget)
        yield from self.opponents.adam(budget, best.seconds)


class Both:
    """Two blocks that run one after the other: their students together, of the same size."""

    def __init__(self, contests: list[Contest]):
        self.contests = contests
        self.task = contests[0].task
        self.names = [contest.block.name for contest in contests]
        self.measures = Measures(self.task, None)
        self.whole = sum(contest.whole for contest in contests)
        self.sites = inside(self.task, [*self.names, ":".join(self.names)])

    def budget(self, m: int) -> int:
        """Of both together."""
        return sum(contest.budget(m) for contest in self.contests)

    @cached_property
    def ways(self) -> dict[str, Callable[[int], Made]]:
        """What makes students of both within a budget, by its name."""
        n = min(contest.sizes for contest in self.contests)
        return {
            name: compressing(self.task, self.sites, self.whole, n, sparse=name == "sparse")
            for name in ("several", "sparse")
        }

    def students(self, m: int, made: list[dict[str, Made]]) -> Iterator[tuple[str, Made]]:
        """``compress`` of both, and what was made of each, put together."""
        convex = []
        for name, way in self.ways.items():
            convex.append(way(self.budget(m)))
            yield name, convex[-1]
        for name in made[0]:
            if name in self.ways or not all(name in of_block for of_block in made):
                continue
            model = self.task.model
            for block, of_block in zip(self.names, made, strict=True):
                student = of_block[name].model.get_submodule(block)
                model = cvxdistill.swap_block(model, block, student)
            parts = [of_block[name] for of_block in made]
            together = Made(
                model, sum(p.numbers for p in parts), sum(p.seconds for p in parts), "one by one"
            )
            if name == BEST:
                convex.append(together)
                together = max(convex, key=lambda one: self.measures.closeness(one.model))
            yield name, together


def row_of(network: str, of: Contest | Both, m: int, name: str, made: Made) -> dict[str, Any]:
    """One line of the table."""
    block = of.block.name if isinstance(of, Contest) else "both"
    return {
        "network": network,
        "block": block,
        "filters": m,
        "budget": of.budget(m),
        "student": name,
        "parameters": made.numbers,
        "agreement": of.measures.agreement(made.model),
        "accuracy": of.measures.accuracy(made.model),
        "teacher_accuracy": of.measures.teacher_accuracy,
        "activation_error": of.measures.activation_error(made.model),
        "relative_gap": made.gap,
        "seconds": made.seconds,
        "settings": made.settings,
    }


def rows_of_size(
    network: str, contests: list[Contest], both: Both | None, m: int
) -> Iterator[dict[str, Any]]:
    """Everything at one size, but for blocks that are not larger."""
    made: list[dict[str, Made]] = []
    for contest in contests:
        if contest.budget(m) >= contest.whole:
            continue
        made.append({})
        for name, student in contest.students(m):
            made[-1][name] = student
            yield row_of(network, contest, m, name, student)
    if both is not None and len(made) == len(contests):
        for name, student in both.students(m, made):
            yield row_of(network, both, m, name, student)


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """The best convex student beside the best of the baselines by test accuracy, size by size.

    And beside the baseline chosen as it was, by agreement on the held-out images.
    """
    rows = []
    for (block, m), group in table.groupby(["block", "filters"], sort=False):
        accuracy, agreement = (
            group.set_index("student")[name] for name in ("accuracy", "agreement")
        )
        others = accuracy.drop([*CONVEX, BEST], errors="ignore")
        rows.append(
            {
                "block": block,
                "filters": m,
                "budget": group["budget"].iloc[0],
                "best convex": accuracy[BEST],
                "best baseline": others.max(),
                "which": others.idxmax(),
                "ahead": accuracy[BEST] >= others.max(),
                "of equal choice": accuracy[BEST] >= accuracy[agreement[others.index].idxmax()],
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, network: str, file: Path) -> None:
    """Accuracy against size, one subplot a block."""
    blocks = list(dict.fromkeys(table["block"]))
    figure, axes = plt.subplots(
        1, len(blocks), figsize=(5 * len(blocks), 4.4), layout="constrained", sharey=True
    )
    for axis, block in zip(np.atleast_1d(axes), blocks, strict=True):
        for name, style in STYLES.items():
            line = table[(table["block"] == block) & (table["student"] == name)]
            if len(line):
                axis.plot(line["budget"], 100 * line["accuracy"], style, label=name, markersize=4)
        top = table.loc[table["block"] == block, "teacher_accuracy"].iloc[0]
        axis.axhline(100 * top, color="black", linewidth=0.8, linestyle=":", label="teacher")
        axis.set(xscale="log", xlabel="numbers stored in place of the block", title=block)
    np.atleast_1d(axes)[0].set_ylabel("test accuracy, %")
    np.atleast_1d(axes)[0].legend(fontsize=7)
    figure.suptitle(f"{TITLES[network]} on CIFAR-10, no labels, no fine-tuning")
    figure.savefig(file, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--network", default="resnet18", show_default=True, type=click.Choice([*NETWORKS]))
@click.option(
    "--filters",
    multiple=True,
    type=click.IntRange(1),
    help="Only these sizes; may be given more than once. Another run may do the others.",
)
@click.option("--norms-anew", is_flag=True, help="Estimate the block's batch norms anew first.")
@click.option("--quick", is_flag=True, help="Three sizes and 2,000 images, into bench/.cache.")
def main(network: str, filters: tuple[int, ...], norms_anew: bool, quick: bool) -> None:
    """Fit, measure, print the table and write it with its picture.

    An interrupted run goes on where it stopped.
    """
    cpu_clock.one_thread()
    print(describe_machine("numpy", "torch", "cvxdistill"))
    wanted = filters or (QUICK_FILTERS if quick else FILTERS)
    images, test_images = (QUICK_IMAGES, 2_000) if quick else (IMAGES, None)
    if norms_anew and network == "resnet18":
        raise click.BadParameter("two blocks in a row would each have others; only for resnet20.")
    name = "figure4" if network == "resnet18" else f"figure4_{network}"
    name += "_norms_anew" if norms_anew else ""
    unfinished = rows_file(name, quick)
    output = unfinished.with_suffix("")
    teacher = load_teacher(network)
    contests: list[Contest] = []
    both: Both | None = None
    for m in wanted:
        if m in {row["filters"] for row in read_rows(unfinished)}:
            continue
        if not contests:  # Recorded only where there is something left to do.
            contests = [
                Contest(teacher, block, images, test_images, norms_anew=norms_anew)
                for block in NETWORKS[network]
            ]
            both = Both(contests) if network == "resnet18" else None
        rows = []
        for row in rows_of_size(network, contests, both, m):
            rows.append(row)
            print(
                f"{row['block']}, {m} filters, {row['student']}: {row['parameters']:,} of "
                f"{row['budget']:,}, accuracy {row['accuracy']:.4f}, {row['seconds']:.1f} s, "
                f"{row['settings']}",
                flush=True,
            )
        append_rows(unfinished, rows)
    rows = read_rows(unfinished)
    table = pd.DataFrame(rows).sort_values("filters", kind="stable")
    order = [block.name for block in NETWORKS[network]] + ["both"]
    table["block"] = pd.Categorical(table["block"], order, ordered=True)
    table = table.sort_values(["block", "filters"], kind="stable")
    table["block"] = table["block"].astype(str)
    if not filters:
        table.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
        draw(table, network, output.with_suffix(".png"))
        unfinished.unlink()
        print(f"wrote {output}.csv and .png")
    for block, accuracy in table.groupby("block", sort=False)["teacher_accuracy"].first().items():
        print(f"Network of {block}: {accuracy:.4f}")
    print(verdicts(table).to_string(index=False, float_format="%.4f"))


if __name__ == "__main__":
    main()
