"""compress: budgets are kept and counted in full, and nothing else is touched."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

import cvxdistill  # noqa: E402
from cvxdistill.adapters import LinearStudent  # noqa: E402
from cvxdistill.site_students import SiteStudents  # noqa: E402
from cvxdistill.solvers.random_order import random_order  # noqa: E402


def images(n: int = 240, seed: int = 0) -> torch.Tensor:
    """Smooth images: neighbouring pixels are alike."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 3, 3, generator=generator)
    noise = torch.randn(n, 3, 8, 8, generator=generator)
    return nn.functional.interpolate(coarse, 8, mode="bilinear") + 0.1 * noise


class Net(nn.Module):
    """Convolutions with batch norms, a shortcut, a frozen part, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Sequential(
            nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(16, 8, 3, padding=1)
        )
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))
        self.bn.running_mean.normal_(0, 0.3)
        self.bn.running_var.uniform_(0.5, 2)
        self.bn.requires_grad_(False)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu(x + self.body(x))
        return self.head(self.pool(self.relu(self.down(x))).flatten(1))


def compress(model: nn.Module, data: Any, **options: Any) -> cvxdistill.Compression:
    return cvxdistill.compress(model, data, verbose=0, **options)


def numbers(model: nn.Module) -> int:
    """All numbers of a model's parameters, and what its students store."""
    students = [m for m in model.modules() if isinstance(m, LinearStudent)]
    inside = {id(p) for student in students for p in student.parameters()}
    others = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return others + sum(t.numel() for student in students for t in student.state_dict().values())


