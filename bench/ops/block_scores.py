"""Scores of one decode step against block summaries: shapes, calls, truth, and the bytes they cannot avoid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support.compare import CEILING

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import block_scores as reference


@dataclass(frozen=True)
class Case:
    """One query of `heads` heads against `blocks` summaries of `groups` heads, the largest of a group's heads."""

    name: str
    blocks: int
    kind: str
    heads: int = 32
    groups: int = 8
    dim: int = 128


def case(blocks: int, kind: str) -> Case:
    """Named by its sizes."""
    return Case(f"N{blocks} H32/8 D128 {kind}", blocks, kind)


SIZES = (case(8192, "dot"), case(8192, "bound"))


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs timed in `mode`."""
    return [("decode", c) for c in SIZES]


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call; the least and largest of "bound" are in order."""
    noise = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, case.dim, generator=noise, device=device)

    r = normal(case.blocks, case.groups)
    r = torch.cat([r, r + normal(case.blocks, case.groups).abs()], -1) if case.kind == "bound" else r
    return {"q": normal(1, case.heads).to(dtype), "r": r.to(dtype), "kind": case.kind, "over": "group", "reduce": "max"}


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    return lambda given: {"o": ops.block_scores(**given, backend=backend).to(given["q"].dtype)}


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results of the plain torch form."""
    return {"o": reference.chunked(**given)}


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """Summaries and the query in, scores of the groups out."""
    width = case.dim * (2 if case.kind == "bound" else 1)
    numbers = case.heads * case.dim + case.blocks * case.groups * (width + 1)
    return Work(numbers * dtype.itemsize, 2 * case.heads * case.blocks * width)


ENTRY = Entry(
    op="block_scores",
    modes=("fwd",),
    shapes=shapes,
    small=lambda case: replace(case, blocks=min(case.blocks, 200)),
    tiny=lambda case: replace(case, blocks=1, heads=1, groups=1),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={},
    peers=("torch_blocks",),
    goals={},
)
