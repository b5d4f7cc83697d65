"""attention_decode on every backend of this machine: truth, tolerance, relations, planted bugs, registration, errors."""

# ruff: noqa: E501 (tables, one case a line)
import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import host_cuda, tables
from support.decode import (
    CASES,
    CHECKS,
    ROUNDED,
    SMALL,
    assert_equal_results,
    batch_invariance,
    case,
    finite,
    in_ring,
    judge,
    paged,
    paged_equals_contiguous,
    queries_together_equal_one_by_one,
    ring_equals_contiguous,
    run_all,
    truth_of,
)
from support.decode_planted import BUGS, planted

import memattn
from memattn import backends
from memattn.ops import attention_decode
from memattn.ops._library import resolve
from memattn.reference import attention_decode as reference

TESTS = Path(__file__).parent
NO_KERNELS = backends.why_not("attention_decode", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))
cpu = functools.partial(attention_decode, backend="cpu")


@pytest.fixture(params=["cpu", "cuda", "chunked"])
def backend(request, device, monkeypatch):
    """Each backend that can run here; on the CPU cuda is compiled for the host."""
    if request.param == "cuda":
        host_cuda.ready(monkeypatch, device, "attention_decode", "attention_decode")
    if reasons := backends.why_not(
        "attention_decode", request.param, backends.Request(device, torch.float32), explicit=True
    ):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_within_tolerance_of_truth(c, backend, device):
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if c.name in ROUNDED else (torch.float32,):
        actual = attention_decode(**c.make(dtype, device), backend=backend)
        assert actual.o.dtype == dtype and actual.lse.dtype == torch.float32
        judge(c, dtype, actual._asdict())


@pytest.mark.parametrize("c", [c for c in CASES if c.capacity < 500], ids=lambda c: c.name)
def test_float64(c, backend, device):
    if backend == "cuda":
        pytest.skip("cuda has no float64")
    truth = truth_of(c, torch.float64)
    actual = finite(attention_decode(**c.make(torch.float64, device), backend=backend)._asdict(), truth)
    for name, expected in finite(truth, truth).items():
        torch.testing.assert_close(actual[name].cpu(), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, backend, device):
    CHECKS[check](functools.partial(attention_decode, backend=backend), device)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    failures = {name: reason for name, reason in run_all(planted(bug)).items() if reason}
    assert failures, f"no check noticed: {bug}"


def test_reference_passes_every_relation():
    assert {name: reason for name, reason in run_all(reference.chunked).items() if reason} == {}


def test_poisoned_memory(backend, device):
    """Nothing is read before it is written: fresh tensors come filled with NaN."""
    cases = [c for c in CASES if c.name in ("many tokens", "decay", "odd", "long window")]
    expected = [attention_decode(**c.make(device=device), backend=backend) for c in cases]
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        poisoned = [attention_decode(**c.make(device=device), backend=backend) for c in cases]
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]
    for c, a, b in zip(cases, expected, poisoned, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)), c.name


def test_nan_in_a_key_reaches_the_rows_that_see_it(backend, device):
    inputs = case("nan", {"window": 10}, queries=3, lengths=(40, 40)).make(device=device)
    inputs["k_cache"][1, 29, 0, 3] = torch.nan  # seen by position 38 at the latest
    o, lse = attention_decode(**inputs, backend=backend)
    touched = torch.zeros_like(lse, dtype=torch.bool)
    touched[1, :2, :2] = True
    assert torch.equal(lse.isnan(), touched) and torch.equal(o.isnan().all(-1), touched)


# --- the CUDA kernel -------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch, device):
    host_cuda.ready(monkeypatch, device, "attention_decode", "attention_decode")
    return functools.partial(attention_decode, backend="cuda")


def test_more_splits_than_threads_merge(cuda, device):
    c = case("splits", heads=1, key_heads=1, lengths=(33500,), capacity=34000)
    judge(c, torch.float32, cuda(**c.make(device=device))._asdict())


def test_misaligned_cache_gives_the_same_bits(cuda, device):
    """A cache that begins 4 bytes beside a 16-byte boundary is read number by number."""
    inputs = case("beside", key_dim=32, value_dim=32).make(device=device)
    k = inputs["k_cache"]
    beside = torch.empty(k.numel() + 1, device=device)[1:].view(k.shape).copy_(k)
    assert_equal_results(cuda(**{**inputs, "k_cache": beside}), cuda(**inputs), "misaligned", tolerance=0.0)


