"""Attention of the last tokens of each sequence over its cache: what generation runs at every step.

    s_ij = scale · q_i·k_j + c_i − c_j − slope · (i − j)        ℓ_i = log(Σ_{j∈M(i)} e^{s_ij} + Σ_r e^{sink_r})
    o_i = Σ_{j∈M(i)} e^{s_ij − ℓ_i} v_j

The same attention and masks M(i) as `memattn.ops.attention` (see there for the terms and their sources), on keys that
lie in a contiguous, paged (Kwon et al. 2023, arXiv 2309.06180) or ring cache. The keys of a row are divided among
threads or blocks and their parts merged by their log-sum-exp (split-KV, Dao et al. 2023, "Flash-Decoding").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import define, resolve
from memattn.ops._masks import check_mask, settings
from memattn.reference import attention_decode as reference
from memattn.reference.attention import AttentionOutput, accumulate_dtype, one_sink
from memattn.reference.attention_mask import Mask

OP = "attention_decode"
NO_RING = -1
CACHE, PAGES = "[B, capacity, {}]", "[pages, page_size, {}]"

# --- the op -----------------------------------------------------------------------------------------------------------

# A size of 0 stands for "no such term"; causal is 0 (no), 1 (per token) or 2 (per block); ring_start −1 is no ring.
SCHEMA = (
    "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor cache_seqlens, Tensor? page_table, Tensor? sink, "
    "Tensor? decay_cache, Tensor? alibi_slopes, int ring_start, int causal, int window, int prefix_len, "
    "int block_size, int dilation, int dilated_window, int dilated_prefix, bool tile_heads, float scale)"
    " -> (Tensor, Tensor)"
)


def _fake(q, k_cache, v_cache, *rest):
    o = q.new_empty(*q.shape[:3], v_cache.shape[3])
    return o, q.new_empty(q.shape[:3], dtype=accumulate_dtype(q.dtype))


for _name in ("cpu", "cuda"):
    define(f"{OP}_{_name}", SCHEMA, _fake)
_16_32 = (torch.float32, torch.bfloat16, torch.float16)
backends.register(OP, "cuda", Limits(("cuda",), _16_32, backends.needs_native("_C_cuda")))
backends.register(OP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C")))
backends.register(OP, "chunked", Limits(("cpu", "cuda", "xpu"), check.FLOATS, backends.always))

_PASSED = check.Passed()
_OPS = {name: resolve(f"{OP}_{name}") for name in ("cpu", "cuda")}


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_cache(name, x, q, layout, expected, dtype):
    check.rank(OP, name, x, layout)
    check.shape(OP, name, x, layout, expected)
    check.dtype(OP, name, x, (dtype,), " like q" if dtype == q.dtype else "")
    check.device(OP, name, x, q, "q")


def _check_indices(name, x, q, layout, expected, dtypes):
    check.shape(OP, name, x, layout, expected)
    check.dtype(OP, name, x, dtypes)
    check.device(OP, name, x, q, "q")


def _check_tensors(q, k_cache, v_cache, cache_seqlens, page_table, ring_start, sink, decay_cache, alibi_slopes):
    check.rank(OP, "q", q, "[B, t, HQ, K]")
    check.dtype(OP, "q", q, check.FLOATS)
    batch, _, heads, key_dim = q.shape
    layout = CACHE if page_table is None else PAGES
    check.rank(OP, "k_cache", k_cache, layout.format("HKV, K"))
    check.rank(OP, "v_cache", v_cache, layout.format("HKV, V"))
    rows, size, key_heads = k_cache.shape[:3]
    _check_cache(
        "k_cache", k_cache, q, layout.format("HKV, K"),
        (batch if page_table is None else rows, size, key_heads, key_dim), q.dtype,
    )  # fmt: skip
    _check_cache("v_cache", v_cache, q, layout.format("HKV, V"), (*k_cache.shape[:3], v_cache.shape[3]), q.dtype)
    if key_heads == 0 or heads == 0 or heads % key_heads:
        raise ValueError(f"{OP}: q has {heads} heads; expected a positive multiple of k_cache's {key_heads} heads")
    check.head_dim(OP, "K", key_dim)
    check.head_dim(OP, "V", v_cache.shape[3])
    integers = (torch.int32, torch.int64)
    _check_indices("cache_seqlens", cache_seqlens, q, "[B]", (batch,), integers)
    capacity = size
    if page_table is not None:
        check.rank(OP, "page_table", page_table, "[B, max_pages]")
        _check_indices("page_table", page_table, q, "[B, max_pages]", (batch, page_table.shape[1]), integers[:1])
        capacity = size * page_table.shape[1]
    if ring_start is not None and (
        isinstance(ring_start, bool) or not isinstance(ring_start, int) or not 0 <= ring_start < max(capacity, 1)
    ):
        raise ValueError(f"{OP}: ring_start is {ring_start!r}; expected None or a slot 0..{capacity - 1}")
    sums = accumulate_dtype(q.dtype)
    for name, x, allowed in (("sink", sink, (q.dtype, sums)), ("alibi_slopes", alibi_slopes, (sums,))):
        if x is not None:
            check.tensor(OP, name, x)
            check.dtype(OP, name, x, allowed, f" with {check.dtype_name(q.dtype)} q")
            check.device(OP, name, x, q, "q")
    if sink is not None:
        check.shape(OP, "sink", sink, "[HQ] or [HQ, r]", (heads, *sink.shape[1:2]))
    if alibi_slopes is not None:
        check.shape(OP, "alibi_slopes", alibi_slopes, "[HQ]", (heads,))
    if decay_cache is not None:
        _check_cache("decay_cache", decay_cache, q, layout.format("HQ"), (rows, size, heads), torch.float64)


def _check_in_place(name, x):
    if x is not None and not x.is_contiguous():
        raise ValueError(
            f"{OP}: {name} has strides {list(x.stride())}; expected a contiguous cache, which every step reads in "
            "place (cache_seqlens says how much of it is filled)"
        )


def _check_values(cache_seqlens, page_table, ring_start, k_cache):
    if not check.values_checked(cache_seqlens) or not cache_seqlens.numel():
        return
    pages, size = k_cache.shape[:2]
    low, high = (int(x) for x in cache_seqlens.aminmax())
    capacity = size if page_table is None else size * page_table.shape[1]
    if low < -1 or (ring_start is None and high > capacity):
        allowed = f"-1 (padding)..{capacity}" if ring_start is None else "≥ -1 (padding)"
        raise ValueError(f"{OP}: cache_seqlens holds {low}..{high}; allowed: {allowed}")
    if page_table is not None and page_table.numel():
        low, high = (int(x) for x in page_table.aminmax())
        if low < -1 or high >= pages:
            raise ValueError(f"{OP}: page_table holds {low}..{high}; allowed: -1 (no page)..{pages - 1}")


# --- the public function ----------------------------------------------------------------------------------------------


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cache_seqlens: Tensor,
    page_table: Tensor | None = None,
    ring_start: int | None = None,
    causal: bool | str = True,
    window: int | None = None,
    prefix_len: int = 0,
    block_size: int | None = None,
    chunk_rule: tuple[Any, ...] | None = None,
    sink: Tensor | None = None,
    decay_cache: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    head_map: str = "gqa",
    scale: float | None = None,
    backend: str | None = None,
) -> AttentionOutput:
    """Attention of the last t tokens of each row over its cache, their own keys included. Inference only.

    ==============  ======================  ==================================================================
    argument        shape                   dtype and meaning
    ==============  ======================  ==================================================================
    q               [B, t, HQ, K]           float32, bfloat16, float16 or float64, the same for q and caches
    k_cache         [B, capacity, HKV, K]   contiguous; with page_table [pages, page_size, HKV, K]
    v_cache         likewise with V         HQ a multiple of HKV; K, V in 16..256
    cache_seqlens   [B]                     int32/int64: tokens n_b of row b, its t new ones (already written)
                                            included. Query i stands at n_b − t + i. 0 or −1: a row of padding
    page_table      [B, max_pages]          int32: page of the slots p·page_size…; −1: none. capacity is then
                                            max_pages · page_size. One-page tables pick rows of a pool
    ring_start      R or None               None: position j lies in slot j. Else slots R..capacity−1 are a ring:
                                            position j ≥ R lies in slot R + (j − R) mod (capacity − R), where it
                                            is seen until a later token takes the slot; slots below R stay
    sink            [HQ] or [HQ, r]         q's dtype or float32: logits in the denominator that have no value
    decay_cache     [B, capacity, HQ]       float64, laid out like k_cache: cumulated log decay c_j, the sum of
                                            log_decay up to and including token j
    alibi_slopes    [HQ]                    float32: s_ij loses slope · (i − j)
    ==============  ======================  ==================================================================

    causal, window, prefix_len, block_size, chunk_rule=("dilated", D, W, P), head_map and scale as in `attention`. Keys
    of chunk_rule "summary" are no tokens: give the number of finished chunks as cache_seqlens, with causal=False.
    Slots that hold no visible key may hold anything. A ring must have capacity − R ≥ window + t − 1 slots, or the first
    of the new tokens misses keys that the last of them overwrote.

    Returns AttentionOutput(o [B, t, HQ, V] in q's dtype, lse [B, t, HQ] float32, natural log). A query that sees
    nothing and has no sink, and every query at a position below 0, gives o = 0, lse = −inf. No host synchronisation;
    can be captured in a CUDA graph.

    Raises ValueError (shapes, values, combinations without meaning), TypeError (dtypes), BackendError; RuntimeError
    when an input requires grad.
    """
    if not (isinstance(causal, bool) or causal == "block"):  # before the signature, where 1 and True are the same
        raise ValueError(f"{OP}: causal is {causal!r}; allowed: True, False, 'block'")
    mask = Mask(causal, window, prefix_len, block_size, chunk_rule)
    signature = _PASSED.signature(
        q, k_cache, v_cache, cache_seqlens, page_table, ring_start, sink, decay_cache, alibi_slopes, causal, window,
        prefix_len, block_size, *(chunk_rule or (None,)), head_map, scale,
    )  # fmt: skip
    if signature not in _PASSED:
        biased = "decay_cache" if decay_cache is not None else "alibi_slopes" if alibi_slopes is not None else None
        check_mask(OP, mask, biased, head_map, scale)
        if chunk_rule is not None and chunk_rule[0] == "summary":
            raise ValueError(
                f"{OP}: chunk_rule is {chunk_rule!r}, whose keys are no tokens; give the number of finished chunks as "
                "cache_seqlens, with causal=False"
            )
        _check_tensors(q, k_cache, v_cache, cache_seqlens, page_table, ring_start, sink, decay_cache, alibi_slopes)
        _PASSED.add(signature)
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache), ("decay_cache", decay_cache)):
        _check_in_place(name, x)
    _check_values(cache_seqlens, page_table, ring_start, k_cache)
    check.inference_only(OP, "attention", q, k_cache, v_cache, sink, decay_cache, alibi_slopes)
    request = Request(q.device.type, q.dtype, (("K", q.shape[3]), ("V", v_cache.shape[3])))
    name = backends.choose(OP, request, backend, lambda: check.describe(q=q, k_cache=k_cache, v_cache=v_cache))
    if name == "chunked":
        with torch.autocast(q.device.type, enabled=False):
            return reference.chunked(
                q, k_cache, v_cache, cache_seqlens=cache_seqlens, page_table=page_table, ring_start=ring_start,
                causal=causal, window=window, prefix_len=prefix_len, block_size=block_size, chunk_rule=chunk_rule,
                sink=sink, decay_cache=decay_cache, alibi_slopes=alibi_slopes, head_map=head_map, scale=scale,
            )  # fmt: skip
    logits = None if sink is None else one_sink(sink, accumulate_dtype(q.dtype))
    queries, lengths, pages, logits, slopes = check.contiguous(q, cache_seqlens, page_table, logits, alibi_slopes)
    causality, reach, prefix, block, _, *dilated, _ = settings(mask)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return AttentionOutput(*_OPS[name](
        queries, k_cache, v_cache, lengths, pages, logits, decay_cache, slopes,
        NO_RING if ring_start is None else ring_start, causality, reach, prefix, block, *dilated, head_map == "tile",
        scale,
    ))  # fmt: skip
