"""What the Infini-attention layers share: softmax attention of a segment mixed with a memory of others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memattn.nn.attention_layer import AttentionLayer
from memattn.nn.rotary import rotary
from memattn.ops.merge_states import gated_combine


class GatedMemoryAttention(AttentionLayer):
    """Base: softmax attention inside a segment and recall of other segments, mixed per query head by sigmoid(beta)."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        delta: bool,
        rope_base: float | None,
        eps: float,
        **settings: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, **settings)
        if rope_base is not None and self.head_dim % 2:
            raise ValueError(f"{type(self).__name__}: head_dim is {self.head_dim}; rotary positions need an even one")
        self.delta, self.rope_base, self.eps = delta, rope_base, eps
        weight = self.out_proj.weight
        self.beta = nn.Parameter(torch.zeros(num_heads, device=weight.device, dtype=weight.dtype))

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        super().reset_parameters()
        nn.init.zeros_(self.beta)

    def _turned(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.rope_base is None:
            return q, k
        return rotary(q, positions, self.rope_base), rotary(k, positions, self.rope_base)

    def _mixed(self, recalled: Tensor, local: Tensor) -> Tensor:
        """sigmoid(β) of the memory, the rest of the segment's own attention."""
        return gated_combine(recalled, local, self.beta.sigmoid())

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, rope_base={self.rope_base}"
        return text if self.delta else f"{text}, delta=False"
