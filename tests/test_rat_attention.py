"""RAT attention on every backend of this machine: truth, tolerance, relations, planted bugs, step, registration, errors."""

# ruff: noqa: E501 (tables, one case a line)
import functools
import itertools
from dataclasses import replace

import pytest
import torch
from support import tables
from support.compare import CEILING, assert_close_to_truth, evaluate, relative_error, to_float64
from support.rat import (
    BASE,
    BUGS,
    CASES,
    CHECKS,
    CONTINUED,
    EMPTY,
    LOCAL,
    LOCAL_CASES,
    PACKED,
    PLUS,
    SMALL,
    STATE,
    as_op,
    assert_same_state,
    comparator,
    definition,
    flat,
    forward,
    planted,
    rows,
    run_all,
)

import memattn
from memattn import backends
from memattn.ops import RATState, attention, gated_scan, merge_states, rat_attention, rat_attention_step
from memattn.ops._library import resolve
from memattn.reference import rat_attention as reference
from memattn.reference.rotary import rotate

NO_KERNELS = backends.why_not("rat_attention", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))
TENSORS = ("q", "k", "v", "g")


@pytest.fixture(params=["cpu", "chunked"])
def backend(request, device):
    """Each backend that can run here; the others are skipped with their reason."""
    need = backends.Request(device, torch.float32, features=frozenset({"backward", "packed"}))
    if reasons := backends.why_not("rat_attention", request.param, need):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


def on(backend):
    return functools.partial(rat_attention, backend=backend)


# --- values ----------------------------------------------------------------------------------------------------------


@functools.cache
def truth_of(case, dtype):
    return evaluate(flat(definition), to_float64(case.make(dtype)))


