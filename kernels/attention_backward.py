"""Attention, Triton backward, with P recomputed from ℓ. Symbols and shapes as in attention.py.

    dS_ij = P_ij (dO_i·v_j − Δ_i)    Δ_i = dO_i·O_i − dℓ_i    dV = Pᵀ dO    dK = scale dSᵀ Q    dQ = scale dS K
    dc_i = Σ_j dS_ij − Σ_i' dS_i'i                            dsink = −Σ_i e^{sink − ℓ_i} Δ_i

and of a first score ℓ' and value o' of each row: do'_i = e^{ℓ'_i − ℓ_i} dO_i, dℓ'_i = e^{ℓ'_i − ℓ_i} (dO_i·o'_i − Δ_i).

Kernels:
    delta     per row of o: Δ, do', dℓ'
    queries   per tile of queries and head, over the tiles of keys in reach as in forward: dQ, and the row sums of dS
    keys      per tile of keys and key head, over the heads that read it and the tiles of queries in reach: dK, dV, and
              per head the column sums of dS. Sᵀ and dPᵀ are computed as such: see gated_delta_rule_backward.py on why

Each score is computed twice, once per kernel, so that no two programs write the same sum: no atomics, and bits repeat.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memattn.kernels import config
from memattn.kernels.attention import (
    LOG2E,
    SIZES,
    Problem,
    first_position,
    key_head_of,
    key_scores,
    over_keys,
    own_decay,
    query_rows,
    scaled_scores,
)
from memattn.kernels.attention_mask import row_tiles, seen_pairs, seen_range
from memattn.kernels.checks import require
from memattn.kernels.gated_delta_rule import OPERANDS, new
from memattn.kernels.tiles import (
    dot,
    load_column,
    load_tile,
    locate,
    row_products,
    rows_or_address,
    sequence_bounds,
    store_tile,
    whole_rows,
)


@triton.jit(do_not_specialize=[*SIZES, "has_dlse"])
def delta_kernel(
    o, do, dlse, lse, first_scores, first_values, delta, dfirst_scores, dfirst_values, rows, has_dlse, has_first,
    V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R
    i = tl.arange(0, BLOCK_R)
    live = i < rows - row
    O = load_tile(o + row * V, i, live, V, 0, V, BLOCK_V).to(ACC)
    dO = load_tile(do + row * V, i, live, V, 0, V, BLOCK_V).to(ACC)
    given = tl.load(dlse + row + i, mask=i < (rows - row) * has_dlse, other=0.0)
    difference = tl.sum(O * dO, 1) - given
    tl.store(delta + row + i, difference, mask=live)
    first = i < (rows - row) * has_first
    score = tl.load(first_scores + row + i, mask=first, other=float("-inf"))
    there = score != float("-inf")
    weight = tl.exp(score - tl.load(lse + row + i, mask=there, other=0.0))
    values = load_tile(first_values + row * V, i, there, V, 0, V, BLOCK_V).to(ACC)
    tl.store(dfirst_scores + row + i, weight * (tl.sum(values * dO, 1) - difference), mask=first)
    store_tile(dfirst_values + row * V, weight[:, None] * dO, i, first, V, 0, V, BLOCK_V)


@triton.jit
def load_lse(base, i, live, stride, ACC: tl.constexpr):
    """ℓ in base 2; +inf where P must be 0: rows that see nothing or do not exist."""
    lse = tl.load(base + i * stride, mask=live, other=float("-inf")).to(ACC)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def add_keys(
    sums, own, k, v, high, low, x, live, stride, seen, scale, HQ, HKV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, DECAY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to (dQ, row sums of dS); dQ is to be scaled later."""
    dQ, row_sums = sums
    queries, dO, lse, delta, y, live_y, high_i, low_i = own
    keys = rows_or_address(k, x, live, stride * HKV * K, K, BLOCK_K)
    s = key_scores(
        queries, y, live_y, high_i, low_i, keys, high, low, x, live, stride, seen, scale, HQ, HKV, K, BLOCK_K, ACC,
        PRECISION, DECAY, MASKED,
    )  # fmt: skip
    values = rows_or_address(v, x, live, stride * HKV * V, V, BLOCK_V)
    dP = row_products(dO, y, live_y, HQ * V, values, x, live, stride * HKV * V, V, BLOCK_V, ACC, PRECISION)
    dS = tl.exp2(s - lse[:, None]) * (dP - delta[:, None])
    if DECAY:
        row_sums += tl.sum(dS, 1)
    keys = whole_rows(keys, x, live, stride * HKV * K, K, BLOCK_K)
    return dot(dS.to(keys.dtype), keys, dQ, PRECISION), row_sums


