"""Attention on every backend of this machine: truth, tolerance, relations, planted bugs, torch's own, registration."""

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tables
from support.attention import (
    CASES,
    CHECKS,
    FLOATS,
    LONG,
    SMALL,
    batch_invariance,
    called,
    case,
    evaluate,
    finite,
    judge,
    packed_equals_separate,
    parts_of_the_queries,
    run_all,
    truth_of,
)
from support.attention_planted import BUGS, planted
from support.compare import relative_error, to_float64
from torch.nn import functional as F

from memattn import backends
from memattn.ops import attention
from memattn.ops._library import resolve
from memattn.reference import attention as reference
from memattn.reference.attention_mask import Mask

TESTS = Path(__file__).parent
NO_KERNELS = backends.why_not("attention", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))
cpu = functools.partial(attention, backend="cpu")
ROUNDED = (
    "causal",
    "merge",
    "merge, sinks",
    "prefix",
    "summary",
    "dilated",
    "sink",
    "decay",
    "decay, alibi, sink",
    "packed",
    "wide",
    "tile",
)


@pytest.fixture(params=["cpu", "chunked"])
def backend(request, device):
    """Each backend that can run here."""
    need = backends.Request(device, torch.float32, features=frozenset({"backward", "packed"}))
    if reasons := backends.why_not("attention", request.param, need, explicit=True):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", (*CASES, LONG), ids=lambda c: c.name)
def test_within_tolerance_of_truth(c, backend, device):
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if c.name in ROUNDED else (torch.float32,)
    for dtype in dtypes:
        inputs = c.make(dtype, device)
        actual = evaluate(functools.partial(attention, backend=backend), inputs)
        assert actual["o"].dtype == dtype and actual["lse"].dtype == torch.float32
        assert all(actual[f"d{n}"].dtype == inputs[n].dtype for n in inputs if n in FLOATS)
        judge(c, dtype, actual)


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_float64(c, backend, device):
    truth = truth_of(c, torch.float64)
    actual = finite(evaluate(functools.partial(attention, backend=backend), c.make(torch.float64, device)), truth)
    for name, expected in finite(truth, truth).items():
        torch.testing.assert_close(
            actual[name].cpu(), expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, backend, device):
    CHECKS[check](functools.partial(attention, backend=backend), device)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    failures = {name: reason for name, reason in run_all(planted(bug)).items() if reason}
    assert failures, f"no check noticed: {bug}"


def test_reference_passes_every_relation():
    assert {name: reason for name, reason in run_all(reference.chunked).items() if reason} == {}


MASKS = [Mask(**c.mask) for c in CASES if not {"head_map", "scale"} & set(c.mask) and c.mask.get("q_offset") != "end"]


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_tiles_tell_what_they_hold(mask):
    """none, full and partial against every pair; only a dilated tile may be called partial when it is empty."""
    i, j = torch.arange(40)[:, None] + mask.q_offset, torch.arange(60)
    seen = mask.visible(i, j)
    for first in range(0, 40, 5):
        for last in (first, first + 4):
            rows = seen[first : last + 1]
            for begin in range(0, 60, 6):
                part = rows[:, begin : begin + 6]
                kind = mask.tile((first + mask.q_offset, last + mask.q_offset), (begin, begin + 6), 60)
                assert (kind == "full") <= bool(part.all()) and (kind == "none") <= (not part.any())
                if mask.chunk_rule is None or mask.chunk_rule[0] != "dilated":
                    assert kind == ("full" if part.all() else "partial" if part.any() else "none")


@pytest.mark.parametrize(
    "mask", [{}, {"window": 20}, {"prefix_len": 6, "window": 9}, {"causal": "block", "block_size": 8}], ids=str
)  # noqa: E501
def test_against_torch(mask, backend, device):
    """torch's scaled_dot_product_attention with the same mask written out."""
    inputs = case("torch", mask, queries=90, heads=4, key_heads=2).make(device=device)

    def by_torch(q, k, v, **given):
        position = torch.arange(q.shape[1], device=device)
        seen = Mask(**given).visible(position[:, None], position)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)
        s = (q.unflatten(1, (2, 2)) @ k[:, :, None].mT).flatten(1, 2) * q.shape[3] ** -0.5
        return o, s.masked_fill(~seen, -torch.inf).logsumexp(-1).transpose(1, 2)

    expected, actual = evaluate(by_torch, inputs), evaluate(functools.partial(attention, backend=backend), inputs)
    for name, x in expected.items():
        assert relative_error(actual[name], x) <= 5e-6, name


