"""A deployed student that is refined where it runs, by batches of what its block takes and gives.

Gates and first layers stay as they are, so that the second layer and the intercept follow from sums
over all rows so far (``HiddenStatistics``). They take the same memory after a million batches, can
be saved beside the student and continued later, and those of several devices add up. The result is
that of one fit to the union of the batches, whatever their number and order.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from cvxdistill.solvers import HiddenStatistics

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cvxdistill.adapters import GatedStudent

# Numbers in a block of hidden features, in float64: 32 MB.
BLOCK_SIZE = 2**22
# Unless said otherwise, what the prior is worth in rows, for each hidden feature and the intercept.
PRIOR_ROWS = 4
# Of the layers that are free: weights in the order of the hidden features, then the intercept.
WEIGHTS = ("second.weight", "linear.1.weight", "linear.weight")
INTERCEPTS = ("second.bias", "linear.1.bias", "linear.bias", "constant")


class OnlineStudent:
    """A student whose second layer is reset after each batch to the best one for all rows so far.

        minimise over W2, b   1/(2n) ||H W2 + 1 b^T - Y||_F^2 + ridge s/2 ||W2 - W2_0||_F^2
                              + r/(2n) (s ||W2 - W2_0||_F^2 + ||z - z_0||^2)

    H (n, m) holds the hidden features of the rows: the gated units (X W1) * D, then those of the
    linear path, its r units, or its inputs themselves where it is one matrix (all of it is free). s
    is the mean variance of the columns of H, (W2_0, b_0) the student as it was given, z and z_0 the
    mean outputs, and r = ``prior_rows``. What was distilled counts as much as r rows on which the
    student is right: a first small batch refines it rather than destroys it.

    Parameters
    ----------
    student : GatedStudent
        Its gates and first layers must not change from here on: the sums are of their features.
    ridge : float, default=1e-4
        Relative to the variance of the hidden features. It does not fade.
    prior_rows : float, optional
        4 (m + 1) if not given. With 0, and a ridge of 0 too, this is least squares.
    statistics : HiddenStatistics, optional
        Sums to continue from, of this student's hidden features: ``statistics`` of another
        ``OnlineStudent``, or of several, added up. The second layer is fitted to them at once.
    inplace : bool, default=False
        False: the student is copied. True: it is refined itself, and with it the model it is in.

    Attributes
    ----------
    student : GatedStudent
        Refined; always the same module with the same parameters, their values set in place.
    statistics : HiddenStatistics
    n_examples_seen : int

    Raises
    ------
    TypeError, ValueError
        If an argument is not one of these, or the statistics are of another number of features.

    Examples
    --------
    >>> online = OnlineStudent(student)  # doctest: +SKIP
    >>> for inputs, outputs in batches:  # doctest: +SKIP
    ...     online.partial_fit(inputs, outputs)
    >>> online.save("student.safetensors")  # doctest: +SKIP
    """

    student: GatedStudent
    statistics: HiddenStatistics

    def __init__(
        self,
        student: GatedStudent,
        *,
        ridge: float = 1e-4,
        prior_rows: float | None = None,
        statistics: HiddenStatistics | None = None,
        inplace: bool = False,
    ) -> None:
        from cvxdistill.adapters import GatedStudent
        from cvxdistill.adapters.quantization import refuse_int8

        if not isinstance(student, GatedStudent):
            raise TypeError(f"student must be a GatedStudent, got {type(student).__name__}.")
        refuse_int8(student)
        W2, intercept = _second_layer(student)
        if not (np.isfinite(W2).all() and np.isfinite(intercept).all()):
            raise ValueError("student: its second layer contains NaN or infinity.")
        self.ridge = _not_negative(ridge, "ridge")
        rows = PRIOR_ROWS * (len(W2) + 1) if prior_rows is None else prior_rows
        self.prior_rows = _not_negative(rows, "prior_rows")
        self._prior = (W2, intercept)
        self.statistics = HiddenStatistics.empty(*W2.shape)
        self.n_examples_seen = 0
        if statistics is not None:
            if not isinstance(statistics, HiddenStatistics):
                raise TypeError(
                    f"statistics must be HiddenStatistics, got {type(statistics).__name__}."
                )
            if statistics.shape != W2.shape:
                raise ValueError(
                    "statistics must be of the student's hidden features and outputs, (m, c) = "
                    f"{W2.shape}, got {statistics.shape}."
                )
        self.student = student if inplace else copy.deepcopy(student)
        if statistics is not None and statistics.n > 0:
            self._refit(statistics)
            self.n_examples_seen = round(statistics.n / student.layout.n_positions)

    def __repr__(self) -> str:
        m, c = self.statistics.shape
        return (
            f"OnlineStudent({self.student.layout.input_shape} -> "
            f"{self.student.layout.output_shape}, m={m}, c={c}, "
            f"n_examples_seen={self.n_examples_seen}, error={self.error:.3g})"
        )

    @property
    def n_rows(self) -> float:
        """Rows in the sums (positions, for images), less what was forgotten of them."""
        return self.statistics.n

    @property
    def error(self) -> float:
        """Activation error ||Y' - Y||_F / ||Y||_F on the rows so far, from their sums; or NaN."""
        if self.statistics.n == 0:
            return float("nan")
        return self.statistics.error(*_second_layer(self.student))

    def partial_fit(self, inputs: Any, outputs: Any) -> OnlineStudent:
        """Refine the student by a batch: inputs (N, *input_shape), outputs (N, *output_shape).

        Arrays or tensors: what the block was given, and what it should return.

        Returns
        -------
        OnlineStudent
            Itself.

        Raises
        ------
        TypeError, ValueError
            If a batch is empty, or of another shape, or not of finite real numbers. Student and
            statistics then stay as they were.
        """
        layout = self.student.layout
        inputs = _batch(inputs, layout.input_shape, "inputs")
        outputs = _batch(outputs, layout.output_shape, "outputs")
        if len(inputs) != len(outputs):
            raise ValueError(
                f"inputs and outputs must be as many, got {len(inputs)} and {len(outputs)}."
            )
        m, c = self.statistics.shape
        size = max(1, BLOCK_SIZE // (layout.n_positions * (m + c)))
        batch = HiddenStatistics.empty(m, c)
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, len(inputs), size):
                rows = slice(start, start + size)
                z, targets = _block(inputs[rows], "inputs"), _block(outputs[rows], "outputs")
                H = _hidden_features(self.student, z).cpu().double().numpy()
                if not np.isfinite(H).all():
                    raise ValueError(
                        f"inputs are too large for the student's {self.student.dtype}: its hidden "
                        "features overflow."
                    )
                Y = layout.targets(targets.cpu().double().numpy())
                batch += HiddenStatistics.of_rows(H, Y)
            statistics = self.statistics + batch
        if not statistics.is_finite():
            raise ValueError("inputs or outputs are too large: the sums of their squares overflow.")
        self._refit(statistics)
        self.n_examples_seen += len(inputs)
        return self

    def forget(self, factor: float) -> OnlineStudent:
        """Let all that has come so far, the prior included, count this much, in (0, 1].

        Called before each batch it is exponential forgetting, for blocks that drift. The student
        itself changes with the next batch.

        Raises
        ------
        ValueError
            If the factor does not lie there.
        """
        self.statistics = self.statistics.scaled(factor)
        self.prior_rows *= factor
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the student, its statistics and its options to one safetensors file.

        ``load_online`` continues from it as if nothing had happened; ``load_student`` reads the
        student alone. An interrupted call leaves what was at ``path`` as it was.

        Raises
        ------
        FileNotFoundError
            If the folder does not exist.
        """
        from cvxdistill.adapters import OnlineState, save_online_state

        options = {
            "ridge": self.ridge,
            "prior_rows": self.prior_rows,
            "n_examples_seen": self.n_examples_seen,
        }
        save_online_state(OnlineState(self.student, self.statistics, self._prior, options), path)

    def _refit(self, statistics: HiddenStatistics) -> None:
        """Take over these statistics and the second layer that they give, or neither."""
        import torch

        W2, intercept = statistics.second_layer(self.ridge, self._prior, self.prior_rows)
        weights, bias = _free_parameters(self.student)
        ends = np.cumsum([weight[0].numel() for weight in weights])
        parts = [part.T for part in np.split(W2, ends[:-1])] if weights else []
        values = [
            torch.tensor(value, dtype=parameter.dtype).reshape(parameter.shape)
            for parameter, value in zip([*weights, bias], [*parts, intercept], strict=True)
        ]
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise ValueError(
                f"the second layer for these rows is too large for {self.student.dtype}."
            )
        with torch.no_grad():
            for parameter, value in zip([*weights, bias], values, strict=True):
                parameter.copy_(value)
        self.statistics = statistics


def load_online(path: str | os.PathLike[str]) -> OnlineStudent:
    """Read what ``OnlineStudent.save`` wrote, to go on from there; onto the CPU, in eval mode.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not such a file, of another format version, or damaged.
    """
    from cvxdistill.adapters import load_online_state

    state = load_online_state(path)
    try:
        ridge, prior_rows, count = (
            state.options[name] for name in ("ridge", "prior_rows", "n_examples_seen")
        )
        online = OnlineStudent(state.student, ridge=ridge, prior_rows=prior_rows, inplace=True)
        if online.statistics.shape != state.statistics.shape or not isinstance(count, int):
            raise ValueError(f"{state.statistics} of {count!r} examples for {online.student!r}.")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    online._prior, online.statistics = state.prior, state.statistics
    online.n_examples_seen = count
    return online


def _hidden_features(student: GatedStudent, inputs: Tensor) -> Tensor:
    """H (n, m) of the rows of these inputs, as the student itself computes them.

    The gated units come first, then the units of the linear path or, where it is one matrix, the
    inputs (patches) that it multiplies.
    """
    import torch
    from torch import nn

    from cvxdistill.adapters import ConvLayout, DenseLayout

    layout = student.layout
    dense = isinstance(layout, DenseLayout)
    parts: list[Tensor] = []
    with torch.no_grad():
        z = inputs.to(student.dtype).to(next(student.parameters()).device)
        if dense:
            z = z.reshape(-1, layout.n_features - 1)
        if student.gate is not None and student.first is not None:
            on = student.gate(z) >= 0
            if student.shared_gates:
                on = torch.index_select(on, 1, student.gate_index)
            parts.append(student.first(z) * on.to(z.dtype))
        if isinstance(student.linear, nn.Sequential):
            parts.append(student.linear[0](z))
        elif isinstance(layout, ConvLayout) and student.linear is not None:
            patches = nn.functional.unfold(
                z, layout.kernel_size, padding=layout.padding, stride=layout.stride
            )
            parts.append(patches)
        elif student.linear is not None:
            parts.append(z)
        if not parts:
            return z.new_zeros(len(inputs) * layout.n_positions, 0)
        if not dense:
            parts = [H.flatten(2).transpose(1, 2).flatten(0, 1) for H in parts]
        return torch.cat(parts, dim=1)


def _free_parameters(student: GatedStudent) -> tuple[list[nn.Parameter], nn.Parameter]:
    """The weights after the hidden features, in the order of these, and the intercept."""
    parameters = dict(student.named_parameters())
    weights = [parameters[name] for name in WEIGHTS if name in parameters]
    return weights, next(parameters[name] for name in INTERCEPTS if name in parameters)


def _second_layer(student: GatedStudent) -> tuple[np.ndarray, np.ndarray]:
    """W2 (m, c) and the intercept (c,) in float64."""
    weights, bias = _free_parameters(student)
    c = student.layout.n_outputs
    parts = [weight.detach().cpu().double().reshape(c, -1).numpy().T for weight in weights]
    return np.vstack([np.zeros((0, c)), *parts]), bias.detach().cpu().double().numpy().copy()


def _batch(values: Any, shape: tuple[int, ...], name: str) -> Any:
    """An array or a tensor (N, *shape) of real numbers."""
    import torch

    if isinstance(values, torch.Tensor):
        values, real = values.detach(), not values.is_complex()
    else:
        values = np.asarray(values)
        real = values.dtype.kind in "fiub"
    if not real:
        raise TypeError(f"{name} must hold real numbers, got dtype {values.dtype}.")
    if values.ndim == 0 or tuple(values.shape[1:]) != shape:
        expected = ", ".join(["N", *map(str, shape)])
        raise ValueError(
            f"{name} must have shape ({expected}), as the student's block, got "
            f"{tuple(values.shape)}."
        )
    if len(values) == 0:
        raise ValueError(f"{name} must hold at least one example.")
    return values


def _block(values: Any, name: str) -> Tensor:
    """Some of the examples of a batch, as a tensor."""
    import torch

    if not isinstance(values, torch.Tensor):
        known = values.dtype in (np.float32, np.float64)
        values = torch.tensor(values if known else values.astype(np.float64))
    if not torch.isfinite(values).all():
        raise ValueError(f"{name} contain NaN or infinity.")
    return values


def _not_negative(value: Any, name: str) -> float:
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.number)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} must be finite and at least 0, got {value!r}.")
    return float(value)
