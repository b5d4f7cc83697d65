"""Memformer's external memory (Wu et al. 2020, arXiv 2010.06891): slots read by every token, written per segment."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn.inputs import check_sizes
from memattn.nn.segment_recurrence import SegmentRecurrence, SlotMemory, head_dim_of
from memattn.ops.attention import attention
from memattn.ops.slot_gate import slot_gate
from memattn.ops.slot_write import slot_write


class Memformer(SegmentRecurrence):
    """Cross attention from tokens to memory slots, which are written after each segment of `segment_len` tokens.

    Read:   y = out_proj(softmax(x W_Q (M_t W_K')ᵀ / √d) M_t W_V')
    Write:  u_i = softmax over [slot i; the segment's tokens] of m_i W_q · [m_i W_k; X W_k]ᵀ / (√d τ), applied to
            [m_i; X W_v]; slots never see one another. m_i ← (u_i + v_i) / ‖u_i + v_i‖, at the start v_i / ‖v_i‖.

    The layer mixes tokens through the memory alone: put it beside attention inside the segment. In the paper every
    encoder layer reads and the last one's output is written; here the layer writes what it reads from. Train with
    `memory_replay` to keep one segment's activations at a time.

    The slot biases v_i are drawn with standard deviation 1/√embed_dim, so that m_0 points everywhere; projections as
    torch.nn.Linear (the paper gives neither). τ < 1 is the paper's condition; 0.25 is this library's choice.

    >>> layer = Memformer(512, num_heads=8, num_slots=32, segment_len=64)
    >>> y, state = layer(x, return_state=True)              # any number of tokens, in as many parts as you like
    >>> y_t, state = layer.step(x_t, state)                 # generate; updates state in place
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_slots: int,
        segment_len: int,
        tau: float = 0.25,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(self, num_heads=num_heads, num_slots=num_slots, segment_len=segment_len)
        if not 0 < tau < math.inf:
            raise ValueError(f"{type(self).__name__}: tau is {tau}; expected a finite number > 0")
        self.head_dim = head_dim_of(type(self).__name__, embed_dim, num_heads)
        self.embed_dim, self.num_heads, self.num_slots = embed_dim, num_heads, num_slots
        self.segment_len, self.tau, self.backend, self.feature_dim = segment_len, tau, backend, 3 * embed_dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.token_proj = nn.Linear(embed_dim, 3 * embed_dim, bias=False, **factory)  # W_Q; W_k, W_v of the write
        self.read_proj = nn.Linear(embed_dim, 2 * embed_dim, bias=False, **factory)  # W_K', W_V'
        self.write_query_proj = nn.Linear(embed_dim, embed_dim, bias=False, **factory)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=False, **factory)
        self.slot_bias = nn.Parameter(torch.empty(num_slots, embed_dim, **factory))
        self._reset_slots()

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        super().reset_parameters()
        self._reset_slots()

    def _reset_slots(self) -> None:
        nn.init.normal_(self.slot_bias, std=self.embed_dim**-0.5)

    def _empty(self, batch: int, like: Tensor) -> SlotMemory:
        dtype = torch.promote_types(like.dtype, torch.float32)
        slots = like.new_zeros(batch, self.num_slots, self.embed_dim, dtype=dtype)
        return SlotMemory(slots, like.new_zeros(batch, dtype=torch.int64))

    def _slots(self, memory: SlotMemory) -> Tensor:
        bias = self.slot_bias.to(memory.slots.dtype)
        return memory.or_initial(F.normalize(bias, dim=-1))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.num_heads, self.head_dim)

    def _features(self, x: Tensor) -> Tensor:
        return self.token_proj(x)

    def _read(self, memory: SlotMemory, features: Tensor) -> Tensor:
        queries = features[..., : self.embed_dim]
        slots = self._slots(memory).to(self.read_proj.weight.dtype)
        keys, values = self.read_proj(slots).to(features.dtype).chunk(2, -1)
        heads = (self._heads(x) for x in (queries, keys, values))
        return self.out_proj(attention(*heads, causal=False, backend=self.backend).o.flatten(2))

    def _read_token(self, memory: SlotMemory, open: Tensor, filled: Tensor) -> Tensor:
        return self._read(memory, open.gather(1, filled[:, None, None].expand(-1, -1, open.shape[2])))

    def _write(self, memory: SlotMemory, features: Tensor) -> SlotMemory:
        slots = self._slots(memory)
        narrow = slots.to(self.token_proj.weight.dtype)
        key_weight = self.token_proj.weight[self.embed_dim : 2 * self.embed_dim]
        q, k_self = self.write_query_proj(narrow).to(features.dtype), F.linear(narrow, key_weight).to(features.dtype)
        _, k, v = features.chunk(3, -1)
        heads = (self._heads(x) for x in (q, k_self, slots.to(features.dtype), k, v))
        update = slot_write(*heads, tau=self.tau, backend=self.backend).o.flatten(2)
        return SlotMemory(slot_gate(slots, update, "bias_l2", bias=self.slot_bias), memory.written + 1)

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, num_slots={self.num_slots}, "
            f"segment_len={self.segment_len}, tau={self.tau}"
        )
