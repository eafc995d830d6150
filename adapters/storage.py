"""Students in files: safetensors, with a JSON header that says how to build the module."""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cvxdistill.adapters.layout import ConvLayout, DenseLayout
from cvxdistill.adapters.student import GatedStudent

FORMAT = "cvxdistill-student"
FORMAT_VERSION = 1


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
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: the folder {path.parent} does not exist.")
    header = {
        "layout": {"class": type(student.layout).__name__, **asdict(student.layout)},
        "n_units": student.n_units,
        "n_gates": student.n_gates,
        "linear_rank": student.linear_rank,
        "shared_gates": student.shared_gates,
        "dtype": str(student.dtype).removeprefix("torch."),
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "student": json.dumps(header),
    }
    tensors = {
        name: tensor.detach().cpu().contiguous() for name, tensor in student.state_dict().items()
    }
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_student(path: str | os.PathLike[str]) -> GatedStudent:
    """Read a student that ``save_student`` wrote, onto the CPU, in eval mode.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not a safetensors file, not a student, of another format version, or damaged.
    """
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
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} holds no student: its header must say format={FORMAT!r}, got "
            f"{metadata.get('format')!r}."
        )
    if metadata.get("format_version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} has format version {metadata.get('format_version')!r}; this release reads "
            f"version {FORMAT_VERSION}."
        )
    try:
        student = _empty_student(json.loads(metadata["student"]))
        student.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return student.eval()


def _empty_student(header: dict[str, Any]) -> GatedStudent:
    """Build the module that the header describes, its weights still to be read."""
    layout = dict(header["layout"])
    classes = {"DenseLayout": DenseLayout, "ConvLayout": ConvLayout}
    layout_class = classes[layout.pop("class")]
    dtype = getattr(torch, header["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype {header['dtype']!r} is unknown.")
    return GatedStudent(
        layout_class(**layout),
        n_units=header["n_units"],
        n_gates=header["n_gates"],
        linear_rank=header["linear_rank"],
        shared_gates=header["shared_gates"],
        dtype=dtype,
    )
