"""The caches of softmax layers against lists of tokens: appending, growing, turning, picking rows, gradients."""

import functools
import pickle

import pytest
import torch
from support.layers import draw
from torch.utils import _pytree as pytree

from memattn.nn import KVCache, WindowCache
from memattn.nn.kv_cache import JoinedRows, NewRows
from memattn.ops import attention, attention_decode

ROWS, HEADS, DIMS = 3, 2, (16, 24)
LIKE = torch.empty(0)
MAKE = {
    "growing": functools.partial(KVCache.empty, LIKE, ROWS, HEADS, DIMS, max_tokens=4),
    "with decay": functools.partial(KVCache.empty, LIKE, ROWS, HEADS, DIMS, max_tokens=0, decays=4),
    "ring": functools.partial(WindowCache.empty, LIKE, ROWS, HEADS, DIMS, 7),
    "ring after two": functools.partial(WindowCache.empty, LIKE, ROWS, HEADS, DIMS, 7, ring_start=2),
    "ring of one": functools.partial(WindowCache.empty, LIKE, ROWS, HEADS, DIMS, 1, ring_start=1),
}


def tokens(cache, t, seed, batch=ROWS):
    parts = [draw(batch, t, HEADS, dim, seed=seed) for dim in DIMS]
    if getattr(cache, "c", None) is not None:
        parts.append(draw(batch, t, 4, seed=seed + 7, dtype=torch.float64))
    return parts


def parts_of(cache):
    return [x for x in (cache.k, cache.v, getattr(cache, "c", None)) if x is not None]


def kept(cache, n):
    """Positions that a row of n tokens holds, and the slots they have, by the definition."""
    start = cache.ring_start
    if start is None:
        return {j: j for j in range(n)}
    ring = cache.capacity - start
    return {j: j if j < start else start + (j - start) % ring for j in range(n) if j < start or j >= n - ring}


def assert_holds(cache, lists):
    """Every row holds its list of tokens, each a tuple of parts."""
    assert cache.length.tolist() == [len(row) for row in lists]
    for b, row in enumerate(lists):
        for position, slot in kept(cache, len(row)).items():
            for x, token in zip(parts_of(cache), row[position], strict=True):
                assert torch.equal(x[b, slot], token), f"row {b}, position {position}"


def grow_lists(lists, parts, lengths=None, rows=None):
    for b in range(len(parts[0])):
        row = b if rows is None else rows[b]
        for t in range(parts[0].shape[1] if lengths is None else lengths[b]):
            if row >= 0:
                lists[row].append(tuple(x[b, t] for x in parts))


CALLS = (
    {"t": 1}, {"t": 3}, {"t": 3, "lengths": [3, 0, 2]}, {"t": 1, "rows": [2, -1]}, {"t": 9}, {"t": 2, "rows": [-1, -1]},
    {"t": 1, "lengths": [0, 0, 0]}, {"t": 4, "rows": [1, 0], "lengths": [1, 4]}, {"t": 1},
)  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_append(name, compiled):
    """In eager mode caches grow; compiled, with room from the start, every write goes by masked indices."""
    growing = name in ("growing", "with decay")
    cache = MAKE[name](max_tokens=64) if compiled and growing else MAKE[name]()
    append = type(cache).append
    if compiled:
        torch._dynamo.reset()
        append = torch.compile(append, fullgraph=True, backend="aot_eager")
    lists: list[list] = [[] for _ in range(ROWS)]
    for seed, call in enumerate(CALLS):
        rows, lengths = call.get("rows"), call.get("lengths")
        parts = tokens(cache, call["t"], seed, ROWS if rows is None else len(rows))
        given = {n: torch.tensor(x) for n, x in (("rows", rows), ("lengths", lengths)) if x is not None}
        append(cache, *parts, **given)
        grow_lists(lists, parts, lengths, rows)
        assert_holds(cache, lists)


