"""Slot write: shapes, calls, truth, and the work it cannot avoid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support.compare import CEILING
from torch import Tensor

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import slot_write as reference

TENSORS = ("q", "k_self", "v_self", "k", "v")
PRODUCTS = {"fwd": 2, "fwdbwd": 7}  # as attention's


@dataclass(frozen=True)
class Case:
    """`slots` slots of `heads` heads of 64 beside a segment of `tokens` tokens."""

    name: str
    batch: int
    slots: int
    tokens: int
    heads: int
    see: str
    dim: int = 64


def case(batch: int, slots: int, tokens: int, heads: int = 8, see: str = "own") -> Case:
    """Named by its sizes."""
    return Case(f"B{batch} M{slots} T{tokens} H{heads} {see}", batch, slots, tokens, heads, see)


# Memformer's 32 slots and segments of 64; Block-Recurrent's 512 states and windows of 512 tokens, twice.
CPU = {
    "training": (case(8, 32, 64), case(8, 64, 512), case(1, 32, 1024), case(1, 512, 1024, 16, "all")),
    "call": (case(1, 32, 64),),
}
GPU = {
    "training": (case(128, 32, 64), case(32, 64, 512), case(32, 32, 1024), case(16, 512, 1024, 16, "all")),
    "call": (case(1, 32, 64),),
}


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs timed in `mode`."""
    groups = ("training", "call") if mode == "fwd" else ("training",)
    return [(group, c) for group in groups for c in (GPU if device == "cuda" else CPU)[group]]


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call."""
    noise = torch.Generator(device).manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(case.batch, count, case.heads, case.dim, generator=noise, device=device).to(dtype)

    drawn: Inputs = {name: normal(case.tokens if name in ("k", "v") else case.slots) for name in TENSORS}
    if mode == "fwdbwd":
        for name in TENSORS:
            drawn[name].requires_grad_()
        drawn["do"] = normal(case.slots)
    return drawn | {"see": case.see}


def run(mode: str, op, given: Inputs) -> Results:
    """o and, in training, the gradients of all five tensors."""
    arguments = {n: x for n, x in given.items() if n != "do"}
    if mode == "fwd":
        with torch.no_grad():
            return {"o": op(**arguments).o}
    o = op(**arguments).o
    gradients = torch.autograd.grad(o, [given[n] for n in TENSORS], given["do"])
    return {"o": o.detach(), **{f"d{n}": x for n, x in zip(TENSORS, gradients, strict=True)}}


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    return lambda given: run(mode, lambda **arguments: ops.slot_write(**arguments, backend=backend), given)


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results of the plain torch form."""
    return run(mode, reference.chunked, given)


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """Slots in three times and out once, tokens in twice; backward the same again with gradients out."""
    slots, tokens = case.slots, case.tokens
    row = case.batch * case.heads * case.dim
    rows = {"fwd": 4 * slots + 2 * tokens, "fwdbwd": 11 * slots + 6 * tokens}[mode]
    keys = tokens + (slots if case.see == "all" else 1)
    return Work(rows * row * dtype.itemsize, 2 * PRODUCTS[mode] * row * slots * keys)


ENTRY = Entry(
    op="slot_write",
    modes=("fwd", "fwdbwd"),
    shapes=shapes,
    small=lambda case: replace(case, batch=1, slots=min(case.slots, 40), tokens=min(case.tokens, 150)),
    tiny=lambda case: replace(case, batch=1, slots=1, tokens=1, heads=1),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={},
    peers=(),
    goals={},
)
