"""Scores of queries against block summaries (or any keys), from which `topk` selects.

    dot:      s_hj = scale · q_h·r_j                    cos:      the same of q_h/|q_h| and r_j/|r_j|
    bound:    s_hj = scale · Σ_c max(q_c m_c, q_c M_c)  with r_j = [m ; M]: no key of the block scores higher
    relu:     s_hj = max(0, scale · q_h·r_j)            sigmoid:  s_hj = 1 / (1 + e^{−scale · q_h·r_j})
    hamming:  s_hj = −scale · number of bits in which the codes q_h and r_j differ

then, in this order: a softmax over the blocks that the query sees (norm="softmax"), times weight_h, the sum, mean or
largest over a group's heads or all (over, reduce), the same over the queries that see the block (reduce_queries), −inf
where the block is not seen, +inf where it is forced. Query head h belongs to summary head h // (H/HKV).

A query at position p sees block j if all of it is past: ends_j ≤ p + 1. The block that holds p is not seen (its summary
knows the future) but counts as the last one, which force_last takes in: attend to it with a causal mask inside.

Sources: dot MoBA (arXiv 2502.13189), InfLLM (arXiv 2402.04617; over="heads"); softmax summed over the group NSA (arXiv
2502.11089); bound Quest (arXiv 2406.10774); relu with weights the lightning indexer, I = Σ_h w_h ReLU(q_h·k) (arXiv
2512.02556); hamming HashAttention (arXiv 2412.14468); sigmoid with reduce_queries="mean" M+ (arXiv 2502.00592); cos
Extended Mind (arXiv 2406.02332).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import define, resolve
from memattn.reference import block_scores as reference
from memattn.reference.attention import accumulate_dtype

OP = "block_scores"
KINDS = ("dot", "cos", "bound", "relu", "sigmoid", "hamming")
REDUCTIONS = ("sum", "mean", "max")
INTEGERS = (torch.int32, torch.int64)

FEW = 16  # queries that share a summary head: up to here reading the summaries is what takes time
MOST_SCORES = 1 << 26  # of single heads that are held at once before heads are reduced

# --- the op: the product of a decode step -----------------------------------------------------------------------------

define("block_product_cpu", "(Tensor q, Tensor r) -> Tensor", lambda q, r: q.new_empty(*q.shape[:3], r.shape[1]))
_PRODUCT = resolve("block_product_cpu")

_FEATURES = frozenset({"backward", "indices"})
backends.register(OP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), None, _FEATURES))
_DTYPES = (*check.FLOATS, torch.int32)
backends.register(OP, "chunked", Limits(("cpu", "cuda", "xpu"), _DTYPES, backends.always, None, _FEATURES))


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_operands(q, r, kind, weight):
    check.rank(OP, "q", q, "[B, S, H, D]")
    check.dtype(OP, "q", q, (torch.int32,) if kind == "hamming" else check.FLOATS, f" with kind={kind!r}")
    check.rank(OP, "r", r, "[B, N, HKV, D]")
    width = q.shape[3] * (2 if kind == "bound" else 1)
    check.shape(
        OP, "r", r, "[B, N, HKV, 2D]" if kind == "bound" else "[B, N, HKV, D]", (q.shape[0], *r.shape[1:3], width)
    )
    check.dtype(OP, "r", r, (q.dtype,), " like q")
    check.device(OP, "r", r, q, "q")
    if r.shape[2] == 0 or q.shape[2] == 0 or q.shape[2] % r.shape[2]:
        raise ValueError(f"{OP}: q has {q.shape[2]} heads; expected a positive multiple of r's {r.shape[2]} heads")
    if weight is not None:
        check.shape(OP, "weight", weight, "[B, S, H]", q.shape[:3])
        sums = torch.float32 if kind == "hamming" else accumulate_dtype(q.dtype)
        check.dtype(OP, "weight", weight, (q.dtype, sums), f" with {check.dtype_name(q.dtype)} q")
        check.device(OP, "weight", weight, q, "q")


def _check_places(q, r, counts, block_ends, q_positions):
    (batch, queries), blocks = q.shape[:2], r.shape[1]
    if (block_ends is None) != (q_positions is None):
        raise ValueError(f"{OP}: block_ends and q_positions are used together; allowed: both or none")
    layouts = {
        "counts": (counts, "[B]", ((batch,),)),
        "block_ends": (block_ends, "[N] or [B, N]", ((blocks,), (batch, blocks))),
        "q_positions": (q_positions, "[S] or [B, S]", ((queries,), (batch, queries))),
    }
    for name, (x, layout, shapes) in layouts.items():
        if x is None:
            continue
        check.tensor(OP, name, x)
        check.shape(OP, name, x, layout, shapes[min(x.dim(), len(shapes)) - 1])
        check.dtype(OP, name, x, INTEGERS)
        check.device(OP, name, x, q, "q")
    if counts is not None and check.values_checked(counts) and counts.numel():
        low, high = (int(x) for x in counts.aminmax())
        if low < 0 or high > blocks:
            raise ValueError(f"{OP}: counts holds {low}..{high}; allowed: 0..{blocks}")


def _check_indices(q, r, indices, places, forced):
    if any(x is not None for x in places) or any(forced):
        raise ValueError(f"{OP}: indices says which blocks are seen; counts, block_ends and force_* are not for it")
    check.rank(OP, "indices", indices, "[B, S, HKV or 1, n]")
    heads = 1 if indices.shape[2] == 1 else r.shape[2]
    check.shape(OP, "indices", indices, "[B, S, HKV or 1, n]", (*q.shape[:2], heads, indices.shape[3]))
    check.dtype(OP, "indices", indices, INTEGERS)
    check.device(OP, "indices", indices, q, "q")
    if check.values_checked(indices) and indices.numel():
        low, high = (int(x) for x in indices.aminmax())
        if low < -1 or high >= r.shape[1]:
            raise ValueError(f"{OP}: indices holds {low}..{high}; allowed: -1 (padding)..{r.shape[1] - 1}")


def _check_settings(kind, scale, norm, over, reduce, reduce_queries, force_first, force_last, indices):
    check.choice(OP, "kind", kind, KINDS)
    check.choice(OP, "norm", norm, (None, "softmax"))
    check.choice(OP, "over", over, ("none", "group", "heads"))
    check.choice(OP, "reduce", reduce, REDUCTIONS)
    check.choice(OP, "reduce_queries", reduce_queries, (None, *REDUCTIONS))
    if not isinstance(scale, (int, float)) or not math.isfinite(scale):
        raise ValueError(f"{OP}: scale is {scale!r}; expected a finite number")
    for name, n in (("force_first", force_first), ("force_last", force_last)):
        if isinstance(n, bool) or not isinstance(n, int) or n < 0:
            raise ValueError(f"{OP}: {name} is {n!r}; expected an int ≥ 0")
    if indices is not None and (reduce_queries is not None or kind == "hamming"):
        raise ValueError(
            f"{OP}: indices is given with reduce_queries or kind='hamming'; lists differ from query to query"
        )


# --- the cpu backend --------------------------------------------------------------------------------------------------


def _few_queries(q, r, kind, scale, indices):
    """As the reference's raw_scores."""
    query, _ = reference.operands(scale * q.to(accumulate_dtype(q.dtype)), r, kind)
    return _PRODUCT(*check.contiguous(query, r))


