"""Convex two-layer networks: estimators, distillation and a command line.

Names are imported when they are first used (PEP 562), so that ``import cvxdistill`` is quick and
the estimators work where torch is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvxdistill.adapters import load_compressed, load_student, swap_block
    from cvxdistill.compression import compress
    from cvxdistill.compression_report import Compression
    from cvxdistill.compressor import Compressor
    from cvxdistill.distillation import Distillation, distill
    from cvxdistill.estimators import ConvexNNClassifier, ConvexNNRegressor
    from cvxdistill.group_cross_validation import GroupElasticNetCV
    from cvxdistill.group_estimators import GroupElasticNet
    from cvxdistill.inspection import inspect
    from cvxdistill.online import OnlineStudent, load_online
    from cvxdistill.polishing import polish

    __version__: str

__all__ = [
    "Compression",
    "Compressor",
    "ConvexNNClassifier",
    "ConvexNNRegressor",
    "Distillation",
    "GroupElasticNet",
    "GroupElasticNetCV",
    "OnlineStudent",
    "compress",
    "distill",
    "inspect",
    "load_compressed",
    "load_online",
    "load_student",
    "polish",
    "swap_block",
]

_WITHOUT_TORCH = {
    "ConvexNNClassifier": "cvxdistill.estimators",
    "ConvexNNRegressor": "cvxdistill.estimators",
    "GroupElasticNet": "cvxdistill.group_estimators",
    "GroupElasticNetCV": "cvxdistill.group_cross_validation",
    "polish": "cvxdistill.polishing",
}
_TORCH_DOORS = {
    "Compression": "cvxdistill.compression_report",
    "Compressor": "cvxdistill.compressor",
    "compress": "cvxdistill.compression",
    "Distillation": "cvxdistill.distillation",
    "OnlineStudent": "cvxdistill.online",
    "distill": "cvxdistill.distillation",
    "inspect": "cvxdistill.inspection",
    "load_online": "cvxdistill.online",
    "load_compressed": "cvxdistill.adapters",
    "load_student": "cvxdistill.adapters",
    "swap_block": "cvxdistill.adapters",
}


def __getattr__(name: str) -> Any:
    if name in _WITHOUT_TORCH:
        value = getattr(import_module(_WITHOUT_TORCH[name]), name)
    elif name in _TORCH_DOORS:
        _check_torch(name)
        value = getattr(import_module(_TORCH_DOORS[name]), name)
    elif name == "__version__":
        from importlib.metadata import version

        value = version("cvxdistill")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _check_torch(name: str) -> None:
    """Say which extra is missing, rather than which module of it."""
    try:
        import_module("cvxdistill.adapters")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("torch", "safetensors", "PIL"):
            raise
        raise ImportError(
            f"cvxdistill.{name} needs {missing}, which is not installed: "
            'pip install "cvxdistill[torch]"'
        ) from error
