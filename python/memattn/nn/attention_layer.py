"""What softmax-attention layers share: projections, padding, packing, position code, cache, and their three calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from memattn.nn.gated_rms_norm import GatedRMSNorm
from memattn.nn.inputs import check_sizes, check_state, check_step, check_tokens
from memattn.nn.kv_cache import JoinedRows, NewRows, TokenCache
from memattn.nn.padding import PaddedRows
from memattn.nn.rotary import rotary
from memattn.ops.attention import AttentionOutput, attention
from memattn.ops.attention_decode import attention_decode
from memattn.state import MemoryState


class AttentionLayer(nn.Module):
    """Base of layers with queries, keys and values of several heads: x → qkv_proj → heads … → out_proj.

    num_kv_heads (default num_heads) divides num_heads; head_dim defaults to embed_dim / num_heads. qk_norm: RMSNorm
    over each head of q and k, with a weight per channel. Projections start as torch.nn.Linear, `bias` for all of them.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(self, num_heads=num_heads)
        name = type(self).__name__
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"{name}: embed_dim {embed_dim} is no multiple of num_heads {num_heads}; give head_dim")
        self.embed_dim, self.num_heads, self.backend = embed_dim, num_heads, backend
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        if self.num_kv_heads < 1 or num_heads % self.num_kv_heads:
            raise ValueError(
                f"{name}: num_kv_heads is {self.num_kv_heads}; expected a divisor of num_heads {num_heads}"
            )
        if not 16 <= self.head_dim <= 256:
            raise ValueError(f"{name}: head_dim is {self.head_dim}; allowed: 16..256")
        queries, keys = num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self._split = (queries, keys, keys)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv_proj = nn.Linear(embed_dim, sum(self._split), bias=bias, **factory)
        self.q_norm = GatedRMSNorm(self.head_dim, norm_eps, **factory) if qk_norm else None
        self.k_norm = GatedRMSNorm(self.head_dim, norm_eps, **factory) if qk_norm else None
        self.out_proj = nn.Linear(queries, embed_dim, bias=bias, **factory)

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        for child in cast("Iterator[Any]", self.children()):
            child.reset_parameters()

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, embed_dim] -> q [B, T, HQ, D], k, v [B, T, HKV, D], q and k normalised if asked."""
        q, k, v = self.qkv_proj(x).split(self._split, -1)
        # Not unflatten, which does not compile under torch.set_default_device.
        q = q.view(*q.shape[:2], self.num_heads, self.head_dim)
        k, v = (y.view(*y.shape[:2], self.num_kv_heads, self.head_dim) for y in (k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _readout(self, o: Tensor, x: Tensor) -> Tensor:
        """o [B, T, HQ, D] -> y [B, T, embed_dim]; x is the layer's input."""
        return self.out_proj(o.flatten(-2))

    def _padded(self, x: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> PaddedRows | None:
        """The rows of x under a mask; checks x and that not both ways of telling lengths are used."""
        check_tokens(self, x)
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError(f"{type(self).__name__}: attention_mask and cu_seqlens are both given; allowed: one")
        return None if attention_mask is None or x.shape[1] == 0 else PaddedRows(attention_mask, x)

    def extra_repr(self) -> str:
        text = f"{self.embed_dim}, num_heads={self.num_heads}, head_dim={self.head_dim}"
        if self.num_kv_heads != self.num_heads:
            text += f", num_kv_heads={self.num_kv_heads}"
        return text if self.backend is None else f"{text}, backend={self.backend!r}"


class CachedAttention(AttentionLayer):
    """Base of layers whose state is a TokenCache: they name their cache and their mask, and may decay their keys.

    rope_base: rotary position code by the token's position in its sequence (keys are cached turned); None: no code.
    """

    state_type: type[MemoryState]

    def __init__(self, embed_dim: int, num_heads: int, *, rope_base: float | None = 10000.0, **settings: Any) -> None:
        super().__init__(embed_dim, num_heads, **settings)
        if rope_base is not None and self.head_dim % 2:
            raise ValueError(f"{type(self).__name__}: head_dim is {self.head_dim}; rotary positions need an even one")
        self.rope_base = rope_base

    def _cache(self, batch: int, max_tokens: int | None) -> Any:
        """An empty cache."""
        raise NotImplementedError

    def _mask(self) -> dict[str, Any]:
        """Mask and sink, as `attention` and `attention_decode` take them."""
        raise NotImplementedError

    def _log_decay(self, x: Tensor) -> Tensor | None:
        """Log decay of every token [B, T, HQ], in the accumulate dtype."""
        return None

    def forward(
        self,
        x: Tensor,
        state: Any = None,
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
        if state is not None:
            check_state(self, state, self.state_type, len(new.count))
        q, k, v = self._heads(x)
        log_decay = self._log_decay(x)
        if self.rope_base is not None:
            positions = new.positions(new.count.new_zeros(new.count.shape) if state is None else state.length)
            q, k = (rotary(y, positions, self.rope_base) for y in (q, k))
        before = state if state is not None or not return_state else self._cache(len(new.count), 0)
        c = None if log_decay is None or before is None else new.cumulated(log_decay, before.last_decay())
        if state is None:
            o = attention(q, k, v, log_decay=log_decay, cu_seqlens_q=cu_seqlens, backend=self.backend, **self._mask()).o
        else:
            o = self._over_cache(q, k, v, c, state, new).o
        y = self._readout(o, x)
        if padded is not None:
            y = padded.restore(y)
        if not return_state:
            return y
        return y, before.extended(k, v, c, new=new)

    def _over_cache(
        self, q: Tensor, k: Tensor, v: Tensor, c: Tensor | None, state: TokenCache, new: NewRows
    ) -> AttentionOutput:
        """Attention of the new tokens to the cached and to each other, every row a packed sequence."""
        joined = JoinedRows(state, new)
        log_decay = None
        if c is not None:
            sums = joined.gather(cast("Any", state).c, c)
            steps = torch.nn.functional.pad(sums.diff(dim=1), (0, 0, 1, 0))
            dtype = torch.promote_types(q.dtype, torch.float32)
            log_decay = torch.where(joined.inner[None, :, None], steps, 0.0).to(dtype)
        o, lse = attention(
            q.reshape(1, -1, *q.shape[2:]),
            joined.gather(cast("Any", state).k, k),
            joined.gather(cast("Any", state).v, v),
            log_decay=log_decay,
            cu_seqlens_q=joined.cu_queries,
            cu_seqlens_k=joined.cu_keys,
            q_offset="end",
            backend=self.backend,
            **self._mask(),
        )
        return AttentionOutput(o.view(*q.shape[:2], *o.shape[2:]), lse.view(q.shape[:3]))

    def step(self, x: Tensor, state: Any, *, state_indices: Tensor | None = None) -> tuple[Tensor, Any]:
        """One or a few tokens per sequence, for generation: changes `state` and returns it. Without gradients.

        x [B, t, embed_dim], t ≥ 1. state_indices [B]: the state row of each batch row, distinct; −1 is padding, its
        output is 0 and nothing is written. None: row b belongs to batch row b.
        """
        check_step(self, x, state, self.state_type, state_indices)
        tokens = [x] if self._steps_together(x.shape[1], state) else x.split(1, 1)
        outputs = [self._step(token, state, state_indices) for token in tokens]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state

    def _steps_together(self, tokens: int, state: TokenCache) -> bool:
        """Whether the cache can take so many tokens before the first of them has looked at it."""
        return True

    def _step(self, x: Tensor, state: Any, rows: Tensor | None) -> Tensor:
        q, k, v = self._heads(x)
        log_decay = self._log_decay(x)
        length = state.length if rows is None else state.length.index_select(0, rows.long().clamp(min=0))
        if self.rope_base is not None:
            positions = length[:, None] + torch.arange(x.shape[1], device=x.device)
            q, k = (rotary(y, positions, self.rope_base) for y in (q, k))
        if log_decay is None:
            state.append(k, v, rows=rows)
        else:
            state.append(k, v, state.last_decay(rows)[:, None] + log_decay.double().cumsum(1), rows=rows)
        o = attention_decode(
            q.to(state.k.dtype), state.k, state.v, **state.lookup(rows), backend=self.backend, **self._mask()
        ).o.to(q.dtype)
        y = self._readout(o, x)
        return y if rows is None else torch.where((rows >= 0)[:, None, None], y, 0)

    def init_state(self, batch: int, max_tokens: int | None = None) -> Any:
        """The empty cache of `batch` sequences, on the parameters' device. max_tokens: room from the start, which a
        cache that grows with the text needs under torch.compile and CUDA graphs."""
        return self._cache(batch, max_tokens)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rope_base={self.rope_base}"
