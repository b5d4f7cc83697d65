"""A memory as a plain Python list, random sequences of calls on it and on a KVPool, and what must hold after each."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memattn.pool import KVPool
from memattn.pool.codec import decode, encode

LAYERS, BATCH, HEADS, KEY_DIM, VALUE_DIM, PAGE = 2, 2, 2, 8, 16, 4
SIZES = dict(value_dim=VALUE_DIM, batch=BATCH, page_size=PAGE)
DEVICE_PAGE = PAGE * HEADS * (KEY_DIM + VALUE_DIM) * 4


def make_pool(folder=None, *, device_pages=None, host_pages=0, **options) -> KVPool:
    """A small float32 pool; with a folder, it has a file tier."""
    budget = None if device_pages is None else device_pages * DEVICE_PAGE
    return KVPool(
        LAYERS,
        HEADS,
        KEY_DIM,
        **SIZES,
        device_bytes=budget,
        host_bytes=host_pages * DEVICE_PAGE,
        folder=folder,
        **options,
    )


TIERS = {
    "device": lambda folder: {},
    "one page, file": lambda folder: dict(device_pages=1, folder=folder),
    "three pages, file": lambda folder: dict(device_pages=3, folder=folder),
    "two pages, host, file": lambda folder: dict(device_pages=2, host_pages=3, folder=folder),
    "two pages, host": lambda folder: dict(device_pages=2, host_pages=200),
    "one page, file, int8": lambda folder: dict(device_pages=1, folder=folder, compress="int8"),
    "three pages, host, file, fp8": lambda folder: dict(device_pages=3, host_pages=2, folder=folder, compress="fp8"),
}


@dataclass
class Entry:
    """One token."""

    id: int
    position: int
    tag: int
    k: Tensor
    v: Tensor


@dataclass
class Model:
    """What a pool should hold: a list of entries per layer and row."""

    compress: str | None = None
    streams: list[list[Entry]] = field(default_factory=lambda: [[] for _ in range(LAYERS * BATCH)])
    next_ids: list[int] = field(default_factory=lambda: [0] * (LAYERS * BATCH))
    snapshots: dict[int, list[list[Entry]]] = field(default_factory=dict)

    def stored(self, x: Tensor) -> Tensor:
        """x as it is read back."""
        return decode(*encode(x, self.compress), x.dtype) if self.compress else x

    def new(self, stream: int, k: Tensor, v: Tensor, positions=None, tags=None) -> list[Entry]:
        """Entries for tokens k, v [n, H, D]."""
        k, v = self.stored(k), self.stored(v)
        entries = []
        for i in range(len(k)):
            id = self.next_ids[stream]
            position = id if positions is None else int(positions[i])
            entries.append(Entry(id, position, 0 if tags is None else int(tags[i]), k[i], v[i]))
            self.next_ids[stream] += 1
        return entries

    def delete(self, stream: int, ids: set[int]) -> None:
        """Gone from the stream and from every snapshot."""
        for streams in (self.streams, *self.snapshots.values()):
            streams[stream] = [e for e in streams[stream] if e.id not in ids]


def assert_equal(pool: KVPool, model: Model) -> None:
    """The pool holds exactly the model's tokens, in order, bit for bit."""
    for layer in range(LAYERS):
        table = pool.tokens(layer)
        for row in range(BATCH):
            expected = model.streams[layer * BATCH + row]
            n = len(expected)
            assert table.ids[row].tolist()[:n] == [e.id for e in expected]
            assert table.positions[row].tolist()[:n] == [e.position for e in expected]
            assert table.tags[row].tolist()[:n] == [e.tag for e in expected]
            assert (table.ids[row, n:] == -1).all() and pool.lengths(layer)[row] == n
            k, v = pool.read(layer, row=row)
            for i, e in enumerate(expected):
                assert torch.equal(k[i], e.k) and torch.equal(v[i], e.v), (layer, row, e.id)


