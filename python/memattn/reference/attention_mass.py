"""Column mass of an attention call in plain torch.

`loop` is the definition, one query row at a time over the list of keys it sees; in float64 it is the truth every
backend is measured against. `chunked` is the fallback that runs anywhere torch does: blocks of queries against the
range of keys they may see, so that memory is O(T · BLOCK).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memattn.reference.attention import (
    BLOCK,
    _decays,
    _grouped,
    _head_of,
    _placed,
    _positions,
    _range,
    _sees,
    _ungrouped,
    _visible,
    accumulate_dtype,
    cumulative_decay,
)
from memattn.reference.attention_mask import Mask


def over_heads(mass: Tensor, key_heads: int, head_map: str, reduce_heads: str) -> Tensor:
    """[B, Tk, HQ] as it is, summed over the heads that read one key head [B, Tk, HKV], or over all [B, Tk, 1]."""
    if reduce_heads == "none":
        return mass
    if reduce_heads == "sum":
        return mass.sum(-1, keepdim=True)
    return _grouped(mass, key_heads, head_map).sum(2).transpose(1, 2)


def loop(
    q: Tensor, k: Tensor, lse: Tensor, *, causal=True, window=None, prefix_len=0, block_size=None, chunk_rule=None,
    log_decay=None, alibi_slopes=None, cu_seqlens_q=None, cu_seqlens_k=None, q_offset=0, head_map="gqa",
    query_range=None, reduce_heads="none", scale=None,
) -> Tensor:  # fmt: skip
    """m_j = Σ_i e^{s_ij − ℓ_i} over the rows i of the range that see key j."""
    (batch, length, heads, _), dtype = q.shape, accumulate_dtype(q.dtype)
    bounds_q = [0, length] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    bounds_k = [0, k.shape[1]] if cu_seqlens_q is None else bounds_k
    shared = _head_of(heads, k.shape[2], head_map)
    q, keys, scale = q.to(dtype), k.to(dtype)[:, :, shared], scale or q.shape[3] ** -0.5
    mass = lse.new_zeros(batch, k.shape[1], heads, dtype=dtype)
    for b in range(batch):
        for n in range(len(bounds_q) - 1):
            rows, start, count = bounds_q[n + 1] - bounds_q[n], bounds_k[n], bounds_k[n + 1] - bounds_k[n]
            for t in range(rows)[slice(*(query_range or (None,)))]:
                i = t + (count - rows if q_offset == "end" else q_offset)
                seen = [j for j in range(count) if _sees(i, j, causal, window, prefix_len, block_size, chunk_rule)]
                for j in seen:
                    s = scale * (q[b, bounds_q[n] + t] * keys[b, start + j]).sum(-1)
                    if log_decay is not None:
                        s = s + log_decay[b, start + j + 1 : start + i + 1].to(dtype).sum(0)
                    if alibi_slopes is not None:
                        s = s - (i - j) * alibi_slopes.to(dtype)
                    row = lse[b, bounds_q[n] + t]
                    mass[b, start + j] += (s - row).exp().where(row != -torch.inf, 0.0)
    return over_heads(mass, k.shape[2], head_map, reduce_heads)


def _taken(row: Tensor, sequence: Tensor | None, bounds: Tensor | None, length: int, query_range) -> Tensor:
    """Which rows of q the range names, row being each one's place in its sequence."""
    start, stop = query_range or (None, None)
    count = torch.full_like(row, length) if sequence is None or bounds is None else bounds.long().diff()[sequence]
    taken = row >= (0 if start is None else start if start >= 0 else count + start)
    return taken if stop is None else taken & (row < (stop if stop >= 0 else count + stop))


def chunked(
    q: Tensor, k: Tensor, lse: Tensor, *, causal=True, window=None, prefix_len=0, block_size=None, chunk_rule=None,
    log_decay=None, alibi_slopes=None, cu_seqlens_q=None, cu_seqlens_k=None, q_offset=0, head_map="gqa",
    query_range=None, reduce_heads="none", scale=None,
) -> Tensor:  # fmt: skip
    """`loop` by blocks of queries. Packed sequences are masked, not skipped: no bound is read by the host."""
    length, (total, key_heads), dtype = q.shape[1], k.shape[1:3], accumulate_dtype(q.dtype)
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    row, sequence_q = _positions(length, cu_seqlens_q, q.device)
    j, sequence_k = _positions(total, cu_seqlens_k, q.device)
    i, offset = _placed(row, sequence_q, cu_seqlens_q, cu_seqlens_k, total - length, q_offset)
    mask = Mask(causal, window, prefix_len, block_size, chunk_rule, offset)
    decay = cumulative_decay(log_decay, alibi_slopes, k)
    decay_q, decay_k = _decays(decay, i, sequence_q, cu_seqlens_k, key_heads, head_map)
    left_out = ~_taken(row, sequence_q, cu_seqlens_q, length, query_range)[:, None] | (lse == -torch.inf)
    weights = _grouped(lse.masked_fill(left_out, torch.inf), key_heads, head_map)
    queries = _grouped(q.to(dtype) * (q.shape[3] ** -0.5 if scale is None else scale), key_heads, head_map)
    keys = k.to(dtype).transpose(1, 2)[:, :, None]
    mass = weights.new_zeros(*weights.shape[:3], total)
    first, stop, _ = slice(*(query_range or (None,))).indices(length) if sequence_q is None else (0, length, 1)
    for a in range(first, stop, BLOCK):
        b, columns = min(a + BLOCK, stop), slice(0, total)
        if sequence_q is None:
            columns = _range(mask, a + offset, b - 1 + offset, total)
        s = queries[..., a:b, :] @ keys[..., columns, :].mT
        if decay is not None:
            s = s + (decay_q[..., a:b, None] - decay_k[..., None, columns]).to(dtype)
        positions_q = i[a:b], None if sequence_q is None else sequence_q[a:b]
        positions_k = j[columns], None if sequence_k is None else sequence_k[columns]
        p = (s - weights[..., a:b, None]).exp().masked_fill(~_visible(mask, positions_q, positions_k), 0.0)
        mass[..., columns] += p.sum(-2)
    return over_heads(_ungrouped(mass, head_map), key_heads, head_map, reduce_heads)
