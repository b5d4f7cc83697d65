"""Infini-attention (Munkhdalai et al. 2024, arXiv 2404.07143): attention in segments beside a memory of all of them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from memattn.nn.gated_memory_attention import GatedMemoryAttention
from memattn.nn.kv_cache import JoinedRows, NewRows, WindowCache
from memattn.nn.rotary import rotary
from memattn.ops.attention import attention
from memattn.ops.attention_decode import attention_decode
from memattn.ops.feature_maps import elu_plus_one
from memattn.ops.segment_memory import segment_memory, segment_memory_step
from memattn.state import MemoryState


class SegmentCache(WindowCache):
    """Keys and values of the open segment, slot p mod capacity for the token at position p; older slots are unused."""

    def held(self) -> Tensor:
        """[N] tokens of the open segment."""
        return self.length.remainder(self.capacity)

    def _position_of(self, local: Tensor, row: Tensor) -> Tensor:
        return local + (self.length - self.held())[row]


class InfiniAttentionState(MemoryState):
    """memory [N, HKV, D, D+1] as the closed segments left it, its last column the normaliser; written, the same with
    the open segment's tokens; segment, their keys (turned, if the layer turns keys) and values."""

    fields: ClassVar[tuple[str, ...]] = ("memory", "written", "segment")

    def __init__(self, memory: Tensor, written: Tensor, segment: SegmentCache) -> None:
        self.memory, self.written, self.segment = memory, written, segment


