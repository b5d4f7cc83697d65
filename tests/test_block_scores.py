"""block_scores and sign_codes on every backend: truth, gradients, masks, planted bugs, refusals, compilation."""

# ruff: noqa: E501 (tables, one case a line)
import functools
import sys
from pathlib import Path

import pytest
import torch
from support import tables
from support.blocks import (
    LEAVES,
    SCORE_BUGS,
    SCORE_CHECKS,
    SCORES,
    Scores,
    gradients,
    judge,
    planted_scores,
    scores_are_those_of_the_definition,
)
from support.compare import to_float64
from support.relations import assert_same, outcomes

from memattn import backends
from memattn.ops import block_scores, sign_codes, topk
from memattn.ops._library import resolve
from memattn.reference import block_scores as reference
from memattn.reference import sign_codes as codes

NO_KERNELS = backends.why_not("block_scores", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOATS = tuple(c for c in SCORES if c.kind != "hamming")


@pytest.fixture(params=["cpu", "chunked"])
def backend(request, device):
    """Each backend that can run here."""
    if reasons := backends.why_not(
        "block_scores", request.param, backends.Request(device, torch.float32), explicit=True
    ):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


def cases_of(backend, dtype):
    return FLOATS if backend == "cpu" or dtype != torch.float32 else SCORES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_tolerance_of_truth(dtype, backend, device):
    scores_are_those_of_the_definition(
        functools.partial(block_scores, backend=backend), device, cases_of(backend, dtype), dtype
    )


def test_gradients_within_tolerance_of_truth(backend, device):
    """Against torch's own differentiation of the float64 form; that form is `loop`'s by the test above."""
    for c in FLOATS:
        for dtype in (torch.float32, torch.bfloat16):
            given = c.make(dtype, device)
            truth = gradients(reference.chunked, to_float64(given), LEAVES)
            comparator = gradients(reference.chunked, given, LEAVES)
            judge(gradients(functools.partial(block_scores, backend=backend), given, LEAVES), comparator, truth, dtype)


def table_errors():
    """Results of the table in this process that miss the truth."""

    def check(c, dtype):
        scores_are_those_of_the_definition(functools.partial(block_scores, backend="cpu"), "cpu", (c,), dtype)

    few = [c for c in FLOATS if c.kind in ("dot", "bound", "relu") and c.listed is None]
    return tables.misses(check, [(c, dtype) for c in few for dtype in (torch.float32, torch.bfloat16)])


@needs_cpu_kernels
@tables.each
def test_every_instruction_set(isa):
    tables.assert_no_errors(isa, __name__, products=False)


@pytest.mark.parametrize("check", [n for n in SCORE_CHECKS if n != "scores_are_those_of_the_definition"])
def test_relation(check, backend, device):
    SCORE_CHECKS[check](functools.partial(block_scores, backend=backend), device)


@pytest.mark.parametrize("bug", SCORE_BUGS)
def test_planted_bug_is_caught(bug):
    failures = {name for name, reason in outcomes(SCORE_CHECKS, planted_scores(bug)).items() if reason}
    assert failures, f"no check noticed: {bug}"


def test_reference_passes_every_relation():
    assert {name: reason for name, reason in outcomes(SCORE_CHECKS, reference.chunked).items() if reason} == {}


def test_parts_of_queries_are_the_whole(monkeypatch, backend, device):
    given = next(c for c in SCORES if c.name == "indexer").make(device=device)
    expected = block_scores(**given, backend=backend)
    monkeypatch.setattr(sys.modules["memattn.ops.block_scores"], "MOST_SCORES", 1)
    torch.testing.assert_close(block_scores(**given, backend=backend), expected)


@pytest.mark.parametrize("kind", ["dot", "relu", "sigmoid", "cos"])
def test_gradcheck(kind, device):
    given = Scores("", kind, 1, 2, 4, 2, 5, 3, over="group", weighted=True, listed=2).make(torch.float64, device)
    leaves = [given[n].requires_grad_() for n in LEAVES]

    def op(*tensors):
        o = block_scores(**{**given, **dict(zip(LEAVES, tensors, strict=True))})
        return o.masked_fill(o == -torch.inf, 0.0)

    assert torch.autograd.gradcheck(op, leaves) and torch.autograd.gradgradcheck(op, leaves)


def test_indexer_learns_the_attention_it_is_shown(device):
    """KL(p ‖ softmax(I)) on a selected set: dI = softmax(I) − p, and from it the published dw, dq, dk."""
    given = Scores("", "relu", 1, 3, 4, 1, 9, 6, over="heads", weighted=True, listed=1, scale=1.0).make(
        torch.float64, device
    )
    given["indices"] = torch.tensor([[[[0, 3, 5]], [[1, 2, 8]], [[4, 6, 7]]]], dtype=torch.int32, device=device)
    leaves = [given[n].requires_grad_() for n in LEAVES]
    scores = block_scores(**given)
    p = torch.rand(1, 3, 1, 3, dtype=torch.float64, device=device).softmax(-1)
    loss = (p * (p.log() - scores.log_softmax(-1))).sum()
    dq, dr, dw = torch.autograd.grad(loss, leaves)
    q, r, w = (x.detach() for x in leaves)
    expected = [torch.zeros_like(x) for x in (q, r, w)]
    for t in range(3):
        for n, s in enumerate(given["indices"][0, t, 0].tolist()):
            di = (scores.softmax(-1) - p)[0, t, 0, n].detach()
            for h in range(4):
                dot = q[0, t, h] @ r[0, s, 0]
                expected[2][0, t, h] += di * dot.clamp_min(0)
                expected[0][0, t, h] += w[0, t, h] * di * (dot > 0) * r[0, s, 0]
                expected[1][0, s, 0] += w[0, t, h] * di * (dot > 0) * q[0, t, h]
    torch.testing.assert_close([dq, dr, dw], expected)


@needs_cpu_kernels
def test_bits_do_not_depend_on_threads_or_company():
    threads, results = torch.get_num_threads(), []
    given = Scores("", blocks=5000, dim=64, queries=1).make()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(block_scores(**given, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[1:], results[:1] * 2, "threads")
    alone = block_scores(**{**given, "q": given["q"][1:], "r": given["r"][1:, 37:60]}, backend="cpu")
    assert_same((alone,), (results[0][1:, ..., 37:60],), "company")


@needs_cpu_kernels
def test_opcheck():
    args = torch.randn(2, 3, 4, 20), torch.randn(2, 9, 2, 20)
    assert set(torch.library.opcheck(resolve("block_product_cpu"), args).values()) == {"SUCCESS"}


def test_compiled_fullgraph(backend, device):
    torch._dynamo.reset()
    op = functools.partial(block_scores, backend=backend)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for name in ("bound of one query", "softmax summed over the group", "indexer's selected set"):
        given = next(c for c in SCORES if c.name == name).make(device=device)
        torch.testing.assert_close(compiled(**given), op(**given))


@needs_cpu_kernels
def test_blocks_past_element_2_to_31():
    """The last summaries of a tensor whose elements do not fit 32 bits."""
    width = 4096
    r = torch.empty(2, 2**30 // width + 8, 1, width, dtype=torch.float16)
    r[1, -8:] = torch.randn(8, 1, width)
    q = torch.randn(2, 1, 1, width).half()
    far = block_scores(q, r, backend="cpu")[1:, ..., -8:]
    torch.testing.assert_close(far, block_scores(q[1:], r[1:, -8:].clone(), backend="chunked"), rtol=1e-3, atol=1e-2)


def test_meta_device():
    scores = block_scores(
        torch.empty(2, 5, 6, 16, device="meta"), torch.empty(2, 9, 3, 16, device="meta"), over="group"
    )
    assert scores.shape == (2, 5, 3, 9) and scores.is_meta


def test_selects_blocks_with_topk(backend, device):
    """Forced blocks are among the selected, and blocks that are not seen are not."""
    given = next(c for c in SCORES if c.name == "causal, forced").make(device=device)
    found = topk(block_scores(**given, backend=backend), 3)
    assert found.indices[0, 3, 0].tolist()[::2] == [0, 5] and found.counts[0, :, 0].tolist() == [1, 1, 2, 3, 3]


# --- sign codes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_those_of_the_definition(bits, dtype, device):
    x, projection = torch.randn(2, 5, 16, device=device).to(dtype), torch.randn(16, bits, device=device).to(dtype)
    for center in (None, x.mean(1, keepdim=True), x[0, 0]):
        assert torch.equal(sign_codes(x, projection, center=center).cpu(), _expected(x, projection, center))


def _expected(x, projection, center):
    moved = x.double() if center is None else x.double() - center.double()
    return codes.loop(moved.cpu(), projection.double().cpu())


def test_code_of_zero_and_nan(device):
    x = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [1.0, 0.0]], device=device)
    assert sign_codes(x, torch.eye(2, device=device)).tolist() == [[0], [0], [1]]


def test_similar_vectors_differ_in_few_bits(device):
    noise = torch.Generator().manual_seed(0)
    x, projection = (torch.randn(*shape, generator=noise).to(device) for shape in ((1, 200, 1, 64), (64, 256)))
    code = sign_codes(x, projection)
    differing = -block_scores(code, code, kind="hamming")[0, :, 0]
    angle = torch.nn.functional.cosine_similarity(x[0, :, 0, None], x[0, None, :, 0], -1).clamp(-1, 1).acos()
    assert bool((differing.diagonal() == 0).all())
    assert float((differing / 256 - angle / torch.pi).abs().max()) < 0.15


def refused(**change):
    return lambda: block_scores(**{**Scores("").make(), **change})


@pytest.mark.parametrize(
    "call, error, message",
    [
        (refused(kind="l2"), ValueError, "kind is 'l2'; allowed: 'dot', 'cos', 'bound', 'relu', 'sigmoid', 'hamming'"),
        (refused(kind="hamming"), TypeError, "q is float32; expected int32 with kind='hamming'"),
        (refused(kind="bound"), ValueError, r"r has shape \[2, 11, 3, 20\]; expected \[B, N, HKV, 2D\] = \[2, 11, 3, 40\]"),
        (refused(r=torch.zeros(2, 11, 4, 20)), ValueError, "q has 6 heads; expected a positive multiple of r's 4 heads"),
        (refused(r=torch.zeros(2, 11, 3, 20).half()), TypeError, "r is float16; expected float32 like q"),
        (refused(over="head"), ValueError, "over is 'head'; allowed: 'none', 'group', 'heads'"),
        (refused(reduce="min"), ValueError, "reduce is 'min'; allowed: 'sum', 'mean', 'max'"),
        (refused(norm="l1"), ValueError, "norm is 'l1'; allowed: None, 'softmax'"),
        (refused(scale=float("inf")), ValueError, "scale is inf; expected a finite number"),
        (refused(force_last=-1), ValueError, "force_last is -1; expected an int ≥ 0"),
        (refused(weight=torch.zeros(2, 5)), ValueError, r"weight has shape \[2, 5\]; expected \[B, S, H\]"),
        (refused(q_positions=torch.arange(5)), ValueError, "block_ends and q_positions are used together"),
        (refused(counts=torch.tensor([1, 12])), ValueError, r"counts holds 1\.\.12; allowed: 0\.\.11"),
        (refused(block_ends=torch.arange(9), q_positions=torch.arange(5)), ValueError, r"block_ends has shape \[9\]; expected \[N\] or \[B, N\]"),
        (refused(indices=torch.zeros(2, 5, 2, 4).int()), ValueError, r"indices has shape \[2, 5, 2, 4\]; expected \[B, S, HKV or 1, n\]"),
        (refused(indices=torch.full((2, 5, 1, 4), 11)), ValueError, r"indices holds 11\.\.11; allowed: -1 \(padding\)\.\.10"),
        (refused(indices=torch.zeros(2, 5, 1, 4).int(), force_first=1), ValueError, "indices says which blocks are seen"),
        (refused(indices=torch.zeros(2, 5, 1, 4).int(), reduce_queries="max"), ValueError, "indices is given with reduce_queries"),
        (refused(backend="triton"), backends.BackendError, "block_scores has no triton kernel; it has: cpu, chunked"),
        (lambda: sign_codes(torch.zeros(3, 4), torch.zeros(5, 8)), ValueError, r"projection has shape \[5, 8\]; expected \[D, bits\] = \[4, 8\]"),
        (lambda: sign_codes(torch.zeros(3, 4), torch.zeros(4, 0)), ValueError, "expected at least one bit"),
        (lambda: sign_codes(torch.zeros(3, 4), torch.zeros(4, 8), center=torch.zeros(3)), ValueError, r"center has shape \[3\]"),
        (lambda: sign_codes(torch.zeros(3, 4).int(), torch.zeros(4, 8)), TypeError, "x is int32; expected float32"),
    ],
)  # fmt: skip
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_code_of_the_page_runs():
    page = (Path(__file__).resolve().parent.parent / "docs" / "block_scores.md").read_text()
    scope: dict = {}
    for block in page.split("```python\n")[1:]:
        exec(compile(block.split("```")[0], "docs/block_scores.md", "exec"), scope)
