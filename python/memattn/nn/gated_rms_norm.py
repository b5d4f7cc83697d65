"""RMSNorm over one head, then a SiLU gate: how the delta-rule layers read their memory out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GatedRMSNorm(nn.Module):
    """y = weight · x / sqrt(mean(x²) + eps) · silu(gate) over the last dimension; without gate, plain RMSNorm.

    x, gate [..., dim]; the arithmetic is float32 (float64 for float64 x), the result has x's dtype.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """x and gate [..., dim] -> [..., dim]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps)
        if gate is not None:
            y = y * F.silu(gate.to(dtype))
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