@triton.jit(do_not_specialize=SIZES)
def queries_kernel(
    q, k, v, do, high, low, cu_seqlens_q, cu_seqlens_k, lse, delta, dq, row_sums, scale,
    N, TQ, TK, HQ, HKV, packed, tile_heads, q_offset, causal, window, prefix_len, block_size, summary, dilation,
    dilated_window, dilated_prefix,
    K: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, DECAY: tl.constexpr, DILATED: tl.constexpr,
):  # fmt: skip
    """dq, and into row_sums [B,Tk,HQ], at the keys of the queries' positions, the row sums of dS."""
    program = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    head, slot = program % HQ, program // HQ
    mask = (causal, window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix)
    row, rows, first_q, first_k, length, q_offset = query_rows(
        slot, cu_seqlens_q, cu_seqlens_k, N, TQ, TK, q_offset, packed, BLOCK_M
    )
    y = tl.arange(0, BLOCK_M)
    live = y < rows - row
    token = (first_q + row) * HQ + head
    key = first_k * HKV + key_head_of(head, HQ, HKV, tile_heads)
    known = live & (row + y + q_offset < length)
    high_i, low_i = own_decay(high, low, y, known, first_k + row + q_offset, head, HQ, ACC, DECAY)
    queries = rows_or_address(q + token * K, y, live, HQ * K, K, BLOCK_K)
    dO = rows_or_address(do + token * V, y, live, HQ * V, V, BLOCK_V)
    lse_i, delta_i = load_lse(lse + token, y, live, HQ, ACC), load_column(delta + token, y, live, HQ, ACC)
    sums = tl.zeros((BLOCK_M, triton.next_power_of_2(K)), ACC), tl.zeros((BLOCK_M,), ACC)
    dQ, sums = over_keys(
        add_keys, sums, (queries, dO, lse_i, delta_i, y, live, high_i, low_i), k + key * K, v + key * V,
        high + first_k * HQ + head, low + first_k * HQ + head, row, rows, length, q_offset, mask, scale, HQ, HKV, K, V,
        BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_V, ACC, PRECISION, DECAY, DILATED,
    )  # fmt: skip
    dQ *= tl.full((), scale, ACC)
    store_tile(dq + token * K, dQ, y, live, HQ * K, 0, K, triton.next_power_of_2(K))
    if DECAY:
        tl.store(row_sums + (first_k + row + q_offset) * HQ + head + y * HQ, sums, mask=known)


