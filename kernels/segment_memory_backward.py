"""Segment memory, Triton backward: the reads, one scan over segments in reverse, then every key at once.

With D_s, dz_s the gradients of the memory and the normaliser before segment s, U = β e, other symbols as in
segment_memory.py:
    reads    o = r (Q M_s), r = 1 / (Q z_s + ε):     dQ = r dO M_sᵀ + dd zᵀ        dd = −r ⟨dO, o⟩
    memory   D_s = D_{s+1} + Qᵀ(r dO) − A_s D_{s+1}                               the forward's scan, in reverse
    writes   e = V − r (K M_s):                      dU = K D_{s+1}, dβ = ⟨dU, e⟩, dV = β dU, dd = β r² ⟨dU, K M_s⟩
             dK = U D_{s+1}ᵀ − r dV M_sᵀ + γ dz_{s+1}ᵀ + dd z_sᵀ
    z        dz_s = dz_{s+1} + Σ dd q + Σ dd k                                    over the queries and keys of segment s

Kernels: outer, sums, scan, factors as in the forward, and
    queries  per tile of queries, head and block of key columns: dQ, r, dd
    values   per tile of keys, head and block of value columns: dV, U, and this block's part of dβ and dd
    keys     per tile of keys, head and block of key columns: dK
The forward's table is read for M and z; r, γ and, where segments are longer than K tokens, A are made again. An empty
memory gives its queries no gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memattn.kernels.checks import require
from memattn.kernels.gated_delta_rule import load_factor, new, reciprocal_or_zero
from memattn.kernels.segment_memory import (
    SIZES,
    Problem,
    blocks,
    erasing_scan,
    factors,
    locate_keys,
    locate_queries,
    outer,
    scan,
    sums,
)
from memattn.kernels.tiles import dot, load_column, load_tile, store_tile


@triton.jit(do_not_specialize=SIZES)
def queries_kernel(
    q, do, o, table, dq, factor, dweight, cu_seqlens, cu_seqlens_k, eps,
    N, T, S, HQ, H, size, key_size, packed, causal, tiles, has_start,
    K: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, NORMALISES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    parts: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    first = (program % parts).to(tl.int32) * BLOCK_K
    head, tile, slot = program // parts % HQ, program // parts // HQ % tiles, program // parts // HQ // tiles
    row, rows, memory, held = locate_queries(
        slot, tile, cu_seqlens, cu_seqlens_k, N, T, S, size, key_size, packed, causal, has_start, BLOCK_T
    )  # fmt: skip
    i, at = tl.arange(0, BLOCK_T), row * HQ + head
    live = i < rows
    state = table + (memory * H + head // (HQ // H)) * K * COLUMNS
    there = tl.where(rows > 0, K, 0)
    d = first + tl.arange(0, BLOCK_K)
    dQ, along = tl.zeros((BLOCK_T, BLOCK_K), ACC), tl.zeros((BLOCK_T,), ACC)
    for column in range(0, V, BLOCK_V):
        dO = load_tile(do + at * V, i, live, HQ * V, column, V, BLOCK_V)
        M = load_tile(state, d, d < there, COLUMNS, column, V, BLOCK_V).to(dO.dtype)
        dQ = dot(dO, tl.trans(M), dQ, PRECISION)
        if NORMALISES:
            O = load_tile(o + at * V, i, live, HQ * V, column, V, BLOCK_V)
            along += tl.sum(dO.to(ACC) * O.to(ACC), 1)
    if NORMALISES:
        weight = tl.zeros((BLOCK_T,), ACC)
        for start in range(0, K, BLOCK_K):
            c = start + tl.arange(0, BLOCK_K)
            queries = load_tile(q + at * K, i, live, HQ * K, start, K, BLOCK_K)
            z = tl.load(state + c * COLUMNS + COLUMNS - 1, mask=c < there, other=0.0)
            weight += tl.sum(queries.to(ACC) * z[None, :], 1)
        r = tl.where(held, reciprocal_or_zero(weight + tl.full((), eps, ACC), ACC), 0.0)
        dd = -r * along
        z = tl.load(state + d * COLUMNS + COLUMNS - 1, mask=d < there, other=0.0)
        dQ = dQ * r[:, None] + dd[:, None] * z[None, :]
        once = i < tl.where(first == 0, rows, 0)
        tl.store(factor + at + i * HQ, r, mask=once)
        tl.store(dweight + at + i * HQ, dd, mask=once)
    store_tile(dq + at * K, dQ, i, live, HQ * K, first, K, BLOCK_K)


@triton.jit(do_not_specialize=SIZES)
def values_kernel(
    k, v, beta, factor, table, dtable, dv, u, dbeta, dweight, cu_seqlens_k, N, S, H, key_size, packed, tiles, tokens,
    has_beta, has_factor,
    K: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ERASES: tl.constexpr,
):  # fmt: skip
    """dV; with ERASES U. dbeta, with ERASES dweight: parts [blocks of V, tokens, H]."""
    program = tl.program_id(0).to(tl.int64)
    parts: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    part = program % parts
    column = part.to(tl.int32) * BLOCK_V
    head, tile, memory = program // parts % H, program // parts // H % tiles, program // parts // H // tiles
    row, rows = locate_keys(memory, tile, cu_seqlens_k, N, S, key_size, packed, BLOCK_T)
    i, at = tl.arange(0, BLOCK_T), row * H + head
    live = i < rows
    before = table + (memory * H + head) * K * COLUMNS
    after = dtable + ((memory + 1) * H + head) * K * COLUMNS
    dU, read = tl.zeros((BLOCK_T, BLOCK_V), ACC), tl.zeros((BLOCK_T, BLOCK_V), ACC)
    for start in range(0, K, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        there = d < tl.where(rows > 0, K, 0)
        keys = load_tile(k + at * K, i, live, H * K, start, K, BLOCK_K)
        D = load_tile(after, d, there, COLUMNS, column, V, BLOCK_V).to(keys.dtype)
        dU = dot(keys, D, dU, PRECISION)
        if ERASES:
            M = load_tile(before, d, there, COLUMNS, column, V, BLOCK_V).to(keys.dtype)
            read = dot(keys, M, read, PRECISION)
    strength = load_factor(beta + at, i, rows, H, has_beta, ACC)
    error = load_tile(v + at * V, i, live, H * V, column, V, BLOCK_V).to(ACC)
    place = (part * tokens + row) * H + head + i * H
    if ERASES:
        r = load_factor(factor + at, i, rows, H, has_factor, ACC)
        error -= read * r[:, None]
        store_tile(u + at * V, error * strength[:, None], i, live, H * V, column, V, BLOCK_V)
        along = strength * r * r * tl.sum(dU * read, 1)
        tl.store(dweight + place, along, mask=i < rows * has_factor)
    tl.store(dbeta + place, tl.sum(dU * error, 1), mask=i < rows * has_beta)
    store_tile(dv + at * V, dU * strength[:, None], i, live, H * V, column, V, BLOCK_V)


@triton.jit(do_not_specialize=SIZES)
def keys_kernel(
    u, beta, dv, factor, gain, dweight, table, dtable, dk, cu_seqlens_k, N, S, H, key_size, packed, tiles,
    has_beta, has_factor, has_gain,
    K: tl.constexpr, V: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ERASES: tl.constexpr, NORMALISES: tl.constexpr,
):  # fmt: skip
    """dK, from U = β u."""
    program = tl.program_id(0).to(tl.int64)
    parts: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    first = (program % parts).to(tl.int32) * BLOCK_K
    head, tile, memory = program // parts % H, program // parts // H % tiles, program // parts // H // tiles
    row, rows = locate_keys(memory, tile, cu_seqlens_k, N, S, key_size, packed, BLOCK_T)
    i, at = tl.arange(0, BLOCK_T), row * H + head
    live = i < rows
    d = first + tl.arange(0, BLOCK_K)
    there = d < tl.where(rows > 0, K, 0)
    before = table + (memory * H + head) * K * COLUMNS
    after = dtable + ((memory + 1) * H + head) * K * COLUMNS
    dK, erased = tl.zeros((BLOCK_T, BLOCK_K), ACC), tl.zeros((BLOCK_T, BLOCK_K), ACC)
    strength = load_factor(beta + at, i, rows, H, has_beta, ACC)
    for column in range(0, V, BLOCK_V):
        U = load_tile(u + at * V, i, live, H * V, column, V, BLOCK_V)
        U = (U.to(ACC) * strength[:, None]).to(U.dtype)
        D = load_tile(after, d, there, COLUMNS, column, V, BLOCK_V).to(U.dtype)
        dK = dot(U, tl.trans(D), dK, PRECISION)
        if ERASES:
            dV = load_tile(dv + at * V, i, live, H * V, column, V, BLOCK_V)
            M = load_tile(before, d, there, COLUMNS, column, V, BLOCK_V).to(dV.dtype)
            erased = dot(dV, tl.trans(M), erased, PRECISION)
    if ERASES:
        dK -= erased * load_factor(factor + at, i, rows, H, has_factor, ACC)[:, None]
    if NORMALISES:
        dz = tl.load(after + d * COLUMNS + COLUMNS - 1, mask=there, other=0.0)
        dK += load_factor(gain + at, i, rows, H, has_gain, ACC)[:, None] * dz[None, :]
        if ERASES:
            z = tl.load(before + d * COLUMNS + COLUMNS - 1, mask=there, other=0.0)
            dK += load_column(dweight + at, i, live, H, ACC)[:, None] * z[None, :]
    store_tile(dk + at * K, dK, i, live, H * K, first, K, BLOCK_K)


# --- launchers --------------------------------------------------------------------------------------------------------


def reads(p: Problem, q, do, o, table, has_start: bool) -> tuple[Tensor, Tensor]:
    """dQ, and of every memory what its readers give its gradient, as a table."""
    dq, dtable = torch.empty_like(q), torch.zeros_like(table) if not p.T else torch.empty_like(table)
    if not p.T:
        return dq, dtable
    factor, dweight = (new(q, *q.shape[:3], dtype=p.acc) for _ in range(2)) if p.normalises else (None, None)
    options = p.product("queries", p.K, p.V)
    tiles = triton.cdiv(p.size, options["BLOCK_T"])
    queries_kernel[(p.query_slots * tiles * p.HQ * blocks(options, "K"),)](
        q, do, o, table, dq, dq if factor is None else factor, dq if dweight is None else dweight,
        p.bounds, p.key_bounds, p.eps, *p.layout[2:], tiles, int(has_start), NORMALISES=p.normalises, **options,
    )  # fmt: skip
    outer(p, q, do, None, factor, dtable, reads=True)
    if p.normalises:
        sums(p, q, dweight, dtable, reads=True)
    return dq, dtable


def values(p: Problem, k, v, beta, factor, table, dtable) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dV, U (v where nothing is erased, then without β), dβ, and dd of the keys where what they read is divided."""
    dv, u = torch.empty_like(v), torch.empty_like(v) if p.delta else v
    options = p.product("values", p.K, p.V)
    count, tiles = blocks(options, "V"), triton.cdiv(p.key_size, options["BLOCK_T"])
    tokens = k.shape[0] * p.S
    dbeta = None if beta is None else new(k, count, *k.shape[:3], dtype=p.acc)
    dweight = None if factor is None else new(k, count, *k.shape[:3], dtype=p.acc)
    values_kernel[(p.memories * tiles * p.H * count,)](
        k, v, dv if beta is None else beta, dv if factor is None else factor, table, dtable, dv, u,
        dv if dbeta is None else dbeta, dv if dweight is None else dweight, p.key_bounds, *p.key_layout, tiles, tokens,
        int(beta is not None), int(factor is not None), ERASES=p.delta, **options,
    )  # fmt: skip
    return dv, u, *(None if x is None else x.sum(0) for x in (dbeta, dweight))


