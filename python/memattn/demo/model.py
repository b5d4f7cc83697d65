"""A byte-level language model: GatedDeltaNet layers with one local-attention layer among them.

Every mixer follows the convention of `memattn.nn`: `y, state = layer(x, state, return_state=True)`,
`layer.init_state(batch)`, `y_t, state = layer.step(x_t, state)`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from memattn.demo.mixers import FullAttention, LocalAttention
from memattn.nn import GatedDeltaNet

BYTES = 256
_PIECE = 4096  # tokens at a time through the position-wise half of a block when a long prompt is read


@dataclass(frozen=True)
class ModelConfig:
    """`layers` names the mixers from input to output: "delta", "local" or "full"."""

    embed_dim: int = 192
    num_heads: int = 3
    layers: tuple[str, ...] = ("delta", "delta", "local", "delta")
    window: int = 128
    hidden_dim: int = 384

    def with_softmax(self) -> ModelConfig:
        """The same model with full causal softmax attention in place of every GatedDeltaNet."""
        return replace(self, layers=tuple("full" if name == "delta" else name for name in self.layers))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        return cls(**{**values, "layers": tuple(values["layers"])})


def _mixer(name: str, config: ModelConfig) -> GatedDeltaNet | LocalAttention | FullAttention:
    if name == "delta":
        return GatedDeltaNet(config.embed_dim, config.num_heads, head_dim=config.embed_dim // config.num_heads)
    if name == "local":
        return LocalAttention(config.embed_dim, config.num_heads, window=config.window)
    if name == "full":
        return FullAttention(config.embed_dim, config.num_heads)
    raise ValueError(f"layers: got {name!r}; allowed are 'delta', 'local', 'full'")


class SwiGLU(nn.Module):
    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.inward = nn.Linear(embed_dim, 2 * hidden_dim, bias=False)
        self.outward = nn.Linear(hidden_dim, embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.inward(x).chunk(2, dim=-1)
        return self.outward(F.silu(gate) * value)


class Mixer(Protocol):
    """What every mixer of the model can do."""

    def __call__(self, x: Tensor, state: Any, *, return_state: bool) -> tuple[Tensor, Any]: ...
    def init_state(self, batch: int) -> Any: ...
    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]: ...


class Block(nn.Module):
    mixer: Mixer

    def __init__(self, name: str, config: ModelConfig) -> None:
        super().__init__()
        self.mixer_norm = nn.RMSNorm(config.embed_dim)
        self.mixer = cast(Mixer, _mixer(name, config))
        self.mlp_norm = nn.RMSNorm(config.embed_dim)
        self.mlp = SwiGLU(config.embed_dim, config.hidden_dim)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.mixer(self.mixer_norm(x), state, return_state=True)
        x = x + y
        if torch.is_grad_enabled():
            return x + self.mlp(self.mlp_norm(x)), state
        for piece in x.split(_PIECE, dim=1):
            piece += self.mlp(self.mlp_norm(piece))
        return x, state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.mixer.step(self.mixer_norm(x), state)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state


class ByteModel(nn.Module):
    """Bytes `[B, T]` to next-byte logits `[B, T, 256]`; the state is a list with one entry per block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(BYTES, config.embed_dim)
        self.blocks = nn.ModuleList(Block(name, config) for name in config.layers)
        self.norm = nn.RMSNorm(config.embed_dim)
        self.head = nn.Linear(config.embed_dim, BYTES, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def init_state(self, batch: int) -> list[Any]:
        return [block.mixer.init_state(batch) for block in self.layers()]

    def hidden(self, tokens: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """The residual stream `[B, T, embed_dim]` before the head, and the state after the last token."""
        x, after = self.embedding(tokens), []
        for block, before in zip(self.layers(), state, strict=True):
            x, new = block(x, before)
            after.append(new)
        return x, after

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(self.norm(hidden))

    def forward(self, tokens: Tensor, state: list[Any] | None = None) -> tuple[Tensor, list[Any]]:
        hidden, after = self.hidden(tokens, self.init_state(len(tokens)) if state is None else state)
        return self.logits(hidden), after

    def step(self, token: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """One byte `[B]` to the logits `[B, 256]` of the next; the state is updated in place where a layer can."""
        x, after = self.embedding(token[:, None]), []
        for block, before in zip(self.layers(), state, strict=True):
            x, new = block.step(x, before)
            after.append(new)
        return self.logits(x[:, 0]), after

    def layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def detached(state: list[Any]) -> list[Any]:
    """The state without its history: what the next training batch starts from."""
    return [layer.detach() for layer in state]
