"""From few unlabelled images: two layers of a ResNet-18 as one dense student of 330,000 numbers.

    python bench/few_images.py                  ten draws of 1,000, of 300 and of 100 images
    python bench/few_images.py --seeds 2        fewer draws, into bench/.cache

``layer3:layer4``, 10.5 million parameters, becomes a linear student of rank 128 or a gated one. A
seed draws the images out of the 50,000 training images; no label is used before the test accuracy
is measured, and the test images are used for nothing else. Compared, each with its strength or its
number of steps chosen by the activation error on a fifth of the images:

    ridge             on the images alone
    ridge, moved      on 8,000 mirrored and shifted copies besides
    ridge, answers    also on 8,000 mixed and jittered inputs of the block, as ``augmentation``
                      makes them; both halves weigh the same
    gated, answers    a linear map of rank 16 and 62 ReLU units of the block's own first layer, by a
                      ridge on inputs and units of the strength of "ridge, answers"
    Adam              a ReLU student with 128 hidden units, on the images alone
    Adam, answers     the same on all that "ridge, answers" sees

Ridges come from sums over the pairs, in closed form, and are fitted to all images once their
strength is chosen. Adam keeps the best step, without the held-out fifth.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from augmentation import flip_and_shift, mix_and_jitter
from datasets import load_cifar10, normalise
from machine import describe_machine
from teachers import Teacher, accuracy, load_teacher
from torch import Tensor, nn

from cvxdistill.adapters import DenseLayout, build_student, capture
from cvxdistill.solvers import GatedStatistics, HiddenStatistics

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "few_images"
CACHE = HERE / ".cache"
BLOCK = "layer3:layer4"
IMAGES = (1000, 300, 100)
# Points of accuracy that may be lost, by the number of images.
TARGETS = {1000: 1.2, 300: 2.5, 100: 4.0}
TRAINING_IMAGES = 50_000
SEEDS = 10
BUDGET = 330_000
RANK = 128
# The gated student: units of the first layer are dropped to the first, then to the second number.
UNITS, LINEAR_RANK = (256, 62), 16
# Pairs from moved images, and as many from inputs of the block that are mixed and jittered.
PAIRS = 8_000
HELD_OUT = 0.2
# That are compared.
STUDENTS = 6
# Relative to the mean variance of a feature.
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
HIDDEN_UNITS, LEARNING_RATE, BATCH = 128, 1e-3, 128
STEPS, CHECK_EVERY, PATIENCE = 3000, 100, 5


class Pairs(NamedTuple):
    """Inputs (m, C, H, W) and outputs (m, C', H', W') of the block."""

    inputs: np.ndarray
    outputs: np.ndarray

    def __add__(self, other: Pairs) -> Pairs:  # type: ignore[override]
        return Pairs(*map(np.concatenate, zip(self, other, strict=True)))


class Examples(NamedTuple):
    """Pairs of images, one row of each array an image, and of copies, (copies, n, ...)."""

    images: Pairs
    copies: Pairs

    def part(self, rows: slice) -> Examples:
        """Only these images and their copies."""
        return Examples(
            Pairs(*(array[rows] for array in self.images)),
            Pairs(*(array[:, rows] for array in self.copies)),
        )

    def moved(self) -> Pairs:
        """The images and their copies, one row each."""
        return self.images + Pairs(*(array.reshape(-1, *array.shape[2:]) for array in self.copies))


def record(model: nn.Module, images: Tensor, copies: int, rng: np.random.Generator) -> Examples:
    """What the block takes and gives for images (n, 3, 32, 32) and for moved copies of each."""

    def batches() -> Iterator[Tensor]:
        yield from images.split(250)
        for _ in range(copies):
            yield from flip_and_shift(images, rng).split(250)

    with capture(model, BLOCK, batches(), verbose=0) as captured:
        recorded = [
            array.reshape(1 + copies, len(images), *array.shape[1:])
            for array in (np.array(captured.inputs), np.array(captured.outputs))
        ]
    return Examples(Pairs(*(array[0] for array in recorded)), Pairs(*(a[1:] for a in recorded)))


def answers(block: nn.Module, pairs: Pairs, rng: np.random.Generator, count: int) -> Pairs:
    """What the block answers to mixed and jittered inputs."""
    inputs = mix_and_jitter(pairs.inputs, rng, count)
    with torch.inference_mode():
        outputs = [block(part).numpy() for part in torch.from_numpy(inputs).split(500)]
    return Pairs(inputs, np.concatenate(outputs))


def sums(pairs: Pairs) -> HiddenStatistics:
    """Centred sums of the flattened pairs, as if they were one row."""
    X, Y = (array.reshape(len(array), -1) for array in pairs)
    total = GatedStatistics.from_data(X, Y, np.ones((len(X), 1), dtype=bool))
    mu, nu = total.feature_sums[0] / total.n, total.target_sums / total.n
    of_all = HiddenStatistics(
        float(total.n),
        mu,
        nu,
        total.gram - total.n * np.outer(mu, mu),
        total.cross[0] - total.n * np.outer(mu, nu),
        total.target_squares - total.n * nu**2,
    )
    return of_all.scaled(1 / total.n)


def ridge_student(statistics: HiddenStatistics, strength: float, of: Pairs) -> nn.Module:
    """The ridge solution's best approximation of rank RANK, as a module."""
    V, _ = statistics.second_layer(strength)
    W1, W2 = leading_units(V, statistics.gram, RANK)
    intercept = statistics.target_mean - statistics.hidden_mean @ W1 @ W2
    return student_of(W1, W2, intercept, np.zeros((len(W1) + 1, 0)), of)


def leading_units(V: np.ndarray, gram: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """W1 = V q and W2 = q^T with the leading eigenvectors q of the covariance of X V."""
    _, q = np.linalg.eigh(V.T @ gram @ V)
    W2 = q[:, ::-1][:, :rank].T
    return V @ W2.T, W2


def student_of(
    W1: np.ndarray, W2: np.ndarray, intercept: np.ndarray, G: np.ndarray, of: Pairs
) -> nn.Module:
    """The module of linear units W1, the first rows of W2, and ReLU units G, its other rows."""
    layout = DenseLayout(of.inputs.shape[1:], of.outputs.shape[1:])
    always = np.zeros((layout.n_features, 1))
    linear = np.vstack([W1, np.zeros((1, W1.shape[1]))])
    gate = np.concatenate([np.zeros(W1.shape[1], int), 1 + np.arange(G.shape[1])])
    gates = np.hstack([always, G])
    student = build_student(layout, np.hstack([linear, G]), W2, gate, gates, intercept).eval()
    if student.parameters_stored > BUDGET:
        raise ValueError(f"the student stores {student.parameters_stored:,} numbers, over {BUDGET}")
    return student


def first_layer(block: nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """G (d + 1, p) with relu([x, 1] G) the block's first activations, convolutions written out."""
    first = nn.Sequential(block[0][0].conv1, block[0][0].bn1, nn.Flatten()).eval()
    d = int(np.prod(shape))
    with torch.no_grad():
        bias = first(torch.zeros(1, *shape))
        G = torch.cat([first(torch.eye(d).reshape(d, *shape)) - bias, bias])
    return G.numpy()


def gated_student(parts: list[Pairs], strength: float, G: np.ndarray) -> nn.Module:
    """A ridge on inputs and ReLU units G, without the units that contribute least.

    The units are scaled to the inputs' mean variance. What unit h contributes is the deviation of
    its output times ||W2[h]||. The linear part is cut to rank LINEAR_RANK at the end.
    """

    def features(pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        X = pairs.inputs.reshape(len(pairs.inputs), -1)
        return X, np.maximum(X @ G[:-1] + G[-1], 0)

    X, H = features(parts[0])
    scale = (X.var(axis=0).mean() / H.var(axis=0).mean()) ** 0.5
    d = X.shape[1]
    statistics = HiddenStatistics.empty(d + H.shape[1], parts[0].outputs[0].size)
    for part in parts:
        X, H = features(part)
        statistics += sums(Pairs(np.hstack([X, scale * H]), part.outputs))
    kept = np.arange(G.shape[1])
    V, _ = statistics.second_layer(strength)
    for count in UNITS:
        contribution = np.diag(statistics.gram)[d:] ** 0.5 * np.linalg.norm(V[d:], axis=1)
        own = np.sort(np.argsort(-contribution)[:count])
        kept, rows = kept[own], np.concatenate([np.arange(d), d + own])
        statistics = dataclasses.replace(
            statistics,
            hidden_mean=statistics.hidden_mean[rows],
            gram=statistics.gram[np.ix_(rows, rows)],
            cross=statistics.cross[rows],
        )
        V, _ = statistics.second_layer(strength)
    W1, W2 = leading_units(V[:d], statistics.gram[:d, :d], LINEAR_RANK)
    mean = statistics.hidden_mean
    intercept = statistics.target_mean - mean[:d] @ W1 @ W2 - mean[d:] @ V[d:]
    return student_of(W1, np.vstack([W2, scale * V[d:]]), intercept, G[:, kept], parts[0])


def chosen_ridge(
    to_choose: HiddenStatistics, held_out: Pairs, to_fit: HiddenStatistics
) -> tuple[nn.Module, float]:
    """The student of all images, with the strength that is best on those held out."""

    def error(strength: float) -> float:
        return activation_error(ridge_student(to_choose, strength, held_out), held_out)

    strength = min(STRENGTHS, key=error)
    return ridge_student(to_fit, strength, held_out), strength


def activation_error(student: nn.Module, pairs: Pairs) -> float:
    """||Y' - Y||_F / ||Y||_F."""
    with torch.inference_mode():
        outputs = student(torch.from_numpy(np.ascontiguousarray(pairs.inputs))).numpy()
    return float(np.linalg.norm(outputs - pairs.outputs) / np.linalg.norm(pairs.outputs))


def adam_student(parts: list[Pairs], held_out: Pairs, seed: int) -> tuple[nn.Module, int]:
    """A two-layer ReLU student after its best step; each part is drawn from equally often."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    shape = parts[0].outputs.shape[1:]
    d, c = parts[0].inputs[0].size, parts[0].outputs[0].size
    student = nn.Sequential(
        nn.Flatten(),
        nn.Linear(d, HIDDEN_UNITS),
        nn.ReLU(),
        nn.Linear(HIDDEN_UNITS, c),
        nn.Unflatten(1, shape),
    )
    if sum(p.numel() for p in student.parameters()) > BUDGET:
        raise ValueError(f"the ReLU student stores more than {BUDGET:,} numbers")
    optimizer = torch.optim.Adam(student.parameters(), LEARNING_RATE)
    best, best_step, best_error = copy.deepcopy(student), 0, np.inf
    for step in range(1, STEPS + 1):
        rows = [rng.integers(0, len(part.inputs), BATCH // len(parts)) for part in parts]
        drawn = [Pairs(*(a[i] for a in part)) for part, i in zip(parts, rows, strict=True)]
        inputs, outputs = (torch.from_numpy(np.concatenate(a)) for a in zip(*drawn, strict=True))
        optimizer.zero_grad()
        nn.functional.mse_loss(student(inputs), outputs).backward()
        optimizer.step()
        if step % CHECK_EVERY == 0:
            error = activation_error(student, held_out)
            if error < best_error:
                best, best_step, best_error = copy.deepcopy(student), step, error
            elif step - best_step >= PATIENCE * CHECK_EVERY:
                break
    return best, best_step


def students(
    model: nn.Module, images: Tensor, seed: int
) -> Iterator[tuple[str, nn.Module, float, float]]:
    """What is compared: a name, a student, its strength or steps, and the seconds it took.

    The seconds are those of the fit, with its choice, not of the recording.
    """
    rng = np.random.default_rng([seed, len(images)])
    block = nn.Sequential(*(model.get_submodule(name) for name in BLOCK.split(":"))).eval()
    every = record(model, images, max(1, PAIRS // len(images)), rng)
    fitted_images = len(images) - round(HELD_OUT * len(images))
    fitted, held_out = every.part(slice(fitted_images)), every.part(slice(fitted_images, None))
    validation = held_out.images
    answered = answers(block, fitted.moved(), rng, PAIRS)
    start = time.perf_counter()
    student, strength = chosen_ridge(sums(fitted.images), validation, sums(every.images))
    yield "ridge", student, strength, time.perf_counter() - start
    start = time.perf_counter()
    of_moved = [sums(part.moved()) for part in (fitted, every)]
    student, strength = chosen_ridge(of_moved[0], validation, of_moved[1])
    yield "ridge, moved", student, strength, time.perf_counter() - start
    start = time.perf_counter()
    answered_every = answers(block, every.moved(), rng, PAIRS)
    of_answers = [sums(answered), sums(answered_every)]
    both = [moved + mixed for moved, mixed in zip(of_moved, of_answers, strict=True)]
    student, strength = chosen_ridge(both[0], validation, both[1])
    yield "ridge, answers", student, strength, time.perf_counter() - start
    start = time.perf_counter()
    G = first_layer(block, every.images.inputs.shape[1:])
    student = gated_student([every.moved(), answered_every], strength, G)
    yield "gated, answers", student, strength, time.perf_counter() - start
    for name, parts in (
        ("Adam", [fitted.images]),
        ("Adam, answers", [fitted.moved(), answered]),
    ):
        start = time.perf_counter()
        student, steps = adam_student(parts, validation, seed)
        yield name, student, steps, time.perf_counter() - start


def compare(
    teacher: Teacher,
    counts: tuple[int, ...],
    seeds: range,
    test_images: int | None = None,
    done: frozenset[tuple[int, int]] = frozenset(),
) -> Iterator[dict]:
    """One row for each seed, number of images and student, but for the pairs that are done."""
    photos, _ = load_cifar10("train", TRAINING_IMAGES)
    tested, labels = load_cifar10("test", test_images)
    tested = normalise(tested, teacher.mean, teacher.std)
    top = accuracy(teacher.model, tested, labels)
    with capture(teacher.model, BLOCK, tested, verbose=0) as captured:
        test = Pairs(np.array(captured.inputs), np.array(captured.outputs))
    rest = nn.Sequential(teacher.model.avgpool, nn.Flatten(), teacher.model.fc)
    for seed in seeds:
        drawn = np.random.default_rng(seed).permutation(TRAINING_IMAGES)
        for count in counts:
            if (seed, count) in done:
                continue
            images = normalise(photos[drawn[:count]], teacher.mean, teacher.std)
            for name, student, chosen, seconds in students(
                teacher.model, torch.from_numpy(images), seed
            ):
                yield {
                    "images": count,
                    "seed": seed,
                    "student": name,
                    "parameters": _parameters(student),
                    "chosen": chosen,
                    "test_error": activation_error(student, test),
                    "accuracy": accuracy(nn.Sequential(student, rest), test.inputs, labels),
                    "teacher_accuracy": top,
                    "seconds": seconds,
                }


def _parameters(student: nn.Module) -> int:
    stored = getattr(student, "parameters_stored", None)
    return sum(p.numel() for p in student.parameters()) if stored is None else stored


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard deviation over the seeds, the loss in points and the target."""
    groups = table.groupby(["images", "student"], sort=False)
    summary = groups.agg(
        seeds=("seed", "nunique"),
        parameters=("parameters", "max"),
        accuracy=("accuracy", "mean"),
        std=("accuracy", "std"),
        worst=("accuracy", "min"),
        test_error=("test_error", "mean"),
        teacher=("teacher_accuracy", "first"),
        seconds=("seconds", "mean"),
    ).reset_index()
    for name in ("accuracy", "std", "worst", "teacher"):
        summary[name] *= 100
    summary["lost"] = summary.pop("teacher") - summary["accuracy"]
    summary["allowed"] = summary["images"].map(TARGETS)
    return summary


def draw(table: pd.DataFrame, file: Path) -> None:
    """Accuracy by number of images: the mean over the seeds and one standard deviation."""
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    top = 100 * table["teacher_accuracy"].iloc[0]
    for number, (name, lines) in enumerate(table.groupby("student", sort=False)):
        by_count = 100 * lines.groupby("images")["accuracy"].agg(["mean", "std"])
        axis.errorbar(
            by_count.index * 1.03 ** (number - 2),
            by_count["mean"],
            by_count["std"].fillna(0),
            fmt="s--" if name.startswith("Adam") else "o-",
            capsize=3,
            label=name,
        )
    allowed = sorted(TARGETS)
    axis.plot(allowed, [top - TARGETS[n] for n in allowed], "k_", ms=16, mew=2, label="target")
    axis.axhline(top, color="black", lw=1, label="teacher")
    axis.set(xscale="log", xlabel="unlabelled images in all", ylabel="test accuracy [%]")
    counts = sorted(table["images"].unique())
    axis.set_xticks(counts, [f"{n:,}" for n in counts])
    axis.minorticks_off()
    axis.set_title(f"ResNet-18 on CIFAR-10: {BLOCK} as one student of at most {BUDGET:,} numbers")
    axis.title.set_fontsize(10)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--seeds", default=SEEDS, show_default=True, type=click.IntRange(1))
@click.option(
    "--images",
    multiple=True,
    default=IMAGES,
    show_default=True,
    type=click.IntRange(10, TRAINING_IMAGES),
    help="How many images in all; may be given more than once.",
)
def main(seeds: int, images: tuple[int, ...]) -> None:
    """Fit, measure, print the table and write it with its picture.

    An interrupted run goes on where it stopped.
    """
    torch.set_num_threads(1)
    print(describe_machine("numpy", "torch", "cvxdistill"))
    everything = seeds >= SEEDS and set(images) >= set(IMAGES)
    output = (RESULTS.parent if everything else CACHE) / RESULTS.name
    output.parent.mkdir(exist_ok=True)
    start = time.perf_counter()
    CACHE.mkdir(exist_ok=True)
    unfinished = CACHE / "few_images.jsonl"
    rows = []
    if unfinished.exists():
        rows = [json.loads(line) for line in unfinished.read_text().splitlines()]
    met = pd.DataFrame(rows, columns=["seed", "images"]).value_counts()
    done = {pair for pair, count in met.items() if count == STUDENTS}
    rows = [row for row in rows if (row["seed"], row["images"]) in done]
    for row in compare(load_teacher("resnet18"), images, range(seeds), done=frozenset(done)):
        rows.append(row)
        with unfinished.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"seed {row['seed']}, {row['images']} images, {row['student']} ({row['chosen']:g}): "
            f"{row['accuracy']:.4f}, error {row['test_error']:.4f}, {row['seconds']:.1f} s",
            flush=True,
        )
    table = pd.DataFrame(rows)
    table = table.drop_duplicates(["seed", "images", "student"], keep="last")
    table = table.sort_values(["seed", "images"], ascending=[True, False], kind="stable")
    table.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
    unfinished.unlink()
    draw(table, output.with_suffix(".png"))
    top = 100 * table["teacher_accuracy"].iloc[0]
    print(f"\nTeacher: {top:.2f} %. Accuracy and points lost, mean over the seeds:")
    print(summarise(table).to_string(index=False, float_format="%.3f"))
    print(f"wrote {output}.csv and .png, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
