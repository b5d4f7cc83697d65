"""Whether this machine is faster in bfloat16 is measured, not guessed from its name."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F


def faster_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where a layer-sized product is clearly faster in it than in float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _product_seconds(torch.bfloat16) < 0.7 * _product_seconds(torch.float32) else torch.float32


def _product_seconds(dtype: torch.dtype) -> float:
    x, weight = torch.ones(2048, 256, dtype=dtype), torch.ones(768, 256, dtype=dtype)
    times = []
    for _ in range(8):
        start = time.perf_counter()
        F.linear(x, weight)
        times.append(time.perf_counter() - start)
    return min(times)
