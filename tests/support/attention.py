"""Shapes, masks and judgement of the attention tests: cases, evaluation with cotangents for o and lse, relations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from memattn.reference import attention as reference
from support import relations
from support.compare import CEILING, assert_close_to_truth, relative_error, to_float64
from support.relations import assert_same

TOLERANCE = 2e-5
CHECKS: dict[str, Callable] = {}


@dataclass(frozen=True)
class Case:
    """Inputs of one call. `lengths` packs pairs (queries, keys) of sequences; `mask` holds the mask's arguments."""

    name: str
    batch: int = 2
    queries: int = 70
    keys: int | None = None
    heads: int = 2
    key_heads: int = 1
    key_dim: int = 16
    value_dim: int = 24
    mask: dict = field(default_factory=dict, hash=False)
    lengths: tuple[tuple[int, int], ...] | None = None
    sinks: int | None = None  # None: no sink; 0: [HQ]; r: [HQ, r]
    decay: float | None = None
    alibi: bool = False
    merged: bool = False  # begins from the result over other keys; every third row of it has seen none

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict:
        """The arguments of one call."""
        noise, wide = torch.Generator().manual_seed(seed), torch.float64 if dtype == torch.float64 else torch.float32
        batch, queries, keys = self.batch, self.queries, self.queries if self.keys is None else self.keys
        if self.lengths is not None:
            batch, queries, keys = 1, sum(n for n, _ in self.lengths), sum(m for _, m in self.lengths)

        def normal(*shape, scale=1.0, to=dtype):
            return (scale * torch.randn(shape, generator=noise)).to(device, to)

        inputs: dict = {
            "q": normal(batch, queries, self.heads, self.key_dim, scale=2.0),
            "k": normal(batch, keys, self.key_heads, self.key_dim),
            "v": normal(batch, keys, self.key_heads, self.value_dim),
        }
        if self.sinks is not None:
            inputs["sink"] = normal(self.heads, *((self.sinks,) if self.sinks else ()), to=wide)
        if self.decay is not None:
            inputs["log_decay"] = -self.decay * normal(batch, keys, self.heads, to=wide).abs()
        if self.alibi:
            inputs["alibi_slopes"] = (0.5 ** torch.arange(1, self.heads + 1)).to(device, wide)
        if self.merged:
            inputs["merge_o"] = normal(batch, queries, self.heads, self.value_dim)
            inputs["merge_lse"] = normal(batch, queries, self.heads, scale=2.0, to=wide)
            inputs["merge_o"][:, ::3], inputs["merge_lse"][:, ::3] = 0.0, -torch.inf
        if self.lengths is not None:
            for i, name in enumerate(("cu_seqlens_q", "cu_seqlens_k")):
                inputs[name] = torch.tensor([0, *(n[i] for n in self.lengths)], device=device).cumsum(0).int()
        return {**inputs, **self.mask}


def case(name: str, mask: dict | None = None, **sizes) -> Case:
    """A case with these mask arguments."""
    return Case(name, mask=mask or {}, **sizes)


