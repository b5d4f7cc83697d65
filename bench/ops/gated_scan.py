"""The gated scan: shapes, calls, truth, and the bytes it cannot avoid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support.compare import CEILING
from torch import Tensor

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import gated_scan as reference


@dataclass(frozen=True)
class Case:
    """One gate and one payload [batch, length, dim], moving average; `chunk` None is one scan over the row."""

    name: str
    batch: int
    length: int
    dim: int
    chunk: int | None = None


def case(batch: int, length: int, dim: int, chunk: int | None = None) -> Case:
    """Named by its sizes."""
    return Case(f"B{batch} T{length} D{dim}" + (f" L{chunk}" if chunk else ""), batch, length, dim, chunk)


CPU = {
    "training": (case(1, 4096, 2048, 16), case(1, 4096, 2048)),
    "long": (),
    "decode": (case(8, 1, 8192),),
}
GPU = {
    "training": (case(64, 4096, 2048, 16), case(8, 4096, 2048)),
    "long": (case(2, 131072, 2048, 16),),
    "decode": (case(64, 1, 8192),),
}


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs timed in `mode`."""
    groups = {"step": ("decode",), "fwd": ("training", "long"), "fwdbwd": ("training",)}[mode]
    return [(group, c) for group in groups for c in (GPU if device == "cuda" else CPU)[group]]


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call; gates e^g between 1/2 and 1."""
    noise = torch.Generator(device).manual_seed(seed)
    shape = (case.batch, case.length, case.dim)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=noise, device=device)

    drawn: Inputs = {"g": -0.7 * torch.rand(shape, generator=noise, device=device), "xs": normal(*shape).to(dtype)}
    if mode == "step":
        return drawn | {"state": normal(case.batch, case.dim)}
    drawn["chunk_size"] = case.chunk
    if mode == "fwdbwd":
        for name in ("g", "xs"):
            drawn[name].requires_grad_()
        drawn["dy"] = normal(*shape).to(dtype)
    return drawn


def differentiated(forward, given: Inputs) -> Results:
    """y and the gradients of g and x, for `forward(**arguments) -> y`."""
    y = forward(**{n: x for n, x in given.items() if n != "dy"})
    dg, dx = torch.autograd.grad(y, [given["g"], given["xs"]], given["dy"])
    return {"y": y.detach(), "dg": dg, "dx": dx}


def forward_only(forward, given: Inputs) -> Results:
    """y alone, without a graph."""
    with torch.no_grad():
        return {"y": forward(**given)}


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    if mode == "step":

        def step(given: Inputs) -> Results:
            return {"y": ops.gated_scan_step(**given, backend=backend), "state": given["state"]}

        return step

    def forward(**arguments):
        return ops.gated_scan(**arguments, backend=backend)[0]

    run = differentiated if mode == "fwdbwd" else forward_only
    return lambda given: run(forward, given)


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results of the plain torch form."""
    if mode == "step":
        state = given["state"].clone()
        return {"y": reference.step(given["g"], given["xs"], state), "state": state}

    def forward(g, xs, chunk_size):
        return reference.chunked(g, (xs,), chunk_size=chunk_size)[0][0]

    return (differentiated if mode == "fwdbwd" else forward_only)(forward, given)


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """g and x in, y out; backward g, x and dy in, dg and dx out. No matrix product."""
    numbers = case.batch * case.length * case.dim
    forward = numbers * (4 + 2 * dtype.itemsize)
    if mode == "step":
        return Work(forward + 2 * case.batch * case.dim * 4, 0)
    if mode == "fwd":
        return Work(forward, 0)
    return Work(forward + numbers * (2 * 4 + 3 * dtype.itemsize), 0)


ENTRY = Entry(
    op="gated_scan",
    modes=("fwd", "fwdbwd", "step"),
    shapes=shapes,
    small=lambda case: replace(case, batch=min(case.batch, 2), length=min(case.length, 70), dim=min(case.dim, 96)),
    tiny=lambda case: replace(case, batch=1, length=2, dim=16),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={"step": ("state",)},
    peers=(),
    goals={},
)
