"""Block-recurrent attention (Hutchins, Schlag, Wu, Dyer, Neyshabur 2022, arXiv 2203.07852)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memattn.nn.inputs import check_sizes
from memattn.nn.rotary import rotary
from memattn.nn.segment_recurrence import SegmentRecurrence, SlotMemory, head_dim_of
from memattn.ops.attention import AttentionOutput, attention
from memattn.ops.merge_states import merge_states
from memattn.ops.slot_gate import slot_gate
from memattn.ops.slot_write import slot_write

GATES = ("bias", "full", "lstm")
NORM_EPS = 1e-6  # of the squared norm of keys and queries
GATE_STD, GATE_SCALE = 0.1, 0.1  # of gate biases; variance scaling of gate projections
KEEP = 1.0  # added to what a gate keeps, taken off what the LSTM gate lets in


class BlockMemory(SlotMemory):
    """slots [N, M, D] and written [N] of SlotMemory; keys, values [N, W, H, K] of the previous window, not rotated."""

    fields: ClassVar[tuple[str, ...]] = ("slots", "written", "keys", "values")

    def __init__(self, slots: Tensor, written: Tensor, keys: Tensor, values: Tensor) -> None:
        super().__init__(slots, written)
        self.keys = keys
        self.values = values


class BlockRecurrentAttention(SegmentRecurrence):
    """Sliding-window attention beside cross attention to a set of state vectors that is updated once per window.

    Tokens: each sees the last `window` tokens, itself included (rotary positions), with q, and the states with a second
    set of queries q2; [window; states] of all heads → out_proj.
    States: each sees all states with its q, and with its q2 the keys and values of the window and of the one before it
    (not rotated, no causal mask); [states; tokens] → state_out_proj → gate.

    Keys and queries are L2-normalised, scores multiplied by a learnt factor per head, 1 at first. Gates, with h what
    goes into state_out_proj and y what comes out of it: "bias" σ(b) m + (1 − σ(b)) y; "full" the same with
    σ(W h + b + 1); "lstm" σ(W_f h + b_f + 1) m + σ(W_i h + b_i − 1) y. The states have no feed-forward network: the
    paper's "skip" configuration, whose bias gate did best.

    After the authors' code (google-research/meliad, transformer/): RMSNorm of the states, learnt position embeddings
    (standard deviation 1) added after it, initial states and gate biases with standard deviation 0.1, gate projections
    with a tenth of the usual variance; other projections as torch.nn.Linear. Unlike that code, the first window has no
    previous one (there: keys and values of zero take part in the softmax), positions are rotary (there the default is a
    learnt relative bias), and norm and residual of the tokens are left to the model around this layer.

    >>> layer = BlockRecurrentAttention(1024, num_heads=8, window=512, num_states=512)
    >>> y, state = layer(x, return_state=True)              # any number of tokens, in as many parts as you like
    >>> y_t, state = layer.step(x_t, state)                 # generate; updates state in place
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        window: int,
        num_states: int,
        gate: str = "bias",
        rope_base: float | None = 10000.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(self, num_heads=num_heads, window=window, num_states=num_states)
        name = type(self).__name__
        self.head_dim = head_dim_of(name, embed_dim, num_heads)
        if gate not in GATES:
            raise ValueError(f"{name}: gate is {gate!r}; allowed: {', '.join(map(repr, GATES))}")
        if rope_base is not None and self.head_dim % 2:
            raise ValueError(f"{name}: head dimension {self.head_dim} is odd; rotary positions need pairs of channels")
        self.embed_dim, self.num_heads, self.num_states = embed_dim, num_heads, num_states
        self.segment_len, self.feature_dim = window, 4 * embed_dim
        self.gate, self.rope_base, self.backend = gate, rope_base, backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.token_proj = nn.Linear(embed_dim, 4 * embed_dim, bias=False, **factory)  # q, q2, k, v
        self.state_query_proj = nn.Linear(embed_dim, 2 * embed_dim, bias=False, **factory)  # q, q2
        self.state_key_proj = nn.Linear(embed_dim, 2 * embed_dim, bias=False, **factory)  # k, v
        self.state_norm = nn.RMSNorm(embed_dim, eps=1e-6, **factory)
        self.out_proj = nn.Linear(2 * embed_dim, embed_dim, bias=False, **factory)
        self.state_out_proj = nn.Linear(2 * embed_dim, embed_dim, bias=False, **factory)
        self.score_scale = nn.Parameter(torch.empty(4, num_heads, **factory))  # tokens' q, q2; states' q, q2
        self.state_positions = nn.Parameter(torch.empty(num_states, embed_dim, **factory))
        self.initial_states = nn.Parameter(torch.empty(num_states, embed_dim, **factory))
        self.gate_bias = nn.Parameter(torch.empty(embed_dim, **factory)) if gate == "bias" else None
        width = {"bias": 0, "full": embed_dim, "lstm": 2 * embed_dim}[gate]
        self.gate_proj = nn.Linear(2 * embed_dim, width, **factory) if width else None
        self._reset_own()

    def reset_parameters(self) -> None:
        """Initialise every parameter again, e.g. after `to_empty` brought the layer from the meta device."""
        super().reset_parameters()
        self._reset_own()

    def _reset_own(self) -> None:
        nn.init.ones_(self.score_scale)
        nn.init.normal_(self.state_positions)
        nn.init.normal_(self.initial_states, std=0.1)
        if self.gate_bias is not None:
            nn.init.normal_(self.gate_bias, std=GATE_STD)
        if self.gate_proj is not None:
            nn.init.normal_(self.gate_proj.weight, std=(GATE_SCALE / (2 * self.embed_dim)) ** 0.5)
            nn.init.normal_(self.gate_proj.bias, std=GATE_STD)

    def _empty(self, batch: int, like: Tensor) -> BlockMemory:
        dtype = torch.promote_types(like.dtype, torch.float32)
        slots = like.new_zeros(batch, self.num_states, self.embed_dim, dtype=dtype)
        keys = like.new_zeros(batch, self.segment_len, self.num_heads, self.head_dim)
        return BlockMemory(slots, like.new_zeros(batch, dtype=torch.int64), keys, torch.zeros_like(keys))

    # --- projections --------------------------------------------------------------------------------------------------

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], x.shape[2] // self.embed_dim, self.num_heads, self.head_dim)

    def _features(self, x: Tensor) -> Tensor:
        """q, q2, k of length 1, and v."""
        q, q2, k, v = self._heads(self.token_proj(x)).unbind(2)
        return torch.stack([_unit(q), _unit(q2), _unit(k), v], 2).flatten(2)

    def _scaled(self, q: Tensor, which: int) -> Tensor:
        return q * self.score_scale[which].to(q.dtype)[:, None]

    def _normed(self, memory: BlockMemory) -> Tensor:
        slots = self._slots(memory).to(self.state_norm.weight.dtype)
        return self.state_norm(slots) + self.state_positions

    def _slots(self, memory: BlockMemory) -> Tensor:
        return memory.or_initial(self.initial_states)

    def _state_keys(self, memory: BlockMemory, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        k, v = self._heads(self.state_key_proj(self._normed(memory)).to(dtype)).unbind(2)
        return _unit(k), v

    def _rotated(self, x: Tensor, first: int | Tensor) -> Tensor:
        """x [B, T, H, K] at positions first, first + 1, …; first is an int or [B]."""
        if self.rope_base is None:
            return x
        position = torch.arange(x.shape[1], device=x.device) + (first[:, None] if isinstance(first, Tensor) else first)
        return rotary(x, position, self.rope_base)

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _read(self, memory: BlockMemory, features: Tensor) -> Tensor:
        q, q2, k, v = self._heads(features).unbind(2)
        window = self.segment_len
        q = self._rotated(self._scaled(q, 0), window)
        keys, values = self._rotated(memory.keys.to(q.dtype), 0), memory.values.to(q.dtype)
        before = attention(q, keys, values, window=window, q_offset=window, scale=1.0, backend=self.backend)
        before = _if_written(memory, before)
        own = attention(q, self._rotated(k, window), v, merge=before, scale=1.0, backend=self.backend)
        return self._output(memory, q2, own.o)

    def _read_token(self, memory: BlockMemory, open: Tensor, filled: Tensor) -> Tensor:
        _, _, k, v = self._heads(open).unbind(2)
        token = open.gather(1, filled[:, None, None].expand(-1, -1, open.shape[2]))
        q, q2, _, _ = self._heads(token).unbind(2)
        window = self.segment_len
        q = self._rotated(self._scaled(q, 0), filled + window)
        own = self._gather(q, self._rotated(k, window), v, filled + 1)
        keys = self._rotated(memory.keys.to(q.dtype), 0)
        # The token sees the end of the previous window: a prefix of it reversed.
        before = self._gather(q, keys.flip(1), memory.values.to(q.dtype).flip(1), window - 1 - filled)
        seen = merge_states(*zip(own, _if_written(memory, before), strict=True))
        return self._output(memory, q2, seen.o)

    def _gather(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> AttentionOutput:
        return slot_write(q, None, None, k, v, see="none", lengths=lengths, scale=1.0, backend=self.backend)

    def _over(self, q: Tensor, k: Tensor, v: Tensor, merge: AttentionOutput | None = None) -> AttentionOutput:
        return attention(q, k, v, causal=False, merge=merge, scale=1.0, backend=self.backend)

    def _output(self, memory: BlockMemory, q2: Tensor, window: Tensor) -> Tensor:
        keys, values = self._state_keys(memory, q2.dtype)
        states = self._over(self._scaled(q2, 1), keys, values).o
        return self.out_proj(torch.cat([window, states], 2).flatten(2))

    # --- states -------------------------------------------------------------------------------------------------------

    def _write(self, memory: BlockMemory, features: Tensor) -> BlockMemory:
        _, _, k, v = self._heads(features).unbind(2)
        q, q2 = (_unit(x) for x in self._heads(self.state_query_proj(self._normed(memory)).to(k.dtype)).unbind(2))
        keys, values = self._state_keys(memory, k.dtype)
        states = self._over(self._scaled(q, 2), keys, values).o
        q2 = self._scaled(q2, 3)
        before = _if_written(memory, self._over(q2, memory.keys.to(k.dtype), memory.values.to(k.dtype)))
        tokens = self._over(q2, k, v, merge=before).o
        hidden = torch.cat([states, tokens], 2).flatten(2)
        slots = self._gated(self._slots(memory), self.state_out_proj(hidden), hidden)
        return BlockMemory(slots, memory.written + 1, k, v)

    def _gated(self, slots: Tensor, update: Tensor, hidden: Tensor) -> Tensor:
        if self.gate_bias is not None:
            return slot_gate(slots, update, "bias", bias=self.gate_bias)
        assert self.gate_proj is not None
        logits = self.gate_proj(hidden)
        if self.gate == "full":
            return slot_gate(slots, update, "full", logits=logits + KEEP)
        forget, write = logits.chunk(2, -1)
        return slot_gate(slots, update, "lstm", forget=forget + KEEP, input=write - KEEP)

    def extra_repr(self) -> str:
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, window={self.segment_len}, num_states={self.num_states}, "
            f"gate={self.gate!r}, rope_base={self.rope_base}"
        )


def _unit(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()).to(x.dtype)


def _if_written(memory: BlockMemory, before: AttentionOutput) -> AttentionOutput:
    """What the previous window gave, and nothing in rows that have none."""
    return AttentionOutput(before.o, before.lse.masked_fill((memory.written == 0)[:, None, None], -torch.inf))