def tier_rows(pool: KVPool) -> list[tuple[str, Tensor]]:
    """Every row of K and V that lies in any tier, in use or not."""
    tiers, rows = pool._pages.tiers, []
    for tier, (name, level) in enumerate(zip(("device", "host", "file"), tiers.levels, strict=True)):
        reached = pool._pages.table.frames_reached(tier)
        if level is None or reached == 0:
            continue
        k, v = level.read(torch.arange(reached))
        rows += [(name, k.flatten(0, 1)), (name, v.flatten(0, 1))]
    return rows


def assert_nothing_left(pool: KVPool, model: Model) -> None:
    """No tier holds bytes of a token that is neither in the pool nor in a snapshot."""
    known = set()
    for streams in (model.streams, *model.snapshots.values()):
        for stream in streams:
            for e in stream:
                known |= {_key(e.k), _key(e.v)}
    for name, rows in tier_rows(pool):
        for row in rows[rows.flatten(1).any(1)]:
            assert _key(row) in known, f"the {name} tier holds bytes of a token that is gone"


def _key(row: Tensor) -> tuple[float, ...]:
    return tuple(row.flatten().tolist())


def assert_summaries(pool: KVPool, tolerance: float = 1e-5) -> None:
    """Every page's summary is that of the keys that the page holds."""
    for layer in range(LAYERS):
        for row in range(BATCH):
            stream = layer * BATCH + row
            for p in range(pool._pages.table.pages(stream)):
                k = pool._pages.page_as_tokens(stream, p).k
                for kind, expected in (("mean", k.mean(0)), ("min", k.amin(0)), ("max", k.amax(0))):
                    actual = pool.summaries(layer, kind)[row, p]
                    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_gathered(pool: KVPool, layer: int, pages: Tensor) -> None:
    """What gather gives for pages [B, n] is what the pool holds there."""
    got = pool.gather(layer, pages)
    for row in range(BATCH):
        for i, p in enumerate(pages[row].tolist()):
            if p < 0:
                assert (got.ids[row, i] == -1).all() and (got.positions[row, i] == -1).all()
                continue
            tokens = pool._pages.page_as_tokens(layer * BATCH + row, p)
            held = got.ids[row, i] >= 0
            slot = int(got.page_table[row, p])
            assert slot >= 0
            assert torch.equal(got.k[slot][held], tokens.k) and torch.equal(got.v[slot][held], tokens.v)
            assert torch.equal(got.ids[row, i][held], tokens.ids)
            assert torch.equal(got.positions[row, i][held], tokens.positions)
            assert torch.equal(got.tags[row, i][held], tokens.tags)
            assert not got.k[slot][~held].any() and not got.v[slot][~held].any()


