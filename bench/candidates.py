"""Who takes part: our backends that can run here, and the peers."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch

from bench.compare import Candidate
from bench.registry import Entry
from memattn import __version__


def backends_of(entry: Entry, mode: str, wanted: str) -> tuple[str, ...]:
    """`auto` is the backend a user would get, `all` every one, else names separated by commas."""
    names = entry.backends(mode)
    if wanted in ("auto", "all"):
        return names
    unknown = set(wanted.split(",")) - set(names)
    if unknown:
        allowed = ", ".join(("auto", "all", *names))
        raise ValueError(f"--backend has {', '.join(sorted(unknown))}; allowed for {entry.op} {mode}: {allowed}")
    return tuple(wanted.split(","))


def ours(entry: Entry, mode: str, device: str, dtype: torch.dtype, wanted: str) -> list[Candidate | tuple[str, str]]:
    """Our candidates, and (name, reason) for those that cannot run."""
    result: list[Candidate | tuple[str, str]] = []
    for backend in backends_of(entry, mode, wanted):
        reasons = entry.why_not(mode, backend, device, dtype)
        if reasons:
            result.append((f"memattn {backend}", "; ".join(reasons)))
        else:
            result.append(Candidate(f"memattn {backend}", __version__, entry.call(mode, backend)))
            if wanted == "auto":
                break
    return result


def peers(entry: Entry, mode: str, device: str, wheel: Path | None) -> list[Candidate | tuple[str, str]]:
    """The peers' candidates, and (name, reason) for those that cannot run."""
    found: list[Candidate | tuple[str, str]] = []
    for name in entry.peers:
        found += importlib.import_module(f"bench.peers.{name}").candidates(entry.op, mode, device, wheel)
    return found


def all_of(
    entry: Entry, mode: str, device: str, dtype: torch.dtype, wanted: str, wheel: Path | None
) -> list[Candidate | tuple[str, str]]:
    """Ours first, then the peers."""
    return [*ours(entry, mode, device, dtype, wanted), *peers(entry, mode, device, wheel)]
