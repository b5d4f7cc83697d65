"""Gated delta rule: a K×V memory that decays, erases along a key and writes a value, per token.

    S_t = (I − β_t k_t k_tᵀ) e^{g_t} S_{t−1} + β_t k_t v_tᵀ          o_t = scale · S_tᵀ q_t

g = None gives DeltaNet (no decay), beta = None means β = 1. Sources: DeltaNet (Yang et al. 2024, arXiv 2406.06484),
Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464, eq. 10 and the chunk form of its section 3.3).

Chunks of C tokens, G the inclusive cumulative sum of g inside the chunk, S0 the state at its start:

    L = stril(β_i (k_i·k_j) e^{G_i−G_j})    T = (I + L)^{-1}    Vn = T β(V − e^G K S0)
    O = e^G Q S0 + tril((q_i·k_j) e^{G_i−G_j}) Vn               S1 = e^{G_C} S0 + (e^{G_C−G} K)ᵀ Vn

The result does not depend on C beyond rounding. The backward needs no gradient of the inverse: see
csrc/cpu/gated_delta_rule_backward.cpp and kernels/gated_delta_rule_backward.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import Differentiable, define, define_differentiable, implement, resolve
from memattn.ops._sequences import sequences, slots
from memattn.reference import gated_delta_rule as reference

OP, STEP = "gated_delta_rule", "gated_delta_rule_step"
CHUNK_SIZES = (16, 32, 64)
# Default per backend: the shorter chunk costs fewer operations, the longer one fewer sequential steps.
CHUNK_SIZE = {"cpu": 32, "triton": 64, "chunked": 64}
CHECKPOINT_EVERY = 8  # default chunks between saved states

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? initial_state, Tensor? cu_seqlens"  # as below
)
_SETTINGS = "float scale, bool qk_l2norm, int chunk_size, int checkpoint_every"


# --- the ops: schemas, shapes, gradients -----------------------------------------------------------------------------


def _fake(q, k, v, g, beta, initial_state, cu_seqlens, scale, qk_l2norm, chunk_size, checkpoint_every, final, save):
    heads, key_dim, value_dim = v.shape[2], q.shape[3], v.shape[3]
    state = q.new_empty(0, dtype=reference.accumulate_dtype(q.dtype))
    n = sequences(q, cu_seqlens)
    final_state = state.new_empty(n, heads, key_dim, value_dim) if final else state.new_empty(0)
    if not save:
        return torch.empty_like(v), final_state, state.new_empty(0), state.new_empty(0)
    solve = state.new_empty(slots(q, cu_seqlens, chunk_size), heads, chunk_size, chunk_size)
    states = state.new_empty(slots(q, cu_seqlens, chunk_size * checkpoint_every), heads, key_dim, value_dim)
    return torch.empty_like(v), final_state, solve, states


def _backward_fake(do, dfinal, q, k, v, g, beta, initial_state, cu_seqlens, solve, states, *settings):
    optional = (q.new_empty(0) if x is None else torch.empty_like(x) for x in (g, beta, initial_state))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *optional


def _save(args, outputs):
    return (*args[:7], *outputs[2:])


def _backward(op, saved, args, grads):
    (q, k, v, g, beta, initial_state, cu_seqlens, solve, states), (do, dfinal, _, _) = saved, grads
    do = torch.zeros_like(v) if do is None else do.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    scale, qk_l2norm, chunk_size, checkpoint_every, final, _ = args[7:]
    inputs = (q, k, v, g, beta, initial_state, cu_seqlens, solve, states)
    results = op(do, dfinal if final else None, *inputs, scale, qk_l2norm, chunk_size, checkpoint_every)
    optional = (None if x is None else dx for x, dx in zip((g, beta, initial_state), results[3:], strict=True))
    return *results[:3], *optional, *(None,) * 7


FAMILY = Differentiable(
    schema=f"({_ARGUMENTS}, {_SETTINGS}, bool output_final_state, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    backward_schema=f"(Tensor do, Tensor? dfinal_state, {_ARGUMENTS}, Tensor solve, Tensor states, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    outputs=2,
    save=_save,
    backward=_backward,
)
STEP_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor(a!) state, Tensor? state_indices, float scale, "
    "bool qk_l2norm) -> Tensor"
)


def _triton_forward():
    from memattn.kernels import gated_delta_rule

    return gated_delta_rule.forward


def _triton_backward():
    from memattn.kernels import gated_delta_rule_backward

    return gated_delta_rule_backward.backward


define_differentiable(f"{OP}_cpu", FAMILY)
define_differentiable(f"{OP}_triton", FAMILY)
implement(f"{OP}_triton", _triton_forward)
implement(f"{OP}_triton_backward", _triton_backward)
define(f"{STEP}_cpu", STEP_SCHEMA, lambda q, k, v, *rest: torch.empty_like(v))
define(f"{STEP}_cuda", STEP_SCHEMA, lambda q, k, v, *rest: torch.empty_like(v))

_TRAINING = frozenset({"backward", "packed"})
_16_32 = (torch.float32, torch.bfloat16, torch.float16)
backends.register(OP, "triton", Limits(("cuda",), _16_32, backends.needs_triton, features=_TRAINING))
backends.register(OP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), features=_TRAINING))
_ANYWHERE = Limits(("cpu", "cuda", "mps", "xpu"), check.FLOATS, backends.always, features=_TRAINING)
backends.register(OP, "chunked", _ANYWHERE)
backends.register(STEP, "cuda", Limits(("cuda",), _16_32, backends.needs_native("_C_cuda")))
backends.register(STEP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C")))
backends.register(STEP, "chunked", Limits(_ANYWHERE.devices, check.FLOATS, backends.always))

_PASSED = check.Passed()
_OPS = {name: resolve(f"{OP}_{name}") for name in ("cpu", "triton")}
_STEPS = {name: resolve(f"{STEP}_{name}") for name in ("cpu", "cuda")}


# --- the public functions --------------------------------------------------------------------------------------------


def _check_inputs(op, q, k, v, g, beta):
    check.value_heads(op, q, k, v)
    state_dtype = reference.accumulate_dtype(q.dtype)
    for name, x, allowed in (("g", g, (state_dtype,)), ("beta", beta, (q.dtype, state_dtype))):
        if x is None:
            continue
        if name == "g" and isinstance(x, Tensor) and x.dim() == 4:
            raise NotImplementedError(
                f"{op}: g has shape {list(x.shape)}; a gate per key channel has no kernel yet, allowed: [B, T, HV]"
            )
        check.shape(op, name, x, "[B, T, HV]", v.shape[:3])
        check.dtype(op, name, x, allowed, f" with {check.dtype_name(q.dtype)} q")
        check.device(op, name, x, q, "q")


def _check_settings(erase, write, erase_from, chunk_size, checkpoint_every):
    if erase is not None or write is not None:
        name = "erase" if erase is not None else "write"
        raise NotImplementedError(f"{OP}: {name} is given; separate erase and write gates have no kernel yet, use beta")
    check.choice(OP, "erase_from", erase_from, ("decayed", "previous"))
    if erase_from == "previous":
        raise NotImplementedError(f"{OP}: erase_from is 'previous', which has no kernel yet; allowed: 'decayed'")
    if chunk_size is not None:
        check.choice(OP, "chunk_size", chunk_size, CHUNK_SIZES)
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"{OP}: checkpoint_every is {checkpoint_every}; expected a number of chunks ≥ 1")


def _check_state(op, name, state, n, q, v):
    layout = "[N, HV, K, V]" if op == OP else "[P, HV, K, V]"
    check.shape(op, name, state, layout, (n, v.shape[2], q.shape[3], v.shape[3]))
    check.dtype(op, name, state, (reference.accumulate_dtype(q.dtype),), f" with {check.dtype_name(q.dtype)} q")
    check.device(op, name, state, q, "q")


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    erase: Tensor | None = None,
    write: Tensor | None = None,
    erase_from: str = "decayed",
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    qk_l2norm: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    checkpoint_every: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gated delta rule over whole sequences; the module docstring has the equations and sources.

    ===============  ==================  =====================================================================
    argument         shape               dtype and meaning
    ===============  ==================  =====================================================================
    q, k             [B, T, H, K]        float32, bfloat16, float16 or float64, the same for q, k, v
    v                [B, T, HV, V]       HV a multiple of H: value head h reads key head h // (HV/H)
    g                [B, T, HV] or None  natural-log decay ≤ 0 and finite, float32 (float64 with float64 q)
    beta             [B, T, HV] or None  writing strength, q's dtype or float32; stable for 0 ≤ β‖k‖² ≤ 2
    initial_state    [N, HV, K, V]       float32 (float64 with float64 q); None is zero
    cu_seqlens       [N+1]               int32/int64 bounds of sequences packed along T, then B = 1; else N = B
    ===============  ==================  =====================================================================

    T ≥ 0 and zero-length sequences are legal; K, V in 16..256. `scale` multiplies q, None means K**-0.5.
    `qk_l2norm` divides q and k by sqrt(Σx² + 1e-6) first; without it keys should be normalised by the caller, since
    the solve grows without bound for β‖k‖² > 2. `chunk_size` is 16, 32, 64 or None, the backend's own.
    Training keeps the inputs, T and the state of every `checkpoint_every`-th chunk, and recomputes the rest.

    Returns (o [B, T, HV, V] in q's dtype, final_state [N, HV, K, V] or None). Differentiable in q, k, v, g, beta and
    initial_state, through o and final_state; once. NaN and inf in data propagate forward in time from their chunk on.

    Raises ValueError (shapes, values), TypeError (dtypes), NotImplementedError (g per channel, erase, write,
    erase_from="previous"), BackendError (a named backend that cannot serve).
    """
    signature = _PASSED.signature(
        q, k, v, g, beta, initial_state, cu_seqlens, erase, write, erase_from, chunk_size, checkpoint_every
    )
    if signature not in _PASSED:
        _check_settings(erase, write, erase_from, chunk_size, checkpoint_every)
        _check_inputs(OP, q, k, v, g, beta)
        if cu_seqlens is not None:
            check.cu_seqlens_layout(OP, cu_seqlens, q)
        if initial_state is not None:
            _check_state(OP, "initial_state", initial_state, sequences(q, cu_seqlens), q, v)
        _PASSED.add(signature)
    if g is not None:
        check.log_gate(OP, "g", g)
    if cu_seqlens is not None:
        check.cu_seqlens_values(OP, cu_seqlens, q)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    save = check.needs_grad(q, k, v, g, beta, initial_state)
    features = (("backward",) if save else ()) + (("packed",) if cu_seqlens is not None else ())
    request = Request(q.device.type, q.dtype, (("K", q.shape[3]), ("V", v.shape[3])), frozenset(features))
    name = backends.choose(OP, request, backend, lambda: check.describe(q=q, k=k, v=v, g=g, beta=beta))
    if name == "chunked":
        with torch.autocast(q.device.type, enabled=False):
            return reference.chunked(
                q, k, v, g, beta, scale=scale, initial_state=initial_state, output_final_state=output_final_state,
                qk_l2norm=qk_l2norm, cu_seqlens=cu_seqlens, chunk_size=chunk_size or CHUNK_SIZE[name],
            )  # fmt: skip
    tensors = check.contiguous(q, k, v, g, beta, initial_state, cu_seqlens)
    every = CHECKPOINT_EVERY if checkpoint_every is None else checkpoint_every
    settings = (scale, qk_l2norm, chunk_size or CHUNK_SIZE[name], every, output_final_state, save)
    o, final_state, _, _ = _OPS[name](*tensors, *settings)
    return o, final_state if output_final_state else None


