"""Appending within a capacity: what is forgotten to make room, and when."""

from __future__ import annotations

import torch
from torch import Tensor

from memattn.pool.config import POOL, PoolFull
from memattn.pool.forgetting import Policy, order_by_score, pages_to_drop
from memattn.pool.pages import NewTokens, PagedStreams, pages_for


class Retention:
    """The capacity of every stream and the policy that keeps it."""

    def __init__(self, pages: PagedStreams, capacity: int | None, policy: Policy) -> None:
        self._pages, self.capacity, self.policy = pages, capacity, policy

    def check(self, streams: list[int], counts: list[int], *, forget: bool = True) -> None:
        """So many new tokens per stream have room, by forgetting if that is allowed; reserves their pages."""
        self._pages.check_unpinned()
        table, reserved = self._pages.table, 0
        for stream, count in zip(streams, counts, strict=True):
            needed, held = self._pages.pages_to_append(stream, count), table.tokens(stream)
            if self.capacity is not None and held + count > self.capacity:
                if self.policy == "refuse" or not forget:
                    raise PoolFull(
                        f"{POOL}: {count} tokens more than the {held} held would pass the capacity of {self.capacity}"
                        + ("; delete some, or choose what is forgotten (forget=…)" if forget else "")
                    )
                if self._lasting(stream) <= 0:
                    raise PoolFull(f"{POOL}: all {self.capacity} tokens of the capacity are in pinned pages")
                most = pages_for(self.capacity, self._pages.config.page_size) + 2
                needed = min(needed, max(2, most - table.pages(stream)))
            reserved += needed
        self._pages.reserve(reserved)

    def append(self, stream: int, tokens: NewTokens) -> None:
        """Tokens behind all others, after `check`; those that would be forgotten at once too."""
        if self.capacity is None:
            return self._place(stream, tokens)
        start = 0
        while start < len(tokens.k):
            free = self.capacity - self._pages.table.tokens(stream)
            step = free if free > 0 else min(self._pages.config.page_size, self._lasting(stream))
            part = tokens.part(start, start + step)
            self._forget(stream, len(part.k) - free)
            self._pages.reserve(self._pages.pages_to_append(stream, len(part.k)))
            self._place(stream, part)
            start += step

    def _place(self, stream: int, tokens: NewTokens) -> None:
        self._pages.place(stream, self._pages.table.pages(stream) - 1, tokens)

    def _lasting(self, stream: int) -> int:
        """Tokens of the capacity that are not taken by pinned pages."""
        statistics = self._pages.statistics(stream, similar=False)
        assert self.capacity is not None
        return self.capacity - int(statistics.tokens[statistics.pinned].sum())

    def _forget(self, stream: int, count: int) -> None:
        if count <= 0:
            return
        table = self._pages.table
        if self.policy in ("ring", "random"):
            choose = table.oldest_tokens if self.policy == "ring" else table.random_tokens
            self._pages.remove(stream, torch.tensor(choose(stream, count), dtype=torch.int64))
            if table.pages(stream) > 2 * pages_for(table.tokens(stream), self._pages.config.page_size) + 2:
                self._pages.compact(stream)
            return
        statistics = self._pages.statistics(stream, similar=self.policy != "fifo")
        order = statistics.age.argsort(descending=True, stable=True)
        if callable(self.policy):
            order = order_by_score(self.policy, statistics)
        self._pages.apply(table.drop_pages(stream, pages_to_drop(order, statistics, count)))


def as_rows(name: str, x: Tensor | int, batch: int, count: int) -> Tensor:
    """Positions or tags as int64 [batch, count] on the CPU; one number or one row stands for all."""
    if isinstance(x, int):
        return torch.full((batch, count), x)
    if not isinstance(x, Tensor) or x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{POOL}: {name} is {getattr(x, 'dtype', type(x).__name__)}; expected int32 or int64")
    if x.shape not in ((count,), (batch, count)):
        raise ValueError(f"{POOL}: {name} has shape {list(x.shape)}; expected [{count}] or [{batch}, {count}]")
    return x.detach().cpu().long().expand(batch, count).contiguous()