GROUPED = {"heads": 4, "key_heads": 2}
CASES = (
    case("causal", key_dim=32),
    case("full", {"causal": False}, keys=41),
    case("window 1", {"window": 1}),
    case("window 2", {"window": 2}, **GROUPED),
    case("window", {"window": 37}, queries=150),
    case("block-local", {"block_size": 16}, queries=150),
    case("block-diagonal", {"causal": False, "block_size": 24}),
    case("block-causal", {"causal": "block", "block_size": 20}, queries=150),
    case("block-causal window", {"causal": "block", "block_size": 8, "window": 13}),
    case("prefix", {"prefix_len": 5, "window": 9}, queries=150),
    case("prefix and block", {"prefix_len": 7, "block_size": 16}),
    case("summary", {"chunk_rule": ("summary", 8)}, queries=75, keys=10),
    case("dilated", {"chunk_rule": ("dilated", 6, 4, 5)}, queries=75),
    case("no grid", {"chunk_rule": ("dilated", 2**31 - 1, 20, 5)}, queries=150, **GROUPED),
    case("dilated in a window", {"chunk_rule": ("dilated", 3, 0, 0), "window": 50}),
    case("offset", {"q_offset": 40}, queries=30, keys=70),
    case("at the end", {"q_offset": "end", "window": 30}, queries=30, keys=75, decay=0.1),
    case("offset beyond the keys", {"q_offset": 20, "window": 25}, queries=60, keys=40),
    case("sink", {"window": 30}, sinks=0, **GROUPED),
    case("sinks", {"chunk_rule": ("summary", 16)}, keys=5, sinks=3),
    case("decay", decay=0.3, queries=150, **GROUPED),
    case("decay with offset", {"q_offset": 30, "window": 40}, queries=40, keys=75, decay=0.1),
    case("decay, alibi, sink", decay=0.05, alibi=True, sinks=2, heads=2, key_heads=2),
    case("alibi", {"head_map": "tile"}, alibi=True, **GROUPED),
    case("tile", {"head_map": "tile"}, **GROUPED),
    case("scale", {"scale": 0.6}, key_dim=40, value_dim=56),
    case("wide", key_dim=128, value_dim=256, queries=40),
    case("many heads", {"window": 20}, heads=8, key_heads=1),
    case("merge", {"window": 20}, merged=True, **GROUPED),
    case("merge, sinks", {"causal": False, "head_map": "tile"}, keys=41, sinks=2, merged=True, **GROUPED),
    case("merge, few keys", {"chunk_rule": ("summary", 16)}, queries=75, keys=4, merged=True),
    case("merge, decay", decay=0.1, merged=True, heads=2, key_heads=2),
    case("packed merge", {"causal": False}, lengths=((20, 9), (33, 0), (5, 40)), merged=True, sinks=0),
    case("packed", lengths=((1, 1), (0, 0), (16, 16), (17, 17), (90, 90), (0, 0)), sinks=0, **GROUPED),
    case("packed, other keys", {"causal": False}, lengths=((5, 40), (0, 3), (33, 0), (20, 9)), heads=2, key_heads=2),
    case("packed window", {"window": 10, "q_offset": 4}, lengths=((30, 40), (20, 24)), decay=0.2),
    case("packed at the end", {"q_offset": "end", "window": 12}, lengths=((30, 33), (0, 3), (20, 28))),
    case("packed prefix at the end", {"q_offset": "end", "window": 9, "prefix_len": 3}, lengths=((7, 30), (25, 25))),
    case("packed summary", {"chunk_rule": ("summary", 4)}, lengths=((19, 4), (8, 2), (3, 0))),
)  # fmt: skip
LONG = case("long", {"window": 300}, batch=1, queries=700, heads=2, key_heads=2, key_dim=32, value_dim=32)
OF_QUERIES = ("q", "merge_o", "merge_lse")
FLOATS = ("q", "k", "v", "sink", "log_decay", "alibi_slopes", "merge_o", "merge_lse")


def called(op: Callable, inputs: dict) -> tuple[Tensor, Tensor]:
    """(o, lse) of `op`, the merged result given as its one argument."""
    arguments = {n: x for n, x in inputs.items() if n not in OF_QUERIES[1:]}
    if "merge_o" in inputs:
        arguments["merge"] = (inputs["merge_o"], inputs["merge_lse"])
    return op(**arguments)


def evaluate(op: Callable, inputs: dict, seed: int = 1, lse_weight: float = 1.0) -> dict[str, Tensor]:
    """o, lse and the gradient of every float input, under fixed cotangents of o and of lse."""
    inputs = {n: x.detach().clone().requires_grad_() if n in FLOATS else x for n, x in inputs.items()}
    o, lse = called(op, inputs)
    noise = torch.Generator().manual_seed(seed)
    do, dlse = (torch.randn(x.shape, generator=noise, dtype=torch.float64) for x in (o, lse))
    do, dlse = do.to(o.dtype).to(o), (lse_weight * dlse).to(lse)
    names = [n for n in inputs if n in FLOATS]
    gradients, ends = None, [(y, dy) for y, dy in ((o, do), (lse, dlse)) if y.requires_grad]
    if ends:
        outputs, cotangents = zip(*ends, strict=True)
        gradients = torch.autograd.grad(outputs, [inputs[n] for n in names], cotangents, allow_unused=True)
    results = {"o": o.detach(), "lse": lse.detach()}
    for name, gradient in zip(names, gradients or [None] * len(names), strict=True):
        results[f"d{name}"] = torch.zeros_like(inputs[name]) if gradient is None else gradient
    return results


