"""Attention with memory masks: shapes, calls, truth, and the work it cannot avoid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support.compare import CEILING
from torch import Tensor

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import attention as reference

PRODUCTS = {"fwd": 2, "fwdbwd": 7}  # S and O; again S, and dV, dP, dQ, dK: what a form that keeps no T×T needs


@dataclass(frozen=True)
class Case:
    """q, k, v [batch, length, heads, dim] under a causal mask, of the last `window` keys if given."""

    name: str
    batch: int
    length: int
    heads: int
    dim: int
    window: int | None = None

    def pairs(self) -> int:
        """Keys seen by all queries of one head."""
        width = self.length if self.window is None else min(self.window, self.length)
        return width * (width + 1) // 2 + (self.length - width) * width


def case(length: int, heads: int, dim: int, window: int | None = None, batch: int = 1) -> Case:
    """Named by its sizes."""
    text = f"B{batch} T{length} H{heads} D{dim}" + (f" W{window}" if window else "")
    return Case(text, batch, length, heads, dim, window)


CPU = {
    "training": (case(4096, 8, 64), case(16384, 8, 64, window=512)),
    "prefill": (case(16384, 8, 64),),
    "long": (case(65536, 8, 64, window=512),),
}
GPU = {
    "training": (case(4096, 16, 128, batch=8), case(16384, 16, 128, window=512, batch=2)),
    "prefill": (case(16384, 16, 128, batch=2),),
    "long": (case(131072, 16, 128, window=512),),
}


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs timed in `mode`; a long prefill is forward only."""
    table = GPU if device == "cuda" else CPU
    pairs = [("training", c) for c in table["training"]]
    if mode == "fwd":
        pairs += [("training", c) for c in table["prefill"]] + [("long", c) for c in table["long"]]
    return pairs


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call."""
    noise = torch.Generator(device).manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(case.batch, case.length, case.heads, case.dim, generator=noise, device=device).to(dtype)

    drawn: Inputs = {"q": normal(), "k": normal(), "v": normal(), "window": case.window}
    if mode == "fwdbwd":
        for name in ("q", "k", "v"):
            drawn[name].requires_grad_()
        drawn["do"] = normal()
    return drawn


def differentiated(forward, given: Inputs) -> Results:
    """o and the gradients of q, k and v, for `forward(**arguments) -> o`."""
    o = forward(**{n: x for n, x in given.items() if n != "do"})
    gradients = torch.autograd.grad(o, [given[n] for n in ("q", "k", "v")], given["do"])
    return {"o": o.detach(), **dict(zip(("dq", "dk", "dv"), gradients, strict=True))}


def forward_only(forward, given: Inputs) -> Results:
    """o alone, without a graph."""
    with torch.no_grad():
        return {"o": forward(**given)}


def runner(mode: str):
    """How results are taken from a forward function in `mode`."""
    return differentiated if mode == "fwdbwd" else forward_only


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    return lambda given: runner(mode)(lambda **arguments: ops.attention(**arguments, backend=backend).o, given)


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results of the plain torch form."""
    return runner(mode)(lambda **arguments: reference.chunked(**arguments).o, given)


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """q, k, v in, o out; backward q, k, v and do in, gradients out. Two operations per product, pair and dimension."""
    tensor = case.batch * case.length * case.heads * case.dim
    flops = 2 * PRODUCTS[mode] * case.batch * case.heads * case.pairs() * case.dim
    return Work({"fwd": 4, "fwdbwd": 11}[mode] * tensor * dtype.itemsize, flops)


ENTRY = Entry(
    op="attention",
    modes=("fwd", "fwdbwd"),
    shapes=shapes,
    small=lambda case: replace(case, batch=1, length=min(case.length, 150), window=case.window and 40),
    tiny=lambda case: replace(case, batch=1, length=2, heads=1, window=None),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={},
    peers=("torch_sdpa",),
    goals={},
)
