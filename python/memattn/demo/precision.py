"""Whether this machine is faster in bfloat16 is measured, not guessed from its name."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F


def faster_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where a layer-sized product is clearly faster in it than in float32, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    times: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    operands = {dtype: (torch.ones(512, 256, dtype=dtype), torch.ones(768, 256, dtype=dtype)) for dtype in times}
    for _ in range(25):  # by turns, so that other work on the machine slows both
        for dtype, (x, weight) in operands.items():
            start = time.perf_counter()
            F.linear(x, weight)
            times[dtype].append(time.perf_counter() - start)
    return torch.bfloat16 if min(times[torch.bfloat16]) < 0.7 * min(times[torch.float32]) else torch.float32
