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


STEPS = {
    "linear attention step": Call(ops.linear_attention_step, _linear(False), ("g", "state")),
    "linear attention step, normalised": Call(ops.linear_attention_step, _linear(True), ("g", "state")),
}
CALLS = STEPS
