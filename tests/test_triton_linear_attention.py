"""The Triton kernels of linear attention through the public op: on a GPU, or on CPU tensors in the interpreter."""

import functools
from dataclasses import replace

import pytest
import torch
from support.compare import CEILING, assert_close_to_truth, evaluate, relative_error, to_float64
from support.linear import FAMILIES, LINEAR_BASE, LINEAR_EMPTY, TENSORS, comparator, definition
from support.metamorphic import CHECKS

from memattn.ops import gated_delta_rule, linear_attention
from memattn.ops._library import resolve

pytestmark = pytest.mark.usefixtures("interpreter")
SMALL = replace(LINEAR_BASE, name="small", batch=1, length=37, heads=1, value_heads=2, key_dim=16, value_dim=24)
WEIGHED = replace(SMALL, name="normalised", normalize=True)
PACKED = replace(SMALL, name="packed", lengths=(17, 0, 1, 20))
DEFAULT = (
    SMALL,
    WEIGHED,
    PACKED,
    *(replace(SMALL, name=f"T{t}", length=t) for t in (1, 16, 65)),
    replace(PACKED, name="normalised, packed", normalize=True),
    replace(SMALL, name="no gate, no state", decay=None, state=False),
    replace(SMALL, name="gate per head", per_head=True, scale=0.7, batch=2),
    replace(WEIGHED, name="grouped, several blocks", heads=2, value_heads=4, key_dim=40, value_dim=72, length=20),
    replace(WEIGHED, name="normalised, no gate", decay=None, state=False),
)
FULL = (
    replace(SMALL, name="wide", length=130, key_dim=256, value_dim=128),
    replace(WEIGHED, name="normalised, wide", length=130, key_dim=128, value_dim=256),
    replace(WEIGHED, name="long", length=300, heads=2, value_heads=4),
)
op = functools.partial(linear_attention, backend="triton", chunk_size=16)


@functools.cache
def truth_of(case, dtype):
    return evaluate(definition, to_float64(case.make(dtype)))


@pytest.mark.parametrize("case", [*DEFAULT, *FULL], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_within_tolerance_of_truth(case, dtype, device, full):
    if not full and case in FULL:
        pytest.skip("--full: larger cases take the interpreter seconds each")
    inputs, truth = case.make(dtype, device), truth_of(case, dtype)
    actual, theirs = evaluate(op, inputs), evaluate(comparator(dtype, 16), inputs)
    if case.per_head:  # a handful of sums proves nothing about the ratio of two roundings
        assert relative_error(actual["dg"], truth["dg"]) <= CEILING[dtype]
        truth = {n: x for n, x in truth.items() if n != "dg"}
    assert_close_to_truth(actual, theirs, truth, CEILING[dtype])


@pytest.mark.parametrize("case", [*DEFAULT, *(c for c in LINEAR_EMPTY)], ids=lambda c: c.name)
def test_float64_equals_the_definition(case, device):
    if device != "cpu":
        pytest.skip("float64 products have no Triton kernel on a GPU")
    actual = evaluate(op, case.make(torch.float64))
    for name, expected in truth_of(case, torch.float64).items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [WEIGHED, PACKED], ids=lambda c: c.name)
