"""Column mass of attention: shapes, calls, truth, and the work it cannot avoid: one product per pair that is seen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support.compare import CEILING
from torch import Tensor

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import attention as attention_reference
from memattn.reference import attention_mass as reference


@dataclass(frozen=True)
class Case:
    """Causal self-attention of `tokens` tokens, of which the last `queries` count."""

    name: str
    tokens: int
    queries: int
    heads: int
    key_heads: int
    dim: int


def case(tokens: int, queries: int, heads: int, dim: int, key_heads: int) -> Case:
    """Named by its sizes."""
    return Case(f"B1 T{tokens} last {queries} H{heads} D{dim} HKV{key_heads}", tokens, queries, heads, key_heads, dim)


# A whole prompt as InfLLM and H2O need it; SnapKV's window of 32 queries; the one query of a step.
CPU = {
    "training": (case(4096, 4096, 8, 64, 8), case(4096, 4096, 16, 128, 4)),
    "decode": (case(32768, 32, 32, 128, 8), case(32768, 1, 32, 128, 8)),
}
GPU = {
    "training": (case(16384, 16384, 32, 128, 8),),
    "decode": (case(131072, 32, 32, 128, 8), case(131072, 1, 32, 128, 8)),
}


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs."""
    return [(group, c) for group, cases in (GPU if device == "cuda" else CPU).items() for c in cases]


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call; q holds the queries that count, and lse is theirs."""
    noise = torch.Generator(device).manual_seed(seed)

    def normal(tokens: int, heads: int) -> Tensor:
        return torch.randn(1, tokens, heads, case.dim, generator=noise, device=device).to(dtype)

    q, k = normal(case.queries, case.heads), normal(case.tokens, case.key_heads)
    lse = attention_reference.chunked(q, k, k, q_offset="end").lse
    return {"q": q, "k": k, "lse": lse, "q_offset": "end", "reduce_heads": "group"}


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    return lambda given: {"mass": ops.attention_mass(**given, backend=backend)}


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results of the plain torch form."""
    return {"mass": reference.chunked(**given)}


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """q, k and lse in once, the mass out; a product for every pair that is seen."""
    pairs = case.queries * (case.tokens - case.queries) + case.queries * (case.queries + 1) // 2
    numbers = (case.queries * case.heads + case.tokens * case.key_heads) * case.dim
    sums = 4 * (case.queries * case.heads + case.tokens * case.key_heads)
    return Work(numbers * dtype.itemsize + sums, 2 * case.dim * case.heads * pairs)


ENTRY = Entry(
    op="attention_mass",
    modes=("fwd",),
    shapes=shapes,
    small=lambda case: replace(case, tokens=min(case.tokens, 150), queries=min(case.queries, 150)),
    tiny=lambda case: replace(case, tokens=2, queries=1, heads=1, key_heads=1),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={},
    peers=("torch_column_sums",),
    goals={},
)
