"""Planted bugs: the plain-torch attention with one wrong line each. The relations must catch every one of them."""

# ruff: noqa: E501 (tables, one case a line)
from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable

from memattn.reference import attention, attention_mask
from support import relations

IMPORT = "from memattn.reference.attention_mask import Mask\n"
SOURCES = (inspect.getsource(attention_mask), inspect.getsource(attention).replace(IMPORT, ""))
# Where: what is there -> what is put in its place.
BUGS = {
    "causal mask strict": ("seen & (j <= i)", "seen & (j < i)"),
    "causal mask one ahead": ("seen & (j <= i)", "seen & (j <= i + 1)"),
    "window without the query itself": ("seen & (i - j < self.window)", "seen & (i - j <= self.window)"),
    "window ignored": ("seen & (i - j < self.window)", "seen"),
    "range of the window one short": ("max(begin, i - self.window + 1)", "max(begin, i - self.window + 2)"),
    "prefix bound by the window": ("return seen | (j < self.prefix_len)", "return seen"),
    "prefix one long": ("return seen | (j < self.prefix_len)", "return seen | ((j <= self.prefix_len) & (self.prefix_len > 0))"),
    "summary of the open chunk seen": ("seen & (i // sizes[0] > j)", "seen & (i // sizes[0] >= j)"),
    "block-causal is block-local": ("ahead >= 0 if", "ahead == 0 if"),
    "block-local sees earlier blocks": ("else ahead == 0", "else ahead >= 0"),
    "block-causal looks ahead": ("ahead >= 0 if", "ahead >= -1 if"),
    "dilated grid shifted": ("(j + 1) % dilation == 0", "j % dilation == 0"),
    "dilated window one long": ("(i - j < window) |", "(i - j <= window) |"),
    "dilated prefix ignored": ("(i - j < window) | (j < prefix)", "(i - j < window)"),
    "partial tile called full": ("end <= least[1] and not thinned", "end <= most[1] and not thinned"),
    "q_offset left out of the mask": ("positions_q = i[a:b]", "positions_q = row[a:b]"),
    "q_offset left out of the decay": ("_decays(decay, i, sequence_q", "_decays(decay, row, sequence_q"),
    "queries at the end of the longest keys": ("row + (cu_seqlens_k.long().diff() - cu_seqlens_q.long().diff())[sequence], 0", "row + (cu_seqlens_k.long().diff() - cu_seqlens_q.long().diff()).max(), 0"),
    "queries at the end stay at the start": ("return row + difference, difference", "return row, 0"),
    "decay reversed": ("(decay_q[..., :, None] - decay_k[..., None, :])", "(decay_k[..., None, :] - decay_q[..., :, None])"),
    "decay summed in float32": ("log_decay.double().cumsum(1)", "log_decay.float().cumsum(1).double()"),
    "decay rounded before the difference": ("(decay_q[..., :, None] - decay_k[..., None, :]).to(s.dtype)", "(decay_q[..., :, None].to(s.dtype) - decay_k[..., None, :].to(s.dtype))"),
    "alibi from the end": ("slopes = -position[:, None]", "slopes = position[:, None]"),
    "sink ignored": ("s = torch.cat([sink[..., None, None].expand(*s.shape[:-1], 1), s], -1)", "s = torch.cat([s[..., :1] * 0 - torch.inf, s], -1)"),
    "first of several sinks only": ("sink.to(dtype).logsumexp(-1)", "sink.to(dtype)[:, 0]"),
    "sink in the output, not in lse": ("return o, lse.masked_fill(empty, -torch.inf)", "return o, s[..., s.shape[-1] - k.shape[-2] :].logsumexp(-1)"),
    "merged result ignored": ("s = torch.cat([first_lse[..., None], s], -1)", "s = torch.cat([first_lse[..., None] - torch.inf, s], -1)"),
    "merged value without weight": ("p @ v + weights[..., :1] * first_o", "p @ v + first_o"),
    "merged score without value": ("p @ v + weights[..., :1] * first_o", "p @ v"),
    "merged value with the sink's weight": ("weights[..., :1] * first_o", "weights[..., (0 if sink is None else 1) : (1 if sink is None else 2)] * first_o"),
    "merged result of other heads": ("tuple(_grouped(x.to(dtype), key_heads, head_map) for x in merge)", "tuple(_grouped(x.to(dtype).flip(2), key_heads, head_map) for x in merge)"),
    "merged result of other rows": ("else x[:, :, :, a:b] for x in taken_up", "else x[:, :, :, : b - a] for x in taken_up"),
    "merged score detached": ("s = torch.cat([first_lse[..., None], s], -1)", "s = torch.cat([first_lse[..., None].detach(), s], -1)"),
    "lse in base 2": ("lse.masked_fill(empty, -torch.inf)", "lse.masked_fill(empty, -torch.inf) / 0.6931471805599453"),
    "lse detached": ("lse.masked_fill(empty, -torch.inf)", "lse.detach().masked_fill(empty, -torch.inf) + 0 * s.sum(-1).nan_to_num()"),
    "empty rows not guarded": ("lse = s.masked_fill(empty[..., None], 0.0).logsumexp(-1)", "lse = s.logsumexp(-1)"),
    "heads tiled for gqa": ('x if head_map == "gqa" else', 'x if head_map == "tile" else'),
    "keys of the wrong head": ('    if head_map == "gqa":\n        return x.unflatten', '    if head_map != "gqa":\n        return x.unflatten'),
    "packed sequences leak": ("(i[1][:, None] == j[1])", "(i[1][:, None] >= j[1])"),
    "packed positions run on": ("return token - bounds.long()[sequence], sequence", "return token, sequence"),
    "scale ignored": ("if scale is None else scale)", "if True else scale)"),
    "weights in bfloat16": ("o = p @ v if", "o = p.bfloat16().to(p.dtype) @ v if"),
    "v overwritten": ("outputs, lses = [], []\n    for a", "v.requires_grad or v.mul_(1.001)\n    outputs, lses = [], []\n    for a"),
    "last block of queries lost": ("o, lse = torch.cat(outputs, 3)", "outputs[1:] = [0 * x for x in outputs[1:]]; o, lse = torch.cat(outputs, 3)"),
}  # fmt: skip


def planted(bug: str) -> Callable:
    """`chunked` with `bug`."""
    name = "planted_attention"
    sys.modules[name] = module = types.ModuleType(name)  # dataclasses look their module up
    for code in relations.with_bug(bug, *BUGS[bug], *SOURCES):
        exec(code, module.__dict__)
    return module.chunked