@functools.cache
def truth_of(
    case: Case, dtype: torch.dtype = torch.float32, definition: Callable = reference.loop
) -> dict[str, Tensor]:
    """The definition in float64 on the case's inputs; `chunked`, itself tested against the loop, where that is slow."""
    return evaluate(reference.chunked if case.name == "long" else definition, to_float64(case.make(dtype)))


def finite(results: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results with lse = 0 in the rows that see nothing; both must agree which those are, and give them no output."""
    empty = (truth["lse"] == -torch.inf).to(results["lse"].device)
    assert torch.equal(results["lse"] == -torch.inf, empty), "rows that see nothing"
    assert not results["o"][empty].any() and not results["dq"][empty].any(), "a row that sees nothing"
    return {**results, "lse": results["lse"].masked_fill(empty, 0.0)}


class FlashBlock(torch.autograd.Function):
    """`reference._block` with the kernels' backward: P again from the lse, Δ from the stored o, operands rounded."""

    @staticmethod
    def forward(ctx, q, k, v, sink, first_o, first_lse, decay_q, decay_k, mask, i, j, operand_dtype):
        o, lse = BLOCK(q, k, v, sink, first_o, first_lse, decay_q, decay_k, mask, i, j, operand_dtype)
        seen = reference._visible(mask, i, j)
        ctx.save_for_backward(q, k, v, sink, first_o, first_lse, decay_q, decay_k, seen, o, lse)
        ctx.operand_dtype = operand_dtype
        return o, lse

    @staticmethod
    def backward(ctx, do, dlse):
        q, k, v, sink, first_o, first_lse, decay_q, decay_k, seen, o, lse = ctx.saved_tensors

        def rounded(x):
            return x if ctx.operand_dtype is None else x.to(ctx.operand_dtype).to(x.dtype)

        s = q @ k.mT
        if decay_q is not None:
            s = s + (decay_q[..., :, None] - decay_k[..., None, :]).to(s.dtype)
        s = s if seen is None else s.masked_fill(~seen, -torch.inf)
        lse = lse.masked_fill(lse == -torch.inf, torch.inf)
        p, delta = (s - lse[..., None]).exp(), (do * rounded(o)).sum(-1) - dlse
        ds = p * (do @ v.mT - delta[..., None])
        dq, dk, dv = rounded(ds) @ k, rounded(ds).mT @ q, rounded(p).mT @ do
        dsink = None if sink is None else -((sink[..., None] - lse).exp() * delta).sum((0, 3))[None]
        first = (None, None)
        if first_o is not None:
            weight = (first_lse - lse).exp()
            first = weight[..., None] * do, weight * ((do * first_o).sum(-1) - delta)
        decays = (None, None) if decay_q is None else (ds.sum(-1), -ds.sum(-2))
        decays = tuple(None if x is None else x.double() for x in decays)
        dk, dv = dk.sum(2, keepdim=True), dv.sum(2, keepdim=True)
        return dq, dk, dv, dsink, *first, *decays, None, None, None, None


BLOCK = reference._block


def comparator(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The plain-torch form with the kernels' rounding points, on the same inputs."""
    rounding = dtype if dtype in (torch.bfloat16, torch.float16) else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_block", FlashBlock.apply)
        return evaluate(functools.partial(reference.chunked, operand_dtype=rounding), case.make(dtype))


def judge(case: Case, dtype: torch.dtype, actual: dict[str, Tensor], definition: Callable = reference.loop) -> None:
    """The tolerance rule of support.compare; a handful of values proves nothing about the ratio of two roundings."""
    truth = truth_of(case, dtype, definition)
    expected, other = finite(truth, truth), finite(comparator(case, dtype), truth)
    other = {n: x if x.numel() >= 100 else expected[n] * (1 + CEILING[dtype]) for n, x in other.items()}
    assert_close_to_truth(finite(actual, truth), other, expected, CEILING[dtype])


def relation(check: Callable) -> Callable:
    """Enter a check in CHECKS under its name."""
    CHECKS[check.__name__] = check
    return check


def forward(op: Callable, inputs: dict, **change: object) -> list[Tensor]:
    """[o, lse] without gradient."""
    with torch.no_grad():
        return list(called(op, {**inputs, **change}))


assert_near = functools.partial(relations.assert_near, tolerance=TOLERANCE)


def tokens(inputs: dict, start: int | None, stop: int | None, names: tuple[str, ...] = FLOATS[:3]) -> dict:
    """The inputs with rows start..stop of some of them."""
    return {n: x[:, start:stop] if n in names else x for n, x in inputs.items()}


SMALL = case("small", {"window": 11}, queries=75, sinks=2, **GROUPED)


@relation
def equals_definition(op, device="cpu"):
    """Forward and every gradient, with cotangents of o and of lse, against the float64 loop."""
    for c in (c for c in CASES if c.queries <= 75 and c.key_dim < 100):
        inputs = c.make(device=device)
        truth = truth_of(c)
        assert_near(finite(evaluate(op, inputs), truth), finite(truth, truth), c.name)


@relation
def parts_of_the_keys_merge(op, device="cpu"):
    """Any disjoint parts of the keys, empty ones too, joined by their lse equal one call; gradients too."""
    from memattn.ops import merge_states

    inputs = case("parts", {"causal": False}, queries=33, keys=70, **GROUPED).make(device=device)
    for bounds in ((0, 1, 70), (0, 30, 30, 41, 70)):

        def merged(k, v, bounds=bounds, **rest):
            parts = [op(k=k[:, a:b], v=v[:, a:b], **rest) for a, b in pairwise(bounds)]
            return merge_states([o for o, _ in parts], [lse for _, lse in parts])

        def taken_up(k, v, bounds=bounds, **rest):
            result = None
            for a, b in pairwise(bounds):
                result = op(k=k[:, a:b], v=v[:, a:b], merge=result, **rest)
            return result

        expected = evaluate(op, inputs)
        assert_near(evaluate(merged, inputs), expected, f"parts {bounds}")
        assert_near(evaluate(taken_up, inputs), expected, f"parts {bounds} in turn")


@relation
def nothing_to_merge(op, device="cpu"):
    """A merged result that has seen no key changes no bit and gets no gradient."""
    for sinks in (None, 0):
        inputs = replace(SMALL, sinks=sinks, merged=True).make(device=device)
        inputs["merge_o"], inputs["merge_lse"] = inputs["merge_o"] + 7, inputs["merge_lse"] - torch.inf
        actual = evaluate(op, inputs)
        bare = evaluate(op, {n: x for n, x in inputs.items() if n not in OF_QUERIES[1:]})
        assert_near(actual, bare, "nothing merged", tolerance=1e-6)
        assert not actual["dmerge_o"].any() and not actual["dmerge_lse"].any()


@relation
def parts_of_the_queries(op, device="cpu", tolerance=1e-6):
    """Calls on rows of q, each told by q_offset where it stands, equal one call."""
    for mask in (
        {"window": 30},
        {"block_size": 16},
        {"chunk_rule": ("dilated", 5, 3, 2)},
        {"prefix_len": 9, "window": 4},
    ):
        inputs = case("parts", mask, queries=150, merged=True, **GROUPED).make(device=device)
        whole = forward(op, inputs)
        for cut in (1, 37, 128):
            parts = [forward(op, tokens(inputs, a, b, OF_QUERIES), q_offset=a) for a, b in ((0, cut), (cut, 150))]
            joined = [torch.cat(pair, 1) for pair in zip(*parts, strict=True)]
            for x, y in zip(joined, whole, strict=True):
                assert relative_error(x, y) <= tolerance, f"{mask} cut at {cut}"


@relation
def packed_equals_separate(op, device="cpu", tolerance=1e-6):
    for c in (c for c in CASES if c.lengths):
        inputs = c.make(device=device)
        whole, start_q, start_k = forward(op, inputs), 0, 0
        for queries, keys in c.lengths:
            part = tokens(
                tokens(inputs, start_q, start_q + queries, OF_QUERIES), start_k, start_k + keys, ("k", "v", "log_decay")
            )
            alone = forward(op, part, cu_seqlens_q=None, cu_seqlens_k=None)
            for x, y in zip(alone, whole, strict=True):
                y = y[:, start_q : start_q + queries]
                assert x.shape == y.shape and relative_error(x, y) <= tolerance, (
                    f"{c.name}: sequence of {queries}, {keys}"
                )
            start_q, start_k = start_q + queries, start_k + keys


@relation
def the_future_is_hidden(op, device="cpu"):
    """Keys from position 40 on change nothing before it; block-causal masks first notice at their block's start."""
    for mask, first in (
        ({}, 40),
        ({"window": 20}, 40),
        ({"causal": "block", "block_size": 16}, 32),
        ({"block_size": 16}, 40),
    ):
        inputs = replace(SMALL, mask=mask).make(device=device)
        other = {n: torch.cat([x[:, :40], x[:, 40:] + 3], 1) if n in ("k", "v") else x for n, x in inputs.items()}
        before, after = forward(op, inputs), forward(op, other)
        assert_same(
            [x[:, :first] for x in after], [x[:, :first] for x in before], f"{mask}: the future changed the past"
        )
        assert (after[0][:, first] != before[0][:, first]).any(), f"{mask}: row {first} does not see its own"


@relation
def keys_out_of_reach_do_not_matter(op, device="cpu"):
    """Keys in tiles that no row sees are not even read: NaN there reaches nothing, gradients included."""
    inputs = case("reach", {"window": 10, "q_offset": 300}, queries=20, keys=330).make(device=device)
    for name in ("k", "v"):
        inputs[name][:, :250] = torch.nan
    results = evaluate(op, inputs)
    assert all(x.isfinite().all() for x in results.values())
    assert not results["dk"][:, :291].any() and results["dk"][:, 291:].any()


@relation
def windows_count_the_query_itself(op, device="cpu"):
    """W = 1 is the value itself; the window's oldest key is the last to matter."""
    inputs = case("self", {"window": 1}, queries=20, key_heads=2).make(device=device)
    o, _ = forward(op, inputs)
    assert relative_error(o, inputs["v"]) <= 1e-6
    for window in (1, 2, 5):
        inputs["window"] = window
        base = forward(op, inputs)[0]
        for back, changes in ((window - 1, True), (window, False)):
            v = inputs["v"].clone()
            v[:, 12 - back] += 1
            assert (forward(op, inputs, v=v)[0][:, 12] != base[:, 12]).any() == changes, f"window {window}, {back} back"


@relation
def empty_rows(op, device="cpu"):
    """Rows without keys: 0 and −inf, no gradient, no NaN; with a sink its logit is the lse."""
    inputs = case("early", {"chunk_rule": ("summary", 10)}, queries=25, keys=2, **GROUPED).make(device=device)
    results = evaluate(op, inputs)
    assert (results["lse"][:, :10] == -torch.inf).all() and results["lse"][:, 10:].isfinite().all()
    assert not results["o"][:, :10].any() and not results["dq"][:, :10].any()
    assert all(not x.isnan().any() for x in results.values())
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0], device=device)
    o, lse = forward(op, inputs, sink=sink)
    assert not o[:, :10].any() and relative_error(lse[:, :10], sink.expand_as(lse[:, :10])) <= 1e-6


