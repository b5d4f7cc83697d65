"""The short causal convolution: shapes, calls, truth, and the work it cannot avoid."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support.compare import CEILING
from torch import Tensor

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import causal_conv1d as reference


@dataclass(frozen=True)
class Case:
    """x [batch, length, dim] and a filter of `width` taps, followed by silu as in the layers."""

    name: str
    batch: int
    length: int
    dim: int
    width: int = 4


def case(batch: int, length: int, dim: int) -> Case:
    """Named by its sizes."""
    return Case(f"B{batch} T{length} D{dim} W4", batch, length, dim)


CPU = {
    "training": (case(1, 2048, 6144), case(2, 1024, 2048)),
    "long": (),
    "decode": (case(1, 1, 8192), case(8, 1, 8192)),
}
GPU = {
    "training": (case(1, 8192, 8192), case(8, 1024, 8192)),
    "long": (case(1, 131072, 8192),),
    "decode": (case(1, 1, 8192), case(32, 1, 8192), case(256, 1, 8192)),
}


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs timed in `mode`."""
    groups = {"step": ("decode",), "fwd": ("training", "long"), "fwdbwd": ("training",)}[mode]
    return [(group, c) for group in groups for c in (GPU if device == "cuda" else CPU)[group]]


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call; weight and bias float32, as in a model."""
    noise = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise, device=device)

    x = normal(case.batch, case.length, case.dim).to(dtype)
    drawn: Inputs = {"x": x, "weight": normal(case.dim, case.width) / 2, "bias": normal(case.dim), "activation": "silu"}
    if mode == "step":
        return drawn | {"state": normal(case.batch, case.dim, case.width - 1)}
    drawn |= {"initial_state": None, "cu_seqlens": None}
    if mode == "fwdbwd":
        for name in ("x", "weight", "bias"):
            drawn[name].requires_grad_()
        drawn["dy"] = normal(case.batch, case.length, case.dim).to(dtype)
    return drawn


def differentiated(forward, given: Inputs) -> Results:
    """y and the gradients of x, weight and bias, for `forward(**arguments) -> (y, final_state)`."""
    arguments = {n: x for n, x in given.items() if n != "dy"}
    y, _ = forward(**arguments)
    gradients = torch.autograd.grad(y, [given[n] for n in ("x", "weight", "bias")], given["dy"])
    return {"y": y.detach(), **dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))}


def forward_only(forward, given: Inputs) -> Results:
    """y alone, without a graph."""
    with torch.no_grad():
        return {"y": forward(**given)[0]}


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    if mode == "step":

        def step(given: Inputs) -> Results:
            return {"y": ops.causal_conv1d_step(**given, backend=backend), "state": given["state"]}

        return step

    def forward(**arguments):
        return ops.causal_conv1d(**arguments, backend=backend)

    run = differentiated if mode == "fwdbwd" else forward_only
    return lambda given: run(forward, given)


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results of the plain torch form."""
    if mode == "step":
        given = given | {"state": given["state"].clone()}
        return {"y": reference.step(**given), "state": given["state"]}
    return (differentiated if mode == "fwdbwd" else forward_only)(reference.chunked, given)


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """x in, y out; backward x and dy in, dx out. A multiply and an add per tap, three times that with backward."""
    x = case.batch * case.length * case.dim
    filters = case.dim * (case.width + 1) * 4
    taps = 2 * case.width * x
    if mode == "step":
        return Work(2 * x * dtype.itemsize + filters + 2 * case.batch * case.dim * (case.width - 1) * 4, taps)
    if mode == "fwd":
        return Work(2 * x * dtype.itemsize + filters, taps)
    return Work(5 * x * dtype.itemsize + 3 * filters, 3 * taps)


ENTRY = Entry(
    op="causal_conv1d",
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
    peers=("torch_conv1d",),
    goals={},
)
