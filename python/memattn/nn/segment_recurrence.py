"""What layers share whose memory is read by every token and written once per segment of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn.inputs import check_state, check_step, check_tokens
from memattn.nn.padding import rows_at, valid_runs
from memattn.ops import _checks as check
from memattn.state import MemoryState


class SlotMemory(MemoryState):
    """slots [N, M, D], float32; written [N] int64, segments written so far: at 0 the layer's initial slots stand in."""

    fields: ClassVar[tuple[str, ...]] = ("slots", "written")

    def __init__(self, slots: Tensor, written: Tensor) -> None:
        self.slots = slots
        self.written = written

    def or_initial(self, initial: Tensor) -> Tensor:
        """The slots, `initial` [M, D] in rows that were never written."""
        return torch.where((self.written == 0)[:, None, None], initial.to(self.slots.dtype), self.slots)


class SegmentState(MemoryState):
    """memory: what earlier segments left. open [N, S, F]: features of the open segment's tokens, of which the first
    filled [N] int64 count, 0 ≤ filled < S; both None where every row stands at the end of a segment.
    """

    fields: ClassVar[tuple[str, ...]] = ("memory", "open", "filled")

    def __init__(self, memory: Any, open: Tensor | None = None, filled: Tensor | None = None) -> None:
        self.memory = memory
        self.open = open
        self.filled = filled


def choose(rows: Tensor, a: MemoryState, b: MemoryState) -> Any:
    """The state with `rows` [N] bool of a and the others of b; their tensors correspond."""
    parts = ((getattr(a, name), getattr(b, name)) for name in a.fields)
    return type(a)(*(torch.where(rows.view(-1, *(1,) * (x.dim() - 1)), x, y.to(x.dtype)) for x, y in parts))


