"""Linear attention on every backend of this machine: truth, tolerance, relations, planted bugs, registration, errors."""

# ruff: noqa: E501 (tables, one case a line)
import functools
from dataclasses import replace

import pytest
import torch
from support.compare import CEILING, assert_close_to_truth, evaluate, relative_error, to_float64
from support.linear import (
    FAMILIES,
    LINEAR_BASE,
    LINEAR_CASES,
    LINEAR_EMPTY,
    NORMALISED,
    PACKED,
    TENSORS,
    as_op,
    comparator,
    definition,
)  # fmt: skip
from support.metamorphic import CHECKS, run_all
from support.planted import LINEAR_BUGS, planted_linear

import memattn
from memattn import backends
from memattn.ops import gated_delta_rule, linear_attention, linear_attention_step
from memattn.ops._library import resolve
from memattn.ops.linear_attention import CHUNK_SIZE
from memattn.reference import linear_attention as reference

NO_KERNELS = backends.why_not("linear_attention", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))


@pytest.fixture(params=["cpu", "chunked"])
def backend(request, device):
    """Each backend that can run here; the others are skipped with their reason."""
    need = backends.Request(device, torch.float32, features=frozenset({"backward", "packed"}))
    if reasons := backends.why_not("linear_attention", request.param, need):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


def on(backend, **options):
    return functools.partial(linear_attention, backend=backend, **options)


# --- values ----------------------------------------------------------------------------------------------------------


def _dtypes(case):
    wide = case in (LINEAR_BASE, PACKED, NORMALISED)
    return (torch.float32, torch.bfloat16, torch.float16) if wide else (torch.float32, torch.bfloat16)


@functools.cache
def truth_of(case, dtype):
    return evaluate(definition, to_float64(case.make(dtype)))


@pytest.mark.parametrize(
    "case,dtype", [(c, d) for c in LINEAR_CASES for d in _dtypes(c)], ids=lambda x: getattr(x, "name", str(x))
)
def test_within_tolerance_of_truth(case, dtype, backend, device):
    inputs, truth = case.make(dtype, device), truth_of(case, dtype)
    actual = evaluate(on(backend), inputs)
    assert {n: x.dtype for n, x in actual.items()} == {
        n: inputs[n.removeprefix("d")].dtype if n[0] == "d" else dtype if n == "o" else torch.float32 for n in actual
    }
    # Without decay a state is one long running sum: kernels add it token by token, as the loop does.
    running_sum = case.decay is None and dtype == torch.float32
    theirs = evaluate(definition if running_sum else comparator(dtype, CHUNK_SIZE[backend]), inputs)
    # Where everything is forgotten dg vanishes as a difference of terms the size of dv: judged on that scale.
    scales = {"dg": truth["dv"].norm().item()} if (case.decay or 0) > 30 else {}
    if case.per_head:  # a handful of sums proves nothing about the ratio of two roundings
        assert relative_error(actual["dg"], truth["dg"]) <= CEILING[dtype]
        truth = {n: x for n, x in truth.items() if n != "dg"}
    assert_close_to_truth(actual, theirs, truth, CEILING[dtype], scales)


@pytest.mark.parametrize("case", [*LINEAR_CASES, *LINEAR_EMPTY], ids=lambda c: c.name)
def test_float64(case, backend, device):
    if device != "cpu" and backend != "chunked":
        pytest.skip(f"{backend} has no float64 on {device}")
    actual = evaluate(on(backend), case.make(torch.float64, device))
    for name, expected in truth_of(case, torch.float64).items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [None, (33, 0, 1, 64, 70)])
