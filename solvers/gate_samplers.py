"""Random gates that do not depend on the data, and one door to all samplers by name.

Those that look at the data are in ``cvxdistill.solvers.data_gates``. Every sampler gives an array
with one gate a column and, with a bias, one row more than there are features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from cvxdistill.solvers.data_gates import (
    sample_pair_gates,
    sample_quantile_gates,
    sample_wedge_gates,
)
from cvxdistill.solvers.gates import check_count
from cvxdistill.solvers.rows import RowSource, check_rows


def sample_gates(
    n_features: int,
    n_gates: int,
    *,
    bias: bool = False,
    always_on: bool = False,
    random_state: int | np.random.Generator | None = None,
    dtype: Any = np.float64,
) -> np.ndarray:
    """Sample gates with independent standard normal entries.

    Parameters
    ----------
    n_features : int
        Number d of columns of X.
    n_gates : int
        Number p of gates.
    bias : bool, default=False
        Add a last row with a standard normal bias for each gate.
    always_on : bool, default=False
        Put one more gate, which is on for every input (all zeros), before the sampled ones.
    random_state : int, Generator or None
        Seed. The same seed gives the same gates.
    dtype : dtype, default=float64
        float32 or float64.

    Returns
    -------
    ndarray of shape (d, p) or (d + 1, p)
        One gate a column; p + 1 columns with ``always_on``.

    Raises
    ------
    ValueError
        If a size is not positive.

    References
    ----------
    Mishkin, Sahiner and Pilanci 2022, section 2 (sampled gates); Varshney and Pilanci 2024,
    theorem 2.
    """
    check_count("n_features", n_features)
    check_count("n_gates", n_gates)
    rng = np.random.default_rng(random_state)
    G = rng.standard_normal((n_features + bool(bias), n_gates))
    if always_on:
        G = np.hstack([np.zeros((len(G), 1)), G])
    return G.astype(dtype, copy=False)


def sample_sparse_gates(
    n_features: int,
    n_gates: int,
    *,
    n_nonzero: int | float | None = None,
    bias: bool = False,
    random_state: int | np.random.Generator | None = None,
    dtype: Any = np.float64,
) -> np.ndarray:
    """Sample gates that see a few features only: standard normal there, zero elsewhere.

    Parameters
    ----------
    n_features : int
        Number d of columns of X.
    n_gates : int
        Number p of gates.
    n_nonzero : int, float or None
        How many features each gate sees, drawn for each: a number from 1 to d, or a fraction of d
        in (0, 1] if it is a float, rounded and at least 1. By default sqrt(d), rounded.
    bias : bool, default=False
        Add a last row with a standard normal bias for each gate.
    random_state : int, Generator or None
        Seed.
    dtype : dtype, default=float64
        float32 or float64.

    Returns
    -------
    ndarray of shape (d, p) or (d + 1, p)

    Raises
    ------
    ValueError
        If a size is not positive or ``n_nonzero`` is not as above.
    """
    d = check_count("n_features", n_features)
    p = check_count("n_gates", n_gates)
    k = _count_nonzero(n_nonzero, d)
    rng = np.random.default_rng(random_state)
    features = rng.random((d, p)).argsort(axis=0)[:k]
    G = np.zeros((d + bool(bias), p), dtype=dtype)
    np.put_along_axis(G, features, rng.standard_normal((k, p)).astype(dtype), axis=0)
    G[d:] = rng.standard_normal((len(G) - d, p))
    return G


def sample_convolutional_gates(
    image_shape: tuple[int, int, int],
    kernel_size: int | tuple[int, int],
    n_gates: int,
    *,
    bias: bool = False,
    random_state: int | np.random.Generator | None = None,
    dtype: Any = np.float64,
) -> np.ndarray:
    """Sample gates that see one patch of an image: a random filter at a random position.

    Every gate has a filter of its own with standard normal entries over all channels, placed
    uniformly among the positions where it lies inside the image; the gate is zero elsewhere.

    Parameters
    ----------
    image_shape : (channels, height, width)
        Images are the rows of X, flattened in this order (C order); d is the product.
    kernel_size : int or (height, width)
        Size of the filters, no larger than the image.
    n_gates : int
        Number p of gates.
    bias : bool, default=False
        Add a last row with a standard normal bias for each gate.
    random_state : int, Generator or None
        Seed.
    dtype : dtype, default=float64
        float32 or float64.

    Returns
    -------
    ndarray of shape (d, p) or (d + 1, p)

    Raises
    ------
    ValueError
        If a size is not positive, or the filter is larger than the image.

    References
    ----------
    Mishkin, Sahiner and Pilanci 2022 (convolutional sampling, for images).
    """
    if not isinstance(image_shape, (tuple, list)) or len(image_shape) != 3:
        raise ValueError(f"image_shape must be (channels, height, width), got {image_shape!r}.")
    channels, height, width = (check_count("each of image_shape", size) for size in image_shape)
    sides = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
    if len(sides) != 2:
        raise ValueError(f"kernel_size must be an integer or (height, width), got {kernel_size!r}.")
    kernel_height, kernel_width = (check_count("kernel_size", side) for side in sides)
    if kernel_height > height or kernel_width > width:
        raise ValueError(
            f"kernel_size must be at most the image's ({height}, {width}), got {kernel_size!r}."
        )
    p = check_count("n_gates", n_gates)
    rng = np.random.default_rng(random_state)
    images = np.zeros((p, channels, height, width), dtype=dtype)
    tops = rng.integers(height - kernel_height + 1, size=p)
    lefts = rng.integers(width - kernel_width + 1, size=p)
    for image, top, left in zip(images, tops, lefts, strict=True):
        image[:, top : top + kernel_height, left : left + kernel_width] = rng.standard_normal(
            (channels, kernel_height, kernel_width)
        )
    G = np.ascontiguousarray(images.reshape(p, -1).T)
    if bias:
        G = np.vstack([G, rng.standard_normal((1, p)).astype(dtype)])
    return G


Sampler = Callable[[RowSource, Any, int, int | np.random.Generator | None], np.ndarray]

GATE_SAMPLERS: Mapping[str, Sampler] = MappingProxyType(
    {
        "gaussian": lambda X, Y, p, seed: sample_gates(
            X.shape[1], p, random_state=seed, dtype=X.dtype
        ),
        "gaussian-bias": lambda X, Y, p, seed: sample_gates(
            X.shape[1], p, bias=True, random_state=seed, dtype=X.dtype
        ),
        "quantile-bias": lambda X, Y, p, seed: sample_quantile_gates(X, p, random_state=seed),
        "sparse": lambda X, Y, p, seed: sample_sparse_gates(
            X.shape[1], p, random_state=seed, dtype=X.dtype
        ),
        "pairs": lambda X, Y, p, seed: sample_pair_gates(X, Y, p, random_state=seed),
        "pairs-bias": lambda X, Y, p, seed: sample_pair_gates(
            X, Y, p, bias=True, random_state=seed
        ),
        "wedge": lambda X, Y, p, seed: sample_wedge_gates(X, p, random_state=seed),
        "wedge-bias": lambda X, Y, p, seed: sample_wedge_gates(X, p, bias=True, random_state=seed),
    }
)


def draw_gates(
    name: str,
    X: RowSource,
    Y: Any,
    n_gates: int,
    random_state: int | np.random.Generator | None = None,
) -> np.ndarray:
    """Draw gates for data by the name of a sampler, in the type of X.

    Parameters
    ----------
    name : str
        "gaussian" or "gaussian-bias" for ``sample_gates``, "quantile-bias" for
        ``sample_quantile_gates``, "sparse" for ``sample_sparse_gates``, "pairs" or "pairs-bias" for
        ``sample_pair_gates``, "wedge" or "wedge-bias" for ``sample_wedge_gates``; with a bias where
        the name says so, and otherwise at their defaults.
    X : array or row source of shape (n, d)
    Y : array of shape (n,) or (n, c)
        Targets; only those of pairs look at them.
    n_gates : int
        Number p of gates.
    random_state : int, Generator or None
        Seed, passed on.

    Returns
    -------
    ndarray of shape (d, p), or (d + 1, p) with a last row of biases

    Raises
    ------
    ValueError, TypeError
        If there is no such sampler, or as it raises.
    """
    if name not in GATE_SAMPLERS:
        raise ValueError(f"gates must be one of {list(GATE_SAMPLERS)} or an array, got {name!r}.")
    return GATE_SAMPLERS[name](check_rows(X), Y, n_gates, random_state)


def _count_nonzero(n_nonzero: int | float | None, d: int) -> int:
    if n_nonzero is None:
        return max(1, round(math.sqrt(d)))
    if isinstance(n_nonzero, (float, np.floating)) and 0 < n_nonzero <= 1:
        return max(1, round(n_nonzero * d))
    if (
        isinstance(n_nonzero, (int, np.integer))
        and not isinstance(n_nonzero, bool)
        and 1 <= n_nonzero <= d
    ):
        return int(n_nonzero)
    raise ValueError(
        f"n_nonzero must be an integer from 1 to {d} or a fraction in (0, 1], got {n_nonzero!r}."
    )
