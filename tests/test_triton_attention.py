"""The Triton kernels of attention through the public op: on a GPU, or on CPU tensors in the interpreter."""

import functools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import relations
from support.attention import CASES, CHECKS, FLOATS, LONG, SMALL, case, evaluate, finite, judge, truth_of

from memattn.ops import attention
from memattn.ops._library import resolve
from memattn.reference.attention_mask import Mask

pytestmark = pytest.mark.usefixtures("interpreter")
op = functools.partial(attention, backend="triton")
LIGHT = [replace(c, batch=1) if c.lengths is None else c for c in CASES]
ROUNDED = ("causal", "prefix", "dilated", "decay, alibi, sink", "packed window", "tile")
IN_SECONDS = ("block-causal", "many heads", "packed", "decay", "wide", "window 2")  # the interpreter's time for one
RELATIONS = ("empty_rows", "head_maps", "keys_out_of_reach_do_not_matter", "nothing_at_all", "the_future_is_hidden",
             "inputs_unchanged_and_strided", "decay_keeps_precision")  # fmt: skip


@pytest.mark.parametrize("c", [*LIGHT, LONG], ids=lambda c: c.name)
def test_float64_equals_the_definition(c, device, full):
    if device != "cpu":
        pytest.skip("float64 products have no Triton kernel on a GPU")
    if not full and c.name in (*IN_SECONDS, "long"):
        pytest.skip("--full: cases that take the interpreter seconds each")
    truth = truth_of(c, torch.float64)
    actual = finite(evaluate(op, c.make(torch.float64)), truth)
    for name, expected in finite(truth, truth).items():
        torch.testing.assert_close(actual[name], expected, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("c", [*LIGHT, LONG], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_within_tolerance_of_truth(c, dtype, device, full):
    if not full and (c.name not in ROUNDED or dtype == torch.float32 and c.name in ("prefix", "tile")):
        pytest.skip("--full: every mask in float32 and bfloat16; in float64 they run by default")
    inputs = c.make(dtype, device)
    actual = evaluate(op, inputs)
    assert actual["o"].dtype == dtype and actual["lse"].dtype == torch.float32
    assert all(actual[f"d{n}"].dtype == inputs[n].dtype for n in inputs if n in FLOATS)
    judge(c, dtype, actual)


def test_gradcheck(device):
    if device != "cpu":
        pytest.skip("float64 products have no Triton kernel on a GPU")
    for c in (
        case("mask", {"prefix_len": 1, "window": 3}, batch=1, queries=9, sinks=2),
        case("decay", batch=1, queries=7, decay=0.5, alibi=True),
        case("packed", {"chunk_rule": ("summary", 2)}, lengths=((5, 2), (0, 0), (3, 1))),
    ):
        inputs = c.make(torch.float64)
        names = [n for n in inputs if n in FLOATS]

        def run(*tensors, inputs=inputs, names=names):
            o, lse = op(**{**inputs, **dict(zip(names, tensors, strict=True))})
            return o, lse.masked_fill(lse == -torch.inf, 0.0)

        assert torch.autograd.gradcheck(run, [inputs[n].requires_grad_() for n in names], fast_mode=True), c.name


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, device, full):
    if not full and check not in RELATIONS:
        pytest.skip("--full: every relation takes the interpreter minutes")
    CHECKS[check](op, device)


# --- tiles: the arithmetic that skips them, run alone ----------------------------------------------------------------

MASKS = [Mask(**{n: x for n, x in c.mask.items() if n not in ("head_map", "scale")}) for c in CASES]


@pytest.mark.parametrize("mask", sorted(set(MASKS), key=str), ids=str)
def test_tiles_hold_what_is_said_of_them(mask, device):
    """Both plans, tile by tile, against every pair: nothing visible outside, nothing hidden inside a whole tile."""
    import triton
    import triton.language as tl

    from memattn.kernels.attention_mask import key_tiles, row_tiles
    from memattn.ops.attention import _settings

    @triton.jit
    def plan(out, first, last, length, begin, rows, q_offset, causal, window, prefix_len, block_size, summary, dilation,
             dilated_window, dilated_prefix, BLOCK: tl.constexpr, DILATED: tl.constexpr):  # fmt: skip
        mask = (causal, window, prefix_len, block_size, summary, dilation, dilated_window, dilated_prefix)
        zero = tl.program_id(0)
        a, b, c, d, e = key_tiles(first + zero, last + zero, length + zero, mask, BLOCK, DILATED)
        f, g, h, k = row_tiles(begin + zero, rows + zero, length + zero, q_offset, 8, mask, BLOCK, BLOCK, DILATED)
        for at, x in tl.static_range(0, 1), a:
            pass

    pytest.skip("placeholder")
