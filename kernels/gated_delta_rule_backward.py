"""Gated delta rule, Triton backward. Symbols, shapes and slots as in gated_delta_rule.py.

Given dO and, per chunk, the gradient dS1 of the state after it (q times scale, q and k after l2norm):
    dVn = AᵀdO + e^{G_C−G} (K dS1)        dX = TᵀdVn          A = tril((q_i·k_j) e^{G_i−G_j}), X = β(V − e^G K S0)
    dS0 = e^{G_C} dS1 + Qᵀ(e^G dO) − WᵀdVn                    dV = β dX
    M1 = tril(dO Vnᵀ) e^{G_i−G_j}         M2 = −stril(dX Vnᵀ) e^{G_i−G_j}
    dq  = e^G (dO S0ᵀ) + M1 K             P = e^G (dX S0ᵀ)          R = e^{G_C−G} (Vn dS1ᵀ)
    dk  = R − βP + M1ᵀQ + βM2 K + (βM2)ᵀK
    dβ_i = dX_i·V_i + Σ_j M2_ij (k_i·k_j) − k_i·P_i
    dg_m = Σ_{i≥m} (q_i·e^{G_i} dO_i S0ᵀ − β_i k_i·P_i) + Σ_{j<m} k_j·R_j + e^{G_C}⟨S0, dS1⟩ + Σ_{j<m≤i} D_ij
           D_ij = M1_ij (q_i·k_j) + β_i M2_ij (k_i·k_j)
No gradient of the inverse is needed: Vn = T X gives dX = TᵀdVn and dL = −dX Vnᵀ.
Without the erase term (ERASES = False) dV = dVn, M2 = P = 0, and there is no dβ. With a normaliser (WEIGHS) z is one
more column of S and d one more of O: e = dd enters each product as a rank-one term,
    dz0 = e^{G_C} dz1 + Qᵀ(e^G e)    M1 += e 1ᵀ    dq += e^G (e z0ᵀ)    R += e^{G_C−G} (1 dz1ᵀ)    ⟨S0, dS1⟩ += z0·dz1

Kernels, after l2norm, prepare (T known; adds AᵀdO) and scan (from the saved states, one program per group of chunks):
    reverse    per sequence, value head and block of value columns, from the last chunk to the first: stores dS1, dX
               and dV, and ⟨S0, dS1⟩; ends with the gradient of the initial state
    pairs      per chunk and value head: scale M1, M2, and the terms of dg and dβ without a product with a state
    gradient   per chunk, value head and block of key columns: dq, dk per value head, the other terms of dg and dβ
    reduce     dq, dk summed over the value heads of a key head in a fixed order, then the chain rule of l2norm

Numerics: dg is written as sums over the pairs that a token's gate stands between. Differences of row and column sums,
    the shorter form, lose digits: what a gate does not touch would have to cancel. ⟨S0, dS1⟩ is taken before either is
    rounded, which is why scan also saves S0 of every chunk in the accumulation type; what multiplies q and k into dg
    and dβ takes them before l2norm rounds them. A transposed 16-bit copy of a
    fresh product is miscompiled as an operand by some Triton versions on Hopper, so Aᵀ is computed as such and M1, M2
    pass through memory. Partial sums of dg and dβ are added in a fixed order; no atomics anywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from memattn.kernels import config
from memattn.kernels.checks import require
from memattn.kernels.gated_delta_rule import (
    OPERANDS,
    SIZES,
    Problem,
    l2norm,
    l2norm_rows,
    load_factor,
    new,
    pair_products,
    prepare,
    scan,
    state_place,
)
from memattn.kernels.tiles import (
    dot,
    first_slot,
    load_column,
    load_tile,
    locate_chunk,
    pair_decay,
    sequence_bounds,
    store_tile,
)


@triton.jit(do_not_specialize=SIZES)
def reverse_kernel(
    q, k, w, do, dweight, beta, total, solve, states, dfinal_state, cu_seqlens, dx, dv, dh, dhz, terms, dinitial_state,
    scale, N, T, H, HV, packed, has_beta, has_start, final,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, ERASES: tl.constexpr, WEIGHS: tl.constexpr,
):  # fmt: skip
    """dx holds AᵀdO on entry and dX on return; dh [slots,HV,K,V] and dhz [slots,HV,K] receive dS1 of every chunk.

    terms [slots,HV,blocks of value columns] receives ⟨S0, dS1⟩, from states (S0 of every chunk) in full precision.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    column = (program % blocks).to(tl.int32) * BLOCK_V
    head, n = (program // blocks) % HV, program // blocks // HV
    first, length = sequence_bounds(n, cu_seqlens, T, packed)
    here = first_slot(n, first, T, C, packed)
    chunks = ((length + C - 1) // C).to(tl.int32)

    scale = tl.full((), scale, ACC)
    i, d, x = tl.arange(0, C), tl.arange(0, BLOCK_K), column + tl.arange(0, BLOCK_V)
    inside = (d < K)[:, None] & (x < V)[None, :]
    columns: tl.constexpr = V + WEIGHS
    size = HV * K * columns
    place = state_place(head, d, x, K, columns)
    dS = tl.load(dfinal_state + n * size + place, mask=inside & (d < K * has_start)[:, None], other=0.0).to(ACC)
    if WEIGHS:
        place_z = (head * K + d) * columns + V
        dz = tl.load(dfinal_state + n * size + place_z, mask=d < K * has_start, other=0.0).to(ACC)
        first_block = tl.where(column == 0, K, 0)
    for step in range(chunks):
        c = chunks - 1 - step
        row = first + c * C
        rows = length - c * C
        live = i < rows
        row_v = row * HV + head
        key_row = (row * H + head // (HV // H)) * K
        after = dh + ((here + c) * HV + head) * K * V
        tl.store(after + d[:, None] * V + x[None, :], dS.to(dh.dtype.element_ty), mask=inside)
        S = tl.load(states + (here + c) * size + place, mask=inside, other=0.0)
        term = tl.sum(S * dS)
        if WEIGHS:
            tl.store(dhz + ((here + c) * HV + head) * K + d, dz, mask=d < first_block)
            term += tl.sum(tl.load(states + (here + c) * size + place_z, mask=d < first_block, other=0.0) * dz)
        tl.store(terms + ((here + c) * HV + head) * blocks + program % blocks, term)

        G = load_column(total + row_v, i, live, HV, ACC)
        G_last = tl.load(total + row_v + (tl.minimum(rows, C) - 1) * HV).to(ACC)
        keys = load_tile(k + key_row, i, live, H * K, 0, K, BLOCK_K)
        dvn = dot(keys, dS.to(keys.dtype), tl.zeros((C, BLOCK_V), ACC), PRECISION) * tl.exp(G_last - G)[:, None]
        dvn += load_tile(dx + row_v * V, i, live, HV * V, column, V, BLOCK_V)
        if ERASES:
            dvn = dvn.to(keys.dtype)
            X = tl.load(solve + ((here + c) * HV + head) * C * C + i[None, :] * C + i[:, None]).to(keys.dtype)  # Tᵀ
            dX = dot(X, dvn, tl.zeros((C, BLOCK_V), ACC), PRECISION)
            strength = load_factor(beta + row_v, i, rows, HV, has_beta, ACC)
            store_tile(dx + row_v * V, dX, i, live, HV * V, column, V, BLOCK_V)
            store_tile(dv + row_v * V, dX * strength[:, None], i, live, HV * V, column, V, BLOCK_V)
        else:
            store_tile(dv + row_v * V, dvn, i, live, HV * V, column, V, BLOCK_V)

        queries = load_tile(q + key_row, i, live, H * K, 0, K, BLOCK_K)
        read = scale * tl.exp(G)
        dO = load_tile(do + row_v * V, i, live, HV * V, column, V, BLOCK_V).to(ACC) * read[:, None]
        dS = dot(tl.trans(queries), dO.to(keys.dtype), dS * tl.exp(G_last), PRECISION)
        if ERASES:
            W = load_tile(w + row_v * K, i, live, HV * K, 0, K, BLOCK_K)
            dS = dot(tl.trans(W), -dvn, dS, PRECISION)
        if WEIGHS:
            read *= load_column(dweight + row_v, i, live, HV, ACC)
            dz = dz * tl.exp(G_last) + tl.sum(queries.to(ACC) * read[:, None], 0)
    tl.store(dinitial_state + n * size + place, dS, mask=inside & (d < K * final)[:, None])
    if WEIGHS:
        tl.store(dinitial_state + n * size + place_z, dz, mask=d < first_block * final)


@triton.jit(do_not_specialize=SIZES)
def pairs_kernel(
    q, k, inverse_q, inverse_k, v, beta, total, vn, dx, do, dweight, terms, cu_seqlens, m1, m2, dg, dbeta, scale,
    N, T, H, HV, blocks, packed, has_beta, normalised,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, ERASES: tl.constexpr, WEIGHS: tl.constexpr,
):  # fmt: skip
    """scale · M1 and M2 of every chunk [slots,HV,C,C], and what g and β receive without a product with a state."""
    program = tl.program_id(0).to(tl.int64)
    slot, head = program // HV, program % HV
    row, rows = locate_chunk(slot, cu_seqlens, N, T, C, packed)
    i = tl.arange(0, C)
    live = i < rows
    row_v = row * HV + head
    row_k = row * H + head // (HV // H)
    keys, queries = k + row_k * K, q + row_k * K

    dA, dL, dstrength = tl.zeros((C, C), ACC), tl.zeros((C, C), ACC), tl.zeros((C,), ACC)
    for start in range(0, V, BLOCK_V):
        values = load_tile(vn + row_v * V, i, live, HV * V, start, V, BLOCK_V)
        dO = load_tile(do + row_v * V, i, live, HV * V, start, V, BLOCK_V)
        dA = dot(dO, tl.trans(values), dA, PRECISION)
        if ERASES:
            dX = load_tile(dx + row_v * V, i, live, HV * V, start, V, BLOCK_V)
            inputs = load_tile(v + row_v * V, i, live, HV * V, start, V, BLOCK_V)
            dL = dot(dX, tl.trans(values), dL, PRECISION)
            dstrength += tl.sum(dX.to(ACC) * inputs.to(ACC), 1)
    if WEIGHS:
        dA += load_column(dweight + row_v, i, live, HV, ACC)[:, None]
    G = load_column(total + row_v, i, live, HV, ACC)
    decay = pair_decay(G[:, None], G[None, :], (i[:, None] >= i[None, :]) & live[:, None])
    M1 = dA * (tl.full((), scale, ACC) * decay)
    M2 = tl.where(i[:, None] > i[None, :], -dL * decay, 0.0)
    store_tile(m1 + program * C * C, M1, i, i < C, C, 0, C, C)
    if ERASES:
        store_tile(m2 + program * C * C, M2, i, i < C, C, 0, C, C)

    factor_k = load_factor(inverse_k + row_k, i, rows, H, normalised, ACC)
    factor_q = load_factor(inverse_q + row_k, i, rows, H, normalised, ACC)
    M1 *= factor_q[:, None] * factor_k[None, :]
    if ERASES:
        M2 *= factor_k[:, None] * factor_k[None, :]
        M2 *= pair_products(keys, keys, i, live, H * K, K, C, BLOCK_K, ACC, PRECISION)
        tl.store(dbeta + row_v + i * HV, dstrength + tl.sum(M2, 1), mask=live)
    D = M2 * load_factor(beta + row_v, i, rows, HV, has_beta, ACC)[:, None]
    D += M1 * pair_products(queries, keys, i, live, H * K, K, C, BLOCK_K, ACC, PRECISION)
    D = tl.where(i[:, None] >= i[None, :], tl.cumsum(D, 1) - D, 0.0)  # row i, column m: Σ over j < m ≤ i
    state_term = tl.zeros((), ACC)
    for block in range(blocks):
        state_term += tl.load(terms + program * blocks + block, mask=rows > 0, other=0.0)
    G_last = tl.load(total + row_v + (tl.minimum(rows, C) - 1) * HV, mask=rows > 0, other=0.0).to(ACC)
    tl.store(dg + row_v + i * HV, tl.sum(D, 0) + tl.exp(G_last) * state_term, mask=live)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    q, k, inverse_q, inverse_k, beta, total, vn, dx, do, dweight, h, hz, dh, dhz, m1, m2, cu_seqlens,
    dq, dk, dg, dbeta, scale, N, T, H, HV, tokens, packed, has_beta, normalised,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, ERASES: tl.constexpr, WEIGHS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    blocks: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    block = program % blocks
    column = block.to(tl.int32) * BLOCK_K
    head, slot = (program // blocks) % HV, program // blocks // HV
    row, rows = locate_chunk(slot, cu_seqlens, N, T, C, packed)
    i, d = tl.arange(0, C), column + tl.arange(0, BLOCK_K)
    live = i < rows
    row_v = row * HV + head
    row_k = row * H + head // (HV // H)
    states = (slot * HV + head) * K * V

    dQ, P, dK = tl.zeros((C, BLOCK_K), ACC), tl.zeros((C, BLOCK_K), ACC), tl.zeros((C, BLOCK_K), ACC)
    for start in range(0, V, BLOCK_V):
        S = load_tile(h + states, d, d < K, V, start, V, BLOCK_V)
        dO = load_tile(do + row_v * V, i, live, HV * V, start, V, BLOCK_V)
        dQ = dot(dO, tl.trans(S), dQ, PRECISION)
        if ERASES:
            dX = load_tile(dx + row_v * V, i, live, HV * V, start, V, BLOCK_V)
            P = dot(dX, tl.trans(S), P, PRECISION)
        dS = load_tile(dh + states, d, d < K, V, start, V, BLOCK_V)
        values = load_tile(vn + row_v * V, i, live, HV * V, start, V, BLOCK_V)
        dK = dot(values, tl.trans(dS), dK, PRECISION)
    if WEIGHS:
        place_z = (slot * HV + head) * K + d
        z = tl.load(hz + place_z, mask=d < K, other=0.0)
        dQ += load_column(dweight + row_v, i, live, HV, ACC)[:, None] * z[None, :]
        dK += tl.load(dhz + place_z, mask=d < K, other=0.0)[None, :]

    G = load_column(total + row_v, i, live, HV, ACC)
    G_last = tl.load(total + row_v + (tl.minimum(rows, C) - 1) * HV, mask=rows > 0, other=0.0).to(ACC)
    strength = load_factor(beta + row_v, i, rows, HV, has_beta, ACC)
    factor_k = load_factor(inverse_k + row_k, i, rows, H, normalised, ACC)
    factor_q = load_factor(inverse_q + row_k, i, rows, H, normalised, ACC)
    keys = load_tile(k + row_k * K, i, live, H * K, column, K, BLOCK_K)
    queries = load_tile(q + row_k * K, i, live, H * K, column, K, BLOCK_K)

    dQ *= (tl.full((), scale, ACC) * tl.exp(G))[:, None]
    P *= tl.exp(G)[:, None]
    dK *= tl.exp(tl.where(live, G_last - G, 0.0))[:, None]
    read = tl.sum(queries.to(ACC) * dQ, 1) * factor_q
    erased, written = tl.sum(keys.to(ACC) * P, 1) * factor_k, tl.sum(keys.to(ACC) * dK, 1) * factor_k
    part = block * tokens * HV + row_v + i * HV
    if ERASES:
        tl.store(dbeta + part, -erased, mask=live)
    dG = tl.cumsum(read - strength * erased, 0, reverse=True) + tl.cumsum(written, 0) - written
    tl.store(dg + part, dG, mask=live)

    keys = (keys.to(ACC) * factor_k[:, None]).to(keys.dtype)
    queries = (queries.to(ACC) * factor_q[:, None]).to(queries.dtype)
    M1 = load_tile(m1 + (slot * HV + head) * C * C, i, i < C, C, 0, C, C)
    dQ = dot(M1, keys, dQ, PRECISION)
    store_tile(dq + row_v * K, dQ, i, live, HV * K, column, K, BLOCK_K)
    dK = dot(tl.trans(M1), queries, dK - P * strength[:, None], PRECISION)
    if ERASES:
        M2 = load_tile(m2 + (slot * HV + head) * C * C, i, i < C, C, 0, C, C)
        M2 = (M2 * strength[:, None]).to(keys.dtype)
        dK = dot(tl.trans(M2), keys, dot(M2, keys, dK, PRECISION), PRECISION)
    store_tile(dk + row_v * K, dK, i, live, HV * K, column, K, BLOCK_K)


@triton.jit(do_not_specialize=SIZES)
def reduce_kernel(
    part, x, dx, rows, group, normalised,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx [rows, K] = Σ over the group of part [rows, group, K]; with l2norm, through y = x / sqrt(Σx² + eps)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R
    i = tl.arange(0, BLOCK_R)
    live = i < rows - row
    dY = tl.zeros((BLOCK_R, BLOCK_K), ACC)
    for member in range(group):
        dY += load_tile(part + (row * group + member) * K, i, live, group * K, 0, K, BLOCK_K)
    X = load_tile(x + row * K, i, live, K, 0, K, BLOCK_K).to(ACC)
    inverse = l2norm_rows(X)[:, None]
    X *= inverse
    projected = (dY - X * tl.sum(X * dY, 1)[:, None]) * inverse
    store_tile(dx + row * K, tl.where(normalised != 0, projected, dY), i, live, K, 0, K, BLOCK_K)


# --- launchers --------------------------------------------------------------------------------------------------------


def reverse(
    p: Problem, q, k, w, do, dweight, beta, total, solve, states, dfinal_state, dvn, dinitial_state, scale: float
):  # fmt: skip
    """dS1 of every chunk with its z, its products with `states`, and dV; turns dvn from AᵀdO into dX."""
    options = p.launch("reverse", OPERANDS[q.dtype], "erases", "weighs")
    blocks = triton.cdiv(p.V, options["BLOCK_V"])
    dh, dv = new(q, p.slots(), p.HV, p.K, p.V), torch.empty_like(dvn)
    dhz = new(q, p.slots(), p.HV, p.K, dtype=p.acc) if p.memory.weighs else total
    terms = new(q, p.slots(), p.HV, blocks, dtype=p.acc)
    reverse_kernel[(p.N * p.HV * blocks,)](
        q, k, w, do, dweight, total if beta is None else beta, total, solve, states,
        total if dfinal_state is None else dfinal_state, p.cu_seqlens, dvn, dv, dh, dhz, terms,
        total if dinitial_state is None else dinitial_state, scale,
        *p.sizes, p.packed, int(beta is not None), int(dfinal_state is not None), int(dinitial_state is not None),
        **options,
    )  # fmt: skip
    return dh, dhz, dv, terms


def pairs(p: Problem, rows, v, beta, total, vn, dx, do, dweight, terms, dg, dbeta, scale: float):
    """scale M1, M2; into dg and dbeta [B,T,HV] the terms that need nothing else. rows: see gradient."""
    m1 = new(v, p.slots(), p.HV, p.C, p.C)
    m2 = torch.empty_like(m1) if p.memory.erases else m1
    pairs_kernel[(p.slots() * p.HV,)](
        *rows[:4], v, total if beta is None else beta, total, vn, dx, do, dweight, terms, p.cu_seqlens, m1, m2,
        dg, dbeta, scale, *p.sizes, terms.shape[2], p.packed, int(beta is not None), rows[4],
        **p.launch("pairs", OPERANDS[v.dtype], "erases", "weighs"),
    )  # fmt: skip
    return m1, m2


def gradient(p: Problem, rows, v, beta, total, vn, dx, do, dweight, h, hz, dh, dhz, terms, scale: float):
    """dq, dk per value head [B*T,HV,K]; dg, dbeta [B,T,HV], all in the accumulation dtype.

    rows: q, k as the op got them, 1 / norm of theirs [B·T,H], and whether to multiply by that.
    """
    options = p.launch("gradient", OPERANDS[v.dtype], "erases", "weighs")
    blocks = triton.cdiv(p.K, options["BLOCK_K"])
    dq, dk = (new(v, p.tokens, p.HV, p.K, dtype=p.acc) for _ in range(2))
    dg = new(v, blocks + 1, *v.shape[:3], dtype=p.acc)
    dbeta = torch.empty_like(dg) if p.memory.erases else dg
    m1, m2 = pairs(p, rows, v, beta, total, vn, dx, do, dweight, terms, dg[blocks], dbeta[blocks], scale)
    gradient_kernel[(p.slots() * p.HV * blocks,)](
        *rows[:4], total if beta is None else beta, total, vn, dx, do, dweight, h, hz, dh, dhz, m1, m2, p.cu_seqlens,
        dq, dk, dg, dbeta, scale, *p.sizes, p.tokens, p.packed, int(beta is not None), rows[4], **options,
    )  # fmt: skip
    return dq, dk, dg.sum(0), dbeta.sum(0) if p.memory.erases else None


def reduce(p: Problem, part, x, normalised: bool) -> Tensor:
    """Gradient of q or k [B,T,H,K] from that of its (normalised) copy per value head."""
    dx, rows = torch.empty_like(x), p.tokens * p.H
    options = config.pinned("reduce", OPERANDS[x.dtype], p.K, p.K)
    reduce_kernel[(triton.cdiv(rows, options["BLOCK_R"]),)](
        part, x, dx, rows, p.HV // p.H, int(normalised), K=p.K, ACC=config.TYPES[p.acc], **options
    )
    return dx


def backward(
    do: Tensor, dfinal_state: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor | None,
    initial_state: Tensor | None, cu_seqlens: Tensor | None, solve: Tensor, states: Tensor,
    scale: float, qk_l2norm: bool, chunk_size: int, checkpoint_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dg, dbeta, dinitial_state), each in its input's dtype; shape [0] where the input is None."""
    with torch.cuda.device_of(q):
        p = Problem.of(q, k, v, g, beta, initial_state, cu_seqlens, chunk_size)
        every = p.every(checkpoint_every)
        require("do", do, q, (v.dtype,), v.shape)
        require("dfinal_state", dfinal_state, q, (p.acc,), (p.N, *p.state_shape))
        require("solve", solve, q, (p.acc,), (p.slots(), p.HV, p.C, p.C))
        require("states", states, q, (p.acc,), (p.slots(every), *p.state_shape))
        dinitial = None if initial_state is None else torch.empty_like(initial_state)
        if not p.tokens:
            if dinitial is not None:
                dinitial.zero_() if dfinal_state is None else dinitial.copy_(dfinal_state)
            grads = [None if x is None else torch.empty_like(x) for x in (q, k, v, g, beta)]
            return tuple(new(q, 0) if x is None else x for x in (*grads, dinitial))
        (queries, inverse_q), (keys, inverse_k) = (l2norm(x, p) if qk_l2norm else (x, None) for x in (q, k))
        total, vn, w, dx = prepare(p, keys, v, g, beta, solve, queries, do, scale)
        before = None if q.dtype == p.acc else new(q, p.slots(), *p.state_shape, dtype=p.acc)
        h, hz = scan(p, keys, vn, w, total, states, before, None, every, 1)
        before = h if before is None else before
        dh, dhz, dv, terms = reverse(
            p, queries, keys, w, do, total, beta, total, solve, before, dfinal_state, dx, dinitial, scale
        )  # fmt: skip
        del before, w, queries, keys
        rows = q, k, *(total if x is None else x for x in (inverse_q, inverse_k)), int(qk_l2norm)
        dq, dk, dg, dbeta = gradient(p, rows, v, beta, total, vn, dx, do, total, h, hz, dh, dhz, terms, scale)
        dq, dk = reduce(p, dq, q, qk_l2norm), reduce(p, dk, k, qk_l2norm)
        dbeta = None if beta is None else dbeta.to(beta.dtype)
        return tuple(new(q, 0) if x is None else x for x in (dq, dk, dv, None if g is None else dg, dbeta, dinitial))
