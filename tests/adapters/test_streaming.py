"""Examples that are gone through many times, and what blocks take and give on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from cvxdistill.adapters import (  # noqa: E402
    BlockTaps,
    ConvLayout,
    DenseLayout,
    Examples,
    Span,
    find_span,
    infer_layout,
    model_output,
    token_rows,
)

N = 23
GENERATOR = torch.Generator().manual_seed(0)
VECTORS = torch.randn(N, 4, generator=GENERATOR)
# The first number of each example says which one it is.
VECTORS[:, 0] = torch.arange(N)
TOKENS = torch.randint(1, 9, (N, 5), generator=GENERATOR)
KEEP = torch.arange(5)[None] < torch.randint(1, 6, (N, 1), generator=GENERATOR)


def examples(data: Any, model: nn.Module | None = None, **changes: Any) -> Examples:
    settings = {"batch_size": 4, "max_examples": None, "mask": "auto"} | changes
    return Examples(data, model or nn.Linear(4, 4), rng=np.random.default_rng(0), **settings)


def named() -> dict[str, Any]:
    return {"input_ids": TOKENS, "values": VECTORS, "flag": True, "labels": TOKENS[:3]}


def batches_of(data: torch.Tensor) -> list[torch.Tensor]:
    """Batches of different lengths."""
    return [data[:5], data[5:6], data[6:]]


FORMS: dict[str, Any] = {
    "tensor": lambda: VECTORS,
    "array": lambda: VECTORS.numpy().astype(np.float64),
    "dict": named,
    "dict of arrays": lambda: {"values": VECTORS.numpy(), "input_ids": TOKENS.numpy()},
    "list": lambda: batches_of(VECTORS),
    "pairs": lambda: [(batch, torch.zeros(len(batch))) for batch in batches_of(VECTORS)],
    "dicts": lambda: [{"values": batch, "labels": None} for batch in batches_of(VECTORS)],
    "generator": lambda: (batch for batch in batches_of(VECTORS)),
    "loader": lambda: DataLoader(TensorDataset(VECTORS, TOKENS), batch_size=7),
}


def values(batch: Any) -> torch.Tensor:
    return batch["values"] if isinstance(batch, dict) else batch


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_each_example_comes_exactly_once_below_or_above_a_share(form, share):
    data = examples(FORMS[form]())
    assert len(data) == N
    below, above = (
        [(which, values(batch)) for batch, which in data.between(low, high)]
        for low, high in ((0, share), (share, 1))
    )
    for which, part in (*below, *above):
        assert len(which) == len(part) > 0
        # The numbers are those of the data, and the batch holds just these examples.
        torch.testing.assert_close(part, VECTORS[which])
        assert part.dtype == torch.float32
    counts = [sum(len(which) for which, _ in side) for side in (below, above)]
    assert sum(counts) == N and counts[0] == round(share * N)
    numbers = np.concatenate([which for which, _ in (*below, *above)])
    assert sorted(numbers) == list(range(N))


def test_held_out_examples_are_the_same_each_time_and_drawn_by_the_generator():
    def held_out(data):
        return np.concatenate([which for _, which in data.between(0, 0.4)]).tolist()

    data = examples(iter(batches_of(VECTORS)))
    assert held_out(data) == held_out(data) == held_out(examples(VECTORS, batch_size=9))
    assert held_out(data) != list(range(len(held_out(data))))


@pytest.mark.parametrize(("most", "count"), [(2, 2), (5, 5), (7, 7), (22, 22), (99, N), (None, N)])
@pytest.mark.parametrize("form", ["tensor", "dict", "pairs"])
def test_at_most_so_many_examples_are_kept_the_first_ones(form, most, count):
    data = examples(FORMS[form](), max_examples=most)
    assert len(data) == count
    kept = torch.cat([values(batch) for batch, _ in data.between(0, 1)])
    torch.testing.assert_close(kept, VECTORS[:count])


def test_batches_beyond_the_last_example_are_not_asked_for():
    def endless():
        yield from batches_of(VECTORS)[:2]
        raise AssertionError("asked for too much")

    assert len(examples(endless(), max_examples=6)) == 6


def test_dicts_are_split_by_example_without_labels():
    ((batch, which),) = list(examples([named()], max_examples=9).between(0, 1))
    assert "labels" not in batch and batch["flag"] is True
    assert torch.equal(batch["input_ids"], TOKENS[:9]) and list(which) == list(range(9))


def test_fewer_than_two_examples_are_refused():
    for data in (VECTORS[:1], [VECTORS[:1]], []):
        with pytest.raises(ValueError, match="at least 2 examples"):
            examples(data)
    with pytest.raises(ValueError, match="at least 2 examples"):
        examples(VECTORS, max_examples=1)


def test_what_yields_no_batches_is_refused():
    for data in (3, "abc", TensorDataset(VECTORS)):
        with pytest.raises(TypeError, match="data"):
            examples(data)
    with pytest.raises(ValueError, match="different numbers of examples"):
        examples({"a": VECTORS, "b": VECTORS[:3]})


def test_small_batches_hold_two_examples():
    assert torch.equal(examples(VECTORS).small_batch, VECTORS[:2])
    small = examples([named()]).small_batch
    assert torch.equal(small["input_ids"], TOKENS[:2]) and small["flag"] is True


def test_one_batch_of_each_other_shape():
    assert examples(VECTORS).other_batches == []
    long = torch.zeros(3, 4, 4)
    others = examples(
        [VECTORS, torch.ones(3, 9, 4), long, VECTORS, torch.ones(3, 9, 4)]
    ).other_batches
    assert sorted(tuple(batch.shape) for batch in others) == [(2, 4, 4), (2, 9, 4)]
    named = [{"ids": TOKENS[:, :n], "flag": 3} for n in (5, 3, 5)]
    (other,) = examples(named).other_batches
    assert torch.equal(other["ids"], TOKENS[:2, :3])


@pytest.mark.parametrize("kind", ["key", "auto", "tensor", "array", "function"])
def test_masks_follow_their_examples(kind):
    data = {"input_ids": TOKENS, "attention_mask": KEEP.long(), "mine": KEEP}
    mask = {
        "key": "mine",
        "auto": "auto",
        "tensor": KEEP,
        "array": KEEP.numpy(),
        "function": lambda batch: batch["mine"],
    }[kind]
    held = examples(data, mask=mask)
    seen = 0
    for number, (batch, which) in enumerate(held.between(0.3, 0.8)):
        pair = (torch.zeros(len(which), 5, 2), torch.zeros(len(which), 5, 3))
        assert torch.equal(held.masks.of("block", number, batch, which, pair), KEEP[which])
        seen += len(which)
    assert seen == round(0.8 * N) - round(0.3 * N)


class Net(nn.Module):
    """In-place ReLUs right behind the blocks, a dropout and a frozen part in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(4, 6)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)
        self.fail = False

    def forward(self, x):
        x = self.act(self.stem(x))
        x = self.act(self.body(x))
        if self.fail:
            raise RuntimeError("broken")
        return self.head(self.drop(x))