def keys(p: Problem, u, beta, dv, factor, gain, dweight, table, dtable) -> Tensor:
    """dK."""
    dk = new(u, *u.shape[:3], p.K)
    options = p.product("keys", p.K, p.V)
    tiles = triton.cdiv(p.key_size, options["BLOCK_T"])
    given = (beta, factor, gain)
    factor, gain, dweight = (dtable if x is None else x for x in (factor, gain, dweight))
    keys_kernel[(p.memories * tiles * p.H * blocks(options, "K"),)](
        u, u if beta is None else beta, dv, factor, gain, dweight, table, dtable, dk,
        p.key_bounds, *p.key_layout, tiles,
        *(int(x is not None) for x in given), ERASES=p.delta, NORMALISES=p.normalises, **options,
    )  # fmt: skip
    return dk


def backward(
    do: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None, o: Tensor, table: Tensor,
    *settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dbeta, dinitial_state), each in its input's dtype; shape [0] where the input is None."""
    with torch.cuda.device_of(q):
        p = Problem.of(q, k, v, beta, initial_state, cu_seqlens, cu_seqlens_k, *settings)
        for name, x in (("do", do), ("o", o)):
            require(name, x, q, (q.dtype,), (*q.shape[:3], p.V))
        require("dfinal_state", dfinal_state, q, (p.acc,), (p.N, p.H, p.K, p.columns))
        require("states", table, q, (p.acc,), (p.memories, p.H, p.K, p.columns))
        dinitial = None if initial_state is None else torch.empty_like(initial_state)
        if not p.N:
            grads = [None if x is None else torch.empty_like(x) for x in (q, k, v, beta, initial_state)]
            return tuple(new(q, 0) if x is None else x for x in grads)
        dq, dtable = reads(p, q, do, o, table, initial_state is not None)
        factor, gain = factors(p, k, table)
        erasing_scan(p, dtable, k, beta, factor, dfinal_state, dinitial, reverse=True)
        dv, u, dbeta, dweight = values(p, k, v, beta, factor, table, dtable)
        if p.normalises:
            if dweight is not None:
                sums(p, k, dweight, dtable, add=True)
            scan(p, dtable, dfinal_state, dinitial, reverse=True)
        dk = keys(p, u, None if p.delta else beta, dv, factor, gain, dweight, table, dtable)
        dbeta = dbeta if dbeta is None else dbeta.to(beta.dtype)
        return tuple(new(q, 0) if x is None else x for x in (dq, dk, dv, dbeta, dinitial))
