"""merge_states and gated_combine on every backend of this machine: truth, identities, planted bugs, registration."""

# ruff: noqa: E501 (tables, one case a line)
import functools
import inspect
import types

import pytest
import torch
from support import relations, tables
from support.compare import CEILING, assert_close_to_truth

from memattn import backends
from memattn.ops import attention, gated_combine, merge_states
from memattn.ops._library import resolve
from memattn.reference import merge_states as reference

NO_KERNELS = backends.why_not("merge_states", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("convex", "add", "mul")


@pytest.fixture(params=["cpu", "chunked"])
def backend(request):
    """Each backend that can run here."""
    need = backends.Request("cpu", torch.float32, features=frozenset({"backward"}))
    if reasons := backends.why_not("merge_states", request.param, need, explicit=True):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


def parts(n=3, dtype=torch.float64, empty=(), shape=(2, 5, 3, 16)):
    """n outputs with their lses; the listed (part, row) saw nothing."""
    noise = torch.Generator().manual_seed(n)
    outputs = [torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype) for _ in range(n)]
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    lses = [torch.randn(shape[:3], generator=noise, dtype=torch.float64).mul(3).to(sums) for _ in range(n)]
    for part, row in empty:
        outputs[part][:, row], lses[part][:, row] = 0.0, -torch.inf
    return outputs, lses


def differentiated(op, tensors, wide=None):
    """Results of op(*tensors) and all gradients, under fixed cotangents."""
    leaves = [x.detach().clone().to(wide or x.dtype).requires_grad_() for x in tensors]
    results = op(*leaves)
    results = (results,) if isinstance(results, torch.Tensor) else tuple(results)
    noise = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(x.shape, generator=noise).mul(8).round().div(8).to(x) for x in results]
    finite = [x.masked_fill(x == -torch.inf, 0.0) for x in results]
    gradients = torch.autograd.grad(finite, leaves, cotangents, allow_unused=True)
    named = {f"result{i}": x.detach() for i, x in enumerate(finite)}
    given = zip(leaves, gradients, strict=True)
    return named | {f"d{i}": torch.zeros_like(x) if dx is None else dx for i, (x, dx) in enumerate(given)}


MERGES = {
    "two": (dict(n=2), None),
    "one": (dict(n=1), (3,)),
    "nothing seen": (dict(n=2, empty=((0, 1), (0, 2), (1, 2))), None),
    "sinks": (dict(n=3, empty=((0, 1), (1, 1), (2, 1))), (3, 2)),
    "wide": (dict(n=2, shape=(1, 3, 2, 256)), (2,)),
    "odd": (dict(n=4, shape=(2, 7, 5, 37), empty=((3, 2),)), (5,)),
    "many rows": (dict(n=2, shape=(1, 700, 3, 64)), (3,)),
}  # fmt: skip


def merge_of(name, dtype):
    """(op(form) for the case's tensors, the tensors)."""
    settings, sink = MERGES[name]
    outputs, lses = parts(dtype=dtype, **settings)
    n, tensors = len(outputs), [*outputs, *lses]
    if sink:
        tensors.append(torch.randn(sink, generator=torch.Generator().manual_seed(5)).to(lses[0]))
    return (lambda form: lambda *x: form(x[:n], x[n : 2 * n], sink=x[2 * n] if sink else None)), tensors


def judge_merge(name, dtype, op):
    """The tolerance rule of support.compare; a hundred numbers are too few for the ratio of two roundings."""
    calls, tensors = merge_of(name, dtype)
    truth = differentiated(calls(reference.loop if name != "many rows" else reference.chunked), tensors, torch.float64)
    close(differentiated(calls(op), tensors), differentiated(calls(reference.chunked), tensors), truth, dtype)


def close(actual, other, truth, dtype):
    other = {n: x if x.numel() >= 100 else truth[n] * (1 + CEILING[dtype]) for n, x in other.items()}
    assert_close_to_truth(actual, other, truth, CEILING[dtype])


