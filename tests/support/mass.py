"""Judgement of the attention_mass tests: inputs from attention's cases, truth, relations, planted bugs."""

# ruff: noqa: E501 (tables, one case a line)
from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from memattn.reference import attention, attention_mask, attention_mass
from support import relations
from support.attention import CASES, GROUPED, SMALL, Case, called, case, tokens
from support.compare import CEILING, assert_draws_close_to_truth, relative_error, to_float64

CHECKS: dict[str, Callable] = {}
IN_LSE = ("v", "sink", "merge_o", "merge_lse")  # what only the call that gave lse takes
FORMS = (
    {},
    {"query_range": (-9, None), "reduce_heads": "group"},
    {"query_range": (3, -2), "reduce_heads": "sum"},
    {"query_range": (None, 5)},
    {"query_range": (200, None)},
)
near = functools.partial(relations.assert_near, tolerance=2e-5)


def of(c: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0, **form: object) -> dict:
    """Arguments of one call: lse is what plain torch's attention gave on the same inputs."""
    inputs = c.make(dtype, device, seed)
    _, lse = called(attention.chunked, inputs)
    return {**{n: x for n, x in inputs.items() if n not in IN_LSE}, "lse": lse.contiguous(), **form}


def judge(op: Callable, c: Case, dtype: torch.dtype, device: str = "cpu", draws: int = 3) -> None:
    """The tolerance rule of support.compare, over some draws; `chunked` in float64 is tested against the loop."""
    judged = []
    for seed in range(draws):
        inputs = of(c, dtype, device, seed)
        truth, actual = attention_mass.chunked(**to_float64(inputs)), op(**inputs)
        assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        other = attention_mass.chunked(**inputs)
        if truth.numel() < 100:  # a handful of values proves nothing about the ratio of two roundings
            other = truth * (1 + CEILING[dtype])
        judged.append(({"mass": actual}, {"mass": other}, {"mass": truth}, {}))
    assert_draws_close_to_truth(judged, CEILING[dtype])


def relation(check: Callable) -> Callable:
    """Enter a check in CHECKS under its name."""
    CHECKS[check.__name__] = check
    return check


@relation
def equals_definition(op, device="cpu"):
    for c in (c for c in CASES if c.queries <= 75 and c.key_dim < 100):
        for form in FORMS if c.name in ("causal", "tile", "packed", "packed window", "sinks") else FORMS[:1]:
            inputs = of(c, device=device, **form)
            near({"mass": op(**inputs)}, {"mass": attention_mass.loop(**to_float64(inputs))}, f"{c.name} {form}")


@relation
def equals_the_gradient_of_v(op, device="cpu"):
    """With do = 1, dv_j of attention is the mass of key j over the group: autograd knows nothing of this op."""
    for mask in ({}, {"window": 9, "prefix_len": 4}, {"chunk_rule": ("dilated", 6, 4, 5)}, {"head_map": "tile"}):
        inputs = case("dv", mask, queries=70, **GROUPED).make(device=device)
        v = inputs["v"].requires_grad_()
        o, lse = attention.chunked(**inputs)
        (dv,) = torch.autograd.grad(o.sum(), v)
        given = {n: x for n, x in inputs.items() if n != "v"}
        near({"mass": op(**given, lse=lse.detach(), reduce_heads="group")}, {"mass": dv[..., 0]}, str(mask))


@relation
def adds_up_to_the_rows(op, device="cpu"):
    """Per head to the number of rows that saw anything; with sinks to what these left."""
    for c in CASES:
        if c.lengths is None and c.queries <= 150 and c.sinks is None and not c.merged:
            inputs = of(c, device=device)
            rows = (inputs["lse"] > -torch.inf).float().sum(1)
            near({"rows": op(**inputs).sum(1)}, {"rows": rows}, c.name)
    inputs = SMALL.make(device=device)
    lse, given = attention.chunked(**inputs).lse, {n: x for n, x in inputs.items() if n not in ("v", "sink")}
    left = 1 - (inputs["sink"].logsumexp(-1) - lse).exp()
    near({"left": op(**given, lse=lse).sum(1)}, {"left": left.sum(1)}, "sinks")


