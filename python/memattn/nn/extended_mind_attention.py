"""Causal attention that also reads an external memory: a few nearest remembered tokens per query, in one softmax."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from memattn.nn.attention_layer import CachedAttention
from memattn.nn.inputs import check_state, check_tokens
from memattn.nn.kv_cache import KVCache, NewRows
from memattn.nn.padding import PackedRows, PaddedRows, check_mask, valid_runs
from memattn.nn.rotary import rotary
from memattn.ops.attention import AttentionOutput, attention
from memattn.ops.attention_decode import attention_decode
from memattn.ops.knn_attention import knn_attention
from memattn.ops.merge_states import merge_states
from memattn.ops.topk import TopK
from memattn.state import MemoryState


class ExtendedMindState(MemoryState):
    """cache: the text so far, keys turned to their positions. memory: what was remembered, keys not turned."""

    fields: ClassVar[tuple[str, ...]] = ("cache", "memory")

    def __init__(self, cache: KVCache, memory: KVCache) -> None:
        self.cache = cache
        self.memory = memory


class ExtendedMindAttention(CachedAttention):
    """Causal attention whose softmax also has, per query and head, the nearest `num_neighbors` tokens of a memory.

        I(i) = the num_neighbors tokens m of the memory with the largest cos(q_i, k_m), if at least `threshold`
        o_i  = Σ_{j ≤ i} e^{s_ij − ℓ_i} v_j + Σ_{m∈I(i)} e^{s_im − ℓ_i} v_m,   s = q·k / √head_dim, one ℓ_i for both

    Extended Mind Transformers (Klett and Ahle 2024, arXiv 2406.02332): the selection is by cosine, the scores are not
    normalised. q_i is turned to its position in the text, remembered keys are not turned, as if all stood at position
    0. Nothing is learnt: the layer has the weights of plain attention. `remember` puts the layer's inputs of some text
    into the memory; `return_found=True` tells which of them each token read, so that they can be cited. With an empty
    memory, and where nothing reaches the threshold, o_i is causal attention.

    num_neighbors 10 and no threshold are the paper's for Llama; its MPT has 0.25 (cosine). Gradients flow into
    remembered keys and values too, as long as the state is not detached. Arguments: num_kv_heads, head_dim, qk_norm,
    norm_eps, bias, rope_base as in `CachedAttention`; calls as in `GatedDeltaNet`. A step that picks rows of a pool
    copies their memories.

    >>> layer = ExtendedMindAttention(256, num_heads=4)
    >>> state = layer.remember(torch.randn(1, 1000, 256))
    >>> y, found = layer(torch.randn(1, 20, 256), state, return_found=True)  # found.indices [1, 20, 4, 10]
    """

    state_type = ExtendedMindState

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_neighbors: int = 10,
        threshold: float | None = None,
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
        if not 1 <= num_neighbors <= 128:
            raise ValueError(f"ExtendedMindAttention: num_neighbors is {num_neighbors}; allowed: 1..128")
        if threshold is not None and not -1 <= threshold <= 1:
            raise ValueError(f"ExtendedMindAttention: threshold is {threshold}; allowed: a cosine, -1..1, or None")
        self.num_neighbors, self.threshold = num_neighbors, threshold

    def init_state(self, batch: int, max_tokens: int | None = None) -> ExtendedMindState:
        """No text and no memory. max_tokens: room for the text from the start."""
        return ExtendedMindState(self._cache(batch, max_tokens), self._cache(batch, 0))

    def _cache(self, batch: int, max_tokens: int | None) -> KVCache:
        dims = (self.head_dim, self.head_dim)
        return KVCache.empty(self.qkv_proj.weight, batch, self.num_kv_heads, dims, max_tokens)

    def _mask(self) -> dict[str, Any]:
        return {}

    def remember(
        self, x: Tensor, state: ExtendedMindState | None = None, *, attention_mask: Tensor | None = None
    ) -> ExtendedMindState:
        """A new state with the tokens x [B, T, embed_dim] behind those already remembered; the text is as it was.

        x: this layer's inputs where the model reads the text to remember. attention_mask [B, T]: which tokens are kept,
        one contiguous run per row (the published code leaves out special tokens).
        """
        check_tokens(self, x)
        state = self.init_state(x.shape[0], 0) if state is None else state
        check_state(self, state, ExtendedMindState, x.shape[0])
        lengths = None
        if attention_mask is not None:
            check_mask(attention_mask, x)
            rows = PaddedRows(attention_mask, x)
            x, lengths = rows.align(x), rows.length
        _, k, v = self._heads(x)
        return ExtendedMindState(state.cache.clone(), state.memory.extended(k, v, None, new=NewRows(x, lengths)))

    def forward(
        self,
        x: Tensor,
        state: ExtendedMindState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
        return_found: bool = False,
    ) -> Any:
        """All tokens at once; arguments as in `CachedAttention.forward`.

        Returns y [B, T, embed_dim], with return_state the new state behind it, and with return_found last what every
        token read: TopK(cosines, indices, counts) of [B, T, num_heads, num_neighbors]; indices count the remembered
        tokens of the row, in the order in which they were remembered. Unused slots are −inf and −1.
        """
        check_tokens(self, x)
        rows = valid_runs(type(self).__name__, x, attention_mask, cu_seqlens)
        if rows is not None:
            x = rows.align(x)
        new = NewRows(x, None if rows is None else rows.length)
        if state is not None:
            check_state(self, state, ExtendedMindState, x.shape[0])
        before = self.init_state(x.shape[0], 0) if state is None else state
        q, k, v = self._heads(x)
        if self.rope_base is not None:
            positions = new.positions(before.cache.length)
            q, k = (rotary(y, positions, self.rope_base) for y in (q, k))
        if state is None:
            local = attention(q, k, v, backend=self.backend)
        else:
            local = self._over_cache(q, k, v, None, before.cache, new)
        o, found = self._joined(q, local, before.memory)
        y = self._readout(o, x)
        results: list[Any] = [y if rows is None else rows.restore(y)]
        if return_state:
            results.append(ExtendedMindState(before.cache.extended(k, v, None, new=new), before.memory.clone()))
        if return_found:
            results.append(found if rows is None else _restored(found, rows))
        return results[0] if len(results) == 1 else tuple(results)

    def _joined(self, q: Tensor, local: AttentionOutput, memory: KVCache) -> tuple[Tensor, TopK]:
        """One softmax over the local keys and the remembered ones that are nearest; which these are."""
        found = knn_attention(
            q.to(memory.k.dtype),
            memory.k,
            memory.v,
            self.num_neighbors,
            metric="cos",
            lengths=memory.length,
            threshold=self.threshold,
            backend=self.backend,
        )
        lses = [local.lse, found.lse.to(local.lse.dtype)]
        return merge_states([local.o, found.o.to(local.o.dtype)], lses, backend=self.backend).o, found.found

    def _step(self, x: Tensor, state: ExtendedMindState, rows: Tensor | None) -> Tensor:
        q, k, v = self._heads(x)
        cache, memory = state.cache, state.memory
        picked = None if rows is None else rows.long().clamp(min=0)
        length = cache.length if picked is None else cache.length.index_select(0, picked)
        if self.rope_base is not None:
            positions = length[:, None] + torch.arange(x.shape[1], device=x.device)
            q, k = (rotary(y, positions, self.rope_base) for y in (q, k))
        cache.append(k, v, rows=rows)
        local = attention_decode(q.to(cache.k.dtype), cache.k, cache.v, **cache.lookup(rows), backend=self.backend)
        local = AttentionOutput(local.o.to(q.dtype), local.lse)
        y = self._readout(self._joined(q, local, memory if picked is None else memory.reorder(picked))[0], x)
        return y if rows is None else torch.where((rows >= 0)[:, None, None], y, 0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_neighbors={self.num_neighbors}, threshold={self.threshold}"


def _restored(found: TopK, rows: PaddedRows | PackedRows) -> TopK:
    """The found of aligned rows in the places of their tokens; padding found nothing."""
    indices = rows.restore(found.indices.flatten(2) + 1) - 1
    values = rows.restore(found.values.flatten(2)).masked_fill(indices < 0, -torch.inf)
    shape = found.indices.shape[2:]
    return TopK(values.unflatten(2, shape), indices.unflatten(2, shape), rows.restore(found.counts))
