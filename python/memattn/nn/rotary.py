"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split: channel d turns with channel d + D/2."""

from __future__ import annotations

import torch
from torch import Tensor


def angles(positions: Tensor, half: int, base: float) -> Tensor:
    """position · base^(−d/half) for d < half: [..., half] float64, exact to rounding at any position."""
    frequency = base ** (-torch.arange(half, device=positions.device, dtype=torch.float64) / half)
    return positions.double()[..., None] * frequency


def rotary(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """x [B, T, H, D], D even, turned by positions [B, T] or [T]: the pair (d, d + D/2) by position · base^(−2d/D).

    Angles are float64; the rotation is float32 (float64 for float64 x), the result has x's dtype.
    """
    half, dtype = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    angle = angles(positions, half, base)[..., None, :]  # [B or 1, T, 1, D/2]
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    a, b = x.to(dtype).split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
