"""What the attention ops share: the checks of their mask arguments, and the mask as the numbers of a schema."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memattn.ops import _checks as check
from memattn.reference.attention import accumulate_dtype
from memattn.reference.attention_mask import Mask

HEAD_MAPS = ("gqa", "tile")
AT_THE_END = -1  # the number of q_offset="end"


def check_mask(op: str, mask: Mask, biased: str | None, head_map: str, scale: float | None) -> None:
    """Every size, and every combination of terms that would have no or two meanings. `biased` names a given decay."""
    check.choice(op, "head_map", head_map, HEAD_MAPS)
    _check_scale(op, scale)
    _check_size(op, "window", mask.window, 1)
    _check_size(op, "block_size", mask.block_size, 1)
    _check_size(op, "prefix_len", mask.prefix_len, 0, optional=False)
    if mask.q_offset != "end":
        _check_size(op, "q_offset", mask.q_offset, 0, optional=False)
    if mask.chunk_rule is not None:
        _check_chunk_rule(op, mask.chunk_rule)
    rule = mask.chunk_rule[0] if mask.chunk_rule else None
    by_tokens = {"window": mask.window, "block_size": mask.block_size, "prefix_len": mask.prefix_len}
    refused = [
        (mask.causal == "block" and mask.block_size is None, "causal is 'block', which needs block_size"),
        (
            mask.window is not None and mask.causal is False,
            "window counts keys up to the query; it needs causal True or 'block'",
        ),
        (rule and mask.causal is not True, f"chunk_rule is {mask.chunk_rule!r}, causal itself: it needs causal=True"),
        (biased and mask.causal is not True, f"{biased} is given with causal={mask.causal!r}; it needs causal=True"),
        (
            biased and mask.prefix_len > 0,
            f"{biased} is given with prefix_len, whose keys may lie ahead; use two calls and merge_states",
        ),
        (biased and rule == "summary", f"{biased} is given with chunk_rule 'summary', whose keys are no tokens"),
    ]
    refused += [
        (
            rule == "summary" and size,
            f"chunk_rule 'summary' with {name}, which counts tokens; use two calls and merge_states",
        )
        for name, size in by_tokens.items()
    ]
    for wrong, what in refused:
        if wrong:
            raise ValueError(f"{op}: {what}")


def _check_size(op, name, value, least, optional=True):
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or value < least:
        raise ValueError(f"{op}: {name} is {value!r}; expected an integer ≥ {least}{' or None' if optional else ''}")


def _check_chunk_rule(op, rule):
    sizes = {"summary": ("L",), "dilated": ("D", "W", "P")}
    known = isinstance(rule, tuple) and rule and rule[0] in sizes and len(rule) == 1 + len(sizes[rule[0]])
    if not known:
        raise ValueError(f"{op}: chunk_rule is {rule!r}; allowed: None, ('summary', L), ('dilated', D, W, P)")
    for name, value in zip(sizes[rule[0]], rule[1:], strict=True):
        _check_size(op, f"{name} of chunk_rule {rule!r}", value, 1 if name in "LD" else 0, optional=False)


def _check_scale(op, scale):
    if scale is not None and not (isinstance(scale, (int, float, torch.SymFloat)) and 0 < scale < float("inf")):
        raise ValueError(f"{op}: scale is {scale!r}; expected a finite number > 0 or None")


def check_heads(op: str, q: Tensor, k: Tensor) -> None:
    """q [B, Tq, HQ, K] and k [B, Tk, HKV, K] of one dtype and device, HQ a multiple of HKV, K in 16..256."""
    check.rank(op, "q", q, "[B, Tq, HQ, K]")
    check.dtype(op, "q", q, check.FLOATS)
    check.rank(op, "k", k, "[B, Tk, HKV, K]")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        check.shape(op, "k", k, "[B, Tk, HKV, K]", (q.shape[0], *k.shape[1:3], q.shape[3]))
    if k.shape[2] == 0 or q.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{op}: q has {q.shape[2]} heads; expected a positive multiple of k's {k.shape[2]} heads")
    check.head_dim(op, "K", q.shape[3])
    check.dtype(op, "k", k, (q.dtype,), " like q")
    check.device(op, "k", k, q, "q")


def check_positions(
    op: str, q: Tensor, k: Tensor, log_decay: Tensor | None, alibi_slopes: Tensor | None, q_offset: Any,
    packed: bool,
) -> None:  # fmt: skip
    """The decays' layouts, and that every query has a key at its position where one of them or "end" needs it."""
    sums = accumulate_dtype(q.dtype)
    biases = {"log_decay": log_decay, "alibi_slopes": alibi_slopes}
    for name, x in ((n, x) for n, x in biases.items() if x is not None):
        check.tensor(op, name, x)
        check.dtype(op, name, x, (sums,), f" with {check.dtype_name(q.dtype)} q")
        check.device(op, name, x, q, "q")
    if log_decay is not None:
        check.shape(op, "log_decay", log_decay, "[B, Tk, HQ]", (q.shape[0], k.shape[1], q.shape[2]))
    if alibi_slopes is not None:
        check.shape(op, "alibi_slopes", alibi_slopes, "[HQ]", (q.shape[2],))
    length, keys = q.shape[1], k.shape[1]
    if q_offset == "end":
        if not packed and length > keys:
            raise ValueError(
                f"{op}: q has {length} tokens and k has {keys}; with q_offset='end' every query needs a key at "
                "its own position (Tq ≤ Tk)"
            )
        return
    given = next((name for name, x in biases.items() if x is not None), None)
    if given and not packed and length + q_offset > keys:
        raise ValueError(
            f"{op}: the last query has position {length + q_offset - 1} and there are {keys} keys; with {given} "
            "every query needs a key at its own position (Tq + q_offset ≤ Tk)"
        )


