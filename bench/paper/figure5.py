"""Figure 5 of Varshney and Pilanci (2024): solvers against Adam on a two-class head, by seconds.

    python bench/paper/figure5.py            ten seeds, about 40 minutes of one core
    python bench/paper/figure5.py --quick    two seeds of 100 images a class, into bench/.cache

``layer4``, the pooling and the head of a ResNet-18 on CIFAR-10 become a two-layer student, for cat
against dog. It sees the 256 x 2 x 2 activations behind ``layer3`` of 500 training images a class
and is fitted to what the network says of them, the difference of its two logits: no label is used.
Inputs are centred and scaled by one number, and get a constant one. A seed draws the images, 100
more of each class to choose settings by, the gates, the first weights and the batches. Compared:

    R-FISTA, Gaussian gates     the gated ReLU programme with 100 gates
    R-FISTA, block's gates      100 filters of the first convolution of ``layer4`` as gates
    with cone decomposition     the first of these turned into a ReLU network, approximately
    augmented Lagrangian        the ReLU programme on the Gaussian gates, at the same strength
    Adam, full batch            a ReLU student of as many parameters as 100 gated units have
    Adam, mini-batch            the same with batches of 50
    linear                      a ridge

The strengths, the ridge's too, and Adam's learning rate are those of the least activation error on
the held-out images. Adam's rates fall to zero along a cosine, so a run only counts at its end: its
curve has a point for each of several lengths, each with its own best rate. In the same way the
cone decomposition is that of an early iterate and of the last. The seconds are those of the chosen
setting; what trying all of them took is a column of the table.

Seconds are CPU seconds of one thread (BLAS, torch and Numba), from the activations on: gates and
patterns count, what is measured along the way, gaps included, does not. The error is the share of
the 2,000 test images of both classes on the wrong side of 0, the activation error ||z - y|| / ||y||
on those images. Gaps are certified and relative, that of the augmented Lagrangian of seed 0 only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
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
from few_images import first_layer
from machine import describe_machine
from teachers import load_teacher
from torch import nn
from unfinished import append_rows, read_rows, rows_file

from cvxdistill.solvers import (
    RFISTA,
    AugmentedLagrangian,
    DualCertificate,
    GatedOperator,
    GatedReLUProblem,
    ReLUProblem,
    RidgeNewton,
    activation_patterns,
    decompose,
    duality_gap,
    evaluate_gates,
    nudge_gates,
    relu_predictions,
    sample_gates,
)
from cvxdistill.solvers.problem import ConvexProblem
from cvxdistill.solvers.solution import relative
from cvxdistill.solvers.solver import IterativeSolver

CAT, DOG = 3, 5
SEEDS, IMAGES, HELD_OUT = 10, 500, 100  # images of each class
N_GATES = 100
# Multiples of alpha_max; the ridge's are relative to the mean square of a feature.
STRENGTHS = (0.003, 0.001, 0.0003, 0.0001)
RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01)
TOLERANCE, CHECK_EVERY, MOST_ITERATIONS = 1e-2, 20, 1000
LAGRANGIAN_ITERATIONS = 2000
EARLY = 40  # the iterate that is decomposed besides the last
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BATCH = 50
EPOCHS = {"Adam, full batch": (32, 128, 512), "Adam, mini-batch": (4, 16, 64)}
RECORDED = sorted({round(1.4**k) for k in range(40)})  # iterations
GAUSSIAN, OWN = "R-FISTA, Gaussian gates", "R-FISTA, block's gates"
DECOMPOSED, LAGRANGIAN = "with cone decomposition", "augmented Lagrangian"
LINEAR = "linear"
METHODS = (GAUSSIAN, OWN, DECOMPOSED, LAGRANGIAN, *EPOCHS, LINEAR)


class Part(NamedTuple):
    """Inputs (n, d) with a last column of ones, the network's answers (n,), and who is a cat."""

    X: np.ndarray
    y: np.ndarray
    cat: np.ndarray

    def errors(self, z: np.ndarray) -> tuple[float, float]:
        """Activation error and share on the wrong side, of predictions z (n,)."""
        activation = np.linalg.norm(z - self.y) / np.linalg.norm(self.y)
        return float(activation), float(np.mean((z > 0) != self.cat))


