"""Cases, relations and planted bugs of RAT attention, for any op with the signature of `rat_attention`."""

# ruff: noqa: E501 (tables, one case a line)
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memattn.ops import RATState
from memattn.reference import rat_attention as reference
from memattn.reference.rat_attention import Rule
from support import relations
from support.compare import evaluate, to_float64
from support.relations import assert_near, assert_same

TOLERANCE = 5e-6
CHECKS: dict[str, Callable] = {}
STATE = RATState.fields


@dataclass(frozen=True)
class Case:
    """One input. `lengths` packs sequences along T; `start`: positions at which the sequences go on, from a state."""

    name: str
    batch: int = 2
    length: int = 37
    heads: int = 2
    value_heads: int = 4
    dim: int = 16
    lengths: tuple[int, ...] | None = None
    start: tuple[int, ...] | None = None
    chunk_size: int | None = 8
    dilation: int | None = None
    window: int = 0
    prefix_len: int = 0
    rope_base: float | None = 10000.0
    head_map: str = "gqa"
    scale: float | None = None
    decay: float = 1.0  # g is uniform in [−decay, 0]

    @property
    def rule(self) -> Rule:
        """The settings as positions see them."""
        return Rule.of(self.chunk_size, self.dilation, self.window, self.prefix_len)

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = False) -> dict[str, object]:
        """Keyword arguments of `flat(op)`, the same values whatever the dtype (before rounding)."""
        generator = torch.Generator().manual_seed(0)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        batch, length = (self.batch, self.length) if self.lengths is None else (1, sum(self.lengths))

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return drawn.to(dtype).to(device).requires_grad_(grad)

        gate = -self.decay * torch.rand(
            batch, length, self.value_heads, self.dim, generator=generator, dtype=torch.float64
        )
        tensors: dict[str, object] = {
            "q": normal(batch, length, self.heads, self.dim),
            "k": normal(batch, length, self.heads, self.dim),
            "v": normal(batch, length, self.value_heads, self.dim),
            "g": gate.to(wide).to(device).requires_grad_(grad),
        }
        if self.start is not None:
            start = torch.tensor(self.start, dtype=torch.int64, device=device)
            n, capacity = len(self.start), max(self.start, default=0) // self.rule.stride + 1
            used = torch.arange(capacity, device=device) < (start // self.rule.stride)[:, None]
            for name in ("keys", "values"):
                entries = normal(n, capacity, self.value_heads, self.dim).detach()
                tensors[name] = torch.where(used[..., None, None], entries, 0).requires_grad_(grad)
            for name in ("running_key", "running_value"):
                tensors[name] = normal(n, self.value_heads, self.dim, dtype=wide)
            tensors["length"] = start
        bounds = None
        if self.lengths is not None:
            bounds = torch.tensor([0, *torch.tensor(self.lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
        return {**tensors, "cu_seqlens": bounds, **self.settings()}

    def settings(self) -> dict[str, object]:
        """The keyword arguments that are no tensors."""
        names = ("chunk_size", "dilation", "window", "prefix_len", "rope_base", "head_map", "scale")
        return {name: getattr(self, name) for name in names}


def flat(op: Callable) -> Callable:
    """`op` with the state's tensors as arguments of their own, its final state as one vector per sequence."""

    def joined(*, output_final_state=True, **arguments):
        parts = [arguments.pop(name, None) for name in STATE]
        state = None if parts[0] is None else RATState(*parts)
        o, final = op(**arguments, initial_state=state, output_final_state=True)
        wide = final.running_key.dtype
        rows = [x.to(wide).flatten(1) for x in final.parts() if x is not None and x.dim() > 1]
        return o, torch.cat(rows, 1)

    return joined


def as_op(form: Callable) -> Callable:
    """`loop` or `chunked` of the reference with the states of the op."""

    def op(*, initial_state=None, **arguments):
        o, final = form(initial_state=None if initial_state is None else initial_state.parts(), **arguments)
        return o, None if final is None else RATState(*final)

    return op


definition = as_op(reference.loop)


def comparator(dtype: torch.dtype) -> Callable:
    """The plain torch form with the rounding points of a kernel for `dtype`."""
    rounding = dtype if dtype in (torch.bfloat16, torch.float16) else None
    return as_op(functools.partial(reference.chunked, operand_dtype=rounding))


BASE = Case("base")
PLUS = replace(BASE, name="plus", chunk_size=None, dilation=8)
PACKED = replace(BASE, name="packed", lengths=(1, 0, 8, 9, 77), head_map="tile")
LOCAL = replace(PLUS, name="plus, window and prefix", window=6, prefix_len=3)
CONTINUED = replace(BASE, name="continued", start=(21, 3), head_map="tile")
CASES = (
    BASE,
    PLUS,
    PACKED,
    CONTINUED,
    *(replace(BASE, name=f"T{t}", length=t) for t in (1, 7, 8, 9, 29)),
    replace(BASE, name="long", batch=1, length=300, chunk_size=16, dim=32, value_heads=2),
    replace(BASE, name="one long chunk", length=150, chunk_size=1000),
    replace(BASE, name="chunks longer than a tile", batch=1, length=300, chunk_size=140),
    replace(BASE, name="chunks that divide no tile", length=290, batch=1, chunk_size=24),
    replace(BASE, name="chunks of one token", chunk_size=1, length=70),
    replace(BASE, name="no positions", rope_base=None, scale=0.7),
    replace(BASE, name="odd dim", rope_base=None, dim=17, length=20),
    replace(BASE, name="wide heads", batch=1, heads=1, value_heads=1, dim=256),
    replace(BASE, name="narrow heads", dim=24, value_heads=2),
    replace(BASE, name="strong decay", decay=40.0),
    replace(BASE, name="full forgetting", decay=1e4),
    replace(BASE, name="long memory", decay=1e-3, length=150, chunk_size=64),
    replace(CONTINUED, name="continued at an edge", start=(16, 24)),
    replace(CONTINUED, name="packed, continued", lengths=(9, 0, 20), start=(5, 7, 16)),
    replace(PLUS, name="plus, continued", start=(21, 3)),
    replace(PLUS, name="plus, long", batch=1, length=300, dilation=7),
    replace(PLUS, name="plus, dense", dilation=1),
    replace(PACKED, name="plus, packed", chunk_size=None, dilation=5),
)
LOCAL_CASES = (
    LOCAL,
    replace(LOCAL, name="plus, window"  , prefix_len=0, dilation=5),
    replace(LOCAL, name="plus, prefix", window=0, dilation=7, prefix_len=10),
    replace(LOCAL, name="plus, window of own and one", window=2, dilation=64),
    replace(LOCAL, name="plus, local, packed", lengths=(1, 0, 8, 9, 40)),
)  # fmt: skip
EMPTY = (
    replace(BASE, name="no tokens", length=0),
    replace(BASE, name="no rows", batch=0),
    replace(BASE, name="empty sequences", lengths=(0, 0)),
    replace(CONTINUED, name="no tokens, continued", length=0),
)
SMALL = replace(BASE, name="small", batch=1, length=29, heads=2, value_heads=4)


def relation(check: Callable) -> Callable:
    """Enter a check in CHECKS under its name."""
    CHECKS[check.__name__] = check
    return check


def forward(op: Callable, inputs: dict, **change: object) -> tuple[Tensor, RATState]:
    """(o, final state) without gradient, `inputs` as `Case.make` gives them."""
    arguments = {**inputs, **change}
    parts = [arguments.pop(name, None) for name in STATE]
    arguments.setdefault("initial_state", None if parts[0] is None else RATState(*parts))
    with torch.no_grad():
        return op(**arguments, output_final_state=True)


def rows(inputs: dict, start: int, stop: int | None) -> dict:
    """The tokens start..stop."""
    return {n: x[:, start:stop] if n in ("q", "k", "v", "g") else x for n, x in inputs.items()}


def assert_same_state(actual: RATState, expected: RATState, what: str, tolerance: float = TOLERANCE) -> None:
    """Equal up to rounding, whatever room the entries have."""
    assert torch.equal(actual.length, expected.length), what
    for name in STATE:
        x, y = getattr(actual, name), getattr(expected, name)
        if x is None or name == "length":
            continue
        room = min(x.shape[1], y.shape[1])
        assert not x[:, room:].any() or x.dim() < 4, f"{what}: unused {name} are not 0"
        assert_near({name: x[:, :room]}, {name: y[:, :room]}, what, tolerance)


@relation
def equals_definition(op: Callable, device: str) -> None:
    """Forward and all gradients against the float64 loop."""
    for case in (SMALL, replace(CONTINUED, batch=2, length=20), replace(PACKED, lengths=(1, 0, 17, 8)), PLUS):
        truth = evaluate(flat(definition), to_float64(case.make(device=device)))
        assert_near(evaluate(flat(op), case.make(device=device)), truth, case.name, TOLERANCE)


@relation
def one_softmax_over_ends_and_own(op: Callable, device: str) -> None:
    """o is a dense softmax over [ends of earlier chunks; running state], made from a plain loop in float64."""
    inputs = replace(SMALL, rope_base=None, value_heads=2, length=21).make(torch.float64, device)
    q, k, v, gamma = inputs["q"][0], inputs["k"][0], inputs["v"][0], inputs["g"][0].exp()
    expected, ends, values = [], [], []
    for t in range(21):
        if t % 8 == 0:
            key, value = torch.zeros_like(k[0]), torch.zeros_like(v[0])
        key, value = gamma[t] * key + (1 - gamma[t]) * k[t], gamma[t] * value + (1 - gamma[t]) * v[t]
        weights = torch.stack([(q[t] * x).sum(-1) * 16**-0.5 for x in (*ends, key)]).softmax(0)
        expected.append((weights[..., None] * torch.stack([*values, value])).sum(0))
        if t % 8 == 7:
            ends, values = [*ends, key], [*values, value]
    assert_near({"o": forward(op, inputs)[0][0]}, {"o": torch.stack(expected)}, "dense softmax", 1e-12)


@relation
def split_at_every_token(op: Callable, device: str) -> None:
    for case in (replace(SMALL, length=19), replace(PLUS, batch=1, length=19)):
        inputs = case.make(device=device)
        whole, final = forward(op, inputs)
        for cut in range(20):
            first, state = forward(op, rows(inputs, 0, cut))
            second, last = forward(op, rows(inputs, cut, None), initial_state=state)
            assert_near({"o": torch.cat([first, second], 1)}, {"o": whole}, f"{case.name} split at {cut}", TOLERANCE)
            assert_same_state(last, final, f"{case.name} split at {cut}")


@relation
def gradients_pass_through_the_state(op: Callable, device: str) -> None:
    inputs = replace(SMALL, length=21).make(torch.float64, device, grad=True)
    leaves = [inputs[n] for n in ("q", "k", "v", "g")]
    settings = {n: x for n, x in inputs.items() if n not in ("q", "k", "v", "g", "cu_seqlens")}
    cotangent = torch.linspace(-1, 1, 21 * 64, dtype=torch.float64, device=device).view(1, 21, 4, 16)

    def part(start, stop, **more):
        return op(**{n: x[:, start:stop] for n, x in zip("qkvg", leaves, strict=True)}, **settings, **more)

    whole = torch.autograd.grad((part(0, 21)[0] * cotangent).sum(), leaves)
    for cut in (3, 8, 13):
        first, state = part(0, cut, output_final_state=True)
        second, _ = part(cut, 21, initial_state=state)
        parts = torch.autograd.grad((torch.cat([first, second], 1) * cotangent).sum(), leaves)
        for name, x, y in zip("qkvg", parts, whole, strict=True):
            assert_near({name: x}, {name: y}, f"gradients, split at {cut}", 1e-10)


@relation
def packed_equals_separate(op: Callable, device: str) -> None:
    for case in (replace(PACKED, lengths=(1, 0, 8, 9, 77)), replace(CONTINUED, lengths=(9, 0, 20), start=(5, 7, 16))):
        inputs = case.make(device=device)
        o, final = forward(op, inputs)
        bounds = inputs["cu_seqlens"].tolist()
        for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
            own = {x: y[n : n + 1] if x in STATE else y for x, y in rows(inputs, a, b).items()}
            alone, state = forward(op, {**own, "cu_seqlens": None})
            assert_near({"o": alone}, {"o": o[:, a:b]}, f"packed sequence {n}", 1e-6)
            assert_same_state(final._map(lambda owner, name, x, n=n: x[n : n + 1]), state, f"packed sequence {n}", 1e-6)


@relation
def head_maps_differ(op: Callable, device: str) -> None:
    inputs = SMALL.make(device=device)
    grouped, tiled = forward(op, inputs)[0], forward(op, inputs, head_map="tile")[0]
    for shared, o in ((inputs["k"].repeat_interleave(2, 2), grouped), (inputs["k"].repeat(1, 1, 2, 1), tiled)):
        q = inputs["q"].repeat_interleave(2, 2) if o is grouped else inputs["q"].repeat(1, 1, 2, 1)
        assert_near({"o": forward(op, {**inputs, "q": q, "k": shared})[0]}, {"o": o}, "heads written out", TOLERANCE)
    assert not torch.allclose(grouped, tiled, atol=1e-2)


@relation
def future_is_not_seen(op: Callable, device: str) -> None:
    for case in (SMALL, PLUS):
        inputs = case.make(device=device)
        other = {n: x.clone() if isinstance(x, Tensor) else x for n, x in inputs.items()}
        for name, change in (("q", 1.0), ("k", 3.0), ("v", -2.0), ("g", -1.0)):
            other[name][:, 13:] += change
        assert_same((forward(op, inputs)[0][:, :13],), (forward(op, other)[0][:, :13],), "the future changed the past")


@relation
def chunk_edges(op: Callable, device: str) -> None:
    """The last token of a chunk is read once, as its own entry; the first of the next sees it as an end."""
    inputs = replace(SMALL, length=16).make(device=device)
    loud = {n: x.clone() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    loud["v"][:, 7] += 100.0
    change = (forward(op, loud)[0] - forward(op, inputs)[0]).abs().amax((0, 2, 3))
    assert not change[:7].any(), "a token was seen before its time"
    assert (change[7:] > 1e-3).all(), "the end of a chunk is not seen by the next one"
    loud["v"][:, 7], loud["v"][:, 3] = inputs["v"][:, 7], inputs["v"][:, 3] + 100.0
    loud["g"], quiet = inputs["g"].clone(), {**inputs, "g": inputs["g"].clone()}
    loud["g"][:, 7] = quiet["g"][:, 7] = -torch.inf
    assert_same((forward(op, loud)[0][:, 8:],), (forward(op, quiet)[0][:, 8:],), "what the end forgot was seen")


@relation
def batch_invariance(op: Callable, device: str) -> None:
    inputs = replace(SMALL, batch=3).make(device=device)
    alone = {n: x[1:2] if isinstance(x, Tensor) else x for n, x in inputs.items()}
    o, final = forward(op, inputs)
    again, state = forward(op, alone)
    assert_near({"o": again, "keys": state.keys}, {"o": o[1:2], "keys": final.keys[1:2]}, "batch of three", 1e-6)


@relation
def inputs_unchanged(op: Callable, device: str) -> None:
    inputs = replace(CONTINUED, length=20).make(device=device)
    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, Tensor)}
    first, again = evaluate(flat(op), inputs), evaluate(flat(op), inputs)
    for name, x in before.items():
        assert torch.equal(inputs[name], x), f"{name} was overwritten"
    assert_same(first.values(), again.values(), "a second call gives other bits")


@relation
def extreme_gates(op: Callable, device: str) -> None:
    """Gates 0 (keep all), −inf (forget all) and next to 1: finite, and equal to the definition."""
    for value in (0.0, -1e4, -1e-7, -torch.inf):
        inputs = replace(SMALL, length=21).make(device=device)
        inputs["g"] = torch.full_like(inputs["g"], value)
        truth, _ = forward(definition, to_float64(inputs))
        assert_near({"o": forward(op, inputs)[0]}, {"o": truth}, f"g = {value}", TOLERANCE)


@relation
def strided_inputs(op: Callable, device: str) -> None:
    inputs = SMALL.make(device=device)
    other = {
        n: x.transpose(1, 2).contiguous().transpose(1, 2) if n in ("q", "k", "v", "g") else x for n, x in inputs.items()
    }
    assert_same((forward(op, other)[0],), (forward(op, inputs)[0],), "strides matter")


@relation
def nan_propagates(op: Callable, device: str) -> None:
    inputs = SMALL.make(device=device)
    inputs["v"][:, 11] = float("nan")
    o, final = forward(op, inputs)
    assert o[:, 11:].isnan().all() and final.values.isnan().any(), "a NaN in v was lost"


def run_all(op: Callable, device: str = "cpu") -> dict[str, str | None]:
    """Name → None or the failure, for every relation."""
    return relations.outcomes(CHECKS, op, device)


BUGS = {
    "entries of the own chunk seen": ("distance >= rule.window)) |", "distance >= 0)) |"),
    "the average does not restart": ("position % rule.restart if rule.restart else token", "token"),
    "state enters a chunk that starts": (
        "torch.where((position[:, :1, None] % rule.restart) == 0, 0, before)",
        "before",
    ),
    "rotary position of the token": ("position // rule.unit", "position"),
    "query not turned": ("for x in (wide_q, rows_k))", "for x in (wide_q, rows_k)); turned_q = wide_q"),
    "own entry left out": (
        "weights = torch.cat((scores, scale * (q * own).sum(-1, keepdim=True)), -1)",
        "weights = torch.cat((scores, scale * (q * own).sum(-1, keepdim=True) - 30), -1)",
    ),
    "own value of the last entry": ("alone * own_value", "alone * own_value.roll(1, 2)"),
    "gate of keys only": (
        "for x, before in ((k, state[2]), (v, state[3])):",
        "for x, before in ((k, state[2]), (v, state[3])):\n        weight = 1 - gamma if x is k else torch.ones_like(gamma)",
    ),
    "entries of the state lost": (
        "for old, new in ((keys, stored_k), (values, stored_v))]",
        "for old, new in ((0 * keys, stored_k), (values, stored_v))]",
    ),
    "entry one token early": ("(slot + 1) * rule.stride - 1)", "(slot + 1) * rule.stride - 2)"),
    "running state turned": ("return o, (*grid, rows_k[:, -1].clone()", "return o, (*grid, turned_k[:, -1].clone()"),
    "heads tiled instead of grouped": ('if head_map == "gqa"', 'if head_map != "gqa"'),
    "scale ignored": ("scores = (scale *", "scores = (1.0 *"),
    "length not carried on": ("after, capacity = start + length", "after, capacity = start * 0 + length"),
    "state of the first sequence for all": ("x[n : n + 1] for x in state", "x[:1] for x in state"),
}


def planted(bug: str) -> Callable:
    """`chunked` with one wrong line."""
    old, new = BUGS[bug]
    names = ("group", "_advanced", "_taken", "_attend", "chunked", "_batch")
    namespace = dict(vars(reference))
    for code in relations.with_bug(bug, old, new, *(inspect.getsource(getattr(reference, name)) for name in names)):
        exec(code, namespace)
    return as_op(namespace["chunked"])
