"""Table 2 of Varshney and Pilanci (2024): a convex or a ReLU head on a frozen or trained back-bone.

    python bench/paper/table2.py            five seeds, about an hour of one core
    python bench/paper/table2.py --quick    two seeds of 1,000 images, into bench/.cache

Cat against dog on CIFAR-10, with labels and cross-entropy. The back-bone is a ResNet-18 up to
``layer1``, its 64 x 8 x 8 activations averaged to 64 x 4 x 4; the head stands in for all the rest.
The back-bone has seen these images and labels in training, as part of the ten-class network;
further up a linear head already is as good as that network's own, and there is nothing to compare.
A seed draws the 1,000 of the 10,000 training images that choose the settings, the gates, the first
weights and the batches. Heads, on inputs that are centred and scaled by one number:

    convex        32 Gaussian gates, gated ReLU; gates stay as they are
    non-convex    ReLU, as many parameters, gates counted

Adam trains either with batches of 100 and rates that fall to zero along a cosine; the rate, and on
the frozen back-bone the number of epochs, are those of the best accuracy on the held-out images,
for each seed anew. On the frozen back-bone two more are solved to a certified relative gap of 1e-3:

    convex, solved    the convex programme of the same gates, by R-FISTA
    linear, solved    logistic regression with a ridge

and "convex, same aim" is Adam on the programme's objective in its factored form, with weight decay
of the strength chosen for "convex, solved". Its gap is measured from the lower bound of that.

Seconds are CPU seconds of one thread (BLAS, torch and Numba): those of the chosen run, and of all
that were tried. On the frozen back-bone they start at its activations.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import click
import cpu_clock
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from cpu_clock import CpuClock
from datasets import load_cifar10, normalise
from machine import describe_machine
from teachers import load_teacher
from torch import Tensor, nn
from unfinished import append_rows, read_rows, rows_file

from cvxdistill.solvers import (
    RFISTA,
    GatedOperator,
    GatedReLUProblem,
    Solution,
    activation_patterns,
    evaluate_gates,
    sample_gates,
)

CAT, DOG = 3, 5
SEEDS, HELD_OUT = 5, 1000
N_GATES = 32
BATCH = 100
FROZEN_RATES, FROZEN_EPOCHS = (1e-4, 3e-4, 1e-3, 3e-3), (5, 20)
TRAINED_RATES, TRAINED_EPOCHS = (1e-4, 3e-4, 1e-3), (5,)
# Multiples of alpha_max; the ridge's are relative to the mean square of a feature.
STRENGTHS = (0.3, 0.1, 0.03, 0.01)
RIDGES = (3.0, 1.0, 0.3, 0.1, 0.03)
SOLVER = RFISTA(tol=1e-3)
HEADS = ("convex", "non-convex")
# As the paper prints them, on another task.
PRINTED = {
    ("frozen", "convex"): 81.36,
    ("frozen", "non-convex"): 80.84,
    ("trainable", "convex"): 83.47,
    ("trainable", "non-convex"): 83.42,
}


class Images(NamedTuple):
    """Normalised images (n, 3, 32, 32), and 1 for a cat, 0 for a dog (n,), float32."""

    images: Tensor
    labels: Tensor

    def part(self, rows: Any) -> Images:
        return Images(self.images[rows], self.labels[rows])


class Standardise(nn.Module):
    """Flattened and (z - mean) / scale."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        mean = inputs.flatten(1).mean(dim=0)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", (inputs.flatten(1) - mean).square().mean().sqrt())

    def forward(self, z: Tensor) -> Tensor:
        return (z.flatten(1) - self.mean) / self.scale


class GatedHead(nn.Module):
    """sum_j 1[[z, 1] G_j >= 0] ([z, 1] W1_j) w2_j + b, with gates G (d + 1, p) that stay."""

    def __init__(self, G: np.ndarray) -> None:
        super().__init__()
        d, p = G.shape
        self.register_buffer("gates", torch.from_numpy(G))
        self.first = nn.Linear(d - 1, p)
        self.second = nn.Linear(p, 1)

    def forward(self, z: Tensor) -> Tensor:
        on = z @ self.gates[:-1] + self.gates[-1] >= 0
        return self.second(self.first(z) * on)[:, 0]

    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """V (p, d + 1, 1) and b (1,) of the convex programme."""
        with torch.no_grad():
            W1 = torch.cat([self.first.weight, self.first.bias[:, None]], dim=1)
            V = W1 * self.second.weight[0][:, None]
            return V[:, :, None].numpy(), self.second.bias.numpy()


