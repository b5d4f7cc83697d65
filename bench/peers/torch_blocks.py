"""What one would write in torch: a mean or extremes over a view, an einsum or Quest's product of both halves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bench.compare import Candidate
from bench.peers.torch_sdpa import gathered
from bench.registry import Inputs, Results


class Summary(NamedTuple):
    """As ours, without counts."""

    values: Tensor


def summary(*, k, block, mode):
    """Whole blocks only."""
    view = k.unflatten(1, (-1, block))
    return Summary(view.mean(2) if mode == "mean" else torch.cat([view.amin(2), view.amax(2)], -1))


def scores(given: Inputs) -> Results:
    """The largest score of each group's heads."""
    q, r = given["q"].unflatten(2, (given["r"].shape[2], -1)), given["r"]
    if given["kind"] == "bound":
        least, largest = r.chunk(2, -1)
        s = torch.einsum("bsgqd,bngd->bsgqn", q.clamp_max(0), least)
        s = s + torch.einsum("bsgqd,bngd->bsgqn", q.clamp_min(0), largest)
    else:
        s = torch.einsum("bsgqd,bngd->bsgqn", q, r)
    return {"o": s.amax(3)}


def retrieval(given: Inputs) -> Results:
    """Scores, torch.topk, a copy of the selected tokens, attention to them."""
    scored = scores({"q": given["q"], "r": given["r"], "kind": "dot"})["o"]
    return gathered({**given, "indices": scored.topk(given["entries"], -1).indices})


def candidates(op: str, mode: str, device: str, wheel: Path | None) -> list[Candidate | tuple[str, str]]:
    """torch itself. `wheel` is another peer's."""
    if op == "block_scores":
        return [Candidate("torch einsum", torch.__version__, scores)]
    if op == "block_retrieval":
        return [Candidate("torch einsum, topk, gather, SDPA", torch.__version__, retrieval)]
    if op != "block_summary":
        return []
    from bench.ops.block_summary import run

    return [Candidate("torch view", torch.__version__, partial(run, mode, summary))]