@relation
def parts_share_the_normaliser(op, device="cpu"):
    """Any disjoint parts of the keys, each with the lse of all of them, give the parts of one call."""
    inputs = of(case("parts", {"causal": False}, queries=33, keys=70, **GROUPED), device=device)
    whole = op(**inputs)
    for bounds in ((0, 1, 70), (0, 30, 30, 41, 70)):
        parts = [op(**{**inputs, "k": inputs["k"][:, a:b]}) for a, b in pairwise(bounds)]
        near({"mass": torch.cat(parts, 1)}, {"mass": whole}, f"parts {bounds}")


@relation
def ranges_add_up(op, device="cpu"):
    """Ranges that part the rows part the mass; a range is what a call on those rows alone gives."""
    for c in (replace(SMALL, sinks=None), case("prefix", {"prefix_len": 9, "block_size": 16}, queries=150, **GROUPED)):
        inputs, rows = of(c, device=device), c.queries
        whole = op(**inputs)
        for cut in (1, 37, rows - 1):
            parts = [op(**inputs, query_range=r) for r in ((None, cut), (cut - rows, None))]
            near({"mass": sum(parts)}, {"mass": whole}, f"{c.name} cut at {cut}")
            alone = op(**tokens(inputs, cut, None, ("q", "lse")), q_offset=cut)
            near({"mass": alone}, {"mass": parts[1]}, f"{c.name}: rows from {cut} alone")


@relation
def reductions_add_heads(op, device="cpu"):
    for name, members in (("gqa", [[0, 1], [2, 3]]), ("tile", [[0, 2], [1, 3]])):
        inputs = of(case("heads", {"head_map": name}, **GROUPED), device=device)
        each, group, total = (op(**inputs, reduce_heads=r) for r in ("none", "group", "sum"))
        near({"group": group}, {"group": torch.stack([each[..., m].sum(-1) for m in members], -1)}, name)
        near({"sum": total}, {"sum": each.sum(-1, keepdim=True)}, name)


@relation
def packed_equals_separate(op, device="cpu", tolerance=1e-6):
    for c in (c for c in CASES if c.lengths):
        for form in FORMS[:2]:
            inputs = of(c, device=device, **form)
            whole, start_q, start_k = op(**inputs), 0, 0
            for queries, keys in c.lengths:
                part = tokens(inputs, start_q, start_q + queries, ("q", "lse"))
                part = tokens(part, start_k, start_k + keys, ("k", "log_decay"))
                alone = op(**{**part, "cu_seqlens_q": None, "cu_seqlens_k": None})
                error = relative_error(alone, whole[:, start_k : start_k + keys])
                assert error <= tolerance, f"{c.name}: sequence of {queries}, {keys}"
                start_q, start_k = start_q + queries, start_k + keys


@relation
def nothing_seen_is_zero(op, device="cpu"):
    """Keys out of reach and rows without keys: 0, no NaN, whatever lies there."""
    inputs = of(case("reach", {"window": 10, "q_offset": 300}, queries=20, keys=330), device=device)
    expected = op(**inputs)
    inputs["k"][:, :250] = torch.nan
    mass = op(**inputs)
    relations.assert_same([mass], [expected], "a key that nobody sees was used")
    assert not mass[:, :291].any() and (mass[:, 291:320] > 0).all() and not mass[:, 320:].any()
    few = of(case("few", batch=1, queries=5, keys=300, **GROUPED), device=device)
    mass = op(**few)
    assert (mass[:, :5] > 0).all() and not mass[:, 5:].any()
    early = of(case("early", {"chunk_rule": ("summary", 10)}, queries=25, keys=2, **GROUPED), device=device)
    assert (early["lse"][:, :10] == -torch.inf).all() and op(**early).isfinite().all()


@relation
def nothing_at_all(op, device="cpu"):
    for c in (replace(SMALL, batch=0), replace(SMALL, queries=0, keys=5), replace(SMALL, keys=0, sinks=None)):
        inputs = of(c, device=device)
        for form, heads in (("none", 4), ("group", 2), ("sum", 1)):
            mass = op(**inputs, reduce_heads=form)
            assert mass.shape == (*inputs["k"].shape[:2], heads) and not mass.any()


@relation
def inputs_unchanged_and_strided(op, device="cpu"):
    inputs = of(replace(SMALL, sinks=None, mask={}, decay=0.1), device=device)
    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, Tensor)}
    first, second = op(**inputs), op(**inputs)
    relations.assert_same([first], [second], "a second call gives other bits")
    for name, x in before.items():
        assert torch.equal(inputs[name], x), f"{name} was overwritten"
    other = {
        n: x.transpose(1, 2).contiguous().transpose(1, 2) if isinstance(x, Tensor) else x for n, x in inputs.items()
    }
    near({"mass": op(**other)}, {"mass": first}, "strided inputs", tolerance=1e-6)


