"""A stack of memory layers and attention layers in a given ratio (Wang et al. 2025, arXiv 2507.06457)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from memattn.nn.delta_net import DeltaNet
from memattn.nn.forgetting_attention import ForgettingAttention
from memattn.nn.gated_delta_net import GatedDeltaNet
from memattn.nn.infini_attention import InfiniAttention
from memattn.nn.lizard import Lizard
from memattn.nn.padding import check_mask
from memattn.nn.rat import RAT, RATPlus
from memattn.nn.residual_block import ResidualBlock
from memattn.nn.sliding_window_attention import SlidingWindowAttention
from memattn.state import MemoryState

LayerFactory = Callable[..., nn.Module]

# Short names in specs such as "gdn:3,attn:1". Each is called with (embed_dim, num_heads, device=…, dtype=…, **options).
LAYERS: dict[str, LayerFactory] = {
    "gdn": GatedDeltaNet,
    "deltanet": DeltaNet,
    "rat": RAT,
    "ratplus": RATPlus,
    "infini": InfiniAttention,
    "lizard": Lizard,
    "swa": SlidingWindowAttention,
    "fox": ForgettingAttention,
}


def parse_spec(spec: str, names: Sequence[str] = tuple(LAYERS)) -> list[str]:
    """ "gdn:3,attn:1" -> ["gdn", "gdn", "gdn", "attn"]; a name without a number stands once. Raises ValueError."""
    result: list[str] = []
    for part in spec.split(","):
        name, colon, count = part.strip().partition(":")
        if name not in names:
            raise ValueError(f"layers: got {name!r} in {spec!r}; allowed names: {', '.join(names)}")
        if colon and not (count.isdecimal() and int(count) > 0):
            raise ValueError(f"layers: got {count!r} after {name!r} in {spec!r}; allowed: a whole number ≥ 1")
        result += [name] * (int(count) if colon else 1)
    return result


class StackState(MemoryState):
    """The states of the layers from input to output: `layers`, and each as layer0, layer1 …"""

    def __init__(self, *layers: MemoryState) -> None:
        for n, layer in enumerate(layers):
            setattr(self, f"layer{n}", layer)
        self.fields = tuple(f"layer{n}" for n in range(len(layers)))  # type: ignore[misc]  # one class, any depth

    @property
    def layers(self) -> tuple[MemoryState, ...]:
        """From input to output."""
        return tuple(getattr(self, name) for name in self.fields)


class HybridStack(nn.Module):
    """Pre-norm residual blocks, x ← x + layer(norm(x)), x ← x + mlp(norm(x)), with layers of several kinds.

    layers: a spec "gdn:3,attn:1" (names of `LAYERS`, counts; the order is the stack's), or a sequence of callables,
    each called as layer(embed_dim, num_heads, device=…, dtype=…). The pattern is repeated up to `depth` blocks, once
    when None. options: keyword arguments for the layers of a name, {"swa": {"window": 64}}.

    The study this follows finds that recall rises with the share of attention, mostly below three linear layers to one
    of attention, while the language model's loss hardly changes; it recommends Gated DeltaNet or HGRN-2 at 3:1 to 6:1.
    Kimi Linear's ablation agrees (3:1 best of 0:1, 1:1, 3:1, 7:1, 15:1). Blocks have RMSNorm and a SwiGLU of
    hidden_dim, by default 8/3 embed_dim rounded up to a multiple of 16. No embedding and no norm after the last block:
    those are the model's.

    Called as a single layer: y, state = stack(x, state, return_state=True), init_state, step; attention_mask and
    cu_seqlens reach every layer, and what one layer refuses the stack refuses. The state is a `StackState`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        layers: str | Sequence[LayerFactory],
        *,
        depth: int | None = None,
        hidden_dim: int | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        norm_eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        makers = _makers(layers, options or {})
        if not makers or (depth is not None and depth < 1):
            raise ValueError(f"{name}: layers is {layers!r} and depth is {depth}; allowed: at least one block")
        self.embed_dim, self.layer_spec = embed_dim, layers if isinstance(layers, str) else None
        hidden = -(-8 * embed_dim // 48) * 16 if hidden_dim is None else hidden_dim
        self.blocks = nn.ModuleList(
            ResidualBlock(
                makers[n % len(makers)](embed_dim, num_heads, **factory),
                embed_dim,
                hidden,
                norm_eps=norm_eps,
                **factory,
            )
            for n in range(depth or len(makers))
        )

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the stack from the meta device."""
        for block in self._blocks():
            block.reset_parameters()

    def init_state(self, batch: int, **options: Any) -> StackState:
        """The empty state of `batch` sequences; each option, e.g. max_tokens, goes to the layers that know it."""
        makers = [block.mixer.init_state for block in self._blocks()]
        known = [{n: v for n, v in options.items() if n in inspect.signature(maker).parameters} for maker in makers]
        unknown = options.keys() - set().union(*known)
        if unknown:
            raise TypeError(f"{type(self).__name__}: init_state got {', '.join(sorted(unknown))}, which no layer takes")
        return StackState(*(maker(batch, **some) for maker, some in zip(makers, known, strict=True)))

    def forward(
        self,
        x: Tensor,
        state: StackState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, StackState]:
        """All tokens at once, for training and prefill; arguments and results as in every layer of memattn.nn."""
        self._check(x)
        if attention_mask is not None and cu_seqlens is not None:
            raise ValueError(f"{type(self).__name__}: attention_mask and cu_seqlens are both given; allowed: one")
        how = {"attention_mask": attention_mask, "cu_seqlens": cu_seqlens}
        how = {name: value for name, value in how.items() if value is not None}
        states: Sequence[Any] = (None,) * len(self.blocks) if state is None else state.layers
        if len(states) != len(self.blocks):
            raise ValueError(self._wrong_depth(states))
        if attention_mask is not None:
            check_mask(attention_mask, x)
            x = _zero_outside(attention_mask, x)
        after = []
        for block, before in zip(self._blocks(), states, strict=True):
            x, new = block(x, before, **how)
            after.append(new)
        x = x if attention_mask is None else _zero_outside(attention_mask, x)
        return (x, StackState(*after)) if return_state else x

    def step(self, x: Tensor, state: StackState, *, state_indices: Tensor | None = None) -> tuple[Tensor, StackState]:
        """One or a few tokens per sequence [B, t, embed_dim]: changes `state` and returns it. Without gradients.

        state_indices [B] as in each layer's own step, where all have it.
        """
        self._check(x)
        if len(state.layers) != len(self.blocks):
            raise ValueError(self._wrong_depth(state.layers))
        how = {} if state_indices is None else {"state_indices": state_indices}
        for block, part in zip(self._blocks(), state.layers, strict=True):
            x, _ = block.step(x, part, **how)
        if state_indices is not None:
            x = torch.where((state_indices >= 0)[:, None, None], x, 0.0)
        return x, state

    def _blocks(self) -> list[ResidualBlock]:
        return cast("list[ResidualBlock]", list(self.blocks))

    def _wrong_depth(self, states: Sequence[Any]) -> str:
        return f"{type(self).__name__}: state has {len(states)} layers; expected {len(self.blocks)}, one per block"

    def _check(self, x: Tensor) -> None:
        if x.dim() != 3 or x.shape[2] != self.embed_dim:
            raise ValueError(
                f"{type(self).__name__}: x has shape {list(x.shape)}; expected [B, T, embed_dim] with {self.embed_dim}"
            )

    def extra_repr(self) -> str:
        return f"{self.embed_dim}" if self.layer_spec is None else f"{self.embed_dim}, layers={self.layer_spec!r}"


def _makers(layers: str | Sequence[LayerFactory], options: Mapping[str, Mapping[str, Any]]) -> list[LayerFactory]:
    if not isinstance(layers, str):
        if options:
            raise ValueError(f"HybridStack: options are for {', '.join(options)}; allowed only with a spec of names")
        return list(layers)
    names = parse_spec(layers)
    unused = options.keys() - set(names)
    if unused:
        raise ValueError(f"HybridStack: options are for {', '.join(sorted(unused))}; allowed: {', '.join(set(names))}")
    return [functools.partial(LAYERS[name], **options.get(name, {})) for name in names]


def _zero_outside(mask: Tensor, x: Tensor) -> Tensor:
    return torch.where((mask != 0)[..., None], x, x.new_zeros(()))
