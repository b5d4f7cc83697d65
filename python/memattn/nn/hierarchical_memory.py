"""Hierarchical memory (HMT: He, Cao, Qin, Cai, Zhao, Sun, Cong 2024, arXiv 2405.06067) around any backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn.inputs import check_sizes, check_state, check_tokens
from memattn.nn.padding import rows_at, valid_runs
from memattn.nn.segment_recurrence import choose
from memattn.ops.memory_recall import memory_recall
from memattn.state import MemoryState

Backbone = Callable[[Tensor, Tensor], Tensor]
TOKEN_STD = 0.02


class HierarchicalState(MemoryState):
    """memory [N, size, D] float32, embeddings of past segments, the latest first; count [N] int64 of them are there.

    sensory [N, k, D]: the last input embeddings of the segment before, of which the first kept [N] int64 count.
    """

    fields: ClassVar[tuple[str, ...]] = ("memory", "count", "sensory", "kept")

    def __init__(self, memory: Tensor, count: Tensor, sensory: Tensor, kept: Tensor) -> None:
        self.memory = memory
        self.count = count
        self.sensory = sensory
        self.kept = kept


class HierarchicalMemory(nn.Module):
    """A backbone that reads long input segment by segment, with a queue of one embedding per past segment.

    For each segment x of up to segment_len input embeddings, s and p_0 being learnt tokens:
    represent   q = last of backbone([s; first tokens of x; s]), `representation` · segment_len of them
    recall      p = softmax(q W_q (M W_k)ᵀ / √recall_dim) M over the memory M; p_0 while M is empty
    augment     backbone([p; last `sensory` inputs of the segment before; x; p]): its outputs at x are y, its last
                output is pushed onto M, which holds the last `memory_size` of them.

    `backbone(embeddings [B, L, embed_dim], attention_mask [B, L] bool) -> hidden [B, L, embed_dim]` is any module,
    say a language model from input embeddings to last hidden states. Rows are padded on the right only, so a causal
    backbone may ignore the mask. Recall multiplies the query by W_k instead of the memory (ops/memory_recall.py).

    The representation looks ahead: y is causal between segments, not inside one. A state hands over at the end of a
    segment; a call with more than segment_len tokens is cut, the last segment may be shorter. Detach the state every
    few segments for the paper's truncated training (2 to 6 deep). Not taken from the code
    (github.com/OswaldHe/HMT-pytorch): memory on the host, and scores over recall_dim instead of its root for widths
    from 4096 up.

    s and p_0 are normal with standard deviation 0.02 (there: that of the model's embeddings), the projections as
    torch.nn.Linear.

    >>> layer = HierarchicalMemory(backbone, 2048, segment_len=1024)
    >>> y, state = layer(embeddings, return_state=True)
    """

    def __init__(
        self,
        backbone: nn.Module,
        embed_dim: int,
        *,
        segment_len: int,
        memory_size: int = 100,
        sensory: int = 32,
        representation: float = 0.5,
        recall_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not 0 < representation <= 1:
            raise ValueError(f"{name}: representation is {representation}; expected a share of the segment in (0, 1]")
        recall_dim = embed_dim if recall_dim is None else recall_dim
        check_sizes(self, segment_len=segment_len, memory_size=memory_size, recall_dim=recall_dim)
        if sensory < 0:
            raise ValueError(f"{name}: sensory is {sensory}; expected at least 0")
        self.backbone = backbone
        self.embed_dim, self.segment_len, self.memory_size = embed_dim, segment_len, memory_size
        self.sensory, self.representation = sensory, representation
        self.recall_dim = recall_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.recall_query_proj = nn.Linear(embed_dim, self.recall_dim, bias=False, **factory)
        self.recall_key_proj = nn.Linear(embed_dim, self.recall_dim, bias=False, **factory)
        self.summary_token = nn.Parameter(torch.empty(embed_dim, **factory))  # s
        self.first_prompt = nn.Parameter(torch.empty(embed_dim, **factory))  # p_0
        self._reset_tokens()

    def reset_parameters(self) -> None:
        """Initialise every parameter again, those of the backbone if it has a reset_parameters of its own."""
        if hasattr(self.backbone, "reset_parameters"):
            self.backbone.reset_parameters()  # type: ignore[operator]
        self.recall_query_proj.reset_parameters()
        self.recall_key_proj.reset_parameters()
        self._reset_tokens()

    def _reset_tokens(self) -> None:
        nn.init.normal_(self.summary_token, std=TOKEN_STD)
        nn.init.normal_(self.first_prompt, std=TOKEN_STD)

    def init_state(self, batch: int) -> HierarchicalState:
        """The empty memory of `batch` sequences, on the parameters' device."""
        like = self.summary_token
        dtype = torch.promote_types(like.dtype, torch.float32)
        none = like.new_zeros(batch, dtype=torch.int64)
        memory = like.new_zeros(batch, self.memory_size, self.embed_dim, dtype=dtype)
        return HierarchicalState(memory, none, like.new_zeros(batch, self.sensory, self.embed_dim), none.clone())

    def forward(
        self,
        x: Tensor,
        state: HierarchicalState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, HierarchicalState]:
        """Segments of up to segment_len tokens one after the other.

        x [B, T, embed_dim], input embeddings. state: where each sequence starts, None for empty; it is not changed.
        attention_mask [B, T] bool or integer: one contiguous run of valid (nonzero) tokens per row, cut into segments
        from its own start. The others reach nothing, their output is 0; a row without tokens keeps its state.
        cu_seqlens [N+1] int32/int64: x holds N sequences end to end, then B = 1 and the state has N rows.
        Returns y [B, T, embed_dim], the backbone's outputs, or (y, new state) with return_state.
        """
        check_tokens(self, x)
        rows = valid_runs(type(self).__name__, x, attention_mask, cu_seqlens)
        x = x if rows is None else rows.align(x)
        state = self.init_state(x.shape[0]) if state is None else state
        check_state(self, state, HierarchicalState, x.shape[0])
        outputs = []
        for start in range(0, x.shape[1], self.segment_len):
            segment = x[:, start : start + self.segment_len]
            if rows is None:
                lengths = torch.full(x.shape[:1], segment.shape[1], device=x.device)
            else:
                lengths = (rows.length - start).clamp(0, segment.shape[1])
            y, after = self._segment(segment, lengths, state)
            state = after if rows is None else choose(lengths > 0, after, state)
            outputs.append(y)
        y = torch.cat(outputs, 1) if outputs else x.clone()
        y = y if rows is None else rows.restore(y)
        return (y, state if outputs else state.clone()) if return_state else y

    def _segment(self, x: Tensor, lengths: Tensor, state: HierarchicalState) -> tuple[Tensor, HierarchicalState]:
        prompt = self._recalled(self._represented(x, lengths), state).to(x.dtype)
        one = torch.ones_like(lengths)
        counts = (one, state.kept, lengths, one)
        embeddings, mask, place = _joined((prompt, state.sensory.to(x.dtype), x, prompt), counts)
        hidden = self.backbone(embeddings, mask)
        y = rows_at(hidden, place[:, 1 + self.sensory : -1])
        summary = rows_at(hidden, place[:, -1:]).to(state.memory.dtype)
        memory = torch.cat([summary, state.memory[:, :-1]], 1)
        return y, HierarchicalState(memory, (state.count + 1).clamp(max=self.memory_size), *self._kept(x, lengths))

    def _represented(self, x: Tensor, lengths: Tensor) -> Tensor:
        """q [B, 1, D] of the segment's first tokens."""
        first = x[:, : max(1, int(self.representation * self.segment_len))]
        token = self.summary_token.to(x.dtype).expand(x.shape[0], 1, -1)
        one = torch.ones_like(lengths)
        embeddings, mask, place = _joined((token, first, token), (one, lengths.clamp(max=first.shape[1]), one))
        return rows_at(self.backbone(embeddings, mask), place[:, -1:])

    def _recalled(self, q: Tensor, state: HierarchicalState) -> Tensor:
        """p [B, 1, D]."""
        q = F.linear(self.recall_query_proj(q), self.recall_key_proj.weight.T).to(state.memory.dtype)
        rows = state.memory[:, :, None]
        recalled, _ = memory_recall(q[:, :, None], rows, lengths=state.count, scale=self.recall_dim**-0.5)
        first = self.first_prompt.to(recalled.dtype)
        return torch.where((state.count == 0)[:, None, None], first, recalled[:, :, 0])

    def _kept(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """The last inputs of the segment, in order from the front, and how many there are."""
        kept = lengths.clamp(max=self.sensory)
        place = torch.arange(self.sensory, device=x.device)
        source = ((lengths - kept)[:, None] + place).clamp(max=x.shape[1] - 1)
        return torch.where((place < kept[:, None])[..., None], rows_at(x, source), 0.0), kept

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, segment_len={self.segment_len}, memory_size={self.memory_size}, "
            f"sensory={self.sensory}, representation={self.representation}, recall_dim={self.recall_dim}"
        )


def _joined(parts: tuple[Tensor, ...], counts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The first counts[i] [B] rows of each part [B, n_i, D] one after the other, padded behind.

    Returns (joined [B, Σ n_i, D], mask [B, Σ n_i] of what is valid, place [B, Σ n_i]: where row j of the parts went).
    """
    valid = torch.cat(
        [torch.arange(x.shape[1], device=x.device) < n[:, None] for x, n in zip(parts, counts, strict=True)], 1
    )
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    place = order.argsort(dim=1)
    mask = valid.gather(1, order)
    return torch.where(mask[..., None], rows_at(torch.cat(parts, 1), order), 0.0), mask, place
