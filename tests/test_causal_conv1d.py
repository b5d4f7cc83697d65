"""The causal convolution on every backend of this machine: truth, tolerance, relations, planted bugs, registration."""

# ruff: noqa: E501 (tables, one case a line)
import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tables
from support.compare import CEILING, assert_close_to_truth, evaluate, to_float64
from support.convolution import BASE, BUGS, CASES, CHECKS, LONG, PACKED, assert_near, exact_with_silu, planted, run_all

import memattn
from memattn import backends
from memattn.ops import causal_conv1d, causal_conv1d_step
from memattn.ops._library import resolve
from memattn.reference import causal_conv1d as reference

TESTS = Path(__file__).parent
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NO_KERNELS = backends.why_not("causal_conv1d", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))
# Few tokens, yet every edge: the interpreter runs a program in milliseconds.
INTERPRETED = [c for c in CASES if c not in (LONG,) and not c.name.startswith("long")]


@pytest.fixture(params=["cpu", "triton", "chunked"])
def backend(request, device):
    """Each backend that can run here; triton on the CPU only in its interpreter."""
    name = request.param
    need = backends.Request(device, torch.float32, (("W", 4),), frozenset({"backward", "packed"}))
    if reasons := backends.why_not("causal_conv1d", name, need, explicit=True):
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    if name == "triton":
        request.getfixturevalue("interpreter")
    return name


@functools.cache
def truth_of(case, dtype):
    return evaluate(reference.loop, to_float64(case.make(dtype)))


def _dtypes(case):
    return FLOATS[:3] if case.name in ("base", "packed", "wide parameters", "long") else FLOATS[:1]


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case,dtype", [(c, d) for c in CASES for d in _dtypes(c)], ids=lambda x: getattr(x, "name", str(x))
)
def test_within_tolerance_of_truth(case, dtype, backend, device):
    if backend == "triton" and device == "cpu" and case not in INTERPRETED:
        pytest.skip("too many tokens for the interpreter")
    inputs = case.make(dtype, device)
    actual = evaluate(functools.partial(causal_conv1d, backend=backend), inputs)
    assert {n: x.dtype for n, x in actual.items() if n[0] == "d"} == {
        f"d{n}": x.dtype for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    if case.length * case.dim < 100:  # a handful of values proves nothing about the ratio of two roundings
        assert_near(actual, truth_of(case, dtype), case.name, tolerance=CEILING[dtype])
    else:
        assert_close_to_truth(actual, evaluate(reference.chunked, inputs), truth_of(case, dtype), CEILING[dtype])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, where a GPU goes to infinity in silence
@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, backend, device):
    CHECKS[check](functools.partial(causal_conv1d, backend=backend), device)


def test_bits_do_not_depend_on_place_or_company(backend, device):
    if backend == "chunked":
        pytest.skip("plain torch's silu depends on the place in memory")
    exact_with_silu(functools.partial(causal_conv1d, backend=backend), device)


def test_reference_passes_every_relation():
    assert {name: reason for name, reason in run_all(reference.chunked).items() if reason} == {}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    failures = {name: reason for name, reason in run_all(planted(bug)).items() if reason}
    assert failures, f"no check noticed: {bug}"


@pytest.mark.parametrize("case", [c for c in CASES if not c.name.startswith("long")], ids=lambda c: c.name)
def test_float64(case, backend, device):
    if device != "cpu" and backend != "chunked":
        pytest.skip(f"{backend} has no float64 on {device}")
    actual = evaluate(functools.partial(causal_conv1d, backend=backend), case.make(torch.float64, device))
    for name, expected in truth_of(case, torch.float64).items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "width,length,lengths", [(4, 2, None), (3, 5, None), (4, None, (1, 0, 4, 2)), (2, None, (3, 0))]
)
def test_gradcheck(backend, device, width, length, lengths):
    if device != "cpu" and backend != "chunked":
        pytest.skip(f"{backend} has no float64 on {device}")
    inputs = replace(BASE, batch=1, length=length, lengths=lengths, dim=3, width=width).make(
        torch.float64, device, grad=True
    )
    names = ("x", "weight", "bias", "initial_state")

    def op(*tensors):
        rest = {n: x for n, x in inputs.items() if n not in names}
        return causal_conv1d(**dict(zip(names, tensors, strict=True)), **rest, output_final_state=True, backend=backend)

    leaves = [inputs[n] for n in names]
    assert torch.autograd.gradcheck(op, leaves, fast_mode=backend == "triton")
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


