"""Gated scan: a vector that forgets and is written per token and channel, restarted at every chunk if asked.

    y_t = e^{g_t} ⊙ y_{t−1} + w_t ⊙ x_t          w_t = 1 − e^{g_t} = −expm1(g_t) ("ema")  or  1 ("plain")

y is zero before a sequence (or is its initial state) and, with `chunk_size` L, before each of its tokens L, 2L, …:
chunks are independent, and only the first sees the initial state. Several payloads x share one gate. Used by RAT (ema
in chunks, payloads k and v; repository CLAIRE-Labo/RAT), RAT+ (no chunks; arXiv 2602.18196), HGRN and moving averages
(ema), S5 and other diagonal recurrences (plain).

Backward, with y recomputed and r_{t+1} = 0 where token t+1 starts a chunk or a sequence:

    r_t = dy_t + e^{g_{t+1}} r_{t+1}          dx_t = w_t r_t          dinitial_state = e^{g_1} r_1
    dg_t = Σ_payloads e^{g_t} r_t ⊙ (y_{t−1} − x_t) ("ema")  or  e^{g_t} r_t ⊙ y_{t−1} ("plain")

Bound by bytes: with payloads of s bytes the floor is 4 + 2s per number (g and x in, y out), backward 8 + 3s (g, x, dy
in, dg, dx out). The CUDA kernels move each byte once in chunks of up to 128 tokens; longer runs read g, x, dy twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import Differentiable, define, define_differentiable, implement, resolve
from memattn.reference import gated_scan as reference

OP, STEP = "gated_scan", "gated_scan_step"
FORMS = ("ema", "plain")
EMITS = ("all", "ends", "both")
PAYLOAD = "[B, T, D/r]"  # channels tiled r ≥ 1 times over the gate's
PAIR = 2  # payloads that one kernel call carries

Payloads = Tensor | tuple[Tensor, ...]

_ARGUMENTS = "Tensor g, Tensor x, Tensor? x2, Tensor? initial_state, Tensor? initial_state2, Tensor? cu_seqlens"


# --- the ops: schemas, shapes, gradients -----------------------------------------------------------------------------


def slots(g: Tensor, cu_seqlens: Tensor | None, chunk_size: int):
    """Chunk ends per batch row. Packed sequence n from token a owns slots a//L + n + 0, 1, …"""
    if cu_seqlens is None:
        return (g.shape[1] + chunk_size - 1) // chunk_size
    return g.shape[1] // chunk_size + cu_seqlens.shape[0] - 1


def _fake(g, x, x2, initial_state, initial_state2, cu_seqlens, ema, chunk_size, emit_all, emit_ends, final):
    n = g.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    none, state = x.new_empty(0), g.new_empty(0)
    wanted = (True, x2 is not None)
    ys = (x.new_empty(g.shape) if emit_all and w else none.clone() for w in wanted)
    end = (g.shape[0], slots(g, cu_seqlens, chunk_size), g.shape[2]) if emit_ends else (0,)
    ends = (x.new_empty(end) if emit_ends and w else none.clone() for w in wanted)
    finals = (g.new_empty(n, g.shape[2]) if final and w else state.clone() for w in wanted)
    return *ys, *ends, *finals


def _backward_fake(dy, dy2, dends, dends2, dfinal, dfinal2, g, x, x2, initial_state, initial_state2, *rest):
    def like(given, empty_like):
        return empty_like.new_empty(0) if given is None else torch.empty_like(given)

    return torch.empty_like(g), torch.empty_like(x), like(x2, x), like(initial_state, g), like(initial_state2, g)


def _save(args, outputs):
    return args[:6]


def _backward(op, saved, args, grads):
    ema, chunk_size, emit_all, emit_ends, final = args[6:]
    two = saved[2] is not None
    wanted = (emit_all, emit_all and two, emit_ends, emit_ends and two, final, final and two)
    cotangents = (None if d is None or not w else d.contiguous() for d, w in zip(grads, wanted, strict=True))
    dg, *rest = op(*cotangents, *saved, ema, chunk_size)
    optional = (None if given is None else d for given, d in zip(saved[1:5], rest, strict=True))
    return dg, *optional, *(None,) * 6