@pytest.mark.parametrize("name", MAKE)
def test_extended_and_joined(name):
    """Batched, padded and packed: the new cache, and what attention is given, row by row."""
    cache, lists = MAKE[name](), [[] for _ in range(ROWS)]
    first = tokens(cache, 5, 0)
    cache.append(*first, lengths=torch.tensor([5, 0, 3]))
    grow_lists(lists, first, [5, 0, 3])
    for lengths, bounds in ((None, None), ([6, 2, 0], None), (None, [0, 4, 4, 11])):
        new = tokens(cache, 6, 1) if bounds is None else tokens(cache, bounds[-1], 1, batch=1)
        at = NewRows(
            new[0], None if lengths is None else torch.tensor(lengths), None if bounds is None else torch.tensor(bounds)
        )
        before, after = cache.clone(), cache.extended(*new, new=at)
        expected = [list(row) for row in lists]
        if bounds is None:
            grow_lists(expected, new, lengths)
        else:
            for n in range(ROWS):
                expected[n] += [tuple(x[0, t] for x in new) for t in range(bounds[n], bounds[n + 1])]
        assert_holds(after, expected)
        assert_holds(cache, lists)
        assert all(torch.equal(x, y) for x, y in zip(parts_of(cache), parts_of(before), strict=True))
        joined = JoinedRows(cache, at)
        k, keys, queries = joined.gather(cache.k, new[0]), joined.cu_keys.tolist(), joined.cu_queries.tolist()
        spans = at.span.tolist()
        assert k.shape[1] == keys[-1] and queries[-1] == queries[-2] == at.total
        for n in range(ROWS):
            own = new[0][n] if bounds is None else new[0][0, bounds[n] : bounds[n + 1]]
            old = [lists[n][j][0] for j in sorted(kept(cache, len(lists[n])))]
            assert queries[n + 1] - queries[n] == spans[n] == len(own)
            assert torch.equal(k[0, keys[n] : keys[n + 1]], torch.stack([*old, *own]) if old or len(own) else own)


@pytest.mark.parametrize("name", MAKE)
def test_gradients_of_extended(name):
    cache = MAKE[name]()
    cache.append(*tokens(cache, 6, 0))
    leaves = [x.requires_grad_() for x in (cache.k, cache.v)]
    new = [x.requires_grad_() for x in tokens(cache, 3, 1)]
    after = cache.extended(*new, new=NewRows(new[0], torch.tensor([3, 0, 2])))
    after.k.sum().backward()
    for b, count in enumerate((3, 0, 2)):
        still = kept(cache, 6 + count)
        for position, slot in kept(cache, 6).items():
            assert leaves[0].grad[b, slot].eq(1 if position in still else 0).all()
        for t in range(3):
            assert new[0].grad[b, t].eq(1 if t < count and 6 + t in still else 0).all()


def test_growth_doubles_and_looks_at_the_device_once_each(monkeypatch):
    cache = KVCache.empty(LIKE, ROWS, HEADS, DIMS)
    room = cache.capacity
    looks, read = [], torch.Tensor.__int__
    monkeypatch.setattr(torch.Tensor, "__int__", lambda x: looks.append(x) or read(x))
    for seed in range(2 * room + 1):
        cache.append(*tokens(cache, 1, seed))
    assert cache.capacity == 4 * room and len(looks) <= 3
    copy = cache.clone()
    copy.append(*tokens(cache, 1, 0))
    assert copy.length.tolist() == [2 * room + 2] * ROWS and cache.length.tolist() == [2 * room + 1] * ROWS


def test_room_is_that_of_the_fullest_row():
    cache, lists = KVCache.empty(LIKE, ROWS, HEADS, DIMS, max_tokens=4), [[] for _ in range(ROWS)]
    for seed, lengths in enumerate(([4, 0, 1], [1, 1, 1])):
        parts = tokens(cache, max(lengths), seed)
        cache.append(*parts, lengths=torch.tensor(lengths))
        grow_lists(lists, parts, lengths)
        assert_holds(cache, lists)


def test_a_copy_forgets_what_room_there_was():
    cache, full = (KVCache.empty(LIKE, ROWS, HEADS, DIMS, max_tokens=4) for _ in range(2))
    lists = [[] for _ in range(ROWS)]
    for seed, to, count in ((0, cache, 1), (1, full, 4), (2, cache, 1)):
        parts = tokens(to, count, seed)
        to.append(*parts)
        if to is full:
            cache.copy_(full)
        if seed:
            grow_lists(lists, parts)
    assert_holds(cache, lists)


