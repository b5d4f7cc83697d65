"""Random calls of the CPU ops below their Python checks: legal ones, and the same with one argument spoilt.

`torch.ops.memattn.*` is public, so C++ must answer an illegal tensor with one error that names the op, whatever it is.
`python hostile.py ROUNDS [SEED]` prints what went wrong; with kernels built by -fsanitize=address,undefined it is the
memory check of all of them: LD_PRELOAD="libasan.so libubsan.so" ASAN_OPTIONS=detect_leaks=0.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import memattn.ops  # noqa: F401  (registers the ops)

LENGTHS = (0, 1, 2, 7, 15, 16, 17, 31, 33, 63, 64, 65, 129, 200)
DIMS = (1, 3, 16, 17, 24, 31, 33, 48, 63, 72, 100, 129, 200, 255, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HUGE = 2**62
VALUES = frozenset({("v", 2), ("v", 3)})  # any V and any multiple of the heads where nothing else has them
QUERIES = frozenset({("q", 1), ("q", 2), ("v", 3)})
WIDTHS = frozenset({("x", 2), ("x2", 2)})  # any divisor
Arguments = dict[str, object]


@dataclass(frozen=True)
class Call:
    """`memattn::op` with its arguments by name. free: sizes that may be any, as (argument, dimension)."""

    op: str
    arguments: Arguments
    free: frozenset[tuple[str, int]] = frozenset()

    def run(self) -> tuple[Tensor, ...]:
        """The results, on copies of what the op may write to."""
        copies = {n: x.clone() if isinstance(x, Tensor) and x.is_contiguous() else x for n, x in self.arguments.items()}
        op = getattr(torch.ops.memattn, self.op).default
        results = op(**{a.name: copies.get(a.name) for a in op._schema.arguments})
        return results if isinstance(results, tuple) else (results,)


class Draw:
    """Random sizes, settings and tensors of one dtype."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.noise = torch.Generator().manual_seed(seed)
        self.dtype = self.one_of(DTYPES)
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32

    def one_of(self, choices):
        return self.random.choice(choices)

    def maybe(self, make: Callable):
        return make() if self.random.random() < 0.5 else None

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.noise).to(dtype or self.dtype)

    def state(self, *shape: int) -> Tensor:
        return self.normal(*shape, dtype=self.wide)

    def gate(self, *shape: int) -> Tensor:
        return -self.state(*shape).abs()

    def flag(self) -> bool:
        return self.random.random() < 0.5

    def sequences(self) -> tuple[int, int, Tensor | None, int]:
        """Batch, tokens, cu_seqlens or None, the number of sequences. Packed ones may be empty."""
        if self.flag():
            batch = self.one_of((0, 1, 2, 3))
            return batch, self.one_of(LENGTHS), None, batch
        lengths = [self.one_of(LENGTHS[:-2]) for _ in range(self.one_of((1, 2, 4)))]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        return 1, sum(lengths), bounds.to(self.one_of((torch.int32, torch.int64))), len(lengths)

    def heads(self) -> tuple[int, int]:
        few = self.one_of((1, 2, 3))
        return few, few * self.one_of((1, 2, 3))

    def rows(self, batch: int) -> tuple[Tensor | None, int]:
        """Indices into a pool, padding among them, and the pool's size."""
        if self.flag():
            return None, batch
        pool = batch + 2
        rows = self.random.sample([*range(pool), -1, -7, pool, HUGE], batch)
        return torch.tensor(rows, dtype=torch.int64), pool


def backward_of(call: Call, draw: Draw, saved: tuple[str, ...], cotangents: dict[str, int], free: tuple = ()) -> Call:
    """The backward of a call: `saved` names its results as backward does ("": unused), cotangents those with one."""
    results = call.run()
    schema = getattr(torch.ops.memattn, f"{call.op}_backward").default._schema.arguments
    named = {**call.arguments, **{name: x for name, x in zip(saved, results, strict=True) if name}}
    for name, i in cotangents.items():
        x = results[i]
        named[name] = None if x.shape == (0,) else draw.normal(*x.shape, dtype=x.dtype)  # [0]: not asked for
    return Call(f"{call.op}_backward", {a.name: named.get(a.name) for a in schema}, frozenset(free))


