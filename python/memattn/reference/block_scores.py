"""Scores of queries against block summaries in plain torch.

`loop` is the definition, one query, head and block at a time. `chunked` is one product and the steps after it; torch
differentiates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from memattn.reference.attention import accumulate_dtype
from memattn.reference.knn_attention import TINY, normalised
from memattn.reference.sign_codes import differing_bits

REDUCTIONS: dict[str, Callable] = {"sum": torch.sum, "mean": torch.mean, "max": torch.amax}


def visibility(
    shape: tuple[int, int, int], device: torch.device, counts: Tensor | None, block_ends: Tensor | None,
    q_positions: Tensor | None, force_first: int, force_last: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which blocks each query sees and which are forced upon it, broadcastable to [B, S, 1, N], N > 0.

    The last block is the one that holds the query, or the row's last where the query stands behind all.
    """
    batch, queries, blocks = shape
    block = torch.arange(blocks, device=device)
    last = (torch.full((1,), blocks, device=device) if counts is None else counts)[:, None] - 1  # [B, 1]
    seen = block <= last[..., None]  # [B, 1, N]
    if block_ends is not None and q_positions is not None:
        ends = block_ends if block_ends.dim() == 2 else block_ends[None]
        positions = q_positions if q_positions.dim() == 2 else q_positions[None]
        seen = seen & (ends[:, None] <= positions[..., None] + 1)
        last = torch.minimum(last, (ends[:, None] <= positions[..., None]).sum(-1))
    forced = (block <= last[..., None]) & ((block < force_first) | (block > last[..., None] - force_last))
    return seen[:, :, None], forced[:, :, None]


def _pair(q: Tensor, r: Tensor, kind: str, scale: float) -> float:
    """The score of one query q [D] against one summary r."""
    if kind == "hamming":
        return -scale * float(sum(bin((int(a) ^ int(b)) & 0xFFFFFFFF).count("1") for a, b in zip(q, r, strict=True)))
    q, r = (x.to(accumulate_dtype(x.dtype)) for x in (q, r))
    if kind == "bound":
        least, largest = r.chunk(2)
        return scale * float(sum(max(x * a, x * b) for x, a, b in zip(q, least, largest, strict=True)))
    if kind == "cos":
        return scale * float(q @ r) / math.sqrt((float(q @ q) + TINY) * (float(r @ r) + TINY))
    dot = scale * float(q @ r)
    return {"dot": dot, "relu": max(dot, 0.0), "sigmoid": 1 / (1 + math.exp(-dot))}[kind]