def test_a_compiled_append_drops_what_has_no_slot():
    torch._dynamo.reset()
    cache = KVCache.empty(LIKE, ROWS, HEADS, DIMS, max_tokens=2)
    append, parts = torch.compile(KVCache.append, fullgraph=True, backend="aot_eager"), tokens(cache, 3, 0)
    append(cache, *parts)
    assert cache.length.tolist() == [2] * ROWS and torch.equal(cache.k, parts[0][:, :2])
    append(cache, *parts)
    assert cache.length.tolist() == [2] * ROWS and torch.equal(cache.k, parts[0][:, :2])


@pytest.mark.parametrize("name", MAKE)
def test_decode_reads_it_as_attention_reads_all_tokens(name):
    cache, parts = MAKE[name](), tokens(MAKE[name](), 20, 3)
    steps = -parts[2].abs() if len(parts) > 2 else None
    if steps is not None:
        parts[2] = steps.cumsum(1)
    q = draw(ROWS, 20, 4, 16, seed=9)
    mask, window = {}, cache.capacity - (cache.ring_start or 0)
    if cache.ring_start is not None:
        mask = {"chunk_rule": ("dilated", 2**31 - 1, window, cache.ring_start or 0)}
    whole = attention(q, *parts[:2], log_decay=None if steps is None else steps.float(), **mask)
    for t in range(20):
        cache.append(*(x[:, t : t + 1] for x in parts))
        o, lse = attention_decode(q[:, t : t + 1], cache.k, cache.v, **cache.lookup(), **mask)
        torch.testing.assert_close(o, whole.o[:, t : t + 1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, whole.lse[:, t : t + 1], rtol=1e-5, atol=1e-5)
    rows = torch.tensor([2, -1])
    o, _ = attention_decode(q[[2, 0], 19:], cache.k, cache.v, **cache.lookup(rows), **mask)
    torch.testing.assert_close(o[0], whole.o[2, 19:], rtol=1e-5, atol=1e-5)
    assert not o[1].any()


@pytest.mark.parametrize("name", MAKE)
def test_a_state_like_any(name):
    cache = MAKE[name]()
    cache.append(*tokens(cache, 5, 0))
    leaves, spec = pytree.tree_flatten(cache)
    for other in (
        pytree.tree_unflatten(leaves, spec),
        pickle.loads(pickle.dumps(cache)),
        cache.clone(),
        cache.detach(),
    ):
        assert type(other) is type(cache) and other.ring_start == cache.ring_start
        assert all(torch.equal(x, y) for x, y in zip(parts_of(other), parts_of(cache), strict=True))
    assert cache.reorder(torch.tensor([2, 0])).batch == 2
    afresh = cache.reset(torch.tensor([1]))
    assert afresh.length.tolist() == [5, 0, 5] and not afresh.k[1].any()


def test_copy_between_capacities():
    small, large = (KVCache.empty(LIKE, ROWS, HEADS, DIMS, max_tokens=n) for n in (4, 9))
    small.append(*tokens(small, 4, 0))
    address = large.k.data_ptr()
    large.copy_(small)
    assert large.k.data_ptr() == address and torch.equal(large.k[:, :4], small.k) and large.length.tolist() == [4] * 3
    large.append(*tokens(large, 1, 1))
    with pytest.raises(ValueError, match="copy_: other holds 5 tokens; expected at most 4"):
        small.copy_(large)
    with pytest.raises(TypeError, match="copy_: other is WindowCache; expected KVCache"):
        small.copy_(MAKE["ring"]())


def test_append_refuses_gradients():
    cache = MAKE["growing"]()
    with pytest.raises(RuntimeError, match="KVCache.append: an input requires grad.*use extended"):
        cache.append(*(x.requires_grad_() for x in tokens(cache, 1, 0)))
    with pytest.raises(ValueError, match="KVCache: got 3 tensors of new tokens; expected k, v"):
        cache.append(*tokens(MAKE["with decay"](), 1, 0))
