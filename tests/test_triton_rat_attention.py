"""RAT attention on the Triton kernels of its stages: on a GPU, or on CPU tensors in the interpreter."""

# ruff: noqa: E501 (tables, one case a line)
import functools
from dataclasses import replace

import pytest
import torch
from support.compare import CEILING, assert_close_to_truth, evaluate, relative_error, to_float64
from support.rat import (
    CASES,
    CHECKS,
    CONTINUED,
    EMPTY,
    LOCAL,
    LOCAL_CASES,
    PACKED,
    assert_same_state,
    comparator,
    definition,
    flat,
    forward,
    rows,
)

import memattn
from memattn.ops import rat_attention

pytestmark = pytest.mark.usefixtures("interpreter")
op = functools.partial(rat_attention, backend="triton")
EVERY = [
    *CASES,
    *LOCAL_CASES,
    *EMPTY,
    replace(CONTINUED, name="no rows, continued", batch=0, start=()),
    replace(CONTINUED, name="nothing more at an edge", lengths=(9, 0), start=(5, 16)),
]
EXACT = (
    "base", "plus", "packed", "T8", "odd dim", "chunks of one token", "no positions", "full forgetting", "packed, continued",
    "plus, continued", "plus, dense", "plus, packed", "plus, prefix", "plus, local, packed", "continued at an edge",
    "no tokens", "no rows", "no tokens, continued", "no rows, continued", "nothing more at an edge",
)  # fmt: skip
ROUNDED = {
    torch.float32: ("base", "continued"),
    torch.bfloat16: ("plus, window and prefix", "continued"),
    torch.float16: (),
}
RELATIONS = ("head_maps_differ", "nan_propagates")


def light(case, full):
    """Small enough for the interpreter, unless the full matrices are asked for."""
    if full:
        return case
    lengths = case.lengths and tuple(min(n, 17) for n in case.lengths)
    batch = 1 if case.start is None and case.batch else case.batch
    return replace(
        case, batch=batch, length=min(case.length, 19), lengths=lengths, heads=1, value_heads=2, dim=min(case.dim, 32)
    )


@functools.cache
def truth_of(case, dtype):
    return evaluate(flat(definition), to_float64(case.make(dtype)))


@pytest.mark.parametrize("case", EVERY, ids=lambda c: c.name)
def test_float64_equals_the_definition(case, device, full):
    if device != "cpu":
        pytest.skip("float64 products have no Triton kernel on a GPU")
    if not full and case.name not in EXACT:
        pytest.skip("--full: every case, none made small for the interpreter")
    case = light(case, full)
    actual = evaluate(flat(op), case.make(torch.float64))
    for name, expected in truth_of(case, torch.float64).items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [*CASES, *LOCAL_CASES], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_within_tolerance_of_truth(case, dtype, device, full):
    if not full and case.name not in ROUNDED[dtype]:
        pytest.skip("--full: every case in float32, bfloat16 and float16")
    case = light(case, full)
    inputs, truth = case.make(dtype, device), truth_of(case, dtype)
    actual = evaluate(flat(op), inputs)
    for name, x in actual.items():
        if name != "final_state":
            assert x.dtype == (dtype if name == "o" else inputs[name.removeprefix("d")].dtype), name
    assert_close_to_truth(actual, evaluate(flat(comparator(dtype)), case.make(dtype)), truth, CEILING[dtype])


def test_gradcheck(device, full):
    if not full:
        pytest.skip("--full: gradients run against those of the definition by default")
    if device != "cpu":
        pytest.skip("float64 products have no Triton kernel on a GPU")
    case = replace(CONTINUED, length=5, heads=1, value_heads=2, chunk_size=4, start=(6, 0))
    inputs = case.make(torch.float64, grad=True)
    names = [n for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.requires_grad]

    def run(*tensors):
        return flat(op)(**{**inputs, **dict(zip(names, tensors, strict=True))})

    assert torch.autograd.gradcheck(run, [inputs[n] for n in names], fast_mode=True)


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, device, full):
    if not full and check not in RELATIONS:
        pytest.skip("--full: every relation takes the interpreter minutes")
    CHECKS[check](op, device)


@pytest.mark.parametrize(
    "case", [PACKED, replace(CONTINUED, lengths=(9, 0, 8), start=(5, 7, 16))], ids=lambda c: c.name
)
def test_every_result_is_written(case, device, full, poisoned):
    """Rows of no sequence, of which a packed layout from a state has some, reach nothing."""
    for name, x in evaluate(flat(op), light(case, full).make(device=device)).items():
        assert x.isfinite().all(), f"{name} holds memory that nobody wrote"


def test_window_split_in_two(device):
    """The prefix and the window that a state carries; going on from it is plain torch's."""
    inputs = light(LOCAL, False).make(device=device)
    whole, final = forward(functools.partial(rat_attention, backend="chunked"), inputs)
    for cut in (2, 11):
        first, state = forward(op, rows(inputs, 0, cut))
        second, last = forward(
            functools.partial(rat_attention, backend="chunked"), rows(inputs, cut, None), initial_state=state
        )
        assert relative_error(torch.cat([first, second], 1), whole) <= 2e-6
        assert_same_state(last, final, f"split at {cut}")
    with pytest.raises(memattn.BackendError, match="triton: window or prefix from a state is not supported"):
        forward(op, rows(inputs, cut, None), initial_state=state)


def test_repeats_bitwise(device):
    inputs = light(CONTINUED, False).make(torch.bfloat16, device)
    first, other = (evaluate(flat(op), inputs) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, other[name]), f"{name}: another run gives other bits"


def test_compiled_fullgraph(device):
    torch._dynamo.reset()
    inputs = replace(light(CONTINUED, False), lengths=(9, 0), start=(5, 7)).make(device=device)
    compiled = torch.compile(flat(op), fullgraph=True, backend="aot_eager")
    expected = evaluate(flat(op), inputs)
    for name, x in evaluate(compiled, inputs).items():
        torch.testing.assert_close(
            x[..., : expected[name].shape[-1]], expected[name], msg=lambda m, n=name: f"{n}: {m}"
        )
