"""Gather copy: chosen rows of one tensor into chosen rows of another, e.g. pages of host memory into device slots.

target[targets_i] = source[sources_i]        every i
"""

from __future__ import annotations

import torch
from torch import Tensor

from memattn import backends
from memattn.backends import Limits, Request
from memattn.ops import _checks as check
from memattn.ops._library import define, resolve

OP = "gather_copy"
_ANY = (*check.FLOATS, torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bool)

define(f"{OP}_cpu", "(Tensor source, Tensor sources, Tensor(a!) target, Tensor targets) -> ()", lambda *args: None)
_CPU = resolve(f"{OP}_cpu")
backends.register(OP, "cpu", Limits(("cpu",), _ANY, backends.needs_native("_C"), dims=None))
backends.register(OP, "chunked", Limits(("cpu", "cuda", "xpu"), _ANY, backends.always, dims=None))

_PASSED = check.Passed()


def _one_run(x: Tensor) -> bool:
    """Whether every x[i] is one run of memory; the first stride is free."""
    run = 1
    for size, stride in zip(reversed(x.shape[1:]), reversed(x.stride()[1:]), strict=True):
        if size != 1 and stride != run:
            return False
        run *= size
    return True


def _check(source: Tensor, sources: Tensor, target: Tensor, targets: Tensor) -> None:
    for name, x in (("source", source), ("target", target)):
        check.tensor(OP, name, x)
        if x.dim() < 1:
            raise ValueError(f"{OP}: {name} has rank 0; expected [rows, ...]")
    check.dtype(OP, "source", source, _ANY)
    check.dtype(OP, "target", target, (source.dtype,), " like source")
    check.shape(OP, "target", target, "[rows, ...] with rows like source", (target.shape[0], *source.shape[1:]))
    for name, x, rows in (("sources", sources, source), ("targets", targets, target)):
        check.rank(OP, name, x, "[n]")
        check.dtype(OP, name, x, (torch.int64,))
        check.device(OP, name, x, rows, name[:-1])
    check.shape(OP, "targets", targets, "[n] like sources", sources.shape)


def _check_layout(source: Tensor, target: Tensor) -> None:
    for name, x in (("source", source), ("target", target)):
        if not _one_run(x):
            raise ValueError(f"{OP}: {name} has strides {list(x.stride())}; expected contiguous rows")


def _check_values(name: str, x: Tensor, rows: int) -> None:
    if check.values_checked(x) and x.numel():
        low, high = (int(i) for i in x.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{OP}: {name} holds {low}..{high}; allowed: 0..{rows - 1}")


def gather_copy(
    source: Tensor, sources: Tensor, target: Tensor, targets: Tensor, *, backend: str | None = None
) -> None:
    """Writes target[targets_i] = source[sources_i] in place. No gradient.

    ================  ============  =====================================================================
    argument          shape         dtype and meaning
    ================  ============  =====================================================================
    source            [R, ...]      any of float32, bfloat16, float16, float64, float8_e4m3fn, int8, uint8,
                                    int32, int64, bool; every source[r] contiguous, stride(0) free
    sources           [n]           int64 in 0..R−1, on source's device
    target            [S, ...]      source's dtype and row shape, on any device; written
    targets           [n]           int64 in 0..S−1, distinct, on target's device
    ================  ============  =====================================================================

    With equal entries in `targets` one of their rows is left there whole. Rows of source and target must not overlap.
    Raises ValueError, TypeError, BackendError.
    """
    if (signature := _PASSED.signature(source, sources, target, targets)) not in _PASSED:
        _check(source, sources, target, targets)
        _PASSED.add(signature)
    _check_layout(source, target)
    _check_values("sources", sources, source.shape[0])
    _check_values("targets", targets, target.shape[0])
    # A copy between devices needs a backend that serves both; the accelerator's name stands for the pair.
    device = target.device.type if source.device.type == "cpu" else source.device.type
    request = Request(device, source.dtype)
    name = backends.choose(OP, request, backend, lambda: check.describe(source=source, target=target))
    if name == "cpu":
        _CPU(source.detach(), sources, target.detach(), targets)
        return
    if source.device == target.device:
        target.detach()[targets] = source.detach()[sources]
        return
    rows = source.detach().index_select(0, sources)
    target.detach().index_copy_(0, targets, rows.to(target.device))