def check(case, dtype, backend, device):
    inputs, truth = case.make(dtype, device), truth_of(case, dtype)
    actual = evaluate(flat(on(backend)), inputs)
    for name, x in actual.items():
        if name != "final_state":
            assert x.dtype == (dtype if name == "o" else inputs[name.removeprefix("d")].dtype), name
    # A state of one running sum: kernels add token by token, as the loop does.
    assert_close_to_truth(actual, evaluate(flat(comparator(dtype)), case.make(dtype)), truth, CEILING[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_within_tolerance_of_truth(case, dtype, backend, device):
    check(case, dtype, backend, device)


def table_errors():
    """Results of the table in this process that miss the truth by more than the rule allows."""
    cases = (BASE, PLUS, PACKED, CONTINUED, *LOCAL_CASES[:2])
    calls = [(case, dtype, "cpu", "cpu") for case in cases for dtype in (torch.float32, torch.bfloat16)]
    return tables.misses(check, calls)


@needs_cpu_kernels
@tables.each
def test_every_instruction_set(isa):
    tables.assert_no_errors(isa, __name__)


@pytest.mark.parametrize("case", [BASE, PLUS, PACKED, CONTINUED], ids=lambda c: c.name)
def test_float16(case, backend, device):
    check(case, torch.float16, backend, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LOCAL_CASES, ids=lambda c: c.name)
def test_window_and_prefix(case, dtype, backend, device):
    check(case, dtype, backend, device)


@pytest.mark.parametrize("case", [*CASES, *EMPTY], ids=lambda c: c.name)
def test_float64(case, backend, device):
    if device != "cpu" and backend != "chunked":
        pytest.skip(f"{backend} has no float64 on {device}")
    actual = evaluate(flat(on(backend)), case.make(torch.float64, device))
    for name, expected in truth_of(case, torch.float64).items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [BASE, PLUS, PACKED, CONTINUED], ids=lambda c: c.name)
def test_gradcheck(case, backend, device):
    if device != "cpu" and backend != "chunked":
        pytest.skip(f"{backend} has no float64 on {device}")
    lengths = None if case.lengths is None else (3, 0, 10)
    case = replace(
        case,
        batch=2 if case.start else 1,
        length=13,
        lengths=lengths,
        heads=1,
        value_heads=2,
        chunk_size=case.chunk_size and 4,
    )
    inputs = case.make(torch.float64, device, grad=True)
    names = [n for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad]

    def op(*tensors):
        return flat(on(backend))(**{**inputs, **dict(zip(names, tensors, strict=True))})

    leaves = [inputs[n] for n in names]
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


# --- relations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, backend, device):
    CHECKS[check](on(backend), device)


def test_reference_passes_every_relation():
    assert {name: reason for name, reason in run_all(as_op(reference.chunked)).items() if reason} == {}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    assert any(run_all(planted(bug)).values()), f"no check noticed: {bug}"


def test_chunks_of_one_token_that_forget_are_attention(backend, device):
    inputs = replace(SMALL, chunk_size=1, value_heads=2, rope_base=None).make(device=device)
    inputs["g"] = torch.full_like(inputs["g"], -torch.inf)
    expected = attention(inputs["q"], inputs["k"], inputs["v"], backend="chunked").o
    assert relative_error(forward(on(backend), inputs)[0], expected) <= 2e-6


def test_one_chunk_is_the_gated_average(backend, device):
    inputs = replace(SMALL, chunk_size=64, value_heads=2).make(device=device)
    expected, _, final = gated_scan(inputs["g"].flatten(2), inputs["v"].flatten(2), output_final_state=True)
    o, state = forward(on(backend), inputs)
    assert relative_error(o.flatten(2), expected) <= 2e-6
    assert relative_error(state.running_value.flatten(1), final) <= 2e-6


def test_equals_its_parts(backend, device):
    """Scan, attention over the ends by the summary rule, and the own entry, joined by their log-sum-exp."""
    inputs = replace(SMALL, rope_base=None, value_heads=2).make(device=device)
    q, g = inputs["q"], inputs["g"].flatten(2)
    ys, ends, _ = gated_scan(g, (inputs["k"].flatten(2), inputs["v"].flatten(2)), chunk_size=8, emit="both")
    key, value, keys, values = (x.unflatten(2, (2, 16)) for x in (*ys, *ends))
    far = attention(q, keys, values, chunk_rule=("summary", 8))
    o, _ = merge_states([far.o, value], [far.lse, (q * key).sum(-1) * 16**-0.5])
    assert relative_error(forward(on(backend), inputs)[0], o) <= 2e-6


def test_rotation_is_a_complex_product():
    """Channels c and c + K/2 are one complex number, turned by position · base^(−2c/K)."""
    x = torch.randn(5, 2, 16, dtype=torch.float64)
    position = torch.tensor([0, 1, 7, 100, 4096])
    angle = position[:, None, None] * 1000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)
    turned = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(rotate(x, position, 1000.0), torch.cat((turned.real, turned.imag), -1))


@pytest.mark.parametrize("cut", range(0, 38, 3))
def test_window_and_prefix_split_anywhere(cut, backend, device):
    inputs = LOCAL.make(device=device)
    whole, final = forward(on(backend), inputs)
    first, state = forward(on(backend), rows(inputs, 0, cut))
    second, last = forward(on(backend), rows(inputs, cut, None), initial_state=state)
    assert relative_error(torch.cat([first, second], 1), whole) <= 2e-6
    assert_same_state(last, final, f"split at {cut}")


