"""torch's own depthwise convolution, as models without a fused kernel call it: transpose, pad, conv1d, cut, silu."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from bench.compare import Candidate
from bench.registry import Call, Inputs, Results


def forward(*, x, weight, bias, activation, initial_state, cu_seqlens):
    """x [B,T,D] -> y [B,T,D] from a zero state; torch wants one dtype for input and weight."""
    width = weight.shape[1]
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.conv1d(F.pad(x.transpose(1, 2), (width - 1, 0)), weight[:, None], bias, groups=weight.shape[0])
    return (F.silu(y) if activation == "silu" else y).transpose(1, 2), None


def step(given: Inputs) -> Results:
    """One token: the window is state and token, its tail the new state."""
    with torch.no_grad():
        window = torch.cat([given["state"], given["x"].transpose(1, 2).to(given["state"].dtype)], -1)
        y = (window * given["weight"]).sum(-1)
        y = y if given["bias"] is None else y + given["bias"]
        y = F.silu(y) if given["activation"] == "silu" else y
        return {"y": y[:, None].to(given["x"].dtype), "state": window[..., 1:]}


def candidates(op: str, mode: str, device: str, wheel: Path | None) -> list[Candidate | tuple[str, str]]:
    """torch itself. `wheel` is another peer's."""
    if op != "causal_conv1d":
        return []
    from bench.ops.causal_conv1d import differentiated, forward_only

    run = differentiated if mode == "fwdbwd" else forward_only
    call: Call = step if mode == "step" else lambda given: run(forward, given)
    return [Candidate("torch conv1d", torch.__version__, call)]