class Task(NamedTuple):
    """One seed's images, and the gates (d, p) that the block itself has."""

    fit: Part
    held_out: Part
    test: Part
    own_gates: np.ndarray


@dataclass
class Run:
    """What one setting of one method did; ``points`` are rows of the table along the way."""

    setting: float
    held_out_error: float = np.inf
    points: list[dict[str, Any]] = field(default_factory=list)
    result: Any = None

    def record(self, task: Task, predict: Any, clock: CpuClock, **more: Any) -> None:
        """Measure the function ``predict`` of inputs (n, d) on the images of the task."""
        self.held_out_error = task.held_out.errors(predict(task.held_out.X))[0]
        activation, wrong = task.test.errors(predict(task.test.X))
        point = {"setting": self.setting, "seconds": clock.seconds, "activation_error": activation}
        self.points.append({**point, "test_error": wrong, **more})


class Recorded(NamedTuple):
    """What the network makes of all images of the two classes: the training and the test ones."""

    inputs: np.ndarray
    answers: np.ndarray
    cat: np.ndarray


def record_network(split: str) -> Recorded:
    """Activations behind ``layer3`` (n, 1024), differences of logits (n,), and who is a cat."""
    teacher = load_teacher("resnet18")
    photos, labels = load_cifar10(split)
    chosen = (labels == CAT) | (labels == DOG)
    images = torch.from_numpy(normalise(photos[chosen], teacher.mean, teacher.std))
    model = teacher.model
    front = nn.Sequential(*list(model.children())[:7])
    back = nn.Sequential(model.layer4, model.avgpool, nn.Flatten(), model.fc)
    inputs, answers = [], []
    with torch.inference_mode():
        for batch in images.split(250):
            seen = front(batch)
            logits = back(seen)
            inputs.append(seen.flatten(1).numpy())
            answers.append((logits[:, CAT] - logits[:, DOG]).numpy())
    return Recorded(np.concatenate(inputs), np.concatenate(answers), labels[chosen] == CAT)


def draw_task(train: Recorded, test: Recorded, G: np.ndarray, images: int, seed: int) -> Task:
    """Draw a seed's images of each class; G (1025, 512) are the block's gates of raw inputs."""
    rng = np.random.default_rng(seed)
    of_class = [rng.permutation(np.flatnonzero(train.cat == cat)) for cat in (True, False)]
    fitted = np.concatenate([rows[:images] for rows in of_class])
    held_out = np.concatenate([rows[images : images + HELD_OUT] for rows in of_class])
    mean = train.inputs[fitted].mean(axis=0)
    scale = float(np.sqrt(np.mean((train.inputs[fitted] - mean) ** 2)))

    def part(data: Recorded, rows: Any) -> Part:
        X = np.ones((len(data.answers[rows]), len(mean) + 1), np.float32)
        X[:, :-1] = (data.inputs[rows] - mean) / scale
        return Part(X, data.answers[rows], data.cat[rows])

    # [x, 1] G with x = mean + scale z is [z, 1] of these.
    own = np.vstack([scale * G[:-1], G[-1] + mean @ G[:-1]]).astype(np.float32)
    own = own[:, rng.permutation(own.shape[1])[:N_GATES]]
    return Task(part(train, fitted), part(train, held_out), part(test, slice(None)), own)


def gated_parameters(units: int, d: int) -> int:
    """All numbers of a gated student with one output: gates, both layers and the intercept."""
    return units * (2 * d + 1) + 1


def relu_parameters(units: int, d: int) -> int:
    """All numbers of a ReLU student with one output."""
    return units * (d + 1) + 1