def recorded(model: nn.Module, first: str, last: str, batch: Any) -> tuple[Any, Any]:
    """By hooks that copy, and in eval mode."""
    found = {}
    handles = [
        model.get_submodule(first).register_forward_pre_hook(
            lambda _, args: found.__setitem__("input", args[0].clone())
        ),
        model.get_submodule(last).register_forward_hook(
            lambda _, args, output: found.__setitem__("output", output.clone())
        ),
    ]
    with torch.no_grad():
        model.eval()(batch)
    for handle in handles:
        handle.remove()
    return found["input"], found["output"]


def no_hooks(model: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


NAMES = ("stem", "body.0", "body", "head", "body:head")


def spans(model: nn.Module) -> list[Span]:
    single = [Span(name, name) for name in NAMES[:4]]
    return [*single, Span("body", "head", ("act", "drop"))]


def test_taps_give_what_independent_hooks_see_before_anything_changes_it_in_place():
    model = Net()
    # The last first: the order of the spans is not that of their calls.
    order = [4, 0, 2, 3, 1]
    pairs = BlockTaps(model, [spans(model)[k] for k in order]).run(VECTORS)
    for k, (given, made) in zip(order, pairs, strict=True):
        first, _, last = NAMES[k].partition(":")
        expected = recorded(model, first, last or first, VECTORS)
        torch.testing.assert_close(given, expected[0], rtol=0, atol=0)
        torch.testing.assert_close(made, expected[1], rtol=0, atol=0)
    assert (pairs[order.index(1)][1] < 0).any()  # the ReLU's output is not


def test_inputs_alone_where_the_outputs_are_gone():
    model = Net()
    expected = recorded(model, "head", "head", VECTORS)[0]
    broken = Span("head", "gone")
    ((given, made),) = BlockTaps(model, [broken], inputs_only=True).run(VECTORS)
    torch.testing.assert_close(given, expected, rtol=0, atol=0)
    assert made is given


def test_the_model_is_left_once_all_is_seen():
    model = Net()
    model.fail = True
    assert len(BlockTaps(model, spans(model)[:3]).run(VECTORS)) == 3
    with pytest.raises(RuntimeError, match="broken"):
        BlockTaps(model, spans(model)).run(VECTORS)


@pytest.mark.parametrize("fail", [False, True])
@pytest.mark.parametrize("inputs_only", [False, True])
def test_no_hook_and_no_flag_stays_behind(fail, inputs_only):
    model = Net().train()
    model.body.eval()
    model.fail = fail
    flags = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    taps = BlockTaps(model, spans(model), inputs_only=inputs_only)
    if fail:
        with pytest.raises(RuntimeError, match="broken"):
            taps.run(VECTORS)
    else:
        for given, made in taps.run(VECTORS):
            assert not given.requires_grad and not made.requires_grad
    assert no_hooks(model) and [module.training for module in model.modules()] == flags
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_errors_of_a_hook_leave_nothing_behind():
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)).train()
    taps = BlockTaps(model, [Span("0", "0"), Span("1", "1")])
    with pytest.raises(ValueError, match="one tensor"):
        taps.run(VECTORS)
    assert no_hooks(model) and model.training and model[0].training


