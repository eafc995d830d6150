"""A block's sums over the examples that are fitted, and its activations of those held out.

Batch by batch, what the block takes and gives becomes sums (``GatedStatistics``), of one size
however many examples there are; only held-out activations are recorded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from cvxdistill.candidates import activation_error
from cvxdistill.solvers import GatedStatistics, evaluate_gates

if TYPE_CHECKING:
    from torch import nn

    from cvxdistill.adapters import ConvLayout, DenseLayout, Examples, FollowingMap, Span

# Rows whose gated features are formed at once.
ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class StreamedBlock:
    """A block's sums over fitted examples, and its activations of those held out.

    Attributes
    ----------
    span : Span
    layout : DenseLayout or ConvLayout
    following : FollowingMap or None
    G : ndarray of shape (d, p)
    statistics : GatedStatistics
        Of all gates; ``linear_statistics`` are those of the first, which is always on.
    inputs, outputs : ndarray of shape (N, ...)
        Of the held-out examples.
    """

    span: Span
    layout: ConvLayout | DenseLayout
    following: FollowingMap | None
    G: np.ndarray = field(repr=False)
    statistics: GatedStatistics
    inputs: np.ndarray = field(repr=False)
    outputs: np.ndarray = field(repr=False)

    @property
    def linear_statistics(self) -> GatedStatistics:
        """Sums of the gate that is always on."""
        s, d = self.statistics, self.statistics.d
        one = GatedStatistics(1, d, s.c)
        one.gram += s.gram[:d, :d]
        one.cross += s.cross[:1]
        one.feature_sums += s.feature_sums[:1]
        one.target_sums += s.target_sums
        one.target_squares += s.target_squares
        one.n, one.dtype = s.n, s.dtype
        return one

    def error(self, student: Any) -> float:
        """Relative activation error on the held-out examples, of what follows the block."""
        every = np.arange(len(self.inputs))
        return activation_error(student, self.inputs, self.outputs, every, self.following)


def pooled_features(
    layout: ConvLayout | DenseLayout, inputs: np.ndarray, G: np.ndarray
) -> Iterator[np.ndarray]:
    """Gated features of some examples, averaged over their positions, (m, p, d) at a time."""
    X = layout.rows(inputs)
    step = layout.n_positions * max(1, ROWS_AT_ONCE // layout.n_positions)
    for start in range(0, X.shape[0], step):
        x = X[start : start + step]
        A = evaluate_gates(x, G)[:, :, None] * x[:, None, :]
        yield A.reshape(-1, layout.n_positions, *A.shape[1:]).mean(axis=1)


def stream(
    model: nn.Module,
    examples: Examples,
    span: Span,
    layout: ConvLayout | DenseLayout,
    following: FollowingMap | None,
    G: np.ndarray,
    held_out: tuple[np.ndarray, np.ndarray],
    share: float,
    max_rows: int | None,
    rng: np.random.Generator,
    verbose: int,
) -> StreamedBlock:
    """Run the model over the fitted examples, and turn what the block takes and gives into sums."""
    from cvxdistill.adapters import BlockTaps, token_rows

    c = layout.n_outputs if following is None else following.matrix.shape[1]
    statistics = GatedStatistics(G.shape[1], layout.n_features, c, gates=G)
    pooled = following is not None and following.pooled
    # Held-out activations of tokens are more than examples.
    fitted = len(examples) - round(share * len(examples))
    high = 1.0
    if max_rows is not None and pooled:
        high = share + (1 - share) * min(1.0, max_rows / fitted)
    taps, done = BlockTaps(model, [span]), 0
    batches = tqdm(
        examples.between(share, high),
        desc="sums",
        total=math.ceil(fitted / examples.largest_batch),
        disable=not verbose,
    )
    for number, (batch, which) in enumerate(batches):
        ((input, output),) = taps.run(batch)
        done += len(which)
        if pooled:
            assert following is not None
            targets, start = following(output.numpy()), 0
            for A in pooled_features(layout, input.numpy(), G):
                statistics.update_features(A, targets[start : start + len(A)])
                start += len(A)
            continue
        keep = examples.masks.of(str(span), number, batch, which, (input, output))
        left = np.iinfo(np.int64).max
        if max_rows is not None:
            left = round(max_rows * done / fitted) - statistics.n
        if left > 0:
            X, Y = token_rows(layout, input, output, keep, left, rng)
            ones = np.ones((len(X), 1), X.dtype)
            targets = Y if following is None else following(Y[:, :, None])
            statistics.update(np.hstack([X, ones]), np.ascontiguousarray(targets))
    return StreamedBlock(span, layout, following, G, statistics, *held_out)


def record_held_out(
    model: nn.Module, examples: Examples, span: Span, share: float, options: dict[str, Any]
) -> tuple[ConvLayout | DenseLayout, tuple[np.ndarray, np.ndarray]]:
    """The block's layout and its activations of the held-out examples, of tokens row by row."""
    from cvxdistill.adapters import BlockTaps, DenseLayout, infer_layout

    taps = BlockTaps(model, [span])
    inputs, outputs = [], []
    layout: Any = None
    for number, (batch, which) in enumerate(examples.between(0, share)):
        ((input, output),) = taps.run(batch)
        if layout is None:
            names = ("kernel_size", "stride", "padding")
            overrides = {name: options[name] for name in names}
            layout = infer_layout(tuple(input.shape[1:]), tuple(output.shape[1:]), **overrides)
            if isinstance(layout, DenseLayout) and layout.per_position:
                ends = layout.input_shape[-1:], layout.output_shape[-1:]
                layout = DenseLayout(*ends, per_position=True)
        if input.ndim - 1 > len(layout.input_shape):
            keep = examples.masks.of(str(span), number, batch, which, (input, output))
            if keep is not None:
                input, output = input[keep], output[keep]
            input = input.reshape(-1, *layout.input_shape)
            output = output.reshape(-1, *layout.output_shape)
        inputs.append(input.numpy())
        outputs.append(output.numpy())
    for side, arrays in (("input", inputs), ("output", outputs)):
        if not all(np.isfinite(array).all() for array in arrays):
            raise ValueError(f"the {side} of block {str(span)!r} contains NaN or infinity.")
    return layout, (np.concatenate(inputs), np.concatenate(outputs))
