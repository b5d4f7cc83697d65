"""Segment memory on every backend of this machine: truth, tolerance, relations, planted bugs, registration, errors."""

import functools
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import tables
from support.compare import CEILING, assert_close_to_truth, evaluate, relative_error, to_float64
from support.segments import (
    ARMT,
    BUGS,
    CASES,
    CHECKS,
    EMPTY,
    INFINI,
    PACKED,
    RULE,
    SMALL,
    TENSORS,
    as_op,
    comparator,
    definition,
    planted,
    run_all,
)

from memattn import backends
from memattn.ops import linear_attention, segment_memory, segment_memory_step
from memattn.ops._library import resolve
from memattn.reference import segment_memory as reference

TESTS = Path(__file__).parent
NO_KERNELS = backends.why_not("segment_memory", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))


@pytest.fixture(params=["cpu", "chunked"])
def backend(request, device):
    """Each backend that can run here."""
    need = backends.Request(device, torch.float32, features=frozenset({"backward", "packed"}))
    if reasons := backends.why_not("segment_memory", request.param, need):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


def on(backend):
    """The op on one backend."""
    return functools.partial(segment_memory, backend=backend)


@functools.cache
def truth_of(case, dtype):
    return evaluate(definition, to_float64(case.make(dtype)))


def _dtypes(case):
    sixteen = (torch.bfloat16, torch.float16) if case in (INFINI, ARMT, PACKED) else ()
    return (torch.float32, *sixteen)


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case,dtype", [(c, d) for c in CASES for d in _dtypes(c)], ids=lambda x: getattr(x, "name", x))
def test_within_tolerance_of_truth(case, dtype, backend, device):
    inputs, truth = case.make(dtype, device), truth_of(case, dtype)
    actual = evaluate(on(backend), inputs)
    assert {n: x.dtype for n, x in actual.items() if n[0] == "d"} == {
        f"d{n}": x.dtype for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    few, long_sums = case.length < 20, case.value_dim > 256 and dtype == torch.float32
    if few or long_sums:  # a handful of values proves nothing about two roundings; kernels sum over V one by one
        for name, x in truth.items():
            assert relative_error(actual[name], x) <= CEILING[dtype], name
    else:
        assert_close_to_truth(actual, evaluate(comparator(dtype), inputs), truth, CEILING[dtype])


@pytest.mark.parametrize("case", [*CASES, *EMPTY], ids=lambda c: c.name)
def test_float64(case, backend, device):
    if device != "cpu" and backend != "chunked":
        pytest.skip(f"{backend} has no float64 on {device}")
    actual = evaluate(on(backend), case.make(torch.float64, device))
    for name, expected in truth_of(case, torch.float64).items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, backend, device):
    CHECKS[check](on(backend), device)


def test_definition_passes_what_it_defines():
    assert {name: reason for name, reason in run_all(definition).items() if reason} == {}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    failures = {name: reason for name, reason in run_all(planted(bug)).items() if reason}
    assert failures, f"no check noticed: {bug}"


@pytest.mark.parametrize(
    "case",
    [
        replace(SMALL, correction=False, length=11, segment_size=4, heads=2, key_heads=1),
        replace(
            SMALL, correction=False, heads=2, key_heads=1, lengths=(3, 0, 7), key_lengths=(4, 2, 9), segment_size=3
        ),
        replace(SMALL, correction=False, length=9, heads=1, key_heads=1, segment_size=4, normalize=False),
        replace(SMALL, correction=False, length=9, heads=1, key_heads=1, segment_size=4, causal=False, delta=False),
    ],
    ids=["delta", "packed", "undivided", "set"],
)
def test_gradcheck(case, backend, device):
    """Without correction, whose gradient is left out on purpose."""
    if device != "cpu" and backend != "chunked":
        pytest.skip(f"{backend} has no float64 on {device}")
    inputs = case.make(torch.float64, device, grad=True)

    def op(*tensors):
        return on(backend)(**{**inputs, **dict(zip(TENSORS, tensors, strict=True))}, output_final_state=True)

    leaves = [inputs[n] for n in TENSORS]
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


def test_one_token_segments_are_exclusive_linear_attention(device):
    """Additive with one token a segment: linear attention whose token t reads what stood before t."""
    inputs = replace(INFINI, delta=False, segment_size=1, eps=0.0, heads=2, length=40).make(device=device)
    o, final = segment_memory(**inputs, output_final_state=True)
    q, k, v = (inputs[n] for n in ("q", "k", "v"))
    expected, _ = linear_attention(q[:, 1:], k[:, :-1], v[:, :-1], normalize=True, scale=1.0, initial_state=inputs["initial_state"])  # fmt: skip # noqa: E501
    torch.testing.assert_close(o[:, 1:], expected, rtol=1e-4, atol=1e-5)
    _, same = linear_attention(q, k, v, normalize=True, initial_state=inputs["initial_state"], output_final_state=True)
    torch.testing.assert_close(final, same, rtol=1e-5, atol=1e-5)


