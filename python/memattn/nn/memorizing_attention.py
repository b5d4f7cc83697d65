"""Attention to recent tokens and, by exact nearest neighbours, to a long memory of older ones."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memattn.nn.attention_layer import AttentionLayer
from memattn.nn.inputs import check_sizes
from memattn.nn.rotary import rotary
from memattn.nn.segment_recurrence import SegmentRecurrence, SegmentState
from memattn.ops.attention import AttentionOutput, attention
from memattn.ops.attention_decode import attention_decode
from memattn.ops.knn_attention import knn_attention
from memattn.ops.merge_states import gated_combine, merge_states
from memattn.state import MemoryState

COMBINE = ("gate", "joint")
METRICS = ("dot", "cos")
COSINE_SCALE = 20.0  # of cosines at the start
TINY = 1e-12


class KNNMemory(MemoryState):
    """Keys and values of whole segments: the last one, recent_k, recent_v [N, S, HKV, D], and older ones in a ring.

    k, v [N, M, HKV, D], without position code; written [N] int64: segments so far. The last segment is not in the ring.
    """

    fields: ClassVar[tuple[str, ...]] = ("k", "v", "recent_k", "recent_v", "written")

    def __init__(self, k: Tensor, v: Tensor, recent_k: Tensor, recent_v: Tensor, written: Tensor) -> None:
        self.k, self.v = k, v
        self.recent_k, self.recent_v = recent_k, recent_v
        self.written = written

    def held(self) -> Tensor:
        """[N] tokens in the ring: its first slots, until it is full."""
        return ((self.written - 1).clamp(min=0) * self.recent_k.shape[1]).clamp(max=self.k.shape[1])

    def push_(self, k: Tensor, v: Tensor, rows: Tensor | None) -> KNNMemory:
        """A segment k, v [N, S, HKV, D] becomes the recent one of `rows` [N] bool; changes the ring's own tensors."""
        with torch.no_grad():
            arrives = torch.ones_like(self.written, dtype=torch.bool) if rows is None else rows
            older = arrives & (self.written > 0)
            for ring, recent in ((self.k, self.recent_k), (self.v, self.recent_v)):
                _write_block(ring, recent, self.written - 1, older)
            fresh = arrives[:, None, None, None]
            recent_k = torch.where(fresh, k.to(self.k.dtype), self.recent_k)
            recent_v = torch.where(fresh, v.to(self.v.dtype), self.recent_v)
            return KNNMemory(self.k, self.v, recent_k, recent_v, self.written + arrives)


def _write_block(ring: Tensor, block: Tensor, number: Tensor, rows: Tensor) -> None:
    """ring [N, M, ...] takes block [N, S, ...] as its number-th one, in place, in `rows`."""
    batch, size = block.shape[:2]
    blocks = ring.shape[1] // size
    if not blocks:
        return
    flat = ring.view(batch * blocks, *block.shape[1:])
    place = torch.arange(batch, device=ring.device) * blocks + number.remainder(blocks)
    flat.index_copy_(0, place, torch.where(rows[:, None, None, None], block, flat.index_select(0, place)))


