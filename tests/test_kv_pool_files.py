"""Saved pools and the disk: what a kill, a full disk or a foreign file leaves, what deletion overwrites; budgets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.pool import BATCH, DEVICE_PAGE, HEADS, KEY_DIM, TIERS, VALUE_DIM, make_pool

from memattn import KVPool, _native
from memattn.pool import PoolFull, erase_saved, saved

pytestmark = pytest.mark.skipif(_native.host() is None, reason=str(_native.native_reason("_host")))
TESTS = Path(__file__).resolve().parent


def filled(tokens=30, **options):
    pool = make_pool(**options)
    for layer in range(2):
        k, v = torch.randn(BATCH, tokens, HEADS, KEY_DIM), torch.randn(BATCH, tokens, HEADS, VALUE_DIM)
        pool.append(layer, k, v, tags=torch.arange(tokens) % 3)
    return pool


def assert_same_tokens(a, b):
    for layer in range(2):
        one, other = a.tokens(layer), b.tokens(layer)
        assert torch.equal(one.ids, other.ids) and torch.equal(one.positions, other.positions)
        assert torch.equal(one.tags, other.tags)
        for row in range(BATCH):
            assert all(torch.equal(x, y) for x, y in zip(a.read(layer, row=row), b.read(layer, row=row), strict=True))


def bytes_of(x):
    return bytes(saved._memory(x.contiguous()))


def python(code, *arguments, **options):
    """Starts code in a process that can import memattn and the tests' support."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "python"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("tiers", TIERS)
def test_saved_and_loaded_on_other_tiers(tiers, tmp_path):
    options = TIERS[tiers](tmp_path)
    pool = filled(**options)
    pool.delete(1, torch.tensor([2, 3, 29]))
    pool.pin(0, torch.tensor([0])) if options.get("device_pages") != 1 else None
    pool.save(tmp_path / "pool.safetensors")
    loaded = KVPool.load(tmp_path / "pool.safetensors")
    assert_same_tokens(pool, loaded)
    assert loaded.append(1, *(x[:, :1] for x in _rows(1))).tolist() == [[30], [30]]
    assert loaded._pages.table.pages_pinned == pool._pages.table.pages_pinned
    small = KVPool.load(tmp_path / "pool.safetensors", device_bytes=DEVICE_PAGE, folder=tmp_path)
    assert_same_tokens(pool, small)


def _rows(count):
    return torch.randn(BATCH, count, HEADS, KEY_DIM), torch.randn(BATCH, count, HEADS, VALUE_DIM)


@pytest.mark.parametrize("compress", [None, "int8", "fp8"])
def test_safetensors_reads_the_file(compress, tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="safetensors is not installed")
    pool = filled(compress=compress)
    path = tmp_path / "pool.safetensors"
    pool.save(path)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "memattn-kv-pool" and file.metadata()["version"] == "1"
        assert file.get_tensor("ids")[0].tolist() == [0, 1, 2, 3]
        k = file.get_tensor("k")[0].float()
        if compress:
            k = k * file.get_tensor("k_scale")[0][..., None]
        assert torch.equal(k, pool.read(0)[0][:4])


def test_another_process_loads(tmp_path):
    pool = filled(folder=tmp_path, device_pages=2)
    pool.save(tmp_path / "pool.safetensors")
    code = "import sys, memattn; print(memattn.KVPool.load(sys.argv[1]).read(1, row=1)[0].double().sum().item())"
    out, error = python(code, tmp_path / "pool.safetensors").communicate(timeout=120)
    assert float(out) == pool.read(1, row=1)[0].double().sum().item(), error


def test_empty_pool_is_saved_and_loaded(tmp_path):
    make_pool().save(tmp_path / "pool.safetensors")
    assert KVPool.load(tmp_path / "pool.safetensors").lengths(0).tolist() == [0, 0]


KILLED = """
import sys, time
from memattn import KVPool
from memattn.pool import saved
pool = KVPool.load(sys.argv[1])
pool.delete(0, pool.tokens(0).ids[0, :5])
write, calls = saved.write_all, 0
def slow(*arguments):
    global calls
    calls += 1
    write(*arguments)
    if calls == int(sys.argv[2]):
        print("writing", flush=True)
        time.sleep(60)
saved.write_all = slow
pool.save(sys.argv[1])
print("saved", flush=True)
"""


