"""Softmax attention with the masks of memory layers and a differentiable log-sum-exp.

    s_ij = scale · q_i·k_j + c_i − c_j        ℓ_i = log(Σ_{j∈M(i)} e^{s_ij} + Σ_r e^{sink_r})
    o_i = Σ_{j∈M(i)} e^{s_ij − ℓ_i} v_j       c = cumulative sum of log_decay and of −alibi_slopes

A row whose M(i) is empty (and that has no sink) gives o = 0, ℓ = −inf and no gradient. M(i) is described by arithmetic
on positions, so that tiles nobody sees are skipped and nothing T×T is stored:

    M(i) = {j < prefix_len} ∪ (causal ∩ window ∩ block ∩ chunk_rule)

Because ℓ is differentiable, calls over disjoint sets of keys join exactly: see `merge_states`. A call can also take up
another's (o', ℓ') itself, as one more key of every row and head with score ℓ'_i and value o'_i: its online softmax
begins there, and no second result or pass over the rows is needed. Backward (P recomputed from ℓ, FlashAttention-2,
Dao 2023, arXiv 2307.08691; the ℓ term as in flash-attention's backward preprocessing):

    dS_ij = P_ij (dO_i·v_j − Δ_i + dℓ_i)    Δ_i = dO_i·O_i    dsink = Σ_i e^{sink − ℓ_i} (dℓ_i − Δ_i)
    dc_i = Σ_j dS_ij − Σ_{i'} dS_{i'i}
    do'_i = e^{ℓ'_i − ℓ_i} dO_i             dℓ'_i = e^{ℓ'_i − ℓ_i} (dO_i·o'_i − Δ_i + dℓ_i)

Sources of the terms: sinks as logits without value, GPT-OSS and Lizard (arXiv 2507.09025); log_decay, Forgetting
Transformer (Lin et al. 2025, arXiv 2503.02130); ALiBi (Press et al. 2021, arXiv 2108.12409); summary keys and tiled
heads, RAT (Wei et al. 2025); dilated keys, RAT+ (arXiv 2602.18196); prefix and window, Titans (arXiv 2501.00663).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import Differentiable, define_differentiable, implement, resolve
from memattn.ops._masks import check_mask, settings
from memattn.reference import attention as reference
from memattn.reference.attention import AttentionOutput
from memattn.reference.attention_mask import Mask

OP = "attention"


# --- the op: schema, shapes, gradients --------------------------------------------------------------------------------

_ARGUMENTS = "Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor? decay, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k"
_MERGED = f"{_ARGUMENTS}, Tensor? first_scores, Tensor? first_values"  # of another call: ℓ' and o'
# A size of 0 stands for "no such term"; causal is 0 (no), 1 (per token) or 2 (per block).
_SETTINGS = (
    "int causal, int window, int prefix_len, int block_size, int summary, int dilation, int dilated_window, "
    "int dilated_prefix, int q_offset, bool tile_heads, float scale"
)
_NUMBERS = _SETTINGS.count(",") + 1


def _fake(q, k, v, *rest):
    o = q.new_empty(*q.shape[:3], v.shape[3])
    return o, q.new_empty(q.shape[:3], dtype=reference.accumulate_dtype(q.dtype))


def _backward_fake(do, dlse, o, lse, q, k, v, sink, decay, cu_seqlens_q, cu_seqlens_k, *rest):
    optional = (lse.new_empty(0) if x is None else torch.empty_like(x) for x in (sink, decay, *rest[:-_NUMBERS]))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), *optional


def _save(args, outputs):
    return (*args[:-_NUMBERS], *outputs)


def _backward(op, saved, args, grads):
    *tensors, o, lse = saved
    do, dlse = grads
    do = torch.zeros_like(o) if do is None else do.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    dq, dk, dv, *optional = op(do, dlse, o, lse, *tensors, *args[len(tensors) :])
    given = zip((*tensors[3:5], *tensors[7:]), optional, strict=True)
    dsink, ddecay, *dfirst = (None if x is None else dx for x, dx in given)
    return dq, dk, dv, dsink, ddecay, None, None, *dfirst, *(None,) * _NUMBERS


def _family(arguments: str) -> Differentiable:
    gradients = ", ".join(["Tensor"] * (arguments.count(",") - 1))  # of all but the cu_seqlens
    return Differentiable(
        schema=f"({arguments}, {_SETTINGS}) -> (Tensor, Tensor)",
        backward_schema=f"(Tensor do, Tensor? dlse, Tensor o, Tensor lse, {arguments}, {_SETTINGS}) -> ({gradients})",
        fake=_fake,
        backward_fake=_backward_fake,
        outputs=2,
        save=_save,
        backward=_backward,
    )


def _triton_forward():
    from memattn.kernels import attention

    return attention.forward


def _triton_backward():
    from memattn.kernels import attention_backward

    return attention_backward.backward


define_differentiable(f"{OP}_cpu", _family(_MERGED))
define_differentiable(f"{OP}_triton", _family(_ARGUMENTS))
implement(f"{OP}_triton", _triton_forward)
implement(f"{OP}_triton_backward", _triton_backward)

_FEATURES = frozenset({"backward", "packed", "q_offset='end'"})
_MERGING = _FEATURES | {"merge"}
_16_32 = (torch.float32, torch.bfloat16, torch.float16)
backends.register(OP, "triton", Limits(("cuda",), _16_32, backends.needs_triton, features=_FEATURES))
backends.register(OP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), features=_MERGING))
_ANYWHERE = Limits(("cpu", "cuda", "xpu"), check.FLOATS, backends.always, features=_MERGING)
backends.register(OP, "chunked", _ANYWHERE)

_PASSED = check.Passed()
_OPS = {name: resolve(f"{OP}_{name}") for name in ("cpu", "triton")}


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_tensors(q, k, v, sink, log_decay, alibi_slopes, q_offset, packed):
    check.rank(OP, "q", q, "[B, Tq, HQ, K]")
    check.dtype(OP, "q", q, check.FLOATS)
    check.rank(OP, "k", k, "[B, Tk, HKV, K]")
    batch, length, heads, key_dim = q.shape
    if k.shape[0] != batch or k.shape[3] != key_dim:
        check.shape(OP, "k", k, "[B, Tk, HKV, K]", (batch, *k.shape[1:3], key_dim))
    check.rank(OP, "v", v, "[B, Tk, HKV, V]")
    check.shape(OP, "v", v, "[B, Tk, HKV, V]", (*k.shape[:3], v.shape[3]))
    if k.shape[2] == 0 or heads == 0 or heads % k.shape[2]:
        raise ValueError(f"{OP}: q has {heads} heads; expected a positive multiple of k's {k.shape[2]} heads")
    check.head_dim(OP, "K", key_dim)
    check.head_dim(OP, "V", v.shape[3])
    sums = reference.accumulate_dtype(q.dtype)
    for name, x, allowed, why in (
        ("k", k, (q.dtype,), " like q"),
        ("v", v, (q.dtype,), " like q"),
        ("sink", sink, (q.dtype, sums), f" with {check.dtype_name(q.dtype)} q"),
        ("log_decay", log_decay, (sums,), f" with {check.dtype_name(q.dtype)} q"),
        ("alibi_slopes", alibi_slopes, (sums,), f" with {check.dtype_name(q.dtype)} q"),
    ):
        if x is not None:
            check.tensor(OP, name, x)
            check.dtype(OP, name, x, allowed, why)
            check.device(OP, name, x, q, "q")
    if sink is not None:
        check.shape(OP, "sink", sink, "[HQ] or [HQ, r]", (heads, *sink.shape[1:2]))
    if log_decay is not None:
        check.shape(OP, "log_decay", log_decay, "[B, Tk, HQ]", (batch, k.shape[1], heads))
    if alibi_slopes is not None:
        check.shape(OP, "alibi_slopes", alibi_slopes, "[HQ]", (heads,))
    if q_offset == "end":
        if not packed and length > k.shape[1]:
            raise ValueError(
                f"{OP}: q has {length} tokens and k has {k.shape[1]}; with q_offset='end' every query needs a key at "
                "its own position (Tq ≤ Tk)"
            )
        return
    if (log_decay is not None or alibi_slopes is not None) and not packed and length + q_offset > k.shape[1]:
        name = "alibi_slopes" if log_decay is None else "log_decay"
        raise ValueError(
            f"{OP}: the last query has position {length + q_offset - 1} and there are {k.shape[1]} keys; with {name} "
            "every query needs a key at its own position (Tq + q_offset ≤ Tk)"
        )


def _check_merge(q, v, merge):
    o, lse = merge
    check.shape(OP, "merge.o", o, "[B, Tq, HQ, V]", (*q.shape[:3], v.shape[3]))
    check.dtype(OP, "merge.o", o, (q.dtype,), " like q")
    check.shape(OP, "merge.lse", lse, "[B, Tq, HQ]", q.shape[:3])
    check.dtype(OP, "merge.lse", lse, (reference.accumulate_dtype(q.dtype),), f" with {check.dtype_name(q.dtype)} q")
    for name, x in (("merge.o", o), ("merge.lse", lse)):
        check.device(OP, name, x, q, "q")


def _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, q_offset, biased):
    """cu_seqlens_k None means cu_seqlens_q: queries and keys of the same sequences."""
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError(f"{OP}: cu_seqlens_k is given without cu_seqlens_q; packed keys need packed queries")
        return
    check.cu_seqlens(OP, cu_seqlens_q, q, "cu_seqlens_q")
    if cu_seqlens_k is None and k.shape[1] != q.shape[1]:
        raise ValueError(f"{OP}: q has {q.shape[1]} packed tokens and k has {k.shape[1]}; expected cu_seqlens_k then")
    if cu_seqlens_k is not None:
        check.cu_seqlens(OP, cu_seqlens_k, k, "cu_seqlens_k")
        check.shape(OP, "cu_seqlens_k", cu_seqlens_k, "[N+1] like cu_seqlens_q", cu_seqlens_q.shape)
    if (biased or q_offset == "end") and check.values_checked(cu_seqlens_q):
        keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        last = cu_seqlens_q.diff() + (0 if q_offset == "end" else q_offset)
        short = (last > keys.diff()) & (cu_seqlens_q.diff() > 0)
        if bool(short.any()):
            raise ValueError(
                f"{OP}: packed sequence {int(short.nonzero()[0])} has queries beyond its keys; with log_decay, "
                "alibi_slopes or q_offset='end' every query needs a key at its own position"
            )


# --- the public function ----------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool | str = True,
    window: int | None = None,
    prefix_len: int = 0,
    block_size: int | None = None,
    chunk_rule: tuple[Any, ...] | None = None,
    sink: Tensor | None = None,
    log_decay: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    merge: AttentionOutput | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: int | str = 0,
    head_map: str = "gqa",
    scale: float | None = None,
    backend: str | None = None,
) -> AttentionOutput:
    """Attention over whole sequences with its log-sum-exp; the module docstring has the equations and sources.

    ==============  ==================  ======================================================================
    argument        shape               dtype and meaning
    ==============  ==================  ======================================================================
    q               [B, Tq, HQ, K]      float32, bfloat16, float16 or float64, the same for q, k, v
    k, v            [B, Tk, HKV, K|V]   HQ a multiple of HKV
    sink            [HQ] or [HQ, r]     q's dtype or float32: logits in the denominator that have no value
    log_decay       [B, Tk, HQ]         float32, natural log ≤ 0 and finite: s_ij gains Σ_{j<t≤i} log_decay_t
    alibi_slopes    [HQ]                float32: s_ij loses slope · (i − j)
    merge           o, lse              result of attention of the same q over other keys, o in q's dtype (see below)
    cu_seqlens_q/k  [N+1]               int32/int64 bounds of sequences packed along Tq and Tk, then B = 1; k None: as q
    ==============  ==================  ======================================================================

    Positions: query row t of a sequence is at i = t + q_offset, key row j at j; with q_offset="end" the last query of
    each sequence is at its last key (Tq ≤ Tk). Which keys a query sees:

    ==========================  ==============================================================================
    causal=True                 j ≤ i; False: all; "block": all of the blocks up to its own (bidirectional inside a
                                block, causal across), which needs block_size
    block_size=C                own block only: i // C = j // C (with causal="block" as above)
    window=W                    i − j < W: W keys including its own
    prefix_len=P                j < P, whatever the rest says
    chunk_rule=("summary", L)   key j stands for tokens jL..jL+L−1 and is seen from the next chunk on: j < i // L
    chunk_rule=("dilated", D, W, P)   of the causal keys those with (j + 1) mod D = 0, i − j < W or j < P
    ==========================  ==============================================================================

    `head_map`: query head h reads key head h // (HQ/HKV) ("gqa") or h mod HKV ("tile"). `scale` None means K**-0.5.
    Tq, Tk ≥ 0 and empty sequences are legal; K, V in 16..256.

    `merge`: the result is that over its keys and these, `merge_states([merge.o, o], [merge.lse, lse])` without the pass
    that this would take. Sinks of both calls count; each has its own mask. Rows with merge.lse = −inf gain nothing.
    The Triton backend joins the two results afterwards.

    Returns AttentionOutput(o, lse). Differentiable once, through o and lse, in q, k, v, sink, log_decay, alibi_slopes
    and merge. NaN and inf in q and k reach the rows that see them; in v also rows of the same tile of queries that do
    not. They stay in their packed sequence, but for the gradient of log_decay and for backend "chunked", which masks
    the others.

    Raises ValueError (shapes, values, combinations without meaning), TypeError (dtypes), BackendError.
    """
    if not (isinstance(causal, bool) or causal == "block"):  # before the signature, where 1 and True are the same
        raise ValueError(f"{OP}: causal is {causal!r}; allowed: True, False, 'block'")
    if not (merge is None or (isinstance(merge, tuple) and len(merge) == 2)):
        raise TypeError(f"{OP}: merge is {type(merge).__name__}; expected the AttentionOutput (o, lse) of another call")
    mask = Mask(causal, window, prefix_len, block_size, chunk_rule, q_offset)
    biased = log_decay is not None or alibi_slopes is not None
    signature = _PASSED.signature(
        q, k, v, sink, log_decay, alibi_slopes, causal, window, prefix_len, block_size, *(chunk_rule or (None,)),
        q_offset, head_map, scale, cu_seqlens_q is None, *((None,) if merge is None else merge),
    )  # fmt: skip
    if signature not in _PASSED:
        name = "log_decay" if log_decay is not None else "alibi_slopes" if alibi_slopes is not None else None
        check_mask(OP, mask, name, head_map, scale)
        _check_tensors(q, k, v, sink, log_decay, alibi_slopes, q_offset, cu_seqlens_q is not None)
        if merge is not None:
            _check_merge(q, v, merge)
        _PASSED.add(signature)
    _check_packed(q, k, cu_seqlens_q, cu_seqlens_k, q_offset, biased)
    if log_decay is not None:
        check.log_gate(OP, "log_decay", log_decay)
    first_values, first_scores = (None, None) if merge is None else merge
    train = check.needs_grad(q, k, v, sink, log_decay, alibi_slopes, first_values, first_scores)
    features = (("backward",) if train else ()) + (("packed",) if cu_seqlens_q is not None else ())
    features += ("q_offset='end'",) if q_offset == "end" else ()
    request = Request(q.device.type, q.dtype, (("K", q.shape[3]), ("V", v.shape[3])), frozenset(features))
    name = backends.choose(OP, request, backend, lambda: check.describe(q=q, k=k, v=v, sink=sink, log_decay=log_decay))
    if name == "chunked":
        with torch.autocast(q.device.type, enabled=False):
            results = reference.chunked(
                q, k, v, causal=causal, window=window, prefix_len=prefix_len, block_size=block_size,
                chunk_rule=chunk_rule, sink=sink, log_decay=log_decay, alibi_slopes=alibi_slopes, merge=merge,
                cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, q_offset=q_offset, head_map=head_map, scale=scale,
            )  # fmt: skip
        return results
    tensors = check.contiguous(
        q, k, v, None if sink is None else reference.one_sink(sink, reference.accumulate_dtype(q.dtype)),
        reference.cumulative_decay(log_decay, alibi_slopes, k), cu_seqlens_q,
        cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
    )  # fmt: skip
    numbers = *settings(mask), head_map == "tile", q.shape[3] ** -0.5 if scale is None else float(scale)
    if "merge" in backends.registry()[OP][name].features:
        tensors += check.contiguous(first_scores, first_values)
        return AttentionOutput(*_OPS[name](*tensors, *numbers))
    o, lse = _OPS[name](*tensors, *numbers)
    if merge is None:
        return AttentionOutput(o, lse)
    o, lse = reference.joined([x.to(lse.dtype) for x in (merge[0], o)], [merge[1], lse])
    return AttentionOutput(o.to(q.dtype), lse)
