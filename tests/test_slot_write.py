"""slot_write on every backend of this machine: truth, tolerance, relations, planted bugs, refusals, compilation."""

# ruff: noqa: E501 (tables, one case a line)
import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tables
from support.compare import relative_error, to_float64
from support.slots import (
    BUGS,
    CASES,
    CHECKS,
    SMALL,
    TENSORS,
    Case,
    batch_invariance,
    by_parts,
    evaluate,
    judge,
    packed_equals_separate,
    planted,
    run_all,
)

from memattn import backends
from memattn.ops import attention, merge_states, slot_write
from memattn.reference import slot_write as reference

NO_KERNELS = backends.why_not("slot_write", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))
ROUNDED = ("small", "all", "none", "lengths, all", "packed", "wide", "many slots", "many slots, all")


@pytest.fixture(params=["cpu", "chunked"])
def backend(request, device):
    """Each backend that can run here."""
    need = backends.Request(device, torch.float32, features=frozenset({"backward", "packed", "lengths"}))
    if reasons := backends.why_not("slot_write", request.param, need, explicit=True):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_within_tolerance_of_truth(c, backend, device):
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if c.name in ROUNDED else (torch.float32, torch.float64)
    for dtype in dtypes:
        inputs = c.make(dtype, device)
        actual = evaluate(functools.partial(slot_write, backend=backend), inputs)
        assert actual["o"].dtype == dtype and actual["lse"].dtype == torch.promote_types(dtype, torch.float32)
        assert all(actual[f"d{n}"].dtype == dtype for n in TENSORS if f"d{n}" in actual)
        judge(c, dtype, actual, comparator=by_parts if backend == "cpu" else reference.chunked)


def table_errors():
    """Results of the table in this process that miss the truth by more than the rule allows."""

    def check(c, dtype):
        judge(c, dtype, evaluate(functools.partial(slot_write, backend="cpu"), c.make(dtype)), comparator=by_parts)

    few = [c for c in CASES if c.name in ROUNDED and "many" not in c.name]
    return tables.misses(check, [(c, dtype) for c in few for dtype in (torch.float32, torch.bfloat16)])


@needs_cpu_kernels
@tables.each
def test_every_instruction_set(isa):
    tables.assert_no_errors(isa, __name__)


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, backend, device):
    CHECKS[check](functools.partial(slot_write, backend=backend), device)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    failures = {name: reason for name, reason in run_all(planted(bug)).items() if reason}
    assert failures, f"no check noticed: {bug}"


def test_reference_passes_every_relation():
    assert {name: reason for name, reason in run_all(reference.chunked).items() if reason} == {}