FAMILY = Differentiable(
    schema=f"({_ARGUMENTS}, bool ema, int chunk_size, bool emit_all, bool emit_ends, bool output_final_state)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward_schema="(Tensor? dy, Tensor? dy2, Tensor? dends, Tensor? dends2, Tensor? dfinal_state, "
    f"Tensor? dfinal_state2, {_ARGUMENTS}, bool ema, int chunk_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    backward_fake=_backward_fake,
    outputs=6,
    save=_save,
    backward=_backward,
)
STEP_SCHEMA = (
    "(Tensor g, Tensor x, Tensor(a!) state, Tensor? restart, Tensor? state_indices, bool ema) -> Tensor"  # one payload
)


def _triton_forward():
    from memattn.kernels import gated_scan

    return gated_scan.forward


def _triton_backward():
    from memattn.kernels import gated_scan

    return gated_scan.backward


define_differentiable(f"{OP}_cpu", FAMILY)
define_differentiable(f"{OP}_triton", FAMILY)
implement(f"{OP}_triton", _triton_forward)
implement(f"{OP}_triton_backward", _triton_backward)
define_differentiable(f"{OP}_cuda", FAMILY)
for _name in ("cpu", "cuda"):
    define(f"{STEP}_{_name}", STEP_SCHEMA, lambda g, x, *rest: x.new_empty(g.shape))

_TRAINING = frozenset({"backward", "packed"})
_16_32 = (torch.float32, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda", "mps", "xpu")
_CUDA = backends.needs_native("_C_cuda")
backends.register(OP, "cuda", Limits(("cuda",), _16_32, _CUDA, None, _TRAINING))
backends.register(OP, "triton", Limits(("cuda",), _16_32, backends.needs_triton, None, _TRAINING))
backends.register(OP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), None, _TRAINING))
backends.register(OP, "chunked", Limits(_DEVICES, check.FLOATS, backends.always, None, _TRAINING))
backends.register(STEP, "cuda", Limits(("cuda",), _16_32, _CUDA, None))
backends.register(STEP, "cpu", Limits(("cpu",), check.FLOATS, backends.needs_native("_C"), None))
backends.register(STEP, "chunked", Limits(_DEVICES, check.FLOATS, backends.always, None))

_PASSED = check.Passed()
_OPS = {name: resolve(f"{OP}_{name}") for name in ("cpu", "cuda", "triton")}
_STEPS = {name: resolve(f"{STEP}_{name}") for name in ("cpu", "cuda")}


# --- the public functions --------------------------------------------------------------------------------------------


def _named(name: str, given: object, like: object) -> dict[str, Tensor]:
    """The tensors of an argument that has the structure of xs, by the names that messages use."""
    if isinstance(like, Tensor):
        return {name: given}  # type: ignore[dict-item]
    if not isinstance(given, (tuple, list)) or not isinstance(like, (tuple, list)) or len(given) != len(like):
        return {}
    return {f"{name}[{i}]": x for i, x in enumerate(given)}


def _payloads(op: str, xs: Tensor | Sequence[Tensor]) -> dict[str, Tensor]:
    named = _named("xs", xs, xs)
    if not named:
        received = "an empty tuple" if isinstance(xs, (tuple, list)) else type(xs).__name__
        raise TypeError(f"{op}: xs is {received}; expected a torch.Tensor or a tuple of at least one")
    return named


def _states(op: str, name: str, states: object, xs: object) -> dict[str, Tensor]:
    named = _named(name, states, xs)
    if not named:
        received = f"{len(states)} tensors" if isinstance(states, (tuple, list)) else type(states).__name__
        raise TypeError(f"{op}: {name} is {received}; expected a tuple like xs, one state per payload")
    return named


def _check_inputs(op: str, g: Tensor, payloads: dict[str, Tensor], form: str) -> None:
    check.rank(op, "g", g, "[B, T, D]")
    batch, length, channels = g.shape
    first = next(iter(payloads.values()))
    for name, x in payloads.items():
        check.rank(op, name, x, PAYLOAD)
        if x.shape[:2] != g.shape[:2]:
            check.shape(op, name, x, PAYLOAD, (batch, length, x.shape[2]))
        if x.shape[2] != channels and (x.shape[2] == 0 or channels % x.shape[2]):
            raise ValueError(f"{op}: {name} has {x.shape[2]} channels; expected a divisor of g's {channels}")
        check.dtype(op, name, x, check.FLOATS)
        check.dtype(op, name, x, (first.dtype,), "" if x is first else f" like {next(iter(payloads))}")
        check.device(op, name, x, g, "g")
    wide = reference.accumulate_dtype(first.dtype)
    check.dtype(op, "g", g, (wide,), f" with {check.dtype_name(first.dtype)} xs")
    check.choice(op, "form", form, FORMS)


def _check_states(op: str, states: dict[str, Tensor], layout: str, rows: int | None, g: Tensor) -> None:
    for name, state in states.items():
        check.rank(op, name, state, layout)
        check.shape(op, name, state, layout, (state.shape[0] if rows is None else rows, g.shape[2]))
        check.dtype(op, name, state, (g.dtype,), " like g")
        check.device(op, name, state, g, "g")