@relation
def head_maps(op, device="cpu"):
    """ "gqa" repeats each key head in place, "tile" repeats them all in turn; the two differ."""
    inputs = case("heads", **GROUPED).make(device=device)
    results = {}
    for name, spread in (("gqa", [0, 0, 1, 1]), ("tile", [0, 1, 0, 1])):
        results[name] = forward(op, inputs, head_map=name)
        expanded = forward(op, inputs, k=inputs["k"][:, :, spread], v=inputs["v"][:, :, spread])
        for x, y in zip(results[name], expanded, strict=True):
            assert relative_error(x, y) <= 1e-6, name
    assert relative_error(results["gqa"][0], results["tile"][0]) > 0.1


@relation
def decay_keeps_precision(op, device="cpu"):
    """The decay of the first key reaches no pair, however large the sums it leads to; ALiBi is a constant decay."""
    inputs = case("late", decay=0.1, **GROUPED).make(device=device)
    expected = evaluate(op, inputs)
    for early in (-1e5, -3e7):
        late = inputs["log_decay"].clone()
        late[:, 0] = early
        assert_near(evaluate(op, {**inputs, "log_decay": late}), expected, f"sums of {early}", tolerance=5e-6)
    slopes = torch.tensor([0.5, 0.1, 0.02, 1.0], device=device)
    given = {n: x for n, x in inputs.items() if n != "log_decay"}
    constant = forward(op, given, log_decay=-slopes.expand_as(inputs["log_decay"]))
    for x, y in zip(forward(op, given, alibi_slopes=slopes), constant, strict=True):
        assert relative_error(x, y) <= 1e-5


