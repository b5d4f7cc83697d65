"""The k largest of each row of scores: exact, and always the same ones.

    I(row) = the first k of {i < length : s_i > −inf, s_i ≥ threshold} in the order (s_i descending, i ascending)

Equal scores are taken by low index (−0 equals +0), so that a selection depends on nothing but the scores: not on
threads, batch, instruction set or backend. +inf is the largest score: forced entries. −inf is a masked score and is
never selected; neither is a NaN, because what it is compared with says nothing about it, and one broken key would
otherwise be retrieved by every query and spread. A row with fewer than k selectable scores fills fewer slots; its count
says so.

Sources: the selection step of every retrieval method (Memorizing Transformers, arXiv 2203.08913; NSA, arXiv 2502.11089;
DeepSeek's sparse attention, arXiv 2512.02556). Scores are read once, through a threshold, into a buffer of candidates
that is selected from when it is full, as in faiss (Johnson et al. 2017, arXiv 1702.08734).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import define, resolve
from memattn.reference import topk as reference
from memattn.reference.topk import TopK, broadcast_lengths, translated

OP = "topk"
MOST = 4096
INTEGERS = (torch.int32, torch.int64)

# --- the op: selection alone; values carry their gradient by a gather -------------------------------------------------


def _fake(scores, k, *rest):
    shape = scores.shape[:1]
    return scores.new_empty(*shape, k), *(scores.new_empty(s, dtype=torch.int32) for s in ((*shape, k), shape))


define(f"{OP}_cpu", "(Tensor scores, int k, Tensor? lengths, float threshold, bool sorted) -> (Tensor, Tensor, Tensor)", _fake)  # fmt: skip # noqa: E501
_CPU = resolve(f"{OP}_cpu")
_FEATURES = frozenset({"backward"})
backends.register(OP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), None, _FEATURES))
backends.register(OP, "chunked", Limits(("cpu", "cuda", "xpu"), check.FLOATS, backends.always, None, _FEATURES))


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_count(name, value, most):
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or not 1 <= value <= most:
        raise ValueError(f"{OP}: {name} is {value!r}; allowed: 1..{most}")


def _check_lengths(lengths, scores):
    check.tensor(OP, "lengths", lengths)
    rows = scores.shape[:-1]
    axes = lengths.dim()
    if axes not in (1, len(rows)) or tuple(lengths.shape) != tuple(rows[:axes]):
        raise ValueError(f"{OP}: lengths has shape {list(lengths.shape)}; expected {list(rows[:1])} or {list(rows)}")
    check.dtype(OP, "lengths", lengths, INTEGERS)
    check.device(OP, "lengths", lengths, scores, "scores")
    if check.values_checked(lengths) and lengths.numel():
        low, high = (int(x) for x in lengths.aminmax())
        if low < 0 or high > scores.shape[-1]:
            raise ValueError(f"{OP}: lengths holds {low}..{high}; allowed: 0..{scores.shape[-1]}")


def _check_page_table(page_table, scores, page_size):
    _check_count("page_size", page_size, 2**31 - 1)
    if page_table is None:
        if page_size != 1:
            raise ValueError(f"{OP}: page_size is {page_size} without page_table; allowed: 1")
        return
    pages = -(-scores.shape[-1] // page_size)
    check.rank(OP, "page_table", page_table, "[B, pages]")
    if page_table.shape[0] != scores.shape[0] or page_table.shape[1] < pages:
        raise ValueError(
            f"{OP}: page_table has shape {list(page_table.shape)}; expected [B, pages] with B = {scores.shape[0]} and "
            f"at least {pages} pages of {page_size} for {scores.shape[-1]} scores"
        )
    check.dtype(OP, "page_table", page_table, INTEGERS[:1])
    check.device(OP, "page_table", page_table, scores, "scores")


# --- the public function ----------------------------------------------------------------------------------------------


def _cpu(scores, k, *, lengths, threshold, sorted):
    rows = scores.shape[:-1]
    if lengths is not None:
        lengths = broadcast_lengths(lengths, scores).reshape(-1).contiguous()
    flat = scores.detach().reshape(math.prod(rows), scores.shape[-1])
    least = -math.inf if threshold is None else float(threshold)
    values, indices, counts = _CPU(*check.contiguous(flat), k, lengths, least, sorted)
    return TopK(values.view(*rows, k), indices.view(*rows, k), counts.view(rows))


def topk(
    scores: Tensor,
    k: int,
    *,
    lengths: Tensor | None = None,
    threshold: float | None = None,
    tie: str = "low_index",
    sorted: bool = False,
    page_table: Tensor | None = None,
    page_size: int = 1,
    backend: str | None = None,
) -> TopK:
    """The k largest scores of each row; the module docstring has the rule for ties, infinities and NaN.

    ===========  ============================  ========================================================================
    argument     shape                         dtype and meaning
    ===========  ============================  ========================================================================
    scores       [B, ..., N], at least 2 axes  float32, bfloat16, float16 or float64; N < 2³¹
    k            int                           1..4096; may exceed N
    lengths      [B] or [B, ...]               int32/int64 in 0..N: only the first of the row's scores are there
    threshold    float                         least score that is selected, compared in float32 (float64)
    sorted       bool                          slots by descending value, else by ascending index
    page_table   [B, pages]                    int32: logical id i is returned as page_table[b, i // page_size] ·
                                               page_size + i mod page_size, as −1 if its page is negative
    ===========  ============================  ========================================================================

    tie: "low_index" is the only rule there is.

    Returns TopK(values [B, ..., k] in scores' dtype, indices [B, ..., k] int32, counts [B, ...] int32); slots from the
    count on hold −inf and −1. values are differentiable in scores, any number of times; the selection is piecewise
    constant. No host synchronisation. Raises ValueError, TypeError, BackendError.
    """
    check.tensor(OP, "scores", scores)
    if scores.dim() < 2:
        raise ValueError(f"{OP}: scores has shape {list(scores.shape)}; expected [B, ..., N] with at least two axes")
    check.dtype(OP, "scores", scores, check.FLOATS)
    _check_count("k", k, MOST)
    check.choice(OP, "tie", tie, ("low_index",))
    if threshold is not None and (not isinstance(threshold, (int, float)) or math.isnan(threshold)):
        raise ValueError(f"{OP}: threshold is {threshold!r}; expected a number that is no NaN, or None")
    if lengths is not None:
        _check_lengths(lengths, scores)
    _check_page_table(page_table, scores, page_size)
    needs_grad = check.needs_grad(scores)
    request = Request(scores.device.type, scores.dtype, (), _FEATURES if needs_grad else frozenset())
    name = backends.choose(OP, request, backend, lambda: check.describe(scores=scores))
    select = _cpu if name == "cpu" else reference.chunked
    values, indices, counts = select(scores, k, lengths=lengths, threshold=threshold, sorted=sorted)
    if needs_grad and scores.shape[-1]:
        values = scores.gather(-1, indices.clamp_min(0).long()).masked_fill(indices < 0, -math.inf)
    if page_table is not None:
        indices = translated(indices, page_table, page_size)
    return TopK(values, indices, counts)
