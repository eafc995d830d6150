"""The HTML page of a distillation; see ``Report.to_html``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cvxdistill.candidates import PathPoint
from cvxdistill.html_measurements import measure
from cvxdistill.html_page import Page
from cvxdistill.html_pictures import draw_candidates, draw_paths
from cvxdistill.html_report import (
    add_measurements,
    change,
    check_request,
    measured_figures,
    phases,
    write_page,
)
from cvxdistill.inspection import HEADINGS, block_cells, inspect

if TYPE_CHECKING:
    from cvxdistill.report import Report

NO_ORIGINAL = (
    "The student was put into the model itself (inplace=True): there is no original left to "
    "measure."
)


def write_distillation(
    report: Report, path: str | Path, *, onnx: bool, batch_sizes: Sequence[int], verbose: int
) -> None:
    """Write the page of a distillation; see ``Report.to_html``."""
    sizes = check_request(path, batch_sizes)
    name = type(report.model).__name__
    page = Page(f"{name}: block {report.block} distilled")
    measured = measure(
        report.original,
        report.model,
        report.example,
        onnx=onnx,
        batch_sizes=sizes,
        verbose=verbose,
    )
    after, before = report.model_parameters_after, report.model_parameters
    page.key_figures(
        [
            change("Parameters of the model", before, after, f"{before:,}", f"{after:,}"),
            change(
                "Parameters of the block",
                report.block_parameters,
                report.parameters,
                f"{report.block_parameters:,}",
                f"{report.parameters:,}",
            ),
            (
                "Activation error",
                f"{report.error:.4f}",
                f"relative, on {report.held_out:,} of {report.examples:,} examples held out",
            ),
            (
                "Duality gap",
                f"{report.duality_gap:.1e}",
                "relative, of the convex programme that the student comes from",
            ),
            *measured_figures(measured),
        ]
    )
    page.text(
        f"A {report.chosen.kind} student with {report.chosen.n_neurons:,} hidden units and "
        f"{report.chosen.n_gates:,} stored gates takes the place of {report.block}.",
        f"It was fitted without labels to {report.rows:,} of {report.available_rows:,} rows "
        f"({report.layout.n_features:,} features, {report.layout.n_outputs:,} outputs); "
        f"gates: {report.gate_source}; fitted to: {report.match}.",
        f"Time: {phases(report.seconds)}.",
    )
    if report.original is None:
        page.text(NO_ORIGINAL)
    if report.quantized:
        page.text(
            f"The student was quantised since, to {report.quantized}: bytes and latencies are of "
            "now, all else is of before."
        )
    add_measurements(page, measured, (before, after))
    _add_candidates(page, report)
    _add_paths(page, report)
    _add_blocks(page, report)
    write_page(page, path)


def _add_candidates(page: Page, report: Report) -> None:
    page.section("Students that were considered")
    kinds = ", ".join(dict.fromkeys(c.kind for c in report.candidates))
    page.picture(
        draw_candidates(report),
        f"Held-out error against parameters of {len(report.candidates)} students ({kinds}); the "
        f"one chosen has {report.parameters:,} parameters and an error of {report.error:.4f}. "
        "The table below has all.",
        "The frontier: error against size.",
    )
    page.table(
        "Candidates",
        (
            "student", "units", "gates", "parameters", "trainable", "error", "alpha", "gap",
            "seconds", "",
        ),
        [
            (
                c.kind,
                f"{c.n_neurons:,}",
                f"{c.n_gates:,}",
                f"{c.parameters:,}",
                f"{c.trainable:,}",
                f"{c.error:.4f}",
                f"{c.alpha:.2e}",
                f"{c.duality_gap:.1e}",
                f"{c.seconds:.1f}",
                "chosen" if c is report.chosen else "",
            )
            for c in report.candidates
        ],
        text_columns=(0, 9),
        marked=[k for k, c in enumerate(report.candidates) if c is report.chosen],
    )  # fmt: skip
    page.text(
        "error: relative activation error on held-out examples. gap: relative duality gap of the "
        "convex programme, before units were dropped and the second layer refitted; of a polished "
        "student, alpha and gap of the group elastic net.",
        note=True,
    )


def _paths(report: Report) -> dict[str, list[PathPoint]]:
    """The path of each kind, and of each polishing."""
    paths: dict[str, list[PathPoint]] = {}
    for point in report.path:
        paths.setdefault(point.kind, []).append(point)
    for polished in report.polished:
        name = f"{polished.before.kind}, polished from {polished.before.n_neurons:,} units"
        paths[name] = [
            PathPoint(name, point.alpha, point.n_neurons, point.error, point.duality_gap)
            for point in polished.polishing.path
            if point.alpha is not None
        ]
    return paths


def _add_paths(page: Page, report: Report) -> None:
    page.section("Error and gap along the path")
    paths = _paths(report)
    points = [(name, point) for name, path in paths.items() for point in path]
    page.picture(
        draw_paths(paths),
        "Held-out error, and relative duality gap, against alpha: "
        + "; ".join(f"{name}, {len(path)} alphas" for name, path in paths.items())
        + ". The table below has all.",
        "Held-out error of the best student of each alpha, and relative duality gap of its convex "
        "programme.",
    )
    page.table(
        "Every alpha",
        ("path", "alpha", "units", "error", "gap"),
        [
            (
                name,
                f"{point.alpha:.2e}",
                f"{point.n_neurons:,}",
                f"{point.error:.4f}" if np.isfinite(point.error) else "too large",
                f"{point.duality_gap:.1e}",
            )
            for name, point in points
        ],
    )
    page.text(
        "Of each alpha the best student is shown: of full rank, before the refit, on the path of "
        "the linear ones.",
        note=True,
    )


def _add_blocks(page: Page, report: Report) -> None:
    page.section("Blocks of the model")
    original = report.original is not None
    table = inspect(report.original if original else report.model, report.example)
    roles = [_role(info.name, report.replaced, original) for info in table]
    rows = [
        (*block_cells(info), role)
        for info, role in zip((*table, table.model), (*roles, ""), strict=True)
    ]
    page.table(
        "Before the distillation" if original else "With the student in place",
        (*HEADINGS, ""),
        rows,
        text_columns=(0, 1, 2, 3, 8),
        marked=[k for k, role in enumerate(roles) if role in ("replaced", "student")],
    )


def _role(name: str, replaced: Sequence[str], original: bool) -> str:
    if name in replaced:
        return "replaced" if original else "student" if name == replaced[0] else "removed"
    if any(name.startswith(f"{outer}.") for outer in replaced):
        return "inside" if original else "in student"
    return ""
