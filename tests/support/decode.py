"""Shapes, caches and judgement of the attention_decode tests: cases, cache layouts, relations between calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from memattn.reference import attention_decode as reference
from support import relations
from support.compare import CEILING, assert_close_to_truth, relative_error, to_float64

CHECKS: dict[str, Callable] = {}
CACHES = ("k_cache", "v_cache", "decay_cache")


@dataclass(frozen=True)
class Case:
    """The last `queries` tokens of rows that hold `lengths` tokens."""

    name: str
    mask: dict = field(default_factory=dict, hash=False)
    lengths: tuple[int, ...] = (40, 3, 0, 70, 1)
    capacity: int = 80
    queries: int = 1
    heads: int = 4
    key_heads: int = 2
    key_dim: int = 16
    value_dim: int = 24
    sinks: int | None = None  # None: no sink; 0: [HQ]; r: [HQ, r]
    decay: float | None = None
    alibi: bool = False

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict:
        """The arguments of one call on a contiguous cache; what lies beyond a row's tokens is NaN."""
        noise, wide = torch.Generator().manual_seed(seed), torch.float64 if dtype == torch.float64 else torch.float32
        rows = len(self.lengths)

        def normal(*shape, scale=1.0, to=dtype):
            return (scale * torch.randn(shape, generator=noise)).to(device, to)

        inputs: dict = {
            "q": normal(rows, self.queries, self.heads, self.key_dim, scale=2.0),
            "k_cache": normal(rows, self.capacity, self.key_heads, self.key_dim),
            "v_cache": normal(rows, self.capacity, self.key_heads, self.value_dim),
            "cache_seqlens": torch.tensor(self.lengths, device=device, dtype=torch.int32),
        }
        if self.sinks is not None:
            inputs["sink"] = normal(self.heads, *((self.sinks,) if self.sinks else ()), to=wide)
        if self.decay is not None:
            steps = normal(rows, self.capacity, self.heads, to=torch.float64).abs()
            inputs["decay_cache"] = (-self.decay * steps).cumsum(1)
        if self.alibi:
            inputs["alibi_slopes"] = (0.5 ** torch.arange(1, self.heads + 1)).to(device, wide)
        unused = torch.arange(self.capacity, device=device) >= inputs["cache_seqlens"][:, None]
        for name in CACHES:
            if name in inputs:
                inputs[name][unused] = torch.nan
        return {**inputs, **self.mask}


def case(name: str, mask: dict | None = None, **sizes) -> Case:
    """A case with these mask arguments."""
    return Case(name, mask or {}, **sizes)


CASES = (
    case("one token"),
    case("several tokens", queries=5, lengths=(40, 3, 0, 70, 5)),
    case("many tokens", queries=19, lengths=(80, 3, 0, 70, 19)),
    case("full", {"causal": False}, queries=3),
    case("window 1", {"window": 1}, queries=2),
    case("window", {"window": 7}, queries=4),
    case("prefix and window", {"prefix_len": 5, "window": 9}, queries=3),
    case("block-local", {"block_size": 8}, queries=6),
    case("block-causal", {"causal": "block", "block_size": 8}, queries=6),
    case("dilated", {"chunk_rule": ("dilated", 6, 4, 5)}, queries=3),
    case("no grid", {"chunk_rule": ("dilated", 2**31 - 1, 4, 5)}, queries=3),
    case("sink", {"window": 8}, sinks=0),
    case("sinks", sinks=3, queries=2),
    case("decay", decay=0.2, queries=3),
    case("decay, alibi, sink", {"window": 20}, decay=0.05, alibi=True, sinks=0),
    case("tile", {"head_map": "tile"}, queries=2),
    case("tile, alibi", {"head_map": "tile"}, alibi=True),
    case("scale", {"scale": 0.6}, key_dim=40, value_dim=56),
    case("odd", key_dim=17, value_dim=23, queries=2),
    case("wide", key_dim=128, value_dim=256, key_heads=1, queries=2),
    case("many heads", heads=8, key_heads=1, lengths=(40,)),
    case("own heads", heads=3, key_heads=3),
    case("long", lengths=(1500, 700, 513), capacity=1500, queries=2, key_dim=32, value_dim=32),
    case("long window", {"window": 300, "prefix_len": 3}, lengths=(1500, 700, 513), capacity=1500),
    case("long decay", lengths=(1100, 64), capacity=1100, decay=0.01),
)  # fmt: skip
ROUNDED = ("one token", "several tokens", "prefix and window", "decay", "wide", "long")
SMALL = case("small", {"window": 11}, queries=3, sinks=2)


