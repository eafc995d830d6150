"""What ``distill`` did: sizes before and after, the candidates, errors, gaps and seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvxdistill.candidates import Candidate, PathPoint
from cvxdistill.selection import PolishedCandidate

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from cvxdistill.adapters import ConvLayout, DenseLayout
    from cvxdistill.adapters.batches import Batch

COLUMNS = (
    "kind",
    "n_neurons",
    "n_gates",
    "parameters",
    "trainable",
    "error",
    "alpha",
    "duality_gap",
    "seconds",
)


@dataclass(frozen=True, repr=False)
class Report:
    """The record of one distillation; ``print`` it, or take ``to_frame()`` or ``to_html(path)``.

    Attributes
    ----------
    block : str
    replaced : tuple of str
        Names of the blocks in whose place the student is.
    block_parameters, model_parameters : int
        Parameters of the block and of the whole model before.
    layout : DenseLayout or ConvLayout
        How activations became rows.
    gate_source : {"teacher", "gaussian", "given", "none"}
    examples, held_out : int
        Recorded, and of these held out.
    rows, available_rows : int
        Rows fitted, of those that the fitted examples have.
    seconds : dict
        By phase.
    candidates : tuple of Candidate
    path : tuple of PathPoint
        Every alpha that was tried, of the linear students and of the gated ones.
    chosen : Candidate
    original, model : nn.Module
        The model that was given and the one with the student, for measurements; ``original`` is
        None if they are the same (``inplace``). They live as long as the report does.
    example : Tensor or dict
        Two examples of their inputs.
    polished : tuple of PolishedCandidate
        Those that were polished, before and after; ``polished[0].polishing`` prints a path.
    match : str
        What students were fitted to: the block's outputs, or what follows it.
    quantized : str
        Of a student that was quantised since: to what, and its bytes. All else is of before.
    """

    block: str
    replaced: tuple[str, ...]
    block_parameters: int
    model_parameters: int
    layout: ConvLayout | DenseLayout
    gate_source: str
    examples: int
    held_out: int
    rows: int
    available_rows: int
    seconds: dict[str, float]
    candidates: tuple[Candidate, ...]
    path: tuple[PathPoint, ...]
    chosen: Candidate
    original: nn.Module | None
    model: nn.Module
    example: Batch = field(compare=False)
    polished: tuple[PolishedCandidate, ...] = ()
    match: str = "outputs"
    quantized: str = ""

    @property
    def parameters(self) -> int:
        """All numbers that the student stores, gates included."""
        return self.chosen.parameters

    @property
    def trainable(self) -> int:
        """The student's numbers that are not gates."""
        return self.chosen.trainable

    @property
    def error(self) -> float:
        """Relative activation error ||Y' - Y||_F / ||Y||_F on held-out examples."""
        return self.chosen.error

    @property
    def duality_gap(self) -> float:
        """Relative duality gap of the convex programme that the student comes from."""
        return self.chosen.duality_gap

    @property
    def model_parameters_after(self) -> int:
        """Numbers in the whole model with the student in place."""
        return self.model_parameters - self.block_parameters + self.parameters

    def to_frame(self) -> pd.DataFrame:
        """Return the candidates as a pandas frame, one a row, with a column ``chosen``."""
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError('to_frame needs pandas: pip install "cvxdistill[plot]"') from error
        rows = [{name: getattr(c, name) for name in COLUMNS} for c in self.candidates]
        frame = pd.DataFrame(rows, columns=list(COLUMNS))
        frame["chosen"] = [c is self.chosen for c in self.candidates]
        return frame

    def to_html(
        self,
        path: str | Path,
        *,
        onnx: bool = True,
        batch_sizes: Sequence[int] = (1, 64),
        verbose: int = 1,
    ) -> None:
        """Write the report as one HTML page, with pictures, that refers to nothing outside.

        Sizes and latencies of the model before and after are measured now, the two in turn.

        Parameters
        ----------
        path : str or Path
        onnx : bool, default=True
            Also export both models to ONNX, for the sizes of the files and onnxruntime's latencies.
            Where that cannot be, the page says why.
        batch_sizes : sequence of int, default=(1, 64)
            Examples in a forward pass.
        verbose : int, default=1
            0 shows no progress.

        Raises
        ------
        ImportError
            If matplotlib is not installed.
        ValueError, TypeError
            If ``batch_sizes`` does not hold positive integers.
        OSError
            If the file cannot be written. An existing file is replaced only when all is well.
        """
        from cvxdistill.html_distillation import write_distillation

        write_distillation(self, path, onnx=onnx, batch_sizes=batch_sizes, verbose=verbose)

    def __repr__(self) -> str:
        return (
            f"Report(block={self.block!r}, {self.block_parameters:,} -> {self.parameters:,} "
            f"parameters, error={self.error:.3f}"
            + (f", quantised since to {self.quantized})" if self.quantized else ")")
        )

    def __str__(self) -> str:
        after, before = self.model_parameters_after, self.model_parameters
        sampled = (
            "" if self.rows == self.available_rows else f" of {self.available_rows:,}, sampled"
        )
        phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in self.seconds.items())
        if self.match != "outputs":
            sampled += f", {self.match}"
        notes = [
            "* chosen. error: relative activation error on held-out examples; gap: relative "
            "duality gap of",
            "the convex programme, before units were dropped and the second layer refitted.",
        ]
        if self.polished:
            notes.append("Of a polished student: alpha and gap of the group elastic net.")
        since = f"Quantised since, to {self.quantized}; all else is of before."
        quantized = [since] if self.quantized else []
        lines = [
            f"Block {self.block}: {self.block_parameters:,} parameters -> {self.parameters:,} "
            f"({self.block_parameters / self.parameters:.1f} times smaller)",
            f"Model: {before:,} -> {after:,} parameters ({before / after:.2f} times smaller)",
            f"Fitted on {self.rows:,} rows{sampled}; {self.held_out:,} of {self.examples:,} "
            f"examples held out; gates: {self.gate_source}",
            f"Time: {phases}",
            *quantized,
            *(f"Polished, {p.before.kind}: {p.polishing.summary}" for p in self.polished),
            "",
            *_table(self.candidates, self.chosen),
            "",
            *notes,
        ]
        return "\n".join(lines)


def _table(candidates: tuple[Candidate, ...], chosen: Candidate) -> list[str]:
    def row(c: Candidate) -> tuple[Any, ...]:
        return (
            "*" if c is chosen else "",
            c.kind,
            f"{c.n_neurons:,}",
            f"{c.n_gates:,}",
            f"{c.parameters:,}",
            f"{c.error:.4f}",
            f"{c.alpha:.2e}",
            f"{c.duality_gap:.1e}",
            f"{c.seconds:.1f}",
        )

    head = ("", "student", "units", "gates", "parameters", "error", "alpha", "gap", "seconds")
    rows = [head, *map(row, candidates)]
    widths = [max(len(line[k]) for line in rows) for k in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if k < 2 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in rows
    ]
