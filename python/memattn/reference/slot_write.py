"""Slot write in plain torch.

`loop` is the definition, one slot at a time over the list of keys it sees; in float64 it is the truth every backend is
measured against. `chunked` is the differentiable fallback that runs anywhere torch does: one softmax over slots and
tokens together, of which the M×T scores are kept for backward (T is one segment).
"""

from __future__ import annotations

import torch
from torch import Tensor

from memattn.reference.attention import AttentionOutput, accumulate_dtype


def _rows_of(n: int, batch: int, lengths: Tensor | None, cu_seqlens: Tensor | None, total: int) -> tuple[int, slice]:
    """Where the tokens of sequence n lie: batch row and range."""
    if cu_seqlens is not None:
        return 0, slice(int(cu_seqlens[n]), int(cu_seqlens[n + 1]))
    return n, slice(0, total if lengths is None else int(lengths[n]))


def loop(
    q: Tensor, k_self: Tensor | None, v_self: Tensor | None, k: Tensor, v: Tensor, *, see="own", tau=1.0, lengths=None,
    cu_seqlens=None, scale=None,
) -> AttentionOutput:  # fmt: skip
    """o_i = Σ_j e^{s_ij − ℓ_i} v_j over the tokens of slot i's sequence and, as `see` says, its own or all slots."""
    (sequences, slots, heads, dim), dtype = q.shape, accumulate_dtype(q.dtype)
    scale = (dim**-0.5 if scale is None else scale) / tau
    outputs, lses = [], []
    for n in range(sequences):
        row, tokens = _rows_of(n, k.shape[0], lengths, cu_seqlens, k.shape[1])
        for i in range(slots):
            keys, values = list(k[row, tokens].to(dtype)), list(v[row, tokens].to(dtype))
            for j in {"none": [], "own": [i], "all": list(range(slots))}[see]:
                assert k_self is not None and v_self is not None
                keys.append(k_self[n, j].to(dtype))
                values.append(v_self[n, j].to(dtype))
            if not keys:
                outputs.append((0 * q[n, i, :, :1]).to(dtype).expand(-1, v.shape[3]))
                lses.append(outputs[-1].new_full((heads,), -torch.inf))
                continue
            s = torch.stack([scale * (q[n, i].to(dtype) * key).sum(-1) for key in keys])
            lses.append(s.logsumexp(0))
            outputs.append(sum(w[:, None] * value for w, value in zip((s - lses[-1]).exp(), values, strict=True)))
    o = torch.stack(outputs).view(sequences, slots, heads, v.shape[3])
    return AttentionOutput(o.to(q.dtype), torch.stack(lses).view(sequences, slots, heads))


def _seen(q: Tensor, k: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None) -> Tensor | None:
    """Which tokens the slots see, broadcastable to their scores [B, H, M, T]; None for all."""
    token = torch.arange(k.shape[1], device=k.device)
    if cu_seqlens is not None:
        begin, end = (x.long().repeat_interleave(q.shape[1])[:, None] for x in (cu_seqlens[:-1], cu_seqlens[1:]))
        return (token >= begin) & (token < end)
    return None if lengths is None else token < lengths[:, None, None, None]


def chunked(
    q: Tensor, k_self: Tensor | None, v_self: Tensor | None, k: Tensor, v: Tensor, *, see="own", tau=1.0, lengths=None,
    cu_seqlens=None, scale=None, operand_dtype=None,
) -> AttentionOutput:  # fmt: skip
    """`loop` as one softmax. operand_dtype rounds the weights, as hardware with products of that type does."""
    (sequences, slots, heads, dim), dtype = q.shape, accumulate_dtype(q.dtype)
    batch, seen = k.shape[0], _seen(q, k, lengths, cu_seqlens)

    def by_batch(x):  # [N, H, M, ...] of the slots beside the tokens' [B, H, ...]
        return x if cu_seqlens is None else x.transpose(0, 1).flatten(1, 2)[None]

    queries = q.to(dtype).transpose(1, 2) * ((dim**-0.5 if scale is None else scale) / tau)
    k, v = (x.to(dtype).transpose(1, 2) for x in (k, v))
    if lengths is not None and seen is not None:  # 0 · NaN
        k, v = (torch.where(seen[..., 0, :, None], x, 0.0) for x in (k, v))
    tokens = by_batch(queries) @ k.mT
    scores = [tokens if seen is None else tokens.masked_fill(~seen, -torch.inf)]
    if k_self is not None and v_self is not None:
        k_self, v_self = (x.to(dtype).transpose(1, 2) for x in (k_self, v_self))
        own = (queries * k_self).sum(-1, keepdim=True) if see == "own" else queries @ k_self.mT
        scores.append(by_batch(own))
    s = torch.cat(scores, -1)
    empty = (s == -torch.inf).all(-1)
    lse = s.masked_fill(empty[..., None], 0.0).logsumexp(-1)
    weights = (s - lse[..., None]).exp()
    weights = weights if operand_dtype is None else weights.to(operand_dtype).to(dtype)
    by_tokens, by_slots = weights.split([k.shape[2], s.shape[-1] - k.shape[2]], -1)
    o, lse = by_tokens @ v, lse.masked_fill(empty, -torch.inf)

    def by_sequence(x):
        return x if cu_seqlens is None else x.view(batch, heads, sequences, slots, *x.shape[3:])[0].transpose(0, 1)

    o, by_slots = by_sequence(o), by_sequence(by_slots)
    if v_self is not None:
        o = o + (by_slots * v_self if see == "own" else by_slots @ v_self)
    return AttentionOutput(o.transpose(1, 2).to(q.dtype), by_sequence(lse).transpose(1, 2))