GRADCHECKED = [
    case("mask", {"prefix_len": 1, "window": 3}, batch=1, queries=9, sinks=2, heads=4, key_heads=2),
    case("decay", batch=1, queries=7, decay=0.5, alibi=True, heads=2, key_heads=1),
    case("packed", {"chunk_rule": ("summary", 2)}, lengths=((5, 2), (0, 0), (3, 1))),
    case("merge", {"window": 3}, batch=1, queries=7, sinks=0, heads=4, key_heads=2, merged=True),
]


@pytest.mark.parametrize("c", GRADCHECKED, ids=lambda c: c.name)
def test_gradcheck(c, backend, device):
    inputs = c.make(torch.float64, device)
    names = [n for n in inputs if n in FLOATS]
    leaves = [inputs[n].requires_grad_() for n in names]

    def op(*tensors):
        given = {**inputs, **dict(zip(names, tensors, strict=True))}
        o, lse = called(functools.partial(attention, backend=backend), given)
        return o, lse.masked_fill(lse == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


def test_poisoned_memory(backend, device):
    """Nothing is read before it is written: fresh tensors come filled with NaN."""
    op = functools.partial(attention, backend=backend)
    cases = [
        c
        for c in CASES
        if c.name in ("causal", "summary", "decay with offset", "packed, other keys", "many heads", "merge, few keys")
    ]
    expected = [evaluate(op, c.make(device=device)) for c in cases]
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=device).isnan().all()
        poisoned = [evaluate(op, c.make(device=device)) for c in cases]
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]
    for c, a, b in zip(cases, expected, poisoned, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a), c.name


def test_partial_gradients(backend, device):
    """Only what requires grad gets one, and a missing cotangent, of o or of lse, counts as zero."""
    for output in (0, 1):
        inputs = SMALL.make(device=device)
        inputs["k"].requires_grad_()
        attention(**inputs, backend=backend)[output].sum().backward()
        truth = to_float64(SMALL.make(device=device))
        truth["k"].requires_grad_()
        reference.loop(**truth)[output].sum().backward()
        assert relative_error(inputs["k"].grad, truth["k"].grad) <= 1e-5
        assert inputs["q"].grad is None


def test_nan_reaches_the_rows_that_see_it(backend, device):
    inputs = case("nan", {"window": 10}, queries=200, key_heads=2).make(device=device)
    inputs["k"][0, 60, 0, 3] = torch.nan
    o, lse = attention(**inputs, backend=backend)
    touched = torch.zeros_like(lse, dtype=torch.bool)
    touched[0, 60:70, 0] = True
    assert torch.equal(lse.isnan(), touched) and torch.equal(o.isnan().all(-1), touched)


# --- the C++ kernels -------------------------------------------------------------------------------------------------


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("relation", [batch_invariance, packed_equals_separate, parts_of_the_queries])
def test_bits_do_not_depend_on_company(relation, dtype):
    def rounded(merge=None, **inputs):
        merge = None if merge is None else (merge[0].to(dtype), merge[1])
        return cpu(**{n: x.to(dtype) if n in FLOATS[:3] else x for n, x in inputs.items()}, merge=merge)

    relation(rounded, tolerance=0.0)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_thread_count(dtype):
    """One head of one sequence is shared by threads, many are not: the sums have the same order."""
    mask, threads, results = {"prefix_len": 70, "window": 90}, torch.get_num_threads(), []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append([
                evaluate(cpu, c.make(dtype))
                for c in (
                    replace(LONG, heads=2, key_heads=1, mask=mask, sinks=0),
                    replace(LONG, heads=2, key_heads=1, decay=0.1),
                    replace(LONG, batch=3, heads=3, key_heads=3, queries=150, mask={}),
                )
            ])  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, x in zip(results[0], other, strict=True):
            assert all(torch.equal(one[name], x[name]) for name in one)


