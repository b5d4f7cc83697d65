"""Rows of a batch that hold fewer tokens than the batch is long, padded left or right."""

from __future__ import annotations

import torch
from torch import Tensor

from memattn.ops import _checks as check


class PaddedRows:
    """One contiguous run of valid tokens per row of an attention_mask [B, T].

    `align` rotates every run to the front, so that a memory sees each row as if it were alone, whatever its padding;
    `restore` rotates back. Both are gathers on the device with one source per target, so they wait for nothing and
    their gradients do not depend on the order of any sum.
    """

    def __init__(self, attention_mask: Tensor, x: Tensor) -> None:
        _check(attention_mask, x)
        self.mask = attention_mask if attention_mask.dtype == torch.bool else attention_mask != 0
        self.length = self.mask.sum(1)  # [B]
        self._position = torch.arange(x.shape[1], device=x.device)
        self._start = self.mask.to(torch.uint8).argmax(1, keepdim=True)  # [B, 1]; 0 for an empty row
        self.valid = self._position < self.length[:, None]  # [B, T], once aligned

    def align(self, x: Tensor) -> Tensor:
        """x [B, T, D] with each run moved to the front and zeros after it."""
        return self._rotate(x, self._position + self._start, self.valid)

    def restore(self, y: Tensor) -> Tensor:
        """The inverse of `align`: y [B, T, D] with each run back in place and zeros around it."""
        return self._rotate(y, self._position - self._start, self.mask)

    def _rotate(self, x: Tensor, source: Tensor, keep: Tensor) -> Tensor:
        source = source.remainder(x.shape[1])[..., None].expand_as(x)
        return torch.where(keep[..., None], x.gather(1, source), x.new_zeros(()))


def _check(mask: Tensor, x: Tensor) -> None:
    check.tensor("attention_mask", "attention_mask", mask)
    if mask.shape != x.shape[:2]:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}; expected [B, T] = {list(x.shape[:2])}")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(f"attention_mask is {check.dtype_name(mask.dtype)}; expected bool or integer, nonzero is valid")
    if mask.device != x.device:
        raise ValueError(f"attention_mask is on {mask.device}; expected {x.device} like x")
    if not check.values_checked(mask):
        return
    kept = torch.nn.functional.pad((mask != 0).to(torch.int8), (1, 0))
    runs = (kept.diff(dim=1) == 1).sum(1)
    if bool((runs > 1).any()):
        row = int(runs.argmax())
        raise ValueError(
            f"attention_mask row {row} has {int(runs[row])} runs of valid tokens; "
            "expected one contiguous run per row (padding on the left or right)"
        )
