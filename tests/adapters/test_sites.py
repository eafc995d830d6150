"""find_sites: which layers a model runs, and which blocks and spans of them could be replaced."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

from cvxdistill.adapters import (  # noqa: E402
    ConvLayout,
    DenseLayout,
    Sites,
    find_sites,
    swap_block,
)

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
VECTORS = torch.randn(2, 6, generator=torch.Generator().manual_seed(2))


class Residual(nn.Module):
    """A shortcut around two convolutions; ReLUs are functions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block1, self.block2 = Residual(8), Residual(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x):
        x = self.block2(self.block1(F.relu(self.stem(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Tied(nn.Module):
    """One layer called twice, two that share a weight, and one that is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
        self.left, self.right, self.free = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.right.weight = self.left.weight

    def forward(self, x):
        x = torch.relu(self.twice(torch.relu(self.twice(x))))
        return self.right(torch.tanh(self.free(torch.tanh(self.left(self.block(x))))))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 32),
        nn.ReLU(),
        nn.Linear(32, 5),
    )


def intervals(sites: Sites) -> dict[str, tuple[int, int]]:
    return {site.name: (site.start, site.stop) for site in sites.sites}


def layers_called(model: nn.Module, batch: Any) -> list[str]:
    """Modules with parameters of their own, in the order of their calls."""
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in model.named_modules()
        if list(module.parameters(recurse=False))
    ]
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    for handle in handles:
        handle.remove()
    return called


def check(model: nn.Module, batch: Any) -> Sites:
    """What must be so for every model: contiguous intervals, and students that would fit."""
    found = find_sites(model, batch)
    assert list(found.layers) == layers_called(model.eval(), batch)
    names = dict(model.named_modules())
    assert list(found.sites) == sorted(found.sites, key=lambda s: (s.start, s.stop))
    assert len({site.name for site in found.sites}) == len(found.sites)
    for site in found.sites:
        assert site.name == str(site.span)
        inside = {id(m) for part in site.span.names for m in names[part].modules()}
        covered = [k for k, layer in enumerate(found.layers) if id(names[layer]) in inside]
        assert covered == list(range(site.start, site.stop)) and covered
        assert [id(m) for m in site.modules] == [id(names[part]) for part in site.span.names]
    return found


@pytest.fixture(scope="module")
def found_in_resnet(built_resnet):
    return check(built_resnet, IMAGES)


def test_layers_are_in_the_order_of_calls_and_shortcuts_lie_inside_their_block(found_in_resnet):
    found = found_in_resnet
    spans = intervals(found)
    layers = found.layers
    assert layers[:2] == ("conv1", "bn1") and layers[-1] == "fc"
    # The shortcut is called first, whatever the order of registration says.
    assert layers[10] == "layer2.0.downsample.0" and layers[12] == "layer2.0.conv1"
    assert spans["layer2.0"] == (10, 16) and spans["layer2"] == (10, 20)
    assert spans["layer2.0:fc"] == (10, len(layers)) and spans["fc"] == (40, 41)


def test_a_convolution_goes_with_its_batch_norm_and_keeps_its_own_patches(found_in_resnet):
    layouts = {site.name: site.layout for site in found_in_resnet.sites}
    assert layouts["conv1:bn1"] == ConvLayout((3, 32, 32), (4, 16, 16), (7, 7), (2, 2), (3, 3))
    name = "layer3.0.downsample.0:layer3.0.downsample.1"
    assert layouts[name] == ConvLayout((8, 4, 4), (16, 2, 2), (1, 1), (2, 2), (0, 0))
    name = "layer2.0.conv1:layer2.0.bn1"
    assert layouts[name] == ConvLayout((4, 8, 8), (8, 4, 4), (3, 3), (2, 2), (1, 1))
    assert not {"conv1", "layer2.0.conv1", "bn1"} & layouts.keys()
    # One position left: a kernel that sees all of the image, without padding.
    assert layouts["layer4"] == ConvLayout((16, 2, 2), (32, 1, 1), (2, 2), (2, 2), (0, 0))
    assert layouts["layer4.0:fc"] == DenseLayout((16, 2, 2), (10,))
    assert layouts["fc"] == DenseLayout((32,), (10,))


def test_no_span_crosses_a_shortcut_or_a_function_of_the_models_own():
    torch.manual_seed(0)
    spans = intervals(check(Functional(), SMALL))
    assert {"stem", "block1", "block2", "block1.conv1:block1.bn1"} <= spans.keys()
    # Pooling by a function: nothing may run from a block to the last layer.
    assert not any(name.endswith(":fc") for name in spans)
    assert "stem:block1" not in spans and "block1.conv1:block1.bn2" not in spans


def test_a_sequential_cnn_gives_its_layers_and_pairs_of_them():
    torch.manual_seed(0)
    found = check(cnn(), SMALL)
    assert found.layers == ("0", "2", "5", "7")
    assert intervals(found) == {
        "0": (0, 1), "0:2": (0, 2), "2": (1, 2), "2:5": (1, 3), "5": (2, 3), "5:7": (2, 4),
        "7": (3, 4),
    }  # fmt: skip
    layouts = {site.name: site.layout for site in found.sites}
    assert layouts["2"] == ConvLayout((8, 8, 8), (16, 4, 4), (3, 3), (2, 2), (1, 1))
    assert layouts["2:5"] == DenseLayout((8, 8, 8), (32,))
    assert layouts["5:7"] == DenseLayout((256,), (5,))


def test_an_mlp_gives_its_layers_and_pairs():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    )
    assert intervals(check(model, VECTORS)) == {
        "0": (0, 1), "0:2": (0, 2), "2": (1, 2), "2:4": (1, 3), "4": (2, 3)
    }  # fmt: skip


def tokens() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_bert_gives_its_layers_and_feed_forward_parts_token_by_token():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        vocab_size=50, max_position_embeddings=9,
    )  # fmt: skip
    torch.manual_seed(0)
    found = check(transformers.BertModel(config).eval(), tokens())
    layouts = {site.name: site.layout for site in found.sites}
    part = "encoder.layer.0.intermediate.dense:encoder.layer.0.output.dense"
    per_token = DenseLayout((8,), (8,), per_position=True)
    for name in (part, "encoder.layer.1", "encoder.layer.0:encoder.layer.1"):
        assert layouts[name] == per_token
    assert layouts["encoder.layer.0.output.dense"] == DenseLayout((32,), (8,), per_position=True)
    # Numbers of words are no features, and what is added to the residual stream is no chain.
    assert not any("embeddings" in name for name in layouts)
    assert not any("attention.output.LayerNorm:" in name for name in layouts)


def test_gpt2_and_a_head_that_shares_its_embedding():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=8, n_layer=2, n_head=2, vocab_size=50, n_positions=9, bos_token_id=0,
        eos_token_id=0, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    names = intervals(check(model, tokens()))
    assert {"transformer.h.0", "transformer.h.1.mlp", "transformer.h.0.attn.c_attn"} <= names.keys()
    assert "lm_head" not in names
    with pytest.raises(ValueError, match=r"shares parameters with 'transformer\.wte'"):
        find_sites(model, tokens(), ["lm_head"])
    layouts = {site.name: site.layout for site in find_sites(model, tokens()).sites}
    assert layouts["transformer.h.0.attn.c_attn"] == DenseLayout((8,), (24,), per_position=True)


def test_vit_gives_its_patch_projection_as_a_convolution():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=8, patch_size=4,
    )  # fmt: skip
    torch.manual_seed(0)
    found = check(transformers.ViTModel(config).eval(), {"pixel_values": SMALL})
    layouts = {site.name: site.layout for site in found.sites}
    name = "embeddings.patch_embeddings.projection"
    assert layouts[name] == ConvLayout((3, 8, 8), (8, 2, 2), (4, 4), (4, 4), (0, 0))
    assert layouts["layers.0.mlp"] == DenseLayout((8,), (8,), per_position=True)


def test_nothing_that_is_called_twice_or_tied_is_a_site():
    torch.manual_seed(0)
    model = Tied()
    found = check(model, VECTORS)
    assert found.layers[:2] == ("twice", "twice")
    names = intervals(found)
    assert names == {"block": (2, 3), "free": (4, 5)}
    with pytest.raises(ValueError, match="called 2 times"):
        find_sites(model, VECTORS, ["twice"])
    with pytest.raises(ValueError, match="'left' shares parameters with 'right'"):
        find_sites(model, VECTORS, ["left"])


def test_what_shares_parameters_only_with_itself_is_a_site():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Tied()
            self.head = nn.Linear(6, 2)

        def forward(self, x):
            return self.head(self.inner(x))

    torch.manual_seed(0)
    assert intervals(check(Both(), VECTORS))["inner"] == (0, 6)


def test_shares_of_the_parameters_below_the_minimum_are_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 2, 1, bias=False),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 64),
        nn.ReLU(),
        nn.Linear(64, 1, bias=False),
    )
    # 6 + 4, 8,256 and 64 parameters: below 0.2 % lies the convolution alone, with its batch norm.
    assert intervals(check(model, SMALL)) == {"4": (2, 3), "4:6": (2, 4), "6": (3, 4)}
    assert intervals(find_sites(model, SMALL, ["0", "0:1"])) == {"0": (0, 1), "0:1": (0, 2)}


def test_blocks_that_are_named_are_the_sites(resnet):
    names = ["layer3:layer4", "layer1.0.conv1", "layer2", "layer2"]
    found = find_sites(resnet, IMAGES, names)
    assert intervals(found) == {
        "layer1.0.conv1": (2, 3),
        "layer2": (10, 20),
        "layer3:layer4": (20, 40),
    }
    assert [site.name for site in found.sites] == ["layer1.0.conv1", "layer2", "layer3:layer4"]
    assert found.sites[2].layout == ConvLayout((8, 4, 4), (32, 1, 1), (4, 4), (4, 4), (0, 0))


def test_other_lengths_leave_what_works_token_by_token():
    torch.manual_seed(0)
    tokenwise = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    model = nn.Sequential(tokenwise, nn.AdaptiveAvgPool2d((1, None)), nn.Flatten(), nn.Linear(4, 3))
    short, long = (torch.randn(2, n, 6, generator=torch.Generator().manual_seed(n)) for n in (5, 9))
    names = intervals(find_sites(model, short))
    assert {"0", "0.0", "0.2:3", "3"} <= names.keys()
    kept = intervals(find_sites(model, short, others=[long]))
    assert kept == {name: names[name] for name in names if name != "0.2:3"}
    assert intervals(find_sites(model, short, ["0"], [long])) == {"0": (0, 2)}
    with pytest.raises(ValueError, match=r"'0:3' takes inputs of several shapes, such as \(9, 6\)"):
        find_sites(model, short, ["0:3"], [long])


def test_a_block_may_be_named_by_any_of_its_names():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model.register_module("again", None)
    owner = nn.Sequential(model[0], nn.ReLU(), model[2])

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = model, owner

        def forward(self, x):
            return self.second(x)

    assert intervals(find_sites(Two(), VECTORS, ["second.0"])) == {"second.0": (0, 1)}


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["layer5"], "no block named 'layer5'"),
        (["layer1:layer9"], "no block named 'layer9'"),
        (["avgpool"], "has no parameters"),
        (["layer2:layer1"], "runs before"),
        (["layer2.0.conv1:layer3"], "no block of consecutive modules"),
        ([""], "the model itself"),
        ([], "empty"),
        ("layer1", "must be 'auto' or a list"),
    ],
)
def test_blocks_that_cannot_be_replaced_are_refused(resnet, blocks, message):
    with pytest.raises(ValueError, match=message):
        find_sites(resnet, IMAGES, blocks)


class Loose(nn.Module):
    """Parameters, but in no block."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * self.weight


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.ReLU()), nn.Linear(6, 3), Loose(), nn.Sequential(nn.Bilinear(6, 6, 2))],
    ids=["no parameters", "one layer", "no blocks", "two inputs"],
)
def test_models_without_any_site_are_refused(model):
    if isinstance(model[0] if isinstance(model, nn.Sequential) else None, nn.Bilinear):
        model.forward = lambda x: model[0](x, x)
    with pytest.raises(ValueError, match="no block to replace"):
        find_sites(model, VECTORS)


def test_the_model_is_left_as_it_was_also_after_an_error(resnet):
    resnet.train()
    resnet.layer1.eval()
    flags = [module.training for module in resnet.modules()]
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    find_sites(resnet, IMAGES, ["layer3", "layer4:fc"])
    with pytest.raises(ValueError, match="before"):
        find_sites(resnet, IMAGES, ["layer2:layer1"])
    with pytest.raises(RuntimeError):
        find_sites(resnet, IMAGES[:, :2])
    assert [module.training for module in resnet.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in resnet.modules())
    after = resnet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_every_site_can_be_swapped_for_a_module_of_its_shapes(built_resnet, found_in_resnet):
    with torch.no_grad():
        for site in found_in_resnet.sites[::3]:
            student = Constant(site.layout.output_shape)
            swapped = swap_block(built_resnet, site.span, student)
            assert swapped(IMAGES).shape == (2, 10)
            assert sum(isinstance(m, Constant) for m in swapped.modules()) == 1


class Constant(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.new_ones(len(x), *self.shape)


def test_a_site_is_offered_wider_kernels_where_its_convolutions_see_so_far():
    sites = {site.name: site for site in find_sites(Functional(), SMALL).sites}
    wider = sites["block1"].wider()
    assert wider is not None and wider.key != sites["block1"].key
    layout = wider.layout
    assert isinstance(layout, ConvLayout)
    assert (layout.kernel_size, layout.padding) == ((5, 5), (2, 2))
    assert layout.output_shape == sites["block1"].layout.output_shape
    assert (wider.name, wider.start, wider.stop) == (
        sites["block1"].name, sites["block1"].start, sites["block1"].stop
    )  # fmt: skip
    # One convolution sees no further than its own kernel; a linear layer has none.
    assert sites["stem"].wider() is None and sites["fc"].wider() is None


@pytest.mark.parametrize(
    ("width", "size", "wider"), [(140, 8, True), (141, 8, False), (8, 3, False)]
)
def test_wider_kernels_have_limits(width, size, wider):
    net = nn.Sequential(Residual(width), nn.Flatten(), nn.Linear(width * size * size, 2))
    sites = find_sites(net, torch.randn(2, width, size, size), ["0"]).sites
    assert (sites[0].wider() is not None) == wider
