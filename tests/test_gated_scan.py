"""The gated scan on every backend of this machine: truth, tolerance, relations, planted bugs, registration, errors."""

# ruff: noqa: E501 (tables, one case a line)
import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import host_cuda, tables
from support.compare import CEILING, assert_close_to_truth, evaluate, to_float64
from support.scan import BASE, BUGS, CASES, CHECKS, PACKED, PACKED_RAT, RAT, assert_near, flat, planted, run_all

import memattn
from memattn import backends
from memattn.ops import gated_scan, gated_scan_step
from memattn.ops._library import resolve
from memattn.reference import gated_scan as reference

TESTS = Path(__file__).parent
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_KERNELS = backends.why_not("gated_scan", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))
NAMES = ("g", "x", "x2", "initial_state", "initial_state2", "cu_seqlens")


@pytest.fixture(params=["cpu", "cuda", "triton", "chunked"])
def backend(request, device, monkeypatch):
    """Each backend that can run here; on the CPU triton only in its interpreter, cuda compiled for the host."""
    name = request.param
    if name == "cuda":
        host_cuda.ready(monkeypatch, device, "gated_scan", "gated_scan")
    need = backends.Request(device, torch.float32, features=frozenset({"backward", "packed"}))
    if reasons := backends.why_not("gated_scan", name, need, explicit=True):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    if name == "triton":
        request.getfixturevalue("interpreter")
    return name


def on(backend):
    """The op with plain tensors and joined results, on one backend."""
    return flat(functools.partial(gated_scan, backend=backend))


def skip_what_interpreting_takes_too_long(backend, device, case, full, chosen=CASES):
    if backend == "triton" and device == "cpu" and not full:
        if case.length > 100 or case.dim > 100 or case not in chosen:
            pytest.skip("many tokens or programs for the interpreter: runs with --full")


def skip_without_float64(backend, device):
    if backend == "cuda" or (device != "cpu" and backend != "chunked"):
        pytest.skip(f"{backend} has no float64 on {device}")


# One each of what the interpreter can show: values, layout, states, resets, masks. The others run with --full.
INTERPRETED = ("equals_definition", "split_gradients", "packed_equals_separate", "tiles_equal_copies", "empty",
               "nan_stays_in_its_chunk_and_channel", "gates_at_their_limits", "unused_slots_are_zero")  # fmt: skip


@functools.cache
def truth_of(case, dtype):
    return evaluate(flat(reference.loop), to_float64(case.make(dtype)))


def _dtypes(case):
    return FLOATS[:3] if case in (RAT, PACKED_RAT) else FLOATS[:1]


def vanishing(case, truth):
    """Where everything is forgotten, gradients that vanish beside the sums they are made of are judged against those."""
    size = truth["dx"].norm().item()
    return dict.fromkeys(("dg", "dinitial_state", "dinitial_state2"), size) if case.decay > 30 else {}


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case,dtype", [(c, d) for c in CASES for d in _dtypes(c)], ids=lambda x: getattr(x, "name", str(x))
)
def test_within_tolerance_of_truth(case, dtype, backend, device, full):
    skip_what_interpreting_takes_too_long(backend, device, case, full)
    inputs = case.make(dtype, device)
    actual, truth = evaluate(on(backend), inputs), truth_of(case, dtype)
    assert {n: x.dtype for n, x in actual.items() if n[0] == "d"} == {
        f"d{n}": x.dtype for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    if case.length < 20 or case.decay < 0.01:
        # A handful of values proves nothing about the ratio of two roundings, and over a long memory one sum after the
        # other rounds more often than the fallback's tree of sums.
        assert_near(actual, truth, case.name, tolerance=CEILING[dtype])
    else:
        assert_close_to_truth(
            actual, evaluate(flat(reference.chunked), inputs), truth, CEILING[dtype], vanishing(case, truth)
        )


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, backend, device, full):
    if backend == "triton" and device == "cpu" and not full and check not in INTERPRETED:
        pytest.skip("runs in the interpreter with --full")
    CHECKS[check](functools.partial(gated_scan, backend=backend), device)


