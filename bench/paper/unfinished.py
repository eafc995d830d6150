"""Rows of an interrupted run: what is done is kept, all of a step or nothing of it.

They lie beside the results, so that another day, or another machine, can go on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cpu_clock


def rows_file(name: str, quick: bool) -> Path:
    """Where the rows of a run of that name are kept until it is finished."""
    folder = cpu_clock.CACHE if quick else cpu_clock.RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.jsonl"


def read_rows(file: Path) -> list[dict[str, Any]]:
    """What an interrupted run has done."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Keep what is done, all of it or nothing of it."""
    with file.open("a") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))