@relation
def strong_decay_and_large_scores(op, device="cpu"):
    """Decays down to e^−1000 a step leave each row its own key; scores of ±1000 leave the largest."""
    inputs = case("strong", key_heads=2, queries=70).make(device=device)
    inputs["log_decay"] = torch.full((2, 70, 2), -1000.0, device=device)
    assert relative_error(forward(op, inputs)[0], inputs["v"]) <= 1e-6
    inputs = case("large", {"scale": 100.0}, key_heads=2, queries=70).make(device=device)
    assert all(x.isfinite().all() for x in evaluate(op, inputs).values())


@relation
def batch_invariance(op, device="cpu", tolerance=1e-6):
    inputs = replace(SMALL, batch=3).make(device=device)
    expected = forward(op, inputs)
    for rows in ([1], [2, 0, 1], [0, 0]):
        part = {n: x[rows] if n in FLOATS[:3] else x for n, x in inputs.items()}
        for x, y in zip(forward(op, part), expected, strict=True):
            assert relative_error(x, y[rows]) <= tolerance, f"batch rows {rows}"


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

    for c in (SMALL, replace(SMALL, queries=1), case("odd", decay=0.1, queries=37, key_dim=17, value_dim=23)):
        inputs = c.make(device=device)
        expected, actual = evaluate(op, inputs), evaluate(on_guarded, inputs)
        assert_same(actual.values(), expected.values(), f"{c.name}: a value outside the inputs was used")