def delta_rule(draw: Draw) -> Iterator[Call]:
    batch, tokens, bounds, count = draw.sequences()
    heads, value_heads = draw.heads()
    k_dim, v_dim = draw.one_of(DIMS), draw.one_of(DIMS)
    inputs = {
        "q": draw.normal(batch, tokens, heads, k_dim),
        "k": draw.normal(batch, tokens, heads, k_dim) * 0.1,
        "v": draw.normal(batch, tokens, value_heads, v_dim),
        "g": draw.maybe(lambda: draw.gate(batch, tokens, value_heads)),
        "beta": draw.maybe(lambda: draw.normal(batch, tokens, value_heads, dtype=draw.one_of((draw.dtype, draw.wide)))),
    }
    initial = draw.maybe(lambda: draw.state(count, value_heads, k_dim, v_dim))
    settings = {
        "scale": 0.3,
        "qk_l2norm": draw.flag(),
        "chunk_size": draw.one_of((16, 32, 64)),
        "checkpoint_every": draw.one_of((1, 2, 100)),
    }
    forward = Call(
        "gated_delta_rule_cpu",
        {
            **inputs,
            "initial_state": initial,
            "cu_seqlens": bounds,
            **settings,
            "output_final_state": True,
            "save": True,
        },
        VALUES,
    )
    yield forward
    yield backward_of(forward, draw, ("", "", "solve", "states"), {"do": 0, "dfinal_state": 1})
    rows, pool = draw.rows(batch)
    yield Call("gated_delta_rule_step_cpu", {
        **inputs, "state": draw.state(pool, value_heads, k_dim, v_dim), "state_indices": rows, "scale": 0.3,
        "qk_l2norm": draw.flag(),
    }, frozenset([("state", 0)] if rows is not None else []))  # fmt: skip


def linear(draw: Draw) -> Iterator[Call]:
    batch, tokens, bounds, count = draw.sequences()
    heads, value_heads = draw.heads()
    k_dim, v_dim = draw.one_of(DIMS), draw.one_of(DIMS)
    normaliser = draw.flag()
    divide = normaliser and draw.flag()
    inputs = {
        "q": draw.normal(batch, tokens, heads, k_dim).abs(),
        "k": draw.normal(batch, tokens, heads, k_dim).abs(),
        "v": draw.normal(batch, tokens, value_heads, v_dim),
        "g": draw.maybe(lambda: draw.gate(batch, tokens, value_heads)),
    }
    shape = value_heads, k_dim, v_dim + normaliser
    form = {"scale": 0.3, "normaliser": normaliser, "divide": divide}
    initial = draw.maybe(lambda: draw.state(count, *shape).abs())
    settings = {"chunk_size": draw.one_of((16, 32, 64)), "checkpoint_every": draw.one_of((1, 2, 100))}
    forward = Call(
        "linear_attention_cpu",
        {
            **inputs,
            "initial_state": initial,
            "cu_seqlens": bounds,
            **form,
            **settings,
            "output_final_state": True,
            "save": True,
        },
        VALUES,
    )
    yield forward
    cotangents = {"do": 0, "dfinal_state": 2} | ({"ddenominator": 1} if normaliser else {})
    yield backward_of(forward, draw, ("o" if divide else "", "denominator" if divide else "", "", "states"), cotangents)
    rows, pool = draw.rows(batch)
    free = frozenset([("state", 0)] if rows is not None else [])
    yield Call(
        "linear_attention_step_cpu",
        {**inputs, "state": draw.state(pool, *shape).abs(), "state_indices": rows, **form},
        free,
    )


def convolution(draw: Draw) -> Iterator[Call]:
    batch, tokens, bounds, count = draw.sequences()
    channels, width = draw.one_of((1, 3, 16, 31, 255, 256, 257, 600)), draw.one_of((2, 3, 4))
    inputs = {
        "x": draw.normal(batch, tokens, channels),
        "weight": draw.normal(channels, width, dtype=draw.one_of((draw.dtype, draw.wide))),
        "bias": draw.maybe(lambda: draw.normal(channels, dtype=draw.one_of((draw.dtype, draw.wide)))),
    }
    initial = draw.maybe(lambda: draw.state(count, channels, width - 1))
    silu = draw.flag()
    forward = Call(
        "causal_conv1d_cpu",
        {**inputs, "initial_state": initial, "cu_seqlens": bounds, "silu": silu, "output_final_state": True},
        frozenset([("weight", 1), ("x", 0), ("x", 1)]),
    )
    yield forward
    yield backward_of(forward, draw, ("", ""), {"dy": 0, "dfinal_state": 1}, (("weight", 1),))
    rows, pool = draw.rows(batch)
    free = frozenset([("x", 1), *([("state", 0)] if rows is not None else [])])
    yield Call(
        "causal_conv1d_step_cpu",
        {**inputs, "state": draw.state(pool, channels, width - 1), "state_indices": rows, "silu": silu},
        free,
    )


