from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
Image = pytest.importorskip("PIL.Image")
from cvxdistill.adapters.data_loading import load_images_or_array  # noqa: E402

RNG = np.random.default_rng(0)


def write_image(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (4, 3)) -> None:
    """An image of one colour; size is (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_npy_is_read_as_float32_without_labels(tmp_path: Path) -> None:
    X = RNG.standard_normal((5, 3))
    np.save(tmp_path / "x.npy", X)
    inputs, labels = load_images_or_array(tmp_path / "x.npy")
    assert inputs.dtype == np.float32
    np.testing.assert_array_equal(inputs, X.astype(np.float32))
    assert labels is None


@pytest.mark.parametrize("label", ["y", "label", "labels", "targets"])
@pytest.mark.parametrize("key", ["X", "x", "images", "features"])
def test_npz_inputs_and_labels_are_found_by_name(tmp_path: Path, key: str, label: str) -> None:
    X, y = RNG.standard_normal((4, 2)), np.arange(4)
    np.savez(tmp_path / "d.npz", **{label: y, key: X})
    inputs, labels = load_images_or_array(tmp_path / "d.npz")
    np.testing.assert_allclose(inputs, X, rtol=1e-6)
    np.testing.assert_array_equal(labels, y)


def test_key_chooses_among_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", a=np.zeros((2, 2)), b=np.ones((2, 2)))
    assert load_images_or_array(tmp_path / "d.npz", key="b").inputs.min() == 1
    with pytest.raises(ValueError, match=r"it has \['a', 'b'\]. Choose one with key"):
        load_images_or_array(tmp_path / "d.npz")
    with pytest.raises(ValueError, match="has no array 'c'"):
        load_images_or_array(tmp_path / "d.npz", key="c")


def test_bytes_are_scaled_moved_to_channels_first_and_normalised(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (2, 5, 6, 3), dtype=np.uint8)
    np.save(tmp_path / "x.npy", images)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    inputs, _ = load_images_or_array(tmp_path / "x.npy", mean=mean, std=std)
    expected = ((images / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(inputs, expected, atol=1e-6)


def test_a_limit_is_spread_over_sorted_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", X=np.arange(100.0)[:, None], y=np.arange(100) // 10)
    inputs, labels = load_images_or_array(tmp_path / "d.npz", limit=10)
    assert labels is not None
    np.testing.assert_array_equal(labels, np.arange(10))
    np.testing.assert_array_equal(inputs[:, 0], 10 * np.arange(10))


def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    write_image(tmp_path / "dog" / "1.png", (0, 255, 0))
    write_image(tmp_path / "cat" / "2.png", (255, 0, 0))
    write_image(tmp_path / "cat" / "1.PNG", (0, 0, 255))
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    inputs, labels = load_images_or_array(tmp_path)
    assert inputs.shape == (3, 3, 3, 4)
    assert labels is not None
    np.testing.assert_array_equal(labels, [0, 0, 1])
    np.testing.assert_array_equal(inputs[:, :, 0, 0], [[0, 0, 1], [1, 0, 0], [0, 1, 0]])


def test_a_flat_folder_has_no_labels_and_size_makes_its_images_agree(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", (255, 255, 255), (4, 3))
    write_image(tmp_path / "b.png", (255, 255, 255), (8, 9))
    with pytest.raises(ValueError, match=r"a.png has \(3, 4\) and b.png has \(9, 8\); give size"):
        load_images_or_array(tmp_path)
    inputs, labels = load_images_or_array(tmp_path, size=6)
    assert inputs.shape == (2, 3, 6, 6)
    assert inputs.min() == 1
    assert labels is None
    assert load_images_or_array(tmp_path, size=(2, 5)).inputs.shape == (2, 3, 2, 5)


def test_a_folder_both_flat_and_by_class_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", (0, 0, 0))
    write_image(tmp_path / "cat" / "b.png", (0, 0, 0))
    with pytest.raises(ValueError, match="either flat or one folder a class"):
        load_images_or_array(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        load_images_or_array(tmp_path)


def test_an_image_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"a.png cannot be read as an image"):
        load_images_or_array(tmp_path)


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    objects = np.array([{"a": 1}, None], dtype=object)
    np.save(tmp_path / "x.npy", objects, allow_pickle=True)
    np.savez(tmp_path / "x.npz", X=objects, allow_pickle=True)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(ValueError, match="pickled objects"):
            load_images_or_array(tmp_path / name)


@pytest.mark.parametrize("ending", ["npy", "npz"])
@pytest.mark.parametrize("content", [b"", b"not an array", b"PK\x03\x04broken"])
def test_a_damaged_file_is_refused(tmp_path: Path, ending: str, content: bytes) -> None:
    file = tmp_path / f"x.{ending}"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"data: .*x\."):
        load_images_or_array(file)


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        (np.array([["a"]]), TypeError, "must hold real numbers, got dtype <U1"),
        (np.ones((2, 2), complex), TypeError, "real numbers, got dtype complex"),
        (np.array([[1.0, np.nan]]), ValueError, "NaN or infinity"),
        (np.array([[1.0, np.inf]]), ValueError, "NaN or infinity"),
        (np.ones(3), ValueError, r"got shape \(3,\)"),
        (np.ones((0, 3)), ValueError, r"got shape \(0, 3\)"),
    ],
)
def test_arrays_that_are_no_inputs_are_refused(
    tmp_path: Path, array: np.ndarray, error: type[Exception], message: str
) -> None:
    np.savez(tmp_path / "x.npz", array)
    np.save(tmp_path / "x.npy", array)
    for name in ("x.npy", "x.npz"):
        with pytest.raises(error, match=message):
            load_images_or_array(tmp_path / name)


def test_labels_of_another_length_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", X=np.ones((3, 2)), y=np.arange(4))
    with pytest.raises(ValueError, match=r"3 inputs but labels of shape \(4,\)"):
        load_images_or_array(tmp_path / "d.npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit": 0}, "limit must be at least 1"),
        ({"size": 8}, "size applies to a folder of images"),
        ({"key": "X"}, "key names an array of a .npz file"),
        ({"mean": (0.1, 0.2)}, "mean must be 1 finite number or 3"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
    ],
)
def test_arguments_that_do_not_fit_the_data_are_refused(
    tmp_path: Path, arguments: dict[str, object], message: str
) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 3, 4, 4)))
    with pytest.raises(ValueError, match=message):
        load_images_or_array(tmp_path / "x.npy", **arguments)


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2")
    with pytest.raises(ValueError, match=r"must be a .npy file, a .npz file or a folder"):
        load_images_or_array(tmp_path / "x.csv")
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load_images_or_array(tmp_path / "absent.npy")
