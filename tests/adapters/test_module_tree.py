from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from cvxdistill.adapters.module_tree import get_block, swap_block  # noqa: E402


class Tree(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.heads = nn.ModuleDict({"main": nn.Linear(4, 2), "other": nn.Linear(4, 3)})

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.heads["main"](x)


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["stem.1.0", "stem.0", "blocks.1", "heads.main", "stem"])
def test_a_block_anywhere_in_the_tree_is_found_and_swapped(name):
    model = Tree()
    block = get_block(model, name)
    before = snapshot(model)
    new = nn.Sequential(nn.Identity())
    swapped = swap_block(model, name, new)
    assert isinstance(get_block(swapped, name), nn.Sequential)
    assert isinstance(get_block(swapped, f"{name}.0"), nn.Identity)
    assert get_block(model, name) is block
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert swapped is not model


def test_the_swapped_model_computes_with_the_new_block():
    model = Tree()
    new = nn.Linear(4, 4)
    swapped = swap_block(model, "blocks.0", new)
    x = torch.randn(5, 4)
    expected = model.heads["main"](model.blocks[1](new(model.stem(x))))
    torch.testing.assert_close(swapped(x), expected)


def test_a_copy_shares_no_tensor_with_the_original_or_the_new_block():
    model, new = Tree(), nn.Linear(4, 4)
    swapped = swap_block(model, "stem.0", new)
    theirs = {p.data_ptr() for p in (*model.parameters(), *new.parameters())}
    assert not theirs & {p.data_ptr() for p in swapped.parameters()}


def test_inplace_changes_the_model_itself_and_holds_the_module_itself():
    model, new = Tree(), nn.Linear(4, 4)
    assert swap_block(model, "heads.other", new, inplace=True) is model
    assert model.heads["other"] is new


def test_the_new_block_takes_training_flag_dtype_and_device_of_the_old_one():
    model = Tree().double()
    model.train()
    model.stem.eval()
    new = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    new.register_buffer("index", torch.arange(3))
    swapped = swap_block(model, "stem.0", new)
    block = get_block(swapped, "stem.0")
    assert not block.training and not block[1].training and swapped.training
    assert block[0].weight.dtype == torch.float64
    assert block.index.dtype == torch.int64
    assert new.training and new[0].weight.dtype == torch.float32

    meta = swap_block(Tree().to("meta"), "stem.0", nn.Linear(4, 4))
    assert get_block(meta, "stem.0").weight.device.type == "meta"


def test_a_block_without_tensors_gives_the_models_dtype():
    swapped = swap_block(Tree().double(), "stem.1.1", nn.Linear(4, 4))
    assert get_block(swapped, "stem.1.1").weight.dtype == torch.float64


def test_a_block_under_several_names_is_replaced_under_all_of_them():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Sequential(shared))
    new = nn.Linear(4, 4)
    swapped = swap_block(model, "2", new)
    assert swapped[0] is swapped[2] is swapped[3][0]
    x = torch.randn(3, 4)
    torch.testing.assert_close(swapped(x), new(new(new(x).relu())))
    assert model[0] is shared
    assert sum(p.numel() for p in swapped.parameters()) == 20
    assert get_block(model, "3.0") is shared


def test_a_parent_under_several_names_holds_the_new_block_under_all_of_them():
    parent = nn.Sequential(nn.Linear(4, 4))
    swapped = swap_block(nn.ModuleDict({"a": parent, "b": parent}), "b.0", nn.Identity())
    assert swapped["a"] is swapped["b"]
    assert isinstance(swapped["a"][0], nn.Identity)


def test_a_real_network_swaps_its_last_stage(resnet):
    swapped = swap_block(resnet, "layer4.1.conv1", nn.Conv2d(32, 32, 1))
    assert swapped.layer4[1].conv1.kernel_size == (1, 1)
    assert resnet.layer4[1].conv1.kernel_size == (3, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: get_block(m, "blocks.7"), ValueError, r"no block named 'blocks.7'.*'blocks.0'"),
        (lambda m: get_block(m, "main"), ValueError, r"Did you mean 'heads.main'\?"),
        (lambda m: get_block(m, "zzz"), ValueError, r"named_modules\(\)\] lists all"),
        (lambda m: get_block(m, 3), TypeError, r"block must be a dotted name.*got 3"),
        (lambda m: get_block("resnet", "a"), TypeError, r"torch.nn.Module, got str"),
        (lambda m: swap_block(m, "", nn.Identity()), ValueError, "model itself cannot be swapped"),
        (lambda m: swap_block(m, "stem", None), TypeError, "module must be .* got NoneType"),
        (lambda m: swap_block({}, "stem", nn.Identity()), TypeError, "model must be .* got dict"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    model = Tree()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        call(model)
    assert list(before) == list(model.state_dict())


def test_parts_that_their_owner_reads_directly_are_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2))
    with pytest.raises(ValueError, match=r"'0.layers.1' is a torch.nn.TransformerEncoderLayer"):
        swap_block(model, "0.layers.1.linear1", nn.Linear(8, 16))
    with pytest.raises(ValueError, match=r"'0' is a torch.nn.TransformerEncoder, which reads"):
        swap_block(model, "0.layers.0", nn.Identity())

    class Same(nn.Module):
        def forward(self, x, **masks):
            return x

    swapped = swap_block(model, "0.layers.1", Same()).eval()
    with torch.no_grad():
        assert swapped(torch.zeros(2, 3, 8)).shape == (2, 3, 8)
