"""RAT: a gated average inside chunks, softmax over what they leave. RAT+: one average, dilated attention.

Tokens t of a sequence have positions p = 0, 1, …; keys and values share one gate per channel, so K = V here:

    k̃_p = e^{g_p} ⊙ k̃_{p−1} + (1 − e^{g_p}) ⊙ k_p          ṽ_p = e^{g_p} ⊙ ṽ_{p−1} + (1 − e^{g_p}) ⊙ v_p
    o_p = Σ_j softmax_j(scale · R(q_p)·R(k̃_j)) ṽ_j          over the entries j seen and the token's own, j = p

    RAT (chunk_size L):    k̃, ṽ start from zero at p mod L = 0; the last token of every earlier chunk is seen;
                           R turns by the chunk's index ⌊p/L⌋ (rotary, half-split)
    RAT+ (dilation D):     k̃, ṽ run through the whole sequence; j ≤ p is seen if (j + 1) mod D = 0, p − j < window
                           or j < prefix_len; R turns by p

Sources: RAT, Wei et al. 2025 (arXiv 2507.04416; repository CLAIRE-Labo/RAT); RAT+, arXiv 2602.18196 (repository
wimh966/rat-plus), whose window W counts p − j ≤ W: here that is window = W + 1. L = 1 with g = −inf is attention,
L ≥ T a gated average read as it is.

Backward keeps q, k, v, g, o, the log-sum-exp and the entries, and recomputes the average. With P_pj the weights,
dS = P ⊙ (dO Ṽᵀ − Δ), Δ_p = dO_p·O_p, the own entry and the others alike; an entry's gradient joins its token's before

    r_p = dk̃_p + e^{g_{p+1}} r_{p+1}     dk_p = (1 − e^{g_p}) r_p     dg_p = e^{g_p} r_p (k̃_{p−1} − k_p)   and with v.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops import _rat_stages
from memattn.ops._library import Differentiable, define, define_differentiable, resolve
from memattn.ops._sequences import sequences
from memattn.reference import rat_attention as reference
from memattn.reference.rat_attention import Rule
from memattn.reference.sequences import accumulate_dtype
from memattn.state import MemoryState

OP, STEP = "rat_attention", "rat_attention_step"
HEAD_MAPS = ("gqa", "tile")


class RATState(MemoryState):
    """What RAT and RAT+ carry on: entries, the running average, the position.

    keys, values [N, C, HV, K] in q's dtype: the entry that token (c + 1)·L − 1 (RAT+: D) left is row c, rotated.
    running_key, running_value [N, HV, K] float32 (float64 with float64 q), not rotated. length [N] int64: tokens seen.
    local_keys, local_values [N, prefix_len + window − 1, HV, K] in q's dtype, RAT+ with a prefix or a window only:
    first the prefix, then token p of the window in row prefix_len + p mod (window − 1).
    """

    fields: ClassVar[tuple[str, ...]] = (
        "keys", "values", "running_key", "running_value", "length", "local_keys", "local_values",
    )  # fmt: skip

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        running_key: Tensor,
        running_value: Tensor,
        length: Tensor,
        local_keys: Tensor | None = None,
        local_values: Tensor | None = None,
    ) -> None:
        self.keys, self.values = keys, values
        self.running_key, self.running_value = running_key, running_value
        self.length = length
        self.local_keys, self.local_values = local_keys, local_values
        self._room = 0  # tokens that surely have room, as far as the host knows

    def make_room(self, tokens: int, stride: int) -> None:
        """Rows for the entries of `tokens` more tokens, one entry every `stride`, at least doubling what there is.

        Reads the lengths once in a while. Does nothing while compiling or capturing a CUDA graph.
        """
        length = self.length
        if torch.compiler.is_compiling() or length.is_meta or not length.numel():
            return
        if length.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        if self._room < tokens:
            longest, capacity = int(length.max()), self.keys.shape[1]
            more = max((longest + tokens) // stride - capacity, 0)
            if more:
                more = max(more, capacity)
                self.keys, self.values = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (self.keys, self.values))
            self._room = (capacity + more + 1) * stride - 1 - longest
        self._room -= tokens

    def copy_(self, other: RATState) -> RATState:
        """Writes `other` into this state's tensors. It may have fewer rows of entries, or more that are not used."""
        if type(other) is not type(self):
            raise TypeError(f"copy_: other is {type(other).__name__}; expected {type(self).__name__}")
        mine, theirs = self.keys.shape[1], other.keys.shape[1]
        if theirs > mine and check.values_checked(other.keys) and bool(other.keys[:, mine:].any()):
            raise ValueError(f"copy_: other holds more than the {mine} entries that this state has rows for")
        fit = (0, 0, 0, 0, 0, mine - theirs)
        super().copy_(RATState(F.pad(other.keys, fit), F.pad(other.values, fit), *other.parts()[2:]))
        self._room = 0
        return self

    def parts(self) -> tuple[Any, ...]:
        """Its tensors in the order of `fields`."""
        return tuple(getattr(self, name) for name in self.fields)


