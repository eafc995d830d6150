"""The paper's tables 1 and 2 and its figure 5, small: what they count, compare and measure."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
needs_data = pytest.mark.skipif(
    not os.environ.get("CVXDISTILL_DATA"), reason="CVXDISTILL_DATA is not set"
)
PAPER = Path(__file__).resolve().parents[2] / "bench" / "paper"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts find each other through their folder, as when one is run."""
    monkeypatch.syspath_prepend(str(PAPER))


def test_table_1_has_the_numbers_that_the_paper_prints():
    import table1

    from cvxdistill.adapters.student import table1_parameters

    table = table1.measure().set_index("block")
    assert table["input"].tolist() == ["64 x 8 x 8", "64 x 8 x 8", "128 x 4 x 4", "256 x 2 x 2"]
    assert table["output"].tolist() == ["64 x 8 x 8", "128 x 4 x 4", "256 x 2 x 2", "512 x 1 x 1"]
    assert table["teacher"].tolist() == [147_968, 525_568, 2_099_712, 8_393_728]
    assert table["student"].tolist() == [73_328, 164_608, 656_896, 1_312_768]
    assert (table["network"] == 11_689_512).all()
    channels = [(64, 64, 60), (64, 128, 128), (128, 256, 256), (256, 512, 256)]
    assert table["student"].tolist() == [table1_parameters(*sizes) for sizes in channels]
    for column, printed in (
        ("sparsity_block", ["0.495", "0.313", "0.313", "0.156"]),
        ("sparsity_overall", ["0.994", "0.969", "0.8765", "0.394"]),
    ):
        assert table[column.replace("sparsity", "printed")].tolist() == printed
        for value, text in zip(table[column], printed):
            digits = len(text) - 2
            cut = f"{np.floor(value * 10**digits) / 10**digits:.{digits}f}"
            assert text in (cut, f"{value:.{digits}f}")


def test_our_student_of_as_many_filters_stores_biases_instead_of_batch_norms():
    import table1

    table = table1.measure()
    C_out = [int(shape.split(" x ")[0]) for shape in table["output"]]
    assert (table["student"] - table["our_student"] == 2 * table["filters"] + C_out).all()


def test_the_clock_only_counts_what_passes_inside(monkeypatch):
    import cpu_clock

    now = iter([10.0, 11.0, 50.0, 52.5])
    monkeypatch.setattr(cpu_clock.time, "process_time", lambda: next(now))
    clock = cpu_clock.CpuClock(1.0)
    with clock:
        pass
    with clock:
        pass
    assert clock.seconds == 1.0 + 1.0 + 2.5


@pytest.fixture
def small(monkeypatch):
    """Few gates and strengths, and a synthetic task of 2 x 150 inputs with 12 features."""
    import figure5

    for name, value in {
        "N_GATES": 6,
        "STRENGTHS": (0.03, 0.003),
        "HELD_OUT": 10,
        "LEARNING_RATES": (1e-3, 1e-2),
        "EARLY": 5,
    }.items():
        monkeypatch.setattr(figure5, name, value)
    rng = np.random.default_rng(0)
    W1, W2 = rng.standard_normal((12, 2)), np.array([1.0, 2.0])

    def recorded(n):
        inputs = rng.standard_normal((n, 12)).astype(np.float32) + 2
        hidden = np.maximum((inputs - 2) @ W1, 0)
        # No two the same, not even where no unit is on.
        answers = (hidden @ W2 + 0.01 * rng.standard_normal(n)).astype(np.float32)
        return figure5.Recorded(inputs, answers, answers > np.median(answers))

    train, test = recorded(600), recorded(400)
    own = rng.standard_normal((13, 9)).astype(np.float32)
    return figure5.draw_task(train, test, own, 150, seed=0), train, own


def test_a_seed_draws_as_many_of_each_class_and_holds_out_others(small):
    task, train, _ = small
    assert len(task.fit.y) == 300 and task.fit.cat.sum() == 150
    assert len(task.held_out.y) == 20 and task.held_out.cat.sum() == 10
    assert not set(task.fit.y) & set(task.held_out.y)
    assert set(task.fit.y) | set(task.held_out.y) <= set(train.answers)
    np.testing.assert_allclose(task.fit.X[:, :-1].mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.mean(task.fit.X[:, :-1] ** 2), 1, rtol=1e-5)


def test_the_blocks_gates_are_on_where_they_are_on_raw_inputs(small):
    task, train, own = small
    place = {answer: i for i, answer in enumerate(train.answers)}
    raw = train.inputs[[place[answer] for answer in task.fit.y]]
    scores = np.hstack([raw, np.ones((len(raw), 1))]) @ own
    patterns = {column.tobytes() for column in (scores >= 0).T}
    drawn = (task.fit.X @ task.own_gates >= 0).T
    assert len(drawn) == 6 and {column.tobytes() for column in drawn} <= patterns