@pytest.mark.parametrize("calls", [12, 38])
def test_killed_in_the_middle_of_a_save(calls, tmp_path):
    """The file holds what was there before the save, and the next save takes over what the dead one left."""
    path = tmp_path / "pool.safetensors"
    pool = filled()
    pool.save(path)
    child = python(KILLED, path, calls)
    assert child.stdout.readline() == "writing\n", child.stderr.read()
    with pytest.raises(OSError, match="another process is saving to it; what was saved there before is unchanged"):
        pool.save(path)
    child.kill()
    child.communicate()
    pool.delete(0, torch.arange(5))  # the child's deletion had reached the file
    assert_same_tokens(pool, KVPool.load(path))
    assert not list(tmp_path.glob("*.saving"))
    pool.save(path)
    assert_same_tokens(pool, KVPool.load(path))


def test_killed_in_the_middle_of_a_deletion(tmp_path):
    """First tokens stop to be tokens: a kill before their bytes are gone leaves a readable file without them."""
    path = tmp_path / "pool.safetensors"
    pool = filled()
    pool.save(path)
    code = KILLED.replace("pool.delete(0, pool.tokens(0).ids[0, :5])", "").replace(
        "pool.save(sys.argv[1])", "pool.delete(0, pool.tokens(0).ids[0, :5])"
    )
    child = python(code, path, 11)  # five ids, five positions, then bytes
    assert child.stdout.readline() == "writing\n", child.stderr.read()
    child.kill()
    child.communicate()
    loaded = KVPool.load(path)
    assert loaded.tokens(0).ids[0].tolist()[:25] == list(range(5, 30))
    pool.delete(0, torch.arange(5))
    assert_same_tokens(pool, loaded)


FAILING = """
import resource, sys
from memattn import KVPool
pool = KVPool.load(sys.argv[1])
for limit in (100, 5000, 20000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        pool.save(sys.argv[1])
    except OSError as error:
        print(error)
"""


def test_a_file_that_may_not_grow(tmp_path):
    path = tmp_path / "pool.safetensors"
    pool = filled()
    pool.save(path)
    before = path.read_bytes()
    out, error = python(FAILING, path).communicate(timeout=120)
    assert out.count("File too large; what was saved there before is unchanged") == 3, error
    assert path.read_bytes() == before and not list(tmp_path.glob("*.saving"))
    assert_same_tokens(pool, KVPool.load(path))


@pytest.mark.parametrize("fails", ["fsync", "replace", "pwrite"])
def test_a_disk_that_fails(fails, tmp_path, monkeypatch):
    path = tmp_path / "pool.safetensors"
    pool = filled()
    pool.save(path)
    before = path.read_bytes()

    def no_space(*arguments):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, fails, no_space)
    with pytest.raises(OSError, match=f"{path}: No space left on device; what was saved there before is unchanged"):
        pool.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before and not list(tmp_path.glob("*.saving"))


GROWING = """
import resource, sys, torch
from support.pool import *
pool = make_pool(folder=sys.argv[1], device_pages=2)
k, v = torch.randn(BATCH, 30, HEADS, KEY_DIM), torch.randn(BATCH, 30, HEADS, VALUE_DIM)
pool.append(0, k, v)
resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, resource.RLIM_INFINITY))
more = torch.randn(BATCH, 40000, HEADS, KEY_DIM), torch.randn(BATCH, 40000, HEADS, VALUE_DIM)
for layer in (0, 1):
    try:
        pool.append(layer, *more)
    except OSError as error:
        print(error)
assert torch.equal(pool.read(0)[0], k[0]) and pool.lengths(1).tolist() == [0, 0]
pool.append(1, k, v)
assert torch.equal(pool.read(1, row=1)[1], v[1])
"""


def test_a_file_tier_that_cannot_grow(tmp_path):
    """The error comes before anything is written, and the pool goes on."""
    child = python(GROWING, tmp_path)
    out, error = child.communicate(timeout=120)
    assert child.returncode == 0, error
    assert out.count("nothing was written, nothing is lost") == 2 and "File too large" in out
    assert not list(tmp_path.iterdir())  # the file has no name


