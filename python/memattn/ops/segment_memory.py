"""Segment memory: an associative memory that is read as the segments before left it, and written once per segment.

With M_s and z_s the memory and its normaliser before segment s, q, k already behind their feature map φ ≥ 0:

    o_t = q_t M_s / (q_t·z_s + ε)                                  every token t of segment s; without z: o_t = q_t M_s
    M_{s+1} = M_s + Σ_{t in s} β_t k_tᵀ e_t                        e_t = v_t, or with delta e_t = v_t − v̂_t,
    z_{s+1} = z_s + Σ_{t in s} γ_t k_t                             v̂_t = k_t M_s / (k_t·z_s + ε)

All writes of a segment see the same frozen M_s: this is no token-wise delta rule. γ_t = 1, or with `correction`
γ_t = clip(1 − k_t·z_s / (|k_t|² + ε), 0, 1), not differentiated: a key already stored counts no second time. Where
|q_t·z_s + ε| is below the smallest normal number, o_t is 0 and so is its gradient; an empty memory reads 0.

Infini-attention (Munkhdalai et al. 2024, arXiv 2404.07143) is φ = ELU + 1 and delta; ARMT (Rodkin et al. 2024, arXiv
2407.04841, repository RodkinIvan/associative-recurrent-memory-transformer) is φ = DPFP, delta, β and correction, with
fewer writes than reads per segment (`key_segment_size`). With causal=False every query reads the memory after all
writes: compressive memory over a set, such as the variates of a time series (MICA, arXiv 2604.06473), where the
segments are the series and each reads all of them, its own too. Additive, that does not depend on their order.

The frozen delta rule is affine in M once z is known: M_{s+1} = (I − Kᵀ D K) M_s + Kᵀ β V, D = diag(β / (K z + ε)). So
segments could be folded in parallel. That costs 2CK(K + V) + 2K²V multiplications a segment against 4CKV for reading
and writing its rows: never less for K ≥ V. The kernels walk the segments in order, in parallel over heads and columns
of V, and then read all segments at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import Differentiable, define_differentiable, implement, resolve
from memattn.ops._sequences import sequences, slots
from memattn.reference import segment_memory as reference
from memattn.reference.segment_memory import Rule
from memattn.reference.sequences import accumulate_dtype

OP, STEP = "segment_memory", "segment_memory_step"
KEY_DIMS, VALUE_DIMS = (16, 1024), (16, 8192)


# --- the op: schema, shapes, gradients -------------------------------------------------------------------------------


def _fake(q, k, v, beta, initial_state, cu_seqlens, cu_seqlens_k, size, key_size, delta, normalize, *rest):
    wide = q.new_empty(0, dtype=accumulate_dtype(q.dtype))
    memory = (k.shape[2], q.shape[3], v.shape[3] + int(normalize))
    n = sequences(q, cu_seqlens)
    o = q.new_empty(*q.shape[:3], v.shape[3])
    return o, wide.new_empty(n, *memory), wide.new_empty(slots(k, cu_seqlens_k, key_size) + n, *memory)


def _backward_fake(do, dfinal_state, q, k, v, beta, initial_state, *rest):
    optional = (q.new_empty(0) if x is None else torch.empty_like(x) for x in (beta, initial_state))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *optional


def _save(args, outputs):
    o, _, states = outputs
    return *args[:7], o, states


def _backward(op, saved, args, grads):
    (*inputs, o, states), (do, dfinal, _) = saved, grads
    do = torch.zeros_like(o) if do is None else do.contiguous()
    dfinal = None if dfinal is None else dfinal.contiguous()
    results = op(do, dfinal, *inputs, o, states, *args[7:])
    optional = (None if x is None else dx for x, dx in zip(inputs[3:5], results[3:], strict=True))
    return *results[:3], *optional, *(None,) * 9


_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? beta, Tensor? initial_state, Tensor? cu_seqlens, Tensor? cu_seqlens_k"
)
_SETTINGS = (
    "int segment_size, int key_segment_size, bool delta, bool normalize, bool correction, bool causal, float eps"
)
FAMILY = Differentiable(
    schema=f"({_ARGUMENTS}, {_SETTINGS}) -> (Tensor, Tensor, Tensor)",
    backward_schema=f"(Tensor do, Tensor? dfinal_state, {_ARGUMENTS}, Tensor o, Tensor states, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    outputs=2,
    save=_save,
    backward=_backward,
)


def _triton_forward():
    from memattn.kernels import segment_memory

    return segment_memory.forward


def _triton_backward():
    from memattn.kernels import segment_memory_backward

    return segment_memory_backward.backward


define_differentiable(f"{OP}_cpu", FAMILY)
define_differentiable(f"{OP}_triton", FAMILY)
implement(f"{OP}_triton", _triton_forward)
implement(f"{OP}_triton_backward", _triton_backward)

_FEATURES = frozenset({"backward", "packed"})
_16_32 = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda", "mps", "xpu")
_DIMS = (KEY_DIMS[0], VALUE_DIMS[1])
backends.register(OP, "triton", Limits(("cuda",), _16_32, backends.needs_triton, dims=_DIMS, features=_FEATURES))
backends.register(
    OP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), dims=_DIMS, features=_FEATURES)
)
backends.register(OP, "chunked", Limits(_DEVICES, check.FLOATS, backends.always, dims=_DIMS, features=_FEATURES))

_PASSED = check.Passed()
_OPS = {name: resolve(f"{OP}_{name}") for name in ("cpu", "triton")}


# --- the public functions --------------------------------------------------------------------------------------------


def _check_size(op, name, value):
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < 1:
        raise ValueError(f"{op}: {name} is {value!r}; expected an integer ≥ 1")


def _check_tensors(op, q, k, v, beta):
    check.rank(op, "q", q, "[B, T, HQ, K]")
    check.dtype(op, "q", q, check.FLOATS)
    check.rank(op, "k", k, "[B, S, H, K]")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        check.shape(op, "k", k, "[B, S, H, K]", (q.shape[0], *k.shape[1:3], q.shape[3]))
    check.rank(op, "v", v, "[B, S, H, V]")
    check.shape(op, "v", v, "[B, S, H, V]", (*k.shape[:3], v.shape[3]))
    if k.shape[2] == 0 or q.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{op}: q has {q.shape[2]} heads; expected a positive multiple of k's {k.shape[2]} heads")
    for name, size, (low, high) in (("K", q.shape[3], KEY_DIMS), ("V", v.shape[3], VALUE_DIMS)):
        if not low <= size <= high:
            raise ValueError(f"{op}: head dimension {name} is {size}; allowed: {low}..{high}")
    for name, x in (("k", k), ("v", v)):
        check.dtype(op, name, x, (q.dtype,), " like q")
        check.device(op, name, x, q, "q")
    if beta is not None:
        check.shape(op, "beta", beta, "[B, S, H]", k.shape[:3])
        check.dtype(op, "beta", beta, (q.dtype, accumulate_dtype(q.dtype)), f" with {check.dtype_name(q.dtype)} q")
        check.device(op, "beta", beta, q, "q")


def _check_rule(op, rule):
    _check_size(op, "segment_size", rule.segment_size)
    _check_size(op, "key_segment_size", rule.key_segment_size)
    if rule.correction and not rule.normalize:
        raise ValueError(f"{op}: correction is True with normalize False; it says what the normaliser z gains")
    if not (isinstance(rule.eps, (int, float)) and 0 <= rule.eps < float("inf")):
        raise ValueError(f"{op}: eps is {rule.eps!r}; expected a finite number ≥ 0")


def _check_state(op, name, state, n, q, k, v, normalize):
    layout = f"[{'N' if op == OP else 'B'}, H, K, {'V+1' if normalize else 'V'}]"
    check.shape(op, name, state, layout, (n, k.shape[2], q.shape[3], v.shape[3] + int(normalize)))
    check.dtype(op, name, state, (accumulate_dtype(q.dtype),), f" with {check.dtype_name(q.dtype)} q")
    check.device(op, name, state, q, "q")


def _check_packed(q, k, cu_seqlens, cu_seqlens_k):
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise ValueError(f"{OP}: cu_seqlens_k is given without cu_seqlens; packed keys need packed queries")
        return
    check.cu_seqlens(OP, cu_seqlens, q)
    if cu_seqlens_k is None and k.shape[1] != q.shape[1]:
        raise ValueError(f"{OP}: q has {q.shape[1]} packed tokens and k has {k.shape[1]}; expected cu_seqlens_k then")
    if cu_seqlens_k is not None:
        check.cu_seqlens(OP, cu_seqlens_k, k, "cu_seqlens_k")
        check.shape(OP, "cu_seqlens_k", cu_seqlens_k, "[N+1] like cu_seqlens", cu_seqlens.shape)


def segment_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    *,
    segment_size: int,
    key_segment_size: int | None = None,
    delta: bool = False,
    normalize: bool = True,
    correction: bool = False,
    causal: bool = True,
    eps: float = 1e-5,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Segment memory over whole sequences; the module docstring has the equations and sources.

    ===============  ==================  =====================================================================
    argument         shape               dtype and meaning
    ===============  ==================  =====================================================================
    q                [B, T, HQ, K]       float32, bfloat16, float16 or float64, the same for q, k, v; features φ(q)
    k, v             [B, S, H, K | V]    HQ a multiple of H: query head h reads memory h // (HQ/H)
    beta             [B, S, H] or None   q's dtype or float32: write strength of a token; None is 1
    initial_state    [N, H, K, V+1]      float32 (float64 with float64 q); the last column is z, as in
                                         `linear_attention`. [N, H, K, V] without normalize. None is empty
    cu_seqlens       [N+1]               int32/int64 bounds of sequences packed along T, then B = 1; else N = B
    cu_seqlens_k     [N+1]               the same along S; None: as cu_seqlens
    ===============  ==================  =====================================================================

    Query t reads what key segments before number t // segment_size wrote (all of them if there are fewer); key j
    belongs to segment j // key_segment_size, None meaning segment_size. T, S ≥ 0: a call may only read or only write.
    With causal=False all queries read the final memory. normalize=False has no z: reads and v̂ are not divided.
    A zero key writes nothing. The end of a sequence closes its last segment: the final state holds every write, so
    chained calls equal one call when the cuts lie at segment ends. To stop inside a segment, keep its rows and pass
    them again, as `nn.InfiniAttention` does, or go on token by token with `segment_memory_step`.

    K in 16..1024, V in 16..8192. Besides o the call makes a table of ⌈S / key_segment_size⌉ + 1 memories per sequence
    and head, which training keeps.

    Returns (o [B, T, HQ, V] in q's dtype, final_state like initial_state or None). Differentiable in q, k, v, beta and
    initial_state, through both results; once.

    Raises ValueError (shapes, values), TypeError (dtypes), BackendError (a named backend that cannot serve).
    """
    rule = Rule(
        segment_size, segment_size if key_segment_size is None else key_segment_size, delta, normalize, correction,
        causal, eps,
    )  # fmt: skip
    signature = _PASSED.signature(
        q, k, v, beta, initial_state, segment_size, key_segment_size, normalize, correction, eps, cu_seqlens
    )
    if signature not in _PASSED:
        _check_rule(OP, rule)
        _check_tensors(OP, q, k, v, beta)
        if initial_state is not None:
            _check_state(OP, "initial_state", initial_state, sequences(q, cu_seqlens), q, k, v, normalize)
        _PASSED.add(signature)
    _check_packed(q, k, cu_seqlens, cu_seqlens_k)
    train = check.needs_grad(q, k, v, beta, initial_state)
    features = (("backward",) if train else ()) + (("packed",) if cu_seqlens is not None else ())
    request = Request(q.device.type, q.dtype, (("K", q.shape[3]), ("V", v.shape[3])), frozenset(features))
    name = backends.choose(OP, request, backend, lambda: check.describe(q=q, k=k, v=v, beta=beta))
    if name == "chunked":
        with torch.autocast(q.device.type, enabled=False):
            o, final_state = reference.chunked(
                q, k, v, beta, rule=rule, initial_state=initial_state, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k
            )
            return o, final_state if output_final_state else None
    bounds = cu_seqlens, cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    o, final_state, _ = _OPS[name](
        *check.contiguous(q, k, v, beta, initial_state, *bounds),
        rule.segment_size, rule.key_segment_size, delta, normalize, correction, causal, float(eps),
    )  # fmt: skip
    return o, final_state if output_final_state else None


