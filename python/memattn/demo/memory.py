"""How much memory this process holds, and the most it held during a piece of work."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Resident set size; where the system does not tell (not Linux), the largest so far."""
    return _status("VmRSS") if _STATUS.exists() else _largest_so_far()


def _status(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no entry {name}")


def _largest_so_far() -> int:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def _return_free_memory() -> None:
    """Give freed memory back to the system, so that it is not counted for the next measurement."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


class PeakMemory:
    """After `with PeakMemory(device) as peak: …`, `peak.bytes` is the most held inside, beyond the start.

    On Linux the kernel's own high-water mark is reset and read; elsewhere only growth beyond
    the largest so far is seen.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
            return self
        _return_free_memory()
        self._resets = _reset_high_water_mark()
        self._start = resident_bytes() if self._resets else _largest_so_far()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.device.type == "cuda":
            end = torch.cuda.max_memory_allocated(self.device)
        else:
            end = _status("VmHWM") if self._resets else _largest_so_far()
        self.bytes = max(0, end - self._start)


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True
