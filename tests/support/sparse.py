"""Shapes, lists and judgement of the sparse_attention tests: cases, evaluation, relations between calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from memattn.ops import attention, merge_states
from memattn.reference import sparse_attention as reference
from support import relations
from support.compare import relative_error, to_float64
from support.relations import assert_same

TOLERANCE = 2e-5
CHECKS: dict[str, Callable] = {}
FLOATS = ("q", "k", "v", "bias", "sink")
PER_ROW = ("q", "indices", "counts", "q_positions", "bias")  # [B, S, ...]
MEMORY = ("k", "v")


@dataclass(frozen=True)
class Case:
    """Inputs of one call; every list names distinct entries, about a quarter of its places are −1."""

    name: str
    batch: int = 2
    queries: int = 7
    tokens: int = 50
    unit: int = 8
    entries: int = 4
    heads: int = 4
    key_heads: int = 2
    key_dim: int = 16
    value_dim: int = 24
    shared: bool = False  # one list for all key heads
    counts: bool = False
    positions: bool = False
    bias: int | None = None  # heads of it
    sinks: int | None = None  # None: no sink; 0: [HQ]; r: [HQ, r]
    pages: int = 0  # their size
    lengths: tuple[tuple[int, int], ...] | None = None  # packs (queries, tokens)
    scale: float | None = None

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict:
        """The arguments of one call."""
        noise, wide = torch.Generator().manual_seed(seed), torch.float64 if dtype == torch.float64 else torch.float32
        batch, queries, tokens = self.batch, self.queries, self.tokens
        reach = torch.full((batch, queries), tokens)
        if self.lengths is not None:
            batch, queries, tokens = 1, sum(n for n, _ in self.lengths), sum(m for _, m in self.lengths)
            reach = torch.tensor([m for n, m in self.lengths for _ in range(n)])[None]

        def normal(*shape, scale=1.0, to=dtype):
            return (scale * torch.randn(shape, generator=noise)).to(device, to)

        lists = 1 if self.shared else self.key_heads
        keys = torch.rand(batch, queries, lists, -(-tokens // self.unit) + self.entries, generator=noise)
        blocks = keys.argsort(-1)[..., : self.entries]
        there = (blocks < -(-reach // self.unit)[..., None, None]) & (keys[..., : self.entries] < 0.75)
        inputs: dict = {
            "q": normal(batch, queries, self.heads, self.key_dim, scale=2.0),
            "k": normal(batch, tokens, self.key_heads, self.key_dim),
            "v": normal(batch, tokens, self.key_heads, self.value_dim),
            "indices": torch.where(there, blocks, -1).int().to(device),
            "unit": self.unit,
            "scale": self.scale,
        }
        if self.counts:
            inputs["counts"] = torch.randint(0, self.entries + 1, (batch, queries, lists), generator=noise).int()
        if self.positions:
            inputs["q_positions"] = (torch.rand(batch, queries, generator=noise) * reach).long()
        if self.bias is not None:
            inputs["bias"] = normal(batch, queries, self.bias, self.entries, to=wide)
        if self.sinks is not None:
            inputs["sink"] = normal(self.heads, *((self.sinks,) if self.sinks else ()), to=wide)
        if self.lengths is not None:
            for i, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
                inputs[name] = torch.tensor([0, *(n[i] for n in self.lengths)]).cumsum(0).int()
        inputs = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in inputs.items()}
        return paged(inputs, self.pages) if self.pages else inputs


def paged(inputs: dict, size: int, seed: int = 5) -> dict:
    """The same call on a pool: pages in random order, spare pages full of NaN. The memory must fill its pages."""
    batch, tokens = inputs["k"].shape[:2]
    pages, result = tokens // size, dict(inputs)
    assert pages * size == tokens
    order = torch.randperm(batch * pages + 3, generator=torch.Generator().manual_seed(seed))[: batch * pages]
    for name in MEMORY:
        x = inputs[name]
        pool = x.new_full((batch * pages + 3, size, *x.shape[2:]), torch.nan)
        pool[order.to(x.device)] = x.unflatten(1, (pages, size)).flatten(0, 1)
        result[name] = pool
    result["page_table"] = order.view(batch, pages).int().to(inputs["k"].device)
    return result


SMALL = Case("small", bias=2, sinks=2, positions=True)
TOKENS = Case("tokens", unit=1, entries=12)
MANY = Case("many", queries=90, batch=1, tokens=64, unit=16, entries=4, positions=True, bias=2, sinks=0)  # by blocks
CASES = (
    SMALL,
    TOKENS,
    Case("blocks"),
    Case("shared", shared=True, bias=1),
    Case("shared, own bias", shared=True, bias=2, unit=1, entries=9),
    Case("own list, shared bias", bias=1),
    Case("counts", counts=True, unit=1, entries=20),
    Case("positions", positions=True),
    Case("positions, tokens", positions=True, unit=1, entries=15, sinks=0),
    Case("one entry", entries=1, unit=64),
    Case("large blocks", unit=90, tokens=200, entries=2, positions=True),
    Case("odd blocks", unit=13, tokens=101, entries=5, key_dim=17, value_dim=23, bias=2, sinks=0),
    Case("long list", unit=1, tokens=700, entries=600, queries=2, heads=2, key_heads=1),
    Case("long blocks", unit=32, tokens=1500, entries=30, queries=2, heads=2, key_heads=1, positions=True),
    Case("one query", queries=1, batch=3, entries=6, sinks=0),
    Case("many heads", heads=8, key_heads=1, unit=4, entries=6),
    Case("very many heads", heads=80, key_heads=1, queries=2, batch=1),
    Case("own heads", heads=3, key_heads=3, unit=16, entries=2),
    Case("pages", tokens=48, pages=12, unit=8, bias=2),
    Case("pages of tokens", tokens=48, pages=4, unit=1, entries=11, positions=True, sinks=0),
    Case("pages in a block", tokens=64, pages=4, unit=16, shared=True),
    Case("pages across", tokens=48, pages=16, unit=12, counts=True),
    Case("packed", lengths=((5, 40), (0, 9), (4, 0), (16, 63)), bias=2),
    Case("packed causal", lengths=((7, 7), (30, 30), (0, 0)), unit=4, positions=True, sinks=0),
    Case("packed tokens", lengths=((3, 50), (9, 20)), unit=1, entries=14, shared=True),
    Case("scale", scale=0.6, key_dim=40, value_dim=56),
    Case("wide", key_dim=128, value_dim=256, unit=16, queries=3),
    MANY,
    Case("many queries", queries=150, tokens=200, unit=16, entries=5, batch=1, heads=2, counts=True, sinks=0),
    Case("many, odd blocks", queries=40, tokens=101, unit=19, entries=3, key_dim=17, value_dim=23, shared=True, bias=1),
    Case("many, large blocks", queries=33, tokens=300, unit=130, entries=2, batch=1, heads=3, key_heads=3),
    Case("many, pages", queries=20, tokens=96, unit=32, entries=2, pages=16, bias=2, positions=True),
    Case("many, small pages", queries=20, tokens=96, unit=16, entries=4, pages=4, counts=True),
    Case("many packed", lengths=((20, 40), (3, 50), (0, 9), (17, 17)), unit=16, entries=3, positions=True, bias=1),
    replace(MANY, name="many wide", queries=48, key_dim=128, value_dim=256),
)  # fmt: skip
ROUNDED = ("small", "tokens", "large blocks", "long list", "wide", "pages across", "packed causal", "many", "many wide")
GATED = tuple(c for c in CASES if "many heads" not in c.name)


def evaluate(op: Callable, inputs: dict, seed: int = 1) -> dict[str, Tensor]:
    """o, lse (0 in the rows that see nothing) and the gradient of every float input, under cotangents of both."""
    inputs = {n: x.detach().clone().requires_grad_() if n in FLOATS else x for n, x in inputs.items()}
    o, lse = op(**inputs)
    empty = lse.detach() == -torch.inf
    assert not o[empty].any(), "a row that sees nothing"
    noise = torch.Generator().manual_seed(seed)
    do, dlse = (torch.randn(x.shape, generator=noise, dtype=torch.float64) for x in (o, lse))
    names = [n for n in inputs if n in FLOATS]
    ends = [(y, dy.to(y)) for y, dy in ((o, do), (lse.masked_fill(empty, 0.0), dlse)) if y.requires_grad]
    gradients = [None] * len(names)
    if ends:
        outputs, cotangents = zip(*ends, strict=True)
        gradients = torch.autograd.grad(outputs, [inputs[n] for n in names], cotangents, allow_unused=True)
    results = {"o": o.detach(), "lse": lse.detach().masked_fill(empty, 0.0), "empty": empty.to(o.dtype)}
    for name, gradient in zip(names, gradients, strict=True):
        results[f"d{name}"] = torch.zeros_like(inputs[name]) if gradient is None else gradient
    return results


@functools.cache
def truth_of(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The definition in float64 on the case's inputs."""
    return evaluate(reference.loop, to_float64(case.make(dtype)))