def hidden_units(d: int) -> int:
    """Units of the ReLU student that stores as much as the gated one with all its gates."""
    return (gated_parameters(N_GATES, d) - 1) // (d + 1)


def run_solver(
    solver: IterativeSolver,
    problem: ConvexProblem,
    alpha: float,
    run: Run,
    task: Task,
    clock: CpuClock,
    G: np.ndarray,
    *,
    most: int,
    tol: float = 0.0,
    certify: bool = False,
) -> None:
    """Take the solver's steps to the certified relative gap ``tol``, or ``most`` of them.

    The clock only runs inside the solver. Without a tolerance there is no gap on the way: that of
    the ReLU programme takes far longer than the steps. ``run.result`` keeps iterates V.
    """
    run.result = {}
    certificate = DualCertificate(problem, alpha)
    with clock:
        state = solver.init(problem, alpha, problem.zeros())
    for iteration in range(1, most + 1):
        with clock:
            state = solver.step(problem, alpha, state)
        last = iteration == most
        gap = np.nan
        if tol and (iteration % CHECK_EVERY == 0 or last):
            certificate.offer(state.R, state.C)
            certificate.offer_corrected(state.R, state.C, state.V)
            b = problem.intercept(state.Z)
            objective = problem.loss.value(state.Z + b)
            objective += alpha * problem.regularizer.value(state.V)
            gap = relative(certificate.gap(state.V, state.Z, b), objective)
            last = last or gap <= tol
        elif last and certify:
            V = problem.weights_to_user(problem.feasible(state.V))
            b = problem.intercept(problem.predict(V))
            gap = relative(duality_gap(problem, V, alpha), problem.objective(V, b, alpha))
        if iteration in RECORDED or iteration == EARLY or last:
            V = problem.weights_to_user(state.V).copy()
            b = problem.intercept(problem.forward(state.V))
            units = int(V.any(axis=-2).sum())
            d = task.fit.X.shape[1]
            if isinstance(problem, ReLUProblem):
                predict, parameters = relu_network(V, b), relu_parameters(units, d)
            else:
                predict, parameters = gated_network(V, b, G), gated_parameters(units, d)
            run.record(
                task,
                predict,
                clock,
                iteration=iteration,
                relative_gap=gap,
                units=units,
                parameters=parameters,
            )
            if iteration == EARLY or last:
                run.result[iteration] = V, b, clock.seconds
        if last:
            return


def gated_network(V: np.ndarray, b: np.ndarray, G: np.ndarray) -> Any:
    """Predictions of V (p, d, 1) with gates G."""
    return lambda X: (GatedOperator(X, evaluate_gates(X, G)).forward(V) + b)[:, 0]


def relu_network(V: np.ndarray, b: np.ndarray) -> Any:
    """Predictions of V (2, p, d, 1)."""
    return lambda X: (relu_predictions(X, V) + b)[:, 0]


def best(runs: list[Run]) -> Run:
    """The run with the least activation error on the images held out."""
    return min(runs, key=lambda run: run.held_out_error)


def linear(task: Task) -> list[Run]:
    """Ridges; the constant column is left to the intercept."""
    runs = []
    X = task.fit.X[:, :-1]
    always = np.ones((len(X), 1), bool)
    for strength in RIDGES:
        run, clock = Run(strength), CpuClock()
        with clock:
            problem = GatedReLUProblem(X, task.fit.y, always, penalty="ridge", fit_intercept=True)
            solution = RidgeNewton(tol=1e-3).solve(problem, strength)
        v, b = solution.V[0, :, 0], solution.intercept[0]
        run.record(
            task,
            lambda X, v=v, b=b: X[:, :-1] @ v + b,
            clock,
            relative_gap=solution.relative_gap,
            parameters=len(v) + 1,
        )
        runs.append(run)
    return runs