class InfiniAttention(GatedMemoryAttention):
    """Causal softmax attention inside segments, mixed per head with a linear memory of all segments before.

    Per segment s of segment_size tokens, with σ = ELU + 1 and β one number per query head:

        A_mem = σ(Q) M_s / (σ(Q) z_s + ε)          A_local = softmax attention of the segment's own tokens, causal
        A = sigmoid(β) A_mem + (1 − sigmoid(β)) A_local
        M_{s+1} = M_s + σ(K)ᵀ (V − σ(K) M_s / (σ(K) z_s + ε))          z_{s+1} = z_s + Σ σ(k)

    delta=False writes V itself (the paper's "linear"). The memory reads queries and keys before rotary positions;
    rope_base turns those of the local part, None leaves them. One memory per key-value head, read by its whole group.
    β starts at 0, both parts alike; a large β means the memory alone. The first segment's memory is empty and reads 0.
    All segments run in one call of `ops.segment_memory`.

    The state carries the open segment, so a text may be cut anywhere; a step reads the memory of the closed segments
    and adds its token to what the next one will read.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        segment_size: int,
        delta: bool = True,
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
        if segment_size < 1:
            raise ValueError(f"{type(self).__name__}: segment_size is {segment_size}; allowed: ≥ 1")
        self.segment_size = segment_size

    def init_state(self, batch: int) -> InfiniAttentionState:
        """Nothing read yet; the memory is float32 (float64 for a float64 layer), the segment in the layer's dtype."""
        weight = self.qkv_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        memory = weight.new_zeros(batch, self.num_kv_heads, self.head_dim, self.head_dim + 1, dtype=dtype)
        keys: Any = SegmentCache.empty(
            weight, batch, self.num_kv_heads, (self.head_dim, self.head_dim), self.segment_size
        )
        return InfiniAttentionState(memory, memory.clone(), keys)

    def forward(
        self,
        x: Tensor,
        state: InfiniAttentionState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """All tokens at once, for training and prefill.

        x [B, T, embed_dim]. state: what each sequence has seen, None for nothing; it is not changed.
        attention_mask [B, T] bool or integer: one contiguous run of valid (nonzero) tokens per row. The others are seen
        by nobody, their output is 0, and the returned state is the one after the last valid token.
        cu_seqlens [N+1] int32/int64: x holds N sequences end to end, then B = 1 and the state has N rows.
        Returns y [B, T, embed_dim], or (y, new state) with return_state.
        """
        padded = self._padded(x, attention_mask, cu_seqlens)
        if padded is not None:
            x = padded.align(x)
        new = NewRows(x, None if padded is None else padded.length, cu_seqlens)
        if state is not None and state.batch != len(new.count):
            raise ValueError(f"{type(self).__name__}: state has a batch of {state.batch}; expected {len(new.count)}")
        q, k, v = self._heads(x)
        before = self.init_state(len(new.count)) if state is None else state
        turned_q, turned_k = self._turned(q, k, new.positions(before.segment.length))
        if state is None:
            o, memory = self._segments(q, k, v, turned_q, turned_k, cu_seqlens, new.bounds, new.count, None)
        else:
            o, memory = self._joined(q, k, v, turned_q, turned_k, before, new)
        y = self._readout(o, x)
        if padded is not None:
            y = padded.restore(y)
        return (y, self._after(memory, before, turned_k, v, new)) if return_state else y

    def _segments(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        turned_q: Tensor,
        turned_k: Tensor,
        cu_seqlens: Tensor | None,
        bounds: Tensor,
        count: Tensor,
        initial: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Sequences that begin with a segment; o, and the memory after the last one that is complete.

        bounds [N+1] of the sequences among all rows, count [N] tokens that are valid.
        """
        local = attention(
            turned_q, turned_k, v, block_size=self.segment_size, cu_seqlens_q=cu_seqlens, backend=self.backend
        ).o
        closed = _first(bounds, count - count.remainder(self.segment_size), k.shape[0] * k.shape[1]).view(k.shape[:2])
        recalled, memory = segment_memory(
            elu_plus_one(q),
            torch.where(closed[..., None, None], elu_plus_one(k), 0.0),
            v,
            **self._rule(),
            initial_state=initial,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        assert memory is not None
        return self._mixed(recalled, local), memory

    def _joined(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        turned_q: Tensor,
        turned_k: Tensor,
        state: InfiniAttentionState,
        new: NewRows,
    ) -> tuple[Tensor, Tensor]:
        """The same behind the open segments: those and the new rows as packed sequences, the left-over as one more."""
        cache = state.segment
        joined = JoinedRows(cache, new)
        none = q.new_zeros(cache.batch, cache.capacity, *q.shape[2:])
        plain = self._turned_back(cache)
        held = cache.held()
        o, memory = self._segments(
            joined.gather(none, q),
            joined.gather(plain, k),
            joined.gather(cache.v, v),
            joined.gather(none, turned_q),
            joined.gather(cache.k, turned_k),
            joined.cu_keys,
            joined.cu_keys,
            torch.cat([held + new.count, held.new_zeros(1)]),
            torch.cat([state.memory, torch.zeros_like(state.memory[:1])]),
        )
        return _behind(o[0], held, new).view(*q.shape[:2], *o.shape[2:]), memory[:-1]

    def _turned_back(self, cache: SegmentCache) -> Tensor:
        """The cached keys before their rotary positions."""
        if self.rope_base is None:
            return cache.k
        position = cache._positions(cache.length, cache.capacity)
        return rotary(cache.k, -position, self.rope_base)

    def _after(
        self, memory: Tensor, before: InfiniAttentionState, turned_k: Tensor, v: Tensor, new: NewRows
    ) -> InfiniAttentionState:
        segment: SegmentCache = before.segment.extended(turned_k, v, new=new)
        slot = torch.arange(self.segment_size, device=v.device)
        held = slot < segment.held()[:, None]
        keys = torch.where(held[..., None, None], elu_plus_one(self._turned_back(segment)), 0.0)
        _, written = segment_memory(
            keys.new_zeros(len(keys), 0, *keys.shape[2:]),
            keys,
            segment.v,
            **self._rule(),
            initial_state=memory,
            output_final_state=True,
            backend=self.backend,
        )
        assert written is not None
        return InfiniAttentionState(memory, written, segment)

    def step(self, x: Tensor, state: InfiniAttentionState) -> tuple[Tensor, InfiniAttentionState]:
        """One or a few tokens per sequence, for generation: changes `state` and returns it. Without gradients.

        x [B, t, embed_dim], t ≥ 1.
        """
        self._check(x)
        if state.batch != x.shape[0]:
            raise ValueError(f"{type(self).__name__}: state has a batch of {state.batch}; expected {x.shape[0]}")
        return torch.cat([self._step(token, state) for token in x.split(1, 1)], 1), state

    def _step(self, x: Tensor, state: InfiniAttentionState) -> Tensor:
        q, k, v = self._heads(x)
        cache = state.segment
        held = cache.held()
        turned_q, turned_k = self._turned(q, k, cache.length[:, None])
        cache.append(turned_k, v)
        local = attention_decode(
            turned_q.to(cache.k.dtype), cache.k, cache.v, cache_seqlens=held + 1, backend=self.backend
        ).o.to(q.dtype)
        recalled = segment_memory_step(
            elu_plus_one(q), elu_plus_one(k), v, None, state.memory, state.written, held, **self._rule()
        )
        return self._readout(self._mixed(recalled, local), x)

    def _rule(self) -> dict[str, Any]:
        return {"segment_size": self.segment_size, "delta": self.delta, "eps": self.eps}

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, segment_size={self.segment_size}"


def _first(bounds: Tensor, limit: Tensor, total: int) -> Tensor:
    """[total] whether a row is among the first limit[n] of its sequence n, which owns rows bounds[n]..bounds[n+1]."""
    place = torch.arange(total, device=bounds.device)
    if not len(limit):
        return place >= 0
    owner = torch.searchsorted(bounds[1:], place, right=True).clamp(max=len(limit) - 1)
    return place - bounds[owner] < limit[owner]


def _behind(rows: Tensor, held: Tensor, new: NewRows) -> Tensor:
    """Of packed rows, sequences that each begin with held [N] old ones, the new ones in the order of their call."""
    token = torch.arange(new.total, device=rows.device)
    owner = torch.searchsorted(new.bounds[1:], token, right=True).clamp(max=max(len(held) - 1, 0))
    return rows.index_select(0, token + held.cumsum(0)[owner])
