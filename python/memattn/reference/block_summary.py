"""Summaries of blocks of keys in plain torch.

`loop` is the definition, one block at a time. `chunked` gathers the tokens of CHUNK numbers' worth of blocks at a time
and runs anywhere torch does; torch differentiates it in every mode.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memattn.reference import topk as selection
from memattn.reference.attention import accumulate_dtype

CHUNK = 1 << 24


class BlockSummary(NamedTuple):
    """values [B, N, HKV, D] (2D with "minmax": least, then largest) and counts [B, N] int32, the tokens behind them."""

    values: Tensor
    counts: Tensor


def block_bounds(
    tokens: int, block: int, stride: int | None, cu_blocks: Tensor | None, from_pos: int, device: torch.device
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """First and last token + 1 of every block that ends behind from_pos; [N] int64."""
    if cu_blocks is not None:
        return cu_blocks[:-1].long(), cu_blocks[1:].long()
    stride = block if stride is None else stride
    first = max(0, (from_pos - block) // stride + 1)
    begins = torch.arange(first, max(first, -(-tokens // stride)), device=device) * stride
    return begins, (begins + block).clamp_max(tokens)


def loop(
    k: Tensor, block: int, *, mode="mean", stride=None, weight=None, top=None, lengths=None, cu_blocks=None, from_pos=0
) -> BlockSummary:  # fmt: skip
    """r_j of the tokens of block j, each head and, where the mode is one of channels, each channel alone."""
    dtype = accumulate_dtype(k.dtype)
    bounds = torch.stack(block_bounds(k.shape[1], block, stride, cu_blocks, from_pos, k.device), 1).tolist()
    rows, counts = [], []
    for b in range(k.shape[0]):
        length = k.shape[1] if lengths is None else int(lengths[b])
        for begin, end in bounds:
            x = k[b, begin : min(end, length)].to(dtype)
            w = None if weight is None else weight[b, begin : min(end, length)].to(dtype)
            counts.append(len(x))
            rows.append(_summary(x, w, mode, top) if len(x) else k.new_zeros(k.shape[2], _width(k, mode), dtype=dtype))
    shape = k.shape[0], len(bounds)
    values = torch.stack(rows) if rows else k.new_empty(0, k.shape[2], _width(k, mode))
    return BlockSummary(
        values.to(k.dtype).view(*shape, k.shape[2], _width(k, mode)),
        torch.tensor(counts, dtype=torch.int32, device=k.device).view(shape),
    )


def _width(k: Tensor, mode: str) -> int:
    return k.shape[3] * (2 if mode == "minmax" else 1)


def _summary(x: Tensor, w: Tensor | None, mode: str, top: int | None) -> Tensor:
    """Of tokens x [n, HKV, D], n > 0."""
    if mode == "mean":
        return x.sum(0) / len(x)
    if mode in ("max", "minmax"):
        least, largest = x.amin(0), x.amax(0)
        return largest if mode == "max" else torch.cat([least, largest], -1)
    assert w is not None
    if mode == "gated":
        return (w.softmax(0) * x).sum(0)
    heads = []
    for h in range(x.shape[1]):
        there = [i for i in range(len(x)) if w[i, h] > -torch.inf]
        best = sorted(there, key=lambda i: (-float(w[i, h]), i))[:top]
        heads.append(x[best, h].mean(0) if best else 0 * x[0, h])
    return torch.stack(heads)


def chunked(
    k: Tensor, block: int, *, mode="mean", stride=None, weight=None, top=None, lengths=None, cu_blocks=None, from_pos=0
) -> BlockSummary:  # fmt: skip
    """`loop` for many blocks at once. A block has at most `block` tokens, also with cu_blocks."""
    begins, ends = block_bounds(k.shape[1], block, stride, cu_blocks, from_pos, k.device)
    ends = ends if lengths is None else torch.minimum(ends, lengths[:, None])
    counts = (ends - begins).clamp_min(0).expand(k.shape[0], -1)
    blocks = max(1, CHUNK // max(1, k.shape[0] * block * k.shape[2] * k.shape[3]))
    parts = [
        _summaries(k, weight, begins[a : a + blocks], counts[:, a : a + blocks], block, mode, top)
        for a in range(0, max(1, begins.shape[0]), blocks)
    ]
    return BlockSummary(torch.cat(parts, 1).to(k.dtype), counts.to(torch.int32))


def _summaries(
    k: Tensor, weight: Tensor | None, begins: Tensor, counts: Tensor, block: int, mode: str, top: int | None
) -> Tensor:  # fmt: skip
    dtype, place = accumulate_dtype(k.dtype), torch.arange(block, device=k.device)
    token = (begins[:, None] + place).clamp_max(max(k.shape[1] - 1, 0)).flatten()
    there = (place < counts[..., None])[..., None, None]  # [B, n, block, 1, 1]

    def windows(x: Tensor, fill: float) -> Tensor:
        found = x.index_select(1, token).unflatten(1, (begins.shape[0], block)).to(dtype)
        return torch.where(there if x.dim() == 4 else there[..., 0], found, fill)

    if mode == "mean":
        return windows(k, 0.0).sum(2) / counts.clamp_min(1)[..., None, None]
    if mode in ("max", "minmax"):
        largest = windows(k, -torch.inf).amax(2)
        both = largest if mode == "max" else torch.cat([windows(k, torch.inf).amin(2), largest], -1)
        return both.masked_fill((counts == 0)[..., None, None], 0.0)
    assert weight is not None
    if mode == "gated":
        gates = windows(weight, -torch.inf).masked_fill((counts == 0)[..., None, None, None], 0.0).softmax(2)
        return (gates * windows(k, 0.0)).sum(2)
    assert top is not None
    best = selection.chunked(windows(weight, -torch.inf).transpose(2, 3), top)  # [B, n, HKV, top]
    place = best.indices.clamp_min(0).long().transpose(2, 3)[..., None].expand(-1, -1, -1, -1, k.shape[3])
    picked = torch.where((best.indices >= 0).transpose(2, 3)[..., None], windows(k, 0.0).gather(2, place), 0.0)
    return picked.sum(2) / best.counts.clamp_min(1)[..., None]