def gated(task: Task, gates: Any) -> tuple[list[Run], GatedReLUProblem, np.ndarray]:
    """R-FISTA at all strengths; ``gates`` makes the gates, which counts."""
    setup = CpuClock()
    with setup:
        D, G = activation_patterns(task.fit.X, gates())
        problem = GatedReLUProblem(task.fit.X, task.fit.y, D, fit_intercept=True)
        alpha_max = problem.alpha_max()
    runs = []
    for strength in STRENGTHS:
        run, clock = Run(strength), CpuClock(setup.seconds)
        options = {"most": MOST_ITERATIONS, "tol": TOLERANCE}
        run_solver(
            RFISTA(metric="plain"), problem, strength * alpha_max, run, task, clock, G, **options
        )
        runs.append(run)
    return runs, problem, G


def decomposed(task: Task, gated_run: Run, problem: GatedReLUProblem, G: np.ndarray) -> Run:
    """ReLU networks from an early iterate and the last one; each point as if it had been all."""
    run = Run(gated_run.setting)
    for iteration, (V, b, seconds) in gated_run.result.items():
        clock = CpuClock(seconds)
        with clock:
            X, D = task.fit.X, problem.operator.D
            weights = decompose(X, D, V, method="approximate", G=G).weights
        units = int(weights.any(axis=-2).sum())
        parameters = relu_parameters(units, X.shape[1])
        run.record(
            task,
            relu_network(weights, b),
            clock,
            iteration=iteration,
            units=units,
            parameters=parameters,
        )
    return run


def augmented_lagrangian(
    task: Task, gates: Any, strength: float, iterations: int, certify: bool
) -> Run:
    """The ReLU programme on the same gates, at one strength.

    The gap is that of the last iterate projected on to the cones, from its own residual.
    """
    run, clock = Run(strength), CpuClock()
    with clock:
        D, G = activation_patterns(task.fit.X, gates())
        problem = ReLUProblem(task.fit.X, task.fit.y, D, G=G, fit_intercept=True)
        alpha = strength * problem.alpha_max()
    options = {"most": iterations, "certify": certify}
    run_solver(AugmentedLagrangian(), problem, alpha, run, task, clock, G, **options)
    return run


