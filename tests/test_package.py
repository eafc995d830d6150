"""The package as a whole: what a wheel holds, what an import costs, which room may import which."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "cvxdistill": ROOT / "cvxdistill",
    "cvxdistill.solvers": ROOT / "solvers",
    "cvxdistill.adapters": ROOT / "adapters",
}
SOLVERS_MAY_IMPORT = {"numpy", "scipy", "numba", "threadpoolctl", "tqdm"}
MODULES = [
    pytest.param(room, path, id=f"{room}:{path.stem}")
    for room, folder in ROOMS.items()
    for path in sorted(folder.glob("*.py"))
]


def run_python(code: str, *, cwd: Path, path: Path | None = None) -> str:
    """Standard output of ``code`` in a fresh interpreter, with ``path`` first on its path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of what it is made of."""
    pytest.importorskip("build")
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.rst", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ROOMS.values():
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder, source / folder.name, ignore=ignore)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    expected = {
        "/".join([*room.split("."), path.name])
        for room, folder in ROOMS.items()
        for path in [*folder.glob("*.py"), folder / "py.typed"]
    }
    assert set(names) == expected


def test_wheel_works_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    modules = [
        room if path.stem == "__init__" else f"{room}.{path.stem}"
        for room, folder in ROOMS.items()
        for path in folder.glob("*.py")
        if path.stem != "__main__"
    ]
    code = (
        "import importlib\n"
        f"for name in {modules!r}:\n"
        "    print(importlib.import_module(name).__file__)"
    )
    files = run_python(code, cwd=tmp_path, path=site).splitlines()
    assert len(files) == len(modules)
    assert all(Path(file).is_relative_to(site) for file in files)


def test_import_loads_no_heavy_library_and_compiles_nothing(tmp_path: Path) -> None:
    code = "import sys, cvxdistill; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = set(run_python(code, cwd=tmp_path).split())
    assert "cvxdistill" in loaded
    # Without Numba nothing can have been compiled.
    assert not loaded & {"torch", "sklearn", "numba"}


def test_import_takes_less_than_half_a_second(tmp_path: Path) -> None:
    code = (
        "import time; start = time.perf_counter()\n"
        "import cvxdistill\n"
        "print(time.perf_counter() - start)"
    )
    # The best of several: the first reads cold files, and the machine has other work.
    assert min(float(run_python(code, cwd=tmp_path)) for _ in range(4)) < 0.5


def test_solvers_load_neither_torch_nor_sklearn(tmp_path: Path) -> None:
    code = "import sys, cvxdistill.solvers; print(*{'torch', 'sklearn'} & set(sys.modules))"
    assert run_python(code, cwd=tmp_path) == ""


def test_estimators_do_not_load_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from cvxdistill import ConvexNNClassifier, ConvexNNRegressor\n"
        "print('torch' in sys.modules)"
    )
    assert run_python(code, cwd=tmp_path) == "False"


def test_every_public_name_resolves() -> None:
    pytest.importorskip("torch")
    import cvxdistill

    assert cvxdistill.__all__
    assert set(cvxdistill.__all__) <= set(dir(cvxdistill))
    for name in cvxdistill.__all__:
        assert getattr(cvxdistill, name) is not None, name


def test_no_module_bears_a_public_name() -> None:
    import cvxdistill

    modules = {path.stem for path in ROOMS["cvxdistill"].glob("*.py")} | {"solvers", "adapters"}
    assert not modules & set(cvxdistill.__all__)


def imported_modules(node: ast.AST, room: str) -> Iterator[str]:
    """Dotted names that one import statement reaches, relative ones resolved in ``room``."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = room.split(".")
        start = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*start, *filter(None, [node.module])])
        # "from cvxdistill import solvers" reaches a room, not a name.
        yield from (f"{base}.{alias.name}" for alias in node.names)


def statements_run_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes outside functions and outside ``if TYPE_CHECKING:``."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting.extend(node.orelse)
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def forbidden_imports(room: str, source: str) -> list[str]:
    """Imports in ``source``, a module of ``room``, that its doors do not allow."""
    tree = ast.parse(source)
    everywhere = [name for node in ast.walk(tree) for name in imported_modules(node, room)]
    if room == "cvxdistill.solvers":
        allowed = {"cvxdistill.solvers", *SOLVERS_MAY_IMPORT, *sys.stdlib_module_names}
        return [name for name in everywhere if not within(name, *allowed)]
    if room == "cvxdistill.adapters":
        own = ("cvxdistill.solvers", "cvxdistill.adapters")
        return [
            name
            for name in everywhere
            if within(name, "sklearn", "cvxdistill") and not within(name, *own)
        ]
    at_import = [
        name for node in statements_run_at_import(tree) for name in imported_modules(node, room)
    ]
    return [name for name in at_import if within(name, "torch", "cvxdistill.adapters")]


@pytest.mark.parametrize(("room", "path"), MODULES)
def test_module_imports_only_through_the_doors(room: str, path: Path) -> None:
    assert forbidden_imports(room, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("cvxdistill.solvers", "import torch"),
        ("cvxdistill.solvers", "def f():\n    from sklearn.base import clone"),
        ("cvxdistill.solvers", "from cvxdistill import adapters"),
        ("cvxdistill.solvers", "from .. import distill"),
        ("cvxdistill.solvers", "import pandas as pd"),
        ("cvxdistill.adapters", "from cvxdistill.estimators import ConvexNNRegressor"),
        ("cvxdistill.adapters", "import sklearn.base"),
        ("cvxdistill", "import torch.nn as nn"),
        ("cvxdistill", "try:\n    from .adapters import capture\nexcept ImportError:\n    pass"),
    ],
)
def test_a_closed_door_is_noticed(room: str, source: str) -> None:
    assert len(forbidden_imports(room, source)) == 1


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("cvxdistill.solvers", "import numpy as np\nfrom .gates import sample_gates"),
        ("cvxdistill.adapters", "import torch\nfrom cvxdistill.solvers import RFISTA"),
        ("cvxdistill", "from cvxdistill.solvers import RFISTA"),
        ("cvxdistill", "def f():\n    import torch"),
        ("cvxdistill", "if TYPE_CHECKING:\n    import torch"),
    ],
)
def test_an_open_door_is_left_alone(room: str, source: str) -> None:
    assert forbidden_imports(room, source) == []
