"""A compressed network in one safetensors file: where its students are, and all of its tensors."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import asdict

from torch import nn

from cvxdistill.adapters.call_structure import Structure
from cvxdistill.adapters.linear_student import LinearStudent
from cvxdistill.adapters.module_tree import check_model, get_block, swap_block
from cvxdistill.adapters.quantization import DTYPES, as_stored, stored_dtype
from cvxdistill.adapters.spans import Span
from cvxdistill.adapters.storage import layout_of, read_tensors, write_tensors

FORMAT = "cvxdistill-compressed"


def save_compressed(model: nn.Module, spans: Sequence[Span], path: str | os.PathLike[str]) -> None:
    """Write a compressed network, to be loaded into the original one.

    The file is written under a temporary name in the same folder and then renamed.

    Parameters
    ----------
    model : nn.Module
    spans : sequence of Span
        Where its students are.
    path : path

    Raises
    ------
    ValueError
        If a student's place is a block that returns more than a tensor.
    FileNotFoundError
        If the folder does not exist.
    """
    records = []
    for span in spans:
        if any(span.structure(name) != Structure() for name in span.names):
            raise ValueError(
                f"block {str(span)!r} returns its tensor in a tuple or dataclass, which a file "
                "cannot hold; save model.state_dict() instead."
            )
        student = get_block(model, span.first)
        assert isinstance(student, LinearStudent)
        records.append(
            {
                "names": span.names,
                "layout": {"class": type(student.layout).__name__, **asdict(student.layout)},
                "input_rank": student.input_rank,
                "rank": student.rank,
                "written": student.written,
                "sparse": student.sparse,
                "dtype": stored_dtype(student),
            }
        )
    tensors = {}
    for name, tensor in model.state_dict().items():
        # Tensors under two names are written twice: safetensors would refuse shared memory.
        tensors[name] = tensor.clone()
    write_tensors(tensors, {"format": FORMAT, "students": json.dumps(records)}, path)


def load_compressed(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Return the original network, of any weights, as the compressed one that was saved.

    Parameters
    ----------
    model : nn.Module
        Of the same architecture as the one that was compressed; left as it was.
    path : path

    Returns
    -------
    nn.Module
        With the students in their places and all weights from the file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is not such a file, is damaged, or is of another architecture.
    TypeError
        If ``model`` is not a module.
    """
    check_model(model)
    metadata, tensors = read_tensors(path, (FORMAT,), "no compressed model")
    try:
        compressed = copy.deepcopy(model)
        for record in json.loads(metadata["students"]):
            first, *others = record["names"]
            last = others[-1] if others else first
            span = Span(first, last, tuple(others[:-1]))
            ranks = (record[name] for name in ("input_rank", "rank", "written"))
            layout = layout_of(record["layout"])
            student = LinearStudent(layout, *ranks, sparse=record["sparse"])
            compressed = swap_block(compressed, span, student, inplace=True)
            # It has the dtype of the model now, which is right unless it was quantised.
            if record["dtype"] in DTYPES:
                as_stored(student, record["dtype"])
        compressed.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged, or of another architecture: {error}") from error
    return compressed
