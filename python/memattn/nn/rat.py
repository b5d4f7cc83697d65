"""RAT (Wei et al. 2025, arXiv 2507.04416) and RAT+ (arXiv 2602.18196): attention to what a gated average leaves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn.padding import PaddedRows
from memattn.ops.rat_attention import RATState, rat_attention, rat_attention_step

FIRST_ROOM = 16  # entries of a state that is to grow


class _RATLayer(nn.Module):
    """What RAT and RATPlus share: x → in_proj → z, v, g, q, k → rat_attention → out_proj(σ(z) ⊙ o)."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_groups: int,
        head_dim: int | None,
        rope_base: float | None,
        gate_bias: bool,
        backend: str | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"{name}: embed_dim {embed_dim} is no multiple of num_heads {num_heads}; give head_dim")
        self.embed_dim, self.num_heads, self.num_groups = embed_dim, num_heads, num_groups
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        if num_groups < 1 or num_heads % num_groups:
            raise ValueError(f"{name}: num_groups is {num_groups}; expected a divisor of num_heads {num_heads}")
        if not 16 <= self.head_dim <= 256 or (rope_base is not None and self.head_dim % 2):
            raise ValueError(f"{name}: head_dim is {self.head_dim}; allowed: 16..256, even with rope_base")
        self.rope_base, self.backend = rope_base, backend
        width, shared = num_heads * self.head_dim, num_groups * self.head_dim
        self._split = (width, width, width, shared, shared)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(embed_dim, sum(self._split), bias=False, **factory)
        self.gate_bias = nn.Parameter(torch.empty(width, **factory)) if gate_bias else None
        self.out_proj = nn.Linear(width, embed_dim, bias=False, **factory)

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        self.in_proj.reset_parameters()
        self.out_proj.reset_parameters()

    def _settings(self) -> dict[str, Any]:
        """The arguments of `rat_attention` that are no tensors."""
        raise NotImplementedError

    def _stride(self) -> int:
        """Tokens per entry."""
        raise NotImplementedError

    def _local(self) -> int:
        """Rows of a state that keep a prefix and a window."""
        return 0

    def init_state(self, batch: int, max_tokens: int | None = None) -> RATState:
        """The empty memory of `batch` sequences, on the parameters' device. max_tokens: room from the start.

        Without it `step` makes room as the text grows, which it cannot under torch.compile and CUDA graphs.
        """
        weight, heads = self.in_proj.weight, (self.num_heads, self.head_dim)
        entries = FIRST_ROOM if max_tokens is None else max_tokens // self._stride()
        wide = torch.promote_types(weight.dtype, torch.float32)
        keys, values = (weight.new_zeros(batch, entries, *heads) for _ in range(2))
        key, value = (weight.new_zeros(batch, *heads, dtype=wide) for _ in range(2))
        length = weight.new_zeros(batch, dtype=torch.int64)
        if self._local() == 0:
            return RATState(keys, values, key, value, length)
        local = (weight.new_zeros(batch, self._local(), *heads) for _ in range(2))
        return RATState(keys, values, key, value, length, *local)

    def forward(
        self,
        x: Tensor,
        state: RATState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, RATState]:
        """All tokens at once, for training and prefill.

        x [B, T, embed_dim]. state: where each sequence starts, None for empty; it is not changed.
        attention_mask [B, T] bool or integer: one contiguous run of valid (nonzero) tokens per row. The others are seen
        by nobody, their output is 0, and the returned state is the one after the last valid token.
        cu_seqlens [N+1] int32/int64: x holds N sequences end to end, then B = 1 and the state has N rows.
        Returns y [B, T, embed_dim], or (y, new state) with return_state.
        """
        self._check(x)
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError(f"{type(self).__name__}: attention_mask and cu_seqlens are both given; allowed: one")
        rows = None if attention_mask is None or x.shape[1] == 0 else PaddedRows(attention_mask, x)
        if rows is not None:
            x = rows.align(x)
        gate, *tensors = self._heads(x)
        state = None if state is None else _entries_as(state, tensors[0].dtype)
        if rows is None:
            o, after = self._attend(tensors, state, cu_seqlens, return_state)
        else:
            o, after = self._attend_padded(tensors, state, rows.length, return_state)
        y = self._readout(gate, o)
        if rows is not None:
            y = rows.restore(y)
        return y if after is None else (y, after)

    def step(self, x: Tensor, state: RATState, *, state_indices: Tensor | None = None) -> tuple[Tensor, RATState]:
        """One or a few tokens per sequence, for generation: changes `state` and returns it. Without gradients.

        x [B, t, embed_dim], t ≥ 1. state_indices [B]: the state row of each batch row, distinct; −1 is padding, its
        output is 0 and nothing is written. None: row b belongs to batch row b.
        """
        self._check(x)
        state.make_room(x.shape[1], self._stride())
        gate, *qkv, g = self._heads(x)
        q, k, v = (y.to(state.keys.dtype) for y in qkv)  # under autocast the state may be wider
        o = rat_attention_step(
            q, k, v, g, state, state_indices=state_indices, head_map="tile", backend=self.backend, **self._settings()
        )
        return self._readout(gate, o.to(gate.dtype)), state

    def _heads(self, x: Tensor) -> list[Tensor]:
        """x [B, T, embed_dim] -> z [B, T, H·K], q, k [B, T, G, K], v [B, T, H, K], log gate [B, T, H, K]."""
        z, v, g, q, k = self.in_proj(x).split(self._split, -1)
        g = g.to(torch.promote_types(g.dtype, torch.float32))
        if self.gate_bias is not None:
            g = g + self.gate_bias.to(g.dtype)
        # Not unflatten, which does not compile under torch.set_default_device.
        shape, shared = ((*x.shape[:2], heads, self.head_dim) for heads in (self.num_heads, self.num_groups))
        return [z, q.view(shared), k.view(shared), v.view(shape), F.logsigmoid(g).view(shape)]

    def _attend(self, tensors, state, cu_seqlens, return_state):  # tensors: q, k, v, g
        return rat_attention(
            *tensors, initial_state=state, output_final_state=return_state, cu_seqlens=cu_seqlens, head_map="tile",
            backend=self.backend, **self._settings(),
        )  # fmt: skip

    def _attend_padded(self, tensors, state, length, return_state):
        """Every row as two packed sequences: its tokens, which own its state, and the padding behind them."""
        batch, tokens = tensors[0].shape[:2]
        start = torch.arange(batch, device=length.device) * tokens
        bounds = torch.stack((start, start + length), 1).flatten()
        bounds = torch.cat((bounds, bounds.new_full((1,), batch * tokens)))
        if state is not None:
            state = state._map(lambda owner, name, x: torch.stack((x, torch.zeros_like(x)), 1).flatten(0, 1))
        packed = [x.reshape(1, -1, *x.shape[2:]) for x in tensors]
        o, after = self._attend(packed, state, bounds, return_state)
        return o.view(batch, tokens, *o.shape[2:]), None if after is None else after._map(lambda owner, name, x: x[::2])

    def _readout(self, gate: Tensor, o: Tensor) -> Tensor:
        return self.out_proj(gate.sigmoid() * o.flatten(-2))

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(
                f"{type(self).__name__}: x has shape {list(x.shape)}; expected [B, T, embed_dim] with {self.embed_dim}"
            )

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}, num_groups={self.num_groups}"
        text += "".join(f", {name}={value}" for name, value in self._settings().items() if value is not None)
        return text if self.backend is None else f"{text}, backend={self.backend!r}"


