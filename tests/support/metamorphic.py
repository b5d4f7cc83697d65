"""Relations any correct memory op obeys, whatever its backend. Each check takes the op and raises AssertionError.

The op takes the keyword arguments that the family's case makes, with `chunk_size`, and returns (o, final_state).
`TOLERANCE` is for relations that hold up to rounding in float32; the others are asserted bitwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from memattn.reference import gated_delta_rule
from support import relations
from support.cases import BASE, Case
from support.compare import evaluate, relative_error, to_float64

TOLERANCE = 2e-5
CHECKS = {}
SMALL = replace(BASE, name="small", batch=1, length=75, heads=1, value_heads=2, key_dim=16, value_dim=24)


@dataclass(frozen=True)
class Family:
    """An op's small case, its definition, and the gradients that vanish where everything is forgotten."""

    small: Case
    loop: Callable
    vanishing: tuple[str, ...] = ("dg",)


DELTA = Family(SMALL, gated_delta_rule.loop)


def metamorphic(check):
    """Enter a check in the list under its name."""
    CHECKS[check.__name__] = check
    return check


def forward(op, inputs, **extra):
    """(o, final_state) without gradient."""
    with torch.no_grad():
        return op(**{**inputs, **extra}, output_final_state=True)


def assert_near(actual, expected, what, tolerance=TOLERANCE):
    """Relative error of each pair within tolerance."""
    for x, y in zip(actual, expected, strict=True):
        error = relative_error(x, y)
        assert error <= tolerance, f"{what}: relative error {error:.3g} > {tolerance:.3g}"


def rows(inputs, start, stop):
    """The tokens start..stop of every token-major tensor."""
    return {
        n: x[:, start:stop] if n in ("q", "k", "v", "g", "beta") and x is not None else x for n, x in inputs.items()
    }


@metamorphic
def equals_definition(op, device="cpu", family=DELTA):
    """Forward and all gradients against the float64 loop, ragged length, state in and out."""
    for case in (
        family.small,
        replace(family.small, lengths=(37, 0, 5, 1)),
        replace(family.small, heads=2, value_heads=4, scale=0.4),
    ):
        inputs = case.make(device=device)
        actual, truth = evaluate(op, inputs), evaluate(family.loop, to_float64(inputs))
        for name in truth:
            assert_near([actual[name]], [truth[name]], f"{case.name} {name}")


@metamorphic
def chunk_size_invariance(op, device="cpu", family=DELTA):
    inputs = family.small.make(device=device)
    expected = forward(op, inputs, chunk_size=64)
    for size in (16, 32):
        assert_near(forward(op, inputs, chunk_size=size), expected, f"chunk_size {size} against 64")


@metamorphic
def split_state(op, device="cpu", family=DELTA):
    inputs = family.small.make(device=device)
    o, final = forward(op, inputs)
    for cut in (1, 2, 21, 64):
        first, state = forward(op, rows(inputs, 0, cut))
        second, last = forward(op, {**rows(inputs, cut, None), "initial_state": state})
        assert_near((torch.cat([first, second], 1), last), (o, final), f"split at {cut}")


@metamorphic
def packed_equals_separate(op, device="cpu", family=DELTA):
    case = replace(family.small, lengths=(19, 0, 1, 40))
    inputs = case.make(device=device)
    o, final = forward(op, inputs)
    bounds = inputs["cu_seqlens"].tolist()
    for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        part = {**rows(inputs, a, b), "initial_state": inputs["initial_state"][n : n + 1], "cu_seqlens": None}
        assert_near(forward(op, part), (o[:, a:b], final[n : n + 1]), f"packed sequence {n}", 1e-6)