@needs_cpu_kernels
@pytest.mark.parametrize(
    "change", [{}, {"lengths": (1, 0, 8, 9, 19)}, {"window": 1, "prefix_len": 20}, {"prefix_len": 0}], ids=str
)
def test_window_and_prefix_differentiate_through_states(change):
    """Three calls in a row; gradients pass the local rows that a state holds."""
    case = replace(LOCAL, length=37, **change)

    def gradients(backend):
        inputs = case.make(torch.float64, grad=True)
        state, loss, cuts = None, 0.0, (0, 37) if case.lengths else (0, 2, 23, 37)
        for a, b in [*itertools.pairwise(cuts), (0, 37)]:
            part = {**rows(inputs, a, b), "initial_state": state}
            o, state = on(backend)(**part, output_final_state=True)
            loss = loss + o.square().sum() + state.local_keys.sum() + state.local_values.square().sum()
        return torch.autograd.grad(loss, [inputs[n] for n in TENSORS])

    for name, x, y in zip(TENSORS, gradients("cpu"), gradients("chunked"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@needs_cpu_kernels
@pytest.mark.parametrize(
    "case",
    [replace(BASE, batch=1, heads=1, value_heads=1, length=700, chunk_size=16), replace(BASE, batch=1, heads=1, value_heads=2, length=600, chunk_size=300),
     replace(PLUS, batch=1, heads=1, value_heads=1, length=400), replace(PACKED, heads=1, value_heads=1, lengths=(1, 0, 300, 9)),
     replace(LOCAL, batch=1, heads=1, value_heads=1, length=400, window=70)],
    ids=("rat", "long chunks", "plus", "packed", "window and prefix"),
)  # fmt: skip
def test_bits_do_not_depend_on_threads(case):
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(evaluate(flat(on("cpu")), case.make()))
    torch.set_num_threads(before)
    for name, x in results[0].items():
        assert all(torch.equal(x, other[name]) for other in results[1:]), name


@needs_cpu_kernels
def test_step_costs_nothing_for_the_distance_between_rows():
    """Rows at any position, also absurd ones, which only torch.ops lets through: no table of all positions between."""
    q = torch.randn(3, 1, 2, 16)
    g = -torch.rand(3, 1, 2, 16)
    entries, running = torch.zeros(3, 2, 2, 16), torch.zeros(3, 2, 16)
    length = torch.tensor([0, 2**62, 2**63 - 1])
    parts = entries.clone(), entries.clone(), running.clone(), running.clone(), None, None, length
    o = torch.ops.memattn.rat_attention_step_cpu(q, q, q, g, *parts, None, 0, 8, 1, 1, 0, 10000.0, False, 0.25)
    alone = rat_attention(q[:1], q[:1], q[:1], g[:1], chunk_size=None, dilation=8, backend="cpu")[0]
    assert torch.equal(o[:1], alone) and bool(o.isfinite().all())


@needs_cpu_kernels
def test_settings_of_any_size():
    inputs = rows(replace(LOCAL, length=20).make(), 0, 20)
    for large in (2**62, 2**63 - 1):
        dense = forward(on("cpu"), inputs, window=20, dilation=large)[0]
        for change in ({"window": large}, {"prefix_len": large}, {"dilation": 1}):
            o, _ = on("cpu")(**{**inputs, "window": 0, "prefix_len": 0, "dilation": large, **change})
            assert relative_error(o, dense) <= 2e-6, change
        gated = forward(on("cpu"), inputs, dilation=None, window=0, prefix_len=0, chunk_size=large)[0]
        assert gated.shape == dense.shape


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [BASE, PLUS, replace(BASE, dim=24, head_map="tile"), LOCAL], ids=lambda c: c.name + str(c.dim)
)
def test_step_continues_prefill(case, tokens, dtype, backend, device):
    inputs = replace(case, length=42).make(dtype, device)
    truth, last = forward(definition, to_float64(inputs))
    first, state = forward(on(backend), rows(inputs, 0, 15))
    room = torch.nn.functional.pad
    state = RATState(room(state.keys, (0, 0, 0, 0, 0, 4)), room(state.values, (0, 0, 0, 0, 0, 4)), *state.parts()[2:])
    outputs = [first]
    for t in range(15, 42, tokens):
        part = [inputs[n][:, t : t + tokens] for n in TENSORS]
        outputs.append(rat_attention_step(*part, state, **case.settings(), backend=backend))
    assert relative_error(torch.cat(outputs, 1), truth) <= (2e-6 if dtype == torch.float32 else 4e-3)
    room = min(state.keys.shape[1], last.keys.shape[1])
    for name in STATE:
        x, y = getattr(state, name), getattr(last, name)
        if x is not None:
            x, y = (x[:, :room], y[:, :room]) if name in ("keys", "values") else (x, y)
            assert relative_error(x, y) <= (2e-6 if dtype == torch.float32 else 4e-3), name


@pytest.mark.parametrize("threads", [1, 3])
def test_step_of_a_pool(threads, backend, device):
    """Rows by index at different positions; padding writes nothing."""
    case = replace(BASE, batch=3, length=2, start=(5, 7, 0, 16, 15, 1))
    inputs = case.make(torch.float64, device)
    pool = RATState(*(inputs[n] for n in STATE[:5]))
    index = torch.tensor([4, -1, 1], device=device)
    before, state = torch.get_num_threads(), pool.clone()
    torch.set_num_threads(threads)
    o = rat_attention_step(
        *(inputs[n] for n in TENSORS), state, **case.settings(), state_indices=index, backend=backend
    )
    torch.set_num_threads(before)
    assert not o[1].any()
    for b, row in ((0, 4), (2, 1)):
        own = {n: inputs[n][b : b + 1] for n in TENSORS} | case.settings()
        expected, after = forward(definition, own, initial_state=pool._map(lambda owner, name, x, r=row: x[r : r + 1]))
        torch.testing.assert_close(o[b : b + 1], expected)
        for name in STATE[:5]:
            x = getattr(state, name)[row : row + 1]
            torch.testing.assert_close(
                x, getattr(after, name)[:, : x.shape[1]] if x.dim() == 4 else getattr(after, name)
            )
    for name in STATE[:5]:
        untouched = [0, 2, 3, 5]
        assert torch.equal(getattr(state, name)[untouched], getattr(pool, name)[untouched]), name


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_step_over_many_entries(dtype):
    """Several ranges of entries, joined: near the definition, the same bits on any number of threads."""
    case = replace(PLUS, dilation=1, length=1, start=(700, 40))
    inputs = case.make(dtype)
    part, pool = [inputs[n] for n in TENSORS], RATState(*(inputs[n] for n in STATE[:5]))
    truth, _ = forward(definition, to_float64(inputs))
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(rat_attention_step(*part, pool.clone(), **case.settings(), backend="cpu"))
    torch.set_num_threads(before)
    assert relative_error(results[0], truth) <= (2e-6 if dtype == torch.float32 else 4e-3)
    assert all(torch.equal(results[0], other) for other in results[1:])


# --- registration ----------------------------------------------------------------------------------------------------

TINY = replace(BASE, batch=1, length=21, heads=1, value_heads=2)
VARIANTS = {
    "rat": TINY,
    "plus": replace(TINY, chunk_size=None, dilation=4),
    "packed": replace(TINY, lengths=(10, 0, 11)),
    "continued": replace(TINY, start=(11,)),
    "empty": replace(TINY, length=0),
}


def _arguments(case, grad):
    inputs = case.make(grad=grad)
    rule = case.rule
    tensors = [inputs.get(n) for n in (*TENSORS, *STATE[:4], *STATE[5:], "length", "cu_seqlens")]
    return (*tensors, rule.restart, rule.stride, rule.unit, rule.window, rule.prefix, 10000.0, False, 0.25)


@needs_cpu_kernels
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(variant):
    case = VARIANTS[variant]
    for grad in (True, False):
        result = torch.library.opcheck(resolve("rat_attention_cpu"), _arguments(case, grad))
        assert set(result.values()) == {"SUCCESS"}
    args = _arguments(case, False)
    o, keys, values, key, value, *local, lse = resolve("rat_attention_cpu")(*args)
    cotangents = [torch.randn_like(x) for x in (o, keys, values, key, value, *local)]
    given = (*cotangents, o, keys, values, *local, lse, *args)
    assert set(torch.library.opcheck(resolve("rat_attention_cpu_backward"), given).values()) == {"SUCCESS"}


@needs_cpu_kernels
def test_opcheck_step():
    inputs = replace(TINY, batch=2, length=1, start=(5, 7)).make()
    tensors = (*(inputs.get(n) for n in (*TENSORS, *STATE[:4], *STATE[5:], "length")), torch.tensor([1, -1]))
    result = torch.library.opcheck(resolve("rat_attention_step_cpu"), (*tensors, 8, 8, 8, 1, 0, 10000.0, False, 0.25))
    assert set(result.values()) == {"SUCCESS"}


def test_compiled_fullgraph(backend):
    torch._dynamo.reset()
    compiled = torch.compile(on(backend), fullgraph=True, backend="aot_eager")
    for length in (21, 34):
        inputs = replace(TINY, length=length).make()
        expected = evaluate(flat(on(backend)), inputs)
        for name, x in evaluate(flat(compiled), inputs).items():
            torch.testing.assert_close(x, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_compiled_step(backend):
    torch._dynamo.reset()
    case = replace(TINY, batch=2, length=1, start=(5, 7))
    inputs = case.make()
    pool = RATState(*(inputs[n] for n in STATE[:5]))
    ours, theirs = pool.clone(), pool.clone()
    step = functools.partial(rat_attention_step, **case.settings(), backend=backend)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    part = [inputs[n] for n in TENSORS]
    torch.testing.assert_close(compiled(*part, ours), step(*part, theirs))
    for x, y in zip(ours.parts()[:5], theirs.parts()[:5], strict=True):
        torch.testing.assert_close(x, y)


@needs_cpu_kernels
def test_second_derivative_is_refused_once_and_clearly():
    inputs = TINY.make(grad=True)
    o, _ = flat(rat_attention)(**inputs)
    (dq,) = torch.autograd.grad(o.square().sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="memattn::rat_attention_cpu has no second derivative.*backend='chunked'"):
        dq.sum().backward()


def test_partial_gradients(backend, device):
    """Only what requires grad gets one, and a missing cotangent counts as zero."""
    gradients = []
    for name in (backend, "chunked"):
        inputs = replace(TINY, start=(11,)).make(device=device)
        inputs["v"].requires_grad_()
        _, final = flat(on(name))(**inputs)
        final.square().sum().backward()
        assert inputs["q"].grad is None
        gradients.append(inputs["v"].grad)
    torch.testing.assert_close(*gradients)


def test_autocast_changes_nothing(backend):
    inputs = TINY.make()
    expected, _ = forward(on(backend), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(forward(on(backend), inputs)[0], expected)


# --- errors ----------------------------------------------------------------------------------------------------------

FEW = replace(BASE, length=6)


def x(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def state(length=0, capacity=2, n=2, **change):
    parts = {
        "keys": x(n, capacity, 4, 16), "values": x(n, capacity, 4, 16), "running_key": x(n, 4, 16),
        "running_value": x(n, 4, 16), "length": torch.full((n,), length),
    }  # fmt: skip
    return RATState(**{**parts, **change})


BAD = {
    "neither": (dict(chunk_size=None), ValueError, "chunk_size is None and dilation is None; expected one of them"),
    "both": (dict(dilation=4), ValueError, "chunk_size is 8 and dilation is 4; expected one of them"),
    "chunk size": (dict(chunk_size=0), ValueError, "chunk_size is 0; expected an integer ≥ 1"),
    "dilation": (dict(chunk_size=None, dilation=-1), ValueError, "dilation is -1; expected an integer ≥ 1"),
    "window": (dict(chunk_size=None, dilation=4, window=-1), ValueError, "window is -1; expected an integer ≥ 0"),
    "window of RAT": (dict(window=4), ValueError, "window is 4 with chunk_size; a window and a prefix need dilation"),
    "prefix of RAT": (dict(prefix_len=4), ValueError, "prefix_len is 4 with chunk_size"),
    "v dim": (dict(v=x(2, 6, 4, 32)), ValueError, "v has head dimension 32; expected 16 like k, which shares its gate"),
    "heads": (dict(v=x(2, 6, 3, 16)), ValueError, "v has 3 heads; expected a positive multiple of q's 2 heads"),
    "g shape": (dict(g=x(2, 6, 4)), ValueError, r"g has shape \[2, 6, 4\]; expected \[B, T, HV, K\] = \[2, 6, 4, 16\]"),
    "g dtype": (dict(g=x(2, 6, 4, 16, dtype=torch.float64)), TypeError, "g is float64; expected float32 with float32 q"),
    "g positive": (dict(g=x(2, 6, 4, 16) + 0.5), ValueError, "g has a value of 0.5; a natural-log decay must be ≤ 0"),
    "rope": (dict(rope_base=0.5), ValueError, "rope_base is 0.5; expected a finite number > 1 or None"),
    "rope dim": (dict(q=x(2, 6, 2, 17), k=x(2, 6, 2, 17), v=x(2, 6, 4, 17), g=x(2, 6, 4, 17)), ValueError, "head dimension K is 17; rotary positions need an even one"),
    "head map": (dict(head_map="mqa"), ValueError, "head_map is 'mqa'; allowed: 'gqa', 'tile'"),
    "scale": (dict(scale=0.0), ValueError, "scale is 0.0; expected a finite number > 0 or None"),
    "state type": (dict(initial_state=x(2, 4)), TypeError, "initial_state is Tensor; expected RATState"),
    "state rows": (dict(initial_state=state(n=3)), ValueError, r"initial_state.keys has shape \[3, 2, 4, 16\]; expected \[N, C, HV, K\] = \[2, 2, 4, 16\]"),
    "state dtype": (dict(initial_state=state(running_key=x(2, 4, 16, dtype=torch.bfloat16))), TypeError, "initial_state.running_key is bfloat16; expected float32"),
    "state length": (dict(initial_state=state(length=24)), ValueError, r"initial_state.length holds 24..24, and with 0 new tokens that makes 3 entries; initial_state.keys has room for 2"),
    "local rows": (dict(chunk_size=None, dilation=4, window=3, initial_state=state()), ValueError, "initial_state.local_keys is None; prefix_len 0 and window 3 keep 2 local rows"),
    "batch with cu_seqlens": (dict(cu_seqlens=torch.tensor([0, 6])), ValueError, "batch size is 2 with cu_seqlens"),
    "cuda": (dict(backend="cuda"), memattn.BackendError, "rat_attention has no cuda kernel; it has: triton, cpu, chunked"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        rat_attention(**{**FEW.make(), **change})
    assert str(caught.value).startswith("rat_attention: ")


def test_bad_step_input():
    inputs = FEW.make()
    good = {n: inputs[n][:, :1] for n in TENSORS} | {"chunk_size": 8}
    strided = x(2, 4, 2, 16).transpose(1, 2)
    cases = {
        "state is Tensor; expected RATState": (dict(state=x(2)), TypeError),
        r"state.keys has shape .*; expected \[P, C, HV, K\]": (dict(state=state(keys=x(3, 2, 4, 16))), ValueError),
        "state has strides": (dict(state=state(keys=strided)), ValueError),
        "length holds 23..23, and with 1 new tokens that makes 3 entries": (dict(state=state(length=23)), ValueError),
        "state_indices holds 0..2": (dict(state_indices=torch.tensor([0, 2])), ValueError),
        "q has 0 tokens": ({n: good[n][:, :0] for n in TENSORS}, ValueError),
        "use rat_attention or call it under": (dict(q=good["q"].clone().requires_grad_()), RuntimeError),
    }  # fmt: skip
    for message, (change, error) in cases.items():
        pool = state()
        with pytest.raises(error, match=message):
            rat_attention_step(**{**good, "state": pool, **change})
        assert not pool.length.any(), f"{message}: the state was written"
