"""Nearest keys and attention over them in plain torch.

`loop_knn` and `loop` are the definitions, one query at a time over all its scores. `chunked_knn` and `chunked` run
anywhere torch does: scores of PART keys at a time joined with the best so far; the found rows gathered for CHUNK
numbers' worth of queries at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memattn.reference import topk as selection
from memattn.reference.attention import AttentionOutput, accumulate_dtype
from memattn.reference.topk import TopK

PART = 8192
CHUNK = 1 << 24
TINY = 1e-12


def normalised(x: Tensor) -> Tensor:
    """x / |x| over the last axis, 0 for x = 0."""
    return x * (x.square().sum(-1, keepdim=True) + TINY).rsqrt()


def _prepared(q: Tensor, keys: Tensor, metric: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    q, keys = q.detach().to(dtype), keys.detach().to(dtype)
    return (normalised(q), normalised(keys)) if metric == "cos" else (q, keys)


def loop_knn(q: Tensor, keys: Tensor, k: int, *, metric="dot", lengths=None, threshold=None, sorted=False) -> TopK:
    """The k largest of q_i·k_j, or of the cosine, over all keys j of the query's head."""
    (batch, queries, heads, _), tokens = q.shape, keys.shape[1]
    group = heads // keys.shape[2]
    q, keys = _prepared(q, keys, metric, accumulate_dtype(q.dtype))
    scores = q.new_empty(batch, queries, heads, tokens)
    for b in range(batch):
        for h in range(heads):
            for j in range(tokens):
                scores[b, :, h, j] = (q[b, :, h] * keys[b, j, h // group]).sum(-1)
    return selection.loop(scores, k, lengths=lengths, threshold=threshold, sorted=sorted)


def chunked_knn(
    q: Tensor, keys: Tensor, k: int, *, metric="dot", lengths=None, threshold=None, sorted=False, operand_dtype=None
) -> TopK:  # fmt: skip
    """`loop_knn` part by part. operand_dtype is for the tolerance: 16-bit products are exact, only their sum rounds."""
    (batch, queries, heads, dim), (_, tokens, key_heads, _) = q.shape, keys.shape
    q, keys = _prepared(q, keys, metric, accumulate_dtype(q.dtype))
    group = heads // key_heads
    q = q.view(batch, queries, key_heads, group, dim).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, HKV, G·S, D]
    best = TopK(q.new_empty(*q.shape[:3], 0), q.new_empty(*q.shape[:3], 0, dtype=torch.int32), q.new_empty(0))
    for first in range(0, tokens, PART):
        part = keys[:, first : first + PART].permute(0, 2, 3, 1)
        scores = q @ part
        position = torch.arange(first, first + part.shape[3], dtype=torch.int32, device=q.device)
        if lengths is not None:
            scores = scores.masked_fill(position >= lengths[:, None, None, None], -torch.inf)
        scores = torch.cat([best.values, scores], -1)
        position = torch.cat([best.indices, position.expand(*q.shape[:3], -1)], -1)
        found = selection.chunked(scores, k, threshold=threshold)
        used = found.indices >= 0
        place = position.gather(-1, found.indices.clamp_min(0).long()).masked_fill(~used, -1)
        best = TopK(found.values, place, found.counts)
    if not tokens:
        best = selection.chunked(best.values, k)

    def by_query(x: Tensor) -> Tensor:
        return x.unflatten(2, (group, queries)).flatten(1, 2).transpose(1, 2).contiguous()

    found = TopK(*(by_query(x) for x in best))
    return in_order(found) if sorted else found


def in_order(found: TopK) -> TopK:
    """Slots by descending value, equal ones by index."""
    values, rank = found.values.sort(dim=-1, descending=True, stable=True)
    return TopK(values, found.indices.gather(-1, rank), found.counts)


def loop(
    q: Tensor, keys: Tensor, values: Tensor, k: int, *, metric="dot", lengths=None, threshold=None, scale=None
) -> tuple[AttentionOutput, TopK]:  # fmt: skip
    """o_i = Σ_{j∈I(i)} e^{s_ij − ℓ_i} v_j over the keys that `loop_knn` finds."""
    (batch, queries, heads, dim), dtype = q.shape, accumulate_dtype(q.dtype)
    scale, group = dim**-0.5 if scale is None else scale, heads // keys.shape[2]
    found = loop_knn(q, keys, k, metric=metric, lengths=lengths, threshold=threshold)
    outputs, lses = [], []
    for b, t, h in torch.cartesian_prod(*(torch.arange(n) for n in (batch, queries, heads))).tolist():
        picked = found.indices[b, t, h, : found.counts[b, t, h]].long()
        s = scale * (keys[b, picked, h // group].to(dtype) @ q[b, t, h].to(dtype))
        lses.append(s.logsumexp(0))
        weights = (s - lses[-1]).exp()
        outputs.append(weights @ values[b, picked, h // group].to(dtype))
    o = torch.stack(outputs).view(batch, queries, heads, values.shape[3])
    return AttentionOutput(o.to(q.dtype), torch.stack(lses).view(batch, queries, heads)), found


def attend(q: Tensor, keys: Tensor, values: Tensor, found: TopK, scale: float) -> AttentionOutput:
    """Attention of every query over the rows found for it, differentiable in q, keys and values."""
    queries, heads, dim = q.shape[1:]
    rows = max(1, CHUNK // max(1, q.shape[0] * heads * found.indices.shape[3] * (dim + values.shape[3])))
    parts = [
        _attend(q[:, a : a + rows], keys, values, found.indices[:, a : a + rows], scale)
        for a in range(0, max(queries, 1), rows)
    ]
    return AttentionOutput(*(torch.cat(x, 1) for x in zip(*parts, strict=True)))


def _attend(q: Tensor, keys: Tensor, values: Tensor, indices: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    (batch, _, heads, _), (_, tokens, key_heads, _), dtype = q.shape, keys.shape, accumulate_dtype(q.dtype)
    seen = indices >= 0
    head = torch.arange(heads, device=q.device) // (heads // key_heads)
    row = torch.arange(batch, device=q.device)[:, None, None, None] * tokens + indices.clamp_min(0)
    flat = (row * key_heads + head[:, None]).flatten()

    def gathered(x: Tensor) -> Tensor:
        if not x.shape[1]:
            return x.new_zeros(*indices.shape, x.shape[3], dtype=dtype)
        found = x.flatten(0, 2).index_select(0, flat).view(*indices.shape, x.shape[3])
        return torch.where(seen[..., None], found.to(dtype), 0.0)  # 0 · NaN

    s = scale * (gathered(keys) @ q.to(dtype)[..., None])[..., 0]
    s = s.masked_fill(~seen, -torch.inf)
    empty = ~seen.any(-1)
    lse = s.masked_fill(empty[..., None], 0.0).logsumexp(-1)
    weights = (s - lse[..., None]).exp()
    o = (weights[..., None, :] @ gathered(values))[..., 0, :]
    return o.to(q.dtype), lse.masked_fill(empty, -torch.inf)


def chunked(
    q: Tensor, keys: Tensor, values: Tensor, k: int, *, metric="dot", lengths=None, threshold=None, scale=None
) -> tuple[AttentionOutput, TopK]:  # fmt: skip
    """`loop` for all queries at once."""
    found = chunked_knn(q, keys, k, metric=metric, lengths=lengths, threshold=threshold)
    return attend(q, keys, values, found, q.shape[3] ** -0.5 if scale is None else scale), found
