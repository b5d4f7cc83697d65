"""Segment memory in plain torch.

`loop` is the definition, segment by segment and write by write; in float64 it is the truth every backend is measured
against. `chunked` is the fallback that runs anywhere torch does, and the comparator for tolerances: then `dot` rounds
the operands of each matrix product as a 16-bit kernel does, everything else stays in the accumulate dtype.
`step` goes on with an open segment in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memattn.reference.sequences import accumulate_dtype


@dataclass(frozen=True)
class Rule:
    """How a memory is read and written. Sizes in tokens; `normalize` means that its last column is z."""

    segment_size: int
    key_segment_size: int
    delta: bool = False
    normalize: bool = True
    correction: bool = False
    causal: bool = True
    eps: float = 1e-5


def _reciprocal(denominator: Tensor) -> Tensor:
    """1 / d, and 0 with gradient 0 where |d| is below the smallest normal number."""
    nothing = denominator.abs() < torch.finfo(denominator.dtype).tiny
    return denominator.masked_fill(nothing, 1).reciprocal().masked_fill(nothing, 0)


def _plain(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _read(rule: Rule, x: Tensor, state: Tensor, dot=_plain) -> Tensor:
    """Rows x [..., C, K] read from state [..., K, V or V+1]: [..., C, V]."""
    if not rule.normalize:
        return dot(x, state)
    return dot(x, state[..., :-1]) * _reciprocal(x @ state[..., -1:] + rule.eps)


def _counts(rule: Rule, k: Tensor, state: Tensor) -> Tensor:
    """γ [..., C, 1], how much of each key z gains; no gradient."""
    if not rule.correction:
        return torch.ones_like(k[..., :1])
    k, z = k.detach(), state[..., -1:].detach()
    return (1 - (k @ z) * _reciprocal(k.square().sum(-1, keepdim=True) + rule.eps)).clamp(0, 1)


def _written(rule: Rule, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, dot=_plain) -> Tensor:
    """What the rows k, v, beta [..., C, K | V | 1] of one segment add to `state`."""
    new = v - _read(rule, k, state, dot) if rule.delta else v
    memory = dot(k.mT, beta * new)
    return torch.cat((memory, k.mT @ _counts(rule, k, state)), -1) if rule.normalize else memory


def _one_by_one(rule: Rule, k: Tensor, v: Tensor, beta: Tensor, state: Tensor, dot=_plain) -> Tensor:
    """`_written`, token by token."""
    added = torch.zeros_like(state)
    for i in range(k.shape[-2]):
        row = slice(i, i + 1)
        added = added + _written(rule, k[..., row, :], v[..., row, :], beta[..., row, :], state, dot)
    return added


def _run(rule: Rule, q, k, v, beta, state, written, dot) -> tuple[Tensor, Tensor]:
    """q [B, HQ, T, K], k, v, beta [B, H, S, K | V | 1] and state [B, H, K, ...] of sequences of one length."""
    group, size, key_size = q.shape[1] // k.shape[1], rule.segment_size, rule.key_segment_size
    segments = -(-k.shape[2] // key_size)
    outputs = []

    def read(rows, state):
        grouped = rows.unflatten(1, (k.shape[1], group)).flatten(2, 3)
        return _read(rule, grouped, state, dot).unflatten(2, (group, -1)).flatten(1, 2)

    for s in range(segments):
        if rule.causal:
            outputs.append(read(q[:, :, s * size : (s + 1) * size], state))
        here = slice(s * key_size, (s + 1) * key_size)
        state = state + written(rule, k[:, :, here], v[:, :, here], beta[:, :, here], state, dot)
    outputs.append(read(q[:, :, segments * size if rule.causal else 0 :], state))
    return torch.cat(outputs, 2), state


def _over_sequences(rule, q, k, v, beta, initial_state, cu_seqlens, cu_seqlens_k, written, dot=_plain):
    dtype = accumulate_dtype(q.dtype)
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    columns = v.shape[3] + int(rule.normalize)
    state = initial_state
    if state is None:
        state = q.new_zeros(n, k.shape[2], q.shape[3], columns, dtype=dtype)
    beta = k.new_ones(k.shape[:3], dtype=dtype) if beta is None else beta.to(dtype)
    q, k, v, beta = (x.to(dtype).transpose(1, 2) for x in (q, k, v, beta[..., None]))
    if cu_seqlens is None:
        o, state = _run(rule, q, k, v, beta, state, written, dot)
        return o.transpose(1, 2), state
    ends = cu_seqlens.tolist(), (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()
    parts = []
    for i in range(n):
        (a, b), (c, d) = ((bounds[i], bounds[i + 1]) for bounds in ends)
        writes = k[:, :, c:d], v[:, :, c:d], beta[:, :, c:d]
        parts.append(_run(rule, q[:, :, a:b], *writes, state[i : i + 1], written, dot))
    return torch.cat([o for o, _ in parts], 2).transpose(1, 2), torch.cat([s for _, s in parts])


def loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    *,
    rule: Rule,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read with the memory of the segments before, then write the segment's tokens one by one; (o, state)."""
    o, state = _over_sequences(rule, q, k, v, beta, initial_state, cu_seqlens, cu_seqlens_k, _one_by_one)
    return o.to(q.dtype), state.clone()


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    *,
    rule: Rule,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dot: Callable[[Tensor, Tensor], Tensor] = _plain,
) -> tuple[Tensor, Tensor]:
    """The same with one matrix product `dot` per segment and side."""
    o, state = _over_sequences(rule, q, k, v, beta, initial_state, cu_seqlens, cu_seqlens_k, _written, dot)
    return o.to(q.dtype), state.clone()


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    state: Tensor,
    open_state: Tensor,
    count: Tensor,
    *,
    rule: Rule,
) -> Tensor:
    """One token q, k, v [B, 1, HQ | H, K | V] per row. In place: open_state, count, and state at a segment's end."""
    dtype = accumulate_dtype(q.dtype)
    group = q.shape[2] // k.shape[2]
    strength = k.new_ones(k.shape[:3], dtype=dtype) if beta is None else beta.to(dtype)
    q, k, v, strength = (x.to(dtype).transpose(1, 2) for x in (q, k, v, strength[..., None]))
    o = _read(rule, q.unflatten(1, (-1, group)).flatten(2, 3), state).unflatten(2, (group, 1)).flatten(1, 2)
    open_state.add_(_written(rule, k, v, strength, state))
    count.add_(1)
    closed = count == rule.key_segment_size
    state.copy_(torch.where(closed[:, None, None, None], open_state, state))
    count.masked_fill_(closed, 0)
    return o.transpose(1, 2)