def test_lengths_pages_and_rings_that_are_wrong_reach_nothing(cuda, device):
    """The op below the public function bounds what is a value."""
    inputs = case("wrong", lengths=(5, 6), capacity=8).make(device=device)
    q, k, v, n = (inputs[name] for name in ("q", "k_cache", "v_cache", "cache_seqlens"))
    table, rest = torch.zeros(2, 3, dtype=torch.int32, device=device), (-1, 1, 0, 0, 0, 0, 0, 0, False, 0.25)
    op = resolve("attention_decode_cuda")
    beyond, lse = op(q, k, v, n + 100, table + 7, None, None, None, *rest)
    assert not beyond.any() and (lse == -torch.inf).all()
    op(q, k, v, n + 100, None, None, None, None, *rest)
    for arguments, message in (
        ((q, k[:1], v, n, None, None, None, None, *rest), "k_cache must be float32"),
        ((q, k, v, n, table[:1], None, None, None, *rest), "page_table must be int32"),
        ((q, k, v, n, None, None, None, None, 8, *rest[1:]), "ring_start must be below the capacity 8; got 8"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


def test_cuda_offsets_beyond_32_bits(cuda, device):
    """One page, the last of more than 2^31 values, is seen: the others cost no memory on the host."""
    pages = 2**23 + 2
    try:
        k, v = (torch.empty(pages, 16, 1, 16, device=device) for _ in range(2))
    except RuntimeError as error:
        pytest.skip(f"no memory: {error}")
    k[-1], v[-1] = 0.0, torch.arange(16.0, device=device)[:, None, None]
    table = torch.tensor([[pages - 1]], dtype=torch.int32, device=device)
    lengths = torch.tensor([16], device=device)
    o, lse = cuda(torch.ones(1, 1, 1, 16, device=device), k, v, cache_seqlens=lengths, page_table=table)
    assert (o == 7.5).all() and torch.allclose(lse.cpu(), torch.tensor(16.0).log())


# --- the C++ kernel --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "relation",
    [batch_invariance, paged_equals_contiguous, ring_equals_contiguous, queries_together_equal_one_by_one],
)
def test_bits_do_not_depend_on_company_or_layout(relation, dtype, backend, device, full):
    if backend == "chunked":
        pytest.skip("plain torch promises no bits")
    if backend == "cuda" and device == "cpu" and dtype == torch.float32 and not full:
        pytest.skip("on the host one dtype shows the order of sums; both run with --full")

    def rounded(**inputs):
        inputs = {n: x.to(dtype) if n in ("q", "k_cache", "v_cache") else x for n, x in inputs.items()}
        return attention_decode(**inputs, backend=backend)

    relation(rounded, device, tolerance=0.0)


@needs_cpu_kernels
def test_bits_do_not_depend_on_the_thread_count():
    calls = [c.make(dtype) for c in CASES if "long" in c.name for dtype in (torch.float32, torch.bfloat16)]
    big = case("big", heads=8, key_heads=8, key_dim=64, value_dim=64, lengths=(6000,), capacity=6000).make()
    calls += [big, paged(big, 100), in_ring(calls[-1], 900)]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append([cpu(**call) for call in calls])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))


def table_errors():
    """Results of the table in this process that miss the truth by more than the rule allows."""

    def check(c, dtype):
        judge(c, dtype, cpu(**c.make(dtype))._asdict())

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return tables.misses(check, [(c, dtype) for c in CASES if c.name in ROUNDED for dtype in dtypes])


@needs_cpu_kernels
@tables.each
def test_every_instruction_set(isa):
    tables.assert_no_errors(isa, __name__)


@needs_cpu_kernels
def test_offsets_beyond_32_bits():
    """Only the last keys of more than 2^31 values are seen, so they cost no memory."""
    keys = 2**27 + 100
    try:
        k, v = torch.empty(1, keys, 1, 16), torch.empty(1, keys, 1, 16)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    k[:, -200:], v[:, -200:] = 0.0, torch.arange(200.0)[:, None, None]
    o, lse = cpu(torch.ones(1, 2, 1, 16), k, v, cache_seqlens=torch.tensor([keys]), window=4)
    assert torch.allclose(o[0, :, 0, 0], torch.tensor([196.5, 197.5])) and torch.allclose(lse, torch.tensor(4.0).log())


