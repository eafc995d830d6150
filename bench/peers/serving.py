"""Workers that solve one job after another, each in its own interpreter, over a pair of pipes.

A job is one line of JSON to the worker's stdin, its result one line of JSON from its stdout. Both
sides use the standard library only, because the two environments share nothing else. A worker
stays alive between jobs, so that imports and compilation are not part of any job.
"""

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(solve: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answer jobs from stdin until it closes; whatever else is printed goes to stderr.

    A job that asks for more memory than there is has the answer null.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] | None = solve(json.loads(line))
        except MemoryError:
            answer = None
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


# Seconds for the first job.
FIRST_PATIENCE = 300.0


class Worker:
    """A script that calls ``serve``, running in the interpreter ``python``, ``threads`` threads.

    Use it in a ``with`` block, at whose end the script is told to stop.

    Parameters
    ----------
    python : path
    script : path
    threads : int
    first : dict, optional
        A job to do whenever the script has been started, so that it compiles outside all others.
    memory : int, optional
        Bytes of address space that it may have.
    """

    def __init__(
        self,
        python: Path | str,
        script: Path,
        threads: int,
        *,
        first: dict[str, Any] | None = None,
        memory: int | None = None,
    ) -> None:
        names = ("OMP", "OPENBLAS", "MKL", "NUMBA")
        limits = {f"{name}_NUM_THREADS": str(threads) for name in names}
        self.script = script
        self._command = [str(python), str(script)]
        self._environment = {**os.environ, **limits}
        self._first, self._memory = first, memory
        self._process: subprocess.Popen[str] | None = None
        if first is None:
            self._start()

    def _start(self) -> subprocess.Popen[str]:
        limit = self._memory
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self._environment,
            preexec_fn=None
            if limit is None
            else lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
        if self._first is not None:
            self._answer(self._process, self._first, FIRST_PATIENCE)
        return self._process

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(timeout=60)

    def __call__(self, patience: float | None = None, **job: Any) -> dict[str, Any]:
        """Return the worker's answer to one job.

        Raises
        ------
        MemoryError
            If it had not enough, or was killed while it had a limit.
        RuntimeError
            If it died otherwise.
        TimeoutError
            If there is no answer after ``patience`` seconds; then it is killed. Either way the next
            job starts another.
        """
        process = self._start() if self._process is None else self._process
        return self._answer(process, job, patience)

    def _answer(
        self, process: subprocess.Popen[str], job: dict[str, Any], patience: float | None
    ) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], patience)[0]:
            process.kill()
            process.wait()
            self._process = None
            raise TimeoutError(f"{self.script.name} took more than {patience:g} s.")
        line = process.stdout.readline()
        if line:
            answer = json.loads(line)
            if answer is None:
                raise MemoryError(f"{self.script.name} has too little memory for the job {job}.")
            return answer
        killed = process.wait() < 0
        self._process = None
        message = f"{self.script.name} ended during the job {job}; see its stderr."
        raise MemoryError(message) if killed and self._memory else RuntimeError(message)
