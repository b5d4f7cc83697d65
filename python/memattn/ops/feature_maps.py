"""Feature maps of linear attention: positive features φ(x), so that φ(q)·φ(k) stands in for exp(q·k).

Plain torch: elementwise work and at most one small product, which compilers fuse well. Computed in float32 (float64
for float64 x) and rounded once to x's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.ops import _checks as check
from memattn.reference.gated_scan import accumulate_dtype

ACTIVATIONS = ("exp", "softmax")


def elu_plus_one(x: Tensor) -> Tensor:
    """φ(x) = elu(x) + 1 = x + 1 for x > 0, e^x else. Positive (0 only where e^x underflows), slope 1 at 0.

    x of any shape, float32, bfloat16, float16 or float64; the result has its shape and dtype. Katharopoulos et al. 2020
    (arXiv 2006.16236, eq. 7); the σ of Infini-attention (arXiv 2404.07143).
    """
    check.tensor("elu_plus_one", "x", x)
    check.dtype("elu_plus_one", "x", x, check.FLOATS)
    wide = x.to(accumulate_dtype(x.dtype))
    return torch.where(wide > 0, wide + 1, wide.clamp(max=0).exp()).to(x.dtype)  # e^x, not expm1 + 1: no cancellation


def hedgehog(x: Tensor, weight: Tensor, *, activation: str = "softmax") -> Tensor:
    """φ(x) = [f(xW) ⊕ f(−xW)], learned features that imitate softmax attention. Twice f features.

    x [B, T, H, K] in float32, bfloat16, float16 or float64; weight [H, K, F], or [K, F] for all heads, in x's dtype or
    float32 (float64). activation "softmax": f normalises over the F features of each half, bounded; "exp": f = exp as
    printed, which overflows for large xW (above 88 in float32, 11 in float16). Returns [B, T, H, 2F] in x's dtype.

    Hedgehog (Zhang et al. 2024, arXiv 2402.04347); Lizard uses it with F = 128 (arXiv 2507.09025). Raises ValueError
    (shapes, activation) and TypeError (dtypes).
    """
    op = "hedgehog"
    check.rank(op, "x", x, "[B, T, H, K]")
    check.dtype(op, "x", x, check.FLOATS)
    check.tensor(op, "weight", weight)
    heads, dim = x.shape[2:]
    if weight.dim() not in (2, 3) or weight.shape[:-1] not in ((dim,), (heads, dim)):
        raise ValueError(
            f"{op}: weight has shape {list(weight.shape)}; expected [H, K, F] = [{heads}, {dim}, F] or [{dim}, F]"
        )
    wide = accumulate_dtype(x.dtype)
    check.dtype(op, "weight", weight, (x.dtype, wide), f" with {check.dtype_name(x.dtype)} x")
    check.device(op, "weight", weight, x, "x")
    check.choice(op, "activation", activation, ACTIVATIONS)
    if x.device.type == "meta":  # which autocast does not know
        scores = x.new_empty(*x.shape[:3], weight.shape[-1], dtype=wide)
    else:
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.einsum("bthk,hkf->bthf", x.to(wide), weight.to(wide).expand(heads, -1, -1))
    halves = (scores, -scores)
    features = [F.softmax(s, -1) if activation == "softmax" else s.exp() for s in halves]
    return torch.cat(features, -1).to(x.dtype)


def dpfp(x: Tensor, nu: int = 3) -> Tensor:
    """φ(x) = u ⊙ roll(u, 1) ⊕ … ⊕ u ⊙ roll(u, ν) with u = [relu(x) ⊕ relu(−x)], 2νK features ≥ 0, no parameters.

    x [..., K] in float32, bfloat16, float16 or float64; roll(u, j) moves feature i to i + j. Returns [..., 2νK] in x's
    dtype. Deterministic parameter-free projection (Schlag et al. 2021, arXiv 2102.11174, section 5.3); ARMT uses ν = 3
    (arXiv 2407.04841). Raises ValueError for nu outside 1..2K − 1, where a roll would repeat.
    """
    op = "dpfp"
    check.tensor(op, "x", x)
    check.dtype(op, "x", x, check.FLOATS)
    if isinstance(nu, bool) or not isinstance(nu, int) or not 1 <= nu < 2 * x.shape[-1]:
        raise ValueError(f"{op}: nu is {nu!r}; allowed: 1..{2 * x.shape[-1] - 1}")
    wide = x.to(accumulate_dtype(x.dtype))
    u = torch.cat((wide.relu(), (-wide).relu()), -1)
    return torch.cat([u * u.roll(j, -1) for j in range(1, nu + 1)], -1).to(x.dtype)
