"""Rows of K and V as 8-bit codes with one scale per row.

    scale = 2^⌈log2(max|x| / m)⌉        code = round(x / scale)        x̂ = scale · code        m = 127 (int8), 448 (fp8)

The scale is a power of two, so that x̂ is exact in 16 bit and encodes to itself: a page may go through the codes any
number of times and keeps its bits. Against max|x| / m that costs at most one bit. A row with NaN or inf becomes NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memattn.pool.config import CODES

_LARGEST = {"int8": 127.0, "fp8": 448.0}
# Below these exponents x̂ would fall under what float16 (bfloat16, float32) can hold.
_LEAST_EXPONENT = {("int8", torch.float16): -24, ("fp8", torch.float16): -15}


def encode(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes [..., D] and float32 scales [...] of x [..., D]."""
    rows = x.float()
    largest = rows.abs().amax(-1)
    mantissa, exponent = torch.frexp(largest / _LARGEST[kind])
    exponent = (exponent - (mantissa == 0.5).int()).clamp(min=_LEAST_EXPONENT.get((kind, x.dtype), -100))
    scale = torch.ldexp(torch.ones_like(largest), exponent)
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    codes = (rows / scale[..., None]).nan_to_num(0.0)
    return (codes.round() if kind == "int8" else codes).to(CODES[kind]), scale


def decode(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x̂ [..., D] in `dtype`."""
    x = codes.float() * scale[..., None]
    if dtype == torch.float16:
        x = x.clamp(-65504.0, 65504.0)  # what rounds up to 2^16 was finite
    return x.to(dtype)
