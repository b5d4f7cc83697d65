"""Registration of the gated delta rule: opcheck, fullgraph compile, no second derivative, no state aliasing."""

import functools
from dataclasses import replace

import pytest
import torch
from support.cases import BASE
from support.compare import evaluate

from memattn import _native, backends
from memattn.ops import gated_delta_rule, gated_delta_rule_step
from memattn.ops._library import resolve

CASE = replace(BASE, batch=1, length=37, key_dim=16, value_dim=24)
pytestmark = pytest.mark.skipif(
    backends.why_not("gated_delta_rule", "cpu", backends.Request("cpu", torch.float32)) != [],
    reason="the C++ CPU kernels are not built here",
)


def _arguments(case, grad, save=True, **change):
    inputs = {**case.make(grad=grad), **change}
    names = ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens")
    return (*(inputs[n] for n in names), 0.25, True, 16, 2, True, save)


VARIANTS = {
    "full": (CASE, {}),
    "bare": (CASE, {"g": None, "beta": None, "initial_state": None}),
    "packed": (replace(CASE, lengths=(20, 0, 17)), {}),
    "empty": (replace(CASE, length=0), {}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_forward(variant):
    case, change = VARIANTS[variant]
    for grad in (True, False):
        result = torch.library.opcheck(resolve("gated_delta_rule_cpu"), _arguments(case, grad, grad, **change))
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_backward(variant):
    case, change = VARIANTS[variant]
    args = _arguments(case, False, **change)
    o, final, solve, states = resolve("gated_delta_rule_cpu")(*args)
    do, dfinal = torch.randn_like(o), torch.randn_like(final)
    result = torch.library.opcheck(
        resolve("gated_delta_rule_cpu_backward"), (do, dfinal, *args[:7], solve, states, *args[7:11])
    )
    assert set(result.values()) == {"SUCCESS"}


def test_opcheck_step():
    inputs = replace(CASE, batch=2, length=1).make()
    args = (
        *(inputs[n] for n in ("q", "k", "v", "g", "beta")),
        inputs["initial_state"],
        torch.tensor([1, -1]),
        0.25,
        True,
    )
    assert set(torch.library.opcheck(resolve("gated_delta_rule_step_cpu"), args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_fullgraph(compiler):
    torch._dynamo.reset()
    compiled = torch.compile(gated_delta_rule, fullgraph=True, backend=compiler)
    for case in (CASE, replace(CASE, length=50)):
        inputs = case.make()
        expected = evaluate(gated_delta_rule, inputs)
        for name, x in evaluate(compiled, inputs).items():
            torch.testing.assert_close(x, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_compiled_step_mutates_the_state():
    torch._dynamo.reset()
    inputs = replace(CASE, batch=2, length=1).make()
    part = {n: inputs[n] for n in ("q", "k", "v", "g", "beta")}
    expected_state, state = inputs["initial_state"].clone(), inputs["initial_state"].clone()
    expected = gated_delta_rule_step(**part, state=expected_state)
    o = torch.compile(gated_delta_rule_step, fullgraph=True, backend="aot_eager")(**part, state=state)
    torch.testing.assert_close(o, expected)
    torch.testing.assert_close(state, expected_state)
    assert not torch.equal(state, inputs["initial_state"])


def test_the_first_call_of_all_may_be_compiled(monkeypatch):
    """Kernels for another device are not loaded to find that they are for another device."""
    monkeypatch.delitem(_native._reasons, "_C_cuda", raising=False)
    torch._dynamo.reset()
    inputs = replace(CASE, batch=2, length=1).make()
    part = {n: inputs[n] for n in ("q", "k", "v", "g", "beta")}
    torch.compile(gated_delta_rule_step, fullgraph=True, backend="aot_eager")(**part, state=inputs["initial_state"])


def test_activation_checkpointing():
    inputs = CASE.make()

    def recomputed(**kwargs):
        return torch.utils.checkpoint.checkpoint(functools.partial(gated_delta_rule, **kwargs), use_reentrant=False)

    expected = evaluate(gated_delta_rule, inputs)
    for name, x in evaluate(recomputed, inputs).items():
        assert torch.equal(x, expected[name]), name


def test_second_derivative_is_refused_once_and_clearly():
    inputs = CASE.make(grad=True)
    o, _ = gated_delta_rule(**inputs)
    (dq,) = torch.autograd.grad(o.sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="memattn::gated_delta_rule_cpu has no second derivative.*backend='chunked'"):
        dq.sum().backward()


def test_partial_gradients():
    """Only what requires grad gets one, and a missing cotangent counts as zero."""
    inputs = CASE.make()
    inputs["v"].requires_grad_()
    _, final = gated_delta_rule(**inputs, output_final_state=True)
    final.sum().backward()
    expected = CASE.make()
    expected["v"].requires_grad_()
    gated_delta_rule(**expected, output_final_state=True, backend="chunked")[1].sum().backward()
    torch.testing.assert_close(inputs["v"].grad, expected["v"].grad)
    assert inputs["q"].grad is None


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
def test_autocast_changes_nothing(backend):
    inputs = CASE.make()
    expected, _ = gated_delta_rule(**inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, _ = gated_delta_rule(**inputs, backend=backend)
    assert torch.equal(o, expected)
