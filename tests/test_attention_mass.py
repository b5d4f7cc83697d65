"""Column mass of attention on every backend of this machine: truth, tolerance, relations, planted bugs, refusals."""

import functools
from dataclasses import replace

import pytest
import torch
from support import tables
from support.attention import CASES, GROUPED, LONG, SMALL, case
from support.mass import BUGS, CHECKS, FORMS, judge, of, packed_equals_separate, planted, run_all

import memattn
from memattn import backends
from memattn.ops import attention, attention_mass
from memattn.ops._library import resolve
from memattn.reference import attention_mass as reference

NO_KERNELS = backends.why_not("attention_mass", "cpu", backends.Request("cpu", torch.float32))
needs_cpu_kernels = pytest.mark.skipif(NO_KERNELS != [], reason="; ".join(NO_KERNELS))
cpu = functools.partial(attention_mass, backend="cpu")
ROUNDED = ("causal", "prefix", "dilated", "decay, alibi, sink", "packed", "wide", "tile")


@pytest.fixture(params=["cpu", "chunked"])
def backend(request, device):
    """Each backend that can run here."""
    need = backends.Request(device, torch.float32, features=frozenset({"packed"}))
    if reasons := backends.why_not("attention_mass", request.param, need, explicit=True):
        pytest.skip(f"{request.param}: {'; '.join(reasons)}")
    return request.param


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", (*CASES, LONG), ids=lambda c: c.name)
def test_within_tolerance_of_truth(c, backend, device):
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if c.name in ROUNDED else (torch.float32,)
    for dtype in dtypes:
        judge(functools.partial(attention_mass, backend=backend), c, dtype, device)


