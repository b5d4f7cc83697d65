"""Nearest keys of a memory: shapes, calls, truth, and the work it cannot avoid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from support.compare import CEILING

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import knn_attention as reference


@dataclass(frozen=True)
class Case:
    """k of `tokens` keys of width `dim` for each of `queries` queries, one head."""

    name: str
    queries: int
    tokens: int
    dim: int
    k: int


def case(queries: int, tokens: int, dim: int, k: int) -> Case:
    """Named by its sizes."""
    return Case(f"S{queries} T{tokens} D{dim} k{k}", queries, tokens, dim, k)


CPU = {"training": (case(512, 262144, 64, 32), case(512, 65536, 64, 128)), "decode": (case(1, 262144, 64, 32),)}
GPU = {"training": (case(4096, 262144, 64, 32),), "decode": (case(1, 1048576, 64, 32),)}


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs timed in `mode`."""
    return [(group, c) for group, cases in (GPU if device == "cuda" else CPU).items() for c in cases]


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call."""
    noise = torch.Generator(device).manual_seed(seed)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(1, count, 1, case.dim, generator=noise, device=device).to(dtype)

    return {"q": normal(case.queries), "keys": normal(case.tokens), "k": case.k}


def run(search: Callable, given: Inputs) -> Results:
    """The least and the mean of the values that `search` returns: the order of the slots is everybody's own."""
    values = search(**given)[0]
    return {"least": values.amin(-1), "mean": values.mean(-1)}


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    return lambda given: run(partial(ops.knn, backend=backend), given)


def truth(mode: str, given: Inputs) -> Results:
    """The plain torch form's, in float64."""
    return run(reference.chunked_knn, given)


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """Queries and keys in; out, here, two numbers a query. One product, which is all that faiss and torch do too."""
    numbers = (case.queries + case.tokens) * case.dim + 2 * case.queries
    return Work(numbers * dtype.itemsize, 2 * case.queries * case.tokens * case.dim)


ENTRY = Entry(
    op="knn",
    modes=("fwd",),
    shapes=shapes,
    small=lambda case: replace(case, queries=min(case.queries, 20), tokens=500),
    tiny=lambda case: replace(case, queries=1, tokens=1, k=1),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={},
    peers=("exact_search",),
    goals={},
)
