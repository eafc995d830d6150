from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from cvxdistill.adapters.block_table import block_table, measure_blocks  # noqa: E402


def by_name(model, example):
    return {info.name: info for info in measure_blocks(model, example)}


def test_every_called_block_is_listed_in_tree_order(resnet):
    table = block_table(resnet, torch.zeros(2, 3, 32, 32))
    names = [info.name for info in table]
    called = [name for name, _ in resnet.named_modules() if name]
    assert names == called
    layer4 = next(info for info in table if info.name == "layer4")
    assert (layer4.type, layer4.input_shape, layer4.output_shape, layer4.calls) == (
        "Sequential", (16, 2, 2), (32, 1, 1), 1,
    )  # fmt: skip
    assert layer4.parameters == sum(p.numel() for p in resnet.layer4.parameters())
    total = sum(p.numel() for p in resnet.parameters())
    assert layer4.share == pytest.approx(layer4.parameters / total)
    relu = next(info for info in table if info.name == "layer1.0.relu")
    assert relu.calls == 2 and relu.parameters == 0


@pytest.mark.parametrize("batch", [1, 5])
def test_multiply_adds_are_half_the_operations_that_torch_counts(resnet, batch):
    from torch.utils.flop_counter import FlopCounterMode

    images = torch.zeros(batch, 3, 32, 32)
    resnet.eval()
    counter = FlopCounterMode(display=False, depth=None)
    with torch.no_grad(), counter:
        resnet(images)
    counts = {
        module.removeprefix("ResNet."): sum(operations.values())
        for module, operations in counter.get_flop_counts().items()
    }
    table = by_name(resnet, images)
    for name in ("conv1", "layer1", "layer3.0", "layer4.0.downsample.0", "fc"):
        assert table[name].multiply_adds == counts[name] // (2 * batch)
    assert table[""].multiply_adds == counter.get_total_flops() // (2 * batch)


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Linear(5, 7), (4, 3, 5), 3 * 5 * 7),
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 8 * 6 * 4 * 3),
        (nn.Conv2d(4, 6, (3, 2), groups=2), (2, 4, 8, 8), 6 * 7 * 6 * 2 * 6),
        (nn.ConvTranspose2d(4, 6, 2, 2), (2, 4, 3, 3), 9 * 4 * 6 * 4),
        (nn.Conv3d(1, 2, 2), (1, 1, 3, 3, 3), 8 * 2 * 8),
        (nn.ReLU(), (4, 5), 0),
    ],
)
def test_layers_are_counted_by_their_formulas(layer, shape, expected):
    assert by_name(nn.Sequential(layer), torch.zeros(shape))["0"].multiply_adds == expected


def test_attention_embedding_and_bilinear_layers_are_counted():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(11, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.bilinear = nn.Bilinear(8, 8, 3)

        def forward(self, tokens):
            x = self.embedding(tokens)
            x, _ = self.attention(x, key=x, value=x)
            return self.bilinear(x, x)

    table = by_name(Model(), torch.zeros((4, 5), dtype=torch.int64))
    assert table["embedding"].multiply_adds == 0
    assert table["embedding"].input_shape == (5,) and table["embedding"].output_shape == (5, 8)
    assert table["attention"].multiply_adds == 4 * 5 * 64 + 2 * 5 * 5 * 8
    assert table["attention"].output_shape is None
    assert table["bilinear"].multiply_adds == 5 * 3 * 8 * 9
    assert table["bilinear"].input_shape is None


def test_shared_blocks_count_their_parameters_once_and_every_call():
    shared = nn.Linear(4, 4)
    table = by_name(nn.Sequential(shared, shared, nn.Linear(4, 2)), torch.zeros(3, 4))
    assert table["0"].calls == 2 and table["0"].multiply_adds == 32
    assert table["0"].parameters == 20 and table["0"].share == 20 / 30
    assert table[""].multiply_adds == 40 and "1" not in table


def test_blocks_that_are_not_called_are_left_out():
    model = nn.Sequential(nn.Linear(2, 2))
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[0](x)
    assert [info.name for info in block_table(model, torch.zeros(1, 2))] == ["0"]


@pytest.mark.parametrize(
    "example",
    [
        torch.zeros(2, 5),
        np.zeros((2, 5)),
        (torch.zeros(2, 5), torch.zeros(2)),
        {"input": np.zeros((2, 5))},
    ],
    ids=["tensor", "array", "pair", "dict"],
)
def test_every_form_of_example_is_taken(example):
    assert by_name(nn.Sequential(nn.Linear(5, 3)), example)["0"].input_shape == (5,)


def test_the_model_is_left_as_it_was(resnet):
    resnet.train()
    resnet.layer3.eval()
    flags = [module.training for module in resnet.modules()]
    state = {name: value.clone() for name, value in resnet.state_dict().items()}
    block_table(resnet, torch.randn(2, 3, 32, 32))
    with pytest.raises(RuntimeError):
        block_table(resnet, torch.randn(2, 1, 32, 32))
    assert flags == [module.training for module in resnet.modules()]
    assert all(torch.equal(state[name], value) for name, value in resnet.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in resnet.modules())


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        ("model", torch.zeros(1, 2), TypeError, "model must be a torch.nn.Module, got str"),
        (nn.Linear(2, 2), 3, TypeError, "must be a tensor.*got int"),
        (nn.Linear(2, 2), torch.zeros(0, 2), ValueError, r"at least one example, got shape \(0, 2"),
        (nn.Linear(2, 2), torch.tensor(0.0), ValueError, r"at least one example, got shape \(\)"),
        (nn.Linear(2, 2), {"labels": torch.zeros(2)}, ValueError, "got no tensor"),
    ],
)
def test_bad_input_is_refused(model, example, error, message):
    with pytest.raises(error, match=message):
        block_table(model, example)
