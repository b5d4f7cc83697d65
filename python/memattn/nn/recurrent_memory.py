"""Recurrent Memory Transformer (Bulatov, Kuratov, Burtsev 2022, arXiv 2207.06881) around any backbone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from memattn.nn.memory_tokens import MemoryTokens


class RecurrentMemory(MemoryTokens):
    """Memory tokens before and after each segment; what the backbone makes of the last ones is the next memory.

    [·, y_s, M_{s+1}] = backbone([M_s, x_s, M_s]),  M_0 = memory [num_memory_tokens, embed_dim], learned

    backbone: y = backbone(x) with [B, n, embed_dim] in and out, see `MemoryTokens`; a layer of memattn.nn, a
    HybridStack, or any causal module. The memory rows in front are seen by the whole segment, those behind see all of
    it. segment_size tokens make a segment; an open segment writes nothing until it is full.

    bptt_depth: gradients join the last so many segments of a call and end before them; None: all of them, and the state
    given. The authors' code (booydar/recurrent-memory-transformer, `manage_gradients`) detaches the memory that leaves
    segment s ≥ 1 of n where s + k2 ≤ n: bptt_depth is k2 − 1, and no memory is exempt.

    M_0 starts normal with deviation 0.02; there it is that of the backbone's embeddings.
    """

    def __init__(
        self,
        backbone: nn.Module,
        embed_dim: int,
        num_memory_tokens: int,
        *,
        segment_size: int,
        bptt_depth: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(backbone, embed_dim, segment_size, bptt_depth)
        if num_memory_tokens < 1:
            raise ValueError(f"{type(self).__name__}: num_memory_tokens is {num_memory_tokens}; allowed: ≥ 1")
        self.memory = nn.Parameter(torch.empty(num_memory_tokens, embed_dim, device=device, dtype=dtype))
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.normal_(self.memory, std=0.02)

    def _empty_memory(self, batch: int) -> Tensor:
        return self.memory.new_zeros(batch, *self.memory.shape)

    def _queries(self, memory: Tensor, closed: Tensor) -> Tensor:
        return torch.where((closed > 0)[:, None, None], memory, self.memory)

    def _prefix(self, memory: Tensor, closed: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
        rows = self._queries(memory, closed)
        return rows, torch.ones(rows.shape[:2], dtype=torch.bool, device=rows.device)

    def _updated(self, memory: Tensor, written: Tensor) -> Tensor:
        return written.to(memory.dtype)

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, num_memory_tokens={self.memory.shape[0]}, segment_size={self.segment_size}"
        return text if self.bptt_depth is None else f"{text}, bptt_depth={self.bptt_depth}"