@pytest.mark.parametrize("c", [c for c in CASES if c.queries <= 75 and c.key_dim < 100], ids=lambda c: c.name)
def test_float64(c, backend, device):
    for form in FORMS[:3]:
        inputs = of(c, torch.float64, device, **form)
        actual, expected = attention_mass(**inputs, backend=backend), reference.loop(**inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("check", CHECKS)
def test_relation(check, backend, device):
    CHECKS[check](functools.partial(attention_mass, backend=backend), device)


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    failures = {name: reason for name, reason in run_all(planted(bug)).items() if reason}
    assert failures, f"no check noticed: {bug}"


def test_reference_passes_every_relation():
    assert {name: reason for name, reason in run_all(reference.chunked).items() if reason} == {}


def test_attention_and_mass_agree(backend, device):
    """The lse of the public op normalises the mass of the public op."""
    q, k, v = (torch.randn(1, 500, h, 64, device=device) for h in (8, 2, 2))
    for dtype in (torch.float32, torch.bfloat16):
        rows = (q.to(dtype), k.to(dtype), v.to(dtype))
        o, lse = attention(*rows, window=100, backend=backend)
        mass = attention_mass(*rows[:2], lse, window=100, backend=backend)
        torch.testing.assert_close(mass.sum(1), torch.full_like(mass.sum(1), 500.0), rtol=1e-5, atol=0)
        columns = attention_mass(*rows[:2], lse, window=100, reduce_heads="group", backend=backend)
        assert (columns.sum((0, 1)) - 2000).abs().max() < 0.02


# --- the C++ kernel ---------------------------------------------------------------------------------------------------


@needs_cpu_kernels
def test_bits_do_not_depend_on_company():
    """A sequence alone, packed with others or in a batch with others."""
    packed_equals_separate(cpu, tolerance=0.0)
    inputs = of(replace(SMALL, batch=3))
    expected = cpu(**inputs)
    for rows in ([1], [2, 0, 1]):
        part = {n: x[rows] if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
        assert torch.equal(cpu(**part), expected[rows])


@needs_cpu_kernels
def test_bits_do_not_depend_on_the_thread_count():
    threads, results = torch.get_num_threads(), []
    cases = (replace(LONG, mask={"prefix_len": 70, "window": 90}), replace(LONG, heads=2, key_heads=1, decay=0.1))
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append([cpu(**of(c, dtype)) for c in cases for dtype in (torch.float32, torch.bfloat16)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def table_errors():
    """Results of the table in this process that miss the truth by more than the rule allows."""

    names = ("prefix", "dilated", "decay", "packed window", "scale", "wide")
    return tables.misses(
        functools.partial(judge, cpu),
        [(c, d) for c in CASES if c.name in names for d in (torch.float32, torch.bfloat16)],
    )


@needs_cpu_kernels
@tables.each
def test_every_instruction_set(isa):
    tables.assert_no_errors(isa, __name__)


@needs_cpu_kernels
def test_offsets_beyond_32_bits():
    """Only the last keys of more than 2^31 values are seen; only theirs and the mass's pages are touched."""
    keys = 2**27 + 100
    try:
        k = torch.empty(1, keys, 1, 16)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    k[:, -200:] = 0.0
    lse = torch.full((1, 2, 1), 4.0).log()
    mass = cpu(torch.ones(1, 2, 1, 16), k, lse, window=4, q_offset=keys - 2)
    assert mass[0, -5:, 0].tolist() == pytest.approx([0.25, 0.5, 0.5, 0.5, 0.25]) and not mass[0, :-5].any()


@needs_cpu_kernels
def test_opcheck():
    inputs = of(replace(SMALL, queries=37, sinks=None, decay=0.1, mask={}))
    decay = inputs["log_decay"].double().cumsum(1)
    settings = (1, 20, 0, 0, 0, 0, 0, 0, 0, False, 0.25, -5, 2**31 - 1)
    for grouped in (False, True):
        args = (*(inputs[n] for n in ("q", "k", "lse")), decay, None, None, *settings, grouped)
        assert set(torch.library.opcheck(resolve("attention_mass_cpu"), args).values()) == {"SUCCESS"}


@needs_cpu_kernels
@pytest.mark.parametrize(
    "change",
    [
        {"lse": torch.zeros(1, 6, 3)}, {"lse": torch.zeros(1, 6, 4).double()}, {"lse": torch.zeros(1, 4, 6).mT},
        {"k": torch.zeros(1, 6, 3, 16)}, {"k": torch.zeros(2, 6, 2, 16)}, {"q": torch.zeros(1, 6, 4, 32)},
        {"decay": torch.zeros(1, 5, 4, dtype=torch.float64)}, {"cu_q": torch.tensor([0, 9]), "cu_k": torch.tensor([0, 6])},  # noqa: E501
    ],
    ids=lambda c: ", ".join(f"{n} {list(x.shape)}" for n, x in c.items()),
)  # fmt: skip
def test_the_raw_op_refuses_what_it_cannot_read(change):
    given = {"q": torch.zeros(1, 6, 4, 16), "k": torch.zeros(1, 6, 2, 16), "lse": torch.zeros(1, 6, 4), "decay": None}
    given |= {"cu_q": None, "cu_k": None} | change
    with pytest.raises(RuntimeError, match="attention_mass_cpu: "):
        resolve("attention_mass_cpu")(*given.values(), 1, 0, 0, 0, 0, 0, 0, 0, 0, False, 0.25, 0, 6, False)


# --- refusals, use ----------------------------------------------------------------------------------------------------

GIVEN = of(case("errors", queries=6, **GROUPED))
BAD = {
    "lse shape": (dict(lse=torch.zeros(2, 6, 2)), ValueError, r"lse has shape \[2, 6, 2\]; expected .* = \[2, 6, 4\]"),
    "lse dtype": (dict(lse=torch.zeros(2, 6, 4).double()), TypeError, "lse is float64; expected float32"),
    "lse type": (dict(lse=None), TypeError, "lse is NoneType; expected a torch.Tensor"),
    "range": (dict(query_range=5), ValueError, r"query_range is 5; expected None or \(start, stop\)"),
    "range values": (dict(query_range=(0.5, None)), ValueError, r"query_range is \(0.5, None\); expected"),
    "reduction": (dict(reduce_heads="mean"), ValueError, "reduce_heads is 'mean'; allowed: 'none', 'group', 'sum'"),
    "heads": (dict(q=torch.zeros(2, 6, 3, 16)), ValueError, "q has 3 heads; expected a positive multiple of k's 2"),
    "causal": (dict(causal=1), ValueError, "causal is 1; allowed: True, False, 'block'"),
    "window": (dict(window=0), ValueError, "window is 0; expected an integer ≥ 1 or None"),
    "decay": (dict(log_decay=torch.ones(2, 6, 4)), ValueError, "log_decay has a value of 1; a natural-log decay"),
    "reach": (dict(alibi_slopes=torch.ones(4), q_offset=1), ValueError, "the last query has position 6"),
    "packed": (dict(cu_seqlens_q=torch.tensor([0, 6])), ValueError, "batch size is 2 with cu_seqlens_q"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    change, error, text = BAD[name]
    with pytest.raises(error, match=f"attention_mass: {text}"):
        attention_mass(**{**GIVEN, **change})


def test_gradients_are_refused():
    with pytest.raises(RuntimeError, match="attention_mass: an input requires grad; the mass is for inference only"):
        attention_mass(**{**GIVEN, "q": GIVEN["q"].clone().requires_grad_()})
    with torch.no_grad():
        assert not attention_mass(**{**GIVEN, "q": GIVEN["q"].clone().requires_grad_()}).requires_grad


def test_a_backend_that_cannot_serve_names_its_reasons():
    with pytest.raises(memattn.BackendError, match="attention_mass has no cuda kernel"):
        attention_mass(**GIVEN, backend="cuda")


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_fullgraph(compiler, backend):
    if backend == "chunked" and compiler == "inductor":
        pytest.skip("plain torch: what inductor makes of it is torch's matter")
    torch._dynamo.reset()
    op = functools.partial(attention_mass, backend=backend, query_range=(-5, None), reduce_heads="sum")
    inputs = of(replace(SMALL, sinks=None))
    torch.testing.assert_close(torch.compile(op, fullgraph=True, backend=compiler)(**inputs), op(**inputs))