def segment_memory_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    state: Tensor,
    open_state: Tensor,
    count: Tensor,
    *,
    segment_size: int,
    delta: bool = False,
    normalize: bool = True,
    correction: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """One token of `segment_memory` per sequence inside an open segment. Plain torch, inference only, no
    host synchronisation.

    q [B, 1, HQ, K], k [B, 1, H, K], v [B, 1, H, V], beta [B, 1, H] or None, as in `segment_memory`. In place:
    state [B, H, K, V+1 or V], the memory before the open segment, which is read; open_state, the same with the
    open segment's writes so far; count [B] int64, how many tokens those are. The token that completes a segment
    makes open_state the state and count 0. Returns o [B, 1, HQ, V] in q's dtype.

    Raises as `segment_memory`; RuntimeError when an input requires grad.
    """
    rule = Rule(segment_size, segment_size, delta, normalize, correction, True, eps)
    signature = _PASSED.signature(
        q, k, v, beta, state, open_state, count, segment_size, normalize, correction, eps, STEP
    )
    if signature not in _PASSED:
        _check_rule(STEP, rule)
        _check_tensors(STEP, q, k, v, beta)
        if q.shape[1] != 1 or k.shape[1] != 1:
            raise ValueError(f"{STEP}: q has {q.shape[1]} tokens and k has {k.shape[1]}; expected 1")
        for name, x in (("state", state), ("open_state", open_state)):
            _check_state(STEP, name, x, q.shape[0], q, k, v, normalize)
        check.shape(STEP, "count", count, "[B]", q.shape[:1])
        check.dtype(STEP, "count", count, (torch.int64,))
        check.device(STEP, "count", count, q, "q")
        _PASSED.add(signature)
    check.inference_only(STEP, OP, q, k, v, beta, state, open_state)
    with torch.autocast(q.device.type, enabled=False):
        return reference.step(q, k, v, beta, state, open_state, count, rule=rule).to(q.dtype)