@relation
def inputs_unchanged_and_strided(op, device="cpu"):
    inputs = replace(SMALL, mask={}, decay=0.1).make(device=device)
    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, Tensor)}
    first, second = evaluate(op, inputs), evaluate(op, inputs)
    assert_same(first.values(), second.values(), "a second call gives other bits")
    for name, x in before.items():
        assert torch.equal(inputs[name], x), f"{name} was overwritten"
    other = {n: x.transpose(1, 2).contiguous().transpose(1, 2) if n in FLOATS[:3] else x for n, x in inputs.items()}
    assert_near(evaluate(op, other), first, "strided inputs", tolerance=1e-6)


@relation
def nothing_at_all(op, device="cpu"):
    """No batch, no queries, no keys: shapes are right and gradients zero."""
    for c in (replace(SMALL, batch=0), replace(SMALL, queries=0, keys=5), replace(SMALL, keys=0, sinks=None)):
        inputs = c.make(device=device)
        results = evaluate(op, inputs)
        batch, queries, heads, _ = inputs["q"].shape
        assert results["o"].shape == (batch, queries, heads, c.value_dim) and results["lse"].shape == (
            batch,
            queries,
            heads,
        )
        assert (results["lse"] == -torch.inf).all()
        assert not any(x.any() for n, x in results.items() if n != "lse")


def run_all(op: Callable, device: str = "cpu") -> dict[str, str | None]:
    """Name → None or the failure, for every check."""
    return relations.outcomes(CHECKS, op, device)
