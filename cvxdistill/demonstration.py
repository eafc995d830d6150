"""``cvxdistill demo``: a network for handwritten digits, made smaller without labels.

Trains a small convolutional teacher on scikit-learn's 8 x 8 digits, shows its blocks, distils the
heaviest from the training images alone, and measures every student on images that neither the
teacher nor the students have seen.
"""

from __future__ import annotations

import csv
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvxdistill.atomic_files import replacing

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from cvxdistill.candidates import Candidate

EPOCHS = 20
BATCH_SIZE = 64
TEST_IMAGES = 450
# Few gates and a moderate gap: with them the whole demonstration takes seconds.
N_GATES = 8
TOLERANCE = 0.03
HEADINGS = (
    "network",
    "units",
    "block",
    "model",
    "test accuracy",
    "activation error",
    "duality gap",
    "seconds",
)


@dataclass(frozen=True)
class Measured:
    """One network of the demonstration; the teacher has no units, error or gap.

    ``block_parameters`` and ``model_parameters`` count all stored numbers, gates included; ``gap``
    is the relative duality gap and ``seconds`` the time of the training or of the convex fit.
    """

    network: str
    units: int | None
    block_parameters: int
    model_parameters: int
    accuracy: float
    error: float | None
    gap: float | None
    seconds: float


@dataclass(frozen=True)
class Digits:
    """Images, float32 (n, 1, 8, 8) in [0, 1], and their classes."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_digit_images(random_state: int) -> Digits:
    """Return scikit-learn's 1,797 digits, 450 of them for the test, stratified."""
    import torch
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 1, 8, 8) / 16
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=TEST_IMAGES, stratify=labels, random_state=random_state
    )
    return Digits(
        torch.tensor(train, dtype=torch.float32),
        torch.tensor(train_labels),
        torch.tensor(test, dtype=torch.float32),
        torch.tensor(test_labels),
    )


def digits_teacher() -> nn.Module:
    """Return the untrained teacher, (N, 1, 8, 8) to (N, 10): features, body (the heaviest), head.

    ``cvxdistill inspect cvxdistill.demonstration:digits_teacher --input-shape 1,8,8`` shows it.
    """
    from torch import nn

    def convolution(c_in: int, c_out: int, stride: int = 1) -> list[nn.Module]:
        layer = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False)
        return [layer, nn.BatchNorm2d(c_out), nn.ReLU()]

    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(*convolution(1, 8), *convolution(8, 16, stride=2)),
            body=nn.Sequential(
                *convolution(16, 64, stride=2), *convolution(64, 64), *convolution(64, 64)
            ),
            head=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
        )
    )


