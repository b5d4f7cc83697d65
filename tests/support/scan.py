"""Cases, relations and planted bugs of the gated scan, for any op with the signature of `gated_scan`."""

# ruff: noqa: E501 (tables, one case a line)
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from memattn.reference import gated_scan as reference
from support import relations
from support.compare import evaluate, to_float64
from support.relations import assert_same

TOLERANCE = 5e-6  # relations that hold up to float32 rounding; the others are asserted bitwise
CHECKS: dict[str, Callable] = {}


@dataclass(frozen=True)
class Case:
    """One input. `lengths` packs sequences along T; the second payload, if any, has dim / tiles channels."""

    name: str
    batch: int = 2
    length: int = 24
    dim: int = 24
    lengths: tuple[int, ...] | None = None
    tiles: int | None = 3
    form: str = "ema"
    chunk_size: int | None = None
    emit: str = "all"
    decay: float = 1.0  # g is uniform in [-decay, 0]
    state: bool = True

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = False) -> dict[str, object]:
        """Keyword arguments of `flat(op)`, the same values whatever the dtype (before rounding)."""
        generator = torch.Generator().manual_seed(0)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        batch, length = (self.batch, self.length) if self.lengths is None else (1, sum(self.lengths))
        sequences = batch if self.lengths is None else len(self.lengths)

        def put(x: Tensor, dtype: torch.dtype) -> Tensor:
            return x.to(dtype).to(device).requires_grad_(grad)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        gate = torch.rand(batch, length, self.dim, generator=generator, dtype=torch.float64)
        tensors = {
            "g": put(-self.decay * gate, wide),
            "x": put(normal(batch, length, self.dim), dtype),
            "x2": put(normal(batch, length, self.dim // self.tiles), dtype) if self.tiles else None,
            "initial_state": put(normal(sequences, self.dim), wide) if self.state else None,
            "initial_state2": put(normal(sequences, self.dim), wide) if self.state and self.tiles else None,
        }
        bounds = None
        if self.lengths is not None:
            bounds = torch.tensor([0, *torch.tensor(self.lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
        settings = {"form": self.form, "chunk_size": self.chunk_size, "emit": self.emit}
        return {**tensors, "cu_seqlens": bounds, **settings}


def flat(op: Callable) -> Callable:
    """`op` on plain tensors, its results joined: o = ys and then ends along T, payloads along D."""

    def joined(g, x, x2=None, initial_state=None, initial_state2=None, **settings):
        xs = (x,) if x2 is None else (x, x2)
        states = None if initial_state is None else (initial_state, initial_state2)[: len(xs)]
        ys, ends, final = op(g, xs, initial_state=states, **settings)
        rows = [torch.cat(kind, 2) for kind in (ys, ends) if kind is not None]
        return torch.cat(rows, 1), None if final is None else torch.cat(final, 1)

    return joined


BASE = Case("base")
RAT = Case("rat", length=75, dim=48, chunk_size=16, emit="both")
PACKED = replace(BASE, name="packed", lengths=(5, 0, 1, 2, 17, 3, 0, 32, 0))
PACKED_RAT = replace(PACKED, name="packed chunks", chunk_size=8, emit="both")
CASES = (
    BASE,
    RAT,
    PACKED,
    PACKED_RAT,
    replace(BASE, name="plain", form="plain"),
    replace(RAT, name="plain chunks", form="plain", chunk_size=7),
    replace(RAT, name="ends only", emit="ends"),
    replace(PACKED_RAT, name="packed ends only", emit="ends", chunk_size=3),
    replace(BASE, name="no state, one payload", state=False, tiles=None),
    replace(RAT, name="one chunk longer than the row", chunk_size=100),
    replace(RAT, name="chunks of one token", chunk_size=1, length=9),
    replace(RAT, name="narrow tiles", dim=30, tiles=15),
    replace(BASE, name="blocks ragged", length=150, dim=150, tiles=1),
    *(replace(RAT, name=f"T{t}", length=t, chunk_size=4, dim=9) for t in (1, 3, 4, 5)),
    replace(BASE, name="strong decay", decay=40.0),
    replace(RAT, name="full forgetting", decay=1e4),
    replace(BASE, name="long memory", decay=1e-3, length=300, dim=12),
    replace(BASE, name="long memory, plain", decay=1e-3, length=300, dim=12, form="plain"),
)


def relation(check: Callable) -> Callable:
    """Enter a check in CHECKS under its name."""
    CHECKS[check.__name__] = check
    return check


def forward(op: Callable, inputs: dict, **change: object) -> tuple[Tensor, Tensor]:
    """(o, final_state) without gradient."""
    with torch.no_grad():
        return flat(op)(**{**inputs, **change}, output_final_state=True)


def rows(inputs: dict, start: int, stop: int | None) -> dict:
    """The tokens start..stop."""
    return {n: x[:, start:stop] if n in ("g", "x", "x2") and x is not None else x for n, x in inputs.items()}


def states(inputs: dict, final: Tensor | None) -> dict:
    """`inputs` with the joined final state as initial states."""
    dim = inputs["g"].shape[2]
    return {
        **inputs,
        "initial_state": None if final is None else final[:, :dim],
        "initial_state2": None if final is None or inputs["x2"] is None else final[:, dim:],
    }


assert_near = functools.partial(relations.assert_near, tolerance=TOLERANCE)


@relation
def equals_definition(op, device="cpu"):
    """Forward and every gradient, cotangents of ends and final state included, against the float64 loop."""
    for case in (BASE, RAT, PACKED_RAT, replace(RAT, form="plain", chunk_size=5, length=13)):
        inputs = case.make(device=device)
        assert_near(evaluate(flat(op), inputs), evaluate(flat(reference.loop), to_float64(inputs)), case.name)


@relation
def split_state(op, device="cpu"):
    """Two calls chained by the state equal one."""
    inputs = replace(BASE, length=70).make(device=device)
    whole = forward(op, inputs)
    for cut in (0, 1, 31, 64, 69, 70):
        first, state = forward(op, rows(inputs, 0, cut))
        second, final = forward(op, rows(states(inputs, state), cut, None))
        parts = {"o": torch.cat([first, second], 1), "final": final}
        assert_near(parts, dict(zip(("o", "final"), whole, strict=True)), f"split at {cut}")


@relation
def split_inside_and_between_chunks(op, device="cpu"):
    """A chunk is finished without chunk_size from its state; the next one starts afresh."""
    inputs = replace(RAT, emit="all", length=40).make(device=device)
    whole, _ = forward(op, inputs)
    for cut in (5, 16, 27, 32):
        edge = -(-cut // 16) * 16
        first, state = forward(op, rows(inputs, 0, cut))
        middle, _ = forward(op, rows(states(inputs, state), cut, edge), chunk_size=None)
        last, _ = forward(op, rows(states(inputs, None), edge, None))
        assert_near({"o": torch.cat([first, middle, last], 1)}, {"o": whole}, f"split at {cut}")


@relation
def split_gradients(op, device="cpu"):
    """Gradients that pass through the state between two calls equal those of one call."""

    def chained(g, xs, initial_state, output_final_state, **rest):
        cut = 19
        first, _, state = op(
            g[:, :cut], [x[:, :cut] for x in xs], initial_state=initial_state, output_final_state=True, **rest
        )
        second, _, final = op(
            g[:, cut:], [x[:, cut:] for x in xs], initial_state=state, output_final_state=True, **rest
        )
        return tuple(torch.cat(pair, 1) for pair in zip(first, second, strict=True)), None, final

    inputs = BASE.make(device=device)
    assert_near(evaluate(flat(chained), inputs), evaluate(flat(op), inputs), "split")


@relation
def packed_equals_separate(op, device="cpu"):
    inputs = replace(PACKED_RAT, emit="all").make(device=device)
    o, final = forward(op, inputs)
    for n, (a, b) in enumerate(pairwise(inputs["cu_seqlens"].tolist())):
        own = {name: inputs[name][n : n + 1] for name in ("initial_state", "initial_state2")}
        part = forward(op, {**rows(inputs, a, b), **own}, cu_seqlens=None)
        whole = {"o": o[:, a:b], "final": final[n : n + 1]}
        assert_near({"o": part[0], "final": part[1]}, whole, f"sequence {n}", tolerance=1e-6)


@relation
def chunks_equal_sequences(op, device="cpu"):
    """Chunks are sequences of their own, and the ends are their last rows."""
    inputs = replace(RAT, batch=1, length=64, state=False).make(device=device)
    o, _ = forward(op, inputs, emit="both")
    bounds = torch.arange(0, 65, 16, device=device)
    y, final = forward(op, inputs, emit="all", chunk_size=None, cu_seqlens=bounds)
    assert_near({"y": o[:, :64], "ends": o[0, 64:]}, {"y": y, "ends": final}, "chunks", tolerance=1e-6)
    assert_same([o[:, 64:]], [o[:, 15:64:16]], "an end is not the last row of its chunk")


@relation
def ends_only_equal_ends(op, device="cpu"):
    for case in (RAT, PACKED_RAT):
        inputs = case.make(device=device)
        both, ends = forward(op, inputs)[0], forward(op, inputs, emit="ends")[0]
        assert_same([both[:, inputs["g"].shape[1] :]], [ends], case.name)


@relation
def tiles_equal_copies(op, device="cpu"):
    """Head h reads group h mod G: a narrow payload equals its channels repeated, and its gradient their sum."""
    inputs = replace(RAT, tiles=4).make(device=device)
    wide = {**inputs, "x2": inputs["x2"].repeat(1, 1, 4)}
    narrow, copied = evaluate(flat(op), inputs), evaluate(flat(op), wide)
    copied["dx2"] = copied["dx2"].unflatten(2, (4, -1)).sum(2)
    assert_near(narrow, copied, "tiled payload", tolerance=1e-6)
    heads = {**inputs, "x2": inputs["x2"].repeat_interleave(4, 2)}
    assert not torch.allclose(forward(op, inputs)[0], forward(op, heads)[0]), "groups laid out as h // (H/G)"


@relation
def prefix_causality(op, device="cpu"):
    inputs = replace(BASE, length=80).make(device=device)
    future = {n: x.clone() if isinstance(x, Tensor) else x for n, x in inputs.items()}
    for name, change in (("g", -0.5), ("x", 3.0), ("x2", -2.0)):
        future[name][:, 50:] += change
    past, changed = forward(op, inputs)[0], forward(op, future)[0]
    assert_same([changed[:, :50]], [past[:, :50]], "the future changed the past")
    assert not torch.equal(changed[:, 50:], past[:, 50:])


@relation
def batch_invariance(op, device="cpu"):
    inputs = replace(RAT, batch=3).make(device=device)
    expected = forward(op, inputs)
    for order in ([1], [2, 0, 1]):
        part = {n: x[order] if isinstance(x, Tensor) else x for n, x in inputs.items()}
        assert_same(forward(op, part), [e[order] for e in expected], f"batch rows {order}")


@relation
def channels_are_independent(op, device="cpu"):
    inputs = replace(BASE, dim=37, tiles=1, length=20).make(device=device)
    o, _ = forward(op, inputs)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1)).to(device)
    moved = {n: x[..., order] if isinstance(x, Tensor) else x for n, x in inputs.items()}
    assert_same([forward(op, moved)[0]], [o[..., torch.cat([order, 37 + order])]], "bits depend on the channel's place")


@relation
def nan_stays_in_its_chunk_and_channel(op, device="cpu"):
    for case in (replace(RAT, emit="all"), replace(PACKED, lengths=(16, 16, 16, 27), dim=48)):
        inputs = case.make(device=device)
        inputs["x"][0, 19, 5] = float("nan")
        o, _ = forward(op, inputs)
        touched = torch.zeros_like(o, dtype=torch.bool)
        touched[0, 19:32, 5] = True
        assert torch.equal(o.isnan(), touched), case.name


@relation
def nan_gradients_stay_in_their_chunk(op, device="cpu"):
    inputs = replace(RAT, emit="all", tiles=None).make(device=device, grad=True)
    (y,), _, _ = op(inputs["g"], (inputs["x"],), chunk_size=16)
    y[0, 25, 3].mul(float("nan")).backward()
    touched = torch.zeros_like(y, dtype=torch.bool)
    touched[0, 16:26, 3] = True
    assert torch.equal(inputs["x"].grad.isnan(), touched) and not inputs["g"].grad[~touched].isnan().any()


@relation
def gates_at_their_limits(op, device="cpu"):
    """e^g exactly 0 forgets everything, exactly 1 nothing; next to 1 a moving average of a constant stays that constant."""
    inputs = replace(BASE, length=40, state=False, tiles=None).make(device=device)
    none, all_ = torch.full_like(inputs["g"], -torch.inf), torch.zeros_like(inputs["g"])
    assert_same([forward(op, inputs, g=none)[0]], [inputs["x"]], "g = -inf")
    start = torch.randn(2, 24, generator=torch.Generator().manual_seed(2)).to(device)
    kept = forward(op, inputs, g=all_, initial_state=start)[0]
    assert_same([kept], [start[:, None].expand_as(kept)], "g = 0")
    for decay in (1e-6, 2.0**-24, 1e-3):
        constant = {
            **inputs,
            "g": torch.full((1, 60, 3), -decay, device=device),
            "x": torch.full((1, 60, 3), 3.0, device=device),
        }
        o, _ = forward(op, constant, initial_state=torch.full((1, 3), 3.0, device=device))
        assert (o - 3).abs().max() < 2e-6, f"a constant drifts with g = -{decay}"
        exact = evaluate(flat(reference.loop), to_float64({**constant, "form": "plain"}))
        assert_near(evaluate(flat(op), {**constant, "form": "plain"}), exact, f"sums with g = -{decay}")
    forgotten = {**inputs, "initial_state": torch.full((2, 24), 1e30, device=device)}
    o, _ = forward(op, forgotten, g=torch.full_like(none, -200.0))
    assert_same([o], [inputs["x"]], "a forgotten state leaves a trace")
    gradients = evaluate(flat(op), {**inputs, "g": none})
    assert all(x.isfinite().all() for x in gradients.values()), "g = -inf: a gradient is not finite"


@relation
def canaries(op, device="cpu"):
    """Inputs are views into NaN: reading past their ends would poison a result."""

    def guarded(x):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        padded = x.new_full((x.numel() + 4096,), float("nan"))
        padded[2048 : 2048 + x.numel()] = x.flatten()
        return padded[2048 : 2048 + x.numel()].view(x.shape)

    for case in (RAT, PACKED_RAT):
        inputs = case.make(device=device)
        actual = evaluate(flat(op), {n: guarded(x) for n, x in inputs.items()})
        assert_same(actual.values(), evaluate(flat(op), inputs).values(), f"{case.name}: read outside the inputs")


@relation
def inputs_unchanged(op, device="cpu"):
    inputs = RAT.make(device=device)
    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, Tensor)}
    first, second = evaluate(flat(op), inputs), evaluate(flat(op), inputs)
    assert_same(first.values(), second.values(), "a second call gives other bits")
    forward(op, inputs)
    for name, x in before.items():
        assert torch.equal(inputs[name], x), f"{name} was overwritten"


@relation
def strided_and_expanded(op, device="cpu"):
    inputs = RAT.make(device=device)

    def strided(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(x, Tensor) else x

    assert_same(
        evaluate(flat(op), {n: strided(x) for n, x in inputs.items()}).values(),
        evaluate(flat(op), inputs).values(),
        "strided",
    )
    expanded = inputs["x"][:, :1].expand_as(inputs["x"])
    assert_same(forward(op, inputs, x=expanded), forward(op, inputs, x=expanded.contiguous()), "expanded")


@relation
def empty(op, device="cpu"):
    """No batch, no tokens, no channels, only empty sequences: the state passes through and its gradient with it."""
    for case in (
        replace(BASE, batch=0),
        replace(BASE, length=0),
        replace(RAT, length=0),
        replace(BASE, dim=0, tiles=1),
        replace(PACKED, lengths=(0, 0)),
    ):
        inputs = case.make(device=device)
        results = evaluate(flat(op), inputs)
        given = torch.cat([inputs["initial_state"], inputs["initial_state2"]], 1)
        assert torch.equal(results["final_state"], given), "no token, yet the state changed"
        ones = {n: torch.ones_like(x) for n, x in results.items() if n.startswith("dinitial")}
        assert all(x.shape == inputs[n[1:]].shape for n, x in ones.items())
        if given.numel():
            _, _, (final,) = op(
                inputs["g"],
                (inputs["x"],),
                initial_state=(inputs["initial_state"],),
                output_final_state=True,
                cu_seqlens=inputs["cu_seqlens"],
            )
            assert final.data_ptr() != inputs["initial_state"].data_ptr(), "state aliases its input"


@relation
def unused_slots_are_zero(op, device="cpu"):
    inputs = PACKED_RAT.make(device=device)
    ends, _ = forward(op, inputs, emit="ends")
    bounds, used = inputs["cu_seqlens"].tolist(), set()
    for n, (a, b) in enumerate(pairwise(bounds)):
        used |= {a // 8 + n + c for c in range(-(-(b - a) // 8))}
    assert ends.shape[1] == bounds[-1] // 8 + len(bounds) - 1
    for slot in range(ends.shape[1]):
        assert bool(ends[0, slot].any()) == (slot in used), f"slot {slot}"


@relation
def no_state_is_zero_state(op, device="cpu"):
    for case in (RAT, PACKED_RAT):
        inputs = case.make(device=device)
        zero = {n: torch.zeros_like(inputs[n]) for n in ("initial_state", "initial_state2")}
        assert_same(forward(op, states(inputs, None)), forward(op, {**inputs, **zero}), case.name)


def run_all(op: Callable, device: str = "cpu") -> dict[str, str | None]:
    """Name → None or the failure, for every check."""
    return relations.outcomes(CHECKS, op, device)


# The fallback with one wrong line each: what is there -> what is put in its place.
BUGS = {
    "gate of the wrong token": ("y = y + total.exp()", "y = y + _shift(total, 1).exp()"),
    "chunks leak into each other": ("position % chunk_size", "position % (2 * chunk_size)"),
    "reset one token late": ("position % chunk_size\n", "(position - 1).clamp(min=0) % chunk_size\n"),
    "sequences leak into each other": ("age = position if", "age = torch.arange(length, device=g.device).expand(batch, length) if"),
    "blocks leave out the state": ("age[:, block] > row", "age[:, block] > row + BLOCK"),
    "exp of a positive number": ("total.exp() * torch.where(seen, _shift(y, reach), 0)", "(1e3 + total).exp() * 0 + total.exp() * torch.where(seen, _shift(y, reach), 0)"),
    "weight of the plain form": ('-torch.expm1(g) if form == "ema"', 'torch.ones_like(g) if form == "ema"'),
    "weight cancels": ("-torch.expm1(g)", "1 - g.exp()"),
    "initial state ignored": ("if initial_state is not None and batch", "if False and batch"),
    "initial state not decayed": ("[first].exp() * state", "[first].exp() ** 0 * state"),
    "initial state in every chunk": ("written = weight * _tiled(x, g)\n", "written = weight * _tiled(x, g) + (0 if initial_state is None or chunk_size is None or cu_seqlens is not None else (age == 0)[..., None] * (position > 0)[..., None] * initial_state[index][:, None])\n"),
    "initial state without a gradient": ("initial_state[index]\n", "initial_state[index].detach()\n"),
    "state of the first payload for all": ("initial_state[index]\n", "initial_state[0]\n"),
    "final state is the initial state": ("torch.where(some, exact[last], state)", "torch.where(some, state, state)"),
    "final state rounded": ("torch.where(some, exact[last]", "torch.where(some, exact[last].bfloat16().to(g.dtype)"),
    "final state of an empty sequence is zero": ("torch.where(some, exact[last], state)", "torch.where(some, exact[last], 0)"),
    "final state aliases its input": ("else state.clone()", "else state"),
    "ends are the chunks' first rows": ("((position + 1) % chunk_size == 0)", "(position % chunk_size == 0)"),
    "ragged chunk has no end": (" | (position + 1 == lengths[sequence])", ""),
    "ends without a gradient": ("ends.append(layout.ends(y, batch))", "ends.append(layout.ends(y, batch).detach())"),
    "slots of empty sequences left out": ("first = begin // chunk_size + torch.arange(len(begin), device=device)", "first = begin // chunk_size"),
    "groups laid out as h // (H/G)": ("x.repeat(1, 1, g.shape[2] // x.shape[2])", "x.repeat_interleave(g.shape[2] // x.shape[2], 2)"),
    "sum rounded to bfloat16": ("outputs.append(y[:, block]", "outputs.append(y[:, block].bfloat16().to(y.dtype)"),
    "x overwritten": ("layout = Layout.of", "xs[0].requires_grad or xs[0].mul_(1.001); layout = Layout.of"),
    "contiguity assumed": ("x = x.to(g.dtype)", "x = x.as_strided(x.shape, torch.empty(x.shape).stride()).to(g.dtype)"),
}  # fmt: skip


@functools.cache
def planted(bug: str) -> Callable:
    """`chunked` with `bug`."""
    namespace: dict = {"__name__": reference.__name__}
    exec(*relations.with_bug(bug, *BUGS[bug], inspect.getsource(reference)), namespace)
    return namespace["chunked"]
