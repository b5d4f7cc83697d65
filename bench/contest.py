"""Rows of the table: an op in one mode, dtype and shape, with everybody who takes part."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench import candidates, registry, roofline
from bench.compare import Candidate, Gate, Outcome, Race, seconds_host
from bench.registry import CACHED_GROUPS, DTYPES, Entry, Inputs

MOST_SET_BYTES = 4 << 30
LONG_WITH_PEERS = 8192  # tokens; beyond, the long rows on a CPU are about our own time per token


@dataclass(frozen=True)
class Choice:
    """What the command line asked for."""

    ops: tuple[str, ...]
    modes: tuple[str, ...]
    groups: tuple[str, ...]
    dtypes: tuple[str, ...]
    device: str
    backend: str = "auto"
    wheel: Path | None = None
    seconds: float = 2.0  # given to each row's rounds
    quick: bool = False  # the first shape of each group
    dry: bool = False  # check small cases on the CPU, time nothing


@dataclass(frozen=True)
class Contest:
    """One row to be."""

    entry: Entry
    mode: str
    dtype_name: str
    group: str
    case: Any

    @property
    def dtype(self) -> torch.dtype:
        """As torch's."""
        return DTYPES[self.dtype_name]

    @property
    def cached(self) -> bool:
        """Whether the data stays in the processor's cache between calls."""
        return self.group in CACHED_GROUPS

    def sets(self, device: str) -> list[Inputs]:
        """At least two, together four times the last-level cache, so that calls read memory; one if cached."""
        first = self.entry.inputs(self.case, self.mode, self.dtype, device, 0)
        if self.cached:
            return [first]
        size = sum(x.nbytes for x in first.values() if isinstance(x, torch.Tensor))
        count = min(max(2, -(-4 * roofline.last_level_cache(device) // size)), max(1, MOST_SET_BYTES // size))
        return [first] + [self.entry.inputs(self.case, self.mode, self.dtype, device, i) for i in range(1, count)]

    def outcomes(self, choice: Choice) -> list[Outcome]:
        """Gate, and unless it is a dry run time, all candidates."""
        device = "cpu" if choice.dry else choice.device
        found = candidates.ours(self.entry, self.mode, device, self.dtype, choice.backend)
        if not (self.group == "long" and device == "cpu" and self.case.length > LONG_WITH_PEERS):
            found += candidates.peers(self.entry, self.mode, device, choice.wheel)
        able = [c for c in found if isinstance(c, Candidate)]
        gate = Gate(self.entry, self.mode, self.entry.ceiling[self.dtype])
        if choice.dry:
            small = self.entry.inputs(self.entry.small(self.case), self.mode, self.dtype, device, 0)
            outcomes = Race(gate, [small], device, 0).check_only(able)
        else:
            race = Race(gate, self.sets(device), device, choice.seconds)
            if self.group == "call":
                race.time = seconds_host
            outcomes = race.run(able)
        absent = (x for x in found if not isinstance(x, Candidate))
        return outcomes + [Outcome(name, "", "UNAVAILABLE", reason) for name, reason in absent]

    def row(self, ceilings: roofline.Ceilings, choice: Choice) -> dict[str, Any]:
        """As stored in the JSON results."""
        work = self.entry.work(self.case, self.mode, self.dtype)
        row = {
            "op": self.entry.op,
            "mode": self.mode,
            "group": self.group,
            "dtype": self.dtype_name,
            "shape": self.case.name,
            "case": asdict(self.case),
            "bytes": work.bytes,
            "flops": work.flops,
            "goal": self.entry.goals.get((self.mode, self.dtype_name, self.case.name)),
            "candidates": [o.summary() for o in self.outcomes(choice)],
        }
        return row | ceilings.floor_of(row)


def contests(choice: Choice) -> Iterator[Contest]:
    """All rows that were asked for."""
    for op in choice.ops:
        entry = registry.load(op)
        for mode, dtype in itertools.product((m for m in choice.modes if m in entry.modes), choice.dtypes):
            seen = set()
            for group, case in entry.shapes(choice.device, mode):
                if group in choice.groups and not (choice.quick and group in seen):
                    seen.add(group)
                    yield Contest(entry, mode, dtype, group, case)


def listing() -> str:
    """Ops, modes, shapes and who takes part."""
    lines = []
    for op in registry.OPS:
        entry = registry.load(op)
        lines.append(f"{op}: peers {', '.join(entry.peers)}")
        for device, mode in itertools.product(("cpu", "cuda"), entry.modes):
            names = ", ".join(f"{case.name} ({group})" for group, case in entry.shapes(device, mode))
            lines.append(f"  {device:4} {mode:6} backends {', '.join(entry.backends(mode))}; {names}")
    return "\n".join(lines)
