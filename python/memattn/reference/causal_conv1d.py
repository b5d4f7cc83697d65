"""Short causal depthwise convolution in plain torch.

`loop` is the definition, token by token; in float64 it is the truth every backend is measured against. `chunked` is the
differentiable fallback that runs anywhere torch does: one gather per tap, whatever the sequence layout. `step` decodes
in place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums and states: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _initial(x, weight, initial_state, cu_seqlens):
    if initial_state is not None:
        return initial_state
    n = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return x.new_zeros(n, x.shape[2], weight.shape[1] - 1, dtype=accumulate_dtype(x.dtype))


def _activate(z, activation):
    return F.silu(z) if activation == "silu" else z


def loop(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """window ← last W inputs;  y_t = act(bias + Σ_w weight[:, w] · window[w]), one token at a time."""
    dtype = accumulate_dtype(x.dtype)
    state = _initial(x, weight, initial_state, cu_seqlens)

    def run(x, tail):
        """x [B,T,D], tail [B,D,W-1]: the W-1 inputs before x."""
        outputs = []
        for t in range(x.shape[1]):
            window = torch.cat([tail, x[:, t, :, None]], -1)
            z = (window * weight.to(dtype)).sum(-1)
            outputs.append(_activate(z if bias is None else z + bias.to(dtype), activation))
            tail = window[..., 1:]
        return (torch.stack(outputs, 1) if outputs else torch.zeros_like(x)), tail

    rows = x.to(dtype)
    if cu_seqlens is None:
        y, tail = run(rows, state)
    else:
        bounds = cu_seqlens.tolist()
        parts = [run(rows[:, a:b], state[n : n + 1]) for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))]
        y, tail = (torch.cat([p[i] for p in parts], 1 - i) for i in (0, 1)) if parts else (rows, state)
    return y.to(x.dtype), tail.clone() if output_final_state else None


def chunked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """All tokens at once: the inputs and the tails before them become one table of rows, each tap gathers from it."""
    (batch, length, channels), width = x.shape, weight.shape[1]
    dtype, tokens, tail = accumulate_dtype(x.dtype), batch * length, width - 1
    state = _initial(x, weight, initial_state, cu_seqlens)
    if cu_seqlens is None:
        bounds = torch.arange(batch + 1, device=x.device) * length
    else:
        bounds = cu_seqlens.long()
    begin, end = bounds[:-1], bounds[1:]
    tails = state.transpose(1, 2).reshape(state.shape[0] * tail, channels)
    table = torch.cat([x.to(dtype).reshape(tokens, channels), tails])

    def rows(sequence, position):
        """Table row of a position counted from the start of its sequence; negative ones lie in the tail."""
        return torch.where(
            position >= 0, begin[sequence] + position, tokens + (sequence + 1) * tail + position.clamp(min=-tail)
        )

    token = torch.arange(tokens, device=x.device)
    sequence = torch.searchsorted(bounds, token, right=True) - 1  # of several that begin here, the last
    z = x.new_zeros(tokens, channels, dtype=dtype) if bias is None else bias.to(dtype).expand(tokens, channels)
    for w in range(width):
        z = z + weight[:, w].to(dtype) * table[rows(sequence, token - begin[sequence] - tail + w)]
    y = _activate(z, activation).to(x.dtype).view(x.shape)
    if not output_final_state:
        return y, None
    every = torch.arange(begin.shape[0], device=x.device)[:, None]
    last = (end - begin)[:, None] + torch.arange(-tail, 0, device=x.device)
    return y, table[rows(every, last)].transpose(1, 2).contiguous()


def step(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor,
    *,
    activation: str | None = None,
    state_indices: Tensor | None = None,
) -> Tensor:
    """`chunked` on rows of a state pool, written back in place; rows with index −1 give 0 and write nothing."""
    if state.shape[0] == 0:
        return torch.zeros_like(x)
    rows = torch.arange(x.shape[0], device=x.device) if state_indices is None else state_indices.long()
    live = (rows >= 0) & (rows < state.shape[0])
    pool = state[rows.clamp(0, state.shape[0] - 1)]
    y, after = chunked(x, weight, bias, activation=activation, initial_state=pool, output_final_state=True)
    if after is not None and bool(live.any()):
        state[rows[live]] = after[live]
    return torch.where(live[:, None, None], y, torch.zeros_like(y))
