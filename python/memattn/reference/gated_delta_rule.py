"""Gated delta rule in plain torch.

`loop` is the definition, token by token; in float64 it is the truth every backend is measured against. `chunked` is
the fallback that runs anywhere torch does, and the comparator for tolerances: `operand_dtype` rounds the operands of
each matrix product as a 16-bit kernel does, everything else stays in the accumulate dtype. `step` decodes in place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.reference.sequences import accumulate_dtype, chunk_decays, on_pool_rows, per_sequence

L2NORM_EPS = 1e-6


def _prepare(q, k, v, g, beta, scale, qk_l2norm):
    """To the accumulate dtype, heads expanded to value heads: q, k [B,T,HV,K], v [B,T,HV,V], g, beta [B,T,HV]."""
    dtype, group = accumulate_dtype(q.dtype), v.shape[2] // q.shape[2]
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if qk_l2norm:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2NORM_EPS) for x in (q, k))
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    q, k = (x.repeat_interleave(group, dim=2) for x in (q, k))
    g = v.new_zeros(v.shape[:3]) if g is None else g.to(dtype)
    beta = v.new_ones(v.shape[:3]) if beta is None else beta.to(dtype)
    return q, k, v, g, beta


def _initial(q, v, initial_state, cu_seqlens):
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        return q.new_zeros(n, v.shape[2], q.shape[3], v.shape[3], dtype=accumulate_dtype(q.dtype))
    return initial_state


def loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S ← e^{g_t} S;  S ← S + β_t k_t (v_t − Sᵀk_t)ᵀ;  o_t = scale · Sᵀ q_t, one token at a time."""
    dtype = q.dtype
    state = _initial(q, v, initial_state, cu_seqlens)

    def run(q, k, v, g, beta, state):
        outputs = []
        for t in range(q.shape[1]):
            state = state * g[:, t, :, None, None].exp()
            error = v[:, t] - torch.einsum("bhk,bhkv->bhv", k[:, t], state)
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state

    o, state = per_sequence(run, _prepare(q, k, v, g, beta, scale, qk_l2norm), state, cu_seqlens)
    return o.to(dtype), state.clone() if output_final_state else None


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    operand_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The chunk form: per chunk Vn = T β(V − e^G K S0), O = e^G Q S0 + A Vn, S1 = e^{G_C} S0 + K̂ᵀ Vn."""
    dtype = q.dtype
    state = _initial(q, v, initial_state, cu_seqlens)

    def dot(a, b):
        if operand_dtype is not None:
            a, b = (x.to(operand_dtype).to(x.dtype) for x in (a, b))
        return a @ b

    def run(q, k, v, g, beta, state):
        length, pad = q.shape[1], -q.shape[1] % chunk_size
        chunks = (length + pad) // chunk_size

        def split(x):  # [B, T, HV, ...] -> [B, HV, chunks, C, ...]
            return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], chunks, chunk_size, *x.shape[3:])

        q, k, v = (split(F.pad(x, (0, 0, 0, 0, 0, pad))) for x in (q, k, v))
        g, beta = (split(F.pad(x, (0, 0, 0, pad))) for x in (g, beta))
        decay, from_start, to_end, across = chunk_decays(g)
        eye = torch.eye(chunk_size, dtype=g.dtype, device=g.device)
        lower = (beta[..., None] * dot(k, k.mT) * decay).tril(-1)
        solve = torch.linalg.solve_triangular(eye + lower, eye.expand_as(lower), upper=False, unitriangular=True)
        attention = dot(q, k.mT) * decay
        outputs = []
        for c in range(q.shape[2]):
            error = beta[:, :, c, :, None] * (v[:, :, c] - from_start[:, :, c] * dot(k[:, :, c], state))
            value = dot(solve[:, :, c], error)
            outputs.append(from_start[:, :, c] * dot(q[:, :, c], state) + dot(attention[:, :, c], value))
            state = across[:, :, c] * state + dot((to_end[:, :, c] * k[:, :, c]).mT, value)
        o = torch.cat(outputs, 2)[:, :, :length].transpose(1, 2) if outputs else v.flatten(2, 3).transpose(1, 2)
        return o, state

    o, state = per_sequence(run, _prepare(q, k, v, g, beta, scale, qk_l2norm), state, cu_seqlens)
    return o.to(dtype), state.clone() if output_final_state else None


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    *,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = False,
) -> Tensor:
    """`loop` on rows of a state pool, written back in place; rows with index −1 give 0 and write nothing."""

    def run(pool):
        return loop(q, k, v, g, beta, scale=scale, initial_state=pool, output_final_state=True, qk_l2norm=qk_l2norm)

    return on_pool_rows(run, state, state_indices, q.shape[0])