def relation(check: Callable) -> Callable:
    """Enter a check in CHECKS under its name."""
    CHECKS[check.__name__] = check
    return check


def forward(op: Callable, inputs: dict, **change: object) -> list[Tensor]:
    """[o, lse] without gradient, lse 0 in the rows that see nothing, which have no output."""
    with torch.no_grad():
        o, lse = op(**{**inputs, **change})
    empty = lse == -torch.inf
    assert not o[empty].any(), "a row that sees nothing"
    return [o, lse.masked_fill(empty, 0.0), empty.float()]


def assert_forward(op, inputs: dict, expected, what: str, tolerance: float = 1e-6, **change: object) -> None:
    """Outputs within a relative error, or bit for bit with tolerance 0."""
    for x, y in zip(forward(op, inputs, **change), expected, strict=True):
        error = relative_error(x, y)
        assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:.3g}"


assert_near = functools.partial(relations.assert_near, tolerance=TOLERANCE)


def rows_of(inputs: dict, rows: object, dim: int) -> dict:
    """The inputs with some batch rows (dim 0, memory too) or query rows (dim 1)."""
    names = (*PER_ROW, "page_table", *(() if "page_table" in inputs else MEMORY)) if dim == 0 else PER_ROW
    index = (rows,) if dim == 0 else (slice(None), rows)
    return {n: x[index] if n in names and x is not None else x for n, x in inputs.items()}