def test_taps_are_float32_on_the_cpu_whatever_the_model_is():
    model = Net().double()
    ((given, made),) = BlockTaps(model, [Span("body", "body")]).run(VECTORS.double())
    assert given.dtype == made.dtype == torch.float32 and given.is_contiguous()
    expected = recorded(model, "body", "body", VECTORS.double())
    torch.testing.assert_close(made, expected[1].float())


def test_rows_of_images_are_those_of_unfold():
    layout = ConvLayout((3, 6, 6), (4, 3, 3), (3, 3), (2, 2), (1, 1))
    images, maps = torch.randn(5, 3, 6, 6), torch.randn(5, 4, 3, 3)
    patches = nn.functional.unfold(images, 3, stride=2, padding=1).transpose(1, 2).reshape(-1, 27)
    targets = maps.flatten(2).transpose(1, 2).reshape(-1, 4)
    X, Y = token_rows(layout, images, maps, None, 10**6, np.random.default_rng(0))
    np.testing.assert_array_equal(X, patches.numpy())
    np.testing.assert_array_equal(Y, targets.numpy())
    # A sample: rows of these with their own targets, none twice.
    X, Y = token_rows(layout, images, maps, None, 17, np.random.default_rng(0))
    places = [int((patches == torch.from_numpy(x)).all(1).nonzero()[0, 0]) for x in X]
    assert len(set(places)) == 17
    np.testing.assert_array_equal(Y, targets.numpy()[places])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("most", [7, 10**6])
