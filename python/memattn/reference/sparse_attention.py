"""Attention over listed tokens or blocks in plain torch.

`loop` is the definition, one query row and key head at a time over the tokens its list names; in float64 it is the
truth every backend is measured against. `chunked` is the differentiable fallback that runs anywhere torch does: the
listed keys and values of a few query rows are copied together, and copied again in backward, so that memory is bounded
by BUDGET and not by the number of queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from memattn.reference.attention import AttentionOutput, accumulate_dtype, one_sink

BUDGET = 1 << 22  # numbers copied at a time


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """[B, S, 1 or H, ...] -> [B·S, H, ...]."""
    return x.flatten(0, 1).expand(-1, heads, *x.shape[3:])


def loop(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *, unit=1, counts=None, q_positions=None, bias=None, sink=None,
    page_table=None, cu_seqlens_q=None, cu_seqlens_k=None, scale=None,
) -> AttentionOutput:  # fmt: skip
    """o_i = Σ_j e^{s_ij − ℓ_i} v_j over the tokens j that row i's list names, as often as it names them."""
    (batch, length, heads, key_dim), dtype, size = q.shape, accumulate_dtype(q.dtype), k.shape[1]
    key_heads, value_dim = k.shape[2], v.shape[3]
    group, scale = heads // key_heads, key_dim**-0.5 if scale is None else scale
    bounds_q = [length * b for b in range(batch + 1)] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    bounds_k = [size * b for b in range(batch + 1)]
    if cu_seqlens_q is not None:
        bounds_k = (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).tolist()
    queries, keys, values = (x.flatten(0, 1).to(dtype) for x in (q, k, v))
    lists = _heads_first(indices, key_heads).tolist()
    used = None if counts is None else _heads_first(counts, key_heads).tolist()
    offsets = None if bias is None else _heads_first(bias, key_heads).to(dtype)
    last = None if q_positions is None else q_positions.flatten().tolist()

    def row_of(n, j):
        """Row of memory of token j of sequence n, or None where there is none."""
        if page_table is None:
            return bounds_k[n] + j if j < bounds_k[n + 1] - bounds_k[n] else None
        page = int(page_table[n, j // size]) if j < size * page_table.shape[1] else -1
        return page * size + j % size if 0 <= page < k.shape[0] else None

    outputs, lses = [], []
    for n in range(len(bounds_q) - 1):
        for i in range(bounds_q[n], bounds_q[n + 1]):
            for h in range(key_heads):
                named = lists[i][h] if used is None else lists[i][h][: used[i][h]]
                tokens = [(e, x * unit + t) for e, x in enumerate(named) if x >= 0 for t in range(unit)]
                seen = [(e, row_of(n, j)) for e, j in tokens if last is None or j <= last[i]]
                seen = [(e, row) for e, row in seen if row is not None]
                at = torch.tensor([row for _, row in seen], dtype=torch.long)
                s = scale * queries[i, h * group : (h + 1) * group] @ keys[at, h].T
                if offsets is not None:
                    s = s + offsets[i, h, torch.tensor([e for e, _ in seen], dtype=torch.long)]
                sinks = s[:, :0] if sink is None else sink.to(dtype).reshape(key_heads, group, -1)[h]
                joined = torch.cat([s, sinks], 1)
                if joined.shape[1] == 0:
                    outputs.append(0 * queries[i, :group, :1].expand(-1, value_dim))
                    lses.append(queries.new_full((group,), -torch.inf))
                    continue
                lses.append(joined.logsumexp(1))
                outputs.append((s - lses[-1][:, None]).exp() @ values[at, h])
    o = torch.stack(outputs) if outputs else queries.new_zeros(0)
    lse = torch.stack(lses) if lses else queries.new_zeros(0)
    return AttentionOutput(o.reshape(batch, length, heads, value_dim).to(q.dtype), lse.reshape(batch, length, heads))


@dataclass(frozen=True)
class _Memory:
    """Where tokens lie: token j of sequence n in row starts[n] + j, or on page j // size of the table's row n."""

    starts: Tensor
    lengths: Tensor
    table: Tensor | None
    size: int
    pages: int

    def rows(self, sequence: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the tokens j [C, ...] of sequences [C], and which of them exist."""
        n = sequence.view(-1, *(1,) * (j.dim() - 1))
        there = (j >= 0) & (j < self.lengths[n])
        if self.table is None:
            return self.starts[n] + j, there
        if self.table.shape[1] == 0:
            return j, there
        page = self.table.long()[n, (j // self.size).clamp(0, self.table.shape[1] - 1)]
        return page * self.size + j % self.size, there & (page >= 0) & (page < self.pages)


def _memory(q, k, page_table, cu_seqlens_q, cu_seqlens_k) -> tuple[_Memory, Tensor]:
    """The memory, and the sequence [B·S] of every query row."""
    (batch, length), (pages, size), device = q.shape[:2], k.shape[:2], q.device
    row = torch.arange(batch * length, device=device)
    if cu_seqlens_q is not None:
        keys = (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k).long()
        sequence = torch.searchsorted(cu_seqlens_q.long(), row, right=True) - 1
        return _Memory(keys[:-1], keys.diff(), None, size, pages), sequence
    capacity = size if page_table is None else size * page_table.shape[1]
    starts = torch.arange(batch, device=device)
    return _Memory(starts * size, torch.full_like(starts, capacity), page_table, size, pages), row // max(length, 1)


def _tokens(entries, used, last, unit):
    """Positions [C, H, n, unit] of the tokens of a list [C, H, n]; −1 where it names none that the query sees."""
    j = entries.long()[..., None] * unit + torch.arange(unit, device=entries.device)
    seen = (entries >= 0)[..., None]
    if used is not None:
        seen = seen & (torch.arange(entries.shape[2], device=entries.device) < used[..., None])[..., None]
    if last is not None:
        seen = seen & (j <= last[:, None, None, None])
    return j.masked_fill(~seen, -1)


def _gathered(x: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
    """x [R, H, D] at rows [C, 1 or H, m] -> [C, H, m, D], 0 where nothing is seen."""
    if rows.shape[1] == 1:
        found = x[rows[:, 0]].transpose(1, 2)
    else:
        found = x[rows, torch.arange(x.shape[1], device=x.device)[:, None]]
    return torch.where(seen[..., None], found, 0.0)


def _block(q, k, v, entries, used, last, bias, sink, sequence, memory, unit, operand_dtype):
    """q [C, HKV, G, K] scaled, k [R, HKV, K], v [R, HKV, V] -> o [C, HKV, G, V], lse [C, HKV, G]."""
    rows, seen = memory.rows(sequence, _tokens(entries, used, last, unit))
    rows, seen = rows.flatten(2), seen.flatten(2)
    rows = rows.masked_fill(~seen, 0)
    s = q @ _gathered(k, rows, seen).to(q.dtype).mT
    if bias is not None:
        s = s + bias.to(q.dtype).repeat_interleave(unit, -1)[:, :, None]
    s = s.masked_fill(~seen[:, :, None], -torch.inf)
    if sink is not None:
        s = torch.cat([sink[..., None].expand(*s.shape[:-1], 1), s], -1)
    empty = (s == -torch.inf).all(-1)
    lse = s.masked_fill(empty[..., None], 0.0).logsumexp(-1) if s.shape[-1] else s.sum(-1)
    p = (s - lse[..., None]).exp()[..., 0 if sink is None else 1 :]
    p = p if operand_dtype is None else p.to(operand_dtype).to(p.dtype)
    return p @ _gathered(v, rows, seen).to(q.dtype), lse.masked_fill(empty, -torch.inf)


def chunked(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, *, unit=1, counts=None, q_positions=None, bias=None, sink=None,
    page_table=None, cu_seqlens_q=None, cu_seqlens_k=None, scale=None, operand_dtype=None,
) -> AttentionOutput:  # fmt: skip
    """`loop` by blocks of query rows. operand_dtype rounds the weights, as hardware with products of that type does."""
    (batch, length, heads, key_dim), key_heads, dtype = q.shape, k.shape[2], accumulate_dtype(q.dtype)
    memory, sequence = _memory(q, k, page_table, cu_seqlens_q, cu_seqlens_k)
    queries = (q.to(dtype) * (key_dim**-0.5 if scale is None else scale)).flatten(0, 1).unflatten(1, (key_heads, -1))
    if sink is not None:
        sink = one_sink(sink, dtype).view(key_heads, -1)
    k, v = k.flatten(0, 1), v.flatten(0, 1)
    if k.shape[0] == 0:
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))  # a row to point at where nothing is seen
    row = key_heads * indices.shape[3] * unit * (k.shape[2] + v.shape[2])
    step = max(1, BUDGET // max(row, 1))
    per_row = [None if x is None else x.flatten(0, 1) for x in (indices, counts, q_positions, bias)]
    outputs, lses = [], []
    for a in range(0, max(batch * length, 1), step):
        part = [None if x is None else x[a : a + step] for x in per_row]
        rest = *part, sink, sequence[a : a + step], memory, unit, operand_dtype
        if torch.is_grad_enabled():
            o, lse = checkpoint(
                _block, queries[a : a + step], k, v, *rest, use_reentrant=False, preserve_rng_state=False
            )
        else:
            o, lse = _block(queries[a : a + step], k, v, *rest)
        outputs.append(o)
        lses.append(lse)
    o, lse = torch.cat(outputs), torch.cat(lses)
    return AttentionOutput(o.reshape(batch, length, heads, v.shape[2]).to(q.dtype), lse.reshape(batch, length, heads))