def adam(task: Task, seed: int, rate: float, epochs: int, batch: int) -> Run:
    """A ReLU student after so many epochs; its output starts at the mean answer."""
    torch.manual_seed(seed)
    run, clock = Run(rate), CpuClock()
    X, y = (torch.from_numpy(a) for a in (task.fit.X[:, :-1].copy(), task.fit.y))
    n, d = X.shape
    with clock:
        m = hidden_units(d + 1)
        student = nn.Sequential(nn.Linear(d, m), nn.ReLU(), nn.Linear(m, 1), nn.Flatten(0))
        nn.init.constant_(student[2].bias, float(y.mean()))
        optimizer = torch.optim.Adam(student.parameters(), rate)
        steps = epochs * -(-n // batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(epochs):
            # All images at once need no copy.
            batches = [slice(None)] if batch >= n else torch.randperm(n).split(batch)
            for rows in batches:
                optimizer.zero_grad()
                nn.functional.mse_loss(student(X[rows]), y[rows]).backward()
                optimizer.step()
                schedule.step()

    def predict(inputs: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return student(torch.from_numpy(inputs[:, :-1].copy())).numpy()

    parameters = sum(p.numel() for p in student.parameters())
    run.record(task, predict, clock, iteration=steps, units=m, parameters=parameters)
    return run


def compare(
    task: Task,
    seed: int,
    epochs: dict[str, tuple[int, ...]] = EPOCHS,
    lagrangian_iterations: int = LAGRANGIAN_ITERATIONS,
) -> Iterator[dict[str, Any]]:
    """Rows of one seed: every point of the chosen run of every method, the last one marked."""

    def gaussian() -> np.ndarray:
        G = sample_gates(task.fit.X.shape[1], N_GATES, random_state=seed)
        # Clear of the images, or the ReLU programme searches its cones for a direction inside.
        return nudge_gates(task.fit.X, G, random_state=seed).astype(np.float32)

    def rows(method: str, runs: list[Run]) -> Iterator[dict[str, Any]]:
        points = best(runs).points
        tried = sum(run.points[-1]["seconds"] for run in runs)
        for number, point in enumerate(points, 1):
            last = number == len(points)
            yield {"seed": seed, "method": method, **point, "tried_seconds": tried, "last": last}

    yield from rows(LINEAR, linear(task))
    of_block, _, _ = gated(task, lambda: task.own_gates)
    yield from rows(OWN, of_block)
    of_gaussian, problem, G = gated(task, gaussian)
    yield from rows(GAUSSIAN, of_gaussian)
    chosen = best(of_gaussian)
    yield from rows(DECOMPOSED, [decomposed(task, chosen, problem, G)])
    # The projections that its gap takes are dear: once is enough.
    of_relu = augmented_lagrangian(
        task, gaussian, chosen.setting, lagrangian_iterations, certify=seed == 0
    )
    yield from rows(LAGRANGIAN, [of_relu])
    for method, lengths in epochs.items():
        batch = BATCH if method == "Adam, mini-batch" else len(task.fit.X)
        tried = 0.0
        for length in lengths:
            runs = [adam(task, seed, rate, length, batch) for rate in LEARNING_RATES]
            for row in rows(method, runs):
                tried += row["tried_seconds"]
                yield {**row, "tried_seconds": tried, "last": length == lengths[-1]}


def with_linear_mark(table: pd.DataFrame) -> pd.DataFrame:
    """The last points, and the seconds until a run was as near the network as the linear student.

    Missing where it never was.
    """
    marks = table[table["method"] == LINEAR].set_index("seed")["activation_error"]
    near = table[table["activation_error"] <= table["seed"].map(marks)]
    first = near.groupby(["seed", "method"])["seconds"].min().rename("to_linear")
    return table[table["last"]].join(first, on=["seed", "method"])


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds of where each method ends, with standard deviations of the errors."""
    groups = with_linear_mark(table).groupby("method", sort=False)
    summary = groups.agg(
        seeds=("seed", "nunique"),
        parameters=("parameters", "mean"),
        test_error=("test_error", "mean"),
        std=("test_error", "std"),
        activation_error=("activation_error", "mean"),
        activation_std=("activation_error", "std"),
        seconds=("seconds", "mean"),
        to_linear=("to_linear", "mean"),
        reached=("to_linear", "count"),
        largest_gap=("relative_gap", "max"),
        tried_seconds=("tried_seconds", "mean"),
    )
    for name in ("test_error", "std"):
        summary[name] *= 100
    return summary.reindex([m for m in METHODS if m in summary.index]).reset_index()


def curve(points: pd.DataFrame, column: str, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the seeds of the last value measured by each time."""
    values = []
    for _, own in points.groupby("seed"):
        at = np.searchsorted(own["seconds"].to_numpy(), times, side="right") - 1
        values.append(own[column].to_numpy()[np.maximum(at, 0)])
    return np.mean(values, axis=0), np.std(values, axis=0, ddof=min(1, len(values) - 1))


def draw(table: pd.DataFrame, network: float, file: Any) -> None:
    """Both errors against seconds: means and two standard deviations over the seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    for number, method in enumerate(METHODS):
        points = table[table["method"] == method]
        for axis, column in zip(axes, ("test_error", "activation_error")):
            scale = 100 if column == "test_error" else 1
            if method in (GAUSSIAN, OWN, LAGRANGIAN):
                seconds = points.groupby("seed")["seconds"]
                start, end = seconds.min().max(), seconds.max().mean()
                times = np.geomspace(start, max(end, 1.01 * start), 200)
                mean, std = curve(points, column, times)
                line = axis.plot(times, scale * mean, color=f"C{number}", label=method)
                low, high = scale * (mean - 2 * std), scale * (mean + 2 * std)
                axis.fill_between(times, low, high, color=line[0].get_color(), alpha=0.15, lw=0)
                continue
            place = points.groupby("seed").cumcount()
            means = points.groupby(place)[["seconds", column]].mean()
            std = points.groupby(place)[column].std().fillna(0)
            axis.errorbar(
                means["seconds"],
                scale * means[column],
                2 * scale * std,
                fmt="s--" if method in EPOCHS else "D:",
                color=f"C{number}",
                ms=5,
                capsize=3,
                label=method,
            )
    axes[0].axhline(100 * network, color="black", lw=1, label="the network")
    axes[0].set(ylabel="wrong of 2,000 test images [%]", ylim=(14, 24))
    axes[1].set(ylabel="activation error", ylim=(0, 0.7))
    for axis in axes:
        axis.set(xscale="log", xlabel="CPU seconds of one thread")
    axes[0].legend(fontsize=8)
    title = "layer4 and head of a ResNet-18 for cat against dog, without labels"
    figure.suptitle(f"{title}: means and 2 standard deviations of {table['seed'].nunique()} seeds")
    figure.savefig(file, dpi=110)
    plt.close(figure)


@click.command()
@click.option("--seeds", default=SEEDS, show_default=True, type=click.IntRange(1))
@click.option("--quick", is_flag=True, help="Two seeds of 100 images a class, short runs.")
def main(seeds: int, quick: bool) -> None:
    """Fit, measure, print the table and write it with its picture.

    An interrupted run goes on where it stopped.
    """
    cpu_clock.one_thread()
    print(describe_machine("numpy", "torch", "numba", "cvxdistill"), flush=True)
    images, options = IMAGES, {}
    if quick:
        seeds, images = min(seeds, 2), 100
        options = {
            "epochs": {method: lengths[:2] for method, lengths in EPOCHS.items()},
            "lagrangian_iterations": 200,
        }
    everything = seeds >= SEEDS and not quick
    output = (cpu_clock.RESULTS if everything else cpu_clock.CACHE) / "figure5"
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = rows_file("figure5", quick)
    rows = read_rows(unfinished)
    train, test = record_network("train"), record_network("test")
    network = float(np.mean((test.answers > 0) != test.cat))
    block = nn.Sequential(load_teacher("resnet18").model.layer4)
    own = first_layer(block, (256, 2, 2))
    # A first run, of very few images, compiles.
    for _ in compare(draw_task(train, test, own, 20, 0), 0, {"Adam, full batch": (1,)}, 5):
        pass
    done = {row["seed"] for row in rows}
    for seed in range(seeds):
        if seed in done:
            continue
        clock = CpuClock()
        with clock:
            new = list(compare(draw_task(train, test, own, images, seed), seed, **options))
        rows += new
        append_rows(unfinished, new)
        ends = {row["method"]: row for row in new if row["last"]}
        print(f"seed {seed} ({clock.seconds:.0f} s):")
        for method in METHODS:
            row = ends[method]
            print(
                f"  {method:26} {row['setting']:g}: {100 * row['test_error']:.2f} % wrong, "
                f"activation error {row['activation_error']:.4f}, {row['seconds']:.2f} s",
                flush=True,
            )
    table = pd.DataFrame([row for row in rows if row["seed"] < seeds])
    table = table.sort_values("seed", kind="stable").assign(network_error=network)
    table.to_csv(output.with_suffix(".csv"), index=False, float_format="%.6g")
    draw(table, network, output.with_suffix(".png"))
    unfinished.unlink()
    print(f"\nThe network itself: {100 * network:.2f} % wrong. Means over the seeds:")
    summary = summarise(table)
    summary.to_csv(f"{output}_summary.csv", index=False, float_format="%.4g")
    print(summary.to_string(index=False, float_format="%.4g"))
    print(f"wrote {output}.csv and .png")


if __name__ == "__main__":
    main()