def stored_bytes(model: nn.Module) -> int:
    """Of what ``torch.save(model.state_dict())`` would hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def outputs(model: nn.Module, data: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(data).numpy()


def relative_error(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted - wanted.mean(axis=0)))


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


@pytest.fixture(scope="module")
def third(net) -> cvxdistill.Compression:
    """A third of the parameters."""
    return compress(net, images(), max_parameters=numbers(net) // 3)


@pytest.mark.parametrize("share", [1.0, 0.7, 0.2])
@pytest.mark.parametrize("sequential", [True, False])
def test_no_budget_of_parameters_is_passed(net, share, sequential):
    budget = int(share * numbers(net))
    result = compress(net, images(80), max_parameters=budget, sequential=sequential)
    assert result.before == numbers(net) and result.unit == "parameters"
    assert result.after == numbers(result.model) <= budget
    students = [m for m in result.model.modules() if isinstance(m, LinearStudent)]
    assert sum(c.parameters for c in result.choices) == sum(s.parameters_stored for s in students)
    assert len(students) == len(result.choices) and (share == 1.0) == (not students)


@pytest.mark.parametrize("share", [0.8, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_budget_of_bytes_is_passed(net, share, dtype):
    model = copy.deepcopy(net).to(dtype)
    budget = int(share * stored_bytes(model))
    result = compress(model, images(80), max_bytes=budget)
    assert result.before == stored_bytes(model) and result.unit == "bytes"
    assert result.after == stored_bytes(result.model) <= budget
    assert result.choices


def test_a_budget_that_holds_the_model_changes_nothing(net):
    for budget in (numbers(net), 10**12):
        result = compress(net, images(40), max_parameters=budget)
        assert result.choices == () and result.error == 0 and result.after == result.before
        np.testing.assert_array_equal(outputs(result.model, images(5)), outputs(net, images(5)))


def test_the_error_is_that_of_the_outputs_on_held_out_examples(net, third):
    data = images()
    wanted, got = outputs(net, data), outputs(third.model, data)
    # Of all examples the error is about that of those held out, and not their training error.
    assert third.examples == 240 and third.held_out == 24
    assert 0 < third.error == pytest.approx(relative_error(got, wanted), rel=0.5)
    held_out = random_order(np.random.default_rng(0), 240) < 24
    assert third.error == pytest.approx(relative_error(got[held_out], wanted[held_out]), rel=1e-4)


def test_it_is_better_than_truncated_singular_values_of_the_weights(net, third):
    """The usual compression without data, at a size that is no smaller."""
    data = images(200, seed=5)
    truncated = copy.deepcopy(net)
    saved = numbers(net) - third.after
    for share in np.linspace(0.9, 0.02, 60):
        truncated, size = copy.deepcopy(net), numbers(net)
        for module in truncated.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                W = module.weight.detach().flatten(1)
                rank = max(1, int(share * min(W.shape)))
                size -= max(0, W.numel() - rank * sum(W.shape))
                if rank * sum(W.shape) < W.numel():
                    U, s, Vt = torch.linalg.svd(W, full_matrices=False)
                    low = (U[:, :rank] * s[:rank]) @ Vt[:rank]
                    module.weight.data = low.reshape(module.weight.shape)
        if numbers(net) - size >= saved:
            break
    wanted = outputs(net, data)
    ours = relative_error(outputs(third.model, data), wanted)
    assert ours < 0.8 * relative_error(outputs(truncated, data), wanted)


def test_the_model_given_is_left_as_it_was():
    model = Net().train()
    model.bn.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    modules = dict(model.named_modules())
    result = compress(model, images(60), max_parameters=numbers(model) // 2)
    for budget in ({"max_parameters": 1}, {"max_bytes": 1}):
        with pytest.raises(ValueError, match="cannot be met"):
            compress(model, images(60), **budget)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert dict(model.named_modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    # The new one has its flags, and shares nothing with it.
    new = dict(result.model.named_modules())
    assert all(new[name].training == flag for name, flag in zip(modules, flags) if name in new)
    mine = {tensor.data_ptr() for tensor in before.values()} | {
        tensor.data_ptr() for tensor in after.values()
    }
    assert not mine & {t.data_ptr() for t in result.model.state_dict().values() if t.numel()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in result.model.modules())


def test_shapes_and_types_of_outputs_stay(net, third):
    for n in (1, 7):
        data = images(n)
        assert outputs(third.model, data).shape == outputs(net, data).shape == (n, 5)
    half = compress(copy.deepcopy(net).double(), images(60), max_parameters=numbers(net) // 2)
    assert outputs(half.model, images(3).double()).dtype == np.float64


@pytest.mark.parametrize("unit", ["max_parameters", "max_bytes"])
def test_a_budget_too_small_names_the_smallest_and_that_works(net, unit):
    with pytest.raises(ValueError, match="smallest possible is") as refused:
        compress(net, images(60), **{unit: 10})
    smallest = int(re.search(r"possible is ([\d,]+)", str(refused.value))[1].replace(",", ""))
    result = compress(net, images(60), **{unit: smallest})
    assert result.after <= smallest == result.smallest
    assert result.after == {"max_parameters": numbers, "max_bytes": stored_bytes}[unit](
        result.model
    )
    with pytest.raises(ValueError, match=f"smallest possible is {smallest:,}"):
        compress(net, images(60), **{unit: smallest - 1})


def test_the_smallest_budget_works_where_costs_are_rounded():
    torch.manual_seed(0)
    layers = [part for k in range(8) for part in (nn.Linear(61 + k, 62 + k), nn.Tanh())]
    model = nn.Sequential(*layers)
    data = torch.randn(300, 61, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="smallest possible is") as refused:
        compress(model, data, max_parameters=10)
    smallest = int(re.search(r"possible is ([\d,]+)", str(refused.value))[1].replace(",", ""))
    result = compress(model, data, max_parameters=smallest)
    assert result.after <= smallest
    # Above this many parameters they are counted in larger units, but not here.
    assert result.before > 30_000
    np.testing.assert_array_equal(result.frontier[-1], [result.before, 0])


def test_an_error_is_not_exceeded_and_more_of_it_makes_the_model_smaller(net):
    sizes = []
    for bound in (1e-6, 0.1, 0.4):
        result = compress(net, images(), max_error=bound)
        assert result.error <= bound and result.after == numbers(result.model)
        sizes.append(result.after)
    assert sizes[0] == numbers(net) and sizes[2] < sizes[1] < sizes[0]


def test_only_the_blocks_that_are_named_are_replaced(net):
    names = ["body", "head.0:head.2"]
    result = compress(net, images(), max_parameters=3000, blocks=names)
    assert result.sites == tuple(names) and {c.block for c in result.choices} == set(names)
    assert isinstance(result.model.body, LinearStudent)
    assert isinstance(result.model.head[0], LinearStudent)
    assert not list(result.model.head[2].parameters())
    for name in ("stem", "bn", "down"):
        kept, old = result.model.get_submodule(name), net.get_submodule(name)
        assert all(torch.equal(v, old.state_dict()[k]) for k, v in kept.state_dict().items())


def test_results_are_the_same_for_the_same_random_state(net):
    options = {"max_parameters": 2500, "random_state": 3}
    first, second = (compress(net, images(), **options) for _ in range(2))
    assert first.error == second.error
    assert [c.block for c in first.choices] == [c.block for c in second.choices]
    a, b = first.model.state_dict(), second.model.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    other = compress(net, images(), max_parameters=2500, random_state=4)
    assert other.error != first.error


def test_global_random_states_are_left_alone(net):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    compress(net, images(60), max_parameters=3000)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


def test_silence(net, capfd):
    compress(net, images(60), max_parameters=3000)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_the_report_and_the_table_say_what_was_done(third):
    text = str(third)
    assert f"{third.before:,} -> {third.after:,} parameters" in text
    assert f"{third.error:.3f}" in text and f"{third.smallest:,}" in text
    for choice in third.choices:
        assert choice.block in text and f"{choice.parameters:,}" in text
        assert 0 <= choice.relative_gap < 1e-8 and choice.rows > 0
        assert 0 <= choice.activation_error < 1.5
    assert f"{third.error:.3f}" in repr(third) and "\n" not in repr(third)
    frame = pytest.importorskip("pandas") and third.to_frame()
    assert list(frame["block"]) == [choice.block for choice in third.choices]
    assert frame["parameters"].sum() == sum(choice.parameters for choice in third.choices)
    before = frame["parameters_before"].sum()
    assert third.before - before + frame["parameters"].sum() == third.after


def test_the_frontier_falls_and_is_drawn(third):
    sizes, errors = third.frontier.T
    assert (np.diff(sizes) >= 0).all() and (np.diff(errors) < 0).all()
    assert errors[-1] == 0 and sizes[-1] == third.before
    assert third.smallest <= sizes[0]
    pytest.importorskip("matplotlib").use("Agg")
    ax = third.plot_frontier()
    line, point = ax.lines[:2]
    np.testing.assert_array_equal(line.get_xdata(), sizes)
    assert list(point.get_xdata()) == [third.after] and list(point.get_ydata()) == [third.error]
    assert third.plot_frontier(ax) is ax


def test_layers_of_low_rank_are_compressed_without_loss():
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(a=nn.Linear(20, 40), act=nn.ReLU(), b=nn.Linear(40, 30), out=nn.Tanh())
    )
    for layer, rank in ((model.a, 3), (model.b, 4)):
        weight = torch.randn(layer.out_features, rank) @ torch.randn(rank, layer.in_features)
        layer.weight.data = weight / weight.norm() * weight.shape[0] ** 0.5
    data = torch.randn(3000, 20, generator=torch.Generator().manual_seed(0))
    # Two factors and a bias: 3 (20 + 40) + 40 and 4 (40 + 30) + 30.
    result = compress(model, data, max_parameters=3 * 60 + 40 + 4 * 70 + 30, blocks=["a", "b"])
    # What is left is the ridge.
    assert result.error < 0.02
    wanted, got = outputs(model, data), outputs(result.model, data)
    assert relative_error(got, wanted) < 0.02
    assert {c.block: c.student for c in result.choices} == {"a": "rank 3", "b": "rank 4"}


def test_superfluous_channels_are_left_out_without_loss():
    torch.manual_seed(0)
    # 16 channels that are mixtures of 3.
    model = nn.Sequential(
        OrderedDict(mix=nn.Conv2d(3, 16, 1), conv=nn.Conv2d(16, 20, 3, padding=1), out=nn.Tanh())
    )
    result = compress(model, images(400), max_parameters=1000, blocks=["conv"])
    (choice,) = result.choices
    assert result.model.conv.input_rank in (3, 4)
    assert result.error < 0.03 and choice.activation_error < 0.03


def deep() -> nn.Module:
    torch.manual_seed(3)
    layers = [part for _ in range(5) for part in (nn.Linear(24, 24), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(24, 6))
    for layer in model[::2]:
        layer.weight.data *= 1.7
        layer.bias.data.normal_()
    return model


def test_fitting_each_to_what_comes_before_it_is_better_where_errors_add_up():
    model = deep()
    data = torch.randn(3000, 24, generator=torch.Generator().manual_seed(0))
    blocks = [str(k) for k in range(0, 12, 2)]
    errors = {}
    for sequential in (True, False):
        result = compress(model, data, max_parameters=1500, blocks=blocks, sequential=sequential)
        assert len(result.choices) > 3
        errors[sequential] = result.error
    assert errors[True] < 0.99 * errors[False]


def test_compressed_models_export(net, third):
    data = images(4)
    program = torch.export.export(third.model.eval(), (data,))
    with torch.no_grad():
        got = program.module()(data)
    np.testing.assert_allclose(got.numpy(), outputs(third.model, data), atol=1e-6)


def test_batches_of_every_form_give_the_same(net):
    data = images(96)
    expected = compress(net, data, max_parameters=2500)
    for form in (
        data.numpy(),
        [data[:30], data[30:]],
        (batch for batch in (data[:64], data[64:])),
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(data, torch.zeros(96)), batch_size=50
        ),
    ):
        result = compress(net, form, max_parameters=2500)
        assert result.examples == 96 and result.after <= 2500
        assert result.error == pytest.approx(expected.error, rel=0.2)
    assert compress(net, data, max_parameters=2500, max_examples=50).examples == 50


class Number(nn.Module):
    """Returns (N,), not (N, 1)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(10, 40), nn.ReLU(), nn.Linear(40, 1))

    def forward(self, x):
        return self.layers(x).squeeze(1)


