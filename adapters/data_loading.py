"""Inputs for a model from a file or folder: ``.npy``, ``.npz``, or images, with labels if any.

Serves the command line. Nothing is unpickled.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

INPUT_KEYS = ("X", "x", "images", "inputs", "data")
LABEL_KEYS = ("y", "label", "labels", "Y", "targets")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class LoadedData(NamedTuple):
    """Inputs, float32 (n, ...), and labels (n, ...) of any dtype, or None where there are none."""

    inputs: np.ndarray
    labels: np.ndarray | None


def load_images_or_array(
    path: str | os.PathLike[str],
    *,
    key: str | None = None,
    size: int | tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    limit: int | None = None,
) -> LoadedData:
    """Read a model's inputs: (x - mean) / std, channel by channel, with bytes scaled to [0, 1].

    Parameters
    ----------
    path : path
        A ``.npy`` file; a ``.npz`` file, with labels under y, label, labels or targets; or a folder
        of images, flat, or one folder a class (labels count the class folders by name). Arrays keep
        their shape, except that bytes (n, height, width, channels) become (n, channels, height,
        width).
    key : str, optional
        The inputs' name in a ``.npz`` file; left out: X, x, images, inputs or data, else the only
        array beside the labels.
    size : int or (int, int), optional
        Height and width to resize images to; left out, they must agree.
    mean, std : sequence of float, optional
        One number for each channel (axis 1 of inputs), or one for all.
    limit : int, optional
        Read at most so many examples, spread evenly, because files are often sorted by class.

    Returns
    -------
    LoadedData
        A pair (inputs, labels).

    Raises
    ------
    FileNotFoundError
        If ``path`` does not exist.
    TypeError
        If what the file holds are not numbers.
    ValueError
        If it is of another kind, holds no examples, pickles, NaN or infinity, or labels of another
        length; or if an argument does not fit it.
    """
    path = Path(path)
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}.")
    if not path.exists():
        raise FileNotFoundError(f"data: there is no file or folder {path}.")
    if key is not None and path.suffix != ".npz":
        raise ValueError(f"key names an array of a .npz file, but the data are {path}.")
    if path.is_dir():
        images, labels = read_image_folder(path, size=size, limit=limit)
        inputs = np.moveaxis(images, 3, 1)
    elif size is not None:
        raise ValueError(f"size applies to a folder of images, but the data are {path}.")
    elif path.suffix in (".npy", ".npz"):
        inputs, labels = _read_arrays(path, key, limit)
        inputs = _channels_first(inputs)
    else:
        raise ValueError(
            f"data must be a .npy file, a .npz file or a folder of images, got {path}."
        )
    return LoadedData(_scale(inputs, mean, std, path), labels)


def read_image_folder(
    folder: str | os.PathLike[str],
    *,
    size: int | tuple[int, int] | None = None,
    limit: int | None = None,
) -> LoadedData:
    """Return the RGB images of a folder as bytes (n, height, width, 3), in the order of names.

    See ``load_images_or_array``, whose parameters and errors these are.
    """
    folder = Path(folder)
    flat = [file for file in sorted(folder.iterdir()) if _is_image(file)]
    classes = [sub for sub in sorted(folder.iterdir()) if sub.is_dir() and sub.name[0] != "."]
    members = [[file for file in sorted(sub.rglob("*")) if _is_image(file)] for sub in classes]
    by_class = [(file, number) for number, files in enumerate(members) for file in files]
    if flat and by_class:
        raise ValueError(
            f"data: {folder} has images both beside and inside its folders, such as {flat[0].name} "
            f"and {by_class[0][0].relative_to(folder)}; it must be either flat or one folder a "
            "class."
        )
    found = by_class or [(file, 0) for file in flat]
    if not found:
        raise ValueError(f"data: {folder} holds no images ({', '.join(IMAGE_ENDINGS)}).")
    found = [found[i] for i in _spread(len(found), limit)]
    images: list[np.ndarray] = []
    for file, _ in found:
        image = _read_image(file, size)
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"data: the images must agree in height and width: {found[0][0].name} has "
                f"{images[0].shape[:2]} and {file.name} has {image.shape[:2]}; give size to resize "
                "them."
            )
        images.append(image)
    labels = np.array([number for _, number in found], dtype=np.int64)
    return LoadedData(np.stack(images), labels if by_class else None)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_ENDINGS and file.name[0] != "." and file.is_file()


def _read_image(file: Path, size: int | tuple[int, int] | None) -> np.ndarray:
    try:
        with Image.open(file) as image:
            rgb = image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"data: {file} cannot be read as an image: {error}") from error
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        if min(height, width) < 1:
            raise ValueError(f"size must be at least 1, got {size}.")
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


def _spread(n: int, limit: int | None) -> np.ndarray:
    """Return indices of at most ``limit`` of n examples, evenly spread and increasing."""
    if limit is None or limit >= n:
        return np.arange(n)
    return np.arange(limit) * n // limit


def _read_arrays(
    path: Path, key: str | None, limit: int | None
) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        # A memory map, so that a limit is also one on what is read.
        file = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(file, np.ndarray):
            inputs, labels = file, None
        else:
            with file:
                inputs, labels = _pick_arrays(path, file, key)
    except (EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"data: {path} is damaged: {error}") from error
    except ValueError as error:
        if "pickle" in str(error) or "Python objects" in str(error):
            raise ValueError(
                f"data: {path} holds pickled objects or is not a NumPy file; it must hold plain "
                "arrays of numbers."
            ) from error
        raise
    if inputs.ndim < 2 or not len(inputs):
        raise ValueError(
            f"data: {path} must hold at least one example along the first of two or more axes, got "
            f"shape {inputs.shape}."
        )
    if labels is not None and labels.shape[:1] != inputs.shape[:1]:
        raise ValueError(
            f"data: {path} has {len(inputs)} inputs but labels of shape {labels.shape}."
        )
    rows = slice(None) if limit is None else _spread(len(inputs), limit)
    return inputs[rows], None if labels is None else labels[rows]


def _pick_arrays(
    path: Path, file: np.lib.npyio.NpzFile, key: str | None
) -> tuple[np.ndarray, np.ndarray | None]:
    names = list(file.files)
    if key is not None and key not in names:
        raise ValueError(f"key: {path} has no array {key!r}; it has {names}.")
    label = next((name for name in LABEL_KEYS if name in names and name != key), None)
    others = [name for name in names if name != label]
    if key is None:
        key = next((name for name in INPUT_KEYS if name in others), None)
    if key is None and len(others) == 1:
        key = others[0]
    if key is None:
        raise ValueError(
            f"data: {path} must hold one array, or name its inputs {', '.join(INPUT_KEYS)}; it has "
            f"{names}. Choose one with key."
        )
    return file[key], None if label is None else file[label]


def _channels_first(inputs: np.ndarray) -> np.ndarray:
    """Move the last axis of images in bytes to where torch has it, unless it is there already."""
    images = inputs.dtype == np.uint8 and inputs.ndim == 4
    if images and inputs.shape[3] in (1, 3) and inputs.shape[1] not in (1, 3):
        return np.moveaxis(inputs, 3, 1)
    return inputs


def _scale(
    inputs: np.ndarray, mean: Sequence[float] | None, std: Sequence[float] | None, path: Path
) -> np.ndarray:
    if inputs.dtype.kind not in "fiub":
        raise TypeError(f"data: {path} must hold real numbers, got dtype {inputs.dtype}.")
    scaled = np.array(inputs, dtype=np.float32, order="C")
    if inputs.dtype == np.uint8:
        scaled /= 255
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        numbers = np.asarray(values, dtype=np.float32).reshape(-1)
        if numbers.size not in (1, scaled.shape[1]) or not np.isfinite(numbers).all():
            raise ValueError(
                f"{name} must be 1 finite number or {scaled.shape[1]}, one for each channel of "
                f"inputs of shape {scaled.shape[1:]}, got {list(values)}."
            )
        numbers = numbers.reshape(1, -1, *[1] * (scaled.ndim - 2))
        if name == "mean":
            scaled -= numbers
        elif (numbers > 0).all():
            scaled /= numbers
        else:
            raise ValueError(f"std must be positive, got {list(values)}.")
    if not np.isfinite(scaled).all():
        raise ValueError(f"data: {path} holds NaN or infinity (or overflows float32).")
    return scaled
