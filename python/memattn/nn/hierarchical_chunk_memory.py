"""Memory of chunks that is read in two stages (HCAM: Lampinen, Chan, Banino, Hill 2021, arXiv 2105.14039)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from memattn.nn.inputs import check_sizes, check_state, check_step, check_tokens
from memattn.nn.kv_cache import KVCache, NewRows
from memattn.nn.padding import valid_runs
from memattn.nn.rotary import angles
from memattn.ops.block_scores import block_scores
from memattn.ops.sparse_attention import sparse_attention
from memattn.ops.topk import topk
from memattn.state import MemoryState


class ChunkMemoryState(MemoryState):
    """cache: keys and values of all past tokens. summary [N, chunks, embed_dim]: of each chunk the sum of its inputs
    divided by chunk_size, which is their mean once the chunk is full."""

    fields: ClassVar[tuple[str, ...]] = ("cache", "summary")

    def __init__(self, cache: KVCache, summary: Tensor) -> None:
        self.cache, self.summary = cache, summary

    @property
    def length(self) -> Tensor:
        """[N] tokens that each row has seen."""
        return self.cache.length


class HierarchicalChunkMemory(nn.Module):
    """Each token reads the past chunks that matter to it, each by an attention of its own.

    The past is cut into chunks C_j of chunk_size inputs, with means m_j. Of the chunks that end before token t
    s_tj = (W_q x_t)·(W_k m_j) / √embed_dim, R = the top_k of largest s, w = softmax over R of s
    y_t = Σ_{r∈R} w_r MHA(x_t, C_r + P), P the sinusoidal code of the place counted from the end of the chunk

    The softmax inside a chunk is the chunk's own; no softmax joins the tokens of two chunks. While no chunk has ended,
    y is 0: the memory is not read (the authors' code would then weight empty chunks alike). The token's own open chunk
    is not seen; attention over it belongs beside this layer. A NaN makes y NaN from where its chunk could be chosen on.

    Gradients do not enter past inputs, as in the authors' code; they reach x_t, the projections, and by w the choice.
    chunk_size 32 and top_k 8 are the paper's; num_heads divides embed_dim. The memory keeps projected keys and values
    and grows with the text. Projections start as torch.nn.Linear.

    >>> layer = HierarchicalChunkMemory(256, num_heads=4)
    >>> y, state = layer(x, return_state=True)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        chunk_size: int = 32,
        top_k: int = 8,
        num_kv_heads: int | None = None,
        bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(self, num_heads=num_heads, chunk_size=chunk_size, top_k=top_k)
        name = type(self).__name__
        if embed_dim % (2 * num_heads) or not 16 <= embed_dim // num_heads <= 256:
            raise ValueError(
                f"{name}: embed_dim is {embed_dim}; expected num_heads ({num_heads}) times an even number in 16..256"
            )
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(
                f"{name}: num_kv_heads is {self.num_kv_heads}; expected a divisor of num_heads {num_heads}"
            )
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.chunk_size, self.top_k, self.backend = chunk_size, top_k, backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        keys = self.num_kv_heads * self.head_dim
        self.chunk_query_proj = nn.Linear(embed_dim, embed_dim, bias=False, **factory)
        self.chunk_key_proj = nn.Linear(embed_dim, embed_dim, bias=False, **factory)
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **factory)
        self.kv_proj = nn.Linear(embed_dim, 2 * keys, bias=bias, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False, **factory)

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        for child in cast("Iterator[Any]", self.children()):
            child.reset_parameters()

    def init_state(self, batch: int, max_tokens: int | None = None) -> ChunkMemoryState:
        """The empty memory of `batch` sequences, on the parameters' device; max_tokens: room from the start."""
        weight = self.q_proj.weight
        cache = KVCache.empty(weight, batch, self.num_kv_heads, (self.head_dim, self.head_dim), max_tokens)
        chunks = -(-cache.capacity // self.chunk_size)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return ChunkMemoryState(cache, weight.new_zeros(batch, chunks, self.embed_dim, dtype=dtype))

    def forward(
        self,
        x: Tensor,
        state: ChunkMemoryState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, ChunkMemoryState]:
        """All tokens at once, for training and prefill.

        x [B, T, embed_dim]. state: what each sequence has seen, None for nothing; it is not changed. attention_mask
        [B, T]: one contiguous run of valid (nonzero) tokens per row; the others reach nothing and their output is 0.
        cu_seqlens [N+1]: x holds N sequences end to end, then B = 1 and the state has N rows.
        Returns y [B, T, embed_dim], or (y, new state) with return_state.
        """
        check_tokens(self, x)
        rows = valid_runs(type(self).__name__, x, attention_mask, cu_seqlens)
        x = x if rows is None else rows.align(x)
        state = self.init_state(x.shape[0], 0) if state is None else state
        check_state(self, state, ChunkMemoryState, x.shape[0])
        new = NewRows(x, None if rows is None else rows.length)
        positions = state.length[:, None] + torch.arange(x.shape[1], device=x.device)
        cache = state.cache.extended(*self._contents(x, positions), new=new)
        summary = self._summaries(x.detach(), state, new, cache.capacity)
        y = self._read(x, positions, cache, summary)
        if rows is not None:
            y = rows.restore(torch.where(rows.valid[..., None], y, 0))
        return (y, ChunkMemoryState(cache, summary)) if return_state else y

    def step(self, x: Tensor, state: ChunkMemoryState) -> tuple[Tensor, ChunkMemoryState]:
        """One or a few tokens per sequence, for generation: changes `state` and returns it. Without gradients."""
        check_step(self, x, state, ChunkMemoryState)
        positions = state.length[:, None] + torch.arange(x.shape[1], device=x.device)
        state.cache.append(*self._contents(x, positions))
        missing = -(-state.cache.capacity // self.chunk_size) - state.summary.shape[1]
        if missing > 0:
            state.summary = nn.functional.pad(state.summary, (0, 0, 0, missing))
        share = x.to(state.summary.dtype) / self.chunk_size
        row = torch.arange(x.shape[0], device=x.device)
        for t in range(x.shape[1]):  # one write per row each: no two add to the same place at once
            state.summary[row, positions[:, t] // self.chunk_size] += share[:, t]
        return self._read(x, positions, state.cache, state.summary), state

    def _contents(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, T, HKV, D] of x with the code of its places."""
        from_end = self.chunk_size - 1 - positions.remainder(self.chunk_size)
        angle = angles(from_end, self.embed_dim // 2, 10000.0)
        coded = x.detach() + torch.cat([angle.sin(), angle.cos()], -1).to(x.dtype)
        k, v = self.kv_proj(coded).chunk(2, -1)
        heads = (*x.shape[:2], self.num_kv_heads, self.head_dim)
        return k.reshape(heads), v.reshape(heads)

    def _summaries(self, x: Tensor, state: ChunkMemoryState, new: NewRows, capacity: int) -> Tensor:
        """The summaries after the new tokens [N, chunks, embed_dim], each a sum in the order of its tokens."""
        size, chunks = self.chunk_size, -(-capacity // self.chunk_size)
        place = torch.arange(chunks * size, device=x.device) - state.length[:, None]  # of a chunk's token in x
        there = (place >= 0) & (place < new.count[:, None])
        index = place.clamp(0, max(x.shape[1] - 1, 0))[..., None].expand(-1, -1, x.shape[2])
        source = x if x.shape[1] else x.new_zeros(x.shape[0], 1, x.shape[2])
        tokens = torch.where(there[..., None], source.gather(1, index), 0).to(state.summary.dtype)
        before = state.summary[:, :chunks]
        before = nn.functional.pad(before, (0, 0, 0, chunks - before.shape[1]))
        return before + tokens.unflatten(1, (chunks, size)).sum(2) / size

    def _read(self, x: Tensor, positions: Tensor, cache: KVCache, summary: Tensor) -> Tensor:
        """y of tokens x [B, S, embed_dim] at `positions`, from the chunks that end before each."""
        chunks, scale = summary.shape[1], self.embed_dim**-0.5
        if chunks == 0 or x.shape[1] == 0:
            return torch.zeros_like(self.out_proj(x))
        ends = (torch.arange(chunks, device=x.device) + 1) * self.chunk_size
        asked = self.chunk_query_proj(x)[:, :, None]
        offered = self.chunk_key_proj(summary.to(x.dtype))[:, :, None].to(asked.dtype)
        scores = block_scores(asked, offered, scale=scale, block_ends=ends, q_positions=positions - 1)
        best, chosen, _ = topk(scores, min(self.top_k, chunks))  # [B, S, 1, n]
        weight = torch.where(chosen >= 0, best, torch.finfo(best.dtype).min).softmax(-1)
        weight = torch.where(chosen >= 0, weight, 0).masked_fill(scores.isnan().any(-1, keepdim=True), torch.nan)
        q = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        n = chosen.shape[-1]
        each = chosen.reshape(x.shape[0], x.shape[1] * n, 1, 1)  # one list of one chunk per query and choice
        o = sparse_attention(
            q.repeat_interleave(n, 1),
            cache.k.to(q.dtype),
            cache.v.to(q.dtype),
            each.contiguous(),
            unit=self.chunk_size,
            backend=self.backend,
        ).o.view(*x.shape[:2], n, self.num_heads, self.head_dim)
        joined = (weight.to(o.dtype).view(*x.shape[:2], n, 1, 1) * o).sum(2)
        return self.out_proj(joined.flatten(-2))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, chunk_size={self.chunk_size}, top_k={self.top_k}"
