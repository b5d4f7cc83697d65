"""Planted bugs: the plain-torch sparse_attention with one wrong line each. The relations must catch every one."""

# ruff: noqa: E501 (tables, one case a line)
from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable

from memattn.reference import sparse_attention
from support import relations

SOURCE = inspect.getsource(sparse_attention)
# Where: what is there -> what is put in its place.
BUGS = {
    "padding read as entry 0": ("seen = (entries >= 0)[..., None]", "seen = (entries >= -1)[..., None]; j = j.clamp(min=0)"),
    "entry 0 taken for padding": ("seen = (entries >= 0)[..., None]", "seen = (entries > 0)[..., None]"),
    "blocks one token late": ("* unit + torch.arange(unit", "* unit + 1 + torch.arange(unit"),
    "first token of a block only": ("j.masked_fill(~seen, -1)", "j.masked_fill(~(seen & (j % unit == 0)), -1)"),
    "last entry of a list lost": ("j.masked_fill(~seen, -1)", "torch.cat([j[:, :, :-1].masked_fill(~seen[:, :, :-1], -1), -torch.ones_like(j[:, :, -1:])], 2)"),
    "query does not see itself": ("seen & (j <= last", "seen & (j < last"),
    "future of the block leaks": ("seen & (j <= last[:, None, None, None])", "seen & (j // unit <= last[:, None, None, None] // unit)"),
    "one position for all queries": ("seen & (j <= last[:, None, None, None])", "seen & (j <= last.max())"),
    "counts one long": ("< used[..., None])", "<= used[..., None])"),
    "counts one short": ("< used[..., None])", "< used[..., None] - 1)"),
    "partial block reads on": ("there = (j >= 0) & (j < self.lengths[n])", "there = (j >= 0) & (self.starts[n] + j < self.starts[-1] + self.lengths[-1])"),
    "last token of a sequence lost": ("(j < self.lengths[n])", "(j < self.lengths[n] - 1)"),
    "sequence starts ignored": ("return self.starts[n] + j, there", "return j, there"),
    "page of the block, not of the token": ("(j // self.size).clamp(", "(j // self.size // 2).clamp("),
    "row in the page forgotten": ("page * self.size + j % self.size", "page * self.size + 0 * j"),
    "missing page read": ("there & (page >= 0) & (page < self.pages)", "there"),
    "pages of another sequence": ("self.table.long()[n, ", "self.table.long()[0 * n, "),
    "bias left out": ("s = s + bias.to(q.dtype).repeat_interleave(unit, -1)[:, :, None]", "pass"),
    "bias tiled over a block": ("repeat_interleave(unit, -1)", "repeat(1, 1, unit)"),
    "bias scaled": ("s = s + bias.to", "s = s + q.shape[3] ** -0.5 * bias.to"),
    "bias detached": ("bias.to(q.dtype)", "bias.detach().to(q.dtype)"),
    "sink in the output": ("[..., 0 if sink is None else 1 :]", "[..., : s.shape[-1] - (sink is not None)]"),
    "sinks summed, not logsumexp": ("one_sink(sink, dtype).view", "(sink if sink.dim() == 1 else sink.sum(-1)).to(dtype).view"),
    "heads of a sink mixed": ("one_sink(sink, dtype).view(key_heads, -1)", "one_sink(sink, dtype).view(-1, key_heads).T.contiguous()"),
    "heads tiled instead of grouped": (".unflatten(1, (key_heads, -1))", ".unflatten(1, (-1, key_heads)).transpose(1, 2).contiguous()"),
    "list of the first head for all": ("found = x[rows, torch.arange(x.shape[1], device=x.device)[:, None]]", "found = x[rows[:, 0]].transpose(1, 2)"),
    "lse in base 2": ("lse.masked_fill(empty, -torch.inf)\n", "lse.masked_fill(empty, -torch.inf) / 0.6931471805599453\n"),
    "lse detached": ("lse.masked_fill(empty, -torch.inf)\n", "lse.masked_fill(empty, -torch.inf).detach() + 0 * s.nan_to_num(0, 0, 0).sum(-1)\n"),
    "empty rows not guarded": ("s.masked_fill(empty[..., None], 0.0).logsumexp(-1) if", "s.logsumexp(-1) if"),
    "unnamed tokens enter": ("torch.where(seen[..., None], found, 0.0)", "found"),
    "scale ignored": ("key_dim**-0.5 if scale is None else scale)).flatten", "key_dim**-0.5)).flatten"),
    "duplicates dropped": ("    rows = rows.masked_fill(~seen, 0)\n", "    rows = rows.masked_fill(~seen, 0)\n    seen = seen & ~((rows[..., None] == rows[..., None, :]) & seen[..., None, :]).tril(-1).any(-1)\n"),
    "values overwritten": ("k, v = k.flatten(0, 1), v.flatten(0, 1)\n", "v.requires_grad or v.mul_(1.001)\n    k, v = k.flatten(0, 1), v.flatten(0, 1)\n"),
}  # fmt: skip


def planted(bug: str) -> Callable:
    """`chunked` with `bug`."""
    name = "planted_sparse_attention"
    sys.modules[name] = module = types.ModuleType(name)
    for code in relations.with_bug(bug, *BUGS[bug], SOURCE):
        exec(code, module.__dict__)
    return module.chunked