def test_poisoned_memory(backend, device):
    """Nothing is read before it is written: fresh tensors come filled with NaN."""
    cases = (INFINI, ARMT, PACKED)
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
    for pick in (0, 1):
        grads = []
        for op, given in (
            (on(backend), SMALL.make(device=device)),
            (definition, to_float64(SMALL.make(device=device))),
        ):
            given["v"].requires_grad_()
            grads.append(torch.autograd.grad(op(**given, output_final_state=True)[pick].sum(), given["v"])[0])
            assert given["q"].grad is None
        assert relative_error(*grads) <= 1e-5


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_steps_equal_the_forward(dtype, device):
    """Token by token over three segments, the rows of the batch at different places in theirs."""
    inputs = replace(SMALL, batch=2, length=56).make(dtype, device)
    truth = [
        definition(
            **to_float64(
                {
                    n: x[b : b + 1, :t] if n in ("q", "k", "v", "beta") else x[b : b + 1] if n == "initial_state" else x
                    for n, x in inputs.items()
                }
            )
        )  # fmt: skip # noqa: E501
        for b, t in ((0, 56), (1, 40))
    ]
    settings = {n: inputs[n] for n in RULE if n not in ("causal", "key_segment_size")}
    tokens = [inputs[n] for n in ("q", "k", "v", "beta")]
    states = [inputs["initial_state"].clone(), inputs["initial_state"].clone()]
    count = torch.zeros(2, dtype=torch.int64, device=device)
    for t in range(24):  # row 0 runs ahead by 16 and then by another 16 tokens that row 1 does not have
        if t < 16:
            now = [x[:1, t : t + 1] for x in tokens]
            part = [x[:1] for x in states]
            o = segment_memory_step(*now, *part, count[:1], **settings)
            assert relative_error(o, truth[0][0][:, t : t + 1]) <= 5 * CEILING[dtype]
    for t in range(40):
        now = [torch.stack((x[0, t + 16 : t + 17], x[1, t : t + 1])) for x in tokens]
        o = segment_memory_step(*now, *states, count, **settings)
        assert o.dtype == dtype
        for b, at in ((0, t + 16), (1, t)):
            assert relative_error(o[b], truth[b][0][0, at : at + 1]) <= 5 * CEILING[dtype], (b, at)
    assert count.tolist() == [8, 8]
    for b in (0, 1):
        assert relative_error(states[1][b], truth[b][1][0]) <= 5 * CEILING[dtype]


# --- the C++ kernels -------------------------------------------------------------------------------------------------


