"""Segment memory: shapes, calls, truth, and the work it cannot avoid."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from support.compare import CEILING
from support.segments import SegmentCase, as_op
from torch import Tensor

from bench.ops import gated_delta_rule as delta
from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops
from memattn.reference import segment_memory as reference

# --- shapes ----------------------------------------------------------------------------------------------------------


def infini(length: int, batch: int = 1, **more) -> SegmentCase:
    """The published heads of Infini-attention; a call from an empty memory."""
    name = f"B{batch} T{length} H8 D128 C2048" + (" additive" if not more.get("delta", True) else "")
    return SegmentCase(
        name, batch, length, heads=8, key_heads=8, key_dim=128, value_dim=128, segment_size=2048, state=False, **more
    )


def armt(length: int, width: int, batch: int = 1) -> SegmentCase:
    """One memory of 6 · 64 features over the whole width: segments of 1024 tokens that write 16 rows each."""
    return SegmentCase(
        f"B{batch} T{length} K384 V{width} C1024 m16", batch, length, key_length=length // 64, heads=1, key_heads=1,
        key_dim=384, value_dim=width, beta=True, segment_size=1024, key_segment_size=16, correction=True, state=False,
    )  # fmt: skip


CPU = {
    "training": (infini(8192), infini(8192, delta=False), armt(4096, 2048)),
    "long": tuple(infini(length) for length in (4096, 16384, 65536)),
}
GPU = {
    "training": (infini(32768, 4), infini(32768, 4, delta=False), armt(8192, 4096, 4)),
    "long": tuple(infini(length) for length in (16384, 65536, 262144)),
}


def shapes(device: str, mode: str) -> list[tuple[str, SegmentCase]]:
    """(group, case) pairs timed in `mode`."""
    groups = {"fwd": ("training", "long"), "fwdbwd": ("training",)}[mode]
    return [(group, c) for group in groups for c in (GPU if device == "cuda" else CPU)[group]]


def small(case: SegmentCase) -> SegmentCase:
    """Three segments of a few tokens."""
    if case.key_length is None:
        return replace(case, length=70, segment_size=32)
    return replace(case, length=70, key_length=12, segment_size=32, key_segment_size=4)


def inputs(case: SegmentCase, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call."""
    drawn: Inputs = {n: x for n, x in case.make(dtype, device, seed).items() if x is not None}
    if mode == "fwdbwd":
        for x in drawn.values():
            if isinstance(x, Tensor):
                x.requires_grad_()
        noise = torch.Generator(device).manual_seed(seed + 1)
        rows = (*drawn["q"].shape[:3], case.value_dim)
        drawn["do"] = torch.randn(rows, generator=noise, device=device).to(dtype)
    return drawn


# --- calls -----------------------------------------------------------------------------------------------------------


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    run = delta.differentiated if mode == "fwdbwd" else delta.forward_only
    return lambda given: run(functools.partial(ops.segment_memory, backend=backend), given)


def truth(mode: str, given: Inputs) -> Results:
    """Float64 results of the plain torch form (tests prove it equal to the loop)."""
    forward = as_op(reference.chunked)
    optional = {"key_segment_size": None}
    run = delta.differentiated if mode == "fwdbwd" else delta.forward_only
    return run(lambda **arguments: forward(**optional | arguments), given)


# --- the work that no implementation avoids --------------------------------------------------------------------------


def work(case: SegmentCase, mode: str, dtype: torch.dtype) -> Work:
    """Products with a memory: reads of one that is not empty, writes that somebody reads, and what those erase.

    Backward does each twice more: the gradient of the rows and that of the memory.
    """
    queries, keys = case.length, case.length if case.key_length is None else case.key_length
    size, key_size = case.segment_size, case.key_segment_size or case.segment_size
    segments = min(-(-queries // size) - 1, -(-keys // key_size))  # that somebody reads
    readers, writers = queries - min(size, queries), min(segments * key_size, keys)
    erasers = max(writers - key_size, 0) if case.delta else 0
    products = case.batch * (case.heads * readers + case.key_heads * (writers + erasers))
    flops = 2 * products * case.key_dim * case.value_dim
    rows = case.batch * dtype.itemsize
    read = rows * (
        queries * case.heads * case.key_dim
        + keys * case.key_heads * (case.key_dim + case.value_dim + int(case.beta))
    )  # fmt: skip
    o = rows * queries * case.heads * case.value_dim
    if mode == "fwd":
        return Work(read + o, flops)
    return Work(3 * read + 2 * o, 3 * flops)


ENTRY = Entry(
    op="segment_memory",
    modes=("fwd", "fwdbwd"),
    shapes=shapes,
    small=small,
    tiny=lambda case: replace(small(case), length=2, key_length=2, heads=1, key_heads=1, key_dim=16, value_dim=16),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={},
    peers=(),
    goals={},
)
