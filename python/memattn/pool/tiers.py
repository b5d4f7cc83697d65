"""The bytes of the pages: device memory that attention reads, and below it host memory and an unnamed mapped file.

Pages on the device are in the model's dtype, k and v apart. A page below is one record: k, v and, with codes, their
scales. `Tiers.carry_out` does what a plan of the page tables says.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from memattn.ops.gather_copy import gather_copy
from memattn.pool.codec import decode, encode
from memattn.pool.config import CODES, PoolConfig

DEVICE, HOST, FILE = range(3)
NAMES = ("device", "host", "file")
_MAPPED_LIMIT = 8 << 20  # bytes of the file that stay mapped after use
_PAGES_AT_ONCE = 16  # of one copy


def _bytes_at(mapping: Any) -> Tensor:
    """uint8 view of a mapping, which lives as long as the view."""
    if mapping.limit == 0:
        return torch.empty(0, dtype=torch.uint8)
    buffer = (ctypes.c_char * mapping.limit).from_address(mapping.address)
    buffer.mapping = mapping
    return torch.frombuffer(buffer, dtype=torch.uint8)


class DeviceTier:
    """Pages as attention reads them: k [frames, page, HKV, K], v [frames, page, HKV, V]."""

    def __init__(self, host: Any, config: PoolConfig, frames: int, device: torch.device) -> None:
        shapes = [(frames, config.page_size, config.kv_heads, dim) for dim in (config.head_dim, config.value_dim)]
        if device.type == "cpu":
            size = config.dtype.itemsize
            parts = (_bytes_at(host.Mapping(torch.Size(s).numel() * size)) for s in shapes)
            self.k, self.v = (
                x[: torch.Size(s).numel() * size].view(config.dtype).view(s) for x, s in zip(parts, shapes, strict=True)
            )
        else:
            self.k, self.v = (torch.zeros(s, dtype=config.dtype, device=device) for s in shapes)
        self.page_bytes = page_bytes(config)

    def rows(self) -> tuple[Tensor, Tensor]:
        """k and v as [frames · page, HKV, D]."""
        return self.k.flatten(0, 1), self.v.flatten(0, 1)

    def read(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of pages, copied."""
        frames = frames.to(self.k.device)
        return self.k.index_select(0, frames), self.v.index_select(0, frames)

    def write(self, frames: Tensor, k: Tensor, v: Tensor) -> None:
        """The inverse of `read`."""
        frames = frames.to(self.k.device)
        self.k.index_copy_(0, frames, k.to(self.k.device))
        self.v.index_copy_(0, frames, v.to(self.v.device))

    def erase(self, frames: Tensor) -> None:
        """Zeros over pages."""
        for part in (self.k, self.v):
            part.index_fill_(0, frames.to(part.device), 0)

    def erase_rows(self, rows: Tensor) -> None:
        """Zeros over rows frame · page + r."""
        for part in self.rows():
            part.index_fill_(0, rows.to(part.device), 0)


