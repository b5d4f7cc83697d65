"""Forgetting Transformer's attention (FoX; Lin et al. 2025, arXiv 2503.02130)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn.attention_layer import CachedAttention
from memattn.nn.gated_rms_norm import GatedRMSNorm
from memattn.nn.kv_cache import KVCache


class ForgettingAttention(CachedAttention):
    """Softmax attention whose keys fade by a learnt forget gate: s_ij = q_i·k_j / √head_dim + Σ_{j<t≤i} log f_t.

    f = sigmoid(forget_proj x), one per head and token, in float32. With output_gate and output_norm, the paper's "Pro"
    block, the readout is RMSNorm(o) · sigmoid(gate_proj x) per head; qk_norm normalises q and k per head, with weights
    that the heads share, as in the published checkpoints. Pro also shifts keys and values in time, which this layer
    does not. No position code by default, as published.

    Initialisation: the forget bias is 0 as published (repository zhixuan-lin/forgetting-transformer); `forget_bias`
    sets another, a larger one forgets less at the start. Projections start as torch.nn.Linear, the published ones as
    normal with a deviation of 0.02.

    The state is a growing `KVCache` with the cumulated log f (float64): `init_state(batch, max_tokens)` preallocates.
    Arguments: num_kv_heads, head_dim, norm_eps, bias as in `AttentionLayer`; calls as in `GatedDeltaNet`.

    >>> layer = ForgettingAttention(256, num_heads=4)
    """

    state_type = KVCache

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float | None = None,
        qk_norm: bool = True,
        output_gate: bool = True,
        output_norm: bool = True,
        forget_bias: float = 0.0,
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
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.forget_bias = forget_bias
        self.forget_proj = nn.Linear(embed_dim, num_heads, bias=True, **factory)
        width = num_heads * self.head_dim
        self.gate_proj = nn.Linear(embed_dim, width, bias=False, **factory) if output_gate else None
        self.norm = GatedRMSNorm(self.head_dim, norm_eps, **factory) if output_norm else None
        nn.init.constant_(self.forget_proj.bias, forget_bias)

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        super().reset_parameters()
        nn.init.constant_(self.forget_proj.bias, self.forget_bias)

    def _cache(self, batch: int, max_tokens: int | None) -> KVCache:
        dims = (self.head_dim, self.head_dim)
        return KVCache.empty(
            self.qkv_proj.weight, batch, self.num_kv_heads, dims, max_tokens=max_tokens, decays=self.num_heads
        )

    def _mask(self) -> dict[str, Any]:
        return {}

    def _log_decay(self, x: Tensor) -> Tensor:
        logits = self.forget_proj(x)
        return F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def _readout(self, o: Tensor, x: Tensor) -> Tensor:
        if self.norm is not None:
            o = self.norm(o)
        if self.gate_proj is not None:
            gate = self.gate_proj(x).view_as(o)
            dtype = torch.promote_types(o.dtype, torch.float32)
            o = (o.to(dtype) * gate.to(dtype).sigmoid()).to(o.dtype)
        return super()._readout(o, x)

    def extra_repr(self) -> str:
        gates = f"output_gate={self.gate_proj is not None}, output_norm={self.norm is not None}"
        return f"{super().extra_repr()}, qk_norm={self.q_norm is not None}, {gates}, forget_bias={self.forget_bias}"