# --- registration ----------------------------------------------------------------------------------------------------


@needs_cpu_kernels
@pytest.mark.parametrize("pages", [False, True])
def test_opcheck(pages):
    inputs = replace(SMALL, sinks=0, decay=0.1, mask={}).make()
    inputs = paged(inputs) if pages else inputs
    args = (
        *(inputs[n] for n in ("q", "k_cache", "v_cache", "cache_seqlens")), inputs.get("page_table"), inputs["sink"],
        inputs["decay_cache"], None, -1, 1, 20, 0, 0, 0, 0, 0, False, 0.25,
    )  # fmt: skip
    assert set(torch.library.opcheck(resolve("attention_decode_cpu"), args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_fullgraph(compiler, backend, device):
    if backend == "chunked" and compiler == "inductor":
        pytest.skip("plain torch: what inductor makes of it is torch's matter")
    torch._dynamo.reset()
    op = functools.partial(attention_decode, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend=compiler)
    for inputs in (SMALL.make(device=device), paged(SMALL.make(device=device)), in_ring(SMALL.make(device=device), 13)):
        assert_equal_results(compiled(**inputs), op(**inputs), "compiled", tolerance=1e-6)


def test_autocast_changes_nothing(backend, device):
    inputs = SMALL.make(device=device)
    expected = attention_decode(**inputs, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = attention_decode(**inputs, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


# --- errors ----------------------------------------------------------------------------------------------------------


def x(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def seqlens(*lengths, dtype=torch.int64):
    return torch.tensor(lengths, dtype=dtype)


ONE = case("errors", lengths=(5, 6), capacity=8)
TABLE = torch.zeros(2, 3, dtype=torch.int32)
BAD = {
    "q rank": (dict(q=x(2, 4, 16)), ValueError, r"q has shape \[2, 4, 16\] of rank 3; expected \[B, t, HQ, K\]"),
    "q dtype": (dict(q=x(2, 1, 4, 16, dtype=torch.int64)), TypeError, "q is int64; expected float32 or bfloat16"),
    "cache rank": (dict(k_cache=x(2, 8, 16)), ValueError, r"k_cache has shape .* of rank 3; expected \[B, capacity, HKV, K\]"),
    "cache rows": (dict(k_cache=x(3, 8, 2, 16)), ValueError, r"k_cache has shape \[3, 8, 2, 16\]; expected .* = \[2, 8, 2, 16\]"),
    "cache dtype": (dict(k_cache=x(2, 8, 2, 16, dtype=torch.float16)), TypeError, "k_cache is float16; expected float32 like q"),
    "v capacity": (dict(v_cache=x(2, 7, 2, 24)), ValueError, r"v_cache has shape \[2, 7, 2, 24\]; expected .* = \[2, 8, 2, 24\]"),
    "heads": (dict(q=x(2, 1, 3, 16)), ValueError, "q has 3 heads; expected a positive multiple of k_cache's 2 heads"),
    "head dim": (dict(v_cache=x(2, 8, 2, 8)), ValueError, "head dimension V is 8; allowed: 16..256"),
    "strides": (dict(k_cache=x(2, 2, 8, 16).transpose(1, 2)), ValueError, "k_cache has strides .* expected a contiguous cache"),
    "lengths shape": (dict(cache_seqlens=seqlens(1, 2, 3)), ValueError, r"cache_seqlens has shape \[3\]; expected \[B\] = \[2\]"),
    "lengths dtype": (dict(cache_seqlens=x(2)), TypeError, "cache_seqlens is float32; expected int32 or int64"),
    "lengths too long": (dict(cache_seqlens=seqlens(5, 9)), ValueError, r"cache_seqlens holds 5..9; allowed: -1 \(padding\)..8"),
    "lengths negative": (dict(cache_seqlens=seqlens(-2, 3), ring_start=0), ValueError, r"cache_seqlens holds -2..3; allowed: ≥ -1"),
    "table dtype": (dict(page_table=TABLE.long()), TypeError, "page_table is int64; expected int32"),
    "table rows": (dict(page_table=TABLE[:1]), ValueError, r"page_table has shape \[1, 3\]; expected \[B, max_pages\] = \[2, 3\]"),
    "table values": (dict(page_table=TABLE + 2), ValueError, r"page_table holds 2..2; allowed: -1 \(no page\)..1"),
    "ring beyond": (dict(ring_start=8), ValueError, "ring_start is 8; expected None or a slot 0..7"),
    "ring tensor": (dict(ring_start=seqlens(0)), ValueError, "ring_start is tensor.*; expected None or a slot"),
    "sink shape": (dict(sink=x(2)), ValueError, r"sink has shape \[2\]; expected \[HQ\] or \[HQ, r\] = \[4\]"),
    "decay dtype": (dict(decay_cache=x(2, 8, 4)), TypeError, "decay_cache is float32; expected float64"),
    "decay shape": (dict(decay_cache=x(2, 8, 2, dtype=torch.float64)), ValueError, r"decay_cache has shape .*; expected \[B, capacity, HQ\] = \[2, 8, 4\]"),
    "summary": (dict(chunk_rule=("summary", 4)), ValueError, "keys are no tokens; give the number of finished chunks"),
    "decay and prefix": (dict(decay_cache=x(2, 8, 4, dtype=torch.float64), prefix_len=1), ValueError, "decay_cache is given with prefix_len"),
    "window": (dict(window=0), ValueError, "window is 0; expected an integer ≥ 1 or None"),
    "causal": (dict(causal=1), ValueError, "causal is 1; allowed: True, False, 'block'"),
    "head map": (dict(head_map="mqa"), ValueError, "head_map is 'mqa'; allowed: 'gqa', 'tile'"),
    "scale": (dict(scale=0.0), ValueError, "scale is 0.0; expected a finite number > 0 or None"),
    "gradient": (dict(q=x(2, 1, 4, 16).requires_grad_()), RuntimeError, "an input requires grad; the step is for inference only, use attention"),
    "backend": (dict(backend="triton"), memattn.BackendError, "attention_decode has no triton kernel; it has: cuda, cpu, chunked"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        attention_decode(**{**ONE.make(), **change})
    assert str(caught.value).startswith("attention_decode: ")


@needs_cpu_kernels
def test_the_c_entry_checks_what_memory_needs():
    """The op of the library is public: it must refuse what would reach outside a tensor, and bound what is a value."""
    inputs = ONE.make()
    q, k, v, n = (inputs[name] for name in ("q", "k_cache", "v_cache", "cache_seqlens"))
    op, rest = torch.ops.memattn.attention_decode_cpu, (-1, 1, 0, 0, 0, 0, 0, 0, False, 0.25)
    for arguments, message in (
        ((q, k[:1], v, n, None, None, None, None, *rest), "k_cache must be float32"),
        ((q, k, v[:, :5], n, None, None, None, None, *rest), "v_cache must be float32"),
        ((q, k, v, n[:1], None, None, None, None, *rest), "cache_seqlens must be int32 or int64"),
        ((q, k, v, n, TABLE[:1], None, None, None, *rest), "page_table must be int32"),
        ((q, k, v, n, None, x(3), None, None, *rest), "sink must be float32"),
        ((q, k, v, n, None, None, x(2, 8, 4), None, *rest), "decay_cache must be float64"),
        ((q, k, v, n, None, None, None, None, 8, *rest[1:]), "ring_start must be -1"),
        ((q, k, v, n, None, None, None, None, -1, 3, *rest[2:]), "causal must be 0, 1 or 2; got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    beyond, _ = op(q, k, v, n + 100, TABLE + 7, None, None, None, *rest)
    assert not beyond.any()


@needs_cpu_kernels
def test_positions_far_beyond_a_ring():
    """Only torch.ops lets such a prefix through; the work is bounded by the ring all the same, and nothing overflows."""
    q, cache = torch.randn(2, 1, 2, 16), torch.randn(2, 64, 2, 16)
    for length in (2**31 - 1, 2**63 - 1):
        seen = torch.tensor([length, length])
        rest = None, None, None, None, 4, 1, 0, 2**62, 0, 0, 0, 0, False, 0.25
        o, _ = torch.ops.memattn.attention_decode_cpu(q, cache, cache, seen, *rest)
        expected = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(1, 2), cache.transpose(1, 2), cache.transpose(1, 2), scale=0.25
        )
        torch.testing.assert_close(o, expected.transpose(1, 2), rtol=1e-5, atol=1e-6)
