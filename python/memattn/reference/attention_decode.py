"""Attention of the last tokens over a cache in plain torch.

`loop` is the definition, one query row at a time over the list of keys it sees; in float64 it is the truth every
backend is measured against. `chunked` is the fallback that runs anywhere torch does, without waiting for the device:
all slots of the cache are scored, and those that hold no key the query sees are masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memattn.reference.attention import AttentionOutput, _head_of, _sees, accumulate_dtype, one_sink
from memattn.reference.attention_mask import Mask


def _slot_of(position: int, capacity: int, ring_start: int | None) -> int:
    if ring_start is None or position < ring_start:
        return position
    return ring_start + (position - ring_start) % (capacity - ring_start)


def _alive(position: int, tokens: int, capacity: int, ring_start: int | None) -> bool:
    """Whether the cache still holds the key of this position."""
    return ring_start is None or position < ring_start or position >= tokens - (capacity - ring_start)


def loop(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens, page_table=None, ring_start=None, causal=True,
    window=None, prefix_len=0, block_size=None, chunk_rule=None, sink=None, decay_cache=None, alibi_slopes=None,
    head_map="gqa", scale=None,
) -> AttentionOutput:  # fmt: skip
    """o_i = Σ_j e^{s_ij − ℓ_i} v_j over the keys that query i sees, s_ij = scale q_i·k_j + c_i − c_j."""
    (batch, length, heads, key_dim), stored, dtype = q.shape, q.dtype, accumulate_dtype(q.dtype)
    size = k_cache.shape[1]
    capacity = size if page_table is None else size * page_table.shape[1]
    shared = _head_of(heads, k_cache.shape[2], head_map)
    q, scale = q.to(dtype), key_dim**-0.5 if scale is None else scale
    o, lse = q.new_zeros(batch, length, heads, v_cache.shape[3]), q.new_full((batch, length, heads), -torch.inf)
    for b in range(batch):
        tokens = int(cache_seqlens[b])

        def row_of(j, b=b):
            slot = _slot_of(j, capacity, ring_start)
            return (b, slot) if page_table is None else (int(page_table[b, slot // size]), slot % size)

        held = [j for j in range(tokens) if _alive(j, tokens, capacity, ring_start) and row_of(j)[0] >= 0]
        for t in range(length):
            i = tokens - length + t
            seen = [j for j in held if i >= 0 and _sees(i, j, causal, window, prefix_len, block_size, chunk_rule)]
            logits = [q.new_zeros(heads, 0)]
            values = q.new_zeros(heads, 0, v_cache.shape[3])
            if seen:
                rows = [row_of(j) for j in seen]
                keys = torch.stack([k_cache[r].to(dtype) for r in rows])[:, shared]
                values = torch.stack([v_cache[r].to(dtype) for r in rows])[:, shared].transpose(0, 1)
                s = scale * (q[b, t] * keys).sum(-1)
                if decay_cache is not None:
                    s = s + torch.stack([decay_cache[row_of(i)] - decay_cache[r] for r in rows]).to(dtype)
                if alibi_slopes is not None:
                    distance = torch.tensor([i - j for j in seen], device=q.device)
                    s = s - distance[:, None] * alibi_slopes.to(dtype)
                logits.append(s.t())
            if sink is not None and i >= 0:
                logits.append(sink.to(dtype).reshape(heads, -1))
            joined = torch.cat(logits, 1)
            if joined.shape[1]:
                lse[b, t] = joined.logsumexp(1)
                weights = (joined[:, : len(seen)] - lse[b, t][:, None]).exp()
                o[b, t] = (weights[..., None] * values).sum(1)
    return AttentionOutput(o.to(stored), lse)


def _positions(tokens: Tensor, capacity: int, ring_start: int | None) -> Tensor:
    """[B, capacity] position of the key in every slot of rows with so many tokens; −1 where there is none."""
    slot = torch.arange(capacity, device=tokens.device).expand(tokens.shape[0], -1)
    if ring_start is None:
        return torch.where(slot < tokens[:, None], slot, -1)
    turn = torch.div(tokens[:, None] - 1 - slot, capacity - ring_start, rounding_mode="floor")
    turn = torch.where(slot < ring_start, turn.clamp(max=0), turn)
    return torch.where(turn < 0, -1, slot + turn * (capacity - ring_start))


def _gathered(cache: Tensor, page_table: Tensor | None) -> Tensor:
    """[B, capacity, ...] from pages."""
    if page_table is None:
        return cache
    return cache[page_table.long().clamp(0, cache.shape[0] - 1)].flatten(1, 2)


def chunked(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens, page_table=None, ring_start=None, causal=True,
    window=None, prefix_len=0, block_size=None, chunk_rule=None, sink=None, decay_cache=None, alibi_slopes=None,
    head_map="gqa", scale=None,
) -> AttentionOutput:  # fmt: skip
    """`loop` over all slots at once."""
    (_, length, heads, key_dim), stored, dtype = q.shape, q.dtype, accumulate_dtype(q.dtype)
    mask, (pages, page_size) = Mask(causal, window, prefix_len, block_size, chunk_rule), k_cache.shape[:2]
    k, v = _gathered(k_cache, page_table), _gathered(v_cache, page_table)
    c = None if decay_cache is None else _gathered(decay_cache, page_table)
    tokens = cache_seqlens.long()
    if ring_start is None:
        tokens = tokens.clamp(max=k.shape[1])
    shared = torch.tensor(_head_of(heads, k.shape[2], head_map), device=q.device)
    j = _positions(tokens, k.shape[1], ring_start)
    i = tokens[:, None] - length + torch.arange(length, device=q.device)
    seen = mask.visible(i[:, :, None], j[:, None, :]) & (j >= 0)[:, None, :] & (i >= 0)[:, :, None]
    if page_table is not None:
        there = ((page_table >= 0) & (page_table < pages)).repeat_interleave(page_size, 1)
        seen = seen & there[:, None, :]
    k, v = (x.to(dtype).index_select(2, shared).transpose(1, 2) for x in (k, v))  # [B, HQ, S, D]
    s = (q.to(dtype) * (key_dim**-0.5 if scale is None else scale)).transpose(1, 2) @ k.mT  # [B, HQ, t, S]
    if c is not None:
        at = torch.where((j[:, None] == i[:, :, None])[..., None], c[:, None], 0.0).sum(2)  # c of the queries
        s = s + (at.transpose(1, 2)[..., None] - c.transpose(1, 2)[:, :, None]).to(dtype)
    if alibi_slopes is not None:
        s = s - (i[:, :, None] - j[:, None, :])[:, None] * alibi_slopes.to(dtype)[:, None, None]
    s = s.masked_fill(~seen[:, None], -torch.inf)
    if sink is not None:
        logit = torch.where((i >= 0)[:, None, :, None], one_sink(sink, dtype)[:, None, None], -torch.inf)
        s = torch.cat([logit, s], -1)
    empty = (s == -torch.inf).all(-1)
    lse = s.masked_fill(empty[..., None], 0.0).logsumexp(-1)
    p = (s - lse[..., None]).exp()[..., 0 if sink is None else 1 :]
    hidden = (~seen.any(1))[:, None, :, None]  # what no query sees may hold anything
    o = p @ v.masked_fill(hidden, 0.0)
    return AttentionOutput(o.transpose(1, 2).to(stored), lse.masked_fill(empty, -torch.inf).transpose(1, 2))
