"""Quest: attention to the pages whose keys could match a query best (Tang et al. 2024, arXiv 2406.10774)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from memattn.nn.block_retrieval import BlockRetrieval, Seen, block_ends
from memattn.ops.block_scores import block_scores
from memattn.ops.block_summary import block_summary


class QuestAttention(BlockRetrieval):
    """Every query head attends to the `top_pages` pages of keys with the largest bound on q·k.

        s_tj = Σ_c max(q_tc m_jc, q_tc M_jc) ≥ max_{i in page j} q_t·k_i        m, M: least and largest, each channel
        I_t = {own page} ∪ the top_pages − 1 best full pages        o_t: softmax attention to the tokens ≤ t of I_t

    Training-free: it reads the weights of a dense layer. With top_pages at least the number of pages this is causal
    attention. The choice has no gradient. per_group: the heads of a group share the list of their largest bounds,
    which reads less memory; published is a list per head.

    dense_forward: `forward` attends to everything and only `step` chooses, as published; else both choose, and a text
    read at once gives what it gives token by token. The authors leave the first two layers dense.

    Defaults are the authors' (pages of 16, a budget of 2048 tokens). The state is a
    `BlockRetrievalState`: all keys and values, and [m ; M] of every page. Arguments: num_kv_heads, head_dim, rope_base,
    qk_norm, norm_eps, bias as in `AttentionLayer`; backend of the attention over the chosen pages; calls as in
    `GatedDeltaNet`.

    >>> layer = QuestAttention(256, num_heads=4, page_size=16, top_pages=32)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        page_size: int = 16,
        top_pages: int = 128,
        per_group: bool = False,
        dense_forward: bool = False,
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
            block=page_size,
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
        self._check_chosen(top_pages=top_pages)
        self.top_pages, self.per_group, self.dense_forward = top_pages, per_group, dense_forward

    def _summarise(self, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            return block_summary(k, self.block, mode="minmax").values

    def _attend(self, q: Tensor, x: Tensor, seen: Seen) -> Tensor:
        if self.dense_forward and not seen.stepping:
            return seen.nearby()
        r: Any = seen.summaries
        queries, ends = q.to(r.dtype), block_ends(r, self.block)

        def score(at: slice) -> Tensor:
            return block_scores(
                queries[:, at], r, kind="bound", over="group" if self.per_group else "none", reduce="max",
                block_ends=ends, q_positions=seen.positions[:, at], force_last=1,
            )  # fmt: skip

        lists = self._choose(score, seen.positions, r.shape[1], self.top_pages)
        return self._listed(q, lists, seen, self.block)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, page_size={self.block}, top_pages={self.top_pages}, per_group={self.per_group}, "
            f"dense_forward={self.dense_forward}"
        )
