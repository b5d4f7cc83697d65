"""The public op on every backend of this machine: truth, tolerance, relations, planted bugs."""

import functools
from dataclasses import replace

import pytest
import torch
from support.cases import BASE, CASES, EMPTY, by_name
from support.compare import CEILING, assert_draws_close_to_truth, evaluate, to_float64
from support.metamorphic import CHECKS, run_all
from support.planted import BUGS, planted

from memattn import backends
from memattn.ops import gated_delta_rule, gated_delta_rule_step
from memattn.reference import gated_delta_rule as reference

ABLE = ("cpu", "chunked")
DRAWS = 6
# Conditioning, not the kernel, sets the error when β‖k‖² nears 2 or keys are nearly parallel: ceilings per case.
CASE_CEILING = {("correlated_keys", torch.float32): 2e-5, ("negative_eigenvalues", torch.float32): 2e-5,
                ("correlated_keys", torch.bfloat16): 6e-2, ("negative_eigenvalues", torch.bfloat16): 6e-2,
                ("correlated_keys", torch.float16): 1e-2, ("negative_eigenvalues", torch.float16): 1e-2}  # fmt: skip


@pytest.fixture(params=ABLE)
def backend(request, device):
    """Each backend that can run here; the others are skipped with their reason."""
    name = "triton" if device == "cuda" and request.param == "cpu" else request.param
    need = backends.Request(device, torch.float32, features=frozenset({"backward", "packed"}))
    reasons = backends.why_not("gated_delta_rule", name, need)
    if reasons:
        pytest.skip(f"{name}: {'; '.join(reasons)}")
    return name


@functools.cache
def truth_of(name, dtype, seed):
    case = by_name(name)
    return evaluate(reference.loop, to_float64(case.make(dtype, seed=seed)))


def _dtypes(case):
    return (
        (torch.float32, torch.bfloat16, torch.float16)
        if case in (BASE, by_name("packed"))
        else (torch.float32, torch.bfloat16)
    )


@pytest.mark.parametrize(
    "case,dtype", [(c, d) for c in CASES for d in _dtypes(c)], ids=lambda x: getattr(x, "name", str(x))
)
def test_within_tolerance_of_truth(case, dtype, backend, device):
    op = functools.partial(gated_delta_rule, backend=backend)
    comparator = functools.partial(reference.chunked, operand_dtype=None if dtype == torch.float32 else dtype)

    def draw(seed):
        inputs, truth = case.make(dtype, device, seed), truth_of(case.name, dtype, seed)
        # Where everything is forgotten dg vanishes as a difference of terms the size of dbeta: judged on that scale.
        scales = {"dg": truth["dbeta"].norm().item()} if (case.decay or 0) > 30 else {}
        return evaluate(op, inputs), evaluate(comparator, inputs), truth, scales

    ceiling = CASE_CEILING.get((case.name, dtype), CEILING[dtype])
    assert_draws_close_to_truth(map(draw, range(DRAWS)), ceiling)


@pytest.mark.parametrize("case", [*CASES[:12], *EMPTY], ids=lambda c: c.name)
def test_float64(case, backend, device):
    if device != "cpu" and backend != "chunked":
        pytest.skip(f"{backend} has no float64 on {device}")
    inputs = case.make(torch.float64, device)
    actual, truth = (
        evaluate(functools.partial(gated_delta_rule, backend=backend), inputs),
        evaluate(reference.loop, inputs),
    )
    for name, expected in truth.items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("lengths", [None, (3, 0, 18)])
def test_gradcheck(backend, device, lengths):
    if device != "cpu" and backend != "chunked":
        pytest.skip(f"{backend} has no float64 on {device}")
    case = replace(BASE, batch=1, length=21, lengths=lengths, heads=1, value_heads=2, key_dim=16, value_dim=16)
    inputs = case.make(torch.float64, device, grad=True)
    names = ("q", "k", "v", "g", "beta", "initial_state")

    def op(*tensors):
        rest = {n: x for n, x in inputs.items() if n not in names}
        return gated_delta_rule(
            **dict(zip(names, tensors, strict=True)), **rest, output_final_state=True, chunk_size=16, backend=backend
        )

    assert torch.autograd.gradcheck(op, [inputs[n] for n in names], fast_mode=True)


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, backend, device):
    CHECKS[check](functools.partial(gated_delta_rule, backend=backend), device)