def test_all_methods_of_figure_5_end_where_they_say(small):
    import figure5
    import pandas as pd

    task, _, _ = small
    epochs = {"Adam, full batch": (5, 200), "Adam, mini-batch": (2,)}
    table = pd.DataFrame(figure5.compare(task, 0, epochs, 300))
    ends = table[table["last"]].set_index("method")
    assert set(ends.index) == set(figure5.METHODS) and ends.index.is_unique
    for method in (figure5.GAUSSIAN, figure5.OWN):
        assert ends.loc[method, "relative_gap"] <= figure5.TOLERANCE
    assert 0 <= ends.loc[figure5.LAGRANGIAN, "relative_gap"] < 0.1
    solvers = table[table["method"].isin([figure5.GAUSSIAN, figure5.OWN, figure5.LAGRANGIAN])]
    assert (solvers.groupby("method")["seconds"].diff().dropna() > 0).all()
    assert (ends["tried_seconds"] >= 0.999 * ends["seconds"]).all()
    # Of what was fitted to the end, nothing is as far from a network of ReLU units as a linear
    # student, but weights in the cones of six gates.
    others = [figure5.LINEAR, figure5.LAGRANGIAN, "Adam, mini-batch"]
    nearer = ends["activation_error"].drop(others)
    assert (nearer < ends.loc[figure5.LINEAR, "activation_error"]).all()


def test_decomposed_networks_say_what_the_gated_ones_said(small):
    import figure5

    task, _, _ = small
    rng = np.random.default_rng(1)
    gates = rng.standard_normal((13, 6)).astype(np.float32)
    runs, problem, G = figure5.gated(task, lambda: gates)
    chosen = figure5.best(runs)
    # On the images that were fitted, that is: elsewhere patterns differ.
    same = task._replace(held_out=task.fit, test=task.fit)
    decomposed = figure5.decomposed(same, chosen, problem, G)
    V, b, _ = list(chosen.result.values())[-1]
    expected = task.fit.errors(figure5.gated_network(V, b, G)(task.fit.X))[0]
    got = decomposed.points[-1]
    np.testing.assert_allclose(got["activation_error"], expected, rtol=1e-2)
    assert got["seconds"] > chosen.points[-1]["seconds"]
    assert got["units"] <= 2 * chosen.points[-1]["units"]


def test_the_linear_student_is_a_ridge_of_scikit_learn(small):
    import figure5
    from sklearn.linear_model import Ridge

    task, _, _ = small
    for run in figure5.linear(task):
        ridge = Ridge(len(task.fit.y) * run.setting).fit(task.fit.X[:, :-1], task.fit.y)
        expected = task.test.errors(ridge.predict(task.test.X[:, :-1]))[0]
        np.testing.assert_allclose(run.points[0]["activation_error"], expected, rtol=1e-3)


def test_adam_gets_as_many_parameters_as_all_gated_units_have(small):
    import figure5

    from cvxdistill.adapters import DenseLayout, build_student

    task, _, _ = small
    d, p = task.fit.X.shape[1], figure5.N_GATES
    rng = np.random.default_rng(0)
    W1, G = rng.standard_normal((2, d, p)).astype(np.float32)
    layout = DenseLayout((d - 1,), (1,))
    student = build_student(layout, W1, np.ones((p, 1), np.float32), np.arange(p), G, np.zeros(1))
    assert figure5.gated_parameters(p, d) == student.parameters_stored
    run = figure5.adam(task, 0, 1e-3, 1, 25)
    assert run.points[0]["parameters"] == figure5.relu_parameters(figure5.hidden_units(d), d)
    assert 0 <= student.parameters_stored - run.points[0]["parameters"] < d + 1


def test_seconds_to_the_linear_student_are_those_of_the_first_point_as_near():
    import figure5
    import pandas as pd

    rows = [
        (0, "linear", 1.0, 0.2, True),
        (0, "a", 2.0, 0.3, False),
        (0, "a", 3.0, 0.2, False),
        (0, "a", 4.0, 0.1, True),
        (1, "linear", 1.0, 0.05, True),
        (1, "a", 2.0, 0.1, True),
    ]
    columns = ["seed", "method", "seconds", "activation_error", "last"]
    ends = figure5.with_linear_mark(pd.DataFrame(rows, columns=columns))
    marks = ends.set_index(["seed", "method"])["to_linear"]
    assert marks[0, "a"] == 3.0 and np.isnan(marks[1, "a"]) and marks[1, "linear"] == 1.0


