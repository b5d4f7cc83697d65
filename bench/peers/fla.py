"""flash-linear-attention, the GPU package most models use. It has no CPU kernels."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

import torch

from bench.compare import Candidate
from bench.registry import Call, Inputs, Results


def available(device: str) -> str | None:
    """Why fla cannot be timed here, or None. A find_spec only: importing it costs seconds."""
    if importlib.util.find_spec("fla") is None:
        return "fla is not installed"
    if device != "cuda":
        return "fla has no CPU kernels"
    return None


def gated_delta_rule(mode: str) -> Call:
    """fla's chunk op, or its recurrent op for a step."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule

    from bench.ops.gated_delta_rule import differentiated, forward_only

    def forward(*, q, k, v, g, beta, initial_state, cu_seqlens, qk_l2norm, scale):
        return chunk_gated_delta_rule(
            q, k, v, g=g, beta=beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
            use_qk_l2norm_in_kernel=qk_l2norm,
        )  # fmt: skip

    def step(given: Inputs) -> Results:
        with torch.no_grad():
            o, state = fused_recurrent_gated_delta_rule(
                *(given[n] for n in ("q", "k", "v")), g=given["g"], beta=given["beta"], scale=given["scale"],
                initial_state=given["state"], output_final_state=True, use_qk_l2norm_in_kernel=given["qk_l2norm"],
            )  # fmt: skip
        return {"o": o, "state": state}

    if mode == "step":
        return step
    run = differentiated if mode == "fwdbwd" else forward_only
    return lambda given: run(forward, given)


def candidates(op: str, mode: str, device: str, wheel: Path | None) -> list[Candidate | tuple[str, str]]:
    """fla's op, or the reason why not. `wheel` is another peer's."""
    if op != "gated_delta_rule":
        return []
    if (reason := available(device)) is not None:
        return [("fla", reason)]
    version = importlib.metadata.version("flash-linear-attention")
    return [Candidate(f"fla {version}", version, gated_delta_rule(mode))]
