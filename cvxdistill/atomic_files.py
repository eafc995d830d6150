"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_parent(path: str | os.PathLike[str], argument: str) -> Path:
    """Return the path; raise OSError if no file can be put there, before any work is done."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{argument}: {path} is a folder; it must name a file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{argument}: the folder {path.parent} does not exist.")
    return path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, which takes its place if the block succeeds.

    The temporary name keeps the ending of ``path``, from which some writers tell the format.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
