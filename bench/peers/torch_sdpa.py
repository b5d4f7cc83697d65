"""torch's scaled_dot_product_attention, in its own layout: the transposes of q, k and v are views."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from bench.compare import Candidate

LONGEST_MASK = 4096  # tokens


def forward(*, q, k, v, window):
    """q, k, v [B,T,H,D] -> o [B,T,H,D]. A window is a mask of T×T values there."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    if q.shape[2] > LONGEST_MASK:
        raise NotImplementedError(f"a window takes a mask of T×T values, here {q.shape[2]}²")
    position = torch.arange(q.shape[2], device=q.device)
    ahead = position[:, None] - position
    return F.scaled_dot_product_attention(q, k, v, (ahead >= 0) & (ahead < window)).transpose(1, 2)


def decode(given):
    """The last query [B,1,HQ,D] over a full cache [B,S,HKV,D]."""
    q, k, v = (given[name].transpose(1, 2) for name in ("q", "k_cache", "v_cache"))
    with torch.no_grad():
        return {"o": F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)}


def candidates(op: str, mode: str, device: str, wheel: Path | None) -> list[Candidate | tuple[str, str]]:
    """torch itself. `wheel` is another peer's."""
    if op == "attention_decode":
        return [Candidate("torch SDPA", torch.__version__, decode)]
    if op != "attention":
        return []
    from bench.ops.attention import runner

    return [Candidate("torch SDPA", torch.__version__, lambda given: runner(mode)(forward, given))]