def test_gradcheck(case, device):
    if device != "cpu":
        pytest.skip("float64 products have no Triton kernel on a GPU")
    lengths = None if case.lengths is None else (3, 0, 6)
    inputs = replace(case, length=17, value_heads=1, lengths=lengths, value_dim=16).make(torch.float64, grad=True)
    for pair in (False, True) if case.normalize else (False,):
        inputs["normalize"] = case.normalize and not pair

        def run(*tensors, pair=pair):
            given = {**inputs, **dict(zip(TENSORS, tensors, strict=True))}
            o, final_state = op(**given, output_final_state=True, return_unnormalized=pair)
            return (*o, final_state) if pair else (o, final_state)

        assert torch.autograd.gradcheck(run, [inputs[n] for n in TENSORS], fast_mode=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, family, device):
    CHECKS[check](functools.partial(linear_attention, backend="triton"), device, FAMILIES[family])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_numerator_and_denominator(dtype, device):
    """n / d of the pair is the normalised output; either half alone carries its gradient."""
    inputs = replace(WEIGHED, lengths=(17, 0, 3)).make(dtype, device, grad=True)
    normalised, _ = op(**inputs)
    inputs["normalize"] = False
    pair, _ = op(**inputs, return_unnormalized=True)
    assert pair.numerator.dtype == pair.denominator.dtype == torch.float32
    quotient = (pair.numerator / pair.denominator[..., None]).to(dtype)
    assert relative_error(normalised, quotient) <= torch.finfo(dtype).eps
    expected, _ = linear_attention(**inputs, return_unnormalized=True, backend="chunked")
    for ours, theirs in zip(pair, expected, strict=True):
        for name in ("q", "k"):
            x, y = (torch.autograd.grad(half.sum(), inputs[name], retain_graph=True)[0] for half in (ours, theirs))
            assert relative_error(x, y) <= (2e-6 if dtype == torch.float32 else 2e-2), name


def test_nothing_seen_gives_zero(device):
    """q·z = 0 at a token gives o = 0 there and no gradient from it."""
    inputs = replace(WEIGHED, state=False).make(device=device)
    inputs["q"][:, 20], inputs["k"][:, :3] = 0, 0
    leaves = {n: inputs[n].clone().requires_grad_() for n in ("q", "k", "v", "g")}
    o, _ = op(**{**inputs, **leaves})
    assert o.isfinite().all() and not o[:, :3].any() and not o[:, 20].any()
    (part,) = torch.autograd.grad(o[:, :3].sum() + o[:, 20].sum(), leaves["k"], retain_graph=True)
    assert not part.any()
    for gradient in torch.autograd.grad(o.sum(), list(leaves.values())):
        assert gradient.isfinite().all()


def test_equals_the_delta_rule_with_orthonormal_keys(device):
    """The engine's two uses agree where the erase term finds nothing."""
    inputs = replace(SMALL, length=48, key_dim=48, state=False).make(device=device)
    keys = torch.linalg.qr(torch.randn(1, 1, 48, 48, device=device))[0]
    inputs["k"] = keys.transpose(1, 2).contiguous()
    del inputs["normalize"]
    expected = evaluate(functools.partial(gated_delta_rule, backend="triton", chunk_size=16), inputs)
    actual = evaluate(op, inputs)
    for name in ("o", "final_state", "dq", "dv", "dg"):
        assert relative_error(actual[name], expected[name]) <= 2e-6, name


@pytest.mark.parametrize("case", [SMALL, WEIGHED], ids=lambda c: c.name)
def test_every_result_is_written(case, device, poisoned):
    inputs = replace(case, lengths=(17, 0, 20)).make(device=device)
    for name, x in evaluate(op, inputs).items():
        assert x.isfinite().all(), f"{name} holds memory that nobody wrote"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bitwise(dtype, device):
    inputs = replace(WEIGHED, lengths=(17, 0, 20)).make(dtype, device)
    first, other = (evaluate(op, inputs) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, other[name]), f"{name}: another run gives other bits"


@pytest.mark.parametrize("divide", [True, False])
def test_opcheck(divide, device):
    for case in (replace(WEIGHED, length=17),) if divide else (replace(SMALL, length=9), replace(WEIGHED, length=9)):
        inputs = case.make(device=device, grad=True)
        tensors = (*(inputs[n] for n in TENSORS), inputs["cu_seqlens"])
        args = (*tensors, 0.25, case.normalize, case.normalize and divide, 16, 2, True, True)
        assert set(torch.library.opcheck(resolve("linear_attention_triton"), args).values()) == {"SUCCESS"}
