"""sparse_attention on every backend of this machine: truth, tolerance, relations, planted bugs, registration, errors."""

# ruff: noqa: E501 (tables, one case a line)
import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import sparse, tables
from support.compare import relative_error, to_float64
from support.sparse import (
    CASES,
    CHECKS,
    FLOATS,
    ROUNDED,
    SMALL,
    TOKENS,
    Case,
    caught_by,
    evaluate,
    paged,
    run_all,
)
from support.sparse_judge import judge
from support.sparse_planted import BUGS, planted

from memattn import backends
from memattn.ops import sparse_attention
from memattn.ops._library import resolve
from memattn.reference import sparse_attention as reference

NO_KERNELS = backends.why_not("sparse_attention", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))
cpu = functools.partial(sparse_attention, backend="cpu")
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["cpu", "chunked"])
def backend(request, device):
    """Each backend that can run here."""
    need = backends.Request(device, torch.float32, features=frozenset({"backward", "packed", "paged"}))
    if reasons := backends.why_not("sparse_attention", request.param, need, explicit=True):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_within_tolerance_of_truth(c, backend, device):
    dtypes = (torch.float32, *HALVES) if c.name in ROUNDED else (torch.float32, torch.float64)
    for dtype in dtypes:
        actual = evaluate(functools.partial(sparse_attention, backend=backend), c.make(dtype, device))
        assert actual["o"].dtype == dtype and actual["lse"].dtype == torch.promote_types(dtype, torch.float32)
        assert all(actual[f"d{n}"].dtype == dtype for n in "qkv")
        judge(c, dtype, actual, backend)


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, backend, device):
    CHECKS[check](functools.partial(sparse_attention, backend=backend), device)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    assert caught_by(planted(bug)), f"no check noticed: {bug}"


def test_reference_passes_every_relation():
    assert {name: reason for name, reason in run_all(reference.chunked).items() if reason} == {}


@pytest.mark.parametrize("budget", [1, 3000])
def test_the_fallback_by_small_blocks(budget, monkeypatch):
    """Any budget gives the same; a single row always fits."""
    inputs = SMALL.make()
    expected = evaluate(reference.chunked, inputs)
    monkeypatch.setattr(reference, "BUDGET", budget)
    sparse.assert_near(evaluate(reference.chunked, inputs), expected, "small blocks", tolerance=1e-6)


@pytest.mark.parametrize(
    "c",
    [SMALL, replace(TOKENS, entries=4, sinks=0), Case("pages", tokens=48, pages=12, unit=8, bias=1, shared=True)],
    ids=lambda c: c.name,
)
def test_gradcheck(c, backend, device):
    inputs = replace(c, batch=1, queries=3, heads=2, key_heads=1, bias=1 if c.bias else None).make(
        torch.float64, device
    )
    inputs |= {n: inputs[n].nan_to_num(0.0) for n in "kv"}
    inputs["indices"] = inputs["indices"].clamp(min=0)
    inputs.pop("q_positions", None)
    names = [n for n in FLOATS if n in inputs]
    leaves = [inputs[n].requires_grad_() for n in names]

    def op(*tensors):
        return tuple(sparse_attention(**{**inputs, **dict(zip(names, tensors, strict=True))}, backend=backend))

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


def test_poisoned_memory(backend, device):
    """Nothing is read before it is written: fresh tensors come filled with NaN."""
    op = functools.partial(sparse_attention, backend=backend)
    cases = [
        c
        for c in CASES
        if c.name in ("small", "tokens", "odd blocks", "pages", "packed", "counts", "long list", "many", "many, pages")
    ]
    expected = [evaluate(op, c.make(device=device)) for c in cases]
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        poisoned = [evaluate(op, c.make(device=device)) for c in cases]
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]
    for c, a, b in zip(cases, expected, poisoned, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a), c.name


