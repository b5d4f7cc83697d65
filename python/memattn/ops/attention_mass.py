"""How much attention each key received: the column sums of an attention call's probabilities, without its matrix.

    m_j = Σ_{i∈R, j∈M(i)} e^{s_ij − ℓ_i}        s_ij = scale · q_i·k_j + c_i − c_j

with the masks M(i), the decay c and the log-sum-exp ℓ of `memattn.ops.attention` (see there), and R a range of the
queries. ℓ is an argument: it normalises over whatever the caller attended to, so that where several parts of the keys
share one softmax (`merge_states`), their masses by the total ℓ are the parts of one call's mass. A row with ℓ = −inf
saw nothing and gives nothing. Without sinks and other parts, the mass of a head adds up to the number of its rows in R
that saw anything.

Scores that rank keys for a memory: H2O (Zhang et al. 2023, arXiv 2306.14048) keeps running sums over all queries so
far; SnapKV (Li et al. 2024, arXiv 2404.14469) takes the last w queries of a prompt, query_range=(−w, None), and pools
along the keys; InfLLM (Xiao et al. 2024, arXiv 2402.04617) ranks the tokens of a block by what its local window gave
them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import define, implement, resolve
from memattn.ops._masks import check_heads, check_mask, check_packed, check_positions, settings
from memattn.reference import attention_mass as reference
from memattn.reference.attention import accumulate_dtype, cumulative_decay
from memattn.reference.attention_mask import Mask

OP = "attention_mass"
REDUCTIONS = ("none", "group", "sum")
TO_THE_END = 2**31 - 1  # the number of a range's end None


# --- the op -----------------------------------------------------------------------------------------------------------

# The settings of `attention`, then rows start..stop of every sequence and whether the heads of a group are summed.
SCHEMA = (
    "(Tensor q, Tensor k, Tensor lse, Tensor? decay, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int causal, "
    "int window, int prefix_len, int block_size, int summary, int dilation, int dilated_window, int dilated_prefix, "
    "int q_offset, bool tile_heads, float scale, int start, int stop, bool grouped) -> Tensor"
)


def _fake(q, k, lse, *rest):
    heads = k.shape[2] if rest[-1] else q.shape[2]
    return q.new_empty((*k.shape[:2], heads), dtype=accumulate_dtype(q.dtype))


def _triton():
    from memattn.kernels import attention_mass

    return attention_mass.forward


for _name in ("cpu", "triton"):
    define(f"{OP}_{_name}", SCHEMA, _fake)
implement(f"{OP}_triton", _triton)

_FEATURES = frozenset({"packed"})
_16_32 = (torch.float32, torch.bfloat16, torch.float16)
backends.register(OP, "triton", Limits(("cuda",), _16_32, backends.needs_triton, features=_FEATURES))
backends.register(OP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), features=_FEATURES))
_ANYWHERE = Limits(("cpu", "cuda", "xpu"), check.FLOATS, backends.always, features=_FEATURES)
backends.register(OP, "chunked", _ANYWHERE)

_PASSED = check.Passed()
_OPS = {name: resolve(f"{OP}_{name}") for name in ("cpu", "triton")}


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_range(query_range):
    if query_range is None:
        return
    given = query_range if isinstance(query_range, tuple) else ()
    if len(given) != 2 or any(isinstance(x, bool) or not isinstance(x, (int, type(None))) for x in given):
        raise ValueError(
            f"{OP}: query_range is {query_range!r}; expected None or (start, stop), rows of each sequence as in a "
            "Python slice: integers, negative from the end, or None"
        )


def _check_lse(q, lse):
    check.rank(OP, "lse", lse, "[B, Tq, HQ]")
    check.shape(OP, "lse", lse, "[B, Tq, HQ]", q.shape[:3])
    check.dtype(OP, "lse", lse, (accumulate_dtype(q.dtype),), f" with {check.dtype_name(q.dtype)} q")
    check.device(OP, "lse", lse, q, "q")


def _bounds(query_range) -> tuple[int, int]:
    start, stop = query_range or (None, None)
    limit = TO_THE_END
    return max(-limit, min(start or 0, limit)), limit if stop is None else max(-limit, min(stop, limit))


# --- the public function ----------------------------------------------------------------------------------------------


def attention_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    causal: bool | str = True,
    window: int | None = None,
    prefix_len: int = 0,
    block_size: int | None = None,
    chunk_rule: tuple[Any, ...] | None = None,
    log_decay: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    q_offset: int | str = 0,
    head_map: str = "gqa",
    query_range: tuple[int | None, int | None] | None = None,
    reduce_heads: str = "none",
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The attention each key received from a range of queries; the module docstring has the equation and sources.

    ============  ==================  ========================================================================
    argument      shape               dtype and meaning
    ============  ==================  ========================================================================
    q             [B, Tq, HQ, K]      float32, bfloat16, float16 or float64, the same for q and k
    k             [B, Tk, HKV, K]     HQ a multiple of HKV; K in 16..256
    lse           [B, Tq, HQ]         float32 (float64 with float64 q), natural log: what `attention` returned, or the
                                      total of several parts
    query_range   (start, stop)       rows of each sequence that count, as a Python slice; None: all
    reduce_heads  "none"              one mass per query head;
                  "group"             summed over the query heads that read a key head;
                  "sum"               summed over all heads
    ============  ==================  ========================================================================

    causal, window, prefix_len, block_size, chunk_rule, log_decay, alibi_slopes, cu_seqlens_q, cu_seqlens_k, q_offset,
    head_map and scale as in the call that gave lse. A sink is part of lse already.

    Returns the mass [B, Tk, HQ], [B, Tk, HKV] or [B, Tk, 1], float32 (float64 with float64 q), without gradient. A key
    that nobody sees has 0. NaN in k reaches the keys that hold it, in q and lse no further than the keys of its
    sequence and head.

    Raises ValueError (shapes, values, combinations without meaning), TypeError (dtypes), BackendError; RuntimeError
    when an input requires grad.
    """
    if not (isinstance(causal, bool) or causal == "block"):  # before the signature, where 1 and True are the same
        raise ValueError(f"{OP}: causal is {causal!r}; allowed: True, False, 'block'")
    mask = Mask(causal, window, prefix_len, block_size, chunk_rule, q_offset)
    _check_range(query_range)
    signature = _PASSED.signature(
        q, k, lse, log_decay, alibi_slopes, causal, window, prefix_len, block_size, *(chunk_rule or (None,)), q_offset,
        head_map, reduce_heads, scale, cu_seqlens_q is None,
    )  # fmt: skip
    biased = "log_decay" if log_decay is not None else "alibi_slopes" if alibi_slopes is not None else None
    if signature not in _PASSED:
        check_mask(OP, mask, biased, head_map, scale)
        check.choice(OP, "reduce_heads", reduce_heads, REDUCTIONS)
        check_heads(OP, q, k)
        _check_lse(q, lse)
        check_positions(OP, q, k, log_decay, alibi_slopes, q_offset, cu_seqlens_q is not None)
        _PASSED.add(signature)
    check_packed(OP, q, k, cu_seqlens_q, cu_seqlens_k, q_offset, biased is not None)
    if log_decay is not None:
        check.log_gate(OP, "log_decay", log_decay)
    if check.needs_grad(q, k, lse, log_decay, alibi_slopes):
        raise RuntimeError(
            f"{OP}: an input requires grad; the mass is for inference only, detach the inputs or call it under "
            "torch.no_grad()"
        )
    features = _FEATURES if cu_seqlens_q is not None else frozenset()
    request = Request(q.device.type, q.dtype, (("K", q.shape[3]),), features)
    name = backends.choose(OP, request, backend, lambda: check.describe(q=q, k=k, lse=lse, log_decay=log_decay))
    if name == "chunked":
        with torch.autocast(q.device.type, enabled=False):
            return reference.chunked(
                q, k, lse, causal=causal, window=window, prefix_len=prefix_len, block_size=block_size,
                chunk_rule=chunk_rule, log_decay=log_decay, alibi_slopes=alibi_slopes, cu_seqlens_q=cu_seqlens_q,
                cu_seqlens_k=cu_seqlens_k, q_offset=q_offset, head_map=head_map, query_range=query_range,
                reduce_heads=reduce_heads, scale=scale,
            )  # fmt: skip
    tensors = check.contiguous(
        q, k, lse, cumulative_decay(log_decay, alibi_slopes, k), cu_seqlens_q,
        cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
    )  # fmt: skip
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    mass = _OPS[name](
        *tensors, *settings(mask), head_map == "tile", scale, *_bounds(query_range), reduce_heads != "none"
    )
    return mass.sum(-1, keepdim=True) if reduce_heads == "sum" else mass
