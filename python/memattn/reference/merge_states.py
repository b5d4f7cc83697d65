"""Joining attention results and branches in plain torch.

`loop` is the definition of the merge, row by row; in float64 it is the truth every backend is measured against.
`chunked` and `combined`, itself the definition of the gates, are the fallback that runs anywhere torch does,
differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memattn.reference.attention import AttentionOutput, accumulate_dtype, joined, one_sink


def loop(outputs: Sequence[Tensor], lses: Sequence[Tensor], *, sink: Tensor | None = None) -> AttentionOutput:
    """ℓ = log(Σ_n e^{ℓ_n} + Σ_r e^{sink_r}), o = Σ_n e^{ℓ_n − ℓ} o_n; 0 and −inf where there is nothing to sum."""
    stored, dtype, (*_, heads, width) = outputs[0].dtype, accumulate_dtype(outputs[0].dtype), outputs[0].shape
    values, scores = [x.to(dtype).reshape(-1, width) for x in outputs], [x.reshape(-1) for x in lses]
    rows, sums = [], []
    for i in range(scores[0].shape[0]):
        seen = [(score[i], x[i]) for score, x in zip(scores, values, strict=True) if score[i] != -torch.inf]
        logits = [score for score, _ in seen]
        if sink is not None:
            logits += list(sink.to(dtype).reshape(heads, -1)[i % heads])
        sums.append(torch.stack(logits).logsumexp(0) if logits else scores[0][i])
        rows.append(sum(((score - sums[-1]).exp() * x for score, x in seen), 0 * values[0][i]))
    o = torch.stack(rows).reshape(outputs[0].shape) if rows else torch.zeros_like(outputs[0])
    return AttentionOutput(o.to(stored), torch.stack(sums).reshape(lses[0].shape) if sums else lses[0].clone())


def chunked(outputs: Sequence[Tensor], lses: Sequence[Tensor], *, sink: Tensor | None = None) -> AttentionOutput:
    """`loop` on whole tensors."""
    first, dtype = outputs[0], accumulate_dtype(outputs[0].dtype)
    parts = list(lses) if sink is None else [*lses, one_sink(sink, dtype).expand(first.shape[:3])]
    o, lse = joined([x.to(dtype) for x in outputs], parts)
    return AttentionOutput(o.to(first.dtype), lse)


def combined(a: Tensor, b: Tensor, gate: Tensor, mode: str) -> Tensor:
    """g a + (1 − g) b ("convex"), a + g b ("add") or g a b ("mul")."""
    dtype = accumulate_dtype(a.dtype)
    x, y, g = a.to(dtype), b.to(dtype), gate.to(dtype)
    g = g if g.dim() == 4 else g[..., None]
    mixed = y + g * (x - y) if mode == "convex" else x + g * y if mode == "add" else g * x * y
    return mixed.to(a.dtype)