def test_a_curve_holds_the_last_value_measured_by_each_time():
    import figure5
    import pandas as pd

    points = pd.DataFrame(
        {"seed": [0, 0, 1], "seconds": [1.0, 3.0, 2.0], "test_error": [0.4, 0.2, 0.6]}
    )
    mean, std = figure5.curve(points, "test_error", np.array([2.0, 2.9, 3.0, 9.0]))
    np.testing.assert_allclose(mean, [0.5, 0.5, 0.4, 0.4])
    np.testing.assert_allclose(std, np.array([0.1, 0.1, 0.2, 0.2]) * 2**0.5)


def test_a_gated_head_is_the_convex_programmes_network():
    import table2

    from cvxdistill.solvers import GatedOperator

    rng = np.random.default_rng(0)
    G = rng.standard_normal((6, 4)).astype(np.float32)
    head = table2.new_head("convex", G, seed=0)
    X = rng.standard_normal((30, 6)).astype(np.float32)
    X[:, -1] = 1
    V, b = head.weights()
    expected = GatedOperator(X, X @ G >= 0).forward(V)[:, 0] + b
    with torch.no_grad():
        got = head(torch.from_numpy(X[:, :-1])).numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    relu = table2.new_head("non-convex", G, seed=0)
    assert 0 <= table2.stored(head) - table2.stored(relu) < 7


def test_weight_decay_is_the_penalty_at_balanced_factors_and_more_elsewhere():
    import table2

    G = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    head = table2.new_head("convex", G, seed=0)
    decay = table2.weight_decay(0.3)
    penalty = 0.3 * np.linalg.norm(head.weights()[0][:, :, 0], axis=1).sum()
    assert decay(head).item() > 1.01 * penalty
    with torch.no_grad():
        W1 = torch.cat([head.first.weight, head.first.bias[:, None]], dim=1).norm(dim=1)
        factor = (head.second.weight[0].abs() / W1).sqrt()
        head.first.weight *= factor[:, None]
        head.first.bias *= factor
        head.second.weight /= factor
    np.testing.assert_allclose(decay(head).item(), penalty, rtol=1e-5)


def test_table_2_on_synthetic_images(monkeypatch):
    import table2

    for name, value in {
        "FROZEN_RATES": (1e-2,),
        "FROZEN_EPOCHS": (5,),
        "TRAINED_RATES": (1e-2,),
        "BATCH": 20,
    }.items():
        monkeypatch.setattr(table2, name, value)
    torch.manual_seed(0)
    pictures, signs = torch.randn(300, 3, 8, 8), torch.rand(300) > 0.5
    pictures += 0.3 * (2 * signs.float() - 1)[:, None, None, None]
    data = table2.Images(pictures, signs.float())
    backbone = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.AvgPool2d(3)
    ).eval()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    options = {"n_gates": 5, "held_out": 50, "trained_epochs": (3,)}
    parts = data.part(slice(200)), data.part(slice(200, None))
    rows = list(table2.compare(backbone, *parts, 0, **options))
    named = {(row["backbone"], row["head"], row["by"]): row for row in rows}
    assert len(named) == 7
    for row in rows:
        assert row["accuracy"] > 0.9, row
    solved = named["frozen", "convex", "R-FISTA"]
    assert solved["gap"] <= 1e-3 and named["frozen", "linear", "R-FISTA"]["gap"] <= 1e-3
    # Adam cannot be below the certified bound.
    assert named["frozen", "convex", "Adam, same aim"]["gap"] > 0
    of_heads = [named["frozen", head, "Adam"]["parameters"] for head in table2.HEADS]
    assert of_heads[1] <= of_heads[0]
    after = backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@needs_data
def test_the_recorded_answers_are_the_networks(monkeypatch):
    import figure5
    from datasets import load_cifar10, normalise
    from teachers import load_teacher

    photos, labels = load_cifar10("test", 60)
    monkeypatch.setattr(figure5, "load_cifar10", lambda split: (photos, labels))
    recorded = figure5.record_network("test")
    teacher = load_teacher("resnet18")
    chosen = (labels == 3) | (labels == 5)
    images = torch.from_numpy(normalise(photos[chosen], teacher.mean, teacher.std))
    with torch.no_grad():
        logits = teacher.model(images)
    np.testing.assert_allclose(recorded.answers, logits[:, 3] - logits[:, 5], atol=1e-4)
    assert recorded.inputs.shape == (chosen.sum(), 1024)
    np.testing.assert_array_equal(recorded.cat, labels[chosen] == 3)