@pytest.mark.parametrize("see", ["own", "all"])
def test_is_attention_over_slots_and_tokens(see, backend, device):
    """Own slots: M calls of attention over [slot i; tokens]. All slots: one call over both, joined."""
    inputs = replace(SMALL, see=see).make(device=device)
    q, k_self, v_self, k, v = (inputs[n] for n in TENSORS)
    expected = []
    for i in range(q.shape[1]):
        seen = slice(i, i + 1) if see == "own" else slice(None)
        keys, values = torch.cat([k_self[:, seen], k], 1), torch.cat([v_self[:, seen], v], 1)
        expected.append(attention(q[:, i : i + 1], keys, values, causal=False, scale=16**-0.5 / 0.5))
    actual = slot_write(**inputs, backend=backend)
    for x, parts in zip(actual, zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(x, torch.cat(parts, 1))


def test_lse_joins_segments(backend, device):
    """Slots that see two segments in two calls, one of them without the slots, see them in one."""
    inputs = SMALL.make(device=device)
    halves = [{**inputs, "k": inputs["k"][:, a:b], "v": inputs["v"][:, a:b]} for a, b in ((0, 13), (13, 40))]
    halves[1].update(see="none", k_self=None, v_self=None)
    parts = [slot_write(**half, backend=backend) for half in halves]
    joined = merge_states([o for o, _ in parts], [lse for _, lse in parts])
    torch.testing.assert_close(joined, slot_write(**inputs, backend=backend))


@pytest.mark.parametrize("c", [Case("", 1, 2, 4), Case("", 1, 2, 4, see="all"), Case("", lengths=(3, 0), packed=True)])
def test_gradcheck(c, backend, device):
    inputs = c.make(torch.float64, device)
    leaves = [inputs[n].requires_grad_() for n in TENSORS]

    def op(*tensors):
        return tuple(slot_write(**{**inputs, **dict(zip(TENSORS, tensors, strict=True))}, backend=backend))

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


@needs_cpu_kernels
@pytest.mark.parametrize("relation", [batch_invariance, packed_equals_separate])
def test_bits_do_not_depend_on_company(relation):
    relation(functools.partial(slot_write, backend="cpu"), tolerance=0.0)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_thread_count(dtype):
    threads, results = torch.get_num_threads(), []
    cases = (
        replace(SMALL, batch=1, heads=1, tokens=700),
        replace(SMALL, see="all", slots=150, lengths=(40, 9)),
        Case("many", batch=8, slots=300, heads=3, tokens=5),
    )
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append([evaluate(functools.partial(slot_write, backend="cpu"), c.make(dtype)) for c in cases])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, x in zip(results[0], other, strict=True):
            assert all(torch.equal(one[name], x[name]) for name in one)


@needs_cpu_kernels
def test_second_derivative_is_refused():
    inputs = {n: x.requires_grad_() if n in TENSORS else x for n, x in SMALL.make().items()}
    (dv,) = torch.autograd.grad(slot_write(**inputs).o.sum(), inputs["v"], create_graph=True)
    with pytest.raises(RuntimeError, match="memattn::attention_cpu has no second derivative.*backend='chunked'"):
        dv.sum().backward()


def test_partial_gradients(backend, device):
    """Only what requires grad gets one, and a missing cotangent, of o or of lse, counts as zero."""
    for output in (0, 1):
        inputs = SMALL.make(device=device)
        inputs["v_self"].requires_grad_()
        inputs["k_self"].requires_grad_()
        slot_write(**inputs, backend=backend)[output].sum().backward()
        truth = to_float64(SMALL.make(device=device))
        truth["v_self"].requires_grad_()
        truth["k_self"].requires_grad_()
        reference.loop(**truth)[output].sum().backward()
        assert relative_error(inputs["k_self"].grad, truth["k_self"].grad) <= 1e-5
        if output == 0:
            assert relative_error(inputs["v_self"].grad, truth["v_self"].grad) <= 1e-5
        assert inputs["q"].grad is None


def test_poisoned_memory(backend, device):
    """Nothing is read before it is written: fresh tensors come filled with NaN."""
    op = functools.partial(slot_write, backend=backend)
    cases = [c for c in CASES if c.name in ("small", "all", "none", "lengths", "packed, all", "no token")]
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


def test_compiled_fullgraph(backend, device):
    torch._dynamo.reset()
    op = functools.partial(slot_write, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for c in (SMALL, replace(SMALL, tokens=50), Case("lengths", lengths=(40, 3), see="all")):
        inputs = c.make(device=device)
        expected = evaluate(op, inputs)
        for name, x in evaluate(compiled, inputs).items():
            torch.testing.assert_close(x, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_autocast_changes_nothing(backend, device):
    inputs = replace(SMALL, see="all").make(device=device)
    expected = slot_write(**inputs, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = slot_write(**inputs, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))


def test_meta_device():
    inputs = {n: x.to("meta") if isinstance(x, torch.Tensor) else x for n, x in SMALL.make().items()}
    o, lse = slot_write(**inputs)
    assert o.shape == (2, 5, 2, 24) and lse.shape == (2, 5, 2) and o.is_meta


def refused(**change):
    return lambda: slot_write(**{**SMALL.make(), **change})


@pytest.mark.parametrize(
    "call, error, message",
    [
        (refused(see="each"), ValueError, "see is 'each'; allowed: 'own', 'all', 'none'"),
        (refused(see="none"), ValueError, "k_self is given with see='none'"),
        (refused(v_self=None), ValueError, "v_self is None with see='own'"),
        (refused(tau=0.0), ValueError, "tau is 0.0; expected a finite number > 0"),
        (refused(scale=float("nan")), ValueError, "scale is nan; expected a finite number > 0"),
        (refused(q=torch.zeros(2, 0, 2, 16)), ValueError, "expected at least one slot"),
        (refused(q=torch.zeros(2, 5, 2, 8)), ValueError, r"k has shape .*; expected \[B, T, H, K\] = \[2, 40, 2, 8\]"),
        (refused(k=torch.zeros(3, 40, 2, 16)), ValueError, r"k has shape \[3, 40, 2, 16\]; expected .* = \[2, 40, 2, 16\]"),
        (refused(v=torch.zeros(2, 40, 2, 300)), ValueError, "head dimension V is 300; allowed: 16..256"),
        (refused(k_self=torch.zeros(2, 4, 2, 16)), ValueError, r"k_self has shape .*; expected \[N, M, H, K\]"),
        (refused(v_self=torch.zeros(2, 5, 2, 24).half()), TypeError, "v_self is float16; expected float32 like q"),
        (refused(lengths=torch.tensor([41, 0])), ValueError, r"lengths holds 0\.\.41; allowed: 0\.\.40"),
        (refused(lengths=torch.tensor([1.0, 0])), TypeError, "lengths is float32; expected int32 or int64"),
        (refused(lengths=torch.tensor([1])), ValueError, r"lengths has shape \[1\]; expected \[B\] = \[2\]"),
        (
            refused(lengths=torch.tensor([1, 1]), cu_seqlens=torch.tensor([0, 40])),
            ValueError,
            r"k has shape \[2, 40, 2, 16\]; expected \[B, T, H, K\] = \[1, 40, 2, 16\]",
        ),
        (refused(backend="cuda"), backends.BackendError, "slot_write has no cuda kernel; it has: triton, cpu, chunked"),
    ],
)  # fmt: skip
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_packed_refusals():
    inputs = Case("", lengths=(3, 4), packed=True).make()
    with pytest.raises(
        ValueError, match=r"cu_seqlens has shape \[2\]; expected \[N\+1\] with N = q.shape\[0\] = \[3\]"
    ):
        slot_write(**{**inputs, "cu_seqlens": torch.tensor([0, 7])})
    with pytest.raises(ValueError, match="lengths and cu_seqlens are both given"):
        slot_write(**inputs, lengths=torch.tensor([7]))


def test_the_code_of_the_page_runs():
    page = (Path(__file__).resolve().parent.parent / "docs" / "slot_memory.md").read_text()
    scope: dict = {}
    for block in page.split("```python\n")[1:]:
        exec(compile(block.split("```")[0], "docs/slot_memory.md", "exec"), scope)
