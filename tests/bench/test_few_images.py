"""The benchmark with few images, small: what makes its pairs, its ridge, and one draw of images."""

from __future__ import annotations

import os

import numpy as np
import pytest

torch = pytest.importorskip("torch")
needs_data = pytest.mark.skipif(
    not os.environ.get("CVXDISTILL_DATA"), reason="CVXDISTILL_DATA is not set"
)


def test_moved_images_are_windows_of_the_reflected_image_or_of_its_mirror():
    import augmentation

    image = np.arange(2 * 5 * 6, dtype=np.float32).reshape(2, 5, 6)
    moved = augmentation.flip_and_shift(
        torch.from_numpy(np.tile(image, (400, 1, 1, 1))), np.random.default_rng(0), most=2
    )
    windows = {}
    for mirrored in (False, True):
        padded = np.pad(
            image[:, :, ::-1] if mirrored else image, ((0, 0), (2, 2), (2, 2)), "reflect"
        )
        for top in range(5):
            for left in range(5):
                window = padded[:, top : top + 5, left : left + 6]
                windows[window.tobytes()] = (mirrored, top, left)
    found = {windows[one.tobytes()] for one in moved.numpy()}
    # 400 draws out of 50 leave one out with probability 0.02.
    assert len(windows) == 50 and len(found) >= 48


def test_mixed_inputs_take_whole_channels_from_two_inputs_of_the_block():
    import augmentation

    rng = np.random.default_rng(0)
    inputs = rng.random((7, 3, 2, 2), dtype=np.float32)
    mixed = augmentation.mix_and_jitter(inputs, rng, 50, noise=0)
    origin = (mixed[:, None] == inputs).all(axis=(3, 4))
    assert origin.any(axis=1).all()
    sources = [len(set(np.argmax(one, axis=0))) for one in origin]
    assert set(sources) == {1, 2}


def test_jitter_has_the_deviation_of_each_feature_and_never_undershoots():
    import augmentation

    rng = np.random.default_rng(0)
    # One feature varies ten times as much as the other, far above the least value, 0.
    inputs = np.zeros((2000, 1, 3), np.float32)
    inputs[:, 0, 1:] = rng.normal([200, 200], [1, 10], (2000, 2))
    jittered = augmentation.mix_and_jitter(inputs, rng, 4000, noise=2)
    np.testing.assert_allclose(jittered[:, 0, 1:].std(axis=0), np.sqrt(5) * np.array([1, 10]), 0.05)
    assert (augmentation.mix_and_jitter(inputs - 200, rng, 100) >= (inputs - 200).min()).all()


def test_ridge_from_sums_of_two_sets_is_that_of_scikit_learn():
    import few_images
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    first, second = (
        few_images.Pairs(
            rng.standard_normal((n, 2, 2, 2)).astype(np.float32) + n / 30,
            rng.standard_normal((n, 3, 1, 1)).astype(np.float32) - n / 30,
        )
        for n in (30, 60)
    )
    statistics = few_images.sums(first) + few_images.sums(second)
    student = few_images.ridge_student(statistics, 0.1, first)
    # Both sets weigh the same, however many rows they have.
    both = first + second
    X, Y = (array.reshape(len(array), -1) for array in both)
    weights = np.repeat([1 / 30, 1 / 60], [30, 60]) / 2
    centered = X - weights @ X
    variance = float(weights @ (centered**2).mean(axis=1))
    expected = Ridge(0.1 * variance).fit(X, Y, sample_weight=weights).predict(X)
    with torch.no_grad():
        got = student(torch.from_numpy(both.inputs)).numpy().reshape(expected.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_a_gated_student_of_all_units_is_a_ridge_on_inputs_and_units(monkeypatch):
    import few_images
    from sklearn.linear_model import Ridge

    monkeypatch.setattr(few_images, "UNITS", (6,))
    rng = np.random.default_rng(0)
    pairs = few_images.Pairs(
        rng.standard_normal((80, 2, 2, 2)).astype(np.float32),
        rng.standard_normal((80, 3, 1, 1)).astype(np.float32),
    )
    G = rng.standard_normal((9, 6)).astype(np.float32)
    student = few_images.gated_student([pairs], 0.1, G)
    X, Y = (array.reshape(80, -1) for array in pairs)
    H = np.maximum(X @ G[:-1] + G[-1], 0)
    features = np.hstack([X, H * np.sqrt(X.var(axis=0).mean() / H.var(axis=0).mean())])
    ridge = Ridge(0.1 * 80 * features.var(axis=0).mean())
    expected = ridge.fit(features, Y).predict(features)
    with torch.no_grad():
        got = student(torch.from_numpy(pairs.inputs)).numpy().reshape(expected.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_a_gated_student_keeps_the_units_that_the_block_has(monkeypatch):
    import few_images

    monkeypatch.setattr(few_images, "UNITS", (8, 3))
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((2000, 2, 2, 2)).astype(np.float32)
    X, G = inputs.reshape(2000, 8), rng.standard_normal((9, 20)).astype(np.float32)
    outputs = np.maximum(X @ G[:-1] + G[-1], 0)[:, [2, 11, 17]][:, :, None, None]
    student = few_images.gated_student([few_images.Pairs(inputs, outputs)], 1e-6, G)
    pairs = few_images.Pairs(inputs, outputs)
    assert few_images.activation_error(student, pairs) < 1e-3
    assert student.n_gates == 3


def test_the_first_layer_written_out_gives_the_blocks_first_activations():
    import few_images
    import teachers

    torch.manual_seed(0)
    model = teachers.resnet18().eval()
    block = torch.nn.Sequential(model.layer3, model.layer4).eval()
    batch_norm = model.layer3[0].bn1
    batch_norm.running_mean.normal_()
    batch_norm.bias.data.normal_()
    inputs = torch.randn(5, 128, 4, 4)
    G = few_images.first_layer(block, (128, 4, 4))
    got = np.maximum(np.hstack([inputs.reshape(5, -1), np.ones((5, 1), np.float32)]) @ G, 0)
    with torch.no_grad():
        expected = torch.relu(batch_norm(model.layer3[0].conv1(inputs))).flatten(1)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@needs_data
def test_the_blocks_own_answers_help_sixty_images(monkeypatch):
    import few_images
    from datasets import load_cifar10, normalise
    from teachers import load_teacher

    from cvxdistill.adapters import capture

    for name, value in {
        "PAIRS": 2000,
        "STRENGTHS": (0.3, 3.0),
        "STEPS": 50,
        "CHECK_EVERY": 50,
    }.items():
        monkeypatch.setattr(few_images, name, value)
    teacher = load_teacher("resnet18")
    photos, _ = load_cifar10("test", 660)
    images = torch.from_numpy(normalise(photos, teacher.mean, teacher.std))
    with capture(teacher.model, few_images.BLOCK, images[60:], verbose=0) as captured:
        unseen = few_images.Pairs(np.array(captured.inputs), np.array(captured.outputs))
    errors = {}
    for name, student, _, _ in few_images.students(teacher.model, images[:60], seed=0):
        errors[name] = few_images.activation_error(student, unseen)
        assert few_images._parameters(student) <= few_images.BUDGET
    assert list(errors) == [
        "ridge",
        "ridge, moved",
        "ridge, answers",
        "gated, answers",
        "Adam",
        "Adam, answers",
    ]
    assert errors["gated, answers"] < 0.97 * errors["ridge, answers"]
    assert errors["ridge, answers"] < 0.95 * errors["ridge"]
    assert errors["ridge, moved"] < 0.98 * errors["ridge"]