# --- the ops: schemas, shapes, gradients -----------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor? keys, Tensor? values, Tensor? running_key, Tensor? running_value, "
    "Tensor? local_keys, Tensor? local_values, Tensor? length, Tensor? cu_seqlens"  # local rows in order of position
)
_TENSORS = _ARGUMENTS.count(",") + 1
_DIFFERENTIABLE = 10
# rope_base 0: none.
_SETTINGS = (
    "int restart, int stride, int unit, int window, int prefix_len, float rope_base, bool tile_heads, float scale"
)


def _entries(q: Tensor, v: Tensor, keys: Tensor | None, cu_seqlens: Tensor | None, stride: int):
    """Shape of all entries: of the state and new. Packed sequence n from token a has rows a//stride + n·(C + 1) + …"""
    room, held = (q.shape[1] + stride - 1) // stride, 0 if keys is None else keys.shape[1]
    if cu_seqlens is None:
        return (q.shape[0], held + room, *v.shape[2:])
    return (1, q.shape[1] // stride + (cu_seqlens.shape[0] - 1) * (held + 1), *v.shape[2:])


def _local_rows(q: Tensor, v: Tensor, local_keys: Tensor | None, cu_seqlens: Tensor | None, window, prefix_len):
    """Shape of all local rows: of the state and new. Packed sequence n from token a has rows a + n·R + …"""
    held = 0 if local_keys is None else local_keys.shape[1]
    if window == 1 and prefix_len == 0:
        return (q.shape[0], 0, *v.shape[2:])
    return (q.shape[0], q.shape[1] + held * (1 if cu_seqlens is None else cu_seqlens.shape[0] - 1), *v.shape[2:])


def _fake(
    q, k, v, g, keys, values, running_key, running_value, local_keys, local_values, length, cu_seqlens,
    restart, stride, unit, window, prefix_len, *rest,
):  # fmt: skip
    entries = _entries(q, v, keys, cu_seqlens, stride)
    running = (sequences(q, cu_seqlens), *v.shape[2:])
    local = _local_rows(q, v, local_keys, cu_seqlens, window, prefix_len)
    return (
        torch.empty_like(v), v.new_empty(entries), v.new_empty(entries), g.new_empty(running), g.new_empty(running),
        v.new_empty(local), v.new_empty(local), g.new_empty(v.shape[:3]),
    )  # fmt: skip


def _backward_fake(do, *rest):
    lse, given = rest[11], rest[12 : 12 + _DIFFERENTIABLE]
    return tuple(lse.new_empty(0) if x is None else torch.empty_like(x) for x in given)


def _save(args, outputs):
    o, keys, values, _, _, local_keys, local_values, lse = outputs
    return (*args[:_TENSORS], o, keys, values, local_keys, local_values, lse)


def _backward(op, saved, args, grads):
    tensors, results = saved[:_TENSORS], saved[_TENSORS:]
    o = results[0]
    do = torch.zeros_like(o) if grads[0] is None else grads[0].contiguous()
    cotangents = (None if d is None else d.contiguous() for d in grads[1:7])
    gradients = op(do, *cotangents, *results, *tensors, *args[_TENSORS:])
    given = tensors[:_DIFFERENTIABLE]
    gradients = (None if x is None else dx for x, dx in zip(given, gradients, strict=True))
    return *gradients, *(None,) * (len(args) - _DIFFERENTIABLE)


FAMILY = Differentiable(
    schema=f"({_ARGUMENTS}, {_SETTINGS}) -> ({', '.join(['Tensor'] * 8)})",
    backward_schema="(Tensor do, Tensor? dout_keys, Tensor? dout_values, Tensor? dfinal_key, Tensor? dfinal_value, "
    "Tensor? dlocal_keys, Tensor? dlocal_values, Tensor o, Tensor out_keys, Tensor out_values, Tensor out_local_keys, "
    f"Tensor out_local_values, Tensor lse, {_ARGUMENTS}, {_SETTINGS})"
    f" -> ({', '.join(['Tensor'] * _DIFFERENTIABLE)})",
    fake=_fake,
    backward_fake=_backward_fake,
    outputs=7,
    save=_save,
    backward=_backward,
)
STEP_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor g, Tensor(a!) keys, Tensor(b!) values, Tensor(c!) running_key, "
    "Tensor(d!) running_value, Tensor(f!)? local_keys, Tensor(h!)? local_values, Tensor(e!) length, "
    f"Tensor? state_indices, {_SETTINGS}) -> Tensor"
)
define_differentiable(f"{OP}_cpu", FAMILY)
define(f"{STEP}_cpu", STEP_SCHEMA, lambda q, k, v, *rest: torch.empty_like(v))

