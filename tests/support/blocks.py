"""Cases, relations and planted bugs of block summaries, sign codes and block scores."""

# ruff: noqa: E501 (tables, one case a line)
from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memattn.reference import block_scores, block_summary
from support import relations
from support.compare import CEILING, assert_close_to_truth, to_float64
from support.relations import assert_same


def gradients(f: Callable, given: dict, names: tuple[str, ...], seed: int = 1) -> dict[str, Tensor]:
    """Results "o" of f(**given) and, under fixed cotangents of its finite entries, the gradients of `names`."""
    leaves = {n: given[n].detach().clone().requires_grad_() for n in names if given.get(n) is not None}
    o = f(**{**given, **leaves})
    results = {"o": o.detach()}
    if not leaves or not o.requires_grad:
        return results
    noise = torch.Generator().manual_seed(seed)
    cotangent = torch.randn(o.shape, generator=noise, dtype=torch.float64).mul(32).round().div(32).to(o)
    kept = o.isfinite()
    found = torch.autograd.grad(o.masked_fill(~kept, 0.0), list(leaves.values()), cotangent * kept, allow_unused=True)
    return results | {
        f"d{n}": torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)
    }


def judge(actual: dict, comparator: dict, truth: dict, dtype: torch.dtype) -> None:
    """The tolerance rule; what is 0 or empty in truth is measured against 1."""
    scales = {n: 1.0 for n, x in truth.items() if not x[x.isfinite()].norm() > 0}
    assert_close_to_truth(actual, comparator, truth, CEILING[dtype], scales)


# --- summaries --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """k [B, T, HKV, D] and how it is cut into blocks."""

    name: str
    mode: str = "mean"
    batch: int = 2
    tokens: int = 50
    heads: int = 3
    dim: int = 20
    block: int = 8
    stride: int | None = None
    top: int | None = None
    lengths: tuple[int, ...] | None = None
    cu_blocks: tuple[int, ...] | None = None
    from_pos: int = 0

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict:
        """The arguments of one call."""
        noise = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(self.batch, self.tokens, self.heads, *shape, generator=noise).to(device, dtype)

        given: dict = {
            "k": normal(self.dim),
            "block": self.block,
            "mode": self.mode,
            "stride": self.stride,
            "from_pos": self.from_pos,
        }
        if self.mode in ("topr", "gated"):
            given["weight"] = normal(*() if self.mode == "topr" else (self.dim,))
        given |= {} if self.mode != "topr" else {"top": self.top or 3, "weight": given["weight"].mul(2).round()}
        for name in ("lengths", "cu_blocks"):
            if getattr(self, name) is not None:
                given[name] = torch.tensor(getattr(self, name), device=device)
        return given

    @property
    def leaves(self) -> tuple[str, ...]:
        """What has a gradient: where several tokens share an extreme, or a rank, it is not defined."""
        return ("k", "weight") if self.mode == "gated" else ("k",)


_FORMS = (
    Summary("plain"),
    Summary("overlapping", stride=3),
    Summary("lengths", lengths=(50, 13)),
    Summary("no token in a row", lengths=(0, 50), stride=4),
    Summary("events", batch=1, cu_blocks=(2, 5, 5, 13, 14, 22, 30)),
    Summary("from a position", from_pos=23, stride=4),
    Summary("one block", block=64),
    Summary("blocks of 1", block=1),
    Summary("nothing", tokens=0),
    Summary("wide", tokens=300, heads=4, dim=64, block=32, batch=1),
)
SUMMARIES = tuple(replace(c, name=f"{mode}, {c.name}", mode=mode) for mode in ("mean", "max", "minmax", "topr", "gated") for c in _FORMS if not (mode == "topr" and c.block == 1)) + (
    Summary("topr, more than there are", "topr", top=8, lengths=(50, 13)),
)  # fmt: skip
IN_CPP = tuple(c for c in SUMMARIES if c.mode in ("mean", "max", "minmax"))


def values_of(op: Callable) -> Callable:
    """The values alone."""
    return lambda **given: op(**given).values


