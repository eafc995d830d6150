"""Seconds of one thread, and where the paper's results go.

The scripts of this folder import it first: it also lets them import the modules of bench/.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

BENCH = Path(__file__).resolve().parents[1]
RESULTS = BENCH / "results" / "paper"
CACHE = BENCH / ".cache" / "paper"
if str(BENCH) not in sys.path:
    sys.path.insert(0, str(BENCH))


def one_thread() -> None:
    """Hold torch, BLAS and the solvers' own threads to one each, for the whole process."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    threadpool_limits(1)


class CpuClock:
    """Adds up the CPU seconds of this process that pass inside ``with clock:``.

    With one thread these are seconds of computing, whatever else the machine does.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._start = 0.0

    def __enter__(self) -> CpuClock:
        self._start = time.process_time()
        return self

    def __exit__(self, *exception: object) -> None:
        self.seconds += time.process_time() - self._start
