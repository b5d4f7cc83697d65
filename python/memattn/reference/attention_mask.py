"""Which keys a query sees: the mask of `attention` as arithmetic on positions. Nothing T×T is stored.

The kernels' copy of the same rules is csrc/cpu/attention_mask.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Mask:
    """The mask arguments of `attention`. Query row t has position t + q_offset, key row t position t."""

    causal: bool | str = True
    window: int | None = None
    prefix_len: int = 0
    block_size: int | None = None
    chunk_rule: tuple | None = None
    q_offset: Any = 0

    def visible(self, i: Any, j: Any) -> Any:
        """Whether query position i sees key position j: integers, or tensors that broadcast."""
        seen = (i >= 0) & (j >= 0)
        rule, sizes = (self.chunk_rule[0], self.chunk_rule[1:]) if self.chunk_rule else (None, ())
        if rule == "summary":
            seen = seen & (i // sizes[0] > j)
        elif self.causal is True:
            seen = seen & (j <= i)
        if self.block_size is not None:
            ahead = i // self.block_size - j // self.block_size
            seen = seen & (ahead >= 0 if self.causal == "block" else ahead == 0)
        if self.window is not None:
            seen = seen & (i - j < self.window)
        if rule == "dilated":
            dilation, window, prefix = sizes
            seen = seen & (((j + 1) % dilation == 0) | (i - j < window) | (j < prefix))
        return seen | (j < self.prefix_len)

    def keys(self, i: int, length: int) -> tuple[int, int]:
        """The range of keys beyond the prefix that i may see. Both ends never fall as i grows; dilation thins it."""
        begin, end = 0, length
        if self.chunk_rule and self.chunk_rule[0] == "summary":
            end = i // self.chunk_rule[1]
        elif self.causal is True:
            end = i + 1
        if self.block_size is not None:
            block = i // self.block_size * self.block_size
            begin, end = (0 if self.causal == "block" else block), min(end, block + self.block_size)
        if self.window is not None:
            begin = max(begin, i - self.window + 1)
        return begin, min(end, length)

    def tile(self, queries: tuple[int, int], keys: tuple[int, int], length: int) -> str:
        """What positions first..last of the queries see of keys begin..end: "none", "full" or "partial"."""
        (first, last), (begin, end) = queries, keys
        least, most = self.keys(first, length), self.keys(last, length)
        if begin >= self.prefix_len and (end <= least[0] or begin >= most[1]):
            return "none"
        thinned = False
        if self.chunk_rule and self.chunk_rule[0] == "dilated":
            dilation, window, prefix = self.chunk_rule[1:]
            thinned = dilation > 1 and last - begin >= window and end > prefix
        whole = most[0] <= max(begin, self.prefix_len) and end <= least[1] and not thinned
        return "full" if end <= self.prefix_len or whole else "partial"
