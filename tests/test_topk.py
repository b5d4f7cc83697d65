"""topk on every backend of this machine: adversarial rows bit for bit, relations, planted bugs, refusals, compilation."""

# ruff: noqa: E501 (tables, one case a line)
import functools
from pathlib import Path

import pytest
import torch
from support import tables
from support.relations import assert_same
from support.topk import BUGS, CASES, CHECKS, INF, LONG, NAN, Case, assert_selected, planted, run_all

from memattn import backends
from memattn.ops import topk
from memattn.ops._library import resolve
from memattn.reference import topk as reference

NO_KERNELS = backends.why_not("topk", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=["cpu", "chunked"])
def backend(request, device):
    """Each backend that can run here."""
    need = backends.Request(device, torch.float32, features=frozenset({"backward"}))
    if reasons := backends.why_not("topk", request.param, need, explicit=True):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_adversarial_rows(dtype, backend, device):
    for c in CASES:
        given = c.make(dtype, device)
        assert_selected(topk(**given, backend=backend), given, c.name)


def test_adversarial_long_rows(backend, device):
    """Long enough for the cpu backend's estimated threshold, full buffers and divided rows."""
    for c in LONG:
        given = c.make(device=device)
        assert_selected(topk(**given, backend=backend), given, c.name)


def table_errors():
    """Selections of the table in this process that are not the definition's."""

    def check(c, dtype):
        given = c.make(dtype)
        assert_selected(topk(**given, backend="cpu"), given, c.name)

    long = [(c, torch.float32) for c in LONG[::2]]
    return tables.misses(check, [(c, dtype) for c in CASES for dtype in DTYPES] + long)


@needs_cpu_kernels
@tables.each
def test_every_instruction_set(isa):
    tables.assert_no_errors(isa, __name__, products=False)


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, backend, device):
    CHECKS[check](functools.partial(topk, backend=backend), device)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    failures = {name: reason for name, reason in run_all(planted(bug)).items() if reason}
    assert failures, f"no check noticed: {bug}"


def test_reference_passes_every_relation():
    assert {name: reason for name, reason in run_all(reference.chunked).items() if reason} == {}


def test_a_million_columns(backend, device):
    """Against torch.topk, whose order of equal scores is undefined: the sum of values, and the scores at the indices."""
    scores = Case("few values", (2, 1 << 20), 1).make(device=device)["scores"] + torch.linspace(
        0, 3, 1 << 20, device=device
    )
    for k in (1, 64, 4096):
        found, theirs = topk(scores, k, sorted=True, backend=backend), torch.topk(scores, k)
        assert torch.equal(found.values, theirs.values)
        assert torch.equal(scores.gather(-1, found.indices.long()), found.values)
        assert bool((found.indices.sort(-1).values.diff(dim=-1) > 0).all())


@needs_cpu_kernels
def test_bits_do_not_depend_on_the_thread_count():
    threads, results = torch.get_num_threads(), []
    calls = [Case("few values", shape, 500).make() for shape in ((1, 300_000), (3, 100_000), (50, 2_000))]
    try:
        for n in (1, 2, 5, 5):
            torch.set_num_threads(n)
            results.append([topk(**given, backend="cpu") for given in calls])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, x in zip(results[0], other, strict=True):
            assert_same(x, one, "threads")
    assert_selected(results[0][0], calls[0])


@needs_cpu_kernels
def test_flushed_subnormals_lose_nothing():
    """With subnormals read as zeros, equal scores are still the earlier ones and zeros still count."""
    given = Case("zeros of both signs", (1, 5000), 40).make()
    expected = topk(**given, backend="cpu")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        assert_same(topk(**given, backend="cpu"), expected, "flushed")
    finally:
        torch.set_flush_denormal(False)


def test_gradient_of_values(backend, device):
    given = Case("few values", (3, 40), 9, lengths=(40, 5, 0)).make(torch.float64, device)
    scores = given.pop("scores").requires_grad_()
    call = functools.partial(topk, backend=backend, **given)
    found = call(scores)
    weights = torch.randn(found.values.shape, dtype=torch.float64, device=device).masked_fill(found.indices < 0, 0.0)
    (gradient,) = torch.autograd.grad((found.values.masked_fill(found.indices < 0, 0.0) * weights).sum(), scores)
    expected = torch.zeros_like(gradient)
    for row in range(3):
        used = found.indices[row, : found.counts[row]].long()
        expected[row, used] = weights[row, : found.counts[row]]
    assert torch.equal(gradient, expected)
    assert not found.indices.requires_grad and not found.counts.requires_grad


def test_strided_scores(backend, device):
    scores = Case("random", (6, 500, 4), 1).make(device=device)["scores"].transpose(1, 2)[::2]
    assert_same(topk(scores, 7, backend=backend), topk(scores.clone(), 7, backend=backend), "strides")


