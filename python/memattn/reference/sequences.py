"""What the references of the memory ops share: dtype, packed sequences one by one, decays inside a chunk."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of gates, states and sums: float64 for float64 inputs, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_sequence(run, tensors, initial_state, cu_seqlens):
    """Apply `run(*tensors, state) -> (o, state)` to the batch, or to each packed sequence in turn."""
    if cu_seqlens is None:
        return run(*tensors, initial_state)
    bounds = cu_seqlens.tolist()
    parts = [
        run(*(x[:, a:b] for x in tensors), initial_state[n : n + 1])
        for n, (a, b) in enumerate(zip(bounds, bounds[1:], strict=False))
    ]
    return torch.cat([o for o, _ in parts], 1), torch.cat([s for _, s in parts], 0)


def on_pool_rows(run, state, state_indices, batch):
    """`run(rows) -> (o, rows)` on rows of a state pool, written back in place; index −1 gives 0 and writes nothing."""
    rows = torch.arange(batch, device=state.device) if state_indices is None else state_indices.long()
    live = (rows >= 0) & (rows < state.shape[0])
    o, after = run(state[rows.clamp(0, max(state.shape[0] - 1, 0))])
    if bool(live.any()):
        state[rows[live]] = after[live]
    return torch.where(live[:, None, None, None], o, torch.zeros_like(o))


def chunk_decays(g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decays inside chunks of C tokens with log gates g [..., C]; G is their cumulative sum.

    Returns e^{G_i − G_j} [..., C, C] for j ≤ i and 0 elsewhere; e^{G_i} and e^{G_C − G_i} [..., C, 1]; e^{G_C}
    [..., 1, 1]. Each exponent is a sum of the gates between, not a difference of two long sums: under strong decay that
    would lose the digits of the few pairs that are not forgotten.
    """
    chunk_size = g.shape[-1]
    causal = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=g.device).tril()
    between = g[..., :, None].expand(*g.shape, chunk_size).masked_fill(~causal.tril(-1), 0.0).cumsum(-2)
    decay = between.masked_fill(~causal, -torch.inf).exp()
    from_start = g.cumsum(-1).exp()[..., None]
    return decay, from_start, decay[..., -1, :, None], from_start[..., -1:, :]
