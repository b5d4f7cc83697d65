"""Planted bugs: a reference's `chunked` with one wrong line each. The checks must catch every one of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from memattn.reference import gated_delta_rule, linear_attention, sequences
from support import relations

_DECAY = "decay = between.masked_fill(~causal, -torch.inf).exp()"
BUGS = {
    "tail gate and beta filled with ones": ("(F.pad(x, (0, 0, 0, pad))", "(F.pad(x, (0, 0, 0, pad), value=1.0)"),
    "tail gate and beta filled with −1": ("F.pad(x, (0, 0, 0, pad))", "F.pad(x, (0, 0, 0, pad), value=-1.0)"),
    "strict instead of inclusive mask": ("attention = dot(q, k.mT) * decay", "attention = (dot(q, k.mT) * decay).tril(-1)"),
    "one future token leaks": ("attention = dot(q, k.mT) * decay", "attention = dot(q, k.mT) * (decay + 0.1 * decay.mT.tril(1))"),
    "erase skips the previous token": ("* decay).tril(-1)", "* decay).tril(-2)"),
    "initial state ignored": ("state = _initial(q, v, initial_state, cu_seqlens)", "state = 0 * _initial(q, v, initial_state, cu_seqlens)"),
    "final state never written": ("return o, state", "return o, state_in"),
    "state of the first sequence for all": ("state = _initial(q, v, initial_state, cu_seqlens)", "state = _initial(q, v, initial_state, cu_seqlens)[:1].expand(max(len(cu_seqlens) - 1, 1) if cu_seqlens is not None else q.shape[0], -1, -1, -1)"),
    "exp before mask": (_DECAY, "G = g.cumsum(-1); decay = (G[..., :, None] - G[..., None, :]).exp() * causal"),
    "exp(G)·exp(−G) factorised": (_DECAY, "G = g.cumsum(-1); decay = (G.exp()[..., :, None] * (-G).exp()[..., None, :]) * causal"),
    "state rounded to bfloat16 per chunk": ("+ dot((to_end", "+ 0.0; state = state.bfloat16().to(state.dtype) + dot((to_end"),
    "gate overwritten": ("= chunk_decays(g)", "= chunk_decays(g); gate_in.mul_(0.5) if gate_in is not None and not gate_in.requires_grad else None"),
    "contiguity assumed": ("dtype = q.dtype", "dtype = q.dtype; k = k if k.is_contiguous() else k.as_strided(k.shape, k.contiguous().stride())"),
    "chunk state leaves out its decay": ("state = across[:, :, c] * state", "state = state"),
    "beta left out of the error": ("error = beta[:, :, c, :, None] *", "error ="),
    "scale ignored": ("_prepare(q, k, v, g, beta, scale, qk_l2norm)", "_prepare(q, k, v, g, beta, None, qk_l2norm)"),
    "heads tiled instead of grouped": ("_prepare(q, k, v, g, beta, scale, qk_l2norm)", "_tiled(_prepare, q, k, v, g, beta, scale, qk_l2norm)"),
    "final state aliases its input": ("state.clone() if output_final_state", "state if output_final_state"),
}  # fmt: skip
_SHARED = (
    "initial state ignored", "final state never written", "exp before mask", "exp(G)·exp(−G) factorised",
    "chunk state leaves out its decay",
)  # fmt: skip
_WITHIN, _LINEAR_INITIAL = (
    "dot(dot(q, k.mT) * decay, v)",
    "state = _initial(q, v, initial_state, normaliser, cu_seqlens)",
)
LINEAR_BUGS = {name: BUGS[name] for name in _SHARED} | {
    "initial state ignored": (_LINEAR_INITIAL, _LINEAR_INITIAL.replace("= _", "= 0 * _")),
    "tail gate filled with −1": ("F.pad(g, (0, 0, 0, pad))", "F.pad(g, (0, 0, 0, pad), value=-1.0)"),
    "tail rows filled with ones": ("F.pad(x, (0, 0, 0, 0, 0, pad))", "F.pad(x, (0, 0, 0, 0, 0, pad), value=1.0)"),
    "strict instead of inclusive mask": (_WITHIN, "dot((dot(q, k.mT) * decay).tril(-1), v)"),
    "one future token leaks": (_WITHIN, "dot(dot(q, k.mT) * (decay + 0.1 * decay.mT.tril(1)), v)"),
    "written values decay from the start": ("dot(k.mT, to_end * v)", "dot(k.mT, from_start * v)"),
    "within-chunk reads not decayed": (_WITHIN, "dot((dot(q, k.mT)).tril(), v)"),
    "state read without decay": ("from_start[:, :, c] * dot(q", "dot(q"),
    "state rounded to bfloat16 per chunk": ("* state + written", "* state.bfloat16().to(state.dtype) + written"),
    "gate overwritten": ("chunks = (length", "g.requires_grad or g.mul_(0.5); chunks = (length"),
    "scale ignored": ("_prepare(q, k, v, g, scale, normaliser)", "_prepare(q, k, v, g, None, normaliser)"),
    "heads tiled instead of grouped": ("_prepare(q, k, v, g, scale, normaliser)", "_tiled(_prepare, q, k, v, g, scale, normaliser)"),
}  # fmt: skip


def _tiled(prepare, q, k, v, *rest):
    group = v.shape[2] // q.shape[2]
    return prepare(q.repeat(1, 1, group, 1), k.repeat(1, 1, group, 1), v, *rest)


def planted(bug: str) -> Callable:
    """`chunked` of the gated delta rule with `bug`."""
    return _chunked_with(gated_delta_rule, bug, *BUGS[bug])


def planted_linear(bug: str) -> Callable:
    """`chunked` of linear attention with `bug`."""
    return _chunked_with(linear_attention, bug, *LINEAR_BUGS[bug])


def _chunked_with(reference, bug: str, old: str, new: str) -> Callable:
    source = inspect.getsource(sequences.chunk_decays) + inspect.getsource(reference.chunked)
    source = source.replace("dtype = q.dtype", "gate_in = g; dtype = q.dtype", 1)
    source = source.replace("length, pad =", "state_in = state; length, pad =", 1)
    namespace = {**vars(reference), "_tiled": _tiled}
    exec(*relations.with_bug(bug, old, new, source), namespace)
    return namespace["chunked"]