def relu_head(G: np.ndarray) -> nn.Module:
    """The ReLU head that stores at most as many numbers as the gated one."""
    d = len(G) - 1
    m = (stored(GatedHead(G)) - 1) // (d + 2)
    return nn.Sequential(nn.Linear(d, m), nn.ReLU(), nn.Linear(m, 1), nn.Flatten(0))


def stored(module: nn.Module) -> int:
    """All numbers, gates included."""
    return sum(tensor.numel() for tensor in module.state_dict().values())


def new_head(name: str, G: np.ndarray, seed: int) -> nn.Module:
    """A head with the seed's first weights."""
    torch.manual_seed(seed)
    return GatedHead(G) if name == "convex" else relu_head(G)


def load_images(split: str) -> Images:
    """All cats and dogs."""
    teacher = load_teacher("resnet18")
    photos, labels = load_cifar10(split)
    chosen = (labels == CAT) | (labels == DOG)
    images = normalise(photos[chosen], teacher.mean, teacher.std)
    cat = (labels[chosen] == CAT).astype(np.float32)
    return Images(torch.from_numpy(images), torch.from_numpy(cat))


def load_backbone() -> nn.Module:
    """The network up to ``layer1``, and 2 x 2 averages."""
    model = load_teacher("resnet18").model
    return nn.Sequential(*list(model.children())[:5], nn.AvgPool2d(2)).eval()


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """What the model returns in eval mode."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(batch) for batch in images.split(500)])


def share_right(answers: Tensor, labels: Tensor) -> float:
    """Accuracy of answers (n,), positive for a cat."""
    return float(((answers > 0) == (labels > 0.5)).float().mean())


def train(
    model: nn.Module,
    data: Images,
    rate: float,
    epochs: int,
    seed: int,
    decay: Callable[[], Tensor] | None = None,
) -> None:
    """Adam on the cross-entropy, and on what ``decay`` returns, in train mode."""
    torch.manual_seed(seed)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(learnt, rate)
    n = len(data.labels)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-n // BATCH))
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(n).split(BATCH):
            optimizer.zero_grad()
            answers = model(data.images[rows])
            loss = nn.functional.binary_cross_entropy_with_logits(answers, data.labels[rows])
            if decay is not None:
                loss = loss + decay()
            loss.backward()
            optimizer.step()
            schedule.step()


class Split(NamedTuple):
    """What is fitted, what chooses, what is tested."""

    fit: Images
    held_out: Images
    test: Images


def adam_row(
    split: Split,
    start: Callable[[], nn.Module],
    rates: tuple[float, ...],
    epochs: tuple[int, ...],
    seed: int,
    decay: Callable[[nn.Module], Tensor] | None = None,
) -> tuple[dict[str, Any], nn.Module]:
    """The best run on the images held out, as a row, and its model.

    ``start`` makes a model, whose penalty ``decay`` gives.
    """
    runs = []
    for rate in rates:
        for length in epochs:
            clock = CpuClock()
            model = start()
            penalty = None if decay is None else lambda model=model: decay(model)
            with clock:
                train(model, split.fit, rate, length, seed, penalty)
            chosen_by = share_right(outputs(model, split.held_out.images), split.held_out.labels)
            row = {"setting": rate, "epochs": length, "seconds": clock.seconds}
            runs.append(({**row, "held_out_accuracy": chosen_by}, model))
    row, model = max(runs, key=lambda run: run[0]["held_out_accuracy"])
    row["tried_seconds"] = sum(run["seconds"] for run, _ in runs)
    row["accuracy"] = share_right(outputs(model, split.test.images), split.test.labels)
    return row, model


def solved_row(
    split: Split, G: np.ndarray | None
) -> tuple[dict[str, Any], GatedReLUProblem, Solution]:
    """Logistic loss to a certified gap; without gates G the linear model with a ridge."""
    parts = [part.images.numpy() for part in split]
    Y = 2 * split.fit.labels.numpy() - 1
    setup = CpuClock()
    with setup:
        if G is None:
            patterns = [np.ones((len(X), 1), bool) for X in parts]
        else:
            parts = [np.hstack([X, np.ones((len(X), 1), np.float32)]) for X in parts]
            D, G = activation_patterns(parts[0], G)
            patterns = [D, *(evaluate_gates(X, G) for X in parts[1:])]
        options = {"loss": "logistic", "fit_intercept": True}
        penalty = "ridge" if G is None else "neuron"
        problem = GatedReLUProblem(parts[0], Y, patterns[0], penalty=penalty, **options)
        unit = 1.0 if G is None else problem.alpha_max()

    def accuracy(solution: Solution, which: int) -> float:
        Z = GatedOperator(parts[which], patterns[which]).forward(solution.V) + solution.intercept
        return share_right(torch.from_numpy(Z[:, 0]), split[which].labels)

    runs = []
    for strength in RIDGES if G is None else STRENGTHS:
        clock = CpuClock(setup.seconds)
        with clock:
            solution = SOLVER.solve(problem, strength * unit)
        row = {"setting": strength, "seconds": clock.seconds, "gap": solution.relative_gap}
        runs.append(({**row, "held_out_accuracy": accuracy(solution, 1)}, solution))
    row, solution = max(runs, key=lambda run: run[0]["held_out_accuracy"])
    row["tried_seconds"] = sum(run["seconds"] for run, _ in runs)
    row["accuracy"] = accuracy(solution, 2)
    d = parts[0].shape[1]
    units = int(solution.V.any(axis=1).sum())
    row["parameters"] = d + 1 if G is None else units * (2 * d + 1) + 1
    return row, problem, solution


def weight_decay(alpha: float) -> Callable[[nn.Module], Tensor]:
    """alpha / 2 (||W1||^2 + ||w2||^2): at its best factors alpha times the penalty "neuron"."""

    def value(head: nn.Module) -> Tensor:
        parameters = (head.first.weight, head.first.bias, head.second.weight)
        return alpha / 2 * sum(p.square().sum() for p in parameters)

    return value


def compare(
    backbone: nn.Module,
    train_images: Images,
    test_images: Images,
    seed: int,
    *,
    n_gates: int = N_GATES,
    held_out: int = HELD_OUT,
    trained_epochs: tuple[int, ...] = TRAINED_EPOCHS,
) -> Iterator[dict[str, Any]]:
    """One row for each back-bone and head."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(train_images.labels)))
    images = Split(
        train_images.part(order[held_out:]), train_images.part(order[:held_out]), test_images
    )
    recorded = [outputs(backbone, part.images) for part in images]
    standardise = Standardise(recorded[0])
    with torch.inference_mode():
        split = Split(
            *(Images(standardise(z).clone(), part.labels) for z, part in zip(recorded, images))
        )
    # Not tensors of inference mode: Adam's tape would refuse them.
    split = Split(*(Images(torch.tensor(part.images.numpy()), part.labels) for part in split))
    d = split.fit.images.shape[1] + 1
    G = sample_gates(d, n_gates, random_state=seed).astype(np.float32)
    parameters = {name: stored(new_head(name, G, seed)) for name in HEADS}

    def row(of: str, head: str, by: str, **more: Any) -> dict[str, Any]:
        return {"seed": seed, "backbone": of, "head": head, "by": by, **more}

    for name in HEADS:
        of_adam, _ = adam_row(
            split, lambda name=name: new_head(name, G, seed), FROZEN_RATES, FROZEN_EPOCHS, seed
        )
        yield row("frozen", name, "Adam", parameters=parameters[name], **of_adam)
    solved, problem, solution = solved_row(split, G)
    yield row("frozen", "convex", "R-FISTA", **solved)
    same, head = adam_row(
        split,
        lambda: new_head("convex", G, seed),
        FROZEN_RATES,
        FROZEN_EPOCHS,
        seed,
        weight_decay(solution.alpha),
    )
    bound = solution.objective - solution.duality_gap
    objective = problem.objective(*head.weights(), solution.alpha)
    same |= {"parameters": parameters["convex"], "gap": (objective - bound) / objective}
    yield row("frozen", "convex", "Adam, same aim", **same)
    yield row("frozen", "linear", "R-FISTA", **solved_row(split, None)[0])
    for name in HEADS:

        def whole(name: str = name) -> nn.Module:
            head = new_head(name, G, seed)
            return nn.Sequential(copy.deepcopy(backbone), copy.deepcopy(standardise), head)

        of_adam, _ = adam_row(images, whole, TRAINED_RATES, trained_epochs, seed)
        yield row("trainable", name, "Adam", parameters=parameters[name], **of_adam)


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds and the standard deviation of the accuracy, beside the paper's."""
    groups = table.groupby(["backbone", "head", "by"], sort=False)
    summary = groups.agg(
        seeds=("seed", "nunique"),
        parameters=("parameters", "mean"),
        accuracy=("accuracy", "mean"),
        std=("accuracy", "std"),
        seconds=("seconds", "mean"),
        tried_seconds=("tried_seconds", "mean"),
        largest_gap=("gap", "max"),
    ).reset_index()
    for name in ("accuracy", "std"):
        summary[name] *= 100
    of_paper = [
        PRINTED.get((row.backbone, row.head)) if row.by == "Adam" else None
        for row in summary.itertuples()
    ]
    return summary.assign(paper=np.array(of_paper, dtype=float))