def test_models_that_return_one_number_an_example():
    data = torch.randn(500, 10, generator=torch.Generator().manual_seed(0))
    model = Number()
    result = compress(model, data, max_parameters=200, batch_size=23)
    held_out = random_order(np.random.default_rng(0), 500) < 50
    wanted, got = outputs(model, data)[held_out], outputs(result.model, data)[held_out]
    assert result.error == pytest.approx(relative_error(got, wanted), rel=1e-4)


class Images(nn.Module):
    """Returns images (N, 2, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 2, 3, padding=1)
        )
        self.layers[2].bias.data[:] = torch.tensor([5.0, -5.0])

    def forward(self, x):
        return self.layers(x)


def test_of_images_the_error_is_relative_to_the_spread_of_each_channel():
    model, data = Images(), images(200)
    result = compress(model, data, max_parameters=300)
    held_out = random_order(np.random.default_rng(0), 200) < 20
    wanted, got = (
        np.moveaxis(outputs(m, data)[held_out], 1, -1).reshape(-1, 2) for m in (model, result.model)
    )
    assert result.error == pytest.approx(relative_error(got, wanted), rel=1e-4)


def sequences(padding: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (80, 9), generator=generator)
    keep = torch.arange(9)[None] < torch.randint(3, 10, (80, 1), generator=generator)
    return {"input_ids": ids.masked_fill(~keep, padding), "attention_mask": keep.long()}


def bert(kind: str = "BertModel") -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        vocab_size=50, max_position_embeddings=9,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, kind)(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_padding_changes_nothing():
    model = bert()
    results = [compress(model, sequences(p), max_parameters=2500) for p in (0, 17)]
    first, second = results
    assert first.after <= 2500 and first.choices
    assert [c.block for c in first.choices] == [c.block for c in second.choices]
    assert first.error == pytest.approx(second.error, rel=1e-3)
    for a, b in zip(first.choices, second.choices, strict=True):
        assert a.rows == b.rows and a.student == b.student
    # With all tokens counted, padding would be fitted too.
    whole = compress(model, sequences(17), max_parameters=2500, mask=None)
    assert whole.error != pytest.approx(first.error, rel=1e-3)


def test_sequences_of_different_lengths():
    model, whole = bert(), sequences(0)
    lengths = whole["attention_mask"].sum(1)
    short = lengths <= 6
    batches = [
        {key: value[which][:, :length] for key, value in whole.items()}
        for which, length in ((short, 6), (~short, 9))
    ]
    result = compress(model, batches, max_parameters=2500)
    assert result.choices and result.after <= 2500
    # What takes a whole sequence is not tried: a student has one shape.
    assert "pooler" in compress(model, whole, max_parameters=2500).sites
    assert "pooler" not in result.sites
    assert {"encoder.layer.1", "pooler.dense"} <= set(result.sites)


@pytest.mark.parametrize("n", [2, 3])
def test_hardly_any_examples(net, n):
    result = compress(net, images(n), max_parameters=3000)
    assert result.after <= 3000 and result.examples == n and result.held_out == 1


def test_inputs_that_hardly_vary():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))
    data = 1e3 + 1e-3 * torch.randn(100, 12, generator=torch.Generator().manual_seed(0))
    result = compress(model, data, max_parameters=100)
    wanted, got = outputs(model, data), outputs(result.model, data)
    assert np.abs(got - wanted).max() < 1e-2 * np.abs(wanted).max()


@pytest.mark.parametrize("form", ["array", "key", "function"])
def test_masks_of_tokens_serve_a_model_that_returns_none(form):
    model, data = bert("BertForSequenceClassification"), sequences(0)
    mask = {
        "array": data["attention_mask"].numpy(),
        "key": "attention_mask",
        "function": lambda batch: batch["attention_mask"],
    }[form]
    part = "bert.encoder.layer.0.intermediate.dense:bert.encoder.layer.0.output.dense"
    result = compress(model, data, max_parameters=3000, blocks=[part], mask=mask)
    assert result.choices[0].rows <= int(data["attention_mask"].sum())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "give one of max_parameters, max_bytes, max_error; got none"),
        ({"max_parameters": 9, "max_error": 0.1}, ValueError, "got max_parameters, max_error"),
        ({"max_parameters": -5}, ValueError, "positive integer"),
        ({"max_parameters": 0}, ValueError, "positive integer"),
        ({"max_parameters": True}, ValueError, "positive integer"),
        ({"max_parameters": 1e3}, ValueError, "positive integer"),
        ({"max_bytes": "1 MB"}, ValueError, "positive integer"),
        ({"max_error": 0.0}, ValueError, r"max_error must lie in \(0, inf\)"),
        ({"max_error": -0.1}, ValueError, r"max_error must lie in \(0, inf\)"),
        ({"max_error": float("nan")}, ValueError, r"max_error must lie in \(0, inf\)"),
        ({"max_error": float("inf")}, ValueError, r"max_error must lie in \(0, inf\)"),
        ({"max_error": True}, TypeError, "max_error must be a number"),
        ({"max_error": "0.1"}, TypeError, "max_error must be a number"),
        ({"max_error": 0.1, "validation_fraction": 0}, ValueError, r"must lie in \(0, 1\)"),
        ({"max_error": 0.1, "validation_fraction": 1}, ValueError, r"must lie in \(0, 1\)"),
        ({"max_error": 0.1, "batch_size": 0}, ValueError, "batch_size must be"),
        ({"max_error": 0.1, "batch_size": None}, ValueError, "batch_size must be"),
        ({"max_error": 0.1, "max_examples": 0}, ValueError, "max_examples must be"),
        ({"max_error": 0.1, "max_examples": 1}, ValueError, "at least 2 examples"),
        ({"max_error": 0.1, "blocks": "body"}, ValueError, "'auto' or a list"),
        ({"max_error": 0.1, "blocks": 3}, TypeError, "'auto' or a list"),
        ({"max_error": 0.1, "blocks": []}, ValueError, "blocks is empty"),
        ({"max_error": 0.1, "blocks": ["nothing"]}, ValueError, "no block named 'nothing'"),
        ({"max_error": 0.1, "blocks": ["body", 3]}, TypeError, "dotted name"),
        ({"max_error": 0.1, "blocks": ["relu"]}, ValueError, "called 3 times"),
        ({"max_error": 0.1, "mask": 3}, TypeError, "mask must be"),
        ({"max_error": 0.1, "sparse": "yes"}, TypeError, "sparse must be True or False"),
        ({"max_error": 0.1, "sequential": None}, TypeError, "sequential must be True or False"),
    ],
)
def test_bad_arguments_are_refused(net, options, error, message):
    with pytest.raises(error, match=message):
        compress(net, images(20), **options)


def test_data_with_nan_are_refused_by_the_name_of_the_block(net):
    data = images()
    data[7, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"the input of block '.+' contains NaN or infinity"):
        compress(net, data, max_parameters=numbers(net) // 2)


def test_what_is_no_model_or_no_data_is_refused(net):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        compress(lambda x: x, images(20), max_error=0.1)
    with pytest.raises(TypeError, match="data must be"):
        compress(net, 3, max_error=0.1)
    with pytest.raises(ValueError, match="no block to replace"):
        compress(nn.Sequential(nn.ReLU()), images(20), max_error=0.1)


def classes(model: nn.Module, data: torch.Tensor) -> np.ndarray:
    return outputs(model, data).argmax(axis=1)


class Confident(nn.Module):
    """A nearly linear first half, and a second that squashes each output and keeps their order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(12, 120), nn.ReLU(), nn.Linear(120, 4))
        self.last = nn.Sequential(nn.Linear(4, 200), nn.Softsign(), nn.Linear(200, 4))
        copies = torch.eye(4).repeat(50, 1)
        with torch.no_grad():
            self.first[0].bias.fill_(0.5)
            self.last[0].weight.copy_(60 * copies)
            self.last[0].bias.zero_()
            self.last[2].weight.copy_(copies.T / 50)
            self.last[2].bias.zero_()
            self.register_buffer("middle", self.first(torch.zeros(1, 12)))

    def forward(self, x):
        return self.last(self.first(x) - self.middle)


