from __future__ import annotations

import subprocess
import sys

import pytest

import cvxdistill

# None in sys.modules would do for us, but SciPy looks there for torch.
HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {0!r}:
            raise ModuleNotFoundError("No module named {0}", name=name)
sys.meta_path.insert(0, Hide())
"""
DOORS = [
    "Compression",
    "Distillation",
    "OnlineStudent",
    "compress",
    "distill",
    "inspect",
    "load_compressed",
    "load_online",
    "load_student",
    "swap_block",
]


def run(code, missing=""):
    """Standard output of code in a fresh interpreter, where one library cannot be found."""
    if missing:
        code = HIDE.format(missing) + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_name_is_imported_when_it_is_first_used_and_then_kept():
    code = (
        "import sys, cvxdistill\n"
        "print('cvxdistill.estimators' in sys.modules)\n"
        "cvxdistill.ConvexNNRegressor\n"
        "print('cvxdistill.estimators' in sys.modules, 'ConvexNNRegressor' in vars(cvxdistill))"
    )
    assert run(code).split() == ["False", "True", "True"]


def test_every_lazy_name_is_listed():
    assert {"__version__", *cvxdistill.__all__} <= set(dir(cvxdistill))
    assert sorted(cvxdistill.__all__) == cvxdistill.__all__


def test_names_are_those_of_their_modules():
    from cvxdistill import estimators, group_cross_validation, group_estimators

    assert cvxdistill.ConvexNNClassifier is estimators.ConvexNNClassifier
    assert cvxdistill.ConvexNNRegressor is estimators.ConvexNNRegressor
    assert cvxdistill.GroupElasticNet is group_estimators.GroupElasticNet
    assert cvxdistill.GroupElasticNetCV is group_cross_validation.GroupElasticNetCV


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'cvxdistill' has no attribute 'destill'"):
        cvxdistill.destill  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'destill'"):
        from cvxdistill import destill  # noqa: F401


@pytest.mark.parametrize("missing", ["torch", "safetensors"])
def test_a_torch_door_without_its_extra_says_what_to_install(missing):
    code = (
        "import cvxdistill\n"
        f"for name in {DOORS!r}:\n"
        "    try:\n"
        "        getattr(cvxdistill, name)\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    lines = run(code, missing).splitlines()
    assert len(lines) == len(DOORS)
    for name, line in zip(DOORS, lines, strict=True):
        assert line.startswith(f"cvxdistill.{name} needs ")
        assert line.endswith('which is not installed: pip install "cvxdistill[torch]"')


def test_estimators_work_without_torch():
    code = (
        "from cvxdistill import ConvexNNRegressor\n"
        "print(ConvexNNRegressor(n_gates=3, random_state=0).fit([[1.], [2.]], [1, 2]).n_iter_ > 0)"
    )
    assert run(code, "torch") == "True"
