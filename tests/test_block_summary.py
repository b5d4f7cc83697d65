"""block_summary on every backend: truth, gradients, incremental use, planted bugs, refusals, compilation."""

# ruff: noqa: E501 (tables, one case a line)
import functools
from dataclasses import replace

import pytest
import torch
from support import tables
from support.blocks import (
    IN_CPP,
    SUMMARIES,
    SUMMARY_BUGS,
    SUMMARY_CHECKS,
    Summary,
    gradients_are_those_of_the_definition,
    planted_summary,
    summaries_are_those_of_the_definition,
    values_of,
)
from support.relations import assert_same, outcomes

from memattn import backends
from memattn.ops import block_summary
from memattn.ops._library import resolve
from memattn.reference import block_summary as reference

NO_KERNELS = backends.why_not("block_summary", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MEANS = tuple(c for c in SUMMARIES if c.mode == "mean")


@pytest.fixture(params=["cpu", "chunked"])
def backend(request, device):
    """Each backend that can run here."""
    if reasons := backends.why_not(
        "block_summary", request.param, backends.Request(device, torch.float32), explicit=True
    ):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


def cases_of(backend):
    return IN_CPP if backend == "cpu" else SUMMARIES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_tolerance_of_truth(dtype, backend, device):
    op = functools.partial(block_summary, backend=backend)
    summaries_are_those_of_the_definition(op, device, cases_of(backend), dtype)
    gradients_are_those_of_the_definition(op, device, MEANS if backend == "cpu" else SUMMARIES, dtype)


def table_errors():
    """Results of the table in this process that miss the truth."""
    op = functools.partial(block_summary, backend="cpu")

    def check(c, dtype):
        summaries_are_those_of_the_definition(op, "cpu", (c,), dtype)
        if c.mode == "mean":
            gradients_are_those_of_the_definition(op, "cpu", (c,), dtype)

    return tables.misses(check, [(c, dtype) for c in IN_CPP for dtype in (torch.float32, torch.bfloat16)])


@needs_cpu_kernels
@tables.each
def test_every_instruction_set(isa):
    tables.assert_no_errors(isa, __name__, products=False)


@pytest.mark.parametrize("check", ["incremental_is_whole", "tokens_of_others_do_not_matter"])
def test_relation(check, backend, device):
    SUMMARY_CHECKS[check](functools.partial(block_summary, backend=backend), device, cases_of(backend))


@pytest.mark.parametrize("bug", SUMMARY_BUGS)
def test_planted_bug_is_caught(bug):
    failures = {name for name, reason in outcomes(SUMMARY_CHECKS, planted_summary(bug)).items() if reason}
    assert failures, f"no check noticed: {bug}"


def test_reference_passes_every_relation(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2000)  # a few blocks at a time
    assert {name: reason for name, reason in outcomes(SUMMARY_CHECKS, reference.chunked).items() if reason} == {}


def test_nan_stays_in_its_block_and_channel(backend, device):
    for mode in ("mean", "max", "minmax"):
        given = Summary("", mode, dim=16).make(device=device)
        given["k"][1, 17, 2, 5] = float("nan")
        values = block_summary(**given, backend=backend).values.unflatten(-1, (-1, 16))
        expected = torch.zeros_like(values, dtype=torch.bool)
        expected[1, 2, 2, :, 5] = True
        assert torch.equal(values.isnan(), expected)


@needs_cpu_kernels
@pytest.mark.parametrize("c", [Summary("", tokens=20, heads=1, dim=3, stride=s, lengths=(20, 7)) for s in (None, 3)])
def test_gradcheck(c):
    given = c.make(torch.float64)
    leaf = given.pop("k").requires_grad_()
    assert torch.autograd.gradcheck(lambda k: block_summary(k, **given, backend="cpu").values, leaf)
    with pytest.raises(RuntimeError, match="block_summary_cpu has no second derivative.*backend='chunked'"):
        (dk,) = torch.autograd.grad(block_summary(leaf, **given).values.square().sum(), leaf, create_graph=True)
        dk.sum().backward()


@needs_cpu_kernels
def test_bits_do_not_depend_on_threads_or_company():
    threads, results = torch.get_num_threads(), []
    given = Summary("", "mean", tokens=3000, heads=8, dim=64, block=64, stride=16).make()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            k = given["k"].clone().requires_grad_()
            values = block_summary(**{**given, "k": k}, backend="cpu").values
            results.append((values.detach(), *torch.autograd.grad(values.square().sum(), k)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert_same(other, results[0], "threads")
    assert_same((values_of(block_summary)(**{**given, "k": given["k"][1:]}),), (results[0][0][1:],), "company")


@needs_cpu_kernels
def test_opcheck():
    k, begins = torch.randn(2, 30, 2, 5), torch.arange(0, 30, 8)
    for grad, lengths in ((True, torch.tensor([30, 9])), (False, None)):
        args = (k.clone().requires_grad_(grad), begins, (begins + 8).clamp_max(30), lengths, 0)
        assert set(torch.library.opcheck(resolve("block_summary_cpu"), args).values()) == {"SUCCESS"}
    values, _ = resolve("block_summary_cpu")(*args)
    backward = (torch.randn_like(values), *args[:-1])
    assert set(torch.library.opcheck(resolve("block_summary_cpu_backward"), backward).values()) == {"SUCCESS"}


def test_compiled_fullgraph(backend, device):
    torch._dynamo.reset()
    op = functools.partial(block_summary, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for c in (MEANS[0], MEANS[2], replace(MEANS[1], tokens=70), MEANS[4]):
        given = c.make(device=device)
        given["k"].requires_grad_()
        values = compiled(**given).values
        torch.testing.assert_close(values, op(**given).values)
        values.sum().backward()


@needs_cpu_kernels
def test_tokens_past_element_2_to_31():
    """The last block of a text whose elements do not fit 32 bits; memory that nobody touches costs nothing."""
    width = 4096
    tokens = 2**31 // width + 64
    k = torch.empty(1, tokens, 1, width, dtype=torch.float16)
    k[0, -64:] = torch.randn(64, 1, width)
    far = block_summary(k, 64, cu_blocks=torch.tensor([tokens - 64, tokens - 32, tokens]), backend="cpu")
    near = block_summary(k[:, -64:].clone(), 64, cu_blocks=torch.tensor([0, 32, 64]), backend="cpu")
    assert_same(far, near, "far block")


def test_meta_device():
    found = block_summary(torch.empty(2, 50, 3, 20, device="meta"), 8, mode="minmax")
    assert found.values.shape == (2, 7, 3, 40) and found.counts.shape == (2, 7) and found.values.is_meta


def refused(**change):
    return lambda: block_summary(**{**Summary("").make(), **change})


@pytest.mark.parametrize(
    "call, error, message",
    [
        (refused(k=torch.zeros(2, 50, 20)), ValueError, r"k has shape \[2, 50, 20\] of rank 3; expected \[B, T, HKV, D\]"),
        (refused(mode="sum"), ValueError, "mode is 'sum'; allowed: 'mean', 'max', 'minmax', 'topr', 'gated'"),
        (refused(block=0), ValueError, r"block is 0; allowed: 1\.\."),
        (refused(stride=9), ValueError, r"stride is 9; allowed: 1\.\.8"),
        (refused(from_pos=51), ValueError, r"from_pos is 51; allowed: 0\.\.50"),
        (refused(weight=torch.zeros(2, 50, 3)), ValueError, "weight is given with mode='mean'"),
        (refused(mode="gated"), ValueError, "weight is None with mode='gated'"),
        (refused(mode="topr", weight=torch.zeros(2, 50, 3)), ValueError, "top is None with mode='topr'"),
        (refused(mode="gated", weight=torch.zeros(2, 50, 3)), ValueError, r"weight has shape \[2, 50, 3\]; expected \[B, T, HKV, D\]"),
        (refused(lengths=torch.tensor([1, 51])), ValueError, r"lengths holds 1\.\.51; allowed: 0\.\.50"),
        (refused(cu_blocks=torch.tensor([0, 9])), ValueError, "batch size is 2 with cu_blocks"),
        (refused(cu_blocks=torch.tensor([0, 9]), from_pos=1), ValueError, "stride, from_pos or lengths is given with cu_blocks"),
        (refused(k=torch.zeros(1, 50, 3, 20), cu_blocks=torch.tensor([0, 9])), ValueError, r"in steps of 9\.\.9; allowed: within 0\.\.50, steps of 0\.\.block = 8"),
        (refused(backend="triton"), backends.BackendError, "block_summary has no triton kernel; it has: cpu, chunked"),
        (refused(mode="gated", weight=torch.zeros(2, 50, 3, 20), backend="cpu"), backends.BackendError, "topr and gated is not supported"),
    ],
)  # fmt: skip
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
