"""Threads: row blocks in parallel, BLAS held to one thread inside each of them.

Small matrix products lose from BLAS's own threads, large ones are cut into row blocks anyway; so
the solvers run blocks side by side and keep BLAS single-threaded meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

from threadpoolctl import ThreadpoolController

T = TypeVar("T")
B = TypeVar("B")


@cache
def n_threads() -> int:
    """Threads to use: ``OMP_NUM_THREADS`` if it is set, else the cores this process may use."""
    setting = os.environ.get("OMP_NUM_THREADS", "")
    if setting.isdigit() and int(setting) > 0:
        return int(setting)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads(), thread_name_prefix="cvxdistill")


# A forked child inherits the pool but not its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def one_blas_thread() -> AbstractContextManager[Any]:
    """Hold BLAS to one thread inside a ``with`` block."""
    return _controller().limit(limits=1, user_api="blas")


def run_in_threads(work: Callable[[list[B]], T], blocks: list[B]) -> list[T]:
    """Split ``blocks`` into one run for each thread and call ``work`` on each; results in order."""
    count = min(n_threads(), len(blocks))
    if count == 1:
        return [work(blocks)]
    ends = [len(blocks) * k // count for k in range(count + 1)]
    runs = [blocks[a:b] for a, b in pairwise(ends)]
    return list(_pool().map(work, runs))
