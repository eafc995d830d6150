"""What the HTML pages of a distillation and of a compression share.

Each says what was replaced by what, draws size against error and the paths behind it, and gives the
sizes and latencies before and after that are measured when it is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import cvxdistill
from cvxdistill.atomic_files import check_parent, replacing
from cvxdistill.html_measurements import Measurements
from cvxdistill.html_page import Page
from cvxdistill.html_pictures import check_matplotlib, draw_latency

if TYPE_CHECKING:
    from cvxdistill.adapters import Latency


def check_request(path: str | Path, batch_sizes: Sequence[int]) -> tuple[int, ...]:
    """Refuse what can be refused before anything is measured."""
    from cvxdistill.adapters.latency import check_batch_sizes

    check_parent(path, "path")
    check_matplotlib()
    return check_batch_sizes(batch_sizes)


def write_page(page: Page, path: str | Path) -> None:
    """Write the file, all of it or nothing."""
    now = datetime.now().astimezone()
    html = page.html(f"cvxdistill {cvxdistill.__version__}, {now:%Y-%m-%d %H:%M %Z}")
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def add_measurements(
    page: Page, measured: Measurements, parameters: tuple[int, int] | None
) -> None:
    """Add the section of sizes and latencies; without parameters where those are not known."""
    page.section("Size and latency, before and after")
    sizes: list[tuple[str, int | None, int | None]] = []
    if parameters is not None:
        sizes.append(("Parameters", *parameters))
    sizes.append(("State dict, bytes", *measured.state_bytes))
    if measured.onnx_bytes[1] is not None:
        sizes.append(("ONNX file, bytes", *measured.onnx_bytes))
    page.table(
        "Sizes",
        ("size", "before", "after", "times smaller"),
        [
            (
                name,
                _whole(before),
                _whole(after),
                f"{before / after:.2f}" if before and after else "-",
            )
            for name, before, after in sizes
        ],
    )
    page.picture(
        draw_latency(measured.timings),
        "Bars of the median latency before and after: "
        + "; ".join(
            f"{t.runtime}, batch of {t.batch_size}: {_milliseconds(t.before)} and "
            f"{_milliseconds(t.after)} ms"
            for t in measured.timings
        )
        + ".",
        "Median latency of one forward pass; lines from quartile to quartile.",
    )
    page.table(
        f"Latency of one forward pass in milliseconds, on {measured.device}",
        (
            "runtime", "batch", "before, median", "before, quartiles", "after, median",
            "after, quartiles", "times faster", "passes",
        ),
        [
            (
                t.runtime,
                f"{t.batch_size:,}",
                _milliseconds(t.before),
                _quartiles(t.before),
                _milliseconds(t.after),
                _quartiles(t.after),
                f"{t.before.median / t.after.median:.2f}" if t.before else "-",
                f"{t.after.rounds:,}",
            )
            for t in measured.timings
        ],
    )  # fmt: skip
    page.text(
        "Measured when this page was written, after warming up, one pass before and one after in "
        "turn, so that noise of the machine hits both.",
        "onnxruntime ran on the processor, with as many threads as torch has."
        if not measured.onnx_note
        else measured.onnx_note,
        note=True,
    )


def measured_figures(measured: Measurements) -> list[tuple[str, str, str]]:
    """The key figures of sizes and latencies."""
    before, after = measured.state_bytes
    if before is None:
        figures = [("State dict", _short(after), "")]
    else:
        figures = [change("State dict", before, after, _short(before), _short(after))]
    for timing in measured.timings:
        if timing.runtime == "torch":
            name = f"Latency, batch of {timing.batch_size:,}"
            old, new = timing.before, timing.after
            shown = f"{_milliseconds(new)} ms"
            if old is None:
                figures.append((name, shown, "torch, median"))
            else:
                figures.append(
                    change(
                        name, old.median, new.median, _milliseconds(old), shown,
                        "faster", "slower",
                    )
                )  # fmt: skip
    return figures


def change(
    name: str,
    before: float,
    after: float,
    before_text: str,
    after_text: str,
    less: str = "smaller",
    more: str = "larger",
) -> tuple[str, str, str]:
    """A key figure with how many times less it has become."""
    if not before or not after:
        remark = ""
    elif after <= before:
        remark = f"{before / after:.2f} times {less}"
    else:
        remark = f"{after / before:.2f} times {more}"
    return name, f"{before_text} → {after_text}", remark


def _whole(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _short(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def _milliseconds(latency: Latency | None) -> str:
    return "-" if latency is None else f"{1e3 * latency.median:.3f}"


def _quartiles(latency: Latency | None) -> str:
    return "-" if latency is None else f"{1e3 * latency.low:.3f} to {1e3 * latency.high:.3f}"


def phases(seconds: dict[str, float]) -> str:
    """How long each phase took."""
    return ", ".join(f"{phase} {count:.1f} s" for phase, count in seconds.items())
