"""Nearest keys of a memory, and attention over them: the scores of all keys are never stored.

    I(i) = the k largest of {m_ij : j < length, m_ij ≥ threshold},    m_ij = q_i·k_j, or q_i·k_j / |q_i||k_j|
    s_ij = scale · q_i·k_j        ℓ_i = log Σ_{j∈I(i)} e^{s_ij}        o_i = Σ_{j∈I(i)} e^{s_ij − ℓ_i} v_j

Every query of every head has a set I(i) of its own, chosen with the rules of `topk`: exact, equal scores by low index,
no NaN. A vector of length 0 has cosine 0 with everything (1e-12 is added to squared lengths). No gradient goes through
the selection; that of o and lse is exact for the set chosen.

Sources: Memorizing Transformers (Wu et al. 2022, arXiv 2203.08913; both vectors normalised by the layer), Extended Mind
Transformers (Klett and Ahle 2024, arXiv 2406.02332; selected by cosine, attended by dot product). Their published code
scores with faiss, or builds a mask of S×T. The `cpu` backend selects from a tile of the product while it is in the
cache, as faiss' fused kernels do (Johnson et al. 2017, arXiv 1702.08734).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import define, resolve
from memattn.reference import knn_attention as reference
from memattn.reference.attention import accumulate_dtype
from memattn.reference.topk import TopK

OP, ATTENTION = "knn", "knn_attention"
METRICS = ("dot", "cos")
MOST = 128


class KNNAttention(NamedTuple):
    """o [B, S, H, V], lse [B, S, H], and what was retrieved: TopK of [B, S, H, k] with values of the metric."""

    o: Tensor
    lse: Tensor
    found: TopK


# --- the op -----------------------------------------------------------------------------------------------------------


def _fake(q, keys, k, *rest):
    shape = q.shape[:3]
    values = q.new_empty(*shape, k, dtype=accumulate_dtype(q.dtype))
    return values, q.new_empty(*shape, k, dtype=torch.int32), q.new_empty(shape, dtype=torch.int32)


SCHEMA = "(Tensor q, Tensor keys, int k, Tensor? lengths, bool cosine, float threshold) -> (Tensor, Tensor, Tensor)"
define(f"{OP}_cpu", SCHEMA, _fake)
_CPU = resolve(f"{OP}_cpu")
backends.register(OP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), (1, 4096)))
backends.register(OP, "chunked", Limits(("cpu", "cuda", "xpu"), check.FLOATS, backends.always, None))


# --- checks -----------------------------------------------------------------------------------------------------------


def _check(op, q, keys, k, metric, lengths, threshold):
    check.rank(op, "q", q, "[B, S, H, D]")
    check.dtype(op, "q", q, check.FLOATS)
    check.rank(op, "keys", keys, "[B, T, HKV, D]")
    check.shape(op, "keys", keys, "[B, T, HKV, D]", (q.shape[0], *keys.shape[1:3], q.shape[3]))
    check.dtype(op, "keys", keys, (q.dtype,), " like q")
    check.device(op, "keys", keys, q, "q")
    if keys.shape[2] == 0 or q.shape[2] == 0 or q.shape[2] % keys.shape[2]:
        raise ValueError(f"{op}: q has {q.shape[2]} heads; expected a positive multiple of keys' {keys.shape[2]} heads")
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)) or not 1 <= k <= MOST:
        raise ValueError(f"{op}: k is {k!r}; allowed: 1..{MOST} (for more: topk of the scores)")
    check.choice(op, "metric", metric, METRICS)
    if lengths is not None:
        check.lengths(op, lengths, keys, "keys")
    if threshold is not None and (not isinstance(threshold, (int, float)) or math.isnan(threshold)):
        raise ValueError(f"{op}: threshold is {threshold!r}; expected a number that is no NaN, or None")


def _no_autocast(q):
    return torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False)


def _find(op, q, keys, k, metric, lengths, threshold, sorted, backend):
    _check(op, q, keys, k, metric, lengths, threshold)
    request = Request(q.device.type, q.dtype, (("D", q.shape[3]),))
    name = backends.choose(OP, request, backend, lambda: check.describe(q=q, keys=keys))
    with torch.no_grad(), _no_autocast(q):
        if name == "chunked":
            return reference.chunked_knn(q, keys, k, metric=metric, lengths=lengths, threshold=threshold, sorted=sorted)
        least = -math.inf if threshold is None else float(threshold)
        tensors = check.contiguous(q.detach(), keys.detach(), lengths)
        found = TopK(*_CPU(*tensors[:2], k, tensors[2], metric == "cos", least))
        return reference.in_order(found) if sorted else found


# --- the public functions ---------------------------------------------------------------------------------------------


def knn(
    q: Tensor,
    keys: Tensor,
    k: int,
    *,
    metric: str = "dot",
    lengths: Tensor | None = None,
    threshold: float | None = None,
    sorted: bool = False,
    backend: str | None = None,
) -> TopK:
    """The k nearest keys of every query; the module docstring has the rules.

    ==========  =================  ===================================================================================
    argument    shape              dtype and meaning
    ==========  =================  ===================================================================================
    q           [B, S, H, D]       float32, bfloat16, float16 or float64; D ≥ 1
    keys        [B, T, HKV, D]     q's dtype; H a multiple of HKV: query head h is compared with key head h // (H/HKV)
    k           int                1..128; may exceed T
    lengths     [B]                int32/int64 in 0..T: row b has keys 0..lengths[b]−1; the rest may hold anything
    threshold   float              least value that is found
    sorted      bool               slots by descending value, else by ascending index
    ==========  =================  ===================================================================================

    metric: "dot", or "cos" for the cosine.

    Returns TopK(values [B, S, H, k] float32 (float64), indices int32, counts [B, S, H] int32); unused slots hold −inf
    and −1. Carries no gradient (`knn_attention` has one). Raises ValueError, TypeError, BackendError.
    """
    return _find(OP, q, keys, k, metric, lengths, threshold, sorted, backend)


def knn_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    k: int,
    *,
    metric: str = "dot",
    lengths: Tensor | None = None,
    threshold: float | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> KNNAttention:
    """Attention of every query over its k nearest keys.

    values [B, T, HKV, V] in q's dtype; scale None means D**-0.5; everything else as in `knn`, `backend` being that of
    the search (the attention over what was found is plain torch). A query that finds nothing gives o = 0, lse = −inf.

    Returns KNNAttention(o [B, S, H, V] in q's dtype, lse [B, S, H] natural log, found). o and lse are differentiable in
    q, keys and values, any number of times; join them with local attention by `merge_states`, or by a gate.
    Raises ValueError, TypeError, BackendError.
    """
    found = _find(ATTENTION, q, keys, k, metric, lengths, threshold, False, backend)
    check.rank(ATTENTION, "values", values, "[B, T, HKV, V]")
    check.shape(ATTENTION, "values", values, "[B, T, HKV, V]", (*keys.shape[:3], values.shape[3]))
    check.dtype(ATTENTION, "values", values, (q.dtype,), " like q")
    check.device(ATTENTION, "values", values, q, "q")
    with _no_autocast(q):
        o, lse = reference.attend(q, keys, values, found, q.shape[3] ** -0.5 if scale is None else float(scale))
    return KNNAttention(o, lse, found)
