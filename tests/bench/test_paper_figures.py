"""The paper's figures 3b, 6 and 7, small, and the baselines that stand beside its students."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
needs_data = pytest.mark.skipif(
    not os.environ.get("CVXDISTILL_DATA"), reason="CVXDISTILL_DATA is not set"
)
PAPER = Path(__file__).resolve().parents[2] / "bench" / "paper"
# Adam then hands back the first weights.
NO_SECONDS = 1e-9


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The scripts find each other through their folder, as when one is run."""
    monkeypatch.syspath_prepend(str(PAPER))


@pytest.fixture
def block():
    """Two convolutions, a shortcut and batch norms that are not fresh: 8 x 2 x 2 to 12 x 1 x 1."""
    from teachers import BasicBlock

    torch.manual_seed(0)
    shortcut = torch.nn.Sequential(
        torch.nn.Conv2d(8, 12, 1, stride=2, bias=False), torch.nn.BatchNorm2d(12)
    )
    block = torch.nn.Sequential(BasicBlock(8, 12, 2, shortcut))
    for module in block.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.3)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    return block.eval()


@pytest.fixture
def opponents(block):
    """What the figures ask of an ``Opponents``: the block and its activations."""
    from baselines import Activations

    inputs = torch.rand(150, 8, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        data = Activations(inputs, block(inputs))
    return SimpleNamespace(
        module=block, fitted=data.part(slice(120)), held_out=data.part(slice(120, 150))
    )


@pytest.fixture
def settings():
    from baselines import AdamSettings, Convolution

    return AdamSettings(1e-2, 32, Convolution(2, 1, 0), 1, weighted=False)


def _root(data):
    return torch.eye(data.outputs.shape[1])


@pytest.mark.parametrize("budget", [90, 150, 400, 1000, 2400])
def test_every_baseline_stays_within_its_budget(block, opponents, settings, budget):
    import baselines

    from cvxdistill.adapters import infer_layout

    data = opponents.fitted
    layout = infer_layout((8, 2, 2), (12, 1, 1))
    made = {
        "ReLU": lambda: baselines.adam_student(
            "ReLU", data, budget, settings, 0.02, _root(data), seed=0
        ),
        "gated": lambda: baselines.adam_student(
            "gated", data, budget, settings, 0.02, _root(data), seed=0
        ),
        "pruned, alike": lambda: baselines.pruned(block, budget, alike=True),
        "pruned": lambda: baselines.pruned(block, budget, alike=False),
        "SVD": lambda: baselines.truncated_svd(block, budget),
        "ridge": lambda: baselines.Ridges(data, opponents.held_out, layout).student(budget),
    }
    for name, make in made.items():
        student = make()
        with torch.no_grad():
            assert student(data.inputs).shape == data.outputs.shape, name
        assert baselines.stored_numbers(student) <= budget, name


def test_baselines_that_do_not_fit_are_refused(block, opponents, settings):
    import baselines

    from cvxdistill.adapters import infer_layout

    data = opponents.fitted
    with pytest.raises(ValueError, match="biases"):
        baselines.pruned(block, 35, alike=True)
    with pytest.raises(ValueError, match="biases"):
        baselines.truncated_svd(block, 35)
    with pytest.raises(ValueError, match="ReLU student"):
        baselines.adam_student("ReLU", data, 20, settings, 1.0, _root(data), seed=0)
    ridges = baselines.Ridges(data, opponents.held_out, infer_layout((8, 2, 2), (12, 1, 1)))
    with pytest.raises(ValueError, match="linear layer"):
        ridges.student(12)


def _convolutions(block):
    return {n: m for n, m in block.named_modules() if isinstance(m, torch.nn.Conv2d)}


@pytest.mark.parametrize("alike", [True, False])
def test_pruning_keeps_the_largest_weights(block, alike):
    from baselines import pruned

    before = {name: layer.weight.detach().numpy() for name, layer in _convolutions(block).items()}
    left = 600
    smaller = _convolutions(pruned(block, 36 + left, alike=alike))
    after = {name: layer.weight.detach().numpy() for name, layer in smaller.items()}
    total = sum(w.size for w in before.values())
    groups = [[name] for name in before] if alike else [list(before)]
    for names in groups:
        w = np.concatenate([before[name].ravel() for name in names])
        kept = np.concatenate([after[name].ravel() for name in names])
        count = w.size * left // total
        expected = np.where(np.abs(w) >= np.sort(np.abs(w))[-count], w, 0)
        np.testing.assert_array_equal(kept, expected)


def test_truncated_svd_at_full_rank_is_the_block(block, opponents):
    from baselines import stored_numbers, truncated_svd

    # As factors of full rank the layers have more numbers than whole.
    whole = truncated_svd(block, 2 * stored_numbers(block))
    with torch.no_grad():
        expected = block(opponents.fitted.inputs)
        torch.testing.assert_close(whole(opponents.fitted.inputs), expected, rtol=0, atol=0)


def test_truncated_convolutions_are_nearest_of_their_rank(block):
    from baselines import truncated_svd

    smaller = truncated_svd(block, 900)
    pairs = 0
    for name, layer in _convolutions(block).items():
        new = smaller.get_submodule(name)
        if not isinstance(new, torch.nn.Sequential):
            continue
        inner, outer = (part.weight.detach().numpy() for part in new)
        r = len(inner)
        U, S, Vh = np.linalg.svd(layer.weight.detach().numpy().reshape(len(layer.weight), -1))
        nearest = (U[:, :r] * S[:r]) @ Vh[:r]
        got = outer[:, :, 0, 0] @ inner.reshape(r, -1)
        np.testing.assert_allclose(got, nearest, atol=1e-5)
        pairs += 1
    assert pairs >= 1


def test_norms_anew_are_those_of_the_inputs_and_leave_the_block_alone(block, opponents):
    from baselines import with_norms_anew

    before = {name: value.clone() for name, value in block.state_dict().items()}
    inputs = opponents.fitted.inputs
    anew = with_norms_anew(block, inputs)
    after = block.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not block.training and not anew.training
    with torch.no_grad():
        seen = anew[0].conv1(inputs)
    torch.testing.assert_close(anew[0].bn1.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(anew[0].bn1.running_var, seen.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_ridges_are_those_of_scikit_learn(opponents):
    import baselines
    from sklearn.linear_model import Ridge

    from cvxdistill.adapters import DenseLayout

    fitted, held_out = opponents.fitted, opponents.held_out
    (X, Y), (Xh, Yh) = (
        (data.inputs.flatten(1).double().numpy(), data.outputs.flatten(1).double().numpy())
        for data in (fitted, held_out)
    )
    variance = X.var(axis=0).mean()
    models = [Ridge(len(X) * s * variance).fit(X, Y) for s in baselines.STRENGTHS]
    best = min(models, key=lambda model: np.linalg.norm(model.predict(Xh) - Yh))
    layout = DenseLayout((8, 2, 2), (12, 1, 1))
    ridges = baselines.Ridges(fitted, held_out, layout)
    with torch.no_grad():
        got = ridges.student(10_000)(held_out.inputs).flatten(1).numpy()
    np.testing.assert_allclose(got, best.predict(Xh), rtol=1e-3, atol=1e-4)
    # Of lower rank: predictions in their own leading directions.
    rank = 3
    budget = 32 * rank + rank * 12 + 12
    with torch.no_grad():
        got = ridges.student(budget)(held_out.inputs).flatten(1).numpy()
    errors = []
    for model in models:
        Z = model.predict(X)
        q = np.linalg.svd(Z - Z.mean(axis=0), full_matrices=False)[2][:rank]
        mean = Y.mean(axis=0)
        expected = (model.predict(Xh) - mean) @ q.T @ q + mean
        errors.append(np.abs(got - expected).max())
    assert min(errors) < 1e-3


@pytest.mark.parametrize("kind", ["ReLU", "gated"])
def test_a_seed_gives_adam_its_first_weights(opponents, settings, kind):
    from baselines import adam_student

    def first(seed):
        data = opponents.fitted
        return adam_student(kind, data, 1000, settings, NO_SECONDS, _root(data), seed).state_dict()

    state = torch.random.get_rng_state()
    one, same, other = first(3), first(3), first(4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["first.weight"], other["first.weight"])


def test_adam_comes_nearer_with_time(opponents, settings):
    from baselines import adam_student

    data = opponents.fitted
    errors = []
    for seconds in (NO_SECONDS, 2.0):
        student = adam_student("ReLU", data, 1500, settings, seconds, _root(data), seed=0)
        with torch.no_grad():
            errors.append(float((student(data.inputs) - data.outputs).norm()))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("kind", ["ReLU", "gated"])
@pytest.mark.parametrize("budget", [130, 517, 2000])
def test_filters_within_counts_what_is_stored(opponents, settings, kind, budget):
    from baselines import adam_student, filters_within, stored_numbers

    data = opponents.fitted
    filters = filters_within(kind, budget, data, settings)
    student = adam_student(kind, data, budget, settings, NO_SECONDS, _root(data), seed=0)
    assert student.first.out_channels == filters
    stored = stored_numbers(student)
    # 12 biases behind; each filter has as many numbers as any other.
    each = (stored - 12) // filters
    assert stored == 12 + filters * each
    assert stored <= budget < stored + each


def _path(opponents, **options):
    import one_vs_all

    options = {"strengths": (0.03, 0.3), "n_gates": 6, "n_components": 4, **options}
    return list(one_vs_all.path(opponents.fitted, opponents.module, 0, **options))


def test_points_of_the_path_say_what_the_programme_says(opponents):
    import one_vs_all

    from cvxdistill.adapters import build_student
    from cvxdistill.solvers import GatedOperator, evaluate_gates

    points = _path(opponents)
    assert [point.strength for point in points] == [0.3, 0.03]
    assert points[0].units < points[1].units
    assert 0 < points[0].seconds < points[1].seconds
    data = opponents.held_out
    layout = one_vs_all.layout_of(data)
    X = layout.rows(data.inputs.numpy())[:]
    for point in points:
        assert point.gap <= one_vs_all.TOLERANCE
        Z = GatedOperator(X, evaluate_gates(X, point.G)).forward(point.V)
        expected = Z @ point.components + point.intercept
        with torch.no_grad():
            got = point.student()(data.inputs)
        assert got.shape == data.outputs.shape
        np.testing.assert_allclose(got.flatten(1), expected, rtol=1e-4, atol=1e-4)
        units = point.neurons()
        same = build_student(layout, units.W1, units.W2, units.gate, point.G, point.intercept)
        with torch.no_grad():
            torch.testing.assert_close(same(data.inputs), got, rtol=1e-3, atol=1e-4)
        assert len(units) == point.units
        d = X.shape[1]
        stored = np.count_nonzero(np.abs(point.V).sum(axis=1)) * d + 4 * 12 + 12
        assert point.numbers == stored + d * len(set(units.gate) - {0})


def test_one_vs_all_is_one_programme_for_each_component(opponents, monkeypatch):
    import one_vs_all

    from cvxdistill.solvers import RFISTA, GatedReLUProblem, activation_patterns

    monkeypatch.setattr(one_vs_all, "TOLERANCE", 1e-6)
    (point,) = _path(opponents, strengths=(0.1,))
    data = opponents.fitted
    layout = one_vs_all.layout_of(data)
    X, Y = layout.rows(data.inputs.numpy())[:], layout.targets(data.outputs.numpy())
    D, _ = activation_patterns(X, point.G)
    T = (Y - Y.mean(axis=0)) @ point.components.T
    alpha = 0.1 * GatedReLUProblem(X, T, D, fit_intercept=True).alpha_max()
    for k in range(4):
        problem = GatedReLUProblem(X, T[:, k], D, fit_intercept=True)
        alone = RFISTA(tol=1e-6).solve(problem, alpha)
        together = GatedReLUProblem(X, T, D, fit_intercept=True).operator.forward(point.V)[:, k]
        got = problem.operator.forward(alone.V)[:, 0]
        np.testing.assert_allclose(got, together, rtol=1e-2, atol=1e-2 * np.abs(together).max())


@pytest.fixture
def root():
    """Of a network that uses a few directions of the outputs much more than the others."""
    rng = np.random.default_rng(0)
    J = rng.standard_normal((3, 12))
    w, U = np.linalg.eigh(J.T @ J + 0.01 * np.eye(12))
    return ((U * w**0.5) @ U.T).astype(np.float32)


def test_weighted_outputs_are_fitted_where_the_network_looks(opponents, root):
    data = opponents.fitted

    def error(student, weights):
        with torch.no_grad():
            Z, Y = (
                out.flatten(1).numpy() @ weights for out in (student(data.inputs), data.outputs)
            )
        return np.linalg.norm(Z - Y) / np.linalg.norm(Y - Y.mean(axis=0))

    # With three components of twelve outputs they have to choose.
    plain, weighted = (
        _path(opponents, strengths=(0.01,), n_components=3, root=r)[0].student()
        for r in (None, root)
    )
    assert error(weighted, root) < 0.7 * error(plain, root)
    assert error(plain, np.eye(12)) < error(weighted, np.eye(12))


@pytest.mark.parametrize("weighted", [False, True])
def test_polishing_a_point_drops_units_and_is_no_worse(opponents, root, weighted):
    import figure7

    metric = root if weighted else np.eye(12, dtype=np.float32)
    (point,) = _path(opponents, strengths=(0.01,), root=root if weighted else None)
    data = opponents.held_out

    def error(student):
        with torch.no_grad():
            Z, Y = (out.flatten(1).numpy() @ metric for out in (student(data.inputs), data.outputs))
        return np.linalg.norm(Z - Y) / np.linalg.norm(Y)

    given = error(point.student())
    student, units, seconds = figure7.polished(point, opponents, metric, best=False)
    assert units < point.units and seconds > 0
    assert error(student) <= given * (1 + 1e-3)
    best, units, _ = figure7.polished(point, opponents, metric, best=True)
    assert units <= point.units
    assert error(best) <= error(student) * (1 + 1e-3)


def test_adam_gets_as_many_units_as_were_asked_for(opponents, settings):
    import figure7
    from baselines import adam_student, stored_numbers

    data = opponents.fitted
    for units in (1, 7, 20):
        budget = figure7.relu_numbers(units, opponents)
        student = adam_student("ReLU", data, budget, settings, NO_SECONDS, _root(data), seed=0)
        assert student.first.out_channels == units and stored_numbers(student) == budget


def test_images_are_drawn_evenly_and_smaller_draws_lie_in_larger_ones():
    import few_per_class

    drawing = few_per_class.Drawing.__new__(few_per_class.Drawing)
    labels = np.random.default_rng(0).integers(0, 10, 2000)
    drawing._of_class = [np.flatnonzero(labels == k) for k in range(10)]
    few, more = drawing.images(5, 0), drawing.images(30, 0)
    assert np.bincount(labels[few]).tolist() == [5] * 10
    assert np.bincount(labels[more]).tolist() == [30] * 10
    assert set(few) < set(more) and len(set(more)) == 300
    np.testing.assert_array_equal(few, drawing.images(5, 0))
    assert set(few) != set(drawing.images(5, 1))
    # What is held out, the end, is of all classes too.
    assert len(set(labels[more[-30:]])) > 5


def test_verdicts_compare_seeds_that_have_both():
    import figure6
    import pandas as pd

    rows = [
        (0, 1, "a", 0.80), (0, 1, "b", 0.70),
        (1, 1, "a", 0.82), (1, 1, "b", 0.71),
        (0, 2, "a", 0.80), (0, 2, "b", 0.79),
        (1, 2, "a", 0.82), (1, 2, "b", 0.83),
        (2, 2, "a", 0.10),
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["seed", "filters", "student", "accuracy"])
    found = figure6.verdicts(table, ["filters"], "a", "b").set_index("filters")
    assert found["seeds"].tolist() == [2, 2] and found["wins"].tolist() == [2, 1]
    np.testing.assert_allclose(found["lead"], [10.5, 0.0], atol=1e-9)
    assert found["apart"].tolist() == [True, False]


def test_adams_settings_are_those_of_the_first_seed():
    import figure6

    def row(seed, rate, student=figure6.ADAM, filters=8):
        kept = {"learning_rate": rate, "weighted": True}
        return {"seed": seed, "student": student, "filters": filters, **kept}

    rows = [row(1, 0.1), row(0, 0.2, filters=4), row(0, 0.3, "linear"), row(0, 0.4)]
    assert figure6.chosen(rows, 1, filters=8) == {"learning_rate": 0.4, "weighted": True}
    assert figure6.chosen(rows, 0, filters=8) is None
    with pytest.raises(RuntimeError, match="seed 0"):
        figure6.chosen(rows[:3], 1, filters=8)


def test_seeds_may_be_shared_by_several_runs(tmp_path, monkeypatch):
    import figure6

    class Few:
        def __init__(self, drawing, a_class, seed):
            self.seed = seed

        def rows(self, m, way):
            made.append((self.seed, m, way and way.learning_rate))
            row = {"seed": self.seed, "filters": m, "budget": m, "student": figure6.ADAM}
            row |= {"parameters": 1, "accuracy": 0.5, "seconds": 1.0, "settings": ""}
            return [row | {"learning_rate": m / 100, "weighted": False}]

    made = []
    monkeypatch.setattr(figure6, "Few", Few)
    file = tmp_path / "rows.jsonl"
    with pytest.raises(RuntimeError, match="seed 0"):
        figure6.part_3b(None, [1], True, file)
    figure6.part_3b(None, [0], True, file)
    figure6.part_3b(None, [2], True, file)
    table = figure6.part_3b(None, [0, 1, 2], True, file)
    small, large = figure6.QUICK_FILTERS
    assert made == [
        (seed, m, None if seed == 0 else m / 100) for seed in (0, 2, 1) for m in (small, large)
    ]
    assert table["seed"].tolist() == [0, 0, 1, 1, 2, 2]


def _measured(rows):
    import pandas as pd

    columns = ["seed", "filters", "student", "accuracy", "activation_error"]
    return pd.DataFrame(rows, columns=columns).assign(budget=1000, teacher_accuracy=0.9)


def test_the_table_of_the_gates_has_both_students_of_each_size():
    import figure6

    table = _measured(
        (seed, m, name, accuracy, error)
        for seed in range(2)
        for m in (1, 2)
        for name, accuracy, error in (("distilled", 0.5, 0.4), ("gated", 0.6 + 0.1 * seed, 0.3))
    )
    found = figure6.gates_buy(table)
    assert found["filters"].tolist() == [1, 2]
    # Two standard deviations of 60 and 70: 2 * 10 / sqrt(2).
    assert found["accuracy, gated"].tolist() == ["65.0 ± 14.1"] * 2
    assert found["activation error, distilled"].tolist() == ["0.400 ± 0.000"] * 2


def test_the_table_of_sizes_says_where_a_student_is_missing(tmp_path):
    import figure6

    students = {figure6.BEST: 0.8, "linear": 0.8, "gated": 0.7, "Adam": 0.6, "Adam, 10 times": 0.79}
    table = _measured(
        (seed, m, name, accuracy + 0.01 * seed, 0.3)
        for seed in range(3)
        for m in (1, 8)
        for name, accuracy in students.items()
        if m == 8 or name != "gated"
    )
    found = figure6.summarise_sizes(table).set_index("filters")
    assert found["gated"].tolist() == ["-", "71.0 ± 2.0"]
    np.testing.assert_allclose(found["lead"], 20)
    assert found["apart"].all() and not found["apart, 10 times"].any()
    assert found["wins, 10 times"].tolist() == [3, 3]
    figure6.draw_sizes(table, tmp_path / "sizes.png")
    assert (tmp_path / "sizes.png").stat().st_size > 10_000


@pytest.fixture
def drawing(monkeypatch):
    """Of 400 training and 100 test images."""
    import contest
    import datasets
    import few_per_class

    def few(split, count=None):
        return datasets.load_cifar10(split, min(count or 400, 400))

    for module in (few_per_class, contest):
        monkeypatch.setattr(module, "load_cifar10", few)
        monkeypatch.setattr(module, "LEAST_SECONDS", 0.05)
    return few_per_class.Drawing(100)


@needs_data
def test_a_drawn_task_is_the_network_on_those_images(drawing):
    from datasets import load_cifar10, normalise

    task = drawing.task(3, seed=1)
    photos, _ = load_cifar10("train", 400)
    teacher = drawing.teacher
    images = normalise(photos[drawing.images(3, 1)], teacher.mean, teacher.std)
    with torch.no_grad():
        expected = teacher.model(torch.from_numpy(images))
        torch.testing.assert_close(task.model(task.training), expected, rtol=1e-3, atol=1e-3)
    assert len(task.training) == 30 and task.fitted == slice(0, 27)
    assert task.held_out == slice(27, 30) and len(task.test) == len(task.labels) == 100


@needs_data
def test_adam_has_the_numbers_and_the_seconds_of_each_point(drawing):
    import figure6
    import pandas as pd

    table = pd.DataFrame(figure6.along_path(drawing.task(5, 0), 5, 0, (0.3, 0.1), {}))
    # A ridge, and of both strengths three students.
    assert len(table) == 7
    for _, pair in table[table["strength"] > 0].groupby("strength"):
        ours, adam = (
            pair[pair["student"] == n].iloc[0] for n in (figure6.ONE_VS_ALL, figure6.ADAM)
        )
        # A unit of Adam's stores 1,024 + 1 + 512 numbers.
        assert 0 <= ours["parameters"] - adam["parameters"] < 1537
        assert adam["seconds"] == pytest.approx(ours["seconds"], rel=0.3, abs=0.3)
        assert ours["relative_gap"] <= 1e-2
    assert (table["accuracy"] > 0.5).all()


def test_only_the_blocks_norms_are_estimated_anew():
    from contest import Task, with_block_norms_anew

    torch.manual_seed(0)
    before, after = (
        torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)) for _ in range(2)
    )
    model = torch.nn.Sequential(before, after).eval()
    images = torch.randn(40, 3, 4, 4)
    task = Task(model, images, slice(0, 30), images, np.zeros(40))
    found = with_block_norms_anew(task, "1").model
    with torch.no_grad():
        outputs = after[0](before(images[:30]))
    torch.testing.assert_close(found[1][1].running_mean, outputs.mean((0, 2, 3)))
    assert not found[1][1].training
    for untouched in (found[0][1], after[1]):
        torch.testing.assert_close(untouched.running_mean, torch.zeros(3))


def test_of_those_that_agree_as_often_the_nearer_probabilities_are_best():
    from contest import Made, Measures, Opponents, Task

    torch.manual_seed(0)
    teacher, inputs = torch.nn.Linear(6, 4), torch.randn(60, 6)
    task = Task(teacher, inputs, slice(0, 30), inputs[:20], np.zeros(20, int))
    measures = Measures(task, None)

    def scaled(factor):
        other = torch.nn.Linear(6, 4)
        other.load_state_dict({k: factor * v for k, v in teacher.state_dict().items()})
        return other

    made = [Made(scaled(factor), 1, 0.0) for factor in (3.0, 0.2, 1.1, -1.0)]
    assert [measures.closeness(one.model)[0] for one in made[:3]] == [1.0] * 3
    with torch.no_grad():
        p, q = (torch.softmax(m(inputs[30:]), 1) for m in (teacher, made[0].model))
    wanted = float((p * (p / q).log()).sum(1).mean())
    assert -measures.closeness(made[0].model)[1] == pytest.approx(wanted, rel=1e-4)
    assert Opponents.best(SimpleNamespace(measures=measures), made) is made[2]