_TRAINING = frozenset({"backward", "packed"})
_LOCAL, _LOCAL_STATE = frozenset({"window or prefix"}), frozenset({"window or prefix from a state"})
_ANYWHERE = ("cpu", "cuda", "xpu")
_NATIVE = backends.needs_native("_C")
_16_32 = (torch.float32, torch.bfloat16, torch.float16)
_ALL = _TRAINING | _LOCAL | _LOCAL_STATE
backends.register(OP, "triton", Limits(("cuda",), _16_32, backends.needs_triton, features=_TRAINING | _LOCAL))
backends.register(OP, "cpu", Limits(("cpu",), check.FLOATS, _NATIVE, features=_ALL))
backends.register(OP, "chunked", Limits(_ANYWHERE, check.FLOATS, backends.always, features=_ALL))
backends.register(STEP, "cpu", Limits(("cpu",), check.FLOATS, _NATIVE, features=_LOCAL))
backends.register(STEP, "chunked", Limits(_ANYWHERE, check.FLOATS, backends.always, features=_LOCAL))

_PASSED = check.Passed()
_CPU, _CPU_STEP = resolve(f"{OP}_cpu"), resolve(f"{STEP}_cpu")


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_rule(op, chunk_size, dilation, window, prefix_len):
    if (chunk_size is None) == (dilation is None):
        raise ValueError(
            f"{op}: chunk_size is {chunk_size} and dilation is {dilation}; expected one of them, "
            "chunk_size for RAT or dilation for RAT+"
        )
    for name, size, least in (
        ("chunk_size", chunk_size, 1), ("dilation", dilation, 1), ("window", window, 0), ("prefix_len", prefix_len, 0)
    ):  # fmt: skip
        if size is not None and (isinstance(size, bool) or not isinstance(size, (int, torch.SymInt)) or size < least):
            raise ValueError(f"{op}: {name} is {size!r}; expected an integer ≥ {least}")
    for name, size in (("window", window), ("prefix_len", prefix_len)):
        if chunk_size is not None and size:
            raise ValueError(f"{op}: {name} is {size} with chunk_size; a window and a prefix need dilation (RAT+)")