def summaries_are_those_of_the_definition(op, device="cpu", cases=SUMMARIES, dtype=torch.float32):
    for c in cases:
        given = c.make(dtype, device)
        actual, expected = op(**given), block_summary.loop(**to_float64(given))
        assert actual.counts.tolist() == expected.counts.tolist(), f"{c.name}: counts"
        assert actual.values.dtype == dtype and actual.counts.dtype == torch.int32
        judge({"o": actual.values}, {"o": block_summary.chunked(**given).values}, {"o": expected.values}, dtype)


def gradients_are_those_of_the_definition(op, device="cpu", cases=SUMMARIES, dtype=torch.float32):
    for c in cases:
        given = c.make(dtype, device)
        truth = gradients(values_of(block_summary.loop), to_float64(given), c.leaves)
        judge(
            gradients(values_of(op), given, c.leaves),
            gradients(values_of(block_summary.chunked), given, c.leaves),
            truth,
            dtype,
        )


def incremental_is_whole(op, device="cpu", cases=SUMMARIES):
    """Blocks that end behind a position are the last blocks of all."""
    for c in (c for c in cases if not (c.cu_blocks or c.from_pos)):
        given = c.make(device=device)
        whole = op(**given)
        for position in {0, c.tokens // 3, max(c.tokens - 1, 0), c.tokens}:
            later = op(**{**given, "from_pos": position})
            first = whole.counts.shape[1] - later.counts.shape[1]
            assert_same(later, [x[:, first:] for x in whole], f"{c.name} from {position}")
            stride = c.stride or c.block
            assert first == 0 or (first - 1) * stride + c.block <= position, f"{c.name}: an open block is left out"


def tokens_of_others_do_not_matter(op, device="cpu", cases=SUMMARIES):
    """What lies behind a row's length may be anything."""
    for c in (c for c in cases if c.lengths):
        given = c.make(device=device)
        expected = op(**given)
        for row, length in enumerate(c.lengths):
            given["k"][row, length:] = float("nan")
        assert_same(op(**given), expected, c.name)


SUMMARY_CHECKS = {
    f.__name__: f
    for f in (
        summaries_are_those_of_the_definition,
        gradients_are_those_of_the_definition,
        incremental_is_whole,
        tokens_of_others_do_not_matter,
    )
}
SUMMARY_BUGS = {
    "mean over the whole block": ("counts.clamp_min(1)[..., None, None]", "block"),
    "empty block infinite": (".masked_fill((counts == 0)[..., None, None], 0.0)", ""),
    "padding in the largest": ("windows(k, -torch.inf).amax(2)", "windows(k, 0.0).amax(2)"),
    "least and largest exchanged": ("torch.cat([windows(k, torch.inf).amin(2), largest], -1)", "torch.cat([largest, windows(k, torch.inf).amin(2)], -1)"),
    "gate over the padding": ("windows(weight, -torch.inf).masked_fill", "windows(weight, 0.0).masked_fill"),
    "gate shared by channels": (".softmax(2)", ".mean(-1, keepdim=True).softmax(2)"),
    "mean of fewer over top": ("best.counts.clamp_min(1)[..., None]", "top"),
    "weights of another head": ("windows(weight, -torch.inf).transpose(2, 3), top", "windows(weight, -torch.inf).transpose(2, 3).flip(2), top"),
    "lengths ignored": ("ends if lengths is None else", "ends if True else"),
    "stride ignored": ("block if stride is None else stride", "block"),
    "open block left out": ("(from_pos - block) // stride + 1", "from_pos // stride + 1"),
    "closed block kept": ("(from_pos - block) // stride + 1", "(from_pos - block) // stride"),
}  # fmt: skip


# --- scores -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """q [B, S, H, D] against r [B, N, HKV, D], and the steps after the product."""

    name: str
    kind: str = "dot"
    batch: int = 2
    queries: int = 5
    heads: int = 6
    groups: int = 3
    blocks: int = 11
    dim: int = 20
    over: str = "none"
    reduce: str = "sum"
    reduce_queries: str | None = None
    norm: str | None = None
    scale: float = 0.7
    weighted: bool = False
    counts: tuple[int, ...] | None = None
    causal: bool = False
    force_first: int = 0
    force_last: int = 0
    listed: int | None = None

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> dict:
        """The arguments of one call."""
        noise = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(self.batch, *shape, generator=noise).to(device, dtype)

        def code(*shape: int) -> Tensor:
            return torch.randint(-(2**31), 2**31, (self.batch, *shape), generator=noise).to(device, torch.int32)

        draw = code if self.kind == "hamming" else normal
        r = draw(self.blocks, self.groups, self.dim)
        given = {
            "q": draw(self.queries, self.heads, self.dim),
            "r": torch.cat([r, r + normal(self.blocks, self.groups, self.dim).abs()], -1)
            if self.kind == "bound"
            else r,
        }
        names = ("kind", "over", "reduce", "reduce_queries", "norm", "scale", "force_first", "force_last")
        given |= {n: getattr(self, n) for n in names}
        if self.weighted:
            given["weight"] = normal(self.queries, self.heads)
        if self.counts is not None:
            given["counts"] = torch.tensor(self.counts, device=device)
        if self.causal:
            given["block_ends"] = 4 * torch.arange(1, self.blocks + 1, device=device)
            given["q_positions"] = torch.tensor([0, 3, 4, 22, 900], device=device)[: self.queries]
        if self.listed is not None:
            lists = torch.randint(-1, self.blocks, (self.batch, self.queries, self.listed, 4), generator=noise)
            given["indices"] = lists.to(device, torch.int32)
        return {n: x for n, x in given.items() if not (n.startswith("force") and self.listed)}


KINDS = tuple(Scores(kind, kind) for kind in ("dot", "cos", "bound", "relu", "sigmoid", "hamming"))
SCORES = KINDS + (
    Scores("one query", queries=1, over="group", reduce="max"),
    Scores("bound of one query", "bound", queries=1, blocks=70, over="heads", reduce="max"),
    Scores("indexer", "relu", groups=1, over="heads", weighted=True, causal=True),
    Scores("indexer of one query", "relu", queries=1, groups=1, heads=16, blocks=40, over="heads", weighted=True),
    Scores("softmax summed over the group", norm="softmax", over="group", causal=True, force_first=1, force_last=2),
    Scores("mean over heads", over="heads", reduce="mean"),
    Scores("sigmoid mean", "sigmoid", over="heads", reduce="mean", reduce_queries="mean"),
    Scores("sum of queries", reduce_queries="sum", causal=True),
    Scores("mean of the queries that see", reduce_queries="mean", causal=True),
    Scores("largest query", reduce_queries="max", causal=True, force_last=1),
    Scores("mean of weighted queries", reduce_queries="mean", weighted=True, over="heads", counts=(11, 0)),
    Scores("counts and forced", counts=(11, 4), force_first=1, force_last=2),
    Scores("all forced", counts=(1, 0), force_first=3, force_last=3),
    Scores("causal, forced", causal=True, force_first=1, force_last=1),
    Scores("hamming of the group", "hamming", over="group", reduce="max", counts=(11, 4), dim=2),
    Scores("listed", listed=3),
    Scores("one list for all heads", listed=1, over="heads", weighted=True, kind="relu"),
    Scores("indexer's selected set", "relu", groups=1, over="heads", weighted=True, listed=1),
    Scores("softmax of a list", norm="softmax", listed=3, over="group"),
    Scores("no block", blocks=0),
    Scores("no query", queries=0, over="heads"),
    Scores("many blocks", batch=1, heads=2, groups=1, blocks=700, dim=64, queries=1),
)
LEAVES = ("q", "r", "weight")


def scores_are_those_of_the_definition(op, device="cpu", cases=SCORES, dtype=torch.float32):
    for c in cases:
        given = c.make(dtype, device)
        truth = {"o": block_scores.loop(**to_float64(given))}
        actual = {"o": op(**given)}
        at_infinity = (actual["o"] == torch.inf).cpu(), truth["o"] == torch.inf
        assert torch.equal(*at_infinity), f"{c.name}: forced blocks differ"
        judge(actual, {"o": block_scores.chunked(**given)}, truth, dtype)


def forced_and_seen(op, device="cpu"):
    """By hand: blocks of 4 tokens; a query sees the blocks that are past, and is forced to its own and the first."""
    given = Scores("", batch=1, heads=1, groups=1, blocks=4, causal=True, force_first=1, force_last=1).make(
        device=device
    )
    kinds = {-torch.inf: ".", torch.inf: "!"}
    drawn = ["".join(kinds.get(x, "s") for x in row) for row in op(**given)[0, :, 0].tolist()]
    assert drawn == ["!...", "!...", "!!..", "!ss!", "!ss!"], drawn
    given |= {"force_first": 0, "force_last": 0}
    drawn = ["".join(kinds.get(x, "s") for x in row) for row in op(**given)[0, :, 0].tolist()]
    assert drawn == ["....", "s...", "s...", "ssss", "ssss"], drawn


def bound_is_a_bound(op, device="cpu"):
    """No key of a block scores above the block."""
    keys, q = torch.randn(1, 64, 2, 16, device=device), torch.randn(1, 3, 4, 16, device=device)
    pages = keys.view(1, 8, 8, 2, 16)
    bound = op(q=q, r=torch.cat([pages.amin(2), pages.amax(2)], -1), kind="bound")
    best = op(q=q, r=keys).unflatten(-1, (8, 8)).amax(-1)
    assert bool((bound >= best - 1e-5).all()), "a key scores above the bound of its block"


def the_future_does_not_leak(op, device="cpu"):
    """Summaries of blocks that are not past change nothing."""
    given = next(c for c in SCORES if c.name == "softmax summed over the group").make(device=device)
    expected = op(**given)
    given["r"][:, 5:] = float("nan")  # the query at 22 sees blocks 0..4
    relations.assert_same((op(**given)[:, :4],), (expected[:, :4],), "future")


SCORE_CHECKS = {
    f.__name__: f
    for f in (scores_are_those_of_the_definition, forced_and_seen, bound_is_a_bound, the_future_does_not_leak)
}
SCORE_BUGS = {
    "own block seen": ("ends[:, None] <= positions[..., None] + 1)", "ends[:, None] - 3 <= positions[..., None] + 1)"),
    "last token of a block too early": ("seen & (ends[:, None] <= positions[..., None] + 1)", "seen & (ends[:, None] <= positions[..., None])"),
    "forced block from the end of all": ("last = torch.minimum(", "last = torch.maximum("),
    "one forced block too few": ("block > last[..., None] - force_last", "block > last[..., None] - force_last + 1"),
    "future forced": ("forced = (block <= last[..., None]) & (", "forced = ("),
    "counts ignored": ("if counts is None else counts)[:, None]", "if True else counts)[:, None]"),
    "bound of the wrong half": ("[q.clamp_max(0), q.clamp_min(0)]", "[q.clamp_min(0), q.clamp_max(0)]"),
    "softmax over what is not seen": ('if norm == "softmax":\n        s = s.masked_fill(~seen, -torch.inf)', 'if norm == "softmax":\n        s = s'),
    "weight before relu": ('s = s if weight is None else s * weight.to(s.dtype)[..., None]', 's = s if weight is None else (s * weight.to(s.dtype)[..., None]).clamp_min(0)'),
    "mean over all queries": ("seen.sum(1, keepdim=True).clamp_min(1)", "seen.shape[1]"),
    "heads tiled": ("q.view(batch, queries, groups, heads // groups, dim).permute(0, 2, 1, 3, 4)", "q.view(batch, queries, heads // groups, groups, dim).permute(0, 3, 1, 2, 4)"),
    "scale ignored": ("return scale * (product", "return (product"),
    "padding of a list scored": ("seen, forced = (indices >= 0)", "seen, forced = (indices >= -1)"),
    "rows of the first batch": ("[:, None, None, None] * blocks", "[:, None, None, None] * 0"),
    "cosine of the query only": ("return normalised(q), normalised(r)", "return normalised(q), r"),
}  # fmt: skip


def planted_summary(bug: str) -> Callable:
    """`chunked` of summaries with `bug`."""
    return _with_bug(block_summary, bug, SUMMARY_BUGS, ("block_bounds", "_summaries", "chunked"))


def planted_scores(bug: str) -> Callable:
    """`chunked` of scores with `bug`."""
    names = ("visibility", "_finished", "product", "operands", "_listed", "finish", "raw_scores", "chunked")
    return _with_bug(block_scores, bug, SCORE_BUGS, names)


def _with_bug(reference, bug, bugs, names):
    namespace = dict(vars(reference))
    for code in relations.with_bug(bug, *bugs[bug], *(inspect.getsource(getattr(reference, n)) for n in names)):
        exec(code, namespace)
    return namespace["chunked"]
