"""LongMem: a frozen model whose keys and values are the memory of a small side network that learns to read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memattn.nn.hybrid_stack import StackState
from memattn.nn.inputs import check_sizes, check_state, check_step, check_tokens
from memattn.nn.memorizing_attention import KNNMemory, MemorizingAttention
from memattn.nn.padding import check_mask, valid_runs
from memattn.nn.residual_block import ResidualBlock
from memattn.nn.segment_recurrence import SegmentState
from memattn.ops.attention import AttentionOutput
from memattn.ops.knn_attention import knn
from memattn.ops.sparse_attention import sparse_attention
from memattn.state import MemoryState

Remembered = tuple[Tensor, Tensor]


class LongMemMemory(MemoryState):
    """own: the layer's keys and values of the segment before (its ring has no slots). source: the long memory."""

    fields: ClassVar[tuple[str, ...]] = ("own", "source")

    def __init__(self, own: KNNMemory, source: KNNMemory) -> None:
        self.own = own
        self.source = source


class LongMemAttention(MemorizingAttention):
    """`MemorizingAttention` with a gate, whose memory is searched in chunks and filled with another model's tokens.

    Chunks of chunk_size tokens are found by q_i·(mean of their keys); i attends to all tokens of the num_chunks best in
    a softmax of their own: o_i = (1 − g_h) o^L_i + g_h o^M_i, g_h = sigmoid(b_h), b_h 0 at the start. `remembered=(k,
    v)`, [B, T, num_kv_heads, head_dim] each and without position code, are what the frozen model has at these tokens;
    None: the layer's own. The memory is first in, first out, in whole segments. LongMem (Wang et al. 2023, arXiv
    2306.07174): memory of 65,536 tokens, chunks of 4, 64 tokens read. Local positions are rotary here, ALiBi there.

    Everything else as in `MemorizingAttention`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        segment_size: int,
        memory_size: int,
        chunk_size: int = 4,
        num_chunks: int = 16,
        rope_base: float | None = 10000.0,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            segment_size=segment_size,
            memory_size=memory_size,
            num_neighbors=num_chunks,
            rope_base=rope_base,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            bias=bias,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        check_sizes(self, chunk_size=chunk_size)
        if segment_size % chunk_size:
            raise ValueError(
                f"LongMemAttention: segment_size is {segment_size}; expected a multiple of chunk_size {chunk_size}"
            )
        self.chunk_size = chunk_size
        self.feature_dim += self._split[1] + self._split[2]

    def _empty(self, batch: int, like: Tensor) -> Any:
        source = super()._empty(batch, like)
        none, recent = source.k[:, :0], torch.zeros_like(source.recent_k)
        own = KNNMemory(none, none.clone(), recent, torch.zeros_like(recent), torch.zeros_like(source.written))
        return LongMemMemory(own, source)

    def forward(
        self,
        x: Tensor,
        state: SegmentState | None = None,
        *,
        remembered: Remembered | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """As in `MemorizingAttention`; remembered: the keys and values of these tokens that enter the memory."""
        check_tokens(self, x)
        rows = valid_runs(type(self).__name__, x, attention_mask, cu_seqlens)
        features = self._with_remembered(x, remembered)
        features = features if rows is None else rows.align(features)
        if state is None:
            state = SegmentState(self._empty(features.shape[0], features))
        check_state(self, state, SegmentState, features.shape[0])
        y, after = self._run(features, state, None if rows is None else rows.length)
        y = y if rows is None else rows.restore(y)
        return (y, after) if return_state else y

    def step(
        self, x: Tensor, state: SegmentState, *, remembered: Remembered | None = None
    ) -> tuple[Tensor, SegmentState]:
        """One or a few tokens per sequence, as in `MemorizingAttention`."""
        check_step(self, x, state, SegmentState)
        return self._step(x, self._with_remembered(x, remembered), state)

    def _features(self, x: Tensor) -> Tensor:
        return self._with_remembered(x, None)

    def _with_remembered(self, x: Tensor, remembered: Remembered | None) -> Tensor:
        own = super()._features(x)
        if remembered is None:
            return torch.cat([own, own[..., self._split[0] :]], -1)
        expected = (*x.shape[:2], self.num_kv_heads, self.head_dim)
        for name, part in zip("kv", remembered, strict=True):
            if part.shape != expected:
                raise ValueError(
                    f"LongMemAttention: remembered {name} has shape {list(part.shape)}; expected {list(expected)}"
                )
        return torch.cat([own, *(part.detach().flatten(2).to(own.dtype) for part in remembered)], -1)

    def _of_heads(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super()._of_heads(features[..., : sum(self._split)])

    def _local(self, memory: Any, features: Tensor) -> AttentionOutput:
        return super()._local(memory.own, features)

    def _local_token(self, memory: Any, open: Tensor, filled: Tensor) -> AttentionOutput:
        return super()._local_token(memory.own, open, filled)

    def _joined(self, memory: Any, q: Tensor, local: AttentionOutput) -> Tensor:
        return super()._joined(memory.source, q, local)

    def _recall(self, memory: KNNMemory, q: Tensor) -> AttentionOutput:
        size, group = self.chunk_size, self.num_heads // self.num_kv_heads
        means = memory.k.unflatten(1, (-1, size)).mean(2)
        found = knn(q, means, self.num_neighbors, lengths=memory.held() // size, backend=self.backend).indices

        def by_key_head(x: Tensor) -> Tensor:  # every query head has a list of its own
            return x.unflatten(2, (-1, group)).transpose(2, 3).flatten(1, 2)

        def back(x: Tensor) -> Tensor:
            return x.unflatten(1, (-1, group)).transpose(2, 3).flatten(2, 3)

        # The op keeps keys and values for its backward, and the next segment is written into the ring.
        k, v = (y.clone() if torch.is_grad_enabled() else y for y in (memory.k, memory.v))
        o, lse = sparse_attention(
            by_key_head(q), k, v, by_key_head(found), unit=size, scale=self._scale, backend=self.backend
        )
        return AttentionOutput(back(o), back(lse))

    def _write_where(self, memory: Any, features: Tensor, rows: Tensor | None) -> LongMemMemory:
        _, k, v = self._of_heads(features)
        parts = features[..., sum(self._split) :].chunk(2, -1)
        old_k, old_v = (y.view(*y.shape[:2], self.num_kv_heads, self.head_dim) for y in parts)
        return LongMemMemory(memory.own.push_(k, v, rows), memory.source.push_(old_k, old_v, rows))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, chunk_size={self.chunk_size}"


class LongMem(nn.Module):
    """A frozen stack of blocks, and beside it a side network whose layers add what the frozen ones add.

        h_{l+1} = backbone_l(h_l)                                             h_0 = x, frozen, without gradient
        s_{l+1} = side_l(s_l) + h_{(l+1) r} − h_{l r},  s_0 = x               r backbone blocks to a side block

    x [B, T, embed_dim] are embeddings; y = s at the end, for the frozen model's norm and head. backbone, side:
    `ResidualBlock`s, of which backbone[source] has a mixer with `_heads` (the attention layers of memattn.nn), whose
    keys and values fill the memory, and side[read] a `LongMemAttention` with the same key heads. LongMem (Wang et al.
    2023, arXiv 2306.07174); there r = 2 and side layers start as copies of backbone layers.
    """

    def __init__(
        self, backbone: Sequence[ResidualBlock], side: Sequence[ResidualBlock], *, source: int, read: int
    ) -> None:
        super().__init__()
        if not side or len(backbone) % len(side):
            raise ValueError(f"LongMem: {len(backbone)} backbone and {len(side)} side blocks; expected a multiple")
        if not 0 <= source < len(backbone):
            raise ValueError(f"LongMem: source is {source}; allowed: 0..{len(backbone) - 1}")
        if not 0 <= read < len(side) or not isinstance(side[read].mixer, LongMemAttention):
            raise ValueError(f"LongMem: read is {read}; expected the place of a side block with LongMemAttention")
        self.backbone, self.side = nn.ModuleList(backbone), nn.ModuleList(side)
        self.source, self.read, self.ratio = source, read, len(backbone) // len(side)
        self.embed_dim: int = side[read].mixer.embed_dim
        self.backbone.requires_grad_(False)

    def reset_parameters(self) -> None:
        """Initialise every parameter again, the frozen ones too."""
        for block in (*self.backbone, *self.side):
            block.reset_parameters()

    def init_state(self, batch: int, **how: Any) -> StackState:
        """The empty states of all blocks, backbone first. `how`: e.g. max_tokens of the backbone's caches."""
        frozen = [block.mixer.init_state(batch, **how) for block in self.backbone]  # type: ignore[union-attr, operator]
        return StackState(*frozen, *(block.mixer.init_state(batch) for block in self.side))  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor, state: Any = None, *, return_state: bool = False, **how: Any) -> Any:
        """All tokens at once; `how`: attention_mask or cu_seqlens, for every block."""
        check_tokens(self, x)
        parts = [None] * (len(self.backbone) + len(self.side)) if state is None else self._parts(state)
        mask = how.get("attention_mask")
        if mask is not None:
            check_mask(mask, x)
            x = torch.where((mask != 0)[..., None], x, 0.0)
        y, after = self._through(x, parts, "forward", how)
        y = y if mask is None else torch.where((mask != 0)[..., None], y, 0.0)
        return (y, StackState(*after)) if return_state else y

    def step(self, x: Tensor, state: StackState) -> tuple[Tensor, StackState]:
        """One or a few tokens per sequence, for generation: changes `state` and returns it. Without gradients."""
        check_step(self, x, state, StackState)
        return self._through(x, self._parts(state), "step", {})[0], state

    def _parts(self, state: Any) -> list[Any]:
        check_state(self, state, StackState, None)
        return [getattr(state, name) for name in state.fields]

    def _through(self, x: Tensor, states: list[Any], form: str, how: dict[str, Any]) -> tuple[Tensor, list[Any]]:
        hidden, after, remembered = [x], [], None
        with torch.no_grad():
            for n, block in enumerate(self.backbone):
                if n == self.source:
                    remembered = block.mixer._heads(block.mixer_norm(hidden[-1]))[1:]  # type: ignore[union-attr, operator]
                y, new = getattr(block, form)(hidden[-1], states[n], **how)
                hidden.append(y)
                after.append(new)
        y = x
        for n, block in enumerate(self.side):
            more = {"remembered": remembered} if n == self.read else {}
            y, new = getattr(block, form)(y, states[len(self.backbone) + n], **how, **more)
            y = y + (hidden[(n + 1) * self.ratio] - hidden[n * self.ratio]).detach()
            after.append(new)
        return y, after
