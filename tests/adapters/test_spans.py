from __future__ import annotations

import copy
from collections import OrderedDict

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

from cvxdistill.adapters import (  # noqa: E402
    Span,
    capture,
    check_swappable,
    find_span,
    get_block,
    measure_blocks,
    swap_block,
)

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
X = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Layers a, b, c of width 5, used as ``forward`` says; ``act`` is registered last."""

    def __init__(self, forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(5, 5) for _ in range(3))
        self.inner = nn.Sequential(OrderedDict(first=nn.Linear(5, 5), second=nn.Linear(5, 5)))
        self.act = nn.ReLU(inplace=True)
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    return all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_span_of_stages_is_recorded_from_the_first_input_to_the_last_output(resnet):
    before, modules = state(resnet), dict(resnet.named_modules())
    recorded = capture(resnet, "layer3:layer4", IMAGES, batch_size=3, verbose=0)
    assert recorded.span == Span("layer3", "layer4") and str(recorded.span) == "layer3:layer4"
    single = (
        capture(resnet, "layer3", IMAGES, verbose=0),
        capture(resnet, "layer4", IMAGES, verbose=0),
    )
    np.testing.assert_allclose(recorded.inputs, single[0].inputs, atol=1e-6)
    np.testing.assert_allclose(recorded.outputs, single[1].outputs, atol=1e-5)
    assert same(resnet, before) and dict(resnet.named_modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in resnet.modules())


@pytest.mark.parametrize(
    ("name", "between"),
    [
        ("layer3:layer4", ()),
        ("layer2:layer4", ("layer3",)),
        ("layer2.1:layer4", ("layer3",)),
        ("layer3:layer4.0", ()),
        ("layer4:fc", ("avgpool",)),
        ("conv1:layer1", ("bn1", "relu", "maxpool")),
        ("layer4.1:avgpool", ()),
    ],
)
def test_the_student_takes_the_first_place_and_the_rest_become_identities(resnet, name, between):
    resnet.eval()
    span = find_span(resnet, name, IMAGES)
    assert span.between == between
    recorded = capture(resnet, name, IMAGES, verbose=0)

    class Table(nn.Module):
        """What the span gave, looked up."""

        def forward(self, x):
            torch.testing.assert_close(x, torch.from_numpy(recorded.inputs))
            return torch.from_numpy(recorded.outputs)

    swapped = swap_block(resnet, span, Table())
    first, *rest = span.names
    assert isinstance(get_block(swapped, first), Table)
    for known in rest:
        assert not list(get_block(swapped, known).parameters())
        assert not list(get_block(swapped, known).children())
    with torch.no_grad():
        torch.testing.assert_close(swapped(IMAGES), resnet(IMAGES))


def test_a_span_is_swapped_by_its_name_alone_where_the_tree_tells_what_lies_between(resnet):
    resnet.eval()
    new = nn.Conv2d(8, 32, 3, 4, 1)
    before = state(resnet)
    swapped = swap_block(resnet, "layer2.1:layer4", new)
    assert same(resnet, before) and isinstance(resnet.layer3, nn.Sequential)
    expected = nn.Sequential(
        resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool, resnet.layer1, resnet.layer2[0],
        new, resnet.avgpool, nn.Flatten(), resnet.fc,
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(swapped(IMAGES), expected(IMAGES))
    names = ("layer2.1", "layer3", "layer4")
    gone = sum(p.numel() for name in names for p in get_block(resnet, name).parameters())
    assert sum(p.numel() for p in get_block(resnet, "layer2.1:layer4").parameters()) == gone
    left = sum(p.numel() for p in swapped.parameters())
    own = sum(p.numel() for p in new.parameters())
    assert left == sum(p.numel() for p in resnet.parameters()) - gone + own


def test_the_new_block_takes_flag_and_dtype_of_the_first_and_inplace_changes_the_model():
    model = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3), nn.Linear(3, 2)).double()
    new = nn.Linear(5, 3)
    assert swap_block(model, "0:2", new, inplace=True) is model
    assert model[0] is new and new.weight.dtype == torch.float64
    torch.testing.assert_close(model(X.double()), model[3](new(X.double())))


def test_what_is_registered_elsewhere_but_runs_between_is_found():
    model = Net(lambda m, x: m.c(m.b(m.act(m.a(x)))))
    span = find_span(model, "a:b", X)
    assert span == Span("a", "b", ("act",))
    new = nn.Linear(5, 5)
    with torch.no_grad():
        torch.testing.assert_close(swap_block(model, span, new)(X), model.c(new(X)))


def test_a_name_alone_is_refused_where_the_tree_does_not_tell():
    model = Net(lambda m, x: m.c(m.b(m.act(m.a(x)))))
    with pytest.raises(ValueError, match=r"'act' may run between 'a' and 'b'.*find_span\(model, "):
        swap_block(model, "a:b", nn.Identity())
    backwards = Net(lambda m, x: m.a(m.b(x)))
    with pytest.raises(ValueError, match=r"'a' is registered before 'b'.*find_span"):
        swap_block(backwards, "b:a", nn.Identity())
    assert find_span(backwards, "b:a", X) == Span("b", "a")


def test_a_module_that_runs_twice_between_is_one_identity():
    def forward(m, x):
        return m.c(m.act(m.b(m.act(m.a(x)))))

    assert find_span(Net(forward), "a:c", X).between == ("act", "b")


def test_a_skip_connection_around_the_whole_span_stays():
    model = Net(lambda m, x: x + m.c(m.b(m.a(x))))
    new = nn.Linear(5, 5)
    swapped = swap_block(model, find_span(model, "a:c", X), new)
    with torch.no_grad():
        torch.testing.assert_close(swapped(X), X + new(X))


def skip_out_of_the_span(m, x):
    x = m.a(x)
    return x + m.b(x)


def skip_to_after_the_span(m, x):
    x = m.a(x)
    return m.c(m.b(x)) + x


def activation_in_place(m, x):
    x = m.a(x)
    x.relu_()
    return m.b(x)


def also_elsewhere(m, x):
    return m.c(m.act(m.b(m.act(m.a(x)))))


REFUSED = {
    "skip out": (skip_out_of_the_span, "a:b", "no block of consecutive.*'a' gives is used else"),
    "skip far": (skip_to_after_the_span, "a:c", "'a' or 'b' gives is used elsewhere.*skip"),
    "activation": (lambda m, x: m.b(F.relu(m.a(x))), "a:b", "'b' takes is not what 'a' gives"),
    "relu of relu": (
        lambda m, x: m.act(m.b(F.relu(m.a(x)))), "a:act", "'b' takes is not what 'a' gives",
    ),
    "in place": (activation_in_place, "a:b", "'b' takes is not what 'a' gives"),
    "scaled": (lambda m, x: m.c(2 * m.b(m.a(x))), "a:c", "'c' takes is not what 'b' gives"),
    "reversed": (lambda m, x: m.b(m.a(x)), "b:a", "'a' runs before 'b': write 'a:b'"),
    "twice": (lambda m, x: m.b(m.a(m.a(x))), "a:b", "'a' of the span 'a:b' is called 2 times"),
    "last twice": (lambda m, x: m.b(m.b(m.a(x))), "a:b", "'b' of the span .* is called 2 times"),
    "not called": (lambda m, x: m.b(x), "a:b", "'a' of the span 'a:b' is called not at all"),
    "between, elsewhere": (also_elsewhere, "a:b", "'act' runs inside the span 'a:b' and elsewh"),
    "not consecutive": (lambda m, x: m.a(x) * m.b(x), "a:b", "'b' takes is not what 'a' gives"),
    "inside": (lambda m, x: m.inner(x), "inner:inner.second", "'inner' contains 'inner.second'"),
    "outside": (lambda m, x: m.inner(x), "inner.first:inner", "'inner' contains 'inner.first'"),
    "unknown": (lambda m, x: m.a(x), "a:bb", "no block named 'bb'"),
    "three": (lambda m, x: m.a(x), "a:b:c", "'first:last', with the names of two blocks"),
    "half": (lambda m, x: m.a(x), "a:", "'first:last', with the names of two blocks"),
    "model": (lambda m, x: m.a(x), ":a", "'first:last', with the names of two blocks"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED.keys())
def test_modules_that_do_not_run_one_after_the_other_are_refused(case):
    forward, name, message = case
    model = Net(forward)
    before, modules = state(model), dict(model.named_modules())
    for attempt in (find_span, lambda m, n, x: capture(m, n, x, verbose=0)):
        with pytest.raises(ValueError, match=message):
            attempt(model, name, X)
    assert same(model, before) and dict(model.named_modules()) == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(module.training for module in model.modules())


def test_a_pooling_of_the_models_own_is_refused(resnet):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer4, self.fc = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(self.layer4(x).mean(dim=(2, 3)))

    with pytest.raises(ValueError, match=r"the model fails with .*'fc' takes is not what 'layer4'"):
        find_span(Functional(), "layer4:fc", IMAGES)


def test_a_span_of_one_block_is_that_block(resnet):
    assert find_span(resnet, "layer4:layer4", IMAGES) == find_span(resnet, "layer4", IMAGES)
    assert isinstance(swap_block(resnet, "layer4:layer4", nn.Identity()).layer4, nn.Identity)


def test_parts_that_their_owner_reads_directly_are_refused_in_spans_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2))
    with pytest.raises(ValueError, match=r"'1\.layers\.0' cannot be swapped"):
        check_swappable(model, "0:1.layers.0")


class Attention(nn.Module):
    """Returns a tuple, as attention layers do, and takes a mask and flags."""

    def __init__(self, extra=None):
        super().__init__()
        self.linear, self.extra = nn.Linear(5, 5), extra

    def forward(self, hidden, mask=None, *, position_embeddings=None, use_cache=False):
        out = self.linear(hidden)
        return out, (out.softmax(-1) if self.extra == "weights" else self.extra)


class Block(nn.Module):
    def __init__(self, extra=None):
        super().__init__()
        self.attention, self.dense = Attention(extra), nn.Linear(5, 5)

    def forward(self, x):
        cosine = (x.cos(), x.sin())
        mask = torch.zeros(len(x), 1, 5)
        out, _ = self.attention(x, mask, position_embeddings=cosine, use_cache=False)
        return self.dense(out)


def test_a_block_with_a_tuple_masks_and_flags_is_replaced_and_keeps_its_tuple():
    model = Block()
    recorded = capture(model, "attention", X, verbose=0)
    np.testing.assert_array_equal(recorded.inputs, X.numpy())
    new = Attention().linear

    class Student(nn.Module):
        def forward(self, hidden, *_, **__):
            return new(hidden)

    for span in (recorded.span, find_span(model, "attention", X)):
        swapped = swap_block(model, span, Student())
        with torch.no_grad():
            assert swapped.attention(X)[1] is None
            torch.testing.assert_close(swapped(X), model.dense(new(X)))
    # A student in the place of a student answers as it did.
    again = swap_block(swapped, "attention", Student())
    with torch.no_grad():
        torch.testing.assert_close(again(X), model.dense(new(X)))


def test_a_span_may_begin_and_end_with_tuples():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Attention(), Attention(extra=0.5)

        def forward(self, x):
            x, _ = self.one(x)
            x, half = self.two(x)
            return half * x

    model = Model()
    span = find_span(model, "one:two", X)
    swapped = swap_block(model, span, nn.Linear(5, 5))
    assert swapped(X).shape == (6, 5) and swapped.two(X) == (X, 0.5)


def test_attention_weights_beside_the_output_are_refused_with_advice():
    message = r"must be one tensor, got tuple of \(Tensor, Tensor\).*output_attentions=False"
    with pytest.raises(ValueError, match=f"output of block 'attention' {message}"):
        capture(Block("weights"), "attention", X, verbose=0)
    with pytest.raises(ValueError, match=f"'attention', in the span.* {message}"):
        find_span(Block("weights"), "attention:dense", X)


def test_the_table_of_blocks_shows_shapes_beside_masks_and_in_tuples():
    table = {info.name: info for info in measure_blocks(Block(), X)}
    assert table["attention"].input_shape == table["attention"].output_shape == (5,)


def test_a_span_in_a_model_that_keeps_nothing_of_it_copies_nothing_of_it(resnet):
    swapped = swap_block(resnet, "layer3:layer4", nn.Conv2d(8, 32, 3, 4, 1))
    theirs = {p.data_ptr() for p in resnet.parameters()}
    assert not theirs & {p.data_ptr() for p in swapped.parameters()}
    assert not any(name.startswith("layer4") for name, _ in swapped.named_parameters())
    assert copy.deepcopy(swapped)(IMAGES).shape == (4, 10)
