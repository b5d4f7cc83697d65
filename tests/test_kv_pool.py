"""KVPool against a plain Python list: random calls on every combination of tiers; what single calls do and refuse."""

from pathlib import Path

import pytest
import torch
from support.pool import (
    BATCH,
    DEVICE_PAGE,
    HEADS,
    KEY_DIM,
    PAGE,
    TIERS,
    VALUE_DIM,
    Play,
    assert_gathered,
    assert_summaries,
    make_pool,
)
from support.pool_planted import BUGS, plant

from memattn import KVPool, _native
from memattn.ops import sparse_attention
from memattn.pool import PoolFull
from memattn.pool.codec import decode, encode

pytestmark = pytest.mark.skipif(_native.host() is None, reason=str(_native.native_reason("_host")))


def rows(*shape):
    return torch.randn(*shape, HEADS, KEY_DIM), torch.randn(*shape, HEADS, VALUE_DIM)


def filled(tokens, **options):
    pool = make_pool(**options)
    k, v = rows(BATCH, tokens)
    pool.append(0, k, v)
    return pool, k, v


@pytest.mark.parametrize("tiers", TIERS)
def test_random_calls(tiers, tmp_path, full):
    for seed in range(20 if full else 3):
        Play(tmp_path, TIERS[tiers](tmp_path), seed).run(60 if full else 25)


def play_everything(folder):
    """Raises if anything is wrong: random calls on few and on all tiers, then a merge, forgetting and a deletion."""
    for tiers in ("three pages, file", "two pages, host, file", "one page, file, int8"):
        Play(folder, TIERS[tiers](folder), seed=1).run(30)
    test_merge()
    shared, k, v = filled(6, summaries=("mean", "min", "max"))
    shared.snapshot()
    shared.append(0, k[:, :1], v[:, :1])
    assert_summaries(shared)
    ring, k, v = filled(8, capacity=10, forget="ring")
    ring.append(0, k, v)
    assert ring.tokens(0).ids.tolist() == [list(range(6, 16))] * BATCH
    ring.save(folder / "ring.safetensors")
    ring.delete(0, torch.tensor([6, 7]))
    assert KVPool.load(folder / "ring.safetensors").lengths(0).tolist() == [8, 10]


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug, tmp_path, monkeypatch):
    plant(bug, monkeypatch)
    try:
        play_everything(tmp_path)
    except Exception:
        return
    pytest.fail(f"no check noticed: {bug}")


def test_without_a_bug_nothing_is_caught(tmp_path):
    play_everything(tmp_path)


def test_empty_pool():
    pool = make_pool(summaries=("mean",))
    assert pool.lengths(0).tolist() == [0, 0] and pool.tokens(1).counts.tolist() == [0, 0]
    got = pool.gather(0, torch.full((BATCH, 3), -1))
    assert got.page_table.shape == (BATCH, 0) and got.full and (got.positions == -1).all()
    indices, counts = got.token_indices()
    assert (indices == -1).all() and counts.tolist() == [0, 0]
    assert pool.summaries(0).shape == (BATCH, 0, HEADS, KEY_DIM) and pool.page_counts(0).shape == (BATCH, 0)
    assert [x.shape for x in pool.read(0)] == [(0, HEADS, KEY_DIM), (0, HEADS, VALUE_DIM)]
    assert pool.traffic()["hit_rate"] == 1.0