def draw(table: pd.DataFrame, network: float, file: Any) -> None:
    """Accuracy of each back-bone and head: every seed, and the mean."""
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    groups = table.groupby(["backbone", "head", "by"], sort=False)["accuracy"]
    labels = []
    for number, (names, accuracy) in enumerate(groups):
        labels.append("{}, {}\n({})".format(*names))
        color = {"convex": "C0", "non-convex": "C1"}.get(names[1], "C2")
        axis.plot([number] * len(accuracy), 100 * accuracy, "o", color=color, alpha=0.4)
        axis.plot(number, 100 * accuracy.mean(), "_", color=color, ms=24, mew=2)
    axis.axhline(100 * network, color="black", lw=1, label="the ten-class network itself")
    axis.set_xticks(range(len(labels)), labels, fontsize=7)
    axis.set(ylabel="accuracy on 2,000 test images [%]")
    axis.set_title("cat against dog: heads on layer1 of a ResNet-18, seeds and their mean")
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--seeds", default=SEEDS, show_default=True, type=click.IntRange(1))
@click.option("--quick", is_flag=True, help="Two seeds of 1,000 images, one epoch where trained.")
def main(seeds: int, quick: bool) -> None:
    """Train, solve, measure, print the table and write it with its picture.

    An interrupted run goes on where it stopped.
    """
    cpu_clock.one_thread()
    print(describe_machine("numpy", "torch", "numba", "cvxdistill"), flush=True)
    train_images, test_images = load_images("train"), load_images("test")
    options: dict[str, Any] = {}
    if quick:
        seeds, options = min(seeds, 2), {"held_out": 200, "trained_epochs": (1,)}
        train_images = train_images.part(slice(1000))
    everything = seeds >= SEEDS and not quick
    output = (cpu_clock.RESULTS if everything else cpu_clock.CACHE) / "table2"
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = rows_file("table2", quick)
    rows = read_rows(unfinished)
    done = {row["seed"] for row in rows}
    backbone = load_backbone()
    logits = outputs(load_teacher("resnet18").model, test_images.images)
    network = share_right(logits[:, CAT] - logits[:, DOG], test_images.labels)
    for seed in range(seeds):
        if seed in done:
            continue
        new = []
        for row in compare(backbone, train_images, test_images, seed, **options):
            new.append(row)
            print(
                f"seed {seed}, {row['backbone']}, {row['head']}, {row['by']} "
                f"({row['setting']:g}): {100 * row['accuracy']:.2f} %, {row['seconds']:.1f} s",
                flush=True,
            )
        rows += new
        append_rows(unfinished, new)
    table = pd.DataFrame([row for row in rows if row["seed"] < seeds])
    table = table.sort_values("seed", kind="stable").assign(network_accuracy=network)
    table.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
    draw(table, network, output.with_suffix(".png"))
    unfinished.unlink()
    print(f"\nThe ten-class network itself: {100 * network:.2f} %. Means over the seeds:")
    summary = summarise(table)
    summary.to_csv(f"{output}_summary.csv", index=False, float_format="%.4g")
    print(summary.to_string(index=False, float_format="%.4g"))
    print(f"wrote {output}.csv and .png")


if __name__ == "__main__":
    main()
