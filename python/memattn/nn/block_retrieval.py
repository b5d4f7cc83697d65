"""What layers that look into a growing memory by a list share: summarise, score, select, attend to what was chosen.

    summaries r_j of the blocks of keys → scores s_tj → the best of each query → attention over their tokens alone

A layer derived from `BlockRetrieval` says how its summaries are made and how it attends; this file keeps them, beside
the keys, for training, prefill and generation: all three run the layer's one `_attend`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from memattn.nn.attention_layer import CachedAttention
from memattn.nn.inputs import check_sizes, check_state
from memattn.nn.kv_cache import KVCache, NewRows, write_slots
from memattn.nn.padding import valid_runs
from memattn.nn.rotary import rotary
from memattn.ops.attention import attention
from memattn.ops.attention_decode import attention_decode
from memattn.ops.sparse_attention import sparse_attention
from memattn.ops.topk import topk
from memattn.state import MemoryState

MOST_SCORES = 1 << 24  # that are held at once while blocks are chosen
MOST_CHOSEN = 4096  # entries of a list


class BlockRetrievalState(MemoryState):
    """cache: all past tokens. summaries [N, blocks, HKV, F] of their blocks, or None where tokens are scored.

    Block j holds the tokens j·stride … j·stride + block − 1. What a summary holds before its block is full is not seen.
    """

    fields: ClassVar[tuple[str, ...]] = ("cache", "summaries")

    def __init__(self, cache: KVCache, summaries: Tensor | None = None) -> None:
        self.cache, self.summaries = cache, summaries

    @property
    def length(self) -> Tensor:
        """[N] tokens that each row has seen."""
        return self.cache.length

    def copy_(self, other: Any) -> BlockRetrievalState:
        """Writes `other` into this memory's tensors. Their capacities may differ, as long as the tokens have slots."""
        if not isinstance(other, BlockRetrievalState):
            return super().copy_(other)  # which refuses it
        self.cache.copy_(other.cache)
        if self.summaries is not None and other.summaries is not None:
            blocks = min(self.summaries.shape[1], other.summaries.shape[1])
            self.summaries[:, :blocks].copy_(other.summaries[:, :blocks])
        return self


@dataclass(frozen=True)
class Seen:
    """What the queries of a call [B, S] look at: `cache` and its summaries, each query up to its position [B, S].

    pages: the cache's row of each row of the batch [B, 1], None: its own. summaries: of the batch's rows.
    nearby: the layer's attention without a list, by `_mask`. stepping: token by token.
    """

    cache: KVCache
    summaries: Tensor | None
    positions: Tensor
    pages: Tensor | None
    nearby: Callable[[], Tensor]
    stepping: bool = False


