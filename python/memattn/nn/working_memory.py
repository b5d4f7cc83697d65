"""DT-Mem's working memory (Kang et al. 2023, "Think Before You Act", arXiv 2305.16338): a relational memory core."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn.inputs import check_sizes, check_state, check_tokens
from memattn.nn.padding import valid_runs
from memattn.nn.segment_recurrence import SlotMemory, choose, head_dim_of
from memattn.ops.attention import attention
from memattn.ops.slot_gate import slot_gate
from memattn.ops.slot_write import slot_write

FORGET_BIAS, INPUT_BIAS = 1.0, 0.0


class WorkingMemory(nn.Module):
    """Slots that each segment first rewrites and then reads, in the form of the authors' released code.

    E = input_proj(x). With attn(a, b) = softmax(a W_q (b W_k)ᵀ / √d) b W_v, the same three projections throughout:
    `num_blocks` times, with shared weights,   Z ← LN(Z + attn(Z, E)),  Z ← LN'(Z + relu(W Z + b)),   from Z = M;
    i, f = split(A(E) + B tanh(M)),   A(E) = linear(mean over tokens of relu(w ⊙ E)), one per sequence;
    M' = σ(i + b_i) ⊙ tanh(Z) + σ(f + b_f) ⊙ M,  b_f = 1, b_i = 0 at first;   y = attn(E, M').

    A segment is written before it is read, so a token sees the whole of its own segment: causal between segments, not
    inside one. A call with more than `segment_len` tokens is cut into segments of that many, the last may be shorter;
    a state therefore hands over at the end of a segment only, and there is no step for single tokens.

    The code (github.com/luciferkonn/DT_Mem, relational_memory.py) has 1290 slots, num_blocks 64 and one MLP layer, and
    starts from the identity matrix, cut or padded with zeros to M × D. The paper's text describes another update:
    content addressing with erase and add, M ← M ⊙ (1 − w e) + w a with w = softmax(Q Kᵀ / √d). That is not offered,
    nor is the code's optional top-k of the weights (off by default there). Initialisation: A's w normal, B's weights
    uniform in ±1/√(2 D) as there; the rest as torch.nn.Linear.

    >>> layer = WorkingMemory(512, num_heads=8, num_slots=1290, segment_len=60)
    >>> y, state = layer(x, return_state=True)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_slots: int,
        segment_len: int,
        num_blocks: int = 1,
        num_mlp_layers: int = 1,
        norm_eps: float = 1e-5,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        check_sizes(
            self, num_heads=num_heads, num_slots=num_slots, segment_len=segment_len, num_blocks=num_blocks,
            num_mlp_layers=num_mlp_layers,
        )  # fmt: skip
        self.head_dim = head_dim_of(name, embed_dim, num_heads)
        self.embed_dim, self.num_heads, self.num_slots = embed_dim, num_heads, num_slots
        self.segment_len, self.num_blocks, self.num_mlp_layers = segment_len, num_blocks, num_mlp_layers
        self.backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.input_proj = nn.Linear(embed_dim, embed_dim, **factory)
        self.query_proj = nn.Linear(embed_dim, embed_dim, **factory)
        self.key_value_proj = nn.Linear(embed_dim, 2 * embed_dim, **factory)
        self.mlp = nn.Linear(embed_dim, embed_dim, **factory)  # one layer, applied num_mlp_layers times
        self.attention_norm = nn.LayerNorm(embed_dim, eps=norm_eps, **factory)
        self.mlp_norm = nn.LayerNorm(embed_dim, eps=norm_eps, **factory)
        self.input_gate_weight = nn.Parameter(torch.empty(embed_dim, **factory))
        self.input_gate_proj = nn.Linear(embed_dim, 2 * embed_dim, **factory)
        self.memory_gate_proj = nn.Linear(embed_dim, 2 * embed_dim, **factory)
        self.gate_bias = nn.Parameter(torch.empty(2, **factory))  # of the input and of the forget gate
        self._reset_gates()

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        for child in cast("Iterator[Any]", self.children()):
            child.reset_parameters()
        self._reset_gates()

    @torch.no_grad()
    def _reset_gates(self) -> None:
        nn.init.normal_(self.input_gate_weight)
        bound = (2 * self.embed_dim) ** -0.5
        nn.init.uniform_(self.memory_gate_proj.weight, -bound, bound)
        nn.init.uniform_(self.memory_gate_proj.bias, -bound, bound)
        self.gate_bias[0].fill_(INPUT_BIAS)
        self.gate_bias[1].fill_(FORGET_BIAS)

    def init_state(self, batch: int) -> SlotMemory:
        """The memory of `batch` sequences before their first segment, on the parameters' device."""
        weight = self.mlp.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        slots = weight.new_zeros(batch, self.num_slots, self.embed_dim, dtype=dtype)
        return SlotMemory(slots, weight.new_zeros(batch, dtype=torch.int64))

    def forward(
        self,
        x: Tensor,
        state: SlotMemory | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, SlotMemory]:
        """Segments of up to segment_len tokens one after the other.

        x [B, T, embed_dim]. state: where each sequence starts, None for empty; it is not changed.
        attention_mask [B, T] bool or integer: one contiguous run of valid (nonzero) tokens per row, cut into segments
        from its own start. The others reach nothing, their output is 0; a row without tokens keeps its memory.
        cu_seqlens [N+1] int32/int64: x holds N sequences end to end, then B = 1 and the state has N rows.
        Returns y [B, T, embed_dim], or (y, new state) with return_state.
        """
        check_tokens(self, x)
        rows = valid_runs(type(self).__name__, x, attention_mask, cu_seqlens)
        x = x if rows is None else rows.align(x)
        memory = self.init_state(x.shape[0]) if state is None else state
        check_state(self, memory, SlotMemory, x.shape[0])
        outputs = [x.new_zeros(x.shape[0], 0, self.embed_dim)]
        tokens = self.input_proj(x)
        for start in range(0, x.shape[1], self.segment_len):
            segment = tokens[:, start : start + self.segment_len]
            if rows is None:
                memory = self._write(memory, segment, None)
            else:
                lengths = (rows.length - start).clamp(0, segment.shape[1])
                memory = choose(lengths > 0, self._write(memory, segment, lengths), memory)
            outputs.append(self._read(memory, segment))
        y = torch.cat([o.to(outputs[-1].dtype) for o in outputs], 1)
        if rows is not None:
            y = rows.restore(y)
        return (y, memory if x.shape[1] else memory.clone()) if return_state else y

    def _slots(self, memory: SlotMemory) -> Tensor:
        return memory.or_initial(torch.eye(self.num_slots, self.embed_dim, device=memory.slots.device))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim)

    def _keys(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._heads(y) for y in self.key_value_proj(x).chunk(2, -1))

    def _write(self, memory: SlotMemory, tokens: Tensor, lengths: Tensor | None) -> SlotMemory:
        slots = self._slots(memory)
        k, v = self._keys(tokens)
        z = slots.to(tokens.dtype)
        for _ in range(self.num_blocks):
            q = self._heads(self.query_proj(z)).to(k.dtype)
            gathered = slot_write(q, None, None, k, v, see="none", lengths=lengths, backend=self.backend).o
            z = hidden = self.attention_norm(z + gathered.flatten(2))
            for _ in range(self.num_mlp_layers):
                hidden = F.relu(self.mlp(hidden))
            z = self.mlp_norm(z + hidden)
        logits = self._input_gate(tokens, lengths)[:, None] + self.memory_gate_proj(slots.to(tokens.dtype).tanh())
        write, forget = (x + bias for x, bias in zip(logits.chunk(2, -1), self.gate_bias, strict=True))
        new = slot_gate(slots, z.to(slots.dtype).tanh(), "lstm", forget=forget, input=write)
        return SlotMemory(new, memory.written + 1)

    def _input_gate(self, tokens: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, 2 D]; the mean is over the valid tokens."""
        weighed = F.relu(self.input_gate_weight.to(tokens.dtype) * tokens)
        if lengths is None:
            return self.input_gate_proj(weighed.mean(1))
        valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        total = torch.where(valid[..., None], weighed, 0.0).sum(1)
        return self.input_gate_proj((total / lengths.clamp(min=1)[:, None]).to(tokens.dtype))

    def _read(self, memory: SlotMemory, tokens: Tensor) -> Tensor:
        keys, values = (x.to(tokens.dtype) for x in self._keys(memory.slots.to(self.mlp.weight.dtype)))
        q = self._heads(self.query_proj(tokens)).to(tokens.dtype)
        return attention(q, keys, values, causal=False, backend=self.backend).o.flatten(2)

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_slots={self.num_slots}, "
            f"segment_len={self.segment_len}, num_blocks={self.num_blocks}"
        )
