"""A NaN of one head of one packed sequence reaches no other sequence and no other head, in results and in gradients."""

import functools

import pytest
import torch
from torch.utils import _pytree as pytree

from memattn import backends, ops

LENGTHS = (37, 0, 66, 21)
BOUNDS = torch.tensor([0, *LENGTHS]).cumsum(0)
TOKENS, SICK = sum(LENGTHS), 2  # the sequence with the NaN
DRAW = torch.Generator()


def normal(*shape):
    return torch.randn(1, TOKENS, *shape, generator=DRAW)


def gate(*shape):
    return -normal(*shape).abs() / 4


def state(*shape):
    return torch.rand(len(LENGTHS), *shape, generator=DRAW)


def linear():
    return {"q": normal(2, 16).abs(), "k": normal(2, 16).abs() / 4, "v": normal(4, 24), "g": gate(4)}


def softmax():
    return {"q": normal(4, 16), "k": normal(2, 16), "v": normal(2, 24)}


def segments():
    return {"q": normal(4, 16).abs(), "k": normal(2, 16).abs(), "v": normal(2, 24), "beta": normal(2).sigmoid()}


def sums():
    return state(2, 16, 25)


def rat():
    return {"q": normal(2, 16), "k": normal(2, 16), "v": normal(4, 16), "g": gate(4, 16)}


def scan(g, x, **settings):
    return ops.gated_scan(g, x, **settings)


def scanned():
    return {"g": gate(70), "x": normal(70), "initial_state": state(70)}


def convolve(x, **settings):
    return ops.causal_conv1d(x, torch.ones(70, 4), **settings)


FINAL = {"output_final_state": True}
CASES = {
    "gated_delta_rule": (ops.gated_delta_rule, FINAL, lambda: linear() | {"initial_state": state(4, 16, 24)}),
    "linear_attention": (ops.linear_attention, FINAL, lambda: linear() | {"initial_state": state(4, 16, 24)}),
    "normalised": (ops.linear_attention, FINAL | {"normalize": True}, linear),
    "gated_scan": (scan, FINAL, scanned),
    "causal_conv1d": (convolve, FINAL, lambda: {"x": normal(70), "initial_state": state(70, 3)}),
    "attention": (ops.attention, {}, softmax),
    "window": (ops.attention, {"window": 20}, softmax),
    "decay": (ops.attention, {}, lambda: softmax() | {"log_decay": gate(4)}),
    "delta segments": (ops.segment_memory, FINAL | {"segment_size": 16, "delta": True}, segments),
    "segments": (ops.segment_memory, FINAL | {"segment_size": 16}, lambda: segments() | {"initial_state": sums()}),
    "rat": (ops.rat_attention, {"chunk_size": 8}, rat),
    "rat plus": (ops.rat_attention, {"chunk_size": None, "dilation": 8, "window": 9, "prefix_len": 3}, rat),
}  # fmt: skip
MASKED = "plain torch masks packed sequences in one product, as attention's page says: 0 · NaN reaches the others"


def evaluate(op, inputs):
    """Results and gradients, by name."""
    leaves = {n: x.clone().requires_grad_() for n, x in inputs.items()}
    results = [x for x in pytree.tree_leaves(op(**leaves)) if isinstance(x, torch.Tensor) and x.requires_grad]
    cotangents = [torch.ones_like(x) for x in results]
    gradients = torch.autograd.grad(results, list(leaves.values()), cotangents, allow_unused=True)
    named = dict(zip((f"d{n}" for n in leaves), gradients, strict=True))
    return {f"result {i}": x for i, x in enumerate(results)} | {n: x for n, x in named.items() if x is not None}


def healthy(x):
    """[tokens or sequences, heads]: all but the first half of heads of the sick sequence; None: x has no such axes."""
    if x.shape[:2] == (1, TOKENS):
        sick = slice(int(BOUNDS[SICK]), int(BOUNDS[SICK + 1]))
        keep = torch.ones(x.shape[1:3], dtype=torch.bool)
    elif x.shape[0] == len(LENGTHS):
        sick, keep = SICK, torch.ones(x.shape[:2], dtype=torch.bool)
    else:
        return None  # rows that a state keeps
    keep[sick, : keep.shape[1] // 2] = False
    return keep


@pytest.mark.parametrize("backend", ["cpu", "chunked"])
@pytest.mark.parametrize("name", CASES)
def test_a_nan_stays_in_its_head_of_its_sequence(name, backend):
    op, settings, make = CASES[name]
    bounds = {"cu_seqlens_q" if op is ops.attention else "cu_seqlens": BOUNDS}
    if backend == "cpu" and backends.why_not("gated_delta_rule", "cpu", backends.Request("cpu", torch.float32)):
        pytest.skip("the C++ CPU kernels are not built here")
    if backend == "chunked" and op is ops.attention:
        pytest.skip(MASKED)
    op = functools.partial(op, **settings, **bounds, backend=backend)
    DRAW.manual_seed(0)
    inputs = make()
    well = evaluate(op, inputs)
    for given, x in inputs.items():
        bad = x.clone()
        (bad[0, int(BOUNDS[SICK]) + 5] if x.shape[0] == 1 else bad[SICK])[0] = torch.nan
        for result, y in evaluate(op, {**inputs, given: bad}).items():
            keep = healthy(y)
            if keep is None or result == "dlog_decay":  # summed up over all packed tokens
                continue
            flat, expected = (z.reshape(*keep.shape, -1)[keep] for z in (y, well[result]))
            assert torch.equal(flat, expected), f"a NaN in {given} reached {result} of others"
            if result == "result 0":
                assert y.isnan().any(), f"a NaN in {given} was lost"
