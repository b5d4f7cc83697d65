"""slot_write over attention's Triton kernels: on a GPU, or on CPU tensors in the interpreter."""

import functools
from dataclasses import replace

import pytest
import torch
from support.slots import CASES, CHECKS, SMALL, TENSORS, Case, evaluate, judge, truth_of

from memattn.ops import slot_write

pytestmark = pytest.mark.usefixtures("interpreter")
op = functools.partial(slot_write, backend="triton")
IN_SECONDS = ("wide", "many slots", "many slots, all")
ROUNDED = {torch.float32: ("small", "lengths, all"), torch.bfloat16: ("all", "packed"), torch.float16: ()}
RELATIONS = ("every_token_of_its_sequence_counts_and_no_other", "permuted_slots_give_permuted_updates")
DRAWS = 6
FEW = replace(SMALL, tokens=20, slots=3)


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
def test_float64_equals_the_definition(c, device, full):
    if device != "cpu":
        pytest.skip("float64 products have no Triton kernel on a GPU")
    if not full and c.name in IN_SECONDS:
        pytest.skip("--full: cases that take the interpreter seconds each")
    truth = truth_of(c, torch.float64)
    for name, x in evaluate(op, c.make(torch.float64)).items():
        torch.testing.assert_close(x, truth[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_within_tolerance_of_truth(c, dtype, device, full):
    if not full and c.name not in ROUNDED[dtype]:
        pytest.skip("--full: every case in every dtype; in float64 they run by default")
    several = DRAWS if c.name == "small" else 1  # five slots: one large weight's rounding is most of an error
    actual = [evaluate(op, c.make(dtype, device, seed)) for seed in range(several)]
    assert actual[0]["o"].dtype == dtype and actual[0]["lse"].dtype == torch.float32
    assert all(actual[0][f"d{n}"].dtype == dtype for n in TENSORS if f"d{n}" in actual[0])
    judge(c, dtype, *actual)


@pytest.mark.parametrize("c", [Case("", 1, 2, 4), Case("", 1, 2, 4, see="all"), Case("", lengths=(3, 0), packed=True)])
def test_gradcheck(c, device, full):
    if not full and not c.packed:
        pytest.skip("--full: gradients run against those of the definition by default")
    if device != "cpu":
        pytest.skip("float64 products have no Triton kernel on a GPU")
    inputs = c.make(torch.float64, device)
    leaves = [inputs[n].requires_grad_() for n in TENSORS]

    def run(*tensors):
        return tuple(op(**{**inputs, **dict(zip(TENSORS, tensors, strict=True))}))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, device, full):
    if not full and check not in RELATIONS:
        pytest.skip("--full: relations that take the interpreter many seconds each")
    CHECKS[check](op, device)


@pytest.mark.parametrize("c", [replace(FEW, lengths=(20, 7, 0)), replace(FEW, see="all")], ids=["lengths", "all"])
def test_every_result_is_written(c, device, poisoned):
    for name, x in evaluate(op, c.make(device=device)).items():
        assert x.isfinite().all(), f"{name} holds memory that nobody wrote"


def test_repeats_bitwise(device):
    inputs = replace(FEW, see="all", lengths=(20, 0)).make(torch.bfloat16, device)
    first, other = evaluate(op, inputs), evaluate(op, inputs)
    assert all(torch.equal(x, other[name]) for name, x in first.items())


def test_compiled_fullgraph(device):
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    inputs = replace(FEW, lengths=(20, 3), see="all").make(device=device)
    expected = evaluate(op, inputs)
    for name, x in evaluate(compiled, inputs).items():
        torch.testing.assert_close(x, expected[name], msg=lambda m, n=name: f"{n}: {m}")
