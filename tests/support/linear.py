"""Cases of linear attention, and its definition and comparator with the op's own arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from memattn.reference import linear_attention as reference
from support.cases import Case
from support.metamorphic import Family

TENSORS = ("q", "k", "v", "g", "initial_state")


@dataclass(frozen=True)
class LinearCase(Case):
    """A `Case` without erase term. Normalised, its features and states are positive, as such memories' are."""

    normalize: bool = False
    per_head: bool = False  # g is one number per value head

    def make(self, dtype=torch.float32, device="cpu", seed=0, grad=False) -> dict[str, object]:
        """Keyword arguments of `linear_attention`."""
        drawn = super().make(dtype, device, seed)
        del drawn["beta"], drawn["qk_l2norm"]
        if self.per_head:
            drawn["g"] = drawn["g"][0, 0].clone()
        state = drawn["initial_state"]
        if self.normalize:
            drawn["q"], drawn["k"] = drawn["q"].abs(), drawn["k"].abs()
        if self.normalize and state is not None:
            drawn["initial_state"] = torch.cat((state, state[..., :1].abs() + 1), -1)
        for name in TENSORS:
            if drawn[name] is not None:
                drawn[name] = drawn[name].detach().requires_grad_(grad)
        return drawn | {"normalize": self.normalize}


class _DivideRounded(torch.autograd.Function):
    """n / d as a 16-bit kernel differentiates it: through <do, o> with the rounded o."""

    @staticmethod
    def forward(ctx, rows, dtype):
        o = reference.divide(rows).to(dtype)
        ctx.save_for_backward(o, rows[..., -1:])
        return o

    @staticmethod
    def backward(ctx, do):
        o, denominator = ctx.saved_tensors
        along = (do.float() * o.float()).sum(-1, keepdim=True)
        return torch.cat((do.float(), -along), -1) / denominator, None


def as_op(form: Callable, divide: Callable = lambda rows, dtype: reference.divide(rows).to(dtype)) -> Callable:
    """`loop` or `chunked` of the reference with the arguments and results of the op."""

    def op(*, normalize=False, return_unnormalized=False, **arguments):
        rows, final_state = form(normaliser=normalize or return_unnormalized, **arguments)
        if normalize:
            rows = divide(rows, arguments["q"].dtype)
        return rows, final_state

    return op


definition = as_op(reference.loop)


def comparator(dtype: torch.dtype, chunk_size: int = 64) -> Callable:
    """The chunk form with the rounding points of a kernel for `dtype`."""
    if dtype not in (torch.bfloat16, torch.float16):
        return as_op(functools.partial(reference.chunked, chunk_size=chunk_size))
    form = functools.partial(reference.chunked, chunk_size=chunk_size, operand_dtype=dtype)
    return as_op(form, _DivideRounded.apply)


LINEAR_BASE = LinearCase("base", batch=2, length=150, heads=2, value_heads=4, key_dim=32, value_dim=48)
NORMALISED = replace(LINEAR_BASE, name="normalised", normalize=True)
PACKED = replace(LINEAR_BASE, name="packed", batch=1, lengths=(33, 0, 1, 64, 70))
LINEAR_CASES = (
    LINEAR_BASE,
    *(replace(LINEAR_BASE, name=f"T{t}", batch=1, length=t) for t in (1, 15, 16, 17, 63, 64, 65, 127)),
    PACKED,
    replace(LINEAR_BASE, name="no gate, no state", decay=None, state=False),
    replace(LINEAR_BASE, name="gate per head", per_head=True, scale=0.7),
    replace(LINEAR_BASE, name="odd dims", key_dim=40, value_dim=24, length=70),
    replace(LINEAR_BASE, name="wide key", heads=1, value_heads=1, key_dim=256, value_dim=16, length=70),
    replace(LINEAR_BASE, name="strong decay", decay=40.0),
    replace(LINEAR_BASE, name="square 128", batch=1, length=300, heads=1, value_heads=2, key_dim=128, value_dim=128),
    NORMALISED,
    replace(PACKED, name="normalised, packed", normalize=True),
    replace(NORMALISED, name="normalised, T1", length=1),
    replace(NORMALISED, name="normalised, gate per head", per_head=True, state=False),
    replace(NORMALISED, name="normalised, no gate", decay=None),
    replace(NORMALISED, name="normalised, wide value", heads=1, value_heads=2, key_dim=16, value_dim=256, length=70),
)
LINEAR_EMPTY = tuple(
    replace(case, name=f"{case.name}, {name}", **change)
    for case in (LINEAR_BASE, NORMALISED)
    for name, change in (
        ("no tokens", {"length": 0}),
        ("no rows", {"batch": 0}),
        ("empty sequences", {"batch": 1, "lengths": (0, 0)}),
    )
)
_SMALL = replace(LINEAR_BASE, name="small", batch=1, length=75, heads=1, value_heads=2, key_dim=16, value_dim=24)
FAMILIES = {
    "sum": Family(_SMALL, definition),
    # Where everything but a token's own value is forgotten, its output is that value whatever q and k are.
    "normalised": Family(replace(_SMALL, normalize=True), definition, vanishing=("dg", "dq", "dk")),
}
