"""DeltaNet layer (Yang et al. 2024, arXiv 2406.06484; the rule itself: Schlag et al. 2021, arXiv 2102.11174)."""

from __future__ import annotations

import torch
from torch import Tensor

from memattn.nn.delta_rule_layer import DeltaRuleLayer


class DeltaNet(DeltaRuleLayer):
    """A layer whose memory is one matrix per head: it overwrites what a key held before, and otherwise forgets nothing.

    S_t = (I − β_t k_t k_tᵀ) S_{t−1} + β_t k_t v_tᵀ,  β = sigmoid(beta_proj x), twice that with allow_neg_eigval.
    q, k, v pass a short convolution and SiLU, q and k are normalised; the readout is RMSNorm(Sᵀq) per head, times
    silu(gate_proj x) with output_gate. Defaults and initialisation as in the authors' layer
    (flash-linear-attention, fla/layers/delta_net.py), whose projections start as torch.nn.Linear.

    Arguments and calls as in `GatedDeltaNet`.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_value_heads: int | None = None,
        value_head_dim: int | None = None,
        conv_size: int = 4,
        conv_bias: bool = False,
        output_gate: bool = False,
        allow_neg_eigval: bool = False,
        norm_eps: float = 1e-5,
        chunk_size: int | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            head_dim=head_dim,
            num_value_heads=num_value_heads,
            value_head_dim=value_head_dim,
            conv_size=conv_size,
            conv_bias=conv_bias,
            output_gate=output_gate,
            allow_neg_eigval=allow_neg_eigval,
            norm_eps=norm_eps,
            chunk_size=chunk_size,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    def _gates(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, self._beta(x)