def test_attention_over_gathered_pages_is_attention_over_their_tokens(tmp_path):
    """Block lists with the page table as sparse_attention takes them, and token lists where a page has a gap."""
    pool, k, v = filled(30, device_pages=8, folder=tmp_path)
    pages = torch.tensor([[5, 0, 2], [1, 3, 7]])
    got = pool.gather(0, pages)
    for b in range(BATCH):
        slots = got.page_table[b][pages[b]].long()
        chosen = (pages[b][:, None] * PAGE + torch.arange(PAGE)).flatten()
        chosen = chosen[chosen < 30]
        assert torch.equal(got.k[slots].flatten(0, 1)[: len(chosen)], k[b, chosen])
    assert not got.full  # page 7 of row 1 has two tokens
    pool.delete(0, torch.tensor([1, 9]))
    got = pool.gather(0, pages)
    indices, counts = got.token_indices()
    assert counts.tolist() == [10, 10]
    flat = got.page_table[0][(indices[0, :10] // PAGE).long()] * PAGE + indices[0, :10] % PAGE
    alive = torch.tensor([20, 21, 22, 23, 0, 2, 3, 8, 10, 11])
    assert torch.equal(got.v.flatten(0, 1)[flat.long()], v[0, alive])


@pytest.mark.parametrize("compress", [None, "int8"])
def test_sparse_attention_reads_what_was_gathered(compress, tmp_path):
    """By blocks where the last one is partial, and by tokens after a deletion: as over the contiguous tokens."""
    pool = KVPool(1, 2, 16, batch=2, page_size=16, device_bytes=12 << 12, folder=tmp_path, compress=compress)
    k, v = torch.randn(2, 2, 200, 2, 16)
    pool.append(0, k, v)
    k, v = (torch.stack([pool.read(0, row=b)[i] for b in range(2)]) for i in (0, 1))
    q, position = torch.randn(2, 1, 4, 16), torch.full((2, 1), 199)
    pages = torch.tensor([[[[0, 12, 3], [5, 0, -1]]], [[[1, 2, 12], [12, 7, 4]]]]).int()  # [B, S, HKV, n]
    got = pool.gather(0, pages)
    expected = sparse_attention(q, k, v, pages, unit=16, q_positions=position)
    paged = sparse_attention(
        q, got.k, got.v, pages, unit=16, q_positions=position, page_table=got.page_table
    )  # fmt: skip
    torch.testing.assert_close(paged, expected)
    tokens, counts = got.token_indices()
    listed = sparse_attention(q, got.k, got.v, tokens, counts=counts, page_table=got.page_table)
    torch.testing.assert_close(listed, expected)
    for b in range(2):
        pool.delete(0, torch.tensor([3, 197]), row=b)
    bias = torch.zeros(2, 1, 1, 200).index_fill_(3, torch.tensor([3, 197]), -torch.inf)
    everything = torch.arange(200).int().expand(2, 1, 1, 200)
    for b in range(2):
        one = pages[b].flatten().unique()
        one = one[one >= 0].int()[None, None, None]
        got = pool.gather(0, torch.stack([one[0, 0, 0]] * 2))
        tokens, counts = (x[:1, None, None] for x in got.token_indices())
        hidden = bias[:1].masked_fill(~torch.isin(everything[:1] // 16, one), -torch.inf)
        expected = sparse_attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], everything[:1], bias=hidden)
        listed = sparse_attention(
            q[b : b + 1], got.k, got.v, tokens, counts=counts, page_table=got.page_table[b : b + 1]
        )
        torch.testing.assert_close(listed, expected)


def test_gather_by_tokens_and_by_lists_per_head(tmp_path):
    pool, k, _ = filled(30, device_pages=6, folder=tmp_path)
    indices = torch.tensor([[[3, 9, -1]], [[29, 8, 3]]])  # [B, 1, n] tokens
    got = pool.gather(0, indices, unit=1)
    assert got.positions.tolist() == [[[3, 9, -1]], [[29, 8, 3]]]
    slot = got.page_table[1, 29 // PAGE]
    assert torch.equal(got.k[slot, 29 % PAGE], k[1, 29])
    lists = torch.tensor([[[0, 1], [1, 0]], [[2, -1], [0, 2]]])  # [B, HKV, n] pages
    assert pool.gather(0, lists).positions.shape == (BATCH, 2, 2, PAGE)


def test_hits_and_misses(tmp_path):
    pool, *_ = filled(30, device_pages=4, folder=tmp_path)
    first = torch.tensor([[0, 1], [0, -1]])
    pool.gather(0, first)
    assert (pool.traffic()["hits"], pool.traffic()["misses"]) == (0, 3)
    pool.gather(0, first)
    assert pool.traffic()["hit_rate"] == 0.5
    moved = pool.traffic()["file to device"]
    assert moved == 3 * DEVICE_PAGE
    pool.prefetch(0, torch.tensor([[5], [5]]))
    assert_gathered(pool, 0, torch.tensor([[5], [5]]))


def test_the_coldest_pages_lie_deepest(tmp_path):
    pool = make_pool(folder=tmp_path, device_pages=2, host_pages=3)
    for _ in range(10):
        pool.append(0, *rows(BATCH, PAGE))  # one page per row
    where = [(pool._pages.page_table(0, tier) >= 0).nonzero()[:, 0].tolist() for tier in (0, 1, 2)]
    assert where == [[9], [8], list(range(8))]
    pool.gather(0, torch.tensor([[8], [-1]]))
    assert pool.traffic()["host to device"] == DEVICE_PAGE and pool.traffic()["host to file"] >= 15 * DEVICE_PAGE
    for page in (7, 9, 5, 9, 6):  # 9 was used last, so 5 leaves for 6
        pool.gather(0, torch.tensor([[page], [-1]]))
    assert [p for p in range(10) if pool._pages.page_table(0)[p] >= 0] == [6, 9]


def test_pinned_pages_stay(tmp_path):
    pool, *_ = filled(60, device_pages=3, folder=tmp_path)
    pool.pin(0, torch.tensor([0, 1]))
    for page in range(1, 15):
        got = pool.gather(0, torch.tensor([[page], [page]]))
        assert got.page_table[0, 0] >= 0
    with pytest.raises(ValueError, match="3 pages are needed at once, and 1 are pinned; the device tier has 3"):
        pool.gather(0, torch.tensor([[3, 4], [3, -1]]))
    with pytest.raises(PoolFull, match="pin: 2 pages; 2 pages of the device tier are not pinned"):
        pool.pin(0, torch.tensor([20, 30]))
    pool.pin(0, torch.tensor([0]), pinned=False)
    assert_gathered(pool, 0, torch.tensor([[3, 4], [3, -1]]))


def test_rolling_back_unpins_what_is_no_longer_there(tmp_path):
    pool, *_ = filled(4, device_pages=3, folder=tmp_path)
    first = pool.snapshot()
    pool.append(0, *rows(BATCH, 4))
    pool.snapshot()
    pool.pin(0, torch.tensor([0, 5]))
    pool.roll_back(first)
    assert pool._pages.table.pages_pinned == 1
    assert_gathered(pool, 0, torch.tensor([[0], [0]]))


def test_full_pool_refuses_and_keeps_everything(tmp_path):
    pool, k, v = filled(30, device_pages=16)
    before = pool.read(0)
    with pytest.raises(PoolFull, match="have no place"):
        pool.append(0, *rows(BATCH, 9))
    assert torch.equal(pool.read(0)[0], before[0]) and pool.lengths(0).tolist() == [30, 30]
    limited = make_pool(folder=tmp_path, device_pages=2, file_bytes=3 * DEVICE_PAGE)
    with pytest.raises(PoolFull):
        limited.append(0, *rows(BATCH, 30))
    assert limited.lengths(0).tolist() == [0, 0]


def test_merge():
    pool, *_ = filled(5)
    other, k, v = filled(7, compress="int8")
    other.append(1, *rows(BATCH, 2), tags=3)
    other.delete(0, torch.tensor([2]))
    ids = pool.merge(other)
    assert ids[0].tolist() == [[5, 6, 7, 8, 9, 10, -1], [5, 6, 7, 8, 9, 10, 11]] and ids[1].tolist() == [[0, 1]] * 2
    assert torch.equal(pool.read(0)[0][5:], other.read(0)[0])
    assert pool.tokens(0).positions[0].tolist() == [0, 1, 2, 3, 4, 0, 1, 3, 4, 5, 6, -1]
    assert pool.tokens(1).tags.tolist() == [[3, 3], [3, 3]]
    with pytest.raises(ValueError, match="merge: unrotated_keys is True in other; expected False"):
        pool.merge(make_pool(unrotated_keys=True))


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codes_keep_their_bits(kind, dtype):
    """x̂ encodes to itself, is near x, and nothing finite becomes infinite."""
    x = torch.randn(64, 4, 32) * torch.logspace(-6, 4, 64)[:, None, None]
    x[0], x[1, 0, 0] = 0, 65504
    x = x.to(dtype)
    once = decode(*encode(x, kind), dtype)
    assert torch.equal(decode(*encode(once, kind), dtype), once) and once.isfinite().all()
    error = (once.float() - x.float()).abs().amax(-1)
    floor = 2.0**-24 if dtype == torch.float16 else 0.0
    assert (error <= x.float().abs().amax(-1) * (2 / 127 / 2 if kind == "int8" else 2**-4) + floor).all()


def test_row_that_is_not_finite_becomes_nan():
    x = torch.randn(3, 8)
    x[1, 2], x[2, 0] = torch.inf, torch.nan
    back = decode(*encode(x, "int8"), x.dtype)
    assert back[0].isfinite().all() and back[1:].isnan().all()


def refused(**change):
    return lambda: KVPool(**(dict(layers=1, kv_heads=1, head_dim=8) | change))


def call(name, *args, **options):
    def act():
        pool, *_ = filled(6)
        getattr(pool, name)(*args, **options)

    return act


K3, V3 = rows(BATCH, 3)


@pytest.mark.parametrize(
    "act, error, message",
    [
        (refused(layers=0), ValueError, "layers is 0; expected an integer ≥ 1"),
        (refused(page_size=2.0), ValueError, "page_size is 2.0; expected an integer"),
        (refused(dtype=torch.int8), TypeError, "dtype is torch.int8; allowed: float32"),
        (refused(compress="pq"), ValueError, r"compress is 'pq'; allowed: None, 'int8', 'fp8' \(product quant"),
        (refused(compress="int8", dtype=torch.float64), TypeError, "compressed pools take 16 or 32 bit"),
        (refused(summaries=("median",)), ValueError, "summaries has 'median'; allowed: mean, min, max"),
        (refused(forget="lru", capacity=3), ValueError, "forget is 'lru'; allowed: 'refuse', 'ring'"),
        (refused(forget="ring"), ValueError, "forgetting needs a capacity"),
        (refused(device_bytes=3), ValueError, "device_bytes is 3; expected at least one page of 4096"),
        (refused(folder="/nowhere/at/all"), ValueError, "a folder that exists"),
        (refused(file_bytes=9), ValueError, "file_bytes is 9 without a folder"),
        (call("append", 2, K3, V3), ValueError, "layer is 2; allowed: 0..1"),
        (call("append", 0, K3[:1], V3), ValueError, r"append: k has shape \[1, 3, 2, 8\]; expected \[B, T, HKV, K\]"),
        (call("append", 0, K3.half(), V3), TypeError, "k is float16; expected float32 like the pool"),
        (call("append", 0, K3, K3), ValueError, r"v has shape .*; expected \[B, T, HKV, V\] = \[2, 3, 2, 16\]"),
        (call("append", 0, K3, V3, tags=torch.zeros(3)), TypeError, "tags is torch.float32; expected int32 or int64"),
        (call("append", 0, K3, V3, positions=torch.arange(4)), ValueError, r"shape \[4\]; expected \[3\]"),
        (call("append", 0, K3, V3, lengths=torch.tensor([4, 0])), ValueError, r"lengths holds 0..4; allowed: 0..3"),
        (call("insert", 0, 6, K3[0], V3[0]), ValueError, r"insert: no token has id \[6\]"),
        (call("update", 0, torch.tensor([0, 0, 1]), K3[0], V3[0]), ValueError, "expected 3 distinct ids"),
        (call("update", 0, torch.tensor([0, 9, 1]), K3[0], V3[0]), ValueError, r"update: no token has id \[9\]"),
        (call("delete", 0, [1]), TypeError, "ids is list; expected a torch.Tensor"),
        (call("gather", 0, torch.tensor([[2], [0]])), ValueError, r"indices holds 0\.\.2; allowed: -1 \(padding\) and"),
        (call("gather", 0, torch.tensor([[0], [0]]), unit=3), ValueError, "unit is 3; allowed: 1, 4"),
        (call("gather", 0, torch.zeros(2, 1)), TypeError, "indices is float32; expected int32 or int64"),
        (call("gather", 0, torch.tensor([0, 0])), ValueError, r"indices has shape \[2\]; expected \[B, ..., n\]"),
        (call("roll_back", 5), ValueError, "there is no snapshot 5"),
        (call("summaries", 0), ValueError, "kind is 'mean'; allowed: "),
        (call("record_mass", 0, torch.tensor([[0], [0]]), torch.zeros(2, 2)), ValueError, r"mass has shape \[2, 2\]"),
    ],
)  # fmt: skip
def test_refusals(act, error, message):
    with pytest.raises(error, match=message):
        act()


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parent.parent / "docs" / "kv_pool.md").read_text()
    scope: dict = {}
    for block in page.split("```python\n")[1:]:
        exec(compile(block.split("```")[0], "docs/kv_pool.md", "exec"), scope)
