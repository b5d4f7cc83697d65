"""What softmax layers carry from one call to the next: the keys and values of past tokens, growing or in a ring."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from memattn.ops import _checks as check
from memattn.state import MemoryState

FIRST_ROOM = 64  # slots of a cache that is to grow


class JoinedRows:
    """The rows that a cache holds and, behind them, a call's new ones: one packed sequence per row of the batch.

    The lengths lie on the device, so the packed tensor has room for every slot, and what is left over makes one more
    sequence, which has no queries. `cu_queries` and `cu_keys` [N+2] are the bounds.
    """

    def __init__(self, cache: TokenCache, new: NewRows) -> None:
        held, slots = cache.held(), cache.capacity
        total = cache.batch * slots + new.total
        bounds = torch.nn.functional.pad((held + new.span).cumsum(0), (1, 0))
        self.cu_keys = torch.cat([bounds, bounds.new_full((1,), total)])
        self.cu_queries = torch.cat([new.bounds, new.bounds[-1:]])
        place = torch.arange(total, device=held.device)
        row = torch.searchsorted(bounds[1:], place, right=True)
        real = row < cache.batch
        row = row.clamp(max=cache.batch - 1)
        self.local = local = place - bounds[row]  # place in the own sequence
        self.inner = real & (local > 0)  # rows that follow one of their own sequence
        position = cache._position_of(local, row)
        old = row * slots + cache._slots(position)
        fresh = cache.batch * slots + new.bounds[row] + local - held[row]
        self.index = torch.where(real, torch.where(local < held[row], old, fresh), 0)

    def gather(self, cached: Tensor, new: Tensor) -> Tensor:
        """[1, total, ...] of cached [N, slots, ...] and new [B, T, ...], in new's dtype."""
        rows = torch.cat([cached.flatten(0, 1).to(new.dtype), new.flatten(0, 1)])
        return rows.index_select(0, self.index)[None]


class NewRows:
    """Where the new tokens of each sequence are among those of a call [B, T]: batched, padded at the end, or packed."""

    def __init__(self, x: Tensor, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None) -> None:
        self.batch, self.longest = x.shape[:2]
        self.total = x.shape[0] * x.shape[1]
        self.packed = cu_seqlens is not None
        if cu_seqlens is None:
            self.bounds = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]  # [N+1]
        else:
            self.bounds = cu_seqlens.long()
        self.span = self.bounds.diff()  # [N], padding included
        self.count = self.span if lengths is None else lengths.long()  # [N]

    def rows(self) -> Tensor:
        """[B, T] sequence of every new token."""
        token = torch.arange(self.total, device=self.bounds.device)
        row = torch.searchsorted(self.bounds[1:], token, right=True).clamp(max=max(len(self.bounds) - 2, 0))
        return row.view(self.batch, self.longest)

    def positions(self, before: Tensor) -> Tensor:
        """[B, T] position of every new token in rows that hold `before` [N] tokens."""
        row = self.rows()
        token = torch.arange(self.total, device=before.device).view_as(row)
        return token - self.bounds[row] + before[row]

    def cumulated(self, steps: Tensor, before: Tensor) -> Tensor:
        """Sums of steps [B, T, H] over the tokens of each sequence, from `before` [N, H] on: float64, like it.

        What is not finite stays where it is in packed sequences, so that it cannot reach the next one.
        """
        steps = steps.double()
        if not self.packed:
            return steps.cumsum(1) + before[:, None]
        finite = steps.isfinite()
        sums = torch.nn.functional.pad(torch.where(finite, steps, 0.0)[0].cumsum(0), (0, 0, 1, 0))  # [total + 1, H]
        token = torch.arange(self.total, device=steps.device)
        row = torch.searchsorted(self.bounds[1:], token, right=True).clamp(max=max(len(before) - 1, 0))
        return torch.where(finite, sums[1:] - sums[self.bounds[row]] + before[row], torch.nan)


