"""What a pool returns when pages are asked for."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from memattn.pool.config import POOL


@dataclass(frozen=True)
class TokenTable:
    """The tokens of a layer in order: ids, positions and tags int64 [B, n] (−1, −1, 0 behind a row's last)."""

    ids: Tensor
    positions: Tensor
    tags: Tensor

    @property
    def counts(self) -> Tensor:
        """[B] tokens of each row."""
        return (self.ids >= 0).sum(1)


@dataclass(frozen=True)
class Gathered:
    """Pages in device memory, as `sparse_attention(page_table=…)` and `attention_decode(page_table=…)` take them.

    ============  ======================  ====================================================================
    k, v          [slots, page, HKV, D]   the device tier itself: valid until the pool is next called
    page_table    [B, P] int32            slot of every page of the layer; −1: not on the device
    indices       as they were asked for  pages, or tokens page · page_size + row
    ============  ======================  ====================================================================

    ids, positions and tags belong to `indices`: for pages with one more dimension, the rows of the page. A row without
    a token, and everything of index −1, has id −1, position −1 and tag 0.
    """

    k: Tensor = field(repr=False)
    v: Tensor = field(repr=False)
    page_table: Tensor
    indices: Tensor
    unit: int
    _tokens: Tensor = field(repr=False)  # [3, U + 1, page] ids, positions, tags of the distinct pages; the last is −1
    _which: Tensor = field(repr=False)  # like indices: which of those pages

    @property
    def ids(self) -> Tensor:
        """int64: the tokens' ids."""
        return self._read(0)

    @property
    def positions(self) -> Tensor:
        """int64: what was given as positions with the tokens."""
        return self._read(1)

    @property
    def tags(self) -> Tensor:
        """int64: the user's tags."""
        return self._read(2)

    @property
    def full(self) -> bool:
        """Whether no gathered page has a row without a token, so that whole pages may be attended to."""
        return bool((self._tokens[0, :-1] >= 0).all())

    def token_indices(self) -> tuple[Tensor, Tensor]:
        """(indices int32 [..., m], counts int32 [...]): every token of the gathered pages, −1 behind the last.

        For `sparse_attention(unit=1)`, when pages have rows without tokens or end in the middle.
        """
        page = self.k.shape[1]
        if self.unit == 1:
            tokens = torch.where(self.ids.cpu() >= 0, self.indices.cpu().long(), -1)
        else:
            rows = self.indices.cpu().long()[..., None] * page + torch.arange(page)
            tokens = torch.where(self.ids.cpu() >= 0, rows, -1).flatten(-2)
        order = (tokens < 0).to(torch.int8).argsort(dim=-1, stable=True)
        counts = (tokens >= 0).sum(-1, dtype=torch.int32)
        return tokens.gather(-1, order).int().to(self.k.device), counts.to(self.k.device)

    def _read(self, part: int) -> Tensor:
        rows = self._tokens[part][self._which]
        if self.unit == 1:
            row = self.indices.cpu().long().clamp(min=0) % self.k.shape[1]
            rows = rows.gather(-1, row[..., None])[..., 0]
        return rows.to(self.k.device)


@dataclass(frozen=True)
class Wanted:
    """The distinct pages that indices name: streams and ordinals int64 [U]; `which` [B, ...] of them, U for −1."""

    streams: Tensor
    ordinals: Tensor
    which: Tensor
    unit: int

    @classmethod
    def of(cls, indices: Tensor, unit: int | None, page_size: int, first_stream: int, pages: list[int]) -> Wanted:
        """Indices [B, ..., n] of pages (unit None or page_size) or tokens (1); pages[b] of them are in row b."""
        if unit not in (None, 1, page_size):
            raise ValueError(f"{POOL}: unit is {unit!r}; allowed: 1, {page_size} (page_size)")
        batch, most = len(pages), max(max(pages), 1)
        index = check_indices(indices, batch)
        page = index if unit != 1 else index.div(page_size, rounding_mode="floor")
        limit = torch.tensor(pages).view(-1, *(1,) * (index.dim() - 1))
        if bool(((index < -1) | (page >= limit)).any()):
            per_row = pages[0] if batch == 1 else pages
            raise ValueError(
                f"{POOL}: indices holds {int(index.min())}..{int(index.max())}; allowed: -1 (padding) and those of the "
                f"{per_row} pages" + (f" of {page_size} tokens" if unit == 1 else "")
            )
        row = torch.arange(batch).view(limit.shape)
        key = torch.where(page < 0, batch * most, row * most + page)
        distinct, which = torch.cat([key.flatten(), torch.tensor([batch * most])]).unique(return_inverse=True)
        streams = first_stream + distinct[:-1] // most
        return cls(streams, distinct[:-1] % most, which[:-1].view(key.shape), page_size if unit is None else unit)


def check_indices(indices: object, batch: int) -> Tensor:
    """Indices [B, ...] of an integer type, on the CPU as int64."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{POOL}: indices is {type(indices).__name__}; expected a torch.Tensor")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{POOL}: indices is {str(indices.dtype).removeprefix('torch.')}; expected int32 or int64")
    if indices.dim() < 2 or indices.shape[0] != batch:
        raise ValueError(f"{POOL}: indices has shape {list(indices.shape)}; expected [B, ..., n] with B = {batch}")
    return indices.detach().cpu().long()
