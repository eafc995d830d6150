"""Workers that solve one job after another, each in its own interpreter, over a pair of pipes.

A job is one line of JSON to the worker's stdin, its result one line of JSON from its stdout. Both
sides use the standard library only, because the two environments share nothing else. A worker
stays alive between jobs, so that imports and compilation are not part of any job.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(solve: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer jobs from stdin until it closes; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        answers.write(json.dumps(solve(json.loads(line))) + "\n")
        answers.flush()


class Worker:
    """A script that calls ``serve``, running in the interpreter ``python``, ``threads`` threads.

    Use it in a ``with`` block, at whose end the script is told to stop.
    """

    def __init__(self, python: Path | str, script: Path, threads: int) -> None:
        names = ("OMP", "OPENBLAS", "MKL", "NUMBA")
        limits = {f"{name}_NUM_THREADS": str(threads) for name in names}
        self.script = script
        self._process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **limits},
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def __call__(self, **job: Any) -> dict[str, Any]:
        """Return the worker's answer to one job; raise RuntimeError if it died of it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.script.name} ended during the job {job}; see its stderr.")
        return json.loads(line)
