"""Associative Recurrent Memory Transformer (Rodkin et al. 2024, arXiv 2407.04841) around any layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn.memory_tokens import MemoryTokens
from memattn.ops.feature_maps import dpfp
from memattn.ops.segment_memory import segment_memory
from memattn.state import MemoryState

EPS = 1e-5  # the authors'


class AssociativeState(MemoryState):
    """Of every layer n: memory{n} [N, H, 2νd, D/H + 1], its last column the normaliser, and inner{n}, its own state."""

    def __init__(self, *parts: Any) -> None:
        half = len(parts) // 2
        self.fields = tuple(f"{kind}{n}" for kind in ("memory", "inner") for n in range(half))  # type: ignore[misc]
        for name, part in zip(self.fields, parts, strict=True):
            setattr(self, name, part)

    @property
    def memories(self) -> list[Tensor]:
        """From input to output."""
        return [getattr(self, name) for name in self.fields if name.startswith("memory")]

    @property
    def inner(self) -> list[MemoryState]:
        """From input to output."""
        return [getattr(self, name) for name in self.fields if name.startswith("inner")]

    def next_segment(self, rows: Tensor) -> AssociativeState:
        """The layers of these rows start afresh; what the memories hold stays."""
        return AssociativeState(*self.memories, *(inner.reset(rows) for inner in self.inner))


class AssociativeMemory(nn.Module):
    """One layer's memory: read for every token, written with the layer's outputs at the memory tokens.

    With φ(x) = DPFP_ν(x) / |DPFP_ν(x)| per head:  read(h) = φ(W_q h) A / (φ(W_q h)·z + 1e-5)  and
    `segment_memory`'s delta write with k = φ(W_k m), v = W_v m, β = sigmoid(W_b m) per head, and its correction of z.
    W_v starts at zero, so that an untrained memory changes nothing.
    """

    def __init__(
        self, embed_dim: int, memory_dim: int, num_heads: int, nu: int, correction: bool, backend: str | None,
        device: torch.device | str | None, dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.nu, self.correction, self.backend = num_heads, nu, correction, backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, memory_dim, bias=False, **factory)
        self.k_proj = nn.Linear(embed_dim, memory_dim, bias=False, **factory)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=False, **factory)
        self.beta_proj = nn.Linear(embed_dim, num_heads, **factory)
        nn.init.zeros_(self.v_proj.weight)

    def reset_parameters(self) -> None:
        """As torch.nn.Linear, the values' projection zero."""
        for child in cast("Iterator[Any]", self.children()):
            child.reset_parameters()
        nn.init.zeros_(self.v_proj.weight)

    def empty(self, batch: int) -> Tensor:
        """Zeros [batch, H, 2νd, D/H + 1]."""
        weight = self.v_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        features = 2 * self.nu * (self.q_proj.out_features // self.heads)
        return weight.new_zeros(batch, self.heads, features, weight.shape[0] // self.heads + 1, dtype=dtype)

    def read(self, h: Tensor, memory: Tensor) -> Tensor:
        """What h [N, n, D] finds."""
        q = self._features(self.q_proj(h))
        none = q[:, :0]
        o, _ = self._call(q, none, none.new_zeros(*none.shape[:3], memory.shape[3] - 1), None, memory)
        return o.flatten(-2)

    def written(self, h: Tensor, live: Tensor, memory: Tensor) -> Tensor:
        """The memory after one segment's tokens h [N, m, D]; rows that are not live [N, m] write nothing."""
        k = torch.where(live[..., None, None], self._features(self.k_proj(h)), 0.0)
        v = self._split(self.v_proj(h))
        beta = self.beta_proj(h).sigmoid().to(v.dtype)
        _, after = self._call(k[:, :0], k, v, beta, memory)
        assert after is not None
        return after

    def _features(self, x: Tensor) -> Tensor:
        return F.normalize(dpfp(self._split(x), self.nu), dim=-1).to(x.dtype)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, x.shape[2] // self.heads)

    def _call(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, memory: Tensor) -> tuple[Tensor, Any]:
        return segment_memory(
            q,
            k,
            v,
            beta,
            segment_size=max(q.shape[1], k.shape[1], 1),
            delta=True,
            correction=self.correction,
            eps=EPS,
            initial_state=memory,
            output_final_state=True,
            backend=self.backend,
        )


class AssociativeLayers(nn.Module):
    """Layers in a row, each behind its memory: h ← layer(h + read(h)); the last num_memory_tokens rows write."""

    def __init__(self, layers: Sequence[nn.Module], memories: Sequence[AssociativeMemory], tokens: int) -> None:
        super().__init__()
        self.layers, self.memories = nn.ModuleList(layers), nn.ModuleList(memories)
        self.num_memory_tokens = tokens

    def reset_parameters(self) -> None:
        """Initialise every parameter again."""
        for part in (*cast("Any", self.layers), *cast("Any", self.memories)):
            part.reset_parameters()

    def init_state(self, batch: int, **options: Any) -> AssociativeState:
        """Empty memories; `options` go to every layer's init_state."""
        memories = [memory.empty(batch) for _, memory in self._pairs()]
        return AssociativeState(*memories, *(layer.init_state(batch, **options) for layer, _ in self._pairs()))

    def forward(
        self, h: Tensor, state: AssociativeState, *, attention_mask: Tensor, return_state: bool = True
    ) -> tuple[Tensor, AssociativeState]:
        """h [N, n, D] of one segment. Its last rows are the memory tokens, if there are rows at all."""
        if h.shape[1] == 0:
            return h, state
        m, memories, inner = self.num_memory_tokens, [], []
        for (layer, memory), before, within in zip(self._pairs(), state.memories, state.inner, strict=True):
            h, after = layer(h + memory.read(h, before), within, attention_mask=attention_mask, return_state=True)
            h = torch.where(attention_mask[..., None], h, 0.0)
            memories.append(memory.written(h[:, -m:], attention_mask[:, -m:], before))
            inner.append(after)
        return h, AssociativeState(*memories, *inner)

    def step(self, h: Tensor, state: AssociativeState) -> tuple[Tensor, AssociativeState]:
        """One token per row inside a segment: the memories are read."""
        for (layer, memory), before, within in zip(self._pairs(), state.memories, state.inner, strict=True):
            h, _ = layer.step(h + memory.read(h, before), within)
        return h, state

    def _pairs(self) -> list[tuple[Any, AssociativeMemory]]:
        return list(zip(self.layers, cast("Any", self.memories), strict=True))


class AssociativeRecurrentMemory(MemoryTokens):
    """Segments pass through layers that each own an associative memory; memory tokens behind a segment write it.

        h_0 = [x_s, m_1 … m_M]          h_{l+1} = layer_l(h_l + φ(W_q h_l) A_l / (φ(W_q h_l)·z_l + 1e-5))

    and once per segment, all M tokens against the same A_l, with k = φ(W_k h_{l+1}), v = W_v h_{l+1},
    β = sigmoid(W_b h_{l+1}) at the memory tokens and γ = clip(1 − k·z_l / (|k|² + 1e-5), 0, 1), not differentiated:

        A_l ← A_l + Σ β kᵀ (v − k A_l / (k·z_l + 1e-5))          z_l ← z_l + Σ γ k

    φ is DPFP of memory_dim / memory_heads numbers per head, 2ν times as many, at length 1 (as in the authors'
    repository RodkinIvan/associative-recurrent-memory-transformer; correction=False is γ = 1). The m are learned and
    the same for every segment. They come after the segment's tokens, so causal layers let them see all of it and let
    no token see them.

    layers: one module or a sequence from input to output, each a layer of memattn.nn or a module with its calls
    (init_state, step, attention_mask, return_state), such as HybridStack(embed_dim, heads, "rat") for a block with
    residuals and MLP. They start afresh at every segment. An open segment writes nothing until it is full.

    bptt_depth: gradients join the last so many segments of a call; None: all of them, and the state given.
    """

    def __init__(
        self,
        layers: nn.Module | Sequence[nn.Module],
        embed_dim: int,
        num_memory_tokens: int = 16,
        *,
        segment_size: int,
        memory_dim: int = 64,
        memory_heads: int = 1,
        nu: int = 3,
        correction: bool = True,
        bptt_depth: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        inner = [layers] if isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList) else list(layers)
        stateless = [type(layer).__name__ for layer in inner if not hasattr(layer, "init_state")]
        if not inner or stateless:
            raise ValueError(
                f"{name}: layers has {', '.join(stateless) or 'no layer'}; allowed: layers with init_state, step and "
                "return_state, as those of memattn.nn"
            )
        for what, value in (
            ("num_memory_tokens", num_memory_tokens), ("memory_heads", memory_heads), ("memory_dim", memory_dim),
            ("nu", nu),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name}: {what} is {value}; allowed: ≥ 1")
        if memory_dim % memory_heads or embed_dim % memory_heads:
            raise ValueError(
                f"{name}: memory_heads is {memory_heads}; expected a divisor of memory_dim {memory_dim} and "
                f"embed_dim {embed_dim}"
            )
        memories = [
            AssociativeMemory(embed_dim, memory_dim, memory_heads, nu, correction, backend, device, dtype)
            for _ in inner
        ]
        super().__init__(AssociativeLayers(inner, memories, num_memory_tokens), embed_dim, segment_size, bptt_depth)
        self.memory = nn.Parameter(torch.empty(num_memory_tokens, embed_dim, device=device, dtype=dtype))
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.normal_(self.memory, std=0.02)

    def _empty_memory(self, batch: int) -> Tensor:
        return self.memory.new_zeros(batch, 0, self.embed_dim)

    def _queries(self, memory: Tensor, closed: Tensor) -> Tensor:
        return self.memory.expand(len(closed), -1, -1)

    def _prefix(self, memory: Tensor, closed: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
        return memory, closed.new_ones(memory.shape[:2], dtype=torch.bool)

    def _updated(self, memory: Tensor, written: Tensor) -> Tensor:
        return memory

    def _next_segment(self, inner: AssociativeState, rows: Tensor) -> AssociativeState:
        return inner.next_segment(rows)

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, num_memory_tokens={self.memory.shape[0]}, segment_size={self.segment_size}"
        return text if self.bptt_depth is None else f"{text}, bptt_depth={self.bptt_depth}"