def gated_delta_rule_step(
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
    backend: str | None = None,
) -> Tensor:
    """One or a few tokens of the gated delta rule, the state pool updated in place. Inference only.

    q, k [B, t, H, K], v [B, t, HV, V], g, beta [B, t, HV] or None, as in `gated_delta_rule`, t ≥ 1.
    state [P, HV, K, V] float32 (float64 with float64 q), contiguous, is mutated. Batch row b owns state row
    state_indices[b] (int32/int64 [B], distinct), or row b when None (then P = B). Index −1 is padding: its output is 0
    and nothing is written. Returns o [B, t, HV, V]. No host synchronisation; can be captured in a CUDA graph.

    Raises ValueError, TypeError, BackendError as `gated_delta_rule`; RuntimeError when an input requires grad.
    """
    signature = _PASSED.signature(q, k, v, g, beta, state, state_indices)
    if signature not in _PASSED:
        _check_inputs(STEP, q, k, v, g, beta)
        if q.shape[1] < 1:
            raise ValueError(f"{STEP}: q has {q.shape[1]} tokens; expected at least 1")
        check.rank(STEP, "state", state, "[P, HV, K, V]")
        _check_state(STEP, "state", state, q.shape[0] if state_indices is None else state.shape[0], q, v)
        if state_indices is not None:
            check.state_indices_layout(STEP, state_indices, q.shape[0], q)
        _PASSED.add(signature)
    check.in_place(STEP, state)
    if g is not None:
        check.log_gate(STEP, "g", g)
    if state_indices is not None:
        check.state_indices_values(STEP, state_indices, state.shape[0])
    check.inference_only(STEP, OP, q, k, v, g, beta, state)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    request = Request(q.device.type, q.dtype, (("K", q.shape[3]), ("V", v.shape[3])))
    name = backends.choose(STEP, request, backend, lambda: check.describe(q=q, k=k, v=v, g=g, beta=beta, state=state))
    if name == "chunked":
        with torch.autocast(q.device.type, enabled=False):
            return reference.step(
                q, k, v, g, beta, state, state_indices=state_indices, scale=scale, qk_l2norm=qk_l2norm
            )
    tensors = check.contiguous(q, k, v, g, beta)
    indices = None if state_indices is None else state_indices.contiguous()
    return _STEPS[name](*tensors, state, indices, scale, qk_l2norm)
