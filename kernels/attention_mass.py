"""Column mass of attention, Triton. Symbols, shapes and the plan of tiles as in attention.py.

    m_j = Σ_i e^{s_ij − ℓ_i}        over the rows i of start…stop that see key j, ℓ given

A program owns BLOCK_N keys of one key head and passes, head by head of its group, over the tiles of queries in reach,
as the keys kernel of attention_backward.py does: no two programs write the same sum, so there are no atomics and bits
repeat. Sᵀ is computed as such, so that the mass is a sum along its rows.

Shapes: q [B,Tq,HQ,K]; k [B,Tk,HKV,K]; lse [B,Tq,HQ]; mass [B,Tk,HQ], or [B,Tk,HKV] summed over a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memattn.kernels.attention import SIZES, Problem, first_position, scaled_scores
from memattn.kernels.attention_backward import load_lse
from memattn.kernels.attention_mask import row_tiles, seen_pairs, seen_range
from memattn.kernels.checks import require
from memattn.kernels.gated_delta_rule import OPERANDS, new
from memattn.kernels.tiles import dot, load_column, load_tile, locate, sequence_bounds


@triton.jit
def bound_of(at, rows):
    """A row's number as a Python slice names it, inside of 0…rows."""
    return tl.minimum(tl.maximum(tl.where(at < 0, at + rows, at), 0), rows)