@triton.jit
def add_rows(
    keys, values, x, there, q, do, lse, delta, high, low, y, live, known, seen, high_j, low_j, scale, dK, dV, sums,
    HQ, HKV,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, DECAY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to dK (times scale later), dV and the column sums of dS."""
    queries = rows_or_address(q, y, live, HQ * K, K, BLOCK_K)
    products = row_products(keys, x, there, HKV * K, queries, y, live, HQ * K, K, BLOCK_K, ACC, PRECISION)
    if DECAY:
        high_i, low_i = load_column(high, y, known, HQ, ACC), load_column(low, y, known, HQ, ACC)
        s = scaled_scores(products, scale, high_i[None, :], low_i[None, :], high_j, low_j, DECAY, ACC)
    else:
        s = scaled_scores(products, scale, 0, 0, 0, 0, DECAY, ACC)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s - load_lse(lse, y, live, HQ, ACC)[None, :])
    dO = rows_or_address(do, y, live, HQ * V, V, BLOCK_V)
    tile = whole_rows(dO, y, live, HQ * V, V, BLOCK_V)
    dV = dot(p.to(tile.dtype), tile, dV, PRECISION)
    dP = row_products(values, x, there, HKV * V, dO, y, live, HQ * V, V, BLOCK_V, ACC, PRECISION)
    dS = p * (dP - load_column(delta, y, live, HQ, ACC)[None, :])
    if DECAY:
        sums += tl.sum(dS, 1)
    queries = whole_rows(queries, y, live, HQ * K, K, BLOCK_K)
    return dot(dS.to(queries.dtype), queries, dK, PRECISION), dV, sums


@triton.jit(do_not_specialize=SIZES)
def keys_kernel(
    q, k, v, do, high, low, cu_seqlens_q, cu_seqlens_k, lse, delta, dk, dv, column_sums, scale,
    N, TQ, TK, HQ, HKV, packed, tile_heads, q_offset, causal, window, prefix_len, block_size, summary, dilation,
    dilated_window, dilated_prefix, steps,
    K: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, DECAY: tl.constexpr, DILATED: tl.constexpr,
):  # fmt: skip
    """dk, dv, and the column sums of dS of every head [B,Tk,HQ]."""
    program = tl.program_id(0).to(tl.int64)  # under a causal mask the first keys are seen by most
    key_head, slot = program % HKV, program // HKV
    wide = program * 0
    mask = (causal, window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix)
    n, first_k, length, part = locate(slot, cu_seqlens_k, N, TK, BLOCK_N, packed)
    first_q, rows = sequence_bounds(n, cu_seqlens_q, TQ, packed)
    from_key, length = (part * BLOCK_N).to(tl.int32), length.to(tl.int32)
    q_offset = first_position(q_offset, rows.to(tl.int32), length)
    rows = tl.where(from_key < length, rows, 0).to(tl.int32)
    y, x = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    j = from_key + x
    there = x < length - from_key

    token = (first_k + from_key) * HKV + key_head
    keys = rows_or_address(k + token * K, x, there, HKV * K, K, BLOCK_K)
    values = rows_or_address(v + token * V, x, there, HKV * V, V, BLOCK_V)
    dK = tl.zeros((BLOCK_N, triton.next_power_of_2(K)), ACC)
    dV = tl.zeros((BLOCK_N, triton.next_power_of_2(V)), ACC)
    group = HQ // HKV
    b, c, d, e = row_tiles(from_key, rows, length, q_offset, steps, mask, BLOCK_N, BLOCK_M, DILATED)
    for member in range(group):
        head = tl.where(tile_heads != 0, member * HKV + key_head, key_head * group + member)
        queries, dO = q + (first_q * HQ + head) * K, do + (first_q * HQ + head) * V
        lse_head, delta_head = lse + first_q * HQ + head, delta + first_q * HQ + head
        at_keys = first_k * HQ + head
        high_j, low_j = own_decay(high, low, x, there, first_k + from_key, head, HQ, ACC, DECAY)
        sums = tl.zeros((BLOCK_N,), ACC)
        for t in range((c - b) + (e - d)):
            row = tl.where(t < c - b, b + t, d + t - (c - b)) * BLOCK_M
            at = (row + wide) * HQ
            i = row + y + q_offset
            begin, end = seen_range(i, length, mask)
            seen = seen_pairs(i[None, :], begin[None, :], end[None, :], j[:, None], length, mask, DILATED)
            position = at_keys + (row + q_offset + wide) * HQ
            dK, dV, sums = add_rows(
                keys, values, x, there, queries + at * K, dO + at * V, lse_head + at, delta_head + at, high + position,
                low + position, y, y < rows - row, (y < rows - row) & (i < length), seen, high_j, low_j, scale, dK, dV,
                sums, HQ, HKV, K, V, BLOCK_K, BLOCK_V, ACC, PRECISION, DECAY, True,
            )  # fmt: skip
        for tile in range(c, d):
            row = tile * BLOCK_M
            at = (row + wide) * HQ
            position = at_keys + (row + q_offset + wide) * HQ
            dK, dV, sums = add_rows(
                keys, values, x, there, queries + at * K, dO + at * V, lse_head + at, delta_head + at, high + position,
                low + position, y, y < rows - row, y < tl.minimum(rows, length - q_offset) - row, y, high_j, low_j,
                scale, dK, dV, sums, HQ, HKV, K, V, BLOCK_K, BLOCK_V, ACC, PRECISION, DECAY, False,
            )  # fmt: skip
        if DECAY:
            tl.store(column_sums + (first_k + from_key) * HQ + head + x * HQ, sums, mask=there)
    store_tile(dk + token * K, dK * tl.full((), scale, ACC), x, there, HKV * K, 0, K, triton.next_power_of_2(K))
    store_tile(dv + token * V, dV, x, there, HKV * V, 0, V, triton.next_power_of_2(V))


# --- launchers --------------------------------------------------------------------------------------------------------


def delta_of(
    p: Problem, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, first: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Δ [B,Tq,HQ], and the gradients of first_scores and first_values, [0] without them."""
    delta, rows = torch.empty_like(lse), lse.numel()
    gradients = (new(lse, 0), new(o, 0)) if first is None else tuple(torch.empty_like(x) for x in first)
    if rows:
        options = config.pinned("attention_delta", OPERANDS[o.dtype], p.V, p.V)
        delta_kernel[(triton.cdiv(rows, options["BLOCK_R"]),)](
            o, do, delta if dlse is None else dlse, lse, *(first or (lse, o)), delta,
            *(gradients if first else (delta, o)), rows, int(dlse is not None), int(first is not None),
            V=p.V, ACC=config.TYPES[p.acc], **options,
        )  # fmt: skip
    return delta, *gradients


def sink_gradient(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """−Σ_i e^{sink − ℓ_i} Δ_i."""
    weight = (sink - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
    return -(weight * delta).sum((0, 1))


def backward(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None,
    decay: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, first_scores: Tensor | None,
    first_values: Tensor | None, causal: int, window: int, prefix_len: int, block_size: int, summary: int,
    dilation: int, dilated_window: int, dilated_prefix: int, q_offset: int, tile_heads: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dsink, ddecay, dfirst_scores, dfirst_values), each in its input's dtype; [0] where that is None."""
    with torch.cuda.device_of(q):
        mask = causal, window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix
        p = Problem.of(q, k, v, sink, decay, cu_seqlens_q, cu_seqlens_k, mask, q_offset, tile_heads)
        require("do", do, q, (q.dtype,), (*q.shape[:3], p.V))
        require("o", o, q, (q.dtype,), (*q.shape[:3], p.V))
        require("lse", lse, q, (p.acc,), q.shape[:3])
        require("dlse", dlse, q, (p.acc,), q.shape[:3])
        dq, dk, dv, bits = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), OPERANDS[q.dtype]
        row_sums, column_sums = (lse if decay is None else torch.zeros_like(decay, dtype=p.acc) for _ in range(2))
        first = (first_scores, first_values) if p.has_first(q, first_scores, first_values) else None
        delta, *dfirst = delta_of(p, do, dlse, o, lse, first)
        bounds = p.cu_seqlens_q, p.cu_seqlens_k
        if q.numel():
            options = p.launch("attention_queries", bits)
            queries_kernel[(p.slots(p.TQ, options["BLOCK_M"]) * p.HQ,)](
                q, k, v, do, *p.decay, *bounds, lse, delta, dq, row_sums, scale, *p.sizes, **options
            )
        if k.numel():
            options = p.launch("attention_keys_decay" if p.decays else "attention_keys", bits)
            keys_kernel[(p.slots(p.TK, options["BLOCK_N"]) * p.HKV,)](
                q, k, v, do, *p.decay, *bounds, lse, delta, dk, dv, column_sums, scale, *p.sizes, p.TQ.bit_length(),
                **options,
            )  # fmt: skip
        dsink = new(lse, 0) if sink is None else sink_gradient(sink, lse, delta)
        ddecay = new(lse, 0) if decay is None else row_sums.double() - column_sums.double()
        return dq, dk, dv, dsink, ddecay, *dfirst
