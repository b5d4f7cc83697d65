"""Full softmax attention as a layer, on torch's own kernel: what a memory layer replaces."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FullAttention(nn.Module):
    """x -> q, k, v -> torch's scaled_dot_product_attention, causal -> out. Without position code.

    The state is (k, v, tokens) with room for twice the text read, so that a step copies nothing but its own row.
    """

    def __init__(self, embed_dim: int, num_heads: int, **factory: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False, **factory)
        self.out = nn.Linear(embed_dim, embed_dim, bias=False, **factory)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _read_out(self, o: Tensor) -> Tensor:
        return self.out(o.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, *, return_state: bool = False) -> Any:
        """x [B, T, embed_dim]; y, or (y, state)."""
        q, k, v = self._project(x)
        y = self._read_out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        if not return_state:
            return y
        k, v = (torch.cat((t, torch.empty_like(t)), 2) for t in (k, v))
        return y, [k, v, x.shape[1]]

    def step(self, x: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """One token more; the state is changed."""
        q, k, v = self._project(x)
        keys, values, seen = state
        keys[:, :, seen : seen + 1], values[:, :, seen : seen + 1] = k, v
        state[2] = seen + 1
        o = F.scaled_dot_product_attention(q, keys[:, :, : seen + 1], values[:, :, : seen + 1])
        return self._read_out(o), state