def loop(
    q: Tensor, r: Tensor, *, kind="dot", weight=None, scale=1.0, norm=None, over="none", reduce="sum",
    reduce_queries=None, counts=None, block_ends=None, q_positions=None, force_first=0, force_last=0, indices=None,
) -> Tensor:  # fmt: skip
    """Pair by pair, then softmax over what is seen, weights, heads, queries; −inf where not seen, +inf where forced."""
    (batch, queries, heads, _), (_, blocks, groups, _) = q.shape, r.shape
    share = heads // groups
    dtype = accumulate_dtype(q.dtype)
    seen, forced = visibility(
        (batch, queries, blocks), q.device, counts, block_ends, q_positions, force_first, force_last
    )
    columns = blocks if indices is None else indices.shape[3]
    s = torch.full((batch, queries, heads, columns), -torch.inf, dtype=dtype)
    visible = torch.zeros(batch, queries, heads, columns, dtype=torch.bool)
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in (batch, queries, heads))).tolist():
        listed = range(blocks) if indices is None else indices[b, t, min(h // share, indices.shape[2] - 1)].tolist()
        for n, j in enumerate(listed):
            if (j >= 0) if indices is not None else bool(seen.expand(batch, queries, 1, blocks)[b, t, 0, j]):
                visible[b, t, h, n] = True
                s[b, t, h, n] = _pair(q[b, t, h], r[b, j, h // share], kind, scale)
        if norm == "softmax" and bool(visible[b, t, h].any()):
            s[b, t, h] = s[b, t, h].softmax(-1)
        if weight is not None:
            s[b, t, h] = weight[b, t, h].to(dtype) * s[b, t, h].masked_fill(~visible[b, t, h], 0.0)
    return _finished(s, visible, None if indices is not None else forced, groups, over, reduce, reduce_queries)


def _finished(
    s: Tensor, seen: Tensor, forced: Tensor | None, groups: int, over: str, reduce: str, reduce_queries: str | None
) -> Tensor:  # fmt: skip
    """Scores [B, S, H, n] reduced over heads and over the queries that see a block; −inf where none does."""
    s = s.masked_fill(~seen, 0.0)
    if over != "none":
        groups = groups if over == "group" else 1
        s = REDUCTIONS[reduce](s.unflatten(2, (groups, -1)), 3)
        seen = seen if seen.shape[2] == 1 else seen.unflatten(2, (groups, -1)).any(3)
    if reduce_queries is not None:
        seen = seen.expand(-1, s.shape[1], -1, -1)
        if reduce_queries == "max":
            s = s.masked_fill(~seen, -torch.inf).amax(1, keepdim=True)
        else:
            s = s.masked_fill(~seen, 0.0).sum(1, keepdim=True)
            s = s / seen.sum(1, keepdim=True).clamp_min(1) if reduce_queries == "mean" else s
        seen, forced = seen.any(1, keepdim=True), None if forced is None else forced.any(1, keepdim=True)
    s = s.masked_fill(~seen, -torch.inf)
    return s if forced is None else s.masked_fill(forced, torch.inf)


def product(q: Tensor, r: Tensor) -> Tensor:
    """q_h·r_j of every head with its group's summaries: [B, S, H, N]."""
    (batch, queries, heads, dim), groups = q.shape, r.shape[2]
    rows = q.view(batch, queries, groups, heads // groups, dim).permute(0, 2, 1, 3, 4).flatten(2, 3)
    s = rows @ r.permute(0, 2, 3, 1)
    return s.unflatten(2, (queries, heads // groups)).transpose(1, 2).flatten(2, 3)


def operands(q: Tensor, r: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Vectors whose dot product is the score: max(q m, q M) = min(q, 0) m + max(q, 0) M for m ≤ M."""
    if kind == "cos":
        return normalised(q), normalised(r)
    return (torch.cat([q.clamp_max(0), q.clamp_min(0)], -1), r) if kind == "bound" else (q, r)


def _listed(q: Tensor, r: Tensor, indices: Tensor) -> Tensor:
    """The product with the blocks that each query's list names: [B, S, H, n]."""
    (batch, queries, heads, dim), (_, blocks, groups, _) = q.shape, r.shape
    lists = indices.expand(-1, -1, groups, -1)
    row = torch.arange(batch, device=q.device)[:, None, None, None] * blocks + lists.clamp_min(0)
    flat = row * groups + torch.arange(groups, device=q.device)[:, None]
    rows = r.flatten(0, 2).index_select(0, flat.flatten()).view(*lists.shape, dim)
    return (q.view(batch, queries, groups, heads // groups, dim) @ rows.mT).flatten(2, 3)


def finish(
    s: Tensor, groups: int, *, kind, weight=None, norm=None, over="none", reduce="sum", reduce_queries=None,
    counts=None, block_ends=None, q_positions=None, force_first=0, force_last=0, indices=None,
) -> Tensor:  # fmt: skip
    """What follows the product."""
    if kind in ("relu", "sigmoid"):
        s = s.relu() if kind == "relu" else s.sigmoid()
    if indices is None:
        shape = s.shape[0], s.shape[1], s.shape[3]
        seen, forced = visibility(shape, s.device, counts, block_ends, q_positions, force_first, force_last)
    else:
        seen, forced = (indices >= 0).repeat_interleave(s.shape[2] // indices.shape[2], 2), None
    if norm == "softmax":
        s = s.masked_fill(~seen, -torch.inf).masked_fill(~seen.any(-1, keepdim=True), 0.0).softmax(-1)
    s = s if weight is None else s * weight.to(s.dtype)[..., None]
    return _finished(s, seen, forced, groups, over, reduce, reduce_queries)


def raw_scores(q: Tensor, r: Tensor, kind: str, scale: float, indices: Tensor | None = None) -> Tensor:
    """scale times the product, or bits that differ: [B, S, H, N or n]."""
    if kind == "hamming":
        words = r.repeat_interleave(q.shape[2] // r.shape[2], 2).transpose(1, 2)[:, None]  # [B, 1, H, N, W]
        return -scale * differing_bits(q[..., None, :], words).to(torch.float32)
    dtype = accumulate_dtype(q.dtype)
    q, r = operands(q.to(dtype), r.to(dtype), kind)
    return scale * (product(q, r) if indices is None else _listed(q, r, indices))


def chunked(q: Tensor, r: Tensor, *, kind="dot", scale=1.0, indices=None, **steps) -> Tensor:
    """`loop` for all pairs at once; `steps` are those of `finish`."""
    return finish(raw_scores(q, r, kind, scale, indices), r.shape[2], kind=kind, indices=indices, **steps)