class Play:
    """A random sequence of calls on a pool and its model; the same seed gives the same sequence."""

    def __init__(self, folder, options: dict, seed: int) -> None:
        self.random = random.Random(seed)
        self.torch = torch.Generator().manual_seed(seed)
        self.options = options
        self.pool = make_pool(**options, summaries=("mean", "min", "max"))
        self.model = Model(options.get("compress"))
        self.path = folder / "pool.safetensors"
        self.device_pages = options.get("device_pages") or 100

    def rows(self, *shape: int) -> tuple[Tensor, Tensor]:
        return (torch.randn(*shape, HEADS, dim, generator=self.torch) for dim in (KEY_DIM, VALUE_DIM))

    def some_stream(self) -> tuple[int, int, int, list[Entry]]:
        layer, row = self.random.randrange(LAYERS), self.random.randrange(BATCH)
        return layer, row, layer * BATCH + row, self.model.streams[layer * BATCH + row]

    def some_ids(self, entries: list[Entry]) -> list[int]:
        count = self.random.randint(1, max(1, len(entries) // 2))
        return self.random.sample([e.id for e in entries], min(count, len(entries)))

    def append(self) -> None:
        layer, count = self.random.randrange(LAYERS), self.random.choice((1, 1, 2, 5, 13))
        k, v = self.rows(BATCH, count)
        given = self.random.random() < 0.5
        positions = torch.randint(1000, (BATCH, count), generator=self.torch) if given else None
        tags = torch.randint(5, (BATCH, count), generator=self.torch)
        lengths = (
            [self.random.randint(0, count) for _ in range(BATCH)] if self.random.random() < 0.3 else [count] * BATCH
        )
        self.pool.append(layer, k, v, positions=positions, tags=tags, lengths=torch.tensor(lengths))
        for b, n in enumerate(lengths):
            own = None if positions is None else positions[b]
            stream = layer * BATCH + b
            self.model.streams[stream] += self.model.new(stream, k[b, :n], v[b, :n], own, tags[b])

    def insert(self) -> None:
        layer, row, stream, entries = self.some_stream()
        if not entries:
            return
        at = self.random.randrange(len(entries))
        k, v = self.rows(self.random.choice((1, 3, 6)))
        self.pool.insert(layer, entries[at].id, k, v, row=row, tags=7)
        new = self.model.new(stream, k, v, None, [7] * len(k))
        self.model.streams[stream] = entries[:at] + new + entries[at:]

    def update(self) -> None:
        layer, row, stream, entries = self.some_stream()
        if not entries:
            return
        ids = self.some_ids(entries)
        k, v = self.rows(len(ids))
        self.pool.update(layer, torch.tensor(ids), k, v, row=row)
        new = {id: i for i, id in enumerate(ids)}
        k, v = self.model.stored(k), self.model.stored(v)
        self.model.streams[stream] = [
            Entry(e.id, e.position, e.tag, k[new[e.id]], v[new[e.id]]) if e.id in new else e for e in entries
        ]

    def delete(self) -> None:
        layer, row, stream, entries = self.some_stream()
        if not entries:
            return
        ids = self.some_ids(entries)
        assert self.pool.delete(layer, torch.tensor(ids), row=row) == len(ids)
        self.model.delete(stream, set(ids))

    def delete_tagged(self) -> None:
        tag = self.random.randrange(5)
        expected = [{e.id for e in stream if e.tag == tag} for stream in self.model.streams]
        assert self.pool.delete_tagged(tag) == sum(map(len, expected))
        for stream, ids in enumerate(expected):
            self.model.delete(stream, ids)

    def snapshot(self) -> None:
        if len(self.model.snapshots) < 3:
            self.model.snapshots[self.pool.snapshot()] = copy.copy([list(s) for s in self.model.streams])

    def roll_back(self) -> None:
        if self.model.snapshots:
            chosen = self.random.choice(list(self.model.snapshots))
            self.pool.roll_back(chosen)
            self.model.streams = [list(s) for s in self.model.snapshots[chosen]]

    def discard(self) -> None:
        if self.model.snapshots:
            chosen = self.random.choice(list(self.model.snapshots))
            self.pool.discard(chosen)
            del self.model.snapshots[chosen]

    def save_and_load(self) -> None:
        self.pool.save(self.path)
        kept = ("device_pages", "host_pages", "folder")
        options = {n: x for n, x in self.options.items() if n in kept}
        budget = options.pop("device_pages", None)
        host = options.pop("host_pages", 0)
        self.pool = KVPool.load(
            self.path,
            device_bytes=None if budget is None else budget * DEVICE_PAGE,
            host_bytes=host * DEVICE_PAGE,
            **options,
        )
        self.model.snapshots.clear()

    def gather(self) -> None:
        layer = self.random.randrange(LAYERS)
        pages = torch.full((BATCH, 2), -1)
        budget = self.device_pages
        for row in range(BATCH):
            held = self.pool._pages.table.pages(layer * BATCH + row)
            for i in range(2):
                if held and budget > 0 and self.random.random() < 0.8:
                    pages[row, i] = self.random.randrange(held)
                    budget -= 1
        assert_gathered(self.pool, layer, pages)

    def run(self, steps: int) -> None:
        """Random calls, each compared with the model."""
        calls = [self.append] * 5 + [self.insert] * 2 + [self.update] * 2 + [self.delete] * 2 + [self.gather] * 3
        calls += [self.snapshot, self.roll_back, self.discard, self.delete_tagged, self.save_and_load]
        for step in range(steps):
            call = self.random.choice(calls)
            call()
            assert_equal(self.pool, self.model), (step, call.__name__)
            assert_nothing_left(self.pool, self.model)
        assert_summaries(self.pool)
