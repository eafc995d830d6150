from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from cvxdistill.adapters.capture import capture  # noqa: E402
from cvxdistill.adapters.layout import DenseLayout, infer_layout  # noqa: E402
from cvxdistill.adapters.module_tree import get_block  # noqa: E402
from cvxdistill.adapters.teacher_gates import teacher_gates  # noqa: E402


def trained_norm(norm):
    torch.manual_seed(3)
    norm.running_mean.normal_(0, 0.5)
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def random_inputs(*shape, dtype=np.float32):
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def layout_of(block, inputs, **options):
    with torch.no_grad():
        output = block.eval()(torch.from_numpy(inputs).clone())
    return infer_layout(inputs.shape[1:], tuple(output.shape[1:]), **options)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("layer1", "0"),
        ("layer2", "0"),
        ("layer3", "0"),
        ("layer4", "0"),
        ("layer2.0", ""),
        ("layer1.1", ""),
    ],
)
@pytest.mark.parametrize("size", [32, 50])
def test_gates_are_the_signs_of_the_first_normalised_pre_activation(resnet, name, first, size):
    recorded = capture(resnet, name, random_inputs(3, 3, size, size), verbose=0)
    block = get_block(resnet, name).train()
    stage = get_block(block, first)
    layout = infer_layout(recorded.inputs.shape[1:], recorded.outputs.shape[1:])
    G = teacher_gates(block, recorded.inputs, layout)
    assert block.training and stage.bn1.training
    resnet.eval()
    with torch.no_grad():
        pre = stage.bn1(stage.conv1(torch.from_numpy(recorded.inputs))).numpy()
    X = layout.rows(recorded.inputs)[:]
    expected = np.moveaxis(pre, 1, -1).reshape(-1, pre.shape[1])
    assert G.shape == (layout.n_features, pre.shape[1]) and G.dtype == np.float32
    np.testing.assert_allclose(X @ G, expected, atol=1e-4)
    clear = np.abs(expected) > 1e-4
    assert clear.mean() > 0.99
    np.testing.assert_array_equal((X @ G >= 0)[clear], (expected >= 0)[clear])


@pytest.mark.parametrize("size", [1, 2])
def test_taps_that_only_ever_see_padding_may_fall_outside(size):
    inputs = random_inputs(2, 3, size, size)
    block = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 4, 3, 1, 1))
    layout = layout_of(block, inputs)
    assert layout.kernel_size == (size, size) and layout.padding == (0, 0)
    G = teacher_gates(block, inputs, layout)
    with torch.no_grad():
        expected = block[0](torch.from_numpy(inputs)).numpy()[:, :, 0, 0]
    np.testing.assert_allclose(layout.rows(inputs)[:] @ G, expected, atol=1e-5)


@pytest.mark.parametrize(("kernel", "padding"), [(5, None), ((5, 3), None), (7, 3)])
def test_a_larger_student_kernel_holds_the_first_filters_in_its_middle(kernel, padding):
    inputs = random_inputs(2, 3, 8, 8)
    block = nn.Sequential(nn.Conv2d(3, 6, 3, padding="same", bias=False))
    layout = layout_of(block, inputs, kernel_size=kernel, padding=padding)
    G = teacher_gates(block, inputs, layout)
    with torch.no_grad():
        expected = layout.targets(block(torch.from_numpy(inputs)).numpy().astype(np.float32))
    np.testing.assert_allclose(layout.rows(inputs)[:] @ G, expected, atol=1e-5)


def test_a_block_that_is_a_layer_itself_is_its_own_first_layer():
    inputs = random_inputs(2, 3, 8, 8)
    block = nn.Conv2d(3, 6, 3, 2, 1)
    layout = layout_of(block, inputs)
    G = teacher_gates(block, inputs, layout)
    np.testing.assert_allclose(G[-1], block.bias.detach().numpy())