class RecordTier:
    """Pages one after the other as records, in the model's dtype or as codes."""

    def __init__(self, config: PoolConfig, buffer: Tensor, frames: int) -> None:
        self.config, self.page_bytes = config, record_bytes(config)
        self.records = buffer[: frames * self.page_bytes].view(frames, self.page_bytes)
        stored = CODES[config.compress] if config.compress else config.dtype
        shapes = [(config.page_size, config.kv_heads, dim) for dim in (config.head_dim, config.value_dim)]
        layout: list[tuple[torch.dtype, tuple[int, ...]]] = [(stored, shape) for shape in shapes]
        if config.compress:
            layout += [(torch.float32, shape[:2]) for shape in shapes]
        self.parts: list[Tensor] = []  # k, v and their scales
        start = 0
        for dtype, shape in layout:
            stop = start + torch.Size(shape).numel() * dtype.itemsize
            self.parts.append(self.records[:, start:stop].view(dtype).view(frames, *shape))
            start = stop

    def read(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of pages in the model's dtype, copied."""
        parts = [part.index_select(0, frames) for part in self.parts]
        if not self.config.compress:
            return parts[0], parts[1]
        k, v, k_scale, v_scale = parts
        return decode(k, k_scale, self.config.dtype), decode(v, v_scale, self.config.dtype)

    def write(self, frames: Tensor, k: Tensor, v: Tensor) -> None:
        """The inverse of `read`."""
        values = [k, v]
        if self.config.compress:
            coded = [encode(x, self.config.compress) for x in values]
            values = [codes for codes, _ in coded] + [scale for _, scale in coded]
        for part, x in zip(self.parts, values, strict=True):
            part[frames] = x.cpu()

    def erase(self, frames: Tensor) -> None:
        """Zeros over pages."""
        self.records.index_fill_(0, frames, 0)

    def erase_rows(self, rows: Tensor) -> None:
        """Zeros over rows frame · page + r."""
        frame, row = rows // self.config.page_size, rows % self.config.page_size
        for part in self.parts:
            part[frame, row] = torch.zeros((), dtype=part.dtype)


def page_bytes(config: PoolConfig) -> int:
    """Bytes of a page on the device."""
    return config.page_size * config.kv_heads * (config.head_dim + config.value_dim) * config.dtype.itemsize


def record_bytes(config: PoolConfig) -> int:
    """Bytes of a page below the device."""
    if config.compress is None:
        size = page_bytes(config)
    else:
        size = config.page_size * config.kv_heads * (config.head_dim + config.value_dim + 2 * torch.float32.itemsize)
    return -(-size // 64) * 64


class Tiers:
    """The three tiers of one pool; `host` is the module memattn._host."""

    def __init__(
        self, host: Any, config: PoolConfig, frames: tuple[int, int, int], device: torch.device, folder: str | None
    ) -> None:
        self.config, self.device = config, device
        self.moved: Counter[tuple[int, int]] = Counter()  # bytes from tier to tier
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None  # of prefetches
        self._reading_host: Any = None  # event behind the last copy from host memory to a GPU
        self._touched = 0  # bytes of the file since it was last unmapped
        record = record_bytes(config)
        self.levels: list[Any] = [DeviceTier(host, config, frames[DEVICE], device), None, None]
        if frames[HOST]:
            size = frames[HOST] * record
            pinned = device.type == "cuda"
            buffer = torch.zeros(size, dtype=torch.uint8, pin_memory=True) if pinned else _bytes_at(host.Mapping(size))
            self.levels[HOST] = RecordTier(config, buffer, frames[HOST])
        self.file: Any = None
        if frames[FILE]:
            self.file = host.Mapping(folder, frames[FILE] * record)
            self.levels[FILE] = RecordTier(config, _bytes_at(self.file), frames[FILE])

    def grow_file(self, frames: int) -> None:
        """Room on the disk for so many pages; OSError when there is none."""
        self.file.ensure(frames * self.levels[FILE].page_bytes)

    def carry_out(self, plan: Any) -> None:
        """The copies of a plan, then its erasures."""
        if self.side is not None and torch.cuda.current_stream(self.device) != self.side:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
        for source, target, sources, targets in plan.copies:
            self._copy(source, target, torch.tensor(sources), torch.tensor(targets))
        if plan.erased[HOST] or plan.erased_rows[HOST]:
            self._wait_for_reads()
        for level, frames, rows in zip(self.levels, plan.erased, plan.erased_rows, strict=True):
            if frames:
                level.erase(torch.tensor(frames))
            if rows:
                level.erase_rows(torch.tensor(rows))
        if plan.erased[FILE] or plan.erased_rows[FILE]:
            self._touch(FILE, len(plan.erased[FILE]) + len(plan.erased_rows[FILE]))

    def read(self, tier: int, frames: Tensor) -> tuple[Tensor, Tensor]:
        """k and v of pages in the model's dtype, copied from a tier."""
        result = self.levels[tier].read(frames)
        self._touch(tier, len(frames))
        return result

    def flush_file(self) -> None:
        """Waits until the disk has what was written over the file."""
        os.fsync(self.file.descriptor)

    def prefetch(self, frames: list[int]) -> None:
        """Starts reading pages of the file ahead."""
        size = self.levels[FILE].page_bytes
        for frame in frames:
            self.file.will_need(frame * size, size)

    def bytes_used(self, frames: list[int]) -> dict[str, int]:
        """Bytes of so many frames of every tier."""
        return {
            name: 0 if level is None else n * level.page_bytes
            for name, level, n in zip(NAMES, self.levels, frames, strict=True)
        }

    def _copy(self, source: int, target: int, sources: Tensor, targets: Tensor) -> None:
        a, b = self.levels[source], self.levels[target]
        self.moved[source, target] += len(sources) * (b if source == DEVICE else a).page_bytes
        if target == HOST:
            self._wait_for_reads()
        if source == FILE:
            self.prefetch(sources.tolist())
        same_form = self.config.compress is None or DEVICE not in (source, target) or source == target
        for some, other in zip(sources.split(_PAGES_AT_ONCE), targets.split(_PAGES_AT_ONCE), strict=True):
            if same_form and self.device.type == "cpu":
                for x, y in zip(_parts(a), _parts(b), strict=True):
                    gather_copy(x, some, y, other)
            elif same_form and (source, target) == (HOST, DEVICE):
                for x, y in zip(_parts(a), _parts(b), strict=True):
                    for i, j in zip(some.tolist(), other.tolist(), strict=True):
                        y[j].copy_(x[i], non_blocking=True)  # from pinned memory
                self._reading_host = torch.cuda.current_stream(self.device).record_event()
            else:
                b.write(other, *a.read(some))
            if FILE in (source, target):
                self._touch(FILE, len(some))

    def _wait_for_reads(self) -> None:
        """Before host memory changes: a GPU may still be reading it."""
        if self._reading_host is not None:
            self._reading_host.synchronize()
            self._reading_host = None

    def _touch(self, tier: int, pages: int) -> None:
        if tier != FILE:
            return
        self._touched += pages * self.levels[FILE].page_bytes
        if self._touched > _MAPPED_LIMIT:
            self.file.unmap_pages()
            self._touched = 0


def _parts(level: DeviceTier | RecordTier) -> list[Tensor]:
    return [level.k, level.v] if isinstance(level, DeviceTier) else level.parts
