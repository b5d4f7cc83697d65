"""Top-k selection: shapes, calls, truth, and the bytes it cannot avoid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from support.compare import CEILING

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import topk as reference


@dataclass(frozen=True)
class Case:
    """k of each of `rows` rows of `width` scores."""

    name: str
    rows: int
    width: int
    k: int


def case(rows: int, width: int, k: int) -> Case:
    """Named by its sizes."""
    return Case(f"R{rows} N{width} k{k}", rows, width, k)


# Tokens of 64 heads, an indexer's 2,048 tokens, one long memory, blocks of a prefill.
CPU = {
    "training": (case(2048, 2048, 16),),
    "decode": (case(64, 131072, 64), case(8, 131072, 2048), case(1, 1048576, 64)),
}
GPU = {
    "training": (case(65536, 2048, 16), case(2048, 131072, 1024)),
    "decode": (case(256, 262144, 2048), case(1, 1048576, 64)),
}


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs timed in `mode`."""
    return [(group, c) for group, cases in (GPU if device == "cuda" else CPU).items() for c in cases]


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call."""
    noise = torch.Generator(device).manual_seed(seed)
    scores = torch.randn(case.rows, case.width, generator=noise, device=device).to(dtype)
    return {"scores": scores, "k": case.k}


def run(select: Callable, given: Inputs) -> Results:
    """The least and the mean of what `select` returns: the order of the slots is everybody's own."""
    values = select(given["scores"], given["k"])[0]
    return {
        "least": values.amin(-1),
        "mean": values.to(torch.promote_types(values.dtype, torch.float32)).mean(-1).to(values),
    }


def call(mode: str, backend: str) -> Call:
    """Our op as users call it, slots by index: the Python call is part of the time."""
    return lambda given: run(lambda scores, k: ops.topk(scores, k, backend=backend), given)


def truth(mode: str, given: Inputs) -> Results:
    """The plain torch form's, in float64."""
    return run(reference.chunked, given)


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """Every score once. What is returned here is two numbers a row."""
    return Work(case.rows * (case.width + 2) * dtype.itemsize, 0)


ENTRY = Entry(
    op="topk",
    modes=("fwd",),
    shapes=shapes,
    small=lambda case: replace(case, rows=min(case.rows, 3), width=min(case.width, 3000), k=min(case.k, 100)),
    tiny=lambda case: replace(case, rows=1, width=1, k=1),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={},
    peers=("torch_topk",),
    goals={},
)
