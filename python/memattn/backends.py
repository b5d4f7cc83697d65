"""Which backend serves a call, and why the others do not.

Every op registers one frozen `Limits` per backend. `why_not` derives all reasons against a request; the choice takes
the first backend without one. An explicit choice (argument, `use_backend`, MEMATTN_BACKEND) that cannot serve raises
a `BackendError` naming every reason; falling back to plain torch warns once with the cause.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from memattn import _native

ORDER = ("cuda", "triton", "cpu", "chunked")


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot serve the call; the message lists every reason."""


@dataclass(frozen=True)
class Request:
    """What a call needs: `dims` are (name, size) pairs, `features` words such as "backward" or "packed"."""

    device: str
    dtype: torch.dtype
    dims: tuple[tuple[str, int], ...] = ()
    features: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Limits:
    """What one backend can serve for one op. `available` says why it cannot run on this machine at all, or None."""

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    available: Callable[[str], str | None]
    dims: tuple[int, int] | None = (16, 256)  # least and largest head dim; None: any
    features: frozenset[str] = frozenset()
    fix: str = field(default="", compare=False)


_registry: dict[str, dict[str, Limits]] = {}
_local = threading.local()
_warned: set[str] = set()


def _parse(names: str | Sequence[str], where: str) -> tuple[str, ...]:
    names = tuple(n.strip() for n in names.split(",")) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in ORDER:
            raise ValueError(f"{where}: backend is {name!r}; allowed: {', '.join(ORDER)}")
    return names


_environment = _parse(os.environ["MEMATTN_BACKEND"], "MEMATTN_BACKEND") if os.environ.get("MEMATTN_BACKEND") else ()


def register(op: str, backend: str, limits: Limits) -> None:
    """Declare that `backend` implements `op` within `limits`."""
    _registry.setdefault(op, {})[backend] = limits


def registry() -> dict[str, dict[str, Limits]]:
    """Every op's backends and limits."""
    return _registry


def _text(dtypes) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def why_not(op: str, backend: str, request: Request, *, explicit: bool = False) -> list[str]:
    """Reasons why `backend` cannot serve `request` for `op`; empty when it can."""
    limits = _registry[op].get(backend)
    if limits is None:
        return [f"{op} has no {backend} kernel; it has: {', '.join(_registry[op])}"]
    reasons = []
    interpreted = backend == "triton" and explicit and request.device == "cpu" and triton_interpreter()
    if request.device not in limits.devices and request.device != "meta" and not interpreted:
        hint = "; on cpu it runs only under TRITON_INTERPRET=1 and named explicitly" if backend == "triton" else ""
        reasons.append(f"tensors are on {request.device}, supported: {', '.join(limits.devices)}{hint}")
    if request.dtype not in limits.dtypes and not (interpreted and request.dtype == torch.float64):
        reasons.append(f"dtype is {_text([request.dtype])}, supported: {_text(limits.dtypes)}")
    if limits.dims is not None:
        low, high = limits.dims
        outside = (f"{name} is {size}" for name, size in request.dims if not low <= size <= high)
        reasons += [f"{text}, supported: {low}..{high}" for text in outside]
    for feature in sorted(request.features - limits.features):
        reasons.append(f"{feature} is not supported, supported: {', '.join(sorted(limits.features)) or 'none'}")
    # While a graph is traced nothing can be loaded, and what cannot serve the call need not be.
    missing = None if reasons and torch.compiler.is_compiling() else limits.available(request.device)
    if missing is not None:
        reasons.append(missing)
    return reasons


def choose(op: str, request: Request, backend: str | None = None, received: Callable[[], str] = lambda: "") -> str:
    """The backend for this call: `backend`, else the innermost `use_backend`, else MEMATTN_BACKEND, else the first.

    Raises BackendError when a named one cannot serve; `received` describes the call's tensors for that message.
    """
    wanted = _parse(backend, f"{op}: argument backend") if backend else getattr(_local, "names", ()) or _environment
    table = _registry[op]
    candidates = wanted or tuple(name for name in ORDER if name in table)
    refused: dict[str, list[str]] = {}
    for name in candidates:
        reasons = why_not(op, name, request, explicit=bool(wanted))
        if not reasons:
            if name == "chunked" and not wanted:
                _warn_fallback(op, {n: r for n, r in refused.items() if request.device in table[n].devices})
            return name
        refused[name] = reasons
    lines = [f"{op}: no requested backend can serve this call", f"  received: {received()}"]
    lines += [f"  {name}: {reason}" for name, reasons in refused.items() for reason in reasons]
    able = [name for name in ORDER if name in table and name not in refused and not why_not(op, name, request)]
    lines.append(f"  fix: use backend={able[0]!r}" if able else "  fix: change the inputs as listed")
    raise BackendError("\n".join(lines))


def _warn_fallback(op: str, refused: dict[str, list[str]]) -> None:
    if torch.compiler.is_compiling():
        return
    cause = "; ".join(f"{name}: {reason}" for name, reasons in refused.items() for reason in reasons)
    if (key := f"{op}: {cause}") not in _warned:
        _warned.add(key)
        warnings.warn(f"memattn.{op} runs in plain torch (backend 'chunked'), slow but right. {cause}", stacklevel=4)


@contextmanager
def use_backend(backends: str | Sequence[str]) -> Iterator[None]:
    """Within the block, ops of this thread use the first of `backends` that can serve, else raise BackendError.

    >>> with memattn.use_backend("triton"): ...
    """
    names, before = _parse(backends, "use_backend"), getattr(_local, "names", ())
    _local.names = names
    try:
        yield
    finally:
        _local.names = before


def triton_interpreter() -> bool:
    """Whether Triton kernels would run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("0", "")


def needs_native(name: str) -> Callable[[str], str | None]:
    """`Limits.available` of a backend that lives in the extension `name`."""
    return lambda device: _native.native_reason(name)


def needs_triton(device: str) -> str | None:
    """`Limits.available` of the Triton backend."""
    return _native.triton_reason()


def always(device: str) -> str | None:
    """`Limits.available` of plain torch."""
    return None
