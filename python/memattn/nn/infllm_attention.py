"""A sliding window beside a memory of blocks, of which each call looks up a few (InfLLM, arXiv 2402.04617)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from memattn.nn.attention_layer import AttentionLayer
from memattn.nn.eviction_cache import with_gaps
from memattn.nn.inputs import check_sizes, check_state, check_step
from memattn.nn.kv_cache import KVCache, NewRows
from memattn.nn.padding import valid_runs
from memattn.nn.rotary import rotary
from memattn.ops import _checks as check
from memattn.ops.attention import AttentionOutput, attention
from memattn.ops.attention_mass import attention_mass
from memattn.ops.block_scores import block_scores
from memattn.ops.sparse_attention import sparse_attention
from memattn.ops.topk import MOST, topk
from memattn.state import MemoryState

REMOTE_POSITIONS = ("window", "true", "query")


class BlockMemoryState(MemoryState):
    """cache: un-rotated keys, values of all tokens. mass [N, slots, HKV]: the attention each token got from its window.

    representative [N, blocks, HKV, D] of the first finished [N] int64 blocks, those that have left the window.
    """

    fields: ClassVar[tuple[str, ...]] = ("cache", "mass", "representative", "finished")

    def __init__(self, cache: KVCache, mass: Tensor, representative: Tensor, finished: Tensor) -> None:
        self.cache, self.mass, self.representative, self.finished = cache, mass, representative, finished

    @property
    def length(self) -> Tensor:
        """[N] tokens that each row has seen."""
        return self.cache.length


class InfLLMAttention(AttentionLayer):
    """Token i attends in one softmax to its window and, farther back, to the first tokens and a few chosen blocks.

    near     j with i − j < window, rotary by true positions
    remote   of the j ≤ i − window: the first `num_sinks`, the top_blocks best blocks of block_size tokens, and what has
             left the window but fills no block yet
    r_b      representative of a block and key head: the mean of its `representatives` keys that received the largest
             attention mass from the queries that had them in their window
    s_b      Σ_heads q̄·r_b, q̄ the mean of the queries of a chunk of `query_chunk` tokens: all heads and all queries of
             the chunk choose the same blocks, out of those that have left the window of the chunk's first query

    remote_positions: "window", keys un-rotated and the query at angle window − 1, so that all remote keys are that far
    away (InfLLM's); "true", both turned by their positions, which turns all keys on every call; "query", keys
    un-rotated and the query at its true angle (Extended Mind). q̄ is turned like the remote queries.

    Chunks count from the start of each call, and `step` takes tokens one by one: results depend on how a text is cut
    into calls unless query_chunk is 1 or all blocks are chosen. Before anything has left the window the layer is
    window attention; the memory adds nothing, and no NaN. Gradients flow through attention, not through the choice. The
    method trains nothing: the projections are those of a trained model. Defaults are InfLLM's; num_sinks is a multiple
    of block_size.

    Arguments: num_kv_heads, head_dim, qk_norm, norm_eps, bias as in `AttentionLayer`; calls as in `GatedDeltaNet`.

    >>> layer = InfLLMAttention(4096, num_heads=32, num_kv_heads=8)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        window: int = 4096,
        num_sinks: int = 128,
        block_size: int = 128,
        top_blocks: int = 16,
        representatives: int = 4,
        query_chunk: int = 512,
        rope_base: float = 10000.0,
        remote_positions: str = "window",
        **settings: Any,
    ) -> None:
        super().__init__(embed_dim, num_heads, **settings)
        check_sizes(self, window=window, block_size=block_size, top_blocks=top_blocks, query_chunk=query_chunk)
        name = type(self).__name__
        if num_sinks < 0 or num_sinks % block_size:
            raise ValueError(f"{name}: num_sinks is {num_sinks}; expected a multiple of block_size {block_size}")
        if not 1 <= representatives <= block_size:
            raise ValueError(f"{name}: representatives is {representatives}; allowed: 1..{block_size}, a block")
        if top_blocks > MOST:
            raise ValueError(f"{name}: top_blocks is {top_blocks}; allowed: 1..{MOST}")
        if self.head_dim % 2:
            raise ValueError(f"{name}: head_dim is {self.head_dim}; rotary positions need an even one")
        check.choice(name, "remote_positions", remote_positions, REMOTE_POSITIONS)
        self.window, self.num_sinks, self.block_size, self.top_blocks = window, num_sinks, block_size, top_blocks
        self.representatives, self.query_chunk = representatives, query_chunk
        self.rope_base, self.remote_positions = rope_base, remote_positions

    def init_state(self, batch: int, max_tokens: int | None = None) -> BlockMemoryState:
        """The empty memory of `batch` sequences, on the parameters' device; max_tokens: room from the start."""
        weight, dims = self.qkv_proj.weight, (self.head_dim, self.head_dim)
        cache = KVCache.empty(weight, batch, self.num_kv_heads, dims, max_tokens)
        mass = weight.new_zeros(batch, 0, self.num_kv_heads, dtype=torch.promote_types(weight.dtype, torch.float32))
        blocks = weight.new_zeros(batch, 0, self.num_kv_heads, self.head_dim)
        return self._with_room(BlockMemoryState(cache, mass, blocks, torch.zeros_like(cache.length)))

    def forward(
        self,
        x: Tensor,
        state: BlockMemoryState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, BlockMemoryState]:
        """A text or a part of it, in chunks of query_chunk tokens.

        x [B, T, embed_dim]. state: what each sequence has seen, None for nothing; it is not changed. attention_mask
        [B, T]: one contiguous run of valid (nonzero) tokens per row; the others reach nothing and their output is 0.
        cu_seqlens [N+1]: x holds N sequences end to end, then B = 1 and the state has N rows.
        Returns y [B, T, embed_dim], or (y, new state) with return_state.
        """
        self._padded(x, None, None)
        rows = valid_runs(type(self).__name__, x, attention_mask, cu_seqlens)
        x = x if rows is None else rows.align(x)
        state = self.init_state(x.shape[0], 0) if state is None else state
        check_state(self, state, BlockMemoryState, x.shape[0])
        new = NewRows(x, None if rows is None else rows.length)
        q, k, v = self._heads(x)
        cache = state.cache.extended(k, v, new=new)
        memory = BlockMemoryState(
            cache, state.mass.clone(), state.representative.detach().clone(), state.finished.clone()
        )
        self._with_room(memory)
        outputs = []
        for first in range(0, x.shape[1], self.query_chunk):
            part = q[:, first : first + self.query_chunk]
            count = (new.count - first).clamp(0, part.shape[1])
            start = state.length + new.count.clamp(max=first)
            outputs.append(self._chunk(part, start, count, memory))
        y = self._readout(torch.cat(outputs, 1) if outputs else q, x)
        if rows is not None:
            y = rows.restore(torch.where(rows.valid[..., None], y, 0))
        return (y, memory) if return_state else y

    def step(self, x: Tensor, state: BlockMemoryState) -> tuple[Tensor, BlockMemoryState]:
        """One or a few tokens per sequence, one after the other: changes `state` and returns it. Without gradients."""
        check_step(self, x, state, BlockMemoryState)
        one, outputs = torch.ones_like(state.length), []
        for token in x.split(1, 1):
            q, k, v = self._heads(token)
            start = state.length.clone()
            state.cache.append(k, v)
            outputs.append(self._chunk(q, start, one, self._with_room(state)))
        return self._readout(torch.cat(outputs, 1), x), state

    def _with_room(self, memory: BlockMemoryState) -> BlockMemoryState:
        """The same state with a mass for every slot of its cache and a representative for every block."""
        slots = memory.cache.capacity
        blocks = -(-slots // self.block_size) + self._leaving
        masses, held = slots - memory.mass.shape[1], memory.representative.shape[1]
        if masses > 0:
            memory.mass = torch.nn.functional.pad(memory.mass, (0, 0, 0, masses))
        if blocks > held:
            memory.representative = torch.nn.functional.pad(memory.representative, (0, 0, 0, 0, 0, blocks - held))
        return memory

    @property
    def _leaving(self) -> int:
        """The most blocks that leave the window between two chunks."""
        return self.query_chunk // self.block_size + 1

    def _chunk(self, q: Tensor, start: Tensor, count: Tensor, memory: BlockMemoryState) -> Tensor:
        """o of the first count [N] queries q [N, c, HQ, D] at positions from start [N] on, which memory holds."""
        positions = start[:, None] + torch.arange(q.shape[1], device=q.device)
        self._finish_blocks(start, memory)
        k, v = memory.cache.k.to(q.dtype), memory.cache.v.to(q.dtype)
        asked = {"window": torch.full_like(positions, self.window - 1)}.get(self.remote_positions, positions)
        asking = rotary(q, asked, self.rope_base)
        if self.remote_positions == "true":
            k = rotary(k, torch.arange(k.shape[1], device=q.device), self.rope_base)
        there = torch.arange(q.shape[1], device=q.device) < count[:, None]
        lists = self._lists(asking.detach(), there, start, memory)
        remote = sparse_attention(
            asking, k, v, lists, unit=self.block_size, q_positions=positions - self.window, backend=self.backend
        )
        return self._near(rotary(q, positions, self.rope_base), remote, start, count, memory)

    def _near(
        self, q: Tensor, remote: AttentionOutput, start: Tensor, count: Tensor, memory: BlockMemoryState
    ) -> Tensor:
        """o over the window and `remote` together; adds to the masses of the window's tokens."""
        (batch, tokens), span = q.shape[:2], self.window - 1 + q.shape[1]
        first = (start - self.window + 1).clamp(min=0)
        at = first[:, None] + torch.arange(span, device=q.device)
        held = at < (start + count)[:, None]
        source = at.clamp(max=max(memory.cache.capacity - 1, 0))
        row = torch.arange(batch, device=q.device)
        k, v = (torch.where(held[..., None, None], x[row[:, None], source], 0).to(q.dtype) for x in
                (memory.cache.k, memory.cache.v))  # fmt: skip
        k = rotary(k, at, self.rope_base)
        bounds: dict[str, Any] = {
            "window": self.window,
            "q_offset": "end",
            "cu_seqlens_q": with_gaps(row * tokens, count, batch * tokens),
            "cu_seqlens_k": with_gaps(row * span, start + count - first, batch * span),
        }
        q, k, v, o, lse = (x.reshape(1, -1, *x.shape[2:]) for x in (q, k, v, *remote))
        seen = attention(q, k, v, merge=AttentionOutput(o, lse), backend=self.backend, **bounds)
        with torch.no_grad():
            mass = attention_mass(q.detach(), k.detach(), seen.lse.detach(), reduce_heads="group", **bounds)
            mass = torch.where(held[..., None], mass.view(batch, span, self.num_kv_heads), 0)
            memory.mass.scatter_add_(1, source[..., None].expand_as(mass), mass.to(memory.mass.dtype))
        return seen.o.view(batch, tokens, *seen.o.shape[2:])

    @torch.no_grad()
    def _finish_blocks(self, start: Tensor, memory: BlockMemoryState) -> None:
        """Representatives of the blocks that the query at start [N] has out of its window."""
        gone = (start - self.window + 1).clamp(min=0) // self.block_size
        block = memory.finished[:, None] + torch.arange(self._leaving, device=start.device)  # [N, n]
        row = torch.arange(len(start), device=start.device)
        token = block[..., None] * self.block_size + torch.arange(self.block_size, device=start.device)
        token = token.clamp(max=max(memory.cache.capacity - 1, 0))
        mass = memory.mass[row[:, None, None], token].transpose(2, 3)  # [N, n, HKV, block]
        best = topk(mass.contiguous(), self.representatives).indices.long().clamp(min=0)
        chosen = token[:, :, None].expand_as(mass).gather(3, best)
        head = torch.arange(mass.shape[2], device=start.device)[:, None]
        keys = memory.cache.k[row[:, None, None, None], chosen, head]  # [N, n, HKV, representatives, D]
        held = memory.representative[row[:, None], block]
        done = (block < gone[:, None])[..., None, None]
        memory.representative[row[:, None], block] = torch.where(done, keys.mean(3).to(held.dtype), held)
        memory.finished = torch.maximum(memory.finished, gone)

    @torch.no_grad()
    def _lists(self, q: Tensor, there: Tensor, start: Tensor, memory: BlockMemoryState) -> Tensor:
        """int32 [N, c, 1, n]: the first blocks, the chosen ones, and those that are leaving the window."""
        size, sinks, blocks = self.block_size, self.num_sinks // self.block_size, memory.representative.shape[1]
        probe = self._probe(torch.where(there[..., None, None], q, 0), there)
        scores = block_scores(
            probe, memory.representative.to(q.dtype), over="heads", counts=memory.finished.clamp(max=blocks)
        )
        block = torch.arange(blocks, device=q.device)
        chosen = self._choose(scores.masked_fill(block < sinks, -torch.inf)[:, 0, 0])
        first = torch.arange(sinks, device=q.device).expand(len(start), -1)
        late = memory.finished[:, None] + torch.arange(q.shape[1] // size + 2, device=q.device)
        last = (start + q.shape[1] - 1 - self.window)[:, None]
        late = torch.where((late >= sinks) & (late * size <= last), late, -1)
        first = torch.where(first * size <= last, first, -1)
        limit = -(-memory.cache.capacity // size)
        lists = torch.cat([first.int(), chosen, torch.where(late < limit, late, -1).int()], 1)
        return lists[:, None, None].expand(-1, q.shape[1], -1, -1).contiguous()

    def _probe(self, q: Tensor, there: Tensor) -> Tensor:
        """The query [N, 1, HQ, D] that stands for a chunk's q [N, c, HQ, D], 0 where there [N, c] is none."""
        return q.sum(1, keepdim=True) / there.sum(1).clamp(min=1).to(q.dtype)[:, None, None, None]

    def _choose(self, scores: Tensor) -> Tensor:
        """int32 [N, n]: the blocks to read by their scores [N, blocks], −inf where there is none; −1 for none."""
        return topk(scores, min(self.top_blocks, scores.shape[1])).indices

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, window={self.window}, num_sinks={self.num_sinks}, block_size={self.block_size}, "
            f"top_blocks={self.top_blocks}, query_chunk={self.query_chunk}, remote_positions={self.remote_positions!r}"
        )