IN_EVERY_TABLE = ("prefix", "merge, sinks", "dilated", "decay", "packed window", "scale")


def table_errors():
    """Results of the table in this process that miss the truth by more than the rule allows."""

    def check(c, dtype):
        judge(c, dtype, evaluate(cpu, c.make(dtype)), definition=reference.chunked)

    dtypes = (torch.float32, torch.bfloat16)
    return tables.misses(check, [(c, dtype) for c in CASES if c.name in IN_EVERY_TABLE for dtype in dtypes])


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
    o, lse = cpu(torch.ones(1, 2, 1, 16), k, v, window=4, q_offset=keys - 2)
    assert torch.allclose(o[0, :, 0, 0], torch.tensor([196.5, 197.5])) and torch.allclose(lse, torch.tensor(4.0).log())


def peak_mib(backend, length):
    """MiB that a forward and backward of this process had resident at their peak, beyond what was there before."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def resident(field):
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024

    for queries in (200, length):
        shape = case("", batch=1, queries=queries, heads=1, value_dim=16)
        inputs = {n: x.requires_grad_() for n, x in shape.make().items()}
        clear.write_text("5")
        before = resident("VmRSS")
        o, lse = attention(**inputs, backend=backend)
        (o.sum() + lse.sum()).backward()
    return resident("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory of a process needs Linux's /proc")
def test_memory_does_not_grow_with_the_scores(backend, full):
    """Training on 8192 tokens takes less than the 256 MiB of one head's scores alone, the kernels far less."""
    if backend == "chunked" and not full:
        pytest.skip("--full: plain torch takes seconds for 8192 tokens")
    code = f"import test_attention as t; print(t.peak_mib({backend!r}, 8192))"
    path = os.pathsep.join([str(TESTS.parent / "python"), str(TESTS)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) < {"cpu": 16, "chunked": 200}[backend]


# --- registration ----------------------------------------------------------------------------------------------------


def _arguments(grad, **change):
    inputs = {**replace(SMALL, queries=37, sinks=0, decay=0.1, mask={}, merged=True).make(), **change}
    tensors = [inputs[n] for n in ("q", "k", "v", "sink")] + [inputs["log_decay"].double().cumsum(1)]
    first = [inputs["merge_lse"], inputs["merge_o"]]
    tensors, first = ([x.requires_grad_(grad) for x in part] for part in (tensors, first))
    return (*tensors, None, None, *first, 1, 20, 0, 0, 0, 0, 0, 0, 0, False, 0.25)


@needs_cpu_kernels
def test_opcheck():
    for grad in (True, False):
        result = torch.library.opcheck(resolve("attention_cpu"), _arguments(grad))
        assert set(result.values()) == {"SUCCESS"}
    args = _arguments(False)
    o, lse = resolve("attention_cpu")(*args)
    backward = (torch.randn_like(o), torch.randn_like(lse), o, lse, *args)
    assert set(torch.library.opcheck(resolve("attention_cpu_backward"), backward).values()) == {"SUCCESS"}


@needs_cpu_kernels
def test_second_derivative_is_refused():
    inputs = {n: x.requires_grad_() if n in FLOATS else x for n, x in SMALL.make().items()}
    (dq,) = torch.autograd.grad(attention(**inputs).o.sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="memattn::attention_cpu has no second derivative.*backend='chunked'"):
        dq.sum().backward()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_fullgraph(compiler, backend, device):
    if backend == "chunked" and compiler == "inductor":
        pytest.skip("plain torch: what inductor makes of it is torch's matter")
    torch._dynamo.reset()
    op = functools.partial(attention, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend=compiler)
    cases = [replace(SMALL, queries=37)]
    if backend == "cpu" and compiler == "aot_eager":
        cases += [replace(SMALL, queries=50), case("packed", lengths=((20, 20), (9, 9)), decay=0.1)]
    for c in cases:
        inputs = c.make(device=device)
        expected = evaluate(op, inputs)
        for name, x in evaluate(compiled, inputs).items():
            torch.testing.assert_close(x, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_autocast_changes_nothing(backend, device):
    inputs = SMALL.make(device=device)
    expected = attention(**inputs, backend=backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        results = attention(**inputs, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(results, expected, strict=True))
