"""The paper's figures 3a and 4: students of a block at ten sizes, beside pruning and Adam.

    python bench/paper/figure4.py                              ResNet-18: layer3, layer4 and both
    python bench/paper/figure4.py --network resnet20           layer3, layer3.2 and layer2
    python bench/paper/figure4.py --quick                      three sizes, 2,000 images

The sizes are those of the paper's convex student with m = 1, 2, 4, ..., 512 filters of 3 x 3, gates
and batch norms counted (``table1_parameters``), as far as they are smaller than the block. Whatever
stands in the block's place may store so many numbers. Nobody sees a label before the accuracy is
measured on the 10,000 test images; a tenth of the 10,000 training images is held out and chooses.
All start from the recorded inputs of the first block, and the rest of the network.

Convex students:

    linear      ``compress`` of the block alone: one linear student
    several     ``compress`` of the block and all its layers: several small ones, or one
    gated       ``distill(student="gated")``, the block's own gates

Baselines, see ``bench/baselines.py``: the ReLU student by Adam with batches of 128 and with full
batches, the gated one by Adam, magnitude pruning, truncated singular value decompositions, ridge
regression. Which student of a kind is best, and which kind, is decided by how many held-out images
it classifies otherwise than the teacher.

Times are CPU seconds on one thread. The best convex student's time T at a size, its ``compress`` or
``distill`` call from first to last, is Adam's measure: each setting (learning rate, kernel, plain
or weighted loss) is tried for T / 4, the best of a kind trained for T, and the best of all ReLU
students for 10 T.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import cpu_clock
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from baselines import (
    Activations,
    AdamSettings,
    Convolution,
    Ridges,
    adam_student,
    filters_within,
    pruned,
    stored_numbers,
    truncated_svd,
    with_norms_anew,
)
from datasets import load_cifar10, normalise
from machine import describe_machine
from teachers import Teacher, load_teacher
from torch import Tensor, nn

import cvxdistill
from cvxdistill.adapters import find_sites, infer_layout, output_metrics, table1_parameters
from cvxdistill.adapters.spans import Span
from cvxdistill.student_curves import Weighting

FILTERS = tuple(2**k for k in range(10))
IMAGES, HELD_OUT = 10_000, 0.1
QUICK_FILTERS, QUICK_IMAGES = (2, 16, 128), 2_000
BATCH = 128
# Of Adam with batches, and with all examples at each step.
RATES = {BATCH: (1e-3, 3e-3, 1e-2), None: (3e-3, 1e-2, 3e-2)}
PILOT, LONG = 0.25, 10
# Of the gated students: gates, and the most seconds for each alpha.
GATES, SECONDS_AN_ALPHA = 16, 5.0
# The least CPU seconds that Adam has.
LEAST_SECONDS = 2.0


@dataclass(frozen=True)
class Block:
    """What is replaced, and how its students' first layers may look.

    Attributes
    ----------
    name : str
    start : str
        The block from whose inputs everything is run.
    first : tuple of Convolution
    second : tuple of int
        Kernel sizes: of what sees no padding alone.
    """

    name: str
    start: str
    first: tuple[Convolution, ...]
    second: tuple[int, ...]


PLAIN = Convolution(3, 1, 1)
STRIDED = (Convolution(3, 2, 1), Convolution(5, 2, 2))
NETWORKS = {
    "resnet18": (
        Block("layer3", "layer3", STRIDED[:1], (1, 3)),
        # 2 x 2 inputs: of 3 x 3 weights 5 would meet padding alone.
        Block("layer4", "layer4", (Convolution(2, 1, 0),), (1,)),
    ),
    "resnet20": (
        Block("layer3", "layer3", STRIDED, (1, 3)),
        Block("layer3.2", "layer3", (PLAIN,), (1, 3)),
        Block("layer2", "layer2", STRIDED, (1, 3)),
    ),
}
CONVEX, BEST = ("linear", "several", "gated"), "best convex"
STYLES = {
    BEST: "k-",
    "linear": "C0o-",
    "several": "C1s-",
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


class MeanOverPixels(nn.Module):
    """(N, C, H, W) to (N, C)."""

    def forward(self, z: Tensor) -> Tensor:
        return z.mean(dim=(2, 3))


def tail(model: nn.Module, start: str) -> nn.Sequential:
    """The network from a block on, under the same names."""
    children = OrderedDict(model.named_children())
    names = list(children)[list(children).index(start) :]
    parts = OrderedDict((name, children[name]) for name in names)
    if "avgpool" in parts:
        parts = OrderedDict(
            item
            for name, module in parts.items()
            for item in ((name, module), *([("flat", nn.Flatten())] if name == "avgpool" else []))
        )
    else:
        parts["pool"] = MeanOverPixels()
        parts.move_to_end("linear")
    return nn.Sequential(parts).eval()


@dataclass(frozen=True)
class Task:
    """A network from a block on, its recorded inputs, and what the network makes of them."""

    model: nn.Module
    training: Tensor
    fitted: slice
    test: Tensor
    labels: np.ndarray

    @property
    def held_out(self) -> slice:
        """The rest."""
        return slice(self.fitted.stop, len(self.training))


def run(model: nn.Module, inputs: Tensor) -> Tensor:
    """What a model returns, in batches."""
    with torch.inference_mode():
        return torch.cat([model(part) for part in inputs.split(250)])


def make_task(teacher: Teacher, start: str, images: int, test_images: int | None) -> Task:
    """Record the inputs of a block, and take the network from there on."""
    model = tail(teacher.model, start)
    recorded = []
    for part, count in (("train", images), ("test", test_images)):
        photos, labels = load_cifar10(part, count)
        batches = torch.from_numpy(normalise(photos, teacher.mean, teacher.std)).split(250)
        found: list[Tensor] = []
        hook = teacher.model.get_submodule(start).register_forward_pre_hook(
            lambda _, args, found=found: found.append(args[0])
        )
        with torch.inference_mode():
            for batch in batches:
                teacher.model(batch)
        hook.remove()
        recorded.append(torch.cat(found).clone())
    training, test = recorded
    if not torch.allclose(run(model, test[:50]), run(teacher.model, batches[0][:50]), atol=1e-4):
        raise RuntimeError(f"the network from {start} on is not what it was cut from.")
    return Task(model, training, slice(0, round(len(training) * (1 - HELD_OUT))), test, labels)


class Measures:
    """A task's held-out and test measures of models with a student in a block's place, if one."""

    def __init__(self, task: Task, block: str | None) -> None:
        self.task, self.block = task, block
        self.answers = run(task.model, task.training[task.held_out]).argmax(1)
        self.test = None if block is None else record(task, block, task.test)
        self.teacher_accuracy = self.accuracy(task.model)

    def agreement(self, model: nn.Module) -> float:
        """Share of held-out images classified as the teacher does."""
        found = run(model, self.task.training[self.task.held_out]).argmax(1)
        return float((found == self.answers).double().mean())

    def accuracy(self, model: nn.Module) -> float:
        """On the test images, by their labels."""
        right = run(model, self.task.test).argmax(1).numpy() == self.task.labels
        return float(right.mean())

    def activation_error(self, model: nn.Module) -> float:
        """||Y' - Y||_F / ||Y||_F on the test images, of what is in the one block's place."""
        if self.block is None or self.test is None:
            return float("nan")
        with torch.inference_mode():
            found = run(model.get_submodule(self.block), self.test.inputs)
            wrong = torch.linalg.norm(found - self.test.outputs)
            return float(wrong / torch.linalg.norm(self.test.outputs))


def record(task: Task, block: str, inputs: Tensor) -> Activations:
    """What a block takes and gives."""
    with cvxdistill.adapters.capture(task.model, block, inputs, verbose=0) as captured:
        arrays = (np.array(captured.inputs), np.array(captured.outputs))
    return Activations(*map(torch.from_numpy, arrays))


@dataclass(frozen=True)
class Made:
    """A model with something in the block's place."""

    model: nn.Module
    numbers: int
    seconds: float
    settings: str = ""
    gap: float = float("nan")


