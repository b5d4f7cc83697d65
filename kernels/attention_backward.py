"""Attention, Triton backward, with P recomputed from ℓ. Symbols and shapes as in attention.py.

    dS_ij = P_ij (dO_i·v_j − Δ_i)    Δ_i = dO_i·O_i − dℓ_i    dV = Pᵀ dO    dK = scale dSᵀ Q    dQ = scale dS K
    dc_i = Σ_j dS_ij − Σ_i' dS_i'i                            dsink = −Σ_i e^{sink − ℓ_i} Δ_i

Kernels:
    delta     per row of o: Δ
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
from memattn.kernels.attention import LOG2E, SIZES, Problem, first_position, key_head_of, scaled_scores
from memattn.kernels.attention_mask import key_tiles, row_tiles, seen_pairs, seen_range, visited
from memattn.kernels.checks import require
from memattn.kernels.gated_delta_rule import OPERANDS, new
from memattn.kernels.tiles import dot, load_column, load_tile, locate, sequence_bounds, store_tile


@triton.jit(do_not_specialize=[*SIZES, "has_dlse"])
def delta_kernel(
    o, do, dlse, delta, rows, has_dlse, V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_R
    i = tl.arange(0, BLOCK_R)
    live = i < rows - row
    O = load_tile(o + row * V, i, live, V, 0, V, BLOCK_V).to(ACC)
    dO = load_tile(do + row * V, i, live, V, 0, V, BLOCK_V).to(ACC)
    given = tl.load(dlse + row + i, mask=i < (rows - row) * has_dlse, other=0.0)
    tl.store(delta + row + i, tl.sum(O * dO, 1) - given, mask=live)


@triton.jit
def load_lse(base, i, live, stride, ACC: tl.constexpr):
    """ℓ in base 2; +inf where P must be 0: rows that see nothing or do not exist."""
    lse = tl.load(base + i * stride, mask=live, other=float("-inf")).to(ACC)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def add_keys(
    queries, dO, lse, delta, k, v, high, low, x, live, stride, seen, high_i, low_i, scale, dQ, sums, HKV, HQ,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, DECAY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What one tile of keys adds to dQ (times scale later) and to the row sums of dS."""
    keys = load_tile(k, x, live, stride * HKV * K, 0, K, BLOCK_K)
    products = dot(queries, tl.trans(keys), tl.zeros((queries.shape[0], x.shape[0]), ACC), PRECISION)
    if DECAY:
        high_j, low_j = load_column(high, x, live, stride * HQ, ACC), load_column(low, x, live, stride * HQ, ACC)
        s = scaled_scores(products, scale, high_i, low_i, high_j[None, :], low_j[None, :], DECAY, ACC)
    else:
        s = scaled_scores(products, scale, 0, 0, 0, 0, DECAY, ACC)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s - lse[:, None])
    values = load_tile(v, x, live, stride * HKV * V, 0, V, BLOCK_V)
    dP = dot(dO, tl.trans(values), tl.zeros((queries.shape[0], x.shape[0]), ACC), PRECISION)
    dS = p * (dP - delta[:, None])
    if DECAY:
        sums += tl.sum(dS, 1)
    return dot(dS.to(keys.dtype), keys, dQ, PRECISION), sums


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
    wide = program * 0  # makes the offset that it is added to 64 bits wide
    mask = (causal, window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix)
    n, first_q, rows, part = locate(slot, cu_seqlens_q, N, TQ, BLOCK_M, packed)
    first_k, length = sequence_bounds(n, cu_seqlens_k, TK, packed)
    row, rows = (part * BLOCK_M).to(tl.int32), rows.to(tl.int32)
    q_offset = first_position(q_offset, rows, length.to(tl.int32))
    length = tl.where(row < rows, length, 0).to(tl.int32)
    y, x = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    live = y < rows - row
    i = row + y + q_offset
    begin, end = seen_range(i, length, mask)

    token = (first_q + row) * HQ + head
    key_head = key_head_of(head, HQ, HKV, tile_heads)
    queries = load_tile(q + token * K, y, live, HQ * K, 0, K, BLOCK_K)
    dO = load_tile(do + token * V, y, live, HQ * V, 0, V, BLOCK_V)
    lse_i, delta_i = load_lse(lse + token, y, live, HQ, ACC), load_column(delta + token, y, live, HQ, ACC)
    keys, values = k + (first_k * HKV + key_head) * K, v + (first_k * HKV + key_head) * V
    high += first_k * HQ + head
    low += first_k * HQ + head
    high_i, low_i = tl.zeros((1, 1), ACC), tl.zeros((1, 1), ACC)
    own = (row + q_offset + wide) * HQ
    known = live & (i < length)
    if DECAY:
        high_i = load_column(high + own, y, known, HQ, ACC)[:, None]
        low_i = load_column(low + own, y, known, HQ, ACC)[:, None]
    dQ, sums = tl.zeros((BLOCK_M, BLOCK_K), ACC), tl.zeros((BLOCK_M,), ACC)

    last = tl.minimum(row + BLOCK_M, rows) - 1
    a, b, c, d, e = key_tiles(row + q_offset, last + q_offset, length, mask, BLOCK_N, DILATED)
    for t in range(a + (c - b) + (e - d)):
        from_key = visited(t, a, b, c, d) * BLOCK_N
        at = from_key + wide
        j = from_key + x
        seen = seen_pairs(i[:, None], begin[:, None], end[:, None], j[None, :], length, mask, DILATED)
        dQ, sums = add_keys(
            queries, dO, lse_i, delta_i, keys + at * HKV * K, values + at * HKV * V, high + at * HQ, low + at * HQ, x,
            j < length, 1, seen, high_i, low_i, scale, dQ, sums, HKV, HQ, K, V, BLOCK_K, BLOCK_V, ACC, PRECISION,
            DECAY, True,
        )  # fmt: skip
    if DILATED:
        before = c * BLOCK_N // dilation
        count = d * BLOCK_N // dilation - before
        for t in range((count + BLOCK_N - 1) // BLOCK_N):
            at = (before + 1 + t * BLOCK_N + wide) * dilation - 1
            j = (at + x * (dilation + wide)).to(tl.int32)
            there = x < count - t * BLOCK_N
            seen = there[None, :] & (j[None, :] >= begin[:, None]) & (j[None, :] < end[:, None])
            dQ, sums = add_keys(
                queries, dO, lse_i, delta_i, keys + at * HKV * K, values + at * HKV * V, high + at * HQ, low + at * HQ,
                x, there, dilation + wide, seen, high_i, low_i, scale, dQ, sums, HKV, HQ, K, V, BLOCK_K, BLOCK_V, ACC,
                PRECISION, DECAY, True,
            )  # fmt: skip
    else:
        for tile in range(c, d):
            at = tile * BLOCK_N + wide
            dQ, sums = add_keys(
                queries, dO, lse_i, delta_i, keys + at * HKV * K, values + at * HKV * V, high + at * HQ, low + at * HQ,
                x, x < BLOCK_N, 1, x, high_i, low_i, scale, dQ, sums, HKV, HQ, K, V, BLOCK_K, BLOCK_V, ACC, PRECISION,
                DECAY, False,
            )  # fmt: skip
    store_tile(dq + token * K, dQ * tl.full((), scale, ACC), y, live, HQ * K, 0, K, BLOCK_K)
    if DECAY:
        tl.store(row_sums + first_k * HQ + head + own + y * HQ, sums, mask=known)


@triton.jit
def add_rows(
    keys, values, q, do, lse, delta, high, low, y, live, known, seen, high_j, low_j, scale, dK, dV, sums, HQ,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, DECAY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """What one tile of queries adds to dK (times scale later), dV and the column sums of dS."""
    queries = load_tile(q, y, live, HQ * K, 0, K, BLOCK_K)
    products = dot(keys, tl.trans(queries), tl.zeros((keys.shape[0], y.shape[0]), ACC), PRECISION)
    if DECAY:
        high_i, low_i = load_column(high, y, known, HQ, ACC), load_column(low, y, known, HQ, ACC)
        s = scaled_scores(products, scale, high_i[None, :], low_i[None, :], high_j, low_j, DECAY, ACC)
    else:
        s = scaled_scores(products, scale, 0, 0, 0, 0, DECAY, ACC)
    if MASKED:
        s = tl.where(seen, s, float("-inf"))
    p = tl.exp2(s - load_lse(lse, y, live, HQ, ACC)[None, :])
    dO = load_tile(do, y, live, HQ * V, 0, V, BLOCK_V)
    dV = dot(p.to(dO.dtype), dO, dV, PRECISION)
    dP = dot(values, tl.trans(dO), tl.zeros((keys.shape[0], y.shape[0]), ACC), PRECISION)
    dS = p * (dP - load_column(delta, y, live, HQ, ACC)[None, :])
    if DECAY:
        sums += tl.sum(dS, 1)
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
    keys = load_tile(k + token * K, x, there, HKV * K, 0, K, BLOCK_K)
    values = load_tile(v + token * V, x, there, HKV * V, 0, V, BLOCK_V)
    dK, dV = tl.zeros((BLOCK_N, BLOCK_K), ACC), tl.zeros((BLOCK_N, BLOCK_V), ACC)
    group = HQ // HKV
    b, c, d, e = row_tiles(from_key, rows, length, q_offset, steps, mask, BLOCK_N, BLOCK_M, DILATED)
    for member in range(group):
        head = tl.where(tile_heads != 0, member * HKV + key_head, key_head * group + member)
        queries, dO = q + (first_q * HQ + head) * K, do + (first_q * HQ + head) * V
        lse_head, delta_head = lse + first_q * HQ + head, delta + first_q * HQ + head
        at_keys = first_k * HQ + head
        high_j, low_j = tl.zeros((1, 1), ACC), tl.zeros((1, 1), ACC)
        if DECAY:
            own = (from_key + wide) * HQ + at_keys
            high_j = load_column(high + own, x, there, HQ, ACC)[:, None]
            low_j = load_column(low + own, x, there, HQ, ACC)[:, None]
        sums = tl.zeros((BLOCK_N,), ACC)
        for t in range((c - b) + (e - d)):
            row = tl.where(t < c - b, b + t, d + t - (c - b)) * BLOCK_M
            at = (row + wide) * HQ
            i = row + y + q_offset
            begin, end = seen_range(i, length, mask)
            seen = seen_pairs(i[None, :], begin[None, :], end[None, :], j[:, None], length, mask, DILATED)
            position = at_keys + (row + q_offset + wide) * HQ
            dK, dV, sums = add_rows(
                keys, values, queries + at * K, dO + at * V, lse_head + at, delta_head + at, high + position,
                low + position, y, y < rows - row, (y < rows - row) & (i < length), seen, high_j, low_j, scale, dK, dV,
                sums, HQ, K, V, BLOCK_K, BLOCK_V, ACC, PRECISION, DECAY, True,
            )  # fmt: skip
        for tile in range(c, d):
            row = tile * BLOCK_M
            at = (row + wide) * HQ
            position = at_keys + (row + q_offset + wide) * HQ
            dK, dV, sums = add_rows(
                keys, values, queries + at * K, dO + at * V, lse_head + at, delta_head + at, high + position,
                low + position, y, y < rows - row, y < tl.minimum(rows, length - q_offset) - row, y, high_j, low_j,
                scale, dK, dV, sums, HQ, K, V, BLOCK_K, BLOCK_V, ACC, PRECISION, DECAY, False,
            )  # fmt: skip
        if DECAY:
            tl.store(column_sums + at_keys + (from_key + wide) * HQ + x * HQ, sums, mask=there)
    store_tile(dk + token * K, dK * tl.full((), scale, ACC), x, there, HKV * K, 0, K, BLOCK_K)
    store_tile(dv + token * V, dV, x, there, HKV * V, 0, V, BLOCK_V)


# --- launchers --------------------------------------------------------------------------------------------------------


def delta_of(p: Problem, do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor) -> Tensor:
    """Δ [B,Tq,HQ]."""
    delta, rows = torch.empty_like(lse), lse.numel()
    options = config.pinned("attention_delta", OPERANDS[o.dtype], p.V, p.V)
    delta_kernel[(triton.cdiv(rows, options["BLOCK_R"]),)](
        o, do, delta if dlse is None else dlse, delta, rows, int(dlse is not None),
        V=p.V, ACC=config.TYPES[p.acc], **options,
    )  # fmt: skip
    return delta


def sink_gradient(sink: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """−Σ_i e^{sink − ℓ_i} Δ_i."""
    weight = (sink - lse.masked_fill(lse == -torch.inf, torch.inf)).exp()
    return -(weight * delta).sum((0, 1))


def backward(
    do: Tensor, dlse: Tensor | None, o: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None,
    decay: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, causal: int, window: int,
    prefix_len: int, block_size: int, summary: int, dilation: int, dilated_window: int, dilated_prefix: int,
    q_offset: int, tile_heads: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dsink, ddecay), each in its input's dtype; shape [0] where the input is None."""
    with torch.cuda.device_of(q):
        mask = causal, window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix
        p = Problem.of(q, k, v, sink, decay, cu_seqlens_q, cu_seqlens_k, mask, q_offset, tile_heads)
        require("do", do, q, (q.dtype,), (*q.shape[:3], p.V))
        require("o", o, q, (q.dtype,), (*q.shape[:3], p.V))
        require("lse", lse, q, (p.acc,), q.shape[:3])
        require("dlse", dlse, q, (p.acc,), q.shape[:3])
        dq, dk, dv, bits = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), OPERANDS[q.dtype]
        row_sums, column_sums = (lse if decay is None else torch.zeros_like(decay, dtype=p.acc) for _ in range(2))
        delta = delta_of(p, do, dlse, o, lse) if lse.numel() else lse
        bounds = p.cu_seqlens_q, p.cu_seqlens_k
        if q.numel():
            options = p.launch("attention_queries", bits)
            queries_kernel[(p.slots(p.TQ, options["BLOCK_M"]) * p.HQ,)](
                q, k, v, do, *p.decay, *bounds, lse, delta, dq, row_sums, scale, *p.sizes, **options
            )
        if k.numel():
            options = p.launch("attention_keys", bits)
            keys_kernel[(p.slots(p.TK, options["BLOCK_N"]) * p.HKV,)](
                q, k, v, do, *p.decay, *bounds, lse, delta, dk, dv, column_sums, scale, *p.sizes, p.TQ.bit_length(),
                **options,
            )  # fmt: skip
        dsink = new(lse, 0) if sink is None else sink_gradient(sink, lse, delta)
        ddecay = new(lse, 0) if decay is None else row_sums.double() - column_sums.double()
        return dq, dk, dv, dsink, ddecay
