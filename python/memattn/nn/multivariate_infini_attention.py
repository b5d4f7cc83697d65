"""Infini-attention across the series of a multivariate time series (MICA 2026, arXiv 2604.06473)."""

from __future__ import annotations

import torch
from torch import Tensor

from memattn.nn.gated_memory_attention import GatedMemoryAttention
from memattn.ops.attention import attention
from memattn.ops.feature_maps import elu_plus_one
from memattn.ops.segment_memory import segment_memory


class MultivariateInfiniAttention(GatedMemoryAttention):
    """Attention along each series of a set, mixed per head with a linear memory of all series: x [B, N, T, embed_dim].

    With σ = ELU + 1, sums over all N·T tokens of the set, and the softmax inside each series:

        A_mem = σ(Q) M / (σ(Q) z + ε)          M = Σ σ(k)ᵀ v          z = Σ σ(k)
        A = sigmoid(β) A_mem + (1 − sigmoid(β)) A_local

    Infini-attention across the channels of a multivariate time series (MICA, arXiv 2604.06473): every series reads all
    of them, its own too, in time linear in N. causal=True lets a token of a series see only earlier ones of its own;
    what it recalls of the set has no order, so a token recalls later ones as well. The series may stand in any order.
    delta=True writes one series after the other as `InfiniAttention` does; then their order matters.

    The series have one length; one that is missing is left out with series_mask. There is no state.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        causal: bool = False,
        delta: bool = False,
        rope_base: float | None = 10000.0,
        eps: float = 1e-5,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            delta=delta,
            rope_base=rope_base,
            eps=eps,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            qk_norm=qk_norm,
            bias=bias,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.causal = causal

    def forward(self, x: Tensor, *, series_mask: Tensor | None = None) -> Tensor:
        """x [B, N, T, embed_dim] -> y of the same shape.

        series_mask [B, N] bool or integer, nonzero is there: a series that is not is read by none, and its y is 0.
        """
        name = type(self).__name__
        if x.dim() != 4 or x.shape[3] != self.embed_dim:
            raise ValueError(
                f"{name}: x has shape {list(x.shape)}; expected [B, N, T, embed_dim] with {self.embed_dim}"
            )
        if series_mask is not None and series_mask.shape != x.shape[:2]:
            raise ValueError(
                f"{name}: series_mask has shape {list(series_mask.shape)}; expected [B, N] = {list(x.shape[:2])}"
            )
        batch, series, length, _ = x.shape
        here = None if series_mask is None else (series_mask != 0)[..., None, None]
        x = x if here is None else torch.where(here, x, 0.0)
        q, k, v = self._heads(x.flatten(0, 1))  # [B·N, T, H, D]
        turned_q, turned_k = self._turned(q, k, torch.arange(length, device=x.device))
        local = attention(turned_q, turned_k, v, causal=self.causal, backend=self.backend).o
        features = elu_plus_one(k).view(batch, series * length, *k.shape[2:])
        if here is not None:
            features = torch.where(here.expand(-1, -1, length, 1).reshape(batch, -1, 1, 1), features, 0.0)
        recalled, _ = segment_memory(
            elu_plus_one(q).view(batch, series * length, *q.shape[2:]),
            features,
            v.view(batch, series * length, *v.shape[2:]),
            segment_size=max(length, 1),
            delta=self.delta,
            causal=False,
            eps=self.eps,
            backend=self.backend,
        )
        y = self._readout(self._mixed(recalled.view(local.shape), local), x).view(x.shape)
        return y if here is None else torch.where(here, y, 0.0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, causal={self.causal}"