def _check_chunks(chunk_size: int | None, emit: str) -> None:
    check.choice(OP, "emit", emit, EMITS)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{OP}: chunk_size is {chunk_size}; expected None or at least 1")
    if chunk_size is None and emit != "all":
        raise ValueError(f"{OP}: emit is {emit!r} without chunk_size; allowed: 'all' (the last row is the final state)")


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _call(op, g, *rest):
    """The op's results; a gate above 0, which the C++ kernel finds while it reads them, is the usual ValueError."""
    if not check.values_checked(g):
        return op(g, *rest)
    try:
        return op(g, *rest)
    except RuntimeError:
        check.log_gate(OP, "g", g)
        raise


def _run(name, g, payloads, states, cu_seqlens, form, chunk_size, emit, output_final_state):
    """ys, ends and finals of all payloads, two a call: the gate is read once for both."""
    ys: list[Tensor] = []
    ends: list[Tensor] = []
    finals: list[Tensor] = []
    g, cu_seqlens = check.contiguous(g, cu_seqlens)
    for i in range(0, len(payloads), PAIR):
        pair = (*payloads[i : i + PAIR], None)[:PAIR]
        before = (None,) * PAIR if states is None else (*states[i : i + PAIR], None)[:PAIR]
        settings = (form == "ema", chunk_size or 0, emit != "ends", emit != "all", output_final_state)
        results = _call(_OPS[name], g, *check.contiguous(*pair, *before), cu_seqlens, *settings)
        live = sum(x is not None for x in pair)
        for kind, gathered in enumerate((ys, ends, finals)):
            gathered += results[PAIR * kind : PAIR * kind + live]
    return (
        tuple(ys) if emit != "ends" else None,
        tuple(ends) if emit != "all" else None,
        tuple(finals) if output_final_state else None,
    )


def gated_scan(
    g: Tensor,
    xs: Payloads,
    *,
    form: str = "ema",
    chunk_size: int | None = None,
    emit: str = "all",
    initial_state: Payloads | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Payloads | None, Payloads | None, Payloads | None]:
    """Gated scan over whole sequences; the module docstring has the equations and sources.

    ===============  ==================  =====================================================================
    argument         shape               dtype and meaning
    ===============  ==================  =====================================================================
    g                [B, T, D]           natural-log decay ≤ 0 (−inf forgets all), float32 (float64 with float64 xs)
    xs               [B, T, D] or        float32, bfloat16, float16 or float64; a tensor, or a tuple of some that share
                     [B, T, D/r]         the gate. D/r channels are tiled: gate channel c reads payload channel
                                         c mod D/r, so with heads of d channels head h reads group h mod G
    form                                 "ema": w = 1 − e^g, computed without cancellation; "plain": w = 1
    chunk_size                           L ≥ 1: restart from zero every L tokens of a sequence; None never
    emit                                 "all" rows, the "ends" of the chunks only, or "both"; ends need chunk_size
    initial_state    [N, D]              float32 (float64), one per payload like xs; enters a sequence's first chunk
    cu_seqlens       [N+1]               int32/int64 bounds of sequences packed along T, then B = 1; else N = B
    ===============  ==================  =====================================================================

    T ≥ 0, B ≥ 0 and zero-length sequences are legal; any D, any strides. Sums are float32 (float64).

    Returns (ys, ends, final_state), each None if not asked for, else a tensor where xs is one and a tuple where xs is
    a tuple. ys [B, T, D] in xs' dtype. ends: ys at the last token of each chunk, a ragged last one included,
    [B, ⌈T/L⌉, D]; or packed [1, T//L + N, D], where chunk c of sequence n is in slot cu_seqlens[n]//L + n + c and
    unused slots hold 0. final_state [N, D] is the last row in float32 (float64), not yet restarted. To continue one
    inside a chunk, run the rest of that chunk from final_state without chunk_size; at a chunk's end, start afresh.

    Differentiable once in g, xs and initial_state, through all results. NaN and inf propagate forward within their
    chunk and channel. Raises ValueError (shapes, values), TypeError (dtypes, structure), BackendError (a named backend
    that cannot serve).
    """
    payloads = _payloads(OP, xs)
    states = {} if initial_state is None else _states(OP, "initial_state", initial_state, xs)
    signature = _PASSED.signature(g, *payloads.values(), None, *states.values(), cu_seqlens, form, chunk_size, emit)
    if signature not in _PASSED:
        _check_inputs(OP, g, payloads, form)
        _check_chunks(chunk_size, emit)
        if cu_seqlens is not None:
            check.tensor(OP, "cu_seqlens", cu_seqlens)
            check.device(OP, "cu_seqlens", cu_seqlens, g, "g")
            check.cu_seqlens_layout(OP, cu_seqlens, g)
        _check_states(OP, states, "[N, D]", g.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, g)
        _PASSED.add(signature)
    if cu_seqlens is not None:
        check.cu_seqlens_values(OP, cu_seqlens, g)
    tensors, before = tuple(payloads.values()), tuple(states.values()) or None
    train = _needs_grad(g, *tensors, *(before or ()))
    features = (("backward",) if train else ()) + (("packed",) if cu_seqlens is not None else ())
    request = Request(g.device.type, tensors[0].dtype, features=frozenset(features))
    name = backends.choose(OP, request, backend, lambda: check.describe(g=g, **payloads))
    if name != "cpu":  # whose kernel looks at the gates while it reads them
        check.log_gate(OP, "g", g)
    if name == "chunked":
        results = reference.chunked(
            g, tensors, form=form, chunk_size=chunk_size, emit=emit, initial_state=before,
            output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        )  # fmt: skip
    else:
        results = _run(name, g, tensors, before, cu_seqlens, form, chunk_size, emit, output_final_state)
    if not isinstance(xs, Tensor):
        return results
    ys, ends, final = (None if kind is None else kind[0] for kind in results)
    return ys, ends, final


