"""Cases, relations and planted bugs of the causal convolution, for any op with the signature of `causal_conv1d`."""

# ruff: noqa: E501 (tables, one case a line)
from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from memattn.reference import causal_conv1d as reference
from support import relations
from support.compare import evaluate, to_float64
from support.relations import assert_same

TOLERANCE = 5e-6  # relations that hold up to float32 rounding; the others are asserted bitwise, without silu, whose
# bits depend on the place in memory in plain torch (the kernels are asked for more: `exact_with_silu`)
CHECKS: dict[str, Callable] = {}


@dataclass(frozen=True)
class Case:
    """One input of `causal_conv1d`. `lengths` packs sequences along T; `wide` keeps the parameters float32."""

    name: str
    batch: int = 2
    length: int = 21
    dim: int = 40
    width: int = 4
    lengths: tuple[int, ...] | None = None
    bias: bool = True
    state: bool = True
    silu: bool = True
    wide: bool = False

    def make(self, dtype: torch.dtype = torch.float32, device: str = "cpu", grad: bool = False) -> dict[str, object]:
        """Keyword arguments of the op, the same values whatever the dtype (before rounding)."""
        generator = torch.Generator().manual_seed(0)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        batch, length = (self.batch, self.length) if self.lengths is None else (1, sum(self.lengths))
        sequences = batch if self.lengths is None else len(self.lengths)

        def normal(*shape: int, dtype: torch.dtype) -> Tensor:
            x = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return x.to(dtype).to(device).requires_grad_(grad)

        parameters = wide if self.wide else dtype
        tensors = {
            "x": normal(batch, length, self.dim, dtype=dtype),
            "weight": normal(self.dim, self.width, dtype=parameters),
            "bias": normal(self.dim, dtype=parameters) if self.bias else None,
            "initial_state": normal(sequences, self.dim, self.width - 1, dtype=wide) if self.state else None,
        }
        bounds = None
        if self.lengths is not None:
            bounds = torch.tensor([0, *torch.tensor(self.lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
        return {**tensors, "cu_seqlens": bounds, "activation": "silu" if self.silu else None}


BASE = Case("base")
LINEAR = replace(BASE, name="linear", silu=False)
PACKED = replace(BASE, name="packed", lengths=(5, 0, 1, 2, 17, 3, 0, 12))
LONG = replace(BASE, name="long", length=300, dim=261)  # several token and channel blocks, ragged in both
SHORT = tuple(replace(BASE, name=f"W{w} T{t}", width=w, length=t, dim=7) for w in (2, 3, 4) for t in (1, 2, 3, 4))
PROGRAMS = replace(BASE, name="several programs", length=75, dim=70)  # of the Triton backward, ragged in both
CASES = (
    BASE,
    PACKED,
    PROGRAMS,
    replace(BASE, name="sequences begin just before tiles", lengths=(15, 15, 15, 15, 8)),
    LONG,
    *SHORT,
    replace(LONG, name="long packed", lengths=(127, 0, 1, 3, 128, 2, 40), width=3),
    replace(BASE, name="no bias", bias=False, silu=False),
    replace(BASE, name="no state", state=False, width=2),
    replace(PACKED, name="packed, no state", state=False, silu=False, width=3),
    replace(BASE, name="one channel", dim=1),
    replace(BASE, name="wide parameters", wide=True),
)


def relation(check: Callable) -> Callable:
    """Enter a check in CHECKS under its name."""
    CHECKS[check.__name__] = check
    return check


def forward(op: Callable, inputs: dict, **change: object) -> tuple[Tensor, Tensor]:
    """(y, final_state) without gradient."""
    with torch.no_grad():
        return op(**{**inputs, **change}, output_final_state=True)


assert_near = functools.partial(relations.assert_near, tolerance=TOLERANCE)


@relation
def equals_definition(op, device="cpu"):
    """Forward and every gradient, final state's cotangent included, against the float64 loop."""
    for case in (BASE, PACKED, *SHORT[4:], replace(LINEAR, bias=False)):
        inputs = case.make(device=device)
        truth = evaluate(reference.loop, to_float64(inputs))
        assert_near(evaluate(op, inputs), truth, case.name)


@relation
def split_state(op, device="cpu", silu=False):
    """Two calls chained by the state equal one, bit for bit; parts shorter than the state too."""
    inputs = replace(BASE if silu else LINEAR, length=9).make(device=device)
    whole = forward(op, inputs)
    for cut in (0, 1, 2, 3, 6, 8):
        first, state = forward(op, inputs, x=inputs["x"][:, :cut])
        second, final = forward(op, inputs, x=inputs["x"][:, cut:], initial_state=state)
        assert_same((torch.cat([first, second], 1), final), whole, f"split at {cut}")


@relation
def split_gradients(op, device="cpu"):
    """Gradients that pass through the state between two calls equal those of one call."""

    def chained(cut):
        def run(x, initial_state, output_final_state, **rest):
            first, state = op(x[:, :cut], initial_state=initial_state, output_final_state=True, **rest)
            second, final = op(x[:, cut:], initial_state=state, output_final_state=True, **rest)
            return torch.cat([first, second], 1), final

        return run

    inputs = replace(BASE, length=7).make(device=device)
    whole = evaluate(op, inputs)
    for cut in (1, 2, 3, 5, 6):
        assert_near(evaluate(chained(cut), inputs), whole, f"split at {cut}")


@relation
def packed_equals_separate(op, device="cpu", silu=False):
    inputs = replace(PACKED, silu=silu).make(device=device)
    y, final = forward(op, inputs)
    for n, (a, b) in enumerate(pairwise(inputs["cu_seqlens"].tolist())):
        state = inputs["initial_state"][n : n + 1]
        part = forward(op, inputs, x=inputs["x"][:, a:b], initial_state=state, cu_seqlens=None)
        assert_same(part, (y[:, a:b], final[n : n + 1]), f"packed sequence {n}")


@relation
def packed_equals_batch(op, device="cpu"):
    """A batch of equal lengths, and the same rows packed."""
    inputs = replace(BASE, batch=3, length=6).make(device=device)
    bounds = torch.arange(4, device=device) * 6
    packed = {**inputs, "x": inputs["x"].reshape(1, 18, -1), "cu_seqlens": bounds}
    expected, actual = evaluate(op, inputs), evaluate(op, packed)
    for name in ("o", "dx"):
        actual[name] = actual[name].reshape(expected[name].shape)
    assert_near(actual, expected, "packed against batch", tolerance=1e-6)


@relation
def prefix_causality(op, device="cpu"):
    inputs = LINEAR.make(device=device)
    x = inputs["x"].clone()
    x[:, 10:] += 3
    y, changed = forward(op, inputs)[0], forward(op, inputs, x=x)[0]
    assert_same([changed[:, :10]], [y[:, :10]], "the future changed the past")
    assert not torch.equal(changed[:, 10:], y[:, 10:])


@relation
def batch_invariance(op, device="cpu", silu=False):
    inputs = replace(BASE if silu else LINEAR, batch=3).make(device=device)
    expected = forward(op, inputs)
    for rows in ([1], [2, 0, 1], [0, 0]):
        part = forward(op, inputs, x=inputs["x"][rows], initial_state=inputs["initial_state"][rows])
        assert_same(part, [e[rows] for e in expected], f"batch rows {rows}")


@relation
def channels_are_independent(op, device="cpu"):
    inputs = replace(LONG, length=20, silu=False).make(device=device)
    spoilt = inputs["x"].clone()
    spoilt[:, :, 256] = float("nan")
    others = [c for c in range(LONG.dim) if c != 256]
    (y, final), (bad, bad_final) = forward(op, inputs), forward(op, inputs, x=spoilt)
    assert_same([bad[..., others], bad_final[:, others]], [y[..., others], final[:, others]], "a channel leaked")
    assert bad[..., 256].isnan().all()


@relation
def nan_and_inf_reach_their_window(op, device="cpu"):
    for value in (float("nan"), float("inf"), float("-inf")):
        inputs = LINEAR.make(device=device)
        inputs["x"][0, 11] = value
        y, _ = forward(op, inputs)
        touched = torch.zeros(y.shape[:2], dtype=torch.bool, device=device)
        touched[0, 11:15] = True
        assert torch.equal(~y.isfinite().all(-1), touched), f"{value} at token 11"
    inputs = BASE.make(device=device)
    inputs["initial_state"][1, :, 0] = float("nan")  # the oldest input is seen by the first token only
    y, _ = forward(op, inputs)
    assert y[1, 0].isnan().all() and y[1, 1:].isfinite().all() and y[0].isfinite().all()


@relation
def huge_values_stay_finite(op, device="cpu"):
    """silu and its slope at arguments whose exponential over- or underflows."""
    inputs = replace(BASE, width=2, state=False).make(device=device)
    inputs["x"] *= 1e4
    truth = evaluate(reference.loop, to_float64(inputs))
    assert_near(evaluate(op, inputs), truth, "large arguments")


@relation
def canaries(op, device="cpu"):
    """Inputs are views into NaN: reading past their ends would poison a result."""

    def guarded(x):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        padded = x.new_full((x.numel() + 4096,), float("nan"))
        padded[2048 : 2048 + x.numel()] = x.flatten()
        return padded[2048 : 2048 + x.numel()].view(x.shape)

    def on_guarded(**inputs):
        return op(**{n: guarded(x) for n, x in inputs.items()})

    for case in (BASE, PACKED, replace(BASE, length=2, dim=5)):
        inputs = case.make(device=device)
        expected, actual = evaluate(op, inputs), evaluate(on_guarded, inputs)
        assert_same(actual.values(), expected.values(), f"{case.name}: a value outside the inputs was used")


@relation
def inputs_unchanged(op, device="cpu"):
    for case in (BASE, PACKED):
        inputs = case.make(device=device)
        before = {n: x.clone() for n, x in inputs.items() if isinstance(x, Tensor)}
        first, second = evaluate(op, inputs), evaluate(op, inputs)
        assert_same(first.values(), second.values(), "a second call gives other bits")
        with torch.no_grad():
            op(**inputs, output_final_state=True)
        for name, x in before.items():
            assert torch.equal(inputs[name], x), f"{name} was overwritten"


@relation
def strided_and_expanded(op, device="cpu"):
    inputs = LINEAR.make(device=device)
    other = {
        **inputs,
        "x": inputs["x"].transpose(1, 2).contiguous().transpose(1, 2),
        "weight": inputs["weight"].t().contiguous().t(),
        "bias": torch.stack([inputs["bias"], inputs["bias"]], 1)[:, 0],
        "initial_state": inputs["initial_state"].transpose(1, 2).contiguous().transpose(1, 2),
    }
    assert_same(evaluate(op, other).values(), evaluate(op, inputs).values(), "strided inputs")
    expanded = {**inputs, "x": inputs["x"][:, :1].expand_as(inputs["x"])}
    assert_same(forward(op, expanded), forward(op, expanded, x=expanded["x"].contiguous()), "expanded x")


@relation
def empty(op, device="cpu"):
    """No batch, no tokens, no channels, only empty sequences: the state passes through, gradients are zero."""
    for case in (
        replace(BASE, batch=0),
        replace(BASE, length=0),
        replace(BASE, dim=0),
        replace(PACKED, lengths=(0, 0)),
    ):
        inputs = case.make(device=device)
        results = evaluate(op, inputs)
        assert results["o"].shape == inputs["x"].shape
        assert torch.equal(results["final_state"], inputs["initial_state"]), "no token, yet the state changed"
        assert not results["dweight"].any() and not results["dbias"].any(), "no token, yet a gradient"
        if inputs["initial_state"].numel():
            final = forward(op, inputs)[1]
            assert final.data_ptr() != inputs["initial_state"].data_ptr(), "state aliases its input"


@relation
def no_state_is_zero_state(op, device="cpu"):
    for case in (LINEAR, replace(PACKED, silu=False)):
        inputs = case.make(device=device)
        zero = forward(op, inputs, initial_state=torch.zeros_like(inputs["initial_state"]))
        assert_same(forward(op, inputs, initial_state=None), zero, "no state differs from a zero state")


def exact_with_silu(op, device="cpu"):
    """The bitwise relations, silu included: what every kernel promises and plain torch does not."""
    for check in (split_state, packed_equals_separate, batch_invariance):
        check(op, device, silu=True)


def run_all(op: Callable, device: str = "cpu") -> dict[str, str | None]:
    """Name → None or the failure, for every check."""
    return relations.outcomes(CHECKS, op, device)


# `chunked` with one wrong line each: what is there -> what is put in its place.
GATHER = "table[rows(sequence, token - begin[sequence] - tail + w)]"
FINAL = "return y, table[rows(every, last)].transpose(1, 2).contiguous()"
BUGS = {
    "taps in reverse order": ("weight[:, w]", "weight[:, width - 1 - w]"),
    "one future token": ("- tail + w)]", "- tail + w + (w == width - 1))]"),
    "window one token late": ("- tail + w)]", "- tail + w - 1)]"),
    "bias left out": ("bias is None else", "True else"),
    "bias after silu": ("_activate(z, activation)", "(_activate(z if bias is None else z - bias, activation) + (0 if bias is None else bias))"),
    "initial state ignored": ("state = _initial(x, weight, initial_state", "state = 0 * _initial(x, weight, initial_state"),
    "initial state newest first": ("state.transpose(1, 2)", "state.flip(2).transpose(1, 2)"),
    "state of the first sequence for all": ("tokens + (sequence + 1) * tail", "tokens + 0 * sequence + tail"),
    "tail of a short sequence is zero": (FINAL, "return y, (table[rows(every, last)] * (last >= 0)[..., None]).transpose(1, 2)"),
    "final state newest first": (FINAL, "return y, table[rows(every, last)].flip(1).transpose(1, 2).contiguous()"),
    "final state detached": (FINAL, "return y, table[rows(every, last)].transpose(1, 2).contiguous().detach().requires_grad_()"),
    "final state is the initial state": (FINAL, "return y, state"),
    "initial state gets no gradient": ("state = _initial", "state = lambda_detach(_initial)"),
    "sequences leak into each other": (GATHER, "table[(token - tail + w).clamp(min=0)]"),
    "first of several sequences at one token": ("right=True) - 1", "right=False).clamp(max=bounds.numel() - 2)"),
    "accumulates in bfloat16": ("z = z + weight", "z = z.bfloat16().to(dtype) + weight"),
    "contiguity assumed": ("x.to(dtype).reshape(tokens", "x.as_strided(x.shape, torch.empty(x.shape).stride()).to(dtype).reshape(tokens"),
    "x overwritten": ("begin, end = bounds[:-1]", "x.requires_grad or x.mul_(1.001); begin, end = bounds[:-1]"),
    "silu where there is none": ("_activate(z, activation)", "F.silu(z)"),
}  # fmt: skip


def planted(bug: str) -> Callable:
    """`chunked` with `bug`."""
    namespace = {**vars(reference), "lambda_detach": lambda f: lambda *args: f(*args).detach()}
    exec(*relations.with_bug(bug, *BUGS[bug], inspect.getsource(reference.chunked)), namespace)
    return namespace["chunked"]