def test_definition_passes_what_it_defines():
    assert {n: r for n, r in run_all(reference.loop).items() if r and n not in ("empty", "gates_at_their_limits")} == {}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    failures = {name: reason for name, reason in run_all(planted(bug)).items() if reason}
    assert failures, f"no check noticed: {bug}"


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_float64(case, backend, device, full):
    skip_what_interpreting_takes_too_long(backend, device, case, full, (RAT, PACKED_RAT))
    skip_without_float64(backend, device)
    actual = evaluate(on(backend), case.make(torch.float64, device))
    for name, expected in truth_of(case, torch.float64).items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "case",
    [
        replace(RAT, batch=1, length=7, dim=4, tiles=2, chunk_size=3),
        replace(RAT, dim=4, tiles=2, lengths=(3, 0, 4), chunk_size=2, form="plain"),
        replace(BASE, batch=1, length=9, dim=2, tiles=1),
    ],
    ids=["chunks", "packed plain", "whole"],
)
def test_gradcheck(case, backend, device):
    skip_without_float64(backend, device)
    inputs = case.make(torch.float64, device, grad=True)
    with torch.no_grad():
        inputs["g"] -= 1e-3  # a finite difference must not step above 0

    def op(*tensors):
        rest = {n: x for n, x in inputs.items() if n not in NAMES[:5]}
        return on(backend)(**dict(zip(NAMES, tensors, strict=False)), **rest, output_final_state=True)

    leaves = [inputs[n] for n in NAMES[:5]]
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


def test_poisoned_memory(backend, device):
    """Nothing is read before it is written: fresh tensors come filled with NaN."""
    cases = (RAT, PACKED_RAT)
    expected = [evaluate(on(backend), c.make(device=device)) for c in cases]
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        poisoned = [evaluate(on(backend), c.make(device=device)) for c in cases]
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
    for case, a, b in zip(cases, expected, poisoned, strict=True):
        for name in a:
            assert torch.equal(a[name], b[name]), f"{case.name}: {name}"


def test_partial_gradients(backend, device):
    """Only what requires grad gets one, and a missing cotangent counts as zero."""
    inputs = RAT.make(device=device)
    inputs["x"].requires_grad_()
    truth = to_float64(RAT.make(device=device))
    truth["x"].requires_grad_()
    for pick in (0, 1, 2):  # ys, ends, final state
        grads = []
        for op, given in ((functools.partial(gated_scan, backend=backend), inputs), (reference.loop, truth)):
            results = op(given["g"], (given["x"],), chunk_size=16, emit="both", output_final_state=True)
            grads.append(torch.autograd.grad(results[pick][0].sum(), given["x"])[0].double().cpu())
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)
    assert inputs["g"].grad is None


def test_results_have_the_structure_of_xs(backend, device):
    g, x = -torch.rand(2, 9, 8, device=device), torch.randn(2, 9, 8, device=device)
    run = functools.partial(gated_scan, backend=backend)
    ys, ends, final = run(g, x, chunk_size=4, emit="both", output_final_state=True)
    assert (ys.shape, ends.shape, final.shape) == ((2, 9, 8), (2, 3, 8), (2, 8)) and final.dtype == torch.float32
    several = run(g, [x, x[..., :4], x * 2], chunk_size=4, emit="both", output_final_state=True)
    assert [len(kind) for kind in several] == [3, 3, 3]
    assert torch.equal(several[0][0], ys) and torch.equal(several[2][2], 2 * final)
    assert run(g, x)[1:] == (None, None) and run(g, x, chunk_size=4, emit="ends")[0] is None
    assert isinstance(run(g, (x,))[0], tuple)


# --- the C++ kernels -------------------------------------------------------------------------------------------------


