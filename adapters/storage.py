"""Students in files: safetensors, with a JSON header that says how to build the module.

A student that is refined online has its statistics beside it in the file (``OnlineState``).
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cvxdistill.adapters.layout import ConvLayout, DenseLayout
from cvxdistill.adapters.quantization import as_stored, stored_dtype
from cvxdistill.adapters.student import GatedStudent
from cvxdistill.solvers import HiddenStatistics

FORMAT = "cvxdistill-student"
ONLINE_FORMAT = "cvxdistill-online-student"
FORMAT_VERSION = 1
# Before the names of tensors in files with more than a student.
STUDENT, STATISTICS, PRIOR = "student.", "statistics.", "prior."


@dataclass(frozen=True)
class OnlineState:
    """A student between two batches of its refinement.

    Attributes
    ----------
    student : GatedStudent
    statistics : HiddenStatistics
        Of its hidden features over the rows so far.
    prior : (ndarray of shape (m, c), ndarray of shape (c,))
        The second layer and the intercept that it had before the first batch.
    options : mapping of str to numbers
        What else it takes to continue.
    """

    student: GatedStudent
    statistics: HiddenStatistics
    prior: tuple[np.ndarray, np.ndarray]
    options: Mapping[str, float | int]


def save_student(student: GatedStudent, path: str | os.PathLike[str]) -> None:
    """Write a student to a safetensors file.

    The file is written under a temporary name in the same folder and then renamed: an interrupted
    call leaves what was at ``path`` as it was.

    Raises
    ------
    TypeError
        If ``student`` is not a GatedStudent.
    FileNotFoundError
        If the folder does not exist.
    """
    if not isinstance(student, GatedStudent):
        raise TypeError(f"student must be a GatedStudent, got {type(student).__name__}.")
    write_tensors(student.state_dict(), {"format": FORMAT, "student": _header(student)}, path)


def load_student(path: str | os.PathLike[str]) -> GatedStudent:
    """Read a student that ``save_student`` wrote, onto the CPU, in eval mode.

    From the file of a student that is refined online, the student alone is read.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a safetensors file, not a student, of another format version, or damaged.
    """
    metadata, tensors = read_tensors(path, (FORMAT, ONLINE_FORMAT), "no student")
    if metadata["format"] == ONLINE_FORMAT:
        tensors = _named(tensors, STUDENT)
    return _student(metadata, tensors, path)


def save_online_state(state: OnlineState, path: str | os.PathLike[str]) -> None:
    """Write a student and what it takes to refine it further to one safetensors file.

    Raises
    ------
    FileNotFoundError
        If the folder does not exist.
    """
    arrays = {STATISTICS + name: array for name, array in state.statistics.arrays().items()}
    arrays |= {PRIOR + "W2": state.prior[0], PRIOR + "intercept": state.prior[1]}
    tensors = {STUDENT + name: tensor for name, tensor in state.student.state_dict().items()}
    tensors |= {name: torch.tensor(array) for name, array in arrays.items()}
    metadata = {
        "format": ONLINE_FORMAT,
        "student": _header(state.student),
        "options": json.dumps(dict(state.options)),
    }
    write_tensors(tensors, metadata, path)


def load_online_state(path: str | os.PathLike[str]) -> OnlineState:
    """Read what ``save_online_state`` wrote, onto the CPU, the student in eval mode.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a safetensors file, holds no statistics, is of another format version, or is
        damaged.
    """
    metadata, tensors = read_tensors(path, (ONLINE_FORMAT,), "no student that is refined online")
    student = _student(metadata, _named(tensors, STUDENT), path)
    try:
        statistics = HiddenStatistics.from_arrays(_arrays(tensors, STATISTICS))
        prior = _arrays(tensors, PRIOR)
        W2, intercept = prior["W2"], prior["intercept"]
        shapes = (W2.shape, intercept.shape)
        if shapes != (statistics.shape, statistics.shape[1:]) or W2.dtype != np.float64:
            raise ValueError(f"prior of shapes {shapes} for {statistics}.")
        options = json.loads(metadata["options"])
        if not isinstance(options, dict):
            raise ValueError(f"options {options!r}.")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return OnlineState(student, statistics, (W2, intercept), options)


def write_tensors(
    tensors: Mapping[str, Tensor], metadata: dict[str, str], path: str | os.PathLike[str]
) -> None:
    """Write tensors and a header under a temporary name, and rename the file."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {path.parent} does not exist.")
    metadata = {**metadata, "format_version": str(FORMAT_VERSION)}
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(stored, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(
    path: str | os.PathLike[str], formats: tuple[str, ...], lacking: str
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file in one of these formats."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: there is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") not in formats:
        hint = "; load_student reads it" if metadata.get("format") == FORMAT else ""
        raise ValueError(
            f"{path} holds {lacking}: its header must say format={formats[0]!r}, got "
            f"{metadata.get('format')!r}{hint}."
        )
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} has format version {metadata.get('format_version')!r}; this release reads "
            f"version {FORMAT_VERSION}."
        )
    return metadata, tensors


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _arrays(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in _named(tensors, prefix).items()}


def _header(student: GatedStudent) -> str:
    """Describe how to build the module, in JSON."""
    return json.dumps(
        {
            "layout": {"class": type(student.layout).__name__, **asdict(student.layout)},
            "n_units": student.n_units,
            "n_gates": student.n_gates,
            "linear_rank": student.linear_rank,
            "shared_gates": student.shared_gates,
            "dtype": stored_dtype(student),
        }
    )


def _student(
    metadata: Mapping[str, str], tensors: dict[str, Tensor], path: str | os.PathLike[str]
) -> GatedStudent:
    try:
        student = _empty_student(json.loads(metadata["student"]))
        student.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return student.eval()


def _empty_student(header: dict[str, Any]) -> GatedStudent:
    """Build the module that the header describes, its weights still to be read."""
    student = GatedStudent(
        layout_of(header["layout"]),
        n_units=header["n_units"],
        n_gates=header["n_gates"],
        linear_rank=header["linear_rank"],
        shared_gates=header["shared_gates"],
    )
    return as_stored(student, header["dtype"])


def layout_of(header: dict[str, Any]) -> DenseLayout | ConvLayout:
    """The layout that a header describes."""
    layout = dict(header)
    classes = {"DenseLayout": DenseLayout, "ConvLayout": ConvLayout}
    return classes[layout.pop("class")](**layout)
