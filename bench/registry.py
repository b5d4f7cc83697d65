"""What can be timed: one entry per op, and the vocabulary an entry is written in.

An entry names its shapes (cases shared with the tests), how a backend or a peer is called, the float64 truth, and how
many bytes and floating-point operations the op cannot avoid. How time is taken is compare.py's business.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memattn import backends

MODES = ("fwd", "fwdbwd", "step")
# long: T grows alone. decode-cached: one input set over and over, so that its state stays in the processor's cache.
# call: so small that the time is what a call costs; on a GPU the host's time.
GROUPS = ("training", "long", "decode", "decode-cached", "call")
CACHED_GROUPS = ("decode-cached", "call")
OPS = (
    "gated_delta_rule",
    "linear_attention",
    "causal_conv1d",
    "gated_scan",
    "attention",
    "attention_decode",
    "attention_mass",
    "rat_attention",
    "merge_states",
    "slot_write",
    "memory_recall",
    "segment_memory",
    "segment_events",
    "sparse_attention",
    "topk",
    "knn",
    "block_summary",
    "block_scores",
    "block_retrieval",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Inputs = dict[str, Any]
Results = dict[str, Tensor]
Call = Callable[[Inputs], Results]  # runs one timed call and returns every tensor it produced


@dataclass(frozen=True)
class Work:
    """The least an op must move and compute: each input read once, each output written once, matrix products only."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Entry:
    """One op. A case has a `name` and is otherwise the entry's own; see tests/support/cases.py."""

    op: str
    modes: tuple[str, ...]
    shapes: Callable[[str, str], list[tuple[str, Any]]]  # device, mode -> (group, case)
    small: Callable[[Any], Any]  # the case at a size that takes no time: same heads and dims, few tokens
    tiny: Callable[[Any], Any]  # the least case there is: loads code and starts threads, and leaves next to no scratch
    inputs: Callable[[Any, str, torch.dtype, str, int], Inputs]  # case, mode, dtype, device, seed
    call: Callable[[str, str], Call]  # mode, backend
    truth: Callable[[str, Inputs], Results]  # mode, float64 inputs
    work: Callable[[Any, str, torch.dtype], Work]
    ceiling: Mapping[torch.dtype, float]
    mutated: Mapping[str, tuple[str, ...]]  # mode: inputs the call may change
    peers: tuple[str, ...]
    goals: Mapping[tuple[str, str, str], float]  # (mode, dtype, case name) -> times faster than transformers
    parts: tuple[str, ...] = ()  # of an entry that is several ops, one after the other: their names

    def _names(self, mode: str) -> tuple[str, ...]:
        """The public ops that `mode` calls."""
        return self.parts or (f"{self.op}_step" if mode == "step" else self.op,)

    def backends(self, mode: str) -> tuple[str, ...]:
        """The backends that have this op, or all of its parts."""
        first, *others = (backends.registry()[name] for name in self._names(mode))
        return tuple(name for name in first if all(name in other for other in others))

    def why_not(self, mode: str, backend: str, device: str, dtype: torch.dtype) -> list[str]:
        """Reasons why `backend` cannot be timed here."""
        features = frozenset({"backward"}) if mode == "fwdbwd" else frozenset()
        request = backends.Request(device, dtype, features=features)
        return [reason for name in self._names(mode) for reason in backends.why_not(name, backend, request)]


def load(op: str) -> Entry:
    """The entry of `op`, from bench/ops/<op>.py."""
    if op not in OPS:
        raise ValueError(f"op is {op!r}; allowed: {', '.join(OPS)}")
    entry: Entry = importlib.import_module(f"bench.ops.{op}").ENTRY
    return entry
