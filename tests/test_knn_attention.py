"""knn and knn_attention on every backend: exact on whole numbers, nearest within rounding, relations, planted bugs."""

# ruff: noqa: E501 (tables, one case a line)
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tables
from support.knn import (
    BUGS,
    CASES,
    CHECKS,
    COSINE,
    SMALL,
    TENSORS,
    Case,
    assert_found,
    assert_nearest,
    attention_error,
    planted,
    run_all,
    search,
)
from support.relations import assert_same

from memattn import backends
from memattn.ops import attention, knn, knn_attention, merge_states
from memattn.ops._library import resolve
from memattn.reference import knn_attention as reference

NO_KERNELS = backends.why_not("knn", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=["cpu", "chunked"])
def backend(request, device):
    """Each backend that can run here."""
    if reasons := backends.why_not("knn", request.param, backends.Request(device, torch.float32), explicit=True):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


def op_of(backend):
    """knn_attention as the references return it."""

    def op(**given):
        o, lse, found = knn_attention(**given, backend=backend)
        return (o, lse), found

    return op


def check_all(c, dtype, backend, device="cpu"):
    given = c.make(dtype, device)
    found = knn(**search(given), backend=backend)
    assert found.values.dtype == torch.promote_types(dtype, torch.float32)
    (assert_found if c.whole else assert_nearest)(found, given, c.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_finds_the_nearest(dtype, backend, device):
    for c in CASES + COSINE:
        check_all(c, dtype, backend, device)
    check_all(replace(SMALL, whole=False, tokens=1000), dtype, backend, device)


def table_errors():
    """Searches of the table in this process that miss."""
    calls = [(c, dtype, "cpu") for c in CASES + COSINE for dtype in (torch.float32, torch.bfloat16)]
    return tables.misses(check_all, calls)


@needs_cpu_kernels
@tables.each
def test_every_instruction_set(isa):
    tables.assert_no_errors(isa, __name__)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_within_tolerance_of_truth(dtype, backend, device):
    for c in (SMALL, replace(SMALL, heads=4, lengths=(130, 0)), replace(SMALL, threshold=9.0)):
        attention_error(op_of(backend), c, dtype, device)


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, backend, device):
    CHECKS[check](op_of(backend), device)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    failures = {name: reason for name, reason in run_all(planted(bug)).items() if reason}
    assert failures, f"no check noticed: {bug}"


def test_reference_passes_every_relation(monkeypatch):
    monkeypatch.setattr(reference, "PART", 64)
    assert {name: reason for name, reason in run_all(reference.chunked).items() if reason} == {}


def test_reference_finds_what_its_definition_finds():
    given = search(replace(SMALL, tokens=60, lengths=(60, 7), heads=4).make(torch.float64))
    assert_same(reference.chunked_knn(**given), reference.loop_knn(**given), "loop")


def test_attention_in_chunks_of_queries(monkeypatch):
    given = SMALL.make()
    expected = reference.chunked(**given)[0]
    monkeypatch.setattr(reference, "CHUNK", 2000)
    torch.testing.assert_close(reference.chunked(**given)[0], expected)


def test_sorted(backend, device):
    given = search(replace(SMALL, tokens=50, k=60).make(device=device))
    found, by_index = knn(**given, sorted=True, backend=backend), knn(**given, backend=backend)
    values, rank = by_index.values.sort(dim=-1, descending=True, stable=True)
    assert_same(found, (values, by_index.indices.gather(-1, rank), by_index.counts), "sorted")


def test_a_planted_needle_is_found(backend, device):
    """One key in 20,000 points along the query; the more it does, the more o is its value."""
    noise = torch.Generator().manual_seed(0)
    q, keys, values = (torch.randn(1, n, 1, 64, generator=noise).to(device) for n in (1, 20_000, 20_000))
    keys[0, 12_345, 0] = 4 * q[0, 0, 0]
    for metric in ("dot", "cos"):
        o, _, found = knn_attention(q, keys, values, 4, metric=metric, backend=backend)
        assert 12_345 in found.indices.flatten().tolist()
        torch.testing.assert_close(o[0, 0, 0], values[0, 12_345, 0], rtol=1e-4, atol=1e-4)


def test_joins_local_attention(backend, device):
    """A memory and a local window, one softmax: with every key found, attention over both."""
    given = replace(SMALL, tokens=40, k=64, whole=False).make(device=device)
    q, keys, values = (given[n] for n in TENSORS)
    local = attention(q, q, q[..., :1].expand_as(values[:, :5]), causal=False)
    retrieved = knn_attention(**given, backend=backend)
    joined = merge_states([local.o, retrieved.o], [local.lse, retrieved.lse])
    both = attention(
        q, torch.cat([q, keys], 1), torch.cat([q[..., :1].expand_as(values[:, :5]), values], 1), causal=False
    )
    torch.testing.assert_close(joined, both)


@needs_cpu_kernels
def test_bits_do_not_depend_on_the_thread_count():
    threads, results = torch.get_num_threads(), []
    calls = [
        search(replace(SMALL, whole=False, **sizes).make())
        for sizes in ({"tokens": 20_000, "batch": 1, "queries": 1, "k": 50}, {"queries": 700, "tokens": 130})
    ]
    try:
        for n in (1, 2, 5, 5):
            torch.set_num_threads(n)
            results.append([knn(**given, backend="cpu") for given in calls])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, x in zip(results[0], other, strict=True):
            assert_same(x, one, "threads")