def test_numerator_and_denominator(dtype, lengths, backend, device):
    inputs = replace(NORMALISED, lengths=lengths, batch=2 if lengths is None else 1).make(dtype, device)
    del inputs["normalize"]

    def joined(op, **arguments):
        """The pair as one tensor, which is what the reference returns."""
        (numerator, denominator), final_state = op(return_unnormalized=True, **arguments)
        assert numerator.dtype == denominator.dtype == final_state.dtype
        return torch.cat((numerator, denominator[..., None]), -1), final_state

    def reference_rows(form, **arguments):
        return as_op(form)(return_unnormalized=True, **arguments)

    actual = evaluate(functools.partial(joined, on(backend)), inputs)
    rounding = dtype if dtype.itemsize == 2 else None
    theirs = evaluate(
        functools.partial(reference_rows, functools.partial(reference.chunked, operand_dtype=rounding)), inputs
    )
    truth = evaluate(functools.partial(reference_rows, reference.loop), to_float64(inputs))
    assert_close_to_truth(actual, theirs, truth, CEILING[dtype])
    normalised, _ = linear_attention(**inputs, normalize=True, backend=backend)
    pair = actual["o"]
    expected = (pair[..., :-1] / pair[..., -1:]).to(dtype)
    assert relative_error(normalised, expected) <= torch.finfo(dtype).eps


@pytest.mark.parametrize(
    "case", [LINEAR_BASE, PACKED, NORMALISED, replace(PACKED, normalize=True)], ids=lambda c: c.name
)
def test_gradcheck(case, backend, device):
    if device != "cpu" and backend != "chunked":
        pytest.skip(f"{backend} has no float64 on {device}")
    lengths = None if case.lengths is None else (3, 0, 18)
    case = replace(case, batch=1, length=21, lengths=lengths, heads=1, value_heads=2, key_dim=16, value_dim=16)
    for pair in (False, True) if case.normalize else (False,):
        inputs = case.make(torch.float64, device, grad=True)
        inputs["normalize"] = case.normalize and not pair

        def op(*tensors, inputs=inputs, pair=pair):
            arguments = {**inputs, **dict(zip(TENSORS, tensors, strict=True))}
            o, final_state = on(backend, chunk_size=16)(**arguments, output_final_state=True, return_unnormalized=pair)
            return (*o, final_state) if pair else (o, final_state)

        leaves = [inputs[n] for n in TENSORS]
        assert torch.autograd.gradcheck(op, leaves, fast_mode=True)
    if backend == "chunked":
        assert torch.autograd.gradgradcheck(op, leaves, fast_mode=True)