@relation
def canaries(op, device="cpu"):
    """Inputs are views into NaN: reading past their ends would poison the result."""

    def guarded(x):
        if not isinstance(x, Tensor):
            return x
        padded = x.new_full((x.numel() + 4096,), torch.nan)
        padded[2048 : 2048 + x.numel()] = x.flatten()
        return padded[2048 : 2048 + x.numel()].view(x.shape)

    for c in (replace(SMALL, sinks=None), case("odd", decay=0.1, queries=37, key_dim=17)):
        inputs = of(c, device=device)
        relations.assert_same([op(**{n: guarded(x) for n, x in inputs.items()})], [op(**inputs)], c.name)


def run_all(op: Callable, device: str = "cpu") -> dict[str, str | None]:
    """Name → None or the failure, for every check."""
    return relations.outcomes(CHECKS, op, device)


# --- planted bugs: the plain-torch form with one wrong line each ------------------------------------------------------

BUGS = {
    "causal mask one ahead": ("seen & (j <= i)", "seen & (j <= i + 1)"),
    "window one long": ("seen & (i - j < self.window)", "seen & (i - j <= self.window)"),
    "mask ignored": (".masked_fill(~_visible(mask, positions_q, positions_k), 0.0)", ""),
    "rows that see nothing count": ("torch.inf), key_heads", "0.0), key_heads"),
    "rows outside the range count": ("~_taken(row, sequence_q, cu_seqlens_q, length, query_range)[:, None] | ", ""),
    "range ignores its start": ("row >= (0 if start is None", "row >= (0 if True"),
    "range ends one late": ("taken & (row < (", "taken & (row <= ("),
    "negative range of the longest sequence": ("bounds.long().diff()[sequence]", "bounds.long().diff().max().expand(len(row))"),
    "range skips its first row": ("for a in range(first, stop, BLOCK)", "for a in range(first + 1, stop, BLOCK)"),
    "last block lost": ("b, columns = min(a + BLOCK, stop)", "b, columns = min(a + BLOCK, stop - 1)"),
    "blocks overwrite": ("mass[..., columns] += ", "mass[..., columns] = "),
    "lse ignored": ("(s - weights[..., a:b, None]).exp()", "s.softmax(-1)"),
    "lse of the wrong head": ("_grouped(lse.masked_fill", "_grouped(lse.flip(-1).masked_fill"),
    "decay reversed": ("(decay_q[..., a:b, None] - decay_k[..., None, columns])", "(decay_k[..., None, columns] - decay_q[..., a:b, None])"),
    "decay ignored": ("if decay is not None:\n            s = s +", "if decay is not None:\n            s = s + 0 *"),
    "scale ignored": ("if scale is None else scale)", "if True else scale)"),
    "group summed over the wrong heads": ("_grouped(mass, key_heads, head_map).sum(2)", "_grouped(mass, key_heads, 'gqa').sum(2)"),
    "heads averaged": ("mass.sum(-1, keepdim=True)", "mass.mean(-1, keepdim=True)"),
    "packed sequences leak": ("(i[1][:, None] == j[1])", "(i[1][:, None] >= j[1])"),
    "k overwritten": ("    mass = weights.new_zeros", "    k.mul_(1.001)\n    mass = weights.new_zeros"),
    "weights in bfloat16": ("mass[..., columns] += p.sum(-2)", "mass[..., columns] += p.bfloat16().to(dtype).sum(-2)"),
}  # fmt: skip


def planted(bug: str) -> Callable:
    """`chunked` with `bug`."""
    name = "planted_attention_mass"
    sources = [inspect.getsource(module) for module in (attention_mask, attention, attention_mass)]
    own = sources[2][sources[2].index("def over_heads") :]
    sources = [s.replace("from memattn.reference.attention_mask import Mask\n", "") for s in (*sources[:2], own)]
    sys.modules[name] = module = types.ModuleType(name)  # dataclasses look their module up
    for code in relations.with_bug(bug, *BUGS[bug], *sources):
        exec(code, module.__dict__)
    return module.chunked
