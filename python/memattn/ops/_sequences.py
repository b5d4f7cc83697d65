"""How many sequences and chunks a call has, batched or packed; shape functions of the recurrent ops."""

from __future__ import annotations

from torch import Tensor


def sequences(q: Tensor, cu_seqlens: Tensor | None):
    """N: batch rows, or packed sequences."""
    return q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def slots(q: Tensor, cu_seqlens: Tensor | None, span: int):
    """Number of chunk slots of `span` tokens. Packed sequence n from token a owns slots a//span + n + 0, 1, …"""
    if cu_seqlens is None:
        return q.shape[0] * ((q.shape[1] + span - 1) // span)
    return q.shape[1] // span + cu_seqlens.shape[0] - 1
