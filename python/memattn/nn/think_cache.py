"""A pruned cache whose keys have lost channels too (ThinK: Xu et al. 2024, arXiv 2407.21018)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from memattn.nn.eviction_cache import EvictionCache
from memattn.ops.attention import AttentionOutput
from memattn.ops.attention_decode import attention_decode
from memattn.ops.merge_states import merge_states
from memattn.ops.topk import topk
from memattn.state import MemoryState

LEAST_CHANNELS = 16


class ThinKCache(MemoryState):
    """An `EvictionCache` of which the older keys hold only the channels that the queries use.

    Of each sequence and key head, channel c scores ‖Q[:, c]‖ · ‖K[:, c]‖, the Frobenius norm of what it adds to the
    logits: Q are observed queries of the head's group, K its keys but for the last `recent`. Those keys lose the
    ⌊ratio · K⌋ channels of least score. A query is gathered to the channels left, its logits still scaled by K^−½, and
    joins in one softmax with the recent and all later keys, which stay whole.

    k [N, P, HKV, K'], v [N, P, HKV, V], the first held [N] (int64) of them there; channels int64 [N, HKV, K'];
    rest: an EvictionCache of the whole keys. Inference only.

    >>> cache = ThinKCache.of(cache, q[:, -32:], ratio=0.4, recent=32)      # after the prompt, policy "snapkv"
    >>> attended = cache.step(q, k, v)
    """

    fields: ClassVar[tuple[str, ...]] = ("k", "v", "channels", "held", "rest")

    def __init__(self, k: Tensor, v: Tensor, channels: Tensor, held: Tensor, rest: EvictionCache) -> None:
        self.k, self.v, self.channels, self.held, self.rest = k, v, channels, held, rest

    @classmethod
    def of(cls, cache: EvictionCache, q: Tensor, *, ratio: float = 0.4, recent: int = 32) -> ThinKCache:
        """The cache without the channels that q [N, w, HQ, K], say the prompt's last 32 queries, needs least.

        ratio of the channels to drop, in [0, 1); at least 16 must stay. The given cache is not changed; its policy must
        be "snapkv": h2o would go on to forget tokens whose keys are no longer whole.
        """
        heads, dim = cache.k.shape[2:]
        if cache.policy != "snapkv":
            raise ValueError(f"ThinKCache: the cache's policy is {cache.policy!r}; allowed: 'snapkv'")
        if q.dim() != 4 or q.shape[0] != cache.batch or q.shape[3] != dim or q.shape[2] % heads:
            raise ValueError(
                f"ThinKCache: q has shape {list(q.shape)}; expected [N, w, HQ, K] with N {cache.batch}, K {dim} "
                f"and HQ a multiple of {heads}"
            )
        if not 0 <= ratio < 1 or dim - int(ratio * dim) < LEAST_CHANNELS:
            raise ValueError(f"ThinKCache: ratio is {ratio}; expected in [0, 1), with {LEAST_CHANNELS} of {dim} left")
        if recent < 0:
            raise ValueError(f"ThinKCache: recent is {recent}; expected at least 0")
        older = (cache.held - recent).clamp(min=0)
        slots = int(older.max()) if cache.batch else 0
        in_older = (torch.arange(slots, device=q.device) < older[:, None])[..., None, None]
        keys, values = (torch.where(in_older, x[:, :slots], 0) for x in (cache.k, cache.v))
        norms = (x.to(cache.score.dtype).square().sum(1) for x in (q, keys))
        of_queries, of_keys = next(norms).unflatten(1, (heads, -1)).sum(2), next(norms)
        channels = topk((of_queries * of_keys).sqrt(), dim - int(ratio * dim)).indices.long()
        kept = keys.gather(3, channels[:, None].expand(-1, slots, -1, -1))
        return cls(kept, values, channels, older, _later(cache, older))

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionOutput:
        """Attention of new tokens [N, t, ·, ·], one after the other, to all that is held; they are held then."""
        late = self.rest.step(q, k, v)
        if self.k.shape[1] == 0:
            return late
        heads = self.k.shape[2]
        channels = self.channels[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[2] // heads, -1)
        narrow = q.to(self.k.dtype).unflatten(2, (heads, -1)).gather(4, channels).flatten(2, 3)
        early = attention_decode(
            narrow, self.k, self.v, cache_seqlens=self.held, causal=False, scale=q.shape[3] ** -0.5
        )  # fmt: skip
        return merge_states([early.o.to(q.dtype), late.o], [early.lse, late.lse])


def _later(cache: EvictionCache, first: Tensor) -> EvictionCache:
    """What `cache` holds from slot first [N] on, in a cache of its own."""
    left = cache.held - first
    slots = int(left.max()) if cache.batch else 0
    slot = torch.arange(slots, device=first.device)
    at = (first[:, None] + slot).clamp(max=max(cache.slots - 1, 0))
    row = torch.arange(cache.batch, device=first.device)[:, None]
    there = slot < left[:, None]
    k, v = (torch.where(there[..., None, None], x[row, at], 0) for x in (cache.k, cache.v))
    positions = torch.where(there[..., None], cache.positions[row, at], -1)
    score = torch.where(there[..., None], cache.score[row, at], 0)
    return EvictionCache(k, v, positions, score, left, cache.length.clone(), *cache._constants())