def train_teacher(digits: Digits, random_state: int) -> nn.Module:
    """Return the teacher, trained by AdamW on a one-cycle schedule, in eval mode."""
    import torch

    # One thread: on layers this small, threads wait for each other longer than they compute.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Seeded on its own, so that the caller's random numbers are not touched.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_state)
            model = digits_teacher()
            _fit(model, digits)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def _fit(model: nn.Module, digits: Digits) -> None:
    import torch
    from torch.nn import functional

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, epochs=EPOCHS, steps_per_epoch=-(-len(digits.train) // BATCH_SIZE)
    )
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(digits.train)).split(BATCH_SIZE):
            loss = functional.cross_entropy(
                model(digits.train[batch]), digits.train_labels[batch], label_smoothing=0.05
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def measure_accuracy(model: nn.Module, digits: Digits) -> float:
    """Return the share of the test images that ``model`` names rightly."""
    import torch

    with torch.inference_mode():
        answers: torch.Tensor = model(digits.test).argmax(dim=1)
    return float((answers == digits.test_labels).float().mean())


def run_demonstration(
    output: str | Path,
    *,
    random_state: int = 0,
    quiet: bool = False,
    say: Callable[[str], Any] = print,
) -> list[Measured]:
    """Run the demonstration; write ``digits.csv`` and ``digits.png`` into a folder.

    Parameters
    ----------
    output : path
        The folder; made if it is not there.
    random_state : int
        Of the split, the training and the gates.
    quiet : bool
        Say the final table only.
    say : callable
        Called with each piece of text.

    Returns
    -------
    list of Measured
        The teacher first, then every candidate.

    Raises
    ------
    OSError
        If the folder cannot be made or written to.
    """
    import cvxdistill

    tell: Callable[[str], Any] = (lambda _: None) if quiet else say
    digits = load_digit_images(random_state)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    tell(
        f"Training a convolutional network on {len(digits.train):,} images of handwritten digits "
        "(8 x 8) ..."
    )
    start = time.perf_counter()
    teacher = train_teacher(digits, random_state)
    seconds = time.perf_counter() - start

    blocks = cvxdistill.inspect(teacher, digits.train[:1], depth=1)
    block = blocks.heaviest()
    tell(f"\n{blocks}\n\nDistilling {block!r} from the training images, without their labels ...")
    result = cvxdistill.distill(
        teacher,
        block,
        digits.train,
        n_gates=N_GATES,
        tol=TOLERANCE,
        random_state=random_state,
        verbose=0 if quiet else 1,
    )

    total, removed = blocks.model.parameters, blocks[block].parameters
    accuracy = measure_accuracy(teacher, digits)
    rows = [Measured("teacher", None, removed, total, accuracy, None, None, seconds)]
    for candidate in result.candidates:
        smaller = cvxdistill.swap_block(teacher, block, candidate.student)
        rows.append(
            Measured(
                f"{candidate.kind} student",
                candidate.n_neurons,
                candidate.parameters,
                total - removed + candidate.parameters,
                measure_accuracy(smaller, digits),
                candidate.error,
                candidate.duality_gap,
                candidate.seconds,
            )
        )
    kept = [rows[0], *(rows[1 + i] for i in _one_of_each_kind(result.candidates))]
    taken = rows[1 + [c is result.report.chosen for c in result.candidates].index(True)]
    tell("")
    say("\n".join(_table(kept, taken)))
    _write_csv(rows, folder / "digits.csv")
    tell(f"\nAll {len(rows) - 1} students: {folder / 'digits.csv'}")
    if _draw(rows, folder / "digits.png"):
        tell(f"Size against accuracy: {folder / 'digits.png'}")
    else:
        tell('No picture: it needs matplotlib (pip install "cvxdistill[plot]").')
    return rows


def _one_of_each_kind(candidates: Sequence[Candidate]) -> list[int]:
    """Of each kind the smallest candidate whose error is within 2 % of that kind's best."""
    from cvxdistill.selection import AUTO_TOLERANCE

    picked = []
    for kind in dict.fromkeys(candidate.kind for candidate in candidates):
        same = [i for i, candidate in enumerate(candidates) if candidate.kind == kind]
        limit = (1 + AUTO_TOLERANCE) * min(candidates[i].error for i in same)
        good = [i for i in same if candidates[i].error <= limit]
        picked.append(min(good, key=lambda i: candidates[i].parameters))
    return picked


def _table(rows: Sequence[Measured], taken: Measured) -> list[str]:
    def cells(row: Measured) -> tuple[str, ...]:
        return (
            row.network + ("*" if row is taken else ""),
            "-" if row.units is None else f"{row.units:,}",
            f"{row.block_parameters:,}",
            f"{row.model_parameters:,}",
            f"{row.accuracy:.1%}",
            "-" if row.error is None else f"{row.error:.3f}",
            "-" if row.gap is None else f"{row.gap:.1e}",
            f"{row.seconds:.1f}",
        )

    lines = [HEADINGS, *map(cells, rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [
        *(
            "  ".join(
                cell.rjust(width) if k else cell.ljust(width)
                for k, (cell, width) in enumerate(zip(line, widths))
            )
            for line in lines
        ),
        "",
        "block, model: numbers stored, gates included. * what distill chose: the smallest student",
        "within 2 % of the smallest activation error on training images that were held out.",
    ]


def _write_csv(rows: Sequence[Measured], path: Path) -> None:
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow([field.name for field in fields(Measured)])
        writer.writerows(astuple(row) for row in rows)


def _draw(rows: Sequence[Measured], path: Path) -> bool:
    """Draw size against accuracy; return False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    teacher, *students = rows
    # A Figure of its own draws to a file without a screen, and leaves pyplot alone.
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for network in dict.fromkeys(row.network for row in students):
        curve = sorted(
            (row.block_parameters, row.accuracy) for row in students if row.network == network
        )
        axes.plot(*zip(*curve), marker="o", markersize=4, label=network)
    axes.axhline(teacher.accuracy, color="black", linestyle="--", linewidth=1)
    axes.plot(teacher.block_parameters, teacher.accuracy, "k*", markersize=10, label="teacher")
    axes.set_xscale("log")
    axes.set_xlabel("parameters of the block, gates included")
    axes.set_ylabel(f"accuracy on {TEST_IMAGES} test images")
    axes.set_title("A block of a digits network, replaced without labels")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    return True
