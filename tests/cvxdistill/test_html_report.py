"""The HTML report: its tables are the report's numbers, and it needs nothing but itself."""

from __future__ import annotations

import base64
import re
import sys
from collections import OrderedDict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch")
pytest.importorskip("matplotlib")
from torch import nn  # noqa: E402

import cvxdistill  # noqa: E402
from cvxdistill import html_compression, html_measurements  # noqa: E402
from cvxdistill.adapters import latency, onnx_export  # noqa: E402
from cvxdistill.command_line import main  # noqa: E402
from cvxdistill.html_measurements import state_bytes  # noqa: E402

VOID = {"meta", "img", "br", "link", "input", "hr"}
# A block of this name would end the page, if it were let.
WICKED = "</td><script>$x_\"'&"


class Reader(HTMLParser):
    """Reads tables and pictures; fails where a tag is not closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: dict[str, list[list[str]]] = {}
        self.pictures: list[dict[str, str | None]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self._caption = ""
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs))
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.pictures.append(dict(attrs))
        if tag == "caption":
            self._caption = ""
        if tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        if tag in ("th", "td"):
            self.tables[self._caption][-1].append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        tag = self._open[-1] if self._open else ""
        if tag == "caption":
            self._caption += data
        if tag in ("th", "td"):
            self.tables[self._caption][-1][-1] += data
        if tag != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def table(self, start: str) -> list[dict[str, str]]:
        """The rows of the table whose caption starts so, by heading."""
        (found,) = [rows for caption, rows in self.tables.items() if caption.startswith(start)]
        return [dict(zip(found[0], row, strict=True)) for row in found[1:]]


class Net(nn.Module):
    """A stage with a name that HTML and formulas would choke on, and a head."""

    def __init__(self, name: str = WICKED) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1)]
        self.stem = nn.Sequential(OrderedDict({name: nn.Sequential(*layers)}))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 5))

    def forward(self, x):
        return self.head(self.stem(x))


BLOCK = f"stem.{WICKED}"


def images(n: int = 120) -> torch.Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(latency, "SECONDS", 0.0)


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


@pytest.fixture(scope="module")
def distilled(net) -> cvxdistill.Distillation:
    options = {"n_gates": 4, "max_neurons": 6, "polish": "group_elastic_net", "max_iter": 50}
    return cvxdistill.distill(net, BLOCK, images(), verbose=0, **options)


@pytest.fixture(scope="module")
def compressed(net) -> cvxdistill.Compression:
    return cvxdistill.compress(net, images(), max_parameters=1500, verbose=0)


def read(report, path: Path, **options) -> Reader:
    assert report.to_html(path, verbose=0, **{"onnx": False, **options}) is None
    return Reader(path.read_text(encoding="utf-8"))


def is_close(text: str, number: float, digits: float) -> bool:
    return abs(float(text.replace(",", "")) - number) <= digits


def test_every_candidate_is_in_the_table_with_its_numbers(distilled, tmp_path):
    report = distilled.report
    rows = read(report, tmp_path / "page.html").table("Candidates")
    assert len(rows) == len(report.candidates) > 4
    for row, candidate in zip(rows, report.candidates, strict=True):
        assert row["student"] == candidate.kind
        for heading, value in (
            ("units", candidate.n_neurons),
            ("gates", candidate.n_gates),
            ("parameters", candidate.parameters),
            ("trainable", candidate.trainable),
        ):
            assert row[heading] == f"{value:,}"
        assert is_close(row["error"], candidate.error, 5e-5)
        assert float(row["alpha"]) == pytest.approx(candidate.alpha, rel=1e-2)
        assert float(row["gap"]) == pytest.approx(candidate.duality_gap, rel=1e-1)
        assert row[""] == ("chosen" if candidate is report.chosen else "")


def test_the_path_holds_every_alpha_with_its_error_and_gap(distilled, tmp_path):
    report = distilled.report
    kinds = [point.kind for point in report.path]
    # Four strengths of the ridge, and of the gated path at least what ends it early.
    assert kinds.count("linear") == 4 and kinds.count("gated") >= 3
    rows = read(report, tmp_path / "page.html").table("Every alpha")
    polished = [p for each in report.polished for p in each.polishing.path if p.alpha is not None]
    assert len(rows) == len(report.path) + len(polished) > len(report.path)
    for row, point in zip(rows, (*report.path, *polished), strict=True):
        assert float(row["alpha"]) == pytest.approx(point.alpha, rel=1e-2)
        assert is_close(row["error"], point.error, 5e-5)
        assert float(row["gap"]) == pytest.approx(point.duality_gap, rel=1e-1)
        assert row["units"] == f"{point.n_neurons:,}"
    # The students came from it: none is better than the best of its alpha.
    for candidate in (c for c in report.candidates if c.kind == "gated"):
        (point,) = [p for p in report.path if p.kind == "gated" and p.alpha == candidate.alpha]
        assert point.error <= candidate.error and point.duality_gap == candidate.duality_gap
    errors = [candidate.error for candidate in report.candidates if candidate.kind == "gated"]
    assert min(p.error for p in report.path if p.kind == "gated") == min(errors)


def test_the_path_of_streamed_students_is_kept_too(net):
    report = cvxdistill.distill(
        net, BLOCK, images(), penalty="nuclear", n_gates=4, verbose=0
    ).report
    alphas = {(point.kind, point.alpha) for point in report.path}
    assert {(candidate.kind, candidate.alpha) for candidate in report.candidates} <= alphas
    assert {point.kind for point in report.path} == {"linear", "gated"}
    for kind in ("linear", "gated"):
        errors = [candidate.error for candidate in report.candidates if candidate.kind == kind]
        assert min(p.error for p in report.path if p.kind == kind) == min(errors)


def test_the_table_of_blocks_is_that_of_inspect_with_the_replaced_one_marked(
    distilled, net, tmp_path
):
    rows = read(distilled.report, tmp_path / "page.html").table("Before the distillation")
    table = cvxdistill.inspect(net, images(2))
    assert [row["block"] for row in rows] == [*(info.name for info in table), "total"]
    for row, info in zip(rows, (*table, table.model), strict=True):
        assert row["parameters"] == f"{info.parameters:,}"
        assert row["multiply-adds"] == f"{info.multiply_adds:,}"
        assert row["share"] == f"{info.share:.1%}"
    marks = {row["block"]: row[""] for row in rows}
    assert marks[BLOCK] == "replaced" and marks[f"{BLOCK}.0"] == "inside"
    assert marks["head"] == marks["stem"] == ""


def test_every_choice_of_a_compression_is_in_the_table(compressed, tmp_path):
    assert compressed.choices
    page = read(compressed, tmp_path / "page.html")
    rows = page.table("Students")
    for row, choice in zip(rows, compressed.choices, strict=True):
        assert (row["block"], row["student"]) == (choice.block, choice.student)
        assert row["before"] == f"{choice.parameters_before:,}"
        assert row["after"] == f"{choice.parameters:,}"
        assert is_close(row["activation error"], choice.activation_error, 5e-5)
        assert is_close(row["output change"], choice.output_change, 5e-5)
        assert float(row["gap"]) == pytest.approx(choice.relative_gap, rel=1e-1)
    assert f"{compressed.before:,} → {compressed.after:,}" in page.text
    frontier = {(f"{size:,.0f}", f"{error:.4f}") for size, error in compressed.frontier}
    points = [(row["parameters"], row["predicted error"]) for row in page.table("Some points")]
    assert len(points) > 5 and set(points) <= frontier


def test_the_curves_of_a_compression_hold_what_was_chosen(compressed):
    assert set(compressed.curves) <= set(compressed.sites)
    for choice in compressed.choices:
        curve = compressed.curves[choice.block].tolist()
        assert [choice.parameters, choice.output_change] in curve
        assert curve == sorted(curve)


def test_a_compression_that_replaced_nothing_says_so(net, tmp_path):
    result = cvxdistill.compress(net, images(40), max_parameters=10**9, verbose=0)
    page = read(result, tmp_path / "page.html")
    assert "Nothing had to be replaced." in page.text
    assert page.table("Students") == [] and len(page.pictures) == 2


def test_sizes_and_latencies_before_and_after(compressed, net, tmp_path):
    page = read(compressed, tmp_path / "page.html", batch_sizes=(2, 7))
    sizes = {row["size"]: row for row in page.table("Sizes")}
    assert sizes["Parameters"]["after"] == f"{compressed.after:,}"
    stored = sum(t.numel() * t.element_size() for t in compressed.model.state_dict().values())
    assert sizes["State dict, bytes"]["after"] == f"{stored:,}"
    assert sizes["State dict, bytes"]["before"] == f"{state_bytes(net):,}"
    (caption,) = [caption for caption in page.tables if caption.startswith("Latency")]
    assert f"{torch.get_num_threads()} thread" in caption
    rows = page.table("Latency")
    assert [(row["runtime"], row["batch"]) for row in rows] == [("torch", "2"), ("torch", "7")]
    for row in rows:
        before, after = float(row["before, median"]), float(row["after, median"])
        assert before > 0 and after > 0
        assert float(row["times faster"]) == pytest.approx(before / after, rel=0.1)
    assert "ONNX files were not asked for." in page.text


def test_tied_weights_are_counted_once():
    one, two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    two.weight = one.weight
    assert state_bytes(nn.Sequential(one, two)) == 64


def test_onnx_files_are_weighed_and_timed(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    options = {"student": "linear", "n_neurons": 2, "verbose": 0}
    distilled = cvxdistill.distill(Net("stage").eval(), "stem.stage", images(), **options)
    page = read(distilled.report, tmp_path / "page.html", onnx=True, batch_sizes=(1, 3))
    runtimes = [(row["runtime"], row["batch"]) for row in page.table("Latency")]
    assert runtimes == [("torch", "1"), ("torch", "3"), ("onnxruntime", "1"), ("onnxruntime", "3")]
    (row,) = [row for row in page.table("Sizes") if row["size"].startswith("ONNX")]
    distilled.export_onnx(tmp_path / "model.onnx")
    written = (tmp_path / "model.onnx").stat().st_size
    # The file also names where in the source each step came from.
    after = int(row["after"].replace(",", ""))
    assert after == pytest.approx(written, rel=0.05)
    assert after < int(row["before"].replace(",", ""))


def test_what_onnx_cannot_express_is_said(distilled, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise ValueError("torch cannot express this model in ONNX: <why>")

    monkeypatch.setattr("cvxdistill.adapters.export_onnx", refuse)
    page = read(distilled.report, tmp_path / "page.html", onnx=True)
    assert "No ONNX figures: torch cannot express this model in ONNX: <why>" in page.text
    assert {row["runtime"] for row in page.table("Latency")} == {"torch"}


def test_without_onnx_the_page_says_what_is_missing(compressed, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == "onnx" else name)
    page = read(compressed, tmp_path / "page.html", onnx=True)
    assert 'export_onnx needs onnx: pip install "cvxdistill[onnx]"' in page.text
    assert {row["runtime"] for row in page.table("Latency")} == {"torch"}
    assert all("ONNX" not in row["size"] for row in page.table("Sizes"))


def test_in_place_there_is_no_original_and_the_page_says_so(tmp_path):
    model = Net().eval()
    result = cvxdistill.distill(model, BLOCK, images(), student="linear", inplace=True, verbose=0)
    page = read(result.report, tmp_path / "page.html")
    assert "there is no original left to measure" in page.text
    for row in page.table("Latency"):
        assert row["before, median"] == row["times faster"] == "-"
        assert float(row["after, median"]) > 0
    marks = {row["block"]: row[""] for row in page.table("With the student in place")}
    assert marks[BLOCK] == "student"


def test_a_quantised_student_is_measured_and_named(distilled, tmp_path):
    quantised = distilled.quantize("int8")
    page = read(quantised.report, tmp_path / "page.html")
    (row,) = [row for row in page.table("Sizes") if row["size"].startswith("State dict")]
    assert row["after"] == f"{state_bytes(quantised.model):,}"
    assert state_bytes(quantised.model) < state_bytes(distilled.model)
    assert f"quantised since, to {quantised.report.quantized}" in page.text


@pytest.mark.parametrize("kind", ["distilled", "compressed"])
def test_the_page_is_well_formed_and_needs_nothing_else(kind, tmp_path, request):
    result = request.getfixturevalue(kind)
    path = tmp_path / "page.html"
    page = read(getattr(result, "report", result), path)
    source = path.read_text(encoding="utf-8")
    assert source.startswith("<!DOCTYPE html>\n<html lang=")
    assert not re.search(r"https?:|url\(|@import|<script|<link|<iframe", source)
    for tag, attributes in page.tags:
        assert "href" not in attributes and not any(key.startswith("on") for key in attributes)
        assert "src" not in attributes or tag == "img"
        assert tag != "th" or attributes["scope"] in ("col", "row")
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(names)) == len(names) == len(page.tables)
    assert all(caption.strip() for caption in page.tables)
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert len(page.pictures) >= 3
    for picture in page.pictures:
        kind, _, content = (picture["src"] or "").partition(",")
        assert kind == "data:image/svg+xml;base64" and len(picture["alt"] or "") > 20
        svg = base64.b64decode(content, validate=True).decode()
        # What is drawn refers to its own parts only.
        assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', svg))
        assert "<image" not in svg and "<text" not in svg


def test_names_are_escaped(distilled, tmp_path):
    page = read(distilled.report, tmp_path / "page.html")
    assert any(row["block"] == BLOCK for row in page.table("Before the distillation"))
    assert BLOCK in page.text
    assert not any(tag == "script" for tag, _ in page.tags)


def test_bad_places_and_sizes_are_refused_before_any_work(compressed, tmp_path, monkeypatch):
    monkeypatch.setattr(html_compression, "measure", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(FileNotFoundError, match=r"path: the folder .* does not exist"):
        compressed.to_html(tmp_path / "nowhere" / "page.html")
    with pytest.raises(IsADirectoryError, match=r"path: .* is a folder"):
        compressed.to_html(tmp_path)
    with pytest.raises(ValueError, match="batch_sizes must hold positive integers"):
        compressed.to_html(tmp_path / "page.html", batch_sizes=(0,))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'matplotlib: pip install "cvxdistill\[plot\]"'):
        compressed.to_html(tmp_path / "page.html")
    assert not [*tmp_path.iterdir()]


def test_a_page_that_fails_leaves_the_file_as_it_was(distilled, tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("what was there")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(html_measurements, "state_bytes", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        distilled.report.to_html(path, verbose=0)
    monkeypatch.undo()
    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        distilled.report.to_html(path, verbose=0, onnx=False, batch_sizes=(1,))
    assert path.read_text() == "what was there" and len([*tmp_path.iterdir()]) == 1


SOURCE = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1))
    return nn.Sequential(nn.Conv2d(3, 4, 1), body, nn.Flatten(), nn.Linear(8 * 36, 3))
"""
COMMANDS = {"distill": ("1", "--student", "linear"), "compress": ("--max-parameters", "1500")}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_writes_the_page(command, tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(SOURCE)
    np.save(tmp_path / "d.npy", images(60).numpy())
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    # Without ONNX it is quick.
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None)
    call = [command, "net.py:network", *COMMANDS[command], "--data", "d.npy", "--quiet"]

    def run(*options: str) -> Result:
        return CliRunner().invoke(main, [*call, *options])

    for options, message in (
        (("--html", "no/page.html"), "--html: the folder no does not exist"),
        (("--html", "."), "--html: . is a folder"),
        (("--html", "a", "--output", "./a"), "--output and --html both name a"),
    ):
        refused = run(*options)
        assert refused.exit_code == 2 and message in refused.stderr and not refused.stdout
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        refused = run("--html", "page.html")
        assert refused.exit_code == 2 and 'pip install "cvxdistill[plot]"' in refused.stderr
    assert {path.name for path in tmp_path.iterdir()} == before
    done = run("--html", "page.html", "--output", "model.safetensors")
    assert done.exit_code == 0, done.output
    assert "page: page.html" in done.stdout and not done.stderr
    page = Reader((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.table("Sizes") and page.table("Latency")


def test_progress_is_shown_unless_it_is_not_wanted(compressed, tmp_path, capsys):
    compressed.to_html(tmp_path / "page.html", onnx=False, verbose=0)
    assert capsys.readouterr() == ("", "")
    compressed.to_html(tmp_path / "page.html", onnx=False)
    assert "measuring" in capsys.readouterr().err


def test_the_users_style_of_pictures_does_not_matter(compressed, tmp_path):
    import matplotlib

    plain = read(compressed, tmp_path / "page.html").pictures
    with matplotlib.rc_context({"text.color": "white", "text.usetex": True, "font.size": 30}):
        styled = read(compressed, tmp_path / "page.html").pictures
        assert matplotlib.rcParams["font.size"] == 30
    # Latencies differ; the frontier does not. Its clip paths bear random names.
    frontiers = [
        re.sub(r"(p[0-9a-f]{10}|m[0-9a-f]{10})", "", base64.b64decode(p[1]["src"][26:]).decode())
        for p in (plain, styled)
    ]
    assert frontiers[0] == frontiers[1]
