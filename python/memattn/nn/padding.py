"""Rows of a batch that hold fewer tokens than the batch is long: padded left or right, or packed end to end."""

from __future__ import annotations

import torch
from torch import Tensor

from memattn.ops import _checks as check


def valid_runs(
    layer: str, x: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None
) -> PaddedRows | PackedRows | None:
    """What brings the valid tokens of each sequence to the front of a row of its own; None: they are there already."""
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError(f"{layer}: attention_mask and cu_seqlens are both given; allowed: one")
    if cu_seqlens is not None:
        return PackedRows(layer, cu_seqlens, x)
    return None if attention_mask is None or x.shape[1] == 0 else PaddedRows(attention_mask, x)


class PaddedRows:
    """One contiguous run of valid tokens per row of an attention_mask [B, T].

    `align` rotates every run to the front, so that a memory sees each row as if it were alone, whatever its padding;
    `restore` rotates back. Both are gathers on the device with one source per target, so they wait for nothing and
    their gradients do not depend on the order of any sum.
    """

    def __init__(self, attention_mask: Tensor, x: Tensor) -> None:
        check_mask(attention_mask, x)
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


class PackedRows:
    """N sequences packed end to end in x [1, T, D], bounded by cu_seqlens [N+1].

    `align` gives each a row of its own, as long as the longest, `restore` packs them again; both as in `PaddedRows`.
    The longest length is read on the host; under torch.compile the rows have T tokens instead.
    """

    def __init__(self, layer: str, cu_seqlens: Tensor, x: Tensor) -> None:
        check.cu_seqlens(layer, cu_seqlens, x)
        bounds = cu_seqlens.long()
        self.length, total = bounds.diff(), x.shape[1]  # [N]
        unread = torch.compiler.is_compiling() or x.device.type == "meta"
        longest = total if unread else int(self.length.max())
        position = torch.arange(longest, device=x.device)
        self.valid = position < self.length[:, None]  # [N, longest]
        self._source = (bounds[:-1, None] + position).clamp(max=max(total - 1, 0))
        token = torch.arange(total, device=x.device)
        owner = torch.searchsorted(bounds[1:], token, right=True)
        self._target = owner * longest + token - bounds[owner]

    def align(self, x: Tensor) -> Tensor:
        """x [1, T, D] as rows [N, longest, D], zeros after each sequence."""
        picked = x[0].index_select(0, self._source.flatten()).view(*self._source.shape, x.shape[2])
        return torch.where(self.valid[..., None], picked, x.new_zeros(()))

    def restore(self, y: Tensor) -> Tensor:
        """The inverse of `align`: [N, longest, D] -> [1, T, D]."""
        return y.flatten(0, 1).index_select(0, self._target)[None]


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, F] at rows index [B, t] -> [B, t, F]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def check_mask(mask: Tensor, x: Tensor) -> None:
    """attention_mask [B, T] for x [B, T, D]: bool or integer, one contiguous run of nonzero per row."""
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
