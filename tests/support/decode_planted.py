"""Planted bugs: the plain-torch attention_decode with one wrong line each. The relations must catch every one."""

# ruff: noqa: E501 (tables, one case a line)
from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable

from memattn.reference import attention_decode
from support import relations

SOURCE = inspect.getsource(attention_decode)
# Where: what is there -> what is put in its place.
BUGS = {
    "queries one early": ("i = tokens[:, None] - length + torch", "i = tokens[:, None] - 1 - length + torch"),
    "queries from the start": ("i = tokens[:, None] - length + torch", "i = 0 * tokens[:, None] + torch"),
    "longest row for all": ("tokens = cache_seqlens.long()", "tokens = cache_seqlens.long().clamp(min=cache_seqlens.max())"),
    "slots beyond the tokens seen": ("torch.where(slot < tokens[:, None], slot, -1)", "slot"),
    "last token left out": ("torch.where(slot < tokens[:, None], slot, -1)", "torch.where(slot < tokens[:, None] - 1, slot, -1)"),
    "ring turned one late": ("tokens[:, None] - 1 - slot, capacity", "tokens[:, None] - slot, capacity"),
    "ring turns its fixed slots": ("turn = torch.where(slot < ring_start, turn.clamp(max=0), turn)", "pass"),
    "ring of the whole capacity": ("capacity - ring_start, rounding_mode", "capacity, rounding_mode"),
    "unused slots of a ring seen": ("torch.where(turn < 0, -1, slot", "torch.where(turn < -9, -1, slot"),
    "ring position forgets the turns": ("slot + turn * (capacity - ring_start)", "slot"),
    "missing page read as page 0": ("(page_table >= 0) & ", ""),
    "pages interleaved": (".flatten(1, 2)\n", ".transpose(1, 2).flatten(1, 2)\n"),
    "page validity of the wrong slots": ("there = ((page_table >= 0) & (page_table < pages)).repeat_interleave(page_size, 1)", "there = ((page_table >= 0) & (page_table < pages)).repeat(1, page_size)"),
    "queries below 0 see the prefix": (" & (i >= 0)[:, :, None]", ""),
    "sink in rows below 0": ("torch.where((i >= 0)[:, None, :, None], one_sink(sink, dtype)[:, None, None], -torch.inf)", "one_sink(sink, dtype)[:, None, None].expand(len(q), heads, length, 1)"),
    "sink in the output, not in lse": ("lse.masked_fill(empty, -torch.inf).transpose", "s[..., 0 if sink is None else 1 :].logsumexp(-1).transpose"),
    "decay of the last key, not of the query": ("torch.where((j[:, None] == i[:, :, None])", "torch.where((j[:, None] == (i[:, :, None] + 1))"),
    "decay reversed": ("at.transpose(1, 2)[..., None] - c.transpose(1, 2)[:, :, None]", "c.transpose(1, 2)[:, :, None] - at.transpose(1, 2)[..., None]"),
    "alibi by slots": ("i[:, :, None] - j[:, None, :])[:, None]", "i[:, :, None] - torch.arange(j.shape[1], device=j.device).flip(0))[:, None]"),
    "lse in base 2": ("lse.masked_fill(empty, -torch.inf).transpose", "lse.masked_fill(empty, -torch.inf).div(0.6931471805599453).transpose"),
    "hidden values enter": ("v.masked_fill(hidden, 0.0)", "v"),
    "heads always grouped": ("_head_of(heads, k.shape[2], head_map), device", '_head_of(heads, k.shape[2], "gqa"), device'),
    "scale ignored": ("key_dim**-0.5 if scale is None else scale)).transpose", "key_dim**-0.5)).transpose"),
    "window left out": ("Mask(causal, window, prefix_len", "Mask(causal, None, prefix_len"),
    "cache overwritten": ("_gathered(v_cache, page_table)", "_gathered(v_cache.mul_(1.001), page_table)"),
}  # fmt: skip


def planted(bug: str) -> Callable:
    """`chunked` with `bug`."""
    name = "planted_attention_decode"
    sys.modules[name] = module = types.ModuleType(name)
    for code in relations.with_bug(bug, *BUGS[bug], SOURCE):
        exec(code, module.__dict__)
    return module.chunked
