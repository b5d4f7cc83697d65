"""A byte-level language model: memory layers (by default GatedDeltaNet) with one local-attention layer among them.

Every mixer follows the convention of `memattn.nn`: `y, state = layer(x, state, return_state=True)`,
`layer.init_state(batch)`, `y_t, state = layer.step(x_t, state)`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from torch import Tensor, nn

from memattn.demo.mixers import PLAIN, make_mixer
from memattn.nn.residual_block import ResidualBlock

BYTES = 256


@dataclass(frozen=True)
class ModelConfig:
    """`layers` names the mixers from input to output, each one of `mixers.NAMES`."""

    embed_dim: int = 192
    num_heads: int = 3
    layers: tuple[str, ...] = ("gdn", "gdn", "local", "gdn")
    window: int = 128
    hidden_dim: int = 384

    def with_memory(self, name: str) -> ModelConfig:
        """The same model with layers of that name in place of its memory layers; the local one stays."""
        return replace(self, layers=tuple(name if layer not in PLAIN else layer for layer in self.layers))

    def with_softmax(self) -> ModelConfig:
        """The same model with full causal softmax attention in place of every memory layer."""
        return self.with_memory("full")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        return cls(**{**values, "layers": tuple(values["layers"])})


class ByteModel(nn.Module):
    """Bytes `[B, T]` to next-byte logits `[B, T, 256]`; the state is a list with one entry per block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(BYTES, config.embed_dim)
        self.blocks = nn.ModuleList(
            ResidualBlock(
                make_mixer(name, config.embed_dim, config.num_heads, config.window), config.embed_dim, config.hidden_dim
            )
            for name in config.layers
        )
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

    def layers(self) -> list[ResidualBlock]:
        return cast(list[ResidualBlock], list(self.blocks))

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def detached(state: list[Any]) -> list[Any]:
    """The state without its history: what the next training batch starts from."""
    return [layer.detach() for layer in state]
