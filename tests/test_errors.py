"""Bad input to the gated delta rule: one error naming the argument, what was received and what is allowed."""

from dataclasses import replace

import pytest
import torch
from support.cases import BASE

import memattn
from memattn import backends
from memattn.ops import gated_delta_rule, gated_delta_rule_step

CASE = replace(BASE, batch=2, length=6)
PACKED = replace(CASE, batch=1, state=False)


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


BAD = {
    "rank": (dict(q=x(6, 2, 32)), ValueError, r"q has shape \[6, 2, 32\] of rank 3; expected \[B, T, H, K\]"),
    "not a tensor": (dict(q=[1.0]), TypeError, "q is list; expected a torch.Tensor"),
    "k shape": (dict(k=x(2, 6, 2, 16)), ValueError, r"k has shape \[2, 6, 2, 16\]; expected \[B, T, H, K\] = \[2, 6, 2, 32\]"),
    "v length": (dict(v=x(2, 5, 4, 48)), ValueError, r"v has shape \[2, 5, 4, 48\]; expected .* = \[2, 6, 4, 48\]"),
    "heads": (dict(v=x(2, 6, 3, 48)), ValueError, "v has 3 heads; expected a positive multiple of q's 2 heads"),
    "g shape": (dict(g=x(2, 6, 2)), ValueError, r"g has shape \[2, 6, 2\]; expected \[B, T, HV\] = \[2, 6, 4\]"),
    "g per channel": (dict(g=x(2, 6, 4, 32)), NotImplementedError, "g has shape .*; a gate per key channel has no kernel yet"),
    "g positive": (dict(g=x(2, 6, 4) + 0.5), ValueError, "g has a value of 0.5; a natural-log decay must be ≤ 0"),
    "g dtype": (dict(g=x(2, 6, 4, dtype=torch.float16)), TypeError, "g is float16; expected float32 with float32 q"),
    "beta dtype": (dict(beta=x(2, 6, 4, dtype=torch.float64)), TypeError, "beta is float64; expected float32"),
    "k dtype": (dict(k=x(2, 6, 2, 32, dtype=torch.bfloat16)), TypeError, "k is bfloat16; expected float32 like q"),
    "q dtype": (dict(q=x(2, 6, 2, 32, dtype=torch.int64)), TypeError, "q is int64; expected float32 or bfloat16"),
    "v device": (dict(v=x(2, 6, 4, 48, device="meta")), ValueError, "v is on meta; expected cpu like q"),
    "state shape": (dict(initial_state=x(3, 4, 32, 48)), ValueError, r"initial_state has shape \[3, .*expected .* = \[2, 4, 32, 48\]"),
    "state dtype": (dict(initial_state=x(2, 4, 32, 48, dtype=torch.bfloat16)), TypeError, "initial_state is bfloat16; expected float32"),
    "chunk size": (dict(chunk_size=48), ValueError, "chunk_size is 48; allowed: 16, 32, 64"),
    "checkpoints": (dict(checkpoint_every=0), ValueError, "checkpoint_every is 0; expected a number of chunks ≥ 1"),
    "erase": (dict(erase=x(2, 6, 4, 32)), NotImplementedError, "erase is given; separate erase and write gates have no kernel yet"),
    "write": (dict(write=x(2, 6, 4, 48)), NotImplementedError, "write is given"),
    "previous": (dict(erase_from="previous"), NotImplementedError, "erase_from is 'previous', which has no kernel yet"),
    "erase_from": (dict(erase_from="now"), ValueError, "erase_from is 'now'; allowed: 'decayed', 'previous'"),
    "backend": (dict(backend="cudnn"), ValueError, "backend is 'cudnn'; allowed: cuda, triton, cpu, chunked"),
    "batch with cu_seqlens": (dict(cu_seqlens=torch.tensor([0, 6])), ValueError, "batch size is 2 with cu_seqlens"),
}  # fmt: skip
BAD_PACKED = {
    "falls": (torch.tensor([0, 4, 2, 6]), ValueError, "cu_seqlens falls from 4 to 2 at entry 2; it must not decrease"),
    "end": (torch.tensor([0, 5]), ValueError, "cu_seqlens runs from 0 to 5; expected from 0 to T = 6"),
    "start": (torch.tensor([1, 6]), ValueError, "cu_seqlens runs from 1 to 6"),
    "dtype": (torch.tensor([0.0, 6.0]), TypeError, "cu_seqlens is float32; expected int32 or int64"),
    "rank": (torch.tensor([[0, 6]]), ValueError, r"cu_seqlens has shape \[1, 2\] of rank 2; expected \[N\+1\]"),
    "short": (torch.tensor([0]), ValueError, "cu_seqlens has 1 entries; expected N\\+1 ≥ 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        gated_delta_rule(**{**CASE.make(), **change})
    assert str(caught.value).startswith("gated_delta_rule: ")


@pytest.mark.parametrize("size", [8, 257])
def test_head_dimension(size):
    case = replace(CASE, key_dim=size)
    with pytest.raises(ValueError, match=f"head dimension K is {size}; allowed: 16..256"):
        gated_delta_rule(**case.make())
    with pytest.raises(ValueError, match=f"head dimension V is {size}; allowed: 16..256"):
        gated_delta_rule(**replace(CASE, value_dim=size).make())


@pytest.mark.parametrize("name", BAD_PACKED)
def test_bad_cu_seqlens(name):
    bounds, error, message = BAD_PACKED[name]
    with pytest.raises(error, match=message):
        gated_delta_rule(**{**PACKED.make(), "cu_seqlens": bounds})


def _step_inputs():
    inputs = CASE.make()
    part = {n: inputs[n][:, :1] for n in ("q", "k", "v", "g", "beta")}
    return {**part, "state": inputs["initial_state"]}


def test_bad_step_input():
    good = _step_inputs()
    pool = good["state"]
    cases = {
        "state has shape": (dict(state=pool[:1]), ValueError),
        "state has strides": (dict(state=pool.transpose(2, 3).contiguous().transpose(2, 3)), ValueError),
        "state is bfloat16": (dict(state=pool.bfloat16()), TypeError),
        r"state_indices has shape \[3\]": (dict(state_indices=torch.tensor([0, 1, 1])), ValueError),
        r"state_indices holds 0..2; allowed: -1 \(padding\)..1": (
            dict(state_indices=torch.tensor([0, 2])),
            ValueError,
        ),
        "state_indices holds -2..0": (dict(state_indices=torch.tensor([-2, 0])), ValueError),
        "q has 0 tokens": ({n: good[n][:, :0] for n in ("q", "k", "v", "g", "beta")}, ValueError),
        "an input requires grad; the step is for inference only": (
            dict(q=good["q"].clone().requires_grad_()),
            RuntimeError,
        ),
    }
    for message, (change, error) in cases.items():
        before = pool.clone()
        with pytest.raises(error, match=message):
            gated_delta_rule_step(**{**good, **change})
        assert torch.equal(pool, before), f"{message}: the state was written"


def test_named_backend_that_cannot_serve_lists_every_reason():
    with pytest.raises(memattn.BackendError) as caught:
        gated_delta_rule(**CASE.make(), backend="cuda")
    text = str(caught.value)
    assert "received: q float32 [2, 6, 2, 32] on cpu" in text
    assert "cuda: gated_delta_rule has no cuda kernel; it has: triton, cpu, chunked" in text
    assert "fix: use backend=" in text


def test_backend_without_backward_refuses_gradients(monkeypatch):
    limits = replace(backends.registry()["gated_delta_rule"]["chunked"], features=frozenset({"packed"}))
    monkeypatch.setitem(backends.registry()["gated_delta_rule"], "chunked", limits)
    with pytest.raises(memattn.BackendError, match="chunked: backward is not supported, supported: packed"):
        gated_delta_rule(**CASE.make(grad=True), backend="chunked")


def test_use_backend_nests_and_restores():
    inputs = CASE.make()
    with memattn.use_backend("chunked"):
        with pytest.raises(memattn.BackendError), memattn.use_backend(["cuda"]):
            gated_delta_rule(**inputs)
        gated_delta_rule(**inputs)
    with pytest.raises(ValueError, match="use_backend: backend is 'gpu'; allowed: cuda, triton, cpu, chunked"):
        with memattn.use_backend("gpu"):
            pass
    assert gated_delta_rule(**inputs)[0].shape == inputs["v"].shape


def test_fallback_warns_once_with_its_cause(monkeypatch):
    limits = replace(backends.registry()["gated_delta_rule"]["cpu"], available=lambda device: "it was taken away")
    monkeypatch.setitem(backends.registry()["gated_delta_rule"], "cpu", limits)
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(UserWarning, match="runs in plain torch .* cpu: it was taken away") as caught:
        gated_delta_rule(**CASE.make())
        gated_delta_rule(**CASE.make())
    assert len(caught) == 1


def test_checks_remembered_for_one_call_do_not_pass_another():
    inputs = CASE.make()
    gated_delta_rule(**inputs)
    with pytest.raises(ValueError, match="g has a value of 0.25; a natural-log decay must be ≤ 0"):
        gated_delta_rule(**{**inputs, "g": inputs["g"].abs() * 0 + 0.25})
    with pytest.raises(ValueError, match="chunk_size is 8"):
        gated_delta_rule(**inputs, chunk_size=8)
    nan = inputs["g"].clone()
    nan[0, 0, 0] = float("nan")
    assert gated_delta_rule(**{**inputs, "g": nan})[0].isnan().any(), "a NaN gate is data: it propagates"
    nan[0, 1, 0] = 2.0
    with pytest.raises(ValueError, match="g has a value of 2"):
        gated_delta_rule(**{**inputs, "g": nan})
