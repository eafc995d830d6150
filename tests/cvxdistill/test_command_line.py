from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cvxdistill.atomic_files import replacing
from cvxdistill.command_line import main

SOURCE = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Sequential(
            nn.Conv2d(4, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()
        ),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3),
    )
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refusal(*arguments: object) -> str:
    """The one line that a refused command prints."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert not result.stdout
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    return lines[0]


@pytest.fixture
def torch_installed() -> None:
    pytest.importorskip("torch")


@pytest.fixture
def work(tmp_path: Path, torch_installed: None) -> Path:
    """A folder with a network, images with labels, and nothing else."""
    (tmp_path / "net.py").write_text(SOURCE)
    rng = np.random.default_rng(0)
    np.savez(
        tmp_path / "d.npz",
        X=rng.standard_normal((60, 1, 6, 6)).astype(np.float32),
        y=rng.integers(0, 3, 60),
    )
    return tmp_path


def test_help_and_version_do_not_load_torch() -> None:
    code = (
        "import sys\n"
        "from click.testing import CliRunner\n"
        "from cvxdistill.command_line import main\n"
        "for arguments in (['--help'], ['--version'], ['distill', '--help']):\n"
        "    assert CliRunner().invoke(main, arguments).exit_code == 0\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_version_is_the_packages() -> None:
    import cvxdistill

    assert run("--version").output.strip() == f"cvxdistill, version {cvxdistill.__version__}"


def test_python_m_cvxdistill_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cvxdistill", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("Usage: cvxdistill")
    assert all(command in done.stdout for command in ("demo", "inspect", "distill"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--output", "{folder}/demo"),
        ("inspect", "net.py:network", "--input-shape", "3"),
        ("distill", "net.py:network", "1", "--data", "d.npy"),
    ],
)
def test_without_torch_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    for name in [n for n in sys.modules if n.startswith("cvxdistill.adapters")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refusal(*(argument.format(folder=tmp_path) for argument in arguments))
    assert message.endswith('pip install "cvxdistill[torch]"')
    assert not list(tmp_path.iterdir())


def test_inspect_shows_the_blocks_of_a_file(work: Path) -> None:
    result = run(
        "inspect", f"{work}/net.py:network", "--input-shape", "1,6,6",
        "--depth", 1, "--csv", work / "t.csv",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "24 x 6 x 6" in result.stdout
    assert "1.0" not in result.stdout
    lines = (work / "t.csv").read_text().splitlines()
    assert len(lines) == 1 + 5
    # 4 * 24 * 9 + 24 and 24 * 24 * 9 + 24 parameters.
    assert lines[2].split(",")[0] == "1"
    assert "6096" in lines[2]


def test_inspect_reads_weights_and_an_example_from_data(work: Path) -> None:
    import torch

    from cvxdistill.adapters.model_loading import load_model

    torch.save(load_model(f"{work}/net.py:network").state_dict(), work / "w.pt")
    result = run(
        "inspect", f"{work}/net.py:network", "--weights", work / "w.pt", "--data", work / "d.npz"
    )
    assert result.exit_code == 0, result.output
    assert "1 x 6 x 6" in result.stdout


def test_distill_writes_a_student_and_a_report_and_measures_accuracy(work: Path) -> None:
    from cvxdistill import load_student

    result = run(
        "distill", f"{work}/net.py:network", "1", "--data", work / "d.npz", "--output",
        work / "s.safetensors", "--report", work / "r.csv", "--student", "linear", "--quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert not result.stderr
    assert "accuracy on these 60 inputs: " in result.stdout
    student = load_student(work / "s.safetensors")
    assert student.layout.output_shape == (24, 6, 6)
    report = (work / "r.csv").read_text().splitlines()
    assert "error" in report[0]
    assert len(report) > 2
    assert {path.name for path in work.iterdir()} >= {"s.safetensors", "r.csv"}
    assert not [path for path in work.iterdir() if "tmp" in path.name]


def test_distill_takes_a_span_of_blocks(work: Path) -> None:
    arguments = ("distill", f"{work}/net.py:network", "--data", work / "d.npz", "--output",
                 work / "s.safetensors", "--student", "linear", "--quiet")  # fmt: skip
    result = run(*arguments, "0:1")
    assert result.exit_code == 0, result.output
    assert "Block 0:1: " in result.stdout
    assert "write '0:1'" in refusal(*arguments, "1:0")


@pytest.mark.parametrize("sparse", [[], ["--sparse"]])
def test_compress_writes_a_model_that_fits_the_budget_and_its_frontier(
    work: Path, sparse: list[str]
) -> None:
    import torch

    import cvxdistill

    out, png = work / "small.safetensors", work / "frontier.png"
    result = run(
        "compress", f"{work / 'net.py'}:network", "--data", work / "d.npz", "--max-parameters",
        3000, "--criterion", "agreement", "--output", out, "--frontier", png, "--quiet",
        *sparse,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert ("weights" in result.output) == bool(sparse)
    assert "classified otherwise" in result.output
    assert "accuracy on these 60 inputs" in result.output
    assert png.read_bytes()[:4] == b"\x89PNG"
    namespace: dict = {}
    exec(SOURCE, namespace)
    model = cvxdistill.load_compressed(namespace["network"](), out)
    stored = sum(tensor.numel() for tensor in model.state_dict().values())
    assert stored <= 3000
    assert f"-> {stored:,} parameters" in result.output
    assert model(torch.zeros(2, 1, 6, 6)).shape == (2, 3)


def test_compress_refuses_bad_input_in_one_line_and_writes_nothing(work: Path) -> None:
    source, before = f"{work / 'net.py'}:network", sorted(work.iterdir())
    call = ["compress", source, "--data", work / "d.npz", "--quiet"]
    out = ["--output", work / "small.safetensors"]
    assert "give one of" in refusal(*call, *out)
    assert "smallest possible" in refusal(*call, *out, "--max-parameters", 5)
    assert "no block named" in refusal(*call, *out, "--max-error", 0.1, "--blocks", "7:8")
    same = ["--output", work / "a", "--frontier", work / "a"]
    assert "both name" in refusal(*call, *same, "--max-error", 0.1)
    assert sorted(path for path in work.iterdir() if path.suffix != ".pyc") == before


def test_options_that_were_given_reach_distill_and_others_keep_its_defaults(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import cvxdistill.distillation

    calls: list[dict[str, object]] = []

    def stand_in(*_: object, **options: object) -> None:
        calls.append(options)
        raise ValueError("enough")

    monkeypatch.setattr(cvxdistill.distillation, "distill", stand_in)
    refusal(
        "distill", f"{work}/net.py:network", "1", "--data", work / "d.npz", "--n-gates", 5,
        "--alpha", 0.5, "--seed", 3, "--kernel-size", 3, "--max-rows", 100, "--gates", "gaussian",
        "--student", "gated", "--n-neurons", 8, "--polish", "group_elastic_net",
        "--max-neurons", 6,
    )  # fmt: skip
    refusal("distill", f"{work}/net.py:network", "1", "--data", work / "d.npz", "--quiet")
    given = {
        "n_gates": 5, "alpha": 0.5, "random_state": 3, "kernel_size": 3, "max_rows": 100,
        "gates": "gaussian", "student": "gated", "n_neurons": 8, "verbose": 1,
        "polish": "group_elastic_net", "max_neurons": 6,
    }  # fmt: skip
    assert calls == [given, {"verbose": 0}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1.5", "--data", "{work}/d.npz"), "no block named '1.5'"),
        (("1", "--data", "{work}/absent.npy"), "data: there is no file or folder"),
        (("1", "--data", "{work}/net.py"), "data must be a .npy file"),
        (("1", "--data", "{work}/d.npz", "--key", "Z"), "has no array 'Z'"),
        (("1", "--data", "{work}/flat.npy"), r"fails on one input of shape \(36,\)"),
        (("1", "--data", "{work}/d.npz", "--mean", "0,0"), "mean must be 1 finite number or 1"),
        (("1", "--data", "{work}/d.npz", "--alpha", "-1"), "alpha must be positive"),
        (("1", "--data", "{work}/d.npz", "--weights", "{work}/w.pt"), "weights: there is no file"),
        (("1", "--data", "{work}/d.npz", "--output", "{work}/no/s"), "--output: the folder"),
        (("1", "--data", "{work}/d.npz", "--output", "{work}"), "--output: .* is a folder"),
        (("1", "--data", "{work}/d.npz", "--report", "{work}/no/r"), "--report: the folder"),
        (
            ("1", "--data", "{work}/d.npz", "--output", "{work}/a", "--report", "{work}/a"),
            "--output and --report both name",
        ),
    ],
)
def test_distill_refuses_bad_input_in_one_line_and_writes_nothing(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    np.save(work / "flat.npy", np.ones((4, 36)))
    monkeypatch.chdir(work)
    before = set(work.iterdir())
    found = refusal("distill", "net.py:network", *(a.format(work=work) for a in arguments))
    assert re.search(message, found), found
    assert {path for path in work.iterdir() if path.name != "__pycache__"} == before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("net.py", "must be 'package.module:factory'"),
        ("absent.py:network", "there is no file absent.py"),
        ("net.py:newtork", "Did you mean 'network'"),
    ],
)
def test_inspect_refuses_an_unknown_model_in_one_line(
    work: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.chdir(work)
    assert message in refusal("inspect", spec, "--input-shape", "1,6,6")


def test_inspect_says_why_the_model_cannot_take_an_input(work: Path) -> None:
    message = refusal("inspect", f"{work}/net.py:network", "--input-shape", "3,6,6")
    assert "the model fails on one input of shape (3, 6, 6): RuntimeError" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give exactly one of --input-shape and --data"),
        (("--input-shape", "1,6,6", "--data", "d.npz"), "give exactly one"),
        (("--input-shape", "1,six,6"), "'1,six,6' is not whole numbers with commas"),
        (("--input-shape", "1,0,6"), "'1,0,6' holds a number below 1"),
        (("--input-shape", "1,6,6", "--depth", "0"), "'--depth'"),
        (("--data", "d.npz", "--mean", "a"), "'a' is not numbers with commas"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(arguments: tuple[str, ...], message: str) -> None:
    result = run("inspect", "net.py:network", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_file_is_replaced_only_when_all_of_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".csv"
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_demo_prints_one_table_and_writes_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torch_installed: None
) -> None:
    from cvxdistill import demonstration

    monkeypatch.setattr(demonstration, "EPOCHS", 1)
    monkeypatch.setattr(demonstration, "N_GATES", 2)
    monkeypatch.setattr(demonstration, "TOLERANCE", 0.5)
    result = run("demo", "--output", tmp_path / "new" / "demo", "--quiet")
    assert result.exit_code == 0, result.output
    rows = [line.split()[0] for line in result.stdout.splitlines()[:4]]
    assert rows == ["network", "teacher", "linear", "gated"]
    assert "*" in result.stdout
    table = (tmp_path / "new" / "demo" / "digits.csv").read_text().splitlines()
    assert table[1].startswith("teacher,,83328,85250,")
    assert {line.split(",")[0] for line in table[2:]} == {"linear student", "gated student"}
    pytest.importorskip("matplotlib")
    picture = (tmp_path / "new" / "demo" / "digits.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_the_digits_teacher_reaches_97_percent(torch_installed: None) -> None:
    from cvxdistill.demonstration import load_digit_images, measure_accuracy, train_teacher

    digits = load_digit_images(0)
    assert len(digits.test) == 450
    assert measure_accuracy(train_teacher(digits, 0), digits) >= 0.97


def test_the_digits_teacher_depends_on_its_seed_alone(
    monkeypatch: pytest.MonkeyPatch, torch_installed: None
) -> None:
    import torch

    from cvxdistill import demonstration

    monkeypatch.setattr(demonstration, "EPOCHS", 1)
    digits = demonstration.load_digit_images(0)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    first = demonstration.train_teacher(digits, 0).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    torch.rand(3)
    again = demonstration.train_teacher(digits, 0).state_dict()
    other = demonstration.train_teacher(digits, 1).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.2.weight"], other["head.2.weight"])
