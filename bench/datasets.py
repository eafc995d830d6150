"""The data sets of the benchmarks, from the folder that the variable CVXDISTILL_DATA names.

Each loader looks for the compact ``.npz`` form first, then for the published one: CIFAR-10's binary
files or a folder of images by class, and MNIST's IDX files.
"""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

UCI_TABLES = (
    "abalone",
    "adult",
    "banknote",
    "breast-cancer",
    "credit-g",
    "glass",
    "ionosphere",
    "phoneme",
    "segment-challenge",
    "sonar",
    "supermarket",
    "vote",
    "wine",
    "winequality-red",
)
SPLITS = ("train", "test")
CIFAR10_RECORD = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes


def data_folder() -> Path:
    """Return the folder that CVXDISTILL_DATA names; raise FileNotFoundError if there is none."""
    name = os.environ.get("CVXDISTILL_DATA")
    if not name:
        raise FileNotFoundError(
            "the environment variable CVXDISTILL_DATA is not set; it must name the folder that "
            "holds the data sets."
        )
    if not Path(name).is_dir():
        raise FileNotFoundError(f"CVXDISTILL_DATA names {name}, which is not a folder.")
    return Path(name)


def load_cifar10(split: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 (n, 32, 32, 3), and labels, int64 (n,): the first ``limit`` of them.

    Raises
    ------
    ValueError
        If ``split`` is neither "train" nor "test", or a file is not what its name says.
    FileNotFoundError
        If none of the forms is there; the message lists what was looked for.
    """
    _check_split(split)
    folder = data_folder()
    compact = folder / f"cifar10_{split}.npz"
    if compact.is_file():
        with np.load(compact, allow_pickle=False) as file:
            labels = file["label"][:limit].astype(np.int64)
            return _decode(file["jpeg"], file["offset"], len(labels)), labels
    parts = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    for place in (folder, folder / "cifar-10-batches-bin"):
        # All of them: a training set with a part missing would go unnoticed.
        if all((place / part).is_file() for part in parts):
            return _read_cifar10_binary([place / part for part in parts], limit)
    by_class = folder / "cifar10" / split
    if by_class.is_dir():
        return load_image_folder(by_class, limit)
    raise _nothing_found(
        "CIFAR-10",
        folder,
        [compact.name, *parts, f"cifar-10-batches-bin/{parts[0]}", f"cifar10/{split}/<class>/"],
    )


def load_image_folder(
    folder: str | os.PathLike[str], limit: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 (n, height, width, 3), and labels from one folder a class, shuffled.

    The order is always the same. Raises ValueError if the images do not lie in folders by class or
    differ in size.
    """
    from cvxdistill.adapters.data_loading import read_image_folder

    images, labels = read_image_folder(folder)
    if labels is None:
        raise ValueError(f"{folder} must hold one folder of images for each class.")
    # As published by class: without this the first images would all be airplanes.
    order = np.random.default_rng(0).permutation(len(images))[:limit]
    return images[order], labels[order]


def load_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images, uint8 (n, 28, 28), and labels, int64 (n,); the ``.npz`` is sorted by class.

    Raises as ``load_cifar10`` does.
    """
    _check_split(split)
    folder = data_folder()
    compact = folder / f"mnist_{split}.npz"
    if compact.is_file():
        with np.load(compact, allow_pickle=False) as file:
            return file["X"], file["y"].astype(np.int64)
    prefix = "train" if split == "train" else "t10k"
    names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    for place in (folder, folder / "MNIST" / "raw"):
        for ending in ("", ".gz"):
            files = [place / (name + ending) for name in names]
            if all(file.is_file() for file in files):
                images, labels = (_read_idx(file) for file in files)
                if len(images) != len(labels):
                    raise ValueError(
                        f"{files[0]} has {len(images)} images, {files[1]} {len(labels)} labels."
                    )
                return images, labels.astype(np.int64)
    looked_for = [compact.name, *(f"{name}[.gz]" for name in names), f"MNIST/raw/{names[0]}[.gz]"]
    raise _nothing_found("MNIST", folder, looked_for)


def load_uci(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return X, float32 (n, d), standardised, and y: classes, int16, or numbers, float32.

    Raises
    ------
    ValueError
        If ``name`` is not one of UCI_TABLES.
    FileNotFoundError
        If the table is not there.
    """
    if name not in UCI_TABLES:
        raise ValueError(f"name must be one of {', '.join(UCI_TABLES)}; got {name!r}.")
    folder = data_folder()
    path = folder / "uci" / f"{name}.npz"
    if not path.is_file():
        raise _nothing_found(f"the UCI table {name}", folder, [f"uci/{name}.npz"])
    with np.load(path, allow_pickle=False) as file:
        return file["X"], file["y"]


def normalise(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Return (images / 255 - mean) / std, float32 (n, 3, h, w), from uint8 (n, h, w, 3)."""
    scale = 1 / (255 * np.asarray(std, dtype=np.float32))
    shift = np.asarray(mean, dtype=np.float32) / np.asarray(std, dtype=np.float32)
    planes = np.ascontiguousarray(np.moveaxis(images, 3, 1))
    return planes * scale[:, None, None] - shift[:, None, None]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")


def _nothing_found(what: str, folder: Path, names: list[str]) -> FileNotFoundError:
    return FileNotFoundError(f"{what} is not in {folder}; looked for {', '.join(names)}.")


def _decode(jpeg: np.ndarray, offset: np.ndarray, n: int) -> np.ndarray:
    images = np.empty((n, 32, 32, 3), dtype=np.uint8)
    for i in range(n):
        with Image.open(io.BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes())) as image:
            images[i] = np.asarray(image.convert("RGB"))
    return images


def _read_cifar10_binary(files: list[Path], limit: int | None) -> tuple[np.ndarray, np.ndarray]:
    parts = []
    for file in files:
        content = np.fromfile(file, dtype=np.uint8)
        if not content.size or content.size % CIFAR10_RECORD:
            raise ValueError(
                f"{file} has {content.size} bytes, which is no multiple of {CIFAR10_RECORD}, one "
                "CIFAR-10 record."
            )
        parts.append(content.reshape(-1, CIFAR10_RECORD))
    records = np.concatenate(parts)[:limit]
    if records[:, 0].max() > 9:
        raise ValueError(f"{files[0].parent} holds labels above 9: these are not CIFAR-10 records.")
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0].astype(np.int64)


def _read_idx(file: Path) -> np.ndarray:
    """Return a uint8 array in IDX form: 0, 0, 8, ndim, the sizes as big-endian int32, the data."""
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rb") as stream:
        content = stream.read()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{file} is not an IDX file of bytes: it starts with {content[:4]!r}.")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ValueError(f"{file} ends within its header.")
    shape = tuple(np.frombuffer(content[4:start], dtype=">i4"))
    values = np.frombuffer(content[start:], dtype=np.uint8)
    if values.size != np.prod(shape, dtype=np.int64):
        raise ValueError(f"{file} holds {values.size} values; its header says {shape}.")
    return values.reshape(shape).copy()
