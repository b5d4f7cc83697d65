"""Gated delta rule, Triton backward. Symbols, shapes and slots as in gated_delta_rule.py.

Given dO and, per chunk, the gradient dS1 of the state after it (q times scale, q and k after l2norm):
    dVn = AᵀdO + e^{G_C−G} (K dS1)        dX = TᵀdVn          A = tril((q_i·k_j) e^{G_i−G_j}), X = β(V − e^G K S0)
    dS0 = e^{G_C} dS1 + Qᵀ(e^G dO) − WᵀdVn                    dV = β dX
    M1 = tril(dO Vnᵀ) e^{G_i−G_j}         M2 = −stril(dX Vnᵀ) e^{G_i−G_j}
    dq  = e^G (dO S0ᵀ) + M1 K             P = e^G (dX S0ᵀ)
    dk  = a + b,    a = βM2 K − βP,       b = M1ᵀQ + (βM2)ᵀK + e^{G_C−G} (Vn dS1ᵀ)
    dβ_i = dX_i·V_i + k_i·(M2 K − P)_i
    dG_i = q_i·dq_i + k_i·a_i − k_i·b_i,  on the last row also Σ_i k_i·(e^{G_C−G_i} Vn_i dS1ᵀ) + e^{G_C}⟨S0, dS1⟩
    dg   = reverse cumulative sum of dG inside the chunk
No gradient of the inverse is needed: Vn = T X gives dX = TᵀdVn and dL = −dX Vnᵀ.

Kernels, after l2norm, prepare (T known; adds AᵀdO) and scan (from the saved states, one program per group of chunks):
    reverse    per sequence, value head and block of value columns, from the last chunk to the first: stores dS1, dX
               and dV; ends with the gradient of the initial state
    pairs      per chunk and value head: scale M1, M2, dX_i·V_i
    gradient   per chunk, value head and block of key columns: dq, dk per value head, dg, dβ (partial sums over blocks)
    reduce     dq, dk summed over the value heads of a key head in a fixed order, then the chain rule of l2norm

Numerics: a transposed 16-bit copy of a fresh product is miscompiled as an operand by some Triton versions on Hopper, so
    Aᵀ is computed as such and M1, M2 pass through memory. k·a and k·b see the same rounded βM2: in the reverse
    cumulative sum the two ends of a pair cancel exactly when both lie after the token. No atomics anywhere.
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
    load_beta,
    new,
    prepare,
    scan,
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
    q, k, w, do, beta, total, solve, dfinal_state, cu_seqlens, dx, dv, dh, dinitial_state, scale,
    N, T, H, HV, packed, has_beta, has_start, final,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx holds AᵀdO on entry and dX on return; dh [slots,HV,K,V] receives dS1 of every chunk."""
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
    place = head * K * V + d[:, None] * V + x[None, :]
    dS = tl.load(
        dfinal_state + n * HV * K * V + place, mask=inside & (d < K * has_start)[:, None], other=0.0
    ).to(ACC)  # fmt: skip
    for step in range(chunks):
        c = chunks - 1 - step
        row = first + c * C
        rows = length - c * C
        live = i < rows
        row_v = row * HV + head
        key_row = (row * H + head // (HV // H)) * K
        tl.store(dh + (here + c) * HV * K * V + place, dS.to(dh.dtype.element_ty), mask=inside)

        G = load_column(total + row_v, i, live, HV, ACC)
        G_last = tl.load(total + row_v + (tl.minimum(rows, C) - 1) * HV).to(ACC)
        keys = load_tile(k + key_row, i, live, H * K, 0, K, BLOCK_K)
        dvn = dot(keys, dS.to(keys.dtype), tl.zeros((C, BLOCK_V), ACC), PRECISION) * tl.exp(G_last - G)[:, None]
        dvn += load_tile(dx + row_v * V, i, live, HV * V, column, V, BLOCK_V)
        dvn = dvn.to(keys.dtype)

        X = tl.load(solve + ((here + c) * HV + head) * C * C + i[None, :] * C + i[:, None]).to(keys.dtype)  # Tᵀ
        dX = dot(X, dvn, tl.zeros((C, BLOCK_V), ACC), PRECISION)
        strength = load_beta(beta + row_v, i, rows, HV, has_beta, ACC)
        store_tile(dx + row_v * V, dX, i, live, HV * V, column, V, BLOCK_V)
        store_tile(dv + row_v * V, dX * strength[:, None], i, live, HV * V, column, V, BLOCK_V)

        queries = load_tile(q + key_row, i, live, H * K, 0, K, BLOCK_K)
        dO = load_tile(do + row_v * V, i, live, HV * V, column, V, BLOCK_V).to(ACC) * (scale * tl.exp(G))[:, None]
        W = load_tile(w + row_v * K, i, live, HV * K, 0, K, BLOCK_K)
        dS = dot(tl.trans(queries), dO.to(keys.dtype), dS * tl.exp(G_last), PRECISION)
        dS = dot(tl.trans(W), -dvn, dS, PRECISION)
    tl.store(dinitial_state + n * HV * K * V + place, dS, mask=inside & (d < K * final)[:, None])


@triton.jit(do_not_specialize=SIZES)
def pairs_kernel(
    v, vn, dx, do, total, cu_seqlens, m1, m2, dbeta, scale, N, T, HV, packed,
    V: tl.constexpr, C: tl.constexpr, BLOCK_V: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale · M1 and M2 of every chunk [slots,HV,C,C], and dX_i·V_i, what β receives without reading the keys."""
    program = tl.program_id(0).to(tl.int64)
    slot, head = program // HV, program % HV
    row, rows = locate_chunk(slot, cu_seqlens, N, T, C, packed)
    i = tl.arange(0, C)
    live = i < rows
    row_v = row * HV + head

    dA, dL, dstrength = tl.zeros((C, C), ACC), tl.zeros((C, C), ACC), tl.zeros((C,), ACC)
    for start in range(0, V, BLOCK_V):
        values = load_tile(vn + row_v * V, i, live, HV * V, start, V, BLOCK_V)
        dO = load_tile(do + row_v * V, i, live, HV * V, start, V, BLOCK_V)
        dX = load_tile(dx + row_v * V, i, live, HV * V, start, V, BLOCK_V)
        inputs = load_tile(v + row_v * V, i, live, HV * V, start, V, BLOCK_V)
        dA = dot(dO, tl.trans(values), dA, PRECISION)
        dL = dot(dX, tl.trans(values), dL, PRECISION)
        dstrength += tl.sum(dX.to(ACC) * inputs.to(ACC), 1)
    G = load_column(total + row_v, i, live, HV, ACC)
    decay = pair_decay(G[:, None], G[None, :], (i[:, None] >= i[None, :]) & live[:, None])
    M2 = tl.where(i[:, None] > i[None, :], -dL * decay, 0.0)
    store_tile(m1 + program * C * C, dA * (tl.full((), scale, ACC) * decay), i, i < C, C, 0, C, C)
    store_tile(m2 + program * C * C, M2, i, i < C, C, 0, C, C)
    tl.store(dbeta + row_v + i * HV, dstrength, mask=live)


@triton.jit(do_not_specialize=SIZES)
def gradient_kernel(
    q, k, beta, total, vn, dx, do, h, dh, m1, m2, cu_seqlens, dq, dk, dg, dbeta, scale,
    N, T, H, HV, tokens, packed, has_beta,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
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
    row_k = (row * H + head // (HV // H)) * K
    states = (slot * HV + head) * K * V

    dQ, P, b = tl.zeros((C, BLOCK_K), ACC), tl.zeros((C, BLOCK_K), ACC), tl.zeros((C, BLOCK_K), ACC)
    state_term = tl.zeros((BLOCK_K,), ACC)  # ⟨S0, dS1⟩ per key column
    for start in range(0, V, BLOCK_V):
        S = load_tile(h + states, d, d < K, V, start, V, BLOCK_V)
        dO = load_tile(do + row_v * V, i, live, HV * V, start, V, BLOCK_V)
        dX = load_tile(dx + row_v * V, i, live, HV * V, start, V, BLOCK_V)
        dQ = dot(dO, tl.trans(S), dQ, PRECISION)
        P = dot(dX, tl.trans(S), P, PRECISION)
        dS = load_tile(dh + states, d, d < K, V, start, V, BLOCK_V)
        values = load_tile(vn + row_v * V, i, live, HV * V, start, V, BLOCK_V)
        b = dot(values, tl.trans(dS), b, PRECISION)
        state_term += tl.sum(S.to(ACC) * dS.to(ACC), 1)

    G = load_column(total + row_v, i, live, HV, ACC)
    last = tl.minimum(rows, C) - 1
    G_last = tl.load(total + row_v + last * HV, mask=rows > 0, other=0.0).to(ACC)
    keys = load_tile(k + row_k, i, live, H * K, column, K, BLOCK_K)
    queries = load_tile(q + row_k, i, live, H * K, column, K, BLOCK_K)
    M1 = load_tile(m1 + (slot * HV + head) * C * C, i, i < C, C, 0, C, C)
    M2 = load_tile(m2 + (slot * HV + head) * C * C, i, i < C, C, 0, C, C)

    dQ = dot(M1, keys, dQ * (tl.full((), scale, ACC) * tl.exp(G))[:, None], PRECISION)
    store_tile(dq + row_v * K, dQ, i, live, HV * K, column, K, BLOCK_K)
    dG = tl.sum(queries.to(ACC) * dQ, 1)

    P *= tl.exp(G)[:, None]
    Y = dot(M2, keys, -P, PRECISION)
    tl.store(dbeta + block * tokens * HV + row_v + i * HV, tl.sum(keys.to(ACC) * Y, 1), mask=live)
    strength = load_beta(beta + row_v, i, rows, HV, has_beta, ACC)
    M2 = (M2 * strength[:, None]).to(keys.dtype)
    a = dot(M2, keys, P * -strength[:, None], PRECISION)

    b *= tl.exp(tl.where(live, G_last - G, 0.0))[:, None]
    dG_last = tl.sum(keys.to(ACC) * b) + tl.exp(G_last) * tl.sum(state_term)
    b = dot(tl.trans(M1), queries, b, PRECISION)
    b = dot(tl.trans(M2), keys, b, PRECISION)
    store_tile(dk + row_v * K, a + b, i, live, HV * K, column, K, BLOCK_K)
    dG += tl.sum(keys.to(ACC) * (a - b), 1) + tl.where(i == last, dG_last, 0.0)
    tl.store(dg + block * tokens * HV + row_v + i * HV, tl.cumsum(dG, 0, reverse=True), mask=live)


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


def reverse(p: Problem, q, k, w, do, beta, total, solve, dfinal_state, dvn, dinitial_state, scale: float):
    """dS1 of every chunk and dV; turns dvn from AᵀdO into dX."""
    dh, dv = new(q, p.slots(), *p.state_shape), torch.empty_like(do)
    options = p.launch("reverse", OPERANDS[q.dtype])
    reverse_kernel[(p.N * p.HV * triton.cdiv(p.V, options["BLOCK_V"]),)](
        q, k, w, do, total if beta is None else beta, total, solve, total if dfinal_state is None else dfinal_state,
        p.cu_seqlens, dvn, dv, dh, total if dinitial_state is None else dinitial_state, scale,
        *p.sizes, p.packed, int(beta is not None), int(dfinal_state is not None), int(dinitial_state is not None),
        **options,
    )  # fmt: skip
    return dh, dv


def gradient(p: Problem, q, k, v, beta, total, vn, dx, do, h, dh, scale: float):
    """dq, dk per value head [B*T,HV,K]; dg, dbeta [B,T,HV], all in the accumulation dtype."""
    m1, m2 = (new(q, p.slots(), p.HV, p.C, p.C) for _ in range(2))
    options = p.launch("gradient", OPERANDS[q.dtype])
    blocks = triton.cdiv(p.K, options["BLOCK_K"])
    dq, dk = (new(q, p.tokens, p.HV, p.K, dtype=p.acc) for _ in range(2))
    dg, dbeta = (new(q, blocks + extra, *v.shape[:3], dtype=p.acc) for extra in (0, 1))
    pairs_kernel[(p.slots() * p.HV,)](
        v, vn, dx, do, total, p.cu_seqlens, m1, m2, dbeta[blocks], scale, p.N, p.T, p.HV, p.packed,
        **p.launch("pairs", OPERANDS[q.dtype]),
    )  # fmt: skip
    gradient_kernel[(p.slots() * p.HV * blocks,)](
        q, k, total if beta is None else beta, total, vn, dx, do, h, dh, m1, m2, p.cu_seqlens, dq, dk, dg, dbeta, scale,
        *p.sizes, p.tokens, p.packed, int(beta is not None), **options,
    )  # fmt: skip
    return dq, dk, dg.sum(0), dbeta.sum(0)


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
        queries, keys = (l2norm(q, p), l2norm(k, p)) if qk_l2norm else (q, k)
        total, vn, w, dx = prepare(p, keys, v, g, beta, solve, queries, do, scale)
        h = scan(p, keys, vn, w, total, states, None, None, every, every)
        dh, dv = reverse(p, queries, keys, w, do, beta, total, solve, dfinal_state, dx, dinitial, scale)
        dq, dk, dg, dbeta = gradient(p, queries, keys, v, beta, total, vn, dx, do, h, dh, scale)
        dq, dk = reduce(p, dq, q, qk_l2norm), reduce(p, dk, k, qk_l2norm)
        dbeta = None if beta is None else dbeta.to(beta.dtype)
        return tuple(new(q, 0) if x is None else x for x in (dq, dk, dv, None if g is None else dg, dbeta, dinitial))