def scan(draw: Draw) -> Iterator[Call]:
    batch, tokens, bounds, count = draw.sequences()
    width = draw.one_of((1, 3, 16, 31, 64, 65, 200))
    channels = width * draw.one_of((1, 2, 5, 9))
    inputs = {
        "g": draw.gate(batch, tokens, channels),
        "x": draw.normal(batch, tokens, width),
        "x2": draw.maybe(lambda: draw.normal(batch, tokens, channels)),
    }
    chunk = draw.one_of((0, 1, 5, 16, 50, 500))
    states = {n: draw.maybe(lambda: draw.state(count, channels)) for n in ("initial_state", "initial_state2")}
    forward = Call("gated_scan_cpu", {
        **inputs, **states, "cu_seqlens": bounds, "ema": draw.flag(), "chunk_size": chunk, "emit_all": draw.flag(),
        "emit_ends": chunk > 0 and draw.flag(), "output_final_state": draw.flag(),
    }, WIDTHS)  # fmt: skip
    yield forward
    cotangents = {n: i for i, n in enumerate(("dy", "dy2", "dends", "dends2", "dfinal_state", "dfinal_state2"))}
    yield backward_of(forward, draw, ("",) * 6, cotangents, tuple(WIDTHS))
    rows, pool = draw.rows(batch)
    restart = draw.maybe(lambda: torch.rand(batch, generator=draw.noise) < 0.5)
    step = {
        "g": inputs["g"],
        "x": inputs["x"],
        "state": draw.state(pool, channels),
        "restart": restart,
        "state_indices": rows,
        "ema": draw.flag(),
    }
    yield Call("gated_scan_step_cpu", step, WIDTHS | {("state", 0)})


def mask(draw: Draw) -> dict[str, int]:
    """A random mask of attention."""
    size = lambda: draw.one_of((0, 0, 0, 1, 5, 40, 300))  # noqa: E731
    return {
        "causal": draw.one_of((0, 1, 1, 2)), "window": size(), "prefix_len": size(), "block_size": size(),
        "dilation": size(), "dilated_window": size(), "dilated_prefix": size(),
    }  # fmt: skip


def softmax(draw: Draw) -> Iterator[Call]:
    batch, tokens, bounds, _ = draw.sequences()
    key_heads, heads = draw.heads()
    k_dim, v_dim = draw.one_of(DIMS), draw.one_of(DIMS)
    keys, key_bounds = tokens + draw.one_of((0, 3, 70)), bounds
    if bounds is not None:
        key_bounds = bounds.clone()
        key_bounds[-1] = keys
    decay = draw.maybe(lambda: draw.normal(batch, keys, heads, dtype=torch.float64))
    merged = draw.flag()
    forward = Call("attention_cpu", {
        "q": draw.normal(batch, tokens, heads, k_dim), "k": draw.normal(batch, keys, key_heads, k_dim),
        "v": draw.normal(batch, keys, key_heads, v_dim), "sink": draw.maybe(lambda: draw.state(heads)), "decay": decay,
        "cu_seqlens_q": bounds, "cu_seqlens_k": key_bounds,
        "first_scores": draw.state(batch, tokens, heads) if merged else None,
        "first_values": draw.normal(batch, tokens, heads, v_dim) if merged else None,
        **mask(draw), "summary": draw.one_of((0, 0, 4)),
        "q_offset": -1 if decay is not None else draw.one_of((-1, 0, 5, 100)), "tile_heads": draw.flag(), "scale": 0.2,
    }, QUERIES)  # fmt: skip
    yield forward
    yield backward_of(forward, draw, ("o", "lse"), {"do": 0, "dlse": 1})