@pytest.mark.parametrize("every", [2, 3, 64])
def test_checkpoints_do_not_change_gradients(backend, device, every):
    inputs = replace(BASE, length=300).make(device=device)
    op = functools.partial(gated_delta_rule, backend=backend, chunk_size=16)
    expected = evaluate(functools.partial(op, checkpoint_every=1), inputs)
    for name, x in evaluate(functools.partial(op, checkpoint_every=every), inputs).items():
        torch.testing.assert_close(x, expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    failures = {name: reason for name, reason in run_all(planted(bug)).items() if reason}
    assert failures, f"no check noticed: {bug}"


def test_reference_passes_every_relation():
    assert {name: reason for name, reason in run_all(reference.chunked).items() if reason} == {}


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_continues_prefill(tokens, dtype, device):
    case = replace(BASE, length=40)
    inputs = case.make(dtype, device)
    truth, final = reference.loop(**to_float64(inputs), output_final_state=True)
    state = inputs["initial_state"].clone()
    outputs = []
    for t in range(0, case.length, tokens):
        part = {n: inputs[n][:, t : t + tokens] for n in ("q", "k", "v", "g", "beta")}
        outputs.append(gated_delta_rule_step(**part, state=state, qk_l2norm=True))
    error = (torch.cat(outputs, 1).double().cpu() - truth).norm() / truth.norm()
    assert error <= (5e-6 if dtype == torch.float32 else 4e-3), f"output error {error:.3g}"
    assert (state.double().cpu() - final).norm() / final.norm() <= 5e-6


def test_step_pool_rows_and_padding(device):
    case = replace(BASE, batch=3, length=2)
    inputs = case.make(device=device)
    pool = torch.randn(
        5, case.value_heads, case.key_dim, case.value_dim, generator=torch.Generator().manual_seed(3)
    ).to(device)
    rows = torch.tensor([4, -1, 0], device=device)
    before = pool.clone()
    part = {n: inputs[n] for n in ("q", "k", "v", "g", "beta")}
    o = gated_delta_rule_step(**part, state=pool, state_indices=rows, qk_l2norm=True)
    picked = {n: x[[0, 2]] for n, x in part.items()}
    expected, final = reference.loop(
        **to_float64({**picked, "initial_state": before[[4, 0]]}), qk_l2norm=True, output_final_state=True
    )
    torch.testing.assert_close(o[[0, 2]].double().cpu(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pool[[4, 0]].double().cpu(), final, rtol=1e-5, atol=1e-5)
    assert not o[1].any(), "a padding row gave an output"
    assert torch.equal(pool[1:4], before[1:4]), "a row that no index names was written"


@pytest.mark.parametrize("backend_name", ["cpu", "chunked"])
def test_step_backends_agree_on_options(backend_name, device):
    if device != "cpu" and backend_name == "cpu":
        pytest.skip("the cpu backend takes CPU tensors only")
    if reasons := backends.why_not("gated_delta_rule_step", backend_name, backends.Request(device, torch.float32)):
        pytest.skip("; ".join(reasons))
    for options in ({"g": None}, {"beta": None}, {"scale": 0.3}, {"qk_l2norm": True}, {"g": None, "beta": None}):
        inputs = replace(BASE, batch=2, length=1, qk_l2norm=False, beta=0.02).make(torch.float64, device)
        part = {n: inputs[n] for n in ("q", "k", "v", "g", "beta")} | options
        state = inputs["initial_state"].clone()
        o = gated_delta_rule_step(**part, state=state, backend=backend_name)
        expected, final = reference.loop(**part, initial_state=inputs["initial_state"], output_final_state=True)
        torch.testing.assert_close(o, expected)
        torch.testing.assert_close(state, final)