@metamorphic
def prefix_causality(op, device="cpu", family=DELTA):
    inputs = family.small.make(device=device)
    future = {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    for name, change in (("k", 3.0), ("v", -2.0), ("q", 1.0), ("g", -1.0), ("beta", -0.25)):
        if name in future:
            future[name][:, 30:] += change
    assert torch.equal(forward(op, inputs)[0][:, :30], forward(op, future)[0][:, :30]), "the future changed the past"


@metamorphic
def sequence_permutation(op, device="cpu", family=DELTA):
    inputs = replace(family.small, batch=3, length=48).make(device=device)
    order = torch.tensor([2, 0, 1], device=device)
    permuted = {n: x[order] if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    for x, y in zip(forward(op, inputs), forward(op, permuted), strict=True):
        assert torch.equal(x[order], y), "bits depend on the place in the batch"


@metamorphic
def batch_invariance(op, device="cpu", family=DELTA):
    inputs = replace(family.small, batch=3).make(device=device)
    alone = {n: x[1:2] if isinstance(x, torch.Tensor) else x for n, x in inputs.items()}
    for x, y in zip(forward(op, inputs), forward(op, alone), strict=True):
        assert torch.equal(x[1:2], y), "bits depend on the batch size"


@metamorphic
def nan_canaries(op, device="cpu", family=DELTA):
    """Inputs are views into NaN: any read past their end poisons the result."""

    def guarded(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        padded = x.new_full((x.numel() + 4096,), float("nan"))
        padded[2048 : 2048 + x.numel()] = x.flatten()
        return padded[2048 : 2048 + x.numel()].view(x.shape)

    inputs = replace(family.small, length=37).make(device=device)
    for x, y in zip(forward(op, {n: guarded(x) for n, x in inputs.items()}), forward(op, inputs), strict=True):
        assert torch.equal(x, y), "a value outside the inputs was used"


@metamorphic
def strong_decay(op, device="cpu", family=DELTA):
    for decay in (30.0, 1e4):
        inputs = replace(family.small, decay=decay).make(device=device)
        truth = evaluate(family.loop, to_float64(inputs))
        for name, x in evaluate(op, inputs).items():
            if name not in family.vanishing:  # vanishing against the others here; its accuracy is equals_definition's
                assert_near([x], [truth[name]], f"decay {decay}: {name}")
            assert x.isfinite().all(), f"decay {decay}: {name} is not finite"


@metamorphic
def inputs_unchanged(op, device="cpu", family=DELTA):
    inputs = family.small.make(device=device)
    before = {n: x.clone() for n, x in inputs.items() if isinstance(x, torch.Tensor)}
    first = evaluate(op, inputs)
    for name, x in before.items():
        assert torch.equal(inputs[name], x), f"{name} was overwritten"
    for name, x in evaluate(op, inputs).items():
        assert torch.equal(x, first[name]), f"{name}: a second call gives other bits"


@metamorphic
def strided_inputs(op, device="cpu", family=DELTA):
    inputs = replace(family.small, heads=2, value_heads=4).make(device=device)

    def strided(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    other = {n: strided(x) for n, x in inputs.items()}
    other["v"] = inputs["v"][:, :, :1].expand_as(inputs["v"])
    expected = forward(op, {**inputs, "v": other["v"].contiguous()})
    assert_near(forward(op, other), expected, "strided and expanded inputs", 0.0)


@metamorphic
def empty_and_single(op, device="cpu", family=DELTA):
    for case in (
        replace(family.small, length=0),
        replace(family.small, batch=0),
        replace(family.small, lengths=(0, 1, 0)),
    ):
        inputs = case.make(device=device)
        o, final = forward(op, inputs)
        assert o.shape == inputs["v"].shape, f"o has shape {list(o.shape)}"
        if case.tokens == 0:
            assert torch.equal(final, inputs["initial_state"]), "no token, yet the state changed"
            assert final.data_ptr() != inputs["initial_state"].data_ptr() or final.numel() == 0, (
                "state aliases its input"
            )
        if case.lengths:
            assert torch.equal(final[[0, 2]], inputs["initial_state"][[0, 2]]), "an empty sequence changed its state"


@metamorphic
def no_state_is_zero_state(op, device="cpu", family=DELTA):
    inputs = family.small.make(device=device)
    zero = torch.zeros_like(inputs["initial_state"])
    expected = forward(op, {**inputs, "initial_state": zero})
    for x, y in zip(forward(op, {**inputs, "initial_state": None}), expected, strict=True):
        assert torch.equal(x, y), "no state differs from a zero state"


@metamorphic
def nan_propagates(op, device="cpu", family=DELTA):
    inputs = family.small.make(device=device)
    inputs["v"][:, 66] = float("nan")
    o, final = forward(op, inputs)
    assert o[:, 66:].isnan().any(-1).all() and final.isnan().any(), "a NaN in v was lost"
    assert o[:, :48].isfinite().all(), "a NaN reached chunks before its own"


def run_all(op, device: str = "cpu", family: Family = DELTA) -> dict[str, str | None]:
    """Name → None or the failure, for every check."""
    return relations.outcomes(CHECKS, op, device, family)


__all__ = ["CHECKS", "DELTA", "SMALL", "Case", "Family", "run_all"]