def mass(draw: Draw) -> Iterator[Call]:
    batch, tokens, bounds, _ = draw.sequences()
    key_heads, heads = draw.heads()
    dim = draw.one_of(DIMS)
    keys, key_bounds = tokens + draw.one_of((0, 3, 300)), bounds
    if bounds is not None:
        key_bounds = bounds.clone()
        key_bounds[-1] = keys
    decay = draw.maybe(lambda: draw.normal(batch, keys, heads, dtype=torch.float64))
    yield Call("attention_mass_cpu", {
        "q": draw.normal(batch, tokens, heads, dim), "k": draw.normal(batch, keys, key_heads, dim),
        "lse": draw.state(batch, tokens, heads), "decay": decay, "cu_seqlens_q": bounds, "cu_seqlens_k": key_bounds,
        **mask(draw), "summary": draw.one_of((0, 0, 4)),
        "q_offset": -1 if decay is not None else draw.one_of((-1, 0, 5, 100)), "tile_heads": draw.flag(), "scale": 0.2,
        "start": draw.one_of((0, 3, -5, -HUGE)), "stop": draw.one_of((HUGE, 0, 20, -2)), "grouped": draw.flag(),
    }, frozenset({("k", 1), ("k", 2)}))  # fmt: skip


def decode(draw: Draw) -> Iterator[Call]:
    batch, tokens = draw.one_of((0, 1, 3)), draw.one_of((0, 1, 2, 9, 20))
    key_heads, heads = draw.heads()
    k_dim, v_dim = draw.one_of(DIMS), draw.one_of(DIMS)
    paged, size = draw.flag(), draw.one_of((1, 16, 65, 700))
    rows, pages = (draw.one_of((0, 3)), draw.one_of((1, 4))) if paged else (batch, 1)
    table = torch.tensor(
        [[draw.one_of((0, 1, 2, -1, 9)) for _ in range(pages)] for _ in range(batch)], dtype=torch.int32
    )
    capacity = size * pages
    lengths = [
        draw.one_of((0, 1, capacity // 2, capacity, capacity + 3, 10 * capacity, HUGE, -4)) for _ in range(batch)
    ]
    yield Call("attention_decode_cpu", {
        "q": draw.normal(batch, tokens, heads, k_dim), "k_cache": draw.normal(rows, size, key_heads, k_dim),
        "v_cache": draw.normal(rows, size, key_heads, v_dim), "cache_seqlens": torch.tensor(lengths, dtype=torch.int64),
        "page_table": table.reshape(batch, pages) if paged else None, "sink": draw.maybe(lambda: draw.state(heads)),
        "decay_cache": draw.maybe(lambda: draw.normal(rows, size, heads, dtype=torch.float64)),
        "alibi_slopes": draw.maybe(lambda: draw.state(heads).abs()),
        "ring_start": draw.one_of((-1, 0, capacity // 2, capacity - 1)), **mask(draw),
        "tile_heads": draw.flag(), "scale": 0.2,
    }, QUERIES | {("v_cache", 3), ("page_table", 1)})  # fmt: skip


def rat(draw: Draw) -> Iterator[Call]:
    batch, tokens, bounds, count = draw.sequences()
    key_heads, heads = draw.heads()
    dim = draw.one_of([d for d in DIMS if d % 2 == 0])
    stride, window, prefix = draw.one_of((1, 4, 16, 100, 500)), draw.one_of((1, 1, 2, 40)), draw.one_of((0, 0, 3, 70))
    local = window + prefix - 1
    settings = {
        "restart": draw.one_of((0, 1, stride, 300)), "stride": stride, "unit": draw.one_of((1, stride)),
        "window": window, "prefix_len": prefix, "rope_base": draw.one_of((0.0, 1e4)),
        "tile_heads": draw.flag(), "scale": 0.2,
    }  # fmt: skip
    inputs = {
        "q": draw.normal(batch, tokens, key_heads, dim), "k": draw.normal(batch, tokens, key_heads, dim),
        "v": draw.normal(batch, tokens, heads, dim), "g": draw.gate(batch, tokens, heads, dim),
    }  # fmt: skip

    def state(rows: int, held: int, lengths: list[int]) -> Arguments:
        near = [draw.normal(rows, local, heads, dim) if local else None for _ in range(2)]
        return {
            "keys": draw.normal(rows, held, heads, dim), "values": draw.normal(rows, held, heads, dim),
            "running_key": draw.state(rows, heads, dim), "running_value": draw.state(rows, heads, dim),
            "local_keys": near[0], "local_values": near[1], "length": torch.tensor(lengths, dtype=torch.int64),
        }  # fmt: skip

    names = "keys", "values", "running_key", "running_value", "local_keys", "local_values", "length"
    held = draw.one_of((0, 3, 70))
    lengths = [draw.random.randrange(stride * (held + 1)) for _ in range(count)]
    before = state(count, held, lengths) if draw.flag() else dict.fromkeys(names)
    forward = Call("rat_attention_cpu", {**inputs, **before, "cu_seqlens": bounds, **settings})
    yield forward
    saved = "o", "out_keys", "out_values", "", "", "out_local_keys", "out_local_values", "lse"
    cotangents = {
        "do": 0,
        "dout_keys": 1,
        "dout_values": 2,
        "dfinal_key": 3,
        "dfinal_value": 4,
        "dlocal_keys": 5,
        "dlocal_values": 6,
    }
    yield backward_of(forward, draw, saved, cotangents)
    rows, pool = draw.rows(batch)
    long = [draw.one_of((0, 1, stride * 3, 5 * stride * (held + 1), -3, HUGE)) for _ in range(pool)]
    yield Call(
        "rat_attention_step_cpu", {**inputs, **state(pool, held, long), "state_indices": rows, **settings}, frozenset()
    )


def segments(draw: Draw) -> Iterator[Call]:
    batch, tokens, bounds, count = draw.sequences()
    key_heads, heads = draw.heads()
    k_dim, v_dim = draw.one_of((*DIMS, 300)), draw.one_of((*DIMS, 300))
    keys, key_bounds = tokens + draw.one_of((0, 3, 70)), bounds
    if bounds is not None:
        key_bounds = bounds.clone()
        key_bounds[-1] = keys
    normalize = draw.flag()
    forward = Call("segment_memory_cpu", {
        "q": draw.normal(batch, tokens, heads, k_dim).abs(), "k": draw.normal(batch, keys, key_heads, k_dim).abs(),
        "v": draw.normal(batch, keys, key_heads, v_dim),
        "beta": draw.maybe(lambda: draw.normal(batch, keys, key_heads, dtype=draw.one_of((draw.dtype, draw.wide)))),
        "initial_state": draw.maybe(lambda: draw.state(count, key_heads, k_dim, v_dim + normalize).abs()),
        "cu_seqlens": bounds, "cu_seqlens_k": key_bounds, "segment_size": draw.one_of((1, 5, 16, 70, 1000, HUGE)),
        "key_segment_size": draw.one_of((1, 5, 16, 70, 1000, HUGE)), "delta": draw.flag(), "normalize": normalize,
        "correction": normalize and draw.flag(), "causal": draw.flag(), "eps": 1e-6,
    }, QUERIES)  # fmt: skip
    yield forward
    yield backward_of(forward, draw, ("o", "", "states"), {"do": 0, "dfinal_state": 1})


def selection(draw: Draw) -> Iterator[Call]:
    rows, columns = draw.one_of((0, 1, 5)), draw.one_of(LENGTHS)
    lengths = torch.randint(0, columns + 1, (rows,), generator=draw.noise)
    yield Call("topk_cpu", {
        "scores": draw.normal(rows, columns), "k": draw.one_of((1, 3, 64, 4096)), "lengths": lengths,
        "threshold": draw.one_of((-float("inf"), 0.5)), "sorted": draw.flag(),
    }, frozenset({("scores", 1)}))  # fmt: skip


def nearest(draw: Draw) -> Iterator[Call]:
    batch, queries, keys = draw.one_of((0, 1, 2)), draw.one_of(LENGTHS), draw.one_of(LENGTHS)
    key_heads, heads = draw.heads()
    dim = draw.one_of(DIMS)
    yield Call("knn_cpu", {
        "q": draw.normal(batch, queries, heads, dim), "keys": draw.normal(batch, keys, key_heads, dim),
        "k": draw.one_of((1, 5, 128)), "cosine": draw.flag(), "threshold": draw.one_of((-float("inf"), 0.5)),
        "lengths": draw.maybe(lambda: torch.randint(0, keys + 1, (batch,), generator=draw.noise)),
    }, frozenset({("q", 1), ("q", 2), ("keys", 1), ("keys", 2)}))  # fmt: skip


def summarised(draw: Draw) -> Iterator[Call]:
    batch, tokens, block = draw.one_of((1, 2)), draw.one_of(LENGTHS), draw.one_of((1, 7, 64))
    heads, dim = draw.one_of((1, 3)), draw.one_of(DIMS)
    begins = torch.arange(0, max(tokens, 1), block)
    forward = Call("block_summary_cpu", {
        "k": draw.normal(batch, tokens, heads, dim), "begins": begins, "ends": (begins + block).clamp_max(tokens),
        "lengths": torch.randint(0, tokens + 1, (batch,), generator=draw.noise), "mode": 0,
    }, frozenset({("k", 1), ("k", 2), ("k", 3)}))  # fmt: skip
    yield forward
    yield replace(forward, arguments={**forward.arguments, "mode": draw.one_of((1, 2))})
    yield backward_of(forward, draw, ("", ""), {"dvalues": 0}, (("k", 1),))
    key_heads, query_heads = draw.heads()
    r = draw.normal(batch, tokens, key_heads, dim)
    yield Call("block_product_cpu", {"q": draw.state(batch, 2, query_heads, dim), "r": r},
               frozenset({("q", 1), ("q", 2), ("r", 1), ("r", 2)}))  # fmt: skip


def listed(draw: Draw) -> Iterator[Call]:
    batch, tokens, bounds, _ = draw.sequences()
    key_heads, heads = draw.heads()
    k_dim, v_dim, entries = draw.one_of(DIMS), draw.one_of(DIMS), draw.one_of((0, 1, 7, 40))
    paged, size = bounds is None and draw.flag(), draw.one_of((1, 16, 65))
    rows, keys = (draw.one_of((1, 3)), size) if paged else (batch, tokens)
    lists = (batch, tokens, draw.one_of((1, key_heads)), entries)
    lists_free = frozenset({("indices", 2), ("indices", 3), ("page_table", 1)})
    whole = lambda low, high, *shape: torch.randint(low, high, shape, generator=draw.noise, dtype=torch.int32)  # noqa: E731
    forward = Call("sparse_attention_cpu", {
        "q": draw.normal(batch, tokens, heads, k_dim), "k": draw.normal(rows, keys, key_heads, k_dim),
        "v": draw.normal(rows, keys, key_heads, v_dim), "indices": whole(-2, 9, *lists),
        "counts": draw.maybe(lambda: whole(-1, entries + 2, *lists[:3])),
        "q_positions": draw.maybe(lambda: whole(-3, 200, batch, tokens)),
        "bias": draw.maybe(lambda: draw.state(batch, tokens, key_heads, entries)),
        "sink": draw.maybe(lambda: draw.state(heads)),
        "page_table": whole(-2, rows + 1, batch, 3) if paged else None,
        "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "unit": draw.one_of((1, 4, 64)), "scale": 0.2,
    }, lists_free | {("q", 2), ("v", 3)})  # fmt: skip
    yield forward
    backward = backward_of(forward, draw, ("o", "lse"), {"do": 0, "dlse": 1}, lists_free)
    backward.arguments["memory"] = draw.flag()
    yield backward


def joining(draw: Draw) -> Iterator[Call]:
    shape = (draw.one_of((0, 1, 3)), draw.one_of(LENGTHS), draw.one_of((1, 3)), draw.one_of(DIMS))
    parts = draw.one_of((2, 3))
    merge = Call("merge_states_cpu", {
        "outputs": [draw.normal(*shape) for _ in range(parts)], "lses": [draw.state(*shape[:3]) for _ in range(parts)],
        "sink": draw.maybe(lambda: draw.state(shape[2])),
    })  # fmt: skip
    yield merge
    yield backward_of(merge, draw, ("", "lse"), {"do": 0, "dlse": 1})
    gate = draw.one_of((draw.state(shape[2]), draw.state(*shape[:3]), draw.normal(*shape)))
    combine = Call("gated_combine_cpu", {
        "a": draw.normal(*shape), "b": draw.normal(*shape), "gate": gate, "mode": draw.one_of((0, 1, 2)),
    })  # fmt: skip
    yield combine
    yield backward_of(combine, draw, ("",), {"dy": 0})


def copying(draw: Draw) -> Iterator[Call]:
    rows, slots, shape = draw.one_of((1, 3, 9)), draw.one_of((1, 4, 8)), draw.one_of(((2, 16), (3,), (64, 2, 33)))
    count = draw.one_of((0, 1, slots))
    yield Call("gather_copy_cpu", {
        "source": draw.normal(rows, *shape), "sources": torch.randint(rows, (count,), generator=draw.noise),
        "target": draw.normal(slots, *shape), "targets": torch.randperm(slots, generator=draw.noise)[:count],
    }, frozenset({("source", 0), ("target", 0)}))  # fmt: skip


FAMILIES = (
    delta_rule, linear, convolution, scan, softmax, mass, decode, rat, segments, joining, selection, nearest,
    summarised, listed, copying,
)  # fmt: skip


# --- what spoils a call -----------------------------------------------------------------------------------------------


def other_rank(x: Tensor, draw: Draw) -> Tensor:
    return x.unsqueeze(0) if draw.flag() or x.dim() == 1 else x.flatten(0, 1)


def other_dtype(x: Tensor, draw: Draw) -> Tensor:
    kinds = (torch.int8, torch.complex64, torch.bool, torch.float8_e4m3fn)
    return x.to(draw.one_of([d for d in kinds if d != x.dtype]))


def strided(x: Tensor, draw: Draw) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def on_meta(x: Tensor, draw: Draw) -> Tensor:
    return x.to("meta")


SPOIL = {"rank": other_rank, "dtype": other_dtype, "strides": strided, "device": on_meta}
BOUNDS = (
    lambda b: b + 1,
    lambda b: b * 2 + (b == 0) * -1,
    lambda b: b.flip(0) - 1,
    lambda b: b[:0],
    lambda b: b + 2**30,
)


def spoilt(call: Call, draw: Draw) -> tuple[str, Call, bool]:
    """What was done to one argument of the call, the call, and whether it must be refused now."""
    name, x = draw.one_of([(n, x) for n, x in call.arguments.items() if x is not None and not isinstance(x, float)])
    several, i = (x, draw.random.randrange(len(x))) if isinstance(x, list) else (None, 0)
    x = several[i] if several else x

    def change(y) -> Call:
        return replace(call, arguments={**call.arguments, name: [*several[:i], y, *several[i + 1 :]] if several else y})

    if not isinstance(x, Tensor):
        value = draw.one_of((-1, 0, -HUGE, HUGE, 2**63 - 1, 2**58)) if not isinstance(x, bool) else not x
        return f"{name} = {value}", change(value), False
    kind = draw.one_of((*SPOIL, "sizes", "values"))
    if kind == "values" and name.startswith("cu_seqlens"):
        return f"{name}: bounds", change(draw.one_of(BOUNDS)(x)), True
    if kind in ("sizes", "values"):
        d = draw.random.randrange(x.dim())
        longer = (
            torch.cat([x, x[(slice(None),) * d + (slice(0, 1),)]], d)
            if x.shape[d]
            else x.new_ones([n + (i == d) for i, n in enumerate(x.shape)])
        )
        size = longer if draw.flag() or x.shape[d] == 0 else x.narrow(d, 1, x.shape[d] - 1).contiguous()
        return f"{name}: size {d}", change(size), (name, d) not in call.free and not name.startswith("cu_seqlens")
    y = SPOIL[kind](x, draw)
    return f"{name}: {kind}", change(y), kind != "strides" or not y.is_contiguous()


def fault(call: Call, must_fail: bool) -> str | None:
    """Why the answer to a spoilt call is wrong, or None."""
    try:
        call.run()
    except (RuntimeError, NotImplementedError, MemoryError) as error:
        text = str(error).splitlines()[0]
        return None if call.op in text and ("; got " in text or "must" in text) else f"unclear error: {text[:150]}"
    return "accepted" if must_fail else None


def faults(rounds: int, seed: int = 0) -> list[str]:
    """Legal calls that fail, and spoilt ones that are not refused clearly."""
    found = []
    for number in range(seed, seed + rounds):
        for family in FAMILIES:
            draw = Draw(number)
            for call in family(draw):
                try:
                    call.run()
                except RuntimeError as error:
                    found.append(f"{number} {call.op}: legal call refused: {error}")
                for _ in range(4):
                    what, broken, must_fail = spoilt(call, draw)
                    if why := fault(broken, must_fail):
                        found.append(f"{number} {call.op} {what}: {why}")
    return found


if __name__ == "__main__":
    for line in faults(*map(int, sys.argv[1:])):
        print(line)
