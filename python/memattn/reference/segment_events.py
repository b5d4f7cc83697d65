"""Events of a text by surprise, in plain Python: the definition, token by token, in float64.

It is the truth that the C++ loop is measured against, and the fallback where that is not built. The statistics of every
token are those of its window, computed anew, so that nothing depends on where a text is cut into calls.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-12  # differences below it, relative to what is compared, are none


@dataclass(frozen=True)
class Settings:
    """What makes an event; see `memattn.ops.segment_events`."""

    window: int
    gamma: float
    min_size: int
    max_size: int
    refine: str | None


@dataclass(frozen=True)
class Span:
    """Rows of a text from position `first` on."""

    rows: Tensor
    first: int

    def part(self, begin: int, end: int) -> Tensor:
        """Positions begin..end."""
        return self.rows[begin - self.first : end - self.first]


def surprising(s: Settings, t: int, surprise: Span) -> bool:
    """z_t > μ_t + γ σ_t, by more than rounding, over the last `window` surprises before t; at least two of them."""
    window, z = surprise.part(max(0, t - s.window), t), float(surprise.part(t, t + 1))
    if len(window) < 2:
        return False
    mean, deviation = float(window.mean()), float(window.std())
    noise = ROUNDING * (abs(mean) + abs(z) + float(window.abs().max()))
    return z - mean > s.gamma * deviation + noise


def similarities(first: int, end: int, keys: Span | None, matrix: Tensor | None) -> Tensor:
    """A of tokens first..end."""
    if matrix is not None:
        a = matrix[first:end, first:end].double()
        return (a + a.mT) / 2
    assert keys is not None
    flat = keys.part(first, end).flatten(1).double()
    return flat @ flat.mT


def quality(a: Tensor, split: int, refine: str) -> float:
    """Modularity, or minus the conductance, of the communities [0, split) and [split, n); −inf without meaning."""
    degrees, total = a.sum(1), float(a.sum())
    left, right = float(degrees[:split].sum()), float(degrees[split:].sum())
    if refine == "conductance":
        least = min(left, right)
        return -float(a[:split, split:].sum()) / least if least > 0 else -torch.inf
    if not total > 0:
        return -torch.inf
    inside = a[:split, :split].sum() + a[split:, split:].sum()
    return float(inside) / total - (left**2 + right**2) / total**2


def refined(s: Settings, begin: int, proposed: int, end: int, keys: Span | None, matrix: Tensor | None) -> int:
    """The best place in begin + min_size..proposed for a boundary, the last of equally good ones."""
    assert s.refine is not None
    around = (proposed - begin) // 2
    first, last = max(0, begin - around), min(end, proposed + around)
    a, best, place = similarities(first, last, keys, matrix), -torch.inf, proposed
    for t in range(begin + s.min_size, proposed + 1):
        value = quality(a, t - first, s.refine)
        if value >= best - ROUNDING or value == best:
            place = t
        best = max(best, value) if value == value else best
    return place


def loop(
    s: Settings, begin: int, following: int, surprise: Span, keys: Span | None, matrix: Tensor | None, end: int,
    over: bool,
) -> tuple[list[int], int, int]:  # fmt: skip
    """Positions where events begin, begin of the open event, and the first token that is not judged yet."""
    begins: list[int] = []
    for t in range(following, end):
        size, place = t - begin, t
        if size >= s.min_size and surprising(s, t, surprise):
            if s.refine is not None:
                if not over and t + size // 2 > end:
                    return begins, begin, t
                place = refined(s, begin, t, end, keys, matrix)
        elif size != s.max_size:
            continue
        begin = place
        begins.append(place)
    return begins, begin, max(following, end)
