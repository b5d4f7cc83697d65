"""Merge of attention results: shapes, calls, truth, and the bytes it cannot avoid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support.compare import CEILING
from torch import Tensor

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import merge_states as reference


@dataclass(frozen=True)
class Case:
    """`parts` results [batch, length, heads, dim] with their log-sum-exps."""

    name: str
    batch: int
    length: int
    heads: int
    parts: int = 2
    dim: int = 64


def case(batch: int, length: int, heads: int = 8, parts: int = 2) -> Case:
    """Named by its sizes."""
    return Case(f"B{batch} T{length} H{heads} n{parts}", batch, length, heads, parts)


CPU = {"training": (case(1, 8192), case(8, 512), case(1, 8192, parts=4)), "call": (case(1, 16),)}
GPU = {"training": (case(8, 8192, 16), case(8, 8192, 16, parts=4)), "call": (case(1, 16),)}


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs timed in `mode`."""
    groups = ("training", "call") if mode == "fwd" else ("training",)
    return [(group, c) for group in groups for c in (GPU if device == "cuda" else CPU)[group]]


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call; lists as they are given to the op."""
    noise = torch.Generator(device).manual_seed(seed)
    sums = torch.promote_types(dtype, torch.float32)
    rows = (case.batch, case.length, case.heads)

    def normal(*more: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*rows, *more, generator=noise, device=device).to(to)

    drawn: Inputs = {f"o{n}": normal(case.dim) for n in range(case.parts)}
    drawn |= {f"lse{n}": normal(to=sums) for n in range(case.parts)}
    if mode == "fwdbwd":
        drawn = {n: x.requires_grad_() for n, x in drawn.items()} | {"do": normal(case.dim)}
    return drawn


def run(mode: str, op, given: Inputs) -> Results:
    """o and, in training, the gradients of all parts."""
    names = [n for n in given if n != "do"]
    tensors = [given[n] for n in names]
    parts = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
    if mode == "fwd":
        with torch.no_grad():
            return {"o": op(*parts).o}
    o = op(*parts).o
    gradients = torch.autograd.grad(o, tensors, given["do"])
    return {"o": o.detach(), **{f"d{n}": x for n, x in zip(names, gradients, strict=True)}}


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    return lambda given: run(mode, lambda *parts: ops.merge_states(*parts, backend=backend), given)


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results of the plain torch form."""
    return run(mode, reference.chunked, given)


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """Parts in, o out; backward parts and do in again, gradients out. No matrix product."""
    rows, sums = case.batch * case.length * case.heads, torch.promote_types(dtype, torch.float32).itemsize
    wide, narrow = {"fwd": (case.parts + 1, case.parts), "fwdbwd": (3 * case.parts + 2, 3 * case.parts)}[mode]
    return Work(rows * (wide * case.dim * dtype.itemsize + narrow * sums), 0)


ENTRY = Entry(
    op="merge_states",
    modes=("fwd", "fwdbwd"),
    shapes=shapes,
    small=lambda case: replace(case, batch=1, length=min(case.length, 100)),
    tiny=lambda case: replace(case, batch=1, length=1, heads=1),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={},
    peers=(),
    goals={},
)