@pytest.fixture(scope="module")
def confident() -> Confident:
    return Confident().eval()


def twelve(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))


def test_agreement_is_measured_on_held_out_examples(confident):
    data = twelve(900, 1)
    result = compress(confident, data, max_parameters=1000, criterion="agreement")
    held_out = random_order(np.random.default_rng(0), 900) < 90
    other = classes(confident, data) != classes(result.model, data)
    assert result.criterion == "agreement" and result.error == other[held_out].mean() > 0
    assert "classified otherwise" in str(result)
    assert "classified otherwise" in result.plot_frontier().get_ylabel()


def test_agreement_spends_the_budget_on_classes_and_not_on_scale(confident):
    model, data, fresh = confident, twelve(3000, 1), twelve(3000, 2)
    chosen, wrong, errors = {}, {}, {}
    for criterion in ("output", "agreement"):
        # Room for one of the two as it is.
        options = {"max_parameters": 2300, "blocks": ["first", "last"], "criterion": criterion}
        result = compress(model, data, **options)
        chosen[criterion] = [choice.block for choice in result.choices]
        wrong[criterion] = (classes(model, fresh) != classes(result.model, fresh)).mean()
        errors[criterion] = relative_error(outputs(result.model, fresh), outputs(model, fresh))
    assert chosen == {"output": ["first"], "agreement": ["last"]}
    assert wrong["agreement"] < wrong["output"] and errors["output"] < errors["agreement"]


