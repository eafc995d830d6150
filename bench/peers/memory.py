"""By how much a call's resident memory peaked above where it began; Linux only, elsewhere None."""

from __future__ import annotations

import ctypes
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Context whose ``growth`` is the peak of resident memory within, less what it was before."""

    growth: int | None = None

    def __enter__(self) -> PeakMemory:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # What earlier jobs have freed would hide the growth.
            CLEAR.write_text("5")  # the peak starts anew
            self._before = _kilobytes("VmRSS")
        except (OSError, AttributeError):
            self._before = None
        return self

    def __exit__(self, *exception: object) -> None:
        if self._before is not None:
            self.growth = 1024 * (_kilobytes("VmHWM") - self._before)


def _kilobytes(name: str) -> int:
    line = next(row for row in STATUS.read_text().splitlines() if row.startswith(name))
    return int(line.split()[1])
