"""What RecurrentMemory and SummaryTokens share: a backbone reads segments and leaves rows for the next ones."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from memattn.nn.inputs import check_state, check_step, check_tokens
from memattn.nn.padding import valid_runs
from memattn.ops import _checks as check
from memattn.state import MemoryState


class MemoryTokensState(MemoryState):
    """Where each sequence stands: what closed segments left, and the open one.

    memory [N, R, D] in the layer's dtype, the newest rows last; closed [N] int64, how many segments were closed;
    position [N] int64, tokens of the open segment; backbone, its state after them (None where it has none).
    """

    fields: ClassVar[tuple[str, ...]] = ("memory", "closed", "position", "backbone")

    def __init__(self, memory: Tensor, closed: Tensor, position: Tensor, backbone: Any) -> None:
        self.memory, self.closed, self.position, self.backbone = memory, closed, position, backbone


class MemoryTokens(nn.Module):
    """Base: the backbone reads [prefix; segment; queries], and its outputs at the queries become memory.

    A subclass says what prefix a memory gives (`_prefix`), which queries are appended (`_queries`) and what their
    outputs make of the memory (`_updated`).

    The backbone is any module with y = backbone(x), x and y [B, n, embed_dim], for every n; it should be causal, or
    tokens see later ones of their segment. If it also has init_state(batch), step(x, state) and
    backbone(x, state, attention_mask=…, return_state=True), as layers of memattn.nn have, then so has this module. If
    not, an open segment cannot be carried: step, padding, packed sequences and states inside a segment are refused.
    """

    def __init__(self, backbone: nn.Module, embed_dim: int, segment_size: int, bptt_depth: int | None) -> None:
        super().__init__()
        for name, value in (("segment_size", segment_size), ("bptt_depth", bptt_depth)):
            if value is not None and value < 1:
                raise ValueError(f"{type(self).__name__}: {name} is {value}; allowed: ≥ 1")
        self.backbone: Any = backbone
        self.embed_dim, self.segment_size, self.bptt_depth = embed_dim, segment_size, bptt_depth
        self.stateful = hasattr(backbone, "init_state")

    def _prefix(self, memory: Tensor, closed: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
        """Rows before a segment [N, P, D] and which of them count [N, P], those last. most: closed [N] is no more."""
        raise NotImplementedError

    def _queries(self, memory: Tensor, closed: Tensor) -> Tensor:
        """Rows after a segment [N, m, D]."""
        raise NotImplementedError

    def _updated(self, memory: Tensor, written: Tensor) -> Tensor:
        """The memory [N, R, D] after outputs [N, m, D] at the queries."""
        raise NotImplementedError

    def _next_segment(self, inner: Any, rows: Tensor) -> Any:
        """The backbone's state where these rows begin a segment."""
        return inner.reset(rows)

    def _empty_memory(self, batch: int) -> Tensor:
        """Zeros [batch, R, D] in the parameters' dtype, on their device."""
        raise NotImplementedError

    def _reset_own(self) -> None:
        """Initialise the parameters that are not the backbone's."""
        raise NotImplementedError

    def _sizes(self, tokens: int, opened: bool) -> list[int]:
        """Lengths of the segments that `tokens` tokens can touch; opened: the first may have begun before them."""
        tokens += self.segment_size - 1 if opened and tokens else 0
        return [self.segment_size] * -(-tokens // self.segment_size)

    def _cut(self, state: MemoryTokensState, n: int, segments: Tensor | None) -> MemoryTokensState:
        """The state where segment n of a call begins, without its history in rows where gradients end there.

        segments [N]: how many the tokens of each row lie in; None without bptt_depth.
        """
        if segments is None or self.bptt_depth is None:
            return state
        ends = n <= segments - self.bptt_depth

        def without_history(owner: MemoryState, name: str, x: Tensor) -> Tensor:
            return torch.where(ends.view(-1, *(1,) * (x.dim() - 1)), x.detach(), x)

        return state._map(without_history)

    def _touched(self, tokens: Tensor, sizes: list[int]) -> Tensor | None:
        """In how many segments of these sizes so many tokens [N] lie, where it matters."""
        if self.bptt_depth is None or not torch.is_grad_enabled():
            return None
        starts = accumulate(sizes, initial=0)
        return sum(((tokens > start).long() for start in starts), torch.zeros_like(tokens))

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the module from the meta device."""
        self.backbone.reset_parameters()
        self._reset_own()

    def init_state(self, batch: int, **options: Any) -> MemoryTokensState:
        """Nothing read yet; `options` go to the backbone's init_state."""
        memory = self._empty_memory(batch)
        none = memory.new_zeros(batch, dtype=torch.int64)
        inner = self.backbone.init_state(batch, **options) if self.stateful else None
        return MemoryTokensState(memory, none, none.clone(), inner)

    def forward(
        self,
        x: Tensor,
        state: MemoryTokensState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, MemoryTokensState]:
        """All tokens at once, for training and prefill.

        x [B, T, embed_dim]. state: where each sequence starts, None for the beginning; it is not changed.
        attention_mask [B, T] bool or integer: one contiguous run of valid (nonzero) tokens per row; only they count,
        the other outputs are 0. cu_seqlens [N+1] int32/int64: x holds N sequences end to end, then B = 1 and the state
        has N rows. Returns y [B, T, embed_dim], or (y, new state) with return_state.
        """
        check_tokens(self, x)
        rows = valid_runs(type(self).__name__, x, attention_mask, cu_seqlens)
        x = x if rows is None else rows.align(x)
        if state is not None:
            check_state(self, state, MemoryTokensState, x.shape[0])
        if self.stateful:
            y, after = self._read(x, state, None if rows is None else rows.length)
        else:
            self._refuse(x, state, rows is not None, return_state)
            y, after = self._read_even(x, state)
        y = y if rows is None else rows.restore(y)
        return (y, after) if return_state else y

    def _read(
        self, x: Tensor, state: MemoryTokensState | None, lengths: Tensor | None
    ) -> tuple[Tensor, MemoryTokensState]:
        """Each row may stand elsewhere in its segment and end elsewhere: segments of equal size, the rest masked."""
        (batch, total), opened = x.shape[:2], state is not None
        state = self.init_state(batch) if state is None else state.clone()
        lengths = torch.full_like(state.position, total) if lengths is None else lengths
        taken, before, sizes = torch.zeros_like(lengths), 0, self._sizes(total, opened)
        segments = self._touched(state.position + lengths, sizes)
        outputs: list[Tensor] = []
        kept = [lengths.new_zeros(batch, 0, dtype=torch.bool)]
        for n, size in enumerate(sizes):
            state = self._cut(state, n, segments)
            # Slot i of the segment holds the row's token taken − position + i.
            slot = torch.arange(size if opened else min(size, total - before), device=x.device)
            token = (taken - state.position)[:, None] + slot
            valid = (slot >= state.position[:, None]) & (token < lengths[:, None])
            y, state = self._read_segment(_picked(x, token, valid), valid, state, size, None if opened else n)
            outputs.append(y)
            kept.append(valid)
            taken, before = taken + valid.sum(1), before + size
        # The row's token t lies in the slot at which the count of valid ones reaches t + 1.
        count = torch.cat(kept, 1).cumsum(1)
        column = torch.searchsorted(count, torch.arange(1, total + 1, device=x.device).repeat(batch, 1))
        y = torch.cat(outputs or [x], 1)
        return _picked(y, column, column < count.shape[1]), state

    def _read_segment(
        self, part: Tensor, valid: Tensor, state: MemoryTokensState, size: int, most: int | None
    ) -> tuple[Tensor, MemoryTokensState]:
        """Slots [N, n, D] of a segment of `size` tokens: rows that begin it see the prefix, full ones the queries."""
        used = valid.sum(1)
        begins, full = (state.position == 0) & (used > 0), state.position + used >= size
        prefix, counts = self._prefix(state.memory, state.closed, most)
        queries = self._queries(state.memory, state.closed)
        mask = torch.cat([counts & begins[:, None], valid, full[:, None].expand(queries.shape[:2])], 1)
        z, inner = self.backbone(
            torch.cat([prefix, part, queries], 1), state.backbone, attention_mask=mask, return_state=True
        )
        _, y, written = z.split([prefix.shape[1], part.shape[1], queries.shape[1]], 1)
        memory = torch.where(full[:, None, None], self._updated(state.memory, written), state.memory)
        position = torch.where(full, 0, state.position + used)
        return y, MemoryTokensState(memory, state.closed + full, position, self._next_segment(inner, full))

    def _read_even(self, x: Tensor, state: MemoryTokensState | None) -> tuple[Tensor, MemoryTokensState]:
        """For a backbone without a state: every row at the start of a segment, all of one length."""
        opened, sizes = state is not None, self._sizes(x.shape[1], False)
        state = self.init_state(x.shape[0]) if state is None else state.clone()
        segments = self._touched(torch.full_like(state.position, x.shape[1]), sizes)
        outputs: list[Tensor] = []
        before = 0
        for n, size in enumerate(sizes):
            state = self._cut(state, n, segments)
            part = x[:, before : before + size]
            before += size
            prefix, _ = self._prefix(state.memory, state.closed, None if opened else n)
            queries = self._queries(state.memory, state.closed)[:, : None if part.shape[1] == size else 0]
            z = self.backbone(torch.cat([prefix, part, queries], 1))
            _, y, written = z.split([prefix.shape[1], part.shape[1], queries.shape[1]], 1)
            outputs.append(y)
            if part.shape[1] == size:
                state = MemoryTokensState(self._updated(state.memory, written), state.closed + 1, state.position, None)
        return torch.cat(outputs or [x], 1), state

    def step(self, x: Tensor, state: MemoryTokensState) -> tuple[Tensor, MemoryTokensState]:
        """One or a few tokens per sequence, for generation: changes `state` and returns it. Without gradients.

        x [B, t, embed_dim], t ≥ 1. Eager calls on the CPU read prefix and queries only when a row begins or ends a
        segment; elsewhere they are read, masked, at every token, since looking would wait for the device.
        """
        name = type(self).__name__
        if not self.stateful:
            raise NotImplementedError(f"{name}: {type(self.backbone).__name__} has no state, so there is no step")
        check_step(self, x, state, MemoryTokensState)
        check.inference_only(name, "forward", x, *self.parameters())
        return torch.cat([self._step(token, state) for token in x.split(1, 1)], 1), state

    def _step(self, x: Tensor, state: MemoryTokensState) -> Tensor:
        begins = state.position == 0
        if _some(begins):
            prefix, counts = self._prefix(state.memory, state.closed, None)
            self._feed(prefix, counts & begins[:, None], state)
        y, _ = self.backbone.step(x, state.backbone)
        state.position.add_(1)
        full = state.position >= self.segment_size
        if _some(full):
            queries = self._queries(state.memory, state.closed)
            written = self._feed(queries, full[:, None].expand(queries.shape[:2]), state)
            memory = self._updated(state.memory, written)
            state.memory.copy_(torch.where(full[:, None, None], memory, state.memory))
            state.closed.add_(full)
            state.position.masked_fill_(full, 0)
            _put(state, self._next_segment(state.backbone, full))
        return y

    def _feed(self, rows: Tensor, mask: Tensor, state: MemoryTokensState) -> Tensor:
        """The backbone reads the rows that count and goes on from there, in place."""
        z, after = self.backbone(rows, state.backbone, attention_mask=mask, return_state=True)
        _put(state, after)
        return z

    def _refuse(self, x: Tensor, state: MemoryTokensState | None, masked: bool, return_state: bool) -> None:
        """What a backbone without a state cannot do."""
        name, backbone = type(self).__name__, type(self.backbone).__name__
        if masked:
            raise NotImplementedError(f"{name}: {backbone} takes no attention_mask, so neither padding nor cu_seqlens")
        if return_state and x.shape[1] % self.segment_size:
            raise NotImplementedError(
                f"{name}: {x.shape[1]} tokens leave a segment open and {backbone} has no state to carry it; allowed "
                f"with return_state: multiples of segment_size {self.segment_size}"
            )


def _picked(x: Tensor, index: Tensor, keep: Tensor) -> Tensor:
    """x[b, index[b, i]] [N, n, D] where keep, else 0."""
    index = index.clamp(0, max(x.shape[1] - 1, 0))[..., None].expand(-1, -1, x.shape[2])
    return torch.where(keep[..., None], x.gather(1, index), x.new_zeros(()))


def _put(state: MemoryTokensState, after: MemoryState) -> None:
    """The backbone's state becomes `after`: in the same tensors, unless a cache has grown."""
    sizes = [[leaf.shape for leaf in pytree.tree_leaves(s) if leaf is not None] for s in (state.backbone, after)]
    if sizes[0] == sizes[1]:
        state.backbone.copy_(after)
    else:
        state.backbone = after


def _some(rows: Tensor) -> bool:
    """False only where values may be read and no row is meant."""
    return not check.values_checked(rows) or bool(rows.any())