def test_an_error_of_agreement_is_kept(confident):
    data = twelve(2000, 1)
    result = compress(confident, data, max_error=0.2, criterion="agreement")
    held_out = random_order(np.random.default_rng(0), 2000) < 200
    other = classes(confident, data) != classes(result.model, data)
    assert other[held_out].mean() == result.error <= 0.2
    assert result.after < result.before


def test_agreement_needs_several_outputs(net):
    data = torch.randn(100, 10, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="gives one"):
        compress(Number(), data, max_parameters=200, criterion="agreement")
    with pytest.raises(ValueError, match="criterion must be one of output, agreement, got 'loss'"):
        compress(net, images(20), max_parameters=200, criterion="loss")


@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5])
def test_inputs_far_from_zero_keep_their_digits(mean):
    """A low-rank layer whose inputs are large and hardly vary, as some channels of GPT-2 are."""
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(2, 40, 3, generator=generator) / 40**0.5
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 6)).eval()
    with torch.no_grad():
        model[0].weight.copy_(factors[0] @ factors[1].T)
        model[0].bias.copy_(-mean * model[0].weight.sum(axis=1))
    data = torch.randn(2000, 40, generator=generator) + mean
    result = compress(model, data, max_parameters=600, blocks=["0"])
    assert [choice.student for choice in result.choices] == ["rank 3"]
    assert result.error < max(2e-4, 4e-7 * mean)


