"""A user's model from its name: ``package.module:factory`` or ``file.py:factory``, and weights.

Serves the command line and ``bench/``. Naming a model runs its code, as importing it would; reading
weights runs nothing (``weights_only=True``).
"""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import os
import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

# How many names an error message lists.
SHOWN = 5


def load_model(spec: str, weights: str | os.PathLike[str] | None = None) -> nn.Module:
    """Return the model that ``spec`` names, on the CPU, in eval mode.

    Parameters
    ----------
    spec : str
        "package.module:factory" or "path/file.py:factory". The factory is called without
        arguments; a module instance in its place is copied. The current folder (for a file: the
        file's) can be imported from meanwhile.
    weights : path, optional
        Read as ``load_weights`` does.

    Raises
    ------
    TypeError
        If ``spec`` is not a string, or names something that is no module and makes none.
    ValueError
        If ``spec`` has no colon, its module or attribute does not exist, its code fails, or the
        weights do not fit.
    FileNotFoundError
        If the ``.py`` file or the weights are not there.
    """
    if not isinstance(spec, str):
        raise TypeError(f"model must be a string such as 'file.py:factory', got {spec!r}.")
    source, colon, attribute = spec.rpartition(":")
    if not (colon and source and attribute):
        raise ValueError(
            f"model must be 'package.module:factory' or 'path/file.py:factory', got {spec!r}."
        )
    path = Path(source)
    is_file = path.suffix == ".py"
    if is_file and not path.is_file():
        raise FileNotFoundError(f"model: there is no file {path}.")
    if weights is not None:
        _check_file(weights)
    with _importable(path.resolve().parent if is_file else Path.cwd()):
        module = _run_file(path) if is_file else _import(source)
        model = _make(module, attribute, spec)
    if weights is not None:
        load_weights(model, weights)
    return model.cpu().eval()


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Put the weights in a file into ``model``, converted to the model's dtypes.

    Parameters
    ----------
    model : torch.nn.Module
        Changed in place; left as it was if the weights are refused.
    path : path
        A ``.safetensors`` file, or one that ``torch.save`` wrote: a state_dict, alone or under the
        key "state_dict" or "model", with or without the prefix "module." of DataParallel.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no state_dict, or its names or shapes are not the model's.
    """
    path = _check_file(path)
    expected = model.state_dict()
    state = _read_state_dict(path)
    if not any(name.startswith("module.") for name in expected):
        consume_prefix_in_state_dict_if_present(state, "module.")
    before = copy.deepcopy(expected)
    try:
        found = model.load_state_dict(state, strict=False)
        problem = _mismatch(list(found.missing_keys), list(found.unexpected_keys))
    except RuntimeError as error:
        problem = _wrong_shapes(state, expected) or f" {error}"
    if problem:
        model.load_state_dict(before)
        raise ValueError(f"weights: {path} does not fit {type(model).__name__}.{problem}")


def _mismatch(missing: list[str], unexpected: list[str]) -> str:
    """Say which names do not match, the most similar ones first; "" if all do."""

    def nearest(names: list[str], others: list[str]) -> str:
        def likeness(name: str) -> float:
            scores = (difflib.SequenceMatcher(None, name, other).ratio() for other in others[:200])
            return -max(scores, default=0.0)

        names = sorted(names[:200], key=likeness) + names[200:]
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return ", ".join(map(repr, names[:SHOWN])) + more

    parts = ""
    if missing:
        parts += f" Missing from the file: {nearest(missing, unexpected)}."
    if unexpected:
        parts += f" Not in the model: {nearest(unexpected, missing)}."
    return parts


def _wrong_shapes(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    wrong = [
        f"{name!r} is {tuple(state[name].shape)} in the file and {tuple(tensor.shape)} in the model"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    return f" {'; '.join(wrong[:SHOWN])}{more}." if wrong else ""


def _check_file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: there is no file {path}.")
    return path


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path, device="cpu")
        except SafetensorError as error:
            raise ValueError(f"weights: {path} is not a safetensors file: {error}") from error
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(
            f"weights: {path} must hold tensors only, as torch.save(model.state_dict(), ...) "
            f"writes; torch.load(weights_only=True) refuses it."
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if not isinstance(state, dict) or not state:
        raise ValueError(f"weights: {path} must hold a state_dict, got a {type(state).__name__}.")
    others = [
        key
        for key, value in state.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if others:
        raise ValueError(
            f"weights: {path} must hold a state_dict, alone or under 'state_dict' or 'model'; its "
            f"entries {', '.join(map(repr, others[:SHOWN]))} are not tensors."
        )
    return state


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Let ``folder`` be imported from, as if Python had been started there."""
    entry = str(folder)
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        if entry in sys.path:
            sys.path.remove(entry)


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        # The module itself or a package on the way to it, rather than something that it imports.
        if absent and f"{name}.".startswith(f"{absent}."):
            raise ValueError(
                f"model: there is no module {name!r} on Python's path or in the current folder; a "
                "file is named with its ending, as in 'file.py:factory'."
            ) from error
        raise ValueError(f"model: importing {name!r} failed: {_describe(error)}") from error


def _run_file(path: Path) -> ModuleType:
    # A name of its own, so that a file named like an installed package does not stand in for it.
    name = f"cvxdistill_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"model: {path} cannot be imported.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(f"model: running {path} failed: {_describe(error)}") from error
    return module


def _make(module: ModuleType, attribute: str, spec: str) -> nn.Module:
    try:
        factory = getattr(module, attribute)
    except AttributeError as error:
        names = [name for name in vars(module) if not name.startswith("_")]
        near = difflib.get_close_matches(attribute, names, n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
        raise ValueError(f"model: {spec!r} has no {attribute!r}.{hint}") from error
    if isinstance(factory, nn.Module):
        return copy.deepcopy(factory)
    if not callable(factory):
        raise TypeError(
            f"model: {spec!r} must be a torch.nn.Module or a function that makes one, got a "
            f"{type(factory).__name__}."
        )
    try:
        model = factory()
    except Exception as error:
        raise ValueError(
            f"model: calling {spec!r} without arguments failed: {_describe(error)}"
        ) from error
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: {spec!r} must return a torch.nn.Module, got a {type(model).__name__}."
        )
    return model


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
