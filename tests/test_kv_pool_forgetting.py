"""What a KVPool forgets when its capacity is passed: every policy against a plain Python list."""

import pytest
import torch
from support.pool import (
    BATCH,
    HEADS,
    KEY_DIM,
    PAGE,
    TIERS,
    VALUE_DIM,
    Entry,
    Model,
    assert_equal,
    assert_nothing_left,
    make_pool,
)

from memattn import _native
from memattn.pool import Forgetting, PoolFull
from memattn.pool.forgetting import diversity

pytestmark = pytest.mark.skipif(_native.host() is None, reason=str(_native.native_reason("_host")))
CAPACITY = 18
POLICIES = ["ring", "fifo", "random", Forgetting()]


def rows(count):
    return torch.randn(BATCH, count, HEADS, KEY_DIM), torch.randn(BATCH, count, HEADS, VALUE_DIM)


def keep(model: Model, pool) -> None:
    """The model forgets what the pool no longer has; what is left must still agree."""
    for layer in range(2):
        for row in range(BATCH):
            left = set(pool.tokens(layer).ids[row].tolist())
            stream = layer * BATCH + row
            model.streams[stream] = [e for e in model.streams[stream] if e.id in left]


def append(pool, model: Model, count: int) -> None:
    k, v = rows(count)
    pool.append(0, k, v)
    for row in range(BATCH):
        model.streams[row] += model.new(row, k[row], v[row])


