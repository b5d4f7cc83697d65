"""Ceilings measured in the same run, and the time below which no version can go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.registry import Work


@dataclass(frozen=True)
class Ceilings:
    """copy: bytes read plus written per second, from memory; cached: from the processor's caches, 2 MiB to 2 MiB.

    The others: FLOP/s of a large torch matrix product.
    """

    copy: float
    cached: float
    float32: float
    bfloat16: float

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s for operands of `dtype`; float16 runs on the units that bfloat16 does."""
        return self.float32 if dtype == torch.float32 else self.bfloat16

    def floor(self, work: Work, dtype: torch.dtype, cached: bool = False) -> tuple[float, str]:
        """(seconds, what bounds them)."""
        moving, computing = work.bytes / (self.cached if cached else self.copy), work.flops / self.rate(dtype)
        return (moving, "bytes") if moving >= computing else (computing, "flops")

    def as_dict(self) -> dict[str, float]:
        """For the JSON results."""
        return asdict(self)


def best_seconds(run: Callable[[], object], device: str, repeats: int = 8) -> float:
    """Fastest of `repeats` after two warm calls."""

    def once() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return min([once() for _ in range(repeats + 2)][2:])


def measure(device: str) -> Ceilings:
    """Copy 256 MiB (1 GiB on a GPU); multiply square matrices of 2048 (8192). Random data: zeros can run faster."""
    gpu = device == "cuda"

    def copy_rate(numbers: int, repeats: int) -> float:
        source = torch.randn(numbers, device=device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / best_seconds(lambda: target.copy_(source), device, repeats)

    copy, cached = copy_rate((1 << 28) if gpu else (1 << 26), 8), copy_rate(1 << 19, 200)
    n = 8192 if gpu else 2048
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    low_a, low_b = a.bfloat16(), b.bfloat16()
    float32 = 2 * n**3 / best_seconds(lambda: a @ b, device)
    return Ceilings(copy, cached, float32, 2 * n**3 / best_seconds(lambda: low_a @ low_b, device))


def last_level_cache(device: str) -> int:
    """Bytes of the cache that input sets must exceed together, so that a timed call reads memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes) or 32 << 20
