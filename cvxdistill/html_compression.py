"""The HTML page of a compression; see ``Compression.to_html``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cvxdistill.html_measurements import measure
from cvxdistill.html_page import Page
from cvxdistill.html_pictures import draw_choices, draw_curves, draw_frontier
from cvxdistill.html_report import (
    add_measurements,
    change,
    check_request,
    measured_figures,
    phases,
    write_page,
)
from cvxdistill.output_change import CRITERIA

if TYPE_CHECKING:
    from cvxdistill.compression_report import Compression

# Rows of the table of the frontier.
FRONTIER_ROWS = 12


def write_compression(
    compression: Compression,
    path: str | Path,
    *,
    onnx: bool,
    batch_sizes: Sequence[int],
    verbose: int,
) -> None:
    """Write the page of a compression; see ``Compression.to_html``."""
    sizes = check_request(path, batch_sizes)
    page = Page(f"{type(compression.original).__name__} compressed")
    measured = measure(
        compression.original,
        compression.model,
        compression.example,
        onnx=onnx,
        batch_sizes=sizes,
        verbose=verbose,
    )
    before, after, unit = compression.before, compression.after, compression.unit
    criterion = CRITERIA[compression.criterion]
    page.key_figures(
        [
            change(f"{unit.capitalize()} of the model", before, after, f"{before:,}", f"{after:,}"),
            (
                criterion.capitalize(),
                f"{compression.error:.4f}",
                f"measured on {compression.held_out:,} of {compression.examples:,} examples "
                "held out",
            ),
            (
                "Students",
                f"{len(compression.choices):,}",
                f"of {len(compression.sites):,} blocks and spans that were tried",
            ),
            *measured_figures(measured),
        ]
    )
    page.text(
        "Blocks were replaced by linear students without labels and without fine-tuning.",
        f"The smallest possible model has {compression.smallest:,} {unit}.",
        f"Time: {phases(compression.seconds)}.",
    )
    if compression.quantized:
        page.text(
            f"The students were quantised since, to {compression.quantized}: sizes and latencies "
            "are of now, errors and students are of before."
        )
    add_measurements(page, measured, (before, after) if unit == "parameters" else None)
    _add_choices(page, compression, criterion)
    _add_frontier(page, compression, criterion)
    if compression.choices:
        _add_students(page, compression)
    write_page(page, path)


def _add_choices(page: Page, compression: Compression, criterion: str) -> None:
    page.section("Blocks that were replaced")
    choices = compression.choices
    page.table(
        "Students, in the order in which they were fitted",
        (
            "block", "student", "before", "after", "activation error", "output change", "gap",
            "rows", "seconds",
        ),
        [
            (
                c.block,
                c.student,
                f"{c.parameters_before:,}",
                f"{c.parameters:,}",
                f"{c.activation_error:.4f}",
                f"{c.output_change:.4f}",
                f"{c.relative_gap:.1e}",
                f"{c.rows:,}",
                f"{c.seconds:.1f}",
            )
            for c in choices
        ],
        text_columns=(0, 1),
    )  # fmt: skip
    if not choices:
        page.text("Nothing had to be replaced.")
        return
    page.text(
        "before, after: parameters. activation error: relative, on held-out examples, with the "
        "students before it in place. output change: "
        f"{criterion}, as expected of this student alone. gap: relative duality gap of its ridge "
        "regression.",
        note=True,
    )


def _add_students(page: Page, compression: Compression) -> None:
    choices = compression.choices
    page.section("Error and gap along the path")
    page.picture(
        draw_choices(compression),
        f"Activation error, expected error of the output and relative duality gap of each of the "
        f"{len(choices)} students in the order in which they were fitted; the table of "
        "blocks has the figures.",
        "Each student in the order in which they were fitted.",
    )
    page.picture(
        draw_curves(compression),
        f"Expected error of the output against the parameters of the student, for "
        f"{len(compression.curves)} blocks and spans, with the students that were chosen.",
        "What a student of each size is expected to change, alone: the blocks that were replaced, "
        "with a dot for the student taken, and in grey those that were not.",
    )


def _add_frontier(page: Page, compression: Compression, criterion: str) -> None:
    page.section("Frontier")
    sizes = compression.frontier[:, 0]
    page.picture(
        draw_frontier(compression),
        f"Predicted {criterion} against {compression.unit}, from {sizes[0]:,.0f} to "
        f"{sizes[-1]:,.0f}; this model, measured, has {compression.after:,} and "
        f"{compression.error:.4f}.",
        "The best allocation for every budget, as predicted before any student was fitted for "
        "good, and this model, as measured.",
    )
    # Evenly over the logarithm of the size.
    wanted = np.geomspace(max(sizes[0], 1), max(sizes[-1], 1), FRONTIER_ROWS)
    places = sorted({int(np.abs(sizes - size).argmin()) for size in wanted})
    page.table(
        f"Some points of the frontier ({len(sizes):,} in all)",
        (compression.unit, "predicted error"),
        [(f"{size:,.0f}", f"{error:.4f}") for size, error in compression.frontier[places]],
        text_columns=(),
    )