@needs_cpu_kernels
def test_opcheck():
    for lengths in (None, torch.tensor([5, 70])):
        args = (torch.randn(2, 70), 6, lengths, -INF, False)
        assert set(torch.library.opcheck(resolve("topk_cpu"), args).values()) == {"SUCCESS"}


def test_compiled_fullgraph(backend, device):
    torch._dynamo.reset()
    op = functools.partial(topk, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for c in (
        Case("random"),
        Case("few values", (2, 100), 8, page_size=16),
        Case("random", (2, 3, 70), 9, lengths=(1, 50)),
    ):
        given = c.make(device=device)
        assert_same(compiled(**given), op(**given), c.name)


def test_poisoned_memory(backend, device):
    cases = [c.make(device=device) for c in CASES]
    was = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        poisoned = [topk(**given, backend=backend) for given in cases]
    finally:
        torch.use_deterministic_algorithms(was[0])
        torch.utils.deterministic.fill_uninitialized_memory = was[1]
    for given, found in zip(cases, poisoned, strict=True):
        assert_selected(found, given)


@needs_cpu_kernels
def test_rows_past_element_2_to_31():
    """The last row of a tensor whose elements do not fit 32 bits; memory that nobody touches costs nothing."""
    rows, width = 2**31 // 4096 + 2, 4096
    scores, lengths = torch.empty(rows, width, dtype=torch.float16), torch.zeros(rows, dtype=torch.int32)
    scores[-1] = torch.randn(width)
    lengths[-1] = width
    found = topk(scores, 5, lengths=lengths, backend="cpu")
    assert_same([x[-1:] for x in found], topk(scores[-1:].clone(), 5, backend="cpu"), "far row")
    assert int(found.counts[:-1].sum()) == 0


def test_meta_device():
    found = topk(torch.empty(2, 3, 50, device="meta"), 7)
    assert found.values.shape == found.indices.shape == (2, 3, 7) and found.counts.shape == (2, 3)
    assert found.values.is_meta and found.indices.dtype == found.counts.dtype == torch.int32


def refused(**change):
    return lambda: topk(**{"scores": torch.zeros(2, 3, 50), "k": 4, **change})


@pytest.mark.parametrize(
    "call, error, message",
    [
        (refused(scores=[1.0]), TypeError, "scores is list; expected a torch.Tensor"),
        (refused(scores=torch.zeros(5)), ValueError, r"scores has shape \[5\]; expected \[B, ..., N\]"),
        (refused(scores=torch.zeros(2, 5, dtype=torch.int32)), TypeError, "scores is int32; expected float32 or"),
        (refused(k=0), ValueError, r"k is 0; allowed: 1\.\.4096"),
        (refused(k=4097), ValueError, r"k is 4097; allowed: 1\.\.4096"),
        (refused(k=2.0), ValueError, r"k is 2.0; allowed: 1\.\.4096"),
        (refused(tie="any"), ValueError, "tie is 'any'; allowed: 'low_index'"),
        (refused(threshold=NAN), ValueError, "threshold is nan; expected a number"),
        (refused(lengths=torch.tensor([1, 2, 3])), ValueError, r"lengths has shape \[3\]; expected \[2\] or \[2, 3\]"),
        (refused(lengths=torch.tensor([1, 51])), ValueError, r"lengths holds 1\.\.51; allowed: 0\.\.50"),
        (refused(lengths=torch.tensor([1.0, 2.0])), TypeError, "lengths is float32; expected int32 or int64"),
        (refused(page_size=4), ValueError, "page_size is 4 without page_table; allowed: 1"),
        (refused(page_table=torch.zeros(2, 12).int(), page_size=4), ValueError, "at least 13 pages of 4 for 50 scores"),
        (refused(page_table=torch.zeros(2, 50)), TypeError, "page_table is float32; expected int32"),
        (refused(backend="triton"), backends.BackendError, "topk has no triton kernel; it has: cpu, chunked"),
    ],
)  # fmt: skip
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_code_of_the_page_runs():
    page = (Path(__file__).resolve().parent.parent / "docs" / "topk.md").read_text()
    scope: dict = {}
    for block in page.split("```python\n")[1:]:
        exec(compile(block.split("```")[0], "docs/topk.md", "exec"), scope)


def test_one_row_of_lengths_for_several_heads():
    """Lengths [1] of scores [1, H, N]: an expanded row is not contiguous, though its flat form keeps one stride."""
    scores = torch.arange(12.0).view(1, 2, 6)
    assert topk(scores, 2, lengths=torch.tensor([4])).indices.tolist() == [[[2, 3], [2, 3]]]
