"""The HTML report in a real browser: its tables are read and its pictures are drawn."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
from torch import nn  # noqa: E402

import cvxdistill  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is here")

# Put at the end of a copy of the page: it writes what there is to see into the page.
LOOK = """
<pre id="seen"></pre>
<script>
function pixels(image) {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
}
function inked(image) {
  const data = pixels(image);
  const colours = new Set();
  let count = 0;
  for (let k = 0; k < data.length; k += 4) {
    if (data[k + 3] > 0) {
      count += 1;
      colours.add(data.slice(k, k + 3).join());
    }
  }
  return [4 * count / data.length, colours.size];
}
window.addEventListener("load", () => {
  const seen = {
    title: document.title,
    heading: document.querySelector("h1").innerText,
    width: document.documentElement.scrollWidth,
    window: document.documentElement.clientWidth,
    requests: performance.getEntriesByType("resource").map((entry) => entry.name),
    pictures: [...document.images].map((image) => ({
      width: image.naturalWidth,
      shown: image.getBoundingClientRect().width,
      height: image.naturalHeight,
      inked: inked(image),
      alt: image.alt,
    })),
    tables: [...document.querySelectorAll("table")].map((table) => ({
      caption: table.caption.innerText,
      height: table.getBoundingClientRect().height,
      rows: [...table.rows].map((row) => [...row.cells].map((cell) => cell.innerText)),
    })),
    colour: getComputedStyle(document.body).color,
    background: getComputedStyle(document.body).backgroundColor,
  };
  document.getElementById("seen").textContent = JSON.stringify(seen);
});
</script>
"""


def look(page: Path, *options: str) -> dict[str, Any]:
    """What a headless browser makes of a page."""
    source = page.read_text(encoding="utf-8")
    assert source.count("</main>") == 1
    copy = page.with_name("looked-at.html")
    copy.write_text(source.replace("</main>", f"{LOOK}</main>"), encoding="utf-8")
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            f"--user-data-dir={page.parent / 'profile'}",
            "--window-size=1200,900",
            "--virtual-time-budget=20000",
            *options,
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    _, start, rest = done.stdout.partition('<pre id="seen">')
    assert start, done.stdout[:2000] + done.stderr
    return json.loads(unescape(rest.partition("</pre>")[0]))


def check_pictures(seen: dict[str, Any], count: int) -> None:
    assert len(seen["pictures"]) == count
    for picture in seen["pictures"]:
        assert picture["width"] > 300 and picture["height"] > 50
        assert picture["shown"] > 300
        share, colours = picture["inked"]
        # Not blank, not all over, and more than axes in black.
        assert 0.005 < share < 0.9 and colours > 20
        assert len(picture["alt"]) > 20


def check_tables(seen: dict[str, Any]) -> dict[str, list[list[str]]]:
    for table in seen["tables"]:
        assert table["height"] > 20 and table["caption"]
    return {table["caption"]: table["rows"] for table in seen["tables"]}


def check_page(seen: dict[str, Any]) -> None:
    """Nothing is fetched, nothing is wider than the window."""
    assert not [name for name in seen["requests"] if not name.startswith("data:")]
    assert seen["width"] <= seen["window"]


def numbers_of(choices: Any) -> list[tuple[str, ...]]:
    return [
        (c.block, c.student, f"{c.parameters_before:,}", f"{c.parameters:,}",
         f"{c.activation_error:.4f}", f"{c.output_change:.4f}", f"{c.relative_gap:.1e}")
        for c in choices
    ]  # fmt: skip


@pytest.fixture(scope="module")
def distilled() -> cvxdistill.Distillation:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(4, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), body, nn.Flatten(), nn.Linear(8 * 36, 5))
    options = {"n_gates": 4, "max_iter": 50, "verbose": 0}
    return cvxdistill.distill(model.eval(), "1", torch.randn(120, 3, 6, 6), **options)


def test_a_distillation_in_the_browser(distilled, tmp_path):
    report = distilled.report
    report.to_html(tmp_path / "page.html", verbose=0, batch_sizes=(1, 3))
    seen = look(tmp_path / "page.html")
    check_page(seen)
    check_pictures(seen, 3)
    rows = check_tables(seen)["Candidates"]
    assert rows[0][:4] == ["student", "units", "gates", "parameters"]
    assert [(row[0], row[3], row[5], row[-1]) for row in rows[1:]] == [
        (c.kind, f"{c.parameters:,}", f"{c.error:.4f}", "chosen" if c is report.chosen else "")
        for c in report.candidates
    ]


def test_the_page_can_be_read_in_the_dark(distilled, tmp_path):
    distilled.report.to_html(tmp_path / "page.html", verbose=0, onnx=False, batch_sizes=(1,))

    def brightness(colour: str) -> float:
        red, green, blue = map(int, colour[4:-1].split(", "))
        return (red + green + blue) / 3

    light = look(tmp_path / "page.html")
    dark = look(tmp_path / "page.html", "--blink-settings=preferredColorScheme=0")
    assert brightness(light["background"]) - brightness(light["colour"]) > 150
    assert brightness(dark["colour"]) - brightness(dark["background"]) > 150


@pytest.mark.skipif(
    not os.environ.get("CVXDISTILL_DATA"), reason="CVXDISTILL_DATA is not set: no ResNet-18"
)
def test_the_report_of_the_resnet18_compression_in_the_browser(tmp_path):
    from datasets import load_cifar10, normalise
    from teachers import load_teacher

    teacher = load_teacher("resnet18")
    inputs = normalise(load_cifar10("train", 300)[0], teacher.mean, teacher.std)
    # Few images and three blocks: what is looked at is the page.
    blocks = ["layer2.1", "layer4.0", "layer4.1"]
    result = cvxdistill.compress(
        teacher.model, inputs, max_parameters=4_000_000, blocks=blocks, verbose=0
    )
    assert result.after <= 4_000_000 < result.before == 11_181_642 and result.choices
    result.to_html(tmp_path / "page.html", verbose=0, onnx=False)
    seen = look(tmp_path / "page.html")
    assert seen["title"] == seen["heading"] == "ResNet18 compressed"
    check_page(seen)
    check_pictures(seen, 4)
    tables = check_tables(seen)
    heads, *rows = tables["Students, in the order in which they were fitted"]
    assert heads[:4] == ["block", "student", "before", "after"]
    assert [tuple(row[:7]) for row in rows] == numbers_of(result.choices)
    sizes = {row[0]: row[1:] for row in tables["Sizes"]}
    assert sizes["Parameters"][:2] == ["11,181,642", f"{result.after:,}"]
    (latencies,) = [tables[caption] for caption in tables if caption.startswith("Latency")]
    assert [row[1] for row in latencies[1:]] == ["1", "64"]
    for row in latencies[1:]:
        # Of 11 million parameters no pass takes less than a tenth of a millisecond.
        assert float(row[2]) > 0.1 and float(row[4]) > 0
