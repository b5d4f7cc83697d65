"""What linear attention is measured against: the delta rule, which does more, and the chunk form in plain torch.

The delta rule gets β = 2^-30 and a scale 2^30 times larger. Then what it erases is below every rounding and its results
are those of linear attention, so that the gate can check them, at the price of any other β.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from bench.compare import Candidate
from memattn import __version__, backends, ops

BETA = 2.0**-30


@cache
def _beta(shape: torch.Size, device: torch.device) -> torch.Tensor:
    return torch.full(shape, BETA, device=device)


def erasing_nothing(q, k, v, g, *, normalize, scale, initial_state, cu_seqlens):
    """linear_attention by gated_delta_rule."""
    if normalize or initial_state is not None:
        raise NotImplementedError("the delta rule has no normaliser, and a state would have to be scaled")
    g = None if g is None else g.expand(v.shape[:3])
    scale = (q.shape[3] ** -0.5 if scale is None else scale) / BETA
    return ops.gated_delta_rule(q, k, v, g, _beta(v.shape[:3], v.device), scale=scale, cu_seqlens=cu_seqlens)


def candidates(op: str, mode: str, device: str, wheel: Path | None) -> list[Candidate | tuple[str, str]]:
    """Both, for whole sequences; plain torch alone for steps. `wheel` is another peer's."""
    if op != "linear_attention":
        return []
    from bench.ops import gated_delta_rule as delta
    from bench.ops import linear_attention as linear

    torch_form: Candidate | tuple[str, str] = Candidate(
        "torch chunk form", torch.__version__, linear.call(mode, "chunked")
    )
    if mode == "step":
        return [torch_form]
    name = "memattn gated_delta_rule"
    if reasons := backends.why_not(
        "gated_delta_rule", "cpu" if device == "cpu" else "triton", backends.Request(device, torch.float32)
    ):
        return [(name, "; ".join(reasons)), torch_form]
    run = delta.differentiated if mode == "fwdbwd" else delta.forward_only
    return [Candidate(name, __version__, lambda given: run(erasing_nothing, given)), torch_form]
