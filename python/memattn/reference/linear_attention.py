"""Linear attention in plain torch.

`loop` is the definition, token by token; in float64 it is the truth every backend is measured against. `chunked` is
the fallback that runs anywhere torch does, and the comparator for tolerances: `operand_dtype` rounds the operands of
each matrix product as a 16-bit kernel does, everything else stays in the accumulate dtype. `step` decodes in place.

With `normaliser` a column of ones stands after v: the last column of the state is z, the last column of o is
scale · q·z, and o keeps the accumulate dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.reference.sequences import accumulate_dtype, chunk_decays, on_pool_rows, per_sequence


def _prepare(q, k, v, g, scale, normaliser):
    """To the accumulate dtype, heads expanded: q, k [B,T,HV,K], v [B,T,HV,V or V+1], g [B,T,HV]."""
    dtype, group = accumulate_dtype(q.dtype), v.shape[2] // q.shape[2]
    q = q.to(dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)
    q, k = (x.to(dtype).repeat_interleave(group, dim=2) for x in (q, k))
    v = F.pad(v.to(dtype), (0, 1), value=1.0) if normaliser else v.to(dtype)
    g = v.new_zeros(v.shape[:3]) if g is None else g.to(dtype).expand(v.shape[:3])
    return q, k, v, g


def _initial(q, v, initial_state, normaliser, cu_seqlens):
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if initial_state is None:
        return q.new_zeros(n, v.shape[2], q.shape[3], v.shape[3] + int(normaliser), dtype=accumulate_dtype(q.dtype))
    return initial_state


def _finish(o, state, dtype, normaliser, output_final_state):
    return o if normaliser else o.to(dtype), state.clone() if output_final_state else None


def divide(rows: Tensor) -> Tensor:
    """n / d of rows [n | d]; 0, with gradient 0, where |d| is below the smallest normal number."""
    numerator, denominator = rows[..., :-1], rows[..., -1:]
    unseen = denominator.abs() < torch.finfo(rows.dtype).tiny
    return (numerator / denominator.masked_fill(unseen, 1)).masked_fill(unseen, 0)


def loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    normaliser: bool = False,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """S ← e^{g_t} S + k_t v_tᵀ;  o_t = scale · Sᵀ q_t, one token at a time."""
    state = _initial(q, v, initial_state, normaliser, cu_seqlens)

    def run(q, k, v, g, state):
        outputs = []
        for t in range(q.shape[1]):
            state = state * g[:, t, :, None, None].exp() + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state

    o, state = per_sequence(run, _prepare(q, k, v, g, scale, normaliser), state, cu_seqlens)
    return _finish(o, state, q.dtype, normaliser, output_final_state)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    normaliser: bool = False,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 64,
    operand_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The chunk form: per chunk O = e^G Q S0 + A V, S1 = e^{G_C} S0 + K̂ᵀ V."""
    state = _initial(q, v, initial_state, normaliser, cu_seqlens)

    def dot(a, b):
        if operand_dtype is not None:
            a, b = (x.to(operand_dtype).to(x.dtype) for x in (a, b))
        return a @ b

    def run(q, k, v, g, state):
        length, pad = q.shape[1], -q.shape[1] % chunk_size
        chunks = (length + pad) // chunk_size

        def split(x):  # [B, T, HV, ...] -> [B, HV, chunks, C, ...]
            return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], chunks, chunk_size, *x.shape[3:])

        q, k, v = (split(F.pad(x, (0, 0, 0, 0, 0, pad))) for x in (q, k, v))
        decay, from_start, to_end, across = chunk_decays(split(F.pad(g, (0, 0, 0, pad))))
        within, written = dot(dot(q, k.mT) * decay, v), dot(k.mT, to_end * v)
        outputs = []
        for c in range(chunks):
            outputs.append(from_start[:, :, c] * dot(q[:, :, c], state) + within[:, :, c])
            state = across[:, :, c] * state + written[:, :, c]
        o = torch.cat(outputs, 2)[:, :, :length].transpose(1, 2) if outputs else v.flatten(2, 3).transpose(1, 2)
        return o, state

    o, state = per_sequence(run, _prepare(q, k, v, g, scale, normaliser), state, cu_seqlens)
    return _finish(o, state, q.dtype, normaliser, output_final_state)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    *,
    normaliser: bool = False,
    state_indices: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`loop` on rows of a state pool, written back in place; rows with index −1 give 0 and write nothing."""

    def run(pool):
        return loop(q, k, v, g, normaliser=normaliser, scale=scale, initial_state=pool, output_final_state=True)

    return on_pool_rows(run, state, state_indices, q.shape[0])