class MemorizingAttention(SegmentRecurrence, AttentionLayer):
    """Local attention, and attention to the nearest `num_neighbors` keys of the last memory_size older tokens.

        local:   o^L_i over the tokens of i's segment up to i, and all of the segment before
        memory:  o^M_i over I(i), the num_neighbors keys of the memory with the largest q_i·k_j
        "gate":  o_i = (1 − g_h) o^L_i + g_h o^M_i,  g_h = sigmoid(b_h), b_h one learnt number per head, 0 at the start
        "joint": one softmax over both sets of keys

    Memorizing Transformers (Wu et al. 2022, arXiv 2203.08913) and the authors' code (google-research/meliad) are
    "gate"; "joint" is the form of the PyTorch package memorizing-transformers-pytorch. A token enters the memory when
    it can no longer be seen locally, in whole segments, and leaves it when memory_size younger ones are in it: a ring
    per sequence and key head. Nothing is approximate and nothing is forgotten earlier. `state.reset(rows)` empties
    the memory of rows whose next token begins another document.

    Gradients are those of the paper: none through the search, none into stored keys and values (nor the segment
    before), but through q of the second softmax. While the memory holds nothing a row may see, its gate is closed:
    o_i = o^L_i. Positions (rope_base) exist in the local part only; the memory has none.

    metric "dot": scores q·k / √head_dim. "cos": q and k have length 1 in both parts and scores are e^{s_h} cos,
    s_h learnt per head, log 20 at the start.

    memory_size is no part of the weights: a trained layer may be given another one before `init_state`. 0 means no
    memory. Sizes of the paper: segments of 512, memory of 1,536 to 262,144 tokens, 32 neighbours; one such layer among
    ordinary ones, near the top. Arguments: num_kv_heads, head_dim, bias as in `AttentionLayer`; calls as in
    `GatedDeltaNet`; a step cannot pick rows of a pool.

    >>> layer = MemorizingAttention(256, num_heads=4, segment_size=512, memory_size=8192)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        segment_size: int,
        memory_size: int,
        num_neighbors: int = 32,
        combine: str = "gate",
        metric: str = "dot",
        rope_base: float | None = 10000.0,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias, backend=backend, **factory
        )
        name = type(self).__name__
        check_sizes(self, segment_size=segment_size, num_neighbors=num_neighbors)
        if num_neighbors > 128:
            raise ValueError(f"{name}: num_neighbors is {num_neighbors}; allowed: 1..128")
        for argument, value, allowed in (("combine", combine, COMBINE), ("metric", metric, METRICS)):
            if value not in allowed:
                raise ValueError(f"{name}: {argument} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
        if rope_base is not None and self.head_dim % 2:
            raise ValueError(f"{name}: head_dim is {self.head_dim}; rotary positions need an even one")
        self.segment_len, self.num_neighbors = segment_size, num_neighbors
        self.memory_size = memory_size
        self._blocks()
        self.combine, self.metric, self.rope_base = combine, metric, rope_base
        self.feature_dim = sum(self._split)
        self.gate = nn.Parameter(torch.empty(num_heads, **factory)) if combine == "gate" else None
        self.log_scale = nn.Parameter(torch.empty(num_heads, **factory)) if metric == "cos" else None
        self._reset_own()

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        super().reset_parameters()
        self._reset_own()

    def _reset_own(self) -> None:
        if self.gate is not None:
            nn.init.zeros_(self.gate)
        if self.log_scale is not None:
            nn.init.constant_(self.log_scale, math.log(COSINE_SCALE))

    def _blocks(self) -> int:
        """Segments that the memory holds."""
        if self.memory_size < 0 or self.memory_size % self.segment_len:
            raise ValueError(
                f"{type(self).__name__}: memory_size is {self.memory_size}; expected 0 or a multiple of segment_size "
                f"{self.segment_len}"
            )
        return self.memory_size // self.segment_len

    def _empty(self, batch: int, like: Tensor) -> Any:
        def zeros(tokens: int) -> Tensor:
            return like.new_zeros(batch, tokens, self.num_kv_heads, self.head_dim)

        held, recent = self._blocks() * self.segment_len, self.segment_len
        written = like.new_zeros(batch, dtype=torch.int64)
        return KNNMemory(zeros(held), zeros(held), zeros(recent), zeros(recent), written)

    # --- one segment --------------------------------------------------------------------------------------------------

    def _features(self, x: Tensor) -> Tensor:
        """q, k and v of all heads, ready for scores: with metric "cos", q has length e^s and k length 1."""
        q, k, v = self._heads(x)
        if self.log_scale is not None:
            q, k = _unit(q) * self.log_scale.exp().to(q.dtype)[:, None], _unit(k)
        return torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], -1)

    def _of_heads(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        parts = features.split(self._split, -1)
        q, k, v = (y.view(*y.shape[:2], y.shape[2] // self.head_dim, self.head_dim) for y in parts)
        return q, k, v

    @property
    def _scale(self) -> float:
        return self.head_dim**-0.5 if self.metric == "dot" else 1.0

    def _rotated(self, x: Tensor, first: int | Tensor) -> Tensor:
        """x [B, T, H, D] at positions first, first + 1, …; the segment before starts at 0. first: an int or [B]."""
        if self.rope_base is None:
            return x
        position = torch.arange(x.shape[1], device=x.device) + (first[:, None] if isinstance(first, Tensor) else first)
        return rotary(x, position, self.rope_base)

    def _read(self, memory: Any, features: Tensor) -> Tensor:
        return self._joined(memory, self._of_heads(features)[0], self._local(memory, features))

    def _read_token(self, memory: Any, open: Tensor, filled: Tensor) -> Tensor:
        token = open.gather(1, filled[:, None, None].expand(-1, -1, open.shape[2]))
        return self._joined(memory, self._of_heads(token)[0], self._local_token(memory, open, filled))

    def _local(self, memory: KNNMemory, features: Tensor) -> AttentionOutput:
        """Attention of a segment from its start to itself and to the segment before."""
        (q, k, v), size = self._of_heads(features), self.segment_len
        turned = self._rotated(q, size)
        keys, values = self._rotated(memory.recent_k.to(q.dtype), 0), memory.recent_v.to(q.dtype)
        settings: dict[str, Any] = {"scale": self._scale, "backend": self.backend}
        before = attention(turned, keys, values, causal=False, **settings)
        nothing = (memory.written == 0)[:, None, None]
        before = AttentionOutput(before.o, before.lse.masked_fill(nothing, -torch.inf))
        return attention(turned, self._rotated(k, size), v, merge=before, **settings)

    def _local_token(self, memory: KNNMemory, open: Tensor, filled: Tensor) -> AttentionOutput:
        """`_local` of token filled[b] alone."""
        _, k, v = self._of_heads(open)
        q, _, _ = self._of_heads(open.gather(1, filled[:, None, None].expand(-1, -1, open.shape[2])))
        turned, size = self._rotated(q, filled + self.segment_len), self.segment_len
        settings: dict[str, Any] = {"scale": self._scale, "backend": self.backend}
        keys, values = self._rotated(k, size).contiguous(), v.contiguous()
        own = attention_decode(turned, keys, values, cache_seqlens=filled + 1, **settings)
        keys, values = self._rotated(memory.recent_k.to(q.dtype), 0), memory.recent_v.to(q.dtype)
        held = torch.where(memory.written > 0, size, 0)
        before = attention_decode(turned, keys, values, cache_seqlens=held, **settings)
        return merge_states(*zip(own, before, strict=True), backend=self.backend)

    def _joined(self, memory: KNNMemory, q: Tensor, local: AttentionOutput) -> Tensor:
        """y [B, t, embed_dim] of the local part and of what q finds in the memory."""
        o = local.o
        if memory.k.shape[1]:
            recalled = self._recall(memory, q.to(memory.k.dtype))
            recalled = AttentionOutput(recalled.o.to(o.dtype), recalled.lse.to(local.lse.dtype))
            if self.gate is None:
                o = merge_states(*zip(local, recalled, strict=True), backend=self.backend).o
            else:
                gate = torch.where(recalled.lse == -torch.inf, 0.0, self.gate.to(local.lse.dtype).sigmoid())
                o = gated_combine(recalled.o, o, gate, backend=self.backend)
        return self.out_proj(o.flatten(2))

    def _recall(self, memory: KNNMemory, q: Tensor) -> AttentionOutput:
        """What every query of q [B, t, HQ, D] reads from the ring; lse −inf where it finds nothing."""
        found = knn_attention(
            q, memory.k, memory.v, self.num_neighbors, lengths=memory.held(), scale=self._scale, backend=self.backend
        )
        return AttentionOutput(found.o, found.lse)

    # --- the memory ---------------------------------------------------------------------------------------------------

    def _run(self, features: Tensor, state: SegmentState, lengths: Tensor | None) -> tuple[Tensor, SegmentState]:
        own = SegmentState(state.memory.detach().clone(), state.open, state.filled)  # the ring is written in place
        y, after = super()._run(features, own, lengths)
        return y, after.detach()

    def _write_where(self, memory: Any, features: Tensor, rows: Tensor | None) -> Any:
        _, k, v = self._of_heads(features)
        return memory.push_(k, v, rows)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, segment_size={self.segment_len}, memory_size={self.memory_size}, "
            f"num_neighbors={self.num_neighbors}, combine={self.combine!r}, metric={self.metric!r}, "
            f"rope_base={self.rope_base}"
        )


def _unit(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + TINY).rsqrt()).to(x.dtype)
