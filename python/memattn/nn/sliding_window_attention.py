"""Softmax attention over a sliding window, with the first tokens of the text and sink logits beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from memattn.nn.attention_layer import CachedAttention
from memattn.nn.kv_cache import TokenCache, WindowCache

NO_GRID = 2**31 - 1  # a dilation that no key reaches: the rule is then a window and the first tokens, both causal


class SlidingWindowAttention(CachedAttention):
    """Each token attends to the last `window` tokens, its own included, and to the first `num_sinks` of the text.

    o_i = Σ_j e^{s_ij − ℓ_i} v_j over j ≤ i with i − j < window or j < num_sinks, s_ij = q_i·k_j / √head_dim. The first
    tokens are attention sinks (StreamingLLM, Xiao et al. 2023, arXiv 2309.17453), seen causally. sink_logits: one
    learnt logit per head in the denominator, without value (GPT-OSS, and Lizard's meta memory); it starts at 0.

    The state is a ring of window + num_sinks keys and values, whatever the length of the text. Positions (rope_base)
    are those of the text, not of the cache, also for the sinks.

    Arguments: num_kv_heads, head_dim, qk_norm, norm_eps, bias as in `AttentionLayer`; calls as in `GatedDeltaNet`.

    >>> layer = SlidingWindowAttention(256, num_heads=4, window=128, num_sinks=4)
    """

    state_type = WindowCache

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        window: int,
        num_sinks: int = 0,
        sink_logits: bool = False,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float | None = 10000.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_base=rope_base,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            bias=bias,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        for name, size, least in (("window", window, 1), ("num_sinks", num_sinks, 0)):
            if size < least:
                raise ValueError(f"SlidingWindowAttention: {name} is {size}; expected at least {least}")
        self.window, self.num_sinks = window, num_sinks
        self.sink = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype)) if sink_logits else None

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        super().reset_parameters()
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def _cache(self, batch: int, max_tokens: int | None) -> WindowCache:
        dims = (self.head_dim, self.head_dim)
        return WindowCache.empty(
            self.qkv_proj.weight, batch, self.num_kv_heads, dims, self.window, ring_start=self.num_sinks
        )

    def _mask(self) -> dict[str, Any]:
        sink = self._sink()
        if self.num_sinks == 0:
            return {"window": self.window, "sink": sink}
        return {"chunk_rule": ("dilated", NO_GRID, self.window, self.num_sinks), "sink": sink}

    def _sink(self) -> Tensor | None:
        if self.sink is None:
            return None
        return self.sink.to(torch.promote_types(self.sink.dtype, torch.float32))

    def _steps_together(self, tokens: int, state: TokenCache) -> bool:
        return tokens == 1  # the ring has no slot to spare: a later token would overwrite what an earlier one sees

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, window={self.window}"
        text += f", num_sinks={self.num_sinks}" if self.num_sinks else ""
        return text if self.sink is None else f"{text}, sink_logits=True"