def named_tokens(inputs: dict) -> Tensor:
    """[B, T, HKV]: tokens of a contiguous memory that some list names."""
    batch, tokens, key_heads = inputs["k"].shape[:3]
    named = torch.zeros(batch, tokens + inputs["unit"], key_heads, dtype=torch.bool)
    lists = inputs["indices"].expand(-1, -1, key_heads, -1)
    for b, s, h, e in (lists >= 0).nonzero().tolist():
        start = int(lists[b, s, h, e]) * inputs["unit"]
        named[b, start : start + inputs["unit"], h] = True
    return named[:, :tokens].to(inputs["k"].device)


@relation
def equals_definition(op, device="cpu"):
    """Forward and every gradient, with cotangents of o and of lse, against the float64 loop."""
    for c in (c for c in CASES if c.tokens < 500 and c.key_dim < 100 and c.heads < 20):
        assert_near(evaluate(op, c.make(device=device)), truth_of(c), c.name)


@relation
def all_of_the_memory_is_attention(op, device="cpu"):
    """Lists of everything: causal attention, gradients too, and attention to all without q_positions."""
    base = Case("all", queries=37, tokens=37).make(device=device)
    for unit in (1, 5, 64):
        blocks = -(-37 // unit)
        lists = torch.arange(blocks, device=device, dtype=torch.int32).flip(0).expand(2, 37, 1, -1)
        for positions in (None, torch.arange(37, device=device).expand(2, -1)):
            inputs = {**base, "indices": lists, "unit": unit, "q_positions": positions}

            def dense(q, k, v, positions=positions, **rest):
                return attention(q, k, v, causal=positions is not None)

            assert_near(evaluate(op, inputs), evaluate(dense, inputs), f"unit {unit}")


@relation
def queries_one_by_one(op, device="cpu", tolerance=1e-6):
    """Decode is prefill: what a query gets does not depend on the others in its call."""
    for c in (SMALL, TOKENS, replace(CASES[2], shared=True), Case("long", unit=16, tokens=900, entries=40, queries=3)):
        inputs = c.make(device=device)
        expected = forward(op, inputs)
        for t in range(c.queries):
            one = rows_of(inputs, slice(t, t + 1), 1)
            assert_forward(op, one, [x[:, t : t + 1] for x in expected], f"{c.name}: query {t}", tolerance)


@relation
def tokens_of_the_blocks(op, device="cpu", tolerance=1e-6):
    """A list of blocks is the list of their tokens, each with the block's bias."""
    for c in (replace(SMALL, tokens=48), Case("long", unit=64, tokens=1280, entries=12, queries=2)):
        inputs = c.make(device=device)
        within = torch.arange(c.unit, device=device, dtype=torch.int32)
        lists = inputs["indices"]
        tokens = torch.where(lists[..., None] >= 0, lists[..., None] * c.unit + within, -1).flatten(3)
        bias = inputs["bias"].repeat_interleave(c.unit, -1) if c.bias else None
        assert_forward(
            op, {**inputs, "indices": tokens, "unit": 1, "bias": bias}, forward(op, inputs), c.name, tolerance
        )


@relation
def paged_equals_contiguous(op, device="cpu", tolerance=1e-6):
    for c in (replace(x, tokens=48) for x in (SMALL, TOKENS, Case("large", unit=24), replace(MANY, entries=3))):
        inputs = c.make(device=device)
        for size in (1, 8, 16, 48):
            assert_forward(op, paged(inputs, size), forward(op, inputs), f"{c.name}, pages of {size}", tolerance)


@relation
def missing_pages_are_not_seen(op, device="cpu"):
    """Tokens without a page: as if no list named them."""
    inputs = Case("pages", tokens=48, unit=4, entries=9).make(device=device)
    with_pages = paged(inputs, 8)
    with_pages["page_table"][1, 2] = -1
    lists = inputs["indices"].clone()
    lists[1][(lists[1] == 4) | (lists[1] == 5)] = -1
    assert_forward(op, with_pages, forward(op, inputs, indices=lists), "without a page")


@relation
def a_page_of_two_sequences(op, device="cpu"):
    """Sequences may share pages; the gradients of a shared page are those of both."""
    inputs = paged(Case("pages", tokens=48, unit=4, entries=9).make(device=device), 8)
    inputs["page_table"][1, :3] = inputs["page_table"][0, :3]
    used = inputs["page_table"].unique().long()
    for name in MEMORY:
        inputs[name] = inputs[name].nan_to_num(0.0)
    results, expected = evaluate(op, inputs), evaluate(reference.loop, to_float64(inputs))
    assert_near(results, expected, "shared pages")
    unused = torch.ones(len(inputs["k"]), dtype=torch.bool, device=device)
    unused[used] = False
    assert not results["dk"][unused].any() and not results["dv"][unused].any()


@relation
def order_and_padding_of_a_list(op, device="cpu"):
    """Entries in another order, with −1 anywhere among them: the same up to rounding, gradients too."""
    for c in (replace(SMALL, entries=5), TOKENS, MANY):
        inputs = c.make(device=device)
        order = torch.randperm(c.entries + 4, generator=torch.Generator().manual_seed(3)).to(device)
        other = {**inputs, "indices": torch.nn.functional.pad(inputs["indices"], (1, 3), value=-1)[..., order]}
        if c.bias:
            other["bias"] = torch.nn.functional.pad(inputs["bias"], (1, 3), value=7.0)[..., order]
        actual, expected = evaluate(op, other), evaluate(op, inputs)
        if c.bias:
            actual["dbias"] = actual["dbias"][..., order.argsort()][..., 1:-3]
        assert_near(actual, expected, c.name)


@relation
def counts_end_a_list(op, device="cpu"):
    """Entries from a count on are as good as −1, whatever they name."""
    inputs = Case("counts", counts=True, bias=2).make(device=device)
    inputs["indices"] = inputs["indices"].clamp(min=0)
    place = torch.arange(4, device=device)
    lists = inputs["indices"].masked_fill(place >= inputs["counts"][..., None], -1)
    results = evaluate(op, inputs)
    assert_near(results, evaluate(op, {**inputs, "counts": None, "indices": lists}), "counts")
    assert not results["dbias"][(place >= inputs["counts"][..., None])].any()


@relation
def one_list_for_all_heads(op, device="cpu", tolerance=1e-6):
    inputs = Case("shared", shared=True, bias=1, counts=True, key_heads=4).make(device=device)
    spread = {n: inputs[n].expand(-1, -1, 4, *inputs[n].shape[3:]) for n in ("indices", "bias", "counts")}
    assert_forward(op, {**inputs, **spread}, forward(op, inputs), "shared list", tolerance)


@relation
def an_entry_named_twice_counts_twice(op, device="cpu"):
    """A list is a multiset: the second naming weighs as much as a bias of log 2 on the first."""
    for c in (Case("twice", entries=3), replace(TOKENS, entries=5), replace(MANY, entries=3, bias=None)):
        inputs = c.make(device=device)
        twice = {**inputs, "indices": torch.cat([inputs["indices"], inputs["indices"][..., :1]], -1)}
        bias = torch.zeros(*inputs["indices"].shape, device=device)
        bias[..., 0] = torch.tensor(2.0).log()
        actual, expected = evaluate(op, twice), evaluate(op, {**inputs, "bias": bias})
        expected.pop("dbias")
        assert_near(actual, expected, c.name)


@relation
def parts_of_a_list_merge(op, device="cpu"):
    """Disjoint parts of a list, empty ones too, joined by their lse equal one call; gradients too."""
    inputs = Case("parts", unit=4, entries=9, bias=2).make(device=device)

    def merged(indices, bias, **rest):
        cuts = pairwise((0, 2, 2, 9))
        parts = [op(indices=indices[..., a:b], bias=bias[..., a:b], **rest) for a, b in cuts]
        return merge_states([o for o, _ in parts], [lse for _, lse in parts])

    assert_near(evaluate(merged, inputs), evaluate(op, inputs), "parts")


@relation
def what_is_not_named_is_not_read(op, device="cpu"):
    """NaN in every token that no list names reaches nothing, gradients included; nor does the future in a block."""
    for c in (
        Case("unnamed", entries=2, tokens=70),
        replace(TOKENS, entries=5),
        SMALL,
        replace(MANY, queries=20, tokens=300, entries=2, sinks=None),
        Case("unnamed", batch=1, queries=20, tokens=400, unit=16, entries=1, key_heads=4),
    ):
        inputs = c.make(device=device)
        hidden = ~named_tokens(inputs)
        if c.positions:
            hidden |= torch.arange(c.tokens, device=device)[:, None] > inputs["q_positions"].amax(1)[:, None, None]
        expected = evaluate(op, inputs)
        poisoned = {n: x.masked_fill(hidden[..., None], torch.nan) if n in MEMORY else x for n, x in inputs.items()}
        actual = evaluate(op, poisoned)
        assert_same(actual.values(), expected.values(), f"{c.name}: a token that no list names was used")
        assert hidden.any() and not actual["dk"][hidden].any() and not actual["dv"][hidden].any()


@relation
def the_future_is_hidden(op, device="cpu"):
    """Keys behind a query's position change nothing, its own does; each query has its own position."""
    inputs = Case("future", batch=1, queries=9, tokens=48, unit=16, entries=3).make(device=device)
    inputs["indices"] = torch.arange(3, device=device, dtype=torch.int32).expand(1, 9, 2, -1)
    inputs["q_positions"] = torch.arange(3, 39, 4, device=device)[None].int()
    base = forward(op, inputs)[0]
    for at in (3, 19, 35, 36):
        v = inputs["v"].clone()
        v[:, at] += 1
        changed = (forward(op, inputs, v=v)[0] != base).flatten(2).any(2)[0]
        assert torch.equal(changed, inputs["q_positions"][0] >= at), f"token {at}"


@relation
def packed_equals_separate(op, device="cpu", tolerance=1e-6):
    for c in (c for c in CASES if c.lengths):
        inputs = c.make(device=device)
        whole, start_q, start_k = forward(op, inputs), 0, 0
        for queries, tokens in c.lengths:
            part = rows_of(inputs, slice(start_q, start_q + queries), 1)
            part |= {n: inputs[n][:, start_k : start_k + tokens] for n in MEMORY}
            expected = [x[:, start_q : start_q + queries] for x in whole]
            alone = {**part, "cu_seqlens_q": None, "cu_seqlens_k": None}
            assert_forward(op, alone, expected, f"{c.name}: {queries} of {tokens}", tolerance)
            start_q, start_k = start_q + queries, start_k + tokens


@relation
def batch_invariance(op, device="cpu", tolerance=1e-6):
    for c in (
        replace(SMALL, batch=3),
        replace(TOKENS, batch=3),
        replace(MANY, batch=3),
        Case("pages", batch=3, tokens=48, pages=8, unit=16),
    ):
        inputs = c.make(device=device)
        expected = forward(op, inputs)
        for rows in ([1], [2, 0, 1], [0, 0]):
            part = rows_of(inputs, torch.tensor(rows, device=device), 0)
            assert_forward(op, part, [x[rows] for x in expected], f"{c.name}: rows {rows}", tolerance)


@relation
def biases(op, device="cpu"):
    """A bias of all entries moves the lse alone; −inf hides an entry, and all of them leave nothing."""
    inputs = Case("bias", unit=4, entries=6).make(device=device)
    o, lse, empty = forward(op, inputs)
    shape = inputs["indices"].shape
    expected = [o, (lse + 3.0).masked_fill(empty.bool(), 0.0), empty]
    assert_forward(op, inputs, expected, "constant", bias=torch.full(shape, 3.0, device=device))
    bias = torch.zeros(shape, device=device)
    bias[..., 2] = -torch.inf
    lists = inputs["indices"].clone()
    lists[..., 2] = -1
    assert_forward(op, inputs, forward(op, inputs, indices=lists), "one hidden", bias=bias)
    results = evaluate(op, {**inputs, "bias": torch.full(shape, -torch.inf, device=device)})
    assert results["empty"].all() and not any(results[f"d{n}"].any() for n in ("q", "k", "v", "bias"))


@relation
def empty_lists(op, device="cpu"):
    """Rows without entries: 0 and −inf, no gradient, no NaN; with a sink its logit is the lse."""
    for c in (Case("empty", bias=2), replace(TOKENS, bias=2), replace(MANY, sinks=None)):
        inputs = c.make(device=device)
        inputs["indices"][:, 2:5] = -1
        results = evaluate(op, inputs)
        assert results["empty"][:, 2:5].all() and all(x.isfinite().all() for x in results.values())
        assert not results["dq"][:, 2:5].any() and not results["dbias"][:, 2:5].any()
        sink = torch.tensor([0.5, -1.0, 2.0, 0.0], device=device)
        o, lse, _ = forward(op, inputs, sink=sink)
        assert not o[:, 2:5].any() and relative_error(lse[:, 2:5], sink.expand_as(lse[:, 2:5])) <= 1e-6


@relation
def heads_of_a_group_share_a_list(op, device="cpu"):
    inputs = Case("heads", bias=2).make(device=device)
    spread = torch.tensor([0, 0, 1, 1], device=device)
    expanded = {n: inputs[n].index_select(2, spread) for n in ("k", "v", "indices", "bias")}
    assert_forward(op, {**inputs, **expanded}, forward(op, inputs), "groups")


@relation
def large_scores(op, device="cpu"):
    """Scores of ±1000 leave the largest; nothing overflows."""
    for c in (Case("large", scale=100.0), replace(TOKENS, scale=100.0), replace(MANY, scale=100.0)):
        assert all(x.isfinite().all() for x in evaluate(op, c.make(device=device)).values())


@relation
def canaries(op, device="cpu"):
    """Inputs are views into NaN: reading past their ends would poison a result."""

    def guarded(x):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        padded = x.new_full((x.numel() + 4096,), torch.nan)
        padded[2048 : 2048 + x.numel()] = x.flatten()
        return padded[2048 : 2048 + x.numel()].view(x.shape)

    def on_guarded(**inputs):
        return op(**{n: guarded(x) for n, x in inputs.items()})

    names = "small", "tokens", "odd blocks", "pages across", "many", "many, odd blocks"
    for c in (c for c in CASES if c.name in names):
        inputs = c.make(device=device)
        actual, expected = evaluate(on_guarded, inputs), evaluate(op, inputs)
        assert_same(actual.values(), expected.values(), f"{c.name}: a value outside the inputs was used")


@relation
def inputs_unchanged_and_strided(op, device="cpu"):
    inputs = replace(MANY, sinks=2).make(device=device)
    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, Tensor)}
    first = evaluate(op, inputs)
    assert_same(evaluate(op, inputs).values(), first.values(), "a second call gives other bits")
    for name, x in before.items():
        assert torch.equal(inputs[name], x), f"{name} was overwritten"
    strided = {
        n: x.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(x, Tensor) and x.dim() > 2 else x
        for n, x in inputs.items()
    }
    assert_near(evaluate(op, strided), first, "strided inputs", tolerance=1e-6)


