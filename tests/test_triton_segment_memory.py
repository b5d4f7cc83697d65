"""The Triton kernels of segment memory through the public op: on a GPU, or on CPU tensors in the interpreter."""

import functools
from dataclasses import replace

import pytest
import torch
from support.compare import CEILING, assert_close_to_truth, evaluate, relative_error, to_float64
from support.segments import (
    ARMT,
    CASES,
    CHECKS,
    EMPTY,
    INFINI,
    PACKED,
    RULE,
    TENSORS,
    comparator,
    definition,
    planted,
)

from memattn.ops import segment_memory
from memattn.ops._library import resolve

pytestmark = pytest.mark.usefixtures("interpreter")
op = functools.partial(segment_memory, backend="triton")
# Small enough for the interpreter; PACKED has a boundary inside a tile and sequences of no and of one token.
LIGHT = replace(
    INFINI, name="light", batch=1, length=37, heads=2, key_heads=1, key_dim=16, value_dim=24, beta=True, correction=True
)
LIGHT_PACKED = replace(LIGHT, name="light, packed", lengths=(17, 0, 1, 20), correction=False)
MAIN = (
    LIGHT,
    LIGHT_PACKED,
    *(replace(LIGHT, name=f"T{t}", length=t) for t in (1, 16)),
    replace(LIGHT_PACKED, name="packed, other keys", key_lengths=(5, 9, 0, 12), key_segment_size=8),
    replace(LIGHT, name="from empty, no eps", beta=False, correction=False, state=False, eps=0.0),
    replace(LIGHT, name="additive, undivided", delta=False, normalize=False, correction=False),
    replace(LIGHT, name="undivided", beta=False, normalize=False, correction=False),
    replace(LIGHT, name="additive, corrected", delta=False, beta=False),
    replace(LIGHT, name="a set", delta=False, causal=False, correction=False),
    replace(LIGHT, name="a set, delta", causal=False, heads=1),
    replace(LIGHT, name="one token a segment", length=3, segment_size=1),
    replace(LIGHT, name="several blocks", length=70, heads=1, key_dim=40, value_dim=70, segment_size=50),
    replace(LIGHT_PACKED, name="long segments", segment_size=18, lengths=(19, 0, 21)),
    replace(LIGHT, name="more queries than segments", length=40, key_length=12, segment_size=8),
    replace(LIGHT, name="writes alone", length=0, key_length=17),
    replace(LIGHT, name="reads alone", key_length=0),
)
LONGER = (
    *(replace(c, name=f"full: {c.name}") for c in CASES),
    *(replace(c, name=f"full: {c.name}") for c in EMPTY[1:]),
)
EXACT = (
    "light", "light, packed", "several blocks", "packed, other keys", "from empty, no eps", "additive, undivided",
    "additive, corrected", "a set, delta", "one token a segment", "long segments", "more queries than segments",
    "writes alone", "reads alone", "no tokens",
)  # fmt: skip
ROUNDED = {
    torch.float32: ("light", "long segments"),
    torch.bfloat16: ("light", "long segments", "a set"),
    torch.float16: (),
}
RELATIONS = ("reads_before_it_writes", "an_empty_memory_reads_zero")


@functools.cache
def truth_of(case, dtype):
    return evaluate(definition, to_float64(case.make(dtype)))