def _check_inputs(op, q, k, v, g, rope_base, head_map, scale):
    check.value_heads(op, q, k, v)
    heads, dim = v.shape[2:]
    if dim != q.shape[3]:
        raise ValueError(f"{op}: v has head dimension {dim}; expected {q.shape[3]} like k, which shares its gate")
    check.shape(op, "g", g, "[B, T, HV, K]", v.shape)
    check.dtype(op, "g", g, (accumulate_dtype(q.dtype),), f" with {check.dtype_name(q.dtype)} q")
    check.device(op, "g", g, q, "q")
    check.choice(op, "head_map", head_map, HEAD_MAPS)
    if rope_base is not None and not 1 < rope_base < float("inf"):
        raise ValueError(f"{op}: rope_base is {rope_base!r}; expected a finite number > 1 or None")
    if rope_base is not None and dim % 2:
        raise ValueError(f"{op}: head dimension K is {dim}; rotary positions need an even one (or rope_base=None)")
    if scale is not None and not 0 < scale < float("inf"):
        raise ValueError(f"{op}: scale is {scale!r}; expected a finite number > 0 or None")


def _check_state(op, name, state, rule, n, v):
    if not isinstance(state, RATState):
        raise TypeError(f"{op}: {name} is {type(state).__name__}; expected RATState")
    rows, (heads, dim), wide = "P" if op == STEP else "N", v.shape[2:], accumulate_dtype(v.dtype)
    n = state.length.shape[0] if n is None else n
    capacity = state.keys.shape[1] if state.keys.dim() == 4 else 0
    expected = [
        ("keys", capacity, v.dtype), ("values", capacity, v.dtype),
        ("running_key", None, wide), ("running_value", None, wide),
        ("local_keys", rule.local, v.dtype), ("local_values", rule.local, v.dtype),
    ]  # fmt: skip
    for part, size, dtype in expected:
        x = getattr(state, part)
        if part.startswith("local") and (x is None) != (size == 0):
            raise ValueError(
                f"{op}: {name}.{part} is {'None' if x is None else 'given'}; prefix_len {rule.prefix} and window "
                f"{rule.window} keep {size} local rows"
            )
        if x is None:
            continue
        layout, shape = (f"[{rows}, HV, K]", ()) if size is None else (f"[{rows}, C, HV, K]", (size,))
        check.shape(op, f"{name}.{part}", x, layout, (n, *shape, heads, dim))
        check.dtype(op, f"{name}.{part}", x, (dtype,), f" with {check.dtype_name(v.dtype)} q")
        check.device(op, f"{name}.{part}", x, v, "q")
    check.shape(op, f"{name}.length", state.length, f"[{rows}]", (n,))
    check.dtype(op, f"{name}.length", state.length, (torch.int64,))
    check.device(op, f"{name}.length", state.length, v, "q")


def _check_lengths(op, name, state, rule, tokens):
    """Entries that the lengths imply fit the rows; `tokens` are about to be added to them."""
    if not check.values_checked(state.length) or not state.length.numel():
        return
    low, high = (int(x) for x in state.length.aminmax())
    needed, capacity = (high + tokens) // rule.stride, state.keys.shape[1]
    if low < 0 or needed > capacity:
        raise ValueError(
            f"{op}: {name}.length holds {low}..{high}, and with {tokens} new tokens that makes {needed} entries; "
            f"{name}.keys has room for {capacity}"
        )


# --- the public functions --------------------------------------------------------------------------------------------


