"""Transformer-XL's attention (Dai et al. 2019, arXiv 1901.02860): a memory of earlier inputs, relative positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn.attention_layer import AttentionLayer
from memattn.nn.inputs import check_state, check_step
from memattn.nn.kv_cache import HiddenMemory, JoinedRows, NewRows
from memattn.nn.rotary import angles
from memattn.ops import _checks as check
from memattn.ops.attention import attention

WIDEST = 256  # head dimension of the kernels
DEVIATION = 0.02  # of u and w at the start, as in the authors' code


class TransformerXL(AttentionLayer):
    """Attention to the layer's last inputs, with scores of content and of distance and no gradient into the memory.

    s_ij = ((q_i + u)·k_j + (q_i + w)·W_R R_{i−j}) / √head_dim,  R_n = [sin(n ω), cos(n ω)],  ω_f = 10000^(−2f/P)

    k_j and v_j are projections of the input at j, whether that is in the memory or in this call; u and w are one vector
    per head. With a = W_Rᵀ(q_i + w), the second term is a product of a feature of i and one of j,

        a·R_{i−j} = Σ_f (a_sin sin iω + a_cos cos iω) cos jω + (a_cos sin iω − a_sin cos iω) sin jω,

    so nothing T×T is stored: keys gain the P = position_dim channels cos jω, sin jω. It defaults to embed_dim, as
    published; head_dim + position_dim may be at most 256, wider layers give a smaller one.

    same_length=True: each token sees the last memory_size tokens, its own included, wherever the text was cut into
    calls. False, as the authors train: all of the memory and all of its own call up to itself; a call is a segment.

    The state holds the last memory_size inputs, and every call projects them again, as published: a step costs
    memory_size · embed_dim · 2 · num_heads · head_dim products. Residual and norm are left to the block around it.
    Initialisation: u and w normal with a deviation of 0.02 as in the authors' code (kimiyoung/transformer-xl),
    projections as torch.nn.Linear. Arguments: head_dim, bias as in `AttentionLayer`; calls as in `GatedDeltaNet`.

    >>> layer = TransformerXL(128, num_heads=4, memory_size=64)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        memory_size: int,
        position_dim: int | None = None,
        same_length: bool = True,
        head_dim: int | None = None,
        bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, head_dim=head_dim, bias=bias, backend=backend, device=device, dtype=dtype
        )
        if memory_size < 1:
            raise ValueError(f"TransformerXL: memory_size is {memory_size}; expected at least 1")
        self.memory_size, self.same_length = memory_size, same_length
        self.position_dim = embed_dim if position_dim is None else position_dim
        room = WIDEST - self.head_dim
        if not 2 <= self.position_dim <= room or self.position_dim % 2:
            raise ValueError(
                f"TransformerXL: position_dim is {self.position_dim}; allowed with head_dim {self.head_dim}: an even "
                f"number 2..{room - room % 2}"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.position_proj = nn.Linear(self.position_dim, num_heads * self.head_dim, bias=False, **factory)  # W_R
        self.content_bias = nn.Parameter(torch.empty(num_heads, self.head_dim, **factory))  # u
        self.position_bias = nn.Parameter(torch.empty(num_heads, self.head_dim, **factory))  # w
        self._reset_biases()

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        super().reset_parameters()
        self._reset_biases()

    def _reset_biases(self) -> None:
        for bias in (self.content_bias, self.position_bias):
            nn.init.normal_(bias, std=DEVIATION)

    def init_state(self, batch: int, max_tokens: int | None = None) -> HiddenMemory:
        """The empty memory of `batch` sequences, on the parameters' device. Its size is fixed, whatever max_tokens."""
        weight = self.qkv_proj.weight
        return HiddenMemory(
            weight.new_zeros(batch, self.memory_size, self.embed_dim), weight.new_zeros(batch, dtype=torch.int64)
        )

    def forward(
        self,
        x: Tensor,
        state: HiddenMemory | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Any:
        """All tokens at once; arguments and results as in `CachedAttention.forward`. No gradient enters `state`."""
        padded = self._padded(x, attention_mask, cu_seqlens)
        if padded is not None:
            x = padded.align(x)
        new = NewRows(x, None if padded is None else padded.length, cu_seqlens)
        if state is not None:
            check_state(self, state, HiddenMemory, len(new.count))
        o = self._alone(x, new, cu_seqlens) if state is None else self._with_memory(x, state.detach(), new)
        y = self._readout(o, x)
        if padded is not None:
            y = padded.restore(y)
        if not return_state:
            return y
        before = self.init_state(len(new.count)) if state is None else state
        return y, before.detach().extended(x.detach(), new=new)

    def step(
        self, x: Tensor, state: HiddenMemory, *, state_indices: Tensor | None = None
    ) -> tuple[Tensor, HiddenMemory]:
        """One or a few tokens per sequence, for generation: changes `state` and returns it. Without gradients.

        x [B, t, embed_dim], t ≥ 1. state_indices [B]: the state row of each batch row, distinct; −1 is padding, its
        output is 0 and nothing is written. None: row b belongs to batch row b.
        """
        check_step(self, x, state, HiddenMemory, state_indices)
        check.inference_only("TransformerXL.step", "the layer itself", x, self.qkv_proj.weight)
        rows = state if state_indices is None else state.reorder(state_indices.long().clamp(min=0))
        y = self._readout(self._with_memory(x, rows, NewRows(x)), x)
        state.append(x, rows=state_indices)
        return y if state_indices is None else torch.where((state_indices >= 0)[:, None, None], y, 0), state

    def _alone(self, x: Tensor, new: NewRows, cu_seqlens: Tensor | None) -> Tensor:
        positions = new.positions(torch.zeros_like(new.count))
        q, k, v = self._scored(x, x, positions, positions)
        return attention(q, k, v, cu_seqlens_q=cu_seqlens, **self._settings()).o

    def _with_memory(self, x: Tensor, memory: HiddenMemory, new: NewRows) -> Tensor:
        """Every row of the batch as a packed sequence of what its memory holds and of its new tokens."""
        joined = JoinedRows(memory, new)
        inputs = joined.gather(memory.x, x)
        q, k, v = self._scored(x, inputs, new.positions(memory.held()), joined.local[None])
        o = attention(
            q.reshape(1, -1, *q.shape[2:]),
            k,
            v,
            cu_seqlens_q=joined.cu_queries,
            cu_seqlens_k=joined.cu_keys,
            q_offset="end",
            **self._settings(),
        ).o
        return o.view(*x.shape[:2], *o.shape[2:])

    def _scored(
        self, x: Tensor, inputs: Tensor, query_positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q of x [B, T, ...], k and v of inputs [1 or B, S, ...]; q·k is the whole score, up to its scale."""
        width = self._split[0]
        weight, bias = self.qkv_proj.weight, self.qkv_proj.bias
        q = F.linear(x, weight[:width], None if bias is None else bias[:width])
        k, v = F.linear(inputs, weight[width:], None if bias is None else bias[width:]).chunk(2, -1)
        q, k, v = (y.view(*y.shape[:2], self.num_heads, self.head_dim) for y in (q, k, v))
        by_content, by_distance = q + self.content_bias.to(q.dtype), q + self.position_bias.to(q.dtype)
        matrix = self.position_proj.weight.to(q.dtype).view(self.num_heads, self.head_dim, self.position_dim)
        a = torch.einsum("bthk,hkp->bthp", by_distance, matrix)
        sums = torch.promote_types(a.dtype, torch.float32)
        a_sin, a_cos = a.to(sums).chunk(2, -1)
        sin, cos = self._waves(query_positions, sums)
        by_distance = torch.cat([a_sin * sin + a_cos * cos, a_cos * sin - a_sin * cos], -1).to(q.dtype)
        sin, cos = self._waves(key_positions, sums)
        waves = torch.cat([cos, sin], -1).to(k.dtype).expand(*k.shape[:3], -1)
        return torch.cat([by_content, by_distance], -1), torch.cat([k, waves], -1), v

    def _waves(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """sin and cos of positions [B, T] times ω: [B, T, 1, P/2]."""
        angle = angles(positions, self.position_dim // 2, 10000.0)[..., None, :]
        return angle.sin().to(dtype), angle.cos().to(dtype)

    def _settings(self) -> dict[str, Any]:
        window = self.memory_size if self.same_length else None
        return {"window": window, "scale": self.head_dim**-0.5, "backend": self.backend}

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, memory_size={self.memory_size}, position_dim={self.position_dim}"
        return text if self.same_length else f"{text}, same_length=False"
