"""The pages of all streams: page tables (C++), bytes in their tiers and summaries, changed together.

A stream is the page list of one layer and batch row, number layer · B + row. Nothing here knows a policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memattn import _native
from memattn.ops.gather_copy import gather_copy
from memattn.pool.codec import decode, encode
from memattn.pool.config import POOL, PoolConfig, PoolFull
from memattn.pool.forgetting import PageStatistics, diversity
from memattn.pool.summaries import Summaries
from memattn.pool.tiers import DEVICE, FILE, Tiers

_PAGES_AT_ONCE = 64  # of one write
_STATISTICS = 8  # columns, as csrc/host/pool_bindings.cpp writes them


@dataclass(frozen=True)
class NewTokens:
    """k [n, HKV, K] and v [n, HKV, V] on the pool's device; the others int64 [n] on the CPU, ids None for new ones."""

    k: Tensor
    v: Tensor
    positions: Tensor | None
    tags: Tensor
    ids: Tensor | None = None

    def part(self, start: int, stop: int) -> NewTokens:
        """Tokens start..stop−1."""
        own = (x if x is None else x[start:stop] for x in (self.k, self.v, self.positions, self.tags, self.ids))
        return NewTokens(*own)  # type: ignore[arg-type]

    def followed_by(self, other: NewTokens) -> NewTokens:
        """These tokens and then others; both have ids and positions."""
        pairs = zip(self._parts(), other._parts(), strict=True)
        return NewTokens(*(torch.cat(pair) for pair in pairs))

    def moved_to(self, device: torch.device) -> NewTokens:
        """The tokens of another pool, with ids to come."""
        return NewTokens(self.k.to(device), self.v.to(device), self.positions, self.tags)

    def _parts(self) -> tuple[Tensor, ...]:
        assert self.positions is not None and self.ids is not None
        return self.k, self.v, self.positions, self.tags, self.ids