class BlockRetrieval(CachedAttention):
    """Base of the layers: they set block and stride, and define `_summarise` and `_attend`."""

    state_type = BlockRetrievalState
    block: int
    stride: int

    def __init__(
        self, embed_dim: int, num_heads: int, *, block: int, stride: int | None = None, **settings: Any
    ) -> None:
        super().__init__(embed_dim, num_heads, **settings)
        check_sizes(self, block_size=block)
        self.block, self.stride = block, block if stride is None else stride

    def _check_chosen(self, **entries: int) -> None:
        check_sizes(self, **entries)
        for argument, n in entries.items():
            if n > MOST_CHOSEN:
                raise ValueError(f"{type(self).__name__}: {argument} is {n}; allowed: 1..{MOST_CHOSEN}")

    def _tokens(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        """Queries [B, T, HQ, D], and what the cache keeps of every token: keys, values, then the layer's own."""
        q, k, v = self._heads(x)
        if self.rope_base is not None:
            q, k = (rotary(y, positions, self.rope_base) for y in (q, k))
        return q, k, v

    def _summarise(self, k: Tensor, v: Tensor) -> Tensor | None:
        """Summaries [N, ⌈T/stride⌉, HKV, F] of all blocks of k, v [N, T, HKV, D]; None: the layer has none."""
        raise NotImplementedError

    def _attend(self, q: Tensor, x: Tensor, seen: Seen) -> Tensor:
        """q, and the layer's input x [B, S, embed_dim] → o [B, S, HQ, D]."""
        raise NotImplementedError

    def _cache(self, batch: int, max_tokens: int | None) -> BlockRetrievalState:
        weight = self.qkv_proj.weight
        cache = self._token_cache(weight, batch, max_tokens)
        with torch.no_grad():
            return BlockRetrievalState(cache, self._summarise(cache.k, cache.v))

    def _token_cache(self, like: Tensor, batch: int, max_tokens: int | None) -> KVCache:
        return KVCache.empty(like, batch, self.num_kv_heads, (self.head_dim, self.head_dim), max_tokens)

    def _mask(self) -> dict[str, Any]:
        return {}

    def forward(
        self,
        x: Tensor,
        state: BlockRetrievalState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """All tokens at once, for training and prefill; arguments and result as in `CachedAttention.forward`."""
        self._padded(x, None, None)
        runs = valid_runs(type(self).__name__, x, attention_mask, cu_seqlens)
        rows = x if runs is None else runs.align(x)
        new = NewRows(rows, None if runs is None else runs.length)
        if state is not None:
            check_state(self, state, self.state_type, len(new.count))
        before = new.count.new_zeros(new.count.shape) if state is None else state.length
        positions = new.positions(before)
        q, *parts = self._tokens(rows, positions)
        if state is None:
            kept = [part.to(self.qkv_proj.weight.dtype) if return_state else part for part in parts]
            cache = self._new_cache([part.contiguous() for part in kept], new.count.clone())
        else:
            cache = state.cache.extended(*parts, new=new)
        summaries = self._summarise(cache.k, cache.v)

        def nearby() -> Tensor:
            if state is None:
                return attention(q, parts[0], parts[1], backend=self.backend, **self._mask()).o
            return self._over_cache(q, parts[0], parts[1], None, state.cache, new).o

        y = self._readout(self._attend(q, rows, Seen(cache, summaries, positions, None, nearby)), rows)
        y = y if runs is None else runs.restore(y)
        return (y, BlockRetrievalState(cache, summaries)) if return_state else y

    def _new_cache(self, parts: list[Tensor], length: Tensor) -> KVCache:
        return KVCache(parts[0], parts[1], length)

    def _step(self, x: Tensor, state: BlockRetrievalState, rows: Tensor | None) -> Tensor:
        length = state.length.clone() if rows is None else state.length.index_select(0, rows.long().clamp(min=0))
        positions = length[:, None] + torch.arange(x.shape[1], device=x.device)
        q, *parts = self._tokens(x, positions)
        state.cache.append(*parts, rows=rows)
        summaries = self._summarise_full(state, length, x.shape[1], rows)

        def nearby() -> Tensor:
            cache = state.cache
            return attention_decode(
                q.to(cache.k.dtype), cache.k, cache.v, **cache.lookup(rows), backend=self.backend, **self._mask()
            ).o.to(q.dtype)  # fmt: skip

        pages = None if rows is None else rows.int()[:, None]
        y = self._readout(self._attend(q, x, Seen(state.cache, summaries, positions, pages, nearby, stepping=True)), x)
        return y if rows is None else torch.where((rows >= 0)[:, None, None], y, 0)

    def _summarise_full(
        self, state: BlockRetrievalState, before: Tensor, tokens: int, rows: Tensor | None
    ) -> Tensor | None:
        """Into the state, summaries of the blocks that tokens behind `before` [B] filled; returns those of `rows`."""
        if state.summaries is None:
            return None
        cache, device = state.cache, before.device
        missing = -(-cache.capacity // self.stride) - state.summaries.shape[1]  # the cache has grown
        if missing > 0:
            more = state.summaries.new_zeros(state.batch, missing, *state.summaries.shape[2:])
            state.summaries = torch.cat([state.summaries, more], 1)
        row = torch.arange(state.batch, device=device) if rows is None else rows.long()
        at, blocks = row.clamp(min=0), state.summaries.shape[1]
        first = (torch.div(before - self.block, self.stride, rounding_mode="floor") + 1).clamp(min=0)
        j = first[:, None] + torch.arange(-(-tokens // self.stride), device=device)  # [B, m] that may be full now
        full = (j * self.stride + self.block <= cache.length.index_select(0, at)[:, None]) & (row >= 0)[:, None]
        if blocks:
            token = j[..., None] * self.stride + torch.arange(self.block, device=device)
            slot = (at[:, None, None] * cache.capacity + token.clamp(max=cache.capacity - 1)).flatten()
            k, v = (
                part.flatten(0, 1).index_select(0, slot).view(-1, self.block, *part.shape[2:])
                for part in (cache.k, cache.v)
            )
            found = self._summarise(k, v)
            assert found is not None
            index = (at[:, None] * blocks + j.clamp(max=blocks - 1)).flatten()
            write_slots(state.summaries, index, found[:, :1].view(*j.shape, *found.shape[2:]), full.flatten())
        return state.summaries if rows is None else state.summaries.index_select(0, at)

    def _choose(self, score: Callable[[slice], Tensor], positions: Tensor, columns: int, n: int) -> Tensor:
        """The n best columns of score(queries) [B, s, H, columns] for queries at positions [B, S], a few at a time.

        Returns lists [B, S, H, n], −1 behind what there is to choose. They are constants, without gradient. NaN counts
        as the largest score: as in attention to everything, who sees a NaN in the memory gets NaN.
        """
        (batch, queries), parts = positions.shape, []
        rows = max(1, MOST_SCORES // max(1, batch * self.num_heads * columns))
        with torch.no_grad():
            for a in range(0, max(1, queries), rows):
                scores = score(slice(a, a + rows))
                parts.append(topk(scores.masked_fill(scores.isnan(), torch.inf), n).indices)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _listed(self, q: Tensor, lists: Tensor, seen: Seen, unit: int) -> Tensor:
        """Attention of q to the tokens that lists [B, S, 1 or HKV or HQ, n] name, up to its own position."""
        (batch, length, heads, dim), groups = q.shape, self.num_kv_heads
        positions, own = seen.positions, lists.shape[2] == heads != groups
        queries = q.to(seen.cache.k.dtype)
        if own:  # every query head is a query of its own
            queries, lists = (
                y.unflatten(2, (groups, heads // groups)).transpose(2, 3).flatten(1, 2) for y in (queries, lists)
            )
            positions = positions.repeat_interleave(heads // groups, 1)
        o = sparse_attention(
            queries, seen.cache.k, seen.cache.v, lists, unit=unit, q_positions=positions, page_table=seen.pages,
            backend=self.backend,
        ).o.to(q.dtype)  # fmt: skip
        if own:
            o = o.unflatten(1, (length, heads // groups)).transpose(2, 3)
        return o.reshape(batch, length, heads, dim)


def block_ends(r: Tensor, block: int, stride: int | None = None) -> Tensor:
    """[N] position behind the last token of each block of summaries r [B, N, ...]."""
    return torch.arange(r.shape[1], device=r.device) * (block if stride is None else stride) + block
