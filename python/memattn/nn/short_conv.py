"""Causal depthwise convolution over a few tokens, with its tail as state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memattn.ops.causal_conv1d import causal_conv1d, causal_conv1d_step


class ShortConv(nn.Module):
    """y_t = silu(bias + Σ_w weight[:, w] · x_{t−W+1+w}), channel by channel.

    weight [D, W], weight[:, W−1] multiplies the current token. The state is the tail [N, D, W−1] of the last inputs,
    float32 and oldest first.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if width not in (2, 3, 4):
            raise ValueError(f"ShortConv: width is {width}; allowed: 2, 3, 4")
        self.weight = nn.Parameter(torch.empty(channels, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in ±1/√W, what torch.nn.Conv1d does for a depthwise kernel of width W."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        x: Tensor,
        tail: Tensor | None = None,
        *,
        return_tail: bool = False,
        lengths: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, D] -> (y, tail after the last token or None). lengths [B]: row b ends after lengths[b] tokens."""
        y, after = causal_conv1d(
            x,
            self.weight,
            self.bias,
            activation="silu",
            initial_state=tail,
            output_final_state=return_tail and lengths is None,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )
        if return_tail and lengths is not None:
            after = _tail_at(x, tail, lengths, self.weight.shape[1] - 1)
        return y, after

    def step(
        self,
        x: Tensor,
        tail: Tensor,
        *,
        state_indices: Tensor | None = None,
        backend: str | None = None,
    ) -> Tensor:
        """x [B, t, D] -> y; writes the new tail into `tail` [P, D, W−1]."""
        return causal_conv1d_step(
            x, self.weight, self.bias, tail, activation="silu", state_indices=state_indices, backend=backend
        )

    def extra_repr(self) -> str:
        channels, width = self.weight.shape
        return f"{channels}, width={width}, bias={self.bias is not None}"


def _tail_at(x: Tensor, tail: Tensor | None, lengths: Tensor, size: int) -> Tensor:
    """The `size` inputs before position lengths[b] of row b, reaching back into `tail`: [B, D, size]."""
    batch, _, channels = x.shape
    if tail is None:
        tail = x.new_zeros(batch, channels, size, dtype=torch.promote_types(x.dtype, torch.float32))
    # Positions in the tail followed by x: below `size` they lie in the tail.
    position = lengths[:, None] + torch.arange(size, device=x.device)  # [B, size]
    in_x = (position - size).clamp(min=0)[..., None].expand(-1, -1, channels)
    in_tail = position.clamp(max=size - 1)[:, None].expand(-1, channels, -1)
    from_x = x.gather(1, in_x).transpose(1, 2).to(tail.dtype)
    return torch.where((position < size)[:, None], tail.gather(2, in_tail), from_x)