class Repeated(nn.Module):
    """The same map twelve times: it can spare any, but not all; and what is not quite linear."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = nn.Linear(20, 10, bias=False)
        self.maps = nn.ModuleList(copy.deepcopy(first) for _ in range(12))

    def forward(self, x):
        total = torch.stack([own(x) for own in self.maps]).mean(dim=0)
        return total + 0.3 * torch.sin(3 * total)


def test_students_that_err_more_together_than_alone_are_thought_over():
    model = nn.Sequential(OrderedDict(all=Repeated())).eval()
    data = torch.randn(3000, 20, generator=torch.Generator().manual_seed(0))
    maps = [f"all.maps.{k}" for k in range(12)]
    options = {"max_parameters": 12 * 40, "criterion": "agreement"}
    apart = compress(model, data, blocks=maps, **options)
    whole = compress(model, data, blocks=["all"], **options)
    expected = sum(choice.output_change**2 for choice in apart.choices) ** 0.5
    assert expected < whole.error < apart.error / 2
    best = compress(model, data, blocks=["all", *maps], **options)
    assert [choice.block for choice in best.choices] == ["all"]
    assert best.error == whole.error


class Classifier(nn.Module):
    """Convolutions, an average over all positions, and a head of 3 classes for 24 channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(8, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()
        )
        self.fc = nn.Linear(24, 3)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean(dim=(2, 3)))


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier().eval()