class SegmentRecurrence(nn.Module):
    """Base of Memformer, BlockRecurrentAttention and MemorizingAttention.

    Tokens become features once (`_features`), read the memory that the segments before theirs left (`_read`), and a
    segment is written (`_write`) when its last token has come: a segment of fewer tokens stays open in the state. So a
    sequence may be handed over at any token. A subclass sets embed_dim, segment_len, feature_dim and implements the
    three and `_empty`.
    """

    embed_dim: int
    segment_len: int
    feature_dim: int

    def _empty(self, batch: int, like: Tensor) -> MemoryState:
        raise NotImplementedError

    def _features(self, x: Tensor) -> Tensor:
        """x [B, T, embed_dim] -> [B, T, F], what each token contributes."""
        raise NotImplementedError

    def _read(self, memory: Any, features: Tensor) -> Tensor:
        """Features [B, t ≤ S, F] of a segment from its start -> y [B, t, embed_dim]; causal in the segment."""
        raise NotImplementedError

    def _read_token(self, memory: Any, open: Tensor, filled: Tensor) -> Tensor:
        """y [B, 1, embed_dim] of token filled[b] of the open segments [B, S, F], whose features are already there."""
        raise NotImplementedError

    def _write(self, memory: Any, features: Tensor) -> Any:
        """The memory after a whole segment [B, S, F]."""
        raise NotImplementedError

    def _write_where(self, memory: Any, features: Tensor, rows: Tensor | None) -> Any:
        """`_write` in `rows` [B] bool, the other rows as they were; None: in all."""
        written = self._write(memory, features)
        return written if rows is None else choose(rows, written, memory)

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        for child in cast("Iterator[Any]", self.children()):
            child.reset_parameters()

    def init_state(self, batch: int) -> SegmentState:
        """The empty memory of `batch` sequences on the parameters' device, with room for an open segment."""
        like = next(self.parameters())
        open = like.new_zeros(batch, self.segment_len, self.feature_dim)
        return SegmentState(self._empty(batch, like), open, like.new_zeros(batch, dtype=torch.int64))

    def forward(
        self,
        x: Tensor,
        state: SegmentState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, SegmentState]:
        """All tokens at once, for training and prefill; segments follow one another.

        x [B, T, embed_dim]. state: where each sequence starts, None for empty; it is not changed.
        attention_mask [B, T] bool or integer: one contiguous run of valid (nonzero) tokens per row. The others reach
        nothing, their output is 0, and the returned state is the one after the last valid token.
        cu_seqlens [N+1] int32/int64: x holds N sequences end to end, then B = 1 and the state has N rows.
        Returns y [B, T, embed_dim], or (y, new state) with return_state.
        """
        check_tokens(self, x)
        rows = valid_runs(type(self).__name__, x, attention_mask, cu_seqlens)
        features = self._features(x if rows is None else rows.align(x))
        if state is None:
            state = SegmentState(self._empty(features.shape[0], features))
        check_state(self, state, SegmentState, features.shape[0])
        y, after = self._run(features, state, None if rows is None else rows.length)
        if rows is not None:
            y = rows.restore(y)
        return (y, after) if return_state else y

    def _run(self, features: Tensor, state: SegmentState, lengths: Tensor | None) -> tuple[Tensor, SegmentState]:
        """lengths [B]: valid tokens in front of each row; None: all."""
        batch, tokens, _ = features.shape
        memory, size, total, own = state.memory, self.segment_len, lengths, None
        if state.open is not None and state.filled is not None:  # z: the open segment's tokens, then the new ones
            position = torch.arange(size - 1 + tokens, device=features.device)
            own = torch.arange(tokens, device=features.device) + state.filled[:, None]
            source = torch.where(position < state.filled[:, None], position, position - state.filled[:, None] + size)
            joined = torch.cat([state.open.to(features.dtype), features], 1)
            z = rows_at(joined, source.clamp(max=size + tokens - 1))  # what lies behind total is nobody's
            total = state.filled + (tokens if lengths is None else lengths)
        else:
            z = features
        outputs = [z.new_zeros(batch, 0, self.embed_dim)]
        for start in range(0, z.shape[1], size):
            segment = z[:, start : start + size]
            outputs.append(self._read(memory, segment))
            if segment.shape[1] == size:
                memory = self._write_where(memory, segment, None if total is None else total >= start + size)
        y = torch.cat(outputs, 1)
        memory = memory.clone() if memory is state.memory else memory
        return y if own is None else rows_at(y, own), SegmentState(memory, *self._remainder(z, total))

    def _remainder(self, z: Tensor, total: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The open segment and how full it is after `total` of the tokens z."""
        size = self.segment_len
        if total is None:
            left = z.shape[1] % size
            if left == 0:
                return None, None
            filled = torch.full(z.shape[:1], left, device=z.device)
            return F.pad(z[:, z.shape[1] - left :], (0, 0, 0, size - left)), filled
        filled = total.remainder(size)
        place = torch.arange(size, device=z.device)
        open = rows_at(F.pad(z, (0, 0, 0, size)), (total - filled)[:, None] + place)
        return torch.where((place < filled[:, None])[..., None], open, 0.0), filled

    def step(self, x: Tensor, state: SegmentState) -> tuple[Tensor, SegmentState]:
        """One or a few tokens per sequence, for generation: changes `state` and returns it. Without gradients.

        x [B, t, embed_dim], t ≥ 1. On the CPU a segment is written when a row has come to its end; elsewhere, and when
        compiled, every token pays for a write whose result is kept where that is so, since nobody waits for the device.
        """
        check_step(self, x, state, SegmentState)
        return self._step(x, self._features(x), state)

    def _step(self, x: Tensor, features: Tensor, state: SegmentState) -> tuple[Tensor, SegmentState]:
        name = type(self).__name__
        check.inference_only(f"{name}.step", f"{name}.forward", x, *self.parameters())
        if state.open is None or state.filled is None:
            state.open = features.new_zeros(x.shape[0], self.segment_len, self.feature_dim)
            state.filled = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        open, filled, outputs = state.open, state.filled, []
        for token in features.to(open.dtype).split(1, 1):
            open.scatter_(1, filled[:, None, None].expand_as(token), token)
            outputs.append(self._read_token(state.memory, open.to(features.dtype), filled))
            filled.add_(1)
            full = filled == self.segment_len
            if not check.values_checked(full) or bool(full.any()):
                state.memory.copy_(self._write_where(state.memory, open.to(features.dtype), full))
                filled.masked_fill_(full, 0)
        return torch.cat(outputs, 1), state


def head_dim_of(layer: str, embed_dim: int, num_heads: int) -> int:
    """embed_dim / num_heads, which must be whole and what attention takes."""
    if embed_dim % num_heads:
        raise ValueError(f"{layer}: embed_dim {embed_dim} is no multiple of num_heads {num_heads}")
    if not 16 <= embed_dim // num_heads <= 256:
        raise ValueError(f"{layer}: embed_dim / num_heads is {embed_dim // num_heads}; allowed: 16..256")
    return embed_dim // num_heads
