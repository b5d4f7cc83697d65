"""Input checks shared by all ops. Each raises one error naming the argument, what was received and what is allowed."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CHECK_VALUES_EVERYWHERE = os.environ.get("MEMATTN_CHECK", "0") not in ("0", "")


def dtype_name(dtype: torch.dtype) -> str:
    """'float32' for torch.float32."""
    return str(dtype).removeprefix("torch.")


def describe(**tensors: Tensor | None) -> str:
    """One line naming each given tensor's dtype, shape and device."""
    given = {name: x for name, x in tensors.items() if x is not None}
    return ", ".join(f"{n} {dtype_name(x.dtype)} {list(x.shape)} on {x.device}" for n, x in given.items())


def tensor(op: str, name: str, x: object) -> None:
    """`x` is a torch.Tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is {type(x).__name__}; expected a torch.Tensor")


def rank(op: str, name: str, x: Tensor, layout: str) -> None:
    """`x` has the rank of `layout`, e.g. "[B, T, H, K]"."""
    tensor(op, name, x)
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} has shape {list(x.shape)} of rank {x.dim()}; expected {layout}")


def shape(op: str, name: str, x: Tensor, layout: str, expected: Sequence[int]) -> None:
    """`x` has exactly the shape `expected`, described by `layout`."""
    tensor(op, name, x)
    if tuple(x.shape) != tuple(expected):
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}; expected {layout} = {list(expected)}")


def dtype(op: str, name: str, x: Tensor, allowed: Sequence[torch.dtype], why: str = "") -> None:
    """`x.dtype` is one of `allowed`."""
    if x.dtype not in allowed:
        names = " or ".join(dict.fromkeys(dtype_name(d) for d in allowed))
        raise TypeError(f"{op}: {name} is {dtype_name(x.dtype)}; expected {names}{why}")


def device(op: str, name: str, x: Tensor, like: Tensor, like_name: str) -> None:
    """`x` lives where `like` lives."""
    if x.device != like.device:
        raise ValueError(f"{op}: {name} is on {x.device}; expected {like.device} like {like_name}")


def head_dim(op: str, name: str, size: int) -> None:
    """16 ≤ size ≤ 256."""
    if not 16 <= size <= 256:
        raise ValueError(f"{op}: head dimension {name} is {size}; allowed: 16..256")


class Passed:
    """Signatures (shapes, dtypes, devices) that passed all metadata checks: a decode loop pays for them once."""

    LIMIT = 4096

    def __init__(self) -> None:
        self._signatures: set[tuple] = set()

    def signature(self, *inputs: object) -> tuple | None:
        """What the metadata checks depend on; None while compiling and for inputs that are no tensors or constants."""
        if torch.compiler.is_compiling():
            return None
        parts: list[object] = []
        for x in inputs:
            if isinstance(x, Tensor):
                parts += (x.shape, x.dtype, x.device)
            elif x is None or isinstance(x, (int, float, str)):
                parts.append(x)
            else:
                return None
        return tuple(parts)

    def __contains__(self, signature: tuple | None) -> bool:
        return signature in self._signatures

    def add(self, signature: tuple | None) -> None:
        """Remember that `signature` passed."""
        if signature is not None:
            if len(self._signatures) >= self.LIMIT:
                self._signatures.clear()
            self._signatures.add(signature)


def values_checked(x: Tensor) -> bool:
    """Whether values may be looked at: eager CPU calls, or anywhere eager with MEMATTN_CHECK=1."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, torch.nn.Parameter) or x.device.type == "meta":
        return False
    return x.device.type == "cpu" or _CHECK_VALUES_EVERYWHERE


def log_gate(op: str, name: str, g: Tensor) -> None:
    """A natural-log decay is at most 0 (NaN passes and propagates)."""
    if not values_checked(g) or not g.numel():
        return
    highest = g.max().item()
    if not highest <= 0 and bool((g > 0).any()):  # a NaN is the maximum of anything
        highest = g.nan_to_num(-torch.inf, torch.inf).max().item()
        raise ValueError(f"{op}: {name} has a value of {highest:.6g}; a natural-log decay must be ≤ 0")


def cu_seqlens(op: str, x: Tensor, like: Tensor, name: str = "cu_seqlens") -> None:
    """Packed sequence bounds: [N+1] int32/int64, 0 = x[0] ≤ x[1] ≤ … ≤ x[N] = T, with B = 1."""
    cu_seqlens_layout(op, x, like, name)
    cu_seqlens_values(op, x, like, name)


