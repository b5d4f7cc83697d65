"""The Triton kernels of attention through the public op: on a GPU, or on CPU tensors in the interpreter."""

# ruff: noqa: E501 (tables, one case a line)

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
FAR = case("dilated far", {"chunk_rule": ("dilated", 6, 4, 5)}, batch=1, queries=150)  # whole tiles of gathered keys
PIECES = case(
    "in pieces", batch=1, queries=40, key_dim=72, value_dim=40, decay=0.1, sinks=0
)  # of 32 columns, the last of 8
LIGHT = [FAR, PIECES, *(replace(c, batch=1) if c.lengths is None else c for c in CASES)]
ROUNDED = ("causal", "prefix", "dilated", "decay, alibi, sink", "packed window", "tile")
IN_SECONDS = (
    "block-causal",
    "merge, decay",
    "many heads",
    "packed",
    "decay",
    "wide",
    "window 2",
)  # the interpreter's time for one
RELATIONS = ("empty_rows", "head_maps", "keys_out_of_reach_do_not_matter", "nothing_at_all")


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


@pytest.mark.parametrize("c", [*CASES, LONG], ids=lambda c: c.name)
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


@pytest.mark.parametrize(
    "c", [SMALL, case("decay", lengths=((17, 20), (0, 3), (3, 9)), decay=0.1)], ids=lambda c: c.name
)
def test_every_result_is_written(c, device, poisoned):
    for name, x in evaluate(op, replace(c, batch=1, sinks=0).make(device=device)).items():
        assert x.isfinite().all(), f"{name} holds memory that nobody wrote"


def test_repeats_bitwise(device):
    inputs = replace(SMALL, batch=1).make(torch.bfloat16, device)
    relations.assert_same(*(evaluate(op, inputs).values() for _ in range(2)), "another run gives other bits")


# --- tiles: the arithmetic that skips them, alone --------------------------------------------------------------------

BLOCK, ROWS, KEYS = 8, 40, 60
MASKS = {c.name: c.mask for c in CASES if c.mask and not {"head_map", "scale"} & set(c.mask) and "end" not in c.name}


@pytest.mark.parametrize("name", MASKS)
def test_tiles_hold_what_is_said_of_them(name, device):
    """Both plans against every pair: nothing is seen outside of the tiles visited, and all inside of the whole ones."""
    from support.attention_plans import plans

    mask = Mask(**MASKS[name])
    i, j = torch.arange(ROWS)[:, None] + mask.q_offset, torch.arange(KEYS)
    seen = torch.zeros(ROWS, 64, dtype=torch.bool)  # padded to whole tiles: what is not there is not seen
    seen[:, :KEYS] = mask.visible(i, j)
    dilated = mask.chunk_rule[1] if mask.chunk_rule and mask.chunk_rule[0] == "dilated" else 0
    grid = (torch.arange(64) + 1) % dilated == 0 if dilated else torch.zeros(64, dtype=torch.bool)
    by_keys, by_rows = plans(mask, ROWS, KEYS, BLOCK, device)
    for first, (a, b, c, d, e) in zip(range(0, ROWS, BLOCK), by_keys, strict=True):
        part = seen[first : first + BLOCK].clone()
        part[:, : a * BLOCK] = part[:, b * BLOCK : c * BLOCK] = part[:, d * BLOCK : e * BLOCK] = False
        whole = part[:, c * BLOCK : d * BLOCK]
        if dilated:
            assert not whole[:, ~grid[c * BLOCK : d * BLOCK]].any(), "a gathered tile hides a key that is seen"
        else:
            assert whole.all(), "a whole tile has a key that is not seen"
        part[:, c * BLOCK : d * BLOCK] = False
        assert not part.any(), "a key that is seen lies in no tile"
    for begin, (b, c, d, e) in zip(range(0, 64, BLOCK), by_rows, strict=True):
        part = seen[:, begin : begin + BLOCK].clone()
        assert part[c * BLOCK : d * BLOCK].all(), "a whole tile has a row that does not see a key"
        part[b * BLOCK : e * BLOCK] = False
        assert not part.any(), "a row that sees a key lies in no tile"


def test_far_tiles_are_skipped():
    """What a window, a block or dilation leaves is what is visited: work grows with the window, not with T."""
    from support.attention_plans import plans

    for mask, most in (
        (Mask(window=8), 2),
        (Mask(window=8, prefix_len=3), 3),
        (Mask(block_size=8), 1),
        (Mask(chunk_rule=("dilated", 30, 8, 3)), 3),  # besides the gathered keys
    ):
        by_keys, by_rows = plans(mask, 160, 160, 8, "cpu")
        dilated = mask.chunk_rule is not None
        assert max(a + (e - b) - (d - c if dilated else 0) for a, b, c, d, e in by_keys) <= most
        assert sum(e - b for b, _, _, e in by_rows[1:]) <= (most + (8 if dilated else 0)) * len(by_rows)


