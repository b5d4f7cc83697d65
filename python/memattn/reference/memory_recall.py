"""Memory recall as its definition, one query at a time; in float64 it is the truth the op is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from memattn.reference.attention import AttentionOutput, accumulate_dtype


def loop(q: Tensor, memory_keys: Tensor, memory_values=None, *, lengths=None, scale=None) -> AttentionOutput:
    """o = Σ_n e^{s_n − ℓ} v_n, s_n = scale q·k_n, ℓ = log Σ_n e^{s_n} over the rows that are valid; 0, −inf if none."""
    (batch, queries, heads, dim), dtype = q.shape, accumulate_dtype(q.dtype)
    values = memory_keys if memory_values is None else memory_values
    scale = dim**-0.5 if scale is None else scale
    o = torch.zeros(batch, queries, heads, values.shape[3], dtype=dtype)
    lse = torch.full((batch, queries, heads), -torch.inf, dtype=dtype)
    for b in range(batch):
        count = memory_keys.shape[1] if lengths is None else int(lengths[b])
        for i in range(queries):
            for h in range(heads):
                if count:
                    keys = memory_keys[b, :count, h].to(dtype)
                    s = torch.stack([scale * (q[b, i, h].to(dtype) * key).sum() for key in keys])
                    lse[b, i, h] = s.logsumexp(0)
                    o[b, i, h] = ((s - s.logsumexp(0)).exp()[:, None] * values[b, :count, h].to(dtype)).sum(0)
    return AttentionOutput(o.to(q.dtype), lse)
