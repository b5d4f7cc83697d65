"""Errors against the float64 truth, and the tolerance rule: at most twice the comparator's error, and a ceiling."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CEILING = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
WINDOWS = 4  # time windows whose errors are judged one by one, so that a drift along T shows
SHORTEST = 16  # tokens of a window, the shortest chunk: inside one chunk all of dg shares one error, no drift shows


def relative_error(x: Tensor, truth: Tensor, scale: float | None = None) -> float:
    """‖x − truth‖ / ‖truth‖ (or / scale) in float64; inf where finiteness differs."""
    x, truth = x.detach().double().cpu(), truth.detach().double().cpu()
    if x.shape != truth.shape or not torch.equal(x.isfinite(), truth.isfinite()):
        return float("inf")
    finite = truth.isfinite()
    norm = truth[finite].norm().item() if scale is None else scale
    error = (x - truth)[finite].norm().item()
    return error / norm if norm > 0 else (0.0 if error == 0 else float("inf"))


def windows(name: str, x: Tensor) -> list[Tensor]:
    """Token-major tensors split along T; states whole."""
    if name.endswith("state") or x.dim() < 2 or x.shape[1] < SHORTEST * WINDOWS:
        return [x]
    return list(x.chunk(WINDOWS, 1))


def evaluate(op: Callable, inputs: dict[str, object], seed: int = 1, grad: bool = True) -> dict[str, Tensor]:
    """o, final_state and, for every tensor input, its gradient ("d" + name) under fixed random cotangents."""
    inputs = {
        n: x.detach().clone().requires_grad_(grad) if isinstance(x, Tensor) and x.is_floating_point() else x
        for n, x in inputs.items()
    }
    o, final_state = op(**inputs, output_final_state=True)
    results = {"o": o.detach(), "final_state": final_state.detach()}
    if not grad:
        return results
    generator = torch.Generator().manual_seed(seed)
    cotangents = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).to(o.dtype).to(y) for y in (o, final_state)
    ]
    names = [n for n, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad]
    leaves = [inputs[n] for n in names]
    pairs = [(y, dy) for y, dy in zip((o, final_state), cotangents, strict=True) if y.requires_grad]  # T = 0: none of o
    ends, seeds = [y for y, _ in pairs], [dy for _, dy in pairs]
    gradients = torch.autograd.grad(ends, leaves, seeds, allow_unused=True) if ends else [None] * len(leaves)
    for name, leaf, gradient in zip(names, leaves, gradients, strict=True):
        results[f"d{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


def to_float64(inputs: dict[str, object]) -> dict[str, object]:
    """The same inputs, exactly, in float64 on the CPU."""
    return {
        n: x.detach().cpu().double() if isinstance(x, Tensor) and x.is_floating_point()
        else x.cpu() if isinstance(x, Tensor) else x
        for n, x in inputs.items()
    }  # fmt: skip


def assert_close_to_truth(
    actual: dict[str, Tensor],
    comparator: dict[str, Tensor],
    truth: dict[str, Tensor],
    ceiling: float,
    scales: dict[str, float] | None = None,
) -> dict[str, float]:
    """Gate every tensor and window; returns the whole-tensor errors. `scales` replaces ‖truth‖ where that vanishes."""
    errors, scales = {}, scales or {}
    for name, expected in truth.items():
        errors[name] = relative_error(actual[name], expected, scales.get(name))
        assert errors[name] <= ceiling, f"{name}: error {errors[name]:.3g} against float64, ceiling {ceiling:.3g}"
        parts = zip(*(windows(name, x[name]) for x in (actual, comparator, truth)), strict=True)
        for i, (ours, theirs, exact) in enumerate(parts):
            scale = max(exact.double().norm().item(), scales.get(name, 0.0))
            ours_error = (ours.double().cpu() - exact.double()).norm().item()
            theirs_error = (theirs.double().cpu() - exact.double()).norm().item()
            rounding = torch.finfo(actual[name].dtype).eps * scale  # what storing the result costs anyone
            assert ours_error <= 2 * theirs_error + rounding, (
                f"{name}, window {i}: error {ours_error:.3g}, comparator {theirs_error:.3g}, scale {scale:.3g}"
            )
    return errors
