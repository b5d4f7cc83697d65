"""Lizard layer (arXiv 2507.09025): a gated linear memory of all tokens plus softmax attention to the last few."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn.attention_layer import CachedAttention
from memattn.nn.inputs import check_state
from memattn.nn.kv_cache import NewRows, WindowCache
from memattn.ops import _checks as check
from memattn.ops.attention import AttentionOutput, attention
from memattn.ops.attention_decode import attention_decode
from memattn.ops.feature_maps import ACTIVATIONS, hedgehog
from memattn.ops.linear_attention import linear_attention, linear_attention_step
from memattn.ops.merge_states import gated_combine
from memattn.state import MemoryState

META = ("sink_logits", "prefix_tokens")


class LizardState(MemoryState):
    """memory [N, H, 2F, V] of the global branch (V+1 with normalize: the last column is z), and the window's tokens."""

    fields: ClassVar[tuple[str, ...]] = ("memory", "window")

    def __init__(self, memory: Tensor, window: WindowCache) -> None:
        self.memory, self.window = memory, window


class Lizard(CachedAttention):
    """Two branches on the same q, k, v, none with positions: y = out_proj(Y^g + α Y^a).

    Y^g_i = φ_q(q_i) Σ_{t≤i} (Π_{l=t+1..i} γ_l) φ_k(k_t)ᵀ v_t [/ the same with 1 in place of v_t],  γ = σ(gate_proj x)
    Y^a_i = softmax attention to the last `window` tokens, its own included, and to the meta memory

    One γ per token for all heads; φ(x) = [f(xW) ⊕ f(−xW)] with a W per head (Hedgehog, arXiv 2402.04347). The paper
    prints the global branch with the denominator (normalize=True) and, in its recurrent and matrix forms, without
    (False); these are not equal. Its meta memory is read in two ways: meta="sink_logits" are num_meta logits per head
    in the softmax' denominator, without value; meta="prefix_tokens" are num_meta learnt keys and values that every
    token sees. num_meta=0: none.

    Defaults are the paper's: window 128, num_meta 4, feature_dim 128 for each half. num_kv_heads (default num_heads)
    shares keys and values among groups of heads. feature_dim is 8 to 128, head_dim 16 to 256.

    There is no official code; the equations are those of the paper's version 4 as transcribed by a reproduction. Not
    from the paper: α is one learnt number and starts at 1, W starts as the identity (as in Hedgehog's code), sinks
    start at 0, prefix tokens with deviation 0.02, projections as torch.nn.Linear.

    Calls and the rest of the arguments as in `SlidingWindowAttention`.

    >>> layer = Lizard(256, num_heads=4)
    """

    state_type = LizardState

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        window: int = 128,
        meta: str = "sink_logits",
        num_meta: int = 4,
        feature_dim: int = 128,
        activation: str = "softmax",
        normalize: bool = True,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            embed_dim,
            num_heads,
            rope_base=None,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            backend=backend,
            **factory,
        )
        name = type(self).__name__
        check.choice(name, "meta", meta, META)
        check.choice(name, "activation", activation, ACTIVATIONS)
        for argument, value, least, most in (
            ("window", window, 1, None), ("num_meta", num_meta, 0, None), ("feature_dim", feature_dim, 8, 128),
        ):  # fmt: skip
            if value < least or (most is not None and value > most):
                allowed = f"≥ {least}" if most is None else f"{least}..{most}"
                raise ValueError(f"{name}: {argument} is {value}; allowed: {allowed}")
        self.window, self.meta, self.num_meta, self.feature_dim = window, meta, num_meta, feature_dim
        self.activation, self.normalize = activation, normalize
        self.gate_proj = nn.Linear(embed_dim, 1, bias=False, **factory)
        self.q_features = nn.Parameter(torch.empty(num_heads, self.head_dim, feature_dim, **factory))
        self.k_features = nn.Parameter(torch.empty(self.num_kv_heads, self.head_dim, feature_dim, **factory))
        self.alpha = nn.Parameter(torch.empty(1, **factory))
        sinks, tokens = (num_meta if meta == kind else 0 for kind in META)
        shape = (1, tokens, self.num_kv_heads, self.head_dim)
        self.sink = nn.Parameter(torch.empty(num_heads, sinks, **factory)) if sinks else None
        self.meta_k = nn.Parameter(torch.empty(shape, **factory)) if tokens else None
        self.meta_v = nn.Parameter(torch.empty(shape, **factory)) if tokens else None
        self._reset_own()

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        super().reset_parameters()
        self._reset_own()

    @torch.no_grad()
    def _reset_own(self) -> None:
        for weight in (self.q_features, self.k_features):
            weight.copy_(torch.eye(self.head_dim, self.feature_dim, device=weight.device, dtype=weight.dtype))
        nn.init.ones_(self.alpha)
        if self.sink is not None:
            nn.init.zeros_(self.sink)
        for tokens in (self.meta_k, self.meta_v):
            if tokens is not None:
                nn.init.normal_(tokens, std=0.02)

    def init_state(self, batch: int, max_tokens: int | None = None) -> LizardState:
        """The empty memory of `batch` sequences, on the parameters' device. Its size does not depend on max_tokens."""
        weight = self.qkv_proj.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        columns = self.head_dim + int(self.normalize)
        memory = weight.new_zeros(batch, self.num_heads, 2 * self.feature_dim, columns, dtype=dtype)
        return LizardState(memory, self._cache(batch, max_tokens))

    def _cache(self, batch: int, max_tokens: int | None) -> WindowCache:
        dims = (self.head_dim, self.head_dim)
        return WindowCache.empty(self.qkv_proj.weight, batch, self.num_kv_heads, dims, self.window)

    def _mask(self) -> dict[str, Any]:
        sink = None if self.sink is None else self.sink.to(torch.promote_types(self.sink.dtype, torch.float32))
        return {"window": self.window, "sink": sink}

    def forward(
        self,
        x: Tensor,
        state: LizardState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, LizardState]:
        """All tokens at once, for training and prefill; arguments and results as in every layer of memattn.nn."""
        padded = self._padded(x, attention_mask, cu_seqlens)
        x = x if padded is None else padded.align(x)
        new = NewRows(x, None if padded is None else padded.length, cu_seqlens)
        if state is not None:
            check_state(self, state, LizardState, len(new.count))
        q, k, v = self._heads(x)
        g, features = self._log_gate(x), self._features(q, k, v)
        if padded is not None:  # padding neither decays nor writes
            g = torch.where(padded.valid[..., None], g, 0.0)
            features = (features[0], torch.where(padded.valid[..., None, None], features[1], 0.0), features[2])
        of_all, memory = linear_attention(
            *features, g, normalize=self.normalize, scale=1.0, initial_state=None if state is None else state.memory,
            output_final_state=return_state, cu_seqlens=cu_seqlens, backend=self.backend,
        )  # fmt: skip
        if state is None:
            recent = attention(q, k, v, cu_seqlens_q=cu_seqlens, backend=self.backend, **self._mask())
        else:
            recent = self._over_cache(q, k, v, None, state.window, new)
        y = self._joined(of_all, recent, q)
        y = y if padded is None else padded.restore(y)
        if memory is None:  # no return_state
            return y
        window = self._cache(len(new.count), None) if state is None else state.window
        return y, LizardState(memory, window.extended(k, v, new=new))

    def _step(self, x: Tensor, state: LizardState, rows: Tensor | None) -> Tensor:
        q, k, v = self._heads(x)
        of_all = linear_attention_step(
            *self._features(q, k, v), self._log_gate(x), state.memory, normalize=self.normalize, scale=1.0,
            state_indices=rows, backend=self.backend,
        )  # fmt: skip
        window = state.window
        window.append(k, v, rows=rows)
        recent = attention_decode(
            q.to(window.k.dtype), window.k, window.v, **window.lookup(rows), backend=self.backend, **self._mask()
        )
        y = self._joined(of_all, AttentionOutput(recent.o.to(q.dtype), recent.lse), q)
        return y if rows is None else torch.where((rows >= 0)[:, None, None], y, 0)

    def _steps_together(self, tokens: int, state: Any) -> bool:
        return tokens == 1  # a later token would overwrite in the ring what an earlier one still sees

    def _log_gate(self, x: Tensor) -> Tensor:
        """ln γ [B, T, H], the same for every head."""
        logits = self.gate_proj(x)
        return F.logsigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32))).expand(-1, -1, self.num_heads)

    def _features(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """φ_q(q), φ_k(k) [B, T, H, 2F] and v [B, T, H, V]: every head its own."""
        group = self.num_heads // self.num_kv_heads
        key = hedgehog(k, self.k_features, activation=self.activation)
        query = hedgehog(q, self.q_features, activation=self.activation)
        return query, key.repeat_interleave(group, 2), v.repeat_interleave(group, 2)

    def _joined(self, of_all: Any, recent: AttentionOutput, q: Tensor) -> Tensor:
        """out_proj(Y^g + α Y^a), Y^a being what one softmax over the window and the prefix tokens gives."""
        if self.meta_k is not None and self.meta_v is not None:
            k, v = (tokens.to(q.dtype).expand(q.shape[0], -1, -1, -1) for tokens in (self.meta_k, self.meta_v))
            recent = attention(q, k, v, causal=False, merge=recent, backend=self.backend)
        alpha = self.alpha.to(torch.promote_types(self.alpha.dtype, torch.float32)).expand(self.num_heads)
        return self._readout(gated_combine(of_all, recent.o, alpha, mode="add"), q)

    def extra_repr(self) -> str:
        text = super().extra_repr().removesuffix(f", rope_base={self.rope_base}")
        text += f", window={self.window}, meta={self.meta!r}, num_meta={self.num_meta}, feature_dim={self.feature_dim}"
        return f"{text}, activation={self.activation!r}, normalize={self.normalize}"
