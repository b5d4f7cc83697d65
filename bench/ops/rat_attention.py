"""RAT attention: shapes, calls, truth, and the work it cannot avoid. The paper's heads: q and k in two tiled groups."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from support.compare import CEILING
from torch import Tensor

from bench.ops.attention import PRODUCTS
from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import rat_attention as reference

GRADIENTS = ("q", "k", "v", "g")
STATE = ("keys", "values", "running_key", "running_value", "length")


@dataclass(frozen=True)
class Case:
    """`heads` of `dim` channels over two groups, chunks of `chunk` tokens; a step comes after `length` tokens."""

    name: str
    batch: int
    length: int
    heads: int
    dim: int
    chunk: int

    def pairs(self) -> int:
        """Chunk ends seen by all queries of one head."""
        whole, rest = divmod(self.length, self.chunk)
        return self.chunk * whole * (whole - 1) // 2 + rest * whole


def case(length: int, heads: int, dim: int, chunk: int = 16, batch: int = 1) -> Case:
    """Named by its sizes."""
    return Case(f"B{batch} T{length} H{heads} D{dim} L{chunk}", batch, length, heads, dim, chunk)


CPU = {
    "training": (case(4096, 8, 64), case(16384, 8, 64)),
    "long": (case(65536, 8, 64),),
    "decode": (case(32768, 8, 64),),
}
GPU = {
    "training": (case(4096, 16, 128, batch=64), case(16384, 16, 128, batch=16), case(131072, 16, 128, batch=2)),
    "long": (case(262144, 16, 128),),
    "decode": (case(4096, 16, 128, batch=64), case(32768, 16, 128, batch=8)),
}


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs timed in `mode`."""
    groups = {"step": ("decode",), "fwd": ("training", "long"), "fwdbwd": ("training",)}[mode]
    return [(group, c) for group in groups for c in (GPU if device == "cuda" else CPU)[group]]


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call; gates e^g between 1/2 and 1."""
    noise = torch.Generator(device).manual_seed(seed)
    length = 1 if mode == "step" else case.length

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=noise, device=device).to(dtype)

    rows, heads = (case.batch, length), (case.heads, case.dim)
    gate = -0.7 * torch.rand(*rows, *heads, generator=noise, device=device)
    drawn: Inputs = {"q": normal(*rows, 2, case.dim), "k": normal(*rows, 2, case.dim), "v": normal(*rows, *heads)}
    drawn |= {"g": gate, "chunk_size": case.chunk, "head_map": "tile"}
    if mode == "step":
        ends = (case.batch, case.length // case.chunk + 1, *heads)
        drawn |= {"keys": normal(*ends), "values": normal(*ends)}
        drawn |= {name: normal(case.batch, *heads, dtype=torch.float32) for name in STATE[2:4]}
        drawn["length"] = torch.full((case.batch,), case.length, device=device)
    if mode == "fwdbwd":
        for name in GRADIENTS:
            drawn[name].requires_grad_()
        drawn["do"] = normal(*rows, *heads)
    return drawn


def differentiated(forward, given: Inputs) -> Results:
    """o and the gradients of q, k, v and g, for `forward(**arguments) -> o`."""
    o = forward(**{n: x for n, x in given.items() if n != "do"})
    gradients = torch.autograd.grad(o, [given[n] for n in GRADIENTS], given["do"])
    return {"o": o.detach(), **{f"d{n}": x for n, x in zip(GRADIENTS, gradients, strict=True)}}


def forward_only(forward, given: Inputs) -> Results:
    """o alone, without a graph."""
    with torch.no_grad():
        return {"o": forward(**given)}


def runner(mode: str):
    """How results are taken from a forward function in `mode`."""
    return differentiated if mode == "fwdbwd" else forward_only


def stepped(step, given: Inputs) -> Results:
    """o and the running state; the length is a copy, so that the next call is at the same place."""
    parts = {n: given[n].long().clone() if n == "length" else given[n] for n in STATE}
    rest = {n: x for n, x in given.items() if n not in STATE}
    o = step(**rest, state=ops.RATState(**parts))
    return {"o": o, "state": torch.stack((given["running_key"], given["running_value"]))}


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    if mode == "step":
        return functools.partial(stepped, functools.partial(ops.rat_attention_step, backend=backend))
    return lambda given: runner(mode)(lambda **arguments: ops.rat_attention(**arguments, backend=backend)[0], given)


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results of the plain torch form."""
    if mode == "step":
        return stepped(lambda state, **rest: reference.step(**rest, state=state.parts()), given)
    return runner(mode)(lambda **arguments: reference.chunked(**arguments)[0], given)


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """q, k, v, g in, o out; backward them and do in, gradients out. A step reads all entries and the running state."""
    row, groups = case.heads * case.dim, 2 * case.dim
    if mode == "step":
        token = (2 * groups + 2 * row) * dtype.itemsize + 4 * row
        state = 2 * (case.length // case.chunk + 1) * row * dtype.itemsize + 4 * 4 * row + 8
        return Work(case.batch * (token + state), 4 * case.batch * case.length // case.chunk * row)
    read = (2 * groups + row) * dtype.itemsize + 4 * row
    token = read + row * dtype.itemsize if mode == "fwd" else 3 * read + 2 * row * dtype.itemsize
    flops = 2 * PRODUCTS[mode] * case.batch * case.heads * case.pairs() * case.dim
    return Work(case.batch * case.length * token, flops)


ENTRY = Entry(
    op="rat_attention",
    modes=("fwd", "fwdbwd", "step"),
    shapes=shapes,
    small=lambda case: replace(case, batch=1, length=min(case.length, 150)),
    tiny=lambda case: replace(case, batch=1, length=2),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={"step": ("running_key", "running_value")},
    peers=("torch_sdpa",),
    goals={},
)
