"""A paged memory of keys and values that outgrows the device: see `KVPool`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memattn.ops import _checks as check
from memattn.pool import saved
from memattn.pool.config import POOL, PoolConfig, PoolFull, positive
from memattn.pool.forgetting import Policy, check_policy
from memattn.pool.gathered import Gathered, TokenTable, Wanted, check_indices
from memattn.pool.pages import NewTokens, PagedStreams, address
from memattn.pool.retention import Retention, as_rows
from memattn.pool.tiers import DEVICE, FILE, NAMES, page_bytes, record_bytes


class KVPool:
    """Keys and values of past tokens, per layer and batch row, in pages over device memory, host memory and a file.

    layers, kv_heads, head_dim, value_dim (None: head_dim), batch, dtype: of what is stored; every layer and batch row
    has its own tokens and its own capacity. page_size: tokens of a page, the unit that is moved and gathered.

    device_bytes: budget of the device tier, the pages that attention can read; on a CPU None means all of the memory,
    taken page by page. host_bytes (pinned with CUDA) and folder/file_bytes (a file without a name in `folder`, up to
    the free space at the start) hold what the device tier does not. With one of them, the device tier is a cache of
    least recently used pages, and the two together must have room for every page.

    capacity: tokens of a layer and batch row (None: no limit); forget: what goes when it is passed: "refuse"
    (PoolFull), "ring", "fifo", "random" (seed), a `Forgetting`, or a function of `PageStatistics` with scores [P].

    compress: None, "int8" or "fp8" (e4m3): pages below the device as codes with a scale per row and head; what is
    read is always x̂ of `memattn.pool.codec`, wherever the page was. summaries: any of "mean" (float32), "min", "max"
    of the keys of every page. unrotated_keys: the keys carry no rotary positions yet (kept with the pool; `merge`
    refuses to mix).

    Tokens are named by ids, one count per layer and batch row, never used twice. Not thread-safe; no gradients. Errors:
    ValueError and TypeError for misuse, PoolFull when there is no room, OSError for the disk; after each of them the
    pool is as it was before the call (a `delete` that could not change a saved file says so). Paged cache after Kwon
    et al. 2023 (arXiv 2309.06180); cached units on the device over a host memory after InfLLM (Xiao et al. 2024,
    arXiv 2402.04617).
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        batch: int = 1,
        page_size: int = 64,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        device_bytes: int | None = None,
        host_bytes: int = 0,
        folder: str | os.PathLike | None = None,
        file_bytes: int | None = None,
        capacity: int | None = None,
        forget: Policy = "refuse",
        compress: str | None = None,
        summaries: Sequence[str] = (),
        unrotated_keys: bool = False,
        seed: int = 0,
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        self.config = PoolConfig(
            layers, kv_heads, head_dim, value_dim, batch, page_size, dtype, compress, tuple(summaries), unrotated_keys
        )
        check_policy(forget)
        if capacity is not None:
            positive("capacity", capacity)
        elif forget != "refuse":
            raise ValueError(f"{POOL}: forget is {forget!r} with capacity None; forgetting needs a capacity")
        self.device = torch.device(device)
        frames = _frames(self.config, self.device, device_bytes, host_bytes, folder, file_bytes)
        place = None if folder is None else os.fspath(folder)
        self._pages = PagedStreams(self.config, frames, self.device, place, seed)
        self._retention = Retention(self._pages, capacity, forget)
        self._saved: dict[str, str] = {}  # files that hold this pool's tokens, and the name of that save

    # --- writing ------------------------------------------------------------------------------------------------------

    def append(
        self,
        layer: int,
        k: Tensor,
        v: Tensor,
        *,
        positions: Tensor | None = None,
        tags: Tensor | int = 0,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Tokens behind those of every batch row. Returns their ids, int64 [B, T] (−1 beyond a row's length).

        k [B, T, HKV, K], v [B, T, HKV, V] in the pool's dtype on its device; positions int64 [B, T] or [T] (None: the
        ids); tags int64 [B, T] or one for all; lengths [B]: only the first lengths[b] tokens of row b.
        """
        self._check_rows("append", k, v, (self.config.batch,))
        batch, count = k.shape[:2]
        counts = [count] * batch
        if lengths is not None:
            check.lengths(f"{POOL}.append", lengths.cpu(), k.detach().cpu() if k.is_cuda else k)
            counts = lengths.tolist()
        places = None if positions is None else as_rows("positions", positions, batch, count)
        labels = as_rows("tags", tags, batch, count)
        streams = [self._stream(layer, b) for b in range(batch)]
        self._retention.check(streams, counts)
        ids = torch.full((batch, count), -1, dtype=torch.int64)
        for b, (stream, n) in enumerate(zip(streams, counts, strict=True)):
            first = self._pages.table.next_id(stream)
            ids[b, :n] = torch.arange(first, first + n)
            new = NewTokens(k[b].detach(), v[b].detach(), None if places is None else places[b], labels[b])
            self._retention.append(stream, new.part(0, n))
        return ids

    def insert(
        self,
        layer: int,
        before: int,
        k: Tensor,
        v: Tensor,
        *,
        row: int = 0,
        positions: Tensor | None = None,
        tags: Tensor | int = 0,
    ) -> Tensor:
        """Tokens k [T, HKV, K], v [T, HKV, V] in front of the token with id `before`. Returns their ids int64 [T]."""
        self._check_rows("insert", k, v, ())
        stream, pages = self._stream(layer, row), self._pages
        (ordinal,), (at,) = (x.tolist() for x in self._locate("insert", stream, torch.tensor([before])))
        count = len(k)
        labels = as_rows("tags", tags, 1, count)[0]
        self._retention.check([stream], [count], forget=False)
        first = pages.table.next_id(stream)
        ids = torch.arange(first, first + count)
        places = ids if positions is None else as_rows("positions", positions, 1, count)[0]
        new = NewTokens(k.detach(), v.detach(), places, labels, ids)
        pages.insert(stream, ordinal, at, new)
        pages.table.set_next_id(stream, first + count)
        return ids

    def update(self, layer: int, ids: Tensor, k: Tensor, v: Tensor, *, row: int = 0) -> None:
        """New keys [n, HKV, K] and values [n, HKV, V] for tokens ids int64 [n], distinct and present."""
        self._check_rows("update", k, v, ())
        ids = _ids("update", ids)
        if ids.shape != k.shape[:1] or len(ids.unique()) != len(ids):
            raise ValueError(f"{POOL}.update: ids has shape {list(ids.shape)}; expected {len(k)} distinct ids, like k")
        stream = self._stream(layer, row)
        self._locate("update", stream, ids)
        self._pages.update(stream, ids, k.detach(), v.detach())

    def delete(self, layer: int, ids: Tensor, *, row: int = 0) -> int:
        """Erases tokens: their bytes are overwritten on the device, in host memory, in the file, in every snapshot, and
        in every file that this pool was saved to or loaded from. Returns how many there were.

        What other processes copied from those files is out of reach; `erase_saved` is for them.
        """
        stream, ids = self._stream(layer, row), _ids("delete", ids).unique()
        before = self.lengths(layer)[row].item()
        self._pages.erase(stream, ids)
        for path, name in list(self._saved.items()):
            if not saved.erase(path, stream, ids, name):
                del self._saved[path]  # another file has taken its place
        return int(before - self.lengths(layer)[row].item())

    def delete_tagged(self, tag: int) -> int:
        """Erases every token with this tag, in all layers and rows; as `delete`. Returns how many there were."""
        count = 0
        for layer in range(self.config.layers):
            for row in range(self.config.batch):
                ids, _, tags = self._pages.tokens_of(self._stream(layer, row)).flatten(1)
                count += self.delete(layer, ids[(tags == tag) & (ids >= 0)], row=row)
        return count

    def merge(self, other: KVPool) -> list[Tensor]:
        """Appends all tokens of another pool, with positions and tags. Returns their new ids per layer, int64 [B, n].

        The pools must agree in layers, batch, heads, dimensions, dtype and unrotated_keys. `other` stays as it is.
        """
        names = ("layers", "batch", "kv_heads", "head_dim", "value_dim", "dtype", "unrotated_keys")
        for name in names:
            mine, theirs = getattr(self.config, name), getattr(other.config, name)
            if mine != theirs:
                raise ValueError(f"{POOL}.merge: {name} is {theirs} in other; expected {mine}")
        streams = range(self.config.streams)
        counts = [other._pages.table.tokens(s) for s in streams]
        self._retention.check(list(streams), counts)
        firsts = [self._pages.table.next_id(s) for s in streams]
        for stream in streams:
            for ordinal in range(other._pages.table.pages(stream)):
                self._retention.append(stream, other._pages.page_as_tokens(stream, ordinal).moved_to(self.device))
        ids = []
        for layer in range(self.config.layers):
            own = range(layer * self.config.batch, (layer + 1) * self.config.batch)
            rows = [torch.arange(firsts[s], firsts[s] + counts[s]) for s in own]
            ids.append(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1))
        return ids

    # --- files --------------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Writes all tokens to a safetensors file (snapshots excepted). What was at `path` stays as it is until the new
        file is whole and on the disk, and if anything goes wrong; OSError then says what."""
        name = os.path.abspath(os.fspath(path))
        self._saved[name] = saved.save(name, self._pages)

    @classmethod
    def load(cls, path: str | os.PathLike, **options: Any) -> KVPool:
        """The pool of a saved file. options: device, the budgets, folder, capacity, forget and seed, as for a new pool;
        the rest is the file's. Raises ValueError when `path` is no saved pool or not a whole one."""
        name = os.path.abspath(os.fspath(path))
        with saved.opened(name) as (file, layout):
            kept = vars(layout.config)
            if twice := sorted(kept.keys() & options.keys()):
                raise ValueError(f"{POOL}.load: {', '.join(twice)} given; the file decides")
            pool = cls(**kept, **options)
            saved.load(file, layout, pool._pages)
            pool._saved[name] = layout.metadata["save"]
        return pool

    # --- snapshots and pins -------------------------------------------------------------------------------------------

    def snapshot(self) -> int:
        """Remembers all tokens as they are now, without copying: a page is copied when it is next written."""
        return int(self._pages.table.snapshot())

    def roll_back(self, snapshot: int) -> None:
        """All tokens become what they were at the snapshot, less what was deleted since. It can be used again."""
        self._pages.apply(self._with_snapshot(self._pages.table.roll_back, snapshot))

    def discard(self, snapshot: int) -> None:
        """Gives a snapshot up; what only it held is overwritten."""
        self._pages.apply(self._with_snapshot(self._pages.table.discard, snapshot))

    def pin(self, layer: int, ids: Tensor, *, row: int = 0, pinned: bool = True) -> None:
        """Keeps the pages of these tokens on the device and from being forgotten (`delete` still erases them)."""
        stream, pages = self._stream(layer, row), self._pages
        ordinals = self._locate("pin", stream, _ids("pin", ids))[0].unique()
        if pinned:
            free = pages.table.frames(DEVICE) - pages.table.pages_pinned
            if len(ordinals) >= free:
                raise PoolFull(
                    f"{POOL}.pin: {len(ordinals)} pages; {free} pages of the device tier are not pinned, "
                    "and one of them must stay so"
                )
            streams = torch.full_like(ordinals, stream)
            pages.apply(pages.table.load(address(streams), address(ordinals), len(ordinals), False))
        for ordinal in ordinals.tolist():
            pages.table.pin(stream, ordinal, pinned)

    # --- reading ------------------------------------------------------------------------------------------------------

    def gather(self, layer: int, indices: Tensor, *, unit: int | None = None) -> Gathered:
        """Brings pages to the device and says where they are.

        indices: int32/int64 [B, ..., n], −1 pads: pages 0..P−1 of each batch row (unit None or page_size), or tokens
        page · page_size + r (unit=1). Shapes beyond [B, n] are for lists per query and head; every page is moved
        once. Raises ValueError if the device tier cannot hold them together with the pinned pages.
        """
        where = self._where(layer, indices, unit)
        pages, table = self._pages, self._pages.table
        try:
            plan = table.load(address(where.streams), address(where.ordinals), len(where.streams), True)
        except ValueError as error:
            raise ValueError(f"{POOL}.gather: {error}; raise device_bytes or ask for fewer") from None
        pages.apply(plan)
        level = pages.tiers.levels[DEVICE]
        tables = [pages.page_table(self._stream(layer, b)) for b in range(self.config.batch)]
        page_table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True, padding_value=-1)
        nothing = torch.tensor([-1, -1, 0]).view(3, 1, 1).expand(3, 1, self.config.page_size)
        tokens = torch.cat([pages.tokens(where.streams, where.ordinals), nothing], 1)
        return Gathered(level.k, level.v, page_table.to(self.device), indices, where.unit, tokens, where.which)

    def prefetch(self, layer: int, indices: Tensor, *, unit: int | None = None) -> None:
        """Starts to bring pages that a later `gather` will ask for, and returns.

        On a CPU the kernel is told to read the file ahead; with CUDA the pages are copied on a side stream, and what
        the last `gather` returned is no longer valid.
        """
        where, pages = self._where(layer, indices, unit), self._pages
        side = pages.tiers.side
        if side is None:
            if pages.tiers.file is not None:
                stream, ordinal = where.streams.tolist(), where.ordinals.tolist()
                found = [
                    pages.table.describe(pages.table.handle(s, o))[2:] for s, o in zip(stream, ordinal, strict=True)
                ]
                pages.tiers.prefetch([frame for tier, frame in found if tier == FILE])
            return
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            pages.apply(pages.table.load(address(where.streams), address(where.ordinals), len(where.streams), False))

    def read(self, layer: int, *, row: int = 0) -> tuple[Tensor, Tensor]:
        """All tokens of a batch row in order, copied to the CPU: k [n, HKV, K], v [n, HKV, V]."""
        stream = self._stream(layer, row)
        n = self._pages.table.pages(stream)
        tokens = [self._pages.page_as_tokens(stream, ordinal) for ordinal in range(n)]
        heads, dtype = self.config.kv_heads, self.config.dtype
        nothing = (torch.empty(0, heads, dim, dtype=dtype) for dim in (self.config.head_dim, self.config.value_dim))
        k, v = (
            torch.cat([none, *(getattr(t, name).cpu() for t in tokens)])
            for name, none in zip("kv", nothing, strict=True)
        )
        return k, v

    def tokens(self, layer: int) -> TokenTable:
        """Ids, positions and tags of all tokens of a layer, in order."""
        rows: list[Tensor] = []
        for b in range(self.config.batch):
            table = self._pages.tokens_of(self._stream(layer, b)).flatten(1)
            rows.append(table[:, table[0] >= 0].T)
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        ids, positions, tags = padded.unbind(2)
        return TokenTable(ids, positions, torch.where(ids >= 0, tags, 0))

    def lengths(self, layer: int) -> Tensor:
        """int64 [B]: tokens of every batch row."""
        return torch.tensor([self._pages.table.tokens(self._stream(layer, b)) for b in range(self.config.batch)])

    def page_counts(self, layer: int) -> Tensor:
        """int32 [B, P]: tokens of every page, 0 behind a row's last page."""
        rows = [(self._pages.tokens_of(self._stream(layer, b))[0] >= 0).sum(1) for b in range(self.config.batch)]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).int()

    def summaries(self, layer: int, kind: str = "mean") -> Tensor:
        """[B, P, HKV, K]: the mean (float32), "min" or "max" of the keys of every page, 0 behind a row's last page.

        What is still in use is not copied as long as no page was dropped: do not write to it.
        """
        check.choice(f"{POOL}.summaries", "kind", kind, self.config.summaries)
        everything = self._pages.summaries.all(layer, kind)
        rows = [self._pages.summary_rows(self._stream(layer, b)) for b in range(self.config.batch)]
        if all(len(r) == len(rows[0]) and torch.equal(r, torch.arange(len(r))) for r in rows):
            return everything[:, : len(rows[0])]
        parts = [everything[b].index_select(0, r.to(self.device)) for b, r in enumerate(rows)]
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)

    def record_mass(self, layer: int, indices: Tensor, mass: Tensor, *, decay: float = 1.0) -> None:
        """Attention mass received by pages, for forgetting: mass ← decay · mass + new. indices, mass [B, ..., n]."""
        if mass.shape != indices.shape:
            raise ValueError(f"{POOL}.record_mass: mass has shape {list(mass.shape)}; expected {list(indices.shape)}")
        pages = check_indices(indices, self.config.batch)
        self._where(layer, indices, None)
        for b in range(self.config.batch):
            keep = pages[b] >= 0
            ordinals, values = pages[b][keep], mass[b].detach().cpu().double()[keep]
            stream = self._stream(layer, b)
            self._pages.table.add_mass(stream, address(ordinals), address(values), len(ordinals), decay)

    def memory(self) -> dict[str, int]:
        """Bytes in use: "device", "host", "file" (pages of each tier), "summaries", "tables" (of the host)."""
        table = self._pages.table
        used = self._pages.tiers.bytes_used([table.frames_reached(tier) for tier in range(len(NAMES))])
        return used | {"summaries": self._pages.summaries.bytes, "tables": int(table.bytes)}

    def traffic(self) -> dict[str, float]:
        """Since the start: page "hits" and "misses" of `gather`, "hit_rate", and bytes moved, e.g. "file to device"."""
        table = self._pages.table
        asked = table.hits + table.misses
        moved = {f"{NAMES[a]} to {NAMES[b]}": n for (a, b), n in sorted(self._pages.tiers.moved.items())}
        return {"hits": table.hits, "misses": table.misses, "hit_rate": table.hits / asked if asked else 1.0, **moved}

    def __repr__(self) -> str:
        tokens = sum(self._pages.table.tokens(s) for s in range(self.config.streams))
        return f"{POOL}({tokens} tokens in {self._pages.table.pages_held} pages, {self.config}, on {self.device})"

    # --- inside -------------------------------------------------------------------------------------------------------

    def _stream(self, layer: int, row: int) -> int:
        for name, value, limit in (("layer", layer, self.config.layers), ("row", row, self.config.batch)):
            if not isinstance(value, int) or not 0 <= value < limit:
                raise ValueError(f"{POOL}: {name} is {value!r}; allowed: 0..{limit - 1}")
        return layer * self.config.batch + row

    def _where(self, layer: int, indices: Tensor, unit: int | None) -> Wanted:
        first, batch = self._stream(layer, 0), self.config.batch
        pages = [self._pages.table.pages(first + b) for b in range(batch)]
        return Wanted.of(indices, unit, self.config.page_size, first, pages)

    def _locate(self, op: str, stream: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Page and row of ids that must all be there."""
        ordinals, rows = self._pages.find(stream, ids)
        if bool((ordinals < 0).any()):
            raise ValueError(f"{POOL}.{op}: no token has id {ids[ordinals < 0].tolist()[:8]} (deleted, or never given)")
        return ordinals, rows

    def _check_rows(self, op: str, k: Tensor, v: Tensor, batch: tuple[int, ...]) -> None:
        """k [*batch, T, HKV, K] and v with V, in the pool's dtype on its device, without gradient."""
        name, config = f"{POOL}.{op}", self.config
        lead = "B, T" if batch else "T"
        check.rank(name, "k", k, f"[{lead}, HKV, K]")
        count = k.shape[len(batch)]
        check.shape(name, "k", k, f"[{lead}, HKV, K]", (*batch, count, config.kv_heads, config.head_dim))
        check.shape(name, "v", v, f"[{lead}, HKV, V]", (*batch, count, config.kv_heads, config.value_dim))
        for part, x in (("k", k), ("v", v)):
            check.dtype(name, part, x, (config.dtype,), " like the pool")
            if x.device.type != self.device.type:
                raise ValueError(f"{name}: {part} is on {x.device}; expected {self.device} like the pool")

    def _with_snapshot(self, action: Any, snapshot: int) -> Any:
        try:
            return action(snapshot)
        except (IndexError, TypeError):
            raise ValueError(f"{POOL}: there is no snapshot {snapshot!r}") from None


def _ids(op: str, ids: object) -> Tensor:
    """Ids int64 [n], contiguous on the CPU."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"{POOL}.{op}: ids is {type(ids).__name__}; expected a torch.Tensor")
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise ValueError(f"{POOL}.{op}: ids is {check.describe(ids=ids)}; expected int64 [n]")
    return ids.cpu().contiguous()


def _frames(
    config: PoolConfig,
    device: torch.device,
    device_bytes: int | None,
    host_bytes: int,
    folder: str | os.PathLike | None,
    file_bytes: int | None,
) -> tuple[int, int, int]:
    """Pages of the three tiers."""
    if device_bytes is None:
        if device.type != "cpu":
            raise ValueError(f"{POOL}: device_bytes is None on {device}; expected a number of bytes")
        device_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if folder is None:
        if file_bytes is not None:
            raise ValueError(f"{POOL}: file_bytes is {file_bytes} without a folder")
        file_bytes = 0
    elif not os.path.isdir(folder):
        raise ValueError(f"{POOL}: folder is {os.fspath(folder)!r}; expected a folder that exists")
    elif file_bytes is None:
        disk = os.statvfs(folder)
        file_bytes = disk.f_bavail * disk.f_frsize
    record = record_bytes(config)
    frames = (device_bytes // page_bytes(config), host_bytes // record, file_bytes // record)
    if frames[0] < 1:
        raise ValueError(
            f"{POOL}: device_bytes is {device_bytes}; expected at least one page of {page_bytes(config)} bytes"
        )
    return frames
