"""Memory recall: a few queries over a short list of wide memory rows.

    s_n = scale · q·k_n        ℓ = log Σ_{n < length} e^{s_n}        o = Σ_{n < length} e^{s_n − ℓ} v_n

One head may be thousands wide, beyond what attention kernels hold in registers: two matrix products with a softmax
between them are the fitting form, and every row is read once per product. An empty memory gives o = 0, ℓ = −inf.

HMT (He et al. 2024, arXiv 2405.06067) recalls p = softmax((q W_q)(M W_k)ᵀ / √d) M. With q' = q W_q W_kᵀ this is
memory_recall(q', M, scale=d**-0.5): one row is projected instead of N, and the rows of M are their own values.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from memattn.ops import _checks as check
from memattn.reference.attention import AttentionOutput, accumulate_dtype

OP = "memory_recall"


def _check(q, memory_keys, memory_values, lengths, scale):
    check.rank(OP, "q", q, "[B, Q, H, K]")
    check.dtype(OP, "q", q, check.FLOATS)
    check.rank(OP, "memory_keys", memory_keys, "[B, N, H, K]")
    batch, _, heads, dim = q.shape
    rows = memory_keys.shape[1]
    check.shape(OP, "memory_keys", memory_keys, "[B, N, H, K]", (batch, rows, heads, dim))
    if memory_values is not None:
        check.rank(OP, "memory_values", memory_values, "[B, N, H, V]")
        shape = (batch, rows, heads, memory_values.shape[3])
        check.shape(OP, "memory_values", memory_values, "[B, N, H, V]", shape)
    for name, x in (("memory_keys", memory_keys), ("memory_values", memory_values)):
        if x is not None:
            check.dtype(OP, name, x, (q.dtype,), " like q")
            check.device(OP, name, x, q, "q")
    if dim == 0:
        raise ValueError(f"{OP}: q has head dimension 0; expected K ≥ 1")
    if scale is not None and not (isinstance(scale, (int, float, torch.SymFloat)) and 0 < scale < float("inf")):
        raise ValueError(f"{OP}: scale is {scale!r}; expected a finite number > 0 or None")
    if lengths is not None:
        check.lengths(OP, lengths, memory_keys, "memory_keys")


def memory_recall(
    q: Tensor,
    memory_keys: Tensor,
    memory_values: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> AttentionOutput:
    """What each query reads from its row's memory; the module docstring has the equations and the source.

    =============  ==================  ==================================================================
    argument       shape               dtype and meaning
    =============  ==================  ==================================================================
    q              [B, Q, H, K]        float32, bfloat16, float16 or float64, the same for all; any K ≥ 1
    memory_keys    [B, N, H, K]        the memory, N ≥ 0
    memory_values  [B, N, H, V]        None: the rows of memory_keys themselves, V = K
    lengths        [B]                 int32/int64 in 0..N: rows beyond hold nothing, in finite numbers
    =============  ==================  ==================================================================

    scale None means K**-0.5. Returns AttentionOutput(o [B, Q, H, V] in q's dtype, lse [B, Q, H] natural log, float32 or
    float64 with float64 q), which `merge_states` can join. Products, softmax and sums are float32 (float64). Plain
    torch on any device, differentiable any number of times through o and lse; rows that hold nothing get zero gradient.

    Raises ValueError, TypeError.
    """
    _check(q, memory_keys, memory_values, lengths, scale)
    dtype, scale = accumulate_dtype(q.dtype), q.shape[3] ** -0.5 if scale is None else scale
    with nullcontext() if q.is_meta else torch.autocast(q.device.type, enabled=False):
        keys = memory_keys.to(dtype).transpose(1, 2)
        values = keys if memory_values is None else memory_values.to(dtype).transpose(1, 2)
        s = (q.to(dtype).transpose(1, 2) * scale) @ keys.mT  # [B, H, Q, N]
        if lengths is not None:
            held = torch.arange(s.shape[3], device=s.device) < lengths[:, None]
            s = s.masked_fill(~held[:, None, None], -torch.inf)
        empty = (s == -torch.inf).all(-1, keepdim=True)
        lse = s.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True).masked_fill(empty, -torch.inf)
        weights = (s - lse.masked_fill(empty, 0.0)).exp()
        o, lse = weights @ values, lse[..., 0]
    return AttentionOutput(o.transpose(1, 2).to(q.dtype), lse.transpose(1, 2))
