"""Attention's probabilities as a matrix, summed over the queries: how SnapKV and H2O compute it in torch."""

from __future__ import annotations

from pathlib import Path

import torch

from bench.compare import Candidate
from bench.registry import Inputs, Results

LARGEST = 2**31  # values of the matrix


def column_sums(given: Inputs) -> Results:
    """q [B,Tq,HQ,D] at the end of k [B,Tk,HKV,D] -> mass [B,Tk,HKV]."""
    q, k = given["q"].transpose(1, 2), given["k"].transpose(1, 2)
    (batch, heads, queries, dim), keys = q.shape, k.shape[2]
    if batch * heads * queries * keys > LARGEST:
        raise NotImplementedError(f"a matrix of {heads}×{queries}×{keys} values")
    with torch.no_grad():
        s = q.unflatten(1, (k.shape[1], -1)) @ (k[:, :, None] * dim**-0.5).mT
        ahead = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu(keys - queries + 1)
        p = s.masked_fill_(ahead, -torch.inf).softmax(-1, dtype=torch.float32)
        return {"mass": p.sum((2, 3)).transpose(1, 2)}


def candidates(op: str, mode: str, device: str, wheel: Path | None) -> list[Candidate | tuple[str, str]]:
    """torch itself. `wheel` is another peer's."""
    return [Candidate("torch softmax and sum", torch.__version__, column_sums)] if op == "attention_mass" else []