def the_student(result: cvxdistill.Compression) -> LinearStudent:
    (student,) = (m for m in result.model.modules() if isinstance(m, LinearStudent))
    return student


def test_students_write_only_what_the_rest_reads(classifier):
    data = images(600)
    options: dict[str, Any] = {"blocks": ["body"], "max_parameters": 520}
    result = compress(classifier, data, **options)
    student = the_student(result)
    assert student.written == 3 and "outputs 3" in result.choices[0].student
    with torch.no_grad():
        given = student(classifier.stem(data))
    assert int((given.abs().amax(dim=(0, 2, 3)) > 0).sum()) == 3
    # With all of its outputs it could be no larger than this within the budget, and errs more.
    all_written = compress(classifier, data, sequential=False, **options)
    assert the_student(all_written).written is None
    assert result.error < 0.9 * all_written.error
    new = images(300, seed=1)
    wanted = outputs(classifier, new)
    errors = [relative_error(outputs(r.model, new), wanted) for r in (result, all_written)]
    assert errors[0] < 0.9 * errors[1]


def test_where_positions_are_averaged_their_mean_is_fitted(classifier, monkeypatch):
    data, new = images(2000), images(500, seed=1)
    wanted = outputs(classifier, new)
    found = {}
    monkeypatch.setattr("cvxdistill.site_students.WIDER_ROWS", 10**9)
    for enough in (2, 10**9):
        monkeypatch.setattr("cvxdistill.site_students.POOLED_ROWS", enough)
        result = compress(classifier, data, blocks=["body"], max_parameters=900)
        found[enough] = relative_error(outputs(result.model, new), wanted)
        assert result.choices[0].rows == (1800 if enough == 2 else 50 * 73)
    # Least squares for the means, on all channels, by NumPy.
    with torch.no_grad():
        z = [classifier.stem(x) for x in (data, new)]
    X, X_new = (nn.functional.unfold(part, 3, padding=1).mean(dim=2).double().numpy() for part in z)
    Y = outputs(classifier, data)
    ones = np.ones((len(X), 1))
    W = np.linalg.lstsq(np.hstack([X, ones]), Y, rcond=None)[0]
    oracle = relative_error(np.hstack([X_new, ones[: len(X_new)]]) @ W, wanted)
    assert found[2] < 1.05 * oracle
    assert found[2] < 0.9 * found[10**9]


def test_an_output_that_something_else_reads_is_written(classifier):
    class Tapped(nn.Module):
        """Also returns what its body gives."""

        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(classifier)

        def forward(self, x):
            z = self.net.body(self.net.stem(x))
            return self.net.fc(z.mean(dim=(2, 3))), z

    result = compress(Tapped().eval(), images(600), blocks=["net.body"], max_parameters=2500)
    assert the_student(result).written is None
    with torch.no_grad():
        given = the_student(result)(classifier.stem(images(20)))
    assert float(given.std(dim=(2, 3)).min()) > 0


def test_few_outputs_are_saved_exported_and_quantised(classifier, tmp_path):
    data = images(600)
    result = compress(classifier, data, blocks=["body"], max_parameters=520)
    result.save(tmp_path / "small.safetensors")
    loaded = cvxdistill.load_compressed(Classifier(), tmp_path / "small.safetensors")
    np.testing.assert_array_equal(outputs(loaded, data), outputs(result.model, data))
    pytest.importorskip("onnxruntime")
    assert result.export_onnx(tmp_path / "small.onnx") < 1e-4
    for dtype in ("float16", "int8"):
        smaller = result.quantize(dtype)
        error = relative_error(outputs(smaller.model, data), outputs(result.model, data))
        assert error < 0.05
        smaller.export_onnx(tmp_path / f"{dtype}.onnx")


