"""What ``compress`` returns: the model, what was replaced by what, and the frontier."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cvxdistill.atomic_files import check_parent, replacing
from cvxdistill.model_size import ModelSize
from cvxdistill.output_change import CRITERIA

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from torch import nn

    from cvxdistill.adapters import Span
    from cvxdistill.adapters.batches import Batch


@dataclass(frozen=True)
class Choice:
    """One student that was put in the place of a block.

    Attributes
    ----------
    block : str
    student : str
        Its ranks: of the projection of its input channels, and of its map; and how many outputs it
        writes, if not all.
    parameters_before, parameters : int
        Numbers of the block, and of the student.
    activation_error : float
        ||Y' - Y||_F / ||Y - mean Y||_F on held-out examples, from what the compressed network
        before it gives.
    output_change : float
        sqrt(E) that was expected of it alone.
    relative_gap : float
        Relative duality gap of the ridge regression that the student comes from.
    rows : int
        Fitted.
    seconds : float
    """

    block: str
    student: str
    parameters_before: int
    parameters: int
    activation_error: float
    output_change: float
    relative_gap: float
    rows: int
    seconds: float


COLUMNS = tuple(Choice.__dataclass_fields__)


@dataclass(frozen=True, repr=False)
class Compression:
    """A compressed model and how it came about; ``print`` it.

    Attributes
    ----------
    model : nn.Module
    original : nn.Module
        The model that was given, for measurements. It lives as long as this does.
    choices : tuple of Choice
        In the order in which they were made.
    error : float
        Measured on held-out examples: ||F' - F||_F / ||F - mean F||_F of the model's output, or
        the share of them that are classified otherwise.
    criterion : {"output", "agreement"}
        Which of the two.
    unit : {"parameters", "bytes"}
    before, after : int
        Of the model, in this unit.
    frontier : ndarray of shape (points, 2)
        The size and the predicted error of the best allocation for every budget, by size.
    curves : dict of ndarray of shape (sizes, 2)
        For each block and span that a student fits: the parameters of students, and what each is
        expected to change alone, sqrt(E).
    smallest : int
        The smallest possible size.
    spans : tuple of Span
        Where the students are, in the order of ``choices``.
    sites : tuple of str
        All blocks and spans that were tried.
    examples, held_out : int
    example : Tensor or dict
        Two examples of the model's inputs, for exports.
    seconds : dict
        By phase.
    quantized : str
        Of a model whose students were quantised since: to what, and the model's bytes. ``after`` is
        then of now, ``error`` and ``choices`` are of before.
    """

    model: nn.Module
    original: nn.Module = field(repr=False)
    choices: tuple[Choice, ...]
    error: float
    criterion: str
    unit: str
    before: int
    after: int
    frontier: np.ndarray = field(repr=False)
    curves: dict[str, np.ndarray] = field(repr=False)
    smallest: int
    spans: tuple[Span, ...] = field(repr=False)
    sites: tuple[str, ...] = field(repr=False)
    examples: int
    held_out: int
    example: Batch = field(repr=False)
    seconds: dict[str, float] = field(repr=False)
    quantized: str = ""

    def save(self, path: str | Path) -> None:
        """Write the compressed model to a safetensors file; ``load_compressed`` reads it.

        Raises
        ------
        ValueError
            If a student's place is a block that returns more than a tensor.
        OSError
            If the file cannot be written. An existing file is replaced only when all is written.
        """
        from cvxdistill.adapters import save_compressed

        save_compressed(self.model, self.spans, path)

    def quantize(self, dtype: str) -> Compression:
        """Return this result with its students in lower precision; see ``Distillation.quantize``.

        Parameters
        ----------
        dtype : {"float16", "int8"}

        Returns
        -------
        Compression
            With a copy of the model. What was measured before is kept, and ``print`` says so.

        Raises
        ------
        ValueError
            As there.
        """
        from cvxdistill.adapters import get_block, quantize_student

        blocks: list[Any] = [get_block(self.model, span.first) for span in self.spans]
        students = [getattr(block, "student", block) for block in blocks]
        model = deepcopy(self.model, {id(s): quantize_student(s, dtype) for s in students})
        size = ModelSize(bytes=True)
        quantized = f"{dtype}: {size.model(self.model):,} -> {size.model(model):,} bytes"
        after = ModelSize(self.unit == "bytes").model(model)
        return replace(self, model=model, after=after, quantized=quantized)

    def export_onnx(self, path: str | Path, *, tolerance: float | None = None) -> float:
        """Write the compressed model as ONNX and check the file; see ``Distillation.export_onnx``.

        Returns
        -------
        float
            The largest difference between onnxruntime's outputs and torch's.

        Raises
        ------
        ImportError, ValueError, OSError
            As there.
        """
        from cvxdistill.adapters import export_onnx

        with replacing(check_parent(path, "path")) as temporary:
            return export_onnx(self.model, self.example, temporary, tolerance=tolerance)

    def to_html(
        self,
        path: str | Path,
        *,
        onnx: bool = True,
        batch_sizes: Sequence[int] = (1, 64),
        verbose: int = 1,
    ) -> None:
        """Write all of this as one HTML page with pictures; see ``Report.to_html``.

        Raises
        ------
        ImportError, ValueError, TypeError, OSError
            As there.
        """
        from cvxdistill.html_compression import write_compression

        write_compression(self, path, onnx=onnx, batch_sizes=batch_sizes, verbose=verbose)

    def to_frame(self) -> pd.DataFrame:
        """Return the choices as a pandas frame, one a row."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError('to_frame needs pandas: pip install "cvxdistill[plot]"') from error
        rows = [{name: getattr(choice, name) for name in COLUMNS} for choice in self.choices]
        return pd.DataFrame(rows, columns=list(COLUMNS))

    def plot_frontier(self, ax: Any = None) -> Any:
        """Draw the predicted error against the size, and this model; return the axes.

        Parameters
        ----------
        ax : matplotlib Axes, optional

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        """
        if ax is None:
            try:
                import matplotlib.pyplot as plt
            except ImportError as error:
                raise ImportError(
                    'plot_frontier needs matplotlib: pip install "cvxdistill[plot]"'
                ) from error
            ax = plt.subplots(figsize=(6, 4), layout="constrained")[1]
        sizes, errors = self.frontier.T
        label = "this model, measured" + (" before it was quantised" if self.quantized else "")
        ax.step(sizes, errors, where="post", label="predicted, best allocation")
        ax.plot([self.after], [self.error], "o", color="C1", label=label)
        ax.axvline(self.before, color="black", linewidth=0.8, linestyle=":", label="original")
        ax.set(xscale="log", xlabel=self.unit, ylabel=CRITERIA[self.criterion])
        ax.legend(fontsize=8)
        return ax

    def __repr__(self) -> str:
        return (
            f"Compression({self.before:,} -> {self.after:,} {self.unit}, "
            f"{len(self.choices)} students, error={self.error:.3f}"
            + (f", students quantised since to {self.quantized})" if self.quantized else ")")
        )

    def __str__(self) -> str:
        head = ("block", "student", "before", "after", "error", "output", "gap", "rows", "seconds")
        table = [head] + [
            (
                c.block,
                c.student,
                f"{c.parameters_before:,}",
                f"{c.parameters:,}",
                f"{c.activation_error:.3f}",
                f"{c.output_change:.3f}",
                f"{c.relative_gap:.0e}",
                f"{c.rows:,}",
                f"{c.seconds:.1f}",
            )
            for c in self.choices
        ]
        widths = [max(len(row[k]) for row in table) for k in range(len(head))]
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.seconds.items())
        rows = [
            "  ".join(
                cell.ljust(width) if k < 2 else cell.rjust(width)
                for k, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        since = f"Students quantised since, to {self.quantized}; errors and rows are of before."
        quantized = [since] if self.quantized else []
        lines = [
            f"Model: {self.before:,} -> {self.after:,} {self.unit} "
            f"({self.before / self.after:.1f} times smaller; the smallest possible is "
            f"{self.smallest:,})",
            f"{CRITERIA[self.criterion].capitalize()}, on {self.held_out:,} of {self.examples:,} "
            f"held out: {self.error:.3f}",
            f"{len(self.sites)} blocks and spans tried. Time: {phases}",
            *quantized,
            "",
            *rows,
            "",
            "error: relative activation error on held-out examples; output: "
            f"{CRITERIA[self.criterion]},",
            "as expected of this student alone; gap: relative duality gap of its ridge regression.",
        ]
        return "\n".join(lines)