def test_a_first_linear_layer_gives_dense_gates():
    norm = trained_norm(nn.BatchNorm1d(7))
    block = nn.Sequential(nn.Linear(5, 7), norm, nn.ReLU(), nn.Linear(7, 2))
    inputs = random_inputs(20, 5)
    layout = layout_of(block, inputs)
    with torch.no_grad():
        expected = norm(block[0](torch.from_numpy(inputs))).numpy()
    np.testing.assert_allclose(
        layout.rows(inputs)[:] @ teacher_gates(block, inputs, layout), expected, atol=1e-5
    )


def test_tokens_and_flattened_inputs_have_gates_too():
    tokens = random_inputs(3, 6, 5)
    block = nn.Sequential(nn.Linear(5, 9), nn.GELU(), nn.Linear(9, 4))
    G = teacher_gates(block, tokens, layout_of(block, tokens))
    np.testing.assert_allclose(G[:-1], block[0].weight.detach().numpy().T)

    images = random_inputs(3, 2, 4, 4)
    block = nn.Sequential(nn.Flatten(), nn.Linear(32, 9, bias=False), nn.ReLU(), nn.Linear(9, 4))
    G = teacher_gates(block, images, layout_of(block, images))
    np.testing.assert_allclose(G[:-1], block[1].weight.detach().numpy().T)
    assert not G[-1].any()


def test_the_dtype_follows_the_inputs_and_the_block_keeps_its_own():
    block = nn.Sequential(nn.Linear(5, 7)).half()
    inputs = random_inputs(4, 5, dtype=np.float64)
    layout = infer_layout((5,), (7,))
    assert teacher_gates(block, inputs, layout).dtype == np.float64
    assert block[0].weight.dtype == torch.float16


def test_a_batch_norm_behind_an_activation_in_place_is_not_folded():
    norm = trained_norm(nn.BatchNorm2d(6))
    block = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), norm)
    inputs = random_inputs(2, 3, 8, 8)
    G = teacher_gates(block, inputs, layout_of(block, inputs))
    np.testing.assert_allclose(G[-1], block[0].bias.detach().numpy())


def test_an_input_changed_in_place_is_no_longer_the_input():
    block = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 6, 3, padding=1))
    inputs = random_inputs(2, 3, 8, 8)
    before = inputs.copy()
    layout = layout_of(block, inputs)
    with pytest.raises(ValueError, match="no first layer"):
        teacher_gates(block, inputs, layout)
    np.testing.assert_array_equal(inputs, before)


def test_hooks_and_statistics_are_restored_also_when_the_block_fails():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            self.norm(x)
            raise RuntimeError("broken")

    block = Fails()
    with pytest.raises(ValueError, match=r"no first layer.*RuntimeError: broken"):
        teacher_gates(block, random_inputs(4, 5), infer_layout((5,), (5,)))
    assert block.training and block.norm.num_batches_tracked == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in block.modules())


def conv_block(*args, **options):
    return nn.Sequential(nn.Conv2d(*args, **options))


@pytest.mark.parametrize(
    ("block", "options", "message"),
    [
        (conv_block(3, 6, 5, padding=2), {}, r"kernel of \(5, 5\).*kernel_size=5 would hold it"),
        (
            conv_block(3, 6, 3, padding=1), {"kernel_size": 1},
            r"beyond the student's patches of \(1, 1\).*kernel_size=3 would hold it",
        ),
        (conv_block(3, 6, 3, padding=2, dilation=2), {}, 'no first layer.*Use gates="gaussian"'),
        (conv_block(3, 6, 3, padding=1, groups=3), {}, "no Conv2d that is called"),
        (conv_block(3, 6, 3, padding=1, padding_mode="reflect"), {}, "no first layer"),
        (
            nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Upsample(scale_factor=2)), {},
            "a stride that divides theirs",
        ),
        (nn.Sequential(nn.ReLU(), nn.Conv2d(3, 6, 3, 1, 1)), {}, "no first layer"),
        (
            nn.Sequential(
                nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6, track_running_stats=False)
            ), {}, "keeps no running statistics",
        ),
        (nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(192, 4)), {}, "no Linear that is called"),
    ],
)  # fmt: skip
def test_blocks_without_a_usable_first_layer_are_refused(block, options, message):
    inputs = random_inputs(2, 3, 8, 8)
    layout = layout_of(block, inputs, **options)
    with pytest.raises(ValueError, match=message):
        teacher_gates(block, inputs, layout)