def test_nan_reaches_the_rows_that_name_the_token(backend, device):
    for name in ("k", "v"):
        for c in (Case("nan", entries=2, batch=1), replace(TOKENS, batch=1, entries=15)):
            inputs = c.make(device=device)
            inputs[name][0, 20, 0, 3] = torch.nan
            o, lse = sparse_attention(**inputs, backend=backend)
            named = (inputs["indices"][..., 0, :] == 20 // c.unit).any(-1)
            touched = torch.zeros_like(lse, dtype=torch.bool)
            touched[:, :, :2] = named[..., None]
            assert touched.any() and not touched.all() and torch.equal(o.isnan().any(-1), touched)
            assert torch.equal(lse.isnan(), touched if name == "k" else torch.zeros_like(touched))


# --- the C++ kernel --------------------------------------------------------------------------------------------------


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "check",
    [
        "queries_one_by_one",
        "tokens_of_the_blocks",
        "paged_equals_contiguous",
        "one_list_for_all_heads",
        "packed_equals_separate",
        "batch_invariance",
    ],
)
def test_bits_do_not_depend_on_company_or_layout(check, dtype):
    def rounded(**inputs):
        return cpu(**{n: x.to(dtype) if n in ("q", "k", "v") else x for n, x in inputs.items()})

    CHECKS[check](rounded, tolerance=0.0)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_thread_count(dtype):
    cases = (
        *(
            c
            for c in CASES
            if c.name
            in (
                "small",
                "long list",
                "long blocks",
                "pages across",
                "packed causal",
                "many",
                "many, large blocks",
                "many packed",
            )
        ),
        Case(
            "split",
            batch=1,
            queries=1,
            tokens=9000,
            unit=64,
            entries=100,
            heads=2,
            key_heads=1,
            key_dim=64,
            value_dim=64,
        ),
        Case("many", batch=1, queries=64, tokens=512, unit=32, entries=6, heads=6, key_heads=3, positions=True),
    )
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append([evaluate(cpu, c.make(dtype)) for c in cases])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for c, one, two in zip(cases, results[0], other, strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one), c.name


def table_errors():
    """Results of the table in this process that miss the truth by more than the rule allows."""

    def check(c, dtype):
        judge(c, dtype, evaluate(cpu, c.make(dtype)))

    few = [c for c in CASES if c.name in ("small", "tokens", "large blocks", "many", "many, small pages")]
    return tables.misses(check, [(c, dtype) for c in few for dtype in (torch.float32, *HALVES)])


@needs_cpu_kernels
@tables.each
def test_every_instruction_set(isa):
    tables.assert_no_errors(isa, __name__)