def test_poisoned_memory(backend, device):
    """Nothing is read before it is written: fresh tensors come filled with NaN."""
    op = functools.partial(causal_conv1d, backend=backend)
    cases = (BASE, PACKED, replace(BASE, length=1))
    expected = [evaluate(op, c.make(device=device)) for c in cases]
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, device=device).isnan().all()
        poisoned = [evaluate(op, c.make(device=device)) for c in cases]
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
    for case, a, b in zip(cases, expected, poisoned, strict=True):
        for name in a:
            assert torch.equal(a[name], b[name]), f"{case.name}: {name}"


def test_partial_gradients(backend, device):
    """Only what requires grad gets one, and a missing cotangent counts as zero."""
    inputs = replace(BASE, length=2).make(device=device, grad=True)
    causal_conv1d(**inputs, output_final_state=True, backend=backend)[1].sum().backward()
    assert (inputs["x"].grad == 1).all(), "the final state is a copy of the inputs"
    assert inputs["weight"].grad is None or not inputs["weight"].grad.any()
    inputs = BASE.make(device=device)
    inputs["initial_state"].requires_grad_()
    y, _ = causal_conv1d(**inputs, backend=backend)
    y.sum().backward()
    truth = to_float64(BASE.make(device=device))
    truth["initial_state"].requires_grad_()
    reference.loop(**truth)[0].sum().backward()
    torch.testing.assert_close(
        inputs["initial_state"].grad.double().cpu(), truth["initial_state"].grad, rtol=1e-5, atol=1e-5
    )
    assert inputs["x"].grad is None


# --- the C++ kernels -------------------------------------------------------------------------------------------------


