"""Attention with memory masks and a differentiable log-sum-exp in plain torch.

`loop` is the definition, one query row at a time over the list of keys it sees; in float64 it is the truth every
backend is measured against. `chunked` is the differentiable fallback that runs anywhere torch does: blocks of queries
against the range of keys they may see, recomputed in backward, so that memory is O(T · BLOCK).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memattn.reference.attention_mask import Mask

BLOCK = 128


class AttentionOutput(NamedTuple):
    """o [B, T, HQ, V] in q's dtype; lse [B, T, HQ], natural logarithm, float32 (float64 with float64 q)."""

    o: Tensor
    lse: Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums and of lse: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def one_sink(sink: Tensor, dtype: torch.dtype) -> Tensor:
    """[HQ] or [HQ, r] sink logits as the one logit per head that weighs the same."""
    return sink.to(dtype) if sink.dim() == 1 else sink.to(dtype).logsumexp(-1)


def joined(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax over disjoint parts, from their outputs [..., V] and log-sum-exps [...], all in the dtype of sums.

    Log-sum-exps beyond the outputs are of parts without values: sinks.
    """
    stacked = torch.stack(tuple(lses))
    empty = (stacked == -torch.inf).all(0)
    lse = stacked.masked_fill(empty, 0.0).logsumexp(0)  # the guard keeps (−inf) − (−inf) out of both directions
    weights = (stacked - lse).exp()
    o = weights[0][..., None] * outputs[0]
    for w, x in zip(weights[1:], outputs[1:], strict=False):
        o = o + w[..., None] * x
    return o, lse.masked_fill(empty, -torch.inf)


def cumulative_decay(log_decay: Tensor | None, alibi_slopes: Tensor | None, k: Tensor) -> Tensor | None:
    """c [B, Tk, HQ] float64 with bias c_i − c_j. A slope is a constant decay; differences stay exact at any length.

    Where a decay is not finite, c is NaN, and only there: every row that sees the key gets it, no other sequence does.
    """
    total = None
    if log_decay is not None:
        finite = log_decay.isfinite()
        log_decay = torch.where(finite, log_decay, 0.0)
        total = torch.where(finite, log_decay.double().cumsum(1), torch.nan)
    if alibi_slopes is None:
        return total
    position = torch.arange(k.shape[1], device=k.device, dtype=torch.float64)
    slopes = -position[:, None] * alibi_slopes.double()
    return slopes.expand(k.shape[0], -1, -1) if total is None else total + slopes


def _head_of(heads: int, key_heads: int, head_map: str) -> list[int]:
    group = heads // key_heads
    return [h // group if head_map == "gqa" else h % key_heads for h in range(heads)]


def _sees(i, j, causal, window, prefix_len, block_size, chunk_rule):
    """The definition, condition by condition."""
    if j < prefix_len:
        return True
    kind, *sizes = chunk_rule or (None,)
    if kind == "summary":
        return j < i // sizes[0]
    if causal is True and j > i:
        return False
    if causal == "block" and j // block_size > i // block_size:
        return False
    if causal != "block" and block_size is not None and i // block_size != j // block_size:
        return False
    if window is not None and j <= i - window:
        return False
    return kind is None or (j + 1) % sizes[0] == 0 or j > i - sizes[1] or j < sizes[2]


def loop(
    q: Tensor, k: Tensor, v: Tensor, *, causal=True, window=None, prefix_len=0, block_size=None, chunk_rule=None,
    sink=None, log_decay=None, alibi_slopes=None, merge=None, cu_seqlens_q=None, cu_seqlens_k=None, q_offset=0,
    head_map="gqa", scale=None,
) -> AttentionOutput:  # fmt: skip
    """o_i = Σ_j e^{s_ij − ℓ_i} v_j over the keys that row i sees, ℓ_i = log(Σ_j e^{s_ij} + Σ_r e^{sink_r}).

    merge = (o', ℓ'): one key more for row i, with score ℓ'_i and value o'_i.
    """
    (batch, length, heads, _), stored, dtype = q.shape, q.dtype, accumulate_dtype(q.dtype)
    bounds_q = [0, length] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    bounds_k = (
        [0, k.shape[1]] if cu_seqlens_q is None else (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).tolist()
    )  # noqa: E501
    shared = _head_of(heads, k.shape[2], head_map)
    q, k, v, scale = q.to(dtype), k.to(dtype)[:, :, shared], v.to(dtype)[:, :, shared], scale or q.shape[3] ** -0.5
    sinks = None if sink is None else sink.to(dtype).reshape(heads, -1)
    outputs, lses = [], []
    for b in range(batch):
        for n in range(len(bounds_q) - 1):
            for t in range(bounds_q[n + 1] - bounds_q[n]):
                start, count = bounds_k[n], bounds_k[n + 1] - bounds_k[n]
                i = t + (count - (bounds_q[n + 1] - bounds_q[n]) if q_offset == "end" else q_offset)
                seen = [j for j in range(count) if _sees(i, j, causal, window, prefix_len, block_size, chunk_rule)]
                keys, values = k[b, start:][seen], v[b, start:][seen]
                s = scale * (q[b, bounds_q[n] + t] * keys).sum(-1)
                if log_decay is not None and seen:
                    steps = log_decay[b, start:].to(dtype)
                    s = s + torch.stack([steps[j + 1 : i + 1].sum(0) for j in seen])
                if alibi_slopes is not None and seen:
                    distance = torch.tensor([i - j for j in seen], device=q.device)
                    s = s - distance[:, None] * alibi_slopes.to(dtype)
                if merge is not None:
                    other, score = (x[b, bounds_q[n] + t][None].to(dtype) for x in merge)
                    s, values = torch.cat([score, s]), torch.cat([other, values])
                logits = s if sinks is None else torch.cat([s, sinks.t()])
                empty = (logits == -torch.inf).all(0)
                if not len(logits) or bool(empty.all()):
                    outputs.append((0 * q[b, 0, :, :1]).expand(-1, v.shape[3]))
                    lses.append(q.new_full((heads,), -torch.inf))
                    continue
                lse = logits.masked_fill(empty, 0.0).logsumexp(0)
                lses.append(lse.masked_fill(empty, -torch.inf))
                outputs.append(((s - lse).exp()[..., None] * values).sum(0))
    o = torch.stack(outputs) if outputs else q.new_zeros(0)
    lse = torch.stack(lses) if lses else q.new_zeros(0)
    return AttentionOutput(o.reshape(batch, length, heads, v.shape[3]).to(stored), lse.reshape(batch, length, heads))


def _positions(length: int, bounds: Tensor | None, device) -> tuple[Tensor, Tensor | None]:
    """Position of every row in its sequence, and the sequence when packed."""
    token = torch.arange(length, device=device)
    if bounds is None:
        return token, None
    sequence = torch.searchsorted(bounds.long(), token, right=True) - 1
    return token - bounds.long()[sequence], sequence


def _placed(row, sequence, cu_seqlens_q, cu_seqlens_k, difference, q_offset):
    """Positions of the query rows, and the offset of those of an unpacked batch. "end": the last at the last key."""
    if q_offset != "end":
        return row + q_offset, q_offset
    if sequence is None:
        return row + difference, difference
    return row + (cu_seqlens_k.long().diff() - cu_seqlens_q.long().diff())[sequence], 0


def _grouped(x: Tensor, key_heads: int, head_map: str) -> Tensor:
    """[B, T, HQ, ...] -> [B, HKV, G, T, ...], the query heads beside the key head they read."""
    if head_map == "gqa":
        return x.unflatten(2, (key_heads, -1)).movedim(1, 3)
    return x.unflatten(2, (-1, key_heads)).transpose(2, 3).movedim(1, 3)


def _ungrouped(x: Tensor, head_map: str) -> Tensor:
    return (x if head_map == "gqa" else x.transpose(1, 2)).flatten(1, 2).transpose(1, 2)


def _visible(mask, i, j):
    """[n, m] from (position, sequence or None) of queries and of keys; None where every query sees every key."""
    if mask is None:
        return None
    seen = mask.visible(i[0][:, None], j[0])
    return seen if i[1] is None else seen & (i[1][:, None] == j[1])


def _block(q, k, v, sink, first_o, first_lse, decay_q, decay_k, mask, i, j, operand_dtype):
    """One block: q [B,HKV,G,n,K] scaled, k [B,HKV,1,m,K], v [B,HKV,1,m,V] -> o [B,HKV,G,n,V], lse [B,HKV,G,n]."""
    s, seen = q @ k.mT, _visible(mask, i, j)
    if decay_q is not None:
        s = s + (decay_q[..., :, None] - decay_k[..., None, :]).to(s.dtype)
    if seen is not None:
        s = s.masked_fill(~seen, -torch.inf)
    if sink is not None:
        s = torch.cat([sink[..., None, None].expand(*s.shape[:-1], 1), s], -1)
    if first_lse is not None:
        s = torch.cat([first_lse[..., None], s], -1)
    empty = (s == -torch.inf).all(-1)
    lse = s.masked_fill(empty[..., None], 0.0).logsumexp(-1)
    weights = (s - lse[..., None]).exp()
    p = weights[..., s.shape[-1] - k.shape[-2] :]
    p = p if operand_dtype is None else p.to(operand_dtype).to(p.dtype)
    o = p @ v if first_o is None else p @ v + weights[..., :1] * first_o
    return o, lse.masked_fill(empty, -torch.inf)


def _recomputed(*arguments):
    """`_block`, of which only the inputs are kept for backward."""
    if not torch.is_grad_enabled():
        return _block(*arguments)
    return torch.utils.checkpoint.checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False)


def _decays(decay, i, sequence, bounds, key_heads, head_map):
    """The cumulative decay [B, HKV, G, T] of the queries, taken at the keys of their positions i, and of the keys."""
    if decay is None:
        return None, None
    keys = _grouped(decay, key_heads, head_map)
    row = i if sequence is None else i + bounds.long()[sequence]
    return (keys[..., row] if row.numel() else keys[..., :0]), keys


def _range(mask: Mask, first: int, last: int, total: int) -> slice:
    """Keys that positions first..last may see, the prefix included."""
    prefix = min(mask.prefix_len, total)
    begin, end = (0 if prefix else mask.keys(first, total)[0]), max(mask.keys(last, total)[1], prefix)
    return slice(min(begin, end), end)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, *, causal=True, window=None, prefix_len=0, block_size=None, chunk_rule=None,
    sink=None, log_decay=None, alibi_slopes=None, merge=None, cu_seqlens_q=None, cu_seqlens_k=None, q_offset=0,
    head_map="gqa", scale=None, operand_dtype=None,
) -> AttentionOutput:  # fmt: skip
    """`loop` by blocks of queries. Packed sequences are masked, not skipped: no bound is read by the host.

    operand_dtype rounds the operands of matrix products, as hardware with products of that type does.
    """
    length, (total, key_heads), dtype = q.shape[1], k.shape[1:3], accumulate_dtype(q.dtype)
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    row, sequence_q = _positions(length, cu_seqlens_q, q.device)
    j, sequence_k = _positions(total, cu_seqlens_k, q.device)
    i, offset = _placed(row, sequence_q, cu_seqlens_q, cu_seqlens_k, total - length, q_offset)
    mask = Mask(causal, window, prefix_len, block_size, chunk_rule, offset)
    decay = cumulative_decay(log_decay, alibi_slopes, k)
    decay_q, decay_k = _decays(decay, i, sequence_q, cu_seqlens_k, key_heads, head_map)
    if sink is not None:
        sink = _grouped(one_sink(sink, dtype)[None, None], key_heads, head_map)[..., 0]
    taken_up = (None, None) if merge is None else tuple(_grouped(x.to(dtype), key_heads, head_map) for x in merge)
    queries = _grouped(q.to(dtype) * (q.shape[3] ** -0.5 if scale is None else scale), key_heads, head_map)
    k, v = (x.to(dtype).transpose(1, 2)[:, :, None] for x in (k, v))
    outputs, lses = [], []
    for a in range(0, max(length, 1), BLOCK):
        masked: Mask | None = mask
        b, columns = min(a + BLOCK, length), slice(0, total)
        if sequence_q is None and b > a:
            first, last = a + offset, b - 1 + offset
            columns = _range(mask, first, last, total)
            if mask.tile((first, last), (columns.start, columns.stop), total) == "full":
                masked = None
        positions_q = i[a:b], None if sequence_q is None else sequence_q[a:b]
        positions_k = j[columns], None if sequence_k is None else sequence_k[columns]
        bias = (None, None) if decay is None else (decay_q[..., a:b], decay_k[..., columns])
        rows = queries[..., a:b, :], k[..., columns, :], v[..., columns, :]
        started = (None if x is None else x[:, :, :, a:b] for x in taken_up)
        o, lse = _recomputed(*rows, sink, *started, *bias, masked, positions_q, positions_k, operand_dtype)
        outputs.append(o)
        lses.append(lse)
    o, lse = torch.cat(outputs, 3), torch.cat(lses, 3)
    return AttentionOutput(_ungrouped(o, head_map).to(q.dtype), _ungrouped(lse, head_map))
