from __future__ import annotations

import gzip
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image")
import datasets  # noqa: E402

RNG = np.random.default_rng(0)
needs_data = pytest.mark.skipif(
    "CVXDISTILL_DATA" not in os.environ, reason="CVXDISTILL_DATA is not set: no real data"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CVXDISTILL_DATA", str(tmp_path))
    return tmp_path


def write_cifar10(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    np.hstack([labels[:, None].astype(np.uint8), planes]).tofile(path)


def idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    return header + array.tobytes()


@pytest.mark.parametrize("place", [".", "cifar-10-batches-bin"])
def test_cifar10_binary_files_are_read_in_order(folder: Path, place: str) -> None:
    images = RNG.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(10)
    for i in range(5):
        part = slice(2 * i, 2 * i + 2)
        write_cifar10(folder / place / f"data_batch_{i + 1}.bin", images[part], labels[part])
    write_cifar10(folder / place / "test_batch.bin", images[:3], labels[:3])
    read, found = datasets.load_cifar10("train")
    np.testing.assert_array_equal(read, images)
    np.testing.assert_array_equal(found, labels)
    read, found = datasets.load_cifar10("test", limit=2)
    np.testing.assert_array_equal(read, images[:2])
    np.testing.assert_array_equal(found, labels[:2])


def test_cifar10_with_a_part_missing_is_not_read(folder: Path) -> None:
    write_cifar10(
        folder / "data_batch_1.bin", np.zeros((1, 32, 32, 3), np.uint8), np.zeros(1, np.int64)
    )
    with pytest.raises(FileNotFoundError, match=r"looked for cifar10_train.npz, data_batch_1.bin"):
        datasets.load_cifar10("train")


def test_cifar10_jpegs_are_decoded(folder: Path) -> None:
    # One colour an image, which JPEG keeps nearly as it is.
    images = np.full((3, 32, 32, 3), [[[[200, 30, 90]]], [[[10, 220, 60]]], [[[0, 0, 255]]]])
    files = []
    for image in images.astype(np.uint8):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, format="JPEG")
        files.append(np.frombuffer(stream.getvalue(), np.uint8))
    np.savez(
        folder / "cifar10_test.npz",
        jpeg=np.concatenate(files),
        offset=np.cumsum([0, *map(len, files)]),
        label=np.array([3, 1, 2], np.uint8),
    )
    read, labels = datasets.load_cifar10("test", limit=2)
    assert read.dtype == np.uint8
    np.testing.assert_allclose(read, images[:2], atol=4)
    np.testing.assert_array_equal(labels, [3, 1])


def test_cifar10_as_a_folder_by_class_is_shuffled_once(folder: Path) -> None:
    pytest.importorskip("torch")
    for name in ("airplane", "truck"):
        (folder / "cifar10" / "test" / name).mkdir(parents=True)
        for i in range(8):
            grey = 20 * i + (10 if name == "truck" else 0)
            image = Image.new("RGB", (32, 32), (grey, grey, grey))
            image.save(folder / "cifar10" / "test" / name / f"{i}.png")
    images, labels = datasets.load_cifar10("test")
    np.testing.assert_array_equal(labels, (images[:, 0, 0, 0] % 20) // 10)
    assert np.bincount(labels).tolist() == [8, 8]
    assert len(set(labels[:6])) == 2
    np.testing.assert_array_equal(datasets.load_cifar10("test", limit=6)[0], images[:6])


def test_a_cifar10_file_of_another_kind_is_refused(folder: Path) -> None:
    (folder / "test_batch.bin").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match="100 bytes, which is no multiple of 3073"):
        datasets.load_cifar10("test")
    write_cifar10(folder / "test_batch.bin", np.zeros((1, 32, 32, 3), np.uint8), np.array([77]))
    with pytest.raises(ValueError, match="labels above 9"):
        datasets.load_cifar10("test")


@pytest.mark.parametrize("place", [".", "MNIST/raw"])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(("split", "prefix"), [("train", "train"), ("test", "t10k")])
def test_idx_files_are_read_zipped_or_not(
    folder: Path, place: str, zipped: bool, split: str, prefix: str
) -> None:
    images = RNG.integers(0, 256, (4, 28, 28), dtype=np.uint8)
    labels = np.array([3, 1, 4, 1], np.uint8)
    (folder / place).mkdir(parents=True, exist_ok=True)
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        content, ending = (gzip.compress(idx(array)), ".gz") if zipped else (idx(array), "")
        (folder / place / f"{prefix}-{name}-ubyte{ending}").write_bytes(content)
    read, found = datasets.load_mnist(split)
    np.testing.assert_array_equal(read, images)
    np.testing.assert_array_equal(found, labels)
    assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x00\x0d\x01" + bytes(4), "is not an IDX file of bytes"),
        (b"\x00\x00\x08\x03\x00", "ends within its header"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], r"holds 5 values; its header says"),
    ],
)
def test_a_damaged_idx_file_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "t10k-images-idx3-ubyte").write_bytes(content)
    (folder / "t10k-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        datasets.load_mnist("test")


def test_errors_say_what_was_looked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"test_batch.bin.*cifar10/test/<class>/"):
        datasets.load_cifar10("test")
    with pytest.raises(FileNotFoundError, match=r"t10k-images-idx3-ubyte\[.gz\]"):
        datasets.load_mnist("test")
    with pytest.raises(FileNotFoundError, match=r"looked for uci/wine.npz"):
        datasets.load_uci("wine")
    with pytest.raises(ValueError, match=r"one of abalone, .*got 'iris'"):
        datasets.load_uci("iris")
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'valid'"):
        datasets.load_cifar10("valid")
    monkeypatch.setenv("CVXDISTILL_DATA", str(folder / "absent"))
    with pytest.raises(FileNotFoundError, match="which is not a folder"):
        datasets.load_uci("wine")
    monkeypatch.delenv("CVXDISTILL_DATA")
    with pytest.raises(FileNotFoundError, match="CVXDISTILL_DATA is not set"):
        datasets.load_mnist("test")


def test_normalise_is_its_formula_channel_by_channel() -> None:
    images = RNG.integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
    mean, std = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.4])
    found = datasets.normalise(images, tuple(mean), tuple(std))
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        found, ((images / 255 - mean) / std).transpose(0, 3, 1, 2), atol=1e-5
    )


@needs_data
@pytest.mark.parametrize("name", datasets.UCI_TABLES)
def test_every_uci_table_is_standardised(name: str) -> None:
    X, y = datasets.load_uci(name)
    assert X.dtype == np.float32
    assert len(X) == len(y) > 100
    assert np.isfinite(X).all()
    assert float(np.abs(X.mean(axis=0, dtype=np.float64)).max()) < 1e-4


@needs_data
def test_real_images_have_their_published_shapes() -> None:
    images, labels = datasets.load_cifar10("test", limit=20)
    assert images.shape == (20, 32, 32, 3)
    assert 0 <= labels.min() <= labels.max() <= 9
    images, labels = datasets.load_mnist("test")
    assert images.shape == (10_000, 28, 28)
    assert np.bincount(labels).tolist()[:3] == [980, 1135, 1032]
