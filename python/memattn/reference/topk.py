"""Top-k selection in plain torch.

`loop` is the definition, one row at a time over Python numbers. `chunked` is the fallback that runs anywhere torch
does: torch.topk finds the k-th largest value, and a running count among its equals the ones of lowest index.
"""

from __future__ import annotations

from builtins import sorted as in_order
from typing import NamedTuple

import torch
from torch import Tensor

from memattn.reference.attention import accumulate_dtype


class TopK(NamedTuple):
    """Selected scores [..., k] (−inf where unused), their int32 indices (−1) and int32 counts [...] of used slots."""

    values: Tensor
    indices: Tensor
    counts: Tensor


def translated(indices: Tensor, page_table: Tensor, page_size: int) -> Tensor:
    """Logical ids [B, ..., k] as ids of a pool, page_table [B, pages]; −1 and ids on a page −1 give −1."""
    pages = page_table.view(page_table.shape[0], *(1,) * (indices.dim() - 2), -1)
    logical = indices.clamp_min(0).long()
    page = pages.expand(*indices.shape[:-1], -1).gather(-1, logical // page_size).long()
    found = (indices >= 0) & (page >= 0)
    return torch.where(found, page * page_size + logical % page_size, -1).to(torch.int32)


def loop(
    scores: Tensor, k: int, *, lengths=None, threshold=None, sorted=False, page_table=None, page_size=1
) -> TopK:  # fmt: skip
    """The k largest of each row, equal ones by low index; what is not above −inf, or is a NaN, is not there."""
    rows = scores.flatten(0, -2)
    length = None if lengths is None else broadcast_lengths(lengths, scores).flatten().tolist()
    values, indices, counts = scores.new_full((len(rows), k), -torch.inf), torch.full((len(rows), k), -1), []
    for n, row in enumerate(rows):
        numbers = row.to(accumulate_dtype(row.dtype)).tolist()[: None if length is None else length[n]]
        lowest = -torch.inf if threshold is None else torch.tensor(threshold, dtype=accumulate_dtype(row.dtype)).item()
        there = [i for i, x in enumerate(numbers) if x > -torch.inf and x >= lowest]
        best = in_order(there, key=lambda i: (-numbers[i], i))[:k]
        best = best if sorted else in_order(best)
        counts.append(len(best))
        indices[n, : len(best)] = torch.tensor(best, dtype=torch.long)
        values[n, : len(best)] = row[indices[n, : len(best)].to(row.device)]
    shape = scores.shape[:-1]
    found = indices.to(scores.device, torch.int32).view(*shape, k)
    if page_table is not None:
        found = translated(found, page_table, page_size)
    return TopK(values.view(*shape, k), found, torch.tensor(counts, dtype=torch.int32).view(shape).to(scores.device))


def broadcast_lengths(lengths: Tensor, scores: Tensor) -> Tensor:
    """lengths [B] or [B, ...] as one number for every row of scores [B, ..., N]."""
    return lengths.view(*lengths.shape, *(1,) * (scores.dim() - 1 - lengths.dim())).expand(scores.shape[:-1])


def chunked(
    scores: Tensor, k: int, *, lengths=None, threshold=None, sorted=False, page_table=None, page_size=1
) -> TopK:  # fmt: skip
    """`loop` on all rows at once."""
    width, position = scores.shape[-1], torch.arange(scores.shape[-1], device=scores.device)
    found = scores.detach()
    there = found > -torch.inf  # and no NaN
    if threshold is not None:
        there &= found.to(accumulate_dtype(found.dtype)) >= threshold
    if lengths is not None:
        there &= position < broadcast_lengths(lengths, scores)[..., None]
    found = found.masked_fill(~there, -torch.inf)
    if width > k:
        last = found.topk(k).values[..., -1:]
        equal = there & (found == last)
        above = there & (found > last)
        there = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    order = torch.where(there, position, width)
    indices = order.topk(min(k, width), largest=False, sorted=True).values
    used = indices < width
    values = found.gather(-1, indices.clamp_max(width - 1)) if width else found
    values = values.masked_fill(~used, -torch.inf)
    if sorted:
        values, rank = values.sort(dim=-1, descending=True, stable=True)
        indices, used = indices.gather(-1, rank), used.gather(-1, rank)
    pad = (0, k - indices.shape[-1])
    indices = torch.nn.functional.pad(indices.masked_fill(~used, -1).to(torch.int32), pad, value=-1)
    values = torch.nn.functional.pad(values, pad, value=-torch.inf)
    if page_table is not None:
        indices = translated(indices, page_table, page_size)
    return TopK(values, indices, there.sum(-1, dtype=torch.int32))
