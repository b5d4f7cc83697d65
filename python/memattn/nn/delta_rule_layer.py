"""What the delta-rule layers share: projections, short convolution, padding, state, readout."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from memattn.nn.gated_rms_norm import GatedRMSNorm
from memattn.nn.inputs import check_sizes, check_state, check_step, check_tokens
from memattn.nn.padding import PaddedRows
from memattn.nn.short_conv import ShortConv
from memattn.ops.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from memattn.state import MemoryState


class DeltaRuleState(MemoryState):
    """memory [N, HV, K, V], one matrix per value head; conv [N, 2·H·K + HV·V, W−1], the convolution's last inputs."""

    fields: ClassVar[tuple[str, ...]] = ("memory", "conv")

    def __init__(self, memory: Tensor, conv: Tensor) -> None:
        self.memory = memory
        self.conv = conv


class DeltaRuleLayer(nn.Module):
    """Base of DeltaNet and GatedDeltaNet, which add their gates and say what reads the memory out.

    x → qkv_proj → conv + SiLU → q, k (normalised in the op), v → delta rule → RMSNorm per head [· silu(gate_proj x)]
    → out_proj.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_value_heads: int | None = None,
        value_head_dim: int | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        output_gate: bool,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(self, num_heads=num_heads)
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(
                f"{type(self).__name__}: embed_dim {embed_dim} is no multiple of num_heads {num_heads}; give head_dim"
            )
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.head_dim = head_dim or embed_dim // num_heads
        self.num_value_heads = num_value_heads or num_heads
        self.value_head_dim = value_head_dim or self.head_dim
        if self.num_value_heads % num_heads:
            raise ValueError(
                f"{type(self).__name__}: num_value_heads is {self.num_value_heads}; "
                f"expected a multiple of num_heads {num_heads}"
            )
        self.allow_neg_eigval, self.chunk_size, self.backend = allow_neg_eigval, chunk_size, backend
        keys, values = num_heads * self.head_dim, self.num_value_heads * self.value_head_dim
        self._split = (keys, keys, values)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(embed_dim, sum(self._split), bias=False, **factory)
        self.conv = ShortConv(sum(self._split), conv_size, conv_bias, **factory)
        self.beta_proj = nn.Linear(embed_dim, self.num_value_heads, bias=False, **factory)
        self.gate_proj = nn.Linear(embed_dim, values, bias=False, **factory) if output_gate else None
        self.norm = GatedRMSNorm(self.value_head_dim, norm_eps, **factory)
        self.out_proj = nn.Linear(values, embed_dim, bias=False, **factory)

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        for child in cast("Iterator[Any]", self.children()):
            child.reset_parameters()

    def init_state(self, batch: int) -> DeltaRuleState:
        """The empty memory of `batch` sequences, on the parameters' device."""
        weight = self.qkv_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        _, width = self.conv.weight.shape
        return DeltaRuleState(
            weight.new_zeros(batch, self.num_value_heads, self.head_dim, self.value_head_dim, dtype=dtype),
            weight.new_zeros(batch, sum(self._split), width - 1, dtype=dtype),
        )

    def forward(
        self,
        x: Tensor,
        state: DeltaRuleState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, DeltaRuleState]:
        """All tokens at once, for training and prefill.

        x [B, T, embed_dim]. state: where each sequence starts, None for empty; it is not changed.
        attention_mask [B, T] bool or integer: one contiguous run of valid (nonzero) tokens per row. The others neither
        write nor decay, their output is 0, and the returned state is the one after the last valid token.
        cu_seqlens [N+1] int32/int64: x holds N sequences end to end, then B = 1 and the state has N rows.
        Returns y [B, T, embed_dim], or (y, new state) with return_state.
        """
        check_tokens(self, x)
        if state is not None:
            check_state(self, state, DeltaRuleState, None)  # the op checks its rows
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError(f"{type(self).__name__}: attention_mask and cu_seqlens are both given; allowed: one")
        rows = None if attention_mask is None or x.shape[1] == 0 else PaddedRows(attention_mask, x)
        if rows is not None:
            x = rows.align(x)
        qkv, conv = self.conv(
            self.qkv_proj(x),
            None if state is None else state.conv,
            return_tail=return_state,
            lengths=None if rows is None else rows.length,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        g, beta = self._gates(x)
        if rows is not None:
            g = None if g is None else torch.where(rows.valid[..., None], g, 0.0)
            beta = torch.where(rows.valid[..., None], beta, 0.0)
        o, memory = gated_delta_rule(
            *self._heads(qkv),
            g,
            beta,
            initial_state=None if state is None else state.memory,
            output_final_state=return_state,
            qk_l2norm=True,
            cu_seqlens=cu_seqlens,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        y = self._readout(o, x)
        if rows is not None:
            y = rows.restore(y)
        if memory is None or conv is None:  # no return_state
            return y
        return y, DeltaRuleState(memory, conv)

    def step(
        self,
        x: Tensor,
        state: DeltaRuleState,
        *,
        state_indices: Tensor | None = None,
    ) -> tuple[Tensor, DeltaRuleState]:
        """One or a few tokens per sequence, for generation: changes `state` and returns it. Without gradients.

        x [B, t, embed_dim], t ≥ 1. state_indices [B]: the state row of each batch row, distinct; −1 is padding, its
        output is 0 and nothing is written. None: row b belongs to batch row b.
        """
        check_step(self, x, state, DeltaRuleState, state_indices)
        qkv = self.conv.step(self.qkv_proj(x), state.conv, state_indices=state_indices, backend=self.backend)
        g, beta = self._gates(x)
        o = gated_delta_rule_step(
            *self._heads(qkv),
            g,
            beta,
            state.memory,
            state_indices=state_indices,
            qk_l2norm=True,
            backend=self.backend,
        )
        return self._readout(o, x), state

    def _gates(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Log decay (None: no decay) and writing strength of every value head, [B, T, HV] in the state's dtype."""
        raise NotImplementedError

    def _beta(self, x: Tensor) -> Tensor:
        logits = self.beta_proj(x)
        beta = logits.to(torch.promote_types(logits.dtype, torch.float32)).sigmoid()
        return 2 * beta if self.allow_neg_eigval else beta

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, 2·H·K + HV·V] -> q, k [B, T, H, K], v [B, T, HV, V]."""
        q, k, v = qkv.split(self._split, -1)
        # Not unflatten, which does not compile under torch.set_default_device.
        return (
            q.view(*q.shape[:2], self.num_heads, self.head_dim),
            k.view(*k.shape[:2], self.num_heads, self.head_dim),
            v.view(*v.shape[:2], self.num_value_heads, self.value_head_dim),
        )

    def _readout(self, o: Tensor, x: Tensor) -> Tensor:
        gate = None if self.gate_proj is None else self.gate_proj(x).view_as(o)
        return self.out_proj(self.norm(o, gate).flatten(-2))

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"
        if (self.num_value_heads, self.value_head_dim) != (self.num_heads, self.head_dim):
            text += f", num_value_heads={self.num_value_heads}, value_head_dim={self.value_head_dim}"
        if self.allow_neg_eigval:
            text += ", allow_neg_eigval=True"
        for name in ("chunk_size", "backend"):
            if getattr(self, name) is not None:
                text += f", {name}={getattr(self, name)!r}"
        return text
