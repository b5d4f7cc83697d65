"""torch.topk, its slots in no order: its fastest form."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.compare import Candidate


def candidates(op: str, mode: str, device: str, wheel: Path | None) -> list[Candidate | tuple[str, str]]:
    """torch itself. `wheel` is another peer's."""
    if op != "topk":
        return []
    from bench.ops.topk import run

    return [
        Candidate(
            "torch.topk", torch.__version__, lambda given: run(lambda x, k: torch.topk(x, k, sorted=False), given)
        )
    ]
