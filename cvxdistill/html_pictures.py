"""The pictures of the HTML report, each as a data URI of SVG.

Black on nothing, so that the page can turn them round where it is dark, and with letters as paths,
so that no font is needed.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cvxdistill.candidates import PathPoint
    from cvxdistill.compression_report import Compression
    from cvxdistill.html_measurements import Timing
    from cvxdistill.report import Report

STYLE = {"svg.fonttype": "path", "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}
MARKERS = "osD^vP"
# Gaps below this are rounding, and drawn here.
SMALLEST_GAP = 1e-16
GAP_LABEL = f"relative duality gap (at least {SMALLEST_GAP:.0e})"


def check_matplotlib() -> None:
    """Raise ImportError, with what to install, where there is no matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError('to_html needs matplotlib: pip install "cvxdistill[plot]"') from error


def _drawn(draw: Callable[[Figure], None], width: float, height: float) -> str:
    """What ``draw`` puts on a figure of so many inches."""
    from matplotlib import style
    from matplotlib.figure import Figure

    # Matplotlib's own style, whatever the user's is.
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _count_sizes(ax: Any) -> None:
    """Put numbers such as 500k and 2M on a logarithmic axis of sizes."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_minor_formatter(NullFormatter())


def draw_candidates(report: Report) -> str:
    """Held-out error against parameters of all candidates, each kind apart."""

    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        kinds = dict.fromkeys(c.kind for c in report.candidates)
        for marker, kind in zip(MARKERS, kinds, strict=False):
            points = sorted((c.parameters, c.error) for c in report.candidates if c.kind == kind)
            ax.plot(*zip(*points, strict=True), marker=marker, markersize=5, label=kind)
        chosen = report.chosen
        ring: dict[str, Any] = {"markersize": 14, "markerfacecolor": "none", "color": "black"}
        ax.plot([chosen.parameters], [chosen.error], "o", label="chosen", **ring)
        ax.axvline(report.block_parameters, color="black", lw=0.8, ls=":", label="the block")
        ax.set(xlabel="parameters, gates included", ylabel="held-out error")
        ax.set_ylim(bottom=0)
        _count_sizes(ax)
        ax.legend(fontsize=8)

    return _drawn(draw, 7, 4)


def draw_paths(paths: Mapping[str, Sequence[PathPoint]]) -> str:
    """Held-out error and relative gap against alpha, each path apart."""

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for marker, (name, points) in zip(MARKERS, paths.items(), strict=False):
            shown = [p for p in points if p.alpha > 0]
            alphas = [p.alpha for p in shown]
            line = {"marker": marker, "markersize": 5, "label": name, "clip_on": False}
            left.plot(alphas, [p.error for p in shown], **line)
            right.plot(alphas, [max(p.duality_gap, SMALLEST_GAP) for p in shown], **line)
        left.set(xscale="log", xlabel="alpha", ylabel="held-out error")
        right.set(xscale="log", yscale="log", xlabel="alpha", ylabel=GAP_LABEL)
        right.set_ylim(SMALLEST_GAP, 1)
        left.legend(fontsize=8)

    return _drawn(draw, 9, 3.6)


def draw_frontier(compression: Compression) -> str:
    """The predicted error of the best allocation against the size, and the model itself."""
    return _drawn(
        lambda figure: _count_sizes(compression.plot_frontier(figure.add_subplot())), 7, 4
    )


def draw_choices(compression: Compression) -> str:
    """Errors and gap of each student, in the order in which they were fitted."""
    choices = compression.choices
    places = np.arange(len(choices))

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        left.plot([c.activation_error for c in choices], places, "o", label="activation error")
        left.plot(
            [c.output_change for c in choices], places, "s", label="of the model's output, expected"
        )
        gaps = [max(c.relative_gap, SMALLEST_GAP) for c in choices]
        right.plot(gaps, places, "o", clip_on=False)
        # A name may hold what would be read as a formula.
        left.set_yticks(places, [c.block for c in choices], parse_math=False)
        left.set_ylim(len(choices) - 0.5, -0.5)
        left.set(xlabel="held-out error")
        left.set_xlim(left=0)
        right.set(xscale="log", xlabel=GAP_LABEL)
        right.set_xlim(SMALLEST_GAP, 1)
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2)

    return _drawn(draw, 9, 1.5 + 0.3 * len(choices))


def draw_curves(compression: Compression) -> str:
    """Expected change of the output against the size of a student, for every site."""

    def draw(figure: Figure) -> None:
        ax = figure.add_subplot()
        chosen = {choice.block: choice for choice in compression.choices}
        others: dict[str, Any] = {"color": "0.7", "lw": 0.8, "label": "not replaced"}
        for name, curve in compression.curves.items():
            if name not in chosen:
                ax.plot(*curve.T, **others)
                others["label"] = None
        for number, choice in enumerate(chosen.values()):
            color = f"C{number % 10}"
            if choice.block in compression.curves:
                ax.plot(*compression.curves[choice.block].T, color=color)
            label = choice.block.replace("$", r"\$")
            ax.plot([choice.parameters], [choice.output_change], "o", color=color, label=label)
        ax.set(yscale="log", xlabel="parameters of the student")
        ax.set_ylabel("expected error of the output, alone")
        _count_sizes(ax)
        figure.legend(fontsize=8, loc="outside right upper")

    return _drawn(draw, 9, max(4.0, 0.8 + 0.2 * len(compression.choices)))


def draw_latency(timings: Sequence[Timing]) -> str:
    """Medians before and after, with quartiles, a panel for each batch size."""
    sizes = list(dict.fromkeys(timing.batch_size for timing in timings))

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(sizes), squeeze=False)[0]
        for ax, size in zip(panels, sizes, strict=True):
            shown = [timing for timing in timings if timing.batch_size == size]
            for which, shift in (("before", -0.2), ("after", 0.2)):
                bars = [(k, getattr(timing, which)) for k, timing in enumerate(shown)]
                bars = [(k, latency) for k, latency in bars if latency is not None]
                medians = [1e3 * latency.median for _, latency in bars]
                spread = [
                    [1e3 * (latency.median - latency.low) for _, latency in bars],
                    [1e3 * (latency.high - latency.median) for _, latency in bars],
                ]
                ax.barh(
                    [k + shift for k, _ in bars],
                    medians,
                    0.38,
                    xerr=spread,
                    label=which,
                    color="0.6" if which == "before" else "C0",
                )
            ax.set_yticks(range(len(shown)), [timing.runtime for timing in shown])
            ax.set_ylim(len(shown) - 0.5, -0.5)
            ax.grid(False, axis="y")
            ax.set(title=f"batch of {size:,}", xlabel="milliseconds")
        panels[0].legend(fontsize=8)

    return _drawn(draw, 9, 1.6 + 0.7 * len(timings) / len(sizes))