@needs_cpu_kernels
@pytest.mark.parametrize("pages", [False, True])
def test_offsets_beyond_32_bits(pages):
    """Only tokens behind 2^31 values are named, so the others cost no memory."""
    tokens = 2**27 + 128
    try:
        k, v = torch.empty(1, tokens, 1, 16), torch.empty(1, tokens, 1, 16)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    k[:, -128:], v[:, -128:] = 0.0, torch.arange(128.0)[:, None, None]
    table = None
    if pages:
        k, v = (x.view(-1, 64, 1, 16) for x in (k, v))
        table = torch.tensor([[0, tokens // 64 - 1]], dtype=torch.int32)
    for unit, first in ((1, 64 if pages else tokens - 64), (32, 2 if pages else tokens // 32 - 2)):
        lists = torch.arange(first, first + 64 // unit, dtype=torch.int32)[None, None, None]
        q = torch.ones(1, 1, 1, 16, requires_grad=True)
        o, lse = cpu(q, k, v, lists, unit=unit, page_table=table)
        assert torch.allclose(o, torch.tensor(95.5)) and torch.allclose(lse, torch.tensor(64.0).log())
        (dq,) = torch.autograd.grad(o.sum(), q)
        assert not dq.any()


@needs_cpu_kernels
def test_a_frozen_memory_gets_no_gradient_tensors(monkeypatch):
    """Of a memory that needs no gradient not even an empty one is made."""
    inputs = SMALL.make()
    for name in ("q", "bias", "sink"):
        inputs[name].requires_grad_()
    op, seen = resolve("sparse_attention_cpu_backward"), []
    with torch.utils._python_dispatch.TorchDispatchMode() as mode:
        mode.__class__.__torch_dispatch__ = lambda self, func, types, args=(), kwargs=None: (
            seen.append(args[-1]) if func is op else None, func(*args, **(kwargs or {}))
        )[1]  # fmt: skip
        cpu(**inputs).o.sum().backward()
    truth = to_float64(SMALL.make())
    for name in ("q", "bias", "sink"):
        truth[name].requires_grad_()
    reference.loop(**truth).o.sum().backward()
    assert seen == [False] and inputs["k"].grad is None
    for name in ("q", "bias", "sink"):
        assert relative_error(inputs[name].grad, truth[name].grad) <= 1e-5


# --- registration ----------------------------------------------------------------------------------------------------


def op_arguments(c, grad):
    """What the op of the library takes."""
    inputs = c.make()
    inputs |= {n: inputs[n].nan_to_num(0.0).requires_grad_(grad) for n in "kv"} | {
        "q": inputs["q"].requires_grad_(grad)
    }
    names = (
        "q",
        "k",
        "v",
        "indices",
        "counts",
        "q_positions",
        "bias",
        "sink",
        "page_table",
        "cu_seqlens_q",
        "cu_seqlens_k",
    )
    return (*(inputs.get(n) for n in names), inputs["unit"], 0.25)


@needs_cpu_kernels
@pytest.mark.parametrize(
    "c",
    [
        replace(SMALL, sinks=0),
        Case("pages", tokens=48, pages=12, counts=True),
        Case("packed", lengths=((20, 40), (3, 50)), unit=16, positions=True),
    ],
    ids=lambda c: c.name,
)
def test_opcheck(c):
    for grad in (True, False) if c.name == "small" else (False,):
        args = op_arguments(c, grad)
        assert set(torch.library.opcheck(resolve("sparse_attention_cpu"), args).values()) == {"SUCCESS"}
    o, lse = resolve("sparse_attention_cpu")(*args)
    for memory in (True, False):
        backward = (torch.randn_like(o), torch.randn_like(lse), o, lse, *args, memory)
        assert set(torch.library.opcheck(resolve("sparse_attention_cpu_backward"), backward).values()) == {"SUCCESS"}


@needs_cpu_kernels
def test_second_derivative_is_refused():
    inputs = {n: x.requires_grad_() if n in FLOATS else x for n, x in SMALL.make().items()}
    (dv,) = torch.autograd.grad(cpu(**inputs).o.sum(), inputs["v"], create_graph=True)
    with pytest.raises(RuntimeError, match="memattn::sparse_attention_cpu has no second derivative.*backend='chunked'"):
        dv.sum().backward()


def test_partial_gradients(backend, device):
    """Only what requires grad gets one, and a missing cotangent, of o or of lse, counts as zero."""
    for output in (0, 1):
        inputs, truth = SMALL.make(device=device), to_float64(SMALL.make(device=device))
        for given, op in ((inputs, functools.partial(sparse_attention, backend=backend)), (truth, reference.loop)):
            given["k"].requires_grad_()
            y = op(**given)[output]
            y.masked_fill(y == -torch.inf, 0.0).sum().backward()
        assert relative_error(inputs["k"].grad, truth["k"].grad) <= 1e-5 and inputs["q"].grad is None


@pytest.mark.parametrize("frozen", [False, True])
def test_compiled_fullgraph(backend, frozen, device):
    torch._dynamo.reset()
    op = functools.partial(sparse_attention, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")

    def results(function, inputs):
        wanted = ("q",) if frozen else ("q", "k", "v")
        leaves = [inputs[n].detach().clone().requires_grad_() for n in wanted]
        o, lse = function(**{**inputs, **dict(zip(wanted, leaves, strict=True))})
        return [o.detach(), lse.detach(), *torch.autograd.grad(o.sum(), leaves)]

    for c in (SMALL, replace(SMALL, queries=3), Case("pages", tokens=48, pages=12))[: 3 if backend == "cpu" else 1]:
        inputs = c.make(device=device)
        inputs |= {n: inputs[n].nan_to_num(0.0) for n in "kv"}
        for x, y in zip(results(compiled, inputs), results(op, inputs), strict=True):
            torch.testing.assert_close(x, y)


def test_autocast_changes_nothing(backend, device):
    inputs = SMALL.make(device=device)
    expected = sparse_attention(**inputs, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = sparse_attention(**inputs, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_meta_device():
    inputs = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in SMALL.make().items()}
    o, lse = sparse_attention(**inputs)
    assert o.shape == (2, 7, 4, 24) and lse.shape == (2, 7, 4) and o.is_meta


# --- errors ----------------------------------------------------------------------------------------------------------


def x(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def ints(*shape, value=0):
    return torch.full(shape, value, dtype=torch.int32)


BAD = {
    "q rank": (dict(q=x(2, 7, 16)), ValueError, r"q has shape \[2, 7, 16\] of rank 3; expected \[B, S, HQ, K\]"),
    "q dtype": (dict(q=x(2, 7, 4, 16, dtype=torch.int64)), TypeError, "q is int64; expected float32 or bfloat16"),
    "k batch": (dict(k=x(3, 50, 2, 16)), ValueError, r"k has shape \[3, 50, 2, 16\]; expected \[B, T, HKV, K\] = \[2, 50, 2, 16\]"),
    "k dtype": (dict(k=x(2, 50, 2, 16).half()), TypeError, "k is float16; expected float32 like q"),
    "v length": (dict(v=x(2, 51, 2, 24)), ValueError, r"v has shape \[2, 51, 2, 24\]; expected .* = \[2, 50, 2, 24\]"),
    "heads": (dict(q=x(2, 7, 3, 16)), ValueError, "q has 3 heads; expected a positive multiple of k's 2 heads"),
    "head dim": (dict(v=x(2, 50, 2, 8)), ValueError, "head dimension V is 8; allowed: 16..256"),
    "list dtype": (dict(indices=ints(2, 7, 2, 4).long()), TypeError, "indices is int64; expected int32"),
    "list heads": (dict(indices=ints(2, 7, 4, 4)), ValueError, "indices has 4 heads; expected 1 or k's 2"),
    "list rows": (dict(indices=ints(2, 6, 2, 4)), ValueError, r"indices has shape \[2, 6, 2, 4\]; expected .* = \[2, 7, 2, 4\]"),
    "list high": (dict(indices=ints(2, 7, 2, 4, value=7)), ValueError, r"indices holds 7\.\.7; allowed: -1 \(none\)\.\.6"),
    "list low": (dict(indices=ints(2, 7, 2, 4, value=-2)), ValueError, r"indices holds -2\.\.-2; allowed: -1 \(none\)\.\.6"),
    "counts shape": (dict(counts=ints(2, 7)), ValueError, r"counts has shape \[2, 7\]; expected \[B, S, heads of indices\] = \[2, 7, 2\]"),
    "counts dtype": (dict(counts=ints(2, 7, 2).long()), TypeError, "counts is int64; expected int32"),
    "counts high": (dict(counts=ints(2, 7, 2, value=5)), ValueError, r"counts holds 5\.\.5; allowed: 0\.\.4"),
    "positions shape": (dict(q_positions=ints(7)), ValueError, r"q_positions has shape \[7\]; expected \[B, S\] = \[2, 7\]"),
    "positions dtype": (dict(q_positions=x(2, 7)), TypeError, "q_positions is float32; expected int32 or int64"),
    "bias shape": (dict(bias=x(2, 7, 2, 5)), ValueError, r"bias has shape \[2, 7, 2, 5\]; expected .* = \[2, 7, 2, 4\]"),
    "bias heads": (dict(bias=x(2, 7, 4, 4)), ValueError, "bias has 4 heads; expected 1 or k's 2"),
    "bias dtype": (dict(bias=x(2, 7, 2, 4).half()), TypeError, "bias is float16; expected float32 with float32 q"),
    "sink shape": (dict(sink=x(2)), ValueError, r"sink has shape \[2\]; expected \[HQ\] or \[HQ, r\] = \[4\]"),
    "unit": (dict(unit=0), ValueError, "unit is 0; expected an integer ≥ 1"),
    "unit type": (dict(unit=8.0), ValueError, "unit is 8.0; expected an integer ≥ 1"),
    "scale": (dict(scale=0.0), ValueError, "scale is 0.0; expected a finite number > 0 or None"),
    "table dtype": (dict(page_table=ints(2, 1).long()), TypeError, "page_table is int64; expected int32"),
    "table rows": (dict(page_table=ints(3, 1)), ValueError, r"page_table has shape \[3, 1\]; expected \[B, P\] = \[2, 1\]"),
    "table values": (dict(page_table=ints(2, 1, value=2)), ValueError, r"page_table holds 2\.\.2; allowed: -1 \(no page\)\.\.1"),
    "keys packed alone": (dict(cu_seqlens_k=torch.tensor([0, 50])), ValueError, "cu_seqlens_k is given without cu_seqlens_q"),
    "batch packed": (dict(cu_seqlens_q=torch.tensor([0, 7])), ValueError, "batch size is 2 with cu_seqlens_q"),
    "pages packed": (dict(cu_seqlens_q=torch.tensor([0, 7]), page_table=ints(2, 1)), ValueError, "page_table is given with cu_seqlens_q"),
    "backend": (dict(backend="cuda"), backends.BackendError, "sparse_attention has no cuda kernel; it has: "),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        sparse_attention(**{**Case("errors").make(), **change})
    assert str(caught.value).startswith("sparse_attention: ")


def test_checks_remembered_for_one_call_do_not_pass_another():
    inputs = replace(TOKENS, entries=4).make()
    sparse_attention(**inputs)
    for change in (dict(unit=True), dict(unit=1.0), dict(scale=-1.0), dict(indices=inputs["indices"] + 50)):
        with pytest.raises(ValueError):
            sparse_attention(**{**inputs, **change})


@needs_cpu_kernels
def test_c_entries_check_what_memory_needs():
    """The op of the library is public: it must refuse what would reach outside a tensor, and bound what is a value."""
    inputs = Case("entry", counts=True, tokens=48).make()
    q, k, v, lists = (inputs[n] for n in ("q", "k", "v", "indices"))
    op, none = torch.ops.memattn.sparse_attention_cpu, (None,) * 7
    for arguments, message in (
        ((q, k[:1], v, lists, *none, 8, 0.25), "k must be float32"),
        ((q, k, v[:, :5], lists, *none, 8, 0.25), "v must be float32"),
        ((q, k, v, lists[:, :6], *none, 8, 0.25), "indices must be int32"),
        ((q, k, v, ints(2, 7, 3, 4), *none, 8, 0.25), "indices must have 1 or k's 2 heads; got 3"),
        ((q, k, v, lists, ints(2, 7, 1), *none[1:], 8, 0.25), "counts must be int32"),
        ((q, k, v, lists, None, ints(2, 6), *none[2:], 8, 0.25), "q_positions must be int32 or int64"),
        ((q, k, v, lists, None, None, x(2, 7, 1, 4), *none[3:], 8, 0.25), "bias must be float32"),
        ((q, k, v, lists, *none, 0, 0.25), "unit must be 1"),
        ((q, k, v, lists, *none[:5], torch.tensor([0, 7]), None, 8, 0.25), "cu_seqlens must be given for both"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)
    for wrong in (lists + 1000, lists - 1000, torch.full_like(lists, 2**31 - 1), torch.full_like(lists, -(2**31))):
        o, lse = op(q, k, v, wrong, *none, 8, 0.25)
        assert not o.any() and (lse == -torch.inf).all()
    far = torch.full((2, 7), 2**62)
    expected = op(q, k, v, lists, *none, 8, 0.25)
    for x_, y in zip(op(q, k, v, lists, inputs["counts"] * 0 + 99, far, *none[2:], 8, 0.25), expected, strict=True):
        assert torch.equal(x_, y)
    pages = paged(inputs, 8)
    o, lse = op(
        q, pages["k"], pages["v"], lists, None, None, None, None, pages["page_table"] + 1000, None, None, 8, 0.25
    )
    assert not o.any() and (lse == -torch.inf).all()


def test_the_code_of_the_page_runs():
    page = (Path(__file__).resolve().parent.parent / "docs" / "sparse_attention.md").read_text()
    scope: dict = {}
    for block in page.split("```python\n")[1:]:
        exec(compile(block.split("```")[0], "docs/sparse_attention.md", "exec"), scope)
