"""RAT and RAT+ from the Triton kernels of other ops, each with its own backward, and plain torch between them:

    average (gated scan) → rotary → attention over the entries → joined with the own entry, and with the state's entries

RAT: the scan restarts in every chunk, its ends are the keys of the summary rule, the own entry is exact and joined by
its log-sum-exp scale · q·k̃. RAT+: one scan, every row is a key of the dilated rule, which sees the own entry as kept.

Sequences that go on from a state are laid out anew, packed, each behind as many neutral rows (g = 0, k = v = 0) as its
chunk already has: then chunks begin at multiples of L again, wherever the rows of a batch stand. Every token of a
sequence sees all entries of its state: a call of attention without a mask. Nothing is read by the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from memattn.ops._library import resolve
from memattn.reference.attention import joined
from memattn.reference.rat_attention import Parts, Rule, group
from memattn.reference.rotary import rotate

NO_MASK = (0,) * 9


@dataclass(frozen=True)
class Rows:
    """Rows [B, T] that hold sequences: one in each batch row, or packed by cu_seqlens (then B = 1).

    start [N] is the position of each sequence's first row, a multiple of the stride, or None for 0.
    """

    batch: int
    length: int
    cu_seqlens: Tensor | None
    start: Tensor | None
    device: torch.device

    def chunks(self, size: int) -> Rows:
        """Rows of one chunk each, as the gated scan lays out its ends."""
        start = None if self.start is None else self.start // size
        if self.cu_seqlens is None:
            return Rows(self.batch, -(-self.length // size), None, start, self.device)
        n = self.cu_seqlens.shape[0] - 1
        bounds = self.cu_seqlens // size + torch.arange(n + 1, device=self.device, dtype=self.cu_seqlens.dtype)
        return Rows(1, self.length // size + n, bounds, start, self.device)

    @property
    def first(self) -> Tensor:
        """[N]: each sequence's first row, counted over all rows."""
        if self.cu_seqlens is None:
            return torch.arange(self.batch, device=self.device) * self.length
        return self.cu_seqlens[:-1].long()

    def positions(self) -> Tensor:
        """[T]: the position of each row in its sequence, whatever where nobody owns it."""
        if self.cu_seqlens is None:
            return torch.arange(self.length, device=self.device)
        n, position = numbered(self.cu_seqlens, self.length)
        return position if self.start is None else position + self.start[n]


@dataclass(frozen=True)
class Form:
    """The settings of a call."""

    rule: Rule
    rope_base: float | None
    head_map: str
    scale: float


