"""A cache of keys and values that forgets: each key head keeps the tokens that attention found heaviest."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn.nn.kv_cache import FIRST_ROOM, NewRows
from memattn.ops import _checks as check
from memattn.ops.attention import AttentionOutput, attention
from memattn.ops.attention_decode import attention_decode
from memattn.ops.attention_mass import attention_mass
from memattn.ops.topk import MOST, topk
from memattn.state import MemoryState

POLICIES = ("h2o", "snapkv")


class EvictionCache(MemoryState):
    """At most `budget` tokens of each sequence and key head, the last `recent` always among them.

    h2o      a token's score is the attention mass it received from every query so far, m_j = Σ_i p_ij, summed over the
             query heads of its key head. After every call the cache keeps the last `recent` tokens and the others of
             largest score; a token that is forgotten loses its score (Zhang et al. 2023, arXiv 2306.14048).
    snapkv   `prefill` keeps the last `recent` tokens and the others whose mass from the last `recent` queries, averaged
             over `pool` neighbouring tokens, is largest; `step` appends and forgets nothing (Li et al. 2024, arXiv
             2404.14469; its code keeps a set per query head where heads share keys, here the group shares one).

    A call attends to everything it is given and to everything held; forgetting comes after it. So h2o's result depends
    on how a prompt is cut into calls: one call of `prefill` scores with dense attention, token by token each query sees
    only what the ones before have left. `prefill` of one token and `step` do the same. With a budget that holds the
    whole text both are dense attention.

    Keys are held as they come. Turned by their positions in the text (rotary) before, they keep those positions, as in
    SnapKV; `positions` tells which tokens are held, −1 where none is.

    k, v [N, slots, HKV, ·], positions int64 [N, slots, HKV], score [N, slots, HKV] (float32; zeros with snapkv), held
    and length int64 [N]: tokens held by each head, tokens seen. Slots from `held` on are empty. Inference only.

    >>> cache = EvictionCache.empty(k, batch=2, heads=8, dims=(128, 128), policy="snapkv", budget=2048, recent=32)
    >>> attended, cache = cache.prefill(q, k, v)      # the prompt
    >>> attended = cache.step(q, k, v)                # each new token, in place
    """

    fields: ClassVar[tuple[str, ...]] = ("k", "v", "positions", "score", "held", "length")
    constants: ClassVar[tuple[str, ...]] = ("policy", "budget", "recent", "pool")

    def __init__(
        self, k: Tensor, v: Tensor, positions: Tensor, score: Tensor, held: Tensor, length: Tensor, policy: str,
        budget: int, recent: int, pool: int,
    ) -> None:  # fmt: skip
        self.k, self.v, self.positions, self.score = k, v, positions, score
        self.held, self.length = held, length
        self.policy, self.budget, self.recent, self.pool = policy, budget, recent, pool

    @classmethod
    def empty(
        cls, like: Tensor, batch: int, heads: int, dims: tuple[int, int], *, policy: str, budget: int, recent: int,
        pool: int = 5,
    ) -> EvictionCache:  # fmt: skip
        """No tokens yet, of like's dtype and device. budget 1..4096, recent 1..budget, pool odd (snapkv alone)."""
        check.choice("EvictionCache", "policy", policy, POLICIES)
        if not 1 <= budget <= MOST:
            raise ValueError(f"EvictionCache: budget is {budget}; allowed: 1..{MOST}")
        if not 1 <= recent <= budget:
            raise ValueError(f"EvictionCache: recent is {recent}; allowed: 1..{budget}, the budget")
        if pool < 1 or pool % 2 == 0:
            raise ValueError(f"EvictionCache: pool is {pool}; expected an odd number ≥ 1")
        slots = budget if policy == "h2o" else 0
        k, v = (like.new_zeros(batch, slots, heads, dim) for dim in dims)
        positions = torch.full((batch, slots, heads), -1, device=like.device)
        score = like.new_zeros(batch, slots, heads, dtype=torch.promote_types(like.dtype, torch.float32))
        none = like.new_zeros(batch, dtype=torch.int64)
        return cls(k, v, positions, score, none, none.clone(), policy, budget, recent, pool)

    @property
    def slots(self) -> int:
        """Slots of every row."""
        return self.k.shape[1]

    def prefill(
        self, q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[AttentionOutput, EvictionCache]:
        """Causal attention of new tokens to the held ones and to each other, and the cache after them, a new one.

        q [B, T, HQ, K], k, v [B, T, HKV, ·]. lengths [B]: only the first lengths[b] tokens of row b are there, o is 0
        and lse −inf at the others. cu_seqlens [N+1]: N sequences packed along T, then B = 1 and the cache has N rows.
        """
        check.inference_only("EvictionCache.prefill", "attention", q, k, v)
        if cu_seqlens is not None:
            check.cu_seqlens("EvictionCache.prefill", cu_seqlens, q)
        new = NewRows(q, lengths, cu_seqlens)
        self._check_batch("prefill", len(new.count), q, k, v)
        flat_q, flat_k, flat_v = (x.to(self.k.dtype).reshape(1, new.total, *x.shape[2:]) for x in (q, k, v))
        slots = self.batch * self.slots
        starts = torch.arange(self.batch, device=q.device) * self.slots
        of_new: dict[str, Any] = {"cu_seqlens_q": with_gaps(new.bounds[:-1], new.count, new.total)}
        of_held: dict[str, Any] = {
            **of_new,
            "causal": False,
            "cu_seqlens_k": with_gaps(starts, self.held, slots),
        }
        held_k, held_v = (x.reshape(1, -1, *x.shape[2:]) for x in (self.k, self.v))
        past = attention(flat_q, held_k, held_v, **of_held)
        o, lse = attention(flat_q, flat_k, flat_v, merge=past, **of_new)
        scored: dict[str, Any] = {
            "query_range": None if self.policy == "h2o" else (-self.recent, None),
            "reduce_heads": "group",
        }
        old_mass = attention_mass(flat_q, held_k, lse, **of_held, **scored).view_as(self.score)
        new_mass = attention_mass(flat_q, flat_k, lse, **of_new, **scored)
        cache = self._pruned(flat_k, flat_v, self.score + old_mass, new_mass, new)
        real = (new.positions(self.length) - self.length[new.rows()] < new.count[new.rows()])[..., None]
        o, lse = o.to(q.dtype).view(*q.shape[:3], v.shape[3]), lse.view(q.shape[:3])
        return AttentionOutput(torch.where(real[..., None], o, 0), torch.where(real, lse, -torch.inf)), cache

    def _pruned(self, k: Tensor, v: Tensor, old_score: Tensor, new_score: Tensor, new: NewRows) -> EvictionCache:
        """The cache that keeps the best of what is held and what is new (one list of tokens, as are the scores)."""
        longest = int(new.count.max()) if new.packed and check.values_checked(new.count) else new.longest
        if self.slots + longest == 0:
            return self.clone()
        total = self.held + new.count
        place = torch.arange(self.slots + longest, device=k.device)
        row = torch.arange(self.batch, device=k.device)[:, None]
        fresh = self.batch * self.slots + new.bounds[:-1, None] + place - self.held[:, None]
        source = torch.where(place < self.held[:, None], row * self.slots + place, fresh)
        there = place < total[:, None]  # [N, candidates]
        source = torch.where(there, source, 0)
        heads = k.shape[2]
        arrived = new.positions(self.length).view(-1, 1).expand(-1, heads)
        candidates = [
            torch.cat([held.flatten(0, 1), x.to(held.dtype)])
            for held, x in ((self.k, k[0]), (self.v, v[0]), (self.positions, arrived), (old_score, new_score[0]))
        ]
        positions, score = (x[source] for x in candidates[2:])
        length = self.length + new.count
        recent = positions >= (length - self.recent)[:, None, None]
        rank = score
        if self.policy == "snapkv":
            rank = torch.where(recent | ~there[..., None], 0.0, score)
            rank = F.avg_pool1d(rank.transpose(1, 2), self.pool, 1, self.pool // 2).transpose(1, 2)
        rank = torch.where(recent, torch.inf, rank).transpose(1, 2)
        slots = self.budget if self.policy == "h2o" else min(self.budget, len(place))
        chosen = topk(rank.contiguous(), slots, lengths=total).indices
        chosen = chosen.transpose(1, 2).long().contiguous()  # [N, slots, HKV], in the order of the text
        kept, at = chosen >= 0, source[row[..., None], chosen.clamp(min=0)]
        head = torch.arange(heads, device=k.device)
        k, v, positions, score = (x[at, head] for x in candidates)
        return EvictionCache(
            torch.where(kept[..., None], k, 0), torch.where(kept[..., None], v, 0), torch.where(kept, positions, -1),
            torch.where(kept, score, 0) if self.policy == "h2o" else torch.zeros_like(score),
            total.clamp(max=self.budget), length, *self._constants(),
        )  # fmt: skip

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionOutput:
        """Attention of new tokens [B, t, ·, ·], one after the other, to what is held; they are held then, in place."""
        check.inference_only("EvictionCache.step", "attention", q, k, v)
        self._check_batch("step", q.shape[0], q, k, v)
        parts = zip(*(x.to(self.k.dtype).split(1, 1) for x in (q, k, v)), strict=True)
        outputs, lses = zip(*(self._step(*part) for part in parts), strict=True)
        return AttentionOutput(torch.cat(outputs, 1).to(q.dtype), torch.cat(lses, 1))

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionOutput:
        self._make_room()
        past = attention_decode(q, self.k, self.v, cache_seqlens=self.held, causal=False)
        seen = attention(q, k, v, merge=past)
        full, score = self.held, None
        if self.policy == "h2o":
            full = self.held.clamp(max=self.budget - 1)
            taken = torch.arange(self.slots, device=q.device) < self.held[:, None]
            mass = attention_mass(q, self.k, seen.lse, causal=False, reduce_heads="group")
            self.score.add_(torch.where(taken[..., None], mass, 0))
            score = attention_mass(q, k, seen.lse, reduce_heads="group")
        slot = full[:, None].expand(-1, k.shape[2])
        if self.policy == "h2o":
            recent = self.positions > (self.length - self.recent)[:, None, None]
            least = torch.where(recent, torch.inf, self.score).argmin(1)
            slot = torch.where((self.held == self.budget)[:, None], least, slot)
        slot = slot[:, None]  # [B, 1, HKV]
        self.k.scatter_(1, slot[..., None].expand_as(k), k)
        self.v.scatter_(1, slot[..., None].expand_as(v), v)
        self.positions.scatter_(1, slot, self.length[:, None, None].expand_as(slot))
        if score is not None:
            self.score.scatter_(1, slot, score)
        self.held.copy_(full + 1)
        self.length.add_(1)
        return seen

    def _make_room(self) -> None:
        """A slot for one more token of every row."""
        if self.policy == "h2o" or (self.batch and int(self.held.max()) < self.slots):
            return
        more = max(self.slots, FIRST_ROOM)
        for name, empty in (("k", 0), ("v", 0), ("positions", -1), ("score", 0)):
            part = getattr(self, name)
            room = part.new_full((len(part), more, *part.shape[2:]), empty)
            setattr(self, name, torch.cat([part, room], 1))

    def _check_batch(self, call: str, batch: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        if batch != self.batch:
            raise ValueError(f"EvictionCache.{call}: got {batch} sequences; expected {self.batch}, the cache's rows")
        for name, x, held in (("k", k, self.k), ("v", v, self.v)):
            expected = (*q.shape[:2], *held.shape[2:])
            if tuple(x.shape) != expected:
                raise ValueError(
                    f"EvictionCache.{call}: {name} has shape {list(x.shape)}; expected {list(expected)}, tokens as of "
                    "q and heads as held"
                )

    def _fresh(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.new_full((), -1) if name == "positions" else super()._fresh(name, tensor)


def with_gaps(starts: Tensor, counts: Tensor, total: int) -> Tensor:
    """Bounds of 2N + 1 sequences: counts[n] tokens from starts[n] on, what lies before the next, and first nothing."""
    bounds = torch.stack([starts, starts + counts], 1).flatten()
    return torch.cat([bounds.new_zeros(1), bounds, bounds.new_full((1,), total)])