@needs_cpu_kernels
@pytest.mark.parametrize(
    "case", [replace(RAT, batch=3, length=700, dim=96), replace(BASE, length=900, dim=192)], ids=["chunks", "whole"]
)
def test_bits_do_not_depend_on_the_thread_count(case):
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(evaluate(on("cpu"), case.make(torch.bfloat16)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_large_results_that_bypass_the_cache(dtype):
    """The rows of a long call are those of a short one, at widths whose rows are aligned and at one whose are not."""
    for dim in (1024, 1001):
        length = (17 << 20) // (dim * dtype.itemsize)
        g, x = -torch.rand(1, length, dim), torch.randn(1, length, dim).to(dtype)
        y, _, _ = gated_scan(g, x, chunk_size=64, backend="cpu")
        start = length // 2 // 64 * 64
        part, _, _ = gated_scan(g[:, start : start + 64], x[:, start : start + 64], backend="cpu")
        assert torch.equal(y[:, start : start + 64], part)


def table_errors():
    """Results of the table in this process that miss float64 by more than rounding."""
    wrong = []
    for case in CASES:
        truth = evaluate(flat(reference.chunked), to_float64(case.make()))
        scales = vanishing(case, truth)
        for name, x in evaluate(on("cpu"), case.make()).items():
            scale = scales.get(name, truth[name].norm().item())
            if (x.double() - truth[name]).norm() > CEILING[torch.float32] * scale:
                wrong.append((case.name, name))
    return wrong


@needs_cpu_kernels
@tables.each
def test_every_instruction_set(isa):
    tables.assert_no_errors(isa, __name__, products=False)


@needs_cpu_kernels
def test_offsets_beyond_32_bits():
    """Only the last row of a pool of more than 2^31 values is touched, so the pool costs no memory."""
    rows = 2**31 // 4096 + 2
    try:
        pool = torch.empty(rows, 4096)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    pool[-1] = 2.0
    g = torch.zeros(1, 1, 4096)
    y = gated_scan_step(g, g + 1, pool, form="plain", state_indices=torch.tensor([rows - 1]), backend="cpu")
    assert (y == 3).all() and (pool[-1] == 3).all()


# --- the CUDA kernels ------------------------------------------------------------------------------------------------

LONG = replace(BASE, length=700, dim=12, decay=0.3)
CHAINS = (
    LONG,
    replace(LONG, name="chain, plain", form="plain", tiles=None),
    replace(LONG, name="chains in chunks", chunk_size=256, emit="both"),
    replace(LONG, name="packed chains", lengths=(150, 0, 1, 300, 128, 256, 3, 0, 257)),
    replace(
        LONG, name="packed chains in chunks", lengths=(150, 0, 1, 300, 128, 256, 3, 0, 257), chunk_size=200, emit="both"
    ),
    replace(LONG, name="vectors", batch=1, length=150, dim=1032, tiles=2),
    replace(LONG, name="vectors in chunks", batch=1, length=40, dim=1032, tiles=2, chunk_size=16, emit="both"),
    replace(LONG, name="vectors of the backward only", batch=1, length=20, dim=1026, tiles=1),
)


@pytest.fixture
def cuda(monkeypatch, device):
    host_cuda.ready(monkeypatch, device, "gated_scan", "gated_scan", "gated_scan_step")
    return "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CHAINS, ids=lambda c: c.name)
def test_chains_of_segments_and_vectors(case, dtype, cuda, device):
    truth = evaluate(flat(reference.chunked), to_float64(case.make(dtype)))
    assert_near(evaluate(on(cuda), case.make(dtype, device)), truth, case.name, tolerance=CEILING[dtype])


def test_bits_do_not_depend_on_the_batch_or_on_vectors(cuda, device):
    """Nor does what a misaligned tensor is read by."""
    inputs = replace(LONG, batch=3, length=300, dim=1032, tiles=2).make(device=device)
    whole = evaluate(on(cuda), inputs)

    def beside(x):
        return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)

    for name, x in evaluate(on(cuda), {**inputs, "g": beside(inputs["g"]), "x": beside(inputs["x"])}).items():
        assert torch.equal(x, whole[name]), name

    def results(rows):
        given = {n: x[rows].requires_grad_() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
        ends = on(cuda)(**given, output_final_state=True)
        return *ends, *torch.autograd.grad(ends, [given[n] for n in NAMES[:5]], [y.detach() for y in ends])

    for alone, beside_others in zip(results(slice(1, 2)), results(slice(0, 3)), strict=True):
        assert torch.equal(alone, beside_others[1:2])


def test_cuda_offsets_beyond_32_bits(cuda, device):
    rows = 2**31 // 4096 + 2
    try:
        pool = torch.empty(rows, 4096, device=device)
    except RuntimeError as error:
        pytest.skip(f"no memory: {error}")
    pool[-1] = 2.0
    g = torch.zeros(1, 1, 4096, device=device)
    rows = torch.tensor([rows - 1], device=device)
    y = gated_scan_step(g, g + 1, pool, form="plain", state_indices=rows, backend=cuda)
    assert (y == 3).all() and (pool[-1] == 3).all()


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "cuda", "chunked"])
def step_backend(request, device, monkeypatch):
    if request.param == "cuda":
        host_cuda.ready(monkeypatch, device, "gated_scan", "gated_scan_step")
    if reasons := backends.why_not("gated_scan_step", request.param, backends.Request(device, torch.float32)):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("form", ["ema", "plain"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_steps_equal_the_forward(step_backend, device, dtype, form, tokens):
    """Decoding chunk by chunk, each restarted by the step that begins it, against the parallel form."""
    if dtype == torch.float64:
        skip_without_float64(step_backend, device)
    inputs = replace(RAT, length=24, chunk_size=8, dim=150, form=form, emit="all").make(dtype, device)
    truth, final = flat(reference.loop)(**to_float64(inputs), output_final_state=True)
    pools = [inputs["initial_state"].clone(), inputs["initial_state2"].clone()]
    outputs = []
    for t in range(0, 24, tokens):
        g, *xs = (inputs[n][:, t : t + tokens] for n in ("g", "x", "x2"))
        restart = torch.full((2,), t > 0 and t % 8 == 0, device=device)
        outputs.append(torch.cat(gated_scan_step(g, xs, pools, form=form, restart=restart, backend=step_backend), 2))
    error = (torch.cat(outputs, 1).double().cpu() - truth).norm() / truth.norm()
    assert error <= {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float64: 1e-14}[dtype]
    error = (torch.cat(pools, 1).double().cpu() - final).norm() / final.norm()
    assert error <= (1e-14 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_step_pool_rows_padding_and_restart(step_backend, device, index):
    g, x = -torch.rand(3, 2, 40, device=device), torch.randn(3, 2, 40, device=device)
    pool = torch.randn(5, 40, device=device)
    pool[0] = torch.nan
    rows, before = torch.tensor([4, -1, 0], device=device, dtype=index), pool.clone()
    restart = torch.tensor([False, False, True], device=device)
    y = gated_scan_step(g, x, pool, restart=restart, state_indices=rows, backend=step_backend)
    start = torch.stack([before[4], torch.zeros_like(before[4])])
    (expected,), _, (final,) = reference.loop(g[[0, 2]], (x[[0, 2]],), initial_state=(start,), output_final_state=True)
    torch.testing.assert_close(y[[0, 2]], expected)
    torch.testing.assert_close(pool[[4, 0]], final)
    assert not y[1].any(), "a padding row gave an output"
    assert torch.equal(pool[1:4], before[1:4]), "a row that no index names was written"


@needs_cpu_kernels
def test_step_follows_no_index_out_of_range():
    """The op below the public function: no value check there, and no access outside the pool."""
    pool, x = torch.ones(4, 40), torch.ones(3, 1, 40)
    y = resolve("gated_scan_step_cpu")(-x, x, pool[1:3], None, torch.tensor([2, 2**40, -(2**40)]), True)
    assert not y.any() and (pool == 1).all()


def test_step_is_for_inference(step_backend, device):
    x = torch.randn(2, 1, 8, device=device, requires_grad=True)
    call = (-torch.rand(2, 1, 8, device=device), x, torch.zeros(2, 8, device=device))
    with pytest.raises(RuntimeError, match="gated_scan_step: an input requires grad; the step is for inference only"):
        gated_scan_step(*call, backend=step_backend)
    with torch.no_grad():
        assert gated_scan_step(*call, backend=step_backend).shape == x.shape


# --- registration ----------------------------------------------------------------------------------------------------

SMALL = replace(RAT, length=5, dim=6, chunk_size=2)
VARIANTS = {
    "both": SMALL,
    "all": replace(SMALL, emit="all", chunk_size=None),
    "one payload, no state": replace(SMALL, tiles=None, state=False),
    "packed ends": replace(SMALL, lengths=(2, 0, 4), emit="ends"),
    "empty": replace(SMALL, length=0),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(backend, variant):
    if backend == "chunked":
        pytest.skip("plain torch is no op of ours")
    op, backward = resolve(f"gated_scan_{backend}"), resolve(f"gated_scan_{backend}_backward")
    tests = (
        {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")} if backend == "triton" else {}
    )
    case = VARIANTS[variant]
    settings = (case.form == "ema", case.chunk_size or 0)
    emits = (case.emit != "ends", case.emit != "all", True)
    for grad in (True, False):
        inputs = case.make(grad=grad)
        tensors = tuple(inputs[n] for n in NAMES)
        assert set(torch.library.opcheck(op, (*tensors, *settings, *emits), **tests).values()) == {"SUCCESS"}
    wanted = [w and (i % 2 == 0 or case.tiles) for i, w in enumerate(w for w in emits for _ in range(2))]
    results = op(*tensors, *settings, *emits)
    cotangents = [torch.randn_like(x) if w else None for x, w in zip(results, wanted, strict=True)]
    for given in (cotangents, [None] * 5 + cotangents[5:]):
        result = torch.library.opcheck(backward, (*given, *tensors, *settings), **tests)
        assert set(result.values()) == {"SUCCESS"}


@needs_cpu_kernels
def test_opcheck_step():
    for rows, restart in ((None, None), (torch.tensor([1, -1]), torch.tensor([True, False]))):
        args = (-torch.rand(2, 1, 9), torch.randn(2, 1, 3), torch.randn(2, 9), restart, rows, True)
        assert set(torch.library.opcheck(resolve("gated_scan_step_cpu"), args).values()) == {"SUCCESS"}


@needs_cpu_kernels
def test_compiled_fullgraph():
    torch._dynamo.reset()
    compiled = torch.compile(gated_scan, fullgraph=True, backend="aot_eager")
    for case in (RAT, replace(RAT, length=50), replace(PACKED, emit="ends", chunk_size=8)):
        inputs = case.make()
        expected = evaluate(flat(gated_scan), inputs)
        for name, x in evaluate(flat(compiled), inputs).items():
            assert torch.equal(x, expected[name]), name


@needs_cpu_kernels
def test_compiled_step_mutates_the_state():
    torch._dynamo.reset()
    g, x, start = -torch.rand(2, 1, 8), torch.randn(2, 1, 8), torch.randn(2, 8)
    expected_state, state = start.clone(), start.clone()
    expected = gated_scan_step(g, x, expected_state)
    y = torch.compile(gated_scan_step, fullgraph=True, backend="aot_eager")(g, x, state)
    assert torch.equal(y, expected) and torch.equal(state, expected_state) and not torch.equal(state, start)


@needs_cpu_kernels
def test_second_derivative_is_refused_once_and_clearly():
    inputs = BASE.make(grad=True)
    (dx,) = torch.autograd.grad(gated_scan(inputs["g"], inputs["x"])[0].sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="memattn::gated_scan_cpu has no second derivative.*backend='chunked'"):
        dx.sum().backward()


# --- bad input -------------------------------------------------------------------------------------------------------


def z(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


G, X = z(2, 9, 8), z(2, 9, 8)
BAD = {
    "g rank": (dict(g=z(9, 8)), ValueError, r"g has shape \[9, 8\] of rank 2; expected \[B, T, D\]"),
    "g type": (dict(g=[0.0]), TypeError, "g is list; expected a torch.Tensor"),
    "g dtype": (dict(g=G.bfloat16()), TypeError, "g is bfloat16; expected float32 with float32 xs"),
    "g positive": (dict(g=G + 0.25), ValueError, "g has a value of 0.25; a natural-log decay must be ≤ 0"),
    "xs type": (dict(xs="x"), TypeError, "xs is str; expected a torch.Tensor or a tuple of at least one"),
    "xs empty": (dict(xs=()), TypeError, "xs is an empty tuple; expected a torch.Tensor or a tuple"),
    "x type": (dict(xs=(X, None)), TypeError, r"xs\[1\] is NoneType; expected a torch.Tensor"),
    "x rank": (dict(xs=z(2, 8)), ValueError, r"xs has shape \[2, 8\] of rank 2; expected \[B, T, D/r\]"),
    "x length": (dict(xs=(X, z(2, 8, 8))), ValueError, r"xs\[1\] has shape \[2, 8, 8\]; expected \[B, T, D/r\] = \[2, 9, 8\]"),
    "x channels": (dict(xs=(X, z(2, 9, 3))), ValueError, r"xs\[1\] has 3 channels; expected a divisor of g's 8"),
    "no channels": (dict(xs=z(2, 9, 0)), ValueError, "xs has 0 channels; expected a divisor of g's 8"),
    "x dtype": (dict(xs=X.int()), TypeError, "xs is int32; expected float32 or bfloat16 or float16 or float64"),
    "x dtypes": (dict(xs=(X, X.bfloat16())), TypeError, r"xs\[1\] is bfloat16; expected float32 like xs\[0\]"),
    "x device": (dict(xs=(X, z(2, 9, 8, device="meta"))), ValueError, r"xs\[1\] is on meta; expected cpu like g"),
    "form": (dict(form="lti"), ValueError, "form is 'lti'; allowed: 'ema', 'plain'"),
    "emit": (dict(emit="none"), ValueError, "emit is 'none'; allowed: 'all', 'ends', 'both'"),
    "ends without chunks": (dict(emit="ends"), ValueError, "emit is 'ends' without chunk_size; allowed: 'all'"),
    "chunk size": (dict(chunk_size=0), ValueError, "chunk_size is 0; expected None or at least 1"),
    "state type": (dict(initial_state=(z(2, 8),)), TypeError, "initial_state is tuple; expected a torch.Tensor"),
    "state structure": (dict(xs=(X, X), initial_state=z(2, 8)), TypeError, "initial_state is Tensor; expected a tuple like xs, one state per payload"),
    "states": (dict(xs=(X, X), initial_state=(z(2, 8),)), TypeError, "initial_state is 1 tensors; expected a tuple like xs"),
    "state shape": (dict(initial_state=z(3, 8)), ValueError, r"initial_state has shape \[3, 8\]; expected \[N, D\] = \[2, 8\]"),
    "state dtype": (dict(initial_state=z(2, 8).half()), TypeError, "initial_state is float16; expected float32 like g"),
    "state device": (dict(initial_state=z(2, 8, device="meta")), ValueError, "initial_state is on meta; expected cpu like g"),
    "backend": (dict(backend="cudnn"), ValueError, "backend is 'cudnn'; allowed: cuda, triton, cpu, chunked"),
    "batch with cu_seqlens": (dict(cu_seqlens=torch.tensor([0, 9])), ValueError, "batch size is 2 with cu_seqlens"),
    "cu_seqlens type": (dict(cu_seqlens=[0, 9]), TypeError, "cu_seqlens is list; expected a torch.Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    for backend in (None, "chunked"):
        with pytest.raises(error, match=message) as caught:
            gated_scan(**{**dict(g=G, xs=X, backend=backend), **change})
        assert str(caught.value).startswith("gated_scan: ")


def test_bad_cu_seqlens():
    for bounds, message in (
        ([0, 5, 4, 9], "falls from 5 to 4"),
        ([0, 8], "runs from 0 to 8; expected from 0 to T = 9"),
        ([0], "has 1 entries"),
    ):
        with pytest.raises(ValueError, match=f"cu_seqlens {message}"):
            gated_scan(G[:1], X[:1], cu_seqlens=torch.tensor(bounds))


def test_bad_step_input():
    g, pool = z(2, 1, 8), torch.randn(2, 8)
    cases = {
        "g has 0 tokens; expected at least 1": dict(g=g[:, :0], xs=g[:, :0]),
        "g has a value of 1; a natural-log decay": dict(g=g + 1),
        r"state has shape \[1, 8\]; expected \[P, D\] = \[2, 8\]": dict(state=pool[:1]),
        "state is Tensor; expected a tuple like xs": dict(xs=(g,)),
        "state has strides": dict(state=pool.t().contiguous().t()),
        "state is bfloat16; expected float32": dict(state=pool.bfloat16()),
        r"restart has shape \[3\]; expected \[B\] = \[2\]": dict(restart=torch.zeros(3, dtype=torch.bool)),
        "restart is int64; expected bool": dict(restart=torch.tensor([0, 1])),
        r"state_indices has shape \[3\]; expected \[B\] = \[2\]": dict(state_indices=torch.tensor([0, 1, 1])),
        r"state_indices holds 0..2; allowed: -1 \(padding\)..1": dict(state_indices=torch.tensor([0, 2])),
    }
    before = pool.clone()
    for message, change in cases.items():
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            gated_scan_step(**{**dict(g=g, xs=g, state=pool), **change})
        assert str(caught.value).startswith("gated_scan_step: ")
        assert torch.equal(pool, before), f"{message}: the state was written"


def test_nan_gate_is_data_and_a_positive_one_beside_it_is_not():
    g = G.clone()
    g[0, 3, 2] = torch.nan
    assert gated_scan(g, X + 1)[0][0, 3:, 2].isnan().all()
    g[1, 0, 0] = 2.0
    with pytest.raises(ValueError, match="g has a value of 2; "):
        gated_scan(g, X)


def test_named_backend_that_cannot_serve_lists_every_reason():
    with pytest.raises(memattn.BackendError) as caught:
        gated_scan(G, (X, X), backend="cuda")
    text = str(caught.value)
    assert "received: g float32 [2, 9, 8] on cpu, xs[0] float32 [2, 9, 8] on cpu" in text
    assert "cuda: tensors are on cpu, supported: cuda" in text


@needs_cpu_kernels
def test_ops_below_the_public_function_are_safe():
    """torch.ops.memattn.* can be called with anything; each tensor is checked before memory is."""
    forward, backward, step = (resolve(f"gated_scan{n}") for n in ("_cpu", "_cpu_backward", "_step_cpu"))
    last = (True, 4, True, True, True)
    calls = {
        "g must be float32 [any, any, any]": lambda: forward(G.double(), X, None, None, None, None, *last),
        "x must be float32 or bfloat16": lambda: forward(G, X.int(), None, None, None, None, *last),
        "x must be float32 [2, 9, any]": lambda: forward(G, z(2, 8, 8), None, None, None, None, *last),
        "x2 must have a divisor of g's 8 channels; got 3": lambda: forward(G, X, z(2, 9, 3), None, None, None, *last),
        "initial_state2 must be float32 [2, 8]": lambda: forward(G, X, X, None, z(1, 8), None, *last),
        "chunk_size must be 0 (none) or more; got -1": lambda: forward(
            G, X, None, None, None, None, True, -1, True, False, False
        ),
        "emit_ends needs a chunk_size": lambda: forward(G, X, None, None, None, None, True, 0, True, True, False),
        "cu_seqlens must run from 0 to T = 9": lambda: forward(
            G[:1], X[:1], None, None, None, torch.tensor([0, 10]), *last
        ),
        "dy must be float32 [2, 9, 8]": lambda: backward(z(2, 8, 8), *[None] * 5, G, X, *[None] * 4, True, 4),
        "dends must be float32 [2, 3, 8]": lambda: backward(
            None, None, z(2, 9, 8), *[None] * 3, G, X, *[None] * 4, True, 4
        ),
        "dfinal_state must be float32 [2, 8]": lambda: backward(*[None] * 4, z(3, 8), None, G, X, *[None] * 4, True, 4),
        "state must be float32 [2, 8]": lambda: step(G, X, z(1, 8), None, None, True),
        "restart must be": lambda: step(G, X, z(2, 8), torch.zeros(1, dtype=torch.bool), None, True),
        "state_indices must be int32 or int64 [2]": lambda: step(G, X, z(2, 8), None, torch.tensor([0]), True),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=re.escape(message)):
            call()