def address(x: Tensor | None) -> int:
    """Of a contiguous tensor's memory, for the C++ tables; 0 for None."""
    return 0 if x is None else x.data_ptr()


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that so many tokens fill."""
    return -(-tokens // page_size)


class PagedStreams:
    """See the module. Every method that writes leaves all streams as they were when it raises."""

    def __init__(
        self, config: PoolConfig, frames: tuple[int, int, int], device: torch.device, folder: str | None, seed: int
    ) -> None:
        host = _native.host()
        if host is None:
            raise RuntimeError(f"{POOL}: needs the page tables of memattn._host; {_native.native_reason('_host')}")
        self.config, self.device, self.folder = config, device, folder
        self.tiers = Tiers(host, config, frames, device, folder)
        self.summaries = Summaries(config, device)
        self.table = host.PageTable(config.streams, config.page_size, *frames, seed, self._grow_file)

    def _grow_file(self, frames: int) -> None:
        try:
            self.tiers.grow_file(frames)
        except OSError as error:
            raise OSError(
                error.errno, f"{POOL}: {error.strerror} (folder {self.folder}); nothing was written, nothing is lost"
            ) from error

    def apply(self, plan: Any) -> None:
        """Carry out what the page tables decided."""
        self.tiers.carry_out(plan)
        for stream, source, target in plan.summaries:
            self.summaries.move(stream, source, target)

    def reserve(self, pages: int) -> None:
        """A place for so many more pages, or PoolFull, or OSError when the disk is full."""
        if missing := self.table.reserve(pages):
            raise PoolFull(
                f"{POOL}: {pages} more pages are needed and {missing} have no place (in use: {self.table.pages_held} "
                "pages, those of snapshots included); raise device_bytes, host_bytes or file_bytes, or set a capacity"
            )

    def pages_to_append(self, stream: int, count: int) -> int:
        """New pages that so many tokens behind the others take, a copy of the last page included."""
        last, page = self.table.pages(stream) - 1, self.config.page_size
        here = page - self.table.fill(stream, last) if last >= 0 else 0
        copied = here > 0 and count > 0 and self.table.shared(stream, last)
        return pages_for(max(0, count - here), page) + copied

    def check_unpinned(self) -> None:
        """A page that is written needs a place on the device."""
        if self._free_to_use() < 1:
            raise PoolFull(f"{POOL}: all {self.table.frames(DEVICE)} pages of the device tier are pinned")

    # --- writing ------------------------------------------------------------------------------------------------------

    def place(self, stream: int, after: int, tokens: NewTokens) -> None:
        """Tokens behind those of page `after` (−1: in front), in order. The pages must have been reserved."""
        start, page = 0, self.config.page_size
        while start < len(tokens.k):
            here = page - self.table.fill(stream, after) if after >= 0 else 0
            fresh = min(_PAGES_AT_ONCE, max(1, self._free_to_use() // 2)) - bool(here)
            stop = min(len(tokens.k), start + here + fresh * page)
            after = self._place_part(stream, after, here, tokens.part(start, stop))
            start = stop

    def _place_part(self, stream: int, after: int, here: int, tokens: NewTokens) -> int:
        count = len(tokens.k)
        rows = torch.empty(count, dtype=torch.int64)
        side = [x if x is None else x.contiguous() for x in (tokens.ids, tokens.positions, tokens.tags)]
        plan, last = self.table.place(stream, after, count, *map(address, side), address(rows))
        self.apply(plan)
        k, v = self._rounded(tokens.k), self._rounded(tokens.v)
        self._write_rows(rows, k, v)
        if self.summaries:
            first = after if here else after + 1
            sizes = [here] if here else []
            sizes += [self.config.page_size] * (last - first + 1 - len(sizes))
            sizes[-1] -= sum(sizes) - count
            described = [self.table.describe(self.table.handle(stream, o)) for o in range(first, last + 1)]
            self.summaries.add(stream, [d[0] for d in described], [d[1] for d in described], k, sizes)
        return last

    def adopt(self, stream: int, k: Tensor, v: Tensor, tokens: Tensor) -> None:
        """One page as it was saved: k, v [page, HKV, D], tokens int64 [3, page] (ids with holes, positions, tags)."""
        plan, frame = self.table.adopt(stream, *map(address, tokens.contiguous()))
        self.apply(plan)
        self.tiers.levels[DEVICE].write(torch.tensor([frame]), k[None], v[None])
        self.summarise_again(stream, [self.table.handle(stream, self.table.pages(stream) - 1)])

    def restore(self, stream: int, hits: int, mass: float, pinned: bool) -> None:
        """What was known of a page that was just adopted; one that cannot be pinned here is not."""
        pinned = pinned and self._free_to_use() > 1
        self.table.restore_statistics(stream, self.table.pages(stream) - 1, hits, mass, pinned)

    def insert(self, stream: int, ordinal: int, row: int, tokens: NewTokens) -> None:
        """Tokens with ids in front of a row of a page."""
        self.reserve(pages_for(len(tokens.k), self.config.page_size) + 2)  # the split page's rest, a snapshot's copy
        ids = self.tokens(torch.tensor([stream]), torch.tensor([ordinal]))[0, 0]
        before = int((ids[:row] >= 0).sum())
        if before == 0:
            self.place(stream, ordinal - 1, tokens)
            return
        page = self.page_as_tokens(stream, ordinal)
        rest = page.part(before, len(page.k))
        self.remove(stream, ids[row:][ids[row:] >= 0].contiguous())
        self.place(stream, ordinal, tokens.followed_by(rest))

    def update(self, stream: int, ids: Tensor, k: Tensor, v: Tensor) -> None:
        """New keys and values for tokens that are there."""
        ordinals, rows = self.find(stream, ids)
        pages = ordinals.unique()
        self._reserve_copies(stream, pages)
        for some in pages.split(max(1, self._free_to_use())):
            self.apply(self.table.make_writable(stream, address(some.contiguous()), len(some)))
            chosen = torch.isin(ordinals, some).nonzero()[:, 0]
            table = self.page_table(stream)
            self._write_rows(
                table[ordinals[chosen]].long() * self.config.page_size + rows[chosen],
                *(self._rounded(x[chosen.to(x.device)]) for x in (k, v)),
            )
            self.summarise_again(stream, [self.table.handle(stream, o) for o in some.tolist()])

    def remove(self, stream: int, ids: Tensor) -> None:
        """Takes tokens out of the stream; snapshots keep theirs."""
        ordinals, _ = self.find(stream, ids)
        pages = ordinals[ordinals >= 0].unique()
        self._reserve_copies(stream, pages)
        shared = [o for o in pages.tolist() if self.table.shared(stream, o)]
        for some in torch.tensor(shared, dtype=torch.int64).split(max(1, self._free_to_use())):
            self.apply(self.table.make_writable(stream, address(some.contiguous()), len(some)))
        plan, touched = self.table.remove(stream, address(ids), len(ids))
        self.apply(plan)
        self.summarise_again(stream, touched)

    def erase(self, stream: int, ids: Tensor) -> None:
        """Overwrites tokens wherever they are, snapshots and the disk included."""
        plan, touched = self.table.erase(stream, address(ids), len(ids))
        self.apply(plan)
        self.summarise_again(stream, touched)
        if plan.erased[FILE] or plan.erased_rows[FILE]:
            self.tiers.flush_file()

    def summarise_again(self, stream: int, handles: list[int]) -> None:
        """Summaries of pages whose rows changed or went."""
        for handle in handles if self.summaries else ():
            row, _, tier, frame = self.table.describe(handle)
            ids = torch.empty(self.config.page_size, dtype=torch.int64)
            self.table.page_ids(handle, address(ids))
            k, _ = self.tiers.read(tier, torch.tensor([frame]))
            self.summaries.replace(stream, row, k[0][ids >= 0].to(self.device))

    def page_as_tokens(self, stream: int, ordinal: int) -> NewTokens:
        """The tokens of a page, copied to the pool's device."""
        ids, positions, tags = self.tokens(torch.tensor([stream]), torch.tensor([ordinal]))[:, 0]
        held = ids >= 0
        k, v = (x[0][held].to(self.device) for x in self.read(stream, [ordinal]))
        return NewTokens(k, v, positions[held], tags[held], ids[held])

    def compact(self, stream: int) -> None:
        """Closes the gaps that removed tokens left in pages, pinned ones excepted."""
        ordinal, page = 0, self.config.page_size
        while ordinal < self.table.pages(stream):
            fill, count, pinned = self.table.occupancy(stream, ordinal)
            behind_full = ordinal == 0 or self.table.fill(stream, ordinal - 1) == page
            if not pinned and not (fill == count and behind_full):
                self.reserve(2)
                tokens = self.page_as_tokens(stream, ordinal)
                self.apply(self.table.drop_pages(stream, [ordinal]))
                before = self.table.pages(stream)
                self.place(stream, ordinal - 1, tokens)
                ordinal -= self.table.pages(stream) == before
            ordinal += 1

    def _rounded(self, x: Tensor) -> Tensor:
        """What reading gives back: with codes, the rows as they decode."""
        return decode(*encode(x, self.config.compress), x.dtype) if self.config.compress else x.contiguous()

    def _write_rows(self, rows: Tensor, k: Tensor, v: Tensor) -> None:
        places = rows.to(self.device)
        order = torch.arange(len(rows), device=self.device)
        for new, part in zip((k, v), self.tiers.levels[DEVICE].rows(), strict=True):
            gather_copy(new, order, part, places)

    def _reserve_copies(self, stream: int, pages: Tensor) -> None:
        """Pages that a snapshot shares are copied before they are written."""
        self.check_unpinned()
        self.reserve(sum(self.table.shared(stream, o) for o in pages.tolist()))

    def _free_to_use(self) -> int:
        return self.table.frames(DEVICE) - self.table.pages_pinned

    # --- reading ------------------------------------------------------------------------------------------------------

    def find(self, stream: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Page and row of each id int64 [n], −1 where there is none."""
        ordinals, rows = torch.empty_like(ids), torch.empty_like(ids)
        self.table.find(stream, address(ids), len(ids), address(ordinals), address(rows))
        return ordinals, rows

    def tokens(self, streams: Tensor, ordinals: Tensor) -> Tensor:
        """[3, n, page]: ids, positions and tags of pages."""
        parts = torch.empty(3, len(ordinals), self.config.page_size, dtype=torch.int64)
        self.table.read_tokens(
            *map(address, (streams.contiguous(), ordinals.contiguous())), len(ordinals), *map(address, parts)
        )
        return parts

    def tokens_of(self, stream: int) -> Tensor:
        """[3, pages, page] of a stream."""
        ordinals = torch.arange(self.table.pages(stream))
        return self.tokens(torch.full_like(ordinals, stream), ordinals)

    def page_table(self, stream: int, tier: int = DEVICE) -> Tensor:
        """[pages] int32: the frame of every page of a stream in a tier, −1 where it has none."""
        frames = torch.empty(self.table.pages(stream), dtype=torch.int32)
        self.table.write_frames(stream, tier, address(frames))
        return frames

    def read(self, stream: int, ordinals: list[int]) -> tuple[Tensor, Tensor]:
        """k, v [n, page, HKV, D] of pages, copied to the CPU from the nearest tier; nothing moves."""
        found = [self.table.describe(self.table.handle(stream, o))[2:] for o in ordinals]
        parts = [self.tiers.read(tier, torch.tensor([frame])) for tier, frame in found]
        k, v = (torch.cat([part[i].cpu() for part in parts]) for i in (0, 1))
        return k, v

    def statistics(self, stream: int, *, similar: bool = True) -> PageStatistics:
        """What a forgetting policy may look at; without `similar`, diversity is left at 1."""
        raw = torch.empty(self.table.pages(stream), _STATISTICS, dtype=torch.float64)
        self.table.write_statistics(stream, address(raw))
        tokens, _, newest, hits, last, mass, pinned, summary = raw.unbind(1)
        different = torch.ones(len(raw))
        if similar and "mean" in self.config.summaries:
            layer, row = divmod(stream, self.config.batch)
            different = diversity(self.summaries.all(layer, "mean")[row][summary.long().to(self.device)])
        return PageStatistics(
            tokens=tokens.long(), age=(self.table.next_id(stream) - 1 - newest).long(),
            idle=(self.table.clock - last).long(), hits=hits.long(), mass=mass, diversity=different,
            pinned=pinned.bool(),
        )  # fmt: skip

    def summary_rows(self, stream: int) -> Tensor:
        """[pages] row of each page among the summaries of its stream."""
        raw = torch.empty(self.table.pages(stream), _STATISTICS, dtype=torch.float64)
        self.table.write_statistics(stream, address(raw))
        return raw[:, -1].long()