def numbered(bounds: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of rows 0..size − 1: the sequence in the packed order of `bounds` [N+1], and which of its rows it is."""
    bounds, row = bounds.long(), torch.arange(size, device=bounds.device)
    n = torch.searchsorted(bounds[1:], row, right=True).clamp(max=bounds.shape[0] - 2)
    return n, row - bounds[n]


def taken(x: Tensor, index: Tensor, there: Tensor) -> Tensor:
    """Rows x[index] of x [R, HV, K], 0 where not `there`."""
    if not x.shape[0]:
        return x.new_zeros(*index.shape, *x.shape[1:])
    rows = x.index_select(0, index.clamp(0, x.shape[0] - 1).flatten()).unflatten(0, index.shape)
    return torch.where(there[..., None, None], rows, 0)


def attend(
    q: Tensor, entries: tuple[Tensor, Tensor], bounds_q: Tensor | None, bounds_k: Tensor | None,
    mask: tuple[int, ...], scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Triton attention: o in float32 (float64 with float64 q), and its log-sum-exp."""
    tensors = (x.contiguous() for x in (q, *entries))
    bounds = bounds_q, bounds_k
    o, lse = resolve("attention_triton")(*tensors, None, None, *bounds, None, None, *mask, False, scale)
    return o.to(lse.dtype), lse


def aligned(start: Tensor, lengths: Tensor, tokens: int, stride: int) -> tuple[Rows, Tensor]:
    """Rows in which every sequence begins at a multiple of stride, and the row of each token."""
    n, behind = start.shape[0], start % stride
    bounds = pad((behind + lengths).cumsum(0), (1, 0))
    token_n, token = numbered(pad(lengths.cumsum(0), (1, 0)), tokens)
    rows = Rows(1, tokens + n * (stride - 1), bounds, start - behind, start.device)
    return rows, bounds[token_n] + behind[token_n] + token


def spread(x: Tensor, row: Tensor, size: int) -> Tensor:
    """Tokens [B, T, ...] in their rows of [1, size, ...], the others 0."""
    return x.new_zeros(size, *x.shape[2:]).index_copy(0, row, x.flatten(0, 1))[None]


def restarted(average: Tensor, start: Tensor, restart: int) -> Tensor:
    """The running average [N, HV, K] that the next token sees: 0 where a chunk begins."""
    return torch.where((start % restart == 0)[:, None, None], 0, average) if restart else average


def held_entries(keys: Tensor, values: Tensor, used: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The first used[n] rows of keys, values [N, C, HV, K], packed, and the bounds of the sequences."""
    bounds = pad(used.cumsum(0), (1, 0))
    n, c = numbered(bounds, keys.shape[0] * keys.shape[1])
    index, there = n * keys.shape[1] + c, c < used[n]
    packed_keys, packed_values = (taken(x.flatten(0, 1), index, there)[None] for x in (keys, values))
    return (packed_keys, packed_values), bounds


def forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Parts | None, cu_seqlens: Tensor | None, form: Form,
    output_final_state: bool, room: int,
) -> tuple[Tensor, Parts | None]:  # fmt: skip
    """o and the tensors of the final state, which has room for `room` entries more than the initial one."""
    batch, length = q.shape[:2]
    if cu_seqlens is None:
        lengths = torch.full((batch,), length, device=q.device)
    else:
        lengths = cu_seqlens.diff().long()
    rows, row = Rows(batch, length, cu_seqlens, None, q.device), None
    if state is not None and batch:
        rows, row = aligned(state[4], lengths, batch * length, form.rule.stride)
        q, k, v, g = (spread(x, row, rows.length) for x in (q, k, v, g))
    queries, keys = (group(x.to(g.dtype), v.shape[2], form.head_map) for x in (q, k))
    tensors = keys, v.to(g.dtype), g
    (key, value), entry_rows, entries, running = average(*tensors, state, rows, form.rule, output_final_state)
    turned_keys = rotate(entries[0], entry_rows.positions(), form.rope_base)
    entries = turned_keys.to(q.dtype), entries[1].to(q.dtype)
    o = softmax(queries, key, value, q.dtype, rows, entries, entry_rows, None if row is None else state, form)
    if row is not None:
        o = o[0].index_select(0, row).view(batch, length, *o.shape[2:])
    if not output_final_state:
        return o, None
    return o, final_state(form.rule, entry_rows, entries, running, state, lengths, room)


def average(keys, values, g, state, rows, rule, output_final_state):
    """k̃ and ṽ of every row; the rows that hold entries, and these; k̃ and ṽ after each sequence, if asked for."""
    before: tuple[Tensor | None, ...] = (None, None)
    if rows.start is not None:
        before = tuple(restarted(x, state[4], rule.restart).flatten(1).contiguous() for x in state[2:4])
    tensors = (x.flatten(2).contiguous() for x in (g, keys, values))
    settings = True, rule.restart, True, rule.restart > 0, output_final_state
    results = resolve("gated_scan_triton")(*tensors, *before, rows.cu_seqlens, *settings)
    shape = values.shape[2:]
    own = tuple(x.unflatten(2, shape) for x in results[:2])
    running = tuple(x.unflatten(1, shape) for x in results[4:]) if output_final_state else None
    if not rule.restart:
        return own, rows, own, running
    return own, rows.chunks(rule.stride), tuple(x.unflatten(2, shape) for x in results[2:4]), running


def softmax(queries, key, value, dtype, rows, entries, entry_rows, state, form: Form) -> Tensor:
    """o over new entries, the own one (key, value), and the state's."""
    rule = form.rule
    q = rotate(queries, rows.positions() // rule.unit, form.rope_base).to(dtype)
    seen = (rule.stride, 0, 0, 0) if rule.restart else (0, rule.stride, rule.window, rule.prefix)
    parts = [attend(q, entries, rows.cu_seqlens, entry_rows.cu_seqlens, (1, 0, 0, 0, *seen, 0), form.scale)]
    if rule.restart:
        parts.append((value, form.scale * (queries * key).sum(-1)))
    if state is not None and state[0].shape[1]:
        held, bounds = held_entries(state[0], state[1], state[4] // rule.stride)
        parts.append(attend(q, held, rows.cu_seqlens, bounds, NO_MASK, form.scale))
    outputs, lses = zip(*parts, strict=True)
    return (outputs[0] if len(parts) == 1 else joined(outputs, lses)[0]).to(dtype)


def final_state(rule, rows, entries, running, state, lengths, room) -> Parts:
    """Entries of the state and new ones, out of those of `rows`; running averages; prefix and window."""
    n, first, spacing = lengths.shape[0], rows.first[:, None], 1 if rule.restart else rule.stride
    flat, device = [x.flatten(0, 1) for x in entries], lengths.device
    old, start = [x.new_zeros(n, 0, *x.shape[1:]) for x in flat], torch.zeros_like(lengths)
    if state is not None:
        old, start = state[:2], state[4]
        empty = (lengths == 0)[:, None, None]
        running = tuple(torch.where(empty, x, y) for x, y in zip(state[2:4], running, strict=True))
    held, after = (start // rule.stride)[:, None], start + lengths
    slot = torch.arange(old[0].shape[1] + room, device=device)[None]
    used, index = slot < held, first + (slot - held + 1) * spacing - 1
    there = ~used & (slot < (after // rule.stride)[:, None])
    grid = (
        torch.where(used[..., None, None], pad(x, (0, 0, 0, 0, 0, room)), taken(y, index, there))
        for x, y in zip(old, flat, strict=True)
    )
    if not rule.local:
        return (*grid, *running, after, None, None)
    position = torch.arange(rule.prefix, device=device).expand(n, -1)
    if rule.recent:
        ring = rule.recent_position(torch.arange(rule.recent, device=device), after[:, None])
        position = torch.cat((position, ring), 1)
    local = (taken(x, first + position, (position >= 0) & (position < after[:, None])) for x in flat)
    return (*grid, *running, after, *local)
