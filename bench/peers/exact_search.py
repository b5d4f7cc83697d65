"""Exact nearest-neighbour search of others: torch's product and topk, which stores all scores, and faiss."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from bench.compare import Candidate


def by_torch(q, keys, k):
    """q [1,S,1,D], keys [1,T,1,D] -> values and indices [S,k]."""
    return torch.topk(q[0, :, 0] @ keys[0, :, 0].T, k, sorted=False)


def by_faiss(q, keys, k):
    """The same, in place: a flat index would first copy the keys."""
    import faiss

    values, _ = faiss.knn(q[0, :, 0].numpy(), keys[0, :, 0].numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return (torch.from_numpy(values),)


def candidates(op: str, mode: str, device: str, wheel: Path | None) -> list[Candidate | tuple[str, str]]:
    """torch, and faiss where it is installed (float32 on a CPU). `wheel` is another peer's."""
    if op != "knn":
        return []
    from bench.ops.knn import run

    found: list[Candidate | tuple[str, str]] = [
        Candidate("torch matmul and topk", torch.__version__, lambda given: _shaped(run(by_torch, given)))
    ]
    if importlib.util.find_spec("faiss") is None:
        return [*found, ("faiss flat", "faiss is not installed")]
    import faiss

    return [*found, Candidate("faiss flat", faiss.__version__, lambda given: _shaped(run(by_faiss, given)))]


def _shaped(results):
    return {name: x[None, :, None] for name, x in results.items()}
