"""The Triton kernel of attention_mass through the public op: on a GPU, or on CPU tensors in the interpreter."""

# ruff: noqa: E501 (tables, one case a line)

import functools
import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import relations
from support.attention import CASES, LONG, SMALL, case
from support.mass import CHECKS, FORMS, judge, of

import memattn.kernels
from memattn.ops import attention_mass
from memattn.ops._library import resolve
from memattn.reference import attention_mass as reference

pytestmark = pytest.mark.usefixtures("interpreter")
op = functools.partial(attention_mass, backend="triton")
FAR = case("dilated far", {"chunk_rule": ("dilated", 6, 4, 5)}, batch=1, queries=150)
LIGHT = [FAR, *(replace(c, batch=1) if c.lengths is None else c for c in CASES)]
BY_DEFAULT = (
    "causal", "prefix", "block-causal window", "dilated far", "at the end", "sinks", "decay with offset", "tile", "packed",
    "packed window", "packed prefix at the end",
)  # fmt: skip
ROUNDED = ("causal", "packed window")
RELATIONS = ("nothing_seen_is_zero", "nothing_at_all")


def equal_in_float64(op, c, forms=FORMS[:3]):
    """Against plain torch in float64, itself tested against the loop."""
    for form in forms:
        inputs = of(c, torch.float64, **form)
        torch.testing.assert_close(op(**inputs), reference.chunked(**inputs), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("c", [*LIGHT, LONG], ids=lambda c: c.name)
def test_float64_equals_the_definition(c, device, full):
    if device != "cpu":
        pytest.skip("float64 products have no Triton kernel on a GPU")
    if not full and c.name not in BY_DEFAULT:
        pytest.skip("--full: every mask")
    equal_in_float64(op, c, FORMS[:3] if full or c.name in ROUNDED else FORMS[1:2])


@pytest.mark.parametrize("c", [*CASES, LONG], ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_within_tolerance_of_truth(c, dtype, device, full):
    if not full and (c.name not in ROUNDED or dtype == torch.float32):
        pytest.skip("--full: every mask in float32 and bfloat16; in float64 they run by default")
    judge(op, c, dtype, device, draws=3 if full else 1)


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, device, full):
    if not full and check not in RELATIONS:
        pytest.skip("--full: every relation takes the interpreter minutes")
    CHECKS[check](op, device)


@pytest.mark.parametrize("form", FORMS[:3], ids=str)
def test_every_result_is_written(form, device, poisoned):
    for c in (replace(SMALL, batch=1), case("decay", lengths=((17, 20), (0, 3), (3, 9)), decay=0.1)):
        mass = op(**of(c, device=device, **form))
        assert mass.isfinite().all(), "the result holds memory that nobody wrote"


def test_repeats_bitwise(device):
    inputs = of(replace(SMALL, batch=1), torch.bfloat16, device)
    relations.assert_same([op(**inputs)], [op(**inputs)], "another run gives other bits")


def test_sequence_past_element_2_31(device):
    if device != "cpu":
        pytest.skip("untouched memory is free on the CPU only")
    if os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 9 * 2**30:
        pytest.skip("the system refuses to reserve 8 GiB at once")
    worker = Path(__file__).parent / "support" / "far_mass.py"
    run = subprocess.run([sys.executable, worker], capture_output=True, text=True)
    assert run.returncode == 0, f"exit status {run.returncode}\n{run.stderr[-2000:]}"


def test_opcheck(device):
    inputs = of(replace(SMALL, batch=1, queries=9, sinks=None, decay=0.1, mask={}), device=device)
    decay = inputs["log_decay"].double().cumsum(1)
    tensors = (*(inputs[n] for n in ("q", "k", "lse")), decay, None, None)
    args = (*tensors, 1, 5, 0, 0, 0, 0, 0, 0, 0, False, 0.25, -4, 2**31 - 1, True)
    assert set(torch.library.opcheck(resolve("attention_mass_triton"), args).values()) == {"SUCCESS"}


PLANTED = {
    "range ignores its start": ("first, last = bound_of(start, rows)", "first, last = rows * 0"),
    "range starts one late": ("live = (row + y >= first)", "live = (row + y > first)"),
    "range ends one late": ("(row + y < last)", "(row + y <= last) & (row + y < rows)"),
    "negative bounds from the start": ("tl.where(at < 0, at + rows, at)", "at"),
    "a masked tile left out": ("for t in range((c - b) + (e - d)):", "for t in range((c - b) + (e - d) - 1):"),
    "whole tiles left out": ("        for tile in range(c, d):", "        for tile in range(c, c):"),
    "first head of a group only": ("total += sums", "total = sums"),
    "heads of the wrong group": ("key_head * group + member", "member * HKV + key_head"),
    "keys' decay ignored": ("high_j = load_column(high + own, x, there, HQ, ACC)[:, None]", "high_j = load_column(high + own, x, there, HQ, ACC)[:, None] * 0"),
    "decay of the wrong queries": ("at_keys + (row + q_offset + wide) * HQ", "at_keys + (row + wide) * HQ"),
    "q_offset left out": ("i = row + y + q_offset", "i = row + y"),
    "mask ignored": ('s = tl.where(seen, s, float("-inf"))', "s = s"),
}  # fmt: skip
NOTICED_BY = ("sink", "block-causal window", "dilated", "prefix", "decay with offset", "tile", "packed window")


@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug_is_caught(bug, device, full, tmp_path, monkeypatch):
    """The kernel with one wrong line; the cases in float64 must notice."""
    if not full or device != "cpu":
        pytest.skip("--full: every bug is a run of the cases in the interpreter")
    source = (Path(next(iter(memattn.kernels.__path__))) / "attention_mass.py").read_text()
    relations.with_bug(bug, *PLANTED[bug], source)
    path = tmp_path / "planted_attention_mass.py"
    path.write_text(source.replace(*PLANTED[bug]))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("memattn.kernels.attention_mass.forward", module.forward)
    for c in (*(c for c in LIGHT if c.name in NOTICED_BY), replace(LONG, queries=300, mask={})):
        try:
            equal_in_float64(op, c)
        except AssertionError:
            return
    pytest.fail(f"no case noticed: {bug}")
