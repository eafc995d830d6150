"""What the paper's figures compare: students in the place of one block, and their measures.

A task is the rest of a network from a block on, with that block's recorded inputs.
Whatever is made for the block, convex or not, becomes a model with its count of stored numbers and
its CPU seconds (``Made``), and ``Measures`` says what that model is worth.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
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
from teachers import Teacher
from torch import Tensor, nn
from torch.nn import functional

import cvxdistill
from cvxdistill.adapters import find_sites, infer_layout, output_metrics
from cvxdistill.adapters.spans import Span
from cvxdistill.student_curves import Weighting

HELD_OUT = 0.1
BATCH = 128
# Of Adam with batches, and with all examples at each step.
RATES = {BATCH: (1e-3, 3e-3, 1e-2), None: (3e-3, 1e-2, 3e-2)}
PILOT, LONG = 0.25, 10
# Of the gated students: gates, their features at most, and the most seconds for each alpha.
GATES, MOST_FEATURES, SECONDS_AN_ALPHA = 16, 6000, 5.0
# The least CPU seconds that Adam has.
LEAST_SECONDS = 10.0


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
    match : str
        What gated students are fitted to: what follows if it is linear.
    """

    name: str
    start: str
    first: tuple[Convolution, ...]
    second: tuple[int, ...]
    match: str = "network"


PLAIN = Convolution(3, 1, 1)
STRIDED = (Convolution(3, 2, 1), Convolution(5, 2, 2))
NETWORKS = {
    "resnet18": (
        Block("layer3", "layer3", STRIDED[:1], (1, 3)),
        # 2 x 2 inputs: of 3 x 3 weights 5 would meet padding alone.
        Block("layer4", "layer4", (Convolution(2, 1, 0),), (1,), "after:fc"),
    ),
    "resnet20": (
        Block("layer3", "layer3", STRIDED, (1, 3), "after:linear"),
        Block("layer3.2", "layer3", (PLAIN,), (1, 3), "after:linear"),
        Block("layer2", "layer2", STRIDED, (1, 3)),
    ),
}
CONVEX, BEST = ("linear", "several", "sparse", "gated"), "best convex"


def tail(model: nn.Module, start: str) -> nn.Sequential:
    """The network from a block on, under the same names."""
    children = OrderedDict(model.named_children())
    names = list(children)[list(children).index(start) :]
    parts: OrderedDict[str, nn.Module] = OrderedDict((name, children[name]) for name in names)
    head, layer = parts.popitem()
    # The CIFAR networks average in their ``forward``.
    parts.setdefault("avgpool", nn.AdaptiveAvgPool2d(1))
    parts["flat"], parts[head] = nn.Flatten(), layer
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
        self.answers = run(task.model, task.training[task.held_out])
        self.test = None if block is None else record(task, block, task.test)
        self.teacher_accuracy = self.accuracy(task.model)

    def agreement(self, model: nn.Module) -> float:
        """Share of held-out images classified as the teacher does."""
        return self.closeness(model)[0]

    def closeness(self, model: nn.Module) -> tuple[float, float]:
        """The agreement, and minus the mean divergence KL(teacher || model) of the classes.

        The second tells those apart that agree as often, of which there are many with few images.
        """
        found = run(model, self.task.training[self.task.held_out])
        alike = (found.argmax(1) == self.answers.argmax(1)).double().mean()
        theirs, ours = (functional.log_softmax(x.double(), 1) for x in (self.answers, found))
        return float(alike), -float(
            functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        )

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


def with_block_norms_anew(task: Task, block: str) -> Task:
    """The task of the network whose block has batch norms of the images that are fitted."""
    inputs = record(task, block, task.training[task.fitted]).inputs
    anew = with_norms_anew(task.model.get_submodule(block), inputs)
    return replace(task, model=cvxdistill.swap_block(task.model, block, anew))


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


def compressing(
    task: Task, blocks: list[str], whole: int, sizes: int, *, sparse: bool = False
) -> Callable[[int], Made]:
    """``compress`` of some blocks, which have ``whole`` numbers, within any budget for them.

    What the budgets share is done once, and counts as its ``sizes``-th part for each.
    """
    total = sum(p.numel() for p in task.model.parameters())
    start = time.process_time()
    compressor = cvxdistill.Compressor(
        task.model,
        task.training,
        blocks=blocks,
        criterion="agreement",
        sparse=sparse,
        validation_fraction=HELD_OUT,
        verbose=0,
    )
    shared = (time.process_time() - start) / sizes

    def within(budget: int) -> Made:
        start = time.process_time()
        result = compressor.compress(max_parameters=total - whole + budget)
        seconds = shared + time.process_time() - start
        chosen = "; ".join(f"{c.block}: {c.student}" for c in result.choices)
        gap = max((c.relative_gap for c in result.choices), default=float("nan"))
        return Made(result.model, result.after - (total - whole), seconds, chosen, gap)

    return within


def distilled(task: Task, block: str, match: str, sizes: int) -> Callable[[str, int], Made]:
    """Linear and gated students of ``distill``: of a kind, the best held-out one in a budget.

    One call makes all of them, and counts as its ``sizes``-th part for each.
    """
    n_gates = GATES
    if match != "outputs":  # Sums over all gated features are kept.
        data = record(task, block, task.training[:2])
        layout = infer_layout(tuple(data.inputs.shape[1:]), tuple(data.outputs.shape[1:]))
        n_gates = min(GATES, MOST_FEATURES // layout.n_features)
    start = time.process_time()
    result = cvxdistill.distill(
        task.model,
        block,
        task.training,
        student="gated",
        match=match,
        n_gates=n_gates,
        time_limit=SECONDS_AN_ALPHA,
        verbose=0,
    )
    seconds = (time.process_time() - start) / sizes

    def within(kind: str, budget: int) -> Made:
        fits = [c for c in result.candidates if c.kind == kind and c.parameters <= budget]
        if not fits:
            raise ValueError(f"no {kind} student has {budget:,} numbers or fewer.")
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
        assert metric is not None
        weighting = Weighting.of(metric.matrix)
        assert weighting is not None
        self.root = torch.from_numpy(weighting.root.astype(np.float32))

    def placed(self, student: nn.Module, seconds: float, settings: str) -> Made:
        """In the network."""
        model = cvxdistill.swap_block(self.task.model, self.block.name, student)
        return Made(model, stored_numbers(student), seconds, settings)

    def best(self, found: list[Made]) -> Made:
        """By closeness to the teacher on held-out images."""
        return max(found, key=lambda made: self.measures.closeness(made.model))

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
