"""Rotary positions (Su et al. 2021, arXiv 2104.09864), half-split: channel c turns with channel c + K/2."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, position: Tensor, base: float | None) -> Tensor:
    """x [..., H, K] turned by position [...] · base^(−2c/K); angles are float64. base None: x itself."""
    if base is None:
        return x
    half = x.shape[-1] // 2
    channel = torch.arange(half, dtype=torch.float64, device=x.device)
    angle = position[..., None, None].double() * base ** (-channel / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
