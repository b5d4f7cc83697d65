"""The one torch library of the package, and the recipe by which a differentiable op enters it.

Per backend one forward op and one backward op with the same schema. The forward's Autograd kernel runs an
autograd.Function below the dispatcher; the backward's refuses a second differentiation with one clear error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from memattn import _native

LIBRARY = torch.library.Library("memattn", "DEF")
_native.native_reason("_C")  # registers the CPU kernels now: a library cannot be loaded while a graph is traced


def resolve(name: str) -> torch._ops.OpOverload:
    """The op `memattn::name`."""
    return getattr(torch.ops.memattn, name).default


@dataclass(frozen=True)
class Differentiable:
    """What the autograd recipe must know of one op family.

    schema, backward_schema: text after the name. fake, backward_fake: shape functions of the same arguments.
    outputs: how many of the results are differentiable; the others are what only backward needs.
    save(args, outputs) -> tensors kept for backward (None allowed).
    backward(op, ctx_tensors, args, grads) -> one gradient or None per forward argument, for a list of tensors a tuple
    of them, calling the backward op `op`. `args` has None in place of tensors and lists.
    """

    schema: str
    backward_schema: str
    fake: Callable
    backward_fake: Callable
    outputs: int
    save: Callable[[tuple, tuple], Sequence[Tensor | None]]
    backward: Callable[..., tuple]


def define(name: str, schema: str, fake: Callable) -> None:
    """Define `memattn::name` with its shape function."""
    LIBRARY.define(f"{name}{schema}")

    @functools.wraps(fake)
    def on_one_device(*args):
        devices = sorted({x.device.type for x in _spread(args) if isinstance(x, Tensor)})
        if len(devices) > 1:
            raise RuntimeError(f"memattn::{name}: all tensors must be on one device; got {' and '.join(devices)}")
        return fake(*args)

    torch.library.register_fake(f"memattn::{name}", on_one_device, lib=LIBRARY)


def define_differentiable(name: str, family: Differentiable) -> None:
    """Define `memattn::name` and `memattn::name_backward` with fakes and autograd."""
    define(name, family.schema, family.fake)
    define(f"{name}_backward", family.backward_schema, family.backward_fake)
    LIBRARY.impl(name, _forward_autograd(name, family), "Autograd")
    LIBRARY.impl(f"{name}_backward", _backward_autograd(name), "Autograd")


def implement(name: str, launcher: Callable[[], Callable]) -> None:
    """Give the Triton op `memattn::name` its body for CUDA tensors, and CPU tensors under the interpreter.

    `launcher()` imports and returns the function, so that nothing of Triton is imported before the first call.
    """

    def body(*args):
        return launcher()(*args)

    LIBRARY.impl(name, body, "CUDA")
    LIBRARY.impl(name, body, "CPU")


def _tracks_gradient(args: Sequence) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in _spread(args))


def _spread(args: Sequence) -> list:
    """Lists of tensors as arguments of their own: an autograd.Function tracks no others."""
    return [y for x in args for y in (x if isinstance(x, (list, tuple)) else (x,))]


def _sizes(args: Sequence) -> tuple[int | None, ...]:
    return tuple(len(x) if isinstance(x, (list, tuple)) else None for x in args)


def _gathered(sizes: Sequence[int | None], spread: Sequence) -> tuple:
    """The arguments of these `_sizes` before `_spread`."""
    rest = iter(spread)
    return tuple(next(rest) if n is None else list(islice(rest, n)) for n in sizes)


def _forward_autograd(name: str, family: Differentiable) -> Callable:
    op, backward_op = resolve(name), resolve(f"{name}_backward")

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, sizes, *spread):
            args = _gathered(sizes, spread)
            with torch._C._AutoDispatchBelowAutograd():
                outputs = op(*args)
            results = outputs if isinstance(outputs, tuple) else (outputs,)
            ctx.save_for_backward(*family.save(args, results))
            ctx.args = tuple(None if isinstance(x, (Tensor, list)) else x for x in args)
            ctx.leaves = len(spread)
            ctx.mark_non_differentiable(*results[family.outputs :])
            ctx.set_materialize_grads(False)
            return outputs

        @staticmethod
        def backward(ctx, *grads):
            if all(grad is None for grad in grads):
                return (None,) * (1 + ctx.leaves)
            return None, *_spread(family.backward(backward_op, ctx.saved_tensors, ctx.args, grads))

    Function.__name__ = Function.__qualname__ = f"{name}_autograd"

    def kernel(*args):
        if _tracks_gradient(args):
            return Function.apply(_sizes(args), *_spread(args))
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel


def _backward_autograd(name: str) -> Callable:
    op = resolve(f"{name}_backward")

    class NoSecondDerivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx, sizes, *spread):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*_gathered(sizes, spread))

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError(
                f"memattn::{name} has no second derivative: its backward was differentiated. "
                "Use backend='chunked', which torch differentiates any number of times."
            )

    def kernel(*args):
        if _tracks_gradient(args):
            return NoSecondDerivative.apply(_sizes(args), *_spread(args))
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return kernel