@relation
def nothing_at_all(op, device="cpu"):
    """No batch, no queries, no memory, no entries, no pages: shapes are right and gradients zero."""
    nothing = dict(bias=2)
    for c in (Case("", batch=0), Case("", queries=0), Case("", tokens=0, **nothing), Case("", entries=0, **nothing)):
        inputs = c.make(device=device)
        results = evaluate(op, inputs)
        assert results["o"].shape == (*inputs["q"].shape[:3], 24) and results["empty"].all()
        assert not any(x.any() for n, x in results.items() if n != "empty"), c
    pages = paged(Case("", tokens=48).make(device=device), 8)
    pages["page_table"] = pages["page_table"][:, :0]
    pages["k"], pages["v"] = (pages[n].nan_to_num(0.0) for n in MEMORY)
    results = evaluate(op, {**pages, "indices": torch.full_like(pages["indices"], -1)})
    assert results["empty"].all() and not any(x.any() for n, x in results.items() if n != "empty")


def run_all(op: Callable, device: str = "cpu") -> dict[str, str | None]:
    """Name → None or the failure, for every check."""
    return relations.outcomes(CHECKS, op, device)


def caught_by(op: Callable) -> str | None:
    """The first check that fails, the slowest asked last."""
    return next((name for name in reversed(CHECKS) if relations.outcomes({name: CHECKS[name]}, op)[name]), None)