def _entries_as(state: RATState, dtype: torch.dtype) -> RATState:
    """The state with its entries in q's dtype, which autocast may have changed; averages stay wide."""
    narrow = ("keys", "values", "local_keys", "local_values")
    return state._map(lambda owner, name, x: x.to(dtype) if name in narrow else x)


class RAT(_RATLayer):
    """Averages keys and values inside chunks and attends to the chunks' last averages.

    Cache and softmax are 1/chunk_size as long as attention's.

    z, v, g, q, k = in_proj x; k̃_t = γ_t ⊙ k̃_{t−1} + (1 − γ_t) ⊙ k_t and ṽ likewise with γ = σ(g + gate_bias) per
    channel, from zero at every chunk; o = attention of q to the ends of earlier chunks and the token's own k̃, ṽ, with
    rotary positions of chunks; y = out_proj(σ(z) ⊙ o). q and k have num_groups heads, tiled over the others. Gates,
    averages and softmax are float32. Residual and norm are the block's: the authors' layer holds a pre-norm as well.

    gate_bias starts as the logarithm of a uniform draw from (1, chunk_size − 1), so that a channel remembers between
    one token and a chunk (chrono initialisation, as in the authors' rat.py); projections start as torch.nn.Linear.
    Weight decay is meant for the projections only.

    >>> layer = RAT(256, num_heads=4, chunk_size=16)
    >>> y = layer(x)                                        # train
    >>> y, state = layer(prompt, return_state=True)         # prefill, in as many parts as you like
    >>> y_t, state = layer.step(x_t, state)                 # generate; updates state in place
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_groups: int = 2,
        chunk_size: int = 16,
        head_dim: int | None = None,
        rope_base: float | None = 10000.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, num_groups=num_groups, head_dim=head_dim, rope_base=rope_base, gate_bias=True,
            backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        if chunk_size < 1:
            raise ValueError(f"RAT: chunk_size is {chunk_size}; expected at least 1")
        self.chunk_size = chunk_size
        self._reset_gate()

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        super().reset_parameters()
        self._reset_gate()

    @torch.no_grad()
    def _reset_gate(self) -> None:
        if self.gate_bias is not None:
            memory = torch.empty_like(self.gate_bias, dtype=torch.float32)
            self.gate_bias.copy_(memory.uniform_(1.0, max(self.chunk_size - 1.0, 1.0 + math.ulp(1.0))).log())

    def _settings(self) -> dict[str, Any]:
        return {"chunk_size": self.chunk_size, "rope_base": self.rope_base}

    def _stride(self) -> int:
        return self.chunk_size


class RATPlus(_RATLayer):
    """RAT with one average through the whole sequence, for dense training and sparse use.

    As `RAT`, with a key per head, no gate bias, no restarts, and rotary positions of tokens. A token attends to the
    averages j ≤ t with (j + 1) mod dilation = 0, t − j < window or j < prefix_len, and to its own. dilation=1 is dense
    and what the authors train with; `dilation`, `window` and `prefix_len` may be set on the trained layer, the cache
    then shrinks to T/dilation + prefix_len + window − 1 rows. A state belongs to the setting that made it.

    Arguments otherwise and calls as in `RAT`. The paper's window W is window = W + 1 here.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        dilation: int = 1,
        window: int = 0,
        prefix_len: int = 0,
        num_groups: int | None = None,
        head_dim: int | None = None,
        rope_base: float | None = 10000.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim, num_heads, num_groups=num_groups or num_heads, head_dim=head_dim, rope_base=rope_base,
            gate_bias=False, backend=backend, device=device, dtype=dtype,
        )  # fmt: skip
        for name, size, least in (("dilation", dilation, 1), ("window", window, 0), ("prefix_len", prefix_len, 0)):
            if size < least:
                raise ValueError(f"RATPlus: {name} is {size}; expected at least {least}")
        self.dilation, self.window, self.prefix_len = dilation, window, prefix_len

    def _settings(self) -> dict[str, Any]:
        return {
            "chunk_size": None, "dilation": self.dilation, "window": self.window, "prefix_len": self.prefix_len,
            "rope_base": self.rope_base,
        }  # fmt: skip

    def _stride(self) -> int:
        return self.dilation

    def _local(self) -> int:
        return self.prefix_len + max(self.window, 1) - 1
