from __future__ import annotations

import numpy as np
import pytest

for package in ("click", "matplotlib", "pandas", "torch"):
    pytest.importorskip(package)

import pandas as pd  # noqa: E402
import stuck_gradient_descent as bench  # noqa: E402
import torch  # noqa: E402
from click.testing import CliRunner  # noqa: E402


def small_data(n=10, seed=0):
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.standard_normal((n, 2)), np.ones(n)]), rng.standard_normal(n)


def objective(X, y, W1, W2, alpha):
    """The formula, for one network."""
    error = np.maximum(X @ W1, 0) @ W2[:, 0] - y
    return (error @ error) / (2 * len(y)) + alpha / 2 * ((W1**2).sum() + (W2**2).sum())


def test_the_objective_is_its_formula_for_each_network():
    X, y = small_data()
    rng = np.random.default_rng(1)
    W1, W2 = rng.standard_normal((4, 3, 6)), rng.standard_normal((4, 6, 1))
    values = bench.network_objective(*map(torch.from_numpy, (X, y, W1, W2)), 0.3)
    expected = [objective(X, y, *layers, 0.3) for layers in zip(W1, W2)]
    np.testing.assert_allclose(values, expected, rtol=1e-12)


def test_the_gradient_is_that_of_autograd_for_each_network_on_its_own_examples():
    rng = np.random.default_rng(2)
    X, y = torch.from_numpy(rng.standard_normal((4, 7, 3))), torch.from_numpy(rng.random((4, 7)))
    W1 = torch.from_numpy(rng.standard_normal((4, 3, 6))).requires_grad_()
    W2 = torch.from_numpy(rng.standard_normal((4, 6, 1))).requires_grad_()
    expected = torch.autograd.grad(bench.network_objective(X, y, W1, W2, 0.3).sum(), (W1, W2))
    for ours, theirs in zip(bench.network_gradient(X, y, W1, W2, 0.3), expected):
        torch.testing.assert_close(ours, theirs)


def test_training_is_that_of_torchs_optimizer_and_schedule():
    X, y = small_data(n=5)  # batches of one example
    epochs, rate, alpha = 7, 0.05, 0.01
    ours = bench.train(X, y, alpha, 4, (0.001, rate), 3, epochs)
    generator = torch.Generator().manual_seed(2)  # the last run: seed 2, the last rate

    def uniform(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    W1, W2 = (2 * uniform(3, 4) - 1) / 3**0.5, (2 * uniform(4, 1) - 1) / 4**0.5
    layers = [W1.requires_grad_(), W2.requires_grad_()]
    optimizer = torch.optim.SGD(layers, lr=rate, momentum=bench.MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5 * epochs)
    for _ in range(epochs):
        for i in uniform(5).argsort():
            optimizer.zero_grad()
            batch = torch.from_numpy(X[[i]]), torch.from_numpy(y[[i]])
            bench.network_objective(*batch, *layers, alpha).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(ours.W1[-1], W1.detach())
    torch.testing.assert_close(ours.W2[-1], W2.detach())
    assert ours.objectives[-1, -1] == pytest.approx(
        objective(X, y, W1.detach().numpy(), W2.detach().numpy(), alpha)
    )


def test_objectives_are_recorded_from_the_start_to_the_end(monkeypatch):
    monkeypatch.setattr(bench, "RECORD_EVERY", 4)
    training = bench.train(*small_data(), 0.01, 5, (0.01,), 2, 10)
    assert training.epochs.tolist() == [0, 4, 8, 10]
    assert training.objectives.shape == (4, 2)


def test_a_rate_that_diverges_counts_as_infinite():
    training = bench.train(*small_data(), 0.01, 5, (100.0,), 2, 50)
    assert np.isinf(training.objectives[-1]).all()


def test_lbfgs_goes_on_downhill():
    X, y = small_data()
    rng = np.random.default_rng(3)
    W1, W2 = rng.standard_normal((3, 5)), rng.standard_normal((5, 1))
    end = bench.descend(X, y, 0.01, W1, W2)
    assert end < 0.5 * objective(X, y, W1, W2, 0.01)


def test_no_more_neurons_than_examples_are_needed_for_the_same_predictions():
    X, y = small_data()
    rng = np.random.default_rng(4)
    W1, W2 = rng.standard_normal((3, 60)), rng.standard_normal((60, 1))
    W2 = np.sign(W2) * np.linalg.norm(W1, axis=0)[:, None]
    few1, few2 = bench.fewest_neurons(X, W1, W2)
    assert few1.shape[1] == len(few2) <= len(X)
    np.testing.assert_allclose(np.maximum(X @ few1, 0) @ few2, np.maximum(X @ W1, 0) @ W2)
    assert objective(X, y, few1, few2, 1.0) <= objective(X, y, W1, W2, 1.0)


@pytest.mark.parametrize("name", bench.DATA)
def test_toy_data_are_what_the_module_says(name):
    X, y = bench.toy_data(name)
    assert X.shape == ((5, 2) if name == "five points" else (25, 3))
    assert (X[:, -1] == 1).all() and len(y) == len(X)
    if name == "planted":
        return
    assert set(y) == {-1.0, 1.0}
    if name == "xor":
        np.testing.assert_array_equal(y, np.sign(X[:, 0] * X[:, 1]))


def test_the_convex_optimum_is_that_of_clarabel_and_a_network_attains_it():
    cp = pytest.importorskip("cvxpy")
    X, y = bench.toy_data("five points")
    alpha, optimum = bench.convex_optimum(X, y)
    # The four points between five on a line, each side on: by hand, without a gate.
    ends = np.arange(-2.5, 3.0)
    D = np.hstack([(X[:, :1] > ends), (X[:, :1] < ends)]).astype(float)
    D = np.unique(D[:, D.any(axis=0)], axis=1)
    V, U = cp.Variable((2, D.shape[1])), cp.Variable((2, D.shape[1]))
    norms = cp.sum(cp.norm(V, axis=0)) + cp.sum(cp.norm(U, axis=0))
    error = cp.sum(cp.multiply(D, X @ (V - U)), axis=1) - y
    cones = [cp.multiply(2 * D - 1, X @ W) >= 0 for W in (V, U)]
    problem = cp.Problem(cp.Minimize(cp.sum_squares(error) / 10 + alpha * norms), cones)
    expected = problem.solve(solver="CLARABEL")
    assert optimum.objective == pytest.approx(expected, rel=2e-6)
    assert 0 <= optimum.gap <= bench.TOLERANCE * optimum.objective
    attained = objective(X, y, optimum.W1, optimum.W2, alpha)
    assert attained == pytest.approx(expected, rel=2e-6)


def test_a_run_writes_its_table_and_its_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "CACHE", tmp_path)
    monkeypatch.setattr(bench, "QUICK_DATA", ("five points",))
    monkeypatch.setattr(bench, "QUICK_WIDTHS", (3, 5))
    monkeypatch.setattr(bench, "SHOWN", ("five points", 5))
    outcome = CliRunner().invoke(bench.main, ["--quick", "--seeds", "2", "--epochs", "20"])
    assert outcome.exit_code == 0, outcome.output
    table = pd.read_csv(tmp_path / "stuck_gradient_descent.csv")
    assert len(table) == 4 and set(table["width"]) == {3, 5}
    assert (table["sgd_then_lbfgs"] >= table["optimum"] - table["duality_gap"]).all()
    assert (table["sgd_then_lbfgs"] <= table["sgd"] * (1 + 1e-12)).all()
    picture = tmp_path / "stuck_gradient_descent.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
