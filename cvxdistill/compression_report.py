"""What ``compress`` returns: the model, what was replaced by what, and the frontier."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cvxdistill.atomic_files import check_parent, replacing
from cvxdistill.output_change import CRITERIA

if TYPE_CHECKING:
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
        Its ranks: of the projection of its input channels, and of its map.
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
    """

    model: nn.Module
    choices: tuple[Choice, ...]
    error: float
    criterion: str
    unit: str
    before: int
    after: int
    frontier: np.ndarray = field(repr=False)
    smallest: int
    spans: tuple[Span, ...] = field(repr=False)
    sites: tuple[str, ...] = field(repr=False)
    examples: int
    held_out: int
    example: Batch = field(repr=False)
    seconds: dict[str, float] = field(repr=False)

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

    def export_onnx(self, path: str | Path, *, tolerance: float = 1e-4) -> float:
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
        ax.step(sizes, errors, where="post", label="predicted, best allocation")
        ax.plot([self.after], [self.error], "o", color="C1", label="this model, measured")
        ax.axvline(self.before, color="black", linewidth=0.8, linestyle=":", label="original")
        ax.set(xscale="log", xlabel=self.unit, ylabel=CRITERIA[self.criterion])
        ax.legend(fontsize=8)
        return ax

    def __repr__(self) -> str:
        return (
            f"Compression({self.before:,} -> {self.after:,} {self.unit}, "
            f"{len(self.choices)} students, error={self.error:.3f})"
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
        lines = [
            f"Model: {self.before:,} -> {self.after:,} {self.unit} "
            f"({self.before / self.after:.1f} times smaller; the smallest possible is "
            f"{self.smallest:,})",
            f"{CRITERIA[self.criterion].capitalize()}, on {self.held_out:,} of {self.examples:,} "
            f"held out: {self.error:.3f}",
            f"{len(self.sites)} blocks and spans tried. Time: {phases}",
            "",
            *rows,
            "",
            "error: relative activation error on held-out examples; output: "
            f"{CRITERIA[self.criterion]},",
            "as expected of this student alone; gap: relative duality gap of its ridge regression.",
        ]
        return "\n".join(lines)
