"""Linear attention: a K×V memory that decays and adds one outer product per token; nothing is erased.

    S_t = e^{g_t} S_{t−1} + k_t v_tᵀ          o_t = scale · S_tᵀ q_t

g = None is linear attention (Katharopoulos et al. 2020, arXiv 2006.16236), one g per head is RetNet (Sun et al. 2023,
arXiv 2307.08621: g = ln(1 − 2^{−5−h})) and Lightning Attention, one g per token and head is Mamba-2's SSD (Dao and Gu
2024, arXiv 2405.21060, with q = C, k = B, v = Δx). Feature maps are the caller's: pass φ(q) and φ(k).

With a normaliser the memory also holds z, which is one more column of the state, as if v ended in a 1:

    z_t = e^{g_t} z_{t−1} + k_t          n_t = scale · S_tᵀ q_t          d_t = scale · q_t·z_t          o_t = n_t / d_t

No epsilon is added. Where |d_t| is below the smallest normal number of the sum's dtype (float32: 1.2e-38) nothing was
seen: o_t is 0 and so is its gradient. Features should be ≥ 0; where signed ones make d_t small, o_t is large.
The pair (n, d) enters a merge with softmax attention as (o, lse) = (n / d, ln d).

Chunks of C tokens, G the inclusive cumulative sum of g inside the chunk, S0 the state at its start:

    O = e^G Q S0 + tril((q_i·k_j) e^{G_i−G_j}) V          S1 = e^{G_C} S0 + (e^{G_C−G} K)ᵀ V

It is the chunk engine of `gated_delta_rule` without the erase term: see csrc/cpu/gated_delta_rule.cpp, and on Triton
kernels/gated_delta_rule.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import Differentiable, define, define_differentiable, implement, resolve
from memattn.ops._sequences import sequences, slots
from memattn.reference import linear_attention as reference
from memattn.reference.sequences import accumulate_dtype

OP, STEP = "linear_attention", "linear_attention_step"
CHUNK_SIZES = (16, 32, 64)
CHUNK_SIZE = {"cpu": 32, "triton": 64, "chunked": 64}  # default per backend
CHECKPOINT_EVERY = 8  # chunks between the states that training keeps


class Unnormalised(NamedTuple):
    """numerator [B, T, HV, V] and denominator [B, T, HV], float32 (float64 with float64 q): sums outgrow 16 bits.

    n / d is the normalised output, ln d its log-sum-exp in a merge with softmax attention.
    """

    numerator: Tensor
    denominator: Tensor


# --- the ops: schemas, shapes, gradients -----------------------------------------------------------------------------


def _outputs_fake(v, normaliser, divide):
    dtype = accumulate_dtype(v.dtype)
    o = v.new_empty(v.shape, dtype=dtype if normaliser and not divide else v.dtype)
    return o, v.new_empty(v.shape[:3] if normaliser else (0,), dtype=dtype)


def _fake(q, k, v, g, initial_state, cu_seqlens, scale, normaliser, divide, chunk_size, checkpoint_every, final, save):
    none = q.new_empty(0, dtype=accumulate_dtype(q.dtype))
    shape = (v.shape[2], q.shape[3], v.shape[3] + int(normaliser))
    final_state = none.new_empty(sequences(q, cu_seqlens), *shape) if final else none
    states = none.new_empty(slots(q, cu_seqlens, chunk_size * checkpoint_every), *shape) if save else none.new_empty(0)
    return *_outputs_fake(v, normaliser, divide), final_state, states


def _backward_fake(do, ddenominator, dfinal, q, k, v, g, initial_state, *rest):
    optional = (q.new_empty(0) if x is None else torch.empty_like(x) for x in (g, initial_state))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *optional


def _save(args, outputs):
    (o, denominator, _, states), divide = outputs, args[8]
    return (*args[:6], *((o, denominator) if divide else (None, None)), states)


def _backward(op, saved, args, grads):
    (*inputs, o, denominator, states), (do, dden, dfinal, _) = saved, grads
    scale, normaliser, divide, chunk_size, checkpoint_every, final, _ = args[6:]
    do = torch.zeros_like(_outputs_fake(inputs[2], normaliser, divide)[0]) if do is None else do.contiguous()
    dden = dden.contiguous() if dden is not None and normaliser and not divide else None
    dfinal = dfinal.contiguous() if final and dfinal is not None else None
    settings = (scale, normaliser, divide, chunk_size, checkpoint_every)
    results = op(do, dden, dfinal, *inputs, o, denominator, states, *settings)
    optional = (None if x is None else dx for x, dx in zip(inputs[3:5], results[3:], strict=True))
    return *results[:3], *optional, *(None,) * 8


_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? initial_state, Tensor? cu_seqlens"
_SETTINGS = "float scale, bool normaliser, bool divide, int chunk_size, int checkpoint_every"
FAMILY = Differentiable(
    schema=f"({_ARGUMENTS}, {_SETTINGS}, bool output_final_state, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    backward_schema=f"(Tensor do, Tensor? ddenominator, Tensor? dfinal_state, {_ARGUMENTS}, Tensor? o, "
    f"Tensor? denominator, Tensor states, {_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    outputs=3,
    save=_save,
    backward=_backward,
)
STEP_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor(a!) state, Tensor? state_indices, float scale, bool normaliser, "
    "bool divide) -> (Tensor, Tensor)"
)


def _step_fake(q, k, v, g, state, state_indices, scale, normaliser, divide):
    return _outputs_fake(v, normaliser, divide)


def _triton_forward():
    from memattn.kernels import linear_attention

    return linear_attention.forward


def _triton_backward():
    from memattn.kernels import linear_attention

    return linear_attention.backward


define_differentiable(f"{OP}_cpu", FAMILY)
define_differentiable(f"{OP}_triton", FAMILY)
implement(f"{OP}_triton", _triton_forward)
implement(f"{OP}_triton_backward", _triton_backward)
define(f"{STEP}_cpu", STEP_SCHEMA, _step_fake)
define(f"{STEP}_cuda", STEP_SCHEMA, _step_fake)

_TRAINING = frozenset({"backward", "packed"})
_16_32 = (torch.float32, torch.bfloat16, torch.float16)
_ANYWHERE = ("cpu", "cuda", "mps", "xpu")
backends.register(OP, "triton", Limits(("cuda",), _16_32, backends.needs_triton, features=_TRAINING))
backends.register(OP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), features=_TRAINING))
backends.register(OP, "chunked", Limits(_ANYWHERE, check.FLOATS, backends.always, features=_TRAINING))
backends.register(STEP, "cuda", Limits(("cuda",), _16_32, backends.needs_native("_C_cuda")))
backends.register(STEP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C")))
backends.register(STEP, "chunked", Limits(_ANYWHERE, check.FLOATS, backends.always))

_PASSED = check.Passed()
_OPS = {name: resolve(f"{OP}_{name}") for name in ("cpu", "triton")}
_STEPS = {name: resolve(f"{STEP}_{name}") for name in ("cpu", "cuda")}


# --- the public functions --------------------------------------------------------------------------------------------


def _check_inputs(op, q, k, v, g, normalize, return_unnormalized):
    if normalize and return_unnormalized:
        raise ValueError(
            f"{op}: normalize and return_unnormalized are both True; allowed: one of them, "
            "return_unnormalized gives the two parts of the normalised output"
        )
    check.value_heads(op, q, k, v)
    if g is None:
        return
    check.tensor(op, "g", g)
    if g.dim() == 4:
        raise NotImplementedError(
            f"{op}: g has shape {list(g.shape)}; a gate per key channel comes later, allowed: [HV] or [B, T, HV]"
        )
    layout, expected = ("[HV]", v.shape[2:3]) if g.dim() == 1 else ("[B, T, HV]", v.shape[:3])
    check.shape(op, "g", g, layout, expected)
    check.dtype(op, "g", g, (accumulate_dtype(q.dtype),), f" with {check.dtype_name(q.dtype)} q")
    check.device(op, "g", g, q, "q")


def _check_state(op, name, state, n, q, v, normaliser):
    layout = f"[{'N' if op == OP else 'P'}, HV, K, {'V+1' if normaliser else 'V'}]"
    check.shape(op, name, state, layout, (n, v.shape[2], q.shape[3], v.shape[3] + int(normaliser)))
    check.dtype(op, name, state, (accumulate_dtype(q.dtype),), f" with {check.dtype_name(q.dtype)} q")
    check.device(op, name, state, q, "q")


def _plain(rows, dtype, normalize, return_unnormalized):
    """What the op returns, from the reference's rows, which end in the denominator if there is one."""
    if normalize:
        return reference.divide(rows).to(dtype)
    return Unnormalised(rows[..., :-1], rows[..., -1]) if return_unnormalized else rows


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    normalize: bool = False,
    return_unnormalized: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor | Unnormalised, Tensor | None]:
    """Linear attention over whole sequences; the module docstring has the equations and sources.

    ===============  ==================  =====================================================================
    argument         shape               dtype and meaning
    ===============  ==================  =====================================================================
    q, k             [B, T, H, K]        float32, bfloat16, float16 or float64, the same for q, k, v
    v                [B, T, HV, V]       HV a multiple of H: value head h reads key head h // (HV/H)
    g                [HV], [B, T, HV]    natural-log decay ≤ 0 and finite, float32 (float64 with float64 q), constant
                     or None             per head or one per token; None is no decay
    initial_state    [N, HV, K, V or     float32 (float64 with float64 q); None is zero. With normalize or
                     V+1]                return_unnormalized it has V+1 columns, the last is z
    cu_seqlens       [N+1]               int32/int64 bounds of sequences packed along T, then B = 1; else N = B
    ===============  ==================  =====================================================================

    T ≥ 0 and zero-length sequences are legal; K, V in 16..256. `scale` multiplies q, None means K**-0.5; it cancels in
    a normalised output. `chunk_size` is 16, 32, 64 or None, the backend's own. Training keeps the inputs and the state
    of every eighth chunk, and recomputes the rest; normalised it also keeps o and its denominator.

    Returns (o [B, T, HV, V] in q's dtype, final_state like initial_state or None). With return_unnormalized the first
    is `Unnormalised(numerator, denominator)`. Differentiable in q, k, v, g and initial_state, through all results;
    once. NaN and inf in data propagate forward in time from their chunk on.

    Raises ValueError (shapes, values), TypeError (dtypes), NotImplementedError (g per channel), BackendError (a named
    backend that cannot serve).
    """
    normaliser = normalize or return_unnormalized
    signature = _PASSED.signature(q, k, v, g, initial_state, cu_seqlens, normalize, return_unnormalized, chunk_size)
    if signature not in _PASSED:
        _check_inputs(OP, q, k, v, g, normalize, return_unnormalized)
        if chunk_size is not None:
            check.choice(OP, "chunk_size", chunk_size, CHUNK_SIZES)
        if cu_seqlens is not None:
            check.cu_seqlens_layout(OP, cu_seqlens, q)
        if initial_state is not None:
            _check_state(OP, "initial_state", initial_state, sequences(q, cu_seqlens), q, v, normaliser)
        _PASSED.add(signature)
    if g is not None:
        check.log_gate(OP, "g", g)
    if cu_seqlens is not None:
        check.cu_seqlens_values(OP, cu_seqlens, q)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    save = check.needs_grad(q, k, v, g, initial_state)
    features = (("backward",) if save else ()) + (("packed",) if cu_seqlens is not None else ())
    request = Request(q.device.type, q.dtype, (("K", q.shape[3]), ("V", v.shape[3])), frozenset(features))
    name = backends.choose(OP, request, backend, lambda: check.describe(q=q, k=k, v=v, g=g))
    if name == "chunked":
        with torch.autocast(q.device.type, enabled=False):
            rows, final_state = reference.chunked(
                q, k, v, g, normaliser=normaliser, scale=scale, initial_state=initial_state,
                output_final_state=output_final_state, cu_seqlens=cu_seqlens,
                chunk_size=chunk_size or CHUNK_SIZE[name],
            )  # fmt: skip
            return _plain(rows, q.dtype, normalize, return_unnormalized), final_state
    g = None if g is None else g.expand(v.shape[:3])
    tensors = check.contiguous(q, k, v, g, initial_state, cu_seqlens)
    settings = (scale, normaliser, normalize, chunk_size or CHUNK_SIZE[name], CHECKPOINT_EVERY)
    o, denominator, final_state, _ = _OPS[name](*tensors, *settings, output_final_state, save)
    result = Unnormalised(o, denominator) if return_unnormalized else o
    return result, final_state if output_final_state else None


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    state: Tensor,
    *,
    normalize: bool = False,
    return_unnormalized: bool = False,
    state_indices: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor | Unnormalised:
    """One or a few tokens of `linear_attention`, the pool of states updated in place. Inference only.

    q, k [B, t, H, K], t ≥ 1, v [B, t, HV, V], g [HV], [B, t, HV] or None, as in `linear_attention`.
    state [P, HV, K, V], with normalize or return_unnormalized [P, HV, K, V+1], float32 (float64 with float64 q),
    contiguous, is mutated. Batch row b owns state row state_indices[b] (int32/int64 [B], distinct), or row b when None
    (then P = B). Index −1 is padding: its output is 0 (numerator and denominator too) and nothing is written.
    Returns what `linear_attention` returns first. No host synchronisation.

    Raises as `linear_attention`; RuntimeError when an input requires grad.
    """
    normaliser = normalize or return_unnormalized
    signature = _PASSED.signature(q, k, v, g, state, state_indices, normalize, return_unnormalized, STEP)
    if signature not in _PASSED:
        _check_inputs(STEP, q, k, v, g, normalize, return_unnormalized)
        if q.shape[1] < 1:
            raise ValueError(f"{STEP}: q has {q.shape[1]} tokens; expected at least 1")
        check.rank(STEP, "state", state, "[P, HV, K, V]")
        pool = q.shape[0] if state_indices is None else state.shape[0]
        _check_state(STEP, "state", state, pool, q, v, normaliser)
        if state_indices is not None:
            check.state_indices_layout(STEP, state_indices, q.shape[0], q)
        _PASSED.add(signature)
    check.in_place(STEP, state)
    if g is not None:
        check.log_gate(STEP, "g", g)
    if state_indices is not None:
        check.state_indices_values(STEP, state_indices, state.shape[0])
    check.inference_only(STEP, OP, q, k, v, g, state)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    request = Request(q.device.type, q.dtype, (("K", q.shape[3]), ("V", v.shape[3])))
    name = backends.choose(STEP, request, backend, lambda: check.describe(q=q, k=k, v=v, g=g, state=state))
    if name == "chunked":
        with torch.autocast(q.device.type, enabled=False):
            rows = reference.step(q, k, v, g, state, normaliser=normaliser, state_indices=state_indices, scale=scale)
            return _plain(rows, q.dtype, normalize, return_unnormalized)
    g = None if g is None else g.expand(v.shape[:3])
    indices = None if state_indices is None else state_indices.contiguous()
    o, denominator = _STEPS[name](*check.contiguous(q, k, v, g), state, indices, scale, normaliser, normalize)
    return Unnormalised(o, denominator) if return_unnormalized else o
