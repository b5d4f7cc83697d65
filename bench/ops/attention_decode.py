"""Decode attention: shapes, calls, truth, and the bytes it cannot avoid, which are those of the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support.compare import CEILING
from torch import Tensor

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import attention_decode as reference


@dataclass(frozen=True)
class Case:
    """One token per row over a full contiguous cache [batch, keys, key_heads, dim]."""

    name: str
    batch: int
    keys: int
    heads: int
    key_heads: int
    dim: int


def case(batch: int, keys: int, heads: int, dim: int, key_heads: int | None = None) -> Case:
    """Named by its sizes."""
    text = f"B{batch} S{keys} H{heads} D{dim}" + (f" HKV{key_heads}" if key_heads else "")
    return Case(text, batch, keys, heads, key_heads or heads, dim)


CPU = (case(1, 32768, 8, 64), case(1, 2048, 8, 64), case(4, 8192, 16, 128, key_heads=4))
GPU = (case(64, 4096, 16, 128), case(8, 32768, 32, 128, key_heads=8))


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs timed in `mode`; the second of the CPU's is RAT's cache of the first, chunks of 16."""
    return [("decode", c) for c in (GPU if device == "cuda" else CPU)]


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call."""
    noise = torch.Generator(device).manual_seed(seed)

    def normal(tokens: int, heads: int) -> Tensor:
        return torch.randn(case.batch, tokens, heads, case.dim, generator=noise, device=device).to(dtype)

    caches = {name: normal(case.keys, case.key_heads) for name in ("k_cache", "v_cache")}
    return {
        "q": normal(1, case.heads),
        **caches,
        "cache_seqlens": torch.tensor([case.keys] * case.batch, device=device),
    }


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    return lambda given: {"o": ops.attention_decode(**given, backend=backend).o}


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results of the plain torch form."""
    return {"o": reference.chunked(**given).o}


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """The cache and the lengths in once, q in, o out; two products."""
    rows = case.batch * case.dim
    numbers = 2 * rows * case.keys * case.key_heads + 2 * rows * case.heads
    return Work(numbers * dtype.itemsize + 8 * case.batch, 4 * rows * case.keys * case.heads)


ENTRY = Entry(
    op="attention_decode",
    modes=("fwd",),
    shapes=shapes,
    small=lambda case: replace(case, batch=1, keys=min(case.keys, 150)),
    tiny=lambda case: replace(case, batch=1, keys=2, heads=1, key_heads=1),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={},
    peers=("torch_sdpa",),
    goals={},
)