@needs_cpu_kernels
@pytest.mark.parametrize(
    "case",
    [
        replace(INFINI, batch=1, length=900, segment_size=256, key_dim=128, value_dim=160),
        replace(ARMT, length=600, key_length=300, segment_size=64, key_segment_size=32, value_dim=1024),
    ],
    ids=lambda c: c.name,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_thread_count(case, dtype):
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(evaluate(on("cpu"), case.make(dtype)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, x in results[0].items():
            assert torch.equal(x, other[name]), name


def table_errors():
    """Results of the table in this process that miss float64 by more than rounding."""
    wrong = []
    for case in CASES:
        truth = evaluate(as_op(reference.chunked), to_float64(case.make()))
        for name, x in evaluate(on("cpu"), case.make()).items():
            if relative_error(x, truth[name]) > CEILING[torch.float32]:
                wrong.append((case.name, name))
    return wrong


@needs_cpu_kernels
@tables.each
def test_every_instruction_set(isa):
    tables.assert_no_errors(isa, __name__)


# --- registration ----------------------------------------------------------------------------------------------------


def _arguments(case, grad=False):
    inputs = case.make(grad=grad)
    bounds = [inputs["cu_seqlens"], inputs["cu_seqlens"] if inputs["cu_seqlens_k"] is None else inputs["cu_seqlens_k"]]
    settings = [inputs[n] for n in RULE]
    settings[1] = settings[1] or settings[0]
    return (*(inputs[n] for n in TENSORS), *bounds, *settings)


@needs_cpu_kernels
@pytest.mark.parametrize("case", [SMALL, PACKED, replace(INFINI, state=False), EMPTY[0]], ids=lambda c: c.name)
def test_opcheck(case):
    for grad in (True, False):
        result = torch.library.opcheck(resolve("segment_memory_cpu"), _arguments(case, grad))
        assert set(result.values()) == {"SUCCESS"}
    args = _arguments(case)
    o, final, states = resolve("segment_memory_cpu")(*args)
    given = (torch.randn_like(o), torch.randn_like(final), *args[:7], o, states, *args[7:])
    assert set(torch.library.opcheck(resolve("segment_memory_cpu_backward"), given).values()) == {"SUCCESS"}


@needs_cpu_kernels
def test_compiled_fullgraph():
    torch._dynamo.reset()
    compiled = torch.compile(segment_memory, fullgraph=True, backend="aot_eager")
    for case in (SMALL, replace(SMALL, length=70)):
        expected = evaluate(segment_memory, case.make())
        for name, x in evaluate(compiled, case.make()).items():
            torch.testing.assert_close(x, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@needs_cpu_kernels
def test_second_derivative_is_refused_once_and_clearly():
    inputs = SMALL.make(grad=True)
    (dq,) = torch.autograd.grad(segment_memory(**inputs)[0].sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="memattn::segment_memory_cpu has no second derivative.*backend='chunked'"):
        dq.sum().backward()


def test_autocast_changes_nothing(backend, device):
    inputs = SMALL.make(device=device)
    expected, _ = on(backend)(**inputs)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(on(backend)(**inputs)[0], expected)


# --- errors ----------------------------------------------------------------------------------------------------------


WRONG = {
    "q has shape [2, 5] of rank 2; expected [B, T, HQ, K]": {"q": torch.ones(2, 5)},
    "k has shape [1, 50, 2, 17]; expected [B, S, H, K] = [1, 50, 2, 16]": {"k": torch.ones(1, 50, 2, 17)},
    "v has shape [1, 49, 2, 24]; expected [B, S, H, V] = [1, 50, 2, 24]": {"v": torch.ones(1, 49, 2, 24)},
    "q has 3 heads; expected a positive multiple of k's 2 heads": {"q": torch.ones(1, 50, 3, 16)},
    "v is float64; expected float32 like q": {"v": torch.ones(1, 50, 2, 24).double()},
    "beta has shape [1, 50]; expected [B, S, H] = [1, 50, 2]": {"beta": torch.ones(1, 50)},
    "segment_size is 0; expected an integer ≥ 1": {"segment_size": 0},
    "key_segment_size is True; expected an integer ≥ 1": {"key_segment_size": True},
    "eps is -1.0; expected a finite number ≥ 0": {"eps": -1.0},
    "correction is True with normalize False": {"normalize": False},
    "initial_state has shape [1, 2, 16, 24]; expected [N, H, K, V+1] = [1, 2, 16, 25]": {
        "initial_state": torch.ones(1, 2, 16, 24)
    },
    "initial_state is float64; expected float32": {"initial_state": torch.ones(1, 2, 16, 25).double()},
    "cu_seqlens runs from 0 to 49; expected from 0 to T = 50": {
        "cu_seqlens": torch.tensor([0, 49]),
    },
    "cu_seqlens_k is given without cu_seqlens": {"cu_seqlens_k": torch.tensor([0, 50])},
    "head dimension K is 8; allowed: 16..1024": {
        "q": torch.ones(1, 50, 4, 8), "k": torch.ones(1, 50, 2, 8), "initial_state": None
    },
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_errors_name_argument_received_and_allowed(message):
    with pytest.raises((ValueError, TypeError), match=re.escape(f"segment_memory: {message}")):
        segment_memory(**{**SMALL.make(), **WRONG[message]})


def test_step_refuses_several_tokens_and_gradients():
    inputs = SMALL.make()
    tokens = [inputs[n] for n in ("q", "k", "v", "beta")]
    state, count = inputs["initial_state"], torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="q has 50 tokens and k has 50; expected 1"):
        segment_memory_step(*tokens, state, state.clone(), count, segment_size=4)
    one = [x[:, :1] for x in tokens]
    with pytest.raises(ValueError, match=r"open_state has shape \[1, 2, 16, 24\]"):
        segment_memory_step(*one, state, state[..., :24].clone(), count, segment_size=4)
    one[0] = one[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        segment_memory_step(*one, state, state.clone(), count, segment_size=4)


def test_segment_longer_than_any_sequence(backend, device):
    """Sums with the size of a segment must not overflow."""
    inputs = replace(INFINI, length=40).make(device=device)
    results = [on(backend)(**{**inputs, "segment_size": size}) for size in (40, 2**63 - 1)]
    for x, y in zip(*results, strict=True):
        assert (x is None and y is None) or torch.equal(x, y)