def rat_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    chunk_size: int | None,
    rope_base: float | None = 10000.0,
    dilation: int | None = None,
    window: int = 0,
    prefix_len: int = 0,
    head_map: str = "gqa",
    scale: float | None = None,
    initial_state: RATState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, RATState | None]:
    """RAT (chunk_size) or RAT+ (dilation) over whole sequences; the module docstring has the equations and sources.

    ===============  ==================  =====================================================================
    argument         shape               dtype and meaning
    ===============  ==================  =====================================================================
    q, k             [B, T, H, K]        float32, bfloat16, float16 or float64, the same for q, k, v
    v                [B, T, HV, K]       HV a multiple of H. After the average every value head has a key of its own
    g                [B, T, HV, K]       natural-log gate ≤ 0 per channel (−inf forgets), float32 (float64 with
                                         float64 q): pass logsigmoid(x)
    chunk_size                           RAT's L ≥ 1; None for RAT+
    dilation                             RAT+'s D ≥ 1, which 1 makes dense; None for RAT
    window                               RAT+: p − j < window; 0 and 1 mean the token's own entry, always seen
    prefix_len                           RAT+: tokens j < prefix_len stay seen
    rope_base                            base of the rotary angles, None for no positions
    head_map                             value head h reads q, k head h // (HV/H) ("gqa") or h mod H ("tile", RAT's own)
    initial_state    N rows              RATState of the same setting; None is empty
    cu_seqlens       [N+1]               int32/int64 bounds of sequences packed along T, then B = 1; else N = B
    ===============  ==================  =====================================================================

    T ≥ 0 and zero-length sequences are legal; K in 16..256, even with rope_base. `scale` None means K**-0.5.

    Returns (o [B, T, HV, K] in q's dtype, RATState or None). The final state has C + ⌈T/L⌉ rows of entries (RAT+: D),
    C those of the initial one, unused ones 0; packed, T is the longest sequence where the lengths may be looked at.
    Sequences may be split at any token and continued from the state; rows may be at different positions.
    Differentiable once in q, k, v, g and the initial state, through o and the final state. Entries are kept in q's
    dtype, averages, scores and sums in float32 (float64).

    Raises ValueError (shapes, values), TypeError (dtypes), BackendError (a named backend that cannot serve).
    """
    _check_rule(OP, chunk_size, dilation, window, prefix_len)
    rule = Rule.of(chunk_size, dilation, window, prefix_len)
    parts = (None,) * 7 if initial_state is None else _parts(OP, "initial_state", initial_state)
    settings = (chunk_size, dilation, window, prefix_len, rope_base, head_map, scale)
    signature = _PASSED.signature(q, k, v, g, *parts, cu_seqlens, *settings)
    if signature not in _PASSED:
        _check_inputs(OP, q, k, v, g, rope_base, head_map, scale)
        if cu_seqlens is not None:
            check.tensor(OP, "cu_seqlens", cu_seqlens)
            check.cu_seqlens_layout(OP, cu_seqlens, q)
        if initial_state is not None:
            _check_state(OP, "initial_state", initial_state, rule, sequences(q, cu_seqlens), v)
        _PASSED.add(signature)
    check.log_gate(OP, "g", g)
    if cu_seqlens is not None:
        check.cu_seqlens_values(OP, cu_seqlens, q)
    if initial_state is not None:
        _check_lengths(OP, "initial_state", initial_state, rule, 0)
    train = check.needs_grad(q, k, v, g, *(x for x in parts if x is not None))
    features = (("backward",) if train else ()) + (("packed",) if cu_seqlens is not None else ())
    features += (*_LOCAL,) if rule.local else ()
    features += (*_LOCAL_STATE,) if rule.local and initial_state is not None else ()
    request = Request(q.device.type, q.dtype, (("K", q.shape[3]),), frozenset(features))
    name = backends.choose(OP, request, backend, lambda: check.describe(q=q, k=k, v=v, g=g))
    if name == "chunked":
        with _no_autocast(q):
            o, final = reference.chunked(
                q, k, v, g, chunk_size=chunk_size, rope_base=rope_base, dilation=dilation, window=window,
                prefix_len=prefix_len, head_map=head_map, scale=scale, cu_seqlens=cu_seqlens,
                initial_state=None if initial_state is None else parts, output_final_state=output_final_state,
            )  # fmt: skip
        return o, None if final is None else RATState(*final)
    if name == "triton":
        form = _rat_stages.Form(rule, rope_base, head_map, q.shape[3] ** -0.5 if scale is None else float(scale))
        before = None if initial_state is None else parts
        with _no_autocast(q):
            room = rule.kept(_longest(q, cu_seqlens))
            o, final = _rat_stages.forward(q, k, v, g, before, cu_seqlens, form, output_final_state, room)
        return o, None if final is None else RATState(*final)
    held = tuple(_in_order(rule, x, parts[4]) for x in parts[5:])
    tensors = check.contiguous(q, k, v, g, *parts[:4], *held, parts[4], cu_seqlens)
    o, *results, _ = _CPU(*tensors, *_numbers(rule, rope_base, head_map, scale, q))
    if not output_final_state:
        return o, None
    return o, _final_state(rule, results, q, parts, cu_seqlens)


