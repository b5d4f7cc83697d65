"""What every layer checks: its sizes when it is made; of a call its tokens, and a state of its own kind and batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from memattn.ops import _checks as check
from memattn.state import MemoryState


def check_sizes(layer: nn.Module, **sizes: int) -> None:
    """Every one of the named arguments is at least 1."""
    for argument, size in sizes.items():
        if size < 1:
            raise ValueError(f"{type(layer).__name__}: {argument} is {size}; expected at least 1")


def check_tokens(layer: nn.Module, x: Tensor) -> None:
    """x is [B, T, embed_dim]."""
    name, width = type(layer).__name__, layer.embed_dim
    check.tensor(name, "x", x)
    if x.dim() != 3 or x.shape[2] != width:
        raise ValueError(f"{name}: x has shape {list(x.shape)}; expected [B, T, embed_dim] with {width}")


def check_state(layer: nn.Module, state: Any, kind: type[MemoryState], batch: int | None) -> None:
    """state is a `kind` of `batch` rows; None: a pool of any number."""
    name = type(layer).__name__
    if not isinstance(state, kind):
        raise TypeError(f"{name}: state is {type(state).__name__}; expected {kind.__name__}, as of {name}.init_state")
    if batch is not None and state.batch != batch:
        raise ValueError(f"{name}: state has {state.batch} rows; expected {batch}, one per sequence of x")


def check_step(layer: nn.Module, x: Tensor, state: Any, kind: type[MemoryState], rows: Tensor | None = None) -> None:
    """x [B, t ≥ 1, embed_dim] and the state that a step changes; rows: its state_indices."""
    check_tokens(layer, x)
    if x.shape[1] == 0:
        raise ValueError(f"{type(layer).__name__}.step: x has 0 tokens; expected at least 1")
    check_state(layer, state, kind, x.shape[0] if rows is None else None)
