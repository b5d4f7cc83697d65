"""Ceilings measured in the same run, and the time below which no version can go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.registry import CACHED_GROUPS, DTYPES, Work


@dataclass(frozen=True)
class Ceilings:
    """What torch reaches on this machine: memory traffic in bytes per second, matrix products in FLOP/s.

    memory: read plus written, the better of a copy and an update in place of large tensors. cached: the same for
    tensors of 2 MiB. A kernel can pass these by a little where it does better than torch, but not by much.
    """

    memory: float
    cached: float
    float32: float
    bfloat16: float

    def rate(self, dtype: torch.dtype) -> float:
        """FLOP/s for operands of `dtype`; float16 runs on the units that bfloat16 does."""
        return self.float32 if dtype == torch.float32 else self.bfloat16

    def floor(self, work: Work, dtype: torch.dtype, cached: bool = False) -> tuple[float, str]:
        """(seconds, what bounds them)."""
        moving, computing = work.bytes / (self.cached if cached else self.memory), work.flops / self.rate(dtype)
        return (moving, "bytes") if moving >= computing else (computing, "flops")

    def floor_of(self, row: dict[str, Any]) -> dict[str, Any]:
        """floor_ms and bound of a row of the results."""
        cached = row["group"] in CACHED_GROUPS
        seconds, bound = self.floor(Work(row["bytes"], row["flops"]), DTYPES[row["dtype"]], cached)
        return {"floor_ms": 1e3 * seconds, "bound": bound}

    def best(self, other: Ceilings) -> Ceilings:
        """The better of two measurements, rate by rate: whatever else ran can only have made one slower."""
        return Ceilings(**{name: max(rate, getattr(other, name)) for name, rate in self.as_dict().items()})

    def as_dict(self) -> dict[str, float]:
        """For the JSON results."""
        return asdict(self)


def best_seconds(run: Callable[[], object], device: str, repeats: int = 20) -> float:
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


def memory_rate(numbers: int, device: str, repeats: int) -> float:
    """Bytes read plus written per second, float tensors of so many numbers."""
    source = torch.randn(numbers, device=device)
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source), device, repeats)
    update = best_seconds(source.neg_, device, repeats)  # no line is fetched only to be overwritten
    return 2 * source.nbytes / min(copy, update)


def product_rate(dtype: torch.dtype, device: str) -> float:
    """FLOP/s of the best of a large product and a batch of small ones. Random data: zeros can run faster."""
    n, small = (8192, (4096, 64, 128)) if device == "cuda" else (2048, (256, 64, 128))
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    batch, m, k = small
    x, y = torch.randn(batch, m, k, device=device).to(dtype), torch.randn(batch, k, k, device=device).to(dtype)
    large = 2 * n**3 / best_seconds(lambda: a @ b, device)
    return max(large, 2 * batch * m * k * k / best_seconds(lambda: x @ y, device, 30))


def measure(device: str) -> Ceilings:
    """256 MiB tensors (1 GiB on a GPU) and 2 MiB ones; products of 2048 (8192) and batches of 64 x 128 x 128."""
    large = memory_rate((1 << 28) if device == "cuda" else (1 << 26), device, 10)
    cached = max(large, memory_rate(1 << 19, device, 300))
    return Ceilings(large, cached, product_rate(torch.float32, device), product_rate(torch.bfloat16, device))


def last_level_cache(device: str) -> int:
    """Bytes of the cache that input sets must exceed together, so that a timed call reads memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1))
    return max(sizes) or 32 << 20