PLANTED = {
    "causal mask one ahead": ("attention_mask", "tl.where(causal == 1, i + 1, length)", "tl.where(causal == 1, i + 2, length)"),
    "window one long": ("attention_mask", "i - window + 1), begin)", "i - window), begin)"),
    "prefix ignored": ("attention_mask", "seen | (j < tl.minimum(mask[2], length))", "seen"),
    "dilated grid shifted": ("attention_mask", "(j + 1) % mask[5] == 0", "j % mask[5] == 0"),
    "block-causal is block-local": ("attention_mask", "tl.where(causal == 2, 0, block)", "block + 0 * causal"),
    "a masked tile left out": ("attention", "for t in range(a + (c - b) + (e - d)):", "for t in range(a + (c - b) + (e - d) - 1):"),
    "gathered keys one off": ("attention", "(before + 1 + t * BLOCK_N + wide) * dilation - 1", "(before + 1 + t * BLOCK_N + wide) * dilation"),
    "old sums not shrunk": ("attention", "l * shrink + tl.sum(p, 1)", "l + tl.sum(p, 1)"),
    "sink ignored": ("attention", "mask=has_sink != 0, other", "mask=has_sink > 1, other"),
    "lse in base 2": ("attention", "(m + tl.log2(tl.where(empty, 1.0, l))) * LN2", "(m + tl.log2(tl.where(empty, 1.0, l)))"),
    "decay reversed": ("attention", "(high_i - high_j) + (low_i - low_j)", "(high_j - high_i) + (low_j - low_i)"),
    "keys of the wrong head": ("attention", "head // (HQ // HKV)", "head % HKV"),
    "q_offset left out": ("attention", "row + tl.arange(0, BLOCK_M) + q_offset\n", "row + tl.arange(0, BLOCK_M)\n"),
    "merged value without weight": ("attention", "out.to(ACC) * weight[:, None]", "out.to(ACC)"),
    "merged score ignored": ("attention", "l = tl.exp2(logit - reference) + weight", "l = tl.exp2(logit - reference)"),
    "merged score outside of the maximum": ("attention", "m = tl.maximum(given, logit)", "m = tl.zeros((BLOCK_M,), ACC) + logit"),
    "a piece of the columns left out": ("tiles", "tl.range(0, D, BLOCK, ", "tl.range(0, D - BLOCK, BLOCK, "),
    "merged gradient without weight": ("attention_backward", "weight[:, None] * dO, i, first", "dO, i, first"),
    "merged score's gradient ignores o": ("attention_backward", "weight * (tl.sum(values * dO, 1) - difference)", "weight * tl.sum(values * dO, 1)"),
    "delta ignores the lse": ("attention_backward", "tl.sum(O * dO, 1) - given", "tl.sum(O * dO, 1)"),
    "scale left out of dq": ("attention_backward", "dQ *= tl.full((), scale, ACC)", "dQ *= 1.0"),
    "first head of a group only": ("attention_backward", "for member in range(group):", "for member in range(1):"),
    "column sums lost": ("attention_backward", "row_sums.double() - column_sums.double()", "row_sums.double()"),
    "a tile of rows left out": ("attention_backward", "for t in range((c - b) + (e - d)):", "for t in range((c - b) + (e - d) - 1):"),
    "whole tiles of rows left out": ("attention_backward", "        for tile in range(c, d):\n            row =", "        for tile in range(c, c):\n            row ="),
}  # fmt: skip
NOTICED_BY = [
    c
    for c in LIGHT
    if c.name
    in (
        "block-causal window",
        "dilated",
        "dilated far",
        "prefix",
        "decay with offset",
        "sink",
        "tile",
        "merge",
        "in pieces",
    )
]


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug, device, full, tmp_path, monkeypatch):
    """The kernels with one wrong line each; the cases in float64 must notice."""
    if not full or device != "cpu":
        pytest.skip("--full: every bug is a run of the cases in the interpreter")
    from support.attention_plans import planted

    from memattn.kernels import attention as kernels
    from memattn.kernels import attention_backward as kernels_backward

    forward, backward = planted(bug, *PLANTED[bug], tmp_path)
    monkeypatch.setattr(kernels, "forward", forward)
    monkeypatch.setattr(kernels_backward, "backward", backward)
    for c in (*NOTICED_BY, replace(SMALL, batch=1), replace(LONG, queries=300, mask={})):
        truth = truth_of(c, torch.float64)
        actual = evaluate(op, c.make(torch.float64))
        if any(not torch.allclose(actual[n], x, rtol=1e-6, atol=1e-8) for n, x in truth.items()):
            return
    pytest.fail(f"no case noticed: {bug}")


# --- addresses, registration -----------------------------------------------------------------------------------------


def test_sequence_past_element_2_31(device):
    if device != "cpu":
        pytest.skip("untouched memory is free on the CPU only")
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 9 * 2**30:
        pytest.skip("the system refuses to reserve 8 GiB at once")
    worker = Path(__file__).parent / "support" / "far_attention.py"
    run = subprocess.run([sys.executable, worker], capture_output=True, text=True)
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stderr[-2000:]}"


def test_opcheck(device):
    c = replace(SMALL, batch=1, queries=9, sinks=0, decay=0.1, mask={}, merged=True)
    inputs = c.make(device=device)
    tensors = [inputs[n] for n in ("q", "k", "v", "sink")] + [inputs["log_decay"].double().cumsum(1)]
    tensors, first = (
        [x.requires_grad_() for x in part] for part in (tensors, (inputs["merge_lse"], inputs["merge_o"]))
    )
    args = (*tensors, None, None, *first, 1, 5, 0, 0, 0, 0, 0, 0, 0, False, 0.25)
    assert set(torch.library.opcheck(resolve("attention_triton"), args).values()) == {"SUCCESS"}