def test_deleted_bytes_are_gone_from_the_disk(tmp_path):
    path = tmp_path / "pool.safetensors"
    pool = filled(folder=tmp_path, device_pages=2)
    pool.save(path)
    k, v = pool.read(0)
    row_k, row_v, kept = bytes_of(k[7]), bytes_of(v[7]), bytes_of(k[8])
    tier = Path(f"/proc/self/fd/{pool._pages.tiers.file.descriptor}")
    assert row_k in path.read_bytes() and row_k in tier.read_bytes()
    Path(f"{path}.saving").write_bytes(path.read_bytes())  # as a killed save leaves it
    leftover = os.open(f"{path}.saving", os.O_RDONLY)
    pool.delete(0, torch.tensor([7]))
    for content in (path.read_bytes(), tier.read_bytes(), os.pread(leftover, 1 << 20, 0)):
        assert row_k not in content and row_v not in content
    os.close(leftover)
    assert kept in path.read_bytes() and not Path(f"{path}.saving").exists()
    assert_same_tokens(pool, KVPool.load(path))


def test_a_file_that_is_not_this_pools_is_left_alone(tmp_path):
    path = tmp_path / "pool.safetensors"
    pool, other = filled(), filled()
    pool.save(path)
    other.save(path)
    pool.delete(0, torch.arange(9))
    assert_same_tokens(other, KVPool.load(path))
    erase_saved(path, 0, torch.arange(9))
    other._saved.clear()
    other.delete(0, torch.arange(9))
    assert_same_tokens(other, KVPool.load(path))
    path.unlink()
    pool.delete(0, torch.tensor([9]))  # no file, no error
    with pytest.raises(ValueError, match="there is no such file"):
        erase_saved(path, 0, torch.arange(9))


def test_a_pool_of_which_everything_is_deleted(tmp_path):
    pool = filled(folder=tmp_path, device_pages=2)
    pool.save(tmp_path / "pool.safetensors")
    assert sum(pool.delete_tagged(tag) for tag in range(3)) == 2 * BATCH * 30
    assert pool.lengths(0).tolist() == [0, 0] and pool._pages.table.pages_held == 0
    assert KVPool.load(tmp_path / "pool.safetensors").lengths(1).tolist() == [0, 0]


def test_files_that_are_no_saved_pool(tmp_path):
    path = tmp_path / "pool.safetensors"
    filled().save(path)
    whole = path.read_bytes()
    cases = {
        whole[:-1]: "ends at byte", whole[:100]: "is not a safetensors file", b"": "is not a safetensors file",
        b"x" * 4096: "is not a safetensors file", whole.replace(b'"version": "1"', b'"version": "9"'): "version '9'",
        whole.replace(b"memattn-kv-pool", b"another-kv-pool"): "expected 'memattn-kv-pool', '1'",
    }  # fmt: skip
    for content, message in cases.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            KVPool.load(path)
    with pytest.raises(ValueError, match="there is no such file"):
        KVPool.load(tmp_path / "none")
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="load: batch, layers given; the file decides"):
        KVPool.load(path, batch=2, layers=1)
    with pytest.raises(PoolFull):
        KVPool.load(path, device_bytes=3 * DEVICE_PAGE)


BUDGET = """
import sys, torch
from memattn import KVPool

def anonymous():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def mapped():
    total, own = 0, False
    for line in open("/proc/self/smaps"):
        if line[0] in "0123456789abcdef" and "-" in line.split()[0]:
            own = sys.argv[1] in line
        elif own and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total

chunk = torch.randn(1, 1024, 8, 64).bfloat16()
pool = KVPool(1, 8, 64, dtype=torch.bfloat16, device_bytes=8 << 20, folder=sys.argv[1])
pool.append(0, chunk, chunk)
pool.gather(0, torch.tensor([[0]]))
before, highest = anonymous(), 0
for i in range(63):
    pool.append(0, chunk, chunk)
    pool.gather(0, torch.randint(16 * (i + 2), (1, 20)))
    highest = max(highest, anonymous() - before + mapped())
print(highest, sum(pool.memory().values()), pool.memory()["file"])
"""


def test_growth_stays_within_the_budget(tmp_path):
    """128 MiB through a device tier of 8 MiB: anonymous memory and mapped file pages together."""
    out, error = python(BUDGET, tmp_path).communicate(timeout=120)
    highest, total, in_file = map(int, out.split())
    assert in_file > 100 << 20, error
    assert highest < (8 << 20) + (20 << 20) + (4 << 20), f"{highest >> 20} MiB"  # device tier, mapped limit, tables