@functools.cache
def truth_of(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The definition in float64 on the case's inputs; `chunked`, itself tested against the loop, where that is slow."""
    definition = reference.chunked if case.capacity > 500 else reference.loop
    return definition(**to_float64(case.make(dtype)))._asdict()


def finite(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results with lse = 0 in the rows that see nothing; both must agree which those are, and give them no output."""
    empty = (truth["lse"] == -torch.inf).to(results["lse"].device)
    assert torch.equal(results["lse"] == -torch.inf, empty), "rows that see nothing"
    assert not results["o"][empty].any(), "a row that sees nothing"
    return {"o": results["o"], "lse": results["lse"].masked_fill(empty, 0.0)}


def judge(case: Case, dtype: torch.dtype, actual: dict[str, Tensor]) -> None:
    """The tolerance rule of support.compare, against plain torch in the same dtype."""
    truth = truth_of(case, dtype)
    expected, other = finite(truth, truth), finite(reference.chunked(**case.make(dtype))._asdict(), truth)
    # a handful of values proves nothing about the ratio of two roundings
    other = {n: x if x.numel() >= 100 else expected[n] * (1 + CEILING[dtype]) for n, x in other.items()}
    assert_close_to_truth(finite(actual, truth), other, expected, CEILING[dtype])


def relation(check: Callable) -> Callable:
    """Enter a check in CHECKS under its name."""
    CHECKS[check.__name__] = check
    return check


def assert_equal_results(actual, expected, what: str, tolerance: float = 2e-5) -> None:
    """o and lse within a relative error, or bit for bit with tolerance 0."""
    for name, x, y in zip(("o", "lse"), actual, expected, strict=True):
        error = relative_error(x, y)
        assert error <= tolerance, f"{what}, {name}: relative error {error:.3g} > {tolerance:.3g}"


def paged(inputs: dict, page_size: int = 8, seed: int = 5) -> dict:
    """The same call on a paged cache: pages in random order, tables padded with −1, spare pages full of NaN."""
    lengths, (rows, capacity) = inputs["cache_seqlens"], inputs["k_cache"].shape[:2]
    pages = -(-capacity // page_size)
    order = torch.randperm(rows * pages + 3, generator=torch.Generator().manual_seed(seed)).to(lengths.device)
    table = order[: rows * pages].view(rows, pages)
    result = dict(inputs)
    for name in CACHES:
        if name in inputs:
            cache = inputs[name]
            padded = cache.new_full((rows, pages * page_size, *cache.shape[2:]), torch.nan)
            padded[:, :capacity] = cache
            pool = cache.new_full((rows * pages + 3, page_size, *cache.shape[2:]), torch.nan)
            pool[table.flatten()] = padded.unflatten(1, (pages, page_size)).flatten(0, 1)
            result[name] = pool
    needed = torch.arange(pages, device=lengths.device) * page_size < lengths[:, None]
    result["page_table"] = torch.where(needed, table, -1).int()
    return result


def in_ring(inputs: dict, capacity: int, ring_start: int = 0) -> dict:
    """The same call on a ring cache of so many slots; rows hold what a loop of single writes leaves there."""
    result = {**inputs, "ring_start": ring_start}
    for name in CACHES:
        if name in inputs:
            cache = inputs[name]
            ring = cache.new_full((cache.shape[0], capacity, *cache.shape[2:]), torch.nan)
            for b, tokens in enumerate(inputs["cache_seqlens"].tolist()):
                for j in range(tokens):
                    slot = j if j < ring_start else ring_start + (j - ring_start) % (capacity - ring_start)
                    ring[b, slot] = cache[b, j]
            result[name] = ring
    return result


def only_row(inputs: dict, b: int) -> dict:
    """Row b alone."""
    per_row = ("q", "cache_seqlens", *CACHES)
    return {n: x[b : b + 1] if n in per_row else x for n, x in inputs.items()}


@relation
def equals_definition(op, device="cpu"):
    for c in (c for c in CASES if c.capacity <= 500):
        truth = truth_of(c)
        actual = finite(op(**c.make(device=device))._asdict(), truth)
        assert_equal_results(actual.values(), finite(truth, truth).values(), c.name)


@relation
def paged_equals_contiguous(op, device="cpu", tolerance=1e-6):
    for c in (SMALL, replace(SMALL, decay=0.1), case("dilated", {"chunk_rule": ("dilated", 6, 4, 5)}), CASES[0]):
        inputs = c.make(device=device)
        for size in (1, 8, 33):
            assert_equal_results(op(**paged(inputs, size)), op(**inputs), f"{c.name}, pages of {size}", tolerance)


@relation
def missing_page_is_not_seen(op, device="cpu"):
    inputs = case("pages", lengths=(20, 20)).make(device=device)
    with_pages = paged(inputs)
    with_pages["page_table"][1, 1] = -1
    ours, alone = op(**with_pages), op(**inputs)
    assert_equal_results([x[:1] for x in ours], [x[:1] for x in alone], "the other row")
    keys = torch.tensor([*range(8), *range(16, 20)], device=device)
    rest = {**only_row(inputs, 1), "causal": False, "cache_seqlens": torch.tensor([12], device=device)}
    rest |= {n: rest[n][:, keys].contiguous() for n in CACHES if n in rest}
    assert_equal_results([x[1:] for x in ours], op(**rest), "the row without its page")


@relation
def ring_equals_contiguous(op, device="cpu", tolerance=1e-6):
    """With and without slots before the ring, before and after rows have outgrown it, whole or paged."""
    for start, mask in ((0, {}), (3, {"prefix_len": 3})):
        for t, ring in ((1, 11), (3, 13), (3, 29)):
            c = case("ring", {"window": 11, **mask}, queries=t, decay=None if mask else 0.1, sinks=0)
            inputs = c.make(device=device)
            expected, rings = op(**inputs), in_ring(inputs, start + ring, start)
            assert_equal_results(op(**rings), expected, f"ring {ring} from {start}", tolerance)
            slots = start + ring
            for size in (slots, 8)[: 2 if slots % 8 == 0 else 1]:  # one page a row is a pool of rows
                pools = paged({**rings, "cache_seqlens": rings["cache_seqlens"].clamp(max=slots)}, size)
                pools["cache_seqlens"] = rings["cache_seqlens"]
                assert_equal_results(op(**pools), expected, f"paged ring {ring} from {start}", tolerance)


@relation
def ring_forgets_what_it_overwrote(op, device="cpu"):
    """Without a window the ring itself is one."""
    inputs = case("ring", lengths=(40, 70, 9)).make(device=device)
    expected = op(**{**inputs, "window": 12})
    assert_equal_results(op(**in_ring(inputs, 12)), expected, "ring of 12")
    expected = op(**{**inputs, "window": 12, "prefix_len": 4})
    assert_equal_results(op(**in_ring(inputs, 16, 4)), expected, "ring of 12 after 4 fixed slots")


@relation
def queries_together_equal_one_by_one(op, device="cpu", tolerance=1e-6):
    for c in CASES:
        if c.queries > 1 and c.mask.get("causal", True) is True and "prefix_len" not in c.mask:  # which looks ahead
            inputs = c.make(device=device)
            whole = op(**inputs)
            for t in range(c.queries):
                before = inputs["cache_seqlens"] - (c.queries - 1 - t)
                step = {**inputs, "q": inputs["q"][:, t : t + 1], "cache_seqlens": before.clamp(min=-1)}
                assert_equal_results(op(**step), [x[:, t : t + 1] for x in whole], f"{c.name}, query {t}", tolerance)


@relation
def equals_attention(op, device="cpu"):
    """Prefill and decode are one attention: the last queries of a whole sequence."""
    from memattn.ops import attention

    for c in CASES:
        inputs = c.make(device=device)
        masks = {n: x for n, x in inputs.items() if n in {*c.mask, "sink", "alibi_slopes"}}
        ours = op(**inputs)
        for b, tokens in enumerate(c.lengths):
            if tokens < c.queries:
                continue
            k, v = (inputs[n][b : b + 1, :tokens] for n in CACHES[:2])
            if c.decay is not None:
                sums = inputs["decay_cache"][b : b + 1, :tokens]
                masks["log_decay"] = torch.cat([sums[:, :1], sums.diff(dim=1)], 1).float()
            whole = attention(inputs["q"][b : b + 1], k, v, q_offset=tokens - c.queries, backend="chunked", **masks)
            assert_equal_results([x[b : b + 1] for x in ours], whole, f"{c.name}, row {b}")


@relation
def parts_of_the_keys_merge(op, device="cpu"):
    from memattn.ops import merge_states

    inputs = case("parts", {"causal": False}, lengths=(70, 70)).make(device=device)
    parts = []
    for a, b in ((0, 1), (1, 41), (41, 70)):
        cut = {n: inputs[n][:, a:b].contiguous() for n in CACHES[:2]}
        parts.append(op(**{**inputs, **cut, "cache_seqlens": torch.tensor([b - a] * 2, device=device)}))
    merged = merge_states([p.o for p in parts], [p.lse for p in parts])
    assert_equal_results(merged, op(**inputs), "three parts")


@relation
def batch_invariance(op, device="cpu", tolerance=1e-6):
    for c in (SMALL, CASES[-3]):
        inputs = c.make(device=device)
        whole = op(**inputs)
        for b in range(len(c.lengths)):
            alone = op(**only_row(inputs, b))
            assert_equal_results(alone, [x[b : b + 1] for x in whole], f"{c.name}, row {b}", tolerance)


@relation
def padding_rows_give_nothing(op, device="cpu"):
    inputs = case("padding", {"prefix_len": 2}, lengths=(0, 5, 1), queries=2, sinks=0).make(device=device)
    inputs["cache_seqlens"][0] = -1
    o, lse = op(**inputs)
    assert not o[0].any() and (lse[0] == -torch.inf).all()
    assert not o[2, 0].any() and (lse[2, 0] == -torch.inf).all() and lse[2, 1].isfinite().all()
    assert o.isfinite().all()


@relation
def inputs_unchanged_and_repeated(op, device="cpu"):
    inputs = replace(SMALL, decay=0.1).make(device=device)
    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, Tensor)}
    relations.assert_same(op(**inputs), op(**inputs), "a second call gives other bits")
    relations.assert_same([inputs[n] for n in before], before.values(), "an input was overwritten")


@relation
def nothing_at_all(op, device="cpu"):
    """No rows, no queries, no slots."""
    for c in (replace(SMALL, lengths=()), replace(SMALL, queries=0), case("", capacity=0, lengths=(0, 0))):
        inputs = c.make(device=device)
        o, lse = op(**inputs)
        assert o.shape == (*inputs["q"].shape[:3], c.value_dim) and lse.shape == inputs["q"].shape[:3]
        assert not o.any() and (lse == -torch.inf).all()


def run_all(op: Callable, device: str = "cpu") -> dict[str, str | None]:
    """Name → None or the failure, for every check."""
    return relations.outcomes(CHECKS, op, device)
