"""Memory recall: shapes, calls, truth, and the bytes it cannot avoid. Plain torch, the same on every device."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support.compare import CEILING
from torch import Tensor

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops


@dataclass(frozen=True)
class Case:
    """One query of one head over `rows` memory rows of width `dim`, which are their own values."""

    name: str
    batch: int
    rows: int
    dim: int


def case(batch: int, rows: int, dim: int) -> Case:
    """Named by its sizes."""
    return Case(f"B{batch} N{rows} D{dim}", batch, rows, dim)


SIZES = (case(1, 100, 2048), case(1, 300, 4096), case(8, 300, 2048))


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs timed in `mode`."""
    return [("training", c) for c in SIZES]


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call."""
    noise = torch.Generator(device).manual_seed(seed)

    def normal(count: int) -> Tensor:
        return torch.randn(case.batch, count, 1, case.dim, generator=noise, device=device).to(dtype)

    drawn: Inputs = {"q": normal(1), "memory_keys": normal(case.rows)}
    if mode == "fwdbwd":
        drawn = {n: x.requires_grad_() for n, x in drawn.items()} | {"do": normal(1)}
    return drawn


def run(mode: str, given: Inputs) -> Results:
    """o and, in training, both gradients."""
    if mode == "fwd":
        with torch.no_grad():
            return {"o": ops.memory_recall(**given).o}
    o = ops.memory_recall(given["q"], given["memory_keys"]).o
    dq, dkeys = torch.autograd.grad(o, (given["q"], given["memory_keys"]), given["do"])
    return {"o": o.detach(), "dq": dq, "dmemory_keys": dkeys}


def call(mode: str, backend: str) -> Call:
    """The op as users call it."""
    return lambda given: run(mode, given)


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """Every row in once; in training once more, and its gradient out."""
    values = case.batch * case.dim * {"fwd": case.rows + 2, "fwdbwd": 3 * case.rows + 5}[mode]
    products = {"fwd": 2, "fwdbwd": 6}[mode]
    return Work(values * dtype.itemsize, 2 * products * case.batch * case.rows * case.dim)


class PlainTorch(Entry):
    """An op without kernels: torch serves it everywhere."""

    def backends(self, mode: str) -> tuple[str, ...]:
        """Plain torch alone."""
        return ("chunked",)

    def why_not(self, mode: str, backend: str, device: str, dtype: torch.dtype) -> list[str]:
        """Nothing stands against it."""
        return [] if backend == "chunked" else [f"memory_recall has no {backend} kernel; it is plain torch"]


ENTRY = PlainTorch(
    op="memory_recall",
    modes=("fwd", "fwdbwd"),
    shapes=shapes,
    small=lambda case: replace(case, batch=1),
    tiny=lambda case: replace(case, batch=1, rows=1, dim=1),
    inputs=inputs,
    call=call,
    truth=run,
    work=work,
    ceiling=CEILING,
    mutated={},
    peers=(),
    goals={},
)