class TokenCache(MemoryState):
    """Base of the caches: parts [N, slots, ...] with one slot per token, and `length` [N], tokens seen by each row.

    `ring_start` None: the token at position p is in slot p. Else R: slots R… are a ring as in `attention_decode`.
    """

    ring_start: int | None = None
    length: Tensor

    @property
    def capacity(self) -> int:
        """Slots of every row."""
        return int(getattr(self, self.fields[0]).shape[1])

    def held(self) -> Tensor:
        """[N] tokens that each row still holds."""
        return self.length.clamp(max=self.capacity)

    def append(self, *parts: Tensor | None, lengths: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Write t new tokens behind those of each row, in place. Without gradients; `extended` has them.

        parts: [B, t, ...] in the order of `fields`, length left out. lengths [B]: only the first lengths[b] of row b.
        rows [B]: batch row b is row rows[b] of the cache (distinct; −1: nothing is written). No host synchronisation
        while compiling or capturing a CUDA graph; else at most where a growing cache has to look whether it is full.
        """
        new = self._named(parts)
        check.inference_only(f"{type(self).__name__}.append", "extended", *new.values())
        tokens = next(iter(new.values())).shape[1]
        room = self._make_room(tokens)
        row = torch.arange(self.batch, device=self.length.device) if rows is None else rows.long()
        at = row.clamp(min=0)
        step = torch.arange(tokens, device=row.device)
        count = torch.full_like(row, tokens) if lengths is None else lengths.long().to(row.device)
        position = self.length.index_select(0, at)[:, None] + step  # [B, t]
        live = (step < count[:, None]) & (row >= 0)[:, None] & self._lasting(position, count)
        index = (at[:, None] * self.capacity + self._slots(position).clamp(max=self.capacity - 1)).flatten()
        everything = room and lengths is None and rows is None
        for name, x in new.items():
            write_slots(getattr(self, name), index, x, None if everything else live.flatten())
        arrived = self._arrived(position, step < count[:, None]) & (row >= 0)[:, None]
        self.length.index_add_(0, at, arrived.sum(1))

    def extended(self, *parts: Tensor | None, new: NewRows) -> Any:
        """A new cache with the tokens of `new` behind those of each row. Differentiable in both."""
        after = self.length + new.count
        capacity = self._capacity_for(after, new)
        position = self._positions(after, capacity)  # [N, capacity]
        row = torch.arange(self.batch, device=after.device)[:, None]
        old = row * self.capacity + self._slots(position)
        fresh = self.batch * self.capacity + new.bounds[:-1, None] + position - self.length[:, None]
        index = torch.where(position < self.length[:, None], old, fresh)
        kept = position >= 0
        index = torch.where(kept, index, 0).flatten()
        results: dict[str, Tensor | None] = {"length": after}
        for name, x in self._named(parts).items():
            cached = getattr(self, name)
            source = torch.cat([cached.flatten(0, 1), x.flatten(0, 1).to(cached.dtype)])
            source = source if len(source) else cached.new_zeros(1, *cached.shape[2:])
            gathered = source.index_select(0, index).view(self.batch, capacity, *cached.shape[2:])
            results[name] = torch.where(kept.view(*kept.shape, *(1,) * (cached.dim() - 2)), gathered, 0)
        return type(self)(*(results.get(name) for name in self.fields), *self._constants())

    def lookup(self, rows: Tensor | None = None) -> dict[str, Any]:
        """The arguments by which `attention_decode` reads this cache, or its rows `rows` [B] (−1: padding)."""
        if rows is None:
            return {"cache_seqlens": self.length, "ring_start": self.ring_start}
        length = self.length.index_select(0, rows.long().clamp(min=0))
        return {
            "cache_seqlens": torch.where(rows >= 0, length, 0),
            "page_table": rows.int()[:, None],  # a row is a page
            "ring_start": self.ring_start,
        }

    def _parts(self) -> tuple[str, ...]:
        """Names of the tensors that this cache holds of every token."""
        return tuple(name for name in self.fields if name != "length" and getattr(self, name) is not None)

    def _named(self, parts: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
        given = [x for x in parts if x is not None]
        if len(given) != len(self._parts()):
            raise ValueError(
                f"{type(self).__name__}: got {len(given)} tensors of new tokens; expected {', '.join(self._parts())}"
            )
        return dict(zip(self._parts(), given, strict=True))

    def _slots(self, position: Tensor) -> Tensor:
        """The slot of every position; in bounds where the token is held."""
        return position.clamp(min=0)

    def _positions(self, length: Tensor, capacity: int) -> Tensor:
        """[N, capacity] position of the token in each slot of rows of so many tokens; −1: none."""
        slot = torch.arange(capacity, device=length.device).expand(len(length), -1)
        return torch.where(slot < length[:, None], slot, -1)

    def _position_of(self, local: Tensor, row: Tensor) -> Tensor:
        """Position of the local-th token that `row` holds."""
        return local

    def _lasting(self, position: Tensor, count: Tensor) -> Tensor:
        """Whether a written token has a slot of its own."""
        return position < self.capacity

    def _arrived(self, position: Tensor, live: Tensor) -> Tensor:
        """Whether a token counts in `length`."""
        return live & (position < self.capacity)

    def _make_room(self, tokens: int) -> bool:
        """Whether the host knows that so many tokens have slots."""
        raise NotImplementedError

    def _capacity_for(self, length: Tensor, new: NewRows) -> int:
        raise NotImplementedError


class KVCache(TokenCache):
    """All past tokens: k [N, capacity, HKV, K], v [N, capacity, HKV, V], length int64 [N]; c [N, capacity, HQ] or None.

    c is the cumulated log decay of Forgetting Transformer layers, float64. In eager mode `append` doubles a full
    cache. While compiling or capturing a CUDA graph it cannot: what has no slot is dropped and not counted, so
    preallocate with `init_state(batch, max_tokens)`. `extended` always has room.
    """

    fields: ClassVar[tuple[str, ...]] = ("k", "v", "length", "c")

    def __init__(self, k: Tensor, v: Tensor, length: Tensor, c: Tensor | None = None) -> None:
        self.k, self.v, self.length, self.c = k, v, length, c
        self._room: int | None = None  # a bound from below of the free slots of the fullest row; None: not known

    @classmethod
    def empty(
        cls, like: Tensor, batch: int, heads: int, dims: tuple[int, int], max_tokens: int | None = None, decays: int = 0
    ) -> KVCache:
        """No tokens yet, room for max_tokens (None: to grow), of like's dtype and device; `decays` heads of c."""
        capacity = FIRST_ROOM if max_tokens is None else max_tokens
        k, v = (like.new_zeros(batch, capacity, heads, dim) for dim in dims)
        c = like.new_zeros(batch, capacity, decays, dtype=torch.float64) if decays else None
        return cls(k, v, like.new_zeros(batch, dtype=torch.int64), c)

    def lookup(self, rows: Tensor | None = None) -> dict[str, Any]:
        """As the base says, with decay_cache."""
        return {**super().lookup(rows), "decay_cache": self.c}

    def last_decay(self, rows: Tensor | None = None) -> Tensor:
        """c [B, HQ] of the last token of each row, 0 before the first."""
        if self.c is None:
            raise ValueError("last_decay: this cache holds no c")
        at = torch.arange(self.batch, device=self.length.device) if rows is None else rows.long().clamp(min=0)
        if self.capacity == 0:
            return self.c.new_zeros(len(at), self.c.shape[2])
        length = self.length.index_select(0, at)
        last = self.c[at, (length - 1).clamp(min=0)]
        return torch.where((length > 0)[:, None], last, 0.0)

    def copy_(self, other: Any) -> KVCache:
        """Writes `other` into this cache's tensors. Their capacities may differ, as long as the tokens have slots."""
        if not isinstance(other, KVCache):
            return super().copy_(other)  # which refuses it
        if check.values_checked(other.length) and other.length.numel() and int(other.length.max()) > self.capacity:
            raise ValueError(f"copy_: other holds {int(other.length.max())} tokens; expected at most {self.capacity}")
        slots = min(self.capacity, other.capacity)
        super(KVCache, self._first(slots)).copy_(other._first(slots))
        self._room = None
        return self

    def _first(self, slots: int) -> KVCache:
        """A view of the first slots."""
        c = None if self.c is None else self.c[:, :slots]
        return KVCache(self.k[:, :slots], self.v[:, :slots], self.length, c)

    def _make_room(self, tokens: int) -> bool:
        if torch.compiler.is_compiling():
            self._room = None
            return False
        if self.length.is_meta or (self.length.is_cuda and torch.cuda.is_current_stream_capturing()):
            return False
        if self._room is None or self._room < tokens:
            self._room = self.capacity - (int(self.length.max()) if self.batch else 0)
        if self._room < tokens:
            more = max(self.capacity, tokens - self._room)
            self._room += more
            for name in self._parts():
                part = getattr(self, name)
                setattr(self, name, torch.cat([part, part.new_zeros(len(part), more, *part.shape[2:])], 1))
        self._room -= tokens
        return True

    def _capacity_for(self, length: Tensor, new: NewRows) -> int:
        if torch.compiler.is_compiling() or length.is_meta or not len(length):
            return self.capacity + new.longest
        return max(self.capacity, int(length.max()))


class RingCache(TokenCache):
    """Base of the caches of fixed size: the first R = ring_start tokens, and the last of the others in a ring."""

    ring_start: int = 0

    @property
    def ring(self) -> int:
        """Slots of the ring."""
        return self.capacity - self.ring_start

    def _slots(self, position: Tensor) -> Tensor:
        turned = self.ring_start + (position - self.ring_start).remainder(self.ring)
        return torch.where(position < self.ring_start, position.clamp(min=0), turned)

    def _positions(self, length: Tensor, capacity: int) -> Tensor:
        slot = torch.arange(capacity, device=length.device)
        turn = torch.div(length[:, None] - 1 - slot, self.ring, rounding_mode="floor")
        turn = torch.where(slot < self.ring_start, turn.clamp(max=0), turn)
        return torch.where(turn < 0, -1, slot + turn * self.ring)

    def _position_of(self, local: Tensor, row: Tensor) -> Tensor:
        oldest = (self.length - self.ring).clamp(min=self.ring_start)  # of the ring
        return torch.where(local < self.ring_start, local, local - self.ring_start + oldest[row])

    def _lasting(self, position: Tensor, count: Tensor) -> Tensor:
        end = position[:, :1] + count[:, None]
        return (position < self.ring_start) | (position >= end - self.ring)

    def _arrived(self, position: Tensor, live: Tensor) -> Tensor:
        return live

    def _make_room(self, tokens: int) -> bool:
        return tokens <= self.ring

    def _capacity_for(self, length: Tensor, new: NewRows) -> int:
        return self.capacity


class WindowCache(RingCache):
    """The first R = ring_start tokens and the last of the others: k, v [N, R + ring, HKV, ·], length int64 [N]."""

    fields: ClassVar[tuple[str, ...]] = ("k", "v", "length")
    constants: ClassVar[tuple[str, ...]] = ("ring_start",)

    def __init__(self, k: Tensor, v: Tensor, length: Tensor, ring_start: int = 0) -> None:
        self.k, self.v, self.length, self.ring_start = k, v, length, ring_start

    @classmethod
    def empty(
        cls, like: Tensor, batch: int, heads: int, dims: tuple[int, int], window: int, ring_start: int = 0
    ) -> WindowCache:
        """No tokens yet; a ring of `window` slots behind ring_start fixed ones, of like's dtype and device."""
        k, v = (like.new_zeros(batch, ring_start + window, heads, dim) for dim in dims)
        return cls(k, v, like.new_zeros(batch, dtype=torch.int64), ring_start)


class HiddenMemory(RingCache):
    """The last inputs of a layer: x [N, memory, embed_dim] in a ring, length int64 [N]."""

    fields: ClassVar[tuple[str, ...]] = ("x", "length")

    def __init__(self, x: Tensor, length: Tensor) -> None:
        self.x, self.length = x, length


def write_slots(cache: Tensor, index: Tensor, values: Tensor, live: Tensor | None) -> None:
    """cache [N, slots, ...], as one list of slots, takes values [B, t, ...] at `index` [B · t], where `live`.

    What is not live repeats what a live one writes, or what is there if none is: no two writes ever differ.
    """
    slots, values = cache.view(-1, *cache.shape[2:]), values.flatten(0, 1).to(cache.dtype)
    if live is not None and len(index):
        one = live.to(torch.int8).argmax(keepdim=True)
        shape = (-1, *(1,) * (values.dim() - 1))
        there = index.index_select(0, one)
        repeat = torch.where(
            live.index_select(0, one).view(shape), values.index_select(0, one), slots.index_select(0, there)
        )
        values, index = torch.where(live.view(shape), values, repeat), torch.where(live, index, there)
    slots.index_copy_(0, index, values)
