"""Repairs bfloat16 in Triton's CPU interpreter.

The interpreter keeps bfloat16 as its 16 bits in a uint16 array and then computes with those integers: products and sums
are garbage, and casts from float32 truncate. `install` makes every arithmetic entry widen to float32, compute there and
round to nearest even, as the hardware does; `self_test` compares the result with torch and names what moved if a new
Triton changed its internals. Tests must not use bfloat16 under the interpreter without it.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

PATCHED = ("create_dot", "binary_op", "unary_op", "create_fma", "create_clampf", "cast_impl", "create_fp_to_fp")


def is_bfloat16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits -> float32, exact."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits, to nearest even; overflow gives infinity, NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    return np.where(np.isnan(x), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def as_float32(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(widen(handle.data), tl.float32) if is_bfloat16(handle) else handle


def as_bfloat16(handle: TensorHandle) -> TensorHandle:
    return TensorHandle(narrow(handle.data.astype(np.float32)), tl.bfloat16)


def _arithmetic(method):
    """Run a method whose first handle decides the result type on float32 copies when that type is bfloat16."""

    def run(self, first, *rest):
        if not is_bfloat16(first):
            return method(self, first, *rest)
        widened = (as_float32(x) if isinstance(x, TensorHandle) else x for x in rest)
        with np.errstate(over="ignore", invalid="ignore"):
            result = method(self, as_float32(first), *widened)
        return result if result.data.dtype == np.bool_ else as_bfloat16(result)

    return run


def _dot(method):
    def run(self, a, b, *rest):
        return method(self, as_float32(a), as_float32(b), *rest)

    return run


def _cast(method):
    """Casts from and to bfloat16 pass through float32."""

    def run(self, source, target, *rest):
        if is_bfloat16(source):
            source = as_float32(source)
            return source if target.scalar == tl.float32 else run(self, source, target, *rest)
        if target.scalar != tl.bfloat16:
            return source if source.dtype.scalar == target.scalar else method(self, source, target, *rest)
        with np.errstate(over="ignore"):
            return as_bfloat16(source)

    return run


def install() -> None:
    """Patch the interpreter once, and refuse to go on if the patch does not do what it should."""
    if getattr(InterpreterBuilder, "repaired_bfloat16", False):
        return
    missing = [name for name in PATCHED if not hasattr(InterpreterBuilder, name)]
    if missing:
        raise RuntimeError(f"triton {triton.__version__}: the interpreter no longer has {', '.join(missing)}")
    wrappers = {"create_dot": _dot, "cast_impl": _cast, "create_fp_to_fp": _cast}
    for name in PATCHED:
        wrap = wrappers.get(name, _arithmetic)
        setattr(InterpreterBuilder, name, wrap(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.repaired_bfloat16 = True
    self_test()


@triton.jit
def _exercise(x, y, product, total, quotient, negated, less, wide, back, D: tl.constexpr):
    i = tl.arange(0, D)
    at = i[:, None] * D + i[None, :]
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(product + at, tl.dot(a, b, input_precision="ieee"))
    tl.store(total + at, a + b)
    tl.store(quotient + at, a * b)
    tl.store(negated + at, -a)
    tl.store(less + at, (a < b).to(tl.int8))
    tl.store(wide + at, a.to(tl.float32))
    tl.store(back + at, (a.to(tl.float32) * 1.00537109375).to(tl.bfloat16))  # most results round up


def self_test() -> None:
    """Products, sums, comparisons and casts against torch, with infinities, NaN, subnormals and halfway cases."""
    generator = torch.Generator().manual_seed(0)
    D = 32
    x = torch.randn(D, D, generator=generator).bfloat16()
    y = torch.randn(D, D, generator=generator).bfloat16()
    product, wide = torch.empty(D, D), torch.empty(D, D)
    total, times, negated, back = (torch.empty_like(x) for _ in range(4))
    less = torch.empty(D, D, dtype=torch.int8)
    _exercise[(1,)](x, y, product, total, times, negated, less, wide, back, D=D)
    exact = x.double() @ y.double()
    wrong = [
        name
        for name, ok in {
            "dot": (product.double() - exact).norm() <= 1e-6 * exact.norm(),
            "add": torch.equal(total, x + y),
            "mul": torch.equal(times, x * y),
            "neg": torch.equal(negated, -x),
            "less": torch.equal(less.bool(), x < y),
            "to float32": torch.equal(wide, x.float()),
            "to bfloat16": torch.equal(back, (x.float() * 1.00537109375).bfloat16()),
            "special values": _special_values_ok(),
        }.items()
        if not ok
    ]
    if wrong:
        raise RuntimeError(f"triton {triton.__version__}: bfloat16 in the interpreter is wrong in: {', '.join(wrong)}")


def _special_values_ok() -> bool:
    values = [0.0, -0.0, 1e-40, -1e-40, 3.4028234e38, -3.4028234e38, 3.39e38, 1.00390625, 1.01171875, 65504.0]
    x = torch.tensor([*values, float("inf"), float("-inf"), float("nan")])
    y = torch.from_numpy(narrow(x.numpy()).view(np.int16)).view(torch.bfloat16)
    same = torch.equal(y.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0)) and torch.equal(y.isnan(), x.isnan())
    return same and torch.equal(torch.signbit(y[:-1]), torch.signbit(x[:-1]))


def available() -> bool:
    """Whether kernels run in the interpreter in this process."""
    return isinstance(_exercise, interpreter.InterpretedFunction)
