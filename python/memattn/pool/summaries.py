"""What a selection looks at instead of the keys: per page the mean, minimum and maximum of its keys.

    mean_j ← mean_j + (Σ_new k − n mean_j) / N_j        min_j ← min(min_j, k)        max_j ← max(max_j, k)

n keys are new among the N_j of page j. What a page loses is taken out by summarising what is left of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from memattn.pool.config import PoolConfig

_FIRST_ROWS = 64


class Summaries:
    """Per layer and kind a tensor [B, rows, HKV, K]; the page tables say which row belongs to which page."""

    def __init__(self, config: PoolConfig, device: torch.device, rows: int = _FIRST_ROWS) -> None:
        self._config = config
        shape = (config.batch, rows, config.kv_heads, config.head_dim)
        self._kinds = [
            {
                kind: torch.zeros(shape, dtype=torch.float32 if kind == "mean" else config.dtype, device=device)
                for kind in config.summaries
            }
            for _ in range(config.layers)
        ]

    def __bool__(self) -> bool:
        return bool(self._config.summaries)

    @property
    def bytes(self) -> int:
        """Of all summaries."""
        return sum(x.numel() * x.element_size() for kinds in self._kinds for x in kinds.values())

    def all(self, layer: int, kind: str) -> Tensor:
        """[B, rows, HKV, K] of one kind."""
        return self._kinds[layer][kind]

    def move(self, stream: int, source: int, target: int) -> None:
        """Row `target` of a stream becomes a copy of row `source`, or zeros (−1)."""
        layer, row = divmod(stream, self._config.batch)
        for x in self._kinds[layer].values():
            if target < x.shape[1]:
                x[row, target] = x[row, source] if source >= 0 else 0

    def add(self, stream: int, rows: list[int], counts: list[int], k: Tensor, sizes: list[int]) -> None:
        """New keys k [n, HKV, K]: sizes[i] of them in the page of row rows[i], which has counts[i] with them."""
        self._make_rows(stream, max(rows, default=-1) + 1)
        start = 0
        while rows:
            # Pages that hold nothing else and are equally full go together.
            fresh = sizes[0] == counts[0]
            same = 1
            while fresh and same < len(rows) and sizes[same] == counts[same] == sizes[0]:
                same += 1
            stop = start + same * sizes[0]
            keys = k[start:stop].view(same, sizes[0], *k.shape[1:])
            self._combine(stream, torch.tensor(rows[:same], device=k.device), keys, counts[0], fresh)
            rows, counts, sizes, start = rows[same:], counts[same:], sizes[same:], stop

    def replace(self, stream: int, row: int, k: Tensor) -> None:
        """The summary of a page whose keys are now k [n, HKV, K]."""
        self._make_rows(stream, row + 1)
        self._combine(stream, torch.tensor([row], device=k.device), k[None], len(k), True)

    def _combine(self, stream: int, rows: Tensor, keys: Tensor, count: int, fresh: bool) -> None:
        layer, row = divmod(stream, self._config.batch)
        for kind, x in self._kinds[layer].items():
            here = x[row]
            if kind == "mean":
                new = keys.sum(1, dtype=torch.float32)
                old = 0.0 if fresh else here[rows]
                here[rows] = old + (new - keys.shape[1] * old) / count
            else:
                new = keys.amin(1) if kind == "min" else keys.amax(1)
                pick = torch.minimum if kind == "min" else torch.maximum
                here[rows] = new if fresh else pick(here[rows], new)

    def _make_rows(self, stream: int, rows: int) -> None:
        kinds = self._kinds[stream // self._config.batch]
        for kind, x in kinds.items():
            if x.shape[1] < rows:
                more = max(rows, x.shape[1] + x.shape[1] // 2) - x.shape[1]
                kinds[kind] = torch.cat([x, x.new_zeros(x.shape[0], more, *x.shape[2:])], 1)