def _no_autocast(q):
    return torch.autocast("cpu" if q.is_meta else q.device.type, enabled=False)


def _parts(op, name, state):
    if not isinstance(state, RATState):
        raise TypeError(f"{op}: {name} is {type(state).__name__}; expected RATState")
    return state.parts()


def _numbers(rule, rope_base, head_map, scale, q):
    """The numbers of the schema."""
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return (
        rule.restart,
        rule.stride,
        rule.unit,
        rule.window,
        rule.prefix,
        float(rope_base or 0),
        head_map == "tile",
        scale,
    )


def _longest(q, cu_seqlens):
    """Tokens of the longest sequence, or a bound where the lengths may not be looked at."""
    if cu_seqlens is None or not check.values_checked(cu_seqlens):
        return q.shape[1]
    return int(cu_seqlens.diff().max())


def _in_order(rule, rows, length):
    """Local rows of a state with the window's part in order of position, as the kernel reads it."""
    if rows is None or not rule.recent:
        return rows
    slot = torch.arange(rule.local, device=rows.device)
    position = slot + (length[:, None] - rule.local).clamp(min=0)
    row = torch.where(slot < rule.prefix, slot, rule.prefix + position % rule.recent)
    return rows.gather(1, row[..., None, None].expand(-1, -1, *rows.shape[2:]))


def _kept_rows(rule, rows, start, after, held, first):
    """The local rows of a state of sequences at `after`; `first` is the row where each one's begin."""
    n, local = start.shape[0], rule.local
    if not rows.shape[1]:
        return rows.new_zeros(n, local, *rows.shape[2:])
    slot = torch.arange(local, device=rows.device)
    position = slot.expand(n, -1)
    if rule.recent:
        ring = rule.recent_position(slot - rule.prefix, after[:, None])
        position = torch.where(slot < rule.prefix, position, ring)
    shift = (start[:, None] - held).clamp(min=0)
    row = first[:, None] + torch.where(position < rule.prefix, position, position - shift)
    used = (position >= 0) & (position < after[:, None])
    flat = rows.flatten(0, 1)
    return torch.where(used[..., None, None], flat[row.clamp(0, flat.shape[0] - 1)], 0)