def test_wider_kernels_are_used_where_they_come_nearer(monkeypatch):
    class Deep(nn.Module):
        """Three convolutions in a row, hardly bent: a map of 7 x 7 patches."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            convolutions = [nn.Conv2d(3 if k == 0 else 16, 16, 3, padding=1) for k in range(3)]
            self.body = nn.Sequential(*(m for c in convolutions for m in (c, nn.LeakyReLU(0.9))))

        def forward(self, x):
            return self.body(x)

    data, new, net = images(300), images(100, seed=1), Deep().eval()
    options: dict[str, Any] = {"blocks": ["body"], "max_parameters": 1500}
    wide = compress(net, data, **options)
    assert wide.choices[0].student.startswith("5 x 5")
    assert the_student(wide).layout.kernel_size == (5, 5)
    assert list(wide.curves) == ["body"]
    sizes, errors = wide.curves["body"].T
    assert (np.diff(sizes) > 0).all() and (np.diff(errors) < 0).all()
    # Fewer rows than features of these kernels allow for: as if there were none.
    monkeypatch.setattr("cvxdistill.site_students.WIDER_ROWS", 10**9)
    narrow = compress(net, data, **options)
    assert the_student(narrow).layout.kernel_size == (3, 3)
    wanted = outputs(net, new)
    errors = [relative_error(outputs(r.model, new), wanted) for r in (wide, narrow)]
    assert errors[0] < 0.9 * errors[1]


def test_sparse_students_keep_more_of_a_budget_in_parameters_and_in_bytes(net):
    data, new = images(400), images(200, seed=1)
    wanted = outputs(net, new)
    for unit, size in (("max_parameters", numbers), ("max_bytes", stored_bytes)):
        budget = size(net) // 2
        dense, sparse = (
            compress(net, data, sparse=value, **{unit: budget}) for value in (False, True)
        )
        assert any("weights" in choice.student for choice in sparse.choices)
        assert not any("weights" in choice.student for choice in dense.choices)
        assert size(sparse.model) == sparse.after <= budget
        errors = [relative_error(outputs(r.model, new), wanted) for r in (sparse, dense)]
        assert errors[0] < 0.9 * errors[1]
        assert all(choice.relative_gap < 1e-6 for choice in sparse.choices)


def test_sparse_students_are_saved_exported_and_quantised(net, tmp_path):
    data = images(400)
    result = compress(net, data, sparse=True, max_parameters=numbers(net) // 2)
    result.save(tmp_path / "small.safetensors")
    assert (tmp_path / "small.safetensors").stat().st_size < stored_bytes(result.model) + 4000
    loaded = cvxdistill.load_compressed(Net(), tmp_path / "small.safetensors")
    np.testing.assert_array_equal(outputs(loaded, data), outputs(result.model, data))
    assert numbers(loaded) == result.after
    smaller = result.quantize("int8")
    assert stored_bytes(smaller.model) < stored_bytes(result.model)
    error = relative_error(outputs(smaller.model, data), outputs(result.model, data))
    assert error < 0.05
    pytest.importorskip("onnxruntime")
    assert result.export_onnx(tmp_path / "small.onnx") < 1e-4
    smaller.export_onnx(tmp_path / "int8.onnx")


def test_a_compressor_gives_what_compress_gives_in_any_order(net, monkeypatch):
    data = images()
    calls = []
    measure = SiteStudents.measure_students
    monkeypatch.setattr(
        SiteStudents, "measure_students", lambda self, *args: calls.append(measure(self, *args))
    )
    compressor = cvxdistill.Compressor(net, data, verbose=0)
    assert "Compressor(Net, " in repr(compressor) and "240 examples" in repr(compressor)
    budgets: list[dict[str, Any]] = [
        {"max_parameters": numbers(net) // 2},
        {"max_bytes": stored_bytes(net) // 3},
        {"max_error": 0.3},
        {"max_parameters": numbers(net) // 3},
    ]
    found = [compressor.compress(**budget) for budget in budgets[::-1]][::-1]
    assert len(calls) == 1
    for budget, result in zip(budgets, found, strict=True):
        alone = compress(net, data, **budget)
        assert (alone.after, alone.error) == (result.after, result.error)
        assert [c.student for c in alone.choices] == [c.student for c in result.choices]
        np.testing.assert_array_equal(outputs(alone.model, data), outputs(result.model, data))


def test_a_compressor_refuses_budgets_that_cannot_be(net):
    compressor = cvxdistill.Compressor(net, images(), verbose=0)
    with pytest.raises(ValueError, match="give one of max_parameters, max_bytes, max_error"):
        compressor.compress()
    with pytest.raises(ValueError, match="max_parameters=1 cannot be met: the smallest"):
        compressor.compress(max_parameters=1)
    with pytest.raises(TypeError, match="max_error must be a number"):
        compressor.compress(max_error="small")
