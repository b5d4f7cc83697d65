"""Block summaries of a long text: shapes, calls, truth, and the bytes they cannot avoid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support.compare import CEILING

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import block_summary as reference


@dataclass(frozen=True)
class Case:
    """`tokens` keys of `heads` heads of `dim` in blocks of `block`."""

    name: str
    tokens: int
    block: int
    mode: str
    heads: int = 8
    dim: int = 128


def case(tokens: int, block: int, mode: str) -> Case:
    """Named by its sizes."""
    return Case(f"T{tokens} b{block} H8 D128 {mode}", tokens, block, mode)


CPU = (case(65536, 64, "mean"), case(65536, 16, "minmax"))
GPU = (case(1 << 20, 64, "mean"), case(1 << 20, 16, "minmax"))


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs timed in `mode`; only means are trained."""
    return [("training", c) for c in (GPU if device == "cuda" else CPU) if mode == "fwd" or c.mode == "mean"]


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call."""
    noise = torch.Generator(device).manual_seed(seed)

    def normal(count: int) -> torch.Tensor:
        return torch.randn(1, count, case.heads, case.dim, generator=noise, device=device).to(dtype)

    given: Inputs = {"k": normal(case.tokens), "block": case.block, "mode": case.mode}
    if mode == "fwdbwd":
        given |= {"k": given["k"].requires_grad_(), "do": normal(-(-case.tokens // case.block))}
    return given


def run(mode: str, op, given: Inputs) -> Results:
    """o and, in training, the gradient."""
    arguments = {n: x for n, x in given.items() if n != "do"}
    if mode == "fwd":
        with torch.no_grad():
            return {"o": op(**arguments).values}
    o = op(**arguments).values
    return {"o": o.detach(), "dk": torch.autograd.grad(o, given["k"], given["do"])[0]}


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    return lambda given: run(mode, lambda **arguments: ops.block_summary(**arguments, backend=backend), given)


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results of the plain torch form."""
    return run(mode, reference.chunked, given)


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """Keys in and summaries out; backward as the tensors say: keys and cotangents in, gradients out."""
    keys = case.tokens * case.heads * case.dim
    summaries = -(-case.tokens // case.block) * case.heads * case.dim * (2 if case.mode == "minmax" else 1)
    numbers = {"fwd": keys + summaries, "fwdbwd": 3 * keys + 2 * summaries}[mode]
    return Work(numbers * dtype.itemsize, 0)


ENTRY = Entry(
    op="block_summary",
    modes=("fwd", "fwdbwd"),
    shapes=shapes,
    small=lambda case: replace(case, tokens=min(case.tokens, 320), heads=2, dim=32),
    tiny=lambda case: replace(case, tokens=case.block, heads=1, dim=16),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={},
    peers=("torch_blocks",),
    goals={},
)
