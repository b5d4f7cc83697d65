"""What memory safety needs of a tensor a kernel will address: torch.ops.memattn.* can be called without memattn.ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def require(name: str, x: Tensor | None, like: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int]) -> None:
    """x is None, or on the device of `like`, of an allowed dtype, of exactly this shape and contiguous."""
    if x is None or (
        x.shape == torch.Size(shape) and x.dtype in dtypes and x.device == like.device and x.is_contiguous()
    ):
        return
    allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    received = f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"
    received += "" if x.is_contiguous() else f" with strides {list(x.stride())}"
    raise ValueError(f"{name}: received {received}; allowed: {allowed} {list(shape)} on {like.device}, contiguous")
