"""DeepSeek Sparse Attention's lightning indexer (DeepSeek-V3.2, arXiv 2512.02556), over grouped-query attention."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn.block_retrieval import BlockRetrieval, Seen, block_ends
from memattn.nn.inputs import check_sizes
from memattn.nn.kv_cache import KVCache
from memattn.nn.padding import valid_runs
from memattn.nn.rotary import rotary
from memattn.ops.block_scores import block_scores


class IndexedCache(KVCache):
    """All past tokens, and of each a vector to choose it by: index [N, capacity, 1, index_dim]."""

    fields: ClassVar[tuple[str, ...]] = ("k", "v", "length", "index")

    def __init__(self, k: Tensor, v: Tensor, length: Tensor, index: Tensor) -> None:
        super().__init__(k, v, length)
        self.index = index

    def _first(self, slots: int) -> IndexedCache:
        return IndexedCache(self.k[:, :slots], self.v[:, :slots], self.length, self.index[:, :slots])


class LightningIndexerAttention(BlockRetrieval):
    """Every query attends to the `top_tokens` tokens that a small learnt indexer scores highest.

        I_ts = Σ_h w_th ReLU(q^I_th · k^I_s)        w_t = weight_proj x_t / √(index_heads · index_dim)
        o_t: softmax attention to the top_tokens tokens s ≤ t of largest I_ts, one list for all heads

    k^I = LayerNorm(index_k_proj x), one per token. The first index_dim / 2 channels of q^I and k^I are turned by the
    position. With top_tokens at least the number of tokens this is causal attention. The published attention is MLA and
    the published indexer works in fp8 on rotated (Hadamard) vectors; here it is grouped-query attention, in the layer's
    own dtype.

    The choice has no gradient: the indexer learns from `indexer_loss` alone, which passes none to x, first over all
    tokens while the attention is trained densely, then over the chosen ones.

    Defaults of the indexer are the published ones. The state is a `BlockRetrievalState` whose cache also holds k^I.
    Arguments: num_kv_heads, head_dim, rope_base (of the indexer too), qk_norm, norm_eps, bias as in `AttentionLayer`;
    backend of the attention over the chosen tokens; calls as in `GatedDeltaNet`.

    >>> layer = LightningIndexerAttention(256, num_heads=4, index_heads=8, index_dim=32, top_tokens=64)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        index_heads: int = 64,
        index_dim: int = 128,
        top_tokens: int = 2048,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_base: float | None = 10000.0,
        qk_norm: bool = False,
        norm_eps: float = 1e-6,
        bias: bool = False,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            block=1,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope_base=rope_base,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            bias=bias,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        check_sizes(self, index_heads=index_heads)
        self._check_chosen(top_tokens=top_tokens)
        if index_dim < 4 or index_dim % 4:
            raise ValueError(f"LightningIndexerAttention: index_dim is {index_dim}; expected a positive multiple of 4")
        self.index_heads, self.index_dim, self.top_tokens = index_heads, index_dim, top_tokens
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.index_q_proj = nn.Linear(embed_dim, index_heads * index_dim, bias=False, **factory)
        self.index_k_proj = nn.Linear(embed_dim, index_dim, bias=False, **factory)
        self.index_norm = nn.LayerNorm(index_dim, **factory)
        self.weight_proj = nn.Linear(embed_dim, index_heads, bias=False, **factory)

    def _turned(self, y: Tensor, positions: Tensor) -> Tensor:
        if self.rope_base is None:
            return y
        half = self.index_dim // 2
        return torch.cat([rotary(y[..., :half], positions, self.rope_base), y[..., half:]], -1)

    def _index_queries(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q^I [B, T, index_heads, index_dim] and w [B, T, index_heads]."""
        q = self.index_q_proj(x).view(*x.shape[:2], self.index_heads, self.index_dim)
        weight = self.weight_proj(x) * (self.index_heads * self.index_dim) ** -0.5
        return self._turned(q, positions), weight

    def _tokens(self, x: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        index_k = self.index_norm(self.index_k_proj(x))[:, :, None]
        return *super()._tokens(x, positions), self._turned(index_k, positions)

    def _summarise(self, k: Tensor, v: Tensor) -> None:
        return None

    def _token_cache(self, like: Tensor, batch: int, max_tokens: int | None) -> IndexedCache:
        plain = super()._token_cache(like, batch, max_tokens)
        index = like.new_zeros(batch, plain.capacity, 1, self.index_dim)
        return IndexedCache(plain.k, plain.v, plain.length, index)

    def _new_cache(self, parts: list[Tensor], length: Tensor) -> IndexedCache:
        return IndexedCache(parts[0], parts[1], length, parts[2])

    def _attend(self, q: Tensor, x: Tensor, seen: Seen) -> Tensor:
        keys = cast("IndexedCache", seen.cache).index
        if seen.pages is not None:
            keys = keys.index_select(0, seen.pages[:, 0].long().clamp(min=0))
        return self._listed(q, self._chosen(x, keys, seen.positions), seen, 1)

    def _chosen(self, x: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        """[B, S, 1, top_tokens] tokens of largest I."""
        with torch.no_grad():
            q, weight = self._index_queries(x, positions)
        return self._choose(
            lambda at: block_scores(
                q[:, at].to(keys.dtype), keys, kind="relu", weight=weight[:, at].to(keys.dtype), over="heads",
                block_ends=block_ends(keys, 1), q_positions=positions[:, at],
            ),
            positions, keys.shape[1], self.top_tokens,
        )  # fmt: skip

    def indexer_loss(
        self,
        x: Tensor,
        *,
        chosen: bool = True,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The mean over valid tokens t of KL(p_t ‖ softmax_s I_ts): a scalar, float32, by which the indexer learns.

        p_t: the attention weights of all heads, averaged; a constant. chosen: over the tokens that the indexer chooses
        (p_t normalised there), as in sparse training; else over all s ≤ t, as in the dense warm-up, where scores of
        all pairs are held at once. Gradients reach the indexer's parameters alone. x, attention_mask, cu_seqlens as in
        `forward`, which need not be called. No valid token: 0.
        """
        self._padded(x, None, None)
        runs = valid_runs(type(self).__name__, x, attention_mask, cu_seqlens)
        rows = (x if runs is None else runs.align(x)).detach()
        positions = torch.arange(rows.shape[1], device=x.device).expand(len(rows), -1)
        q, k, v, index_k = self._tokens(rows, positions)
        index_q, weight = (y.to(index_k.dtype) for y in self._index_queries(rows, positions))
        lists = self._chosen(rows, index_k.detach(), positions) if chosen else None
        places: dict[str, Any] = {"indices": lists}
        if lists is None:
            places = {"block_ends": block_ends(k, 1), "q_positions": positions}
        scores = block_scores(index_q, index_k, kind="relu", weight=weight, over="heads", **places)
        seen = scores > -torch.inf
        with torch.no_grad():
            p = block_scores(q, k, scale=self.head_dim**-0.5, norm="softmax", over="heads", reduce="mean", **places)
            p = p.masked_fill(~seen, 0.0)
        log_q = F.log_softmax(scores, -1).masked_fill(~seen, 0.0)
        divergence = (torch.xlogy(p, p) - p * log_q).sum((-1, -2))  # [B, S]
        if runs is None:
            return divergence.sum() / max(1, divergence.numel())
        return torch.where(runs.valid, divergence, 0.0).sum() / runs.valid.sum().clamp(min=1)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, index_heads={self.index_heads}, index_dim={self.index_dim}, "
            f"top_tokens={self.top_tokens}"
        )
