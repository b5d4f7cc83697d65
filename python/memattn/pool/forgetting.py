"""Which tokens go when a layer holds more than its capacity.

"ring" drops the oldest tokens, "fifo" the oldest pages whole (LongMem's segments), "random" tokens drawn without
regard to age (M+), a `Forgetting` or a function of `PageStatistics` the pages of lowest score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from memattn.pool.config import POOL

POLICIES = ("refuse", "ring", "fifo", "random")


@dataclass(frozen=True)
class PageStatistics:
    """Of the pages of one layer and batch row, each [P] on the CPU.

    tokens int64; age int64: tokens written since its newest one; idle int64: page uses since its last use; hits int64:
    gathers that asked for it; mass float64: attention mass recorded for it; diversity float32: 1 − the largest cosine
    between its mean key and another page's (1 without "mean" among the pool's summaries); pinned bool.
    """

    tokens: Tensor
    age: Tensor
    idle: Tensor
    hits: Tensor
    mass: Tensor
    diversity: Tensor
    pinned: Tensor


@dataclass(frozen=True)
class Forgetting:
    """score = recency · r + hits · h + mass · m + diversity · d, the lowest goes first; higher weights keep more.

    r = 1 − age / max age, h = hits / max hits, m = mass / max mass, d = diversity: each in 0..1 over the layer's pages.
    """

    recency: float = 1.0
    hits: float = 0.0
    mass: float = 0.0
    diversity: float = 0.0

    def __call__(self, pages: PageStatistics) -> Tensor:
        parts = (
            (self.recency, 1 - _share(pages.age)), (self.hits, _share(pages.hits)), (self.mass, _share(pages.mass)),
            (self.diversity, pages.diversity.double()),
        )  # fmt: skip
        return sum((weight * part for weight, part in parts), torch.zeros(len(pages.tokens), dtype=torch.float64))


Policy = str | Forgetting | Callable[[PageStatistics], Tensor]


def _share(x: Tensor) -> Tensor:
    return x.double() / x.double().max().clamp(min=torch.finfo(torch.float64).tiny)


def check_policy(policy: object) -> None:
    """`policy` is a name of POLICIES or callable."""
    if not callable(policy) and policy not in POLICIES:
        raise ValueError(
            f"{POOL}: forget is {policy!r}; allowed: {', '.join(map(repr, POLICIES))}, Forgetting, a function"
        )


def diversity(means: Tensor) -> Tensor:
    """1 − the largest cosine between means[p] and another page's: [P] of means [P, HKV, K]."""
    x = torch.nn.functional.normalize(means.flatten(1).float(), dim=1)
    if len(x) < 2:
        return torch.ones(len(x))
    nearest = [
        (rows @ x.T)
        .index_put_((torch.arange(len(rows)), torch.arange(start, start + len(rows))), torch.tensor(-1.0))
        .amax(1)
        for start, rows in zip(range(0, len(x), 256), x.split(256), strict=True)
    ]
    return (1 - torch.cat(nearest)).cpu()


def pages_to_drop(order: Tensor, pages: PageStatistics, tokens: int) -> list[int]:
    """The first pages of `order` that are not pinned and together hold `tokens`; fewer if there are no more."""
    order = order[~pages.pinned[order]]
    before = pages.tokens[order].cumsum(0) - pages.tokens[order]
    return order[before < tokens].sort().values.tolist()


def order_by_score(policy: Callable[[PageStatistics], Tensor], pages: PageStatistics) -> Tensor:
    """Pages from the lowest score to the highest; equal ones in their order."""
    scores = policy(pages)
    if not isinstance(scores, Tensor) or scores.shape != pages.tokens.shape or bool(scores.isnan().any()):
        what = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"{POOL}: forget gave {what}; expected scores [P] = {list(pages.tokens.shape)} without NaN")
    return scores.cpu().argsort(stable=True)
