"""Layers of few weights: what they store, and that it comes back."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from cvxdistill.adapters.sparse_layer import (  # noqa: E402
    SparseConv2d,
    SparseLinear,
    keep_places,
    packed,
    unpacked,
    words_for,
)


def layer(kind="convolution", share=0.2, seed=0):
    torch.manual_seed(seed)
    made = SparseLinear(24, 10) if kind == "linear" else SparseConv2d(6, 10, 3, padding=1)
    made.reset_places()
    places = np.random.default_rng(seed).random((made.weight[0].numel(), 10)) < share
    keep_places(made, places)
    return made, places


@settings(max_examples=60)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_places_are_bits(shape, seed):
    places = torch.from_numpy(np.random.default_rng(seed).random(shape) < 0.3)
    words = packed(places)
    assert words.dtype == torch.int32 and words.shape == (words_for(places.numel()),)
    # The first place is the lowest bit of the first number.
    first = sum(int(bit) << k for k, bit in enumerate(places.flatten()[:32].tolist()))
    assert int(words[0]) % 2**32 == first
    assert torch.equal(unpacked(words, places.shape), places)
    assert unpacked(words[:-1], places.shape) is None
    assert unpacked(words.long(), places.shape) is None


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_few_numbers_are_stored_and_come_back(kind):
    made, places = layer(kind)
    state = made.state_dict()
    assert set(state) == {"values", "places", "bias"}
    assert state["values"].numel() == places.sum()
    assert state["places"].numel() == -(-places.size // 32)
    other, _ = layer(kind, share=1.0, seed=1)
    other.load_state_dict(state)
    assert torch.equal(other.weight, made.weight) and torch.equal(other.places, made.places)
    x = torch.randn(3, *((24,) if kind == "linear" else (6, 5, 5)))
    plain = nn.functional.linear if kind == "linear" else nn.functional.conv2d
    options = {} if kind == "linear" else {"padding": 1}
    assert torch.equal(other(x), plain(x, made.weight, made.bias, **options))


def test_a_place_may_hold_a_zero():
    made, places = layer()
    made.weight.zero_()
    other, _ = layer(seed=1)
    other.load_state_dict(made.state_dict())
    assert int(other.places.sum()) == places.sum() and not other.weight.any()


@pytest.mark.parametrize("name", ["values", "places"])
def test_what_does_not_fit_is_refused(name):
    made, _ = layer()
    state = made.state_dict()
    with pytest.raises(RuntimeError, match=r"values: .* do not fit the places"):
        layer()[0].load_state_dict(state | {name: state[name][:-1]})
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        layer()[0].load_state_dict({k: v for k, v in state.items() if k != name})
    found = layer()[0].load_state_dict({"bias": state["bias"], "more": state["bias"]}, strict=False)
    assert sorted(found.missing_keys) == ["places", "values"]
    assert found.unexpected_keys == ["more"]


def test_inside_a_model_copied_and_in_half_precision():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), layer()[0])
    other = copy.deepcopy(model)
    other[1].weight.mul_(2)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model[1].weight, other[1].weight)
    half = copy.deepcopy(model).half()
    assert half.state_dict()["1.values"].dtype == torch.float16
    assert half[1].places.dtype == torch.bool
    model.load_state_dict(half.state_dict())
    assert model[1].weight.dtype == torch.float32
    torch.testing.assert_close(model[1].weight, half[1].weight.float())


def test_training_leaves_the_zeros():
    made, _ = layer()
    before = made.weight.clone()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1, weight_decay=0.1)
    made(torch.randn(2, 6, 5, 5)).square().sum().backward()
    optimizer.step()
    assert torch.equal(made.weight, before)
    assert made.weight.grad is None and made.bias.grad is not None