def block_numbers(model: nn.Module, block: str) -> int:
    """Parameters of a block."""
    return sum(p.numel() for p in model.get_submodule(block).parameters())


def compressed(task: Task, blocks: list[str], whole: int, budget: int) -> Made:
    """``compress`` within a budget for what it may replace, which has ``whole`` numbers."""
    total = sum(p.numel() for p in task.model.parameters())
    start = time.process_time()
    result = cvxdistill.compress(
        task.model,
        task.training,
        max_parameters=total - whole + budget,
        blocks=blocks,
        criterion="agreement",
        validation_fraction=HELD_OUT,
        verbose=0,
    )
    seconds = time.process_time() - start
    chosen = "; ".join(f"{c.block}: {c.student}" for c in result.choices)
    gap = max((c.relative_gap for c in result.choices), default=float("nan"))
    return Made(result.model, result.after - (total - whole), seconds, chosen, gap)


def gated(task: Task, block: str) -> Callable[[int], Made]:
    """The gated students of ``distill``: for a budget, the best held-out one that fits."""
    start = time.process_time()
    result = cvxdistill.distill(
        task.model,
        block,
        task.training,
        student="gated",
        n_gates=GATES,
        max_rows=None,
        time_limit=SECONDS_AN_ALPHA,
        verbose=0,
    )
    seconds = time.process_time() - start

    def within(budget: int) -> Made:
        fits = [c for c in result.candidates if c.kind == "gated" and c.parameters <= budget]
        if not fits:
            raise ValueError(f"no gated student has {budget:,} numbers or fewer.")
        best = min(fits, key=lambda c: c.error)
        model = cvxdistill.swap_block(task.model, block, best.student)
        about = f"{best.n_neurons} units, {best.n_gates} gates"
        return Made(model, best.parameters, seconds, about, best.duality_gap)

    return within