def _final_state(rule, results, q, before, cu_seqlens):
    """The kernel's results as a state; entries of packed sequences get rows of their own."""
    keys, values, key, value, local_keys, local_values = results
    n, held = sequences(q, cu_seqlens), 0 if before[0] is None else before[0].shape[1]
    start = torch.zeros(n, dtype=torch.int64, device=q.device) if before[4] is None else before[4]
    after = start + (q.shape[1] if cu_seqlens is None else cu_seqlens.diff())
    local: tuple[Tensor | None, ...] = (None, None)
    if rule.local:
        kept = 0 if before[5] is None else rule.local
        index = torch.arange(n, device=q.device)
        first = index * local_keys.shape[1] if cu_seqlens is None else cu_seqlens[:-1].long() + index * kept
        local = tuple(_kept_rows(rule, x, start, after, kept, first) for x in (local_keys, local_values))
    if cu_seqlens is None:
        return RATState(keys, values, key, value, after, *local)
    slot = torch.arange(held + rule.kept(_longest(q, cu_seqlens)), device=q.device)
    first = cu_seqlens[:-1].long() // rule.stride + torch.arange(n, device=q.device) * (held + 1)
    row = (first[:, None] + slot).clamp(max=max(keys.shape[1] - 1, 0))
    used = (slot < (after // rule.stride)[:, None])[..., None, None]
    keys, values = (torch.where(used, x[0][row], 0) for x in (keys, values))
    return RATState(keys, values, key, value, after, *local)


def rat_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    state: RATState,
    *,
    chunk_size: int | None,
    rope_base: float | None = 10000.0,
    dilation: int | None = None,
    window: int = 0,
    prefix_len: int = 0,
    head_map: str = "gqa",
    scale: float | None = None,
    state_indices: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One or a few tokens of `rat_attention`, the pool of states updated in place. Inference only.

    q, k, v, g with t ≥ 1 tokens and the settings as in `rat_attention`. `state` has P rows, contiguous tensors and room
    for the entries to come: the one that token (c + 1)·L − 1 (RAT+: D) leaves goes to row c of state.keys, and is lost
    where there is no such row (an error in eager calls on the CPU). Batch row b owns state row state_indices[b]
    (int32/int64 [B], distinct), or row b when None (then P = B). Index −1 is padding: its output is 0 and nothing is
    written. Returns o [B, t, HV, K] in q's dtype. No host synchronisation.

    Raises as `rat_attention`; RuntimeError when an input requires grad.
    """
    _check_rule(STEP, chunk_size, dilation, window, prefix_len)
    rule, parts = Rule.of(chunk_size, dilation, window, prefix_len), _parts(STEP, "state", state)
    settings = (chunk_size, dilation, window, prefix_len, rope_base, head_map, scale)
    signature = _PASSED.signature(q, k, v, g, *parts, state_indices, *settings, STEP)
    if signature not in _PASSED:
        _check_inputs(STEP, q, k, v, g, rope_base, head_map, scale)
        if q.shape[1] < 1:
            raise ValueError(f"{STEP}: q has {q.shape[1]} tokens; expected at least 1")
        _check_state(STEP, "state", state, rule, q.shape[0] if state_indices is None else None, v)
        if state_indices is not None:
            check.state_indices_layout(STEP, state_indices, q.shape[0], q)
        _PASSED.add(signature)
    for part in parts:
        if part is not None:
            check.in_place(STEP, part)
    check.log_gate(STEP, "g", g)
    if state_indices is not None:
        check.state_indices_values(STEP, state_indices, state.batch)
    _check_lengths(STEP, "state", state, rule, q.shape[1])
    check.inference_only(STEP, OP, q, k, v, g, *parts)
    features = frozenset({"window or prefix"}) if rule.local else frozenset()
    request = Request(q.device.type, q.dtype, (("K", q.shape[3]),), features)
    name = backends.choose(STEP, request, backend, lambda: check.describe(q=q, k=k, v=v, g=g))
    if name == "chunked":
        with _no_autocast(q), torch.no_grad():
            return reference.step(
                q, k, v, g, parts, chunk_size=chunk_size, rope_base=rope_base, dilation=dilation, window=window,
                prefix_len=prefix_len, head_map=head_map, scale=scale, state_indices=state_indices,
            )  # fmt: skip
    rows = None if state_indices is None else state_indices.contiguous()
    return _CPU_STEP(
        *check.contiguous(q, k, v, g),
        *parts[:4],
        *parts[5:],
        parts[4],
        rows,
        *_numbers(rule, rope_base, head_map, scale, q),
    )
