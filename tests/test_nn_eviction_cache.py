"""EvictionCache and ThinKCache against their definitions, written as loops over tokens in float64."""

from pathlib import Path

import pytest
import torch
from support.compare import relative_error
from support.layers import run_page
from torch.utils import _pytree as pytree

from memattn.nn import EvictionCache, ThinKCache
from memattn.ops import attention

HQ, HKV, K, V = 4, 2, 32, 24


@pytest.fixture(autouse=True)
def on_device(device):
    torch.set_default_device(None if device == "cpu" else device)
    yield
    torch.set_default_device(None)


def draw(batch, tokens, seed=0, dtype=torch.float64, sharpness=2.0):
    gen = torch.Generator("cpu").manual_seed(seed)
    shapes = (batch, tokens, HQ, K), (batch, tokens, HKV, K), (batch, tokens, HKV, V)
    q, k, v = (torch.randn(*s, generator=gen, dtype=torch.float64, device="cpu") for s in shapes)
    return tuple(x.to(torch.get_default_device(), dtype) for x in (q * sharpness, k, v))


def empty(policy, budget, recent, batch=1, dtype=torch.float64, pool=3):
    like = torch.zeros((), dtype=dtype)
    return EvictionCache.empty(like, batch, HKV, (K, V), policy=policy, budget=budget, recent=recent, pool=pool)


