"""Mixture of Block Attention (MoBA; Lu et al. 2025, arXiv 2502.13189)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memattn.nn.block_retrieval import BlockRetrieval, Seen, block_ends
from memattn.ops.block_scores import block_scores
from memattn.ops.block_summary import block_summary


class MixtureOfBlockAttention(BlockRetrieval):
    """Every query head attends to its own block, causally, and to the past blocks whose mean key it matches best.

        s_tj = q_t · mean(K_j)    I_t = {own block} ∪ the top_blocks − 1 best full blocks of the past
        o_t = Σ_{i ≤ t in I_t} softmax_i(q_t·k_i / √head_dim) v_i          one softmax over all chosen tokens

    The choice has no gradient: it is trained through the attention alone, as published. With top_blocks at least the
    number of blocks this is causal attention. The paper: blocks of 512, 3 of them, at 8K tokens; 4096, 12, at 1M.
    FlashMoBA (arXiv 2511.11571) shows why smaller blocks (64 to 128) choose better; its key convolution is not here.

    Keys are turned by their position before they are averaged, as in the authors' code. The state is a
    `BlockRetrievalState`: all keys and values, and one mean key per block. Arguments: num_kv_heads, head_dim,
    rope_base, qk_norm, norm_eps, bias as in `AttentionLayer`; backend of the attention over the chosen blocks; calls as
    in `GatedDeltaNet`.

    >>> layer = MixtureOfBlockAttention(256, num_heads=4, block_size=64, top_blocks=4)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        block_size: int = 512,
        top_blocks: int = 3,
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
            block=block_size,
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
        self._check_chosen(top_blocks=top_blocks)
        self.top_blocks = top_blocks

    def _summarise(self, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return block_summary(k, self.block).values

    def _attend(self, q: Tensor, x: Tensor, seen: Seen) -> Tensor:
        r: Any = seen.summaries
        queries, ends = q.to(r.dtype), block_ends(r, self.block)

        def score(at: slice) -> Tensor:
            return block_scores(queries[:, at], r, block_ends=ends, q_positions=seen.positions[:, at], force_last=1)

        lists = self._choose(score, seen.positions, r.shape[1], self.top_blocks)
        return self._listed(q, lists, seen, self.block)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_size={self.block}, top_blocks={self.top_blocks}"
