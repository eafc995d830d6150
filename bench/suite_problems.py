"""The problems of ``bench/suite.py``: gated ReLU programmes of tables, digits, blocks and noise.

All have the squared loss, no intercept, float64, standard normal gates of seed 0 without bias, and
an alpha that is a share of alpha_max. A table's target is its largest class against the rest, or
its standardised number; "classes" has all classes one-hot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from datasets import UCI_TABLES, load_cifar10, load_mnist, load_uci, normalise

from cvxdistill.solvers import activation_patterns, sample_gates

RATIOS = (0.1, 0.01, 0.001)
GATES = (100, 500)
# Whose programme with 500 gates has 1.7 billion entries.
TOO_LARGE = ("adult", 500)
CLASS_TABLES = ("glass", "segment-challenge", "wine")
# Growth: one size goes through these, the others stay.
BASE = {"n": 2000, "d": 20, "p": 20, "c": 1}
GROWTH = {
    "n": (1000, 3000, 10_000, 30_000, 100_000),
    "d": (5, 15, 50, 150, 500),
    "p": (5, 15, 50, 150, 500),
    "c": (1, 3, 10, 30, 100),
}

Data = dict[str, np.ndarray]


@dataclass(frozen=True)
class SuiteProblem:
    """A programme by what makes its data: X (n, d), Y (n, c), gates G (d, p), patterns D (n, p)."""

    name: str
    group: str
    make: Callable[[], Data]
    ratio: float
    penalty: str = "neuron"


def with_gates(X: np.ndarray, Y: np.ndarray, n_gates: int) -> Data:
    """The data of a programme with Gaussian gates."""
    X = np.ascontiguousarray(X, dtype=np.float64)
    Y = np.asarray(Y, dtype=np.float64).reshape(len(X), -1)
    D, G = activation_patterns(X, sample_gates(X.shape[1], n_gates, random_state=0))
    return {"X": X, "Y": Y, "G": G, "D": D}


def table(name: str, n_gates: int) -> Data:
    """A UCI table, one target."""
    X, y = load_uci(name)
    if y.dtype.kind == "f":
        y = y.astype(np.float64)
        return with_gates(X, (y - y.mean()) / y.std(), n_gates)
    return with_gates(X, np.where(y == np.bincount(y).argmax(), 1.0, -1.0), n_gates)


def classes(name: str, n_gates: int) -> Data:
    """A UCI table, its classes one-hot."""
    X, y = load_uci(name)
    return with_gates(X, np.eye(y.max() + 1)[y], n_gates)


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """MNIST's 60,000 images in [0, 1], less their mean, and labels; in a random order."""
    images, labels = load_mnist("train")
    order = np.random.default_rng(0).permutation(len(images))
    X = images[order].reshape(len(order), -1) / 255.0
    return X - X.mean(axis=0), labels[order]


def mnist(n_gates: int, one_vs_all: bool) -> Data:
    """Threes against the rest, or all ten digits one-hot."""
    X, y = digits()
    return with_gates(X, np.where(y == 3, 1.0, -1.0) if one_vs_all else np.eye(10)[y], n_gates)


@cache
def activations(network: str, block: str, images: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """What a block sees, and its outputs' five leading components, of variance 1 together."""
    import torch
    from teachers import load_teacher

    from cvxdistill.adapters import capture, infer_layout

    teacher = load_teacher(network)
    photos, _ = load_cifar10("train", images)
    batch = torch.from_numpy(normalise(photos, teacher.mean, teacher.std))
    with capture(teacher.model, block, batch, verbose=0) as captured:
        layout = infer_layout(captured.inputs.shape[1:], captured.outputs.shape[1:])
        wanted = np.random.default_rng(0).permutation(images * layout.n_positions)[:rows]
        wanted.sort()
        X = np.asarray(layout.rows(captured.inputs).take(wanted), dtype=np.float64)
        Y = np.asarray(layout.targets(captured.outputs, wanted), dtype=np.float64)
    X = X - X.mean(axis=0)
    Y = Y - Y.mean(axis=0)
    leading = np.linalg.eigh(Y.T @ Y)[1][:, : -5 - 1 : -1]
    Y = Y @ leading
    return X / X.std(), Y / np.sqrt((Y**2).sum(axis=1).mean())


def block(network: str, name: str, images: int, rows: int, n_gates: int) -> Data:
    """A block's programme."""
    return with_gates(*activations(network, name, images, rows), n_gates)


def noise(n: int, d: int, p: int, c: int) -> Data:
    """Gaussian rows, and a gated network of five units with noise for each output."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, d))
    Y = np.empty((n, c))
    for k in range(c):
        G, W = rng.standard_normal((2, d, 5)) / np.sqrt(d)
        signal = ((X @ G >= 0) * (X @ W)).sum(axis=1)
        Y[:, k] = signal + 0.3 * signal.std() * rng.standard_normal(n)
    return with_gates(X, Y / Y.std(axis=0), p)


def problems() -> dict[str, SuiteProblem]:
    """All, by name; small tables first."""
    found: list[SuiteProblem] = []
    tables = sorted(UCI_TABLES, key=lambda name: load_uci(name)[0].size)
    for n_gates in GATES:
        for name in tables:
            if (name, n_gates) == TOO_LARGE:
                continue
            for ratio in RATIOS:
                full = f"uci/{name}/{n_gates}/{ratio:g}"
                make = lambda name=name, p=n_gates: table(name, p)  # noqa: E731
                found.append(SuiteProblem(full, "uci", make, ratio))
    for name in CLASS_TABLES:
        for ratio in RATIOS:
            full = f"classes/{name}/{ratio:g}"
            make = lambda name=name: classes(name, 100)  # noqa: E731
            found.append(SuiteProblem(full, "classes", make, ratio, "gate"))
    for network, name, images, rows in (
        ("resnet20", "layer3", 1000, 20_000),
        ("resnet18", "layer4", 10_000, 10_000),
    ):
        make = lambda a=(network, name, images, rows, 32): block(*a)  # noqa: E731
        found.append(SuiteProblem(f"blocks/{network}/{name}", "blocks", make, 0.03))
    for one in (True, False):
        make = lambda one=one: mnist(100, one)  # noqa: E731
        found.append(SuiteProblem(f"mnist/{'threes' if one else 'digits'}", "mnist", make, 0.01))
    for what, sizes in GROWTH.items():
        for size in sizes:
            make = lambda sizes=BASE | {what: size}: noise(**sizes)  # noqa: E731
            found.append(SuiteProblem(f"growth/{what}/{size}", f"growth in {what}", make, 0.03))
    return {problem.name: problem for problem in found}