def test_inputs_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"inputs must have shape \('n', 5\).*got \(4, 3\)"):
        teacher_gates(nn.Linear(5, 5), random_inputs(4, 3), infer_layout((5,), (5,)))


class Conv1D(nn.Module):
    """As in transformers: a linear layer with its weights (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(
            *x.shape[:-1], self.nf
        )


def test_gates_of_a_transposed_linear_layer_for_tokens_in_rows():
    block = nn.Sequential(Conv1D(6, 4), nn.GELU(), Conv1D(4, 6))
    layout = DenseLayout((4,), (4,), per_position=True)
    inputs = random_inputs(9, 4)
    G = teacher_gates(block, inputs, layout)
    np.testing.assert_allclose(G[:-1], block[0].weight.detach().numpy())
    np.testing.assert_allclose(G[-1], block[0].bias.detach().numpy())


def test_a_span_needs_to_run_only_as_far_as_its_first_layer():
    block = nn.Sequential(nn.Dropout(), nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.Linear(6, 2))
    inputs = random_inputs(2, 3, 8, 8)
    layout = infer_layout((3, 8, 8), (6, 8, 8))
    G = teacher_gates(block, inputs, layout)
    np.testing.assert_allclose(G[-1], block[1].bias.detach().numpy())


@pytest.mark.parametrize("options", [{}, {"kernel_size": 5}, {"kernel_size": 7}])
def test_the_first_layer_of_a_span_may_step_in_smaller_strides(resnet, options):
    recorded = capture(resnet, "layer3:layer4", random_inputs(3, 3, 128, 128), verbose=0)
    layout = recorded.layout(**options)
    assert layout.stride == (4, 4) and layout.output_shape[1:] == (4, 4)
    G = teacher_gates(get_block(resnet, "layer3:layer4"), recorded.inputs, layout)
    stage = resnet.eval().layer3[0]
    with torch.no_grad():
        pre = stage.bn1(stage.conv1(torch.from_numpy(recorded.inputs))).numpy()
    found = layout.rows(recorded.inputs)[:] @ G
    # Every second position of the layer, from the one nearest to the middle of a patch on.
    errors = []
    for start in (0, 1):
        every = pre[:, :, start::2, start::2]
        errors.append(np.abs(found - np.moveaxis(every, 1, -1).reshape(-1, G.shape[1])).max())
    assert min(errors) < 1e-4 < max(errors)


def test_a_layer_before_a_pooling_gives_gates():
    block = nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
    inputs = random_inputs(2, 3, 8, 8)
    layout = layout_of(block, inputs, kernel_size=4)
    G = teacher_gates(block, inputs, layout)
    with torch.no_grad():
        pre = block[0](torch.from_numpy(inputs)).numpy()
    found = (layout.rows(inputs)[:] @ G).reshape(2, 4, 4, 6)
    # Patches of 4 x 4 begin at pixel -1; the kernel at its first position sees their first 3 x 3.
    np.testing.assert_allclose(found, np.moveaxis(pre[:, :, ::2, ::2], 1, -1), atol=1e-5)


def test_a_block_that_needs_more_than_its_input_has_no_gates():
    class Needs(nn.Module):
        def forward(self, x, position_embeddings):
            return x

    with pytest.raises(ValueError, match="with its input alone it fails with TypeError"):
        teacher_gates(Needs(), random_inputs(2, 4), infer_layout((4,), (4,)))