def test_rows_of_tokens_are_those_that_the_mask_keeps(masked, most):
    layout = DenseLayout((4,), (2,), per_position=True)
    generator = torch.Generator().manual_seed(0)
    taken, given = (torch.randn(N, 5, d, generator=generator) for d in (4, 2))
    keep = KEEP if masked else torch.ones_like(KEEP)
    X, Y = token_rows(
        layout, taken, given, KEEP if masked else None, most, np.random.default_rng(0)
    )
    rows, targets = taken[keep].numpy(), given[keep].numpy()
    assert len(X) == len(Y) == min(most, len(rows))
    places = [int(np.flatnonzero((rows == x).all(1))[0]) for x in X]
    assert len(set(places)) == len(X)
    np.testing.assert_array_equal(Y, targets[places])
    if most > len(rows):
        assert places == list(range(len(rows)))


def test_rows_of_vectors_and_of_flattened_images():
    layout = infer_layout((3, 2, 2), (5,))
    images, outputs = torch.randn(6, 3, 2, 2), torch.randn(6, 5)
    X, Y = token_rows(layout, images, outputs, None, 99, np.random.default_rng(0))
    np.testing.assert_array_equal(X, images.flatten(1).numpy())
    np.testing.assert_array_equal(Y, outputs.numpy())


class Returns(nn.Module):
    def __init__(self, what) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.what = what

    def forward(self, x):
        return self.what(x * self.weight)


def test_a_models_output_is_the_first_floating_tensor_that_it_returns():
    x = VECTORS.double()
    for what in (
        lambda x: x,
        lambda x: (x, 2 * x),
        lambda x: {"ids": torch.arange(3), "logits": x, "hidden": 2 * x},
        lambda x: (None, [torch.arange(3), x]),
    ):
        output = model_output(Returns(what), x)
        assert output.dtype == torch.float32 and not output.requires_grad
        torch.testing.assert_close(output, VECTORS)
    for nothing in (lambda x: torch.arange(3), lambda x: None, lambda x: ("a", 3)):
        with pytest.raises(ValueError, match="no floating tensor"):
            model_output(Returns(nothing), x)


def test_spans_that_were_found_can_be_tapped(built_resnet):
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    span = find_span(built_resnet, "layer3:layer4", images)
    ((given, made),) = BlockTaps(built_resnet, [span]).run(images)
    expected = recorded(built_resnet, "layer3", "layer4", images)
    torch.testing.assert_close(given, expected[0], rtol=0, atol=0)
    torch.testing.assert_close(made, expected[1], rtol=0, atol=0)


def test_few_examples_of_each_batch_come_in_whole_batches():
    data = [torch.arange(start, start + 10.0)[:, None] for start in range(0, 200, 10)]
    examples = Examples(
        data,
        torch.nn.Linear(1, 1),
        batch_size=10,
        max_examples=None,
        mask=None,
        rng=np.random.default_rng(0),
    )
    pieces = [*examples.between(0, 0.2)]
    assert all(len(batch) <= 10 for batch, _ in pieces)
    # 40 examples, of which no 20 batches are made.
    assert len(pieces) <= 8
    for batch, numbers in pieces:
        np.testing.assert_array_equal(batch[:, 0].numpy(), numbers)


def test_batches_of_different_shapes_or_flags_are_not_put_together():
    data = [
        {"x": torch.zeros(4, 3), "flag": True},
        {"x": torch.zeros(4, 3), "flag": False},
        {"x": torch.zeros(4, 5), "flag": False},
        {"x": torch.ones(4, 5), "flag": False},
    ]
    examples = Examples(
        data,
        torch.nn.Linear(1, 1),
        batch_size=4,
        max_examples=None,
        mask=None,
        rng=np.random.default_rng(1),
    )
    for batch, numbers in examples.between(0, 0.5):
        flags = {data[number // 4]["flag"] for number in numbers}
        assert flags == {batch["flag"]}
        widths = {data[number // 4]["x"].shape[1] for number in numbers}
        assert widths == {batch["x"].shape[1]}
        values = [data[number // 4]["x"][number % 4, 0] for number in numbers]
        np.testing.assert_array_equal(batch["x"][:, 0], values)
