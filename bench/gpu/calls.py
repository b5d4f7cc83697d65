"""Calls of the compiled ops beside the delta rule's, which the checks of `checks.py` repeat, capture and sanitise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memattn import ops

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """`inputs(draw, size)`: arguments of `op` from `draw(*shape)`, which gives normal float32 numbers on the device.

    `size` is 1 for the sanitizer, larger where time allows. An argument named in `wide` stays float32.
    """

    op: Callable[..., Any]
    inputs: Callable[[Callable[..., Tensor], int], Inputs]
    wide: tuple[str, ...] = ()

    def make(self, dtype: torch.dtype, device: str, seed: int = 0, size: int = 1) -> Inputs:
        """Keyword arguments of `op`."""
        noise = torch.Generator(device).manual_seed(seed)
        given = self.inputs(lambda *shape: torch.randn(shape, generator=noise, device=device), size)

        def put(name: str, x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and name not in self.wide else x

        return {name: put(name, x) for name, x in given.items()}

    def run(self, inputs: Inputs) -> dict[str, Tensor]:
        """Results by name, on a copy of what the op writes."""
        given = {n: x.clone() if n == "state" else x for n, x in inputs.items()}
        results = self.op(**given)
        flat = [results] if isinstance(results, Tensor) else [x for x in results if x is not None]
        return {str(i): x for i, x in enumerate(flat)} | {n: given[n] for n in ("state",) if n in given}


def _linear(normalize: bool) -> Callable[..., Inputs]:
    def inputs(draw: Callable[..., Tensor], size: int) -> Inputs:
        batch, dim = 2 * size, 24 if size == 1 else 128
        q, k = (draw(batch, 2, 2, dim).abs() for _ in range(2))
        state = draw(batch, 4, dim, dim + normalize)
        return {"q": q, "k": k, "v": draw(batch, 2, 4, dim), "g": -draw(batch, 2, 4).abs(), "state": state.abs(),
                "normalize": normalize}  # fmt: skip

    return inputs


def _scan(length: int, chunk_size: int | None) -> Callable[..., Inputs]:
    def inputs(draw: Callable[..., Tensor], size: int) -> Inputs:
        batch, dim = size, 40 if size == 1 else 1024
        g = -draw(batch, length, dim).abs()
        return {"g": g, "x": draw(batch, length, dim), "x2": draw(batch, length, dim // 4), "state": draw(batch, dim),
                "chunk_size": chunk_size, "emit": "both" if chunk_size else "all"}  # fmt: skip

    return inputs


def scan(g: Tensor, x: Tensor, x2: Tensor, state: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    """The scan of two payloads, all results in a row."""
    results = ops.gated_scan(g, (x, x2), initial_state=(state, state), output_final_state=True, **settings)
    return tuple(x for kind in results if kind is not None for x in kind)


def gradients(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The gradients of `op` under its own results."""

    def backward(**given: Any) -> tuple[Tensor, ...]:
        tensors = {n: x for n, x in given.items() if isinstance(x, Tensor) and x.is_floating_point()}
        leaves = {n: x.detach().requires_grad_() for n, x in tensors.items()}
        with torch.enable_grad():
            results = op(**{**given, **leaves})
            return torch.autograd.grad(results, list(leaves.values()), [x.detach() for x in results])

    return backward


def _segments(size_of_segment: int) -> Callable[..., Inputs]:
    """Packed, with segments inside and across the kernels' tiles."""

    def inputs(draw: Callable[..., Tensor], size: int) -> Inputs:
        length, dim = (70, 40) if size == 1 else (3000, 128)
        q, k, v, beta = (draw(1, length, heads, *more) for heads, *more in ((4, dim), (2, dim), (2, dim + 8), (2,)))
        bounds = torch.tensor([0, 17, 17, length], device=q.device)
        return {"q": q.abs(), "k": k.abs(), "v": v, "beta": beta.sigmoid(), "state": draw(3, 2, dim, dim + 9).abs(),
                "segment_size": size_of_segment, "cu_seqlens": bounds}  # fmt: skip

    return inputs


def segments(state: Tensor, **given: Any) -> tuple[Tensor, ...]:
    """The frozen delta memory, both results."""
    return ops.segment_memory(**given, delta=True, initial_state=state, output_final_state=True)


def _scan_step(draw: Callable[..., Tensor], size: int) -> Inputs:
    batch, dim = 2 * size, 24 if size == 1 else 2048
    return {"g": -draw(batch, 2, dim).abs(), "xs": draw(batch, 2, dim), "state": draw(batch, dim)}


def _decode(paged: bool) -> Callable[..., Inputs]:
    def inputs(draw: Callable[..., Tensor], size: int) -> Inputs:
        keys, heads, dim = (600, 2, 40) if size == 1 else (3000, 8, 128)
        lengths = torch.tensor([keys, keys // 2 + 1, 0], device=draw(1).device)
        cache = {name: draw(3, keys, heads, dim) for name in ("k_cache", "v_cache")}
        given = {"q": draw(3, 2, 4 * heads, dim), **cache, "cache_seqlens": lengths, "sink": draw(4 * heads)}
        if not paged:
            return given
        pages = {name: x.view(-1, 50, heads, dim) for name, x in cache.items()}
        table = torch.arange(3 * keys // 50, dtype=torch.int32, device=lengths.device).view(3, -1)
        return {**given, **pages, "page_table": table, "ring_start": 100, "window": 400}

    return inputs


_WIDE = ("g", "state")
_SCANS = {"in chunks": (70, 16), "in chains": (300, None), "in chains of chunks": (300, 140)}
CAPTURED = {
    "linear attention step": Call(ops.linear_attention_step, _linear(False), _WIDE),
    "linear attention step, normalised": Call(ops.linear_attention_step, _linear(True), _WIDE),
    "scan step": Call(ops.gated_scan_step, _scan_step, _WIDE),
    "decode": Call(ops.attention_decode, _decode(paged=False)),
    "decode, paged ring": Call(ops.attention_decode, _decode(paged=True)),
    **{f"scan {words}": Call(scan, _scan(*sizes), _WIDE) for words, sizes in _SCANS.items()},
}
CALLS = {
    **CAPTURED,
    **{f"scan backward {words}": Call(gradients(scan), _scan(*sizes), _WIDE) for words, sizes in _SCANS.items()},
    **{f"segments of {n}": Call(segments, _segments(n), _WIDE) for n in (16, 200)},
    **{f"segments of {n}, backward": Call(gradients(segments), _segments(n), _WIDE) for n in (16, 200)},
}
