"""The pre-norm residual block around a memory layer: how `HybridStack` and the demo stack them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PIECE = 4096  # tokens at a time through the position-wise half when a long prompt is read


class SwiGLU(nn.Module):
    """outward(silu(gate) · value), gate and value = inward(x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"bias": False, "device": device, "dtype": dtype}
        self.inward = nn.Linear(embed_dim, 2 * hidden_dim, **factory)
        self.outward = nn.Linear(hidden_dim, embed_dim, **factory)

    def reset_parameters(self) -> None:
        """Both as torch.nn.Linear."""
        self.inward.reset_parameters()
        self.outward.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """x [..., embed_dim] -> [..., embed_dim]."""
        gate, value = self.inward(x).chunk(2, dim=-1)
        return self.outward(F.silu(gate) * value)


class ResidualBlock(nn.Module):
    """x ← x + mixer(norm(x)), then x ← x + mlp(norm(x)), RMSNorm and SwiGLU.

    mixer: a layer of memattn.nn, or any module that is called like one.
    """

    def __init__(
        self,
        mixer: nn.Module,
        embed_dim: int,
        hidden_dim: int,
        *,
        norm_eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.mixer_norm = nn.RMSNorm(embed_dim, norm_eps, **factory)
        self.mixer: Any = mixer
        self.mlp_norm = nn.RMSNorm(embed_dim, norm_eps, **factory)
        self.mlp = SwiGLU(embed_dim, hidden_dim, **factory)

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the block from the meta device."""
        for part in (self.mixer_norm, self.mixer, self.mlp_norm, self.mlp):
            part.reset_parameters()

    def forward(self, x: Tensor, state: Any = None, **how: Any) -> tuple[Tensor, Any]:
        """x [B, T, embed_dim] -> (x, state after the last token). `how` goes to the mixer, e.g. attention_mask."""
        y, state = self.mixer(self.mixer_norm(x), state, return_state=True, **how)
        x = x + y
        if torch.is_grad_enabled() or x.shape[1] <= _PIECE:
            return x + self.mlp(self.mlp_norm(x)), state
        for piece in x.split(_PIECE, dim=1):
            piece += self.mlp(self.mlp_norm(piece))
        return x, state

    def step(self, x: Tensor, state: Any, **how: Any) -> tuple[Tensor, Any]:
        """A few tokens [B, t, embed_dim]; the state as the mixer's step treats it."""
        y, state = self.mixer.step(self.mixer_norm(x), state, **how)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state