def cu_seqlens_layout(op: str, x: Tensor, like: Tensor, name: str = "cu_seqlens") -> None:
    """The part of `cu_seqlens` that reads no values."""
    rank(op, name, x, "[N+1]")
    dtype(op, name, x, (torch.int32, torch.int64))
    device(op, name, x, like, "q")
    if x.shape[0] < 2:
        raise ValueError(f"{op}: {name} has {x.shape[0]} entries; expected N+1 ≥ 2")
    if like.shape[0] != 1:
        raise ValueError(f"{op}: batch size is {like.shape[0]} with {name}; packed sequences need batch size 1")


def cu_seqlens_values(op: str, x: Tensor, like: Tensor, name: str = "cu_seqlens") -> None:
    """The part of `cu_seqlens` that reads values."""
    if not values_checked(x):
        return
    bounds = x.tolist()
    if bounds[0] != 0 or bounds[-1] != like.shape[1]:
        raise ValueError(f"{op}: {name} runs from {bounds[0]} to {bounds[-1]}; expected from 0 to T = {like.shape[1]}")
    for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False)):
        if b < a:
            raise ValueError(f"{op}: {name} falls from {a} to {b} at entry {n + 1}; it must not decrease")


def lengths(op: str, x: Tensor, like: Tensor, like_name: str = "k") -> None:
    """Valid tokens of each batch row: [B] int32/int64 with values 0..T, `like` being [B, T, ...]."""
    shape(op, "lengths", x, "[B]", like.shape[:1])
    dtype(op, "lengths", x, (torch.int32, torch.int64))
    device(op, "lengths", x, like, like_name)
    if values_checked(x) and x.numel():
        low, high = x.aminmax()
        if int(low) < 0 or int(high) > like.shape[1]:
            raise ValueError(f"{op}: lengths holds {int(low)}..{int(high)}; allowed: 0..{like.shape[1]}")


def value_heads(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k [B, T, H, K] and v [B, T, HV, V] of one dtype and device, HV a multiple of H, K and V in 16..256."""
    rank(op, "q", q, "[B, T, H, K]")
    dtype(op, "q", q, FLOATS)
    shape(op, "k", k, "[B, T, H, K]", q.shape)
    rank(op, "v", v, "[B, T, HV, V]")
    batch, length, heads, _ = q.shape
    if v.shape[0] != batch or v.shape[1] != length:
        shape(op, "v", v, "[B, T, HV, V]", (batch, length, *v.shape[2:]))
    if heads == 0 or v.shape[2] == 0 or v.shape[2] % heads:
        raise ValueError(f"{op}: v has {v.shape[2]} heads; expected a positive multiple of q's {heads} heads")
    head_dim(op, "K", q.shape[3])
    head_dim(op, "V", v.shape[3])
    for name, x in (("k", k), ("v", v)):
        dtype(op, name, x, (q.dtype,), " like q")
        device(op, name, x, q, "q")


def in_place(op: str, state: Tensor) -> None:
    """A state that the op writes must be contiguous."""
    if not state.is_contiguous():
        raise ValueError(
            f"{op}: state has strides {list(state.stride())}; it is updated in place, so it must be contiguous"
        )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient will be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def inference_only(op: str, instead: str, *tensors: Tensor | None) -> None:
    """A step has no gradient; `instead` has one."""
    if needs_grad(*tensors):
        raise RuntimeError(
            f"{op}: an input requires grad; the step is for inference only, "
            f"use {instead} or call it under torch.no_grad()"
        )


def state_indices(op: str, x: Tensor, batch: int, pool: int, like: Tensor) -> None:
    """One row of the state pool per batch row, −1 for padding: [B] int32/int64 with values −1..P−1."""
    state_indices_layout(op, x, batch, like)
    state_indices_values(op, x, pool)


def state_indices_layout(op: str, x: Tensor, batch: int, like: Tensor) -> None:
    """The part of `state_indices` that reads no values."""
    shape(op, "state_indices", x, "[B]", (batch,))
    dtype(op, "state_indices", x, (torch.int32, torch.int64))
    device(op, "state_indices", x, like, "q")


def state_indices_values(op: str, x: Tensor, pool: int) -> None:
    """The part of `state_indices` that reads values."""
    if values_checked(x) and x.numel():
        low, high = x.aminmax()
        if int(low) < -1 or int(high) >= pool:
            raise ValueError(f"{op}: state_indices holds {int(low)}..{int(high)}; allowed: -1 (padding)..{pool - 1}")


def choice(op: str, name: str, value: object, allowed: Sequence) -> None:
    """`value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} is {value!r}; allowed: {', '.join(repr(a) for a in allowed)}")


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Each tensor in contiguous layout, as the kernels need it."""
    return tuple(None if x is None else x.contiguous() for x in tensors)
