"""Events by surprise on both backends: truth, checks, planted bugs, states, refusals."""

# ruff: noqa: E501 (tables, one case a line)

import pytest
import torch
from support.events import (
    BASE,
    BUGS,
    CHECKS,
    REFINED,
    STATE_BUGS,
    bounds_of,
    forgetful,
    inputs_of,
    planted,
    run_all,
    text,
)

from memattn import _native
from memattn.ops import EventState, segment_events

needs_host = pytest.mark.skipif(_native.native_reason("_host") is not None, reason=str(_native.native_reason("_host")))
BACKENDS = [pytest.param("cpu", marks=needs_host), "chunked"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", CHECKS)
def test_check(check, backend):
    CHECKS[check](lambda **given: segment_events(**given, backend=backend))


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    assert any(run_all(planted(bug)).values()), f"no check noticed: {bug}"


@needs_host
@pytest.mark.parametrize("field", STATE_BUGS)
def test_lost_state_is_noticed(field):
    assert run_all(forgetful(field))["cuts_into_calls_change_nothing"]


@needs_host
@pytest.mark.parametrize("refine", (None, *REFINED))
def test_backends_agree_on_long_texts(refine):
    """Thousands of tokens, many windows long: the running sums of the C++ loop against sums taken anew."""
    made = text(3000, 17, batch=2, dtype=torch.float32)
    given = inputs_of(refine, made) | {"window": 100, "gamma": 1.5, "min_size": 3, "max_size": 30}
    a, b = (segment_events(**given, backend=name) for name in ("cpu", "chunked"))
    assert torch.equal(a.cu_events, b.cu_events) and torch.equal(a.counts, b.counts)
    assert a.cu_events.dtype == a.counts.dtype == torch.int64


@needs_host
def test_sums_do_not_drift():
    """After a million tokens of large surprises the threshold is still that of the window."""
    z = torch.rand(1 << 20, dtype=torch.float64) + 1e4
    window, last = 64, (1 << 20) - 1
    part = z[last - window : last]
    for factor, cut in ((1 + 1e-5, True), (1 - 1e-5, False)):
        z[last] = part.mean() + 3 * part.std() * factor
        found = segment_events(z, window=window, gamma=3.0, min_size=1, max_size=1 << 20, backend="cpu")
        assert (last in bounds_of(found)) == cut


def test_dtypes_and_single_rows():
    made = text(100, 3)
    expected = segment_events(**inputs_of(None, made), **BASE)
    assert expected.cu_events.dim() == 1 and expected.counts.dim() == 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        given = inputs_of("modularity", {n: x.to(dtype) for n, x in made.items()})
        wide = {n: x.double() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        assert bounds_of(segment_events(**given, **BASE)) == bounds_of(segment_events(**wide, **BASE))
    strided = {n: torch.stack([x, x], 1)[:, 0] for n, x in made.items()}
    for refine in REFINED:
        rows = [segment_events(**inputs_of(refine, x), **BASE) for x in (made, strided)]
        assert bounds_of(rows[0]) == bounds_of(rows[1])


def test_serves_as_cu_seqlens():
    from memattn.ops import attention

    q = torch.randn(1, 100, 2, 16)
    cu = segment_events(text(100, 3)["surprise"], **BASE).cu_events
    assert attention(q, q, q, cu_seqlens_q=cu).o.isfinite().all()


def test_no_rows():
    events = segment_events(torch.zeros(0, 10), **BASE)
    assert events.cu_events.shape == (0, 1) and events.counts.shape == (0,)


Z, KEYS = torch.rand(2, 30), torch.rand(2, 30, 2, 8)
STATE = segment_events(Z, **BASE, output_final_state=True).final_state
BAD = {
    "rank": (dict(surprise=torch.rand(2, 3, 4)), ValueError, r"surprise has shape \[2, 3, 4\]; expected \[T\] or \[B, T\]"),
    "type": (dict(surprise=[1.0]), TypeError, "surprise is list; expected a torch.Tensor"),
    "dtype": (dict(surprise=torch.zeros(2, 30).long()), TypeError, "surprise is int64; expected float32 or bfloat16"),
    "finite": (dict(surprise=Z.masked_fill(Z == Z[1, 3], torch.inf)), ValueError, r"surprise\[1, 3\] is inf; expected finite"),
    "nan": (dict(surprise=Z.masked_fill(Z == Z[0, 2], torch.nan)), ValueError, r"surprise\[0, 2\] is nan; expected finite"),
    "window": (dict(window=1), ValueError, "window is 1; expected an integer ≥ 2"),
    "min_size": (dict(min_size=0), ValueError, "min_size is 0; expected an integer ≥ 1"),
    "sizes": (dict(min_size=25), ValueError, "min_size is 25 and max_size 24; expected min_size ≤ max_size"),
    "gamma": (dict(gamma=float("nan")), ValueError, "gamma is nan; expected a finite number"),
    "refine": (dict(refine="cut", keys=KEYS), ValueError, "refine is 'cut'; allowed: None, 'modularity', 'conductance'"),
    "nothing to refine by": (dict(refine="modularity"), ValueError, "refine is 'modularity', which needs keys or similarity; neither is"),
    "two graphs": (dict(refine="modularity", keys=KEYS, similarity=torch.rand(2, 30, 30)), ValueError, "which needs keys or similarity; both are"),
    "unread keys": (dict(keys=KEYS), ValueError, "keys is given without refine, which would read it"),
    "keys shape": (dict(refine="modularity", keys=KEYS[:, :9]), ValueError, r"keys has shape \[2, 9, 2, 8\]; expected \[B, T, H, K\] = \[2, 30, 2, 8\]"),
    "keys rank": (dict(refine="modularity", keys=KEYS[0]), ValueError, r"keys has shape \[30, 2, 8\] of rank 3"),
    "matrix shape": (dict(refine="modularity", similarity=torch.rand(2, 30, 9)), ValueError, r"expected \[B, T, T\] = \[2, 30, 30\]"),
    "matrix in parts": (dict(refine="modularity", similarity=torch.rand(2, 30, 30), output_final_state=True), ValueError, "similarity holds a whole text"),
    "state type": (dict(initial_state=Z), TypeError, "initial_state is Tensor; expected the EventState of an earlier call"),
    "state of others": (dict(initial_state=STATE, window=9), ValueError, "expected a state of 2 rows, window 9 and max_size 24"),
    "state without keys": (dict(initial_state=STATE, refine="modularity", keys=KEYS), ValueError, "initial_state has keys None; expected .* keys of 16 values"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=f"segment_events: .*{message}"):
        segment_events(**{"surprise": Z, **BASE, **change})


def test_torch_compile_is_refused():
    torch._dynamo.reset()
    with pytest.raises(
        RuntimeError, match="segment_events reads its input on the host; call it outside of torch.compile"
    ):
        torch.compile(segment_events, fullgraph=True, backend="eager")(Z)


def test_state_is_a_pytree():
    leaves, spec = torch.utils._pytree.tree_flatten(STATE)
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), EventState) and STATE.batch == 2
