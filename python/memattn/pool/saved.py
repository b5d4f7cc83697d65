"""Saved pools: one safetensors file, written beside the old one and put in its place when the disk has all of it.

    k, v                  [P, page, HKV, D]   pages in the pool's dtype, or codes with k_scale, v_scale [P, page, HKV]
    ids, positions, tags  [P, page] int64     id −1: a row without a token, whose bytes are zero
    stream, hits, mass, pinned  [P]           of every page; stream is layer · B + row
    next_ids              [streams] int64

The header holds the format's name and version, the configuration, and a name of its own for every save, by which a pool
knows whether a file is still the one that it wrote.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memattn.pool.codec import decode, encode
from memattn.pool.config import CODES, POOL, PoolConfig
from memattn.pool.pages import PagedStreams

FORMAT, VERSION = "memattn-kv-pool", "1"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "U8": torch.uint8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_PAGES_AT_ONCE = 16
_LONGEST_HEADER = 1 << 24


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def row_bytes(self) -> int:
        """Of one index of the first dimension."""
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """The first byte behind it."""
        return self.start + self.shape[0] * self.row_bytes


@dataclass(frozen=True)
class Layout:
    """The header of a saved pool."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    size: int  # of the data

    @property
    def config(self) -> PoolConfig:
        """Of the pool that was saved."""
        return PoolConfig.from_dict(json.loads(self.metadata["config"]))

    @classmethod
    def plan(cls, config: PoolConfig, pages: int, random_state: int) -> Layout:
        """Of a file with so many pages; entries start behind the header."""
        page, heads = config.page_size, config.kv_heads
        stored = CODES[config.compress] if config.compress else config.dtype
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "next_ids": (torch.int64, (config.streams,)),
            "stream": (torch.int64, (pages,)), "hits": (torch.int64, (pages,)), "mass": (torch.float64, (pages,)),
            "ids": (torch.int64, (pages, page)), "positions": (torch.int64, (pages, page)),
            "tags": (torch.int64, (pages, page)),
        }  # fmt: skip
        if config.compress:
            shapes |= dict.fromkeys(("k_scale", "v_scale"), (torch.float32, (pages, page, heads)))
        shapes["k"] = (stored, (pages, page, heads, config.head_dim))
        shapes["v"] = (stored, (pages, page, heads, config.value_dim))
        shapes["pinned"] = (torch.uint8, (pages,))
        entries, start = {}, 0
        for name, (dtype, shape) in shapes.items():
            entries[name] = Entry(dtype, shape, start)
            start = entries[name].stop
        metadata = {
            "format": FORMAT, "version": VERSION, "save": uuid.uuid4().hex, "config": json.dumps(config.to_dict()),
            "random_state": str(random_state),
        }  # fmt: skip
        return cls(entries, metadata, start)

    def header(self) -> bytes:
        """As safetensors has it: length, JSON padded to a multiple of 8."""
        table: dict[str, Any] = {"__metadata__": self.metadata}
        for name, e in self.entries.items():
            table[name] = {"dtype": _NAMES[e.dtype], "shape": list(e.shape), "data_offsets": [e.start, e.stop]}
        text = json.dumps(table).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @classmethod
    def of_file(cls, file: int, path: str) -> Layout:
        """Of an open file, entries counted from its first byte; ValueError if it is not a whole saved pool."""
        size = os.fstat(file).st_size
        length = int.from_bytes(os.pread(file, 8, 0), "little")
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{POOL}: {path} is not a safetensors file")
        try:
            table = json.loads(os.pread(file, length, 8))
            metadata = table.pop("__metadata__", {})
        except (ValueError, AttributeError):
            raise ValueError(f"{POOL}: {path} is not a safetensors file") from None
        if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
            found = f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"
            raise ValueError(f"{POOL}: {path} has {found}; expected {FORMAT!r}, {VERSION!r}")
        entries = {
            name: Entry(_DTYPES[e["dtype"]], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
            for name, e in table.items()
        }
        stop = max(e.stop for e in entries.values())
        if size < stop:
            raise ValueError(f"{POOL}: {path} ends at byte {size}; its header promises {stop}")
        return cls(entries, metadata, stop)


# --- bytes ------------------------------------------------------------------------------------------------------------


def _memory(x: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, not copied."""
    count = x.numel() * x.element_size()
    return memoryview((ctypes.c_char * count).from_address(x.data_ptr())).cast("B") if count else memoryview(b"")


def write_all(file: int, data: memoryview | bytes, offset: int) -> None:
    """All of data at this offset; OSError if the disk takes less."""
    rest = memoryview(data)
    while len(rest):
        written = os.pwrite(file, rest, offset)
        if written == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rest, offset = rest[written:], offset + written


def _write_rows(file: int, entry: Entry, first: int, x: Tensor) -> None:
    x = x.contiguous()
    write_all(file, _memory(x), entry.start + first * entry.row_bytes)


def _read_rows(file: int, entry: Entry, first: int, count: int) -> Tensor:
    x = torch.empty((count, *entry.shape[1:]), dtype=entry.dtype)
    view, offset = _memory(x), entry.start + first * entry.row_bytes
    while len(view):
        got = os.preadv(file, [view], offset)
        if got == 0:
            raise OSError(errno.EIO, f"{POOL}: the file ends before byte {offset + len(view)}")
        view, offset = view[got:], offset + got
    return x


# --- saving -----------------------------------------------------------------------------------------------------------


def save(path: str, pages: PagedStreams) -> str:
    """Writes all tokens to `path`; the name of the save. Until it returns, the file of before is there unchanged."""
    temporary = _temporary(path)
    try:
        with _locked(temporary) as file:
            name = _write(file, pages)
            os.fsync(file)
            os.replace(temporary, path)
        _sync_folder(path)
    except OSError as error:
        raise OSError(
            error.errno, f"{POOL}.save: {path}: {error.strerror or error}; what was saved there before is unchanged"
        ) from error
    return name


def _temporary(path: str) -> str:
    return f"{path}.saving"


@contextmanager
def _locked(temporary: str, keep: bool = False) -> Iterator[int]:
    """The temporary file, ours alone, empty unless `keep`, and gone if anything goes wrong. One that a killed save left
    behind is taken over."""
    file = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OSError(errno.EBUSY, "another process is saving to it") from None
        try:
            if not keep:
                os.ftruncate(file, 0)
            yield file
        except BaseException:
            os.unlink(temporary)
            raise
    finally:
        os.close(file)


def _sync_folder(path: str) -> None:
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write(file: int, pages: PagedStreams) -> str:
    config, table = pages.config, pages.table
    counts = [table.pages(s) for s in range(config.streams)]
    layout = Layout.plan(config, sum(counts), table.random_state)
    header = layout.header()
    os.posix_fallocate(file, 0, len(header) + layout.size)  # a full disk shows here
    entries = {n: Entry(e.dtype, e.shape, e.start + len(header)) for n, e in layout.entries.items()}
    next_ids = torch.tensor([table.next_id(s) for s in range(config.streams)])
    _write_rows(file, entries["next_ids"], 0, next_ids)
    first = 0
    for stream, count in enumerate(counts):
        ordinals = torch.arange(count)
        statistics = pages.statistics(stream, similar=False)
        columns = {
            "stream": torch.full((count,), stream), "hits": statistics.hits, "mass": statistics.mass,
            "pinned": statistics.pinned.to(torch.uint8),
        }  # fmt: skip
        columns |= zip(("ids", "positions", "tags"), pages.tokens_of(stream), strict=True)
        for name, x in columns.items():
            _write_rows(file, entries[name], first, x)
        for some in ordinals.split(_PAGES_AT_ONCE) if count else ():
            for name, x in _stored(config, *pages.read(stream, some.tolist())).items():
                _write_rows(file, entries[name], first + int(some[0]), x)
        first += count
    write_all(file, header, 0)
    return layout.metadata["save"]


def _stored(config: PoolConfig, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    if config.compress is None:
        return {"k": k, "v": v}
    (k, k_scale), (v, v_scale) = (encode(x, config.compress) for x in (k, v))
    return {"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}


# --- loading ----------------------------------------------------------------------------------------------------------


@contextmanager
def opened(path: str, flags: int = os.O_RDONLY) -> Iterator[tuple[int, Layout]]:
    """The file and its layout."""
    if not os.path.isfile(path):
        raise ValueError(f"{POOL}: {path}: there is no such file")
    file = os.open(path, flags | os.O_CLOEXEC)
    try:
        yield file, Layout.of_file(file, path)
    finally:
        os.close(file)


def load(file: int, layout: Layout, pages: PagedStreams) -> None:
    """All pages of a saved file into empty streams of the same configuration."""
    config, entries, table = pages.config, layout.entries, pages.table
    count = entries["stream"].shape[0]
    pages.reserve(count)
    for first in range(0, count, _PAGES_AT_ONCE):
        n = min(_PAGES_AT_ONCE, count - first)
        rows = {name: _read_rows(file, e, first, n) for name, e in entries.items() if name != "next_ids"}
        if config.compress:
            for name in ("k", "v"):
                rows[name] = decode(rows[name], rows[f"{name}_scale"], config.dtype)
        for i, stream in enumerate(rows["stream"].tolist()):
            if not (rows["ids"][i] >= 0).any():
                continue  # every token was erased
            tokens = torch.stack([rows[name][i] for name in ("ids", "positions", "tags")])
            pages.adopt(stream, rows["k"][i], rows["v"][i], tokens)
            pages.restore(stream, int(rows["hits"][i]), float(rows["mass"][i]), bool(rows["pinned"][i]))
    for stream, next_id in enumerate(_read_rows(file, entries["next_ids"], 0, config.streams).tolist()):
        table.set_next_id(stream, next_id)
    table.random_state = int(layout.metadata["random_state"])


# --- erasing ----------------------------------------------------------------------------------------------------------


def erase(path: str, stream: int, ids: Tensor, name: str | None = None) -> bool:
    """Overwrites tokens in a saved file, and what a killed save left beside it; False if the file is not there or, with
    `name`, is no longer that save. First they stop to be tokens, then their bytes become zeros, each on the disk."""
    try:
        _erase_leftover(path)
        if not os.path.isfile(path):
            return False
        with opened(path, os.O_RDWR) as (file, layout):
            if name is not None and layout.metadata["save"] != name:
                return False
            _erase_rows(file, layout, stream, ids)
    except OSError as error:
        raise OSError(
            error.errno,
            f"{POOL}.delete: {path} still has the tokens, and only it ({error.strerror or error}); call delete again",
        ) from error
    return True


def _erase_leftover(path: str) -> None:
    temporary = _temporary(path)
    if not os.path.isfile(temporary):
        return
    with _locked(temporary, keep=True) as file:
        size, zeros = os.fstat(file).st_size, bytes(1 << 20)
        for start in range(0, size, len(zeros)):
            write_all(file, zeros[: size - start], start)
        os.fsync(file)
        os.unlink(temporary)


def _erase_rows(file: int, layout: Layout, stream: int, ids: Tensor) -> None:
    entries = layout.entries
    count, page = entries["ids"].shape
    mine = (_read_rows(file, entries["stream"], 0, count) == stream).nonzero()[:, 0]
    rows: list[int] = []
    for p in mine.tolist():
        found = torch.isin(_read_rows(file, entries["ids"], p, 1)[0], ids).nonzero()[:, 0]
        rows += (p * page + found).tolist()
    for names, value in ((("ids", "positions"), -1), (("tags", "k", "v", "k_scale", "v_scale"), 0)):
        for entry in (entries[name] for name in names if name in entries):
            size = entry.row_bytes // page
            blank = (value % 256).to_bytes(1, "little") * size
            for row in rows:
                write_all(file, blank, entry.start + row * size)
        os.fsync(file)


def erase_saved(path: str | os.PathLike, layer: int, ids: Tensor, *, row: int = 0) -> None:
    """Erases tokens from a saved pool that no pool of this process knows of: their bytes are overwritten in place."""
    name = os.path.abspath(os.fspath(path))
    with opened(name) as (_, layout):
        config = layout.config
    for what, value, limit in (("layer", layer, config.layers), ("row", row, config.batch)):
        if not 0 <= value < limit:
            raise ValueError(f"erase_saved: {what} is {value}; allowed: 0..{limit - 1}")
    erase(name, layer * config.batch + row, ids.cpu().long())
