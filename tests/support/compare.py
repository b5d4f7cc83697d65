"""Errors against the float64 truth, and the tolerance rule: at most twice the comparator's error, and a ceiling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

CEILING = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
WINDOWS = 4  # time windows whose errors are judged one by one, so that a drift along T shows
SHORTEST = 16  # tokens behind the judgement of a window, over all draws
LUCK = 0.25  # a draw with less of the allowed error counts as this much: it must not hide the others


def flushed(x: Tensor) -> Tensor:
    """x in float64 on the CPU; what float32 has no normal number for is 0."""
    x = x.detach().double().cpu()
    return x.masked_fill(x.abs() < torch.finfo(torch.float32).tiny, 0.0)


def relative_error(x: Tensor, truth: Tensor, scale: float | None = None) -> float:
    """‖x − truth‖ / ‖truth‖ (or / scale) in float64; inf where finiteness differs."""
    x, truth = flushed(x), flushed(truth)
    if x.shape != truth.shape or not torch.equal(x.isfinite(), truth.isfinite()):
        return float("inf")
    finite = truth.isfinite()
    norm = truth[finite].norm().item() if scale is None else scale
    error = (x - truth)[finite].norm().item()
    return error / norm if norm > 0 else (0.0 if error == 0 else float("inf"))


def windows(name: str, x: Tensor, draws: int = 1) -> list[Tensor]:
    """Token-major tensors split along T; states whole."""
    if name.endswith("state") or x.dim() < 2 or x.shape[1] * draws < SHORTEST * WINDOWS or x.shape[1] < WINDOWS:
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
    # Multiples of 1/32 below 8 are exact in every dtype, so that all differentiate the same function.
    cotangents = [
        torch.randn(y.shape, generator=generator, dtype=torch.float64).mul(32).round().div(32).to(y)
        for y in (o, final_state)
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


Results = dict[str, Tensor]


def assert_close_to_truth(
    actual: Results, comparator: Results, truth: Results, ceiling: float, scales: dict[str, float] | None = None
) -> dict[str, float]:
    """`assert_draws_close_to_truth` of a single draw; returns its errors."""
    (errors,) = assert_draws_close_to_truth([(actual, comparator, truth, scales or {})], ceiling)
    return errors


def assert_draws_close_to_truth(
    draws: Iterable[tuple[Results, Results, Results, dict[str, float]]], ceiling: float
) -> list[dict[str, float]]:
    """Gate every tensor and window of draws (actual, comparator, truth, scales) of one case; returns the errors.

    The ceiling holds in each draw. Twice the comparator's error holds for the geometric mean over the draws: all dg of
    a chunk share one error, and under strong decay a single token holds most of dg, so that in one draw the ratio of
    two equally good results is a coin flip. A float64 result is as exact as the truth: for it the ceiling says all.
    `scales` replaces ‖truth‖ where that vanishes.
    """
    errors: list[dict[str, float]] = []
    shares: dict[tuple[str, int], list[float]] = {}
    draws = list(draws)
    for actual, comparator, truth, scales in draws:
        errors.append({name: relative_error(actual[name], x, scales.get(name)) for name, x in truth.items()})
        for name, error in errors[-1].items():
            assert error <= ceiling, f"{name}: error {error:.3g} against float64, ceiling {ceiling:.3g}"
            if actual[name].dtype == torch.float64:
                continue
            parts = zip(*(windows(name, x[name], len(draws)) for x in (actual, comparator, truth)), strict=True)
            for i, (ours, theirs, exact) in enumerate(parts):
                share = share_of_allowed(ours, theirs, exact, scales.get(name, 0.0))
                shares.setdefault((name, i), []).append(share)
    for (name, i), of_draws in shares.items():
        mean = math.exp(sum(math.log(max(share, LUCK)) for share in of_draws) / len(of_draws))
        shown = ", ".join(f"{share:.2f}" for share in of_draws)
        assert mean <= 1, f"{name}, window {i}: {mean:.3g} times the allowed error, in the single draws {shown}"
    return errors


def share_of_allowed(ours: Tensor, theirs: Tensor, exact: Tensor, scale: float) -> float:
    """Our error over the allowed one: twice the comparator's and what storing the result costs anyone."""
    rounding = torch.finfo(ours.dtype).eps
    ours, theirs, exact = flushed(ours), flushed(theirs), flushed(exact)
    error = (ours - exact).norm().item()
    allowed = 2 * (theirs - exact).norm().item() + rounding * max(exact.norm().item(), scale)
    return error / allowed if allowed > 0 else (math.inf if error > 0 else 0.0)