@needs_cpu_kernels
def test_bits_do_not_depend_on_the_thread_count():
    case = replace(LONG, batch=3, dim=600)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(evaluate(causal_conv1d, case.make(torch.bfloat16)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


def rounding_errors():
    """16-bit values that do not survive a pass through the kernels, and float32 values that round otherwise than torch."""
    wrong = []
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    floats = torch.randint(-(2**31), 2**31 - 1, (300_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    small = torch.linspace(-7e-5, 7e-5, 50_001)  # around float16's smallest normal
    for dtype in (torch.bfloat16, torch.float16):
        x, copy = bits.view(dtype).view(1, 1, -1), torch.tensor([0.0, 1.0]).expand(2**16, 2)
        y, _ = causal_conv1d(x, copy, backend="cpu")
        wrong += [(str(dtype), "copy")] * (not torch.equal(y.nan_to_num(7.0), x.nan_to_num(7.0)))
        bias = torch.cat([floats.view(torch.float32), small])
        y, _ = causal_conv1d(
            torch.zeros(1, 1, bias.numel(), dtype=dtype), torch.zeros(bias.numel(), 2), bias, backend="cpu"
        )
        wrong += [(str(dtype), "round")] * (
            not torch.equal(y.flatten().nan_to_num(7.0), bias.to(dtype).nan_to_num(7.0))
        )
    return wrong


def table_errors():
    """Results of the tables in this process that miss float64 by more than rounding."""
    wrong = rounding_errors()
    for case in (BASE, PACKED, LONG, replace(BASE, width=2), replace(BASE, width=3)):
        for name, x in evaluate(causal_conv1d, case.make()).items():
            truth = evaluate(reference.chunked, to_float64(case.make()))[name]
            if (x.double() - truth).norm() > CEILING[torch.float32] * truth.norm():
                wrong.append((case.name, name))
    return wrong


@needs_cpu_kernels
@tables.each
def test_every_instruction_set(isa):
    tables.assert_no_errors(isa, __name__, products=False)


@needs_cpu_kernels
def test_offsets_beyond_32_bits():
    """Only the last row of a pool of more than 2^31 values is touched, so the pool costs no memory."""
    rows = 2**31 // (4096 * 3) + 2
    try:
        pool = torch.empty(rows, 4096, 3)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    pool[-1] = 2.0
    x, weight = torch.ones(1, 1, 4096), torch.ones(4096, 4)
    y = causal_conv1d_step(x, weight, None, pool, state_indices=torch.tensor([rows - 1]), backend="cpu")
    assert (y == 7).all() and (pool[-1] == torch.tensor([2.0, 2.0, 1.0])).all()


def test_triton_adds_more_partial_sums_than_one_block(device, interpreter):
    from memattn.kernels import causal_conv1d as op

    partial = torch.randn(70, 5, 40, device=device)
    dweight, dbias = torch.full((40, 4), torch.nan, device=device), torch.full((40,), torch.nan, device=device)
    sizes = {"partials": 70, "D": 40, "W": 4, "BIAS": True, "ACC": op.tl.float32}
    op.sum_kernel[(5,)](partial, dweight, dbias, **sizes, BLOCK_PARTIAL=op.BLOCK_PARTIAL, BLOCK_D=op.BLOCK_D)
    expected = partial.double().sum(0).float()
    torch.testing.assert_close(dweight, expected[:4].t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dbias, expected[4], rtol=1e-5, atol=1e-5)


def test_triton_offsets_beyond_32_bits(device, monkeypatch):
    """The last tile of tensors of more than 2^31 elements, alone: the interpreter is told which program to run."""
    pytest.importorskip("triton")
    from memattn.kernels import causal_conv1d as op

    if device != "cpu" or not backends.triton_interpreter():
        pytest.skip("the interpreter is needed")
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    tokens, channels = 2**20 + 5, 2048
    try:
        x, y = (torch.empty(1, tokens, channels, dtype=torch.float16) for _ in range(2))
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    x[0, -8:] = 1
    y[0, -8:] = 0
    launched = {}
    monkeypatch.setattr(op.torch, "empty_like", lambda _: y)
    real = type(op.forward_kernel).__getitem__
    monkeypatch.setattr(
        type(op.forward_kernel),
        "__getitem__",
        lambda self, grid: launched.setdefault("grid", grid) and real(self, (1,)),
    )
    last = lambda self, axis: TensorHandle(np.array([launched["grid"][0] - 1], np.int32), op.tl.int32)  # noqa: E731
    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", last)
    op.forward(x, torch.ones(channels, 4, dtype=torch.float16), None, None, None, False, False)
    assert (y[0, -5:, -64:] == 4).all() and not y[0, -8:, :-64].any()


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "cuda", "chunked"])
def step_backend(request, device):
    reasons = backends.why_not(
        "causal_conv1d_step", request.param, backends.Request(device, torch.float32, (("W", 4),))
    )
    if reasons:
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


@pytest.mark.parametrize("width,tokens", [(2, 1), (3, 2), (4, 1), (4, 3)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_steps_equal_the_forward(step_backend, device, dtype, width, tokens):
    if device != "cpu" and dtype == torch.float64:
        pytest.skip("no float64 step on a GPU")
    case = replace(BASE, length=12, dim=300, width=width, wide=tokens == 2)
    inputs = case.make(dtype, device)
    truth, final = reference.loop(**to_float64(inputs), output_final_state=True)
    state = inputs["initial_state"].clone()
    step = functools.partial(causal_conv1d_step, activation="silu", backend=step_backend)
    outputs = [
        step(inputs["x"][:, t : t + tokens], inputs["weight"], inputs["bias"], state)
        for t in range(0, case.length, tokens)
    ]
    error = (torch.cat(outputs, 1).double().cpu() - truth).norm() / truth.norm()
    assert error <= {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4, torch.float64: 1e-14}[dtype]
    assert torch.equal(state.double().cpu(), final), "the state is a copy of the inputs, exactly"


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_step_pool_rows_and_padding(step_backend, device, index):
    inputs = replace(BASE, batch=3, length=2, silu=False).make(device=device)
    pool = torch.randn(5, BASE.dim, 3, generator=torch.Generator().manual_seed(3)).to(device)
    rows, before = torch.tensor([4, -1, 0], device=device, dtype=index), pool.clone()
    y = causal_conv1d_step(
        inputs["x"], inputs["weight"], inputs["bias"], pool, state_indices=rows, backend=step_backend
    )
    expected, final = reference.loop(
        inputs["x"][[0, 2]], inputs["weight"], inputs["bias"], initial_state=before[[4, 0]], output_final_state=True
    )
    torch.testing.assert_close(y[[0, 2]], expected)
    assert torch.equal(pool[[4, 0]], final)
    assert not y[1].any(), "a padding row gave an output"
    assert torch.equal(pool[1:4], before[1:4]), "a row that no index names was written"


@needs_cpu_kernels
def test_step_follows_no_index_out_of_range():
    """The op below the public function: no value check there, and no access outside the pool."""
    pool, x = torch.ones(4, 40, 3), torch.ones(3, 1, 40)
    y = resolve("causal_conv1d_step_cpu")(
        x, torch.ones(40, 4), None, pool[1:3], torch.tensor([2, 2**40, -(2**40)]), False
    )
    assert not y.any() and (pool == 1).all()


def test_step_is_for_inference(step_backend, device):
    inputs = replace(BASE, length=1).make(device=device, grad=True)
    call = (inputs["x"], inputs["weight"], inputs["bias"], inputs["initial_state"].detach())
    with pytest.raises(
        RuntimeError, match="causal_conv1d_step: an input requires grad; the step is for inference only"
    ):
        causal_conv1d_step(*call, backend=step_backend)
    with torch.no_grad():
        assert causal_conv1d_step(*call, backend=step_backend).shape == inputs["x"].shape


# --- registration ----------------------------------------------------------------------------------------------------

VARIANTS = {
    "full": replace(BASE, length=5),
    "bare": replace(BASE, length=5, bias=False, state=False, silu=False),
    "packed": replace(PACKED, lengths=(2, 0, 4)),
    "empty": replace(BASE, length=0),
}


def _arguments(case, grad):
    inputs = replace(case, dim=9).make(grad=grad)
    return tuple(inputs[n] for n in ("x", "weight", "bias", "initial_state", "cu_seqlens")), case.silu


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(backend, variant):
    if backend == "chunked":
        pytest.skip("plain torch is no op of ours")
    op, backward = resolve(f"causal_conv1d_{backend}"), resolve(f"causal_conv1d_{backend}_backward")
    tests = (
        {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")} if backend == "triton" else {}
    )
    for grad in (True, False):
        tensors, silu = _arguments(VARIANTS[variant], grad)
        assert set(torch.library.opcheck(op, (*tensors, silu, True), **tests).values()) == {"SUCCESS"}
    y, final = op(*tensors, silu, True)
    for dfinal in (None, torch.randn_like(final)):
        result = torch.library.opcheck(backward, (torch.randn_like(y), dfinal, *tensors, silu), **tests)
        assert set(result.values()) == {"SUCCESS"}


@needs_cpu_kernels
def test_opcheck_step():
    for rows in (None, torch.tensor([1, -1])):
        args = (torch.randn(2, 1, 9), torch.randn(9, 4), None, torch.randn(2, 9, 3), rows, True)
        assert set(torch.library.opcheck(resolve("causal_conv1d_step_cpu"), args).values()) == {"SUCCESS"}


@needs_cpu_kernels
def test_compiled_fullgraph():
    torch._dynamo.reset()
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    for case in (BASE, replace(BASE, length=50), PACKED):
        inputs = case.make()
        expected = evaluate(causal_conv1d, inputs)
        for name, x in evaluate(compiled, inputs).items():
            assert torch.equal(x, expected[name]), name


@needs_cpu_kernels
def test_compiled_step_mutates_the_state():
    torch._dynamo.reset()
    inputs = replace(BASE, length=1).make()
    call = (inputs["x"], inputs["weight"], inputs["bias"])
    expected_state, state = inputs["initial_state"].clone(), inputs["initial_state"].clone()
    expected = causal_conv1d_step(*call, expected_state, activation="silu")
    y = torch.compile(causal_conv1d_step, fullgraph=True, backend="aot_eager")(*call, state, activation="silu")
    assert torch.equal(y, expected) and torch.equal(state, expected_state)
    assert not torch.equal(state, inputs["initial_state"])


@needs_cpu_kernels
def test_second_derivative_is_refused_once_and_clearly():
    inputs = BASE.make(grad=True)
    (dx,) = torch.autograd.grad(causal_conv1d(**inputs)[0].sum(), inputs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="memattn::causal_conv1d_cpu has no second derivative.*backend='chunked'"):
        dx.sum().backward()


# --- bad input -------------------------------------------------------------------------------------------------------


def z(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


BAD = {
    "rank": (dict(x=z(21, 40)), ValueError, r"x has shape \[21, 40\] of rank 2; expected \[B, T, D\]"),
    "not a tensor": (dict(x=[1.0]), TypeError, "x is list; expected a torch.Tensor"),
    "x dtype": (dict(x=z(2, 21, 40, dtype=torch.int64)), TypeError, "x is int64; expected float32 or bfloat16 or float16"),
    "weight rank": (dict(weight=z(40, 1, 4)), ValueError, r"weight has shape \[40, 1, 4\] of rank 3; expected \[D, W\]"),
    "weight channels": (dict(weight=z(39, 4)), ValueError, r"weight has shape \[39, 4\]; expected \[D, W\] = \[40, 4\]"),
    "width": (dict(weight=z(40, 5)), ValueError, "weight has width W = 5; allowed: 2, 3, 4"),
    "weight dtype": (dict(weight=z(40, 4, dtype=torch.bfloat16)), TypeError, "weight is bfloat16; expected float32 with float32 x"),
    "bias shape": (dict(bias=z(4)), ValueError, r"bias has shape \[4\]; expected \[D\] = \[40\]"),
    "bias dtype": (dict(bias=z(40, dtype=torch.float64)), TypeError, "bias is float64; expected float32 with float32 x"),
    "bias device": (dict(bias=z(40, device="meta")), ValueError, "bias is on meta; expected cpu like x"),
    "activation": (dict(activation="relu"), ValueError, "activation is 'relu'; allowed: None, 'silu'"),
    "state shape": (dict(initial_state=z(2, 40, 4)), ValueError, r"initial_state has shape \[2, 40, 4\]; expected \[N, D, W-1\] = \[2, 40, 3\]"),
    "state dtype": (dict(initial_state=z(2, 40, 3, dtype=torch.bfloat16)), TypeError, "initial_state is bfloat16; expected float32 with float32 x"),
    "state device": (dict(initial_state=z(2, 40, 3, device="meta")), ValueError, "initial_state is on meta; expected cpu like x"),
    "backend": (dict(backend="cudnn"), ValueError, "backend is 'cudnn'; allowed: cuda, triton, cpu, chunked"),
    "batch with cu_seqlens": (dict(cu_seqlens=torch.tensor([0, 21])), ValueError, "batch size is 2 with cu_seqlens"),
    "cu_seqlens type": (dict(cu_seqlens=[0, 21]), TypeError, "cu_seqlens is list; expected a torch.Tensor"),
    "cu_seqlens device": (dict(cu_seqlens=z(2, device="meta")), ValueError, "cu_seqlens is on meta; expected cpu like x"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        causal_conv1d(**{**BASE.make(), **change})
    assert str(caught.value).startswith("causal_conv1d: ")


@pytest.mark.parametrize(
    "bounds,message",
    [
        ([0, 9, 5, 40], "cu_seqlens falls from 9 to 5 at entry 2; it must not decrease"),
        ([0, 39], "cu_seqlens runs from 0 to 39; expected from 0 to T = 40"),
        ([0], r"cu_seqlens has 1 entries; expected N\+1 ≥ 2"),
    ],
)
def test_bad_cu_seqlens(bounds, message):
    with pytest.raises(ValueError, match=message):
        causal_conv1d(**{**PACKED.make(), "initial_state": None, "cu_seqlens": torch.tensor(bounds)})


def test_bad_step_input():
    x, weight, pool = z(2, 1, 40), z(40, 4), torch.randn(2, 40, 3)
    cases = {
        "x has 0 tokens; expected at least 1": dict(x=x[:, :0]),
        r"state has shape \[1, 40, 3\]; expected \[P, D, W-1\] = \[2, 40, 3\]": dict(state=pool[:1]),
        "state has strides": dict(state=pool.transpose(1, 2).contiguous().transpose(1, 2)),
        "state is bfloat16; expected float32": dict(state=pool.bfloat16()),
        r"state_indices has shape \[3\]; expected \[B\] = \[2\]": dict(state_indices=torch.tensor([0, 1, 1])),
        r"state_indices holds 0..2; allowed: -1 \(padding\)..1": dict(state_indices=torch.tensor([0, 2])),
        "state_indices is on meta; expected cpu like x": dict(state_indices=z(2, device="meta")),
    }
    before = pool.clone()
    for message, change in cases.items():
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            causal_conv1d_step(**{**dict(x=x, weight=weight, bias=None, state=pool), **change})
        assert str(caught.value).startswith("causal_conv1d_step: ")
        assert torch.equal(pool, before), f"{message}: the state was written"


def test_checks_remembered_for_one_call_do_not_pass_another():
    inputs = PACKED.make()
    causal_conv1d(**inputs)
    with pytest.raises(ValueError, match="cu_seqlens falls"):
        causal_conv1d(**{**inputs, "cu_seqlens": torch.tensor([0, 9, 5, 9, 9, 9, 9, 9, 40], dtype=torch.int32)})
    with pytest.raises(ValueError, match="activation is 'relu'"):
        causal_conv1d(**{**inputs, "activation": "relu"})


def test_named_backend_that_cannot_serve_lists_every_reason():
    with pytest.raises(memattn.BackendError) as caught:
        causal_conv1d(**BASE.make(), backend="cuda")
    text = str(caught.value)
    assert "received: x float32 [2, 21, 40] on cpu, weight float32 [40, 4] on cpu" in text
    assert "cuda: causal_conv1d has no cuda kernel; it has: triton, cpu, chunked" in text


@needs_cpu_kernels
def test_ops_below_the_public_function_are_safe():
    """torch.ops.memattn.* can be called with anything; each tensor is checked before memory is."""
    x, weight, state = z(2, 5, 8), z(8, 4), z(2, 8, 3)
    forward, backward, step = (resolve(f"causal_conv1d{n}") for n in ("_cpu", "_cpu_backward", "_step_cpu"))
    calls = {
        "weight must be float32 [8, any]": lambda: forward(x, z(7, 4), None, None, None, True, False),
        "weight must have 2 to 4 taps; got 9": lambda: forward(x, z(8, 9), None, None, None, True, False),
        "x must be float32 or bfloat16": lambda: forward(x.transpose(1, 2), z(5, 4), None, None, None, True, False),
        "bias must be float32 [8]": lambda: forward(x, weight, z(9), None, None, True, False),
        "initial_state must be float32 [2, 8, 3]": lambda: forward(x, weight, None, z(1, 8, 3), None, True, False),
        "cu_seqlens must run from 0 to T = 5": lambda: forward(
            x[:1], weight, None, None, torch.tensor([0, 9]), True, False
        ),
        "dy must be float32 [2, 5, 8]": lambda: backward(z(2, 4, 8), None, x, weight, None, None, None, True),
        "dfinal_state must be float32 [2, 8, 3]": lambda: backward(x, z(2, 8, 2), x, weight, None, None, None, True),
        "state must be float32 [2, 8, 3]": lambda: step(x, weight, None, state[:1], None, True),
        "state_indices must be int32 or int64 [2]": lambda: step(x, weight, None, state, torch.tensor([0]), True),
    }
    for message, call in calls.items():
        with pytest.raises(RuntimeError, match=re.escape(message)):
            call()
