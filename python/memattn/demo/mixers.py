"""The mixers of the demo's model by name: the layers of memattn.nn, and two of plain torch beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.nn.hybrid_stack import LAYERS, LayerFactory
from memattn.nn.memorizing_attention import MemorizingAttention
from memattn.state import MemoryState

# Those of plain torch: the local attention of the model, and the full attention that memories are compared with.
PLAIN = ("local", "full")
MEMORIZING = "memorizing"
NAMES = (*LAYERS, MEMORIZING, *PLAIN)
# What a million bytes can be read with: not caches that hold every token, which take time quadratic in the text.
MEMORIES = tuple(name for name in LAYERS if name not in ("fox", "ratplus"))
STACKED = (*MEMORIES, "local")
# Of those, memories that keep a row of every chunk: reading takes time quadratic in the text, if a small part of full
# attention's.
GROWING = ("rat",)
# What a layer of the demo is given beside its sizes; `window` is the model's.
_SETTINGS: dict[str, Callable[[int], dict[str, int]]] = {
    MEMORIZING: lambda window: {"segment_size": window, "memory_size": 16 * window, "num_neighbors": 16},
    "rat": lambda window: {"num_groups": 1},  # the demo's three heads have no two groups
    "infini": lambda window: {"segment_size": window},
    "lizard": lambda window: {"window": window},
    "swa": lambda window: {"window": window},
}


class LastTokens(MemoryState):
    """Keys and values `[B, H, n, D]` of the last n tokens, n at most the window."""

    fields = ("k", "v")

    def __init__(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = k, v


@dataclass(frozen=True)
class GrowingCache:
    """Keys and values `[B, H, room, D]`; the first `seen` places are filled."""

    k: Tensor
    v: Tensor
    seen: int

    def filled(self) -> tuple[Tensor, Tensor]:
        return self.k[:, :, : self.seen], self.v[:, :, : self.seen]


class _Attention(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of num_heads={num_heads}")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=False)
        self.out = nn.Linear(embed_dim, embed_dim, bias=False)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x `[B, T, embed_dim]` to q, k, v `[B, H, T, D]`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def _merge(self, o: Tensor) -> Tensor:
        return self.out(o.transpose(1, 2).flatten(2))

    def _empty(self, batch: int) -> Tensor:
        return self.qkv.weight.new_zeros(batch, self.num_heads, 0, self.embed_dim // self.num_heads)


class LocalAttention(_Attention):
    """Each token sees itself and the `window - 1` tokens before it, with a linear distance penalty per head (ALiBi).

    Blockwise: a block of `window` queries sees its own block and the one before, so time and memory are linear in T.
    """

    bias: Tensor

    def __init__(self, embed_dim: int, num_heads: int, *, window: int) -> None:
        super().__init__(embed_dim, num_heads)
        self.window = window
        slopes = 2.0 ** (-8.0 * torch.arange(1, num_heads + 1) / num_heads)
        distance = window + torch.arange(window)[:, None] - torch.arange(2 * window)  # [query, key of both blocks]
        bias = -slopes[:, None, None] * distance
        hidden = (distance < 0) | (distance >= window)
        self.register_buffer("bias", bias.masked_fill(hidden, -torch.inf), persistent=False)  # [H, W, 2W]

    def init_state(self, batch: int) -> LastTokens:
        return LastTokens(self._empty(batch), self._empty(batch))

    def forward(
        self, x: Tensor, state: LastTokens | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, LastTokens]:
        state = self.init_state(len(x)) if state is None else state
        length, window, seen = x.shape[1], self.window, state.k.shape[2]
        q, k, v = self._project(x)
        k, v = torch.cat((state.k.to(k.dtype), k), 2), torch.cat((state.v.to(v.dtype), v), 2)
        after = LastTokens(*(t[:, :, -window:].clone() for t in (k, v)))  # a view would keep all of k and v alive
        behind = -length % window
        q = F.pad(q, (0, 0, 0, behind))
        k, v = (F.pad(t, (0, 0, window - seen, behind)) for t in (k, v))
        mask = self._mask(q, seen)
        o = F.scaled_dot_product_attention(*self._blocks(q, k, v), attn_mask=mask)
        o = o.unflatten(0, (len(x), -1)).transpose(1, 2).flatten(2, 3)[:, :, :length]
        y = self._merge(o)
        return (y, after) if return_state else y

    def _blocks(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q to `[B * blocks, H, W, D]`; k and v, one block longer, to `[B * blocks, H, 2W, D]`."""
        window = self.window
        q = q.unflatten(2, (-1, window)).transpose(1, 2).flatten(0, 1)
        k, v = (t.unfold(2, 2 * window, window).movedim(-1, 3).transpose(1, 2).flatten(0, 1) for t in (k, v))
        return q, k, v

    def _mask(self, q: Tensor, seen: int) -> Tensor:
        """The bias `[1 or B * blocks, H, W, 2W]`; the first block does not see places before the start of the text."""
        bias = self.bias.to(q.dtype)
        if seen == self.window:
            return bias[None]
        mask = bias.repeat(q.shape[0], q.shape[2] // self.window, 1, 1, 1)
        mask[:, 0, :, :, : self.window - seen] = -torch.inf
        return mask.flatten(0, 1)

    def step(self, x: Tensor, state: LastTokens) -> tuple[Tensor, LastTokens]:
        """One token `[B, 1, embed_dim]`."""
        q, k, v = self._project(x)
        k, v = (torch.cat((old, new), 2)[:, :, -self.window :] for old, new in ((state.k, k), (state.v, v)))
        bias = self.bias[None, :, -1:, 2 * self.window - k.shape[2] :]  # the last query of a block
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self._merge(o), LastTokens(k, v)


class FullAttention(_Attention):
    """Causal softmax attention over everything so far, with a cache of keys and values that grows with the text.

    It has no position code: it stands for the cost of softmax attention, which a position code would only raise.
    """

    def init_state(self, batch: int) -> GrowingCache:
        return GrowingCache(self._empty(batch), self._empty(batch), 0)

    def forward(
        self, x: Tensor, state: GrowingCache | None = None, *, return_state: bool = False
    ) -> Tensor | tuple[Tensor, GrowingCache]:
        if state is not None and state.seen:
            raise ValueError(f"a prompt is read in one piece: state holds {state.seen} tokens, allowed is 0")
        q, k, v = self._project(x)
        y = self._merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return (y, GrowingCache(k.contiguous(), v.contiguous(), x.shape[1])) if return_state else y

    def random_cache(self, batch: int, tokens: int, room: int) -> GrowingCache:
        """A cache as if `tokens` had been read, with `room` free places: its cost is that of a real one."""
        shape = (batch, self.num_heads, tokens + room, self.embed_dim // self.num_heads)
        weight = self.qkv.weight
        k, v = (torch.randn(shape, device=weight.device, dtype=weight.dtype) for _ in range(2))
        return GrowingCache(k, v, tokens)

    def step(self, x: Tensor, state: GrowingCache) -> tuple[Tensor, GrowingCache]:
        """One token `[B, 1, embed_dim]`, written into the cache."""
        q, k, v = self._project(x)
        place, seen = slice(state.seen, state.seen + 1), state.seen + 1
        state.k[:, :, place], state.v[:, :, place] = k, v
        after = GrowingCache(state.k, state.v, seen)
        return self._merge(F.scaled_dot_product_attention(q, *after.filled())), after


def make_mixer(name: str, embed_dim: int, num_heads: int, window: int) -> nn.Module:
    """The mixer called `name`, one of NAMES."""
    if name == "local":
        return LocalAttention(embed_dim, num_heads, window=window)
    if name == "full":
        return FullAttention(embed_dim, num_heads)
    if name not in NAMES:
        raise ValueError(f"layers: got {name!r}; allowed are {', '.join(NAMES)}")
    settings = _SETTINGS[name](window) if name in _SETTINGS else {}
    make: LayerFactory = MemorizingAttention if name == MEMORIZING else LAYERS[name]
    return make(embed_dim, num_heads, **settings)