def gated_scan_step(
    g: Tensor,
    xs: Payloads,
    state: Payloads,
    *,
    form: str = "ema",
    restart: Tensor | None = None,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Payloads:
    """One or a few tokens of the scan, the pool of states updated in place. Inference only.

    g [B, t, D] and xs [B, t, D] or [B, t, D/r], t ≥ 1, as in `gated_scan`. state [P, D] float32 (float64 with float64
    xs), contiguous, one per payload like xs, is mutated. Batch row b owns state row state_indices[b] (int32/int64 [B],
    distinct), or row b when None (then P = B). Index −1 is padding: its output is 0 and nothing is written. restart
    ([B] bool): rows whose state counts as zero, whatever it holds, because a chunk starts with their first token.
    Returns ys [B, t, D] in xs' dtype, structured like xs. No host synchronisation.

    Raises ValueError, TypeError, BackendError as `gated_scan`; RuntimeError when an input requires grad.
    """
    payloads, states = _payloads(STEP, xs), _states(STEP, "state", state, xs)
    signature = _PASSED.signature(g, *payloads.values(), None, *states.values(), restart, state_indices, form)
    if signature not in _PASSED:
        _check_inputs(STEP, g, payloads, form)
        if g.shape[1] < 1:
            raise ValueError(f"{STEP}: g has {g.shape[1]} tokens; expected at least 1")
        _check_states(STEP, states, "[P, D]", g.shape[0] if state_indices is None else None, g)
        if restart is not None:
            check.shape(STEP, "restart", restart, "[B]", (g.shape[0],))
            check.dtype(STEP, "restart", restart, (torch.bool,))
            check.device(STEP, "restart", restart, g, "g")
        if state_indices is not None:
            check.tensor(STEP, "state_indices", state_indices)
            check.device(STEP, "state_indices", state_indices, g, "g")
            check.state_indices_layout(STEP, state_indices, g.shape[0], g)
        _PASSED.add(signature)
    for name, pool in states.items():
        if not pool.is_contiguous():
            raise ValueError(
                f"{STEP}: {name} has strides {list(pool.stride())}; it is updated in place, so it must be contiguous"
            )
        if state_indices is not None:
            check.state_indices_values(STEP, state_indices, pool.shape[0])
    check.log_gate(STEP, "g", g)
    if _needs_grad(g, *chain(payloads.values(), states.values())):
        raise RuntimeError(
            f"{STEP}: an input requires grad; the step is for inference only, "
            "use gated_scan or call it under torch.no_grad()"
        )
    request = Request(g.device.type, next(iter(payloads.values())).dtype)
    choice = backends.choose(STEP, request, backend, lambda: check.describe(g=g, **payloads, **states))
    pairs = zip(payloads.values(), states.values(), strict=True)
    if choice == "chunked":
        ys = [reference.step(g, x, pool, form=form, restart=restart, state_indices=state_indices) for x, pool in pairs]
    else:
        gate, again, rows = check.contiguous(g, restart, state_indices)
        ys = [_STEPS[choice](gate, x.contiguous(), pool, again, rows, form == "ema") for x, pool in pairs]
    return ys[0] if isinstance(xs, Tensor) else tuple(ys)
