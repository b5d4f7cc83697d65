"""Gated scan in plain torch.

`loop` is the definition, token by token; in float64 it is the truth every backend is measured against. `chunked` is the
differentiable fallback that runs anywhere torch does: inside blocks of tokens the scan doubles its reach with sums of
log gates, so that only numbers ≤ 0 are exponentiated; blocks follow one another. `step` decodes in place.

Payloads come as a tuple here, and so do their states and results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64
Results = tuple[tuple[Tensor, ...] | None, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of gates, sums and states: float64 for float64 payloads, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Layout:
    """Where sequences and chunks lie among the B·T tokens, as index tensors."""

    begin: Tensor  # [N] first token of each sequence
    length: Tensor  # [N]
    position: Tensor  # [B·T] of each token in its sequence
    slot: Tensor | None  # [B·T] of the chunk that ends with this token, else the number of slots
    slots: int

    @classmethod
    def of(cls, g: Tensor, chunk_size: int | None, cu_seqlens: Tensor | None) -> Layout:
        (batch, length, _), device = g.shape, g.device
        if cu_seqlens is None:
            bounds = torch.arange(batch + 1, device=device) * length
        else:
            bounds = cu_seqlens.long()
        begin, lengths = bounds[:-1], bounds[1:] - bounds[:-1]
        token = torch.arange(batch * length, device=device)
        sequence = torch.searchsorted(bounds, token, right=True) - 1  # of several that begin here, the last
        position = token - begin[sequence]
        if chunk_size is None:
            return cls(begin, lengths, position, None, 0)
        if cu_seqlens is None:
            slots = batch * -(-length // chunk_size)
            first = torch.arange(batch, device=device) * -(-length // chunk_size)
        else:
            slots = length // chunk_size + len(begin)
            first = begin // chunk_size + torch.arange(len(begin), device=device)
        last = ((position + 1) % chunk_size == 0) | (position + 1 == lengths[sequence])
        slot = torch.where(last, first[sequence] + position // chunk_size, slots)
        return cls(begin, lengths, position, slot, slots)

    def ends(self, y: Tensor, batch: int) -> Tensor:
        """Rows of y [B·T, D] at the chunk ends, [B, slots / B, D]; 0 in slots that no chunk owns."""
        token = torch.full((self.slots + 1,), len(y), device=y.device)
        assert self.slot is not None
        token[self.slot] = torch.arange(len(y), device=y.device)
        rows = torch.cat([y, y.new_zeros(1, y.shape[1])])[token[:-1]]
        return rows.view(batch, self.slots // max(batch, 1), y.shape[1])


def _weights(g: Tensor, form: str) -> Tensor:
    return -torch.expm1(g) if form == "ema" else torch.ones_like(g)


def _tiled(x: Tensor, g: Tensor) -> Tensor:
    """The payload in the gate's dtype, its channels repeated over the gate's."""
    x = x.to(g.dtype)
    return x if x.shape[2] == g.shape[2] else x.repeat(1, 1, g.shape[2] // x.shape[2])


def loop(
    g: Tensor,
    xs: tuple[Tensor, ...],
    *,
    form: str = "ema",
    chunk_size: int | None = None,
    emit: str = "all",
    initial_state: tuple[Tensor, ...] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Results:
    """y ← e^{g_t} y + w_t x_t, one token at a time; y ← 0 before every chunk but a sequence's first."""
    batch, length, channels = g.shape
    bounds = [0, length] if cu_seqlens is None else cu_seqlens.tolist()
    size = chunk_size or length or 1
    parts = len(bounds) - 1  # sequences along T; without cu_seqlens every batch row is one
    slots = -(-length // size) if cu_seqlens is None else length // size + parts
    gamma, weight = g.exp(), _weights(g, form)
    ys, ends, finals = [], [], []
    for index, x in enumerate(xs):
        written = weight * _tiled(x, g)
        rows = [g.new_zeros(batch, channels)] * length
        end = [g.new_zeros(batch, channels)] * slots
        final = []
        for n, (begin, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            y = g.new_zeros(batch, channels)
            if initial_state is not None:
                y = initial_state[index] if cu_seqlens is None else initial_state[index][n : n + 1]
            first = 0 if cu_seqlens is None else begin // size + n
            for t in range(begin, stop):
                if t > begin and (t - begin) % size == 0:
                    y = torch.zeros_like(y)
                y = gamma[:, t] * y + written[:, t]
                rows[t] = end[first + (t - begin) // size] = y
            final.append(y)
        shape = (batch, 0, channels)
        ys.append((torch.stack(rows, 1) if rows else g.new_zeros(shape)).to(x.dtype))
        ends.append((torch.stack(end, 1) if end else g.new_zeros(shape)).to(x.dtype))
        finals.append(torch.cat(final) + 0.0)
    return (
        tuple(ys) if emit != "ends" else None,
        tuple(ends) if emit != "all" else None,
        tuple(finals) if output_final_state else None,
    )


def _shift(x: Tensor, rows: int) -> Tensor:
    """Row i of the result is row i − rows of x [..., C, D]; zero before the first."""
    return F.pad(x, (0, 0, rows, -rows))


def scan(g: Tensor, written: Tensor, age: Tensor) -> Tensor:
    """y_t = e^{g_t} y_{t−1} + written_t; age [B,T]: tokens since y was last zero, 0 where it is zero before t."""
    batch, length, channels = g.shape
    blocks, pad = -(-length // BLOCK), -length % BLOCK
    total, y = (F.pad(x, (0, 0, 0, pad)).view(batch, blocks, BLOCK, channels) for x in (g, written))
    age = F.pad(age, (0, pad)).view(batch, blocks, BLOCK, 1)
    row = torch.arange(BLOCK, device=g.device)[:, None]
    reach = 1
    while reach < BLOCK:  # total: sum of the log gates, y: sum of what was written, over `reach` tokens
        seen = (age >= reach) & (row >= reach)
        y = y + total.exp() * torch.where(seen, _shift(y, reach), 0)
        total = total + torch.where(seen, _shift(total, reach), 0)
        reach *= 2
    outputs, last = [], g.new_zeros(batch, 1, channels)
    for block in range(blocks):
        before = torch.where(age[:, block] > row, last, 0)
        outputs.append(y[:, block] + total[:, block].exp() * before)
        last = outputs[-1][:, -1:]
    return torch.cat(outputs, 1)[:, :length] if outputs else written


def chunked(
    g: Tensor,
    xs: tuple[Tensor, ...],
    *,
    form: str = "ema",
    chunk_size: int | None = None,
    emit: str = "all",
    initial_state: tuple[Tensor, ...] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Results:
    """All payloads with block-parallel scans; differentiable any number of times."""
    batch, length, channels = g.shape
    layout = Layout.of(g, chunk_size, cu_seqlens)
    position = layout.position.view(batch, length)
    age = position if chunk_size is None else position % chunk_size
    weight, some = _weights(g, form), (layout.length > 0)[:, None]
    ys, ends, finals = [], [], []
    for index, x in enumerate(xs):
        written = weight * _tiled(x, g)
        state = g.new_zeros(len(layout.begin), channels) if initial_state is None else initial_state[index]
        if initial_state is not None and batch * length:
            first = layout.begin.clamp(max=batch * length - 1)
            entered = torch.where(some, g.flatten(0, 1)[first].exp() * state, 0)
            written = written.flatten(0, 1).index_add(0, first, entered).view_as(g)
        exact = scan(g, written, age).flatten(0, 1)
        y = exact.to(x.dtype)
        ys.append(y.view_as(g))
        if emit != "all":
            ends.append(layout.ends(y, batch))
        if output_final_state:
            last = (layout.begin + layout.length - 1).clamp(min=0)
            finals.append(torch.where(some, exact[last], state) if batch * length else state.clone())
    return (
        tuple(ys) if emit != "ends" else None,
        tuple(ends) if emit != "all" else None,
        tuple(finals) if output_final_state else None,
    )


def step(
    g: Tensor,
    x: Tensor,
    state: Tensor,
    *,
    form: str = "ema",
    restart: Tensor | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """One payload's tokens on rows of a state pool, written back in place; index −1 gives 0 and writes nothing."""
    if state.shape[0] == 0:
        return x.new_zeros(g.shape)
    rows = torch.arange(g.shape[0], device=g.device) if state_indices is None else state_indices.long()
    live = (rows >= 0) & (rows < state.shape[0])
    y = state[rows.clamp(0, state.shape[0] - 1)]
    if restart is not None:
        y = torch.where(restart[:, None], 0, y)
    gamma, written, outputs = g.exp(), _weights(g, form) * _tiled(x, g), []
    for t in range(g.shape[1]):
        y = gamma[:, t] * y + written[:, t]
        outputs.append(y)
    state[rows[live]] = y[live]
    return torch.where(live[:, None, None], torch.stack(outputs, 1), 0).to(x.dtype)
