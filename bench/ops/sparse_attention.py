"""Sparse attention: shapes, calls, truth, and the work it cannot avoid, which is that on the listed tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support.compare import CEILING
from torch import Tensor

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import sparse_attention as reference

PRODUCTS = {"fwd": 2, "fwdbwd": 7}  # as attention's


@dataclass(frozen=True)
class Case:
    """`queries` queries, each with `entries` blocks of `unit` tokens; causal: its own and earlier ones."""

    name: str
    queries: int
    tokens: int
    heads: int
    key_heads: int
    dim: int
    unit: int
    entries: int
    causal: bool

    def seen(self, t: int) -> int:
        """Tokens that query t sees."""
        if not self.causal:
            return self.entries * self.unit
        return t % self.unit + 1 + min(self.entries - 1, t // self.unit) * self.unit


def case(tokens: int, heads: int, key_heads: int, dim: int, unit: int, entries: int, decode: bool = False) -> Case:
    """Named by its sizes."""
    text = f"T{tokens} H{heads} HKV{key_heads} D{dim} {entries} x {unit}"
    return Case(text, 1 if decode else tokens, tokens, heads, key_heads, dim, unit, entries, not decode)


# Retrieval of 2,048 tokens from 131,072; NSA's 16 blocks of 64 and MoBA's 3 of 512.
DECODE = (case(131072, 32, 8, 128, 64, 32, decode=True), case(131072, 32, 8, 128, 1, 2048, decode=True))
CPU = {"decode": DECODE, "training": (case(8192, 8, 2, 64, 64, 16), case(8192, 4, 4, 64, 512, 3))}
GPU = {"decode": DECODE, "training": (case(32768, 64, 4, 128, 64, 16), case(32768, 16, 16, 128, 2048, 3))}


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs timed in `mode`."""
    groups = ("decode", "training") if mode == "fwd" else ("training",)
    return [(group, c) for group in groups for c in (GPU if device == "cuda" else CPU)[group]]


def lists(case: Case, noise: torch.Generator, device: str) -> Tensor:
    """[1, S, HKV, n]: distinct blocks drawn at random, among them the query's own if causal; ascending, −1 for none."""
    blocks = -(-case.tokens // case.unit)
    score = torch.rand(1, case.queries, case.key_heads, blocks, generator=noise, device=device)
    if case.causal:
        own = torch.arange(case.queries, device=device)[:, None, None] // case.unit
        block = torch.arange(blocks, device=device)
        score = torch.where(block == own, 2.0, score).masked_fill(block > own, -1.0)
    best = score.topk(case.entries, -1)
    return best.indices.masked_fill(best.values < 0, -1).sort(-1).values.int()


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call."""
    noise = torch.Generator(device).manual_seed(seed)

    def normal(tokens: int, heads: int) -> Tensor:
        drawn = torch.randn(1, tokens, heads, case.dim, generator=noise, device=device).to(dtype)
        return drawn.requires_grad_(mode == "fwdbwd")

    given = {
        "q": normal(case.queries, case.heads),
        "k": normal(case.tokens, case.key_heads),
        "v": normal(case.tokens, case.key_heads),
        "indices": lists(case, noise, device),
        "unit": case.unit,
    }
    if case.causal:
        given["q_positions"] = torch.arange(case.queries, device=device)[None]
    if mode == "fwdbwd":
        given["do"] = normal(case.queries, case.heads).detach()
    return given


def run(mode: str, op, given: Inputs) -> Results:
    """o and, in training, the gradients of q, k and v."""
    arguments = {n: x for n, x in given.items() if n != "do"}
    if mode == "fwd":
        with torch.no_grad():
            return {"o": op(**arguments).o}
    o = op(**arguments).o
    gradients = torch.autograd.grad(o, [given[n] for n in "qkv"], given["do"])
    return {"o": o.detach(), **{f"d{n}": x for n, x in zip("qkv", gradients, strict=True)}}


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    return lambda given: run(mode, lambda **arguments: ops.sparse_attention(**arguments, backend=backend), given)


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results of the plain torch form."""
    return run(mode, reference.chunked, given)


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """The listed tokens of k and v once (in training all of them), q and lists in, o out; backward too."""
    seen = sum(case.seen(t) for t in range(case.queries))
    tokens = case.tokens if case.causal else case.entries * case.unit
    rows = {"fwd": (2, 2), "fwdbwd": (5, 6)}[mode]  # of q's and of k's size
    numbers = case.dim * (rows[0] * case.queries * case.heads + rows[1] * tokens * case.key_heads)
    lists = case.queries * (4 * case.key_heads * case.entries + 8 * case.causal)
    flops = 2 * PRODUCTS[mode] * seen * case.heads * case.dim
    return Work(numbers * dtype.itemsize + lists * (2 if mode == "fwdbwd" else 1), flops)


def small(case: Case) -> Case:
    """The same heads and dims, few tokens."""
    unit = min(case.unit, 16)
    queries = 40 if case.causal else 1
    return replace(case, queries=queries, tokens=40 if case.causal else 192, unit=unit, entries=min(case.entries, 3))


ENTRY = Entry(
    op="sparse_attention",
    modes=("fwd", "fwdbwd"),
    shapes=shapes,
    small=small,
    tiny=lambda case: replace(case, queries=1, tokens=2, heads=1, key_heads=1, unit=1, entries=1),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={},
    peers=("torch_sdpa",),
    goals={},
)
