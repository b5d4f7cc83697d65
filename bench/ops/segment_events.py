"""Event segmentation: shapes, calls, truth, and the work it cannot avoid: surprises and keys in once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from support.compare import CEILING
from torch import Tensor

from bench.registry import Call, Entry, Inputs, Results, Work
from memattn import ops


@dataclass(frozen=True)
class Case:
    """One text with EM-LLM's sizes 8..128; `width` values a key (heads × layers × dim), 0: no refinement."""

    name: str
    tokens: int
    width: int
    window: int = 4096


def case(tokens: int, width: int) -> Case:
    """Named by its sizes."""
    return Case(f"T{tokens} " + (f"keys {width}" if width else "unrefined"), tokens, width)


LONGEST_DEFINITION = 2000  # tokens
SIZES = (case(131072, 0), case(1048576, 0), case(16384, 1024), case(65536, 1024))


def shapes(device: str, mode: str) -> list[tuple[str, Case]]:
    """(group, case) pairs; the loop runs on the host, wherever the tensors are."""
    return [("training", c) for c in SIZES]


def inputs(case: Case, mode: str, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Arguments of one call: surprises with a spike every 30 tokens or so, topics of 50 tokens."""
    noise = torch.Generator(device).manual_seed(seed)
    spikes = (torch.rand(case.tokens, generator=noise, device=device) < 1 / 30) * 4.0
    given: Inputs = {"surprise": (torch.rand(case.tokens, generator=noise, device=device) + spikes).to(dtype)}
    if case.width:
        topics = torch.randn(case.tokens // 50 + 1, 1, case.width, generator=noise, device=device)
        keys = topics.repeat_interleave(50, 0)[: case.tokens] + 0.5
        given |= {"keys": keys.to(dtype), "refine": "modularity"}
    return given | {"window": case.window}


def summary(cu_events: Tensor) -> Results:
    """Three numbers that tell bounds apart: how many depends on the data."""
    bounds = cu_events.double()
    return {"summary": torch.stack([bounds.new_tensor(len(bounds)), bounds.sum(), bounds.square().sum()])}


def call(mode: str, backend: str) -> Call:
    """Our op as users call it: the Python call is part of the time."""
    return lambda given: summary(ops.segment_events(**given, backend=backend).cu_events)


def truth(mode: str, given: Inputs) -> Results:
    """The definition, token by token; that takes seconds for long texts, whose truth is the C++ loop in float64."""
    backend = "chunked" if given["surprise"].numel() <= LONGEST_DEFINITION else None
    return summary(ops.segment_events(**given, backend=backend).cu_events)


def work(case: Case, mode: str, dtype: torch.dtype) -> Work:
    """Surprises and keys in once; no matrix product."""
    return Work(case.tokens * (1 + case.width) * dtype.itemsize + 3 * 8, 0)


ENTRY = Entry(
    op="segment_events",
    modes=("fwd",),
    shapes=shapes,
    small=lambda case: replace(case, tokens=min(case.tokens, 300), width=min(case.width, 16), window=50),
    tiny=lambda case: replace(case, tokens=20, width=min(case.width, 1)),
    inputs=inputs,
    call=call,
    truth=truth,
    work=work,
    ceiling=CEILING,
    mutated={},
    peers=(),
    goals={},
)