# --- relations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, family, backend, device):
    CHECKS[check](on(backend), device, FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_passes_every_relation(family):
    failures = run_all(as_op(reference.chunked), family=FAMILIES[family])
    assert {name: reason for name, reason in failures.items() if reason} == {}


@pytest.mark.parametrize("bug", LINEAR_BUGS)
def test_planted_bug_is_caught(bug):
    failures = run_all(as_op(planted_linear(bug)), family=FAMILIES["sum"])
    assert any(failures.values()), f"no check noticed: {bug}"


def test_planted_normaliser_bugs_are_caught():
    """A division that adds an epsilon or drops the decay of z would pass every relation of the plain sum."""
    for wrong in (
        lambda rows: rows[..., :-1] / (rows[..., -1:] + 1e-2),
        lambda rows: rows[..., :-1] / rows[..., -1:].clamp(min=100.0),
        lambda rows: rows[..., :-1],
    ):

        def op(*, normalize, wrong=wrong, **arguments):
            rows, final_state = reference.chunked(normaliser=True, **arguments)
            return wrong(rows), final_state

        assert run_all(op, family=FAMILIES["normalised"])["equals_definition"]


def test_equals_the_delta_rule_with_orthonormal_keys(backend, device):
    """Then the erase term finds nothing along any key, whatever the gates."""
    inputs = replace(LINEAR_BASE, length=64, key_dim=64, state=False).make(device=device)
    keys = torch.linalg.qr(torch.randn(2, 2, 64, 64, device=device))[0]
    inputs["k"] = keys.transpose(1, 2).contiguous()
    del inputs["normalize"]
    expected = evaluate(functools.partial(gated_delta_rule, backend=backend), inputs)
    actual = evaluate(on(backend), inputs)
    for name in ("o", "final_state", "dq", "dv", "dg"):  # dk: the erase term depends on k around the point
        assert relative_error(actual[name], expected[name]) <= 2e-6, name


def test_equals_a_cumulative_sum(backend, device):
    inputs = replace(LINEAR_BASE, heads=4, decay=None, state=False).make(device=device)
    q, k, v = (inputs[n].double() for n in ("q", "k", "v"))
    state = torch.einsum("bthk,bthv->bthkv", k, v).cumsum(1)
    o, final_state = on(backend)(**inputs, output_final_state=True)
    assert relative_error(o, torch.einsum("bthk,bthkv->bthv", q, state) * 32**-0.5) <= 1e-6
    assert relative_error(final_state, state[:, -1]) <= 1e-6


def test_equals_retention(backend, device):
    """RetNet's parallel form: (Q Kᵀ ⊙ D) V with D_ij = γ^{i−j}, γ = 1 − 2^{−5−h}."""
    inputs = replace(LINEAR_BASE, heads=4, state=False).make(device=device)
    gamma = 1 - 2.0 ** (-5 - torch.arange(4, dtype=torch.float64, device=device))
    inputs["g"] = gamma.log().float()
    q, k, v = (inputs[n].double() for n in ("q", "k", "v"))
    steps = torch.arange(150, device=device)[:, None] - torch.arange(150, device=device)
    decay = (gamma[:, None, None] ** steps.clamp(min=0)).tril()
    expected = torch.einsum("bihk,bjhk,hij,bjhv->bihv", q, k, decay, v) * 32**-0.5
    assert relative_error(on(backend)(**inputs)[0], expected) <= 1e-6


def test_gate_per_head_is_the_same_gate_for_every_token(backend, device):
    inputs = replace(LINEAR_BASE, per_head=True).make(device=device)
    repeated = {**inputs, "g": inputs["g"].expand(2, 150, 4).contiguous()}
    actual, expected = evaluate(on(backend), inputs), evaluate(on(backend), repeated)
    for name in actual:
        summed = expected[name].double().sum((0, 1)) if name == "dg" else expected[name]
        assert relative_error(actual[name], summed) <= (1e-6 if name == "dg" else 0.0), name


def test_parts_merge_as_softmax_attention_does(backend, device):
    """o = n / d, lse = ln d of two halves of the keys, merged, is the normalised output over all keys."""
    inputs = replace(NORMALISED, heads=4, decay=None, state=False).make(torch.float64, device)
    whole, _ = on(backend)(**inputs)
    del inputs["normalize"]
    outputs, lses = [], []
    for keep in (torch.arange(150, device=device) % 3 == 0, torch.arange(150, device=device) % 3 != 0):
        part = {**inputs, "k": inputs["k"] * keep[:, None, None]}
        (numerator, denominator), _ = on(backend, return_unnormalized=True)(**part)
        outputs.append(torch.nan_to_num(numerator / denominator[..., None]))
        lses.append(denominator.log())
    weights = torch.stack(lses).softmax(0)[..., None]
    torch.testing.assert_close((weights * torch.stack(outputs)).sum(0), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_seen_gives_zero(dtype, backend, device):
    """q·z = 0 at a token gives o = 0 there and no gradient from it; a denominator below the normal numbers is 0."""
    inputs = replace(NORMALISED, state=False).make(dtype, device)
    for blind in (0.0, 1e-25):
        inputs["q"][:, 40], inputs["k"][:, :3] = 0, 0
        inputs["q"][:, 50] *= blind
        leaves = {n: x.clone().requires_grad_() for n, x in inputs.items() if n in ("q", "k", "v", "g")}
        o, _ = on(backend)(**{**inputs, **leaves})
        (part,) = torch.autograd.grad(o[:, :3].sum() + o[:, 40].sum(), leaves["k"], retain_graph=True)
        assert not part.any() and not o[:, :3].any() and not o[:, 40].any()
        for gradient in torch.autograd.grad(o.sum(), list(leaves.values())):
            assert gradient.isfinite().all()
        assert o.isfinite().all()


@needs_cpu_kernels
@pytest.mark.parametrize("case", [replace(LINEAR_BASE, batch=1, heads=1, value_heads=1, value_dim=96, length=200),
                                  replace(NORMALISED, batch=1, heads=1, value_heads=2, value_dim=96, length=200),
                                  replace(PACKED, normalize=True)], ids=("sum", "normalised", "packed"))  # fmt: skip
def test_bits_do_not_depend_on_threads(case):
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(evaluate(on("cpu", chunk_size=16), case.make()))
    torch.set_num_threads(before)
    for name, x in results[0].items():
        assert all(torch.equal(x, other[name]) for other in results[1:]), name


# --- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [LINEAR_BASE, NORMALISED, replace(LINEAR_BASE, per_head=True, value_dim=40)],
    ids=("sum", "normalised", "per head"),
)
def test_step_continues_prefill(case, tokens, dtype, backend, device):
    inputs = replace(case, length=42).make(dtype, device)
    truth, final = definition(**to_float64(inputs), output_final_state=True)
    prefill = {n: x[:, :30] if n in ("q", "k", "v") or n == "g" and x.dim() == 3 else x for n, x in inputs.items()}
    first, state = on(backend)(**prefill, output_final_state=True)
    outputs = [first]
    for t in range(30, 42, tokens):
        q, k, v = (inputs[n][:, t : t + tokens] for n in ("q", "k", "v"))
        g = inputs["g"] if case.per_head else inputs["g"][:, t : t + tokens]
        outputs.append(linear_attention_step(q, k, v, g, state, normalize=case.normalize, backend=backend))
    assert relative_error(torch.cat(outputs, 1), truth) <= (2e-6 if dtype == torch.float32 else 4e-3)
    assert relative_error(state, final) <= (2e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("threads", [1, 3])
def test_step_of_a_pool(threads, backend, device):
    """Rows by index, padding, the pair, and column blocks when there are few states."""
    case = replace(NORMALISED, batch=3, length=2, heads=1, value_heads=1, value_dim=80)
    inputs = case.make(torch.float64, device)
    q, k, v, g = (inputs[n] for n in ("q", "k", "v", "g"))
    rows = torch.tensor([4, -1, 2], device=device)
    pool = torch.rand(6, 1, 32, 81, dtype=torch.float64, device=device)
    before, expected = torch.get_num_threads(), pool.clone()
    torch.set_num_threads(threads)
    state = pool.clone()
    pair = linear_attention_step(q, k, v, g, state, return_unnormalized=True, state_indices=rows, backend=backend)
    alone = pool[2:3].clone()
    last = linear_attention_step(q[2:], k[2:], v[2:], g[2:], alone, normalize=True, backend=backend)
    torch.set_num_threads(before)
    for b, row in ((0, 4), (2, 2)):
        one = {"q": q, "k": k, "v": v, "g": g}
        o, expected[row] = reference.loop(
            **{n: x[b : b + 1] for n, x in one.items()}, normaliser=True, initial_state=pool[row : row + 1],
            output_final_state=True,
        )  # fmt: skip
        torch.testing.assert_close(torch.cat((pair.numerator, pair.denominator[..., None]), -1)[b : b + 1], o)
    torch.testing.assert_close(state, expected)
    torch.testing.assert_close(last, (pair.numerator / pair.denominator[..., None])[2:])
    assert not pair.numerator[1].any() and not pair.denominator[1].any()


# --- registration ----------------------------------------------------------------------------------------------------

SMALL = replace(LINEAR_BASE, batch=1, length=37, key_dim=16, value_dim=24)
VARIANTS = {
    "full": SMALL,
    "bare": replace(SMALL, decay=None, state=False),
    "packed": replace(SMALL, lengths=(20, 0, 17)),
    "normalised": replace(SMALL, normalize=True),
    "empty": replace(SMALL, length=0, normalize=True),
}


def _arguments(case, grad, save, divide):
    inputs = case.make(grad=grad)
    tensors = (*(inputs[n] for n in TENSORS), inputs["cu_seqlens"])
    return (*tensors, 0.25, case.normalize, case.normalize and divide, 16, 2, True, save)


@needs_cpu_kernels
@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(variant, divide):
    case = VARIANTS[variant]
    for grad in (True, False):
        result = torch.library.opcheck(resolve("linear_attention_cpu"), _arguments(case, grad, grad, divide))
        assert set(result.values()) == {"SUCCESS"}
    args = _arguments(case, False, True, divide)
    o, denominator, final, states = resolve("linear_attention_cpu")(*args)
    saved = (o, denominator) if args[8] else (None, None)
    dden = torch.randn_like(denominator) if case.normalize and not divide else None
    given = (torch.randn_like(o), dden, torch.randn_like(final), *args[:6], *saved, states, *args[6:11])
    assert set(torch.library.opcheck(resolve("linear_attention_cpu_backward"), given).values()) == {"SUCCESS"}


@needs_cpu_kernels
def test_opcheck_step():
    for normalize in (False, True):
        inputs = replace(SMALL, batch=2, length=1, normalize=normalize).make()
        args = (*(inputs[n] for n in TENSORS), torch.tensor([1, -1]), 0.25, normalize, normalize)
        assert set(torch.library.opcheck(resolve("linear_attention_step_cpu"), args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", [SMALL, replace(SMALL, normalize=True, per_head=True)], ids=("sum", "normalised"))
def test_compiled_fullgraph(case, backend):
    torch._dynamo.reset()
    compiled = torch.compile(on(backend), fullgraph=True, backend="aot_eager")
    for length in (37, 50):
        inputs = replace(case, length=length).make()
        expected = evaluate(on(backend), inputs)
        for name, x in evaluate(compiled, inputs).items():
            torch.testing.assert_close(x, expected[name], msg=lambda m, n=name: f"{n}: {m}")


@needs_cpu_kernels
def test_compiled_pair_and_step():
    torch._dynamo.reset()
    inputs = replace(SMALL, normalize=True).make() | {"normalize": False, "return_unnormalized": True}
    compiled = torch.compile(linear_attention, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(**inputs)[0], linear_attention(**inputs)[0], strict=True):
        torch.testing.assert_close(x, y)
    part = [inputs[n][:, :1] for n in ("q", "k", "v", "g")]
    state, expected = inputs["initial_state"].clone(), inputs["initial_state"].clone()
    step = torch.compile(linear_attention_step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        step(*part, state, normalize=True), linear_attention_step(*part, expected, normalize=True)
    )
    torch.testing.assert_close(state, expected)


@needs_cpu_kernels
def test_second_derivative_is_refused_once_and_clearly():
    inputs = SMALL.make(grad=True)
    (dq,) = torch.autograd.grad(linear_attention(**inputs)[0].sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="memattn::linear_attention_cpu has no second derivative.*backend='chunked'"):
        dq.sum().backward()


@pytest.mark.parametrize("normalize", [False, True])
def test_partial_gradients(normalize, backend, device):
    """Only what requires grad gets one, and a missing cotangent counts as zero."""
    gradients = []
    for name in (backend, "chunked"):
        inputs = replace(SMALL, normalize=normalize).make(device=device)
        inputs["v"].requires_grad_()
        linear_attention(**inputs, output_final_state=True, backend=name)[1].sum().backward()
        assert inputs["q"].grad is None
        gradients.append(inputs["v"].grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("normalize", [False, True])
def test_one_half_of_the_pair_may_be_ignored(normalize, backend, device):
    for half in (0, 1):
        gradients = []
        for name in (backend, "chunked"):
            inputs = replace(SMALL, normalize=True).make(device=device, grad=True) | {"normalize": False}
            pair, _ = linear_attention(**inputs, return_unnormalized=True, backend=name)
            gradients.append(torch.autograd.grad(pair[half].sum(), [inputs["q"], inputs["k"]]))
        for x, y in zip(*gradients, strict=True):
            assert relative_error(x, y) <= 2e-6


def test_autocast_changes_nothing(backend):
    for normalize in (False, True):
        inputs = replace(SMALL, normalize=normalize).make()
        expected, _ = on(backend)(**inputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(on(backend)(**inputs)[0], expected)


# --- errors ----------------------------------------------------------------------------------------------------------

FEW = replace(LINEAR_BASE, length=6)


def x(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


BAD = {
    "k shape": (dict(k=x(2, 6, 2, 16)), ValueError, r"k has shape \[2, 6, 2, 16\]; expected \[B, T, H, K\] = \[2, 6, 2, 32\]"),
    "v dtype": (dict(v=x(2, 6, 4, 48, dtype=torch.float16)), TypeError, "v is float16; expected float32 like q"),
    "heads": (dict(v=x(2, 6, 3, 48)), ValueError, "v has 3 heads; expected a positive multiple of q's 2 heads"),
    "g per channel": (dict(g=x(2, 6, 4, 32)), NotImplementedError, r"g has shape .*; a gate per key channel comes later, allowed: \[HV\] or \[B, T, HV\]"),
    "g per head": (dict(g=x(2)), ValueError, r"g has shape \[2\]; expected \[HV\] = \[4\]"),
    "g per token": (dict(g=x(2, 6, 2)), ValueError, r"g has shape \[2, 6, 2\]; expected \[B, T, HV\] = \[2, 6, 4\]"),
    "g positive": (dict(g=x(4) + 0.5), ValueError, "g has a value of 0.5; a natural-log decay must be ≤ 0"),
    "g dtype": (dict(g=x(4, dtype=torch.float64)), TypeError, "g is float64; expected float32 with float32 q"),
    "both": (dict(normalize=True, return_unnormalized=True), ValueError, "normalize and return_unnormalized are both True; allowed: one of them"),
    "state without z": (dict(normalize=True), ValueError, r"initial_state has shape \[2, 4, 32, 48\]; expected \[N, HV, K, V\+1\] = \[2, 4, 32, 49\]"),
    "state with z": (dict(initial_state=x(2, 4, 32, 49)), ValueError, r"initial_state has shape \[2, 4, 32, 49\]; expected \[N, HV, K, V\] = \[2, 4, 32, 48\]"),
    "state dtype": (dict(initial_state=x(2, 4, 32, 48, dtype=torch.bfloat16)), TypeError, "initial_state is bfloat16; expected float32"),
    "chunk size": (dict(chunk_size=128), ValueError, "chunk_size is 128; allowed: 16, 32, 64"),
    "batch with cu_seqlens": (dict(cu_seqlens=torch.tensor([0, 6])), ValueError, "batch size is 2 with cu_seqlens"),
    "cuda": (dict(backend="cuda"), memattn.BackendError, "linear_attention has no cuda kernel; it has: triton, cpu, chunked"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        linear_attention(**{**FEW.make(), **change})
    assert str(caught.value).startswith("linear_attention: ")


def test_bad_step_input():
    inputs = FEW.make()
    good = {n: inputs[n][:, :1] for n in ("q", "k", "v", "g")} | {"state": inputs["initial_state"]}
    pool, strided = good["state"], good["state"].transpose(2, 3).contiguous().transpose(2, 3)
    cases = {
        r"state has shape \[2, 4, 32, 48\]; expected \[P, HV, K, V\+1\]": (dict(normalize=True), ValueError),
        "state has strides": (dict(state=strided), ValueError),
        "state is bfloat16": (dict(state=pool.bfloat16()), TypeError),
        "state_indices holds 0..2": (dict(state_indices=torch.tensor([0, 2])), ValueError),
        "q has 0 tokens": ({n: good[n][:, :0] for n in ("q", "k", "v", "g")}, ValueError),
        "use linear_attention or call it under": (dict(q=good["q"].clone().requires_grad_()), RuntimeError),
    }
    for message, (change, error) in cases.items():
        before = pool.clone()
        with pytest.raises(error, match=message):
            linear_attention_step(**{**good, **change})
        assert torch.equal(pool, before), f"{message}: the state was written"