@pytest.mark.parametrize("name", MERGES)
def test_merge_within_tolerance_of_truth(name, backend):
    for dtype in DTYPES if name in ("two", "sinks", "odd") else DTYPES[:1]:
        judge_merge(name, dtype, functools.partial(merge_states, backend=backend))
    calls, tensors = merge_of(name, torch.float64)
    truth = differentiated(calls(reference.chunked), tensors)
    actual = differentiated(calls(functools.partial(merge_states, backend=backend)), tensors)
    for n, x in truth.items():
        torch.testing.assert_close(actual[n], x, rtol=1e-10, atol=1e-12)


def combination(mode, gates, dtype, shape=(2, 9, 3, 24)):
    """(op(form), tensors) of a gate per head (1), per row (3) or per number (4)."""
    noise = torch.Generator().manual_seed(gates)
    a, b = (torch.randn(shape, generator=noise, dtype=torch.float64).to(dtype) for _ in range(2))
    gate = torch.rand(shape[2:3] if gates == 1 else shape[:gates], generator=noise, dtype=torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    return (lambda form: lambda *x: form(*x, mode)), [a, b, gate.to(dtype if gates == 4 else wide)]


@pytest.mark.parametrize("gates", [1, 3, 4])
@pytest.mark.parametrize("mode", MODES)
def test_combine_within_tolerance_of_truth(mode, gates, backend):
    op = functools.partial(gated_combine, backend=backend)
    for dtype in DTYPES:
        for shape in ((2, 9, 3, 24), (1, 300, 2, 37)):
            calls, tensors = combination(mode, gates, dtype, shape)
            truth = differentiated(calls(reference.combined), tensors, torch.float64)
            close(differentiated(calls(op), tensors), differentiated(calls(reference.combined), tensors), truth, dtype)
    calls, tensors = combination(mode, gates, torch.float64)
    leaves = [x.requires_grad_() for x in tensors]
    assert torch.autograd.gradcheck(calls(op), leaves, fast_mode=True)
    low = [x.bfloat16() for x in tensors]  # a gate in a's dtype, whatever its shape
    assert op(*low, mode).dtype == torch.bfloat16


def table_errors():
    """Results of the table in this process that miss the truth by more than the rule allows."""

    def check(name, dtype):
        if name in MERGES:
            return judge_merge(name, dtype, functools.partial(merge_states, backend="cpu"))
        calls, tensors = combination(name, 3, dtype)
        truth = differentiated(calls(reference.combined), tensors, torch.float64)
        actual = differentiated(calls(functools.partial(gated_combine, backend="cpu")), tensors)
        return close(actual, differentiated(calls(reference.combined), tensors), truth, dtype)

    return tables.misses(check, [(name, dtype) for name in ("sinks", "odd", *MODES) for dtype in DTYPES[:2]])


@needs_cpu_kernels
@tables.each
def test_every_instruction_set(isa):
    tables.assert_no_errors(isa, __name__, products=False)


@needs_cpu_kernels
def test_bits_do_not_depend_on_the_thread_count():
    threads, results = torch.get_num_threads(), []
    merge, tensors = merge_of("many rows", torch.float32)
    combine, branches = combination("convex", 1, torch.float32, (1, 5000, 3, 37))
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            of_merge = differentiated(merge(functools.partial(merge_states, backend="cpu")), tensors)
            of_combine = differentiated(combine(functools.partial(gated_combine, backend="cpu")), branches)
            results.append([*of_merge.values(), *of_combine.values()])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


# Where: what is there -> what is put in its place.
BUGS = {
    "sink ignored": ("parts = list(lses) if sink is None else", "parts = list(lses) if True else"),
    "first sink only": ("one_sink(sink, dtype)", "sink.to(dtype).reshape(first.shape[2], -1)[:, 0]"),
    "sink of other heads": ("one_sink(sink, dtype)", "one_sink(sink, dtype).flip(0)"),
    "sink on the last part": ("o, lse = joined([x.to(dtype) for x in outputs], parts)", "o, lse = joined([x.to(dtype) for x in outputs], parts); o = o + 0.01 * (sink is not None)"),
    "lse detached": ("return AttentionOutput(o.to(first.dtype), lse)", "return AttentionOutput(o.to(first.dtype), lse.detach() + 0 * lse.nan_to_num(0, 0, 0))"),
    "weights detached": ("joined([x.to(dtype) for x in outputs], parts)", "joined([x.to(dtype) for x in outputs], [x.detach() + 0 * x.nan_to_num(0, 0, 0) for x in parts])"),
    "first part twice": ("[x.to(dtype) for x in outputs]", "[outputs[0].to(dtype) for x in outputs]"),
    "sums in bfloat16": ("[x.to(dtype) for x in outputs]", "[x.to(dtype).bfloat16().to(dtype) for x in outputs]"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    module = types.ModuleType("planted_merge_states")
    for code in relations.with_bug(bug, *BUGS[bug], inspect.getsource(reference)):
        exec(code, module.__dict__)
    caught = []
    for name in ("two", "sinks", "nothing seen"):
        try:
            judge_merge(name, torch.float32, module.chunked)
        except AssertionError as failure:
            caught.append(failure)
    assert caught, f"no case noticed: {bug}"


def test_equals_the_weighted_sum(backend):
    outputs, lses = parts()
    total = sum(x.exp() for x in lses)
    o, lse = merge_states(outputs, lses, backend=backend)
    torch.testing.assert_close(lse, total.log())
    torch.testing.assert_close(o, sum((x.exp() / total)[..., None] * y for x, y in zip(lses, outputs, strict=True)))
    one, same = merge_states(outputs[:1], lses[:1], backend=backend)
    torch.testing.assert_close((one, same), (outputs[0], lses[0]))


def test_order_and_nesting_do_not_matter(backend):
    outputs, lses = parts(4, empty=((0, 1), (2, 1)))
    merge = functools.partial(merge_states, backend=backend)
    expected = merge(outputs, lses)
    torch.testing.assert_close(merge(outputs[::-1], lses[::-1]), expected)
    (a, b), (c, d) = (merge(outputs[i : i + 2], lses[i : i + 2]) for i in (0, 2))
    torch.testing.assert_close(merge([a, c], [b, d]), expected)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in outputs]
    torch.testing.assert_close(merge(strided, lses), expected)


def test_parts_that_saw_nothing(backend):
    """Alone they change nothing; all together they give 0, −inf, zero gradient and no NaN."""
    outputs, lses = parts(2, empty=((0, 1), (0, 2), (1, 2)))
    leaves = [x.requires_grad_() for x in (*outputs, *lses)]
    o, lse = merge_states(outputs, lses, backend=backend)
    torch.testing.assert_close((o[:, 1], lse[:, 1]), (outputs[1][:, 1], lses[1][:, 1]), rtol=1e-15, atol=0)
    assert not o[:, 2].any() and (lse[:, 2] == -torch.inf).all()
    gradients = torch.autograd.grad(o.sum() + lse[:, [0, 1, 3, 4]].sum(), leaves)
    assert all(g.isfinite().all() and not g[:, 2].any() for g in gradients)
    assert all(not g[:, 1].any() for g in (gradients[0], gradients[2]))


def test_nan_and_large_scores(backend):
    """NaN in a part reaches its row alone; scores of ±1e4 leave the largest."""
    outputs, lses = parts(2, torch.float32)
    lses[0][0, 1, 2], lses[1][1, 0, 0], outputs[1][1, 4, 1, 7] = torch.nan, 1e4, torch.nan
    o, lse = merge_states(outputs, lses, backend=backend)
    touched = torch.zeros_like(o, dtype=torch.bool)
    touched[0, 1, 2], touched[1, 4, 1, 7] = True, True
    assert torch.equal(o.isnan(), touched) and lse.isnan().sum() == 1
    assert torch.equal(o[1, 0, 0], outputs[1][1, 0, 0]) and lse[1, 0, 0] == 1e4


def test_sink_of_attention_is_a_sink_of_the_merge(backend):
    q, k, v, sink = torch.randn(1, 20, 2, 16), torch.randn(1, 20, 2, 16), torch.randn(1, 20, 2, 16), torch.randn(2, 3)
    expected = attention(q, k, v, sink=sink)
    actual = merge_states(*([x] for x in attention(q, k, v)), sink=sink, backend=backend)
    torch.testing.assert_close(actual, expected)


def test_gated_combine_keeps_either_end(backend):
    a, b = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    assert torch.equal(gated_combine(a, b, torch.zeros(3), backend=backend), b)
    torch.testing.assert_close(gated_combine(a, b, torch.ones(3), backend=backend), a)


def test_nothing_at_all(backend):
    for shape in ((0, 3, 2, 16), (2, 0, 2, 16)):
        outputs, lses = [torch.zeros(shape)] * 2, [torch.zeros(shape[:3])] * 2
        o, lse = merge_states(outputs, lses, sink=torch.zeros(2), backend=backend)
        assert o.shape == shape and lse.shape == shape[:3]
        leaves = [torch.zeros(shape).requires_grad_(), torch.zeros(shape), torch.ones(2).requires_grad_()]
        gated_combine(*leaves, backend=backend).sum().backward()
        assert leaves[0].grad.shape == shape and not leaves[2].grad.any()


def test_partial_gradients(backend):
    """Only what requires grad gets one, and a missing cotangent, of o or of lse, counts as zero."""
    for output in (0, 1):
        outputs, lses = parts(2)
        lses[1].requires_grad_()
        merge_states(outputs, lses, backend=backend)[output].sum().backward()
        expected = lses[1].detach().clone().requires_grad_()
        reference.chunked(outputs, [lses[0], expected])[output].sum().backward()
        torch.testing.assert_close(lses[1].grad, expected.grad)
        assert outputs[0].grad is None and lses[0].grad is None


@needs_cpu_kernels
def test_opcheck():
    sink = torch.randn(3)
    for grad in (True, False):
        outputs, lses = ([x.requires_grad_(grad) for x in xs] for xs in parts(2, torch.float32))
        args = (outputs, lses, sink.clone().requires_grad_(grad))
        assert set(torch.library.opcheck(resolve("merge_states_cpu"), args).values()) == {"SUCCESS"}
        gate = torch.rand(3, requires_grad=grad)
        assert set(torch.library.opcheck(resolve("gated_combine_cpu"), (*outputs, gate, 0)).values()) == {"SUCCESS"}
    o, lse = resolve("merge_states_cpu")(*args)
    backward = (torch.randn_like(o), torch.randn_like(lse), lse, *args)
    assert set(torch.library.opcheck(resolve("merge_states_cpu_backward"), backward).values()) == {"SUCCESS"}
    backward = (torch.randn_like(o), *outputs, gate, 0)
    assert set(torch.library.opcheck(resolve("gated_combine_cpu_backward"), backward).values()) == {"SUCCESS"}


@needs_cpu_kernels
def test_c_entries_check_what_memory_needs():
    o, lse, op = torch.zeros(2, 5, 3, 16), torch.zeros(2, 5, 3), torch.ops.memattn
    for call, message in (
        (lambda: op.merge_states_cpu([o], [], None), "as many lses as outputs, at least one; got 0 and 1"),
        (lambda: op.merge_states_cpu([o, o[:1]], [lse, lse], None), "outputs must be float32"),
        (lambda: op.merge_states_cpu([o, o], [lse, lse[:1]], None), "lses must be float32"),
        (lambda: op.merge_states_cpu([o], [lse], torch.zeros(2)), "sink must be float32"),
        (
            lambda: op.merge_states_cpu([torch.zeros(1, 1, 1, 4097)], [lse[:1, :1, :1].contiguous()], None),
            "V must be 1 to 4096; got 4097",
        ),
        (lambda: op.gated_combine_cpu(o, o[:1], torch.zeros(3), 0), "b must be float32"),
        (lambda: op.gated_combine_cpu(o, o, torch.zeros(2), 0), "gate must be float32"),
        (lambda: op.gated_combine_cpu(o, o, torch.zeros(3), 3), "mode must be 0, 1 or 2; got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


@needs_cpu_kernels
def test_second_derivative_is_refused():
    outputs, lses = parts(2)
    leaves = [x.requires_grad_() for x in outputs]
    for name, y in (
        ("merge_states_cpu", merge_states(leaves, lses, backend="cpu").o),
        (
            "gated_combine_cpu",
            gated_combine(*leaves, torch.rand(3, dtype=torch.float64, requires_grad=True), backend="cpu"),
        ),
    ):
        dx = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=f"memattn::{name} has no second derivative.*backend='chunked'"):
            sum(x.sum() for x in dx).backward()


def test_compiled_fullgraph(backend):
    torch._dynamo.reset()
    merge, tensors = merge_of("sinks", torch.float32)
    combine, branches = combination("add", 3, torch.float32)
    for calls, op, given in ((merge, merge_states, tensors), (combine, gated_combine, branches)):
        call = calls(functools.partial(op, backend=backend))
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        for name, x in differentiated(call, given).items():
            torch.testing.assert_close(differentiated(compiled, given)[name], x)


def test_autocast_changes_nothing(backend):
    outputs, lses = parts(2, torch.float32)
    expected = (
        merge_states(outputs, lses, backend=backend),
        gated_combine(*outputs, torch.rand(3) * 0 + 0.3, backend=backend),
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = (
            merge_states(outputs, lses, backend=backend),
            gated_combine(*outputs, torch.rand(3) * 0 + 0.3, backend=backend),
        )
    assert all(torch.equal(x, y) for x, y in zip(expected[0], actual[0], strict=True)) and torch.equal(
        expected[1], actual[1]
    )


def test_refusals():
    outputs, lses = parts(2, torch.float32)
    a, b = outputs
    for call, error, message in (
        (lambda: merge_states([], []), ValueError, "merge_states: got 0 outputs and 0 lses; expected n ≥ 1 of each"),
        (lambda: merge_states(outputs, lses[:1]), ValueError, "got 2 outputs and 1 lses"),
        (
            lambda: merge_states([a, b[:1]], lses),
            ValueError,
            r"outputs\[1\] has shape \[1, 5, 3, 16\]; expected .* = \[2, 5, 3, 16\]",
        ),
        (
            lambda: merge_states([a, b.half()], lses),
            TypeError,
            r"outputs\[1\] is float16; expected float32 like outputs\[0\]",
        ),
        (
            lambda: merge_states(outputs, [lses[0], lses[1].double()]),
            TypeError,
            r"lses\[1\] is float64; expected float32",
        ),
        (lambda: merge_states(outputs, [lses[0], lses[1][..., None]]), ValueError, r"lses\[1\] has shape"),
        (
            lambda: merge_states(outputs, lses, sink=torch.zeros(2)),
            ValueError,
            r"sink has shape \[2\]; expected \[H\] or \[H, r\] = \[3\]",
        ),
        (lambda: merge_states(outputs, lses, sink=torch.zeros(3).int()), TypeError, "sink is int32; expected float32"),
        (lambda: gated_combine(a, b[:1], torch.zeros(3)), ValueError, r"gated_combine: b has shape \[1, 5, 3, 16\]"),
        (
            lambda: gated_combine(a, b, torch.zeros(2)),
            ValueError,
            r"gate has shape \[2\]; expected \[H\], \[B, T, H\] or \[B, T, H, V\]",
        ),
        (
            lambda: gated_combine(a, b, torch.zeros(3), "sum"),
            ValueError,
            "mode is 'sum'; allowed: 'convex', 'add', 'mul'",
        ),
        (lambda: gated_combine(a, b.half(), torch.zeros(3)), TypeError, "b is float16; expected float32 like a"),
    ):
        with pytest.raises(error, match=message):
            call()
