"""One decode step of block retrieval, end to end: scores of summaries, selection, attention to the selected blocks.

Not an op: `block_scores`, `topk` and `sparse_attention` one after the other, against attention over everything. Each
query head's favourite blocks are planted, so that float64 selects the same ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support.compare import CEILING
from torch import Tensor

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import block_scores, sparse_attention, topk

PLANTED = 0.2  # of a query head, added to the keys of the blocks it is to find


@dataclass(frozen=True)
class Case:
    """One query over `tokens` tokens in blocks of `unit`, `entries` of which each key head selects."""

    name: str
    tokens: int
    heads: int
    key_heads: int
    dim: int
    unit: int
    entries: int

    @property
    def blocks(self) -> int:
        """Whole ones."""
        return self.tokens // self.unit


RETRIEVAL = Case("T131072 H32 HKV8 D128 32 x 64", 131072, 32, 8, 128, 64, 32)


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one step. r holds the means of k's blocks, as a cache keeps them beside its pages."""
    noise = torch.Generator(device).manual_seed(seed)

    def normal(tokens: int, heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, case.dim, generator=noise, device=device).to(dtype)

    q, k, v = normal(1, case.heads), normal(case.tokens, case.key_heads), normal(case.tokens, case.key_heads)
    blocks = k.view(case.blocks, case.unit, case.key_heads, case.dim)
    favourite = q.view(case.key_heads, -1, case.dim)[:, 0]
    for head in range(case.key_heads):
        chosen = torch.randperm(case.blocks, generator=noise, device=device)[: case.entries]
        blocks[chosen, :, head] += PLANTED * favourite[head]
    r = blocks.mean(1, dtype=torch.float32).to(dtype)[None]
    return {"q": q, "k": k, "v": v, "r": r, "entries": case.entries, "unit": case.unit}


def step(given: Inputs, score, select, attend) -> Results:
    """The largest score of a group's heads decides; each key head has its own list."""
    q, k, v, r, entries, unit = (given[n] for n in ("q", "k", "v", "r", "entries", "unit"))
    with torch.no_grad():
        blocks = select(score(q, r, over="group", reduce="max"), entries).indices
        return {"o": attend(q, k, v, blocks, unit=unit).o}


def call(mode: str, backend: str) -> Call:
    """Our ops as users call them: the Python calls are part of the time."""

    def of(op):
        return lambda *tensors, **settings: op(*tensors, **settings, backend=backend)

    return lambda given: step(given, of(ops.block_scores), of(ops.topk), of(ops.sparse_attention))


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results of the plain torch forms."""
    return step(given, block_scores.chunked, topk.chunked, sparse_attention.chunked)


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """Summaries, the selected tokens of k and v, and the query in, o out."""
    selected = case.entries * case.unit
    numbers = case.key_heads * (case.blocks + 2 * selected) + 2 * case.heads
    return Work(numbers * case.dim * dtype.itemsize, 2 * case.heads * case.dim * (case.blocks + 2 * selected))


ENTRY = Entry(
    op="block_retrieval",
    modes=("fwd",),
    shapes=lambda device, mode: [("decode", RETRIEVAL)],
    small=lambda case: replace(case, tokens=192, unit=16, entries=3),
    tiny=lambda case: replace(case, tokens=2, heads=1, key_heads=1, unit=1, entries=1),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={},
    peers=("torch_sdpa", "torch_blocks"),
    goals={},
    parts=("block_scores", "topk", "sparse_attention"),
)