def check_packed(
    op: str, q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, q_offset: Any,
    biased: bool,
) -> None:  # fmt: skip
    """cu_seqlens_k None means cu_seqlens_q: queries and keys of the same sequences."""
    if cu_seqlens_q is None:
        if cu_seqlens_k is not None:
            raise ValueError(f"{op}: cu_seqlens_k is given without cu_seqlens_q; packed keys need packed queries")
        return
    check.cu_seqlens(op, cu_seqlens_q, q, "cu_seqlens_q")
    if cu_seqlens_k is None and k.shape[1] != q.shape[1]:
        raise ValueError(f"{op}: q has {q.shape[1]} packed tokens and k has {k.shape[1]}; expected cu_seqlens_k then")
    if cu_seqlens_k is not None:
        check.cu_seqlens(op, cu_seqlens_k, k, "cu_seqlens_k")
        check.shape(op, "cu_seqlens_k", cu_seqlens_k, "[N+1] like cu_seqlens_q", cu_seqlens_q.shape)
    if (biased or q_offset == "end") and check.values_checked(cu_seqlens_q):
        keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        last = cu_seqlens_q.diff() + (0 if q_offset == "end" else q_offset)
        short = (last > keys.diff()) & (cu_seqlens_q.diff() > 0)
        if bool(short.any()):
            raise ValueError(
                f"{op}: packed sequence {int(short.nonzero()[0])} has queries beyond its keys; with log_decay, "
                "alibi_slopes or q_offset='end' every query needs a key at its own position"
            )


def settings(mask: Mask) -> tuple[int, ...]:
    """The mask as the numbers of a schema: a size of 0 stands for "no such term", causal is 0, 1 or 2 (per block)."""
    summary = dilation = dilated_window = dilated_prefix = 0
    if mask.chunk_rule and mask.chunk_rule[0] == "summary":
        summary = mask.chunk_rule[1]
    elif mask.chunk_rule:
        dilation, dilated_window, dilated_prefix = mask.chunk_rule[1:]
    return (
        {False: 0, True: 1, "block": 2}[mask.causal], mask.window or 0, mask.prefix_len, mask.block_size or 0,
        summary, dilation, dilated_window, dilated_prefix, AT_THE_END if mask.q_offset == "end" else mask.q_offset,
    )  # fmt: skip