def inside(task: Task, names: list[str]) -> list[str]:
    """Blocks that ``compress`` finds by itself within these."""
    found = find_sites(task.model, task.training[:4]).sites
    parts = [name + "." for name in names]
    own = [
        site.name
        for site in found
        if site.name in names
        or any(all(end.startswith(p) for end in site.name.split(":")) for p in parts)
    ]
    return [*names, *(name for name in own if name not in names)]


class Opponents:
    """The baselines of one block."""

    def __init__(self, task: Task, block: Block, measures: Measures) -> None:
        self.task, self.block, self.measures = task, block, measures
        data = record(task, block.name, task.training)
        self.fitted, self.held_out = data.part(task.fitted), data.part(task.held_out)
        self.module = task.model.get_submodule(block.name)
        layout = infer_layout(tuple(data.inputs.shape[1:]), tuple(data.outputs.shape[1:]))
        self.ridges = Ridges(self.fitted, self.held_out, layout)
        batches = iter(task.training[task.fitted][:400].split(100))
        span = Span(block.name, block.name)
        (metric,) = output_metrics(task.model, [span], batches, np.random.default_rng(0))
        weighting = Weighting.of(metric)
        assert weighting is not None
        self.root = torch.from_numpy(weighting.root.astype(np.float32))

    def placed(self, student: nn.Module, seconds: float, settings: str) -> Made:
        """In the network."""
        model = cvxdistill.swap_block(self.task.model, self.block.name, student)
        return Made(model, stored_numbers(student), seconds, settings)

    def best(self, found: list[Made]) -> Made:
        """By agreement on held-out images."""
        return max(found, key=lambda made: self.measures.agreement(made.model))

    def quick(self, budget: int) -> Iterator[tuple[str, Made]]:
        """All but Adam."""
        inputs = self.fitted.inputs

        def variants(block: nn.Module, about: str) -> list[Made]:
            anew = with_norms_anew(block, inputs)
            return [
                self.placed(block, 0.0, about),
                self.placed(anew, 0.0, f"{about}, batch norms anew"),
            ]

        try:
            alike = variants(pruned(self.module, budget, alike=True), "each layer alike")
            overall = variants(pruned(self.module, budget, alike=False), "all layers together")
            yield "pruning", self.best(alike + overall)
            yield "SVD", self.best(variants(truncated_svd(self.module, budget), "by energy"))
        except ValueError:
            pass  # The biases alone are more than the budget.
        with suppress(ValueError):
            yield "ridge", self.placed(self.ridges.student(budget), 0.0, "unweighted")

    def adam(self, budget: int, seconds: float) -> Iterator[tuple[str, Made]]:
        """Adam for the convex student's seconds, and the best of it for ten times as long."""
        seconds = max(seconds, LEAST_SECONDS)
        kinds = {
            "Adam, batches": ("ReLU", BATCH),
            "Adam, full batches": ("ReLU", None),
            "Adam, gated": ("gated", BATCH),
        }
        trained: dict[str, tuple[AdamSettings, Made]] = {}
        settings = None
        for name, (kind, batch) in kinds.items():
            ways = [
                AdamSettings(rate, batch, first, second, weighted)
                for rate in RATES[batch]
                for first in self.block.first
                for second in (self.block.second if kind == "ReLU" else (1,))
                for weighted in (False, True)
            ]
            if settings is not None:
                # Kernels and loss as the first kind found them best.
                ways = [
                    w for w in ways if w.first == settings.first and w.weighted == settings.weighted
                ]
                if kind == "ReLU":
                    ways = [w for w in ways if w.second == settings.second]
            ways = [w for w in ways if filters_within(kind, budget, self.fitted, w) >= 1]
            if not ways:
                continue
            pilots = [self._trained(kind, budget, way, PILOT * seconds) for way in ways]
            way = ways[pilots.index(self.best(pilots))]
            settings = settings or way
            made = self._trained(kind, budget, way, seconds)
            trained[name] = (way, made)
            yield name, made
        relu = {name: pair for name, pair in trained.items() if kinds[name][0] == "ReLU"}
        if relu:
            best = self.best([made for _, made in relu.values()])
            way = next(way for way, made in relu.values() if made is best)
            yield "Adam, 10 times", self._trained("ReLU", budget, way, LONG * seconds)

    def _trained(self, kind: str, budget: int, way: AdamSettings, seconds: float) -> Made:
        student = adam_student(kind, self.fitted, budget, way, seconds, self.root, seed=0)
        about = (
            f"{student.first.out_channels} filters, {way.learning_rate:g}, "
            f"kernels {way.first.kernel} and {way.second}, "
            f"{'weighted' if way.weighted else 'plain'}"
        )
        return self.placed(student, seconds, about)


