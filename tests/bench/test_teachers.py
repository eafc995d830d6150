from __future__ import annotations

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import datasets  # noqa: E402
import teachers  # noqa: E402

needs_data = pytest.mark.skipif(
    "CVXDISTILL_DATA" not in os.environ, reason="CVXDISTILL_DATA is not set: no real data"
)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_resnet20_has_its_published_size_and_names() -> None:
    model = teachers.resnet20()
    assert count(model) == 269_722
    assert [name for name, _ in model.named_children()] == [
        "conv1", "bn1", "layer1", "layer2", "layer3", "linear",
    ]  # fmt: skip
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_resnet18_has_torchvisions_size_and_the_papers_shapes() -> None:
    model = teachers.resnet18(num_classes=1000).eval()
    assert count(model) == 11_689_512
    blocks = [count(block) for block in (model.layer1, model.layer2, model.layer3, model.layer4)]
    assert blocks == [147_968, 525_568, 2_099_712, 8_393_728]
    shapes = {}
    for name in ("layer1", "layer4"):
        model.get_submodule(name).register_forward_hook(
            lambda _, inputs, output, name=name: shapes.update(
                {name: (tuple(inputs[0].shape[1:]), tuple(output.shape[1:]))}
            )
        )
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    assert shapes == {
        "layer1": ((64, 8, 8), (64, 8, 8)),
        "layer4": ((256, 2, 2), (512, 1, 1)),
    }


def test_the_padded_shortcut_takes_every_second_pixel_and_pads_both_sides() -> None:
    x = torch.arange(2 * 4 * 4.0).reshape(1, 2, 4, 4)
    out = teachers.PaddedShortcut(4)(x)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()


def test_accuracy_counts_every_batch() -> None:
    labels = np.array([0, 1, 2, 0, 1])
    images = np.eye(3, dtype=np.float32)[[0, 1, 2, 1, 1]].reshape(5, 3, 1, 1)
    assert teachers.accuracy(torch.nn.Flatten(), images, labels, batch_size=2) == 0.8


def test_an_unknown_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match="must be 'resnet20' or 'resnet18', got 'vgg'"):
        teachers.load_teacher("vgg")


@needs_data
@pytest.mark.parametrize(("name", "least"), [("resnet20", 0.76), ("resnet18", 0.81)])
def test_a_teacher_recognises_real_images(name: str, least: float) -> None:
    images, labels = datasets.load_cifar10("test", limit=200)
    model, mean, std = teachers.load_teacher(name)
    assert not model.training
    # Three standard errors below the accuracy on all images; wrong weights give 10 %.
    assert teachers.accuracy(model, datasets.normalise(images, mean, std), labels) > least - 0.03