@pytest.mark.parametrize("tiers", ["device", "one page, file", "two pages, host, file", "one page, file, int8"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_capacity_is_kept_and_nothing_else_changes(policy, tiers, tmp_path):
    options = TIERS[tiers](tmp_path)
    pool, model = make_pool(capacity=CAPACITY, forget=policy, **options), Model(options.get("compress"))
    for count in (5, 13, 1, 1, 4, 9, 40, 1, 0, 7):
        append(pool, model, count)
        lengths = pool.lengths(0)
        assert (lengths <= CAPACITY).all() and (lengths > CAPACITY - PAGE - 1).all() or len(model.streams[0]) < CAPACITY
        keep(model, pool)
        assert_equal(pool, model)
        assert_nothing_left(pool, model)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_snapshots_keep_what_is_forgotten(policy, tmp_path):
    pool, model = make_pool(capacity=CAPACITY, forget=policy, **TIERS["one page, file"](tmp_path)), Model()
    append(pool, model, 18)
    remembered = [list(s) for s in model.streams]
    snapshot = pool.snapshot()
    model.snapshots[snapshot] = remembered
    append(pool, model, 25)
    keep(model, pool)
    assert_equal(pool, model)
    assert_nothing_left(pool, model)
    pool.roll_back(snapshot)
    model.streams = remembered
    assert_equal(pool, model)


def test_ring_keeps_the_newest_and_fifo_whole_pages():
    ring, fifo = (make_pool(capacity=CAPACITY, forget=policy) for policy in ("ring", "fifo"))
    for pool in (ring, fifo):
        for count in (18, 1, 5):
            pool.append(0, *rows(count))
    assert ring.tokens(0).ids[0].tolist() == list(range(6, 24))
    assert fifo.tokens(0).ids[0].tolist() == list(range(8, 24))
    ring.append(0, *rows(50))
    assert ring.tokens(0).ids[0].tolist() == list(range(56, 74))


def test_ring_forgets_by_age_and_not_by_place():
    pool = make_pool(capacity=10, forget="ring")
    pool.append(0, *rows(8))
    pool.insert(0, 0, *(x[0] for x in rows(2)))  # ids 8 and 9, in front
    pool.append(0, *rows(3))
    assert pool.tokens(0).ids[0].tolist() == [8, 9, 3, 4, 5, 6, 7, 10, 11, 12]


def test_random_forgets_evenly_repeats_with_its_seed_and_stays_dense():
    """Survival by age is (1 − 1/capacity)^age: after many appends of one, the mean age is near the capacity."""

    def play(seed):
        pool = make_pool(capacity=40, forget="random", seed=seed)
        for _ in range(300):
            pool.append(0, *rows(1))
        return pool

    first, again, other = play(1), play(1), play(2)
    ids = first.tokens(0).ids
    assert torch.equal(ids, again.tokens(0).ids) and not torch.equal(ids, other.tokens(0).ids)
    ages = torch.cat([299 - p.tokens(0).ids.double().flatten() for p in (first, other)])
    assert 25 < ages.mean() < 60 and first.lengths(0).tolist() == [40, 40]
    assert (ids.diff() > 0).all()
    assert first._pages.table.pages(0) <= 2 * (40 // PAGE) + 3


def test_pinned_pages_are_not_forgotten():
    for policy in POLICIES:
        pool = make_pool(capacity=CAPACITY, forget=policy)
        pool.append(0, *rows(8))
        pool.pin(0, torch.tensor([1]))
        for _ in range(40):
            pool.append(0, *rows(1))
        assert pool.tokens(0).ids[0].tolist()[:4] == [0, 1, 2, 3], policy
        assert policy == "random" or int(pool.tokens(0).ids[1].min()) > 3
    pool = make_pool(capacity=8, forget="ring")
    pool.append(0, *rows(8))
    for row in range(BATCH):
        pool.pin(0, torch.arange(8), row=row)
    with pytest.raises(PoolFull, match="all 8 tokens of the capacity are in pinned pages"):
        pool.append(0, *rows(1))
    assert pool.lengths(0).tolist() == [8, 8]


def test_refusing_leaves_everything():
    pool = make_pool(capacity=10)
    pool.append(0, *rows(8))
    with pytest.raises(PoolFull, match="3 tokens more than the 8 held would pass the capacity of 10"):
        pool.append(0, *rows(3))
    assert pool.lengths(0).tolist() == [8, 8]
    forgetting = make_pool(capacity=10, forget="ring")
    forgetting.append(0, *rows(8))
    with pytest.raises(PoolFull, match="3 tokens more than the 8 held"):
        forgetting.insert(0, 0, *(x[0] for x in rows(3)))


def test_score_by_hits_mass_and_diversity():
    def survivors(policy, use):
        pool = make_pool(capacity=16, forget=policy, summaries=("mean",))
        torch.manual_seed(3)
        k, v = rows(16)
        k[:, 8:12] = k[:, 4:8]  # pages 1 and 2 say the same
        pool.append(0, k, v)
        use(pool)
        pool.append(0, *rows(4))
        return pool.tokens(0).ids[0].tolist()[:12]

    def nothing(pool):
        pass

    def gather(pool):
        for page in (0, 1, 3, 3):
            pool.gather(0, torch.tensor([[page], [page]]))

    def mass(pool):
        pages = torch.tensor([[0, 1, 2, 3]]).expand(BATCH, 4)
        pool.record_mass(0, pages, torch.tensor([[0.5, 0.2, 0.3, 0.9]]).expand(BATCH, 4))
        pool.record_mass(0, pages[:, :1], torch.zeros(BATCH, 1), decay=0.1)

    assert survivors(Forgetting(), nothing) == list(range(4, 16))
    assert survivors(Forgetting(recency=0, hits=1), gather) == [*range(8), *range(12, 16)]
    assert survivors(Forgetting(recency=0, mass=1), mass) == [*range(4), *range(8, 16)]
    assert survivors(Forgetting(recency=0, diversity=1), nothing) == [*range(4), *range(8, 16)]
    assert survivors(lambda pages: (pages.age == pages.age.min()).double() * -1.0, nothing) == list(range(12))


def test_statistics_that_a_function_sees():
    seen = []

    def score(pages):
        seen.append(pages)
        return pages.age.double()

    pool = make_pool(capacity=12, forget=score)
    pool.append(0, *rows(12))
    pool.gather(0, torch.tensor([[1, 1], [-1, -1]]))
    pool.append(0, *rows(1))
    first = seen[0]
    assert first.tokens.tolist() == [4, 4, 4] and first.age.tolist() == [8, 4, 0] and first.hits.tolist() == [0, 1, 0]
    assert first.idle.tolist()[1] == 0 and first.idle[0] > 0 and not first.pinned.any() and (first.diversity == 1).all()
    for wrong in (lambda pages: torch.zeros(7), lambda pages: None, lambda pages: pages.mass * torch.nan):
        pool = make_pool(capacity=4, forget=wrong)
        pool.append(0, *rows(4))
        with pytest.raises(ValueError, match=r"forget gave .*; expected scores \[P\] = \[1\] without NaN"):
            pool.append(0, *rows(1))
        assert pool.lengths(0).tolist() == [4, 4]


def test_diversity():
    means = torch.randn(600, 2, 4)
    means[500] = 3 * means[7]
    cosine = torch.nn.functional.cosine_similarity(means.flatten(1)[:, None], means.flatten(1)[None], dim=2)
    expected = 1 - cosine.fill_diagonal_(-1).amax(1)
    torch.testing.assert_close(diversity(means), expected, atol=1e-5, rtol=0)
    assert diversity(means)[7] < 1e-5 and diversity(means[:1]).tolist() == [1.0]


def test_entries_of_the_model_are_what_the_pool_has():
    """The model itself: one token more, and the comparison fails."""
    pool, model = make_pool(), Model()
    append(pool, model, 3)
    model.streams[0].append(Entry(3, 3, 0, torch.zeros(HEADS, KEY_DIM), torch.zeros(HEADS, VALUE_DIM)))
    with pytest.raises(AssertionError):
        assert_equal(pool, model)
