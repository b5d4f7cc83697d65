"""What the attention ops share: the checks of their mask arguments, and the mask as the numbers of a schema."""

from __future__ import annotations

import torch

from memattn.ops import _checks as check
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