@triton.jit
def add_rows(
    keys, q, lse, high, low, y, live, known, seen, high_j, low_j, scale, sums, HQ, K: tl.constexpr,
    BLOCK_K: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, DECAY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to the mass; rows that are not live add nothing."""
    queries = load_tile(q, y, live, HQ * K, 0, K, BLOCK_K)
    products = dot(keys, tl.trans(queries), tl.zeros((keys.shape[0], y.shape[0]), ACC), PRECISION)
    if DECAY:
        high_i, low_i = load_column(high, y, known, HQ, ACC), load_column(low, y, known, HQ, ACC)
        s = scaled_scores(products, scale, high_i[None, :], low_i[None, :], high_j, low_j, DECAY, ACC)
    else:
        s = scaled_scores(products, scale, 0, 0, 0, 0, DECAY, ACC)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    return sums + tl.sum(tl.exp2(s - load_lse(lse, y, live, HQ, ACC)[None, :]), 1)


@triton.jit(do_not_specialize=[*SIZES, "start", "stop", "grouped"])
def mass_kernel(
    q, k, high, low, cu_seqlens_q, cu_seqlens_k, lse, mass, scale,
    N, TQ, TK, HQ, HKV, packed, tile_heads, q_offset, causal, window, prefix_len, block_size, summary, dilation,
    dilated_window, dilated_prefix, steps, start, stop, grouped,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, DECAY: tl.constexpr, DILATED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)  # under a causal mask the first keys are seen by most
    key_head, slot = program % HKV, program // HKV
    wide = program * 0  # makes the offset that it is added to 64 bits wide
    mask = (causal, window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix)
    n, first_k, length, part = locate(slot, cu_seqlens_k, N, TK, BLOCK_N, packed)
    first_q, rows = sequence_bounds(n, cu_seqlens_q, TQ, packed)
    from_key, length, rows = (part * BLOCK_N).to(tl.int32), length.to(tl.int32), rows.to(tl.int32)
    q_offset = first_position(q_offset, rows, length)
    first, last = bound_of(start, rows), bound_of(stop, rows)
    rows = tl.where(from_key < length, rows, 0)
    y, x = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    j = from_key + x
    there = x < length - from_key

    keys = load_tile(k + ((first_k + from_key) * HKV + key_head) * K, x, there, HKV * K, 0, K, BLOCK_K)
    group = HQ // HKV
    b, c, d, e = row_tiles(from_key, rows, length, q_offset, steps, mask, BLOCK_N, BLOCK_M, DILATED)
    b, e = tl.maximum(b, first // BLOCK_M), tl.minimum(e, (last + BLOCK_M - 1) // BLOCK_M)
    e = tl.maximum(b, e)
    c = tl.minimum(tl.maximum(c, b), e)
    d = tl.minimum(tl.maximum(d, c), e)
    total = tl.zeros((BLOCK_N,), ACC)
    for member in range(group):
        head = tl.where(tile_heads != 0, member * HKV + key_head, key_head * group + member)
        queries, lse_head = q + (first_q * HQ + head) * K, lse + first_q * HQ + head
        at_keys = first_k * HQ + head
        high_j, low_j = tl.zeros((1, 1), ACC), tl.zeros((1, 1), ACC)
        if DECAY:
            own = (from_key + wide) * HQ + at_keys
            high_j = load_column(high + own, x, there, HQ, ACC)[:, None]
            low_j = load_column(low + own, x, there, HQ, ACC)[:, None]
        sums = tl.zeros((BLOCK_N,), ACC)
        for t in range((c - b) + (e - d)):
            row = tl.where(t < c - b, b + t, d + t - (c - b)) * BLOCK_M
            at, position = (row + wide) * HQ, at_keys + (row + q_offset + wide) * HQ
            i = row + y + q_offset
            begin, end = seen_range(i, length, mask)
            seen = seen_pairs(i[None, :], begin[None, :], end[None, :], j[:, None], length, mask, DILATED)
            live = (row + y >= first) & (row + y < last)
            sums = add_rows(
                keys, queries + at * K, lse_head + at, high + position, low + position, y, live, live & (i < length),
                seen, high_j, low_j, scale, sums, HQ, K, BLOCK_K, ACC, PRECISION, DECAY, True,
            )  # fmt: skip
        for tile in range(c, d):
            row = tile * BLOCK_M
            at, position = (row + wide) * HQ, at_keys + (row + q_offset + wide) * HQ
            live = (row + y >= first) & (row + y < last)
            sums = add_rows(
                keys, queries + at * K, lse_head + at, high + position, low + position, y, live,
                live & (row + y + q_offset < length), y, high_j, low_j, scale, sums, HQ, K, BLOCK_K, ACC, PRECISION,
                DECAY, False,
            )  # fmt: skip
        total += sums
        own_mass = mass + at_keys + (from_key + wide) * HQ
        tl.store(own_mass + x * HQ, sums, mask=x < (length - from_key) * (1 - grouped))
    group_mass = mass + (first_k + from_key) * HKV + key_head
    tl.store(group_mass + x * HKV, total, mask=x < (length - from_key) * grouped)


# --- launcher ---------------------------------------------------------------------------------------------------------


def forward(
    q: Tensor, k: Tensor, lse: Tensor, decay: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    causal: int, window: int, prefix_len: int, block_size: int, summary: int, dilation: int, dilated_window: int,
    dilated_prefix: int, q_offset: int, tile_heads: bool, scale: float, start: int, stop: int, grouped: bool,
) -> Tensor:  # fmt: skip
    """The mass [B,Tk,HQ], or [B,Tk,HKV] when grouped."""
    with torch.cuda.device_of(q):
        mask = causal, window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix
        p = Problem.of(q, k, k, None, decay, cu_seqlens_q, cu_seqlens_k, mask, q_offset, tile_heads)
        require("lse", lse, q, (p.acc,), q.shape[:3])
        mass = new(q, *k.shape[:2], p.HKV if grouped else p.HQ, dtype=p.acc)
        if mass.numel():
            options = {n: x for n, x in p.launch("attention_mass", OPERANDS[q.dtype]).items() if n != "V"}
            mass_kernel[(p.slots(p.TK, options["BLOCK_N"]) * p.HKV,)](
                q, k, *p.decay, p.cu_seqlens_q, p.cu_seqlens_k, lse, mass, scale, *p.sizes, p.TQ.bit_length(), start,
                stop, int(grouped), **options,
            )  # fmt: skip
        return mass