class Definition:
    """One sequence and key head: a list of (position, key, value, score), the group's queries one by one."""

    def __init__(self, policy, budget, recent, pool=3):
        self.policy, self.budget, self.recent, self.pool = policy, budget, recent, pool
        self.tokens, self.length = [], 0

    def call(self, q, k, v, prune=True):
        """q [T, G, K], k, v [T, ·] -> o [T, G, V]."""
        before, outputs = len(self.tokens), []
        count = len(q)
        self.tokens += [[self.length + t, k[t], v[t], 0.0] for t in range(count)]
        self.length += count
        masses = torch.zeros(len(self.tokens), dtype=q.dtype)
        for t in range(count):
            seen = before + t + 1
            keys, values = (torch.stack([token[i] for token in self.tokens[:seen]]) for i in (1, 2))
            p = (q[t] @ keys.T / K**0.5).softmax(-1)
            outputs.append(p @ values)
            if self.policy == "h2o" or t >= count - self.recent:
                masses[:seen] += p.sum(0)
        if self.policy == "h2o":
            for token, mass in zip(self.tokens, masses.tolist(), strict=True):
                token[3] += mass
        if prune and len(self.tokens) > self.budget:
            self.prune(masses)
        return torch.stack(outputs)

    def prune(self, masses):
        late = [token for token in self.tokens if token[0] >= self.length - self.recent]
        early = self.tokens[: len(self.tokens) - len(late)]
        score = [token[3] for token in early]
        if self.policy == "snapkv":
            padded = [0.0] * (self.pool // 2) + masses[: len(early)].tolist() + [0.0] * (self.pool // 2)
            score = [sum(padded[i : i + self.pool]) for i in range(len(early))]
        order = sorted(range(len(early)), key=lambda i: -score[i])[: self.budget - len(late)]
        self.tokens = [early[i] for i in sorted(order)] + late


def defined(policy, budget, recent, q, k, v, calls):
    """o [T, HQ, V] and the held positions per head of one sequence; calls: (tokens, whether it is a prefill)."""
    outputs, held = [], []
    for h in range(HKV):
        group = slice(h * HQ // HKV, (h + 1) * HQ // HKV)
        head, start, parts = Definition(policy, budget, recent), 0, []
        for count, prefill in calls:
            part = slice(start, start + count)
            parts.append(head.call(q[part, group], k[part, h], v[part, h], prefill or policy == "h2o"))
            start += count
        outputs.append(torch.cat(parts))
        held.append([token[0] for token in head.tokens])
    return torch.cat(outputs, 1), held


def positions_of(cache, row=0):
    held = int(cache.held[row])
    return [sorted(cache.positions[row, :held, h].tolist()) for h in range(HKV)]


CALLS = [(17, True), (1, False), (1, False), (6, True), (1, False), (3, True)]


@pytest.mark.parametrize("policy", ["h2o", "snapkv"])
@pytest.mark.parametrize("budget, recent", [(9, 4), (8, 8), (6, 1), (64, 5)])
def test_equals_its_definition(policy, budget, recent):
    tokens = sum(count for count, _ in CALLS)
    q, k, v = draw(1, tokens)
    truth, held = defined(policy, budget, recent, q[0], k[0], v[0], CALLS)
    cache, outputs, start = empty(policy, budget, recent), [], 0
    for count, prefill in CALLS:
        part = [x[:, start : start + count] for x in (q, k, v)]
        if prefill:
            seen, cache = cache.prefill(*part)
        else:
            seen = cache.step(*part)
        outputs.append(seen.o)
        start += count
    assert relative_error(torch.cat(outputs, 1)[0], truth) < 1e-12
    assert positions_of(cache) == held and cache.length.tolist() == [tokens]
    empty_slots = torch.arange(cache.slots) >= cache.held[:, None]
    assert cache.positions[empty_slots].eq(-1).all() and cache.k[empty_slots].eq(0).all()


@pytest.mark.parametrize("policy", ["h2o", "snapkv"])
def test_a_budget_for_all_is_dense_attention(policy):
    q, k, v = draw(2, 30, dtype=torch.float32)
    dense = attention(q, k, v)
    cache = empty(policy, 30, 7, 2, torch.float32)
    first, cache = cache.prefill(q[:, :11], k[:, :11], v[:, :11])
    second = cache.step(q[:, 11:], k[:, 11:], v[:, 11:])
    assert relative_error(torch.cat([first.o, second.o], 1), dense.o) < 2e-6
    assert relative_error(torch.cat([first.lse, second.lse], 1), dense.lse) < 2e-6


def test_a_step_is_a_prefill_of_one_token():
    q, k, v = draw(2, 24)
    _, stepped = empty("h2o", 8, 3, 2).prefill(q[:, :12], k[:, :12], v[:, :12])
    filled = stepped.clone()
    for t in range(12, 24):
        part = [x[:, t : t + 1] for x in (q, k, v)]
        one = stepped.step(*part)
        other, filled = filled.prefill(*part)
        assert relative_error(one.o, other.o) < 1e-12
    assert all(positions_of(stepped, b) == positions_of(filled, b) for b in range(2))


@pytest.mark.parametrize("policy", ["h2o", "snapkv"])
def test_lengths_and_packed_sequences_equal_separate_ones(policy):
    """Lengths 0 and 1 and beyond the budget, in two prefills and steps; what is padded may be NaN."""
    rounds = ([13, 0, 1, 8], [0, 5, 9, 2])
    packed = padded = empty(policy, 6, 3, 4)
    alone = [empty(policy, 6, 3) for _ in range(4)]
    for seed, lengths in enumerate(rounds):
        q, k, v = draw(4, max(lengths), seed)
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        flat = [torch.cat([x[b, :n] for b, n in enumerate(lengths)])[None] for x in (q, k, v)]
        there = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        poisoned = [torch.where(there[..., None, None], x, torch.nan) for x in (q, k, v)]
        p, packed = packed.prefill(*flat, cu_seqlens=bounds)
        r, padded = padded.prefill(*poisoned, lengths=torch.tensor(lengths))
        assert r.o[~there].eq(0).all() and r.lse[~there].eq(-torch.inf).all()
        for b, n in enumerate(lengths):
            one, alone[b] = alone[b].prefill(*(x[b : b + 1, :n] for x in (q, k, v)))
            for o in (p.o[0, bounds[b] : bounds[b + 1]], r.o[b, :n]):
                assert n == 0 or relative_error(o, one.o[0]) < 1e-12
            assert positions_of(packed, b) == positions_of(padded, b) == positions_of(alone[b])
    q, k, v = draw(4, 2, 9)
    expected = torch.cat([cache.step(q[b : b + 1], k[b : b + 1], v[b : b + 1]).o for b, cache in enumerate(alone)])
    for cache in (packed, padded):
        assert relative_error(cache.step(q, k, v).o, expected) < 1e-12


def test_no_sequence_is_no_error():
    seen, cache = empty("h2o", 6, 3, 0).prefill(*draw(0, 3))
    assert seen.o.shape == (0, 3, HQ, V) and cache.batch == 0
    assert cache.step(*draw(0, 1)).o.shape == (0, 1, HQ, V)


def test_states_are_cloned_reordered_reset_and_flattened():
    q, k, v = draw(2, 12)
    cache = empty("h2o", 5, 2, 2).prefill(q, k, v)[1]
    swapped, fresh = cache.reorder(torch.tensor([1, 0])), cache.reset(torch.tensor([0]))
    leaves, spec = pytree.tree_flatten(cache)
    again = pytree.tree_unflatten(leaves, spec).clone()
    after = cache.clone().step(q[:, :1], k[:, :1], v[:, :1]).o
    assert torch.equal(again.step(q[:, :1], k[:, :1], v[:, :1]).o, after)
    assert torch.equal(swapped.step(*(x[:, :1].flip(0) for x in (q, k, v))).o.flip(0), after)
    rested = fresh.step(q[:, :1], k[:, :1], v[:, :1]).o
    assert torch.equal(rested[0, 0], v[0, 0].repeat_interleave(HQ // HKV, 0)) and torch.equal(rested[1], after[1])
    assert fresh.positions[0, 1:].eq(-1).all()


def test_a_later_question_finds_its_needle_only_where_it_was_heavy():
    """What eviction costs: a needle that the prompt's last queries did not look at is gone."""
    q, k, v = draw(1, 40, sharpness=1.0)
    k[0, 10] = 0
    k[0, 10, :, 0] = 40.0
    q[..., 0] = 0
    asked = q.clone()
    asked[0, -4:, :, 0] = 40.0
    for queries, found in ((asked, True), (q, False)):
        cache = empty("snapkv", 8, 4, pool=1).prefill(queries, k, v)[1]
        assert all((10 in held) == found for held in positions_of(cache))


# --- ThinK ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio, recent", [(0.0, 4), (0.4, 4), (0.5, 0), (0.4, 100)])
def test_think_equals_its_definition(ratio, recent):
    lengths = [20, 3, 0]
    q, k, v = draw(3, 23)
    bounds = [x[:, :20] for x in (q, k, v)]
    cache = empty("snapkv", 12, 4, 3).prefill(*bounds, lengths=torch.tensor(lengths))[1]
    observed = q[:, 12:20]
    pruned = ThinKCache.of(cache, observed, ratio=ratio, recent=recent)
    outputs = pruned.step(*(x[:, 20:] for x in (q, k, v))).o
    group = HQ // HKV
    for b in range(3):
        held = int(cache.held[b])
        older = max(held - recent, 0)
        for h in range(HKV):
            keys = cache.k[b, :held, h].clone()
            norm = observed[b, :, h * group : (h + 1) * group].flatten(0, 1).norm(dim=0) * keys[:older].norm(dim=0)
            dropped = norm.argsort(stable=True)[: int(ratio * K)]
            keys[:older, dropped] = 0
            for t in range(3):
                seen = torch.cat([keys, k[b, 20 : 21 + t, h]])
                values = torch.cat([cache.v[b, :held, h], v[b, 20 : 21 + t, h]])
                p = (q[b, 20 + t, h * group : (h + 1) * group] @ seen.T / K**0.5).softmax(-1)
                assert relative_error(outputs[b, t, h * group : (h + 1) * group], p @ values) < 1e-12
    assert pruned.k.shape[3] == K - int(ratio * K)


def test_think_without_loss_is_the_cache_itself():
    q, k, v = draw(2, 20, dtype=torch.float32)
    cache = empty("snapkv", 12, 4, 2, torch.float32).prefill(q, k, v)[1]
    pruned = ThinKCache.of(cache, q[:, -4:], ratio=0.0, recent=3).clone()
    part = [x[:, :2] for x in (q, k, v)]
    assert relative_error(pruned.step(*part).o, cache.step(*part).o) < 2e-6


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: empty("lru", 8, 2), "policy is 'lru'; allowed: 'h2o', 'snapkv'"),
        (lambda: empty("h2o", 5000, 2), "budget is 5000; allowed: 1..4096"),
        (lambda: empty("h2o", 8, 9), "recent is 9; allowed: 1..8"),
        (lambda: empty("h2o", 8, 2, pool=4), "pool is 4; expected an odd number"),
        (lambda: empty("h2o", 8, 2).step(*draw(2, 1)), "got 2 sequences; expected 1"),
        (lambda: empty("h2o", 8, 2).step(*draw(1, 1)[:2], draw(1, 2)[2]), r"step: v has shape \[1, 2"),
        (lambda: ThinKCache.of(empty("h2o", 8, 2), draw(1, 1)[0]), "policy is 'h2o'; allowed: 'snapkv'"),
        (lambda: ThinKCache.of(empty("snapkv", 8, 2), draw(1, 1)[0], ratio=0.6), "ratio is 0.6; expected"),
        (lambda: ThinKCache.of(empty("snapkv", 8, 2), draw(2, 1)[0]), r"q has shape \[2, 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gradients_are_refused():
    q, k, v = draw(1, 2)
    with pytest.raises(RuntimeError, match="inference only"):
        empty("h2o", 8, 2).step(q.requires_grad_(), k, v)


def test_the_page_runs():
    """The code of docs/retrieval_caches.md runs, and its assertions hold."""
    run_page(Path(__file__).parent.parent / "docs" / "retrieval_caches.md", 3)