# --- the public function ----------------------------------------------------------------------------------------------


def block_scores(
    q: Tensor,
    r: Tensor,
    *,
    kind: str = "dot",
    weight: Tensor | None = None,
    scale: float = 1.0,
    norm: str | None = None,
    over: str = "none",
    reduce: str = "sum",
    reduce_queries: str | None = None,
    counts: Tensor | None = None,
    block_ends: Tensor | None = None,
    q_positions: Tensor | None = None,
    force_first: int = 0,
    force_last: int = 0,
    indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scores of every query against every block; the module docstring has the kinds and the order of the steps.

    ===========  ======================  ==============================================================================
    argument     shape                   dtype and meaning
    ===========  ======================  ==============================================================================
    q            [B, S, H, D]            float32, bfloat16, float16 or float64; codes int32 with "hamming"
    r            [B, N, HKV, D]          q's dtype: summaries, [m ; M] of 2D with "bound"; H a multiple of HKV
    weight       [B, S, H]               q's dtype or float32: factor of each head's scores
    over         "none|group|heads"      heads that are reduced by `reduce` ("sum", "mean", "max")
    counts       [B]                     int32/int64 in 0..N: blocks of each row that there are
    block_ends   [N] or [B, N]           int32/int64: position behind the block's last token, not decreasing
    q_positions  [S] or [B, S]           int32/int64: positions of the queries
    force_first  int                     so many first blocks get +inf, of those not behind the query's own
    force_last   int                     so many last ones, the query's own included
    indices      [B, S, HKV or 1, n]     int32/int64: score these blocks only, in this order; −1 gives −inf
    ===========  ======================  ==============================================================================

    Returns [B, S, H | HKV | 1, N], or n in place of N, float32 (float64): the head axis as `over` says, S = 1 with
    reduce_queries. Differentiable in q, r and weight (not "hamming"), any number of times, −inf and +inf excepted.
    Forcing more blocks than `topk` takes selects the first of them. Raises ValueError, TypeError, BackendError.
    """
    _check_settings(kind, scale, norm, over, reduce, reduce_queries, force_first, force_last, indices)
    _check_operands(q, r, kind, weight)
    _check_places(q, r, counts, block_ends, q_positions)
    if indices is not None:
        _check_indices(q, r, indices, (counts, block_ends), (force_first, force_last))
    grad = check.needs_grad(q, r, weight)
    features = {"backward": grad, "indices": indices is not None}
    wanted = frozenset(name for name, given in features.items() if given)
    request = Request(q.device.type, q.dtype, (("D", r.shape[3]),), wanted)
    name = backends.choose(OP, request, backend, lambda: check.describe(q=q, r=r, weight=weight))
    few = q.shape[1] * q.shape[2] <= FEW * r.shape[2] and kind != "cos" and indices is None and not grad
    raw = _few_queries if name == "cpu" and few else reference.raw_scores
    settings = {"norm": norm, "over": over, "reduce": reduce, "reduce_queries": reduce_queries, "counts": counts,
                "block_ends": block_ends, "force_first": force_first, "force_last": force_last}  # fmt: skip

    def of_queries(a: int, b: int) -> Tensor:
        """Of queries a .. b − 1."""
        rows, lists = q[:, a:b], None if indices is None else indices[:, a:b]
        positions = None if q_positions is None else q_positions[..., a:b]
        return reference.finish(
            raw(rows, r, kind, float(scale), lists), r.shape[2], kind=kind, indices=lists, q_positions=positions,
            weight=None if weight is None else weight[:, a:b], **settings,
        )  # fmt: skip

    with torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False):
        if over == "none" or reduce_queries is not None or grad:
            return of_queries(0, q.shape[1])
        rows = max(1, MOST_SCORES // max(1, q.shape[0] * q.shape[2] * r.shape[1]))
        return torch.cat([of_queries(a, a + rows) for a in range(0, max(1, q.shape[1]), rows)], 1)
