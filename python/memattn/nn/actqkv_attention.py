"""A window and a block memory, with a probe query per chunk and as many blocks as the scores call for (ActQKV)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memattn.nn.infllm_attention import InfLLMAttention
from memattn.ops.topk import topk


class ActQKVAttention(InfLLMAttention):
    """`InfLLMAttention` with two other rules (ActQKV, arXiv 2502.13542), built from the abstract alone.

    probe    a chunk asks with q̂ = Σ_i w_i q_i, w_i = ‖q_i − q̄‖² / Σ_j ‖q_j − q̄‖², q̄ the mean of its queries, all heads
             together: tokens whose activation departs from the chunk's count more. Where none does (one token) q̂ = q̄
    cut-off  with p = softmax over the blocks of the mean over heads of q̂·r_b / √head_dim, the best blocks are read, as
             few as have Σ p ≥ `density`, and at most top_blocks: a layer with flat scores reads more than one that
             knows where to look

    The abstract speaks of an activation bias of each token within a window, of a probe query made with it, and of a
    layer-wise dynamic cut-off by information density at decoding. The two formulas and density = 0.95 are our reading,
    not the paper's, of which no code is public; we cut in prefill too, so that a chunk of one token is a step.
    density = 1 never cuts. Everything else, arguments included, as in `InfLLMAttention`.

    >>> layer = ActQKVAttention(4096, num_heads=32, num_kv_heads=8)
    """

    def __init__(self, embed_dim: int, num_heads: int, *, density: float = 0.95, **settings: Any) -> None:
        super().__init__(embed_dim, num_heads, **settings)
        if not 0 < density <= 1:
            raise ValueError(f"{type(self).__name__}: density is {density}; expected in (0, 1]")
        self.density = density

    def _probe(self, q: Tensor, there: Tensor) -> Tensor:
        mean = super()._probe(q, there)
        sums = torch.promote_types(q.dtype, torch.float32)
        apart = (q.to(sums) - mean.to(sums)).square().sum((2, 3)) * there  # [N, c]
        total = apart.sum(1)[:, None, None, None]
        weighted = (apart[..., None, None] * q).sum(1, keepdim=True)
        return torch.where(total == 0, mean.to(sums), weighted / total).to(q.dtype)

    def _choose(self, scores: Tensor) -> Tensor:
        scores = scores * (self.head_dim**-0.5 / self.num_heads)
        best, chosen, _ = topk(scores, min(self.top_blocks, scores.shape[1]), sorted=True)
        share = (best - scores.logsumexp(-1, keepdim=True)).exp()
        before = share.cumsum(-1) - share
        kept = (before < self.density) | (self.density == 1)
        return torch.where(kept, chosen, -1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, density={self.density}"