@needs_cpu_kernels
def test_bits_do_not_depend_on_company():
    given = search(replace(SMALL, whole=False, queries=40).make())
    whole = knn(**given, backend="cpu")
    alone = knn(**{**given, "q": given["q"][1:, 17:18], "keys": given["keys"][1:]}, backend="cpu")
    assert_same(alone, [x[1:, 17:18] for x in whole], "company")


def test_carries_no_gradient_but_the_attention_does(backend, device):
    given = SMALL.make(device=device)
    given["q"].requires_grad_()
    assert not knn(**search(given), backend=backend).values.requires_grad
    result = knn_attention(**given, backend=backend)
    assert result.o.requires_grad and result.lse.requires_grad and not result.found.values.requires_grad


@pytest.mark.parametrize("c", [Case("", 1, 2, 2, 6, 1, 4, 3, k=3, whole=False)])
def test_gradcheck(c, backend, device):
    given = c.make(torch.float64, device)
    leaves = [given[n].requires_grad_() for n in TENSORS]

    def op(*tensors):
        return knn_attention(**{**given, **dict(zip(TENSORS, tensors, strict=True))}, backend=backend)[:2]

    assert torch.autograd.gradcheck(op, leaves) and torch.autograd.gradgradcheck(op, leaves)


@needs_cpu_kernels
def test_opcheck():
    given = search(SMALL.make())
    for lengths in (None, torch.tensor([5, 70])):
        args = (given["q"], given["keys"], 6, lengths, True, 0.1)
        assert set(torch.library.opcheck(resolve("knn_cpu"), args).values()) == {"SUCCESS"}


def test_compiled_fullgraph(backend, device):
    torch._dynamo.reset()
    op = op_of(backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for c in (SMALL, replace(SMALL, lengths=(130, 0))):
        given = c.make(device=device)
        (o, lse), found = compiled(**given)
        (expected, expected_lse), expected_found = op(**given)
        assert_same(found, expected_found, c.name)
        torch.testing.assert_close((o, lse), (expected, expected_lse))


@needs_cpu_kernels
def test_keys_past_element_2_to_31():
    """The last keys of a memory whose elements do not fit 32 bits; memory that nobody touches costs nothing."""
    tokens, dim = 2**31 // 4096 + 70, 4096
    keys = torch.zeros(1, 1, 1, 1, dtype=torch.float16).expand(1, 1, 1, dim)
    far = torch.empty(2, tokens, 1, dim, dtype=torch.float16)
    far[1, :70] = torch.randn(70, 1, dim)
    q = torch.randn(2, 1, 1, dim).half()
    found = knn(q, far, 5, lengths=torch.tensor([0, 70]), backend="cpu")
    near = knn(q[1:], far[1:, :70].clone(), 5, backend="cpu")
    assert_same([x[1:] for x in found], near, "far keys")
    assert int(found.counts[0]) == 0 and keys.numel() == dim


def test_meta_device():
    given = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in SMALL.make().items()}
    o, lse, found = knn_attention(**given)
    assert o.shape == (2, 5, 2, 24) and lse.shape == (2, 5, 2) and found.indices.shape == (2, 5, 2, 9) and o.is_meta


def refused(**change):
    return lambda: knn_attention(**{**SMALL.make(), **change})


@pytest.mark.parametrize(
    "call, error, message",
    [
        (refused(q=torch.zeros(2, 5, 16)), ValueError, r"knn_attention: q has shape \[2, 5, 16\] of rank 3; expected \[B, S, H, D\]"),
        (refused(keys=torch.zeros(3, 9, 2, 16)), ValueError, r"keys has shape \[3, 9, 2, 16\]; expected .* = \[2, 9, 2, 16\]"),
        (refused(keys=torch.zeros(2, 9, 2, 16).half()), TypeError, "keys is float16; expected float32 like q"),
        (refused(keys=torch.zeros(2, 9, 3, 16)), ValueError, "q has 2 heads; expected a positive multiple of keys' 3 heads"),
        (refused(values=torch.zeros(2, 9, 2, 24)), ValueError, r"values has shape .* = \[2, 300, 2, 24\]"),
        (refused(k=129), ValueError, r"k is 129; allowed: 1\.\.128"),
        (refused(metric="l2"), ValueError, "metric is 'l2'; allowed: 'dot', 'cos'"),
        (refused(threshold=float("nan")), ValueError, "threshold is nan; expected a number"),
        (refused(lengths=torch.tensor([1, 301])), ValueError, r"lengths holds 1\.\.301; allowed: 0\.\.300"),
        (refused(backend="triton"), backends.BackendError, "knn has no triton kernel; it has: cpu, chunked"),
        (lambda: knn(torch.zeros(1, 1, 1, 5000), torch.zeros(1, 2, 1, 5000), 1, backend="cpu"), backends.BackendError, r"D is 5000, supported: 1\.\.4096"),
    ],
)  # fmt: skip
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_code_of_the_page_runs():
    page = (Path(__file__).resolve().parent.parent / "docs" / "knn_attention.md").read_text()
    scope: dict = {}
    for block in page.split("```python\n")[1:]:
        exec(compile(block.split("```")[0], "docs/knn_attention.md", "exec"), scope)