class Contest:
    """One block: the convex students and their opponents at any size."""

    def __init__(self, teacher: Teacher, block: Block, images: int, test_images: int | None):
        self.task = make_task(teacher, block.start, images, test_images)
        self.block = block
        self.measures = Measures(self.task, block.name)
        self.opponents = Opponents(self.task, block, self.measures)
        self.whole = block_numbers(self.task.model, block.name)
        self.sites = inside(self.task, [block.name])
        self._gated: Callable[[int], Made] | None = None

    def budget(self, m: int) -> int:
        """Numbers of the paper's student with m filters."""
        data = self.opponents.fitted
        return table1_parameters(data.inputs.shape[1], data.outputs.shape[1], m)

    def students(self, m: int) -> Iterator[tuple[str, Made]]:
        """All of them, the convex ones first."""
        budget = self.budget(m)
        self._gated = self._gated or gated(self.task, self.block.name)
        of_gates = self._gated
        ways: dict[str, Callable[[], Made]] = {
            "linear": lambda: compressed(self.task, [self.block.name], self.whole, budget),
            "several": lambda: compressed(self.task, self.sites, self.whole, budget),
            "gated": lambda: of_gates(budget),
        }
        convex: list[Made] = []
        for name, way in ways.items():
            try:
                convex.append(way())
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

    def students(self, m: int, made: list[dict[str, Made]]) -> Iterator[tuple[str, Made]]:
        """``compress`` of both, and what was made of each, put together."""
        convex = [compressed(self.task, self.sites, self.whole, self.budget(m))]
        yield "several", convex[0]
        for name in made[0]:
            if name == "several" or not all(name in of_block for of_block in made):
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
                together = max(convex, key=lambda one: self.measures.agreement(one.model))
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
    """The best convex student beside the best of the baselines by test accuracy, size by size."""
    rows = []
    for (block, m), group in table.groupby(["block", "filters"], sort=False):
        accuracy = group.set_index("student")["accuracy"]
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
            }
        )
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame, network: str, file: Path) -> None:
    """Accuracy against size, one subplot a block."""
    top = table["teacher_accuracy"].iloc[0]
    blocks = list(dict.fromkeys(table["block"]))
    figure, axes = plt.subplots(
        1, len(blocks), figsize=(5 * len(blocks), 4.4), layout="constrained", sharey=True
    )
    for axis, block in zip(np.atleast_1d(axes), blocks, strict=True):
        for name, style in STYLES.items():
            line = table[(table["block"] == block) & (table["student"] == name)]
            if len(line):
                axis.plot(line["budget"], 100 * line["accuracy"], style, label=name, markersize=4)
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
@click.option("--quick", is_flag=True, help="Three sizes and 2,000 images, into bench/.cache.")
def main(network: str, filters: tuple[int, ...], quick: bool) -> None:
    """Fit, measure, print the table and write it with its picture.

    An interrupted run goes on where it stopped.
    """
    cpu_clock.one_thread()
    print(describe_machine("numpy", "torch", "cvxdistill"))
    wanted = filters or (QUICK_FILTERS if quick else FILTERS)
    images, test_images = (QUICK_IMAGES, 2_000) if quick else (IMAGES, None)
    name = "figure4" if network == "resnet18" else f"figure4_{network}"
    cpu_clock.CACHE.mkdir(parents=True, exist_ok=True)
    unfinished = cpu_clock.CACHE / f"{name}{'_quick' if quick else ''}.jsonl"
    output = (cpu_clock.CACHE if quick else cpu_clock.RESULTS) / name
    output.parent.mkdir(parents=True, exist_ok=True)
    teacher = load_teacher(network)
    contests: list[Contest] = []
    both: Both | None = None
    for m in wanted:
        if m in {row["filters"] for row in _lines(unfinished)}:
            continue
        if not contests:  # Recorded only where there is something left to do.
            contests = [Contest(teacher, b, images, test_images) for b in NETWORKS[network]]
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
        with unfinished.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    rows = _lines(unfinished)
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
    print(f"Teacher: {table['teacher_accuracy'].iloc[0]:.4f}")
    print(verdicts(table).to_string(index=False, float_format="%.4f"))


def _lines(file: Path) -> list[dict[str, Any]]:
    """The rows of the sizes that are done."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":
    main()