@pytest.mark.parametrize("case", [*MAIN, EMPTY[0], *LONGER], ids=lambda c: c.name)
def test_float64_equals_the_definition(case, device, full):
    if device != "cpu":
        pytest.skip("float64 products have no Triton kernel on a GPU")
    if not full and case.name not in EXACT:
        pytest.skip("--full: every case takes the interpreter minutes")
    actual = evaluate(op, case.make(torch.float64))
    for name, expected in truth_of(case, torch.float64).items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [*MAIN, INFINI, ARMT, PACKED], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_within_tolerance_of_truth(case, dtype, device, full):
    if not full and case.name not in ROUNDED[dtype]:
        pytest.skip("--full: every case in every dtype takes the interpreter minutes")
    inputs, truth = case.make(dtype, device), truth_of(case, dtype)
    actual = evaluate(op, inputs)
    assert {n: x.dtype for n, x in actual.items() if n[0] == "d"} == {
        f"d{n}": x.dtype for n, x in inputs.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    if case.length < 20:  # a handful of values proves nothing about two roundings
        for name, x in truth.items():
            assert relative_error(actual[name], x) <= CEILING[dtype], name
    else:
        assert_close_to_truth(actual, evaluate(comparator(dtype), inputs), truth, CEILING[dtype])


@pytest.mark.parametrize(
    "case",
    [
        replace(LIGHT, length=9, segment_size=4, correction=False),
        replace(LIGHT_PACKED, lengths=(3, 0, 5), key_lengths=(4, 2, 3), segment_size=3, causal=False, heads=1),
    ],
    ids=["delta", "packed set"],
)
def test_gradcheck(case, device, full):
    """Without correction, whose gradient is left out on purpose."""
    if not full:
        pytest.skip("--full: gradients run against those of the definition by default")
    if device != "cpu":
        pytest.skip("float64 products have no Triton kernel on a GPU")
    inputs = case.make(torch.float64, grad=True)

    def run(*tensors):
        return op(**{**inputs, **dict(zip(TENSORS, tensors, strict=True))}, output_final_state=True)

    assert torch.autograd.gradcheck(run, [inputs[n] for n in TENSORS], fast_mode=True)


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, device, full):
    if not full and check not in RELATIONS:
        pytest.skip("--full: relations that take the interpreter many seconds each")
    CHECKS[check](op, device)


@pytest.mark.parametrize("case", [LIGHT, LIGHT_PACKED], ids=lambda c: c.name)
def test_every_result_is_written(case, device, poisoned):
    for name, x in evaluate(op, case.make(device=device)).items():
        assert x.isfinite().all(), f"{name} holds memory that nobody wrote"


def test_repeats_bitwise(device):
    inputs = LIGHT.make(torch.bfloat16, device)
    first, other = (evaluate(op, inputs) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, other[name]), f"{name}: another run gives other bits"


class Counted:
    """Stands for a kernel; launching it only counts."""

    def __init__(self, launches):
        self.launches = launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append(grid)


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("size", [8, 40])
def test_launches_do_not_depend_on_the_number_of_segments(size, correction, monkeypatch):
    from memattn.kernels import segment_memory as forward
    from memattn.kernels import segment_memory_backward as backward

    launches: list = []
    for module in (forward, backward):
        for name in vars(module).copy():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Counted(launches))
    counts = []
    for segments in (1, 500):
        launches.clear()
        q, k, v = (torch.empty(1, size * segments, 2, 32, dtype=torch.bfloat16, device="meta") for _ in range(3))
        inputs, settings = (q, k, v, None, None, None, None), (size, size, True, True, correction, True, 1e-5)
        o, final_state, table = forward.forward(*inputs, *settings)
        written = len(launches)
        backward.backward(o, final_state, *inputs, o, table, *settings)
        counts.append((written, len(launches) - written))
    long = size > 32  # one more launch in each direction where A is made
    assert counts[0] == counts[1] == (6 - correction + long, 9 + long)


@pytest.mark.parametrize("bug", ["eps left out", "causal ignored", "beta enters the normaliser", "correction ignored"])
def test_a_wrong_form_is_far_from_the_kernels(bug, device):
    """The kernels are as far from a fallback with one wrong line as the definition is: the cases can tell."""
    case = replace(LIGHT, causal=bug != "causal ignored", eps=0.3)
    inputs = case.make(torch.float32, device)
    actual, wrong = evaluate(op, inputs, grad=False), evaluate(planted(bug), inputs, grad=False)
    assert max(relative_error(wrong[n], x) for n, x in actual.items()) > 1e-3


@pytest.mark.parametrize(
    "case", [replace(LIGHT, length=3, segment_size=2, heads=1, value_dim=16), EMPTY[0]], ids=lambda c: c.name
)
def test_opcheck(case, device):
    for grad in (True, False) if case.length == 0 else (True,):
        inputs = case.make(device=device, grad=grad)
        args = (*(inputs[n] for n in TENSORS), None, None, case.segment_size, case.segment_size)
        args = (*args, *(inputs[n] for n in RULE[2:]))
        assert set(torch.library.opcheck(resolve("segment_memory_triton"), args).values()) == {"SUCCESS"}
    o, final_state, table = resolve("segment_memory_triton")(*args)
    args = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in args)
    given = (torch.randn_like(o), torch.randn_like(final_state), *args[:7], o.detach(), table, *args[7:])
    assert set(torch.library.opcheck(resolve("segment_memory_triton_backward"), given).values()) == {"SUCCESS"}
